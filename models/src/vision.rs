//! From a picture to rows that stand among the embedded tokens.
//!
//! ```text
//! crops      the global view and the tiles, each through CLIP: [24, 24, C]
//! merge      every 2 x 2 patches become one row: [12, 12, 4C], channels ordered (dy, dx, c)
//! lines      the tiles lie side by side: 12h lines of 12w rows, `sub_GN` at the end of each;
//!            the global view: 12 lines of 12 rows, `sub_GN` at the end of each; `glb_GN` between them
//! project    Linear(4C, H), GELU, Linear(H, H), of all rows, separators included
//! ```
//!
//! Crops go through the encoder a few at a time, and rows through the projector: that bounds the
//! memory, and changes nothing.

use crate::clip::{self, Clip, ClipConfig};
#[cfg(feature = "cuda")]
use crate::cuda::Parts;
use crate::error::Error;
use crate::format::WeightFormat;
use crate::image::{CROP_LEN, Processed};
use crate::weights::{Role, Spec, Weights};
use phidias_engine::Cancel;
use phidias_engine::backend::{Activation, Backend, Input, Ops};
use phidias_engine::checkpoint::CheckpointError;
use phidias_engine::tensor::{Buffer, Linear};

/// Patches on each side of a crop.
pub const GRID: usize = 24;
/// Rows on each side of a crop after the merge.
const SIDE: usize = GRID / 2;
/// Rows of a crop, separators not counted.
pub const TILE_TOKENS: usize = SIDE * SIDE;
/// Crops that are encoded together: 1154 rows for the matrices, which more would not make faster.
pub const SLICE: usize = 2;
/// Rows that are projected together.
const PROJECTED: usize = 512;

/// Which part of a picture comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartOrder {
    /// `sub_glb`: the tiles, then the global view.
    TilesFirst,
    /// `glb_sub`
    GlobalFirst,
}

/// The picture side of a vision model.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Its encoder.
    pub clip: ClipConfig,
    /// Order of the parts of a picture.
    pub order: PartOrder,
}

/// What the names of its tensors begin with.
pub(crate) const PREFIX: &str = "model.vision_embed_tokens.";
const ENCODER: &str = "model.vision_embed_tokens.img_processor.vision_model.";

impl VisionConfig {
    /// Columns of merged rows.
    fn merged(&self) -> usize {
        4 * self.clip.hidden_size
    }

    /// Every tensor beside the decoder, of width `hidden`.
    pub(crate) fn specs(&self, hidden: usize) -> Vec<Spec> {
        let merged = self.merged();
        let spec =
            |name: &str, shape: &[usize], role| Spec::new(format!("{PREFIX}{name}"), shape, role);
        let mut specs = vec![
            spec("glb_GN", &[1, 1, merged], Role::Embedding),
            spec("sub_GN", &[1, 1, 1, merged], Role::Embedding),
            spec("img_projection.0.weight", &[hidden, merged], Role::Matrix),
            spec("img_projection.0.bias", &[hidden], Role::Bias),
            spec("img_projection.2.weight", &[hidden, hidden], Role::Matrix),
            spec("img_projection.2.bias", &[hidden], Role::Bias),
        ];
        specs.extend(self.clip.specs(ENCODER));
        specs
    }

    /// Bytes that encoding a picture of `crops` crops takes at most, beside its features of width `hidden`.
    #[must_use]
    pub fn activation_bytes(&self, hidden: usize, crops: usize, format: WeightFormat) -> usize {
        let (c, slice) = (&self.clip, SLICE.min(crops));
        let floats = size_of::<f32>();
        let input = |cols| Input::bytes_per_row(format.packed(), cols);
        // x, normed, branch, heads; projections; the MLP; patches, as they are cut and as they are taken.
        let row = 4 * c.hidden_size + 3 * c.hidden_size + c.intermediate_size + 2 * c.patch();
        // The patches' matrix stays in floats, and one input serves all matrices.
        let inputs = input(c.intermediate_size.max(c.hidden_size)).max(floats * c.patch());
        let encoder = slice * (c.tokens() * (floats * row + inputs) + floats * CROP_LEN);
        let rows = crops * (TILE_TOKENS + SIDE) + 1;
        let projected = floats * (self.merged() + 2 * hidden) + input(self.merged().max(hidden));
        let pixels = crops * CROP_LEN; // bytes
        encoder + pixels + rows * floats * self.merged() + rows.min(PROJECTED) * projected
    }
}

