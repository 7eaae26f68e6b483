use std::collections::BTreeSet;

use sample_attention::Preset;

use super::*;
use crate::testing::{Folder, Script};

fn trial(attention: &str, depth: usize, found: usize) -> Trial {
    Trial {
        attention: attention.to_string(),
        variant: Variant::Several,
        length: 1000,
        depth,
        prompt: 0,
        tokens: 990,
        keys: ["11111", "22222", "33333"].map(String::from).into(),
        found,
        answer: "<b>".to_string(),
        kept: Kept { density: 0.5, recall: 0.95, recall_min: 0.4 },
    }
}

fn report() -> NeedleReport {
    let config = NeedleConfig {
        attentions: [Preset::Dense, Preset::Joint].map(NamedAttention::from).into(),
        variants: vec![Variant::Several],
        lengths: vec![1000],
        depths: vec![0, 50],
        prompts: 1,
        seed: 0,
    };
    let trials =
        vec![trial("dense", 0, 3), trial("joint", 0, 3), trial("dense", 50, 3), trial("joint", 50, 1)];
    NeedleReport { config, trials }
}

#[test]
fn the_first_long_number_is_the_answer() {
    for (text, expected) in [
        ("It is 71432.", Some("71432")),
        (" 12 or 71432, 10000", Some("71432")),
        ("714321", Some("714321")),
        ("7 1 4 3 2", None),
        ("", None),
    ] {
        assert_eq!(number(text), expected, "{text}");
    }
}

#[test]
fn an_answer_is_led_from_key_to_key() {
    let folder = Folder::new();
    let (checkpoint, tokenizer) = folder.open();
    let prompter = Prompter::new(&checkpoint, &tokenizer, true).unwrap();
    let haystack = Haystack::new(TEXT, &prompter).unwrap();
    let place = Place { variant: Variant::Several, length: 700, depth: 50, seed: 1 };
    let question = haystack.prompt(place, &prompter).unwrap();
    assert!((500..=700).contains(&question.ids.len()), "{}", question.ids.len());
    let text = tokenizer.decode(&question.ids);
    assert!(question.keys.iter().all(|key| text.contains(&format!("is {key}."))), "{text}");
    assert_eq!((question.keys.len(), question.leads.len()), (3, 2));
    // An engine that says nothing of use is led on all the same.
    let (answer, found) = find(&mut Script::new(&[], &[]), &question, &prompter).unwrap();
    assert_eq!((found, answer.matches("The pass key of the").count()), (0, 2), "{answer}");
}

#[test]
fn cells_and_rows_count_keys() {
    let report = report();
    assert_eq!(report.cell("joint", Variant::Several, 1000, 50), Some(1.0 / 3.0));
    assert_eq!(report.cell("joint", Variant::Single, 1000, 50), None);
    let (head, rows) = report.rows();
    assert_eq!(head, ["attention", "density", "recall", "minimum", "several"]);
    assert_eq!(rows[1], ["joint", "0.500", "0.950", "0.400", "4/6 -2 +0"]);
    assert_eq!(rows[0][4], "6/6");
}

#[test]
fn every_prompt_has_its_own_seed() {
    let config = NeedleConfig { prompts: 3, variants: Variant::ALL.into(), ..report().config };
    let seeds: BTreeSet<u64> = config.places().iter().map(|(_, place)| place.seed).collect();
    assert_eq!((seeds.len(), config.answers()), (18, 36));
    assert_eq!(config.capacity(), 1176);
}

#[test]
fn the_page_shows_a_map_for_each_attention() {
    let page = report().page("a model");
    assert_eq!(page.matches("<svg").count(), 2);
    for text in ["joint", "33", "&lt;b&gt;", "4/6"] {
        assert!(page.contains(text), "{text}");
    }
    let png = report().picture().png().unwrap();
    assert!(png.starts_with(b"\x89PNG"));
}
