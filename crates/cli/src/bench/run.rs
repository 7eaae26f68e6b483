//! A run: jobs go to child processes one after the other, their rows to the terminal and into the files.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use indicatif::ProgressBar;

use super::args::CommonArgs;
use super::child::{Child, Fault};
use super::job::{Answer, Job};
use super::peers::Peers;
use super::report::Report;
use super::row::Row;
use super::seconds::Seconds;
use super::{page, table};
use crate::commands::print;
use crate::error::Error;
use crate::report::job_bar;

/// The name that the peers' process goes by.
const PEERS: &str = "peers";
/// Letters of the longest name of a peer's attention, and of a density behind a name.
const PEER_NAME: usize = 16;
const DENSITY_NAME: usize = 7;

pub struct Run {
    report: Report,
    begin: Instant,
    seconds: Seconds,
    children: BTreeMap<String, Child>,
    /// Shares of keys that stand out, by the inputs that they were found for.
    shares: BTreeMap<String, Vec<f64>>,
    peers: Option<Peers>,
    python: PathBuf,
    json: Option<PathBuf>,
    html: Option<PathBuf>,
    bar: ProgressBar,
    headed: bool,
    /// Letters of the longest name of attention.
    width: usize,
}

impl Run {
    /// Prepares a run of `jobs`, each of which is also put to the peers where they are asked for.
    pub fn new(args: &CommonArgs, jobs: usize) -> Result<Self, Error> {
        let names = args.preset.iter().map(|preset| preset.name.len());
        let width = names.max().unwrap_or(0).max(PEER_NAME) + DENSITY_NAME;
        let mut run = Self {
            report: Report::new(),
            begin: Instant::now(),
            seconds: Seconds::default(),
            children: BTreeMap::new(),
            shares: BTreeMap::new(),
            peers: if args.peers { Some(Peers::new()?) } else { None },
            python: args.python.clone(),
            json: args.json.clone(),
            html: args.html.clone(),
            bar: job_bar(args.quiet, jobs),
            headed: false,
            width,
        };
        // Now, not after minutes of work: whether the files can be written.
        run.save()?;
        Ok(run)
    }

    /// Measures a job; `inputs` names its inputs where other jobs share them.
    pub fn measure(&mut self, mut job: Job, inputs: &str) -> Result<(), Error> {
        if let Some(shares) = self.shares.get(inputs) {
            job.set_shares(shares);
        }
        let name = job.backend().to_string();
        self.bar.set_message(format!("{name}: {}", job.name()));
        loop {
            let line = serde_json::to_string(&job).map_err(|error| Error::Output(error.into()))?;
            let worker = || {
                let mut command = Command::new(std::env::current_exe().map_err(Error::Output)?);
                command.args(["bench", "worker"]);
                Ok(command)
            };
            match self.ask(&name, &line, worker)? {
                Ok(answer) => {
                    self.shares.insert(inputs.to_string(), answer.shares.clone());
                    self.take(answer)?;
                    break;
                }
                // The others have a chance without the one that failed.
                Err(Fault { reason, variant: Some(at) }) if at < job.variants().len() => {
                    let failed = job.variants().remove(at);
                    self.show(job.failed_row(&failed, &reason))?;
                    if job.variants().is_empty() {
                        break;
                    }
                }
                Err(Fault { reason, .. }) => {
                    for variant in job.variants().clone() {
                        self.show(job.failed_row(&variant, &reason))?;
                    }
                    break;
                }
            }
        }
        self.bar.inc(1);
        self.save()
    }

    /// Puts a job to the peers, on the tensors that our own rows of it attended.
    pub fn compare(&mut self, mut job: Job, inputs: &str) -> Result<(), Error> {
        if self.peers.is_none() {
            return Ok(());
        }
        if let Some(shares) = self.shares.get(inputs) {
            job.set_shares(shares);
        }
        self.bar.set_message(format!("{PEERS}: {}", job.name()));
        let dtype = self.report.rows.iter().rev().find(|row| row.failed().is_none()).map(|row| match row {
            Row::Op(row) => row.dtype.clone(),
            Row::Model(row) => row.dtype.clone(),
        });
        let dtype = dtype.unwrap_or_else(|| "bf16".to_string());
        let Some(peers) = &mut self.peers else { return Ok(()) };
        let line = self.seconds.time("peers' inputs", || peers.job(&job, &dtype))?;
        let command = peers.command(&self.python);
        match self.ask(PEERS, &line, || Ok(command))? {
            Ok(answer) => self.take(answer)?,
            Err(Fault { reason, .. }) => {
                self.note(format!("peers were left out: {reason}"));
                self.peers = None;
            }
        }
        self.save()
    }

