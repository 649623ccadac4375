//! A device for tests: the same sources, compiled for the CPU behind `shim.h`, with threads in any order.

use super::device::{
    Arg, Deferred, Device, DeviceError, Kernel, Launch, Limits, Recording, Source, Turns,
};
use bytemuck::{Pod, Zeroable};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// In which order the lanes of a warp, the warps of a block and the blocks of a grid take their turns.
/// Results that differ between two of them come from a race: a barrier is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The first thread first.
    Forward,
    /// The last thread first.
    Backward,
    /// Shuffled anew for every block, by this seed.
    Shuffled(u32),
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward => f.write_str("forward"),
            Self::Backward => f.write_str("backward"),
            Self::Shuffled(seed) => write!(f, "shuffled by {seed}"),
        }
    }
}

impl Order {
    /// One of each kind.
    pub const ALL: [Self; 3] = [Self::Forward, Self::Backward, Self::Shuffled(1)];
}

/// What surrounds every allocation, to be found unchanged: as floats of any width, NaNs.
const GUARD: u8 = 0xFF;
/// Bytes of it on either side, and the alignment of allocations.
const MARGIN: usize = 256;

/// What a multiprocessor that is not there has: the least that any supported GPU lets a block have.
const LIMITS: Limits = Limits {
    multiprocessors: 3,
    shared: 99 << 10,
    memory: 8 << 30,
};

/// The memory of a host device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub bytes: usize,
    /// What it is given out in.
    pub piece: usize,
    /// What a recording takes for each of its steps.
    pub recorded: usize,
}

/// What was copied between the host and a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Copies to the device.
    pub uploads: usize,
    /// Their bytes.
    pub uploaded: usize,
    /// Copies from the device.
    pub downloads: usize,
    /// Their bytes.
    pub downloaded: usize,
}

/// The CPU as a device. All work is done when a call returns.
#[derive(Clone, Debug)]
pub struct HostDevice(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    order: Order,
    memory: HostMemory,
    turns: Turns,
    state: Mutex<State>,
    deferred: Deferred,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes by address.
    allocations: BTreeMap<u64, usize>,
    used: usize,
    traffic: Traffic,
    /// Launches until the device is lost.
    left: Option<usize>,
    recorded: Option<Vec<Work>>,
}

/// Work as it is recorded.
#[derive(Clone, Debug)]
enum Work {
    Launch(Kernel, Launch, Vec<Arg>),
    Copy { from: u64, to: u64, bytes: usize },
    Zero { at: u64, bytes: usize },
}

impl HostDevice {
    /// A device whose threads take turns in that order.
    /// # Errors
    /// [`DeviceError::Host`] where there is no C++ compiler. Its name is taken from `CXX`, if set.
    pub fn new(order: Order) -> Result<Self, DeviceError> {
        let bytes = LIMITS.memory;
        let memory = HostMemory {
            bytes,
            piece: 1,
            recorded: 0,
        };
        Self::with_memory(order, memory)
    }

    /// The same with other memory.
    /// # Errors
    /// As [`HostDevice::new`].
    pub fn with_memory(order: Order, memory: HostMemory) -> Result<Self, DeviceError> {
        compiler()?;
        Ok(Self(Arc::new(Inner {
            order,
            memory,
            turns: Turns::default(),
            state: Mutex::default(),
            deferred: Deferred::default(),
        })))
    }

    /// After so many launches more the device is as good as lost: each of the next ones fails. `None`: none.
    pub fn lose_after(&self, launches: Option<usize>) {
        self.0.state().left = launches;
    }

    /// What was copied since the last call.
    #[must_use]
    pub fn take_traffic(&self) -> Traffic {
        std::mem::take(&mut self.0.state().traffic)
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does it now, or keeps it while work is recorded.
    /// # Safety
    /// As the call of [`Device`] demands.
    unsafe fn submit(&self, work: Work) -> Result<(), DeviceError> {
        let _turn = self.turns.call();
        let mut state = self.state();
        if let Some(recorded) = &mut state.recorded {
            recorded.push(work);
            return Ok(());
        }
        // SAFETY: handed on.
        unsafe { self.run(&mut state, &work) }
    }

    /// # Safety
    /// As the call of [`Device`] demands.
    unsafe fn run(&self, state: &mut State, work: &Work) -> Result<(), DeviceError> {
        match work {
            // SAFETY: ranges inside live allocations, which do not overlap, by contract.
            &Work::Copy { from, to, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes);
            },
            // SAFETY: a range inside a live allocation, by contract.
            &Work::Zero { at, bytes } => unsafe {
                std::ptr::write_bytes(at as *mut u8, 0, bytes);
            },
            Work::Launch(kernel, launch, args) => {
                state.count_down(kernel.name)?;
                // SAFETY: handed on.
                unsafe { run_kernel(*kernel, *launch, args, self.order)? };
                if let Some(reason) = state.broken_guard() {
                    let kernel = kernel.name;
                    return Err(DeviceError::Launch { kernel, reason });
                }
            }
        }
        Ok(())
    }

