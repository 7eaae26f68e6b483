//! Cases with plans and outputs that an independent implementation made.

use std::{fs, path::Path};

use cubecl::prelude::*;
use safetensors::SafeTensors;
use serde::Deserialize;

use super::{PlanCheck, Row, lse_error, rows_error};
use crate::{
    AttentionShape, Error, HostPlan, OpInputs, SampleAttentionOptions, TileProduct, f32_type, from_bytes,
    run_op,
};

/// One case: `golden.json` and `golden.safetensors` of a folder, parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct GoldenCase {
    name: String,
    options: SampleAttentionOptions,
    shape: AttentionShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    lse: Vec<f32>,
    plans: Vec<HostPlan>,
    recall: Vec<f32>,
    /// Whether a head came so near to one stripe more or less that rounding to `f32` may decide.
    is_close: bool,
}

/// The fields of `golden.json` that are used.
#[derive(Deserialize)]
struct Description {
    config: SampleAttentionOptions,
    shape: AttentionShape,
    dense: Vec<Vec<bool>>,
    smallest_margin: Option<f64>,
}

/// Margin, relative to the need, below which rounding to `f32` may decide.
const CLOSE: f64 = 1e-6;

/// Largest absolute error of an output or a log-sum-exp.
const TOLERANCE: f32 = 1e-4;

impl GoldenCase {
    /// Reads the two files of a folder.
    ///
    /// # Errors
    /// A file that is missing or that [`parse`](Self::parse) refuses.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned();
        let read = |file: &str| {
            fs::read(folder.join(file)).map_err(|error| case_error(&name, format!("{file}: {error}")))
        };
        Self::parse(&name, &read("golden.json")?, &read("golden.safetensors")?)
    }

    /// Parses the two files of a case.
    ///
    /// # Errors
    /// [`Error::Case`] with what is missing or does not fit.
    pub fn parse(name: &str, json: &[u8], tensors: &[u8]) -> Result<Self, Error> {
        let fail = |reason: String| case_error(name, reason);
        let description: Description =
            serde_json::from_slice(json).map_err(|error| fail(error.to_string()))?;
        let file = SafeTensors::deserialize(tensors).map_err(|error| fail(error.to_string()))?;
        let bytes = |tensor: &str, expected: usize| -> Result<Vec<u8>, Error> {
            let data = file.tensor(tensor).map_err(|error| fail(format!("{tensor}: {error}")))?.data();
            match data.len() == expected {
                true => Ok(data.to_vec()),
                false => Err(fail(format!("{tensor} has {} bytes, expected {expected}", data.len()))),
            }
        };
        let floats = |tensor: &str, count: usize| Ok(from_bytes(&bytes(tensor, 4 * count)?, f32_type()));
        let ints = |tensor: &str, count: usize| -> Result<Vec<i32>, Error> {
            let words = bytes(tensor, 4 * count)?;
            Ok(words
                .chunks_exact(4)
                .map(|word| i32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect())
        };
        let (options, shape) = (description.config, description.shape);
        options.validate()?;
        shape.validate()?;
        let AttentionShape { batch, kv_heads, q_len, kv_len, head_dim, .. } = shape;
        let (heads, blocks) = (shape.heads(), shape.blocks(&options));
        let dense: Vec<bool> = description.dense.into_iter().flatten().collect();
        if dense.len() != heads {
            return Err(fail(format!("`dense` names {} heads, expected {heads}", dense.len())));
        }
        let width =
            file.tensor("stripes").ok().and_then(|stripes| stripes.shape().last().copied()).unwrap_or(0);
        let (stripes, counts) = (ints("stripes", heads * width)?, ints("stripe_count", heads)?);
        let (bands, density) = (bytes("bands", heads * blocks)?, floats("density", heads)?);
        let plan = |head: usize| HostPlan {
            dense: dense[head],
            bands: bands[head * blocks..][..blocks].iter().map(|&kept| kept != 0).collect(),
            stripes: stripes[head * width..][..width]
                .iter()
                .copied()
                .take(counts[head].max(0) as usize)
                .collect(),
            density: density[head],
        };
        Ok(Self {
            name: name.into(),
            options,
            shape,
            q: floats("q", heads * q_len * head_dim)?,
            k: floats("k", batch * kv_heads * kv_len * head_dim)?,
            v: floats("v", batch * kv_heads * kv_len * head_dim)?,
            out: floats("out", heads * q_len * head_dim)?,
            lse: floats("lse", heads * q_len)?,
            plans: (0..heads).map(plan).collect(),
            recall: floats("recall", heads)?,
            is_close: description.smallest_margin.is_some_and(|margin| margin < CLOSE),
        })
    }

    /// Runs the case in `f32` by plain units. It passes if plans are equal, densities and recalls
    /// within 1e-5, and outputs and log-sum-exps within 1e-4.
    ///
    /// Where rounding may decide over a stripe, one more or less in a head passes as well.
    ///
    /// # Errors
    /// As [`run_op`].
    pub fn check<R: Runtime>(&self, client: &ComputeClient<R>) -> Result<Row, Error> {
        let options = SampleAttentionOptions { product: TileProduct::Units, ..self.options };
        let inputs = OpInputs { shape: self.shape, q: &self.q, k: &self.k, v: &self.v, dtype: f32_type() };
        let found = run_op(client, &inputs, &options)?;
        let plan = PlanCheck::of(&found.plans, &self.plans);
        let fits = match plan {
            PlanCheck::Stripes(gap) => self.is_close && gap <= 1,
            PlanCheck::Different | PlanCheck::Joint { .. } => false,
            PlanCheck::Dense | PlanCheck::Equal => {
                let density: Vec<f32> = self.plans.iter().map(|plan| plan.density).collect();
                is_near(&found.density(), &density, 1e-5) && is_near(&found.recall, &self.recall, 1e-5)
            }
        };
        let out: Vec<f64> = self.out.iter().map(|&x| x.into()).collect();
        let lse: Vec<f64> = self.lse.iter().map(|&x| x.into()).collect();
        Ok(Row {
            case: self.name.clone(),
            product: options.product,
            dtype: f32_type(),
            shape: self.shape,
            out_error: rows_error(&found.out, &out, self.shape.head_dim),
            lse_error: lse_error(&found.lse, &lse),
            plan,
            passed: fits
                && is_near(&found.out, &self.out, TOLERANCE)
                && is_near(&found.lse, &self.lse, TOLERANCE),
        })
    }
}

fn case_error(case: &str, reason: String) -> Error {
    Error::Case { case: case.into(), reason }
}

/// Whether all pairs are within a tolerance; a NaN never is.
fn is_near(found: &[f32], expected: &[f32], tolerance: f32) -> bool {
    found.len() == expected.len()
        && found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() <= tolerance)
}
