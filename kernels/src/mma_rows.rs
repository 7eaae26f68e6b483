//! Sampling pass 1, and the mass per band, with `mma.sync` products: cubes own sampled rows and
//! stream all keys. See [`sample`](crate::sample) and [`ladder`](crate::ladder).

use core::f32::consts::{LN_2, LOG2_E};

use cubecl::prelude::*;

use crate::{
    band_mass::{BandOutput, add_band_masses, key_weight},
    call::Call,
    mma_tile::{
        MmaTile, Pair, Wide, await_tile, commit_tile, copy_rows, exp2, exp2_scalar, lane, list_span,
        mma_scores, new_arrivals, plane, zero_products,
    },
    sample::{Sampled, list_sampled_rows},
    square_tile::{MASKED, MAX_START, NO_ROW, head_base},
    tensor::{array, grid},
    walk::Sizes,
};

/// Compile-time choices of the row kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RowConfig {
    tile: MmaTile,
    block: u32,
    /// Sum the mass per band, given the log-sum-exp, instead of computing the latter.
    bands: bool,
}

/// Pass 1.
pub(crate) fn row_lse_mma<R: Runtime>(call: &Call<'_, R>, sampled: &Sampled, tile: MmaTile) {
    launch_rows(call, sampled, None, tile);
}

/// Mass per band of each row tile.
pub(crate) fn band_mass_mma<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    output: BandOutput<'_>,
    tile: MmaTile,
) {
    launch_rows(call, sampled, Some(output), tile);
}

