//! The page of a run: plots and tables.

use long_context_page::Page;
use long_context_page::chart::{Bar, BarChart, LineChart, Series};

use super::report::Report;
use super::row::{ModelRow, OpRow, Row};
use super::table::{attention, number, plan_share, range, significant};
use crate::report::size;

/// The whole file.
pub fn html(report: &Report) -> String {
    let failed = |row: &&Row| row.failed().is_none();
    let mut page = Page::new("sattn bench");
    page.paragraph(&format!("sattn {} · version {}", report.command.join(" "), report.version));
    for device in devices(report) {
        page.paragraph(&device);
    }
    let op: Vec<&OpRow> = report.rows.iter().filter(failed).filter_map(op_row).collect();
    let models: Vec<&ModelRow> = report.rows.iter().filter(failed).filter_map(model_row).collect();
    if !op.is_empty() {
        attention_alone(&mut page, &op);
    }
    if !models.is_empty() {
        whole_models(&mut page, &models);
    }
    let failures = report.rows.iter().filter_map(|row| Some([name_of(row), row.failed()?.to_string()]));
    let failures: Vec<[String; 2]> = failures.collect();
    if !failures.is_empty() {
        page.heading("What could not be measured");
        page.table(&["what", "why"], failures);
    }
    for note in &report.notes {
        page.paragraph(note);
    }
    page.heading("Time of the run");
    let parts =
        report.seconds.parts.parts().map(|(part, seconds)| [part.to_string(), format!("{seconds:.2}")]);
    let sums = [("sum", report.seconds.reported), ("by the clock on the wall", report.seconds.total)];
    let sums = sums.map(|(name, seconds)| [name.to_string(), format!("{seconds:.2}")]);
    page.table(&["part", "seconds"], parts.chain(sums));
    page.finish()
}

fn op_row(row: &Row) -> Option<&OpRow> {
    if let Row::Op(row) = row { Some(row) } else { None }
}

fn model_row(row: &Row) -> Option<&ModelRow> {
    if let Row::Model(row) = row { Some(row) } else { None }
}

fn devices(report: &Report) -> Vec<String> {
    let mut devices = Vec::new();
    for row in &report.rows {
        let (backend, device, driver) = match row {
            Row::Op(row) => (&row.backend, &row.device, &row.driver),
            Row::Model(row) => (&row.backend, &row.device, &row.driver),
        };
        let driver = driver.as_ref().map_or(String::new(), |driver| format!(" · {driver}"));
        let line = format!("{backend}: {device}{driver}");
        if !device.is_empty() && !devices.contains(&line) {
            devices.push(line);
        }
    }
    devices
}

fn name_of(row: &Row) -> String {
    match row {
        Row::Op(row) => format!("{}, {} tokens", series_of(row), row.length),
        Row::Model(row) => format!("{}, {} tokens", model_series_of(row), row.length),
    }
}

/// What a line of a plot stands for.
fn series_of(row: &OpRow) -> String {
    let name = attention(&row.attention, row.target_density);
    format!("{} {} · {}/{} x {} · {name}", row.backend, row.dtype, row.heads, row.kv_heads, row.head_dim)
}

fn model_series_of(row: &ModelRow) -> String {
    format!("{} {} · {}", row.backend, row.dtype, attention(&row.attention, row.target_density))
}

/// Lines over the length, in the order their names appear.
fn lines<T>(
    rows: &[&T],
    name: impl Fn(&T) -> String,
    point: impl Fn(&T) -> Option<(f64, f64)>,
) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let (name, Some(point)) = (name(row), point(row)) else { continue };
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name, points: vec![point] }),
        }
    }
    for series in &mut series {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    series
}

