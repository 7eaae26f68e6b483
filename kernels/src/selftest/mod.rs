//! Checks on the user's own device: golden cases and random problems, for every tile product and
//! type that it offers, against the `f64` [`reference`](mod@reference).

mod golden;
mod problem;

use core::fmt;

use cubecl::prelude::*;
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    AttentionShape, Error, HostPlan, OpInputs, OpOutputs, Rule, SampleAttentionOptions, TileProduct,
    available_products, bf16_type, f32_type, half_type, reference, run_op,
};

pub use golden::GoldenCase;
pub use problem::Problem;

/// How a plan compares with the expected one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PlanCheck {
    /// The call was dense from the start, as expected.
    Dense,
    /// The same bands, stripes and dense heads.
    Equal,
    /// The same but for so many stripes, over all heads.
    Stripes(usize),
    /// Other bands or other dense heads.
    Different,
    /// Rule [`Joint`](Rule::Joint): the heads' least recall minus alpha, and their largest density
    /// over that of an exhaustive search for the threshold.
    Joint {
        /// At least 0 where alpha is reached.
        margin: f64,
        /// At most 1.1 where the search is good enough.
        density_ratio: f64,
    },
}

impl PlanCheck {
    /// Compares plans head by head.
    pub fn of(found: &[HostPlan], expected: &[HostPlan]) -> Self {
        if found.iter().chain(expected).all(|plan| plan.dense) && found.len() == expected.len() {
            return Self::Dense;
        }
        let mut gap = 0;
        for (found, expected) in found.iter().zip(expected) {
            if (found.dense, &found.bands) != (expected.dense, &expected.bands) {
                return Self::Different;
            }
            let missing = |from: &HostPlan, of: &HostPlan| {
                let lost = of.stripes.iter().filter(|stripe| from.stripes.binary_search(stripe).is_err());
                lost.count()
            };
            gap += missing(found, expected) + missing(expected, found);
        }
        match gap {
            0 => Self::Equal,
            gap => Self::Stripes(gap),
        }
    }

    /// Whether rounding explains the difference, if there is one.
    fn passed(&self, heads: usize) -> bool {
        match *self {
            Self::Dense | Self::Equal => true,
            Self::Stripes(gap) => gap <= 2 * heads,
            Self::Different => false,
            Self::Joint { margin, density_ratio } => margin > -1e-5 && density_ratio <= 1.1,
        }
    }
}

impl fmt::Display for PlanCheck {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Dense => "dense".into(),
            Self::Equal => "equal".into(),
            Self::Stripes(gap) => format!("{gap} stripes"),
            Self::Different => "DIFFERENT".into(),
            Self::Joint { density_ratio, .. } => format!("x {density_ratio:.3}"),
        };
        formatter.pad(&text)
    }
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Name of the golden case, or the rule of a random problem.
    pub case: String,
    /// What multiplied the tiles.
    pub product: TileProduct,
    /// Element type.
    pub dtype: StorageType,
    /// Sizes.
    pub shape: AttentionShape,
    /// The largest relative error of an output row, by Euclidean norm; infinite if a value is not
    /// finite.
    pub out_error: f64,
    /// The largest error of a log-sum-exp, relative where it is above 1.
    pub lse_error: f64,
    /// How the plan compares.
    pub plan: PlanCheck,
    /// Whether everything is within its limit.
    pub passed: bool,
}

impl Row {
    /// The table's head, in the columns of the rows' [`Display`](fmt::Display).
    pub const HEAD: &'static str =
        "case               product type  batch heads  kv    Sq    Sk   D  out error  lse error  plan";
}

impl fmt::Display for Row {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim } = self.shape;
        write!(
            formatter,
            "{:<18} {:<7} {:<5} {batch:>5} {q_heads:>5} {kv_heads:>3} {q_len:>5} {kv_len:>5} {head_dim:>3}  \
             {:>9.1e}  {:>9.1e}  {}{}",
            self.case,
            self.product,
            self.dtype.to_string(),
            self.out_error,
            self.lse_error,
            self.plan,
            if self.passed { "" } else { "  FAILED" },
        )
    }
}

/// Runs the cases and random problems of growing size in all types or in `only` one (cases are of `f32`),
/// hands each row over as it is done, and returns whether all of them passed.
///
/// # Errors
/// A case that cannot be used, or a device that fails.
pub fn run<R: Runtime>(
    client: &ComputeClient<R>,
    cases: &[GoldenCase],
    only: Option<StorageType>,
    seed: u64,
    mut on_row: impl FnMut(&Row),
) -> Result<bool, Error> {
    let mut all_passed = true;
    let mut done = |row: Row| {
        all_passed &= row.passed;
        on_row(&row);
    };
    let dtypes = [f32_type(), half_type(), bf16_type()].into_iter();
    for dtype in dtypes.filter(|dtype| only.is_none_or(|only| only == *dtype)) {
        let cases = if dtype == f32_type() { cases } else { &[] };
        for case in cases {
            done(case.check(client)?);
        }
        for (number, (shape, block_size)) in problems().into_iter().enumerate() {
            let mut problem =
                Problem::random(shape, &mut StdRng::seed_from_u64(seed.wrapping_add(number as u64)));
            problem.round(dtype);
            for product in available_products(client, dtype, shape.head_dim, block_size) {
                for options in settings(block_size, product) {
                    done(check_problem(client, &problem, dtype, &options)?);
                }
            }
        }
    }
    Ok(all_passed)
}

