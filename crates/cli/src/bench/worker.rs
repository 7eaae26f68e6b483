//! The child's side: jobs on standard input, messages on standard output, one line each.

use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::job::{Job, Message};
use super::{model, op};
use crate::error::Error;
use crate::report::last_panic;

/// Why a job came to nothing.
pub struct Failure {
    reason: String,
    variant: Option<usize>,
}

impl Failure {
    /// At a variant, by its index.
    pub fn at(index: usize, error: impl Into<Error>) -> Self {
        Self { reason: error.into().to_string(), variant: Some(index) }
    }
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { reason: error.into().to_string(), variant: None }
    }
}

/// Tells the parent. Where nobody listens any more, the next read ends the process.
pub fn say(message: Message) {
    if let Ok(line) = serde_json::to_string(&message) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

/// Tells the parent which variant is at work, so that it knows whose fault a crash is.
pub fn at(variant: usize) {
    say(Message::At(variant));
}

/// Answers jobs until there are no more, or one fails: what a failure leaves of a device is not worth trusting,
/// so this process ends, and the parent starts another one.
pub fn run() -> Result<(), Error> {
    let (mut op, mut model) = (op::State::default(), model::State::default());
    say(Message::Ready);
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(Error::Input)?;
        let job: Job = serde_json::from_str(&line).map_err(|error| Error::Input(error.into()))?;
        // A device that runs out of memory panics inside its runtime.
        let answer = catch_unwind(AssertUnwindSafe(|| match &job {
            Job::Op(job) => op::run(&mut op, job),
            Job::Model(job) => model::run(&mut model, &mut op.host, job),
        }));
        match answer {
            Ok(Ok(answer)) => say(Message::Done(answer)),
            Ok(Err(Failure { reason, variant })) => {
                say(Message::Failed { reason, variant });
                break;
            }
            Err(_) => {
                say(Message::Failed { reason: format!("device: {}", last_panic()), variant: None });
                break;
            }
        }
    }
    Ok(())
}
