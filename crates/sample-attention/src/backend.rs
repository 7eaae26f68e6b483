//! The extension of Burn's backends.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
#[cfg(feature = "cube")]
use burn::tensor::{Tensor, TensorPrimitive};
use sample_attention_plan::SampleAttentionOptions;

#[cfg(feature = "cube")]
use crate::plain;

/// A backend that can compute the attention of this crate: CUDA, Vulkan and WebGPU run kernels, fused or not;
/// Flex and NdArray multi-threaded code; `Autodiff` over any of them has gradients.
///
/// Whoever calls these has checked shapes and options; [`sample_attention`](crate::sample_attention) does.
pub trait AttentionBackend: Backend {
    /// Causal attention over all keys, and the log-sum-exp as in [`Sparse::lse`].
    fn dense_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// SampleAttention of a call that samples rows.
    fn sample_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: &SampleAttentionOptions,
    ) -> Sparse<Self>;
}

/// What [`AttentionBackend::sample_attention`] computes. Heads are numbered `sequence * heads + head`; blocks are
/// those of the positions, columns the keys before the tail.
#[derive(Debug, Clone)]
pub struct Sparse<B: Backend> {
    /// `[batch, heads, Sq, D]`, in the type of q.
    pub output: FloatTensor<B>,
    /// Natural log-sum-exp of each row's scaled scores over the keys that it keeps, `[batch, heads, Sq]`, f32.
    pub lse: FloatTensor<B>,
    /// Kept over causal query-key pairs, `[heads of all sequences]`, f32.
    pub density: FloatTensor<B>,
    /// Mean and minimum over the sampled rows of the kept mass, `[heads of all sequences, 2]`, f32.
    pub recall: FloatTensor<B>,
    /// `[heads of all sequences, 2 + 2 * blocks]`: whether the head is dense; its stripes; for each distance `d`
    /// how many of `0..=d` are kept; the kept distances.
    pub table: IntTensor<B>,
    /// `[heads of all sequences, columns]`: kept columns, ascending, padded with -1.
    pub stripes: IntTensor<B>,
}

/// [`AttentionBackend::dense_attention`] in plain tensor operations.
#[cfg(feature = "cube")]
pub(crate) fn plain_dense<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let [q, k, v] = [q, k, v].map(|tensor| Tensor::<B, 4>::from_primitive(TensorPrimitive::Float(tensor)));
    let (output, lse) = plain::dense_attention(q, k, v, scale);
    (output.into_primitive().tensor(), lse.into_primitive().tensor())
}
