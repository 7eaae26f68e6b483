//! The parent's side of a child process that measures.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child as Process, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use super::job::{Answer, Message};

/// How long a child may take to end by itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// A child process that is asked one thing at a time.
pub struct Child {
    process: Process,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// Why a child did not answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    pub reason: String,
    /// The variant that was at work.
    pub variant: Option<usize>,
}

impl Child {
    /// Starts a process and waits until it is there.
    pub fn start(mut command: Command) -> Result<Self, Fault> {
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let started = spawned.and_then(|mut process| {
            let (input, output) = (process.stdin.take(), process.stdout.take());
            let output = output.ok_or_else(|| std::io::Error::other("no output"))?;
            Ok(Self { process, input, output: BufReader::new(output) })
        });
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child =
            started.map_err(|error| Fault { reason: format!("{program}: {error}"), variant: None })?;
        match child.hear() {
            Ok(Message::Ready) => Ok(child),
            Ok(Message::Failed { reason, variant }) => Err(Fault { reason, variant }),
            Ok(other) => Err(Fault { reason: format!("{program}: found {other:?} at first"), variant: None }),
            Err(reason) => Err(Fault { reason: format!("{program}: {reason}"), variant: None }),
        }
    }

    /// Hands a job over and waits for its answer; `doing` hears what it is about.
    pub fn ask(&mut self, job: &str, doing: &mut dyn FnMut(&str)) -> Result<Answer, Fault> {
        // A child that has gone says so below.
        if let Some(input) = &mut self.input {
            let _ = writeln!(input, "{job}").and_then(|()| input.flush());
        }
        let mut variant = None;
        loop {
            match self.hear() {
                Ok(Message::Done(answer)) => return Ok(answer),
                Ok(Message::Failed { reason, variant: at }) => {
                    return Err(Fault { reason, variant: at.or(variant) });
                }
                Ok(Message::At(index)) => variant = Some(index),
                Ok(Message::Doing(text)) => doing(&text),
                Ok(Message::Ready) => {}
                Err(reason) => return Err(Fault { reason, variant }),
            }
        }
    }

    fn hear(&mut self) -> Result<Message, String> {
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(0) => Err(self.process.wait().map_or_else(
                |error| format!("the process was lost: {error}"),
                |status| format!("the process ended: {status}"),
            )),
            Ok(_) => serde_json::from_str(&line)
                .map_err(|error| format!("found {:?}, expected a message: {error}", line.trim())),
            Err(error) => Err(format!("the process was lost: {error}")),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The end of its input ends a child that is well; any other must not outlive the run.
        self.input = None;
        let begin = Instant::now();
        while self.process.try_wait().is_ok_and(|status| status.is_none()) {
            if begin.elapsed() > PATIENCE {
                let _ = self.process.kill();
                let _ = self.process.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
