//! Long prompts with keys hidden in them.

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};

use super::Variant;
use crate::{Error, Prompter, Result};

/// Keys in a prompt that hides several.
const KEYS: usize = 3;
/// A sentence longer than this is cut at its next space.
const LONGEST_SENTENCE: usize = 400;
const PLACES: [&str; 16] = [
    "river",
    "garden",
    "tower",
    "bridge",
    "harbour",
    "forest",
    "market",
    "castle",
    "island",
    "valley",
    "mill",
    "library",
    "station",
    "orchard",
    "lighthouse",
    "quarry",
];

/// A text to hide keys in, sentence by sentence.
pub struct Haystack<'a> {
    sentences: Vec<(&'a str, usize)>,
}

/// A prompt and what its answer should hold.
#[derive(Debug, Clone)]
pub struct NeedlePrompt {
    /// The prompt, up to where the first key should come.
    pub ids: Vec<u32>,
    /// The keys asked for.
    pub keys: Vec<String>,
    /// What leads from each key to the next.
    pub leads: Vec<Vec<u32>>,
}

/// What tells one prompt from another.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// How many keys are hidden and asked for.
    pub variant: Variant,
    /// Tokens of the prompt, at most.
    pub length: usize,
    /// Depth of the key (the first of several) in percent of the text.
    pub depth: usize,
    /// Seed of the keys, of the text's beginning and of the other keys' depths.
    pub seed: u64,
}

impl<'a> Haystack<'a> {
    /// Cuts a text into sentences and counts their tokens.
    ///
    /// # Errors
    ///
    /// A text without any.
    pub fn new(text: &'a str, prompter: &Prompter<'_>) -> Result<Self> {
        let counted = |sentence: &'a str| (sentence, prompter.tokenizer().encode(sentence).len());
        let sentences: Vec<_> =
            sentences(text).into_iter().map(counted).filter(|(_, tokens)| *tokens > 0).collect();
        if sentences.is_empty() {
            return Err(Error::invalid("text", "nothing", "sentences to hide keys in"));
        }
        Ok(Self { sentences })
    }

    /// A prompt of at most `place.length` tokens, short of it by a sentence at most. The text begins at a
    /// sentence that the seed draws, and begins again where it ends.
    ///
    /// # Errors
    ///
    /// A length without room for a sentence beside keys and question, or no chat format.
    pub fn prompt(&self, place: Place, prompter: &Prompter<'_>) -> Result<NeedlePrompt> {
        let mut random = StdRng::seed_from_u64(place.seed);
        let start = random.random_range(0..self.sentences.len());
        let needles = Needles::draw(place.variant, &mut random);
        let mut depths = vec![place.depth as f64 / 100.0];
        depths.extend((1..needles.hidden.len()).map(|_| random.random_range(0.0..1.0)));

        let ask = |text: &str| prompter.ask(&format!("{text}\n\n{}", needles.question), &needles.begun[0]);
        let bare = ask(&needles.hidden.concat())?.len();
        let mut budget = place.length.saturating_sub(bare);
        loop {
            let text = self.text(start, budget);
            if text.is_empty() {
                let subject = format!("prompt of {} tokens", place.length);
                let expected = format!("more than the {bare} of question and keys");
                return Err(Error::invalid(subject, "no room for text", expected));
            }
            let ids = ask(&hide(&text, &needles.hidden, &depths))?;
            if ids.len() <= place.length {
                let lead = |begun: &String| prompter.tokenizer().encode(&format!(".\n{begun}"));
                let leads = needles.begun[1..].iter().map(lead).collect();
                return Ok(NeedlePrompt { ids, keys: needles.asked, leads });
            }
            budget = budget.saturating_sub(ids.len() - place.length);
        }
    }

    /// Sentences from `start` on, as many as fit into `budget` tokens; those before the first that fits are
    /// passed over.
    fn text(&self, start: usize, budget: usize) -> Vec<&'a str> {
        let count = self.sentences.len();
        let fits = |at: &usize| self.sentences[at % count].1 <= budget;
        let Some(start) = (start..start + count).find(fits) else { return Vec::new() };
        let mut left = budget;
        let mut taken = Vec::new();
        for (sentence, tokens) in self.sentences.iter().cycle().skip(start) {
            let Some(rest) = left.checked_sub(*tokens) else { break };
            left = rest;
            taken.push(*sentence);
        }
        taken
    }
}

/// The sentences of a text with the spaces after them; put together they are the text.
fn sentences(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let (mut start, mut ended) = (0, false);
    let mut before = ' ';
    for (at, character) in text.char_indices() {
        let long = at - start > LONGEST_SENTENCE && before.is_whitespace();
        let closed = matches!(before, '。' | '！' | '？') || (ended && before.is_whitespace());
        if at > start && (closed || long) && !character.is_whitespace() {
            found.push(&text[start..at]);
            (start, ended) = (at, false);
        }
        match character {
            '.' | '!' | '?' => ended = true,
            '"' | '\'' | ')' | '_' | '”' | '’' => {}
            space if space.is_whitespace() => {}
            _ => ended = false,
        }
        before = character;
    }
    if start < text.len() {
        found.push(&text[start..]);
    }
    found
}

