use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use long_context_eval::NamedAttention;
use long_context_eval::needle::Variant;
use sample_attention::Preset;

use crate::args::{BackendName, DtypeName, ModelArgs, RopeRatioMeaning, positive};

#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Hide keys in a text, over lengths and depths, and count those that are found
    Needle(NeedleArgs),
    /// Predict a text with each attention: perplexity and divergence from dense attention, by position
    Perplexity(PerplexityArgs),
    /// Answer the questions of LongBench files with that benchmark's prompts, truncation and metrics
    #[command(name = "longbench")]
    LongBench(LongBenchArgs),
    /// Put rules side by side: density, recall, perplexity, divergence, keys found
    Rules(RulesArgs),
}

#[derive(Debug, Args)]
pub struct NeedleArgs {
    /// Checkpoint folder: config.json, weights, tokenizer
    pub dir: PathBuf,
    /// Text to hide keys in; it begins again where it ends [default: chapters of a novel]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    #[command(flatten)]
    pub grid: GridArgs,
    #[command(flatten)]
    pub compare: CompareArgs,
    /// Write the heat map to a picture as well
    #[arg(long, value_name = "FILE")]
    pub png: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Where keys are hidden.
#[derive(Debug, Args)]
pub struct GridArgs {
    /// Tokens of the prompts
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "1024,2048,4096",
          value_parser = positive)]
    pub lengths: Vec<usize>,
    /// Depths of the key in percent of the text
    #[arg(long, value_name = "PERCENT,...", value_delimiter = ',', default_value = "0,25,50,75,100",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub depths: Vec<u8>,
    /// One key, one of three, or all three
    #[arg(
        long,
        value_enum,
        value_name = "VARIANT,...",
        value_delimiter = ',',
        default_value = "single,choice,several"
    )]
    pub variants: Vec<VariantName>,
    /// Prompts of each variant, length and depth
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub prompts: usize,
    /// Seed of the keys and of the texts around them
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Continue the prompt as it stands instead of asking it as a chat message
    #[arg(long)]
    pub raw: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VariantName {
    Single,
    Choice,
    Several,
}

impl From<VariantName> for Variant {
    fn from(name: VariantName) -> Self {
        match name {
            VariantName::Single => Self::Single,
            VariantName::Choice => Self::Choice,
            VariantName::Several => Self::Several,
        }
    }
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// Checkpoint folder
    pub dir: PathBuf,
    /// Text to predict; examples/novels.sh writes long ones
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    #[command(flatten)]
    pub windows: WindowArgs,
    /// Ranges of positions to tell apart
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    pub buckets: usize,
    #[command(flatten)]
    pub compare: CompareArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Which parts of a text are predicted.
#[derive(Debug, Args)]
pub struct WindowArgs {
    /// Tokens of a window of the text [default: the model's range, up to 8192]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub tokens: Option<usize>,
    /// Windows, one after the other, each on its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub windows: usize,
}

#[derive(Debug, Args)]
pub struct LongBenchArgs {
    /// Checkpoint folder
    pub dir: PathBuf,
    /// Folder of .jsonl files, or one such file
    pub data: PathBuf,
    /// File of answers, one a line; those that it holds are not asked again [default: DATA.results.jsonl]
    #[arg(long, value_name = "FILE")]
    pub results: Option<PathBuf>,
    /// Questions of each file to answer at most
    #[arg(long, value_name = "N", value_parser = positive)]
    pub limit: Option<usize>,
    /// Tokens of a prompt; longer ones lose their middle [default: the model's range less 692, as 7500 of 8192]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub prompt_tokens: Option<usize>,
    /// Continue every prompt as it stands instead of asking it as a chat message
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub compare: CompareArgs,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
pub struct RulesArgs {
    /// Checkpoint folder
    pub dir: PathBuf,
    /// Text to predict and to hide keys in; examples/novels.sh writes long ones
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    #[command(flatten)]
    pub windows: WindowArgs,
    #[command(flatten)]
    pub grid: GridArgs,
    /// Presets to compare [default: all, and variations of them]
    #[arg(long, value_name = "PRESET,...", value_delimiter = ',')]
    pub attention: Vec<Preset>,
    /// Options to compare as well, as a JSON object; "preset" in it names those that it changes (repeatable)
    #[arg(long, value_name = "NAME={...}")]
    pub rule: Vec<NamedAttention>,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Which kinds of attention are compared.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Presets to compare
    #[arg(long, value_name = "PRESET,...", value_delimiter = ',', default_value = "dense,default,joint")]
    pub attention: Vec<Preset>,
    /// Options to compare as well, as a JSON object; "preset" in it names those that it changes (repeatable)
    #[arg(long, value_name = "NAME={...}")]
    pub rule: Vec<NamedAttention>,
}

/// Where results go.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// Print one JSON object with every result instead of a table
    #[arg(long)]
    pub json: bool,
    /// Write a page
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Where and how the model runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct RunArgs {
    /// Backend; auto takes CUDA, then a GPU through Vulkan or WebGPU, then the CPU, and says which
    #[arg(short, long, value_enum, default_value = "auto")]
    pub backend: BackendName,
    /// Type to compute in [default: bf16 on a GPU that has it, else f16; f32 on the CPU]
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: DtypeName,
    /// Tokens run at a time; SampleAttention samples the rows of each chunk [default: the whole prompt]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub chunk: Option<usize>,
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

impl RunArgs {
    /// What a session is loaded with; the attention is set later.
    pub fn model_args(&self) -> ModelArgs {
        ModelArgs {
            backend: self.backend,
            dtype: self.dtype,
            attention: Preset::Dense,
            layer_attention: Vec::new(),
            dense_below: None,
            report: false,
            chunk: self.chunk.unwrap_or(usize::MAX),
            stretch_rope: self.stretch_rope,
            rope_ratio: self.rope_ratio,
            quiet: self.quiet,
        }
    }
}
