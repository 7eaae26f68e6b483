//! Rule `contribution`: every band and stripe whose entries contribute more to the output than a threshold.
//!
//! What an output loses with an entry is its probability times its value, less what the other values make up for:
//! about the value's distance from the mean value. The distances of all keys come first, over their mean over the
//! sequence's key/value heads. Pass 1 is followed by a sum of the sampled mass per band, each entry times its value's
//! distance; bands whose mean exceeds the threshold are kept, pass 2 sums columns over the other bands, and each
//! column is judged by itself. Nothing is searched or sorted.

use cubecl::{prelude::*, server::Handle};

use crate::{
    Plan,
    band_mass::band_masses,
    call::Call,
    filter::{Chosen, FilterNumbers, PlanOutput, PlanOutputLaunch, is_broken, write_plan},
    ladder::{rows_seeing, write_bands},
    sample::{Levels, Sampled},
    select::{UNITS, cube_sum},
    square_tile::head_base,
    tensor::{array, grid},
    walk::Sizes,
};

/// Parts of a head's keys that are summed apart.
const PARTS: usize = 64;

/// What the rule knows before pass 2.
pub(crate) struct Contribution {
    /// Level 0: the bands that are not kept.
    pub levels: Levels,
    /// `f32 [batch x kv_heads, kv_len]`: distance of each value from its head's mean value.
    distances: Handle,
    /// `f32 [batch x kv_heads, PARTS]`: sums of the distances.
    sums: Handle,
}

/// Measures the values and chooses the bands, which are written into the plan.
pub(crate) fn contribution_bands<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    plan: &Plan,
) -> Contribution {
    let (distances, sums) = value_distances(call);
    let bands = band_masses(call, sampled, Some(&distances));
    let (heads, blocks) = (plan.heads, plan.blocks);
    let levels = Levels { table: call.words(heads * blocks), len: heads * blocks, count: 1 };
    // SAFETY: distances between blocks below `blocks`, sums of the batch's key/value heads.
    unsafe {
        band_kernel::launch_unchecked::<R>(
            call.client,
            grid(heads),
            CubeDim::new_1d(UNITS as u32),
            bands.masses_arg(heads, blocks),
            array(&bands.entries, blocks),
            array(&sums, kv_heads(call) * PARTS),
            array(&levels.table, levels.len),
            PlanOutputLaunch::from_plan(plan),
            heads as u32,
            bands.row_tiles as u32,
            call.sizes(),
            call.filter_numbers(),
            threshold(call),
        );
    }
    Contribution { levels, distances, sums }
}

/// Judges the columns and writes the plan. Overwrites `scores`.
pub(crate) fn contribution_filter<R: Runtime>(
    call: &Call<'_, R>,
    plan: &Plan,
    scores: &Handle,
    sampled: &Sampled,
    known: &Contribution,
) {
    let kv_heads = kv_heads(call);
    // SAFETY: all indices stay below the lengths that the buffers were allocated with.
    unsafe {
        filter_kernel::launch_unchecked::<R>(
            call.client,
            grid(plan.heads),
            CubeDim::new_1d(UNITS as u32),
            array(scores, plan.heads * plan.columns),
            array(&sampled.rows, call.samples()),
            array(&known.distances, kv_heads * call.shape.kv_len),
            array(&known.sums, kv_heads * PARTS),
            PlanOutputLaunch::from_plan(plan),
            plan.heads as u32,
            call.sizes(),
            call.filter_numbers(),
            threshold(call),
            call.block(),
        );
    }
}

/// Key/value heads over all sequences.
fn kv_heads<R: Runtime>(call: &Call<'_, R>) -> usize {
    call.shape.batch * call.shape.kv_heads
}

/// Least contribution of an entry that is kept.
fn threshold<R: Runtime>(call: &Call<'_, R>) -> f32 {
    (call.options.threshold / call.shape.kv_len as f64) as f32
}

