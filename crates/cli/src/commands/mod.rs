//! One file a subcommand.

pub mod bench;
pub mod capture;
pub mod chat;
pub mod demo;
pub mod eval;
pub mod generate;
pub mod info;
pub mod inspect;
pub mod logits;
pub mod op;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub mod selftest;
pub mod tokenize;

use std::io::Read;
use std::path::Path;

use crate::error::Error;

fn read_file(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| Error::File { path: path.to_path_buf(), error })
}

fn write_file(path: &Path, content: impl AsRef<[u8]>) -> Result<(), Error> {
    std::fs::write(path, content).map_err(|error| Error::File { path: path.to_path_buf(), error })
}

fn read_stdin() -> Result<String, Error> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(Error::Input)?;
    Ok(text)
}

/// Writes to standard output at once. A closed pipe is an error like any other: the reader has left.
pub fn print(text: &str) -> Result<(), Error> {
    use std::io::Write;
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::Output(error.into()))?;
    print(&(text + "\n"))
}
