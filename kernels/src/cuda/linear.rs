//! Matrix products on a device; the maths, the layouts and the limits are in `linear.cu`.
//!
//! A result has the same bits for one token and for many, alone, beside others or in an expert's group.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Source, Span};
use super::elementwise::{Output, Target};
use super::experts::Routes;
use super::rows::{Activations, Form, Head};
use phidias_quant::packed::{PANEL_ROWS, PackedLayout};
use phidias_quant::{BLOCK, Format, PackError};
use std::ops::Range;

/// The kernels of `linear.cu`.
pub(super) const KERNELS: &[&str] = &[
    "q4_decode",
    "q4_decode_gated",
    "q4_prompt",
    "q8_decode",
    "q8_decode_gated",
    "q8_prompt",
    "bf16_decode",
    "bf16_decode_gated",
    "bf16_prompt",
    "f32_decode",
    "f32_decode_gated",
    "f32_prompt",
    "f16_decode",
    "f16_decode_gated",
    "f16_prompt",
];

/// Matrices that one launch multiplies with one input.
pub const MATRICES: usize = 3;

/// K ranges of a row: the warps of a decoding block.
const RANGES: usize = 8;
/// Threads of a block of either kind.
const THREADS: u32 = 256;
/// Tokens of a decoding block.
pub(super) const FEW: usize = 8;
/// Slots of a tile of an expert that has many, of which a prompt's block has all or a part.
pub(super) const MANY: usize = 128;
/// Panels of a prompt's block.
const PANELS: usize = 8;
/// Decoding blocks of a multiprocessor: half of what it holds, so that those of the next launch find room.
const DECODE_BLOCKS: usize = 2;
/// Up to so many tokens the decoding kernel reads the weights once for each [`FEW`] of them, mostly from
/// the second cache; with more the prompt's is ahead. Chosen by counting bytes, not measured.
const DECODE_TOKENS: usize = 32;

/// What the weights of a matrix are stored as on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elements {
    /// int4 or int8 blocks in packed order, as in files.
    Packed(Format),
    /// The upper half of an f32; multiplied with activations rounded to bf16.
    Bf16,
    /// IEEE half precision; multiplied with f32.
    F16,
    /// f32; multiplied with f32.
    F32,
}

impl Elements {
    /// What the activations that it is multiplied with are stored as.
    #[must_use]
    pub fn form(self) -> Form {
        match self {
            Self::Packed(format) => Form::Quantized {
                zero: format.zero(),
            },
            Self::Bf16 => Form::Bf16,
            Self::F16 | Self::F32 => Form::F32,
        }
    }

    /// Bytes of an element that is not packed.
    fn size(self) -> Option<usize> {
        match self {
            Self::Packed(_) => None,
            Self::Bf16 | Self::F16 => Some(2),
            Self::F32 => Some(4),
        }
    }
}

/// How a matrix `[rows, cols]` lies on a device: packed as in files, else row-major, every row padded with
/// zeros to whole blocks of 32 columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    elements: Elements,
    rows: usize,
    cols: usize,
    bytes: usize,
}

impl Layout {
    /// The layout of a `[rows, cols]` matrix.
    /// # Errors
    /// When a side is zero, or the size overflows.
    pub fn new(elements: Elements, rows: usize, cols: usize) -> Result<Self, PackError> {
        let bytes = match elements {
            Elements::Packed(format) => PackedLayout::new(format, rows, cols)?.bytes(),
            Elements::Bf16 | Elements::F16 | Elements::F32 => {
                let size = elements.size().unwrap_or_default();
                (cols.checked_next_multiple_of(BLOCK))
                    .and_then(|cols| rows.checked_mul(cols)?.checked_mul(size))
                    .filter(|bytes| *bytes > 0 && isize::try_from(*bytes).is_ok())
                    .ok_or(PackError::Shape { rows, cols })?
            }
        };
        Ok(Self {
            elements,
            rows,
            cols,
            bytes,
        })
    }

