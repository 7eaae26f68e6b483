//! `y = x Wᵀ` for many rows of x, by `mma.sync` m16n8k16: tiles of x and of the weight come through shared memory
//! by asynchronous copies, some steps ahead; sums stay in registers until bias and residual are added.
//!
//! A cube computes [`ROWS`] x [`FEATURES`] of y, each of its planes 64 x 64. Cubes that run at the same time lie
//! together, so that what they read stays in the cache.

use cubecl::{
    cmma::MmaDefinition,
    ir::MatrixIdent,
    prelude::{
        barrier::{Barrier, copy_async_checked},
        *,
    },
};

use super::{
    linear::{Linear, check_gated, check_linear, optional},
    rows::{RowsView, check_device},
};
use crate::{
    Error,
    mma_tile::{BARRIER_BYTES, MmaTile, PLANE, Pair, WIDE, Wide, lane, plane, split, zero_products},
    tensor::grid,
};

/// Rows of x from which [`product`] pays against one row at a time.
pub const MIN_PRODUCT_ROWS: usize = 64;

/// Rows of y that a cube computes.
const ROWS: usize = 256;
/// Features of y, or half as many gates and as many values.
const FEATURES: usize = 128;
/// Elements of a row of x that a stage holds.
const DEPTH: usize = 64;
/// Stages.
const STAGES: usize = 3;
/// Planes along the features; four times as many in all.
const FEATURE_PLANES: usize = 2;
/// Rows and features of a plane.
const SIDE: usize = 64;
const UNITS: usize = ROWS / SIDE * FEATURE_PLANES * PLANE;
/// Distance of staged rows, in vectors: one more than they hold, for loads without bank conflicts.
const PITCH: usize = DEPTH / WIDE + 1;
/// Tiles of rows that cubes side by side cover before they go on to the next features.
const BAND: usize = 8;

/// Runtime sizes. Strides of x and the weights are in [`Wide`] vectors, those of y and the residual in pairs.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct ProductSizes {
    rows: u32,
    inputs: u32,
    outputs: u32,
    x_stride: u32,
    weight_stride: u32,
    /// Where the values begin in their weight, in [`Wide`] vectors.
    first_value: usize,
    residual_stride: u32,
    y_stride: u32,
}

/// Whether [`product`] and [`gated_product`] multiply this type on this device.
pub fn multiplies<R: Runtime>(client: &ComputeClient<R>, dtype: StorageType) -> bool {
    let properties = client.properties();
    let bytes = STAGES * (ROWS + FEATURES) * PITCH * 16 + BARRIER_BYTES;
    MmaTile::is_supported(properties, dtype) && properties.hardware.max_shared_memory_size >= bytes
}

fn check_support<R: Runtime>(
    client: &ComputeClient<R>,
    views: &[&RowsView],
    outputs: usize,
) -> Result<(), Error> {
    let dtype = views[0].dtype;
    if !multiplies(client, dtype) {
        return Err(Error::Unsupported(format!("matrix products of {dtype} by mma.sync")));
    }
    if let Some(view) = views.iter().find(|view| !view.fits_width(WIDE)) {
        return Err(Error::tensor("x or weight", "width and stride", view.stride, "multiples of 8"));
    }
    if !outputs.is_multiple_of(2) {
        return Err(Error::tensor("y", "width", outputs, "a multiple of 2"));
    }
    Ok(())
}

/// Launches a projection of any number of rows.
///
/// # Errors
/// As [`linear`](super::linear()), and a device without `mma.sync`, types that it does not multiply (f32), or rows
/// that are no multiple of 16 bytes.
pub fn product<R: Runtime>(client: &ComputeClient<R>, call: &Linear<'_>) -> Result<(), Error> {
    let Linear { x, weight, bias, residual, y } = *call;
    check_linear(call)?;
    check_support(client, &[x, weight], y.width)?;
    let pairs = [Some(y), residual, bias].into_iter().flatten().all(|view| view.fits_width(2));
    if !pairs {
        return Err(Error::tensor("y, residual or bias", "width and stride", y.stride, "multiples of 2"));
    }
    launch(client, x, [weight, weight], None, [bias, residual], y)
}

