//! Prefill in chunks, decode token by token, stop where asked.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use thiserror::Error;

use crate::backend::LayerBackend;
use crate::cache::{AttentionConfig, KvCache, LayerReport, Observer, StandIn};
use crate::models::{Model, ModelConfig, ModelError};
use crate::sampler::Sampler;

pub use crate::stop::StopStrings;

/// Most rows of logits in memory at a time: a vocabulary is wide.
const LOGIT_ROWS: usize = 256;

/// What ends a generation early.
#[derive(Debug, Error)]
pub enum GenerateError {
    /// The input does not fit the model or the cache.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device failed, for want of memory most often.
    #[error("device: {0}")]
    Device(String),
}

/// A model at work on one sequence, behind one boundary whatever the backend.
pub trait Engine {
    /// Adds tokens of a context of `context` positions to the sequence, in chunks; the logits after
    /// the last one, `[vocab]`. `on_chunk` hears how many tokens are done and may stop between
    /// chunks: the answer is `None` then, and the sequence ends with the last chunk run.
    ///
    /// # Errors
    ///
    /// Ids that do not fit (nothing is run then), or a failing device.
    fn prefill(
        &mut self,
        ids: &[u32],
        on_chunk: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>, GenerateError>;

    /// Adds tokens as [`prefill`](Engine::prefill) does and hands the logits of each, in order, to
    /// `on_logits`: `[rows, vocab]` row by row, at most 256 rows at a time whatever the chunk.
    ///
    /// # Errors
    ///
    /// Ids that do not fit (nothing is run then), or a failing device.
    fn logits(&mut self, ids: &[u32], on_logits: &mut dyn FnMut(Vec<f32>)) -> Result<(), GenerateError>;

    /// Adds tokens as [`prefill`](Engine::prefill) does; the hidden state after each, `[ids, hidden]` row
    /// by row: what logits are computed from, in a small part of their memory.
    ///
    /// # Errors
    ///
    /// Ids that do not fit (nothing is run then), or a failing device.
    fn hidden(&mut self, ids: &[u32]) -> Result<Vec<f32>, GenerateError>;

    /// The logits of hidden states, `[rows, vocab]` row by row for `[rows, hidden]`.
    ///
    /// # Errors
    ///
    /// Values that do not make whole rows, or a failing device.
    fn project(&mut self, hidden: &[f32]) -> Result<Vec<f32>, GenerateError>;

    /// The tokens that the sequence holds.
    fn history(&self) -> &[u32];

    /// Forgets the tokens from `length` on.
    fn truncate(&mut self, length: usize);

    /// Positions that the cache holds at most.
    fn capacity(&self) -> usize;

    /// Attends in another way from now on.
    fn set_attention(&mut self, attention: &AttentionConfig);

    /// Lets an observer see what layers attend from now on, or nobody.
    fn observe(&mut self, observer: Option<Observer>);

    /// What each layer's plans kept since the last call; empty where [`AttentionConfig::report`] is off.
    ///
    /// # Errors
    ///
    /// A failing device.
    fn take_reports(&mut self) -> Result<Vec<LayerReport>, GenerateError>;
}

/// Limits of a [`Generator`].
#[derive(Debug, Clone)]
pub struct GeneratorConfig {
    /// Positions to allocate.
    pub capacity: usize,
    /// Tokens of one prefill chunk: bounds the memory of activations, whatever the prompt's length.
    pub chunk: usize,
    /// Type of the cache, the type the weights were loaded in.
    pub dtype: DType,
    /// Attention of the prefill.
    pub attention: AttentionConfig,
}

impl GeneratorConfig {
    /// Allocates the cache of `model` on `device`.
    pub fn init<B: Backend>(
        &self,
        model: Model<B>,
        config: &ModelConfig,
        device: &B::Device,
    ) -> Generator<B> {
        Generator {
            cache: config.cache(1, self.capacity).init(&self.attention, self.dtype, device),
            model,
            history: Vec::new(),
            chunk: self.chunk.max(1),
            dtype: self.dtype,
            device: device.clone(),
        }
    }
}

/// The [`Engine`] over a Burn backend.
pub struct Generator<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    history: Vec<u32>,
    chunk: usize,
    dtype: DType,
    device: B::Device,
}

