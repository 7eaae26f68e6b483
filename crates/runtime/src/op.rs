//! The operator itself on a device: on tensors from a file, and checked against float64.

use burn::tensor::{DType, Tensor, TensorData};
use sample_attention::{
    Attended, AttentionBackend, AttentionShape, HostPlan, SampleAttentionOptions, sample_attention_with_plan,
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
    let shape = sample_attention::check(&q, &k, &v, options)?;
    let Attended { output, lse, plan } = sample_attention_with_plan(q, k, v, options)?;
    let (recall, plans) = match plan {
        Some(plan) => {
            let recall = floats(plan.recall.clone())?.into_iter().step_by(2).collect();
            (recall, plan.read()?)
        }
        None => {
            let heads = shape.heads();
            (vec![1.0; heads], vec![HostPlan::dense(shape.blocks(options)); heads])
        }
    };
    let widest = plans.iter().map(|plan| plan.stripes.len()).max().unwrap_or(0).max(1);
    let padded = |plan: &HostPlan| {
        let padding = std::iter::repeat_n(-1, widest - plan.stripes.len());
        plan.stripes.iter().copied().chain(padding).collect::<Vec<_>>()
    };
    Ok(OpOutputs {
        shape,
        out: floats(output)?,
        lse: floats(lse)?,
        bands: plans.iter().flat_map(|plan| plan.bands.iter().map(|&kept| u8::from(kept))).collect(),
        stripes: plans.iter().flat_map(padded).collect(),
        stripe_count: plans.iter().map(|plan| plan.stripes.len() as i32).collect(),
        density: plans.iter().map(|plan| plan.density).collect(),
        recall,
    })
}

pub(crate) fn floats<B: AttentionBackend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>, Error> {
    let data = tensor.cast(DType::F32).try_into_data().map_err(|error| Error::Failed(error.to_string()))?;
    data.into_vec().map_err(|error| Error::Failed(format!("{error:?}")))
}
