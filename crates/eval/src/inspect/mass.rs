//! Where the attention of one head lies, and what of it a plan kept.

use std::ops::Range;

use long_context::cache::Observation;
use rayon::prelude::*;
use sample_attention::{AttentionShape, HostPlan, SampleAttentionOptions};

/// Parts of a head's rows that are worked on at the same time.
const PARTS: usize = 4;

/// How positions fall into the cells of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Positions of a cell.
    pub size: usize,
    /// Cells in each direction.
    pub cells: usize,
}

impl Grid {
    /// At most `most` cells in each direction: of several blocks each for a long prompt, of halves of blocks
    /// for a short one, as long as they have `least` positions.
    pub fn new(tokens: usize, block_size: usize, most: usize, least: usize) -> Self {
        let cells = |size: usize| tokens.div_ceil(size).max(1);
        let mut size = cells(block_size).div_ceil(most.max(1)) * block_size;
        while size <= block_size && size.is_multiple_of(2) && size / 2 >= least && cells(size / 2) <= most {
            size /= 2;
        }
        Self { size, cells: cells(size) }
    }

    fn cell(&self, position: usize) -> usize {
        position / self.size
    }
}

/// The attention of one head over a prompt, summed over the rows looked at.
#[derive(Debug, Clone)]
pub struct HeadMass {
    /// The layer.
    pub layer: usize,
    /// The query head.
    pub head: usize,
    /// Rows looked at.
    pub rows: usize,
    /// Rows looked at in each cell of positions.
    pub rows_of_cell: Vec<u32>,
    /// Mass in each cell of rows and keys, `[cells, cells]`.
    pub mass: Vec<f32>,
    /// Mass of it that was not kept.
    pub lost: Vec<f32>,
    /// Query-key pairs of each cell, and those kept.
    pub pairs: Vec<[u32; 2]>,
    /// Mass that each key lost, over all rows looked at.
    pub lost_by_key: Vec<f32>,
    /// The least mass that a row kept, and its position.
    pub worst: (f32, usize),
    /// Kept over causal pairs, as the plans say, and the pairs they are of.
    pub density: (f64, f64),
    /// Stripes and bands of the last plan.
    pub stripes: usize,
    /// Kept block distances of the last plan, of all.
    pub bands: (usize, usize),
    /// Whether the last plan was dense.
    pub dense: bool,
    /// Mean mass that the last plan kept of the rows it was chosen from.
    pub sampled: f32,
}

impl HeadMass {
    fn new(layer: usize, head: usize, tokens: usize, grid: Grid) -> Self {
        let cells = grid.cells * grid.cells;
        Self {
            layer,
            head,
            rows: 0,
            rows_of_cell: vec![0; grid.cells],
            mass: vec![0.0; cells],
            lost: vec![0.0; cells],
            pairs: vec![[0; 2]; cells],
            lost_by_key: vec![0.0; tokens],
            worst: (1.0, 0),
            density: (0.0, 0.0),
            stripes: 0,
            bands: (0, 0),
            dense: true,
            sampled: 1.0,
        }
    }

    /// Mean kept mass of the rows looked at.
    pub fn recall(&self) -> f64 {
        1.0 - self.lost.iter().map(|&lost| f64::from(lost)).sum::<f64>() / self.rows.max(1) as f64
    }

    /// Kept over causal pairs.
    pub fn density(&self) -> f64 {
        if self.density.1 == 0.0 { 1.0 } else { self.density.0 / self.density.1 }
    }

    /// Adds what another saw of the same head.
    fn merge(&mut self, other: &Self) {
        let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        self.rows += other.rows;
        add(&mut self.mass, &other.mass);
        add(&mut self.lost, &other.lost);
        add(&mut self.lost_by_key, &other.lost_by_key);
        self.rows_of_cell.iter_mut().zip(&other.rows_of_cell).for_each(|(to, from)| *to += from);
        for (to, from) in self.pairs.iter_mut().zip(&other.pairs) {
            *to = [to[0] + from[0], to[1] + from[1]];
        }
        if other.worst.0 < self.worst.0 {
            self.worst = other.worst;
        }
    }
}

/// Collects the heads of a prompt, chunk by chunk and layer by layer.
#[derive(Debug)]
pub struct Collector {
    /// Tokens of the whole prompt.
    tokens: usize,
    grid: Grid,
    options: SampleAttentionOptions,
    /// Rows to look at in each block.
    rows_per_block: usize,
    heads: Vec<HeadMass>,
}

impl Collector {
    /// Looks at `rows_per_block` evenly spaced rows of each block of a prompt.
    pub fn new(tokens: usize, grid: Grid, options: SampleAttentionOptions, rows_per_block: usize) -> Self {
        Self { tokens, grid, options, rows_per_block: rows_per_block.max(1), heads: Vec::new() }
    }

    /// The heads seen, layer by layer.
    pub fn into_heads(self) -> Vec<HeadMass> {
        self.heads
    }

