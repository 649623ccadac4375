//! What kernels are launched on: one in-order queue of work, and memory that belongs to it.

use bytemuck::Pod;
use std::fmt::{self, Debug};
use std::marker::PhantomData;
use std::mem::size_of;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, ThreadId};

/// A source of kernels: one file, one translation unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// `elementwise.cu`
    Elementwise,
    /// `linear.cu`
    Linear,
    /// `experts.cu`
    Experts,
    /// `attention.cu`
    Attention,
    /// `sample.cu`
    Sample,
    /// `peak.cu`
    Peak,
    /// `check/probe.cu`, for tests of devices.
    #[cfg(test)]
    Probe,
}

impl Source {
    /// Every source.
    pub const ALL: &[Self] = &[
        Self::Elementwise,
        Self::Linear,
        Self::Experts,
        Self::Attention,
        Self::Sample,
        Self::Peak,
        #[cfg(test)]
        Self::Probe,
    ];

    /// What the sources include as `common.cuh`.
    pub const COMMON: &str = include_str!("common.cuh");

    /// The name of its file.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Elementwise => "elementwise.cu",
            Self::Linear => "linear.cu",
            Self::Experts => "experts.cu",
            Self::Attention => "attention.cu",
            Self::Sample => "sample.cu",
            Self::Peak => "peak.cu",
            #[cfg(test)]
            Self::Probe => "probe.cu",
        }
    }

    /// Its text.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Elementwise => include_str!("elementwise.cu"),
            Self::Linear => include_str!("linear.cu"),
            Self::Experts => include_str!("experts.cu"),
            Self::Attention => include_str!("attention.cu"),
            Self::Sample => include_str!("sample.cu"),
            Self::Peak => include_str!("peak.cu"),
            #[cfg(test)]
            Self::Probe => include_str!("check/probe.cu"),
        }
    }

    /// Whether its kernels may begin while the one before ends: they wait for it themselves, by
    /// `after_previous` of `common.cuh`.
    #[must_use]
    pub fn overlaps(self) -> bool {
        match self {
            Self::Elementwise | Self::Linear | Self::Experts | Self::Attention | Self::Sample => {
                true
            }
            Self::Peak => false,
            #[cfg(test)]
            Self::Probe => false,
        }
    }

    /// The names of all its kernels.
    #[must_use]
    pub fn kernels(self) -> &'static [&'static str] {
        match self {
            Self::Elementwise => super::elementwise::KERNELS,
            Self::Linear => super::linear::KERNELS,
            Self::Experts => super::experts::KERNELS,
            Self::Attention => super::attention::KERNELS,
            Self::Sample => super::sample::KERNELS,
            Self::Peak => super::peak::KERNELS,
            #[cfg(test)]
            Self::Probe => super::check::probe::KERNELS,
        }
    }
}

/// A kernel by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Where it is.
    pub source: Source,
    /// One of [`Source::kernels`].
    pub name: &'static str,
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z. Of y and z a GPU takes up to 65535.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// A pointer, of any type. Zero is the null pointer.
    Address(u64),
    /// `u32`
    U32(u32),
    /// `i32`
    I32(i32),
    /// `f32`
    F32(f32),
}

impl Arg {
    /// Its bytes, from the first one on, as a launch takes them from memory.
    pub(super) fn bits(self) -> u64 {
        let four = |bytes: [u8; 4]| {
            let [a, b, c, d] = bytes;
            u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
        };
        match self {
            Self::Address(address) => address,
            Self::U32(v) => four(v.to_ne_bytes()),
            Self::I32(v) => four(v.to_ne_bytes()),
            Self::F32(v) => four(v.to_ne_bytes()),
        }
    }
}

/// What a device can do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Multiprocessors: what a grid is divided among.
    pub multiprocessors: u32,
    /// Bytes of shared memory that one block may have.
    pub shared: usize,
    /// Bytes of memory, used or not.
    pub memory: usize,
}

