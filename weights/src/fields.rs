//! JSON files whose fields are checked as they are read.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object from a file.
#[derive(Debug, Clone)]
pub(crate) struct Fields {
    file: PathBuf,
    /// What leads to a nested object, such as `rope_scaling.`.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(Error::io(file))?;
        let map = serde_json::from_str(&text)
            .map_err(|error| Error::invalid(file, "content", error, "a JSON object"))?;
        Ok(Self { file: file.to_path_buf(), prefix: String::new(), map })
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The field, where it is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// An object inside, told apart in messages by its key.
    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                let prefix = format!("{}{key}.", self.prefix);
                Ok(Some(Self { file: self.file.clone(), prefix, map: map.clone() }))
            }
            Some(other) => Err(self.invalid(key, other, "an object")),
        }
    }

    pub fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    pub fn invalid(&self, key: &str, found: impl std::fmt::Display, expected: &str) -> Error {
        Error::invalid(&self.file, format_args!("field `{}{key}`", self.prefix), found, expected)
    }

    fn required(&self, key: &str, expected: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| self.invalid(key, "nothing", expected))
    }

    /// A whole number from 1 to `most`.
    pub fn count(&self, key: &str, most: usize) -> Result<usize> {
        let expected = format!("a whole number from 1 to {most}");
        let value = self.required(key, &expected)?;
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number
            .filter(|&number| number >= 1 && number <= most)
            .ok_or_else(|| self.invalid(key, value, &expected))
    }

    /// A finite number above 0.
    pub fn positive(&self, key: &str) -> Result<f64> {
        const EXPECTED: &str = "a finite number above 0";
        let value = self.required(key, EXPECTED)?;
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.ok_or_else(|| self.invalid(key, value, EXPECTED))
    }

    /// As [`positive`](Self::positive), with the model class's own default.
    pub fn positive_or(&self, key: &str, default: f64) -> Result<f64> {
        if self.get(key).is_some() { self.positive(key) } else { Ok(default) }
    }

    /// A flag, with the model class's own default.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.invalid(key, value, "true or false")),
        }
    }

    /// Refuses a flag whose other value is not implemented.
    pub fn must_be(&self, key: &str, only: bool) -> Result<()> {
        match self.flag_or(key, only)? {
            value if value == only => Ok(()),
            value => Err(self.invalid(key, value, &format!("{only} (the other is not supported)"))),
        }
    }

    /// One token id or a list of them.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let values = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        values
            .iter()
            .map(|one| id(one).ok_or_else(|| self.invalid(key, value, "a token id or a list of them")))
            .collect()
    }
}
