use std::path::Path;
use std::process::ExitCode;

use burn::tensor::TensorData;
use long_context_runtime::Device;
use sample_attention::SampleAttentionOptions;
use serde_json::Value;

use super::read_file;
use crate::args::OpArgs;
use crate::error::Error;
use crate::tensors::{self, content, read_inputs};

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
    let density = found.density.iter().sum::<f32>() / count as f32;
    let [bands, stripes] = [found.bands.len() / count, found.stripes.len() / count];
    let outputs = [
        ("out", TensorData::new(found.out, sized(&[shape.q_len, shape.head_dim]))),
        ("lse", TensorData::new(found.lse, sized(&[shape.q_len]))),
        ("bands", TensorData::new(found.bands, sized(&[bands]))),
        ("stripes", TensorData::new(found.stripes, sized(&[stripes]))),
        ("stripe_count", TensorData::new(found.stripe_count, sized(&[]))),
        ("density", TensorData::new(found.density, sized(&[]))),
        ("recall", TensorData::new(found.recall, sized(&[]))),
    ];
    tensors::write(&args.out, &outputs)?;
    eprintln!("{} · {} · density {density:.3} · {}", device.backend, device.name, args.out.display());
    Ok(ExitCode::SUCCESS)
}

fn read_options(path: &Path) -> Result<SampleAttentionOptions, Error> {
    let mut json: Value = serde_json::from_str(&read_file(path)?).map_err(|error| content(path, error))?;
    let options = json.get_mut("config").map(Value::take).unwrap_or(json);
    serde_json::from_value(options).map_err(|error| content(path, error))
}
