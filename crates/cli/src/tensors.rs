//! q, k and v from and to safetensors files.

use std::path::Path;

use burn::tensor::{DType, TensorData};
use long_context_runtime::OpInputs;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::error::Error;

/// An error in the content of a file.
pub fn content(path: &Path, found: impl std::fmt::Display) -> Error {
    Error::Content { path: path.to_path_buf(), found: found.to_string() }
}

/// Reads q, k and v in f32, f16 or bf16.
pub fn read_inputs(path: &Path) -> Result<OpInputs, Error> {
    let bytes = std::fs::read(path).map_err(|error| Error::File { path: path.to_path_buf(), error })?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| content(path, error))?;
    let read = |name: &str| {
        let tensor =
            tensors.tensor(name).map_err(|_| content(path, format!("tensor `{name}`: found none")))?;
        let wrong = |found: String, expected: &str| {
            Err(content(path, format!("tensor `{name}`: found {found}, expected {expected}")))
        };
        let Ok(shape) = <[usize; 4]>::try_from(tensor.shape()) else {
            return wrong(format!("shape {:?}", tensor.shape()), "four dimensions");
        };
        let dtype = match tensor.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return wrong(format!("{other:?}"), "F32, F16 or BF16"),
        };
        let data = TensorData::from_bytes_vec(tensor.data().to_vec(), shape, dtype);
        Ok((data.iter::<f32>().collect(), shape))
    };
    Ok(OpInputs { q: read("q")?, k: read("k")?, v: read("v")? })
}

/// Writes tensors in their own types.
pub fn write(path: &Path, tensors: &[(&str, TensorData)]) -> Result<(), Error> {
    let dtype = |data: &TensorData| match data.dtype {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::U8 => Dtype::U8,
        _ => Dtype::F32,
    };
    let refuse = |error: safetensors::SafeTensorError| content(path, error);
    let views = tensors
        .iter()
        .map(|(name, data)| Ok((*name, TensorView::new(dtype(data), data.shape.to_vec(), data.as_bytes())?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(refuse)?;
    safetensors::serialize_to_file(views, None, path).map_err(refuse)
}
