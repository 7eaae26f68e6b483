//! The calls: check, then launch the stages one after the other.

use cubecl::{future::block_on, prelude::*, profile::TimingMethod, server::Handle};

use crate::{
    Error, Plan, Rule, SampleAttentionOptions, Stage, StageTimes, TensorView, TileProduct,
    call::Call,
    contribution::{contribution_bands, contribution_filter},
    decode::{MAX_DECODE_QUERIES, split_keys},
    filter::window_filter,
    flash::flash,
    ladder::{joint_filter, ladder},
    sample::{Levels, Sampled, column_scores, row_lse},
    select::{UNITS, cube_min, cube_sum},
    tensor::{array, grid},
};

/// What an attention call leaves on the device besides the output.
#[derive(Debug)]
pub struct Attention {
    /// `f32 [batch, q_heads, q_len]`: log-sum-exp (natural logarithm) of each row's scaled scores
    /// over the keys it kept, for merging with attention over other keys.
    pub lse: Handle,
    /// The plan; `None` where every head is dense from the start.
    pub plan: Option<Plan>,
    /// Kept mass of the sampled rows; `None` without a plan.
    pub report: Option<Report>,
}

/// How much of the sampled rows' probability mass the plan kept.
#[derive(Debug, Clone)]
pub struct Report {
    /// `f32 [heads, 2]`: mean and minimum over the sampled rows (the paper's CRA is the minimum).
    pub recall: Handle,
}

/// SampleAttention: attention of `q` over the keys that the sampled rows ask for.
///
/// # Shapes
/// * `q`, `out`: `[batch, q_heads, q_len, head_dim]`
/// * `k`, `v`: `[batch, kv_heads, kv_len, head_dim]`, `kv_len >= q_len`; query row `i` stands at
///   position `kv_len - q_len + i` and sees the keys up to there.
///
/// Strides are free but for the last one, which is 1. Every element of `out` is written; `out` must
/// not overlap the inputs.
///
/// Nothing is refused for the values it holds. A row with a score that is NaN or positive infinity
/// comes out as NaN, a score of negative infinity weighs nothing, and a value that is not finite may
/// also reach rows of its own block before it. A head with a sampled row that has no finite
/// log-sum-exp is computed densely.
///
/// # Errors
/// An option out of range, shapes, strides, types or memory that do not fit, or a device that does
/// not know the type. Nothing has been launched then.
pub fn sample_attention<R: Runtime>(
    client: &ComputeClient<R>,
    q: &TensorView<R>,
    k: &TensorView<R>,
    v: &TensorView<R>,
    out: &TensorView<R>,
    options: &SampleAttentionOptions,
) -> Result<Attention, Error> {
    attend(client, [q, k, v, out], options, &mut |_, launch| launch())
}

/// Runs [`sample_attention`] of `[q, k, v, out]` stage by stage, the device idle before and after each, and
/// times them.
///
/// # Errors
/// As [`sample_attention`], and a device that fails.
pub fn time_stages<R: Runtime>(
    client: &ComputeClient<R>,
    tensors: [&TensorView<R>; 4],
    options: &SampleAttentionOptions,
) -> Result<StageTimes, Error> {
    let mut times = StageTimes { stages: Vec::new(), on_device: true };
    let mut failure = None;
    attend(client, tensors, options, &mut |stage, launch| match client.profile(launch, "stage") {
        Ok(((), profile)) => {
            times.on_device &= profile.timing_method() == TimingMethod::Device;
            times.stages.push((stage, block_on(profile.resolve()).duration()));
        }
        Err(error) => {
            failure.get_or_insert(Error::device(error));
        }
    })?;
    failure.map_or(Ok(times), Err)
}

/// Runs the launches of a stage, once.
type RunStage<'a> = dyn FnMut(Stage, &mut (dyn FnMut() + Send)) + 'a;

fn attend<R: Runtime>(
    client: &ComputeClient<R>,
    tensors: [&TensorView<R>; 4],
    options: &SampleAttentionOptions,
    run: &mut RunStage<'_>,
) -> Result<Attention, Error> {
    let call = Call::new(client, tensors, options)?;
    let lse = call.words(call.heads() * call.shape.q_len);
    if call.rows.is_empty() {
        run(Stage::Attention, &mut || flash(&call, None, &lse));
        return Ok(Attention { lse, plan: None, report: None });
    }
    let (plan, sampled) = choose_plan(&call, run);
    run(Stage::Attention, &mut || flash(&call, Some(&plan), &lse));
    let report = report(&call, &sampled, &lse);
    Ok(Attention { lse, plan: Some(plan), report: Some(report) })
}

