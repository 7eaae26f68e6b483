//! `sattn`: long-context language models from the command line.

mod args;
mod bench;
mod commands;
mod error;
mod report;
mod session;
mod tensors;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

fn main() -> ExitCode {
    let mut words: Vec<_> = std::env::args_os().collect();
    if words.len() == 1 {
        words.push("demo".into());
    }
    let cli = Cli::parse_from(words);
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa's drivers complain on standard error where it is not set, and need nothing from it.
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
    report::quiet_panics();
    // A device that runs out of memory panics inside its runtime, on whichever thread reads from it.
    let run = std::panic::catch_unwind(|| match cli.command {
        Command::Demo(args) => commands::demo::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Info(args) => commands::info::run(args),
        Command::Tokenize(args) => commands::tokenize::run(args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Eval(command) => commands::eval::run(command),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Op(args) => commands::op::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Capture(args) => commands::capture::run(args),
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        Command::Selftest(args) => commands::selftest::run(args),
    });
    match run {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
        Err(_) => {
            eprintln!("error: device: {}", report::last_panic());
            ExitCode::from(1)
        }
    }
}
