//! Rule `joint`: bands and stripes at one threshold of sampled mass per kept entry.
//!
//! The threshold is searched on a ladder of nested band sets. Pass 1 is followed by a sum of the
//! sampled mass per band; the bands outside the forced window are then cut, by descending mass per
//! entry, into groups that each add the same share to the cost so far, and pass 2 keeps a column's mass apart by group. The last
//! group holds the bands that are never needed: those before them reach alpha without any stripe.
//! A column's residual outside the first groups is a sum over the other ones, so every rung of the
//! ladder can be judged without touching the tensors again. The threshold lies between two rungs: on
//! the cheaper of them the stripes are the fewest that reach alpha, by descending mass per entry.

use cubecl::{prelude::*, server::Handle};

use crate::{
    Plan, Rule,
    band_mass::band_masses,
    call::Call,
    filter::{Chosen, FilterNumbers, NONE, PlanOutput, PlanOutputLaunch, choose, is_broken, write_plan},
    sample::{Levels, Sampled},
    select::{UNITS, cube_prefix, cube_sum},
    tensor::{array, grid},
    walk::{Sizes, table_row},
};

/// Groups that the bands are cut into.
const GROUPS: usize = 16;

/// Levels that the column scores of a rule are kept apart by.
pub(crate) fn levels(rule: Rule) -> usize {
    match rule {
        Rule::Total | Rule::Residual | Rule::Contribution => 1,
        Rule::Joint => GROUPS,
    }
}

/// The ladder of every head.
pub(crate) struct Ladder {
    /// A distance's group is its level; the forced window has level [`GROUPS`].
    pub levels: Levels,
    /// `f32 [heads, 2, GROUPS]`: the largest mass per entry of a band in this group or a later one;
    /// the share of the sampled entries in the forced window and the groups before this one.
    rungs: Handle,
}

/// Sums the sampled mass per band and cuts the bands into groups.
pub(crate) fn ladder<R: Runtime>(call: &Call<'_, R>, sampled: &Sampled, plan: &Plan) -> Ladder {
    let (heads, blocks) = (plan.heads, plan.blocks);
    let bands = band_masses(call, sampled, None);
    let ladder = Ladder {
        levels: Levels { table: call.words(heads * blocks), len: heads * blocks, count: GROUPS },
        rungs: call.words(2 * heads * GROUPS),
    };
    // SAFETY: distances below `blocks`, groups below `GROUPS`.
    unsafe {
        ladder_kernel::launch_unchecked::<R>(
            call.client,
            grid(heads),
            CubeDim::new_1d(UNITS as u32),
            bands.masses_arg(heads, blocks),
            array(&bands.entries, blocks),
            array(&call.words(heads * blocks), heads * blocks),
            array(&ladder.levels.table, heads * blocks),
            array(&ladder.rungs, 2 * heads * GROUPS),
            heads as u32,
            bands.row_tiles as u32,
            call.sizes(),
            call.filter_numbers(),
            GROUPS,
        );
    }
    ladder
}

/// Chooses the rung and the stripes, and writes the plan. Overwrites `scores`.
pub(crate) fn joint_filter<R: Runtime>(
    call: &Call<'_, R>,
    plan: &Plan,
    scores: &Handle,
    sampled: &Sampled,
    ladder: &Ladder,
) {
    // SAFETY: all indices stay below the lengths that the buffers were allocated with.
    unsafe {
        joint_filter_kernel::launch_unchecked::<R>(
            call.client,
            grid(plan.heads),
            CubeDim::new_1d(UNITS as u32),
            array(scores, plan.heads * GROUPS * plan.columns),
            array(&sampled.rows, call.samples()),
            array(&ladder.levels.table, ladder.levels.len),
            array(&ladder.rungs, 2 * plan.heads * GROUPS),
            PlanOutputLaunch::from_plan(plan),
            plan.heads as u32,
            call.sizes(),
            call.filter_numbers(),
            GROUPS,
            call.block(),
        );
    }
}

