//! Whether there are tiles, and their shape.
//!
//! A tile register holds up to 16 rows of 64 bytes. A thread sets the shape of its eight and gives them back:
//! while they are in use the system saves 8 KiB at each change of threads, and not after.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::LazyLock;

/// Whether the CPU has tiles of bytes and of bf16, and the system lets this process use them.
pub(in crate::cpu) fn available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| detected() && permitted());
    *AVAILABLE
}

fn detected() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    // Leaf 7: bf16, tiles, bytes. XCR0: the shape and the registers.
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const STATE: u64 = 1 << 17 | 1 << 18;
    /// # Safety
    /// The system has made `xgetbv` usable (OSXSAVE).
    #[target_feature(enable = "xsave")]
    unsafe fn state() -> u64 {
        // SAFETY: the caller's promise; register 0 is there wherever the instruction is.
        unsafe { _xgetbv(0) }
    }
    let leaves = __cpuid_count(0, 0).eax;
    leaves >= 7
        && __cpuid_count(1, 0).ecx & OSXSAVE != 0
        && __cpuid_count(7, 0).edx & FEATURES == FEATURES
        // SAFETY: OSXSAVE is set.
        && unsafe { state() } & STATE == STATE
}

/// Asks Linux, which keeps room for tiles only where a process wants them; the answer holds for all threads.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: this request reads and writes no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// Elsewhere nobody has said how to ask.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Rows of a tile.
pub(in crate::cpu) const ROWS: usize = 16;

/// A row of a tile in memory.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(in crate::cpu) struct Line<T>(pub T);

/// A tile of bytes: of the left factor `[rows][64]`, of the right one `[16][columns][4]`, where four that are summed lie
/// side by side.
pub(in crate::cpu) type Bytes = [Line<[u8; 64]>; ROWS];
/// A tile of their sums, `[rows][columns]`.
pub(in crate::cpu) type Integers = [Line<[i32; ROWS]>; ROWS];

const _: () = assert!(size_of::<Bytes>() == 1024 && size_of::<Integers>() == 1024);

/// The shape of the eight registers as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Shape>() == 64);

/// The tile registers in the hands of this thread, all of them 16 rows of 64 bytes.
pub(in crate::cpu) struct Tiles(());

impl Tiles {
    /// Takes them, all zero.
    /// # Safety
    /// [`available`] has said yes.
    pub(in crate::cpu) unsafe fn take() -> Self {
        const REGISTERS: usize = 8;
        static SHAPE: Shape = {
            let mut shape = Shape {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                bytes_per_row: [0; 16],
                rows: [0; 16],
            };
            let mut i = 0;
            while i < REGISTERS {
                (shape.bytes_per_row[i], shape.rows[i]) = (64, ROWS as u8);
                i += 1;
            }
            shape
        };
        // SAFETY: the CPU has the instruction, which reads the 64 bytes of a valid shape.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPE, options(nostack, readonly)) };
        Self(())
    }

    /// Zeros in register `TO`.
    #[inline(always)]
    pub(in crate::cpu) fn zero<const TO: usize>(&self) {
        // SAFETY: the register is there and this thread's; it is used in `asm!` only.
        unsafe { asm!("tilezero tmm{}", const TO, options(nostack, nomem, preserves_flags)) };
    }

    /// A tile to register `TO`.
    #[inline(always)]
    pub(in crate::cpu) fn load<const TO: usize>(&self, from: &Bytes) {
        // SAFETY: as above; 16 rows of 64 bytes, one after the other, are read.
        unsafe {
            asm!(
                "tileloadd tmm{to}, [{from} + {row}]",
                to = const TO,
                from = in(reg) from.as_ptr(),
                row = in(reg) size_of_val(&from[0]),
                options(nostack, readonly, preserves_flags),
            );
        }
    }

    /// Register `FROM` to a tile.
    #[inline(always)]
    pub(in crate::cpu) fn store<const FROM: usize>(&self, to: &mut Integers) {
        // SAFETY: as above; 16 rows of 64 bytes, one after the other, are written.
        unsafe {
            asm!(
                "tilestored [{to} + {row}], tmm{from}",
                from = const FROM,
                to = in(reg) to.as_mut_ptr(),
                row = in(reg) size_of_val(&to[0]),
                options(nostack, preserves_flags),
            );
        }
    }

    /// Adds the products of register `X`, signed bytes, and `W`, signed bytes, to register `TO`, of 32-bit integers.
    #[inline(always)]
    pub(in crate::cpu) fn add_signed<const TO: usize, const X: usize, const W: usize>(&self) {
        // SAFETY: as above.
        unsafe {
            asm!(
                "tdpbssd tmm{to}, tmm{x}, tmm{w}",
                to = const TO,
                x = const X,
                w = const W,
                options(nostack, nomem, preserves_flags),
            );
        }
    }

    /// The same where the bytes of `X` have no sign.
    #[inline(always)]
    pub(in crate::cpu) fn add_unsigned<const TO: usize, const X: usize, const W: usize>(&self) {
        // SAFETY: as above.
        unsafe {
            asm!(
                "tdpbusd tmm{to}, tmm{x}, tmm{w}",
                to = const TO,
                x = const X,
                w = const W,
                options(nostack, nomem, preserves_flags),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a `Tiles` exists only where the CPU has the instruction; nothing of theirs is needed any more.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
