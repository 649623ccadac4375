//! Attention: a decoding step over a cache, with rotation and storing; a prompt over itself; images. Keys and values
//! are f16.

use crate::timing::{Bench, Case, Cost, Random, Work, checked};
use phidias::engine::kernels::cuda::attention::{
    Arithmetic, Cache, FEW, Rotations, Scratch, attention, full_attention, rope_store_attention,
};
use phidias::engine::kernels::cuda::{Device, DeviceError, Memory};
use phidias::engine::kernels::heads::Heads;
use phidias::engine::mask::Mask;
use phidias::engine::quant::f16;
use std::f32::consts::PI;
use std::sync::Arc;

/// Tokens of a decoding step: one, and a few guesses.
const GUESSES: [usize; 2] = [1, 4];

/// Half a unit in the last place of 1, in f32 and in f16.
const U: f64 = 1.0 / (1u64 << 24) as f64;
const HALF_U: f64 = 1.0 / 2048.0;

pub fn bench(bench: &mut Bench) {
    let (shapes, device) = (bench.shapes, Arc::clone(&bench.device));
    let heads = shapes.heads;
    let name = |heads: Heads| format!("{} heads of {}", heads.heads, heads.head_dim);
    for depth in shapes.depths {
        let cases = GUESSES.map(|count| {
            let read = Mask::CAUSAL.count_read(heads.heads, heads.kv_heads, depth..depth + count);
            let key = 2 * heads.head_dim * size_of::<f16>();
            let rows = count * (heads.columns() + heads.queries()) * size_of::<f32>();
            let cost = Cost::Bytes(read * key + rows);
            Case { count, cost }
        });
        let what = format!("rope_store_attention, {}, at depth {depth}", name(heads));
        bench.run(&what, &cases, |case| {
            Cached::new(&device, heads, depth, case.count, shapes.working_set)
        });
    }
    let cases = shapes.prompts.map(|count| {
        let seen = Mask::CAUSAL.count_seen(heads.heads, 0..count);
        let cost = Cost::Operations(4 * seen * heads.head_dim);
        Case { count, cost }
    });
    let what = format!("attention, {}, a prompt", name(heads));
    bench.run(&what, &cases, |case| {
        Cached::new(&device, heads, 0, case.count, 0)
    });

    let images = shapes.images;
    let (heads, tokens) = (images.heads, images.tokens);
    for (arithmetic, in_words) in [(Arithmetic::F16, "f16"), (Arithmetic::F32, "f32")] {
        let cases = images.count.map(|count| {
            let scores = count * heads.heads * tokens * tokens;
            let cost = Cost::Operations(4 * scores * heads.head_dim);
            Case { count, cost }
        });
        let what = format!(
            "full_attention {in_words}, {}, images of {tokens}",
            name(heads)
        );
        bench.run(&what, &cases, |case| {
            Full::new(&device, heads, tokens, case.count, arithmetic)
        });
    }
}

/// A value of position `j` of `n`: a wave over the positions, so that a block left out shows, and some noise.
fn wave(element: usize, j: usize, n: usize, random: &mut Random) -> f32 {
    let phase = PI * (1 + element % 8) as f32 * j as f32 / n as f32;
    0.9 * phase.cos() + 0.1 * random.value()
}