/// Cuts a head's bands into groups. `density` is scratch, `f32 [heads, blocks]`.
#[cube(launch_unchecked)]
fn ladder_kernel(
    masses: &Array<f32>,
    entries: &Array<f32>,
    density: &mut Array<f32>,
    group: &mut Array<u32>,
    rungs: &mut Array<f32>,
    heads: u32,
    row_tiles: u32,
    sizes: Sizes,
    numbers: FilterNumbers,
    #[comptime] groups: usize,
) {
    let head = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if head >= heads {
        terminate!();
    }
    let units = comptime!(UNITS as u32);
    let last_group = comptime!(groups as u32 - 1);
    let base = (head * sizes.blocks) as usize;
    let mut scratch = SharedMemory::<f32>::new(UNITS);

    let mut forced = 0.0f32;
    let mut forced_cost = 0.0f32;
    let mut d = UNIT_POS;
    while d < sizes.blocks {
        let mut mass = 0.0f32;
        for row_tile in 0..row_tiles {
            mass += masses[((head * row_tiles + row_tile) * sizes.blocks + d) as usize];
        }
        if d <= numbers.window {
            forced += mass;
            forced_cost += entries[d as usize];
        }
        density[base + d as usize] = mass / max(entries[d as usize], 1.0);
        d += units;
    }
    forced = cube_sum(forced, &mut scratch);
    forced_cost = cube_sum(forced_cost, &mut scratch);
    sync_storage();

    // The order of a band among the optional ones, by counting those before it.
    let mut needed_cost = 0.0f32;
    let mut needed_count = 0.0f32;
    d = UNIT_POS;
    while d < sizes.blocks {
        if d > numbers.window {
            let before = bands_before(density, entries, base, d, &sizes, &numbers);
            if forced + before.mass < numbers.wanted {
                needed_cost += entries[d as usize];
                needed_count += 1.0;
            }
        }
        d += units;
    }
    needed_cost = cube_sum(needed_cost, &mut scratch);
    needed_count = cube_sum(needed_count, &mut scratch);

    d = UNIT_POS;
    while d < sizes.blocks {
        let mut own = comptime!(groups as u32).runtime();
        if d > numbers.window {
            own = last_group;
            let before = bands_before(density, entries, base, d, &sizes, &numbers);
            if forced + before.mass < numbers.wanted {
                let steps = comptime!((groups - 1) as f32);
                let growth = ((forced_cost + needed_cost) / forced_cost).ln();
                let mut share = ((forced_cost + before.cost) / forced_cost).ln() / growth * steps;
                if needed_count <= comptime!((groups - 1) as f32) {
                    share = before.count;
                }
                own = min(u32::cast_from(share), last_group - 1);
            }
        }
        group[base + d as usize] = own;
        d += units;
    }
    sync_storage();
    sync_cube();
    if UNIT_POS <= last_group {
        let mut largest = 0.0f32;
        let mut kept = 0.0f32;
        let mut all = 0.0f32;
        for d in 0..sizes.blocks {
            let own = group[base + d as usize];
            let cost = entries[d as usize];
            all += cost;
            if is_kept_band(own, UNIT_POS, groups) {
                kept += cost;
            } else {
                largest = max(largest, density[base + d as usize]);
            }
        }
        let at = (2 * head * comptime!(groups as u32) + UNIT_POS) as usize;
        rungs[at] = largest;
        rungs[at + groups] = kept / all;
    }
}

/// The optional bands that stand before one in descending order of mass per entry.
#[derive(CubeType, Clone, Copy)]
struct BandsBefore {
    count: f32,
    cost: f32,
    mass: f32,
}

#[cube]
fn bands_before(
    density: &Array<f32>,
    entries: &Array<f32>,
    base: usize,
    band: u32,
    sizes: &Sizes,
    numbers: &FilterNumbers,
) -> BandsBefore {
    let own = density[base + band as usize];
    let mut before = BandsBefore { count: 0.0f32.runtime(), cost: 0.0f32.runtime(), mass: 0.0f32.runtime() };
    for d in numbers.window + 1..sizes.blocks {
        let other = density[base + d as usize];
        if other > own || (other == own && d < band) {
            let cost = entries[d as usize];
            before.count += 1.0;
            before.cost += cost;
            before.mass += other * cost;
        }
    }
    before
}

