//! Text to ids and back, from the tokenizer files of a folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use kitoken::convert::{convert_sentencepiece, convert_tiktoken, convert_tokenizers};
use kitoken::{Definition, Kitoken, Regex, SpecialTokenKind, Split, SplitBehavior};

use crate::config::{Config, Family};
use crate::error::{Error, Result};
use crate::fields::Fields;

/// How GLM-4 cuts text before it merges bytes: contractions, words, up to three digits, punctuation, space.
const GLM4_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const CHATGLM2_SPECIALS: [&str; 5] = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"];
const CHATGLM3_ROLES: [&str; 4] = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"];
const GLM4_SPECIALS: [&str; 10] = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
];
/// Tokens that text makes although they are never split.
const ORDINARY: &[SpecialTokenKind] = &[SpecialTokenKind::Priority];

/// InternLM2 renames the last pieces of its vocabulary; `tokenizer_config.json` says so where it is there.
const INTERNLM2_SPECIALS: [(u32, &str); 2] = [(92542, "<|im_end|>"), (92543, "<|im_start|>")];
const INTERNLM2_VOCABULARY: usize = 92544;

/// A tokenizer with its special tokens kept apart: they are never made from text.
pub struct Tokenizer {
    kitoken: Kitoken,
    /// Bytes of every ordinary token.
    pieces: HashMap<u32, Vec<u8>>,
    /// Byte tokens that the converter left out, and the pieces that decode to the same byte.
    bytes: HashMap<u32, u32>,
    specials: BTreeMap<u32, String>,
    ids: HashMap<String, u32>,
    native: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.model` (SentencePiece, or tiktoken ranks) or `tokenizer.json`. Where there is a
    /// `config.json` too, its family's special tokens are known.
    ///
    /// # Errors
    ///
    /// No such file, or one that cannot be understood.
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let has_config = folder.join("config.json").is_file();
        let family = if has_config { Some(Config::read(folder)?.family) } else { None };
        Self::of_family(folder, family)
    }

    pub(crate) fn of_family(folder: &Path, family: Option<Family>) -> Result<Self> {
        let model = folder.join("tokenizer.model");
        let json = folder.join("tokenizer.json");
        if model.is_file() {
            let data = std::fs::read(&model).map_err(Error::io(&model))?;
            // Ranks are lines of base64 and a number; SentencePiece is binary.
            let tiktoken =
                data.iter().take(4096).all(|byte| byte.is_ascii_graphic() || b" \r\n".contains(byte));
            let definition = if tiktoken { convert_tiktoken(&data) } else { convert_sentencepiece(&data) };
            let refuse =
                |found| Error::invalid(&model, "content", found, "a SentencePiece model or tiktoken ranks");
            let mut definition = definition.map_err(|error| refuse(error.to_string()))?;
            let mut specials = control_tokens(&definition);
            if tiktoken {
                let singles: BTreeSet<&[u8]> =
                    definition.model.vocab().iter().map(|token| &token.bytes[..]).collect();
                if let Some(byte) = (0..=u8::MAX).find(|byte| !singles.contains(&[*byte][..])) {
                    return Err(refuse(format!("no rank for the byte {byte}")));
                }
                definition.config.split = vec![Split::Pattern {
                    pattern: Regex::new(GLM4_SPLIT).map_err(|error| refuse(error.to_string()))?.into(),
                    behavior: SplitBehavior::Isolate,
                }];
                definition.specials = Default::default();
                specials.clear();
            }
            specials.extend(appended(family, vocabulary(&definition)));
            specials.extend(configured(folder)?);
            Self::new(definition, specials, true).map_err(refuse)
        } else if json.is_file() {
            let data = std::fs::read(&json).map_err(Error::io(&json))?;
            let refuse =
                |found| Error::invalid(&json, "content", found, "a tokenizer.json of the tokenizers library");
            let definition = convert_tokenizers(&data).map_err(|error| refuse(error.to_string()))?;
            let mut specials = control_tokens(&definition);
            specials.extend(configured(folder)?);
            Self::new(definition, specials, false).map_err(refuse)
        } else {
            Err(Error::invalid(folder, "tokenizer", "none", "tokenizer.model or tokenizer.json"))
        }
    }

    fn new(
        mut definition: Definition,
        specials: BTreeMap<u32, String>,
        native: bool,
    ) -> std::result::Result<Self, String> {
        // What is not in the vocabulary cannot be made from text.
        definition.model.vocab_mut().retain(|token| !specials.contains_key(&token.id));
        definition.specials.retain(|token| !specials.contains_key(&token.id));
        if definition.model.vocab().is_empty() {
            return Err("no tokens".to_string());
        }
        let mut pieces: HashMap<u32, Vec<u8>> =
            definition.model.vocab().iter().map(|token| (token.id, token.bytes.to_vec())).collect();
        let bytes = byte_tokens(&pieces, &specials);
        pieces.extend(bytes.iter().map(|(id, piece)| (*id, pieces[piece].clone())).collect::<Vec<_>>());
        // Pieces that are never split are no special tokens: text makes them, and they are shown.
        let whole = definition.specials.iter().filter(|token| token.kind == SpecialTokenKind::Priority);
        pieces.extend(whole.map(|token| (token.id, token.bytes.to_vec())));
        let ids = specials.iter().map(|(&id, name)| (name.clone(), id)).collect();
        let kitoken = Kitoken::from_definition(definition).map_err(|error| error.to_string())?;
        Ok(Self { kitoken, pieces, bytes, specials, ids, native })
    }

    /// The ids of a text. Special tokens written out in it are text like any other.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        // Every tokenizer here falls back to bytes, to its unknown token or to nothing.
        self.kitoken.encode(text, ORDINARY).unwrap_or_default()
    }

    /// The text of ids; special tokens and ids that stand for nothing are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned()
    }

    pub(crate) fn decode_bytes(&self, ids: &[u32]) -> Vec<u8> {
        let ordinary = ids.iter().filter(|id| self.pieces.contains_key(id));
        let ordinary: Vec<u32> = ordinary.map(|id| *self.bytes.get(id).unwrap_or(id)).collect();
        self.kitoken.decode(&ordinary, ORDINARY).unwrap_or_default()
    }

    /// The id of a special token such as `<|user|>`.
    pub fn special(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    /// The special tokens, by id.
    pub fn specials(&self) -> &BTreeMap<u32, String> {
        &self.specials
    }

    /// What one id stands for, for people to read.
    pub fn piece(&self, id: u32) -> String {
        match (self.specials.get(&id), self.pieces.get(&id)) {
            (Some(name), _) => name.clone(),
            (None, Some(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
            (None, None) => String::new(),
        }
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.pieces.keys().chain(self.specials.keys()).max().map_or(0, |&last| last as usize + 1)
    }

    /// Whether it is the family's own (`tokenizer.model`), whose prompts are known to the id.
    pub(crate) fn is_native(&self) -> bool {
        self.native
    }
}

/// SentencePiece has 256 byte tokens in a row. The converter keeps one token for the same bytes, which leaves
/// out those that a piece equals; a model may still write them.
fn byte_tokens(pieces: &HashMap<u32, Vec<u8>>, specials: &BTreeMap<u32, String>) -> HashMap<u32, u32> {
    let singles: HashMap<u8, u32> = pieces
        .iter()
        .filter_map(|(&id, bytes)| match bytes[..] {
            [byte] => Some((byte, id)),
            _ => None,
        })
        .collect();
    let first = singles.get(&u8::MAX).and_then(|last| last.checked_sub(u32::from(u8::MAX)));
    let Some(first) =
        first.filter(|first| (0x80..=u8::MAX).all(|b| singles.get(&b) == Some(&(first + u32::from(b)))))
    else {
        return HashMap::new();
    };
    let tokens = singles.iter().map(|(&byte, &piece)| (first + u32::from(byte), piece));
    tokens.filter(|(id, _)| !pieces.contains_key(id) && !specials.contains_key(id)).collect()
}

/// Ids that the vocabulary takes, special ones included.
fn vocabulary(definition: &Definition) -> usize {
    let ordinary = definition.model.vocab().iter().map(|token| token.id);
    let special = definition.specials.iter().map(|token| token.id);
    ordinary.chain(special).filter(|&id| id != u32::MAX).max().map_or(0, |last| last as usize + 1)
}

fn control_tokens(definition: &Definition) -> BTreeMap<u32, String> {
    let control = definition.specials.iter().filter(|token| token.kind == SpecialTokenKind::Control);
    control
        .filter(|token| token.id != u32::MAX)
        .map(|token| (token.id, String::from_utf8_lossy(&token.bytes).into_owned()))
        .collect()
}

/// The special tokens that a family's own code appends to its vocabulary.
fn appended(family: Option<Family>, vocabulary: usize) -> Vec<(u32, String)> {
    let numbered = |names: &[&str]| {
        names.iter().enumerate().map(|(i, name)| ((vocabulary + i) as u32, name.to_string())).collect()
    };
    match family {
        Some(Family::ChatGlm2) => numbered(&CHATGLM2_SPECIALS),
        Some(Family::ChatGlm3) => numbered(&[&CHATGLM2_SPECIALS[..], &CHATGLM3_ROLES[..]].concat()),
        Some(Family::Glm4) => numbered(&GLM4_SPECIALS),
        Some(Family::InternLm2) if vocabulary == INTERNLM2_VOCABULARY => {
            INTERNLM2_SPECIALS.map(|(id, name)| (id, name.to_string())).into()
        }
        Some(Family::InternLm2) | None => Vec::new(),
    }
}

/// The special tokens that `tokenizer_config.json` names.
fn configured(folder: &Path) -> Result<Vec<(u32, String)>> {
    let file = folder.join("tokenizer_config.json");
    if !file.is_file() {
        return Ok(Vec::new());
    }
    let Some(added) = Fields::read(&file)?.object("added_tokens_decoder")? else { return Ok(Vec::new()) };
    added
        .entries()
        .filter(|(_, token)| token["special"].as_bool() != Some(false))
        .map(|(id, token)| match (id.parse(), token["content"].as_str()) {
            (Ok(id), Some(content)) => Ok((id, content.to_string())),
            _ => Err(added.invalid(id, token, "a number with its `content`")),
        })
        .collect()
}
