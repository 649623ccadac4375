//! Tensors and matrices: shape and dtype over shared bytes.

use crate::bytes::Bytes;
use phidias_kernels::view::{ColsMut, Dense, Elements};
use phidias_quant::{ALIGN, Format, Packed, PackedLayout};
use std::fmt;

/// What the elements of a tensor are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
    /// Blocks of int4 or int8 in packed order.
    Packed(Format),
}

impl DType {
    /// Boundary its data must start on, in bytes.
    #[must_use]
    pub fn align(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Packed(_) => ALIGN,
        }
    }

    /// The format of a packed one.
    #[must_use]
    pub fn packed(self) -> Option<Format> {
        match self {
            Self::Packed(format) => Some(format),
            Self::F32 | Self::F16 | Self::Bf16 => None,
        }
    }

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Packed(format) => format.name(),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor: dtype, shape and the bytes, whose length and alignment were checked.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Bytes,
}

impl Tensor {
    /// The checkpoint has checked that `bytes` fits the shape and is aligned.
    pub(crate) fn new(dtype: DType, shape: Vec<usize>, bytes: Bytes) -> Self {
        Self {
            dtype,
            shape,
            bytes,
        }
    }

    /// What its elements are stored as.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its shape; `[rows, cols]` of the matrix for a packed one.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its bytes as stored.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The elements as stored, or `None` when packed.
    #[must_use]
    pub fn elements(&self) -> Option<Elements<'_>> {
        Some(match self.dtype {
            DType::F32 => Elements::F32(bytemuck::cast_slice(&self.bytes)),
            DType::F16 => Elements::F16(bytemuck::cast_slice(&self.bytes)),
            DType::Bf16 => Elements::Bf16(bytemuck::cast_slice(&self.bytes)),
            DType::Packed(_) => return None,
        })
    }

    /// Widens `out.len()` elements from `first` on to f32, exactly; `false` when packed.
    #[must_use]
    pub fn widen(&self, first: usize, out: &mut [f32]) -> bool {
        let Some(elements) = self.elements() else {
            return false;
        };
        match elements.slice(first..first + out.len()) {
            Elements::F32(s) => out.copy_from_slice(s),
            Elements::F16(s) => out.iter_mut().zip(s).for_each(|(o, v)| *o = v.to_f32()),
            Elements::Bf16(s) => out.iter_mut().zip(s).for_each(|(o, v)| *o = v.to_f32()),
        }
        true
    }
}

/// A weight matrix `[rows, cols]`: what a linear layer multiplies with.
#[derive(Clone, Debug)]
pub struct Matrix {
    tensor: Tensor,
    rows: usize,
    cols: usize,
}

/// What a linear layer has: `y = x weight^T + bias`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[rows, cols]`
    pub weight: Matrix,
    /// `[rows]`, in layers that have one.
    pub bias: Option<Vec<f32>>,
}

/// A matrix as the kernels take it.
#[derive(Clone, Copy, Debug)]
pub enum MatrixView<'a> {
    /// As stored.
    Dense(Dense<'a>),
    /// int4 or int8 blocks.
    Packed(Packed<'a>),
}

impl Matrix {
    /// The tensor as a matrix; `None` when it has not two dimensions.
    #[must_use]
    pub fn new(tensor: &Tensor) -> Option<Self> {
        let &[rows, cols] = tensor.shape() else {
            return None;
        };
        Some(Self {
            tensor: tensor.clone(),
            rows,
            cols,
        })
    }

    /// Floats of any number of dimensions as a matrix: the first one by all others. `None` when the tensor
    /// has none, or is packed.
    #[must_use]
    pub fn flattened(tensor: &Tensor) -> Option<Self> {
        let (&rows, rest) = tensor.shape().split_first()?;
        tensor.elements()?;
        Some(Self {
            tensor: tensor.clone(),
            rows,
            cols: rest.iter().product(),
        })
    }

    /// Rows, the outputs of the layer.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, the inputs of the layer.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What it is stored as.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.tensor.dtype
    }

    /// Bytes that one pass over it reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tensor.bytes.len()
    }

    /// Its bytes as stored.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.tensor.bytes
    }

    /// A view for the kernels.
    /// # Panics
    /// Never: the checkpoint has checked length and alignment.
    #[must_use]
    pub fn view(&self) -> MatrixView<'_> {
        match (self.tensor.dtype, self.tensor.elements()) {
            (DType::Packed(format), _) => {
                let layout = PackedLayout::new(format, self.rows, self.cols)
                    .expect("checked by the checkpoint");
                MatrixView::Packed(
                    Packed::new(layout, &self.tensor.bytes).expect("checked by the checkpoint"),
                )
            }
            (_, Some(elements)) => MatrixView::Dense(Dense::new(self.rows, self.cols, elements)),
            (_, None) => unreachable!("only packed tensors have no elements"),
        }
    }

    /// Row `row` as f32, `[cols]`.
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "row {row} of {} into {}",
            self.rows,
            out.len()
        );
        match self.view() {
            MatrixView::Packed(packed) => packed.dequantize_row(row, out),
            MatrixView::Dense(_) => {
                assert!(self.tensor.widen(row * self.cols, out), "dense elements")
            }
        }
    }
}

/// Rows of f32: activations, `[rows, cols]` row-major. Reused from one pass to the next.
#[derive(Clone, Debug, Default)]
pub struct Buffer {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
    /// What of `data` is before row 0, so that it begins on a line of the cache: registers of a whole line that cross
    /// two take twice as long to load.
    skip: usize,
}

impl Buffer {
    /// Changes the shape; the contents are to be overwritten.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        const LINE: usize = 64 / size_of::<f32>();
        (self.rows, self.cols) = (rows, cols);
        let len = rows * cols + LINE;
        if len > self.data.capacity() {
            // Growing would copy what is overwritten anyway, into up to twice the room.
            self.data = Vec::new();
        }
        self.data.resize(len, 0.0);
        self.skip = self.data.as_ptr().align_offset(64).min(LINE);
    }
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Row `i`.
    #[must_use]
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data()[i * self.cols..][..self.cols]
    }
    /// Row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        let cols = self.cols;
        &mut self.data_mut()[i * cols..][..cols]
    }
    /// All columns, to be divided.
    pub fn columns_mut(&mut self) -> ColsMut<'_> {
        let (rows, cols) = (self.rows, self.cols);
        ColsMut::new(self.data_mut(), rows, cols)
    }
    /// All rows, one after the other.
    #[must_use]
    pub fn data(&self) -> &[f32] {
        &self.data[self.skip..][..self.rows * self.cols]
    }
    /// All rows, one after the other.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.skip..][..self.rows * self.cols]
    }
}
