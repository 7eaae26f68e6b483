//! The ported models against logits and greedy tokens of the official modelling code.
//!
//! `fixtures/golden/` holds tiny checkpoints of every family with random weights, logits of all
//! positions, and 16 greedy tokens, with and without a key/value cache.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use burn::tensor::DType;
use long_context::generate::{Engine, GeneratorConfig};
use long_context::sampler::most_likely;
use long_context_runtime::{BackendChoice, Device};
use long_context_tests::max_difference;
use long_context_weights::Checkpoint;
use safetensors::SafeTensors;

const FOLDERS: [&str; 10] = [
    "chatglm2-tiny",
    "chatglm2-32k-tiny",
    "chatglm3-32k-tiny",
    "chatglm3-32k-tiny-bf16",
    "glm4-tiny",
    "glm4-tiny-sharded",
    "internlm2-tiny",
    "internlm2-tiny-sharded",
    "internlm2-mha-tiny",
    "internlm2-ntk-tiny",
];

fn load(folder: &Path, chunk: usize, backend: BackendChoice) -> Box<dyn Engine> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let device = Device::find(backend, Some(DType::F32)).unwrap();
    let limits = GeneratorConfig { capacity: 256, chunk, dtype: DType::F32, attention: Default::default() };
    device.load(&checkpoint, checkpoint.config(), &limits, Rc::new(|_| ())).unwrap().engine
}

struct Golden {
    folder: PathBuf,
    tensors: Vec<u8>,
    prompts: Vec<Prompt>,
}

struct Prompt {
    name: String,
    ids: Vec<u32>,
    greedy_nocache: Vec<u32>,
    greedy_cache: Vec<u32>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden").join(name);
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let ids = |value: &serde_json::Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let prompts = json["prompts"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, prompt)| Prompt {
                name: name.clone(),
                ids: ids(&prompt["input_ids"]),
                greedy_nocache: ids(&prompt["greedy_nocache"]),
                greedy_cache: ids(&prompt["greedy_cache"]),
            })
            .collect();
        let tensors = std::fs::read(folder.join("golden.safetensors")).unwrap();
        Self { folder, tensors, prompts }
    }

    fn tensor(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let data = tensors.tensor(name).ok()?.data().to_vec();
        Some(data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect())
    }
}

/// 16 tokens, each the likeliest; the logits that chose them, one after another.
fn greedy(engine: &mut dyn Engine, prompt: &[u32], cached: bool) -> (Vec<u32>, Vec<f32>) {
    let (mut ids, mut all) = (Vec::new(), Vec::new());
    let mut context = prompt.to_vec();
    let mut next = context.clone();
    engine.truncate(0);
    for _ in 0..16 {
        let logits = engine.prefill(&next, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
        let id = most_likely(&logits);
        all.extend(logits);
        ids.push(id);
        context.push(id);
        next = vec![id];
        if !cached {
            engine.truncate(0);
            next = context.clone();
        }
    }
    (ids, all)
}

/// Logits of every position in chunks of each size; greedy tokens with the cache, and without it where asked.
fn check(backend: BackendChoice, tolerance: f64, chunks: &[usize], uncached: bool) {
    for name in FOLDERS {
        let golden = Golden::read(name);
        for &chunk in chunks {
            let mut engine = load(&golden.folder, chunk, backend);
            for prompt in &golden.prompts {
                let case = format!("{name}, {}, chunks of {chunk}", prompt.name);
                engine.truncate(0);
                let mut logits = Vec::new();
                engine.logits(&prompt.ids, &mut |chunk| logits.extend(chunk)).unwrap();
                let expected = golden.tensor(&format!("logits.{}", prompt.name)).unwrap();
                let difference = max_difference(&logits, &expected);
                assert!(
                    difference < tolerance,
                    "{case}: logits differ by {difference}, expected below {tolerance}"
                );
            }
        }
        let mut engine = load(&golden.folder, 64, backend);
        for prompt in &golden.prompts {
            let uncached_logits = golden.tensor(&format!("greedy_logits_nocache.{}", prompt.name)).unwrap();
            let cached_logits = golden.tensor(&format!("greedy_logits_cache.{}", prompt.name));
            let cached_logits = cached_logits.as_ref().unwrap_or(&uncached_logits);
            let mut compare = |cached: bool, tokens: &[u32], expected: &[f32]| {
                let case = format!("{name}, {}, cached: {cached}", prompt.name);
                let (ids, logits) = greedy(engine.as_mut(), &prompt.ids, cached);
                assert_eq!(ids, tokens, "{case}: greedy tokens");
                let difference = max_difference(&logits, expected);
                assert!(
                    difference < tolerance,
                    "{case}: logits differ by {difference}, expected below {tolerance}"
                );
            };
            compare(true, &prompt.greedy_cache, cached_logits);
            if uncached {
                compare(false, &prompt.greedy_nocache, &uncached_logits);
            }
        }
    }
}

#[test]
#[cfg(feature = "flex")]
fn official_logits_on_the_cpu() {
    check(BackendChoice::Cpu, 1e-4, &[256, 13], true);
}

#[test]
#[cfg(feature = "vulkan")]
fn official_logits_on_vulkan() {
    check(BackendChoice::Vulkan, 1e-3, &[48], false);
}
