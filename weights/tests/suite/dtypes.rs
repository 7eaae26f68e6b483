//! What is computed with equals what is stored, whatever the type and the kind of file.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use burn::backend::Flex;
use burn::tensor::DType;
use burn_store::ModuleSnapshot;
use half::{bf16, f16};
use long_context_weights::Checkpoint;
use serde_json::{Map, json};

use crate::support::{Folder, INDEX, MODEL, Safetensors, Stored};
use crate::torch;

/// A tensor stored in another type, and the values that it has then.
fn narrowed(tensor: &Stored, dtype: &str) -> (Stored, Vec<f32>) {
    let values: Vec<f32> =
        tensor.data.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect();
    let (data, values): (Vec<u8>, Vec<f32>) = match dtype {
        "F16" => {
            let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
            (
                halves.iter().flat_map(|half| half.to_le_bytes()).collect(),
                halves.iter().map(|half| half.to_f32()).collect(),
            )
        }
        "BF16" => {
            let halves: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            (
                halves.iter().flat_map(|half| half.to_le_bytes()).collect(),
                halves.iter().map(|half| half.to_f32()).collect(),
            )
        }
        _ => (tensor.data.clone(), values),
    };
    (Stored { dtype: dtype.to_string(), data, ..tensor.clone() }, values)
}

/// The parameters of a loaded model as f32, by their names in the checkpoint, and the type they are in.
fn loaded(checkpoint: &Checkpoint, dtype: DType) -> BTreeMap<String, (DType, Vec<f32>)> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let heard = seen.clone();
    let progress = Rc::new(move |bytes| heard.borrow_mut().push(bytes));
    let config = checkpoint.config();
    let model = checkpoint.load::<Flex>(config, dtype, &Default::default(), progress).unwrap();
    let seen = seen.borrow();
    assert!(seen.is_sorted());
    assert_eq!(seen.len(), config.tensors().len());
    assert_eq!(seen.last(), Some(&checkpoint.bytes()));

    // The first part is the family's name.
    let path = |full: &str| full.split_once('.').unwrap().1.to_string();
    let parameters: BTreeMap<_, _> =
        model.collect(None, None, false).into_iter().map(|s| (path(&s.full_path()), s)).collect();
    assert_eq!(parameters.len(), config.tensors().len());
    let read = |spec: long_context::models::TensorSpec| {
        let data = parameters[&spec.path].to_data().unwrap();
        assert_eq!(data.shape.to_vec(), spec.shape, "{}", spec.name);
        (spec.name, (data.dtype, data.iter::<f32>().collect()))
    };
    config.tensors().into_iter().map(read).collect()
}

#[test]
fn stored_types_are_widened_exactly() {
    for golden in ["internlm2-mha-tiny", "glm4-tiny"] {
        for dtype in ["F32", "F16", "BF16"] {
            let folder = Folder::golden(golden);
            let tensors = Safetensors::parse(&folder.read(MODEL)).tensors();
            let narrow: Vec<_> = tensors.iter().map(|tensor| narrowed(tensor, dtype)).collect();
            let stored: Vec<Stored> = narrow.iter().map(|(tensor, _)| tensor.clone()).collect();
            folder.write(MODEL, &Safetensors::of(&stored).to_bytes());

            let checkpoint = folder.open();
            assert_eq!(checkpoint.stored_types(), [dtype.to_lowercase()]);
            let parameters = loaded(&checkpoint, DType::F32);
            for (tensor, values) in &narrow {
                if !tensor.name.ends_with("inv_freq") {
                    let (found, read) = &parameters[&tensor.name];
                    assert_eq!(
                        (*found, read == values),
                        (DType::F32, true),
                        "{golden} in {dtype}: {}",
                        tensor.name
                    );
                }
            }
        }
    }
}

#[test]
fn types_may_differ_within_a_file() {
    let folder = Folder::golden("internlm2-tiny");
    let tensors = Safetensors::parse(&folder.read(MODEL)).tensors();
    let types = ["F32", "F16", "BF16"].iter().cycle();
    let narrow: Vec<_> = tensors.iter().zip(types).map(|(tensor, dtype)| narrowed(tensor, dtype)).collect();
    let stored: Vec<Stored> = narrow.iter().map(|(tensor, _)| tensor.clone()).collect();
    folder.write(MODEL, &Safetensors::of(&stored).to_bytes());
    let checkpoint = folder.open();
    assert_eq!(checkpoint.stored_types(), ["bf16", "f16", "f32"]);
    let parameters = loaded(&checkpoint, DType::F32);
    for (tensor, values) in &narrow {
        assert!(parameters[&tensor.name].1 == *values, "{}", tensor.name);
    }
}

