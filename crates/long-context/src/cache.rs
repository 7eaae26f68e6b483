//! The key/value cache, allocated once for the whole conversation, and the attention over it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::rc::Rc;

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use sample_attention::{
    AttentionBackend, HostPlan, KeyValueCache, Report, SampleAttentionOptions, Summary, rotary::Rotary,
    sample_attention_with_plan,
};

use crate::backend::{Heads, LayerBackend, Rotated, float, tensor};
use crate::stopwatch::{self, Part};

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

/// What one layer attended in one chunk, on the host.
#[derive(Debug, Clone)]
pub struct Observation {
    /// The layer.
    pub layer: usize,
    /// Position of the chunk's first token.
    pub start: usize,
    /// Queries after the rotary embedding, `[1, heads, chunk, head_dim]`, f32.
    pub q: TensorData,
    /// Keys of all positions held, `[1, kv_heads, start + chunk, head_dim]`, f32.
    pub k: TensorData,
    /// Values of all positions held, like `k`.
    pub v: TensorData,
    /// What each query head kept; `None` where all are dense from the start.
    pub plans: Option<Vec<HostPlan>>,
}

/// Sees what layers attend. Reading tensors back takes time: leave it out where time is measured.
#[derive(Clone)]
pub struct Observer {
    layers: RangeInclusive<usize>,
    each: Rc<RefCell<dyn FnMut(Observation)>>,
}

impl Observer {
    /// Hands what the layers named attend in each chunk to `each`, as it happens.
    pub fn new(layers: RangeInclusive<usize>, each: impl FnMut(Observation) + 'static) -> Self {
        Self { layers, each: Rc::new(RefCell::new(each)) }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Observer").field("layers", &self.layers).finish_non_exhaustive()
    }
}

/// Queries and keys that layers attend with in place of their own, to measure a model at a density that its
/// weights do not have. Values are the layer's own.
#[derive(Debug, Clone)]
pub struct StandIn<B: Backend> {
    /// Of all positions, in pieces of one length but for the last, `[1, heads, piece, head_dim]`: of a million
    /// positions, one tensor would have more elements than 32 bits count.
    pub q: Vec<Tensor<B, 4>>,
    /// Of all positions, `[1, kv_heads, positions, head_dim]`.
    pub k: Tensor<B, 4>,
}

