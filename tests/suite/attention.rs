//! Dense attention of every backend against float64.

use burn::tensor::{DType, Tensor, TensorData};
use long_context_tests::{Problem, max_difference};
use sample_attention::{AttentionBackend, dense_attention, plain};

const PROBLEMS: [Problem; 9] = [
    problem(1, 1, 1, 1, 1, 16),
    problem(1, 4, 2, 1, 300, 64),
    problem(2, 6, 3, 1, 77, 32),
    problem(1, 3, 3, 64, 64, 64),
    problem(1, 9, 3, 200, 200, 64),
    problem(2, 8, 2, 33, 301, 16),
    problem(1, 16, 1, 130, 777, 80),
    problem(1, 2, 1, 300, 1111, 128),
    problem(3, 2, 2, 65, 65, 256),
];

const fn problem(
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
) -> Problem {
    Problem { batch, heads, kv_heads, queries, keys, head_dim }
}

/// q as a projection leaves it, `[batch, rows, heads, D]` with two dimensions swapped; k and v as the first
/// part of a longer cache.
fn tensors<B: AttentionBackend>(
    problem: &Problem,
    seed: u64,
    dtype: DType,
    poison: f32,
) -> ([Tensor<B, 4>; 3], Vec<f64>) {
    let Problem { batch, heads, kv_heads, queries, keys, head_dim } = *problem;
    let device = B::Device::default();
    let mut inputs = problem.inputs(seed);
    let rounded = |values: &mut Vec<f32>, shape: [usize; 4]| {
        let data = TensorData::new(std::mem::take(values), shape).convert_dtype(dtype);
        *values = data.clone().convert_dtype(DType::F32).into_vec().unwrap();
        Tensor::<B, 4>::from_data(data, (&device, dtype))
    };
    let q = rounded(&mut inputs.q, [batch, heads, queries, head_dim]);
    let k = rounded(&mut inputs.k, [batch, kv_heads, keys, head_dim]);
    let v = rounded(&mut inputs.v, [batch, kv_heads, keys, head_dim]);
    // A copy in memory order of the swapped dimensions, swapped back.
    let q = (q.swap_dims(1, 2).mul_scalar(1.0)).swap_dims(1, 2);
    let in_cache = |tensor: Tensor<B, 4>| {
        let poison = Tensor::full([batch, kv_heads, 9, head_dim], poison, (&device, dtype));
        Tensor::cat(vec![tensor, poison], 2).narrow(2, 0, keys)
    };
    ([q, in_cache(k), in_cache(v)], problem.attention(&inputs))
}

type Attention<B> = fn(Tensor<B, 4>, Tensor<B, 4>, Tensor<B, 4>) -> Tensor<B, 4>;

fn plain_attention<B: AttentionBackend>(q: Tensor<B, 4>, k: Tensor<B, 4>, v: Tensor<B, 4>) -> Tensor<B, 4> {
    let scale = 1.0 / (q.dims()[3] as f64).sqrt();
    plain::dense_attention(q, k, v, scale).0
}

/// `poison` stands behind the last key.
fn check<B: AttentionBackend>(attention: Attention<B>, dtype: DType, poison: f32, tolerance: f64) {
    for (seed, problem) in PROBLEMS.iter().enumerate() {
        let ([q, k, v], expected) = tensors::<B>(problem, seed as u64, dtype, poison);
        let output = attention(q, k, v);
        assert_eq!(output.dtype(), dtype, "{problem:?}");
        let found: Vec<f32> = output.into_data().convert_dtype(DType::F32).into_vec().unwrap();
        let difference = max_difference(&found, &expected);
        assert!(difference < tolerance, "{problem:?}, seed {seed}: {difference}, expected below {tolerance}");
    }
}

#[test]
#[cfg(feature = "flex")]
fn dense_attention_on_the_cpu() {
    use burn::backend::Flex;
    check::<Flex>(dense_attention, DType::F32, f32::NAN, 3e-6);
    check::<Flex>(dense_attention, DType::BF16, f32::NAN, 2e-2);
    check::<Flex>(dense_attention, DType::F16, f32::NAN, 2e-3);
    // Burn's matrix products may read past a view and multiply what they find by zero.
    check::<Flex>(plain_attention, DType::F32, 1e4, 3e-6);
}

#[test]
#[cfg(feature = "vulkan")]
fn dense_attention_on_vulkan() {
    check::<burn::backend::Vulkan>(dense_attention, DType::F32, f32::NAN, 3e-6);
}
