//! Sampled mass per band, for the rules that choose bands: [`ladder`](crate::ladder) and
//! [`contribution`](crate::contribution). The kernel here works by square tiles.

use cubecl::{prelude::*, server::Handle};

use crate::{
    call::Call,
    mma_rows::band_mass_mma,
    plane_rows::band_mass_plane,
    sample::{Sampled, list_keys, list_sampled_rows},
    square_tile::{NO_ROW, PART, SquareTile, head_base, new_stage, score_tile},
    tensor::{array, grid},
    walk::Sizes,
};

/// The sampled rows' mass and entries by band.
pub(crate) struct BandMasses {
    /// `f32 [heads, row tiles, blocks]`.
    masses: Handle,
    /// Tiles of sampled rows, whose masses are kept apart.
    pub row_tiles: usize,
    /// `f32 [blocks]`: sampled entries, the same for all heads.
    pub entries: Handle,
}

impl BandMasses {
    /// The masses as a kernel argument.
    pub fn masses_arg<R: Runtime>(&self, heads: usize, blocks: usize) -> ArrayArg<R> {
        array(&self.masses, heads * self.row_tiles * blocks)
    }
}

/// What a kernel of band masses writes, and what it weighs keys by.
#[derive(Clone, Copy)]
pub(crate) struct BandOutput<'a> {
    masses: &'a Handle,
    len: usize,
    weights: Option<&'a Handle>,
}

impl BandOutput<'_> {
    /// The masses as a kernel argument.
    pub fn masses_arg<R: Runtime>(&self) -> ArrayArg<R> {
        array(self.masses, self.len)
    }

    /// The weights as a kernel argument.
    pub fn weights_arg<R: Runtime>(&self, call: &Call<'_, R>) -> ComptimeOptionArgs<Array<f32>, R> {
        let len = call.shape.batch * call.shape.kv_heads * call.shape.kv_len;
        self.weights.map_or(ComptimeOptionArgs::None, |weights| ComptimeOptionArgs::Some(array(weights, len)))
    }
}

/// What a key weighs; keys beyond the last weigh as much as that.
#[cube]
pub(crate) fn key_weight(weights: &ComptimeOption<Array<f32>>, head: u32, key: u32, sizes: &Sizes) -> f32 {
    #[comptime]
    match weights {
        ComptimeOption::Some(weights) => {
            let kv_head = head / sizes.group;
            weights[(kv_head * sizes.kv_len + min(key, sizes.kv_len - 1)) as usize]
        }
        ComptimeOption::None => 1.0f32.runtime(),
    }
}

/// Sums the sampled mass per band, given the rows' log-sum-exp. With `weights`, `f32 [batch x kv_heads, kv_len]`, each
/// entry counts as much as its key weighs.
pub(crate) fn band_masses<R: Runtime>(
    call: &Call<'_, R>,
    sampled: &Sampled,
    weights: Option<&Handle>,
) -> BandMasses {
    let (heads, blocks) = (call.heads(), call.shape.blocks(call.options));
    let tile_rows = match (call.mma, call.plane) {
        (Some(tiles), _) => tiles.sample.rows(),
        (None, Some(tiles)) => tiles.sample.rows(),
        (None, None) => call.square.edge,
    };
    let row_tiles = call.samples().div_ceil(tile_rows);
    let len = heads * row_tiles * blocks;
    let masses = call.words(len);
    let output = BandOutput { masses: &masses, len, weights };
    match (call.mma, call.plane) {
        (Some(tiles), _) => band_mass_mma(call, sampled, output, tiles.sample),
        (None, Some(tiles)) => band_mass_plane(call, sampled, output, tiles.sample),
        (None, None) => band_mass(call, sampled, output),
    }
    let entries = call.client.create_from_slice(f32::as_bytes(&band_entries(call, blocks)));
    BandMasses { masses, row_tiles, entries }
}

/// Sampled entries of each band.
fn band_entries<R: Runtime>(call: &Call<'_, R>, blocks: usize) -> Vec<f32> {
    let block = call.options.block_size;
    let mut entries = vec![0.0; blocks];
    for &row in &call.rows {
        let position = call.shape.offset() + row as usize;
        entries[0] += (position % block + 1) as f32;
        for count in &mut entries[1..=position / block] {
            *count += block as f32;
        }
    }
    entries
}

/// Mass per band of each row tile.
fn band_mass<R: Runtime>(call: &Call<'_, R>, sampled: &Sampled, output: BandOutput<'_>) {
    let tile = call.square;
    // SAFETY: rows below q_len, keys below kv_len, distances below `blocks`.
    unsafe {
        band_mass_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads() * call.samples().div_ceil(tile.edge)),
            tile.cube_dim(),
            call.inputs.address_type(),
            call.inputs.vector_width(4),
            call.inputs.q.arg(),
            call.inputs.k.arg(),
            array(&sampled.rows, call.samples()),
            array(&sampled.lse, call.heads() * call.samples()),
            output.weights_arg(call),
            output.masses_arg(),
            call.sizes(),
            call.scale,
            tile,
            call.block(),
            call.inputs.q.dtype,
        );
    }
}

