//! A model, measured in a child process.

use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::{Duration, Instant};

use long_context::cache::AttentionConfig;
use long_context::generate::{Engine, GeneratorConfig};
use long_context::models::ModelConfig;
use long_context::stopwatch;
use long_context_runtime::structured::Structure;
use long_context_runtime::{Device, ModelBench, Weights, dtype_name};
use long_context_weights::Checkpoint;

use super::inputs::{Host, out_of_reach};
use super::job::{Answer, Message, ModelJob, ModelSource, Variant};
use super::row::{ModelRow, PartsRow, Row};
use super::seconds::{Seconds, Spread};
use super::worker::{Failure, at, say};
use crate::error::Error;
use crate::report::{LayerLine, peak_host_bytes};

/// What a worker keeps between jobs.
#[derive(Default)]
pub struct State {
    model: Option<(String, Device, ModelConfig, Box<dyn ModelBench>)>,
}

impl ModelSource {
    /// Dimensions of the model.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        match self {
            Self::Shape(name) => {
                ModelConfig::of_shape(name).ok_or_else(|| Error::Shape { found: name.clone() })
            }
            Self::Checkpoint(folder) => Ok(Checkpoint::open(folder)?.config().clone()),
        }
    }
}

/// Measures all variants of a job.
pub fn run(state: &mut State, host: &mut Host, job: &ModelJob) -> Result<Answer, Failure> {
    let mut seconds = Seconds::default();
    let key = format!("{} {} {} {} {}", job.backend, job.dtype, job.model.name(), job.longest, job.chunk);
    let held = state.model.take().filter(|(held, ..)| *held == key);
    let (_, device, config, bench) = state.model.insert(match held {
        Some(held) => held,
        None => load(key, job, &mut seconds)?,
    });
    let mut answer = Answer::default();
    if let Some(density) = job.density {
        let cache = config.cache(1, job.length + job.decode);
        let heads = match config {
            ModelConfig::ChatGlm(config) => config.num_attention_heads,
            ModelConfig::InternLm2(config) => config.num_attention_heads,
        };
        let mut structure = Structure {
            length: job.length,
            heads,
            kv_heads: cache.num_kv_heads,
            head_dim: cache.head_dim,
            diffuse: heads / 32,
            share: density.target,
            seed: job.seed,
        };
        let noise = host.noise(job.longest + job.decode, cache.head_dim, job.seed, &mut seconds);
        seconds.time("inputs", || {
            let reference = job.variants.iter().find(|variant| !variant.is_dense());
            if let (None, Some(variant)) = (density.share, reference) {
                say(Message::Doing(format!("{}: inputs of density {}", job.backend, density.target)));
                let (share, found) = bench.tune(&structure, noise, &variant.options, density.target)?;
                structure.share = share;
                answer.notes.extend(out_of_reach(job.length, &variant.name, density.target, found));
            }
            structure.share = density.share.unwrap_or(structure.share);
            structure.length = cache.capacity;
            bench.stand_in(Some((&structure, noise)))
        })?;
        answer.shares.push(structure.share);
    }
    let mut work = Work { bench: bench.as_mut(), job, seconds };
    for (index, variant) in job.variants.iter().enumerate() {
        at(index);
        say(Message::Doing(format!("{}: warm-up of {}", job.backend, variant.name)));
        work.warm_up(variant).map_err(|error| Failure::at(index, error))?;
    }
    let mut rows = Vec::new();
    for (index, variant) in job.variants.iter().enumerate() {
        at(index);
        say(Message::Doing(format!("{}: parts of {}", job.backend, variant.name)));
        let row = work.parts(variant).map_err(|error| Failure::at(index, error))?;
        rows.push(ModelRow {
            backend: device.backend.to_string(),
            device: device.name.clone(),
            driver: device.driver.clone(),
            dtype: dtype_name(device.dtype).to_string(),
            share: answer.shares.first().copied().filter(|_| !variant.is_dense()),
            ..row
        });
    }
    work.time(&mut rows)?;
    let Work { seconds, bench, .. } = work;
    if job.density.is_some() {
        bench.stand_in(None)?;
    }
    answer.rows = rows.into_iter().map(Row::Model).collect();
    answer.seconds = seconds;
    Ok(answer)
}

type Held = (String, Device, ModelConfig, Box<dyn ModelBench>);

fn load(key: String, job: &ModelJob, seconds: &mut Seconds) -> Result<Held, Error> {
    let device = seconds.time("device", || Device::find(job.backend.into(), job.dtype.into()))?;
    say(Message::Doing(format!("{}: loading {}", job.backend, job.model.name())));
    let limits = GeneratorConfig {
        capacity: job.longest + job.decode,
        chunk: job.chunk,
        dtype: device.dtype,
        attention: AttentionConfig::default(),
    };
    seconds.time("loading", || {
        let checkpoint = match &job.model {
            ModelSource::Checkpoint(folder) => Some(Checkpoint::open(folder)?),
            ModelSource::Shape(_) => None,
        };
        let weights = checkpoint.as_ref().map_or(Weights::Random, Weights::Checkpoint);
        let config = job.model.config()?;
        let bench = device.model_bench(&config, weights, &limits, Rc::new(|_| ()))?;
        Ok((key, device, config, bench))
    })
}

