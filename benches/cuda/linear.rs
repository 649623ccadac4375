//! The matrix products, of every format. Up to 16 tokens the weights are the cost; more are arithmetic.

use crate::shapes::Shapes;
use crate::timing::{Bench, Case, Cost, Random, Work, assert_near, checked, scalar};
use phidias::engine::kernels::cuda::linear::{
    Elements, Gated, Layout, Weights, gated_linear, linear,
};
use phidias::engine::kernels::cuda::{Activations, Device, DeviceError, Memory, Span, elementwise};
use phidias::engine::kernels::view::{self, ColsMut, Dense};
use phidias::engine::quant::activations::{Activations as Tiles, quantize};
use phidias::engine::quant::packed::{PANEL_ROWS, pack_panel};
use phidias::engine::quant::{AlignedBytes, Format, Packed, PackedLayout, bf16};
use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::Arc;

/// Tokens up to which reading the weights takes longest: tensor cores do 300 and more operations in the
/// time of a byte.
pub const MEMORY_TOKENS: usize = 16;

/// Rows that a matrix repeats: panels of a number that no size in a kernel divides, so that a result in
/// another's place shows.
const DISTINCT: usize = 17 * PANEL_ROWS;

const FORMATS: [(&str, Elements); 4] = [
    ("q4", Elements::Packed(Format::Q4)),
    ("q8", Elements::Packed(Format::Q8)),
    ("bf16", Elements::Bf16),
    ("f32", Elements::F32),
];

