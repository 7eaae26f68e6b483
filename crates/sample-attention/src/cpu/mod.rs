//! Attention on the processor: tiles of queries against tiles of keys, spread over threads. What a plan
//! leaves out is never computed.

mod attend;
mod choose;
mod math;
mod sample;
mod values;

use rayon::prelude::*;
use sample_attention_plan::{AttentionShape, HostPlan, Rule, SampleAttentionOptions, Stage};

use attend::{Scratch, Tile};

/// Query rows of one tile: enough to reuse keys, few enough that scores stay in the second-level cache.
const ROWS: usize = 64;
/// Keys of one tile, at least.
const KEYS: usize = 512;

/// A `[batch, heads, length, D]` tensor in f32 whose rows are contiguous.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub shape: [usize; 4],
    pub strides: [usize; 4],
}

impl<'a> View<'a> {
    /// The rows of one head from `row` on.
    fn head(&self, batch: usize, head: usize, row: usize) -> Rows<'a> {
        let start = batch * self.strides[0] + head * self.strides[1] + row * self.strides[2];
        Rows { data: &self.data[start..], stride: self.strides[2] }
    }

    /// The same row of consecutive heads.
    fn across_heads(&self, batch: usize, head: usize, row: usize) -> Rows<'a> {
        Rows { stride: self.strides[1], ..self.head(batch, head, row) }
    }
}

/// Rows a stride apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    fn row(&self, at: usize, width: usize) -> &'a [f32] {
        &self.data[at * self.stride..][..width]
    }

    fn from(&self, at: usize) -> Self {
        Self { data: &self.data[at * self.stride..], stride: self.stride }
    }
}

/// Output `[batch, heads, Sq, D]` and log-sum-exp `[batch, heads, Sq]`.
pub(crate) struct Output {
    pub output: Vec<f32>,
    pub lse: Vec<f32>,
}

/// What SampleAttention leaves besides its output, for each head of each sequence.
pub(crate) struct Sparse {
    pub attention: Output,
    pub plans: Vec<HostPlan>,
    /// Mean and minimum over the sampled rows of the kept mass.
    pub recall: Vec<[f32; 2]>,
    /// Keys before the tail.
    columns: usize,
}

/// The plans as [`Sparse`](crate::backend::Sparse) lays them out.
pub(crate) struct Tables {
    pub density: Vec<f32>,
    pub recall: Vec<f32>,
    pub table: Vec<i32>,
    pub stripes: Vec<i32>,
}

impl Sparse {
    pub fn tables(&self) -> Tables {
        let mut tables = Tables {
            density: self.plans.iter().map(|plan| plan.density).collect(),
            recall: self.recall.iter().flatten().copied().collect(),
            table: Vec::new(),
            stripes: Vec::new(),
        };
        for plan in &self.plans {
            let blocks = plan.bands.len();
            let kept: Vec<i32> = (0..blocks as i32).filter(|&d| plan.bands[d as usize]).collect();
            tables.table.extend([i32::from(plan.dense), plan.stripes.len() as i32]);
            tables
                .table
                .extend((0..blocks).map(|d| plan.bands[..=d].iter().filter(|&&kept| kept).count() as i32));
            tables.table.extend(&kept);
            tables.table.resize(tables.table.len() + blocks - kept.len(), 0);
            tables.stripes.extend(&plan.stripes);
            tables.stripes.resize(tables.stripes.len() + self.columns - plan.stripes.len(), -1);
        }
        tables
    }
}

fn shape_of(q: &View<'_>, k: &View<'_>) -> AttentionShape {
    let [batch, q_heads, q_len, head_dim] = q.shape;
    let [_, kv_heads, kv_len, _] = k.shape;
    AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim }
}

/// Causal attention over all keys.
pub(crate) fn dense_attention(q: View<'_>, k: View<'_>, v: View<'_>, scale: f64) -> Output {
    planned_attention(q, k, v, scale as f32, None)
}

