//! The processor's attention behind Burn's `Flex` backend.

use std::time::Instant;

use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{Bytes, DType, Shape};
use burn_flex::{Flex, FlexTensor, Layout};
use sample_attention_plan::{SampleAttentionOptions, StageTimes};

use crate::backend::{AttentionBackend, Sparse};
use crate::cpu::{self, View};
use crate::{Error, StagedBackend};

impl AttentionBackend for Flex {
    fn dense_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, scale: f64) -> (FlexTensor, FlexTensor) {
        let (dtype, shape) = (q.dtype(), q.layout().shape().clone());
        let [q, k, v] = [q, k, v].map(viewable);
        let attended = cpu::dense_attention(view(&q), view(&k), view(&v), scale);
        let rows = Shape::new([shape[0], shape[1], shape[2]]);
        (cast(floats(attended.output, shape), dtype), floats(attended.lse, rows))
    }

    fn sample_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        options: &SampleAttentionOptions,
    ) -> Sparse<Self> {
        let (dtype, shape) = (q.dtype(), q.layout().shape().clone());
        let [q, k, v] = [q, k, v].map(viewable);
        let sparse = cpu::sample_attention(view(&q), view(&k), view(&v), options, &mut |_| ());
        let [batch, heads, rows, _] = shape.dims();
        let tables = sparse.tables();
        Sparse {
            output: cast(floats(sparse.attention.output, shape), dtype),
            lse: floats(sparse.attention.lse, Shape::new([batch, heads, rows])),
            density: floats(tables.density, Shape::new([batch * heads])),
            recall: floats(tables.recall, Shape::new([batch * heads, 2])),
            table: integers(tables.table, batch * heads),
            stripes: integers(tables.stripes, batch * heads),
        }
    }
}

impl StagedBackend for Flex {
    fn time_stages(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        options: &SampleAttentionOptions,
    ) -> Result<StageTimes, Error> {
        let [q, k, v] = [q, k, v].map(viewable);
        let (mut stages, mut begin) = (Vec::new(), Instant::now());
        cpu::sample_attention(view(&q), view(&k), view(&v), options, &mut |stage| {
            stages.push((stage, begin.elapsed()));
            begin = Instant::now();
        });
        Ok(StageTimes { stages, on_device: false })
    }
}

fn cast(tensor: FlexTensor, dtype: DType) -> FlexTensor {
    if tensor.dtype() == dtype {
        tensor
    } else {
        <Flex as FloatTensorOps<Flex>>::float_cast(tensor, dtype.into())
    }
}

/// Something that [`View`] can look at: f32, rows contiguous, strides not negative.
fn viewable(tensor: FlexTensor) -> FlexTensor {
    let strides = tensor.layout().strides();
    let fits = strides[3] == 1 && strides.iter().all(|&stride| stride >= 0);
    cast(if fits { tensor } else { tensor.to_contiguous() }, DType::F32)
}

fn view(tensor: &FlexTensor) -> View<'_> {
    let (layout, data) = (tensor.layout(), tensor.storage::<f32>());
    let strides = layout.strides();
    View {
        data: &data[layout.start_offset()..],
        shape: layout.shape().dims(),
        strides: std::array::from_fn(|i| strides[i].unsigned_abs()),
    }
}

fn floats(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

fn integers(values: Vec<i32>, heads: usize) -> FlexTensor {
    let shape = Shape::new([heads, values.len() / heads]);
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::I32)
}
