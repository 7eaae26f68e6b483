use std::path::PathBuf;
use std::process::ExitCode;

use long_context_eval::longbench::{self, LongBenchConfig, Results};

use super::args::LongBenchArgs;
use super::{Subject, attentions, print, print_json, progress, table};
use crate::error::Error;
use crate::session::interrupted;

pub fn run(args: LongBenchArgs) -> Result<ExitCode, Error> {
    let attentions = attentions(&args.compare.attention, &args.compare.rule)?;
    let names: Vec<String> = attentions.iter().map(|attention| attention.name.clone()).collect();
    let files = if args.data.is_dir() { longbench::files(&args.data)? } else { vec![args.data.clone()] };
    let subject = Subject::open(&args.dir, &args.run)?;
    let prompter = subject.prompter(args.raw)?;
    let folder = subject.checkpoint.folder();
    let model = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned();
    let prompt_tokens = args.prompt_tokens.unwrap_or(longbench::prompt_tokens(subject.range()));
    let config =
        LongBenchConfig { attentions, prompt_tokens, limit: args.limit, model: model.clone(), raw: args.raw };
    let total = config.check(&files)?;
    let path = args.results.unwrap_or_else(|| beside(&args.data));
    let mut results = Results::open(&path)?;
    let mut session = subject.load(prompt_tokens, config.capacity(), &args.run)?;

    let (bar, mut step) = progress(args.run.quiet, total);
    let engine = session.loaded.engine.as_mut();
    config.run(engine, subject.layers(), &prompter, &files, &mut results, &mut step)?;
    bar.finish_and_clear();
    let scores = results.scores(&model, prompt_tokens);
    if args.json {
        print_json(&scores)?;
    } else {
        let (head, rows) = scores.rows(&names);
        print(&table(&head, &rows))?;
    }
    eprintln!("answers in {}", path.display());
    Ok(ExitCode::from(if interrupted() { 130 } else { 0 }))
}

/// The data's own name with another ending: no file of a folder of data.
fn beside(data: &std::path::Path) -> PathBuf {
    let mut name = data.file_name().unwrap_or(data.as_os_str()).to_os_string();
    name.push(".results.jsonl");
    data.with_file_name(name)
}
