//! The same computation in plain `f64` loops: what the kernels are tested against.
//!
//! Tensors are contiguous slices: q `[batch, q_heads, q_len, head_dim]`, k and v `[batch, kv_heads, kv_len, head_dim]`.

use std::{panic::resume_unwind, thread};

use crate::{AttentionShape, HostPlan, Rule, SampleAttentionOptions};

/// A plan, and how much of the sampled rows' mass it keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferencePlan {
    /// The plan of the query head.
    pub plan: HostPlan,
    /// Mean over the sampled rows of the kept mass.
    pub recall_mean: f64,
    /// Minimum over the sampled rows of the kept mass.
    pub recall_min: f64,
}

/// Output and log-sum-exp.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceOutput {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub out: Vec<f64>,
    /// `[batch, q_heads, q_len]`.
    pub lse: Vec<f64>,
}

/// The plans of all heads, numbered `sequence * q_heads + head`.
pub fn plans(
    shape: &AttentionShape,
    options: &SampleAttentionOptions,
    q: &[f32],
    k: &[f32],
    v: &[f32],
) -> Vec<ReferencePlan> {
    let weights = match options.rule {
        Rule::Contribution => value_weights(shape, v),
        Rule::Total | Rule::Residual | Rule::Joint => Vec::new(),
    };
    in_parallel(shape.heads(), |head| {
        let (sequence, head_of_sequence) = (head / shape.q_heads, head % shape.q_heads);
        let kv_head = sequence * shape.kv_heads + head_of_sequence / shape.group();
        plan_head(shape, options, q, k, weights.get(kv_head).map_or(&[], Vec::as_slice), head)
    })
}

/// For each key/value head of each sequence the distance of each value from the head's mean value, over the mean of
/// all these distances of the sequence.
fn value_weights(shape: &AttentionShape, v: &[f32]) -> Vec<Vec<f64>> {
    let (dim, keys) = (shape.head_dim, shape.kv_len as f64);
    let mut weights: Vec<Vec<f64>> = v
        .chunks_exact(shape.kv_len * dim)
        .map(|values| {
            let mut mean = vec![0.0; dim];
            for value in values.chunks_exact(dim) {
                mean.iter_mut().zip(value).for_each(|(sum, &x)| *sum += f64::from(x) / keys);
            }
            let distance = |value: &[f32]| {
                let squares = value.iter().zip(&mean).map(|(&x, mean)| (f64::from(x) - mean).powi(2));
                squares.sum::<f64>().sqrt()
            };
            values.chunks_exact(dim).map(distance).collect()
        })
        .collect();
    for heads in weights.chunks_mut(shape.kv_heads) {
        let mean = heads.iter().flatten().sum::<f64>() / (keys * shape.kv_heads as f64);
        heads.iter_mut().flatten().for_each(|weight| *weight /= mean.max(f64::MIN_POSITIVE));
    }
    weights
}

/// Attention over the keys that the plans keep.
pub fn attention(
    shape: &AttentionShape,
    options: &SampleAttentionOptions,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    plans: &[HostPlan],
) -> ReferenceOutput {
    let rows = in_parallel(shape.heads() * shape.q_len, |index| {
        let (head, row) = (index / shape.q_len, index % shape.q_len);
        attention_row(shape, options, q, k, v, &plans[head], (head, row))
    });
    let mut out = Vec::with_capacity(q.len());
    let mut lse = Vec::with_capacity(rows.len());
    for (row, normaliser) in rows {
        out.extend(row);
        lse.push(normaliser);
    }
    ReferenceOutput { out, lse }
}

/// Output and log-sum-exp of one query row of one head.
pub fn attention_row(
    shape: &AttentionShape,
    options: &SampleAttentionOptions,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    plan: &HostPlan,
    (head, row): (usize, usize),
) -> (Vec<f64>, f64) {
    let dim = shape.head_dim;
    let mask = Mask::new(shape, options, plan);
    let values = kv_head(shape, v, head);
    let position = shape.offset() + row;
    let scores = row_scores(shape, options, q, k, head, row);
    let kept: Vec<usize> = (0..=position).filter(|&j| mask.keeps(position, j)).collect();
    let normaliser = log_sum_exp(kept.iter().map(|&j| scores[j]));
    let mut sum = vec![0.0; dim];
    for j in kept {
        let weight = (scores[j] - normaliser).exp();
        for (sum, &value) in sum.iter_mut().zip(&values[j * dim..][..dim]) {
            *sum += weight * f64::from(value);
        }
    }
    (sum, normaliser)
}

