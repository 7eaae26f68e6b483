//! From arguments to a model at work: what `generate`, `chat` and `logits` share.

use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use long_context::cache::AttentionConfig;
use long_context::generate::{Event, Generation, GeneratorConfig, StopStrings, generate};
use long_context::models::ModelConfig;
use long_context::sampler::{Sampler, SamplerConfig};
use long_context_runtime::{Device, Loaded, dtype_name};
use long_context_weights::{Checkpoint, RopeRatioKind, StreamDecoder, Tokenizer};
use sample_attention::Preset;

use crate::args::{ModelArgs, RopeRatioMeaning, SamplingArgs};
use crate::error::Error;
use crate::report::{LayerLine, Stats, finish_name, load_bar, prefill_bar};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C end the work at hand; a second one ends the program at once.
pub fn catch_interrupts() {
    // Without a handler Ctrl-C still ends the program, only less tidily.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
}

/// Whether Ctrl-C was pressed since the last call.
pub fn take_interrupt() -> bool {
    INTERRUPTED.swap(false, Ordering::Relaxed)
}

pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Opens a folder and settles what its `rope_ratio` means.
pub fn open(dir: &Path, rope_ratio: RopeRatioMeaning) -> Result<Checkpoint, Error> {
    let mut checkpoint = Checkpoint::open(dir)?;
    match rope_ratio {
        RopeRatioMeaning::Auto => {}
        RopeRatioMeaning::Base => checkpoint.set_rope_ratio(RopeRatioKind::ScalesBase)?,
        RopeRatioMeaning::Position => checkpoint.set_rope_ratio(RopeRatioKind::DividesPosition)?,
    }
    Ok(checkpoint)
}

/// A loaded model with what is told about it.
pub struct Session {
    pub device: Device,
    pub loaded: Loaded,
    pub load_time: Duration,
    attention: String,
    quiet: bool,
}

impl Session {
    /// Finds the device and loads the model with room for `capacity` tokens.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        capacity: usize,
        args: &ModelArgs,
    ) -> Result<Self, Error> {
        let device = Device::find(args.backend.into(), args.dtype.into())?;
        if !args.quiet {
            eprintln!("{} · {} · {}", device.backend, device.name, dtype_name(device.dtype));
        }
        let limits = GeneratorConfig {
            capacity,
            chunk: args.chunk,
            dtype: device.dtype,
            attention: args.attention_config(&device),
        };
        let begin = Instant::now();
        let bar = load_bar(args.quiet, checkpoint.bytes());
        let progress = {
            let bar = bar.clone();
            Rc::new(move |done| bar.set_position(done))
        };
        let loaded = device.load(checkpoint, config, &limits, progress)?;
        bar.finish_and_clear();
        let attention = args.attention.to_string();
        Ok(Self { device, loaded, attention, load_time: begin.elapsed(), quiet: args.quiet })
    }

    /// Starts anew, with another attention whose reports are kept.
    pub fn begin(&mut self, preset: Preset) {
        let attention =
            AttentionConfig { options: preset.options(), layers: Default::default(), report: true };
        self.loaded.engine.truncate(0);
        self.loaded.engine.set_attention(&attention);
        self.attention = preset.to_string();
    }

    /// Answers a prompt, handing text to `show` as it comes; the whole text and how it went.
    pub fn answer(
        &mut self,
        prompt: &[u32],
        tokenizer: &Tokenizer,
        sampler: &mut Sampler,
        limits: &Limits,
        show: &mut dyn FnMut(&str) -> Result<(), Error>,
    ) -> Result<Answer, Error> {
        let mut decoder = StreamDecoder::new(tokenizer);
        let mut stops = StopStrings::new(limits.stop_strings.iter().cloned());
        let mut text = String::new();
        let mut stopped = false;
        let mut failure = None;
        let bar = prefill_bar(self.quiet, prompt.len());
        let mut emit = |piece: &str, text: &mut String| {
            text.push_str(piece);
            match show(piece) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure.get_or_insert(error);
                    ControlFlow::Break(())
                }
            }
        };
        let generation = generate(
            self.loaded.engine.as_mut(),
            prompt,
            sampler,
            limits.max_tokens,
            &limits.stop_ids,
            &mut |event| {
                if interrupted() {
                    return ControlFlow::Break(());
                }
                match event {
                    Event::Prefill(done, total) => {
                        bar.set_length(total as u64);
                        bar.set_position(done as u64);
                        if done == total {
                            bar.finish_and_clear();
                        }
                        ControlFlow::Continue(())
                    }
                    Event::Token(id) => {
                        let Some(piece) = decoder.push(id) else { return ControlFlow::Continue(()) };
                        let (piece, ended) = stops.push(&piece);
                        stopped = ended;
                        let shown = emit(&piece, &mut text);
                        if ended { ControlFlow::Break(()) } else { shown }
                    }
                }
            },
        )?;
        bar.finish_and_clear();
        if !stopped {
            let (piece, ended) = stops.push(&decoder.flush());
            stopped = ended;
            let rest = if ended { piece } else { piece + &stops.finish() };
            let _ = emit(&rest, &mut text);
        }
        if let Some(error) = failure {
            return Err(error);
        }
        let finish = match () {
            () if stopped => "stop string",
            () if interrupted() => "interrupted",
            () => finish_name(generation.finish),
        };
        let stats = Stats::new(
            &self.device,
            self.attention.clone(),
            self.load_time,
            prompt.len(),
            &generation,
            finish,
            (self.loaded.device_bytes)(),
        );
        let layers = LayerLine::of(&self.loaded.engine.take_reports()?);
        Ok(Answer { text, generation, stats, layers })
    }
}

/// One answer.
pub struct Answer {
    pub text: String,
    pub generation: Generation,
    pub stats: Stats,
    /// What SampleAttention kept, where it was asked for.
    pub layers: Vec<LayerLine>,
}

/// When an answer ends.
pub struct Limits {
    pub max_tokens: usize,
    pub stop_ids: Vec<u32>,
    pub stop_strings: Vec<String>,
}

impl Limits {
    pub fn new(args: &SamplingArgs, stop_ids: Vec<u32>) -> Self {
        Self { max_tokens: args.max_tokens, stop_ids, stop_strings: args.stop.clone() }
    }
}

/// The sampler that the arguments describe.
pub fn sampler(args: &SamplingArgs) -> Result<Sampler, Error> {
    let config = SamplerConfig {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    Ok(config.init()?)
}
