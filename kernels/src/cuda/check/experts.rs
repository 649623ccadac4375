//! The router against its definition, written out; the experts together against each alone, bit by bit.

use super::elementwise::in_every_form;
use super::linear::{ELEMENTS, Input, Stored, bits, result};
use super::{Random, U, each_device};
use crate::cuda::experts::{PICKS, Routes, route, sum_picks};
use crate::cuda::linear::{
    Elements, Gated, Weights, gated_experts, gated_linear, linear, linear_experts,
};
use crate::cuda::{Device, DeviceError, Memory};
use std::sync::Arc;

/// An expert and its weight.
type Pick = (usize, f64);

/// Sparsemixer as the reference evaluates it: comparisons in f32, the softmax exactly.
fn picks(scores: &[f32], jitter: f32) -> [Pick; PICKS] {
    let pick = |taken: Option<usize>| {
        let left: Vec<usize> = (0..scores.len()).filter(|j| Some(*j) != taken).collect();
        let mut best = left[0];
        for &j in &left {
            if scores[j] > scores[best] {
                best = j;
            }
        }
        let max = scores[best];
        let kept = (left.iter()).filter(|j| {
            let far = (max - scores[**j]) / scores[**j].abs().max(max) > 2.0 * jitter;
            !far
        });
        let sum: f64 = kept.map(|j| f64::from(scores[*j] - max).exp()).sum();
        (best, 1.0 / sum)
    };
    let first = pick(None);
    [first, pick(Some(first.0))]
}

/// What was counted before, more than 32 bits hold.
const BEFORE: u64 = (1 << 32) - 1;

/// Routes of some scores, in device memory that says where nothing was written.
struct Routed {
    words: Memory,
    /// Beside [`BEFORE`].
    loads: Memory,
    tokens: usize,
    experts: usize,
}

impl Routed {
    fn new(
        device: &Arc<dyn Device>,
        scores: &[f32],
        experts: usize,
        jitter: f32,
    ) -> Result<Self, DeviceError> {
        let tokens = scores.len() / experts;
        let words = vec![u32::MAX; Routes::words(tokens, experts)];
        let words = Memory::from_slice(device, &words)?;
        let loads = Memory::from_slice(device, &vec![BEFORE; experts + 1])?;
        let routed = Self {
            words,
            loads,
            tokens,
            experts,
        };
        let scores = Memory::from_slice(device, scores)?;
        let (routes, loads) = (routed.routes(), routed.loads.span());
        route(&**device, scores.span(), jitter, &routes, loads)?;
        Ok(routed)
    }

    fn routes(&self) -> Routes<'_> {
        Routes::new(self.words.span(), self.tokens, self.experts)
    }
}