    fn out_of_memory(&self, state: &State, asked: usize) -> DeviceError {
        let total = self.memory.bytes;
        DeviceError::OutOfMemory {
            asked,
            free: total - state.used,
            total,
        }
    }

    fn free_now(&self, address: u64) {
        let mut state = self.state();
        let bytes = state.allocations.remove(&address).expect("an allocation");
        state.used -= bytes.next_multiple_of(self.memory.piece);
        // SAFETY: `allocate` made this address of an allocation of this layout.
        unsafe { dealloc((address as *mut u8).sub(MARGIN), layout(bytes)) }
    }
}

impl State {
    /// One launch more, unless the device is lost.
    fn count_down(&mut self, kernel: &'static str) -> Result<(), DeviceError> {
        match &mut self.left {
            None => Ok(()),
            Some(0) => Err(DeviceError::Lost {
                kernel,
                reason: "it was told to be".to_owned(),
            }),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    /// What was written beside an allocation.
    fn broken_guard(&self) -> Option<String> {
        self.allocations.iter().find_map(|(&address, &bytes)| {
            let whole = |at: i64| {
                // SAFETY: both margins are part of the allocation.
                unsafe { std::slice::from_raw_parts((address as i64 + at) as *const u8, MARGIN) }
                    .iter()
                    .all(|byte| *byte == GUARD)
            };
            let reason = || format!("wrote outside an allocation of {bytes} bytes");
            (!whole(-(MARGIN as i64)) || !whole(bytes as i64)).then(reason)
        })
    }
}

/// With the margins.
fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + 2 * MARGIN, MARGIN).expect("less than the device's memory")
}

impl Device for HostDevice {
    fn name(&self) -> String {
        format!("host device, threads {}", self.0.order)
    }

    fn limits(&self) -> Limits {
        Limits {
            memory: self.0.memory.bytes,
            ..LIMITS
        }
    }

    fn free_memory(&self) -> Result<usize, DeviceError> {
        Ok(self.0.memory.bytes - self.0.state().used)
    }

    fn piece(&self) -> usize {
        self.0.memory.piece
    }

    fn recording_bytes(&self, steps: usize) -> usize {
        let HostMemory {
            piece, recorded, ..
        } = self.0.memory;
        (steps * recorded).next_multiple_of(piece)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        let _turn = self.0.turns.unrecorded("an allocation")?;
        let mut state = self.0.state();
        let out_of_memory = self.0.out_of_memory(&state, bytes);
        let taken = bytes.next_multiple_of(self.0.memory.piece);
        if taken > self.0.memory.bytes - state.used {
            return Err(out_of_memory);
        }
        let layout = layout(bytes);
        // SAFETY: the layout is not empty, and what is filled is the allocation.
        let address = unsafe {
            let at = alloc(layout);
            if at.is_null() {
                return Err(out_of_memory);
            }
            std::ptr::write_bytes(at, GUARD, layout.size());
            at.add(MARGIN) as u64
        };
        state.used += taken;
        state.allocations.insert(address, bytes);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        if self.0.deferred.free_now(address) {
            self.0.free_now(address);
        }
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        let _turn = self.0.turns.unrecorded("an upload")?;
        let traffic = &mut self.0.state().traffic;
        traffic.uploads += 1;
        traffic.uploaded += from.len();
        // SAFETY: inside an allocation by contract, which `from` cannot be in.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), DeviceError> {
        let _turn = self.0.turns.unrecorded("a download")?;
        let traffic = &mut self.0.state().traffic;
        traffic.downloads += 1;
        traffic.downloaded += to.len();
        // SAFETY: inside an allocation by contract, which `to` cannot be in.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: handed on.
        unsafe { self.0.submit(Work::Copy { from, to, bytes }) }
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: handed on.
        unsafe { self.0.submit(Work::Zero { at, bytes }) }
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        launch: Launch,
        args: &[Arg],
    ) -> Result<(), DeviceError> {
        // SAFETY: handed on.
        unsafe { (self.0).submit(Work::Launch(kernel, launch, args.to_vec())) }
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.0.turns.unrecorded("waiting").map(|_turn| ())
    }