/// Launches `y = silu(x Gᵀ) · (x Uᵀ)` for any number of rows; see [`gated_linear`](super::gated_linear).
///
/// # Errors
/// As [`product`].
pub fn gated_product<R: Runtime>(
    client: &ComputeClient<R>,
    x: &RowsView,
    gate: &RowsView,
    up: Option<&RowsView>,
    y: &RowsView,
) -> Result<(), Error> {
    check_gated(x, gate, up, y)?;
    check_support(client, &[x, gate, up.unwrap_or(gate)], y.width)?;
    if !y.fits_width(2) {
        return Err(Error::tensor("y", "width and stride", y.stride, "multiples of 2"));
    }
    let first_value = if up.is_some() { 0 } else { y.width * gate.stride / WIDE };
    launch(client, x, [gate, up.unwrap_or(gate)], Some(first_value), [None, None], y)
}

/// With gates, values begin at vector `first_value` of the second weight.
fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    x: &RowsView,
    [weight, up]: [&RowsView; 2],
    first_value: Option<usize>,
    [bias, residual]: [Option<&RowsView>; 2],
    y: &RowsView,
) -> Result<(), Error> {
    let address = check_device(client, &[x, weight, up, y])?;
    let features = if first_value.is_some() { FEATURES / 2 } else { FEATURES };
    let sizes = ProductSizesLaunch::new(
        x.rows as u32,
        (x.width / WIDE) as u32,
        y.width as u32,
        (x.stride / WIDE) as u32,
        (weight.stride / WIDE) as u32,
        first_value.unwrap_or(0),
        residual.map_or(0, |residual| residual.stride / 2) as u32,
        (y.stride / 2) as u32,
    );
    // SAFETY: rows, features and vectors beyond the sizes are neither read nor written; sizes were checked.
    unsafe {
        product_kernel::launch_unchecked::<R>(
            client,
            grid(x.rows.div_ceil(ROWS) * y.width.div_ceil(features)),
            CubeDim::new_1d(UNITS as u32),
            address,
            x.arg(),
            weight.arg(),
            up.arg(),
            optional(bias),
            optional(residual),
            y.arg(),
            sizes,
            first_value.is_some(),
            x.dtype,
        );
    }
    Ok(())
}

/// Which rows of a matrix a tile holds, and of those a matrix has.
#[derive(CubeType, Clone, Copy)]
struct TileRows {
    first: u32,
    end: u32,
    stride: u32,
}

/// Starts to copy one row's vector into a stage, zeros where it is not `present`.
#[cube]
fn copy_vector<E: Float>(
    source: &Array<Wide<E>>,
    from: usize,
    present: bool,
    stage: &mut SharedMemory<Wide<E>>,
    to: usize,
) {
    let length = usize::cast_from(present);
    copy_async_checked(
        &source.slice(from, from + length),
        &mut stage.slice_mut(to, to + 1),
        comptime!(WIDE as u32),
    );
}

/// Starts to copy [`DEPTH`] columns from `column` on of `count` rows into a stage. With gates, each plane has gates
/// and values of the same features.
#[cube]
fn copy_tile<E: Float>(
    source: &Array<Wide<E>>,
    values: &Array<Wide<E>>,
    rows: TileRows,
    column: u32,
    sizes: &ProductSizes,
    stage: &mut SharedMemory<Wide<E>>,
    stage_offset: u32,
    #[comptime] count: usize,
    #[comptime] gated: bool,
) {
    let chunks = comptime!((DEPTH / WIDE) as u32);
    let half = comptime!((SIDE / 2) as u32);
    #[unroll]
    for step in 0..comptime!((count * DEPTH / WIDE / UNITS) as u32) {
        let index = UNIT_POS + comptime!(step * UNITS as u32);
        let slot = index / chunks;
        let col = column + index % chunks;
        let mut row = rows.first + slot;
        if comptime!(gated) {
            row = rows.first + slot / (2 * half) * half + slot % half;
        }
        let present = row < rows.end && col < sizes.inputs;
        let row = select(present, row, 0) as usize;
        let from = row * rows.stride as usize + select(present, col, 0) as usize;
        let to = (stage_offset + slot * comptime!(PITCH as u32) + index % chunks) as usize;
        if comptime!(gated) {
            if slot / half % 2 == 1 {
                copy_vector::<E>(values, sizes.first_value + from, present, stage, to);
            } else {
                copy_vector::<E>(source, from, present, stage, to);
            }
        } else {
            copy_vector::<E>(source, from, present, stage, to);
        }
    }
}

