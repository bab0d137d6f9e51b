//! What keeps image tokens without looking at them: the comparison that attention has to win.

use sha2::{Digest, Sha256};

use crate::compression::options::VisionBaseline;
use crate::vision::{EncodedImage, ImageEmbeddings};

/// What `baseline` keeps of `image`, which has more rows than `keep`.
pub(super) fn kept(
    baseline: VisionBaseline,
    image: &ImageEmbeddings,
    (keep, seed): (usize, u64),
) -> ImageEmbeddings {
    let (name, encoded) = match baseline {
        VisionBaseline::Pool => ("pool", pooled(image, keep)),
        VisionBaseline::Random => ("random", drawn(image, (keep, seed))),
    };
    let digest = Sha256::new()
        .chain_update(image.digest())
        .chain_update(name)
        .chain_update((keep as u64).to_le_bytes())
        .chain_update(seed.to_le_bytes());
    ImageEmbeddings::of((image.hidden_size(), image.num_tokens()), encoded, digest.finalize().into())
}

/// `keep` rows at their places, drawn by the seed and the image.
fn drawn(image: &ImageEmbeddings, (keep, seed): (usize, u64)) -> EncodedImage {
    let seed = Sha256::new().chain_update(image.digest()).chain_update(seed.to_le_bytes());
    // The places whose hashes are the least.
    let lot =
        |place: usize| <[u8; 32]>::from(seed.clone().chain_update((place as u64).to_le_bytes()).finalize());
    let mut places: Vec<usize> = image.places().collect();
    places.sort_by_cached_key(|&place| lot(place));
    places.truncate(keep);
    places.sort_unstable();
    let rows = places.iter().filter_map(|&place| image.row(place)).flatten().copied().collect();
    EncodedImage { rows, places: Some(places), salience: Vec::new() }
}

/// Means over the cells of a grid of at most `keep` cells, each at the place of its middle.
fn pooled(image: &ImageEmbeddings, keep: usize) -> EncodedImage {
    let side = image.num_tokens().isqrt();
    // Not a square: a line of patches.
    let [height, width] = if side * side == image.num_tokens() { [side; 2] } else { [1, image.num_tokens()] };
    let [rows, columns] = cells([height, width], keep);
    let hidden = image.hidden_size();
    let mut encoded = EncodedImage { places: Some(Vec::new()), ..EncodedImage::default() };
    for cell in 0..rows * columns {
        let range =
            |index: usize, cells: usize, of: usize| index * of / cells..((index + 1) * of).div_ceil(cells);
        let (ys, xs) = (range(cell / columns, rows, height), range(cell % columns, columns, width));
        let patches = ys.clone().flat_map(|y| xs.clone().map(move |x| y * width + x));
        let mut mean = vec![0f32; hidden];
        let count = (ys.len() * xs.len()) as f32;
        for row in patches.filter_map(|patch| image.row(patch)) {
            mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += value / count);
        }
        encoded.rows.extend(mean);
        let middle = (ys.start + ys.end - 1) / 2 * width + (xs.start + xs.end - 1) / 2;
        encoded.places.get_or_insert_default().push(middle);
    }
    encoded
}

/// The grid of the most cells up to `keep`, of equal ones the squarest.
fn cells([height, width]: [usize; 2], keep: usize) -> [usize; 2] {
    let grids = (1..=height.min(keep)).map(|rows| [rows, (keep / rows).min(width)]);
    let squareness = |[rows, columns]: [usize; 2]| std::cmp::Reverse(rows.abs_diff(columns));
    grids.max_by_key(|&grid| (grid[0] * grid[1], squareness(grid))).unwrap_or([1, 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_has_as_many_cells_as_it_may_and_is_as_square_as_it_can() {
        for (keep, grid) in
            [(192, [12, 16]), (128, [8, 16]), (64, [8, 8]), (9, [3, 3]), (7, [1, 7]), (1, [1, 1])]
        {
            let found = cells([24, 24], keep);
            assert!(found == grid || found == [grid[1], grid[0]], "{keep}: {found:?}");
        }
    }

    #[test]
    fn pooling_keeps_the_mean_and_drawing_keeps_rows_of_the_image() {
        let rows: Vec<f32> = (0..36 * 2).map(|i| (i * i % 17) as f32).collect();
        let image = ImageEmbeddings::new(2, rows.clone(), [3; 32]);
        let pooled = kept(VisionBaseline::Pool, &image, (9, 0));
        assert_eq!(pooled.places().collect::<Vec<_>>(), [0, 2, 4, 12, 14, 16, 24, 26, 28]);
        let mean = |rows: &[f32]| rows.iter().sum::<f32>() / rows.len() as f32;
        assert!((mean(&pooled.encoded().rows) - mean(&rows)).abs() < 1e-5);
        let cell = [0, 1, 6, 7].map(|patch| rows[2 * patch]);
        assert!((pooled.row(0).expect("a cell")[0] - mean(&cell)).abs() < 1e-6);

        let drawn = kept(VisionBaseline::Random, &image, (9, 1));
        assert_eq!((drawn.num_rows(), drawn.num_tokens()), (9, 36));
        assert!(drawn.places().all(|place| drawn.row(place) == image.row(place)));
        assert_eq!(kept(VisionBaseline::Random, &image, (9, 1)), drawn);
        let other = kept(VisionBaseline::Random, &image, (9, 2));
        assert_ne!(other.encoded().places, drawn.encoded().places);
        assert!(other.digest() != drawn.digest() && pooled.digest() != image.digest());
    }
}
