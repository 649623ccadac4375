//! An NVIDIA GPU, through the driver's library, which is looked for when the first one is opened.

use super::device::{
    Arg, Deferred, Device, DeviceError, Kernel, Launch, Limits, Recording, Source, Turn, Turns,
};
use super::nvrtc::{self, Target};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaStream};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// The oldest driver that has every function called here, as CUDA numbers its versions: 12.8.
const OLDEST_DRIVER: i32 = 12080;
/// The least compute capability times 10: asynchronous copies and the matrix instructions came with 8.0.
const LEAST_CAPABILITY: u32 = 80;
/// From 9.0 on a kernel may begin while the one before ends.
const OVERLAP_CAPABILITY: u32 = 90;
/// What the driver takes memory in. Small allocations may share one: so much each is the most they take.
const PIECE: usize = 2 << 20;
/// What each step of a graph takes there: with 500, 1000 and 2000 kernels it was 64 KiB each, with a driver for CUDA
/// 11.2 (a thread of NVIDIA's forum, "Increasing memory footprint with large task graphs"). Not measured with later
/// ones.
const GRAPH_STEP: usize = 64 << 10;
/// Arguments that a kernel has at most.
const MOST_ARGUMENTS: usize = 64;

/// An open GPU with all kernels loaded.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    name: String,
    limits: Limits,
    /// Whether kernels may begin while the one before ends.
    overlaps: bool,
    functions: HashMap<Kernel, sys::CUfunction>,
    modules: Vec<Module>,
    staging: Staging,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    turns: Turns,
    deferred: Deferred,
    /// The kernel launched last, to be named when the device is lost.
    last: Mutex<&'static str>,
}

// SAFETY: contexts, modules, functions and streams are handles that the driver lets every thread use at the
// same time.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// A loaded source. It is dropped where its device is bound, after the last work on it.
struct Module(sys::CUmodule);

// SAFETY: as above.
unsafe impl Send for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded here, not used again.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// Memory of the host that the GPU reads by itself: an upload from there need not be waited for. A token's is
/// one, and waiting takes longer than its copy.
struct Staging {
    at: *mut u8,
    ring: Mutex<Ring>,
}

impl Staging {
    fn new() -> Result<Self, DriverError> {
        // SAFETY: it is filled before it is read.
        let at = unsafe { result::malloc_host(Ring::BYTES, 0) }?.cast();
        let ring = Mutex::default();
        Ok(Self { at, ring })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: allocated here; as for modules.
        let _ = unsafe { result::free_host(self.at.cast()) };
    }
}

/// The places in it: each is used once between two waits for the stream.
#[derive(Default)]
struct Ring {
    taken: usize,
}

impl Ring {
    const BYTES: usize = 64 << 10;
    /// What is more is not staged: many tokens at once, weights.
    const MOST: usize = 16 << 10;
    const BOUNDARY: usize = 64;

    /// Where the next so many bytes, at most [`Ring::MOST`], begin; and whether the stream is to be waited
    /// for first, since they have been used before.
    fn place(&mut self, bytes: usize) -> (usize, bool) {
        let again = self.taken + bytes > Self::BYTES;
        let first = if again { 0 } else { self.taken };
        self.taken = (first + bytes).next_multiple_of(Self::BOUNDARY);
        (first, again)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.name)
    }
}

impl Gpu {
    /// Opens GPU `ordinal`, counted from 0, and loads all kernels. They are compiled for it unless `cache`, a
    /// folder, has them from before; what is compiled is kept there, where that can be done.
    /// # Errors
    /// One that says what is missing: the driver, the device, or the compiler.
    pub fn open(ordinal: usize, cache: Option<&Path>) -> Result<Self, DeviceError> {
        // SAFETY: loading the driver's library runs its start-up code; nothing is called.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver { library: "libcuda" });
        }
        let version = driver_version()?;
        let found = match result::init().and_then(|()| result::device::get_count()) {
            Ok(count) => usize::try_from(count).unwrap_or(0),
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
            Err(error) => return Err(failure("cuInit", error)),
        };
        if ordinal >= found {
            return Err(DeviceError::NoDevice { ordinal, found });
        }
        let failed = |call| move |error| failure(call, error);
        let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
        let name = context.name().map_err(failed("cuDeviceGetName"))?;
        let attribute = |attribute| {
            let value = context
                .attribute(attribute)
                .map_err(failed("cuDeviceGetAttribute"))?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let capability = 10 * major + minor;
        if capability < LEAST_CAPABILITY {
            let found = format!("{major}.{minor}");
            return Err(DeviceError::OldDevice { name, found });
        }
        let limits = Limits {
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            memory: context.total_mem().map_err(failed("cuDeviceTotalMem"))?,
        };
        // SAFETY: that is for slices of the library, of which there are none here, on several streams.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed("cuStreamCreate"))?;
        let mut inner = Inner {
            name,
            limits,
            overlaps: capability >= OVERLAP_CAPABILITY,
            functions: HashMap::new(),
            modules: Vec::new(),
            staging: Staging::new().map_err(failed("cuMemHostAlloc"))?,
            stream,
            context,
            turns: Turns::default(),
            deferred: Deferred::default(),
            last: Mutex::new("none"),
        };
        inner.load(capability, version, cache)?;
        Ok(Self(Arc::new(inner)))
    }

