//! Statements to hide in a text, and the questions about them.

use std::ops::RangeInclusive;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::index::sample;

use crate::corpus::{Corpus, HELD_OUT_SHARE};

/// What a sequence teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// A book, token after token.
    Text,
    /// Random tokens and their repetition.
    Copy,
    /// A book in which passages occur again.
    Passage,
    /// One number in a text.
    Key,
    /// One of several numbers, told apart by whom they belong to.
    Keys,
    /// A word or two in a text.
    Word,
    /// A variable that stands for another one.
    Variable,
}

impl Task {
    pub const ALL: [Self; 7] =
        [Self::Text, Self::Copy, Self::Passage, Self::Key, Self::Keys, Self::Word, Self::Variable];
    /// Those with questions.
    pub const ASKED: [Self; 4] = [Self::Key, Self::Keys, Self::Word, Self::Variable];

    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Copy => "copy",
            Self::Passage => "passage",
            Self::Key => "one key",
            Self::Keys => "one of several keys",
            Self::Word => "a word",
            Self::Variable => "a variable",
        }
    }
}

/// A question and its answer, which is words that follow from the question and words that must be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub text: String,
    /// Lead and what is found, sentence by sentence: `("The pass key is", "71432")`.
    pub answer: Vec<(String, String)>,
}

/// Statements and questions about them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub statements: Vec<String>,
    pub questions: Vec<Question>,
}

const NUMBERS: [&str; 8] = [
    "pass key",
    "secret number",
    "magic number",
    "access code",
    "lucky number",
    "door code",
    "number of the safe",
    "account number",
];
const WORDS: [&str; 4] = ["secret word", "watchword", "magic word", "name of the ship"];
const DIGITS: RangeInclusive<u32> = 4..=8;
const MOST_STATEMENTS: usize = 32;

/// Draws facts.
pub struct Source<'a> {
    pub corpus: &'a Corpus,
    /// Whether numbers and words are those that training never sees.
    pub held_out: bool,
}

impl Source<'_> {
    /// Facts of a task; at most `most` statements that are asked for.
    ///
    /// # Panics
    ///
    /// For a task without questions.
    pub fn draw(&self, task: Task, most: usize, random: &mut StdRng) -> Facts {
        match task {
            Task::Key => self.single(one_of(&NUMBERS, random), self.number(random), random),
            Task::Word => self.single(one_of(&WORDS, random), self.words(random), random),
            Task::Keys => self.several(most, random),
            Task::Variable => self.variables(most, random),
            Task::Text | Task::Copy | Task::Passage => panic!("{} asks nothing", task.name()),
        }
    }

    fn single(&self, noun: &str, value: String, random: &mut StdRng) -> Facts {
        let statement = match random.random_range(0..4) {
            0 => format!("The {noun} is {value}."),
            1 => format!("Remember this: the {noun} is {value}."),
            _ => format!("The {noun} is {value}. Remember it: {value} is the {noun}."),
        };
        let answer = vec![(format!("The {noun} is"), value)];
        let question = Question { text: format!("What is the {noun}?"), answer };
        Facts { statements: vec![statement], questions: vec![question] }
    }

    fn several(&self, most: usize, random: &mut StdRng) -> Facts {
        let noun = one_of(&NUMBERS, random);
        let count = random.random_range(2..=most.clamp(2, MOST_STATEMENTS));
        let owners = self.different_words(count, random);
        let mut facts = Facts { statements: Vec::new(), questions: Vec::new() };
        for owner in owners {
            let value = self.number(random);
            facts.statements.push(format!("The {noun} of {owner} is {value}."));
            let answer = vec![(format!("The {noun} of {owner} is"), value)];
            facts.questions.push(Question { text: format!("What is the {noun} of {owner}?"), answer });
        }
        facts
    }

    /// Pairs of a variable with a value and another one that stands for it.
    fn variables(&self, most: usize, random: &mut StdRng) -> Facts {
        let pairs = random.random_range(1..=(most / 2).clamp(1, MOST_STATEMENTS / 2));
        let names = self.different_words(2 * pairs, random);
        let mut facts = Facts { statements: Vec::new(), questions: Vec::new() };
        for pair in names.chunks_exact(2) {
            let [first, second] = [&pair[0], &pair[1]];
            let value = self.number(random);
            facts.statements.push(format!("The variable {first} is {value}."));
            facts.statements.push(format!("The variable {second} is {first}."));
            let answer = vec![
                (format!("The variable {second} is"), first.clone()),
                (format!("The variable {first} is"), value),
            ];
            facts.questions.push(Question { text: format!("What is the variable {second}?"), answer });
        }
        facts
    }

    fn number(&self, random: &mut StdRng) -> String {
        let digits = random.random_range(DIGITS);
        let share = HELD_OUT_SHARE as u32;
        loop {
            let number = random.random_range(10u32.pow(digits - 1)..10u32.pow(digits));
            if number.is_multiple_of(share) == self.held_out {
                return number.to_string();
            }
        }
    }

    fn words(&self, random: &mut StdRng) -> String {
        self.different_words(random.random_range(1..=2), random).join(" ")
    }

    fn different_words(&self, count: usize, random: &mut StdRng) -> Vec<String> {
        let words = self.corpus.words(self.held_out);
        sample(random, words.len(), count.min(words.len())).iter().map(|at| words[at].clone()).collect()
    }
}

fn one_of(names: &'static [&'static str], random: &mut StdRng) -> &'static str {
    names[random.random_range(0..names.len())]
}
