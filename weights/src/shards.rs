//! The weight files of a folder: found, mapped, their headers read, nothing loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use burn::tensor::{DType, TensorData};
use burn_store::TensorSnapshot;
use burn_store::pytorch::PytorchReader;
use memmap2::{Mmap, UncheckedAdvice};

use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::header;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TORCH_SINGLE: &str = "pytorch_model.bin";
const TORCH_INDEX: &str = "pytorch_model.bin.index.json";

/// A tensor in a weight file.
#[derive(Clone)]
pub(crate) struct Stored {
    pub file: PathBuf,
    pub dtype: DType,
    pub shape: Vec<usize>,
    source: Source,
}

#[derive(Clone)]
enum Source {
    Mapped(Rc<Mmap>, Range<usize>),
    Torch(TensorSnapshot),
}

impl Stored {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().fold(self.dtype.size() as u64, |bytes, &n| bytes.saturating_mul(n as u64))
    }

    /// Hands the stored bytes, little endian, to `convert`; pages of the map are given back afterwards.
    pub fn read(&self, name: &str, convert: impl FnOnce(&[u8]) -> TensorData) -> Result<TensorData> {
        match &self.source {
            Source::Mapped(map, range) => {
                let data = convert(&map[range.clone()]);
                // SAFETY: the map is read-only and backed by a file: dropped pages are read again when touched.
                // It only saves memory, so a system that refuses changes nothing.
                #[cfg(unix)]
                let _ = unsafe {
                    map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
                };
                Ok(data)
            }
            Source::Torch(snapshot) => {
                let data = snapshot.to_data().map_err(|error| {
                    Error::tensor(&self.file, name, error, "tensor data that PyTorch wrote")
                })?;
                // The reader hands out zeros for data that is absent or damaged; no parameter is all zeros.
                if data.bytes.iter().all(|&byte| byte == 0) {
                    return Err(Error::tensor(
                        &self.file,
                        name,
                        "nothing but zeros",
                        "data that can be read",
                    ));
                }
                Ok(convert(&data.bytes))
            }
        }
    }
}

/// All tensors of a folder by name.
pub(crate) struct Shards {
    /// The single file, or the index of several.
    pub source: PathBuf,
    pub tensors: BTreeMap<String, Stored>,
    pub files: usize,
}

impl Shards {
    pub fn open(folder: &Path) -> Result<Self> {
        for (name, read) in [(SINGLE, safetensors as ReadFile), (TORCH_SINGLE, torch)] {
            // Where an index stands beside a single file, the index describes the whole.
            let index = folder.join(format!("{name}.index.json"));
            if index.is_file() {
                return Self::open_index(folder, &index, read);
            }
            let file = folder.join(name);
            if file.is_file() {
                return Ok(Self { tensors: read(&file)?, source: file, files: 1 });
            }
        }
        let expected = format!("{SINGLE}, {INDEX}, {TORCH_SINGLE} or {TORCH_INDEX}");
        Err(Error::invalid(folder, "weights", "none", expected))
    }

    fn open_index(folder: &Path, index: &Path, read: ReadFile) -> Result<Self> {
        let fields = Fields::read(index)?;
        let Some(map) = fields.object("weight_map")? else {
            return Err(fields.invalid("weight_map", "nothing", "an object from tensor to file"));
        };
        let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (tensor, file) in map.entries() {
            let Some(file) = file.as_str() else {
                return Err(Error::tensor(index, tensor, file, "the name of a file"));
            };
            let plain = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
            if !plain || file.contains('\\') || file.is_empty() {
                return Err(Error::tensor(
                    index,
                    tensor,
                    format_args!("file `{file}`"),
                    "a file inside the folder",
                ));
            }
            shards.entry(file).or_default().insert(tensor);
        }
        if let Some(name) = shards.keys().find(|name| !folder.join(name).is_file()) {
            return Err(Error::invalid(
                index,
                format_args!("shard `{name}`"),
                "no such file",
                "one in the folder",
            ));
        }
        let mut tensors = BTreeMap::new();
        for (name, listed) in &shards {
            let file = folder.join(name);
            let stored = read(&file)?;
            if let Some(absent) = listed.iter().find(|tensor| !stored.contains_key(**tensor)) {
                return Err(Error::tensor(&file, absent, "nothing", "it here, as the index says"));
            }
            for (tensor, stored) in stored {
                if !listed.contains(tensor.as_str()) {
                    return Err(Error::tensor(
                        &file,
                        &tensor,
                        "it here",
                        "it where the index says, or nowhere",
                    ));
                }
                tensors.insert(tensor, stored);
            }
        }
        Ok(Self { source: index.to_path_buf(), tensors, files: shards.len() })
    }
}

type ReadFile = fn(&Path) -> Result<BTreeMap<String, Stored>>;

fn safetensors(file: &Path) -> Result<BTreeMap<String, Stored>> {
    let handle = File::open(file).map_err(Error::io(file))?;
    // SAFETY: the file must not be cut while it is mapped, which nobody does to a checkpoint in use.
    let map = Rc::new(unsafe { Mmap::map(&handle) }.map_err(Error::io(file))?);
    let entries = header::read(file, &map)?;
    let stored = |entry: header::Entry| Stored {
        file: file.to_path_buf(),
        dtype: entry.dtype,
        shape: entry.shape,
        source: Source::Mapped(map.clone(), entry.range),
    };
    Ok(entries.into_iter().map(|(name, entry)| (name, stored(entry))).collect())
}

fn torch(file: &Path) -> Result<BTreeMap<String, Stored>> {
    const EXPECTED: &str = "a zip archive that torch.save wrote (PyTorch 1.6 or later)";
    let refuse = |found: String| Error::invalid(file, "content", found, EXPECTED);
    let mut start = Vec::new();
    File::open(file).and_then(|handle| handle.take(4).read_to_end(&mut start)).map_err(Error::io(file))?;
    if start != *b"PK\x03\x04" {
        return Err(refuse("no zip archive".to_string()));
    }
    // The reader trusts sizes that a broken file states; what it trips over is this file's fault.
    let reader = catch_unwind(AssertUnwindSafe(|| PytorchReader::new(file)))
        .map_err(|_| refuse("data that cannot be parsed".to_string()))?
        .map_err(|error| refuse(error.to_string()))?;
    let stated = reader.metadata().total_data_size.unwrap_or(0) as u64;
    let mut tensors = BTreeMap::new();
    for (name, snapshot) in reader.into_tensors() {
        if !matches!(snapshot.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::tensor(
                file,
                &name,
                format_args!("dtype {:?}", snapshot.dtype),
                "F32, F16 or BF16",
            ));
        }
        let stored = Stored {
            file: file.to_path_buf(),
            dtype: snapshot.dtype,
            shape: snapshot.shape.to_vec(),
            source: Source::Torch(snapshot),
        };
        tensors.insert(name, stored);
    }
    let needed = tensors.values().map(Stored::bytes).fold(0, u64::saturating_add);
    let most = std::fs::metadata(file).map_err(Error::io(file))?.len();
    if stated < needed || stated > most {
        let expected = format!("at least {needed} for its tensors, at most {most}");
        return Err(Error::invalid(file, "data", format_args!("{stated} bytes"), expected));
    }
    Ok(tensors)
}
