//! Stop texts, found across token borders. Only text that may still become a stop text is held back.

/// Watches one choice's text for its stop texts.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    /// Text not yet released: shorter than the longest stop text, between pushes.
    held: String,
}

/// What a push releases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Released {
    /// Text that no stop text can begin in any more.
    Text(String),
    /// The text up to a stop text (with it, if it is to be included), and the stop text.
    Stopped {
        /// The last text of the choice.
        text: String,
        /// Which stop text ended it.
        stop: String,
    },
}

impl StopMatcher {
    /// A matcher for non-empty `stops`; `include` keeps the one found in the output.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// Takes new text. With `armed` false (before `min_tokens`), text passes through unwatched.
    pub(crate) fn push(&mut self, text: &str, armed: bool) -> Released {
        self.held.push_str(text);
        if self.stops.is_empty() || !armed {
            return Released::Text(std::mem::take(&mut self.held));
        }
        if let Some((at, stop)) = self.first_match() {
            let stop = stop.to_owned();
            let end = if self.include { at + stop.len() } else { at };
            self.held.truncate(end);
            return Released::Stopped { text: std::mem::take(&mut self.held), stop };
        }
        let keep = self.longest_open_suffix();
        let held = self.held.split_off(self.held.len() - keep);
        Released::Text(std::mem::replace(&mut self.held, held))
    }

    /// The rest, when the choice ends otherwise.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stop text that ends first; of those that end together the one that begins first.
    fn first_match(&self) -> Option<(usize, &str)> {
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at, stop.as_str())));
        found.min_by_key(|(at, stop)| (at + stop.len(), *at))
    }

    /// Bytes at the end of the held text that are the beginning of a stop text.
    fn longest_open_suffix(&self) -> usize {
        let open = |stop: &String| {
            let longest = (stop.len() - 1).min(self.held.len());
            (1..=longest).rev().find(|&n| {
                self.held.as_bytes()[self.held.len() - n..] == stop.as_bytes()[..n]
                    && stop.is_char_boundary(n)
            })
        };
        self.stops.iter().filter_map(open).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: push by push, the earliest-ending stop text of everything so far.
    fn naive(text: &str, stops: &[String]) -> Option<(usize, String)> {
        let ends = stops.iter().filter_map(|s| text.find(s.as_str()).map(|at| (at + s.len(), at, s.clone())));
        ends.min_by_key(|(end, at, _)| (*end, *at)).map(|(_, at, stop)| (at, stop))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn equals_search_in_the_whole_text(
            chars in prop::collection::vec(prop::sample::select(vec!["a", "b", "é", "日"]), 0..40),
            stops in prop::collection::vec("[abé日]{1,4}", 0..4),
            include: bool,
        ) {
            let mut matcher = StopMatcher::new(stops.clone(), include);
            let longest = stops.iter().map(String::len).max().unwrap_or(1);
            let (mut out, mut whole, mut stopped) = (String::new(), String::new(), None);
            for c in chars {
                whole.push_str(c);
                match matcher.push(c, true) {
                    Released::Text(text) => out.push_str(&text),
                    Released::Stopped { text, stop } => {
                        out.push_str(&text);
                        stopped = Some(stop);
                        break;
                    }
                }
                prop_assert!(whole.len() - out.len() < longest, "holds back no more than may become a stop");
            }
            match (naive(&whole, &stops), stopped) {
                (Some((at, expected)), Some(stop)) => {
                    prop_assert_eq!(&stop, &expected);
                    let end = if include { at + stop.len() } else { at };
                    prop_assert_eq!(out, &whole[..end]);
                }
                (None, None) => prop_assert_eq!(out + &matcher.finish(), whole),
                (expected, found) => prop_assert!(false, "{:?} {:?}", expected, found),
            }
        }
    }
}
