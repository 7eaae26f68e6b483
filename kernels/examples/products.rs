//! Times what a decoder layer multiplies, at the sizes of ChatGLM3-6B: this crate's `linear` for few rows, and
//! CubeK's matrix products one strategy at a time, with the weight `[out, in]` passed transposed as Burn does.
//!
//! ```text
//! products cuda|vulkan|wgpu launches                     microseconds of a launch, with and without shapes
//! products cuda|vulkan|wgpu linear [ROWS...]             1 row, or as many as named, up to 8
//! products cuda|vulkan|wgpu product [NAME...] [ROWS...]  many rows: 2048 16384, or as many as named
//! products cuda|vulkan|wgpu matmul [NAME...] [ROWS...]   all of qkv dense up down head, 1 2048 16384 rows
//! ```
//! `bf16` where the device has it, otherwise `f16`, otherwise `f32`. Medians, after warm-up. A strategy that
//! does not take a product prints why, and the next one runs.

#![cfg_attr(not(any(feature = "cuda", feature = "wgpu")), allow(dead_code, unused_imports))]

use std::{env, process::ExitCode, time::Instant};

use cubecl::{prelude::*, server::Handle};
use cubek::{
    matmul::{
        components::tile::TileMatmulKind,
        definition::{MatmulElems, MatmulGlobalElems},
        launch::{Strategy, launch_ref},
        routines::{
            BlueprintStrategy::Inferred, double_buffering::DoubleBufferingArgs,
            ordered_double_buffering::OrderedSelectionArgs, simple::SimpleArgs,
        },
    },
    std::InputBinding,
};
use sample_attention_kernels::{
    bf16_type, f32_type, from_bytes, half_type,
    layers::{Linear, MAX_LINEAR_ROWS, RowsView, gated_linear, gated_product, linear, product},
    to_bytes,
};

/// Name, output and input features of a projection.
const PROJECTIONS: [(&str, usize, usize); 5] = [
    ("qkv", 4608, 4096),
    ("dense", 4096, 4096),
    ("up", 27_392, 4096),
    ("down", 4096, 13_696),
    ("head", 65_024, 4096),
];

/// More than any cache holds: a weight is read again only after so many bytes.
const CACHE_BYTES: usize = 256 << 20;

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
        _ => {
            Err("usage: products cuda|vulkan|wgpu launches|linear|product|matmul [NAME...] [ROWS...]".into())
        }
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
    let Some((what, rest)) = words.split_first() else {
        return Err("found nothing to time, expected `launches`, `linear`, `product` or `matmul`".into());
    };
    let (mut names, mut rows) = (Vec::new(), Vec::new());
    for word in rest {
        match word.parse::<usize>() {
            Ok(number) if number > 0 => rows.push(number),
            _ if PROJECTIONS.iter().any(|(name, ..)| name == word) => names.push(*word),
            _ => return Err(format!("found `{word}`, expected rows or one of qkv dense up down head")),
        }
    }
    let asked = PROJECTIONS.into_iter().filter(|(name, ..)| names.is_empty() || names.contains(name));
    let dtype =
        [bf16_type(), half_type()].into_iter().find(|dtype| client.properties().supports_type(*dtype));
    let dtype = dtype.unwrap_or(f32_type());
    let or_else = |default: &[usize]| if rows.is_empty() { default.to_vec() } else { rows.clone() };
    match *what {
        "launches" => launches(client)?,
        "linear" => {
            for (name, outputs, inputs) in asked {
                for rows in or_else(&[1]) {
                    time_linear(client, name, [rows, outputs, inputs], dtype)?;
                }
            }
        }
        "product" => {
            for (name, outputs, inputs) in asked {
                for rows in or_else(&[2048, 16_384]) {
                    time_product(client, name, [rows, outputs, inputs], dtype)?;
                }
            }
        }
        "matmul" => {
            for (name, outputs, inputs) in asked {
                for rows in or_else(&[1, 2048, 16_384]) {
                    time_strategies(client, name, [rows, outputs, inputs], dtype);
                }
            }
        }
        other => {
            return Err(format!("found `{other}`, expected `launches`, `linear`, `product` or `matmul`"));
        }
    }
    Ok(())
}

