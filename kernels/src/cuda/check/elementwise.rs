//! The elementwise kernels against the scalar ones: bit by bit where the arithmetic is the same, else
//! within derived bounds.

use super::{Random, U, each_device};
use crate::cpu::{Isa, Kernels};
use crate::cuda::elementwise::{
    Activation, Norm, Output, activate, add_norm, embed, finish_logits, gegelu, input, silu_mul,
    sum_norm,
};
use crate::cuda::linear::{Elements, Layout, Weights};
use crate::cuda::{Activations, Device, DeviceError, Form, Head, Memory, Span};
use phidias_quant::activations::{self, Activations as Tiles};
use phidias_quant::packed::{PANEL_ROWS, pack_panel};
use phidias_quant::{AlignedBytes, BLOCK, Format, Packed, PackedLayout, bf16, f16};
use std::sync::Arc;

/// Rows and columns: parts of a vector, of a block, of a warp; one block of threads and more.
const SHAPES: [(usize, usize); 7] = [
    (1, 1),
    (2, 3),
    (3, 32),
    (2, 33),
    (5, 68),
    (2, 132),
    (1, 4100),
];

fn scalar() -> &'static Kernels {
    Kernels::for_isa(Isa::Scalar).expect("runs everywhere")
}

/// What a function writes in each form: the floats, and bf16 and bytes that must be made of just these.
pub(in crate::cuda) fn in_every_form(
    device: &Arc<dyn Device>,
    (rows, cols): (usize, usize),
    run: impl Fn(Output<'_>) -> Result<(), DeviceError>,
) -> Result<Vec<f32>, DeviceError> {
    let plain = Memory::new(device, rows * cols * 4)?;
    run(plain.span::<f32>().into())?;
    let plain = plain.span::<f32>().to_vec()?;
    let padded = cols.next_multiple_of(BLOCK);
    let mut want = vec![0.0; rows * padded];
    for (want, plain) in want.chunks_exact_mut(padded).zip(plain.chunks_exact(cols)) {
        want[..cols].copy_from_slice(plain);
    }
    for form in [
        Form::F32,
        Form::Bf16,
        Form::Quantized { zero: 8 },
        Form::Quantized { zero: 128 },
    ] {
        let place = Memory::new(device, form.bytes(rows, cols))?;
        let out = form.place(place.span(), rows, cols);
        run(out.into())?;
        match out {
            Activations::F32(values) => assert_same(&values.to_vec()?, &want),
            Activations::Bf16(values) => {
                let want: Vec<_> = want.iter().map(|v| bf16::from_f32(*v).to_bits()).collect();
                assert_eq!(values.to_vec()?, want, "{rows} x {cols}");
            }
            Activations::Quantized {
                quants,
                heads,
                zero,
            } => {
                let mut tiles = Tiles::default();
                tiles.reshape(1, cols, zero);
                let (quants, heads) = (quants.to_vec()?, heads.to_vec()?);
                for (r, row) in plain.chunks_exact(cols).enumerate() {
                    let mut tile = tiles.tiles_mut().next().expect("one row");
                    activations::quantize(row, &mut tile, 0);
                    let blocks = padded / BLOCK;
                    let own = r * blocks..(r + 1) * blocks;
                    assert_eq!(&quants[r * padded..][..padded], &*tile.quants);
                    for (b, head) in heads[own].iter().enumerate() {
                        let want = Head {
                            start: tile.starts[b],
                            magic: tile.magics[b],
                        };
                        // A NaN is not equal to itself; where there is one its bits do not matter.
                        let both_nan = head.magic.is_nan() && want.magic.is_nan();
                        assert!(both_nan || *head == want, "{head:?} {want:?}");
                    }
                }
            }
        }
    }
    Ok(plain)
}

/// The same bits, or NaNs.
fn assert_same(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(same, "{i}: {got} {want}");
    }
}

/// Within a bound for each value, or both the same infinity or NaN.
fn assert_close(got: &[f32], want: &[f32], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(*got) - f64::from(*want)).abs();
        let same = got == want || (got.is_nan() && want.is_nan());
        assert!(
            same || off <= bound(i) + TINY,
            "{i}: {got} {want}, {off:e} of {:e}",
            bound(i)
        );
    }
}

/// Below the smallest normal number a rounding may cost more than its share.
const TINY: f64 = 1e-39;

