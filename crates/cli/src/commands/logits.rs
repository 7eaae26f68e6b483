use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use tempfile::NamedTempFile;

use crate::args::LogitsArgs;
use crate::error::Error;
use crate::session::{Session, catch_interrupts, interrupted, open};

pub fn run(args: LogitsArgs) -> Result<ExitCode, Error> {
    let ids = parse_ids(&args.ids)?;
    let checkpoint = open(&args.dir, args.model.rope_ratio)?;
    let mut config = checkpoint.config().clone();
    if args.model.stretch_rope {
        config.stretch_to(ids.len());
    }
    catch_interrupts();
    let mut session = Session::load(&checkpoint, &config, ids.len(), &args.model)?;

    // Written beside its place and moved there when whole.
    let in_file = |error| Error::File { path: args.out.clone(), error };
    let folder = args.out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = BufWriter::new(NamedTempFile::new_in(folder).map_err(in_file)?);
    file.write_all(&header(ids.len(), config.vocab_size())).map_err(in_file)?;
    let mut written = Ok(());
    session.loaded.engine.logits(&ids, &mut |logits| {
        let bytes: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
        if written.is_ok() {
            written = file.write_all(&bytes);
        }
    })?;
    written.map_err(in_file)?;
    if interrupted() {
        return Ok(ExitCode::from(130));
    }
    let file = file.into_inner().map_err(|error| in_file(error.into_error()))?;
    file.persist(&args.out).map_err(|error| in_file(error.error))?;
    eprintln!("logits [{}, {}] in {}", ids.len(), config.vocab_size(), args.out.display());
    Ok(ExitCode::SUCCESS)
}

/// Ids in the argument itself, or in the file that it names.
pub fn parse_ids(argument: &str) -> Result<Vec<u32>, Error> {
    let path = Path::new(argument);
    let text = if path.is_file() { super::read_file(path)? } else { argument.to_string() };
    text.split(|c: char| c == ',' || c.is_whitespace() || c == '[' || c == ']')
        .filter(|word| !word.is_empty())
        .map(|word| word.parse().map_err(|_| Error::Ids { found: word.to_string() }))
        .collect()
}

/// The head of a safetensors file with one tensor: the rows follow as they are computed.
fn header(rows: usize, vocab: usize) -> Vec<u8> {
    let bytes = rows * vocab * size_of::<f32>();
    let mut json =
        format!(r#"{{"logits":{{"dtype":"F32","shape":[{rows},{vocab}],"data_offsets":[0,{bytes}]}}}}"#);
    while json.len() % 8 != 0 {
        json.push(' ');
    }
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.extend(json.into_bytes());
    head
}
