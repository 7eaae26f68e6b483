//! The operator itself on a device: on tensors from a file, and checked against float64.

use burn::tensor::{DType, Int, Tensor, TensorData};
use sample_attention::{
    Attended, AttentionBackend, AttentionShape, SampleAttentionOptions, sample_attention_with_plan,
};

use crate::{Device, Error, Kind};

/// Host tensors with their shapes.
#[derive(Debug, Clone)]
pub struct OpInputs {
    /// `[batch, heads, Sq, D]`
    pub q: (Vec<f32>, [usize; 4]),
    /// `[batch, kv_heads, Sk, D]`
    pub k: (Vec<f32>, [usize; 4]),
    /// `[batch, kv_heads, Sk, D]`
    pub v: (Vec<f32>, [usize; 4]),
}

/// What the operator makes of [`OpInputs`].
#[derive(Debug, Clone)]
pub struct OpOutputs {
    /// The sizes.
    pub shape: AttentionShape,
    /// `[batch, heads, Sq, D]`
    pub out: Vec<f32>,
    /// `[batch, heads, Sq]`
    pub lse: Vec<f32>,
    /// `[batch, heads, blocks]`: 1 for each kept block distance.
    pub bands: Vec<u8>,
    /// `[batch, heads, widest]`: kept columns, ascending, padded with -1.
    pub stripes: Vec<i32>,
    /// `[batch, heads]`
    pub stripe_count: Vec<i32>,
    /// `[batch, heads]`: kept over causal pairs.
    pub density: Vec<f32>,
    /// `[batch, heads]`: mean over the sampled rows of the kept mass.
    pub recall: Vec<f32>,
}

impl Device {
    /// Runs SampleAttention, in the device's type.
    ///
    /// # Errors
    ///
    /// Tensors or options that do not fit, or a failing device.
    pub fn run_op(&self, inputs: OpInputs, options: &SampleAttentionOptions) -> Result<OpOutputs, Error> {
        match &self.kind {
            #[cfg(feature = "cuda")]
            Kind::Cuda => run::<burn::backend::Cuda>(inputs, options, self.dtype, &Default::default()),
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(device) => run::<burn::backend::Wgpu>(inputs, options, self.dtype, device),
            #[cfg(feature = "flex")]
            Kind::Cpu => run::<burn::backend::Flex>(inputs, options, self.dtype, &Default::default()),
        }
    }
}

fn run<B: AttentionBackend>(
    inputs: OpInputs,
    options: &SampleAttentionOptions,
    dtype: DType,
    device: &B::Device,
) -> Result<OpOutputs, Error> {
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|(values, shape)| {
        Tensor::<B, 4>::from_data(TensorData::new(values, shape).convert_dtype(dtype), (device, dtype))
    });
    let shape = sample_attention::check(&q, &k, &v, options).map_err(Error::Input)?;
    let Attended { output, lse, plan } =
        sample_attention_with_plan(q, k, v, options).map_err(Error::Input)?;
    let (heads, blocks) = (shape.heads(), shape.blocks(options));
    let mut outputs = OpOutputs {
        shape,
        out: floats(output)?,
        lse: floats(lse)?,
        bands: vec![1; heads * blocks],
        stripes: vec![-1; heads],
        stripe_count: vec![0; heads],
        density: vec![1.0; heads],
        recall: vec![1.0; heads],
    };
    if let Some(plan) = plan {
        outputs.density = floats(plan.density)?;
        outputs.recall = floats(plan.recall)?.into_iter().step_by(2).collect();
        let width = plan.stripes.dims()[1];
        let (table, stripes) = (integers(plan.table)?, integers(plan.stripes)?);
        let rows = table.chunks_exact(2 + 2 * blocks);
        outputs.stripe_count = rows.clone().map(|row| row[1]).collect();
        let kept = |row: &[i32], d: usize| u8::from(d == 0 || row[2 + d] != row[1 + d]);
        outputs.bands = rows.flat_map(|row| (0..blocks).map(|d| kept(row, d)).collect::<Vec<_>>()).collect();
        let widest = outputs.stripe_count.iter().copied().max().unwrap_or(0).max(1) as usize;
        let lists = stripes.chunks_exact(width).zip(&outputs.stripe_count);
        outputs.stripes = lists
            .flat_map(|(list, &count)| {
                let count = count as usize;
                list[..count]
                    .iter()
                    .copied()
                    .chain(std::iter::repeat_n(-1, widest - count))
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    Ok(outputs)
}

fn floats<B: AttentionBackend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>, Error> {
    let data = tensor.cast(DType::F32).try_into_data().map_err(|error| Error::Failed(error.to_string()))?;
    Ok(data.iter::<f32>().collect())
}

fn integers<B: AttentionBackend, const D: usize>(tensor: Tensor<B, D, Int>) -> Result<Vec<i32>, Error> {
    let data = tensor.try_into_data().map_err(|error| Error::Failed(error.to_string()))?;
    Ok(data.iter::<i32>().collect())
}
