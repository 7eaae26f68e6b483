//! Answers kept in a file, so that a run can go on where another stopped.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Kept, Result};

/// What tells one answer from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The model.
    pub model: String,
    /// Name of the attention.
    pub attention: String,
    /// Tokens that prompts were cut to.
    pub prompt_tokens: usize,
    /// The data set.
    pub dataset: String,
    /// The question.
    pub id: String,
}

/// One answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// Whose it is.
    #[serde(flatten)]
    pub key: Key,
    /// The answer.
    #[serde(rename = "pred")]
    pub answer: String,
    /// What was expected.
    pub answers: Vec<String>,
    /// Its score, from 0 to 1.
    pub score: f64,
    /// Words or characters of the text.
    pub length: usize,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Whether the prompt lost its middle.
    pub truncated: bool,
    /// What the attention kept.
    #[serde(flatten)]
    pub kept: Kept,
}

/// A file of answers, one a line.
pub struct Results {
    path: PathBuf,
    file: File,
    held: HashSet<Key>,
    answers: Vec<Answer>,
}

impl Results {
    /// Opens a file, or makes it. A last line that was not written whole is taken away.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or written, or with other lines in it.
    pub fn open(path: &Path) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::file(path)(error)),
        };
        let whole = text.rfind('\n').map_or(0, |last| last + 1);
        let mut answers = Vec::new();
        for (index, line) in text[..whole].lines().enumerate() {
            let subject = || format!("{} line {}", path.display(), index + 1);
            let answer: Answer = serde_json::from_str(line)
                .map_err(|error| Error::invalid(subject(), error, "an answer of an earlier run"))?;
            answers.push(answer);
        }
        let options = OpenOptions::new().create(true).append(true).open(path);
        let file = options.map_err(Error::file(path))?;
        if whole < text.len() {
            file.set_len(whole as u64).map_err(Error::file(path))?;
        }
        let held = answers.iter().map(|answer| answer.key.clone()).collect();
        Ok(Self { path: path.to_path_buf(), file, held, answers })
    }

    /// Whether a question was answered.
    pub fn holds(&self, key: &Key) -> bool {
        self.held.contains(key)
    }

    /// Writes an answer.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn add(&mut self, answer: Answer) -> Result<()> {
        let line = serde_json::to_string(&answer).map_err(|error| Error::file(&self.path)(error.into()))?;
        self.file.write_all((line + "\n").as_bytes()).map_err(Error::file(&self.path))?;
        self.held.insert(answer.key.clone());
        self.answers.push(answer);
        Ok(())
    }

    /// The scores of one model's answers.
    pub fn scores(&self, model: &str, prompt_tokens: usize) -> Scores {
        let mine = |answer: &&Answer| answer.key.model == model && answer.key.prompt_tokens == prompt_tokens;
        let mut cells: BTreeMap<String, BTreeMap<String, Cell>> = BTreeMap::new();
        for answer in self.answers.iter().filter(mine) {
            let row = cells.entry(answer.key.dataset.clone()).or_default();
            row.entry(answer.key.attention.clone()).or_default().add(answer);
        }
        Scores { datasets: cells }
    }
}

/// Answers of one data set with one attention.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Cell {
    answers: usize,
    score: f64,
    density: f64,
    /// By words or characters of the text: below 4000, below 8000, and from there on, as the benchmark cuts.
    lengths: [(usize, f64); 3],
}

impl Cell {
    fn add(&mut self, answer: &Answer) {
        let mean = |mean: f64, count: usize, value: f64| mean + (value - mean) / (count + 1) as f64;
        self.score = mean(self.score, self.answers, 100.0 * answer.score);
        self.density = mean(self.density, self.answers, answer.kept.density);
        self.answers += 1;
        let range = usize::from(answer.length >= 4000) + usize::from(answer.length >= 8000);
        let (count, score) = &mut self.lengths[range];
        *score = mean(*score, *count, 100.0 * answer.score);
        *count += 1;
    }
}

/// Scores by data set and attention, from 0 to 100.
#[derive(Debug, Clone, Serialize)]
pub struct Scores {
    datasets: BTreeMap<String, BTreeMap<String, Cell>>,
}

impl Scores {
    /// One row a data set, and the mean over the data sets last.
    pub fn rows(&self, attentions: &[String]) -> (Vec<String>, Vec<Vec<String>>) {
        let head = ["data set", "answers"].map(String::from).into_iter().chain(attentions.iter().cloned());
        let mut rows = Vec::new();
        let mut sums = vec![(0.0, 0usize); attentions.len()];
        for (dataset, cells) in &self.datasets {
            let most = cells.values().map(|cell| cell.answers).max().unwrap_or(0);
            let mut row = vec![dataset.clone(), most.to_string()];
            for (attention, (sum, count)) in attentions.iter().zip(&mut sums) {
                let Some(cell) = cells.get(attention) else {
                    row.push("-".to_string());
                    continue;
                };
                row.push(format!("{:.2}", cell.score));
                *sum += cell.score;
                *count += 1;
            }
            rows.push(row);
        }
        let means = sums.iter().map(|&(sum, count)| match count {
            0 => "-".to_string(),
            _ => format!("{:.2}", sum / count as f64),
        });
        let mean = ["mean".to_string(), String::new()].into_iter().chain(means).collect();
        rows.push(mean);
        (head.collect(), rows)
    }
}
