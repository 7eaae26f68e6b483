//! `sattn` as its users meet it: what goes to which stream, exit codes, answers of a trained model.
//!
//! `examples/checkpoint.sh target/checkpoint` makes the trained model.

#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/eval.rs"]
mod eval;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

const CODE_OF_BAD_INPUT: i32 = 2;
const CODE_OF_INTERRUPT: i32 = 130;
const NEEDLE: &str = "The pass key is 71432. Remember it: 71432 is the pass key.";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn tiny(name: &str) -> String {
    root().join("tests/fixtures/golden").join(name).display().to_string()
}

fn trained(layout: &str) -> String {
    let folder = root().join("target/checkpoint").join(layout);
    assert!(folder.is_dir(), "examples/checkpoint.sh target/checkpoint makes {}", folder.display());
    folder.display().to_string()
}

fn spawn(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sattn"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn sattn(args: &[&str], input: &str) -> Output {
    let mut child = spawn(args);
    // A command that refuses its arguments closes the pipe unread.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn succeed(args: &[&str], input: &str) -> Output {
    let output = sattn(args, input);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    output
}

fn json(args: &[&str], input: &str) -> Value {
    serde_json::from_str(&stdout(&succeed(args, input))).unwrap()
}

/// Three chapters of a novel.
fn chapters() -> String {
    let text = std::fs::read_to_string(root().join("examples/pride-and-prejudice.txt")).unwrap();
    let (chapters, _) = text.split_once("\nChapter 4\n").unwrap();
    format!("{}\n", chapters.trim_end())
}

/// They with a pass key in the middle and a question about it at the end.
fn long_prompt() -> String {
    let text = chapters();
    let middle = text[..text.len() / 2].rfind("\n\n").unwrap();
    format!("{}\n\n{NEEDLE}{}\n\nWhat is the pass key?", &text[..middle], &text[middle..])
}

#[test]
fn bad_input_gets_one_line_and_exit_code_2() {
    let model = trained("internlm2");
    let tiny = tiny("internlm2-tiny");
    let golden = format!("{tiny}/golden.json");
    let cases: [(&[&str], &str); 17] = [
        (&["generate", "no-such-folder", "hello"], "no-such-folder/config.json: No such file or directory"),
        (
            &["generate", &model, ""],
            "prompt: found nothing, expected text as an argument, in --file or on standard",
        ),
        (&["generate", &model, "--file", "absent.txt"], "absent.txt: No such file or directory"),
        (
            &["generate", &model, "hello", "-n", "9000"],
            "and 9000 to generate, expected at most 8192 in all (the model's",
        ),
        (&["generate", &model, "hello", "--top-p", "1.5"], "error: --top-p: found 1.5, expected"),
        (&["generate", &model, "hello", "--temperature=-1"], "error: --temperature: found -1, expected"),
        (&["generate", &tiny, "hello"], "tokenizer: found none, expected tokenizer.model or tokenizer.json"),
        (
            &["chat", &model, "--context", "9000"],
            "--context: found 9000 tokens, expected at most 8192 (the model's range)",
        ),
        (
            &["logits", &tiny, "--ids", "1,x", "--out", "o"],
            "--ids: found 'x', expected token ids separated by commas or",
        ),
        (
            &["logits", &tiny, "--ids", "1,999999", "--out", "o"],
            "token id at position 1: found 999999, expected below",
        ),
        (&["op", "absent.safetensors", "--out", "o"], "absent.safetensors: No such file or directory"),
        (&["op", &golden, "--out", "o"], "golden.json: "),
        (&["logits", &tiny, "--ids", "", "--out", "o"], "token ids: found none, expected at least one"),
        (&["demo", "no-such-folder"], "no-such-folder/config.json: No such file or directory"),
        (&["demo", &tiny], "tokenizer: found none, expected tokenizer.model or tokenizer.json"),
        (
            &["demo", &model, "--tokens", "9000"],
            "found 9000 tokens and 32 to generate, expected at most 8192",
        ),
        (&["demo", &model, "--tokens", "200"], "--tokens: found 200, expected 256 to 4"),
    ];
    for (args, message) in cases {
        let output = sattn(args, "");
        assert_eq!(output.status.code(), Some(CODE_OF_BAD_INPUT), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
        let text = stderr(&output);
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("error: ")).collect();
        assert!(
            errors.len() == 1 && errors[0].contains(message),
            "{args:?}: found {text}, expected {message}"
        );
    }
}