#[test]
fn values_are_rounded_to_the_type_computed_in() {
    let folder = Folder::golden("internlm2-tiny");
    let tensors = Safetensors::parse(&folder.read(MODEL)).tensors();
    for (dtype, name) in [(DType::F16, "F16"), (DType::BF16, "BF16")] {
        for stored in ["F32", name] {
            let narrow: Vec<_> = tensors.iter().map(|tensor| narrowed(tensor, name)).collect();
            let file: Vec<Stored> = tensors.iter().map(|tensor| narrowed(tensor, stored).0).collect();
            folder.write(MODEL, &Safetensors::of(&file).to_bytes());
            let parameters = loaded(&folder.open(), dtype);
            for (tensor, values) in &narrow {
                let (found, read) = &parameters[&tensor.name];
                assert_eq!((*found, read == values), (dtype, true), "{stored} as {name}: {}", tensor.name);
            }
        }
    }
}

#[test]
fn infinities_and_subnormal_values_survive() {
    let folder = Folder::golden("internlm2-tiny");
    let odd: Vec<u16> = vec![0x7c00, 0xfc00, 0x0001, 0x8000, 0x03ff, 0x7bff];
    folder.edit_weights(MODEL, |file| {
        let mut tensors = file.tensors();
        let norm = tensors.iter_mut().find(|tensor| tensor.name == "model.norm.weight").unwrap();
        norm.dtype = "F16".to_string();
        norm.data = odd.iter().cycle().take(64).flat_map(|bits| bits.to_le_bytes()).collect();
        *file = Safetensors::of(&tensors);
    });
    let expected: Vec<u32> =
        odd.iter().cycle().take(64).map(|&bits| f16::from_bits(bits).to_f32().to_bits()).collect();
    let parameters = loaded(&folder.open(), DType::F32);
    let read: Vec<u32> = parameters["model.norm.weight"].1.iter().map(|value| value.to_bits()).collect();
    assert_eq!(read, expected);
}

#[test]
fn shards_equal_the_single_file() {
    for name in ["internlm2-tiny", "glm4-tiny"] {
        let (whole, sharded) =
            (Folder::golden(name).open(), Folder::golden(&format!("{name}-sharded")).open());
        assert_eq!((whole.files(), sharded.files()), (1, 2));
        assert_eq!(whole.bytes(), sharded.bytes());
        assert!(loaded(&whole, DType::F32) == loaded(&sharded, DType::F32), "{name}");
    }
}

#[test]
fn an_index_goes_before_a_single_file() {
    let folder = Folder::golden("internlm2-tiny-sharded");
    folder.write(MODEL, b"not read");
    assert_eq!(folder.open().files(), 2);
    folder.write("pytorch_model.bin", b"not read");
    assert_eq!(folder.open().files(), 2);
    folder.remove(INDEX);
    assert!(folder.refusal().starts_with("model.safetensors: header: "));
}

#[test]
fn pytorch_files_equal_safetensors() {
    for golden in ["internlm2-mha-tiny", "glm4-tiny"] {
        for dtype in ["F32", "F16", "BF16"] {
            let folder = Folder::golden(golden);
            let tensors = Safetensors::parse(&folder.read(MODEL)).tensors();
            let stored: Vec<Stored> = tensors.iter().map(|tensor| narrowed(tensor, dtype).0).collect();
            folder.write(MODEL, &Safetensors::of(&stored).to_bytes());
            let expected = loaded(&folder.open(), DType::F32);
            folder.remove(MODEL);

            folder.write("pytorch_model.bin", &torch::save(&stored));
            let single = folder.open();
            assert_eq!((single.files(), single.stored_types()), (1, vec![dtype.to_lowercase()]));
            assert!(loaded(&single, DType::F32) == expected, "{golden} in {dtype}");
            folder.remove("pytorch_model.bin");

            let mut map = Map::new();
            for (i, part) in stored.chunks(stored.len().div_ceil(3)).enumerate() {
                let name = format!("pytorch_model-{:05}-of-00003.bin", i + 1);
                folder.write(&name, &torch::save(part));
                map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(name))));
            }
            folder.write_json("pytorch_model.bin.index.json", &json!({ "metadata": {}, "weight_map": map }));
            let sharded = folder.open();
            assert_eq!(sharded.files(), 3);
            assert!(loaded(&sharded, DType::F32) == expected, "{golden} in {dtype}, sharded");
        }
    }
}
