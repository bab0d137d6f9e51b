//! Levels of a model's shape that were made from nothing: for measurements of speed.

use half::f16;

use super::LinearId;
use crate::config::DecoderConfig;
use crate::kernels::cpu::bitstack::LevelShape;
use crate::weights::levels::{LevelEntry, LevelSource, StoredLevel};
use crate::{Result, ZooError};

/// Values that repeat: large beside any cache.
const BLOCK: usize = (16 << 20) + 7;
/// The largest factor: products of `A` and `B` are then of the size of usual weights.
const SCALE: f32 = 0.08;

/// Noise in the form of an artefact: as many levels of every matrix, level by level.
#[derive(Debug)]
pub struct RandomLevels {
    base: Vec<LevelEntry>,
    stack: Vec<LevelEntry>,
    signs: Vec<u8>,
    /// f16, little-endian.
    factors: Vec<u8>,
}

impl RandomLevels {
    /// `levels` levels of rank `rank` of every matrix of a model of `config`, the same each time.
    pub fn of(config: &DecoderConfig, levels: usize, rank: usize) -> Self {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u32
        };
        let signs = (0..BLOCK).map(|_| next() as u8).collect();
        let factor = |word: u32| f16::from_f32((word as f32 / (1 << 23) as f32 - 1.0) * SCALE).to_le_bytes();
        let factors = (0..BLOCK / 16).flat_map(|_| factor(next())).collect();
        let entry = |linear: LinearId, level: usize| {
            let name = linear.weight_name();
            let matrix = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
            let [rows, cols] = linear.projection.size(config);
            LevelEntry { matrix, level, shape: LevelShape { rows, cols, rank } }
        };
        let of_level =
            |level: usize| LinearId::all(config.num_layers).map(move |linear| entry(linear, level));
        Self { base: of_level(0).collect(), stack: (1..levels).flat_map(of_level).collect(), signs, factors }
    }

    /// Each level begins at another place of the noise.
    fn level(&self, entry: &LevelEntry) -> Result<StoredLevel> {
        let LevelShape { rows, cols, rank } = entry.shape;
        let start = entry
            .matrix
            .bytes()
            .fold(7 + entry.level, |hash, byte| (hash ^ byte as usize).wrapping_mul(16_777_619));
        let mut bytes = Vec::new();
        for (noise, len) in [(&self.signs, rows * cols / 8), (&self.factors, 2 * rank * (rows + cols))] {
            let (mut from, end) = (start % noise.len() / 2 * 2, bytes.len() + len);
            while bytes.len() < end {
                let some = (noise.len() - from).min(end - bytes.len());
                bytes.extend_from_slice(&noise[from..from + some]);
                from = 0;
            }
        }
        let wrong = || ZooError::Unsupported(format!("random levels of {}", entry.matrix));
        StoredLevel::new(entry.shape, bytes).ok_or_else(wrong)
    }
}

impl LevelSource for RandomLevels {
    fn base(&self) -> &[LevelEntry] {
        &self.base
    }

    fn stack(&self) -> &[LevelEntry] {
        &self.stack
    }

    fn read_base(&self, index: usize) -> Result<StoredLevel> {
        self.level(&self.base[index])
    }

    fn read(&self, index: usize) -> Result<StoredLevel> {
        self.level(&self.stack[index])
    }
}
