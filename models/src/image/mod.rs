//! Pictures, from a file to what the vision encoder reads: Phi-3-vision's "HD transform".
//!
//! ```text
//! bytes --decode--> Picture   8-bit RGB, any size
//!        --layout-> Layout    how large it becomes: a grid of 336x336 tiles
//!        --resize-> Processed the resized picture on white, [336 rows, 336 cols, 3]
//!        --crop(i)-> f32      [3, 336, 336], normalised: the whole picture first, then the tiles
//! ```
//!
//! | module | is |
//! |---|---|
//! | [`decode`] | files of four formats to 8-bit RGB, with limits |
//! | [`layout`] | the rule that chooses the size, and how many tokens it costs |
//! | [`resize`] | bilinear with antialiasing, in integers, bit for bit Pillow's |
//! | [`global`] | the whole picture in one tile: bicubic without antialiasing |
//! | [`frames`] | the pictures of a folder, in their order |
//!
//! The reference decodes and resizes with Pillow and reduces with torch. From the same 8-bit
//! pixels the tiles here are the same to the bit, the global view within 1e-5.
//!
//! # Memory
//!
//! A [`Processed`] picture keeps the resized 8-bit pixels, 336 * 336 * 3 bytes a tile: 5.4 MB for
//! 16 tiles, where all crops as f32 would be 23 MB. A crop's floats (1.35 MB) are made when they
//! are asked for, into the caller's buffer. While a picture is read, it takes at most
//! [`MAX_DECODED_BYTES`](decode::MAX_DECODED_BYTES) twice (as decoded, and as RGB), a progressive
//! JPEG about three times; resizing adds a quarter of a gigabyte at worst and some megabytes for a
//! photograph.

pub mod decode;
mod error;
pub mod frames;
mod gif;
pub mod global;
pub mod layout;
pub mod resize;

pub use decode::Picture;
pub use error::ImageError;
pub use layout::{Grid, Layout};

use crate::config::{ConfigError, PreprocessorConfig};
use std::ops::RangeInclusive;
use std::path::Path;

/// Rows and columns of a tile: the pictures that the encoder was trained on.
pub const TILE: usize = 336;

/// Floats of a crop, `[3, TILE, TILE]`.
pub const CROP_LEN: usize = 3 * TILE * TILE;

/// Rows of 8-bit RGB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    width: usize,
    height: usize,
    data: Vec<u8>, // [height, width, 3]
}

impl Pixels {
    fn filled(width: usize, height: usize, value: u8) -> Self {
        let data = vec![value; width * height * 3];
        Self {
            width,
            height,
            data,
        }
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// `[height, width, 3]`
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// `[width, 3]`
    fn row(&self, y: usize) -> &[u8] {
        &self.data[y * self.width * 3..][..self.width * 3]
    }
}

/// What becomes of a byte: `(v / 255 - mean) / std`, in f32 and in this order, as torchvision's
/// `ToTensor` and `Normalize` do. There are 256 bytes, so it is a table.
#[derive(Clone)]
struct Normalise {
    table: Box<[[f32; 256]; 3]>, // [channel, byte]
}

impl Normalise {
    fn new(mean: [f32; 3], std: [f32; 3]) -> Self {
        let channel =
            |c: usize| std::array::from_fn(|byte| (byte as f32 / 255.0 - mean[c]) / std[c]);
        Self {
            table: Box::new(std::array::from_fn(channel)),
        }
    }
}

/// Turns pictures into crops.
#[derive(Clone)]
pub struct ImageProcessor {
    num_crops: usize,
    normalise: Normalise,
}

impl ImageProcessor {
    /// The processor that a `preprocessor_config.json` describes.
    pub fn new(config: &PreprocessorConfig) -> Self {
        Self {
            num_crops: config.num_crops,
            normalise: Normalise::new(config.image_mean, config.image_std),
        }
    }

    /// Reads `preprocessor_config.json` of a model folder. `None`: there is no such file.
    ///
    /// # Errors
    /// [`ConfigError`]: the file cannot be read or a field is wrong.
    pub fn open(folder: &Path) -> Result<Option<Self>, ConfigError> {
        Ok(PreprocessorConfig::open(folder)?.map(|config| Self::new(&config)))
    }

    /// The same with another budget of tiles. Phi-3-vision's authors give one picture 16 and each
    /// of several frames 4.
    ///
    /// # Errors
    /// [`ImageError::NumCrops`]: outside 1 to [`MAX_CROPS`](layout::MAX_CROPS).
    pub fn with_num_crops(mut self, num_crops: usize) -> Result<Self, ImageError> {
        if !(1..=layout::MAX_CROPS).contains(&num_crops) {
            return Err(ImageError::NumCrops { found: num_crops });
        }
        self.num_crops = num_crops;
        Ok(self)
    }

    /// Tiles that a picture may become, the global view not counted.
    pub fn num_crops(&self) -> usize {
        self.num_crops
    }

    /// Crops that a picture becomes, the global view counted: the fewest, and the most.
    pub fn crops(&self) -> RangeInclusive<usize> {
        1 + layout::fewest_tiles(self.num_crops)..=1 + self.num_crops
    }

