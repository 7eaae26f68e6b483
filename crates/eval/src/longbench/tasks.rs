//! The data sets: their prompts, answers and metrics.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Deserialize;

use super::{Metric, Question};

/// What the benchmark says of a data set.
#[derive(Debug, Clone, Deserialize)]
pub struct Task {
    /// How answers are scored.
    pub metric: Metric,
    /// Tokens of an answer.
    pub max_tokens: usize,
    /// Whether the prompt is asked as a chat message; else it is a text to continue.
    pub chat: bool,
    /// Whether the first line of an answer alone counts.
    pub first_line: bool,
    /// Whether an answer ends with its first line, which is not empty: a summary of a dialogue would be
    /// followed by another dialogue otherwise.
    pub one_line: bool,
    /// The prompt, with `{context}` and `{input}` in it.
    pub prompt: String,
}

static TASKS: &str = include_str!("../../data/longbench.json");

fn tasks() -> &'static BTreeMap<String, Task> {
    static READ: OnceLock<BTreeMap<String, Task>> = OnceLock::new();
    READ.get_or_init(|| serde_json::from_str(TASKS).unwrap_or_default())
}

impl Task {
    /// The task of a data set; those of the even-length series end in `_e`.
    pub fn of(dataset: &str) -> Option<&'static Self> {
        tasks().get(dataset).or_else(|| tasks().get(dataset.strip_suffix("_e")?))
    }

    /// All data sets, for messages.
    pub(super) fn names() -> String {
        tasks().keys().cloned().collect::<Vec<_>>().join(", ")
    }

    /// The prompt of a question.
    pub fn fill(&self, question: &Question) -> String {
        let mut text = String::with_capacity(self.prompt.len() + question.context.len());
        // What is filled in is not looked at again: a text may hold braces.
        let mut rest = self.prompt.as_str();
        while let Some(at) = rest.find('{') {
            text.push_str(&rest[..at]);
            let fields = [("{context}", &question.context), ("{input}", &question.input)];
            let field = fields.into_iter().find(|(name, _)| rest[at..].starts_with(name));
            let (name, value) = field.map_or(("{", "{"), |(name, value)| (name, value.as_str()));
            text.push_str(value);
            rest = &rest[at + name.len()..];
        }
        text + rest
    }

    /// The best score of an answer, from 0 to 1, over those expected.
    pub fn score(&self, answer: &str, question: &Question) -> f64 {
        let answer = match self.first_line {
            true => answer.trim_start_matches('\n').split('\n').next().unwrap_or(""),
            false => answer,
        };
        let classes = question.all_classes.as_deref().unwrap_or(&[]);
        let scores = question.answers.iter().map(|expected| self.metric.score(answer, expected, classes));
        scores.fold(0.0, f64::max)
    }
}
