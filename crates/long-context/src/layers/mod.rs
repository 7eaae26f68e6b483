//! Layers that every family uses.

mod linear;
mod norm;

pub use crate::backend::{Heads, Packing};
pub use linear::{Linear, LinearConfig, gated};
pub use norm::{RmsNorm, RmsNormConfig};
pub use sample_attention::rotary::{Rotary, RotaryConfig, RotaryPairs};
