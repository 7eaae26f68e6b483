//! Attention alone, measured in a child process.

use std::collections::BTreeMap;
use std::time::Duration;

use long_context_runtime::{AttentionBench, Device, InputSet, dtype_name};
use sample_attention::{AttentionShape, StageTimes};

use super::inputs::{Host, Inputs};
use super::job::{Answer, Message, OpJob, Variant};
use super::row::{OpRow, Row, StageRow};
use super::seconds::{Seconds, Spread};
use super::worker::{Failure, at, say};
use crate::error::Error;

/// Time that a round lasts at least, by repeated calls: waiting for the device takes some microseconds.
const SHORTEST_ROUND: Duration = Duration::from_millis(5);
const MOST_CALLS: usize = 64;
/// A first call that takes longer is the first round: the kernels are compiled by then.
const SLOW: Duration = Duration::from_secs(1);
const STAGE_ROUNDS: usize = 5;

/// What a worker keeps between jobs.
#[derive(Default)]
pub struct State {
    bench: Option<(String, Device, Box<dyn AttentionBench>)>,
    pub host: Host,
}

/// Measures all variants of a job.
pub fn run(state: &mut State, job: &OpJob) -> Result<Answer, Failure> {
    let mut seconds = Seconds::default();
    let key = format!("{} {}", job.backend, job.dtype);
    let held = state.bench.take().filter(|(held, ..)| *held == key);
    let (_, device, bench) = state.bench.insert(match held {
        Some(held) => held,
        None => {
            let device = seconds.time("device", || Device::find(job.backend.into(), job.dtype.into()))?;
            let bench = device.attention_bench();
            (key, device, bench)
        }
    });
    bench.clear();
    let inputs = Inputs::new(bench.as_mut(), &mut state.host, job, &mut seconds)?;
    let mut work = Work { bench: bench.as_mut(), inputs, job, device, seconds };
    let timings = work.time()?;
    let mut rows = Vec::new();
    for (index, (variant, timing)) in job.variants.iter().zip(&timings).enumerate() {
        at(index);
        say(Message::Doing(format!("{}: stages and checks of {}", job.backend, variant.name)));
        rows.push(work.row(variant, timing).map_err(|error| Failure::at(index, error))?);
    }
    let Work { seconds, inputs, bench, .. } = work;
    bench.clear();
    let dense = rows.iter().find(|row| row.attention == "dense").and_then(|row| row.ms).map(|ms| ms.median);
    for row in rows.iter_mut().filter(|row| row.attention != "decode") {
        row.speedup = row.ms.zip(dense).map(|(ms, dense)| dense / ms.median);
    }
    let rows = rows.into_iter().map(Row::Op).collect();
    Ok(Answer { rows, seconds, shares: inputs.shares, notes: inputs.notes })
}

struct Work<'a> {
    bench: &'a mut dyn AttentionBench,
    inputs: Inputs,
    job: &'a OpJob,
    device: &'a Device,
    seconds: Seconds,
}

/// Rounds of one variant.
struct Timing {
    rounds: Vec<Duration>,
    calls: usize,
}

