//! The exact attention of the sampled rows of one head, summed over bands and columns.

use pulp::Arch;
use sample_attention_plan::{AttentionShape, Rule, SampleAttentionOptions};

use super::math::{exp, online_softmax, product};
use super::{KEYS, ROWS, Rows};

/// Groups of bands whose columns are summed apart under rule `joint`.
const GROUPS: usize = 32;

/// Sums of the sampled rows' probability mass.
pub(super) struct Sampled {
    /// Log-sum-exp of each sampled row over all keys.
    pub lse: Vec<f32>,
    /// For each block distance the group that its entries are summed in; none where they are not.
    pub group: Vec<Option<usize>>,
    /// For each group the mass of every column before the tail.
    pub columns: Vec<Vec<f32>>,
    /// Weighted mass and number of the entries of each band; empty but under rules `joint` and `contribution`.
    pub bands: Vec<(f64, f64)>,
    /// Positions of the sampled rows, ascending.
    pub positions: Vec<usize>,
}

/// A tile of sampled rows against a tile of keys.
struct Scores<'a> {
    queries: Vec<f32>,
    positions: &'a [usize],
    keys: Rows<'a>,
    head_dim: usize,
    scale: f32,
    /// Keys of a tile: whole blocks.
    width: usize,
    values: Vec<f32>,
}

impl Scores<'_> {
    /// Calls back for each tile of keys with its first key and for each row the scores of those that it sees.
    fn each(&mut self, mut work: impl FnMut(usize, usize, &mut [f32])) {
        let rows = self.positions.len();
        let end = self.positions[rows - 1] + 1;
        self.values.resize(rows * self.width, 0.0);
        for first in (0..end).step_by(self.width) {
            let n = self.width.min(end - first);
            let keys = self.keys.from(first);
            let (queries, keys) = ((&self.queries[..], self.head_dim, 1), (keys.data, 1, keys.stride));
            product(rows, n, self.head_dim, &mut self.values, self.width, false, queries, keys, self.scale);
            Arch::new().dispatch(|| {
                for (row, scores) in self.values.chunks_exact_mut(self.width).enumerate() {
                    let seen = (self.positions[row] + 1).saturating_sub(first).min(n);
                    work(row, first, &mut scores[..seen]);
                }
            });
        }
    }
}

impl Sampled {
    pub fn new(
        shape: &AttentionShape,
        options: &SampleAttentionOptions,
        rows: &[u32],
        queries: Rows<'_>,
        keys: Rows<'_>,
        weights: &[f32],
        scale: f32,
    ) -> Self {
        let (block, head_dim) = (options.block_size, shape.head_dim);
        let positions: Vec<usize> = rows.iter().map(|&row| shape.offset() + row as usize).collect();
        let blocks = shape.blocks(options);
        let joint = options.rule == Rule::Joint;
        let chooses_bands = joint || options.rule == Rule::Contribution;
        let mut sampled = Self {
            lse: Vec::with_capacity(rows.len()),
            group: Vec::new(),
            columns: Vec::new(),
            bands: if chooses_bands { vec![(0.0, 0.0); blocks] } else { Vec::new() },
            positions: Vec::new(),
        };
        let tiles = || {
            rows.chunks(ROWS).zip(positions.chunks(ROWS)).map(|(rows, positions)| Scores {
                queries: rows.iter().flat_map(|&row| queries.row(row as usize, head_dim)).copied().collect(),
                positions,
                keys,
                head_dim,
                scale,
                width: block * (KEYS / block).max(1),
                values: Vec::new(),
            })
        };
        for mut tile in tiles() {
            sampled.normalise(&mut tile, block, weights);
        }
        sampled.group = match options.rule {
            Rule::Total => vec![Some(0); blocks],
            Rule::Residual => (0..blocks).map(|d| (d > shape.window(options)).then_some(0)).collect(),
            Rule::Joint => sampled.groups(shape.window(options), options.alpha),
            Rule::Contribution => {
                let threshold = options.threshold / shape.kv_len as f64;
                let kept = |d: usize| d <= shape.window(options) || sampled.density(d) > threshold;
                (0..blocks).map(|d| (!kept(d)).then_some(0)).collect()
            }
        };
        let groups = if joint { GROUPS } else { 1 };
        sampled.columns = vec![vec![0.0; shape.tail_start(options)]; groups];
        for (index, mut tile) in tiles().enumerate() {
            sampled.sum_columns(&mut tile, index * ROWS, block);
        }
        sampled.positions = positions;
        sampled
    }

