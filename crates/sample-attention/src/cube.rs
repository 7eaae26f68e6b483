//! The kernels behind Burn's CubeCL backends, fused or not.

use std::marker::PhantomData;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::cubecl::server::Handle;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};
use burn_std::Metadata;
use sample_attention_kernels::{
    self as kernels, AttentionShape, SampleAttentionOptions, TensorView, TileProduct,
};

use crate::backend::{AttentionBackend, Sparse, plain_dense};

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

fn view<R: CubeRuntime>(tensor: &CubeTensor<R>) -> TensorView<R> {
    let strides = tensor.meta.strides();
    let strides = [strides[0], strides[1], strides[2], strides[3]];
    TensorView::new(tensor.handle.clone(), tensor.shape().dims(), strides, tensor.dtype.into())
}

/// An operation of this crate in a fused stream: its tensors, and what runs it on the inner backend.
struct Fused<B, F> {
    description: CustomOpIr,
    run: F,
    backend: PhantomData<fn() -> B>,
}

impl<B, F> std::fmt::Debug for Fused<B, F> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.description.fmt(formatter)
    }
}

impl<B, F> Operation<B::FusionRuntime> for Fused<B, F>
where
    B: FusionBackend + AttentionBackend,
    F: Fn([FloatTensor<B>; 3], &[TensorIr], &mut HandleContainer<Handles<B>>) + Send + Sync + 'static,
{
    fn execute(&self, handles: &mut HandleContainer<Handles<B>>) {
        let inputs = [0, 1, 2].map(|at: usize| handles.get_float_tensor::<B>(&self.description.inputs[at]));
        (self.run)(inputs, &self.description.outputs, handles);
    }
}

type Handles<B> = <<B as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle;
type Fusing<B> = FloatTensor<Fusion<B>>;

/// Registers an operation on q, k and v with outputs of these shapes and types.
fn register<B: FusionBackend + AttentionBackend>(
    name: &'static str,
    [q, k, v]: [Fusing<B>; 3],
    outputs: &[(Shape, DType)],
    run: impl Fn([FloatTensor<B>; 3], &[TensorIr], &mut HandleContainer<Handles<B>>) + Send + Sync + 'static,
) -> Vec<Fusing<B>> {
    let client = q.client.clone();
    let streams = OperationStreams::with_inputs([&q, &k, &v]);
    let output = |(shape, dtype): &(Shape, DType)| {
        TensorIr::uninit(client.create_empty_handle(), shape.clone(), *dtype)
    };
    let outputs: Vec<TensorIr> = outputs.iter().map(output).collect();
    let description = CustomOpIr::new(name, &[q.into_ir(), k.into_ir(), v.into_ir()], &outputs);
    let operation = Fused::<B, _> { description: description.clone(), run, backend: PhantomData };
    client.register(streams, OperationIr::Custom(description), operation)
}

impl<B: FusionBackend + AttentionBackend> AttentionBackend for Fusion<B> {
    fn dense_attention(q: Fusing<B>, k: Fusing<B>, v: Fusing<B>, scale: f64) -> (Fusing<B>, Fusing<B>) {
        let outputs = [(q.shape.clone(), q.dtype), (rows(&q.shape), DType::F32)];
        let outputs =
            register::<B>("dense_attention", [q, k, v], &outputs, move |[q, k, v], outputs, handles| {
                let (output, lse) = B::dense_attention(q, k, v, scale);
                handles.register_float_tensor::<B>(&outputs[0].id, output);
                handles.register_float_tensor::<B>(&outputs[1].id, lse);
            });
        let [output, lse] = outputs.try_into().expect("as many outputs as were registered");
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
        let types = [DType::F32, DType::F32, DType::F32, DType::I32, DType::I32];
        let outputs: Vec<_> =
            [(q.shape.clone(), q.dtype)].into_iter().chain(shapes.into_iter().zip(types)).collect();
        let options = *options;
        let outputs =
            register::<B>("sample_attention", [q, k, v], &outputs, move |[q, k, v], outputs, handles| {
                let sparse = B::sample_attention(q, k, v, &options);
                let floats = [sparse.output, sparse.lse, sparse.density, sparse.recall];
                for (output, tensor) in outputs.iter().zip(floats) {
                    handles.register_float_tensor::<B>(&output.id, tensor);
                }
                for (output, tensor) in outputs[4..].iter().zip([sparse.table, sparse.stripes]) {
                    handles.register_int_tensor::<B>(&output.id, tensor);
                }
            });
        let [output, lse, density, recall, table, stripes] =
            outputs.try_into().expect("as many outputs as were registered");
        Sparse { output, lse, density, recall, table, stripes }
    }
}
