//! One measurement of each kind, as it stands in the JSON.

use serde::{Deserialize, Serialize};

use super::seconds::Spread;

/// Attention alone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OpRow {
    pub backend: String,
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    pub dtype: String,
    /// A preset, `decode`, or a peer's kernel.
    pub attention: String,
    /// `structured`, or the file of captured tensors.
    pub inputs: String,
    /// The density that the inputs were made for, and the share of keys that stand out which reaches it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_density: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    pub length: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Why there are no numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Milliseconds of one call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms: Option<Spread>,
    /// Over the query-key pairs that were kept, the whole call's time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tflops: Option<f64>,
    /// The same over the time of the attention stage alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_tflops: Option<f64>,
    /// Keys and values read, gigabytes a second; decode only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gigabytes_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall_mean: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall_min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_heads: Option<usize>,
    /// Times dense attention's speed on the same backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speedup: Option<f64>,
    /// The largest relative error of a few output rows against float64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageRow>,
    /// Whose clock timed the stages: `device`, or `host` with launches and waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage_clock: Option<String>,
}

/// A stage of one call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRow {
    pub stage: String,
    pub ms: f64,
}

/// A model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelRow {
    pub backend: String,
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    pub dtype: String,
    /// A checkpoint's folder, or a shape with random weights.
    pub model: String,
    pub attention: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_density: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    pub length: usize,
    /// Tokens run at a time in the prefill; none where all are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Seconds to the first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft: Option<Spread>,
    /// Where they go, from a pass of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parts: Option<PartsRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_second: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall_mean: Option<f64>,
    /// The most bytes that the device's allocator held so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speedup: Option<f64>,
}

/// Seconds of a prefill by what they went into, the device waited for at each border.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PartsRow {
    pub attention: f64,
    pub products: f64,
    pub rest: f64,
    pub total: f64,
}

/// A row of either kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
#[allow(clippy::large_enum_variant, reason = "a few dozen a run")]
pub enum Row {
    Op(OpRow),
    Model(ModelRow),
}

impl Row {
    pub fn failed(&self) -> Option<&str> {
        match self {
            Self::Op(row) => row.failed.as_deref(),
            Self::Model(row) => row.failed.as_deref(),
        }
    }
}