/// Why a device cannot be had, or did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver.
    #[error("no CUDA driver: the library {library} cannot be loaded")]
    NoDriver {
        /// What was looked for.
        library: &'static str,
    },
    /// The driver lacks what this program calls.
    #[error("the CUDA driver is too old: it is for CUDA {found}, at least {expected} is needed")]
    OldDriver {
        /// The version of CUDA that it is made for.
        found: String,
        /// The least that will do.
        expected: &'static str,
    },
    /// The driver shows no GPU of that number, or none at all.
    #[error("no CUDA device {ordinal}: the driver shows {found}")]
    NoDevice {
        /// Counted from 0.
        ordinal: usize,
        /// How many there are.
        found: usize,
    },
    /// A GPU without the instructions that the kernels use.
    #[error("{name} has compute capability {found}, the kernels need at least 8.0")]
    OldDevice {
        /// Its name.
        name: String,
        /// Its compute capability.
        found: String,
    },
    /// The compiler for kernels is missing.
    #[error("no CUDA compiler: {library} cannot be loaded")]
    NoCompiler {
        /// What was looked for.
        library: &'static str,
    },
    /// A source of kernels does not compile.
    #[error("{file} does not compile for {target}: {log}")]
    Compile {
        /// The file.
        file: &'static str,
        /// What it was compiled for.
        target: String,
        /// What the compiler said.
        log: String,
    },
    /// What the compiler has just made of a source is nothing the driver takes.
    #[error(
        "the CUDA driver, for CUDA {driver}, refuses {file} as NVRTC {compiler} has just compiled it for {target}: {reason}"
    )]
    Refused {
        /// The file.
        file: &'static str,
        /// What it was compiled for.
        target: String,
        /// The version of the compiler.
        compiler: String,
        /// The version of CUDA that the driver is for.
        driver: String,
        /// What the driver said.
        reason: String,
    },
    /// There is not as much memory left.
    #[error("out of device memory: {asked} bytes asked for, {free} of {total} are free")]
    OutOfMemory {
        /// Bytes asked for.
        asked: usize,
        /// Bytes free then.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// A kernel was refused, or failed in a way that the device survives.
    #[error("kernel {kernel}: {reason}")]
    Launch {
        /// Its name.
        kernel: &'static str,
        /// What the device said.
        reason: String,
    },
    /// The device is lost to this process: nothing more can be done on it.
    #[error("the device is lost: {reason}; the last kernel launched was {kernel}")]
    Lost {
        /// The kernel launched last, which need not be the one that failed.
        kernel: &'static str,
        /// What the driver said.
        reason: String,
    },
    /// Something that cannot be recorded.
    #[error("{what} cannot be recorded: only launches, copies and zeroing can")]
    Recording {
        /// What was asked for.
        what: &'static str,
    },
    /// Anything else the driver refused.
    #[error("{call} failed: {reason}")]
    Driver {
        /// What was called.
        call: &'static str,
        /// What the driver said.
        reason: String,
    },
    /// The host device's library of kernels could not be made.
    #[error("no host device: {reason}")]
    Host {
        /// Why.
        reason: String,
    },
}

/// One in-order queue of work and its memory. Work is done in the order it was asked for, after the call
/// has returned or before.
pub trait Device: Send + Sync + Debug {
    /// Its name, for reports.
    fn name(&self) -> String;

    /// What it can do at most.
    fn limits(&self) -> Limits;

    /// Bytes of memory that are free now. What the device itself takes, kernels and all, is taken already.
    /// # Errors
    /// When the device is lost.
    fn free_memory(&self) -> Result<usize, DeviceError>;

    /// What memory is given out in: an allocation takes the next multiple of so many bytes.
    fn piece(&self) -> usize;

    /// Bytes of its memory that a recording of so many launches, copies and zeroings takes, at most.
    fn recording_bytes(&self, steps: usize) -> usize;

    /// `bytes` bytes, of any contents, at an address that is a multiple of 256; at least one.
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; when the device is lost, or records.
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives memory back, after the work that was asked for before; while a recording lives, after its end.
    /// # Safety
    /// `address` is from [`Device::allocate`] of this device, and is not used again.
    unsafe fn free(&self, address: u64);

    /// Copies bytes to the device. `from` can be changed when this returns.
    /// # Errors
    /// When the device is lost, or records.
    /// # Safety
    /// The bytes at `to` are inside one allocation of this device.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), DeviceError>;

    /// Copies bytes from the device, when all work before is done.
    /// # Errors
    /// When the device is lost, or records.
    /// # Safety
    /// The bytes at `from` are inside one allocation of this device.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), DeviceError>;

    /// Copies bytes within the device.
    /// # Errors
    /// When the device is lost.
    /// # Safety
    /// Both ranges are inside allocations of this device and do not overlap.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError>;

