use half::f16;

use super::*;
use crate::config::Activation;
use crate::kernels::cpu::bitstack::{LevelParts, LevelShape};
use crate::kernels::cuda::ops::{After, Tokens};
use crate::kernels::cuda::stack::{DeviceLevel, Entry, Input, Stack, StackPart, few, whole};

/// A matrix in random levels: on the device, and what its first levels add up to.
struct Case {
    rows: usize,
    /// `[levels][rows, cols]`: each level's own part.
    levels: Vec<Vec<f64>>,
    /// Blocks that a token has which uses a level.
    from: Vec<u32>,
    entries: Buffer,
    _memory: Vec<Buffer>,
}

/// A permutation of `0..rows`.
fn scrambled(rows: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rows).collect();
    let keys = noise(rows as u64, rows);
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
    order
}

impl Case {
    /// `levels` levels, the first of which is the base, and whose rows come in a scrambled order.
    fn new(device: &dyn Device, shape: LevelShape, (levels, units, seed): (usize, usize, u64)) -> Self {
        let LevelShape { rows, cols, rank } = shape;
        let order = scrambled(rows);
        // Each part has its own places in the stack.
        let from = |level: u32| if level == 0 { 0 } else { level * (3 + level) + seed as u32 % 3 };
        let from: Vec<u32> = (0..levels as u32).map(from).collect();
        let (mut own, mut memory, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for (level, &from) in from.iter().enumerate() {
            let seed = seed + 10 * level as u64;
            let signs: Vec<u8> =
                noise(seed + 1, rows * cols / 8).iter().map(|v| (v * 128.0) as i32 as u8).collect();
            let half = |seed, len, scale: f32| -> Vec<f16> {
                noise(seed, len).iter().map(|v| f16::from_f32(v * scale)).collect()
            };
            let (left, right) = (half(seed + 2, rows * rank, 1.0), half(seed + 3, rank * cols, 0.3));
            let sum = |row: usize, col: usize| {
                let term = |c: usize| left[row * rank + c].to_f64() * right[c * cols + col].to_f64();
                let at = row * cols + col;
                let plus = signs[at / 8] >> (7 - at % 8) & 1 == 1;
                (0..rank).map(term).sum::<f64>() * if plus { 1.0 } else { -1.0 }
            };
            own.push(order.iter().flat_map(|&row| (0..cols).map(move |col| sum(row, col))).collect());
            let bits = |values: &[f16]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let (left, right) = (bits(&left), bits(&right));
            let parts = LevelParts { signs: &signs, left: &left, right: &right };
            let layout = DeviceLevel { units, ..DeviceLevel::of(shape) };
            let packed = layout.pack(shape, &parts, &order).unwrap();
            assert_eq!(packed.len(), layout.bytes());
            let buffer = upload(device, &packed);
            let entry = Entry { level: buffer.address(), from, pad: 0 };
            entries.extend(entry.bytes());
            memory.push(buffer);
        }
        Self { rows, levels: own, from, entries: upload(device, &entries), _memory: memory }
    }

    fn part(&self) -> StackPart {
        StackPart { entries: Part::all(&self.entries), levels: self.from.len(), rows: self.rows }
    }

    /// The matrix of `blocks` blocks.
    fn sum(&self, blocks: u32) -> Vec<f64> {
        let mut sum = vec![0.0; self.levels[0].len()];
        let used = self.levels.iter().zip(&self.from).filter(|(_, from)| **from <= blocks);
        used.for_each(|(level, _)| sum.iter_mut().zip(level).for_each(|(sum, v)| *sum += v));
        sum
    }
}

/// The joint matrix of `cases` by `blocks`: one after the other, or two in alternating eights.
fn joint(cases: &[Case], (eights, cols): (bool, usize), blocks: u32) -> Vec<f64> {
    let sums: Vec<Vec<f64>> = cases.iter().map(|case| case.sum(blocks)).collect();
    if !eights {
        return sums.concat();
    }
    let eight = 8 * cols;
    sums[0].chunks(eight).zip(sums[1].chunks(eight)).flat_map(|(gate, up)| [gate, up].concat()).collect()
}

fn multiply(x: &[f32], w: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|w| x.iter().zip(w).map(|(&x, w)| f64::from(x) * w).sum()).collect()
}

/// Parts, whether they alternate, columns, rank, levels, and tokens with their blocks.
type Shape<'a> = (&'a [usize], bool, usize, usize, usize, &'a [u32]);

/// A case on a device with everything that its products need.
struct Bench<'a> {
    device: &'a dyn Device,
    cases: Vec<Case>,
    parts: Vec<StackPart>,
    cols: usize,
    eights: bool,
    units: usize,
    bias: Buffer,
    /// bf16, as f32.
    x: Vec<f32>,
    /// Where the tokens lie among a step's, and each one's blocks; every other place has more blocks than levels.
    index: Vec<u32>,
    blocks: Vec<u32>,
}

