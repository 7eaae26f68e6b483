use sample_attention_kernels::{
    Error,
    layers::{Linear, MAX_LINEAR_ROWS, gated_linear, linear},
};

use super::{Matrix, assert_rounded, poisoned, read_rows, types};
use crate::common::{Client, client, fresh_rng};

/// Rows, inputs and outputs.
const SIZES: [[usize; 3]; 9] = [
    [1, 64, 40],
    [1, 1, 1],
    [1, 4096, 33],
    [1, 1712, 300],
    [2, 129, 7],
    [3, 37, 65],
    [5, 1048, 12],
    [8, 520, 19],
    [8, 2, 4097],
];

/// A product in float64, and how far sums in f32 may be off.
fn dot(x: &[f64], weight: &[f64]) -> (f64, f64) {
    let sum = |terms: &dyn Fn(f64) -> f64| x.iter().zip(weight).map(|(x, w)| terms(x * w)).sum::<f64>();
    (sum(&|term| term), 2e-6 * sum(&f64::abs) + 1e-7)
}

#[test]
fn layers_linear() {
    let (client, mut rng) = (client(), fresh_rng());
    for (dtype, step) in types(&client) {
        for (case, [rows, inputs, outputs]) in SIZES.into_iter().enumerate() {
            // Gaps that leave vectors, and gaps that break them.
            let gap = [0, 8, 3][case % 3];
            let mut random = |shape, gap| Matrix::random(&client, &mut rng, shape, gap, dtype);
            let x = random([rows, inputs], gap);
            let weight = random([outputs, inputs], gap);
            let bias = (case % 2 == 0).then(|| random([1, outputs], 0));
            let residual = (case % 4 < 2).then(|| random([rows, outputs], 5));
            let y = poisoned(&client, [rows, outputs], gap, dtype);
            let call = Linear {
                x: &x.view,
                weight: &weight.view,
                bias: bias.as_ref().map(|bias| &bias.view),
                residual: residual.as_ref().map(|residual| &residual.view),
                y: &y,
            };
            linear(&client, &call).expect("a valid call");
            let mut expected = Vec::new();
            for row in 0..rows {
                for output in 0..outputs {
                    let (sum, slack) = dot(x.row(row), weight.row(output));
                    let bias = bias.as_ref().map_or(0.0, |bias| bias.values[output]);
                    let residual = residual.as_ref().map_or(0.0, |residual| residual.row(row)[output]);
                    expected.push((sum + bias + residual, slack));
                }
            }
            let what = format!("{dtype} {rows} x {inputs} x {outputs}");
            assert_rounded(&what, &read_rows(&client, &y), &expected, step);
        }
    }
}

#[test]
fn layers_gated_linear() {
    let (client, mut rng) = (client(), fresh_rng());
    for (dtype, step) in types(&client) {
        for (case, [rows, inputs, outputs]) in SIZES.into_iter().enumerate() {
            let (fused, gap) = (case % 2 == 0, [0, 8, 3][case % 3]);
            let mut random = |shape, gap| Matrix::random(&client, &mut rng, shape, gap, dtype);
            let x = random([rows, inputs], 0);
            let gate = random([if fused { 2 * outputs } else { outputs }, inputs], gap);
            let up = (!fused).then(|| random([outputs, inputs], gap));
            let y = poisoned(&client, [rows, outputs], gap, dtype);
            let up_view = up.as_ref().map(|up| &up.view);
            gated_linear(&client, &x.view, &gate.view, up_view, &y).expect("a valid call");
            let mut expected = Vec::new();
            for row in 0..rows {
                for output in 0..outputs {
                    let up_row = up.as_ref().map_or_else(|| gate.row(outputs + output), |up| up.row(output));
                    let (gate, gate_slack) = dot(x.row(row), gate.row(output));
                    let (up, up_slack) = dot(x.row(row), up_row);
                    let slack = 2.0 * (gate_slack * up.abs() + up_slack * gate.abs()) + 1e-6;
                    expected.push((gate / (1.0 + (-gate).exp()) * up, slack));
                }
            }
            let what = format!("{dtype} {rows} x {inputs} x {outputs}");
            assert_rounded(&what, &read_rows(&client, &y), &expected, step);
        }
    }
}

/// Launches a product of these shapes that nobody reads.
fn attempt(client: &Client, x: [usize; 2], weight: [usize; 2], y: [usize; 2]) -> Result<(), Error> {
    let dtype = sample_attention_kernels::f32_type();
    let [x, weight, y] = [x, weight, y].map(|shape| poisoned(client, shape, 0, dtype));
    linear(client, &Linear { x: &x, weight: &weight, bias: None, residual: None, y: &y })
}

#[test]
fn layers_linear_refuses_what_does_not_fit() {
    let client = client();
    let message = |x, weight, y| attempt(&client, x, weight, y).unwrap_err().to_string();
    let too_many = MAX_LINEAR_ROWS + 1;
    assert_eq!(
        message([too_many, 4], [3, 4], [too_many, 3]),
        "tensor `x`: number of rows is 9, expected at most 8"
    );
    assert_eq!(message([1, 4], [3, 5], [1, 3]), "tensor `weight`: shape is [3, 5], expected [3, 4]");
    assert_eq!(message([1, 4], [3, 4], [2, 3]), "tensor `y`: shape is [2, 3], expected [1, 3]");
    let f32_type = sample_attention_kernels::f32_type();
    let mut short = poisoned(&client, [2, 4], 0, f32_type);
    short.stride = 5;
    let call = Linear { x: &short, weight: &short, bias: None, residual: None, y: &short };
    assert_eq!(
        linear(&client, &call).unwrap_err().to_string(),
        "tensor `x`: memory is 32, expected at least 36 bytes"
    );
}
