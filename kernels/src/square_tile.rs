//! Square score tiles by plain units, on any adapter.
//!
//! A cube of `(edge / 4)^2` units computes `edge x edge` scores. Each unit owns a 4 x 4 part whose
//! rows and columns lie `edge / 4` apart, so that neighbouring units read neighbouring rows.

use cubecl::{ir::HardwareProperties, prelude::*};

/// Marks a slot of a tile that holds no row.
pub(crate) const NO_ROW: u32 = u32::MAX;

/// Score of a masked pair. Below any running maximum, and finite: WGSL has no infinity.
pub(crate) const MASKED: f32 = -3.0e38;

/// Start of a running maximum. Above [`MASKED`], so that a masked pair never weighs anything.
pub(crate) const MAX_START: f32 = -1.0e30;

/// Rows and columns that one unit owns.
pub(crate) const PART: usize = 4;

/// Elements of a row that are staged at a time.
const CHUNK: usize = 16;

/// Edge of a score tile and the length of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SquareTile {
    pub edge: usize,
    pub head_dim: usize,
}

impl SquareTile {
    /// The largest tile that divides a block and that the device has room for.
    pub fn new(hardware: &HardwareProperties, block_size: usize, head_dim: usize) -> Self {
        let tiles = [64, 32].map(|edge| Self { edge, head_dim });
        let fits = |tile: &Self| {
            block_size.is_multiple_of(tile.edge)
                && hardware.max_units_per_cube as usize >= tile.units()
                && hardware.max_shared_memory_size >= tile.shared_bytes()
        };
        tiles.into_iter().find(fits).unwrap_or(Self { edge: 16, head_dim })
    }

    /// Upper bound over all kernels that use the tile.
    fn shared_bytes(&self) -> usize {
        let edge = self.edge;
        let lists = 4 * edge * size_of::<u32>();
        let partial = edge * self.side() * size_of::<f32>();
        4 * (2 * edge * (CHUNK + PART) + edge * edge) + partial + lists
    }

    /// Units along one side of the tile.
    pub fn side(&self) -> usize {
        self.edge / PART
    }

    pub fn units(&self) -> usize {
        self.side() * self.side()
    }

    pub fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }

    /// Vectors from one staged row part to the next.
    fn pitch(&self, width: usize) -> usize {
        CHUNK / width + 1
    }

    /// Size in vectors of the stage that queries and keys, and later values, go through.
    fn stage_len(&self, width: usize) -> usize {
        2 * self.edge * self.pitch(width)
    }

    /// Value rows that fit the stage.
    fn value_rows(&self, width: usize) -> usize {
        let fitting = self.stage_len(width) * width / self.head_dim;
        let power = 1 << fitting.ilog2();
        power.min(self.edge)
    }

    /// Output vectors of one row that one unit owns.
    pub fn out_vectors(&self, width: usize) -> usize {
        (self.head_dim / width).div_ceil(self.side())
    }
}

/// The stage of a tile.
#[cube]
pub(crate) fn new_stage<N: Size>(#[comptime] tile: SquareTile) -> SharedMemory<Vector<f32, N>> {
    let width = N::value();
    SharedMemory::new(comptime!(tile.stage_len(width)))
}

/// Position in vectors of a head's first row.
#[cube]
pub(crate) fn head_base<E: Float, N: Size>(tensor: &Tensor<Vector<E, N>>, batch: u32, head: u32) -> usize {
    (batch as usize * tensor.stride(0) + head as usize * tensor.stride(1)) / N::value()
}

/// Copies `count` rows, `cols` vectors from `first_col` on each, into the stage. Slots without a
/// row become zeros.
#[cube]
fn stage_rows<E: Float, N: Size>(
    source: &Tensor<Vector<E, N>>,
    base: usize,
    rows: &SharedMemory<u32>,
    first_row: u32,
    first_col: u32,
    stage: &mut SharedMemory<Vector<f32, N>>,
    stage_offset: u32,
    #[comptime] count: u32,
    #[comptime] cols: u32,
    #[comptime] pitch: u32,
    #[comptime] units: u32,
) {
    let row_stride = source.stride(2) / N::value();
    let mut index = UNIT_POS;
    while index < count * cols {
        let slot = index / cols;
        let col = index % cols;
        let row = rows[(first_row + slot) as usize];
        let mut value = Vector::<f32, N>::new(0.0);
        if row != NO_ROW {
            let at = base + row as usize * row_stride + (first_col + col) as usize;
            value = Vector::cast_from(source[at]);
        }
        stage[(stage_offset + slot * pitch + col) as usize] = value;
        index += units;
    }
}

