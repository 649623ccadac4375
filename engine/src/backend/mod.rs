//! Whole operations on whole buffers: the seam between models and devices.
//!
//! A model calls the operations of [`Ops`] one after the other and never sees a thread, an instruction set
//! or a device: it is written once, for every [`Backend`]. Its weights stay what they are, matrices over
//! shared bytes; a device with memory of its own has a copy of them. Activations, the cache and whatever an
//! operation leaves for the next are of the backend's own types.
//!
//! Every result depends on its own row only, never on how the work was divided.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod rotations;
mod weights;

pub use crate::mask::Mask;
pub use cpu::{Cpu, CpuOps, ExpertScratch, Input, Routes, gated_rows};
pub use phidias_kernels::heads::{HeadOrder, Heads};
pub use rotations::Rotations;
pub use weights::{Activation, Expert, GateUp, Norm, PICKS, Pick};

use crate::kv_cache::{KvOutOfMemory, KvType};
use crate::sampling::Candidates;
use crate::tensor::{Buffer, Linear, Matrix};
use std::error::Error;
use std::fmt::Debug;
use std::ops::Range;

/// The tokens of a pass: what they are, and where they stand in the sequence.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    /// Ids, each a row of the embedding table.
    pub ids: Vec<u32>,
    /// Position of the first one; the others follow.
    pub first: usize,
    /// Of each of them.
    pub rotations: Rotations,
}

/// What a device failed with. All it was asked for since has not been done.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {source}")]
pub struct DeviceFailed {
    /// Its name.
    pub device: String,
    /// What it said.
    pub source: Box<dyn Error + Send + Sync>,
}

/// How the tokens of a layer were spread over its experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerRouting {
    /// Tokens that each expert was given; `PICKS` times the tokens in all. None for a layer without a router.
    pub tokens: Vec<u64>,
    /// How often an expert was read: once for each pass in which it had a token.
    pub reads: u64,
}

