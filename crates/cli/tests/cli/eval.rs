//! `sattn eval` and `sattn inspect` on a small model of random weights: what they print, write and refuse.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{CODE_OF_BAD_INPUT, json as run_json, root, sattn, stderr, stdout, succeed, tiny, trained};

/// Small enough to leave something out of a few hundred tokens.
const SPARSE: &str = r#"sparse={"dense_below":0,"block_size":16,"tail_rows":16,"min_rows":8,"alpha":0.5,"window_ratio":0.02,"dense_cost":null}"#;

/// A golden checkpoint with a tokenizer that has one token a character.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        let from = Path::new(&tiny("chatglm3-32k-tiny")).join(name);
        std::fs::copy(from, folder.path().join(name)).unwrap();
    }
    let letters = (b'!'..=b'~').map(|byte| char::from(byte).to_string());
    let letters = letters.chain(["Ġ", "Ċ"].map(String::from));
    let vocabulary: serde_json::Map<String, Value> =
        letters.enumerate().map(|(id, letter)| (letter, json!(id))).collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary,
            "merges": []
        }
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}

fn text() -> String {
    root().join("examples/pride-and-prejudice.txt").display().to_string()
}

#[test]
fn needles_are_hidden_and_counted() {
    let folder = folder();
    let (dir, out) = (folder.path().to_str().unwrap(), folder.path());
    let (html, png) = (out.join("needle.html"), out.join("needle.png"));
    let args = [
        "eval",
        "needle",
        dir,
        "--raw",
        "--lengths",
        "240,480",
        "--depths",
        "0,100",
        "--variants",
        "single,choice",
        "--attention",
        "dense",
        "--rule",
        SPARSE,
        "--backend",
        "cpu",
        "--quiet",
    ];
    let written = [&args[..], &["--html", html.to_str().unwrap(), "--png", png.to_str().unwrap()]].concat();
    let refused = sattn(&args, "");
    // Three keys take more than 240 letters.
    assert_eq!(refused.status.code(), Some(CODE_OF_BAD_INPUT), "{}", stderr(&refused));
    assert!(
        stderr(&refused).contains("prompt of 240 tokens: found no room for text"),
        "{}",
        stderr(&refused)
    );

    let written: Vec<&str> =
        written.iter().map(|&arg| if arg == "240,480" { "420,480" } else { arg }).collect();
    let table = stdout(&succeed(&written, ""));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    let head: Vec<&str> = lines[0].split_whitespace().collect();
    assert!(head.starts_with(&["attention"]) && head.ends_with(&["single", "choice"]), "{table}");
    assert!(lines[2].contains("/4 -"), "{table}");
    assert!(
        lines[1].starts_with("dense") && lines[1].contains("1.000") && lines[1].ends_with("/4"),
        "{table}"
    );
    let page = std::fs::read_to_string(&html).unwrap();
    assert_eq!(page.matches("<svg").count(), 4, "a map for each variant and attention");
    assert!(std::fs::read(&png).unwrap().starts_with(b"\x89PNG"));

    let report = run_json(&[&written[..written.len() - 4], &["--json"]].concat(), "");
    let trials = report["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 16);
    for pair in trials.chunks(2) {
        // Both answer the same prompt, and one of them leaves something out.
        assert_eq!(pair[0]["keys"], pair[1]["keys"]);
        assert_eq!(pair[0]["density"], 1.0);
        assert!(pair[1]["density"].as_f64().unwrap() < 0.95, "{}", pair[1]);
        let (tokens, length) = (pair[0]["tokens"].as_u64().unwrap(), pair[0]["length"].as_u64().unwrap());
        assert!(tokens <= length, "{tokens} tokens of {length}");
    }
}

#[test]
fn perplexity_compares_with_dense_attention() {
    let folder = folder();
    let dir = folder.path().to_str().unwrap();
    let args = [
        "eval",
        "perplexity",
        dir,
        "--text",
        &text(),
        "--tokens",
        "400",
        "--windows",
        "2",
        "--buckets",
        "4",
        "--attention",
        "dense",
        "--rule",
        SPARSE,
        "--backend",
        "cpu",
        "--quiet",
    ];
    let report = run_json(&[&args[..], &["--json"]].concat(), "");
    let results = report["results"].as_array().unwrap();
    assert_eq!(
        (results[0]["attention"].as_str(), results[1]["attention"].as_str()),
        (Some("dense"), Some("sparse"))
    );
    let number = |result: usize, field: &str| results[result][field].as_f64().unwrap();
    assert_eq!((number(0, "divergence"), number(0, "agreement"), number(0, "density")), (0.0, 1.0, 1.0));
    assert!(number(1, "divergence") > 0.0 && number(1, "density") < 0.95, "{report}");
    // Random weights predict 256 tokens no better than chance.
    assert!(number(0, "perplexity") > 256.0, "{report}");
    assert_eq!(results[1]["buckets"].as_array().unwrap().len(), 4);
    let table = stdout(&succeed(&args, ""));
    assert!(table.contains("perplexity") && table.contains("KL sparse") && table.contains("0-99"), "{table}");
}

#[test]
fn longbench_goes_on_where_it_stopped() {
    let folder = folder();
    let dir = folder.path().to_str().unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let question = |dataset: &str, answer: &str| {
        let context = "There is a house in the garden. ".repeat(20);
        json!({
            "_id": dataset, "context": context, "input": "What is in the garden?", "answers": [answer],
            "length": 120, "dataset": dataset, "language": "en", "all_classes": [answer],
        })
        .to_string()
    };
    std::fs::write(data.join("a.jsonl"), question("hotpotqa", "a house")).unwrap();
    std::fs::write(data.join("b.jsonl"), question("trec", "house")).unwrap();
    let args = [
        "eval",
        "longbench",
        dir,
        data.to_str().unwrap(),
        "--raw",
        "--prompt-tokens",
        "300",
        "--attention",
        "dense",
        "--backend",
        "cpu",
        "--quiet",
    ];
    let first = succeed(&[&args[..], &["--limit", "1"]].concat(), "");
    let rows: Vec<String> = stdout(&first).lines().map(str::to_string).collect();
    assert!(rows[0].starts_with("data set") && rows[0].ends_with("dense"), "{rows:?}");
    assert!(rows[1].starts_with("hotpotqa") && rows[3].starts_with("mean"), "{rows:?}");
    let results = folder.path().join("data.results.jsonl");
    let before = std::fs::read_to_string(&results).unwrap();
    assert_eq!(before.lines().count(), 2);
    let answer: Value = serde_json::from_str(before.lines().next().unwrap()).unwrap();
    assert_eq!((answer["truncated"].as_bool(), answer["tokens"].as_u64()), (Some(true), Some(300)));
    let again = succeed(&args, "");
    assert_eq!(std::fs::read_to_string(&results).unwrap(), before);
    assert_eq!(stdout(&again), stdout(&first));
}

#[test]
fn rules_stand_side_by_side() {
    let folder = folder();
    let (dir, html) = (folder.path().to_str().unwrap(), folder.path().join("rules.html"));
    let args = [
        "eval",
        "rules",
        dir,
        "--text",
        &text(),
        "--tokens",
        "300",
        "--raw",
        "--lengths",
        "500",
        "--depths",
        "50",
        "--attention",
        "dense",
        "--rule",
        SPARSE,
        "--backend",
        "cpu",
        "--quiet",
        "--html",
        html.to_str().unwrap(),
    ];
    let table = stdout(&succeed(&args, ""));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    let head: Vec<&str> = lines[0].split_whitespace().collect();
    assert!(head.starts_with(&["rule"]) && head.ends_with(&["single", "choice", "several"]), "{table}");
    assert!(lines[2].starts_with("sparse") && lines[2].contains("/3 -"), "{table}");
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("Options") && page.contains("residual"), "{page}");
}

