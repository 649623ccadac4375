//! The first frame of a GIF, as Pillow shows it.
//!
//! A frame may cover a part of the screen only, or reach beyond it. The picture is large enough
//! for both; what the frame leaves free has the frame's transparent colour, or the first of its
//! colours where none is transparent. An index beyond the table of colours is black.
//! (The `image` crate shows black and the screen alone, hence the decoder below it.)

use super::Pixels;
use super::decode::{Refusal, check_size};
use gif::{ColorOutput, DecodeOptions};

/// Reads the first frame.
pub(super) fn decode(bytes: &[u8]) -> Result<Pixels, Refusal> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    let mut reader = options.read_info(bytes)?;
    let screen = (usize::from(reader.width()), usize::from(reader.height()));
    let frame = reader.next_frame_info()?;
    let frame = frame.ok_or_else(|| Refusal::Damaged("it has no frame".into()))?;
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_width, frame_height) = (usize::from(frame.width), usize::from(frame.height));
    let unused = usize::from(frame.transparent.unwrap_or(0));
    if frame_width == 0 || frame_height == 0 {
        let size = format!("its first frame is {frame_width} x {frame_height} pixels");
        return Err(Refusal::Damaged(size));
    }
    let width = screen.0.max(left + frame_width);
    let height = screen.1.max(top + frame_height);
    let data_bytes = width as u64 * height as u64 * 3;
    check_size(width as u32, height as u32, data_bytes)?;

    let mut indices = vec![0; frame_width * frame_height]; // [frame_height, frame_width]
    reader.read_into_buffer(&mut indices)?;
    let table = reader.palette()?;
    let colours: [[u8; 3]; 256] = std::array::from_fn(|i| match table.get(i * 3..i * 3 + 3) {
        Some(colour) => [colour[0], colour[1], colour[2]],
        None => [0; 3],
    });

    let mut data = colours[unused].repeat(width * height);
    for (y, row) in indices.chunks_exact(frame_width).enumerate() {
        let start = ((top + y) * width + left) * 3;
        let out = data[start..][..frame_width * 3].chunks_exact_mut(3);
        for (pixel, &index) in out.zip(row) {
            pixel.copy_from_slice(&colours[usize::from(index)]);
        }
    }
    Ok(Pixels {
        width,
        height,
        data,
    })
}
