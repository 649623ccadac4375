//! Resizing as Pillow's `Image.resize(..., BILINEAR)` does it, bit for bit.
//!
//! Along one axis, output `x` is a weighted mean of the inputs around its centre. With
//! `f = in / out`:
//!
//! ```text
//! centre   c = (x + 0.5) * f
//! reach    r = max(f, 1)                        wider when reducing: that is the antialiasing
//! inputs   floor(c - r + 0.5) .. floor(c + r + 0.5), cut at the borders
//! weight   max(0, 1 - |i + 0.5 - c| / r), divided by the sum of the weights
//! ```
//!
//! The weights are computed in f64 and rounded to multiples of 2^-22; then
//! `out = clamp((2^21 + sum of weight * input) >> 22)`, in i32. The result is rounded to 8 bits
//! after each of the two passes, so the order of the passes matters: the longer side of the
//! picture goes first. (The reference turns a picture that is higher than wide over its diagonal,
//! and Pillow starts with rows; here nothing is turned.) A pass that would not change the size is
//! left out.
//!
//! Work: an output reads about `2 f` inputs along each axis, so a pass is one multiplication for
//! every byte it reads, twice. The sums cannot overflow: the weights of an output add up to
//! `2^22` and at most half a unit for each input, and 255 times that is below 2^31 for the
//! 65 535 inputs there can be.
//!
//! Both passes share the rows of their result out among the threads of the rayon pool that the
//! call is made in. A row is one thread's from the first tap to the last, so the result is the
//! same with any number of them; a thread that adds up whole rows holds one row of sums.

use super::Pixels;
use rayon::prelude::*;
use std::borrow::Cow;

/// Fraction bits of a weight.
const BITS: u32 = 22;
/// What sums start from, so that the shift rounds to the nearest.
const HALF: i32 = 1 << (BITS - 1);

/// The weights of every output along one axis.
struct Filter {
    taps: Vec<Taps>,
    weights: Vec<i32>,
}

/// The inputs of one output: `len` from `first` on, and where their weights begin.
struct Taps {
    first: usize,
    len: usize,
    weights: usize,
}

impl Filter {
    fn new(input: usize, output: usize) -> Self {
        let factor = input as f64 / output as f64;
        let reach = factor.max(1.0);
        let mut filter = Self {
            taps: Vec::with_capacity(output),
            weights: Vec::new(),
        };
        let mut exact = Vec::new();
        for x in 0..output {
            let centre = (x as f64 + 0.5) * factor;
            // The cast cuts negative numbers to zero.
            let first = (centre - reach + 0.5) as usize;
            let end = ((centre + reach + 0.5) as usize).min(input);
            // Pillow multiplies by the inverse; dividing would round differently.
            let inverse = 1.0 / reach;
            exact.clear();
            exact.extend((first..end).map(|i| {
                let distance = (i as f64 - centre + 0.5) * inverse;
                (1.0 - distance.abs()).max(0.0)
            }));
            let sum: f64 = exact.iter().sum();
            filter.taps.push(Taps {
                first,
                len: end - first,
                weights: filter.weights.len(),
            });
            let fixed = |weight: &f64| (0.5 + weight / sum * f64::from(1 << BITS)) as i32;
            filter.weights.extend(exact.iter().map(fixed));
        }
        filter
    }

    /// First input and weights of an output.
    fn output(&self, x: usize) -> (usize, &[i32]) {
        let taps = &self.taps[x];
        (taps.first, &self.weights[taps.weights..][..taps.len])
    }

    /// Those of every output.
    fn outputs(&self) -> impl Iterator<Item = (usize, &[i32])> {
        (0..self.taps.len()).map(|x| self.output(x))
    }
}

fn to_byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// A picture in another size, computed by the threads of the rayon pool around the call.
///
/// # Panics
/// If a size is zero.
pub fn resize(picture: &Pixels, width: usize, height: usize) -> Pixels {
    let sizes = [picture.width, picture.height, width, height];
    assert!(sizes.iter().all(|&side| side > 0), "sizes {sizes:?}");
    let borrowed = Cow::Borrowed(picture);
    let resized = if picture.width < picture.height {
        across(down(borrowed, height), width)
    } else {
        down(across(borrowed, width), height)
    };
    resized.into_owned()
}

/// Resizes every row to `width` pixels.
fn across(picture: Cow<'_, Pixels>, width: usize) -> Cow<'_, Pixels> {
    if picture.width == width {
        return picture;
    }
    let filter = Filter::new(picture.width, width);
    let mut resized = Pixels::filled(width, picture.height, 0);
    let rows = picture.data.par_chunks_exact(picture.width * 3);
    let pairs = rows.zip(resized.data.par_chunks_exact_mut(width * 3));
    pairs.for_each(|(row, out)| {
        for ((first, weights), pixel) in filter.outputs().zip(out.chunks_exact_mut(3)) {
            let inputs = row[first * 3..][..weights.len() * 3].chunks_exact(3);
            let mut sums = [HALF; 3];
            for (input, weight) in inputs.zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(input) {
                    *sum += weight * i32::from(value);
                }
            }
            for (byte, sum) in pixel.iter_mut().zip(sums) {
                *byte = to_byte(sum);
            }
        }
    });
    Cow::Owned(resized)
}

