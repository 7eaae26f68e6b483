use std::fmt;
use std::str::FromStr;

use sample_attention_plan::SampleAttentionOptions;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Options by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Every key, whatever the length.
    Dense,
    /// 0.95 of the sampled mass of at most 1024 rows, stripes counted outside a window of 8%.
    #[default]
    Default,
    /// The paper's setting: 0.95, a column's score is all of its sampled mass.
    Paper,
    /// The paper's second setting: 0.80.
    Fast,
    /// 0.95 of at most 1024 rows, bands and stripes chosen together besides a window of 4%.
    Joint,
    /// What contributes to the output, as at most 1024 rows say, besides a window of 4%.
    Contribution,
}

impl Preset {
    /// All presets.
    pub const ALL: [Self; 6] =
        [Self::Dense, Self::Default, Self::Paper, Self::Fast, Self::Joint, Self::Contribution];

    /// What it stands for.
    pub fn options(self) -> SampleAttentionOptions {
        match self {
            Self::Dense => SampleAttentionOptions { dense_below: usize::MAX, ..Default::default() },
            Self::Default => SampleAttentionOptions::default(),
            Self::Paper => SampleAttentionOptions::paper(),
            Self::Fast => SampleAttentionOptions::fast(),
            Self::Joint => SampleAttentionOptions::joint(),
            Self::Contribution => SampleAttentionOptions::contribution(),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Default => "default",
            Self::Paper => "paper",
            Self::Fast => "fast",
            Self::Joint => "joint",
            Self::Contribution => "contribution",
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|preset| preset.name() == name)
            .ok_or_else(|| Error::Preset(name.to_string()))
    }
}
