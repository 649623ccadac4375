//! Activations in the memory of a device.

use super::CudaOps;
use crate::backend::Tokens;
use phidias_kernels::cuda::attention::Rotations;
use phidias_kernels::cuda::{
    Activations, Device, DeviceError, Form, Memory, Span, experts, sample,
};
use std::sync::Arc;

/// What a buffer takes a multiple of.
pub const ROOM: usize = 256;

/// Memory that is taken when more is needed, and kept.
#[derive(Debug, Default)]
pub(super) struct Room(Option<Memory>);

impl Room {
    /// Makes it at least so large; its contents are lost when it has to grow. Returns whether it had.
    pub(super) fn reserve(
        &mut self,
        device: &Arc<dyn Device>,
        bytes: usize,
    ) -> Result<bool, DeviceError> {
        if self.0.as_ref().is_some_and(|held| held.bytes() >= bytes) {
            return Ok(false);
        }
        // Before, so that both need not fit.
        self.0 = None;
        self.0 = Some(Memory::new(device, bytes.next_multiple_of(ROOM))?);
        Ok(true)
    }

    /// All of it.
    fn span(&self) -> Span<'_, u8> {
        self.0.as_ref().expect("room that was reserved").span()
    }
}

/// Rows of f32, `[rows, cols]`.
#[derive(Debug, Default)]
pub struct Rows {
    rows: usize,
    cols: usize,
    room: Room,
}

impl Rows {
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

    /// Changes the shape; the contents are to be overwritten.
    pub(super) fn reshape(&mut self, ops: &CudaOps<'_>, rows: usize, cols: usize) {
        (self.rows, self.cols) = (rows, cols);
        ops.reserve(&mut self.room, rows * cols * size_of::<f32>());
    }

    /// All values. Where there is no room, an operation has failed, and none follows.
    pub(super) fn span(&self) -> Span<'_, f32> {
        let bytes = self.rows * self.cols * size_of::<f32>();
        self.room.span().slice(..bytes).cast()
    }

    /// The values of some rows.
    pub(super) fn slice(&self, rows: std::ops::Range<usize>) -> Span<'_, f32> {
        self.span()
            .slice(rows.start * self.cols..rows.end * self.cols)
    }
}

/// Rows of activations as matrices of some format take them.
#[derive(Debug, Default)]
pub struct DeviceInput {
    form: Option<Form>,
    rows: usize,
    cols: usize,
    room: Room,
}

impl DeviceInput {
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn reshape(&mut self, ops: &CudaOps<'_>, form: Form, rows: usize, cols: usize) {
        (self.form, self.rows, self.cols) = (Some(form), rows, cols);
        ops.reserve(&mut self.room, form.bytes(rows, cols));
    }

    pub(super) fn activations(&self) -> Activations<'_> {
        let form = self.form.expect("an input that was made");
        form.place(self.room.span(), self.rows, self.cols)
    }
}

/// The tokens of a pass: position of the first, ids, cosines and sines, each from a boundary on.
#[derive(Debug, Default)]
pub struct DeviceTokens {
    tokens: usize,
    /// Pairs of a head.
    pairs: usize,
    room: Room,
}

/// Words to a boundary.
const BOUNDARY: usize = 64;

impl DeviceTokens {
    /// Copies the tokens to the device; whether they had to be put elsewhere than those before.
    pub(super) fn place(
        &mut self,
        device: &Arc<dyn Device>,
        tokens: &Tokens,
    ) -> Result<bool, DeviceError> {
        let Tokens {
            ids,
            first,
            rotations,
        } = tokens;
        (self.tokens, self.pairs) = (ids.len(), rotations.cos.cols());
        let [.., end] = Self::bounds(self.tokens, self.pairs);
        let mut words = Vec::with_capacity(end);
        words.push(u32::try_from(*first).expect("a position"));
        words.resize(words.len().next_multiple_of(BOUNDARY), 0);
        words.extend_from_slice(ids);
        words.resize(words.len().next_multiple_of(BOUNDARY), 0);
        for values in [rotations.cos.data(), rotations.sin.data()] {
            words.extend(values.iter().map(|value| value.to_bits()));
            words.resize(words.len().next_multiple_of(BOUNDARY), 0);
        }
        let grown = self.room.reserve(device, end * size_of::<u32>())?;
        let bytes = end * size_of::<u32>();
        self.room
            .span()
            .slice(..bytes)
            .cast::<u32>()
            .upload(&words)?;
        Ok(grown)
    }