/// Resizes every column to `height` pixels: whole rows are added up, which is how they lie in
/// memory.
fn down(picture: Cow<'_, Pixels>, height: usize) -> Cow<'_, Pixels> {
    if picture.height == height {
        return picture;
    }
    let filter = Filter::new(picture.height, height);
    let row_len = picture.width * 3;
    let mut resized = Pixels::filled(picture.width, height, 0);
    let rows = resized.data.par_chunks_exact_mut(row_len).enumerate();
    rows.for_each_init(Vec::new, |sums: &mut Vec<i32>, (y, out)| {
        let (first, weights) = filter.output(y);
        sums.clear();
        sums.resize(row_len, HALF);
        for (y, weight) in (first..).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(picture.row(y)) {
                *sum += weight * i32::from(value);
            }
        }
        for (byte, &sum) in out.iter_mut().zip(&*sums) {
            *byte = to_byte(sum);
        }
    });
    Cow::Owned(resized)
}

#[cfg(test)]
mod tests {
    use super::*;
    use phidias_engine::pool::Pool;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn picture(width: usize, height: usize, seed: usize) -> Pixels {
        let data = (0..width * height * 3).map(|i| (i * (7 + seed) + i / 5 * seed) as u8);
        Pixels {
            width,
            height,
            data: data.collect(),
        }
    }

    fn turned(picture: &Pixels) -> Pixels {
        let (width, height) = (picture.height, picture.width);
        let pixel = |i: usize| &picture.row(i % width)[i / width * 3..][..3];
        Pixels {
            width,
            height,
            data: (0..width * height).flat_map(pixel).copied().collect(),
        }
    }

    static POOLS: LazyLock<Vec<Pool>> =
        LazyLock::new(|| [1, 2, 3].map(|n| Pool::new(Some(n)).unwrap()).into());

    /// Every output of both passes by itself, on this thread.
    fn one_by_one(picture: &Pixels, width: usize, height: usize) -> Pixels {
        let pass = |p: &Pixels, width: usize, height: usize| {
            let (across, down) = (Filter::new(p.width, width), Filter::new(p.height, height));
            let byte = |i: usize| {
                let (x, y, channel) = (i / 3 % width, i / 3 / width, i % 3);
                let value = |x, y| i32::from(p.row(y)[x * 3 + channel]);
                let weighted = |(first, weights): (usize, &[i32]), value: &dyn Fn(usize) -> i32| {
                    let products = (first..).zip(weights).map(|(at, w)| w * value(at));
                    to_byte(HALF + products.sum::<i32>())
                };
                match p.height == height {
                    true => weighted(across.output(x), &|x| value(x, y)),
                    false => weighted(down.output(y), &|y| value(x, y)),
                }
            };
            let data = (0..width * height * 3).map(byte).collect();
            Pixels {
                width,
                height,
                data,
            }
        };
        let between = match picture.width < picture.height {
            true => pass(picture, picture.width, height),
            false => pass(picture, width, picture.height),
        };
        pass(&between, width, height)
    }

    /// The mean of neighbours, worked out by hand.
    #[test]
    fn halving_and_doubling() {
        let row = Pixels {
            width: 4,
            height: 1,
            data: [0, 80, 160, 240].iter().flat_map(|&v| [v; 3]).collect(),
        };
        let reds = |p: &Pixels| p.data.iter().step_by(3).copied().collect::<Vec<_>>();
        // Centres 1 and 3, reach 2: weights (3 3 1)/7 and (1 3 3)/7.
        assert_eq!(reds(&resize(&row, 2, 1)), [57, 183]);
        // Centres between the pixels: a quarter and three quarters.
        assert_eq!(
            reds(&resize(&row, 8, 1)),
            [0, 20, 60, 100, 140, 180, 220, 240]
        );
        // The only pixel everywhere.
        let pixel = picture(1, 1, 3);
        assert_eq!(resize(&pixel, 5, 7).data, pixel.data.repeat(35));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Weights add up to one whatever the sizes, so an even picture stays even.
        #[test]
        fn even_pictures_stay_even(
            from in (1usize..200, 1usize..40), to in (1usize..200, 1usize..40), value: u8,
        ) {
            let resized = resize(&Pixels::filled(from.0, from.1, value), to.0, to.1);
            prop_assert_eq!(resized, Pixels::filled(to.0, to.1, value));
        }

        /// The longer side goes first, so turning before and turning after are the same.
        #[test]
        fn turning_commutes(
            from in (1usize..60, 1usize..60), to in (1usize..60, 1usize..60), seed in 0usize..99,
        ) {
            prop_assume!(from.0 != from.1);
            let picture = picture(from.0, from.1, seed);
            let resized = resize(&turned(&picture), to.1, to.0);
            prop_assert_eq!(resize(&picture, to.0, to.1), turned(&resized));
        }

        /// The definition, one output after the other, against pools of several sizes: sizes that are
        /// fewer rows than threads among them.
        #[test]
        fn the_number_of_threads_changes_nothing(
            from in (1usize..90, 1usize..90), to in (1usize..90, 1usize..90), seed in 0usize..99,
        ) {
            let picture = picture(from.0, from.1, seed);
            let expected = one_by_one(&picture, to.0, to.1);
            for pool in &*POOLS {
                let resized = pool.install(|| resize(&picture, to.0, to.1));
                prop_assert_eq!(&resized, &expected, "{:?}", pool);
            }
        }

        #[test]
        fn the_same_size_is_the_same_picture(
            size in (1usize..40, 1usize..40), seed in 0usize..99,
        ) {
            let picture = picture(size.0, size.1, seed);
            prop_assert_eq!(&resize(&picture, size.0, size.1), &picture);
        }
    }
}
