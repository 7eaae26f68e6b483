//! The arguments of `sattn bench` and `sattn capture`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use long_context::models::ModelConfig;

use super::job::{Limits, PresetSpec};
use crate::args::{BackendName, DtypeName, ModelArgs, positive};

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Time attention alone: dense against SampleAttention, stage by stage, backend by backend
    Op(OpBenchArgs),
    /// Time a model: to the first token, part by part, and token by token after it
    Model(ModelBenchArgs),
    /// Answer jobs on standard input, as the other two ask their child processes
    #[command(hide = true)]
    Worker,
}

#[derive(Debug, Args)]
pub struct OpBenchArgs {
    /// Tokens, one or several [default: 8192,32768; of a file all]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', value_parser = positive)]
    pub length: Vec<usize>,
    /// Query heads
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "32", value_parser = positive)]
    pub heads: Vec<usize>,
    /// Key/value heads
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "32", value_parser = positive)]
    pub kv_heads: Vec<usize>,
    /// Width of a head
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "128", value_parser = positive)]
    pub head_dim: Vec<usize>,
    /// Densities that inputs are made for, with the first preset
    #[arg(long, value_name = "SHARE", value_delimiter = ',', default_value = "0.25", value_parser = share)]
    pub density: Vec<f64>,
    /// Query heads that attend to everything alike [default: one in 32]
    #[arg(long, value_name = "N")]
    pub diffuse: Option<usize>,
    /// Seed of the inputs
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Use the tensors of a file that sattn capture wrote, or the first tokens of them
    #[arg(long, value_name = "FILE", conflicts_with_all = ["heads", "kv_heads", "head_dim", "density", "diffuse", "seed"])]
    pub captured: Option<PathBuf>,
    #[command(flatten)]
    pub common: CommonArgs,
    /// Seconds of each kind of attention after which no further round begins
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub seconds: f64,
    /// Rounds of each kind of attention at most, interleaved
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive)]
    pub rounds: usize,
}

#[derive(Debug, Args)]
pub struct ModelBenchArgs {
    /// Checkpoint folder
    #[arg(conflicts_with = "shape", required_unless_present = "shape")]
    pub dir: Option<PathBuf>,
    /// A published model's dimensions with random weights in place of a checkpoint
    #[arg(long, value_name = "NAME", value_parser = ModelConfig::SHAPES)]
    pub shape: Option<String>,
    /// Tokens of the prompt, one or several
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "8192", value_parser = positive)]
    pub length: Vec<usize>,
    /// Text of the prompt, repeated to its length [default: random tokens]
    #[arg(long, value_name = "FILE", conflicts_with = "shape")]
    pub file: Option<PathBuf>,
    /// Let layers attend with structured queries and keys of this density, met with the first preset
    /// [default: 0.1 with --shape, else the model's own]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub density: Option<f64>,
    /// Seed of random tokens and structured inputs
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Tokens run at a time during prefill
    #[arg(long, value_name = "TOKENS", default_value_t = 8192, value_parser = positive)]
    pub chunk: usize,
    /// Tokens generated after the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 32, value_parser = positive)]
    pub decode: usize,
    #[command(flatten)]
    pub common: CommonArgs,
    /// Seconds of each kind of attention after which no further round begins
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub seconds: f64,
    /// Rounds of each kind of attention at most, interleaved
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    pub rounds: usize,
}

/// What both kinds of measurement share.
#[derive(Debug, Args)]
pub struct CommonArgs {
    /// Backends, one or several
    #[arg(short, long, value_enum, value_delimiter = ',', default_value = "auto")]
    pub backend: Vec<BackendName>,
    /// Types to compute in, one or several [default: bf16 on a GPU that has it, else f16; f32 on the CPU]
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    pub dtype: Vec<DtypeName>,
    /// Kinds of SampleAttention beside dense attention, with options such as default:window_ratio=0.03
    #[arg(long, value_name = "PRESET", value_delimiter = ',', default_value = "default")]
    pub preset: Vec<PresetSpec>,
    /// Leave dense attention out, which takes long over the longest texts
    #[arg(long)]
    pub no_dense: bool,
    /// Time torch beside (and transformers, for a model) where Python has them
    #[arg(long)]
    pub peers: bool,
    /// The Python to ask
    #[arg(long, value_name = "PATH", default_value = "python3")]
    pub python: PathBuf,
    /// Write everything as JSON, - for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// No progress bar
    #[arg(short, long)]
    pub quiet: bool,
}

impl OpBenchArgs {
    pub fn limits(&self) -> Limits {
        Limits { rounds: self.rounds, seconds: self.seconds }
    }
}

impl ModelBenchArgs {
    pub fn limits(&self) -> Limits {
        Limits { rounds: self.rounds, seconds: self.seconds }
    }
}

#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// Checkpoint folder
    pub dir: PathBuf,
    /// The layer whose attention is captured, from 0
    #[arg(long, value_name = "N")]
    pub layer: usize,
    /// The text
    #[arg(long, value_name = "FILE", required_unless_present = "ids")]
    pub file: Option<PathBuf>,
    /// Token ids in its place, separated by commas or white space, or a file that holds them
    #[arg(long, value_name = "IDS|FILE", conflicts_with = "file")]
    pub ids: Option<String>,
    /// Tokens of it at most [default: all]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub tokens: Option<usize>,
    /// Safetensors file to write: q [1, heads, n, D], k and v [1, kv heads, n, D]
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Type to store [default: the type that the model computes in]
    #[arg(long, value_enum, default_value = "auto")]
    pub store: DtypeName,
    #[command(flatten)]
    pub model: ModelArgs,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share < 1.0 => Ok(share),
        _ => Err("expected a number between 0 and 1".to_string()),
    }
}
