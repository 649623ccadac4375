//! The kernels under the roofs of the machine (Williams, Waterman & Patterson 2009): operations a byte
//! to the right, operations a second upwards, both in powers of ten. No kernel can be above the slope
//! of the memory bandwidth or the roof of its numbers.

use super::kernels::KernelRecord;
use super::limits::Limit;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::error::Error;
use std::ops::Range;

const SIZE: (u32, u32) = (1280, 860);
/// Size of the labels as the drawing library takes it; in pixels it is four fifths of that.
const FONT: i32 = 14;
/// Width of a letter as SVG viewers draw it, on average, in hundredths of that size.
const LETTER: i32 = 46;

/// Draws records as an SVG picture. Nothing is drawn of none.
/// # Errors
/// What the drawing reports.
pub fn svg(records: &[KernelRecord]) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut text = String::new();
    if let Some(first) = records.first() {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&root, first, records).map_err(|e| e.to_string())?;
        root.present().map_err(|e| e.to_string())?;
    }
    Ok(text)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(
    root: &Area<'_>,
    first: &KernelRecord,
    records: &[KernelRecord],
) -> Result<(), Box<dyn Error>> {
    root.fill(&WHITE)?;
    let bandwidth = first.peak_gb_s;
    let roofs = KernelRecord::roofs(records);
    let x_of = |r: &KernelRecord| r.ops as f64 / r.bytes as f64;
    let top = roofs.iter().fold(0.0, |m: f64, r| m.max(r.gop_s));
    let right = (top / bandwidth).max(1.0);
    let xs = decades(records.iter().map(x_of).chain([right]));
    let xs = xs.start..xs.end * 4.0; // room for labels
    let ys = decades(records.iter().map(|r| r.gop_s).chain([top]));
    let caption = format!(
        "Kernels at the shapes of Phi-3.5-mini: {} table, {} thread{}",
        first.isa,
        first.threads,
        if first.threads == 1 { "" } else { "s" }
    );
    let mut chart = ChartBuilder::on(root)
        .caption(caption, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(xs.clone().log_scale(), ys.clone().log_scale())?;
    (chart.configure_mesh())
        .x_desc("operations a byte")
        .y_desc("Gop/s")
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 15))
        .light_line_style(RGBColor(240, 240, 240))
        .bold_line_style(RGBColor(215, 215, 215))
        .x_label_formatter(&|v| number(*v))
        .y_label_formatter(&|v| number(*v))
        .draw()?;
    let mut labels = Labels {
        taken: Vec::new(),
        room: SIZE,
    };
    let from = (ys.start / bandwidth).max(xs.start);
    let mut lines = vec![(
        vec![(from, from * bandwidth), (right, right * bandwidth)],
        RGBColor(90, 90, 90),
        format!("memory: {bandwidth:.1} GB/s"),
    )];
    for roof in &roofs {
        let (top, corner) = (roof.gop_s, (roof.gop_s / bandwidth).clamp(xs.start, xs.end));
        let text = format!("{}, {}: {top:.0} Gop/s", roof.number, roof.instruction);
        let line = vec![(corner, top), (xs.end, top)];
        lines.push((line, color(roof.number), text));
    }
    for (line, color, text) in lines {
        let ends = [line[0], line[1]].map(|p| chart.backend_coord(&p));
        chart.draw_series(LineSeries::new(line, color.stroke_width(2)))?;
        labels.keep_off(ends);
        // Beside the middle of the slope, above the right end of a roof.
        let [(left, bottom), (right, top)] = ends;
        let (at, anchor) = if bottom == top {
            ((right - 6, top - FONT), HPos::Right)
        } else {
            (
                ((left + right) / 2 - 14, (bottom + top) / 2 - 8),
                HPos::Right,
            )
        };
        labels.fixed(root, at, &text, anchor, color)?;
    }
    let points: Vec<_> = (records.iter())
        .map(|r| (chart.backend_coord(&(x_of(r), r.gop_s)), r))
        .collect();
    chart.draw_series(
        records
            .iter()
            .map(|r| Circle::new((x_of(r), r.gop_s), 4, color(r.peak_number).filled())),
    )?;
    for (at, _) in &points {
        labels.taken.push(Box2::around(*at, 4));
    }
    for (at, r) in &points {
        let matrix = r.shape.split(' ').next().unwrap_or_default();
        let matrix = matrix.trim_end_matches("_proj");
        let name = match r.kernel.split_once('_') {
            Some(("gemm", _)) => format!("{} {matrix}", r.kernel),
            _ => r.kernel.clone(),
        };
        let tokens = if r.tokens == 1 { "token" } else { "tokens" };
        let share = 100.0 * r.share_of_peak;
        let text = format!("{name}, {} {tokens}: {share:.0} %", r.tokens);
        labels.near(root, *at, &text, color(r.peak_number))?;
    }
    Ok(())
}