    /// Has another library launch something in the device's queue, while the device is that of this thread.
    /// # Errors
    /// When the device is lost.
    pub(super) fn launching<R>(
        &self,
        launch: impl FnOnce(sys::CUstream) -> R,
    ) -> Result<R, DeviceError> {
        let (_turn, stream) = self.0.enter()?;
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = "of another library";
        Ok(launch(stream))
    }
}

/// The version of CUDA that the driver is for.
fn driver_version() -> Result<i32, DeviceError> {
    let mut version = 0;
    // SAFETY: the library is there; it writes one integer.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    result
        .result()
        .map_err(|error| failure("cuDriverGetVersion", error))?;
    if version < OLDEST_DRIVER {
        return Err(DeviceError::OldDriver {
            found: version_name(version),
            expected: "12.8",
        });
    }
    Ok(version)
}

/// A version as CUDA writes it: 13.0 of 13000.
fn version_name(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn text(error: DriverError) -> String {
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", text.to_string_lossy(), name.to_string_lossy()),
        _ => format!("{:?}", error.0),
    }
}

fn failure(call: &'static str, error: DriverError) -> DeviceError {
    let reason = text(error);
    DeviceError::Driver { call, reason }
}

/// Errors after which a context does nothing any more.
fn is_fatal(error: DriverError) -> bool {
    matches!(
        error.0,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

impl Inner {
    /// Loads the kernels of every source, compiling what is not in the cache, all at the same time.
    fn load(
        &mut self,
        capability: u32,
        driver: i32,
        cache: Option<&Path>,
    ) -> Result<(), DeviceError> {
        let inner = &*self;
        let modules: Vec<_> = thread::scope(|scope| {
            let one = |source| scope.spawn(move || inner.code(source, capability, driver, cache));
            let running: Vec<_> = Source::ALL.iter().copied().map(one).collect();
            let joined = running.into_iter().map(|thread| thread.join());
            joined
                .map(|module| module.expect("compiling does not panic"))
                .collect()
        });
        for (source, module) in Source::ALL.iter().copied().zip(modules) {
            let module = module?;
            for &name in source.kernels() {
                let kernel = Kernel { source, name };
                let function = self.function(&module, name);
                let function = function.map_err(|e| DeviceError::Launch {
                    kernel: name,
                    reason: text(e),
                })?;
                self.functions.insert(kernel, function);
            }
            self.modules.push(module);
        }
        Ok(())
    }

    /// The module of a source: from the cache, or compiled and kept there.
    fn code(
        &self,
        source: Source,
        capability: u32,
        driver: i32,
        cache: Option<&Path>,
    ) -> Result<Module, DeviceError> {
        let made = format!("{}-sm_{capability}", source.file());
        let number = driver.to_string();
        let texts = [source.text(), Source::COMMON, &number];
        let files = Files::new(cache, &made, &texts, nvrtc::version().ok().as_deref());
        let make = || nvrtc::compile(source, target(capability)?);
        let refused = |error| DeviceError::Refused {
            file: source.file(),
            target: target(capability).map_or_else(|e| e.to_string(), Target::name),
            compiler: nvrtc::version().unwrap_or_else(|e| e.to_string()),
            driver: version_name(driver),
            reason: text(error),
        };
        files.load(make, |code| self.module(code), refused)
    }

    fn module(&self, code: &[u8]) -> Result<Module, DriverError> {
        self.context.bind_to_thread()?;
        // SAFETY: the image is machine code or the text of PTX with its final zero, as the compiler gave it.
        unsafe { result::module::load_data(code.as_ptr().cast()) }.map(Module)
    }

    /// A kernel that may have all the shared memory there is.
    fn function(&self, module: &Module, name: &str) -> Result<sys::CUfunction, DriverError> {
        let name = CString::new(name).expect("a name");
        // SAFETY: the module is loaded, and is kept as long as its functions.
        unsafe {
            let function = result::module::get_function(module.0, name)?;
            let own = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let own = result::function::get_function_attribute(function, own)?;
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let rest = i32::try_from(self.limits.shared).unwrap_or(i32::MAX) - own;
            result::function::set_function_attribute(function, most, rest)?;
            // All alike: a multiprocessor that has to divide its memory anew waits until it is empty, and
            // blocks of the next kernel find no room beside those of this one.
            let divided = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            result::function::set_function_attribute(function, divided, 100)?;
            // A driver may put that off to the first launch: the memory would look free until then, and a
            // recording would have to wait for it.
            sys::cuFuncLoad(function).result()?;
            Ok(function)
        }
    }

    /// What an error of a call means for the device.
    fn failed(&self, call: &'static str) -> impl Fn(DriverError) -> DeviceError + '_ {
        move |error| match is_fatal(error) {
            true => self.lost(error),
            false => failure(call, error),
        }
    }

    fn lost(&self, error: DriverError) -> DeviceError {
        DeviceError::Lost {
            kernel: *self.last.lock().unwrap_or_else(PoisonError::into_inner),
            reason: text(error),
        }
    }

    /// Makes the device that of this thread.
    fn bind(&self) -> Result<sys::CUstream, DeviceError> {
        self.context
            .bind_to_thread()
            .map_err(self.failed("cuCtxSetCurrent"))?;
        Ok(self.stream.cu_stream())
    }

    /// The same for a call, which is made while the turn lives.
    fn enter(&self) -> Result<(Turn<'_>, sys::CUstream), DeviceError> {
        Ok((self.turns.call(), self.bind()?))
    }

    /// The same, for what cannot be recorded.
    fn enter_unrecorded(
        &self,
        what: &'static str,
    ) -> Result<(Turn<'_>, sys::CUstream), DeviceError> {
        Ok((self.turns.unrecorded(what)?, self.bind()?))
    }

    fn wait(&self, stream: sys::CUstream) -> Result<(), DeviceError> {
        // SAFETY: the stream is this device's own.
        unsafe { result::stream::synchronize(stream) }.map_err(self.failed("cuStreamSynchronize"))
    }

    fn free_memory(&self) -> Result<usize, DeviceError> {
        let (free, _) = result::mem_get_info().map_err(self.failed("cuMemGetInfo"))?;
        Ok(free)
    }

    fn free_now(&self, address: u64) {
        // Nobody can be told; a device that is lost has lost its memory too.
        if let Ok((_turn, stream)) = self.enter() {
            let _ = self.wait(stream);
            // SAFETY: allocated here, and the last work on it is done.
            let _ = unsafe { result::free_sync(address) };
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The modules are dropped next, while the device is bound.
        if let Ok(stream) = self.bind() {
            let _ = self.wait(stream);
        }
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        self.0.name.clone()
    }

    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn free_memory(&self) -> Result<usize, DeviceError> {
        let (_turn, _) = self.0.enter()?;
        self.0.free_memory()
    }

    fn piece(&self) -> usize {
        PIECE
    }

    fn recording_bytes(&self, steps: usize) -> usize {
        (steps * GRAPH_STEP).next_multiple_of(PIECE)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        let (_turn, _) = self.0.enter_unrecorded("an allocation")?;
        // SAFETY: nobody has seen the memory before.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(address),
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(DeviceError::OutOfMemory {
                asked: bytes,
                free: self.0.free_memory()?,
                total: self.0.limits.memory,
            }),
            Err(error) => Err(self.0.failed("cuMemAlloc")(error)),
        }
    }

    unsafe fn free(&self, address: u64) {
        if self.0.deferred.free_now(address) {
            self.0.free_now(address);
        }
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        let (_turn, stream) = self.0.enter_unrecorded("an upload")?;
        if from.is_empty() {
            return Ok(());
        }
        let failed = self.0.failed("cuMemcpyHtoDAsync");
        if from.len() > Ring::MOST {
            // SAFETY: inside an allocation by contract; `from` lives until the wait is over.
            unsafe { result::memcpy_htod_async(to, from, stream) }.map_err(failed)?;
            return self.0.wait(stream);
        }
        let staging = &self.0.staging;
        let mut ring = staging.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, again) = ring.place(from.len());
        if again {
            let waited = self.0.wait(stream);
            waited.inspect_err(|_| ring.taken = Ring::BYTES)?;
        }
        // SAFETY: the place is inside the staging memory. No copy reads it any more: those since the last wait
        // have other places, and the ring is locked until this one is asked for. `to` is inside an allocation
        // by contract.
        unsafe {
            let place = staging.at.add(first);
            ptr::copy_nonoverlapping(from.as_ptr(), place, from.len());
            let staged = std::slice::from_raw_parts(place, from.len());
            result::memcpy_htod_async(to, staged, stream).map_err(failed)
        }
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), DeviceError> {
        let (_turn, stream) = self.0.enter_unrecorded("a download")?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: inside an allocation by contract; `to` lives until the wait is over.
        unsafe { result::memcpy_dtoh_async(to, from, stream) }
            .map_err(self.0.failed("cuMemcpyDtoHAsync"))?;
        self.0.wait(stream)
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError> {
        let (_turn, stream) = self.0.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: inside allocations by contract.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }
            .map_err(self.0.failed("cuMemcpyDtoDAsync"))
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), DeviceError> {
        let (_turn, stream) = self.0.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: inside an allocation by contract.
        unsafe { result::memset_d8_async(at, 0, bytes, stream) }
            .map_err(self.0.failed("cuMemsetD8Async"))
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        launch: Launch,
        args: &[Arg],
    ) -> Result<(), DeviceError> {
        let refused = |reason| DeviceError::Launch {
            kernel: kernel.name,
            reason,
        };
        let Some(&function) = self.0.functions.get(&kernel) else {
            return Err(refused(format!("not in {}", kernel.source.file())));
        };
        let Ok(shared) = u32::try_from(launch.shared) else {
            return Err(refused(format!("{} bytes of shared memory", launch.shared)));
        };
        assert!(args.len() <= MOST_ARGUMENTS, "{} arguments", args.len());
        let mut values = [0u64; MOST_ARGUMENTS];
        let mut pointers = [ptr::null_mut::<c_void>(); MOST_ARGUMENTS];
        for ((value, pointer), arg) in values.iter_mut().zip(&mut pointers).zip(args) {
            *value = arg.bits();
            *pointer = ptr::from_mut(value).cast();
        }
        let (_turn, stream) = self.0.enter()?;
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = kernel.name;
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: shared,
            hStream: stream,
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.0.overlaps && kernel.source.overlaps()),
        };
        // SAFETY: the function is loaded, and its arguments, which the driver copies as it does the attribute,
        // are what the caller promises that it takes. A kernel that overlaps waits by itself.
        let result = unsafe {
            let pointers = pointers.as_mut_ptr();
            sys::cuLaunchKernelEx(&raw const config, function, pointers, ptr::null_mut()).result()
        };
        result.map_err(|error| match is_fatal(error) {
            true => self.0.lost(error),
            false => refused(format!("{} for {launch:?}", text(error))),
        })
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        let (_turn, stream) = self.0.enter_unrecorded("waiting")?;
        self.0.wait(stream)
    }

    fn record(
        &self,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Box<dyn Recording>, DeviceError> {
        let inner = &self.0;
        // Whatever becomes of the work: what comes later here is dropped earlier, the turn last.
        let _recorder = inner.turns.record()?;
        let stream = inner.bind()?;
        inner.deferred.begin();
        let mut recorded = Recorded {
            device: Arc::clone(inner),
            graph: ptr::null_mut(),
            executable: ptr::null_mut(),
        };
        let capture = Capture::begin(stream).map_err(inner.failed("cuStreamBeginCapture"))?;
        let done = work();
        let ended = capture.end();
        if let Ok(graph) = ended {
            recorded.graph = graph;
        }
        done?;
        ended.map_err(inner.failed("cuStreamEndCapture"))?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was just made.
        recorded.executable = unsafe { result::graph::instantiate(recorded.graph, flags) }
            .map_err(inner.failed("cuGraphInstantiate"))?;
        // SAFETY: both are this device's own.
        unsafe { result::graph::upload(recorded.executable, stream) }
            .map_err(inner.failed("cuGraphUpload"))?;
        Ok(Box::new(recorded))
    }

    fn seconds(
        &self,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<f64, DeviceError> {
        let failed = || self.0.failed("measuring time");
        // A turn ends before the work, which takes its own.
        let start = {
            let (_turn, stream) = self.0.enter_unrecorded("a measurement")?;
            Event::record(stream).map_err(failed())?
        };
        work()?;
        let (_turn, stream) = self.0.enter()?;
        let end = Event::record(stream).map_err(failed())?;
        // SAFETY: both events are of this device; the time is asked for when both have happened.
        let milliseconds = unsafe {
            result::event::synchronize(end.0).map_err(failed())?;
            result::event::elapsed(start.0, end.0).map_err(failed())?
        };
        Ok(f64::from(milliseconds) / 1e3)
    }
}

/// What is launched in the stream is being recorded, until this ends.
struct Capture(sys::CUstream);

impl Capture {
    /// `stream` is this device's own, and nothing is being recorded.
    fn begin(stream: sys::CUstream) -> Result<Self, DriverError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: as the caller says.
        unsafe { result::stream::begin_capture(stream, mode) }.map(|()| Self(stream))
    }

    fn end(self) -> Result<sys::CUgraph, DriverError> {
        let stream = self.0;
        std::mem::forget(self);
        // SAFETY: begun above.
        unsafe { result::stream::end_capture(stream) }
    }
}

impl Drop for Capture {
    /// The work panicked.
    fn drop(&mut self) {
        // SAFETY: begun above; the graph is nobody else's.
        unsafe {
            if let Ok(graph) = result::stream::end_capture(self.0)
                && !graph.is_null()
            {
                let _ = result::graph::destroy(graph);
            }
        }
    }
}

/// A point in the stream, whose time is taken.
struct Event(sys::CUevent);

impl Event {
    /// Where `stream`, this device's own, is now.
    fn record(stream: sys::CUstream) -> Result<Self, DriverError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map(Self)?;
        // SAFETY: the stream lives, and the event is of its device.
        unsafe { result::event::record(event.0, stream) }?;
        Ok(event)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made here; the driver waits for it by itself.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// A graph, and what it was made into. Null where recording failed.
struct Recorded {
    device: Arc<Inner>,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: a graph may be used by any one thread at a time, and it is not shared.
unsafe impl Send for Recorded {}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "recording on {}", self.device.name)
    }
}

