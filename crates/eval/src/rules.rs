//! Rules side by side: what each computes, how it predicts a text, and the keys it finds.

use long_context::generate::Engine;
use long_context_page::Page;
use sample_attention::{Preset, Rule, SampleAttentionOptions};
use serde::Serialize;

use crate::needle::{Haystack, NeedleConfig, NeedleReport};
use crate::perplexity::{PerplexityConfig, PerplexityReport};
use crate::{NamedAttention, Progress, Prompter, Result};

/// The presets, and what else the options allow that is worth a look.
pub fn candidates() -> Vec<NamedAttention> {
    let (residual, joint) = (Preset::Default.options(), Preset::Joint.options());
    let contribution = Preset::Contribution.options();
    let named = [
        ("residual-0.90", SampleAttentionOptions { alpha: 0.90, ..residual }),
        ("residual-0.98", SampleAttentionOptions { alpha: 0.98, ..residual }),
        ("residual-window-4%", SampleAttentionOptions { window_ratio: 0.04, ..residual }),
        ("residual-rows-10%", SampleAttentionOptions { row_ratio: 0.10, ..residual }),
        ("residual-tail-512", SampleAttentionOptions { tail_rows: 512, ..residual }),
        ("joint-0.90", SampleAttentionOptions { alpha: 0.90, ..joint }),
        ("joint-0.97", SampleAttentionOptions { alpha: 0.97, ..joint }),
        ("joint-window-2%", SampleAttentionOptions { window_ratio: 0.02, ..joint }),
        ("joint-rows-10%", SampleAttentionOptions { row_ratio: 0.10, ..joint }),
        ("joint-block-64", SampleAttentionOptions { block_size: 64, ..joint }),
        ("contribution-0.9", SampleAttentionOptions { threshold: 0.9, ..contribution }),
        ("contribution-1.4", SampleAttentionOptions { threshold: 1.4, ..contribution }),
        ("contribution-window-2%", SampleAttentionOptions { window_ratio: 0.02, ..contribution }),
    ];
    let others = named.map(|(name, options)| NamedAttention { name: name.to_string(), options });
    Preset::ALL.map(NamedAttention::from).into_iter().chain(others).collect()
}

/// A table of rules.
#[derive(Debug, Clone, Serialize)]
pub struct RulesReport {
    /// How each predicts a text.
    pub perplexity: PerplexityReport,
    /// The keys that each finds.
    pub needle: NeedleReport,
}

impl RulesReport {
    /// Measures both, the text first: its ids, and its sentences to hide keys in. Both name the same
    /// attentions. `layers` is the model's number of layers.
    ///
    /// # Errors
    ///
    /// Those of [`PerplexityConfig::run`] and [`NeedleConfig::run`].
    pub fn run(
        perplexity: PerplexityConfig,
        needle: NeedleConfig,
        engine: &mut dyn Engine,
        layers: usize,
        prompter: &Prompter<'_>,
        (ids, haystack): (&[u32], &Haystack<'_>),
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        let (first, second) = (perplexity.steps(), needle.answers());
        let mut stopped = false;
        let perplexity = perplexity.run(engine, layers, &prompter.prefix(), ids, &mut |done, _| {
            let flow = progress(done, first + second);
            stopped = flow.is_break();
            flow
        })?;
        let needle = match stopped {
            true => NeedleReport { config: needle, trials: Vec::new() },
            false => needle.run(engine, layers, prompter, haystack, &mut |done, _| {
                progress(first + done, first + second)
            })?,
        };
        Ok(Self { perplexity, needle })
    }

    /// One row a rule.
    pub fn rows(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let fixed = ["rule", "density", "recall", "minimum", "perplexity", "to dense", "KL"];
        let variants = &self.needle.config.variants;
        let head = fixed.map(String::from).into_iter();
        let head = head.chain(variants.iter().map(|variant| variant.to_string())).collect();
        let (_, quality) = self.perplexity.rows();
        let row = |(mut row, attention): (Vec<String>, &NamedAttention)| {
            row.truncate(fixed.len());
            row.extend(variants.iter().map(|&variant| self.needle.tally(attention, variant)));
            row
        };
        (head, quality.into_iter().zip(&self.needle.config.attentions).map(row).collect())
    }

    /// A page with the table, and the options behind each name.
    pub fn page(&self, model: &str) -> String {
        let mut page = Page::new("Rules of attention");
        let (text, needle) = (&self.perplexity.config, &self.needle.config);
        page.paragraph(&format!(
            "{model}. Density, recall, perplexity and KL divergence from dense attention over {} windows of {} \
             tokens; keys found over {} prompts a variant, of {:?} tokens, at depths of {:?} percent, with those that \
             dense attention finds and the rule loses, and the other way round.",
            text.windows,
            text.tokens,
            needle.prompts * needle.lengths.len() * needle.depths.len(),
            needle.lengths,
            needle.depths
        ));
        let (head, rows) = self.rows();
        page.table(&head.iter().map(String::as_str).collect::<Vec<_>>(), rows);
        page.heading("Options");
        let options = text.attentions.iter().map(|rule| {
            let SampleAttentionOptions {
                rule: kind,
                alpha,
                threshold,
                row_ratio,
                window_ratio,
                block_size,
                tail_rows,
                ..
            } = rule.options;
            let goal = if kind == Rule::Contribution { threshold } else { alpha };
            let numbers = [goal, row_ratio, window_ratio].map(|number| number.to_string());
            let counts = [block_size, tail_rows].map(|number| number.to_string());
            let name = if rule.is_dense() { "all keys".to_string() } else { rule.options.rule.to_string() };
            [rule.name.clone(), name].into_iter().chain(numbers).chain(counts).collect::<Vec<_>>()
        });
        page.table(&["rule", "kind", "alpha or threshold", "rows", "window", "block", "tail"], options);
        page.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_valid_and_named_apart() {
        let candidates = candidates();
        let names: std::collections::BTreeSet<&str> =
            candidates.iter().map(|rule| rule.name.as_str()).collect();
        assert_eq!(names.len(), candidates.len());
        assert!(candidates.iter().all(|rule| rule.options.validate().is_ok()));
    }
}