/// Sampled rows at or below a column: the rows see columns up to their position.
#[cube]
pub(crate) fn rows_seeing(rows: &Array<u32>, column: u32, position: u32) -> f32 {
    let samples = rows.len() as u32;
    let mut low = 0u32.runtime();
    let mut high = samples;
    while low < high {
        let middle = (low + high) / 2;
        if position + rows[middle as usize] < column {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    f32::cast_from(samples - low)
}

#[cube(launch_unchecked)]
fn joint_filter_kernel(
    scores: &mut Array<f32>,
    rows: &Array<u32>,
    group: &Array<u32>,
    rungs: &Array<f32>,
    plan: &mut PlanOutput,
    heads: u32,
    sizes: Sizes,
    numbers: FilterNumbers,
    #[comptime] groups: usize,
    #[comptime] block: u32,
) {
    let head = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if head >= heads {
        terminate!();
    }
    let units = comptime!(UNITS as u32);
    let columns = sizes.columns as usize;
    let base = head as usize * comptime!(groups) * columns;
    let position = sizes.kv_len - sizes.q_len;
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    let mut counts = SharedMemory::<u32>::new(UNITS);

    // From masses per group to residuals per rung: what lies in this group or a later one. On the
    // way, what each rung holds outside its bands, and what its stripes would hold at its lowest
    // threshold.
    let rung_base = 2 * head as usize * groups;
    let mut entries = 0.0f32;
    let mut outside = Array::<f32>::new(groups);
    let mut stripes = Array::<f32>::new(groups);
    #[unroll]
    for rung in 0..groups {
        outside[rung] = 0.0;
        stripes[rung] = 0.0;
    }
    let mut column = UNIT_POS;
    while column < sizes.columns {
        let seeing = max(rows_seeing(rows, column, position), 1.0);
        entries += seeing;
        let mut residual = 0.0f32;
        #[unroll]
        for step in 0..groups {
            let rung = comptime!(groups - 1 - step);
            let at = base + rung * columns + column as usize;
            residual += scores[at];
            scores[at] = residual;
            outside[rung] += residual;
            if residual > rungs[rung_base + rung] * seeing {
                stripes[rung] += residual;
            }
        }
        column += units;
    }

    // The first rung that reaches alpha; the last one does without stripes. The threshold lies
    // between this rung and the one before.
    entries = cube_sum(entries, &mut scratch);
    let mut chosen_rung = comptime!(groups as u32 - 1).runtime();
    let mut need = 0.0f32;
    let mut need_before = 0.0f32;
    let mut broken = false.runtime();
    #[unroll]
    for step in 0..groups {
        let rung = comptime!(groups - 1 - step);
        let rung_outside = cube_sum(outside[rung], &mut scratch);
        let rung_stripes = cube_sum(stripes[rung], &mut scratch);
        let rung_need = rung_outside - numbers.slack;
        broken = broken || is_broken(rung_outside);
        if rung_stripes >= rung_need {
            chosen_rung = comptime!(rung as u32);
            need = rung_need;
        } else if chosen_rung == comptime!(rung as u32 + 1) {
            need_before = rung_need;
        }
    }

    // Where prices go: a rung that is no longer needed.
    let mut key_base = base;
    if chosen_rung <= 1 {
        key_base = base + 2 * columns;
    }
    let mut weight_base = base + chosen_rung as usize * columns;
    set_prices(scores, key_base, weight_base, rows, &sizes, position);
    let mut chosen = choose_stripes(scores, key_base, weight_base, need, &sizes, &mut scratch);
    if chosen_rung > 0 {
        // With more stripes, the rung before reaches alpha as well. It may be the cheaper one.
        let share = rungs[rung_base + groups + chosen_rung as usize];
        let share_before = rungs[rung_base + groups + chosen_rung as usize - 1];
        let cost =
            cube_sum(stripe_entries(scores, key_base, rows, chosen.key, &sizes, position), &mut scratch);
        let before = weight_base - columns;
        set_prices(scores, key_base, before, rows, &sizes, position);
        let other = choose_stripes(scores, key_base, before, need_before, &sizes, &mut scratch);
        let other_cost =
            cube_sum(stripe_entries(scores, key_base, rows, other.key, &sizes, position), &mut scratch);
        // Of a stripe's entries, only those outside the bands cost anything.
        if share_before * entries + (1.0 - share_before) * other_cost < share * entries + (1.0 - share) * cost
        {
            chosen_rung -= 1;
            weight_base = before;
            chosen.key = other.key;
            chosen.ties = other.ties;
        }
        set_prices(scores, key_base, weight_base, rows, &sizes, position);
    }

    write_bands(plan, group, head, &sizes, chosen_rung, &mut counts, groups);

    write_plan(
        scores,
        key_base,
        plan,
        head,
        &sizes,
        &numbers,
        chosen,
        broken,
        &mut scratch,
        &mut counts,
        block,
    );
}

/// Writes the ranks and the list of the bands that a rung keeps; each unit owns a run of distances.
#[cube]
pub(crate) fn write_bands(
    plan: &mut PlanOutput,
    group: &Array<u32>,
    head: u32,
    sizes: &Sizes,
    rung: u32,
    counts: &mut SharedMemory<u32>,
    #[comptime] groups: usize,
) {
    let row = table_row(sizes, head);
    let run = sizes.blocks.div_ceil(comptime!(UNITS as u32));
    let begin = (UNIT_POS * run).min(sizes.blocks);
    let end = (begin + run).min(sizes.blocks);
    let base = head * sizes.blocks;
    let mut kept = 0u32.runtime();
    for d in begin..end {
        if is_kept_band(group[(base + d) as usize], rung, groups) {
            kept += 1;
        }
    }
    let mut slot = cube_prefix(kept, counts);
    for d in begin..end {
        if is_kept_band(group[(base + d) as usize], rung, groups) {
            plan.table[(row + 2 + sizes.blocks + slot) as usize] = d;
            slot += 1;
        }
        plan.table[(row + 2 + d) as usize] = slot;
    }
}

/// Writes the mass per entry of each column, given their masses.
#[cube]
fn set_prices(
    scores: &mut Array<f32>,
    key_base: usize,
    weight_base: usize,
    rows: &Array<u32>,
    sizes: &Sizes,
    position: u32,
) {
    // Others may still read the prices that stood there.
    sync_cube();
    let mut column = UNIT_POS;
    while column < sizes.columns {
        let seeing = max(rows_seeing(rows, column, position), 1.0);
        scores[key_base + column as usize] = scores[weight_base + column as usize] / seeing;
        column += comptime!(UNITS as u32);
    }
    sync_storage();
    sync_cube();
}

/// The fewest columns that reach `need`, by descending price.
#[cube]
fn choose_stripes(
    scores: &Array<f32>,
    key_base: usize,
    weight_base: usize,
    need: f32,
    sizes: &Sizes,
    scratch: &mut SharedMemory<f32>,
) -> Chosen {
    let mut chosen = choose(scores, key_base, scores, weight_base, sizes.columns, need, scratch);
    // Columns of one price may weigh differently: keep them all.
    if chosen.key != 0 {
        chosen.ties = sizes.columns;
    }
    if need <= 0.0 {
        chosen.key = NONE;
    }
    chosen
}

/// Sampled entries of the unit's columns whose price reaches a key.
#[cube]
fn stripe_entries(
    prices: &Array<f32>,
    key_base: usize,
    rows: &Array<u32>,
    key: u32,
    sizes: &Sizes,
    position: u32,
) -> f32 {
    let mut entries = 0.0f32;
    let mut column = UNIT_POS;
    while column < sizes.columns {
        let bits = u32::reinterpret(prices[key_base + column as usize]);
        if bits >= key && bits != 0 {
            entries += rows_seeing(rows, column, position);
        }
        column += comptime!(UNITS as u32);
    }
    entries
}

/// Whether a rung keeps the bands of a group; the forced window has a group of its own.
#[cube]
fn is_kept_band(own: u32, rung: u32, #[comptime] groups: usize) -> bool {
    own < rung || own == comptime!(groups as u32)
}
