//! The operations on the CPU, by tables of kernels and a pool of threads.

mod attention;
mod encoder;
mod experts;
mod linear;

pub use experts::{ExpertScratch, Routes};
pub use linear::gated_rows;

use super::{
    Activation, Backend, Cache, DeviceFailed, Expert, GateUp, Heads, LayerRouting, Norm, Ops, Seen,
    Tokens,
};
use crate::kv_cache::{KvCache, KvOutOfMemory, KvType};
use crate::pool::{Pool, Team};
use crate::sampling::Candidates;
use crate::tensor::{Buffer, Linear, Matrix, MatrixView};
use phidias_kernels::cpu::Kernels;
use phidias_quant::Format;
use phidias_quant::activations::{Activations, TILE};
use std::ops::Range;
use std::sync::Arc;

/// The CPU: a table of kernels and the threads to run them on.
#[derive(Clone, Debug)]
pub struct Cpu {
    kernels: &'static Kernels,
    pool: Arc<Pool>,
}

/// The operations, on a pool that was entered.
pub struct CpuOps<'t> {
    kernels: &'static Kernels,
    team: &'t Team<'t>,
}

/// Rows of activations as matrices of some format take them.
#[derive(Debug, Default)]
pub struct Input {
    cols: usize,
    kind: InputKind,
}

#[derive(Debug)]
enum InputKind {
    /// For matrices stored as floats.
    Floats(Buffer),
    /// For packed ones.
    Quantized(Activations),
}

impl Default for InputKind {
    fn default() -> Self {
        Self::Floats(Buffer::default())
    }
}

impl Input {
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        match &self.kind {
            InputKind::Floats(buffer) => buffer.rows(),
            InputKind::Quantized(quantized) => quantized.rows(),
        }
    }

    /// Bytes of a row of `cols` columns, for matrices in a packed format or stored as floats.
    #[must_use]
    pub fn bytes_per_row(format: Option<Format>, cols: usize) -> usize {
        match format {
            Some(_) => Activations::bytes_per_row(cols),
            None => cols * size_of::<f32>(),
        }
    }

    /// Makes room for `rows` rows as `w` takes them.
    fn reshape(&mut self, w: &Matrix, rows: usize) {
        self.cols = w.cols();
        match (w.view(), &mut self.kind) {
            (MatrixView::Dense(_), InputKind::Floats(buffer)) => buffer.reshape(rows, w.cols()),
            (MatrixView::Packed(packed), InputKind::Quantized(quantized)) => {
                quantized.reshape(rows, w.cols(), packed.layout().format().zero());
            }
            (MatrixView::Dense(_), kind) => {
                *kind = InputKind::Floats(Buffer::default());
                self.reshape(w, rows);
            }
            (MatrixView::Packed(_), kind) => {
                *kind = InputKind::Quantized(Activations::default());
                self.reshape(w, rows);
            }
        }
    }
}

impl Norm {
    fn apply(&self, kernels: &Kernels, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Rms { weight, eps } => kernels.rms_norm(x, weight, *eps, y),
            Self::Layer { weight, bias, eps } => kernels.layer_norm(x, weight, bias, *eps, y),
        }
    }
}

impl Cpu {
    /// A device of these kernels and threads.
    #[must_use]
    pub fn new(kernels: &'static Kernels, pool: Arc<Pool>) -> Self {
        Self { kernels, pool }
    }

    /// Its threads.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Its kernels.
    #[must_use]
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// Enters the pool for some operations.
    pub fn enter<R: Send>(&self, work: impl FnOnce(&CpuOps<'_>) -> R + Send) -> R {
        self.pool.enter(|team| {
            work(&CpuOps {
                kernels: self.kernels,
                team,
            })
        })
    }
}

impl CpuOps<'_> {
    /// `x[t] = multiplier * table[ids[t]]`
    /// # Panics
    /// When an id is not a row of the table: models check ids at their border.
    pub fn embed(&self, table: &Matrix, ids: &[u32], multiplier: f32, x: &mut Buffer) {
        x.reshape(ids.len(), table.cols());
        let parts = ids.iter().zip(x.data_mut().chunks_exact_mut(table.cols()));
        self.team.each_part(parts.collect(), |(&id, x)| {
            table.row(id as usize, x);
            if multiplier != 1.0 {
                x.iter_mut().for_each(|x| *x *= multiplier);
            }
        });
    }