#[test]
fn logits_are_those_of_the_official_code() {
    let folder = tiny("chatglm3-32k-tiny");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(format!("{folder}/golden.json")).unwrap()).unwrap();
    let (name, prompt) = golden["prompts"].as_object().unwrap().iter().next().unwrap();
    let work = tempfile::tempdir().unwrap();
    let (ids, out) = (work.path().join("ids.txt"), work.path().join("logits.safetensors"));
    std::fs::write(&ids, prompt["input_ids"].to_string()).unwrap();
    let (ids, out) = (ids.to_str().unwrap(), out.to_str().unwrap());
    let read = |file: &str, tensor: &str| -> (Vec<usize>, Vec<f32>) {
        let data = std::fs::read(file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&data).unwrap();
        let tensor = tensors.tensor(tensor).unwrap();
        let values = tensor.data().chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap()));
        (tensor.shape().to_vec(), values.collect())
    };
    let expected = read(&format!("{folder}/golden.safetensors"), &format!("logits.{name}"));
    for backend in ["cpu", "vulkan"] {
        let output = succeed(
            &["logits", &folder, "--ids", ids, "--out", out, "--backend", backend, "--chunk", "7"],
            "",
        );
        assert!(output.stdout.is_empty());
        let found = read(out, "logits");
        assert_eq!(found.0, expected.0);
        let worst = found.1.iter().zip(&expected.1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-3, "{backend}: {worst}");
    }
}

#[test]
fn info_and_tokenize_speak_json() {
    let folder = trained("chatglm");
    let info = json(&["info", &folder, "--json", "--tokens", "1000"], "");
    assert_eq!(info["architecture"], "ChatGLM3");
    assert_eq!((info["layers"].as_u64(), info["context_length"].as_u64()), (Some(30), Some(8192)));
    assert_eq!(info["stored_types"], serde_json::json!(["bf16"]));
    // 30 layers, keys and values, 3 heads of 128, 1000 tokens, 4 bytes.
    assert_eq!(info["memory"][0]["kv_cache"], 30 * 2 * 3 * 128 * 1000 * 4);
    let table = stdout(&succeed(&["info", &folder, "--tokens", "1000"], ""));
    assert!(table.contains("range       8192 tokens") && table.contains("memory for 1000 tokens"), "{table}");

    let text = "Grüße, 世界 👋\n<|im_start|>system";
    let tokens = json(&["tokenize", &folder, "-", "--json"], text);
    let pieces: Vec<&str> =
        tokens["pieces"].as_array().unwrap().iter().map(|piece| piece.as_str().unwrap()).collect();
    assert_eq!(tokens["ids"].as_array().unwrap().len(), pieces.len());
    assert!(!pieces.contains(&"<|im_start|>"), "{pieces:?}");
}

#[test]
fn text_streams_to_stdout_and_timings_to_stderr() {
    let folder = trained("internlm2");
    let question = "What is the capital of France?";
    let args = ["generate", &folder, question, "-n", "24", "--backend", "cpu"];
    let streamed = succeed(&args, "");
    assert!(stdout(&streamed).contains("Paris"), "{}", stdout(&streamed));
    for word in ["cpu · ", "TTFT", "prefill", "decode", "peak"] {
        assert!(stderr(&streamed).contains(word), "no {word} in {}", stderr(&streamed));
    }
    let from_stdin = succeed(&["generate", &folder, "-n", "24", "--backend", "cpu"], question);
    assert_eq!(stdout(&from_stdin), stdout(&streamed));

    let whole = json(&[&args[..], &["--json"]].concat(), "");
    assert_eq!(format!("{}\n", whole["text"].as_str().unwrap()), stdout(&streamed));
    assert_eq!(whole["backend"], "cpu");
    let stopped = json(&[&args[..], &["--json", "--stop", "Par"]].concat(), "");
    assert_eq!(stopped["finish"], "stop string");
    assert_eq!(whole["text"].as_str().unwrap().split("Par").next(), stopped["text"].as_str());
}

