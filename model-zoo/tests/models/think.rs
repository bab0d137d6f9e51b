//! ThinK from the prompt to packed pages (methods.md §2 (e); the kernel's own truth is beside the kernel).

use model_zoo::compression::options::{DropLayers, Think};
use model_zoo::compression::think::kept_channels;
use model_zoo::compression::{Calibration, CompressionOptions, Context, Offer, Plan, registry};
use model_zoo::eval::{Chunk, Runner};
use model_zoo::kv_cache::{KvLayout, PackedLayout};
use model_zoo::step::LogitRows;

use crate::place::{BF16, Place, everywhere};
use crate::tiny::{LAYERS, write_for_joint_steps};

everywhere! {
    a_pruned_row_in_a_mixed_batch_equals_its_solo_run_in_any_chunks,
    teacher_forcing_equals_decoding,
    nothing_is_pruned_at_ratio_0_or_of_a_prompt_within_the_recent_window,
}

const PROMPT: usize = 75;
const OUTPUT: usize = 20;

fn tokens() -> Vec<u32> {
    (0..PROMPT as u32 + OUTPUT as u32).map(|i| (i * i * 13 + i * 5 + 3) % 256).collect()
}

fn compile(ratio: f32, recent: usize, attention: usize) -> Plan {
    let similarity = vec![0.5; LAYERS];
    let calibration = Calibration {
        attention_similarity: similarity.clone(),
        ffn_similarity: similarity,
        ..Calibration::default()
    };
    let offer = Offer { calibration: Some(calibration), ..Offer::default() };
    let options = CompressionOptions {
        think: Some(Think { ratio: Some(ratio), recent: Some(recent) }),
        drop: Some(DropLayers { attention, ..DropLayers::default() }),
        ..CompressionOptions::default()
    };
    let context = Context {
        num_layers: LAYERS,
        head_dim: 16,
        prompt_len: PROMPT,
        max_tokens: OUTPUT,
        images: &[],
        offer: &offer,
    };
    registry::compile(&options, &context).unwrap()
}

/// Logits after every output token but the last, all sequences in every step, prompts in chunks.
fn run(runner: &mut Runner<'_>, plans: &[Plan], chunk: usize) -> Vec<Vec<Vec<f32>>> {
    let tokens = tokens();
    let mut sequences: Vec<_> =
        plans.iter().enumerate().map(|(slot, plan)| runner.start(slot, plan.clone())).collect();
    let mut logits = vec![Vec::new(); plans.len()];
    let prompt = tokens[..PROMPT].chunks(chunk);
    for step in prompt.chain(tokens[PROMPT..].chunks(1)) {
        let mut chunks: Vec<_> = sequences
            .iter_mut()
            .map(|sequence| Chunk { sequence, tokens: step, logits: LogitRows::Last })
            .collect();
        runner.step(&mut chunks, None).unwrap();
        let all = runner.logits(0..plans.len()).unwrap();
        assert!(all.iter().all(|v| v.is_finite()));
        let vocab = all.len() / plans.len();
        logits.iter_mut().zip(all.chunks_exact(vocab)).for_each(|(logits, one)| logits.push(one.to_vec()));
    }
    logits
}

fn a_pruned_row_in_a_mixed_batch_equals_its_solo_run_in_any_chunks(place: Place) {
    let folder = write_for_joint_steps(|_| false);
    let mut model = place.load(folder.path());
    let plans = [Plan::dense(LAYERS), compile(0.5, 8, 0), compile(0.5, 32, 2)];
    let mut runner = Runner::new(model.as_mut(), plans.len(), PROMPT + OUTPUT).unwrap();
    let together = run(&mut runner, &plans, PROMPT);
    for (plan, logits) in plans.iter().zip(&together) {
        let alone = run(&mut runner, std::slice::from_ref(plan), PROMPT);
        place.assert_same(&alone[0], logits, (BF16, "alone"));
        let chunked = run(&mut runner, std::slice::from_ref(plan), 16);
        place.assert_same(&chunked[0][PROMPT.div_ceil(16) - 1..], logits, (BF16, "in chunks"));
    }
    // The prompt itself ran whole: pruning shows from the first output token on.
    assert_eq!(together[0][0], together[1][0]);
    assert_ne!(together[0][1], together[1][1]);
}

fn teacher_forcing_equals_decoding(place: Place) {
    let folder = write_for_joint_steps(|_| false);
    let mut model = place.load(folder.path());
    let mut runner = Runner::new(model.as_mut(), 1, PROMPT + OUTPUT).unwrap();
    let plan = compile(0.5, 8, 0);
    let decoded = run(&mut runner, std::slice::from_ref(&plan), PROMPT).remove(0);
    let mut taught = Vec::new();
    runner.teach_from(&plan, (&tokens(), PROMPT - 1), |_, logits| taught.push(logits.to_vec())).unwrap();
    place.assert_same(&taught, &decoded, (BF16, "taught"));
}

fn nothing_is_pruned_at_ratio_0_or_of_a_prompt_within_the_recent_window(place: Place) {
    assert_eq!(compile(0.0, 8, 0).kv_demand(), Plan::dense(LAYERS).kv_demand());
    assert!(compile(0.5, PROMPT, 0).pruning().is_none());
    let folder = write_for_joint_steps(|_| false);
    let mut model = place.load(folder.path());
    let mut runner = Runner::new(model.as_mut(), 1, PROMPT + OUTPUT).unwrap();
    let dense = run(&mut runner, &[Plan::dense(LAYERS)], PROMPT);
    for (ratio, recent) in [(0.0, 8), (0.5, PROMPT), (0.5, PROMPT - 15)] {
        assert_eq!(run(&mut runner, &[compile(ratio, recent, 0)], PROMPT), dense, "{ratio} {recent}");
    }
}

#[test]
fn pages_meet_the_byte_formula() {
    assert_eq!([0.4, 0.5, 0.375].map(|ratio| kept_channels(ratio, 64)), [40, 32, 40]);
    assert_eq!(kept_channels(0.4, 128), 80);
    // SmolLM2-135M's layer at 2,048 prompt tokens: 2·H_kv·[(S − R)·d_k + R·d + S·d] bytes, to whole pages.
    let (heads, d, kept, prompt, recent) = (3, 64, 40, 2048, 32);
    let layout = KvLayout { num_kv_heads: heads, head_dim: d, block_size: 16 };
    let packed = PackedLayout { layout, kept };
    let pages = packed.num_pages(prompt - recent) + recent / 16;
    let formula = 2 * heads * ((prompt - recent) * kept + recent * d + prompt * d);
    let bytes = pages * layout.page_bytes();
    assert!(bytes >= formula && (bytes as f64) < 1.01 * formula as f64, "{bytes} {formula}");
    // What the scheduler counts is what the packed pages take.
    for recent in [8, 20, 40] {
        let plan = compile(0.5, recent, 0);
        let demand = plan.kv_demand();
        let layout = KvLayout { num_kv_heads: 2, head_dim: 16, block_size: 16 };
        let slots = plan.pruning().unwrap().num_packed(16);
        assert_eq!(
            demand.seal().unwrap().packed_pages(16),
            PackedLayout { layout, kept: 8 }.num_pages(slots)
        );
    }
}