fn attention_alone(page: &mut Page, rows: &[&OpRow]) {
    let is_decode = |row: &OpRow| row.gigabytes_per_second.is_some();
    let prefill: Vec<&OpRow> = rows.iter().copied().filter(|row| !is_decode(row)).collect();
    let length = |row: &OpRow| row.length as f64;
    let is_sparse = |row: &OpRow| row.density.is_some_and(|_| row.attention != "dense");

    page.heading("Speed-up over dense attention on the same backend");
    let y_label = "times the speed of dense attention";
    let series =
        lines(&prefill, series_of, |row| Some((length(row), row.speedup.filter(|_| is_sparse(row))?)));
    page.figure(
        &LineChart { x_label: "tokens", y_label, log_y: false, series }.svg(),
        "Times the speed of dense attention, over the length.",
    );
    let peer = |name: &str| prefill.iter().copied().filter(|row| row.attention == name).collect::<Vec<_>>();
    for name in ["FlashAttention-2", "cuDNN"] {
        let of_peer = peer(name);
        let series = lines(&prefill, series_of, |row| {
            let shape = |row: &OpRow| (row.length, row.heads, row.kv_heads, row.head_dim);
            let other = of_peer.iter().find(|other| shape(other) == shape(row))?;
            (row.attention != name).then_some(())?;
            Some((length(row), other.ms?.median / row.ms?.median))
        });
        let plot = LineChart { x_label: "tokens", y_label: "times its speed", log_y: false, series }.svg();
        if !of_peer.is_empty() && !plot.is_empty() {
            page.heading(&format!("Speed-up over {name}"));
            page.figure(&plot, &format!("Times the speed of {name} on the same shape, over the length."));
        }
    }

    page.heading("Backend against backend");
    let series = lines(&prefill, series_of, |row| Some((length(row), row.ms?.median)));
    page.figure(
        &LineChart { x_label: "tokens", y_label: "milliseconds", log_y: true, series }.svg(),
        "Milliseconds of one call, over the length.",
    );

    stages(page, &prefill);
    page.heading("All numbers");
    let head = [
        "backend",
        "type",
        "heads",
        "attention",
        "tokens",
        "ms",
        "min..max",
        "x dense",
        "TFLOP/s",
        "attention",
        "density",
        "recall",
        "plan",
        "error",
    ];
    page.table(&head, prefill.iter().map(|row| op_cells(row)));
    page.paragraph(
        "TFLOP/s over the pairs that were kept: of the whole call, and of its attention stage. Plan is the share of the \
         stages before attention.",
    );
    let decode: Vec<&OpRow> = rows.iter().copied().filter(|row| is_decode(row)).collect();
    if !decode.is_empty() {
        page.heading("One query");
        let head = ["backend", "type", "heads", "attention", "tokens", "ms", "min..max", "GB/s", "error"];
        page.table(
            &head,
            decode.iter().map(|row| {
                let rate = [significant(row.gigabytes_per_second), scientific(row.error)];
                op_start(row).into_iter().chain(rate).collect::<Vec<_>>()
            }),
        );
    }
}

/// Shares of the stages, bar by bar.
fn stages(page: &mut Page, rows: &[&OpRow]) {
    let staged: Vec<&OpRow> = rows.iter().copied().filter(|row| !row.stages.is_empty()).collect();
    let of = |row: &OpRow, name: &str| {
        row.stages.iter().find(|stage| stage.stage == name).map_or(0.0, |stage| stage.ms)
    };
    let names = ["rows", "bands", "columns", "plan", "filter", "attention"];
    let parts: Vec<&str> =
        names.into_iter().filter(|name| staged.iter().any(|row| of(row, name) > 0.0)).collect();
    let bars = staged.iter().map(|row| Bar {
        name: format!("{} · {}", series_of(row), row.length),
        parts: parts.iter().map(|name| of(row, name)).collect(),
        note: format!("{} ms", significant(row.ms.map(|ms| ms.median))),
    });
    let chart = BarChart { parts: parts.clone(), bars: bars.collect(), shares: true };
    if !chart.bars.is_empty() {
        page.heading("Where the time of SampleAttention goes");
        let caption = "Shares of the stages, each timed apart; to the right the time of the whole call.";
        page.figure(&chart.svg(), caption);
    }
}

