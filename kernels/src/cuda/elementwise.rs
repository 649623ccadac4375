//! What is done to each value, or each row, alone; the maths is in `elementwise.cu`.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Source, Span};
use super::linear::{Elements, Weights};
use super::rows::{Activations, rows_of};
use bytemuck::Pod;
use phidias_quant::{BLOCK, Format};

/// The kernels of `elementwise.cu`.
pub(super) const KERNELS: &[&str] = &[
    "input_f32",
    "input_bf16",
    "input_i8",
    "silu_mul_f32",
    "silu_mul_bf16",
    "silu_mul_i8",
    "gegelu_f32",
    "gegelu_bf16",
    "gegelu_i8",
    "quick_gelu_f32",
    "quick_gelu_bf16",
    "quick_gelu_i8",
    "gelu_f32",
    "gelu_bf16",
    "gelu_i8",
    "rms_norm_f32",
    "rms_norm_bf16",
    "rms_norm_i8",
    "layer_norm_f32",
    "layer_norm_bf16",
    "layer_norm_i8",
    "embed_f32",
    "embed_f16",
    "embed_bf16",
    "embed_q4",
    "embed_q8",
    "finish_logits",
];

/// Columns of a thread.
const VALUES: u32 = 4;
/// Threads of a block, but for norms.
const THREADS: u32 = 256;
/// Threads of a norm's block at most; they share one row.
const NORM_THREADS: u32 = 1024;

/// Where rows of results go.
#[derive(Clone, Copy, Debug)]
pub enum Output<'m> {
    /// `[rows, cols]`
    Rows(Span<'m, f32>),
    /// As a matrix takes them.
    Input(Activations<'m>),
}

impl<'m> From<Span<'m, f32>> for Output<'m> {
    fn from(rows: Span<'m, f32>) -> Self {
        Self::Rows(rows)
    }
}

impl<'m> From<Activations<'m>> for Output<'m> {
    fn from(rows: Activations<'m>) -> Self {
        Self::Input(rows)
    }
}

