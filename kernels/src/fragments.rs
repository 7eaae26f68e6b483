//! Cooperative matrices, which belong to a plane as a whole: where their elements lie is not known, so
//! they come from shared memory and go there.

use cubecl::{
    cmma::{Matrix, MatrixIdent, MatrixLayout},
    ir::DeviceProperties,
    prelude::*,
};

use crate::tensor::f32_type;

/// Size of the cooperative matrices, and of the planes that share them.
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

/// Accumulators, all zero.
#[cube]
pub(crate) fn zero_matrices(#[comptime] count: usize, #[comptime] size: Fragments) -> Sequence<Matrix<f32>> {
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
