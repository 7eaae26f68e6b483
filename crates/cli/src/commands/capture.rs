use std::cell::RefCell;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::rc::Rc;

use burn::tensor::{DType, TensorData};
use long_context::cache::{Observation, Observer};
use long_context_runtime::dtype_name;
use long_context_weights::Chat;

use super::logits::parse_ids;
use super::read_file;
use crate::bench::args::CaptureArgs;
use crate::error::Error;
use crate::report::{prefill_bar, size};
use crate::session::{Session, catch_interrupts, interrupted, open};
use crate::tensors;

pub fn run(args: CaptureArgs) -> Result<ExitCode, Error> {
    let checkpoint = open(&args.dir, args.model.rope_ratio)?;
    let mut config = checkpoint.config().clone();
    let layers = config.cache(1, 1).num_layers;
    if args.layer >= layers {
        let expected = format!("below {layers}, the model's layers");
        return Err(Error::Argument { flag: "--layer", found: args.layer.to_string(), expected });
    }
    let ids = match (&args.ids, &args.file) {
        (Some(ids), _) => parse_ids(ids)?,
        (None, Some(file)) => {
            let (text, tokenizer) = (read_file(file)?, checkpoint.tokenizer()?);
            let prefix = Chat::new(&checkpoint, &tokenizer)?.prefix();
            prefix.into_iter().chain(tokenizer.encode(&text)).collect()
        }
        (None, None) => Vec::new(),
    };
    let ids = &ids[..ids.len().min(args.tokens.unwrap_or(ids.len()))];
    if ids.is_empty() {
        return Err(Error::NoPrompt);
    }
    if args.model.stretch_rope {
        config.stretch_to(ids.len());
    } else if ids.len() > config.context_length() {
        return Err(Error::TooLong { prompt: ids.len(), generate: 0, range: config.context_length() });
    }
    catch_interrupts();
    let mut session = Session::load(&checkpoint, &config, ids.len(), &args.model)?;
    let dtype = Option::<DType>::from(args.store).unwrap_or(session.device.dtype);

    let seen: Rc<RefCell<Seen>> = Rc::default();
    let observer = {
        let seen = seen.clone();
        Observer::new(args.layer..=args.layer, move |observation| seen.borrow_mut().add(observation))
    };
    let engine = &mut session.loaded.engine;
    engine.observe(Some(observer));
    let bar = prefill_bar(args.model.quiet, ids.len());
    let done = engine.prefill(ids, &mut |done| {
        bar.set_position(done as u64);
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    engine.observe(None);
    bar.finish_and_clear();
    if done.is_none() {
        return Ok(ExitCode::from(130));
    }
    let [q, k, v] = seen.take().tensors().map(|tensor| tensor.convert_dtype(dtype));
    let shape = format!("q {:?}, k and v {:?}", q.shape.to_vec(), k.shape.to_vec());
    tensors::write(&args.out, &[("q", q), ("k", k), ("v", v)])?;
    let bytes = std::fs::metadata(&args.out).map_or(0, |file| file.len());
    eprintln!(
        "layer {}: {shape} in {} · {} · {}",
        args.layer,
        dtype_name(dtype),
        size(bytes),
        args.out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// What a layer attended, chunk by chunk.
#[derive(Default)]
struct Seen {
    /// `[1, heads, chunk, head_dim]` each.
    q: Vec<TensorData>,
    /// Of all positions so far: the last chunk's are all there are.
    kv: Option<[TensorData; 2]>,
}

impl Seen {
    fn add(&mut self, observation: Observation) {
        self.q.push(observation.q);
        self.kv = Some([observation.k, observation.v]);
    }

    /// q, k and v of all positions.
    fn tensors(self) -> [TensorData; 3] {
        let shape = |chunk: &TensorData| [1, 2, 3].map(|dim| chunk.shape[dim]);
        let [heads, _, head_dim] = self.q.first().map_or([0; 3], shape);
        let length: usize = self.q.iter().map(|chunk| chunk.shape[2]).sum();
        let chunks: Vec<Vec<f32>> = self.q.iter().map(|chunk| chunk.iter::<f32>().collect()).collect();
        let mut q = Vec::with_capacity(heads * length * head_dim);
        for head in 0..heads {
            for chunk in &chunks {
                let rows = chunk.len() / heads;
                q.extend_from_slice(&chunk[head * rows..][..rows]);
            }
        }
        let [k, v] =
            self.kv.unwrap_or_else(|| [0, 1].map(|_| TensorData::new(Vec::<f32>::new(), [1, 0, 0, 0])));
        [TensorData::new(q, [1, heads, length, head_dim]), k, v]
    }
}
