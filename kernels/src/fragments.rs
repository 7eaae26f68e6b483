//! Products of square tiles by cooperative matrices, which belong to a plane as a whole: where their
//! elements lie is not known, so they come from shared memory and go there.

use cubecl::{
    cmma::{self, Matrix, MatrixIdent, MatrixLayout},
    ir::DeviceProperties,
    prelude::*,
};

use crate::{square_tile::SquareTile, tensor::f32_type};

/// Size of the cooperative matrices, and how a cube's planes share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fragments {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Units of the widest plane.
    pub plane: usize,
    /// Units of the narrowest plane.
    pub narrowest: usize,
}

impl Fragments {
    /// The largest matrices of the type that divide 16 x 16 x 16 and sum up in `f32`.
    pub fn new(properties: &DeviceProperties, dtype: StorageType) -> Option<Self> {
        let types = (dtype, dtype, f32_type());
        let sizes = properties.features.matmul.cmma.iter();
        let fitting = sizes.filter(|config| {
            (config.a_type, config.b_type, config.cd_type) == types
                && [config.m, config.n, config.k].iter().all(|size| 16 % size == 0)
        });
        let config = fitting.max_by_key(|config| config.m * config.n * config.k)?;
        let [m, n, k] = [config.m, config.n, config.k].map(|size| size as usize);
        let [plane, narrowest] = [properties.hardware.plane_size_max, properties.hardware.plane_size_min]
            .map(|size| size as usize);
        Some(Self { m, n, k, plane, narrowest })
    }
}

/// The plane's accumulators of an `edge x columns` product, all zero.
#[cube]
pub(crate) fn zero_sums(#[comptime] columns: usize, #[comptime] tile: SquareTile) -> Sequence<Matrix<f32>> {
    let size = comptime!(tile.fragments.unwrap());
    let mut sums = Sequence::new();
    #[unroll]
    for _ in 0..comptime!(tile.plane_matrices(&size, columns)) {
        sums.push(Matrix::from_value(
            MatrixIdent::Accumulator,
            size.m,
            size.n,
            size.k,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    sums
}

/// Adds staged queries x staged keys^T.
#[cube]
pub(crate) fn add_scores<S: Float, N: Size>(
    stage: &SharedMemory<Vector<S, N>>,
    sums: &Sequence<Matrix<f32>>,
    #[comptime] tile: SquareTile,
) {
    let size = comptime!(tile.fragments.unwrap());
    let width = N::value();
    let pitch = comptime!(tile.pitch(width) as u32);
    let elements = comptime!(pitch * width as u32);
    let across = comptime!((tile.edge / size.n) as u32);
    let own = comptime!(tile.plane_matrices(&size, tile.edge) as u32);
    let first = UNIT_POS / PLANE_DIM * own;
    #[unroll]
    for i in 0..own {
        let index = first + i;
        if index < comptime!((tile.edge / size.m) as u32 * across) {
            #[unroll]
            for step in 0..comptime!(tile.chunk() / size.k) {
                let col = comptime!((step * size.k / width) as u32);
                let row = index / across * comptime!(size.m as u32);
                let queries = load::<S, N>(stage, row * pitch + col, elements, MatrixIdent::A, false, size);
                let row = comptime!(tile.edge as u32) + index % across * comptime!(size.n as u32);
                let keys = load::<S, N>(stage, row * pitch + col, elements, MatrixIdent::B, true, size);
                let sum = sums.index(comptime!(i as usize));
                cmma::execute::<S, S, f32, f32>(&queries, &keys, sum, sum);
            }
        }
    }
}

/// Adds weights x staged values.
#[cube]
pub(crate) fn add_values<S: Float, N: Size>(
    weights: &SharedMemory<S>,
    stage: &SharedMemory<Vector<S, N>>,
    sums: &Sequence<Matrix<f32>>,
    #[comptime] tile: SquareTile,
) {
    let size = comptime!(tile.fragments.unwrap());
    let width = N::value();
    let pitch = comptime!(tile.pitch(width) as u32);
    let elements = comptime!(pitch * width as u32);
    let weight_pitch = comptime!(tile.weight_pitch() as u32);
    let across = comptime!((tile.chunk() / size.n) as u32);
    let own = comptime!(tile.plane_matrices(&size, tile.chunk()) as u32);
    let first = UNIT_POS / PLANE_DIM * own;
    #[unroll]
    for i in 0..own {
        let index = first + i;
        if index < comptime!((tile.edge / size.m) as u32 * across) {
            #[unroll]
            for step in 0..comptime!(tile.edge / size.k) {
                let row = index / across * comptime!(size.m as u32);
                let at = (row * weight_pitch + comptime!((step * size.k) as u32)) as usize;
                let left = Matrix::<S>::from_slice(
                    MatrixIdent::A,
                    size.m,
                    size.n,
                    size.k,
                    MatrixLayout::RowMajor,
                    &weights.slice(at, at + 1),
                    weight_pitch,
                );
                let col = index % across * comptime!((size.n / width) as u32);
                let at = comptime!((step * size.k) as u32 * pitch) + col;
                let values = load::<S, N>(stage, at, elements, MatrixIdent::B, false, size);
                let sum = sums.index(comptime!(i as usize));
                cmma::execute::<S, S, f32, f32>(&left, &values, sum, sum);
            }
        }
    }
}

/// A matrix out of the stage, at a position in vectors; `elements` lie between its rows, or
/// between its columns if it is transposed.
#[cube]
fn load<S: Float, N: Size>(
    stage: &SharedMemory<Vector<S, N>>,
    at: u32,
    elements: u32,
    #[comptime] ident: MatrixIdent,
    #[comptime] transposed: bool,
    #[comptime] size: Fragments,
) -> Matrix<S> {
    let layout = comptime!(match transposed {
        true => MatrixLayout::ColMajor,
        false => MatrixLayout::RowMajor,
    });
    // SAFETY: loaded right away.
    let matrix = unsafe { Matrix::<S>::uninitialized(ident, size.m, size.n, size.k, layout) };
    cmma::load(&matrix, &stage.slice(at as usize, at as usize + 1), elements);
    matrix
}

/// Writes the plane's accumulators of an `edge x columns` product to shared memory.
#[cube]
pub(crate) fn store_sums(
    sums: &Sequence<Matrix<f32>>,
    products: &mut SharedMemory<f32>,
    #[comptime] columns: usize,
    #[comptime] tile: SquareTile,
) {
    let size = comptime!(tile.fragments.unwrap());
    let across = comptime!((columns / size.n) as u32);
    let own = comptime!(tile.plane_matrices(&size, columns) as u32);
    let first = UNIT_POS / PLANE_DIM * own;
    #[unroll]
    for i in 0..own {
        let index = first + i;
        if index < comptime!((tile.edge / size.m) as u32 * across) {
            let row = index / across * comptime!(size.m as u32);
            let col = index % across * comptime!(size.n as u32);
            let at = (row * comptime!(columns as u32) + col) as usize;
            cmma::store(
                &mut products.slice_mut(at, at + 1),
                sums.index(comptime!(i as usize)),
                comptime!(columns as u32),
                MatrixLayout::RowMajor,
            );
        }
    }
}
