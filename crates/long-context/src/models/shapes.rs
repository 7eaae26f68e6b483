//! Dimensions of published models, for measurements without their weights.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor, backend::Backend};

use super::{ChatGlmConfig, InternLm2Config, Model, ModelConfig, RopeRatio, RopeScaling};

impl ModelConfig {
    /// The names that [`of_shape`](Self::of_shape) knows.
    pub const SHAPES: [&str; 3] = ["chatglm3-6b", "glm4-9b", "internlm2-7b"];

    /// Dimensions of a published model by its name; none that is not in [`SHAPES`](Self::SHAPES).
    pub fn of_shape(name: &str) -> Option<Self> {
        match name {
            "chatglm3-6b" => Some(Self::ChatGlm(ChatGlmConfig {
                hidden_size: 4096,
                num_layers: 28,
                num_attention_heads: 32,
                num_kv_heads: 2,
                head_dim: 128,
                ffn_hidden_size: 13_696,
                padded_vocab_size: 65_024,
                layernorm_epsilon: 1e-5,
                add_qkv_bias: true,
                rope_ratio: RopeRatio::ScalesBase(1.0),
                seq_length: 8192,
            })),
            "glm4-9b" => Some(Self::ChatGlm(ChatGlmConfig {
                hidden_size: 4096,
                num_layers: 40,
                num_attention_heads: 32,
                num_kv_heads: 2,
                head_dim: 128,
                ffn_hidden_size: 13_696,
                padded_vocab_size: 151_552,
                layernorm_epsilon: 1.5625e-7,
                add_qkv_bias: true,
                rope_ratio: RopeRatio::ScalesBase(500.0),
                seq_length: 131_072,
            })),
            "internlm2-7b" => Some(Self::InternLm2(InternLm2Config {
                hidden_size: 4096,
                num_layers: 32,
                num_attention_heads: 32,
                num_kv_heads: 8,
                intermediate_size: 14_336,
                vocab_size: 92_544,
                rms_norm_eps: 1e-5,
                rope_theta: 1e6,
                rope_scaling: RopeScaling::Dynamic(2.0),
                max_position_embeddings: 32_768,
                bias: false,
            })),
            _ => None,
        }
    }

    /// A model of random weights, drawn on the device and kept in `dtype`.
    pub fn init_random<B: Backend>(&self, dtype: DType, device: &B::Device) -> Model<B> {
        self.init(device).map(&mut Cast(dtype))
    }
}

/// Draws one parameter at a time, so that only one is ever held in f32.
struct Cast(DType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| {
            let device = tensor.device();
            let tensor = tensor.cast(self.0);
            // A device that fails here fails again where the model is run.
            let _ = B::sync(&device);
            tensor
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::module::ModuleVisitor;

    use super::*;

    #[test]
    fn shapes_have_the_published_sizes() {
        let billions = ModelConfig::SHAPES.map(|name| {
            let config = ModelConfig::of_shape(name).unwrap();
            let parameters: u64 = config.tensors().iter().map(|tensor| tensor.elements()).sum();
            (parameters as f64 / 1e7).round() / 100.0
        });
        assert_eq!(billions, [6.24, 9.4, 7.74]);
        assert_eq!(ModelConfig::of_shape("gpt-2"), None);
    }

    /// Types and mean squares of all parameters but norms and biases.
    struct Weights(Vec<(DType, f64)>);

    impl ModuleVisitor<Flex> for Weights {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            let tensor = param.val();
            let square = tensor.clone().cast(DType::F32).square().mean().into_scalar();
            if D == 2 {
                self.0.push((tensor.dtype(), square.into()));
            }
        }
    }

    #[test]
    fn random_weights_are_small_and_of_the_type_asked_for() {
        let Some(ModelConfig::ChatGlm(config)) = ModelConfig::of_shape("chatglm3-6b") else { panic!() };
        let config = ChatGlmConfig {
            hidden_size: 64,
            num_layers: 2,
            num_attention_heads: 4,
            head_dim: 16,
            ffn_hidden_size: 96,
            padded_vocab_size: 128,
            ..config
        };
        let model = ModelConfig::ChatGlm(config).init_random::<Flex>(DType::BF16, &Default::default());
        let mut weights = Weights(Vec::new());
        model.visit(&mut weights);
        assert_eq!(weights.0.len(), 2 + 2 * 4);
        for (dtype, square) in weights.0 {
            assert!(dtype == DType::BF16 && (square.sqrt() - 0.02).abs() < 0.002, "{dtype:?} {square}");
        }
    }
}
