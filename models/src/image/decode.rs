//! Files to 8-bit RGB, as Pillow's `Image.open(file).convert("RGB")`.
//!
//! * The format is recognised by the first bytes; the name says nothing.
//! * Sizes are read from the header and refused there, before memory is taken for the pixels.
//! * **Orientation is not applied.** A camera's EXIF note to turn the picture is ignored: the
//!   published processor converts to RGB and resizes, nothing else, so the model sees the pixels
//!   as they are stored.
//! * Alpha is dropped, not blended: a transparent pixel has the colour that is stored for it.
//! * Gray is repeated three times, palettes are looked up. 16-bit colours lose their low byte.
//!   16-bit *gray without alpha* is cut at 255, not scaled: Pillow takes such a file for a mode of
//!   its own and most of the picture turns white. The reference does that, so this does.
//! * Colour profiles and gamma are ignored.
//! * Of an animation, the first frame.
//!
//! The pixels of lossless files are those of the reference to the bit. JPEG and lossy WebP leave
//! the last bit of the arithmetic to the decoder, and this one (`zune-jpeg`) is not Pillow's
//! (`libjpeg-turbo`); the two differ by a few steps of 256.

use super::Pixels;
use super::error::ImageError;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Most bytes read of a picture's file.
pub const MAX_FILE_BYTES: u64 = 256 << 20;
/// Most columns and rows of a picture.
pub const MAX_SIDE: u32 = 65_535;
/// Most bytes of a decoded picture, as stored and as 8-bit RGB: 178 million pixels, which is
/// where Pillow refuses too.
pub const MAX_DECODED_BYTES: u64 = 512 << 20;

/// A decoded picture: 8-bit RGB as the file stores it, and the name of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    origin: String,
    pixels: Pixels,
}

