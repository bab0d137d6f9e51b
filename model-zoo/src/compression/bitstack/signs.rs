//! Signs as bits: 1 for +1, 0 for −1, the first element in the highest bit of a byte. Zero counts as positive.

/// The signs of `values`, eight a byte; bits after the last are 0.
pub fn pack(values: &[f32]) -> Vec<u8> {
    let byte = |values: &[f32]| {
        values.iter().enumerate().fold(0u8, |byte, (i, &value)| byte | (u8::from(value >= 0.0) << (7 - i)))
    };
    values.chunks(8).map(byte).collect()
}

/// Element `index` of the packed signs: +1 or −1.
pub fn sign(packed: &[u8], index: usize) -> f32 {
    if packed[index / 8] >> (7 - index % 8) & 1 == 1 { 1.0 } else { -1.0 }
}

/// The first `count` signs.
pub fn unpack(packed: &[u8], count: usize) -> Vec<f32> {
    (0..count).map(|index| sign(packed, index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_packed_first_in_the_highest_bit_and_zero_is_positive() {
        assert_eq!(pack(&[1.0, -1.0, -2.0, -0.5, -1.0, -1.0, -3.0, 9.0]), [0x81]);
        assert_eq!(pack(&[0.0, -0.0, -1.0]), [0b1100_0000], "both zeros are +1, the tail is padded with 0");
        let values: Vec<f32> =
            (0..64).map(|i| if i * 7 % 5 < 2 { 0.0 } else { (i % 3) as f32 - 1.5 }).collect();
        let truth: Vec<f32> = values.iter().map(|&v| if v >= 0.0 { 1.0 } else { -1.0 }).collect();
        assert_eq!(unpack(&pack(&values), values.len()), truth);
    }
}
