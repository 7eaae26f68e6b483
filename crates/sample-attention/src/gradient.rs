//! The backward pass of attention over the keys that a plan keeps, the plan held fixed.
//!
//! Tiles of weights are recomputed from the log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm 2), so
//! that memory grows with the length and not with its square.

use burn::tensor::{Bool, DType, Int, Tensor, TensorData, backend::Backend};

use crate::plain::SCORE_BUDGET;

/// Query rows and keys of one tile, at least.
const TILE: usize = 512;

/// Query rows and keys of one tile: the more, the fewer operations, within the memory that dense attention takes.
fn tile(heads: usize, kept: bool) -> usize {
    // A plan's mask is made on the host, in more bytes a pair.
    let side = if kept { TILE } else { (SCORE_BUDGET / heads).isqrt() };
    1 << side.max(TILE).ilog2()
}

/// A contraction that ends after an even number of stages of any product kernel, zeros behind the length given:
/// CubeK 0.2's double-buffered products, which Burn's autotune may choose, read past one that ends after an odd number.
fn padded<B: Backend>(tensor: Tensor<B, 4>, dim: usize) -> Tensor<B, 4> {
    let mut shape = tensor.dims();
    let length = shape[dim];
    let whole = if length > 128 { length.next_multiple_of(128) } else { length.next_power_of_two().max(32) };
    if whole == length {
        return tensor;
    }
    shape[dim] = whole - length;
    let zeros = Tensor::zeros(shape, (&tensor.device(), tensor.dtype()));
    Tensor::cat(vec![tensor, zeros], dim)
}

/// Which pairs a plan keeps, as masks.
#[derive(Debug, Clone)]
pub(crate) struct Kept<B: Backend> {
    /// `[heads of all sequences, blocks]`: 1 for each kept block distance.
    bands: Tensor<B, 2>,
    /// `[heads of all sequences, Sk]`: 1 for each kept column.
    stripes: Tensor<B, 2>,
    /// First position that attends to everything.
    tail_start: usize,
    block_size: usize,
}

impl<B: Backend> Kept<B> {
    /// From the tensors of a [`Sparse`](crate::Sparse).
    pub fn new(
        table: Tensor<B, 2, Int>,
        stripes: Tensor<B, 2, Int>,
        keys: usize,
        tail_start: usize,
        block_size: usize,
    ) -> Self {
        let [heads, width] = table.dims();
        let blocks = (width - 2) / 2;
        let dense = table.clone().narrow(1, 0, 1).float().cast(DType::F32);
        // How many of the distances up to each are kept: where the count grows, one is.
        let count = table.narrow(1, 2, blocks).float().cast(DType::F32);
        let before = Tensor::cat(vec![count.clone().narrow(1, 0, 1).zeros_like(), count.clone()], 1);
        let bands = (count - before.narrow(1, 0, blocks)).max_pair(dense.expand([heads, blocks]));
        // What pads the lists goes to a column behind the last.
        let missing = stripes.clone().lower_elem(0);
        let columns = stripes.mask_fill(missing, keys as i32);
        let ones = columns.ones_like().float().cast(DType::F32);
        let stripes = Tensor::zeros([heads, keys + 1], (&bands.device(), DType::F32)).scatter(
            1,
            columns,
            ones,
            burn::tensor::IndexingUpdateOp::Add,
        );
        Self { bands, stripes: stripes.narrow(1, 0, keys), tail_start, block_size }
    }