/// SampleAttention; some rows stand above the tail. Calls back after each stage.
pub(crate) fn sample_attention(
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    options: &SampleAttentionOptions,
    after: &mut dyn FnMut(Stage),
) -> Sparse {
    let shape = shape_of(&q, &k);
    let scale = shape.scale(options) as f32;
    let rows = shape.sampled_rows(options);
    let weights = match options.rule {
        Rule::Contribution => values::weights(&v),
        Rule::Total | Rule::Residual | Rule::Joint => Vec::new(),
    };
    let sampled: Vec<(HostPlan, Vec<f32>)> = (0..shape.heads())
        .into_par_iter()
        .map(|head| {
            let (batch, at) = (head / shape.q_heads, head % shape.q_heads);
            let (queries, keys) = (q.head(batch, at, 0), k.head(batch, at / shape.group(), 0));
            let kv_head = batch * shape.kv_heads + at / shape.group();
            let weights = weights.get(kv_head).map(Vec::as_slice).unwrap_or_default();
            let sampled = sample::Sampled::new(&shape, options, &rows, queries, keys, weights, scale);
            (choose::plan(&shape, options, &sampled, weights), sampled.lse)
        })
        .collect();
    let (plans, all_lse): (Vec<_>, Vec<_>) = sampled.into_iter().unzip();
    after(Stage::Plan);
    let attention = planned_attention(q, k, v, scale, Some((&plans, options)));
    after(Stage::Attention);
    let recall = all_lse.iter().zip(attention.lse.chunks_exact(shape.q_len)).map(|(all, kept)| {
        let shares: Vec<f32> =
            rows.iter().zip(all).map(|(&row, all)| (kept[row as usize] - all).exp()).collect();
        [shares.iter().sum::<f32>() / rows.len() as f32, shares.iter().copied().fold(1.0, f32::min)]
    });
    let recall = recall.collect();
    Sparse { attention, plans, recall, columns: shape.tail_start(options) }
}

/// Attention over the keys that the plans keep, over all without.
fn planned_attention(
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    scale: f32,
    plans: Option<(&[HostPlan], &SampleAttentionOptions)>,
) -> Output {
    let shape = shape_of(&q, &k);
    let AttentionShape { q_heads, kv_heads, q_len, head_dim, .. } = shape;
    let mut output = vec![0.0; shape.heads() * q_len * head_dim];
    let mut lse = vec![0.0; shape.heads() * q_len];

    // With one query a sequence, the heads of a group are the rows of a tile.
    let stacked = q_len == 1;
    let (heads, rows) = if stacked { (kv_heads, shape.group()) } else { (q_heads, q_len) };
    let mut tiles = Vec::new();
    let outputs = output.chunks_mut(rows * head_dim).zip(lse.chunks_mut(rows));
    for (index, (mut output, mut lse)) in outputs.enumerate() {
        let (batch, at) = (index / heads, index % heads);
        let mut row = 0;
        while row < rows {
            // Tiles end at block borders, so that a tile has one distance to each block.
            let first = if stacked { shape.kv_len - 1 } else { shape.offset() + row };
            let room = plans.map_or(ROWS, |(_, options)| options.block_size - first % options.block_size);
            let here = ROWS.min(room).min(rows - row);
            let (tile_output, rest) = output.split_at_mut(here * head_dim);
            let (tile_lse, rest_lse) = lse.split_at_mut(here);
            (output, lse) = (rest, rest_lse);
            let (queries, kv_head) = if stacked {
                (q.across_heads(batch, at * rows + row, 0), at)
            } else {
                (q.head(batch, at, row), at / shape.group())
            };
            tiles.push(Tile {
                queries,
                keys: k.head(batch, kv_head, 0),
                values: v.head(batch, kv_head, 0),
                first_position: first,
                steps: !stacked,
                plan: plans
                    .map(|(plans, options)| (&plans[index], shape.tail_start(options), options.block_size)),
                output: tile_output,
                lse: tile_lse,
            });
            row += here;
        }
    }
    // Long rows first, so that no thread is left with one at the end.
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile.first_position));
    tiles
        .into_par_iter()
        .for_each_init(Scratch::default, |scratch, tile| tile.attend(head_dim, scale, scratch));
    Output { output, lse }
}
