//! Times attention on the processor: Burn's own, ours over all keys, and SampleAttention, interleaved.
//!
//! `cargo run --release -p long-context-examples --bin cpu-speed`

use std::error::Error;
use std::time::Instant;

use burn::backend::Flex;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Distribution, Tensor, TensorData, module};
use sample_attention::{Preset, dense_attention, sample_attention, sample_attention_with_report};

const HEADS: usize = 9;
const LENGTH: usize = 8192;
const HEAD_DIM: usize = 64;
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let device = Default::default();
    let shape = [1, HEADS, LENGTH, HEAD_DIM];
    let random = || Tensor::<Flex, 4>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    // One key in twelve is what every query looks for.
    let pull = (0..LENGTH).map(|key| if key % 12 == 0 { 1.6f32 } else { 0.0 }).collect::<Vec<_>>();
    let pull =
        Tensor::<Flex, 1>::from_data(TensorData::new(pull, [LENGTH]), &device).reshape([1, 1, LENGTH, 1]);
    let (q, k, v) = (random().add_scalar(0.5), random().mul_scalar(0.5) + pull, random());
    let options = Preset::Default.options();
    let (_, report) = sample_attention_with_report(q.clone(), k.clone(), v.clone(), &options)?;

    let causal = AttentionModuleOptions { is_causal: true, ..Default::default() };
    let mut times = [const { Vec::new() }; 3];
    for round in 0..=ROUNDS {
        for (which, times) in times.iter_mut().enumerate() {
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            let begin = Instant::now();
            let output = match which {
                0 => module::attention(q, k, v, None, None, causal),
                1 => dense_attention(q, k, v),
                _ => sample_attention(q, k, v, &options),
            };
            drop(output.into_data());
            if round > 0 {
                times.push(begin.elapsed().as_secs_f64());
            }
        }
    }
    let [burn, dense, sparse] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    });
    println!("{LENGTH} tokens, {HEADS} heads of {HEAD_DIM}, f32, medians of {ROUNDS}");
    println!("Burn's attention    {burn:.2} s");
    println!("ours, dense         {dense:.2} s, {:.2} of Burn's", dense / burn);
    println!(
        "SampleAttention     {sparse:.2} s, {:.2} of dense, at density {:.3} and recall {:.4}",
        sparse / dense,
        report.density(),
        report.recall_mean()
    );
    Ok(())
}