    /// Where ids, cosines and sines begin, and the end, in words.
    fn bounds(tokens: usize, pairs: usize) -> [usize; 4] {
        let ids = BOUNDARY;
        let cos = ids + tokens.next_multiple_of(BOUNDARY);
        let values = (tokens * pairs).next_multiple_of(BOUNDARY);
        [ids, cos, cos + values, cos + 2 * values]
    }

    /// Bytes of so many tokens.
    pub(super) fn bytes(tokens: usize, pairs: usize) -> usize {
        let [.., end] = Self::bounds(tokens, pairs);
        end * size_of::<u32>()
    }

    fn words(&self, first: usize, len: usize) -> Span<'_, u32> {
        let bytes = first * size_of::<u32>()..(first + len) * size_of::<u32>();
        self.room.span().slice(bytes).cast()
    }

    pub(super) fn count(&self) -> usize {
        self.tokens
    }

    pub(super) fn first(&self) -> Span<'_, u32> {
        self.words(0, 1)
    }

    pub(super) fn ids(&self) -> Span<'_, u32> {
        let [ids, ..] = Self::bounds(self.tokens, self.pairs);
        self.words(ids, self.tokens)
    }

    pub(super) fn rotations(&self) -> Rotations<'_> {
        let [_, cos, sin, _] = Self::bounds(self.tokens, self.pairs);
        let of = |first| self.words(first, self.tokens * self.pairs).cast();
        Rotations {
            cos: of(cos),
            sin: of(sin),
        }
    }
}

/// Where the tokens of a pass go; the host does not know.
#[derive(Debug, Default)]
pub struct DeviceRoutes {
    tokens: usize,
    experts: usize,
    room: Room,
}

impl DeviceRoutes {
    pub(super) fn reshape(&mut self, ops: &CudaOps<'_>, tokens: usize, experts: usize) {
        (self.tokens, self.experts) = (tokens, experts);
        let words = experts::Routes::words(tokens, experts);
        ops.reserve(&mut self.room, words * size_of::<u32>());
    }

    pub(super) fn routes(&self) -> experts::Routes<'_> {
        experts::Routes::new(self.room.span().cast(), self.tokens, self.experts)
    }
}

/// What the router of a layer counts.
#[derive(Debug, Default)]
pub struct DeviceLoads(Option<Memory>);

impl DeviceLoads {
    /// Makes counts of zero, if there are none.
    pub(super) fn reserve(&mut self, ops: &CudaOps<'_>, experts: usize) {
        if self.0.is_none() {
            ops.take(|device| {
                self.0 = Some(Memory::zeroed(device, experts::load_bytes(experts))?);
                Ok(true)
            });
        }
    }

    /// They count while there is memory; where there is none, an operation has failed, and none follows.
    pub(super) fn span(&self) -> Span<'_, u64> {
        self.0.as_ref().expect("counts that were reserved").span()
    }

    /// The counts, which begin anew; `None` where nothing was routed.
    pub(super) fn take(&mut self) -> Result<Option<Vec<u64>>, DeviceError> {
        let Some(memory) = &self.0 else {
            return Ok(None);
        };
        let counts = memory.span::<u64>().to_vec()?;
        memory.span::<u64>().zero()?;
        Ok(Some(counts))
    }
}

/// The likeliest tokens of some rows of logits.
#[derive(Debug, Default)]
pub struct DeviceCandidates {
    rows: usize,
    vocab: usize,
    count: usize,
    room: Room,
}

impl DeviceCandidates {
    pub(super) fn reshape(&mut self, ops: &CudaOps<'_>, logits: &Rows, count: usize) {
        (self.rows, self.vocab, self.count) = (logits.rows(), logits.cols(), count);
        ops.reserve(&mut self.room, Self::bytes(self.rows, count));
    }

    /// Bytes of so many rows.
    pub(super) fn bytes(rows: usize, count: usize) -> usize {
        rows * sample::candidate_values(count) * size_of::<u32>()
    }

    pub(super) fn span(&self) -> Span<'_, u32> {
        let bytes = Self::bytes(self.rows, self.count);
        self.room.span().slice(..bytes).cast()
    }

    pub(super) fn read(&self) -> Result<Vec<sample::Candidates>, DeviceError> {
        sample::read_candidates(self.span(), self.vocab, self.count)
    }
}

/// What experts work with, kept from layer to layer.
#[derive(Debug, Default)]
pub struct DeviceExperts {
    /// Of the gated projections.
    pub(super) input: DeviceInput,
    /// Of the others.
    pub(super) next: DeviceInput,
    /// `[picks, inner]`, grouped by expert.
    pub(super) gated: Rows,
    /// `[picks, hidden]`, grouped by expert.
    pub(super) outputs: Rows,
}
