//! Stage 1, sampling (arXiv 2406.15486, section 4.2): exact attention of a few query rows, in two
//! passes that recompute the scores, so that no buffer grows with rows times keys.
//!
//! Pass 1 gives each sampled row its log-sum-exp; pass 2 sums `exp(score - lse)` over the sampled
//! rows, per column. A cube owns its rows in pass 1 and its columns in pass 2, so every sum has one
//! order and repeated runs agree bit for bit.

use cubecl::{prelude::*, server::Handle};

use crate::{
    call::Call,
    mma_columns::column_scores_mma,
    mma_rows::row_lse_mma,
    plane_columns::column_scores_plane,
    plane_rows::row_lse_plane,
    square_tile::{MASKED, MAX_START, NO_ROW, PART, SquareTile, head_base, new_stage, score_tile},
    tensor::{array, grid},
    walk::Sizes,
};

/// What pass 2 needs to know at compile time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SampleConfig {
    pub tile: SquareTile,
    pub block: u32,
    /// Levels that column scores are kept apart by.
    pub levels: usize,
}

/// The buffers of the sampling stage.
pub(crate) struct Sampled {
    /// `u32 [samples]`: sampled query rows, ascending.
    pub rows: Handle,
    /// `f32 [heads, samples]`: log-sum-exp over all keys.
    pub lse: Handle,
}

/// Pass 1.
pub(crate) fn row_lse<R: Runtime>(call: &Call<'_, R>) -> Sampled {
    let (tile, samples) = (call.square, call.samples());
    let sampled = Sampled {
        rows: call.client.create_from_slice(u32::as_bytes(&call.rows)),
        lse: call.words(call.heads() * samples),
    };
    if let Some(tiles) = call.mma {
        row_lse_mma(call, &sampled, tiles.sample);
        return sampled;
    }
    if let Some(tiles) = call.plane {
        row_lse_plane(call, &sampled, tiles.sample);
        return sampled;
    }
    // SAFETY: the kernel reads rows below q_len and keys below kv_len only.
    unsafe {
        row_lse_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads() * samples.div_ceil(tile.edge)),
            tile.cube_dim(),
            call.inputs.address_type(),
            call.inputs.vector_width(4),
            call.inputs.q.arg(),
            call.inputs.k.arg(),
            array(&sampled.rows, samples),
            array(&sampled.lse, call.heads() * samples),
            call.sizes(),
            call.scale,
            tile,
            call.inputs.q.dtype,
        );
    }
    sampled
}

/// Which distances pass 2 counts, and in which level.
pub(crate) struct Levels {
    /// `u32 [blocks]` for all heads, or `[heads, blocks]`: the level of each distance; those of
    /// level `count` and above are left out.
    pub table: Handle,
    /// Entries of the table.
    pub len: usize,
    /// Levels that scores are kept apart by.
    pub count: usize,
}

/// Pass 2: `f32 [heads, levels, columns]`.
pub(crate) fn column_scores<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    columns: usize,
    levels: &Levels,
) -> Handle {
    let config = SampleConfig { tile: call.square, block: call.block(), levels: levels.count };
    let len = call.heads() * levels.count * columns;
    let scores = call.words(len);
    if let Some(tiles) = call.mma {
        column_scores_mma(call, sampled, columns, levels, &scores, tiles.sample);
        return scores;
    }
    if let Some(tiles) = call.plane {
        column_scores_plane(call, sampled, columns, levels, &scores, tiles.sample);
        return scores;
    }
    // SAFETY: as above; scores are written for columns below `columns` only.
    unsafe {
        column_scores_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads() * columns.div_ceil(config.tile.edge)),
            config.tile.cube_dim(),
            call.inputs.address_type(),
            call.inputs.vector_width(4),
            call.inputs.q.arg(),
            call.inputs.k.arg(),
            array(&sampled.rows, call.samples()),
            array(&sampled.lse, call.heads() * call.samples()),
            array(&levels.table, levels.len),
            array(&scores, len),
            call.sizes(),
            call.scale,
            config,
            call.inputs.q.dtype,
        );
    }
    scores
}

/// Fills the list of a tile's query rows; the last tile may be partial.
#[cube]
pub(crate) fn list_sampled_rows(
    list: &mut SharedMemory<u32>,
    rows: &Array<u32>,
    first: u32,
    samples: u32,
    #[comptime] count: u32,
    #[comptime] units: u32,
) {
    #[unroll]
    for step in 0..comptime!(count.div_ceil(units)) {
        let slot = UNIT_POS + comptime!(step * units);
        if slot < count {
            let mut row = NO_ROW.runtime();
            if first + slot < samples {
                row = rows[(first + slot) as usize];
            }
            list[slot as usize] = row;
        }
    }
}

