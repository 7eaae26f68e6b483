//! What sequences hold, and that training teaches it.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use burn::backend::{Autodiff, Flex};
use burn::tensor::{DType, Int, Tensor, TensorData};
use long_context::generate::{Engine, GeneratorConfig};
use long_context::models::{Model, ModelConfig};
use long_context::sampler::most_likely;
use long_context_weights::{Checkpoint, TokenIds, save_internlm2};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::batches::{Batch, Batches, batch};
use crate::corpus::{Book, Corpus, HELD_OUT_SHARE};
use crate::evaluate::Evaluator;
use crate::recipe::Recipe;
use crate::sequence::{Role, Sequence, Writer};
use crate::tasks::{Source, Task};
use crate::train::{dense, losses, read, train};
use crate::{Args, run};

const RECIPE: &str = r#"{
    "seed": 3,
    "model": { "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 48,
               "rope_theta": 10000.0, "context": 1024 },
    "optimizer": { "learning_rate": 0.01, "last_learning_rate": 0.001, "warm_up_steps": 5, "weight_decay": 0.01,
                   "beta_2": 0.95, "clip_norm": 1.0 },
    "loss": { "text": 1.0, "copied": 1.0, "asked": 1.0 },
    "stages": [
        { "steps": 30, "length": 128, "batch": 4, "span": 512, "far": 0.1, "mix": { "text": 1, "copy": 1, "key": 2, "keys": 1 } },
        { "steps": 3, "length": 192, "batch": 2, "span": 192, "mix": { "passage": 1, "word": 1, "variable": 1 } }
    ],
    "evaluation": { "lengths": [160], "prompts": 4, "text_tokens": 1024 }
}"#;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn corpus() -> Corpus {
    let tokenizer = examples().join("train_embedded/fixtures");
    Corpus::read(&tokenizer, &examples().join("pride-and-prejudice.txt")).unwrap()
}

fn writer(corpus: &Corpus) -> Writer<'_> {
    Writer { corpus, book: &corpus.book, held_out: false }
}

