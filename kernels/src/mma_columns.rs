//! Sampling pass 2 with `mma.sync` products: cubes own keys and stream the sampled rows. See
//! [`sample`](crate::sample).

use core::f32::consts::LOG2_E;

use cubecl::{prelude::*, server::Handle};

use crate::{
    call::Call,
    mma_tile::{
        BARRIER_BYTES, MmaTile, Pair, Wide, await_tile, commit_tile, copy_rows, exp2, lane, list_span,
        mma_scores, new_arrivals, plane, zero_products,
    },
    sample::{Levels, Sampled},
    square_tile::{NO_ROW, head_base},
    tensor::{array, grid},
    walk::Sizes,
};

/// Compile-time choices of the column kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ColumnConfig {
    tile: MmaTile,
    block: u32,
    levels: usize,
}

/// Shared memory of the kernel, in bytes; the row kernel needs less.
pub(crate) fn sample_bytes(tile: &MmaTile, levels: usize) -> usize {
    let sums = match levels {
        1 => tile.planes * tile.keys,
        _ => tile.rows() * tile.keys + shares(tile) * levels * tile.keys,
    };
    let lists = tile.keys + 6 * tile.rows();
    tile.staged_bytes(2 * tile.rows() + tile.keys) + 4 * (sums + lists) + BARRIER_BYTES
}

/// Shares that the rows of a tile are split into when columns are summed by level.
fn shares(tile: &MmaTile) -> usize {
    (tile.units() / tile.keys).max(1)
}

/// Pass 2, into `f32 [heads, levels, columns]`.
pub(crate) fn column_scores_mma<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    columns: usize,
    levels: &Levels,
    scores: &Handle,
    tile: MmaTile,
) {
    let config = ColumnConfig { tile, block: call.block(), levels: levels.count };
    // SAFETY: as above; scores are written for columns below `columns` only.
    unsafe {
        mma_column_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads() * columns.div_ceil(tile.keys)),
            tile.cube_dim(),
            call.inputs.address_type(),
            call.inputs.q.arg(),
            call.inputs.k.arg(),
            array(&sampled.rows, call.samples()),
            array(&sampled.lse, call.heads() * call.samples()),
            array(&levels.table, levels.len),
            array(scores, call.heads() * levels.count * columns),
            call.sizes(),
            call.scale * LOG2_E,
            config,
            call.inputs.q.dtype,
        );
    }
}

