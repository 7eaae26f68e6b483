//! What is written can be read: folders of our own making, and checkpoints inside a program.

use std::collections::BTreeMap;
use std::rc::Rc;

use burn::backend::Flex;
use burn::tensor::DType;
use burn_store::ModuleSnapshot;
use half::bf16;
use long_context::models::internlm2::InternLm2Config;
use long_context::models::{Model, ModelConfig};
use long_context_weights::{Checkpoint, TokenIds, save_internlm2};

use crate::support::{CONFIG, Folder, MODEL};

const TOKENS: TokenIds = TokenIds { bos: 1, eos: Vec::new() };

fn config(checkpoint: &Checkpoint) -> InternLm2Config {
    match checkpoint.config() {
        ModelConfig::InternLm2(config) => config.clone(),
        ModelConfig::ChatGlm(_) => panic!("an InternLM2 folder"),
    }
}

fn load(checkpoint: &Checkpoint) -> Model<Flex> {
    checkpoint.load(checkpoint.config(), DType::F32, &Default::default(), Rc::new(|_| ())).unwrap()
}

fn values(model: &Model<Flex>) -> BTreeMap<String, Vec<f32>> {
    let tensors = model.collect(None, None, true);
    tensors.iter().map(|tensor| (tensor.full_path(), tensor.to_data().unwrap().iter().collect())).collect()
}

#[test]
fn a_saved_model_is_read_again_rounded_to_bf16() {
    for golden in ["internlm2-tiny", "internlm2-ntk-tiny", "internlm2-mha-tiny"] {
        let folder = Folder::golden(golden);
        let checkpoint = folder.open();
        let model = load(&checkpoint);
        let saved = Folder::empty();
        let inner = saved.path().join("new");
        let tokens = TokenIds { eos: vec![2, 5], ..TOKENS };
        save_internlm2(&inner, &model, &config(&checkpoint), &tokens).unwrap();

        let again = Checkpoint::open(&inner).unwrap();
        assert_eq!(again.config(), checkpoint.config(), "{golden}");
        assert_eq!((again.eos(), again.stored_types()), (&[2, 5][..], vec!["bf16".to_string()]));
        let mut expected = values(&model);
        expected.values_mut().flatten().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        assert_eq!(values(&load(&again)), expected, "{golden}");
    }
}

#[test]
fn a_model_of_other_dimensions_is_not_saved() {
    let checkpoint = Folder::golden("internlm2-tiny").open();
    let folder = Folder::empty();
    let other = InternLm2Config { vocab_size: 255, ..config(&checkpoint) };
    let error = save_internlm2(folder.path(), &load(&checkpoint), &other, &TOKENS).unwrap_err().to_string();
    assert!(
        error.contains("tensor `model.tok_embeddings.weight`: found shape [256, 64] in the model, expected"),
        "{error}"
    );
    let deeper = InternLm2Config { num_layers: 4, ..config(&checkpoint) };
    let error = save_internlm2(folder.path(), &load(&checkpoint), &deeper, &TOKENS).unwrap_err().to_string();
    assert!(error.contains("layers.3.attention_norm.weight`: found no such parameter"), "{error}");
}

#[test]
fn a_checkpoint_inside_a_program_is_that_of_its_folder() {
    let folder = Folder::with_tokenizer("internlm2-tiny", "sentencepiece");
    let (config, model, tokenizer) =
        (folder.read(CONFIG), folder.read(MODEL), folder.read("tokenizer.model"));
    let files: [(&str, &[u8]); 3] = [(CONFIG, &config), (MODEL, &model), ("tokenizer.model", &tokenizer)];
    let inside = Checkpoint::from_files(&files).unwrap();
    let unpacked = inside.folder().to_path_buf();
    assert_eq!(values(&load(&inside)), values(&load(&folder.open())));
    assert_eq!(
        inside.tokenizer().unwrap().encode("Hello, world!"),
        folder.open().tokenizer().unwrap().encode("Hello, world!")
    );
    drop(inside);
    assert!(!unpacked.exists());

    let error = Checkpoint::from_files(&files[..1]).err().unwrap().to_string();
    assert!(error.contains("found none, expected") || error.contains("model.safetensors"), "{error}");
}
