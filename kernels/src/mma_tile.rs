//! Score tiles by `mma.sync` m16n8k16: scores and probabilities stay in registers.
//!
//! A plane of 32 units owns `row_tiles` x 16 query rows. Of each 16 x 8 product, a unit holds two
//! neighbouring columns of two rows, 8 apart: row `lane / 4` and columns `2 * (lane % 4)` onwards.
//! Rows of the stages are padded by 16 bytes, so that the eight rows of a matrix load lie in
//! different banks for every head size.

use cubecl::{
    cmma::MmaDefinition,
    ir::{DeviceProperties, ElemType, FloatKind, MatrixIdent, features::MmaConfig},
    prelude::{
        barrier::{Barrier, copy_async_checked},
        *,
    },
};

use crate::square_tile::NO_ROW;

/// 16 bytes of a half type.
pub(crate) type Wide<E> = Vector<E, Const<8>>;
/// What one unit holds of one row of a product.
pub(crate) type Pair<E> = Vector<E, Const<2>>;

/// Elements of a [`Wide`].
pub(crate) const WIDE: usize = 8;
/// Units of a plane.
pub(crate) const PLANE: usize = 32;

/// Room for [`Arrivals`] and for the alignment of what comes after them.
pub(crate) const BARRIER_BYTES: usize = 128;

/// Sizes of a cube's tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct MmaTile {
    pub planes: usize,
    /// Products of 16 rows per plane.
    pub row_tiles: usize,
    pub keys: usize,
    pub head_dim: usize,
}

impl MmaTile {
    /// Whether the device has the instructions for a type.
    pub fn is_supported(properties: &DeviceProperties, dtype: StorageType) -> bool {
        let matmul = &properties.features.matmul;
        let config = MmaConfig {
            a_type: dtype,
            b_type: dtype,
            cd_type: ElemType::Float(FloatKind::F32).into(),
            m: 16,
            n: 8,
            k: 16,
        };
        let hardware = &properties.hardware;
        matmul.mma.contains(&config)
            && matmul.ldmatrix.contains(&dtype)
            && properties.features.copy_async
            && hardware.plane_size_min == PLANE as u32
            && hardware.plane_size_max == PLANE as u32
    }

    /// The largest tile that divides a block and fits the shared memory, of which it needs
    /// `bytes`.
    pub fn largest(
        properties: &DeviceProperties,
        block_size: usize,
        head_dim: usize,
        bytes: impl Fn(&Self) -> usize,
    ) -> Option<Self> {
        // Wide heads leave registers for one product of rows per plane only.
        let (shapes, widest) = match head_dim {
            ..=128 => ([(4, 2), (4, 1), (2, 1), (1, 1)], 64),
            _ => ([(8, 1), (4, 1), (2, 1), (1, 1)], 32),
        };
        let tiles = shapes.into_iter().flat_map(|(planes, row_tiles)| {
            [64, 32, 16].map(|keys| Self { planes, row_tiles, keys, head_dim })
        });
        tiles
            .filter(|tile| tile.keys <= widest)
            .filter(|tile| block_size.is_multiple_of(tile.rows()))
            .filter(|tile| block_size.is_multiple_of(tile.keys))
            .find(|tile| bytes(tile) <= properties.hardware.max_shared_memory_size)
    }

    /// Bytes of `rows` staged rows.
    pub fn staged_bytes(&self, rows: usize) -> usize {
        rows * self.pitch() * 16
    }

    pub fn units(&self) -> usize {
        self.planes * PLANE
    }

    pub fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }

    /// Query rows.
    pub fn rows(&self) -> usize {
        self.planes * self.row_tiles * 16
    }

    /// Distance of staged rows, in [`Wide`] vectors.
    pub fn pitch(&self) -> usize {
        self.head_dim / WIDE + 1
    }

    /// Products along the keys.
    pub fn key_products(&self) -> usize {
        self.keys / 8
    }

    /// Products along the output's columns.
    pub fn out_products(&self) -> usize {
        self.head_dim / 8
    }
}

/// Lane of the unit in its plane.
#[cube]
pub(crate) fn lane() -> u32 {
    UNIT_POS % comptime!(PLANE as u32)
}

/// Number of the unit's plane.
#[cube]
pub(crate) fn plane() -> u32 {
    UNIT_POS / comptime!(PLANE as u32)
}

