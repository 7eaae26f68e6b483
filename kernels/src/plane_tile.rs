//! Row tiles by cooperative matrices, after FlashAttention-2: each plane owns 16 rows, which stay in its
//! matrices while keys stream by. Where a matrix's elements lie is not known, so scores pass through
//! shared memory.

use cubecl::{
    cmma::{self, Matrix, MatrixIdent, MatrixLayout},
    ir::DeviceProperties,
    prelude::*,
};

use crate::{
    fragments::Fragments,
    square_tile::{ALIGNMENT, NO_ROW, PADDING},
};

/// Rows of one plane.
pub(crate) const ROWS: usize = 16;

/// Planes of a cube at most. More would share each staged key tile, and leave a processor fewer cubes to
/// turn to while one waits at a barrier.
const MOST_PLANES: usize = 4;

/// `f32` elements between rows of scores, against bank conflicts: 16 bytes.
const SCORE_PADDING: usize = 4;

/// Sizes of a cube's tile: rows by keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PlaneTile {
    pub head_dim: usize,
    /// Keys that are staged at a time.
    pub keys: usize,
    /// Planes that own rows.
    pub planes: usize,
    pub fragments: Fragments,
}

impl PlaneTile {
    /// The largest tile that divides a block and that the device has room for.
    pub fn new(
        properties: &DeviceProperties,
        block_size: usize,
        head_dim: usize,
        dtype: StorageType,
    ) -> Option<Self> {
        let fragments = Fragments::new(properties, dtype)?;
        let hardware = &properties.hardware;
        let fits = |tile: &Self| {
            tile.keys <= tile.rows()
                && block_size.is_multiple_of(tile.rows())
                && block_size.is_multiple_of(tile.keys)
                && hardware.max_units_per_cube as usize >= tile.units()
                && hardware.max_shared_memory_size >= tile.shared_bytes()
        };
        let planes = [MOST_PLANES, 2, 1].into_iter();
        let tiles = planes.flat_map(|planes| [32, 16].map(|keys| Self { head_dim, keys, planes, fragments }));
        tiles.into_iter().find(fits)
    }

    /// Upper bound over all kernels that use the tile.
    fn shared_bytes(&self) -> usize {
        let staged = 2 * self.keys * (self.head_dim + PADDING) * size_of::<u16>();
        let scores = self.rows() * self.score_pitch() * size_of::<f32>();
        let weights = self.rows() * self.weight_pitch() * size_of::<u16>();
        let lists = (2 * self.keys + 3 * self.rows() + self.planes) * size_of::<u32>();
        staged + scores + weights + lists
    }

    pub fn rows(&self) -> usize {
        self.planes * ROWS
    }

    pub fn units(&self) -> usize {
        self.planes * self.fragments.plane
    }

    pub fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }

    /// Elements from one row of scores to the next.
    pub fn score_pitch(&self) -> usize {
        self.keys + SCORE_PADDING
    }

    /// Elements from one row of weights to the next.
    pub fn weight_pitch(&self) -> usize {
        self.keys + PADDING
    }

    /// Vectors from one staged row to the next.
    pub fn pitch(&self, width: usize) -> usize {
        (self.head_dim + PADDING) / width
    }

    /// Vectors of a key tile that each unit carries.
    pub fn carried(&self, width: usize) -> usize {
        (self.keys * self.head_dim / width).div_ceil(self.units())
    }

    /// Units that share a row of scores, in the narrowest plane.
    pub fn sharers(&self) -> usize {
        (self.fragments.narrowest / ROWS).max(1)
    }

    /// Rows of scores that one unit has a part of, in the narrowest plane.
    pub fn unit_rows(&self) -> usize {
        (ROWS / self.fragments.narrowest).max(1)
    }

    /// Scores of a row that one unit holds.
    pub fn part(&self) -> usize {
        self.keys / self.sharers()
    }
}

/// The stage of two key tiles: keys and values, or in the beginning queries.
#[cube]
pub(crate) fn new_stage<E: Float, N: Size>(#[comptime] tile: PlaneTile) -> SharedMemory<Vector<E, N>> {
    let width = N::value();
    SharedMemory::new_aligned(comptime!(2 * tile.keys * tile.pitch(width)), ALIGNMENT)
}

/// The scores of all planes.
#[cube]
pub(crate) fn new_scores(#[comptime] tile: PlaneTile) -> SharedMemory<f32> {
    SharedMemory::new_aligned(comptime!(tile.rows() * tile.score_pitch()), ALIGNMENT)
}

/// The row, within its plane, that a unit's part number `index` belongs to. Wide planes have units whose
/// row is [`ROWS`] or above: they hold none.
#[cube]
pub(crate) fn unit_row(#[comptime] index: usize, #[comptime] tile: PlaneTile) -> u32 {
    let sharers = comptime!(tile.sharers() as u32);
    UNIT_POS % PLANE_DIM / sharers + comptime!(index as u32) * (PLANE_DIM / sharers)
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
    let row_stride = source.stride(2) / width;
    let cols = comptime!((tile.head_dim / width) as u32);
    let total = comptime!(tile.keys as u32 * cols);
    #[unroll]
    for step in 0..comptime!(tile.carried(width)) {
        let index = UNIT_POS + comptime!((step * tile.units()) as u32);
        let mut value = Vector::<E, N>::new(E::from_int(0));
        if index < total {
            let row = rows[(first_slot + index / cols) as usize];
            if row != NO_ROW {
                value = source[base + row as usize * row_stride + (index % cols) as usize];
            }
        }
        carried[step] = value;
    }
}

