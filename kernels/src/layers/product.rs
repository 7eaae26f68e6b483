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
    mma_tile::{BARRIER_BYTES, MmaTile, PLANE, Pair, WIDE, Wide, lane, plane, zero_products},
};

/// Rows of x from which layers take [`product`]: a quarter of what a cube computes at once.
pub const MIN_PRODUCT_ROWS: usize = 64;

/// Rows of y that a cube computes.
const ROWS: usize = 256;
/// Features of y, or half as many gates and as many values.
const FEATURES: usize = 128;
/// Elements of a row of x that a stage holds.
const DEPTH: usize = 64;
/// Stages.
const STAGES: usize = 4;
/// Steps that a stage is filled ahead of its use: fewer than there are stages, so that planes that are behind
/// may still read the stage before.
const AHEAD: usize = 2;
/// Planes along the features; four times as many in all.
const FEATURE_PLANES: usize = 2;
/// Rows and features of a plane.
const SIDE: usize = 64;
const UNITS: usize = ROWS / SIDE * FEATURE_PLANES * PLANE;
/// Distance of staged rows, in vectors: one more than they hold, for loads without bank conflicts.
const PITCH: usize = DEPTH / WIDE + 1;
/// Rows that the cube's units copy at a time.
const COPIED_ROWS: usize = UNITS * WIDE / DEPTH;
/// Copies of a unit into a stage.
const X_COPIES: usize = ROWS / COPIED_ROWS;
const W_COPIES: usize = FEATURES / COPIED_ROWS;
/// Times that operands are loaded out of a stage; copies are started at all but the last.
const LOADS: usize = DEPTH / 16;
const COPIES_AT_ONCE: usize = (X_COPIES + W_COPIES) / (LOADS - 1);
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

/// What a call reads and writes, by name and by the elements of a vector.
type Accesses<'a> = &'a [(&'static str, &'a RowsView, usize)];

