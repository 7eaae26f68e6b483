//! A long text with a pass key hidden in it, and the question about it.

use long_context_weights::{Chat, Message, Role, Tokenizer};

use crate::error::Error;

/// Chapters 1 to 19 of a novel.
const TEXT: &str = include_str!("../../../../../examples/pride-and-prejudice.txt");
const QUESTION: &str = "What is the pass key?";
/// Fewer tokens have no room for a text around the key.
const LEAST_TOKENS: usize = 256;

/// A prompt and what its answer must hold.
pub struct Prompt {
    pub ids: Vec<u32>,
    pub key: String,
}

impl Prompt {
    /// The longest prompt of up to `tokens` tokens: paragraphs of the novel from its beginning, the key between
    /// the two nearest to `depth`. A model that knows no chat is given the beginning of the answer.
    pub fn new(
        chat: &Chat<'_>,
        tokenizer: &Tokenizer,
        tokens: usize,
        depth: f64,
        seed: u64,
    ) -> Result<Self, Error> {
        let key = key(seed);
        let paragraphs = paragraphs(TEXT);
        let write = |count: usize| {
            let message = message(&paragraphs[..count], depth, &key);
            if chat.has_format() {
                Ok(chat.encode(&[Message::new(Role::User, message)])?)
            } else {
                let begun = tokenizer.encode(&format!("{message} The pass key is"));
                Ok::<_, Error>(chat.prefix().into_iter().chain(begun).collect::<Vec<u32>>())
            }
        };
        let lengths: Vec<usize> =
            paragraphs.iter().map(|paragraph| tokenizer.encode(paragraph).len() + 1).collect();
        let all: usize = lengths.iter().sum();
        if tokens < LEAST_TOKENS || tokens > all {
            return Err(Error::DemoTokens { found: tokens, least: LEAST_TOKENS, most: all });
        }
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        let mut count = ends.take_while(|&end| end <= tokens).count();
        let mut ids = write(count)?;
        // The question takes its room, too.
        while ids.len() > tokens && count > 0 {
            count -= 1;
            ids = write(count)?;
        }
        Ok(Self { ids, key })
    }
}

/// Five digits that follow from the seed, the first of them not zero.
fn key(seed: u64) -> String {
    let mixed = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    (10_000 + mixed % 90_000).to_string()
}

/// Paragraphs without line breaks and marks of emphasis.
fn paragraphs(text: &str) -> Vec<String> {
    let joined = text
        .split("\n\n")
        .map(|lines| lines.split_whitespace().collect::<Vec<_>>().join(" ").replace('_', ""));
    joined.filter(|paragraph| !paragraph.is_empty()).collect()
}

fn message(paragraphs: &[String], depth: f64, key: &str) -> String {
    let all: usize = paragraphs.iter().map(String::len).sum();
    let mut before = 0;
    let place = paragraphs
        .iter()
        .position(|paragraph| {
            let middle = before as f64 + paragraph.len() as f64 / 2.0;
            before += paragraph.len();
            middle >= depth * all as f64
        })
        .unwrap_or(paragraphs.len());
    let needle = format!("The pass key is {key}. Remember it: {key} is the pass key.");
    let lines: Vec<&str> = paragraphs[..place]
        .iter()
        .map(String::as_str)
        .chain([needle.as_str()])
        .chain(paragraphs[place..].iter().map(String::as_str))
        .collect();
    format!("{}\n\n{QUESTION}", lines.join("\n"))
}