fn random(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// The runs of tokens that were asked for, as text, each with where it begins.
fn asked(corpus: &Corpus, sequence: &Sequence) -> Vec<(usize, String)> {
    let mut runs: Vec<(usize, Vec<u32>)> = Vec::new();
    for (at, id) in sequence.ids.iter().enumerate().filter(|(at, _)| sequence.roles[*at] == Role::Asked) {
        match runs.last_mut().filter(|(start, run)| start + run.len() == at) {
            Some((_, run)) => run.push(*id),
            None => runs.push((at, vec![*id])),
        }
    }
    let text = |run: &[u32]| corpus.tokenizer.decode(run).trim().trim_end_matches('.').to_string();
    runs.iter().map(|(at, run)| (*at, text(run))).collect()
}

#[test]
fn sequences_have_their_length_and_follow_from_the_seed() {
    let corpus = corpus();
    for task in Task::ALL {
        for length in [128, 129, 700, 3000] {
            let write = |seed| writer(&corpus).write(task, length, &mut random(seed));
            let sequence = write(1);
            assert_eq!((sequence.ids.len(), sequence.roles.len()), (length, length), "{task:?}");
            assert_eq!(sequence, write(1), "{task:?}");
            assert_ne!(sequence, write(2), "{task:?}");
            assert!(sequence.ids.iter().all(|&id| (id as usize) < corpus.tokenizer.vocab_size()));
        }
    }
}

#[test]
fn what_is_asked_for_was_stated_before() {
    let corpus = corpus();
    for task in Task::ASKED {
        for seed in 0..20 {
            let sequence = writer(&corpus).write(task, 1000, &mut random(seed));
            let answers = asked(&corpus, &sequence);
            assert!(!answers.is_empty(), "{task:?}, seed {seed}");
            for (at, answer) in answers {
                let before = corpus.tokenizer.decode(&sequence.ids[..at]);
                // Sentence by sentence: the words that lead to the answer, in a statement of the text too.
                let lead = before.rsplit(['.', '?', '\n']).next().unwrap().trim();
                let lead = lead.rsplit("assistant").next().unwrap().trim_start_matches("The ");
                let stated = before.contains(&format!("{lead} {answer}."))
                    && before.matches(&format!("{lead} ")).count() >= 1;
                assert!(stated, "{task:?}, seed {seed}: {lead:?} {answer:?} in {before}");
            }
        }
    }
}

#[test]
fn what_is_copied_follows_from_the_tokens_before() {
    let corpus = corpus();
    for task in [Task::Copy, Task::Passage] {
        let sequence = writer(&corpus).write(task, 600, &mut random(5));
        let copied: Vec<usize> = (0..600).filter(|&at| sequence.roles[at] == Role::Copied).collect();
        assert!(copied.len() > 60, "{task:?}: {}", copied.len());
        for at in copied {
            let run = &sequence.ids[at - 3..=at];
            assert!(sequence.ids[..at].windows(4).any(|before| before == run), "{task:?}: {at}");
        }
    }
}

#[test]
fn a_key_stands_at_its_depth_and_training_never_sees_it() {
    let corpus = corpus();
    let held_out = Writer { held_out: true, ..writer(&corpus) };
    for depth in [0.0, 0.3, 0.9] {
        for task in [Task::Key, Task::Keys] {
            let sequence = held_out.write_at(task, 2000, depth, &mut random(8));
            let answers = asked(&corpus, &sequence);
            let [(end, key)] = &answers[..] else { panic!("{answers:?}, expected one answer") };
            assert!(key.parse::<usize>().unwrap().is_multiple_of(HELD_OUT_SHARE), "{key}");
            let mut at = 0;
            while corpus.tokenizer.decode(&sequence.ids[..at]).matches(key.as_str()).count() == 0 {
                at += 1;
            }
            // Other statements and the way to the next sentence stand between.
            let expected = (depth * *end as f64) as usize;
            assert!(at + 50 >= expected && at < expected + 500, "{task:?}: token {at}, expected {expected}");
        }
    }
    let trained = Source { corpus: &corpus, held_out: false };
    for seed in 0..50 {
        for question in trained.draw(Task::Keys, 8, &mut random(seed)).questions {
            let number: usize = question.answer[0].1.parse().unwrap();
            assert!(!number.is_multiple_of(HELD_OUT_SHARE), "{number}");
        }
    }
    let [trained, held_out] = [false, true].map(|held_out| corpus.words(held_out));
    let trained: BTreeSet<&String> = trained.iter().collect();
    assert!(held_out.iter().all(|word| !trained.contains(word)));
}

#[test]
fn batches_do_not_depend_on_the_threads_that_make_them() {
    let corpus = corpus();
    let recipe: Recipe = serde_json::from_str(RECIPE).unwrap();
    let made: Vec<Batch> =
        std::thread::scope(|scope| Batches::start(scope, writer(&corpus), &recipe).collect());
    assert_eq!(made.len(), recipe.steps());
    let stages = recipe.stages.iter().flat_map(|stage| std::iter::repeat_n(stage, stage.steps));
    for (step, (found, stage)) in made.iter().zip(stages).enumerate() {
        let expected = batch(&writer(&corpus), stage, recipe.seed, step);
        assert_eq!((&found.ids, &found.targets), (&expected.ids, &expected.targets), "step {step}");
        assert_eq!(found.positions, expected.positions);
        assert_eq!((found.sequences, found.length), (stage.batch, stage.length));
        assert!(found.positions.is_sorted_by(|a, b| a < b) && *found.positions.last().unwrap() < stage.span);
        assert_eq!(found.ids[1..found.length], found.targets[..found.length - 1]);
        let weights = found.weights(&recipe.loss);
        let kinds: BTreeSet<Role> = found.roles.iter().copied().filter(|&role| role != Role::Given).collect();
        assert!((weights.iter().sum::<f32>() - kinds.len() as f32).abs() < 1e-3);
    }
    assert!(made.iter().any(|batch| *batch.positions.last().unwrap() >= batch.length));
}

#[test]
fn a_trained_model_is_better_and_its_folder_runs() {
    let corpus = corpus();
    let recipe: Recipe = serde_json::from_str(RECIPE).unwrap();
    let device = Default::default();
    let config = recipe.model(corpus.tokenizer.vocab_size());
    let model_config = ModelConfig::InternLm2(config.clone());
    let mut lines = Vec::new();
    let trained = std::thread::scope(|scope| {
        let batches = Batches::start(scope, writer(&corpus), &recipe);
        let mut log = |line| lines.push(line);
        train::<Autodiff<Flex>>(&model_config, &recipe, batches, DType::F32, &device, &mut log).unwrap()
    });
    assert!(lines.len() == 2 && lines[0].contains("step    25") && lines[0].contains("one key"), "{lines:?}");
    assert!(lines[0].contains("far 0.") && !lines[1].contains("far"), "{lines:?}");

    let other = batch(&writer(&corpus), &recipe.stages[0], 99, 0);
    let mean = |model: &Model<Flex>| {
        let losses = read(losses(model, &other, &dense(), DType::F32, &device).0).unwrap();
        let weights = other.weights(&recipe.loss);
        losses.iter().zip(weights).map(|(loss, weight)| loss * weight).sum::<f32>() / 3.0
    };
    let (before, after) = (mean(&model_config.init(&device)), mean(&trained));
    assert!(after < before - 1.0, "{before} before, {after} after");

    let folder = std::env::temp_dir().join(format!("train-embedded-{}", std::process::id()));
    save_internlm2(&folder, &trained, &config, &TokenIds { bos: corpus.special.bos, eos: vec![2] }).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let load = || checkpoint.load::<Flex>(checkpoint.config(), DType::F32, &device, Rc::new(|_| ())).unwrap();
    let model = load();
    let limits = GeneratorConfig { capacity: 64, chunk: 7, dtype: DType::F32, attention: dense() };
    let mut engine = limits.init(load(), checkpoint.config(), &device);
    std::fs::remove_dir_all(&folder).unwrap();

    // All at once without a cache, and in chunks with one.
    let ids: Vec<u32> = corpus.book.ids()[..40].to_vec();
    let tensor = TensorData::new(ids.iter().map(|&id| id as i32).collect::<Vec<_>>(), [1, ids.len()]);
    let positions: Vec<usize> = (0..ids.len()).collect();
    let passed = model.forward_sequences(
        Tensor::<Flex, 2, Int>::from_data(tensor, &device),
        &positions,
        &dense(),
        DType::F32,
    );
    let last = model.logits(passed.hidden.narrow(1, ids.len() - 1, 1)).into_data().into_vec::<f32>().unwrap();
    let cached = engine.prefill(&ids, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
    let worst = last.iter().zip(&cached).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
    assert!((most_likely(&cached) as usize) < corpus.tokenizer.vocab_size());

    let book = Book::new(&corpus.tokenizer, "No one was there. It was late, and they went home.\nThe end.");
    let evaluator = Evaluator {
        model: &model,
        writer: Writer { corpus: &corpus, book: &book, held_out: true },
        attention_dtype: DType::F32,
        device: &device,
    };
    let scores = evaluator.run(&recipe.evaluation, &mut |_| ()).unwrap();
    assert!(scores.text.is_finite());
    assert!(scores.answers.iter().all(|score| score.prompts() == 4 && score.right() <= 4));
    let card = crate::card::card(&recipe, 1_000_000, &scores);
    assert!(card.contains("| one of several keys | ") && card.contains("160, dense"), "{card}");
}

#[test]
fn bad_input_gets_one_line() {
    let text = examples().join("train_embedded/fixtures");
    let args = |text: &Path, recipe: Option<PathBuf>| Args {
        out: std::env::temp_dir().join("never-written"),
        text: text.to_path_buf(),
        recipe,
    };
    let cases = [
        (args(Path::new("no-such-folder"), None), "no-such-folder: tokenizer: found none, expected"),
        (args(&text, None), "train.txt: No such file or directory"),
        (args(&text, Some("absent.json".into())), "absent.json: No such file or directory"),
        (args(&text, Some(text.join("tokenizer.model"))), "tokenizer.model: "),
        (
            args(&text, Some(examples().join("pride-and-prejudice.txt"))),
            "pride-and-prejudice.txt: expected value",
        ),
    ];
    for (args, message) in cases {
        let error = run(&args).unwrap_err();
        assert!(error.to_string().contains(message), "found {error}, expected {message}");
        assert_eq!((error.exit_code(), error.to_string().lines().count()), (2, 1));
    }
}