/// The value that a stage's launches leave.
fn stage<T: Send>(run: &mut RunStage<'_>, stage: Stage, launch: impl Fn() -> T + Sync) -> T {
    let mut result = None;
    run(stage, &mut || result = Some(launch()));
    result.unwrap_or_else(launch)
}

/// The first stages of [`sample_attention`] alone; `None` where every head is dense from the
/// start.
///
/// # Shapes
/// As [`sample_attention`].
///
/// # Errors
/// As [`sample_attention`].
pub fn sample_plan<R: Runtime>(
    client: &ComputeClient<R>,
    q: &TensorView<R>,
    k: &TensorView<R>,
    v: &TensorView<R>,
    options: &SampleAttentionOptions,
) -> Result<Option<Plan>, Error> {
    // There is no output; its shape is that of the queries.
    let call = Call::new(client, [q, k, v, q], options)?;
    if call.rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(choose_plan(&call, &mut |_, launch| launch()).0))
}

/// The last stage of [`sample_attention`] alone, with a plan of [`sample_plan`] for the same shapes
/// and options. Returns the log-sum-exp.
///
/// # Shapes
/// As [`sample_attention`].
///
/// # Errors
/// As [`sample_attention`], and a plan for other sizes.
pub fn planned_attention<R: Runtime>(
    client: &ComputeClient<R>,
    q: &TensorView<R>,
    k: &TensorView<R>,
    v: &TensorView<R>,
    out: &TensorView<R>,
    plan: &Plan,
    options: &SampleAttentionOptions,
) -> Result<Handle, Error> {
    let call = Call::new(client, [q, k, v, out], options)?;
    plan.check(&call.shape, options)?;
    let lse = call.words(call.heads() * call.shape.q_len);
    flash(&call, Some(plan), &lse);
    Ok(lse)
}

/// Causal attention over all keys, with the shapes and guarantees of [`sample_attention`]. Returns
/// the log-sum-exp, `f32 [batch, q_heads, q_len]`.
///
/// # Shapes
/// As [`sample_attention`].
///
/// # Errors
/// As [`sample_attention`].
pub fn dense_attention<R: Runtime>(
    client: &ComputeClient<R>,
    q: &TensorView<R>,
    k: &TensorView<R>,
    v: &TensorView<R>,
    out: &TensorView<R>,
    scale: Option<f64>,
    product: TileProduct,
) -> Result<Handle, Error> {
    let options = SampleAttentionOptions { scale, product, ..SampleAttentionOptions::default() };
    let call = Call::new(client, [q, k, v, out], &options)?;
    let lse = call.words(call.heads() * call.shape.q_len);
    flash(&call, None, &lse);
    Ok(lse)
}

/// Causal attention of a few new queries over the whole cache, the keys split over the device's
/// processors and each loaded once for all heads of a group. Returns the log-sum-exp.
///
/// [`dense_attention`] takes this way by itself for so few queries; here it is certain.
///
/// # Shapes
/// As [`sample_attention`], with `q_len` of at most [`MAX_DECODE_QUERIES`].
///
/// # Errors
/// As [`sample_attention`], and more queries than that.
pub fn decode<R: Runtime>(
    client: &ComputeClient<R>,
    q: &TensorView<R>,
    k: &TensorView<R>,
    v: &TensorView<R>,
    out: &TensorView<R>,
    scale: Option<f64>,
) -> Result<Handle, Error> {
    let options = SampleAttentionOptions { scale, ..SampleAttentionOptions::default() };
    let call = Call::new(client, [q, k, v, out], &options)?;
    if call.shape.q_len > MAX_DECODE_QUERIES {
        let expected = format!("at most {MAX_DECODE_QUERIES}");
        return Err(Error::tensor("q", "length", call.shape.q_len, expected));
    }
    let lse = call.words(call.heads() * call.shape.q_len);
    split_keys(&call, &lse);
    Ok(lse)
}

