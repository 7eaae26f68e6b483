//! The stages of the operator and their times.

use std::time::Duration;

/// A stage of SampleAttention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Log-sum-exps of the sampled rows.
    Rows,
    /// Sampled mass per band and what rules [`Joint`](crate::Rule::Joint) and [`Contribution`](crate::Rule::Contribution)
    /// make of it; under the latter also the distances of the values.
    Bands,
    /// Sampled mass per column.
    Columns,
    /// Choice of bands and stripes.
    Filter,
    /// All of the above, where they are not computed one after the other.
    Plan,
    /// Attention over the plan's keys.
    Attention,
}

impl Stage {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Bands => "bands",
            Self::Columns => "columns",
            Self::Filter => "filter",
            Self::Plan => "plan",
            Self::Attention => "attention",
        }
    }
}

/// How long each stage of one call took.
#[derive(Debug, Clone, PartialEq)]
pub struct StageTimes {
    /// In the order they ran.
    pub stages: Vec<(Stage, Duration)>,
    /// Whether the device's own clock took them; otherwise the host's did, launches and waits included.
    pub on_device: bool,
}
