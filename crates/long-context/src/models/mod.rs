//! The ported models, one file a family, and what they have in common.

pub mod chatglm;
pub mod internlm2;
mod shapes;

use burn::module::Module;
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use thiserror::Error;

use crate::backend::LayerBackend;
use crate::cache::{AttentionConfig, KvCache, KvCacheConfig};
use crate::layers::{Linear, Rotary, RotaryConfig};
use chatglm::{ChatGlm, ChatGlmConfig, RopeRatio};
use internlm2::{InternLm2, InternLm2Config, RopeScaling};

/// One parameter of a model, as a checkpoint stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Path in the module, such as `layers.0.attention.qkv.weight`.
    pub path: String,
    /// Name in the checkpoint.
    pub name: String,
    /// Shape, the same in both (weights of projections are `[out, in]`).
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub(crate) fn new(
        path: impl Into<String>,
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
    ) -> Self {
        Self { path: path.into(), name: name.into(), shape: shape.into() }
    }

    /// Values that it holds.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// Dimensions of a model of any supported family.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    /// ChatGLM2, ChatGLM3 or GLM-4-9B.
    ChatGlm(ChatGlmConfig),
    /// InternLM2 or InternLM2.5.
    InternLm2(InternLm2Config),
}

impl ModelConfig {
    /// Every parameter: its path in the module, its name in a checkpoint, its shape there.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        match self {
            Self::ChatGlm(config) => config.tensors(),
            Self::InternLm2(config) => config.tensors(),
        }
    }

    /// Rows of the embedding: token ids are below it.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::ChatGlm(config) => config.padded_vocab_size,
            Self::InternLm2(config) => config.vocab_size,
        }
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::ChatGlm(config) => config.hidden_size,
            Self::InternLm2(config) => config.hidden_size,
        }
    }

    /// Positions the model can tell apart: what it was trained for, times the factor of its rotary
    /// scaling where the checkpoint has one. Dynamic NTK has no bound of its own; its factor is taken.
    pub fn context_length(&self) -> usize {
        match self {
            Self::ChatGlm(config) => config.seq_length,
            Self::InternLm2(config) => match config.rope_scaling {
                RopeScaling::None => config.max_position_embeddings,
                RopeScaling::Linear(factor) | RopeScaling::Dynamic(factor) => {
                    (config.max_position_embeddings as f64 * factor) as usize
                }
            },
        }
    }

    /// The rotary scaling in a few words.
    pub fn rotary_description(&self) -> String {
        match self {
            Self::ChatGlm(config) => match config.rope_ratio {
                RopeRatio::ScalesBase(ratio) => format!("base 10000 times {ratio}"),
                RopeRatio::DividesPosition(ratio) => format!("base 10000, positions divided by {ratio}"),
            },
            Self::InternLm2(config) => match config.rope_scaling {
                RopeScaling::None => format!("base {}", config.rope_theta),
                RopeScaling::Linear(factor) => {
                    format!("base {}, positions divided by {factor}", config.rope_theta)
                }
                RopeScaling::Dynamic(factor) => {
                    let trained = config.max_position_embeddings;
                    format!("base {}, dynamic NTK of factor {factor} past {trained}", config.rope_theta)
                }
            },
        }
    }

    /// Stretches the rotary embedding by the family's own means so that `length` positions fit:
    /// a larger `rope_ratio` for ChatGLM, dynamic NTK for InternLM2. Changes nothing where they fit.
    pub fn stretch_to(&mut self, length: usize) {
        let factor = length as f64 / self.context_length() as f64;
        if factor <= 1.0 {
            return;
        }
        match self {
            Self::ChatGlm(config) => {
                config.rope_ratio = match config.rope_ratio {
                    RopeRatio::ScalesBase(ratio) => RopeRatio::ScalesBase(ratio * factor),
                    RopeRatio::DividesPosition(ratio) => RopeRatio::DividesPosition(ratio * factor),
                };
                config.seq_length = length;
            }
            Self::InternLm2(config) => {
                config.rope_scaling = match config.rope_scaling {
                    RopeScaling::None => RopeScaling::Dynamic(factor),
                    RopeScaling::Linear(before) => RopeScaling::Linear(before * factor),
                    RopeScaling::Dynamic(before) => RopeScaling::Dynamic(before * factor),
                };
            }
        }
    }

    /// Dimensions of a cache for `batch` sequences of up to `capacity` positions.
    pub fn cache(&self, batch: usize, capacity: usize) -> KvCacheConfig {
        match self {
            Self::ChatGlm(config) => config.cache(batch, capacity),
            Self::InternLm2(config) => config.cache(batch, capacity),
        }
    }

    /// Initializes the model, lazily: a checkpoint can be loaded into it without a second allocation.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Model<B> {
        match self {
            Self::ChatGlm(config) => Model::ChatGlm(config.init(device)),
            Self::InternLm2(config) => Model::InternLm2(config.init(device)),
        }
    }
}