fn color(limit: Limit) -> RGBColor {
    match limit {
        Limit::Int8 => RGBColor(0, 90, 181),
        _ => RGBColor(190, 60, 20),
    }
}

fn number(value: f64) -> String {
    if value < 1.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}

/// From a little below the smallest value to a little above the largest.
fn decades(values: impl Iterator<Item = f64>) -> Range<f64> {
    let usable = values.filter(|v| v.is_finite() && *v > 0.0);
    let (min, max) = usable.fold((f64::MAX, f64::MIN_POSITIVE), |(a, b), v| {
        (a.min(v), b.max(v))
    });
    min.min(max) / 2.0..max * 2.5
}

/// A rectangle: left, top, right, bottom.
#[derive(Clone, Copy, Debug)]
struct Box2 {
    left: i32,
    top: i32,
    right: i32,
    bottom: i32,
}

impl Box2 {
    fn around((x, y): (i32, i32), radius: i32) -> Self {
        Self {
            left: x - radius,
            top: y - radius,
            right: x + radius,
            bottom: y + radius,
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }
}

/// Puts labels where there is room.
struct Labels {
    taken: Vec<Box2>,
    room: (u32, u32),
}

impl Labels {
    /// Leaves a line free.
    fn keep_off(&mut self, [(x0, y0), (x1, y1)]: [(i32, i32); 2]) {
        let steps = ((x1 - x0).abs().max((y1 - y0).abs()) / 8).clamp(1, 1000);
        let at = |i: i32| (x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps);
        (self.taken).extend((0..=steps).map(|i| Box2::around(at(i), 3)));
    }

    fn fixed(
        &mut self,
        root: &Area<'_>,
        (x, y): (i32, i32),
        text: &str,
        anchor: HPos,
        color: RGBColor,
    ) -> Result<(), Box<dyn Error>> {
        let width = width(text);
        let left = if matches!(anchor, HPos::Right) {
            x - width
        } else {
            x
        };
        self.taken.push(Box2 {
            left,
            top: y - FONT / 2 - 1,
            right: left + width,
            bottom: y + FONT / 2 + 1,
        });
        let style = ("sans-serif", FONT)
            .into_text_style(root)
            .color(&color)
            .pos(Pos::new(anchor, VPos::Center));
        root.draw_text(text, &style, (x, y))?;
        Ok(())
    }

