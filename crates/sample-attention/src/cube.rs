//! The kernels behind Burn's CubeCL backends, fused or not.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::cubecl::server::Handle;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::{Fusion, FusionBackend};
use burn_std::Metadata;
use sample_attention_kernels::{
    self as kernels, AttentionShape, SampleAttentionOptions, StageTimes, TensorView, TileProduct,
};

use crate::backend::{AttentionBackend, Sparse, plain_dense};
use crate::fusion::{Fusing, register};
use crate::{Error, StagedBackend};

impl<R, F, I, BT> AttentionBackend for CubeBackend<R, F, I, BT>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    fn dense_attention(
        q: CubeTensor<R>,
        k: CubeTensor<R>,
        v: CubeTensor<R>,
        scale: f64,
    ) -> (CubeTensor<R>, CubeTensor<R>) {
        let launched = launch(&q, &k, &v, |[q_view, k_view, v_view], output| {
            kernels::dense_attention(
                &q.client,
                q_view,
                k_view,
                v_view,
                output,
                Some(scale),
                TileProduct::Auto,
            )
        });
        // The kernels take heads of 16 to 256 in steps of 16; what they refuse, plain operations do.
        match launched {
            Ok((output, lse)) => (output, tensor(&q, lse, rows(&q.shape()), DType::F32)),
            Err(_) => plain_dense::<Self>(q, k, v, scale),
        }
    }

    fn sample_attention(
        q: CubeTensor<R>,
        k: CubeTensor<R>,
        v: CubeTensor<R>,
        options: &SampleAttentionOptions,
    ) -> Sparse<Self> {
        let launched = launch(&q, &k, &v, |[q_view, k_view, v_view], output| {
            kernels::sample_attention(&q.client, q_view, k_view, v_view, output, options)
        });
        let (output, attention) = launched.unwrap_or_else(|error| panic!("sample_attention: {error}"));
        let (Some(plan), Some(report)) = (attention.plan, attention.report) else {
            panic!("sample_attention: no row above the tail, expected some");
        };
        let [lse, density, recall, table, stripes] = sparse_shapes(&q.shape(), plan.blocks, plan.columns);
        Sparse {
            output,
            lse: tensor(&q, attention.lse, lse, DType::F32),
            density: tensor(&q, plan.density, density, DType::F32),
            recall: tensor(&q, report.recall, recall, DType::F32),
            // Counts: unsigned on the device, far from the sign bit.
            table: tensor(&q, plan.table, table, DType::I32),
            stripes: tensor(&q, plan.stripes, stripes, DType::I32),
        }
    }
}

impl<R, F, I, BT> StagedBackend for CubeBackend<R, F, I, BT>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    fn time_stages(
        q: CubeTensor<R>,
        k: CubeTensor<R>,
        v: CubeTensor<R>,
        options: &SampleAttentionOptions,
    ) -> Result<StageTimes, Error> {
        let launched = launch(&q, &k, &v, |[q_view, k_view, v_view], output| {
            kernels::time_stages(&q.client, [q_view, k_view, v_view, output], options)
        });
        launched.map(|(_, times)| times).map_err(|error| match error {
            kernels::Error::Device(error) => Error::Device(error),
            other => Error::Input(other),
        })
    }
}

fn tensor<R: CubeRuntime>(like: &CubeTensor<R>, handle: Handle, shape: Shape, dtype: DType) -> CubeTensor<R> {
    let strides = burn_std::tensor::contiguous_strides(&shape);
    CubeTensor::new(like.client.clone(), handle, Metadata::new(shape, strides), like.device.clone(), dtype)
}

/// Shape of the log-sum-exp.
fn rows(q: &Shape) -> Shape {
    Shape::new([q[0], q[1], q[2]])
}

/// Shapes of everything in a [`Sparse`] but the output.
fn sparse_shapes(q: &Shape, blocks: usize, columns: usize) -> [Shape; 5] {
    let heads = q[0] * q[1];
    [
        rows(q),
        Shape::new([heads]),
        Shape::new([heads, 2]),
        Shape::new([heads, 2 + 2 * blocks]),
        Shape::new([heads, columns]),
    ]
}

/// Allocates the output and runs `kernel` on views of it all.
fn launch<R: CubeRuntime, T>(
    q: &CubeTensor<R>,
    k: &CubeTensor<R>,
    v: &CubeTensor<R>,
    kernel: impl FnOnce([&TensorView<R>; 3], &TensorView<R>) -> Result<T, kernels::Error>,
) -> Result<(CubeTensor<R>, T), kernels::Error> {
    let output = empty_device_contiguous_dtype(q.client.clone(), q.device.clone(), q.shape(), q.dtype);
    // Permuted tensors and slices of a cache are read in place as long as their rows are contiguous.
    let contiguous_rows = |tensor: &CubeTensor<R>| match tensor.meta.strides()[3] {
        1 => view(tensor),
        _ => view(&burn_cubecl::kernel::into_contiguous(tensor.clone())),
    };
    let [q, k, v] = [q, k, v].map(contiguous_rows);
    let result = kernel([&q, &k, &v], &view(&output))?;
    Ok((output, result))
}

/// A tensor of four dimensions as the kernels take it.
pub fn view<R: CubeRuntime>(tensor: &CubeTensor<R>) -> TensorView<R> {
    let strides = tensor.meta.strides();
    let strides = [strides[0], strides[1], strides[2], strides[3]];
    TensorView::new(tensor.handle.clone(), tensor.shape().dims(), strides, tensor.dtype.into())
}

impl<B: FusionBackend + AttentionBackend> AttentionBackend for Fusion<B> {
    fn dense_attention(q: Fusing<B>, k: Fusing<B>, v: Fusing<B>, scale: f64) -> (Fusing<B>, Fusing<B>) {
        let outputs = [(q.shape.clone(), q.dtype), (rows(&q.shape), DType::F32)];
        let [output, lse] =
            register::<B, 3, 0, 2>("dense_attention", [q, k, v], [], outputs, move |inputs, [], outputs| {
                let [q, k, v] = inputs;
                let (output, lse) = B::dense_attention(q, k, v, scale);
                outputs.float(0, output);
                outputs.float(1, lse);
            });
        (output, lse)
    }

    fn sample_attention(
        q: Fusing<B>,
        k: Fusing<B>,
        v: Fusing<B>,
        options: &SampleAttentionOptions,
    ) -> Sparse<Self> {
        let [batch, q_heads, q_len, head_dim] = q.shape.dims();
        let [_, kv_heads, kv_len, _] = k.shape.dims();
        let shape = AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim };
        let shapes = sparse_shapes(&q.shape, shape.blocks(options), shape.tail_start(options));
        let [lse, density, recall, table, stripes] = shapes;
        let (float, int) = (DType::F32, DType::I32);
        let outputs = [
            (q.shape.clone(), q.dtype),
            (lse, float),
            (density, float),
            (recall, float),
            (table, int),
            (stripes, int),
        ];
        let options = *options;
        let [output, lse, density, recall, table, stripes] =
            register::<B, 3, 0, 6>("sample_attention", [q, k, v], [], outputs, move |inputs, [], outputs| {
                let [q, k, v] = inputs;
                let sparse = B::sample_attention(q, k, v, &options);
                let floats = [sparse.output, sparse.lse, sparse.density, sparse.recall];
                for (at, tensor) in floats.into_iter().enumerate() {
                    outputs.float(at, tensor);
                }
                outputs.int(4, sparse.table);
                outputs.int(5, sparse.stripes);
            });
        Sparse { output, lse, density, recall, table, stripes }
    }
}
