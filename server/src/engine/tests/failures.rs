//! A request that cannot be computed fails alone.

use super::*;
use crate::error::ErrorKind;

/// The token at which the toy misbehaves.
const BAD: u32 = b'!' as u32;

#[track_caller]
fn assert_fails_alone(toy: ToyOptions, config: &SchedulerConfig, victim: &GenerateRequest) {
    let mut bench = Bench::new(config, toy);
    let healthy = [request("healthy"), sampled("healthy too", |p| p.temperature = 1.0)];
    let mut first = bench.submit(&healthy[0]);
    (0..3).for_each(|_| bench.engine.turn());
    let mut failed = bench.submit(victim);
    let mut second = bench.submit(&healthy[1]);
    bench.finish();
    let error = received(&mut failed).failed.expect("the victim fails");
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("could not be computed"), "{error}");
    assert_eq!([received(&mut first), received(&mut second)], healthy.each_ref().map(solo));
    // What the failed steps left in the pages is never read.
    let mut after = bench.submit(&healthy[0]);
    bench.finish();
    assert_eq!(received(&mut after), solo(&healthy[0]));
}

#[track_caller]
fn assert_every_victim_fails_alone(toy: ToyOptions) {
    let chunked = SchedulerConfig { max_num_batched_tokens: 5, ..ROOMY };
    for config in [&ROOMY, &chunked] {
        let victim = request("a bad prompt!");
        assert_fails_alone(toy, config, &victim);
        assert_fails_alone(toy, config, &GenerateRequest { n: 3, ..victim.clone() });
        assert_fails_alone(toy, config, &GenerateRequest { prompt_logprobs: true, ..victim });
    }
}

#[test]
fn a_step_that_fails() {
    assert_every_victim_fails_alone(ToyOptions { fails_on: Some(BAD), ..ToyOptions::default() });
}

#[test]
fn a_step_that_panics() {
    assert_every_victim_fails_alone(ToyOptions { panics_on: Some(BAD), ..ToyOptions::default() });
}

#[test]
fn logits_that_are_not_numbers() {
    assert_every_victim_fails_alone(ToyOptions { nan_on: Some(BAD), ..ToyOptions::default() });
}

#[test]
fn a_request_that_can_never_fit_is_refused() {
    let mut bench = Bench::new(&SchedulerConfig { num_pages: 20, ..ROOMY }, ToyOptions::default());
    let kept = request("fits");
    let mut fits = bench.submit(&kept);
    let mut refused = bench.submit(&GenerateRequest { max_tokens: 1000, n: 2, ..request("does not") });
    let error = received(&mut refused).failed.expect("it is refused at once");
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert!(error.message.contains("max_tokens"), "{error}");
    bench.finish();
    assert_eq!(received(&mut fits), solo(&kept));
}
