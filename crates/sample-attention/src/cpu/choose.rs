//! From sampled mass to the plan of one head.

use sample_attention_plan::{AttentionShape, HostPlan, Rule, SampleAttentionOptions};

use super::sample::Sampled;

/// Bands and stripes of one head.
///
/// `weights` are the values' relative distances from their mean; none but under rule `contribution`.
pub(super) fn plan(
    shape: &AttentionShape,
    options: &SampleAttentionOptions,
    sampled: &Sampled,
    weights: &[f32],
) -> HostPlan {
    let blocks = shape.blocks(options);
    // Scores and values that are not finite say nothing about what matters.
    if sampled.lse.iter().chain(weights).any(|number| !number.is_finite()) {
        return HostPlan::dense(blocks);
    }
    let window = shape.window(options);
    let total = sampled.lse.len() as f64;
    let need = options.alpha * total;
    let (bands, mut stripes) = match options.rule {
        Rule::Total => (window_bands(blocks, window), fewest(&sampled.columns[0], &sampled.columns[0], need)),
        Rule::Residual => {
            let scores = &sampled.columns[0];
            let outside: f64 = scores.iter().map(|&score| f64::from(score)).sum();
            (window_bands(blocks, window), fewest(scores, scores, need - (total - outside)))
        }
        Rule::Joint => joint(sampled, window, total - need),
        Rule::Contribution => contribution(sampled, weights, options.threshold / shape.kv_len as f64),
    };
    stripes.sort_unstable();
    let plan = HostPlan { dense: false, bands, stripes, density: 1.0 };
    let density = kept_pairs(shape, options, &plan) / shape.causal_pairs();
    if options.dense_cost.is_some_and(|limit| density > limit) {
        return HostPlan::dense(blocks);
    }
    HostPlan { density: density as f32, ..plan }
}

fn window_bands(blocks: usize, window: usize) -> Vec<bool> {
    (0..blocks).map(|d| d <= window).collect()
}

/// The fewest columns by descending price, ties to the lower index, whose scores reach `need`.
fn fewest(prices: &[f32], scores: &[f32], need: f64) -> Vec<i32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| prices[b as usize].total_cmp(&prices[a as usize]));
    let mut sum = 0.0;
    let enough = order.iter().position(|&column| {
        let reached = sum >= need;
        sum += f64::from(scores[column as usize]);
        reached
    });
    order[..enough.unwrap_or(order.len())].iter().map(|&column| column as i32).collect()
}

/// Bands and stripes at one threshold of sampled mass per entry. `slack` is the mass that may be lost.
///
/// Rung by rung more groups of bands are kept; the first rung whose stripes above its lowest threshold
/// reach alpha is taken, with the fewest stripes that do.
fn joint(sampled: &Sampled, window: usize, slack: f64) -> (Vec<bool>, Vec<i32>) {
    let groups = sampled.columns.len();
    let seeing = sampled.seeing();
    let order = sampled.by_yield(window);
    for rung in 0..groups {
        let kept = |d: usize| sampled.group[d].is_none_or(|group| group < rung);
        let threshold = order.iter().find(|&&d| !kept(d)).map_or(0.0, |&d| sampled.density(d) as f32);
        let mut residual = vec![0.0f32; seeing.len()];
        for group in &sampled.columns[rung..] {
            residual.iter_mut().zip(group).for_each(|(sum, mass)| *sum += mass);
        }
        let outside: f64 = residual.iter().map(|&mass| f64::from(mass)).sum();
        let above = residual.iter().zip(&seeing).filter(|(mass, seeing)| **mass > threshold * **seeing);
        let stripes: f64 = above.map(|(&mass, _)| f64::from(mass)).sum();
        if stripes >= outside - slack || rung + 1 == groups {
            let prices: Vec<f32> = residual.iter().zip(&seeing).map(|(mass, seeing)| mass / seeing).collect();
            let bands = (0..sampled.group.len()).map(kept).collect();
            return (bands, fewest(&prices, &residual, outside - slack));
        }
    }
    (vec![true; sampled.group.len()], Vec::new())
}

/// The bands that no column was summed over, and the columns that contribute more than the threshold beside them.
fn contribution(sampled: &Sampled, weights: &[f32], threshold: f64) -> (Vec<bool>, Vec<i32>) {
    let scores = sampled.columns[0].iter().zip(sampled.seeing()).zip(weights);
    let prices = scores.map(|((&mass, seeing), &weight)| f64::from(mass / seeing * weight));
    let stripes = prices.enumerate().filter(|&(_, price)| price > threshold);
    let bands = sampled.group.iter().map(Option::is_none).collect();
    (bands, stripes.map(|(column, _)| column as i32).collect())
}

/// Query-key pairs that the plan keeps, the tail's included.
fn kept_pairs(shape: &AttentionShape, options: &SampleAttentionOptions, plan: &HostPlan) -> f64 {
    let (block, tail_start) = (options.block_size, shape.tail_start(options));
    let mut pairs = 0.0;
    let mut position = shape.offset();
    while position < tail_start {
        let here = position / block;
        let end = ((here + 1) * block).min(tail_start);
        let before = plan.stripes.partition_point(|&column| (column as usize) < here * block);
        let stripes =
            plan.stripes[..before].iter().filter(|&&column| !plan.bands[here - column as usize / block]);
        let whole = plan.bands[1..].iter().take(here).filter(|&&kept| kept).count() * block + stripes.count();
        let rows = end - position;
        // Band 0 is always kept: each row sees its own block up to itself.
        let own: usize = (position..end).map(|position| position % block + 1).sum();
        pairs += (rows * whole + own) as f64;
        position = end;
    }
    pairs + (position.max(shape.offset())..shape.kv_len).map(|position| (position + 1) as f64).sum::<f64>()
}