/// Writes `count` consecutive positions from `first` on into a list.
#[cube]
pub(crate) fn list_span(
    list: &mut SharedMemory<u32>,
    slot: u32,
    first: u32,
    end: u32,
    #[comptime] count: u32,
) {
    if UNIT_POS < count {
        let at = first + UNIT_POS;
        list[(slot + UNIT_POS) as usize] = select(at < end, at, NO_ROW);
    }
}

/// Starts to copy `count` rows into a stage, zeros for slots without a row.
#[cube]
pub(crate) fn copy_rows<E: Float>(
    source: &Tensor<Wide<E>>,
    base: usize,
    rows: &SharedMemory<u32>,
    first_slot: u32,
    stage: &mut SharedMemory<Wide<E>>,
    stage_offset: u32,
    #[comptime] count: usize,
    #[comptime] tile: MmaTile,
) {
    let row_stride = source.stride(2) / comptime!(WIDE);
    let chunks = comptime!((tile.head_dim / WIDE) as u32);
    let units = comptime!(tile.units() as u32);
    let total = comptime!((count * tile.head_dim / WIDE) as u32);
    let pitch = comptime!(tile.pitch() as u32);
    #[unroll]
    for step in 0..comptime!(total.div_ceil(units)) {
        let index = UNIT_POS + comptime!(step * units);
        if comptime!((step + 1) * units <= total) || index < total {
            let slot = index / chunks;
            let col = index % chunks;
            let row = rows[(first_slot + slot) as usize];
            let present = row != NO_ROW;
            let to = (stage_offset + slot * pitch + col) as usize;
            let from = base + select(present, row, 0) as usize * row_stride + col as usize;
            let length = usize::cast_from(present);
            copy_async_checked(
                &source.slice(from, from + length),
                &mut stage.slice_mut(to, to + 1),
                comptime!(WIDE as u32),
            );
        }
    }
}

/// Tells when the copies into one of two stages have arrived. Tile `i` goes to stage `i % 2`.
#[derive(CubeType)]
pub(crate) struct Arrivals {
    even: Shared<Barrier>,
    odd: Shared<Barrier>,
}

/// Barriers that all units of the cube arrive at.
#[cube]
pub(crate) fn new_arrivals(#[comptime] tile: MmaTile) -> Arrivals {
    let units = comptime!(tile.units() as u32);
    Arrivals { even: Barrier::shared(units, UNIT_POS == 0), odd: Barrier::shared(units, UNIT_POS == 0) }
}

/// Closes the list of this unit's copies for a tile.
#[cube]
pub(crate) fn commit_tile(arrivals: &Arrivals, index: u32) {
    if index % 2 == 0 {
        arrivals.even.commit_copy_async();
        arrivals.even.arrive();
    } else {
        arrivals.odd.commit_copy_async();
        arrivals.odd.arrive();
    }
}

/// Waits until everybody's copies for a tile are there.
#[cube]
pub(crate) fn await_tile(arrivals: &Arrivals, index: u32) {
    let phase = index / 2 % 2;
    if index % 2 == 0 {
        arrivals.even.wait_parity(phase);
    } else {
        arrivals.odd.wait_parity(phase);
    }
}

/// Power of two. The exponentials of these kernels are to base 2, with the logarithm of e in the
/// scale: that is the device's own instruction.
#[cube]
pub(crate) fn exp2<N: Size>(exponent: Vector<f32, N>) -> Vector<f32, N> {
    Vector::new(2.0).powf(exponent)
}

/// [`exp2()`] of a single number.
#[cube]
pub(crate) fn exp2_scalar(exponent: f32) -> f32 {
    let base = f32::new(2.0);
    base.powf(exponent)
}

/// An accumulator of `products` 16 x 8 products, all zero.
#[cube]
pub(crate) fn zero_products(#[comptime] products: usize) -> Sequence<Array<Pair<f32>>> {
    let mut all = Sequence::new();
    #[unroll]
    for _ in 0..products {
        let mut product = Array::<Pair<f32>>::new(2usize);
        product[0] = Pair::new(0.0);
        product[1] = Pair::new(0.0);
        all.push(product);
    }
    all
}

