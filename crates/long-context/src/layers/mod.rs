//! Layers that every family uses.

mod linear;
mod norm;
mod rotary;

pub use linear::{Linear, LinearConfig};
pub use norm::{RmsNorm, RmsNormConfig};
pub use rotary::{Rotary, RotaryConfig, RotaryPairs};