/// How rows are normalised; as the CPU's `rms_norm` and `layer_norm`.
#[derive(Clone, Copy, Debug)]
pub enum Norm<'m> {
    /// `x / sqrt(mean of x^2 + eps) * weight`
    Rms {
        /// `[cols]`
        weight: Span<'m, f32>,
        /// Epsilon.
        eps: f32,
    },
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`
    Layer {
        /// `[cols]`
        weight: Span<'m, f32>,
        /// `[cols]`
        bias: Span<'m, f32>,
        /// Epsilon.
        eps: f32,
    },
}

/// An activation of single values; as the CPU's `quick_gelu` and `gelu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`
    QuickGelu,
    /// `x * Phi(x)`
    Gelu,
}

/// `x[t] = multiplier * table[ids[t]]`, `x` being `[ids, cols]`. An id that is no row gives NaNs.
/// # Errors
/// When the launch fails.
/// # Panics
/// When a length does not fit.
pub fn embed(
    device: &dyn Device,
    table: &Weights<'_>,
    ids: Span<'_, u32>,
    multiplier: f32,
    x: Span<'_, f32>,
) -> Result<(), DeviceError> {
    let layout = table.layout();
    let (tokens, cols) = rows_of(x, layout.cols(), "embeddings");
    assert_eq!(ids.len(), tokens as usize, "ids and embeddings");
    assert!(layout.rows() <= u32::MAX as usize, "{} rows", layout.rows());
    aligned(x, cols);
    let name = match layout.elements() {
        Elements::F32 => "embed_f32",
        Elements::F16 => "embed_f16",
        Elements::Bf16 => "embed_bf16",
        Elements::Packed(Format::Q4) => "embed_q4",
        Elements::Packed(Format::Q8) => "embed_q8",
    };
    let args = [
        ids.on(device),
        table.data.on(device),
        x.on(device),
        Arg::U32(layout.rows() as u32),
        Arg::U32(cols),
        Arg::U32(cols.next_multiple_of(BLOCK as u32)),
        Arg::F32(multiplier),
    ];
    // SAFETY: an id is compared with the rows, and columns are inside a row, of a matrix that `Weights` knows to
    // be whole and to begin where vectors may; row t of `x` is written for id t.
    unsafe { launch(device, name, grid(tokens, cols), &args) }
}

/// `x += branch`, if there is one, and in `out` the norm of each row of the sum.
/// # Errors
/// When the launch fails.
/// # Panics
/// When a length does not fit.
pub fn add_norm<'m>(
    device: &dyn Device,
    x: Span<'_, f32>,
    branch: Option<Span<'_, f32>>,
    norm: Norm<'_>,
    out: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    let sum = branch.map(|_| x);
    norm_of(device, x, branch, sum, norm, out.into())
}

/// The norm of each row of `x + branch` in `out`; `x` stays.
/// # Errors
/// When the launch fails.
/// # Panics
/// When a length does not fit.
pub fn sum_norm<'m>(
    device: &dyn Device,
    x: Span<'_, f32>,
    branch: Span<'_, f32>,
    norm: Norm<'_>,
    out: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    norm_of(device, x, Some(branch), None, norm, out.into())
}

/// The norm of each row of `x`, or of `x + branch`, in `out`; what is normed also goes to `sum`, which is `x` or
/// shares nothing with it.
fn norm_of(
    device: &dyn Device,
    x: Span<'_, f32>,
    branch: Option<Span<'_, f32>>,
    sum: Option<Span<'_, f32>>,
    norm: Norm<'_>,
    out: Output<'_>,
) -> Result<(), DeviceError> {
    let (names, weight, bias, eps) = match norm {
        Norm::Rms { weight, eps } => {
            let names = ["rms_norm_f32", "rms_norm_bf16", "rms_norm_i8"];
            (names, weight, None, eps)
        }
        Norm::Layer { weight, bias, eps } => {
            let names = ["layer_norm_f32", "layer_norm_bf16", "layer_norm_i8"];
            (names, weight, Some(bias), eps)
        }
    };
    let (rows, cols) = rows_of(x, weight.len(), "values to be normalised");
    for (vector, what) in [(branch, "branch"), (sum, "sum"), (bias, "bias")] {
        let expected = if what == "bias" {
            weight.len()
        } else {
            x.len()
        };
        if let Some(vector) = vector {
            assert_eq!(vector.len(), expected, "{what} of a norm");
            aligned(vector, cols);
        }
    }
    aligned(x, cols);
    aligned(weight, cols);
    let out = Target::new(device, out, rows, cols);
    let or_none = |span: Option<Span<'_, f32>>| span.map_or(Arg::Address(0), |s| s.on(device));
    let args = [
        x.on(device),
        or_none(branch),
        or_none(sum),
        weight.on(device),
        or_none(bias),
        Arg::F32(eps),
        out.values,
        out.heads,
        Arg::U32(cols),
        Arg::U32(out.stride),
        Arg::I32(out.zero),
    ];
    let threads = cols.div_ceil(VALUES).next_multiple_of(32).min(NORM_THREADS);
    let launch_of = Launch {
        grid: [rows, 1, 1],
        block: [threads, 1, 1],
        shared: cols as usize * size_of::<f32>(),
    };
    // SAFETY: a block reads and writes row `blockIdx.x` of matrices that have so many, columns inside them, each
    // thread its own, and vectors of `cols`; the results are as long as `Target` has checked.
    unsafe { launch(device, names[out.form], launch_of, &args) }
}

/// Rows of `x`, `[rows, cols]`, as a matrix takes them.
/// # Errors
/// When the launch fails.
/// # Panics
/// When a length does not fit.
pub fn input(
    device: &dyn Device,
    x: Span<'_, f32>,
    cols: usize,
    out: Activations<'_>,
) -> Result<(), DeviceError> {
    let names = ["input_f32", "input_bf16", "input_i8"];
    values(device, names, x, (cols, 1), 0.0, out.into())
}

/// `up * silu(gate)`; a row of `x` is `inner` gates, then as many of `up`.
/// # Errors
/// When the launch fails.
/// # Panics
/// When a length does not fit.
pub fn silu_mul<'m>(
    device: &dyn Device,
    x: Span<'_, f32>,
    inner: usize,
    out: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    let names = ["silu_mul_f32", "silu_mul_bf16", "silu_mul_i8"];
    values(device, names, x, (inner, 2), 0.0, out.into())
}

/// The gate of Phi-3-small; a row of `x` is `inner` pairs of a gate and what it is for. An infinite
/// `limit` is none.
/// # Errors
/// When the launch fails.
/// # Panics
/// When a length does not fit, or `limit` is negative or a NaN.
pub fn gegelu<'m>(
    device: &dyn Device,
    x: Span<'_, f32>,
    inner: usize,
    limit: f32,
    out: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    assert!(limit >= 0.0, "limit {limit}");
    let names = ["gegelu_f32", "gegelu_bf16", "gegelu_i8"];
    values(device, names, x, (inner, 2), limit, out.into())
}

/// The activation of each value of `x`, `[rows, cols]`, which `out` may be.
/// # Errors
/// When the launch fails.
/// # Panics
/// When a length does not fit.
pub fn activate<'m>(
    device: &dyn Device,
    activation: Activation,
    x: Span<'_, f32>,
    cols: usize,
    out: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    let names = match activation {
        Activation::QuickGelu => ["quick_gelu_f32", "quick_gelu_bf16", "quick_gelu_i8"],
        Activation::Gelu => ["gelu_f32", "gelu_bf16", "gelu_i8"],
    };
    values(device, names, x, (cols, 1), 0.0, out.into())
}

/// Divides logits by `divisor`, and makes those of `unused` ids the lowest float.
///
/// `logits` is `[rows, vocab]`; `unused` holds the first id and the end of each range of them.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the logits are not whole rows, or `unused` is not pairs.
pub fn finish_logits(
    device: &dyn Device,
    logits: Span<'_, f32>,
    vocab: usize,
    divisor: f32,
    unused: Span<'_, u32>,
) -> Result<(), DeviceError> {
    let (rows, vocab) = rows_of(logits, vocab, "logits");
    assert!(unused.len().is_multiple_of(2), "{} ends", unused.len());
    let args = [
        logits.on(device),
        unused.on(device),
        Arg::U32(vocab),
        Arg::F32(divisor),
        Arg::U32((unused.len() / 2) as u32),
    ];
    let launch_of = Launch {
        grid: [rows, vocab.div_ceil(THREADS), 1],
        block: [THREADS, 1, 1],
        shared: 0,
    };
    // SAFETY: a thread changes one logit inside the rows, and reads all pairs of `unused`.
    unsafe { launch(device, "finish_logits", launch_of, &args) }
}

/// Values of rows of `cols`, each made of `of` values of `x`.
fn values(
    device: &dyn Device,
    names: [&'static str; 3],
    x: Span<'_, f32>,
    (cols, of): (usize, usize),
    limit: f32,
    out: Output<'_>,
) -> Result<(), DeviceError> {
    let (rows, _) = rows_of(x, of * cols, "values");
    let cols = cols as u32;
    aligned(x, of as u32 * cols);
    let out = Target::new(device, out, rows, cols);
    let args = [
        x.on(device),
        out.values,
        out.heads,
        Arg::U32(cols),
        Arg::U32(out.stride),
        Arg::I32(out.zero),
        Arg::F32(limit),
    ];
    // SAFETY: row `blockIdx.x` of `x` is read, inside its `of * cols` values, and the same row of the results
    // written, which are as long as `Target` has checked. A value is read before it is written.
    unsafe { launch(device, names[out.form], grid(rows, out.stride), &args) }
}

/// The results of a kernel as its arguments.
pub(super) struct Target {
    /// Which of three kinds: f32, bf16 or bytes.
    pub(super) form: usize,
    pub(super) values: Arg,
    pub(super) heads: Arg,
    /// Columns with the padding.
    pub(super) stride: u32,
    pub(super) zero: i32,
}

impl Target {
    /// # Panics
    /// When `out` has not so many rows and columns.
    pub(super) fn new(device: &dyn Device, out: Output<'_>, rows: u32, cols: u32) -> Self {
        let padded = cols.next_multiple_of(BLOCK as u32);
        let count = |stride: u32| rows as usize * stride as usize;
        let float = |values: Span<'_, f32>, stride: u32| {
            assert_eq!(values.len(), count(stride), "results");
            aligned(values, stride);
            (0, values.on(device), Arg::Address(0), stride, 0)
        };
        let (form, values, heads, stride, zero) = match out {
            Output::Rows(values) => float(values, cols),
            Output::Input(Activations::F32(values)) => float(values, padded),
            Output::Input(Activations::Bf16(values)) => {
                assert_eq!(values.len(), count(padded), "results");
                assert!(values.is_aligned(4), "results at {values:?}");
                (1, values.on(device), Arg::Address(0), padded, 0)
            }
            Output::Input(Activations::Quantized {
                quants,
                heads,
                zero,
            }) => {
                assert_eq!(quants.len(), count(padded), "results");
                assert_eq!(heads.len() * BLOCK, count(padded), "heads of results");
                assert!(quants.is_aligned(4), "results at {quants:?}");
                (2, quants.on(device), heads.on(device), padded, zero)
            }
        };
        Self {
            form,
            values,
            heads,
            stride,
            zero,
        }
    }
}

/// Asserts what vector loads need: rows at multiples of 16 bytes where they have whole vectors.
fn aligned<T: Pod>(rows: Span<'_, T>, cols: u32) {
    let ok = !cols.is_multiple_of(VALUES) || rows.is_aligned(16);
    assert!(ok, "rows of {cols} at {rows:?}");
}

/// A thread for each four columns of each row.
fn grid(rows: u32, cols: u32) -> Launch {
    Launch {
        grid: [rows, cols.div_ceil(THREADS * VALUES), 1],
        block: [THREADS, 1, 1],
        shared: 0,
    }
}

/// # Safety
/// As [`Device::launch`] demands, of a kernel of `elementwise.cu`.
unsafe fn launch(
    device: &dyn Device,
    name: &'static str,
    launch: Launch,
    args: &[Arg],
) -> Result<(), DeviceError> {
    if launch.grid[0] == 0 {
        return Ok(()); // no rows
    }
    let kernel = Kernel {
        source: Source::Elementwise,
        name,
    };
    // SAFETY: promised by the caller.
    unsafe { device.launch(kernel, launch, args) }
}