/// The products that the device offers for a type, a head and a block size; those of
/// [`TileProduct::Auto`] are not listed apart.
pub fn available_products<R: Runtime>(
    client: &ComputeClient<R>,
    dtype: StorageType,
    head_dim: usize,
    block_size: usize,
) -> Vec<TileProduct> {
    let view = TensorView::<R>::empty(client, [1, 1, 1, head_dim], dtype);
    let offers = |product: &TileProduct| {
        let options =
            SampleAttentionOptions { product: *product, block_size, ..SampleAttentionOptions::joint() };
        Call::new(client, [&view; 4], &options).is_ok()
    };
    [TileProduct::Units, TileProduct::Cmma, TileProduct::Mma].into_iter().filter(offers).collect()
}

/// Sampling and filtering.
fn choose_plan<R: Runtime>(call: &Call<'_, R>, run: &mut RunStage<'_>) -> (Plan, Sampled) {
    let plan = Plan::empty(call.client, &call.shape, call.options);
    let sampled = stage(run, Stage::Rows, || row_lse(call));
    let columns = |levels| column_scores(call, &sampled, plan.columns, levels);
    match call.options.rule {
        Rule::Joint => {
            let ladder = stage(run, Stage::Bands, || ladder(call, &sampled, &plan));
            let scores = stage(run, Stage::Columns, || columns(&ladder.levels));
            stage(run, Stage::Filter, || joint_filter(call, &plan, &scores, &sampled, &ladder));
        }
        Rule::Contribution => {
            let known = stage(run, Stage::Bands, || contribution_bands(call, &sampled, &plan));
            let scores = stage(run, Stage::Columns, || columns(&known.levels));
            stage(run, Stage::Filter, || contribution_filter(call, &plan, &scores, &sampled, &known));
        }
        rule @ (Rule::Total | Rule::Residual) => {
            let window = call.shape.window(call.options);
            let left_out = |d| rule == Rule::Residual && d <= window;
            let levels: Vec<u32> = (0..plan.blocks).map(|d| u32::from(left_out(d))).collect();
            let levels = Levels {
                table: call.client.create_from_slice(u32::as_bytes(&levels)),
                len: plan.blocks,
                count: 1,
            };
            let scores = stage(run, Stage::Columns, || columns(&levels));
            stage(run, Stage::Filter, || window_filter(call, &plan, &scores));
        }
    }
    (plan, sampled)
}

/// Compares the sampled rows' normalisers over the kept keys with those over all keys.
fn report<R: Runtime>(call: &Call<'_, R>, sampled: &Sampled, lse: &Handle) -> Report {
    let recall = call.words(2 * call.heads());
    // SAFETY: one cube per head, reading sampled rows below q_len.
    unsafe {
        recall_kernel::launch_unchecked::<R>(
            call.client,
            grid(call.heads()),
            CubeDim::new_1d(UNITS as u32),
            array(&sampled.rows, call.samples()),
            array(&sampled.lse, call.heads() * call.samples()),
            array(lse, call.heads() * call.shape.q_len),
            array(&recall, 2 * call.heads()),
            call.shape.q_len as u32,
        );
    }
    Report { recall }
}

/// A kept row's mass is the ratio of its two normalisers.
#[cube(launch_unchecked)]
fn recall_kernel(
    rows: &Array<u32>,
    all_lse: &Array<f32>,
    kept_lse: &Array<f32>,
    recall: &mut Array<f32>,
    q_len: u32,
) {
    let head = (CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X) as usize;
    if head >= recall.len() / 2 {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    let mut sum = 0.0f32;
    let mut least = 1.0f32;
    let mut sample = UNIT_POS as usize;
    while sample < rows.len() {
        let row = head * q_len as usize + rows[sample] as usize;
        let kept = (kept_lse[row] - all_lse[head * rows.len() + sample]).exp();
        sum += kept;
        least = min(least, kept);
        sample += UNITS;
    }
    let sum = cube_sum(sum, &mut scratch);
    let least = cube_min(least, &mut scratch);
    if UNIT_POS == 0 {
        recall[2 * head] = sum / f32::cast_from(rows.len());
        recall[2 * head + 1] = least;
    }
}
