//! Element-wise kernels over rows: plain loops that the compiler vectorises, compiled once for each
//! instruction set.

use super::isa::Isa;

/// Defines a function whose plain body is compiled for every [`Isa`] and chosen by its first argument.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::kernels::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn plain($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { plain($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { plain($($arg),*) }
            match isa {
                // SAFETY: an `Isa` other than `Portable` comes from run-time detection.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::isa::Isa::Avx512Vnni => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => plain($($arg),*),
            }
        }
    };
}
pub(crate) use multiversion;

/// `eˣ` to about 2 ulp, branch-free: 2ⁿ by exponent bits times a polynomial on [−ln 2 / 2, ln 2 / 2].
/// Below −87 it gives 0, so that masked scores vanish.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let n = (x.clamp(-87.3, 88.3) * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    // ln 2 in two parts keeps the remainder exact to the last bits.
    let r = (x.clamp(-87.3, 88.3) - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = (p * r + 1.0) * r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { p * power }
}

/// Sum of squares in sixteen lanes, then pairwise: the same order for every row.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for part in chunks {
        for (lane, v) in lanes.iter_mut().zip(part) {
            *lane += v * v;
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane += v * v;
    }
    lanes.iter().sum()
}

multiversion! {
    /// RMSNorm (arXiv 1910.07467) of one row: `out = x / √(mean(x²) + eps) · weight`.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

multiversion! {
    /// RMSNorm of one row in place.
    pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
        let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
        for (v, w) in x.iter_mut().zip(weight) {
            *v = *v * scale * w;
        }
    }
}

multiversion! {
    /// `gate = silu(gate) · up`
    pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

multiversion! {
    /// `gate = gelu(gate) · up` with the tanh approximation: `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
    pub fn gelu_tanh_mul(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            let x = *g;
            let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
            // 0.5·(1 + tanh(y)) = 1 / (1 + e^(−2y))
            *g = x / (1.0 + exp(-2.0 * inner)) * u;
        }
    }
}

multiversion! {
    /// Layer normalization (arXiv 1607.06450) of one row: `out = (x − mean(x)) / √(var(x) + eps) · weight + bias`.
    pub fn layer_norm(x: &[f32], affine: (&[f32], &[f32]), eps: f32, out: &mut [f32]) {
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        for (o, v) in out.iter_mut().zip(x) {
            *o = v - mean;
        }
        let scale = 1.0 / (sum_of_squares(out) / x.len() as f32 + eps).sqrt();
        for ((o, w), b) in out.iter_mut().zip(affine.0).zip(affine.1) {
            *o = *o * scale * w + b;
        }
    }
}

multiversion! {
    /// `x = x · sigmoid(1.702·x)`, CLIP's approximation of GELU.
    pub fn quick_gelu(x: &mut [f32]) {
        for v in x {
            *v = *v / (1.0 + exp(-1.702 * *v));
        }
    }
}

multiversion! {
    /// `x = GELU(x)` (arXiv 1606.08415) by the error function, which is good to 2e-7 (Abramowitz and Stegun
    /// 7.1.26).
    pub fn gelu(x: &mut [f32]) {
        for v in x {
            let z = v.abs() * std::f32::consts::FRAC_1_SQRT_2;
            let t = 1.0 / (1.0 + 0.327_591_1 * z);
            let poly = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_8 + t * (-1.453_152 + t * 1.061_405_4))));
            let tail = 0.5 * poly * exp(-z * z);
            *v *= if *v < 0.0 { tail } else { 1.0 - tail };
        }
    }
}

multiversion! {
    /// Turns a row of scores into probabilities: `x = exp(scale·x − max) / Σ`.
    pub fn softmax(x: &mut [f32], scale: f32) {
        let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut lanes = [0f32; 16];
        for part in x.chunks_mut(16) {
            for (v, lane) in part.iter_mut().zip(&mut lanes) {
                *v = exp(scale * (*v - top));
                *lane += *v;
            }
        }
        let scale = 1.0 / lanes.iter().sum::<f32>();
        for v in x {
            *v *= scale;
        }
    }
}

