//! Kernels for one NVIDIA GPU.
//!
//! Each family is a source `<family>.cu` and a file of safe functions that launch its kernels. The sources
//! share `common.cuh` and include nothing else, so that the compiler in NVRTC is all that is needed: at the
//! first use on a machine, for the GPU that is there.
//!
//! Kernels are launched on a [`Device`]. [`HostDevice`] is the one without a GPU: it compiles the same
//! sources with a C++ compiler and runs their threads in turns. It is slow, and for tests: what a kernel
//! computes is compared there with the scalar kernels of [`crate::cpu`].

pub mod attention;
#[cfg(test)]
mod check;
pub mod cublas;
mod device;
pub mod elementwise;
pub mod experts;
mod gpu;
mod host;
pub mod linear;
pub mod nvrtc;
pub mod peak;
mod rows;
pub mod sample;

pub use device::{
    Arg, Device, DeviceError, Kernel, Launch, Limits, Memory, Recording, Source, Span,
};
pub use gpu::Gpu;
pub use host::{HostDevice, HostMemory, Order, Traffic};
pub use rows::{Activations, Form, Head};
