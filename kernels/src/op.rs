//! The operator on host data, for files and tests.

use cubecl::{prelude::*, server::Handle};

use crate::{
    Attention, AttentionShape, Error, HostPlan, SampleAttentionOptions, TensorView, from_bytes,
    sample_attention, tensor::f32_type, to_bytes,
};

/// Contiguous tensors on the host.
#[derive(Debug, Clone, Copy)]
pub struct OpInputs<'a> {
    /// Sizes of the tensors.
    pub shape: AttentionShape,
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: &'a [f32],
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub k: &'a [f32],
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub v: &'a [f32],
    /// Type that the tensors have on the device; the numbers are rounded to it.
    pub dtype: StorageType,
}

/// What the operator made of [`OpInputs`].
#[derive(Debug, Clone, PartialEq)]
pub struct OpOutputs {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub out: Vec<f32>,
    /// `[batch, q_heads, q_len]`: natural log-sum-exp of the scaled scores that each row kept.
    pub lse: Vec<f32>,
    /// One per query head and sequence; all dense where the call was dense from the start.
    pub plans: Vec<HostPlan>,
    /// `[batch, q_heads]`: mean over the sampled rows of the kept mass.
    pub recall: Vec<f32>,
    /// `[batch, q_heads]`: minimum over the sampled rows of the kept mass.
    pub recall_min: Vec<f32>,
}

impl OpOutputs {
    /// `u8 [batch, q_heads, blocks]`: 1 for each kept block distance.
    pub fn bands(&self) -> Vec<u8> {
        self.plans.iter().flat_map(|plan| plan.bands.iter().map(|&kept| u8::from(kept))).collect()
    }

    /// The longest list of stripes, at least 1: the last size of [`stripes`](Self::stripes).
    pub fn stripe_width(&self) -> usize {
        self.plans.iter().map(|plan| plan.stripes.len()).max().unwrap_or(0).max(1)
    }

    /// `i32 [batch, q_heads, stripe_width]`: kept columns, ascending, padded with -1.
    pub fn stripes(&self) -> Vec<i32> {
        let width = self.stripe_width();
        let padded = self.plans.iter().flat_map(|plan| {
            let padding = core::iter::repeat_n(-1, width - plan.stripes.len());
            plan.stripes.iter().copied().chain(padding)
        });
        padded.collect()
    }

    /// `i32 [batch, q_heads]`.
    pub fn stripe_count(&self) -> Vec<i32> {
        self.plans.iter().map(|plan| plan.stripes.len() as i32).collect()
    }

    /// `f32 [batch, q_heads]`: kept over causal pairs.
    pub fn density(&self) -> Vec<f32> {
        self.plans.iter().map(|plan| plan.density).collect()
    }
}

/// [`sample_attention`] on host data, into an output that is full of NaN beforehand.
///
/// # Errors
/// As [`sample_attention`], and slices whose lengths are not those of the shape.
pub fn run_op<R: Runtime>(
    client: &ComputeClient<R>,
    inputs: &OpInputs<'_>,
    options: &SampleAttentionOptions,
) -> Result<OpOutputs, Error> {
    let shape = inputs.shape;
    shape.validate()?;
    let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = shape;
    let q_shape = [batch, q_heads, q_len, head_dim];
    let kv_shape = [batch, kv_heads, kv_len, head_dim];
    let upload = |name: &'static str, data: &[f32], shape: [usize; 4]| {
        let expected: usize = shape.iter().product();
        if data.len() != expected {
            return Err(Error::tensor(name, "number of elements", data.len(), expected));
        }
        let handle = client.create_from_slice(&to_bytes(data, inputs.dtype));
        Ok(TensorView::contiguous(handle, shape, inputs.dtype))
    };
    let q = upload("q", inputs.q, q_shape)?;
    let k = upload("k", inputs.k, kv_shape)?;
    let v = upload("v", inputs.v, kv_shape)?;
    let out = upload("out", &vec![f32::NAN; inputs.q.len()], q_shape)?;
    let Attention { lse, plan, report } = sample_attention(client, &q, &k, &v, &out, options)?;

    let read = |handle: Handle, dtype| -> Result<Vec<f32>, Error> {
        Ok(from_bytes(&client.read_one(handle).map_err(Error::device)?, dtype))
    };
    let recalls = match report {
        Some(report) => read(report.recall, f32_type())?,
        None => vec![1.0; 2 * shape.heads()],
    };
    Ok(OpOutputs {
        out: read(out.handle, inputs.dtype)?,
        lse: read(lse, f32_type())?,
        plans: match plan {
            Some(plan) => plan.read(client)?,
            None => vec![HostPlan::dense(shape.blocks(options)); shape.heads()],
        },
        recall: recalls.chunks_exact(2).map(|pair| pair[0]).collect(),
        recall_min: recalls.chunks_exact(2).map(|pair| pair[1]).collect(),
    })
}
