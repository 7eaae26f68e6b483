//! ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B (chat, -32k, -128k, -1m): one architecture, told apart by
//! its config alone.

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};

use super::{TensorSpec, embed};
use crate::backend::LayerBackend;
use crate::cache::{KvCache, KvCacheConfig, LayerCache};
use crate::layers::{
    Heads, Linear, LinearConfig, Packing, RmsNorm, RmsNormConfig, Rotary, RotaryConfig, RotaryPairs, gated,
    merge_heads,
};

/// What `rope_ratio` does to the rotary embedding. The published configs use one key for both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeRatio {
    /// The base of the rotary frequencies is `10000 * ratio` (ChatGLM3-32k, -128k, GLM-4).
    ScalesBase(f64),
    /// Positions are divided by the ratio (ChatGLM2-6B-32k).
    DividesPosition(f64),
}

/// Dimensions of a ChatGLM or GLM-4 model.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatGlmConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads (`multi_query_group_num`, or the query heads without `multi_query_attention`).
    pub num_kv_heads: usize,
    /// Width of one head (`kv_channels`).
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub ffn_hidden_size: usize,
    /// Rows of the embedding and of the output head.
    pub padded_vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub layernorm_epsilon: f64,
    /// Whether the fused query/key/value projection has a bias.
    pub add_qkv_bias: bool,
    /// Rotary scaling.
    pub rope_ratio: RopeRatio,
    /// Number of positions the model was trained for.
    pub seq_length: usize,
}

impl ChatGlmConfig {
    /// Rows of the fused projection: all query heads, then all key heads, then all value heads.
    pub fn qkv_rows(&self) -> usize {
        (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Every parameter: its path in the module, its name in a checkpoint, its shape there.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (hidden, ffn, vocab) = (self.hidden_size, self.ffn_hidden_size, self.padded_vocab_size);
        let heads = self.num_attention_heads * self.head_dim;
        let mut specs = vec![
            TensorSpec::new(
                "embedding.weight",
                "transformer.embedding.word_embeddings.weight",
                [vocab, hidden],
            ),
            TensorSpec::new("norm.weight", "transformer.encoder.final_layernorm.weight", [hidden]),
            TensorSpec::new("head.weight", "transformer.output_layer.weight", [vocab, hidden]),
        ];
        for i in 0..self.num_layers {
            let mut layer = |path: &str, name: &str, shape: &[usize]| {
                specs.push(TensorSpec::new(
                    format!("layers.{i}.{path}"),
                    format!("transformer.encoder.layers.{i}.{name}"),
                    shape.to_vec(),
                ));
            };
            layer("attention_norm.weight", "input_layernorm.weight", &[hidden]);
            layer(
                "attention.qkv.weight",
                "self_attention.query_key_value.weight",
                &[self.qkv_rows(), hidden],
            );
            if self.add_qkv_bias {
                layer("attention.qkv.bias", "self_attention.query_key_value.bias", &[self.qkv_rows()]);
            }
            layer("attention.output.weight", "self_attention.dense.weight", &[hidden, heads]);
            layer("mlp_norm.weight", "post_attention_layernorm.weight", &[hidden]);
            layer("mlp.gate_up.weight", "mlp.dense_h_to_4h.weight", &[2 * ffn, hidden]);
            layer("mlp.down.weight", "mlp.dense_4h_to_h.weight", &[hidden, ffn]);
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
            head_dim: self.head_dim,
        }
    }

    /// Rotary embedding over the first half of each head.
    fn rotary(&self) -> RotaryConfig {
        let (base, position_divisor) = match self.rope_ratio {
            RopeRatio::ScalesBase(ratio) => (10_000.0 * ratio, 1.0),
            RopeRatio::DividesPosition(ratio) => (10_000.0, ratio),
        };
        RotaryConfig { width: self.head_dim / 2, pairs: RotaryPairs::Interleaved, base, position_divisor }
    }

    fn norm<B: Backend>(&self, device: &B::Device) -> RmsNorm<B> {
        RmsNormConfig::new(self.hidden_size, self.layernorm_epsilon).init(device)
    }

    /// Initializes the model, lazily: a checkpoint can be loaded into it without a second allocation.
    pub fn init<B: Backend>(&self, device: &B::Device) -> ChatGlm<B> {
        let (hidden, ffn, vocab) = (self.hidden_size, self.ffn_hidden_size, self.padded_vocab_size);
        let layer = |_| Layer {
            attention_norm: self.norm(device),
            attention: Attention {
                qkv: LinearConfig::new(hidden, self.qkv_rows()).with_bias(self.add_qkv_bias).init(device),
                output: LinearConfig::new(self.num_attention_heads * self.head_dim, hidden).init(device),
                heads: self.num_attention_heads,
                kv_heads: self.num_kv_heads,
                head_dim: self.head_dim,
            },
            mlp_norm: self.norm(device),
            mlp: Mlp {
                gate_up: LinearConfig::new(hidden, 2 * ffn).init(device),
                down: LinearConfig::new(ffn, hidden).init(device),
            },
        };
        ChatGlm {
            embedding: LinearConfig::new(hidden, vocab).init(device),
            layers: (0..self.num_layers).map(layer).collect(),
            norm: self.norm(device),
            head: LinearConfig::new(hidden, vocab).init(device),
            config: self.clone(),
        }
    }
}

/// A ChatGLM or GLM-4 model: embedding, layers, norm, untied head.
#[derive(Module, Debug)]
pub struct ChatGlm<B: Backend> {
    embedding: Linear<B>,
    layers: Vec<Layer<B>>,
    norm: RmsNorm<B>,
    head: Linear<B>,
    #[module(skip)]
    config: ChatGlmConfig,
}

impl<B: LayerBackend> ChatGlm<B> {
    /// Rotary embedding, the same for a context of any length.
    pub(super) fn rotary(&self) -> RotaryConfig {
        self.config.rotary()
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
        self.config.padded_vocab_size
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
    /// Rows: all query heads, then all key heads, then all value heads.
    qkv: Linear<B>,
    output: Linear<B>,
    heads: usize,
    kv_heads: usize,
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
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            packing: Packing::ByKind,
        };
        let y = cache.attend(self.qkv.forward(x), heads, rotary);
        self.output.forward_onto(residual, merge_heads(y))
    }
}

#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    /// Rows: the gate, then the values it gates.
    gate_up: Linear<B>,
    down: Linear<B>,
}

impl<B: LayerBackend> Mlp<B> {
    /// Adds the MLP of `x` to the residual stream.
    ///
    /// # Shapes
    ///
    /// - x, residual, output: `[batch, length, hidden]`
    fn forward(&self, x: Tensor<B, 3>, residual: Tensor<B, 3>) -> Tensor<B, 3> {
        self.down.forward_onto(residual, gated(&self.gate_up, None, x))
    }
}