#[test]
fn inspect_shows_every_head() {
    let folder = folder();
    let (dir, html) = (folder.path().to_str().unwrap(), folder.path().join("page.html"));
    let prompt: String = std::fs::read_to_string(text()).unwrap().chars().take(600).collect();
    let args = [
        "inspect",
        dir,
        &prompt,
        "--raw",
        "--rule",
        SPARSE,
        "--layers",
        "1-2",
        "--backend",
        "cpu",
        "--quiet",
        "--html",
        html.to_str().unwrap(),
    ];
    let output = succeed(&args, "");
    assert!(stderr(&output).contains("of the attention · page in"), "{}", stderr(&output));
    let page = std::fs::read_to_string(html).unwrap();
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    let heads = config["num_attention_heads"].as_u64().unwrap() as usize;
    assert_eq!(page.matches("<img src=\"data:image/png;base64,").count(), 2 * heads);
    for part in
        ["Layer 1, head 0", "Layer 2, head 0", "stripes", "All heads", "What of the prompt was missed"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("Layer 0,"));
}

#[test]
fn evaluations_refuse_what_does_not_fit() {
    let folder = folder();
    let dir = folder.path().to_str().unwrap();
    let (text, data) = (text(), folder.path().join("empty"));
    std::fs::create_dir(&data).unwrap();
    let wrong = folder.path().join("wrong.jsonl");
    std::fs::write(&wrong, r#"{"answers":[],"dataset":"quiz"}"#).unwrap();
    let (data, wrong) = (data.to_str().unwrap(), wrong.to_str().unwrap());
    let cases: [(&[&str], &str); 9] = [
        (
            &["eval", "needle", dir, "--raw", "--lengths", "5000"],
            "expected at most 1024 in all (the model's range)",
        ),
        (&["eval", "needle", dir, "--lengths", "512"], "chat format: found neither"),
        (
            &["eval", "needle", dir, "--attention", "dense,dense"],
            "found `dense` twice, expected each name once",
        ),
        (
            &["eval", "needle", dir, "--rule", "x={\"alpha\":2}"],
            "option `alpha` is 2, expected a number in (0, 1]",
        ),
        (&["eval", "perplexity", dir, "--text", "absent.txt"], "absent.txt: No such file or directory"),
        (
            &["eval", "perplexity", dir, "--text", &text, "--windows", "999"],
            "tokens, expected at least 1022976 (999 windows of 1024)",
        ),
        (&["eval", "longbench", dir, data], "found no .jsonl file, expected one a data set"),
        (
            &["eval", "longbench", dir, wrong],
            "wrong.jsonl line 1: found data set `quiz`, expected 2wikimqa, ",
        ),
        (&["inspect", dir, "text", "--raw", "--layers", "2-3"], "--layers: found 3, expected below 3"),
    ];
    for (args, message) in cases {
        let output = sattn(args, "");
        assert_eq!(output.status.code(), Some(CODE_OF_BAD_INPUT), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(stderr(&output).contains(message), "{args:?}: found {}, expected {message}", stderr(&output));
    }
}

#[test]
fn a_trained_model_finds_its_keys() {
    let args = [
        "eval",
        "needle",
        &trained("internlm2"),
        "--lengths",
        "1300",
        "--depths",
        "40",
        "--variants",
        "single",
        "--attention",
        "dense,joint",
        "--backend",
        "cpu",
        "--quiet",
        "--json",
    ];
    let report = run_json(&args, "");
    for trial in report["trials"].as_array().unwrap() {
        assert_eq!(trial["found"], 1, "{trial}");
    }
    assert!(report["trials"][1]["density"].as_f64().unwrap() < 0.8, "{report}");
}

#[test]
fn the_embedded_model_finds_its_keys_sparsely() {
    let model = root().join("weights/embedded").display().to_string();
    let text = text();
    let args = [
        "eval",
        "rules",
        &model,
        "--text",
        &text,
        "--tokens",
        "4096",
        "--lengths",
        "4096",
        "--depths",
        "20,70",
        "--attention",
        "dense,default,joint",
        "--backend",
        "cpu",
        "--quiet",
        "--json",
    ];
    let report = run_json(&args, "");
    for trial in report["needle"]["trials"].as_array().unwrap() {
        assert_eq!(
            trial["found"].as_u64().unwrap() as usize,
            trial["keys"].as_array().unwrap().len(),
            "{trial}"
        );
    }
    let results = report["perplexity"]["results"].as_array().unwrap();
    let perplexity = |result: &Value| result["perplexity"].as_f64().unwrap();
    for result in &results[1..] {
        assert!(perplexity(result) < 1.05 * perplexity(&results[0]), "{result}");
        assert!(result["density"].as_f64().unwrap() < 0.35, "{result}");
    }
}
