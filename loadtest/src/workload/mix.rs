//! Which compression requests ask for.

use std::str::FromStr;

use rand::Rng;
use serde_json::{Value, json};

/// One kind of request of a mix.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// How it is called in reports: as it was written.
    pub name: String,
    /// What requests have under `compression`; `None` leaves the field out, for servers that do not know it.
    pub compression: Option<Value>,
    /// How many of them, against the others'.
    pub weight: f64,
}

impl FromStr for Share {
    type Err = String;

    /// `PROFILE`, `{…}` or `none`, then `=WEIGHT` if it is not 1.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, weight) = match text.rsplit_once('=') {
            Some((name, weight)) => (name, weight.parse().map_err(|_| format!("`{weight}` is no weight"))?),
            None => (text, 1.0),
        };
        if !(f64::is_finite(weight) && weight > 0.0) {
            return Err(format!("the weight of `{name}` must be above 0"));
        }
        let compression = match name {
            "" => return Err("a plan needs a profile's name, a JSON object, or none".into()),
            "none" => None,
            json if json.starts_with('{') => {
                Some(serde_json::from_str(json).map_err(|e| format!("`{json}` is no JSON object: {e}"))?)
            }
            profile => Some(json!({"profile": profile})),
        };
        Ok(Self { name: name.to_owned(), compression, weight })
    }
}

/// The index of a share, drawn by weight.
pub(super) fn draw(shares: &[Share], rng: &mut impl Rng) -> usize {
    let mut left = rng.random::<f64>() * shares.iter().map(|share| share.weight).sum::<f64>();
    for (index, share) in shares.iter().enumerate() {
        left -= share.weight;
        if left < 0.0 {
            return index;
        }
    }
    shares.len() - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_names_or_objects_with_weights() {
        let share = |text: &str| text.parse::<Share>().expect(text);
        assert_eq!(share("eco").compression, Some(json!({"profile": "eco"})));
        let drop = share(r#"{"drop": {"attention": 2}}=0.5"#);
        assert_eq!((drop.weight, drop.compression), (0.5, Some(json!({"drop": {"attention": 2}}))));
        assert_eq!(share("none=3").compression, None);
        for text in ["", "eco=0", "eco=x", "{drop}"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }
}
