//! Memory budgets change under running requests, and every part of a text is that of a solo run with the blocks by
//! which it says that it was made, changed where it says so.

use model_zoo::models::toy::ToyStackOptions;

use super::*;
use crate::error::ErrorKind;
use crate::memory::OnShrink;
use crate::request::Served;

const STACK: ToyStackOptions =
    ToyStackOptions { num_blocks: 40, held: 40, block_bytes: 4 << 10, unreadable: None };

fn toy(stack: ToyStackOptions) -> ToyOptions {
    ToyOptions { stack: Some(stack), ..ToyOptions::default() }
}

/// Bytes of a stack's first `blocks` blocks and the base.
fn bytes(blocks: usize) -> u64 {
    (1 << 20) + (blocks * STACK.block_bytes) as u64
}

/// A greedy request that does not end by itself.
fn long(prompt: &str, max_tokens: usize) -> GenerateRequest {
    GenerateRequest { max_tokens, ..sampled(prompt, |p| (p.temperature, p.ignore_eos) = (0.0, true)) }
}

impl Bench {
    fn set_weights(&mut self, bytes: u64) -> Result<u64, Error> {
        self.engine.set_memory(&MemoryTargets { weights: Some(bytes), kv: None })
    }

    fn set_kv(&mut self, pages: usize) -> Result<u64, Error> {
        let page = self.engine.kv.layout().page_bytes();
        self.engine.set_memory(&MemoryTargets { weights: None, kv: Some((pages * page) as u64) })
    }

    fn on_shrink(mut self, on_shrink: OnShrink) -> Self {
        self.engine.budgets.on_shrink = on_shrink;
        self
    }

    /// Tokens that the only request has sampled.
    fn sampled(&self, request: &GenerateRequest) -> usize {
        let id = self.engine.choices.keys().next().expect("a live request");
        self.engine.scheduler.tokens(*id).map_or(0, |tokens| tokens.len() - request.prompt.len())
    }

    fn held(&mut self) -> usize {
        self.engine.model.elastic().map_or(0, |elastic| elastic.held())
    }

    fn turns(&mut self, count: usize) {
        (0..count).for_each(|_| self.engine.turn());
    }
}

/// What a request sent, and the parts of its first choice.
fn parts(events: &mut EventReceiver) -> (Vec<u32>, Vec<Served>, usize) {
    let (mut tokens, mut served, mut moved_down) = (Vec::new(), Vec::new(), 0);
    while let Some(event) = events.try_next() {
        match event {
            TokenEvent::Delta { tokens: more, .. } => tokens.extend(more.iter().map(|t| t.token)),
            TokenEvent::Finished { usage, .. } => (served, moved_down) = (usage.served, usage.moved_down),
            TokenEvent::Failed(error) => panic!("{error}"),
            TokenEvent::Prompt { .. } => {}
        }
    }
    (tokens, served, moved_down)
}

/// Compares the parts with solo runs: one from each part that was computed from the start, whose blocks are taken at
/// the same tokens as those of the parts that go on after it.
#[track_caller]
fn assert_equals_solo_parts(request: &GenerateRequest, (tokens, served): (&[u32], &[Served])) {
    assert_eq!(served.iter().map(|part| part.tokens).sum::<usize>(), tokens.len());
    assert!(!served[0].continues);
    let mut done = 0;
    for run in served.chunk_by(|_, next| next.continues) {
        let stack = ToyStackOptions { held: run[0].blocks, ..STACK };
        let mut alone = Bench::new(&ROOMY, toy(stack)).on_shrink(OnShrink::Continue);
        let prompt = request.prompt.iter().chain(&tokens[..done]).copied().collect();
        let len = run.iter().map(|part| part.tokens).sum();
        let again = GenerateRequest { prompt, max_tokens: len, ..request.clone() };
        let mut events = alone.submit(&again);
        let mut sampled = 0;
        for [part, next] in run.array_windows() {
            sampled += part.tokens;
            while alone.engine.choices.is_empty() || alone.sampled(&again) < sampled {
                alone.engine.turn();
            }
            alone.set_weights(bytes(next.blocks)).expect("a budget that fits");
        }
        alone.finish();
        assert_eq!(parts(&mut events).0, tokens[done..done + len], "{run:?} of {}", request.id);
        done += len;
    }
}