/// Writes what [`carry_rows`] loaded to the stage, from row `first_row` on.
#[cube]
pub(crate) fn put_rows<E: Float, N: Size>(
    carried: &Array<Vector<E, N>>,
    stage: &mut SharedMemory<Vector<E, N>>,
    #[comptime] first_row: usize,
    #[comptime] tile: PlaneTile,
) {
    let width = N::value();
    let cols = comptime!((tile.head_dim / width) as u32);
    let total = comptime!(tile.keys as u32 * cols);
    let pitch = comptime!(tile.pitch(width) as u32);
    #[unroll]
    for step in 0..comptime!(tile.carried(width)) {
        let index = UNIT_POS + comptime!((step * tile.units()) as u32);
        if index < total {
            let at = (comptime!(first_row as u32) + index / cols) * pitch + index % cols;
            stage[at as usize] = carried[step];
        }
    }
}

/// The plane's rows as matrices `[16 / m][head_dim / k]`, out of a list of the cube's rows. The stage is
/// overwritten, and free again for all on return.
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
    for _ in 0..comptime!(ROWS / size.m * tile.head_dim / size.k) {
        // SAFETY: loaded below, in the round that stages the plane's rows.
        let matrix = unsafe {
            Matrix::<E>::uninitialized(MatrixIdent::A, size.m, size.n, size.k, MatrixLayout::RowMajor)
        };
        matrices.push(matrix);
    }
    let mut carried = Array::<Vector<E, N>>::new(comptime!(tile.carried(width)));
    // A round stages as many rows as a key tile has keys, whole planes at a time.
    for round in 0..comptime!((tile.rows() / tile.keys) as u32) {
        let first = round * comptime!(tile.keys as u32);
        carry_rows::<E, N>(source, base, rows, first, &mut carried, tile);
        put_rows::<E, N>(&carried, stage, 0usize, tile);
        sync_cube();
        #[unroll]
        for row in 0..comptime!(ROWS / size.m) {
            let slot = plane * comptime!(ROWS as u32) + comptime!((row * size.m) as u32);
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

/// Writes the plane's rows x staged keys^T to its part of `scores`.
#[cube]
pub(crate) fn plane_scores<E: Float, N: Size>(
    rows: &Sequence<Matrix<E>>,
    stage: &SharedMemory<Vector<E, N>>,
    scores: &mut SharedMemory<f32>,
    #[comptime] tile: PlaneTile,
) {
    let size = comptime!(tile.fragments);
    let width = N::value();
    let pitch = comptime!(tile.pitch(width) as u32);
    let score_pitch = comptime!(tile.score_pitch() as u32);
    let steps = comptime!(tile.head_dim / size.k);
    let plane = UNIT_POS / PLANE_DIM;
    if plane < comptime!(tile.planes as u32) {
        #[unroll]
        for key in 0..comptime!(tile.keys / size.n) {
            let sums = zero_matrices(comptime!(ROWS / size.m), tile);
            #[unroll]
            for step in 0..steps {
                let at = comptime!((key * size.n) as u32) * pitch + comptime!((step * size.k / width) as u32);
                // SAFETY: loaded right away.
                let keys = unsafe {
                    Matrix::<E>::uninitialized(MatrixIdent::B, size.m, size.n, size.k, MatrixLayout::ColMajor)
                };
                cmma::load(&keys, &stage.slice(at as usize, at as usize + 1), pitch * width as u32);
                #[unroll]
                for row in 0..comptime!(ROWS / size.m) {
                    let sum = sums.index(row);
                    cmma::execute::<E, E, f32, f32>(
                        rows.index(comptime!(row * steps + step)),
                        &keys,
                        sum,
                        sum,
                    );
                }
            }
            #[unroll]
            for row in 0..comptime!(ROWS / size.m) {
                let slot = plane * comptime!(ROWS as u32) + comptime!((row * size.m) as u32);
                let at = (slot * score_pitch + comptime!((key * size.n) as u32)) as usize;
                let mut target = scores.slice_mut(at, at + 1);
                cmma::store(&mut target, sums.index(row), score_pitch, MatrixLayout::RowMajor);
            }
        }
    }
}

/// Accumulators, all zero.
#[cube]
pub(crate) fn zero_matrices(#[comptime] count: usize, #[comptime] tile: PlaneTile) -> Sequence<Matrix<f32>> {
    let size = comptime!(tile.fragments);
    let mut matrices = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..count {
        matrices.push(Matrix::from_value(
            MatrixIdent::Accumulator,
            size.m,
            size.n,
            size.k,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    matrices
}

/// The largest, and the sum, of a value over the units that share a row.
#[cube]
pub(crate) fn shared_max(value: f32, #[comptime] tile: PlaneTile) -> f32 {
    let mut largest = value;
    if comptime!(tile.sharers() > 1) {
        largest = max(largest, plane_shuffle_xor(largest, 1));
    }
    if comptime!(tile.sharers() > 2) {
        largest = max(largest, plane_shuffle_xor(largest, 2));
    }
    largest
}

/// See [`shared_max`].
#[cube]
pub(crate) fn shared_sum(value: f32, #[comptime] tile: PlaneTile) -> f32 {
    let mut total = value;
    if comptime!(tile.sharers() > 1) {
        total += plane_shuffle_xor(total, 1);
    }
    if comptime!(tile.sharers() > 2) {
        total += plane_shuffle_xor(total, 2);
    }
    total
}
