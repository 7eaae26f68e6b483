//! Random tensors.

use rand::{RngExt, rngs::StdRng};

use cubecl::prelude::StorageType;

use crate::{AttentionShape, from_bytes, to_bytes};

/// Random tensors with the structure of real attention: neighbours attract each other, and so do a
/// few columns that everybody looks at.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// Sizes of the tensors.
    pub shape: AttentionShape,
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: Vec<f32>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub k: Vec<f32>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub v: Vec<f32>,
}

impl Problem {
    /// Draws a problem.
    pub fn random(shape: AttentionShape, rng: &mut StdRng) -> Self {
        let hot: Vec<bool> = (0..shape.kv_len).map(|_| rng.random_bool(0.03)).collect();
        let dim = shape.head_dim;
        let normal = |rng: &mut StdRng| (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>();
        let mut rows = |heads: usize, length: usize, first: usize, is_query: bool| {
            let mut rows = Vec::with_capacity(shape.batch * heads * length * dim);
            for head in 0..shape.batch * heads {
                let pull = 1.0 + (head % 3) as f32;
                for (position, &is_hot) in hot.iter().enumerate().skip(first).take(length) {
                    for d in 0..dim {
                        let angle = position as f32 * 0.6f32.powi(2 + d as i32 / 2);
                        let near = if d % 2 == 0 { angle.cos() } else { angle.sin() };
                        let seen = is_query || is_hot;
                        let shared = if seen && d + 4 >= dim { pull } else { 0.0 };
                        let local = if d < 8 { pull * near } else { 0.0 };
                        rows.push(normal(rng) + local + shared);
                    }
                }
            }
            rows
        };
        let q = rows(shape.q_heads, shape.q_len, shape.offset(), true);
        let k = rows(shape.kv_heads, shape.kv_len, 0, false);
        let v = (0..k.len()).map(|_| normal(rng)).collect();
        Self { shape, q, k, v }
    }

    /// Rounds all numbers to a type.
    pub fn round(&mut self, dtype: StorageType) {
        for tensor in [&mut self.q, &mut self.k, &mut self.v] {
            *tensor = from_bytes(&to_bytes(tensor, dtype), dtype);
        }
    }
}
