//! What is charged adds up, whatever happens; and each gets its share.

use std::time::{Duration, Instant};

use model_zoo::models::ModelDims;
use proptest::prelude::*;

use super::ledger::Ledger;
use super::meter::Reading;
use super::work::{Costs, RowWork};
use super::{EnergySum, EnergyUse, Paid, Phase, Source, Work};

/// Something that happens to the books.
#[derive(Debug, Clone)]
enum Event {
    /// A step's rows: id, whether it is prefill, work.
    Step(Vec<(u64, bool, f64)>),
    Leave(u64),
    /// A reading after so many milliseconds and joules.
    Read(u64, f64),
    /// The same, where a counter was set back.
    Reset(u64),
    /// An image is being encoded from now on.
    Encode(u64),
    /// It has been, after so many milliseconds and joules, while steps run or not.
    Encoded(u64, (u64, f64), bool),
}

fn event() -> impl Strategy<Value = Event> {
    let row = (0u64..8, any::<bool>(), 0.001..1000.0f64);
    prop_oneof![
        6 => prop::collection::vec(row, 1..8).prop_map(Event::Step),
        2 => (0u64..8).prop_map(Event::Leave),
        5 => (1u64..3000, 0.0..200.0f64).prop_map(|(ms, joules)| Event::Read(ms, joules)),
        1 => (1u64..3000).prop_map(Event::Reset),
        2 => (0u64..3).prop_map(Event::Encode),
        3 => (0u64..3, (0u64..3000, 0.0..200.0f64), any::<bool>())
            .prop_map(|(id, read, steps)| Event::Encoded(id, read, steps)),
    ]
}

/// Runs `events` and returns what each id was charged, what it left without knowing, and the books.
fn run(events: &[Event], idle_watts: Option<f64>) -> ([f64; 8], [bool; 8], Ledger, f64) {
    let mut now = Reading { at: Instant::now(), joules: 0.0, reset: false };
    let mut ledger = Ledger::new(now, idle_watts, 0.5);
    let (mut charged, mut unknown, mut metered) = ([0.0; 8], [false; 8], 0.0);
    let events = events.iter().cloned().chain([Event::Read(100, 5.0)]);
    for event in events {
        match event {
            Event::Step(rows) => ledger.add(rows.into_iter().map(|(id, prefill, amount)| Work {
                id,
                phase: if prefill { Phase::Prefill } else { Phase::Decode },
                amount,
            })),
            Event::Leave(id) => match ledger.leave(id) {
                Some(joules) => charged[id as usize] += joules.iter().sum::<f64>(),
                None => unknown[id as usize] = true,
            },
            Event::Read(ms, joules) => {
                now = Reading {
                    at: now.at + Duration::from_millis(ms),
                    joules: now.joules + joules,
                    reset: false,
                };
                metered += joules;
                for &Paid { id, joules, .. } in ledger.close(now) {
                    charged[id as usize] += joules.expect("nothing was reset");
                }
            }
            Event::Encode(id) => ledger.encode(id, now.at),
            Event::Encoded(id, (ms, joules), steps_run) => {
                now.at += Duration::from_millis(ms);
                now.joules += joules;
                metered += joules;
                ledger.encoded(id, now, steps_run);
            }
            Event::Reset(ms) => {
                now = Reading { at: now.at + Duration::from_millis(ms), reset: true, ..now };
                for paid in ledger.close(now) {
                    assert_eq!(paid.joules, None);
                    unknown[paid.id as usize] = true;
                }
            }
        }
        let totals = ledger.totals();
        let next = [totals.prefill, totals.decode, totals.image, totals.idle];
        assert!(next.iter().all(|joules| *joules >= 0.0));
    }
    (charged, unknown, ledger, metered)
}

