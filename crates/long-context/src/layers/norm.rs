use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::{LayerBackend, float, tensor};

/// Configuration of an [`RmsNorm`] layer.
#[derive(Debug, Clone)]
pub struct RmsNormConfig {
    size: usize,
    epsilon: f64,
    cast_before_weight: bool,
}

impl RmsNormConfig {
    /// A norm over `size` features.
    pub fn new(size: usize, epsilon: f64) -> Self {
        Self { size, epsilon, cast_before_weight: false }
    }

    /// Whether the normalized value is rounded to the input's type before the weight multiplies it
    /// (InternLM2), or after (ChatGLM, the default). It matters in half precision only.
    pub fn with_cast_before_weight(mut self, cast_before_weight: bool) -> Self {
        self.cast_before_weight = cast_before_weight;
        self
    }

    /// Initializes the layer with a weight of ones.
    pub fn init<B: Backend>(&self, device: &B::Device) -> RmsNorm<B> {
        RmsNorm {
            weight: Initializer::Ones.init([self.size], device),
            epsilon: self.epsilon,
            cast_before_weight: self.cast_before_weight,
        }
    }
}

/// `x / sqrt(mean(x²) + ε) · weight`, normalized in f32 whatever the input's type.
#[derive(Module, Debug)]
pub struct RmsNorm<B: Backend> {
    /// `[size]`
    pub weight: Param<Tensor<B, 1>>,
    epsilon: f64,
    cast_before_weight: bool,
}

impl<B: LayerBackend> RmsNorm<B> {
    /// Normalizes the last dimension.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, length, size]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        tensor(B::rms_norm(float(x), float(self.weight.val()), self.epsilon, self.cast_before_weight))
    }
}
