//! `data:` URLs (RFC 2397) in base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const SCHEME: &str = "data:";

/// Whether `url` is one.
pub(super) fn is(url: &str) -> bool {
    url.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
}

/// The bytes of a data URL, `max_bytes` at most. What they are is decided by looking at them; the media type
/// only has to be an image's.
///
/// # Errors
/// A sentence.
pub(super) fn decode(url: &str, max_bytes: usize) -> Result<Vec<u8>, String> {
    const FORM: &str = "a data URL has the form data:image/png;base64,…";
    let Some((media, data)) = url[SCHEME.len()..].split_once(',') else { return Err(FORM.into()) };
    let mut parts = media.split(';');
    let kind = parts.next().unwrap_or_default().trim();
    if !kind.is_empty() && !kind.to_ascii_lowercase().starts_with("image/") {
        return Err(format!("the data URL is of type {kind:.64?}, which is no image"));
    }
    if !parts.next_back().is_some_and(|last| last.trim().eq_ignore_ascii_case("base64")) {
        return Err(FORM.into());
    }
    if data.len() / 4 * 3 > max_bytes + 3 {
        return Err(format!(
            "it has about {} bytes; {max_bytes} are allowed (images.max_bytes)",
            data.len() / 4 * 3
        ));
    }
    STANDARD.decode(data.trim()).map_err(|e| format!("its base64 is malformed: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_urls_are_read_or_refused_with_a_reason() {
        assert_eq!(decode("data:image/png;base64,aGk=", 10), Ok(b"hi".to_vec()));
        assert_eq!(decode("DATA:image/jpeg;name=x.jpg;base64,aGk=", 10), Ok(b"hi".to_vec()));
        assert_eq!(decode("data:;base64,aGk=", 2), Ok(b"hi".to_vec()));
        for (url, says) in [
            ("data:image/png;base64", "form"),
            ("data:image/png,plain", "form"),
            ("data:text/html;base64,aGk=", "no image"),
            ("data:image/png;base64,a", "malformed"),
            ("data:image/png;base64,!!!!", "malformed"),
            ("data:image/png;base64,aGkgdGhlcmUgdGhpcyBpcyBsb25n", "are allowed"),
        ] {
            let error = decode(url, 4).expect_err(url);
            assert!(error.contains(says), "{url}: {error}");
        }
        assert!(is("data:x") && !is("http://data:") && !is("dat"));
    }
}