impl<'a> Bench<'a> {
    fn new(device: &'a dyn Device, (rows, eights, cols, rank, levels, blocks): Shape<'_>, seed: u64) -> Self {
        let units = rank.div_ceil(16);
        let case = |(i, &rows): (usize, &usize)| {
            let shape = LevelShape { rows, cols, rank };
            Case::new(device, shape, (levels, units, seed + 1000 * i as u64))
        };
        let cases: Vec<Case> = rows.iter().enumerate().map(case).collect();
        let parts = cases.iter().map(Case::part).collect();
        let tokens = blocks.len();
        Self {
            device,
            parts,
            cols,
            eights,
            units,
            bias: floats(device, &noise(seed + 4, rows.iter().sum())),
            x: rounded(&noise(seed + 5, tokens * cols)),
            index: (0..tokens as u32).map(|i| 2 * (tokens as u32 - 1 - i) + 1).collect(),
            blocks: blocks.to_vec(),
            cases,
        }
    }

    fn stack(&self) -> Stack<'_> {
        let (eights, cols, units) = (self.eights, self.cols, self.units);
        Stack { parts: &self.parts, eights, bias: Part::all(&self.bias), cols, units }
    }

    /// Runs some of the tokens.
    fn run(&self, which: &[usize], after: impl FnOnce() -> After) {
        let pick = |i: &usize| self.x[i * self.cols..(i + 1) * self.cols].to_vec();
        let x = halves(self.device, &which.iter().flat_map(pick).collect::<Vec<_>>());
        let index: Vec<u32> = which.iter().map(|&i| self.index[i]).collect();
        let mut step = vec![1000; 2 * self.index.len() + 1];
        self.index.iter().zip(&self.blocks).for_each(|(&at, &blocks)| step[at as usize] = blocks);
        let (index, step) = (words(self.device, &index), words(self.device, &step));
        let tokens = Tokens { count: which.len(), index: Part::all(&index), skips: None };
        let input = Input { x: Part::all(&x), tokens, blocks: Part::all(&step) };
        let stack = self.stack();
        let sums = blank(self.device, stack.sums_bytes(self.device, which.len()));
        few(self.device, &stack, input, (Part::all(&sums), after())).unwrap();
    }

    fn floats(&self, which: &[usize]) -> Vec<f32> {
        let out = blank(self.device, 4 * which.len() * self.stack().rows());
        self.run(which, || After::Float(Part::all(&out)));
        read_floats(self.device, &out)
    }

    /// Of all tokens.
    fn expected(&self) -> Vec<f64> {
        let bias = read_floats(self.device, &self.bias);
        let tokens = self.x.chunks_exact(self.cols).zip(&self.blocks);
        let token = |(x, &blocks): (&[f32], &u32)| {
            let y = multiply(x, &joint(&self.cases, (self.eights, self.cols), blocks));
            y.into_iter().zip(&bias).map(|(y, &b)| y + f64::from(b)).collect::<Vec<_>>()
        };
        tokens.flat_map(token).collect()
    }

    fn all(&self) -> Vec<usize> {
        (0..self.blocks.len()).collect()
    }
}

/// Ranks of one unit and of two, whole and not; columns in one chunk and in several, whole and not; rows in one block and
/// in two; parts; from 1 to 32 tokens of different levels.
const SHAPES: [Shape<'_>; 10] = [
    (&[37], false, 32, 8, 1, &[0]),
    (&[72, 72], true, 672, 16, 4, &[9]),
    (&[24, 9, 9], false, 352, 24, 3, &[4]),
    (&[530], false, 576, 32, 2, &[20]),
    (&[130], false, 288, 16, 4, &[9, 0, 18]),
    (&[48, 16, 16], false, 352, 16, 3, &[4, 3, 10, 0, 11, 100, 4, 9]),
    (&[72, 72], true, 96, 24, 3, &[10, 10, 4, 0, 3]),
    (&[530], false, 64, 32, 2, &[4, 0]),
    (&[24, 8], false, 544, 3, 2, &[0; 9]),
    (&[40, 40], true, 320, 16, 4, &[18; 32]),
];

