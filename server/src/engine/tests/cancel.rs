//! Dropping a request's events frees everything that it holds, within one step.

use super::*;

/// Runs `kept`, lets `victim` come and drops its events after `turns` more turns. One turn later the
/// engine holds what one that has never seen the victim holds, and in the end `kept` has its text.
#[track_caller]
fn assert_leaves_nothing(config: &SchedulerConfig, victim: &GenerateRequest, turns: usize) {
    let config = SchedulerConfig { prefix_caching: false, ..config.clone() };
    let kept = request("the one that stays");
    let mut bench = Bench::new(&config, ToyOptions::default());
    let mut untouched = Bench::new(&config, ToyOptions::default());
    let (mut events, _keep) = (bench.submit(&kept), untouched.submit(&kept));
    for bench in [&mut bench, &mut untouched] {
        (0..3).for_each(|_| bench.engine.turn());
    }

    let gone = bench.submit(victim);
    for bench in [&mut bench, &mut untouched] {
        (0..turns).for_each(|_| bench.engine.turn());
    }
    assert_eq!(bench.engine.choices.len(), 1 + victim.n, "the victim lives until it is cancelled");
    drop(gone);
    bench.engine.turn();
    untouched.engine.turn();
    assert_eq!(bench.engine.choices.len(), 1);
    assert_eq!(bench.pages_used(), untouched.pages_used());
    let stats = bench.engine.scheduler.stats();
    assert_eq!((stats.running, stats.waiting), (1, 0));
    let used = format!("rheostat_kv_pages{{state=\"used\"}} {}", stats.pages_used);
    assert!(bench.metrics.render().contains(&used), "the gauges say so");

    bench.finish();
    assert_eq!(received(&mut events), solo(&kept));
}

fn endless(prompt: &str) -> GenerateRequest {
    GenerateRequest { max_tokens: 1000, ..sampled(prompt, |p| p.ignore_eos = true) }
}

#[test]
fn in_the_queue() {
    let one_seat = SchedulerConfig { max_num_seqs: 1, ..ROOMY };
    assert_leaves_nothing(&one_seat, &endless("waits for a seat"), 2);
}

#[test]
fn before_its_first_step() {
    assert_leaves_nothing(&ROOMY, &endless("never runs"), 0);
}

#[test]
fn in_prefill() {
    let slow = SchedulerConfig { max_num_batched_tokens: 8, ..ROOMY };
    assert_leaves_nothing(&slow, &endless(&"a long prompt ".repeat(20)), 3);
}

#[test]
fn in_decode() {
    assert_leaves_nothing(&ROOMY, &endless("decodes"), 9);
}

#[test]
fn all_choices_at_once() {
    for turns in [1, 2, 9] {
        assert_leaves_nothing(&ROOMY, &GenerateRequest { n: 5, ..endless("many choices") }, turns);
    }
    let few_seats = SchedulerConfig { max_num_seqs: 3, ..ROOMY };
    assert_leaves_nothing(&few_seats, &GenerateRequest { n: 5, ..endless("some run and some wait") }, 9);
}

#[test]
fn an_abort_ends_with_what_there_is() {
    let mut bench = Bench::new(&ROOMY, ToyOptions::default());
    let (victim, kept) = (endless("aborted"), request("not aborted"));
    let (mut aborted, mut other) = (bench.submit(&victim), bench.submit(&kept));
    (0..10).for_each(|_| bench.engine.turn());
    bench.engine.take(Command::Abort { id: "unknown".into() });
    bench.engine.take(Command::Abort { id: "aborted".into() });
    let aborted = received(&mut aborted);
    assert_eq!(aborted.reason(), Some(FinishReason::Abort));
    assert_eq!(aborted.choices[0].tokens, solo(&victim).choices[0].tokens[..10]);
    bench.finish();
    assert_eq!(received(&mut other), solo(&kept));
}
