use std::process::ExitCode;

use long_context_weights::Tokenizer;
use serde::Serialize;

use super::{print, print_json, read_stdin};
use crate::args::TokenizeArgs;
use crate::error::Error;

#[derive(Serialize)]
struct Output {
    ids: Vec<u32>,
    pieces: Vec<String>,
}

pub fn run(args: TokenizeArgs) -> Result<ExitCode, Error> {
    let tokenizer = Tokenizer::from_dir(&args.dir)?;
    let text = if args.text == "-" { read_stdin()? } else { args.text };
    let ids = tokenizer.encode(&text);
    let pieces = ids.iter().map(|&id| tokenizer.piece(id)).collect();
    let output = Output { ids, pieces };
    if args.json {
        print_json(&output)?;
    } else {
        for (id, piece) in output.ids.iter().zip(&output.pieces) {
            print(&format!("{id}\t{piece:?}\n"))?;
        }
        eprintln!("{} tokens", output.ids.len());
    }
    Ok(ExitCode::SUCCESS)
}