/// Sizes and block sizes of the random problems.
fn problems() -> [(AttentionShape, usize); 8] {
    let problem = |heads: [usize; 3], [q_len, kv_len]: [usize; 2], head_dim, block_size| {
        let [batch, q_heads, kv_heads] = heads;
        (AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim }, block_size)
    };
    [
        problem([1, 1, 1], [1, 33], 64, 32),
        problem([2, 3, 3], [130, 333], 16, 64),
        problem([1, 4, 2], [201, 777], 80, 64),
        problem([1, 2, 2], [450, 450], 256, 128),
        problem([2, 4, 2], [300, 900], 64, 32),
        problem([1, 3, 1], [1001, 1001], 48, 128),
        problem([1, 2, 1], [640, 1500], 128, 128),
        problem([1, 2, 1], [2500, 2500], 128, 128),
    ]
}

/// Dense attention and every rule.
fn settings(block_size: usize, product: TileProduct) -> [SampleAttentionOptions; 5] {
    let sparse = |rule| SampleAttentionOptions {
        rule,
        alpha: 0.9,
        threshold: 2.0,
        min_rows: 24,
        window_ratio: 0.05,
        block_size,
        tail_rows: 60,
        dense_below: 128,
        dense_cost: None,
        product,
        ..SampleAttentionOptions::default()
    };
    let dense = SampleAttentionOptions { dense_below: usize::MAX, ..sparse(Rule::Residual) };
    [dense, sparse(Rule::Total), sparse(Rule::Residual), sparse(Rule::Joint), sparse(Rule::Contribution)]
}

/// Runs a problem and compares it with the reference: the plan with the reference's plan, the
/// output with the reference's over the keys that the device kept.
///
/// # Errors
/// As [`run_op`].
pub fn check_problem<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    dtype: StorageType,
    options: &SampleAttentionOptions,
) -> Result<Row, Error> {
    let Problem { shape, q, k, v } = problem;
    let found = run_op(client, &OpInputs { shape: *shape, q, k, v, dtype }, options)?;
    let expected = reference::attention(shape, options, q, k, v, &found.plans);
    let (out_error, lse_error) =
        (rows_error(&found.out, &expected.out, shape.head_dim), lse_error(&found.lse, &expected.lse));
    let plan = check_plans(problem, options, &found);
    let limit = if dtype == f32_type() { 1e-5 } else { 1e-2 };
    let case = match plan {
        PlanCheck::Dense => "random dense".into(),
        _ => format!("random {}", options.rule),
    };
    Ok(Row {
        case,
        product: options.product,
        dtype,
        shape: *shape,
        out_error,
        lse_error,
        plan,
        passed: out_error < limit && lse_error < limit && plan.passed(shape.heads()),
    })
}

fn check_plans(problem: &Problem, options: &SampleAttentionOptions, found: &OpOutputs) -> PlanCheck {
    let expected = reference::plans(&problem.shape, options, &problem.q, &problem.k, &problem.v);
    let sampled = !problem.shape.sampled_rows(options).is_empty();
    if options.rule == Rule::Joint && sampled {
        let margin = found.recall.iter().map(|&recall| f64::from(recall) - options.alpha);
        let ratios = found.plans.iter().zip(&expected);
        let ratios = ratios.map(|(found, expected)| f64::from(found.density / expected.plan.density));
        return PlanCheck::Joint {
            margin: margin.fold(f64::INFINITY, f64::min),
            density_ratio: ratios.fold(0.0, f64::max),
        };
    }
    let expected: Vec<HostPlan> = expected.into_iter().map(|expected| expected.plan).collect();
    PlanCheck::of(&found.plans, &expected)
}

/// The largest relative error of a row, by Euclidean norm.
fn rows_error(found: &[f32], expected: &[f64], dim: usize) -> f64 {
    let rows = found.chunks_exact(dim).zip(expected.chunks_exact(dim));
    let errors = rows.map(|(found, expected)| {
        let gap: f64 = found.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
        (gap / expected.iter().map(|x| x * x).sum::<f64>()).sqrt()
    });
    largest(errors)
}

fn lse_error(found: &[f32], expected: &[f64]) -> f64 {
    let pairs = found.iter().zip(expected);
    largest(pairs.map(|(&a, b)| (f64::from(a) - b).abs() / b.abs().max(1.0)))
}

/// The largest number; infinite if one is not finite.
fn largest(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.fold(0.0, |largest, x| if x.is_finite() { f64::max(largest, x) } else { f64::INFINITY })
}