/// What computes: a device as one session sees it.
pub trait Backend: Debug + Send + Sync + Sized + 'static {
    /// The operations, while the device is entered.
    type Ops<'t>: Ops<Self>;
    /// [`Tokens`] as the operations take them.
    type Tokens: Debug + Default + Send + Sync;
    /// Rows of f32: activations, `[rows, cols]` row-major.
    type Buffer: Debug + Default + Send + Sync;
    /// Rows of activations as matrices of some format take them.
    type Input: Debug + Default + Send + Sync;
    /// Keys and values of a sequence.
    type Cache: Cache;
    /// Where the tokens of a pass go in a mixture of experts.
    type Routes: Debug + Default + Send + Sync;
    /// What the router of a layer counts.
    type Loads: Debug + Default + Send + Sync;
    /// What [`Ops::experts`] works with, kept from layer to layer.
    type ExpertScratch: Debug + Default + Send + Sync;
    /// The likeliest tokens of some rows of logits.
    type Candidates: Debug + Default + Send + Sync;

    /// Makes the tokens of a pass known. Not inside [`Backend::repeat`].
    fn place(&self, tokens: Tokens, placed: &mut Self::Tokens);

    /// The values of `x`: its own, or a copy of them in `copy`.
    /// # Errors
    /// When the device fails.
    fn read<'x>(
        &self,
        x: &'x Self::Buffer,
        copy: &'x mut Buffer,
    ) -> Result<&'x Buffer, DeviceFailed>;

    /// One row of `x`, its own or in `copy`.
    /// # Errors
    /// When the device fails.
    fn read_row<'x>(
        &self,
        x: &'x Self::Buffer,
        row: usize,
        copy: &'x mut Buffer,
    ) -> Result<&'x [f32], DeviceFailed>;

    /// What [`Ops::candidates`] found, row by row; `None` where the host has the logits anyway, and looks for
    /// nothing.
    /// # Errors
    /// When the device fails.
    fn read_candidates(
        &self,
        found: &Self::Candidates,
    ) -> Result<Option<Vec<Candidates>>, DeviceFailed>;

    /// What the router of a layer counted since the last call.
    /// # Errors
    /// When the device fails.
    fn take_loads(&self, loads: &mut Self::Loads) -> Result<LayerRouting, DeviceFailed>;

    /// Enters the device for some operations.
    /// # Errors
    /// The first failure of the device, in these operations or before.
    fn enter<R: Send>(
        &self,
        work: impl FnOnce(&Self::Ops<'_>) -> R + Send,
    ) -> Result<R, DeviceFailed>;

    /// The same for operations that will come again: with the same `key` they are always the same ones,
    /// of the same shapes, on the same weights and buffers, and read nothing back. Only what was placed
    /// differs. A device may keep them and ask for all of them at once the next time. After an error of
    /// `work` the results mean nothing.
    /// # Errors
    /// The first failure of the device, in these operations or before.
    fn repeat<R: Send, E: Send>(
        &self,
        _key: usize,
        work: impl FnOnce(&Self::Ops<'_>) -> Result<R, E> + Send,
    ) -> Result<Result<R, E>, DeviceFailed> {
        self.enter(work)
    }
}

/// The operations of a backend that was entered. They do not fail: a device notes its first failure, does
/// nothing from then on, and [`Backend::enter`] returns it.
///
/// Where an operation is given a shape or rows that do not fit, it panics: models check their weights and
/// their tokens at their border.
pub trait Ops<B: Backend> {
    /// Makes `x` `[rows, cols]`; all of it is to be overwritten.
    fn reshape(&self, rows: usize, cols: usize, x: &mut B::Buffer);

    /// Zeros, `[rows, cols]`.
    fn zeros(&self, rows: usize, cols: usize, x: &mut B::Buffer);

    /// Writes `values`, whole rows, over the rows of `x` from `row` on.
    fn write(&self, values: &[f32], row: usize, x: &mut B::Buffer);

    /// Copies some rows of `from` over those of `to` from `row` on.
    fn copy_rows(&self, from: &B::Buffer, rows: Range<usize>, to: &mut B::Buffer, row: usize);

    /// The values of `x`: its own, or a copy of them in `copy`. Not inside [`Backend::repeat`].
    fn read<'x>(&self, x: &'x B::Buffer, copy: &'x mut Buffer) -> &'x Buffer;

    /// `x[t] = multiplier * table[ids[t]]`
    fn embed(&self, table: &Matrix, tokens: &B::Tokens, multiplier: f32, x: &mut B::Buffer);

    /// `x += branch`, and `y` the norm of each row of the sum.
    fn add_norm(&self, x: &mut B::Buffer, branch: &B::Buffer, norm: &Norm, y: &mut B::Buffer);

    /// The same, with the norm as `w` takes it.
    fn add_norm_input(
        &self,
        x: &mut B::Buffer,
        branch: &B::Buffer,
        norm: &Norm,
        w: &Matrix,
        out: &mut B::Input,
    );

    /// The norm of some rows of `x + branch` as `w` takes them; `x` stays.
    fn sum_norm_input(
        &self,
        x: &B::Buffer,
        branch: &B::Buffer,
        rows: Range<usize>,
        norm: &Norm,
        w: &Matrix,
        out: &mut B::Input,
    );

    /// Rows as `w` takes them.
    fn input(&self, x: &B::Buffer, w: &Matrix, out: &mut B::Input);

    /// `y = x w^T + bias`: `[tokens, cols]` to `[tokens, rows]`.
    fn linear(&self, w: &Linear, x: &B::Input, y: &mut B::Buffer);

    /// Several matrices of one input; their outputs lie side by side.
    fn linears(&self, ws: &[Linear], x: &B::Input, y: &mut B::Buffer);

    /// The gated projections of an MLP as `next` takes them: `[tokens, cols]` to `[tokens, inner]`; `gated` is
    /// to work with.
    fn gated_input(
        &self,
        w: &GateUp,
        x: &B::Input,
        next: &Matrix,
        gated: &mut B::Buffer,
        out: &mut B::Input,
    );

    /// `y = activation(x w^T + bias)`
    fn activated_linear(&self, w: &Linear, activation: Activation, x: &B::Input, y: &mut B::Buffer);

    /// Rotates the queries of each row of `qkv`, stores its key, rotated, and its value in a layer of the cache,
    /// which has room, and gives what the queries find there as `next` takes it: `[tokens, heads * head_dim]`.
    /// `y` is to work with; what becomes of `qkv` is left open.
    #[allow(
        clippy::too_many_arguments,
        reason = "what goes in, what is kept, what comes out"
    )]
    fn attention_input(
        &self,
        qkv: &mut B::Buffer,
        heads: Heads,
        tokens: &B::Tokens,
        cache: &mut B::Cache,
        seen: Seen,
        next: &Matrix,
        y: &mut B::Buffer,
        out: &mut B::Input,
    );

    /// Attention of every token with every token of its sequence. `qkv` holds sequences of `tokens` rows one
    /// after the other; `y` is `[rows, heads * head_dim]`.
    fn full_attention(
        &self,
        qkv: &B::Buffer,
        heads: Heads,
        tokens: usize,
        scale: f32,
        y: &mut B::Buffer,
    );

    /// Picks the experts of each token by its scores, `[tokens, experts]`, and counts them.
    fn route(&self, scores: &B::Buffer, jitter: f32, routes: &mut B::Routes, loads: &mut B::Loads);

    /// The weighted sum of each token's experts: `[tokens, hidden]` to the same.
    fn experts(
        &self,
        experts: &[Expert],
        routes: &B::Routes,
        x: &B::Buffer,
        y: &mut B::Buffer,
        s: &mut B::ExpertScratch,
    );

    /// Divides logits by `divisor`, and makes those of the `unused` ids the lowest float.
    fn finish_logits(&self, divisor: f32, unused: &[Range<usize>], logits: &mut B::Buffer);

    /// The `count` likeliest tokens of each row of logits, for [`Backend::read_candidates`]; `count` is in
    /// `1 ..=` [`MOST`](crate::sampling::MOST), and there are as many logits.
    fn candidates(&self, logits: &B::Buffer, count: usize, found: &mut B::Candidates);
}

