//! SampleAttention in place of full attention: the same call, the same shapes, a report of what was kept.
//!
//! `cargo run --release -p long-context-examples --bin drop-in`

use std::error::Error;
use std::time::Instant;

use burn::backend::Flex;
use burn::tensor::{Distribution, Tensor};
use sample_attention::{Preset, dense_attention, sample_attention_with_report};

fn main() -> Result<(), Box<dyn Error>> {
    let (heads, kv_heads, length, head_dim) = (8, 2, 4096, 64);
    let device = Default::default();
    let random = |heads| {
        Tensor::<Flex, 4>::random([1, heads, length, head_dim], Distribution::Normal(0.0, 1.0), &device)
    };
    // A first key that all queries like: an attention sink, as trained models have them.
    let (q, v) = (random(heads).add_scalar(0.5), random(kv_heads));
    let sink = Tensor::full([1, kv_heads, 1, head_dim], 4.0, &device);
    let k = random(kv_heads).mul_scalar(0.3).slice_assign([0..1, 0..kv_heads, 0..1, 0..head_dim], sink);

    let begin = Instant::now();
    let dense = dense_attention(q.clone(), k.clone(), v.clone());
    println!("dense   {:.2} s", begin.elapsed().as_secs_f64());
    for preset in [Preset::Default, Preset::Joint] {
        let begin = Instant::now();
        let (sparse, report) =
            sample_attention_with_report(q.clone(), k.clone(), v.clone(), &preset.options())?;
        let seconds = begin.elapsed().as_secs_f64();
        let difference = (sparse - dense.clone()).abs().mean().into_scalar();
        println!("{preset:<7} {seconds:.2} s, mean difference to dense {difference:.1e}\n{report}");
    }
    Ok(())
}
