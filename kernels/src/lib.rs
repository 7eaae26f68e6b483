//! SampleAttention (arXiv 2406.15486) as CubeCL kernels, over CubeCL handles.
//!
//! [`sample_attention`] launches its stages one after the other, without a host round trip between
//! them:
//!
//! 1. *Sample*: the exact attention of a few query rows, in two passes. The first gives each row
//!    its log-sum-exp, the second sums the probabilities over columns. Scores are recomputed, so no
//!    buffer grows with rows times keys.
//! 2. *Filter*: the sums become a [`Plan`] of bands and stripes per query head. A head whose plan
//!    would cost more than [`dense_cost`](SampleAttentionOptions::dense_cost) becomes dense.
//! 3. *Flash*: one online-softmax loop over key tiles serves sparse, tail and dense rows alike. The
//!    stripes left of a query block are a prefix of the head's sorted list; their keys and values
//!    are loaded through that list, so nothing is gathered beforehand.
//!
//! [`dense_attention`] is the last stage over all keys, [`decode()`] splits the keys of few queries
//! over the device.
//!
//! The tiles are multiplied by plain units, by cooperative matrices or by `mma.sync`; see
//! [`TileProduct`].
//!
//! # Memory
//! Besides the output, a call allocates 4 bytes per query row (log-sum-exp), and with a plan 8 bytes
//! per query head and key; rule [`Contribution`](Rule::Contribution) 4 more per key/value head and key, rule
//! [`Joint`](Rule::Joint) 60 more per query head and key. At 128k tokens and 32 heads of 128 that
//! is 1% (7%) of queries, keys, values and output in a 16-bit type.

// In kernels: there is no `is_multiple_of`, and compile-time conditions stay apart from runtime ones.
#![allow(clippy::manual_is_multiple_of, clippy::collapsible_if)]

mod attention;
mod band_mass;
mod call;
mod contribution;
mod decode;
mod filter;
mod flash;
mod flash_mma;
mod flash_plane;
mod fragments;
mod ladder;
pub mod layers;
mod mma_columns;
mod mma_rows;
mod mma_tile;
mod numbers;
mod op;
mod plan;
mod plane_columns;
mod plane_rows;
mod plane_stage;
mod plane_tile;
mod plane_values;
mod rounding;
mod sample;
mod select;
pub mod selftest;
mod square_tile;
mod tensor;
mod walk;

pub use attention::{
    Attention, Report, available_products, decode, dense_attention, planned_attention, sample_attention,
    sample_plan, time_stages,
};
pub use decode::MAX_DECODE_QUERIES;
pub use numbers::{from_bytes, to_bytes};
pub use op::{OpInputs, OpOutputs, run_op};
pub use plan::Plan;
pub use sample_attention_plan::{
    AttentionShape, Error, HostPlan, Rule, SampleAttentionOptions, Stage, StageTimes, TileProduct, reference,
};
pub use tensor::{TensorView, bf16_type, f32_type, half_type};
