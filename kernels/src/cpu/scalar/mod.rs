//! The definition of every kernel, in plain Rust.

use super::{Isa, Kernels};
use phidias_quant::{bf16, f16};

mod activation;
mod attention;
mod attention_i8;
mod gemm;
mod norm;

pub(super) const KERNELS: Kernels = Kernels {
    isa: Isa::Scalar,
    gemm_q4: gemm::gemm_q4,
    gemm_q8: gemm::gemm_q8,
    panels_a_call: 1,
    few_tokens: None,
    scratch_bytes: 0,
    gemm_f32: gemm::gemm_dense::<f32>,
    gemm_f16: gemm::gemm_dense::<f16>,
    gemm_bf16: gemm::gemm_dense::<bf16>,
    quantize: phidias_quant::activations::quantize,
    rms_norm: norm::rms_norm,
    layer_norm: norm::layer_norm,
    rope,
    silu_mul,
    gegelu,
    quick_gelu: activation::quick_gelu_all,
    gelu: activation::gelu_all,
    attend_f32: attention::attend::<f32>,
    attend_f16: attention::attend::<f16>,
    attend_bf16: attention::attend::<bf16>,
    attend_i8: attention_i8::attend,
    merge: attention::merge,
};

fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (x, y) = (a[i], b[i]);
            a[i] = x * cos[i] - y * sin[i];
            b[i] = y * cos[i] + x * sin[i];
        }
    }
}

fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = u * (g / (1.0 + (-g).exp()));
    }
}

fn gegelu(x: &[f32], limit: f32, y: &mut [f32]) {
    let unless_infinite = |v: f32, clamped: f32| if v.is_infinite() { v } else { clamped };
    for (y, &[a, b]) in y.iter_mut().zip(x.as_chunks().0) {
        let a = unless_infinite(a, a.clamp(f32::NEG_INFINITY, limit));
        let b = unless_infinite(b, b.clamp(-limit, limit));
        *y = activation::quick_gelu(a) * (b + 1.0);
    }
}

/// A stored element and its exact value.
trait Element: Copy {
    /// The value, exactly.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for f16 {
    /// Shifting the exponent and mantissa into place leaves the value divided by 2^112, subnormals
    /// included; infinities and NaNs keep their exponent of all ones. No branch, so it vectorises.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7FFF) << 13) * f32::from_bits(0x7780_0000);
        let special = if bits & 0x7C00 == 0x7C00 {
            0x7F80_0000
        } else {
            0
        };
        f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
    }
}

/// Partial sums: sum `l` takes elements `l`, `l + 16`, ... and they are folded in halves.
const LANES: usize = 16;

/// The sum of the partial sums.
#[inline(always)]
fn fold(mut acc: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            acc[l] += acc[l + half];
        }
        half /= 2;
    }
    acc[0]
}

/// `<w, x>` in partial sums.
#[inline(always)]
fn dot<T: Element>(w: &[T], x: &[f32]) -> f32 {
    debug_assert_eq!(w.len(), x.len());
    let mut acc = [0.0; LANES];
    let (w_chunks, w_rest) = w.as_chunks::<LANES>();
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    for (w, x) in w_chunks.iter().zip(x_chunks) {
        for l in 0..LANES {
            acc[l] += w[l].widen() * x[l];
        }
    }
    for (l, (w, x)) in w_rest.iter().zip(x_rest).enumerate() {
        acc[l] += w.widen() * x;
    }
    fold(acc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let h = f16::from_bits(bits);
            assert_eq!(h.widen().is_nan(), h.is_nan(), "{bits:04x}");
            if !h.is_nan() {
                assert_eq!(h.widen().to_bits(), h.to_f32().to_bits(), "{bits:04x}");
            }
        }
    }

    #[test]
    fn fold_adds_every_lane_once() {
        assert_eq!(fold(std::array::from_fn(|l| (1 << l) as f32)), 65535.0);
    }
}
