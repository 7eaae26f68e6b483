//! One tile of queries over the keys that it keeps, with an online softmax (FlashAttention, arXiv 2205.14135).

use std::ops::Range;

use pulp::Arch;
use sample_attention_plan::HostPlan;

use super::math::{online_softmax, product};
use super::{KEYS, Rows};

/// Consecutive queries of one head, or with one query a sequence the heads of one group.
pub(super) struct Tile<'a> {
    pub queries: Rows<'a>,
    pub keys: Rows<'a>,
    pub values: Rows<'a>,
    pub first_position: usize,
    /// Whether each row stands one position after the one before.
    pub steps: bool,
    /// With the tail's start and the block size; the rows are of one block.
    pub plan: Option<(&'a HostPlan, usize, usize)>,
    pub output: &'a mut [f32],
    pub lse: &'a mut [f32],
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    scores: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    stripe_keys: Vec<f32>,
    stripe_values: Vec<f32>,
}

impl Tile<'_> {
    pub fn attend(mut self, head_dim: usize, scale: f32, scratch: &mut Scratch) {
        let rows = self.lse.len();
        let Scratch { scores, max, sum, stripe_keys, stripe_values } = scratch;
        scores.resize(rows * KEYS, 0.0);
        max.clear();
        max.resize(rows, f32::NEG_INFINITY);
        sum.clear();
        sum.resize(rows, 0.0);
        let Self { keys, values, first_position, steps, plan, .. } = self;
        let mut merge = |first: Option<usize>, n: usize, keys: Rows<'_>, values: Rows<'_>| {
            self.merge(first, n, (keys, values), head_dim, scale, (scores, max, sum));
        };

        let (stripes, runs) = kept(first_position, rows, steps, plan);
        for stripes in stripes.chunks(KEYS) {
            for (source, gathered) in [(keys, &mut *stripe_keys), (values, &mut *stripe_values)] {
                gathered.clear();
                stripes.iter().for_each(|&column| gathered.extend(source.row(column, head_dim)));
            }
            let rows = |data| Rows { data, stride: head_dim };
            merge(None, stripes.len(), rows(stripe_keys), rows(stripe_values));
        }
        for run in runs {
            for first in run.clone().step_by(KEYS) {
                merge(Some(first), KEYS.min(run.end - first), keys.from(first), values.from(first));
            }
        }
        for (row, output) in self.output.chunks_exact_mut(head_dim).enumerate() {
            let inverse = 1.0 / sum[row];
            output.iter_mut().for_each(|value| *value *= inverse);
            self.lse[row] = max[row] + sum[row].ln();
        }
    }

    /// Adds `n` keys, the first at position `first`, to the running softmax; all rows see all keys that stand
    /// nowhere.
    fn merge(
        &mut self,
        first: Option<usize>,
        n: usize,
        (keys, values): (Rows<'_>, Rows<'_>),
        head_dim: usize,
        scale: f32,
        (scores, max, sum): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        let rows = max.len();
        let queries = self.queries;
        let transposed = (keys.data, 1, keys.stride);
        product(rows, n, head_dim, scores, KEYS, false, (queries.data, queries.stride, 1), transposed, scale);
        Arch::new().dispatch(|| {
            for (row, scores) in scores.chunks_exact_mut(KEYS).take(rows).enumerate() {
                let position = self.first_position + if self.steps { row } else { 0 };
                let seen = first.map_or(n, |first| (position + 1).saturating_sub(first).min(n));
                let (visible, hidden) = scores[..n].split_at_mut(seen);
                hidden.fill(0.0);
                let rescale = online_softmax(visible, &mut max[row], &mut sum[row]);
                if rescale != 1.0 {
                    let output = &mut self.output[row * head_dim..][..head_dim];
                    output.iter_mut().for_each(|value| *value *= rescale);
                }
            }
        });
        let values = (values.data, values.stride, 1);
        product(rows, head_dim, n, self.output, head_dim, true, (scores, KEYS, 1), values, 1.0);
    }
}

/// The stripes and the runs of keys that rows keep; runs may end behind what a row sees.
fn kept(
    first_position: usize,
    rows: usize,
    steps: bool,
    plan: Option<(&HostPlan, usize, usize)>,
) -> (Vec<usize>, Vec<Range<usize>>) {
    let end = first_position + if steps { rows } else { 1 };
    let Some((plan, _, block_size)) =
        plan.filter(|(plan, tail_start, _)| !plan.dense && first_position < *tail_start)
    else {
        return (Vec::new(), std::iter::once(0..end).collect());
    };
    let block = first_position / block_size;
    let before = plan.stripes.partition_point(|&column| (column as usize) < block * block_size);
    let columns = plan.stripes[..before].iter().map(|&column| column as usize);
    let stripes = columns.filter(|column| !plan.bands[block - column / block_size]).collect();
    let mut runs: Vec<Range<usize>> = Vec::new();
    for key_block in (0..=block).filter(|key_block| plan.bands[block - key_block]) {
        let (start, stop) = (key_block * block_size, ((key_block + 1) * block_size).min(end));
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = stop,
            _ => runs.push(start..stop),
        }
    }
    (stripes, runs)
}
