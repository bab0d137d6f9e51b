//! `google.protobuf.Struct` as the JSON that chat templates expect.

use rheostat_proto::well_known::{Kind, Struct, Value};
use serde_json::{Map, Number, Value as Json};

use crate::error::Error;

/// Integers up to here are exact in the doubles of a `Struct`.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// The object. Nesting is bounded by the decoder of the message.
///
/// # Errors
/// [`crate::error::ErrorKind::InvalidArgument`] for a number that JSON does not have.
pub(super) fn object(param: &str, fields: Struct) -> Result<Map<String, Json>, Error> {
    fields.fields.into_iter().map(|(name, field)| Ok((name, value(param, field)?))).collect()
}

fn value(param: &str, value: Value) -> Result<Json, Error> {
    Ok(match value.kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(b)) => Json::Bool(b),
        Some(Kind::StringValue(s)) => Json::String(s),
        Some(Kind::NumberValue(x)) => Json::Number(number(param, x)?),
        Some(Kind::ListValue(list)) => {
            Json::Array(list.values.into_iter().map(|v| self::value(param, v)).collect::<Result<_, _>>()?)
        }
        Some(Kind::StructValue(fields)) => Json::Object(object(param, fields)?),
    })
}

/// Whole numbers become integers, so that a template prints `3`, not `3.0`.
fn number(param: &str, x: f64) -> Result<Number, Error> {
    if x.fract() == 0.0 && x.abs() <= MAX_EXACT {
        return Ok(Number::from(x as i64));
    }
    Number::from_f64(x)
        .ok_or_else(|| Error::invalid(param, format!("{param} holds a number that is not finite")))
}