    /// Whether rows from position `first` on leave keys from `key` on out, `[heads, rows, keys]`.
    fn hidden(&self, first: usize, rows: usize, key: usize, keys: usize) -> Tensor<B, 3, Bool> {
        let heads = self.bands.dims()[0];
        let device = self.bands.device();
        let block = |position: usize| position / self.block_size;
        let distances = (first..first + rows)
            .flat_map(|row| (key..key + keys).map(move |key| block(row).saturating_sub(block(key)) as i32));
        let distances = TensorData::new(distances.collect::<Vec<_>>(), [rows * keys]);
        let bands = self.bands.clone().select(1, Tensor::from_data(distances, &device));
        let tail = (first..first + rows).map(|row| f32::from(row >= self.tail_start));
        let tail = Tensor::<B, 1>::from_data(TensorData::new(tail.collect::<Vec<_>>(), [rows]), &device);
        let stripes = self.stripes.clone().narrow(1, key, keys).reshape([heads, 1, keys]);
        let shape = [heads, rows, keys];
        let kept = bands.reshape(shape)
            + stripes.expand(shape)
            + tail.cast(DType::F32).reshape([1, rows, 1]).expand(shape);
        kept.lower_elem(0.5)
    }
}

/// Pairs that a tile leaves out, by cause and by plan, `[heads of all sequences, rows, keys]`; `None` where it
/// leaves none out.
fn hidden<B: Backend>(
    kept: Option<&Kept<B>>,
    heads: usize,
    (first, rows): (usize, usize),
    (key, keys): (usize, usize),
    device: &B::Device,
) -> Option<Tensor<B, 3, Bool>> {
    let shape = [heads, rows, keys];
    let future = (first + 1 < key + keys).then(|| {
        let future = Tensor::<B, 2, Bool>::tril_mask([rows, keys], first as i64 - key as i64, device);
        future.reshape([1, rows, keys]).expand(shape)
    });
    match (future, kept.map(|kept| kept.hidden(first, rows, key, keys))) {
        (Some(future), Some(left_out)) => Some(future.bool_or(left_out)),
        (future, left_out) => future.or(left_out),
    }
}

/// What the backward pass needs of the forward pass.
#[derive(Debug, Clone)]
pub(crate) struct Forward<B: Backend> {
    pub q: Tensor<B, 4>,
    pub k: Tensor<B, 4>,
    pub v: Tensor<B, 4>,
    pub output: Tensor<B, 4>,
    /// `[batch, heads, Sq]`
    pub lse: Tensor<B, 3>,
    pub kept: Option<Kept<B>>,
    pub scale: f64,
}

impl<B: Backend> Forward<B> {
    /// Gradients of q, k and v from that of the output, in their shapes and types.
    pub fn backward(self, gradient: Tensor<B, 4>) -> [Tensor<B, 4>; 3] {
        let [batch, heads, ..] = self.q.dims();
        let tile = tile(batch * heads, self.kept.is_some());
        self.backward_in_tiles(gradient, tile)
    }

