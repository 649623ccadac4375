//! Kernels written once for every vector instruction set: sixteen floats at a time.
//!
//! [`Lanes`] is sixteen f32 in whatever registers an instruction set has: one of AVX-512, two of
//! AVX2, four of NEON. What is written on it computes in the same order everywhere, and as the
//! scalar twin does, but for the rounding of fused multiply-adds and of the exponential.
//!
//! The methods are plain functions that are inlined without exception, so that they compile to the
//! instructions of the function they are used in: one with `#[target_feature]`, in the folder of
//! the instruction set.
//!
//! # Safety
//! Values of a type that implements [`Lanes`] are made and used only in such functions, which are
//! reached through a table that exists only where the CPU has the features.

use phidias_quant::{bf16, f16};

pub(super) mod attention;
pub(super) mod attention_i8;
pub(super) mod dense;
pub(super) mod elementwise;
pub(super) mod quantize;

/// Floats in [`Lanes`].
pub(super) const LANES: usize = 16;

/// Sixteen f32.
pub(super) trait Lanes: Copy {
    /// All lanes `v`.
    fn splat(v: f32) -> Self;
    /// Lane `i` is `from[i]`.
    fn load(from: &[f32; LANES]) -> Self;
    /// Widened exactly.
    fn load_f16(from: &[f16; LANES]) -> Self;
    /// Widened exactly.
    fn load_bf16(from: &[bf16; LANES]) -> Self;
    /// Lane `i` of the first is `from[i][0]`, of the second `from[i][1]`.
    fn load_pairs(from: &[[f32; 2]; LANES]) -> [Self; 2];
    /// `to[i]` is lane `i`.
    fn store(self, to: &mut [f32; LANES]);
    /// `self + b`
    fn add(self, b: Self) -> Self;
    /// `self - b`
    fn sub(self, b: Self) -> Self;
    /// `self * b`
    fn mul(self, b: Self) -> Self;
    /// `self / b`
    fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded once.
    fn neg_mul_add(self, b: Self, c: Self) -> Self;
    /// The larger of each pair; `self` where it is a NaN.
    fn max(self, b: Self) -> Self;
    /// The smaller of each pair; `self` where it is a NaN.
    fn min(self, b: Self) -> Self;
    /// Magnitudes.
    fn abs(self) -> Self;
    /// `self` in the lanes where it is infinite, `other` elsewhere.
    fn infinite_or(self, other: Self) -> Self;
    /// `self * 2^n` for integral `n` in -250..=250, rounded once at most; too large is infinite.
    fn scale_by_power(self, n: Self) -> Self;
    /// `self * 2^n` for integral `n` up to 0, exactly; zero where `n` is less than -125.
    fn scale_down(self, n: Self) -> Self;
    /// `self` in the lanes `from..to`, `other` elsewhere.
    fn keep(self, from: usize, to: usize, other: Self) -> Self;
    /// Integral floats in -127..=127 as bytes.
    fn store_i8(self, to: &mut [i8; LANES]);
    /// Rounded to integers, ties to even, that are in -32767..=32767.
    fn store_i16(self, to: &mut [i16; LANES]);
    /// The sum: 16 -> 8 -> 4 -> 2 -> 1, lane `l` plus lane `l + half` each time.
    fn sum(self) -> f32;
    /// The largest lane; a NaN may be passed over.
    fn largest(self) -> f32;
}

/// Sixteen sums of products of 16-bit integers, each of 32 bits.
pub(super) trait Sums: Copy {
    /// What they become.
    type Floats: Lanes;
    /// Sixteen pairs of 16-bit integers.
    type Pairs: Copy;
    /// One pair, for all of them.
    type Pair: Copy;
    /// No products yet.
    fn zero() -> Self;
    /// Widened.
    fn load(from: &[[i8; 2]; LANES]) -> Self::Pairs;
    /// As it is.
    fn splat(pair: &[i16; 2]) -> Self::Pair;
    /// Lane `i` plus `a[i][0] * b[0] + a[i][1] * b[1]`.
    fn add_products(self, a: Self::Pairs, b: Self::Pair) -> Self;
    /// The sums, rounded.
    fn floats(self) -> Self::Floats;
}

