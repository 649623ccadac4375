//! The norms, rotary embedding, the gates and the activations; maths in `norm.rs`, `rope.rs`, `gate.rs`
//! and `activation.rs`.

use super::{LANES, Lanes, exp, padded};
use crate::cpu::activation::{DENOMINATOR, NUMERATOR, QUICK_GELU, TAIL_END};

/// The mean of something of each value, its sum in four times sixteen partial sums: `add(x, sum)`
/// adds it to one of them. `filler` fills the last sixteen and must add nothing.
#[inline(always)]
fn mean<L: Lanes>(x: &[f32], filler: f32, add: impl Fn(L, L) -> L) -> f32 {
    let mut acc = [L::splat(0.0); 4];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (fours, last) = chunks.as_chunks::<4>();
    for four in fours {
        for i in 0..4 {
            acc[i] = add(L::load(&four[i]), acc[i]);
        }
    }
    for (i, chunk) in last.iter().enumerate() {
        acc[i] = add(L::load(chunk), acc[i]);
    }
    let mut filled = [filler; LANES];
    filled[..rest.len()].copy_from_slice(rest);
    acc[3] = add(L::load(&filled), acc[3]);
    acc[0].add(acc[1]).add(acc[2].add(acc[3])).sum() / x.len() as f32
}

#[inline(always)]
pub(in crate::cpu) fn rms_norm<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let square = mean::<L>(x, 0.0, |x, sum| x.mul_add(x, sum));
    let inverse = L::splat(1.0 / (square + eps).sqrt());
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (w, w_rest) = weight.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks_mut::<LANES>();
    for ((x, w), y) in x.iter().zip(w).zip(y) {
        L::load(x).mul(inverse).mul(L::load(w)).store(y);
    }
    let mut last = [0.0; LANES];
    let x = L::load(&padded(x_rest));
    x.mul(inverse)
        .mul(L::load(&padded(w_rest)))
        .store(&mut last);
    y_rest.copy_from_slice(&last[..y_rest.len()]);
}

#[inline(always)]
pub(in crate::cpu) fn layer_norm<L: Lanes>(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    y: &mut [f32],
) {
    let middle = mean::<L>(x, 0.0, |x, sum| sum.add(x));
    let centre = L::splat(middle);
    let variance = mean::<L>(x, middle, |x, sum| {
        let difference = x.sub(centre);
        difference.mul_add(difference, sum)
    });
    let inverse = L::splat(1.0 / (variance + eps).sqrt());
    let normed = |x: L, w: L, b: L| x.sub(centre).mul(inverse).mul_add(w, b);
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (w, w_rest) = weight.as_chunks::<LANES>();
    let (b, b_rest) = bias.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks_mut::<LANES>();
    for (((x, w), b), y) in x.iter().zip(w).zip(b).zip(y) {
        normed(L::load(x), L::load(w), L::load(b)).store(y);
    }
    let mut last = [0.0; LANES];
    let (x, w) = (L::load(&padded(x_rest)), L::load(&padded(w_rest)));
    normed(x, w, L::load(&padded(b_rest))).store(&mut last);
    y_rest.copy_from_slice(&last[..y_rest.len()]);
}

/// `x cos - y sin` and `y cos + x sin`.
#[inline(always)]
fn turn<L: Lanes>(x: L, y: L, cos: L, sin: L) -> (L, L) {
    (y.neg_mul_add(sin, x.mul(cos)), x.mul_add(sin, y.mul(cos)))
}

#[inline(always)]
pub(in crate::cpu) fn rope<L: Lanes>(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (cos, cos_rest) = cos.as_chunks::<LANES>();
    let (sin, sin_rest) = sin.as_chunks::<LANES>();
    let (last_cos, last_sin) = (padded(cos_rest), padded(sin_rest));
    for head in heads.chunks_exact_mut(2 * half) {
        let (a, b) = head.split_at_mut(half);
        let (a, a_rest) = a.as_chunks_mut::<LANES>();
        let (b, b_rest) = b.as_chunks_mut::<LANES>();
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            let (x, y) = turn(L::load(a), L::load(b), L::load(cos), L::load(sin));
            x.store(a);
            y.store(b);
        }
        if !a_rest.is_empty() {
            let (mut last_a, mut last_b) = (padded(a_rest), padded(b_rest));
            let (x, y) = turn(
                L::load(&last_a),
                L::load(&last_b),
                L::load(&last_cos),
                L::load(&last_sin),
            );
            x.store(&mut last_a);
            y.store(&mut last_b);
            a_rest.copy_from_slice(&last_a[..a_rest.len()]);
            b_rest.copy_from_slice(&last_b[..b_rest.len()]);
        }
    }
}

