//! Sampling pass 1, and the mass per band, over [row tiles of planes](crate::plane_tile): cubes own sampled
//! rows and stream all keys. See [`sample`](crate::sample) and [`ladder`](crate::ladder).

use cubecl::prelude::*;

use crate::{
    band_mass::{BandOutput, add_band_masses, key_weight},
    call::Call,
    plane_stage::{carry_span, load_rows, new_stage, put_rows},
    plane_tile::{
        PLANE_ROWS, PlaneTile, Quad, new_scores, plane_scores, quad_at, quad_max, quad_sum, shared_max,
        shared_sum, unit_row,
    },
    sample::{Sampled, list_sampled_rows},
    square_tile::{MASKED, MAX_START, NO_ROW, head_base},
    tensor::{array, grid},
    walk::Sizes,
};

/// Compile-time choices of the row kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RowConfig {
    tile: PlaneTile,
    block: u32,
    /// Sum the mass per band, given the log-sum-exp, instead of computing the latter.
    bands: bool,
}

/// Pass 1.
pub(crate) fn row_lse_plane<R: Runtime>(call: &Call<'_, R>, sampled: &Sampled, tile: PlaneTile) {
    launch_rows(call, sampled, None, tile);
}

/// Mass per band of each row tile.
pub(crate) fn band_mass_plane<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    output: BandOutput<'_>,
    tile: PlaneTile,
) {
    launch_rows(call, sampled, Some(output), tile);
}

fn launch_rows<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    bands: Option<BandOutput<'_>>,
    tile: PlaneTile,
) {
    let config = RowConfig { tile, block: call.block(), bands: bands.is_some() };
    let unused = call.words(1);
    let (masses, weights) = match bands {
        Some(output) => (output.masses_arg(), output.weights_arg(call)),
        None => (array(&unused, 1), ComptimeOptionArgs::None),
    };
    // SAFETY: the kernel reads rows below q_len and keys below kv_len only.
    unsafe {
        plane_row_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads() * call.samples().div_ceil(tile.rows())),
            tile.cube_dim(),
            call.inputs.address_type(),
            call.inputs.vector_width(4),
            call.inputs.q.arg(),
            call.inputs.k.arg(),
            array(&sampled.rows, call.samples()),
            array(&sampled.lse, call.heads() * call.samples()),
            weights,
            masses,
            call.sizes(),
            call.scale,
            config,
            call.inputs.q.dtype,
        );
    }
}

