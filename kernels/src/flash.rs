//! Stage 3, sparse attention (arXiv 2406.15486, section 4.4): one online-softmax loop over the key
//! tiles of a [walk](crate::walk), for dense, sparse and tail rows alike.

use cubecl::{prelude::*, server::Handle};

use crate::{
    Plan, TileProduct,
    call::Call,
    decode::{MAX_DECODE_QUERIES, split_keys},
    flash_mma::flash_mma,
    flash_plane::flash_plane,
    rounding::rounded_vector,
    square_tile::{
        MASKED, MAX_START, NO_ROW, PART, SquareTile, head_base, new_stage, score_tile, value_tile,
    },
    tensor::{array, grid},
    walk::{PlanArgs, Sizes, WalkTile, key_at, plan_args, start_walk},
};

/// Compile-time choices of the flash kernel over square tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct SquareFlash {
    tile: SquareTile,
    walk: WalkTile,
}

/// Attention over the plan's keys, or over all keys without one. Writes the output and `lse`,
/// `f32 [heads, q_len]`.
pub(crate) fn flash<R: Runtime>(call: &Call<'_, R>, plan: Option<&Plan>, lse: &Handle) {
    let few = call.shape.q_len <= MAX_DECODE_QUERIES && call.options.product == TileProduct::Auto;
    match call.mma {
        _ if plan.is_none() && few => split_keys(call, lse),
        Some(tiles) => flash_mma(call, plan, lse, tiles.flash),
        None => match call.plane {
            Some(tiles) => flash_plane(call, plan, lse, tiles.flash),
            None => flash_square(call, plan, lse),
        },
    }
}