#[test]
fn routes_are_those_of_the_definition() {
    each_device(|device| {
        let mut random = Random(3);
        for experts in [2, 5, 16, 33, 70] {
            for tokens in [1, 2, 19, 150] {
                // Scores of all distances: far apart, within the jitter, equal, of either sign.
                let scores: Vec<f32> = (0..tokens * experts)
                    .map(|i| match i / experts % 4 {
                        0 => random.value() * 8.0,
                        1 => 1.0 + random.value() * 0.03,
                        2 => -2.0 + (random.value() * 4.0).round() * 0.02,
                        _ => (random.value() * 2.0).round(),
                    })
                    .collect();
                let routed = Routed::new(device, &scores, experts, 0.01)?;
                let routes = routed.routes();
                let (got, weights) = (routes.picks().to_vec()?, routes.weights().to_vec()?);
                let mut order = Vec::new();
                for (t, scores) in scores.chunks_exact(experts).enumerate() {
                    for (i, (expert, weight)) in picks(scores, 0.01).into_iter().enumerate() {
                        let at = t * PICKS + i;
                        assert_eq!(got[at] as usize, expert, "{scores:?}");
                        order.push((expert, at));
                        // exp is off by two units in the last place, and each addition rounds.
                        let bound = weight * (experts + 8) as f64 * 2.0 * U;
                        let error = (f64::from(weights[at]) - weight).abs();
                        assert!(error <= bound, "{} for {weight}, {scores:?}", weights[at]);
                    }
                }
                // By expert; among those of one the tokens in their order.
                order.sort_unstable();
                let sources: Vec<u32> = order.iter().map(|(_, at)| (at / PICKS) as u32).collect();
                assert_eq!(routes.sources.to_vec()?, sources);
                let places = routes.places_of_picks().to_vec()?;
                for (place, (_, at)) in order.iter().enumerate() {
                    assert_eq!(places[*at] as usize, place);
                }
                let mut loads = vec![BEFORE; experts + 1];
                for (expert, _) in &order {
                    loads[*expert] += 1;
                }
                loads[experts] += loads.iter().filter(|n| **n > BEFORE).count() as u64;
                assert_eq!(routed.loads.span::<u64>().to_vec()?, loads);
                // The tiles are all places, once, each of one expert; then empty ones.
                let mut next = 0;
                for tile in routes.tile_list.to_vec()?.chunks_exact(4) {
                    let [expert, first, count] = [tile[0], tile[1], tile[2]].map(|v| v as usize);
                    assert!(
                        count <= routes.tile() && (count > 0 || next == order.len()),
                        "{tile:?}"
                    );
                    if count > 0 {
                        assert_eq!(first, next);
                        next += count;
                        assert!(order[first..next].iter().all(|(e, _)| *e == expert));
                        let whole = count == routes.tile() || next == order.len();
                        assert!(whole || order[next].0 != expert, "{tile:?}");
                    }
                }
                assert_eq!(next, order.len());
            }
        }
        Ok(())
    });
}

#[test]
fn scores_that_are_no_numbers_pick_experts_that_exist() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let rows = [
        [nan; 4],
        [inf; 4],
        [-inf; 4],
        [nan, 1.0, 2.0, nan],
        [1.0, nan, inf, -inf],
        [-inf, nan, -inf, nan],
        [f32::MAX, f32::MIN, f32::MAX, 0.0],
        [0.0, -0.0, 0.0, -0.0],
    ];
    each_device(|device| {
        let routed = Routed::new(device, rows.as_flattened(), 4, 0.01)?;
        let (got, weights) = (
            routed.routes().picks().to_vec()?,
            routed.routes().weights().to_vec()?,
        );
        for (t, row) in rows.iter().enumerate() {
            for (i, (expert, weight)) in picks(row, 0.01).into_iter().enumerate() {
                let at = t * PICKS + i;
                assert_eq!(got[at] as usize, expert, "{row:?}");
                let same = f64::from(weights[at]) - weight;
                assert!(
                    same.abs() < 1e-6 || (weights[at].is_nan() && weight.is_nan()),
                    "{row:?}"
                );
            }
        }
        Ok(())
    });
}

/// All experts' matrices of one kind, one after the other on the device.
struct Expert {
    layout: crate::cuda::linear::Layout,
    memory: Memory,
}

impl Expert {
    fn random(
        device: &Arc<dyn Device>,
        elements: Elements,
        (experts, rows, cols): (usize, usize, usize),
        random: &mut Random,
    ) -> Result<Self, DeviceError> {
        let all: Vec<_> = (0..experts)
            .map(|_| Stored::random(elements, rows, cols, random))
            .collect();
        let layout = all[0].layout;
        let memory = Memory::new(device, experts * layout.bytes())?;
        for (w, to) in all.iter().enumerate().map(|(e, w)| (w, e * layout.bytes())) {
            layout.upload(&w.bytes, memory.span().slice(to..to + layout.bytes()))?;
        }
        Ok(Self { layout, memory })
    }

    /// One of them, or all.
    fn of(&self, expert: Option<usize>) -> Weights<'_> {
        let bytes = self.layout.bytes();
        let range = expert.map_or(0..self.memory.bytes(), |e| e * bytes..(e + 1) * bytes);
        Weights::new(self.layout, self.memory.span().slice(range), None)
    }
}

