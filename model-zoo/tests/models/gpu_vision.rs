//! Image tokens that are left out on the GPU's decoder, on the emulated device, against the CPU's.

use std::sync::Arc;

use model_zoo::compression::{CompressionOptions, Context, Offer, Plan, RowState, registry};
use model_zoo::config::{DecoderConfig, SlidingWindow};
use model_zoo::kernels::cuda::device::Device;
use model_zoo::kernels::cuda::emulated::{Emulated, Order};
use model_zoo::loader::{LoadOptions, Target, build_on, load};
use model_zoo::models::CausalLm;
use model_zoo::step::LogitRows;
use model_zoo::vision::{EncodedImage, ImageEmbeddings, PromptImage};
use model_zoo::weights::RandomWeights;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use crate::bitstack::{BLOCKS, artefact, summed};
use crate::gpu::{device, error, llama, on, tokens};
use crate::support::{Chunk, Runner};
use crate::tiny::{LAYERS, calibration, write};

/// Tokens after the prompt.
const OUTPUT: usize = 12;

/// A sequence: its plan, its images, and its tokens, those after the prompt included.
#[derive(Clone)]
struct Asked {
    plan: Plan,
    images: Vec<PromptImage>,
    prompt_len: usize,
    tokens: Vec<u32>,
}

/// Noise in place of an image that takes `num_tokens` tokens, of which `places` have rows.
fn image(
    seed: u64,
    hidden: usize,
    (num_tokens, places): (usize, Option<Vec<usize>>),
) -> Arc<ImageEmbeddings> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let rows = places.as_ref().map_or(num_tokens, Vec::len);
    let encoded = EncodedImage {
        rows: (0..hidden * rows).map(|_| rng.random_range(-0.8..0.8)).collect(),
        places,
        salience: (0..rows).map(|_| rng.random_range(0.0..1.0)).collect(),
    };
    Arc::new(ImageEmbeddings::of((hidden, num_tokens), encoded, [seed as u8; 32]))
}

/// Text, an image of 30 tokens, text, one of 20 of which 12 have a row, text; with these options.
fn shown(seed: u32, hidden: usize, options: &str) -> Asked {
    let places = vec![0, 1, 4, 5, 6, 9, 11, 12, 13, 16, 18, 19];
    let images = [(30, None), (20, Some(places))].map(|size| image(u64::from(seed), hidden, size));
    asked(seed, &images, ([5, 2, 6], options))
}

fn text(seed: u32, len: usize, options: &str) -> Asked {
    asked(seed, &[], ([len, 0, 0], options))
}

/// Text of these lengths around the images.
fn asked(seed: u32, images: &[Arc<ImageEmbeddings>], (text, options): ([usize; 3], &str)) -> Asked {
    let options: CompressionOptions = serde_json::from_str(options).unwrap();
    let offer = Offer { calibration: Some(calibration()), ..Offer::default() };
    let images = registry::prepare(&options, &offer, images.to_vec()).unwrap();
    let (mut at, mut placed) = (0, Vec::new());
    for (index, len) in text.into_iter().enumerate() {
        at += len;
        if let Some(embeddings) = images.get(index) {
            placed.push(PromptImage { start: at, embeddings: Arc::clone(embeddings) });
            at += embeddings.num_tokens();
        }
    }
    let mut tokens = tokens(seed, at + OUTPUT);
    // Tokens that stand for an image are outside the vocabulary.
    placed.iter().for_each(|image| tokens[image.range()].fill(9999));
    let context = Context {
        num_layers: LAYERS,
        head_dim: 16,
        prompt_len: at,
        max_tokens: OUTPUT,
        images: &placed,
        offer: &offer,
    };
    let plan = registry::compile(&options, &context).unwrap();
    Asked { plan, images: placed, prompt_len: at, tokens }
}

/// Of each sequence: the logits of its steps, and its state after them.
type Ran = Vec<(Vec<Vec<f32>>, RowState)>;

