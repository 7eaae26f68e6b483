//! The kernels behind Burn's CubeCL backends, fused or not.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::{Fusion, FusionBackend};
use burn_std::Metadata;
use sample_attention::cube::view;
use sample_attention::fusion::{Fusing, register};
use sample_attention::rotary::{Rotary, RotaryPairs};
use sample_attention_kernels::Error;
use sample_attention_kernels::layers::{self, Linear, MAX_LINEAR_ROWS, MIN_PRODUCT_ROWS, RmsNorm, RowsView};

use super::{Heads, LayerBackend, Packing, Rotated, float, plain, tensor};

impl<R, F, I, BT> LayerBackend for CubeBackend<R, F, I, BT>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    fn multiplies(dtype: DType, device: &Self::Device) -> bool {
        layers::multiplies(&R::client(device), dtype.into())
    }

    fn project(
        x: CubeTensor<R>,
        weight: CubeTensor<R>,
        bias: Option<CubeTensor<R>>,
        residual: Option<CubeTensor<R>>,
    ) -> CubeTensor<R> {
        if !has_kernel::<Self>(&x.shape(), x.dtype, &x.device) {
            return plain::project::<Self>(x, weight, bias, residual);
        }
        let launched = launch(&x, weight.meta.shape()[0], |x_rows, y| {
            let (bias, residual) = (bias.as_ref().map(rows), residual.as_ref().map(rows));
            let call = Linear {
                x: x_rows,
                weight: &rows(&weight),
                bias: bias.as_ref(),
                residual: residual.as_ref(),
                y,
            };
            if is_narrow(&x.shape()) {
                layers::linear(&x.client, &call)
            } else {
                layers::product(&x.client, &call)
            }
        });
        launched.unwrap_or_else(|_| plain::project::<Self>(x, weight, bias, residual))
    }

    fn project_gated(x: CubeTensor<R>, gate: CubeTensor<R>, up: Option<CubeTensor<R>>) -> CubeTensor<R> {
        if !has_kernel::<Self>(&x.shape(), x.dtype, &x.device) {
            return plain::project_gated::<Self>(x, gate, up);
        }
        let width = gated_width(gate.meta.shape(), up.is_some());
        let launched = launch(&x, width, |x_rows, y| {
            let up = up.as_ref().map(rows);
            if is_narrow(&x.shape()) {
                layers::gated_linear(&x.client, x_rows, &rows(&gate), up.as_ref(), y)
            } else {
                layers::gated_product(&x.client, x_rows, &rows(&gate), up.as_ref(), y)
            }
        });
        launched.unwrap_or_else(|_| plain::project_gated::<Self>(x, gate, up))
    }

    fn rms_norm(
        x: CubeTensor<R>,
        weight: CubeTensor<R>,
        epsilon: f64,
        cast_before_weight: bool,
    ) -> CubeTensor<R> {
        let width = weight.meta.shape()[0];
        let launched = launch(&x, width, |x_rows, y| {
            let weight = &rows(&weight);
            let call = RmsNorm { x: x_rows, weight, epsilon, round_before_weight: cast_before_weight, y };
            layers::rms_norm(&x.client, &call)
        });
        launched.unwrap_or_else(|_| plain::rms_norm::<Self>(x, weight, epsilon, cast_before_weight))
    }

    fn rotate(
        qkv: CubeTensor<R>,
        heads: Heads,
        rotary: Rotary<Self>,
        memory: [CubeTensor<R>; 2],
        start: usize,
    ) -> Rotated<Self> {
        // Whoever else holds the memory must not see it change.
        let memory = memory.map(|held| if held.can_mut() { held } else { held.copy() });
        let [batch, length, _] = qkv.shape().dims();
        let shape = Shape::new([batch, heads.heads, length, heads.head_dim]);
        let q = empty_device_contiguous_dtype(qkv.client.clone(), qkv.device.clone(), shape, qkv.dtype);
        let [cos, sin] = [&rotary.cos, &rotary.sin].map(|table| float(table.clone()));
        let [keys, values] = [&memory[0], &memory[1]].map(view);
        let launched = layers::rotate(
            &qkv.client,
            &layers::Rotate {
                qkv: &rows(&qkv),
                heads: heads.into(),
                cos: &rows(&cos),
                sin: &rows(&sin),
                pairs: match rotary.pairs {
                    RotaryPairs::Interleaved => layers::Pairs::Interleaved,
                    RotaryPairs::HalfSplit => layers::Pairs::HalfSplit,
                },
                q: &view(&q),
                keys: &keys,
                values: &values,
                start,
            },
        );
        if launched.is_err() {
            return plain::rotate::<Self>(qkv, heads, &rotary, memory, start);
        }
        let held = [&memory[0], &memory[1]].map(|memory| first_positions(memory, start + length));
        Rotated { q, memory, held }
    }
}

impl From<Heads> for layers::Heads {
    fn from(heads: Heads) -> Self {
        let packing = match heads.packing {
            Packing::ByKind => layers::Packing::ByKind,
            Packing::ByGroup => layers::Packing::ByGroup,
        };
        Self { q_heads: heads.heads, kv_heads: heads.kv_heads, packing }
    }
}

/// Whether the kernels for few rows take an input of this shape.
fn is_narrow(x: &Shape) -> bool {
    let width = x[x.num_dims() - 1];
    x.num_elements() <= MAX_LINEAR_ROWS * width
}

/// Whether a projection of an input of this shape has a kernel of ours.
fn has_kernel<B: LayerBackend>(x: &Shape, dtype: DType, device: &B::Device) -> bool {
    let width = x[x.num_dims() - 1];
    is_narrow(x) || x.num_elements() >= MIN_PRODUCT_ROWS * width && B::multiplies(dtype, device)
}

