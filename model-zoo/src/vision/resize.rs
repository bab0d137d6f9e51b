//! Resizing as Pillow does it, bit for bit: separable filters that widen when they shrink the image, in
//! fixed-point arithmetic over bytes, first along rows, then along columns.
//!
//! Only the part that a crop keeps is computed, so that an image of any shape costs what its own pixels and
//! the crop cost.

use std::ops::Range;

use super::decode::RgbImage;

/// Bits after the point of a coefficient: Pillow's.
const PRECISION: u32 = 22;

/// A filter of [`resize`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filter {
    /// Triangle.
    Bilinear,
    /// Keys' cubic with a = −0.5.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Bicubic => 0.0,
        }
    }
}

/// The source pixels of one target pixel, and their weights.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Resizes `image` to `width` × `height` and returns the part of it in `columns` and `rows`.
pub(super) fn resize(
    image: &RgbImage,
    [width, height]: [usize; 2],
    (columns, rows): (Range<usize>, Range<usize>),
    filter: Filter,
) -> RgbImage {
    let across: Vec<Taps> = columns.map(|x| taps(filter, (image.width, width), x)).collect();
    let down: Vec<Taps> = rows.map(|y| taps(filter, (image.height, height), y)).collect();
    let needed = down.iter().map(|taps| taps.first).min().unwrap_or(0)
        ..down.iter().map(|taps| taps.first + taps.weights.len()).max().unwrap_or(0);
    let mut narrow = Vec::with_capacity(needed.len() * across.len() * 3);
    for y in needed.clone() {
        let line = &image.pixels[3 * y * image.width..3 * (y + 1) * image.width];
        for taps in &across {
            narrow.extend(blend(taps, |i| &line[3 * i..]));
        }
    }
    let stride = 3 * across.len();
    let mut pixels = Vec::with_capacity(down.len() * stride);
    for taps in &down {
        for x in 0..across.len() {
            pixels.extend(blend(taps, |i| &narrow[(i - needed.start) * stride + 3 * x..]));
        }
    }
    RgbImage { width: across.len(), height: down.len(), pixels }
}

/// The weighted sum of a pixel's taps.
fn blend<'a>(taps: &Taps, pixel: impl Fn(usize) -> &'a [u8]) -> [u8; 3] {
    let mut sums = [1i32 << (PRECISION - 1); 3];
    for (i, &weight) in taps.weights.iter().enumerate() {
        for (sum, &value) in sums.iter_mut().zip(pixel(taps.first + i)) {
            *sum += i32::from(value) * weight;
        }
    }
    sums.map(|sum| (sum >> PRECISION).clamp(0, 255) as u8)
}

/// The taps of pixel `at` when `from` pixels become `to`.
fn taps(filter: Filter, (from, to): (usize, usize), at: usize) -> Taps {
    if from == to {
        return Taps { first: at, weights: vec![1 << PRECISION] };
    }
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let center = (at as f64 + 0.5) * scale;
    let first = ((center - support + 0.5) as i64).max(0) as usize;
    let end = ((center + support + 0.5) as i64).min(from as i64) as usize;
    let weight = |x: usize| filter.at((x as f64 - center + 0.5) / stretch);
    let total: f64 = (first..end).map(weight).sum();
    let fixed = |x: usize| {
        let weight = weight(x) / total * f64::from(1u32 << PRECISION);
        (weight + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
    };
    Taps { first, weights: (first..end).map(fixed).collect() }
}