/// Values of every size, those that are not finite, and blocks of zeros and of subnormal values.
fn all_kinds(random: &mut Random, n: usize) -> Vec<f32> {
    let odd = [
        0.0,
        -0.0,
        1e-40,
        3e38,
        -3e38,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    (0..n)
        .map(|i| match (i / BLOCK % 5, i % 64) {
            (3, _) => 0.0,
            (4, _) => random.value() * 1e-39,
            (_, 40) => odd[random.bits() as usize % odd.len()],
            _ => random.value() * [0.01, 1.0, 30.0][random.bits() as usize % 3],
        })
        .collect()
}

#[test]
fn rows_become_what_a_matrix_takes() {
    each_device(|device| {
        let mut random = Random(2);
        for shape @ (rows, cols) in SHAPES {
            let values = all_kinds(&mut random, rows * cols);
            let x = Memory::from_slice(device, &values)?;
            let got = in_every_form(device, shape, |out| match out {
                Output::Input(out) => input(&**device, x.span(), cols, out),
                Output::Rows(out) => x.span().copy_to(out),
            })?;
            assert_same(&got, &values);
        }
        Ok(())
    });
}

/// A gate's exponential is off by up to 2 units, 4 `U`, on either side, which the result feels at most
/// as much; and it takes part in up to six roundings. Where `exp` overflows on one side only, the
/// result is below 1e-36.
fn gate_bound(want: f32) -> f64 {
    14.0 * U * f64::from(want).abs()
}

#[test]
fn gates_are_those_of_the_cpu() {
    each_device(|device| {
        let mut random = Random(3);
        for shape @ (rows, inner) in SHAPES {
            let values = all_kinds(&mut random, rows * 2 * inner);
            let x = Memory::from_slice(device, &values)?;
            let mut want = vec![0.0; rows * inner];
            for (y, x) in want
                .chunks_exact_mut(inner)
                .zip(values.chunks_exact(2 * inner))
            {
                scalar().silu_mul(&x[..inner], &x[inner..], y);
            }
            let got = in_every_form(device, shape, |out| {
                silu_mul(&**device, x.span(), inner, out)
            })?;
            assert_close(&got, &want, |i| gate_bound(want[i]));
            for limit in [f32::INFINITY, 20.0, 0.5] {
                for (y, x) in want
                    .chunks_exact_mut(inner)
                    .zip(values.chunks_exact(2 * inner))
                {
                    scalar().gegelu(x, limit, y);
                }
                let got = in_every_form(device, shape, |out| {
                    gegelu(&**device, x.span(), inner, limit, out)
                })?;
                assert_close(&got, &want, |i| gate_bound(want[i]));
            }
        }
        Ok(())
    });
}

#[test]
fn activations_are_those_of_the_cpu_in_place_too() {
    each_device(|device| {
        let mut random = Random(4);
        for shape @ (rows, cols) in SHAPES {
            let values = all_kinds(&mut random, rows * cols);
            for activation in [Activation::QuickGelu, Activation::Gelu] {
                let x = Memory::from_slice(device, &values)?;
                let mut want = values.clone();
                match activation {
                    Activation::QuickGelu => scalar().quick_gelu(&mut want),
                    Activation::Gelu => scalar().gelu(&mut want),
                }
                let got = in_every_form(device, shape, |out| {
                    activate(&**device, activation, x.span(), cols, out)
                })?;
                // All is the same but the exponential; the tail of `gelu` is that times less than x.
                let bound = |i: usize| {
                    let size = match activation {
                        Activation::QuickGelu => f64::from(want[i]).abs(),
                        Activation::Gelu => {
                            f64::from(values[i].max(0.0) - want[i]).abs() + f64::from(want[i]).abs()
                        }
                    };
                    14.0 * U * size
                };
                assert_close(&got, &want, bound);
                activate(&**device, activation, x.span(), cols, x.span::<f32>())?;
                assert_same(&x.span::<f32>().to_vec()?, &got);
            }
        }
        Ok(())
    });
}

#[test]
fn norms_are_those_of_the_cpu() {
    each_device(|device| {
        let mut random = Random(5);
        for shape @ (rows, cols) in SHAPES {
            let values = random.values(rows * cols, 3.0);
            let added = random.values(rows * cols, 1.0);
            let (weight, bias) = (random.values(cols, 2.0), random.values(cols, 1.0));
            let sum: Vec<f32> = values.iter().zip(&added).map(|(x, b)| x + b).collect();
            let eps = 1e-5;
            let [w, b, branch] = [&weight, &bias, &added].map(|v| Memory::from_slice(device, v));
            let (w, b, branch) = (w?, b?, branch?);
            let rms = Norm::Rms {
                weight: w.span(),
                eps,
            };
            let layer = Norm::Layer {
                weight: w.span(),
                bias: b.span(),
                eps,
            };
            for (norm, branch) in [
                (rms, Some(branch.span())),
                (rms, None),
                (layer, Some(branch.span())),
                (layer, None),
            ] {
                let before = if branch.is_some() { &sum } else { &values };
                let mut want = vec![0.0; rows * cols];
                for (y, x) in want.chunks_exact_mut(cols).zip(before.chunks_exact(cols)) {
                    match norm {
                        Norm::Rms { .. } => scalar().rms_norm(x, &weight, eps, y),
                        Norm::Layer { .. } => scalar().layer_norm(x, &weight, &bias, eps, y),
                    }
                }
                let got = in_every_form(device, shape, |out| {
                    let x = Memory::from_slice(device, &values)?;
                    add_norm(&**device, x.span(), branch, norm, out)?;
                    assert_same(&x.span::<f32>().to_vec()?, before);
                    Ok(())
                })?;
                // A sum on the CPU takes part in cols / 16 + 5 roundings at most, here in fewer where there
                // are more columns than threads, and in 14 where there are not: the tree.
                let depth = (cols.div_ceil(16) + 14) as f64;
                let bound = |i: usize| match norm {
                    // Half of what the mean square is off by, then six roundings; on either side.
                    Norm::Rms { .. } => (2.0 * (depth / 2.0 + 6.0)) * U * f64::from(want[i]).abs(),
                    // The same of what is scaled, and what the mean is off by, scaled.
                    Norm::Layer { .. } => {
                        let x = &before[i / cols * cols..][..cols];
                        let n = cols as f64;
                        let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
                        let variance = x
                            .iter()
                            .map(|x| (f64::from(*x) - mean).powi(2))
                            .sum::<f64>()
                            / n;
                        let scale =
                            f64::from(weight[i % cols]).abs() / (variance + f64::from(eps)).sqrt();
                        let largest = x.iter().map(|x| f64::from(x.abs())).sum::<f64>() / n
                            + f64::from(x[i % cols].abs());
                        2.0 * (depth + 6.0)
                            * U
                            * (scale * largest * 2.0 + f64::from(want[i]).abs() + 1.0)
                    }
                };
                assert_close(&got, &want, bound);
                if let Some(branch) = branch {
                    some_rows_of_the_sum(device, shape, &values, branch, norm)?;
                }
                // A row alone has the bits that it has beside others.
                let last = (rows - 1) * cols..;
                let alone = Memory::from_slice(device, &before[last.clone()])?;
                add_norm(&**device, alone.span(), None, norm, alone.span::<f32>())?;
                assert_same(&alone.span::<f32>().to_vec()?, &got[last]);
            }
        }
        Ok(())
    });
}

/// What the head does in one launch: the bits that come of adding, the norm, a copy of some rows, and their shaping,
/// and the rows stay.
fn some_rows_of_the_sum(
    device: &Arc<dyn Device>,
    (rows, cols): (usize, usize),
    values: &[f32],
    branch: Span<'_, f32>,
    norm: Norm<'_>,
) -> Result<(), DeviceError> {
    let normed = Memory::from_slice(device, values)?;
    add_norm(
        &**device,
        normed.span(),
        Some(branch),
        norm,
        normed.span::<f32>(),
    )?;
    let x = Memory::from_slice(device, values)?;
    for of in [0..rows, rows - 1..rows, 0..1, rows / 2..rows] {
        let part = of.start * cols..of.end * cols;
        let copy = Memory::new(device, part.len() * size_of::<f32>())?;
        (normed.span::<f32>().slice(part.clone())).copy_to(copy.span())?;
        for form in [
            Form::F32,
            Form::Bf16,
            Form::Quantized { zero: 8 },
            Form::Quantized { zero: 128 },
        ] {
            let bytes = form.bytes(of.len(), cols);
            let [one, four] = [Memory::zeroed(device, bytes), Memory::zeroed(device, bytes)];
            let (one, four) = (one?, four?);
            let place = |memory| form.place(Memory::span(memory), of.len(), cols);
            let (of_x, of_branch) = (x.span().slice(part.clone()), branch.slice(part.clone()));
            sum_norm(&**device, of_x, of_branch, norm, place(&one))?;
            input(&**device, copy.span(), cols, place(&four))?;
            let (one, four) = (one.span::<u8>().to_vec()?, four.span::<u8>().to_vec()?);
            assert!(one == four, "rows {of:?} of {rows} x {cols} as {form:?}");
        }
    }
    assert_same(&x.span::<f32>().to_vec()?, values);
    Ok(())
}

#[test]
fn embeddings_are_rows_of_the_table() {
    each_device(|device| {
        let mut random = Random(6);
        for (rows, cols) in [(5, 3), (17, 32), (40, 68), (16, 1030)] {
            let values = random.values(rows * cols, 2.0);
            // The last one is no row.
            let ids = [rows as u32 - 1, 0, 3, 3, rows as u32];
            let ids_there = Memory::from_slice(device, &ids)?;
            for elements in [
                Elements::F32,
                Elements::F16,
                Elements::Bf16,
                Elements::Packed(Format::Q4),
                Elements::Packed(Format::Q8),
            ] {
                let (stored, widened) = table(elements, (rows, cols), &values);
                let layout = Layout::new(elements, rows, cols).expect("a shape");
                let there = Memory::new(device, layout.bytes())?;
                layout.upload(stored.as_ref(), there.span())?;
                let table = Weights::new(layout, there.span(), None);
                for multiplier in [1.0, 10.0] {
                    let x = Memory::new(device, ids.len() * cols * 4)?;
                    embed(&**device, &table, ids_there.span(), multiplier, x.span())?;
                    let row = |id: &u32| &widened[*id as usize * cols..][..cols];
                    let rows = ids[..4].iter().flat_map(row).map(|v| v * multiplier);
                    let want: Vec<f32> = rows.chain(vec![f32::NAN; cols]).collect();
                    assert_same(&x.span::<f32>().to_vec()?, &want);
                }
            }
        }
        Ok(())
    });
}

/// A matrix as a file has it, and the values that are then in it.
fn table(
    elements: Elements,
    (rows, cols): (usize, usize),
    values: &[f32],
) -> (AlignedBytes, Vec<f32>) {
    let copy = |bytes: &[u8]| AlignedBytes::try_copy(bytes).expect("memory");
    match elements {
        Elements::F32 => (copy(bytemuck::cast_slice(values)), values.to_vec()),
        Elements::F16 => {
            let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            let widened = halves.iter().map(|v| v.to_f32()).collect();
            (copy(bytemuck::cast_slice(&halves)), widened)
        }
        Elements::Bf16 => {
            let halves: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            let widened = halves.iter().map(|v| v.to_f32()).collect();
            (copy(bytemuck::cast_slice(&halves)), widened)
        }
        Elements::Packed(format) => {
            let layout = PackedLayout::new(format, rows, cols).expect("a shape");
            let mut bytes = AlignedBytes::try_zeroed(layout.bytes()).expect("memory");
            let panels = bytes.as_mut().chunks_exact_mut(layout.panel_bytes());
            for (panel, rows) in panels.zip(values.chunks(PANEL_ROWS * cols)) {
                pack_panel(&layout, rows, panel).expect("finite");
            }
            let matrix = Packed::new(layout, bytes.as_ref()).expect("its bytes");
            let mut widened = vec![0.0; rows * cols];
            for (r, row) in widened.chunks_exact_mut(cols).enumerate() {
                matrix.dequantize_row(r, row);
            }
            (bytes, widened)
        }
    }
}

#[test]
fn logits_are_divided_and_unused_ids_lowest() {
    each_device(|device| {
        let mut random = Random(1);
        let (rows, vocab) = (3, 300);
        let before = random.values(rows * vocab, 10.0);
        let logits = Memory::from_slice(device, &before)?;
        let unused = Memory::from_slice(device, &[0u32, 1, 250, 260])?;
        finish_logits(&**device, logits.span(), vocab, 3.0, unused.span())?;
        let got = logits.span::<f32>().to_vec()?;
        for (i, (got, before)) in got.iter().zip(&before).enumerate() {
            let want = match i % vocab {
                0 | 250..260 => f32::MIN,
                _ => before / 3.0,
            };
            assert_eq!(*got, want, "{i}");
        }
        Ok(())
    });
}
