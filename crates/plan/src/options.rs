//! The settings of SampleAttention (arXiv 2406.15486, section 4).

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::Error;

/// How the kept bands and stripes are chosen from the sampled rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// A window of bands; a column's score is all its sampled mass (the paper).
    Total,
    /// A window of bands; a column's score is its sampled mass outside the window.
    Residual,
    /// Bands and stripes at one threshold of sampled mass per kept entry, besides a forced window.
    Joint,
    /// Every band and stripe whose entries contribute more to the output than a threshold, besides a forced window.
    ///
    /// An entry contributes its probability times its value's distance from the mean value of all keys, over the mean
    /// distance of all keys of the sequence's key/value heads: about what the output loses without it.
    Contribution,
}

/// Which instructions multiply the tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TileProduct {
    /// The fastest that the device, the type and the strides allow.
    #[default]
    Auto,
    /// Plain multiply-adds in `f32`: any adapter, any type.
    Units,
    /// Cooperative matrices (`wmma` on CUDA): `f16`, and `bf16` where the driver has it.
    Cmma,
    /// `mma.sync` on NVIDIA cards from Ampere on: `f16` and `bf16`, rows aligned to 16 bytes.
    Mma,
}

impl fmt::Display for TileProduct {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Auto => "auto",
            Self::Units => "units",
            Self::Cmma => "cmma",
            Self::Mma => "mma",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Total => "total",
            Self::Residual => "residual",
            Self::Joint => "joint",
            Self::Contribution => "contribution",
        })
    }
}

/// What is sampled, what is kept, and when a head is computed densely instead.
///
/// Deserializes from a map of these fields; those that are missing take their default, unknown ones
/// are refused. `coverage` is another name of `rule`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleAttentionOptions {
    /// How bands and stripes are chosen.
    #[serde(alias = "coverage")]
    pub rule: Rule,
    /// Share of the sampled probability mass to keep, in `(0, 1]`. Rule [`Contribution`](Rule::Contribution) has a
    /// threshold instead.
    pub alpha: f64,
    /// Mean contribution of a band's or a stripe's entries above which rule [`Contribution`](Rule::Contribution) keeps
    /// it: in units of `1 / kv_len`, what an entry of uniform attention over all keys contributes. A positive number.
    pub threshold: f64,
    /// Share of the rows above the tail to sample, in `[0, 1]`.
    pub row_ratio: f64,
    /// Fewest rows to sample, at least 1.
    pub min_rows: usize,
    /// Most rows to sample; `None` for no bound. What a sample says of a column depends on how many rows it holds, not
    /// on their share, so long prompts need no more than these.
    pub max_rows: Option<usize>,
    /// Width of the forced window, as a share of the key length, in `[0, 1]`.
    pub window_ratio: f64,
    /// Positions per block: a multiple of 16, at most 1024.
    pub block_size: usize,
    /// Last positions that attend to everything, extended down to a block border.
    pub tail_rows: usize,
    /// Key lengths up to this one are computed densely.
    pub dense_below: usize,
    /// A head whose plan keeps more than this share of the causal pairs is computed densely;
    /// `None` to switch the rule off.
    pub dense_cost: Option<f64>,
    /// Factor on the scores; `None` for `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    /// Which instructions to use; [`TileProduct::Auto`] unless one is to be forced.
    pub product: TileProduct,
}

impl Default for SampleAttentionOptions {
    fn default() -> Self {
        Self {
            rule: Rule::Residual,
            alpha: 0.95,
            threshold: 1.1,
            row_ratio: 0.05,
            min_rows: 64,
            max_rows: Some(1024),
            window_ratio: 0.08,
            block_size: 128,
            tail_rows: 128,
            dense_below: 1024,
            dense_cost: Some(0.9),
            scale: None,
            product: TileProduct::Auto,
        }
    }
}

impl SampleAttentionOptions {
    /// The paper's settings, sampled rows unbounded.
    pub fn paper() -> Self {
        Self { rule: Rule::Total, max_rows: None, ..Self::default() }
    }

    /// The paper's second setting: a lower alpha.
    pub fn fast() -> Self {
        Self { alpha: 0.8, ..Self::paper() }
    }

    /// Rule [`Joint`](Rule::Joint) with the window it was measured with.
    pub fn joint() -> Self {
        Self { rule: Rule::Joint, window_ratio: 0.04, ..Self::default() }
    }

    /// Rule [`Contribution`](Rule::Contribution) with the threshold it was measured with.
    pub fn contribution() -> Self {
        Self { rule: Rule::Contribution, window_ratio: 0.04, ..Self::default() }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Option`] with the first field that is out of range.
    pub fn validate(&self) -> Result<(), Error> {
        let Self { alpha, .. } = *self;
        if !(alpha > 0.0 && alpha <= 1.0) {
            return Err(Error::option("alpha", alpha, "a number in (0, 1]"));
        }
        if !(self.threshold.is_finite() && self.threshold > 0.0) {
            return Err(Error::option("threshold", self.threshold, "a positive number"));
        }
        for (field, value) in [("row_ratio", self.row_ratio), ("window_ratio", self.window_ratio)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::option(field, value, "a number in [0, 1]"));
            }
        }
        if self.min_rows == 0 {
            return Err(Error::option("min_rows", 0, "at least 1"));
        }
        if self.max_rows == Some(0) {
            return Err(Error::option("max_rows", 0, "at least 1, or none"));
        }
        if !(16..=1024).contains(&self.block_size) || !self.block_size.is_multiple_of(16) {
            return Err(Error::option("block_size", self.block_size, "a multiple of 16 in 16..=1024"));
        }
        if let Some(cost) = self.dense_cost
            && !(cost > 0.0 && cost <= 1.0)
        {
            return Err(Error::option("dense_cost", cost, "a number in (0, 1]"));
        }
        if let Some(scale) = self.scale
            && !(scale.is_finite() && scale > 0.0)
        {
            return Err(Error::option("scale", scale, "a positive number"));
        }
        Ok(())
    }
}
