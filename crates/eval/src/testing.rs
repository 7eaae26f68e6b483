//! For tests: an engine that says what it is told to, and a small checkpoint.

use std::ops::ControlFlow;
use std::path::Path;

use long_context::cache::{AttentionConfig, LayerReport, Observer};
use long_context::generate::{Engine, GenerateError};
use long_context_weights::{Checkpoint, Tokenizer};
use tempfile::TempDir;

const VOCAB: usize = 16;

/// Continues one prompt by one text; off the script it says token 0.
pub struct Script {
    whole: Vec<u32>,
    history: Vec<u32>,
    /// Calls that ran tokens.
    pub calls: usize,
    /// Tokens of the longest prefill.
    pub longest: usize,
}

impl Script {
    pub fn new(prompt: &[u32], text: &[u32]) -> Self {
        Self { whole: [prompt, text].concat(), history: Vec::new(), calls: 0, longest: 0 }
    }

    fn next(&self) -> Vec<f32> {
        let on_script = self.whole.starts_with(&self.history);
        let next = self.whole.get(self.history.len()).filter(|_| on_script).copied().unwrap_or(0);
        (0..VOCAB as u32).map(|id| if id == next { 1.0 } else { 0.0 }).collect()
    }
}

impl Engine for Script {
    fn prefill(
        &mut self,
        ids: &[u32],
        on_chunk: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>, GenerateError> {
        self.calls += 1;
        self.longest = self.longest.max(ids.len());
        self.history.extend(ids);
        let _ = on_chunk(ids.len());
        Ok(Some(self.next()))
    }

    fn logits(&mut self, ids: &[u32], on_logits: &mut dyn FnMut(Vec<f32>)) -> Result<(), GenerateError> {
        self.calls += 1;
        for &id in ids {
            self.history.push(id);
            on_logits(self.next());
        }
        Ok(())
    }

    /// One value: the token itself.
    fn hidden(&mut self, ids: &[u32]) -> Result<Vec<f32>, GenerateError> {
        self.history.extend(ids);
        Ok(ids.iter().map(|&id| id as f32).collect())
    }

    /// Half the mass on the token's successor, the rest even.
    fn project(&mut self, hidden: &[f32]) -> Result<Vec<f32>, GenerateError> {
        let row = |&token: &f32| {
            let next = (token as usize + 1) % VOCAB;
            (0..VOCAB).map(move |id| if id == next { ((VOCAB - 1) as f32).ln() } else { 0.0 })
        };
        Ok(hidden.iter().flat_map(row).collect())
    }

    fn history(&self) -> &[u32] {
        &self.history
    }

    fn truncate(&mut self, length: usize) {
        self.history.truncate(length);
    }

    fn capacity(&self) -> usize {
        1024
    }

    fn set_attention(&mut self, _: &AttentionConfig) {}

    fn observe(&mut self, _: Option<Observer>) {}

    fn take_reports(&mut self) -> Result<Vec<LayerReport>, GenerateError> {
        Ok(Vec::new())
    }
}

/// A golden checkpoint with a small tokenizer, in a folder that goes away with the test.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let golden = root.join("tests/fixtures/golden/internlm2-tiny");
        let tokenizer = root.join("weights/tests/fixtures/tokenizer/sentencepiece");
        for (from, name) in
            [(&golden, "config.json"), (&golden, "model.safetensors"), (&tokenizer, "tokenizer.model")]
        {
            std::fs::copy(from.join(name), folder.path().join(name)).unwrap();
        }
        Self(folder)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn open(&self) -> (Checkpoint, Tokenizer) {
        let checkpoint = Checkpoint::open(self.path()).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        (checkpoint, tokenizer)
    }
}
