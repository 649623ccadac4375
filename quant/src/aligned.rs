//! Owned bytes that start on a 64-byte boundary, as the packed formats require.

/// Alignment of every packed tensor, in memory and in a file: one cache line, one 512-bit register.
pub const ALIGN: usize = 64;

/// One cache line: the unit in which aligned memory is taken.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct Line([u8; ALIGN]);

impl Default for Line {
    fn default() -> Self {
        Self([0; ALIGN])
    }
}

/// The bytes of some lines.
pub(crate) fn bytes_of(lines: &[Line]) -> &[u8] {
    bytemuck::cast_slice(lines)
}

/// The bytes of some lines.
pub(crate) fn bytes_of_mut(lines: &mut [Line]) -> &mut [u8] {
    bytemuck::cast_slice_mut(lines)
}

const _: () = assert!(size_of::<Line>() == ALIGN && align_of::<Line>() == ALIGN);

/// A zeroed, fixed-size byte buffer aligned to [`ALIGN`].
pub struct AlignedBytes {
    lines: Box<[Line]>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes, or `None` when the allocator refuses. Pages are taken when first written.
    #[must_use]
    pub fn try_zeroed(len: usize) -> Option<Self> {
        let lines = bytemuck::allocation::try_zeroed_slice_box(len.div_ceil(ALIGN)).ok()?;
        Some(Self { lines, len })
    }

    /// A copy of `bytes` on an aligned address, or `None` when the allocator refuses.
    #[must_use]
    pub fn try_copy(bytes: &[u8]) -> Option<Self> {
        let mut copy = Self::try_zeroed(bytes.len())?;
        copy.as_mut().copy_from_slice(bytes);
        Some(copy)
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl AsMut<[u8]> for AlignedBytes {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_line_and_keeps_its_length() {
        for len in [0, 1, 63, 64, 65, 1000] {
            let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let copy = AlignedBytes::try_copy(&bytes).unwrap();
            assert_eq!(copy.as_ref(), bytes);
            assert_eq!(copy.as_ref().as_ptr() as usize % ALIGN, 0);
        }
        assert!(AlignedBytes::try_zeroed(usize::MAX / 2).is_none());
    }
}
