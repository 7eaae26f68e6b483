//! From a question to the ids that a model is asked with.

use long_context_weights::{Chat, Checkpoint, Message, Role, Tokenizer};

use crate::Result;

/// A tokenizer with the checkpoint's chat format, or without.
pub struct Prompter<'a> {
    tokenizer: &'a Tokenizer,
    chat: Chat<'a>,
    raw: bool,
}

impl<'a> Prompter<'a> {
    /// Prompts are chat messages, or with `raw` texts to continue.
    ///
    /// # Errors
    ///
    /// A `tokenizer_config.json` that cannot be read.
    pub fn new(checkpoint: &'a Checkpoint, tokenizer: &'a Tokenizer, raw: bool) -> Result<Self> {
        Ok(Self { tokenizer, chat: Chat::new(checkpoint, tokenizer)?, raw })
    }

    /// Ids of a question whose answer has been begun for the model.
    ///
    /// # Errors
    ///
    /// No chat format, or one that refuses the message.
    pub fn ask(&self, question: &str, begun: &str) -> Result<Vec<u32>> {
        if self.raw {
            return Ok(self.plain(&format!("{question}\n\n{begun}")));
        }
        let mut ids = self.chat.encode(&[Message::new(Role::User, question)])?;
        ids.extend(self.tokenizer.encode(begun));
        Ok(ids)
    }

    /// Ids of a text to continue.
    pub fn plain(&self, text: &str) -> Vec<u32> {
        self.prefix().into_iter().chain(self.tokenizer.encode(text)).collect()
    }

    /// Ids that every text begins with.
    pub fn prefix(&self) -> Vec<u32> {
        self.chat.prefix()
    }

    /// Ids that end an answer.
    pub fn stop_ids(&self) -> &[u32] {
        self.chat.stop_ids()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }
}
