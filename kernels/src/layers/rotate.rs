//! From a fused projection to attention's inputs: queries and keys turned, keys and values in the cache.

use cubecl::prelude::*;

use super::rows::{RowsView, check_device};
use crate::{
    Error, TensorView, f32_type,
    rounding::rounded,
    tensor::{array, grid},
};

/// Units of a cube.
const UNITS: usize = 256;

/// Which features of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// `(2i, 2i + 1)`.
    Interleaved,
    /// `(i, i + width/2)`.
    HalfSplit,
}

/// In which order a fused projection holds its heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Packing {
    /// All query heads, then all key heads, then all value heads.
    ByKind,
    /// For each key/value head its query heads, its key, its value.
    ByGroup,
}

/// The heads of a fused projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Their order.
    pub packing: Packing,
}

/// Rotary embedding of new positions and their way into the cache.
///
/// # Shapes
/// * qkv: `[batch x length, (q_heads + 2 kv_heads) x head_dim]`
/// * cos, sin: `[length, width / 2]`, `f32`; the first `width` features of each head turn
/// * q: `[batch, q_heads, length, head_dim]`, contiguous
/// * keys, values: `[batch, kv_heads, capacity, head_dim]`, with the same strides
#[derive(Debug)]
pub struct Rotate<'a, R: Runtime> {
    /// The projection.
    pub qkv: &'a RowsView,
    /// Its heads.
    pub heads: Heads,
    /// Cosines of the new positions.
    pub cos: &'a RowsView,
    /// Sines of the new positions.
    pub sin: &'a RowsView,
    /// How features pair up.
    pub pairs: Pairs,
    /// Every element is written.
    pub q: &'a TensorView<R>,
    /// The new positions are written, nothing else.
    pub keys: &'a TensorView<R>,
    /// The new positions are written, nothing else.
    pub values: &'a TensorView<R>,
    /// The first new position.
    pub start: usize,
}

/// Compile-time choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RotateConfig {
    pairs: Pairs,
    packing: Packing,
}

/// Runtime sizes, in elements.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct RotateSizes {
    rows: u32,
    length: u32,
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    /// Pairs that turn.
    half: u32,
    start: u32,
    qkv_stride: u32,
    table_stride: u32,
    cache_position: usize,
    cache_head: usize,
    cache_batch: usize,
}

