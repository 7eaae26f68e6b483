//! InternLM2 and InternLM2.5, every size.

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};

use super::{TensorSpec, embed};
use crate::backend::LayerBackend;
use crate::cache::{KvCache, KvCacheConfig, LayerCache};
use crate::layers::{
    Heads, Linear, LinearConfig, Packing, RmsNorm, RmsNormConfig, Rotary, RotaryConfig, RotaryPairs, gated,
    merge_heads,
};

/// How the rotary embedding stretches beyond the trained range (`rope_scaling`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by the factor.
    Linear(f64),
    /// Dynamic NTK: past `max_position_embeddings` the base grows with the length.
    Dynamic(f64),
}

/// Dimensions of an InternLM2 model.
#[derive(Debug, Clone, PartialEq)]
pub struct InternLm2Config {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Rotary scaling.
    pub rope_scaling: RopeScaling,
    /// Number of positions the model was trained for.
    pub max_position_embeddings: usize,
    /// Whether the attention projections (and only they) have a bias.
    pub bias: bool,
}

impl InternLm2Config {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Rows of the fused projection: per key/value head its query heads, its key, its value.
    pub fn qkv_rows(&self) -> usize {
        (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_dim()
    }

    /// Every parameter: its path in the module, its name in a checkpoint, its shape there.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (hidden, ffn, vocab) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let mut specs = vec![
            TensorSpec::new("embedding.weight", "model.tok_embeddings.weight", [vocab, hidden]),
            TensorSpec::new("norm.weight", "model.norm.weight", [hidden]),
            TensorSpec::new("head.weight", "output.weight", [vocab, hidden]),
        ];
        for i in 0..self.num_layers {
            let mut layer = |path: &str, name: &str, shape: &[usize]| {
                specs.push(TensorSpec::new(
                    format!("layers.{i}.{path}"),
                    format!("model.layers.{i}.{name}"),
                    shape.to_vec(),
                ));
            };
            layer("attention_norm.weight", "attention_norm.weight", &[hidden]);
            layer("attention.qkv.weight", "attention.wqkv.weight", &[self.qkv_rows(), hidden]);
            layer("attention.output.weight", "attention.wo.weight", &[hidden, hidden]);
            if self.bias {
                layer("attention.qkv.bias", "attention.wqkv.bias", &[self.qkv_rows()]);
                layer("attention.output.bias", "attention.wo.bias", &[hidden]);
            }
            layer("mlp_norm.weight", "ffn_norm.weight", &[hidden]);
            layer("mlp.gate.weight", "feed_forward.w1.weight", &[ffn, hidden]);
            layer("mlp.up.weight", "feed_forward.w3.weight", &[ffn, hidden]);
            layer("mlp.down.weight", "feed_forward.w2.weight", &[hidden, ffn]);
        }
        specs
    }

    /// Dimensions of a cache for this model.
    pub fn cache(&self, batch: usize, capacity: usize) -> KvCacheConfig {
        KvCacheConfig {
            num_layers: self.num_layers,
            batch,
            num_kv_heads: self.num_kv_heads,
            capacity,
            head_dim: self.head_dim(),
        }
    }

    /// Rotary embedding of a context of `context` positions.
    fn rotary(&self, context: usize) -> RotaryConfig {
        let (trained, width) = (self.max_position_embeddings as f64, self.head_dim() as f64);
        let (base, position_divisor) = match self.rope_scaling {
            RopeScaling::Dynamic(factor) if context as f64 > trained => {
                let stretch = factor * context as f64 / trained - (factor - 1.0);
                (self.rope_theta * stretch.powf(width / (width - 2.0)), 1.0)
            }
            RopeScaling::Linear(factor) => (self.rope_theta, factor),
            RopeScaling::None | RopeScaling::Dynamic(_) => (self.rope_theta, 1.0),
        };
        RotaryConfig { width: self.head_dim(), pairs: RotaryPairs::HalfSplit, base, position_divisor }
    }

    fn norm<B: Backend>(&self, device: &B::Device) -> RmsNorm<B> {
        RmsNormConfig::new(self.hidden_size, self.rms_norm_eps).with_cast_before_weight(true).init(device)
    }

    /// Initializes the model, lazily: a checkpoint can be loaded into it without a second allocation.
    pub fn init<B: Backend>(&self, device: &B::Device) -> InternLm2<B> {
        let (hidden, ffn, vocab) = (self.hidden_size, self.intermediate_size, self.vocab_size);
        let layer = |_| Layer {
            attention_norm: self.norm(device),
            attention: Attention {
                qkv: LinearConfig::new(hidden, self.qkv_rows()).with_bias(self.bias).init(device),
                output: LinearConfig::new(hidden, hidden).with_bias(self.bias).init(device),
                kv_heads: self.num_kv_heads,
                group: self.num_attention_heads / self.num_kv_heads,
                head_dim: self.head_dim(),
            },
            mlp_norm: self.norm(device),
            mlp: Mlp {
                gate: LinearConfig::new(hidden, ffn).init(device),
                up: LinearConfig::new(hidden, ffn).init(device),
                down: LinearConfig::new(ffn, hidden).init(device),
            },
        };
        InternLm2 {
            embedding: LinearConfig::new(hidden, vocab).init(device),
            layers: (0..self.num_layers).map(layer).collect(),
            norm: self.norm(device),
            head: LinearConfig::new(hidden, vocab).init(device),
            config: self.clone(),
        }
    }
}

