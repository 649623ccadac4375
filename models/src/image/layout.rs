//! How large a picture becomes: as many 336x336 tiles as the budget allows, in its own shape.
//!
//! The rule, for a picture at least as wide as high (others are turned over their diagonal, the
//! rule applied, and turned back):
//!
//! ```text
//! ratio = width / height
//! scale = the last of 1, 2, 3, ... before   scale * ceil(scale / ratio) > num_crops
//! width becomes 336 * scale, height floor(336 * scale / ratio)
//! ```
//!
//! `scale` is the number of tiles across and `ceil(scale / ratio)` those down. The search stops at
//! the *first* scale that is too large, as the reference does. What is missing to whole tiles is
//! white, half of it before the picture (rounded down) and half behind. Small pictures grow.

use super::{Pixels, TILE};

/// Largest budget of tiles; the published ones are 4 and 16.
pub const MAX_CROPS: usize = 64;

/// Patches of a tile after 2x2 of them were merged: 336 / 14 / 2 each way.
const MERGED: usize = 12;

/// Tiles down and across.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Tiles down.
    pub rows: usize,
    /// Tiles across.
    pub cols: usize,
}

impl Grid {
    /// All of them.
    pub fn tiles(self) -> usize {
        self.rows * self.cols
    }

    /// Positions in the prompt: 12 x 12 of every tile and of the global view, a separator at the
    /// end of every line of either, and one between the two.
    pub fn tokens(self) -> usize {
        let patches = (self.tiles() + 1) * MERGED * MERGED;
        let line_ends = (self.rows + 1) * MERGED;
        patches + line_ends + 1
    }
}

/// Positions that pictures of so many crops in all take at least: those of one picture with one row of tiles.
pub(crate) fn fewest_tokens(crops: usize) -> usize {
    let tiles = Grid {
        rows: 1,
        cols: crops - 1,
    };
    tiles.tokens()
}

/// The fewest tiles that any picture becomes; small ones grow, so these are about half of the budget. `scale` tiles
/// across and `down` of them are chosen for some shape when one more of each would be too many: the shape
/// `scale : down` has those with the next scale.
pub(crate) fn fewest_tiles(num_crops: usize) -> usize {
    let grids = (1..=num_crops).flat_map(|scale| (1..=scale).map(move |down| (scale, down)));
    let chosen = grids
        .filter(|(scale, down)| scale * down <= num_crops && (scale + 1) * (down + 1) > num_crops);
    let tiles = chosen.map(|(scale, down)| scale * down);
    tiles.min().unwrap_or(1)
}

/// What becomes of a picture of some size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Columns after resizing.
    pub width: usize,
    /// Rows after resizing.
    pub height: usize,
    /// White columns to the left; those to the right fill up the tile.
    pub left: usize,
    /// White rows above; those below fill up the tile.
    pub top: usize,
    /// The tiles the padded picture is cut into.
    pub grid: Grid,
}

/// A picture whose short side would become less than a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{width} x {height} pixels resize to {long} x 0; \
     expected a long side of at most {} times the short one", TILE * num_crops
)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub struct TooNarrow {
    pub width: usize,
    pub height: usize,
    pub long: usize,
    pub num_crops: usize,
}

impl Layout {
    /// The layout of a picture of `width` x `height` pixels in at most `num_crops` tiles.
    ///
    /// # Errors
    /// [`TooNarrow`]: the short side is zero or would become so.
    ///
    /// # Panics
    /// If `num_crops` is not 1 to [`MAX_CROPS`].
    pub fn new(width: usize, height: usize, num_crops: usize) -> Result<Self, TooNarrow> {
        assert!(
            (1..=MAX_CROPS).contains(&num_crops),
            "{num_crops} crops, at most {MAX_CROPS}"
        );
        let portrait = width < height;
        let ratio = width.max(height) as f64 / width.min(height) as f64;

        let fits = |scale: &usize| {
            let down = (*scale as f64 / ratio).ceil();
            *scale as f64 * down <= num_crops as f64
        };
        // 1 fits whatever the ratio, unless that is no number: both sides zero, refused below.
        let scale = (1..=num_crops).take_while(fits).last().unwrap_or(1);
        let long = scale * TILE;
        let short = (long as f64 / ratio) as usize;
        if short == 0 {
            return Err(TooNarrow {
                width,
                height,
                long,
                num_crops,
            });
        }
        let down = short.div_ceil(TILE);
        let before = (down * TILE - short) / 2;

        Ok(if portrait {
            Self {
                width: short,
                height: long,
                left: before,
                top: 0,
                grid: Grid {
                    rows: scale,
                    cols: down,
                },
            }
        } else {
            Self {
                width: long,
                height: short,
                left: 0,
                top: before,
                grid: Grid {
                    rows: down,
                    cols: scale,
                },
            }
        })
    }

