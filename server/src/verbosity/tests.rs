//! Who is flagged, and who is not; and what follows.

use std::sync::Arc;

use super::*;

const CLASS: Class = Class { is_chat: true, has_images: true };

fn act() -> Detector {
    Detector::new(VerbosityConfig { mode: VerbosityMode::Act, min_tokens: 256, grace_tokens: 64 })
}

/// Signals of an output whose end is out of sight, with this entropy.
fn far(entropy: f32) -> Signal {
    Signal { end: 1e-9, entropy }
}

/// Runs `tokens` tokens of an output through a detector, and says what was done about which.
fn run(
    detector: &mut Detector,
    tokens: usize,
    (entropy, period): (f32, u32),
    client: Option<&Arc<str>>,
) -> (Watch, Vec<(usize, Measures)>) {
    let mut watch = Watch::new(CLASS, Vec::new());
    let mut done = Vec::new();
    for i in 1..=tokens {
        if watch.wants_signal() {
            watch.look(far(entropy));
        }
        watch.sampled(i as u32 % period);
        done.extend(detector.judge(&mut watch, client).map(|measures| (i, measures)));
    }
    (watch, done)
}

/// Shows a detector outputs that end by themselves, of entropies around 2.
fn teach(detector: &mut Detector, lengths: impl Iterator<Item = usize>) {
    for (i, length) in lengths.enumerate() {
        let (watch, _) = run(detector, length, (1.9 + 0.05 * (i % 5) as f32, 1000), None);
        detector.ended(&watch, None, Ending::Itself);
    }
}

#[test]
fn the_signal_is_that_of_the_distribution() {
    let logits: Vec<f32> = (0..1003).map(|i| ((i * 37 % 101) as f32).sin() * 6.0).collect();
    let p: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp()).collect();
    let z: f64 = p.iter().sum();
    let entropy: f64 = -p.iter().map(|p| p / z * (p / z).ln()).sum::<f64>();
    let end = (p[3] + p[1002]) / z;
    let got = signal(&logits, &[(3, 0.0), (1002, 0.0), (9999, 0.0)]).expect("a distribution");
    assert!((f64::from(got.entropy) - entropy).abs() < 1e-4, "{got:?}, {entropy}");
    assert!((f64::from(got.end) / end - 1.0).abs() < 1e-4, "{got:?}, {end}");
    let banned = signal(&logits, &[(3, -100.0), (1002, -100.0)]).expect("a distribution");
    assert!(banned.end < 1e-20 && banned.entropy == got.entropy, "{banned:?}");
    // Flat, with tokens that are banned.
    let flat = [0.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0];
    let got = signal(&flat, &[(1, 0.0)]).expect("a distribution");
    assert!((got.entropy - 4f32.ln()).abs() < 1e-5 && got.end == 0.0, "{got:?}");
    assert_eq!(signal(&[f32::NEG_INFINITY; 20], &[(0, 0.0)]), None);
    assert_eq!(signal(&[1.0, f32::NAN, 2.0], &[(0, 0.0)]), None);
}

#[test]
fn only_what_is_longer_flatter_and_far_from_its_end_is_flagged() {
    let flagged = |tokens, signal| {
        let mut detector = act();
        teach(&mut detector, (0..100).map(|i| 20 + i));
        !run(&mut detector, tokens, signal, None).1.is_empty()
    };
    assert!(flagged(400, (3.0, 1000)), "flat, and longer than any");
    assert!(!flagged(256, (3.0, 1000)), "not longer than min_tokens");
    assert!(!flagged(400, (2.0, 1000)), "as usual as the others");
    assert!(flagged(400, (2.0, 7)), "runs in circles");
    // Nobody is flagged for entropy before anything is known; outputs that were cut teach nothing.
    let mut detector = act();
    let (watch, done) = run(&mut detector, 400, (3.0, 1000), None);
    assert!(done.is_empty());
    for _ in 0..100 {
        detector.ended(&watch, None, Ending::Cut);
    }
    assert!(run(&mut detector, 400, (5.0, 1000), None).1.is_empty());
    // Where long outputs are usual, they are.
    let mut detector = act();
    teach(&mut detector, (0..100).map(|i| 400 + i));
    assert!(run(&mut detector, 480, (3.0, 1000), None).1.is_empty());
    assert!(!run(&mut detector, 640, (3.0, 1000), None).1.is_empty());
    // An end in sight is no flood.
    let mut detector = act();
    teach(&mut detector, (0..100).map(|i| 20 + i));
    let mut watch = Watch::new(CLASS, Vec::new());
    for i in 0..400 {
        if watch.wants_signal() {
            watch.look(Signal { end: 0.01, entropy: 3.0 });
        }
        watch.sampled(i);
        assert_eq!(detector.judge(&mut watch, None), None);
    }
}

#[test]
fn measures_rise_from_priority_to_bias_to_the_end() {
    let mut detector = act();
    teach(&mut detector, (0..100).map(|i| 20 + i));
    let (_, done) = run(&mut detector, 600, (3.0, 1000), None);
    let (first, measures) = done[0];
    assert_eq!(first, 257, "at the first look behind min_tokens");
    assert_eq!(measures, Measures { is_new: true, demotes: true, bias: 0.0, stops: false });
    assert_eq!(done.iter().filter(|(_, m)| m.is_new || m.demotes).count(), 1);
    let biased = done.iter().find(|(_, m)| m.bias > 0.0).expect("its end is raised");
    assert_eq!((biased.0, biased.1.bias), (first + 64, 0.25));
    let stopped = done.iter().find(|(_, m)| m.stops).expect("it ends");
    assert_eq!((stopped.0, stopped.1.bias), (first + 192, 0.25 * 129.0));
    // Who only reports does nothing.
    let mut detector =
        Detector::new(VerbosityConfig { mode: VerbosityMode::Report, ..VerbosityConfig::default() });
    teach(&mut detector, (0..100).map(|i| 20 + i));
    let (_, done) = run(&mut detector, 600, (3.0, 1000), None);
    let none = Measures { is_new: false, ..Measures::default() };
    assert!(done[0].1.is_new && done[1..].iter().all(|(_, m)| *m == none));
}

#[test]
fn clients_of_flagged_requests_are_suspects_until_they_send_enough_others() {
    let (mallory, alice): (Arc<str>, Arc<str>) = ("mallory".into(), "alice".into());
    let mut detector = act();
    teach(&mut detector, (0..100).map(|i| 20 + i));
    run(&mut detector, 400, (3.0, 1000), Some(&mallory));
    assert!(
        detector.suspects(Some(&mallory)) && !detector.suspects(Some(&alice)) && !detector.suspects(None)
    );
    let mut others = 0;
    while detector.suspects(Some(&mallory)) {
        let (watch, _) = run(&mut detector, 30, (2.0, 1000), Some(&mallory));
        detector.ended(&watch, Some(&mallory), Ending::Itself);
        others += 1;
    }
    assert_eq!(others, 16);
}
