//! The key/value cache, allocated once for the whole conversation, and the attention over it.

use std::collections::BTreeMap;

use burn::tensor::{DType, Tensor, backend::Backend};
use sample_attention::{
    AttentionBackend, KeyValueCache, Report, SampleAttentionOptions, Summary, sample_attention_with_plan,
};

/// Keys and values of every layer, native heads (never repeated for grouped queries).
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
    length: usize,
    capacity: usize,
}

/// The attention of each layer's prefill.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionConfig {
    /// Every layer's that is not named below.
    pub options: SampleAttentionOptions,
    /// Layers with options of their own.
    pub layers: BTreeMap<usize, SampleAttentionOptions>,
    /// Whether reports are kept for [`KvCache::take_reports`].
    pub report: bool,
}

/// What one layer kept in one chunk of the prefill.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReport {
    /// The layer.
    pub layer: usize,
    /// Position of the chunk's first token.
    pub start: usize,
    /// Tokens of the chunk.
    pub length: usize,
    /// Its heads.
    pub report: Report,
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
    pub fn init<B: Backend>(
        &self,
        attention: &AttentionConfig,
        dtype: DType,
        device: &B::Device,
    ) -> KvCache<B> {
        let shape = [self.batch, self.num_kv_heads, self.capacity, self.head_dim];
        let layer = |layer| LayerCache {
            held: KeyValueCache::new(shape, dtype, device),
            options: *attention.layers.get(&layer).unwrap_or(&attention.options),
            summaries: attention.report.then(Vec::new),
        };
        let layers = (0..self.num_layers).map(layer).collect();
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
            layer.held.truncate(length);
        }
    }

    /// Reads what each layer's plans kept since the last call; empty where [`AttentionConfig::report`] is off.
    ///
    /// # Errors
    ///
    /// A device that fails.
    pub fn take_reports(&mut self) -> Result<Vec<LayerReport>, sample_attention::Error>
    where
        B: AttentionBackend,
    {
        let mut reports = Vec::new();
        for (layer, cache) in self.layers.iter_mut().enumerate() {
            for (start, length, summary) in cache.summaries.iter_mut().flat_map(std::mem::take) {
                reports.push(LayerReport { layer, start, length, report: summary.report()? });
            }
        }
        Ok(reports)
    }

    pub(crate) fn layer(&mut self, index: usize) -> &mut LayerCache<B> {
        &mut self.layers[index]
    }

    pub(crate) fn advance(&mut self, length: usize) {
        self.length += length;
    }
}

/// Keys and values of one layer, and how it attends to them.
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    held: KeyValueCache<B>,
    options: SampleAttentionOptions,
    /// Start and length of each chunk with what its plan kept; `None` where nobody asks.
    summaries: Option<Vec<(usize, usize, Summary<B>)>>,
}

impl<B: AttentionBackend> LayerCache<B> {
    /// Appends new positions and attends from them to all that are held.
    ///
    /// # Shapes
    ///
    /// - q: `[batch, heads, length, head_dim]`
    /// - k, v: `[batch, kv_heads, length, head_dim]`
    /// - output: like q
    ///
    /// # Panics
    ///
    /// Where shapes or types do not fit each other or the cache.
    pub fn attend(&mut self, q: Tensor<B, 4>, k: Tensor<B, 4>, v: Tensor<B, 4>) -> Tensor<B, 4> {
        let (start, length) = (self.held.len(), k.dims()[2]);
        let (keys, values) = self.held.append(k, v);
        let attended = sample_attention_with_plan(q, keys, values, &self.options);
        let attended = attended.unwrap_or_else(|error| panic!("attention: {error}"));
        if let (Some(summaries), Some(plan)) = (&mut self.summaries, attended.plan) {
            summaries.push((start, length, plan.summary()));
        }
        attended.output
    }
}
