//! SampleAttention (arXiv 2406.15486) for Burn: prefill attention that looks at a few percent of the score
//! matrix and loses next to nothing. For each head it computes the exact attention of some query rows, finds
//! from it which key columns ("stripes") and block distances ("bands") matter, and attends only there. No
//! training, a drop-in for full attention.
//!
//! ```
//! use burn::backend::Flex;
//! use burn::tensor::{Distribution, Tensor};
//! use sample_attention::{SampleAttentionOptions, sample_attention_with_report};
//!
//! let device = Default::default();
//! let random = |heads| Tensor::<Flex, 4>::random([1, heads, 2048, 64], Distribution::Default, &device);
//! let (q, k, v) = (random(4), random(2), random(2));
//!
//! let options = SampleAttentionOptions::default();
//! let (output, report) = sample_attention_with_report(q, k, v, &options)?;
//! assert_eq!(output.dims(), [1, 4, 2048, 64]);
//! assert!(report.recall_mean() >= 0.949);
//! println!("{report}");
//! # Ok::<(), sample_attention::Error>(())
//! ```

#[cfg(feature = "autodiff")]
mod autodiff;
mod backend;
pub mod cache;
#[cfg(feature = "cpu")]
mod cpu;
#[cfg(feature = "cube")]
pub mod cube;
mod error;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "cube")]
pub mod fusion;
#[cfg(feature = "autodiff")]
mod gradient;
mod module;
#[cfg(feature = "ndarray")]
mod ndarray;
pub mod plain;
mod preset;
mod report;
pub mod rotary;
mod stages;

use std::fmt::Debug;

use burn::tensor::{Tensor, TensorPrimitive, backend::Backend};

pub use backend::{AttentionBackend, Sparse};
pub use cache::KeyValueCache;
pub use error::Error;
pub use module::{SampleAttention, SampleAttentionConfig};
pub use preset::Preset;
pub use report::{HeadReport, Plan, Report, Summary};
pub use sample_attention_plan::{
    AttentionShape, HostPlan, Rule, SampleAttentionOptions, Stage, StageTimes, reference,
};
pub use stages::{StagedBackend, time_stages};

/// SampleAttention: causal softmax attention over the keys that sampled query rows ask for.
///
/// Query row `i` stands at position `Sk - Sq + i` and sees the keys up to it, so that a chunk of a longer
/// prefill is attended like the whole. Query head `h` reads key/value head `h / (heads / kv_heads)`; nothing is
/// repeated. Short contexts, and heads whose plan would hardly save anything, are computed over all keys
/// ([`SampleAttentionOptions`] says when), and so are heads whose width is not a multiple of 16 up to 256. The
/// softmax runs in f32.
///
/// # Shapes
///
/// - q: `[batch, heads, Sq, D]`
/// - k, v: `[batch, kv_heads, Sk, D]`, `Sq <= Sk`, `heads` a multiple of `kv_heads`
/// - output: `[batch, heads, Sq, D]`
///
/// # Panics
///
/// Where [`check`] finds an error.
pub fn sample_attention<B: AttentionBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    options: &SampleAttentionOptions,
) -> Tensor<B, 4> {
    sample_attention_with_plan(q, k, v, options).unwrap_or_else(|error| panic!("{error}")).output
}

/// As [`sample_attention`], with what the plan kept: reads it from the device, and waits for it.
///
/// # Errors
///
/// What [`check`] finds, or a device that fails.
pub fn sample_attention_with_report<B: AttentionBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    options: &SampleAttentionOptions,
) -> Result<(Tensor<B, 4>, Report), Error> {
    let heads = q.dims()[0] * q.dims()[1];
    let attended = sample_attention_with_plan(q, k, v, options)?;
    let report = attended.plan.map_or_else(|| Ok(Report::dense(heads)), |plan| plan.report())?;
    Ok((attended.output, report))
}

/// What [`sample_attention_with_plan`] computes.
#[derive(Debug, Clone)]
pub struct Attended<B: AttentionBackend> {
    /// `[batch, heads, Sq, D]`
    pub output: Tensor<B, 4>,
    /// Natural log-sum-exp of each row's scaled scores over the keys that it keeps, `[batch, heads, Sq]`, f32:
    /// for merging with attention over other keys.
    pub lse: Tensor<B, 3>,
    /// The plan; `None` where every head is dense from the start.
    pub plan: Option<Plan<B>>,
}

/// As [`sample_attention`], with everything else that it computes, left on the device.
///
/// # Errors
///
/// What [`check`] finds.
pub fn sample_attention_with_plan<B: AttentionBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    options: &SampleAttentionOptions,
) -> Result<Attended<B>, Error> {
    let shape = check(&q, &k, &v, options)?;
    let [q, k, v] = [q, k, v].map(|tensor| tensor.into_primitive().tensor());
    let float = TensorPrimitive::Float;
    if shape.sampled_rows(options).is_empty() || shape.validate().is_err() {
        let (output, lse) = B::dense_attention(q, k, v, shape.scale(options));
        let (output, lse) = (Tensor::from_primitive(float(output)), Tensor::from_primitive(float(lse)));
        return Ok(Attended { output, lse, plan: None });
    }
    let Sparse { output, lse, density, recall, table, stripes } = B::sample_attention(q, k, v, options);
    let plan = Plan {
        density: Tensor::from_primitive(float(density)),
        recall: Tensor::from_primitive(float(recall)),
        table: Tensor::from_primitive(table),
        stripes: Tensor::from_primitive(stripes),
    };
    let (output, lse) = (Tensor::from_primitive(float(output)), Tensor::from_primitive(float(lse)));
    Ok(Attended { output, lse, plan: Some(plan) })
}

/// Causal softmax attention over all keys; shapes as in [`sample_attention`], scores scaled by `1/sqrt(D)`.
/// Memory stays bounded at any length.
///
/// # Panics
///
/// Where [`check`] finds an error.
pub fn dense_attention<B: AttentionBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
) -> Tensor<B, 4> {
    sample_attention(q, k, v, &Preset::Dense.options())
}

fn refuse(tensor: &'static str, what: &'static str, found: impl Debug, expected: impl Debug) -> Error {
    sample_attention_plan::Error::tensor(tensor, what, format!("{found:?}"), format!("{expected:?}")).into()
}

/// Checks options and tensors against each other.
///
/// # Errors
///
/// The first option out of range, or the tensor whose shape, type or device does not fit, with the value found
/// and the value expected.
pub fn check<B: Backend>(
    q: &Tensor<B, 4>,
    k: &Tensor<B, 4>,
    v: &Tensor<B, 4>,
    options: &SampleAttentionOptions,
) -> Result<AttentionShape, Error> {
    options.validate()?;
    let [batch, q_heads, q_len, head_dim] = q.dims();
    let [_, kv_heads, kv_len, _] = k.dims();
    let shape = AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim };
    if head_dim == 0 {
        return Err(sample_attention_plan::Error::tensor("q", "head_dim", 0, "at least 1").into());
    }
    // The widths that kernels take are no condition: heads of others are attended densely.
    AttentionShape { head_dim: 16, ..shape }.validate()?;
    for (name, tensor) in [("k", k), ("v", v)] {
        let expected = [batch, kv_heads, kv_len, head_dim];
        if tensor.dims() != expected {
            return Err(refuse(name, "shape", tensor.dims(), expected));
        }
        if tensor.dtype() != q.dtype() {
            return Err(refuse(name, "type", tensor.dtype(), q.dtype()));
        }
        if tensor.device() != q.device() {
            return Err(refuse(name, "device", tensor.device(), q.device()));
        }
    }
    Ok(shape)
}
