//! The key-value pairs of a GGUF header, read by type.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::header::HeaderReader;
use crate::{Result, ZooError};

/// A metadata value. Integer and float widths are not kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Value {
    /// `uint8` to `uint64`.
    Unsigned(u64),
    /// `int8` to `int64`.
    Signed(i64),
    /// `float32` or `float64`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// `string`.
    String(String),
    /// A flat array.
    Array(Array),
}

/// A flat array of one type; arrays of arrays are refused, as no model file has them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Array {
    /// Integers of any width.
    Integers(Vec<i64>),
    /// Floats of any width.
    Floats(Vec<f32>),
    /// Booleans.
    Bools(Vec<bool>),
    /// Strings: a vocabulary, merges.
    Strings(Vec<String>),
}

/// All pairs of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    path: PathBuf,
    entries: HashMap<String, Value>,
}

impl Metadata {
    /// Pairs as if read from `path`, which error messages name.
    pub fn from_entries(path: &Path, entries: impl IntoIterator<Item = (String, Value)>) -> Self {
        Self { path: path.to_owned(), entries: entries.into_iter().collect() }
    }

    /// The file that the pairs come from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of `key`, if it is there.
    ///
    /// # Errors
    /// [`ZooError::Format`] when it is there with another type or out of the type's range.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => Err(ZooError::format(&self.path, format!("metadata {key:?} is not {}", T::KIND))),
        }
    }

    /// The value of `key`, which must be there.
    ///
    /// # Errors
    /// [`ZooError::Format`] when it is missing, has another type or is out of the type's range.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| ZooError::format(&self.path, format!("has no metadata {key:?}")))
    }

    /// All pairs, by key.
    pub fn sorted(&self) -> BTreeMap<&str, &Value> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value)).collect()
    }

    /// All keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

/// Types that a metadata value can be asked for as.
pub trait FromValue<'a>: Sized {
    /// What a value should be, for error messages: "a string".
    const KIND: &'static str;

    /// The value, if it has this type.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! from_value {
    ($type:ty, $kind:literal, $($pattern:pat => $result:expr),+) => {
        impl<'a> FromValue<'a> for $type {
            const KIND: &'static str = $kind;

            fn from_value(value: &'a Value) -> Option<Self> {
                match value {
                    $($pattern => $result,)+
                    _ => None,
                }
            }
        }
    };
}

from_value!(&'a str, "a string", Value::String(text) => Some(text));
from_value!(usize, "a number that is zero or more",
    Value::Unsigned(n) => usize::try_from(*n).ok(), Value::Signed(n) => usize::try_from(*n).ok());
from_value!(u32, "a number that fits 32 bits",
    Value::Unsigned(n) => u32::try_from(*n).ok(), Value::Signed(n) => u32::try_from(*n).ok());
from_value!(f32, "a float", Value::Float(x) => Some(*x as f32));
from_value!(bool, "true or false", Value::Bool(flag) => Some(*flag));
from_value!(&'a [i64], "an array of integers", Value::Array(Array::Integers(items)) => Some(items));
from_value!(&'a [f32], "an array of floats", Value::Array(Array::Floats(items)) => Some(items));
from_value!(&'a [bool], "an array of booleans", Value::Array(Array::Bools(items)) => Some(items));
from_value!(&'a [String], "an array of strings", Value::Array(Array::Strings(items)) => Some(items));

/// Reads `count` pairs.
pub(super) fn read(header: &mut HeaderReader<'_>, count: usize) -> Result<Metadata> {
    let mut entries = HashMap::new();
    for _ in 0..count {
        let key = header.string()?;
        let kind = header.u32()?;
        let value = value(header, &key, kind)?;
        if entries.insert(key.clone(), value).is_some() {
            return Err(header.file().malformed(format!("has metadata {key:?} twice")));
        }
    }
    Ok(Metadata { path: header.file().path().to_owned(), entries })
}

/// GGUF's number of the array type.
const ARRAY: u32 = 9;

fn value(header: &mut HeaderReader<'_>, key: &str, kind: u32) -> Result<Value> {
    if kind == ARRAY { array(header, key).map(Value::Array) } else { scalar(header, key, kind) }
}

fn scalar(header: &mut HeaderReader<'_>, key: &str, kind: u32) -> Result<Value> {
    Ok(match kind {
        0 => Value::Unsigned(header.bytes::<1>()?[0].into()),
        1 => Value::Signed(i8::from_le_bytes(header.bytes()?).into()),
        2 => Value::Unsigned(u16::from_le_bytes(header.bytes()?).into()),
        3 => Value::Signed(i16::from_le_bytes(header.bytes()?).into()),
        4 => Value::Unsigned(header.u32()?.into()),
        5 => Value::Signed(i32::from_le_bytes(header.bytes()?).into()),
        6 => Value::Float(f32::from_le_bytes(header.bytes()?).into()),
        7 => Value::Bool(header.bytes::<1>()?[0] != 0),
        8 => Value::String(header.string()?),
        10 => Value::Unsigned(header.u64()?),
        11 => Value::Signed(i64::from_le_bytes(header.bytes()?)),
        12 => Value::Float(f64::from_le_bytes(header.bytes()?)),
        _ => return Err(header.file().malformed(format!("metadata {key:?} has unknown type {kind}"))),
    })
}

fn array(header: &mut HeaderReader<'_>, key: &str) -> Result<Array> {
    let kind = header.u32()?;
    let min_bytes = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        _ => {
            return Err(header.file().malformed(format!("metadata {key:?} is an array of type {kind}")));
        }
    };
    let count = header.count("array elements", min_bytes)?;
    let elements = Elements { header, key, kind, count };
    match kind {
        6 | 12 => elements
            .read(|value| match value {
                Value::Float(x) => Some(x as f32),
                _ => None,
            })
            .map(Array::Floats),
        7 => elements
            .read(|value| match value {
                Value::Bool(flag) => Some(flag),
                _ => None,
            })
            .map(Array::Bools),
        8 => elements
            .read(|value| match value {
                Value::String(text) => Some(text),
                _ => None,
            })
            .map(Array::Strings),
        _ => elements
            .read(|value| match value {
                Value::Unsigned(n) => i64::try_from(n).ok(),
                Value::Signed(n) => Some(n),
                _ => None,
            })
            .map(Array::Integers),
    }
}

/// The elements of an array that are still to be read.
struct Elements<'h, 'f> {
    header: &'h mut HeaderReader<'f>,
    key: &'h str,
    kind: u32,
    count: usize,
}

impl Elements<'_, '_> {
    fn read<T>(self, convert: impl Fn(Value) -> Option<T>) -> Result<Vec<T>> {
        let Self { header, key, kind, count } = self;
        // Not reserved: the count is the file's word, and its elements may end before it.
        let mut elements = Vec::new();
        for _ in 0..count {
            let element = convert(scalar(header, key, kind)?);
            elements.push(element.ok_or_else(|| {
                header.file().malformed(format!("metadata {key:?} has an integer of 2^63 or more"))
            })?);
        }
        Ok(elements)
    }
}
