//! The model in `weights/embedded`, carried inside the program, so that the demo needs no download.

use tempfile::TempDir;

use crate::error::Error;

macro_rules! file {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../../../../weights/embedded/", $name)).as_slice())
    };
}

const FILES: [(&str, &[u8]); 3] =
    [file!("config.json"), file!("model.safetensors"), file!("tokenizer.model")];

/// Its checkpoint folder, which lasts as long as what is returned.
///
/// # Errors
///
/// A temporary folder that cannot be written.
pub fn unpack() -> Result<TempDir, Error> {
    let folder = tempfile::tempdir().map_err(|error| Error::File { path: std::env::temp_dir(), error })?;
    for (name, bytes) in FILES {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).map_err(|error| Error::File { path, error })?;
    }
    Ok(folder)
}