    /// Resizes a picture and lays it on white; the threads of the rayon pool around the call share
    /// the work.
    ///
    /// # Errors
    /// [`ImageError::TooNarrow`]: the picture is so long and narrow that its short side
    /// would become less than one pixel.
    pub fn process(&self, picture: &Picture) -> Result<Processed, ImageError> {
        let pixels = picture.pixels();
        let layout = Layout::new(pixels.width, pixels.height, self.num_crops).map_err(|sizes| {
            ImageError::TooNarrow {
                origin: picture.origin().into(),
                sizes,
            }
        })?;
        let resized = resize::resize(pixels, layout.width, layout.height);
        Ok(Processed {
            padded: layout.pad(&resized),
            grid: layout.grid,
            normalise: self.normalise.clone(),
        })
    }
}

/// A picture as the model takes it: one global view and a grid of tiles.
#[derive(Clone)]
pub struct Processed {
    padded: Pixels,
    grid: Grid,
    normalise: Normalise,
}

impl Processed {
    /// The resized picture on white: `grid().rows * TILE` rows of `grid().cols * TILE` pixels.
    pub fn padded(&self) -> &Pixels {
        &self.padded
    }

    /// How many tiles there are, down and across.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// Crops the encoder sees: the global view and every tile.
    pub fn crops(&self) -> usize {
        1 + self.grid.tiles()
    }

    /// Positions the picture takes in the prompt.
    pub fn tokens(&self) -> usize {
        self.grid.tokens()
    }

    /// Writes crop `index` as `[3, TILE, TILE]` normalised floats: the global view is crop 0, the
    /// tiles follow row by row.
    ///
    /// # Panics
    /// If `index` is not below [`crops`](Self::crops) or `out` is not [`CROP_LEN`] long.
    pub fn crop(&self, index: usize, out: &mut [f32]) {
        let crops = self.crops();
        assert!(index < crops, "crop {index} of {crops}");
        assert_eq!(out.len(), CROP_LEN, "floats of a crop");
        match index.checked_sub(1) {
            None => global::view(&self.padded, &self.normalise, out),
            Some(tile) => self.tile(tile / self.grid.cols, tile % self.grid.cols, out),
        }
    }

    fn tile(&self, row: usize, col: usize, out: &mut [f32]) {
        for y in 0..TILE {
            let pixels = &self.padded.row(row * TILE + y)[col * TILE * 3..][..TILE * 3];
            for (c, table) in self.normalise.table.iter().enumerate() {
                let line = &mut out[(c * TILE + y) * TILE..][..TILE];
                for (value, pixel) in line.iter_mut().zip(pixels.chunks_exact(3)) {
                    *value = table[usize::from(pixel[c])];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(num_crops: usize) -> ImageProcessor {
        ImageProcessor::new(&PreprocessorConfig {
            num_crops,
            image_mean: PreprocessorConfig::CLIP_MEAN,
            image_std: PreprocessorConfig::CLIP_STD,
        })
    }

    /// Each tile holds its own part of the padded picture.
    #[test]
    fn tiles_are_cut_row_by_row() {
        let normalise = Normalise::new([0.0; 3], [1.0; 3]);
        let grid = Grid { rows: 2, cols: 3 };
        let mut padded = Pixels::filled(3 * TILE, 2 * TILE, 0);
        for i in 0..padded.width * padded.height {
            let (y, x) = (i / padded.width, i % padded.width);
            padded.data[i * 3..][..3].copy_from_slice(&[(x / TILE) as u8, (y / TILE) as u8, 255]);
        }
        let processed = Processed {
            padded,
            grid,
            normalise,
        };
        assert_eq!(
            (processed.crops(), processed.tokens()),
            (7, 7 * 144 + 3 * 12 + 1)
        );
        let mut crop = vec![f32::NAN; CROP_LEN];
        for tile in 0..6 {
            processed.crop(tile + 1, &mut crop);
            let planes: Vec<_> = crop.chunks_exact(TILE * TILE).collect();
            let expected = [(tile % 3) as f32 / 255.0, (tile / 3) as f32 / 255.0, 1.0];
            for (plane, expected) in planes.iter().zip(expected) {
                assert!(plane.iter().all(|&v| v == expected), "tile {tile}");
            }
        }
    }

    #[test]
    fn the_budget_is_checked() {
        assert_eq!(processor(4).with_num_crops(16).unwrap().num_crops(), 16);
        for found in [0, 65] {
            let error = processor(4)
                .with_num_crops(found)
                .err()
                .unwrap()
                .to_string();
            assert_eq!(error, format!("num_crops is {found}, expected 1 to 64"));
        }
    }

    #[test]
    fn a_line_is_refused_by_name() {
        let line = |width: u32, height: u32| {
            let mut file = std::io::Cursor::new(Vec::new());
            let picture = ::image::DynamicImage::new_luma8(width, height);
            (picture.write_to(&mut file, ::image::ImageFormat::Png)).unwrap();
            Picture::from_bytes(file.get_ref(), "line.png").unwrap()
        };
        for (width, height) in [(1345, 1), (1, 1345)] {
            let error = processor(4).process(&line(width, height)).err().unwrap();
            assert_eq!(
                error.to_string(),
                format!(
                    "line.png: {width} x {height} pixels resize to 1344 x 0; \
                     expected a long side of at most 1344 times the short one"
                )
            );
        }
        let taken = processor(4).process(&line(1, 1344)).unwrap();
        assert_eq!(taken.grid(), Grid { rows: 4, cols: 1 });
        // One black column, the rest white.
        let row = taken.padded().row(700);
        assert_eq!(row.iter().filter(|&&v| v == 0).count(), 3);
        assert_eq!(row[167 * 3..][..3], [0; 3]);
    }
}