    /// `x += branch`, and `y` the norm of each row of the sum: the sum is read while it is in the cache.
    /// # Panics
    /// When the shapes differ.
    pub fn add_norm(&self, x: &mut Buffer, branch: &Buffer, norm: &Norm, y: &mut Buffer) {
        let kernels = self.kernels;
        let cols = x.cols();
        assert_same_shape(x, branch);
        y.reshape(x.rows(), cols);
        let parts = (x.data_mut().chunks_exact_mut(cols))
            .zip(branch.data().chunks_exact(cols))
            .zip(y.data_mut().chunks_exact_mut(cols));
        self.team.each_part(parts.collect(), |((x, branch), y)| {
            add(x, branch);
            norm.apply(kernels, x, y);
        });
    }

    /// The same, with the norm as `w` takes it: a normalised row never leaves the first cache.
    /// # Panics
    /// When the shapes differ.
    pub fn add_norm_input(
        &self,
        x: &mut Buffer,
        branch: &Buffer,
        norm: &Norm,
        w: &Matrix,
        out: &mut Input,
    ) {
        let kernels = self.kernels;
        assert_columns(x.cols(), w);
        out.reshape(w, x.rows());
        match &mut out.kind {
            InputKind::Floats(y) => self.add_norm(x, branch, norm, y),
            InputKind::Quantized(quantized) => {
                let cols = x.cols();
                assert_same_shape(x, branch);
                let parts = (quantized.tiles_mut())
                    .zip(x.data_mut().chunks_mut(TILE * cols))
                    .zip(branch.data().chunks(TILE * cols));
                self.team
                    .each_part(parts.collect(), |((mut tile, x), branch)| {
                        let mut row = vec![0.0; cols];
                        let rows = x.chunks_exact_mut(cols).zip(branch.chunks_exact(cols));
                        for (r, (x, branch)) in rows.enumerate() {
                            add(x, branch);
                            norm.apply(kernels, x, &mut row);
                            kernels.quantize(&row, &mut tile, r);
                        }
                    });
            }
        }
    }

    /// The norm of some rows of `x + branch` as `w` takes them; `x` stays.
    /// # Panics
    /// When the shapes differ, or there are no such rows.
    pub fn sum_norm_input(
        &self,
        x: &Buffer,
        branch: &Buffer,
        rows: Range<usize>,
        norm: &Norm,
        w: &Matrix,
        out: &mut Input,
    ) {
        let (kernels, cols) = (self.kernels, x.cols());
        assert_same_shape(x, branch);
        assert_columns(cols, w);
        out.reshape(w, rows.len());
        let [x, branch] = [x, branch].map(|x| &x.data()[rows.start * cols..rows.end * cols]);
        let norm_of = |x: &[f32], branch: &[f32], y: &mut [f32]| {
            let mut sum = x.to_vec();
            add(&mut sum, branch);
            norm.apply(kernels, &sum, y);
        };
        match &mut out.kind {
            InputKind::Floats(y) => {
                let parts = (x.chunks_exact(cols))
                    .zip(branch.chunks_exact(cols))
                    .zip(y.data_mut().chunks_exact_mut(cols));
                (self.team).each_part(parts.collect(), |((x, branch), y)| norm_of(x, branch, y));
            }
            InputKind::Quantized(quantized) => {
                let parts = (quantized.tiles_mut())
                    .zip(x.chunks(TILE * cols))
                    .zip(branch.chunks(TILE * cols));
                self.team
                    .each_part(parts.collect(), |((mut tile, x), branch)| {
                        let mut row = vec![0.0; cols];
                        let rows = x.chunks_exact(cols).zip(branch.chunks_exact(cols));
                        for (r, (x, branch)) in rows.enumerate() {
                            norm_of(x, branch, &mut row);
                            kernels.quantize(&row, &mut tile, r);
                        }
                    });
            }
        }
    }

    /// Rows as `w` takes them.
    /// # Panics
    /// When `x` has not as many columns as `w`.
    pub fn input(&self, x: &Buffer, w: &Matrix, out: &mut Input) {
        let kernels = self.kernels;
        assert_columns(x.cols(), w);
        out.reshape(w, x.rows());
        match &mut out.kind {
            InputKind::Floats(buffer) => buffer.data_mut().copy_from_slice(x.data()),
            InputKind::Quantized(quantized) => {
                let parts = quantized.tiles_mut().zip(x.data().chunks(TILE * x.cols()));
                self.team.each_part(parts.collect(), |(mut tile, x_rows)| {
                    for (r, x) in x_rows.chunks_exact(x.cols()).enumerate() {
                        kernels.quantize(x, &mut tile, r);
                    }
                });
            }
        }
    }
}

impl Backend for Cpu {
    type Ops<'t> = CpuOps<'t>;
    type Tokens = Tokens;
    type Buffer = Buffer;
    type Input = Input;
    type Cache = KvCache;
    type Routes = Routes;
    type Loads = LayerRouting;
    type ExpertScratch = ExpertScratch;
    type Candidates = ();