    /// What it is stored as.
    #[must_use]
    pub fn elements(&self) -> Elements {
        self.elements
    }

    /// Rows: outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Blocks of 32 columns.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies a matrix, as a file has it, to the device.
    /// # Errors
    /// When the device is lost.
    /// # Panics
    /// When `from` has not the bytes of such a matrix or `to` not [`Layout::bytes`].
    pub fn upload(&self, from: &[u8], to: Span<'_, u8>) -> Result<(), DeviceError> {
        assert_eq!(to.len(), self.bytes, "bytes of the matrix on the device");
        let row = self.elements.size().map(|size| size * self.cols);
        assert_eq!(
            from.len(),
            row.map_or(self.bytes, |row| row * self.rows),
            "bytes of the matrix"
        );
        if from.len() == self.bytes {
            return to.upload(from);
        }
        // Rows are to be padded. Some at a time: little memory, few copies.
        const PART: usize = 1 << 22;
        let (row, padded) = (from.len() / self.rows, self.bytes / self.rows);
        let rows = (PART / padded).max(1);
        let mut part = vec![0; rows * padded];
        for (i, from) in from.chunks(rows * row).enumerate() {
            for (to, from) in part.chunks_exact_mut(padded).zip(from.chunks_exact(row)) {
                to[..row].copy_from_slice(from);
            }
            let bytes = from.len() / row * padded;
            to.slice(i * rows * padded..)
                .slice(..bytes)
                .upload(&part[..bytes])?;
        }
        Ok(())
    }
}

/// A matrix in device memory with its bias, or one matrix of each expert, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'m> {
    layout: Layout,
    /// Of the matrix, or of all experts'.
    pub(super) data: Span<'m, u8>,
    /// Bytes from one expert's to the next.
    step: usize,
    bias: Option<Span<'m, f32>>,
}

impl<'m> Weights<'m> {
    /// `data` as one or several matrices of that layout. `bias` is `[rows]`, for one matrix.
    /// # Panics
    /// When the lengths do not fit, or several matrices have a bias.
    #[must_use]
    pub fn new(layout: Layout, data: Span<'m, u8>, bias: Option<Span<'m, f32>>) -> Self {
        assert!(
            !data.is_empty() && data.len().is_multiple_of(layout.bytes),
            "{} bytes as matrices of {}",
            data.len(),
            layout.bytes
        );
        if let Some(bias) = bias {
            assert_eq!(bias.len(), layout.rows, "bias and rows");
            assert_eq!(data.len(), layout.bytes, "bytes of a matrix with a bias");
        }
        assert!(data.is_aligned(16), "weights at {data:?}");
        let step = layout.bytes;
        Self {
            layout,
            data,
            step,
            bias,
        }
    }

    /// Its layout.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Matrices.
    #[must_use]
    pub fn count(&self) -> usize {
        self.data.len().div_ceil(self.step)
    }

    /// Some rows of it, or `None` when they do not begin with a panel of a packed matrix.
    /// # Panics
    /// When there are no such rows.
    #[must_use]
    pub fn rows(&self, rows: Range<usize>) -> Option<Self> {
        assert!(
            rows.start < rows.end && rows.end <= self.layout.rows,
            "rows {rows:?} of {}",
            self.layout.rows
        );
        let Layout { elements, cols, .. } = self.layout;
        let before = match (elements, rows.start) {
            (_, 0) => 0,
            (Elements::Packed(_), start) if !start.is_multiple_of(PANEL_ROWS) => return None,
            (_, start) => Layout::new(elements, start, cols).ok()?.bytes,
        };
        let layout = Layout::new(elements, rows.len(), cols).ok()?;
        Some(Self {
            layout,
            data: self.data.slice(before..),
            step: self.step,
            bias: self.bias.map(|bias| bias.slice(rows)),
        })
    }

    /// Panels of 16 rows.
    fn panels(&self) -> usize {
        self.layout.rows.div_ceil(PANEL_ROWS)
    }
}