impl Picture {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ImageError`]: not readable, not a picture, too large, or damaged.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        Self::from_bytes(&bytes, &path.display().to_string())
    }

    /// Reads the contents of a file; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self, ImageError> {
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(ImageError::FileTooLarge {
                origin: origin.into(),
            });
        }
        let format = recognise(bytes).ok_or_else(|| ImageError::UnknownFormat {
            origin: origin.into(),
            found: describe_start(bytes),
        })?;
        // The decoders are tested against damaged files; should one panic all the same, that is
        // the file's fault and an error here.
        let decoded = catch_unwind(AssertUnwindSafe(|| decode(bytes, format)));
        let decoded =
            decoded.unwrap_or_else(|_| Err(Refusal::Damaged("the decoder failed".into())));
        let pixels = decoded.map_err(|refusal| match refusal {
            Refusal::Size {
                width,
                height,
                bytes,
            } => ImageError::Size {
                origin: origin.into(),
                width,
                height,
                bytes,
            },
            Refusal::Damaged(reason) => ImageError::Decode {
                origin: origin.into(),
                format: name(format),
                reason,
            },
        })?;
        Ok(Self {
            origin: origin.into(),
            pixels,
        })
    }

    /// The file, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Its pixels.
    pub fn pixels(&self) -> &Pixels {
        &self.pixels
    }
}

/// What [`ImageError`] says, without the file's name.
pub(super) enum Refusal {
    Size { width: u32, height: u32, bytes: u64 },
    Damaged(String),
}

impl From<image::ImageError> for Refusal {
    fn from(error: image::ImageError) -> Self {
        Self::Damaged(error.to_string())
    }
}

impl From<gif::DecodingError> for Refusal {
    fn from(error: gif::DecodingError) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// The formats, by how their files begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Png,
    Jpeg,
    WebP,
    Gif,
}

fn recognise(bytes: &[u8]) -> Option<Format> {
    match image::guess_format(bytes).ok()? {
        ImageFormat::Png => Some(Format::Png),
        ImageFormat::Jpeg => Some(Format::Jpeg),
        ImageFormat::WebP => Some(Format::WebP),
        ImageFormat::Gif => Some(Format::Gif),
        _ => None,
    }
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Png => "PNG",
        Format::Jpeg => "JPEG",
        Format::WebP => "WebP",
        Format::Gif => "GIF",
    }
}

/// The first bytes of something that is no picture.
fn describe_start(bytes: &[u8]) -> String {
    match &bytes[..bytes.len().min(12)] {
        [] => "an empty file".into(),
        start => format!("a file that begins with \"{}\"", start.escape_ascii()),
    }
}

/// Refuses sizes before memory is taken for them. `bytes`: what decoding takes.
pub(super) fn check_size(width: u32, height: u32, bytes: u64) -> Result<(), Refusal> {
    let sides = 1..=MAX_SIDE;
    if sides.contains(&width) && sides.contains(&height) && bytes <= MAX_DECODED_BYTES {
        return Ok(());
    }
    Err(Refusal::Size {
        width,
        height,
        bytes,
    })
}

fn decode(bytes: &[u8], format: Format) -> Result<Pixels, Refusal> {
    match format {
        Format::Gif => super::gif::decode(bytes),
        Format::Png => read(bytes, ImageFormat::Png, png_gray(bytes)),
        Format::WebP => read(bytes, ImageFormat::WebP, Gray16::HighByte),
        Format::Jpeg if jpeg_ends(bytes) => read(bytes, ImageFormat::Jpeg, Gray16::HighByte),
        Format::Jpeg => Err(Refusal::Damaged("the file ends inside the picture".into())),
    }
}

/// Reads a file with the decoders of the `image` crate.
fn read(bytes: &[u8], format: ImageFormat, gray: Gray16) -> Result<Pixels, Refusal> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder()?;

    let (width, height) = decoder.dimensions();
    let rgb_bytes = u64::from(width) * u64::from(height) * 3;
    check_size(width, height, decoder.total_bytes().max(rgb_bytes))?;
    Ok(Pixels {
        width: width as usize,
        height: height as usize,
        data: to_rgb(DynamicImage::from_decoder(decoder)?, gray)?,
    })
}

/// What 8 bits are made of 16 bits of gray.
#[derive(Clone, Copy)]
enum Gray16 {
    /// The high byte, as of colours.
    HighByte,
    /// The number itself, or 255 where it is larger.
    Cut,
}

/// A PNG file's kind of pixel is its 26th byte; 0 is gray without alpha. The decoder cannot say
/// it: gray with one transparent value arrives as gray with alpha.
fn png_gray(bytes: &[u8]) -> Gray16 {
    match bytes.get(25) {
        Some(0) => Gray16::Cut,
        _ => Gray16::HighByte,
    }
}

/// `[height, width, 3]` of whatever a decoder gives.
fn to_rgb(decoded: DynamicImage, gray: Gray16) -> Result<Vec<u8>, Refusal> {
    use DynamicImage as D;
    let high = |value: u16| (value >> 8) as u8;
    let gray16 = |value: u16| match gray {
        Gray16::HighByte => high(value),
        Gray16::Cut => value.min(255) as u8,
    };
    Ok(match decoded {
        D::ImageRgb8(image) => image.into_raw(),
        D::ImageRgba8(image) => (image.pixels()).flat_map(|p| [p[0], p[1], p[2]]).collect(),
        D::ImageLuma8(image) => image.pixels().flat_map(|p| [p[0]; 3]).collect(),
        D::ImageLumaA8(image) => image.pixels().flat_map(|p| [p[0]; 3]).collect(),
        D::ImageRgb16(image) => image.pixels().flat_map(|p| p.0.map(high)).collect(),
        D::ImageRgba16(image) => {
            let colours = image.pixels().flat_map(|p| [p[0], p[1], p[2]].map(high));
            colours.collect()
        }
        D::ImageLuma16(image) => image.pixels().flat_map(|p| [gray16(p[0]); 3]).collect(),
        D::ImageLumaA16(image) => image.pixels().flat_map(|p| [gray16(p[0]); 3]).collect(),
        other => {
            let kind = other.color();
            return Err(Refusal::Damaged(format!("pixels of kind {kind:?}")));
        }
    })
}

/// Whether a JPEG file has its end: the marker `FF D9` behind the picture. The decoder would fill
/// what is missing with gray.
///
/// Segments before the picture are stepped over by their length (a thumbnail inside one has an
/// end marker of its own); in the picture's data, `FF` is followed by `00` or a restart marker
/// where it is not a marker.
fn jpeg_ends(bytes: &[u8]) -> bool {
    const TEM: u8 = 0x01;
    const RST0: u8 = 0xD0;
    const SOI: u8 = 0xD8;
    const EOI: u8 = 0xD9;
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|&byte| byte == 0xFF) {
        rest = &rest[at + 1..];
        match *rest {
            [EOI, ..] => return true,
            // Fill bytes before a marker; the next round looks at them.
            [] | [0xFF, ..] => {}
            [0x00 | TEM | RST0..=SOI, ..] => rest = &rest[1..],
            [_, high, low, ..] => {
                let len = usize::from(u16::from_be_bytes([high, low]));
                rest = rest.get(1 + len..).unwrap_or_default();
            }
            [_, ..] => return false,
        }
    }
    false
}
