//! LongBench: questions about long texts in two languages, with the benchmark's own prompts, truncation and
//! metrics.

mod metrics;
mod results;
mod tasks;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use long_context::generate::Engine;
use serde::Deserialize;
use serde_json::Value;

pub use metrics::Metric;
pub use results::{Answer, Results, Scores};
pub use tasks::Task;

use crate::{Ask, Error, Kept, NamedAttention, Progress, Prompter, Result, answer};

/// Tokens that the benchmark leaves of a range of 8192 for the answer and the chat format.
const MARGIN: usize = 692;

/// One question, as a line of a data set holds it.
#[derive(Debug, Clone, Deserialize)]
pub struct Question {
    /// The long text.
    #[serde(default)]
    pub context: String,
    /// The question, or what else goes with the text.
    #[serde(default)]
    pub input: String,
    /// Answers, any of which is right.
    pub answers: Vec<String>,
    /// Words or characters of the text.
    #[serde(default)]
    pub length: usize,
    /// The data set.
    pub dataset: String,
    /// Classes to choose from.
    #[serde(default)]
    pub all_classes: Option<Vec<String>>,
    /// What tells it from the others.
    #[serde(rename = "_id", default)]
    pub id: Option<Value>,
}

/// A question that was read and its task.
struct Item {
    id: String,
    question: Question,
    task: &'static Task,
}

/// What to answer, and how.
#[derive(Debug, Clone)]
pub struct LongBenchConfig {
    /// Every question is answered with each.
    pub attentions: Vec<NamedAttention>,
    /// Tokens of a prompt before the chat format; longer ones lose their middle.
    pub prompt_tokens: usize,
    /// Questions of each data set to answer at most.
    pub limit: Option<usize>,
    /// Whether every prompt is a text to continue, for models without a chat format.
    pub raw: bool,
    /// What results are kept under: answers of another model are not taken for this one's.
    pub model: String,
}

/// The tokens of a prompt that a model of some range gets: the benchmark's 7500 for 8192.
pub fn prompt_tokens(range: usize) -> usize {
    range.saturating_sub(MARGIN)
}

/// The `.jsonl` files of a folder, by name.
///
/// # Errors
///
/// A folder that cannot be read, or holds none.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = folder.read_dir().map_err(Error::file(folder))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>();
    let mut files = paths.map_err(Error::file(folder))?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    files.sort();
    if files.is_empty() {
        return Err(Error::invalid(folder.display(), "no .jsonl file", "one a data set"));
    }
    Ok(files)
}

impl LongBenchConfig {
    /// Positions that an engine must hold: a prompt, the longest answer and the chat format.
    pub fn capacity(&self) -> usize {
        self.prompt_tokens + MARGIN
    }

    /// Reads all of `files` and counts the answers that a run takes.
    ///
    /// # Errors
    ///
    /// A line that is no question, or an unknown data set.
    pub fn check(&self, files: &[PathBuf]) -> Result<usize> {
        let mut total = 0;
        for file in files {
            self.each(file, &mut |_| {
                total += self.attentions.len();
                Ok(true)
            })?;
        }
        Ok(total)
    }

    /// Answers the questions of `files` that `results` does not hold yet, and adds them to it.
    ///
    /// # Errors
    ///
    /// A line that is no question, an unknown data set, a file that cannot be written, or a failing device.
    pub fn run(
        &self,
        engine: &mut dyn Engine,
        layers: usize,
        prompter: &Prompter<'_>,
        files: &[PathBuf],
        results: &mut Results,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let total = self.check(files)?;
        let mut done = 0;
        for file in files {
            let whole = self.each(file, &mut |item| {
                for attention in &self.attentions {
                    let key = results::Key {
                        model: self.model.clone(),
                        attention: attention.name.clone(),
                        prompt_tokens: self.prompt_tokens,
                        dataset: item.question.dataset.clone(),
                        id: item.id.clone(),
                    };
                    if !results.holds(&key) {
                        results.add(self.answer(engine, layers, prompter, &item, attention, key)?)?;
                    }
                    done += 1;
                    if progress(done, total).is_break() {
                        return Ok(false);
                    }
                }
                Ok(true)
            })?;
            if !whole {
                break;
            }
        }
        Ok(())
    }

    /// Reads a file line by line; whether `take` took all of it.
    fn each(&self, file: &Path, take: &mut dyn FnMut(Item) -> Result<bool>) -> Result<bool> {
        let lines = BufReader::new(File::open(file).map_err(Error::file(file))?).lines();
        let mut taken = 0;
        for (index, line) in lines.enumerate() {
            if self.limit.is_some_and(|limit| taken >= limit) {
                break;
            }
            let line = line.map_err(Error::file(file))?;
            if line.trim().is_empty() {
                continue;
            }
            let subject = || format!("{} line {}", file.display(), index + 1);
            let question: Question = serde_json::from_str(&line)
                .map_err(|error| Error::invalid(subject(), error, "a question of LongBench"))?;
            let task = Task::of(&question.dataset).ok_or_else(|| {
                Error::invalid(subject(), format!("data set `{}`", question.dataset), Task::names())
            })?;
            let id = match &question.id {
                Some(Value::String(id)) => id.clone(),
                Some(id) => id.to_string(),
                None => format!("line {}", index + 1),
            };
            taken += 1;
            if !take(Item { id, question, task })? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn answer(
        &self,
        engine: &mut dyn Engine,
        layers: usize,
        prompter: &Prompter<'_>,
        item: &Item,
        attention: &NamedAttention,
        key: results::Key,
    ) -> Result<Answer> {
        let Item { question, task, .. } = item;
        let (text, truncated) = self.fit(&task.fill(question), prompter);
        let prompt = if task.chat && !self.raw { prompter.ask(&text, "")? } else { prompter.plain(&text) };
        let mut stop = prompter.stop_ids().to_vec();
        if task.one_line {
            stop.extend(prompter.tokenizer().encode("\n").last());
        }
        engine.set_attention(&attention.config());
        let ask = Ask {
            prompt: &prompt,
            keep: false,
            guesses: &[],
            max_tokens: task.max_tokens,
            min_tokens: usize::from(task.one_line),
            stop: &stop,
        };
        let ids = answer(engine, &ask, &mut |_| false)?;
        let text = prompter.tokenizer().decode(&ids);
        Ok(Answer {
            key,
            score: task.score(&text, question),
            answer: text,
            answers: question.answers.clone(),
            length: question.length,
            tokens: prompt.len(),
            truncated,
            kept: Kept::of(&engine.take_reports()?, layers, prompt.len()),
        })
    }

    /// Cuts the middle out of a prompt that is too long; whether it was.
    fn fit(&self, prompt: &str, prompter: &Prompter<'_>) -> (String, bool) {
        let tokenizer = prompter.tokenizer();
        let ids = tokenizer.encode(prompt);
        if ids.len() <= self.prompt_tokens {
            return (prompt.to_string(), false);
        }
        let half = self.prompt_tokens / 2;
        (tokenizer.decode(&ids[..half]) + &tokenizer.decode(&ids[ids.len() - half..]), true)
    }
}

#[cfg(test)]
mod tests;
