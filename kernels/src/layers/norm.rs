//! Root-mean-square normalization, one cube a row.

use cubecl::prelude::*;

use super::{
    rows::{RowsView, check_device, vector_width},
    sum::{Lanes, plane_size, sum_lanes},
};
use crate::{Error, rounding::rounded_vector, tensor::grid};

/// Units of a cube at most.
const UNITS: usize = 512;

/// Partial sums of a cube at most.
const PARTS: usize = 64;

/// `y = x / sqrt(mean(x²) + epsilon) · weight`, normalized in f32.
///
/// # Shapes
/// * x, y: `[rows, width]`
/// * weight: `[1, width]`
///
/// All of one type.
#[derive(Debug)]
pub struct RmsNorm<'a> {
    /// What is normalized.
    pub x: &'a RowsView,
    /// Multiplies each row.
    pub weight: &'a RowsView,
    /// Added to the mean of the squares.
    pub epsilon: f64,
    /// Whether the normalized value is rounded before the weight multiplies it, besides after.
    pub round_before_weight: bool,
    /// Every element is written. It may be x.
    pub y: &'a RowsView,
}

/// Compile-time choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct NormConfig {
    lanes: Lanes,
    round_before_weight: bool,
}

/// Runtime sizes, in vectors.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct NormSizes {
    rows: u32,
    width: u32,
    x_stride: u32,
    y_stride: u32,
}

/// Launches a normalization.
///
/// # Errors
/// Shapes, strides, types or memory that do not fit, or a device that does not know the type. Nothing has been
/// launched then.
pub fn rms_norm<R: Runtime>(client: &ComputeClient<R>, call: &RmsNorm<'_>) -> Result<(), Error> {
    let RmsNorm { x, weight, epsilon, round_before_weight, y } = *call;
    x.check("x", [x.rows, x.width], x.dtype)?;
    weight.check("weight", [1, x.width], x.dtype)?;
    y.check("y", [x.rows, x.width], x.dtype)?;
    let largest = x.rows.max(x.stride).max(y.stride);
    if u32::try_from(largest).is_err() {
        return Err(Error::tensor("x", "size", largest, "below 2^32"));
    }
    let address = check_device(client, &[x, weight, y])?;
    let width = vector_width(client, &[x, weight, y]);
    let properties = client.properties();
    let most = UNITS.min(properties.hardware.max_units_per_cube as usize);
    // Each unit adds up the parts of all planes: without planes, large cubes would not pay.
    let most = most.min(PARTS * plane_size(properties).unwrap_or(1));
    let lanes = (x.width / width).next_power_of_two().min(most);
    let config = NormConfig { lanes: Lanes::new(properties, lanes, 1), round_before_weight };
    let sizes = NormSizesLaunch::new(
        x.rows as u32,
        (x.width / width) as u32,
        (x.stride / width) as u32,
        (y.stride / width) as u32,
    );
    // SAFETY: rows below `rows`, vectors below `width`, as checked.
    unsafe {
        norm_kernel::launch_unchecked::<R>(
            client,
            grid(x.rows),
            config.lanes.dim(),
            address,
            width,
            x.arg(),
            weight.arg(),
            y.arg(),
            sizes,
            epsilon as f32,
            1.0 / x.width as f32,
            config,
            x.dtype,
        );
    }
    Ok(())
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_kernel<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    weight: &Array<Vector<E, N>>,
    y: &mut Array<Vector<E, N>>,
    sizes: NormSizes,
    epsilon: f32,
    share: f32,
    #[comptime] config: NormConfig,
    #[define(E)] _dtype: StorageType,
) {
    let lanes = comptime!(config.lanes.lanes as u32);
    let row = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if row >= sizes.rows {
        terminate!();
    }
    let x_base = row as usize * sizes.x_stride as usize;
    let y_base = row as usize * sizes.y_stride as usize;

    let mut squares = 0.0f32;
    let mut at = UNIT_POS_X;
    while at < sizes.width {
        let value = Vector::<f32, N>::cast_from(x[x_base + at as usize]);
        squares += value.dot(value);
        at += lanes;
    }
    let mut parts = SharedMemory::<f32>::new(comptime!(config.lanes.parts()));
    let sum = sum_lanes(squares, &mut parts, config.lanes);
    let scale = 1.0 / (sum * share + epsilon).sqrt();

    at = UNIT_POS_X;
    while at < sizes.width {
        let mut value = Vector::<f32, N>::cast_from(x[x_base + at as usize]) * Vector::new(scale);
        if comptime!(config.round_before_weight) {
            value = Vector::cast_from(rounded_vector::<E, N>(value));
        }
        let weight = Vector::<f32, N>::cast_from(weight[at as usize]);
        y[y_base + at as usize] = rounded_vector::<E, N>(value * weight);
        at += lanes;
    }
}