    /// Takes one chunk of one layer.
    ///
    /// # Errors
    ///
    /// Tensors that are no `f32`.
    pub fn add(&mut self, seen: &Observation) -> Result<(), String> {
        let failed = |error| format!("{error:?}");
        let q = seen.q.as_slice::<f32>().map_err(failed)?;
        let k = seen.k.as_slice::<f32>().map_err(failed)?;
        let shape = AttentionShape {
            batch: 1,
            q_heads: seen.q.shape[1],
            kv_heads: seen.k.shape[1],
            q_len: seen.q.shape[2],
            kv_len: seen.k.shape[2],
            head_dim: seen.q.shape[3],
        };
        let dense = HostPlan::dense(shape.blocks(&self.options));
        let plan = |head: usize| seen.plans.as_ref().map_or(&dense, |plans| &plans[head]);
        let parts: Vec<(usize, HeadMass)> = (0..shape.q_heads * PARTS)
            .into_par_iter()
            .map(|index| {
                let (head, part) = (index / PARTS, index % PARTS);
                let keys = head / shape.group() * shape.kv_len * shape.head_dim;
                let keys = &k[keys..][..shape.kv_len * shape.head_dim];
                let queries = &q[head * shape.q_len * shape.head_dim..][..shape.q_len * shape.head_dim];
                let mut mass = HeadMass::new(seen.layer, head, self.tokens, self.grid);
                let kept = KeptKeys::new(&shape, &self.options, plan(head));
                for row in self.rows(&shape).skip(part).step_by(PARTS) {
                    let query = &queries[row * shape.head_dim..][..shape.head_dim];
                    self.row(&shape, query, keys, &kept, shape.offset() + row, &mut mass);
                }
                (head, mass)
            })
            .collect();
        for (head, part) in parts {
            self.head(seen.layer, head).merge(&part);
        }
        for head in 0..shape.q_heads {
            let plan = plan(head);
            let pairs = shape.causal_pairs();
            let held = self.head(seen.layer, head);
            held.density = (held.density.0 + f64::from(plan.density) * pairs, held.density.1 + pairs);
            held.stripes = plan.stripes.len();
            held.bands = (plan.bands.iter().filter(|kept| **kept).count(), plan.bands.len());
            held.dense = plan.dense;
        }
        Ok(())
    }

    fn head(&mut self, layer: usize, head: usize) -> &mut HeadMass {
        let at = self.heads.iter().position(|held| (held.layer, held.head) == (layer, head));
        let at = at.unwrap_or_else(|| {
            self.heads.push(HeadMass::new(layer, head, self.tokens, self.grid));
            self.heads.len() - 1
        });
        &mut self.heads[at]
    }

    /// The rows of a chunk to look at: evenly spaced in each block of positions, its last among them.
    fn rows(&self, shape: &AttentionShape) -> impl Iterator<Item = usize> {
        let (block, count) = (self.options.block_size, self.rows_per_block.min(self.options.block_size));
        let (offset, rows) = (shape.offset(), shape.q_len);
        (0..rows).filter(move |row| {
            let at = (offset + row) % block + 1;
            at * count / block > (at - 1) * count / block || row + 1 == rows
        })
    }

    /// Adds the exact attention of one row.
    fn row(
        &self,
        shape: &AttentionShape,
        query: &[f32],
        keys: &[f32],
        kept: &KeptKeys<'_>,
        position: usize,
        mass: &mut HeadMass,
    ) {
        let scale = shape.scale(&self.options) as f32;
        let keys = keys.chunks_exact(shape.head_dim).take(position + 1);
        let mut weights: Vec<f32> = keys.map(|key| scale * dot(query, key)).collect();
        let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|weight| *weight = (*weight - max).exp());
        let factor = 1.0 / weights.iter().sum::<f32>();
        weights.iter_mut().for_each(|weight| *weight *= factor);

        let row_cell = self.grid.cell(position);
        mass.rows += 1;
        mass.rows_of_cell[row_cell] += 1;
        let mut all_lost = 0.0;
        let part = self.grid.size.min(self.options.block_size);
        for (index, weights) in weights.chunks(part).enumerate() {
            let start = index * part;
            let cell = row_cell * self.grid.cells + self.grid.cell(start);
            mass.mass[cell] += weights.iter().sum::<f32>();
            let mut held = weights.len();
            if !kept.block(position, start) {
                let stripes = kept.stripes(start..start + weights.len());
                held = stripes.len();
                let mut lost = weights.iter().sum::<f32>();
                let mut add = |range: Range<usize>| {
                    for at in range {
                        mass.lost_by_key[start + at] += weights[at];
                    }
                };
                let mut from = 0;
                for &stripe in stripes {
                    let at = stripe as usize - start;
                    lost -= weights[at];
                    add(from..at);
                    from = at + 1;
                }
                add(from..weights.len());
                mass.lost[cell] += lost.max(0.0);
                all_lost += lost.max(0.0);
            }
            let [pairs, kept] = &mut mass.pairs[cell];
            *pairs += weights.len() as u32;
            *kept += held as u32;
        }
        let kept = 1.0 - all_lost;
        if kept < mass.worst.0 {
            mass.worst = (kept, position);
        }
    }
}

/// A plan that answers for whole blocks.
struct KeptKeys<'a> {
    plan: &'a HostPlan,
    tail_start: usize,
    block_size: usize,
}

impl<'a> KeptKeys<'a> {
    fn new(shape: &AttentionShape, options: &SampleAttentionOptions, plan: &'a HostPlan) -> Self {
        Self { plan, tail_start: shape.tail_start(options), block_size: options.block_size }
    }

    /// Whether a row keeps the block of a key whatever its stripes.
    fn block(&self, position: usize, key: usize) -> bool {
        let band = position / self.block_size - key / self.block_size;
        self.plan.dense || self.plan.bands[band] || position >= self.tail_start
    }

    fn stripes(&self, keys: Range<usize>) -> &'a [i32] {
        let at = |key: usize| self.plan.stripes.partition_point(|&stripe| (stripe as usize) < key);
        &self.plan.stripes[at(keys.start)..at(keys.end)]
    }
}

/// A scalar product in several sums, which compilers turn into vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut a).zip(&mut b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests;
