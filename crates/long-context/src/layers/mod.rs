//! Layers that every family uses.

mod heads;
mod linear;
mod norm;

pub use crate::backend::{Heads, Packing};
pub use heads::merge_heads;
pub use linear::{Linear, LinearConfig, gated};
pub use norm::{RmsNorm, RmsNormConfig};
pub use sample_attention::rotary::{Rotary, RotaryConfig, RotaryPairs};