/// Launches the rotation.
///
/// # Errors
/// Shapes, strides, types or memory that do not fit, or a device that does not know the type. Nothing has been
/// launched then.
pub fn rotate<R: Runtime>(client: &ComputeClient<R>, call: &Rotate<'_, R>) -> Result<(), Error> {
    let Rotate { qkv, heads, cos, sin, pairs, q, keys, values, start } = *call;
    let Heads { q_heads, kv_heads, packing } = heads;
    let [batch, _, length, head_dim] = q.shape;
    let dtype = qkv.dtype;
    if kv_heads == 0 || q_heads % kv_heads != 0 {
        return Err(Error::tensor("qkv", "query heads", q_heads, format!("a multiple of {kv_heads}")));
    }
    qkv.check("qkv", [batch * length, (q_heads + 2 * kv_heads) * head_dim], dtype)?;
    cos.check("cos", [length, cos.width], f32_type())?;
    sin.check("sin", [length, cos.width], f32_type())?;
    if 2 * cos.width > head_dim || sin.stride != cos.stride {
        let found = format!("[{}, {}]", cos.width, cos.stride);
        return Err(Error::tensor("cos", "width and stride", found, "half a head at most, as sin"));
    }
    q.check("q", [batch, q_heads, length, head_dim])?;
    let q_rows = RowsView::contiguous(q.handle.clone(), batch * q_heads * length, head_dim, q.dtype);
    q_rows.check("q", [q_rows.rows, head_dim], dtype)?;
    if q.strides != TensorView::<R>::contiguous(q.handle.clone(), q.shape, dtype).strides {
        return Err(Error::tensor("q", "strides", format!("{:?}", q.strides), "those of contiguous memory"));
    }
    let capacity = keys.shape[2];
    for (name, cache) in [("keys", keys), ("values", values)] {
        cache.check(name, [batch, kv_heads, capacity, head_dim])?;
        if cache.dtype != dtype || cache.strides != keys.strides {
            let found = format!("{} {:?}", cache.dtype, cache.strides);
            return Err(Error::tensor(
                name,
                "type and strides",
                found,
                format!("{dtype} {:?}", keys.strides),
            ));
        }
    }
    if start + length > capacity {
        return Err(Error::tensor("keys", "length", capacity, format!("at least {}", start + length)));
    }
    let address = check_device(client, &[qkv, &q_rows])?.max(keys.address_type());
    let elements = qkv.rows * qkv.width;
    // Units and strides are counted in 32 bits.
    if u32::try_from(elements.max(qkv.stride)).is_err() {
        return Err(Error::tensor("qkv", "elements", elements, "below 2^32"));
    }
    let sizes = RotateSizesLaunch::new(
        qkv.rows as u32,
        length as u32,
        q_heads as u32,
        kv_heads as u32,
        head_dim as u32,
        cos.width as u32,
        start as u32,
        qkv.stride as u32,
        cos.stride as u32,
        keys.strides[2],
        keys.strides[1],
        keys.strides[0],
    );
    // SAFETY: elements of qkv by rows, positions below the capacity, pairs below `half`, all as checked.
    unsafe {
        rotate_kernel::launch_unchecked::<R>(
            client,
            grid(elements.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            address,
            qkv.arg(),
            cos.arg(),
            sin.arg(),
            q_rows.arg(),
            array(&keys.handle, keys.extent()),
            array(&values.handle, values.extent()),
            sizes,
            RotateConfig { pairs, packing },
            dtype,
        );
    }
    Ok(())
}

/// What a part of the projection is: 0 a query head, 1 a key head, 2 a value head.
#[derive(CubeType, Clone, Copy)]
struct Part {
    kind: u32,
    head: u32,
}

#[cube]
fn part(slot: u32, sizes: &RotateSizes, #[comptime] packing: Packing) -> Part {
    let mut kind = 0u32;
    let mut head = slot;
    if comptime!(packing == Packing::ByKind) {
        if slot >= sizes.q_heads {
            let rest = slot - sizes.q_heads;
            kind = 1 + rest / sizes.kv_heads;
            head = rest % sizes.kv_heads;
        }
    } else {
        let group = sizes.q_heads / sizes.kv_heads;
        let within = slot % (group + 2);
        head = slot / (group + 2);
        if within < group {
            head = head * group + within;
        } else {
            kind = within - group + 1;
        }
    }
    Part { kind, head }
}

/// One unit per element of the projection.
#[cube(launch_unchecked, address_type = "dynamic")]
fn rotate_kernel<E: Float>(
    qkv: &Array<E>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    q: &mut Array<E>,
    keys: &mut Array<E>,
    values: &mut Array<E>,
    sizes: RotateSizes,
    #[comptime] config: RotateConfig,
    #[define(E)] _dtype: StorageType,
) {
    let cube = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    let item = cube * CUBE_DIM_X + UNIT_POS_X;
    let slots = sizes.q_heads + 2 * sizes.kv_heads;
    let feature = item % sizes.head_dim;
    let slot = item / sizes.head_dim % slots;
    let row = item / sizes.head_dim / slots;
    if row >= sizes.rows {
        terminate!();
    }
    let part = part(slot, &sizes, config.packing);
    let step = row % sizes.length;
    let batch = (row / sizes.length) as usize;
    let from = row as usize * sizes.qkv_stride as usize + (slot * sizes.head_dim) as usize;

    let mut value = qkv[from + feature as usize];
    if part.kind < 2 && feature < 2 * sizes.half {
        let mut pair = feature / 2;
        let mut first = feature % 2 == 0;
        let mut partner = feature ^ 1;
        if comptime!(config.pairs == Pairs::HalfSplit) {
            pair = feature % sizes.half;
            first = feature < sizes.half;
            partner = select(first, feature + sizes.half, feature - sizes.half);
        }
        let other = f32::cast_from(qkv[from + partner as usize]);
        let at = (step * sizes.table_stride + pair) as usize;
        let turned = f32::cast_from(value) * cos[at] + select(first, -other, other) * sin[at];
        value = rounded::<E>(turned);
    }
    if part.kind == 0 {
        let head = batch * sizes.q_heads as usize + part.head as usize;
        q[(head * sizes.length as usize + step as usize) * sizes.head_dim as usize + feature as usize] =
            value;
    } else {
        let at = batch * sizes.cache_batch
            + part.head as usize * sizes.cache_head
            + (sizes.start + step) as usize * sizes.cache_position
            + feature as usize;
        if part.kind == 1 {
            keys[at] = value;
        } else {
            values[at] = value;
        }
    }
}
