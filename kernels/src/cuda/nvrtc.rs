//! The compiler for kernels, NVIDIA's NVRTC, where it can be found.

use super::device::{DeviceError, Source};
use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys;
use std::ffi::{CString, OsString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

/// What a source is compiled to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Machine code of one generation of GPUs, by its compute capability times 10: 90 is `sm_90`.
    Machine(u32),
    /// What a driver makes machine code of, for that compute capability and later ones.
    Portable(u32),
}

impl Target {
    /// The architecture as the compiler calls it.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Machine(capability) => format!("sm_{capability}"),
            Self::Portable(capability) => format!("compute_{capability}"),
        }
    }
}

/// Options beside the architecture. No fused multiply-add that is not written: products and sums round as
/// they do on the CPU. Line numbers are for tools that check a running kernel.
pub(super) const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "--generate-line-info"];

/// Finds the compiler: where the system looks for libraries, else in the toolkit that `CUDA_PATH` or
/// `CUDA_HOME` names, or in `/usr/local/cuda`.
/// # Errors
/// [`DeviceError::NoCompiler`].
pub fn find() -> Result<(), DeviceError> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: loading the library runs its start-up code, which is NVIDIA's; nothing is called.
        is_present()
            || (in_a_toolkit(|folder| unsafe {
                load(folder, ["libnvrtc-builtins.so", "libnvrtc.so"])
            }) && is_present())
    });
    match found {
        true => Ok(()),
        false => Err(DeviceError::NoCompiler {
            library: "libnvrtc",
        }),
    }
}

fn is_present() -> bool {
    // SAFETY: as above.
    unsafe { sys::is_culib_present() }
}

/// Folders of libraries of toolkits that may be there.
fn toolkits(var: impl Fn(&str) -> Option<OsString>) -> impl Iterator<Item = PathBuf> {
    let named = ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(var);
    named
        // An empty one would be the working directory.
        .filter(|toolkit| !toolkit.is_empty())
        .map(PathBuf::from)
        .chain([PathBuf::from("/usr/local/cuda")])
        .flat_map(|toolkit| [toolkit.join("lib64"), toolkit.join("lib")])
}

/// Whether something is so of a folder of libraries of one of the toolkits that may be there.
pub(super) fn in_a_toolkit(is_so: impl Fn(&Path) -> bool) -> bool {
    toolkits(|name| std::env::var_os(name)).any(|folder| is_so(&folder))
}

/// Loads a library from a folder for as long as the process lives, so that it is found by its name
/// afterwards. What it loads itself it would not find: that comes first.
/// # Safety
/// The folder is of a toolkit: its libraries run code when loaded.
pub(super) unsafe fn load(folder: &Path, [needed, wanted]: [&str; 2]) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return false;
    };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    [needed, wanted].iter().all(|wanted| {
        names.iter().any(|name| {
            let is_wanted = name.to_str().is_some_and(|name| name.starts_with(wanted));
            // SAFETY: promised by the caller.
            let library = is_wanted.then(|| unsafe { libloading::Library::new(folder.join(name)) });
            match library {
                Some(Ok(library)) => {
                    std::mem::forget(library);
                    true
                }
                Some(Err(_)) | None => false,
            }
        })
    })
}

/// Its version, as CUDA numbers them: `13.0`.
/// # Errors
/// [`DeviceError::NoCompiler`]; [`DeviceError::Driver`] when it does not say.
pub fn version() -> Result<String, DeviceError> {
    find()?;
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: the library is there; it writes two integers.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }
        .result()
        .map_err(|e| failure("nvrtcVersion", e))?;
    Ok(format!("{major}.{minor}"))
}

/// The compute capabilities, times 10, that the compiler can compile for, in rising order.
/// # Errors
/// [`DeviceError::NoCompiler`]; [`DeviceError::Driver`] when it does not say.
pub fn capabilities() -> Result<Vec<u32>, DeviceError> {
    find()?;
    let failed = |e| failure("nvrtcGetSupportedArchs", e);
    let mut count: c_int = 0;
    // SAFETY: the library is there; it writes one integer.
    unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }
        .result()
        .map_err(failed)?;
    let mut found = vec![0 as c_int; usize::try_from(count).unwrap_or(0)];
    // SAFETY: it writes as many integers as it has just said.
    unsafe { sys::nvrtcGetSupportedArchs(found.as_mut_ptr()) }
        .result()
        .map_err(failed)?;
    Ok(found
        .into_iter()
        .filter_map(|c| u32::try_from(c).ok())
        .collect())
}

