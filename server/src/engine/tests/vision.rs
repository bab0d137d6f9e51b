//! Dropping image tokens on the real decoder, a tiny one: whatever else is in the batch and whenever a sequence is
//! preempted or cancelled, the text is that of a solo run and every page comes back.

use std::path::Path;

use model_zoo::compression::{CompressionOptions, Context, Offer, registry};
use model_zoo::loader::{LoadOptions, load};
use model_zoo::vision::ImageEmbeddings;
use model_zoo::vision::decode::decode;

use super::*;
use crate::images::place;

/// The image token of the fixture.
const IMAGE: u32 = 255;
const LAYERS: usize = 2;
const BLOCK_SIZE: usize = 16;

const ROOM: SchedulerConfig = SchedulerConfig { block_size: BLOCK_SIZE, num_pages: 1 << 10, ..ROOMY };

fn fixtures() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../model-zoo/tests/fixtures"))
}

fn bench(config: &SchedulerConfig) -> Bench {
    let loaded = load(&fixtures().join("llava"), &LoadOptions::default()).expect("the fixture loads");
    Bench::over(config, loaded.model)
}

/// Compiles requests for the tiny model over its encoder.
struct Asker {
    vision: model_zoo::vision::Vision,
}

impl Asker {
    fn new() -> Self {
        let loaded = load(&fixtures().join("llava"), &LoadOptions::default()).expect("the fixture loads");
        Self { vision: loaded.vision.expect("it sees") }
    }

    /// A request whose text shows the fixture's picture at every `#`, under a plan.
    fn request(&mut self, text: &str, compression: &str) -> GenerateRequest {
        let options: CompressionOptions = serde_json::from_str(compression).expect("options");
        let offer = Offer::default();
        let prompt = text.bytes().map(|byte| if byte == b'#' { IMAGE } else { u32::from(byte) }).collect();
        let images = text.bytes().filter(|&byte| byte == b'#').map(|_| self.image(&options)).collect();
        let images = registry::prepare(&options, &offer, images).expect("valid options");
        let (prompt, images) = place(IMAGE, prompt, &images).expect("an image a place");
        let context = Context {
            num_layers: LAYERS,
            head_dim: 16,
            prompt_len: prompt.len(),
            max_tokens: 24,
            images: &images,
            offer: &offer,
        };
        let plan = Arc::new(registry::compile(&options, &context).expect("a valid plan"));
        let request = sampled(text, |p| (p.ignore_eos, p.logprobs) = (true, Some(0)));
        GenerateRequest {
            id: format!("{text} {compression}"),
            prompt: prompt.into(),
            images,
            plan,
            ..request
        }
    }

    fn image(&mut self, options: &CompressionOptions) -> Arc<ImageEmbeddings> {
        let file = std::fs::read(fixtures().join("images/rgb.png")).expect("the picture");
        let pixels = self.vision.processor.process(&decode(&file, 1 << 20).expect("a picture"));
        let encoding = registry::encoding(options, &Offer::default()).expect("valid options");
        let encoder = &mut self.vision.encoder;
        let encoded = encoder.encode(&pixels, encoding).expect("it encodes");
        let size = (encoder.hidden_size(), encoder.tokens_per_image());
        Arc::new(ImageEmbeddings::of(size, encoded, encoding.digest([9; 32])))
    }
}