/// Fills the list of a tile's keys.
#[cube]
pub(crate) fn list_keys(list: &mut SharedMemory<u32>, first: u32, kv_len: u32, #[comptime] edge: u32) {
    if UNIT_POS < edge {
        let mut key = first + UNIT_POS;
        if key >= kv_len {
            key = NO_ROW;
        }
        list[UNIT_POS as usize] = key;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn row_lse_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    rows: &Array<u32>,
    lse: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] tile: SquareTile,
    #[define(E)] _dtype: StorageType,
) {
    let edge = comptime!(tile.edge as u32);
    let side = comptime!(tile.side() as u32);
    let units = comptime!(tile.units() as u32);
    let unit_row = UNIT_POS / side;
    let unit_col = UNIT_POS % side;
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let row_tiles = sizes.samples.div_ceil(edge);
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * row_tiles {
        terminate!();
    }
    // The last tiles see the most keys: they go first.
    let first = (row_tiles - 1 - item / heads) * edge;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let q_base = head_base::<E, N>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, N>(k, batch, head % sizes.q_heads / sizes.group);
    let position = sizes.kv_len - sizes.q_len;

    let mut q_rows = SharedMemory::<u32>::new(tile.edge);
    let mut k_rows = SharedMemory::<u32>::new(tile.edge);
    let mut stage = new_stage::<N>(tile);
    list_sampled_rows(&mut q_rows, rows, first, sizes.samples, edge, units);

    // Each unit keeps the maximum and the sum of its own columns; they meet at the end.
    let mut maximum = Array::<f32>::new(PART);
    let mut sum = Array::<f32>::new(PART);
    #[unroll]
    for i in 0..PART {
        maximum[i] = MAX_START;
        sum[i] = 0.0;
    }
    let mut scores = Array::<f32>::new(PART * PART);
    let last_row = rows[((first + edge).min(sizes.samples) - 1) as usize];
    let key_tiles = (position + last_row) / edge + 1;
    for key_tile in 0..key_tiles {
        sync_cube();
        list_keys(&mut k_rows, key_tile * edge, sizes.kv_len, edge);
        score_tile::<E, N>(q, q_base, &q_rows, k, k_base, &k_rows, &mut stage, &mut scores, tile);
        #[unroll]
        for i in 0..PART {
            let row = q_rows[(unit_row + comptime!(i as u32) * side) as usize];
            let mut tile_max = maximum[i];
            #[unroll]
            for j in 0..PART {
                let key = k_rows[(unit_col + comptime!(j as u32) * side) as usize];
                let score = scores[i * PART + j] * scale;
                let visible = row != NO_ROW && key <= position + row;
                scores[i * PART + j] = select(visible, score, MASKED);
                tile_max = max(tile_max, scores[i * PART + j]);
            }
            sum[i] *= (maximum[i] - tile_max).exp();
            maximum[i] = tile_max;
            #[unroll]
            for j in 0..PART {
                sum[i] += (scores[i * PART + j] - tile_max).exp();
            }
        }
    }

    let mut all_max = SharedMemory::<f32>::new(comptime!(tile.edge * tile.side()));
    let mut all_sum = SharedMemory::<f32>::new(comptime!(tile.edge * tile.side()));
    #[unroll]
    for i in 0..PART {
        let row = unit_row + comptime!(i as u32) * side;
        all_max[(row * side + unit_col) as usize] = maximum[i];
        all_sum[(row * side + unit_col) as usize] = sum[i];
    }
    sync_cube();
    if UNIT_POS < edge && first + UNIT_POS < sizes.samples {
        let base = UNIT_POS * side;
        let mut total_max = all_max[base as usize];
        for j in 1..side {
            total_max = max(total_max, all_max[(base + j) as usize]);
        }
        let mut total = 0.0f32;
        for j in 0..side {
            let at = (base + j) as usize;
            total += all_sum[at] * (all_max[at] - total_max).exp();
        }
        lse[(head * sizes.samples + first + UNIT_POS) as usize] = total_max + total.ln();
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn column_scores_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    rows: &Array<u32>,
    lse: &Array<f32>,
    levels: &Array<u32>,
    column_scores: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] config: SampleConfig,
    #[define(E)] _dtype: StorageType,
) {
    let tile = comptime!(config.tile);
    let edge = comptime!(tile.edge as u32);
    let side = comptime!(tile.side() as u32);
    let units = comptime!(tile.units() as u32);
    let unit_row = UNIT_POS / side;
    let unit_col = UNIT_POS % side;
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let key_tiles = sizes.columns.div_ceil(edge);
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * key_tiles {
        terminate!();
    }
    // The first keys are seen by the most rows: they go first.
    let first_key = item / heads * edge;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let q_base = head_base::<E, N>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, N>(k, batch, head % sizes.q_heads / sizes.group);
    let position = sizes.kv_len - sizes.q_len;
    let key_block = first_key / config.block;
    // One table for all heads, or one each.
    let levels_base = head * sizes.blocks % levels.len() as u32;

    let mut q_rows = SharedMemory::<u32>::new(tile.edge);
    let mut k_rows = SharedMemory::<u32>::new(tile.edge);
    let mut row_lse = SharedMemory::<f32>::new(tile.edge);
    let mut row_level = SharedMemory::<u32>::new(tile.edge);
    let mut stage = new_stage::<N>(tile);
    let mut masses = SharedMemory::<f32>::new(comptime!(match config.levels {
        1 => 1,
        _ => tile.edge * tile.edge,
    }));
    list_keys(&mut k_rows, first_key, sizes.kv_len, edge);

    // With one level, sums stay with their units until the end; with more, whole tiles of masses
    // go through shared memory.
    let mut partial = SharedMemory::<f32>::new(comptime!(match config.levels {
        1 => tile.edge * tile.side(),
        _ => 1,
    }));
    let mut by_level = SharedMemory::<f32>::new(comptime!(match config.levels {
        1 => 1,
        levels => levels * tile.edge,
    }));
    if comptime!(config.levels > 1) {
        if UNIT_POS < edge {
            for level in 0..comptime!(config.levels as u32) {
                by_level[(level * edge + UNIT_POS) as usize] = 0.0;
            }
        }
    }
    let mut scores = Array::<f32>::new(PART * PART);
    let mut sums = Array::<f32>::new(PART);
    #[unroll]
    for j in 0..PART {
        sums[j] = 0.0;
    }
    let row_tiles = sizes.samples.div_ceil(edge);
    for row_tile in 0..row_tiles {
        let first = row_tile * edge;
        let last_row = rows[((first + edge).min(sizes.samples) - 1) as usize];
        // The same for the whole cube, so the barriers below stay uniform.
        if position + last_row >= first_key {
            sync_cube();
            list_sampled_rows(&mut q_rows, rows, first, sizes.samples, edge, units);
            if UNIT_POS < edge {
                let row = q_rows[UNIT_POS as usize];
                let mut level = comptime!(config.levels as u32).runtime();
                if row != NO_ROW && position + row >= first_key {
                    let distance = (position + row) / config.block - key_block;
                    level = levels[(levels_base + distance) as usize];
                    row_lse[UNIT_POS as usize] = lse[(head * sizes.samples + first + UNIT_POS) as usize];
                }
                row_level[UNIT_POS as usize] = level;
            }
            score_tile::<E, N>(q, q_base, &q_rows, k, k_base, &k_rows, &mut stage, &mut scores, tile);
            #[unroll]
            for i in 0..PART {
                let slot = (unit_row + comptime!(i as u32) * side) as usize;
                let counted = row_level[slot] < comptime!(config.levels as u32);
                #[unroll]
                for j in 0..PART {
                    let col = unit_col + comptime!(j as u32) * side;
                    let mut mass = 0.0f32;
                    if counted && k_rows[col as usize] <= position + q_rows[slot] {
                        mass = (scores[i * PART + j] * scale - row_lse[slot]).exp();
                    }
                    if comptime!(config.levels == 1) {
                        sums[j] += mass;
                    } else {
                        masses[slot * tile.edge + col as usize] = mass;
                    }
                }
            }
            if comptime!(config.levels > 1) {
                sync_cube();
                // A unit owns its column in every level, so it adds without conflicts.
                if UNIT_POS < edge {
                    for slot in 0..edge {
                        let level = row_level[slot as usize];
                        if level < comptime!(config.levels as u32) {
                            by_level[(level * edge + UNIT_POS) as usize] +=
                                masses[(slot * edge + UNIT_POS) as usize];
                        }
                    }
                }
            }
        }
    }

    let column = first_key + UNIT_POS;
    let in_range = UNIT_POS < edge && column < sizes.columns;
    let base = (head * comptime!(config.levels as u32)) as usize * sizes.columns as usize;
    if comptime!(config.levels > 1) {
        if in_range {
            for level in 0..comptime!(config.levels as u32) {
                let at = base + level as usize * sizes.columns as usize + column as usize;
                column_scores[at] = by_level[(level * edge + UNIT_POS) as usize];
            }
        }
    } else {
        #[unroll]
        for j in 0..PART {
            let col = unit_col + comptime!(j as u32) * side;
            partial[(col * side + unit_row) as usize] = sums[j];
        }
        sync_cube();
        if in_range {
            let mut total = 0.0f32;
            for i in 0..side {
                total += partial[(UNIT_POS * side + i) as usize];
            }
            column_scores[base + column as usize] = total;
        }
    }
}
