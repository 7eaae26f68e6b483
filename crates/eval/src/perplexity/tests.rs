use super::*;
use crate::testing::Script;
use std::ops::ControlFlow;

#[test]
fn divergence_of_known_distributions() {
    // P = (1/2, 1/4, 1/4), Q = (1/4, 1/4, 1/2): KL = 1/2 ln 2 - 1/4 ln 2.
    let p = [2.0f32.ln(), 0.0, 0.0];
    let q = [5.0, 5.0, 5.0 + 2.0f32.ln()];
    let row = Row::of(&p, &q, 2);
    assert!((row.divergence - 0.25 * 2.0f64.ln()).abs() < 1e-6, "{row:?}");
    assert!((row.loss - 2.0f64.ln()).abs() < 1e-6, "{row:?}");
    assert!(!row.agrees);
    let same = Row::of(&p, &p, 0);
    assert!(same.divergence < 1e-12 && same.agrees);
}

#[test]
fn perplexity_of_a_known_model() {
    // The script gives half its mass to the successor of each token and 1/30 to any other.
    let run = |text: &[u32], buckets| {
        let config = PerplexityConfig::new(vec![Preset::Joint.into()], 8, 2, buckets);
        let mut engine = Script::new(&[], &[]);
        config.run(&mut engine, 2, &[0], text, &mut |_, _| ControlFlow::Continue(()))
    };
    let report = run(&[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 9, 9, 9], 2).unwrap();
    assert_eq!(report.results.len(), 2);
    assert_eq!(report.results[0].attention, "dense");
    let quality = report.results[1].quality;
    assert_eq!((quality.tokens, quality.divergence), (14, 0.0));
    let expected = ((11.0 * 2.0f64.ln() + 3.0 * 30.0f64.ln()) / 14.0).exp();
    assert!((quality.perplexity - expected).abs() < 1e-4, "{quality:?}, expected {expected}");
    let first = report.results[1].buckets[0].quality;
    assert!((first.perplexity - 2.0).abs() < 1e-5 && first.tokens == 8, "{first:?}");
    assert!(report.excess(&report.results[1]).abs() < 1e-9);
    let page = report.page("a model");
    assert!(page.contains("KL joint") && page.contains("<svg"), "{page}");

    let error = run(&[1, 2, 3], 2).unwrap_err().to_string();
    assert_eq!(error, "text: found 3 tokens, expected at least 14 (2 windows of 7)");
    assert!(run(&[1, 2, 3], 7).unwrap_err().to_string().contains("expected more than 8"));
}
