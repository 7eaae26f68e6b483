//! Trains the embedded model: a small InternLM2 that finds keys in long texts.
//!
//! `text.py target/embedded-text` makes the text and the tokenizer; then
//! `cargo run --release -p long-context-examples --bin train-embedded --features cuda -- --out weights/embedded`

mod batches;
mod card;
mod corpus;
mod error;
mod evaluate;
mod locality;
mod recipe;
mod sequence;
mod tasks;
#[cfg(test)]
mod tests;
mod train;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use burn::backend::Autodiff;
use burn::tensor::DType;
use clap::Parser;
use long_context::models::ModelConfig;
use long_context_weights::{Checkpoint, TokenIds, save_internlm2};

use batches::Batches;
use corpus::{Book, Corpus};
use error::Error;
use evaluate::Evaluator;
use recipe::Recipe;
use sequence::Writer;

#[cfg(feature = "cuda")]
type Device = burn::backend::Cuda;
#[cfg(all(feature = "vulkan", not(feature = "cuda")))]
type Device = burn::backend::Vulkan;
#[cfg(not(any(feature = "cuda", feature = "vulkan")))]
type Device = burn::backend::Flex;

/// The kernels that compute attention fastest take half types.
const ATTENTION_DTYPE: DType = if cfg!(feature = "cuda") { DType::BF16 } else { DType::F32 };

/// Trains the embedded long-context model.
#[derive(Debug, Parser)]
#[command(name = "train-embedded", max_term_width = 100)]
struct Args {
    /// Folder to write: config.json, model.safetensors, tokenizer.model, README.md, training.log
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder that text.py made: train.txt, held-out.txt, tokenizer.model
    #[arg(long, value_name = "DIR", default_value = "target/embedded-text")]
    text: PathBuf,
    /// What to train and how [default: the embedded model's recipe.json]
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(args: &Args) -> Result<(), Error> {
    let recipe = Recipe::read(args.recipe.as_deref())?;
    let corpus = Corpus::read(&args.text, &args.text.join("train.txt"))?;
    let held_out = Book::new(&corpus.tokenizer, &Error::read(&args.text.join("held-out.txt"))?);
    let mut log = Log::new(format!(
        "{} tokens of text, {} held out, a vocabulary of {}",
        corpus.book.ids().len(),
        held_out.ids().len(),
        corpus.tokenizer.vocab_size()
    ));
    train(args, &recipe, &corpus, &held_out, &mut log)?;
    write(&args.out.join("training.log"), &log.lines)
}

/// Everything that is told, with the seconds since the beginning.
struct Log {
    begin: Instant,
    lines: String,
}

impl Log {
    fn new(line: String) -> Self {
        let mut log = Self { begin: Instant::now(), lines: String::new() };
        log.tell(line);
        log
    }

    fn tell(&mut self, line: String) {
        let line = format!("{:>7.1} s  {line}\n", self.begin.elapsed().as_secs_f64());
        eprint!("{line}");
        self.lines += &line;
    }
}

fn train(args: &Args, recipe: &Recipe, corpus: &Corpus, book: &Book, log: &mut Log) -> Result<(), Error> {
    let device = Default::default();
    let config = recipe.model(corpus.tokenizer.vocab_size());
    let model_config = ModelConfig::InternLm2(config.clone());
    let writer = Writer { corpus, book: &corpus.book, held_out: false };
    let model = std::thread::scope(|scope| {
        let batches = Batches::start(scope, writer, recipe);
        let mut tell = |line| log.tell(line);
        train::train::<Autodiff<Device>>(&model_config, recipe, batches, ATTENTION_DTYPE, &device, &mut tell)
    })?;

    let special = corpus.special;
    let tokens = TokenIds { bos: special.bos, eos: vec![special.eos, special.message_end] };
    save_internlm2(&args.out, &model, &config, &tokens)?;
    let (from, to) = (args.text.join("tokenizer.model"), args.out.join("tokenizer.model"));
    std::fs::copy(&from, &to).map_err(Error::file(&from))?;

    // What is judged is what was written, rounded as it is.
    let checkpoint = Checkpoint::open(&args.out)?;
    let model = checkpoint.load::<Device>(checkpoint.config(), DType::F32, &device, Rc::new(|_| ()))?;
    let evaluator = Evaluator {
        model: &model,
        writer: Writer { corpus, book, held_out: true },
        attention_dtype: ATTENTION_DTYPE,
        device: &device,
    };
    let scores = evaluator.run(&recipe.evaluation, &mut |line| log.tell(line))?;
    let parameters = config.tensors().iter().map(|tensor| tensor.elements()).sum();
    write(&args.out.join("README.md"), &card::card(recipe, parameters, &scores))
}

fn write(file: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(file, text).map_err(Error::file(file))
}