/// Texts and plans of every kind, dropping and not.
fn mixed() -> Vec<GenerateRequest> {
    let mut asker = Asker::new();
    [
        ("a picture: # what is it?", "{}"),
        ("a picture: # what is it?", r#"{"vision": {"keep": 3, "merge": 2}}"#),
        (
            "a picture: # where is it then?",
            r#"{"vision": {"alpha": 0.12, "beta": 1, "key_rate": 0.2, "merge": 2}}"#,
        ),
        ("# and # differ", r#"{"vision": {"keep": 2, "merge": 2}}"#),
        ("a picture: # what is it?", r#"{"vision": {"merge": -0.0, "layers": []}}"#),
        ("a picture: # what is it?", r#"{"vision": {"keep": 4, "baseline": "pool"}}"#),
        ("a picture: # what is it?", r#"{"vision": {"keep": 4, "baseline": "random", "seed": 3}}"#),
        ("no picture at all", r#"{"vision": {"keep": 3}}"#),
        (
            "a picture: # what is it?",
            r#"{"vision": {"keep": 3, "merge": 2}, "skip_decode": {"min_layers": 1}}"#,
        ),
    ]
    .map(|(text, compression)| asker.request(text, compression))
    .into()
}

fn alone(request: &GenerateRequest) -> (Received, crate::request::ChoiceUsage) {
    let mut bench = bench(&ROOM);
    let mut events = bench.submit(request);
    bench.finish();
    let mut usage = None;
    let mut all = Received::default();
    while let Some(event) = events.try_next() {
        if let TokenEvent::Finished { usage: own, .. } = &event {
            usage = Some(own.clone());
        }
        all.add(event);
    }
    (all, usage.expect("it finished"))
}

#[test]
fn neighbours_and_budgets_and_preemption_change_nothing_of_what_is_kept() {
    let requests = mixed();
    let alone: Vec<_> = requests.iter().map(|request| alone(request).0).collect();
    for dropping in [1, 3, 5, 6] {
        assert_ne!(alone[0], alone[dropping], "dropping tokens changes what request {dropping} sees");
    }
    for (max_num_batched_tokens, num_pages) in [(512, 1 << 10), (9, 1 << 10), (9, 26), (512, 26)] {
        let config = SchedulerConfig { max_num_batched_tokens, num_pages, ..ROOM };
        let mut bench = bench(&config);
        let mut streams: Vec<_> = requests.iter().map(|request| bench.submit(request)).collect();
        bench.finish();
        for (index, (alone, events)) in alone.iter().zip(&mut streams).enumerate() {
            assert_eq!(&received(events), alone, "request {index} under {config:?}");
        }
        assert_eq!(bench.num_preemptions() > 0, num_pages == 26, "{config:?}");
    }
}

#[test]
fn usage_says_what_was_kept_and_holds() {
    let page = 2 * 2 * 16 * BLOCK_SIZE * 2;
    let of = |index: usize| alone(&mixed()[index]).1.work;
    let (whole, capped, none) = (of(0), of(1), of(7));
    let visual = whole.visual.expect("an image");
    assert_eq!((visual.shown, visual.kept, visual.mean), (9, 9, 9.0));
    let visual = capped.visual.expect("an image");
    // The filter is after the attention of the first of two layers.
    assert_eq!((visual.shown, visual.kept, visual.mean), (9, 3, 6.0));
    // 23 of text, 9 or 3 of the image, 23 of output, in each layer.
    assert_eq!(whole.kv_bytes, (LAYERS * 55usize.div_ceil(BLOCK_SIZE) * page) as u64);
    assert_eq!(capped.kv_bytes, (LAYERS * 49usize.div_ceil(BLOCK_SIZE) * page) as u64);
    assert_eq!(none.visual, None);
    assert_eq!(of(5).visual.expect("an image").kept, 4);
}

#[test]
fn pages_of_dropped_tokens_are_free_when_the_prompt_is_computed() {
    let mut asker = Asker::new();
    // 49 tokens take four pages a layer, and 40 three.
    let text = format!("{}#!", "x".repeat(39));
    let request = asker.request(&text, r#"{"vision": {"keep": 1, "merge": 2, "key_rate": 0}}"#);
    let mut bench = bench(&ROOM);
    let _events = bench.submit(&request);
    bench.engine.turn();
    assert_eq!(bench.pages_used(), LAYERS * 3);
    bench.finish();
}

#[test]
fn a_second_question_shares_what_does_not_depend_on_it() {
    let mut asker = Asker::new();
    let mut cached = |bench: &mut Bench, text: &str, compression: &str| {
        let request = asker.request(text, compression);
        let mut events = bench.submit(&request);
        bench.finish();
        let last = std::iter::from_fn(|| events.try_next()).last();
        match last {
            Some(TokenEvent::Finished { usage, .. }) => usage.cached_tokens,
            other => panic!("{other:?} is not the end"),
        }
    };
    let mut bench = bench(&ROOM);
    let text = "you are an assistant who looks at pictures: # what is it?";
    let filtered = r#"{"vision": {"keep": 3}}"#;
    let pooled = r#"{"vision": {"keep": 4, "baseline": "pool"}}"#;
    assert_eq!(cached(&mut bench, text, "{}"), 0);
    // Whole pages of the 44 tokens before the image.
    assert_eq!(cached(&mut bench, text, filtered), 32);
    assert_eq!(cached(&mut bench, text, filtered), 32, "what depends on the question is not shared");
    assert_eq!(cached(&mut bench, text, pooled), 32, "pooled tokens are not the whole image's");
    assert_eq!(cached(&mut bench, text, "{}"), 64);
    // Of four images' 36 tokens 16 are left out, so that pages are whole again behind them.
    let text = format!("{}#### what is it?", "x".repeat(28));
    let drawn = r#"{"vision": {"keep": 5, "baseline": "random"}}"#;
    assert_eq!([(); 2].map(|()| cached(&mut bench, &text, drawn)), [0, 64], "drawn tokens are shared");
    assert_eq!(cached(&mut bench, &text, r#"{"vision": {"keep": 5, "baseline": "random", "seed": 1}}"#), 16);
}

#[test]
fn a_cancelled_request_leaves_nothing_at_any_turn() {
    let requests = mixed();
    for turns in 0..6 {
        let config = SchedulerConfig { max_num_batched_tokens: 9, ..ROOM };
        let mut bench = bench(&config);
        let mut kept = bench.submit(&requests[0]);
        bench.engine.turn();
        let gone: Vec<_> = requests[1..].iter().map(|request| bench.submit(request)).collect();
        (0..turns).for_each(|_| bench.engine.turn());
        drop(gone);
        bench.engine.turn();
        assert_eq!(bench.engine.choices.len(), 1);
        bench.finish();
        assert_eq!(received(&mut kept), alone(&requests[0]).0);
    }
}
