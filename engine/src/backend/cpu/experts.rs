//! A mixture of experts: the router, and the experts over the tokens that were routed to them.
//!
//! ```text
//! Router   sparsemixer (Liu et al. 2023, arXiv:2310.00811) as Phi-3.5-MoE evaluates it. For the scores s
//!          of a token, twice, the second time without the first pick:
//!            m      = the largest score left, e its expert
//!            kept   = those left with (m - s[j]) / max(|s[j]|, m) <= 2 jitter
//!            weight = exp(s[e] - m) / sum over kept of exp(s[j] - m)
//!          A weight is 1 where nobody comes near. The two do not sum to 1, and must not.
//! Experts  y = weight_1 * expert_1(x) + weight_2 * expert_2(x)
//! Work     tokens are grouped by expert; each expert that has any multiplies once with all of them
//!          (gather, GEMM, gated, GEMM, weighted sum), and its matrices are read once. The others' are not
//!          touched. Each of the steps is one list of pieces over all experts, in proportion to their
//!          tokens, so that the threads end together however uneven the routing is.
//! Exact    a row of a product does not depend on the rows beside it, and the sum is taken in the order of
//!          the picks, so no result depends on what else was routed where.
//! ```

use super::super::{Expert, GateUp, PICKS, Pick};
use super::linear::{multiply, split};
use super::{CpuOps, Input, InputKind, assert_columns};
use crate::bytes::Bytes;
use crate::tensor::{Buffer, Matrix};
use phidias_kernels::cpu::Kernels;
use phidias_kernels::view::ColsMut;
use phidias_quant::activations::{TILE, TileMut};
use phidias_quant::packed::PANEL_ROWS;
use std::ops::Range;

/// Rows of the weighted sum that one thread takes at a time.
const SUM_ROWS: usize = 8;

/// Pages of a matrix that are looked at before the rest is asked for: a system call each, 0.2 us.
const SAMPLED_PAGES: usize = 8;

/// Where the tokens of a pass go.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// Of each token, the likelier one first.
    picks: Vec<[Pick; PICKS]>,
    /// Tokens grouped by expert: `PICKS` times as many.
    tokens: Vec<usize>,
    /// Where in `tokens` each pick stands.
    places: Vec<[usize; PICKS]>,
    /// The experts that have tokens, and their part of `tokens`.
    groups: Vec<(usize, Range<usize>)>,
}

impl Routes {
    /// The experts of each token, the likelier one first.
    #[must_use]
    pub fn picks(&self) -> &[[Pick; PICKS]] {
        &self.picks
    }

    /// The experts that have tokens, in their order, and how many.
    pub fn loads(&self) -> impl Iterator<Item = (usize, usize)> {
        self.groups.iter().map(|(e, range)| (*e, range.len()))
    }

    /// Sorts the picks by expert; among those of one expert the tokens keep their order.
    fn group(&mut self, experts: usize) {
        let mut ends = vec![0; experts];
        for pick in self.picks.iter().flatten() {
            ends[pick.expert] += 1;
        }
        self.groups.clear();
        let mut start = 0;
        for (expert, end) in ends.iter_mut().enumerate() {
            let range = start..start + *end;
            // From here on the place of the expert's next token.
            *end = start;
            start = range.end;
            if !range.is_empty() {
                self.groups.push((expert, range));
            }
        }
        self.tokens.resize(start, 0);
        self.places.clear();
        for (token, picks) in self.picks.iter().enumerate() {
            self.places.push(picks.map(|pick| {
                let place = ends[pick.expert];
                self.tokens[place] = token;
                ends[pick.expert] += 1;
                place
            }));
        }
    }
}

/// The expert of the largest score that is not `taken`, and its weight among those near it. Scores that
/// are not numbers give a weight that is none, and an expert that exists.
fn pick(scores: &[f32], taken: Option<usize>, jitter: f32) -> Pick {
    let left = || (0..scores.len()).filter(|j| Some(*j) != taken);
    let expert = left()
        .reduce(|best, j| if scores[j] > scores[best] { j } else { best })
        .expect("more experts than picks");
    let max = scores[expert];
    let far = |score: f32| {
        // In f32 and in this order, as the reference compares. Where there is no distance and nothing to
        // divide by (0 / 0) this is false: the score is near.
        (max - score) / score.abs().max(max) > 2.0 * jitter
    };
    let kept = left().filter(|&j| !far(scores[j]));
    let sum: f64 = kept.map(|j| libm::exp(f64::from(scores[j] - max))).sum();
    Pick {
        expert,
        weight: (1.0 / sum) as f32,
    }
}

