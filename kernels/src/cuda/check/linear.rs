//! The matrix products against the scalar ones; one token against many, bit by bit.

use super::elementwise::in_every_form;
use super::{Random, U, each_device};
use crate::cpu::{Isa, Kernels};
use crate::cuda::linear::{Elements, Gated, Layout, Weights, gated_linear, linear};
use crate::cuda::{Activations, Device, DeviceError, Form, Memory, elementwise};
use crate::view::ColsMut;
use phidias_quant::activations::{Activations as Tiles, quantize};
use phidias_quant::packed::{PANEL_ROWS, pack_panel};
use phidias_quant::{AlignedBytes, Format, Packed, PackedLayout, bf16, f16};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

pub(super) const ELEMENTS: [Elements; 5] = [
    Elements::Packed(Format::Q4),
    Elements::Packed(Format::Q8),
    Elements::Bf16,
    Elements::F16,
    Elements::F32,
];

/// Rows and columns: one of each; a panel and around; blocks that do not fill the K ranges, one a range, and
/// two with one left over; more panels than a prompt's block has.
const SHAPES: [(usize, usize); 6] = [(1, 1), (16, 32), (17, 33), (38, 100), (48, 290), (150, 64)];

/// Tokens: one, as many as a decoding block has and around, several of those; a prompt's block, of which
/// half or all is filled, and two.
const TOKENS: [usize; 7] = [1, 2, 7, 8, 20, 33, 150];

/// A matrix as it is stored, with the weights that it stands for.
pub(super) struct Stored {
    pub(super) layout: Layout,
    pub(super) bytes: Vec<u8>,
    /// `[rows, cols]`
    values: Vec<f32>,
}