impl<B: Backend> StandIn<B> {
    /// The queries of `length` positions.
    fn queries(&self, start: usize, length: usize) -> Tensor<B, 4> {
        let mut first = 0;
        let mut parts = Vec::new();
        for piece in &self.q {
            let next = first + piece.dims()[2];
            let (from, to) = (start.max(first), (start + length).min(next));
            if from < to {
                parts.push(piece.clone().narrow(2, from - first, to - from));
            }
            first = next;
        }
        match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(parts, 2),
        }
    }
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
            layer,
            held: Held::Cache(KeyValueCache::new(shape, dtype, device)),
            options: attention.options,
            summaries: None,
            observer: None,
            stand_in: None,
        };
        let layers = (0..self.num_layers).map(layer).collect();
        let mut cache = KvCache { layers, length: 0, capacity: self.capacity };
        cache.set_attention(attention);
        cache
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
    /// A cache for whole sequences, any number at once: each pass attends within itself, in `dtype`, and leaves
    /// nothing behind.
    pub(crate) fn holding_nothing(num_layers: usize, attention: &AttentionConfig, dtype: DType) -> Self {
        let layer = |layer| LayerCache {
            layer,
            held: Held::Nothing(dtype, None),
            options: attention.options,
            summaries: None,
            observer: None,
            stand_in: None,
        };
        let layers = (0..num_layers).map(layer).collect();
        let mut cache = Self { layers, length: 0, capacity: 0 };
        cache.set_attention(attention);
        cache
    }

    /// Queries and keys of each layer's last pass, where nothing is held.
    pub(crate) fn into_attended(self) -> Vec<[Tensor<B, 4>; 2]> {
        let attended = |layer: LayerCache<B>| match layer.held {
            Held::Nothing(_, attended) => attended,
            Held::Cache(_) => None,
        };
        self.layers.into_iter().filter_map(attended).collect()
    }

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
            if let Held::Cache(held) = &mut layer.held {
                held.truncate(length);
            }
        }
    }

    /// Attends in another way from now on; reports that nobody took are dropped.
    pub fn set_attention(&mut self, attention: &AttentionConfig) {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.options = *attention.layers.get(&index).unwrap_or(&attention.options);
            layer.summaries = attention.report.then(Vec::new);
        }
    }

    /// Lets an observer see what layers attend, or nobody.
    pub fn observe(&mut self, observer: Option<Observer>) {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.observer = observer.clone().filter(|observer| observer.layers.contains(&index));
        }
    }

    /// Lets all layers attend with other queries and keys from now on, or with their own again.
    pub fn stand_in(&mut self, stand_in: Option<StandIn<B>>) {
        for layer in &mut self.layers {
            layer.stand_in = stand_in.clone();
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

#[derive(Debug, Clone)]
enum Held<B: Backend> {
    Cache(KeyValueCache<B>),
    /// Keys and values of the pass alone, attended in this type; what was attended is kept to be taken.
    Nothing(DType, Option<[Tensor<B, 4>; 2]>),
}

/// Keys and values of one layer, and how it attends to them.
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    layer: usize,
    held: Held<B>,
    options: SampleAttentionOptions,
    /// Start and length of each chunk with what its plan kept; `None` where nobody asks.
    summaries: Option<Vec<(usize, usize, Summary<B>)>>,
    observer: Option<Observer>,
    stand_in: Option<StandIn<B>>,
}

impl<B: LayerBackend> LayerCache<B> {
    /// Takes a fused projection apart, turns its queries and keys, appends the new positions, and attends from them
    /// to all that are held.
    ///
    /// # Shapes
    ///
    /// - qkv: `[batch, length, (heads + 2 kv_heads) * head_dim]`
    /// - output: `[batch, heads, length, head_dim]`
    ///
    /// # Panics
    ///
    /// Where shapes or types do not fit each other or the cache, or the device fails under an observer.
    pub fn attend(&mut self, qkv: Tensor<B, 3>, heads: Heads, rotary: &Rotary<B>) -> Tensor<B, 4> {
        let device = qkv.device();
        stopwatch::part::<B, _>(Part::Attention, &device, || self.append_and_attend(qkv, heads, rotary))
    }

    fn append_and_attend(&mut self, qkv: Tensor<B, 3>, heads: Heads, rotary: &Rotary<B>) -> Tensor<B, 4> {
        let (model_dtype, length) = (qkv.dtype(), qkv.dims()[1]);
        let (start, q, keys, values) = match &mut self.held {
            Held::Cache(held) => held.append_by(length, |memory, start| {
                let Rotated { q, memory, held } =
                    B::rotate(float(qkv), heads, rotary.clone(), memory.map(float), start);
                let [keys, values] = held.map(tensor);
                (memory.map(tensor), (start, tensor(q), keys, values))
            }),
            Held::Nothing(dtype, attended) => {
                let [q, k, v] = heads.turned(qkv, rotary).map(|part| part.cast(*dtype));
                *attended = Some([q.clone(), k.clone()]);
                (0, q, k, v)
            }
        };
        let (q, keys) = match &self.stand_in {
            Some(inputs) => (inputs.queries(start, length), inputs.k.clone().narrow(2, 0, start + length)),
            None => (q, keys),
        };
        let inputs = self.observer.as_ref().map(|_| [q.clone(), keys.clone(), values.clone()]);
        let attended = sample_attention_with_plan(q, keys, values, &self.options);
        let attended = attended.unwrap_or_else(|error| panic!("attention: {error}"));
        if let (Some(observer), Some(inputs)) = (&self.observer, inputs) {
            let [q, k, v] = inputs.map(|tensor| tensor.cast(DType::F32).into_data());
            let plans = attended
                .plan
                .clone()
                .map(|plan| plan.read().unwrap_or_else(|error| panic!("attention: {error}")));
            (observer.each.borrow_mut())(Observation { layer: self.layer, start, q, k, v, plans });
        }
        if let (Some(summaries), Some(plan)) = (&mut self.summaries, attended.plan) {
            summaries.push((start, length, plan.summary()));
        }
        attended.output.cast(model_dtype)
    }
}
