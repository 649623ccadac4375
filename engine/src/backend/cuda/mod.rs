//! The operations on one GPU, or on the host device that stands in for one.
//!
//! ```text
//! Resident   weights, norms, the head's unused ids: copied once for a model, shared by its sessions
//! Cuda       a session: its cache, its buffers, the passes it has recorded
//! a pass     tokens, position and rotations go to the device in one copy; everything else is there. What
//!            comes back in another are the likeliest tokens, or logits where those do not suffice
//! ```
//!
//! Operations return before they are done: they are in one queue, and reading results waits for it. A
//! failure is noted, and [`Backend::enter`] returns it.
//!
//! # Recorded passes
//!
//! Decoding asks for the same few hundred launches for every token, and on a GPU asking takes longer than
//! doing. So [`Backend::repeat`] launches them one by one the first time, which also takes the memory that
//! is needed; records them the second time; and from then on launches the recording as a whole. The model
//! is still gone through, so that shapes are what they always are; its operations only do not launch
//! anything. A recording holds addresses: when a buffer of the session is moved because it grows, all
//! recordings are forgotten. They take memory of the device, which is planned: at most `RECORDINGS` are kept, and
//! the one that was done longest ago makes room.

mod buffers;
mod cache;
mod peaks;
mod weights;

pub use buffers::{
    DeviceCandidates, DeviceExperts, DeviceInput, DeviceLoads, DeviceRoutes, DeviceTokens, ROOM,
    Rows,
};
pub use cache::{DeviceCache, KvTypeRefused};
pub use weights::{Part, Resident, Width, matrix_bytes, places_bytes};

use super::{
    Activation, Backend, DeviceFailed, Expert, GateUp, Heads, LayerRouting, Norm, Ops, Seen, Tokens,
};
use crate::sampling::{Candidates, MOST};
use crate::tensor::{Buffer, Linear, Matrix};
use buffers::Room;
use phidias_kernels::cuda::attention::{self, Arithmetic};
use phidias_kernels::cuda::elementwise::Output;
use phidias_kernels::cuda::{Device, DeviceError, Recording, elementwise, experts, linear, sample};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use weights::failed;

/// Tokens of a pass that are spread over the whole device by ranges of the cache: decoding, alone or with
/// guesses.
const FEW_TOKENS: usize = 8;

/// Recordings of a session at most: a step and those with up to seven guesses, each in one way.
const RECORDINGS: usize = 8;

/// A device as one session sees it.
pub struct Cuda {
    resident: Arc<Resident>,
    /// Partial results of attention over a long cache.
    partials: attention::Scratch,
    /// In what attention without a cache computes.
    arithmetic: Arithmetic,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What failed outside of any pass.
    error: Option<DeviceError>,
    passes: HashMap<usize, Pass>,
    /// How many recorded passes were done.
    done: u64,
    /// Both projections of an MLP where they cannot be gated at once.
    both: Rows,
}

/// A pass that comes again.
enum Pass {
    /// It was done once, and its buffers are there.
    Known,
    /// What it launches.
    Recorded(Recorded),
}

struct Recorded {
    recording: Box<dyn Recording>,
    /// Operations that it stands for.
    count: usize,
    /// Its turn among the recorded passes that were done.
    last: u64,
}

impl State {
    /// The next turn of a recorded pass.
    fn turn(&mut self) -> u64 {
        self.done += 1;
        self.done
    }

    /// Makes room for one recording more. What gave room is recorded again when it comes again: its buffers are there.
    fn make_room(&mut self) {
        let recorded = self.passes.values_mut().filter_map(|pass| match pass {
            Pass::Known => None,
            Pass::Recorded(recorded) => Some((recorded.last, pass)),
        });
        let mut recorded: Vec<_> = recorded.collect();
        recorded.sort_by_key(|(last, _)| std::cmp::Reverse(*last));
        for (_, pass) in recorded.into_iter().skip(RECORDINGS - 1) {
            *pass = Pass::Known;
        }
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.device())
    }
}

