//! Inputs of attention alone, on the device.

use std::path::PathBuf;

use long_context_runtime::structured::{Noise, Structure};
use long_context_runtime::{AttentionBench, InputSet, OpInputs};

use super::job::{Density, Message, OpJob, OpSource};
use super::seconds::Seconds;
use super::worker::say;
use crate::error::Error;
use crate::tensors::read_inputs;

/// Kernels are compiled over inputs of this length at most.
const WARM_UP_LENGTH: usize = 4096;
/// A density this far from its target, relatively, is told.
const FAR: f64 = 0.1;

/// What was drawn or read for an earlier job and serves the next ones.
#[derive(Default)]
pub struct Host {
    noise: Option<(usize, u64, Noise)>,
    captured: Option<(PathBuf, OpInputs)>,
}

impl Host {
    /// Noise for at least `length` positions.
    pub fn noise(&mut self, length: usize, head_dim: usize, seed: u64, seconds: &mut Seconds) -> &Noise {
        let held = self
            .noise
            .take()
            .filter(|(dim, of, noise)| (*dim, *of) == (head_dim, seed) && noise.length() >= length);
        let noise = held.unwrap_or_else(|| {
            (head_dim, seed, seconds.time("inputs", || Noise::new(length, head_dim, seed)))
        });
        &self.noise.insert(noise).2
    }

    fn captured(&mut self, file: &PathBuf, seconds: &mut Seconds) -> Result<&OpInputs, Error> {
        let held = self.captured.take().filter(|(held, _)| held == file);
        let captured = match held {
            Some(captured) => captured,
            None => (file.clone(), seconds.time("inputs", || read_inputs(file))?),
        };
        Ok(&self.captured.insert(captured).1)
    }
}

/// Inputs of a job on the device.
pub struct Inputs {
    pub sets: Vec<InputSet>,
    /// Short ones, to compile kernels with.
    pub warm_up: InputSet,
    /// For each density the share of keys that stand out.
    pub shares: Vec<f64>,
    pub notes: Vec<String>,
}

impl Inputs {
    pub fn new(
        bench: &mut dyn AttentionBench,
        host: &mut Host,
        job: &OpJob,
        seconds: &mut Seconds,
    ) -> Result<Self, Error> {
        let short = job.length.min(WARM_UP_LENGTH);
        match &job.inputs {
            OpSource::Captured { file } => {
                let tensors = host.captured(file, seconds)?;
                seconds.time("inputs", || {
                    let (warm_up, set) = (bench.add(tensors, short)?, bench.add(tensors, job.length)?);
                    Ok(Self { sets: vec![set], warm_up, shares: Vec::new(), notes: Vec::new() })
                })
            }
            OpSource::Structured { densities, diffuse, seed } => {
                let noise = host.noise(job.longest, job.head_dim, *seed, seconds);
                let structure = Structure {
                    length: job.length,
                    heads: job.heads,
                    kv_heads: job.kv_heads,
                    head_dim: job.head_dim,
                    diffuse: *diffuse,
                    share: densities.first().map_or(0.1, |density| density.target),
                    seed: *seed,
                };
                seconds.time("inputs", || {
                    let warm_up = bench.add_structured(&Structure { length: short, ..structure }, noise)?;
                    let (sets, shares, notes) = (Vec::new(), Vec::new(), Vec::new());
                    let mut inputs = Self { sets, warm_up, shares, notes };
                    for density in densities {
                        let share = inputs.share(bench, &structure, noise, job, density)?;
                        inputs.shares.push(share);
                        inputs.sets.push(bench.add_structured(&Structure { share, ..structure }, noise)?);
                    }
                    Ok(inputs)
                })
            }
        }
    }

    /// The share that reaches a density with the first plan that is made of these inputs.
    fn share(
        &mut self,
        bench: &mut dyn AttentionBench,
        structure: &Structure,
        noise: &Noise,
        job: &OpJob,
        density: &Density,
    ) -> Result<f64, Error> {
        let set = self.sets.len();
        let reference = job.variants.iter().find(|variant| variant.set == set && !variant.is_dense());
        // Dense attention alone does not mind.
        let (None, Some(variant)) = (density.share, reference) else {
            return Ok(density.share.unwrap_or(density.target));
        };
        say(Message::Doing(format!("{}: inputs of density {}", job.backend, density.target)));
        let (share, found) = bench.tune(structure, noise, &variant.options, density.target)?;
        self.notes.extend(out_of_reach(job.length, &variant.name, density.target, found));
        Ok(share)
    }
}

/// What to tell about a density that is far from its target.
pub fn out_of_reach(length: usize, name: &str, target: f64, found: f64) -> Option<String> {
    ((found / target - 1.0).abs() > FAR).then(|| {
        format!("{length} tokens, {name}: density {target} is out of reach, the nearest is {found:.3}")
    })
}
