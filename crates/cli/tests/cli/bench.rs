//! `sattn bench` and `sattn capture`.

use std::path::Path;

use serde_json::Value;

use super::{CODE_OF_BAD_INPUT, json, sattn, stderr, stdout, succeed, tiny};

/// Small blocks for short inputs.
const PRESETS: &str = "default:dense_below=256:window_ratio=0.03:block_size=32:tail_rows=32,\
                       joint:dense_below=256:block_size=32:tail_rows=32";

const OP: [&str; 13] = [
    "bench",
    "op",
    "--length",
    "768",
    "--kv-heads",
    "2",
    "--head-dim",
    "32",
    "--rounds",
    "2",
    "--quiet",
    "--preset",
    PRESETS,
];

fn rows<'a>(report: &'a Value, attention: &str) -> Vec<&'a Value> {
    let rows = report["rows"].as_array().unwrap().iter();
    rows.filter(|row| row["attention"].as_str().unwrap().starts_with(attention)).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn attention_is_compared_on_every_backend() {
    let work = tempfile::tempdir().unwrap();
    let html = work.path().join("bench.html");
    let args = [
        "--backend",
        "cpu,vulkan,wgpu",
        "--dtype",
        "f32",
        "--heads",
        "4",
        "--density",
        "0.35",
        "--json",
        "-",
        "--html",
        html.to_str().unwrap(),
    ];
    let report = json(&[&OP[..], &args].concat(), "");
    // A build with Vulkan has no WebGPU: its rows say so, the others are there.
    let (failed, measured): (Vec<&Value>, Vec<&Value>) =
        report["rows"].as_array().unwrap().iter().partition(|row| row.get("failed").is_some());
    assert_eq!((failed.len(), measured.len()), (4, 8), "{report}");
    for row in failed {
        assert_eq!(row["backend"], "wgpu");
        assert!(row["failed"].as_str().unwrap().contains("--backend wgpu: not in this build"), "{row}");
    }
    for row in &measured {
        assert!(number(&row["error"]) < 1e-4, "{row}");
        let ms = &row["ms"];
        assert!(number(&ms["min"]) <= number(&ms["median"]) && number(&ms["median"]) <= number(&ms["max"]));
        assert_eq!(
            (&row["dtype"], &row["length"], &row["kv_heads"]),
            (&"f32".into(), &768.into(), &2.into())
        );
        assert!(!row["device"].as_str().unwrap().is_empty());
    }
    // The inputs are made for the first preset, and are the same on both backends.
    let sparse: Vec<&Value> =
        rows(&report, "default").into_iter().filter(|row| row.get("failed").is_none()).collect();
    for row in &sparse {
        assert!((number(&row["density"]) - 0.35).abs() < 0.03, "{row}");
        assert!(number(&row["recall_mean"]) > 0.949 && number(&row["speedup"]) > 0.0, "{row}");
        let stages: Vec<&str> =
            row["stages"].as_array().unwrap().iter().map(|stage| stage["stage"].as_str().unwrap()).collect();
        let (expected, clock): (&[&str], _) = match row["backend"].as_str().unwrap() {
            "cpu" => (&["plan", "attention"], "host"),
            _ => (&["rows", "columns", "filter", "attention"], "device"),
        };
        assert_eq!((&stages[..], row["stage_clock"].as_str().unwrap()), (expected, clock), "{row}");
    }
    assert!((number(&sparse[0]["density"]) - number(&sparse[1]["density"])).abs() < 0.01);
    assert_eq!(sparse[0]["share"], sparse[1]["share"]);
    // What is told apart adds up to the clock on the wall.
    let (total, reported) = (number(&report["seconds"]["total"]), number(&report["seconds"]["reported"]));
    assert!(reported > 0.9 * total && reported <= total, "{reported} of {total}");

    let page = std::fs::read_to_string(html).unwrap();
    for text in ["<svg", "Speed-up over dense", "Backend against backend", "vulkan f32", "not in this build"]
    {
        assert!(page.contains(text), "no {text} in the page");
    }
}

#[test]
fn a_row_that_fails_does_not_end_the_run() {
    // Four million heads do not fit into memory, and the process that tries is lost.
    let args = ["--backend", "cpu", "--heads", "4,4194304", "--peers", "--python", "no-such-python"];
    let report = json(&[&OP[..], &args, &["--json", "-"]].concat(), "");
    let failed: Vec<bool> =
        report["rows"].as_array().unwrap().iter().map(|row| row.get("failed").is_some()).collect();
    assert_eq!(failed, [false, false, false, false, true, true, true, true], "{report}");
    assert_eq!(report["notes"].as_array().unwrap().len(), 1, "{}", report["notes"]);
    assert!(
        report["notes"][0].as_str().unwrap().starts_with("peers were left out: no-such-python: "),
        "{report}"
    );
}

