//! Weight files and indices that are not what they say: one line that names the file and the tensor.

use serde_json::{Value, json};

use crate::support::{CONFIG, Folder, INDEX, MODEL, SHARD, Safetensors, Stored, with_header};

const OTHER_SHARD: &str = "model-00002-of-00002.safetensors";

type Edit = fn(&mut Safetensors);

fn check_weights(cases: &[(Edit, &str)]) {
    for (edit, message) in cases {
        let folder = Folder::golden("internlm2-tiny");
        folder.edit_weights(MODEL, edit);
        assert_eq!(folder.refusal(), *message);
    }
}

fn without(file: &mut Safetensors, name: &str) {
    let kept: Vec<Stored> = file.tensors().into_iter().filter(|tensor| tensor.name != name).collect();
    *file = Safetensors::of(&kept);
}

fn with(file: &mut Safetensors, name: &str) {
    let mut tensors = file.tensors();
    tensors.push(Stored {
        name: name.to_string(),
        dtype: "F32".to_string(),
        shape: vec![2],
        data: vec![0; 8],
    });
    *file = Safetensors::of(&tensors);
}

#[test]
fn every_tensor_of_the_model_is_there_and_no_other() {
    check_weights(&[
        (
            |file| without(file, "model.norm.weight"),
            "model.safetensors: tensor `model.norm.weight`: found nothing, expected it, of shape [64]",
        ),
        (
            |file| without(file, "model.layers.2.feed_forward.w3.weight"),
            "model.safetensors: tensor `model.layers.2.feed_forward.w3.weight`: found nothing, expected it, of shape [160, 64]",
        ),
        (
            |file| *file = Safetensors::of(&[]),
            "model.safetensors: tensor `model.tok_embeddings.weight`: found nothing, expected it, of shape [256, 64]",
        ),
        (
            |file| with(file, "model.norm.bias"),
            "model.safetensors: tensor `model.norm.bias`: found it, expected no such tensor in this model",
        ),
        (
            |file| with(file, "model.layers.3.ffn_norm.weight"),
            "model.safetensors: tensor `model.layers.3.ffn_norm.weight`: found it, expected no such tensor in this model",
        ),
        (
            |file| with(file, "two\nlines"),
            "model.safetensors: tensor `two lines`: found it, expected no such tensor in this model",
        ),
    ]);
}

#[test]
fn derived_frequencies_may_be_there() {
    for (golden, name) in [
        ("internlm2-tiny", "model.layers.0.attention.rotary_emb.inv_freq"),
        ("glm4-tiny", "transformer.rotary_pos_emb.inv_freq"),
    ] {
        let folder = Folder::golden(golden);
        folder.edit_weights(MODEL, |file| without(file, name));
        folder.open();
        folder.edit_weights(MODEL, |file| with(file, name));
        folder.open();
    }
}

#[test]
fn shapes_and_types_are_those_of_the_model() {
    check_weights(&[
        (
            |file| file.entry("output.weight")["shape"] = json!([64, 256]),
            "model.safetensors: tensor `output.weight`: found shape [64, 256], expected [256, 64]",
        ),
        (
            |file| file.entry("model.norm.weight")["shape"] = json!([1, 64]),
            "model.safetensors: tensor `model.norm.weight`: found shape [1, 64], expected [64]",
        ),
        (
            |file| file.entry("output.weight")["dtype"] = json!("I32"),
            "model.safetensors: tensor `output.weight`: found dtype \"I32\", expected F32, F16 or BF16",
        ),
        (
            |file| file.entry("output.weight")["dtype"] = json!("F8_E4M3"),
            "model.safetensors: tensor `output.weight`: found dtype \"F8_E4M3\", expected F32, F16 or BF16",
        ),
        (
            |file| file.entry("output.weight")["dtype"] = json!("F16"),
            "model.safetensors: tensor `output.weight`: found 65536 bytes for F16 [256, 64], expected 32768",
        ),
        (
            |file| file.entry("output.weight")["dtype"] = Value::Null,
            "model.safetensors: tensor `output.weight`: found dtype null, expected F32, F16 or BF16",
        ),
    ]);
    let folder = Folder::golden("internlm2-tiny");
    folder.configure("intermediate_size", json!(161));
    let expected = "model.safetensors: tensor `model.layers.0.feed_forward.w1.weight`: found shape [160, 64], expected [161, 64]";
    assert_eq!(folder.refusal(), expected);
}