/// The gate and the up projection of an MLP, and how they are combined; as the CPU's `GateUp`.
#[derive(Clone, Copy, Debug)]
pub enum Gated<'m> {
    /// `up * silu(gate)` of two matrices alike.
    Pair {
        /// `[inner, cols]`
        gate: Weights<'m>,
        /// `[inner, cols]`
        up: Weights<'m>,
    },
    /// GEGELU: even rows of one matrix are the gate, odd rows are linear.
    Interleaved {
        /// `[2 * inner, cols]`
        both: Weights<'m>,
        /// Largest magnitude that either may have.
        limit: f32,
    },
}

impl<'m> Gated<'m> {
    /// `up * silu(gate)` where the rows of one matrix are first the gate's, then as many of `up`. `None`
    /// when the rows of `up` do not begin with a panel: such a matrix is multiplied with [`linear`], then
    /// the gate is applied.
    /// # Panics
    /// When the number of rows is odd.
    #[must_use]
    pub fn stacked(both: Weights<'m>) -> Option<Self> {
        let rows = both.layout.rows;
        assert!(rows.is_multiple_of(2), "{rows} rows of gate and up");
        Some(Self::Pair {
            gate: both.rows(0..rows / 2)?,
            up: both.rows(rows / 2..rows)?,
        })
    }

    /// Whether the products of so many tokens can become what the next matrix takes without being written as
    /// floats between. (Neighbouring rows of one matrix come sixteen a thread block, and bytes want 32.)
    #[must_use]
    pub fn gives_inputs(&self, tokens: usize) -> bool {
        matches!(self, Self::Pair { .. }) && tokens <= DECODE_TOKENS
    }

    /// Whether those of experts can.
    #[must_use]
    pub fn gives_experts_inputs(&self, routes: &Routes<'_>) -> bool {
        matches!(self, Self::Pair { .. }) && routes.tile() == FEW
    }

    /// Outputs.
    #[must_use]
    pub fn inner(&self) -> usize {
        match self {
            Self::Pair { gate, .. } => gate.layout.rows,
            Self::Interleaved { both, .. } => both.layout.rows / 2,
        }
    }
}

/// `y = x w^T + bias`: several matrices of one input, `[tokens, cols]`; their outputs lie side by side,
/// `[tokens, rows of all]`.
/// # Errors
/// When the device refuses the launch.
/// # Panics
/// When there are none or more than [`MATRICES`], the matrices are not alike in columns and elements, or a
/// length does not fit.
pub fn linear(
    device: &dyn Device,
    matrices: &[Weights<'_>],
    x: Activations<'_>,
    tokens: usize,
    y: Span<'_, f32>,
) -> Result<(), DeviceError> {
    let product = Product {
        matrices,
        gate: Gate::None,
        x,
        rows: Rows::Tokens(tokens),
    };
    product.launch(device, y.into())
}

/// The gated projections of an MLP: `[tokens, cols]` to `[tokens, inner]`, rows of f32 or, of so many tokens as
/// [`Gated::gives_inputs`], as the next matrix takes them.
/// # Errors
/// When the device refuses the launch.
/// # Panics
/// When the matrices are not alike, a length does not fit, or it does not give inputs.
pub fn gated_linear<'m>(
    device: &dyn Device,
    w: &Gated<'_>,
    x: Activations<'_>,
    tokens: usize,
    y: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    gated(device, w, x, Rows::Tokens(tokens), y.into())
}

/// The gated projections of the experts of each token: `[tokens, cols]` to `[places, inner]`, grouped by
/// expert, as [`gated_linear`] has them.
/// # Errors
/// When the device refuses the launch.
/// # Panics
/// When there are fewer experts than `routes` name, a length does not fit, or it does not give inputs.
pub fn gated_experts<'m>(
    device: &dyn Device,
    w: &Gated<'_>,
    x: Activations<'_>,
    routes: &Routes<'_>,
    y: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    gated(device, w, x, Rows::Scattered(routes), y.into())
}

