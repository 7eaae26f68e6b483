//! Choosing the next token.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use thiserror::Error;

/// How the next token is drawn from the logits. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the `k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this likely, relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits of tokens already seen, multiplies negative ones; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// A sampler setting out of its range.
#[derive(Debug, Clone, PartialEq, Error)]
#[error("{field}: found {found}, expected {expected}")]
pub struct SamplerError {
    field: &'static str,
    found: f32,
    expected: &'static str,
}

impl SamplerConfig {
    /// Initializes the sampler.
    ///
    /// # Errors
    ///
    /// A setting out of its range.
    pub fn init(self) -> Result<Sampler, SamplerError> {
        let check = |field, found: f32, fits: bool, expected| {
            if fits { Ok(()) } else { Err(SamplerError { field, found, expected }) }
        };
        let (t, p, m, r) = (self.temperature, self.top_p, self.min_p, self.repetition_penalty);
        check("temperature", t, t.is_finite() && t >= 0.0, "a finite number, at least 0")?;
        check("top_p", p, p > 0.0 && p <= 1.0, "a number above 0 and up to 1")?;
        check("min_p", m, (0.0..=1.0).contains(&m), "a number from 0 to 1")?;
        check("repetition_penalty", r, r.is_finite() && r > 0.0, "a finite number above 0")?;
        let rng = StdRng::seed_from_u64(self.seed);
        Ok(Sampler { config: self, rng })
    }
}

/// Draws tokens. Made by [`SamplerConfig::init`].
#[derive(Debug)]
pub struct Sampler {
    config: SamplerConfig,
    rng: StdRng,
}

impl Sampler {
    /// Draws the next token after `history`.
    ///
    /// Ties go to the lower id; a NaN is never drawn.
    pub fn sample(&mut self, mut logits: Vec<f32>, history: &[u32]) -> u32 {
        self.penalize(&mut logits, history);
        if self.config.temperature == 0.0 {
            return most_likely(&logits);
        }
        let mut tokens: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .filter(|(_, logit)| !logit.is_nan())
            .map(|(id, &logit)| (id as u32, logit))
            .collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let Some(&(best, max)) = tokens.first() else { return 0 };
        if self.config.top_k > 0 {
            tokens.truncate(self.config.top_k);
        }
        if !max.is_finite() {
            return best;
        }
        for token in &mut tokens {
            token.1 = ((token.1 - max) / self.config.temperature).exp();
        }
        // Cut by top_p over what top_k left, then by min_p, in the order of the usual implementations.
        let total: f32 = tokens.iter().map(|token| token.1).sum();
        let mut reached = 0.0;
        let kept = tokens.iter().position(|token| {
            reached += token.1;
            reached >= self.config.top_p * total
        });
        tokens.truncate(kept.map_or(tokens.len(), |last| last + 1));
        tokens.retain(|token| token.1 >= self.config.min_p);

        let total: f32 = tokens.iter().map(|token| token.1).sum();
        let mut left = self.rng.random::<f32>() * total;
        for &(id, weight) in &tokens {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        tokens.last().map_or(best, |token| token.0)
    }

    fn penalize(&self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.config.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = vec![false; logits.len()];
        for &id in history {
            let id = id as usize;
            if id < logits.len() && !std::mem::replace(&mut seen[id], true) {
                logits[id] = if logits[id] > 0.0 { logits[id] / penalty } else { logits[id] * penalty };
            }
        }
    }
}

/// The index of the largest value, the lowest among equals.
pub fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if logits[best].is_nan() || *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(config: SamplerConfig, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = config.init().unwrap();
        (0..n).map(|_| sampler.sample(logits.to_vec(), &[])).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_no_nan() {
        assert_eq!(most_likely(&[f32::NAN, 1.0, 3.0, 3.0]), 2);
        assert_eq!(most_likely(&[f32::NEG_INFINITY, f32::NEG_INFINITY]), 0);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, (2.0f32).ln(), (5.0f32).ln()];
        let config = SamplerConfig { temperature: 1.0, seed: 7, ..Default::default() };
        let drawn = draws(config, &logits, 8000);
        for (id, expected) in [(0, 1000.0), (1, 2000.0), (2, 5000.0)] {
            let count = drawn.iter().filter(|&&d| d == id).count() as f64;
            assert!((count - expected).abs() < 200.0, "token {id}: {count} draws, expected about {expected}");
        }
    }

    #[test]
    fn a_seed_repeats_its_draws() {
        let config = SamplerConfig { temperature: 1.0, seed: 3, ..Default::default() };
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        assert_eq!(draws(config.clone(), &logits, 40), draws(config, &logits, 40));
    }

    #[test]
    fn cuts_keep_what_they_say() {
        let logits = [0.1f32.ln(), 0.5f32.ln(), 0.15f32.ln(), 0.25f32.ln()];
        let base = SamplerConfig { temperature: 1.0, ..Default::default() };
        let allowed = |config, expected: &[u32]| {
            let mut seen = draws(config, &logits, 500);
            seen.sort();
            seen.dedup();
            assert_eq!(seen, expected);
        };
        allowed(SamplerConfig { top_k: 2, ..base.clone() }, &[1, 3]);
        allowed(SamplerConfig { top_p: 0.7, ..base.clone() }, &[1, 3]);
        allowed(SamplerConfig { min_p: 0.29, ..base.clone() }, &[1, 2, 3]);
        allowed(base, &[0, 1, 2, 3]);
    }

    #[test]
    fn the_repetition_penalty_counts_each_token_once() {
        let mut sampler = SamplerConfig { repetition_penalty: 2.0, ..Default::default() }.init().unwrap();
        assert_eq!(sampler.sample(vec![3.0, 2.0], &[0, 0, 0]), 1);
        assert_eq!(sampler.sample(vec![-1.0, -1.5], &[0, 9]), 1);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let error = SamplerConfig { top_p: 0.0, ..Default::default() }.init().unwrap_err();
        assert_eq!(error.to_string(), "top_p: found 0, expected a number above 0 and up to 1");
        assert!(SamplerConfig { temperature: f32::NAN, ..Default::default() }.init().is_err());
    }
}