#[cube(
    launch_unchecked,
    address_type = "dynamic",
    fast_math = FastMath::ReducedPrecision | FastMath::NotNaN | FastMath::NotInf
)]
fn mma_column_kernel<E: Float>(
    q: &Tensor<Wide<E>>,
    k: &Tensor<Wide<E>>,
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
    let count = comptime!(tile.rows() as u32);
    let keys = comptime!(tile.keys as u32);
    let planes = comptime!(tile.planes as u32);
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let key_tiles = sizes.columns.div_ceil(keys);
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * key_tiles {
        terminate!();
    }
    // The first keys are seen by the most rows: they go first.
    let first_key = item / heads * keys;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let q_base = head_base::<E, Const<8>>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, Const<8>>(k, batch, head % sizes.q_heads / sizes.group);
    let position = sizes.kv_len - sizes.q_len;
    let row_tiles = sizes.samples.div_ceil(count);

    let pitch = comptime!(tile.pitch());
    let mut q_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(2 * tile.rows() * pitch), 16usize);
    let mut k_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(tile.keys * pitch), 16usize);
    let mut k_rows = SharedMemory::<u32>::new(tile.keys);
    let mut q_rows = SharedMemory::<u32>::new(comptime!(2 * tile.rows()));
    let mut row_lse = SharedMemory::<f32>::new(comptime!(2 * tile.rows()));
    let mut row_level = SharedMemory::<u32>::new(comptime!(2 * tile.rows()));
    // With several levels, masses of a tile, and per plane group the sums of its rows.
    let mut all = SharedMemory::<f32>::new(comptime!(match config.levels {
        1 => tile.planes * tile.keys,
        _ => tile.rows() * tile.keys,
    }));
    let shares = comptime!(shares(&tile) as u32);
    let mut by_level = SharedMemory::<f32>::new(comptime!(match config.levels {
        1 => 1,
        levels => shares as usize * levels * tile.keys,
    }));

    // Skip the rows above the first key.
    let mut first_tile = 0u32.runtime();
    let mut below = true.runtime();
    while below {
        let last = rows[(((first_tile + 1) * count).min(sizes.samples) - 1) as usize];
        below = position + last < first_key && first_tile + 1 < row_tiles;
        if below {
            first_tile += 1;
        }
    }
    let tiles = row_tiles - first_tile;

    list_span(&mut k_rows, 0, first_key, sizes.kv_len, keys);
    list_rows(
        rows,
        lse,
        levels,
        &mut q_rows,
        &mut row_lse,
        &mut row_level,
        &sizes,
        head,
        first_key,
        first_tile,
        0,
        config,
    );
    if comptime!(config.levels > 1) {
        let mut entry = UNIT_POS;
        while entry < comptime!(shares * (config.levels as u32) * keys) {
            by_level[entry as usize] = 0.0;
            entry += comptime!(tile.units() as u32);
        }
    }
    sync_cube();
    copy_rows::<E>(k, k_base, &k_rows, 0, &mut k_stage, 0, tile.keys, tile);
    copy_rows::<E>(q, q_base, &q_rows, 0, &mut q_stage, 0, tile.rows(), tile);
    let arrivals = new_arrivals(tile);
    commit_tile(&arrivals, 0);

    let lane = lane();
    let plane_slot = plane() * comptime!(tile.row_tiles as u32 * 16) + lane / 4;
    let mut scores = zero_products(comptime!(tile.row_tiles * tile.key_products()));
    let mut sums = Array::<Pair<f32>>::new(tile.key_products());
    #[unroll]
    for n in 0..tile.key_products() {
        sums[n] = Pair::new(0.0);
    }

    for index in 0..tiles {
        // Everybody is done with the tile before this one.
        sync_cube();
        if index + 1 < tiles {
            let next = (index + 1) % 2 * count;
            list_rows(
                rows,
                lse,
                levels,
                &mut q_rows,
                &mut row_lse,
                &mut row_level,
                &sizes,
                head,
                first_key,
                first_tile + index + 1,
                next,
                config,
            );
            sync_cube();
            let offset = next * comptime!(pitch as u32);
            copy_rows::<E>(q, q_base, &q_rows, next, &mut q_stage, offset, tile.rows(), tile);
            commit_tile(&arrivals, index + 1);
        }
        await_tile(&arrivals, index);
        let list = index % 2 * count;
        mma_scores::<E>(&q_stage, list * comptime!(pitch as u32), &k_stage, 0, &mut scores, tile);
        #[unroll]
        for m in 0..tile.row_tiles {
            #[unroll]
            for half in 0..2usize {
                let slot = plane_slot + comptime!(m as u32 * 16 + half as u32 * 8);
                let at = (list + slot) as usize;
                // Rows that are left out, or missing, see nothing.
                let counted = row_level[at] < comptime!(config.levels as u32);
                let sees = position + q_rows[at];
                let normaliser = row_lse[at];
                #[unroll]
                for n in 0..tile.key_products() {
                    let col = lane % 4 * 2 + comptime!(n as u32 * 8);
                    let pair = scores.index(comptime!(m * tile.key_products() + n))[half];
                    let mut mass = exp2(fma(pair, Pair::new(scale), Pair::new(-normaliser)));
                    #[unroll]
                    for c in 0..2usize {
                        let key = first_key + col + comptime!(c as u32);
                        mass[c] = select(counted && key <= sees, mass[c], 0.0);
                    }
                    if comptime!(config.levels == 1) {
                        sums[n] += mass;
                    } else {
                        all[(slot * keys + col) as usize] = mass[0];
                        all[(slot * keys + col + 1) as usize] = mass[1];
                    }
                }
            }
        }
        if comptime!(config.levels > 1) {
            sync_cube();
            // A unit owns a column of a share of the rows, in every level.
            if UNIT_POS < comptime!(shares * keys) {
                let col = UNIT_POS % keys;
                let share = UNIT_POS / keys;
                let base = share * comptime!(config.levels as u32);
                for step in 0..comptime!(count / shares) {
                    let slot = share * comptime!(count / shares) + step;
                    let level = row_level[(list + slot) as usize];
                    if level < comptime!(config.levels as u32) {
                        by_level[((base + level) * keys + col) as usize] += all[(slot * keys + col) as usize];
                    }
                }
            }
        }
    }

    let base = (head * comptime!(config.levels as u32)) as usize * sizes.columns as usize;
    if comptime!(config.levels == 1) {
        #[unroll]
        for n in 0..tile.key_products() {
            let mut total = sums[n];
            total += plane_shuffle_xor(total, 4);
            total += plane_shuffle_xor(total, 8);
            total += plane_shuffle_xor(total, 16);
            if lane < 4 {
                let at = plane() * keys + lane * 2 + comptime!(n as u32 * 8);
                all[at as usize] = total[0];
                all[(at + 1) as usize] = total[1];
            }
        }
    }
    sync_cube();
    let column = first_key + UNIT_POS;
    if UNIT_POS < keys && column < sizes.columns {
        if comptime!(config.levels == 1) {
            let mut total = 0.0f32;
            for p in 0..planes {
                total += all[(p * keys + UNIT_POS) as usize];
            }
            column_scores[base + column as usize] = total;
        } else {
            for level in 0..comptime!(config.levels as u32) {
                let mut total = 0.0f32;
                for share in 0..shares {
                    let row = share * comptime!(config.levels as u32) + level;
                    total += by_level[(row * keys + UNIT_POS) as usize];
                }
                let at = base + level as usize * sizes.columns as usize + column as usize;
                column_scores[at] = total;
            }
        }
    }
}