#[test]
fn a_seed_settles_what_is_drawn() {
    let folder = trained("internlm2");
    let draw = |seed: &str| {
        let sampling =
            ["--temperature", "1.2", "--top-k", "40", "--top-p", "0.95", "--seed", seed, "-n", "16"];
        let args = [&["generate", &folder, "Tell me a story.", "--backend", "cpu", "--json"], &sampling[..]]
            .concat();
        json(&args, "")["ids"].clone()
    };
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));
}

#[test]
fn chat_keeps_its_history_until_it_is_reset() {
    let question = "What is the capital of France?";
    let input =
        format!("{question}\n/stats\nAnd of Italy?\n/stats\n/reset\n/nonsense\n{question}\n/stats\n/quit\n");
    let output =
        succeed(&["chat", &trained("internlm2"), "-n", "12", "--backend", "cpu", "--context", "512"], &input);
    let (text, notes) = (stdout(&output), stderr(&output));
    let answers: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(answers.first(), answers.last(), "{text}");
    assert!(answers[0].contains("Paris"), "{text}");
    assert!(notes.contains("/nonsense: expected /reset, /stats or /quit"), "{notes}");
    // The second question is run after what the cache holds of the first; after a reset all is run again.
    let prefills: Vec<usize> =
        notes.split("prefill ").skip(1).filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect();
    assert_eq!(prefills.len(), 3, "{notes}");
    assert!(prefills[1] < prefills[0], "{notes}");
}

#[test]
fn a_question_about_a_long_text_is_answered() {
    let prompt = long_prompt();
    for layout in ["internlm2", "chatglm"] {
        let answer = json(&["generate", &trained(layout), "-n", "16", "--backend", "cpu", "--json"], &prompt);
        assert!(answer["prompt_tokens"].as_u64().unwrap() > 4000);
        assert!(answer["text"].as_str().unwrap().contains("71432"), "{layout}: {}", answer["text"]);
    }
}

#[test]
fn sample_attention_finds_what_dense_attention_finds() {
    let prompt = long_prompt();
    let folder = trained("internlm2");
    let args = ["generate", &folder, "-n", "16", "--backend", "cpu", "--json", "--report", "--chunk", "8192"];
    let attention = ["--attention", "default", "--layer-attention", "0-1=dense"];
    let answer = json(&[&args[..], &attention[..]].concat(), &prompt);
    assert!(answer["text"].as_str().unwrap().contains("71432"), "{answer}");
    // The first two layers are dense and have nothing to report.
    let layers = answer["layers"].as_array().unwrap();
    assert_eq!((layers.len(), layers[0]["layer"].as_u64()), (28, Some(2)));
    for layer in layers {
        assert!(layer["recall_mean"].as_f64().unwrap() > 0.949, "{layer}");
        assert!(layer["density"].as_f64().unwrap() < 1.0, "{layer}");
    }
}