    fn record(
        &self,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Box<dyn Recording>, DeviceError> {
        let _recorder = self.0.turns.record()?;
        self.0.deferred.begin();
        let mut recording = Recorded {
            device: Arc::clone(&self.0),
            work: Vec::new(),
            bytes: 0,
        };
        let open = Open::new(&self.0);
        let result = work();
        recording.work = open.end();
        result?;
        let bytes = self.recording_bytes(recording.work.len());
        let mut state = self.0.state();
        if bytes > self.0.memory.bytes - state.used {
            let refused = self.0.out_of_memory(&state, bytes);
            // Dropping the recording asks for the state.
            drop(state);
            return Err(refused);
        }
        state.used += bytes;
        recording.bytes = bytes;
        Ok(Box::new(recording))
    }

    fn seconds(
        &self,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<f64, DeviceError> {
        drop(self.0.turns.unrecorded("a measurement")?);
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// What is launched is being recorded, until this ends.
struct Open<'d>(&'d Inner);

impl<'d> Open<'d> {
    fn new(device: &'d Inner) -> Self {
        device.state().recorded = Some(Vec::new());
        Self(device)
    }

    fn end(self) -> Vec<Work> {
        self.0.state().recorded.take().unwrap_or_default()
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.state().recorded = None;
    }
}

#[derive(Debug)]
struct Recorded {
    device: Arc<Inner>,
    work: Vec<Work>,
    /// Of the device's memory.
    bytes: usize,
}

impl Recording for Recorded {
    fn replay(&self) -> Result<(), DeviceError> {
        let _turn = self.device.turns.unrecorded("a replay")?;
        for work in &self.work {
            let mut state = self.device.state();
            // SAFETY: promised when it was recorded; memory given back since is kept while this lives.
            unsafe { self.device.run(&mut state, work)? };
        }
        Ok(())
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.device.state().used -= self.bytes;
        for address in self.device.deferred.end() {
            self.device.free_now(address);
        }
    }
}

// ---- kernels --------------------------------------------------------------------------------------------

/// `phidias_shim_launch` of `shim.h`.
type ShimLaunch = unsafe extern "C" fn(
    name: *const c_char,
    kinds: *const c_char,
    grid: *const u32,
    block: *const u32,
    shared: *mut u8,
    shared_bytes: usize,
    arguments: *mut *mut c_void,
    order: u32,
    seed: u32,
    message: *mut c_char,
    message_bytes: usize,
) -> c_int;

/// A source as a library. Its fibers are its own, so one launch at a time.
#[derive(Debug)]
struct Library {
    shim_launch: ShimLaunch,
    turn: Mutex<()>,
    /// Keeps the function where it is.
    _loaded: libloading::Library,
}

/// The libraries of all sources: compiled once a process, each when its first kernel is launched.
static LIBRARIES: [OnceLock<Result<Library, DeviceError>>; Source::ALL.len()] =
    [const { OnceLock::new() }; Source::ALL.len()];

/// # Safety
/// As [`Device::launch`] demands.
unsafe fn run_kernel(
    kernel: Kernel,
    launch: Launch,
    args: &[Arg],
    order: Order,
) -> Result<(), DeviceError> {
    let refused = |reason: String| {
        let kernel = kernel.name;
        Err(DeviceError::Launch { kernel, reason })
    };
    let threads: u64 = launch.block.iter().map(|n| u64::from(*n)).product();
    let [_, y, z] = launch.grid;
    if launch.grid.contains(&0) || y > 0xFFFF || z > 0xFFFF || !(1..=1024).contains(&threads) {
        return refused(format!("no GPU takes {launch:?}"));
    }
    if launch.shared > LIMITS.shared {
        let shared = launch.shared;
        return refused(format!(
            "{shared} of {} bytes of shared memory",
            LIMITS.shared
        ));
    }
    let library = LIBRARIES[kernel.source as usize].get_or_init(|| compile(kernel.source));
    let library = library.as_ref().map_err(Clone::clone)?;

    let kind = |arg: &Arg| match arg {
        Arg::Address(_) => 'p',
        Arg::U32(_) => 'u',
        Arg::I32(_) => 'i',
        Arg::F32(_) => 'f',
    };
    let kinds: String = args.iter().map(kind).collect();
    let mut values: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
    let mut arguments: Vec<*mut c_void> = (values.iter_mut())
        .map(|value| std::ptr::from_mut(value).cast())
        .collect();
    let mut shared = vec![SharedLine::zeroed(); launch.shared.div_ceil(128)];
    let mut message = [0u8; 256];
    let (order, seed) = match order {
        Order::Forward => (0, 0),
        Order::Backward => (1, 0),
        Order::Shuffled(seed) => (2, seed),
    };
    let name = CString::new(kernel.name).expect("a name");
    let kinds_text = CString::new(kinds.as_str()).expect("letters");
    let _turn = library.turn.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the library is `shim.h` with a source, whose function this is; it checks name and kinds of
    // the arguments. What the kernel does with their values is promised by the caller.
    let status = unsafe {
        (library.shim_launch)(
            name.as_ptr(),
            kinds_text.as_ptr(),
            launch.grid.as_ptr(),
            launch.block.as_ptr(),
            bytemuck::cast_slice_mut::<_, u8>(&mut shared)
                .as_mut_ptr()
                .cast(),
            launch.shared,
            arguments.as_mut_ptr(),
            order,
            seed,
            message.as_mut_ptr().cast(),
            message.len(),
        )
    };
    let end = message.iter().position(|b| *b == 0).unwrap_or(0);
    let message = String::from_utf8_lossy(&message[..end]);
    match status {
        0 => Ok(()),
        1 => refused(format!("not in {}", kernel.source.file())),
        2 => refused(format!("takes arguments ({message}), was given ({kinds})")),
        _ => refused(format!("threads wait at a barrier for ever in {message}")),
    }
}

/// A piece of shared memory, aligned as a GPU has it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(128))]
struct SharedLine([u8; 128]);

/// The C++ compiler of this machine.
fn compiler() -> Result<&'static str, DeviceError> {
    static FOUND: OnceLock<Option<String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let named = std::env::var("CXX").ok().filter(|name| !name.is_empty());
        let usual = ["c++", "g++", "clang++"].map(str::to_owned);
        let mut names = named.map_or(usual.to_vec(), |name| vec![name]).into_iter();
        names.find(|name| {
            Command::new(name)
                .arg("--version")
                .output()
                .is_ok_and(|o| o.status.success())
        })
    });
    found.as_deref().ok_or_else(|| DeviceError::Host {
        reason: "no C++ compiler: neither CXX nor c++, g++ or clang++ can be run".to_owned(),
    })
}

