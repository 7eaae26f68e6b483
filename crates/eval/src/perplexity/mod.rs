//! How well a text is predicted, by position, and how far sparse attention moves the prediction from that of
//! dense attention.

mod page;

use long_context::generate::Engine;
use long_context::sampler::most_likely;
use rayon::prelude::*;
use sample_attention::Preset;
use serde::Serialize;

use crate::{Error, Kept, NamedAttention, Progress, Result};

/// Rows of logits held at a time.
const ROWS: usize = 128;

/// What to compare.
///
/// The host holds the hidden states of one window for every attention, `tokens x hidden x 4` bytes each, and
/// two slices of 128 rows of logits at a time: 20 MB an attention for 8,192 tokens of a model of width 576.
#[derive(Debug, Clone, Serialize)]
pub struct PerplexityConfig {
    /// The first is what the others are compared with.
    pub attentions: Vec<NamedAttention>,
    /// Tokens of a window.
    pub tokens: usize,
    /// Windows of the text, one after the other, each on its own.
    pub windows: usize,
    /// Ranges of positions to tell apart.
    pub buckets: usize,
}

impl PerplexityConfig {
    /// Compares with dense attention, which is added where it is missing.
    pub fn new(attentions: Vec<NamedAttention>, tokens: usize, windows: usize, buckets: usize) -> Self {
        let (mut all, others): (Vec<_>, Vec<_>) =
            attentions.into_iter().partition(|attention| attention.is_dense());
        if all.is_empty() {
            all.push(Preset::Dense.into());
        }
        all.extend(others);
        Self { attentions: all, tokens, windows, buckets }
    }

    /// Steps that a run takes.
    pub fn steps(&self) -> usize {
        self.windows * self.attentions.len()
    }

    /// Whether `text` (its ids) fills all windows, each after `prefix`.
    ///
    /// # Errors
    ///
    /// A window too short for its buckets, or a text that is too short.
    pub fn check(&self, prefix: &[u32], text: &[u32]) -> Result<()> {
        let fresh = self.tokens.saturating_sub(prefix.len());
        if fresh <= self.buckets {
            let expected = format!("more than {}", self.buckets + prefix.len());
            return Err(Error::invalid("tokens of a window", self.tokens, expected));
        }
        if text.len() < fresh * self.windows {
            let expected = format!("at least {} ({} windows of {fresh})", fresh * self.windows, self.windows);
            return Err(Error::invalid("text", format!("{} tokens", text.len()), expected));
        }
        Ok(())
    }

    /// Runs all windows of `text` (its ids), each after `prefix`. `layers` is the model's number of layers.
    ///
    /// # Errors
    ///
    /// Those of [`check`](Self::check), or a failing device.
    pub fn run(
        self,
        engine: &mut dyn Engine,
        layers: usize,
        prefix: &[u32],
        text: &[u32],
        progress: &mut Progress<'_>,
    ) -> Result<PerplexityReport> {
        self.check(prefix, text)?;
        let fresh = self.tokens - prefix.len();
        let mut totals = vec![Total::new(self.buckets); self.attentions.len()];
        let mut done = 0;
        'windows: for window in text.chunks_exact(fresh).take(self.windows) {
            let ids = [prefix, window].concat();
            let mut states = Vec::new();
            for (attention, total) in self.attentions.iter().zip(&mut totals) {
                engine.truncate(0);
                engine.set_attention(&attention.config());
                states.push(engine.hidden(&ids)?);
                total.kept.push(Kept::of(&engine.take_reports()?, layers, ids.len()));
                done += 1;
                if progress(done, self.steps()).is_break() {
                    break 'windows;
                }
            }
            self.compare(engine, prefix.len(), &ids, &states, &mut totals)?;
        }
        let results = self.attentions.iter().zip(&totals);
        let results = results.map(|(attention, total)| total.result(&attention.name, fresh)).collect();
        Ok(PerplexityReport { config: self, results })
    }

    /// Adds what the rows of a window tell to the totals.
    fn compare(
        &self,
        engine: &mut dyn Engine,
        prefix: usize,
        ids: &[u32],
        states: &[Vec<f32>],
        totals: &mut [Total],
    ) -> Result<()> {
        let width = states[0].len() / ids.len();
        // The last row predicts what is not there; so do those before the text.
        let first = prefix.saturating_sub(1);
        for start in (first..ids.len() - 1).step_by(ROWS) {
            let end = (start + ROWS).min(ids.len() - 1);
            let dense = engine.project(&states[0][start * width..end * width])?;
            let vocab = dense.len() / (end - start);
            for (index, (state, total)) in states.iter().zip(&mut *totals).enumerate() {
                let logits = match index {
                    0 => dense.clone(),
                    _ => engine.project(&state[start * width..end * width])?,
                };
                let pairs = dense.par_chunks_exact(vocab).zip(logits.par_chunks_exact(vocab));
                let rows: Vec<Row> = pairs
                    .enumerate()
                    .map(|(row, (dense, other))| Row::of(dense, other, ids[start + row + 1] as usize))
                    .collect();
                for (row, found) in rows.into_iter().enumerate() {
                    let bucket = (start + row - first) * self.buckets / (ids.len() - 1 - first);
                    total.buckets[bucket].add(&found);
                }
            }
        }
        Ok(())
    }
}

/// What one row of logits tells.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    /// Negative log-likelihood of the token that follows, in nats.
    loss: f64,
    /// Kullback-Leibler divergence of the other distribution from the dense one, in nats.
    divergence: f64,
    /// Whether both find the same token most likely.
    agrees: bool,
}

