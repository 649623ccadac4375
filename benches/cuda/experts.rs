//! The products of the experts: one token visits two, in turn all; of many, each expert has as many.

use crate::linear::{GATED, Input, Matrices, cost, once, tolerance};
use crate::timing::{Bench, Case, Work, assert_near, checked};
use phidias::engine::kernels::cuda::experts::{PICKS, Routes, load_bytes, route};
use phidias::engine::kernels::cuda::linear::{
    Elements, Gated, Layout, gated_experts, linear_experts,
};
use phidias::engine::kernels::cuda::{Device, DeviceError, Memory};
use phidias::engine::quant::Format;
use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::Arc;

const FORMATS: [(&str, Elements); 3] = [
    ("q4", Elements::Packed(Format::Q4)),
    ("q8", Elements::Packed(Format::Q8)),
    ("bf16", Elements::Bf16),
];

pub fn bench(bench: &mut Bench) {
    let shapes = bench.shapes.experts;
    let (hidden, inner, count) = (shapes.hidden, shapes.inner, shapes.count);
    for (format, elements) in FORMATS {
        for gated in [true, false] {
            let (kernel, rows, cols, outputs) = match gated {
                true => ("gated_experts", 2 * inner, hidden, inner),
                false => ("linear_experts", hidden, inner, hidden),
            };
            let layout = Layout::new(elements, rows, cols).expect("a shape");
            let cases = shapes.tokens.map(|tokens| Case {
                count: tokens,
                cost: {
                    let places = tokens * PICKS;
                    let inputs = if gated { tokens } else { places };
                    cost(&layout, PICKS, [inputs, places], outputs)
                },
            });
            let device = Arc::clone(&bench.device);
            let matrices = OnceCell::new();
            let what = format!("{kernel} {format}, {count} of {rows} x {cols}");
            bench.run(&what, &cases, |case| {
                // All experts together are more than a cache holds.
                let make = || Matrices::new(&device, layout, count, 0);
                let matrices = once(&matrices, make)?;
                Product::new(&device, matrices, gated, count, case.count)
            });
        }
    }
}

/// One matrix of each expert and some tokens.
struct Product {
    matrices: Rc<Matrices>,
    gated: bool,
    experts: usize,
    tokens: usize,
    /// Routes for each turn.
    words: Vec<Memory>,
    /// Of tokens, or of places.
    input: Input,
    y: Memory,
}

impl Product {
    fn new(
        device: &Arc<dyn Device>,
        matrices: Rc<Matrices>,
        gated: bool,
        experts: usize,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        let (layout, places) = (matrices.layout, tokens * PICKS);
        let inputs = if gated { tokens } else { places };
        // As many as it takes for all experts to have their turn.
        let turns = experts.div_ceil(places);
        let words = (0..turns).map(|turn| -> Result<Memory, DeviceError> {
            let mut scores = vec![0.0f32; tokens * experts];
            for (t, scores) in scores.chunks_exact_mut(experts).enumerate() {
                for (i, expert) in picks(turn, t, experts).into_iter().enumerate() {
                    scores[expert] = 4.0 - i as f32;
                }
            }
            let scores = Memory::from_slice(device, &scores)?;
            let words = Memory::zeroed(device, Routes::words(tokens, experts) * size_of::<u32>())?;
            let routes = Routes::new(words.span(), tokens, experts);
            let loads = Memory::zeroed(device, load_bytes(experts))?;
            route(&**device, scores.span(), 0.01, &routes, loads.span())?;
            Ok(words)
        });
        Ok(Self {
            words: words.collect::<Result<_, _>>()?,
            input: Input::new(device, layout.elements(), inputs, layout.cols())?,
            y: Memory::zeroed(device, places * matrices.outputs(gated) * size_of::<f32>())?,
            matrices,
            gated,
            experts,
            tokens,
        })
    }

    fn routes(&self, turn: usize) -> Routes<'_> {
        Routes::new(self.words[turn].span(), self.tokens, self.experts)
    }
}

/// The experts of a token.
fn picks(turn: usize, token: usize, experts: usize) -> [usize; PICKS] {
    std::array::from_fn(|i| (PICKS * (turn + token) + i) % experts)
}

impl Work for Product {
    fn turns(&self) -> usize {
        self.words.len()
    }

    fn launch(&self, device: &dyn Device, turn: usize) -> Result<(), DeviceError> {
        let (w, x) = (self.matrices.weights(0), self.input.activations());
        let routes = self.routes(turn);
        if self.gated {
            let w = Gated::stacked(w).expect("whole panels");
            gated_experts(device, &w, x, &routes, self.y.span())
        } else {
            linear_experts(device, &w, x, &routes, self.y.span())
        }
    }

    fn check(&self) -> Result<(), DeviceError> {
        let routes = self.routes(0);
        let (got, places) = (routes.picks().to_vec()?, routes.places_of_picks().to_vec()?);
        let (y, width) = (
            self.y.span::<f32>().to_vec()?,
            self.matrices.outputs(self.gated),
        );
        let (mut results, mut want) = (Vec::new(), Vec::new());
        for t in checked(self.tokens) {
            for (i, expert) in picks(0, t, self.experts).into_iter().enumerate() {
                assert_eq!(got[t * PICKS + i] as usize, expert, "pick {i} of token {t}");
                let place = places[t * PICKS + i] as usize;
                let x = self.input.row(if self.gated { t } else { place });
                results.extend_from_slice(&y[place * width..][..width]);
                want.extend(self.matrices.results(expert, self.gated, x));
            }
        }
        let tolerance =
            tolerance(self.matrices.layout.elements()) * if self.gated { GATED } else { 1.0 };
        assert_near(&results, &want, tolerance, |_| 0.0);
        Ok(())
    }
}
