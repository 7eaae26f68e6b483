//! Square score tiles, by plain units on any adapter or by cooperative matrices.
//!
//! A cube of `(edge / 4)^2` units computes `edge x edge` scores. Each unit owns a 4 x 4 part whose
//! rows and columns lie `edge / 4` apart, so that neighbouring units read neighbouring rows. Units
//! multiply their parts themselves; cooperative matrices are opaque, so their products reach the
//! units through shared memory.

use cubecl::{
    ir::{DeviceProperties, HardwareProperties},
    prelude::*,
};

use crate::{
    fragments::{Fragments, add_scores, add_values, store_sums, zero_sums},
    tensor::f32_type,
};

/// Marks a slot of a tile that holds no row.
pub(crate) const NO_ROW: u32 = u32::MAX;

/// Score of a masked pair. Below any running maximum, and finite: WGSL has no infinity.
pub(crate) const MASKED: f32 = -3.0e38;

/// Start of a running maximum. Above [`MASKED`], so that a masked pair never weighs anything.
pub(crate) const MAX_START: f32 = -1.0e30;

/// Rows and columns that one unit owns.
pub(crate) const PART: usize = 4;

/// Elements of a row that plain units stage at a time.
const UNIT_CHUNK: usize = 16;

/// Elements between staged rows of cooperative matrices, against bank conflicts: 16 bytes.
pub(crate) const PADDING: usize = 8;

/// Alignment that cooperative matrices ask of shared memory, in bytes.
pub(crate) const ALIGNMENT: usize = 32;

/// Edge of a score tile, the length of its rows, and what multiplies them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SquareTile {
    pub edge: usize,
    pub head_dim: usize,
    /// Multiply by cooperative matrices instead of plain units.
    pub fragments: Option<Fragments>,
}

impl SquareTile {
    /// The largest tile for plain units that divides a block and that the device has room for.
    pub fn by_units(hardware: &HardwareProperties, block_size: usize, head_dim: usize) -> Self {
        let tiles = [64, 32].map(|edge| Self { edge, head_dim, fragments: None });
        let fits = |tile: &Self| tile.fits(hardware, block_size);
        tiles.into_iter().find(fits).unwrap_or(Self { edge: 16, head_dim, fragments: None })
    }

    /// The largest tile for cooperative matrices, if the device has them for the type.
    pub fn by_fragments(
        properties: &DeviceProperties,
        block_size: usize,
        head_dim: usize,
        dtype: StorageType,
    ) -> Option<Self> {
        let fragments = Fragments::new(properties, dtype)?;
        let tiles = [64, 32].map(|edge| Self { edge, head_dim, fragments: Some(fragments) });
        let whole_planes = |tile: &Self| tile.units().is_multiple_of(fragments.plane);
        tiles.into_iter().find(|tile| tile.fits(&properties.hardware, block_size) && whole_planes(tile))
    }

    fn fits(&self, hardware: &HardwareProperties, block_size: usize) -> bool {
        block_size.is_multiple_of(self.edge)
            && hardware.max_units_per_cube as usize >= self.units()
            && hardware.max_shared_memory_size >= self.shared_bytes()
    }