/// Distance of each value from its head's mean value, and their sums by part.
fn value_distances<R: Runtime>(call: &Call<'_, R>) -> (Handle, Handle) {
    let (shape, heads) = (&call.shape, kv_heads(call));
    let means = call.words(heads * PARTS * shape.head_dim);
    let (distances, sums) = (call.words(heads * shape.kv_len), call.words(heads * PARTS));
    let (address, width) = (call.inputs.address_type(), call.inputs.vector_width(4));
    // SAFETY: keys below kv_len, one cube for each part of each head.
    unsafe {
        value_sum_kernel::launch_unchecked::<R>(
            call.client,
            grid(heads * PARTS),
            CubeDim::new_1d(UNITS as u32),
            address,
            width,
            call.inputs.v.arg(),
            array(&means, heads * PARTS * shape.head_dim),
            heads as u32,
            shape.head_dim,
            call.inputs.v.dtype,
        );
        distance_kernel::launch_unchecked::<R>(
            call.client,
            grid(heads * PARTS),
            CubeDim::new_1d(UNITS as u32),
            address,
            width,
            call.inputs.v.arg(),
            array(&means, heads * PARTS * shape.head_dim),
            array(&distances, heads * shape.kv_len),
            array(&sums, heads * PARTS),
            heads as u32,
            shape.head_dim,
            call.inputs.v.dtype,
        );
    }
    (distances, sums)
}

/// Sums the values of a part of a head's keys: `f32 [heads, PARTS, head_dim]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn value_sum_kernel<E: Float, N: Size>(
    v: &Tensor<Vector<E, N>>,
    sums: &mut Array<f32>,
    heads: u32,
    #[comptime] head_dim: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * comptime!(PARTS as u32) {
        terminate!();
    }
    let width = N::value();
    let cols = comptime!((head_dim / width) as u32);
    let lanes = comptime!(UNITS as u32 / cols);
    let (base, first, end) = part_of::<E, N>(v, item);
    let row_stride = v.stride(2) / width;
    let col = UNIT_POS % cols;
    let lane = UNIT_POS / cols;

    let mut partial = SharedMemory::<Vector<f32, N>>::new(UNITS);
    let mut sum = Vector::<f32, N>::new(0.0);
    if lane < lanes {
        let mut key = first + lane;
        while key < end {
            sum += Vector::cast_from(v[base + key as usize * row_stride + col as usize]);
            key += lanes;
        }
    }
    partial[UNIT_POS as usize] = sum;
    sync_cube();
    if UNIT_POS < cols {
        let mut total = Vector::<f32, N>::new(0.0);
        for lane in 0..lanes {
            total += partial[(lane * cols + UNIT_POS) as usize];
        }
        #[unroll]
        for e in 0..width {
            sums[item as usize * head_dim + UNIT_POS as usize * width + e] = total[e];
        }
    }
}

/// Distances of the values of a part of a head's keys from the head's mean, and their sum.
#[cube(launch_unchecked, address_type = "dynamic")]
fn distance_kernel<E: Float, N: Size>(
    v: &Tensor<Vector<E, N>>,
    value_sums: &Array<f32>,
    distances: &mut Array<f32>,
    sums: &mut Array<f32>,
    heads: u32,
    #[comptime] head_dim: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * comptime!(PARTS as u32) {
        terminate!();
    }
    let width = N::value();
    let cols = comptime!((head_dim / width) as u32);
    let parts = comptime!(PARTS as u32);
    let (base, first, end) = part_of::<E, N>(v, item);
    let row_stride = v.stride(2) / width;
    let head = item / parts;
    let keys = v.shape(2);

    let mut mean = SharedMemory::<Vector<f32, N>>::new(comptime!(head_dim / width));
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    if UNIT_POS < cols {
        let mut total = Vector::<f32, N>::new(0.0);
        for part in 0..parts {
            let at = (head * parts + part) as usize * head_dim + UNIT_POS as usize * width;
            #[unroll]
            for e in 0..width {
                total[e] = total[e] + value_sums[at + e];
            }
        }
        mean[UNIT_POS as usize] = total / Vector::new(f32::cast_from(keys));
    }
    sync_cube();

    let mut sum = 0.0f32;
    let mut key = first + UNIT_POS;
    while key < end {
        let row = base + key as usize * row_stride;
        let mut squares = Vector::<f32, N>::new(0.0);
        for col in 0..cols {
            let gap = Vector::<f32, N>::cast_from(v[row + col as usize]) - mean[col as usize];
            squares += gap * gap;
        }
        let mut square = 0.0f32;
        #[unroll]
        for e in 0..width {
            square += squares[e];
        }
        let distance = square.sqrt();
        distances[head as usize * keys + key as usize] = distance;
        sum += distance;
        key += comptime!(UNITS as u32);
    }
    sum = cube_sum(sum, &mut scratch);
    if UNIT_POS == 0 {
        sums[item as usize] = sum;
    }
}

