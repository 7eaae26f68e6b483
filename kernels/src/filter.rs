//! Stage 2, filtering (arXiv 2406.15486, section 4.3): from column scores to the plan, on the
//! device. One cube works on one head.

use cubecl::{prelude::*, server::Handle};

use crate::{
    Plan, Rule,
    call::Call,
    select::{UNITS, cube_prefix, cube_sum, select_key},
    tensor::{array, grid},
    walk::{Sizes, table_row},
};

/// Numbers of the filter that the host knows.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct FilterNumbers {
    /// Bands `0..=window` are always kept.
    pub window: u32,
    /// Sampled mass to keep: `alpha * samples`.
    pub wanted: f32,
    /// Sampled mass that may be lost: `(1 - alpha) * samples`.
    pub slack: f32,
    /// Share of the causal pairs above which a head becomes dense; above 1 to switch it off.
    pub dense_cost: f32,
}

/// The window rules: bands `0..=window`, and the fewest columns whose scores reach the need.
pub(crate) fn window_filter<R: Runtime>(call: &Call<'_, R>, plan: &Plan, scores: &Handle) {
    // SAFETY: all indices stay below `heads` rows of the plan's and the scores' lengths.
    unsafe {
        window_filter_kernel::launch_unchecked::<R>(
            call.client,
            grid(plan.heads),
            CubeDim::new_1d(UNITS as u32),
            array(scores, plan.heads * plan.columns),
            PlanOutputLaunch::from_plan(plan),
            plan.heads as u32,
            call.sizes(),
            call.filter_numbers(),
            call.options.rule == Rule::Total,
            call.block(),
        );
    }
}

/// The plan's buffers, to be written.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct PlanOutput {
    pub table: Array<u32>,
    pub stripes: Array<i32>,
    pub density: Array<f32>,
}

impl<R: Runtime> PlanOutputLaunch<R> {
    pub fn from_plan(plan: &Plan) -> Self {
        Self::new(
            array(&plan.table, plan.table_len()),
            array(&plan.stripes, plan.heads * plan.columns),
            array(&plan.density, plan.heads),
        )
    }
}

#[cube(launch_unchecked)]
fn window_filter_kernel(
    scores: &Array<f32>,
    plan: &mut PlanOutput,
    heads: u32,
    sizes: Sizes,
    numbers: FilterNumbers,
    #[comptime] total: bool,
    #[comptime] block: u32,
) {
    let head = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if head >= heads {
        terminate!();
    }
    let units = comptime!(UNITS as u32);
    let base = head as usize * sizes.columns as usize;
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    let mut counts = SharedMemory::<u32>::new(UNITS);

    let mut part = 0.0f32;
    let mut column = UNIT_POS;
    while column < sizes.columns {
        part += scores[base + column as usize];
        column += units;
    }
    let mass = cube_sum(part, &mut scratch);
    let mut need = numbers.wanted;
    if comptime!(!total) {
        // The window holds `samples - mass`.
        need = mass - numbers.slack;
    }

    let row = table_row(&sizes, head);
    let mut d = UNIT_POS;
    while d < sizes.blocks {
        plan.table[(row + 2 + d) as usize] = d.min(numbers.window) + 1;
        plan.table[(row + 2 + sizes.blocks + d) as usize] = d;
        d += units;
    }

    let mut chosen = choose(scores, base, scores, base, sizes.columns, need, &mut scratch);
    if need <= 0.0 {
        chosen.key = NONE;
    }
    write_plan(
        scores,
        base,
        plan,
        head,
        &sizes,
        &numbers,
        chosen,
        is_broken(mass),
        &mut scratch,
        &mut counts,
        block,
    );
}

/// Above the bits of every finite key and of infinity: keeps no column.
pub(crate) const NONE: u32 = 0x7f80_0001;

/// The columns to keep: keys above `key`, and the first `ties` of those equal to it.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Chosen {
    pub key: u32,
    pub ties: u32,
}

