//! What works on activations alone: the rotation with the cache, the norm with the residual, the gate.
//!
//! Up to 512 tokens all of it stays in the second cache, so these can be faster than memory; and of one
//! token the figure says how long the shortest kernel takes.

use crate::timing::{Bench, Case, Cost, Random, Work, assert_near, checked, scalar};
use phidias::engine::kernels::cuda::attention::{Cache, Rotations, rope_and_store};
use phidias::engine::kernels::cuda::elementwise::{Norm, Output, add_norm, silu_mul};
use phidias::engine::kernels::cuda::{Activations, Device, DeviceError, Form, Memory};
use phidias::engine::kernels::heads::Heads;
use phidias::engine::quant::f16;
use std::sync::Arc;

/// A norm on the CPU: 195 roundings of 2^-24 in a mean of squares, halved by the root, and some more; here
/// 17, and an exponential of a gate is off by two units.
const TOLERANCE: f32 = 1.5e-5;
const EPS: f32 = 1e-5;

/// What rows are made for: a sum, the packed formats, bf16.
const FORMS: [(&str, Form); 3] = [
    ("f32", Form::F32),
    ("q4", Form::Quantized { zero: 8 }),
    ("bf16", Form::Bf16),
];

pub fn bench(bench: &mut Bench) {
    let (shapes, device) = (bench.shapes, Arc::clone(&bench.device));
    let cases = |bytes: &dyn Fn(usize) -> usize| -> Vec<Case> {
        let case = |&count: &usize| Case {
            count,
            cost: Cost::Bytes(bytes(count)),
        };
        shapes.tokens.iter().map(case).collect()
    };
    let heads = shapes.heads;
    let of_rope = cases(&|n| {
        let floats = heads.columns() + heads.head_dim + heads.queries();
        n * (floats * size_of::<f32>() + 2 * heads.keys() * size_of::<f16>())
    });
    let what = format!(
        "rope_and_store, {} heads of {}",
        heads.heads, heads.head_dim
    );
    bench.run(&what, &of_rope, |case| {
        Rope::new(&device, heads, case.count)
    });
    for (form_name, form) in FORMS {
        for (name, step, width) in [
            ("add_norm", Step::AddNorm, shapes.hidden),
            ("silu_mul", Step::SiluMul, shapes.inner),
        ] {
            let cases = cases(&|n| {
                let floats = match step {
                    // Both are read, their sum is written.
                    Step::AddNorm => (3 * n + 1) * width,
                    Step::SiluMul => 2 * n * width,
                };
                floats * size_of::<f32>() + form.bytes(n, width)
            });
            bench.run(&format!("{name} to {form_name}, {width}"), &cases, |case| {
                Rows::new(&device, step, form, case.count, width)
            });
        }
    }
}

/// Projections of tokens from position 0 on.
struct Rope {
    heads: Heads,
    qkv: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `qkv`, cosines, sines.
    inputs: [Memory; 3],
    cache: [Memory; 2],
    first: Memory,
}

impl Rope {
    fn new(device: &Arc<dyn Device>, heads: Heads, tokens: usize) -> Result<Self, DeviceError> {
        let mut random = Random(3);
        let qkv = random.values(tokens * heads.columns());
        let angles = random.values(tokens * heads.head_dim / 2);
        let (sin, cos): (Vec<_>, Vec<_>) = angles.iter().map(|a| (3.0 * a).sin_cos()).unzip();
        let place = || Memory::zeroed(device, tokens * heads.keys() * size_of::<f16>());
        Ok(Self {
            heads,
            inputs: [
                Memory::from_slice(device, &qkv)?,
                Memory::from_slice(device, &cos)?,
                Memory::from_slice(device, &sin)?,
            ],
            qkv,
            cos,
            sin,
            cache: [place()?, place()?],
            first: Memory::from_slice(device, &[0u32])?,
        })
    }
}

impl Work for Rope {
    fn launch(&self, device: &dyn Device, _turn: usize) -> Result<(), DeviceError> {
        let [qkv, cos, sin] = self.inputs.each_ref().map(Memory::span);
        let [keys, values] = self.cache.each_ref().map(Memory::span);
        let rotations = Rotations { cos, sin };
        let cache = Cache::F16 { keys, values };
        rope_and_store(device, qkv, self.heads, rotations, cache, self.first.span())
    }

    /// Bit by bit: the arithmetic is the same.
    fn check(&self) -> Result<(), DeviceError> {
        let (d, columns, queries) = (
            self.heads.head_dim,
            self.heads.columns(),
            self.heads.queries(),
        );
        let tokens = self.qkv.len() / columns;
        let rows = self.inputs[0].span::<f32>().to_vec()?;
        let [keys, values] = self.cache.each_ref().map(|m| m.span::<f16>().to_vec());
        let (keys, values) = (keys?, values?);
        for t in checked(tokens) {
            let mut row = self.qkv[t * columns..][..columns].to_vec();
            let (rotated, of_values) = row.split_at_mut(queries + self.heads.keys());
            let own = t * d / 2..(t + 1) * d / 2;
            scalar().rope(rotated, &self.cos[own.clone()], &self.sin[own]);
            let (of_queries, of_keys) = rotated.split_at(queries);
            assert_eq!(&rows[t * columns..][..queries], of_queries, "queries");
            for (got, want, what) in [(&keys, of_keys, "keys"), (&values, &*of_values, "values")] {
                for (head, want) in want.chunks_exact(d).enumerate() {
                    let got = &got[(head * tokens + t) * d..][..d];
                    let want: Vec<_> = want.iter().map(|v| f16::from_f32(*v)).collect();
                    assert_eq!(got, want, "{what} of token {t}, head {head}");
                }
            }
        }
        Ok(())
    }
}