/// An element of a matrix or of the KV cache that loads as f32.
pub(super) trait Load: Copy + Default {
    /// Sixteen of them, widened exactly.
    fn load<L: Lanes>(from: &[Self; LANES]) -> L;
}

impl Load for f32 {
    #[inline(always)]
    fn load<L: Lanes>(from: &[Self; LANES]) -> L {
        L::load(from)
    }
}

impl Load for f16 {
    #[inline(always)]
    fn load<L: Lanes>(from: &[Self; LANES]) -> L {
        L::load_f16(from)
    }
}

impl Load for bf16 {
    #[inline(always)]
    fn load<L: Lanes>(from: &[Self; LANES]) -> L {
        L::load_bf16(from)
    }
}

/// `x`, at most sixteen, padded with zeros.
#[inline(always)]
pub(super) fn padded<T: Copy + Default>(x: &[T]) -> [T; LANES] {
    let mut chunk = [T::default(); LANES];
    chunk[..x.len()].copy_from_slice(x);
    chunk
}

/// `e^x`, off by at most two units in the last place; from -87.3 down results are subnormal or zero.
///
/// `x = n ln 2 + r` with `|r| <= ln(2) / 2`, then the Taylor series of `e^r` to the seventh power
/// (what is left out is below `0.3466^8 / 8! = 5.2e-9`, a twelfth of a unit) and a multiplication by
/// `2^n`. `ln 2` is taken in two parts so that `r` keeps its digits (Cody & Waite 1980).
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    // Beyond these results are zero and infinite anyway; a NaN stays.
    let x = x.max(L::splat(-150.0)).min(L::splat(150.0));
    let (p, n) = exp_parts(x);
    p.scale_by_power(n)
}

/// `e^x` for `x` up to zero, as near; zero where it is less than 2^-125. A subnormal result can take a hundred
/// times as long as others, and here it is the factor of something that does not count.
#[inline(always)]
pub(super) fn exp_of_negative<L: Lanes>(x: L) -> L {
    let (p, n) = exp_parts(x);
    p.scale_down(n)
}

/// `e^r` and `n`.
#[inline(always)]
fn exp_parts<L: Lanes>(x: L) -> (L, L) {
    const LN2_HIGH: f32 = 0.693_145_75; // 15 bits: its products with n are exact
    const LN2_LOW: f32 = 1.428_606_8e-6;
    const MAGIC: f32 = 12_582_912.0;
    let magic = L::splat(MAGIC);
    let n = x
        .mul_add(L::splat(std::f32::consts::LOG2_E), magic)
        .sub(magic);
    let r = n.neg_mul_add(L::splat(LN2_HIGH), x);
    let r = n.neg_mul_add(L::splat(LN2_LOW), r);
    let mut p = L::splat(1.0 / 5040.0);
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p.mul_add(r, L::splat(c));
    }
    (p, n)
}

