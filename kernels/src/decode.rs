//! A few queries against a long cache: the keys are split over cubes, and a second kernel merges
//! the parts by their log-sum-exps.
//!
//! The query heads that share a key/value head are rows of one tile, so that each key is loaded
//! once for all of them. The work is bound by memory: plain units suffice on every device.

use cubecl::{prelude::*, server::Handle};

use crate::{
    call::Call,
    rounding::rounded_vector,
    square_tile::{MASKED, MAX_START, head_base},
    tensor::{array, grid},
    walk::Sizes,
};

/// Units of a cube.
const UNITS: usize = 128;

/// Queries per head up to which [`dense_attention`](crate::dense_attention) splits the keys.
pub const MAX_DECODE_QUERIES: usize = 16;

/// Compile-time choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct DecodeConfig {
    head_dim: usize,
    /// Rows of a tile: queries of all heads of a group.
    rows: usize,
    /// Keys of a tile; divides [`UNITS`].
    keys: usize,
}

impl DecodeConfig {
    fn new(head_dim: usize, element: usize, rows: usize) -> Self {
        // Keys, then values, of a tile take at most 16 KiB.
        let fitting = 16_384 / ((head_dim + 16) * element);
        Self { head_dim, rows: rows.next_power_of_two().min(16), keys: (1 << fitting.ilog2()).min(UNITS) }
    }

    fn cols(&self, width: usize) -> usize {
        self.head_dim / width
    }

    /// Output vectors per unit.
    fn outputs(&self, width: usize) -> usize {
        (self.rows * self.cols(width)).div_ceil(UNITS)
    }

    /// Unit groups that share a tile's keys when it has fewer outputs than there are units.
    fn shares(&self, width: usize) -> usize {
        (UNITS / (self.rows * self.cols(width))).max(1)
    }
}

/// Causal attention over all keys. Writes the output and `lse`, `f32 [heads, q_len]`.
pub(crate) fn split_keys<R: Runtime>(call: &Call<'_, R>, lse: &Handle) {
    let (shape, inputs) = (&call.shape, &call.inputs);
    let hardware = &call.client.properties().hardware;
    let widest = (16 / inputs.q.dtype.size()).min(hardware.max_vector_size);
    let width = inputs.vector_width(widest);
    let rows = shape.group() * shape.q_len;
    let config = DecodeConfig::new(shape.head_dim, inputs.q.dtype.size(), rows);
    let row_tiles = rows.div_ceil(config.rows);
    let tiles = shape.batch * shape.kv_heads * row_tiles;

    // Enough cubes to keep every processor's loads in flight.
    let processors = hardware.num_streaming_multiprocessors.unwrap_or(32) as usize;
    let key_tiles = shape.kv_len.div_ceil(config.keys);
    let splits = (4 * processors).div_ceil(tiles).clamp(1, key_tiles);
    let run = key_tiles.div_ceil(splits);
    let splits = key_tiles.div_ceil(run);
    let parts = splits * config.shares(width);
    let all_rows = tiles * config.rows;
    let sums = call.words(all_rows * parts * shape.head_dim);
    let norms = call.words(all_rows * parts * 2);

    // SAFETY: rows below q_len, keys below kv_len, parts as allocated.
    unsafe {
        decode_kernel::launch_unchecked::<R>(
            call.client,
            grid(tiles * splits),
            CubeDim::new_1d(UNITS as u32),
            inputs.address_type(),
            width,
            inputs.q.arg(),
            inputs.k.arg(),
            inputs.v.arg(),
            array(&sums, all_rows * parts * shape.head_dim / width),
            array(&norms, all_rows * parts * 2),
            call.sizes(),
            call.scale,
            run as u32,
            splits as u32,
            config,
            inputs.q.dtype,
        );
        merge_kernel::launch_unchecked::<R>(
            call.client,
            grid(all_rows),
            CubeDim::new_1d(config.cols(width) as u32),
            inputs.address_type(),
            width,
            array(&sums, all_rows * parts * shape.head_dim / width),
            array(&norms, all_rows * parts * 2),
            inputs.out.arg(),
            array(lse, shape.heads() * shape.q_len),
            call.sizes(),
            parts as u32,
            config,
            inputs.q.dtype,
        );
    }
}

/// Head (in its group) and query of a row of the stacked tile.
#[derive(CubeType, Clone, Copy)]
struct StackedRow {
    head: u32,
    query: u32,
    /// Whether there is such a row.
    present: bool,
}

#[cube]
fn stacked_row(row: u32, sizes: &Sizes) -> StackedRow {
    StackedRow { head: row / sizes.q_len, query: row % sizes.q_len, present: row < sizes.group * sizes.q_len }
}