/// Encoder, separators and projector.
#[derive(Clone, Debug)]
pub struct Vision {
    clip: Clip,
    order: PartOrder,
    /// `glb_GN`, `[4C]`
    between_parts: Vec<f32>,
    /// `sub_GN`, `[4C]`
    end_of_line: Vec<f32>,
    /// `img_projection.0` and `.2`
    projection: [Linear; 2],
}

/// What encoding works with, kept from picture to picture.
#[derive(Debug)]
pub struct Scratch<B: Backend> {
    clip: clip::Scratch<B>,
    pixels: Vec<f32>,
    /// What is read back.
    copy: Buffer,
    /// `[tokens, 4C]`
    rows: Buffer,
    /// Some of them.
    some: B::Buffer,
    wide: B::Buffer,
    projected: B::Buffer,
    input: B::Input,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            clip: clip::Scratch::default(),
            pixels: Vec::default(),
            copy: Buffer::default(),
            rows: Buffer::default(),
            some: B::Buffer::default(),
            wide: B::Buffer::default(),
            projected: B::Buffer::default(),
            input: B::Input::default(),
        }
    }
}

impl Vision {
    pub(crate) fn load(
        config: &VisionConfig,
        weights: &Weights<'_>,
    ) -> Result<Self, CheckpointError> {
        let name = |name: &str| format!("{PREFIX}{name}");
        Ok(Self {
            clip: Clip::load(&config.clip, weights, ENCODER)?,
            order: config.order,
            between_parts: weights.values(&name("glb_GN"))?,
            end_of_line: weights.values(&name("sub_GN"))?,
            projection: [
                weights.biased(&name("img_projection.0"))?,
                weights.biased(&name("img_projection.2"))?,
            ],
        })
    }

