use std::path::Path;
use std::process::ExitCode;

use long_context_runtime::{Device, OpInputs};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sample_attention::SampleAttentionOptions;
use serde_json::Value;

use super::read_file;
use crate::args::OpArgs;
use crate::error::Error;

pub fn run(args: OpArgs) -> Result<ExitCode, Error> {
    let options = match &args.config {
        None => SampleAttentionOptions::default(),
        Some(path) => read_options(path)?,
    };
    let inputs = read_inputs(&args.input)?;
    let device = Device::find(args.backend.into(), args.dtype.into())?;
    let found = device.run_op(inputs, &options)?;

    let shape = found.shape;
    let heads = [shape.batch, shape.q_heads];
    let sized = |last: &[usize]| [&heads[..], last].concat();
    let count = shape.heads();
    let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let integers = |values: &[i32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let tensors = [
        ("out", Dtype::F32, sized(&[shape.q_len, shape.head_dim]), floats(&found.out)),
        ("lse", Dtype::F32, sized(&[shape.q_len]), floats(&found.lse)),
        ("bands", Dtype::U8, sized(&[found.bands.len() / count]), found.bands),
        ("stripes", Dtype::I32, sized(&[found.stripes.len() / count]), integers(&found.stripes)),
        ("stripe_count", Dtype::I32, sized(&[]), integers(&found.stripe_count)),
        ("density", Dtype::F32, sized(&[]), floats(&found.density)),
        ("recall", Dtype::F32, sized(&[]), floats(&found.recall)),
    ];
    let refuse = |error: safetensors::SafeTensorError| content(&args.out, error);
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((*name, TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(refuse)?;
    let bytes = safetensors::serialize(views, None).map_err(refuse)?;
    std::fs::write(&args.out, bytes).map_err(|error| Error::File { path: args.out.clone(), error })?;
    let density = found.density.iter().sum::<f32>() / count as f32;
    eprintln!("{} · {} · density {density:.3} · {}", device.backend, device.name, args.out.display());
    Ok(ExitCode::SUCCESS)
}

fn content(path: &Path, found: impl std::fmt::Display) -> Error {
    Error::Content { path: path.to_path_buf(), found: found.to_string() }
}

fn read_options(path: &Path) -> Result<SampleAttentionOptions, Error> {
    let mut json: Value = serde_json::from_str(&read_file(path)?).map_err(|error| content(path, error))?;
    let options = json.get_mut("config").map(Value::take).unwrap_or(json);
    serde_json::from_value(options).map_err(|error| content(path, error))
}

fn read_inputs(path: &Path) -> Result<OpInputs, Error> {
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
        if tensor.dtype() != Dtype::F32 {
            return wrong(format!("{:?}", tensor.dtype()), "F32");
        }
        let words = tensor.data().chunks_exact(4);
        Ok((words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect(), shape))
    };
    Ok(OpInputs { q: read("q")?, k: read("k")?, v: read("v")? })
}
