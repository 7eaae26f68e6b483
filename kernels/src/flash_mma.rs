//! The flash loop with `mma.sync` products: 128 query rows by 64 keys, after FlashAttention-2.

use core::f32::consts::{LN_2, LOG2_E};

use cubecl::{prelude::*, server::Handle};

use crate::{
    Plan,
    call::Call,
    mma_tile::{
        BARRIER_BYTES, MmaTile, Pair, Wide, await_tile, commit_tile, copy_rows, exp2, exp2_scalar, lane,
        mma_scores, mma_values, new_arrivals, plane, zero_products,
    },
    square_tile::{MASKED, MAX_START, NO_ROW, head_base},
    tensor::{array, grid},
    walk::{PlanArgs, Sizes, Walk, WalkTile, key_at, plan_args, start_walk},
};

/// Compile-time choices of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MmaFlash {
    tile: MmaTile,
    walk: WalkTile,
}

/// Shared memory of the kernel, in bytes.
pub(crate) fn flash_bytes(tile: &MmaTile) -> usize {
    let lists = tile.rows() + 3 * tile.keys + 3 * tile.planes;
    tile.staged_bytes(tile.rows() + 4 * tile.keys) + 4 * lists + BARRIER_BYTES
}

/// As [`flash`](crate::flash::flash); rows must be readable as 16-byte vectors.
pub(crate) fn flash_mma<R: Runtime>(call: &Call<'_, R>, plan: Option<&Plan>, lse: &Handle, tile: MmaTile) {
    let (shape, inputs) = (&call.shape, &call.inputs);
    let config = MmaFlash {
        tile,
        walk: WalkTile {
            block: call.block(),
            query_tile: tile.rows() as u32,
            key_tile: tile.keys as u32,
            dense: plan.is_none(),
        },
    };
    // SAFETY: rows come from the walk, which yields keys below kv_len only.
    unsafe {
        mma_flash_kernel::launch_unchecked::<R>(
            call.client,
            grid(shape.heads() * shape.query_tiles(tile.rows())),
            tile.cube_dim(),
            inputs.address_type(),
            inputs.q.arg(),
            inputs.k.arg(),
            inputs.v.arg(),
            plan_args(call.client, plan),
            inputs.out.arg(),
            array(lse, shape.heads() * shape.q_len),
            call.sizes(),
            call.scale * LOG2_E,
            config,
            inputs.q.dtype,
        );
    }
}

/// Lists the positions of a key tile in `k_rows[list..]`, and whether any pair of it is masked.
#[cube]
fn list_tile(
    walk: &Walk,
    plan: &PlanArgs,
    sizes: &Sizes,
    index: u32,
    list: u32,
    start: u32,
    k_rows: &mut SharedMemory<u32>,
    masked: &mut SharedMemory<u32>,
    #[comptime] config: MmaFlash,
) {
    let keys = comptime!(config.tile.keys as u32);
    let mut any = false.runtime();
    if UNIT_POS < keys {
        let key = key_at(walk, plan, sizes, index, UNIT_POS, config.walk);
        k_rows[(list * keys + UNIT_POS) as usize] = key;
        // The first row sees the least; a missing key counts as the last of all.
        any = key > start;
    }
    any = plane_any(any);
    if lane() == 0 {
        masked[(list * comptime!(config.tile.planes as u32) + plane()) as usize] = u32::cast_from(any);
    }
}

