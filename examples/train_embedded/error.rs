//! Everything that can end the program, one line each.

use std::path::{Path, PathBuf};

use thiserror::Error;

#[derive(Debug, Error)]
pub enum Error {
    #[error("{}: {error}", file.display())]
    File { file: PathBuf, error: std::io::Error },
    #[error("{file}: {found}")]
    Content { file: String, found: String },
    #[error(transparent)]
    Checkpoint(#[from] long_context_weights::Error),
    #[error("loss: found {loss} at step {step}, expected a number (a lower learning rate may help)")]
    Diverged { loss: f32, step: usize },
    #[error("device: {0}")]
    Device(String),
}

impl Error {
    pub fn file(file: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let file = file.to_path_buf();
        move |error| Self::File { file, error }
    }

    /// The text of a file.
    pub fn read(file: &Path) -> Result<String, Self> {
        std::fs::read_to_string(file).map_err(Self::file(file))
    }

    /// 2 for bad input, 1 for a failing device or a training that diverged.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Diverged { .. } | Self::Device(_) => 1,
            _ => 2,
        }
    }
}
