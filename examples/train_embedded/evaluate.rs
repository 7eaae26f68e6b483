//! What the model can do, on a book and numbers and words that it has never seen.

use burn::tensor::{DType, Int, Tensor, TensorData};
use long_context::backend::LayerBackend;
use long_context::cache::AttentionConfig;
use long_context::models::Model;
use rand::SeedableRng;
use rand::rngs::StdRng;
use sample_attention::Preset;

use crate::batches::Batch;
use crate::error::Error;
use crate::recipe::Evaluation;
use crate::sequence::{Role, Writer};
use crate::tasks::Task;
use crate::train::{dense, losses, read};

/// Tokens run at a time.
const TOKENS: usize = 32_768;
/// The seed of the prompts; that of the training has no part in it.
const SEED: u64 = 7;
/// Length of the passages whose text is predicted.
const TEXT_LENGTH: usize = 1024;
/// How attention is computed.
pub const PRESETS: [Preset; 2] = [Preset::Dense, Preset::Default];
/// The text is divided into so many parts to tell depths apart.
pub const DEPTHS: usize = 5;

/// Answers of one task at one length under one attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Score {
    pub preset: Preset,
    pub task: Task,
    pub length: usize,
    /// Right answers and prompts at each depth, from the beginning of the text to its end.
    pub depths: [(usize, usize); DEPTHS],
}

impl Score {
    pub fn right(&self) -> usize {
        self.depths.iter().map(|(right, _)| right).sum()
    }

    pub fn prompts(&self) -> usize {
        self.depths.iter().map(|(_, prompts)| prompts).sum()
    }
}

/// What an evaluation finds.
#[derive(Debug, Clone)]
pub struct Scores {
    /// Mean negative log-likelihood of a token of the held-out book, in nats.
    pub text: f32,
    pub answers: Vec<Score>,
}

/// Runs a model of one type through all prompts.
pub struct Evaluator<'a, B: LayerBackend> {
    pub model: &'a Model<B>,
    pub writer: Writer<'a>,
    pub attention_dtype: DType,
    pub device: &'a B::Device,
}

impl<B: LayerBackend> Evaluator<'_, B> {
    /// Everything that the recipe asks for.
    ///
    /// # Errors
    ///
    /// A device that fails.
    pub fn run(&self, evaluation: &Evaluation, log: &mut dyn FnMut(String)) -> Result<Scores, Error> {
        let text = self.text(evaluation.text_tokens)?;
        log(format!("held-out text {text:.3} nats a token"));
        let mut answers = Vec::new();
        for &length in &evaluation.lengths {
            for task in Task::ASKED {
                for preset in PRESETS {
                    let score = self.answers(task, length, evaluation.prompts, preset)?;
                    log(format!(
                        "length {length:>5}  {:<18}  {preset:<7}  {} of {}",
                        task.name(),
                        score.right(),
                        score.prompts()
                    ));
                    answers.push(score);
                }
            }
        }
        Ok(Scores { text, answers })
    }

    fn text(&self, tokens: usize) -> Result<f32, Error> {
        let mut random = StdRng::seed_from_u64(SEED);
        let count = (tokens / TEXT_LENGTH).max(1);
        let (mut sum, mut predicted) = (0.0, 0);
        for chunk in (0..count).collect::<Vec<_>>().chunks(TOKENS / TEXT_LENGTH) {
            let sequences: Vec<_> =
                chunk.iter().map(|_| self.writer.write(Task::Text, TEXT_LENGTH + 1, &mut random)).collect();
            let batch = Batch::new(&sequences, (0..TEXT_LENGTH).collect());
            let dense = dense();
            let (losses, _) = losses(self.model, &batch, &dense, self.attention_dtype, self.device);
            let losses = read(losses)?;
            sum += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            predicted += losses.len();
        }
        Ok((sum / predicted as f64) as f32)
    }

    /// Every answer is right if each of its tokens is the likeliest after the right ones before: what greedy
    /// decoding would find.
    fn answers(&self, task: Task, length: usize, prompts: usize, preset: Preset) -> Result<Score, Error> {
        let mut random = StdRng::seed_from_u64(SEED ^ length as u64);
        let depths: Vec<f64> = (0..prompts).map(|at| (at as f64 + 0.5) / prompts as f64).collect();
        let attention = AttentionConfig { options: preset.options(), ..Default::default() };
        let mut score = Score { preset, task, length, depths: [(0, 0); DEPTHS] };
        for chunk in depths.chunks((TOKENS / length).max(1)) {
            let sequences: Vec<_> = chunk
                .iter()
                .map(|&depth| self.writer.write_at(task, length + 1, depth, &mut random))
                .collect();
            let batch = Batch::new(&sequences, (0..length).collect());
            let likeliest = self.likeliest(&batch, &attention)?;
            for (sequence, &depth) in chunk.iter().enumerate() {
                let tokens = sequence * length..(sequence + 1) * length;
                let asked: Vec<usize> = tokens.filter(|&at| batch.roles[at] == Role::Asked).collect();
                let right = !asked.is_empty() && asked.iter().all(|&at| likeliest[at] == batch.targets[at]);
                let (found, prompts) = &mut score.depths[(depth * DEPTHS as f64) as usize];
                *found += usize::from(right);
                *prompts += 1;
            }
        }
        Ok(score)
    }

    fn likeliest(&self, batch: &Batch, attention: &AttentionConfig) -> Result<Vec<i32>, Error> {
        let ids = TensorData::new(batch.ids.clone(), [batch.sequences, batch.length]);
        let ids = Tensor::<B, 2, Int>::from_data(ids, self.device);
        let passed = self.model.forward_sequences(ids, &batch.positions, attention, self.attention_dtype);
        let likeliest = self.model.logits(passed.hidden).argmax(2);
        let data = likeliest.try_into_data().map_err(|error| Error::Device(error.to_string()))?;
        Ok(data.iter().collect())
    }
}
