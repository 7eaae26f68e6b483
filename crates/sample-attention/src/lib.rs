//! Prefill attention for long contexts as a Burn function.

mod backend;
#[cfg(feature = "flex")]
mod cpu;
pub mod plain;

use burn::tensor::{Tensor, TensorPrimitive};

pub use backend::AttentionBackend;

/// Causal softmax attention.
///
/// Query row `i` stands at position `Sk - Sq + i` and sees the keys up to it. Query head `h` reads
/// key/value head `h / (heads / kv_heads)`; nothing is repeated. Scores are scaled by `1/sqrt(D)`, the
/// softmax runs in f32. Memory stays bounded at any length.
///
/// # Shapes
///
/// - q: `[batch, heads, Sq, D]`
/// - k, v: `[batch, kv_heads, Sk, D]`, `Sq <= Sk`, `heads` a multiple of `kv_heads`
/// - output: `[batch, heads, Sq, D]`
///
/// # Panics
///
/// If the shapes do not fit together as stated.
pub fn dense_attention<B: AttentionBackend>(q: Tensor<B, 4>, k: Tensor<B, 4>, v: Tensor<B, 4>) -> Tensor<B, 4> {
    let [batch, heads, queries, head_dim] = q.dims();
    let [kv_batch, kv_heads, keys, kv_dim] = k.dims();
    assert!(heads.is_multiple_of(kv_heads), "heads: found {heads}, expected a multiple of kv_heads ({kv_heads})");
    assert!(queries <= keys, "queries: found {queries}, expected at most the keys ({keys})");
    assert_eq!((kv_batch, kv_dim), (batch, head_dim), "k: found another batch or head_dim than q's");
    assert_eq!(k.dims(), v.dims(), "v: found another shape than k's");
    let [q, k, v] = [q, k, v].map(|tensor| tensor.into_primitive().tensor());
    Tensor::from_primitive(TensorPrimitive::Float(B::dense_attention(q, k, v)))
}