#[test]
fn bad_arguments_of_measurements_get_one_line() {
    let model = tiny("internlm2-tiny");
    let golden = format!("{model}/golden.safetensors");
    let cases: [(&[&str], &str); 10] = [
        (
            &["bench", "op", "--heads", "4", "--kv-heads", "3"],
            "--kv-heads: found 3, expected a divisor of the 4",
        ),
        (&["bench", "op", "--head-dim", "40"], "--head-dim: found 40, expected a multiple of 16"),
        (&["bench", "op", "--preset", "sparse"], "found `sparse`, expected dense, default"),
        (&["bench", "op", "--preset", "joint:window=1"], "unknown field `window`"),
        (&["bench", "op", "--preset", "joint:alpha=2"], "option `alpha` is 2"),
        (
            &["bench", "op", "--preset", "dense", "--no-dense"],
            "--preset: found dense alone, expected another preset beside --no-dense",
        ),
        (&["bench", "op", "--density", "1.5"], "expected a number between 0 and 1"),
        (&["bench", "op", "--captured", &golden], "tensor `q`: found none"),
        (&["bench", "model", &model, "--density", "0.2"], "--density: found heads of 8, expected heads of a"),
        (
            &["capture", &model, "--layer", "9", "--ids", "1", "--out", "o"],
            "--layer: found 9, expected below",
        ),
    ];
    for (args, message) in cases {
        let output = sattn(args, "");
        assert_eq!(output.status.code(), Some(CODE_OF_BAD_INPUT), "{args:?}: {}", stderr(&output));
        let text = stderr(&output);
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("error: ")).collect();
        assert!(
            errors.len() == 1 && errors[0].contains(message),
            "{args:?}: found {text}, expected {message}"
        );
    }
}

#[test]
fn captured_attention_can_be_run_and_measured() {
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name).display().to_string();
    let (captured, out) = (path("layer.safetensors"), path("out.safetensors"));
    let ids: Vec<String> = (0..300).map(|at| (3 + at * 7 % 200).to_string()).collect();
    let (ids, model) = (ids.join(","), tiny("chatglm3-32k-tiny"));
    let capture = ["capture", &model, "--layer", "1", "--ids", &ids, "--out", &captured, "--backend", "cpu"];
    let output = succeed(&[&capture[..], &["--chunk", "128"]].concat(), "");
    assert!(stderr(&output).contains("layer 1: q [1, 4, 300, 16], k and v [1, 2, 300, 16] in f32"));
    // In one chunk or in several, a layer attends the same.
    let read = |file: &str| {
        let bytes = std::fs::read(file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let q = tensors.tensor("q").unwrap().data().to_vec();
        q.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect::<Vec<f32>>()
    };
    let chunked = read(&captured);
    succeed(&[&capture[..], &["--store", "f32"]].concat(), "");
    let worst = read(&captured).iter().zip(&chunked).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");

    succeed(&[&capture[..], &["--store", "bf16"]].concat(), "");
    succeed(&["op", &captured, "--out", &out, "--backend", "cpu"], "");
    let args =
        ["bench", "op", "--captured", &captured, "--length", "200,300", "--backend", "cpu", "--rounds", "1"];
    let report = json(
        &[
            &args[..],
            &["--preset", "default:alpha=0.5:dense_below=64:block_size=16:tail_rows=16", "--json", "-"],
        ]
        .concat(),
        "",
    );
    let found: Vec<(u64, &str)> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["length"].as_u64().unwrap(), row["inputs"].as_str().unwrap()))
        .collect();
    assert_eq!(found, [[(200, &*captured); 3], [(300, &*captured); 3]].concat());
    for row in rows(&report, "default") {
        assert!(number(&row["density"]) < 1.0 && number(&row["error"]) < 1e-4, "{row}");
    }
}

#[test]
fn a_model_is_measured_part_by_part() {
    let work = tempfile::tempdir().unwrap();
    let file = work.path().join("model.json");
    let model = tiny("chatglm3-32k-tiny");
    let args =
        ["bench", "model", &model, "--length", "512", "--chunk", "128", "--decode", "3", "--rounds", "2"];
    let preset = "default:dense_below=64:min_rows=16:tail_rows=16:block_size=16:window_ratio=0.03";
    let more = ["--preset", preset, "--density", "0.4", "--backend", "cpu", "--json", file.to_str().unwrap()];
    let output = succeed(&[&args[..], &more].concat(), "");
    assert_eq!(stdout(&output).lines().count(), 3, "{}", stdout(&output));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(Path::new(&file)).unwrap()).unwrap();
    for row in report["rows"].as_array().unwrap() {
        assert!(number(&row["ttft"]["median"]) > 0.0 && row["ttft"]["rounds"] == 2, "{row}");
        assert_eq!(row["decode_tokens_per_second"]["rounds"], 3);
        let part = |name: &str| number(&row["parts"][name]);
        assert!(part("attention") > 0.0 && part("products") > 0.0 && part("rest") > 0.0, "{row}");
        let sum = part("attention") + part("products") + part("rest");
        assert!((sum - part("total")).abs() < 1e-9, "{row}");
    }
    let [dense, sparse] = [rows(&report, "dense")[0], rows(&report, "default")[0]];
    assert_eq!(number(&dense["density"]), 1.0);
    assert!((number(&sparse["density"]) - 0.4).abs() < 0.03, "{sparse}");
    assert!(number(&sparse["recall_mean"]) > 0.9, "{sparse}");
}
