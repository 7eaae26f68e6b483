use std::fmt::Display;
use std::path::{Path, PathBuf};

use long_context::generate::GenerateError;
use thiserror::Error;

/// What ends an evaluation.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The model, or its device.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The tokenizer, or the chat format.
    #[error(transparent)]
    Checkpoint(#[from] long_context_weights::Error),
    /// A file that cannot be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Content or a setting that does not fit.
    #[error("{subject}: found {found}, expected {expected}")]
    Invalid {
        /// The setting, or the file and its part.
        subject: String,
        /// What was given.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// A picture that cannot be encoded.
    #[error("picture: {0}")]
    Picture(#[from] png::EncodingError),
}

impl Error {
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::File { path, error }
    }

    pub(crate) fn invalid(subject: impl Display, found: impl Display, expected: impl Display) -> Self {
        Self::Invalid {
            subject: subject.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// Result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