impl Cuda {
    /// For sequences of up to `context` tokens of a model that has such heads. With `exact`, attention
    /// without a cache is f32 throughout.
    /// # Errors
    /// When there is no memory for the partial results of attention.
    pub fn new(
        resident: Arc<Resident>,
        heads: Heads,
        context: usize,
        exact: bool,
    ) -> Result<Self, DeviceFailed> {
        let device = resident.device();
        let partials = attention::Scratch::new(device, heads, context, FEW_TOKENS);
        Ok(Self {
            partials: partials.map_err(|error| failed(&**device, error))?,
            arithmetic: match exact {
                true => Arithmetic::F32,
                false => Arithmetic::F16,
            },
            state: Mutex::default(),
            resident,
        })
    }

    /// Bytes that [`Cuda::new`] takes.
    #[must_use]
    pub fn bytes(heads: Heads, context: usize) -> usize {
        attention::Scratch::bytes(heads, context, FEW_TOKENS)
    }

    /// Bytes of what a pass of `tokens` tokens leaves on the device beside its activations: the tokens, and
    /// the candidates of `rows` rows of logits.
    #[must_use]
    pub fn pass_bytes(heads: Heads, tokens: usize, rows: usize) -> usize {
        DeviceTokens::bytes(tokens, heads.head_dim / 2) + DeviceCandidates::bytes(rows, MOST)
    }

    /// Bytes of the recordings that a session keeps, of passes of up to so many steps: launches, copies, zeroings.
    #[must_use]
    pub fn recordings_bytes(device: &dyn Device, steps: usize) -> usize {
        RECORDINGS * device.recording_bytes(steps)
    }

    /// What of `heads` the kernels cannot take, and what they expect.
    /// # Errors
    /// The message.
    pub fn check(heads: Heads) -> Result<(), String> {
        let (d, most) = (heads.head_dim, attention::HEAD_DIM);
        match d.is_multiple_of(8) && (8..=most).contains(&d) {
            true => Ok(()),
            false => Err(format!(
                "heads of {d} elements; on a GPU they have a multiple of 8, at most {most}"
            )),
        }
    }

    fn device(&self) -> &Arc<dyn Device> {
        self.resident.device()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: DeviceError) -> DeviceFailed {
        failed(&**self.device(), error)
    }

    /// Goes through some operations, which launch or do not.
    fn run<R>(
        &self,
        state: &mut State,
        launches: bool,
        work: impl FnOnce(&CudaOps<'_>) -> R,
    ) -> Result<(R, Done), DeviceError> {
        let ops = CudaOps {
            cuda: self,
            launches,
            error: RefCell::new(state.error.take()),
            count: Cell::new(0),
            moved: Cell::new(false),
            both: RefCell::new(&mut state.both),
        };
        let result = work(&ops);
        let done = Done {
            count: ops.count.get(),
            moved: ops.moved.get(),
        };
        match ops.error.into_inner() {
            Some(error) => Err(error),
            None => Ok((result, done)),
        }
    }

    /// The same, and forgets the recordings when a buffer was moved.
    fn launch<R>(
        &self,
        state: &mut State,
        work: impl FnOnce(&CudaOps<'_>) -> R,
    ) -> Result<R, DeviceError> {
        let result = self.run(state, true, work);
        match &result {
            Ok((_, done)) if !done.moved => {}
            // A failure may have come when memory had already been given back.
            _ => state.passes.clear(),
        }
        result.map(|(result, _)| result)
    }
}

/// What operations did.
struct Done {
    /// Those that launch something.
    count: usize,
    /// Whether a buffer was moved.
    moved: bool,
}

impl Backend for Cuda {
    type Ops<'t> = CudaOps<'t>;
    type Tokens = DeviceTokens;
    type Buffer = Rows;
    type Input = DeviceInput;
    type Cache = DeviceCache;
    type Routes = DeviceRoutes;
    type Loads = DeviceLoads;
    type ExpertScratch = DeviceExperts;
    type Candidates = DeviceCandidates;

    fn place(&self, tokens: Tokens, placed: &mut DeviceTokens) {
        let mut state = self.state();
        match placed.place(self.device(), &tokens) {
            Ok(false) => {}
            Ok(true) => state.passes.clear(),
            Err(error) => state.error = Some(error),
        }
    }

    fn read<'x>(&self, x: &'x Rows, copy: &'x mut Buffer) -> Result<&'x Buffer, DeviceFailed> {
        copy.reshape(x.rows(), x.cols());
        (x.span().download(copy.data_mut())).map_err(|error| self.failed(error))?;
        Ok(copy)
    }

    fn read_row<'x>(
        &self,
        x: &'x Rows,
        row: usize,
        copy: &'x mut Buffer,
    ) -> Result<&'x [f32], DeviceFailed> {
        copy.reshape(1, x.cols());
        (x.slice(row..row + 1).download(copy.data_mut())).map_err(|error| self.failed(error))?;
        Ok(copy.data())
    }