    fn place(&self, tokens: Tokens, placed: &mut Tokens) {
        *placed = tokens;
    }

    fn read<'x>(&self, x: &'x Buffer, _: &'x mut Buffer) -> Result<&'x Buffer, DeviceFailed> {
        Ok(x)
    }

    fn read_row<'x>(
        &self,
        x: &'x Buffer,
        row: usize,
        _: &'x mut Buffer,
    ) -> Result<&'x [f32], DeviceFailed> {
        Ok(x.row(row))
    }

    fn read_candidates(&self, (): &()) -> Result<Option<Vec<Candidates>>, DeviceFailed> {
        Ok(None)
    }

    fn take_loads(&self, loads: &mut LayerRouting) -> Result<LayerRouting, DeviceFailed> {
        let none = LayerRouting {
            tokens: vec![0; loads.tokens.len()],
            reads: 0,
        };
        Ok(std::mem::replace(loads, none))
    }

    fn enter<R: Send>(
        &self,
        work: impl FnOnce(&CpuOps<'_>) -> R + Send,
    ) -> Result<R, DeviceFailed> {
        Ok(Self::enter(self, work))
    }
}

impl Ops<Cpu> for CpuOps<'_> {
    fn reshape(&self, rows: usize, cols: usize, x: &mut Buffer) {
        x.reshape(rows, cols);
    }

    fn zeros(&self, rows: usize, cols: usize, x: &mut Buffer) {
        x.reshape(rows, cols);
        x.data_mut().fill(0.0);
    }

    fn write(&self, values: &[f32], row: usize, x: &mut Buffer) {
        let first = row * x.cols();
        x.data_mut()[first..first + values.len()].copy_from_slice(values);
    }

    fn copy_rows(&self, from: &Buffer, rows: Range<usize>, to: &mut Buffer, row: usize) {
        let cols = from.cols();
        self.write(&from.data()[rows.start * cols..rows.end * cols], row, to);
    }

    fn read<'x>(&self, x: &'x Buffer, _: &'x mut Buffer) -> &'x Buffer {
        x
    }

    fn embed(&self, table: &Matrix, tokens: &Tokens, multiplier: f32, x: &mut Buffer) {
        self.embed(table, &tokens.ids, multiplier, x);
    }

    fn add_norm(&self, x: &mut Buffer, branch: &Buffer, norm: &Norm, y: &mut Buffer) {
        self.add_norm(x, branch, norm, y);
    }

    fn add_norm_input(
        &self,
        x: &mut Buffer,
        branch: &Buffer,
        norm: &Norm,
        w: &Matrix,
        out: &mut Input,
    ) {
        self.add_norm_input(x, branch, norm, w, out);
    }

    fn sum_norm_input(
        &self,
        x: &Buffer,
        branch: &Buffer,
        rows: Range<usize>,
        norm: &Norm,
        w: &Matrix,
        out: &mut Input,
    ) {
        self.sum_norm_input(x, branch, rows, norm, w, out);
    }

    fn input(&self, x: &Buffer, w: &Matrix, out: &mut Input) {
        self.input(x, w, out);
    }

    fn linear(&self, w: &Linear, x: &Input, y: &mut Buffer) {
        self.linear(w, x, y);
    }

    fn linears(&self, ws: &[Linear], x: &Input, y: &mut Buffer) {
        self.linears(ws, x, y);
    }

    fn gated_input(
        &self,
        w: &GateUp,
        x: &Input,
        next: &Matrix,
        gated: &mut Buffer,
        out: &mut Input,
    ) {
        self.gated_input(w, x, next, gated, out);
    }

    fn activated_linear(&self, w: &Linear, activation: Activation, x: &Input, y: &mut Buffer) {
        self.activated_linear(w, activation, x, y);
    }

    fn attention_input(
        &self,
        qkv: &mut Buffer,
        heads: Heads,
        tokens: &Tokens,
        cache: &mut KvCache,
        seen: Seen,
        next: &Matrix,
        y: &mut Buffer,
        out: &mut Input,
    ) {
        self.attention_input(qkv, heads, tokens, cache, seen, next, y, out);
    }

    fn full_attention(
        &self,
        qkv: &Buffer,
        heads: Heads,
        tokens: usize,
        scale: f32,
        y: &mut Buffer,
    ) {
        self.full_attention(qkv, heads, tokens, scale, y);
    }

    fn route(&self, scores: &Buffer, jitter: f32, routes: &mut Routes, loads: &mut LayerRouting) {
        self.route(scores, jitter, routes);
        loads.tokens.resize(scores.cols(), 0);
        for (expert, tokens) in routes.loads() {
            loads.tokens[expert] += tokens as u64;
            loads.reads += 1;
        }
    }

    fn experts(
        &self,
        experts: &[Expert],
        routes: &Routes,
        x: &Buffer,
        y: &mut Buffer,
        s: &mut ExpertScratch,
    ) {
        self.experts(experts, routes, x, y, s);
    }

    fn finish_logits(&self, divisor: f32, unused: &[Range<usize>], logits: &mut Buffer) {
        for t in 0..logits.rows() {
            let logits = logits.row_mut(t);
            if divisor != 1.0 {
                logits.iter_mut().for_each(|v| *v /= divisor);
            }
            for ids in unused {
                logits[ids.clone()].fill(f32::MIN);
            }
        }
    }

    fn candidates(&self, _: &Buffer, _: usize, (): &mut ()) {}
}

