//! One suite for every table: each kernel against exact arithmetic, and against its scalar twin.
//!
//! A new table needs no change here: the suite runs whatever [`Isa::ALL`] lists and this CPU has.
//!
//! # Bounds
//! `u = 2^-24` is half a unit in the last place of 1 in f32. A sum of products in which each product
//! takes part in at most `n` roundings is off by at most `gamma(n) * sum |terms|`, with
//! `gamma(n) = n u / (1 - n u)` (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed.,
//! section 3.1), in any order and with or without fused multiply-add. The references compute in f64,
//! whose roundings are 2^-29 of this and vanish in the last digit of a bound. Results below the
//! smallest normal number lose up to 2^-150 a step instead; [`TINY`] covers that.
//!
//! A table against scalar: each is within its bound of the truth, so they are within two of them of
//! each other; this follows and needs no test of its own. What is *exact* by contract (quantized
//! activations, the integer part of packed GEMMs) is compared bit by bit.
//!
//! A bound that cannot fail is not a test: every family shows that a mistake somebody could make
//! (one nibble, a forgotten zero point, a window off by one, a missing factor) breaks its bound.

mod guard;

use super::activation::{DENOMINATOR, NUMERATOR, RATIO_ERROR};
use super::attention::{most_of_query, step};
use super::{AttentionState, AttentionTask, Cached, Isa, KEY_PANEL, Kernels, THEN};
use crate::view::{ColsMut, Dense, Elements};
use guard::{guarded, page_end};
use phidias_quant::activations::{self, Activations, MAGIC, TILE};
use phidias_quant::packed::{PANEL_ROWS, pack_panel};
use phidias_quant::{AlignedBytes, BLOCK, Format, Packed, PackedLayout, bf16, f16};
use std::collections::HashSet;
use std::io::Write;
use std::ops::Range;
use std::sync::Once;

/// Half a unit in the last place of 1.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// Far below anything that matters, far above what a few thousand subnormal roundings can lose.
const TINY: f64 = 1e-39;
/// What an exponential may be off by, relatively: two units in the last place.
const EXP: f64 = 4.0 * U;

fn gamma(n: usize) -> f64 {
    let n = n as f64 * U;
    n / (1.0 - n)
}

/// Every table this CPU can run; says which it cannot.
fn tables() -> impl Iterator<Item = &'static Kernels> {
    static REPORT: Once = Once::new();
    REPORT.call_once(|| {
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
            // Written past the test harness, which swallows what a passing test prints.
            let _ = writeln!(
                std::io::stderr(),
                "\n=== SKIPPED: the kernels for {isa} are not tested, this CPU cannot run them ===\n"
            );
        }
    });
    let tables = Isa::ALL.into_iter().filter_map(Kernels::for_isa);
    #[cfg(target_arch = "x86_64")]
    return (tables.chain(super::avx2::vnni_twin())).chain(super::avx512::other_table());
    #[cfg(not(target_arch = "x86_64"))]
    tables
}

#[test]
fn every_table_has_its_own_name_and_the_plain_one_runs_everywhere() {
    for (i, isa) in Isa::ALL.into_iter().enumerate() {
        assert_eq!(isa.name().parse(), Ok(isa));
        assert_eq!(
            Isa::ALL.iter().position(|other| other.name() == isa.name()),
            Some(i)
        );
        if let Some(table) = Kernels::for_isa(isa) {
            assert_eq!(table.isa(), isa);
        }
    }
    assert!(Isa::Scalar.is_available() && "mmx".parse::<Isa>().is_err());
    assert!(tables().any(|k| std::ptr::eq(k, Kernels::best())));
}

/// SplitMix64 (Steele, Lea & Flood 2014).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// Uniform in -1..1.
    fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    fn values(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.value() * size).collect()
    }
}

/// What matrices and rows are filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Zeros,
    Random,
    /// Everything at its largest and of one sign: the largest sums there can be.
    SameSign,
    /// The same with alternating signs.
    Alternating,
    /// Subnormal, and as small as f16 scales go.
    Subnormal,
}

const FILLS: [Fill; 5] = [
    Fill::Zeros,
    Fill::Random,
    Fill::SameSign,
    Fill::Alternating,
    Fill::Subnormal,
];

impl Fill {
    fn values(self, random: &mut Random, n: usize, largest: f32, smallest: f32) -> Vec<f32> {
        let sign = |i: usize| if i.is_multiple_of(2) { 1.0 } else { -1.0 };
        match self {
            Self::Zeros => vec![0.0; n],
            Self::Random => random.values(n, 1.0),
            Self::SameSign => vec![largest; n],
            Self::Alternating => (0..n).map(|i| largest * sign(i)).collect(),
            Self::Subnormal => random.values(n, smallest),
        }
    }
}

/// A value as a matrix or the KV cache stores it.
trait Stored: Copy + std::fmt::Debug + 'static {
    const NAN: Self;
    fn narrow(v: f32) -> Self;
    fn exact(self) -> f64;
    fn elements(s: &[Self]) -> Elements<'_>;
    /// As the cache stores it; only bytes have steps.
    fn cached<'a>(s: &'a [Self], _: &'a [f32]) -> Cached<'a> {
        Cached::Floats(Self::elements(s))
    }
    /// How many elements of a key, and of how many values, lie side by side in the cache.
    const SIDE_BY_SIDE: usize = 1;
    /// A query as the kernels multiply it.
    fn query(query: &[f32]) -> Vec<f64> {
        query.iter().map(|q| f64::from(*q)).collect()
    }
    /// Where the table's attention on such a cache is.
    fn attend(k: &Kernels) -> usize;
}

impl Stored for f32 {
    const NAN: Self = Self::NAN;
    fn narrow(v: f32) -> Self {
        v
    }
    fn exact(self) -> f64 {
        f64::from(self)
    }
    fn elements(s: &[Self]) -> Elements<'_> {
        Elements::F32(s)
    }
    fn attend(k: &Kernels) -> usize {
        k.attend_f32 as usize
    }
}

impl Stored for f16 {
    const NAN: Self = Self::NAN;
    fn narrow(v: f32) -> Self {
        Self::from_f32(v)
    }
    fn exact(self) -> f64 {
        self.to_f64()
    }
    fn elements(s: &[Self]) -> Elements<'_> {
        Elements::F16(s)
    }
    fn attend(k: &Kernels) -> usize {
        k.attend_f16 as usize
    }
}

impl Stored for bf16 {
    const NAN: Self = Self::NAN;
    fn narrow(v: f32) -> Self {
        Self::from_f32(v)
    }
    fn exact(self) -> f64 {
        self.to_f64()
    }
    fn elements(s: &[Self]) -> Elements<'_> {
        Elements::Bf16(s)
    }
    fn attend(k: &Kernels) -> usize {
        k.attend_bf16 as usize
    }
}

/// What the cache holds besides floats: bytes, times a step that the scene draws for each key.
impl Stored for i8 {
    const NAN: Self = 77;
    fn narrow(v: f32) -> Self {
        (v * 40.0).round().clamp(-127.0, 127.0) as Self
    }
    fn exact(self) -> f64 {
        f64::from(self)
    }
    fn elements(_: &[Self]) -> Elements<'_> {
        unreachable!("matrices are not stored so")
    }
    fn cached<'a>(quants: &'a [Self], steps: &'a [f32]) -> Cached<'a> {
        Cached::I8 { quants, steps }
    }
    const SIDE_BY_SIDE: usize = 2;
    /// Rounded to integers, which is part of the definition, as all tables do it bit for bit.
    fn query(query: &[f32]) -> Vec<f64> {
        let most = most_of_query(query.len());
        let step = step(query.iter().fold(0.0, |m, q| m.max(q.abs())), most);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        (query.iter())
            .map(|q| f64::from((q * inverse).round_ties_even()) * f64::from(step))
            .collect()
    }
    fn attend(k: &Kernels) -> usize {
        k.attend_i8 as usize
    }
}

fn narrow<T: Stored>(values: &[f32]) -> Vec<T> {
    let values: Vec<T> = values.iter().map(|v| T::narrow(*v)).collect();
    page_end(&values)
}

/// A value and how far a kernel may be from it.
#[derive(Clone, Copy, Debug)]
struct Expected {
    value: f64,
    bound: f64,
}

impl Expected {
    /// Whether `got` may stand for it.
    fn admits(self, got: f32) -> bool {
        // Not `>`: a NaN is never admitted.
        (f64::from(got) - self.value).abs() <= self.bound
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

const SMALL_COLS: [usize; 11] = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97];
const SMALL_ROWS: [usize; 6] = [1, 15, 16, 17, 32, 33];
/// Around the groups and the tiles of the GEMMs.
const TOKENS: [usize; 9] = [1, 2, 4, 5, 17, 31, 32, 33, 67];

// ------------------------------------------------------------------------------ packed GEMM

/// A packed matrix whose bytes end at a guard page.
struct Weights {
    layout: PackedLayout,
    bytes: AlignedBytes,
}

impl Weights {
    fn new(format: Format, rows: usize, cols: usize, w: &[f32]) -> Self {
        let layout = PackedLayout::new(format, rows, cols).unwrap();
        let mut bytes = guarded(|| AlignedBytes::try_zeroed(layout.bytes()).unwrap());
        for (rows, out) in w
            .chunks(PANEL_ROWS * cols)
            .zip(bytes.as_mut().chunks_mut(layout.panel_bytes()))
        {
            pack_panel(&layout, rows, out).unwrap();
        }
        Self { layout, bytes }
    }

    fn view(&self) -> Packed<'_> {
        Packed::new(self.layout, self.bytes.as_ref()).unwrap()
    }

    /// The quant of row `r`, column `c` as it is stored.
    fn quant_at(&self, r: usize, c: usize) -> (usize, u32) {
        let (panel, r) = (r / PANEL_ROWS, r % PANEL_ROWS);
        let (b, i) = (c / BLOCK, c % BLOCK);
        let of_block = self.layout.format().block_bytes();
        // A line of scales before every second block.
        let block = panel * self.layout.panel_bytes() + (b / 2 + 1) * 64 + b * of_block;
        match self.layout.format() {
            Format::Q8 => (block + i / 4 * 64 + r * 4 + i % 4, 0),
            Format::Q4 => (block + i % 16 / 4 * 64 + r * 4 + i % 4, i as u32 / 16 * 4),
        }
    }

    /// Where the scale of a block is stored.
    fn place_of_scale(&self, row: usize, block: usize) -> usize {
        row / PANEL_ROWS * self.layout.panel_bytes()
            + block / 2 * (64 + 2 * self.layout.format().block_bytes())
            + (block % 2 * PANEL_ROWS + row % PANEL_ROWS) * 2
    }

