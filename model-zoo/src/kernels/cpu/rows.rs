//! Loops over the rows of a step, in parallel where that pays.

use super::pool::{Disjoint, Pool};

/// Work, in elements, below which a second thread costs more than it saves.
const SERIAL: usize = 16_384;

fn run(pool: &Pool, rows: usize, work_per_row: usize, body: impl Fn(usize) + Sync) {
    if rows * work_per_row < SERIAL {
        (0..rows).for_each(body);
        return;
    }
    let per_chunk = rows.div_ceil(4 * pool.threads());
    pool.run(rows.div_ceil(per_chunk), |chunk| {
        (chunk * per_chunk..((chunk + 1) * per_chunk).min(rows)).for_each(&body);
    });
}

/// Runs `body(row, x[row])` for every row of `x`, `[rows, width]`; `weight` says how much more than one
/// pass over the row's elements a row costs.
pub fn for_each_row(
    pool: &Pool,
    (x, width): (&mut [f32], usize),
    weight: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    let rows = x.len() / width;
    let x = Disjoint::new(x);
    // SAFETY: a row belongs to one call of `body`.
    run(pool, rows, width * weight, |row| body(row, unsafe { x.part(row * width, width) }));
}

/// [`for_each_row`] over two arrays with the same number of rows.
pub fn for_each_row_pair(
    pool: &Pool,
    (a, a_width): (&mut [f32], usize),
    (b, b_width): (&mut [f32], usize),
    body: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    let rows = a.len() / a_width;
    assert_eq!(rows, b.len() / b_width, "invariant: the arrays have the same rows");
    let (a, b) = (Disjoint::new(a), Disjoint::new(b));
    run(pool, rows, 8 * (a_width + b_width), |row| {
        // SAFETY: a row of either belongs to one call of `body`.
        let (a, b) = unsafe { (a.part(row * a_width, a_width), b.part(row * b_width, b_width)) };
        body(row, a, b);
    });
}