/// What is done to rows.
#[derive(Clone, Copy)]
enum Step {
    /// The residual and RMSNorm.
    AddNorm,
    /// The gate; rows of the input are twice as long.
    SiluMul,
}

/// Rows that become others.
struct Rows {
    step: Step,
    form: Form,
    rows: usize,
    width: usize,
    x: Vec<f32>,
    /// The branch and the weight of the norm, `[rows, width]` and `[width]`.
    branch: Vec<f32>,
    weight: Vec<f32>,
    /// `x`, `branch`, `weight`
    inputs: [Memory; 3],
    y: Memory,
}

impl Rows {
    fn new(
        device: &Arc<dyn Device>,
        step: Step,
        form: Form,
        rows: usize,
        width: usize,
    ) -> Result<Self, DeviceError> {
        let mut random = Random(5);
        let (of_x, of_norm) = match step {
            Step::AddNorm => (rows * width, 1),
            Step::SiluMul => (2 * rows * width, 0),
        };
        let x = random.values(of_x);
        let branch = random.values(of_norm * rows * width);
        let weight = random.values(of_norm * width);
        Ok(Self {
            step,
            form,
            rows,
            width,
            inputs: [
                Memory::from_slice(device, &x)?,
                Memory::from_slice(device, &branch)?,
                Memory::from_slice(device, &weight)?,
            ],
            x,
            branch,
            weight,
            y: Memory::zeroed(device, form.bytes(rows, width))?,
        })
    }

    fn activations(&self) -> Activations<'_> {
        self.form.place(self.y.span(), self.rows, self.width)
    }

    /// The results, and by how much each may be off because of its form.
    fn results(&self) -> Result<(Vec<f32>, Vec<f32>), DeviceError> {
        Ok(match self.activations() {
            Activations::F32(values) => {
                let values = values.to_vec()?;
                let slack = vec![0.0; values.len()];
                (values, slack)
            }
            // Of the 8 bits of a bf16 half a unit in the last place.
            Activations::Bf16(bits) => {
                let widen = |bits: u16| f32::from_bits(u32::from(bits) << 16);
                let values: Vec<f32> = bits.to_vec()?.into_iter().map(widen).collect();
                let slack = values.iter().map(|v| v.abs() / 256.0).collect();
                (values, slack)
            }
            // Half a step.
            Activations::Quantized { quants, heads, .. } => {
                let steps = heads.to_vec()?;
                let steps = steps.iter().map(|h| h.magic / (1.5 * (1 << 23) as f32));
                let steps: Vec<f32> = steps.flat_map(|step| [step; 32]).collect();
                let quants = quants.to_vec()?;
                let values = quants.iter().zip(&steps).map(|(q, s)| f32::from(*q) * s);
                (values.collect(), steps.iter().map(|s| s / 2.0).collect())
            }
        })
    }
}

impl Work for Rows {
    fn launch(&self, device: &dyn Device, _turn: usize) -> Result<(), DeviceError> {
        let [x, branch, weight] = self.inputs.each_ref().map(Memory::span);
        let out = Output::from(self.activations());
        match self.step {
            Step::AddNorm => {
                let norm = Norm::Rms { weight, eps: EPS };
                add_norm(device, x, Some(branch), norm, out)
            }
            Step::SiluMul => silu_mul(device, x, self.width, out),
        }
    }

    fn check(&self) -> Result<(), DeviceError> {
        let width = self.width;
        let (values, slack) = self.results()?;
        let (mut got, mut slack_of, mut want) = (Vec::new(), Vec::new(), Vec::new());
        for row in checked(self.rows) {
            let own = row * width..(row + 1) * width;
            let mut y = vec![0.0; width];
            match self.step {
                Step::AddNorm => {
                    let both = self.x[own.clone()].iter().zip(&self.branch[own.clone()]);
                    let sum: Vec<f32> = both.map(|(x, b)| x + b).collect();
                    scalar().rms_norm(&sum, &self.weight, EPS, &mut y);
                }
                Step::SiluMul => {
                    let x = &self.x[2 * row * width..][..2 * width];
                    scalar().silu_mul(&x[..width], &x[width..], &mut y);
                }
            }
            want.extend(y);
            got.extend_from_slice(&values[own.clone()]);
            slack_of.extend_from_slice(&slack[own]);
        }
        assert_near(&got, &want, TOLERANCE, |i| slack_of[i]);
        Ok(())
    }
}