    /// Asks a child, which is started where it does not run yet and let go where it fails.
    fn ask(
        &mut self,
        name: &str,
        job: &str,
        command: impl FnOnce() -> Result<Command, Error>,
    ) -> Result<Result<Answer, Fault>, Error> {
        let mut child = match self.children.remove(name) {
            Some(child) => child,
            None => {
                let command = command()?;
                match self.seconds.time("process start", || Child::start(command)) {
                    Ok(child) => child,
                    Err(fault) => return Ok(Err(fault)),
                }
            }
        };
        let begin = Instant::now();
        let answer = child.ask(job, &mut |doing| self.bar.set_message(doing.to_string()));
        match &answer {
            Ok(_) => {
                self.children.insert(name.to_string(), child);
            }
            Err(_) => {
                drop(child);
                self.seconds.add("failed attempts", begin.elapsed().as_secs_f64());
            }
        }
        Ok(answer)
    }

    fn take(&mut self, answer: Answer) -> Result<(), Error> {
        self.seconds.merge(&answer.seconds);
        answer.notes.into_iter().for_each(|note| self.note(note));
        answer.rows.into_iter().try_for_each(|row| self.show(row))
    }

    fn note(&mut self, note: String) {
        self.bar.suspend(|| eprintln!("{note}"));
        self.report.notes.push(note);
    }

    /// Puts a row into the table, unless standard output is for the JSON, and into the report.
    fn show(&mut self, row: Row) -> Result<(), Error> {
        if !self.json_to_stdout() {
            let head = if self.headed { String::new() } else { table::head(&row, self.width) + "\n" };
            self.headed = true;
            let text = format!("{head}{}\n", table::line(&row, self.width));
            self.bar.suspend(|| print(&text))?;
        }
        self.report.rows.push(row);
        Ok(())
    }

    fn json_to_stdout(&self) -> bool {
        self.json.as_ref().is_some_and(|path| path.as_os_str() == "-")
    }

    fn json_text(&mut self) -> Result<String, Error> {
        self.report.seconds.total = self.begin.elapsed().as_secs_f64();
        self.report.seconds.reported = self.seconds.sum();
        self.report.seconds.parts = self.seconds.clone();
        let json = serde_json::to_string_pretty(&self.report).map_err(|error| Error::Output(error.into()))?;
        Ok(json + "\n")
    }

    /// Writes the files anew, so that a run that is cut short leaves what it has.
    fn save(&mut self) -> Result<(), Error> {
        let begin = Instant::now();
        let json = self.json_text()?;
        let write = |path: &PathBuf, text: &str| {
            std::fs::write(path, text).map_err(|error| Error::File { path: path.clone(), error })
        };
        if let Some(path) = self.json.as_ref().filter(|_| !self.json_to_stdout()) {
            write(path, &json)?;
        }
        if let Some(path) = &self.html {
            write(path, &page::html(&self.report))?;
        }
        self.seconds.add("files", begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// Ends the children and writes everything. Whether any row has numbers.
    pub fn finish(mut self) -> Result<bool, Error> {
        let children = std::mem::take(&mut self.children);
        self.seconds.time("process end", || drop(children));
        self.bar.finish_and_clear();
        self.save()?;
        if self.json_to_stdout() {
            let json = self.json_text()?;
            print(&json)?;
        } else {
            let seconds = &self.report.seconds;
            let (total, reported) = (seconds.total, seconds.reported);
            eprintln!("{total:.1} s, of which {reported:.1} s are told apart");
        }
        Ok(self.report.rows.iter().any(|row| row.failed().is_none()))
    }
}
