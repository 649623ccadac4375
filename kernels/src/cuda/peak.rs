//! The limits of a device: reading memory, and multiplying in registers.
//!
//! What the loops do is at the head of `peak.cu`. Each gives a sum that is known beforehand: a loop that
//! computes something else measures something else.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Memory, Source, Span};
use crate::cpu::peak::Number;
use std::sync::Arc;

/// The kernels of `peak.cu`.
pub(super) const KERNELS: &[&str] = &["read_all", "loop_int8", "loop_bf16", "loop_f32"];

const THREADS: usize = 256;
const WARP: usize = 32;
const STREAMS: usize = 8;
/// Blocks for each multiprocessor: as many threads as one holds, at 64 registers each.
const BLOCKS: usize = 4;
/// Rounds of a loop at most: the sums of floats stay below 2^24.
pub const MOST_ROUNDS: u32 = 1 << 20;

/// A device and the memory its loops write to.
#[derive(Debug)]
pub struct Loops {
    device: Arc<dyn Device>,
    blocks: usize,
    sums: Memory,
}

impl Loops {
    /// For a device.
    /// # Errors
    /// When there is no memory.
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let blocks = device.limits().multiprocessors as usize * BLOCKS;
        Ok(Self {
            sums: Memory::new(device, blocks * THREADS * size_of::<u32>())?,
            device: Arc::clone(device),
            blocks,
        })
    }

    /// Operations of `rounds` rounds; a multiply-add is two.
    #[must_use]
    pub fn operations(&self, number: Number, rounds: u32) -> f64 {
        let a_thread = match number {
            Number::Int8 => 16 * 8 * 32 / WARP,
            Number::Bf16 => 16 * 8 * 16 / WARP,
            Number::F32 => 1,
        };
        2.0 * (a_thread * STREAMS * THREADS * self.blocks) as f64 * f64::from(rounds)
    }

    /// Runs a loop and returns the seconds it takes.
    /// # Errors
    /// When the launch fails.
    /// # Panics
    /// When it computes something else; for more than [`MOST_ROUNDS`].
    pub fn multiply(&self, number: Number, rounds: u32) -> Result<f64, DeviceError> {
        assert!(rounds <= MOST_ROUNDS, "{rounds} rounds");
        // What a round adds to a stream, and the sum of what the streams begin with.
        let (name, ones, each, begin) = match number {
            Number::Int8 => ("loop_int8", 0x0101_0101, 4 * 32, 0),
            Number::Bf16 => ("loop_bf16", 0x3F80_3F80, 4 * 16, 0),
            Number::F32 => ("loop_f32", 0x3F80_0000, 1, (0..STREAMS as u32).sum()),
        };
        let sums = self.sums.span::<u32>();
        let args = [Arg::U32(rounds), Arg::U32(ones), sums.on(&*self.device)];
        let seconds = self.device.seconds(&mut || {
            // SAFETY: each thread writes its sum, for which there is room.
            unsafe { self.device.launch(kernel(name), launch(self.blocks), &args) }
        })?;
        let want = rounds.wrapping_mul(each * STREAMS as u32) + begin;
        let got = sums.to_vec()?;
        assert!(got.iter().all(|sum| *sum == want), "{name}: not {want}");
        Ok(seconds)
    }

    /// Reads all of `from` and returns the seconds that takes, and the sum of its words.
    /// # Errors
    /// When the launch fails.
    /// # Panics
    /// When it is not of whole pieces of 16 bytes, or of more than 2^30 of them.
    pub fn read(&self, from: Span<'_, u32>) -> Result<(f64, u32), DeviceError> {
        let pieces = from.len() / 4;
        assert!(
            from.len().is_multiple_of(4) && pieces <= 1 << 30 && from.is_aligned(16),
            "{} words to read",
            from.len()
        );
        let sums = self.sums.span::<u32>().slice(..self.blocks);
        let device = &*self.device;
        let args = [from.on(device), Arg::U32(pieces as u32), sums.on(device)];
        let seconds = device.seconds(&mut || {
            // SAFETY: it reads `pieces` times 16 bytes, which are in the span, and each block writes its sum,
            // for which there is room.
            unsafe { device.launch(kernel("read_all"), launch(self.blocks), &args) }
        })?;
        let sum = sums.to_vec()?.into_iter().fold(0, u32::wrapping_add);
        Ok((seconds, sum))
    }
}

fn kernel(name: &'static str) -> Kernel {
    Kernel {
        source: Source::Peak,
        name,
    }
}

fn launch(blocks: usize) -> Launch {
    Launch {
        grid: [blocks as u32, 1, 1],
        block: [THREADS as u32, 1, 1],
        shared: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{Random, each_device};
    use super::*;

    #[test]
    fn loops_compute_what_they_should_and_take_time() {
        each_device(|device| {
            let loops = Loops::new(device)?;
            for number in Number::ALL {
                for rounds in [0, 1, 5] {
                    let seconds = loops.multiply(number, rounds)?;
                    assert!(seconds >= 0.0 && seconds.is_finite());
                }
            }
            let of = |number| loops.operations(number, 3);
            assert_eq!(of(Number::Int8), 2.0 * of(Number::Bf16));
            assert_eq!(of(Number::Bf16), 64.0 * of(Number::F32));
            Ok(())
        });
    }

    /// With a thread's four pieces at once, some of them, and less than one for each thread.
    #[test]
    fn every_byte_is_read_once() {
        each_device(|device| {
            let loops = Loops::new(device)?;
            let threads = loops.blocks * THREADS;
            let mut random = Random(1);
            for pieces in [0, 1, threads - 1, 5 * threads + 77] {
                let words: Vec<u32> = (0..4 * pieces).map(|_| random.bits() as u32).collect();
                let memory = Memory::from_slice(device, &words)?;
                let (_, sum) = loops.read(memory.span())?;
                let want = words.iter().fold(0, |sum: u32, w| sum.wrapping_add(*w));
                assert_eq!(sum, want, "{pieces} pieces");
            }
            Ok(())
        });
    }
}