multiversion! {
    /// Cosine of the angle between two rows; 1 where either is zero, for nothing turned.
    pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; 16];
        let (left, right) = (a.chunks_exact(16), b.chunks_exact(16));
        let (left_rest, right_rest) = (left.remainder(), right.remainder());
        for (a, b) in left.zip(right) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a * b;
            }
        }
        for ((lane, a), b) in lanes.iter_mut().zip(left_rest).zip(right_rest) {
            *lane += a * b;
        }
        let norms = sum_of_squares(a).sqrt() * sum_of_squares(b).sqrt();
        if norms > 0.0 { lanes.iter().sum::<f32>() / norms } else { 1.0 }
    }
}

multiversion! {
    /// `x += y`
    pub fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

/// Adds `bias`, `[channels]`, to every row of `x`.
pub fn add_bias(isa: Isa, x: &mut [f32], bias: &[f32]) {
    x.chunks_exact_mut(bias.len()).for_each(|row| add(isa, row, bias));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The normal distribution's cumulative function, by Simpson's rule.
    fn normal_cdf(x: f64) -> f64 {
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let h = x / 2000.0;
        let inner: f64 =
            (1..2000).map(|i| density(h * f64::from(i)) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        0.5 + h / 3.0 * (density(0.0) + inner + density(x))
    }

    #[test]
    fn exp_is_accurate_and_vanishes() {
        for i in -86_999..=88_000 {
            let x = i as f32 * 1e-3;
            let (ours, truth) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - truth).abs() <= 5e-7 * truth, "{x}: {ours} {truth}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
    }

    #[test]
    fn rows_equal_the_formulas() {
        let x: Vec<f32> = (0..77).map(|i| ((i * 37 % 101) as f32 - 50.0) / 9.0).collect();
        let w: Vec<f32> = (0..77).map(|i| 1.0 + (i % 5) as f32 / 7.0).collect();
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 77.0;
        for isa in Isa::available() {
            let mut out = vec![0f32; 77];
            rms_norm(isa, &x, &w, 1e-5, &mut out);
            let (mut silu, mut gelu) = (x.clone(), x.clone());
            silu_mul(isa, &mut silu, &w);
            gelu_tanh_mul(isa, &mut gelu, &w);
            for i in 0..77 {
                let (v, u) = (f64::from(x[i]), f64::from(w[i]));
                let close =
                    |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 2e-6 * (1.0 + b.abs()), "{a} {b}");
                close(out[i], v / (mean + 1e-5).sqrt() * u);
                close(silu[i], v / (1.0 + (-v).exp()) * u);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044_715 * v.powi(3));
                close(gelu[i], 0.5 * v * (1.0 + inner.tanh()) * u);
            }
            let (mut normed, mut quick, mut exact) = (vec![0f32; 77], x.clone(), x.clone());
            layer_norm(isa, &x, (&w, &w), 1e-5, &mut normed);
            quick_gelu(isa, &mut quick);
            super::gelu(isa, &mut exact);
            let mut shares = x.clone();
            softmax(isa, &mut shares, 0.5);
            let mu = x.iter().map(|&v| f64::from(v)).sum::<f64>() / 77.0;
            let variance = x.iter().map(|&v| (f64::from(v) - mu).powi(2)).sum::<f64>() / 77.0;
            let total: f64 = x.iter().map(|&v| (0.5 * f64::from(v)).exp()).sum();
            for i in 0..77 {
                let (v, u) = (f64::from(x[i]), f64::from(w[i]));
                let close =
                    |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 3e-6 * (1.0 + b.abs()), "{a} {b}");
                close(normed[i], (v - mu) / (variance + 1e-5).sqrt() * u + u);
                close(quick[i], v / (1.0 + (-1.702 * v).exp()));
                close(exact[i], v * normal_cdf(v));
                close(shares[i], (0.5 * v).exp() / total);
            }
            let dot = |a: &[f32], b: &[f32]| {
                a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
            };
            let angle = dot(&x, &w) / (dot(&x, &x) * dot(&w, &w)).sqrt();
            assert!((f64::from(cosine(isa, &x, &w)) - angle).abs() < 1e-6);
            assert_eq!(cosine(isa, &x, &[0.0; 77]), 1.0);
        }
    }
}
