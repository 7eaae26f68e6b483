//! What a child process is asked to measure.

use std::path::PathBuf;

use sample_attention::{Preset, SampleAttentionOptions};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::row::{ModelRow, OpRow, Row};
use super::seconds::Seconds;
use crate::args::{BackendName, DtypeName};

/// One shape or length on one backend, with all kinds of attention that are compared there.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Job {
    Op(OpJob),
    Model(ModelJob),
}

/// Attention alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OpJob {
    pub backend: BackendName,
    pub dtype: DtypeName,
    pub length: usize,
    /// The longest of the run: noise is drawn once.
    pub longest: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub inputs: OpSource,
    pub variants: Vec<Variant>,
    pub limits: Limits,
}

/// Where q, k and v come from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OpSource {
    /// Made, once for each density.
    Structured { densities: Vec<Density>, diffuse: usize, seed: u64 },
    /// Read from a file.
    Captured { file: PathBuf },
}

/// A density that inputs are made for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Density {
    pub target: f64,
    /// The share of keys that stand out, where it is known already.
    pub share: Option<f64>,
}

/// A kind of attention.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Variant {
    pub name: String,
    pub options: SampleAttentionOptions,
    /// Which of the inputs.
    pub set: usize,
    /// One query in place of all.
    pub decode: bool,
}

/// How long to measure.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Limits {
    /// Rounds of each kind of attention at most, interleaved.
    pub rounds: usize,
    /// Seconds of each kind of attention after which no further round begins.
    pub seconds: f64,
}

/// A model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelJob {
    pub backend: BackendName,
    pub dtype: DtypeName,
    pub model: ModelSource,
    pub length: usize,
    pub longest: usize,
    pub chunk: usize,
    /// Tokens generated after the prompt.
    pub decode: usize,
    /// The prompt, at least `length` tokens.
    pub ids: Vec<u32>,
    /// Structured queries and keys in place of the model's own.
    pub density: Option<Density>,
    pub seed: u64,
    pub variants: Vec<Variant>,
    pub limits: Limits,
}

/// Which model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelSource {
    /// Random weights.
    Shape(String),
    Checkpoint(PathBuf),
}

/// What a child process says, one line each.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Message {
    /// It is there, and listens.
    Ready,
    /// A variant that it begins with, by its index.
    At(usize),
    /// What it is about.
    Doing(String),
    Done(Answer),
    /// Why the job came to nothing; where known, at which variant.
    Failed {
        reason: String,
        variant: Option<usize>,
    },
}

/// A finished job.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Answer {
    pub rows: Vec<Row>,
    pub seconds: Seconds,
    /// For each density the share of keys that stand out.
    pub shares: Vec<f64>,
    /// What did not fit into a row.
    pub notes: Vec<String>,
}

impl Job {
    pub fn backend(&self) -> BackendName {
        match self {
            Self::Op(job) => job.backend,
            Self::Model(job) => job.backend,
        }
    }

    pub fn variants(&mut self) -> &mut Vec<Variant> {
        match self {
            Self::Op(job) => &mut job.variants,
            Self::Model(job) => &mut job.variants,
        }
    }

    /// A few words for the progress bar.
    pub fn name(&self) -> String {
        match self {
            Self::Op(job) => format!("{} tokens, {}/{} heads", job.length, job.heads, job.kv_heads),
            Self::Model(job) => format!("{} tokens", job.length),
        }
    }

    /// The row of a variant that came to nothing.
    pub fn failed_row(&self, variant: &Variant, reason: &str) -> Row {
        let failed = Some(reason.to_string());
        match self {
            Self::Op(job) => Row::Op(OpRow { failed, ..job.row(variant) }),
            Self::Model(job) => Row::Model(ModelRow { failed, ..job.row(variant) }),
        }
    }

    /// Fills in what an earlier job found out.
    pub fn set_shares(&mut self, known: &[f64]) {
        let densities: &mut [Density] = match self {
            Self::Op(OpJob { inputs: OpSource::Structured { densities, .. }, .. }) => densities,
            Self::Model(ModelJob { density: Some(density), .. }) => std::slice::from_mut(density),
            _ => &mut [],
        };
        for (density, share) in densities.iter_mut().zip(known) {
            density.share = Some(*share);
        }
    }
}

impl OpJob {
    /// A row without numbers.
    pub fn row(&self, variant: &Variant) -> OpRow {
        let (inputs, target_density) = match &self.inputs {
            OpSource::Structured { densities, .. } => {
                ("structured".to_string(), densities.get(variant.set).map(|density| density.target))
            }
            OpSource::Captured { file } => (file.display().to_string(), None),
        };
        OpRow {
            backend: self.backend.to_string(),
            dtype: self.dtype.to_string(),
            attention: variant.name.clone(),
            inputs,
            target_density: target_density.filter(|_| !variant.decode && !variant.is_dense()),
            length: self.length,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            ..OpRow::default()
        }
    }
}

impl ModelJob {
    /// A row without numbers.
    pub fn row(&self, variant: &Variant) -> ModelRow {
        ModelRow {
            backend: self.backend.to_string(),
            dtype: self.dtype.to_string(),
            model: self.model.name(),
            attention: variant.name.clone(),
            target_density: self.density.map(|density| density.target).filter(|_| !variant.is_dense()),
            length: self.length,
            chunk: Some(self.chunk),
            ..ModelRow::default()
        }
    }
}

impl ModelSource {
    pub fn name(&self) -> String {
        match self {
            Self::Shape(name) => format!("{name}, random weights"),
            Self::Checkpoint(folder) => folder.display().to_string(),
        }
    }
}

impl Variant {
    /// All keys, on the first inputs.
    pub fn dense() -> Self {
        Self { name: "dense".to_string(), options: Preset::Dense.options(), set: 0, decode: false }
    }

    /// One query on the first inputs.
    pub fn decode() -> Self {
        Self { name: "decode".to_string(), decode: true, ..Self::dense() }
    }

    pub fn is_dense(&self) -> bool {
        self.options == Preset::Dense.options()
    }
}

/// A preset by name, with options of its own after colons: `default:window_ratio=0.03:max_rows=2048`.
#[derive(Debug, Clone, PartialEq)]
pub struct PresetSpec {
    pub name: String,
    pub options: SampleAttentionOptions,
}

impl std::str::FromStr for PresetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(':');
        let preset: Preset = words
            .next()
            .unwrap_or_default()
            .parse()
            .map_err(|error: sample_attention::Error| error.to_string())?;
        let mut options = serde_json::to_value(preset.options()).map_err(|error| error.to_string())?;
        for word in words {
            let (field, value) = word.split_once('=').ok_or_else(|| {
                format!("found `{word}`, expected an option as in default:window_ratio=0.03")
            })?;
            // A word that is no JSON, such as joint, is text.
            options[field] = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        }
        let options: SampleAttentionOptions =
            serde_json::from_value(options).map_err(|error| error.to_string())?;
        options.validate().map_err(|error| error.to_string())?;
        Ok(Self { name: text.to_string(), options })
    }
}