    /// First pass: log-sum-exp of each row, and the mass of each band where bands are chosen, each entry times the
    /// weight of its key where keys have weights.
    fn normalise(&mut self, tile: &mut Scores<'_>, block: usize, weights: &[f32]) {
        let positions = tile.positions;
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; positions.len()], vec![0.0; positions.len()]);
        let blocks = self.bands.len();
        // For each row and key block the mass relative to the largest score when it was met, and that score.
        let mut parts = vec![(0.0f32, 0.0f32); positions.len() * blocks];
        tile.each(|row, first, scores| {
            online_softmax(scores, &mut max[row], &mut sum[row]);
            if blocks > 0 {
                for (at, scores) in scores.chunks(block).enumerate() {
                    let mass = if weights.is_empty() {
                        scores.iter().sum()
                    } else {
                        let weights = &weights[first + at * block..];
                        scores.iter().zip(weights).map(|(score, weight)| score * weight).sum()
                    };
                    parts[row * blocks + first / block + at] = (mass, max[row]);
                }
            }
        });
        for (row, &position) in positions.iter().enumerate() {
            let lse = max[row] + sum[row].ln();
            self.lse.push(lse);
            if blocks > 0 {
                for (key_block, (mass, max)) in
                    parts[row * blocks..].iter().take(position / block + 1).enumerate()
                {
                    let band = &mut self.bands[position / block - key_block];
                    band.0 += f64::from(mass * (max - lse).exp());
                    band.1 += block.min(position + 1 - key_block * block) as f64;
                }
            }
        }
    }

    /// Second pass: the mass of each column, apart for each group of bands.
    fn sum_columns(&mut self, tile: &mut Scores<'_>, first_row: usize, block: usize) {
        let positions = tile.positions;
        let (lse, group, columns) = (&self.lse[first_row..], &self.group, &mut self.columns);
        tile.each(|row, first, scores| {
            for (at, scores) in scores.chunks(block).enumerate() {
                let start = first + at * block;
                let Some(group) = group[positions[row] / block - start / block] else { continue };
                for (sum, &score) in columns[group][start..].iter_mut().zip(scores) {
                    *sum += exp(score - lse[row]);
                }
            }
        });
    }

    /// Cuts the bands outside the forced window, by descending mass per entry, into groups of about equal
    /// cost. The last group holds those that are never needed: the bands before them reach alpha alone.
    fn groups(&self, window: usize, alpha: f64) -> Vec<Option<usize>> {
        let order = self.by_yield(window);
        let need = alpha * self.lse.len() as f64;
        let mut kept: f64 = self.bands.iter().take(window + 1).map(|band| band.0).sum();
        let mut needed = order.len();
        for (at, &d) in order.iter().enumerate() {
            if kept >= need {
                needed = at;
                break;
            }
            kept += self.bands[d].0;
        }
        let cost: f64 = order[..needed].iter().map(|&d| self.bands[d].1).sum();
        let mut group = vec![None; self.bands.len()];
        let mut before = 0.0;
        for (at, &d) in order.iter().enumerate() {
            let share = if needed < GROUPS { at } else { (before / cost * (GROUPS - 1) as f64) as usize };
            group[d] = Some(if at < needed { share.min(GROUPS - 2) } else { GROUPS - 1 });
            before += self.bands[d].1;
        }
        group
    }

    /// Bands outside the forced window, by descending mass per entry.
    pub fn by_yield(&self, window: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (window + 1..self.bands.len()).collect();
        order.sort_by(|&a, &b| self.density(b).total_cmp(&self.density(a)));
        order
    }

    /// Mass per entry of a band.
    pub fn density(&self, d: usize) -> f64 {
        self.bands[d].0 / self.bands[d].1.max(1.0)
    }

    /// Sampled rows that see each column, at least 1.
    pub fn seeing(&self) -> Vec<f32> {
        let rows = |column| self.positions.len() - self.positions.partition_point(|&p| p < column);
        (0..self.columns[0].len()).map(|column| rows(column).max(1) as f32).collect()
    }
}