/// What [`CpuOps::experts`] works with, kept from layer to layer.
#[derive(Debug, Default)]
pub struct ExpertScratch {
    /// Of each expert that has tokens.
    inputs: Vec<Input>,
    /// `[picks, inner]`, grouped by expert.
    gated: Buffer,
    /// `[picks, hidden]`, grouped by expert.
    outputs: Buffer,
}

/// Rows of an [`Input`] that one thread fills.
enum InputRows<'i> {
    Floats(&'i mut [f32]),
    Quantized(TileMut<'i>),
}

/// An expert and its part of the grouped rows.
type Group<'e> = (&'e Expert, Range<usize>);

impl CpuOps<'_> {
    /// Picks the experts of each token by its scores, `[tokens, experts]`.
    /// # Panics
    /// When there are fewer than [`PICKS`] experts: models check that at their border.
    pub fn route(&self, scores: &Buffer, jitter: f32, routes: &mut Routes) {
        let experts = scores.cols();
        assert!(experts >= PICKS, "{experts} experts for {PICKS} picks");
        routes.picks.clear();
        for scores in scores.data().chunks_exact(experts) {
            let first = pick(scores, None, jitter);
            let second = pick(scores, Some(first.expert), jitter);
            routes.picks.push([first, second]);
        }
        routes.group(experts);
    }

    /// The weighted sum of each token's experts: `[tokens, hidden]` to the same.
    /// # Panics
    /// When `routes` are not those of `x`, or name an expert that does not exist.
    pub fn experts(
        &self,
        experts: &[Expert],
        routes: &Routes,
        x: &Buffer,
        y: &mut Buffer,
        s: &mut ExpertScratch,
    ) {
        assert_eq!(routes.picks.len(), x.rows(), "tokens routed and given");
        let groups: Vec<Group<'_>> = (routes.groups.iter())
            .map(|(e, rows)| (&experts[*e], rows.clone()))
            .collect();
        self.ask_ahead(&groups);
        let Some((first, _)) = groups.first() else {
            y.reshape(0, x.cols());
            return;
        };
        let (inner, hidden) = (first.gate_up.inner(), first.down_proj.weight.rows());
        s.inputs
            .resize_with(groups.len().max(s.inputs.len()), Input::default);
        let inputs = &mut s.inputs[..groups.len()];
        let rows = routes.tokens.len();

        let token = |row: usize| x.row(routes.tokens[row]);
        self.inputs(&groups, |e| e.gate_up.matrix(), token, inputs);
        s.gated.reshape(rows, inner);
        self.grouped(
            &groups,
            inputs,
            |tokens| GateUp::rows_at_once(self.kernels, tokens),
            &mut s.gated,
            |k, e, rows, x, y| {
                e.gate_up.compute(k, rows, x, y);
            },
        );

        let gated = &s.gated;
        let row = |row: usize| gated.row(row);
        self.inputs(&groups, |e| &e.down_proj.weight, row, inputs);
        s.outputs.reshape(rows, hidden);
        self.grouped(
            &groups,
            inputs,
            |_| PANEL_ROWS,
            &mut s.outputs,
            |k, e, rows, x, y| {
                multiply(k, &e.down_proj, rows, x, y);
            },
        );

        y.reshape(x.rows(), hidden);
        let outputs = &s.outputs;
        let parts = (y.data_mut().chunks_mut(SUM_ROWS * hidden))
            .zip(routes.picks.chunks(SUM_ROWS))
            .zip(routes.places.chunks(SUM_ROWS));
        self.team
            .each_part(parts.collect(), |((y, picks), places)| {
                let rows = y.chunks_exact_mut(hidden).zip(picks).zip(places);
                for ((y, [first, second]), places) in rows {
                    let [a, b] = places.map(|place| outputs.row(place));
                    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                        *y = first.weight * a + second.weight * b;
                    }
                }
            });
    }

    /// Asks the system for the pages of matrices that are not all in memory: the disk then reads the last
    /// matrix too while the first is multiplied. Looking costs resident experts some microseconds; asking is
    /// work for the system, which makes room for the pages, and is shared by the threads.
    fn ask_ahead(&self, groups: &[Group<'_>]) {
        let missing = |bytes: &&Bytes| {
            let share = bytes.resident_share(SAMPLED_PAGES);
            share.is_some_and(|share| share < 1.0)
        };
        let matrices = groups.iter().flat_map(|(expert, _)| expert.matrices());
        let missing = matrices.map(Matrix::data).filter(missing).collect();
        self.team.each_part(missing, Bytes::will_need);
    }

    /// The grouped rows as a matrix of each group's expert takes them.
    fn inputs<'r>(
        &self,
        groups: &[Group<'_>],
        matrix: impl Fn(&Expert) -> &Matrix,
        row: impl Fn(usize) -> &'r [f32] + Sync,
        inputs: &mut [Input],
    ) {
        let kernels = self.kernels;
        let mut parts = Vec::new();
        for ((expert, rows), input) in groups.iter().zip(inputs) {
            let w = matrix(expert);
            assert_columns(row(rows.start).len(), w);
            input.reshape(w, rows.len());
            let firsts = rows.clone().step_by(TILE);
            match &mut input.kind {
                InputKind::Floats(buffer) => {
                    let tiles = buffer.data_mut().chunks_mut(TILE * w.cols());
                    parts.extend(firsts.zip(tiles.map(InputRows::Floats)));
                }
                InputKind::Quantized(quantized) => {
                    let tiles = quantized.tiles_mut();
                    parts.extend(firsts.zip(tiles.map(InputRows::Quantized)));
                }
            }
        }
        self.team.each_part(parts, |(first, part)| match part {
            InputRows::Floats(out) => {
                let rows = out.chunks_exact_mut(row(first).len()).enumerate();
                rows.for_each(|(r, out)| out.copy_from_slice(row(first + r)));
            }
            InputRows::Quantized(mut tile) => {
                for r in 0..tile.rows {
                    kernels.quantize(row(first + r), &mut tile, r);
                }
            }
        });
    }

    /// Calls `compute` for outputs of every expert, in pieces of whole `unit`s, which depend on its rows:
    /// as many for an expert as its share of them.
    fn grouped(
        &self,
        groups: &[Group<'_>],
        inputs: &[Input],
        unit: impl Fn(usize) -> usize,
        y: &mut Buffer,
        compute: impl Fn(&Kernels, &Expert, Range<usize>, &Input, ColsMut<'_>) + Sync,
    ) {
        let kernels = self.kernels;
        let (all, width) = (y.rows(), y.cols());
        let mut rest = y.data_mut();
        let mut parts = Vec::new();
        for ((expert, rows), input) in groups.iter().zip(inputs) {
            let (own, right) = rest.split_at_mut(rows.len() * width);
            rest = right;
            let unit = unit(rows.len());
            let pieces = self.team.pieces(usize::MAX) * rows.len();
            let pieces = pieces.div_ceil(all).min(width.div_ceil(unit));
            let own = ColsMut::new(own, rows.len(), width);
            let pieces = split(own, unit, pieces).into_iter();
            parts.extend(pieces.map(|(rows, y)| (*expert, input, rows, y)));
        }
        self.team.each_part(parts, |(expert, input, rows, y)| {
            compute(kernels, expert, rows, input, y);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::matrix;
    use super::*;
    use crate::backend::Cpu;
    use crate::pool::Pool;
    use phidias_kernels::cpu::Kernels;
    use std::sync::Arc;

    fn buffer(rows: usize, cols: usize, value: impl FnMut(usize) -> f32) -> Buffer {
        let mut buffer = Buffer::default();
        buffer.reshape(rows, cols);
        let values = (0..rows * cols).map(value);
        (buffer.data_mut().iter_mut().zip(values)).for_each(|(b, v)| *b = v);
        buffer
    }

    fn routes(scores: &Buffer) -> Routes {
        let mut routes = Routes::default();
        cpu(1).enter(|ops| ops.route(scores, 0.01, &mut routes));
        routes
    }

    fn cpu(threads: usize) -> Cpu {
        Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(threads)).unwrap()))
    }

    /// The picks of one row.
    fn picks(scores: &[f32]) -> [Pick; PICKS] {
        routes(&buffer(1, scores.len(), |i| scores[i])).picks[0]
    }

    #[test]
    fn only_scores_within_the_jitter_share_the_weight() {
        let [a, b] = picks(&[1.0, 3.0, 2.0, -5.0]);
        assert_eq!((a.expert, a.weight, b.expert, b.weight), (1, 1.0, 2, 1.0));
        // 0.99 is within 2 % of 1, 0.97 is not; without the first, 0.97 is within 2 % of 0.99 (2.02 %: no).
        let [a, b] = picks(&[0.97, 1.0, 0.99, 0.0]);
        let share = 1.0 / (1.0 + (-0.01f32).exp());
        assert_eq!((a.expert, b.expert, b.weight), (1, 2, 1.0));
        assert!((a.weight - share).abs() < 1e-6, "{}", a.weight);
        // Negative scores are measured by their own size.
        let [a, b] = picks(&[-100.0, -101.0, -103.0, -200.0]);
        assert_eq!((a.expert, b.expert), (0, 1));
        for (pick, gap) in [(a, 1.0f32), (b, 2.0)] {
            assert!((pick.weight - 1.0 / (1.0 + (-gap).exp())).abs() < 1e-6);
        }
    }

    #[test]
    fn equal_scores_go_to_the_first_ones() {
        // Without a distance there is nothing to divide by.
        for value in [0.0, 2.5, -2.5] {
            let [a, b] = picks(&[value; 5]);
            assert_eq!((a.expert, b.expert), (0, 1));
            assert_eq!((a.weight, b.weight), (0.2, 0.25));
        }
    }

    #[test]
    fn scores_that_are_no_numbers_pick_experts_that_exist() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        for scores in [
            [nan; 4],
            [inf; 4],
            [-inf; 4],
            [nan, 1.0, 2.0, nan],
            [1.0, nan, inf, -inf],
            [f32::MAX, f32::MIN, f32::MAX, 0.0],
        ] {
            let [a, b] = picks(&scores);
            assert!(
                a.expert < 4 && b.expert < 4 && a.expert != b.expert,
                "{scores:?}"
            );
        }
    }

    #[test]
    fn tokens_are_grouped_by_expert_in_their_order() {
        // Token t prefers expert 4 - t % 3, then expert 0.
        let scores = buffer(7, 5, |i| match i % 5 {
            0 => 1.0,
            e if e == 4 - i / 5 % 3 => 2.0,
            _ => 0.0,
        });
        let routes = routes(&scores);
        let loads: Vec<_> = routes.loads().collect();
        assert_eq!(loads, [(0, 7), (2, 2), (3, 2), (4, 3)]);
        assert_eq!(routes.tokens, [0, 1, 2, 3, 4, 5, 6, 2, 5, 1, 4, 0, 3, 6]);
        for (t, (picks, places)) in routes.picks.iter().zip(&routes.places).enumerate() {
            for (pick, place) in picks.iter().zip(places) {
                assert_eq!(routes.tokens[*place], t);
                let (_, range) = (routes.groups.iter())
                    .find(|(expert, _)| *expert == pick.expert)
                    .unwrap();
                assert!(range.contains(place));
            }
        }
    }

    /// However tokens are grouped and threads share them: what each expert alone gives for each token,
    /// weighted, bit for bit. None, one and many tokens; experts with none, few and most of them.
    #[test]
    fn experts_together_are_each_alone() {
        let (hidden, inner, count) = (24, 40, 6);
        let experts: Vec<Expert> = (0..count)
            .map(|e| Expert {
                gate_up: GateUp::Pair {
                    gate: matrix(inner, hidden, 3 * e),
                    up: matrix(inner, hidden, 3 * e + 1),
                },
                down_proj: matrix(hidden, inner, 3 * e + 2),
            })
            .collect();
        let alone = |expert: &Expert, x: &[f32]| -> Vec<f32> {
            let x = buffer(1, hidden, |i| x[i]);
            let (mut input, mut gated, mut inner, mut y) = Default::default();
            cpu(1).enter(|ops| {
                ops.input(&x, expert.gate_up.matrix(), &mut input);
                let (x, next) = (&input, &expert.down_proj);
                ops.gated_input(&expert.gate_up, x, &next.weight, &mut gated, &mut inner);
                ops.linear(next, &inner, &mut y);
            });
            y.row(0).to_vec()
        };
        let mut scratch = ExpertScratch::default();
        for tokens in [0, 1, 2, 37, 150] {
            let x = buffer(tokens, hidden, |i| (i * 13 % 29) as f32 / 29.0 - 0.5);
            // Most tokens to experts 1 and 4, none to expert 3.
            let scores = buffer(tokens, count, |i| match (i / count % 5, i % count) {
                (_, 3) => -1.0,
                (0, e) => (e * (i / count + 3) % 7) as f32,
                (_, 1) => 1.01,
                (_, 4) => 1.0,
                _ => 0.5,
            });
            let routes = routes(&scores);
            assert!(routes.loads().all(|(e, tokens)| e != 3 && tokens > 0));
            for threads in [1, 2, 5] {
                let mut y = Buffer::default();
                cpu(threads).enter(|ops| ops.experts(&experts, &routes, &x, &mut y, &mut scratch));
                assert_eq!((y.rows(), y.cols()), (tokens, hidden));
                for (t, [first, second]) in routes.picks.iter().enumerate() {
                    let a = alone(&experts[first.expert], x.row(t));
                    let b = alone(&experts[second.expert], x.row(t));
                    let sum = a.iter().zip(&b);
                    let want: Vec<f32> = sum
                        .map(|(a, b)| first.weight * a + second.weight * b)
                        .collect();
                    assert_eq!(y.row(t), want, "token {t} of {tokens}, {threads} threads");
                }
            }
        }
    }
}
