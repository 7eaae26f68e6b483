//! What layers compute, in Burn's own operations.

use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor};
use sample_attention::cache::write;
use sample_attention::rotary::Rotary;

use super::{Heads, Rotated, float, tensor};

fn product<B: Backend>(x: Tensor<B, 3>, weight: Tensor<B, 2>) -> Tensor<B, 3> {
    let [batch, length, d_input] = x.dims();
    let d_output = weight.dims()[0];
    x.reshape([batch * length, d_input]).matmul(weight.transpose()).reshape([batch, length, d_output])
}

pub(super) fn project<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    residual: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let mut y = product(tensor::<B, 3>(x), tensor(weight));
    if let Some(bias) = bias {
        y = y + tensor::<B, 1>(bias).unsqueeze();
    }
    if let Some(residual) = residual {
        y = tensor::<B, 3>(residual) + y;
    }
    float(y)
}

pub(super) fn project_gated<B: Backend>(
    x: FloatTensor<B>,
    gate: FloatTensor<B>,
    up: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let x = tensor::<B, 3>(x);
    let (gate, up) = match up {
        Some(up) => (product(x.clone(), tensor(gate)), product(x, tensor(up))),
        None => {
            let both = product(x, tensor(gate));
            let width = both.dims()[2] / 2;
            (both.clone().narrow(2, 0, width), both.narrow(2, width, width))
        }
    };
    float(silu(gate) * up)
}

pub(super) fn rms_norm<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    epsilon: f64,
    cast_before_weight: bool,
) -> FloatTensor<B> {
    let (x, weight) = (tensor::<B, 3>(x), tensor::<B, 1>(weight));
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let normalized = x.clone() / (x.square().mean_dim(2) + epsilon).sqrt();
    let y = if cast_before_weight {
        normalized.cast(dtype) * weight.unsqueeze()
    } else {
        (normalized * weight.cast(DType::F32).unsqueeze()).cast(dtype)
    };
    float(y)
}

pub(super) fn rotate<B: Backend>(
    qkv: FloatTensor<B>,
    heads: Heads,
    rotary: &Rotary<B>,
    memory: [FloatTensor<B>; 2],
    start: usize,
) -> Rotated<B> {
    let [q, k, v] = heads.turned(tensor(qkv), rotary);
    let [keys, values] = memory.map(tensor::<B, 4>);
    let (keys, held_keys) = write(keys, k, start);
    let (values, held_values) = write(values, v, start);
    Rotated { q: float(q), memory: [keys, values].map(float), held: [held_keys, held_values].map(float) }
}