/// However tokens are grouped: what each expert alone gives for each token, weighted, bit for bit. One, few
/// and many tokens, so that tiles are of both sizes; experts with none, few and most of them; the gate's and
/// up's matrices apart and stacked.
#[test]
fn experts_together_are_each_alone() {
    each_device(|device| {
        let mut random = Random(11);
        for elements in ELEMENTS {
            let (hidden, inner, count) = (40, 48, 5);
            let gate = Expert::random(device, elements, (count, inner, hidden), &mut random)?;
            let up = Expert::random(device, elements, (count, inner, hidden), &mut random)?;
            let both = Expert::random(device, elements, (count, 2 * inner, hidden), &mut random)?;
            let down = Expert::random(device, elements, (count, hidden, inner), &mut random)?;
            for tokens in [1, 2, 13, 100] {
                // Most tokens to experts 1 and 4, none to expert 3.
                let scores: Vec<f32> = (0..tokens * count)
                    .map(|i| match (i / count % 5, i % count) {
                        (_, 3) => -1.0,
                        (0, e) => (e * (i / count + 3) % 7) as f32,
                        (_, 1) => 1.01,
                        (_, 4) => 1.0,
                        _ => 0.5,
                    })
                    .collect();
                let routed = Routed::new(device, &scores, count, 0.01)?;
                let routes = routed.routes();
                assert_eq!(routes.tile() > 8, tokens == 100);
                let x = random.values(tokens * hidden, 1.0);
                let input = Input::new(device, elements, &x, hidden)?;
                for pair in [true, false] {
                    let gated = |expert: Option<usize>| match pair {
                        true => Gated::Pair {
                            gate: gate.of(expert),
                            up: up.of(expert),
                        },
                        false => Gated::stacked(both.of(expert)).expect("whole panels"),
                    };
                    let (w, all) = (gated(None), input.activations());
                    let middle = if w.gives_experts_inputs(&routes) {
                        in_every_form(device, (PICKS * tokens, inner), |y| {
                            gated_experts(&**device, &w, all, &routes, y)
                        })?
                    } else {
                        let middle = result(device, PICKS * tokens * inner)?;
                        gated_experts(&**device, &w, all, &routes, middle.span())?;
                        middle.span().to_vec()?
                    };
                    let middle = Input::new(device, elements, &middle, inner)?;
                    let outputs = result(device, PICKS * tokens * hidden)?;
                    linear_experts(
                        &**device,
                        &down.of(None),
                        middle.activations(),
                        &routes,
                        outputs.span(),
                    )?;
                    let y = result(device, tokens * hidden)?;
                    sum_picks(&**device, outputs.span(), &routes, hidden, y.span())?;
                    let y: Vec<f32> = y.span().to_vec()?;

                    let alone = |e: usize, x: &[f32]| -> Result<Vec<f32>, DeviceError> {
                        let input = Input::new(device, elements, x, hidden)?;
                        let middle = result(device, inner)?;
                        gated_linear(
                            &**device,
                            &gated(Some(e)),
                            input.activations(),
                            1,
                            middle.span(),
                        )?;
                        let middle =
                            Input::new(device, elements, &middle.span::<f32>().to_vec()?, inner)?;
                        let y = result(device, hidden)?;
                        linear(
                            &**device,
                            &[down.of(Some(e))],
                            middle.activations(),
                            1,
                            y.span(),
                        )?;
                        y.span().to_vec()
                    };
                    let (picks, weights) = (routes.picks().to_vec()?, routes.weights().to_vec()?);
                    for (t, x) in x.chunks_exact(hidden).enumerate() {
                        let at = t * PICKS;
                        let a = alone(picks[at] as usize, x)?;
                        let b = alone(picks[at + 1] as usize, x)?;
                        let sum = a.iter().zip(&b);
                        let want: Vec<f32> = sum
                            .map(|(a, b)| weights[at] * a + weights[at + 1] * b)
                            .collect();
                        assert_eq!(
                            bits(&y[t * hidden..][..hidden]),
                            bits(&want),
                            "{elements:?}, token {t} of {tokens}"
                        );
                    }
                }
            }
        }
        Ok(())
    });
}
