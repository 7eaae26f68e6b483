//! Everything that can end the program, one line each.

use std::path::PathBuf;

use long_context::generate::GenerateError;
use long_context::sampler::SamplerError;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum Error {
    #[error(transparent)]
    Checkpoint(#[from] long_context_weights::Error),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error("--{}", .0.to_string().replacen('_', "-", 1))]
    Sampler(#[from] SamplerError),
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: std::io::Error },
    #[error("standard input: {0}")]
    Input(std::io::Error),
    #[error("standard output: {0}")]
    Output(std::io::Error),
    #[error("prompt: found nothing, expected text as an argument, in --file or on standard input")]
    NoPrompt,
    #[error("--ids: found '{found}', expected token ids separated by commas or a file that holds them")]
    Ids { found: String },
    #[error(
        "prompt: found {prompt} tokens and {generate} to generate, expected at most {range} in all (the model's \
         range); --stretch-rope stretches it"
    )]
    TooLong { prompt: usize, generate: usize, range: usize },
    #[error(
        "--context: found {found} tokens, expected at most {range} (the model's range); --stretch-rope stretches it"
    )]
    ContextTooLong { found: usize, range: usize },
    #[error("--tokens: found {found}, expected {least} to {most} (the bundled text under this tokenizer)")]
    DemoTokens { found: usize, least: usize, most: usize },
    #[error(transparent)]
    Eval(#[from] long_context_eval::Error),
    #[error("{flag}: found {found}, expected {expected}")]
    Flag { flag: &'static str, found: String, expected: String },
    #[error(transparent)]
    Device(#[from] long_context_runtime::Error),
    #[error("{}: {found}", path.display())]
    Content { path: PathBuf, found: String },
    #[error("{flag}: found {found}, expected {expected}")]
    Argument { flag: &'static str, found: String, expected: String },
    #[error("model: found neither a folder nor --shape, expected one of them")]
    NoModel,
    #[error("--shape: found '{found}', expected {}", long_context::models::ModelConfig::SHAPES.join(", "))]
    Shape { found: String },
    #[error("bench: nothing could be measured")]
    NothingMeasured,
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    #[error("selftest: some checks failed")]
    Selftest,
}

impl Error {
    /// 2 for bad input, 1 for a failing device or stream.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Generate(GenerateError::Device(_)) | Self::Output(_) | Self::NothingMeasured => 1,
            Self::Eval(long_context_eval::Error::Generate(GenerateError::Device(_))) => 1,
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Self::Selftest => 1,
            Self::Device(long_context_runtime::Error::Failed(_)) => 1,
            _ => 2,
        }
    }
}
