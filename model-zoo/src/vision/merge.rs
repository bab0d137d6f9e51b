//! Merging neighbouring patches that look alike (MustDrop's local spatial merging; methods.md §6b, stage 1a).
//!
//! The patches' grid is cut into windows of 3×3. Where the mean cosine of a window's pairs reaches the threshold, its
//! nine patches become one, their mean, which stands where the middle one stood. The reference puts merged tokens in
//! front of the others, and takes as many of each image as of the one with the fewest; here the raster order stays, and
//! an image's tokens depend on nothing but the image.

/// Patches along a window's side.
pub const WINDOW: usize = 3;

/// The tokens that are left.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// `[tokens, width]`
    pub states: Vec<f32>,
    /// `[tokens]`: the patch at which each stands, ascending.
    pub places: Vec<usize>,
    /// `[tokens]`: patches of which each is the mean.
    pub sizes: Vec<usize>,
}

/// Merges the windows of `states`, `[grid · grid, width]`, whose mean cosine is at least `threshold`. Patches beyond the
/// last whole window stay.
pub fn merge((states, grid): (&[f32], usize), threshold: f32) -> Merged {
    let width = states.len() / (grid * grid);
    let norms: Vec<f32> = states.chunks_exact(width).map(|state| dot(state, state).sqrt()).collect();
    let side = grid / WINDOW;
    let is_alike = |window| mean_cosine(&members(window, grid), (states, &norms), width) >= threshold;
    let is_merged: Vec<bool> = (0..side * side).map(is_alike).collect();
    let mut merged = Merged { states: Vec::new(), places: Vec::new(), sizes: Vec::new() };
    for place in 0..grid * grid {
        let (row, column) = (place / grid, place % grid);
        let in_window = row < side * WINDOW && column < side * WINDOW;
        let window = row / WINDOW * side + column / WINDOW;
        if in_window && is_merged[window] {
            if (row % WINDOW, column % WINDOW) != (WINDOW / 2, WINDOW / 2) {
                continue;
            }
            merged.states.extend(mean(&members(window, grid), states, width));
            merged.sizes.push(WINDOW * WINDOW);
        } else {
            merged.states.extend_from_slice(&states[place * width..(place + 1) * width]);
            merged.sizes.push(1);
        }
        merged.places.push(place);
    }
    merged
}

/// The patches of a window.
fn members(window: usize, grid: usize) -> [usize; WINDOW * WINDOW] {
    let side = grid / WINDOW;
    let (top, left) = (window / side * WINDOW, window % side * WINDOW);
    std::array::from_fn(|i| (top + i / WINDOW) * grid + left + i % WINDOW)
}

/// Mean cosine of the members' pairs.
fn mean_cosine(members: &[usize], (states, norms): (&[f32], &[f32]), width: usize) -> f32 {
    let state = |member: usize| &states[member * width..(member + 1) * width];
    let (mut sum, mut pairs) = (0f32, 0u16);
    for (index, &a) in members.iter().enumerate() {
        for &b in &members[index + 1..] {
            sum += dot(state(a), state(b)) / (norms[a] * norms[b]).max(f32::MIN_POSITIVE);
            pairs += 1;
        }
    }
    sum / f32::from(pairs)
}

fn mean(members: &[usize], states: &[f32], width: usize) -> Vec<f32> {
    let mut mean = vec![0.0; width];
    for &member in members {
        let state = &states[member * width..(member + 1) * width];
        mean.iter_mut().zip(state).for_each(|(mean, state)| *mean += state / members.len() as f32);
    }
    mean
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    const GRID: usize = 24;
    const WIDTH: usize = 16;

    fn noise(seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..GRID * GRID * WIDTH).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn a_constant_image_merges_everywhere_and_noise_nowhere() {
        let constant: Vec<f32> = noise(1)[..WIDTH].repeat(GRID * GRID);
        let merged = merge((&constant, GRID), 0.8);
        assert_eq!((merged.places.len(), merged.sizes.iter().sum::<usize>()), (64, 576));
        assert!(merged.places.iter().all(|place| place / GRID % 3 == 1 && place % GRID % 3 == 1));
        let random = noise(2);
        let merged = merge((&random, GRID), 0.8);
        assert_eq!((merged.places.len(), &merged.states), (576, &random));
        // No cosine is above 1, not even rounded.
        assert_eq!(merge((&constant, GRID), 1.1).places.len(), 576);
    }

    #[test]
    fn a_merged_token_is_the_mean_of_its_nine_patches_and_no_patch_is_lost() {
        // One window of equal directions and unequal lengths in noise.
        let mut states = noise(3);
        let members: Vec<usize> = (0..9).map(|i| (6 + i / 3) * GRID + 12 + i % 3).collect();
        for (index, &member) in members.iter().enumerate() {
            let direction = noise(4)[..WIDTH].to_vec();
            let state = &mut states[member * WIDTH..(member + 1) * WIDTH];
            state.iter_mut().zip(direction).for_each(|(state, d)| *state = (index + 1) as f32 * d);
        }
        let merged = merge((&states, GRID), 0.8);
        assert_eq!((merged.places.len(), merged.sizes.iter().sum::<usize>()), (568, 576));
        let token =
            merged.places.iter().position(|&place| place == members[4]).expect("the middle one stands");
        for channel in 0..WIDTH {
            let mean = members.iter().map(|m| f64::from(states[m * WIDTH + channel])).sum::<f64>() / 9.0;
            assert!((f64::from(merged.states[token * WIDTH + channel]) - mean).abs() < 1e-5);
        }
    }
}
