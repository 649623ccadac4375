//! The global view: the whole padded picture in one tile.
//!
//! torch's bicubic `interpolate` without antialiasing, from the normalised picture. Output `x` of
//! 336 lies at `p = (x + 0.5) * tiles - 0.5` of the inputs, and is the sum of four of them:
//!
//! ```text
//! inputs   floor(p) - 1 ..= floor(p) + 2, cut at the borders
//! weight   k(|distance|), with a = -0.75:
//!          k(d) = (a + 2) d^3 - (a + 3) d^2 + 1         for d up to 1
//!          k(d) = a d^3 - 5 a d^2 + 8 a d - 4 a         for d up to 2
//! ```
//!
//! Four inputs even where one output stands for many: what lies between is not looked at. The
//! padded sides are whole tiles, so `p` is a whole number (the weights are 0, 1, 0, 0) or half of
//! one (-3/32, 19/32, 19/32, -3/32).

use super::{Normalise, Pixels, TILE};

/// Four inputs and their weights, for every output along one axis.
fn taps(tiles: usize) -> Vec<[(usize, f32); 4]> {
    const A: f32 = -0.75;
    let near = |d: f32| ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0;
    let far = |d: f32| ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A;
    let last = tiles * TILE - 1;
    let output = |x: usize| {
        let position = (x as f32 + 0.5) * tiles as f32 - 0.5;
        let floor = position.floor();
        let t = position - floor;
        // `floor` is not negative: the first position is at least 0.
        let input = |offset: usize| (floor as usize + offset).saturating_sub(1).min(last);
        [
            (input(0), far(1.0 + t)),
            (input(1), near(t)),
            (input(2), near(1.0 - t)),
            (input(3), far(2.0 - t)),
        ]
    };
    (0..TILE).map(output).collect()
}

/// Writes the global view, `[3, TILE, TILE]`, of a picture whose sides are whole tiles.
pub(super) fn view(padded: &Pixels, normalise: &Normalise, out: &mut [f32]) {
    let (across, down) = (taps(padded.width / TILE), taps(padded.height / TILE));
    for (y, rows) in down.iter().enumerate() {
        for (x, cols) in across.iter().enumerate() {
            for (c, table) in normalise.table.iter().enumerate() {
                let of_row = |row: usize| -> f32 {
                    let row = padded.row(row);
                    let value = |col: usize| table[usize::from(row[col * 3 + c])];
                    cols.iter().map(|&(col, w)| w * value(col)).sum()
                };
                out[(c * TILE + y) * TILE + x] = rows.iter().map(|&(row, w)| w * of_row(row)).sum();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_whole_and_half_positions() {
        for tiles in 1..=64 {
            for (x, taps) in taps(tiles).iter().enumerate() {
                // Twice the position, exactly: 2 p = (2 x + 1) tiles - 1.
                let twice = (2 * x + 1) * tiles - 1;
                let weights = taps.map(|(_, weight)| weight);
                match twice % 2 {
                    0 => assert_eq!(weights, [0.0, 1.0, 0.0, 0.0]),
                    _ => assert_eq!(weights, [-0.09375, 0.59375, 0.59375, -0.09375]),
                }
                let expected = [0, 1, 2, 3].map(|offset: usize| {
                    (twice / 2 + offset).saturating_sub(1).min(tiles * TILE - 1)
                });
                assert_eq!(
                    taps.map(|(input, _)| input),
                    expected,
                    "output {x} of {tiles} tiles"
                );
            }
        }
    }

    /// With one tile the view is the picture.
    #[test]
    fn one_tile_is_copied() {
        let mut padded = Pixels::filled(TILE, TILE, 0);
        for (i, byte) in padded.data.iter_mut().enumerate() {
            *byte = (i % 251) as u8;
        }
        let normalise = Normalise::new([0.5, 0.25, 0.0], [1.0, 0.5, 0.25]);
        let mut out = vec![f32::NAN; 3 * TILE * TILE];
        view(&padded, &normalise, &mut out);
        for (i, value) in out.iter().enumerate() {
            let (c, pixel) = (i / (TILE * TILE), i % (TILE * TILE));
            let byte = f32::from(padded.data[pixel * 3 + c]);
            let expected = (byte / 255.0 - [0.5, 0.25, 0.0][c]) / [1.0, 0.5, 0.25][c];
            assert_eq!(*value, expected);
        }
    }
}