/// Whether a value is infinite or not a number. By its bits: compilers may assume that there are
/// no such values.
#[cube]
pub(crate) fn is_broken(value: f32) -> bool {
    (u32::reinterpret(value) & 0x7f80_0000) == 0x7f80_0000
}

/// The fewest columns, by descending key, whose weights reach `need`, ties to the lower index.
#[cube]
pub(crate) fn choose(
    keys: &Array<f32>,
    key_base: usize,
    weights: &Array<f32>,
    weight_base: usize,
    count: u32,
    need: f32,
    scratch: &mut SharedMemory<f32>,
) -> Chosen {
    let key = select_key(keys, key_base, weights, weight_base, count, need, scratch);
    let mut above = 0.0f32;
    let mut tied = 0.0f32;
    let mut tied_count = 0.0f32;
    let mut item = UNIT_POS;
    while item < count {
        let bits = u32::reinterpret(keys[key_base + item as usize]);
        let weight = weights[weight_base + item as usize];
        if bits > key {
            above += weight;
        } else if bits == key {
            tied += weight;
            tied_count += 1.0;
        }
        item += comptime!(UNITS as u32);
    }
    above = cube_sum(above, scratch);
    tied = cube_sum(tied, scratch);
    tied_count = cube_sum(tied_count, scratch);
    // Columns of key 0 hold nothing; they are never worth keeping.
    let mut ties = 0u32.runtime();
    if key != 0 {
        let each = tied / tied_count;
        ties = u32::cast_from(((need - above) / each).ceil().max(1.0).min(tied_count));
    }
    Chosen { key, ties }
}

/// Whether the column with these bits is kept, given how many equal ones stand before it.
#[cube]
fn is_kept(bits: u32, chosen: &Chosen, ties_before: u32) -> bool {
    bits > chosen.key || (bits == chosen.key && ties_before < chosen.ties)
}

/// Writes the stripes in ascending order, the head's density, and the dense flag, given the bands
/// and their ranks in the table.
#[cube]
pub(crate) fn write_plan(
    keys: &Array<f32>,
    key_base: usize,
    plan: &mut PlanOutput,
    head: u32,
    sizes: &Sizes,
    numbers: &FilterNumbers,
    chosen: Chosen,
    broken: bool,
    scratch: &mut SharedMemory<f32>,
    counts: &mut SharedMemory<u32>,
    #[comptime] block: u32,
) {
    let units = comptime!(UNITS as u32);
    let row = table_row(sizes, head);
    let rank_base = row + 2;
    let stripe_base = head as usize * sizes.columns as usize;
    let first_position = sizes.kv_len - sizes.q_len;
    // Ranks were written by other units of this cube.
    sync_storage();
    sync_cube();

    // Every unit owns a run of columns, so that the order survives.
    let run = sizes.columns.div_ceil(units);
    let begin = (UNIT_POS * run).min(sizes.columns);
    let end = (begin + run).min(sizes.columns);
    let mut tied = 0u32.runtime();
    for column in begin..end {
        if u32::reinterpret(keys[key_base + column as usize]) == chosen.key {
            tied += 1;
        }
    }
    let ties_before = cube_prefix(tied, counts);
    let mut kept = 0u32.runtime();
    let mut ties = ties_before;
    for column in begin..end {
        let bits = u32::reinterpret(keys[key_base + column as usize]);
        if is_kept(bits, &chosen, ties) {
            kept += 1;
        }
        if bits == chosen.key {
            ties += 1;
        }
    }
    let mut slot = cube_prefix(kept, counts);
    sync_cube();
    let total = counts[comptime!(UNITS - 1)];

    // Kept pairs of the rows above the tail.
    let mut pairs = 0.0f32;
    ties = ties_before;
    for column in begin..end {
        let bits = u32::reinterpret(keys[key_base + column as usize]);
        if is_kept(bits, &chosen, ties) {
            plan.stripes[stripe_base + slot as usize] = i32::cast_from(column);
            slot += 1;
            pairs += f32::cast_from(stripe_rows(
                &plan.table,
                rank_base,
                column,
                first_position,
                sizes.tail_start,
                block,
            ));
        }
        if bits == chosen.key {
            ties += 1;
        }
    }
    let mut d = UNIT_POS;
    while d < sizes.blocks {
        if has_band(&plan.table, rank_base, d) {
            pairs += band_pairs(d, first_position, sizes.tail_start, block);
        }
        d += units;
    }
    let kept_pairs = cube_sum(pairs, scratch);
    let all = row_pairs(sizes.kv_len) - row_pairs(first_position);
    let tail = row_pairs(sizes.kv_len) - row_pairs(max(sizes.tail_start, first_position));
    let density = (kept_pairs + tail) / all;
    let dense = broken || density > numbers.dense_cost;

    let mut padding = total;
    if dense {
        padding = 0;
        sync_cube();
        let mut d = UNIT_POS;
        while d < sizes.blocks {
            plan.table[(rank_base + d) as usize] = d + 1;
            plan.table[(rank_base + sizes.blocks + d) as usize] = d;
            d += units;
        }
    }
    sync_cube();
    let mut entry = padding + UNIT_POS;
    while entry < sizes.columns {
        plan.stripes[stripe_base + entry as usize] = -1;
        entry += units;
    }
    if UNIT_POS == 0 {
        plan.table[row as usize] = u32::cast_from(dense);
        plan.table[(row + 1) as usize] = padding;
        plan.density[head as usize] = select(dense, 1.0, density);
    }
}

