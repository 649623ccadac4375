//! The weights of a model on a device.

use crate::Cancel;
use crate::backend::{DeviceFailed, GateUp, Norm};
use crate::tensor::{DType, Linear, Matrix};
use bytemuck::Pod;
use phidias_kernels::cuda::linear::{Elements, Gated, Layout, Weights};
use phidias_kernels::cuda::{Device, DeviceError, Memory, Span, elementwise};
use phidias_quant::BLOCK;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Where a part may begin.
const BOUNDARY: usize = 256;

/// Bytes that are copied to the device at a time.
const SLICE: usize = 32 << 20;

/// Something of a model that its operations need on the device.
#[derive(Clone, Debug)]
pub enum Part<'m> {
    /// A matrix, or a table of embeddings.
    Matrix(&'m Matrix, Width),
    /// One matrix of each expert, all alike.
    Experts(Vec<&'m Matrix>, Width),
    /// A bias, or what a norm has.
    Values(&'m [f32]),
    /// Ids that are no tokens.
    Ids(&'m [Range<usize>]),
}

/// What elements become on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// They stay. Matrices of bf16 are then multiplied with activations of bf16.
    Stored,
    /// bf16 becomes f32, which is multiplied with activations of f32, as the CPU does.
    Widened,
}

impl Part<'_> {
    /// Bytes of the memory that some parts take on a device; those that are named twice are there once.
    #[must_use]
    pub fn bytes_of(parts: &[Self], device: &dyn Device) -> usize {
        places_bytes(Self::distinct(parts).into_values(), device)
    }

    /// Bytes of each of them by its key.
    fn distinct(parts: &[Self]) -> HashMap<usize, usize> {
        parts
            .iter()
            .map(|part| (part.key(), part.bytes()))
            .collect()
    }

    /// Where its first value lies on the host; model files do not move while the model lives.
    fn key(&self) -> usize {
        match self {
            Self::Matrix(matrix, _) => key(matrix.data()),
            Self::Experts(matrices, _) => key(matrices[0].data()),
            Self::Values(values) => key(values),
            Self::Ids(ids) => key(ids),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Matrix(matrix, width) => layout(matrix, *width).bytes(),
            Self::Experts(matrices, width) => {
                let of = |matrix| layout(matrix, *width).bytes();
                matrices.iter().copied().map(of).sum()
            }
            Self::Values(values) => size_of_val(*values),
            Self::Ids(ids) => 2 * ids.len() * size_of::<u32>(),
        }
    }
}

/// Bytes of the memory that distinct parts of so many bytes take on a device.
#[must_use]
pub fn places_bytes(parts: impl IntoIterator<Item = usize>, device: &dyn Device) -> usize {
    let places = parts.into_iter().map(place);
    places.sum::<usize>().next_multiple_of(device.piece())
}

/// Bytes of a matrix on a device.
#[must_use]
pub fn matrix_bytes(dtype: DType, rows: usize, cols: usize, width: Width) -> usize {
    layout_of(dtype, rows, cols, width).bytes()
}

/// Bytes of the place of a part of so many.
fn place(bytes: usize) -> usize {
    bytes.next_multiple_of(BOUNDARY)
}

fn key<T>(values: &[T]) -> usize {
    values.as_ptr().addr()
}

/// How a matrix lies on the device.
fn layout(matrix: &Matrix, width: Width) -> Layout {
    layout_of(matrix.dtype(), matrix.rows(), matrix.cols(), width)
}

fn layout_of(dtype: DType, rows: usize, cols: usize, width: Width) -> Layout {
    let elements = match (dtype, width) {
        (DType::Packed(format), _) => Elements::Packed(format),
        (DType::F16, _) => Elements::F16,
        (DType::Bf16, Width::Stored) => Elements::Bf16,
        (DType::Bf16, Width::Widened) | (DType::F32, _) => Elements::F32,
    };
    Layout::new(elements, rows, cols).expect("checked by the checkpoint")
}

/// Weights in the memory of a device, found by where they lie on the host. Whoever holds this holds the
/// model as well, and does not change it.
#[derive(Debug)]
pub struct Resident {
    /// All of them: one allocation, since each is rounded up to whole pieces.
    memory: Memory,
    /// Bytes of it that are taken.
    taken: usize,
    matrices: HashMap<usize, (Layout, Range<usize>)>,
    /// Biases, norms and ids: 4 bytes each.
    values: HashMap<usize, Range<usize>>,
}

impl Resident {
    /// Copies the parts of a model to a device. `progress` hears of bytes done and in all. `None` when it
    /// was cancelled.
    /// # Errors
    /// When they do not fit, or the device fails.
    pub fn load(
        device: Arc<dyn Device>,
        parts: &[Part<'_>],
        cancel: &Cancel,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<Self>, DeviceFailed> {
        let total = Part::distinct(parts).values().sum();
        let failed = |error| failed(&*device, error);
        let mut resident = Self {
            memory: Memory::new(&device, Part::bytes_of(parts, &*device)).map_err(failed)?,
            taken: 0,
            matrices: HashMap::new(),
            values: HashMap::new(),
        };
        let mut done = 0;
        for part in parts {
            let mut told = |bytes| {
                done += bytes;
                progress(done, total);
                !cancel.is_cancelled()
            };
            if !resident.put(part, &mut told).map_err(failed)? {
                return Ok(None);
            }
        }
        device.synchronize().map_err(failed)?;
        Ok(Some(resident))
    }

    /// Copies a part that is not there; `told` hears of bytes and says whether to go on.
    fn put(
        &mut self,
        part: &Part<'_>,
        told: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool, DeviceError> {
        let key = part.key();
        let (matrices, width) = match part {
            Part::Matrix(matrix, width) => (std::slice::from_ref(matrix), *width),
            Part::Experts(matrices, width) => (&matrices[..], *width),
            Part::Values([]) | Part::Ids([]) => return Ok(true),
            Part::Values(values) => return self.put_values(key, values, told),
            Part::Ids(ids) => {
                let id = |id: usize| u32::try_from(id).expect("ids of a vocabulary");
                let ends: Vec<u32> = ids.iter().flat_map(|r| [id(r.start), id(r.end)]).collect();
                return self.put_values(key, &ends, told);
            }
        };
        let layout = layout(matrices[0], width);
        if let Some((known, place)) = self.matrices.get(&key) {
            assert_eq!(
                (*known, place.len()),
                (layout, part.bytes()),
                "one matrix, two layouts"
            );
            return Ok(true);
        }
        let place = self.take(part.bytes());
        let all = self.span::<u8>(&place);
        let mut go_on = true;
        for (matrix, i) in matrices.iter().zip(0..) {
            let place = all.slice(i * layout.bytes()..(i + 1) * layout.bytes());
            go_on = go_on && upload(matrix, &layout, place, told)?;
        }
        self.matrices.insert(key, (layout, place));
        Ok(go_on)
    }

    /// Copies values that are not there.
    fn put_values<T: Pod>(
        &mut self,
        key: usize,
        values: &[T],
        told: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool, DeviceError> {
        if self.values.contains_key(&key) {
            return Ok(true);
        }
        let place = self.take(size_of_val(values));
        self.span(&place).upload(values)?;
        self.values.insert(key, place);
        Ok(told(size_of_val(values)))
    }

    /// The next place of so many bytes.
    fn take(&mut self, bytes: usize) -> Range<usize> {
        let first = self.taken;
        self.taken += place(bytes);
        first..first + bytes
    }

    fn span<T: Pod>(&self, place: &Range<usize>) -> Span<'_, T> {
        self.memory.span::<u8>().slice(place.clone()).cast()
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        self.memory.device()
    }

    /// Bytes of the device that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn found(&self, matrix: &Matrix) -> (Layout, Span<'_, u8>) {
        let found = self.matrices.get(&key(matrix.data()));
        let (layout, place) = found.expect("a matrix that was put on the device");
        (*layout, self.span(place))
    }

    fn values(&self, values: &[f32]) -> Span<'_, f32> {
        let place = self.values.get(&key(values));
        self.span(place.expect("values that were put on the device"))
    }

    /// How a matrix lies on the device.
    pub(super) fn layout(&self, matrix: &Matrix) -> Layout {
        self.found(matrix).0
    }

    /// A matrix, or that of all experts when it is the first one's.
    pub(super) fn matrix(&self, matrix: &Matrix) -> Weights<'_> {
        let (layout, place) = self.found(matrix);
        Weights::new(layout, place, None)
    }

    /// A matrix and its bias.
    pub(super) fn linear(&self, linear: &Linear) -> Weights<'_> {
        let (layout, place) = self.found(&linear.weight);
        let bias = linear.bias.as_ref().map(|bias| self.values(bias));
        Weights::new(layout, place, bias)
    }

    /// Gated projections. `None` where one matrix has rows of `up` that do not begin with a panel.
    pub(super) fn gated(&self, w: &GateUp) -> Option<Gated<'_>> {
        Some(match w {
            GateUp::Stacked(both) => return Gated::stacked(self.linear(both)),
            GateUp::Pair { gate, up } => Gated::Pair {
                gate: self.linear(gate),
                up: self.linear(up),
            },
            GateUp::Interleaved { both, limit } => Gated::Interleaved {
                both: self.linear(both),
                limit: *limit,
            },
        })
    }

    pub(super) fn norm(&self, norm: &Norm) -> elementwise::Norm<'_> {
        match norm {
            Norm::Rms { weight, eps } => elementwise::Norm::Rms {
                weight: self.values(weight),
                eps: *eps,
            },
            Norm::Layer { weight, bias, eps } => elementwise::Norm::Layer {
                weight: self.values(weight),
                bias: self.values(bias),
                eps: *eps,
            },
        }
    }

    /// First id and end of each range.
    pub(super) fn ids(&self, ids: &[Range<usize>]) -> Span<'_, u32> {
        match ids {
            [] => self.span(&(0..0)),
            ids => {
                let place = self.values.get(&key(ids));
                self.span(place.expect("ids that were put on the device"))
            }
        }
    }
}

