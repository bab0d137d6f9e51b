//! What metering adds to a step: `cargo run --release -p rheostat --example metering`.
//!
//! Prints nanoseconds a step, by rows: the work of every row, its shares, and a reading of the estimate's meter.

use std::hint::black_box;
use std::time::{Duration, Instant};

use model_zoo::models::ModelDims;
use rheostat::energy::meter::{self, Device};
use rheostat::energy::work::{Costs, RowWork};
use rheostat::energy::{Energy, EnergyConfig, MeterChoice, Phase, Work};
use rheostat::telemetry::{Metrics, MetricsCompat, ServedModel};

const STEPS: u32 = 20_000;
const ROUNDS: usize = 9;

/// `SmolLM2`-135M's sizes.
fn dims() -> ModelDims {
    ModelDims {
        architecture: "llama".into(),
        num_layers: 30,
        hidden_size: 576,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        vocab_size: 49_152,
        max_context: 2048,
        weight_bytes: 96 << 20,
        sublayer_weights: [884_736, 2_654_208],
    }
}

fn main() {
    let metrics = Metrics::new(&ServedModel::default(), MetricsCompat::None);
    let config = EnergyConfig {
        meter: MeterChoice::Estimate,
        period: Some(Duration::ZERO),
        ..EnergyConfig::default()
    };
    let energy = Energy::new(meter::open(&config, Device::Cpu), &config, &metrics);
    let costs = Costs::of(&dims());
    energy.resume();
    for rows in [1, 8, 32, 128] {
        let slots = vec![[512usize; 30]; rows];
        let mut paid = Vec::new();
        let mut rounds: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                let begin = Instant::now();
                for _ in 0..STEPS {
                    step(&energy, &costs, black_box(&slots), &mut paid);
                }
                begin.elapsed() / STEPS
            })
            .collect();
        rounds.sort();
        let [least, median, most] = [0, ROUNDS / 2, ROUNDS - 1].map(|i| rounds[i].as_nanos());
        println!("{rows} rows: {median} ns a step ({least}–{most})");
    }
}

fn step(energy: &Energy, costs: &Costs, slots: &[[usize; 30]], paid: &mut Vec<rheostat::energy::Paid>) {
    let row = |slots: &[usize; 30]| RowWork {
        tokens: 1,
        sublayers: [30; 2],
        logits: 1,
        kv_slots: slots.iter().sum::<usize>() as u64,
    };
    let done: Vec<RowWork> = slots.iter().map(row).collect();
    let work = costs.shares(&done).enumerate();
    energy.step(work.map(|(i, amount)| Work { id: i as u64, phase: Phase::Decode, amount }), paid);
    black_box(&paid).iter().for_each(|paid| _ = black_box(paid.joules));
    paid.clear();
}
