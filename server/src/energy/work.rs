//! What the rows of a step did, in one unit: multiply-accumulates. See [`super`] for the formulas.

use model_zoo::models::ModelDims;

/// Multiply-accumulates that take as long as moving a byte, on CPUs: what prefill reaches of the one (290 · 10⁹/s)
/// over what single-stream decode reaches of the other (31 · 10⁹/s), of the CPU kernels on two cores with AVX-512.
const CPU_BYTE_MACS: f64 = 10.0;

/// The same on GPUs: 276 · 10¹²/s of prefill over 2.88 · 10¹²/s of decode, both of Llama-3-8B's shape on an H100.
const GPU_BYTE_MACS: f64 = 96.0;
/// Bytes of a KV value (f16).
const KV_VALUE_BYTES: usize = 2;

/// One row's part in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowWork {
    /// Tokens run.
    pub tokens: u64,
    /// Attention and feed-forward sublayers run, over all tokens.
    pub sublayers: [u64; 2],
    /// Rows of logits.
    pub logits: u64,
    /// KV slots that the row held before the step, over all layers.
    pub kv_slots: u64,
}

/// What a model's parts cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// Weights of an attention and of a feed-forward sublayer.
    sublayers: [f64; 2],
    /// Weights of the output matrix.
    output: f64,
    /// Bytes of a weight on average.
    weight_bytes: f64,
    /// Bytes of the KV of a token in a layer.
    slot_bytes: f64,
    /// Multiply-accumulates of a query with one slot.
    slot_macs: f64,
    byte_macs: f64,
}

impl Costs {
    /// Of a model that runs on CPUs.
    pub fn of(dims: &ModelDims) -> Self {
        let output = (dims.hidden_size * dims.vocab_size) as f64;
        let sublayers = dims.sublayer_weights.map(|weights| weights as f64);
        let all = dims.num_layers as f64 * sublayers.iter().sum::<f64>() + output;
        Self {
            sublayers,
            output,
            weight_bytes: dims.weight_bytes as f64 / all.max(1.0),
            slot_bytes: (2 * dims.num_kv_heads * dims.head_dim * KV_VALUE_BYTES) as f64,
            slot_macs: (2 * dims.num_heads * dims.head_dim) as f64,
            byte_macs: CPU_BYTE_MACS,
        }
    }

    /// Of a model that runs on a GPU, or on CPUs.
    pub fn on(dims: &ModelDims, gpu: bool) -> Self {
        if gpu { Self::of(dims).with_byte_macs(GPU_BYTE_MACS) } else { Self::of(dims) }
    }

    /// The same where moving a byte costs as much as `byte_macs` multiply-accumulates.
    #[must_use]
    pub fn with_byte_macs(self, byte_macs: f64) -> Self {
        Self { byte_macs, ..self }
    }

    /// The work of every row of a step, in multiply-accumulates: above 0 for rows with tokens.
    pub fn shares(&self, rows: &[RowWork]) -> impl Iterator<Item = f64> {
        let weights = rows.iter().map(|row| self.weights(row));
        let (most, sum) = weights.fold((0.0, 0.0), |(most, sum), own| (f64::max(most, own), sum + own));
        // W · w_row / Σ w
        let once = if sum > 0.0 { most / sum } else { 0.0 };
        rows.iter().map(move |row| {
            self.byte_macs * (once * self.weights(row) + self.kv_bytes(row)) + self.compute(row)
        })
    }

    /// Bytes of the weights that the row needs.
    fn weights(&self, row: &RowWork) -> f64 {
        let tokens = row.tokens.max(1) as f64;
        let [attention, ffn] = self.macs_of_sublayers(row);
        let output = if row.logits > 0 { self.output } else { 0.0 };
        ((attention + ffn) / tokens + output) * self.weight_bytes
    }

    fn kv_bytes(&self, row: &RowWork) -> f64 {
        (row.kv_slots + row.sublayers[0]) as f64 * self.slot_bytes
    }

    fn compute(&self, row: &RowWork) -> f64 {
        let tokens = row.tokens as f64;
        let [attention, ffn] = self.macs_of_sublayers(row);
        // A token of the chunk sees on average half of the slots that the chunk writes.
        let slots = row.kv_slots as f64 + row.sublayers[0] as f64 / 2.0;
        // A multiply-accumulate a token, so that no model's work is nothing.
        attention + ffn + self.output * row.logits as f64 + self.slot_macs * tokens * slots + tokens
    }

    fn macs_of_sublayers(&self, row: &RowWork) -> [f64; 2] {
        std::array::from_fn(|i| self.sublayers[i] * row.sublayers[i] as f64)
    }
}
