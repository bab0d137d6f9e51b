//! Typed access to a JSON object whose errors name the file and the key.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::weights::file::WeightFile;
use crate::{Result, ZooError};

/// No model's config comes near this.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// An object in a JSON file, with the keys that lead to it.
#[derive(Debug)]
pub(crate) struct JsonObject {
    path: PathBuf,
    /// `rope_scaling.`, or nothing at the top.
    prefix: String,
    entries: Map<String, Value>,
}

impl JsonObject {
    /// The top-level object of a file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let file = WeightFile::open(path)?;
        if file.len() > MAX_CONFIG_BYTES {
            return Err(file.malformed(format!("is larger than {MAX_CONFIG_BYTES} bytes")));
        }
        let bytes = file.read_at(0, file.len() as usize)?;
        let entries = serde_json::from_slice(&bytes).map_err(|e| file.malformed(e.to_string()))?;
        Ok(Self { path: path.to_owned(), prefix: String::new(), entries })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the key is there, be it with null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The value of `key`; `None` when it is missing or null.
    pub(crate) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        match self.entries.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                T::deserialize(value).map(Some).map_err(|e| self.malformed(&format!("{key}: {e}")))
            }
        }
    }

    /// The value of `key`, which must be there.
    pub(crate) fn require<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| self.malformed(&format!("{key} is missing")))
    }

    /// The object at `key`; `None` when it is missing or null.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>> {
        let entries = self.get(key)?;
        Ok(entries.map(|entries| Self {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            entries,
        }))
    }

    /// Gives `key` a value where it has none.
    pub(crate) fn set_default(&mut self, key: &str, value: Value) {
        if self.entries.get(key).is_none_or(Value::is_null) {
            self.entries.insert(key.to_owned(), value);
        }
    }

    /// An error about a value of this object.
    pub(crate) fn malformed(&self, reason: &str) -> ZooError {
        ZooError::format(&self.path, format!("{}{reason}", self.prefix))
    }

    /// A feature that `key` asks for and no decoder here has.
    pub(crate) fn unsupported(&self, key: &str, what: &str) -> ZooError {
        let file = self.path.display();
        ZooError::Unsupported(format!("{file}: {}{key} asks for {what}", self.prefix))
    }
}