/// Lists a tile of sampled rows, their normalisers to base 2, and the level of their distance from a key
/// tile; rows that are missing or above the keys get a level that is left out.
#[cube]
fn list_rows(
    rows: &Array<u32>,
    lse: &Array<f32>,
    levels: &Array<u32>,
    q_rows: &mut SharedMemory<u32>,
    row_lse: &mut SharedMemory<f32>,
    row_level: &mut SharedMemory<u32>,
    sizes: &Sizes,
    head: u32,
    first_key: u32,
    row_tile: u32,
    list: u32,
    #[comptime] config: ColumnConfig,
) {
    let count = comptime!(config.tile.rows() as u32);
    let units = comptime!(config.tile.units() as u32);
    let position = sizes.kv_len - sizes.q_len;
    // One table for all heads, or one each.
    let levels_base = head * sizes.blocks % levels.len() as u32;
    #[unroll]
    for step in 0..comptime!(count.div_ceil(units)) {
        let slot = UNIT_POS + comptime!(step * units);
        if slot < count {
            let sample = row_tile * count + slot;
            let mut row = NO_ROW.runtime();
            let mut normaliser = 0.0f32;
            let mut level = comptime!(config.levels as u32).runtime();
            if sample < sizes.samples {
                row = rows[sample as usize];
                normaliser = lse[(head * sizes.samples + sample) as usize] * LOG2_E;
                if position + row >= first_key {
                    let distance = (position + row) / config.block - first_key / config.block;
                    level = levels[(levels_base + distance) as usize];
                }
            }
            q_rows[(list + slot) as usize] = row;
            row_lse[(list + slot) as usize] = normaliser;
            row_level[(list + slot) as usize] = level;
        }
    }
}
