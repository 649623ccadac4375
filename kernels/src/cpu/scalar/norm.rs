//! The definition of the norms.

use super::{LANES, dot, fold};

pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let mean = dot(x, x) / x.len() as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * inverse * w;
    }
}

pub(super) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let mean = mean(x, |x| x);
    let variance = self::mean(x, |x| (x - mean) * (x - mean));
    let inverse = 1.0 / (variance + eps).sqrt();
    for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
        *y = (x - mean) * inverse * w + b;
    }
}

/// The mean of `f(x)`, its sum in partial sums.
fn mean(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut acc = [0.0; LANES];
    for chunk in x.chunks(LANES) {
        for (acc, x) in acc.iter_mut().zip(chunk) {
            *acc += f(*x);
        }
    }
    fold(acc) / x.len() as f32
}