/// An InternLM2 model: embedding, layers, norm, untied head.
#[derive(Module, Debug)]
pub struct InternLm2<B: Backend> {
    embedding: Linear<B>,
    layers: Vec<Layer<B>>,
    norm: RmsNorm<B>,
    head: Linear<B>,
    #[module(skip)]
    config: InternLm2Config,
}

impl<B: LayerBackend> InternLm2<B> {
    /// Rotary embedding of a context of `context` positions. Under dynamic NTK new positions turn by its
    /// base; cached keys stay as they were turned, as in the official code.
    pub(super) fn rotary(&self, context: usize) -> RotaryConfig {
        self.config.rotary(context)
    }

    /// The residual stream after the last norm.
    ///
    /// # Shapes
    ///
    /// - ids: `[batch, length]`
    /// - output: `[batch, length, hidden]`
    pub(super) fn hidden(
        &self,
        ids: Tensor<B, 2, Int>,
        rotary: &Rotary<B>,
        cache: &mut KvCache<B>,
    ) -> Tensor<B, 3> {
        let mut x = embed(&self.embedding, ids);
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(x, rotary, cache.layer(i));
        }
        self.norm.forward(x)
    }

    /// Logits of hidden states.
    ///
    /// # Shapes
    ///
    /// - hidden: `[batch, length, hidden]`
    /// - output: `[batch, length, vocab]`
    pub(super) fn logits(&self, hidden: Tensor<B, 3>) -> Tensor<B, 3> {
        self.head.forward(hidden)
    }

    pub(super) fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    pub(super) fn num_layers(&self) -> usize {
        self.config.num_layers
    }
}

#[derive(Module, Debug)]
struct Layer<B: Backend> {
    attention_norm: RmsNorm<B>,
    attention: Attention<B>,
    mlp_norm: RmsNorm<B>,
    mlp: Mlp<B>,
}

impl<B: LayerBackend> Layer<B> {
    /// # Shapes
    ///
    /// - x, output: `[batch, length, hidden]`
    fn forward(&self, x: Tensor<B, 3>, rotary: &Rotary<B>, cache: &mut LayerCache<B>) -> Tensor<B, 3> {
        let x = self.attention.forward(self.attention_norm.forward(x.clone()), x, rotary, cache);
        self.mlp.forward(self.mlp_norm.forward(x.clone()), x)
    }
}

#[derive(Module, Debug)]
struct Attention<B: Backend> {
    /// Rows: per key/value head its query heads, its key, its value.
    qkv: Linear<B>,
    output: Linear<B>,
    kv_heads: usize,
    /// Query heads of one key/value head.
    group: usize,
    head_dim: usize,
}

impl<B: LayerBackend> Attention<B> {
    /// Adds attention over `x` to the residual stream.
    ///
    /// # Shapes
    ///
    /// - x, residual, output: `[batch, length, hidden]`
    fn forward(
        &self,
        x: Tensor<B, 3>,
        residual: Tensor<B, 3>,
        rotary: &Rotary<B>,
        cache: &mut LayerCache<B>,
    ) -> Tensor<B, 3> {
        let heads = Heads {
            heads: self.kv_heads * self.group,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            packing: Packing::ByGroup,
        };
        let y = cache.attend(self.qkv.forward(x), heads, rotary);
        self.output.forward_onto(residual, merge_heads(y))
    }
}

#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: LayerBackend> Mlp<B> {
    /// Adds the MLP of `x` to the residual stream.
    ///
    /// # Shapes
    ///
    /// - x, residual, output: `[batch, length, hidden]`
    fn forward(&self, x: Tensor<B, 3>, residual: Tensor<B, 3>) -> Tensor<B, 3> {
        self.down.forward_onto(residual, gated(&self.gate, Some(&self.up), x))
    }
}
