//! What is trained, and how: everything in `recipe.json`.

use std::path::Path;

use long_context::models::internlm2::{InternLm2Config, RopeScaling};
use serde::Deserialize;

use crate::error::Error;
use crate::tasks::Task;

/// The recipe of the embedded model.
pub const EMBEDDED: &str = include_str!("recipe.json");

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub seed: u64,
    pub model: Dimensions,
    pub optimizer: Optimizer,
    pub loss: LossWeights,
    /// Run one after another.
    pub stages: Vec<Stage>,
    pub evaluation: Evaluation,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dimensions {
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub intermediate_size: usize,
    pub rope_theta: f64,
    /// Positions that the model is said to be trained for.
    pub context: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// After the warm-up; from there it falls along a cosine.
    pub learning_rate: f64,
    pub last_learning_rate: f64,
    pub warm_up_steps: usize,
    pub weight_decay: f32,
    pub beta_2: f32,
    /// Largest norm of one parameter's gradient.
    pub clip_norm: f32,
}

/// Weights of the mean losses of the three kinds of tokens that are predicted.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossWeights {
    /// Tokens of the books.
    pub text: f32,
    /// Tokens of something that stood in the sequence before.
    pub copied: f32,
    /// Tokens of an answer.
    pub asked: f32,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    pub steps: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Positions that the tokens of a sequence are spread over, with a few gaps; at least `length`.
    pub span: usize,
    /// Weight of the share of attention that goes far; none where it does not count.
    pub far: Option<f32>,
    /// Shares of the tasks.
    pub mix: Mix,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mix {
    pub text: u32,
    pub copy: u32,
    pub passage: u32,
    pub key: u32,
    pub keys: u32,
    pub word: u32,
    pub variable: u32,
}

impl Mix {
    /// Each task with its share.
    pub fn shares(&self) -> [(Task, u32); Task::ALL.len()] {
        let Self { text, copy, passage, key, keys, word, variable } = *self;
        [
            (Task::Text, text),
            (Task::Copy, copy),
            (Task::Passage, passage),
            (Task::Key, key),
            (Task::Keys, keys),
            (Task::Word, word),
            (Task::Variable, variable),
        ]
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Lengths of the prompts.
    pub lengths: Vec<usize>,
    /// Prompts of each task and length, spread over all depths.
    pub prompts: usize,
    /// Tokens of the held-out book to predict.
    pub text_tokens: usize,
}

/// Sequences shorter than this have no room for a question and its answer.
const LEAST_LENGTH: usize = 128;

impl Recipe {
    /// The recipe of a file, or the embedded model's.
    pub fn read(file: Option<&Path>) -> Result<Self, Error> {
        let (name, text) = match file {
            None => ("recipe.json".to_string(), EMBEDDED.to_string()),
            Some(file) => (file.display().to_string(), Error::read(file)?),
        };
        let refuse = |found: String| Error::Content { file: name.clone(), found };
        let recipe: Self = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        match recipe.fault() {
            None => Ok(recipe),
            Some(fault) => Err(refuse(fault)),
        }
    }

    fn fault(&self) -> Option<String> {
        let Dimensions { hidden_size, heads, kv_heads, .. } = self.model;
        let wrong = |field: &str, found: usize, expected: &str| {
            Some(format!("{field}: found {found}, expected {expected}"))
        };
        if heads == 0 || !hidden_size.is_multiple_of(2 * heads) {
            return wrong("model.heads", heads, "heads of an even width, of hidden_size in all");
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return wrong("model.kv_heads", kv_heads, "a divisor of heads");
        }
        for (index, stage) in self.stages.iter().enumerate() {
            let field = |name: &str| format!("stages[{index}].{name}");
            if stage.length < LEAST_LENGTH {
                return wrong(&field("length"), stage.length, &format!("at least {LEAST_LENGTH}"));
            }
            if stage.batch == 0 {
                return wrong(&field("batch"), 0, "at least 1");
            }
            if stage.span < stage.length {
                return wrong(&field("span"), stage.span, "at least length");
            }
            if stage.mix.shares().iter().all(|(_, share)| *share == 0) {
                return wrong(&field("mix"), 0, "a task with a share above 0");
            }
        }
        let short = self.evaluation.lengths.iter().find(|&&length| length < LEAST_LENGTH);
        short.and_then(|&length| wrong("evaluation.lengths", length, &format!("at least {LEAST_LENGTH}")))
    }