    /// What it multiplies and normalises with.
    #[cfg(feature = "cuda")]
    pub(crate) fn parts<'m>(&'m self, parts: &mut Parts<'m>) {
        self.clip.parts(parts);
        self.projection.iter().for_each(|w| parts.linear(w));
    }

    /// Its encoder.
    #[must_use]
    pub fn clip(&self) -> &Clip {
        &self.clip
    }

    /// Operations on `crops` crops that become `rows` rows: a multiply-add is two.
    #[must_use]
    pub fn operations(&self, crops: usize, rows: usize) -> f64 {
        let depth = self.clip.config().num_hidden_layers.saturating_sub(1);
        let projector: usize = (self.projection.iter())
            .map(|w| w.weight.rows() * w.weight.cols())
            .sum();
        crops as f64 * self.clip.operations(depth) + 2.0 * (rows * projector) as f64
    }

    /// The features of a picture, `[tokens, hidden]`; `progress` hears of the crops that are done.
    /// # Errors
    /// [`Error::Cancelled`], looked at between slices of crops; a device that fails.
    pub fn encode<B: Backend>(
        &self,
        backend: &B,
        picture: &Processed,
        cancel: &Cancel,
        progress: &mut dyn FnMut(usize, usize),
        s: &mut Scratch<B>,
    ) -> Result<Buffer, Error> {
        let merged = self.between_parts.len();
        s.rows.reshape(picture.tokens(), merged);
        let places = self.separators(picture, &mut s.rows);
        let crops = picture.crops();
        for first in (0..crops).step_by(SLICE) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let slice = first..crops.min(first + SLICE);
            s.pixels.resize(slice.len() * CROP_LEN, 0.0);
            for (crop, out) in slice.clone().zip(s.pixels.chunks_exact_mut(CROP_LEN)) {
                picture.crop(crop, out);
            }
            let depth = self.clip.config().num_hidden_layers.saturating_sub(1);
            backend.enter(|ops| {
                let (pixels, clip) = (&s.pixels, &mut s.clip);
                (self.clip).forward(ops, pixels, depth, clip, &mut |_, _| {});
                let hidden = ops.read(clip.hidden(), &mut s.copy);
                for (i, crop) in slice.clone().enumerate() {
                    self.merge(hidden, i, &places.of(crop), &mut s.rows);
                }
            })?;
            progress(slice.end, crops);
        }
        Ok(backend.enter(|ops| self.project(ops, s))?)
    }

    /// The projector on all of `s.rows`.
    fn project<B: Backend>(&self, ops: &impl Ops<B>, s: &mut Scratch<B>) -> Buffer {
        let [first, second] = &self.projection;
        let (merged, hidden) = (s.rows.cols(), second.weight.rows());
        let mut features = Buffer::default();
        features.reshape(s.rows.rows(), hidden);
        let outs = features.data_mut().chunks_mut(PROJECTED * hidden);
        for (rows, out) in s.rows.data().chunks(PROJECTED * merged).zip(outs) {
            ops.reshape(rows.len() / merged, merged, &mut s.some);
            ops.write(rows, 0, &mut s.some);
            ops.input(&s.some, &first.weight, &mut s.input);
            ops.activated_linear(first, Activation::Gelu, &s.input, &mut s.wide);
            ops.input(&s.wide, &second.weight, &mut s.input);
            ops.linear(second, &s.input, &mut s.projected);
            out.copy_from_slice(ops.read(&s.projected, &mut s.copy).data());
        }
        features
    }

    /// Writes every separator, and tells where the crops go.
    fn separators(&self, picture: &Processed, rows: &mut Buffer) -> Places {
        let grid = picture.grid();
        let (lines, columns) = (grid.rows * SIDE, grid.cols * SIDE);
        let (tiles, global) = (lines * (columns + 1), SIDE * (SIDE + 1));
        let (tiles_at, between, global_at) = match self.order {
            PartOrder::TilesFirst => (0, tiles, tiles + 1),
            PartOrder::GlobalFirst => (global + 1, global, 0),
        };
        rows.row_mut(between).copy_from_slice(&self.between_parts);
        for (first, lines, columns) in [(tiles_at, lines, columns), (global_at, SIDE, SIDE)] {
            for line in 1..=lines {
                let end = first + line * (columns + 1) - 1;
                rows.row_mut(end).copy_from_slice(&self.end_of_line);
            }
        }
        Places {
            tiles_at,
            global_at,
            tiles_across: grid.cols,
        }
    }

    /// Merges crop `i` of the encoder's last call.
    fn merge(&self, hidden: &Buffer, i: usize, at: &Lines, rows: &mut Buffer) {
        let c = self.clip.config();
        // Without the class token.
        let first = i * c.tokens() + 1;
        for y in 0..SIDE {
            for x in 0..SIDE {
                let row = rows.row_mut(at.first + y * at.stride + x);
                for (part, out) in row.chunks_exact_mut(c.hidden_size).enumerate() {
                    let patch = (2 * y + part / 2) * GRID + 2 * x + part % 2;
                    out.copy_from_slice(hidden.row(first + patch));
                }
            }
        }
    }
}

/// Where the parts of a picture begin.
struct Places {
    tiles_at: usize,
    global_at: usize,
    tiles_across: usize,
}

/// Where the lines of a crop go: the row of its first one, and from one to the next.
struct Lines {
    first: usize,
    stride: usize,
}

