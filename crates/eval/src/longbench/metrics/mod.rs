//! The metrics of LongBench, each from 0 to 1, with the steps of its published scorer: what looks odd here is
//! what published numbers were computed with.

mod answers;
mod numbers;
mod rouge;
mod similarity;

use std::sync::OnceLock;

use jieba_rs::Jieba;
use serde::Deserialize;

/// How an answer is compared with the expected one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// F1 of words, without case, punctuation and articles.
    F1,
    /// F1 of Chinese words.
    F1Chinese,
    /// ROUGE-L.
    RougeL,
    /// ROUGE-L of Chinese words.
    RougeLChinese,
    /// Whether the class is named, divided by the classes named.
    Classification,
    /// Share of the numbers named that are the paragraph's.
    Retrieval,
    /// The same, of Chinese answers.
    RetrievalChinese,
    /// Share of the numbers named that are the count.
    Count,
    /// Similarity of the first line of code.
    Code,
}

impl Metric {
    /// Scores an answer against an expected one; `classes` are those of the data set, where it has any.
    pub fn score(self, answer: &str, expected: &str, classes: &[String]) -> f64 {
        match self {
            Self::F1 => answers::f1(answer, expected),
            Self::F1Chinese => answers::f1_chinese(answer, expected),
            Self::RougeL => rouge::rouge_l(answer, expected),
            Self::RougeLChinese => rouge::rouge_l(&segmented(answer), &segmented(expected)),
            Self::Classification => answers::classification(answer, expected, classes),
            Self::Retrieval => numbers::retrieval(answer, expected, "Paragraph "),
            Self::RetrievalChinese => numbers::retrieval(answer, expected, "段落"),
            Self::Count => numbers::share(answer, expected),
            Self::Code => similarity::code(answer, expected),
        }
    }
}

/// The words of Chinese text. The published scorer's segmenter cuts at hyphens as well, ours keeps `GPT-4`.
fn words(text: &str) -> Vec<&str> {
    static DICTIONARY: OnceLock<Jieba> = OnceLock::new();
    let tokens = DICTIONARY.get_or_init(Jieba::new).cut(text, true);
    let parts = tokens.into_iter().flat_map(|token| {
        let word = token.word;
        let parts = word.split_inclusive('-').flat_map(|part| match part.strip_suffix('-') {
            Some(before) => [before, "-"],
            None => [part, ""],
        });
        parts.filter(|part| !part.is_empty())
    });
    parts.collect()
}

fn segmented(text: &str) -> String {
    words(text).join(" ")
}

#[cfg(test)]
mod tests;
