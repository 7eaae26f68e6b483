//! The processor's attention behind Burn's `NdArray` backend, which hands its tensors over as they are.

use burn::backend::NdArray;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Int, Tensor, TensorData, TensorPrimitive};
use sample_attention_plan::SampleAttentionOptions;

use crate::backend::{AttentionBackend, Sparse};
use crate::cpu::{self, View};

impl AttentionBackend for NdArray {
    fn dense_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [q, k, v] = [q, k, v].map(Host::new);
        let attended = cpu::dense_attention(q.view(), k.view(), v.view(), scale);
        let [batch, heads, rows, _] = q.shape;
        (floats(attended.output, q.shape, q.dtype), floats(attended.lse, [batch, heads, rows], DType::F32))
    }

    fn sample_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: &SampleAttentionOptions,
    ) -> Sparse<Self> {
        let [q, k, v] = [q, k, v].map(Host::new);
        let sparse = cpu::sample_attention(q.view(), k.view(), v.view(), options, &mut |_| ());
        let tables = sparse.tables();
        let [batch, heads, rows, _] = q.shape;
        let all = batch * heads;
        Sparse {
            output: floats(sparse.attention.output, q.shape, q.dtype),
            lse: floats(sparse.attention.lse, [batch, heads, rows], DType::F32),
            density: floats(tables.density, [all], DType::F32),
            recall: floats(tables.recall, [all, 2], DType::F32),
            table: integers(tables.table, all),
            stripes: integers(tables.stripes, all),
        }
    }
}

/// A tensor's values in f32, row by row.
struct Host {
    values: Vec<f32>,
    shape: [usize; 4],
    dtype: DType,
}

impl Host {
    fn new(tensor: FloatTensor<NdArray>) -> Self {
        let tensor = Tensor::<NdArray, 4>::from_primitive(TensorPrimitive::Float(tensor));
        let (shape, dtype) = (tensor.dims(), tensor.dtype());
        let data = tensor.into_data().convert_dtype(DType::F32);
        let values = data.into_vec().expect("converted to f32");
        Self { values, shape, dtype }
    }

    fn view(&self) -> View<'_> {
        let [_, heads, length, width] = self.shape;
        let strides = [heads * length * width, length * width, width, 1];
        View { data: &self.values, shape: self.shape, strides }
    }
}

fn floats<const D: usize>(values: Vec<f32>, shape: [usize; D], dtype: DType) -> FloatTensor<NdArray> {
    let data = TensorData::new(values, shape).convert_dtype(dtype);
    Tensor::<NdArray, D>::from_data(data, (&Default::default(), dtype)).into_primitive().tensor()
}

fn integers(values: Vec<i32>, heads: usize) -> IntTensor<NdArray> {
    let data = TensorData::new(values.clone(), [heads, values.len() / heads]);
    Tensor::<NdArray, 2, Int>::from_data(data, &Default::default()).into_primitive()
}
