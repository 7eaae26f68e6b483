use sample_attention_kernels::{
    from_bytes,
    layers::{RmsNorm, rms_norm},
    to_bytes,
};

use super::{Matrix, assert_rounded, poisoned, read_rows, types};
use crate::common::{client, fresh_rng};

#[test]
fn layers_rms_norm() {
    let (client, mut rng) = (client(), fresh_rng());
    for (dtype, step) in types(&client) {
        for (case, shape) in
            [[1, 4096], [3, 64], [7, 577], [2, 13696], [40, 100], [1, 1], [5, 6]].into_iter().enumerate()
        {
            let (gap, round_before_weight, epsilon) = ([0, 8, 1][case % 3], case % 2 == 1, 1e-5);
            let mut random = |shape, gap| Matrix::random(&client, &mut rng, shape, gap, dtype);
            let x = random(shape, gap);
            let weight = random([1, shape[1]], 0);
            let y = poisoned(&client, shape, gap, dtype);
            let call = RmsNorm { x: &x.view, weight: &weight.view, epsilon, round_before_weight, y: &y };
            rms_norm(&client, &call).expect("a valid call");
            let mut expected = Vec::new();
            for row in 0..shape[0] {
                let mean = x.row(row).iter().map(|x| x * x).sum::<f64>() / shape[1] as f64;
                let scale = 1.0 / (mean + epsilon).sqrt();
                for (value, weight) in x.row(row).iter().zip(&weight.values) {
                    let normalized = value * scale;
                    // A number between two others may go either way.
                    let slack =
                        if round_before_weight { step * normalized.abs() * weight.abs() } else { 0.0 };
                    expected.push((normalized * weight, 0.6 * slack + 4e-6 * normalized.abs() + 1e-9));
                }
            }
            let what = format!("{dtype} {shape:?} {round_before_weight}");
            assert_rounded(&what, &read_rows(&client, &y), &expected, step);
        }
    }
}

/// The order of roundings shows where the weight is a half: rounding first, then halving, is exact.
#[test]
fn layers_rms_norm_rounds_where_it_is_told_to() {
    let (client, mut rng) = (client(), fresh_rng());
    for (dtype, _) in types(&client) {
        let x = Matrix::random(&client, &mut rng, [1, 256], 0, dtype);
        let mut three = Matrix::random(&client, &mut rng, [1, 256], 0, dtype);
        three.view.handle = client.create_from_slice(&to_bytes(&[3.0; 256], dtype));
        let mean = x.values.iter().map(|x| x * x).sum::<f64>() / 256.0;
        let rounded = |value: f64| f64::from(from_bytes(&to_bytes(&[value as f32], dtype), dtype)[0]);
        for round_before_weight in [false, true] {
            let y = poisoned(&client, [1, 256], 0, dtype);
            let call = RmsNorm { x: &x.view, weight: &three.view, epsilon: 0.0, round_before_weight, y: &y };
            rms_norm(&client, &call).expect("a valid call");
            let expected = x.values.iter().map(|x| {
                let normalized = x / mean.sqrt();
                rounded(3.0 * if round_before_weight { rounded(normalized) } else { normalized })
            });
            let same = read_rows(&client, &y).into_iter().zip(expected).filter(|(a, b)| (a - b).abs() < 1e-5);
            // Sums in f32 tip the rounding of a number now and then.
            assert!(same.count() >= 250, "{dtype}, rounded before the weight: {round_before_weight}");
        }
    }
}