/// Copies a matrix to its place, some of it at a time; `told` hears of bytes and says whether to go on.
fn upload(
    matrix: &Matrix,
    layout: &Layout,
    to: Span<'_, u8>,
    told: &mut dyn FnMut(usize) -> bool,
) -> Result<bool, DeviceError> {
    let widened = layout.elements() == Elements::F32 && matrix.dtype() != DType::F32;
    if widened {
        let stride = matrix.cols().next_multiple_of(BLOCK);
        let rows = (SLICE / (stride * size_of::<f32>())).max(1);
        let mut slice = vec![0.0f32; rows.min(matrix.rows()) * stride];
        let to = to.cast::<f32>();
        for first in (0..matrix.rows()).step_by(rows) {
            let rows = rows.min(matrix.rows() - first);
            for (i, row) in slice.chunks_exact_mut(stride).take(rows).enumerate() {
                matrix.row(first + i, &mut row[..matrix.cols()]);
            }
            let values = &slice[..rows * stride];
            to.slice(first * stride..(first + rows) * stride)
                .upload(values)?;
            if !told(size_of_val(values)) {
                return Ok(false);
            }
        }
        return Ok(true);
    }
    if matrix.bytes() != layout.bytes() {
        layout.upload(matrix.data(), to)?;
        return Ok(told(layout.bytes()));
    }
    for (i, bytes) in matrix.data().chunks(SLICE).enumerate() {
        to.slice(i * SLICE..i * SLICE + bytes.len()).upload(bytes)?;
        if !told(bytes.len()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A failure of a device as backends have it.
pub(super) fn failed(device: &dyn Device, error: DeviceError) -> DeviceFailed {
    DeviceFailed {
        device: device.name(),
        source: Box::new(error),
    }
}