    /// Dimensions of the model over a vocabulary.
    pub fn model(&self, vocab_size: usize) -> InternLm2Config {
        let model = &self.model;
        InternLm2Config {
            hidden_size: model.hidden_size,
            num_layers: model.layers,
            num_attention_heads: model.heads,
            num_kv_heads: model.kv_heads,
            intermediate_size: model.intermediate_size,
            vocab_size,
            rms_norm_eps: 1e-5,
            rope_theta: model.rope_theta,
            rope_scaling: RopeScaling::None,
            max_position_embeddings: model.context,
            bias: false,
        }
    }

    pub fn steps(&self) -> usize {
        self.stages.iter().map(|stage| stage.steps).sum()
    }

    /// The learning rate of a step: a linear warm-up, then a cosine down to the last.
    pub fn learning_rate(&self, step: usize) -> f64 {
        let Optimizer { learning_rate, last_learning_rate, warm_up_steps, .. } = self.optimizer;
        if step < warm_up_steps {
            return learning_rate * (step + 1) as f64 / warm_up_steps as f64;
        }
        let all = self.steps().saturating_sub(warm_up_steps).max(1);
        let share = ((step - warm_up_steps) as f64 / all as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * share).cos());
        last_learning_rate + (learning_rate - last_learning_rate) * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_recipe_fits_ten_megabytes() {
        let recipe = Recipe::read(None).unwrap();
        let parameters: u64 = recipe.model(2048).tensors().iter().map(|tensor| tensor.elements()).sum();
        assert!(2 * parameters < 10_000_000, "{parameters} parameters");
    }

    #[test]
    fn the_learning_rate_rises_and_falls() {
        let recipe = Recipe::read(None).unwrap();
        let Optimizer { learning_rate, last_learning_rate, warm_up_steps, .. } = recipe.optimizer;
        let rates: Vec<f64> = (0..=recipe.steps()).map(|step| recipe.learning_rate(step)).collect();
        assert!(rates[0] > 0.0 && rates[..warm_up_steps].is_sorted());
        assert!((rates[warm_up_steps] - learning_rate).abs() < 1e-9);
        assert!(rates[warm_up_steps..].is_sorted_by(|a, b| a >= b));
        assert!((rates[recipe.steps()] - last_learning_rate).abs() < 1e-9);
    }

    #[test]
    fn a_recipe_that_cannot_be_followed_is_refused() {
        let with = |from: &str, to: &str| {
            let text = EMBEDDED.replacen(from, to, 1);
            assert_ne!(text, EMBEDDED);
            serde_json::from_str::<Recipe>(&text)
                .map_err(|error| error.to_string())
                .map(|recipe| recipe.fault())
        };
        assert!(with("\"seed\"", "\"sead\"").unwrap_err().contains("sead"));
        let cases = [
            ("\"heads\": 4", "\"heads\": 3", "model.heads: found 3"),
            ("\"kv_heads\": 2", "\"kv_heads\": 3", "model.kv_heads: found 3"),
            ("\"length\": 256", "\"length\": 20", "stages[0].length: found 20, expected at least 128"),
            ("\"span\": 256", "\"span\": 100", "stages[0].span: found 100, expected at least length"),
            ("\"lengths\": [1024,", "\"lengths\": [24,", "evaluation.lengths: found 24"),
        ];
        for (from, to, message) in cases {
            let fault = with(from, to).unwrap().unwrap_or_default();
            assert!(fault.starts_with(message), "{fault}");
        }
    }
}
