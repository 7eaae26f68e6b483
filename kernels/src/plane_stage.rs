//! How [row tiles of planes](crate::plane_tile) get their operands: units carry vectors of a tile in registers
//! while the one before it is multiplied, then write them to the stage.

use cubecl::{
    cmma::{self, Matrix, MatrixIdent, MatrixLayout},
    prelude::*,
};

use crate::{
    plane_tile::{ALIGNMENT, PLANE_ROWS, PlaneTile},
    square_tile::NO_ROW,
};

/// The stage of two key tiles.
#[cube]
pub(crate) fn new_stage<E: Float, N: Size>(#[comptime] tile: PlaneTile) -> SharedMemory<Vector<E, N>> {
    let width = N::value();
    SharedMemory::new_aligned(comptime!(2 * tile.keys * tile.pitch(width)), ALIGNMENT)
}

/// Loads the unit's share of a key tile; slots without a row become zeros.
#[cube]
pub(crate) fn carry_rows<E: Float, N: Size>(
    source: &Tensor<Vector<E, N>>,
    base: usize,
    rows: &SharedMemory<u32>,
    first_slot: u32,
    carried: &mut Array<Vector<E, N>>,
    #[comptime] tile: PlaneTile,
) {
    let width = N::value();
    let cols = comptime!((tile.head_dim / width) as u32);
    #[unroll]
    for step in 0..comptime!(tile.carried(width)) {
        let index = carried_index(step, width, tile);
        let row = rows[(first_slot + index / cols) as usize];
        carried[step] = load_vector::<E, N>(source, base, row, index % cols);
    }
}

/// [`carry_rows`] of neighbouring rows, up to `end`.
#[cube]
pub(crate) fn carry_span<E: Float, N: Size>(
    source: &Tensor<Vector<E, N>>,
    base: usize,
    first: u32,
    end: u32,
    carried: &mut Array<Vector<E, N>>,
    #[comptime] tile: PlaneTile,
) {
    let width = N::value();
    let cols = comptime!((tile.head_dim / width) as u32);
    #[unroll]
    for step in 0..comptime!(tile.carried(width)) {
        let index = carried_index(step, width, tile);
        let row = first + index / cols;
        carried[step] = load_vector::<E, N>(source, base, select(row < end, row, NO_ROW), index % cols);
    }
}

/// Which vector of a key tile the unit carries in a step. Behind the last one, that one again.
#[cube]
fn carried_index(#[comptime] step: usize, #[comptime] width: usize, #[comptime] tile: PlaneTile) -> u32 {
    let mut index = UNIT_POS + comptime!((step * tile.units()) as u32);
    let last = comptime!((tile.keys * tile.head_dim / width - 1) as u32);
    if comptime!((step + 1) * tile.units() > last as usize + 1) {
        index = index.min(last);
    }
    index
}

/// A vector of a row, or zeros without a row. It is loaded in either case, so that loads wait for nothing.
#[cube]
fn load_vector<E: Float, N: Size>(
    source: &Tensor<Vector<E, N>>,
    base: usize,
    row: u32,
    col: u32,
) -> Vector<E, N> {
    let row_stride = source.stride(2) / N::value();
    let exists = row != NO_ROW;
    let mut value = source[base + select(exists, row, 0) as usize * row_stride + col as usize];
    if !exists {
        value = Vector::new(E::from_int(0));
    }
    value
}

/// Writes what was carried to the stage, from row `first_row` on.
#[cube]
pub(crate) fn put_rows<E: Float, N: Size>(
    carried: &Array<Vector<E, N>>,
    stage: &mut SharedMemory<Vector<E, N>>,
    first_row: u32,
    #[comptime] tile: PlaneTile,
) {
    let width = N::value();
    let cols = comptime!((tile.head_dim / width) as u32);
    let pitch = comptime!(tile.pitch(width) as u32);
    #[unroll]
    for step in 0..comptime!(tile.carried(width)) {
        let index = UNIT_POS + comptime!((step * tile.units()) as u32);
        // All but the last step are full, which needs no question.
        let full = comptime!((step + 1) * tile.units() <= tile.keys * tile.head_dim / width);
        if full || index < comptime!(tile.keys as u32 * cols) {
            stage[((first_row + index / cols) * pitch + index % cols) as usize] = carried[step];
        }
    }
}

/// The plane's rows as matrices `[PLANE_ROWS / m][head_dim / k]`, out of a list of the cube's rows. The
/// stage is overwritten, and free again for all on return.
#[cube]
pub(crate) fn load_rows<E: Float, N: Size>(
    source: &Tensor<Vector<E, N>>,
    base: usize,
    rows: &SharedMemory<u32>,
    stage: &mut SharedMemory<Vector<E, N>>,
    #[comptime] tile: PlaneTile,
) -> Sequence<Matrix<E>> {
    let size = comptime!(tile.fragments);
    let width = N::value();
    let pitch = comptime!(tile.pitch(width) as u32);
    let plane = UNIT_POS / PLANE_DIM;
    let mut matrices = Sequence::<Matrix<E>>::new();
    #[unroll]
    for _ in 0..comptime!(PLANE_ROWS / size.m * tile.head_dim / size.k) {
        // SAFETY: loaded below, in the round that stages the plane's rows.
        let matrix = unsafe {
            Matrix::<E>::uninitialized(MatrixIdent::A, size.m, size.n, size.k, MatrixLayout::RowMajor)
        };
        matrices.push(matrix);
    }
    let mut carried = Array::<Vector<E, N>>::new(comptime!(tile.carried(width)));
    // A round stages as many rows as a key tile has keys, whole matrices at a time.
    for round in 0..comptime!((tile.rows() / tile.keys) as u32) {
        let first = round * comptime!(tile.keys as u32);
        carry_rows::<E, N>(source, base, rows, first, &mut carried, tile);
        put_rows::<E, N>(&carried, stage, 0, tile);
        sync_cube();
        #[unroll]
        for row in 0..comptime!(PLANE_ROWS / size.m) {
            let slot = plane * comptime!(PLANE_ROWS as u32) + comptime!((row * size.m) as u32);
            if slot >= first && slot < first + comptime!(tile.keys as u32) {
                #[unroll]
                for step in 0..comptime!(tile.head_dim / size.k) {
                    let at = (slot - first) * pitch + comptime!((step * size.k / width) as u32);
                    let number = comptime!(row * tile.head_dim / size.k + step);
                    cmma::load(
                        matrices.index(number),
                        &stage.slice(at as usize, at as usize + 1),
                        pitch * width as u32,
                    );
                }
            }
        }
        sync_cube();
    }
    matrices
}
