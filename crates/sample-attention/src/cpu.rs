//! Attention on the processor: tiles of queries against tiles of keys, spread over threads.

use burn::tensor::DType;
use burn_flex::{FlexTensor, Layout};
use pulp::Arch;
use rayon::prelude::*;

/// Query rows of one tile: enough to reuse keys, few enough that scores stay in the second-level cache.
const ROWS: usize = 64;
/// Keys of one tile.
const KEYS: usize = 512;

/// A `[batch, heads, length, D]` tensor in f32 whose rows are contiguous.
struct View<'a> {
    data: &'a [f32],
    strides: [usize; 4],
    offset: usize,
}

impl<'a> View<'a> {
    fn new(tensor: &'a FlexTensor) -> Self {
        let strides = tensor.layout().strides();
        Self {
            data: tensor.storage(),
            strides: std::array::from_fn(|i| strides[i].unsigned_abs()),
            offset: tensor.layout().start_offset(),
        }
    }

    /// The rows of one head from `row` on.
    fn head(&self, batch: usize, head: usize, row: usize) -> &'a [f32] {
        &self.data[self.offset + batch * self.strides[0] + head * self.strides[1] + row * self.strides[2]..]
    }

    fn row_stride(&self) -> usize {
        self.strides[2]
    }
}

/// Something that [`View`] can look at: f32, rows contiguous, strides not negative.
fn viewable(tensor: FlexTensor) -> FlexTensor {
    let strides = tensor.layout().strides();
    let fits = strides[3] == 1 && strides.iter().all(|&stride| stride >= 0);
    let tensor = if fits { tensor } else { tensor.to_contiguous() };
    if tensor.dtype() == DType::F32 { tensor } else { <burn_flex::Flex as burn::tensor::ops::FloatTensorOps<_>>::float_cast(tensor, burn::tensor::FloatDType::F32) }
}

/// Consecutive queries of one head, or with one query a sequence the heads of one group.
struct Item<'a> {
    batch: usize,
    head: usize,
    kv_head: usize,
    first_row: usize,
    rows: usize,
    /// Whether each row stands one position after the one before.
    steps: bool,
    output: &'a mut [f32],
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

/// Causal attention; shapes as in [`dense_attention`](crate::dense_attention).
pub(crate) fn dense_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor) -> FlexTensor {
    let dtype = q.dtype();
    let shape = q.layout().shape().clone();
    let [batch, heads, queries, head_dim] = shape.dims();
    let [_, kv_heads, keys, _] = k.layout().shape().dims();
    let group = heads / kv_heads;
    let (q, k, v) = (viewable(q), viewable(k), viewable(v));
    let mut output = vec![0.0f32; batch * heads * queries * head_dim];

    let mut items = Vec::new();
    let stacked = queries == 1;
    let rows_a_head = if stacked { group } else { queries };
    for (index, head_output) in output.chunks_mut(rows_a_head * head_dim).enumerate() {
        let heads_here = if stacked { kv_heads } else { heads };
        let (batch, at) = (index / heads_here, index % heads_here);
        let head = if stacked { at * group } else { at };
        for (block, output) in head_output.chunks_mut(ROWS * head_dim).enumerate() {
            let (first_row, rows) = (block * ROWS, output.len() / head_dim);
            items.push(Item { batch, head, kv_head: head / group, first_row, rows, steps: !stacked, output });
        }
    }
    // Long rows first, so that no thread is left with one at the end.
    items.sort_by_key(|item| std::cmp::Reverse(item.first_row));

    let (qs, ks, vs) = (View::new(&q), View::new(&k), View::new(&v));
    let scale = 1.0 / (head_dim as f32).sqrt();
    items.into_par_iter().for_each_init(Scratch::default, |scratch, item| {
        // Stacked rows are heads, which lie a head apart.
        let (queries_here, stride) = if item.steps {
            (qs.head(item.batch, item.head, item.first_row), qs.row_stride())
        } else {
            (qs.head(item.batch, item.head + item.first_row, 0), qs.strides[1])
        };
        let keys_here = (ks.head(item.batch, item.kv_head, 0), ks.row_stride());
        let values_here = (vs.head(item.batch, item.kv_head, 0), vs.row_stride());
        let first_position = if item.steps { keys - queries + item.first_row } else { keys - 1 };
        attend(item, (queries_here, stride), keys_here, values_here, first_position, head_dim, scale, scratch);
    });
    let output = FlexTensor::new(burn::tensor::Bytes::from_elems(output), Layout::contiguous(shape), DType::F32);
    if dtype == DType::F32 { output } else { <burn_flex::Flex as burn::tensor::ops::FloatTensorOps<_>>::float_cast(output, dtype.into()) }
}

