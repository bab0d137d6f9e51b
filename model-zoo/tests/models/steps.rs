//! Steps: what shares a step with a sequence changes nothing of it, and a malformed step writes nothing.

use model_zoo::ZooError;
use model_zoo::kv_cache::{KvCache, PageId};
use model_zoo::step::LogitRows;

use crate::support::{Chunk, Runner, Sequence, fixtures, prompt_logits};

/// A token sequence that differs by `seed`.
fn tokens(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| 3 + (i * 97 + seed * 31 + i * i * 7) % 250).collect()
}

/// Every architecture, dense and packed weights.
const MODELS: [&str; 7] = [
    "llama",
    "gguf/llama-q4_1.gguf",
    "gguf/llama-q8_0.gguf",
    "mistral",
    "qwen2",
    "gguf/qwen3-f16.gguf",
    "gemma3",
];

#[test]
fn a_mixed_step_equals_solo_runs_bit_for_bit() {
    for name in MODELS {
        let path = fixtures().join(name);
        let prompts = [tokens(1, 45), tokens(2, 33), tokens(3, 21)];
        let solo = prompts.each_ref().map(|prompt| prompt_logits(&path, prompt, &[prompt.len()]));

        // Prefill chunks, a decode row and rows without logits share steps; the second sequence joins late
        // and the third is always one token at a time.
        let mut runner = Runner::new(&path, 3, 48);
        let mut sequences = [0; 3].map(|_| runner.sequence(48));
        let schedule = [[11, 0, 1], [17, 13, 1], [1, 19, 1], [16, 0, 1], [0, 1, 1]]
            .iter()
            .chain([[0, 0, 1]].iter().cycle());
        for counts in schedule {
            let mut chunks = Vec::new();
            let mut expected = Vec::new();
            for (i, sequence) in sequences.iter_mut().enumerate() {
                let (start, end) = (sequence.len, (sequence.len + counts[i]).min(prompts[i].len()));
                if start == end {
                    continue;
                }
                let logits = [LogitRows::Last, LogitRows::All, LogitRows::Last][i];
                let logits = if i == 0 && end < prompts[0].len() { LogitRows::None } else { logits };
                expected.extend(match logits {
                    LogitRows::None => &solo[i][..0],
                    LogitRows::Last => &solo[i][end - 1..end],
                    LogitRows::All => &solo[i][start..end],
                });
                chunks.push(Chunk { sequence, tokens: &prompts[i][start..end], logits });
            }
            let logits = runner.step(chunks).unwrap();
            assert!(logits.iter().eq(expected), "{name}: a mixed step differs from solo runs");
            if sequences[2].len == prompts[2].len() {
                break;
            }
        }
        assert_eq!(sequences.map(|sequence| sequence.len), [45, 33, 21], "every token was run");
    }
}

#[test]
fn a_malformed_step_is_refused_and_writes_nothing() {
    let mut runner = Runner::new(&fixtures().join("llama"), 2, 32);
    let (mut good, bad) = (runner.sequence(32), runner.sequence(32));
    let spoilt = |spoil: fn(&mut Sequence)| {
        let mut sequence = bad.clone();
        spoil(&mut sequence);
        sequence
    };
    let cases: [(Sequence, &[u32], &str); 5] = [
        (bad.clone(), &[], "no tokens"),
        (bad.clone(), &[5, 256], "token 256 is outside the vocabulary"),
        (spoilt(|s| s.len = 31), &[5, 6], "for 33 slots"),
        (spoilt(|s| s.block_tables[1][0] = 8), &[5], "page 8 is outside the pool"),
        (spoilt(|s| drop(s.block_tables.pop())), &[5], "block tables of 1 layers"),
    ];
    let bits = |kv: &KvCache| -> Vec<u16> {
        (0..kv.num_pages() as PageId).flat_map(|page| kv.pages().page(page).to_vec()).collect()
    };
    let before = bits(&runner.kv);
    for (mut sequence, tokens, expected) in cases {
        let chunks = vec![
            Chunk { sequence: &mut good, tokens: &[7, 8], logits: LogitRows::Last },
            Chunk { sequence: &mut sequence, tokens, logits: LogitRows::Last },
        ];
        let error = runner.step(chunks).expect_err(expected);
        assert!(matches!(error, ZooError::Step(_)) && error.to_string().contains(expected), "{error}");
        assert!(bits(&runner.kv) == before, "{expected}: the failed step wrote to the cache");
    }
    let chunk = Chunk { sequence: &mut good, tokens: &[7, 8], logits: LogitRows::Last };
    assert!(runner.step(vec![chunk]).unwrap()[0].iter().all(|logit| logit.is_finite()));
    for range in [0..2, 1..2] {
        assert!(matches!(runner.model.logits(range), Err(ZooError::Step(_))));
    }
}
