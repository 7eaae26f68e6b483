//! `y = x Wᵀ` for few rows of x. A row of lanes takes one output feature: it reads that row of the weight
//! once, in vectors of 16 bytes, several of them in flight, and multiplies it with every row of x. The weight
//! goes through the memory bus, x stays in the cache.

use cubecl::prelude::*;

use super::{
    rows::{RowsView, check_device, vector_width},
    sum::{Lanes, plane_size, sum_lanes},
};
use crate::{Error, rounding::rounded, tensor::grid};

/// Rows of x up to which [`linear`] and [`gated_linear`] take a call.
pub const MAX_LINEAR_ROWS: usize = 8;

/// Units of a cube at most.
const UNITS: usize = 256;

/// Lanes where there are no planes to sum over.
const LANES: usize = 32;

/// A projection of few rows.
///
/// # Shapes
/// * x: `[rows, in]`, up to [`MAX_LINEAR_ROWS`] rows
/// * weight: `[out, in]`
/// * bias: `[1, out]`
/// * residual, y: `[rows, out]`
///
/// All of one type. Sums are kept in f32 and rounded once, after bias and residual are added.
#[derive(Debug)]
pub struct Linear<'a> {
    /// What is projected.
    pub x: &'a RowsView,
    /// The weight, row by row.
    pub weight: &'a RowsView,
    /// Added to each row.
    pub bias: Option<&'a RowsView>,
    /// Added to the whole.
    pub residual: Option<&'a RowsView>,
    /// Every element is written. It may be the residual, but no other input.
    pub y: &'a RowsView,
}

/// Compile-time choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LinearConfig {
    /// Rows of x that are multiplied; those beyond the last one repeat it and are not stored.
    rows: usize,
    /// A row of lanes per output feature.
    lanes: Lanes,
    /// Vectors of a weight row that a unit loads before it multiplies them.
    loads: usize,
}

impl LinearConfig {
    /// `weights` rows are read for each of `outputs` features.
    fn new<R: Runtime>(client: &ComputeClient<R>, rows: usize, outputs: usize, weights: usize) -> Self {
        let properties = client.properties();
        let lanes = plane_size(properties).unwrap_or(LANES);
        let processors = properties.hardware.num_streaming_multiprocessors.unwrap_or(32) as usize;
        // Large cubes, but enough of them to give every processor some.
        let most = (UNITS / lanes).max(1);
        let features = (outputs / (2 * processors)).clamp(1, most).next_power_of_two().min(most);
        let loads = if rows > 4 { 4 } else { 8 };
        Self {
            rows: rows.next_power_of_two(),
            lanes: Lanes::new(properties, lanes, features),
            loads: loads / weights,
        }
    }
}

/// Runtime sizes. Widths and strides of x and of the weights are in vectors, the others in elements.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct LinearSizes {
    rows: u32,
    inputs: u32,
    outputs: u32,
    x_stride: u32,
    weight_stride: u32,
    residual_stride: u32,
    y_stride: u32,
}

/// Launches a projection.
///
/// # Errors
/// Shapes, strides, types or memory that do not fit, too many rows, or a device that does not know the type.
/// Nothing has been launched then.
pub fn linear<R: Runtime>(client: &ComputeClient<R>, call: &Linear<'_>) -> Result<(), Error> {
    let Linear { x, weight, bias, residual, y } = *call;
    check_few(x)?;
    check_linear(call)?;
    let address = check_device(client, &[x, weight, y])?;
    let width = vector_width(client, &[x, weight]);
    let config = LinearConfig::new(client, x.rows, weight.rows, 1);
    let sizes = LinearSizesLaunch::new(
        x.rows as u32,
        (x.width / width) as u32,
        weight.rows as u32,
        (x.stride / width) as u32,
        (weight.stride / width) as u32,
        residual.map_or(0, |residual| residual.stride) as u32,
        y.stride as u32,
    );
    // SAFETY: features below `outputs`, rows below `rows`, vectors below `inputs`, all as checked.
    unsafe {
        linear_kernel::launch_unchecked::<R>(
            client,
            grid(weight.rows.div_ceil(config.lanes.rows)),
            config.lanes.dim(),
            address,
            width,
            x.arg(),
            weight.arg(),
            optional(bias),
            optional(residual),
            y.arg(),
            sizes,
            config,
            x.dtype,
        );
    }
    Ok(())
}