/// `sums` is `f32 [tiles, rows, parts, head_dim]`, `norms` holds maximum and sum of each part.
#[cube(launch_unchecked, address_type = "dynamic")]
fn decode_kernel<E: Float, N: Size>(
    q: &Tensor<Vector<E, N>>,
    k: &Tensor<Vector<E, N>>,
    v: &Tensor<Vector<E, N>>,
    sums: &mut Array<Vector<f32, N>>,
    norms: &mut Array<f32>,
    sizes: Sizes,
    scale: f32,
    run: u32,
    splits: u32,
    #[comptime] config: DecodeConfig,
    #[define(E)] _dtype: StorageType,
) {
    let width = N::value();
    let units = comptime!(UNITS as u32);
    let rows = comptime!(config.rows as u32);
    let keys = comptime!(config.keys as u32);
    let cols = comptime!(config.cols(width) as u32);
    let pitch = comptime!(cols + 1);
    let outputs = comptime!(config.outputs(width));
    let shares = comptime!(config.shares(width) as u32);
    // Units that share a key in the products, and units that share a row in the maximum.
    let key_units = comptime!(units / keys);
    let row_units = comptime!(units / rows);

    let kv_heads = sizes.q_heads / sizes.group;
    let row_tiles = (sizes.group * sizes.q_len).div_ceil(rows);
    let tiles = q.shape(0) as u32 * kv_heads * row_tiles;
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if item >= tiles * splits {
        terminate!();
    }
    let split = item % splits;
    let tile = item / splits;
    let first_row = tile % row_tiles * rows;
    let kv_head = tile / row_tiles % kv_heads;
    let batch = tile / row_tiles / kv_heads;
    let position = sizes.kv_len - sizes.q_len;
    let k_base = head_base::<E, N>(k, batch, kv_head);
    let v_base = head_base::<E, N>(v, batch, kv_head);

    let mut queries = SharedMemory::<Vector<f32, N>>::new(comptime!(config.rows * config.cols(width)));
    let mut sees = SharedMemory::<u32>::new(config.rows);
    let mut stage = SharedMemory::<Vector<E, N>>::new(comptime!((keys * pitch) as usize));
    let mut weights = SharedMemory::<f32>::new(comptime!(config.rows * config.keys));
    let mut partial = SharedMemory::<f32>::new(UNITS);

    let mut index = UNIT_POS;
    while index < rows * cols {
        let row = stacked_row(first_row + index / cols, &sizes);
        let mut value = Vector::<f32, N>::new(0.0);
        if row.present {
            let base = head_base::<E, N>(q, batch, kv_head * sizes.group + row.head);
            let at = base + row.query as usize * (q.stride(2) / width) + (index % cols) as usize;
            value = Vector::cast_from(q[at]) * Vector::new(scale);
        }
        queries[index as usize] = value;
        index += units;
    }
    if UNIT_POS < rows {
        let row = stacked_row(first_row + UNIT_POS, &sizes);
        sees[UNIT_POS as usize] = position + row.query;
    }

    // Output vector `i` of a unit; units beyond the last one repeat it and are not stored.
    let mut acc = Array::<Vector<f32, N>>::new(outputs);
    #[unroll]
    for i in 0..outputs {
        acc[i] = Vector::new(0.0);
    }
    let share = UNIT_POS / (rows * cols) % shares;
    let own_row = UNIT_POS / row_units;
    let mut maximum = Array::<f32>::new(outputs);
    #[unroll]
    for i in 0..outputs {
        maximum[i] = MAX_START;
    }
    let mut row_max = MAX_START.runtime();
    let mut row_sum = 0.0f32;

    let first_tile = split * run;
    let last_tile = (first_tile + run).min(sizes.kv_len.div_ceil(keys));
    for key_tile in first_tile..last_tile {
        let first_key = key_tile * keys;
        sync_cube();
        stage_keys::<E, N>(k, k_base, first_key, sizes.kv_len, &mut stage, config);
        sync_cube();
        // A unit multiplies one key with every `key_units`-th row.
        let slot = UNIT_POS % keys;
        #[unroll]
        for step in 0..comptime!(rows.div_ceil(key_units)) {
            let row = UNIT_POS / keys + comptime!(step * key_units);
            if row < rows {
                let mut score = 0.0f32;
                for c in 0..cols {
                    let key = Vector::<f32, N>::cast_from(stage[(slot * pitch + c) as usize]);
                    score += queries[(row * cols + c) as usize].dot(key);
                }
                let visible = first_key + slot <= sees[row as usize];
                weights[(row * keys + slot) as usize] = select(visible, score, MASKED);
            }
        }
        sync_cube();
        // Values replace the keys while the weights are computed.
        stage_keys::<E, N>(v, v_base, first_key, sizes.kv_len, &mut stage, config);
        let lane = UNIT_POS % row_units;
        let mut part_max = MASKED.runtime();
        let mut at = lane;
        while at < keys {
            part_max = max(part_max, weights[(own_row * keys + at) as usize]);
            at += row_units;
        }
        partial[UNIT_POS as usize] = part_max;
        sync_cube();
        let mut new_max = row_max;
        for other in 0..row_units {
            new_max = max(new_max, partial[(own_row * row_units + other) as usize]);
        }
        row_sum *= (row_max - new_max).exp();
        row_max = new_max;
        at = lane;
        while at < keys {
            let weight = (weights[(own_row * keys + at) as usize] - new_max).exp();
            weights[(own_row * keys + at) as usize] = weight;
            row_sum += weight;
            at += row_units;
        }
        sync_cube();
        partial[UNIT_POS as usize] = row_max;
        sync_cube();
        #[unroll]
        for i in 0..outputs {
            let output = (UNIT_POS + comptime!(i as u32) * units) % (rows * cols);
            let row = output / cols;
            let new = partial[(row * row_units) as usize];
            acc[i] *= Vector::new((maximum[i] - new).exp());
            maximum[i] = new;
            let mut key = share;
            while key < keys {
                let value = Vector::<f32, N>::cast_from(stage[(key * pitch + output % cols) as usize]);
                acc[i] += Vector::new(weights[(row * keys + key) as usize]) * value;
                key += shares;
            }
        }
    }

    sync_cube();
    partial[UNIT_POS as usize] = row_sum;
    sync_cube();
    let parts = splits * shares;
    #[unroll]
    for i in 0..outputs {
        let output = UNIT_POS + comptime!(i as u32) * units;
        if output < rows * cols * shares {
            let row = output % (rows * cols) / cols;
            let col = output % cols;
            let part = (tile * rows + row) as usize * parts as usize + (split * shares + share) as usize;
            sums[part * cols as usize + col as usize] = acc[i];
            if col == 0 {
                // The whole sum goes with the first share.
                let mut total = 0.0f32;
                if share == 0 {
                    for other in 0..row_units {
                        total += partial[(row * row_units + other) as usize];
                    }
                }
                norms[2 * part] = maximum[i];
                norms[2 * part + 1] = total;
            }
        }
    }
}

