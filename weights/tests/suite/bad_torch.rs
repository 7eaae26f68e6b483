//! PyTorch files that are cut, damaged or something else: refused, never read as zeros.

use std::rc::Rc;

use burn::backend::Flex;
use burn::tensor::DType;
use serde_json::json;

use crate::support::{Folder, MODEL, Safetensors, Stored};
use crate::torch::{self, Entries};

const FILE: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
const ARCHIVE: &str = "a zip archive that torch.save wrote (PyTorch 1.6 or later)";

/// A golden checkpoint stored by PyTorch, and what is in the file.
fn stored() -> (Folder, Vec<Stored>) {
    let folder = Folder::golden("internlm2-tiny");
    let tensors = Safetensors::parse(&folder.read(MODEL)).tensors();
    folder.remove(MODEL);
    folder.write(FILE, &torch::save(&tensors));
    (folder, tensors)
}

/// What is said of the folder once the entries of its file are changed, when opened or when loaded.
fn refusal(edit: impl FnOnce(&mut Entries, &[Stored])) -> String {
    let (folder, tensors) = stored();
    let mut entries = torch::entries(&tensors);
    edit(&mut entries, &tensors);
    folder.write(FILE, &torch::zip(&entries));
    refused(&folder)
}

fn refused(folder: &Folder) -> String {
    let result = long_context_weights::Checkpoint::open(folder.path()).and_then(|checkpoint| {
        checkpoint.load::<Flex>(checkpoint.config(), DType::F32, &Default::default(), Rc::new(|_| ()))
    });
    folder.relative(&result.expect_err("it should be refused"))
}

fn key_of(tensors: &[Stored], name: &str) -> String {
    format!("archive/data/{}", tensors.iter().position(|tensor| tensor.name == name).unwrap())
}

fn total(tensors: &[Stored]) -> usize {
    tensors.iter().map(|tensor| tensor.data.len()).sum()
}

#[test]
fn tensors_are_those_of_the_model() {
    let edited = |edit: fn(&mut Vec<Stored>)| {
        let (folder, mut tensors) = stored();
        edit(&mut tensors);
        folder.write(FILE, &torch::save(&tensors));
        refused(&folder)
    };
    let index = "tensor `model.norm.weight`";
    assert_eq!(
        edited(|tensors| tensors.retain(|tensor| tensor.name != "model.norm.weight")),
        format!("{FILE}: {index}: found nothing, expected it, of shape [64]")
    );
    assert_eq!(
        edited(|tensors| tensors.iter_mut().for_each(|tensor| {
            if tensor.name == "model.norm.weight" {
                tensor.shape = vec![8, 8];
            }
        })),
        format!("{FILE}: {index}: found shape [8, 8], expected [64]")
    );
    assert_eq!(
        edited(|tensors| {
            let more = Stored { name: "model.norm.bias".to_string(), ..tensors[0].clone() };
            tensors.push(more);
        }),
        format!("{FILE}: tensor `model.norm.bias`: found it, expected no such tensor in this model")
    );
    assert_eq!(
        edited(|tensors| tensors.iter_mut().for_each(|tensor| {
            if tensor.name == "model.norm.weight" {
                tensor.dtype = "F64".to_string();
                tensor.shape = vec![32];
            }
        })),
        format!("{FILE}: {index}: found dtype F64, expected F32, F16 or BF16")
    );
}

#[test]
fn absent_or_short_storages_are_refused() {
    let (_, tensors) = stored();
    let all = total(&tensors);
    let line = |found: usize| {
        let file =
            format!("{FILE}: data: found {found} bytes, expected at least {all} for its tensors, at most ");
        move |message: String| assert!(message.starts_with(&file), "{message}\n{file}")
    };
    line(all - 256)(refusal(|entries, tensors| {
        let key = key_of(tensors, "model.norm.weight");
        entries.retain(|(name, _)| *name != key);
    }));
    line(all - 4)(refusal(|entries, tensors| {
        let key = key_of(tensors, "model.norm.weight");
        let entry = entries.iter_mut().find(|(name, _)| *name == key).unwrap();
        entry.1.truncate(252);
    }));
    line(0)(refusal(|entries, _| entries.retain(|(name, _)| !name.contains("/data/"))));
}