/// `up * gate / (1 + e^-gate)`
#[inline(always)]
fn silu<L: Lanes>(gate: L, up: L) -> L {
    let one = L::splat(1.0);
    let negative = L::splat(0.0).sub(gate);
    up.mul(gate.div(one.add(exp(negative))))
}

#[inline(always)]
pub(in crate::cpu) fn silu_mul<L: Lanes>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    let (gate, gate_rest) = gate.as_chunks::<LANES>();
    let (up, up_rest) = up.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks_mut::<LANES>();
    for ((gate, up), y) in gate.iter().zip(up).zip(y) {
        silu(L::load(gate), L::load(up)).store(y);
    }
    let mut last = [0.0; LANES];
    silu(L::load(&padded(gate_rest)), L::load(&padded(up_rest))).store(&mut last);
    y_rest.copy_from_slice(&last[..y_rest.len()]);
}

/// A function of one value. A trait, because a closure or a function that is passed on is not inlined
/// once it is long, and its instructions are function calls then, ten times slower.
trait Activation {
    /// Of sixteen.
    fn of<L: Lanes>(x: L) -> L;
}

/// `x / (1 + e^(-1.702 x))`
struct QuickGelu;

impl Activation for QuickGelu {
    #[inline(always)]
    fn of<L: Lanes>(x: L) -> L {
        let one = L::splat(1.0);
        x.div(one.add(exp(x.mul(L::splat(-QUICK_GELU)))))
    }
}

/// `quick_gelu(a) * (b + 1)` of what the limits leave of `a` and `b`.
#[inline(always)]
fn gated<L: Lanes>([a, b]: [L; 2], limit: f32) -> L {
    let (least, most) = (L::splat(-limit), L::splat(limit));
    let a = a.infinite_or(a.min(most));
    let b = b.infinite_or(b.max(least).min(most));
    QuickGelu::of(a).mul(b.add(L::splat(1.0)))
}

#[inline(always)]
pub(in crate::cpu) fn gegelu<L: Lanes>(x: &[f32], limit: f32, y: &mut [f32]) {
    let (pairs, pairs_rest) = x.as_chunks::<2>().0.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks_mut::<LANES>();
    for (pairs, y) in pairs.iter().zip(y) {
        gated::<L>(L::load_pairs(pairs), limit).store(y);
    }
    let mut last = [0.0; LANES];
    gated::<L>(L::load_pairs(&padded(pairs_rest)), limit).store(&mut last);
    y_rest.copy_from_slice(&last[..y_rest.len()]);
}

/// `max(x, 0) - t Q(t)`, `t = |x|`
struct Gelu;

impl Activation for Gelu {
    #[inline(always)]
    fn of<L: Lanes>(x: L) -> L {
        let (half, size) = (L::splat(0.5), x.abs());
        let t = size.min(L::splat(TAIL_END));
        let ratio = horner(NUMERATOR, t).div(horner(DENOMINATOR, t));
        let tail = t.mul(ratio).mul(exp(t.mul(t).mul(L::splat(-0.5))));
        // max(x, 0), but for minus infinity.
        size.mul_add(half, x.mul(half)).sub(tail)
    }
}

#[inline(always)]
fn horner<L: Lanes, const N: usize>(coefficients: [f32; N], t: L) -> L {
    let mut sum = L::splat(coefficients[N - 1]);
    for c in coefficients[..N - 1].iter().rev() {
        sum = sum.mul_add(t, L::splat(*c));
    }
    sum
}

/// Each `x` becomes `A` of it.
#[inline(always)]
fn each<L: Lanes, A: Activation>(x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<LANES>();
    for x in x {
        A::of(L::load(x)).store(x);
    }
    let mut last = padded(rest);
    A::of(L::load(&last)).store(&mut last);
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline(always)]
pub(in crate::cpu) fn quick_gelu<L: Lanes>(x: &mut [f32]) {
    each::<L, QuickGelu>(x);
}

#[inline(always)]
pub(in crate::cpu) fn gelu<L: Lanes>(x: &mut [f32]) {
    each::<L, Gelu>(x);
}
