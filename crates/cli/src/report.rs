//! What is told beside the answer: progress, timings, memory, the last words of a panic.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use long_context::cache::LayerReport;
use long_context::generate::{FinishReason, Generation};
use long_context_runtime::{Device, dtype_name};
use serde::Serialize;

/// Timings and memory of one generation.
#[derive(Debug, Serialize)]
pub struct Stats {
    pub backend: &'static str,
    pub device: String,
    pub dtype: &'static str,
    pub attention: String,
    pub prompt_tokens: usize,
    /// Tokens of the prompt that were run; the rest was in the cache.
    pub prefill_tokens: usize,
    pub generated_tokens: usize,
    pub finish: &'static str,
    pub load_seconds: f64,
    pub ttft_seconds: f64,
    pub prefill_tokens_per_second: f64,
    pub decode_tokens_per_second: Option<f64>,
    pub peak_host_bytes: Option<u64>,
    pub device_bytes: Option<u64>,
}

impl Stats {
    pub fn new(
        device: &Device,
        attention: String,
        load: Duration,
        prompt_tokens: usize,
        generation: &Generation,
        finish: &'static str,
        device_bytes: Option<u64>,
    ) -> Self {
        Self {
            backend: device.backend,
            device: device.name.clone(),
            dtype: dtype_name(device.dtype),
            attention,
            prompt_tokens,
            prefill_tokens: generation.prefill_tokens,
            generated_tokens: generation.ids.len(),
            finish,
            load_seconds: load.as_secs_f64(),
            ttft_seconds: generation.time_to_first_token.as_secs_f64(),
            prefill_tokens_per_second: generation.prefill_rate(),
            decode_tokens_per_second: generation.decode_rate(),
            peak_host_bytes: peak_host_bytes(),
            device_bytes,
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let mut parts = vec![
            format!("TTFT {:.2} s", self.ttft_seconds),
            format!("prefill {} tokens at {:.0}/s", self.prefill_tokens, self.prefill_tokens_per_second),
        ];
        if let Some(rate) = self.decode_tokens_per_second {
            parts.push(format!("decode {} tokens at {rate:.1}/s", self.generated_tokens));
        }
        if let Some(bytes) = self.peak_host_bytes {
            parts.push(format!("peak host memory {}", size(bytes)));
        }
        if let Some(bytes) = self.device_bytes {
            parts.push(format!("device memory {}", size(bytes)));
        }
        format!("{} · {}", parts.join(" · "), self.finish)
    }
}

/// What SampleAttention kept in one layer, over the chunks of the prefill.
#[derive(Debug, Serialize)]
pub struct LayerLine {
    pub layer: usize,
    /// Of the whole prefill's query-key pairs.
    pub density: f64,
    pub recall_mean: f32,
    pub recall_min: f32,
    pub dense_heads: usize,
    pub heads: usize,
    /// Of each head.
    pub head_density: Vec<f64>,
}

impl LayerLine {
    /// Sums the chunks up by their query-key pairs.
    pub fn of(reports: &[LayerReport]) -> Vec<Self> {
        let pairs =
            |report: &LayerReport| report.length as f64 * (report.start as f64 + report.length as f64 / 2.0);
        let layers: BTreeMap<usize, Vec<&LayerReport>> =
            reports.iter().fold(BTreeMap::new(), |mut layers, report| {
                layers.entry(report.layer).or_insert_with(Vec::new).push(report);
                layers
            });
        layers
            .into_iter()
            .map(|(layer, chunks)| {
                let all: f64 = chunks.iter().map(|chunk| pairs(chunk)).sum();
                let mean = |value: fn(&LayerReport) -> f32| {
                    chunks.iter().map(|chunk| pairs(chunk) * f64::from(value(chunk))).sum::<f64>() / all
                };
                let heads = chunks.iter().map(|chunk| chunk.report.heads.len()).max().unwrap_or(0);
                let head_density = |head: usize| {
                    let density = |chunk: &LayerReport| f64::from(chunk.report.heads[head].density);
                    chunks.iter().map(|chunk| pairs(chunk) * density(chunk)).sum::<f64>() / all
                };
                Self {
                    layer,
                    density: mean(|chunk| chunk.report.density()),
                    recall_mean: mean(|chunk| chunk.report.recall_mean()) as f32,
                    recall_min: chunks.iter().map(|chunk| chunk.report.recall_min()).fold(1.0, f32::min),
                    dense_heads: chunks.iter().map(|chunk| chunk.report.dense_heads()).max().unwrap_or(0),
                    heads,
                    head_density: (0..heads).map(head_density).collect(),
                }
            })
            .collect()
    }

    /// A table for people.
    pub fn table(lines: &[Self]) -> String {
        let mut table = "layer  density  recall  minimum  dense heads\n".to_string();
        for line in lines {
            let Self { layer, density, recall_mean, recall_min, dense_heads, heads, .. } = line;
            table += &format!(
                "{layer:>5} {density:>8.3} {recall_mean:>7.4} {recall_min:>8.4} {dense_heads:>6} of {heads}\n"
            );
        }
        table
    }
}

pub fn finish_name(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::StopToken => "stop token",
        FinishReason::Caller => "stopped",
        FinishReason::MaxTokens => "token limit",
        FinishReason::CacheFull => "context full",
    }
}

/// Bytes as a person writes them.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// The most memory that this process has held, where the system tells.
pub fn peak_host_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// A bar over bytes, with the rate.
pub fn load_bar(quiet: bool, bytes: u64) -> ProgressBar {
    bar(quiet, bytes, "loading {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
}

/// A bar over the tokens of a prompt, with the rate.
pub fn prefill_bar(quiet: bool, tokens: usize) -> ProgressBar {
    bar(quiet, tokens as u64, "prefill {wide_bar} {pos}/{len} tokens {per_sec}")
}

/// A bar over the jobs of a measurement, with what is going on.
pub fn job_bar(quiet: bool, jobs: usize) -> ProgressBar {
    let bar = bar(quiet, jobs as u64, "{pos}/{len} {bar:20} {elapsed} {wide_msg}");
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

/// A bar over the steps of an evaluation.
pub fn step_bar(quiet: bool, steps: usize) -> ProgressBar {
    bar(quiet, steps as u64, "{wide_bar} {pos}/{len} {eta} left")
}

fn bar(quiet: bool, length: u64, template: &str) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(length), target).with_style(style)
}

static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps the first line of a panic for [`last_panic`] instead of printing a trace.
pub fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        let text = info.payload_as_str().unwrap_or("the runtime gave up").to_string();
        if let Ok(mut panic) = PANIC.lock() {
            panic.get_or_insert(text);
        }
    }));
}

/// The first panic's first line.
pub fn last_panic() -> String {
    let panic = PANIC.lock().ok().and_then(|panic| panic.clone()).unwrap_or_default();
    panic.lines().find(|line| !line.trim().is_empty()).unwrap_or("the runtime gave up").trim().to_string()
}