/// Launches `y = silu(x Gᵀ) · (x Uᵀ)`, with gate and values computed in f32 and rounded once.
///
/// # Shapes
/// * x: `[rows, in]`, up to [`MAX_LINEAR_ROWS`] rows
/// * gate, up: `[out, in]`, with one stride; without `up`, `gate` is `[2 out, in]` and holds both, one after the
///   other
/// * y: `[rows, out]`
///
/// # Errors
/// As [`linear`].
pub fn gated_linear<R: Runtime>(
    client: &ComputeClient<R>,
    x: &RowsView,
    gate: &RowsView,
    up: Option<&RowsView>,
    y: &RowsView,
) -> Result<(), Error> {
    check_few(x)?;
    check_gated(x, gate, up, y)?;
    let other = up.unwrap_or(gate);
    let address = check_device(client, &[x, gate, other, y])?;
    let width = vector_width(client, &[x, gate, other]);
    let config = LinearConfig::new(client, x.rows, y.width, 2);
    let sizes = LinearSizesLaunch::new(
        x.rows as u32,
        (x.width / width) as u32,
        y.width as u32,
        (x.stride / width) as u32,
        (gate.stride / width) as u32,
        0,
        y.stride as u32,
    );
    // SAFETY: as in `linear`; without `up`, `gate` has twice as many rows as there are features.
    unsafe {
        gated_linear_kernel::launch_unchecked::<R>(
            client,
            grid(y.width.div_ceil(config.lanes.rows)),
            config.lanes.dim(),
            address,
            width,
            x.arg(),
            gate.arg(),
            optional(up),
            y.arg(),
            sizes,
            config,
            x.dtype,
        );
    }
    Ok(())
}

fn check_few(x: &RowsView) -> Result<(), Error> {
    if x.rows > MAX_LINEAR_ROWS {
        return Err(Error::tensor("x", "number of rows", x.rows, format!("at most {MAX_LINEAR_ROWS}")));
    }
    Ok(())
}

pub(super) fn check_linear(call: &Linear<'_>) -> Result<(), Error> {
    let Linear { x, weight, bias, residual, y } = *call;
    check_sizes(x, weight)?;
    weight.check("weight", [weight.rows, x.width], x.dtype)?;
    y.check("y", [x.rows, weight.rows], x.dtype)?;
    if let Some(bias) = bias {
        bias.check("bias", [1, weight.rows], x.dtype)?;
    }
    if let Some(residual) = residual {
        residual.check("residual", [x.rows, weight.rows], x.dtype)?;
    }
    Ok(())
}

pub(super) fn check_gated(
    x: &RowsView,
    gate: &RowsView,
    up: Option<&RowsView>,
    y: &RowsView,
) -> Result<(), Error> {
    check_sizes(x, gate)?;
    let rows = if up.is_some() { y.width } else { 2 * y.width };
    gate.check("gate", [rows, x.width], x.dtype)?;
    y.check("y", [x.rows, y.width], x.dtype)?;
    let other = up.unwrap_or(gate);
    other.check("up", [rows, x.width], x.dtype)?;
    if other.stride != gate.stride {
        return Err(Error::tensor("up", "stride", other.stride, gate.stride));
    }
    Ok(())
}

fn check_sizes(x: &RowsView, weight: &RowsView) -> Result<(), Error> {
    x.check("x", [x.rows, x.width], x.dtype)?;
    // Kernels count rows and columns, not elements, in 32 bits.
    if u32::try_from(weight.rows.max(x.stride).max(weight.stride)).is_err() {
        return Err(Error::tensor("weight", "size", weight.rows.max(weight.stride), "below 2^32"));
    }
    Ok(())
}

pub(super) fn optional<R: Runtime, E: CubePrimitive>(
    view: Option<&RowsView>,
) -> ComptimeOptionArgs<Array<E>, R> {
    view.map_or(ComptimeOptionArgs::None, |view| ComptimeOptionArgs::Some(view.arg()))
}

/// The output feature of a row of lanes.
#[cube]
fn feature() -> u32 {
    (CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X) * CUBE_DIM_Y + UNIT_POS_Y
}

/// An element, or zero where there is no array.
#[cube]
fn element<E: Float>(array: &ComptimeOption<Array<E>>, at: usize) -> f32 {
    #[comptime]
    match array {
        ComptimeOption::Some(array) => f32::cast_from(array[at]),
        ComptimeOption::None => 0.0f32.runtime(),
    }
}