#[cube(
    launch_unchecked,
    address_type = "dynamic",
    fast_math = FastMath::ReducedPrecision | FastMath::NotNaN | FastMath::NotInf
)]
fn mma_flash_kernel<E: Float>(
    q: &Tensor<Wide<E>>,
    k: &Tensor<Wide<E>>,
    v: &Tensor<Wide<E>>,
    plan: &PlanArgs,
    out: &mut Tensor<Pair<E>>,
    lse: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] config: MmaFlash,
    #[define(E)] _dtype: StorageType,
) {
    let tile = comptime!(config.tile);
    let rows = comptime!(tile.rows() as u32);
    let keys = comptime!(tile.keys as u32);
    let units = comptime!(tile.units() as u32);
    let planes = comptime!(tile.planes as u32);
    let pitch = comptime!(tile.pitch() as u32);
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let position = sizes.kv_len - sizes.q_len;
    let first_tile = position / rows;
    let query_tiles = sizes.kv_len.div_ceil(rows) - first_tile;
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * query_tiles {
        terminate!();
    }
    // Longest first, heads of one group side by side.
    let start = (first_tile + query_tiles - 1 - item / heads) * rows;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let kv_head = head % sizes.q_heads / sizes.group;
    let q_base = head_base::<E, Const<8>>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, Const<8>>(k, batch, kv_head);
    let v_base = head_base::<E, Const<8>>(v, batch, kv_head);

    let stage_len = comptime!(2 * tile.keys * tile.pitch());
    let mut q_stage = SharedMemory::<Wide<E>>::new_aligned(comptime!(tile.rows() * tile.pitch()), 16usize);
    let mut k_stage = SharedMemory::<Wide<E>>::new_aligned(stage_len, 16usize);
    let mut v_stage = SharedMemory::<Wide<E>>::new_aligned(stage_len, 16usize);
    let mut q_rows = SharedMemory::<u32>::new(tile.rows());
    // Three lists: one is written while slower planes still read the one before the current one.
    let mut k_rows = SharedMemory::<u32>::new(comptime!(3 * tile.keys));
    let mut masked = SharedMemory::<u32>::new(comptime!(3 * tile.planes));

    #[unroll]
    for step in 0..comptime!(rows.div_ceil(units)) {
        let slot = UNIT_POS + comptime!(step * units);
        if slot < rows {
            let at = start + slot;
            let mut row = NO_ROW.runtime();
            if at >= position && at < sizes.kv_len {
                row = at - position;
            }
            q_rows[slot as usize] = row;
        }
    }
    let walk = start_walk(plan, &sizes, head, start, config.walk);
    list_tile(&walk, plan, &sizes, 0, 0, start, &mut k_rows, &mut masked, config);
    sync_cube();
    let arrivals = new_arrivals(tile);
    copy_rows::<E>(q, q_base, &q_rows, 0, &mut q_stage, 0, tile.rows(), tile);
    copy_rows::<E>(k, k_base, &k_rows, 0, &mut k_stage, 0, tile.keys, tile);
    copy_rows::<E>(v, v_base, &k_rows, 0, &mut v_stage, 0, tile.keys, tile);
    commit_tile(&arrivals, 0);

    let lane = lane();
    let plane_row = plane() * comptime!(tile.row_tiles as u32 * 16);
    let mut scores = zero_products(comptime!(tile.row_tiles * tile.key_products()));
    let mut acc = zero_products(comptime!(tile.row_tiles * tile.out_products()));
    // Two rows per product of rows; maxima to base 2, sums over the unit's own columns.
    let mut maximum = Array::<f32>::new(comptime!(2 * tile.row_tiles));
    let mut sum = Array::<f32>::new(comptime!(2 * tile.row_tiles));
    let mut shrink = Array::<f32>::new(comptime!(2 * tile.row_tiles));
    #[unroll]
    for r in 0..comptime!(2 * tile.row_tiles) {
        maximum[r] = MAX_START;
        sum[r] = 0.0;
    }

    for index in 0..walk.tiles {
        let list = index % 3;
        let next_list = (index + 1) % 3;
        let stage = index % 2 * comptime!(keys * pitch);
        if index + 1 < walk.tiles {
            list_tile(&walk, plan, &sizes, index + 1, next_list, start, &mut k_rows, &mut masked, config);
        }
        // Everybody is done with the tile before this one.
        sync_cube();
        if index + 1 < walk.tiles {
            let next = (index + 1) % 2 * comptime!(keys * pitch);
            let slot = next_list * keys;
            copy_rows::<E>(k, k_base, &k_rows, slot, &mut k_stage, next, tile.keys, tile);
            copy_rows::<E>(v, v_base, &k_rows, slot, &mut v_stage, next, tile.keys, tile);
            commit_tile(&arrivals, index + 1);
        }
        await_tile(&arrivals, index);

        mma_scores::<E>(&q_stage, 0, &k_stage, stage, &mut scores, tile);

        let mut any_masked = 0u32.runtime();
        #[unroll]
        for p in 0..planes {
            any_masked |= masked[(list * planes + p) as usize];
        }
        if any_masked != 0 {
            #[unroll]
            for n in 0..tile.key_products() {
                #[unroll]
                for c in 0..2usize {
                    let col = list * keys + lane % 4 * 2 + comptime!(n as u32 * 8 + c as u32);
                    let key = k_rows[col as usize];
                    #[unroll]
                    for m in 0..tile.row_tiles {
                        let product = scores.index_mut(comptime!(m * tile.key_products() + n));
                        #[unroll]
                        for half in 0..2usize {
                            let row =
                                start + plane_row + lane / 4 + comptime!(m as u32 * 16 + half as u32 * 8);
                            let mut pair = product[half];
                            pair[c] = select(key <= row, pair[c], MASKED);
                            product[half] = pair;
                        }
                    }
                }
            }
        }

        let mut moved = false.runtime();
        #[unroll]
        for m in 0..tile.row_tiles {
            #[unroll]
            for half in 0..2usize {
                let r = comptime!(2 * m + half);
                let mut tile_max = MASKED.runtime();
                #[unroll]
                for n in 0..tile.key_products() {
                    let pair = scores.index(comptime!(m * tile.key_products() + n))[half];
                    tile_max = max(tile_max, max(pair[0], pair[1]));
                }
                let mut new_max = max(maximum[r], tile_max * scale);
                new_max = max(new_max, plane_shuffle_xor(new_max, 1));
                new_max = max(new_max, plane_shuffle_xor(new_max, 2));
                moved = moved || new_max > maximum[r];
                shrink[r] = exp2_scalar(maximum[r] - new_max);
                maximum[r] = new_max;
                let mut part = 0.0f32;
                #[unroll]
                for n in 0..tile.key_products() {
                    let product = scores.index_mut(comptime!(m * tile.key_products() + n));
                    let pair = exp2(fma(product[half], Pair::new(scale), Pair::new(-new_max)));
                    product[half] = pair;
                    part += pair[0] + pair[1];
                }
                sum[r] = sum[r] * shrink[r] + part;
            }
        }
        // Maxima settle after a few tiles; then the output needs no scaling.
        if plane_any(moved) {
            #[unroll]
            for m in 0..tile.row_tiles {
                #[unroll]
                for n in 0..tile.out_products() {
                    let product = acc.index_mut(comptime!(m * tile.out_products() + n));
                    product[0] *= Pair::new(shrink[comptime!(2 * m)]);
                    product[1] *= Pair::new(shrink[comptime!(2 * m + 1)]);
                }
            }
        }
        mma_values::<E>(&scores, &v_stage, stage, &mut acc, tile);
    }

    let row_stride = out.stride(2) / 2;
    let out_base = (batch as usize * out.stride(0) + (head % sizes.q_heads) as usize * out.stride(1)) / 2;
    #[unroll]
    for m in 0..tile.row_tiles {
        #[unroll]
        for half in 0..2usize {
            let r = comptime!(2 * m + half);
            let mut total = sum[r];
            total += plane_shuffle_xor(total, 1);
            total += plane_shuffle_xor(total, 2);
            let slot = plane_row + lane / 4 + comptime!(m as u32 * 16 + half as u32 * 8);
            let row = q_rows[slot as usize];
            if row != NO_ROW {
                let share = 1.0 / total;
                let at = out_base + row as usize * row_stride + (lane % 4) as usize;
                #[unroll]
                for n in 0..tile.out_products() {
                    let pair = acc.index(comptime!(m * tile.out_products() + n))[half];
                    out[at + comptime!(n * 4)] = Pair::cast_from(pair * Pair::new(share));
                }
                if lane % 4 == 0 {
                    lse[head as usize * sizes.q_len as usize + row as usize] = maximum[r] * LN_2 + total.ln();
                }
            }
        }
    }
}