    fn backward_in_tiles(self, gradient: Tensor<B, 4>, tile: usize) -> [Tensor<B, 4>; 3] {
        let Self { q, k, v, output, lse, kept, scale } = self;
        let (dtype, device) = (q.dtype(), q.device());
        let [q, k, v, output, gradient] = [q, k, v, output, gradient].map(|tensor| tensor.cast(DType::F32));
        let [batch, heads, rows, head_dim] = q.dims();
        let [_, kv_heads, keys, _] = k.dims();
        let (group, offset) = (heads / kv_heads, keys - rows);
        let inner = (output * gradient.clone()).sum_dim(3);
        let q = q.mul_scalar(scale);
        let lse = lse.reshape([batch, heads, rows, 1]);
        // The rows of the query heads that share a key/value head are one matrix.
        let tile_rows = |tensor: &Tensor<B, 4>, first: usize, length: usize| {
            let width = tensor.dims()[3];
            tensor.clone().narrow(2, first, length).reshape([batch, kv_heads, group * length, width])
        };

        let starts: Vec<usize> = (0..rows).step_by(tile).collect();
        let mut q_gradients: Vec<Option<Tensor<B, 4>>> = vec![None; starts.len()];
        let (mut k_gradients, mut v_gradients) = (Vec::new(), Vec::new());
        for key in (0..keys).step_by(tile) {
            let width = tile.min(keys - key);
            let (k, v) = (k.clone().narrow(2, key, width), v.clone().narrow(2, key, width));
            let (mut k_gradient, mut v_gradient) = (k.zeros_like(), v.zeros_like());
            for (index, &first) in starts.iter().enumerate() {
                let length = tile.min(rows - first);
                if offset + first + length <= key {
                    continue;
                }
                let shape = [batch, kv_heads, group * length, width];
                let q = tile_rows(&q, first, length);
                let gradient = tile_rows(&gradient, first, length);
                let hidden =
                    hidden(kept.as_ref(), batch * heads, (offset + first, length), (key, width), &device);
                let scores = padded(q.clone(), 3).matmul(padded(k.clone(), 3).swap_dims(2, 3));
                let weights = (scores - tile_rows(&lse, first, length)).exp();
                let weights = match hidden {
                    Some(hidden) => weights.mask_fill(hidden.reshape(shape), 0.0),
                    None => weights,
                };
                let product_over_rows = |weights: &Tensor<B, 4>, rows: Tensor<B, 4>| {
                    padded(weights.clone(), 2).swap_dims(2, 3).matmul(padded(rows, 2))
                };
                v_gradient = v_gradient + product_over_rows(&weights, gradient.clone());
                let slope = padded(gradient, 3).matmul(padded(v.clone(), 3).swap_dims(2, 3))
                    - tile_rows(&inner, first, length);
                let slope = weights * slope;
                k_gradient = k_gradient + product_over_rows(&slope, q);
                let q_gradient = padded(slope, 3).matmul(padded(k.clone(), 2));
                let q_gradient = q_gradient.reshape([batch, heads, length, head_dim]);
                q_gradients[index] = Some(match q_gradients[index].take() {
                    Some(sum) => sum + q_gradient,
                    None => q_gradient,
                });
            }
            k_gradients.push(k_gradient);
            v_gradients.push(v_gradient);
        }
        // Every row sees its own key, so every tile of rows has a gradient.
        let q_gradients = Tensor::cat(q_gradients.into_iter().flatten().collect(), 2).mul_scalar(scale);
        let [k_gradients, v_gradients] = [k_gradients, v_gradients].map(|tiles| Tensor::cat(tiles, 2));
        [q_gradients, k_gradients, v_gradients].map(|gradient| gradient.cast(dtype))
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::Distribution;

    use super::*;
    use crate::plain::dense_attention;

    #[test]
    fn tiles_of_any_size_give_the_same_gradients() {
        let device = Default::default();
        Flex::seed(&device, 4);
        let random = |heads, rows| {
            Tensor::<Flex, 4>::random([2, heads, rows, 16], Distribution::Normal(0.0, 1.0), &device)
        };
        for (rows, keys) in [(100, 100), (70, 129), (1, 65)] {
            let (q, k, v, gradient) = (random(4, rows), random(2, keys), random(2, keys), random(4, rows));
            let scale = 0.25;
            let (output, lse) = dense_attention(q.clone(), k.clone(), v.clone(), scale);
            let forward = Forward { q, k, v, output, lse, kept: None, scale };
            let whole = forward.clone().backward(gradient.clone());
            for tile in [1, 32, 33, 64] {
                let tiled = forward.clone().backward_in_tiles(gradient.clone(), tile);
                for (tiled, whole) in tiled.into_iter().zip(whole.clone()) {
                    assert_eq!(tiled.dims(), whole.dims());
                    let difference = (tiled - whole).abs().max().into_scalar();
                    assert!(difference < 1e-4, "{rows} rows, {keys} keys, tiles of {tile}: {difference}");
                }
            }
        }
    }

    #[test]
    fn tiles_grow_while_memory_allows() {
        assert_eq!([1, 8, 128, 4096].map(|heads| tile(heads, false)), [8192, 2048, 512, 512]);
        assert_eq!(tile(1, true), 512);
    }
}
