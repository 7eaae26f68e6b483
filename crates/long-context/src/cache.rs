//! The key/value cache, allocated once for the whole conversation.

use burn::tensor::{DType, Tensor, backend::Backend, s};

/// Keys and values of every layer, native heads (never repeated for grouped queries).
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
    length: usize,
    capacity: usize,
}

/// Dimensions of a [`KvCache`].
#[derive(Debug, Clone)]
pub struct KvCacheConfig {
    /// Decoder layers.
    pub num_layers: usize,
    /// Sequences.
    pub batch: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Positions to hold.
    pub capacity: usize,
    /// Width of one head.
    pub head_dim: usize,
}

impl KvCacheConfig {
    /// Allocates the cache.
    pub fn init<B: Backend>(&self, dtype: DType, device: &B::Device) -> KvCache<B> {
        let shape = [self.batch, self.num_kv_heads, self.capacity, self.head_dim];
        let zeros = || Some(Tensor::zeros(shape, (device, dtype)));
        let layers =
            (0..self.num_layers).map(|_| LayerCache { keys: zeros(), values: zeros(), length: 0 }).collect();
        KvCache { layers, length: 0, capacity: self.capacity }
    }

    /// Bytes that the cache takes at `bytes_per_value`.
    pub fn bytes(&self, bytes_per_value: usize) -> u64 {
        [2, self.num_layers, self.batch, self.num_kv_heads, self.capacity, self.head_dim, bytes_per_value]
            .iter()
            .map(|&n| n as u64)
            .product()
    }
}

impl<B: Backend> KvCache<B> {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the positions from `length` on; the memory stays.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        for layer in &mut self.layers {
            layer.length = self.length;
        }
    }

    pub(crate) fn layer(&mut self, index: usize) -> &mut LayerCache<B> {
        &mut self.layers[index]
    }

    pub(crate) fn advance(&mut self, length: usize) {
        self.length += length;
    }
}

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    // Taken out while a slice is assigned: only a sole owner is written in place.
    keys: Option<Tensor<B, 4>>,
    values: Option<Tensor<B, 4>>,
    length: usize,
}

impl<B: Backend> LayerCache<B> {
    /// Appends new positions and returns all that are held.
    ///
    /// # Shapes
    ///
    /// - keys, values: `[batch, kv_heads, length, head_dim]`
    /// - output: two of `[batch, kv_heads, held, head_dim]`
    pub fn append(&mut self, keys: Tensor<B, 4>, values: Tensor<B, 4>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let end = self.length + keys.dims()[2];
        let keys = write(&mut self.keys, keys, self.length, end);
        let values = write(&mut self.values, values, self.length, end);
        self.length = end;
        (keys, values)
    }
}

fn write<B: Backend>(
    held: &mut Option<Tensor<B, 4>>,
    new: Tensor<B, 4>,
    start: usize,
    end: usize,
) -> Tensor<B, 4> {
    let all = held.take().expect("put back at the end of every write");
    let all = all.slice_assign(s![.., .., start..end, ..], new);
    let view = all.clone().slice(s![.., .., 0..end, ..]);
    *held = Some(all);
    view
}
