use std::process::ExitCode;

use long_context_eval::needle::{Haystack, TEXT};

use super::args::NeedleArgs;
use super::{Subject, attentions, finish, progress, read_file, table, write_file};
use crate::error::Error;

pub fn run(args: NeedleArgs) -> Result<ExitCode, Error> {
    let text = match &args.text {
        Some(path) => read_file(path)?,
        None => TEXT.to_string(),
    };
    let config = args.grid.config(attentions(&args.compare.attention, &args.compare.rule)?);
    let subject = Subject::open(&args.dir, &args.run)?;
    let prompter = subject.prompter(args.grid.raw)?;
    let haystack = Haystack::new(&text, &prompter)?;
    config.check(&haystack, &prompter)?;
    let longest = args.grid.lengths.iter().copied().max().unwrap_or(0);
    let mut session = subject.load(longest, config.capacity(), &args.run)?;

    let (bar, mut step) = progress(args.run.quiet, config.answers());
    let engine = session.loaded.engine.as_mut();
    let report = config.run(engine, subject.layers(), &prompter, &haystack, &mut step)?;
    bar.finish_and_clear();
    if let Some(path) = &args.png {
        write_file(path, report.picture().png()?)?;
        eprintln!("picture in {}", path.display());
    }
    let (head, rows) = report.rows();
    finish(&args.output, &report, &table(&head, &rows), || report.page(&subject.describe(&session.device)))
}
