use std::io::BufRead;
use std::process::ExitCode;

use long_context_weights::{Chat, Message, Role};

use super::print;
use crate::args::ChatArgs;
use crate::error::Error;
use crate::session::{Limits, Session, catch_interrupts, open, sampler, take_interrupt};

/// Tokens held where `--context` does not say and the model could hold more.
const DEFAULT_CONTEXT: usize = 8192;

pub fn run(args: ChatArgs) -> Result<ExitCode, Error> {
    let mut sampler = sampler(&args.sampling)?;
    let checkpoint = open(&args.dir, args.model.rope_ratio)?;
    let tokenizer = checkpoint.tokenizer()?;
    let chat = Chat::new(&checkpoint, &tokenizer)?;
    let mut config = checkpoint.config().clone();
    let context = args.context.unwrap_or(config.context_length().min(DEFAULT_CONTEXT));
    if args.model.stretch_rope {
        config.stretch_to(context);
    } else if context > config.context_length() {
        return Err(Error::ContextTooLong { found: context, range: config.context_length() });
    }
    catch_interrupts();
    let mut session = Session::load(&checkpoint, &config, context, &args.model)?;
    let limits = Limits::new(&args.sampling, chat.stop_ids().to_vec());

    let start: Vec<Message> =
        args.sampling.system.iter().map(|text| Message::new(Role::System, text)).collect();
    let mut messages = start.clone();
    let mut stats = None;
    let mut lines = std::io::stdin().lock().lines();
    loop {
        eprint!("> ");
        let Some(line) = lines.next() else { break };
        let line = line.map_err(Error::Input)?;
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => break,
            "/reset" => messages.clone_from(&start),
            "/stats" => match &stats {
                Some(line) => eprintln!("{line}"),
                None => eprintln!("nothing answered yet"),
            },
            command if command.starts_with('/') => eprintln!("{command}: expected /reset, /stats or /quit"),
            text => {
                messages.push(Message::new(Role::User, text));
                let ids = chat.encode(&messages)?;
                if ids.len() >= context {
                    messages.pop();
                    eprintln!(
                        "conversation: found {} tokens, expected fewer than {context} (--context); /reset forgets it",
                        ids.len()
                    );
                    continue;
                }
                let answer = session.answer(&ids, &tokenizer, &mut sampler, &limits, &mut print)?;
                print("\n")?;
                take_interrupt();
                stats = Some(answer.stats.line());
                messages.push(Message::new(Role::Assistant, answer.text));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