/// What the queries of a layer look at, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Layer of the cache.
    pub layer: usize,
    /// Which of its keys.
    pub mask: Mask,
    /// Factor on the scores.
    pub scale: f32,
}

/// Keys and values of a sequence, wherever they are.
pub trait Cache: Debug + Send + Sync {
    /// What it stores.
    fn kind(&self) -> KvType;

    /// Positions that are complete in every layer.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All positions up to `len` are complete in every layer now.
    fn set_len(&mut self, len: usize);

    /// Bytes held.
    fn bytes(&self) -> usize;

    /// Bytes that were given back because no later query sees them.
    fn dropped_bytes(&self) -> usize;

    /// Takes memory for `positions` positions in all.
    /// # Errors
    /// [`KvOutOfMemory`]; what was there stays usable.
    fn reserve(&mut self, positions: usize) -> Result<(), KvOutOfMemory>;

    /// Gives back what no query at position `next` or later sees, if it can.
    fn drop_hidden(&mut self, next: usize);

    /// Forgets the positions from `len` on, or all of them where the next query would see what was dropped.
    fn truncate(&mut self, len: usize);

    /// Gives back what is held for more positions than there are, if it can.
    fn give_back(&mut self);

    /// Changes every stored key in place: `change(position, head)` with `head` of `[head_dim]`.
    /// # Errors
    /// When the device fails.
    fn update_keys(
        &mut self,
        change: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), DeviceFailed>;

    /// Key and value of one position as f32, `[head_dim]` each.
    /// # Errors
    /// When the device fails.
    fn read(
        &self,
        layer: usize,
        head: usize,
        position: usize,
    ) -> Result<(Vec<f32>, Vec<f32>), DeviceFailed>;
}
