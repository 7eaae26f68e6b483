//! Keys and values that are held from one call to the next.

use burn::tensor::{DType, Tensor, backend::Backend, s};

/// Keys and values of one layer, allocated once for the whole context, native heads (never repeated for grouped
/// queries).
#[derive(Debug, Clone)]
pub struct KeyValueCache<B: Backend> {
    // Taken out while new positions are written: only a sole owner is written in place.
    memory: Option<[Tensor<B, 4>; 2]>,
    length: usize,
}

impl<B: Backend> KeyValueCache<B> {
    /// Allocates room for `[batch, kv_heads, capacity, head_dim]` keys and values.
    pub fn new(shape: [usize; 4], dtype: DType, device: &B::Device) -> Self {
        let zeros = || Tensor::zeros(shape, (device, dtype));
        Self { memory: Some([zeros(), zeros()]), length: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Forgets the positions from `length` on; the memory stays.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Appends new positions and returns all that are held.
    ///
    /// # Shapes
    ///
    /// - keys, values: `[batch, kv_heads, length, head_dim]`
    /// - output: two of `[batch, kv_heads, held, head_dim]`
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub fn append(&mut self, keys: Tensor<B, 4>, values: Tensor<B, 4>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        self.append_by(keys.dims()[2], |[all_keys, all_values], start| {
            let (all_keys, held_keys) = write(all_keys, keys, start);
            let (all_values, held_values) = write(all_values, values, start);
            ([all_keys, all_values], (held_keys, held_values))
        })
    }

    /// Appends `length` positions that `write` puts into the memory of keys and values, from the position on that
    /// it is told. It owns the memory, `[batch, kv_heads, capacity, head_dim]` each, and hands it back.
    pub fn append_by<T>(
        &mut self,
        length: usize,
        write: impl FnOnce([Tensor<B, 4>; 2], usize) -> ([Tensor<B, 4>; 2], T),
    ) -> T {
        let memory = self.memory.take().expect("put back at the end of every write");
        let (memory, written) = write(memory, self.length);
        self.memory = Some(memory);
        self.length += length;
        written
    }
}

/// Writes new positions from `start` on; the memory, and all that it holds then.
pub fn write<B: Backend>(
    memory: Tensor<B, 4>,
    new: Tensor<B, 4>,
    start: usize,
) -> (Tensor<B, 4>, Tensor<B, 4>) {
    let end = start + new.dims()[2];
    let memory = memory.slice_assign(s![.., .., start..end, ..], new);
    let held = memory.clone().slice(s![.., .., 0..end, ..]);
    (memory, held)
}
