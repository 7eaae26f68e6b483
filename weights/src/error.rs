use std::fmt::Display;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// What is wrong with a checkpoint, in one line.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that cannot be read.
    #[error("{}: {error}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Content that does not fit.
    #[error("{}: {subject}: found {found}, expected {expected}", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// The field, tensor or part of the file.
        subject: String,
        /// What stands there.
        found: String,
        /// What would fit.
        expected: String,
    },
}

/// Result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(file: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let file = file.to_path_buf();
        move |error| Self::Io { file, error }
    }

    pub(crate) fn invalid(
        file: &Path,
        subject: impl Display,
        found: impl Display,
        expected: impl Display,
    ) -> Self {
        Self::Invalid {
            file: file.to_path_buf(),
            subject: one_line(&subject.to_string()),
            found: one_line(&found.to_string()),
            expected: expected.to_string(),
        }
    }

    pub(crate) fn tensor(file: &Path, name: &str, found: impl Display, expected: impl Display) -> Self {
        Self::invalid(file, format_args!("tensor `{name}`"), found, expected)
    }
}

/// Text from a file, fit for a message: no line breaks, no escape sequences, not endless.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    if line.len() < text.len() && text.chars().count() > 200 {
        line.push('…');
    }
    line
}