/// A matrix of numbers in -1..1 that repeat after a while.
fn matrix<R: Runtime>(client: &ComputeClient<R>, [rows, width]: [usize; 2], dtype: StorageType) -> RowsView {
    const PERIOD: usize = 1 << 20;
    let noise = |index: usize| {
        let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ (mixed >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..PERIOD.min(rows * width)).map(noise).collect();
    let block = to_bytes(&values, dtype);
    let mut bytes = block.repeat((rows * width).div_ceil(values.len()));
    bytes.truncate(rows * width * dtype.size());
    RowsView::contiguous(client.create_from_slice(&bytes), rows, width, dtype)
}

fn empty<R: Runtime>(client: &ComputeClient<R>, [rows, width]: [usize; 2], dtype: StorageType) -> RowsView {
    RowsView::contiguous(client.empty(rows * width * dtype.size()), rows, width, dtype)
}

fn sync<R: Runtime>(client: &ComputeClient<R>) -> Result<(), String> {
    cubecl::future::block_on(client.sync()).map_err(|error| format!("{error:?}"))
}

/// Median seconds of a call among `calls` in a row, the device idle before and after them.
fn time<R: Runtime>(
    client: &ComputeClient<R>,
    calls: usize,
    mut call: impl FnMut(usize) -> Result<(), String>,
) -> Result<f64, String> {
    let mut seconds = Vec::new();
    for round in 0..6 {
        sync(client)?;
        let start = Instant::now();
        for at in 0..if round == 0 { 1 } else { calls } {
            call(at)?;
        }
        sync(client)?;
        if round > 0 {
            seconds.push(start.elapsed().as_secs_f64() / calls as f64);
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

#[cube(launch_unchecked)]
fn by_array(values: &mut Array<f32>, last: u32) {
    if UNIT_POS > last {
        values[0] = 1.0;
    }
}

#[cube(launch_unchecked)]
fn by_tensor(values: &mut Tensor<f32>) {
    if UNIT_POS > values.shape(0) as u32 {
        values[0] = 1.0;
    }
}

/// A kernel that takes a tensor finds its shape and strides in a buffer that is copied to the device first.
fn launches<R: Runtime>(client: &ComputeClient<R>) -> Result<(), String> {
    let handle: Handle = client.empty(16);
    let (count, dim) = (CubeCount::Static(1, 1, 1), CubeDim::new_1d(32));
    let array = time(client, 1000, |_| {
        // SAFETY: nothing is written: units are numbered up to 31.
        unsafe {
            let values = ArrayArg::from_raw_parts(handle.clone(), 4);
            by_array::launch_unchecked::<R>(client, count.clone(), dim, values, 31);
        }
        Ok(())
    })?;
    let tensor = time(client, 1000, |_| {
        // SAFETY: nothing is written: units are numbered up to 31.
        unsafe {
            let values = TensorArg::from_raw_parts(handle.clone(), [1].into(), [31].into());
            by_tensor::launch_unchecked::<R>(client, count.clone(), dim, values);
        }
        Ok(())
    })?;
    println!("1000 empty kernels: {:.2} us each, with shape and strides {:.2} us", array * 1e6, tensor * 1e6);
    Ok(())
}

fn time_linear<R: Runtime>(
    client: &ComputeClient<R>,
    name: &str,
    [rows, outputs, inputs]: [usize; 3],
    dtype: StorageType,
) -> Result<(), String> {
    if rows > MAX_LINEAR_ROWS {
        return Err(format!("found {rows} rows, expected at most {MAX_LINEAR_ROWS}"));
    }
    let bytes = outputs * inputs * dtype.size();
    let weights: Vec<RowsView> =
        (0..CACHE_BYTES.div_ceil(bytes) + 1).map(|_| matrix(client, [outputs, inputs], dtype)).collect();
    let weight = |call: usize| &weights[call % weights.len()];
    let (x, y) = (matrix(client, [rows, inputs], dtype), empty(client, [rows, outputs], dtype));
    let seconds = time(client, 64, |call| {
        let call = Linear { x: &x, weight: weight(call), bias: None, residual: None, y: &y };
        linear(client, &call).map_err(|error| error.to_string())
    })?;
    let report = |what: &str, seconds: f64| {
        let rate = bytes as f64 / seconds / 1e9;
        println!(
            "{dtype} {name} {outputs} x {inputs}, {rows} rows: {what} {:.1} us, {rate:.0} GB/s",
            seconds * 1e6
        );
    };
    report("linear", seconds);
    if name == "up" {
        let y = empty(client, [rows, outputs / 2], dtype);
        let seconds = time(client, 64, |call| {
            gated_linear(client, &x, weight(call), None, &y).map_err(|error| error.to_string())
        })?;
        report("gated linear", seconds);
    }
    Ok(())
}

/// The last rows must be what the kernel for few rows makes of them.
fn time_product<R: Runtime>(
    client: &ComputeClient<R>,
    name: &str,
    [rows, outputs, inputs]: [usize; 3],
    dtype: StorageType,
) -> Result<(), String> {
    let (x, weight) = (matrix(client, [rows, inputs], dtype), matrix(client, [outputs, inputs], dtype));
    let last = rows.min(MAX_LINEAR_ROWS);
    let mut few = RowsView { rows: last, ..x.clone() };
    few.handle = few.handle.offset_start(((rows - last) * inputs * dtype.size()) as u64);
    let text = |error: sample_attention_kernels::Error| error.to_string();
    let report = |what: &str, width: usize, seconds: f64, many: &RowsView, few: &RowsView| {
        let values = |view: &RowsView| from_bytes(&client.read_one(view.handle.clone()).unwrap(), dtype);
        let (many, few) = (values(many), values(few));
        let pairs = many[(rows - last) * width..].iter().zip(&few);
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = few.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let rate = 2.0 * (rows * inputs * outputs) as f64 / seconds / 1e12;
        println!(
            "{dtype} {name} {rows} x {inputs} x {outputs}: {what} {:.1} us, {rate:.1} TFLOP/s, \
             differs by {difference:e} of {largest}",
            seconds * 1e6
        );
        match difference <= largest / 100.0 {
            true => Ok(()),
            false => {
                Err(format!("{what} of {name}: differs by {difference:e}, expected at most 1% of {largest}"))
            }
        }
    };
    let (y, y_few) = (empty(client, [rows, outputs], dtype), empty(client, [last, outputs], dtype));
    let call = |x, y| Linear { x, weight: &weight, bias: None, residual: None, y };
    let seconds = time(client, 5, |_| product(client, &call(&x, &y)).map_err(text))?;
    linear(client, &call(&few, &y_few)).map_err(text)?;
    report("product", outputs, seconds, &y, &y_few)?;
    if name == "up" {
        let width = outputs / 2;
        let (y, y_few) = (empty(client, [rows, width], dtype), empty(client, [last, width], dtype));
        let seconds = time(client, 5, |_| gated_product(client, &x, &weight, None, &y).map_err(text))?;
        gated_linear(client, &few, &weight, None, &y_few).map_err(text)?;
        report("gated product", width, seconds, &y, &y_few)?;
    }
    Ok(())
}

/// What Burn's autotune chooses from for a product of matrices, and CubeK's other routines with TMA.
fn matrix_strategies() -> Vec<Strategy> {
    let (cmma, mma) = (TileMatmulKind::Cmma, TileMatmulKind::Mma);
    let mut strategies = Vec::new();
    for multi_rows in [false, true] {
        let simple = |tile_matmul| SimpleArgs { tile_matmul, multi_rows };
        strategies.extend([
            Strategy::SimpleCyclicCmma(Inferred(simple(cmma))),
            Strategy::SimpleCyclicMma(Inferred(simple(mma))),
            Strategy::SimpleTmaCmma(Inferred(simple(cmma))),
            Strategy::SimpleTmaMma(Inferred(simple(mma))),
        ]);
    }
    for row_count in [4, 8] {
        let ordered = |tile_matmul| OrderedSelectionArgs {
            tile_matmul,
            partition_k: Some(2),
            row_count: Some(row_count),
            rows_per_plane: Some(2),
        };
        strategies.extend([
            Strategy::OrderedDoubleCmma(Inferred(ordered(cmma))),
            Strategy::OrderedDoubleMma(Inferred(ordered(mma))),
        ]);
    }
    for specialized in [false, true] {
        let double = |tile_matmul| DoubleBufferingArgs { tile_matmul, specialized };
        strategies.extend([
            Strategy::DoubleCyclicCmma(Inferred(double(cmma))),
            Strategy::DoubleCyclicMma(Inferred(double(mma))),
            Strategy::DoubleTmaCmma(Inferred(double(cmma))),
            Strategy::DoubleTmaMma(Inferred(double(mma))),
        ]);
    }
    strategies.extend([
        Strategy::SpecializedCyclicCmma(Inferred(().into())),
        Strategy::SpecializedCyclicMma(Inferred(().into())),
        Strategy::SpecializedTmaCmma(Inferred(().into())),
        Strategy::SpecializedTmaMma(Inferred(().into())),
    ]);
    strategies
}

/// What Burn's autotune chooses from for a vector times a matrix.
fn vector_strategies() -> Vec<Strategy> {
    vec![
        Strategy::DoubleVecMat(Inferred(().into())),
        Strategy::SimpleVecMat(Inferred(().into())),
        Strategy::GemvPlaneParallel(Inferred(Default::default())),
        Strategy::GemvUnitPerpendicular(Inferred(Default::default())),
    ]
}

fn time_strategies<R: Runtime>(
    client: &ComputeClient<R>,
    name: &str,
    [rows, outputs, inputs]: [usize; 3],
    dtype: StorageType,
) {
    let copies = if rows == 1 { CACHE_BYTES.div_ceil(outputs * inputs * dtype.size()) + 1 } else { 1 };
    let weights: Vec<RowsView> = (0..copies).map(|_| matrix(client, [outputs, inputs], dtype)).collect();
    let (x, y) = (matrix(client, [rows, inputs], dtype), empty(client, [rows, outputs], dtype));
    let binding = |view: &RowsView, shape: [usize; 2], strides: [usize; 2]| TensorBinding {
        handle: view.handle.clone().binding(),
        strides: strides.into(),
        shape: shape.into(),
        runtime: Default::default(),
    };
    let strategies = if rows == 1 { vector_strategies() } else { matrix_strategies() };
    for strategy in strategies {
        let seconds = time(client, if rows == 1 { 64 } else { 2 }, |call| {
            let weight = &weights[call % copies];
            let lhs = InputBinding::new(binding(&x, [rows, inputs], [inputs, 1]), dtype);
            let rhs = InputBinding::new(binding(weight, [inputs, outputs], [1, inputs]), dtype);
            let out = binding(&y, [rows, outputs], [outputs, 1]);
            let types = MatmulGlobalElems { lhs: dtype, rhs: dtype, out: dtype };
            launch_ref(&strategy, client, lhs, rhs, out, &mut MatmulElems::from_globals(&types))
                .map_err(|error| format!("{error:?}"))
        });
        let what = format!("{dtype} {name} {rows} x {inputs} x {outputs}: {strategy}");
        match seconds {
            Ok(seconds) => println!(
                "{what} {:.1} us, {:.1} TFLOP/s, {:.0} GB/s",
                seconds * 1e6,
                2.0 * (rows * inputs * outputs) as f64 / seconds / 1e12,
                (outputs * inputs * dtype.size()) as f64 / seconds / 1e9,
            ),
            Err(error) => println!("{what}: {}", error.lines().next().unwrap_or_default()),
        }
    }
}