impl Stored {
    pub(super) fn random(
        elements: Elements,
        rows: usize,
        cols: usize,
        random: &mut Random,
    ) -> Self {
        let mut values = random.values(rows * cols, 0.5);
        let bytes = match elements {
            Elements::Packed(format) => {
                let layout = PackedLayout::new(format, rows, cols).unwrap();
                let mut bytes = AlignedBytes::try_zeroed(layout.bytes()).unwrap();
                for (w, out) in (values.chunks(PANEL_ROWS * cols))
                    .zip(bytes.as_mut().chunks_mut(layout.panel_bytes()))
                {
                    pack_panel(&layout, w, out).unwrap();
                }
                let packed = Packed::new(layout, bytes.as_ref()).unwrap();
                for (r, row) in values.chunks_exact_mut(cols).enumerate() {
                    packed.dequantize_row(r, row);
                }
                bytes.as_ref().to_vec()
            }
            Elements::Bf16 => {
                let stored: Vec<_> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                values = stored.iter().map(|v| v.to_f32()).collect();
                stored.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Elements::F16 => {
                let stored: Vec<_> = values.iter().map(|v| f16::from_f32(*v)).collect();
                values = stored.iter().map(|v| v.to_f32()).collect();
                stored.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Elements::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let layout = Layout::new(elements, rows, cols).unwrap();
        Self {
            layout,
            bytes,
            values,
        }
    }

    pub(super) fn on(&self, device: &Arc<dyn Device>) -> Result<Memory, DeviceError> {
        let memory = Memory::new(device, self.layout.bytes())?;
        self.layout.upload(&self.bytes, memory.span())?;
        Ok(memory)
    }

    /// The products with `x`, and a bound for the error of each that the order of the sum and its roundings
    /// in f32 may make.
    fn products(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<(f32, f64)> {
        let (rows, cols) = (self.layout.rows(), self.layout.cols());
        let tokens = x.len() / cols;
        let x = as_multiplied(self.layout.elements(), x);
        // The sum of the magnitudes, times a rounding for each term and some for the ranges and the bias.
        // A tensor core may cut what an adder would round: twice that.
        let bound = |r: usize, t: usize| {
            let (w, x) = (&self.values[r * cols..][..cols], &x[t * cols..][..cols]);
            let sum: f64 = w.iter().zip(x).map(|(w, x)| f64::from((w * x).abs())).sum();
            let bias = bias.map_or(0.0, |bias| f64::from(bias[r].abs()));
            2.0 * (sum + bias) * (cols + 12) as f64 * 2.0 * U
        };
        let mut y = vec![0.0; tokens * rows];
        match self.layout.elements() {
            Elements::Packed(format) => {
                let layout = PackedLayout::new(format, rows, cols).unwrap();
                let mut bytes = AlignedBytes::try_zeroed(layout.bytes()).unwrap();
                bytes.as_mut().copy_from_slice(&self.bytes);
                let packed = Packed::new(layout, bytes.as_ref()).unwrap();
                let mut tiles = Tiles::default();
                tiles.reshape(tokens, cols, format.zero());
                let mut rest = x.chunks_exact(cols);
                for mut tile in tiles.tiles_mut() {
                    for r in 0..tile.rows {
                        quantize(rest.next().unwrap(), &mut tile, r);
                    }
                }
                let y = ColsMut::new(&mut y, tokens, rows);
                scalar().gemm_packed(packed, 0..layout.panels(), &tiles, y);
            }
            Elements::Bf16 | Elements::F16 | Elements::F32 => {
                let w = crate::view::Elements::F32(&self.values);
                let w = crate::view::Dense::new(rows, cols, w);
                scalar().gemm_dense(w, 0..rows, &x, ColsMut::new(&mut y, tokens, rows));
            }
        }
        let of = |(i, y): (usize, &f32)| {
            let (t, r) = (i / rows, i % rows);
            (y + bias.map_or(0.0, |bias| bias[r]), bound(r, t))
        };
        y.iter().enumerate().map(of).collect()
    }
}

fn scalar() -> &'static Kernels {
    Kernels::for_isa(Isa::Scalar).expect("runs everywhere")
}

/// Activations as the device rounds them: to bf16 for such weights. (Bytes are made of the same floats.)
fn as_multiplied(elements: Elements, x: &[f32]) -> Vec<f32> {
    match elements {
        Elements::Bf16 => x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
        _ => x.to_vec(),
    }
}

/// `x`, `[rows, cols]`, as a matrix of such elements takes it.
pub(super) struct Input {
    place: Memory,
    form: Form,
    rows: usize,
    cols: usize,
}

impl Input {
    pub(super) fn new(
        device: &Arc<dyn Device>,
        elements: Elements,
        x: &[f32],
        cols: usize,
    ) -> Result<Self, DeviceError> {
        let (form, rows) = (elements.form(), x.len() / cols);
        let place = Memory::new(device, form.bytes(rows, cols))?;
        let input = Self {
            place,
            form,
            rows,
            cols,
        };
        let x = Memory::from_slice(device, x)?;
        elementwise::input(&**device, x.span(), cols, input.activations())?;
        Ok(input)
    }

    pub(super) fn activations(&self) -> Activations<'_> {
        self.form.place(self.place.span(), self.rows, self.cols)
    }
}

/// A result of NaNs, so that what is not written shows.
pub(super) fn result(device: &Arc<dyn Device>, len: usize) -> Result<Memory, DeviceError> {
    Memory::from_slice(device, &vec![f32::NAN; len])
}

fn assert_near(got: &[f32], want: &[(f32, f64)], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, (want, bound))) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - f64::from(*want)).abs();
        assert!(
            error <= *bound,
            "{what}, value {i}: {got}, expected {want} within {bound:e}"
        );
    }
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn products_are_those_of_the_scalar_kernels_for_one_token_and_for_many() {
    each_device(|device| {
        let mut random = Random(7);
        for elements in ELEMENTS {
            for (rows, cols) in SHAPES {
                let w = Stored::random(elements, rows, cols, &mut random);
                let memory = w.on(device)?;
                let bias = random.values(rows, 1.0);
                let bias_memory = Memory::from_slice(device, &bias)?;
                let weights = Weights::new(w.layout, memory.span(), Some(bias_memory.span()));
                let most = TOKENS[TOKENS.len() - 1];
                let x = random.values(most * cols, 2.0);
                let want = w.products(&x, Some(&bias));
                let mut all: Option<Vec<f32>> = None;
                for tokens in TOKENS.into_iter().rev() {
                    let what = format!("{elements:?} {rows} x {cols}, {tokens} tokens");
                    let input = Input::new(device, elements, &x[..tokens * cols], cols)?;
                    let y = result(device, tokens * rows)?;
                    linear(&**device, &[weights], input.activations(), tokens, y.span())?;
                    let y: Vec<f32> = y.span().to_vec()?;
                    assert_near(&y, &want[..tokens * rows], &what);
                    let all = all.get_or_insert_with(|| y.clone());
                    assert_eq!(bits(&y), bits(&all[..tokens * rows]), "{what}");
                }
            }
        }
        Ok(())
    });
}