impl Places {
    /// Crop 0 is the global view, the tiles follow row by row.
    fn of(&self, crop: usize) -> Lines {
        let Some(tile) = crop.checked_sub(1) else {
            return Lines {
                first: self.global_at,
                stride: SIDE + 1,
            };
        };
        let stride = self.tiles_across * SIDE + 1;
        let (row, column) = (tile / self.tiles_across, tile % self.tiles_across);
        Lines {
            first: self.tiles_at + row * SIDE * stride + column * SIDE,
            stride,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Picture;
    use crate::{Model, OpenOptions};
    use phidias_engine::Kernels;
    use phidias_engine::backend::Cpu;
    use phidias_engine::pool::Pool;
    use std::path::Path;
    use std::sync::Arc;

    fn bytes(buffer: &Buffer) -> usize {
        size_of_val(buffer.data())
    }

    /// The same rows, row for row: each part as it was, in the other place.
    #[test]
    fn either_part_of_a_picture_may_come_first() {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/phi3v-tiny-nc4"
        );
        let model = Model::open(Path::new(folder), OpenOptions::default()).unwrap();
        let (vision, processor) = model.vision().unwrap();
        let picture = Picture::open(&Path::new(folder).join("image2.png")).unwrap();
        let picture = processor.process(&picture).unwrap();
        let cpu = Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(2)).unwrap()));
        let features = |order| {
            let (vision, cancel) = (vision.clone(), Cancel::default());
            let (vision, mut s) = (Vision { order, ..vision }, Scratch::default());
            let rows = vision.encode(&cpu, &picture, &cancel, &mut |_, _| {}, &mut s);
            let rows = rows.unwrap();
            (0..rows.rows())
                .map(|r| rows.row(r).to_vec())
                .collect::<Vec<_>>()
        };
        let tiles_first = features(PartOrder::TilesFirst);
        let (tiles, rest) = tiles_first.split_at(picture.tokens() - 1 - SIDE * (SIDE + 1));
        let (between, global) = rest.split_at(1);
        assert_ne!(tiles[..global.len()], *global);
        let turned = [global, between, tiles].concat();
        assert_eq!(features(PartOrder::GlobalFirst), turned);
    }

    /// What encoding holds is what the plan says; of buffers that are used twice the plan has the larger use.
    #[test]
    fn the_plan_is_what_is_held() {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/phi3v-tiny-nc4"
        );
        for format in [WeightFormat::F32, WeightFormat::Q8] {
            let options = OpenOptions {
                format: Some(format),
                ..OpenOptions::default()
            };
            let model = Model::open(Path::new(folder), options).unwrap();
            let (vision, processor) = model.vision().unwrap();
            let picture = Path::new(folder).join("image0.png");
            let picture = Picture::open(&picture).unwrap();
            // The global view and one tile: a whole slice.
            let one = processor.clone().with_num_crops(1).unwrap();
            let picture = one.process(&picture).unwrap();
            assert_eq!(picture.crops(), SLICE);
            let cpu = Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(2)).unwrap()));
            let (mut s, cancel) = (Scratch::default(), Cancel::default());
            let features = vision.encode(&cpu, &picture, &cancel, &mut |_, _| {}, &mut s);
            let hidden = features.unwrap().cols();
            let floats = [&s.rows, &s.some, &s.wide, &s.projected];
            let input = Input::bytes_per_row(format.packed(), hidden) * s.input.rows();
            let held = floats.map(bytes).iter().sum::<usize>()
                + size_of_val(&s.pixels[..])
                + picture.padded().data().len()
                + input
                + s.clip.bytes(format.packed(), vision.clip.config());
            let planned = model.config().vision.as_ref().unwrap();
            let planned = planned.activation_bytes(hidden, picture.crops(), format);
            assert!(
                held <= planned && planned < held + held / 10,
                "{format}: {held} bytes held, {planned} planned"
            );
        }
    }
}