impl Recording for Recorded {
    fn replay(&self) -> Result<(), DeviceError> {
        let (_turn, stream) = self.device.enter_unrecorded("a replay")?;
        *(self.device.last.lock()).unwrap_or_else(PoisonError::into_inner) = "of a recording";
        // SAFETY: the graph is of this device. Launches that it repeats were promised to be right, and the
        // memory they use is kept.
        unsafe { result::graph::launch(self.executable, stream) }
            .map_err(self.device.failed("cuGraphLaunch"))
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `record`, not used again. While it still runs, the driver keeps it.
            unsafe {
                if !self.executable.is_null() {
                    let _ = result::graph::exec_destroy(self.executable);
                }
                if !self.graph.is_null() {
                    let _ = result::graph::destroy(self.graph);
                }
            }
        }
        for address in self.device.deferred.end() {
            self.device.free_now(address);
        }
    }
}

// ---- compiled kernels -------------------------------------------------------------------------------------

/// What a GPU of that compute capability loads.
fn target(capability: u32) -> Result<Target, DeviceError> {
    let known = nvrtc::capabilities()?;
    Ok(
        match known.iter().rev().find(|known| **known <= capability) {
            // A compiler older than the GPU: the driver finishes what is made for an earlier one.
            Some(&earlier) if earlier < capability => Target::Portable(earlier),
            _ => Target::Machine(capability),
        },
    )
}