    /// The label of a point: beside it, or a bit away with a line to it.
    fn near(
        &mut self,
        root: &Area<'_>,
        (x, y): (i32, i32),
        text: &str,
        color: RGBColor,
    ) -> Result<(), Box<dyn Error>> {
        let (width, half) = (width(text), FONT / 2 + 1);
        let beside = |left: bool, dy: i32, dx: i32| {
            let start = if left { x - dx - width } else { x + dx };
            Box2 {
                left: start,
                top: y + dy - half,
                right: start + width,
                bottom: y + dy + half,
            }
        };
        let distances: [i32; 15] = [
            0, 14, -14, 28, -28, 42, -42, 56, -56, 70, -70, 84, -84, 112, -112,
        ];
        let candidates = distances.iter().flat_map(|dy| {
            let dx = 8 + dy.abs() / 3;
            [beside(false, *dy, dx), beside(true, *dy, dx)]
        });
        let free = |b: &Box2| {
            b.left > 70
                && b.right < self.room.0 as i32 - 10
                && b.top > 40
                && b.bottom < self.room.1 as i32 - 60
                && !self.taken.iter().any(|t| t.overlaps(b))
        };
        // With no room at all it overlaps: better than a point without a name.
        let place = candidates.clone().find(free).unwrap_or(beside(false, 0, 8));
        let middle = (place.top + place.bottom) / 2;
        if (middle - y).abs() > 1 {
            let end = if place.left > x {
                place.left - 2
            } else {
                place.right + 2
            };
            let line = PathElement::new(vec![(x, y), (end, middle)], color.mix(0.5));
            root.draw(&line)?;
        }
        self.fixed(root, (place.left, middle), text, HPos::Left, color)
    }
}

fn width(text: &str) -> i32 {
    text.chars().count() as i32 * FONT * LETTER / 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Spread;
    use crate::bench::limits::{Around, Limits};

    fn record(kernel: &str, bytes: usize, ops: usize, share: f64) -> KernelRecord {
        let limits = Limits {
            read_gb_s: 50.0,
            int8_gop_s: 2000.0,
            bf16_gop_s: 1000.0,
            f32_gop_s: 500.0,
        };
        let seconds = (bytes as f64 / 50e9).max(ops as f64 / 2000e9) / share;
        KernelRecord {
            kernel: kernel.to_owned(),
            shape: "qkv_proj 9216 x 3072".to_owned(),
            tokens: 512,
            isa: "scalar",
            threads: 2,
            calls: 3,
            seconds: Spread::of(&[seconds]).unwrap(),
            bytes,
            ops,
            gb_s: bytes as f64 / seconds / 1e9,
            gop_s: ops as f64 / seconds / 1e9,
            peak_gb_s: 50.0,
            peak_gop_s: 2000.0,
            peak_number: Limit::Int8,
            peak_instruction: "vpdpbusd zmm".to_owned(),
            bound: Limit::Int8,
            share_of_peak: share,
            peaks: Around {
                before: limits,
                after: limits,
            },
        }
    }

    #[test]
    fn every_kernel_has_a_point_and_a_name_and_the_roofs_are_there() {
        let records = [
            record("gemm_q4", 30_000_000, 100_000_000, 0.9),
            record("gemm_q8", 70_000_000, 50_000_000_000, 0.7),
            KernelRecord {
                peak_number: Limit::F32,
                peak_instruction: "vfmadd231ps zmm".to_owned(),
                peak_gop_s: 500.0,
                ..record("attend_f16", 50_000_000, 50_000_000, 0.5)
            },
        ];
        let picture = svg(&records).unwrap();
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
        assert_eq!(picture.matches("<circle").count(), 3);
        for words in [
            "gemm_q4 qkv, 512 tokens: 90 %",
            "attend_f16, 512 tokens: 50 %",
            "int8, vpdpbusd zmm: 2000 Gop/s",
            "f32, vfmadd231ps zmm: 500 Gop/s",
            "50.0 GB/s",
            "operations a byte",
        ] {
            assert!(picture.contains(words), "no '{words}'");
        }
    }

    #[test]
    fn degenerate_records_are_no_panic() {
        assert_eq!(svg(&[]).unwrap(), "");
        let mut zero = record("gemm_q4", 1, 0, 1.0);
        zero.gop_s = f64::NAN;
        zero.peak_gb_s = 0.0;
        let _ = svg(&[zero]);
    }

    #[test]
    fn labels_do_not_lie_on_each_other() {
        let a = Box2::around((10, 10), 5);
        assert!(a.overlaps(&Box2::around((14, 14), 5)));
        assert!(!a.overlaps(&Box2::around((20, 10), 5)));
    }
}