/// What was measured, and how long it took.
fn op_start(row: &OpRow) -> [String; 7] {
    [
        row.backend.clone(),
        row.dtype.clone(),
        format!("{}/{} x {}", row.heads, row.kv_heads, row.head_dim),
        attention(&row.attention, row.target_density),
        row.length.to_string(),
        number(row.ms.map(|ms| ms.median), 3),
        range(row.ms, 3),
    ]
}

fn op_cells(row: &OpRow) -> Vec<String> {
    let rest = [
        number(row.speedup, 2),
        significant(row.tflops),
        significant(row.attention_tflops),
        number(row.density, 3),
        number(row.recall_mean, 4),
        plan_share(row).map_or(String::new(), |share| format!("{:.0}%", 100.0 * share)),
        scientific(row.error),
    ];
    op_start(row).into_iter().chain(rest).collect()
}

fn whole_models(page: &mut Page, rows: &[&ModelRow]) {
    let length = |row: &ModelRow| row.length as f64;
    page.heading("Time to the first token");
    let series = lines(rows, model_series_of, |row| Some((length(row), row.ttft?.median)));
    page.figure(
        &LineChart { x_label: "tokens", y_label: "seconds", log_y: true, series }.svg(),
        "Seconds to the first token, over the length of the prompt.",
    );
    page.heading("Speed-up over dense attention on the same backend");
    let is_sparse = |row: &ModelRow| row.attention != "dense";
    let series =
        lines(rows, model_series_of, |row| Some((length(row), row.speedup.filter(|_| is_sparse(row))?)));
    page.figure(
        &LineChart { x_label: "tokens", y_label: "times dense", log_y: false, series }.svg(),
        "Time to the first token with dense attention over the same with SampleAttention.",
    );
    let peers: Vec<&ModelRow> = rows.iter().copied().filter(|row| row.backend == "transformers").collect();
    let series = lines(rows, model_series_of, |row| {
        let peer = peers.iter().find(|peer| peer.length == row.length && row.backend != "transformers")?;
        Some((length(row), peer.ttft?.median / row.ttft?.median))
    });
    if !series.is_empty() {
        page.heading("Speed-up over transformers");
        page.figure(
            &LineChart { x_label: "tokens", y_label: "times transformers", log_y: false, series }.svg(),
            "Time to the first token of transformers over ours.",
        );
    }
    let bars = rows.iter().filter_map(|row| {
        let parts = row.parts?;
        Some(Bar {
            name: format!("{} · {}", model_series_of(row), row.length),
            parts: vec![parts.attention, parts.products, parts.rest],
            note: format!("{:.2} s", parts.total),
        })
    });
    page.heading("Where the time to the first token goes");
    page.figure(
        &BarChart {
            parts: vec!["attention", "matrix products", "the rest"],
            bars: bars.collect(),
            shares: false,
        }
        .svg(),
        "Seconds of a prefill of its own, in which the device is waited for at each border.",
    );
    page.heading("All numbers");
    let head = [
        "backend",
        "type",
        "attention",
        "tokens",
        "TTFT s",
        "min..max",
        "x dense",
        "attention",
        "products",
        "rest",
        "tokens/s",
        "density",
        "memory",
    ];
    page.table(
        &head,
        rows.iter().map(|row| {
            vec![
                row.backend.clone(),
                row.dtype.clone(),
                attention(&row.attention, row.target_density),
                row.length.to_string(),
                number(row.ttft.map(|ttft| ttft.median), 3),
                range(row.ttft, 3),
                number(row.speedup, 2),
                number(row.parts.map(|parts| parts.attention), 3),
                number(row.parts.map(|parts| parts.products), 3),
                number(row.parts.map(|parts| parts.rest), 3),
                number(row.decode_tokens_per_second.map(|rate| rate.median), 1),
                number(row.density, 3),
                row.device_bytes.or(row.host_bytes).map_or(String::new(), size),
            ]
        }),
    );
    page.paragraph("Memory is the device's where it has its own, else the process's, at its peak so far.");
}

fn scientific(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| format!("{value:.0e}"))
}
