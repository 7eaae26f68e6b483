//! `y = x Wᵀ` for many rows of x, by `mma.sync` m16n8k16: the device copies tiles of x and of the weight to shared
//! memory (TMA), some steps ahead; sums stay in registers until bias and residual are added.
//!
//! A cube computes [`ROWS`] x [`FEATURES`] of y, each of its planes 64 x 64. Cubes that run at the same time lie
//! together, so that what they read stays in the cache.

use cubecl::{
    cmma::MmaDefinition,
    ir::{MatrixIdent, features::Tma},
    prelude::{barrier::Barrier, *},
    zspace::{shape, strides},
};

use super::{
    linear::{Linear, check_gated, check_linear, optional},
    rows::{RowsView, check_device},
};
use crate::{
    Error,
    mma_tile::{MmaTile, PLANE, Pair, WIDE, Wide, lane, plane, zero_products},
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
const AHEAD: usize = 3;
/// Planes along the features; four times as many in all.
const FEATURE_PLANES: usize = 2;
/// Rows and features of a plane.
const SIDE: usize = 64;
const UNITS: usize = ROWS / SIDE * FEATURE_PLANES * PLANE;
/// Vectors of a staged row. They are swizzled: vector `c` of row `r` stands at `c ^ (r % 8)`, so that loads are
/// without bank conflicts.
const VECTORS: usize = DEPTH / WIDE;
/// What is loaded into a stage, with zeros beyond the ends of the matrices.
const STAGE_BYTES: usize = (ROWS + FEATURES) * VECTORS * 16;
/// Of the stages, in bytes, so that swizzles begin with their rows; barriers have room beside them.
const ALIGNMENT: usize = 1024;
/// Rows of a weight that are loaded at a time where planes have gates beside values.
const GATES: usize = SIDE / 2;
/// Times that operands are loaded out of a stage.
const LOADS: usize = DEPTH / 16;
/// Tiles of rows that cubes side by side cover before they go on to the next features.
const BAND: usize = 6;

/// Runtime sizes. Strides are in pairs.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct ProductSizes {
    rows: u32,
    outputs: u32,
    /// Of all stages, through the inputs. What is loaded from beyond the inputs is zero.
    rounds: u32,
    /// Where the values begin in their weight, in rows.
    first_value: u32,
    residual_stride: u32,
    y_stride: u32,
}

/// Whether [`product`] and [`gated_product`] multiply this type on this device.
pub fn multiplies<R: Runtime>(client: &ComputeClient<R>, dtype: StorageType) -> bool {
    let properties = client.properties();
    let bytes = STAGES * STAGE_BYTES + ALIGNMENT;
    MmaTile::is_supported(properties, dtype)
        && properties.features.tma.contains(Tma::Base)
        && properties.hardware.max_shared_memory_size >= bytes
}

/// What a call reads and writes, by name and by the elements of a vector.
type Accesses<'a> = &'a [(&'static str, &'a RowsView, usize)];