    /// The scale of a block.
    fn scale_at(&self, row: usize, block: usize) -> f16 {
        let at = self.place_of_scale(row, block);
        f16::from_le_bytes([self.bytes.as_ref()[at], self.bytes.as_ref()[at + 1]])
    }

    /// Makes the scale of a block NaN.
    fn spoil(&mut self, row: usize, block: usize) {
        let at = self.place_of_scale(row, block);
        self.bytes.as_mut()[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes());
    }
}

/// Rows of activations for a format, by the definition, every buffer at a guard page.
fn activations(format: Format, x: &[f32], rows: usize, cols: usize) -> Activations {
    guarded(|| {
        let mut quantized = Activations::default();
        quantized.reshape(rows, cols, format.zero());
        for (mut tile, x) in quantized.tiles_mut().zip(x.chunks(TILE * cols)) {
            for (r, x) in x.chunks_exact(cols).enumerate() {
                activations::quantize(x, &mut tile, r);
            }
        }
        quantized
    })
}

/// Dequantize, then multiply, `[rows][tokens]`.
///
/// A block's term is `I * sx * sw` with an exact integer `|I| <= 32 * 128 * 127 < 2^24` and a power
/// of two `sx`: one rounding, then one for each of the `B` additions it takes part in.
fn packed_reference(w: Packed<'_>, x: &Activations) -> Vec<Vec<Expected>> {
    let (rows, cols) = (w.layout().rows(), w.layout().cols());
    let mut weights = vec![0.0; cols];
    let factor = gamma(x.blocks() + 1);
    (0..rows)
        .map(|r| {
            w.dequantize_row(r, &mut weights);
            (0..x.rows())
                .map(|t| {
                    let (mut value, mut size) = (0.0, 0.0f64);
                    for (b, w) in weights.chunks(BLOCK).enumerate() {
                        let a = x.block(t, b);
                        let term: f64 = (w.iter().zip(a.quants))
                            .map(|(w, q)| f64::from(*w) * f64::from(*q) * f64::from(a.scale))
                            .sum();
                        value += term;
                        size += term.abs();
                    }
                    // The reference sums a block's products in f64, the kernel has them exact.
                    let tiny = TINY * x.blocks() as f64;
                    let bound = factor * size + tiny;
                    Expected { value, bound }
                })
                .collect()
        })
        .collect()
}

/// All panels at once, `[tokens, rows]`.
fn gemm_packed(k: &Kernels, w: Packed<'_>, x: &Activations) -> Vec<f32> {
    let (n, rows) = (x.rows(), w.layout().rows());
    let mut y = page_end(&vec![f32::NAN; n * rows]);
    k.gemm_packed(w, 0..w.layout().panels(), x, ColsMut::new(&mut y, n, rows));
    y
}

fn check_packed(k: &Kernels, w: &Weights, x: &Activations, what: &str) {
    let y = gemm_packed(k, w.view(), x);
    let rows = w.layout.rows();
    for (r, row) in packed_reference(w.view(), x).iter().enumerate() {
        for (t, expected) in row.iter().enumerate() {
            let got = y[t * rows + r];
            assert!(
                expected.admits(got),
                "{} {} row {r} token {t}, {what}: {got:e} for {expected:?}",
                k.isa(),
                w.layout.format().name()
            );
        }
    }
}

/// Weights as large as the format takes, activations as large as the sums stay finite with.
fn packed_case(
    random: &mut Random,
    format: Format,
    (rows, cols, tokens): (usize, usize, usize),
    (w, x): (Fill, Fill),
) -> (Weights, Activations) {
    let largest = match format {
        Format::Q4 => 3.0e5,
        Format::Q8 => 8.0e6,
    };
    let w = w.values(random, rows * cols, largest, 3e-6);
    let x = x.values(random, tokens * cols, 1e25, 1e-41);
    (
        Weights::new(format, rows, cols, &w),
        activations(format, &x, tokens, cols),
    )
}

const FORMATS: [Format; 2] = [Format::Q4, Format::Q8];

#[test]
fn gemm_packed_on_every_small_shape() {
    for k in tables() {
        let mut random = Random(1);
        for format in FORMATS {
            for cols in SMALL_COLS {
                for rows in SMALL_ROWS {
                    for tokens in TOKENS {
                        let fills = (Fill::Random, Fill::Random);
                        let (w, x) = packed_case(&mut random, format, (rows, cols, tokens), fills);
                        check_packed(k, &w, &x, &format!("{rows} x {cols}, {tokens} tokens"));
                    }
                }
            }
        }
    }
}

