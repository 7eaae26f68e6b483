//! torch and transformers beside us, through a Python script that answers like a worker.

use std::path::Path;
use std::process::{Command, Stdio};

use burn::tensor::{DType, TensorData};
use long_context::models::ModelConfig;
use long_context_runtime::structured::{CHANNELS, Noise, Structure};
use serde::Serialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::job::{Job, OpJob, OpSource};
use crate::error::Error;
use crate::tensors;

const SCRIPT: &str = include_str!("../../peers/torch_peers.py");

/// The script on disk, and what it reads beside it.
pub struct Peers {
    folder: TempDir,
    noise: Option<(usize, u64, Noise)>,
}

impl Peers {
    pub fn new() -> Result<Self, Error> {
        let folder = tempfile::tempdir().map_err(Error::Output)?;
        let script = folder.path().join("torch_peers.py");
        std::fs::write(&script, SCRIPT).map_err(|error| Error::File { path: script, error })?;
        Ok(Self { folder, noise: None })
    }

    /// The process to start. What Python libraries say on standard error is not for the reader of a table.
    pub fn command(&self, python: &Path) -> Command {
        let mut command = Command::new(python);
        command.arg(self.folder.path().join("torch_peers.py")).stderr(Stdio::null());
        command
    }

    /// The job as the script takes it, in the type that our own rows of it were computed in, with the tensors that
    /// they attended in a file.
    pub fn job(&mut self, job: &Job, dtype: &str) -> Result<String, Error> {
        let mut asked = serde_json::to_value(job).map_err(|error| Error::Output(error.into()))?;
        asked["dtype"] = dtype.into();
        match job {
            Job::Op(job) => asked["tensors"] = self.tensors(job, dtype)?,
            Job::Model(job) => {
                asked["dimensions"] = json!(Dimensions::of(&job.model.config()?));
                // Random tokens cost the same.
                asked["ids"] = Value::Null;
            }
        }
        Ok(asked.to_string())
    }

    fn tensors(&mut self, job: &OpJob, dtype: &str) -> Result<Value, Error> {
        let (densities, diffuse, seed) = match &job.inputs {
            OpSource::Captured { file } => return Ok(json!({ "captured": file })),
            OpSource::Structured { densities, diffuse, seed } => (densities, *diffuse, *seed),
        };
        let OpJob { length, heads, kv_heads, head_dim, .. } = *job;
        let share = densities.first().map_or(0.1, |density| density.share.unwrap_or(density.target));
        let structure = Structure { length, heads, kv_heads, head_dim, diffuse, share, seed };
        let held = self
            .noise
            .take()
            .filter(|(dim, of, noise)| (*dim, *of) == (head_dim, seed) && noise.length() >= job.longest);
        let noise = held.unwrap_or_else(|| (head_dim, seed, Noise::new(job.longest, head_dim, seed)));
        let noise = &self.noise.insert(noise).2;
        let overlay = structure.overlay();
        let stored = match dtype {
            "f16" => DType::F16,
            "bf16" => DType::BF16,
            _ => DType::F32,
        };
        let store =
            |values: Vec<f32>, shape: Vec<usize>| TensorData::new(values, shape).convert_dtype(stored);
        let [q, k, v] = structure.noise(noise).map(|values| store(values.to_vec(), vec![length, head_dim]));
        let file = self.folder.path().join("structured.safetensors");
        tensors::write(
            &file,
            &[
                ("q", q),
                ("k", k),
                ("v", v),
                ("look", store(overlay.look, vec![heads, CHANNELS])),
                ("near", store(overlay.near, vec![heads])),
                ("pull", store(overlay.pull, vec![kv_heads, length, CHANNELS])),
                ("local", store(structure.local(), vec![length, head_dim / 4])),
            ],
        )?;
        Ok(json!({ "structured": file }))
    }
}

/// What a model of the Llama family needs to have the same matrix products.
#[derive(Serialize)]
struct Dimensions {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    attention_bias: bool,
}

impl Dimensions {
    fn of(config: &ModelConfig) -> Self {
        match config {
            ModelConfig::ChatGlm(config) => Self {
                hidden_size: config.hidden_size,
                intermediate_size: config.ffn_hidden_size,
                num_hidden_layers: config.num_layers,
                num_attention_heads: config.num_attention_heads,
                num_key_value_heads: config.num_kv_heads,
                head_dim: config.head_dim,
                vocab_size: config.padded_vocab_size,
                attention_bias: config.add_qkv_bias,
            },
            ModelConfig::InternLm2(config) => Self {
                hidden_size: config.hidden_size,
                intermediate_size: config.intermediate_size,
                num_hidden_layers: config.num_layers,
                num_attention_heads: config.num_attention_heads,
                num_key_value_heads: config.num_kv_heads,
                head_dim: config.head_dim(),
                vocab_size: config.vocab_size,
                attention_bias: config.bias,
            },
        }
    }
}