impl Cache for KvCache {
    fn kind(&self) -> KvType {
        self.kind()
    }
    fn len(&self) -> usize {
        self.len()
    }
    fn set_len(&mut self, len: usize) {
        self.set_len(len);
    }
    fn bytes(&self) -> usize {
        self.bytes()
    }
    fn dropped_bytes(&self) -> usize {
        self.dropped_bytes()
    }
    fn reserve(&mut self, positions: usize) -> Result<(), KvOutOfMemory> {
        self.reserve(positions)
    }
    fn drop_hidden(&mut self, next: usize) {
        self.drop_hidden(next);
    }
    fn truncate(&mut self, len: usize) {
        self.truncate(len);
    }
    fn give_back(&mut self) {
        self.give_back();
    }
    fn update_keys(
        &mut self,
        change: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), DeviceFailed> {
        Self::update_keys(self, change);
        Ok(())
    }
    fn read(
        &self,
        layer: usize,
        head: usize,
        position: usize,
    ) -> Result<(Vec<f32>, Vec<f32>), DeviceFailed> {
        Ok(self.read(layer, head, position))
    }
}

/// `x += y`
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn assert_same_shape(x: &Buffer, y: &Buffer) {
    assert_eq!(
        (x.rows(), x.cols()),
        (y.rows(), y.cols()),
        "shapes of a sum"
    );
}

fn assert_columns(cols: usize, w: &Matrix) {
    assert_eq!(
        cols,
        w.cols(),
        "columns of the activations and of the weights"
    );
}

#[cfg(test)]
mod tests {
    use crate::bytes::Bytes;
    use crate::huge::OwnedBytes;
    use crate::tensor::{Buffer, DType, Linear, Matrix, Tensor};
    use phidias_quant::Format;
    use phidias_quant::packed::{PANEL_ROWS, PackedLayout, pack_panel};

    fn value(i: usize, seed: usize) -> f32 {
        ((i * 37 + seed * 101) % 997) as f32 / 500.0 - 1.0
    }

    /// Rows that look random.
    pub(super) fn buffer(rows: usize, cols: usize, seed: usize) -> Buffer {
        let mut buffer = Buffer::default();
        buffer.reshape(rows, cols);
        (buffer.data_mut().iter_mut().enumerate()).for_each(|(i, v)| *v = value(i, seed));
        buffer
    }

    fn linear(dtype: DType, rows: usize, cols: usize, bytes: OwnedBytes) -> Linear {
        let tensor = Tensor::new(dtype, vec![rows, cols], Bytes::from(bytes));
        Linear {
            weight: Matrix::new(&tensor).unwrap(),
            bias: None,
        }
    }

    /// A matrix of f32 that looks random.
    pub(super) fn matrix(rows: usize, cols: usize, seed: usize) -> Linear {
        let mut bytes = OwnedBytes::zeroed(rows * cols * 4).unwrap();
        for (i, chunk) in bytes.chunks_exact_mut(4).enumerate() {
            chunk.copy_from_slice(&value(i, seed).to_le_bytes());
        }
        linear(DType::F32, rows, cols, bytes)
    }

    /// The same in q4.
    pub(super) fn packed(rows: usize, cols: usize, seed: usize) -> Linear {
        let layout = PackedLayout::new(Format::Q4, rows, cols).unwrap();
        let mut bytes = OwnedBytes::zeroed(layout.bytes()).unwrap();
        let values: Vec<f32> = (0..rows * cols).map(|i| value(i, seed)).collect();
        (values.chunks(PANEL_ROWS * cols))
            .zip(bytes.chunks_exact_mut(layout.panel_bytes()))
            .for_each(|(rows, out)| pack_panel(&layout, rows, out).unwrap());
        linear(DType::Packed(Format::Q4), rows, cols, bytes)
    }
}
