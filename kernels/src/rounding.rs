//! What is stored in `bf16` is rounded to nearest here: Vulkan leaves the rounding of its conversion to the driver,
//! and NVIDIA's cuts off, which doubles the error.

use cubecl::prelude::*;

use crate::tensor::bf16_type;

/// `value` as `E`, rounded to nearest, numbers halfway between two away from zero.
#[cube]
pub(crate) fn rounded<E: Float>(value: f32) -> E {
    let mut value = value;
    let stored = storage_type_of::<E>();
    if comptime!(stored == bf16_type()) {
        let bits = u32::reinterpret(value);
        // Infinity stays, and what is no number may not grow into one.
        let finite = bits & 0x7fff_ffffu32 < 0x7f80_0000u32;
        value = select(finite, f32::reinterpret((bits + 0x8000u32) & 0xffff_0000u32), value);
    }
    E::cast_from(value)
}

/// [`rounded`], element by element.
#[cube]
pub(crate) fn rounded_vector<E: Float, N: Size>(value: Vector<f32, N>) -> Vector<E, N> {
    let mut stored = Vector::<E, N>::empty();
    #[unroll]
    for e in 0..N::value() {
        stored[e] = rounded::<E>(value[e]);
    }
    stored
}
