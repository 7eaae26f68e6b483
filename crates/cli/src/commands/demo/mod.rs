//! `sattn demo`: one long prompt, answered with dense attention and with SampleAttention, side by side.

mod embedded;
mod prompt;
mod view;

use std::io::IsTerminal;
use std::process::ExitCode;

use long_context::sampler::SamplerConfig;
use long_context_weights::Chat;
use sample_attention::Preset;
use serde::Serialize;

use super::{print, print_json};
use crate::args::{DemoArgs, DtypeName, ModelArgs, RopeRatioMeaning};
use crate::error::Error;
use crate::report::{LayerLine, Stats};
use crate::session::{Answer, Limits, Session, catch_interrupts, interrupted, open};

use prompt::Prompt;

/// Tokens of the prompt where `--tokens` does not say and the model could take more.
const DEFAULT_TOKENS: usize = 16_384;
/// Tokens of an answer at most.
const ANSWER_TOKENS: usize = 32;
/// Tokens run at a time: more would take much memory with large models.
const CHUNK: usize = 16_384;

/// What is told of the whole demo.
#[derive(Serialize)]
struct Demo {
    key: String,
    /// Where it stands in the text: 0 is the beginning, 1 the end.
    depth: f64,
    /// Times that the prefill with SampleAttention is faster.
    speed_up: f64,
    dense: Run,
    sparse: Run,
}

/// One way to answer.
#[derive(Serialize)]
struct Run {
    answer: String,
    right: bool,
    /// Mean over the layers.
    density: f64,
    recall: f64,
    #[serde(flatten)]
    stats: Stats,
    layers: Vec<LayerLine>,
}

pub fn run(args: DemoArgs) -> Result<ExitCode, Error> {
    let unpacked;
    let dir = match &args.dir {
        Some(dir) => dir.as_path(),
        None => {
            unpacked = embedded::unpack()?;
            unpacked.path()
        }
    };
    let checkpoint = open(dir, RopeRatioMeaning::Auto)?;
    let tokenizer = checkpoint.tokenizer()?;
    let chat = Chat::new(&checkpoint, &tokenizer)?;
    let range = checkpoint.config().context_length();
    let most = range.saturating_sub(ANSWER_TOKENS);
    let tokens = args.tokens.unwrap_or(DEFAULT_TOKENS.min(most));
    if tokens > most {
        return Err(Error::TooLong { prompt: tokens, generate: ANSWER_TOKENS, range });
    }
    let prompt = Prompt::new(&chat, &tokenizer, tokens, args.depth, args.seed)?;

    catch_interrupts();
    let model = model_args(&args, prompt.ids.len().min(CHUNK));
    let capacity = prompt.ids.len() + ANSWER_TOKENS;
    let mut session = Session::load(&checkpoint, checkpoint.config(), capacity, &model)?;
    let limits = Limits {
        max_tokens: ANSWER_TOKENS,
        stop_ids: chat.stop_ids().to_vec(),
        stop_strings: vec!["\n".to_string()],
    };
    let mut sampler = SamplerConfig::default().init()?;
    let mut answer = |preset: Preset| {
        session.begin(preset);
        let answer = session.answer(&prompt.ids, &tokenizer, &mut sampler, &limits, &mut |_| Ok(()))?;
        Ok::<_, Error>(Run::new(answer, &prompt.key))
    };
    let mut dense = answer(Preset::Dense)?;
    let mut sparse = answer(args.attention)?;
    // On a GPU the first prompt of a length waits for kernels to be compiled and chosen: it counts as practice.
    if dense.stats.backend != "cpu" && !interrupted() {
        dense = answer(Preset::Dense)?;
        sparse = answer(args.attention)?;
    }
    if interrupted() {
        return Ok(ExitCode::from(130));
    }
    let speed_up = dense.stats.ttft_seconds / sparse.stats.ttft_seconds.max(1e-9);
    let demo = Demo { key: prompt.key, depth: args.depth, speed_up, dense, sparse };
    if args.json {
        print_json(&demo)?;
    } else {
        let colored =
            std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
        print(&view::table(&demo, colored))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Run {
    fn new(answer: Answer, key: &str) -> Self {
        let Answer { text, stats, layers, .. } = answer;
        // Layers that were dense from the start have nothing to report.
        let mean = |value: fn(&LayerLine) -> f64| match layers.len() {
            0 => 1.0,
            count => layers.iter().map(value).sum::<f64>() / count as f64,
        };
        Self {
            right: text.contains(key),
            answer: text.trim().to_string(),
            density: mean(|layer| layer.density),
            recall: mean(|layer| f64::from(layer.recall_mean)),
            stats,
            layers,
        }
    }
}

/// What `generate` would be told.
fn model_args(args: &DemoArgs, chunk: usize) -> ModelArgs {
    ModelArgs {
        backend: args.backend,
        dtype: DtypeName::Auto,
        attention: Preset::Dense,
        layer_attention: Vec::new(),
        dense_below: None,
        report: true,
        chunk,
        stretch_rope: false,
        rope_ratio: RopeRatioMeaning::Auto,
        quiet: args.json,
    }
}
