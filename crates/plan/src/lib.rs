//! What SampleAttention (arXiv 2406.15486) computes, apart from how: options, sizes and sampled rows, plans, and the
//! whole operator in plain float64 loops.

mod error;
mod geometry;
mod options;
mod plan;
pub mod reference;
mod stage;

pub use error::Error;
pub use geometry::AttentionShape;
pub use options::{Rule, SampleAttentionOptions, TileProduct};
pub use plan::HostPlan;
pub use stage::{Stage, StageTimes};
