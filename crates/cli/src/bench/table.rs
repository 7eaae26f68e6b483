//! Rows for the terminal.

use super::row::{ModelRow, OpRow, Row};
use super::seconds::Spread;
use crate::report::size;

/// A number with three digits that say something, at least; nothing where there is none.
pub fn significant(value: Option<f64>) -> String {
    let digits = |value: f64| match value {
        10.0.. => 1,
        1.0.. => 2,
        _ if value > 0.0 => (2 - value.log10().floor() as i32).clamp(0, 6) as usize,
        _ => 0,
    };
    value.map_or(String::new(), |value| format!("{value:.0$}", digits(value)))
}

/// A number with so many digits; nothing where there is none.
pub fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or(String::new(), |value| format!("{value:.digits$}"))
}

/// The heading of rows of the same kind; names of attention take `width` letters.
pub fn head(row: &Row, width: usize) -> String {
    match row {
        Row::Op(_) => format!(
            "{:<9} {:<5} {:>7} {:>6} {:>4}  {:<width$} {:>10} {:>21} {:>7} {:>10} {:>9} {:>8} {:>7} {:>6} {:>8}",
            "backend",
            "type",
            "tokens",
            "heads",
            "dim",
            "attention",
            "ms",
            "min..max",
            "x dense",
            "TFLOP/s",
            "attention",
            "density",
            "recall",
            "plan",
            "error"
        ),
        Row::Model(_) => format!(
            "{:<12} {:<5} {:>7}  {:<width$} {:>8} {:>17} {:>7} {:>9} {:>9} {:>7} {:>9} {:>8} {:>9}",
            "backend",
            "type",
            "tokens",
            "attention",
            "TTFT s",
            "min..max",
            "x dense",
            "attention",
            "products",
            "rest",
            "tokens/s",
            "density",
            "memory"
        ),
    }
}

/// A row.
pub fn line(row: &Row, width: usize) -> String {
    match row {
        Row::Op(row) => op(row, width),
        Row::Model(row) => model(row, width),
    }
}

/// The kind of attention, with the density that its inputs were made for.
pub fn attention(name: &str, target_density: Option<f64>) -> String {
    target_density.map_or(name.to_string(), |target| format!("{name} @ {target}"))
}

fn op(row: &OpRow, width: usize) -> String {
    let OpRow { backend, dtype, length, heads, kv_heads, head_dim, .. } = row;
    let (heads, name) = (format!("{heads}/{kv_heads}"), attention(&row.attention, row.target_density));
    let start = format!("{backend:<9} {dtype:<5} {length:>7} {heads:>6} {head_dim:>4}  {name:<width$}");
    if let Some(reason) = &row.failed {
        return format!("{start} {reason}");
    }
    let rate = match row.gigabytes_per_second {
        Some(rate) => significant(Some(rate)) + " GB/s",
        None => significant(row.tflops),
    };
    let error = row.error.map_or(String::new(), |error| format!("{error:.0e}"));
    format!(
        "{start} {:>10} {:>21} {:>7} {rate:>10} {:>9} {:>8} {:>7} {:>6} {error:>8}",
        number(row.ms.map(|ms| ms.median), 3),
        range(row.ms, 3),
        number(row.speedup, 2),
        significant(row.attention_tflops),
        number(row.density, 3),
        number(row.recall_mean, 4),
        plan_share(row).map_or(String::new(), |share| format!("{:.0}%", 100.0 * share)),
    )
    .trim_end()
    .to_string()
}

/// The share of the stages before attention.
pub fn plan_share(row: &OpRow) -> Option<f64> {
    let sum = |stages: &mut dyn Iterator<Item = f64>| stages.sum::<f64>();
    let all = sum(&mut row.stages.iter().map(|stage| stage.ms));
    let before = row.stages.iter().filter(|stage| stage.stage != "attention").map(|stage| stage.ms);
    (all > 0.0).then(|| before.sum::<f64>() / all)
}

fn model(row: &ModelRow, width: usize) -> String {
    let ModelRow { backend, dtype, length, .. } = row;
    let name = attention(&row.attention, row.target_density);
    let start = format!("{backend:<12} {dtype:<5} {length:>7}  {name:<width$}");
    if let Some(reason) = &row.failed {
        return format!("{start} {reason}");
    }
    format!(
        "{start} {:>8} {:>17} {:>7} {:>9} {:>9} {:>7} {:>9} {:>8} {:>9}",
        number(row.ttft.map(|ttft| ttft.median), 3),
        range(row.ttft, 3),
        number(row.speedup, 2),
        number(row.parts.map(|parts| parts.attention), 3),
        number(row.parts.map(|parts| parts.products), 3),
        number(row.parts.map(|parts| parts.rest), 3),
        number(row.decode_tokens_per_second.map(|rate| rate.median), 1),
        number(row.density, 3),
        row.device_bytes.or(row.host_bytes).map_or(String::new(), size),
    )
    .trim_end()
    .to_string()
}

pub fn range(spread: Option<Spread>, digits: usize) -> String {
    spread.map_or(String::new(), |spread| format!("{:.digits$}..{:.digits$}", spread.min, spread.max))
}
