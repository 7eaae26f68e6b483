//! The stages of the operator, timed apart.

use burn::tensor::Tensor;
use burn::tensor::ops::FloatTensor;
use sample_attention_plan::{SampleAttentionOptions, StageTimes};

use crate::{AttentionBackend, Error, check};

/// A backend that can tell how long each stage takes: those of CubeCL where they are not fused, and Flex.
pub trait StagedBackend: AttentionBackend {
    /// Runs SampleAttention stage by stage, the device idle before and after each.
    ///
    /// # Errors
    ///
    /// Tensors that the backend's kernels refuse, or a device that fails.
    fn time_stages(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: &SampleAttentionOptions,
    ) -> Result<StageTimes, Error>;
}

/// Runs SampleAttention stage by stage, the device idle before and after each, and times them; no stage where
/// every head is dense from the start. Shapes as in [`sample_attention`](crate::sample_attention).
///
/// # Errors
///
/// What [`check`] finds, tensors that the backend's kernels refuse, or a device that fails.
pub fn time_stages<B: StagedBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    options: &SampleAttentionOptions,
) -> Result<StageTimes, Error> {
    let shape = check(&q, &k, &v, options)?;
    if shape.sampled_rows(options).is_empty() {
        return Ok(StageTimes { stages: Vec::new(), on_device: false });
    }
    let [q, k, v] = [q, k, v].map(|tensor| tensor.into_primitive().tensor());
    B::time_stages(q, k, v, options)
}
