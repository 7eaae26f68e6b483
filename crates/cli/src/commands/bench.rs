use std::process::ExitCode;

use long_context::models::ModelConfig;
use long_context_weights::{Chat, Checkpoint};

use super::read_file;
use crate::bench::args::{BenchArgs, BenchCommand, CommonArgs, ModelBenchArgs, OpBenchArgs};
use crate::bench::job::{Density, Job, ModelJob, ModelSource, OpJob, OpSource, Variant};
use crate::bench::run::Run;
use crate::bench::worker;
use crate::error::Error;
use crate::tensors::{content, read_inputs};

/// Lengths where nothing else is asked for.
const LENGTHS: [usize; 2] = [8192, 32_768];
/// Density of a model's structured inputs where nothing else is asked for.
const DENSITY: f64 = 0.1;
/// Query heads for each diffuse one.
const HEADS_PER_DIFFUSE: usize = 32;

pub fn run(args: BenchArgs) -> Result<ExitCode, Error> {
    match args.what {
        BenchCommand::Op(args) => op(&args),
        BenchCommand::Model(args) => model(&args),
        BenchCommand::Worker => worker::run().map(|()| ExitCode::SUCCESS),
    }
}

/// Shapes and where their numbers come from.
struct Shape {
    length: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    inputs: OpSource,
}

fn op(args: &OpBenchArgs) -> Result<ExitCode, Error> {
    let shapes = shapes(args)?;
    let common = &args.common;
    let runs = shapes.len() * common.dtype.len();
    let mut run = Run::new(common, runs * common.backend.len())?;
    let longest = shapes.iter().map(|shape| shape.length).max().unwrap_or(0);
    for shape in &shapes {
        let Shape { length, heads, kv_heads, head_dim, ref inputs } = *shape;
        let sets = match inputs {
            OpSource::Structured { densities, .. } => densities.len(),
            OpSource::Captured { .. } => 1,
        };
        let variants: Vec<Variant> = kinds(common, sets)?.into_iter().chain([Variant::decode()]).collect();
        // One backend after the other on the same inputs, then the peers.
        let name = format!("{length} {heads} {kv_heads} {head_dim}");
        for &dtype in &common.dtype {
            let job = |backend| {
                let (inputs, variants) = (inputs.clone(), variants.clone());
                let limits = args.limits();
                Job::Op(OpJob {
                    backend,
                    dtype,
                    length,
                    longest,
                    heads,
                    kv_heads,
                    head_dim,
                    inputs,
                    variants,
                    limits,
                })
            };
            for &backend in &common.backend {
                run.measure(job(backend), &name)?;
            }
            run.compare(job(common.backend[0]), &name)?;
        }
    }
    finish(run)
}

fn shapes(args: &OpBenchArgs) -> Result<Vec<Shape>, Error> {
    if let Some(file) = &args.captured {
        let found = read_inputs(file)?;
        let ([batch, heads, rows, head_dim], [_, kv_heads, keys, _]) = (found.q.1, found.k.1);
        let refuse = |found: String, expected: String| {
            Err(content(file, format!("tensor `q`: found {found}, expected {expected}")))
        };
        if batch != 1 {
            return refuse(format!("{batch} sequences"), "one".to_string());
        }
        if rows != keys {
            return refuse(format!("{rows} positions"), format!("{keys}, as many as tensor `k` has"));
        }
        if let Some(&long) = args.length.iter().find(|&&length| length > keys) {
            let expected = format!("at most {keys}, the file's tokens");
            return Err(Error::Argument { flag: "--length", found: long.to_string(), expected });
        }
        let lengths = if args.length.is_empty() { vec![keys] } else { args.length.clone() };
        let shape = |length| {
            let inputs = OpSource::Captured { file: file.clone() };
            Shape { length, heads, kv_heads, head_dim, inputs }
        };
        return Ok(lengths.into_iter().map(shape).collect());
    }
    let lengths = if args.length.is_empty() { &LENGTHS[..] } else { &args.length };
    let mut shapes = Vec::new();
    for &length in lengths {
        for &heads in &args.heads {
            for &kv_heads in &args.kv_heads {
                for &head_dim in &args.head_dim {
                    check(heads, kv_heads, head_dim, args.diffuse)?;
                    let densities =
                        args.density.iter().map(|&target| Density { target, share: None }).collect();
                    let diffuse = args.diffuse.unwrap_or(heads / HEADS_PER_DIFFUSE);
                    let inputs = OpSource::Structured { densities, diffuse, seed: args.seed };
                    shapes.push(Shape { length, heads, kv_heads, head_dim, inputs });
                }
            }
        }
    }
    Ok(shapes)
}

