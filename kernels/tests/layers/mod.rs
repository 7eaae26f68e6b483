//! The kernels of decoder layers against float64: odd sizes, gaps between rows, outputs and gaps poisoned.

mod linear;
mod norm;
mod rotate;

use cubecl::prelude::*;
use rand::{RngExt, rngs::StdRng};
use sample_attention_kernels::{bf16_type, f32_type, from_bytes, half_type, layers::RowsView, to_bytes};

use crate::common::Client;

/// The types that the device has, with the distance from 1 to the next number.
pub fn types(client: &Client) -> Vec<(StorageType, f64)> {
    let all = [(f32_type(), f64::powi(2.0, -23)), (half_type(), 0.0009765625), (bf16_type(), 0.0078125)];
    all.into_iter().filter(|(dtype, _)| client.properties().supports_type(*dtype)).collect()
}

/// A matrix on the device, and its numbers.
pub struct Matrix {
    pub view: RowsView,
    pub values: Vec<f64>,
}

impl Matrix {
    /// Random numbers in -1..1, rows `gap` elements of NaN apart.
    pub fn random(
        client: &Client,
        rng: &mut StdRng,
        [rows, width]: [usize; 2],
        gap: usize,
        dtype: StorageType,
    ) -> Self {
        let mut padded = Vec::new();
        for _ in 0..rows {
            padded.extend((0..width).map(|_| rng.random_range(-1.0f32..1.0)));
            padded.extend(std::iter::repeat_n(f32::NAN, gap));
        }
        let bytes = to_bytes(&padded, dtype);
        let rounded = from_bytes(&bytes, dtype);
        let rows_of = rounded.chunks_exact(width + gap).flat_map(|row| &row[..width]);
        let values = rows_of.map(|&x| f64::from(x)).collect();
        let handle = client.create_from_slice(&bytes);
        Self { view: RowsView { handle, rows, width, stride: width + gap, dtype }, values }
    }

    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.view.width..][..self.view.width]
    }
}

/// NaN everywhere, rows `gap` elements apart.
pub fn poisoned(client: &Client, [rows, width]: [usize; 2], gap: usize, dtype: StorageType) -> RowsView {
    let bytes = to_bytes(&vec![f32::NAN; rows * (width + gap)], dtype);
    RowsView { handle: client.create_from_slice(&bytes), rows, width, stride: width + gap, dtype }
}

/// Reads a view, and fails where something was written between its rows.
pub fn read_rows(client: &Client, view: &RowsView) -> Vec<f64> {
    let bytes = client.read_one(view.handle.clone()).expect("readable buffer");
    let all = from_bytes(&bytes, view.dtype);
    let mut values = Vec::new();
    for row in all.chunks_exact(view.stride) {
        values.extend(row[..view.width].iter().map(|&x| f64::from(x)));
        assert!(row[view.width..].iter().all(|x| x.is_nan()), "written between rows");
    }
    values
}

/// Compares with half a unit in the last place of the expected number (of the least ones, f16 holds multiples of
/// 2^-24), beside an absolute slack for each.
pub fn assert_rounded(what: &str, found: &[f64], expected: &[(f64, f64)], step: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, (expected, slack))) in found.iter().zip(expected).enumerate() {
        let tolerance = 0.51 * step * expected.abs() + 3.1e-8 + slack;
        let gap = (found - expected).abs();
        assert!(gap <= tolerance, "{what}[{at}]: {found}, expected {expected} within {tolerance}");
    }
}