/// Each expert's matrix times the rows of its group: `[places, cols]` to `[places, rows]`.
/// # Errors
/// When the device refuses the launch.
/// # Panics
/// When there are fewer experts than `routes` name, or a length does not fit.
pub fn linear_experts(
    device: &dyn Device,
    w: &Weights<'_>,
    x: Activations<'_>,
    routes: &Routes<'_>,
    y: Span<'_, f32>,
) -> Result<(), DeviceError> {
    let matrices = std::slice::from_ref(w);
    let product = Product {
        matrices,
        gate: Gate::None,
        x,
        rows: Rows::Grouped(routes),
    };
    product.launch(device, y.into())
}

fn gated(
    device: &dyn Device,
    w: &Gated<'_>,
    x: Activations<'_>,
    rows: Rows<'_>,
    y: Output<'_>,
) -> Result<(), DeviceError> {
    let pair;
    let (matrices, gate) = match w {
        Gated::Pair { gate, up } => {
            assert_eq!(gate.layout, up.layout, "gate and up");
            pair = [*gate, *up];
            (&pair[..], Gate::Silu)
        }
        Gated::Interleaved { both, limit } => {
            assert!(
                both.layout.rows.is_multiple_of(2),
                "{} rows in pairs",
                both.layout.rows
            );
            assert!(*limit >= 0.0, "limit {limit}");
            (std::slice::from_ref(both), Gate::Gegelu(*limit))
        }
    };
    Product {
        matrices,
        gate,
        x,
        rows,
    }
    .launch(device, y)
}

/// The rows of a result.
#[derive(Clone, Copy)]
enum Rows<'r> {
    /// Those of the input, all of one matrix.
    Tokens(usize),
    /// The places of `routes`; the input of each is its token's.
    Scattered(&'r Routes<'r>),
    /// The places of `routes`, which the input has too.
    Grouped(&'r Routes<'r>),
}

#[derive(Clone, Copy)]
enum Gate {
    None,
    Silu,
    Gegelu(f32),
}

/// Everything that a launch needs, but where the result goes.
struct Product<'p> {
    matrices: &'p [Weights<'p>],
    gate: Gate,
    x: Activations<'p>,
    rows: Rows<'p>,
}