#[test]
fn products_of_few_tokens_with_levels_equal_f64_loops() {
    for device in devices() {
        for (seed, shape) in SHAPES.into_iter().enumerate() {
            let mut bench = Bench::new(&*device, shape, 77 * seed as u64);
            // Counts of every kind among many tokens, too.
            if bench.blocks.len() > 9 {
                bench.blocks.iter_mut().enumerate().for_each(|(i, blocks)| *blocks = 3 * i as u32 % 20);
            }
            let what = format!("shape {seed} {device:?}");
            let expected = bench.expected();
            assert_close(&bench.floats(&bench.all()), &expected, 4e-3, &what);

            let (tokens, rows) = (bench.blocks.len(), bench.stack().rows());
            let out = blank(&*device, 2 * tokens * rows);
            bench.run(&bench.all(), || After::Half(Part::all(&out)));
            assert_close(&read_halves(&*device, &out), &expected, 6e-3, &format!("half {what}"));

            let residual = noise(5, (2 * tokens + 1) * rows);
            let out = floats(&*device, &residual);
            bench.run(&bench.all(), || After::Add(Part::all(&out)));
            let mut sum: Vec<f64> = residual.iter().map(|&v| f64::from(v)).collect();
            for (i, &at) in bench.index.iter().enumerate() {
                (0..rows).for_each(|j| sum[at as usize * rows + j] += expected[i * rows + j]);
            }
            assert_close(&read_floats(&*device, &out), &sum, 4e-3, &format!("add {what}"));

            if bench.eights {
                let out = blank(&*device, tokens * rows);
                bench.run(&bench.all(), || After::Gate(Part::all(&out), Activation::Silu));
                let gated = |y: &[f64]| {
                    let gate = |i: usize| y[i] / (1.0 + (-y[i]).exp()) * y[i + 8];
                    (0..rows).filter(|row| row % 16 < 8).map(gate).collect::<Vec<_>>()
                };
                let expected: Vec<f64> = expected.chunks_exact(rows).flat_map(gated).collect();
                assert_close(&read_halves(&*device, &out), &expected, 8e-3, &format!("gate {what}"));
            }
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_beside_tokens_of_other_levels() {
    for device in devices() {
        let blocks: Vec<u32> = (0..13).map(|i| 3 * i % 20).collect();
        let bench = Bench::new(&*device, (&[48, 16, 16], false, 608, 16, 4, &blocks), 3);
        let rows = bench.stack().rows();
        // By the kernel of up to 32 tokens and the one of up to 8.
        let together = bench.floats(&bench.all());
        let expected = bench.expected();
        for token in [0, 5, 6, 12] {
            let own = token * rows..(token + 1) * rows;
            assert_eq!(bench.floats(&[token, token])[..rows], together[own.clone()], "token {token}");
            let beside = bench.floats(&[4, token, 1]);
            assert_eq!(beside[rows..2 * rows], together[own.clone()], "token {token} beside others");
            // Alone it goes another way.
            assert_close(&bench.floats(&[token]), &expected[own], 4e-3, &format!("token {token} alone"));
        }
    }
}

#[test]
fn the_whole_matrix_is_the_sum_of_the_levels_that_are_used() {
    for device in devices() {
        for (seed, shape) in SHAPES.into_iter().enumerate() {
            let bench = Bench::new(&*device, shape, 55 * seed as u64);
            for blocks in [0, 4, 9, 1000] {
                let stack = bench.stack();
                let out = blank(&*device, 2 * stack.rows() * stack.cols);
                whole(&*device, &stack, blocks, Part::all(&out)).unwrap();
                let expected = joint(&bench.cases, (bench.eights, bench.cols), blocks);
                let what = format!("shape {seed}, {blocks} blocks, {device:?}");
                assert_close(&read_halves(&*device, &out), &expected, 3e-3, &what);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let devices = devices();
    let device = &*devices[0];
    let bench = Bench::new(device, (&[16], false, 64, 16, 2, &[0; 3]), 1);
    let (x, blocks, out) = (blank(device, 2 * 3 * 64), words(device, &[0; 3]), blank(device, 4 * 3 * 16));
    let sums = blank(device, bench.stack().sums_bytes(device, 3));
    let run = |stack: &Stack<'_>, count: usize, x: &Buffer| {
        let tokens = Tokens { count, index: Part::NONE, skips: None };
        let input = Input { x: Part::all(x), tokens, blocks: Part::all(&blocks) };
        few(device, stack, input, (Part::all(&sums), After::Float(Part::all(&out))))
    };
    let stack = bench.stack();
    assert!(run(&stack, 3, &x).is_ok());
    assert!(run(&stack, 33, &x).unwrap_err().to_string().contains("33 tokens"));
    let error = run(&stack, 3, &blank(device, 2 * 3 * 64 - 1)).unwrap_err().to_string();
    assert!(error.contains("x: 384 bytes are needed"), "{error}");
    for wrong in [Stack { units: 3, ..stack }, Stack { cols: 40, ..stack }, Stack { eights: true, ..stack }] {
        assert!(run(&wrong, 1, &x).unwrap_err().to_string().contains("no kernel"));
    }
    assert!(whole(device, &stack, 0, Part::all(&out)).is_err(), "no room for the matrix");
    let shape = LevelShape { rows: 4, cols: 32, rank: 2 };
    let parts = LevelParts { signs: &[0; 16], left: &[0; 8], right: &[0; 64] };
    let layout = DeviceLevel::of(shape);
    assert!(layout.pack(shape, &parts, &[0, 1, 2, 3]).is_ok());
    assert!(layout.pack(shape, &parts, &[0, 1, 2, 4]).is_err(), "a row that is not there");
    let short = LevelParts { left: &[0; 7], ..parts };
    assert!(layout.pack(shape, &short, &[0, 1, 2, 3]).is_err(), "factors of another length");
}
