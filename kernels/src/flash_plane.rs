//! The flash loop over [row tiles of planes](crate::plane_tile): outputs stay in cooperative matrices.
//!
//! They cannot be scaled there, so they are taken out and put back where a row's maximum grows by more
//! than [`SLACK`], which is seldom after the first key tiles.

use cubecl::{prelude::*, server::Handle};

use crate::{
    Plan,
    call::Call,
    fragments::zero_matrices,
    plane_stage::{carry_rows, load_rows, new_stage, put_rows},
    plane_tile::{
        ALIGNMENT, PLANE_ROWS, PlaneTile, Quad, new_scores, plane_scores, quad_at, quad_max, quad_sum,
        shared_max, shared_sum, unit_row,
    },
    plane_values::{add_values, scale_sums, store_column},
    rounding::rounded_vector,
    square_tile::{MASKED, MAX_START, NO_ROW, head_base},
    tensor::{array, grid},
    walk::{PlanArgs, Sizes, WalkTile, key_at, key_of, plan_args, start_walk, stripe_at},
};

/// How far a score may lie above the maximum that its row is scaled by: weights stay below `e^5`.
const SLACK: f32 = 5.0;

/// Compile-time choices of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PlaneFlash {
    tile: PlaneTile,
    walk: WalkTile,
}

/// Lists of keys that exist at a time: those of the present tile and of two after it.
const LISTS: usize = 3;

/// Shared memory of the kernel, in bytes.
pub(crate) fn plane_flash_bytes(tile: &PlaneTile) -> usize {
    let weights = tile.rows() * tile.weight_pitch() * size_of::<u16>();
    let lists = (LISTS * tile.keys + 2 * tile.rows() + tile.planes) * size_of::<u32>();
    tile.staged_bytes() + weights + lists
}

/// As [`flash`](crate::flash::flash).
pub(crate) fn flash_plane<R: Runtime>(
    call: &Call<'_, R>,
    plan: Option<&Plan>,
    lse: &Handle,
    tile: PlaneTile,
) {
    let (shape, inputs) = (&call.shape, &call.inputs);
    let config = PlaneFlash {
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
        plane_flash_kernel::launch_unchecked::<R>(
            call.client,
            grid(shape.heads() * shape.query_tiles(tile.rows())),
            tile.cube_dim(),
            inputs.address_type(),
            inputs.vector_width(4),
            inputs.q.arg(),
            inputs.k.arg(),
            inputs.v.arg(),
            plan_args(call.client, plan),
            inputs.out.arg(),
            array(lse, shape.heads() * shape.q_len),
            call.sizes(),
            call.scale,
            config,
            inputs.q.dtype,
        );
    }
}