/// Queries x keys^T of the plane's rows: products `[row_tiles][key_products]`, overwritten.
#[cube]
pub(crate) fn mma_scores<E: Float>(
    q_stage: &SharedMemory<Wide<E>>,
    q_offset: u32,
    k_stage: &SharedMemory<Wide<E>>,
    k_offset: u32,
    scores: &mut Sequence<Array<Pair<f32>>>,
    #[comptime] tile: MmaTile,
) {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let pitch = comptime!(tile.pitch() as u32);
    let lane = lane();
    let first_row = plane() * comptime!(tile.row_tiles as u32 * 16);
    // Matrices of a load: lanes 0..8 name the rows of the first one, and so on.
    let q_at = q_offset + (first_row + lane % 16) * pitch + lane / 16;
    let k_at = k_offset + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2;

    #[unroll]
    for i in 0..comptime!(tile.row_tiles * tile.key_products()) {
        let product = scores.index_mut(i);
        product[0] = Pair::new(0.0);
        product[1] = Pair::new(0.0);
    }
    #[unroll]
    for step in 0..comptime!(tile.head_dim / 16) {
        let mut queries = Sequence::<Array<Pair<E>>>::new();
        #[unroll]
        for m in 0..tile.row_tiles {
            let at = (q_at + comptime!(m as u32 * 16 * pitch + step as u32 * 2)) as usize;
            queries.push(definition.load_matrix::<Wide<E>, Const<2>>(
                &q_stage.slice(at, at + 1),
                MatrixIdent::A,
                4usize,
                false,
            ));
        }
        #[unroll]
        for n in 0..comptime!(tile.keys / 16) {
            let at = (k_at + comptime!(n as u32 * 16 * pitch + step as u32 * 2)) as usize;
            let keys = definition.load_matrix::<Wide<E>, Const<2>>(
                &k_stage.slice(at, at + 1),
                MatrixIdent::B,
                4usize,
                false,
            );
            let (left, right) = split(&keys);
            #[unroll]
            for m in 0..tile.row_tiles {
                let product = comptime!(m * tile.key_products() + 2 * n);
                definition.execute_inplace(queries.index(m), &left, scores.index_mut(product));
                definition.execute_inplace(
                    queries.index(m),
                    &right,
                    scores.index_mut(comptime!(product + 1)),
                );
            }
        }
    }
}

/// Adds weights x values to the plane's output: products `[row_tiles][out_products]`. The weights
/// come as products of the scores' layout, which is also that of a left operand.
#[cube]
pub(crate) fn mma_values<E: Float>(
    weights: &Sequence<Array<Pair<f32>>>,
    v_stage: &SharedMemory<Wide<E>>,
    v_offset: u32,
    out: &mut Sequence<Array<Pair<f32>>>,
    #[comptime] tile: MmaTile,
) {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let pitch = comptime!(tile.pitch() as u32);
    let lane = lane();
    let v_at = v_offset + (lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16;
    #[unroll]
    for j in 0..comptime!(tile.keys / 16) {
        let mut left = Sequence::<Array<Pair<E>>>::new();
        #[unroll]
        for m in 0..tile.row_tiles {
            let product = comptime!(m * tile.key_products() + 2 * j);
            let first = weights.index(product);
            let second = weights.index(comptime!(product + 1));
            let mut operand = Array::<Pair<E>>::new(4usize);
            operand[0] = Pair::cast_from(first[0]);
            operand[1] = Pair::cast_from(first[1]);
            operand[2] = Pair::cast_from(second[0]);
            operand[3] = Pair::cast_from(second[1]);
            left.push(operand);
        }
        #[unroll]
        for n in 0..comptime!(tile.head_dim / 16) {
            let at = (v_at + comptime!(j as u32 * 16 * pitch + n as u32 * 2)) as usize;
            let values = definition.load_matrix::<Wide<E>, Const<2>>(
                &v_stage.slice(at, at + 1),
                MatrixIdent::B,
                4usize,
                true,
            );
            let (first, second) = split(&values);
            #[unroll]
            for m in 0..tile.row_tiles {
                let product = comptime!(m * tile.out_products() + 2 * n);
                definition.execute_inplace(left.index(m), &first, out.index_mut(product));
                definition.execute_inplace(left.index(m), &second, out.index_mut(comptime!(product + 1)));
            }
        }
    }
}

/// The right operands of two neighbouring products, out of one load of four matrices.
#[cube]
fn split<E: Float>(loaded: &Array<Pair<E>>) -> (Array<Pair<E>>, Array<Pair<E>>) {
    let mut first = Array::<Pair<E>>::new(2usize);
    let mut second = Array::<Pair<E>>::new(2usize);
    first[0] = loaded[0];
    first[1] = loaded[1];
    second[0] = loaded[2];
    second[1] = loaded[3];
    (first, second)
}