/// Output features of a gated projection.
fn gated_width(gate: &Shape, has_up: bool) -> usize {
    if has_up { gate[0] } else { gate[0] / 2 }
}

/// A tensor as rows of its last dimension; a copy where they are not evenly spaced.
fn rows<R: CubeRuntime>(tensor: &CubeTensor<R>) -> RowsView {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    let last = shape.num_dims() - 1;
    let (mut count, mut stride) = (1, shape[last]);
    let mut even = strides[last] == 1 || shape[last] == 1;
    for dim in (0..last).rev().filter(|&dim| shape[dim] > 1) {
        even &= count == 1 || strides[dim] == count * stride;
        stride = if count == 1 { strides[dim] } else { stride };
        count *= shape[dim];
    }
    if !even {
        return rows(&into_contiguous(tensor.clone()));
    }
    RowsView {
        handle: tensor.handle.clone(),
        rows: count,
        width: shape[last],
        stride,
        dtype: tensor.dtype.into(),
    }
}

/// Allocates the output `[.., width]` for an input `[.., in]` and runs `kernel` on both.
fn launch<R: CubeRuntime>(
    x: &CubeTensor<R>,
    width: usize,
    kernel: impl FnOnce(&RowsView, &RowsView) -> Result<(), Error>,
) -> Result<CubeTensor<R>, Error> {
    let mut shape = x.shape();
    let last = shape.num_dims() - 1;
    shape[last] = width;
    let y = empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, x.dtype);
    kernel(&rows(x), &rows(&y))?;
    Ok(y)
}

/// The first positions of a cache, without a copy whatever their number.
fn first_positions<R: CubeRuntime>(memory: &CubeTensor<R>, length: usize) -> CubeTensor<R> {
    let mut shape = memory.shape();
    shape[2] = length;
    let meta = Metadata::new(shape, memory.meta.strides().clone());
    CubeTensor::new(memory.client.clone(), memory.handle.clone(), meta, memory.device.clone(), memory.dtype)
}

impl<B: FusionBackend + LayerBackend> LayerBackend for Fusion<B> {
    fn multiplies(dtype: DType, device: &Self::Device) -> bool {
        B::multiplies(dtype, device)
    }

    fn project(
        x: Fusing<B>,
        weight: Fusing<B>,
        bias: Option<Fusing<B>>,
        residual: Option<Fusing<B>>,
    ) -> Fusing<B> {
        if !has_kernel::<Self>(&x.shape, x.dtype, x.client.device()) {
            return plain::project::<Self>(x, weight, bias, residual);
        }
        let output = like::<B>(&x, weight.shape[0]);
        let [y] = register::<B, 2, 2, 1>(
            "linear",
            [x, weight],
            [bias, residual],
            [output],
            |[x, weight], [bias, residual], outputs| outputs.float(0, B::project(x, weight, bias, residual)),
        );
        y
    }

    fn project_gated(x: Fusing<B>, gate: Fusing<B>, up: Option<Fusing<B>>) -> Fusing<B> {
        if !has_kernel::<Self>(&x.shape, x.dtype, x.client.device()) {
            return plain::project_gated::<Self>(x, gate, up);
        }
        let output = like::<B>(&x, gated_width(&gate.shape, up.is_some()));
        let [y] =
            register::<B, 2, 1, 1>("gated_linear", [x, gate], [up], [output], |[x, gate], [up], outputs| {
                outputs.float(0, B::project_gated(x, gate, up))
            });
        y
    }

    fn rms_norm(x: Fusing<B>, weight: Fusing<B>, epsilon: f64, cast_before_weight: bool) -> Fusing<B> {
        let output = like::<B>(&x, weight.shape[0]);
        let [y] =
            register::<B, 2, 0, 1>("rms_norm", [x, weight], [], [output], move |[x, weight], [], outputs| {
                outputs.float(0, B::rms_norm(x, weight, epsilon, cast_before_weight));
            });
        y
    }

    fn rotate(
        qkv: Fusing<B>,
        heads: Heads,
        rotary: Rotary<Self>,
        memory: [Fusing<B>; 2],
        start: usize,
    ) -> Rotated<Self> {
        let Rotary { cos, sin, pairs } = rotary;
        let [cos, sin] = [cos, sin].map(float);
        let [keys, values] = memory;
        let (shape, dtype) = (keys.shape.clone(), keys.dtype);
        let length = qkv.shape[1];
        let mut held = shape.clone();
        held[2] = start + length;
        let q = Shape::new([qkv.shape[0], heads.heads, length, heads.head_dim]);
        let outputs =
            [(q, dtype), (shape.clone(), dtype), (shape, dtype), (held.clone(), dtype), (held, dtype)];
        let inputs = [qkv, cos, sin, keys, values];
        let [q, keys, values, held_keys, held_values] =
            register::<B, 5, 0, 5>("rotate", inputs, [], outputs, move |inputs, [], outputs| {
                let [qkv, cos, sin, keys, values] = inputs;
                let [cos, sin] = [cos, sin].map(tensor::<B, 4>);
                let rotary = Rotary { cos, sin, pairs };
                let Rotated { q, memory, held } = B::rotate(qkv, heads, rotary, [keys, values], start);
                let all = [q].into_iter().chain(memory).chain(held);
                for (at, tensor) in all.enumerate() {
                    outputs.float(at, tensor);
                }
            });
        Rotated { q, memory: [keys, values], held: [held_keys, held_values] }
    }
}

/// Shape and type of an output `[.., width]` for an input `[.., in]`.
fn like<B: FusionBackend>(x: &Fusing<B>, width: usize) -> (Shape, DType) {
    let mut shape = x.shape.clone();
    let last = shape.num_dims() - 1;
    shape[last] = width;
    (shape, x.dtype)
}
