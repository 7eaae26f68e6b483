use crate::tokenizer::Tokenizer;

/// Turns ids into text one by one and never shows half a character: what the pieces add up to is
/// [`Tokenizer::decode`] of all ids.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The last id that had text: a token's text can depend on standing first.
    before: Option<u32>,
    pending: Vec<u8>,
}

impl<'a> StreamDecoder<'a> {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, before: None, pending: Vec::new() }
    }

    /// Takes the next id; the characters that are complete now, if there are any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let context: Vec<u32> = self.before.into_iter().collect();
        let known = self.tokenizer.decode_bytes(&context).len();
        let bytes = self.tokenizer.decode_bytes(&[&context[..], &[id]].concat());
        if !self.tokenizer.decode_bytes(&[id, id]).is_empty() {
            self.before = Some(id);
        }
        self.pending.extend_from_slice(bytes.get(known..).unwrap_or_default());
        let text = self.take_complete();
        (!text.is_empty()).then_some(text)
    }

    /// What is left at the end: a character that never became whole is shown as U+FFFD.
    pub fn flush(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (valid, rest) = self.pending.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(wrong) = error.error_len() else {
                        self.pending = rest.to_vec();
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending = rest[wrong..].to_vec();
                }
            }
        }
    }
}
