//! The extension of Burn's backends that the layers use.

#[cfg(feature = "cube")]
mod cube;
mod plain;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor, TensorPrimitive};
use sample_attention::AttentionBackend;
use sample_attention::rotary::Rotary;

/// In which order a fused projection holds its heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// All query heads, then all key heads, then all value heads (ChatGLM).
    ByKind,
    /// For each key/value head its query heads, its key, its value (InternLM2).
    ByGroup,
}

/// The heads of a fused projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of one.
    pub head_dim: usize,
    /// Their order.
    pub packing: Packing,
}

impl Heads {
    /// Takes a fused projection apart and turns its queries and keys.
    ///
    /// # Shapes
    ///
    /// - qkv: `[batch, length, (heads + 2 kv_heads) * head_dim]`
    /// - output: queries, keys and values, `[batch, heads or kv_heads, length, head_dim]`
    pub(crate) fn turned<B: Backend>(self, qkv: Tensor<B, 3>, rotary: &Rotary<B>) -> [Tensor<B, 4>; 3] {
        let [batch, length, _] = qkv.dims();
        let Self { heads, kv_heads, head_dim, packing } = self;
        // Slots of `groups` groups each; a part takes some slots of every group.
        let (groups, group) = match packing {
            Packing::ByKind => (1, [heads, kv_heads, kv_heads]),
            Packing::ByGroup => (kv_heads, [heads / kv_heads, 1, 1]),
        };
        let qkv = qkv.reshape([batch, length, groups, group.iter().sum(), head_dim]);
        let part = |first, slots| {
            let part = qkv.clone().narrow(3, first, slots);
            part.reshape([batch, length, groups * slots, head_dim])
        };
        [
            rotary.forward(part(0, group[0])).swap_dims(1, 2),
            rotary.forward(part(group[0], group[1])).swap_dims(1, 2),
            part(group[0] + group[1], group[2]).swap_dims(1, 2),
        ]
    }
}

/// What [`LayerBackend::rotate`] computes.
#[derive(Debug, Clone)]
pub struct Rotated<B: Backend> {
    /// Queries, turned, `[batch, heads, length, head_dim]`.
    pub q: FloatTensor<B>,
    /// The memory of keys and of values, `[batch, kv_heads, capacity, head_dim]`.
    pub memory: [FloatTensor<B>; 2],
    /// The positions held, with the new ones, `[batch, kv_heads, held, head_dim]`: views of the memory.
    pub held: [FloatTensor<B>; 2],
}

/// A backend that runs decoder layers: CUDA, Vulkan and WebGPU have kernels for what bounds them when a token is
/// decoded, fused or not; all others do the same in Burn's own operations, with gradients where they have them.
pub trait LayerBackend: AttentionBackend {
    /// Whether there is a kernel that multiplies many rows of a type on a device.
    fn multiplies(_dtype: DType, _device: &Self::Device) -> bool {
        false
    }

    /// `x Wᵀ`, plus bias and residual where there are any.
    ///
    /// # Shapes
    ///
    /// - x: `[batch, length, in]`
    /// - weight: `[out, in]`
    /// - bias: `[out]`
    /// - residual, output: `[batch, length, out]`
    fn project(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        residual: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        plain::project::<Self>(x, weight, bias, residual)
    }

    /// `silu(x Gᵀ) · x Uᵀ`.
    ///
    /// # Shapes
    ///
    /// - x: `[batch, length, in]`
    /// - gate, up: `[out, in]`; without `up`, `gate` is `[2 out, in]` and holds both, one after the other
    /// - output: `[batch, length, out]`
    fn project_gated(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        plain::project_gated::<Self>(x, gate, up)
    }

    /// `x / sqrt(mean(x²) + ε) · weight`, normalized in f32; rounded to the type of x also before the weight
    /// multiplies it where `cast_before_weight` says so.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, length, width]`
    /// - weight: `[width]`
    fn rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
        cast_before_weight: bool,
    ) -> FloatTensor<Self> {
        plain::rms_norm::<Self>(x, weight, epsilon, cast_before_weight)
    }

    /// Takes a fused projection apart, turns queries and keys, and writes keys and values into the memory of the
    /// cache from position `start` on: in place, where nobody else holds it.
    ///
    /// # Shapes
    ///
    /// - qkv: `[batch, length, (heads + 2 kv_heads) * head_dim]`
    /// - memory: keys and values, `[batch, kv_heads, capacity, head_dim]`
    fn rotate(
        qkv: FloatTensor<Self>,
        heads: Heads,
        rotary: Rotary<Self>,
        memory: [FloatTensor<Self>; 2],
        start: usize,
    ) -> Rotated<Self> {
        plain::rotate::<Self>(qkv, heads, &rotary, memory, start)
    }
}

pub(crate) fn float<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

pub(crate) fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

#[cfg(feature = "flex")]
impl LayerBackend for burn::backend::Flex {}

#[cfg(feature = "ndarray")]
impl LayerBackend for burn::backend::NdArray {}

#[cfg(feature = "autodiff")]
impl<B, C> LayerBackend for burn::backend::Autodiff<B, C>
where
    B: AttentionBackend,
    C: burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy,
{
}