fn half(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// Attention of one query over `[positions, head_dim]` keys and values, exactly, compared with `got`.
///
/// A score is off by the rounding of the query, 2^-11 in f16, and of its sum, times `scale * sum |q k|`; a
/// quotient of weights by twice that. Weights in f16 are rounded, or subnormal.
fn assert_exact(got: &[f32], q: &[f32], keys: &[f32], values: &[f32], halves: Halves) {
    let d = q.len();
    let scale = f64::from(scale(d));
    let dot = |k: &[f32], f: fn(f64) -> f64| -> f64 {
        let products = q
            .iter()
            .zip(k)
            .map(|(q, k)| f(f64::from(*q) * f64::from(*k)));
        products.sum::<f64>() * scale
    };
    let scores: Vec<f64> = keys.chunks_exact(d).map(|k| dot(k, |x| x)).collect();
    let size = (keys.chunks_exact(d))
        .map(|k| dot(k, f64::abs))
        .fold(0.0, f64::max);
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut want = vec![0.0; d];
    let mut largest = 0.0f64;
    for (weight, v) in weights.iter().zip(values.chunks_exact(d)) {
        for (want, v) in want.iter_mut().zip(v) {
            *want += weight / sum * f64::from(*v);
            largest = largest.max(f64::from(v.abs()));
        }
    }
    let n = scores.len() as f64;
    let terms = (d as f64 + n + 40.0) * U;
    let (of_queries, of_weights) = match halves {
        Halves::Rounded => (HALF_U, HALF_U + n * HALF_U / 16384.0),
        Halves::None => (0.0, 0.0),
    };
    let bound = largest * (2.0 * ((of_queries + terms) * size + terms) + of_weights);
    for (e, (got, want)) in got.iter().zip(&want).enumerate() {
        let off = (f64::from(*got) - want).abs();
        assert!(
            off <= bound,
            "element {e} over {n} keys: {got} for {want}, off by {off:e} of {bound:e}"
        );
    }
}

/// Whether queries and weights are rounded to f16.
#[derive(Clone, Copy)]
enum Halves {
    Rounded,
    None,
}

fn scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// The first head, one in the middle, the last.
fn some_heads(heads: Heads) -> [usize; 3] {
    [0, heads.heads / 2, heads.heads - 1]
}

/// Tokens at some depth of a cache that holds their keys.
struct Cached {
    heads: Heads,
    depth: usize,
    qkv: Vec<f32>,
    /// `[kv_heads, positions, head_dim]`
    keys: Vec<f32>,
    values: Vec<f32>,
    on_device: Memory,
    /// By no angle: `rope_and_store` has a bench of its own.
    rotations: [Memory; 2],
    /// Of several layers, alike, visited in turn.
    cache: [Memory; 2],
    first: Memory,
    scratch: Scratch,
    y: Memory,
}

impl Cached {
    fn new(
        device: &Arc<dyn Device>,
        heads: Heads,
        depth: usize,
        tokens: usize,
        working_set: usize,
    ) -> Result<Self, DeviceError> {
        let (positions, d) = (depth + tokens, heads.head_dim);
        let mut random = Random(positions as u64);
        let len = positions * heads.keys();
        let keys: Vec<f32> = random.values(len).into_iter().map(half).collect();
        let values: Vec<f32> = (0..len)
            .map(|i| half(wave(i % d, i / d % positions, positions, &mut random)))
            .collect();
        let layers = working_set.div_ceil(2 * len * size_of::<f16>()).max(1);
        let layers_of = |values: &[f32]| -> Result<Memory, DeviceError> {
            let halves: Vec<_> = values.iter().map(|v| f16::from_f32(*v)).collect();
            let memory = Memory::new(device, layers * len * size_of::<f16>())?;
            let all = memory.span::<f16>();
            all.slice(..len).upload(&halves)?;
            for layer in 1..layers {
                let to = all.slice(layer * len..(layer + 1) * len);
                all.slice(..len).copy_to(to)?;
            }
            Ok(memory)
        };
        let mut qkv = random.values(tokens * heads.columns());
        for (t, row) in qkv.chunks_exact_mut(heads.columns()).enumerate() {
            let (of_keys, of_values) = row[heads.queries()..].split_at_mut(heads.keys());
            for (to, all) in [(of_keys, &keys), (of_values, &values)] {
                for (to, head) in to.chunks_exact_mut(d).zip(all.chunks_exact(positions * d)) {
                    to.copy_from_slice(&head[(depth + t) * d..][..d]);
                }
            }
        }
        let pairs = tokens * d / 2;
        Ok(Self {
            heads,
            depth,
            rotations: [
                Memory::from_slice(device, &vec![1.0f32; pairs])?,
                Memory::from_slice(device, &vec![0.0f32; pairs])?,
            ],
            on_device: Memory::from_slice(device, &qkv)?,
            cache: [layers_of(&keys)?, layers_of(&values)?],
            qkv,
            keys,
            values,
            first: Memory::from_slice(device, &[depth as u32])?,
            scratch: Scratch::new(device, heads, positions, FEW)?,
            y: Memory::zeroed(device, tokens * heads.queries() * size_of::<f32>())?,
        })
    }
}

impl Work for Cached {
    fn turns(&self) -> usize {
        self.cache[0].bytes() / size_of::<f16>() / self.keys.len()
    }

    fn launch(&self, device: &dyn Device, turn: usize) -> Result<(), DeviceError> {
        let len = self.keys.len();
        let layer = |memory| Memory::span::<f16>(memory).slice(turn * len..(turn + 1) * len);
        let [keys, values] = self.cache.each_ref().map(layer);
        let (qkv, heads, cache) = (
            self.on_device.span(),
            self.heads,
            Cache::F16 { keys, values },
        );
        let (mask, scale) = (Mask::CAUSAL, scale(heads.head_dim));
        let (first, y) = (self.first.span(), self.y.span::<f32>());
        if !self.scratch.takes(self.qkv.len() / heads.columns()) {
            return attention(device, qkv, heads, cache, mask, scale, first, y);
        }
        let [cos, sin] = self.rotations.each_ref().map(Memory::span);
        let rotations = Rotations { cos, sin };
        let scratch = &self.scratch;
        rope_store_attention(
            device, qkv, heads, rotations, cache, mask, scale, first, scratch, y,
        )
    }

    fn check(&self) -> Result<(), DeviceError> {
        let (d, columns) = (self.heads.head_dim, self.heads.columns());
        let positions = self.keys.len() / self.heads.keys();
        let y = self.y.span::<f32>().to_vec()?;
        for token in checked(self.qkv.len() / columns) {
            for head in some_heads(self.heads) {
                let q = &self.qkv[token * columns + head * d..][..d];
                let first = head / self.heads.group() * positions * d;
                let seen = first..first + (self.depth + token + 1) * d;
                let got = &y[token * self.heads.queries() + head * d..][..d];
                let (keys, values) = (&self.keys[seen.clone()], &self.values[seen]);
                assert_exact(got, q, keys, values, Halves::Rounded);
            }
        }
        Ok(())
    }
}

/// Images whose tokens see each other.
struct Full {
    heads: Heads,
    tokens: usize,
    arithmetic: Arithmetic,
    qkv: Vec<f32>,
    on_device: Memory,
    y: Memory,
}

impl Full {
    fn new(
        device: &Arc<dyn Device>,
        heads: Heads,
        tokens: usize,
        images: usize,
        arithmetic: Arithmetic,
    ) -> Result<Self, DeviceError> {
        let mut random = Random(7);
        let rows = images * tokens;
        let mut qkv = random.values(rows * heads.columns());
        for (t, row) in qkv.chunks_exact_mut(heads.columns()).enumerate() {
            let values = row[heads.queries() + heads.keys()..].iter_mut();
            for (e, v) in values.enumerate() {
                *v = wave(e % heads.head_dim, t % tokens, tokens, &mut random);
            }
        }
        Ok(Self {
            heads,
            tokens,
            arithmetic,
            on_device: Memory::from_slice(device, &qkv)?,
            qkv,
            y: Memory::zeroed(device, rows * heads.queries() * size_of::<f32>())?,
        })
    }
}

impl Work for Full {
    fn launch(&self, device: &dyn Device, _turn: usize) -> Result<(), DeviceError> {
        let scale = scale(self.heads.head_dim);
        let (qkv, y) = (self.on_device.span(), self.y.span());
        full_attention(
            device,
            qkv,
            self.heads,
            self.tokens,
            scale,
            self.arithmetic,
            y,
        )
    }

    fn check(&self) -> Result<(), DeviceError> {
        let (d, columns) = (self.heads.head_dim, self.heads.columns());
        let (halves, round): (_, fn(f32) -> f32) = match self.arithmetic {
            Arithmetic::F16 => (Halves::Rounded, half),
            Arithmetic::F32 => (Halves::None, |v| v),
        };
        let y = self.y.span::<f32>().to_vec()?;
        let of = |rows: &[f32], column: usize| -> Vec<f32> {
            let rows = rows.chunks_exact(columns);
            rows.flat_map(|row| row[column..column + d].iter().map(|v| round(*v)))
                .collect()
        };
        for row in checked(self.qkv.len() / columns) {
            let image = self
                .qkv
                .chunks_exact(self.tokens * columns)
                .nth(row / self.tokens);
            let image = image.expect("the row is in one");
            for head in some_heads(self.heads) {
                let q = &self.qkv[row * columns + head * d..][..d];
                let keys = of(image, self.heads.queries() + head * d);
                let values = of(image, self.heads.queries() + self.heads.keys() + head * d);
                let got = &y[row * self.heads.queries() + head * d..][..d];
                assert_exact(got, q, &keys, &values, halves);
            }
        }
        Ok(())
    }
}