/// Matrices beside each other give what each gives alone, with and without a bias.
#[test]
fn matrices_of_one_input_lie_side_by_side() {
    each_device(|device| {
        let mut random = Random(8);
        for elements in ELEMENTS {
            let cols = 70;
            let parts: Vec<_> = [33, 16, 7]
                .map(|rows| Stored::random(elements, rows, cols, &mut random))
                .into();
            let memories = parts
                .iter()
                .map(|w| w.on(device))
                .collect::<Result<Vec<_>, _>>()?;
            let bias = Memory::from_slice(device, &random.values(16, 1.0))?;
            let weights: Vec<_> = (parts.iter().zip(&memories).enumerate())
                .map(|(i, (w, memory))| {
                    Weights::new(w.layout, memory.span(), (i == 1).then(|| bias.span()))
                })
                .collect();
            for tokens in [3, 40] {
                let x = random.values(tokens * cols, 1.0);
                let input = Input::new(device, elements, &x, cols)?;
                let alone = |w: &Weights<'_>| -> Result<Vec<f32>, DeviceError> {
                    let y = result(device, tokens * w.layout().rows())?;
                    linear(
                        &**device,
                        std::slice::from_ref(w),
                        input.activations(),
                        tokens,
                        y.span(),
                    )?;
                    y.span().to_vec()
                };
                for count in 1..=3 {
                    let width: usize = parts[..count].iter().map(|w| w.layout.rows()).sum();
                    let y = result(device, tokens * width)?;
                    linear(
                        &**device,
                        &weights[..count],
                        input.activations(),
                        tokens,
                        y.span(),
                    )?;
                    let y = y.span::<f32>().to_vec()?;
                    let mut first = 0;
                    for w in &weights[..count] {
                        let (rows, want) = (w.layout().rows(), alone(w)?);
                        for (y, want) in y.chunks_exact(width).zip(want.chunks_exact(rows)) {
                            assert_eq!(bits(&y[first..][..rows]), bits(want), "{elements:?}");
                        }
                        first += rows;
                    }
                }
            }
        }
        Ok(())
    });
}

/// A gated product is the gate of two products.
#[test]
fn gates_are_applied_to_the_products() {
    each_device(|device| {
        let mut random = Random(9);
        for elements in ELEMENTS {
            for (inner, cols) in [(16, 32), (37, 100), (70, 300)] {
                let [gate, up, both] = [inner, inner, 2 * inner]
                    .map(|rows| Stored::random(elements, rows, cols, &mut random));
                let memories = [gate.on(device)?, up.on(device)?, both.on(device)?];
                let biases = [inner, inner, 2 * inner]
                    .map(|rows| Memory::from_slice(device, &random.values(rows, 1.0)));
                let [gate_bias, up_bias, both_bias] = biases;
                let biases = [gate_bias?, up_bias?, both_bias?];
                let weights = |i: usize, w: &Stored| {
                    Weights::new(w.layout, memories[i].span(), Some(biases[i].span()))
                };
                let (gate, up, both) = (weights(0, &gate), weights(1, &up), weights(2, &both));
                for tokens in [1, 9, 70] {
                    let what = format!("{elements:?} {inner} x {cols}, {tokens} tokens");
                    let x = random.values(tokens * cols, 2.0);
                    let input = Input::new(device, elements, &x, cols)?;
                    let product = |w: Weights<'_>| -> Result<Vec<f32>, DeviceError> {
                        let y = result(device, tokens * w.layout().rows())?;
                        linear(&**device, &[w], input.activations(), tokens, y.span())?;
                        y.span().to_vec()
                    };
                    let gated = |w: &Gated<'_>| -> Result<Vec<f32>, DeviceError> {
                        let x = input.activations();
                        assert_eq!(
                            w.gives_inputs(tokens),
                            matches!(w, Gated::Pair { .. }) && tokens < 70
                        );
                        if w.gives_inputs(tokens) {
                            return in_every_form(device, (tokens, w.inner()), |y| {
                                gated_linear(&**device, w, x, tokens, y)
                            });
                        }
                        let y = result(device, tokens * w.inner())?;
                        gated_linear(&**device, w, x, tokens, y.span())?;
                        y.span().to_vec()
                    };
                    let near = |got: &[f32], want: &[f32]| {
                        // The gate is the same function of the same numbers, but for exp: two units in the
                        // last place of one factor, and its roundings.
                        let want: Vec<_> = (want.iter())
                            .map(|v| (*v, 16.0 * U * f64::from(v.abs()) + 1e-30))
                            .collect();
                        assert_near(got, &want, &what);
                    };

                    let (left, right) = (product(gate)?, product(up)?);
                    let mut want = vec![0.0; left.len()];
                    scalar().silu_mul(&left, &right, &mut want);
                    near(&gated(&Gated::Pair { gate, up })?, &want);

                    let product = product(both)?;
                    if let Some(stacked) = Gated::stacked(both) {
                        for (y, x) in want
                            .chunks_exact_mut(inner)
                            .zip(product.chunks_exact(2 * inner))
                        {
                            scalar().silu_mul(&x[..inner], &x[inner..], y);
                        }
                        near(&gated(&stacked)?, &want);
                    } else {
                        assert!(
                            matches!(elements, Elements::Packed(_)) && !inner.is_multiple_of(16)
                        );
                    }

                    // Both sides of the limit.
                    let limit = 1.5;
                    scalar().gegelu(&product, limit, &mut want);
                    near(&gated(&Gated::Interleaved { both, limit })?, &want);
                }
            }
        }
        Ok(())
    });
}