/// Takes the model, the hidden states of a chunk and the number of ids done.
type EachChunk<'a, B> =
    dyn FnMut(&Model<B>, Tensor<B, 3>, usize) -> Result<ControlFlow<()>, GenerateError> + 'a;

impl<B: LayerBackend> Generator<B> {
    /// Lets all layers attend with other queries and keys from now on, or with their own again.
    pub fn stand_in(&mut self, stand_in: Option<StandIn<B>>) {
        self.cache.stand_in(stand_in);
    }

    /// Runs `ids` chunk by chunk; `each` gets the hidden states of a chunk, `[1, chunk, hidden]`, and
    /// the number of ids done.
    fn run(&mut self, ids: &[u32], each: &mut EachChunk<'_, B>) -> Result<(), GenerateError> {
        let context = self.cache.len() + ids.len();
        self.model.check(ids, &self.cache)?;
        let mut done = 0;
        for chunk in ids.chunks(self.chunk) {
            let hidden = self.model.forward(chunk, context, &mut self.cache, &self.device)?;
            self.history.extend_from_slice(chunk);
            done += chunk.len();
            if each(&self.model, hidden, done)?.is_break() {
                break;
            }
        }
        Ok(())
    }
}

impl<B: LayerBackend> Engine for Generator<B> {
    fn prefill(
        &mut self,
        ids: &[u32],
        on_chunk: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>, GenerateError> {
        let mut last = None;
        let device = self.device.clone();
        self.run(ids, &mut |model, hidden, done| {
            if done == ids.len() {
                let length = hidden.dims()[1];
                last = Some(read(model.logits(hidden.narrow(1, length - 1, 1)))?);
            } else {
                // Otherwise chunks queue up and the caller's progress and Ctrl-C run ahead of the device.
                B::sync(&device).map_err(|error| GenerateError::Device(error.to_string()))?;
            }
            Ok(on_chunk(done))
        })?;
        Ok(last)
    }

    fn logits(&mut self, ids: &[u32], on_logits: &mut dyn FnMut(Vec<f32>)) -> Result<(), GenerateError> {
        self.run(ids, &mut |model, hidden, _| {
            let rows = hidden.dims()[1];
            for start in (0..rows).step_by(LOGIT_ROWS) {
                let part = hidden.clone().narrow(1, start, LOGIT_ROWS.min(rows - start));
                on_logits(read(model.logits(part))?);
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    fn hidden(&mut self, ids: &[u32]) -> Result<Vec<f32>, GenerateError> {
        let mut all = Vec::new();
        self.run(ids, &mut |_, hidden, _| {
            all.extend(read(hidden)?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(all)
    }

    fn project(&mut self, hidden: &[f32]) -> Result<Vec<f32>, GenerateError> {
        let width = self.model.hidden_size();
        if hidden.is_empty() || !hidden.len().is_multiple_of(width) {
            return Err(ModelError::Hidden { found: hidden.len(), width }.into());
        }
        let data =
            TensorData::new(hidden.to_vec(), [1, hidden.len() / width, width]).convert_dtype(self.dtype);
        read(self.model.logits(Tensor::from_data(data, (&self.device, self.dtype))))
    }

    fn history(&self) -> &[u32] {
        &self.history
    }

    fn truncate(&mut self, length: usize) {
        self.cache.truncate(length);
        self.history.truncate(length);
    }

    fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    fn set_attention(&mut self, attention: &AttentionConfig) {
        self.cache.set_attention(attention);
    }

    fn observe(&mut self, observer: Option<Observer>) {
        self.cache.observe(observer);
    }

    fn take_reports(&mut self) -> Result<Vec<LayerReport>, GenerateError> {
        self.cache.take_reports().map_err(|error| GenerateError::Device(error.to_string()))
    }
}

fn read<B: Backend>(logits: Tensor<B, 3>) -> Result<Vec<f32>, GenerateError> {
    let data =
        logits.cast(DType::F32).try_into_data().map_err(|error| GenerateError::Device(error.to_string()))?;
    data.into_vec().map_err(|error| GenerateError::Device(format!("{error:?}")))
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    StopToken,
    /// The caller, who saw a stop string or an interrupt.
    Caller,
    /// `max_tokens`.
    MaxTokens,
    /// The cache is full.
    CacheFull,
}

/// A finished generation.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The tokens drawn, without the stop token.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens of the prompt that were run, the rest was in the cache.
    pub prefill_tokens: usize,
    /// From the call to the first token.
    pub time_to_first_token: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
}

impl Generation {
    /// Tokens a second of the prefill.
    pub fn prefill_rate(&self) -> f64 {
        self.prefill_tokens as f64 / self.time_to_first_token.as_secs_f64().max(1e-9)
    }

    /// Tokens a second after the first; none where there is no second token.
    pub fn decode_rate(&self) -> Option<f64> {
        let steps = self.ids.len().checked_sub(1).filter(|&steps| steps > 0)?;
        Some(steps as f64 / self.decode_time.as_secs_f64().max(1e-9))
    }
}

/// What the caller of [`generate`] hears.
pub enum Event {
    /// So many tokens of the prompt are done, of so many.
    Prefill(usize, usize),
    /// The next token.
    Token(u32),
}

/// Makes the sequence of `engine` equal to `prompt` and continues it by up to `max_tokens` tokens.
///
/// What the cache holds already of the prompt is kept: the next turn of a chat runs its new tokens
/// alone. `on_event` may end it at any time. The last token drawn is not run through the model.
///
/// # Errors
///
/// A prompt that does not fit, or a failing device.
pub fn generate(
    engine: &mut dyn Engine,
    prompt: &[u32],
    sampler: &mut Sampler,
    max_tokens: usize,
    stop: &[u32],
    on_event: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    let begin = Instant::now();
    let common = engine.history().iter().zip(prompt).take_while(|(a, b)| a == b).count();
    // The logits of the last token are needed, so it is run again where everything is held.
    let kept = common.min(prompt.len().saturating_sub(1));
    engine.truncate(kept);
    let fresh = &prompt[kept..];
    let logits = engine.prefill(fresh, &mut |done| on_event(Event::Prefill(done, fresh.len())))?;

    let mut generation = Generation {
        ids: Vec::new(),
        finish: FinishReason::Caller,
        prefill_tokens: fresh.len(),
        time_to_first_token: begin.elapsed(),
        decode_time: Duration::ZERO,
    };
    let Some(mut logits) = logits else { return Ok(generation) };
    let mut first = None;
    let mut context = prompt.to_vec();
    generation.finish = loop {
        if generation.ids.len() == max_tokens {
            break FinishReason::MaxTokens;
        }
        let id = sampler.sample(logits, &context);
        let first = *first.get_or_insert_with(|| {
            generation.time_to_first_token = begin.elapsed();
            Instant::now()
        });
        generation.decode_time = first.elapsed();
        if stop.contains(&id) {
            break FinishReason::StopToken;
        }
        generation.ids.push(id);
        context.push(id);
        if on_event(Event::Token(id)).is_break() {
            break FinishReason::Caller;
        }
        if generation.ids.len() == max_tokens {
            break FinishReason::MaxTokens;
        }
        if engine.history().len() == engine.capacity() {
            break FinishReason::CacheFull;
        }
        match engine.prefill(&[id], &mut |_| ControlFlow::Continue(()))? {
            Some(next) => logits = next,
            None => break FinishReason::Caller,
        }
    };
    Ok(generation)
}
