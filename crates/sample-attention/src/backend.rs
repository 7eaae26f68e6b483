use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};

use crate::plain;

/// A backend that can compute the attention of this crate. Burn's own backends all can.
pub trait AttentionBackend: Backend {
    /// [`dense_attention`](crate::dense_attention) over the backend's own tensors; in plain tensor
    /// operations where the backend has nothing better.
    fn dense_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let tensor = |primitive| Tensor::<Self, 4>::from_primitive(TensorPrimitive::Float(primitive));
        plain::dense_attention(tensor(q), tensor(k), tensor(v)).into_primitive().tensor()
    }
}

#[cfg(feature = "flex")]
impl AttentionBackend for burn::backend::Flex {
    fn dense_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        crate::cpu::dense_attention(q, k, v)
    }
}

#[cfg(feature = "cuda")]
impl<F: burn_cubecl::FloatElement, I: burn_cubecl::IntElement> AttentionBackend for burn::backend::Cuda<F, I> {}

#[cfg(feature = "wgpu")]
impl<F: burn_cubecl::FloatElement, I: burn_cubecl::IntElement, BT: burn_cubecl::BoolElement> AttentionBackend
    for burn::backend::Wgpu<F, I, BT>
{
}
