//! Folders to damage, the parts of a safetensors file, and reproducible chance.

use std::path::{Path, PathBuf};

use long_context_weights::Checkpoint;
use serde_json::{Map, Value};
use tempfile::TempDir;

pub const CONFIG: &str = "config.json";
pub const MODEL: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const SHARD: &str = "model-00001-of-00002.safetensors";

/// A folder that goes away with the test.
pub struct Folder(TempDir);

impl Folder {
    pub fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A copy of a golden checkpoint: its config and weights.
    pub fn golden(name: &str) -> Self {
        let folder = Self::empty();
        for entry in golden(name).read_dir().unwrap() {
            let file = entry.unwrap().path();
            let name = file.file_name().unwrap().to_str().unwrap();
            if !name.starts_with("golden.") {
                folder.write(name, &std::fs::read(&file).unwrap());
            }
        }
        folder
    }

    /// A golden checkpoint with one of the small tokenizers: `sentencepiece`, `tiktoken` or `json`.
    pub fn with_tokenizer(golden: &str, kind: &str) -> Self {
        let folder = Self::golden(golden);
        folder.add_tokenizer(kind);
        folder
    }

    pub fn add_tokenizer(&self, kind: &str) {
        let name = if kind == "json" { "tokenizer.json" } else { "tokenizer.model" };
        self.write(name, &std::fs::read(fixture("tokenizer").join(kind).join(name)).unwrap());
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path().join(name)).unwrap()
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path().join(name), bytes).unwrap();
    }

    pub fn write_json(&self, name: &str, value: &Value) {
        self.write(name, value.to_string().as_bytes());
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.path().join(name)).unwrap();
    }

    pub fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let mut value: Value = serde_json::from_slice(&self.read(name)).unwrap();
        edit(value.as_object_mut().unwrap());
        self.write_json(name, &value);
    }

    /// Sets a field of `config.json`, or removes it where the value is null.
    pub fn configure(&self, key: &str, value: Value) {
        self.edit_json(CONFIG, |config| match value {
            Value::Null => drop(config.remove(key)),
            value => drop(config.insert(key.to_string(), value)),
        });
    }

    pub fn edit_weights(&self, name: &str, edit: impl FnOnce(&mut Safetensors)) {
        let mut file = Safetensors::parse(&self.read(name));
        edit(&mut file);
        self.write(name, &file.to_bytes());
    }

    pub fn open(&self) -> Checkpoint {
        Checkpoint::open(self.path()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Why the folder is refused, without the place where it happens to lie.
    pub fn refusal(&self) -> String {
        let error = Checkpoint::open(self.path()).err().expect("it should be refused");
        self.relative(&error)
    }

    pub fn relative(&self, error: &long_context_weights::Error) -> String {
        let (text, folder) = (error.to_string(), self.path().display().to_string());
        assert_eq!(text.lines().count(), 1, "{text:?} is not one line");
        text.replace(&format!("{folder}/"), "").replace(&folder, "FOLDER")
    }
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(name)
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn read_json(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// A tensor as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// The header and the data of a safetensors file, to be edited apart.
pub struct Safetensors {
    pub header: Map<String, Value>,
    pub data: Vec<u8>,
}

impl Safetensors {
    pub fn parse(bytes: &[u8]) -> Self {
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        Self { header: serde_json::from_slice(header).unwrap(), data: data.to_vec() }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        with_header(&Value::Object(self.header.clone()).to_string(), &self.data)
    }

    pub fn entry(&mut self, name: &str) -> &mut Value {
        self.header.get_mut(name).unwrap()
    }

    /// First byte and end of a tensor in the data.
    pub fn range(&self, name: &str) -> (usize, usize) {
        let offset = |i: usize| self.header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        (offset(0), offset(1))
    }

    /// The tensor that lies last.
    pub fn last(&self) -> String {
        let tensors = self.header.keys().filter(|name| *name != "__metadata__");
        tensors.max_by_key(|name| self.range(name)).unwrap().clone()
    }

    pub fn tensors(&self) -> Vec<Stored> {
        let stored = |name: &String| {
            let (entry, (first, end)) = (&self.header[name], self.range(name));
            Stored {
                name: name.clone(),
                dtype: entry["dtype"].as_str().unwrap().to_string(),
                shape: serde_json::from_value(entry["shape"].clone()).unwrap(),
                data: self.data[first..end].to_vec(),
            }
        };
        self.header.keys().filter(|name| *name != "__metadata__").map(stored).collect()
    }

    pub fn of(tensors: &[Stored]) -> Self {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for tensor in tensors {
            let end = data.len() + tensor.data.len();
            let entry = serde_json::json!({
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [data.len(), end],
            });
            header.insert(tensor.name.clone(), entry);
            data.extend_from_slice(&tensor.data);
        }
        Self { header, data }
    }
}

/// A safetensors file with any text as its header.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// SplitMix64: the same numbers from the same seed, everywhere.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}
