//! Sampling pass 2 over [row tiles of planes](crate::plane_tile): cubes own keys and stream the sampled rows,
//! so that a column of the scores is a row of theirs. See [`sample`](crate::sample).

use cubecl::{prelude::*, server::Handle};

use crate::{
    call::Call,
    plane_stage::{carry_rows, load_rows, new_stage, put_rows},
    plane_tile::{
        PLANE_ROWS, PlaneTile, Quad, new_scores, plane_scores, quad_at, quad_sum, shared_sum, unit_row,
    },
    sample::{Levels, Sampled},
    square_tile::{MAX_START, NO_ROW, head_base},
    tensor::{array, grid},
    walk::Sizes,
};

/// Lists of sampled rows that exist at a time: those of the tile before this one, which slower planes still
/// read, up to the third one after it, which is being written.
const LISTS: usize = 5;

/// Compile-time choices of the column kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ColumnConfig {
    tile: PlaneTile,
    block: u32,
    levels: usize,
}

impl ColumnConfig {
    /// Sums by level: one for each unit that shares a row.
    fn sums(&self) -> usize {
        match self.levels {
            1 => 1,
            levels => levels * self.tile.rows() * self.tile.sharers(),
        }
    }
}

/// Shared memory of the kernel, in bytes; the row kernel needs less.
pub(crate) fn sample_bytes(tile: &PlaneTile, levels: usize) -> usize {
    let sums = ColumnConfig { tile: *tile, block: 0, levels }.sums();
    tile.staged_bytes() + 4 * (sums + 3 * LISTS * tile.keys + tile.rows())
}

/// Pass 2, into `f32 [heads, levels, columns]`.
pub(crate) fn column_scores_plane<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    columns: usize,
    levels: &Levels,
    scores: &Handle,
    tile: PlaneTile,
) {
    let config = ColumnConfig { tile, block: call.block(), levels: levels.count };
    // SAFETY: as above; scores are written for columns below `columns` only.
    unsafe {
        plane_column_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads() * columns.div_ceil(tile.rows())),
            tile.cube_dim(),
            call.inputs.address_type(),
            call.inputs.vector_width(4),
            call.inputs.q.arg(),
            call.inputs.k.arg(),
            array(&sampled.rows, call.samples()),
            array(&sampled.lse, call.heads() * call.samples()),
            array(&levels.table, levels.len),
            array(scores, call.heads() * levels.count * columns),
            call.sizes(),
            call.scale,
            config,
            call.inputs.q.dtype,
        );
    }
}

/// What the kernel knows of sampled rows, tile by tile in [`LISTS`] places.
#[derive(CubeType)]
struct RowLists {
    rows: SharedMemory<u32>,
    /// What a row's scaled scores are raised by; rows that do not count are lowered out of sight.
    shifts: SharedMemory<Quad<f32>>,
    levels: SharedMemory<Quad<u32>>,
}