    /// Sets bytes to zero.
    /// # Errors
    /// When the device is lost.
    /// # Safety
    /// The bytes are inside one allocation of this device.
    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), DeviceError>;

    /// Runs a kernel.
    /// # Errors
    /// [`DeviceError::Launch`] when the device refuses it, or it fails at once.
    /// # Safety
    /// `args` are of the number and the types that the kernel has; whatever it reads and writes is inside
    /// allocations of this device. [`Span`] has addresses for which a wrapper can promise that.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        launch: Launch,
        args: &[Arg],
    ) -> Result<(), DeviceError>;

    /// Waits for all work.
    /// # Errors
    /// What failed since the last call.
    fn synchronize(&self) -> Result<(), DeviceError>;

    /// What `work` launches, copies and zeroes, recorded instead of done. Memory that it uses stays until
    /// the recording is dropped. Other threads that ask something of the device wait until it is made; `work`
    /// must not wait for one of them.
    /// # Errors
    /// Those of `work`; [`DeviceError::Recording`] when it records, or asks for anything else.
    fn record(
        &self,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Box<dyn Recording>, DeviceError>;

    /// The seconds that the device takes for `work`.
    /// # Errors
    /// Those of `work`.
    fn seconds(
        &self,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<f64, DeviceError>;
}

/// Work that can be done again and again at the cost of one launch.
pub trait Recording: Send + Debug {
    /// Does it, in the order of the device's queue.
    /// # Errors
    /// As a launch has.
    fn replay(&self) -> Result<(), DeviceError>;
}

/// Memory that was given back while recordings live: they know its addresses.
#[derive(Debug, Default)]
pub(super) struct Deferred(Mutex<(usize, Vec<u64>)>);

impl Deferred {
    /// One recording more.
    pub(super) fn begin(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
    }

    /// One recording less: what is to be freed now.
    pub(super) fn end(&self) -> Vec<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 -= 1;
        match state.0 {
            0 => std::mem::take(&mut state.1),
            _ => Vec::new(),
        }
    }

    /// Whether `address` is to be freed now; kept otherwise.
    pub(super) fn free_now(&self, address: u64) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 > 0 {
            state.1.push(address);
        }
        state.0 == 0
    }
}

/// Who may ask the device for something: everybody, but while a thread records, nobody else. What others
/// launch would otherwise be recorded, and what they read or take would spoil the recording.
#[derive(Debug, Default)]
pub(super) struct Turns {
    calls: RwLock<()>,
    recorder: Mutex<Option<ThreadId>>,
}

/// A call is made while this lives; for the thread that records it is nothing. No thread holds two of
/// others: the second would wait behind a recording that waits for the first.
pub(super) struct Turn<'t> {
    _held: Option<RwLockReadGuard<'t, ()>>,
    /// Whether the call is recorded.
    pub(super) recorded: bool,
}

/// The turn of the thread that records.
#[derive(Debug)]
pub(super) struct Recorder<'t> {
    turns: &'t Turns,
    _held: RwLockWriteGuard<'t, ()>,
}

impl Turns {
    fn records(&self) -> bool {
        let recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        *recorder == Some(thread::current().id())
    }

    /// A turn for one call, when no other thread records.
    pub(super) fn call(&self) -> Turn<'_> {
        let recorded = self.records();
        let held = || self.calls.read().unwrap_or_else(PoisonError::into_inner);
        Turn {
            _held: (!recorded).then(held),
            recorded,
        }
    }

    /// The same for what cannot be recorded.
    pub(super) fn unrecorded(&self, what: &'static str) -> Result<Turn<'_>, DeviceError> {
        match self.call() {
            turn if turn.recorded => Err(DeviceError::Recording { what }),
            turn => Ok(turn),
        }
    }

    /// A turn for a whole recording, when the calls of other threads have returned.
    pub(super) fn record(&self) -> Result<Recorder<'_>, DeviceError> {
        if self.records() {
            let what = "a recording";
            return Err(DeviceError::Recording { what });
        }
        let held = self.calls.write().unwrap_or_else(PoisonError::into_inner);
        self.set(Some(thread::current().id()));
        Ok(Recorder {
            turns: self,
            _held: held,
        })
    }

    fn set(&self, recorder: Option<ThreadId>) {
        *self.recorder.lock().unwrap_or_else(PoisonError::into_inner) = recorder;
    }
}

impl Drop for Recorder<'_> {
    fn drop(&mut self) {
        self.turns.set(None);
    }
}

/// Memory of a device, given back on drop.
#[derive(Debug)]
pub struct Memory {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// `bytes` bytes of any contents, at a multiple of 256.
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            address: device.allocate(bytes.max(1))?,
            device: Arc::clone(device),
            bytes,
        })
    }

    /// `bytes` zeros.
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn zeroed(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        let memory = Self::new(device, bytes)?;
        memory.span::<u8>().zero()?;
        Ok(memory)
    }

    /// A copy of `values`.
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn from_slice<T: Pod>(device: &Arc<dyn Device>, values: &[T]) -> Result<Self, DeviceError> {
        let memory = Self::new(device, size_of_val(values))?;
        memory.span().upload(values)?;
        Ok(memory)
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// All of it as values of a type.
    /// # Panics
    /// When they do not fill it.
    #[must_use]
    pub fn span<T: Pod>(&self) -> Span<'_, T> {
        assert_eq!(
            self.bytes % size_of::<T>(),
            0,
            "{} bytes as values of {}",
            self.bytes,
            size_of::<T>()
        );
        Span {
            memory: self,
            address: self.address,
            len: self.bytes / size_of::<T>(),
            values: PhantomData,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the address is from this device, and no span outlives the memory. Recordings that know
        // it are the device's to wait for.
        unsafe { self.device.free(self.address) }
    }
}

