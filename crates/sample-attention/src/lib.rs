//! Prefill attention for long contexts as a Burn function.

mod dense;

pub use dense::{SCORE_BYTES, dense_attention};