/// Runs `schedule[step][sequence]` tokens at a time.
fn run(model: Box<dyn CausalLm>, asked: &[Asked], schedule: &[Vec<usize>]) -> Ran {
    let capacity = asked.iter().map(|asked| asked.tokens.len()).max().unwrap();
    let mut runner = Runner::of(model, asked.len(), capacity);
    let mut sequences: Vec<_> = asked
        .iter()
        .map(|asked| {
            let mut sequence = runner.sequence_of(asked.plan.clone(), asked.tokens.len());
            sequence.images = asked.images.clone();
            sequence
        })
        .collect();
    let mut logits = vec![Vec::new(); asked.len()];
    for (step, counts) in schedule.iter().enumerate() {
        let (mut chunks, mut wanted) = (Vec::new(), Vec::new());
        for (i, sequence) in sequences.iter_mut().enumerate().filter(|(i, _)| counts[*i] > 0) {
            let rows = [LogitRows::Last, LogitRows::All][(i + step) % 2];
            wanted.extend(vec![i; if rows == LogitRows::All { counts[i] } else { 1 }]);
            let tokens = &asked[i].tokens[sequence.len..sequence.len + counts[i]];
            chunks.push(Chunk { sequence, tokens, logits: rows });
        }
        let found = runner.step(chunks).unwrap();
        assert_eq!(found.len(), wanted.len());
        wanted.into_iter().zip(found).for_each(|(i, row)| logits[i].push(row));
    }
    logits.into_iter().zip(sequences).map(|(logits, sequence)| (logits, sequence.state)).collect()
}

/// A schedule in which each sequence begins in its step of `begins`, with `first` tokens at once and then the rest of its
/// prompt; then it decodes, at last three tokens in one step.
fn schedule(asked: &[Asked], begins: &[(usize, usize)]) -> Vec<Vec<usize>> {
    let mut left: Vec<Vec<usize>> = asked
        .iter()
        .zip(begins)
        .map(|(asked, &(begin, first))| {
            let mut counts = vec![0; begin];
            counts.extend((first > 0).then_some(first));
            counts.push(asked.prompt_len - first);
            counts.extend([1; OUTPUT - 3]);
            counts.push(3);
            counts
        })
        .collect();
    let steps = left.iter().map(Vec::len).max().unwrap();
    left.iter_mut().for_each(|counts| counts.resize(steps, 0));
    (0..steps).map(|step| left.iter().map(|counts| counts[step]).collect()).collect()
}

/// How far logits of shaken images may be from the others': half of what they are where one other token goes on.
const SHAKEN: f64 = 3e-2;

/// The same sequences, whose images differ by noise about as large as what bf16 rounds adds up to.
fn shaken(asked: &[Asked], seed: u64) -> Vec<Asked> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut asked = asked.to_vec();
    for image in asked.iter_mut().flat_map(|asked| &mut asked.images) {
        let of = &image.embeddings;
        let mut encoded = of.encoded().clone();
        encoded.rows.iter_mut().for_each(|value| *value *= 1.0 + rng.random_range(-0.02..0.02));
        image.embeddings =
            Arc::new(ImageEmbeddings::of((of.hidden_size(), of.num_tokens()), encoded, [seed as u8; 32]));
    }
    asked
}

/// Runs the same on the CPU and on a device and compares all of it, to a relative error of the logits of `most`. Returns how
/// many sequences were filtered, and how many of them were compared whole: where the text looks at two tokens nearly alike,
/// which shows on the CPU when their images differ by next to nothing, another one may go on.
fn compare(
    model: &dyn Fn(Option<Arc<dyn Device>>) -> Box<dyn CausalLm>,
    (asked, schedule): (&[Asked], &[Vec<usize>]),
    (device, what, most): (Arc<dyn Device>, &str, f64),
) -> [usize; 2] {
    let (cpu, gpu) = (run(model(None), asked, schedule), run(model(Some(device)), asked, schedule));
    let others: Vec<Ran> =
        (0..4).map(|seed| run(model(None), &shaken(asked, 1000 + seed), schedule)).collect();
    let mut counts = [0; 2];
    for (i, ((cpu, before), (gpu, after))) in cpu.iter().zip(&gpu).enumerate() {
        let what = format!("{what}, sequence {i}");
        assert_eq!((&after.ffn, after.ffns_skipped), (&before.ffn, before.ffns_skipped), "{what}");
        if let (Some(before), Some(after)) = (&before.visual, &after.visual) {
            counts[0] += 1;
            let differ = before.survivors.iter().filter(|token| !after.survivors.contains(token)).count();
            assert!(differ <= 2, "{what}: {:?} went on, not {:?}", after.survivors, before.survivors);
            let turns = |other: &Ran| {
                let (logits, state) = &other[i];
                state.visual.as_ref() != Some(before) || error(logits, cpu) > SHAKEN
            };
            if others.iter().any(turns) {
                continue;
            }
            counts[1] += 1;
        }
        assert_eq!(after.visual, before.visual, "{what}");
        assert_eq!(after.sublayers_run, before.sublayers_run, "{what}");
        if !before.pruning.query_sums.is_empty() {
            let [cpu, gpu] = [before, after].map(|state| vec![sorted(&state.pruning.query_sums)]);
            assert!(error(&gpu, &cpu) < most, "{what}: other queries were looked at");
        }
        assert_eq!(after.visual_left_out, before.visual_left_out, "{what}");
        let found = error(gpu, cpu);
        assert!(found < most, "{what}: relative error {found:.2e}");
    }
    counts
}

