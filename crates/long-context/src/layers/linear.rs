use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::{LayerBackend, float, tensor};
use crate::stopwatch::{self, Part};

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

    /// Initializes the layer (lazily: loading a checkpoint allocates nothing twice). For training from scratch,
    /// weights are so large that the output is about as large as the input, whatever its width: queries and keys
    /// of a narrow model would hardly tell anything apart else.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Linear<B> {
        let init = Initializer::Normal { mean: 0.0, std: 1.0 / (self.d_input as f64).sqrt() };
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

impl<B: LayerBackend> Linear<B> {
    /// Applies the projection.
    ///
    /// # Shapes
    ///
    /// - x: `[batch, length, in]`
    /// - output: `[batch, length, out]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.project(x, None)
    }

    /// `residual + y`, with y as in [`Linear::forward`].
    ///
    /// # Shapes
    ///
    /// - x: `[batch, length, in]`
    /// - residual, output: `[batch, length, out]`
    pub fn forward_onto(&self, residual: Tensor<B, 3>, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.project(x, Some(residual))
    }

    fn project(&self, x: Tensor<B, 3>, residual: Option<Tensor<B, 3>>) -> Tensor<B, 3> {
        let device = x.device();
        stopwatch::part::<B, _>(Part::Products, &device, || {
            let bias = self.bias.as_ref().map(|bias| float(bias.val()));
            tensor(B::project(float(x), float(self.weight.val()), bias, residual.map(float)))
        })
    }
}

/// `silu(x Gᵀ) · x Uᵀ`: the first part of a gated MLP, without biases. Without `up`, the rows of `gate` are those
/// of G, then those of U.
///
/// # Shapes
///
/// - x: `[batch, length, in]`
/// - output: `[batch, length, out]`
pub fn gated<B: LayerBackend>(gate: &Linear<B>, up: Option<&Linear<B>>, x: Tensor<B, 3>) -> Tensor<B, 3> {
    let device = x.device();
    stopwatch::part::<B, _>(Part::Products, &device, || {
        let up = up.map(|up| float(up.weight.val()));
        tensor(B::project_gated(float(x), float(gate.weight.val()), up))
    })
}