impl Row {
    fn of(dense: &[f32], other: &[f32], target: usize) -> Self {
        let (of_dense, of_other) = (log_sum_exp(dense), log_sum_exp(other));
        let divergence = dense
            .iter()
            .zip(other)
            .map(|(&dense, &other)| {
                let log_p = f64::from(dense) - of_dense;
                log_p.exp() * (log_p - (f64::from(other) - of_other))
            })
            .sum::<f64>();
        Self {
            loss: of_other - f64::from(other[target]),
            divergence: divergence.max(0.0),
            agrees: most_likely(dense) == most_likely(other),
        }
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|&logit| f64::from((logit - max).exp())).sum::<f64>().ln()
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    rows: usize,
    loss: f64,
    divergence: f64,
    agreed: usize,
}

impl Sum {
    fn add(&mut self, row: &Row) {
        self.rows += 1;
        self.loss += row.loss;
        self.divergence += row.divergence;
        self.agreed += usize::from(row.agrees);
    }

    fn quality(&self) -> Quality {
        let rows = self.rows.max(1) as f64;
        Quality {
            tokens: self.rows,
            perplexity: (self.loss / rows).exp(),
            divergence: self.divergence / rows,
            agreement: self.agreed as f64 / rows,
        }
    }
}

#[derive(Debug, Clone)]
struct Total {
    buckets: Vec<Sum>,
    kept: Vec<Kept>,
}

impl Total {
    fn new(buckets: usize) -> Self {
        Self { buckets: vec![Sum::default(); buckets], kept: Vec::new() }
    }

    fn result(&self, attention: &str, tokens: usize) -> PerplexityResult {
        let all = self.buckets.iter().fold(Sum::default(), |all, sum| Sum {
            rows: all.rows + sum.rows,
            loss: all.loss + sum.loss,
            divergence: all.divergence + sum.divergence,
            agreed: all.agreed + sum.agreed,
        });
        let count = self.buckets.len();
        let bucket = |(index, sum): (usize, &Sum)| Bucket {
            start: index * tokens / count,
            end: (index + 1) * tokens / count,
            quality: sum.quality(),
        };
        PerplexityResult {
            attention: attention.to_string(),
            quality: all.quality(),
            kept: Kept::mean(self.kept.iter().copied()),
            buckets: self.buckets.iter().enumerate().map(bucket).collect(),
        }
    }
}

/// How a stretch of text is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quality {
    /// Tokens predicted.
    pub tokens: usize,
    /// Exponential of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence from the dense prediction, in nats.
    pub divergence: f64,
    /// Share of the tokens where both find the same one most likely.
    pub agreement: f64,
}

/// A range of positions.
#[derive(Debug, Clone, Serialize)]
pub struct Bucket {
    /// First position of the text.
    pub start: usize,
    /// The position after the last.
    pub end: usize,
    /// How it is predicted.
    #[serde(flatten)]
    pub quality: Quality,
}

/// What one attention makes of the text.
#[derive(Debug, Clone, Serialize)]
pub struct PerplexityResult {
    /// Name of the attention.
    pub attention: String,
    /// Over all positions.
    #[serde(flatten)]
    pub quality: Quality,
    /// What it kept.
    #[serde(flatten)]
    pub kept: Kept,
    /// By position.
    pub buckets: Vec<Bucket>,
}

/// All attentions on the same text.
#[derive(Debug, Clone, Serialize)]
pub struct PerplexityReport {
    /// What was run.
    #[serde(flatten)]
    pub config: PerplexityConfig,
    /// One result an attention, the dense one first.
    pub results: Vec<PerplexityResult>,
}

impl PerplexityReport {
    /// By how much a perplexity is above the dense one, in percent.
    pub fn excess(&self, result: &PerplexityResult) -> f64 {
        100.0 * (result.quality.perplexity / self.results[0].quality.perplexity - 1.0)
    }

    /// One row an attention.
    pub fn rows(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let head =
            vec!["attention", "density", "recall", "minimum", "perplexity", "to dense", "KL", "same choice"];
        let row = |result: &PerplexityResult| {
            let PerplexityResult { attention, quality, kept, .. } = result;
            vec![
                attention.clone(),
                format!("{:.3}", kept.density),
                format!("{:.3}", kept.recall),
                format!("{:.3}", kept.recall_min),
                format!("{:.3}", quality.perplexity),
                format!("{:+.2}%", self.excess(result)),
                format!("{:.4}", quality.divergence),
                format!("{:.3}", quality.agreement),
            ]
        };
        (head, self.results.iter().map(row).collect())
    }

    /// One row a range of positions: the perplexities, then the divergences of all but the dense one.
    pub fn positions(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let mut head = vec!["positions".to_string()];
        head.extend(self.results.iter().map(|result| result.attention.clone()));
        head.extend(self.results[1..].iter().map(|result| format!("KL {}", result.attention)));
        let row = |index: usize| {
            let Bucket { start, end, .. } = self.results[0].buckets[index];
            let at = |result: &PerplexityResult| result.buckets[index].quality;
            let mut row = vec![format!("{start}-{}", end - 1)];
            row.extend(self.results.iter().map(|result| format!("{:.3}", at(result).perplexity)));
            row.extend(self.results[1..].iter().map(|result| format!("{:.4}", at(result).divergence)));
            row
        };
        (head, (0..self.config.buckets).map(row).collect())
    }
}

#[cfg(test)]
mod tests;
