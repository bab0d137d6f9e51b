//! SmolLM2-135M-Instruct in Q4_1, the model that the server serves by default, against
//! `candle-transformers` on the same file.
//!
//! The reference is candle's Llama with every matrix dequantized to f32. Both candle's quantized Llama
//! and ours quantize activations to 8 bits and so differ from it; ours must not differ more.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use tempfile::NamedTempFile;

use crate::download::smollm2;
use crate::support::{Distance, prompt_logits};

/// Prefill in chunks that end inside pages.
const CHUNKS: &[usize] = &[37, 1, 16];

/// "The harbour was quiet when Captain Mbeki stepped onto the pier. Three ships had left in the night, and
/// nobody could say who had paid for their coal. She opened her notebook, wrote "07:45, wind NNW, 12
/// knots", and began to count the crates: 17 of tea"
const PROMPT: [u32; 68] = [
    504, 28899, 436, 8354, 645, 13756, 372, 1425, 8139, 19529, 4581, 260, 19189, 30, 8696, 7761, 761, 2049,
    281, 260, 3163, 28, 284, 14938, 856, 1643, 617, 761, 5940, 327, 480, 5511, 30, 2306, 6572, 874, 20797,
    28, 4150, 476, 32, 39, 42, 36, 37, 28, 2251, 442, 40739, 28, 216, 33, 34, 25035, 1002, 284, 2585, 288,
    985, 260, 1650, 660, 42, 216, 33, 39, 282, 7188,
];

/// The file again with every tensor in f32.
fn dequantized(path: &Path) -> NamedTempFile {
    let mut file = File::open(path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let mut tensors = HashMap::new();
    for name in content.tensor_infos.keys() {
        let quantized = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let plain = quantized.dequantize(&Device::Cpu).unwrap();
        tensors.insert(name.as_str(), QTensor::quantize(&plain, GgmlDType::F32).unwrap());
    }
    let metadata = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect::<Vec<_>>();
    let tensors = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect::<Vec<_>>();
    let mut plain = NamedTempFile::new().unwrap();
    gguf_file::write(&mut plain, &metadata, &tensors).unwrap();
    plain
}

/// candle's logits after each token.
fn candle_logits(mut reader: File) -> Vec<Vec<f32>> {
    let content = Content::read(&mut reader).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut reader, &Device::Cpu).unwrap();
    let mut logits = Vec::new();
    for (position, &token) in PROMPT.iter().enumerate() {
        let input = Tensor::new(&[[token]], &Device::Cpu).unwrap();
        logits.push(model.forward(&input, position).unwrap().squeeze(0).unwrap().to_vec1().unwrap());
    }
    logits
}

/// Index of the largest logit.
fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
}

/// Positions at which both runs find the same token most likely.
fn agreeing(logits: &[Vec<f32>], reference: &[Vec<f32>]) -> usize {
    logits.iter().zip(reference).filter(|(a, b)| argmax(a) == argmax(b)).count()
}

#[test]
fn smollm2_agrees_with_candle() {
    let path = smollm2();
    let plain = dequantized(&path);
    let reference = candle_logits(File::open(plain.path()).unwrap());

    // The same weights in f32: nothing differs but the f16 KV cache and the order of sums.
    let ours = prompt_logits(plain.path(), &PROMPT, CHUNKS);
    let exact = Distance::between(&ours, &reference);
    println!("in f32: {exact:?}");
    assert!(exact.largest < 0.05, "in f32 we are off by {exact:?}");
    assert_eq!(agreeing(&ours, &reference), PROMPT.len());

    // The file itself: candle and we both quantize activations to 8 bits.
    let candle = candle_logits(File::open(&path).unwrap());
    let ours = prompt_logits(&path, &PROMPT, CHUNKS);
    let our_error = Distance::between(&ours, &reference);
    let their_error = Distance::between(&candle, &reference);
    let between = Distance::between(&ours, &candle);
    println!("from f32: ours {our_error:?}, candle {their_error:?}; from each other: {between:?}");
    assert!(our_error.rms < 1.1 * their_error.rms, "ours is off by {our_error:?}, candle by {their_error:?}");
    // Two independent errors differ by no more than their sum.
    assert!(between.rms < our_error.rms + their_error.rms, "ours is off from candle by {between:?}");

    let (we_agree, they_agree) = (agreeing(&ours, &reference), agreeing(&candle, &reference));
    println!("most likely tokens as in f32: ours {we_agree}, candle {they_agree} of {}", PROMPT.len());
    for (position, (ours, reference)) in ours.iter().zip(&reference).enumerate() {
        let (chosen, best) = (argmax(ours), argmax(reference));
        let gap = reference[best] - reference[chosen];
        // Another token may win only where the two are a near tie: within three deviations of the
        // difference of two logits.
        assert!(
            gap <= 3.0 * 2f32.sqrt() * our_error.rms,
            "position {position}: {chosen} for {best}, {gap} less"
        );
    }
}
