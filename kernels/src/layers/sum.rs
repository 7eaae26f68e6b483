//! Sums over units, by planes where their size is known, otherwise through shared memory.

use cubecl::{
    ir::{DeviceProperties, features::Plane},
    prelude::*,
};

/// Units of a plane, where planes can add and all have one size.
pub(super) fn plane_size(properties: &DeviceProperties) -> Option<usize> {
    let hardware = &properties.hardware;
    let fixed = hardware.plane_size_min == hardware.plane_size_max;
    (fixed && properties.features.plane.contains(Plane::Ops)).then_some(hardware.plane_size_max as usize)
}

/// How a row of `lanes` units adds: consecutive units, a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Lanes {
    pub lanes: usize,
    /// Rows of the cube.
    pub rows: usize,
    /// Units of a plane, at most `lanes`; 1 without planes.
    pub plane: usize,
}

impl Lanes {
    /// `rows` of at most `lanes` units each.
    pub fn new(properties: &DeviceProperties, lanes: usize, rows: usize) -> Self {
        let plane = plane_size(properties).unwrap_or(1);
        Self { lanes: lanes.max(plane), rows, plane }
    }

    pub fn dim(&self) -> CubeDim {
        CubeDim::new_2d(self.lanes as u32, self.rows as u32)
    }

    /// Partial sums that pass through shared memory.
    pub fn parts(&self) -> usize {
        self.lanes / self.plane
    }
}

/// The sum of `value` over the lanes of each row, the same in all of them. `parts` has room for
/// [`Lanes::parts`] of all rows.
#[cube]
pub(super) fn sum_lanes(value: f32, parts: &mut SharedMemory<f32>, #[comptime] lanes: Lanes) -> f32 {
    let plane = comptime!(lanes.plane as u32);
    let count = comptime!(lanes.parts() as u32);
    let mut total = value;
    if comptime!(lanes.plane > 1) {
        total = plane_sum(value);
    }
    if comptime!(lanes.parts() > 1) {
        // Others may still read the parts of the sum before this one.
        sync_cube();
        if UNIT_POS_X % plane == 0 {
            parts[(UNIT_POS_Y * count + UNIT_POS_X / plane) as usize] = total;
        }
        sync_cube();
        total = 0.0;
        for part in 0..count {
            total += parts[(UNIT_POS_Y * count + part) as usize];
        }
    }
    total
}