/// Compiles a source: to machine code as a driver loads it, or to the text of PTX.
/// # Errors
/// [`DeviceError::NoCompiler`], or [`DeviceError::Compile`] with what the compiler said.
pub fn compile(source: Source, target: Target) -> Result<Vec<u8>, DeviceError> {
    find()?;
    let program = Program::new(source)?;
    let options = OPTIONS.map(str::to_owned).into_iter();
    let architecture = format!("--gpu-architecture={}", target.name());
    let options: Vec<CString> = (options.chain([architecture]))
        .map(|option| CString::new(option).expect("no zero in an option"))
        .collect();
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the program exists, and the options are that many strings.
    let result =
        unsafe { sys::nvrtcCompileProgram(program.0, options.len() as c_int, options.as_ptr()) };
    if let Err(error) = result.result() {
        // SAFETY: the program exists; its log is as long as it says.
        let log = unsafe {
            program.get(
                |p, n| sys::nvrtcGetProgramLogSize(p, n),
                |p, out| sys::nvrtcGetProgramLog(p, out),
            )
        };
        let log = log.map(|log| {
            String::from_utf8_lossy(&log)
                .trim_end_matches('\0')
                .to_owned()
        });
        return Err(DeviceError::Compile {
            file: source.file(),
            target: target.name(),
            log: format!("{error}: {}", log.unwrap_or_default()),
        });
    }
    // SAFETY: the program is compiled; the result is as long as it says.
    let code = unsafe {
        match target {
            Target::Machine(_) => program.get(
                |p, n| sys::nvrtcGetCUBINSize(p, n),
                |p, out| sys::nvrtcGetCUBIN(p, out),
            ),
            Target::Portable(_) => program.get(
                |p, n| sys::nvrtcGetPTXSize(p, n),
                |p, out| sys::nvrtcGetPTX(p, out),
            ),
        }
    };
    code.map_err(|e| failure("reading what was compiled", e))
}

fn failure(call: &'static str, error: NvrtcError) -> DeviceError {
    let reason = error.to_string();
    DeviceError::Driver { call, reason }
}

/// A program of the compiler, destroyed on drop.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: Source) -> Result<Self, DeviceError> {
        let text = |text: &str| CString::new(text).expect("no zero in a source");
        let (body, name) = (text(source.text()), text(source.file()));
        let (header, header_name) = (text(Source::COMMON), text("common.cuh"));
        let mut program = ptr::null_mut();
        // SAFETY: five strings, which the compiler copies, and a place for the program.
        let result = unsafe {
            let (headers, names) = ([header.as_ptr()], [header_name.as_ptr()]);
            sys::nvrtcCreateProgram(
                &raw mut program,
                body.as_ptr(),
                name.as_ptr(),
                1,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        result
            .result()
            .map_err(|e| failure("nvrtcCreateProgram", e))?;
        Ok(Self(program))
    }

    /// What the second function writes, of the size that the first one says.
    /// # Safety
    /// They are a pair of the compiler's functions that is so.
    unsafe fn get(
        &self,
        size: impl Fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        write: impl Fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
    ) -> Result<Vec<u8>, NvrtcError> {
        let mut bytes = 0;
        size(self.0, &raw mut bytes).result()?;
        let mut out = vec![0u8; bytes];
        write(self.0, out.as_mut_ptr().cast()).result()?;
        Ok(out)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it exists, and is not used again.
        let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_names_no_toolkit() {
        let folders = |path: Option<&str>| -> Vec<PathBuf> {
            toolkits(|name| path.filter(|_| name == "CUDA_PATH").map(OsString::from)).collect()
        };
        assert!(folders(Some("/there")).contains(&PathBuf::from("/there/lib64")));
        assert_eq!(folders(Some("")), folders(None));
    }
}
