//! What a call's metadata says beside its message, with the names that HTTP uses.

use tonic::Response;
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::error::Error;
use crate::request::RawRequest;

pub(super) const REQUEST_ID: &str = "x-request-id";
const PROFILE: &str = "x-rheostat-profile";

/// Fills in the request's id and compression profile where its message left them out.
///
/// # Errors
/// [`crate::error::ErrorKind::InvalidArgument`] when a value is not printable ASCII.
pub(super) fn apply(metadata: &MetadataMap, raw: &mut RawRequest) -> Result<(), Error> {
    if raw.id.is_empty() {
        raw.id = text(metadata, REQUEST_ID)?.unwrap_or_default().to_owned();
    }
    if raw.compression.profile.is_none() {
        raw.compression.profile = text(metadata, PROFILE)?.filter(|p| !p.is_empty()).map(str::to_owned);
    }
    Ok(())
}

fn text<'a>(metadata: &'a MetadataMap, name: &'static str) -> Result<Option<&'a str>, Error> {
    let value = metadata.get(name).map(MetadataValue::to_str).transpose();
    value.map_err(|_| Error::invalid(name, format!("{name} must be printable ASCII")))
}

/// A response that repeats the request's id in its metadata.
pub(super) fn respond<T>(id: &str, message: T) -> Response<T> {
    let mut response = Response::new(message);
    // An id given in a message may hold what a header cannot; the message repeats it then.
    if let Ok(id) = MetadataValue::try_from(id) {
        response.metadata_mut().insert(REQUEST_ID, id);
    }
    response
}
