//! Trains a small module with SampleAttention inside: gradients flow through the keys that the plan keeps.
//!
//! The task: one token of the sequence is of another kind; name it at the last position.
//!
//! `cargo run --release -p long-context-examples --bin train`

use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, Module};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use sample_attention::rotary::{RotaryConfig, RotaryPairs};
use sample_attention::{AttentionBackend, Preset, SampleAttention, SampleAttentionConfig};

const TOKENS: usize = 16;
const LENGTH: usize = 320;
const WIDTH: usize = 64;

#[derive(Module, Debug)]
struct Model<B: Backend> {
    embedding: Embedding<B>,
    attention: SampleAttention<B>,
    head: Linear<B>,
}

impl<B: AttentionBackend> Model<B> {
    fn new(device: &B::Device) -> Self {
        let rotary =
            RotaryConfig { width: 32, pairs: RotaryPairs::HalfSplit, base: 10_000.0, position_divisor: 1.0 };
        let attention = SampleAttentionConfig::new(WIDTH, 2)
            .with_rotary(Some(rotary))
            .with_preset(Preset::Joint)
            .with_dense_below(Some(0));
        Self {
            embedding: EmbeddingConfig::new(TOKENS, WIDTH).init(device),
            attention: attention.init(device),
            head: LinearConfig::new(WIDTH, TOKENS).init(device),
        }
    }

    /// # Shapes
    ///
    /// - ids: `[batch, length]`
    /// - output: `[batch, tokens]`, logits at the last position
    fn forward(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let x = self.embedding.forward(ids);
        let x = x.clone() + self.attention.forward(x);
        self.head.forward(x.narrow(1, LENGTH - 1, 1).squeeze_dim(1))
    }
}

/// Sequences of tokens of the first half of the vocabulary with one of the second, which is the answer.
fn batch<B: Backend>(
    size: usize,
    seed: &mut u64,
    device: &B::Device,
) -> (Tensor<B, 2, Int>, Tensor<B, 1, Int>) {
    let mut draw = |below: usize| {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) as usize % below
    };
    let (mut ids, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..size {
        let mut sequence: Vec<i32> = (0..LENGTH).map(|_| draw(TOKENS / 2) as i32).collect();
        let answer = (TOKENS / 2 + draw(TOKENS / 2)) as i32;
        sequence[draw(LENGTH)] = answer;
        answers.push(answer);
        ids.extend(sequence);
    }
    let ids = Tensor::from_data(TensorData::new(ids, [size, LENGTH]), device);
    (ids, Tensor::from_data(TensorData::new(answers, [size]), device))
}

fn main() {
    type B = Autodiff<Flex>;
    let device = Default::default();
    let mut seed = 1;
    let mut model = Model::<B>::new(&device);
    let mut optimizer = AdamConfig::new().init();
    for step in 0..=700 {
        let (ids, answers) = batch::<B>(16, &mut seed, &device);
        let loss = CrossEntropyLossConfig::new().init(&device).forward(model.forward(ids), answers);
        if step % 100 == 0 {
            let (ids, answers) = batch::<Flex>(64, &mut seed, &device);
            let found = model.valid().forward(ids).argmax(1).squeeze_dim::<1>(1);
            let right = found.equal(answers).int().sum().into_scalar();
            println!("step {step:>3}: loss {:.3}, {right} of 64 right", loss.clone().into_scalar());
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, gradients);
    }
}