fn check(heads: usize, kv_heads: usize, head_dim: usize, diffuse: Option<usize>) -> Result<(), Error> {
    let refuse = |flag, found: usize, expected: String| {
        Err(Error::Argument { flag, found: found.to_string(), expected })
    };
    if !heads.is_multiple_of(kv_heads) {
        return refuse("--kv-heads", kv_heads, format!("a divisor of the {heads} query heads"));
    }
    if !(16..=256).contains(&head_dim) || !head_dim.is_multiple_of(16) {
        return refuse("--head-dim", head_dim, "a multiple of 16 in 16..=256".to_string());
    }
    match diffuse {
        Some(diffuse) if diffuse > heads => {
            refuse("--diffuse", diffuse, format!("at most the {heads} query heads"))
        }
        _ => Ok(()),
    }
}

/// Dense attention, unless it is left out, and the presets on each set of inputs.
fn kinds(common: &CommonArgs, sets: usize) -> Result<Vec<Variant>, Error> {
    let dense = (!common.no_dense).then(Variant::dense);
    let sparse = (0..sets).flat_map(|set| {
        let variant = move |preset: &crate::bench::job::PresetSpec| Variant {
            name: preset.name.clone(),
            options: preset.options,
            set,
            decode: false,
        };
        common.preset.iter().map(variant).filter(|variant| !variant.is_dense())
    });
    let kinds: Vec<Variant> = dense.into_iter().chain(sparse).collect();
    if kinds.is_empty() {
        let (found, expected) = ("dense alone".to_string(), "another preset beside --no-dense".to_string());
        return Err(Error::Argument { flag: "--preset", found, expected });
    }
    Ok(kinds)
}

fn model(args: &ModelBenchArgs) -> Result<ExitCode, Error> {
    let common = &args.common;
    let longest = args.length.iter().copied().max().unwrap_or(0);
    let (model, ids, density) = match (&args.shape, &args.dir) {
        (Some(name), _) => {
            let model = ModelSource::Shape(name.clone());
            let ids = random_ids(&model.config()?, longest, args.seed);
            (model, ids, Some(args.density.unwrap_or(DENSITY)))
        }
        (None, Some(dir)) => {
            let checkpoint = Checkpoint::open(dir)?;
            let ids = match &args.file {
                Some(file) => text_ids(&checkpoint, &read_file(file)?, longest)?,
                None => random_ids(checkpoint.config(), longest, args.seed),
            };
            (ModelSource::Checkpoint(dir.clone()), ids, args.density)
        }
        (None, None) => return Err(Error::NoModel),
    };
    let head_dim = model.config()?.cache(1, 1).head_dim;
    if density.is_some() && !head_dim.is_multiple_of(16) {
        let (found, expected) = (format!("heads of {head_dim}"), "heads of a multiple of 16".to_string());
        return Err(Error::Argument { flag: "--density", found, expected });
    }
    let variants = kinds(common, 1)?;
    let mut run = Run::new(common, args.length.len() * common.dtype.len() * common.backend.len())?;
    for &length in &args.length {
        for &dtype in &common.dtype {
            let job = |backend| {
                Job::Model(ModelJob {
                    backend,
                    dtype,
                    model: model.clone(),
                    length,
                    longest,
                    chunk: args.chunk,
                    decode: args.decode,
                    ids: ids.clone(),
                    density: density.map(|target| Density { target, share: None }),
                    seed: args.seed,
                    variants: variants.clone(),
                    limits: args.limits(),
                })
            };
            for &backend in &common.backend {
                run.measure(job(backend), &length.to_string())?;
            }
            run.compare(job(common.backend[0]), &length.to_string())?;
        }
    }
    finish(run)
}

/// Tokens without meaning, the same every time.
fn random_ids(config: &ModelConfig, count: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % config.vocab_size() as u32
    };
    (0..count).map(|_| next()).collect()
}

/// A text's tokens, repeated until there are enough.
fn text_ids(checkpoint: &Checkpoint, text: &str, count: usize) -> Result<Vec<u32>, Error> {
    let tokenizer = checkpoint.tokenizer()?;
    let ids = tokenizer.encode(text);
    if ids.is_empty() {
        return Err(Error::NoPrompt);
    }
    let prefix = Chat::new(checkpoint, &tokenizer)?.prefix();
    Ok(prefix.into_iter().chain(ids.into_iter().cycle()).take(count).collect())
}

fn finish(run: Run) -> Result<ExitCode, Error> {
    if run.finish()? { Ok(ExitCode::SUCCESS) } else { Err(Error::NothingMeasured) }
}