/// A cube owns a tile of rows, as in pass 1; the barriers between key blocks let the cube's units
/// add to one distance in turn.
#[cube(launch_unchecked, address_type = "dynamic")]
fn band_mass_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    rows: &Array<u32>,
    lse: &Array<f32>,
    weights: &ComptimeOption<Array<f32>>,
    masses: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    #[comptime] tile: SquareTile,
    #[comptime] block: u32,
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
    let row_tile = row_tiles - 1 - item / heads;
    let first = row_tile * edge;
    let head = item % heads;
    let batch = head / sizes.q_heads;
    let q_base = head_base::<E, N>(q, batch, head % sizes.q_heads);
    let k_base = head_base::<E, N>(k, batch, head % sizes.q_heads / sizes.group);
    let position = sizes.kv_len - sizes.q_len;
    let mass_base = (head * row_tiles + row_tile) as usize * sizes.blocks as usize;

    let mut q_rows = SharedMemory::<u32>::new(tile.edge);
    let mut k_rows = SharedMemory::<u32>::new(tile.edge);
    let mut row_lse = SharedMemory::<f32>::new(tile.edge);
    let mut row_mass = SharedMemory::<f32>::new(tile.edge);
    let mut partial = SharedMemory::<f32>::new(comptime!(tile.edge * tile.side()));
    let mut stage = new_stage::<N>(tile);
    list_sampled_rows(&mut q_rows, rows, first, sizes.samples, edge, units);
    if UNIT_POS < edge && first + UNIT_POS < sizes.samples {
        row_lse[UNIT_POS as usize] = lse[(head * sizes.samples + first + UNIT_POS) as usize];
    }
    let mut d = UNIT_POS;
    while d < sizes.blocks {
        masses[mass_base + d as usize] = 0.0;
        d += units;
    }
    sync_storage();
    sync_cube();

    let mut scores = Array::<f32>::new(PART * PART);
    let mut sums = Array::<f32>::new(PART);
    let last_row = rows[((first + edge).min(sizes.samples) - 1) as usize];
    let per_block = comptime!(block / edge);
    for key_block in 0..(position + last_row) / block + 1 {
        #[unroll]
        for i in 0..PART {
            sums[i] = 0.0;
        }
        for sub in 0..per_block {
            sync_cube();
            list_keys(&mut k_rows, key_block * block + sub * edge, sizes.kv_len, edge);
            score_tile::<E, N>(q, q_base, &q_rows, k, k_base, &k_rows, &mut stage, &mut scores, tile);
            #[unroll]
            for i in 0..PART {
                let slot = (unit_row + comptime!(i as u32) * side) as usize;
                let row = q_rows[slot];
                #[unroll]
                for j in 0..PART {
                    let key = k_rows[(unit_col + comptime!(j as u32) * side) as usize];
                    if row != NO_ROW && key <= position + row {
                        let mass = (scores[i * PART + j] * scale - row_lse[slot]).exp();
                        sums[i] += mass * key_weight(weights, head, key, &sizes);
                    }
                }
            }
        }
        #[unroll]
        for i in 0..PART {
            let slot = unit_row + comptime!(i as u32) * side;
            partial[(slot * side + unit_col) as usize] = sums[i];
        }
        sync_cube();
        if UNIT_POS < edge {
            let mut sum = 0.0f32;
            for j in 0..side {
                sum += partial[(UNIT_POS * side + j) as usize];
            }
            row_mass[UNIT_POS as usize] = sum;
        }
        sync_cube();
        add_band_masses(&q_rows, &row_mass, masses, mass_base, key_block, position, edge, units, block);
        sync_storage();
    }
}

/// Adds the rows' masses in a key block to their distances. The first row of each position block
/// adds for all that share it, so no two units meet.
#[cube]
pub(crate) fn add_band_masses(
    q_rows: &SharedMemory<u32>,
    row_mass: &SharedMemory<f32>,
    masses: &mut Array<f32>,
    mass_base: usize,
    key_block: u32,
    position: u32,
    #[comptime] count: u32,
    #[comptime] units: u32,
    #[comptime] block: u32,
) {
    #[unroll]
    for step in 0..comptime!(count.div_ceil(units)) {
        let first = UNIT_POS + comptime!(step * units);
        // Both sides of an `&&` are evaluated: a unit without a row must not look it up.
        let mut row = NO_ROW.runtime();
        if first < count {
            row = q_rows[first as usize];
        }
        if row != NO_ROW {
            let own_block = (position + row) / block;
            let mut leads = own_block >= key_block;
            if first > 0 {
                let before = (position + q_rows[(first - 1) as usize]) / block;
                leads = leads && before != own_block;
            }
            if leads {
                let mut sum = 0.0f32;
                let mut slot = first;
                let mut same = true.runtime();
                while same {
                    sum += row_mass[slot as usize];
                    slot += 1;
                    same = false;
                    if slot < count {
                        let row = q_rows[slot as usize];
                        same = row != NO_ROW && (position + row) / block == own_block;
                    }
                }
                masses[mass_base + (own_block - key_block) as usize] += sum;
            }
        }
    }
}