#[test]
fn gemm_packed_on_zeros_and_extremes() {
    for k in tables() {
        let mut random = Random(2);
        for format in FORMATS {
            for w_fill in FILLS {
                for x_fill in FILLS {
                    let shape = (17, 97, 3);
                    let (w, x) = packed_case(&mut random, format, shape, (w_fill, x_fill));
                    check_packed(
                        k,
                        &w,
                        &x,
                        &format!("weights {w_fill:?}, activations {x_fill:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn gemm_packed_on_shapes_of_real_models() {
    for k in tables() {
        let mut random = Random(3);
        for format in FORMATS {
            for (rows, cols, tokens) in [
                (48, 3072, 1),
                (48, 3072, 17),
                (16, 8192, 2),
                (40, 5120, 5),
                (32, 3072, 3),
                (32, 3072, 127),
                (32, 3072, 128),
                (32, 3072, 130),
            ] {
                let fills = (Fill::Random, Fill::Random);
                let (w, x) = packed_case(&mut random, format, (rows, cols, tokens), fills);
                check_packed(k, &w, &x, &format!("{rows} x {cols}, {tokens} tokens"));
            }
        }
    }
}

/// One quant off by one step, and a zero point that was not taken out, must both be noticed.
#[test]
fn gemm_packed_bound_notices_one_quant_and_the_zero_point() {
    for k in tables() {
        let mut random = Random(4);
        for format in FORMATS {
            for cols in [31, 97, 3072] {
                let fills = (Fill::Random, Fill::Random);
                let (mut w, x) = packed_case(&mut random, format, (17, cols, 2), fills);
                let y = gemm_packed(k, w.view(), &x);
                let right = packed_reference(w.view(), &x);
                assert!(right[16][1].admits(y[17 + 16]));
                // The column with the largest quant, in the last row.
                let quant = |c: &usize| x.block(1, c / BLOCK).quants[c % BLOCK].unsigned_abs();
                let column = (0..cols).max_by_key(quant).unwrap();
                let (at, shift) = w.quant_at(16, column);
                let byte = &mut w.bytes.as_mut()[at];
                *byte ^= 1 << shift;
                let wrong = packed_reference(w.view(), &x);
                assert!(
                    !wrong[16][1].admits(y[17 + 16]),
                    "{} {format:?} {cols}",
                    k.isa()
                );
                assert!(wrong[15][1].admits(y[17 + 15]), "only that row changed");
                // What the sum is when zero * (sum of activations) stays in it.
                let forgotten: f64 = (0..x.blocks())
                    .map(|b| {
                        let scale = w.scale_at(16, b).to_f64();
                        let a = x.block(1, b);
                        f64::from(format.zero() * a.sum) * scale * f64::from(a.scale)
                    })
                    .sum();
                let value = right[16][1].value + forgotten;
                let wrong = Expected {
                    value,
                    ..right[16][1]
                };
                assert!(!wrong.admits(y[17 + 16]), "{} {format:?} {cols}", k.isa());
            }
        }
    }
}

#[test]
fn gemm_packed_row_is_the_same_whatever_is_beside_it() {
    for k in tables() {
        let mut random = Random(5);
        for format in FORMATS {
            for (rows, cols, tokens) in [(49, 97, 17), (33, 3072, 5), (80, 64, 9), (33, 97, 70)] {
                let x_values = random.values(tokens * cols, 1.0);
                let w_values = random.values(rows * cols, 1.0);
                let w = Weights::new(format, rows, cols, &w_values);
                let whole = gemm_packed(k, w.view(), &activations(format, &x_values, tokens, cols));
                let panels = w.layout.panels();
                for range in [0..1, 1..panels, panels - 1..panels, 1..1] {
                    for tokens in [0..tokens, 0..1, 1..3, tokens - 1..tokens] {
                        let x = &x_values[tokens.start * cols..tokens.end * cols];
                        let x = activations(format, x, tokens.len(), cols);
                        // The range is written into the middle of a result with a border of
                        // sentinels, which must survive.
                        let columns = range.start * PANEL_ROWS..(range.end * PANEL_ROWS).min(rows);
                        let width = columns.len() + 2;
                        let mut y = page_end(&vec![-7.5; tokens.len() * width]);
                        let (_, rest) = ColsMut::new(&mut y, tokens.len(), width).split_at(1);
                        let (middle, _) = rest.split_at(columns.len());
                        k.gemm_packed(w.view(), range.clone(), &x, middle);
                        for (t, row) in tokens.clone().zip(y.chunks_exact(width)) {
                            let want = &whole[t * rows..][..rows][columns.clone()];
                            assert_eq!(
                                bits(&row[1..width - 1]),
                                bits(want),
                                "{} {format:?} panels {range:?} token {t}",
                                k.isa()
                            );
                            assert_eq!((row[0], row[width - 1]), (-7.5, -7.5), "written outside");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn gemm_packed_does_not_hide_a_nan() {
    for k in tables() {
        for format in FORMATS {
            let (rows, cols, tokens) = (33, 97, 5);
            for (x_fill, block) in [(Fill::Random, 0), (Fill::Random, 3), (Fill::Zeros, 1)] {
                let mut random = Random(6);
                let (mut w, x) = packed_case(
                    &mut random,
                    format,
                    (rows, cols, tokens),
                    (Fill::Random, x_fill),
                );
                w.spoil(18, block);
                let y = gemm_packed(k, w.view(), &x);
                for (i, v) in y.iter().enumerate() {
                    let spoiled = i % rows == 18;
                    assert_eq!(
                        v.is_nan(),
                        spoiled,
                        "{} {format:?} row {}",
                        k.isa(),
                        i % rows
                    );
                }
            }
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for column in [0, 40, 96] {
                    let mut random = Random(7);
                    let w = random.values(rows * cols, 1.0);
                    let mut x = random.values(tokens * cols, 1.0);
                    x[3 * cols + column] = bad;
                    let y = gemm_packed(
                        k,
                        Weights::new(format, rows, cols, &w).view(),
                        &activations(format, &x, tokens, cols),
                    );
                    for (i, v) in y.iter().enumerate() {
                        let spoiled = i / rows == 3;
                        assert_eq!(
                            v.is_nan(),
                            spoiled,
                            "{} {format:?} token {}",
                            k.isa(),
                            i / rows
                        );
                    }
                }
            }
        }
    }
}

/// What the vendor of the CPU decides, several panels together or each alone, is a matter of speed: both give what a
/// panel alone gives, with every number of tokens that has a loop of its own.
#[test]
fn gemm_packed_of_panels_together_is_that_of_each_alone() {
    for k in tables() {
        let mut random = Random(23);
        for format in FORMATS {
            for (rows, cols) in [(70, 97), (130, 64), (9 * 16, 3072)] {
                let w = Weights::new(format, rows, cols, &random.values(rows * cols, 1.0));
                let all = random.values(20 * cols, 1.0);
                for n in (1..=20).filter(|n| cols < 100 || n % 3 == 0) {
                    let x = activations(format, &all[..n * cols], n, cols);
                    let mut alone = vec![f32::NAN; n * rows];
                    let mut rest = ColsMut::new(&mut alone, n, rows);
                    for p in 0..w.layout.panels() {
                        let width = PANEL_ROWS.min(rows - p * PANEL_ROWS);
                        let (panel, others) = rest.split_at(width);
                        k.gemm_packed(w.view(), p..p + 1, &x, panel);
                        rest = others;
                    }
                    for several in [true, false] {
                        #[cfg(target_arch = "x86_64")]
                        super::prefetch::choose(several);
                        let together = gemm_packed(k, w.view(), &x);
                        assert!(
                            bits(&together) == bits(&alone),
                            "{} {format:?} {rows} x {cols}, {n} tokens, {several}",
                            k.isa()
                        );
                    }
                }
            }
        }
    }
}

/// Tiles change how the products of a block are made, not what they are: the results are those of AVX-512, bit for
/// bit, for few tokens and many, whatever the scales.
#[test]
fn gemm_packed_in_tiles_is_that_of_avx512_bit_for_bit() {
    match [Isa::Amx, Isa::Avx512].map(Kernels::for_isa) {
        [Some(tiles), Some(plain)] => gemm_packed_has_the_bits_of(tiles, plain),
        _ => tables().for_each(drop), // says what is skipped
    }
}

/// Nor does it matter whether a block of one panel meets eight tokens, or that of two panels all of them.
#[test]
#[cfg(target_arch = "x86_64")]
fn gemm_packed_of_pairs_of_panels_is_that_of_one_bit_for_bit() {
    match [Kernels::for_isa(Isa::Avx512), super::avx512::other_table()] {
        [Some(used), Some(other)] => gemm_packed_has_the_bits_of(used, other),
        _ => tables().for_each(drop),
    }
}

fn gemm_packed_has_the_bits_of(table: &Kernels, another: &Kernels) {
    let check = |w: &Weights, x: &Activations, panels: Range<usize>, what: &str| {
        let (rows, n) = (w.layout.rows(), x.rows());
        let width = (panels.end * PANEL_ROWS).min(rows) - panels.start * PANEL_ROWS;
        let [got, want] = [table, another].map(|k| {
            let mut y = page_end(&vec![f32::NAN; n * width]);
            let cols = ColsMut::new(&mut y, n, width);
            k.gemm_packed(w.view(), panels.clone(), x, cols);
            // Which NaN it is says nothing.
            let bits = |v: &f32| if v.is_nan() { u32::MAX } else { v.to_bits() };
            y.iter().map(bits).collect::<Vec<_>>()
        });
        assert!(
            got == want,
            "{rows} x {}, {n} tokens, panels {panels:?}, {what}",
            w.layout.cols()
        );
    };
    let mut random = Random(18);
    for format in FORMATS {
        // Odd blocks, whole pieces of eight, and what is left of them; rows that are not whole panels.
        for (rows, cols) in [(1, 1), (17, 97), (33, 256), (49, 31 * 32 + 5), (70, 520)] {
            let w = Weights::new(format, rows, cols, &random.values(rows * cols, 1.0));
            let all = random.values(80 * cols, 1.0);
            for n in 1..=80 {
                let x = activations(format, &all[..n * cols], n, cols);
                let panels = w.layout.panels();
                check(&w, &x, 0..panels, "random");
                let some = n % panels..panels - n / 3 % (panels - n % panels);
                check(&w, &x, some, "random, some panels");
            }
        }
        // From here on enough tokens for tiles, and in a last tile fewer than it has lines.
        // More than are taken at once: 512 tokens, or 128, and 32 panels.
        for (rows, cols, n) in [(33 * 16 + 3, 40, 70), (20, 300, 515), (33, 64, 1041)] {
            let (w, x) = packed_case(
                &mut random,
                format,
                (rows, cols, n),
                (Fill::Random, Fill::Random),
            );
            check(&w, &x, 0..w.layout.panels(), "more than once");
        }
        for w_fill in FILLS {
            for x_fill in FILLS {
                let (w, x) = packed_case(&mut random, format, (35, 330, 77), (w_fill, x_fill));
                check(
                    &w,
                    &x,
                    0..3,
                    &format!("weights {w_fill:?}, activations {x_fill:?}"),
                );
            }
        }
        // Every scale there is: tiny and large blocks beside each other, and some that are NaN.
        let (rows, cols, n) = (33, 9 * 32 + 3, 75);
        let mut w: Vec<_> = random.values(rows * cols, 1.0);
        for (i, v) in w.iter_mut().enumerate() {
            *v *= 2f32.powi((i / 29 % 30) as i32 - 22);
        }
        let mut x = random.values(n * cols, 1.0);
        for (i, v) in x.iter_mut().enumerate() {
            *v *= 2f32.powi((i / 31 % 235) as i32 - 128);
        }
        for at in [3, 77, 20 * cols + 40, (n - 1) * cols] {
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][at % 3];
        }
        let mut w = Weights::new(format, rows, cols, &w);
        let x = activations(format, &x, n, cols);
        check(&w, &x, 0..3, "all scales");
        w.spoil(5, 2);
        w.spoil(32, 9);
        check(&w, &x, 0..3, "all scales, and NaN");
        // As long as rows of the model are.
        let (w, x) = packed_case(
            &mut random,
            format,
            (48, 3072, 130),
            (Fill::Random, Fill::Random),
        );
        check(&w, &x, 0..3, "long rows");
    }
}

// ------------------------------------------------------------------------------- dense GEMM

/// Roundings that a product takes part in when its sum has 16 partial sums: its own, those of its
/// partial sum, four of the folding. More partial sums only make it fewer.
fn dot_roundings(cols: usize) -> usize {
    cols.div_ceil(16) + 5
}

fn dot<T: Stored>(w: &[T], x: &[f32]) -> Expected {
    let terms = w.iter().zip(x).map(|(w, x)| w.exact() * f64::from(*x));
    let (value, size) = terms.fold((0.0, 0.0), |(v, s), t| (v + t, s + t.abs()));
    Expected {
        value,
        bound: gamma(dot_roundings(w.len())) * size + TINY,
    }
}

fn gemm_dense<T: Stored>(k: &Kernels, w: &[T], rows: usize, cols: usize, x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / cols;
    let mut y = page_end(&vec![f32::NAN; tokens * rows]);
    let w = Dense::new(rows, cols, T::elements(w));
    k.gemm_dense(w, 0..rows, x, ColsMut::new(&mut y, tokens, rows));
    y
}

fn check_dense<T: Stored>(k: &Kernels, w: &[T], rows: usize, cols: usize, x: &[f32], what: &str) {
    let y = gemm_dense(k, w, rows, cols, x);
    for (t, x) in x.chunks_exact(cols).enumerate() {
        for (r, w) in w.chunks_exact(cols).enumerate() {
            let (expected, got) = (dot(w, x), y[t * rows + r]);
            assert!(
                expected.admits(got),
                "{} {rows} x {cols} row {r} token {t}, {what}: {got:e} for {expected:?}",
                k.isa()
            );
        }
    }
}

fn dense_suite<T: Stored>() {
    let what = std::any::type_name::<T>();
    for k in tables() {
        let mut random = Random(8);
        for cols in SMALL_COLS.into_iter().chain([15, 16, 17]) {
            for rows in SMALL_ROWS {
                for tokens in TOKENS {
                    let w: Vec<T> = narrow(&random.values(rows * cols, 1.0));
                    let x = page_end(&random.values(tokens * cols, 1.0));
                    check_dense(k, &w, rows, cols, &x, what);
                }
            }
        }
        // The last: more than one block of tokens, rows and columns, and what is left of each.
        for (rows, cols, tokens) in [(19, 3072, 1), (16, 3072, 5), (4, 8192, 2), (19, 1100, 35)] {
            let w: Vec<T> = narrow(&random.values(rows * cols, 1.0));
            let x = page_end(&random.values(tokens * cols, 1.0));
            check_dense(k, &w, rows, cols, &x, what);
        }
        for w_fill in FILLS {
            for x_fill in FILLS {
                // 65000 and 6e-6 have f16s; the sums stay finite and the products may underflow.
                let w: Vec<T> = narrow(&w_fill.values(&mut random, 5 * 33, 65000.0, 6e-6));
                let x = page_end(&x_fill.values(&mut random, 3 * 33, 1e31, 1e-38));
                check_dense(k, &w, 5, 33, &x, what);
            }
        }
        dense_bound_notices::<T>(k, &mut random);
        dense_row_is_the_same_whatever_is_beside_it::<T>(k, &mut random);
        dense_does_not_hide::<T>(k, &mut random);
    }
}

/// A column left out, in every row; and activations rounded to bf16 on the way, which moves a sum of
/// thousands of products by two of its bounds or so, up or down: not in every row, but in one of eight.
fn dense_bound_notices<T: Stored>(k: &Kernels, random: &mut Random) {
    for cols in [17, 97, 3072] {
        let mut noticed = false;
        for _ in 0..8 {
            let (mut w, mut x) = (random.values(cols, 1.0), random.values(cols, 1.0));
            (w[cols - 1], x[cols - 1]) = (1.0, 1.0);
            let w: Vec<T> = narrow(&w);
            let y = gemm_dense(k, &w, 1, cols, &x)[0];
            assert!(dot(&w, &x).admits(y));
            assert!(
                !dot(&w[..cols - 1], &x[..cols - 1]).admits(y),
                "{cols} columns"
            );
            let rounded: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            noticed |= !dot(&w, &rounded).admits(y);
        }
        assert!(noticed, "{cols} columns in bf16");
    }
}

fn dense_row_is_the_same_whatever_is_beside_it<T: Stored>(k: &Kernels, random: &mut Random) {
    for (rows, cols, tokens) in [(37, 97, 17), (20, 3072, 5), (21, 1100, 39)] {
        let w: Vec<T> = narrow(&random.values(rows * cols, 1.0));
        let x = random.values(tokens * cols, 1.0);
        let whole = gemm_dense(k, &w, rows, cols, &x);
        for range in [0..1, 1..rows, 3..16, rows - 1..rows, 2..2] {
            for tokens in [0..tokens, 0..1, 1..3, tokens - 1..tokens] {
                let x = page_end(&x[tokens.start * cols..tokens.end * cols]);
                let width = range.len() + 2;
                let mut y = page_end(&vec![-7.5; tokens.len() * width]);
                let (_, rest) = ColsMut::new(&mut y, tokens.len(), width).split_at(1);
                let (middle, _) = rest.split_at(range.len());
                let matrix = Dense::new(rows, cols, T::elements(&w));
                k.gemm_dense(matrix, range.clone(), &x, middle);
                for (t, row) in tokens.clone().zip(y.chunks_exact(width)) {
                    let want = &whole[t * rows..][..rows][range.clone()];
                    assert_eq!(
                        bits(&row[1..width - 1]),
                        bits(want),
                        "{} rows {range:?} token {t}",
                        k.isa()
                    );
                    assert_eq!((row[0], row[width - 1]), (-7.5, -7.5), "written outside");
                }
            }
        }
    }
}

fn dense_does_not_hide<T: Stored>(k: &Kernels, random: &mut Random) {
    let (rows, cols, tokens) = (5, 37, 4);
    let clean: Vec<T> = narrow(&random.values(rows * cols, 1.0));
    for column in [0, 20, 36] {
        let mut w = clean.clone();
        w[2 * cols + column] = T::NAN;
        let x = vec![0.0; tokens * cols];
        for (i, v) in gemm_dense(k, &w, rows, cols, &x).iter().enumerate() {
            assert_eq!(v.is_nan(), i % rows == 2, "{} row {}", k.isa(), i % rows);
        }
        let mut x = random.values(tokens * cols, 1.0);
        x[cols + column] = f32::NAN;
        x[2 * cols + column] = f32::INFINITY;
        for (i, v) in gemm_dense(k, &clean, rows, cols, &x).iter().enumerate() {
            let (nan, infinite) = (i / rows == 1, i / rows == 2);
            assert_eq!(
                (v.is_nan(), v.is_infinite()),
                (nan, infinite),
                "{} token {}",
                k.isa(),
                i / rows
            );
        }
    }
}

#[test]
fn gemm_dense_f32() {
    dense_suite::<f32>();
}

#[test]
fn gemm_dense_f16() {
    dense_suite::<f16>();
}

#[test]
fn gemm_dense_bf16() {
    dense_suite::<bf16>();
}

// --------------------------------------------------------------------------------- quantize

/// Every table gives the bytes, sums and scales of the definition, bit for bit.
#[test]
fn quantize_is_the_definition() {
    for k in tables() {
        let mut random = Random(9);
        let mut rows: Vec<Vec<f32>> = Vec::new();
        for cols in SMALL_COLS.into_iter().chain([3072, 8192]) {
            rows.extend(FILLS.map(|f| f.values(&mut random, cols, f32::MAX, 1e-40)));
            // Ties: with amax 127 the step is exactly 1, and halves go to the even neighbour.
            let mut ties: Vec<f32> = (0..cols).map(|i| (i % 200) as f32 - 100.5).collect();
            ties[0] = 127.0;
            rows.push(ties);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = random.values(cols, 1.0);
                row[random.bits() as usize % cols] = bad;
                rows.push(row);
            }
            // Signed zeros and one lonely value among them.
            let mut row = vec![-0.0; cols];
            row[cols - 1] = -3.0;
            rows.push(row);
        }
        for x in rows {
            let x = page_end(&x);
            for format in FORMATS {
                let want = activations(format, &x, 1, x.len());
                let got = guarded(|| {
                    let mut out = Activations::default();
                    out.reshape(1, x.len(), format.zero());
                    let mut tile = out.tiles_mut().next().unwrap();
                    // What an earlier, larger use left behind must not show.
                    tile.quants.fill(-1);
                    tile.magics.fill(-1.0);
                    tile.starts.fill(-1);
                    k.quantize(&x, &mut tile, 0);
                    out
                });
                let (got, want) = (got.tile(0), want.tile(0));
                assert_eq!(got.quants, want.quants, "{} {} values", k.isa(), x.len());
                for b in 0..want.magics.len() {
                    let (a, b, starts) = (
                        got.magics[b],
                        want.magics[b],
                        [got.starts[b], want.starts[b]],
                    );
                    let same = a.to_bits() == b.to_bits() && starts[0] == starts[1];
                    let nan = |start: i32| f32::from_bits(start as u32).is_nan();
                    let spoiled = a.is_nan() && b.is_nan() && starts.into_iter().all(nan);
                    assert!(same || spoiled, "{} {a} {b} {starts:?}", k.isa());
                }
            }
        }
    }
}

/// The rows of a tile lie between each other; none may touch another's.
#[test]
fn quantize_fills_its_own_row_of_a_tile() {
    for k in tables() {
        let mut random = Random(16);
        for (rows, cols) in [(1, 40), (3, 33), (16, 97), (35, 64)] {
            let x = random.values(rows * cols, 1.0);
            let want = activations(Format::Q4, &x, rows, cols);
            let mut got = Activations::default();
            got.reshape(rows, cols, Format::Q4.zero());
            for (i, mut tile) in got.tiles_mut().enumerate() {
                for r in (0..tile.rows).rev() {
                    k.quantize(&x[(i * TILE + r) * cols..][..cols], &mut tile, r);
                }
            }
            for i in 0..want.tiles() {
                let (got, want) = (got.tile(i), want.tile(i));
                assert_eq!(got.quants, want.quants, "{} {rows} x {cols}", k.isa());
                assert_eq!(got.starts, want.starts, "{} {rows} x {cols}", k.isa());
                assert_eq!(bits(got.magics), bits(want.magics), "{}", k.isa());
            }
        }
    }
}

/// The definition itself: each value within half a step, and the step no larger than needed.
#[test]
fn quantize_is_to_the_nearest_step() {
    for k in tables() {
        let mut random = Random(10);
        for size in [1e-20, 1.0, 1e30] {
            let x = random.values(97, size);
            let mut out = Activations::default();
            out.reshape(1, x.len(), 8);
            k.quantize(&x, &mut out.tiles_mut().next().unwrap(), 0);
            for (b, x) in x.chunks(BLOCK).enumerate() {
                let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let block = out.block(0, b);
                assert!(amax <= 127.0 * block.scale && amax > 63.5 * block.scale);
                for (q, v) in block.quants.iter().zip(x) {
                    let exact = f64::from(*v) / f64::from(block.scale);
                    assert!((f64::from(*q) - exact).abs() <= 0.5);
                }
                assert!(
                    block.quants.iter().any(|q| q.unsigned_abs() >= 63),
                    "the range is used"
                );
                assert!(
                    block.quants[x.len()..].iter().all(|q| *q == 0),
                    "padding is zero"
                );
                let start = (MAGIC * block.scale).to_bits() as i32 - 8 * block.sum;
                assert_eq!(out.tile(0).starts[b], start);
            }
        }
    }
}

// ------------------------------------------------------------------------------------- norm

/// The squares are positive, so their mean is off by at most `gamma(roundings + 1)` of itself, eps
/// adds one more rounding, and the root halves all that (`sqrt(1 + d) <= 1 + d / 2`, and a
/// reciprocal of it loses a term of second order: the square of the bound). Root, reciprocal and
/// two products round once each.
fn norm_reference(x: &[f32], w: &[f32], eps: f32) -> Vec<Expected> {
    let n = x.len();
    let mean: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
    let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
    let of_mean = gamma(dot_roundings(n) + 2);
    let relative = of_mean / 2.0 + of_mean * of_mean + gamma(4);
    (x.iter().zip(w))
        .map(|(x, w)| {
            let value = f64::from(*x) * inverse * f64::from(*w);
            let bound = relative * value.abs() + TINY * f64::from(*w).abs().max(1.0);
            Expected { value, bound }
        })
        .collect()
}

fn rms_norm(k: &Kernels, x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let (x, w) = (page_end(x), page_end(w));
    let mut y = page_end(&vec![f32::NAN; x.len()]);
    k.rms_norm(&x, &w, eps, &mut y);
    y
}

#[test]
fn rms_norm_within_its_bound() {
    for k in tables() {
        let mut random = Random(11);
        for cols in SMALL_COLS.into_iter().chain([15, 16, 17, 3072, 5120]) {
            for fill in FILLS {
                // Squares of 1e16 stay finite; subnormal ones vanish beside eps.
                let x = fill.values(&mut random, cols, 1e16, 1e-30);
                let w = random.values(cols, 2.0);
                let y = rms_norm(k, &x, &w, 1e-5);
                for (i, e) in norm_reference(&x, &w, 1e-5).iter().enumerate() {
                    assert!(
                        e.admits(y[i]),
                        "{} {cols} {fill:?} {i}: {} for {e:?}",
                        k.isa(),
                        y[i]
                    );
                }
            }
        }
    }
}

#[test]
fn rms_norm_bound_notices_eps_the_weight_and_the_tail() {
    for k in tables() {
        let mut random = Random(12);
        let (x, w) = (random.values(97, 1.0), random.values(97, 2.0));
        let y = rms_norm(k, &x, &w, 1e-5);
        let wrong = |e: &[Expected]| e.iter().zip(&y).any(|(e, y)| !e.admits(*y));
        assert!(!wrong(&norm_reference(&x, &w, 1e-5)));
        assert!(wrong(&norm_reference(&x, &w, 0.0)), "eps forgotten");
        assert!(
            wrong(&norm_reference(&x, &[1.0; 97], 1e-5)),
            "weight forgotten"
        );
        assert!(
            wrong(&norm_reference(&x[..96], &w, 1e-5)),
            "last value forgotten"
        );
        let mut bad = x.clone();
        bad[96] = f32::NAN;
        assert!(rms_norm(k, &bad, &w, 1e-5).iter().all(|v| v.is_nan()));
    }
}

/// With `em` the error of the mean: differences are off by `em` and a rounding. The same shift of all
/// values adds its square to the variance, `mean of (d + em)^2 = variance + em^2`, since the
/// differences sum to zero; their roundings add theirs, and the sum of squares its own.
/// `v` off by `ev` puts the inverse root between those of `v - ev` and `v + ev`. Whatever the errors:
/// no value is more than `sqrt(n)` deviations from the mean, in exact arithmetic or as computed.
fn layer_norm_reference(x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Vec<Expected> {
    let n = x.len() as f64;
    let over = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(f64::from(*v))).sum::<f64>() / n;
    let mean = over(&|v| v);
    let variance = over(&|v| (v - mean).powi(2));
    // Of a sum, a division and, for squares, their own two.
    let roundings = dot_roundings(x.len()) + 1;
    let em = gamma(roundings) * over(&f64::abs) + TINY;
    let rounded = |d: f64| U * (d.abs() + em);
    let shifted = over(&|v| {
        let (size, rounded) = ((v - mean).abs() + em, rounded(v - mean));
        rounded * (2.0 * size + rounded)
    });
    let ev = em * em + shifted;
    let under_root = variance + f64::from(eps);
    let ev = ev + gamma(roundings + 2) * (under_root + ev) + TINY;
    let inverse = 1.0 / under_root.sqrt();
    let most = 1.0 / (under_root - ev).max(0.0).sqrt();
    (x.iter().zip(w).zip(b))
        .map(|((x, w), b)| {
            let d = f64::from(*x) - mean;
            let (w, b) = (f64::from(*w), f64::from(*b));
            let largest = (d.abs() + em + rounded(d)) * most * (1.0 + gamma(3));
            let normed = (largest - d.abs() * inverse).min(2.1 * n.sqrt());
            Expected {
                value: d * inverse * w + b,
                bound: (normed * w.abs()) * (1.0 + gamma(2))
                    + gamma(2) * ((d * inverse * w).abs() + b.abs())
                    + TINY * w.abs().max(1.0),
            }
        })
        .collect()
}

fn layer_norm(k: &Kernels, x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Vec<f32> {
    let [x, w, b] = [x, w, b].map(page_end);
    let mut y = page_end(&vec![f32::NAN; x.len()]);
    k.layer_norm(&x, &w, &b, eps, &mut y);
    y
}

#[test]
fn layer_norm_within_its_bound() {
    for k in tables() {
        let mut random = Random(15);
        let sizes = [15, 16, 17, 48, 49, 1024, 3072, 4096];
        for cols in SMALL_COLS.into_iter().chain(sizes) {
            let rows = FILLS.map(|fill| fill.values(&mut random, cols, 1e16, 1e-30));
            // A mean far from zero: 1000 deviations.
            let far = random.values(cols, 1.0).into_iter().map(|v| v + 577.0);
            for x in rows.into_iter().chain([far.collect()]) {
                let (w, b) = (random.values(cols, 2.0), random.values(cols, 1.0));
                let y = layer_norm(k, &x, &w, &b, 1e-5);
                for (i, e) in layer_norm_reference(&x, &w, &b, 1e-5).iter().enumerate() {
                    assert!(
                        e.admits(y[i]),
                        "{} {cols} {}.. {i}: {} for {e:?}",
                        k.isa(),
                        x[0],
                        y[i]
                    );
                }
            }
        }
    }
}

#[test]
fn layer_norm_bound_notices_every_part_and_the_tail() {
    for k in tables() {
        let mut random = Random(16);
        let (x, w) = (random.values(97, 1.0), random.values(97, 2.0));
        let b = random.values(97, 1.0);
        let y = layer_norm(k, &x, &w, &b, 1e-5);
        let wrong = |e: &[Expected]| e.iter().zip(&y).any(|(e, y)| !e.admits(*y));
        assert!(!wrong(&layer_norm_reference(&x, &w, &b, 1e-5)));
        let mistakes = [
            ("eps", layer_norm_reference(&x, &w, &b, 0.0)),
            ("weight", layer_norm_reference(&x, &[1.0; 97], &b, 1e-5)),
            ("bias", layer_norm_reference(&x, &w, &[0.0; 97], 1e-5)),
            ("last value", layer_norm_reference(&x[..96], &w, &b, 1e-5)),
            ("mean", norm_reference(&x, &w, 1e-5)),
        ];
        for (forgotten, expected) in mistakes {
            assert!(wrong(&expected), "{forgotten} forgotten");
        }
        let unbiased = f64::sqrt(96.0 / 97.0);
        let mut unbiased_reference = layer_norm_reference(&x, &w, &b, 1e-5);
        for (e, b) in unbiased_reference.iter_mut().zip(&b) {
            e.value = (e.value - f64::from(*b)) * unbiased + f64::from(*b);
        }
        assert!(wrong(&unbiased_reference), "divided by one less");

        // Mean of squares minus square of mean, which the bound must not have room for.
        let far: Vec<f32> = x.iter().map(|v| v + 577.0).collect();
        let mean = far.iter().sum::<f32>() / 97.0;
        let square = far.iter().map(|v| v * v).sum::<f32>() / 97.0;
        let inverse = 1.0 / (square - mean * mean + 1e-5).sqrt();
        let naive = far.iter().zip(&w).zip(&b);
        let naive = naive.map(|((x, w), b)| (x - mean) * inverse * w + b);
        let right = layer_norm_reference(&far, &w, &b, 1e-5);
        assert!(
            naive.zip(&right).any(|(y, e)| !e.admits(y)),
            "difference of squares"
        );
        for at in [0, 40, 96] {
            let mut bad = x.clone();
            bad[at] = f32::NAN;
            let y = layer_norm(k, &bad, &w, &b, 1e-5);
            assert!(y.iter().all(|v| v.is_nan()), "{} {at}", k.isa());
        }
    }
}

// ------------------------------------------------------------------------------------- rope

/// Two products and a sum: two roundings for each product.
fn rope_reference(head: &[f32], cos: &[f32], sin: &[f32]) -> Vec<Expected> {
    let half = cos.len();
    let turned = |x: f32, c: f32, y: f32, s: f32| {
        let (a, b) = (f64::from(x) * f64::from(c), f64::from(y) * f64::from(s));
        Expected {
            value: a + b,
            bound: gamma(2) * (a.abs() + b.abs()) + TINY,
        }
    };
    let (x, y) = head.split_at(half);
    (0..half)
        .map(|i| turned(x[i], cos[i], -y[i], sin[i]))
        .chain((0..half).map(|i| turned(y[i], cos[i], x[i], sin[i])))
        .collect()
}

#[test]
fn rope_within_its_bound() {
    for k in tables() {
        let mut random = Random(13);
        for head_dim in [2, 4, 6, 14, 16, 18, 30, 32, 34, 64, 96, 128] {
            for heads in [1, 2, 3, 32] {
                for fill in FILLS {
                    let x = fill.values(&mut random, heads * head_dim, 1e30, 1e-40);
                    let cos = page_end(&random.values(head_dim / 2, 1.2));
                    let sin = page_end(&random.values(head_dim / 2, 1.2));
                    let mut y = page_end(&x);
                    k.rope(&mut y, &cos, &sin);
                    for (h, head) in x.chunks_exact(head_dim).enumerate() {
                        let y = &y[h * head_dim..][..head_dim];
                        let expected = rope_reference(head, &cos, &sin);
                        for (i, e) in expected.iter().enumerate() {
                            assert!(
                                e.admits(y[i]),
                                "{} {head_dim} {fill:?} {i}: {} for {e:?}",
                                k.isa(),
                                y[i]
                            );
                        }
                        if fill == Fill::Random {
                            let back: Vec<f32> = sin.iter().map(|s| -s).collect();
                            let back = rope_reference(head, &cos, &back);
                            assert!(
                                back.iter().zip(y).any(|(e, y)| !e.admits(*y)),
                                "turned back"
                            );
                            // One head alone is the same as among others.
                            let mut alone = page_end(head);
                            k.rope(&mut alone, &cos, &sin);
                            assert_eq!(bits(&alone), bits(y), "{} head {h}", k.isa());
                        }
                    }
                }
            }
        }
        let mut y = [f32::NAN, 1.0, 2.0, 3.0];
        k.rope(&mut y, &[1.0, 1.0], &[0.0, 0.0]);
        assert_eq!(
            y.map(f32::is_nan),
            [true, false, true, false],
            "{}",
            k.isa()
        );
    }
}

// ------------------------------------------------------------------------------------- gate

/// The exponential's error reaches the quotient in full at most; sum, quotient and product round
/// once each. Below -88 the exponential overflows and a result of at most 89 * 2^-127 becomes zero.
fn gate_reference(gate: f32, up: f32) -> Expected {
    let (g, u) = (f64::from(gate), f64::from(up));
    let value = u * g / (1.0 + (-g).exp());
    let vanished = if g < -87.0 {
        89.0 * 2f64.powi(-126) * u.abs()
    } else {
        0.0
    };
    Expected {
        value,
        bound: (EXP + gamma(3)) * value.abs() + vanished + TINY * u.abs().max(1.0),
    }
}

#[test]
fn silu_mul_within_its_bound() {
    for k in tables() {
        let mut random = Random(14);
        for n in SMALL_COLS.into_iter().chain([7, 8, 9, 15, 16, 17, 8192]) {
            for size in [0.0, 1e-40, 1e-3, 1.0, 20.0, 87.0, 120.0, 1e30] {
                let gate = page_end(&random.values(n, size));
                let up = page_end(&random.values(n, 3.0));
                let mut y = page_end(&vec![f32::NAN; n]);
                k.silu_mul(&gate, &up, &mut y);
                for i in 0..n {
                    let e = gate_reference(gate[i], up[i]);
                    assert!(
                        e.admits(y[i]),
                        "{} silu({}) * {}: {} for {e:?}",
                        k.isa(),
                        gate[i],
                        up[i],
                        y[i]
                    );
                    if size == 1.0 && gate[i].abs() > 1e-3 {
                        assert!(
                            !gate_reference(-gate[i], up[i]).admits(y[i]),
                            "sign of the gate"
                        );
                        assert!(
                            !gate_reference(up[i], gate[i]).admits(y[i]),
                            "gate and up swapped"
                        );
                    }
                }
            }
        }
        for at in [0, 16, 32] {
            let (mut gate, mut up, mut y) = ([1.0; 33], [1.0; 33], [0.0; 33]);
            gate[at] = f32::NAN;
            k.silu_mul(&gate, &up, &mut y);
            assert!((0..33).all(|i| y[i].is_nan() == (i == at)), "{}", k.isa());
            gate[at] = 0.0;
            up[at] = f32::NAN;
            k.silu_mul(&gate, &up, &mut y);
            assert!((0..33).all(|i| y[i].is_nan() == (i == at)), "{}", k.isa());
        }
    }
}

/// `x sigmoid(p)` with `p = 1.702 x` rounded: the exponential's own error and that of its argument,
/// `|p| U`, reach the result times `1 - sigmoid`; sum and quotient round once each. Below -88 the
/// exponential overflows and what is left of the result becomes zero.
fn quick_gelu_reference(x: f32) -> Expected {
    let (p, x) = (1.702f64 * f64::from(x), f64::from(x));
    let sigmoid = 1.0 / (1.0 + (-p).exp());
    // 1.702 is rounded too.
    let exponential = (EXP + 2.1 * U * p.abs()) * (1.0 - sigmoid);
    let vanished = if p < -87.0 {
        89.0 * 2f64.powi(-126)
    } else {
        0.0
    };
    Expected {
        value: x * sigmoid,
        bound: (exponential + gamma(2)) * (x * sigmoid).abs() + vanished + TINY,
    }
}

/// The sum with 1 and the product round once each.
fn gegelu_reference(a: f32, b: f32, limit: f32) -> Expected {
    let gate = quick_gelu_reference(a.min(limit));
    let linear = f64::from(b.clamp(-limit, limit)) + 1.0;
    let value = gate.value * linear;
    Expected {
        value,
        bound: (gate.bound * linear.abs()) * (1.0 + gamma(2)) + gamma(2) * value.abs() + TINY,
    }
}

fn gegelu(k: &Kernels, x: &[f32], limit: f32) -> Vec<f32> {
    let x = page_end(x);
    let mut y = page_end(&vec![f32::NAN; x.len() / 2]);
    k.gegelu(&x, limit, &mut y);
    y
}

#[test]
fn gegelu_within_its_bound() {
    for k in tables() {
        let mut random = Random(17);
        for n in SMALL_COLS.into_iter().chain([0, 7, 8, 9, 15, 16, 17, 8192]) {
            for size in [0.0, 1e-40, 1e-3, 1.0, 30.0, 52.0, 70.0, 1e30] {
                for limit in [20.0, 3.0, 0.0, f32::INFINITY] {
                    let x = random.values(2 * n, size);
                    let y = gegelu(k, &x, limit);
                    for (i, &[a, b]) in x.as_chunks().0.iter().enumerate() {
                        let mut e = gegelu_reference(a, b, limit);
                        if e.value.abs() > f64::from(f32::MAX) {
                            // 1e30 without a limit: the product of two such numbers is far beyond.
                            e.value = f64::INFINITY.copysign(e.value);
                        }
                        assert!(
                            e.admits(y[i]) || e.value == f64::from(y[i]),
                            "{} gegelu({a}, {b}, {limit}): {} for {e:?}",
                            k.isa(),
                            y[i]
                        );
                        if size == 1.0 && limit == 20.0 && a.abs().min(b.abs()) > 1e-3 {
                            let wrong = [
                                ("swapped", gegelu_reference(b, a, limit)),
                                ("no 1 added", gegelu_reference(a, b - 1.0, limit)),
                                ("sign of the gate", gegelu_reference(-a, b, limit)),
                            ];
                            for (what, wrong) in wrong {
                                assert!(!wrong.admits(y[i]) || (a - b).abs() < 1e-4, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Limits hold on their own side only, infinities pass them, and a NaN stays where it is.
#[test]
fn gegelu_at_the_limits() {
    let inf = f32::INFINITY;
    for k in tables() {
        // Every place of a register and of the rest.
        for at in [0, 5, 15, 16, 20] {
            let one = |a: f32, b: f32, limit: f32| {
                let mut x = [1.0; 42];
                (x[2 * at], x[2 * at + 1]) = (a, b);
                let y = gegelu(k, &x, limit);
                let usual = y[(at + 1) % 21];
                assert!(gegelu_reference(1.0, 1.0, limit).admits(usual));
                let others = (0..21).filter(|i| *i != at);
                assert!(others.map(|i| y[i]).all(|v| v == usual), "{}", k.isa());
                y[at]
            };
            for (a, b, clamped_a, clamped_b) in [
                (25.0, 1.0, 20.0, 1.0),
                (-25.0, 1.0, -25.0, 1.0),
                (1.0, 25.0, 1.0, 20.0),
                (1.0, -25.0, 1.0, -20.0),
                (20.0, -20.0, 20.0, -20.0),
            ] {
                assert_eq!(one(a, b, 20.0), one(clamped_a, clamped_b, inf), "{a} {b}");
                assert!(gegelu_reference(clamped_a, clamped_b, inf).admits(one(a, b, 20.0)));
            }
            assert_eq!(one(inf, 1.0, 20.0), inf, "{}", k.isa());
            assert_eq!(one(1.0, inf, 20.0), inf, "{}", k.isa());
            assert_eq!(one(1.0, -inf, 20.0), -inf, "{}", k.isa());
            assert_eq!(one(-1.0, inf, 20.0), -inf, "{}", k.isa());
            for (a, b) in [
                (-inf, 1.0),
                (inf, -1.0),
                (0.0, inf),
                (f32::NAN, 1.0),
                (1.0, f32::NAN),
            ] {
                assert!(one(a, b, 20.0).is_nan(), "{} {a} {b}", k.isa());
            }
        }
    }
}

#[test]
#[should_panic(expected = "limit NaN")]
fn gegelu_refuses_a_limit_that_is_no_number() {
    Kernels::best().gegelu(&[0.0; 2], f32::NAN, &mut [0.0]);
}

// ------------------------------------------------------------------------------- activation

/// The derivation is in `activation.rs`; the reference is the C library's complementary error function.
/// What the exponential loses among subnormals is multiplied by less than 1: `t R(t)` is.
fn gelu_reference(x: f32) -> Expected {
    let x = f64::from(x);
    let t = x.abs();
    let tail = t * 0.5 * libm::erfc(t / std::f64::consts::SQRT_2);
    let relative = RATIO_ERROR + gamma(21) + EXP + U * t * t / 2.0;
    let value = x.max(0.0) - tail;
    Expected {
        value,
        bound: 1.01 * relative * tail + U * value.abs() + TINY,
    }
}

#[test]
fn activations_within_their_bounds() {
    type Kernel = fn(&Kernels, &mut [f32]);
    type Reference = fn(f32) -> Expected;
    let families: [(&str, Kernel, Reference); 2] = [
        ("quick_gelu", Kernels::quick_gelu, quick_gelu_reference),
        ("gelu", Kernels::gelu, gelu_reference),
    ];
    for k in tables() {
        for (name, kernel, reference) in families {
            let mut random = Random(18);
            for n in SMALL_COLS
                .into_iter()
                .chain([0, 7, 8, 9, 15, 16, 17, 60000])
            {
                for size in [0.0, 1e-40, 1e-3, 1.0, 4.0, 16.0, 60.0, 120.0, f32::MAX] {
                    let x = random.values(n, size);
                    let mut y = page_end(&x);
                    kernel(k, &mut y);
                    for (x, y) in x.iter().zip(&y) {
                        let e = reference(*x);
                        assert!(e.admits(*y), "{} {name}({x}): {y} for {e:?}", k.isa());
                        if size == 1.0 && x.abs() > 0.1 {
                            assert!(!reference(-x).admits(*y), "{name}: sign");
                            assert!(
                                !Expected {
                                    value: e.value + 1e-6,
                                    ..e
                                }
                                .admits(*y)
                            );
                        }
                    }
                }
            }
            for at in [0, 16, 32] {
                let mut x = [1.0; 33];
                for (special, expected) in [
                    (f32::NAN, f32::NAN),
                    (f32::NEG_INFINITY, f32::NAN),
                    (f32::INFINITY, f32::INFINITY),
                ] {
                    x[at] = special;
                    let mut y = page_end(&x);
                    kernel(k, &mut y);
                    assert_eq!(y[at].is_nan(), expected.is_nan(), "{} {name}", k.isa());
                    assert!(y[at].is_nan() || y[at] == expected, "{} {name}", k.isa());
                    let others = (0..33).filter(|i| *i != at);
                    assert!(others.map(|i| y[i]).all(|y| reference(1.0).admits(y)));
                }
            }
        }
    }
}

/// One function is not taken for the other, nor for the SiLU or the form with a hyperbolic tangent.
#[test]
fn activation_bounds_tell_the_functions_apart() {
    for x in [-2.5f32, -1.0, 0.7, 2.0] {
        let [quick, exact] = [quick_gelu_reference(x), gelu_reference(x)];
        let silu = x / (1.0 + (-x).exp());
        let inner = 0.797_884_6 * (x + 0.044_715 * x.powi(3));
        let tanh = 0.5 * x * (1.0 + inner.tanh());
        assert!(!quick.admits(exact.value as f32) && !exact.admits(quick.value as f32));
        assert!(!quick.admits(silu) && !exact.admits(tanh), "{x}");
    }
}

/// The quotient alone, in f64, so that no rounding hides a wrong digit of a coefficient.
#[test]
fn the_ratio_of_the_normal_tail_is_as_near_as_stated() {
    let horner = |c: &[f32], t: f64| c.iter().rev().fold(0.0, |sum, c| sum * t + f64::from(*c));
    let mut largest: f64 = 0.0;
    for i in 0..=15_000 {
        let t = f64::from(i) / 1000.0;
        let ratio = horner(&NUMERATOR, t) / horner(&DENOMINATOR, t);
        let exact = 0.5 * libm::erfc(t / std::f64::consts::SQRT_2) / (-t * t / 2.0).exp();
        largest = largest.max((ratio / exact - 1.0).abs());
    }
    assert!(largest <= RATIO_ERROR, "{largest:e}");
    assert!(
        largest > 0.9 * RATIO_ERROR,
        "{largest:e} is less than stated"
    );
}

// -------------------------------------------------------------------------------- attention

/// Queries over blocks of keys; each query sees a range of all keys.
struct Scene<T> {
    d: usize,
    queries: Vec<f32>,
    visible: Vec<Range<usize>>,
    keys: Vec<T>,
    values: Vec<T>,
    /// One for each key, on keys and on values; all ones but for bytes.
    steps: [Vec<f32>; 2],
    scale: f32,
    block: usize,
}

impl<T: Stored> Scene<T> {
    fn random(
        random: &mut Random,
        d: usize,
        keys: usize,
        block: usize,
        visible: Vec<Range<usize>>,
    ) -> Self {
        let steps = || match is_bytes::<T>() {
            true => random.values(keys, 0.02).iter().map(|v| v + 0.03).collect(),
            false => vec![1.0; keys],
        };
        let steps = [(); 2].map({
            let mut steps = steps;
            move |()| steps()
        });
        Self {
            d,
            steps,
            // Scores of a few units, as trained models have: uniform values are 1/sqrt(3) wide.
            queries: random.values(visible.len() * d, 3.0),
            visible,
            keys: narrow(&random.values(keys * d, 3.0)),
            values: narrow(&random.values(keys * d, 1.0)),
            scale: 1.0 / (d as f32).sqrt(),
            block,
        }
    }

    /// The kernel on the queries in `range`, block by block, `[range, d]`.
    fn run(&self, k: &Kernels, range: Range<usize>) -> Vec<f32> {
        let one_state = self.run_in(k, range.clone(), false);
        let merged = self.run_in(k, range, true);
        assert_eq!(bits(&one_state), bits(&merged), "{} merged blocks", k.isa());
        one_state
    }

    fn run_in(&self, k: &Kernels, range: Range<usize>, split: bool) -> Vec<f32> {
        let d = self.d;
        let queries = page_end(&self.queries[range.start * d..range.end * d]);
        let mut state = AttentionState::default();
        guarded(|| state.reset(range.len(), d));
        for (b, (keys, values)) in (self.keys.chunks(self.block * d))
            .zip(self.values.chunks(self.block * d))
            .enumerate()
        {
            let (start, count) = (b * self.block, keys.len() / d);
            let (keys, values) = (page_end(&panels(keys, d)), page_end(&groups(values, d)));
            let [key_steps, value_steps] = self.steps.each_ref().map(|steps| {
                let mut steps = steps[start..start + count].to_vec();
                steps.resize(count.next_multiple_of(KEY_PANEL), f32::NAN);
                page_end(&steps)
            });
            let inside = |p: usize| p.clamp(start, start + count) - start;
            let visible: Vec<_> = (self.visible[range.clone()].iter())
                .map(|v| inside(v.start)..inside(v.end))
                .collect();
            let task = AttentionTask {
                first: 0,
                queries: &queries,
                visible: &visible,
                keys: T::cached(&keys, &key_steps),
                values: T::cached(&values, &value_steps),
                scale: self.scale,
                // Anything: it is asked for and not looked at.
                then: [T::cached(&values, &value_steps); THEN],
            };
            if split {
                // Each block on its own, beside another one, then merged: what several threads do.
                let mut alone = AttentionState::default();
                alone.reset(2 * range.len() + 1, d);
                let first = range.len() + 1;
                k.attend(AttentionTask { first, ..task }, &mut alone);
                state.merge(k, &alone, first);
            } else {
                guarded(|| k.attend(task, &mut state));
            }
        }
        let mut out = page_end(&vec![f32::NAN; range.len() * d]);
        for (i, out) in out.chunks_exact_mut(d).enumerate() {
            state.finish(i, out);
        }
        out
    }

    /// Softmax in one piece.
    ///
    /// A key's weight `exp(s - m)` is off, relatively, by the error of its score (a sum of `d` products,
    /// the scale; of bytes an exact sum, rounded, and two products more, which is less), by the rounding of `s - m`, which is at most `U` of the range of scores, and by
    /// the exponential; and for each block that is merged once more by the last two and a product.
    /// An error common to all keys, as that of `m`, cancels. The weighted sum then rounds once for
    /// each key and block and product and step; the sum of weights likewise, which doubles everything; the
    /// reciprocal and the last product are two more.
    ///
    /// Bytes: a weight with its step (one product) is rounded to an integer, after a product with the
    /// reciprocal of a quotient: three roundings, so off by `3 * 32767 U < 0.006` of a unit more than half
    /// a one. A unit is the largest weight of the block by 32767. The sum is rounded once, and so is its
    /// product with the unit.
    fn reference(&self, query: usize) -> Vec<Expected> {
        let d = self.d;
        let q = T::query(&self.queries[query * d..][..d]);
        let scale = f64::from(self.scale);
        let seen = self.visible[query].clone();
        let scores: Vec<Expected> = (seen.clone())
            .map(|j| {
                let terms = (self.keys[j * d..][..d].iter().zip(&q)).map(|(k, q)| k.exact() * q);
                let (value, size) = terms.fold((0.0, 0.0), |(v, s), t| (v + t, s + t.abs()));
                let factor = scale * f64::from(self.steps[0][j]);
                Expected {
                    value: value * factor,
                    bound: (gamma(d) * size + TINY) * factor.abs()
                        + gamma(2) * (value * factor).abs(),
                }
            })
            .collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s.value));
        let min = scores.iter().fold(f64::INFINITY, |m, s| m.min(s.value));
        let weights: Vec<f64> = scores.iter().map(|s| (s.value - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let worst_score = scores.iter().fold(0.0f64, |m, s| m.max(s.bound));
        let merges = self.keys.len() / d / self.block + 2;
        // Below -87 an exponential is as good as zero, so a wider range does not count.
        let range = (max - min).clamp(0.0, 104.0);
        let of_weight = worst_score.exp_m1() + (merges as f64) * (U * range + EXP + U);
        let of_bytes = if is_bytes::<T>() { 6 } else { 0 };
        let roundings = seen.len() + 2 * merges + 3 + of_bytes;
        let relative = 2.0 * (of_weight + gamma(roundings)) + gamma(2);
        // Of each block, from the first: a unit of the weights.
        let units: Vec<f64> = (0..=seen.end / self.block)
            .map(|b| {
                let weights = weights.iter().zip(seen.clone());
                let of_block = weights.filter(|(_, j)| j / self.block == b);
                let stepped = of_block.map(|(w, j)| w / sum * f64::from(self.steps[1][j]));
                stepped.fold(0.0f64, f64::max) / 32767.0
            })
            .collect();
        let largest = self.values[seen.start * d..seen.end * d]
            .iter()
            .fold(1.0f64, |m, v| m.max(v.exact().abs()));
        (0..d)
            .map(|i| {
                let (mut value, mut size, mut rounded) = (0.0, 0.0, 0.0);
                for (w, j) in weights.iter().zip(seen.clone()) {
                    let step = f64::from(self.steps[1][j]);
                    let term = w / sum * self.values[j * d + i].exact() * step;
                    value += term;
                    size += term.abs();
                    if is_bytes::<T>() {
                        let unit = units[j / self.block];
                        rounded += 0.506 * unit * self.values[j * d + i].exact().abs();
                    }
                }
                // Weights below 2^-125 may vanish.
                let vanished = seen.len() as f64 * 2f64.powi(-125) * largest;
                Expected {
                    value,
                    bound: relative * size + rounded * (1.0 + relative) + vanished,
                }
            })
            .collect()
    }

    fn check(&self, k: &Kernels, what: &str) {
        let n = self.visible.len();
        let out = self.run(k, 0..n);
        for query in 0..n {
            let got = &out[query * self.d..][..self.d];
            if self.visible[query].is_empty() {
                assert!(
                    got.iter().all(|v| *v == 0.0),
                    "{} sees nothing, {what}",
                    k.isa()
                );
                continue;
            }
            for (i, e) in self.reference(query).iter().enumerate() {
                assert!(
                    e.admits(got[i]),
                    "{} query {query} element {i}, {what}: {} for {e:?}",
                    k.isa(),
                    got[i]
                );
            }
        }
    }
}

fn is_bytes<T: Stored>() -> bool {
    matches!(T::cached(&[], &[]), Cached::I8 { .. })
}

/// Keys `[keys, d]` in panels; what pads the last one must not matter.
fn panels<T: Stored>(keys: &[T], d: usize) -> Vec<T> {
    let n = T::SIDE_BY_SIDE;
    let mut out = vec![T::NAN; (keys.len() / d).next_multiple_of(KEY_PANEL) * d];
    for (j, key) in keys.chunks_exact(d).enumerate() {
        let panel = j / KEY_PANEL * d * KEY_PANEL;
        for (e, v) in key.iter().enumerate() {
            out[panel + (e / n * KEY_PANEL + j % KEY_PANEL) * n + e % n] = *v;
        }
    }
    out
}

/// Values `[keys, d]`, some side by side; what pads the last ones must not matter.
fn groups<T: Stored>(values: &[T], d: usize) -> Vec<T> {
    let n = T::SIDE_BY_SIDE;
    let mut out = vec![T::NAN; (values.len() / d).next_multiple_of(n) * d];
    for (j, value) in values.chunks_exact(d).enumerate() {
        for (e, v) in value.iter().enumerate() {
            out[(j / n * d + e) * n + j % n] = *v;
        }
    }
    out
}

/// Causal: the last query sees all keys, each one before it one less; at most `window` of them.
fn causal(queries: usize, keys: usize, window: usize) -> Vec<Range<usize>> {
    (0..queries)
        .map(|i| (keys + i + 1).saturating_sub(queries))
        .map(|end| end.saturating_sub(window)..end)
        .collect()
}

fn attention_suite<T: Stored>() {
    // The longest test: what a table has from an earlier one is not run again.
    let mut run = HashSet::new();
    for k in tables().filter(|k| run.insert((T::attend(k), k.merge as usize))) {
        let mut random = Random(15);
        for d in [2, 6, 16, 30, 64, 96, 128] {
            for (keys, block) in [(1, 256), (2, 1), (15, 16), (16, 16), (33, 16), (65, 32)] {
                for queries in [1, 3, 4, 16, 17] {
                    for window in [1, 5, 1000] {
                        let visible = causal(queries, keys, window);
                        let scene = Scene::<T>::random(&mut random, d, keys, block, visible);
                        scene.check(
                            k,
                            &format!("{keys} keys by {block}, head {d}, window {window}"),
                        );
                    }
                }
            }
        }
        // As the model calls it: blocks of 256, the last one partly filled.
        let scene = Scene::<T>::random(&mut random, 96, 600, 256, causal(5, 600, 300));
        scene.check(k, "600 keys");
        attention_extremes::<T>(k, &mut random);
        attention_bound_notices::<T>(k, &mut random);
        attention_row_is_the_same_whatever_is_beside_it::<T>(k, &mut random);
        attention_does_not_hide::<T>(k, &mut random);
    }
}

fn attention_extremes<T: Stored>(k: &Kernels, random: &mut Random) {
    let visible = causal(3, 40, 1000);
    let scene = |random: &mut Random| Scene::<T>::random(random, 64, 40, 16, visible.clone());
    let mut zeros = scene(random);
    zeros.queries.fill(0.0);
    zeros.check(k, "queries of zeros: the mean of the values");
    let mut sharp = scene(random);
    sharp.queries.iter_mut().for_each(|q| *q *= 300.0);
    sharp.check(k, "scores of hundreds: one key takes all");
    let mut negative = scene(random);
    negative.keys = narrow(&vec![60.0; 40 * 64]);
    negative.queries.fill(-60.0);
    negative.check(k, "scores of -29000, all alike");
    let mut large = scene(random);
    large.values = narrow(&vec![65000.0; 40 * 64]);
    large.check(k, "values of 65000");
}

/// A window off by one, a scale forgotten, and a block merged without its factor.
fn attention_bound_notices<T: Stored>(k: &Kernels, random: &mut Random) {
    let wrong = |scene: &Scene<T>, out: &[f32]| {
        let reference = scene.reference(0);
        reference.iter().zip(out).any(|(e, o)| !e.admits(*o))
    };
    for keys in [20, 256] {
        let mut scene = Scene::<T>::random(random, 96, keys, 128, causal(1, keys, keys - 2));
        // Nearly even weights, so that every key counts.
        scene.queries.iter_mut().for_each(|q| *q *= 0.1);
        let out = scene.run(k, 0..1);
        assert!(!wrong(&scene, &out));
        let right = scene.visible[0].clone();
        for seen in [
            right.start - 1..right.end,
            right.start + 1..right.end,
            right.start..right.end - 1,
        ] {
            scene.visible[0] = seen;
            assert!(wrong(&scene, &out), "{keys} keys, window off by one");
        }
        scene.visible[0] = right;
        scene.scale *= 1.01;
        assert!(wrong(&scene, &out), "{keys} keys, another scale");
    }
}

fn attention_row_is_the_same_whatever_is_beside_it<T: Stored>(k: &Kernels, random: &mut Random) {
    for (d, queries, keys, window) in [(96, 17, 70, 1000), (64, 9, 70, 20), (2, 5, 300, 290)] {
        let scene = Scene::<T>::random(random, d, keys, 64, causal(queries, keys, window));
        let whole = scene.run(k, 0..queries);
        for range in (0..queries)
            .map(|i| i..i + 1)
            .chain([1..3, 0..4, queries - 3..queries])
        {
            let want = &whole[range.start * d..range.end * d];
            assert_eq!(
                bits(&scene.run(k, range.clone())),
                bits(want),
                "{} queries {range:?}",
                k.isa()
            );
        }
    }
}

/// A NaN that a query sees comes out; one that it does not see has no effect at all.
fn attention_does_not_hide<T: Stored>(k: &Kernels, random: &mut Random) {
    let (d, keys) = (96, 40);
    let scene = Scene::<T>::random(random, d, keys, 16, causal(6, keys, 10));
    let clean = scene.run(k, 0..6);
    for spoiled in [0, 24, 30, 36, 39] {
        for element in [0, 95] {
            for spoil_value in [false, true] {
                let mut bad = Scene {
                    keys: scene.keys.clone(),
                    values: scene.values.clone(),
                    queries: scene.queries.clone(),
                    visible: scene.visible.clone(),
                    steps: scene.steps.clone(),
                    ..scene
                };
                let (store, steps) = if spoil_value {
                    (&mut bad.values, &mut bad.steps[1])
                } else {
                    (&mut bad.keys, &mut bad.steps[0])
                };
                // Bytes have no NaN, but their steps do, and all other steps are one and unused.
                store[spoiled * d + element] = T::NAN;
                steps[spoiled] = f32::NAN;
                let out = bad.run(k, 0..6);
                for (query, seen) in scene.visible.iter().enumerate() {
                    let (got, clean) = (&out[query * d..][..d], &clean[query * d..][..d]);
                    if !seen.contains(&spoiled) {
                        assert_eq!(
                            bits(got),
                            bits(clean),
                            "{} key {spoiled} is not seen by {query}",
                            k.isa()
                        );
                    } else if spoil_value {
                        assert!(got[element].is_nan(), "{} value {spoiled}", k.isa());
                    } else {
                        assert!(got.iter().all(|v| v.is_nan()), "{} key {spoiled}", k.isa());
                    }
                }
            }
        }
    }
    let mut bad = scene;
    bad.queries[2 * d + 5] = f32::NAN;
    let out = bad.run(k, 0..6);
    for (query, got) in out.chunks_exact(d).enumerate() {
        assert!(
            got.iter().all(|v| v.is_nan() == (query == 2)),
            "{} query {query}",
            k.isa()
        );
    }
}

#[test]
fn attend_f32() {
    attention_suite::<f32>();
}

#[test]
fn attend_f16() {
    attention_suite::<f16>();
}

#[test]
fn attend_bf16() {
    attention_suite::<bf16>();
}

#[test]
fn attend_i8() {
    attention_suite::<i8>();
}

/// The state of each query after one block in bytes, `max`, `sum` and `acc`, as bits.
fn states(k: &Kernels, scene: &Scene<i8>) -> [Vec<u32>; 3] {
    let (n, d, keys) = (scene.visible.len(), scene.d, scene.keys.len() / scene.d);
    let steps = scene.steps.each_ref().map(|steps| {
        let mut steps = steps.clone();
        steps.resize(keys.next_multiple_of(KEY_PANEL), f32::NAN);
        page_end(&steps)
    });
    let (keys, values) = (panels(&scene.keys, d), groups(&scene.values, d));
    let mut state = AttentionState::default();
    state.reset(n, d);
    let task = AttentionTask {
        first: 0,
        queries: &scene.queries,
        visible: &scene.visible,
        keys: Cached::I8 {
            quants: &page_end(&keys),
            steps: &steps[0],
        },
        values: Cached::I8 {
            quants: &page_end(&values),
            steps: &steps[1],
        },
        scale: scene.scale,
        then: [Cached::default(); THEN],
    };
    guarded(|| k.attend(task, &mut state));
    [&state.max, &state.sum, &state.acc].map(|v| bits(v))
}

/// Where all weights are one, no exponential is in the way: everything is the scalar table's, to the bit.
#[test]
fn attend_i8_is_the_definition_bit_for_bit() {
    let scalar = Kernels::for_isa(Isa::Scalar).unwrap();
    for k in tables() {
        let mut random = Random(16);
        let check = |scene: &Scene<i8>, what: &str| {
            let (got, want) = (states(k, scene), states(scalar, scene));
            assert_eq!(got, want, "{} {what}, head {}", k.isa(), scene.d);
        };
        for d in [2, 6, 16, 30, 96, 128, 512, 514, 1026] {
            for (queries, keys) in [(1, 1), (1, 257), (2, 16), (3, 17), (9, 70), (17, 33)] {
                let one = |i: usize| (i * 5 % keys)..(i * 5 % keys) + 1;
                let visible: Vec<_> = (0..queries).map(one).collect();
                let mut scene = Scene::<i8>::random(&mut random, d, keys, keys, visible);
                check(&scene, "each sees one key");
                // Elements halfway between two integers, the largest being their number.
                let most = f32::from(most_of_query(d));
                scene.queries = (0..queries * d).map(|i| i as f32 % 99.0 - 49.5).collect();
                (scene.queries.chunks_exact_mut(d)).for_each(|q| q[d - 1] = -most);
                check(&scene, "ties");
                scene.visible = causal(queries, keys, 20);
                scene.queries.fill(0.0);
                check(&scene, "queries of zeros");
                scene.queries.fill(1e-39);
                check(&scene, "queries of subnormals");
                scene.steps[1].fill(0.0);
                check(&scene, "values of zeros");
            }
        }
        // The largest sums: whole blocks of the largest bytes, seen by all.
        for (d, keys) in [(2, 512), (96, 256), (512, 512), (514, 34), (2048, 512)] {
            for (key, value) in [(127, 127), (-127, 127), (127, -127)] {
                let visible = vec![0..keys; 9];
                let mut scene = Scene::<i8>::random(&mut random, d, keys, keys, visible);
                scene.queries.fill(3.0);
                scene.keys.fill(key);
                scene.values.fill(value);
                scene.steps = [(); 2].map(|()| vec![0.25; keys]);
                check(&scene, "all at the largest");
                scene.visible.truncate(1);
                scene.queries.truncate(d);
                scene.check(k, "all at the largest");
            }
        }
    }
}

/// Tiles change how the sums of bytes are made, not what they are: the state is that of AVX-512, bit for bit, also
/// with what is not finite.
#[test]
fn attend_i8_in_tiles_is_that_of_avx512_bit_for_bit() {
    let [Some(tiles), Some(plain)] = [Isa::Amx, Isa::Avx512].map(Kernels::for_isa) else {
        tables().for_each(drop); // says what is skipped
        return;
    };
    let check = |scene: &Scene<i8>, what: &str| {
        let [got, want] = [tiles, plain].map(|k| {
            // Which NaN it is says nothing.
            let bits = |v: u32| {
                if f32::from_bits(v).is_nan() {
                    u32::MAX
                } else {
                    v
                }
            };
            states(k, scene).map(|v| v.into_iter().map(bits).collect::<Vec<_>>())
        });
        let (n, keys) = (scene.visible.len(), scene.keys.len() / scene.d);
        assert!(
            got == want,
            "{n} queries, {keys} keys of {}, {what}",
            scene.d
        );
    };
    let mut random = Random(19);
    for d in [2, 16, 30, 62, 64, 66, 80, 96, 128, 258] {
        for keys in [1, 2, 16, 31, 33, 64, 66, 127, 256, 511] {
            for n in [14, 16, 17, 31, 33, 64] {
                for window in [1, 7, 70, 1000] {
                    let visible = causal(n, keys, window);
                    let scene = Scene::random(&mut random, d, keys, keys, visible);
                    check(&scene, "causal");
                }
                // Some see nothing, whole groups too, and all begin and end elsewhere.
                let visible = (0..n).map(|i| {
                    let start = (i * 37 % keys).min(keys - 1);
                    let seen = if i / 16 == 1 {
                        0
                    } else {
                        i * 11 % (keys - start + 1)
                    };
                    start..start + seen
                });
                let mut scene = Scene::random(&mut random, d, keys, keys, visible.collect());
                check(&scene, "here and there");
                scene.queries[3 * d] = f32::NAN;
                scene.queries[13 * d + 1] = f32::INFINITY;
                scene.steps[0][keys / 2] = f32::NEG_INFINITY;
                scene.steps[1][keys / 3] = f32::NAN;
                check(&scene, "not finite");
            }
        }
    }
}

/// Sums of the longest heads that a configuration can ask for fit 32 bits, and as few bits are given up
/// as that takes.
#[test]
fn integers_of_queries_fit() {
    for d in (2..=1 << 16).step_by(2) {
        let most = i64::from(most_of_query(d));
        let largest = |most: i64| most * 128 * d as i64;
        assert!(most > 0 && largest(most) <= i64::from(i32::MAX), "{d}");
        assert!(
            most == 32767 || largest(most + 1) > i64::from(i32::MAX),
            "{d}"
        );
    }
    assert_eq!([96, 512, 514].map(most_of_query), [32767, 32767, 32640]);
}

/// What is infinite in a query or as a step comes out as NaN, and where it is not seen it has no effect.
#[test]
fn attend_i8_does_not_hide_infinities() {
    for k in tables() {
        let mut random = Random(17);
        let (d, keys) = (34, 21);
        let scene =
            |random: &mut Random| Scene::<i8>::random(random, d, keys, keys, causal(5, keys, 4));
        for at in [0, 16, 33] {
            let mut bad = scene(&mut random);
            bad.queries[3 * d + at] = f32::NEG_INFINITY;
            for (query, got) in bad.run(k, 0..5).chunks_exact(d).enumerate() {
                let nan = got.iter().all(|v| v.is_nan());
                let finite = got.iter().all(|v| v.is_finite());
                let right = if query == 3 { nan } else { finite };
                assert!(right, "{} query {query}", k.isa());
            }
        }
        for spoiled in [13, 15, 16, 18, 20] {
            let mut bad = scene(&mut random);
            bad.steps[1][spoiled] = f32::INFINITY;
            for (query, got) in bad.run(k, 0..5).chunks_exact(d).enumerate() {
                let seen = bad.visible[query].contains(&spoiled);
                assert!(
                    got.iter().all(|v| v.is_nan() == seen),
                    "{} query {query}, value {spoiled}",
                    k.isa()
                );
            }
        }
    }
}
