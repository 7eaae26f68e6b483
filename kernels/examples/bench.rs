//! Times the kernels and checks a few rows of every output in `f64`, one line per measurement.
//!
//! ```text
//! bench cuda|vulkan|wgpu [auto|units|cmma|mma] [LENGTH...]
//! bench cuda|vulkan|wgpu selftest
//! ```
//! 32 query heads of 128, causal, `bf16` where the product has it, otherwise `f16`, otherwise `f32`.

#![cfg_attr(not(any(feature = "cuda", feature = "wgpu")), allow(dead_code, unused_imports))]

use std::{env, process::ExitCode, time::Instant};

use cubecl::{prelude::*, server::Handle};
use sample_attention_kernels::{
    AttentionShape, Error, HostPlan, Rule, SampleAttentionOptions, Stage, TensorView, TileProduct,
    available_products, bf16_type, decode, dense_attention, f32_type, from_bytes, half_type, reference,
    sample_attention, sample_attention_by_stage, selftest, to_bytes,
};

const HEADS: usize = 32;
const DIM: usize = 128;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done: Result<(), String> = match words.as_slice() {
        #[cfg(feature = "wgpu")]
        ["wgpu" | "vulkan", rest @ ..] => {
            run(&cubecl::wgpu::WgpuRuntime::client(&cubecl::wgpu::WgpuDevice::default()), rest)
        }
        #[cfg(feature = "cuda")]
        ["cuda", rest @ ..] => {
            run(&cubecl::cuda::CudaRuntime::client(&cubecl::cuda::CudaDevice::default()), rest)
        }
        _ => Err("usage: bench cuda|vulkan|wgpu [selftest | [auto|units|cmma|mma] [LENGTH...]]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run<R: Runtime>(client: &ComputeClient<R>, words: &[&str]) -> Result<(), String> {
    let (product, words) = match words {
        ["selftest", ..] => {
            println!("{}", selftest::Row::HEAD);
            let passed = selftest::run(client, &[], 1, |row| println!("{row}"));
            return match passed {
                Ok(true) => Ok(()),
                Ok(false) => Err("some checks failed".into()),
                Err(error) => Err(error.to_string()),
            };
        }
        ["units", rest @ ..] => (TileProduct::Units, rest),
        ["cmma", rest @ ..] => (TileProduct::Cmma, rest),
        ["mma", rest @ ..] => (TileProduct::Mma, rest),
        ["auto", rest @ ..] => (TileProduct::Auto, rest),
        rest => (TileProduct::Auto, rest),
    };
    let lengths = words.iter().map(|word| word.parse().map_err(|_| format!("`{word}` is not a length")));
    let mut lengths = lengths.collect::<Result<Vec<usize>, _>>()?;
    if lengths.is_empty() {
        lengths = vec![8192, 32768];
    }
    let offers = |dtype: &StorageType| {
        let products = available_products(client, *dtype, DIM, 128);
        products.contains(&product)
            || (product == TileProduct::Auto && products.iter().any(|product| *product != TileProduct::Units))
    };
    let dtype = [bf16_type(), half_type(), f32_type()].into_iter().find(offers).unwrap_or(f32_type());
    for length in lengths {
        for kv_heads in [HEADS, 2] {
            measure(client, kv_heads, length, dtype, product).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

/// Uniform numbers in -1..1 by a hash of their index: fast, and the same everywhere.
fn noise(seed: u64, index: usize) -> f32 {
    let mut x = (index as u64).wrapping_add(seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// The rows of one head; a `hot` share of them is what every query looks at.
fn rows(length: usize, hot: f32, seed: u64) -> Vec<f32> {
    const PULL: f32 = 2.5;
    (0..length * DIM)
        .map(|index| {
            let is_hot = 0.5 * noise(7, index / DIM) + 0.5 < hot;
            let pull = if is_hot && index % DIM >= DIM - 16 { PULL } else { 0.0 };
            noise(seed, index) + pull
        })
        .collect()
}

/// One problem: all heads hold the same numbers.
struct Problem<R: Runtime> {
    shape: AttentionShape,
    dtype: StorageType,
    /// One head of q, k and v, rounded to the type.
    host: [Vec<f32>; 3],
    q: TensorView<R>,
    k: TensorView<R>,
    v: TensorView<R>,
    out: TensorView<R>,
}

impl<R: Runtime> Problem<R> {
    fn new(
        client: &ComputeClient<R>,
        (kv_heads, q_len, kv_len): (usize, usize, usize),
        dtype: StorageType,
        hot: f32,
    ) -> Self {
        let shape = AttentionShape { batch: 1, q_heads: HEADS, kv_heads, q_len, kv_len, head_dim: DIM };
        let heads = [rows(q_len, 1.0, 1), rows(kv_len, hot, 2), rows(kv_len, 0.0, 3)];
        let bytes = heads.map(|head| to_bytes(&head, dtype));
        let view = |head: &[u8], heads: usize, length: usize| {
            let handle = client.create_from_slice(&head.repeat(heads));
            TensorView::contiguous(handle, [1, heads, length, DIM], dtype)
        };
        Self {
            q: view(&bytes[0], HEADS, q_len),
            k: view(&bytes[1], kv_heads, kv_len),
            v: view(&bytes[2], kv_heads, kv_len),
            out: view(&to_bytes(&vec![f32::NAN; q_len * DIM], dtype), HEADS, q_len),
            host: bytes.map(|bytes| from_bytes(&bytes, dtype)),
            shape,
            dtype,
        }
    }

    /// The largest relative error of a few output rows, by Euclidean norm.
    fn error(
        &self,
        client: &ComputeClient<R>,
        plans: &[HostPlan],
        options: &SampleAttentionOptions,
    ) -> Result<f64, Error> {
        let one = AttentionShape { q_heads: 1, kv_heads: 1, ..self.shape };
        let [q, k, v] = &self.host;
        let q_len = self.shape.q_len;
        let mut largest = 0.0;
        for (head, row) in
            [(0, 0), (HEADS / 2, q_len / 2), (HEADS - 1, q_len * 4 / 5), (HEADS - 1, q_len - 1)]
        {
            let (expected, _) = reference::attention_row(&one, options, q, k, v, &plans[head], (0, row));
            let row_bytes = (DIM * self.dtype.size()) as u64;
            let start = (head * q_len + row) as u64 * row_bytes;
            let size = self.out.handle.size_in_used();
            let part: Handle =
                self.out.handle.clone().offset_start(start).offset_end(size - start - row_bytes);
            let bytes = client.read_one(part).map_err(|error| Error::Device(format!("{error:?}")))?;
            let found = from_bytes(&bytes, self.dtype);
            let gap: f64 = found.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
            let error = (gap / expected.iter().map(|x| x * x).sum::<f64>()).sqrt();
            largest = if error.is_finite() { f64::max(largest, error) } else { f64::INFINITY };
        }
        Ok(largest)
    }
}

fn sync<R: Runtime>(client: &ComputeClient<R>) {
    if let Err(error) = cubecl::future::block_on(client.sync()) {
        eprintln!("the device failed: {error:?}");
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Median seconds of a call, the device idle before and after each.
fn time<R: Runtime>(
    client: &ComputeClient<R>,
    mut call: impl FnMut() -> Result<(), Error>,
) -> Result<f64, Error> {
    let mut seconds = Vec::new();
    for round in 0..8 {
        sync(client);
        let start = Instant::now();
        call()?;
        sync(client);
        if round >= 2 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(median(seconds))
}

/// Median seconds of each stage, the device idle between them.
fn time_stages<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem<R>,
    options: &SampleAttentionOptions,
) -> Result<Vec<(Stage, f64)>, Error> {
    let mut rounds: Vec<Vec<(Stage, f64)>> = Vec::new();
    for _ in 0..5 {
        let mut stages = Vec::new();
        sync(client);
        let mut start = Instant::now();
        let tensors = [&problem.q, &problem.k, &problem.v, &problem.out];
        sample_attention_by_stage(client, tensors, options, |stage| {
            sync(client);
            stages.push((stage, start.elapsed().as_secs_f64()));
            start = Instant::now();
        })?;
        rounds.push(stages);
    }
    let stages = rounds[0].iter().enumerate();
    Ok(stages
        .map(|(at, &(stage, _))| (stage, median(rounds.iter().map(|round| round[at].1).collect())))
        .collect())
}

fn measure<R: Runtime>(
    client: &ComputeClient<R>,
    kv_heads: usize,
    length: usize,
    dtype: StorageType,
    product: TileProduct,
) -> Result<(), Error> {
    let name = format!("{product} {dtype} {HEADS}/{kv_heads} x {DIM}, {length}");
    let problem = Problem::new(client, (kv_heads, length, length), dtype, 0.04);
    let Problem { q, k, v, out, shape, .. } = &problem;
    let operations = 4.0 * (DIM * HEADS) as f64 * shape.causal_pairs();
    let default = SampleAttentionOptions { product, ..SampleAttentionOptions::default() };
    let all = vec![HostPlan::dense(shape.blocks(&default)); HEADS];

    let dense = time(client, || dense_attention(client, q, k, v, out, None, product).map(drop))?;
    let error = problem.error(client, &all, &default)?;
    println!(
        "{name}: dense {:.3} ms, {:.1} TFLOP/s, error {error:.1e}",
        dense * 1e3,
        operations / dense / 1e12
    );

    for (label, hot, options) in [
        ("residual, window 3%, 4% hot", 0.04, SampleAttentionOptions { window_ratio: 0.03, ..default }),
        ("residual, window 8%, 11% hot", 0.11, default),
        (
            "joint, window 4%, 4% hot",
            0.04,
            SampleAttentionOptions { rule: Rule::Joint, window_ratio: 0.04, ..default },
        ),
    ] {
        let problem = Problem::new(client, (kv_heads, length, length), dtype, hot);
        let Problem { q, k, v, out, .. } = &problem;
        let op = time(client, || sample_attention(client, q, k, v, out, &options).map(drop))?;
        let plan = sample_attention(client, q, k, v, out, &options)?.plan;
        let plans = plan.map_or(Ok(all.clone()), |plan| plan.read(client))?;
        let error = problem.error(client, &plans, &options)?;
        let density = plans.iter().map(|plan| f64::from(plan.density)).sum::<f64>() / plans.len() as f64;
        let stages = time_stages(client, &problem, &options)?;
        let attention = stages.last().map_or(f64::NAN, |&(_, seconds)| seconds);
        let stages: Vec<String> =
            stages.iter().map(|(stage, seconds)| format!("{stage:?} {:.3}", seconds * 1e3)).collect();
        println!(
            "{name}: {label}: density {density:.3}, op {:.3} ms, {:.2}x dense; {} ms; attention {:.1} TFLOP/s \
             over kept pairs, error {error:.1e}",
            op * 1e3,
            dense / op,
            stages.join(", "),
            operations * density / attention / 1e12,
        );
    }

    let problem = Problem::new(client, (kv_heads, 1, length), dtype, 0.04);
    let Problem { q, k, v, out, .. } = &problem;
    let seconds = time(client, || decode(client, q, k, v, out, None).map(drop))?;
    let error = problem.error(client, &all, &default)?;
    let bytes = (2 * kv_heads * length * DIM * dtype.size()) as f64;
    println!("{name}: decode {:.1} us, {:.0} GB/s, error {error:.1e}", seconds * 1e6, bytes / seconds / 1e9);
    Ok(())
}