/// Where a part's head begins, and the first of its keys and the one after its last.
#[cube]
fn part_of<E: Float, N: Size>(v: &Tensor<Vector<E, N>>, item: u32) -> (usize, u32, u32) {
    let parts = comptime!(PARTS as u32);
    let (head, part) = (item / parts, item % parts);
    let heads = v.shape(1) as u32;
    let keys = v.shape(2) as u32;
    let run = keys.div_ceil(parts);
    let first = min(part * run, keys);
    (head_base::<E, N>(v, head / heads, head % heads), first, min(first + run, keys))
}

/// Least contribution that is kept, in distances: `threshold` times their mean over all keys and key/value heads of the
/// query head's sequence.
#[cube]
fn least_kept(
    sums: &Array<f32>,
    threshold: f32,
    head: u32,
    sizes: &Sizes,
    scratch: &mut SharedMemory<f32>,
) -> f32 {
    let parts = comptime!(PARTS as u32);
    let kv_heads = sizes.q_heads / sizes.group;
    let first = head / sizes.q_heads * kv_heads * parts;
    let mut sum = 0.0f32;
    let mut at = UNIT_POS;
    while at < kv_heads * parts {
        sum += sums[(first + at) as usize];
        at += comptime!(UNITS as u32);
    }
    threshold * cube_sum(sum, scratch) / (f32::cast_from(kv_heads) * f32::cast_from(sizes.kv_len))
}

/// Chooses a head's bands.
#[cube(launch_unchecked)]
fn band_kernel(
    masses: &Array<f32>,
    entries: &Array<f32>,
    sums: &Array<f32>,
    levels: &mut Array<u32>,
    plan: &mut PlanOutput,
    heads: u32,
    row_tiles: u32,
    sizes: Sizes,
    numbers: FilterNumbers,
    threshold: f32,
) {
    let head = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if head >= heads {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    let mut counts = SharedMemory::<u32>::new(UNITS);
    let least = least_kept(sums, threshold, head, &sizes, &mut scratch);
    let mut d = UNIT_POS;
    while d < sizes.blocks {
        let mut mass = 0.0f32;
        for row_tile in 0..row_tiles {
            mass += masses[((head * row_tiles + row_tile) * sizes.blocks + d) as usize];
        }
        let kept = d <= numbers.window || mass > least * max(entries[d as usize], 1.0);
        levels[(head * sizes.blocks + d) as usize] = u32::cast_from(kept);
        d += comptime!(UNITS as u32);
    }
    sync_storage();
    sync_cube();
    write_bands(plan, levels, head, &sizes, 0, &mut counts, 1usize);
}

/// Judges a head's columns and writes its plan.
#[cube(launch_unchecked)]
fn filter_kernel(
    scores: &mut Array<f32>,
    rows: &Array<u32>,
    distances: &Array<f32>,
    sums: &Array<f32>,
    plan: &mut PlanOutput,
    heads: u32,
    sizes: Sizes,
    numbers: FilterNumbers,
    threshold: f32,
    #[comptime] block: u32,
) {
    let head = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if head >= heads {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    let mut counts = SharedMemory::<u32>::new(UNITS);
    let least = least_kept(sums, threshold, head, &sizes, &mut scratch);
    let base = head as usize * sizes.columns as usize;
    let kv_head = head / sizes.q_heads * (sizes.q_heads / sizes.group) + head % sizes.q_heads / sizes.group;
    let distance_base = kv_head as usize * sizes.kv_len as usize;
    let position = sizes.kv_len - sizes.q_len;
    let mut mass = 0.0f32;
    let mut column = UNIT_POS;
    while column < sizes.columns {
        let score = scores[base + column as usize];
        let seeing = max(rows_seeing(rows, column, position), 1.0);
        mass += score;
        scores[base + column as usize] = score / seeing * distances[distance_base + column as usize];
        column += comptime!(UNITS as u32);
    }
    let mass = cube_sum(mass, &mut scratch);
    write_plan(
        scores,
        base,
        plan,
        head,
        &sizes,
        &numbers,
        Chosen { key: u32::reinterpret(least), ties: 0u32.runtime() },
        is_broken(mass) || is_broken(least),
        &mut scratch,
        &mut counts,
        block,
    );
}