fn flash_square<R: Runtime>(call: &Call<'_, R>, plan: Option<&Plan>, lse: &Handle) {
    let (shape, inputs, tile) = (&call.shape, &call.inputs, call.square);
    let config = SquareFlash {
        tile,
        walk: WalkTile {
            block: call.block(),
            query_tile: tile.edge as u32,
            key_tile: tile.edge as u32,
            dense: plan.is_none(),
        },
    };
    // SAFETY: rows come from the walk, which yields keys below kv_len only.
    unsafe {
        square_flash_kernel::launch_unchecked::<R>(
            call.client,
            grid(shape.heads() * shape.query_tiles(tile.edge)),
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
            call.inputs.q.dtype,
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn square_flash_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    v: &Tensor<Vector<E, N>>,
    plan: &PlanArgs,
    out: &mut Tensor<Vector<E, N>>,
    lse: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] config: SquareFlash,
    #[define(E)] _dtype: StorageType,
) {
    let tile = comptime!(config.tile);
    let width = N::value();
    let edge = comptime!(tile.edge as u32);
    let side = comptime!(tile.side() as u32);
    let vectors = comptime!(tile.out_vectors(width));
    let unit_row = UNIT_POS / side;
    let unit_col = UNIT_POS % side;
    let heads = q.shape(0) as u32 * sizes.q_heads;
    let position = sizes.kv_len - sizes.q_len;
    let first_tile = position / edge;
    let query_tiles = sizes.kv_len.div_ceil(edge) - first_tile;
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= heads * query_tiles {
        terminate!();
    }
    // Longest first: the tail and the highest positions. Neighbouring cubes are heads of one
    // group, which share their keys in the cache.
    let start = (first_tile + query_tiles - 1 - item / heads) * edge;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let kv_head = head % sizes.q_heads / sizes.group;
    let q_base = head_base::<E, N>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, N>(k, batch, kv_head);
    let v_base = head_base::<E, N>(v, batch, kv_head);

    let mut q_rows = SharedMemory::<u32>::new(tile.edge);
    let mut k_rows = SharedMemory::<u32>::new(tile.edge);
    let mut stage = new_stage::<N>(tile);
    let mut weights = SharedMemory::<f32>::new(comptime!(tile.edge * tile.edge));
    let mut partial = SharedMemory::<f32>::new(comptime!(tile.edge * tile.side()));

    if UNIT_POS < edge {
        let at = start + UNIT_POS;
        let mut row = NO_ROW.runtime();
        if at >= position && at < sizes.kv_len {
            row = at - position;
        }
        q_rows[UNIT_POS as usize] = row;
    }

    let mut acc = Array::<Vector<f32, N>>::new(comptime!(PART * vectors));
    #[unroll]
    for i in 0..comptime!(PART * vectors) {
        acc[i] = Vector::new(0.0);
    }
    let mut maximum = Array::<f32>::new(PART);
    // Of the unit's own columns; summed over the row at the end.
    let mut sum = Array::<f32>::new(PART);
    #[unroll]
    for i in 0..PART {
        maximum[i] = MAX_START;
        sum[i] = 0.0;
    }
    let mut scores = Array::<f32>::new(PART * PART);

    let walk = start_walk(plan, &sizes, head, start, config.walk);
    for index in 0..walk.tiles {
        sync_cube();
        if UNIT_POS < edge {
            k_rows[UNIT_POS as usize] = key_at(&walk, plan, &sizes, index, UNIT_POS, config.walk);
        }
        score_tile::<E, N>(q, q_base, &q_rows, k, k_base, &k_rows, &mut stage, &mut scores, tile);
        #[unroll]
        for i in 0..PART {
            let row = unit_row + comptime!(i as u32) * side;
            let mut part_max = MASKED.runtime();
            #[unroll]
            for j in 0..PART {
                let key = k_rows[(unit_col + comptime!(j as u32) * side) as usize];
                let score = scores[i * PART + j] * scale;
                scores[i * PART + j] = select(key <= start + row, score, MASKED);
                part_max = max(part_max, scores[i * PART + j]);
            }
            partial[(row * side + unit_col) as usize] = part_max;
        }
        sync_cube();
        #[unroll]
        for i in 0..PART {
            let row = unit_row + comptime!(i as u32) * side;
            let mut new_max = maximum[i];
            for j in 0..side {
                new_max = max(new_max, partial[(row * side + j) as usize]);
            }
            let shrink = (maximum[i] - new_max).exp();
            maximum[i] = new_max;
            sum[i] *= shrink;
            #[unroll]
            for c in 0..vectors {
                acc[i * vectors + c] *= Vector::new(shrink);
            }
            #[unroll]
            for j in 0..PART {
                let weight = (scores[i * PART + j] - new_max).exp();
                sum[i] += weight;
                let col = unit_col + comptime!(j as u32) * side;
                weights[(row * edge + col) as usize] = weight;
            }
        }
        value_tile::<E, N>(v, v_base, &k_rows, &weights, &mut stage, &mut acc, tile);
    }

    sync_cube();
    #[unroll]
    for i in 0..PART {
        let row = unit_row + comptime!(i as u32) * side;
        partial[(row * side + unit_col) as usize] = sum[i];
    }
    sync_cube();
    let row_stride = out.stride(2) / N::value();
    let out_base =
        (batch as usize * out.stride(0) + (head % sizes.q_heads) as usize * out.stride(1)) / N::value();
    #[unroll]
    for i in 0..PART {
        let row = unit_row + comptime!(i as u32) * side;
        let mut total = 0.0f32;
        for j in 0..side {
            total += partial[(row * side + j) as usize];
        }
        let query = q_rows[row as usize];
        if query != NO_ROW {
            #[unroll]
            for c in 0..vectors {
                let col = unit_col + comptime!(c as u32) * side;
                if col < comptime!((tile.head_dim / width) as u32) {
                    let value = acc[i * vectors + c] / Vector::new(total);
                    let at = out_base + query as usize * row_stride + col as usize;
                    out[at] = rounded_vector::<E, N>(value);
                }
            }
            if unit_col == 0 {
                let at = head as usize * sizes.q_len as usize + query as usize;
                lse[at] = maximum[i] + total.ln();
            }
        }
    }
}
