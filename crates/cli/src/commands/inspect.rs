use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use long_context_eval::NamedAttention;
use long_context_eval::inspect::InspectConfig;
use sample_attention::Preset;

use super::eval::args::RunArgs;
use super::eval::{Subject, progress};
use super::{read_file, read_stdin, write_file};
use crate::args::{layer_range, positive};
use crate::error::Error;
use crate::session::interrupted;

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Checkpoint folder: config.json, weights, tokenizer
    pub dir: PathBuf,
    /// The prompt; read from standard input where neither this nor --file is given
    #[arg(conflicts_with = "file")]
    pub prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Run the prompt as it stands instead of as a chat message
    #[arg(long)]
    pub raw: bool,
    /// Page to write
    #[arg(long, value_name = "FILE", default_value = "inspect.html")]
    pub html: PathBuf,
    /// Attention to run with: dense, default, paper, fast, joint or contribution
    #[arg(long, value_name = "PRESET", default_value = "default")]
    pub attention: Preset,
    /// Options to run with instead, as a JSON object; "preset" in it names those that it changes
    #[arg(long, value_name = "NAME={...}", conflicts_with = "attention")]
    pub rule: Option<NamedAttention>,
    /// Layers to look at, such as 4 or 0-7 [default: all]
    #[arg(long, value_name = "LAYERS", value_parser = layer_range)]
    pub layers: Option<RangeInclusive<usize>>,
    /// Rows of each block to compute exactly, evenly spaced
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = positive)]
    pub rows: usize,
    /// Heads to show pictures of, those that lost most first [default: all]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub max_heads: Option<usize>,
    #[command(flatten)]
    pub run: RunArgs,
}

pub fn run(args: InspectArgs) -> Result<ExitCode, Error> {
    let prompt = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read_file(path)?,
        (None, None) => read_stdin()?,
    };
    if prompt.trim().is_empty() {
        return Err(Error::NoPrompt);
    }
    let subject = Subject::open(&args.dir, &args.run)?;
    let prompter = subject.prompter(args.raw)?;
    let ids = if args.raw { prompter.plain(&prompt) } else { prompter.ask(&prompt, "")? };
    let layers = args.layers.unwrap_or(0..=subject.layers() - 1);
    if *layers.end() >= subject.layers() {
        let (found, expected) = (layers.end().to_string(), format!("below {}", subject.layers()));
        return Err(Error::Flag { flag: "--layers", found, expected });
    }
    let mut session = subject.load(ids.len(), ids.len(), &args.run)?;
    let config = InspectConfig {
        attention: args.rule.unwrap_or(args.attention.into()),
        layers,
        rows_per_block: args.rows,
        max_heads: args.max_heads.unwrap_or(usize::MAX),
    };
    let (bar, mut step) = progress(args.run.quiet, ids.len());
    let inspection = config.run(session.loaded.engine.as_mut(), &ids, &mut step)?;
    bar.finish_and_clear();
    if interrupted() {
        return Ok(ExitCode::from(130));
    }
    let pieces: Vec<String> = ids.iter().map(|&id| subject.tokenizer.piece(id)).collect();
    write_file(&args.html, inspection.page(&subject.describe(&session.device), &pieces)?)?;
    eprintln!(
        "density {:.3} · kept {:.4} of the attention · page in {}",
        inspection.density(),
        inspection.recall(),
        args.html.display()
    );
    Ok(ExitCode::SUCCESS)
}
