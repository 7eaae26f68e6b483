//! A loss that keeps attention near where nothing far away is asked for.
//!
//! Heads of a small model spread over everything they see, since nothing tells them not to. Sparse attention has
//! nothing to leave out then, and a key that is far away has the whole text to compete with.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};

/// Query rows of a sequence that are looked at.
const ROWS: usize = 64;
/// The first tokens, to which heads turn that look for nothing.
const SINK: usize = 4;
/// What is near, as a share of the length and in tokens at least.
const NEAR_SHARE: f64 = 0.06;
const LEAST_NEAR: usize = 32;

/// Rows spread evenly, others in each step.
pub fn rows(length: usize, step: usize) -> Vec<usize> {
    let stride = (length / ROWS).max(1);
    (step * 31 % stride..length).step_by(stride).take(ROWS).collect()
}

/// The share of these rows' attention that goes to keys that are neither near nor among the first: the mean over
/// layers, heads and rows.
///
/// # Shapes
///
/// - attended: for each layer queries `[batch, heads, length, head_dim]` and keys `[batch, kv_heads, length, head_dim]`
pub fn far_share<B: Backend>(attended: &[[Tensor<B, 4>; 2]], rows: &[usize]) -> Tensor<B, 1> {
    let shares: Vec<Tensor<B, 1>> = attended.iter().map(|[q, k]| layer(q, k, rows)).collect();
    let layers = shares.len() as f64;
    Tensor::cat(shares, 0).sum().div_scalar(layers)
}

fn layer<B: Backend>(q: &Tensor<B, 4>, k: &Tensor<B, 4>, rows: &[usize]) -> Tensor<B, 1> {
    let device = q.device();
    let [batch, heads, length, head_dim] = q.dims();
    let kv_heads = k.dims()[1];
    let (group, count) = (heads / kv_heads, rows.len());
    let positions: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let positions = Tensor::<B, 1, Int>::from_data(TensorData::new(positions, [count]), &device);

    // The rows of the query heads that share a key head are one matrix.
    let q =
        q.clone().select(2, positions.clone()).cast(DType::F32).mul_scalar(1.0 / (head_dim as f64).sqrt());
    let q = q.reshape([batch, kv_heads, group * count, head_dim]);
    let scores = q.matmul(k.clone().cast(DType::F32).swap_dims(2, 3));
    let scores = scores.reshape([batch, heads, count, length]);

    let keys =
        Tensor::<B, 1, Int>::arange(0..length as i64, &device).reshape([1, length]).expand([count, length]);
    let distance = positions.reshape([count, 1]).expand([count, length]) - keys.clone();
    let shape = [batch, heads, count, length];
    let future = distance.clone().lower_elem(0).reshape([1, 1, count, length]).expand(shape);
    let near = ((NEAR_SHARE * length as f64) as usize).max(LEAST_NEAR) as i32;
    let far = distance.greater_elem(near).float() * keys.greater_elem(SINK as i32 - 1).float();
    let weights = softmax(scores.mask_fill(future, -1e30), 3);
    (weights * far.cast(DType::F32).reshape([1, 1, count, length]).expand(shape)).sum_dim(3).mean()
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::Distribution;

    use super::*;

    #[test]
    fn attention_without_preference_is_as_far_as_most_keys_are() {
        let device = Default::default();
        let length = 200;
        let q = Tensor::<Flex, 4>::zeros([2, 4, length, 16], &device);
        let k = Tensor::<Flex, 4>::random([2, 2, length, 16], Distribution::Default, &device);
        let rows = rows(length, 3);
        let share = far_share(&[[q.clone(), k.clone()], [q, k]], &rows).into_scalar();
        let expected: f64 =
            rows.iter().map(|&row| (row as f64 - 32.0 - 4.0).max(0.0) / (row + 1) as f64).sum();
        assert!((f64::from(share) - expected / rows.len() as f64).abs() < 1e-5, "{share}");
    }

    #[test]
    fn rows_are_inside_and_change() {
        for (length, step) in [(128, 0), (128, 1), (1000, 7), (16384, 12345)] {
            let rows = rows(length, step);
            assert!(rows.len() == ROWS && rows.iter().all(|&row| row < length), "{length}");
        }
        assert_ne!(rows(16384, 1), rows(16384, 2));
    }
}
