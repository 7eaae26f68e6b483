//! What a prompt's attention looked like: for each head where its mass lay, what was kept of it and what was
//! lost.

mod mass;
mod page;

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::rc::Rc;

use long_context::cache::Observer;
use long_context::generate::{Engine, GenerateError};

pub use mass::{Collector, Grid, HeadMass};

use crate::{NamedAttention, Progress, Result};

/// Cells of a picture in each direction, at most.
const CELLS: usize = 128;
/// A cell is no smaller, so that a row's noise is not taken for a pattern.
const LEAST_TOKENS: usize = 16;

/// What to look at.
#[derive(Debug, Clone)]
pub struct InspectConfig {
    /// The attention to run with.
    pub attention: NamedAttention,
    /// Layers to look at.
    pub layers: RangeInclusive<usize>,
    /// Rows of each block to compute exactly, evenly spaced.
    pub rows_per_block: usize,
    /// Heads to show pictures of, those that lost most first.
    pub max_heads: usize,
}

impl InspectConfig {
    /// Runs a prompt and looks on. One layer's queries and keys are on the host at a time.
    ///
    /// # Errors
    ///
    /// A prompt that does not fit, or a failing device.
    pub fn run(
        self,
        engine: &mut dyn Engine,
        ids: &[u32],
        progress: &mut Progress<'_>,
    ) -> Result<Inspection> {
        let options = self.attention.options;
        // Each cell has a row to look at.
        let least = options.block_size.div_ceil(self.rows_per_block.max(1)).max(LEAST_TOKENS);
        let grid = Grid::new(ids.len(), options.block_size, CELLS, least);
        let collector = Collector::new(ids.len(), grid, options, self.rows_per_block);
        let state = Rc::new(RefCell::new((Some(collector), None)));
        let seen = Rc::clone(&state);
        let observer = Observer::new(self.layers.clone(), move |observation| {
            let (collector, failure) = &mut *seen.borrow_mut();
            if let Some(Err(error)) = collector.as_mut().map(|collector| collector.add(&observation)) {
                failure.get_or_insert(error);
            }
        });
        engine.truncate(0);
        engine.set_attention(&self.attention.config());
        engine.observe(Some(observer));
        let run = engine.prefill(ids, &mut |done| progress(done, ids.len()));
        engine.observe(None);
        run?;
        let (collector, failure) = state.take();
        if let Some(error) = failure {
            return Err(GenerateError::Device(error).into());
        }
        let mut heads = collector.map(Collector::into_heads).unwrap_or_default();
        for report in engine.take_reports()? {
            for head in heads.iter_mut().filter(|head| head.layer == report.layer) {
                head.sampled = report.report.heads[head.head].recall_mean;
            }
        }
        Ok(Inspection { config: self, tokens: ids.len(), grid, heads })
    }
}

/// All heads of a prompt.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// What was looked at.
    pub config: InspectConfig,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// How positions fall into cells.
    pub grid: Grid,
    /// The heads, layer by layer.
    pub heads: Vec<HeadMass>,
}

impl Inspection {
    /// Mean density over the heads.
    pub fn density(&self) -> f64 {
        self.mean(HeadMass::density)
    }

    /// Mean kept mass over the heads.
    pub fn recall(&self) -> f64 {
        self.mean(HeadMass::recall)
    }

    fn mean(&self, value: impl Fn(&HeadMass) -> f64) -> f64 {
        self.heads.iter().map(value).sum::<f64>() / self.heads.len().max(1) as f64
    }

    /// The heads, those that kept least first.
    pub fn worst_first(&self) -> Vec<&HeadMass> {
        let mut heads: Vec<&HeadMass> = self.heads.iter().collect();
        heads.sort_by(|a, b| a.recall().total_cmp(&b.recall()));
        heads
    }

    /// Mass that each token lost, summed over heads and rows looked at.
    fn lost_by_key(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.tokens];
        for head in &self.heads {
            for (sum, lost) in sums.iter_mut().zip(&head.lost_by_key) {
                *sum += f64::from(*lost);
            }
        }
        sums
    }
}