/// Whether band `d` is kept.
#[cube]
fn has_band(table: &Array<u32>, rank_base: u32, d: u32) -> bool {
    let mut kept = true.runtime();
    if d > 0 {
        let at = (rank_base + d) as usize;
        kept = table[at] != table[at - 1];
    }
    kept
}

/// Causal pairs of the rows at positions `0..length`.
#[cube]
fn row_pairs(length: u32) -> f32 {
    let length = f32::cast_from(length);
    length * (length + 1.0) * 0.5
}

/// Pairs of a band with the rows from `first` to the tail, a block border above `first`.
#[cube]
fn band_pairs(d: u32, first: u32, tail: u32, #[comptime] block: u32) -> f32 {
    let mut pairs = f32::cast_from(tail - min(tail, max(first, d * block))) * block as f32;
    if d == 0 {
        let triangle = comptime!((block * (block + 1) / 2) as f32);
        let inside = first % block;
        pairs = f32::cast_from(tail / block - first / block) * triangle - row_pairs(inside);
    }
    pairs
}

/// Rows from `first` to the tail that see a column through its stripe alone: at or below it, and
/// in no kept band.
#[cube]
fn stripe_rows(
    table: &Array<u32>,
    rank_base: u32,
    column: u32,
    first: u32,
    tail: u32,
    #[comptime] block: u32,
) -> u32 {
    let key_block = column / block;
    let mut rows = tail - max(column, first);
    // Its own block is band 0.
    let own_end = (key_block + 1) * block;
    if own_end > first {
        rows -= own_end - max(column, first);
    }
    // A first block that the rows enter in the middle.
    let first_block = first / block;
    let mut full = max(first_block, key_block + 1);
    if first_block > key_block && first % block != 0 {
        let d = first_block - key_block;
        if has_band(table, rank_base, d) {
            rows -= (first_block + 1) * block - first;
        }
        full = first_block + 1;
    }
    // Whole blocks, the last one before the tail.
    let last = tail / block - 1;
    if full <= last {
        let kept = table[(rank_base + last - key_block) as usize]
            - table[(rank_base + full - key_block - 1) as usize];
        rows -= kept * block;
    }
    rows
}