/// Puts each needle, as a line of its own, between the two sentences nearest to its depth.
fn hide(sentences: &[&str], needles: &[String], depths: &[f64]) -> String {
    let total: usize = sentences.iter().map(|sentence| sentence.len()).sum();
    let mut borders = vec![0];
    for sentence in sentences {
        borders.push(borders[borders.len() - 1] + sentence.len());
    }
    let distance = |border: usize, depth: f64| (borders[border] as f64 - depth * total as f64).abs();
    let mut at_border = vec![String::new(); borders.len()];
    for (needle, &depth) in needles.iter().zip(depths) {
        let nearest = (0..borders.len()).min_by(|&a, &b| distance(a, depth).total_cmp(&distance(b, depth)));
        at_border[nearest.unwrap_or(0)] += &format!("\n{needle}\n");
    }
    let last = at_border.pop().unwrap_or_default();
    let pairs = at_border.iter().zip(sentences).flat_map(|(needles, sentence)| [needles.as_str(), sentence]);
    pairs.collect::<String>() + &last
}

/// What is hidden, what is asked, and how the answer is begun for the model, key by key.
struct Needles {
    hidden: Vec<String>,
    asked: Vec<String>,
    question: String,
    begun: Vec<String>,
}

impl Needles {
    fn draw(variant: Variant, random: &mut StdRng) -> Self {
        // No two keys begin alike.
        let mut first_digits: Vec<u32> = (1..10).collect();
        first_digits.shuffle(random);
        let mut key = |first: u32| format!("{first}{:04}", random.random_range(0..10_000));
        let keys: Vec<String> = first_digits.into_iter().take(KEYS).map(&mut key).collect();
        if variant == Variant::Single {
            let key = keys[0].clone();
            return Self {
                hidden: vec![format!("The pass key is {key}. Remember it: {key} is the pass key.")],
                asked: vec![key],
                question: "What is the pass key?".to_string(),
                begun: vec!["The pass key is".to_string()],
            };
        }
        let places: Vec<&str> = PLACES.sample(random, KEYS).copied().collect();
        let sentence = |(key, place): (&String, &&str)| {
            format!(
                "The pass key of the {place} is {key}. Remember it: {key} is the pass key of the {place}."
            )
        };
        let hidden = keys.iter().zip(&places).map(sentence).collect();
        let begun = |place: &&str| format!("The pass key of the {place} is");
        if variant == Variant::Choice {
            return Self {
                hidden,
                asked: vec![keys[0].clone()],
                question: format!("What is the pass key of the {}?", places[0]),
                begun: vec![begun(&places[0])],
            };
        }
        let list = format!("the {}, the {} and the {}", places[0], places[1], places[2]);
        Self {
            hidden,
            asked: keys,
            question: format!("What are the pass keys of {list}?"),
            begun: places.iter().map(begun).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_add_up_to_their_text() {
        let text = "One here. \"Two!\"  Three\nlines? 四。五 six.seven\n\neight";
        let found = sentences(text);
        assert_eq!(found, ["One here. ", "\"Two!\"  ", "Three\nlines? ", "四。", "五 six.seven\n\neight"]);
        let endless = "word ".repeat(300);
        let found = sentences(&endless);
        assert_eq!(found.concat(), endless);
        assert!(found.len() > 2 && found.iter().all(|sentence| sentence.len() < LONGEST_SENTENCE + 10));
    }

    #[test]
    fn needles_stand_at_their_depth() {
        let text = ["aaaa ", "bbbb ", "cccc ", "dddd "];
        let hidden = |depth: f64| hide(&text, &["N".to_string()], &[depth]);
        assert_eq!(hidden(0.0), "\nN\naaaa bbbb cccc dddd ");
        assert_eq!(hidden(0.5), "aaaa bbbb \nN\ncccc dddd ");
        assert_eq!(hidden(0.55), hidden(0.5));
        assert_eq!(hidden(1.0), "aaaa bbbb cccc dddd \nN\n");
        let two = hide(&text, &["N".to_string(), "M".to_string()], &[0.75, 0.25]);
        assert_eq!(two, "aaaa \nM\nbbbb cccc \nN\ndddd ");
    }

    #[test]
    fn a_sentence_that_is_too_long_is_passed_over() {
        let haystack = Haystack { sentences: vec![("long", 90), ("a", 5), ("b", 6)] };
        assert_eq!(haystack.text(0, 20), ["a", "b"]);
        assert_eq!(haystack.text(2, 12), ["b"]);
        assert_eq!(haystack.text(1, 101), ["a", "b", "long"]);
        assert!(haystack.text(1, 4).is_empty());
    }

    #[test]
    fn keys_begin_with_different_digits() {
        for seed in 0..50 {
            let needles = Needles::draw(Variant::Several, &mut StdRng::seed_from_u64(seed));
            let firsts: std::collections::BTreeSet<char> =
                needles.asked.iter().filter_map(|key| key.chars().next()).collect();
            assert_eq!((firsts.len(), needles.hidden.len()), (KEYS, KEYS));
            assert!(needles.asked.iter().all(|key| key.len() == 5));
        }
    }
}