/// The file of what a compiler makes: of the same texts another one makes something else.
fn file_name(made: &str, texts: &[&str], compiler: &str) -> String {
    // The zero between them keeps what is the end of one from being the beginning of the next.
    let bytes = (texts.iter().copied())
        .chain(nvrtc::OPTIONS)
        .flat_map(|text| text.bytes().chain([0]));
    format!("{made}-{:016x}-nvrtc_{compiler}.bin", hash(bytes))
}

/// FNV-1a: it tells versions of a text apart, and a file that is whole from one that is not.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let mix = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
    bytes.into_iter().fold(0xCBF2_9CE4_8422_2325, mix)
}

/// What a file has, if it is whole and was written under its name: it begins with [`checksum`]. The driver is not
/// told how long code is, so it gets none that is not just as it was kept.
fn kept(path: &Path) -> Option<Vec<u8>> {
    let file = std::fs::read(path).ok()?;
    let (sum, code) = file.split_first_chunk::<8>()?;
    let whole = checksum(path, code) == u64::from_le_bytes(*sum);
    (whole && !code.is_empty()).then(|| code.to_vec())
}

/// Of the file's name, which says what the code was made of, and of the code.
fn checksum(path: &Path, code: &[u8]) -> u64 {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    hash(name.iter().chain(&[0]).chain(code).copied())
}