fn launch_rows<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    bands: Option<BandOutput<'_>>,
    tile: MmaTile,
) {
    let config = RowConfig { tile, block: call.block(), bands: bands.is_some() };
    let unused = call.words(1);
    let (masses, weights) = match bands {
        Some(output) => (output.masses_arg(), output.weights_arg(call)),
        None => (array(&unused, 1), ComptimeOptionArgs::None),
    };
    // SAFETY: the kernel reads rows below q_len and keys below kv_len only.
    unsafe {
        mma_row_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads() * call.samples().div_ceil(tile.rows())),
            tile.cube_dim(),
            call.inputs.address_type(),
            call.inputs.q.arg(),
            call.inputs.k.arg(),
            array(&sampled.rows, call.samples()),
            array(&sampled.lse, call.heads() * call.samples()),
            weights,
            masses,
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
fn mma_row_kernel<E: Float>(
    q: &Tensor<Wide<E>>,
    k: &Tensor<Wide<E>>,
    rows: &Array<u32>,
    lse: &mut Array<f32>,
    weights: &ComptimeOption<Array<f32>>,
    masses: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] config: RowConfig,
    #[define(E)] _dtype: StorageType,
) {
    let tile = comptime!(config.tile);
    let count = comptime!(tile.rows() as u32);
    let keys = comptime!(tile.keys as u32);
    let units = comptime!(tile.units() as u32);
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let row_tiles = sizes.samples.div_ceil(count);
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * row_tiles {
        terminate!();
    }
    // The last tiles see the most keys: they go first.
    let row_tile = row_tiles - 1 - item / heads;
    let first = row_tile * count;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let q_base = head_base::<E, Const<8>>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, Const<8>>(k, batch, head % sizes.q_heads / sizes.group);
    let position = sizes.kv_len - sizes.q_len;
    let lse_base = head * sizes.samples + first;
    let mass_base = (head * row_tiles + row_tile) as usize * sizes.blocks as usize;

    let pitch = comptime!(tile.pitch());
    let mut q_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(tile.rows() * pitch), 16usize);
    let mut k_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(2 * tile.keys * pitch), 16usize);
    let mut q_rows = SharedMemory::<u32>::new(tile.rows());
    let mut k_rows = SharedMemory::<u32>::new(comptime!(2 * tile.keys));
    let mut row_mass = SharedMemory::<f32>::new(tile.rows());

    list_sampled_rows(&mut q_rows, rows, first, sizes.samples, count, units);
    list_span(&mut k_rows, 0, 0, sizes.kv_len, keys);
    if comptime!(config.bands) {
        let mut d = UNIT_POS;
        while d < sizes.blocks {
            masses[mass_base + d as usize] = 0.0;
            d += units;
        }
        sync_storage();
    }
    sync_cube();
    copy_rows::<E>(q, q_base, &q_rows, 0, &mut q_stage, 0, tile.rows(), tile);
    copy_rows::<E>(k, k_base, &k_rows, 0, &mut k_stage, 0, tile.keys, tile);
    let arrivals = new_arrivals(tile);
    commit_tile(&arrivals, 0);

    let lane = lane();
    let first_slot = plane() * comptime!(tile.row_tiles as u32 * 16) + lane / 4;
    let mut scores = zero_products(comptime!(tile.row_tiles * tile.key_products()));
    // Positions of the unit's rows; a missing row sees every key and is not written.
    let mut sees = Array::<u32>::new(comptime!(2 * tile.row_tiles));
    let mut maximum = Array::<f32>::new(comptime!(2 * tile.row_tiles));
    let mut sum = Array::<f32>::new(comptime!(2 * tile.row_tiles));
    #[unroll]
    for r in 0..comptime!(2 * tile.row_tiles) {
        let slot = first_slot + comptime!(r as u32 * 8);
        sees[r] = q_rows[slot as usize];
        if sees[r] != NO_ROW {
            sees[r] += position;
        }
        maximum[r] = MAX_START;
        if comptime!(config.bands) {
            maximum[r] = 0.0;
            if first + slot < sizes.samples {
                maximum[r] = lse[(lse_base + slot) as usize] * LOG2_E;
            }
        }
        sum[r] = 0.0;
    }
    let last_row = rows[((first + count).min(sizes.samples) - 1) as usize];
    let key_tiles = (position + last_row) / keys + 1;
    let first_sees = position + q_rows[0];

    for index in 0..key_tiles {
        // Everybody is done with the tile before this one.
        sync_cube();
        if index + 1 < key_tiles {
            let next = (index + 1) % 2 * keys;
            list_span(&mut k_rows, next, (index + 1) * keys, sizes.kv_len, keys);
            sync_cube();
            let offset = next * comptime!(pitch as u32);
            copy_rows::<E>(k, k_base, &k_rows, next, &mut k_stage, offset, tile.keys, tile);
            commit_tile(&arrivals, index + 1);
        }
        await_tile(&arrivals, index);
        let stage = index % 2 * comptime!(tile.keys as u32 * pitch as u32);
        mma_scores::<E>(&q_stage, 0, &k_stage, stage, &mut scores, tile);

        if (index + 1) * keys > first_sees + 1 {
            #[unroll]
            for n in 0..tile.key_products() {
                #[unroll]
                for c in 0..2usize {
                    let key = index * keys + lane % 4 * 2 + comptime!(n as u32 * 8 + c as u32);
                    #[unroll]
                    for m in 0..tile.row_tiles {
                        let product = scores.index_mut(comptime!(m * tile.key_products() + n));
                        #[unroll]
                        for half in 0..2usize {
                            let mut pair = product[half];
                            pair[c] = select(key <= sees[comptime!(2 * m + half)], pair[c], MASKED);
                            product[half] = pair;
                        }
                    }
                }
            }
        }
        let mut weight = Array::<Pair<f32>>::new(tile.key_products());
        if comptime!(weights.is_some()) {
            #[unroll]
            for n in 0..tile.key_products() {
                let key = index * keys + lane % 4 * 2 + comptime!(n as u32 * 8);
                let mut pair = Pair::<f32>::new(1.0);
                pair[0] = key_weight(weights, head, key, &sizes);
                pair[1] = key_weight(weights, head, key + 1, &sizes);
                weight[n] = pair;
            }
        }
        #[unroll]
        for m in 0..tile.row_tiles {
            #[unroll]
            for half in 0..2usize {
                let r = comptime!(2 * m + half);
                if comptime!(!config.bands) {
                    // Each unit keeps the maximum of its own columns; they meet at the end.
                    let mut tile_max = MASKED.runtime();
                    #[unroll]
                    for n in 0..tile.key_products() {
                        let pair = scores.index(comptime!(m * tile.key_products() + n))[half];
                        tile_max = max(tile_max, max(pair[0], pair[1]));
                    }
                    let new_max = max(maximum[r], tile_max * scale);
                    sum[r] *= exp2_scalar(maximum[r] - new_max);
                    maximum[r] = new_max;
                }
                #[unroll]
                for n in 0..tile.key_products() {
                    let pair = scores.index(comptime!(m * tile.key_products() + n))[half];
                    let mut mass = exp2(fma(pair, Pair::new(scale), Pair::new(-maximum[r])));
                    if comptime!(weights.is_some()) {
                        mass *= weight[n];
                    }
                    sum[r] += mass[0] + mass[1];
                }
            }
        }

        if comptime!(config.bands) {
            let key_block = index * keys / config.block;
            let block_ends = (index + 1) * keys % config.block == 0 || index + 1 == key_tiles;
            if block_ends {
                #[unroll]
                for r in 0..comptime!(2 * tile.row_tiles) {
                    let total = quad_sum(sum[r]);
                    row_mass[(first_slot + comptime!(r as u32 * 8)) as usize] = total;
                    sum[r] = 0.0;
                }
                sync_cube();
                add_band_masses(
                    &q_rows,
                    &row_mass,
                    masses,
                    mass_base,
                    key_block,
                    position,
                    count,
                    units,
                    config.block,
                );
                sync_storage();
            }
        }
    }

    if comptime!(!config.bands) {
        #[unroll]
        for r in 0..comptime!(2 * tile.row_tiles) {
            let slot = first_slot + comptime!(r as u32 * 8);
            let mut row_max = maximum[r];
            row_max = max(row_max, plane_shuffle_xor(row_max, 1));
            row_max = max(row_max, plane_shuffle_xor(row_max, 2));
            let total = quad_sum(sum[r] * exp2_scalar(maximum[r] - row_max));
            if lane % 4 == 0 && first + slot < sizes.samples {
                lse[(lse_base + slot) as usize] = row_max * LN_2 + total.ln();
            }
        }
    }
}

/// Sum over the four units that share a row.
#[cube]
fn quad_sum(value: f32) -> f32 {
    let pairs = value + plane_shuffle_xor(value, 1);
    pairs + plane_shuffle_xor(pairs, 2)
}