struct Work<'a> {
    bench: &'a mut dyn ModelBench,
    job: &'a ModelJob,
    seconds: Seconds,
}

impl Work<'_> {
    fn attend(&mut self, variant: &Variant, report: bool) -> &mut dyn Engine {
        let engine = self.bench.engine();
        engine.set_attention(&AttentionConfig {
            options: variant.options,
            layers: Default::default(),
            report,
        });
        engine.truncate(0);
        engine
    }

    /// A full chunk and what the last one holds: the shapes of every product. Then one token.
    fn warm_up(&mut self, variant: &Variant) -> Result<(), Error> {
        let job = self.job;
        let ModelJob { length, chunk, ids, .. } = job;
        let tokens = (*length).min(chunk + length % chunk);
        let begin = Instant::now();
        let engine = self.attend(variant, false);
        prefill(engine, &ids[..tokens])?;
        prefill(engine, &ids[..1])?;
        self.seconds.add("warm-up", begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// A prefill whose parts are timed apart, and what its plans kept.
    fn parts(&mut self, variant: &Variant) -> Result<ModelRow, Error> {
        let (begin, job) = (Instant::now(), self.job);
        let ids = &job.ids[..job.length];
        let engine = self.attend(variant, true);
        stopwatch::start();
        let done = prefill(engine, ids);
        let parts = stopwatch::stop();
        let total = done?.0.as_secs_f64();
        let layers = LayerLine::of(&engine.take_reports()?);
        let mean = |value: &dyn Fn(&LayerLine) -> f64| match layers.len() {
            0 => 1.0,
            count => layers.iter().map(value).sum::<f64>() / count as f64,
        };
        let (attention, products) = (parts.attention.as_secs_f64(), parts.products.as_secs_f64());
        let row = ModelRow {
            parts: Some(PartsRow { attention, products, rest: total - attention - products, total }),
            density: Some(mean(&|layer| layer.density)),
            recall_mean: (!layers.is_empty()).then(|| mean(&|layer| f64::from(layer.recall_mean))),
            ..job.row(variant)
        };
        self.seconds.add("parts", begin.elapsed().as_secs_f64());
        Ok(row)
    }

    /// Prefills in turn, round by round; after the first, some tokens are generated.
    fn time(&mut self, rows: &mut [ModelRow]) -> Result<(), Failure> {
        let (job, mut times) = (self.job, vec![Vec::<Duration>::new(); rows.len()]);
        for round in 0..job.limits.rounds {
            for (index, variant) in job.variants.iter().enumerate() {
                if times[index].iter().sum::<Duration>().as_secs_f64() >= job.limits.seconds {
                    continue;
                }
                at(index);
                let count = format!("round {} of {}", round + 1, job.limits.rounds);
                say(Message::Doing(format!("{}: {}, {count}", job.backend, variant.name)));
                let timed = self.round(variant, round == 0);
                let (ttft, decode) = timed.map_err(|error| Failure::at(index, error))?;
                times[index].push(ttft);
                let rates = decode.iter().map(|token| 1.0 / token.as_secs_f64()).collect();
                rows[index].decode_tokens_per_second =
                    Spread::of_values(rates, 1).or(rows[index].decode_tokens_per_second);
                rows[index].device_bytes = self.bench.device_bytes();
                rows[index].host_bytes = peak_host_bytes();
            }
        }
        for (row, times) in rows.iter_mut().zip(&times) {
            row.ttft = Spread::of(times, 1, 1.0);
        }
        let dense = rows.iter().find(|row| row.attention == "dense").and_then(|row| row.ttft);
        for row in rows {
            row.speedup = row.ttft.zip(dense).map(|(ttft, dense)| dense.median / ttft.median);
        }
        Ok(())
    }

    fn round(&mut self, variant: &Variant, decode: bool) -> Result<(Duration, Vec<Duration>), Error> {
        let (begin, job) = (Instant::now(), self.job);
        let engine = self.attend(variant, false);
        let (ttft, mut next) = prefill(engine, &job.ids[..job.length])?;
        let mut tokens = Vec::new();
        for _ in 0..if decode { job.decode } else { 0 } {
            let (time, id) = prefill(engine, &[next])?;
            next = id;
            tokens.push(time);
        }
        self.seconds.add("rounds", begin.elapsed().as_secs_f64());
        Ok((ttft, tokens))
    }
}

/// The time to the likeliest next token, and that token.
fn prefill(engine: &mut dyn Engine, ids: &[u32]) -> Result<(Duration, u32), Error> {
    let begin = Instant::now();
    let logits = engine.prefill(ids, &mut |_| ControlFlow::Continue(()))?.unwrap_or_default();
    let likeliest = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    Ok((begin.elapsed(), likeliest.map_or(0, |(id, _)| id as u32)))
}
