//! Server-sent events, as OpenAI's API uses them: every event is one `data` line.

/// Bytes of a line at most: a server that never ends a line must not fill the memory.
const MAX_LINE: usize = 4 << 20;

/// What came of the bytes so far.
#[derive(Debug, Default)]
pub(super) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The data of every event that `bytes` complete; `None` when a line is too long or no text.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Option<Vec<String>> {
        self.rest.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = std::str::from_utf8(&line).ok()?.trim_end_matches(['\r', '\n']);
            if let Some(data) = line.strip_prefix("data:") {
                events.push(data.strip_prefix(' ').unwrap_or(data).to_owned());
            }
        }
        (self.rest.len() <= MAX_LINE).then_some(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_however_the_bytes_are_cut() {
        let text = ": keep-alive\n\ndata: {\"a\": \"é\"}\r\n\r\ndata:[DONE]\n\n".as_bytes();
        for cut in 0..text.len() {
            let mut lines = Lines::default();
            let mut events = lines.push(&text[..cut]).expect("text");
            events.extend(lines.push(&text[cut..]).expect("text"));
            assert_eq!(events, ["{\"a\": \"é\"}", "[DONE]"], "cut at {cut}");
        }
        assert_eq!(Lines::default().push(&vec![b'x'; MAX_LINE + 1]), None);
    }
}
