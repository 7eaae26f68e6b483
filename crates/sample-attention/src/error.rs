use std::fmt::Debug;

use thiserror::Error;

/// What a call refuses, in one line.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// An option, or a size that does not fit another.
    #[error(transparent)]
    Input(#[from] sample_attention_kernels::Error),
    /// A tensor unlike q.
    #[error("tensor `{tensor}`: {what} is {found}, expected {expected}")]
    Tensor {
        /// The argument's name.
        tensor: &'static str,
        /// The property that does not fit.
        what: &'static str,
        /// The value found.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// A field of [`SampleAttentionConfig`](crate::SampleAttentionConfig) that does not fit the others.
    #[error("{field}: found {found}, expected {expected}")]
    Config {
        /// The field.
        field: &'static str,
        /// The value found.
        found: usize,
        /// What would have been accepted.
        expected: String,
    },
    /// A device that fails to hand over results.
    #[error("device: {0}")]
    Device(String),
    /// A name that is no preset's.
    #[error("preset: found `{0}`, expected dense, default, paper, fast or joint")]
    Preset(String),
}

impl Error {
    pub(crate) fn tensor(
        tensor: &'static str,
        what: &'static str,
        found: impl Debug,
        expected: impl Debug,
    ) -> Self {
        Self::Tensor { tensor, what, found: format!("{found:?}"), expected: format!("{expected:?}") }
    }
}