#[test]
fn growing_leaves_who_runs_alone_and_serves_the_next_with_more() {
    let mut bench = Bench::new(&ROOMY, toy(ToyStackOptions { held: 7, ..STACK }));
    let [first, second] = [long("the first", 60), long("the second", 20)];
    let mut events = bench.submit(&first);
    bench.turns(5);
    bench.set_weights(bytes(30)).expect("a budget that fits");
    while bench.held() < 30 {
        bench.engine.turn();
    }
    let mut later = bench.submit(&second);
    bench.finish();
    for (request, events, blocks) in [(&first, &mut events, 7), (&second, &mut later, 30)] {
        let (tokens, served, moved_down) = parts(events);
        let levels = 1.0 + blocks as f32 / 4.0;
        assert_eq!(served, [Served { blocks, levels, tokens: request.max_tokens, continues: false }]);
        assert_eq!(moved_down, 0);
        assert_equals_solo_parts(request, (&tokens, &served));
    }
}

#[test]
fn a_shrink_moves_down_only_who_has_what_goes_and_tells_so() {
    for on_shrink in [OnShrink::Continue, OnShrink::Recompute] {
        shrink_under_two(on_shrink);
    }
}

fn shrink_under_two(on_shrink: OnShrink) {
    let mut bench = Bench::new(&ROOMY, toy(ToyStackOptions { held: 5, ..STACK })).on_shrink(on_shrink);
    let requests = [long("with few blocks", 40), long("with many blocks", 40)];
    let mut few = bench.submit(&requests[0]);
    bench.turns(1);
    bench.set_weights(u64::MAX).expect("a budget that fits");
    while bench.held() < 40 {
        bench.engine.turn();
    }
    let mut many = bench.submit(&requests[1]);
    bench.turns(6);
    bench.set_weights(bytes(9) + 5).expect("a budget that fits");
    while bench.held() > 9 {
        bench.engine.turn();
    }
    bench.finish();
    let (tokens, served, moved_down) = parts(&mut few);
    assert_eq!((served.len(), moved_down), (1, 0));
    assert_equals_solo_parts(&requests[0], (&tokens, &served));
    let (tokens, served, moved_down) = parts(&mut many);
    let blocks: Vec<_> = served.iter().map(|part| part.blocks).collect();
    assert_eq!((blocks, moved_down), (vec![40, 9], 1));
    let keeps = on_shrink == OnShrink::Continue;
    assert_eq!(served[1].continues, keeps);
    assert_eq!(bench.num_preemptions(), u64::from(!keeps));
    assert_equals_solo_parts(&requests[1], (&tokens, &served));
    let page = bench.metrics.render();
    assert!(page.contains("rheostat_sequences_moved_down_total 1"), "{page}");
    assert!(page.contains("rheostat_weight_blocks{state=\"held\"} 9"), "{page}");
    assert!(page.contains(&format!("rheostat_memory_held_bytes{{kind=\"weights\"}} {}", bytes(9))), "{page}");
}

#[test]
fn weights_that_cannot_be_read_stop_and_hold_what_was_held() {
    let unreadable = ToyStackOptions { held: 4, unreadable: Some(11), ..STACK };
    let mut bench = Bench::new(&ROOMY, toy(unreadable));
    let request = long("goes on", 50);
    let mut events = bench.submit(&request);
    bench.set_weights(bytes(20)).expect("a budget that fits");
    bench.finish();
    assert_eq!(bench.held(), 11);
    let status = bench.engine.budgets.watch().borrow().clone();
    assert!(status.is_settled() && !status.is_reached());
    assert!(status.weights.error.is_some_and(|error| error.contains("block 11")));
    // Another budget, which can be reached, clears it.
    bench.set_weights(bytes(10)).expect("a budget that fits");
    bench.turns(1);
    let status = bench.engine.budgets.watch().borrow().clone();
    assert!(status.is_reached() && status.weights.error.is_none() && bench.held() == 10);
    assert_eq!(parts(&mut events).0.len(), 50);
}