/// Two elements, or zeros where there is no array.
#[cube]
fn pair<E: Float>(array: &ComptimeOption<Array<Pair<E>>>, at: usize) -> Pair<f32> {
    #[comptime]
    match array {
        ComptimeOption::Some(array) => Pair::cast_from(array[at]),
        ComptimeOption::None => Pair::new(0.0),
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn product_kernel<E: Float>(
    x: &Array<Wide<E>>,
    weight: &Array<Wide<E>>,
    values: &Array<Wide<E>>,
    bias: &ComptimeOption<Array<Pair<E>>>,
    residual: &ComptimeOption<Array<Pair<E>>>,
    y: &mut Array<Pair<E>>,
    sizes: ProductSizes,
    #[comptime] gated: bool,
    #[define(E)] _dtype: StorageType,
) {
    let features = comptime!((if gated { FEATURES / 2 } else { FEATURES }) as u32);
    let row_tiles = sizes.rows.div_ceil(comptime!(ROWS as u32));
    let feature_tiles = sizes.outputs.div_ceil(features);
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= row_tiles * feature_tiles {
        terminate!();
    }
    let band = comptime!(BAND as u32);
    let first_tile = item / (band * feature_tiles) * band;
    let height = min(row_tiles - first_tile, band);
    let within = item % (band * feature_tiles);
    let first_row = (first_tile + within % height) * comptime!(ROWS as u32);
    let first_feature = within / height * features;

    let stage_rows = comptime!(ROWS * PITCH);
    let stage_features = comptime!(FEATURES * PITCH);
    let mut x_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(STAGES * stage_rows), 16usize);
    let mut w_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(STAGES * stage_features), 16usize);
    let mut barriers = Sequence::<Shared<Barrier>>::new();
    #[unroll]
    for _ in 0..STAGES {
        barriers.push(Barrier::shared(comptime!(UNITS as u32), UNIT_POS == 0));
    }
    sync_cube();

    let x_rows = TileRows { first: first_row, end: sizes.rows, stride: sizes.x_stride };
    let w_rows = TileRows { first: first_feature, end: sizes.outputs, stride: sizes.weight_stride };
    let chunks = comptime!((DEPTH / WIDE) as u32);
    let steps = sizes.inputs.div_ceil(chunks);
    #[unroll]
    for stage in 0..comptime!(STAGES - 1) {
        if comptime!(stage as u32) < steps {
            let column = comptime!(stage as u32) * chunks;
            let (x_to, w_to) =
                (comptime!((stage * stage_rows) as u32), comptime!((stage * stage_features) as u32));
            copy_tile::<E>(x, x, x_rows, column, &sizes, &mut x_stage, x_to, ROWS, false);
            copy_tile::<E>(weight, values, w_rows, column, &sizes, &mut w_stage, w_to, FEATURES, gated);
            barriers.index(stage).commit_copy_async();
            barriers.index(stage).arrive();
        }
    }

    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let lane = lane();
    let pitch = comptime!(PITCH as u32);
    let plane_row = plane() / comptime!(FEATURE_PLANES as u32) * comptime!(SIDE as u32);
    let plane_feature = plane() % comptime!(FEATURE_PLANES as u32) * comptime!(SIDE as u32);
    // Matrices of a load: lanes 0..8 name the rows of the first one, and so on.
    let x_at = (plane_row + lane % 16) * pitch + lane / 16;
    let w_at = (plane_feature + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2;
    let mut sums = zero_products(comptime!(SIDE / 16 * (SIDE / 8)));

    for step in 0..steps {
        let current = step % comptime!(STAGES as u32);
        let phase = step / comptime!(STAGES as u32) % 2;
        #[unroll]
        for stage in 0..STAGES {
            if current == comptime!(stage as u32) {
                barriers.index(stage).wait_parity(phase);
            }
        }
        // Everybody is done with the step before this one, whose stage is filled next.
        sync_cube();
        let ahead = step + comptime!(STAGES as u32 - 1);
        if ahead < steps {
            let next = ahead % comptime!(STAGES as u32);
            let (x_to, w_to) = (next * comptime!(stage_rows as u32), next * comptime!(stage_features as u32));
            let column = ahead * chunks;
            copy_tile::<E>(x, x, x_rows, column, &sizes, &mut x_stage, x_to, ROWS, false);
            copy_tile::<E>(weight, values, w_rows, column, &sizes, &mut w_stage, w_to, FEATURES, gated);
            #[unroll]
            for stage in 0..STAGES {
                if next == comptime!(stage as u32) {
                    barriers.index(stage).commit_copy_async();
                    barriers.index(stage).arrive();
                }
            }
        }

        let x_at = x_at + current * comptime!(stage_rows as u32);
        let w_at = w_at + current * comptime!(stage_features as u32);
        #[unroll]
        for k in 0..comptime!(DEPTH / 16) {
            let mut rows = Sequence::<Array<Pair<E>>>::new();
            #[unroll]
            for m in 0..comptime!(SIDE / 16) {
                let at = (x_at + comptime!((m * 16 * PITCH + k * 2) as u32)) as usize;
                rows.push(definition.load_matrix::<Wide<E>, Const<2>>(
                    &x_stage.slice(at, at + 1),
                    MatrixIdent::A,
                    4usize,
                    false,
                ));
            }
            #[unroll]
            for n in 0..comptime!(SIDE / 16) {
                let at = (w_at + comptime!((n * 16 * PITCH + k * 2) as u32)) as usize;
                let loaded = definition.load_matrix::<Wide<E>, Const<2>>(
                    &w_stage.slice(at, at + 1),
                    MatrixIdent::B,
                    4usize,
                    false,
                );
                let (left, right) = split(&loaded);
                #[unroll]
                for m in 0..comptime!(SIDE / 16) {
                    let at = comptime!(m * (SIDE / 8) + 2 * n);
                    definition.execute_inplace(rows.index(m), &left, sums.index_mut(at));
                    definition.execute_inplace(rows.index(m), &right, sums.index_mut(comptime!(at + 1)));
                }
            }
        }
    }

    #[unroll]
    for m in 0..comptime!(SIDE / 16) {
        #[unroll]
        for half in 0..2usize {
            let row = first_row + plane_row + lane / 4 + comptime!((m * 16 + half * 8) as u32);
            if row < sizes.rows {
                if comptime!(gated) {
                    #[unroll]
                    for n in 0..comptime!(SIDE / 16) {
                        let feature =
                            first_feature + plane_feature / 2 + lane % 4 * 2 + comptime!(n as u32 * 8);
                        if feature < sizes.outputs {
                            let gate = sums.index(comptime!(m * (SIDE / 8) + n))[half];
                            let value = sums.index(comptime!(m * (SIDE / 8) + SIDE / 16 + n))[half];
                            let one = Pair::<f32>::new(1.0);
                            let stored = gate / (one + (-gate).exp()) * value;
                            y[row as usize * sizes.y_stride as usize + (feature / 2) as usize] =
                                Pair::cast_from(stored);
                        }
                    }
                } else {
                    #[unroll]
                    for n in 0..comptime!(SIDE / 8) {
                        let feature = first_feature + plane_feature + lane % 4 * 2 + comptime!(n as u32 * 8);
                        if feature < sizes.outputs {
                            let mut sum = sums.index(comptime!(m * (SIDE / 8) + n))[half];
                            let at = (feature / 2) as usize;
                            sum += pair(bias, at);
                            sum += pair(residual, row as usize * sizes.residual_stride as usize + at);
                            y[row as usize * sizes.y_stride as usize + at] = Pair::cast_from(sum);
                        }
                    }
                }
            }
        }
    }
}