impl Product<'_> {
    fn launch(&self, device: &dyn Device, y: Output<'_>) -> Result<(), DeviceError> {
        let (first, count) = (&self.matrices[0], self.matrices.len());
        assert!(count <= MATRICES, "{count} matrices, {MATRICES} at most");
        let Layout { elements, cols, .. } = first.layout;
        for w in self.matrices {
            assert_eq!(
                (w.layout.elements, w.layout.cols),
                (elements, cols),
                "elements and columns of a matrix beside another"
            );
        }
        let rows: usize = self.matrices.iter().map(|w| w.layout.rows).sum();
        let width = match self.gate {
            Gate::None => rows,
            Gate::Silu | Gate::Gegelu(_) => rows / 2,
        };
        // Rows of the result and of the input, blocks along them, and whether each has few tokens.
        let (slots, inputs, tiles, few) = match self.rows {
            Rows::Tokens(tokens) => {
                let few = tokens <= DECODE_TOKENS;
                let tiles = tokens.div_ceil(if few { FEW } else { tokens_of(elements) });
                assert!(
                    self.matrices.iter().all(|w| w.count() == 1),
                    "one of several experts' matrices is meant"
                );
                (tokens, tokens, tiles, few)
            }
            Rows::Scattered(routes) => (
                routes.places(),
                routes.tokens(),
                routes.tiles(),
                routes.tile() == FEW,
            ),
            Rows::Grouped(routes) => (
                routes.places(),
                routes.places(),
                routes.tiles(),
                routes.tile() == FEW,
            ),
        };
        // Blocks that share a tile of an expert.
        let parts = match self.rows {
            Rows::Scattered(_) | Rows::Grouped(_) if !few => MANY / tokens_of(elements),
            _ => 1,
        };
        let (sources, list) = match self.rows {
            Rows::Tokens(_) => (None, None),
            Rows::Scattered(routes) => (Some(routes.sources), Some(routes)),
            Rows::Grouped(routes) => (None, Some(routes)),
        };
        if let Some(routes) = list {
            for w in self.matrices {
                assert_eq!(w.count(), routes.experts(), "matrices and experts");
            }
        }
        let silu = matches!(self.gate, Gate::Silu);
        match y {
            Output::Rows(y) => {
                assert_eq!(y.len(), slots * width, "results of {slots} rows of {width}");
            }
            Output::Input(_) => assert!(few && silu, "results as a matrix takes them"),
        }
        let y = Target::new(device, y, number(slots), number(width));
        let blocks = first.layout.blocks();
        // Kernels count the blocks of all rows in 32 bits.
        let (x, heads) = self.input(device, elements, number(inputs * blocks) as usize);
        if slots == 0 {
            return Ok(());
        }

        let mut args = Vec::with_capacity(4 * MATRICES + 11);
        for i in 0..MATRICES {
            match self.matrices.get(i) {
                Some(w) => args.extend([
                    w.data.on(device),
                    w.bias.map_or(Arg::Address(0), |bias| bias.on(device)),
                    Arg::U32(number(w.layout.rows)),
                    Arg::U32(if w.count() == 1 { 0 } else { number(w.step) }),
                ]),
                None => args.extend([Arg::Address(0), Arg::Address(0), Arg::U32(0), Arg::U32(0)]),
            }
        }
        let (gate, limit) = match self.gate {
            Gate::None => (0, 0.0),
            Gate::Silu => (1, 0.0),
            Gate::Gegelu(limit) => (2, limit),
        };
        args.extend([
            Arg::U32(number(blocks)),
            Arg::U32(number(blocks.div_ceil(RANGES).next_multiple_of(2))),
            Arg::U32(gate),
            Arg::F32(limit),
            x,
            heads,
            Arg::U32(number(slots)),
            sources.map_or(Arg::Address(0), |s| s.on(device)),
            list.map_or(Arg::Address(0), |routes| routes.tile_list.on(device)),
            y.values,
            Arg::U32(y.stride),
            y.heads,
            Arg::U32(y.form as u32),
            Arg::I32(y.zero),
        ]);

        let panels: usize = self.matrices.iter().map(Weights::panels).sum();
        let (grid, shared) = if few {
            // A gate's and up's panels give 16 results, and two such pairs a block of them.
            let parts = if silu { panels.div_ceil(4) } else { panels };
            // Of the tiles of experts most may be empty; others are all there.
            let at_once = DECODE_BLOCKS * device.limits().multiprocessors as usize;
            let parts = match self.rows {
                Rows::Tokens(_) => parts.min(at_once.div_ceil(tiles)),
                Rows::Scattered(_) | Rows::Grouped(_) => parts,
            };
            let shared = ring_bytes(elements, if silu { 2 } else { 1 });
            ([number(tiles), number(parts), 1], shared)
        } else {
            (
                [number(tiles * parts), number(panels.div_ceil(PANELS)), 1],
                stage_bytes(elements),
            )
        };
        let kernel = Kernel {
            source: Source::Linear,
            name: name(elements, few, silu),
        };
        let launch = Launch {
            grid,
            block: [THREADS, 1, 1],
            shared,
        };
        // SAFETY: `args` are the `PARAMETERS` of `linear.cu`, whose every kernel reads of each matrix the
        // rows and columns that its layout has, of the activations `inputs` rows of `blocks` blocks, which
        // `input` has checked, and writes `slots` rows of `width` values. Tiles and sources are those that
        // `route` makes: experts, places and tokens below the numbers compared above.
        unsafe { device.launch(kernel, launch, &args) }
    }

    /// The arguments of the activations, which have `blocks` blocks.
    fn input(&self, device: &dyn Device, elements: Elements, blocks: usize) -> (Arg, Arg) {
        let values = blocks * BLOCK;
        match (elements, self.x) {
            (
                Elements::Packed(format),
                Activations::Quantized {
                    quants,
                    heads,
                    zero,
                },
            ) => {
                assert_eq!(
                    zero,
                    format.zero(),
                    "zero point of the activations and of the weights"
                );
                assert!(
                    quants.is_aligned(16) && heads.is_aligned(8),
                    "activations at {quants:?}"
                );
                assert_eq!(quants.len(), values, "quantized activations");
                assert_eq!(heads.len(), blocks, "heads of quantized activations");
                (quants.on(device), heads.on(device))
            }
            (Elements::Bf16, Activations::Bf16(x)) => {
                assert!(x.is_aligned(16), "activations at {x:?}");
                assert_eq!(x.len(), values, "bf16 activations");
                (x.on(device), Arg::Address(0))
            }
            (Elements::F32 | Elements::F16, Activations::F32(x)) => {
                assert!(x.is_aligned(16), "activations at {x:?}");
                assert_eq!(x.len(), values, "f32 activations");
                (x.on(device), Arg::Address(0))
            }
            (elements, _) => {
                panic!("activations made for a matrix of other elements than {elements:?}")
            }
        }
    }
}