    fn read_candidates(
        &self,
        found: &DeviceCandidates,
    ) -> Result<Option<Vec<Candidates>>, DeviceFailed> {
        found.read().map(Some).map_err(|error| self.failed(error))
    }

    fn take_loads(&self, loads: &mut DeviceLoads) -> Result<LayerRouting, DeviceFailed> {
        let counts = loads.take().map_err(|error| self.failed(error))?;
        let mut tokens = counts.unwrap_or_default();
        let reads = tokens.pop().unwrap_or_default();
        Ok(LayerRouting { tokens, reads })
    }

    fn enter<R: Send>(
        &self,
        work: impl FnOnce(&CudaOps<'_>) -> R + Send,
    ) -> Result<R, DeviceFailed> {
        (self.launch(&mut self.state(), work)).map_err(|error| self.failed(error))
    }

    fn repeat<R: Send, E: Send>(
        &self,
        key: usize,
        work: impl FnOnce(&CudaOps<'_>) -> Result<R, E> + Send,
    ) -> Result<Result<R, E>, DeviceFailed> {
        let state = &mut *self.state();
        let result = match state.passes.remove(&key) {
            None => {
                let result = self.launch(state, work);
                if let Ok(Ok(_)) = result {
                    state.passes.insert(key, Pass::Known);
                }
                result
            }
            Some(Pass::Known) => self.record(state, key, work),
            Some(Pass::Recorded(mut recorded)) => {
                let result = self.run(state, false, work);
                result.and_then(|(result, done)| {
                    if result.is_ok() {
                        let count = recorded.count;
                        assert_eq!(done.count, count, "operations of a pass that was recorded");
                        recorded.recording.replay()?;
                        recorded.last = state.turn();
                    }
                    state.passes.insert(key, Pass::Recorded(recorded));
                    Ok(result)
                })
            }
        };
        result.map_err(|error| self.failed(error))
    }
}

impl Cuda {
    /// Records a pass whose buffers are there, and does it.
    fn record<R, E>(
        &self,
        state: &mut State,
        key: usize,
        work: impl FnOnce(&CudaOps<'_>) -> Result<R, E>,
    ) -> Result<Result<R, E>, DeviceError> {
        state.make_room();
        let (mut work, mut result) = (Some(work), None);
        let recording = self.device().record(&mut || {
            let work = work.take().expect("one call");
            result = Some(self.run(state, true, work)?);
            Ok(())
        })?;
        let (result, done) = result.expect("work that was called");
        if result.is_ok() {
            recording.replay()?;
            let recorded = Recorded {
                recording,
                count: done.count,
                last: state.turn(),
            };
            state.passes.insert(key, Pass::Recorded(recorded));
        }
        Ok(result)
    }
}

/// The operations of a session's device.
pub struct CudaOps<'c> {
    cuda: &'c Cuda,
    /// Whether they launch anything: not when a recording does.
    launches: bool,
    error: RefCell<Option<DeviceError>>,
    count: Cell<usize>,
    moved: Cell<bool>,
    both: RefCell<&'c mut Rows>,
}

impl CudaOps<'_> {
    /// Does something on the device, if nothing has failed before.
    fn run(&self, work: impl FnOnce(&dyn Device, &Resident) -> Result<(), DeviceError>) {
        self.count.set(self.count.get() + 1);
        let mut error = self.error.borrow_mut();
        if self.launches && error.is_none() {
            let resident = &*self.cuda.resident;
            *error = work(&**resident.device(), resident).err();
        }
    }

    fn reserve(&self, room: &mut Room, bytes: usize) {
        self.take(|device| room.reserve(device, bytes));
    }

    /// Takes memory, if nothing has failed before; `room` says whether any was moved.
    fn take(&self, room: impl FnOnce(&Arc<dyn Device>) -> Result<bool, DeviceError>) {
        let mut error = self.error.borrow_mut();
        if error.is_none() {
            match room(self.cuda.device()) {
                Ok(moved) => self.moved.set(self.moved.get() || moved),
                Err(failed) => *error = Some(failed),
            }
        }
    }

    /// Rotation, storing and attention of a few tokens; `y` says where results go.
    fn attend<'y>(
        &self,
        qkv: &Rows,
        heads: Heads,
        tokens: &DeviceTokens,
        cache: &DeviceCache,
        seen: Seen,
        y: impl FnOnce() -> Output<'y>,
    ) {
        self.run(|device, _| {
            attention::rope_store_attention(
                device,
                qkv.span(),
                heads,
                tokens.rotations(),
                cache.layer(seen.layer),
                seen.mask,
                seen.scale,
                tokens.first(),
                &self.cuda.partials,
                y(),
            )
        });
    }

