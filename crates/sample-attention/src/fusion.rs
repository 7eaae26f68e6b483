//! Operations that Burn does not know in a fused stream.

use std::fmt;
use std::marker::PhantomData;

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

/// A tensor of a fused stream.
pub type Fusing<B> = FloatTensor<Fusion<B>>;

type Handles<B> = <<B as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle;

/// Where an operation leaves what it computed.
pub struct Outputs<'a, B: FusionBackend> {
    descriptions: &'a [TensorIr],
    handles: &'a mut HandleContainer<Handles<B>>,
}

impl<B: FusionBackend> Outputs<'_, B> {
    /// Sets an output of floats.
    pub fn float(&mut self, at: usize, tensor: FloatTensor<B>) {
        self.handles.register_float_tensor::<B>(&self.descriptions[at].id, tensor);
    }

    /// Sets an output of integers.
    pub fn int(&mut self, at: usize, tensor: IntTensor<B>) {
        self.handles.register_int_tensor::<B>(&self.descriptions[at].id, tensor);
    }
}

/// An operation with what runs it on the inner backend.
struct Custom<B, F, const N: usize, const M: usize> {
    description: CustomOpIr,
    optional: [bool; M],
    run: F,
    backend: PhantomData<fn() -> B>,
}

impl<B, F, const N: usize, const M: usize> fmt::Debug for Custom<B, F, N, M> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.description.fmt(formatter)
    }
}

impl<B, F, const N: usize, const M: usize> Operation<B::FusionRuntime> for Custom<B, F, N, M>
where
    B: FusionBackend,
    F: Fn([FloatTensor<B>; N], [Option<FloatTensor<B>>; M], &mut Outputs<'_, B>) + Send + Sync + 'static,
{
    fn execute(&self, handles: &mut HandleContainer<Handles<B>>) {
        let CustomOpIr { inputs, outputs, .. } = &self.description;
        let mut rest = inputs[N..].iter();
        let required = std::array::from_fn(|at| handles.get_float_tensor::<B>(&inputs[at]));
        let optional = self.optional.map(|present| {
            let input = if present { rest.next() } else { None };
            input.map(|input| handles.get_float_tensor::<B>(input))
        });
        (self.run)(required, optional, &mut Outputs { descriptions: outputs, handles });
    }
}

/// Adds an operation on floats to the stream of its inputs: `N` of them, and up to `M` more. Its outputs have
/// these shapes and types; `run` computes them on the inner backend and sets every one.
///
/// An input that nobody else holds is handed over, so that its memory may be written in place and become an
/// output.
pub fn register<B: FusionBackend, const N: usize, const M: usize, const O: usize>(
    name: &'static str,
    required: [Fusing<B>; N],
    optional: [Option<Fusing<B>>; M],
    outputs: [(Shape, DType); O],
    run: impl Fn([FloatTensor<B>; N], [Option<FloatTensor<B>>; M], &mut Outputs<'_, B>) + Send + Sync + 'static,
) -> [Fusing<B>; O] {
    let present = std::array::from_fn(|at| optional[at].is_some());
    let inputs: Vec<Fusing<B>> = required.into_iter().chain(optional.into_iter().flatten()).collect();
    let client = inputs[0].client.clone();
    let streams = OperationStreams::with_inputs(&inputs);
    let outputs = outputs.map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype));
    let inputs: Vec<TensorIr> = inputs.into_iter().map(Fusing::<B>::into_ir).collect();
    let description = CustomOpIr::new(name, &inputs, &outputs);
    let operation = Custom::<B, _, N, M> {
        description: description.clone(),
        optional: present,
        run,
        backend: PhantomData,
    };
    let outputs = client.register(streams, OperationIr::Custom(description), operation);
    outputs.try_into().unwrap_or_else(|_| unreachable!("as many outputs as were registered"))
}