/// What a forward pass refuses.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ModelError {
    /// Nothing to run on.
    #[error("token ids: found none, expected at least one")]
    Empty,
    /// An id outside the vocabulary.
    #[error(
        "token id at position {position}: found {id}, expected below {vocab_size} (the model's vocabulary)"
    )]
    UnknownToken {
        /// Where it stands in the input.
        position: usize,
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// More positions than were allocated.
    #[error("key/value cache: found {needed} positions to hold, expected at most its capacity of {capacity}")]
    CacheFull {
        /// Positions after this pass.
        needed: usize,
        /// Positions allocated.
        capacity: usize,
    },
    /// Hidden states that are no rows of the model's width.
    #[error("hidden states: found {found} values, expected rows of {width}")]
    Hidden {
        /// Values given.
        found: usize,
        /// Width of the residual stream.
        width: usize,
    },
}

/// What [`Model::forward_sequences`] computes.
#[derive(Debug, Clone)]
pub struct Sequences<B: Backend> {
    /// `[batch, length, hidden]`, for [`Model::logits`].
    pub hidden: Tensor<B, 3>,
    /// Queries `[batch, heads, length, head_dim]` and keys `[batch, kv_heads, length, head_dim]` of each layer,
    /// after the rotary embedding: for losses on what a layer attends to.
    pub attended: Vec<[Tensor<B, 4>; 2]>,
}

/// A model of any supported family.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a process")]
pub enum Model<B: Backend> {
    /// ChatGLM2, ChatGLM3 or GLM-4-9B.
    ChatGlm(ChatGlm<B>),
    /// InternLM2 or InternLM2.5.
    InternLm2(InternLm2<B>),
}

impl<B: LayerBackend> Model<B> {
    /// Whether `ids` can be run after what the cache holds.
    ///
    /// # Errors
    ///
    /// No ids, an id outside the vocabulary, or a cache that is too small.
    pub fn check(&self, ids: &[u32], cache: &KvCache<B>) -> Result<(), ModelError> {
        let vocab_size = self.vocab_size();
        if ids.is_empty() {
            return Err(ModelError::Empty);
        }
        if let Some(position) = ids.iter().position(|&id| id as usize >= vocab_size) {
            return Err(ModelError::UnknownToken { position, id: ids[position], vocab_size });
        }
        let needed = cache.len() + ids.len();
        if needed > cache.capacity() {
            return Err(ModelError::CacheFull { needed, capacity: cache.capacity() });
        }
        Ok(())
    }

    /// Runs the next `ids` of one sequence and adds them to the cache.
    ///
    /// `context` is the length of the whole text that these ids are a chunk of (at least the cache's
    /// length after this pass): rotary scalings that depend on it see the same value in every chunk.
    ///
    /// # Shapes
    ///
    /// - output: `[1, ids, hidden]`, for [`Model::logits`]
    ///
    /// # Errors
    ///
    /// What [`Model::check`] refuses; nothing is changed then.
    pub fn forward(
        &self,
        ids: &[u32],
        context: usize,
        cache: &mut KvCache<B>,
        device: &B::Device,
    ) -> Result<Tensor<B, 3>, ModelError> {
        self.check(ids, cache)?;
        let (start, length) = (cache.len(), ids.len());
        let rotary = self.rotary(context.max(start + length)).init(start, length, device);
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [1, length]), device);
        let hidden = self.hidden(ids, &rotary, cache);
        cache.advance(length);
        Ok(hidden)
    }

    /// Runs whole sequences without a cache: with gradients where the backend has them, as training needs it.
    ///
    /// `positions` are those of the tokens, ascending, shared by the sequences. Attention computes in
    /// `attention_dtype`, everything else in the type of the weights.
    ///
    /// # Shapes
    ///
    /// - ids: `[batch, length]`, each below the vocabulary
    ///
    /// # Panics
    ///
    /// Where there is not one position a token.
    pub fn forward_sequences(
        &self,
        ids: Tensor<B, 2, Int>,
        positions: &[usize],
        attention: &AttentionConfig,
        attention_dtype: DType,
    ) -> Sequences<B> {
        assert_eq!(positions.len(), ids.dims()[1], "one position a token");
        let context = positions.last().map_or(0, |last| last + 1);
        let rotary = self.rotary(context).at(positions.iter().copied(), &ids.device());
        let layers = match self {
            Self::ChatGlm(model) => model.num_layers(),
            Self::InternLm2(model) => model.num_layers(),
        };
        let mut cache = KvCache::holding_nothing(layers, attention, attention_dtype);
        let hidden = self.hidden(ids, &rotary, &mut cache);
        Sequences { hidden, attended: cache.into_attended() }
    }

    fn hidden(&self, ids: Tensor<B, 2, Int>, rotary: &Rotary<B>, cache: &mut KvCache<B>) -> Tensor<B, 3> {
        match self {
            Self::ChatGlm(model) => model.hidden(ids, rotary, cache),
            Self::InternLm2(model) => model.hidden(ids, rotary, cache),
        }
    }

    fn rotary(&self, context: usize) -> RotaryConfig {
        match self {
            Self::ChatGlm(model) => model.rotary(),
            Self::InternLm2(model) => model.rotary(context),
        }
    }

    /// Logits of hidden states.
    ///
    /// # Shapes
    ///
    /// - hidden: `[batch, length, hidden]`
    /// - output: `[batch, length, vocab]`
    pub fn logits(&self, hidden: Tensor<B, 3>) -> Tensor<B, 3> {
        match self {
            Self::ChatGlm(model) => model.logits(hidden),
            Self::InternLm2(model) => model.logits(hidden),
        }
    }

    /// Width of the residual stream.
    pub(crate) fn hidden_size(&self) -> usize {
        match self {
            Self::ChatGlm(model) => model.hidden_size(),
            Self::InternLm2(model) => model.hidden_size(),
        }
    }

    fn vocab_size(&self) -> usize {
        match self {
            Self::ChatGlm(model) => model.vocab_size(),
            Self::InternLm2(model) => model.vocab_size(),
        }
    }
}