/// Compiles a source into a library, in a folder that is gone when it is loaded.
fn compile(source: Source) -> Result<Library, DeviceError> {
    let failed = |reason: String| DeviceError::Host { reason };
    let compiler = compiler()?;
    let folder = tempfile::tempdir().map_err(|e| failed(format!("no temporary folder: {e}")))?;
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).map_err(|e| failed(format!("{}: {e}", path.display())))
    };
    write("shim.h", include_str!("shim.h"))?;
    write("common.cuh", Source::COMMON)?;
    write(source.file(), source.text())?;
    let mut unit = format!("#include \"shim.h\"\n#include \"{}\"\n", source.file());
    unit.push_str("const shim::Entry shim::entries[] = {\n");
    for name in source.kernels() {
        let _ = writeln!(unit, "  SHIM_ENTRY({name}),");
    }
    unit.push_str("  {nullptr, nullptr, nullptr}};\n");
    write("unit.cpp", &unit)?;

    let library = folder.path().join("kernels.so");
    // Fortified jumps refuse to leave the stack that they were taken on.
    let output = Command::new(compiler)
        .args([
            "-O1",
            "-std=c++17",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
        ])
        .args([
            "-U_FORTIFY_SOURCE",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
        ])
        .args(["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"])
        .arg("unit.cpp")
        .arg("-o")
        .arg(&library)
        .current_dir(folder.path())
        .output()
        .map_err(|e| failed(format!("{compiler}: {e}")))?;
    if !output.status.success() {
        return Err(DeviceError::Compile {
            file: source.file(),
            target: format!("the CPU by {compiler}"),
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    load(&library).map_err(|e| failed(format!("{}: {e}", library.display())))
}

fn load(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: the library is what was just compiled; loading it constructs empty tables. The function has
    // this type in `shim.h`, and the library is kept as long as it.
    unsafe {
        let loaded = libloading::Library::new(path)?;
        let shim_launch = *loaded.get::<ShimLaunch>(b"phidias_shim_launch")?;
        Ok(Library {
            shim_launch,
            turn: Mutex::new(()),
            _loaded: loaded,
        })
    }
}
