//! How far each value lies from its head's mean value.

use rayon::prelude::*;

use super::View;

/// For each key/value head of each sequence the distance of each value from the head's mean value, over the mean of
/// all these distances of the sequence; see `Rule::Contribution`.
pub(super) fn weights(v: &View<'_>) -> Vec<Vec<f32>> {
    let [batch, heads, _, _] = v.shape;
    let mut weights: Vec<Vec<f32>> =
        (0..batch * heads).into_par_iter().map(|head| distances(v, head / heads, head % heads)).collect();
    for heads in weights.chunks_mut(heads) {
        let count = heads.iter().map(Vec::len).sum::<usize>() as f64;
        let sum: f64 = heads.iter().flatten().map(|&distance| f64::from(distance)).sum();
        let mean = (sum / count).max(f64::from(f32::MIN_POSITIVE)) as f32;
        heads.iter_mut().flatten().for_each(|distance| *distance /= mean);
    }
    weights
}

/// Distance of each value of a head from their mean.
fn distances(v: &View<'_>, batch: usize, head: usize) -> Vec<f32> {
    let [_, _, keys, width] = v.shape;
    let values = v.head(batch, head, 0);
    let mut sum = vec![0.0f64; width];
    for key in 0..keys {
        sum.iter_mut().zip(values.row(key, width)).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let mean: Vec<f32> = sum.iter().map(|sum| (sum / keys as f64) as f32).collect();
    let distance = |key| {
        let gaps = values.row(key, width).iter().zip(&mean).map(|(x, mean)| x - mean);
        gaps.map(|gap| gap * gap).sum::<f32>().sqrt()
    };
    (0..keys).map(distance).collect()
}
