//! Host numbers to and from the element types of tensors.

use cubecl::prelude::*;
use half::{bf16, f16};

use crate::tensor::{bf16_type, half_type};

/// The bytes of `data` rounded to `f16` or `bf16`, or unchanged for any other type.
pub fn to_bytes(data: &[f32], dtype: StorageType) -> Vec<u8> {
    let halves = |bits: fn(f32) -> u16| data.iter().flat_map(|&x| bits(x).to_ne_bytes()).collect();
    if dtype == half_type() {
        halves(|x| f16::from_f32(x).to_bits())
    } else if dtype == bf16_type() {
        halves(|x| bf16::from_f32(x).to_bits())
    } else {
        f32::as_bytes(data).to_vec()
    }
}

/// The inverse of [`to_bytes`].
pub fn from_bytes(bytes: &[u8], dtype: StorageType) -> Vec<f32> {
    let halves = |value: fn(u16) -> f32| {
        bytes.chunks_exact(2).map(|pair| value(u16::from_ne_bytes([pair[0], pair[1]]))).collect()
    };
    if dtype == half_type() {
        halves(|bits| f16::from_bits(bits).to_f32())
    } else if dtype == bf16_type() {
        halves(|bits| bf16::from_bits(bits).to_f32())
    } else {
        let floats = bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
        floats.collect()
    }
}