/// The kernel for few tokens or many.
fn name(elements: Elements, few: bool, silu: bool) -> &'static str {
    let names = match elements {
        Elements::Packed(Format::Q4) => &KERNELS[0..3],
        Elements::Packed(Format::Q8) => &KERNELS[3..6],
        Elements::Bf16 => &KERNELS[6..9],
        Elements::F32 => &KERNELS[9..12],
        Elements::F16 => &KERNELS[12..15],
    };
    match (few, silu) {
        (true, false) => names[0],
        (true, true) => names[1],
        (false, _) => names[2],
    }
}

/// Tokens of a prompt's block.
fn tokens_of(elements: Elements) -> usize {
    match elements {
        Elements::Bf16 => 128,
        Elements::Packed(_) | Elements::F16 | Elements::F32 => 64,
    }
}

/// Bytes of shared memory that a decoding block of columns of so many panels needs: the rings of its warps.
fn ring_bytes(elements: Elements, panels: usize) -> usize {
    let (slots, step) = match elements {
        Elements::Packed(format) => {
            let pair = 2 * (format.block_bytes() + PANEL_ROWS * 2);
            let pairs = match format {
                Format::Q4 => 2,
                Format::Q8 => panels,
            };
            (if pairs * pair > 2048 { 3 } else { 5 }, pairs * pair)
        }
        Elements::Bf16 | Elements::F16 => (3, 2048),
        Elements::F32 if panels == 1 => (3, 2048),
        Elements::F32 => (2, 4096),
    };
    RANGES * slots * step
}

/// Bytes of shared memory that a prompt's block needs: all its stages.
fn stage_bytes(elements: Elements) -> usize {
    let (rows, tokens) = (PANELS * PANEL_ROWS, tokens_of(elements));
    match elements {
        Elements::Packed(format) => {
            let (stages, blocks) = (3, 2);
            let weights = PANELS * (format.block_bytes() + PANEL_ROWS * 2);
            stages * blocks * (weights + tokens * (BLOCK + size_of::<Head>()))
        }
        Elements::Bf16 => 4 * (rows + tokens) * BLOCK * 2,
        Elements::F32 => 2 * (rows + tokens) * BLOCK * 4,
        Elements::F16 => 3 * (rows * 2 + tokens * 4) * BLOCK,
    }
}

/// A size as an argument.
/// # Panics
/// When it does not fit in 32 bits.
pub(super) fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or_else(|_| panic!("{n} is too large for a kernel's argument"))
}
