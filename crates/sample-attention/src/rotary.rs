//! Rotary position embeddings.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

/// Which features of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RotaryPairs {
    /// `(2i, 2i + 1)`: ChatGLM.
    Interleaved,
    /// `(i, i + width/2)`: InternLM2.
    HalfSplit,
}

/// A rotary position embedding (arXiv 2104.09864) over the first `width` features of each head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RotaryConfig {
    /// Features that turn, even; the rest of the head passes through.
    pub width: usize,
    /// How features pair up.
    pub pairs: RotaryPairs,
    /// Pair `i` turns by `position · base^(-2i / width)`.
    pub base: f64,
    /// Positions are divided by this.
    pub position_divisor: f64,
}

impl RotaryConfig {
    /// The rotation of `length` positions from `start` on, computed in f64 on the host: the angle of
    /// position 1,000,000 has no correct digit left to lose in f32.
    pub fn init<B: Backend>(&self, start: usize, length: usize, device: &B::Device) -> Rotary<B> {
        self.at(start..start + length, device)
    }

    /// As [`init`](Self::init), for positions that need not follow each other: a model that is trained with
    /// gaps meets large distances in short sequences.
    pub fn at<B: Backend>(
        &self,
        positions: impl ExactSizeIterator<Item = usize>,
        device: &B::Device,
    ) -> Rotary<B> {
        let (length, half) = (positions.len(), self.width / 2);
        let frequencies: Vec<f64> = (0..half)
            .map(|i| self.base.powf(-2.0 * i as f64 / self.width as f64) / self.position_divisor)
            .collect();
        let mut cos = Vec::with_capacity(length * half);
        let mut sin = Vec::with_capacity(length * half);
        for position in positions {
            for frequency in &frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let table =
            |values| Tensor::from_data(TensorData::new(values, [1, length, 1, half]), (device, DType::F32));
        Rotary { cos: table(cos), sin: table(sin), pairs: self.pairs }
    }
}

/// The rotation of a run of positions, made once a forward pass and shared by its layers.
#[derive(Debug, Clone)]
pub struct Rotary<B: Backend> {
    /// Cosines, `[1, length, 1, width / 2]`, f32.
    pub cos: Tensor<B, 4>,
    /// Sines, like `cos`.
    pub sin: Tensor<B, 4>,
    /// How features pair up.
    pub pairs: RotaryPairs,
}

impl<B: Backend> Rotary<B> {
    /// Turns queries or keys.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, length, heads, head_dim]`
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let dtype = x.dtype();
        let [batch, length, heads, head_dim] = x.dims();
        let half = self.cos.dims()[3];
        let width = 2 * half;

        let turned = x.clone().narrow(3, 0, width).cast(DType::F32);
        let (a, b) = match self.pairs {
            RotaryPairs::HalfSplit => (turned.clone().narrow(3, 0, half), turned.narrow(3, half, half)),
            RotaryPairs::Interleaved => {
                let pairs = turned.reshape([batch, length, heads, half, 2]);
                (pairs.clone().narrow(4, 0, 1).squeeze_dim(4), pairs.narrow(4, 1, 1).squeeze_dim(4))
            }
        };
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos + a * sin;
        let turned = match self.pairs {
            RotaryPairs::HalfSplit => Tensor::cat(vec![first, second], 3),
            RotaryPairs::Interleaved => {
                Tensor::stack::<5>(vec![first, second], 4).reshape([batch, length, heads, width])
            }
        }
        .cast(dtype);
        if width == head_dim {
            turned
        } else {
            Tensor::cat(vec![turned, x.narrow(3, width, head_dim - width)], 3)
        }
    }
}