/// The unit's 4 x 4 part of `queries x keys^T`, row by row in `scores`.
///
/// Rows are given by index lists in shared memory, visible to all units on entry.
#[cube]
pub(crate) fn score_tile<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    q_base: usize,
    q_rows: &SharedMemory<u32>,
    k: &Tensor<Vector<E, N>>,
    k_base: usize,
    k_rows: &SharedMemory<u32>,
    stage: &mut SharedMemory<Vector<f32, N>>,
    scores: &mut Array<f32>,
    #[comptime] tile: SquareTile,
) {
    let width = N::value();
    let edge = comptime!(tile.edge as u32);
    let side = comptime!(tile.side() as u32);
    let units = comptime!(tile.units() as u32);
    let cols = comptime!((CHUNK / width) as u32);
    let pitch = comptime!(tile.pitch(width) as u32);
    let unit_row = UNIT_POS / side;
    let unit_col = UNIT_POS % side;
    let chunks = comptime!((tile.head_dim / CHUNK) as u32);

    #[unroll]
    for i in 0..comptime!(PART * PART) {
        scores[i] = 0.0;
    }
    for chunk in 0..chunks {
        let col = chunk * cols;
        sync_cube();
        stage_rows::<E, N>(q, q_base, q_rows, 0, col, stage, 0, edge, cols, pitch, units);
        stage_rows::<E, N>(k, k_base, k_rows, 0, col, stage, edge * pitch, edge, cols, pitch, units);
        sync_cube();
        let mut queries = Array::<Vector<f32, N>>::new(PART);
        #[unroll]
        for c in 0..cols {
            #[unroll]
            for i in 0..PART {
                let row = unit_row + comptime!(i as u32) * side;
                queries[i] = stage[(row * pitch + c) as usize];
            }
            #[unroll]
            for j in 0..PART {
                let row = edge + unit_col + comptime!(j as u32) * side;
                let key = stage[(row * pitch + c) as usize];
                #[unroll]
                for i in 0..PART {
                    scores[i * PART + j] += queries[i].dot(key);
                }
            }
        }
    }
}

/// Adds `weights x values` to the unit's part of the output: 4 rows of `out_vectors` each.
///
/// `weights` is the whole tile, row by row, visible to all units on entry.
#[cube]
pub(crate) fn value_tile<E: Float, N: Size>(
    v: &Tensor<Vector<E, N>>,
    v_base: usize,
    k_rows: &SharedMemory<u32>,
    weights: &SharedMemory<f32>,
    stage: &mut SharedMemory<Vector<f32, N>>,
    out: &mut Array<Vector<f32, N>>,
    #[comptime] tile: SquareTile,
) {
    let width = N::value();
    let edge = comptime!(tile.edge as u32);
    let side = comptime!(tile.side() as u32);
    let units = comptime!(tile.units() as u32);
    let vectors = comptime!(tile.out_vectors(width));
    let unit_row = UNIT_POS / side;
    let unit_col = UNIT_POS % side;

    let cols = comptime!((tile.head_dim / width) as u32);
    let rows = comptime!(tile.value_rows(width) as u32);
    for part in 0..comptime!(edge / rows) {
        let first = part * rows;
        sync_cube();
        stage_rows::<E, N>(v, v_base, k_rows, first, 0, stage, 0, rows, cols, cols, units);
        sync_cube();
        for j in 0..rows {
            let mut weight = Array::<f32>::new(PART);
            #[unroll]
            for i in 0..PART {
                let row = unit_row + comptime!(i as u32) * side;
                weight[i] = weights[(row * edge + first + j) as usize];
            }
            #[unroll]
            for c in 0..vectors {
                // Units beyond the last column repeat it and are not stored.
                let col = (unit_col + comptime!(c as u32) * side).min(cols - 1);
                let value = stage[(j * cols + col) as usize];
                #[unroll]
                for i in 0..PART {
                    out[i * vectors + c] += Vector::new(weight[i]) * value;
                }
            }
        }
    }
}
