//! What can go wrong.

use thiserror::Error;

/// Why a call was refused. Attention calls launch nothing when they return one of these.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum Error {
    /// An option holds a value outside its range.
    #[error("option `{field}` is {found}, expected {expected}")]
    Option {
        /// The field of [`SampleAttentionOptions`](crate::SampleAttentionOptions).
        field: &'static str,
        /// The value found.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// A tensor does not have the shape, the strides or the type that the others ask for.
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
    /// The device cannot do what the call needs.
    #[error("the device does not support {0}")]
    Unsupported(String),
    /// The device failed while it ran or was read.
    #[error("the device failed: {0}")]
    Device(String),
    /// The file of a test case cannot be used.
    #[error("case `{case}`: {reason}")]
    Case {
        /// The case's name.
        case: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// [`Error::Device`] from what a runtime reports.
    pub fn device(error: impl core::fmt::Debug) -> Self {
        Self::Device(format!("{error:?}"))
    }

    /// [`Error::Option`] from values.
    pub fn option(field: &'static str, found: impl ToString, expected: impl ToString) -> Self {
        Self::Option { field, found: found.to_string(), expected: expected.to_string() }
    }

    /// [`Error::Tensor`] from values.
    pub fn tensor(
        tensor: &'static str,
        what: &'static str,
        found: impl ToString,
        expected: impl ToString,
    ) -> Self {
        Self::Tensor { tensor, what, found: found.to_string(), expected: expected.to_string() }
    }
}