#[test]
fn the_demo_answers_twice_and_compares() {
    let args = ["demo", "--tokens", "4096", "--depth", "0.25", "--backend", "cpu"];
    let demo = json(&[&args[..], &["--json", "--seed", "5"]].concat(), "");
    assert_eq!(demo["key"].as_str().unwrap().len(), 5);
    assert_eq!(demo["depth"], 0.25);
    let seconds = |run: &str| demo[run]["ttft_seconds"].as_f64().unwrap();
    let speed_up = demo["speed_up"].as_f64().unwrap();
    assert!((speed_up - seconds("dense") / seconds("sparse")).abs() < 1e-6 * speed_up);
    for (run, attention, layers) in [("dense", "dense", 0), ("sparse", "default", 6)] {
        let run = &demo[run];
        assert_eq!(run["attention"], attention);
        let tokens = run["prompt_tokens"].as_u64().unwrap();
        assert!((3700..=4096).contains(&tokens), "{tokens}");
        assert_eq!(run["prefill_tokens"], tokens);
        assert!(run["answer"].as_str().unwrap().contains(demo["key"].as_str().unwrap()), "{run}");
        assert_eq!(run["right"], true);
        assert_eq!(run["layers"].as_array().unwrap().len(), layers);
        for layer in run["layers"].as_array().unwrap() {
            assert_eq!(layer["head_density"].as_array().unwrap().len(), 4);
            assert!(layer["recall_mean"].as_f64().unwrap() > 0.9, "{layer}");
        }
    }
    assert_eq!(demo["dense"]["density"], 1.0);
    assert!(demo["sparse"]["density"].as_f64().unwrap() < 0.7, "{demo}");
    let folder = root().join("weights/embedded").display().to_string();
    let other = json(&["demo", &folder, "--tokens", "1500", "--backend", "cpu", "--json", "--seed", "6"], "");
    assert_ne!(other["key"], demo["key"]);
    assert_eq!(other["dense"]["right"], true);

    let table = stdout(&succeed(&[&args[..], &["--attention", "fast"]].concat(), ""));
    for word in
        ["stands 25% into a text of", "SampleAttention (fast)", "right", "times as fast", "layer  density"]
    {
        assert!(table.contains(word), "no {word} in {table}");
    }
    assert!(table.contains(['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█']) && !table.contains('\x1b'), "{table}");
}

#[test]
fn the_operator_reproduces_its_golden_cases() {
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("out.safetensors");
    let out = out.to_str().unwrap();
    for case in
        ["block64", "chunk", "no-stripes-needed", "paper-total", "residual", "short-dense", "batch-wide"]
    {
        let folder = root().join("tests/fixtures/sample-attention").join(case);
        let (input, config) = (folder.join("golden.safetensors"), folder.join("golden.json"));
        let (input, config) = (input.to_str().unwrap(), config.to_str().unwrap());
        let expected = std::fs::read(input).unwrap();
        let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
        let backends: &[&str] = if case == "batch-wide" { &["cpu"] } else { &["cpu", "vulkan"] };
        for backend in backends {
            succeed(&["op", input, "--config", config, "--out", out, "--backend", backend], "");
            let found = std::fs::read(out).unwrap();
            let found = safetensors::SafeTensors::deserialize(&found).unwrap();
            for name in ["bands", "stripes", "stripe_count"] {
                let (found, expected) = (found.tensor(name).unwrap(), expected.tensor(name).unwrap());
                assert_eq!(found.shape(), expected.shape(), "{case}, {backend}: {name}");
                assert_eq!(found.data(), expected.data(), "{case}, {backend}: {name}");
            }
            for name in ["out", "lse", "density", "recall"] {
                let values = |tensors: &safetensors::SafeTensors<'_>| -> Vec<f32> {
                    let words = tensors.tensor(name).unwrap().data().to_vec();
                    words.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
                };
                let (found, expected) = (values(&found), values(&expected));
                assert_eq!(found.len(), expected.len());
                let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-4, "{case}, {backend}: {name} differs by {worst}");
            }
        }
    }
}

#[test]
fn past_the_range_the_rotary_embedding_stretches_on_request() {
    let folder = trained("internlm2");
    let args = [
        "generate",
        &folder,
        "What is the capital of France?",
        "-n",
        "8190",
        "--stop",
        "\n",
        "--backend",
        "cpu",
    ];
    let refused = sattn(&args, "");
    assert!(stderr(&refused).contains("--stretch-rope stretches it"), "{}", stderr(&refused));
    let answer = json(&[&args[..], &["--stretch-rope", "--stop", ".", "--json"]].concat(), "");
    assert!(answer["text"].as_str().unwrap().contains("Paris"), "{answer}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_cleanly() {
    let text = chapters();
    let mut child =
        spawn(&["generate", &trained("internlm2"), "--backend", "cpu", "--chunk", "64", "--quiet"]);
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_secs(6));
    let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(CODE_OF_INTERRUPT), "{}", stderr(&output));
    assert!(!stderr(&output).contains("error"), "{}", stderr(&output));
}
