//! The outputs of [row tiles of planes](crate::plane_tile), which stay in cooperative matrices.

use cubecl::{
    cmma::{self, Matrix, MatrixIdent, MatrixLayout},
    prelude::*,
};

use crate::plane_tile::{PLANE_ROWS, PlaneTile, Quad, store_scores, unit_row};

/// Adds the plane's weights x staged values to its outputs.
#[cube]
pub(crate) fn add_values<E: Float, N: Size>(
    weights: &SharedMemory<Quad<E>>,
    stage: &SharedMemory<Vector<E, N>>,
    sums: &Sequence<Matrix<f32>>,
    first_slot: u32,
    #[comptime] tile: PlaneTile,
) {
    let size = comptime!(tile.fragments);
    let width = N::value();
    let pitch = comptime!(tile.pitch(width) as u32);
    let weight_pitch = comptime!(tile.weight_pitch() as u32);
    let cols = comptime!(tile.head_dim / size.n);
    #[unroll]
    for step in 0..comptime!(tile.keys / size.k) {
        let mut left = Sequence::<Matrix<E>>::new();
        #[unroll]
        for row in 0..comptime!(PLANE_ROWS / size.m) {
            let slot = first_slot + comptime!((row * size.m) as u32);
            let at = (slot * comptime!(weight_pitch / 4) + comptime!((step * size.k / 4) as u32)) as usize;
            // SAFETY: loaded right away.
            let matrix = unsafe {
                Matrix::<E>::uninitialized(MatrixIdent::A, size.m, size.n, size.k, MatrixLayout::RowMajor)
            };
            cmma::load(&matrix, &weights.slice(at, at + 1), weight_pitch);
            left.push(matrix);
        }
        #[unroll]
        for col in 0..cols {
            let staged = comptime!((tile.keys + step * size.k) as u32);
            let at = staged * pitch + comptime!((col * size.n / width) as u32);
            // SAFETY: loaded right away.
            let values = unsafe {
                Matrix::<E>::uninitialized(MatrixIdent::B, size.m, size.n, size.k, MatrixLayout::RowMajor)
            };
            cmma::load(&values, &stage.slice(at as usize, at as usize + 1), pitch * width as u32);
            #[unroll]
            for row in 0..comptime!(PLANE_ROWS / size.m) {
                let sum = sums.index(comptime!(row * cols + col));
                cmma::execute::<E, E, f32, f32>(left.index(row), &values, sum, sum);
            }
        }
    }
}

/// Writes one column of the plane's outputs to its part of `scores`.
#[cube]
pub(crate) fn store_column(
    sums: &Sequence<Matrix<f32>>,
    scores: &mut SharedMemory<Quad<f32>>,
    first_slot: u32,
    #[comptime] col: usize,
    #[comptime] tile: PlaneTile,
) {
    let size = comptime!(tile.fragments);
    #[unroll]
    for row in 0..comptime!(PLANE_ROWS / size.m) {
        let sum = sums.index(comptime!(row * tile.head_dim / size.n + col));
        store_scores(sum, scores, first_slot + comptime!((row * size.m) as u32), 0usize, tile);
    }
}

/// Multiplies each row of the outputs by its factor, by way of `scores`. Called by the whole cube.
#[cube]
pub(crate) fn scale_sums(
    sums: &Sequence<Matrix<f32>>,
    scores: &mut SharedMemory<Quad<f32>>,
    factors: &SharedMemory<f32>,
    first_slot: u32,
    own: bool,
    #[comptime] tile: PlaneTile,
) {
    let size = comptime!(tile.fragments);
    let pitch = comptime!(tile.score_pitch() as u32 / 4);
    let part = UNIT_POS % PLANE_DIM % comptime!(tile.sharers() as u32);
    #[unroll]
    for col in 0..comptime!(tile.head_dim / size.n) {
        if own {
            store_column(sums, scores, first_slot, col, tile);
        }
        sync_cube();
        #[unroll]
        for r in 0..tile.unit_rows() {
            let slot = unit_row(r, tile);
            if own && slot < comptime!(PLANE_ROWS as u32) {
                let row = first_slot + slot;
                #[unroll]
                for number in 0..comptime!((size.n / 4).div_ceil(tile.sharers())) {
                    let at = comptime!((number * tile.sharers()) as u32) + part;
                    if at < comptime!((size.n / 4) as u32) {
                        scores[(row * pitch + at) as usize] *= Quad::new(factors[row as usize]);
                    }
                }
            }
        }
        sync_cube();
        if own {
            #[unroll]
            for row in 0..comptime!(PLANE_ROWS / size.m) {
                let at = ((first_slot + comptime!((row * size.m) as u32)) * pitch) as usize;
                let sum = sums.index(comptime!(row * tile.head_dim / size.n + col));
                cmma::load_with_layout(
                    sum,
                    &scores.slice(at, at + 1),
                    comptime!(pitch * 4),
                    MatrixLayout::RowMajor,
                );
            }
        }
        sync_cube();
    }
}
