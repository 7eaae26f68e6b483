use thiserror::Error;

/// What a call refuses, in one line.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// An option out of range, or a tensor that does not fit the others.
    #[error(transparent)]
    Input(#[from] sample_attention_plan::Error),
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
    #[error("preset: found `{0}`, expected dense, default, paper, fast, joint or contribution")]
    Preset(String),
}
