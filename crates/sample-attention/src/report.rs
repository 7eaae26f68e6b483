//! What a plan kept, and at what price.

use std::fmt;

use burn::tensor::backend::{Backend, ExecutionError};
use burn::tensor::{DType, Int, Tensor};
use sample_attention_plan::HostPlan;
use serde::{Deserialize, Serialize};

use crate::{AttentionBackend, Error};

/// The plan of a call, on the device.
#[derive(Debug, Clone)]
pub struct Plan<B: AttentionBackend> {
    /// Kept over causal query-key pairs, `[heads of all sequences]`.
    pub density: Tensor<B, 1>,
    /// Mean and minimum over the sampled rows of the kept mass, `[heads of all sequences, 2]`.
    pub recall: Tensor<B, 2>,
    /// Laid out as [`Sparse::table`](crate::Sparse::table).
    pub table: Tensor<B, 2, Int>,
    /// Laid out as [`Sparse::stripes`](crate::Sparse::stripes).
    pub stripes: Tensor<B, 2, Int>,
}

impl<B: AttentionBackend> Plan<B> {
    /// What it kept, in a few numbers a head: the plan's memory is given back.
    pub fn summary(self) -> Summary<B> {
        let blocks = (self.table.dims()[1] - 2) / 2;
        // The running count of kept distances ends with their number.
        let column = |at| self.table.clone().narrow(1, at, 1).float().cast(DType::F32);
        let columns =
            vec![self.density.unsqueeze_dim(1), self.recall, column(0), column(1), column(1 + blocks)];
        Summary { columns: Tensor::cat(columns, 1) }
    }

    /// Reads the report from the device.
    ///
    /// # Errors
    ///
    /// A device that fails.
    pub fn report(self) -> Result<Report, Error> {
        self.summary().report()
    }

    /// Reads bands and stripes of every head from the device.
    ///
    /// # Errors
    ///
    /// A device that fails.
    pub fn read(self) -> Result<Vec<HostPlan>, Error> {
        let failed = |error: ExecutionError| Error::Device(error.to_string());
        let [blocks, columns] = [(self.table.dims()[1] - 2) / 2, self.stripes.dims()[1]];
        let density: Vec<f32> = self.density.try_into_data().map_err(failed)?.iter().collect();
        let table: Vec<i32> = self.table.try_into_data().map_err(failed)?.iter().collect();
        let stripes: Vec<i32> = self.stripes.try_into_data().map_err(failed)?.iter().collect();
        let rows = table.chunks_exact(2 + 2 * blocks).zip(stripes.chunks_exact(columns));
        let plans = rows.zip(density).map(|((row, stripes), density)| {
            let kept_up_to = &row[2..2 + blocks];
            HostPlan {
                dense: row[0] != 0,
                bands: (0..blocks).map(|d| d == 0 || kept_up_to[d] != kept_up_to[d - 1]).collect(),
                stripes: stripes[..row[1] as usize].to_vec(),
                density,
            }
        });
        Ok(plans.collect())
    }
}

/// The numbers of a [`Report`], on the device.
#[derive(Debug, Clone)]
pub struct Summary<B: Backend> {
    /// Density, mean and minimum recall, whether it is dense, stripes, bands: `[heads of all sequences, 6]`.
    columns: Tensor<B, 2>,
}

impl<B: Backend> Summary<B> {
    /// Reads the report from the device.
    ///
    /// # Errors
    ///
    /// A device that fails.
    pub fn report(self) -> Result<Report, Error> {
        let data = self.columns.try_into_data().map_err(|error| Error::Device(error.to_string()))?;
        let numbers: Vec<f32> = data.iter().collect();
        let head = |numbers: &[f32]| HeadReport {
            density: numbers[0],
            recall_mean: numbers[1],
            recall_min: numbers[2],
            dense: numbers[3] != 0.0,
            stripes: numbers[4] as usize,
            bands: numbers[5] as usize,
        };
        Ok(Report { heads: numbers.chunks_exact(6).map(head).collect() })
    }
}

/// What one head kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HeadReport {
    /// Whether it attended to all keys.
    pub dense: bool,
    /// Kept over causal query-key pairs.
    pub density: f32,
    /// Mean over the sampled rows of the kept probability mass.
    pub recall_mean: f32,
    /// Minimum over the sampled rows of the kept probability mass (the paper's CRA).
    pub recall_min: f32,
    /// Kept key columns.
    pub stripes: usize,
    /// Kept block distances.
    pub bands: usize,
}

/// What a call kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The heads, numbered `sequence * heads + head`.
    pub heads: Vec<HeadReport>,
}

impl Report {
    /// Every head dense.
    pub fn dense(heads: usize) -> Self {
        let head =
            HeadReport { dense: true, density: 1.0, recall_mean: 1.0, recall_min: 1.0, stripes: 0, bands: 0 };
        Self { heads: vec![head; heads] }
    }

    /// Kept over causal query-key pairs, over all heads.
    pub fn density(&self) -> f32 {
        self.mean(|head| head.density)
    }

    /// Mean over heads and sampled rows of the kept mass.
    pub fn recall_mean(&self) -> f32 {
        self.mean(|head| head.recall_mean)
    }

    /// The least mass that a sampled row of any head kept.
    pub fn recall_min(&self) -> f32 {
        self.heads.iter().map(|head| head.recall_min).fold(1.0, f32::min)
    }

    /// Heads that attended to all keys.
    pub fn dense_heads(&self) -> usize {
        self.heads.iter().filter(|head| head.dense).count()
    }

    fn mean(&self, value: impl Fn(&HeadReport) -> f32) -> f32 {
        self.heads.iter().map(value).sum::<f32>() / self.heads.len().max(1) as f32
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            formatter,
            "density {:.3}, recall mean {:.4} and minimum {:.4}, {} of {} heads dense",
            self.density(),
            self.recall_mean(),
            self.recall_min(),
            self.dense_heads(),
            self.heads.len()
        )?;
        writeln!(
            formatter,
            "{:>5} {:>8} {:>8} {:>8} {:>8} {:>6}",
            "head", "density", "recall", "minimum", "stripes", "bands"
        )?;
        for (index, head) in self.heads.iter().enumerate() {
            let HeadReport { density, recall_mean, recall_min, stripes, bands, dense } = *head;
            let note = if dense { "  dense" } else { "" };
            writeln!(
                formatter,
                "{index:>5} {density:>8.3} {recall_mean:>8.4} {recall_min:>8.4} {stripes:>8} {bands:>6}{note}"
            )?;
        }
        Ok(())
    }
}