fn check_support<R: Runtime>(client: &ComputeClient<R>, accesses: Accesses<'_>) -> Result<(), Error> {
    let dtype = accesses[0].1.dtype;
    if !multiplies(client, dtype) {
        return Err(Error::Unsupported(format!("matrix products of {dtype} by mma.sync and TMA")));
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
/// As [`linear`](super::linear()), and a device without `mma.sync` or TMA, types that it does not multiply (f32), or
/// rows that are no multiple of 16 bytes.
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
    let first_value = if up.is_some() { 0 } else { y.width };
    launch(client, x, [gate, other], Some(first_value), [None, None], y)
}

/// A matrix from which so many rows are loaded at a time.
fn map<R: Runtime>(view: &RowsView, rows: usize) -> TensorMapArg<R, Tiled> {
    // A single row may have any stride; a map takes whole vectors only.
    let stride = if view.rows == 1 { view.width } else { view.stride };
    // SAFETY: the memory was checked to hold all rows.
    let tensor = unsafe {
        TensorArg::from_raw_parts(view.handle.clone(), strides![stride, 1], shape![view.rows, view.width])
    };
    TensorMapArg::new(TiledArgs::new(shape![rows, DEPTH]), tensor, view.dtype)
        .with_swizzle(TensorMapSwizzle::B128)
        .with_prefetch(TensorMapPrefetch::B128)
}

/// With gates, values begin at row `first_value` of the second weight.
fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    x: &RowsView,
    [weight, up]: [&RowsView; 2],
    first_value: Option<usize>,
    [bias, residual]: [Option<&RowsView>; 2],
    y: &RowsView,
) -> Result<(), Error> {
    let address = check_device(client, &[x, weight, up, y])?;
    let (features, loaded) = if first_value.is_some() { (FEATURES / 2, GATES) } else { (FEATURES, FEATURES) };
    let sizes = ProductSizesLaunch::new(
        x.rows as u32,
        y.width as u32,
        x.width.div_ceil(STAGES * DEPTH) as u32,
        first_value.unwrap_or(0) as u32,
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
    // SAFETY: maps end where the matrices do, and rows and features beyond the sizes are not written; sizes were
    // checked.
    unsafe {
        product_kernel::launch_unchecked::<R>(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            address,
            map(x, ROWS),
            map(weight, loaded),
            map(up, loaded),
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

/// What is loaded next: the tile's first row and feature, and the first element of both.
#[derive(CubeType, Clone, Copy)]
struct Source {
    row: u32,
    feature: u32,
    element: u32,
}

/// Starts to fill a stage, which is full once all has arrived, and goes on to the next elements; for one unit. With
/// gates, each plane has gates and values of the same features.
#[cube]
fn fill_stage<E: Float>(
    x: &TensorMap<E, Tiled>,
    weight: &TensorMap<E, Tiled>,
    values: &TensorMap<E, Tiled>,
    source: &mut Source,
    first_value: u32,
    x_stage: &mut SharedMemory<Wide<E>>,
    w_stage: &mut SharedMemory<Wide<E>>,
    full: &Shared<Barrier>,
    #[comptime] stage: usize,
    #[comptime] gated: bool,
) {
    full.arrive_and_expect_tx(1, comptime!(STAGE_BYTES as u32));
    let (row, feature, element) = (source.row as i32, source.feature as i32, source.element as i32);
    let at = comptime!(stage * ROWS * VECTORS);
    full.tma_load_2d(x, &mut x_stage.slice_mut(at, at + comptime!(ROWS * VECTORS)), row, element);
    if comptime!(gated) {
        let value = feature + first_value as i32;
        #[unroll]
        for plane in 0..FEATURE_PLANES {
            let step = comptime!((plane * GATES) as i32);
            let at = comptime!((stage * FEATURES + plane * SIDE) * VECTORS);
            let middle = comptime!(at + GATES * VECTORS);
            let end = comptime!(at + SIDE * VECTORS);
            full.tma_load_2d(weight, &mut w_stage.slice_mut(at, middle), feature + step, element);
            full.tma_load_2d(values, &mut w_stage.slice_mut(middle, end), value + step, element);
        }
    } else {
        let at = comptime!(stage * FEATURES * VECTORS);
        full.tma_load_2d(
            weight,
            &mut w_stage.slice_mut(at, at + comptime!(FEATURES * VECTORS)),
            feature,
            element,
        );
    }
    source.element += comptime!(DEPTH as u32);
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

/// Loads the plane's operands number `k` of a stage; `x_at` and `w_at` are where the unit's first vectors stand.
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
    // Vectors 2k and 2k + 1: the swizzle of the first two is in the places already.
    let swizzle = comptime!(2 * k as u32);
    let (x_at, w_at) = (x_at ^ swizzle, w_at ^ swizzle);
    #[unroll]
    for m in 0..comptime!(SIDE / 16) {
        let at = x_at + comptime!(((stage * ROWS + m * 16) * VECTORS) as u32);
        let row = x_stage.slice(at as usize, at as usize + 1);
        let loaded = definition.load_matrix::<Wide<E>, Const<2>>(&row, MatrixIdent::A, 4usize, false);
        let target = operands.rows.index_mut(m);
        #[unroll]
        for i in 0..4usize {
            target[i] = loaded[i];
        }
    }
    #[unroll]
    for n in 0..comptime!(SIDE / 16) {
        let at = w_at + comptime!(((stage * FEATURES + n * 16) * VECTORS) as u32);
        let row = w_stage.slice(at as usize, at as usize + 1);
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

/// The arrays are those of the maps: CubeCL waits for what other streams write to arrays only.
#[cube(launch_unchecked, address_type = "dynamic")]
fn product_kernel<E: Float>(
    x: &TensorMap<E, Tiled>,
    weight: &TensorMap<E, Tiled>,
    values: &TensorMap<E, Tiled>,
    _x_array: &Array<Wide<E>>,
    _weight_array: &Array<Wide<E>>,
    _values_array: &Array<Wide<E>>,
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

    let stage_rows = comptime!(STAGES * ROWS * VECTORS);
    let stage_features = comptime!(STAGES * FEATURES * VECTORS);
    let mut x_stage = SharedMemory::<Wide<E>>::new_aligned(stage_rows, ALIGNMENT);
    let mut w_stage = SharedMemory::<Wide<E>>::new_aligned(stage_features, ALIGNMENT);
    // A stage is full when all has arrived, and free when all planes have read it.
    let mut full = Sequence::<Shared<Barrier>>::new();
    let mut free = Sequence::<Shared<Barrier>>::new();
    #[unroll]
    for _ in 0..STAGES {
        full.push(Barrier::shared(1u32, UNIT_POS == 0));
        free.push(Barrier::shared(comptime!((UNITS / PLANE) as u32), UNIT_POS == 0));
    }
    sync_async_proxy_shared();
    sync_cube();

    let (row, feature) = tile_corner(tile, row_tiles, feature_tiles, features);
    let mut source = Source { row, feature, element: 0u32.runtime() };
    let fills_stages = UNIT_POS == 0;
    #[unroll]
    for stage in 0..AHEAD {
        if fills_stages {
            let barrier = full.index(stage);
            fill_stage::<E>(
                x,
                weight,
                values,
                &mut source,
                sizes.first_value,
                &mut x_stage,
                &mut w_stage,
                barrier,
                stage,
                gated,
            );
        }
    }
    sync_plane();

    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let lane = lane();
    let vectors = comptime!(VECTORS as u32);
    let plane_row = plane() / comptime!(FEATURE_PLANES as u32) * comptime!(SIDE as u32);
    let plane_feature = plane() % comptime!(FEATURE_PLANES as u32) * comptime!(SIDE as u32);
    // Matrices of a load: lanes 0..8 name the rows of the first one, and so on.
    let x_at = (plane_row + lane % 16) * vectors + ((lane / 16) ^ (lane % 8));
    let w_at = (plane_feature + lane / 16 * 8 + lane % 8) * vectors + ((lane / 8 % 2) ^ (lane % 8));
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
        let end = round + sizes.rounds;
        while round < end {
            // Stages are filled ahead, at last with the beginning of the next tile.
            let goes_on = round + 1 < end || next_tile < tiles;
            #[unroll]
            for stage in 0..STAGES {
                let filled = comptime!((stage + AHEAD) % STAGES);
                let fills = comptime!(stage + AHEAD < STAGES) || goes_on;
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
                    if comptime!(k == 1) {
                        if fills && fills_stages {
                            let used = round + comptime!((filled < stage) as u32);
                            if used > 0 {
                                free.index(filled).wait_parity((used + 1) % 2);
                            }
                            if comptime!(filled == 0) {
                                if round + 1 == end {
                                    let (row, feature) =
                                        tile_corner(next_tile, row_tiles, feature_tiles, features);
                                    source.row = row;
                                    source.feature = feature;
                                    source.element = 0;
                                }
                            }
                            let barrier = full.index(filled);
                            fill_stage::<E>(
                                x,
                                weight,
                                values,
                                &mut source,
                                sizes.first_value,
                                &mut x_stage,
                                &mut w_stage,
                                barrier,
                                filled,
                                gated,
                            );
                        }
                        sync_plane();
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