#[test]
fn cut_or_padded_data_is_refused() {
    let folder = Folder::golden("internlm2-tiny");
    let whole = folder.read(MODEL);
    let file = Safetensors::parse(&whole);
    let (last, data) = (file.last(), file.data.len());
    let (first, end) = file.range(&last);
    for cut in [1, 4, end - first] {
        folder.write(MODEL, &whole[..whole.len() - cut]);
        let expected = format!(
            "model.safetensors: tensor `{last}`: found bytes {first}..{end}, expected a range inside the {} bytes of data",
            data - cut
        );
        assert_eq!(folder.refusal(), expected);
    }
    folder.write(MODEL, &[&whole[..], &[0; 3]].concat());
    let expected =
        format!("model.safetensors: data: found {} bytes, expected {data} as its header says", data + 3);
    assert_eq!(folder.refusal(), expected);
}

#[test]
fn a_header_that_lies_about_tensors_is_refused() {
    let a = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let ab = |first: &str, second: &str| {
        let entry = |offsets| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#);
        format!(r#"{{"a":{},"b":{}}}"#, entry(first), entry(second))
    };
    let twice = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    for (header, data, message) in [
        (a("[2]", "[0,8]"), 4, "tensor `a`: found bytes 0..8, expected a range inside the 4 bytes of data"),
        (a("[2]", "[8,0]"), 8, "tensor `a`: found bytes 8..0, expected a range inside the 8 bytes of data"),
        (
            a("[2]", "[0,18446744073709551615]"),
            8,
            "tensor `a`: found bytes 0..18446744073709551615, expected a range inside the 8 bytes of data",
        ),
        (a("[3]", "[0,8]"), 8, "tensor `a`: found 8 bytes for F32 [3], expected 12"),
        (a("[]", "[0,8]"), 8, "tensor `a`: found 8 bytes for F32 [], expected 4"),
        (
            a("[4294967296,4294967296,4]", "[0,8]"),
            8,
            "tensor `a`: found 8 bytes for F32 [4294967296, 4294967296, 4], expected a size that can be addressed",
        ),
        (a("[2]", "[4,12]"), 12, "tensor `a`: found data from byte 4, expected 0 (no holes, no overlaps)"),
        (a("[2]", "[0,8]"), 12, "data: found 12 bytes, expected 8 as its header says"),
        (ab("[0,8]", "[4,12]"), 12, "tensor `b`: found data from byte 4, expected 8 (no holes, no overlaps)"),
        (ab("[0,8]", "[0,8]"), 8, "tensor `b`: found data from byte 0, expected 8 (no holes, no overlaps)"),
        (
            ab("[0,8]", "[12,20]"),
            20,
            "tensor `b`: found data from byte 12, expected 8 (no holes, no overlaps)",
        ),
        (
            ab("[8,16]", "[20,28]"),
            28,
            "tensor `a`: found data from byte 8, expected 0 (no holes, no overlaps)",
        ),
        (twice.to_string(), 8, "tensor `a`: found data from byte 4, expected 0 (no holes, no overlaps)"),
        (a("[-1]", "[0,8]"), 8, "tensor `a`: found shape [-1], expected a list of whole numbers"),
        (a("[1.5]", "[0,8]"), 8, "tensor `a`: found shape [1.5], expected a list of whole numbers"),
        (a("2", "[0,8]"), 8, "tensor `a`: found shape 2, expected a list of whole numbers"),
        (a("[2]", "[0]"), 8, "tensor `a`: found data_offsets [0], expected two numbers"),
        (a("[2]", "[0,4,8]"), 8, "tensor `a`: found data_offsets [0, 4, 8], expected two numbers"),
        (a("[2]", "[-8,0]"), 8, "tensor `a`: found data_offsets [-8,0], expected a list of whole numbers"),
        (a("[2]", "\"0,8\""), 8, "tensor `a`: found data_offsets \"0,8\", expected a list of whole numbers"),
        (a("[2]", "null"), 8, "tensor `a`: found data_offsets null, expected a list of whole numbers"),
        (r#"{"a":5}"#.to_string(), 8, "tensor `a`: found dtype null, expected F32, F16 or BF16"),
        (r#"{"a":[]}"#.to_string(), 8, "tensor `a`: found dtype null, expected F32, F16 or BF16"),
    ] {
        let folder = Folder::golden("internlm2-tiny");
        folder.write(MODEL, &with_header(&header, &vec![0; data]));
        assert_eq!(folder.refusal(), format!("model.safetensors: {message}"), "{header}");
    }
}

#[test]
fn a_header_that_lies_about_itself_is_refused() {
    const OBJECT: &str = "expected a JSON object with one entry a tensor";
    let stating = |length: u64, rest: &[u8]| [&length.to_le_bytes(), rest].concat();
    for (bytes, message) in [
        (vec![], "found a file of 0 bytes, expected at least 8".to_string()),
        (vec![0; 7], "found a file of 7 bytes, expected at least 8".to_string()),
        (vec![0; 8], format!("found EOF while parsing a value at line 1 column 0, {OBJECT}")),
        (stating(3, b"{}"), "found a length of 3 bytes, expected at most 2".to_string()),
        (stating(u64::MAX, b"{}"), format!("found a length of {} bytes, expected at most 2", u64::MAX)),
        (stating(100_000_001, b"{}"), "found a length of 100000001 bytes, expected at most 2".to_string()),
        (stating(1, b"{}"), format!("found EOF while parsing an object at line 1 column 1, {OBJECT}")),
        (
            stating(2, b"[]"),
            format!("found invalid type: sequence, expected a map at line 1 column 0, {OBJECT}"),
        ),
        (
            stating(4, b"null"),
            format!("found invalid type: null, expected a map at line 1 column 4, {OBJECT}"),
        ),
        (stating(4, b"{}{}"), format!("found trailing characters at line 1 column 3, {OBJECT}")),
        (
            stating(6, b"{\"\xff\":0}"),
            format!("found invalid unicode code point at line 1 column 3, {OBJECT}"),
        ),
        (
            b"<!DOCTYPE html><html></html>".to_vec(),
            "found a length of 5789751444030890300 bytes, expected at most 20".to_string(),
        ),
    ] {
        let folder = Folder::golden("internlm2-tiny");
        folder.write(MODEL, &bytes);
        assert_eq!(folder.refusal(), format!("model.safetensors: header: {message}"));
    }
}

/// A sharded checkpoint whose `weight_map` says something else of `output.weight`.
fn listed_at(file: Value) -> Folder {
    let folder = Folder::golden("internlm2-tiny-sharded");
    folder.edit_json(INDEX, |index| index["weight_map"]["output.weight"] = file);
    folder
}

#[test]
fn an_index_stays_inside_its_folder() {
    for path in [
        "../x",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../x",
        "./x",
        ".",
        "",
        "a\\b",
        "..\\x",
        "C:\\x",
        "/",
    ] {
        let expected = format!(
            "{INDEX}: tensor `output.weight`: found file `{path}`, expected a file inside the folder"
        );
        assert_eq!(listed_at(json!(path)).refusal(), expected);
    }
    // Nothing is read from there either where such a file exists and fits.
    let outer = Folder::golden("internlm2-tiny");
    let inner = outer.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::copy(outer.path().join(CONFIG), inner.join(CONFIG)).unwrap();
    let names: Vec<String> = Safetensors::parse(&outer.read(MODEL)).header.keys().cloned().collect();
    let map: serde_json::Map<_, _> =
        names.into_iter().map(|name| (name, json!("../model.safetensors"))).collect();
    std::fs::write(inner.join(INDEX), json!({ "weight_map": map }).to_string()).unwrap();
    let error = long_context_weights::Checkpoint::open(&inner).err().unwrap().to_string();
    assert!(
        error.ends_with("found file `../model.safetensors`, expected a file inside the folder"),
        "{error}"
    );
}

#[test]
fn an_index_and_its_shards_agree() {
    let elsewhere = listed_at(json!(SHARD));
    let expected =
        format!("{SHARD}: tensor `output.weight`: found nothing, expected it here, as the index says");
    assert_eq!(elsewhere.refusal(), expected);

    let absent = listed_at(json!("model-00003-of-00002.safetensors"));
    let unlisted = format!(
        "{OTHER_SHARD}: tensor `output.weight`: found it here, expected it where the index says, or nowhere"
    );
    let third = format!(
        "{INDEX}: shard `model-00003-of-00002.safetensors`: found no such file, expected one in the folder"
    );
    assert_eq!(absent.refusal(), third);
    let gone = Folder::golden("internlm2-tiny-sharded");
    gone.remove(OTHER_SHARD);
    let expected = format!("{INDEX}: shard `{OTHER_SHARD}`: found no such file, expected one in the folder");
    assert_eq!(gone.refusal(), expected);

    let number = listed_at(json!(7));
    let expected = format!("{INDEX}: tensor `output.weight`: found 7, expected the name of a file");
    assert_eq!(number.refusal(), expected);

    let unnamed = Folder::golden("internlm2-tiny-sharded");
    unnamed
        .edit_json(INDEX, |index| drop(index["weight_map"].as_object_mut().unwrap().remove("output.weight")));
    assert_eq!(unnamed.refusal(), unlisted);

    let twice = Folder::golden("internlm2-tiny-sharded");
    twice.edit_weights(SHARD, |file| with(file, "output.weight"));
    let expected = format!(
        "{SHARD}: tensor `output.weight`: found it here, expected it where the index says, or nowhere"
    );
    assert_eq!(twice.refusal(), expected);

    let short = Folder::golden("internlm2-tiny-sharded");
    short.write(OTHER_SHARD, b"");
    assert_eq!(
        short.refusal(),
        format!("{OTHER_SHARD}: header: found a file of 0 bytes, expected at least 8")
    );

    let missing = Folder::golden("internlm2-tiny-sharded");
    missing.edit_weights(OTHER_SHARD, |file| without(file, "output.weight"));
    missing
        .edit_json(INDEX, |index| drop(index["weight_map"].as_object_mut().unwrap().remove("output.weight")));
    let expected = format!("{INDEX}: tensor `output.weight`: found nothing, expected it, of shape [256, 64]");
    assert_eq!(missing.refusal(), expected);
}

#[test]
fn an_index_is_an_object_with_a_weight_map() {
    for (text, message) in [
        ("", "content: found EOF while parsing a value at line 1 column 0, expected a JSON object"),
        (
            "[]",
            "content: found invalid type: sequence, expected a map at line 1 column 0, expected a JSON object",
        ),
        ("{}", "field `weight_map`: found nothing, expected an object from tensor to file"),
        (
            "{\"weight_map\":null}",
            "field `weight_map`: found nothing, expected an object from tensor to file",
        ),
        ("{\"weight_map\":[]}", "field `weight_map`: found [], expected an object"),
        (
            "{\"weight_map\":{}}",
            "tensor `model.tok_embeddings.weight`: found nothing, expected it, of shape [256, 64]",
        ),
    ] {
        let folder = Folder::golden("internlm2-tiny-sharded");
        folder.write(INDEX, text.as_bytes());
        assert_eq!(folder.refusal(), format!("{INDEX}: {message}"), "{text}");
    }
}

#[test]
fn a_folder_holds_weights() {
    const EXPECTED: &str = "FOLDER: weights: found none, expected model.safetensors, model.safetensors.index.json, \
        pytorch_model.bin or pytorch_model.bin.index.json";
    let folder = Folder::golden("internlm2-tiny");
    folder.remove(MODEL);
    assert_eq!(folder.refusal(), EXPECTED);
    std::fs::create_dir(folder.path().join(MODEL)).unwrap();
    assert_eq!(folder.refusal(), EXPECTED);
    let shards = Folder::golden("internlm2-tiny-sharded");
    shards.remove(INDEX);
    assert_eq!(shards.refusal(), EXPECTED);
    let nowhere = Folder::empty();
    let error = long_context_weights::Checkpoint::open(nowhere.path().join("absent")).err().unwrap();
    assert_eq!(nowhere.relative(&error), "absent/config.json: No such file or directory (os error 2)");
}
