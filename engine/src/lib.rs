//! Memory, files, threads, tokens: everything a language model needs that is not its formula.
//!
//! | module | what it is |
//! |---|---|
//! | [`checkpoint`] | safetensors files, mapped and checked; writing prepacked ones |
//! | [`files`] | small files whole, up to a limit |
//! | [`tensor`] | shape and dtype over shared bytes |
//! | [`mask`] | which keys a query sees |
//! | [`kv_cache`] | keys and values of a sequence, growing on demand |
//! | [`backend`] | whole operations on whole buffers, on the CPU |
//! | [`sampling`], [`generate`] | from logits to a token, from a prompt to an answer |
//! | [`lookup`] | guessing several tokens of an answer from the sequence itself |
//! | [`pool`], [`machine`], [`memory`] | threads, what the machine has, what a model will take |
//! | [`peaks`] | how fast the machine can be at best, measured |
//!
//! No intrinsics and no tensor names here.
#![deny(unsafe_code)]

pub mod backend;
pub mod bytes;
pub mod cancel;
pub mod checkpoint;
pub mod files;
pub mod generate;
pub mod huge;
pub mod kv_cache;
pub mod lookup;
pub mod machine;
pub mod memory;
pub mod peaks;
pub mod pool;
pub mod sampling;
pub mod tensor;

pub use bytes::Bytes;
pub use cancel::Cancel;
pub use huge::OwnedBytes;
pub use phidias_kernels as kernels;
pub use phidias_kernels::cpu::{Isa, Kernels, UnknownIsa};
pub use phidias_kernels::mask;
pub use phidias_kernels::view::Elements;
pub use phidias_quant as quant;
pub use phidias_quant::Format;
pub use phidias_quant::packed::VERSION as PACKED_VERSION;
