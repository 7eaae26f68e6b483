//! From a task to a sequence of tokens of an exact length.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::seq::index::sample;

use crate::corpus::{Book, Corpus, Passage};
use crate::tasks::{Facts, Question, Source, Task};

/// What it means to predict a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It is given: nothing to learn.
    Given,
    /// A book goes on.
    Text,
    /// It follows from what stood in the sequence before.
    Copied,
    /// It was asked for.
    Asked,
}

/// Tokens, and for each what it means to predict it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    pub task: Task,
    pub ids: Vec<u32>,
    pub roles: Vec<Role>,
}

/// Tokens of a statement and two turns of a dialogue, roughly.
const TOKENS_PER_STATEMENT: usize = 96;
/// A statement goes to the next beginning of a sentence, if it is this near.
const NEAR: usize = 64;
/// The first tokens of a repetition do not tell that it is one.
const UNFORESEEN: usize = 3;

impl Sequence {
    fn new(task: Task) -> Self {
        Self { task, ids: Vec::new(), roles: Vec::new() }
    }

    fn push(&mut self, ids: &[u32], role: Role) {
        self.ids.extend_from_slice(ids);
        self.roles.resize(self.ids.len(), role);
    }

    /// A repetition of tokens that stood before.
    fn repeat(&mut self, ids: &[u32]) {
        let (unforeseen, rest) = ids.split_at(UNFORESEEN.min(ids.len()));
        self.push(unforeseen, Role::Given);
        self.push(rest, Role::Copied);
    }

    fn truncated(mut self, length: usize) -> Self {
        self.ids.truncate(length);
        self.roles.truncate(length);
        self
    }
}

/// Makes sequences.
#[derive(Clone, Copy)]
pub struct Writer<'a> {
    pub corpus: &'a Corpus,
    /// The books that statements are hidden in.
    pub book: &'a Book,
    /// Whether numbers and words are those that training never sees.
    pub held_out: bool,
}