/// A unit's part of the products of a weight row with all rows of x.
#[cube]
fn multiply<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    weight: &Array<Vector<E, N>>,
    products: &mut Array<f32>,
    at: u32,
    base: usize,
    sizes: &LinearSizes,
    #[comptime] loads: u32,
    #[comptime] config: LinearConfig,
) {
    let lanes = comptime!(config.lanes.lanes as u32);
    let mut loaded = Array::<Vector<E, N>>::new(comptime!(loads as usize));
    #[unroll]
    for i in 0..loads {
        loaded[i as usize] = weight[base + (at + i * lanes) as usize];
    }
    #[unroll]
    for i in 0..loads {
        let own = Vector::<f32, N>::cast_from(loaded[i as usize]);
        #[unroll]
        for row in 0..comptime!(config.rows as u32) {
            let row_base = min(row, sizes.rows - 1) as usize * sizes.x_stride as usize;
            let other = Vector::<f32, N>::cast_from(x[row_base + (at + i * lanes) as usize]);
            products[row as usize] += own.dot(other);
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn linear_kernel<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    weight: &Array<Vector<E, N>>,
    bias: &ComptimeOption<Array<E>>,
    residual: &ComptimeOption<Array<E>>,
    y: &mut Array<E>,
    sizes: LinearSizes,
    #[comptime] config: LinearConfig,
    #[define(E)] _dtype: StorageType,
) {
    let lanes = comptime!(config.lanes.lanes as u32);
    let loads = comptime!(config.loads as u32);
    let feature = feature();
    let present = feature < sizes.outputs;
    let base = min(feature, sizes.outputs - 1) as usize * sizes.weight_stride as usize;

    let mut products = Array::<f32>::new(config.rows);
    #[unroll]
    for row in 0..config.rows {
        products[row] = 0.0;
    }
    let mut at = UNIT_POS_X;
    while at + comptime!((loads - 1) * lanes) < sizes.inputs {
        multiply::<E, N>(x, weight, &mut products, at, base, &sizes, loads, config);
        at += comptime!(loads * lanes);
    }
    while at < sizes.inputs {
        multiply::<E, N>(x, weight, &mut products, at, base, &sizes, 1u32, config);
        at += lanes;
    }

    let mut parts = SharedMemory::<f32>::new(comptime!(config.lanes.parts() * config.lanes.rows));
    #[unroll]
    for row in 0..comptime!(config.rows as u32) {
        let mut sum = sum_lanes(products[row as usize], &mut parts, config.lanes);
        if UNIT_POS_X == 0 && present && row < sizes.rows {
            let at = row as usize * sizes.residual_stride as usize + feature as usize;
            sum += element(bias, feature as usize) + element(residual, at);
            y[row as usize * sizes.y_stride as usize + feature as usize] = rounded::<E>(sum);
        }
    }
}

/// As [`multiply`], with a row of `up`, or of the second half of `gate`.
#[cube]
fn multiply_up<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    gate: &Array<Vector<E, N>>,
    up: &ComptimeOption<Array<Vector<E, N>>>,
    products: &mut Array<f32>,
    at: u32,
    base: usize,
    sizes: &LinearSizes,
    #[comptime] loads: u32,
    #[comptime] config: LinearConfig,
) {
    #[comptime]
    match up {
        ComptimeOption::Some(up) => multiply::<E, N>(x, up, products, at, base, sizes, loads, config),
        ComptimeOption::None => {
            let half = sizes.outputs as usize * sizes.weight_stride as usize;
            multiply::<E, N>(x, gate, products, at, half + base, sizes, loads, config);
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gated_linear_kernel<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    gate: &Array<Vector<E, N>>,
    up: &ComptimeOption<Array<Vector<E, N>>>,
    y: &mut Array<E>,
    sizes: LinearSizes,
    #[comptime] config: LinearConfig,
    #[define(E)] _dtype: StorageType,
) {
    let lanes = comptime!(config.lanes.lanes as u32);
    let loads = comptime!(config.loads as u32);
    let feature = feature();
    let present = feature < sizes.outputs;
    let base = min(feature, sizes.outputs - 1) as usize * sizes.weight_stride as usize;

    let mut gates = Array::<f32>::new(config.rows);
    let mut values = Array::<f32>::new(config.rows);
    #[unroll]
    for row in 0..config.rows {
        gates[row] = 0.0;
        values[row] = 0.0;
    }
    let mut at = UNIT_POS_X;
    while at + comptime!((loads - 1) * lanes) < sizes.inputs {
        multiply::<E, N>(x, gate, &mut gates, at, base, &sizes, loads, config);
        multiply_up::<E, N>(x, gate, up, &mut values, at, base, &sizes, loads, config);
        at += comptime!(loads * lanes);
    }
    while at < sizes.inputs {
        multiply::<E, N>(x, gate, &mut gates, at, base, &sizes, 1u32, config);
        multiply_up::<E, N>(x, gate, up, &mut values, at, base, &sizes, 1u32, config);
        at += lanes;
    }

    let mut parts = SharedMemory::<f32>::new(comptime!(config.lanes.parts() * config.lanes.rows));
    #[unroll]
    for row in 0..comptime!(config.rows as u32) {
        let gate = sum_lanes(gates[row as usize], &mut parts, config.lanes);
        let value = sum_lanes(values[row as usize], &mut parts, config.lanes);
        if UNIT_POS_X == 0 && present && row < sizes.rows {
            let at = row as usize * sizes.y_stride as usize + feature as usize;
            y[at] = rounded::<E>(gate / (1.0 + (-gate).exp()) * value);
        }
    }
}
