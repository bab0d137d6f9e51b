//! A request's output is the same whatever else runs beside it and however its steps are cut.

use super::*;

/// Greedy and seeded requests of many lengths, some with a common prefix, some with several choices.
fn mixed() -> Vec<GenerateRequest> {
    let system = "you are a helpful assistant of few words. ";
    let mut requests: Vec<_> = ["a", "hello", "the quick brown fox jumps over it", "日本語 and emoji 👩‍👩‍👧"]
        .into_iter()
        .map(|text| request(&format!("{system}{text}")))
        .collect();
    requests.push(request("short"));
    requests.push(GenerateRequest { n: 3, ..sampled("three choices", |p| p.temperature = 1.0) });
    requests.push(sampled(system, |p| (p.temperature, p.top_p, p.seed) = (1.3, 0.8, Some(11))));
    requests.push(sampled("penalties", |p| (p.repetition_penalty, p.presence_penalty) = (1.5, 0.5)));
    requests.push(sampled("logprobs", |p| (p.temperature, p.logprobs) = (0.7, Some(3))));
    requests.push(sampled("on and on", |p| p.ignore_eos = true));
    requests.push(sampled("at least", |p| (p.min_tokens, p.top_k, p.temperature) = (20, 40, 2.0)));
    requests.push(GenerateRequest { prompt_logprobs: true, n: 2, ..request(system) });
    requests
}

/// Runs all of [`mixed`] at once and compares each with its run alone.
#[track_caller]
fn assert_equals_solo_runs(config: &SchedulerConfig) -> Bench {
    let mut bench = Bench::new(config, ToyOptions::default());
    let requests = mixed();
    let mut streams: Vec<_> = requests.iter().map(|request| bench.submit(request)).collect();
    bench.finish();
    for (request, events) in requests.iter().zip(&mut streams) {
        let (received, alone) = (received(events), solo(request));
        assert!(alone.choices.iter().all(|choice| choice.end.is_some()) && alone.choices.len() == request.n);
        assert_eq!(received, alone, "{} under {config:?}", request.id);
    }
    bench
}

#[test]
fn other_requests_and_the_size_of_steps_change_nothing() {
    for max_num_batched_tokens in [3, 16, 512] {
        for prefix_caching in [true, false] {
            assert_equals_solo_runs(&SchedulerConfig { max_num_batched_tokens, prefix_caching, ..ROOMY });
        }
    }
}

#[test]
fn preemption_changes_nothing() {
    // The largest request needs 2 layers × ⌈(78 + 23) / 4⌉ = 52 pages.
    for max_num_batched_tokens in [3, 16, 512] {
        let tiny = SchedulerConfig { max_num_batched_tokens, num_pages: 60, ..ROOMY };
        let bench = assert_equals_solo_runs(&tiny);
        assert!(bench.num_preemptions() > 0, "a pool of 60 pages is not tight at {max_num_batched_tokens}");
        let line = format!("rheostat_preemptions_total {}", bench.num_preemptions());
        assert!(bench.metrics.render().contains(&line), "{}", bench.metrics.render());
    }
}

#[test]
fn the_choices_of_a_request_differ_and_the_first_is_the_only_ones() {
    let one = sampled("once upon a time", |p| p.temperature = 1.0);
    let many = solo(&GenerateRequest { n: 4, ..one.clone() });
    assert_eq!(many.choices[0], solo(&one).choices[0]);
    let texts: std::collections::HashSet<_> = many.choices.iter().map(|choice| &choice.text).collect();
    assert_eq!(texts.len(), 4);
}

#[test]
fn a_cached_prefix_changes_the_count_and_not_the_text() {
    let mut bench = Bench::new(&ROOMY, ToyOptions::default());
    let request = request("a prompt of some length");
    let mut runs = Vec::new();
    for cached in [0, 20] {
        let mut events = bench.submit(&request);
        bench.finish();
        let mut all = Received::default();
        while let Some(event) = events.try_next() {
            if let TokenEvent::Finished { usage, .. } = &event {
                assert_eq!((usage.prompt_tokens, usage.cached_tokens), (23, cached));
            }
            all.add(event);
        }
        runs.push(all);
    }
    assert_eq!(runs[0], runs[1]);
    // Another tenant's salt finds nothing.
    let salted = GenerateRequest { cache_salt: 1, ..request };
    let mut events = bench.submit(&salted);
    bench.finish();
    let last = std::iter::from_fn(|| events.try_next()).last();
    assert!(matches!(last, Some(TokenEvent::Finished { usage, .. }) if usage.cached_tokens == 0));
}