/// The table of an instruction set, `KERNELS`: the packed GEMMs given, everything else as written on
/// `$lanes` and compiled for `$features`. Tile sizes: rows x tokens of the dense GEMM, and those of
/// [`attention::attend`] and [`attention_i8::attend`], where one query has lanes or sums of its own.
macro_rules! vector_table {
    (
        $isa:expr, $features:literal, $lanes:ty,
        packed: $q4:path, $q8:path,
        dense: $rows:literal x $tokens:literal,
        attention: $($tile:literal),+; one query: $one:ty, $($tile1:literal),+
        attention of bytes: $features_i8:literal,
            $sums:ty, $($tile_i8:literal),+; one query: $one_i8:ty, $($tile1_i8:literal),+
    ) => {
        use crate::cpu::ahead::{Ahead, Nobody};
        use crate::cpu::attention::{
            Block, BlockI8, GROUP, IntegersMut, Partial, PartialMut, StateMut,
        };
        use crate::cpu::vector::{Load, attention, attention_i8, dense, elementwise, quantize};
        use crate::cpu::{Isa, Kernels};
        use crate::view::ColsMut;
        use phidias_quant::activations::TileMut;
        use phidias_quant::{bf16, f16};
        use std::ops::Range;

        /// The functions, also for the tables that take some of them over.
        pub(super) const KERNELS: Kernels = Kernels {
            isa: $isa,
            gemm_q4: $q4,
            gemm_q8: $q8,
            panels_a_call: 1,
            few_tokens: None,
            scratch_bytes: 0,
            gemm_f32: gemm_dense::<f32>,
            gemm_f16: gemm_dense::<f16>,
            gemm_bf16: gemm_dense::<bf16>,
            quantize,
            rms_norm,
            layer_norm,
            rope,
            silu_mul,
            gegelu,
            quick_gelu,
            gelu,
            attend_f32: attend::<f32>,
            attend_f16: attend::<f16>,
            attend_bf16: attend::<bf16>,
            attend_i8,
            merge,
        };

        #[target_feature(enable = $features)]
        fn gemm_dense<T: Load>(w: &[T], cols: usize, x: &[f32], y: ColsMut<'_>) {
            dense::gemm::<$lanes, T, $rows, $tokens>(w, cols, x, y);
        }

        #[target_feature(enable = $features)]
        fn quantize(x: &[f32], tile: &mut TileMut<'_>, row: usize) {
            quantize::quantize::<$lanes>(x, tile, row);
        }

        #[target_feature(enable = $features)]
        fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
            elementwise::rms_norm::<$lanes>(x, weight, eps, y);
        }

        #[target_feature(enable = $features)]
        fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
            elementwise::layer_norm::<$lanes>(x, weight, bias, eps, y);
        }

        #[target_feature(enable = $features)]
        fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
            elementwise::rope::<$lanes>(heads, cos, sin);
        }

        #[target_feature(enable = $features)]
        fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
            elementwise::silu_mul::<$lanes>(gate, up, y);
        }

        #[target_feature(enable = $features)]
        fn gegelu(x: &[f32], limit: f32, y: &mut [f32]) {
            elementwise::gegelu::<$lanes>(x, limit, y);
        }

        #[target_feature(enable = $features)]
        fn quick_gelu(x: &mut [f32]) {
            elementwise::quick_gelu::<$lanes>(x);
        }

        #[target_feature(enable = $features)]
        fn gelu(x: &mut [f32]) {
            elementwise::gelu::<$lanes>(x);
        }

        #[target_feature(enable = $features)]
        fn attend<T: Load>(
            block: Block<'_, T>,
            queries: &[f32],
            visible: &[Range<usize>],
            state: StateMut<'_>,
        ) {
            if visible.len() > GROUP {
                attention::attend::<$lanes, $one, T, $($tile),+, $($tile1),+>(
                    block, queries, visible, state, &mut Nobody,
                );
            } else if let Some(seen) = attention::hull(visible) {
                let spans = block.spans(seen);
                attention::attend::<$lanes, $one, T, $($tile),+, $($tile1),+>(
                    block, queries, visible, state, &mut Ahead::new(&spans),
                );
            }
        }

        #[target_feature(enable = $features_i8)]
        fn attend_i8(
            block: BlockI8<'_>,
            queries: &[f32],
            visible: &[Range<usize>],
            state: StateMut<'_>,
            integers: IntegersMut<'_>,
        ) {
            if visible.len() > GROUP {
                attention_i8::attend::<$sums, $one_i8, $($tile_i8),+, $($tile1_i8),+>(
                    block, queries, visible, state, integers, &mut Nobody,
                );
            } else if let Some(seen) = attention::hull(visible) {
                let spans = block.spans(seen);
                attention_i8::attend::<$sums, $one_i8, $($tile_i8),+, $($tile1_i8),+>(
                    block, queries, visible, state, integers, &mut Ahead::new(&spans),
                );
            }
        }

        #[target_feature(enable = $features)]
        fn merge(block: Partial<'_>, state: PartialMut<'_>) {
            attention::merge::<$lanes>(block, state);
        }
    };
}
pub(super) use vector_table;
