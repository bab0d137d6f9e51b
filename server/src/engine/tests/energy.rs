//! Joules on the running engine: they add up under a random soak, budgets end requests, resets are owned up to.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::*;
use crate::energy::meter::{Meter, Reading};
use crate::energy::{EnergyConfig, EnergySum, EnergyUse, Source};

/// A meter that says what a test wants: so much more at every reading, and a reset at one of them.
struct Scripted {
    start: Instant,
    reads: u64,
    joules: f64,
    step: fn(u64) -> f64,
    resets_at: Option<u64>,
    said: Arc<Mutex<f64>>,
}

impl Meter for Scripted {
    fn source(&self) -> Source {
        Source::Rapl
    }

    fn read(&mut self) -> Reading {
        let reset = self.resets_at == Some(self.reads);
        self.joules += (self.step)(self.reads);
        self.reads += 1;
        *self.said.lock().expect("not poisoned") = self.joules;
        Reading { at: self.start + Duration::from_millis(10 * self.reads), joules: self.joules, reset }
    }
}

/// Energy by a scripted meter, read after every step, and what the meter has said.
fn scripted(step: fn(u64) -> f64, resets_at: Option<u64>) -> (Arc<Energy>, Arc<Mutex<f64>>) {
    let said = Arc::new(Mutex::new(0.0));
    let meter =
        Scripted { start: Instant::now(), reads: 0, joules: 0.0, step, resets_at, said: Arc::clone(&said) };
    let metrics = Metrics::new(&ServedModel::default(), MetricsCompat::None);
    let config = EnergyConfig { period: Some(Duration::ZERO), idle: Some(20.0), ..EnergyConfig::default() };
    (Arc::new(Energy::new(Some(Box::new(meter)), &config, &metrics)), said)
}

/// What a finished request says that it was charged, over its choices.
fn charged(events: &mut EventReceiver) -> Vec<(FinishReason, usize, Option<EnergyUse>)> {
    let mut ends = Vec::new();
    while let Some(event) = events.try_next() {
        if let TokenEvent::Finished { reason, usage, .. } = event {
            ends.push((reason, usage.completion_tokens, usage.energy));
        }
    }
    ends
}

