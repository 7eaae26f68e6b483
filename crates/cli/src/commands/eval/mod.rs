//! What attention costs in quality: one file a measurement.

pub mod args;
mod longbench;
mod needle;
mod perplexity;
mod rules;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use indicatif::ProgressBar;
use long_context::models::ModelConfig;
use long_context_eval::needle::NeedleConfig;
use long_context_eval::{NamedAttention, Prompter};
use long_context_runtime::{Device, dtype_name};
use long_context_weights::{Checkpoint, Tokenizer};
use sample_attention::Preset;
use serde::Serialize;

use super::{print, print_json, read_file, write_file};
use crate::error::Error;
use crate::report::step_bar;
use crate::session::{Session, catch_interrupts, interrupted, open};
use args::{EvalCommand, GridArgs, OutputArgs, RunArgs};

pub fn run(command: EvalCommand) -> Result<ExitCode, Error> {
    match command {
        EvalCommand::Needle(args) => needle::run(args),
        EvalCommand::Perplexity(args) => perplexity::run(args),
        EvalCommand::LongBench(args) => longbench::run(args),
        EvalCommand::Rules(args) => rules::run(args),
    }
}

/// A checkpoint and its tokenizer, before anything is loaded.
pub struct Subject {
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
    config: ModelConfig,
}

impl Subject {
    pub fn open(dir: &Path, run: &RunArgs) -> Result<Self, Error> {
        let checkpoint = open(dir, run.rope_ratio)?;
        let (tokenizer, config) = (checkpoint.tokenizer()?, checkpoint.config().clone());
        Ok(Self { checkpoint, tokenizer, config })
    }

    pub fn prompter(&self, raw: bool) -> Result<Prompter<'_>, Error> {
        Ok(Prompter::new(&self.checkpoint, &self.tokenizer, raw)?)
    }

    /// Tokens that the model was made for.
    pub fn range(&self) -> usize {
        self.config.context_length()
    }

    pub fn layers(&self) -> usize {
        self.config.cache(1, 1).num_layers
    }

    /// Loads the model with room for `capacity` positions, `tokens` of which are of one prompt.
    pub fn load(&self, tokens: usize, capacity: usize, run: &RunArgs) -> Result<Session, Error> {
        let mut config = self.config.clone();
        if run.stretch_rope {
            config.stretch_to(capacity);
        } else if capacity > config.context_length() {
            let (range, generate) = (config.context_length(), capacity - tokens);
            return Err(Error::TooLong { prompt: tokens, generate, range });
        }
        catch_interrupts();
        Session::load(&self.checkpoint, &config, capacity, &run.model_args())
    }

    /// The model, the device and the type, for the head of a page.
    pub fn describe(&self, device: &Device) -> String {
        let folder = self.checkpoint.folder();
        let name = folder
            .file_name()
            .map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned());
        let layers = self.layers();
        format!(
            "{name} ({}, {layers} layers) on {} ({}, {})",
            self.checkpoint.family().name(),
            device.name,
            device.backend,
            dtype_name(device.dtype)
        )
    }
}

/// Presets and rules under names that tell them apart.
fn attentions(presets: &[Preset], rules: &[NamedAttention]) -> Result<Vec<NamedAttention>, Error> {
    let presets = presets.iter().copied().map(NamedAttention::from);
    let all: Vec<NamedAttention> = presets.chain(rules.iter().cloned()).collect();
    let mut names = BTreeSet::new();
    if let Some(twice) = all.iter().find(|attention| !names.insert(attention.name.as_str())) {
        let (found, expected) = (format!("`{}` twice", twice.name), "each name once".to_string());
        return Err(Error::Flag { flag: "--attention and --rule", found, expected });
    }
    Ok(all)
}

impl GridArgs {
    fn config(&self, attentions: Vec<NamedAttention>) -> NeedleConfig {
        NeedleConfig {
            attentions,
            variants: self.variants.iter().map(|&variant| variant.into()).collect(),
            lengths: self.lengths.clone(),
            depths: self.depths.iter().map(|&depth| usize::from(depth)).collect(),
            prompts: self.prompts,
            seed: self.seed,
        }
    }
}

/// A bar that moves with an evaluation and ends it on Ctrl-C.
pub fn progress(quiet: bool, steps: usize) -> (ProgressBar, impl FnMut(usize, usize) -> ControlFlow<()>) {
    let bar = step_bar(quiet, steps);
    let moved = bar.clone();
    let step = move |done: usize, _| {
        moved.set_position(done as u64);
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    (bar, step)
}

/// What every evaluation ends with: the table or the object, the page, the exit code.
fn finish(
    output: &OutputArgs,
    report: &impl Serialize,
    table: &str,
    page: impl FnOnce() -> String,
) -> Result<ExitCode, Error> {
    if output.json {
        print_json(report)?;
    } else {
        print(table)?;
    }
    if let Some(path) = &output.html {
        write_file(path, page())?;
        eprintln!("page in {}", path.display());
    }
    Ok(ExitCode::from(if interrupted() { 130 } else { 0 }))
}

/// Rows in columns; all but the first are set to the right.
fn table(head: &[impl AsRef<str>], rows: &[Vec<String>]) -> String {
    let head: Vec<&str> = head.iter().map(AsRef::as_ref).collect();
    let rows: Vec<Vec<&str>> = rows.iter().map(|row| row.iter().map(String::as_str).collect()).collect();
    let all = || std::iter::once(&head).chain(&rows);
    let width = |column: usize| {
        all().map(|row| row.get(column).map_or(0, |cell| cell.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for row in all() {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}