proptest! {
    /// The property that the meter's figures promise: requests and idle together are what was metered, but for
    /// what was charged too early, which the books name.
    #[test]
    fn requests_and_idle_are_what_the_meter_says(
        events in prop::collection::vec(event(), 1..200),
        idle_watts in prop_oneof![Just(None), (0.0..50.0f64).prop_map(Some)],
    ) {
        let (charged, _, ledger, _) = run(&events, idle_watts);
        let totals = ledger.totals();
        let requests: f64 = charged.iter().sum();
        let tolerance = 1e-9 * (1.0 + totals.metered);
        prop_assert!((requests - totals.prefill - totals.decode).abs() < tolerance);
        let all = requests + totals.image + totals.idle;
        prop_assert!((all - totals.metered - ledger.debt()).abs() < tolerance);
        let resets = events.iter().filter(|event| matches!(event, Event::Reset(_))).count() as u64;
        prop_assert_eq!(totals.resets, resets);
    }

    /// A meter that is read after every step owes nothing at any time: the sum is exact.
    #[test]
    fn read_after_every_step_the_sum_is_exact(
        steps in prop::collection::vec((prop::collection::vec((0u64..8, any::<bool>(), 0.001..1000.0f64), 1..8), 1u64..100, 0.0..50.0f64), 1..100),
    ) {
        let events: Vec<_> = steps
            .into_iter()
            .flat_map(|(rows, ms, joules)| [Event::Step(rows), Event::Read(ms, joules), Event::Leave(3)])
            .collect();
        let (charged, unknown, ledger, metered) = run(&events, Some(10.0));
        let totals = ledger.totals();
        prop_assert_eq!((ledger.debt(), totals.resets, unknown), (0.0, 0, [false; 8]));
        let sum = charged.iter().sum::<f64>() + totals.idle;
        prop_assert!((sum - metered).abs() < 1e-9 * (1.0 + metered), "{} of {}", sum, metered);
    }

    /// A meter that moves every 100 ms, read as it moves, while requests come and go within its windows: what is
    /// charged too early stays a small part.
    #[test]
    fn a_slow_meter_stays_within_two_per_cent(seed in any::<u64>()) {
        let mut state = seed;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut events = Vec::new();
        for _ in 0..400 {
            for _ in 0..random(12) {
                let rows = (0..1 + random(6)).map(|_| (random(8), random(4) == 0, 50.0 + random(100) as f64));
                events.push(Event::Step(rows.collect()));
                events.push(Event::Leave(random(8)));
            }
            events.push(Event::Read(100, 20.0 + random(20) as f64));
        }
        let (charged, _, ledger, metered) = run(&events, Some(100.0));
        let sum = charged.iter().sum::<f64>() + ledger.totals().idle;
        prop_assert!((sum / metered - 1.0).abs() < 0.02, "{} of {}", sum, metered);
    }
}

fn at(start: Instant, ms: u64, joules: f64) -> Reading {
    Reading { at: start + Duration::from_millis(ms), joules, reset: false }
}

#[test]
fn an_image_takes_its_threads_share_of_every_window_that_it_is_encoded_in() {
    let start = Instant::now();
    let ms = |ms| start + Duration::from_millis(ms);
    let mut ledger = Ledger::new(at(start, 0, 0.0), Some(10.0), 0.5);
    let row = Work { id: 1, phase: Phase::Decode, amount: 1.0 };
    // Alone from 100 ms on: 10 J of 11, of which idle takes one.
    ledger.encode(7, ms(100));
    assert!(ledger.close(at(start, 200, 12.0)).is_empty());
    // Beside a step of twice its threads: a third of 6 J.
    ledger.add([row]);
    assert_eq!(ledger.close(at(start, 300, 19.0))[0].joules.map(|joules| joules.round()), Some(4.0));
    let charged = ledger.encoded(7, at(start, 350, 25.5), true).expect("nothing was reset");
    ledger.add([row]);
    let paid = ledger.close(at(start, 400, 30.0))[0].joules.expect("nothing was reset");
    // What it was charged when it ended: a third of the 6 J that the window had drawn by then.
    assert!((charged - (10.0 + 2.0 + 2.0)).abs() < 1e-9 && (paid - 8.0).abs() < 1e-9, "{charged} {paid}");
    let totals = ledger.totals();
    let sum = totals.prefill + totals.decode + totals.image + totals.idle;
    assert!((sum - 30.0).abs() < 1e-9 && totals.image == charged, "{totals:?}");

    // Set back while it ran: nobody knows. And a meter that does not see the encoder charges nothing for it.
    ledger.encode(8, ms(400));
    ledger.close(Reading { reset: true, ..at(start, 500, 30.0) });
    assert_eq!(ledger.encoded(8, at(start, 600, 40.0), false), None);
    let mut blind = Ledger::new(at(start, 0, 0.0), Some(10.0), 0.0);
    blind.encode(9, start);
    assert_eq!(blind.encoded(9, at(start, 100, 50.0), false), Some(0.0));
}

