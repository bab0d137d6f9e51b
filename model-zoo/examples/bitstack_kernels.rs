//! Times the matrices of SmolLM2-135M's 30 layers in levels of random blocks: signed sums, reconstruction, and the same
//! matrices in Q4_1, in turns; of each layer the
//! least time of nine rounds, so that it matters little what else the machine does.
//!
//! ```sh
//! cargo run --release -p model-zoo --example bitstack_kernels -- THREADS RANK,LEVELS[,RANK,LEVELS…] TOKENS[,TOKENS…]
//! ```

use std::time::Instant;

use model_zoo::kernels::cpu::bitstack::{self, Columns, Level, LevelParts, LevelShape, Rows, StackProduct};
use model_zoo::kernels::cpu::isa::Isa;
use model_zoo::kernels::cpu::packed::{self, PackedMatrix, Packing, Product, UnpackedBlock, Write};
use model_zoo::kernels::cpu::pool::Pool;
use model_zoo::kernels::cpu::quantize::QuantizedRows;

const LAYERS: usize = 30;
const ROUNDS: usize = 9;
/// Rows and columns of the matrices that share their input: q, k and v; o; gate and up; down.
const CALLS: [&[[usize; 2]]; 4] =
    [&[[576, 576], [192, 576], [192, 576]], &[[576, 576]], &[[1536, 576], [1536, 576]], &[[576, 1536]]];

/// xorshift64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// f16 bits of a number between 1/16 and 1/4 of either sign.
    fn factor(&mut self) -> u16 {
        let random = self.next() as u16;
        (random & 0x8000) | (0x2C00 + random % 0x0800)
    }

    fn level(&mut self, shape: LevelShape) -> Level {
        let LevelShape { rows, cols, rank } = shape;
        let signs: Vec<u8> = (0..rows * cols / 8).map(|_| self.next() as u8).collect();
        let left: Vec<u16> = (0..rows * rank).map(|_| self.factor()).collect();
        let right: Vec<u16> = (0..cols * rank).map(|_| self.factor()).collect();
        Level::new(shape, &LevelParts { signs: &signs, left: &left, right: &right }).expect("a valid shape")
    }
}

/// One call's matrices in levels and in Q4_1.
struct Call {
    channels: usize,
    levels: Vec<Vec<Level>>,
    packed: Vec<PackedMatrix>,
}

fn calls(random: &mut Random, pool: &Pool, (rank, levels): (usize, usize)) -> Vec<Call> {
    let mut calls = Vec::new();
    for shapes in (0..LAYERS).flat_map(|_| CALLS) {
        let level = |[rows, cols]: [usize; 2]| LevelShape { rows, cols, rank };
        let block = |row: usize, block: usize| UnpackedBlock {
            q: std::array::from_fn(|i| ((7 * row + 3 * block + i) % 16) as i8),
            scale: [0.01; 2],
            min: -0.08,
        };
        calls.push(Call {
            channels: shapes[0][1],
            levels: shapes.iter().map(|&s| (0..levels).map(|_| random.level(level(s))).collect()).collect(),
            packed: shapes.iter().map(|&s| PackedMatrix::pack(pool, s, Packing::Affine4, block)).collect(),
        });
    }
    calls
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Signed,
    Reconstructed,
    Packed,
}

/// Milliseconds of each call.
fn time(way: Way, (pool, isa): (&Pool, Isa), calls: &[Call], x: &[Vec<f32>; 2]) -> Vec<f64> {
    let (mut quantized, mut columns) = (QuantizedRows::default(), Columns::default());
    let tokens = x[0].len() / 576;
    let all: Vec<usize> = (0..tokens).collect();
    let mut outs = vec![vec![0f32; tokens * 1536]; 3];
    let mut begin = Instant::now();
    let mut times = Vec::new();
    let mut lap = || times.push(std::mem::replace(&mut begin, Instant::now()).elapsed().as_secs_f64() * 1e3);
    for call in calls {
        let x = &x[usize::from(call.channels > 576)];
        let used = vec![call.levels[0].len(); tokens];
        if way != Way::Signed {
            quantized.quantize(pool, x, call.channels);
        }
        if way == Way::Packed {
            let products = outs.iter_mut().zip(&call.packed);
            let mut products: Vec<_> = products
                .map(|(out, matrix)| Product {
                    matrix,
                    write: Write::Store,
                    out: &mut out[..tokens * matrix.rows()],
                })
                .collect();
            packed::matmul_many(pool, isa, &quantized, &mut products);
            lap();
            continue;
        }
        let products = outs.iter_mut().zip(&call.levels);
        let mut products: Vec<_> = products
            .map(|(out, levels)| {
                let out = &mut out[..tokens * levels[0].shape().rows];
                StackProduct { levels, used: &used, write: Write::Store, out }
            })
            .collect();
        let (few, many): (&[usize], &[usize]) = if way == Way::Signed { (&all, &[]) } else { (&[], &all) };
        let rows = Rows { x, channels: call.channels, few, many };
        bitstack::matmul_many((pool, isa), rows, (&quantized, &mut columns), &mut products);
        lap();
    }
    times
}

/// The sum over calls of the least time of each.
fn least(rounds: &[Vec<f64>]) -> f64 {
    let of = |call: usize| rounds.iter().map(|round| round[call]).fold(f64::INFINITY, f64::min);
    (0..rounds[0].len()).map(of).sum()
}

fn main() {
    let args: Vec<Vec<usize>> = std::env::args()
        .skip(1)
        .map(|list| list.split(',').map(|n| n.parse().expect("a number")).collect())
        .collect();
    let [threads, points, tokens] = args.as_slice() else { panic!("THREADS RANK,LEVELS[,…] TOKENS[,…]") };
    let (pool, isa) = (Pool::new(threads[0]), Isa::detect());
    let mut random = Random(88_172_645_463_325_252);
    println!("| rank | levels | tokens | signed, ms | reconstructed, ms | Q4_1, ms | Q4_1 ÷ signed |");
    println!("|---|---|---|---|---|---|---|");
    for point in points.chunks_exact(2) {
        let calls = calls(&mut random, &pool, (point[0], point[1]));
        for &tokens in tokens {
            let x =
                [576, 1536].map(|n| (0..n * tokens).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect());
            let mut times: [Vec<Vec<f64>>; 3] = Default::default();
            for _ in 0..ROUNDS {
                for (way, times) in [Way::Signed, Way::Reconstructed, Way::Packed].into_iter().zip(&mut times)
                {
                    times.push(time(way, (&pool, isa), &calls, &x));
                }
            }
            let [signed, made, q4] = times.each_ref().map(|rounds| least(rounds));
            let (rank, levels) = (point[0], point[1]);
            println!(
                "| {rank} | {levels} | {tokens} | {signed:.2} | {made:.2} | {q4:.2} | {:.2} |",
                q4 / signed
            );
        }
    }
}
