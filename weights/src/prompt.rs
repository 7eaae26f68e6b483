//! Chat messages to the ids that a family was trained on.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value, context};

use crate::Checkpoint;
use crate::config::Family;
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::tokenizer::Tokenizer;

/// Instructions that a chat template may run: far more than a template needs for a long conversation.
const TEMPLATE_STEPS: u64 = 10_000_000;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool (ChatGLM3, GLM-4).
    Observation,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Observation => "observation",
        }
    }
}

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

enum Format {
    Family(Family),
    Template { source: String, bos: String, eos: String },
    None,
}

/// The prompt format of a checkpoint.
pub struct Chat<'a> {
    checkpoint: &'a Checkpoint,
    tokenizer: &'a Tokenizer,
    format: Format,
    stop: Vec<u32>,
}

impl<'a> Chat<'a> {
    /// The family's own format where its tokenizer is there; else the folder's `chat_template`.
    ///
    /// # Errors
    ///
    /// A `tokenizer_config.json` that cannot be read.
    pub fn new(checkpoint: &'a Checkpoint, tokenizer: &'a Tokenizer) -> Result<Self> {
        let family = checkpoint.family();
        let known = format_tokens(family).iter().all(|name| tokenizer.special(name).is_some());
        let mut stop = checkpoint.eos().to_vec();
        let mut format = if known { Format::Family(family) } else { Format::None };
        let file = checkpoint.folder().join("tokenizer_config.json");
        if file.is_file() {
            let fields = Fields::read(&file)?;
            let token = |key: &str| {
                let value = fields.get(key)?;
                value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
            };
            let (bos, eos) = (token("bos_token"), token("eos_token"));
            stop.extend(eos.as_deref().and_then(|name| tokenizer.special(name)));
            if let Some(source) = fields.text("chat_template")
                && !(known && tokenizer.is_native())
            {
                let (bos, eos) = (bos.unwrap_or_default(), eos.unwrap_or_default());
                format = Format::Template { source: source.to_string(), bos, eos };
            }
        }
        let turns = ["<|user|>", "<|observation|>", "<|im_end|>", "<|endoftext|>"];
        stop.extend(turns.iter().filter_map(|name| tokenizer.special(name)));
        stop.sort();
        stop.dedup();
        Ok(Self { checkpoint, tokenizer, format, stop })
    }

