//! A Hugging Face checkpoint folder in; a module, a tokenizer and its prompts out.
//!
//! ```no_run
//! use burn::backend::Flex;
//! use burn::tensor::DType;
//! use long_context_weights::Checkpoint;
//! use std::rc::Rc;
//!
//! # fn main() -> long_context_weights::Result<()> {
//! let checkpoint = Checkpoint::open("chatglm3-6b-128k")?;
//! let device = Default::default();
//! let model = checkpoint.load::<Flex>(checkpoint.config(), DType::F32, &device, Rc::new(|_| ()))?;
//! let tokenizer = checkpoint.tokenizer()?;
//! # Ok(())
//! # }
//! ```

mod config;
mod error;
mod fields;
mod header;
mod load;
mod prompt;
mod save;
mod shards;
mod stream;
mod tokenizer;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, backend::Backend};
use long_context::models::chatglm::RopeRatio;
use long_context::models::{Model, ModelConfig};
use tempfile::TempDir;

pub use config::{Family, RopeRatioKind};
pub use error::{Error, Result};
pub use load::Progress;
pub use prompt::{Chat, Message, Role};
pub use save::{TokenIds, save_internlm2};
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;

use config::Config;
use shards::Shards;

/// A checkpoint folder whose config and headers have been read and found to fit. Nothing is loaded yet.
pub struct Checkpoint {
    folder: PathBuf,
    config: Config,
    shards: Shards,
    /// Where the files of [`from_files`](Checkpoint::from_files) lie; goes away with the checkpoint.
    _unpacked: Option<TempDir>,
}

impl Checkpoint {
    /// Opens a folder with a `config.json` and weights: `model.safetensors` or `pytorch_model.bin`, whole
    /// or in shards with an index.
    ///
    /// # Errors
    ///
    /// An unknown architecture, impossible numbers, tensors that are missing, unknown, of another shape,
    /// or files that are not what they say.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref().to_path_buf();
        let config = Config::read(&folder)?;
        let shards = Shards::open(&folder)?;
        load::check(&shards, &config.model.tensors())?;
        Ok(Self { folder, config, shards, _unpacked: None })
    }

    /// Opens a checkpoint that a program carries inside itself: the names of a folder's files and their bytes.
    /// They are unpacked into a temporary folder, which goes away with the checkpoint.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), or a temporary folder that cannot be written.
    pub fn from_files(files: &[(&str, &[u8])]) -> Result<Self> {
        let unpacked = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
        for (name, bytes) in files {
            let file = unpacked.path().join(name);
            std::fs::write(&file, bytes).map_err(Error::io(&file))?;
        }
        let opened = Self::open(unpacked.path())?;
        Ok(Self { _unpacked: Some(unpacked), ..opened })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The family, as detected.
    pub fn family(&self) -> Family {
        self.config.family
    }

    /// Dimensions of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config.model
    }

    /// Overrides what was detected of `rope_ratio`.
    ///
    /// # Errors
    ///
    /// A family that has no such setting.
    pub fn set_rope_ratio(&mut self, kind: RopeRatioKind) -> Result<()> {
        match &mut self.config.model {
            ModelConfig::ChatGlm(config) => {
                let (RopeRatio::ScalesBase(ratio) | RopeRatio::DividesPosition(ratio)) = config.rope_ratio;
                config.rope_ratio = kind.with(ratio);
                Ok(())
            }
            ModelConfig::InternLm2(_) => {
                let file = self.folder.join("config.json");
                Err(Error::invalid(
                    &file,
                    "rope_ratio",
                    "InternLM2, which has none",
                    "a ChatGLM or GLM-4 model",
                ))
            }
        }
    }

    /// Ids that end a text, from `config.json` and `generation_config.json`.
    pub fn eos(&self) -> &[u32] {
        &self.config.eos
    }

    /// Weight files.
    pub fn files(&self) -> usize {
        self.shards.files
    }

    /// Stored bytes of all parameters.
    pub fn bytes(&self) -> u64 {
        let stored = |spec: &long_context::models::TensorSpec| self.shards.tensors.get(&spec.name);
        self.config.model.tensors().iter().filter_map(stored).map(|tensor| tensor.bytes()).sum()
    }

    /// Types that parameters are stored in.
    pub fn stored_types(&self) -> Vec<String> {
        let types: BTreeSet<String> =
            self.shards.tensors.values().map(|tensor| format!("{:?}", tensor.dtype).to_lowercase()).collect();
        types.into_iter().collect()
    }

    /// Loads the model tensor by tensor, computing in `dtype`. `config` is [`config`](Self::config), or a
    /// copy with another rotary scaling. The host holds about one tensor at a time beside the mapped files.
    ///
    /// # Errors
    ///
    /// A tensor that cannot be read; nothing half-loaded is left then.
    pub fn load<B: Backend>(
        &self,
        config: &ModelConfig,
        dtype: DType,
        device: &B::Device,
        progress: Progress,
    ) -> Result<Model<B>> {
        let (model, specs) = (config.init::<B>(device), config.tensors());
        load::load(&self.shards, model, &specs, dtype, device, &progress)
    }

    /// The folder's tokenizer.
    ///
    /// # Errors
    ///
    /// No tokenizer file, or one that cannot be understood.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::of_family(&self.folder, Some(self.family()))
    }
}