    /// Upper bound over all kernels that use the tile.
    fn shared_bytes(&self) -> usize {
        let edge = self.edge;
        let lists = 4 * edge * size_of::<u32>();
        let partial = edge * self.side() * size_of::<f32>();
        match self.fragments {
            None => 4 * (2 * edge * (UNIT_CHUNK + PART) + edge * edge) + partial + lists,
            Some(_) => {
                let stage = 2 * edge * (self.chunk() + PADDING) * size_of::<u16>();
                let weights = edge * self.weight_pitch() * size_of::<u16>();
                stage + 4 * self.products_len(false) + weights + partial + lists
            }
        }
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

    /// Type of the stage and the weights, given that of the tensors.
    pub fn staged_type(&self, dtype: StorageType) -> StorageType {
        match self.fragments {
            None => f32_type(),
            Some(_) => dtype,
        }
    }

    /// Elements of a row that are staged at a time.
    pub fn chunk(&self) -> usize {
        match self.fragments {
            None => UNIT_CHUNK,
            Some(_) => {
                let fits = |chunk: &usize| *chunk <= self.edge && self.head_dim.is_multiple_of(*chunk);
                [64, 48, 32].into_iter().find(fits).unwrap_or(16)
            }
        }
    }

    /// Vectors from one staged row part to the next.
    pub fn pitch(&self, width: usize) -> usize {
        match self.fragments {
            None => UNIT_CHUNK / width + 1,
            Some(_) => (self.chunk() + PADDING) / width,
        }
    }

    /// Size in vectors of the stage that queries and keys, and later values, go through.
    pub fn stage_len(&self, width: usize) -> usize {
        2 * self.edge * self.pitch(width)
    }

    /// Elements from one row of weights to the next.
    pub fn weight_pitch(&self) -> usize {
        match self.fragments {
            None => self.edge,
            Some(_) => self.edge + PADDING,
        }
    }

    /// Size of the `f32` tile that products of cooperative matrices go through; plain units have
    /// one only if the kernel `shares` its masses there.
    pub fn products_len(&self, shares: bool) -> usize {
        match self.fragments {
            None if !shares => 1,
            _ => self.edge * self.edge,
        }
    }

    /// Value rows that fit the stage of plain units.
    fn value_rows(&self, width: usize) -> usize {
        let fitting = self.stage_len(width) * width / self.head_dim;
        let power = 1 << fitting.ilog2();
        power.min(self.edge)
    }

    /// Output vectors of one row that one unit owns.
    pub fn out_vectors(&self, width: usize) -> usize {
        (self.head_dim / width).div_ceil(self.side())
    }

    /// Matrices of an `edge x columns` product that each plane computes.
    pub fn plane_matrices(&self, fragments: &Fragments, columns: usize) -> usize {
        let all = self.edge / fragments.m * (columns / fragments.n);
        all.div_ceil(self.units() / fragments.plane)
    }
}

/// The stage of a tile.
#[cube]
pub(crate) fn new_stage<S: Float, N: Size>(#[comptime] tile: SquareTile) -> SharedMemory<Vector<S, N>> {
    let width = N::value();
    SharedMemory::new_aligned(comptime!(tile.stage_len(width)), ALIGNMENT)
}

/// The tile of products; see [`SquareTile::products_len`].
#[cube]
pub(crate) fn new_products(#[comptime] tile: SquareTile, #[comptime] shares: bool) -> SharedMemory<f32> {
    SharedMemory::new_aligned(comptime!(tile.products_len(shares)), ALIGNMENT)
}

/// The tile of weights.
#[cube]
pub(crate) fn new_weights<S: Float>(#[comptime] tile: SquareTile) -> SharedMemory<S> {
    SharedMemory::new_aligned(comptime!(tile.edge * tile.weight_pitch()), ALIGNMENT)
}

/// Position in vectors of a head's first row.
#[cube]
pub(crate) fn head_base<E: Float, N: Size>(tensor: &Tensor<Vector<E, N>>, batch: u32, head: u32) -> usize {
    (batch as usize * tensor.stride(0) + head as usize * tensor.stride(1)) / N::value()
}

/// Copies `count` rows, `cols` vectors from `first_col` on each, into the stage. Slots without a
/// row become zeros.
#[cube]
fn stage_rows<E: Float, S: Float, N: Size>(
    source: &Tensor<Vector<E, N>>,
    base: usize,
    rows: &SharedMemory<u32>,
    first_row: u32,
    first_col: u32,
    stage: &mut SharedMemory<Vector<S, N>>,
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
        let mut value = Vector::<S, N>::new(S::from_int(0));
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
/// Rows are given by index lists in shared memory, visible to all units on entry. After it, a unit
/// may overwrite its own part of `products`.
#[cube]
pub(crate) fn score_tile<E: Float, S: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    q_base: usize,
    q_rows: &SharedMemory<u32>,
    k: &Tensor<Vector<E, N>>,
    k_base: usize,
    k_rows: &SharedMemory<u32>,
    stage: &mut SharedMemory<Vector<S, N>>,
    products: &mut SharedMemory<f32>,
    scores: &mut Array<f32>,
    #[comptime] tile: SquareTile,
) {
    let width = N::value();
    let edge = comptime!(tile.edge as u32);
    let side = comptime!(tile.side() as u32);
    let units = comptime!(tile.units() as u32);
    let cols = comptime!((tile.chunk() / width) as u32);
    let pitch = comptime!(tile.pitch(width) as u32);
    let unit_row = UNIT_POS / side;
    let unit_col = UNIT_POS % side;
    let chunks = comptime!((tile.head_dim / tile.chunk()) as u32);

    if comptime!(tile.fragments.is_some()) {
        let sums = zero_sums(tile.edge, tile);
        for chunk in 0..chunks {
            let col = chunk * cols;
            sync_cube();
            stage_rows::<E, S, N>(q, q_base, q_rows, 0, col, stage, 0, edge, cols, pitch, units);
            stage_rows::<E, S, N>(k, k_base, k_rows, 0, col, stage, edge * pitch, edge, cols, pitch, units);
            sync_cube();
            add_scores::<S, N>(stage, &sums, tile);
        }
        store_sums(&sums, products, tile.edge, tile);
        sync_cube();
        #[unroll]
        for i in 0..PART {
            let row = unit_row + comptime!(i as u32) * side;
            #[unroll]
            for j in 0..PART {
                let col = unit_col + comptime!(j as u32) * side;
                scores[i * PART + j] = products[(row * edge + col) as usize];
            }
        }
    } else {
        #[unroll]
        for i in 0..comptime!(PART * PART) {
            scores[i] = 0.0;
        }
        for chunk in 0..chunks {
            let col = chunk * cols;
            sync_cube();
            stage_rows::<E, S, N>(q, q_base, q_rows, 0, col, stage, 0, edge, cols, pitch, units);
            stage_rows::<E, S, N>(k, k_base, k_rows, 0, col, stage, edge * pitch, edge, cols, pitch, units);
            sync_cube();
            let mut queries = Array::<Vector<f32, N>>::new(PART);
            #[unroll]
            for c in 0..cols {
                #[unroll]
                for i in 0..PART {
                    let row = unit_row + comptime!(i as u32) * side;
                    queries[i] = Vector::cast_from(stage[(row * pitch + c) as usize]);
                }
                #[unroll]
                for j in 0..PART {
                    let row = edge + unit_col + comptime!(j as u32) * side;
                    let key = Vector::<f32, N>::cast_from(stage[(row * pitch + c) as usize]);
                    #[unroll]
                    for i in 0..PART {
                        scores[i * PART + j] += queries[i].dot(key);
                    }
                }
            }
        }
    }
}

/// Adds `weights x values` to the unit's part of the output: 4 rows of `out_vectors` each.
///
/// `weights` is the whole tile, row by row, visible to all units on entry.
#[cube]
pub(crate) fn value_tile<E: Float, S: Float, N: Size>(
    v: &Tensor<Vector<E, N>>,
    v_base: usize,
    k_rows: &SharedMemory<u32>,
    weights: &SharedMemory<S>,
    stage: &mut SharedMemory<Vector<S, N>>,
    products: &mut SharedMemory<f32>,
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

    if comptime!(tile.fragments.is_some()) {
        let chunk = comptime!(tile.chunk());
        let cols = comptime!((chunk / width) as u32);
        let pitch = comptime!(tile.pitch(width) as u32);
        #[unroll]
        for part in 0..comptime!((tile.head_dim / chunk) as u32) {
            let first = comptime!(part * cols);
            sync_cube();
            stage_rows::<E, S, N>(v, v_base, k_rows, 0, first, stage, 0, edge, cols, pitch, units);
            sync_cube();
            let sums = zero_sums(chunk, tile);
            add_values::<S, N>(weights, stage, &sums, tile);
            store_sums(&sums, products, chunk, tile);
            sync_cube();
            #[unroll]
            for c in 0..vectors {
                // Whether the units' vectors of this number meet the chunk at all.
                let reach = comptime!((c as u32 * side, (c as u32 + 1) * side));
                if comptime!(reach.0 < first + cols && reach.1 > first) {
                    let col = unit_col + comptime!(c as u32 * side);
                    if col >= first && col < comptime!(first + cols) {
                        #[unroll]
                        for i in 0..PART {
                            let row = unit_row + comptime!(i as u32) * side;
                            let at = row * comptime!(chunk as u32) + (col - first) * comptime!(width as u32);
                            let mut value = Vector::<f32, N>::new(0.0);
                            #[unroll]
                            for e in 0..width {
                                value[e] = products[at as usize + e];
                            }
                            out[i * vectors + c] += value;
                        }
                    }
                }
            }
        }
    } else {
        let cols = comptime!((tile.head_dim / width) as u32);
        let rows = comptime!(tile.value_rows(width) as u32);
        for part in 0..comptime!(edge / rows) {
            let first = part * rows;
            sync_cube();
            stage_rows::<E, S, N>(v, v_base, k_rows, first, 0, stage, 0, rows, cols, cols, units);
            sync_cube();
            for j in 0..rows {
                let mut weight = Array::<f32>::new(PART);
                #[unroll]
                for i in 0..PART {
                    let row = unit_row + comptime!(i as u32) * side;
                    weight[i] = f32::cast_from(weights[(row * edge + first + j) as usize]);
                }
                #[unroll]
                for c in 0..vectors {
                    // Units beyond the last column repeat it and are not stored.
                    let col = (unit_col + comptime!(c as u32) * side).min(cols - 1);
                    let value = Vector::<f32, N>::cast_from(stage[(j * cols + col) as usize]);
                    #[unroll]
                    for i in 0..PART {
                        out[i * vectors + c] += Vector::new(weight[i]) * value;
                    }
                }
            }
        }
    }
}
