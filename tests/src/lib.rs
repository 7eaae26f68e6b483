//! What the tests compare with: attention in float64, written for reading and not for speed.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Lengths and heads of one attention problem.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Query rows, the last of the context.
    pub queries: usize,
    /// Keys.
    pub keys: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// q, k and v, each row by row.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// `[batch, heads, queries, head_dim]`
    pub q: Vec<f32>,
    /// `[batch, kv_heads, keys, head_dim]`
    pub k: Vec<f32>,
    /// `[batch, kv_heads, keys, head_dim]`
    pub v: Vec<f32>,
}

impl Problem {
    /// Values of about unit size from a seed.
    pub fn inputs(&self, seed: u64) -> Inputs {
        let mut random = StdRng::seed_from_u64(seed);
        let mut draw = |n: usize| (0..n).map(|_| random.random_range(-1.7f32..1.7)).collect();
        let (queries, keys) =
            (self.batch * self.heads * self.queries, self.batch * self.kv_heads * self.keys);
        Inputs {
            q: draw(queries * self.head_dim),
            k: draw(keys * self.head_dim),
            v: draw(keys * self.head_dim),
        }
    }

    /// Causal softmax attention in float64, bottom-right aligned, `[batch, heads, queries, head_dim]`.
    pub fn attention(&self, inputs: &Inputs) -> Vec<f64> {
        let Self { batch, heads, kv_heads, queries, keys, head_dim } = *self;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>();
        let mut output = Vec::with_capacity(inputs.q.len());
        for (row, q) in inputs.q.chunks_exact(head_dim).enumerate() {
            let (head, position) = (row / queries, keys - queries + row % queries);
            let kv_head = head / heads * kv_heads + head % heads / (heads / kv_heads);
            assert!(head / heads < batch);
            let key = |at: usize| &inputs.k[(kv_head * keys + at) * head_dim..][..head_dim];
            let scores: Vec<f64> = (0..=position).map(|at| dot(q, key(at)) * scale).collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            output.extend((0..head_dim).map(|column| {
                let value = |at: usize| inputs.v[(kv_head * keys + at) * head_dim + column] as f64;
                weights.iter().enumerate().map(|(at, weight)| weight / sum * value(at)).sum::<f64>()
            }));
        }
        output
    }
}

/// Largest difference, NaN where there is one.
pub fn max_difference<A: Into<f64> + Copy, B: Into<f64> + Copy>(found: &[A], expected: &[B]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(&a, &b)| (a.into() - b.into()).abs());
    differences
        .fold(0.0, |max, difference| if difference > max || difference.is_nan() { difference } else { max })
}