impl Writer<'_> {
    /// `length` tokens of a task, statements anywhere, as many questions as there is room for.
    pub fn write(&self, task: Task, length: usize, random: &mut StdRng) -> Sequence {
        match task {
            Task::Text => self.text(length, random),
            Task::Copy => self.copy(length, random),
            Task::Passage => self.passages(length, random),
            _ => self.asked(task, length, None, random),
        }
    }

    /// `length` tokens that end with one question and its answer; what it asks for was stated at `depth`: 0 is
    /// the beginning of the text, 1 its end.
    pub fn write_at(&self, task: Task, length: usize, depth: f64, random: &mut StdRng) -> Sequence {
        self.asked(task, length, Some(depth), random)
    }

    fn text(&self, length: usize, random: &mut StdRng) -> Sequence {
        let mut sequence = Sequence::new(Task::Text);
        sequence.push(&[self.corpus.special.bos], Role::Given);
        sequence.push(&self.book.passage(length - 1, random).ids, Role::Text);
        sequence
    }

    /// Short runs of tokens, of the book or of a small or large alphabet, that occur twice or more, at once or
    /// after some text.
    fn copy(&self, length: usize, random: &mut StdRng) -> Sequence {
        let mut sequence = Sequence::new(Task::Copy);
        let ordinary = &self.corpus.ordinary;
        let few: Vec<u32> =
            sample(random, ordinary.len(), ordinary.len().min(32)).iter().map(|at| ordinary[at]).collect();
        while sequence.ids.len() < length {
            let run = random.random_range(8..=(length / 4).clamp(8, 96));
            let drawn = |alphabet: &[u32], random: &mut StdRng| -> Vec<u32> {
                (0..run).map(|_| alphabet[random.random_range(0..alphabet.len())]).collect()
            };
            let run = match random.random_range(0..4) {
                0 => drawn(&self.corpus.digits, random),
                1 => drawn(&few, random),
                2 => drawn(ordinary, random),
                _ => self.book.passage(run, random).ids,
            };
            sequence.push(&run, Role::Given);
            for _ in 0..random.random_range(1..=2) {
                if random.random_bool(0.5) {
                    let between = random.random_range(1..=length / 4);
                    sequence.push(&self.book.passage(between, random).ids, Role::Text);
                }
                sequence.repeat(&run);
            }
        }
        sequence.truncated(length)
    }

    /// A book with passages that occur again later.
    fn passages(&self, length: usize, random: &mut StdRng) -> Sequence {
        let mut sequence = self.text(length, random);
        sequence.task = Task::Passage;
        let run = random.random_range(16..=32);
        let slot = 4 * run;
        for place in (slot..length.saturating_sub(run)).step_by(slot) {
            let from = random.random_range(1..=place - run);
            let passage = sequence.ids[from..from + run].to_vec();
            let mut repeated = Sequence::new(Task::Passage);
            repeated.repeat(&passage);
            sequence.ids[place..place + run].copy_from_slice(&repeated.ids);
            sequence.roles[place..place + run].copy_from_slice(&repeated.roles);
        }
        sequence
    }

    fn asked(&self, task: Task, length: usize, depth: Option<f64>, random: &mut StdRng) -> Sequence {
        let source = Source { corpus: self.corpus, held_out: self.held_out };
        let mut most = length / TOKENS_PER_STATEMENT;
        loop {
            let facts = source.draw(task, most, random);
            let chat = random.random_bool(0.5);
            if let Some(sequence) = self.lay_out(task, &facts, length, chat, depth, random) {
                return sequence;
            }
            if most <= 1 {
                // Too short for what the tokenizer makes of these words.
                return self.text(length, random);
            }
            most /= 2;
        }
    }

    /// Statements in a text and the dialogue about them at its end; `None` where they do not fit.
    fn lay_out(
        &self,
        task: Task,
        facts: &Facts,
        length: usize,
        chat: bool,
        depth: Option<f64>,
        random: &mut StdRng,
    ) -> Option<Sequence> {
        let mut questions: Vec<&Question> = facts.questions.iter().collect();
        match depth {
            Some(_) => questions.truncate(1),
            None => questions.shuffle(random),
        }
        let dialogue = self.dialogue(&questions, chat);
        let mut sequence = Sequence::new(task);
        sequence.push(&[self.corpus.special.bos], Role::Given);
        if chat {
            sequence.push(&[self.corpus.special.message_start], Role::Given);
            sequence.push(&self.corpus.encode("user\n"), Role::Given);
        }
        let statements: Vec<Vec<u32>> = facts
            .statements
            .iter()
            .map(|statement| {
                if random.random_bool(0.25) {
                    self.corpus.encode_after(&format!("\n{statement}\n"))
                } else {
                    self.corpus.encode(statement)
                }
            })
            .collect();
        let stated: usize = statements.iter().map(Vec::len).sum();
        let room = length.checked_sub(sequence.ids.len() + stated + dialogue.ids.len())?;
        let filler = self.book.passage(room, random);
        let mut places: Vec<(usize, &Vec<u32>)> = statements
            .iter()
            .enumerate()
            .map(|(index, statement)| {
                let depth = depth.filter(|_| index == 0).unwrap_or_else(|| random.random_range(0.0..=1.0));
                (place(&filler, (depth * room as f64) as usize), statement)
            })
            .collect();
        // Statements that meet in one place stand in any order.
        places.shuffle(random);
        places.sort_by_key(|(place, _)| *place);
        let mut from = 0;
        for (to, statement) in places {
            sequence.push(&filler.ids[from..to], Role::Text);
            sequence.push(statement, Role::Given);
            from = to;
        }
        sequence.push(&filler.ids[from..], Role::Text);
        sequence.push(&dialogue.ids, Role::Given);
        let start = sequence.ids.len() - dialogue.roles.len();
        sequence.roles[start..].copy_from_slice(&dialogue.roles);
        Some(sequence)
    }

    /// Questions with their answers: as chat messages, of which the first is open already, or in the text itself.
    fn dialogue(&self, questions: &[&Question], chat: bool) -> Sequence {
        let (corpus, special) = (self.corpus, self.corpus.special);
        let mut sequence = Sequence::new(Task::Key);
        for (index, question) in questions.iter().enumerate() {
            let begin = match (index, chat) {
                (0, _) => "\n\n",
                (_, false) => "\n",
                (_, true) => {
                    sequence.push(&corpus.encode("\n"), Role::Given);
                    sequence.push(&[special.message_start], Role::Given);
                    sequence.push(&corpus.encode("user"), Role::Given);
                    "\n"
                }
            };
            sequence.push(&corpus.encode_after(&format!("{begin}{}", question.text)), Role::Given);
            if chat {
                sequence.push(&[special.message_end], Role::Given);
                sequence.push(&corpus.encode("\n"), Role::Given);
                sequence.push(&[special.message_start], Role::Given);
                sequence.push(&corpus.encode("assistant\n"), Role::Given);
            }
            for (sentence, (lead, found)) in question.answer.iter().enumerate() {
                let lead = match chat && sentence == 0 {
                    // After the line break of the role.
                    true => corpus.encode_after(&format!("\n{lead}")).split_off(1),
                    false => corpus.encode(lead),
                };
                sequence.push(&lead, Role::Copied);
                sequence.push(&corpus.encode(&format!("{found}.")), Role::Asked);
            }
            if chat {
                sequence.push(&[special.message_end], Role::Copied);
            }
        }
        sequence
    }
}

/// Where a statement goes: the next beginning of a sentence where one is near.
fn place(filler: &Passage, wanted: usize) -> usize {
    let near = (wanted + NEAR).min(filler.ids.len());
    (wanted..near).find(|&at| filler.begins[at]).unwrap_or(wanted)
}
