use std::ops::ControlFlow;

use super::*;
use crate::testing::{Folder, Script};

fn question(dataset: &str, answers: &[&str]) -> Question {
    Question {
        context: "a {input} b".to_string(),
        input: "who?".to_string(),
        answers: answers.iter().map(|answer| answer.to_string()).collect(),
        length: 5000,
        dataset: dataset.to_string(),
        all_classes: None,
        id: None,
    }
}

#[test]
fn prompts_are_filled_once() {
    let task = Task::of("hotpotqa").unwrap();
    let text = task.fill(&question("hotpotqa", &[]));
    assert!(text.contains("given passages.\na {input} b\n\nAnswer"), "{text}");
    assert!(text.ends_with("Question: who?\nAnswer:"), "{text}");
}

#[test]
fn every_data_set_has_its_task() {
    let names = Task::names();
    assert_eq!(names.split(", ").count(), 21);
    let of = |name| Task::of(name).unwrap();
    assert_eq!((of("gov_report_e").max_tokens, of("gov_report").metric), (512, Metric::RougeL));
    assert_eq!((of("dureader").max_tokens, of("dureader").metric), (128, Metric::RougeLChinese));
    assert!(of("multifieldqa_zh").chat && !of("lsht").chat && of("lsht").first_line);
    assert!(Task::of("unknown").is_none() && Task::of("unknown_e").is_none());
    assert_eq!(prompt_tokens(8192), 7500);
}

#[test]
fn the_first_line_counts_where_examples_go_before() {
    let answer = "\nParis\nQuestion: what else?";
    let one = question("triviaqa", &["London", "paris"]);
    assert_eq!(Task::of("triviaqa").unwrap().score(answer, &one), 1.0);
    let all = Task::of("hotpotqa").unwrap().score(answer, &one);
    assert!((all - 0.4).abs() < 1e-9, "{all}");
}

#[test]
fn a_run_goes_on_where_another_stopped() {
    let folder = Folder::new();
    let (checkpoint, tokenizer) = folder.open();
    let prompter = Prompter::new(&checkpoint, &tokenizer, true).unwrap();
    let data = folder.path().join("lcc.jsonl");
    let lines: Vec<String> = (0..3)
        .map(|id| {
            format!(
                r#"{{"_id":"q{id}","context":"int x = {id};","input":"","answers":["y"],"length":9000,"dataset":"lcc","all_classes":null}}"#
            )
        })
        .collect();
    std::fs::write(&data, lines.join("\n")).unwrap();
    let config = LongBenchConfig {
        attentions: vec![sample_attention::Preset::Dense.into()],
        prompt_tokens: 20,
        limit: None,
        raw: false,
        model: "tiny".to_string(),
    };
    let file = folder.path().join("results.jsonl");
    let files = files(folder.path()).unwrap();
    let run = |stop_after: usize| {
        let mut results = Results::open(&file).unwrap();
        let mut engine = Script::new(&[], &[]);
        let mut progress = |done, total| {
            assert_eq!(total, 3);
            if done == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        config.run(&mut engine, 3, &prompter, &files, &mut results, &mut progress).unwrap();
        (engine.calls, results.scores("tiny", 20))
    };
    assert!(run(1).0 > 0);
    // As if the second line had not been written whole.
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}{{\"model\":")).unwrap();
    let (calls, scores) = run(9);
    assert!(calls > 0);
    let (head, rows) = scores.rows(&["dense".to_string()]);
    assert_eq!(head, ["data set", "answers", "dense"]);
    assert_eq!((rows[0][0].as_str(), rows[0][1].as_str(), rows.len()), ("lcc", "3", 2));
    assert_eq!(run(9).0, 0);
    let results = std::fs::read_to_string(&file).unwrap();
    assert_eq!(results.lines().count(), 3);
    // 20 tokens of prompt, of which the middle was cut.
    let answer: Value = serde_json::from_str(results.lines().next().unwrap()).unwrap();
    assert_eq!(answer["truncated"], true);
}

#[test]
fn what_is_wrong_with_a_file_is_found_before_anything_runs() {
    let folder = Folder::new();
    let (checkpoint, tokenizer) = folder.open();
    let prompter = Prompter::new(&checkpoint, &tokenizer, true).unwrap();
    let config = LongBenchConfig {
        attentions: Vec::new(),
        prompt_tokens: 20,
        limit: None,
        raw: false,
        model: String::new(),
    };
    let data = folder.path().join("data.jsonl");
    for (line, message) in [
        (
            r#"{"answers":[],"dataset":"nope"}"#,
            "data.jsonl line 1: found data set `nope`, expected 2wikimqa,",
        ),
        ("no json", "data.jsonl line 1: found expected ident"),
        (r#"{"dataset":"lcc"}"#, "missing field `answers`"),
    ] {
        std::fs::write(&data, line).unwrap();
        let mut results = Results::open(&folder.path().join("out")).unwrap();
        let mut engine = Script::new(&[], &[]);
        let run =
            config.run(&mut engine, 3, &prompter, std::slice::from_ref(&data), &mut results, &mut |_, _| {
                ControlFlow::Continue(())
            });
        let error = run.unwrap_err().to_string();
        assert!(error.contains(message), "{line}: found {error}, expected {message}");
        assert_eq!(engine.calls, 0);
    }
    let empty = Folder::new();
    assert!(files(empty.path()).unwrap_err().to_string().contains("expected one a data set"));
}
