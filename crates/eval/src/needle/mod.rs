//! Keys hidden in long texts: over lengths and depths, does a model find them with sparse attention where it
//! finds them with dense attention?

mod haystack;
mod page;

use std::fmt;

use long_context::generate::Engine;
use serde::Serialize;

pub use haystack::{Haystack, NeedlePrompt, Place};

use crate::{Ask, Kept, NamedAttention, Progress, Prompter, Result, answer};

/// Chapters of a novel, to hide keys in where no other text is given.
pub const TEXT: &str = include_str!("../../../../examples/pride-and-prejudice.txt");

/// How many keys are hidden, and how many asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// One.
    Single,
    /// Three, one of which is asked for.
    Choice,
    /// Three, all asked for at once. The answer is led from one to the next.
    Several,
}

impl Variant {
    /// All variants.
    pub const ALL: [Self; 3] = [Self::Single, Self::Choice, Self::Several];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Choice => "choice",
            Self::Several => "several",
        }
    }

    /// Positions that answers take at most, with what leads from key to key.
    fn answer_tokens(self) -> usize {
        match self {
            Self::Single | Self::Choice => KEY_TOKENS,
            Self::Several => 3 * KEY_TOKENS + 2 * LEAD_TOKENS,
        }
    }
}

/// Tokens in which a key must come: its digits and some words before.
const KEY_TOKENS: usize = 16;
/// Tokens of the words between two keys, at most.
const LEAD_TOKENS: usize = 64;
/// Digits of a key.
const KEY_DIGITS: usize = 5;

impl fmt::Display for Variant {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

/// The prompts to run, and with which attention.
#[derive(Debug, Clone, Serialize)]
pub struct NeedleConfig {
    /// Every prompt is answered with each.
    pub attentions: Vec<NamedAttention>,
    /// How many keys.
    pub variants: Vec<Variant>,
    /// Tokens of the prompts.
    pub lengths: Vec<usize>,
    /// Depths in percent.
    pub depths: Vec<usize>,
    /// Prompts of each variant, length and depth.
    pub prompts: usize,
    /// Seed of all that is drawn.
    pub seed: u64,
}

impl NeedleConfig {
    /// Answers that a run takes.
    pub fn answers(&self) -> usize {
        self.places().len() * self.attentions.len()
    }

    /// Positions that an engine must hold for a run.
    pub fn capacity(&self) -> usize {
        let answer = self.variants.iter().map(|variant| variant.answer_tokens()).max().unwrap_or(0);
        self.lengths.iter().max().unwrap_or(&0) + answer
    }

    /// Whether every length has room for a text.
    ///
    /// # Errors
    ///
    /// A length without, or a missing chat format.
    pub fn check(&self, haystack: &Haystack<'_>, prompter: &Prompter<'_>) -> Result<()> {
        let length = self.lengths.iter().copied().min().unwrap_or(0);
        for &variant in &self.variants {
            haystack.prompt(Place { variant, length, depth: 0, seed: self.seed }, prompter)?;
        }
        Ok(())
    }

    fn places(&self) -> Vec<(usize, Place)> {
        let mut places = Vec::new();
        // All cells get their first prompt before any gets its second.
        for prompt in 0..self.prompts {
            for &variant in &self.variants {
                for &length in &self.lengths {
                    for &depth in &self.depths {
                        let seed = self.seed.wrapping_mul(1_000_003).wrapping_add(places.len() as u64);
                        places.push((prompt, Place { variant, length, depth, seed }));
                    }
                }
            }
        }
        places
    }

