//! ROUGE-L of summaries, over distinct words: sentences end at full stops, and what counts of a pair of
//! sentences is the set of words in their longest common subsequence.

use std::collections::HashSet;

/// F1 of the distinct words that any sentence of the answer has in order with a sentence of the expected text.
pub(super) fn rouge_l(answer: &str, expected: &str) -> f64 {
    let (answer, expected) = (sentences(answer), sentences(expected));
    if answer.is_empty() || expected.is_empty() {
        return 0.0;
    }
    let mut common: HashSet<&str> = HashSet::new();
    for expected in &expected {
        for answer in &answer {
            common.extend(longest_common(expected, answer));
        }
    }
    let distinct = |sentences: &[Vec<&str>]| sentences.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let common = common.len() as f64;
    let (precision, recall) = (common / distinct(&answer), common / distinct(&expected));
    2.0 * precision * recall / (precision + recall + 1e-8)
}

/// The words of each sentence. One of white space alone is one empty word.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    text.split('.')
        .filter(|sentence| !sentence.is_empty())
        .map(|sentence| {
            let words: Vec<&str> = sentence.split_whitespace().collect();
            if words.is_empty() { vec![""] } else { words }
        })
        .collect()
}

/// The words of a longest common subsequence.
fn longest_common<'a>(a: &[&'a str], b: &[&str]) -> Vec<&'a str> {
    let width = b.len() + 1;
    let mut lengths = vec![0u32; (a.len() + 1) * width];
    for (i, word) in a.iter().enumerate() {
        for (j, other) in b.iter().enumerate() {
            lengths[(i + 1) * width + j + 1] = if word == other {
                lengths[i * width + j] + 1
            } else {
                lengths[i * width + j + 1].max(lengths[(i + 1) * width + j])
            };
        }
    }
    let (mut i, mut j) = (a.len(), b.len());
    let mut found = Vec::new();
    while i > 0 && j > 0 {
        if a[i - 1] == b[j - 1] {
            found.push(a[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if lengths[(i - 1) * width + j] > lengths[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    found
}
