//! Batches of sequences, made by threads while the device computes. What a step sees depends on the seed alone.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};

use crate::recipe::{LossWeights, Recipe, Stage};
use crate::sequence::{Role, Sequence, Writer};
use crate::tasks::Task;

/// Batches that a thread makes ahead.
const AHEAD: usize = 4;
/// Places at which positions may jump, in half of the steps.
const MOST_GAPS: usize = 4;

/// Sequences of one step, laid out for the device.
pub struct Batch {
    pub sequences: usize,
    pub length: usize,
    /// `[sequences, length]`
    pub ids: Vec<i32>,
    /// What follows each of them, `[sequences, length]`.
    pub targets: Vec<i32>,
    /// What it means to predict each target, `[sequences, length]`.
    pub roles: Vec<Role>,
    /// Of each sequence.
    pub tasks: Vec<Task>,
    /// Of the tokens, ascending.
    pub positions: Vec<usize>,
    /// Weight of the share of attention that goes far, where it counts.
    pub far: Option<f32>,
}

impl Batch {
    /// From sequences of `length + 1` tokens.
    pub fn new(sequences: &[Sequence], positions: Vec<usize>) -> Self {
        let length = positions.len();
        let ids = |from: usize| {
            let tokens = sequences.iter().flat_map(move |sequence| &sequence.ids[from..from + length]);
            tokens.map(|&id| id as i32).collect()
        };
        Self {
            sequences: sequences.len(),
            length,
            ids: ids(0),
            targets: ids(1),
            roles: sequences.iter().flat_map(|sequence| sequence.roles[1..].iter().copied()).collect(),
            tasks: sequences.iter().map(|sequence| sequence.task).collect(),
            positions,
            far: None,
        }
    }

    /// The share of each target in the loss: every role's tokens have its weight together.
    pub fn weights(&self, loss: &LossWeights) -> Vec<f32> {
        let count = |role: Role| self.roles.iter().filter(|&&other| other == role).count().max(1) as f32;
        let text = loss.text / count(Role::Text);
        let copied = loss.copied / count(Role::Copied);
        let asked = loss.asked / count(Role::Asked);
        let weight = |role: &Role| match role {
            Role::Given => 0.0,
            Role::Text => text,
            Role::Copied => copied,
            Role::Asked => asked,
        };
        self.roles.iter().map(weight).collect()
    }
}

/// The batch of a step.
pub fn batch(writer: &Writer<'_>, stage: &Stage, seed: u64, step: usize) -> Batch {
    // Steps have streams of their own, so that any thread may make any batch.
    let mut random = StdRng::seed_from_u64(seed ^ (step as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let shares = stage.mix.shares();
    let all: u32 = shares.iter().map(|(_, share)| share).sum();
    let sequences: Vec<Sequence> = (0..stage.batch)
        .map(|_| {
            let mut drawn = random.random_range(0..all);
            let drawn = shares.iter().find(|(_, share)| match drawn.checked_sub(*share) {
                Some(rest) => {
                    drawn = rest;
                    false
                }
                None => true,
            });
            let (task, _) = drawn.expect("below the sum of the shares");
            writer.write(*task, stage.length + 1, &mut random)
        })
        .collect();
    let positions = positions(stage.length, stage.span, &mut random);
    Batch { far: stage.far, ..Batch::new(&sequences, positions) }
}

/// Ascending positions below `span`: one after another, or with a few gaps, so that short sequences teach large
/// distances.
fn positions(length: usize, span: usize, random: &mut StdRng) -> Vec<usize> {
    let mut jumps = vec![0; length];
    if span > length && random.random_bool(0.5) {
        let mut left = random.random_range(0..=span - length);
        let gaps = random.random_range(1..=MOST_GAPS.min(length));
        for at in sample(random, length, gaps) {
            jumps[at] = random.random_range(0..=left);
            left -= jumps[at];
        }
    }
    let mut jumped = 0;
    (0..length)
        .map(|at| {
            jumped += jumps[at];
            at + jumped
        })
        .collect()
}

/// All batches of a recipe, in order, each with its step's stage.
pub struct Batches<'a> {
    lanes: Vec<Receiver<Batch>>,
    recipe: &'a Recipe,
    step: usize,
}

impl<'a> Batches<'a> {
    /// Starts the threads; they end with the last batch, or when nobody listens.
    pub fn start<'scope>(scope: &'scope Scope<'scope, 'a>, writer: Writer<'a>, recipe: &'a Recipe) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().clamp(1, 8));
        let lanes = (0..threads)
            .map(|thread| {
                let (sender, receiver) = sync_channel(AHEAD);
                scope.spawn(move || {
                    for (step, stage) in steps(recipe).enumerate().skip(thread).step_by(threads) {
                        if sender.send(batch(&writer, stage, recipe.seed, step)).is_err() {
                            break;
                        }
                    }
                });
                receiver
            })
            .collect();
        Self { lanes, recipe, step: 0 }
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        if self.step == self.recipe.steps() {
            return None;
        }
        let lane = self.step % self.lanes.len();
        self.step += 1;
        self.lanes[lane].recv().ok()
    }
}

/// The stage of every step.
fn steps(recipe: &Recipe) -> impl Iterator<Item = &Stage> {
    recipe.stages.iter().flat_map(|stage| std::iter::repeat_n(stage, stage.steps))
}