    /// Shapes an input as a matrix takes it.
    fn shape(&self, out: &mut DeviceInput, w: &Matrix, rows: usize) {
        let layout = self.cuda.resident.layout(w);
        out.reshape(self, layout.elements().form(), rows, layout.cols());
    }
}

impl Ops<Cuda> for CudaOps<'_> {
    fn reshape(&self, rows: usize, cols: usize, x: &mut Rows) {
        x.reshape(self, rows, cols);
    }

    fn zeros(&self, rows: usize, cols: usize, x: &mut Rows) {
        x.reshape(self, rows, cols);
        self.run(|_, _| x.span().zero());
    }

    fn write(&self, values: &[f32], row: usize, x: &mut Rows) {
        let rows = row..row + values.len() / x.cols();
        self.run(|_, _| x.slice(rows).upload(values));
    }

    fn copy_rows(&self, from: &Rows, rows: Range<usize>, to: &mut Rows, row: usize) {
        let place = row..row + rows.len();
        self.run(|_, _| from.slice(rows).copy_to(to.slice(place)));
    }

    fn read<'x>(&self, x: &'x Rows, copy: &'x mut Buffer) -> &'x Buffer {
        copy.reshape(x.rows(), x.cols());
        self.run(|_, _| x.span().download(copy.data_mut()));
        copy
    }

    fn embed(&self, table: &Matrix, tokens: &DeviceTokens, multiplier: f32, x: &mut Rows) {
        x.reshape(self, tokens.count(), table.cols());
        self.run(|device, resident| {
            let table = resident.matrix(table);
            elementwise::embed(device, &table, tokens.ids(), multiplier, x.span())
        });
    }

    fn add_norm(&self, x: &mut Rows, branch: &Rows, norm: &Norm, y: &mut Rows) {
        y.reshape(self, x.rows(), x.cols());
        self.run(|device, resident| {
            let norm = resident.norm(norm);
            elementwise::add_norm(device, x.span(), Some(branch.span()), norm, y.span())
        });
    }

    fn add_norm_input(
        &self,
        x: &mut Rows,
        branch: &Rows,
        norm: &Norm,
        w: &Matrix,
        out: &mut DeviceInput,
    ) {
        self.shape(out, w, x.rows());
        self.run(|device, resident| {
            let (norm, branch) = (resident.norm(norm), Some(branch.span()));
            elementwise::add_norm(device, x.span(), branch, norm, out.activations())
        });
    }

    fn sum_norm_input(
        &self,
        x: &Rows,
        branch: &Rows,
        rows: Range<usize>,
        norm: &Norm,
        w: &Matrix,
        out: &mut DeviceInput,
    ) {
        self.shape(out, w, rows.len());
        self.run(|device, resident| {
            let [x, branch] = [x, branch].map(|x| x.slice(rows.clone()));
            let norm = resident.norm(norm);
            elementwise::sum_norm(device, x, branch, norm, out.activations())
        });
    }

    fn input(&self, x: &Rows, w: &Matrix, out: &mut DeviceInput) {
        self.shape(out, w, x.rows());
        self.run(|device, _| elementwise::input(device, x.span(), x.cols(), out.activations()));
    }

    fn linear(&self, w: &Linear, x: &DeviceInput, y: &mut Rows) {
        self.linears(std::slice::from_ref(w), x, y);
    }

    fn linears(&self, ws: &[Linear], x: &DeviceInput, y: &mut Rows) {
        y.reshape(self, x.rows(), ws.iter().map(|w| w.weight.rows()).sum());
        self.run(|device, resident| {
            let ws: Vec<_> = ws.iter().map(|w| resident.linear(w)).collect();
            linear::linear(device, &ws, x.activations(), x.rows(), y.span())
        });
    }

    fn gated_input(
        &self,
        w: &GateUp,
        x: &DeviceInput,
        next: &Matrix,
        gated: &mut Rows,
        out: &mut DeviceInput,
    ) {
        let (rows, inner) = (x.rows(), w.inner());
        match (w, self.cuda.resident.gated(w)) {
            (_, Some(w)) if w.gives_inputs(rows) => {
                self.shape(out, next, rows);
                self.run(|device, _| {
                    linear::gated_linear(device, &w, x.activations(), rows, out.activations())
                });
                return;
            }
            (_, Some(w)) => {
                gated.reshape(self, rows, inner);
                self.run(|device, _| {
                    linear::gated_linear(device, &w, x.activations(), rows, gated.span())
                });
            }
            (GateUp::Stacked(w), None) => {
                // The rows of `up` do not begin with a panel: both at once, then the gate.
                gated.reshape(self, rows, inner);
                let both = &mut **self.both.borrow_mut();
                self.linear(w, x, both);
                self.run(|device, _| {
                    elementwise::silu_mul(device, both.span(), inner, gated.span())
                });
            }
            (_, None) => unreachable!("only stacked ones cannot be gated at once"),
        }
        self.input(gated, next, out);
    }

    fn activated_linear(&self, w: &Linear, activation: Activation, x: &DeviceInput, y: &mut Rows) {
        self.linear(w, x, y);
        let activation = match activation {
            Activation::QuickGelu => elementwise::Activation::QuickGelu,
            Activation::Gelu => elementwise::Activation::Gelu,
        };
        self.run(|device, _| {
            elementwise::activate(device, activation, y.span(), y.cols(), y.span())
        });
    }

    fn attention_input(
        &self,
        qkv: &mut Rows,
        heads: Heads,
        tokens: &DeviceTokens,
        cache: &mut DeviceCache,
        seen: Seen,
        next: &Matrix,
        y: &mut Rows,
        out: &mut DeviceInput,
    ) {
        let (qkv, cache, partials) = (&*qkv, &*cache, &self.cuda.partials);
        let (few, inputs) = (partials.takes(qkv.rows()), partials.gives_inputs());
        if few && inputs {
            self.shape(out, next, qkv.rows());
            return self.attend(qkv, heads, tokens, cache, seen, || {
                Output::Input(out.activations())
            });
        }
        y.reshape(self, qkv.rows(), heads.queries());
        if few {
            self.attend(qkv, heads, tokens, cache, seen, || Output::Rows(y.span()));
        } else {
            let (layer, first) = (|| cache.layer(seen.layer), || tokens.first());
            self.run(|device, _| {
                let rotations = tokens.rotations();
                attention::rope_and_store(device, qkv.span(), heads, rotations, layer(), first())
            });
            self.run(|device, _| {
                let (qkv, Seen { mask, scale, .. }) = (qkv.span(), seen);
                attention::attention(device, qkv, heads, layer(), mask, scale, first(), y.span())
            });
        }
        self.input(y, next, out);
    }

    fn full_attention(&self, qkv: &Rows, heads: Heads, tokens: usize, scale: f32, y: &mut Rows) {
        y.reshape(self, qkv.rows(), heads.queries());
        self.run(|device, _| {
            let arithmetic = self.cuda.arithmetic;
            attention::full_attention(
                device,
                qkv.span(),
                heads,
                tokens,
                scale,
                arithmetic,
                y.span(),
            )
        });
    }

    fn route(
        &self,
        scores: &Rows,
        jitter: f32,
        routes: &mut DeviceRoutes,
        loads: &mut DeviceLoads,
    ) {
        routes.reshape(self, scores.rows(), scores.cols());
        loads.reserve(self, scores.cols());
        self.run(|device, _| {
            let (scores, routes) = (scores.span(), routes.routes());
            experts::route(device, scores, jitter, &routes, loads.span())
        });
    }

    fn experts(
        &self,
        experts: &[Expert],
        routes: &DeviceRoutes,
        x: &Rows,
        y: &mut Rows,
        s: &mut DeviceExperts,
    ) {
        let Some(first) = experts.first() else {
            unreachable!("a mixture of no experts")
        };
        let (gate_up, down) = (&first.gate_up, &first.down_proj.weight);
        let places = x.rows() * super::PICKS;
        s.outputs.reshape(self, places, down.rows());
        y.reshape(self, x.rows(), down.rows());
        self.input(x, gate_up.matrix(), &mut s.input);
        let gated = (self.cuda.resident.gated(gate_up)).expect("experts that can be gated at once");
        let (x, of) = (s.input.activations(), routes.routes());
        if gated.gives_experts_inputs(&of) {
            self.shape(&mut s.next, down, places);
            self.run(|device, _| {
                linear::gated_experts(device, &gated, x, &of, s.next.activations())
            });
        } else {
            s.gated.reshape(self, places, gate_up.inner());
            self.run(|device, _| linear::gated_experts(device, &gated, x, &of, s.gated.span()));
            self.input(&s.gated, down, &mut s.next);
        }
        self.run(|device, resident| {
            let (w, x) = (resident.matrix(down), s.next.activations());
            linear::linear_experts(device, &w, x, &routes.routes(), s.outputs.span())?;
            let (outputs, cols) = (s.outputs.span(), y.cols());
            experts::sum_picks(device, outputs, &routes.routes(), cols, y.span())
        });
    }

    fn finish_logits(&self, divisor: f32, unused: &[Range<usize>], logits: &mut Rows) {
        if divisor == 1.0 && unused.is_empty() {
            return;
        }
        self.run(|device, resident| {
            let (vocab, ids) = (logits.cols(), resident.ids(unused));
            elementwise::finish_logits(device, logits.span(), vocab, divisor, ids)
        });
    }

    fn candidates(&self, logits: &Rows, count: usize, found: &mut DeviceCandidates) {
        found.reshape(self, logits, count);
        self.run(|device, _| {
            sample::candidates(device, logits.span(), logits.cols(), count, found.span())
        });
    }
}
