use std::process::ExitCode;

use long_context_eval::needle::Haystack;
use long_context_eval::perplexity::PerplexityConfig;
use long_context_eval::rules::{RulesReport, candidates};

use super::args::RulesArgs;
use super::{Subject, attentions, finish, progress, read_file, table};
use crate::error::Error;

/// Ranges of positions in the object that `--json` prints.
const BUCKETS: usize = 8;

pub fn run(args: RulesArgs) -> Result<ExitCode, Error> {
    let text = read_file(&args.text)?;
    let mut rules = attentions(&args.attention, &args.rule)?;
    if rules.is_empty() {
        rules = candidates();
    }
    let subject = Subject::open(&args.dir, &args.run)?;
    let prompter = subject.prompter(args.grid.raw)?;
    let tokens = args.windows.tokens(subject.range());
    let perplexity = PerplexityConfig::new(rules, tokens, args.windows.windows, BUCKETS);
    let needle = args.grid.config(perplexity.attentions.clone());
    let haystack = Haystack::new(&text, &prompter)?;
    let ids = subject.tokenizer.encode(&text);
    perplexity.check(&prompter.prefix(), &ids)?;
    needle.check(&haystack, &prompter)?;
    let longest = args.grid.lengths.iter().copied().max().unwrap_or(0).max(tokens);
    let mut session = subject.load(longest, needle.capacity().max(tokens), &args.run)?;

    let (bar, mut step) = progress(args.run.quiet, perplexity.steps() + needle.answers());
    let engine = session.loaded.engine.as_mut();
    let layers = subject.layers();
    let report =
        RulesReport::run(perplexity, needle, engine, layers, &prompter, (&ids, &haystack), &mut step)?;
    bar.finish_and_clear();
    let (head, rows) = report.rows();
    finish(&args.output, &report, &table(&head, &rows), || report.page(&subject.describe(&session.device)))
}
