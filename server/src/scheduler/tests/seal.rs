//! What pruned keys win: pages, and with them places in the batch.

use std::sync::Arc;

use model_zoo::compression::options::Think;
use model_zoo::compression::{CompressionOptions, Context, KvDemand, Offer, PlanKey, registry};

use crate::scheduler::{RowOutcome, Scheduler, SchedulerConfig, SeqId, SequenceSpec};

const LAYERS: usize = 30;
const PROMPT: usize = 2_000;
const OUTPUT: usize = 48;
/// Pages of a dense sequence of 2,048 tokens.
const DENSE: usize = LAYERS * 128;

fn demand(ratio: f32) -> KvDemand {
    let think = Some(Think { ratio: Some(ratio), ..Think::default() });
    let options = CompressionOptions { think, ..CompressionOptions::default() };
    let context = Context {
        num_layers: LAYERS,
        head_dim: 64,
        prompt_len: PROMPT,
        max_tokens: OUTPUT,
        images: &[],
        offer: &Offer::default(),
    };
    registry::compile(&options, &context).expect("a valid plan").kv_demand()
}

/// The most sequences that decode in one step, in a pool for twenty dense ones.
fn most_at_once(demand: &KvDemand) -> usize {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_batched_tokens: 4_096,
        max_num_seqs: 64,
        block_size: 16,
        num_pages: 20 * DENSE + DENSE / 10,
        prefix_caching: true,
    });
    for id in 0..40 {
        let spec = SequenceSpec {
            id: SeqId(id),
            group: id,
            // Prompts of different texts share nothing.
            prompt: (0..PROMPT as u32).map(|i| i * 41 + id as u32).collect(),
            images: Arc::default(),
            max_tokens: OUTPUT,
            demand: demand.clone(),
            plan_key: PlanKey(0),
            cache_salt: 0,
            bypass_prefix_cache: false,
        };
        scheduler.add(spec).expect("it fits");
    }
    let mut most = 0;
    while scheduler.has_work() {
        let plan = scheduler.schedule();
        scheduler.drain_seals();
        most = most.max(plan.rows.iter().filter(|row| row.num_tokens == 1 && row.samples).count());
        let outcome = |row: &crate::scheduler::ScheduledSeq| match row.samples {
            true => RowOutcome::Sampled(7),
            false => RowOutcome::Prefilled,
        };
        let outcomes: Vec<_> = plan.rows.iter().map(outcome).collect();
        scheduler.commit(&plan, &outcomes);
    }
    let stats = scheduler.stats();
    assert_eq!(stats.pages_used, 0);
    most
}

#[test]
fn a_sixth_more_sequences_of_2048_tokens_fit_with_two_fifths_of_the_channels_pruned() {
    let (dense, pruned) = (most_at_once(&KvDemand::dense(LAYERS)), most_at_once(&demand(0.4)));
    assert_eq!(dense, 20);
    assert!(pruned as f64 >= 1.18 * dense as f64, "{pruned} pruned, {dense} dense");
}

#[test]
fn pages_of_a_sealed_sequence_meet_the_byte_formula() {
    let demand = demand(0.4);
    let (d, kept, recent) = (64, 40, 32);
    let pages = demand.num_pages(16, PROMPT + OUTPUT);
    // 2·[(S − R)·d_k + (R + T)·d] of K and 2·(S + T)·d of V, a head; a page has 16 slots of 2·d.
    let formula = LAYERS * ((PROMPT - recent) * kept + (recent + OUTPUT) * d + (PROMPT + OUTPUT) * d);
    let held = pages * 16 * 2 * d;
    assert!(held >= formula && held as f64 <= 1.01 * formula as f64, "{held} {formula}");
}