/// A unit's part of a list: four neighbours.
#[derive(CubeType)]
struct ListPart {
    rows: Quad<u32>,
    shifts: Quad<f32>,
    levels: Quad<u32>,
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn plane_column_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    rows: &Array<u32>,
    lse: &Array<f32>,
    levels: &Array<u32>,
    column_scores: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] config: ColumnConfig,
    #[define(E)] _dtype: StorageType,
) {
    let tile = comptime!(config.tile);
    let width = N::value();
    // Keys are the rows of the tile, sampled rows its columns.
    let count = comptime!(tile.rows() as u32);
    let staged = comptime!(tile.keys as u32);
    let units = comptime!(tile.units() as u32);
    let sharers = comptime!(tile.sharers() as u32);
    let score_pitch = comptime!(tile.score_pitch() as u32 / 4);
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * sizes.columns.div_ceil(count) {
        terminate!();
    }
    // The first keys are seen by the most rows: they go first.
    let first_key = item / heads * count;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let q_base = head_base::<E, N>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, N>(k, batch, head % sizes.q_heads / sizes.group);
    let position = sizes.kv_len - sizes.q_len;
    let plane = UNIT_POS / PLANE_DIM;
    let own = plane < comptime!(tile.planes as u32);
    let first_slot = plane * comptime!(PLANE_ROWS as u32);
    let part = UNIT_POS % PLANE_DIM % sharers;

    let mut k_rows = SharedMemory::<u32>::new(tile.rows());
    let mut stage = new_stage::<E, N>(tile);
    let mut scores = new_scores(tile);
    let mut by_level = SharedMemory::<f32>::new(comptime!(config.sums()));
    let mut lists = RowLists {
        rows: SharedMemory::new(comptime!(LISTS * tile.keys)),
        shifts: SharedMemory::new(comptime!(LISTS * tile.keys / 4)),
        levels: SharedMemory::new(comptime!(LISTS * tile.keys / 4)),
    };

    // The first sampled row that sees a key of the tile.
    let mut low = 0u32.runtime();
    let mut high = sizes.samples;
    while low < high {
        let middle = (low + high) / 2;
        if position + rows[middle as usize] < first_key {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let first_tile = low / staged;
    let tiles = sizes.samples.div_ceil(staged) - first_tile;

    #[unroll]
    for step in 0..comptime!(count.div_ceil(units)) {
        let slot = UNIT_POS + comptime!(step * units);
        if slot < count {
            let key = first_key + slot;
            k_rows[slot as usize] = select(key < sizes.kv_len, key, NO_ROW);
        }
    }
    #[unroll]
    for ahead in 0..3u32 {
        let part = list_part(rows, lse, levels, &sizes, head, first_key, first_tile + ahead, config);
        put_part(&part, &mut lists, ahead, config);
    }
    sync_cube();
    let key_matrices = load_rows::<E, N>(k, k_base, &k_rows, &mut stage, tile);
    let mut carried = Array::<Vector<E, N>>::new(comptime!(tile.carried(width)));
    carry_rows::<E, N>(q, q_base, &lists.rows, 0, &mut carried, tile);
    put_rows::<E, N>(&carried, &mut stage, 0, tile);
    carry_rows::<E, N>(q, q_base, &lists.rows, staged, &mut carried, tile);

    // With one level, sums stay with their units until the end. With more, the present level's do: rows
    // ascend, so that it seldom changes.
    let mut sums = Array::<Quad<f32>>::new(comptime!(tile.unit_rows()));
    let mut running = Array::<f32>::new(comptime!(tile.unit_rows()));
    let mut level = Array::<u32>::new(comptime!(tile.unit_rows()));
    #[unroll]
    for r in 0..tile.unit_rows() {
        sums[r] = Quad::new(0.0);
        running[r] = 0.0;
        level[r] = 0;
        if comptime!(config.levels > 1) {
            let slot = unit_row(r, tile);
            if own && slot < comptime!(PLANE_ROWS as u32) {
                let at = (first_slot + slot) * sharers + part;
                for number in 0..comptime!(config.levels as u32) {
                    by_level[(number * comptime!(count * sharers) + at) as usize] = 0.0;
                }
            }
        }
    }
    sync_cube();

    for index in 0..tiles {
        let next = list_part(rows, lse, levels, &sizes, head, first_key, first_tile + index + 3, config);
        if index + 1 < tiles {
            put_rows::<E, N>(&carried, &mut stage, (index + 1) % 2 * staged, tile);
            let list = (index + 2) % comptime!(LISTS as u32) * staged;
            carry_rows::<E, N>(q, q_base, &lists.rows, list, &mut carried, tile);
        }
        // The plane is done with its scores of the tile before this one.
        sync_plane();
        plane_scores::<E, N>(&key_matrices, &stage, index % 2 * staged, &mut scores, tile);
        put_part(&next, &mut lists, (index + 3) % comptime!(LISTS as u32), config);
        sync_cube();

        let list = index % comptime!(LISTS as u32) * staged;
        let reaches_edge = position + lists.rows[list as usize] < first_key + comptime!(count - 1);
        #[unroll]
        for r in 0..tile.unit_rows() {
            let slot = unit_row(r, tile);
            if own && slot < comptime!(PLANE_ROWS as u32) {
                let row = first_slot + slot;
                let at = row * sharers + part;
                #[unroll]
                for c in 0..tile.quads() {
                    let quad = quad_at(c, slot, tile);
                    let score = scores[(row * score_pitch + quad) as usize];
                    let entry = (list / 4 + quad) as usize;
                    let mut mass = fma(score, Quad::new(scale), lists.shifts[entry]).exp();
                    if reaches_edge {
                        #[unroll]
                        for e in 0..4usize {
                            let query = lists.rows[(list + quad * 4 + comptime!(e as u32)) as usize];
                            mass[e] = select(first_key + row <= position + query, mass[e], 0.0);
                        }
                    }
                    if comptime!(config.levels == 1) {
                        sums[r] += mass;
                    } else {
                        let found = lists.levels[entry];
                        #[unroll]
                        for e in 0..4usize {
                            if found[e] != level[r] {
                                by_level[(level[r] * comptime!(count * sharers) + at) as usize] += running[r];
                                running[r] = 0.0;
                                level[r] = found[e];
                            }
                            running[r] += mass[e];
                        }
                    }
                }
            }
        }
    }

    let base = (head * comptime!(config.levels as u32)) as usize * sizes.columns as usize;
    #[unroll]
    for r in 0..tile.unit_rows() {
        let slot = unit_row(r, tile);
        let row = first_slot + slot;
        let holds = own && slot < comptime!(PLANE_ROWS as u32);
        let writes = holds && part == 0 && first_key + row < sizes.columns;
        let at = base + (first_key + row) as usize;
        if comptime!(config.levels == 1) {
            let total = shared_sum(quad_sum(sums[r]), tile);
            if writes {
                column_scores[at] = total;
            }
        } else {
            let own_sum = row * sharers + part;
            for number in 0..comptime!(config.levels as u32) {
                let mut sum = 0.0f32;
                if holds {
                    sum = by_level[(number * comptime!(count * sharers) + own_sum) as usize];
                    sum += select(number == level[r], running[r], 0.0);
                }
                let total = shared_sum(sum, tile);
                if writes {
                    column_scores[at + number as usize * sizes.columns as usize] = total;
                }
            }
        }
    }
}

/// What a unit lists of a tile of sampled rows.
#[cube]
fn list_part(
    rows: &Array<u32>,
    lse: &Array<f32>,
    levels: &Array<u32>,
    sizes: &Sizes,
    head: u32,
    first_key: u32,
    row_tile: u32,
    #[comptime] config: ColumnConfig,
) -> ListPart {
    let staged = comptime!(config.tile.keys as u32);
    let last_level = comptime!(config.levels as u32 - 1);
    let position = sizes.kv_len - sizes.q_len;
    // One table for all heads, or one each.
    let levels_base = head * sizes.blocks % levels.len() as u32;
    let mut part =
        ListPart { rows: Quad::new(NO_ROW), shifts: Quad::new(MAX_START), levels: Quad::new(last_level) };
    if UNIT_POS < comptime!(staged / 4) {
        #[unroll]
        for e in 0..4usize {
            let sample = row_tile * staged + UNIT_POS * 4 + comptime!(e as u32);
            if sample < sizes.samples {
                let row = rows[sample as usize];
                part.rows[e] = row;
                if position + row >= first_key {
                    let distance = (position + row) / config.block - first_key / config.block;
                    let level = levels[(levels_base + distance) as usize];
                    if level <= last_level {
                        part.levels[e] = level;
                        part.shifts[e] = -lse[(head * sizes.samples + sample) as usize];
                    }
                }
            }
        }
    }
    part
}

/// Writes a part to a list.
#[cube]
fn put_part(part: &ListPart, lists: &mut RowLists, list: u32, #[comptime] config: ColumnConfig) {
    let quads = comptime!(config.tile.keys as u32 / 4);
    if UNIT_POS < quads {
        let at = list * quads + UNIT_POS;
        #[unroll]
        for e in 0..4usize {
            lists.rows[(at * 4) as usize + e] = part.rows[e];
        }
        lists.shifts[at as usize] = part.shifts;
        lists.levels[at as usize] = part.levels;
    }
}