#[test]
fn idle_power_stays_apart_and_is_learned() {
    let start = Instant::now();
    let mut ledger = Ledger::new(at(start, 0, 0.0), None, 0.5);
    // A second at 40 W with nothing to do.
    assert!(ledger.close(at(start, 1000, 40.0)).is_empty());
    // A second at 100 W: 60 W of them are the requests', three parts to one.
    ledger.add([
        Work { id: 1, phase: Phase::Decode, amount: 3.0 },
        Work { id: 2, phase: Phase::Prefill, amount: 1.0 },
    ]);
    let paid = ledger.close(at(start, 2000, 140.0)).to_vec();
    assert_eq!(paid.iter().map(|p| p.joules).collect::<Vec<_>>(), [Some(45.0), Some(15.0)]);
    let totals = ledger.totals();
    assert_eq!((totals.decode, totals.prefill, totals.idle, totals.metered), (45.0, 15.0, 80.0, 140.0));
    // One that leaves early pays at the rate of before, 15 J; the other has the rest of 60 J.
    ledger.add([1, 2].map(|id| Work { id, phase: Phase::Decode, amount: 1.0 }));
    assert_eq!(ledger.leave(1), Some([0.0, 15.0]));
    assert_eq!(ledger.close(at(start, 3000, 240.0))[0].joules, Some(45.0));
}

#[test]
fn an_unknown_part_makes_an_unknown_sum() {
    let own = |joules| Some(EnergyUse { joules, source: Source::Rapl });
    let sum = |parts: &[Option<EnergyUse>]| {
        let mut sum = EnergySum::default();
        parts.iter().for_each(|part| sum.add(*part));
        sum.total().map(|sum| sum.joules)
    };
    assert_eq!(sum(&[own(1.0), own(2.0)]), Some(3.0));
    assert_eq!(sum(&[own(1.0), None, own(2.0)]), None);
    assert_eq!(sum(&[None, own(2.0)]), None);
    assert_eq!(sum(&[]), None);
}

/// A model of 10 layers: attention 1,000 weights, FFN 3,000, output 10,000; a byte a weight.
fn costs() -> Costs {
    Costs::of(&ModelDims {
        architecture: String::new(),
        num_layers: 10,
        hidden_size: 100,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        vocab_size: 100,
        max_context: 0,
        weight_bytes: 50_000,
        sublayer_weights: [1000, 3000],
    })
    .with_byte_macs(2.0)
}

/// A decode row that runs `layers` layers after `kv` slots in each.
fn decode(layers: u64, kv: u64) -> RowWork {
    RowWork { tokens: 1, sublayers: [layers; 2], logits: 1, kv_slots: layers * kv }
}

#[test]
fn work_follows_the_formulas() {
    let shares = |rows: &[RowWork]| costs().shares(rows).collect::<Vec<_>>();
    // Alone: all weights (50,000 B), 10 slots written of 64 B, 50,000 multiply-accumulates, half a slot of 64 in
    // each layer, and one for the token.
    let alone = 2.0 * (50_000.0 + 640.0) + 50_000.0 + 64.0 * 5.0 + 1.0;
    assert_eq!(shares(&[decode(10, 0)]), [alone]);
    // Two share the weights' traffic, not the rest.
    assert_eq!(shares(&[decode(10, 0); 2]), [alone - 50_000.0; 2]);
    // KV that is read costs its row alone: 100 slots in 10 layers.
    let [long, short] = shares(&[decode(10, 100), decode(10, 0)])[..] else { panic!("two rows") };
    assert_eq!(long - short, 2.0 * 64_000.0 + 64.0 * 1000.0);
    // A row that runs half of the layers needs 30,000 B of the weights: 3 of 8 parts.
    let [half, whole] = shares(&[decode(5, 0), decode(10, 0)])[..] else { panic!("two rows") };
    assert_eq!(half, 2.0 * (50_000.0 * 3.0 / 8.0 + 320.0) + 30_000.0 + 64.0 * 2.5 + 1.0);
    assert!(half < 0.65 * whole, "{half} of {whole}");
    // A prompt's chunk needs the weights once, and computes every token.
    let prompt = RowWork { tokens: 50, sublayers: [500, 500], logits: 0, kv_slots: 0 };
    let compute = 50.0 * 40_000.0 + 64.0 * 50.0 * 250.0 + 50.0;
    assert_eq!(shares(&[prompt]), [2.0 * (40_000.0 + 500.0 * 64.0) + compute]);
    assert!(shares(&[]).is_empty());
}