/// Where the code of a source is kept.
struct Files {
    /// What may be loaded, the best first.
    known: Vec<PathBuf>,
    /// Where what is compiled goes.
    own: Option<PathBuf>,
}

impl Files {
    /// In the folder `cache`, of a source of those `texts`. Without a compiler what any of them made will do.
    fn new(cache: Option<&Path>, made: &str, texts: &[&str], compiler: Option<&str>) -> Self {
        let own = |compiler| cache.map(|folder| folder.join(file_name(made, texts, compiler)));
        if let Some(compiler) = compiler {
            let own = own(compiler);
            return Self {
                known: own.iter().cloned().collect(),
                own,
            };
        }
        let begins = file_name(made, texts, "");
        let begins = begins.trim_end_matches(".bin");
        let entries = cache.and_then(|folder| std::fs::read_dir(folder).ok());
        let mut known: Vec<_> = (entries.into_iter().flatten().flatten())
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(begins))
            .map(|entry| entry.path())
            .collect();
        known.sort();
        Self { known, own: None }
    }

    /// The first known file that is whole and that `load` takes; else what `make` makes, which takes the
    /// place of the file when `load` has taken it. A file that cannot be written is done without.
    fn load<M, E>(
        &self,
        make: impl FnOnce() -> Result<Vec<u8>, DeviceError>,
        load: impl Fn(&[u8]) -> Result<M, E>,
        refused: impl FnOnce(E) -> DeviceError,
    ) -> Result<M, DeviceError> {
        let known = self.known.iter().filter_map(|path| kept(path));
        if let Some(loaded) = known.into_iter().find_map(|code| load(&code).ok()) {
            return Ok(loaded);
        }
        let code = make()?;
        let loaded = load(&code).map_err(refused)?;
        if let Some(own) = &self.own {
            let _ = keep(own, &code);
        }
        Ok(loaded)
    }
}