/// What is not finite in the activations is not hidden, and stays with its token.
#[test]
fn a_token_that_is_not_finite_spoils_itself_alone() {
    each_device(|device| {
        let mut random = Random(10);
        for elements in ELEMENTS {
            let (rows, cols) = (20, 96);
            let w = Stored::random(elements, rows, cols, &mut random);
            let memory = w.on(device)?;
            let weights = Weights::new(w.layout, memory.span(), None);
            for tokens in [5, 40] {
                let mut x = random.values(tokens * cols, 1.0);
                x[2 * cols + 50] = f32::NAN;
                let input = Input::new(device, elements, &x, cols)?;
                let y = result(device, tokens * rows)?;
                linear(&**device, &[weights], input.activations(), tokens, y.span())?;
                for (t, y) in y.span::<f32>().to_vec()?.chunks_exact(rows).enumerate() {
                    assert!(
                        y.iter().all(|y| y.is_nan() == (t == 2)),
                        "{elements:?} token {t}: {y:?}"
                    );
                }
            }
        }
        Ok(())
    });
}

/// What does not fit is refused before anything is launched.
#[test]
fn lengths_that_do_not_fit_are_refused() {
    each_device(|device| {
        let mut random = Random(1);
        let [float, packed] = [Elements::F32, Elements::Packed(Format::Q4)]
            .map(|elements| Stored::random(elements, 16, 32, &mut random));
        let (float_memory, packed_memory) = (float.on(device)?, packed.on(device)?);
        let float_weights = Weights::new(float.layout, float_memory.span(), None);
        let packed_weights = Weights::new(packed.layout, packed_memory.span(), None);
        let floats = Input::new(device, Elements::F32, &[0.0; 64], 32)?;
        let bytes = Input::new(device, Elements::Packed(Format::Q8), &[0.0; 64], 32)?;
        let y = result(device, 32)?;
        let refusal = |w: &[Weights<'_>], x: &Input, tokens: usize| {
            let work = || linear(&**device, w, x.activations(), tokens, y.span());
            let panic = catch_unwind(AssertUnwindSafe(work)).expect_err("refused");
            let text = panic.downcast::<String>().expect("a text");
            text.lines().next().unwrap_or_default().to_owned()
        };
        let refused = |w: Weights<'_>, x, tokens, why: &str| {
            let text = refusal(&[w], x, tokens);
            assert!(text.contains(why), "{text}");
        };
        refused(float_weights, &floats, 3, "results of 3 rows of 16");
        refused(float_weights, &bytes, 2, "other elements than F32");
        refused(packed_weights, &bytes, 2, "zero point");
        let text = refusal(&[float_weights, packed_weights], &floats, 1);
        assert!(text.contains("beside another"), "{text}");
        Ok(())
    });
}
