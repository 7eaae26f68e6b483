//! Answers to questions, and names of classes.

use std::collections::HashMap;
use std::hash::Hash;

const CHINESE_PUNCTUATION: &str = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.";

/// F1 of words: lower case, without punctuation and articles.
pub(super) fn f1(answer: &str, expected: &str) -> f64 {
    let (answer, expected) = (plain_words(answer), plain_words(expected));
    f1_of(&answer, &expected)
}

/// F1 of Chinese words: lower case, without punctuation and space.
pub(super) fn f1_chinese(answer: &str, expected: &str) -> f64 {
    let normal = |text: &str| -> Vec<String> {
        let bare = |word: &str| -> String {
            let lower = word.to_lowercase();
            lower.chars().filter(|&c| !is_punctuation(c) && !c.is_whitespace()).collect()
        };
        super::words(text).into_iter().map(bare).filter(|word: &String| !word.is_empty()).collect()
    };
    f1_of(&normal(answer), &normal(expected))
}

fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || CHINESE_PUNCTUATION.contains(c)
}

fn plain_words(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut kept = String::with_capacity(text.len());
    // An article counts as one between any two characters that are no part of a word.
    let mut word = String::new();
    for c in text.chars().chain([' ']) {
        if c.is_alphanumeric() || c == '_' {
            word.push(c);
            continue;
        }
        if !matches!(word.as_str(), "a" | "an" | "the") {
            kept.push_str(&word);
        } else {
            kept.push(' ');
        }
        word.clear();
        kept.push(c);
    }
    kept.split_whitespace().map(str::to_string).collect()
}

fn f1_of<T: Eq + Hash>(answer: &[T], expected: &[T]) -> f64 {
    let mut left: HashMap<&T, usize> = HashMap::new();
    for word in expected {
        *left.entry(word).or_default() += 1;
    }
    let mut common = 0;
    for word in answer {
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    let (precision, recall) = (common as f64 / answer.len() as f64, common as f64 / expected.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// One over the number of classes that the answer names, if the right one is among them. A class whose name
/// is a part of the right one's does not count.
pub(super) fn classification(answer: &str, expected: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&str> =
        classes.iter().map(String::as_str).filter(|class| answer.contains(class)).collect();
    // The published scorer removes from the list while it walks it, which passes over the class after a
    // removed one.
    let mut at = 0;
    while at < named.len() {
        let class = named[at];
        if expected.contains(class) && class != expected {
            let first = named.iter().position(|other| *other == class).unwrap_or(at);
            named.remove(first);
        }
        at += 1;
    }
    if named.contains(&expected) { 1.0 / named.len() as f64 } else { 0.0 }
}