    /// Lays the resized picture, `[height, width, 3]`, on white.
    pub(super) fn pad(&self, resized: &Pixels) -> Pixels {
        assert_eq!((resized.width, resized.height), (self.width, self.height));
        let mut padded = Pixels::filled(self.grid.cols * TILE, self.grid.rows * TILE, 255);
        for y in 0..self.height {
            let start = ((self.top + y) * padded.width + self.left) * 3;
            padded.data[start..][..self.width * 3].copy_from_slice(resized.row(y));
        }
        padded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_of_the_published_examples() {
        let layout = Layout::new(500, 180, 4).unwrap();
        let expected = Layout {
            width: 672,
            height: 241,
            left: 0,
            top: 47,
            grid: Grid { rows: 1, cols: 2 },
        };
        assert_eq!(layout, expected);
        assert_eq!(layout.grid.tokens(), 457);
        // A square takes 4 of 4 tiles, 16 of 16.
        assert_eq!(Layout::new(64, 64, 4).unwrap().grid.tokens(), 757);
        assert_eq!(Layout::new(64, 64, 16).unwrap().grid.tokens(), 2509);
    }

    /// One pixel wide is taken as far as the rule goes, and refused with numbers beyond.
    #[test]
    fn lines() {
        let longest = Layout::new(1, 336 * 16, 16).unwrap();
        assert_eq!((longest.width, longest.height), (1, 336 * 16));
        assert_eq!((longest.left, longest.grid.rows), (167, 16));
        let error = Layout::new(336 * 16 + 1, 1, 16).unwrap_err().to_string();
        assert_eq!(
            error,
            "5377 x 1 pixels resize to 5376 x 0; \
             expected a long side of at most 5376 times the short one"
        );
        for (width, height) in [(0, 0), (0, 5), (5, 0)] {
            assert!(Layout::new(width, height, 16).is_err());
        }
    }

    /// Every budget has a picture that takes as few.
    #[test]
    fn fewest_tiles_are_taken_by_some_shape() {
        assert_eq!([1, 4, 16].map(fewest_tiles), [1, 2, 8]);
        for num_crops in 1..=MAX_CROPS {
            let shapes = (1..=num_crops).flat_map(|w| (1..=w).map(move |h| (w, h)));
            let tiles = shapes.map(|(w, h)| {
                // A little longer, so that rounding does not add a row.
                let layout = Layout::new(1000 * w + 1, 1000 * h, num_crops);
                layout.unwrap().grid.tiles()
            });
            assert_eq!(tiles.min(), Some(fewest_tiles(num_crops)), "{num_crops}");
        }
    }

    proptest! {
        #[test]
        fn any_size_fits_the_budget(
            width in 1usize..=20_000, height in 1usize..=20_000, num_crops in 1usize..=MAX_CROPS,
        ) {
            let (long, short) = (width.max(height), width.min(height));
            let Ok(layout) = Layout::new(width, height, num_crops) else {
                prop_assert!(long > TILE * num_crops * short);
                return Ok(());
            };
            let Grid { rows, cols } = layout.grid;
            prop_assert!((1..=num_crops).contains(&(rows * cols)));
            prop_assert!(rows * cols >= fewest_tiles(num_crops));
            prop_assert!(layout.grid.tokens() >= fewest_tokens(1 + rows * cols));
            // The white does not fill a tile, and lies on both sides in equal parts.
            let (right, below) = (cols * TILE - layout.left - layout.width,
                                  rows * TILE - layout.top - layout.height);
            prop_assert!(layout.left + right < TILE && layout.top + below < TILE);
            prop_assert!((right - layout.left) < 2 && (below - layout.top) < 2);
            prop_assert_eq!(if width < height { rows } else { cols } * TILE,
                            layout.width.max(layout.height));
            // Turned over its diagonal, everything is turned.
            let turned = Layout::new(height, width, num_crops).unwrap();
            if width != height {
                prop_assert_eq!(turned, Layout {
                    width: layout.height, height: layout.width,
                    left: layout.top, top: layout.left,
                    grid: Grid { rows: cols, cols: rows },
                });
            }
            // One more column of tiles would not fit: the search did not stop early.
            let scale = rows.max(cols) + 1;
            let down = (scale as f64 / (long as f64 / short as f64)).ceil() as usize;
            prop_assert!(scale * down > num_crops);
        }
    }
}