/// The sum of a histogram's observations, over all its series.
fn observed(metrics: &Metrics, name: &str) -> f64 {
    let sums = metrics.render();
    let sums = sums.lines().filter(|line| line.starts_with(&format!("{name}_sum")));
    sums.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Requests of every kind come, are cancelled and aborted, lose their pages and use up budgets, over a pool that
/// is too small for them. What they were charged, and idle, is what the meter said.
#[test]
fn requests_and_idle_add_up_to_the_meter_under_a_random_soak() {
    let tight = SchedulerConfig { max_num_batched_tokens: 48, max_num_seqs: 12, num_pages: 80, ..ROOMY };
    let mut preemptions = 0;
    for seed in 0..8u64 {
        let (energy, said) = scripted(|read| 0.5 + (read % 7) as f64 * 0.25, None);
        let before = *said.lock().expect("not poisoned");
        let mut bench = Bench::metered(&tight, ToyOptions::default(), Arc::clone(&energy));
        let mut state = seed;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut running = Vec::new();
        for number in 0..60 {
            for _ in 0..random(3) {
                let mut request = request(&"prompt ".repeat(1 + random(9) as usize));
                request.id = format!("{number}");
                request.max_tokens = 1 + random(60) as usize;
                request.n = 1 + random(3) as usize;
                request.budget.max_joules = (random(3) == 0).then(|| 0.5 + random(20) as f64);
                running.push(bench.submit(&request));
            }
            for _ in 0..random(6) {
                bench.engine.turn();
            }
            if random(4) == 0 && !running.is_empty() {
                running.swap_remove(random(running.len() as u64) as usize);
            }
            if random(4) == 0 {
                bench.engine.take(Command::Abort { id: format!("{}", random(60)) });
            }
            energy.tick();
        }
        bench.finish();
        bench.engine.turn();
        energy.tick();
        preemptions += bench.num_preemptions();
        let (totals, debt) = energy.totals().expect("a meter");
        let metered = *said.lock().expect("not poisoned") - before;
        let sum = observed(&bench.metrics, "rheostat_request_energy_joules") + totals.idle;
        assert!((sum / metered - 1.0).abs() < 1e-6, "seed {seed}: {sum} of {metered} J");
        assert!(
            totals.prefill > 0.0 && totals.decode > 0.0 && totals.idle > 0.0 && debt == 0.0,
            "{totals:?}"
        );
    }
    assert!(preemptions > 0, "the pool is tight");
}

#[test]
fn what_its_images_cost_is_in_a_requests_usage() {
    let [without, with, unknown] = [Some(0.0), Some(5.0), None].map(|image_joules| {
        let (energy, _) = scripted(|_| 2.0, None);
        let mut bench = Bench::metered(&ROOMY, ToyOptions::default(), energy);
        let mut events = bench.submit(&GenerateRequest { image_joules, n: 2, ..request("the same") });
        bench.finish();
        let mut sum = EnergySum::default();
        charged(&mut events).iter().for_each(|(.., energy)| sum.add(*energy));
        sum.total().map(|total| total.joules)
    });
    let difference = with.expect("known") - without.expect("known");
    assert!(unknown.is_none() && (difference - 5.0).abs() < 1e-9, "{with:?} {without:?}");
}

#[test]
fn a_request_ends_before_it_costs_more_than_it_may() {
    // 2 J a step, 0.2 of them idle: a step of one row costs 1.8 J.
    let (energy, _) = scripted(|_| 2.0, None);
    let mut bench = Bench::metered(&ROOMY, ToyOptions::default(), energy);
    let mut limited = request("limited");
    limited.sampling = Arc::new(SamplingParams { ignore_eos: true, ..(*limited.sampling).clone() });
    limited.budget.max_joules = Some(10.0);
    let mut events = bench.submit(&limited);
    bench.finish();
    let [(reason, tokens, Some(energy))] = charged(&mut events)[..] else { panic!("one choice, metered") };
    assert_eq!((reason, tokens), (FinishReason::MaxJoules, 5));
    assert!((energy.joules - 9.0).abs() < 1e-9 && energy.source == Source::Rapl, "{energy:?}");
    // All choices share one budget, and the text up to its end is that of a request without one.
    let mut shared = limited.clone();
    shared.n = 3;
    let mut events = bench.submit(&shared);
    bench.finish();
    let ends = charged(&mut events);
    let spent: f64 = ends.iter().map(|(.., energy)| energy.expect("metered").joules).sum();
    assert!(
        ends.len() == 3 && ends.iter().all(|(reason, ..)| *reason == FinishReason::MaxJoules),
        "{ends:?}"
    );
    assert!(spent <= 10.0, "{spent}");
    let mut whole = limited.clone();
    whole.budget = Budget::default();
    let mut events = bench.submit(&limited);
    bench.finish();
    let text = received(&mut events).choices[0].text.clone();
    assert!(!text.is_empty() && solo(&whole).choices[0].text.starts_with(&text));
}

#[test]
fn a_deadline_ends_requests_that_run_and_that_wait() {
    let config = SchedulerConfig { max_num_seqs: 1, ..ROOMY };
    let mut bench = Bench::new(&config, ToyOptions::default());
    let mut hurried = request("hurried");
    hurried.max_tokens = 1 << 14;
    let mut running = bench.submit(&hurried);
    hurried.id = "waiting".into();
    hurried.budget.deadline = Some(Instant::now() + Duration::from_secs(3600));
    let mut waiting = bench.submit(&hurried);
    hurried.id = "late".into();
    hurried.budget.deadline = Some(Instant::now());
    let mut late = bench.submit(&hurried);
    bench.engine.turn();
    assert_eq!(received(&mut late).reason(), Some(FinishReason::Deadline), "it never ran");
    let begun = received(&mut running);
    assert_eq!((begun.choices[0].tokens.len(), begun.reason()), (1, None));
    bench.engine.take(Command::Abort { id: "hurried".into() });
    bench.engine.turn();
    assert!(received(&mut waiting).reason().is_none(), "an hour is long");
    bench.engine.take(Command::Abort { id: "waiting".into() });
    bench.finish();
}

#[test]
fn what_ran_through_a_reset_reports_no_part_of_its_joules() {
    // The fourth reading: the first is taken when the meter is opened, the second when steps begin.
    let (energy, _) = scripted(|_| 1.0, Some(3));
    let mut bench = Bench::metered(&ROOMY, ToyOptions::default(), Arc::clone(&energy));
    let mut hit = bench.submit(&request("hit"));
    bench.finish();
    let [(_, tokens, None)] = charged(&mut hit)[..] else { panic!("unknown energy") };
    assert!(tokens > 2);
    let mut after = bench.submit(&request("after"));
    bench.finish();
    let [(.., Some(_))] = charged(&mut after)[..] else { panic!("metered again") };
    let rendered = bench.metrics.render();
    assert!(rendered.contains("rheostat_energy_unmetered_sequences_total 1"), "{rendered}");
    assert_eq!(energy.totals().expect("a meter").0.resets, 1);
}