/// In rising order: a device has another order of channels.
fn sorted(values: &[f32]) -> Vec<f32> {
    let mut values = values.to_vec();
    values.sort_by(f32::total_cmp);
    values
}

/// Six layers of noise with heads of 64 channels, those of which `windowed` says so with a window.
fn noise(windowed: [bool; LAYERS], qk_norm: bool) -> DecoderConfig {
    let window = SlidingWindow { window: 24, layers: windowed.to_vec(), rope: None };
    let plain = llama((192, 192, LAYERS), [9, 3], 64);
    DecoderConfig { sliding_window: windowed.contains(&true).then_some(window), qk_norm, ..plain }
}

/// The tokens that may go on are told by the encoder: nothing is near to anything.
const KEYS: &str = r#"{"vision": {"alpha": 1.0, "beta": 1e9, "key_rate": 0.4, "layers": LAYERS}}"#;

/// The tiny model of `folder` on the CPU, or on a device.
fn tiny(folder: &TempDir) -> impl Fn(Option<Arc<dyn Device>>) -> Box<dyn CausalLm> {
    |device| match device {
        Some(device) => on(device, folder.path()),
        None => load(folder.path(), &LoadOptions::default()).unwrap().model,
    }
}

#[test]
fn filters_at_any_layers_leave_what_they_leave_on_the_cpu() {
    let folder = write(|_| false);
    for (i, layers) in ["[0]", "[2]", "[1, 2, 4]", "[0, 1, 2, 3, 4]", "[5]"].into_iter().enumerate() {
        let other = ["[1, 2, 3]", "[3]"][i % 2];
        let asked = [
            shown(1, 64, &KEYS.replace("LAYERS", layers)),
            text(2, 9, "{}"),
            shown(3, 64, &KEYS.replace("LAYERS", other)),
        ];
        // Beside a prompt and beside a token; both at once; what is before the image in a step of its own.
        let begins = [[(0, 3), (0, 0), (1, 0)], [(1, 0), (2, 4), (0, 5)], [(0, 0), (0, 0), (1, 0)]][i % 3];
        let steps = schedule(&asked, &begins);
        let what = format!("{layers} {begins:?}");
        let counts = compare(&tiny(&folder), (&asked, &steps), (device(i), &what, 2e-2));
        assert_eq!(counts, [2, 2], "{what}");
    }
}