/// One barrier a key tile: while the planes reduce its scores, the next one is staged in the other half.
#[cube(launch_unchecked, address_type = "dynamic")]
fn plane_row_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
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
    let width = N::value();
    let count = comptime!(tile.rows() as u32);
    let keys = comptime!(tile.keys as u32);
    let units = comptime!(tile.units() as u32);
    let score_pitch = comptime!(tile.score_pitch() as u32 / 4);
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
    let q_base = head_base::<E, N>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, N>(k, batch, head % sizes.q_heads / sizes.group);
    let position = sizes.kv_len - sizes.q_len;
    let lse_base = head * sizes.samples + first;
    let mass_base = (head * row_tiles + row_tile) as usize * sizes.blocks as usize;
    let plane = UNIT_POS / PLANE_DIM;
    let own = plane < comptime!(tile.planes as u32);
    let first_slot = plane * comptime!(PLANE_ROWS as u32);

    let mut q_rows = SharedMemory::<u32>::new(tile.rows());
    let mut row_mass = SharedMemory::<f32>::new(comptime!(if config.bands { tile.rows() } else { 1 }));
    let mut stage = new_stage::<E, N>(tile);
    let mut scores = new_scores(tile);
    list_sampled_rows(&mut q_rows, rows, first, sizes.samples, count, units);
    if comptime!(config.bands) {
        let mut d = UNIT_POS;
        while d < sizes.blocks {
            masses[mass_base + d as usize] = 0.0;
            d += units;
        }
        sync_storage();
    }
    sync_cube();
    let queries = load_rows::<E, N>(q, q_base, &q_rows, &mut stage, tile);

    // Positions of the unit's rows; a missing row sees every key and is not written.
    let mut sees = Array::<u32>::new(comptime!(tile.unit_rows()));
    // Each unit keeps the maximum and the sum of its own columns; they meet at the end.
    let mut maximum = Array::<f32>::new(comptime!(tile.unit_rows()));
    let mut sum = Array::<f32>::new(comptime!(tile.unit_rows()));
    #[unroll]
    for r in 0..tile.unit_rows() {
        let slot = unit_row(r, tile);
        let row = first_slot + slot;
        sees[r] = NO_ROW;
        maximum[r] = MAX_START;
        sum[r] = 0.0;
        if own && slot < comptime!(PLANE_ROWS as u32) {
            if first + row < sizes.samples {
                sees[r] = position + q_rows[row as usize];
                if comptime!(config.bands) {
                    maximum[r] = lse[(lse_base + row) as usize];
                }
            }
        }
    }
    let last_row = rows[((first + count).min(sizes.samples) - 1) as usize];
    let key_tiles = (position + last_row) / keys + 1;
    let first_sees = position + q_rows[0];

    let mut carried = Array::<Vector<E, N>>::new(comptime!(tile.carried(width)));
    carry_span::<E, N>(k, k_base, 0, sizes.kv_len, &mut carried, tile);
    put_rows::<E, N>(&carried, &mut stage, 0, tile);
    carry_span::<E, N>(k, k_base, keys, sizes.kv_len, &mut carried, tile);
    sync_cube();

    for index in 0..key_tiles {
        if index + 1 < key_tiles {
            put_rows::<E, N>(&carried, &mut stage, (index + 1) % 2 * keys, tile);
            carry_span::<E, N>(k, k_base, (index + 2) * keys, sizes.kv_len, &mut carried, tile);
        }
        // The plane is done with its scores of the tile before this one.
        sync_plane();
        plane_scores::<E, N>(&queries, &stage, index % 2 * keys, &mut scores, tile);
        sync_cube();

        let reaches_edge = (index + 1) * keys > first_sees + 1;
        #[unroll]
        for r in 0..tile.unit_rows() {
            let slot = unit_row(r, tile);
            if own && slot < comptime!(PLANE_ROWS as u32) {
                let mut held = Array::<Quad<f32>>::new(comptime!(tile.quads()));
                #[unroll]
                for c in 0..tile.quads() {
                    let at = (first_slot + slot) * score_pitch + quad_at(c, slot, tile);
                    held[c] = scores[at as usize];
                }
                if reaches_edge {
                    #[unroll]
                    for c in 0..tile.quads() {
                        let mut quad = held[c];
                        #[unroll]
                        for e in 0..4usize {
                            let key = index * keys + quad_at(c, slot, tile) * 4 + comptime!(e as u32);
                            quad[e] = select(key <= sees[r], quad[e], MASKED);
                        }
                        held[c] = quad;
                    }
                }
                if comptime!(!config.bands) {
                    let mut largest = held[0];
                    #[unroll]
                    for c in 1..tile.quads() {
                        largest = max(largest, held[c]);
                    }
                    let new_max = max(maximum[r], quad_max(largest) * scale);
                    sum[r] *= (maximum[r] - new_max).exp();
                    maximum[r] = new_max;
                }
                let mut mass = Quad::<f32>::new(0.0);
                #[unroll]
                for c in 0..tile.quads() {
                    let mut part = fma(held[c], Quad::new(scale), Quad::new(-maximum[r])).exp();
                    if comptime!(weights.is_some()) {
                        #[unroll]
                        for e in 0..4usize {
                            let key = index * keys + quad_at(c, slot, tile) * 4 + comptime!(e as u32);
                            part[e] = part[e] * key_weight(weights, head, key, &sizes);
                        }
                    }
                    mass += part;
                }
                sum[r] += quad_sum(mass);
            }
        }

        if comptime!(config.bands) {
            let key_block = index * keys / config.block;
            let block_ends = (index + 1) * keys % config.block == 0 || index + 1 == key_tiles;
            // The same for the whole cube, so the barriers stay uniform.
            if block_ends {
                #[unroll]
                for r in 0..tile.unit_rows() {
                    let slot = unit_row(r, tile);
                    let total = shared_sum(sum[r], tile);
                    if own && slot < comptime!(PLANE_ROWS as u32) {
                        row_mass[(first_slot + slot) as usize] = total;
                    }
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
        for r in 0..tile.unit_rows() {
            let slot = unit_row(r, tile);
            let row = first_slot + slot;
            let row_max = shared_max(maximum[r], tile);
            let total = shared_sum(sum[r] * (maximum[r] - row_max).exp(), tile);
            let holds = own && slot < comptime!(PLANE_ROWS as u32) && first + row < sizes.samples;
            if holds && UNIT_POS % PLANE_DIM % comptime!(tile.sharers() as u32) == 0 {
                lse[(lse_base + row) as usize] = row_max + total.ln();
            }
        }
    }
}