/// The matrices of a decoder: name, rows, columns, whether its rows are gates and what they are for.
pub fn matrices(shapes: &Shapes) -> [(&'static str, usize, usize, bool); 5] {
    let (hidden, inner) = (shapes.hidden, shapes.inner);
    [
        ("qkv_proj", shapes.heads.columns(), hidden, false),
        ("o_proj", hidden, hidden, false),
        ("gate_up_proj", 2 * inner, hidden, true),
        ("down_proj", hidden, inner, false),
        ("lm_head", shapes.vocab, hidden, false),
    ]
}

pub fn bench(bench: &mut Bench) {
    let shapes = bench.shapes;
    for (format, elements) in FORMATS {
        for (name, rows, cols, gated) in matrices(&shapes) {
            let layout = Layout::new(elements, rows, cols).expect("a shape");
            let outputs = if gated { rows / 2 } else { rows };
            let cases: Vec<_> = (shapes.tokens.iter())
                .map(|&count| Case {
                    count,
                    cost: cost(&layout, 1, [count; 2], outputs),
                })
                .collect();
            let device = Arc::clone(&bench.device);
            let matrices = OnceCell::new();
            let kernel = if gated { "gated_linear" } else { "linear" };
            let what = format!("{kernel} {format}, {name} {rows} x {cols}");
            bench.run(&what, &cases, |case| {
                let make = || Matrices::new(&device, layout, 1, shapes.working_set);
                let matrices = once(&matrices, make)?;
                Product::new(&device, matrices, gated, case.count)
            });
        }
    }
}

/// What all cases of a group share: made for the first one.
pub fn once<T>(
    cell: &OnceCell<Rc<T>>,
    make: impl FnOnce() -> Result<T, DeviceError>,
) -> Result<Rc<T>, DeviceError> {
    if let Some(made) = cell.get() {
        return Ok(Rc::clone(made));
    }
    let made = Rc::new(make()?);
    Ok(Rc::clone(cell.get_or_init(|| made)))
}

/// The cost of `inputs` rows that become `rows` rows of so many outputs, with so many matrices.
pub fn cost(layout: &Layout, matrices: usize, [inputs, rows]: [usize; 2], outputs: usize) -> Cost {
    if rows <= MEMORY_TOKENS {
        let inputs = layout.elements().form().bytes(inputs, layout.cols());
        Cost::Bytes(matrices * layout.bytes() + inputs + rows * outputs * size_of::<f32>())
    } else {
        Cost::Operations(2 * rows * layout.rows() * layout.cols())
    }
}

/// By how much of the largest a product may be off.
///
/// Packed: blocks are exact, their sums are f32, at most 257 roundings of 2^-24 there and 41 here, where 8
/// warps share a row of 256 blocks; the magnitudes sum to 10 times the largest result at most. Else a product
/// of 8192 columns takes part in 517 roundings there and 1032 here, which a tensor core may make twice as
/// large, and the magnitudes sum to 17 times. Of random values a missing block of 32 shows in most rows.
pub fn tolerance(elements: Elements) -> f32 {
    match elements {
        Elements::Packed(_) => 2e-4,
        Elements::Bf16 | Elements::F16 | Elements::F32 => 3e-3,
    }
}

/// The gate is at most 1.1 times as steep as its input, and results of a standard deviation of 1 are
/// multiplied: the largest product is a fifth of the largest factors' product or more, and either's error
/// counts.
pub const GATED: f32 = 10.0;

/// The rows that a matrix repeats.
struct Pattern {
    elements: Elements,
    cols: usize,
    /// As they are stored.
    bytes: AlignedBytes,
    /// `[DISTINCT, cols]`, as rounded where they are not packed.
    values: Vec<f32>,
}

impl Pattern {
    /// Rows whose products with values in -1..1 have a standard deviation of 1.
    fn new(elements: Elements, cols: usize) -> Self {
        let size = 3.0 / (cols as f32).sqrt();
        let mut values = Random(cols as u64).values(DISTINCT * cols);
        values.iter_mut().for_each(|v| *v *= size);
        let copy = |bytes: Vec<u8>| AlignedBytes::try_copy(&bytes).expect("memory");
        let bytes = match elements {
            Elements::Packed(format) => {
                let layout = PackedLayout::new(format, DISTINCT, cols).expect("a shape");
                let mut bytes = AlignedBytes::try_zeroed(layout.bytes()).expect("memory");
                let panels = bytes.as_mut().chunks_exact_mut(layout.panel_bytes());
                for (rows, panel) in values.chunks_exact(PANEL_ROWS * cols).zip(panels) {
                    pack_panel(&layout, rows, panel).expect("finite values");
                }
                bytes
            }
            Elements::Bf16 => {
                let stored: Vec<_> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                values = stored.iter().map(|v| v.to_f32()).collect();
                copy(stored.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
            Elements::F32 => copy(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            Elements::F16 => unreachable!("no such format is timed"),
        };
        Self {
            elements,
            cols,
            bytes,
            values,
        }
    }

    /// `[rows of x, DISTINCT]`, by the definition.
    fn products(&self, x: &[f32]) -> Vec<f32> {
        let tokens = x.len() / self.cols;
        let mut y = vec![0.0; tokens * DISTINCT];
        let out = ColsMut::new(&mut y, tokens, DISTINCT);
        match self.elements {
            Elements::Packed(format) => {
                let layout = PackedLayout::new(format, DISTINCT, self.cols).expect("a shape");
                let packed = Packed::new(layout, self.bytes.as_ref()).expect("as packed");
                let mut tiles = Tiles::default();
                tiles.reshape(tokens, self.cols, format.zero());
                let mut rows = x.chunks_exact(self.cols);
                for mut tile in tiles.tiles_mut() {
                    for r in 0..tile.rows {
                        quantize(rows.next().expect("as many"), &mut tile, r);
                    }
                }
                scalar().gemm_packed(packed, 0..layout.panels(), &tiles, out);
            }
            Elements::Bf16 | Elements::F16 | Elements::F32 => {
                // What meets bf16 is rounded to it.
                let round = |v: &f32| match self.elements {
                    Elements::Bf16 => bf16::from_f32(*v).to_f32(),
                    _ => *v,
                };
                let x: Vec<f32> = x.iter().map(round).collect();
                let w = Dense::new(DISTINCT, self.cols, view::Elements::F32(&self.values));
                scalar().gemm_dense(w, 0..DISTINCT, &x, out);
            }
        }
        y
    }
}

/// Copies of a matrix, or of the matrices of all experts one after the other, to be visited in turn.
pub struct Matrices {
    pattern: Pattern,
    pub layout: Layout,
    memory: Memory,
    /// Bytes of a copy.
    set: usize,
}

impl Matrices {
    /// Copies that have more than `working_set` bytes together.
    pub fn new(
        device: &Arc<dyn Device>,
        layout: Layout,
        experts: usize,
        working_set: usize,
    ) -> Result<Self, DeviceError> {
        assert!(
            layout.rows().is_multiple_of(PANEL_ROWS) && layout.cols().is_multiple_of(32),
            "panels and blocks are whole: rows repeat, and lie as they are stored"
        );
        let pattern = Pattern::new(layout.elements(), layout.cols());
        let set = experts * layout.bytes();
        let copies = working_set.div_ceil(set).max(1);
        let memory = Memory::new(device, copies * set)?;
        let first = memory.span::<u8>().slice(..set);
        let bytes = pattern.bytes.as_ref();
        for start in (0..set).step_by(bytes.len()) {
            let end = set.min(start + bytes.len());
            first.slice(start..end).upload(&bytes[..end - start])?;
        }
        for copy in 1..copies {
            first.copy_to(memory.span().slice(copy * set..(copy + 1) * set))?;
        }
        Ok(Self {
            pattern,
            layout,
            memory,
            set,
        })
    }

    /// Outputs, of which a gate makes one of two rows.
    pub fn outputs(&self, gated: bool) -> usize {
        self.layout.rows() / if gated { 2 } else { 1 }
    }

    pub fn copies(&self) -> usize {
        self.memory.bytes() / self.set
    }

    /// A copy as it is stored.
    pub fn data(&self, copy: usize) -> Span<'_, u8> {
        (self.memory.span()).slice(copy * self.set..(copy + 1) * self.set)
    }

    pub fn weights(&self, copy: usize) -> Weights<'_> {
        Weights::new(self.layout, self.data(copy), None)
    }

    /// What an expert, or the only matrix, makes of rows `x`: `[rows of x, outputs]`, by the definition.
    pub fn results(&self, expert: usize, gated: bool, x: &[f32]) -> Vec<f32> {
        let rows = self.layout.rows();
        let products = self.pattern.products(x);
        let results = products.chunks_exact(DISTINCT).map(|products| {
            let row = |r: usize| products[(expert * rows + r) % DISTINCT];
            let all: Vec<f32> = (0..rows).map(row).collect();
            if !gated {
                return all;
            }
            let (gate, up) = all.split_at(rows / 2);
            let mut y = vec![0.0; rows / 2];
            scalar().silu_mul(gate, up, &mut y);
            y
        });
        results.collect::<Vec<_>>().concat()
    }
}

/// Rows as a matrix takes them, and as they were.
pub struct Input {
    elements: Elements,
    pub x: Vec<f32>,
    rows: usize,
    cols: usize,
    place: Memory,
}

impl Input {
    pub fn new(
        device: &Arc<dyn Device>,
        elements: Elements,
        rows: usize,
        cols: usize,
    ) -> Result<Self, DeviceError> {
        let x = Random(1).values(rows * cols);
        let place = Memory::new(device, elements.form().bytes(rows, cols))?;
        let input = Self {
            elements,
            x,
            rows,
            cols,
            place,
        };
        let from = Memory::from_slice(device, &input.x)?;
        elementwise::input(&**device, from.span(), cols, input.activations())?;
        Ok(input)
    }

    pub fn activations(&self) -> Activations<'_> {
        let form = self.elements.form();
        form.place(self.place.span(), self.rows, self.cols)
    }

    pub fn row(&self, r: usize) -> &[f32] {
        &self.x[r * self.cols..][..self.cols]
    }
}

/// One matrix and some tokens.
pub struct Product {
    pub matrices: Rc<Matrices>,
    gated: bool,
    tokens: usize,
    pub input: Input,
    pub y: Memory,
}

impl Product {
    pub fn new(
        device: &Arc<dyn Device>,
        matrices: Rc<Matrices>,
        gated: bool,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        let layout = matrices.layout;
        let outputs = matrices.outputs(gated);
        Ok(Self {
            input: Input::new(device, layout.elements(), tokens, layout.cols())?,
            y: Memory::zeroed(device, tokens * outputs * size_of::<f32>())?,
            matrices,
            gated,
            tokens,
        })
    }
}

impl Work for Product {
    fn turns(&self) -> usize {
        self.matrices.copies()
    }

    fn launch(&self, device: &dyn Device, turn: usize) -> Result<(), DeviceError> {
        let (w, x) = (self.matrices.weights(turn), self.input.activations());
        if self.gated {
            let w = Gated::stacked(w).expect("whole panels");
            gated_linear(device, &w, x, self.tokens, self.y.span())
        } else {
            linear(device, &[w], x, self.tokens, self.y.span())
        }
    }

    fn check(&self) -> Result<(), DeviceError> {
        let rows: Vec<_> = checked(self.tokens).collect();
        let x: Vec<_> = rows.iter().map(|t| self.input.row(*t)).collect();
        let want = self.matrices.results(0, self.gated, &x.concat());
        let y = self.y.span::<f32>().to_vec()?;
        let width = self.matrices.outputs(self.gated);
        let got: Vec<_> = rows.iter().map(|t| &y[t * width..][..width]).collect();
        let tolerance = tolerance(self.matrices.layout.elements());
        let tolerance = tolerance * if self.gated { GATED } else { 1.0 };
        assert_near(&got.concat(), &want, tolerance, |_| 0.0);
        Ok(())
    }
}
