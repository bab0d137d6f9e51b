//! What a row of logits says about its end.

/// Of one distribution.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Signal {
    /// Probability of the end.
    pub end: f32,
    /// Entropy in nats.
    pub entropy: f32,
}

/// Lanes of partial sums: independent of each other, so that the compiler can use vectors.
const LANES: usize = 16;

/// The signal of `logits`, `[vocab_size]`, where `ends` end a sequence, each with what the client adds to its logit.
/// `None` when they are no distribution.
///
/// With `m` the maximum, `Z = Σ exp(x − m)` and `T = Σ (x − m) exp(x − m)`, the entropy is `ln Z − T / Z`.
pub fn signal(logits: &[f32], ends: &[(u32, f32)]) -> Option<Signal> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return None;
    }
    let (mut z, mut t) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut add = |lane: usize, logit: f32| {
        let x = logit - max;
        // Below e⁻⁸⁰ nothing counts; −∞ is a token that is banned. What is no number stays none.
        let x = if x < -80.0 { -80.0 } else { x };
        let e = x.exp();
        z[lane] += e;
        t[lane] += x * e;
    };
    let chunks = logits.chunks_exact(LANES);
    chunks.remainder().iter().for_each(|&logit| add(0, logit));
    for chunk in chunks {
        for (lane, &logit) in chunk.iter().enumerate() {
            add(lane, logit);
        }
    }
    let (z, t): (f32, f32) = (z.iter().sum(), t.iter().sum());
    let biased = |&(id, bias): &(u32, f32)| Some(logits.get(id as usize)? + bias);
    let end: f32 = ends.iter().filter_map(biased).map(|logit| (logit - max).exp() / z).sum();
    let signal = Signal { end: end.min(1.0), entropy: z.ln() - t / z };
    (signal.end.is_finite() && signal.entropy.is_finite()).then_some(signal)
}