    /// Ids that end an answer.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop
    }

    /// Whether there is a known format: without one, texts can be continued and messages cannot be answered.
    pub fn has_format(&self) -> bool {
        !matches!(self.format, Format::None)
    }

    /// What every text begins with, chat or not.
    pub fn prefix(&self) -> Vec<u32> {
        let names: &[&str] = match self.checkpoint.family() {
            Family::ChatGlm2 | Family::ChatGlm3 => &["[gMASK]", "sop"],
            Family::Glm4 => &["[gMASK]", "<sop>"],
            Family::InternLm2 => &["<s>"],
        };
        names.iter().filter_map(|name| self.tokenizer.special(name)).collect()
    }

    /// The ids of a conversation, ready for the model's answer. Role tokens come from the format alone:
    /// a message that spells one out is text.
    ///
    /// # Errors
    ///
    /// No known format, or a template that refuses the messages.
    pub fn encode(&self, messages: &[Message]) -> Result<Vec<u32>> {
        match &self.format {
            Format::Family(Family::ChatGlm2) => Ok(self.chatglm2(messages)),
            Format::Family(Family::ChatGlm3 | Family::Glm4) => Ok(self.roles(messages)),
            Format::Family(Family::InternLm2) => Ok(self.chatml(messages)),
            Format::Template { source, bos, eos } => self.template(source, bos, eos, messages),
            Format::None => Err(Error::invalid(
                self.checkpoint.folder(),
                "chat format",
                "neither the family's special tokens nor a chat_template",
                "one of them (--raw continues a text as it stands)",
            )),
        }
    }

    fn special(&self, name: &str) -> Option<u32> {
        self.tokenizer.special(name)
    }

    /// Rounds in plain text; there are no roles, so a system message goes before the first question.
    fn chatglm2(&self, messages: &[Message]) -> Vec<u32> {
        let (mut text, mut round) = (String::new(), 0);
        let mut before = String::new();
        for message in messages {
            match message.role {
                Role::System => before = format!("{}\n\n", message.content),
                Role::User | Role::Observation => {
                    round += 1;
                    let question = std::mem::take(&mut before) + &message.content;
                    text += &format!("[Round {round}]\n\n问：{question}\n\n答：");
                }
                Role::Assistant => text += &format!("{}\n\n", message.content),
            }
        }
        self.prefix().into_iter().chain(self.tokenizer.encode(&text)).collect()
    }

    /// ChatGLM3 and GLM-4: a role token, a line of metadata (empty here), the text.
    fn roles(&self, messages: &[Message]) -> Vec<u32> {
        let mut ids = self.prefix();
        for message in messages {
            ids.extend(self.special(&format!("<|{}|>", message.role.name())));
            ids.extend(self.tokenizer.encode("\n"));
            ids.extend(self.tokenizer.encode(&message.content));
        }
        ids.extend(self.special("<|assistant|>"));
        ids
    }

    fn chatml(&self, messages: &[Message]) -> Vec<u32> {
        let mut ids = self.prefix();
        for message in messages {
            ids.extend(self.special("<|im_start|>"));
            ids.extend(self.tokenizer.encode(&format!("{}\n{}", message.role.name(), message.content)));
            ids.extend(self.special("<|im_end|>"));
            ids.extend(self.tokenizer.encode("\n"));
        }
        ids.extend(self.special("<|im_start|>"));
        ids.extend(self.tokenizer.encode("assistant\n"));
        ids
    }

    /// Renders a template and turns its own special tokens into ids. In the messages the first character
    /// of anything that could begin one is followed by a character that occurs nowhere else, taken out
    /// again before the text is encoded.
    fn template(&self, source: &str, bos: &str, eos: &str, messages: &[Message]) -> Result<Vec<u32>> {
        let refuse = |found: String| {
            let file = self.checkpoint.folder().join("tokenizer_config.json");
            Error::invalid(&file, "field `chat_template`", found, "a template that takes these messages")
        };
        let all = || messages.iter().map(|message| message.content.as_str()).chain([source]);
        let guard = ('\u{e000}'..='\u{f8ff}')
            .find(|&guard| !all().any(|text| text.contains(guard)))
            .ok_or_else(|| refuse("messages with every private character".to_string()))?;
        let mut names: Vec<(&str, u32)> =
            self.tokenizer.specials().iter().map(|(&id, name)| (name.as_str(), id)).collect();
        names.retain(|(name, _)| !name.is_empty());
        names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        let begins = |c: char| names.iter().any(|(name, _)| name.starts_with(c));
        let guarded: Vec<Value> = messages
            .iter()
            .map(|message| {
                let mut content = String::with_capacity(message.content.len());
                for c in message.content.chars() {
                    content.push(c);
                    if begins(c) {
                        content.push(guard);
                    }
                }
                context! { role => message.role.name(), content => content }
            })
            .collect();

        let mut environment = Environment::new();
        // As the library that templates are written for sets its engine up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| refuse(error.to_string()))?);
        // A template comes with the checkpoint: one that never ends is bad input like any other.
        environment.set_fuel(Some(TEMPLATE_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |text: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, text))
            },
        );
        let values = context! {
            messages => guarded, add_generation_prompt => true, bos_token => bos, eos_token => eos,
        };
        let text = environment.render_str(source, values).map_err(|error| refuse(error.to_string()))?;

        let mut ids = Vec::new();
        let mut plain = String::new();
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            if let Some((name, id)) = names.iter().find(|(name, _)| rest.starts_with(name)) {
                ids.extend(self.tokenizer.encode(&std::mem::take(&mut plain)));
                ids.push(*id);
                rest = &rest[name.len()..];
            } else {
                if c != guard {
                    plain.push(c);
                }
                rest = &rest[c.len_utf8()..];
            }
        }
        ids.extend(self.tokenizer.encode(&plain));
        Ok(ids)
    }
}

/// The special tokens that a family's format is made of.
fn format_tokens(family: Family) -> &'static [&'static str] {
    match family {
        Family::ChatGlm2 => &["[gMASK]", "sop"],
        Family::ChatGlm3 => &["[gMASK]", "sop", "<|user|>", "<|assistant|>"],
        Family::Glm4 => &["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"],
        Family::InternLm2 => &["<|im_start|>", "<|im_end|>"],
    }
}