#[test]
fn plans_that_leave_out_image_tokens_mix_and_equal_the_cpus() {
    let thresholds = r#"{"vision": {"key_rate": 0.1, "alpha": 0.05, "beta": 0.05, "layers": [1, 2, 4]}}"#;
    let drop = r#"{"vision": {"keep": 4, "layers": [2, 4]}, "drop": {"attention": 2, "ffn": 1}}"#;
    let skip = r#""skip_decode": {"min_layers": 3, "horizon": 6}"#;
    let random = format!(r#"{{"vision": {{"baseline": "random", "keep": 5}}, {skip}}}"#);
    let skips = |options: &str| {
        format!(r#"{{"ffn_skip": {{"target": 0.4, "warmup": 0, "threshold": -2.0, {options}}}}}"#)
    };
    let asked = |hidden: usize| {
        [
            // They decode beside filters, and leave out every other FFN, alone and by vote.
            text(1, 6, &skips(r#""max_skip": 1"#)),
            text(2, 9, &skips(r#""max_skip": 1, "mode": "batch", "quorum": 0.1"#)),
            shown(3, hidden, thresholds),
            shown(4, hidden, drop),
            shown(5, hidden, r#"{"vision": {"keep": 9}}"#),
            shown(6, hidden, r#"{"vision": {"baseline": "pool", "keep": 6}}"#),
            shown(7, hidden, &random),
            shown(8, hidden, r#"{"vision": {"layers": []}}"#),
            // Its queries are looked at in a step with filters.
            text(10, 40, r#"{"think": {"ratio": 0.5, "recent": 0}}"#),
            shown(9, hidden, &format!(r#"{{"vision": {{"keep": 5, "merge": 1.5}}, {skip}}}"#)),
        ]
    };
    let begins = [(0, 0), (0, 4), (1, 5), (2, 0), (2, 1), (1, 20), (2, 9), (3, 37), (2, 0), (4, 0)];
    let folder = write(|_| false);
    let small = asked(64);
    let steps = schedule(&small, &begins);
    let mut all = vec![compare(&tiny(&folder), (&small, &steps), (device(0), "tiny", 3e-2))];
    let models = [noise([false; LAYERS], false), noise([true, false, true, true, false, true], true)];
    for (i, config) in models.into_iter().enumerate() {
        let asked = asked(config.hidden_size);
        let weights = RandomWeights::of(&config, [0.1, 0.2][i]);
        let build = |device: Option<Arc<dyn Device>>| {
            build_on(config.clone(), &weights, &device.map_or(Target::Cpu, Target::Device)).unwrap()
        };
        all.push(compare(&build, (&asked, &steps), (device(i + 1), &format!("noise {i}"), 4e-2)));
    }
    let [filtered, whole] = [0, 1].map(|which| all.iter().map(|counts| counts[which]).sum::<usize>());
    println!("{whole} of {filtered} filtered sequences compared whole: {all:?}");
    assert!(filtered == 12 && whole >= 6, "{all:?}");
}

#[test]
fn weights_in_levels_serve_what_goes_on() {
    let (folder, path) = artefact();
    let sums = summed(folder.path(), &path, BLOCKS);
    let asked = [
        shown(1, 64, &KEYS.replace("LAYERS", "[1, 3]")),
        text(2, 9, "{}"),
        shown(3, 64, r#"{"vision": {"baseline": "random", "keep": 5}}"#),
    ];
    let steps = schedule(&asked, &[(1, 0), (0, 0), (1, 0)]);
    let model = |device: Option<Arc<dyn Device>>| match device {
        Some(device) => on(device, &path),
        None => load(sums.path(), &LoadOptions::default()).unwrap().model,
    };
    assert_eq!(compare(&model, (&asked, &steps), (device(0), "levels", 3e-2)), [1, 1]);
}

#[test]
fn two_devices_look_at_images_together() {
    let folder = write(|_| false);
    let asked = [shown(4, 64, &KEYS.replace("LAYERS", "[1, 2]")), text(2, 9, "{}")];
    let steps = schedule(&asked, &[(1, 0), (0, 0)]);
    let threads: Vec<_> = Emulated::group(Order::Upwards, 2)
        .into_iter()
        .map(|device| {
            let (path, asked, steps) = (folder.path().to_owned(), asked.clone(), steps.clone());
            std::thread::spawn(move || run(on(Arc::new(device), &path), &asked, &steps))
        })
        .collect();
    let results: Vec<Ran> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(results[0] == results[1], "both devices have the same logits, and the same tokens go on");
    let cpu = run(tiny(&folder)(None), &asked, &steps);
    for ((gpu, after), (cpu, before)) in results[0].iter().zip(&cpu) {
        assert_eq!(after.visual, before.visual);
        assert!(error(gpu, cpu) < 2e-2, "relative error {:.2e}", error(gpu, cpu));
    }
}

#[test]
fn a_prompt_that_is_cut_or_has_too_few_pages_is_refused() {
    let folder = write(|_| false);
    let Asked { plan, images, prompt_len, tokens } = shown(1, 64, &KEYS.replace("LAYERS", "[1]"));
    let mut runner = Runner::of(tiny(&folder)(Some(device(0))), 1, prompt_len);
    let mut sequence = runner.sequence_of(plan, prompt_len);
    sequence.images = images;
    let mut short = sequence.clone();
    short.block_tables[3].pop();
    let cases =
        [(&mut sequence, prompt_len - 9, "runs whole from 5"), (&mut short, prompt_len, "layer 3 has")];
    for (sequence, len, message) in cases {
        let chunk = Chunk { sequence, tokens: &tokens[..len], logits: LogitRows::Last };
        let error = runner.step(vec![chunk]).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}
