//! The device, transfers and comparisons.

use cubecl::{
    prelude::*,
    wgpu::{WgpuDevice, WgpuRuntime},
};
use rand::{SeedableRng, rngs::StdRng};
use sample_attention_kernels::{
    AttentionShape, OpInputs, OpOutputs, Rule, SampleAttentionOptions, TensorView, TileProduct, f32_type,
    run_op,
    selftest::{Problem, check_problem},
};

pub type Client = ComputeClient<WgpuRuntime>;

pub fn client() -> Client {
    WgpuRuntime::client(&WgpuDevice::default())
}

pub fn upload(client: &Client, data: &[f32], shape: [usize; 4]) -> TensorView<WgpuRuntime> {
    let handle = client.create_from_slice(f32::as_bytes(data));
    TensorView::contiguous(handle, shape, f32_type())
}

pub fn upload_problem(client: &Client, problem: &Problem) -> [TensorView<WgpuRuntime>; 3] {
    let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = problem.shape;
    let kv_shape = [batch, kv_heads, kv_len, head_dim];
    [
        upload(client, &problem.q, [batch, q_heads, q_len, head_dim]),
        upload(client, &problem.k, kv_shape),
        upload(client, &problem.v, kv_shape),
    ]
}

pub fn read(client: &Client, handle: &cubecl::server::Handle) -> Vec<f32> {
    let bytes = client.read_one(handle.clone()).expect("readable buffer");
    f32::from_bytes(&bytes).to_vec()
}

pub fn shape(
    (batch, q_heads, kv_heads): (usize, usize, usize),
    (q_len, kv_len): (usize, usize),
    head_dim: usize,
) -> AttentionShape {
    AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim }
}

pub fn options(rule: Rule) -> SampleAttentionOptions {
    SampleAttentionOptions {
        rule,
        min_rows: 16,
        window_ratio: 0.05,
        block_size: 64,
        tail_rows: 40,
        dense_below: 32,
        dense_cost: None,
        product: TileProduct::Units,
        ..SampleAttentionOptions::default()
    }
}

/// Runs a problem in `f32`.
pub fn run(client: &Client, problem: &Problem, options: &SampleAttentionOptions) -> OpOutputs {
    let Problem { shape, q, k, v } = problem;
    let inputs = OpInputs { shape: *shape, q, k, v, dtype: f32_type() };
    run_op(client, &inputs, options).expect("a valid call")
}

/// Fails unless plan, output and log-sum-exp agree with the `f64` reference.
pub fn assert_passes(
    client: &Client,
    problem: &Problem,
    dtype: StorageType,
    options: &SampleAttentionOptions,
) {
    let row = check_problem(client, problem, dtype, options).expect("a valid call");
    assert!(row.passed, "{row:?} with {options:?}");
}

/// A fresh generator; its seed is printed, so that a failure can be repeated.
pub fn fresh_rng() -> StdRng {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_nanos() as u64);
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

/// Absolute comparison, element by element.
pub fn close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let gap = (found - expected).abs();
        assert!(gap <= tolerance, "{what}[{at}] is {found}, expected {expected}");
    }
}