/// Copies a tile of consecutive rows into the stage, zeros behind the last one.
#[cube]
fn stage_keys<E: Float, N: Size>(
    source: &Tensor<Vector<E, N>>,
    base: usize,
    first: u32,
    end: u32,
    stage: &mut SharedMemory<Vector<E, N>>,
    #[comptime] config: DecodeConfig,
) {
    let width = N::value();
    let cols = comptime!(config.cols(width) as u32);
    let row_stride = source.stride(2) / width;
    let mut index = UNIT_POS;
    while index < comptime!(config.keys as u32) * cols {
        let row = first + index / cols;
        let mut value = Vector::<E, N>::new(E::from_int(0));
        if row < end {
            value = source[base + row as usize * row_stride + (index % cols) as usize];
        }
        stage[(index / cols * (cols + 1) + index % cols) as usize] = value;
        index += comptime!(UNITS as u32);
    }
}

/// Merges the parts of a row; one cube per row, one unit per output vector.
#[cube(launch_unchecked, address_type = "dynamic")]
fn merge_kernel<E: Float, N: Size>(
    sums: &Array<Vector<f32, N>>,
    norms: &Array<f32>,
    out: &mut Tensor<Vector<E, N>>,
    lse: &mut Array<f32>,
    sizes: Sizes,
    parts: u32,
    #[comptime] config: DecodeConfig,
    #[define(E)] _dtype: StorageType,
) {
    let width = N::value();
    let rows = comptime!(config.rows as u32);
    let cols = comptime!(config.cols(width) as u32);
    let kv_heads = sizes.q_heads / sizes.group;
    let row_tiles = (sizes.group * sizes.q_len).div_ceil(rows);
    let item = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    let tile = item / rows;
    let row = stacked_row(tile % row_tiles * rows + item % rows, &sizes);
    let batch = tile / row_tiles / kv_heads;
    if batch >= out.shape(0) as u32 || !row.present {
        terminate!();
    }
    let head = tile / row_tiles % kv_heads * sizes.group + row.head;
    let first = item as usize * parts as usize;

    let mut maximum = MAX_START.runtime();
    for part in 0..parts {
        maximum = max(maximum, norms[2 * (first + part as usize)]);
    }
    let mut total = 0.0f32;
    let mut sum = Vector::<f32, N>::new(0.0);
    for part in 0..parts {
        let at = first + part as usize;
        let weight = (norms[2 * at] - maximum).exp();
        total += weight * norms[2 * at + 1];
        sum += Vector::new(weight) * sums[at * cols as usize + UNIT_POS as usize];
    }
    let base = (batch as usize * out.stride(0) + head as usize * out.stride(1)) / width;
    let at = base + row.query as usize * (out.stride(2) / width) + UNIT_POS as usize;
    out[at] = rounded_vector::<E, N>(sum / Vector::new(total));
    if UNIT_POS == 0 {
        lse[((batch * sizes.q_heads + head) * sizes.q_len + row.query) as usize] = maximum + total.ln();
    }
}