/// Looks tokens up in an embedding whose rows are `[vocab, hidden]`.
fn embed<B: Backend>(embedding: &Linear<B>, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
    let (weight, device) = (embedding.weight.val(), ids.device());
    if !B::ad_enabled(&device) {
        return burn::tensor::module::embedding(weight, ids);
    }
    // The gradient of a look-up adds rows one after another on GPUs; as a matrix product it is fast everywhere.
    let ([batch, length], [vocab, hidden]) = (ids.dims(), weight.dims());
    let rows = Tensor::<B, 1, Int>::arange(0..vocab as i64, &device).reshape([1, vocab]);
    let chosen = ids
        .reshape([batch * length, 1])
        .expand([batch * length, vocab])
        .equal(rows.expand([batch * length, vocab]));
    chosen.float().cast(weight.dtype()).matmul(weight).reshape([batch, length, hidden])
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use sample_attention::{Preset, SampleAttentionOptions};

    use super::*;

    fn configs() -> [ModelConfig; 2] {
        let internlm2 = InternLm2Config {
            hidden_size: 64,
            num_layers: 2,
            num_attention_heads: 4,
            num_kv_heads: 2,
            intermediate_size: 96,
            vocab_size: 50,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Dynamic(2.0),
            max_position_embeddings: 32,
            bias: true,
        };
        let chatglm = ChatGlmConfig {
            hidden_size: 64,
            num_layers: 2,
            num_attention_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            ffn_hidden_size: 96,
            padded_vocab_size: 50,
            layernorm_epsilon: 1e-5,
            add_qkv_bias: true,
            rope_ratio: RopeRatio::ScalesBase(2.0),
            seq_length: 64,
        };
        [ModelConfig::InternLm2(internlm2), ModelConfig::ChatGlm(chatglm)]
    }

    fn values<const D: usize>(tensor: Tensor<Flex, D>) -> Vec<f32> {
        tensor.into_data().into_vec().unwrap()
    }

    #[test]
    fn whole_sequences_give_what_a_cache_gives() {
        let device = Default::default();
        let length = 48;
        let sequences: [Vec<u32>; 2] =
            [1, 7].map(|step| (0..length).map(|at| (at * step % 50) as u32).collect());
        for config in configs() {
            let model = config.init::<Flex>(&device);
            let ids: Vec<i32> = sequences.iter().flatten().map(|&id| id as i32).collect();
            let ids = Tensor::<Flex, 2, Int>::from_data(TensorData::new(ids, [2, length]), &device);
            let positions: Vec<usize> = (0..length).collect();
            let dense = AttentionConfig { options: Preset::Dense.options(), ..Default::default() };
            let run = |positions: &[usize], attention: &AttentionConfig| {
                let passed = model.forward_sequences(ids.clone(), positions, attention, DType::F32);
                let shapes: Vec<_> = passed.attended.iter().map(|[q, k]| (q.dims(), k.dims())).collect();
                assert_eq!(shapes, [([2, 4, length, 16], [2, 2, length, 16]); 2]);
                passed.hidden
            };
            let together = run(&positions, &dense);
            for (index, sequence) in sequences.iter().enumerate() {
                let mut cache = config.cache(1, length).init(&dense, DType::F32, &device);
                let first = model.forward(&sequence[..30], length, &mut cache, &device).unwrap();
                let rest = model.forward(&sequence[30..], length, &mut cache, &device).unwrap();
                let cached = values(Tensor::cat(vec![first, rest], 1));
                let found = values(together.clone().narrow(0, index, 1));
                let worst = found.iter().zip(&cached).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-5, "{worst}");
            }
            // Positions matter, and so does what attention leaves out.
            let apart: Vec<usize> = positions.iter().map(|&at| at + at / 20 * 5).collect();
            assert_ne!(values(run(&apart, &dense)), values(together.clone()));
            let sparse = SampleAttentionOptions {
                alpha: 0.3,
                min_rows: 4,
                window_ratio: 0.0,
                block_size: 16,
                tail_rows: 0,
                dense_below: 0,
                dense_cost: None,
                ..Default::default()
            };
            let sparse = AttentionConfig { options: sparse, ..Default::default() };
            assert_ne!(values(run(&positions, &sparse)), values(together));
        }
    }
}