#[test]
fn a_storage_that_cannot_be_read_is_not_taken_for_zeros() {
    // Another one makes up for the size of the absent one.
    let message = refusal(|entries, tensors| {
        let key = key_of(tensors, "model.norm.weight");
        entries.iter_mut().find(|(name, _)| *name == key).unwrap().0 = "archive/data/999".to_string();
    });
    let expected = format!(
        "{FILE}: tensor `model.norm.weight`: found nothing but zeros, expected data that can be read"
    );
    assert_eq!(message, expected);

    let (folder, tensors) = stored();
    let norm = tensors.iter().find(|tensor| tensor.name == "model.norm.weight").unwrap();
    let mut bytes = folder.read(FILE);
    let at = bytes.windows(norm.data.len()).position(|window| window == norm.data).unwrap();
    bytes[at] ^= 1;
    folder.write(FILE, &bytes);
    assert_eq!(refused(&folder), expected);
}

#[test]
fn a_file_that_is_no_archive_is_refused() {
    let (folder, tensors) = stored();
    let whole = folder.read(FILE);
    let pickle = torch::entries(&tensors)[0].1.clone();
    for bytes in
        [vec![], b"PK".to_vec(), vec![0; 7], pickle, b"version https://git-lfs.github.com/spec/v1\n".to_vec()]
    {
        folder.write(FILE, &bytes);
        assert_eq!(refused(&folder), format!("{FILE}: content: found no zip archive, expected {ARCHIVE}"));
    }
    for length in [4, 100, whole.len() / 2, whole.len() - 1] {
        folder.write(FILE, &whole[..length]);
        let message = refused(&folder);
        assert!(message.starts_with(&format!("{FILE}: content: found ")), "{message}");
        assert!(message.ends_with(ARCHIVE), "{message}");
    }
    let message = refusal(|entries, _| drop(entries.remove(0)));
    assert!(message.starts_with(&format!("{FILE}: content: found ")), "{message}");
    let message = refusal(|entries, _| entries[0].1.truncate(200));
    assert!(message.starts_with(&format!("{FILE}: content: found ")), "{message}");
    let message = refusal(|entries, _| entries[0].1 = b"\x80\x02K\x05.".to_vec());
    assert!(message.starts_with(&format!("{FILE}: content: found ")), "{message}");
}

#[test]
fn an_index_stays_inside_its_folder_and_agrees_with_its_shards() {
    let (folder, tensors) = stored();
    let map = |file: &str| {
        let entries = tensors.iter().map(|tensor| (tensor.name.clone(), json!(file)));
        json!({ "weight_map": entries.collect::<serde_json::Map<_, _>>() })
    };
    folder.write_json(INDEX, &map("../pytorch_model.bin"));
    let first = tensors.iter().map(|tensor| &tensor.name).min().unwrap();
    let message = refused(&folder);
    assert!(
        message.ends_with("found file `../pytorch_model.bin`, expected a file inside the folder"),
        "{message}"
    );
    folder.write_json(INDEX, &map("absent.bin"));
    let expected = format!("{INDEX}: shard `absent.bin`: found no such file, expected one in the folder");
    assert_eq!(refused(&folder), expected);
    folder.write_json(INDEX, &map(FILE));
    folder.open();
    let rest: Vec<Stored> = tensors.iter().filter(|tensor| tensor.name != *first).cloned().collect();
    folder.write(FILE, &torch::save(&rest));
    let expected = format!("{FILE}: tensor `{first}`: found nothing, expected it here, as the index says");
    assert_eq!(refused(&folder), expected);
}