/// The results of `work` for `0..count`, in order, on all processors.
fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(count.max(1));
    let work = &work;
    thread::scope(|scope| {
        // Every thread takes each `threads`-th item: late rows cost more than early ones.
        let workers: Vec<_> = (0..threads)
            .map(|first| scope.spawn(move || (first..count).step_by(threads).map(work).collect::<Vec<T>>()))
            .collect();
        let mut parts: Vec<_> = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)).into_iter())
            .collect();
        (0..count).filter_map(|index| parts[index % threads].next()).collect()
    })
}

/// Which pairs a plan keeps.
pub struct Mask<'a> {
    plan: &'a HostPlan,
    tail_start: usize,
    block_size: usize,
}

impl<'a> Mask<'a> {
    /// The mask of a plan.
    pub fn new(shape: &AttentionShape, options: &SampleAttentionOptions, plan: &'a HostPlan) -> Self {
        Self { plan, tail_start: shape.tail_start(options), block_size: options.block_size }
    }

    /// Whether a row at `position` attends to a key that it sees.
    pub fn keeps(&self, position: usize, key: usize) -> bool {
        let distance = position / self.block_size - key / self.block_size;
        let is_stripe = || self.plan.stripes.binary_search(&(key as i32)).is_ok();
        position >= self.tail_start || self.plan.dense || self.plan.bands[distance] || is_stripe()
    }
}

fn kv_head<'a>(shape: &AttentionShape, tensor: &'a [f32], head: usize) -> &'a [f32] {
    let (sequence, head) = (head / shape.q_heads, head % shape.q_heads / shape.group());
    let size = shape.kv_len * shape.head_dim;
    &tensor[(sequence * shape.kv_heads + head) * size..][..size]
}

/// Scaled scores of a query row with the keys that it may see.
fn row_scores(
    shape: &AttentionShape,
    options: &SampleAttentionOptions,
    q: &[f32],
    k: &[f32],
    head: usize,
    row: usize,
) -> Vec<f64> {
    let dim = shape.head_dim;
    let query = &q[(head * shape.q_len + row) * dim..][..dim];
    let scale = shape.scale(options);
    kv_head(shape, k, head)
        .chunks_exact(dim)
        .take(shape.offset() + row + 1)
        .map(|key| {
            let products = query.iter().zip(key);
            products.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() * scale
        })
        .collect()
}

fn log_sum_exp(scores: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = scores.clone().fold(f64::NEG_INFINITY, f64::max);
    max + scores.map(|score| (score - max).exp()).sum::<f64>().ln()
}

fn plan_head(
    shape: &AttentionShape,
    options: &SampleAttentionOptions,
    q: &[f32],
    k: &[f32],
    weights: &[f64],
    head: usize,
) -> ReferencePlan {
    let rows = shape.sampled_rows(options);
    let blocks = shape.blocks(options);
    let dense = ReferencePlan { plan: HostPlan::dense(blocks), recall_mean: 1.0, recall_min: 1.0 };
    if rows.is_empty() {
        return dense;
    }
    let probabilities: Vec<(usize, Vec<f64>)> = rows
        .iter()
        .map(|&row| {
            let row = row as usize;
            let scores = row_scores(shape, options, q, k, head, row);
            let normaliser = log_sum_exp(scores.iter().copied());
            let row_mass = scores.iter().map(|score| (score - normaliser).exp());
            (shape.offset() + row, row_mass.collect())
        })
        .collect();
    let sample =
        Sample { probabilities, block_size: options.block_size, columns: shape.tail_start(options), blocks };
    let window: Vec<bool> = (0..blocks).map(|d| d <= shape.window(options)).collect();
    let need = options.alpha * rows.len() as f64;
    let (bands, mut stripes) = match options.rule {
        Rule::Total => {
            let scores = sample.column_mass(&vec![false; blocks]);
            let stripes = fewest(&scores, need);
            (window, stripes)
        }
        Rule::Residual => {
            let scores = sample.column_mass(&window);
            let inside = rows.len() as f64 - scores.iter().sum::<f64>();
            let stripes = fewest(&scores, need - inside);
            (window, stripes)
        }
        Rule::Joint => sample.joint(window, need),
        Rule::Contribution => sample.contribution(window, weights, options.threshold / shape.kv_len as f64),
    };
    stripes.sort_unstable();
    let stripes = stripes.into_iter().map(|j| j as i32).collect();
    let mut plan = HostPlan { dense: false, bands, stripes, density: 1.0 };

    let mask = Mask::new(shape, options, &plan);
    let kept_pairs: usize = (0..shape.q_len)
        .map(|row| {
            let position = shape.offset() + row;
            (0..=position).filter(|&j| mask.keeps(position, j)).count()
        })
        .sum();
    let recalls = sample.probabilities.iter().map(|(position, mass)| {
        let kept = mass.iter().enumerate();
        let kept = kept.filter(|&(j, _)| mask.keeps(*position, j));
        kept.map(|(_, mass)| mass).sum::<f64>()
    });
    let recalls: Vec<f64> = recalls.collect();
    let density = kept_pairs as f64 / shape.causal_pairs();
    if options.dense_cost.is_some_and(|limit| density > limit) {
        return dense;
    }
    plan.density = density as f32;
    ReferencePlan {
        recall_mean: recalls.iter().sum::<f64>() / recalls.len() as f64,
        recall_min: recalls.into_iter().fold(1.0, f64::min),
        plan,
    }
}