/// Some consecutive values in the memory of a device: what kernels read and write.
///
/// It says where, not who may write: the queue is in order, so nothing happens at once.
pub struct Span<'m, T> {
    memory: &'m Memory,
    address: u64,
    len: usize,
    values: PhantomData<T>,
}

impl<T> Debug for Span<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} values at {:#x}", self.len, self.address)
    }
}

impl<T> Clone for Span<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Span<'_, T> {}

impl<'m, T: Pod> Span<'m, T> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it begins at a multiple of so many bytes.
    #[must_use]
    pub fn is_aligned(&self, bytes: usize) -> bool {
        self.address.is_multiple_of(bytes as u64)
    }

    /// The memory it is in.
    #[must_use]
    pub fn memory(&self) -> &'m Memory {
        self.memory
    }

    /// Where it begins, as an argument of a kernel launched on `device`.
    /// # Panics
    /// When it is the memory of another device.
    #[must_use]
    pub fn on(&self, device: &dyn Device) -> Arg {
        let own = Arc::as_ptr(&self.memory.device);
        assert!(
            std::ptr::addr_eq(own, device),
            "memory of {:?} in a launch on {device:?}",
            self.memory.device
        );
        Arg::Address(self.address)
    }

    /// Part of it.
    /// # Panics
    /// When the range is not inside.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Self {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len,
        };
        assert!(
            start <= end && end <= self.len,
            "{start}..{end} of {} values",
            self.len
        );
        Self {
            address: self.address + (start * size_of::<T>()) as u64,
            len: end - start,
            ..*self
        }
    }

    /// The same bytes as values of another type.
    /// # Panics
    /// When they do not fill it, or it does not begin at a multiple of their size.
    #[must_use]
    pub fn cast<U: Pod>(&self) -> Span<'m, U> {
        let bytes = self.len * size_of::<T>();
        assert!(
            bytes.is_multiple_of(size_of::<U>())
                && self.address.is_multiple_of(align_of::<U>() as u64),
            "{bytes} bytes at {:#x} as values of {}",
            self.address,
            size_of::<U>()
        );
        Span {
            memory: self.memory,
            address: self.address,
            len: bytes / size_of::<U>(),
            values: PhantomData,
        }
    }

    /// Copies `values` into it, after the work before.
    /// # Errors
    /// When the device is lost, or records.
    /// # Panics
    /// When there are not as many.
    pub fn upload(&self, values: &[T]) -> Result<(), DeviceError> {
        assert_eq!(values.len(), self.len, "values and their place");
        // SAFETY: a span is inside its memory, and the lengths are equal.
        unsafe {
            let bytes = bytemuck::cast_slice(values);
            self.memory.device.upload(self.address, bytes)
        }
    }

    /// Copies it into `values` when the work before is done.
    /// # Errors
    /// When the device is lost, or records.
    /// # Panics
    /// When there are not as many.
    pub fn download(&self, values: &mut [T]) -> Result<(), DeviceError> {
        assert_eq!(values.len(), self.len, "values and their place");
        // SAFETY: a span is inside its memory, and the lengths are equal.
        unsafe {
            let bytes = bytemuck::cast_slice_mut(values);
            self.memory.device.download(self.address, bytes)
        }
    }

    /// Its values, when the work before is done.
    /// # Errors
    /// When the device is lost, or records.
    pub fn to_vec(&self) -> Result<Vec<T>, DeviceError> {
        let mut values = vec![T::zeroed(); self.len];
        self.download(&mut values)?;
        Ok(values)
    }

    /// Copies it to `to`.
    /// # Errors
    /// When the device is lost.
    /// # Panics
    /// When the lengths differ, the two overlap or belong to two devices.
    pub fn copy_to(&self, to: Span<'_, T>) -> Result<(), DeviceError> {
        assert_eq!(self.len, to.len, "lengths of a copy");
        let bytes = self.len * size_of::<T>();
        let distance = self.address.abs_diff(to.address);
        assert!(distance >= bytes as u64, "a copy onto itself");
        let device = &*self.memory.device;
        let _ = to.on(device);
        // SAFETY: spans are inside their memories, which are of this device; they do not overlap.
        unsafe { device.copy(self.address, to.address, bytes) }
    }

    /// Sets it to zero.
    /// # Errors
    /// When the device is lost.
    pub fn zero(&self) -> Result<(), DeviceError> {
        // SAFETY: a span is inside its memory.
        unsafe { (self.memory.device).zero(self.address, self.len * size_of::<T>()) }
    }
}
