//! Every kernel on the emulated device, in both orders, against plain loops in f64: sizes that are multiples of nothing,
//! fresh noise, and NaN wherever nothing was written.

mod attention;
mod compact;
mod gaze;
mod products;
mod pruned;
mod quantized;
mod rows;
mod sampling;
mod stack;

use half::bf16;

use std::sync::Arc;

use super::device::{Buffer, Device, Part};
use super::emulated::{Emulated, Order};

/// The emulated device in both orders in which a missing barrier can show; the machine's GPU instead where
/// `RHEOSTAT_TEST_GPU` asks for it (`deploy/cuda/run-tests`).
pub(crate) fn devices() -> Vec<Arc<dyn Device>> {
    #[cfg(feature = "cuda")]
    if std::env::var_os("RHEOSTAT_TEST_GPU").is_some() {
        return vec![Arc::new(super::driver::Gpu::open(0).unwrap())];
    }
    [Order::Upwards, Order::Downwards].map(|order| Arc::new(Emulated::new(order)) as Arc<dyn Device>).to_vec()
}

/// Memory full of NaN.
fn blank(device: &dyn Device, len: usize) -> Buffer {
    let buffer = device.alloc(len).unwrap();
    device.fill(Part::all(&buffer), 0xFF).unwrap();
    buffer
}

/// Noise from −1 to 1.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The nearest bf16.
fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
}

fn upload(device: &dyn Device, bytes: &[u8]) -> Buffer {
    let buffer = device.alloc(bytes.len()).unwrap();
    device.upload(Part::all(&buffer), bytes).unwrap();
    buffer
}

fn floats(device: &dyn Device, values: &[f32]) -> Buffer {
    upload(device, bytemuck::cast_slice(values))
}

fn words(device: &dyn Device, values: &[u32]) -> Buffer {
    upload(device, bytemuck::cast_slice(values))
}

fn halves(device: &dyn Device, values: &[f32]) -> Buffer {
    let bits: Vec<u16> = values.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
    upload(device, bytemuck::cast_slice(&bits))
}

fn read_floats(device: &dyn Device, buffer: &Buffer) -> Vec<f32> {
    let mut values = vec![0f32; buffer.len() / 4];
    device.download(Part::all(buffer), bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

fn read_halves(device: &dyn Device, buffer: &Buffer) -> Vec<f32> {
    let mut bits = vec![0u16; buffer.len() / 2];
    device.download(Part::all(buffer), bytemuck::cast_slice_mut(&mut bits)).unwrap();
    bits.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
}

/// ‖found − expected‖ / ‖expected‖; NaN of a NaN.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f64], most: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let (mut off, mut norm) = (0f64, 0f64);
    for (&found, &expected) in found.iter().zip(expected) {
        off += (f64::from(found) - expected).powi(2);
        norm += expected.powi(2);
    }
    let error = (off / norm).sqrt();
    assert!(error <= most, "{what}: relative error {error:.2e}, at most {most:.0e}");
}
