//! Text traces: a line of what is seen, `SECOND key=value…`, then what must be chosen, and the move if there was
//! one. Keys are `tpot`, `ttft` (milliseconds), `waiting`, `starts` (a second), `kv`, `watts`.

use crate::governor::front::{Front, Point};
use crate::governor::policy::{Observed, Policy, State};

/// Runs `trace` over the points `front` (`NAME LOSS WORK KV | …`) under a policy made as `config` says.
#[track_caller]
pub(super) fn check(front: &str, config: &str, trace: &str) {
    let front = Front::new(front.split('|').map(point).collect(), number(config, "floor").unwrap_or(1.0));
    let policy = Policy {
        ttft_ms: number(config, "ttft").expect("a target"),
        tpot_ms: number(config, "tpot").expect("a target"),
        cap_watts: number(config, "cap"),
        hold_s: number(config, "hold").unwrap_or(2.0),
        calm_s: number(config, "calm").unwrap_or(10.0),
    };
    let mut state = State::default();
    let mut actual = Vec::new();
    let expected: Vec<&str> = trace.lines().map(str::trim).collect();
    for line in expected.iter().filter(|line| !line.starts_with("=>")) {
        let (next, moved) = policy.decide(&front, &state, &observed(line));
        state = next;
        let name = |index: usize| &*front.points()[index].name;
        let moved = moved.map(|m| {
            let (from, to, reason, pressure) = (name(m.from), name(m.to), m.reason.as_str(), m.pressure);
            format!(" | {from} → {to} for {reason} at {pressure:.2}")
        });
        actual.extend([(*line).to_owned(), format!("=> {}{}", name(state.point), moved.unwrap_or_default())]);
    }
    assert!(actual == expected, "the trace is\n{}\n", actual.join("\n"));
}

fn point(text: &str) -> Point {
    let words: Vec<_> = text.split_whitespace().collect();
    let number = |index: usize| words[index].parse().expect("a number");
    Point { name: words[0].into(), perplexity_increase: number(1), work: number(2), kv: number(3) }
}

fn observed(line: &str) -> Observed {
    let get = |key| number(line, key);
    Observed {
        now_s: line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a second"),
        waiting: get("waiting").unwrap_or(0.0) as usize,
        starts_per_s: get("starts").unwrap_or(0.0),
        ttft_ms: get("ttft"),
        tpot_ms: get("tpot"),
        kv_used: get("kv").unwrap_or(0.0),
        watts: get("watts"),
    }
}

fn number(text: &str, key: &str) -> Option<f64> {
    let word = text.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    word.map(|value| value.parse().expect("a number"))
}
