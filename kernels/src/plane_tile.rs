//! Row tiles by cooperative matrices, after FlashAttention-2: each plane owns a few rows, which stay in its
//! matrices while keys stream by. Where a matrix's elements lie is not known, so scores pass through
//! shared memory.

use cubecl::{
    cmma::{self, Matrix, MatrixIdent, MatrixLayout},
    ir::DeviceProperties,
    prelude::*,
};

use crate::fragments::{Fragments, zero_matrices};

/// Elements between staged rows, against bank conflicts: 16 bytes.
const PADDING: usize = 8;

/// Elements between rows of scores, against bank conflicts: 16 bytes. With more, the largest tile of 128-wide heads
/// would not fit into the 48 KiB of shared memory that NVIDIA's driver offers.
const SCORE_PADDING: usize = 4;

/// Rows of one plane. The matrices of 32 would not fit into its registers beside the outputs.
pub(crate) const PLANE_ROWS: usize = 16;

/// Alignment that cooperative matrices ask of shared memory, in bytes.
pub(crate) const ALIGNMENT: usize = 32;

/// Four neighbouring scores of a row, which units read at once.
pub(crate) type Quad<E> = Vector<E, Const<4>>;

/// Elements of a [`Quad`].
const QUAD: usize = 4;

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
    /// Planes of a cube, the best first. The more they are, the smaller each unit's share of a staged key tile, which
    /// it carries in registers.
    const PLANES: [usize; 4] = [8, 4, 2, 1];

    /// The first tile that divides a block and that the device has room for.
    pub fn first(
        properties: &DeviceProperties,
        block_size: usize,
        head_dim: usize,
        dtype: StorageType,
        bytes: &dyn Fn(&Self) -> usize,
    ) -> Option<Self> {
        let fragments = Fragments::new(properties, dtype)?;
        let hardware = &properties.hardware;
        let fits = |tile: &Self| {
            tile.keys <= tile.rows().min(tile.units())
                && block_size.is_multiple_of(tile.rows())
                && block_size.is_multiple_of(tile.keys)
                && hardware.max_units_per_cube as usize >= tile.units()
                && hardware.max_shared_memory_size >= bytes(tile)
        };
        let tiles = |planes| [32, 16].map(|keys| Self { head_dim, keys, planes, fragments });
        Self::PLANES.into_iter().flat_map(tiles).find(fits)
    }

    /// Shared memory of the stage and the scores, in bytes.
    pub fn staged_bytes(&self) -> usize {
        2 * self.keys * (self.head_dim + PADDING) * size_of::<u16>()
            + self.rows() * self.score_pitch() * size_of::<f32>()
    }

    pub fn rows(&self) -> usize {
        self.planes * PLANE_ROWS
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
        (self.fragments.narrowest / PLANE_ROWS).clamp(1, MOST_SHARERS)
    }

    /// Rows of scores that one unit has a part of, in the narrowest plane.
    pub fn unit_rows(&self) -> usize {
        (PLANE_ROWS / self.fragments.narrowest).max(1)
    }

    /// Scores of a row that one unit holds, in quads.
    pub fn quads(&self) -> usize {
        self.keys / QUAD / self.sharers()
    }
}

/// Units that [`shared_sum`] sums over at most.
const MOST_SHARERS: usize = 4;

/// The scores of all planes.
#[cube]
pub(crate) fn new_scores(#[comptime] tile: PlaneTile) -> SharedMemory<Quad<f32>> {
    SharedMemory::new_aligned(comptime!(tile.rows() * tile.score_pitch() / QUAD), ALIGNMENT)
}

/// The row, within its plane, that a unit's part number `index` belongs to. Wide planes have units whose
/// row is [`PLANE_ROWS`] or above: they hold none.
#[cube]
pub(crate) fn unit_row(#[comptime] index: usize, #[comptime] tile: PlaneTile) -> u32 {
    let sharers = comptime!(tile.sharers() as u32);
    UNIT_POS % PLANE_DIM / sharers + comptime!(index as u32) * (PLANE_DIM / sharers)
}

/// Which quad of its row a unit's quad number `index` is. Units that read at the same time meet different
/// banks.
#[cube]
pub(crate) fn quad_at(#[comptime] index: usize, slot: u32, #[comptime] tile: PlaneTile) -> u32 {
    let sharers = comptime!(tile.sharers() as u32);
    let number = comptime!(index as u32);
    let mut quad = number ^ (slot / 4 % 2);
    if comptime!(sharers > 1) {
        quad = number * sharers + UNIT_POS % PLANE_DIM % sharers;
    }
    quad
}

/// The sum of four neighbours.
#[cube]
pub(crate) fn quad_sum(quad: Quad<f32>) -> f32 {
    (quad[0] + quad[1]) + (quad[2] + quad[3])
}

/// The largest of four neighbours.
#[cube]
pub(crate) fn quad_max(quad: Quad<f32>) -> f32 {
    max(max(quad[0], quad[1]), max(quad[2], quad[3]))
}

/// Writes the plane's rows x staged keys^T, those from row `first_row` of the stage on, to its part of
/// `scores`.
#[cube]
pub(crate) fn plane_scores<E: Float, N: Size>(
    rows: &Sequence<Matrix<E>>,
    stage: &SharedMemory<Vector<E, N>>,
    first_row: u32,
    scores: &mut SharedMemory<Quad<f32>>,
    #[comptime] tile: PlaneTile,
) {
    let size = comptime!(tile.fragments);
    let width = N::value();
    let pitch = comptime!(tile.pitch(width) as u32);
    let steps = comptime!(tile.head_dim / size.k);
    let plane = UNIT_POS / PLANE_DIM;
    let staged = first_row * pitch;
    if plane < comptime!(tile.planes as u32) {
        #[unroll]
        for key in 0..comptime!(tile.keys / size.n) {
            let sums = zero_matrices(comptime!(PLANE_ROWS / size.m), size);
            #[unroll]
            for step in 0..steps {
                let at = staged
                    + comptime!((key * size.n) as u32) * pitch
                    + comptime!((step * size.k / width) as u32);
                // SAFETY: loaded right away.
                let keys = unsafe {
                    Matrix::<E>::uninitialized(MatrixIdent::B, size.m, size.n, size.k, MatrixLayout::ColMajor)
                };
                cmma::load(&keys, &stage.slice(at as usize, at as usize + 1), pitch * width as u32);
                #[unroll]
                for row in 0..comptime!(PLANE_ROWS / size.m) {
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
            for row in 0..comptime!(PLANE_ROWS / size.m) {
                let slot = plane * comptime!(PLANE_ROWS as u32) + comptime!((row * size.m) as u32);
                store_scores(sums.index(row), scores, slot, comptime!(key * size.n), tile);
            }
        }
    }
}

/// Writes a matrix to `scores`, from a row and a column on.
#[cube]
pub(crate) fn store_scores(
    matrix: &Matrix<f32>,
    scores: &mut SharedMemory<Quad<f32>>,
    row: u32,
    #[comptime] col: usize,
    #[comptime] tile: PlaneTile,
) {
    let pitch = comptime!(tile.score_pitch() as u32);
    let at = (row * comptime!(pitch / QUAD as u32) + comptime!((col / QUAD) as u32)) as usize;
    cmma::store(&mut scores.slice_mut(at, at + 1), matrix, pitch, MatrixLayout::RowMajor);
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
