//! The arithmetic of the transformer on raw slices and blocks.
//!
//! A *family* is one operation with one contract: `gemm`, `norm`, `rope`, `gate`, `attention`,
//! `quantize`. Each has a file in [`cpu`] with its maths, a safe method on [`cpu::Kernels`] that
//! checks every shape, and a plain scalar twin in `cpu/scalar` that is its definition. An
//! instruction set is a complete table of these functions, chosen once at start.
//!
//! Kernels work on the range they are given. They know no threads, no allocation, no model.

// Tiles are indexed by the letters of the maths, several arrays by the same one.
#![allow(clippy::needless_range_loop)]

pub mod candidates;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod heads;
pub mod mask;
pub mod view;

pub use phidias_quant as quant;
