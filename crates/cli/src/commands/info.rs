use std::process::ExitCode;

use long_context::models::ModelConfig;
use serde::Serialize;

use super::{print, print_json};
use crate::args::InfoArgs;
use crate::error::Error;
use crate::report::size;
use crate::session::open;

#[derive(Serialize)]
struct Info {
    architecture: &'static str,
    parameters: u64,
    layers: usize,
    hidden_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    context_length: usize,
    rotary: String,
    files: usize,
    stored_types: Vec<String>,
    stored_bytes: u64,
    tokens: usize,
    memory: Vec<Memory>,
}

/// Bytes needed at one type of computation.
#[derive(Serialize)]
struct Memory {
    dtype: &'static str,
    weights: u64,
    kv_cache: u64,
    /// Of the largest layer during a prefill chunk, an estimate.
    activations: u64,
}

pub fn run(args: InfoArgs) -> Result<ExitCode, Error> {
    let checkpoint = open(&args.dir, args.rope_ratio)?;
    let config = checkpoint.config();
    let parameters: u64 = config.tensors().iter().map(|tensor| tensor.elements()).sum();
    let (heads, ffn) = match config {
        ModelConfig::ChatGlm(config) => (config.num_attention_heads, config.ffn_hidden_size),
        ModelConfig::InternLm2(config) => (config.num_attention_heads, config.intermediate_size),
    };
    let cache = config.cache(1, args.tokens.unwrap_or(config.context_length()));
    let memory = [("f32", 4), ("bf16", 2)].map(|(dtype, bytes)| {
        // Residual, norm and projections in and out, the gated MLP, and the tiles of attention in f32.
        let row = 4 * config.hidden_size() + 2 * heads * cache.head_dim + 3 * ffn;
        let chunk = args.chunk.min(cache.capacity) as u64;
        Memory {
            dtype,
            weights: parameters * bytes as u64,
            kv_cache: cache.bytes(bytes),
            activations: chunk * row as u64 * bytes as u64 + 3 * sample_attention::plain::SCORE_BYTES,
        }
    });
    let info = Info {
        architecture: checkpoint.family().name(),
        parameters,
        layers: cache.num_layers,
        hidden_size: config.hidden_size(),
        heads,
        kv_heads: cache.num_kv_heads,
        head_dim: cache.head_dim,
        vocab_size: config.vocab_size(),
        context_length: config.context_length(),
        rotary: config.rotary_description(),
        files: checkpoint.files(),
        stored_types: checkpoint.stored_types(),
        stored_bytes: checkpoint.bytes(),
        tokens: cache.capacity,
        memory: memory.into(),
    };
    if args.json {
        print_json(&info)?;
    } else {
        print(&info.table(args.chunk))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Info {
    fn table(&self, chunk: usize) -> String {
        let mut table = format!(
            "{}\n\
             parameters  {:.3} billion\n\
             layers      {}\n\
             hidden      {}\n\
             heads       {} of {}, {} for keys and values\n\
             vocabulary  {}\n\
             range       {} tokens, rotary {}\n\
             stored      {} in {} files, {}\n\
             memory for {} tokens, prefill in chunks of {chunk}\n",
            self.architecture,
            self.parameters as f64 / 1e9,
            self.layers,
            self.hidden_size,
            self.heads,
            self.head_dim,
            self.kv_heads,
            self.vocab_size,
            self.context_length,
            self.rotary,
            size(self.stored_bytes),
            self.files,
            self.stored_types.join(", "),
            self.tokens,
        );
        for memory in &self.memory {
            table += &format!(
                "  {:<4}      weights {}, key/value cache {}, activations about {}\n",
                memory.dtype,
                size(memory.weights),
                size(memory.kv_cache),
                size(memory.activations),
            );
        }
        table
    }
}