impl Work<'_> {
    /// Warms all variants up, then times them in turn, round by round.
    fn time(&mut self) -> Result<Vec<Timing>, Failure> {
        let (job, mut timings) = (self.job, Vec::new());
        for (index, variant) in job.variants.iter().enumerate() {
            at(index);
            say(Message::Doing(format!("{}: warm-up of {}", job.backend, variant.name)));
            timings.push(self.warm_up(variant).map_err(|error| Failure::at(index, error))?);
        }
        for round in 0..job.limits.rounds {
            say(Message::Doing(format!("{}: round {} of {}", job.backend, round + 1, job.limits.rounds)));
            for (index, (variant, timing)) in job.variants.iter().zip(&mut timings).enumerate() {
                let spent = timing.rounds.iter().sum::<Duration>().as_secs_f64();
                if spent >= job.limits.seconds || timing.rounds.len() >= job.limits.rounds {
                    continue;
                }
                at(index);
                let set = self.inputs.sets[variant.set];
                let time = self.call("rounds", set, variant, timing.calls);
                timing.rounds.push(time.map_err(|error| Failure::at(index, error))?);
            }
        }
        Ok(timings)
    }

    fn call(
        &mut self,
        part: &str,
        set: InputSet,
        variant: &Variant,
        calls: usize,
    ) -> Result<Duration, Error> {
        let Self { bench, seconds, .. } = self;
        Ok(seconds.time(part, || match variant.decode {
            true => bench.decode(set, calls),
            false => bench.run(set, &variant.options, calls),
        })?)
    }

    /// Compiles kernels over short inputs, then calls once or twice to see how long a call takes.
    fn warm_up(&mut self, variant: &Variant) -> Result<Timing, Error> {
        let (short, set) = (self.inputs.warm_up, self.inputs.sets[variant.set]);
        self.call("warm-up", short, variant, 1)?;
        let first = self.call("warm-up", set, variant, 1)?;
        if first >= SLOW {
            return Ok(Timing { rounds: vec![first], calls: 1 });
        }
        let second = self.call("warm-up", set, variant, 1)?;
        let calls = SHORTEST_ROUND.as_secs_f64() / second.as_secs_f64().max(1e-7);
        Ok(Timing { rounds: Vec::new(), calls: (calls.ceil() as usize).clamp(1, MOST_CALLS) })
    }

    /// Times the stages, reads what was kept, and compares a few output rows with float64.
    fn row(&mut self, variant: &Variant, timing: &Timing) -> Result<OpRow, Error> {
        let Self { bench, inputs, job, device, seconds } = self;
        let (set, options) = (inputs.sets[variant.set], &variant.options);
        let ms = Spread::of(&timing.rounds, timing.calls, 1e3);
        let call = ms.map_or(f64::NAN, |ms| ms.median / 1e3);
        let queries = variant.decode.then_some(1);
        let (report, error) = seconds.time("checks", || bench.inspect(set, options, queries))?;
        let mut row = OpRow {
            backend: device.backend.to_string(),
            device: device.name.clone(),
            driver: device.driver.clone(),
            dtype: dtype_name(device.dtype).to_string(),
            ms,
            error: Some(error),
            ..job.row(variant)
        };
        let OpJob { length, heads, kv_heads, head_dim, .. } = **job;
        if variant.decode {
            let bytes = 2 * kv_heads * length * head_dim * device.dtype.size();
            row.gigabytes_per_second = Some(bytes as f64 / call / 1e9);
            return Ok(row);
        }
        let (batch, q_heads, q_len, kv_len) = (1, heads, length, length);
        let shape = AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim };
        let operations = 4.0 * (head_dim * heads) as f64 * shape.causal_pairs();
        if variant.is_dense() {
            (row.density, row.tflops) = (Some(1.0), Some(operations / call / 1e12));
            return Ok(row);
        }
        let rounds = if call * STAGE_ROUNDS as f64 > job.limits.seconds { 1 } else { STAGE_ROUNDS };
        let times = seconds.time("stages", || {
            (0..rounds).map(|_| bench.stages(set, options)).collect::<Result<Vec<_>, _>>()
        })?;
        let kept = operations * f64::from(report.density());
        row.stages = stages(&times);
        row.stage_clock = times
            .first()
            .filter(|times| !times.stages.is_empty())
            .map(|times| if times.on_device { "device" } else { "host" }.to_string());
        let attention = row.stages.iter().find(|stage| stage.stage == "attention");
        row.attention_tflops = attention.map(|stage| kept / stage.ms / 1e9);
        row.tflops = Some(kept / call / 1e12);
        row.share = inputs.shares.get(variant.set).copied();
        row.density = Some(report.density().into());
        row.recall_mean = Some(report.recall_mean().into());
        row.recall_min = Some(report.recall_min().into());
        row.dense_heads = Some(report.dense_heads());
        Ok(row)
    }
}

/// The median of each stage, in the order they run.
fn stages(rounds: &[StageTimes]) -> Vec<StageRow> {
    let mut times: BTreeMap<usize, (&str, Vec<Duration>)> = BTreeMap::new();
    for (at, (stage, time)) in rounds.iter().flat_map(|round| round.stages.iter().enumerate()) {
        times.entry(at).or_insert((stage.name(), Vec::new())).1.push(*time);
    }
    let median = |times: &[Duration]| Spread::of(times, 1, 1e3).map_or(f64::NAN, |spread| spread.median);
    times.into_values().map(|(stage, times)| StageRow { stage: stage.into(), ms: median(&times) }).collect()
}
