//! Attention in plain tensor operations: on every backend, with gradients, and to read.

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, DType, Tensor, TensorData, backend::Backend};
use sample_attention_plan::{AttentionShape, SampleAttentionOptions, reference};

use crate::Error;

/// Bytes of the scores that [`dense_attention`] holds at a time, over all heads of a batch.
pub const SCORE_BYTES: u64 = 1 << 28;
pub(crate) const SCORE_BUDGET: usize = SCORE_BYTES as usize / size_of::<f32>();
/// Keys of one tile.
const KEY_TILE: usize = 4096;
/// A finite "minus infinity": a tile that a row does not see at all must not produce `inf - inf`.
const MASKED: f32 = -1e30;

/// Causal attention and its log-sum-exp, scores multiplied by `scale`. Tiles of keys are merged with an online
/// softmax in f32 (FlashAttention, arXiv 2205.14135).
///
/// # Shapes
///
/// - q: `[batch, heads, Sq, D]`
/// - k, v: `[batch, kv_heads, Sk, D]`
/// - output: `[batch, heads, Sq, D]` and `[batch, heads, Sq]`, the latter in f32
pub fn dense_attention<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    scale: f64,
) -> (Tensor<B, 4>, Tensor<B, 3>) {
    let [batch, heads, rows, _] = q.dims();
    let keys = k.dims()[2];
    let tile = keys.min(KEY_TILE);
    let block = (SCORE_BUDGET / (batch * heads * tile)).clamp(1, rows);
    let (outputs, lse) = (0..rows)
        .step_by(block)
        .map(|start| {
            let length = block.min(rows - start);
            let q = q.clone().narrow(2, start, length);
            query_block(q, &k, &v, keys - rows + start, tile, scale)
        })
        .unzip();
    (Tensor::cat(outputs, 2), Tensor::cat(lse, 2))
}

/// SampleAttention as it is defined: the plan from float64 loops on the host, then a softmax over the whole score
/// matrix with everything else masked out. For short lengths.
///
/// # Shapes
///
/// As [`sample_attention`](crate::sample_attention).
///
/// # Errors
///
/// What [`check`](crate::check) finds, or a device that fails.
pub fn sample_attention<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    options: &SampleAttentionOptions,
) -> Result<Tensor<B, 4>, Error> {
    let shape = crate::check(&q, &k, &v, options)?;
    let host = |tensor: &Tensor<B, 4>| {
        let data = tensor.clone().try_into_data().map_err(|error| Error::Device(error.to_string()))?;
        Ok::<Vec<f32>, Error>(data.iter().collect())
    };
    let plans = reference::plans(&shape, options, &host(&q)?, &host(&k)?, &host(&v)?);
    let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = shape;
    let keeps = plans.iter().flat_map(|plan| {
        let mask = reference::Mask::new(&shape, options, &plan.plan);
        let row = move |row: usize| (0..kv_len).map(move |key| (shape.offset() + row, key));
        (0..q_len)
            .flat_map(row)
            .map(|(position, key)| key <= position && mask.keeps(position, key))
            .collect::<Vec<_>>()
    });
    let keeps = TensorData::new(keeps.collect::<Vec<bool>>(), [batch, q_heads, q_len, kv_len]);
    let keeps = Tensor::<B, 4, Bool>::from_data(keeps, &q.device());

    let dtype = q.dtype();
    let repeat = |tensor: Tensor<B, 4>| {
        let group = q_heads / kv_heads;
        let tensor = tensor.cast(DType::F32).unsqueeze_dim::<5>(2);
        tensor.expand([batch, kv_heads, group, kv_len, head_dim]).reshape([batch, q_heads, kv_len, head_dim])
    };
    let scores = q.cast(DType::F32).matmul(repeat(k).swap_dims(2, 3)).mul_scalar(shape.scale(options));
    let weights = softmax(scores.mask_fill(keeps.bool_not(), f32::NEG_INFINITY), 3);
    Ok(weights.matmul(repeat(v)).cast(dtype))
}

/// Attention of consecutive queries, the first at position `start`, over the tiles that they see.
fn query_block<B: Backend>(
    q: Tensor<B, 4>,
    k: &Tensor<B, 4>,
    v: &Tensor<B, 4>,
    start: usize,
    tile: usize,
    scale: f64,
) -> (Tensor<B, 4>, Tensor<B, 3>) {
    let dtype = q.dtype();
    let device = q.device();
    let [batch, heads, rows, head_dim] = q.dims();
    let kv_heads = k.dims()[1];
    let group = heads / kv_heads;
    // The queries of a group share their keys: stacked, they are one matrix product.
    let q = q.cast(DType::F32).mul_scalar(scale).reshape([batch, kv_heads, group * rows, head_dim]);

    let seen = start + rows;
    let mut merged: Option<Partial<B>> = None;
    for first in (0..seen).step_by(tile) {
        let length = tile.min(seen - first);
        let keys = k.clone().narrow(2, first, length).cast(DType::F32);
        let values = v.clone().narrow(2, first, length).cast(DType::F32);
        let mut scores = q.clone().matmul(keys.swap_dims(2, 3));
        if first + length > start + 1 {
            let hidden =
                Tensor::<B, 2, Bool>::tril_mask([rows, length], start as i64 - first as i64, &device);
            let hidden = hidden.reshape([1, 1, 1, rows, length]);
            scores = scores
                .reshape([batch, kv_heads, group, rows, length])
                .mask_fill(hidden.expand([batch, kv_heads, group, rows, length]), MASKED)
                .reshape([batch, kv_heads, group * rows, length]);
        }
        let partial = Partial::new(scores, values);
        merged = Some(match merged {
            Some(before) => before.merge(partial),
            None => partial,
        });
    }
    let merged = merged.expect("every query sees at least its own key");
    let lse = (merged.max + merged.sum.clone().log()).reshape([batch, heads, rows]);
    ((merged.output / merged.sum).reshape([batch, heads, rows, head_dim]).cast(dtype), lse)
}

/// Softmax attention over some of the keys, not yet divided by its sum.
struct Partial<B: Backend> {
    max: Tensor<B, 4>,
    sum: Tensor<B, 4>,
    output: Tensor<B, 4>,
}

impl<B: Backend> Partial<B> {
    fn new(scores: Tensor<B, 4>, values: Tensor<B, 4>) -> Self {
        let max = scores.clone().max_dim(3);
        let weights = (scores - max.clone()).exp();
        Self { max, sum: weights.clone().sum_dim(3), output: weights.matmul(values) }
    }

    fn merge(self, other: Self) -> Self {
        let max = self.max.clone().max_pair(other.max.clone());
        let (a, b) = ((self.max - max.clone()).exp(), (other.max - max.clone()).exp());
        Self {
            max,
            sum: self.sum * a.clone() + other.sum * b.clone(),
            output: self.output * a + other.output * b,
        }
    }
}
