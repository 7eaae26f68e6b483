use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

/// Configuration of a [`Linear`] layer.
#[derive(Debug, Clone)]
pub struct LinearConfig {
    d_input: usize,
    d_output: usize,
    bias: bool,
}

impl LinearConfig {
    /// A projection from `d_input` to `d_output` features, without bias.
    pub fn new(d_input: usize, d_output: usize) -> Self {
        Self { d_input, d_output, bias: false }
    }

    /// Whether to add a bias.
    pub fn with_bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Initializes the layer (lazily: loading a checkpoint allocates nothing twice).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Linear<B> {
        let init = Initializer::Normal { mean: 0.0, std: 0.02 };
        Linear {
            weight: init.init([self.d_output, self.d_input], device),
            bias: self.bias.then(|| Initializer::Zeros.init([self.d_output], device)),
        }
    }
}

/// `y = x Wᵀ + b`, the weight kept as checkpoints store it: `[out, in]`, so that loading transposes nothing.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`
    pub bias: Option<Param<Tensor<B, 1>>>,
}

impl<B: Backend> Linear<B> {
    /// Applies the projection.
    ///
    /// # Shapes
    ///
    /// - x: `[batch, length, in]`
    /// - output: `[batch, length, out]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, length, d_input] = x.dims();
        let weight = self.weight.val();
        let d_output = weight.dims()[0];
        let y = x.reshape([batch * length, d_input]).matmul(weight.transpose());
        let y = match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        };
        y.reshape([batch, length, d_output])
    }
}
