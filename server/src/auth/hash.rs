//! Keys and their hashes. A key is 256 random bits, so that a plain SHA-256 of it tells nothing about it:
//! there is no dictionary to try, and nothing for a salt or a slow hash to protect.

use std::fmt;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// What every key begins with, so that secret scanners and people recognise one.
const PREFIX: &str = "rheo-";

/// The SHA-256 of a key, as the configuration holds it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The hash of a key.
    pub fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// Whether both are the same, in a time that does not tell how much of them is.
    pub(super) fn matches(&self, other: &Self) -> Choice {
        self.0.ct_eq(&other.0)
    }
}

/// A fresh random key.
pub fn random_key() -> String {
    use rand::RngCore;
    let mut bits = [0; 32];
    rand::rng().fill_bytes(&mut bits);
    format!("{PREFIX}{}", hex(&bits))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for KeyHash {
    /// The configuration is logged; hashes are nobody's business even so.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(…)")
    }
}

impl std::str::FromStr for KeyHash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || "sha256 must be 64 hexadecimal digits; `rheostat key` makes a key and prints its hash";
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err(fail().into());
        }
        for (byte, index) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[index..index + 2], 16).map_err(|_| fail())?;
        }
        Ok(Self(bytes))
    }
}

impl<'de> serde::Deserialize<'de> for KeyHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
