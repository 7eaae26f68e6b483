//! A trained model in both layouts: greedy tokens equal to a float32 run over the same weights.
//!
//! `examples/checkpoint.sh target/checkpoint` makes the folders (135M parameters, bf16).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use burn::tensor::DType;
use long_context::generate::{Event, GeneratorConfig, generate};
use long_context::sampler::SamplerConfig;
use long_context_runtime::{BackendChoice, Device};
use long_context_weights::Checkpoint;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
#[cfg(feature = "flex")]
fn a_trained_model_speaks_in_both_layouts() {
    let golden = std::fs::read_to_string(root().join("tests/fixtures/trained/golden.json")).unwrap();
    let golden: Vec<serde_json::Value> = serde_json::from_str(&golden).unwrap();
    for layout in ["internlm2", "chatglm"] {
        let folder = root().join("target/checkpoint").join(layout);
        let checkpoint =
            Checkpoint::open(&folder).expect("examples/checkpoint.sh target/checkpoint makes it");
        let device = Device::find(BackendChoice::Cpu, Some(DType::F32)).unwrap();
        let limits =
            GeneratorConfig { capacity: 256, chunk: 16, dtype: DType::F32, attention: Default::default() };
        let mut engine =
            device.load(&checkpoint, checkpoint.config(), &limits, Rc::new(|_| ())).unwrap().engine;
        let tokenizer = checkpoint.tokenizer().unwrap();
        for case in &golden {
            let (prompt, expected) = (ids(&case["input_ids"]), ids(&case["greedy"]));
            let mut sampler = SamplerConfig::default().init().unwrap();
            let mut go_on = |_: Event| ControlFlow::Continue(());
            let answer =
                generate(engine.as_mut(), &prompt, &mut sampler, expected.len(), &[], &mut go_on).unwrap();
            assert_eq!(answer.ids, expected, "{layout}: {}", case["prompt"]);
            assert_eq!(
                tokenizer.decode(&answer.ids),
                case["text"].as_str().unwrap().replace("<|im_end|>", "")
            );
        }
    }
}
