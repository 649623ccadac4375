//! Views of matrices that kernels read and write.

use phidias_quant::{bf16, f16};
use std::marker::PhantomData;
use std::ops::Range;

/// Elements of a dense matrix or of a key/value block, as stored.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// The upper half of a 32-bit float.
    Bf16(&'a [bf16]),
}

impl<'a> Elements<'a> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(s) => s.len(),
            Self::F16(s) => s.len(),
            Self::Bf16(s) => s.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements in `range`.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Elements<'a> {
        match *self {
            Self::F32(s) => Elements::F32(&s[range]),
            Self::F16(s) => Elements::F16(&s[range]),
            Self::Bf16(s) => Elements::Bf16(&s[range]),
        }
    }
}

/// A dense matrix, row-major `[rows, cols]`.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    rows: usize,
    cols: usize,
    elements: Elements<'a>,
}

impl<'a> Dense<'a> {
    /// A view of `elements` as `[rows, cols]`.
    /// # Panics
    /// When there are not `rows * cols` elements.
    #[must_use]
    pub fn new(rows: usize, cols: usize, elements: Elements<'a>) -> Self {
        assert_eq!(
            Some(elements.len()),
            rows.checked_mul(cols),
            "elements of {rows} x {cols}"
        );
        Self {
            rows,
            cols,
            elements,
        }
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
    /// All elements.
    #[must_use]
    pub fn elements(&self) -> Elements<'a> {
        self.elements
    }
}

/// A range of columns of a row-major f32 matrix, owned exclusively: what one worker writes.
///
/// A GEMM worker owns a range of *weight* rows, which are *columns* of the result, so its part of
/// the result is strided. Splitting by column is what slices cannot express; this type can.
#[derive(Debug)]
pub struct ColsMut<'a> {
    first: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `ColsMut` is an exclusive borrow of its elements, and f32 is Send.
unsafe impl Send for ColsMut<'_> {}

impl<'a> ColsMut<'a> {
    /// All columns of the row-major matrix `data`.
    /// # Panics
    /// When `data` does not hold `rows * cols` elements.
    #[must_use]
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            Some(data.len()),
            rows.checked_mul(cols),
            "elements of {rows} x {cols}"
        );
        Self {
            first: data.as_mut_ptr(),
            rows,
            cols,
            stride: cols,
            matrix: PhantomData,
        }
    }

    /// The same columns, for a while.
    #[must_use]
    pub fn reborrow(&mut self) -> ColsMut<'_> {
        ColsMut { ..*self }
    }

    /// The columns before `at`, and the rest.
    /// # Panics
    /// When `at` is beyond the last column.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        assert!(at <= self.cols, "column {at} of {}", self.cols);
        // An empty right part may point one past the data; it is never dereferenced.
        let right = Self {
            first: self.first.wrapping_add(at),
            cols: self.cols - at,
            ..self
        };
        (Self { cols: at, ..self }, right)
    }

    /// The same columns, for several threads to take parts of.
    #[must_use]
    pub fn shared(self) -> SharedCols<'a> {
        SharedCols(self)
    }

    /// Ranges of `width` columns; the last one may be narrower.
    /// # Panics
    /// When `width` is zero.
    #[must_use]
    pub fn chunks(self, width: usize) -> Vec<Self> {
        let mut chunks = Vec::with_capacity(self.cols.div_ceil(width));
        let mut rest = self;
        while rest.cols > 0 {
            let at = width.min(rest.cols);
            let (chunk, right) = rest.split_at(at);
            chunks.push(chunk);
            rest = right;
        }
        chunks
    }

    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns in this range.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// This range of row `row`.
    /// # Panics
    /// When there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `row < rows` and the range lies within the row, so the elements are inside the
        // matrix borrowed by `new`; `split_at` gives every column to one view only, and the
        // borrow of `self` keeps a second slice of this view from existing.
        unsafe {
            std::slice::from_raw_parts_mut(self.first.wrapping_add(row * self.stride), self.cols)
        }
    }
}

/// Columns of which several threads take parts as they go.
#[derive(Debug)]
pub struct SharedCols<'a>(ColsMut<'a>);

// SAFETY: all it gives away are parts, and who takes them promises that no two overlap.
unsafe impl Sync for SharedCols<'_> {}

impl SharedCols<'_> {
    /// Some of the columns.
    /// # Panics
    /// When there are fewer.
    /// # Safety
    /// Parts that live at the same time have no column in common.
    #[must_use]
    pub unsafe fn part(&self, cols: Range<usize>) -> ColsMut<'_> {
        let all = &self.0;
        assert!(
            cols.start <= cols.end && cols.end <= all.cols,
            "columns {cols:?} of {}",
            all.cols
        );
        ColsMut {
            first: all.first.wrapping_add(cols.start),
            cols: cols.len(),
            ..*all
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_split_without_overlap() {
        let mut data: Vec<f32> = vec![0.0; 3 * 5];
        let (left, right) = ColsMut::new(&mut data, 3, 5).split_at(2);
        let (mut mid, mut empty) = right.split_at(3);
        let mut left = left;
        for r in 0..3 {
            left.row(r).fill(1.0);
            mid.row(r).fill(2.0);
            assert!(empty.row(r).is_empty());
        }
        assert_eq!(data, [1.0, 1.0, 2.0, 2.0, 2.0].repeat(3));
    }
}
