//! The command line.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use burn::tensor::DType;
use clap::{Args, Parser, Subcommand, ValueEnum};
use long_context::cache::AttentionConfig;
use long_context_runtime::{BackendChoice, Device};
use sample_attention::{Preset, SampleAttentionOptions};
use serde::{Deserialize, Serialize};

use crate::bench::args::{BenchArgs, CaptureArgs};

pub use crate::commands::eval::args::EvalCommand;
pub use crate::commands::inspect::InspectArgs;

/// Long-context language models with SampleAttention.
#[derive(Debug, Parser)]
#[command(name = "sattn", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Find a pass key in a long text with dense attention and with SampleAttention, side by side; what sattn does
    /// without a command
    Demo(DemoArgs),
    /// Answer a prompt; the text goes to standard output, timings to standard error
    Generate(GenerateArgs),
    /// Talk with the model; /reset forgets the conversation, /stats shows timings, /quit ends
    Chat(ChatArgs),
    /// Show what a checkpoint holds and the memory that it needs
    Info(InfoArgs),
    /// Show the token ids of a text and what each stands for
    Tokenize(TokenizeArgs),
    /// Write the logits after every token, [n, vocab] in f32, to a safetensors file
    Logits(LogitsArgs),
    /// Measure what an attention costs in quality: hidden keys, perplexity, LongBench, rules side by side
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Show what an attention kept of a prompt, head by head, as a page
    Inspect(InspectArgs),
    /// Run SampleAttention on the tensors q, k and v of a file
    Op(OpArgs),
    /// Time attention or a model, kind against kind, backend against backend
    Bench(BenchArgs),
    /// Write the q, k and v that a layer attends on a text, for sattn op and sattn bench op
    Capture(CaptureArgs),
    /// Check the kernels on this machine's device against float64, case by case
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    Selftest(SelftestArgs),
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Checkpoint folder: config.json, weights, tokenizer [default: the embedded model]
    pub dir: Option<PathBuf>,
    /// Tokens of the prompt [default: 16384, or the model's range]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub tokens: Option<usize>,
    /// Where the pass key stands in the text: 0 is the beginning, 1 the end
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, value_parser = share)]
    pub depth: f64,
    /// Attention to compare with dense: default, paper, fast, joint or contribution
    #[arg(long, value_name = "PRESET", default_value = "default")]
    pub attention: Preset,
    /// Backend; auto takes CUDA, then a GPU through Vulkan or WebGPU, then the CPU, and says which
    #[arg(short, long, value_enum, default_value = "auto")]
    pub backend: BackendName,
    /// Settles the pass key
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Checkpoint folder: config.json, weights, tokenizer
    pub dir: PathBuf,
    /// The prompt; read from standard input where neither this nor --file is given
    #[arg(conflicts_with = "file")]
    pub prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Continue the prompt as it stands instead of asking it as a chat message
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// Print one JSON object with the text and the timings instead of streaming the text
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    /// Checkpoint folder: config.json, weights, tokenizer
    pub dir: PathBuf,
    /// Tokens to hold of the conversation [default: the model's range, up to 8192]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub context: Option<usize>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Checkpoint folder
    pub dir: PathBuf,
    /// Length to compute the memory for [default: the model's range]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub tokens: Option<usize>,
    /// Tokens run at a time during prefill
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = positive)]
    pub chunk: usize,
    /// What the config's rope_ratio does, where detection is wrong
    #[arg(long, value_enum, default_value = "auto")]
    pub rope_ratio: RopeRatioMeaning,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// Checkpoint folder, or one with tokenizer files alone
    pub dir: PathBuf,
    /// The text, or - for standard input
    pub text: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// Checkpoint folder
    pub dir: PathBuf,
    /// Token ids, separated by commas or white space, or a file that holds them
    #[arg(long, value_name = "IDS|FILE")]
    pub ids: String,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Args)]
pub struct OpArgs {
    /// Safetensors file with q [batch, heads, Sq, D], k and v [batch, kv heads, Sk, D], in f32, f16 or bf16
    pub input: PathBuf,
    /// JSON file with the options (alpha, row_ratio, window_ratio, coverage, ...), or an object that holds
    /// them under "config" [default: the default preset]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Safetensors file to write: out, lse, bands, stripes, stripe_count, density, recall
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Backend
    #[arg(short, long, value_enum, default_value = "auto")]
    pub backend: BackendName,
    /// Type to compute in
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DtypeName,
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// Backend
    #[arg(short, long, value_enum, default_value = "auto")]
    pub backend: BackendName,
    /// Folders of golden cases (golden.json and golden.safetensors) to run besides the random problems
    #[arg(long, value_name = "DIR")]
    pub golden: Vec<PathBuf>,
    /// Type to check; auto checks all of them
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: DtypeName,
    /// Seed of the random problems [default: the time]
    #[arg(long)]
    pub seed: Option<u64>,
}

