use super::*;
use sample_attention::Preset;

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
fn a_key_is_found_as_a_number_of_its_own() {
    let keys = ["71432".to_string(), "10000".to_string()];
    for (text, expected) in [
        ("It is 71432.", 1),
        ("71432, 10000", 2),
        ("714321 and 110000", 0),
        ("7 1 4 3 2", 0),
        ("71432 71432", 1),
        ("", 0),
    ] {
        assert_eq!(found(text, &keys), expected, "{text}");
    }
}

#[test]
fn cells_and_rows_count_keys() {
    let report = report();
    assert_eq!(report.cell("joint", Variant::Several, 1000, 50), Some(1.0 / 3.0));
    assert_eq!(report.cell("joint", Variant::Single, 1000, 50), None);
    let (head, rows) = report.rows();
    assert_eq!(head, ["attention", "density", "recall", "minimum", "several"]);
    assert_eq!(rows[1], ["joint", "0.500", "0.950", "0.400", "4/6"]);
}

#[test]
fn every_prompt_has_its_own_seed() {
    let config = NeedleConfig { prompts: 3, variants: Variant::ALL.into(), ..report().config };
    let seeds: BTreeSet<u64> = config.places().iter().map(|(_, place)| place.seed).collect();
    assert_eq!((seeds.len(), config.answers()), (18, 36));
    assert_eq!(config.capacity(), 1048);
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
