use burn::tensor::{DType, Tensor, backend::Backend, s};

/// Keys and values of one layer, allocated once for the whole context, native heads (never repeated for grouped
/// queries).
#[derive(Debug, Clone)]
pub struct KeyValueCache<B: Backend> {
    // Taken out while a slice is assigned: only a sole owner is written in place.
    keys: Option<Tensor<B, 4>>,
    values: Option<Tensor<B, 4>>,
    length: usize,
}

impl<B: Backend> KeyValueCache<B> {
    /// Allocates room for `[batch, kv_heads, capacity, head_dim]` keys and values.
    pub fn new(shape: [usize; 4], dtype: DType, device: &B::Device) -> Self {
        let zeros = || Some(Tensor::zeros(shape, (device, dtype)));
        Self { keys: zeros(), values: zeros(), length: 0 }
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