/// Writes a file that appears under its name when it is whole, so that another process never reads half of it.
fn keep(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&checksum(path, code).to_le_bytes())?;
    file.write_all(code)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_told_so_in_one_sentence() {
        match Gpu::open(0, None) {
            Ok(gpu) => {
                assert!(!gpu.name().is_empty() && gpu.limits().multiprocessors > 0);
                assert!(gpu.limits().shared >= 99 << 10, "{:?}", gpu.limits());
                let error = Gpu::open(1000, None).expect_err("nobody has as many");
                assert!(
                    matches!(error, DeviceError::NoDevice { ordinal: 1000, found } if found > 0),
                    "{error}"
                );
            }
            Err(error) => {
                let missing = matches!(
                    error,
                    DeviceError::NoDriver { .. }
                        | DeviceError::OldDriver { .. }
                        | DeviceError::NoDevice { .. }
                        | DeviceError::OldDevice { .. }
                        | DeviceError::NoCompiler { .. }
                );
                assert!(missing && error.to_string().lines().count() == 1, "{error}");
            }
        }
    }

    /// Loads from `cache` what a compiler of that version makes of one text: `made`, or nothing when there is
    /// no compiler. What begins with `x` is refused.
    fn load(
        cache: &Path,
        compiler: Option<&str>,
        made: Option<&str>,
    ) -> Result<String, DeviceError> {
        let make = || match made {
            Some(made) => Ok(made.as_bytes().to_vec()),
            None => Err(NO_COMPILER),
        };
        let load = |code: &[u8]| match String::from_utf8(code.to_vec()).expect("text") {
            code if code.starts_with('x') => Err(code),
            code => Ok(code),
        };
        let refused = |code: String| DeviceError::Driver {
            call: "loading",
            reason: code,
        };
        Files::new(Some(cache), "a.cu-sm_90", &["text"], compiler).load(make, load, refused)
    }

    const NO_COMPILER: DeviceError = DeviceError::NoCompiler {
        library: "libnvrtc",
    };

    #[test]
    fn compiled_code_is_kept_and_a_broken_file_is_made_anew() {
        let folder = tempfile::tempdir().expect("a folder");
        let inside = folder.path().join("not there yet");
        let load = |made| load(&inside, Some("13.0"), Some(made));
        assert_eq!(load("one"), Ok("one".to_owned()));
        // Nothing is compiled when it is in the file.
        assert_eq!(load("two"), Ok("one".to_owned()));
        let path = inside.join(file_name("a.cu-sm_90", &["text"], "13.0"));
        let whole = std::fs::read(&path).expect("kept");
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut file = whole.clone();
            change(&mut file);
            file
        };
        let broken = [
            ("empty", Vec::new()),
            ("a piece of a checksum", changed(&|file| file.truncate(5))),
            ("a checksum alone", changed(&|file| file.truncate(8))),
            ("no code", checksum(&path, &[]).to_le_bytes().to_vec()),
            (
                "one byte less",
                changed(&|file| file.truncate(file.len() - 1)),
            ),
            ("one byte more", changed(&|file| file.push(0))),
            ("eight bytes more", changed(&|file| file.extend([7; 8]))),
            ("another byte", changed(&|file| file[8] ^= 1)),
            ("another checksum", changed(&|file| file[0] ^= 1)),
        ];
        for (what, file) in broken {
            std::fs::write(&path, file).expect("written");
            assert_eq!(kept(&path), None, "{what}");
            assert_eq!(load("one"), Ok("one".to_owned()), "{what}");
            assert_eq!(std::fs::read(&path).expect("kept"), whole, "{what}");
        }
        // Nothing else is left in the folder.
        assert_eq!(std::fs::read_dir(&inside).expect("a folder").count(), 1);
    }

    #[test]
    fn code_of_another_text_is_not_taken_whatever_its_file_is_called() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |text| folder.path().join(file_name("a.cu-sm_90", &[text], "13.0"));
        let (own, other) = (path("text"), path("another text"));
        keep(&other, b"other").expect("written");
        let load = |made| load(folder.path(), Some("13.0"), made);
        assert_eq!(load(None), Err(NO_COMPILER));
        std::fs::copy(&other, &own).expect("copied");
        assert_eq!(load(Some("one")), Ok("one".to_owned()));
        assert_eq!(kept(&own).as_deref(), Some(&b"one"[..]));
        assert_eq!(kept(&other).as_deref(), Some(&b"other"[..]));
    }

    #[test]
    fn what_cannot_be_kept_is_done_without() {
        let folder = tempfile::tempdir().expect("a folder");
        let name = file_name("a.cu-sm_90", &["text"], "13.0");
        let made = |folder: &Path, compiler| load(folder, compiler, Some("one"));
        // A folder in the place of the file: empty, and with something in it.
        let in_place = folder.path().join(&name);
        std::fs::create_dir(&in_place).expect("made");
        for _ in 0..2 {
            assert_eq!(made(folder.path(), Some("13.0")), Ok("one".to_owned()));
            // Without a compiler's version files are looked for, and that one is none.
            assert_eq!(load(folder.path(), None, None), Err(NO_COMPILER));
            assert_eq!(std::fs::read_dir(&folder).expect("a folder").count(), 1);
            let _ = std::fs::write(in_place.join("file"), "");
        }
        // Folders that cannot be: a file is in the place of one, or above it.
        let file = in_place.join("file");
        for place in [file.clone(), file.join("below")] {
            assert_eq!(made(&place, Some("13.0")), Ok("one".to_owned()));
            assert_eq!(load(&place, None, None), Err(NO_COMPILER));
        }
        // One that nobody may write to.
        #[cfg(target_os = "linux")]
        assert_eq!(
            made(Path::new("/proc/phidias"), Some("13.0")),
            Ok("one".to_owned())
        );
    }

    #[test]
    fn a_file_that_the_driver_refuses_is_replaced_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let load = |made| load(folder.path(), Some("13.0"), made);
        let path = folder
            .path()
            .join(file_name("a.cu-sm_90", &["text"], "13.0"));
        keep(&path, b"x of another driver").expect("written");
        // What is refused when it was just compiled is one error, names what it was, and is not kept.
        let refused = DeviceError::Driver {
            call: "loading",
            reason: "x again".to_owned(),
        };
        assert_eq!(load(Some("x again")), Err(refused));
        assert_eq!(kept(&path).as_deref(), Some(&b"x of another driver"[..]));
        assert_eq!(load(None), Err(NO_COMPILER));
        assert_eq!(load(Some("one")), Ok("one".to_owned()));
        assert_eq!(load(None), Ok("one".to_owned()));
        assert_eq!(std::fs::read_dir(&folder).expect("a folder").count(), 1);
    }

    #[test]
    fn another_compiler_or_text_is_another_file() {
        let names = [
            file_name("a.cu-sm_90", &["one", "two"], "13.0"),
            file_name("a.cu-sm_90", &["one", "two"], "13.1"),
            file_name("a.cu-sm_80", &["one", "two"], "13.0"),
            file_name("a.cu-sm_90", &["onet", "wo"], "13.0"),
            file_name("b.cu-sm_90", &["one", "two"], "13.0"),
        ];
        let different: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
    }

    #[test]
    fn without_a_compiler_what_any_of_them_made_will_do() {
        let folder = tempfile::tempdir().expect("a folder");
        let load = |compiler, made| load(folder.path(), compiler, made);
        assert_eq!(load(None, None), Err(NO_COMPILER));
        for version in ["12.9", "13.0", "13.1"] {
            // None of them is found under the name of another.
            assert_eq!(load(Some(version), Some(version)), Ok(version.to_owned()));
        }
        let path = |version| {
            let name = file_name("a.cu-sm_90", &["text"], version);
            folder.path().join(name)
        };
        assert_eq!(load(None, None), Ok("12.9".to_owned()));
        // One that is not whole, or is refused, is passed over.
        std::fs::write(path("12.9"), b"torn").expect("written");
        keep(&path("13.0"), b"x").expect("written");
        assert_eq!(load(None, None), Ok("13.1".to_owned()));
    }

    #[test]
    fn staged_bytes_are_not_overwritten_before_a_wait() {
        let mut ring = Ring::default();
        let mut used: Vec<std::ops::Range<usize>> = Vec::new();
        let mut waits = 0;
        // Those of a token, those of guesses, all sizes around the boundaries, the largest.
        let sizes = [
            1024,
            4608,
            1,
            63,
            64,
            65,
            Ring::MOST - 1,
            Ring::MOST,
            Ring::MOST,
        ];
        for bytes in sizes.iter().copied().cycle().take(1000) {
            let (first, again) = ring.place(bytes);
            if again {
                used.clear();
                waits += 1;
            }
            let place = first..first + bytes;
            assert!(place.end <= Ring::BYTES, "{place:?}");
            let free = |other: &std::ops::Range<usize>| {
                other.end <= place.start || place.end <= other.start
            };
            assert!(used.iter().all(free), "{place:?} of {used:?}");
            used.push(place);
        }
        // Tokens alone wait once in 64.
        assert!(waits > 0);
        let mut ring = Ring::default();
        let waits = (0..640).filter(|_| ring.place(1024).1).count();
        assert_eq!(waits, 9);
    }

    #[test]
    fn what_is_refused_is_told_in_one_sentence() {
        let error = DeviceError::Refused {
            file: "linear.cu",
            target: "sm_90".to_owned(),
            compiler: "13.1".to_owned(),
            driver: version_name(12080),
            reason: "no".to_owned(),
        };
        assert_eq!(
            error.to_string(),
            "the CUDA driver, for CUDA 12.8, refuses linear.cu as NVRTC 13.1 has just compiled it for sm_90: no"
        );
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(hash([]), 0xCBF2_9CE4_8422_2325);
        assert_eq!(hash(*b"a"), 0xAF63_DC4C_8601_EC8C);
    }
}
