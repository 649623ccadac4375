//! NVIDIA's cuBLAS, for comparison: benches time its products beside ours. Nothing else calls it, and it is looked for
//! when somebody asks for it.

use super::device::{Arg, Device, DeviceError, Span};
use super::gpu::Gpu;
use super::nvrtc;
use super::rows::rows_of;
use cudarc::cublas::result::{self, CublasError};
use cudarc::cublas::sys;
use std::fmt;
use std::sync::Arc;

/// The library with a GPU whose queue it works in.
pub struct Cublas {
    gpu: Arc<Gpu>,
    handle: sys::cublasHandle_t,
}

impl fmt::Debug for Cublas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuBLAS on {:?}", self.gpu)
    }
}

/// Whether the library is where the system looks for it, or in a toolkit as [`nvrtc::find`] says.
fn is_found() -> bool {
    // SAFETY: loading the library runs its start-up code, which is NVIDIA's; nothing is called.
    let is_present = || unsafe { sys::is_culib_present() };
    is_present()
        // SAFETY: as above.
        || (nvrtc::in_a_toolkit(|folder| unsafe { nvrtc::load(folder, ["libcublasLt.so", "libcublas.so"]) })
            && is_present())
}

fn failed(call: &'static str) -> impl Fn(CublasError) -> DeviceError {
    move |error| DeviceError::Driver {
        call,
        reason: error.to_string(),
    }
}

impl Cublas {
    /// Finds the library and prepares it for a GPU.
    /// # Errors
    /// [`DeviceError::Driver`], in one line: it is not there, or refuses the GPU.
    pub fn new(gpu: Arc<Gpu>) -> Result<Self, DeviceError> {
        if !is_found() {
            return Err(DeviceError::Driver {
                call: "loading cuBLAS",
                reason: "the library libcublas cannot be loaded".to_owned(),
            });
        }
        // The GPU is this thread's while it is created.
        let handle = gpu.launching(|_| result::create_handle())?;
        let handle = handle.map_err(failed("cublasCreate"))?;
        Ok(Self { gpu, handle })
    }

    /// `y = x w^T`, summed in f32; `w` is `[rows, cols]` and `x` `[tokens, cols]`, the bits of bf16, `y`
    /// `[tokens, rows]`.
    /// # Errors
    /// When the library refuses.
    /// # Panics
    /// When a length does not fit, or the memory is not of the GPU that it was prepared for.
    pub fn product(
        &self,
        w: Span<'_, u16>,
        x: Span<'_, u16>,
        cols: usize,
        y: Span<'_, f32>,
    ) -> Result<(), DeviceError> {
        let ((rows, _), (tokens, cols)) = (rows_of(w, cols, "weights"), rows_of(x, cols, "inputs"));
        assert_eq!(y.len(), rows as usize * tokens as usize, "results");
        let device: &dyn Device = &*self.gpu;
        let [w, x] = [w, x].map(|span| address(span.on(device)));
        let y = address(y.on(device)).cast_mut();
        // To the library matrices are columns: `y^T = w x^T`, of which `w` is given transposed.
        let [rows, tokens, cols] = [rows, tokens, cols].map(|n| n as i32);
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the handle is of this GPU, the stream its own; matrices are as long as was checked, and factors,
        // which the host has, are read before the call returns.
        let status = self.gpu.launching(|stream| unsafe {
            result::set_stream(self.handle, stream.cast())?;
            result::gemm_ex(
                self.handle,
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                rows,
                tokens,
                cols,
                (&raw const one).cast(),
                w,
                sys::cudaDataType::CUDA_R_16BF,
                cols,
                x,
                sys::cudaDataType::CUDA_R_16BF,
                cols,
                (&raw const zero).cast(),
                y,
                sys::cudaDataType::CUDA_R_32F,
                rows,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        })?;
        status.map_err(failed("cublasGemmEx"))
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // SAFETY: created here, not used again; the library waits for its work by itself.
        let _ = (self.gpu).launching(|_| unsafe { result::destroy_handle(self.handle) });
    }
}

fn address(arg: Arg) -> *const std::ffi::c_void {
    match arg {
        Arg::Address(address) => address as *const _,
        other => unreachable!("a span is an address, not {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the host has of it: the library is found or it is not, and a GPU without it is told so in one line.
    #[test]
    fn a_machine_without_the_library_is_told_so_in_one_line() {
        let found = is_found();
        let Ok(gpu) = Gpu::open(0, None) else {
            return;
        };
        match Cublas::new(Arc::new(gpu)) {
            Ok(_) => assert!(found),
            Err(error) => assert!(!found && error.to_string().lines().count() == 1, "{error}"),
        }
    }
}