/// How tokens are drawn and when to stop.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Tokens to generate at most
    #[arg(short = 'n', long, default_value_t = 512, value_name = "TOKENS", value_parser = positive)]
    pub max_tokens: usize,
    /// 0 takes the most likely token each time
    #[arg(short, long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw among the k most likely tokens; 0 is all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Draw among the fewest tokens that reach this probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f32,
    /// Draw among tokens at least this likely relative to the likeliest
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub min_p: f32,
    /// Make tokens that have occurred less likely; 1 is off
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub repetition_penalty: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop before this text appears (repeatable)
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
}

/// Where and how the model runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Backend; auto takes CUDA, then a GPU through Vulkan or WebGPU, then the CPU, and says which
    #[arg(short, long, value_enum, default_value = "auto")]
    pub backend: BackendName,
    /// Type to compute in [default: bf16 on a GPU that has it, else f16; f32 on the CPU]
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: DtypeName,
    /// Attention of the prefill: dense, default, paper, fast, joint or contribution
    #[arg(long, value_name = "PRESET", default_value = "dense")]
    pub attention: Preset,
    /// Attention of some layers, such as 0-2=dense or 7=paper (repeatable)
    #[arg(long, value_name = "LAYERS=PRESET", value_parser = layers)]
    pub layer_attention: Vec<(RangeInclusive<usize>, Preset)>,
    /// Contexts up to this length are attended densely, whatever the preset [default: where SampleAttention
    /// begins to pay: 4608 on CUDA, 3584 on Vulkan and WebGPU, 1024 on the CPU]
    #[arg(long, value_name = "TOKENS")]
    pub dense_below: Option<usize>,
    /// Show what the plans of SampleAttention kept, layer by layer
    #[arg(long)]
    pub report: bool,
    /// Tokens run at a time during prefill: bounds the memory of activations
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = positive)]
    pub chunk: usize,
    /// Stretch the rotary embedding where the text is longer than the model's range
    #[arg(long)]
    pub stretch_rope: bool,
    /// What the config's rope_ratio does, where detection is wrong
    #[arg(long, value_enum, default_value = "auto")]
    pub rope_ratio: RopeRatioMeaning,
    /// No progress bars
    #[arg(short, long)]
    pub quiet: bool,
}

impl ModelArgs {
    /// The attention that the flags describe, on a device.
    pub fn attention_config(&self, device: &Device) -> AttentionConfig {
        let dense_below = self.dense_below.unwrap_or(device.dense_below());
        let options = |preset: Preset| match preset {
            Preset::Dense => preset.options(),
            _ => SampleAttentionOptions { dense_below, ..preset.options() },
        };
        let named = self.layer_attention.iter().flat_map(|(layers, preset)| {
            let options = options(*preset);
            layers.clone().map(move |layer| (layer, options))
        });
        AttentionConfig { options: options(self.attention), layers: named.collect(), report: self.report }
    }
}

/// `3=paper` or `0-7=dense`.
fn layers(text: &str) -> Result<(RangeInclusive<usize>, Preset), String> {
    let parsed = text
        .split_once('=')
        .and_then(|(layers, preset)| Some((layer_range(layers).ok()?, preset.parse().ok()?)));
    parsed.ok_or_else(|| "expected layers and a preset, such as 0-2=dense or 7=paper".to_string())
}

/// `3` or `0-7`.
pub fn layer_range(text: &str) -> Result<RangeInclusive<usize>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last && last < MOST_LAYERS => Ok(first..=last),
        _ => Err("expected layers, such as 4 or 0-7".to_string()),
    }
}

const MOST_LAYERS: usize = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendName {
    Auto,
    /// NVIDIA, through CUDA
    Cuda,
    /// Any Vulkan adapter, kernels compiled to SPIR-V
    Vulkan,
    /// Any WebGPU adapter, kernels compiled to WGSL
    Wgpu,
    Cpu,
}

impl From<BackendName> for BackendChoice {
    fn from(name: BackendName) -> Self {
        match name {
            BackendName::Auto => Self::Auto,
            BackendName::Cuda => Self::Cuda,
            BackendName::Vulkan => Self::Vulkan,
            BackendName::Wgpu => Self::Wgpu,
            BackendName::Cpu => Self::Cpu,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeName {
    Auto,
    F32,
    F16,
    Bf16,
}

impl fmt::Display for BackendName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        value_name(self, formatter)
    }
}

impl fmt::Display for DtypeName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        value_name(self, formatter)
    }
}

/// As the command line takes it.
fn value_name(value: &impl ValueEnum, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
    value.to_possible_value().map_or(Ok(()), |value| formatter.pad(value.get_name()))
}

impl From<DtypeName> for Option<DType> {
    fn from(name: DtypeName) -> Self {
        match name {
            DtypeName::Auto => None,
            DtypeName::F32 => Some(DType::F32),
            DtypeName::F16 => Some(DType::F16),
            DtypeName::Bf16 => Some(DType::BF16),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RopeRatioMeaning {
    /// As the config's other keys tell
    Auto,
    /// It multiplies the base of the frequencies (ChatGLM3-32k, -128k, GLM-4)
    Base,
    /// It divides the positions (ChatGLM2-6B-32k)
    Position,
}

pub fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a number from 0 to 1".to_string())
}

pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".to_string()),
        Ok(number) => Ok(number),
        Err(_) => Err("expected a whole number, at least 1".to_string()),
    }
}
