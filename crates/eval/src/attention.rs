//! The kinds of attention that are compared, and what each kept.

use std::str::FromStr;

use long_context::cache::{AttentionConfig, LayerReport};
use sample_attention::{Preset, SampleAttentionOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Options of SampleAttention under a name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NamedAttention {
    /// What tables call it.
    pub name: String,
    /// The options.
    pub options: SampleAttentionOptions,
}

impl NamedAttention {
    /// The same options in every layer, with reports.
    pub fn config(&self) -> AttentionConfig {
        AttentionConfig { options: self.options, report: true, ..Default::default() }
    }

    /// Whether it attends to everything, whatever the length.
    pub fn is_dense(&self) -> bool {
        self.options == Preset::Dense.options()
    }
}

impl From<Preset> for NamedAttention {
    fn from(preset: Preset) -> Self {
        Self { name: preset.name().to_string(), options: preset.options() }
    }
}

impl FromStr for NamedAttention {
    type Err = String;

    /// `NAME={...}`: a JSON object of options; `"preset"` in it names the preset whose options the others
    /// replace, the default one without it.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, json) =
            text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or("expected NAME={...}")?;
        let mut given: Map<String, Value> =
            serde_json::from_str(json).map_err(|error| format!("options of {name}: {error}"))?;
        let preset = match given.remove("preset") {
            None => Preset::Default,
            Some(Value::String(name)) => name.parse().map_err(|error| format!("{error}"))?,
            Some(other) => return Err(format!("preset of {name}: found {other}, expected a name")),
        };
        if let Some(rule) = given.remove("coverage") {
            given.insert("rule".to_string(), rule);
        }
        let mut options =
            serde_json::to_value(preset.options()).map_err(|error| format!("options of {name}: {error}"))?;
        if let Value::Object(options) = &mut options {
            options.extend(given);
        }
        let options: SampleAttentionOptions =
            serde_json::from_value(options).map_err(|error| format!("options of {name}: {error}"))?;
        options.validate().map_err(|error| format!("{name}: {error}"))?;
        Ok(Self { name: name.to_string(), options })
    }
}

/// How much of causal attention was computed, and how much of its mass that held.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Kept over causal query-key pairs, over all layers and heads.
    pub density: f64,
    /// Mean kept mass of the sampled rows.
    pub recall: f64,
    /// The least mass that a sampled row of any head kept.
    pub recall_min: f64,
}

impl Kept {
    /// Everything.
    pub const ALL: Self = Self { density: 1.0, recall: 1.0, recall_min: 1.0 };

    /// Sums up what `layers` layers kept in the prefill of `tokens` tokens. What no report tells of was
    /// computed densely.
    pub fn of(reports: &[LayerReport], layers: usize, tokens: usize) -> Self {
        let pairs = |report: &LayerReport| {
            let length = report.length as f64;
            length * report.start as f64 + length * (length + 1.0) / 2.0
        };
        let all = layers as f64 * tokens as f64 * (tokens as f64 + 1.0) / 2.0;
        let lost = |value: fn(&LayerReport) -> f32| {
            reports.iter().map(|report| pairs(report) * f64::from(1.0 - value(report))).sum::<f64>() / all
        };
        let least = reports.iter().map(|report| report.report.recall_min()).fold(1.0, f32::min);
        Self {
            density: 1.0 - lost(|report| report.report.density()),
            recall: 1.0 - lost(|report| report.report.recall_mean()),
            recall_min: f64::from(least),
        }
    }

    /// The mean over prompts; the least minimum.
    pub fn mean(all: impl IntoIterator<Item = Self>) -> Self {
        let (mut sum, mut count) = (Self { density: 0.0, recall: 0.0, recall_min: 1.0 }, 0.0);
        for kept in all {
            sum.density += kept.density;
            sum.recall += kept.recall;
            sum.recall_min = sum.recall_min.min(kept.recall_min);
            count += 1.0;
        }
        if count == 0.0 {
            return Self::ALL;
        }
        Self { density: sum.density / count, recall: sum.recall / count, ..sum }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sample_attention::{HeadReport, Report};

    #[test]
    fn options_replace_those_of_a_preset() {
        let found: NamedAttention = r#"near={"preset":"joint","alpha":0.97}"#.parse().unwrap();
        let expected = SampleAttentionOptions { alpha: 0.97, ..Preset::Joint.options() };
        assert_eq!((found.name.as_str(), found.options), ("near", expected));
        let plain: NamedAttention = r#"p={"coverage":"total","max_rows":null}"#.parse().unwrap();
        assert_eq!(plain.options, Preset::Paper.options());
    }

    #[test]
    fn options_that_do_not_fit_are_named() {
        for (text, message) in [
            ("joint", "expected NAME={...}"),
            ("={}", "expected NAME={...}"),
            ("a={\"alpha\":2}", "a: option `alpha` is 2, expected a number in (0, 1]"),
            ("a={\"alhpa\":1}", "unknown field `alhpa`"),
            ("a={\"preset\":\"best\"}", "best"),
            ("a=[1]", "options of a: invalid type"),
        ] {
            let error = text.parse::<NamedAttention>().unwrap_err();
            assert!(error.contains(message), "{text}: found {error}, expected {message}");
        }
    }

    #[test]
    fn what_no_report_tells_of_was_dense() {
        let head = HeadReport {
            dense: false,
            density: 0.5,
            recall_mean: 0.9,
            recall_min: 0.3,
            stripes: 1,
            bands: 1,
        };
        let report = LayerReport { layer: 0, start: 0, length: 8, report: Report { heads: vec![head] } };
        let kept = Kept::of(&[report], 2, 8);
        assert!((kept.density - 0.75).abs() < 1e-7 && (kept.recall - 0.95).abs() < 1e-7, "{kept:?}");
        assert!((kept.recall_min - 0.3).abs() < 1e-7);
        assert_eq!(Kept::of(&[], 2, 8), Kept::ALL);
    }
}
