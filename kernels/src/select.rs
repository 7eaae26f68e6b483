//! Cube-wide sums, scans and selection over an array that one cube of [`UNITS`] units owns.

use cubecl::prelude::*;

/// Units of a cube that works on one head.
pub(crate) const UNITS: usize = 256;

/// Sum of one value per unit, in every unit, in a fixed order.
#[cube]
pub(crate) fn cube_sum(value: f32, scratch: &mut SharedMemory<f32>) -> f32 {
    sync_cube();
    scratch[UNIT_POS as usize] = value;
    sync_cube();
    let mut half = comptime!(UNITS as u32 / 2).runtime();
    while half > 0 {
        if UNIT_POS < half {
            scratch[UNIT_POS as usize] += scratch[(UNIT_POS + half) as usize];
        }
        sync_cube();
        half /= 2;
    }
    scratch[0]
}

/// The least of one value per unit, in every unit.
#[cube]
pub(crate) fn cube_min(value: f32, scratch: &mut SharedMemory<f32>) -> f32 {
    sync_cube();
    scratch[UNIT_POS as usize] = value;
    sync_cube();
    let mut half = comptime!(UNITS as u32 / 2).runtime();
    while half > 0 {
        if UNIT_POS < half {
            let other = scratch[(UNIT_POS + half) as usize];
            scratch[UNIT_POS as usize] = min(scratch[UNIT_POS as usize], other);
        }
        sync_cube();
        half /= 2;
    }
    scratch[0]
}

/// Sum of the values of the units before this one.
#[cube]
pub(crate) fn cube_prefix(value: u32, scratch: &mut SharedMemory<u32>) -> u32 {
    sync_cube();
    scratch[UNIT_POS as usize] = value;
    sync_cube();
    let mut reach = 1u32.runtime();
    while reach < comptime!(UNITS as u32) {
        let mut sum = scratch[UNIT_POS as usize];
        if UNIT_POS >= reach {
            sum += scratch[(UNIT_POS - reach) as usize];
        }
        sync_cube();
        scratch[UNIT_POS as usize] = sum;
        sync_cube();
        reach *= 2;
    }
    scratch[UNIT_POS as usize] - value
}

/// Candidate digits of one selection round, besides zero.
const DIGITS: usize = 15;

/// The largest key `t`, as bits, such that the items with keys of at least `t` weigh `need` or
/// more; 0 if all items together do not.
///
/// Keys are non-negative floats, whose order is that of their bits. Each of the eight rounds fixes
/// four bits from 15 cube-wide sums.
#[cube]
pub(crate) fn select_key(
    keys: &Array<f32>,
    key_base: usize,
    weights: &Array<f32>,
    weight_base: usize,
    count: u32,
    need: f32,
    scratch: &mut SharedMemory<f32>,
) -> u32 {
    let units = comptime!(UNITS as u32);
    let mut chosen = 0u32.runtime();
    let mut partial = Array::<f32>::new(DIGITS);
    for round in 0..8u32 {
        let shift = 28 - 4 * round;
        #[unroll]
        for digit in 0..DIGITS {
            partial[digit] = 0.0;
        }
        let mut item = UNIT_POS;
        while item < count {
            let key = u32::reinterpret(keys[key_base + item as usize]);
            let weight = weights[weight_base + item as usize];
            #[unroll]
            for digit in 0..DIGITS {
                let bound = chosen + (comptime!(digit as u32 + 1) << shift);
                if key >= bound {
                    partial[digit] += weight;
                }
            }
            item += units;
        }
        let mut found = 0u32.runtime();
        #[unroll]
        for digit in 0..DIGITS {
            let sum = cube_sum(partial[digit], scratch);
            if sum >= need {
                found = comptime!(digit as u32 + 1);
            }
        }
        chosen += found << shift;
    }
    chosen
}
