//! Layers that every family uses.

mod linear;
mod norm;

pub use linear::{Linear, LinearConfig};
pub use norm::{RmsNorm, RmsNormConfig};
pub use sample_attention::rotary::{Rotary, RotaryConfig, RotaryPairs};