/// One tile of queries over all keys that it sees.
#[allow(clippy::too_many_arguments, reason = "one call, each a plain part of the problem")]
fn attend(
    item: Item<'_>,
    (q, q_stride): (&[f32], usize),
    (k, k_stride): (&[f32], usize),
    (v, v_stride): (&[f32], usize),
    first_position: usize,
    head_dim: usize,
    scale: f32,
    scratch: &mut Scratch,
) {
    let Item { rows, steps, output, .. } = item;
    let arch = Arch::new();
    scratch.scores.resize(rows * KEYS, 0.0);
    scratch.max.clear();
    scratch.max.resize(rows, f32::NEG_INFINITY);
    scratch.sum.clear();
    scratch.sum.resize(rows, 0.0);

    let last_position = first_position + if steps { rows - 1 } else { 0 };
    for first in (0..=last_position).step_by(KEYS) {
        let n = KEYS.min(last_position + 1 - first);
        let scores = &mut scratch.scores[..rows * KEYS];
        product(rows, n, head_dim, scores, KEYS, false, (q, q_stride, 1), (&k[first * k_stride..], 1, k_stride), scale);
        arch.dispatch(|| {
            for (row, scores) in scores.chunks_mut(KEYS).enumerate() {
                let position = first_position + if steps { row } else { 0 };
                let seen = (position + 1).saturating_sub(first).min(n);
                let (visible, hidden) = scores[..n].split_at_mut(seen);
                hidden.fill(0.0);
                let rescale = online_softmax(visible, &mut scratch.max[row], &mut scratch.sum[row]);
                if rescale != 1.0 {
                    output[row * head_dim..][..head_dim].iter_mut().for_each(|value| *value *= rescale);
                }
            }
        });
        product(rows, head_dim, n, output, head_dim, true, (scores, KEYS, 1), (&v[first * v_stride..], v_stride, 1), 1.0);
    }
    for (row, output) in output.chunks_mut(head_dim).enumerate() {
        let inverse = 1.0 / scratch.sum[row];
        output.iter_mut().for_each(|value| *value *= inverse);
    }
}

/// Turns scores into weights relative to the largest so far; what earlier results must be multiplied by.
#[inline(always)]
fn online_softmax(scores: &mut [f32], max: &mut f32, sum: &mut f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [*max; LANES];
    let mut chunks = scores.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &score) in lanes.iter_mut().zip(chunk) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    let highest = lanes.iter().chain(chunks.remainder()).fold(*max, |max, &score| max.max(score));
    if highest == f32::NEG_INFINITY {
        return 1.0;
    }
    let rescale = if *max == f32::NEG_INFINITY { 0.0 } else { (*max - highest).exp() };
    *max = highest;

    let mut lanes = [0.0; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *score = exp(*score - highest);
            *lane += *score;
        }
    }
    let mut rest = 0.0;
    for score in chunks.into_remainder() {
        *score = exp(*score - highest);
        rest += *score;
    }
    *sum = *sum * rescale + lanes.iter().sum::<f32>() + rest;
    rescale
}

/// `e^x` for `x <= 0` to two units in the last place, in operations that compilers turn into vectors;
/// NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 · 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts: the first has few digits, so that n times it is exact.
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let e = p * r * r + r + 1.0;
    let scale = f32::from_bits((n as i32).wrapping_add(127).wrapping_shl(23) as u32);
    if x < -87.0 { 0.0 } else { e * scale }
}

/// `dst = scale · lhs · rhs`, or added to it; each operand with its row and column stride.
#[allow(clippy::too_many_arguments, reason = "a matrix product has this many parts")]
fn product(
    m: usize,
    n: usize,
    k: usize,
    dst: &mut [f32],
    dst_stride: usize,
    add: bool,
    (lhs, lhs_row, lhs_column): (&[f32], usize, usize),
    (rhs, rhs_row, rhs_column): (&[f32], usize, usize),
    scale: f32,
) {
    let reach = |rows: usize, columns: usize, row: usize, column: usize| (rows - 1) * row + (columns - 1) * column + 1;
    assert!(dst.len() >= reach(m, n, dst_stride, 1));
    assert!(lhs.len() >= reach(m, k, lhs_row, lhs_column));
    assert!(rhs.len() >= reach(k, n, rhs_row, rhs_column));
    // SAFETY: the three regions were just checked to hold every element that these sizes and strides reach,
    // and `dst` is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            add,
            lhs.as_ptr(),
            lhs_column as isize,
            lhs_row as isize,
            rhs.as_ptr(),
            rhs_column as isize,
            rhs_row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_close_to_the_real_one() {
        let mut worst = 0.0f64;
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let expected = (x as f64).exp();
            worst = worst.max((exp(x) as f64 - expected).abs() / expected);
        }
        assert!(worst < 3e-7, "relative error {worst}");
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