/// Two barriers a key tile, around its weights: behind the first nobody reads staged keys and values any more, so that the
/// tile's values and the next one's keys are staged there too. What is staged next is on its way while values and scores
/// are multiplied, and its list was made a tile earlier.
#[cube(launch_unchecked, address_type = "dynamic")]
fn plane_flash_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    v: &Tensor<Vector<E, N>>,
    plan: &PlanArgs,
    out: &mut Tensor<Vector<E, N>>,
    lse: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] config: PlaneFlash,
    #[define(E)] _dtype: StorageType,
) {
    let tile = comptime!(config.tile);
    let size = comptime!(tile.fragments);
    let width = N::value();
    let rows = comptime!(tile.rows() as u32);
    let keys = comptime!(tile.keys as u32);
    let units = comptime!(tile.units() as u32);
    let plane_rows = comptime!(PLANE_ROWS as u32);
    let score_pitch = comptime!(tile.score_pitch() as u32 / 4);
    let weight_pitch = comptime!(tile.weight_pitch() as u32 / 4);
    let sharers = comptime!(tile.sharers() as u32);
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let position = sizes.kv_len - sizes.q_len;
    let first_tile = position / rows;
    let query_tiles = sizes.kv_len.div_ceil(rows) - first_tile;
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * query_tiles {
        terminate!();
    }
    // Longest first; neighbouring cubes are heads of one group, which share their keys in the cache.
    let start = (first_tile + query_tiles - 1 - item / heads) * rows;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let kv_head = head % sizes.q_heads / sizes.group;
    let q_base = head_base::<E, N>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, N>(k, batch, kv_head);
    let v_base = head_base::<E, N>(v, batch, kv_head);
    let plane = UNIT_POS / PLANE_DIM;
    let own = plane < comptime!(tile.planes as u32);
    let first_slot = plane * plane_rows;
    let part = UNIT_POS % PLANE_DIM % sharers;

    let mut q_rows = SharedMemory::<u32>::new(tile.rows());
    let mut k_rows = SharedMemory::<u32>::new(comptime!(LISTS * tile.keys));
    let mut stage = new_stage::<E, N>(tile);
    let mut scores = new_scores(tile);
    let mut weights =
        SharedMemory::<Quad<E>>::new_aligned(comptime!(tile.rows() * tile.weight_pitch() / 4), ALIGNMENT);
    let mut factors = SharedMemory::<f32>::new(tile.rows());
    let mut grown = SharedMemory::<u32>::new(tile.planes);

    let walk = start_walk(plan, &sizes, head, start, config.walk);
    #[unroll]
    for step in 0..comptime!(rows.div_ceil(units)) {
        let slot = UNIT_POS + comptime!(step * units);
        if slot < rows {
            let at = start + slot;
            q_rows[slot as usize] = select(at >= position && at < sizes.kv_len, at - position, NO_ROW);
        }
    }
    // The list of a tile comes from memory in two steps, while the two tiles before it are at work.
    let mut stripe = 0u32.runtime();
    if UNIT_POS < keys {
        k_rows[UNIT_POS as usize] = key_at(&walk, plan, &sizes, 0, UNIT_POS, config.walk);
        let mut key = NO_ROW.runtime();
        if walk.tiles > 1 {
            key = key_at(&walk, plan, &sizes, 1, UNIT_POS, config.walk);
        }
        k_rows[(keys + UNIT_POS) as usize] = key;
        stripe = stripe_at(&walk, plan, 2, UNIT_POS, config.walk);
    }
    sync_cube();
    let queries = load_rows::<E, N>(q, q_base, &q_rows, &mut stage, tile);
    let mut carried_keys = Array::<Vector<E, N>>::new(comptime!(tile.carried(width)));
    let mut carried_values = Array::<Vector<E, N>>::new(comptime!(tile.carried(width)));
    carry_rows::<E, N>(k, k_base, &k_rows, 0, &mut carried_keys, tile);
    put_rows::<E, N>(&carried_keys, &mut stage, 0, tile);
    carry_rows::<E, N>(k, k_base, &k_rows, keys, &mut carried_keys, tile);
    carry_rows::<E, N>(v, v_base, &k_rows, 0, &mut carried_values, tile);
    sync_cube();

    let out_cols = comptime!(tile.head_dim / size.n);
    let sums = zero_matrices(comptime!(PLANE_ROWS / size.m * out_cols), size);
    let mut maximum = Array::<f32>::new(comptime!(tile.unit_rows()));
    // Of the unit's own columns; summed over the row at the end.
    let mut sum = Array::<f32>::new(comptime!(tile.unit_rows()));
    #[unroll]
    for r in 0..tile.unit_rows() {
        maximum[r] = MAX_START;
        sum[r] = 0.0;
    }

    for index in 0..walk.tiles {
        let list = index % comptime!(LISTS as u32) * keys;
        let next_list = (index + 1) % comptime!(LISTS as u32) * keys;
        let last_list = (index + 2) % comptime!(LISTS as u32) * keys;
        let mut key = NO_ROW.runtime();
        if UNIT_POS < keys {
            if index + 2 < walk.tiles {
                key = key_of(&walk, plan, &sizes, index + 2, UNIT_POS, stripe, config.walk);
                stripe = stripe_at(&walk, plan, index + 3, UNIT_POS, config.walk);
            }
        }
        plane_scores::<E, N>(&queries, &stage, 0, &mut scores, tile);
        if UNIT_POS < keys {
            k_rows[(last_list + UNIT_POS) as usize] = key;
        }
        sync_cube();
        put_rows::<E, N>(&carried_values, &mut stage, keys, tile);
        put_rows::<E, N>(&carried_keys, &mut stage, 0, tile);

        // Whether a row of the cube may not see a key of the tile, or the tile is not full.
        let mut hides = false.runtime();
        #[unroll]
        for step in 0..comptime!(tile.keys.div_ceil(size.narrowest)) {
            let slot = UNIT_POS % PLANE_DIM + comptime!((step * size.narrowest) as u32);
            if slot < keys {
                hides = hides || k_rows[(list + slot) as usize] > start;
            }
        }
        hides = plane_any(hides);
        let mut grows = false.runtime();
        #[unroll]
        for r in 0..tile.unit_rows() {
            let slot = unit_row(r, tile);
            let holds = own && slot < plane_rows;
            let row = first_slot + slot;
            let mut held = Array::<Quad<f32>>::new(comptime!(tile.quads()));
            let mut tile_max = MASKED.runtime();
            if holds {
                #[unroll]
                for c in 0..tile.quads() {
                    let at = row * score_pitch + quad_at(c, slot, tile);
                    held[c] = scores[at as usize] * Quad::new(scale);
                }
                if hides {
                    #[unroll]
                    for c in 0..tile.quads() {
                        let mut quad = held[c];
                        #[unroll]
                        for e in 0..4usize {
                            let col = list + quad_at(c, slot, tile) * 4 + comptime!(e as u32);
                            quad[e] = select(k_rows[col as usize] <= start + row, quad[e], MASKED);
                        }
                        held[c] = quad;
                    }
                }
                let mut largest = held[0];
                #[unroll]
                for c in 1..tile.quads() {
                    largest = max(largest, held[c]);
                }
                tile_max = quad_max(largest);
            }
            tile_max = shared_max(tile_max, tile);
            let mut factor = 1.0f32;
            if tile_max > maximum[r] + SLACK {
                factor = (maximum[r] - tile_max).exp();
                maximum[r] = tile_max;
                grows = true;
            }
            if holds {
                let mut total = Quad::<f32>::new(0.0);
                #[unroll]
                for c in 0..tile.quads() {
                    let weight = (held[c] - Quad::new(maximum[r])).exp();
                    total += weight;
                    let at = row * weight_pitch + quad_at(c, slot, tile);
                    weights[at as usize] = rounded_vector::<E, Const<4>>(weight);
                }
                sum[r] = sum[r] * factor + quad_sum(total);
                if part == 0 {
                    factors[row as usize] = factor;
                }
            }
        }
        grows = plane_any(grows);
        if own && UNIT_POS % PLANE_DIM == 0 {
            grown[plane as usize] = u32::cast_from(grows);
        }
        sync_cube();
        carry_rows::<E, N>(v, v_base, &k_rows, next_list, &mut carried_values, tile);
        carry_rows::<E, N>(k, k_base, &k_rows, last_list, &mut carried_keys, tile);
        let mut any = 0u32;
        #[unroll]
        for p in 0..tile.planes {
            any += grown[p];
        }
        // The same for the whole cube, so the barriers stay uniform.
        if any != 0 && index > 0 {
            scale_sums(&sums, &mut scores, &factors, first_slot, own, tile);
        }
        if own {
            add_values::<E, N>(&weights, &stage, &sums, first_slot, tile);
        }
    }

    #[unroll]
    for r in 0..tile.unit_rows() {
        sum[r] = shared_sum(sum[r], tile);
    }
    let row_stride = out.stride(2) / width;
    let out_base = (batch as usize * out.stride(0) + (head % sizes.q_heads) as usize * out.stride(1)) / width;
    #[unroll]
    for col in 0..out_cols {
        sync_cube();
        if own {
            store_column(&sums, &mut scores, first_slot, col, tile);
        }
        sync_cube();
        #[unroll]
        for r in 0..tile.unit_rows() {
            let slot = unit_row(r, tile);
            if own && slot < plane_rows {
                let row = first_slot + slot;
                let query = q_rows[row as usize];
                if query != NO_ROW {
                    #[unroll]
                    for number in 0..comptime!((size.n / 4).div_ceil(tile.sharers())) {
                        let at = comptime!((number * tile.sharers()) as u32) + part;
                        if at < comptime!((size.n / 4) as u32) {
                            let quad = scores[(row * score_pitch + at) as usize] / Quad::new(sum[r]);
                            let first = comptime!((col * size.n) as u32) + at * 4;
                            let to = out_base + query as usize * row_stride + first as usize / width;
                            #[unroll]
                            for vector in 0..comptime!(4 / width) {
                                let mut value = Vector::<f32, N>::new(0.0);
                                #[unroll]
                                for e in 0..width {
                                    value[e] = quad[comptime!(vector * width + e)];
                                }
                                out[to + vector] = rounded_vector::<E, N>(value);
                            }
                        }
                    }
                    if comptime!(col == 0) {
                        if part == 0 {
                            let at = head as usize * sizes.q_len as usize + query as usize;
                            lse[at] = maximum[r] + sum[r].ln();
                        }
                    }
                }
            }
        }
    }
}