#[test]
fn a_budget_that_cannot_be_served_with_is_refused_with_the_least_figure() {
    let mut elastic = Bench::new(&ROOMY, toy(STACK));
    let mut whole = Bench::new(&ROOMY, ToyOptions::default());
    for (refused, figure) in [
        (elastic.set_weights(bytes(0) - 1), "at least 1048576 bytes (1.00 MiB)"),
        (elastic.set_kv(1), "at least 64 bytes"),
        (elastic.set_kv(usize::MAX >> 8), "the most that this machine can hold"),
        (whole.set_kv(0), "at least 64 bytes"),
    ] {
        let error = refused.expect_err(figure);
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(error.message.contains(figure), "{error}");
    }
    assert_eq!(elastic.held(), 40);
    assert!(whole.set_weights(1).is_ok(), "the toy without a stack has no weights");
}

#[test]
fn a_shrinking_pool_fails_nobody_and_gives_its_storage_back() {
    for prefix_caching in [true, false] {
        let config = SchedulerConfig { num_pages: 4000, prefix_caching, ..ROOMY };
        let mut bench = Bench::new(&config, ToyOptions::default());
        let requests: Vec<_> = (0..12).map(|i| long(&format!("request {i} of twelve"), 40 + 7 * i)).collect();
        let mut streams: Vec<_> = requests.iter().map(|request| bench.submit(request)).collect();
        bench.turns(20);
        for pages in [300, 100, 2500, 70, 160] {
            bench.set_kv(pages).expect("a budget that fits");
            bench.turns(9);
            assert_eq!(bench.engine.kv.num_pages(), bench.engine.scheduler.num_pages());
        }
        bench.set_kv(2).expect("a budget that fits");
        bench.finish();
        assert_eq!(bench.engine.kv.num_pages(), 2, "nothing keeps the pool from its size any more");
        for (request, events) in requests.iter().zip(&mut streams) {
            assert_eq!(received(events), solo(request));
        }
        let refused = &mut bench.submit(&requests[0]);
        let error = received(refused).failed.expect("it never fits");
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
    }
}

#[test]
fn a_random_walk_of_both_budgets_changes_no_text() {
    let ended = random_walk(OnShrink::Recompute);
    assert!(ended.iter().flatten().all(|part| !part.continues));
    let ended = random_walk(OnShrink::Continue);
    let gone_on = |served: &&Vec<Served>| served.iter().any(|part| part.continues);
    let both = |served: &&Vec<Served>| gone_on(served) && served[1..].iter().any(|part| !part.continues);
    let counts = (ended.iter().filter(gone_on).count(), ended.iter().filter(both).count());
    assert!(
        counts.0 > 50 && counts.1 > 10,
        "{counts:?} of {} went on, and were computed again too",
        ended.len()
    );
}

/// The parts of the requests that ran under changing budgets.
fn random_walk(on_shrink: OnShrink) -> Vec<Vec<Served>> {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let config = SchedulerConfig { max_num_batched_tokens: 48, num_pages: 900, ..ROOMY };
    let mut bench = Bench::new(&config, toy(STACK)).on_shrink(on_shrink);
    let mut streams = Vec::new();
    let mut ended = Vec::new();
    for turn in 0..4000 {
        while streams.len() < 8 {
            let index = ended.len() + streams.len();
            let request =
                long(&format!("{} and number {index}", "shared ".repeat(index % 4)), 5 + index * 13 % 60);
            streams.push((bench.submit(&request), request));
        }
        if turn % 4 == 0 {
            bench.set_weights(bytes(rng.random_range(0..=40))).expect("a budget that fits");
        }
        if turn % 7 == 0 {
            bench.set_kv(rng.random_range(64..900)).expect("a budget that fits");
        }
        bench.engine.turn();
        let before = streams.len();
        streams.retain_mut(|(events, request)| {
            let is_live = bench.engine.choices.values().any(|choice| choice.live.request.id == request.id);
            if !is_live {
                ended.push((parts(events), request.clone()));
            }
            is_live
        });
        assert!(streams.len() + ended.len() >= before);
    }
    bench.finish();
    assert!(ended.len() > 100, "{} requests ended", ended.len());
    let moved: usize = ended.iter().map(|((_, _, moved_down), _)| moved_down).sum();
    assert!(moved > 100, "{moved} moves");
    assert!(on_shrink == OnShrink::Continue || bench.num_preemptions() as usize > moved);
    for ((tokens, served, _), request) in ended.iter().step_by(3) {
        assert_eq!(tokens.len(), request.max_tokens);
        assert_equals_solo_parts(request, (tokens, served));
    }
    ended.into_iter().map(|((_, served, _), _)| served).collect()
}