fn check_support<R: Runtime>(client: &ComputeClient<R>, accesses: Accesses<'_>) -> Result<(), Error> {
    let dtype = accesses[0].1.dtype;
    if !multiplies(client, dtype) {
        return Err(Error::Unsupported(format!("matrix products of {dtype} by mma.sync")));
    }
    if let Some((name, view, width)) = accesses.iter().find(|(_, view, width)| !view.fits_width(*width)) {
        let found = format!("{} and {}", view.width, view.stride);
        return Err(Error::tensor(name, "width and stride", found, format!("multiples of {width}, aligned")));
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
    let mut accesses = vec![("x", x, WIDE), ("weight", weight, WIDE), ("y", y, 2)];
    accesses.extend(bias.map(|bias| ("bias", bias, 2)));
    accesses.extend(residual.map(|residual| ("residual", residual, 2)));
    check_support(client, &accesses)?;
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
    let other = up.unwrap_or(gate);
    check_support(client, &[("x", x, WIDE), ("gate", gate, WIDE), ("up", other, WIDE), ("y", y, 2)])?;
    let first_value = if up.is_some() { 0 } else { y.width * gate.stride / WIDE };
    launch(client, x, [gate, other], Some(first_value), [None, None], y)
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
    let tiles = x.rows.div_ceil(ROWS) * y.width.div_ceil(features);
    // One cube has a processor to itself, and goes from tile to tile.
    let cubes = client
        .properties()
        .hardware
        .num_streaming_multiprocessors
        .map_or(tiles, |all| tiles.min(all as usize));
    // SAFETY: rows, features and vectors beyond the sizes are neither read nor written; sizes were checked.
    unsafe {
        product_kernel::launch_unchecked::<R>(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
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

/// Where a unit's copies come from: a column of one row of a tile, and of every [`COPIED_ROWS`]-th after it.
#[derive(CubeType, Clone, Copy)]
struct Source {
    row: u32,
    last_row: u32,
    column: u32,
    stride: u32,
    inputs: u32,
}

/// Starts to copy vector `column` of a row into a stage; zeros where rows are not that long. Rows beyond the
/// last repeat it: what they add up to is not stored.
#[cube]
fn copy_vector<E: Float>(
    matrix: &Array<Wide<E>>,
    first: usize,
    row: u32,
    source: &Source,
    stage: &mut SharedMemory<Wide<E>>,
    to: u32,
) {
    let from = first + min(row, source.last_row) as usize * source.stride as usize + source.column as usize;
    let length = usize::cast_from(source.column < source.inputs);
    copy_async_checked(
        &matrix.slice(from, from + length),
        &mut stage.slice_mut(to as usize, to as usize + 1),
        comptime!(WIDE as u32),
    );
}

/// Starts copy number `index` of a unit: rows of x first, then features. With gates, each plane has gates and
/// values of the same features.
#[cube]
fn start_copy<E: Float>(
    x: &Array<Wide<E>>,
    weight: &Array<Wide<E>>,
    values: &Array<Wide<E>>,
    x_source: &Source,
    w_source: &Source,
    first_value: usize,
    x_stage: &mut SharedMemory<Wide<E>>,
    w_stage: &mut SharedMemory<Wide<E>>,
    slot: u32,
    #[comptime] stage: usize,
    #[comptime] index: usize,
    #[comptime] gated: bool,
) {
    if comptime!(index < X_COPIES) {
        let row = x_source.row + comptime!((index * COPIED_ROWS) as u32);
        let to = slot + comptime!(((stage * ROWS + index * COPIED_ROWS) * PITCH) as u32);
        copy_vector::<E>(x, 0, row, x_source, x_stage, to);
    } else {
        let part = comptime!(index - X_COPIES);
        let to = slot + comptime!(((stage * FEATURES + part * COPIED_ROWS) * PITCH) as u32);
        if comptime!(!gated) {
            let row = w_source.row + comptime!((part * COPIED_ROWS) as u32);
            copy_vector::<E>(weight, 0, row, w_source, w_stage, to);
        } else {
            let row = w_source.row + comptime!((part / 2 * COPIED_ROWS) as u32);
            if comptime!(part % 2 == 1) {
                copy_vector::<E>(values, first_value, row, w_source, w_stage, to);
            } else {
                copy_vector::<E>(weight, 0, row, w_source, w_stage, to);
            }
        }
    }
}

/// What a plane multiplies at a time: [`SIDE`] rows and as many features, 16 elements of each.
#[derive(CubeType)]
struct Operands<E: Float> {
    rows: Sequence<Array<Pair<E>>>,
    features: Sequence<Array<Pair<E>>>,
}

#[cube]
fn new_operands<E: Float>() -> Operands<E> {
    let mut rows = Sequence::new();
    let mut features = Sequence::new();
    #[unroll]
    for _ in 0..comptime!(SIDE / 16) {
        rows.push(Array::<Pair<E>>::new(4usize));
    }
    #[unroll]
    for _ in 0..comptime!(SIDE / 8) {
        features.push(Array::<Pair<E>>::new(2usize));
    }
    Operands::<E> { rows, features }
}

/// Loads the plane's operands number `k` of a stage.
#[cube]
fn load_operands<E: Float>(
    x_stage: &SharedMemory<Wide<E>>,
    w_stage: &SharedMemory<Wide<E>>,
    x_at: u32,
    w_at: u32,
    operands: &mut Operands<E>,
    #[comptime] stage: usize,
    #[comptime] k: usize,
) {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for m in 0..comptime!(SIDE / 16) {
        let at = (x_at + comptime!(((stage * ROWS + m * 16) * PITCH + k * 2) as u32)) as usize;
        let row = x_stage.slice(at, at + 1);
        let loaded = definition.load_matrix::<Wide<E>, Const<2>>(&row, MatrixIdent::A, 4usize, false);
        let target = operands.rows.index_mut(m);
        #[unroll]
        for i in 0..4usize {
            target[i] = loaded[i];
        }
    }
    #[unroll]
    for n in 0..comptime!(SIDE / 16) {
        let at = (w_at + comptime!(((stage * FEATURES + n * 16) * PITCH + k * 2) as u32)) as usize;
        let row = w_stage.slice(at, at + 1);
        let loaded = definition.load_matrix::<Wide<E>, Const<2>>(&row, MatrixIdent::B, 4usize, false);
        #[unroll]
        for half in 0..2usize {
            let target = operands.features.index_mut(comptime!(2 * n + half));
            target[0] = loaded[comptime!(2 * half)];
            target[1] = loaded[comptime!(2 * half + 1)];
        }
    }
}

/// One arrival for a plane, once all its units are here: barriers count arrivals one by one.
#[cube]
fn arrive_once(barrier: &Shared<Barrier>) {
    sync_plane();
    if lane() == 0 {
        barrier.arrive();
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
    let tiles = row_tiles * feature_tiles;
    let mut tile = CUBE_POS_X;
    if tile >= tiles {
        terminate!();
    }

    let stage_rows = comptime!(ROWS * PITCH);
    let stage_features = comptime!(FEATURES * PITCH);
    let mut x_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(STAGES * stage_rows), 16usize);
    let mut w_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(STAGES * stage_features), 16usize);
    // A stage is full when all copies are there, and free when all planes have read it.
    let mut full = Sequence::<Shared<Barrier>>::new();
    let mut free = Sequence::<Shared<Barrier>>::new();
    #[unroll]
    for _ in 0..STAGES {
        full.push(Barrier::shared(comptime!((UNITS / PLANE) as u32), UNIT_POS == 0));
        free.push(Barrier::shared(comptime!((UNITS / PLANE) as u32), UNIT_POS == 0));
    }
    sync_cube();

    let chunks = comptime!((DEPTH / WIDE) as u32);
    let copied_row = UNIT_POS / chunks;
    let slot = copied_row * comptime!(PITCH as u32) + UNIT_POS % chunks;
    let column = UNIT_POS % chunks;
    let inputs = sizes.inputs;
    let (row, feature) = tile_corner(tile, row_tiles, feature_tiles, features);
    let (x_stride, w_stride) = (sizes.x_stride, sizes.weight_stride);
    let mut x_source =
        Source { row: row + copied_row, last_row: sizes.rows - 1, column, stride: x_stride, inputs };
    let mut w_source =
        Source { row: feature + copied_row, last_row: sizes.outputs - 1, column, stride: w_stride, inputs };
    // Steps come in whole rounds of stages; those beyond the inputs add zeros.
    let rounds = inputs.div_ceil(comptime!((STAGES * DEPTH / WIDE) as u32));
    #[unroll]
    for stage in 0..AHEAD {
        #[unroll]
        for index in 0..comptime!(X_COPIES + W_COPIES) {
            start_copy::<E>(
                x,
                weight,
                values,
                &x_source,
                &w_source,
                sizes.first_value,
                &mut x_stage,
                &mut w_stage,
                slot,
                stage,
                index,
                gated,
            );
        }
        full.index(stage).commit_copy_async();
        arrive_once(full.index(stage));
        x_source.column += chunks;
        w_source.column += chunks;
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
    // While one set is multiplied, the other one is loaded.
    let mut operands = Sequence::<Operands<E>>::new();
    operands.push(new_operands::<E>());
    operands.push(new_operands::<E>());
    full.index(0usize).wait_parity(0);
    load_operands::<E>(&x_stage, &w_stage, x_at, w_at, operands.index_mut(0usize), 0usize, 0usize);

    // Of all tiles so far: the barriers' phases go on from tile to tile.
    let mut round = 0u32.runtime();
    while tile < tiles {
        #[unroll]
        for i in 0..comptime!(SIDE / 16 * (SIDE / 8)) {
            let product = sums.index_mut(i);
            product[0] = Pair::new(0.0);
            product[1] = Pair::new(0.0);
        }
        let next_tile = tile + CUBE_COUNT_X;
        let end = round + rounds;
        while round < end {
            // Stages are filled ahead, at last with the beginning of the next tile.
            let goes_on = round + 1 < end || next_tile < tiles;
            #[unroll]
            for stage in 0..STAGES {
                let filled = comptime!((stage + AHEAD) % STAGES);
                let fills = comptime!(stage + AHEAD < STAGES) || goes_on;
                if comptime!(filled == 0) {
                    if round + 1 == end {
                        let (row, feature) = tile_corner(next_tile, row_tiles, feature_tiles, features);
                        x_source.row = row + copied_row;
                        w_source.row = feature + copied_row;
                        x_source.column = column;
                        w_source.column = column;
                    }
                }
                #[unroll]
                for k in 0..LOADS {
                    if comptime!(k + 1 < LOADS) {
                        let target = operands.index_mut(comptime!((k + 1) % 2));
                        load_operands::<E>(&x_stage, &w_stage, x_at, w_at, target, stage, comptime!(k + 1));
                    } else {
                        arrive_once(free.index(stage));
                        let next = comptime!((stage + 1) % STAGES);
                        if comptime!(next > 0) || goes_on {
                            full.index(next).wait_parity((round + comptime!((next == 0) as u32)) % 2);
                        }
                        let target = operands.index_mut(0usize);
                        load_operands::<E>(&x_stage, &w_stage, x_at, w_at, target, next, 0usize);
                    }
                    if fills {
                        if comptime!(k == 0) {
                            let used = round + comptime!((filled < stage) as u32);
                            if used > 0 {
                                free.index(filled).wait_parity((used + 1) % 2);
                            }
                        }
                        if comptime!(k + 1 < LOADS) {
                            #[unroll]
                            for index in 0..COPIES_AT_ONCE {
                                start_copy::<E>(
                                    x,
                                    weight,
                                    values,
                                    &x_source,
                                    &w_source,
                                    sizes.first_value,
                                    &mut x_stage,
                                    &mut w_stage,
                                    slot,
                                    filled,
                                    comptime!(k * COPIES_AT_ONCE + index),
                                    gated,
                                );
                            }
                        } else {
                            full.index(filled).commit_copy_async();
                            arrive_once(full.index(filled));
                        }
                    }
                    let held = operands.index(comptime!(k % 2));
                    #[unroll]
                    for n in 0..comptime!(SIDE / 8) {
                        #[unroll]
                        for m in 0..comptime!(SIDE / 16) {
                            definition.execute_inplace(
                                held.rows.index(m),
                                held.features.index(n),
                                sums.index_mut(comptime!(m * (SIDE / 8) + n)),
                            );
                        }
                    }
                }
                x_source.column += chunks;
                w_source.column += chunks;
            }
            round += 1;
        }

        let (first_row, first_feature) = tile_corner(tile, row_tiles, feature_tiles, features);
        let first_row = first_row + plane_row + lane / 4;
        store_tile::<E>(&sums, bias, residual, y, &sizes, first_row, first_feature, plane_feature, gated);
        tile = next_tile;
    }
}

/// First row and feature of a tile.
#[cube]
fn tile_corner(tile: u32, row_tiles: u32, feature_tiles: u32, #[comptime] features: u32) -> (u32, u32) {
    let band = comptime!(BAND as u32);
    let first_tile = tile / (band * feature_tiles) * band;
    // Beyond the last tile, any number but zero does.
    let height = max(min(row_tiles - min(first_tile, row_tiles), band), 1);
    let within = tile % (band * feature_tiles);
    ((first_tile + within % height) * comptime!(ROWS as u32), within / height * features)
}

/// Stores what a plane has summed up.
#[cube]
fn store_tile<E: Float>(
    sums: &Sequence<Array<Pair<f32>>>,
    bias: &ComptimeOption<Array<Pair<E>>>,
    residual: &ComptimeOption<Array<Pair<E>>>,
    y: &mut Array<Pair<E>>,
    sizes: &ProductSizes,
    first_row: u32,
    first_feature: u32,
    plane_feature: u32,
    #[comptime] gated: bool,
) {
    let lane = lane();
    #[unroll]
    for m in 0..comptime!(SIDE / 16) {
        #[unroll]
        for half in 0..2usize {
            let row = first_row + comptime!((m * 16 + half * 8) as u32);
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
                            let opposite = Pair::<f32>::new(0.0) - gate;
                            let stored = gate / (one + opposite.exp()) * value;
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