    /// Answers every prompt with every attention. `layers` is the model's number of layers.
    ///
    /// # Errors
    ///
    /// A length without room for a text, a missing chat format, or a failing device.
    pub fn run(
        self,
        engine: &mut dyn Engine,
        layers: usize,
        prompter: &Prompter<'_>,
        haystack: &Haystack<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<NeedleReport> {
        let (places, total) = (self.places(), self.answers());
        let mut report = NeedleReport { config: self, trials: Vec::with_capacity(total) };
        for (prompt, place) in places {
            let question = haystack.prompt(place, prompter)?;
            for attention in report.config.attentions.clone() {
                engine.set_attention(&attention.config());
                let (answer, found) = find(engine, &question, prompter)?;
                let tokens = question.ids.len();
                report.trials.push(Trial {
                    attention: attention.name,
                    variant: place.variant,
                    length: place.length,
                    depth: place.depth,
                    prompt,
                    tokens,
                    found,
                    keys: question.keys.clone(),
                    answer,
                    kept: Kept::of(&engine.take_reports()?, layers, tokens),
                });
                if progress(report.trials.len(), total).is_break() {
                    return Ok(report);
                }
            }
        }
        Ok(report)
    }
}

/// The answer to a question, up to the number that each key should be, and how many keys are right.
fn find(
    engine: &mut dyn Engine,
    question: &NeedlePrompt,
    prompter: &Prompter<'_>,
) -> Result<(String, usize)> {
    let tokenizer = prompter.tokenizer();
    let mut prompt = question.ids.clone();
    let (mut text, mut found) = (String::new(), 0);
    for (index, key) in question.keys.iter().enumerate() {
        if let Some(lead) = index.checked_sub(1).map(|before| &question.leads[before]) {
            prompt.extend(lead);
            text += &tokenizer.decode(lead);
        }
        let guesses = [tokenizer.encode(key)];
        let ask = Ask {
            prompt: &prompt,
            keep: index > 0,
            guesses: &guesses,
            max_tokens: KEY_TOKENS,
            min_tokens: 0,
            stop: prompter.stop_ids(),
        };
        let ids = answer(engine, &ask, &mut |ids| number(&tokenizer.decode(ids)).is_some())?;
        let part = tokenizer.decode(&ids);
        found += usize::from(number(&part) == Some(key.as_str()));
        text += &part;
        prompt.extend(ids);
    }
    Ok((text, found))
}

/// The first number in a text that has as many digits as a key, or more.
fn number(text: &str) -> Option<&str> {
    text.split(|c: char| !c.is_ascii_digit()).find(|number| number.len() >= KEY_DIGITS)
}

/// One answer.
#[derive(Debug, Clone, Serialize)]
pub struct Trial {
    /// Name of the attention.
    pub attention: String,
    /// How many keys.
    pub variant: Variant,
    /// Tokens asked for.
    pub length: usize,
    /// Depth in percent.
    pub depth: usize,
    /// Number of the prompt in its cell.
    pub prompt: usize,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// The keys asked for.
    pub keys: Vec<String>,
    /// Keys that are right.
    pub found: usize,
    /// The answer, which ends with the number that should be the last key.
    pub answer: String,
    /// What the attention kept.
    #[serde(flatten)]
    pub kept: Kept,
}

/// All answers of a run.
#[derive(Debug, Clone, Serialize)]
pub struct NeedleReport {
    /// What was run.
    #[serde(flatten)]
    pub config: NeedleConfig,
    /// The answers, as they came.
    pub trials: Vec<Trial>,
}

impl NeedleReport {
    /// The answers with one attention.
    pub fn of<'a>(&'a self, attention: &'a str) -> impl Iterator<Item = &'a Trial> {
        self.trials.iter().filter(move |trial| trial.attention == attention)
    }

    /// Keys found, and keys asked for, over the answers that `choose` takes.
    pub fn keys(&self, attention: &str, choose: impl Fn(&Trial) -> bool) -> (usize, usize) {
        let chosen = self.of(attention).filter(|trial| choose(trial));
        chosen.fold((0, 0), |(found, asked), trial| (found + trial.found, asked + trial.keys.len()))
    }

    /// Keys that dense attention finds and this one loses, and the other way round, prompt by prompt; `None`
    /// where dense attention was not run.
    pub fn against_dense(&self, attention: &str, variant: Variant) -> Option<(usize, usize)> {
        let dense = self.config.attentions.iter().find(|attention| attention.is_dense())?;
        let pairs = self.of(&dense.name).filter(|trial| trial.variant == variant).filter_map(|dense| {
            let place = |trial: &Trial| (trial.variant, trial.length, trial.depth, trial.prompt);
            let other = self.of(attention).find(|trial| place(trial) == place(dense))?;
            Some((dense.found.saturating_sub(other.found), other.found.saturating_sub(dense.found)))
        });
        Some(pairs.fold((0, 0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1)))
    }

    /// The keys that an attention finds of those of a variant, and beside dense attention how many it loses and
    /// gains.
    pub fn tally(&self, attention: &NamedAttention, variant: Variant) -> String {
        let (found, asked) = self.keys(&attention.name, |trial| trial.variant == variant);
        match self.against_dense(&attention.name, variant) {
            Some((lost, gained)) if !attention.is_dense() => format!("{found}/{asked} -{lost} +{gained}"),
            _ => format!("{found}/{asked}"),
        }
    }

    /// Share of the keys found in a cell; `None` where nothing was run.
    pub fn cell(&self, attention: &str, variant: Variant, length: usize, depth: usize) -> Option<f64> {
        let (found, asked) = self
            .keys(attention, |trial| (trial.variant, trial.length, trial.depth) == (variant, length, depth));
        (asked > 0).then(|| found as f64 / asked as f64)
    }

    /// One row an attention: what it kept, and the keys found of each variant.
    pub fn rows(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let head = ["attention", "density", "recall", "minimum"].map(String::from).into_iter();
        let head = head.chain(self.config.variants.iter().map(Variant::to_string)).collect();
        let row = |attention: &NamedAttention| {
            let name = attention.name.as_str();
            let kept = Kept::mean(self.of(name).map(|trial| trial.kept));
            let numbers = [kept.density, kept.recall, kept.recall_min].map(|value| format!("{value:.3}"));
            let keys = self.config.variants.iter().map(|&variant| self.tally(attention, variant));
            [name.to_string()].into_iter().chain(numbers).chain(keys).collect()
        };
        (head, self.config.attentions.iter().map(row).collect())
    }
}

#[cfg(test)]
mod tests;
