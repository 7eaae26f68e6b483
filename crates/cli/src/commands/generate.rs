use std::process::ExitCode;

use long_context_weights::{Chat, Message, Role};
use serde::Serialize;

use super::{print, print_json, read_file, read_stdin};
use crate::args::GenerateArgs;
use crate::error::Error;
use crate::report::{LayerLine, Stats};
use crate::session::{Limits, Session, catch_interrupts, interrupted, open, sampler};

#[derive(Serialize)]
struct Output<'a> {
    text: &'a str,
    ids: &'a [u32],
    #[serde(flatten)]
    stats: &'a Stats,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    layers: &'a [LayerLine],
}

pub fn run(args: GenerateArgs) -> Result<ExitCode, Error> {
    let mut sampler = sampler(&args.sampling)?;
    let prompt = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read_file(path)?,
        (None, None) => read_stdin()?,
    };
    if prompt.trim().is_empty() {
        return Err(Error::NoPrompt);
    }
    let checkpoint = open(&args.dir, args.model.rope_ratio)?;
    let tokenizer = checkpoint.tokenizer()?;
    let chat = Chat::new(&checkpoint, &tokenizer)?;
    let ids = if args.raw {
        chat.prefix().into_iter().chain(tokenizer.encode(&prompt)).collect()
    } else {
        let system = args.sampling.system.iter().map(|text| Message::new(Role::System, text));
        let messages: Vec<_> = system.chain([Message::new(Role::User, prompt)]).collect();
        chat.encode(&messages)?
    };

    let capacity = ids.len() + args.sampling.max_tokens;
    let mut config = checkpoint.config().clone();
    if args.model.stretch_rope {
        config.stretch_to(capacity);
    } else if capacity > config.context_length() {
        let (prompt, generate) = (ids.len(), args.sampling.max_tokens);
        return Err(Error::TooLong { prompt, generate, range: config.context_length() });
    }
    catch_interrupts();
    let mut session = Session::load(&checkpoint, &config, capacity, &args.model)?;
    let limits = Limits::new(&args.sampling, chat.stop_ids().to_vec());
    let mut show = |piece: &str| if args.json { Ok(()) } else { print(piece) };
    let answer = session.answer(&ids, &tokenizer, &mut sampler, &limits, &mut show)?;
    if args.json {
        print_json(&Output {
            text: &answer.text,
            ids: &answer.generation.ids,
            stats: &answer.stats,
            layers: &answer.layers,
        })?;
    } else {
        print("\n")?;
        eprintln!("{}", answer.stats.line());
        if !answer.layers.is_empty() {
            eprint!("{}", LayerLine::table(&answer.layers));
        }
    }
    Ok(ExitCode::from(if interrupted() { 130 } else { 0 }))
}
