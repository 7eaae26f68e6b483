//! The demo as a table for people.

use super::{Demo, Run};

/// A head's density as the height of a block.
const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const RESET: &str = "\x1b[0m";

/// The table, and a strip with one block for each head of each layer.
pub fn table(demo: &Demo, colored: bool) -> String {
    let Demo { key, depth, speed_up, dense, sparse } = demo;
    let tokens = dense.stats.prompt_tokens;
    let sparse_name = format!("SampleAttention ({})", sparse.stats.attention);
    let mut text = format!(
        "The pass key {key} stands {:.0}% into a text of {tokens} tokens. What is the pass key?\n\n\
         {:<22}{:<24}{sparse_name}\n",
        100.0 * depth,
        "",
        "dense attention"
    );
    let mut row = |name: &str, value: &dyn Fn(&Run) -> String| {
        text += &format!("{name:<22}{:<24}{}\n", value(dense), value(sparse));
    };
    row("answer", &|run| run.answer.chars().take(22).collect());
    row("right", &|run| if run.right { "yes" } else { "no" }.to_string());
    row("time to first token", &|run| format!("{:.2} s", run.stats.ttft_seconds));
    row("density", &|run| format!("{:.3}", run.density));
    row("recall", &|run| format!("{:.4}", run.recall));
    text += &format!("\nSampleAttention answers {speed_up:.2} times as fast.\n");
    if sparse.layers.is_empty() {
        return text;
    }
    text += "\nlayer  density   recall  heads, by the share of the score matrix that each computes\n";
    for layer in &sparse.layers {
        let strip: String = layer.head_density.iter().map(|&density| block(density, colored)).collect();
        text += &format!("{:>5} {:>8.3} {:>8.4}  {strip}\n", layer.layer, layer.density, layer.recall_mean);
    }
    text
}

/// A block as high as the density, from green for little to red for all.
fn block(density: f64, colored: bool) -> String {
    let density = density.clamp(0.0, 1.0);
    let height = HEIGHTS[((density * HEIGHTS.len() as f64) as usize).min(HEIGHTS.len() - 1)];
    if !colored {
        return format!("{height}{height} ");
    }
    // The square root tells small densities apart.
    let red = (255.0 * density.sqrt()) as u8;
    format!("\x1b[38;2;{red};{};80m{height}{height}{RESET} ", 255 - red)
}
