//! Images in prompts: what they show counts, wherever steps are cut and whatever is cached.

use model_zoo::vision::{ImageEmbeddings, PromptImage};

use super::*;

/// Ids of an image's tokens, which mean nothing.
const PLACEHOLDER: u32 = b'#' as u32;

/// An image of `num_tokens` tokens; another `seed` is another image.
fn image(seed: u8, num_tokens: usize) -> Arc<ImageEmbeddings> {
    let rows = (0..2 * num_tokens).map(|i| f32::from(seed) + i as f32 / 64.0).collect();
    let mut digest = [7; 32];
    // Images that differ in any word of their digest differ.
    digest[usize::from(seed) % 32] = seed;
    Arc::new(ImageEmbeddings::new(2, rows, digest))
}

/// A request whose prompt is `text` with each `#` replaced by the next of `images`.
fn looking(text: &str, images: &[Arc<ImageEmbeddings>]) -> GenerateRequest {
    let mut images = images.iter();
    let (mut prompt, mut places) = (Vec::new(), Vec::new());
    for byte in text.bytes() {
        if byte != b'#' {
            prompt.push(u32::from(byte));
            continue;
        }
        let embeddings = Arc::clone(images.next().expect("an image for every place"));
        let start = prompt.len();
        prompt.resize(start + embeddings.num_tokens(), PLACEHOLDER);
        places.push(PromptImage { start, embeddings });
    }
    GenerateRequest { prompt: prompt.into(), images: places.into(), ..request(text) }
}

fn mixed() -> Vec<GenerateRequest> {
    let (a, b, c) = (image(1, 9), image(2, 9), image(3, 6));
    vec![
        looking("see: #what is it?", &[Arc::clone(&a)]),
        looking("see: #what is it?", &[Arc::clone(&b)]),
        looking("see: #where is it?", &[Arc::clone(&a)]),
        looking("## which one?", &[Arc::clone(&a), Arc::clone(&b)]),
        looking("## which one?", &[b, a]),
        looking("between # the # words", &[c.clone(), c]),
        request("see: ##########what is it?"),
    ]
}

#[test]
fn steps_and_neighbours_and_preemption_change_nothing_of_what_is_seen() {
    let alone: Vec<_> = mixed().iter().map(solo).collect();
    for (index, one) in alone.iter().enumerate() {
        assert!(!alone[..index].contains(one), "request {index} sees what another one sees");
    }
    for (max_num_batched_tokens, num_pages) in
        [(3, ROOMY.num_pages), (512, ROOMY.num_pages), (3, 30), (16, 30)]
    {
        let config = SchedulerConfig { max_num_batched_tokens, num_pages, ..ROOMY };
        let mut bench = Bench::new(&config, ToyOptions::default());
        let mut streams: Vec<_> = mixed().iter().map(|request| bench.submit(request)).collect();
        bench.finish();
        for (alone, events) in alone.iter().zip(&mut streams) {
            assert_eq!(&received(events), alone, "under {config:?}");
        }
        assert_eq!(bench.num_preemptions() > 0, num_pages == 30);
    }
}

#[test]
fn the_prefix_cache_knows_images_by_what_they_show() {
    let mut bench = Bench::new(&ROOMY, ToyOptions::default());
    let cached_tokens = |bench: &mut Bench, request: &GenerateRequest| {
        let mut events = bench.submit(request);
        bench.finish();
        match std::iter::from_fn(|| events.try_next()).last() {
            Some(TokenEvent::Finished { usage, .. }) => usage.cached_tokens,
            other => panic!("{other:?} is not a choice's end"),
        }
    };
    // Blocks of 4: the text before the image fills one and a quarter.
    let text = "see: #what is it?";
    for (request, cached) in [
        (looking(text, &[image(1, 9)]), 0),
        (looking(text, &[image(1, 9)]), 24),
        (looking("see: #who is it?", &[image(1, 9)]), 16),
        (looking(text, &[image(2, 9)]), 4),
        (looking(text, &[image(30, 9)]), 4),
        (looking(text, &[image(1, 9)]), 24),
    ] {
        assert_eq!(cached_tokens(&mut bench, &request), cached, "{:?}", request.images);
    }
}