/// The fewest columns, by descending score, ties to the lower index, whose scores reach `need`.
fn fewest(scores: &[f64], need: f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for j in order {
        if sum >= need {
            break;
        }
        sum += scores[j];
        kept.push(j);
    }
    kept
}

/// The exact attention of the sampled rows.
struct Sample {
    /// Position and probabilities of each row.
    probabilities: Vec<(usize, Vec<f64>)>,
    block_size: usize,
    columns: usize,
    blocks: usize,
}

impl Sample {
    /// Mass per column, outside the given bands.
    fn column_mass(&self, bands: &[bool]) -> Vec<f64> {
        let mut sums = vec![0.0; self.columns];
        for (position, row) in &self.probabilities {
            for (j, mass) in row.iter().enumerate() {
                if !bands[position / self.block_size - j / self.block_size] {
                    sums[j] += mass;
                }
            }
        }
        sums
    }

    /// Sampled entries of each band and their mass, each entry times the weight of its key.
    fn band_mass(&self, weight: impl Fn(usize) -> f64) -> (Vec<f64>, Vec<f64>) {
        let mut entries = vec![0.0; self.blocks];
        let mut sums = vec![0.0; self.blocks];
        for (position, row) in &self.probabilities {
            for (j, mass) in row.iter().enumerate() {
                let distance = position / self.block_size - j / self.block_size;
                entries[distance] += 1.0;
                sums[distance] += mass * weight(j);
            }
        }
        (entries, sums)
    }

    /// Sampled rows that see each column, at least 1.
    fn seeing(&self) -> Vec<f64> {
        let rows = |j: usize| self.probabilities.iter().filter(|(p, _)| *p >= j).count();
        (0..self.columns).map(|j| rows(j).max(1) as f64).collect()
    }

    /// Rule `contribution`: bands first, then the stripes that lie outside of them.
    fn contribution(&self, forced: Vec<bool>, weights: &[f64], threshold: f64) -> (Vec<bool>, Vec<usize>) {
        let (entries, mass) = self.band_mass(|j| weights[j]);
        let bands: Vec<bool> =
            (0..self.blocks).map(|d| forced[d] || mass[d] > threshold * entries[d]).collect();
        let (residual, seeing) = (self.column_mass(&bands), self.seeing());
        let kept = |&j: &usize| residual[j] / seeing[j] * weights[j] > threshold;
        let stripes = (0..self.columns).filter(kept).collect();
        (bands, stripes)
    }

    /// Rule `joint`, searching every threshold. The bands fall into the plan one by one; between
    /// two of them only stripes do.
    fn joint(&self, forced: Vec<bool>, need: f64) -> (Vec<bool>, Vec<usize>) {
        let (entries, mass) = self.band_mass(|_| 1.0);
        let seeing = self.seeing();
        let density = |d: usize| mass[d] / entries[d];
        let mut optional: Vec<usize> = (0..self.blocks).filter(|&d| !forced[d] && entries[d] > 0.0).collect();
        optional.sort_by(|&a, &b| density(b).total_cmp(&density(a)));

        let mut bands = forced;
        for step in 0..=optional.len() {
            if step > 0 {
                bands[optional[step - 1]] = true;
            }
            // Thresholds in [low, high) keep exactly these bands.
            let high = match step {
                0 => f64::INFINITY,
                _ => density(optional[step - 1]),
            };
            let low = optional.get(step).map_or(0.0, |&d| density(d));
            let residual = self.column_mass(&bands);
            let total: f64 = self.probabilities.len() as f64;
            let mut kept_mass = total - residual.iter().sum::<f64>();
            let mut order: Vec<usize> = (0..self.columns).collect();
            let price = |j: usize| residual[j] / seeing[j];
            order.sort_by(|&a, &b| price(b).total_cmp(&price(a)));
            let mut stripes = Vec::new();
            for j in order {
                if price(j) <= low || (price(j) < high && kept_mass >= need) {
                    break;
                }
                kept_mass += residual[j];
                stripes.push(j);
            }
            if kept_mass >= need {
                return (bands, stripes);
            }
        }
        (vec![true; self.blocks], Vec::new())
    }
}
