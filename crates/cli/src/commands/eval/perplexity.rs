use std::process::ExitCode;

use long_context_eval::perplexity::PerplexityConfig;

use super::args::{PerplexityArgs, WindowArgs};
use super::{Subject, attentions, finish, progress, read_file, table};
use crate::error::Error;

/// Tokens of a window where none are named and the model's range is longer.
const DEFAULT_TOKENS: usize = 8192;

impl WindowArgs {
    /// Tokens of a window for a model of some range.
    pub fn tokens(&self, range: usize) -> usize {
        self.tokens.unwrap_or(range.min(DEFAULT_TOKENS))
    }
}

pub fn run(args: PerplexityArgs) -> Result<ExitCode, Error> {
    let text = read_file(&args.text)?;
    let attentions = attentions(&args.compare.attention, &args.compare.rule)?;
    let subject = Subject::open(&args.dir, &args.run)?;
    let prefix = subject.prompter(true)?.prefix();
    let tokens = args.windows.tokens(subject.range());
    let config = PerplexityConfig::new(attentions, tokens, args.windows.windows, args.buckets);
    let ids = subject.tokenizer.encode(&text);
    config.check(&prefix, &ids)?;
    let mut session = subject.load(tokens, tokens, &args.run)?;

    let (bar, mut step) = progress(args.run.quiet, config.steps());
    let engine = session.loaded.engine.as_mut();
    let report = config.run(engine, subject.layers(), &prefix, &ids, &mut step)?;
    bar.finish_and_clear();
    let (head, rows) = report.rows();
    let (positions, by_position) = report.positions();
    let tables = format!("{}\n{}", table(&head, &rows), table(&positions, &by_position));
    finish(&args.output, &report, &tables, || report.page(&subject.describe(&session.device)))
}
