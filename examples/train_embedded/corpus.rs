//! The books as token ids, and the words that names and answers are drawn from.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;

use long_context_weights::Tokenizer;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::error::Error;

/// Words to draw from, and what counts as one.
const MOST_WORDS: usize = 4000;
const WORD_LENGTHS: Range<usize> = 4..10;
/// One word in so many is kept for the evaluation, and so is one number in so many.
pub const HELD_OUT_SHARE: usize = 11;
/// With fewer, those kept for the evaluation would not do for one prompt.
const LEAST_WORDS: usize = 64 * HELD_OUT_SHARE;

/// Text as token ids.
pub struct Book {
    ids: Vec<u32>,
    /// Whether a sentence begins with the token, after a space.
    begins: Vec<bool>,
}

/// Consecutive tokens of a book.
#[derive(Debug, Clone)]
pub struct Passage {
    pub ids: Vec<u32>,
    /// Whether a sentence begins with the token, after a space.
    pub begins: Vec<bool>,
}

/// What sequences are made of.
pub struct Corpus {
    pub tokenizer: Tokenizer,
    pub book: Book,
    /// Frequent words of the book, for training and for the evaluation.
    words: [Vec<String>; 2],
    pub special: Special,
    /// Ids that occur in the book.
    pub ordinary: Vec<u32>,
    /// Ids of the digits.
    pub digits: [u32; 10],
}

/// Tokens that text does not make.
#[derive(Debug, Clone, Copy)]
pub struct Special {
    pub bos: u32,
    pub eos: u32,
    pub message_start: u32,
    pub message_end: u32,
}

impl Corpus {
    /// The text of `file` under the tokenizer of `folder`.
    pub fn read(folder: &Path, file: &Path) -> Result<Self, Error> {
        let tokenizer = Tokenizer::from_dir(folder)?;
        Self::new(tokenizer, &Error::read(file)?, &folder.display().to_string())
    }

    fn new(tokenizer: Tokenizer, text: &str, name: &str) -> Result<Self, Error> {
        let refuse = |found: String| Error::Content { file: name.to_string(), found };
        let special = |token: &str| {
            let id = tokenizer.special(token);
            id.ok_or_else(|| refuse(format!("tokenizer: found no {token}, expected it as a control symbol")))
        };
        let special = Special {
            bos: special("<s>")?,
            eos: special("</s>")?,
            message_start: special("<|im_start|>")?,
            message_end: special("<|im_end|>")?,
        };
        let digit = |digit: u32| match tokenizer.encode(&format!("a{digit}"))[..] {
            [_, id] if tokenizer.piece(id) == digit.to_string() => Ok(id),
            _ => Err(refuse(format!(
                "tokenizer: found {digit} joined to something, expected digits one by one"
            ))),
        };
        let digits = (0..10).map(digit).collect::<Result<Vec<_>, _>>()?;
        let digits: [u32; 10] = std::array::from_fn(|at| digits[at]);
        let book = Book::new(&tokenizer, text);
        let words = frequent_words(text);
        if words.len() < LEAST_WORDS {
            return Err(refuse(format!(
                "text: found {} words, expected at least {LEAST_WORDS}",
                words.len()
            )));
        }
        let (kept, rest): (Vec<_>, Vec<_>) =
            words.into_iter().enumerate().partition(|(at, _)| at.is_multiple_of(HELD_OUT_SHARE));
        let words = [rest, kept].map(|words| words.into_iter().map(|(_, word)| word).collect());
        let ordinary: BTreeSet<u32> = book.ids.iter().copied().collect();
        Ok(Self { ordinary: ordinary.into_iter().collect(), tokenizer, book, words, special, digits })
    }

    /// The words kept for the evaluation, or the others.
    pub fn words(&self, held_out: bool) -> &[String] {
        &self.words[usize::from(held_out)]
    }

    /// Ids of text that follows a space or the beginning.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text)
    }

    /// Ids of text that begins with a line break and follows other text: without the space that SentencePiece
    /// puts before a text.
    pub fn encode_after(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text).split_off(1)
    }
}

impl Book {
    pub fn new(tokenizer: &Tokenizer, text: &str) -> Self {
        // A paragraph at a time: the tokenizer's time grows faster than a text's length.
        let mut ids = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            ids.extend_from_slice(&tokenizer.encode(&format!("\n{line}"))[1..]);
        }
        let mut pieces: HashMap<u32, (bool, bool)> = HashMap::new();
        let mut ends_and_begins = |id: u32| {
            *pieces.entry(id).or_insert_with(|| {
                let piece = tokenizer.piece(id);
                (piece.ends_with(['.', '!', '?', '"']), piece.starts_with([' ', '\u{2581}']))
            })
        };
        let begins = (0..ids.len())
            .map(|at| at > 0 && ends_and_begins(ids[at - 1]).0 && ends_and_begins(ids[at]).1)
            .collect();
        Self { ids, begins }
    }

    /// Consecutive tokens from anywhere; a book that is too short begins anew.
    pub fn passage(&self, length: usize, random: &mut StdRng) -> Passage {
        let start = random.random_range(0..self.ids.len());
        let at = |offset: usize| (start + offset) % self.ids.len();
        Passage {
            ids: (0..length).map(|offset| self.ids[at(offset)]).collect(),
            begins: (0..length).map(|offset| self.begins[at(offset)]).collect(),
        }
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}

/// Words in small letters, the most frequent first.
fn frequent_words(text: &str) -> Vec<String> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for word in text.split(|c: char| !c.is_ascii_alphabetic()) {
        if WORD_LENGTHS.contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_lowercase()) {
            *counts.entry(word).or_default() += 1;
        }
    }
    let mut words: Vec<(&str, usize)> = counts.into_iter().collect();
    words.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    words.into_iter().take(MOST_WORDS).map(|(word, _)| word.to_string()).collect()
}
