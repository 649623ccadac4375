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
//! The pixels are those of the reference to the bit, but for JPEG: its standard leaves the last bit
//! of the arithmetic to the decoder, and `zune-jpeg` is not Pillow's `libjpeg-turbo`. Measured: at
//! most 4 steps of 256 apart, a fifth of a step on average where colours are stored at half size.

use super::Pixels;
use super::error::ImageError;
use crate::foreign::caught;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use std::fs::File;
use std::io::{Cursor, Read};
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
        // The decoders are tested against damaged files; one might panic all the same.
        let decoded = caught(|| decode(bytes, format))
            .unwrap_or_else(|| Err(Refusal::Damaged("the decoder failed".into())));
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
        Format::Png => {
            png_size(bytes)?;
            read(bytes, ImageFormat::Png, png_gray(bytes))
        }
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

/// The sizes of a PNG file lie behind its mark and the length and name of the first chunk. The decoder
/// refuses large ones by its limit, and does not say them.
fn png_size(bytes: &[u8]) -> Result<(), Refusal> {
    let number = |at| {
        bytes
            .get(at..)?
            .first_chunk()
            .map(|b| u32::from_be_bytes(*b))
    };
    match (number(16), number(20)) {
        (Some(width), Some(height)) => {
            let pixels = u64::from(width).saturating_mul(u64::from(height));
            check_size(width, height, pixels.saturating_mul(3))
        }
        _ => Ok(()), // too short for a picture, which the decoder says
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use image::codecs::webp::WebPEncoder;
    use proptest::prelude::*;

    /// A small file of each format, 20 x 13 pixels.
    fn samples() -> [(&'static str, Vec<u8>); 7] {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/pictures");
        let names = [
            "rgb16.png",
            "p4.png",
            "ss2.jpg",
            "prog.jpg",
            "rgb_ll.webp",
            "rgb_lossy.webp",
            "anim.gif",
        ];
        names.map(|name| (name, std::fs::read(format!("{folder}/{name}")).unwrap()))
    }

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        let picture = DynamicImage::new_luma8(width, height);
        picture.write_to(&mut file, ImageFormat::Png).unwrap();
        file.into_inner()
    }

    /// The checksum of a PNG chunk.
    fn crc(bytes: &[u8]) -> u32 {
        let step = |crc: u32, _| (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 };
        let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
        !bytes.iter().fold(!0, byte)
    }

    /// A PNG whose header claims another size.
    fn png_claiming(width: u32, height: u32) -> Vec<u8> {
        let mut file = png(1, 1);
        file[16..20].copy_from_slice(&width.to_be_bytes());
        file[20..24].copy_from_slice(&height.to_be_bytes());
        let sum = crc(&file[12..29]);
        file[29..33].copy_from_slice(&sum.to_be_bytes());
        file
    }

    fn refused(bytes: &[u8]) -> ImageError {
        Picture::from_bytes(bytes, "here").unwrap_err()
    }

    #[test]
    fn what_is_no_picture() {
        for (bytes, found) in [
            (&b""[..], "an empty file"),
            (
                b"Hello, this is text",
                "a file that begins with \"Hello, this \"",
            ),
            (b"\x00\xff", "a file that begins with \"\\x00\\xff\""),
            // A format that the library knows and this program does not read.
            (
                b"BM\0\0\0\0\0\0\0\0\0\0\0\0",
                "a file that begins with \"BM\\x00",
            ),
        ] {
            let error = refused(bytes).to_string();
            let expected =
                format!("here: expected a PNG, JPEG, WebP or GIF picture, found {found}");
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    /// The name says nothing.
    #[test]
    fn files_are_recognised_by_content() {
        let folder = tempfile::tempdir().unwrap();
        let [(_, png), .., (_, gif)] = samples();
        let path = folder.path().join("picture.gif");
        std::fs::write(&path, &png).unwrap();
        let opened = Picture::open(&path).unwrap();
        assert_eq!(opened.origin(), path.display().to_string());
        assert_eq!(
            opened.pixels(),
            Picture::from_bytes(&png, "").unwrap().pixels()
        );
        std::fs::write(&path, &gif).unwrap();
        assert!(Picture::open(&path).is_ok());
        std::fs::write(&path, "text").unwrap();
        let error = Picture::open(&path).unwrap_err();
        assert!(
            matches!(error, ImageError::UnknownFormat { origin, .. } if origin.ends_with("picture.gif"))
        );

        for path in [folder.path(), &folder.path().join("none.png")] {
            let error = Picture::open(path).unwrap_err();
            assert!(matches!(error, ImageError::Io { path: named, .. } if named == path));
        }
    }

    /// Every beginning of every file is an error or, where only the end is missing behind whole
    /// pixels, the same picture.
    #[test]
    fn truncated_files() {
        for (name, whole) in samples() {
            let picture = Picture::from_bytes(&whole, "here").unwrap();
            for len in 0..whole.len() {
                match Picture::from_bytes(&whole[..len], "here") {
                    Ok(cut) => assert_eq!(cut, picture, "{len} bytes of {name}"),
                    Err(ImageError::Decode { .. } | ImageError::UnknownFormat { .. }) => {}
                    Err(error) => panic!("{len} bytes of {name}: {error}"),
                }
            }
            // Half of a file is never enough, an animation apart.
            let half = Picture::from_bytes(&whole[..whole.len() / 2], "here");
            assert!(half.is_err() || name == "anim.gif", "{name}");
        }
    }

    #[test]
    fn sizes_are_refused_from_the_header() {
        for (width, height, bytes) in [
            (100_000, 100_000, 30_000_000_000u64),
            (65_536, 1, 196_608),
            (1, 65_536, 196_608),
            (20_000, 10_000, 600_000_000),
            ((1 << 31) - 1, (1 << 31) - 1, 13_835_058_042_397_261_827),
        ] {
            let error = refused(&png_claiming(width, height)).to_string();
            let expected = format!(
                "here: the header claims {width} x {height} pixels, {bytes} bytes once decoded; \
                 expected sides from 1 to 65535 and at most 536870912 bytes"
            );
            assert_eq!(error, expected);
        }
        // Within the limits, but not there.
        assert!(matches!(
            refused(&png_claiming(1000, 1000)),
            ImageError::Decode { .. }
        ));
        for size in [(0, 1), (1, 0), (0, 0)] {
            let error = refused(&png_claiming(size.0, size.1));
            assert!(
                matches!(error, ImageError::Decode { .. } | ImageError::Size { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn sizes_of_other_formats() {
        let [.., (_, jpeg), _, _, _, (_, gif)] = samples();
        // The frame header of a JPEG: FF C0, length, 8 bits, height, width.
        let mut large = jpeg;
        let frame = large
            .windows(2)
            .position(|m| m == [0xFF, 0xC0] || m == [0xFF, 0xC2]);
        let frame = frame.unwrap();
        large[frame + 5..frame + 9].fill(0xFF);
        let error = refused(&large);
        assert!(
            matches!(
                error,
                ImageError::Size {
                    width: 65_535,
                    height: 65_535,
                    ..
                }
            ),
            "{error}"
        );
        // The screen of a GIF.
        let mut large = gif;
        large[6..10].fill(0xFF);
        let error = refused(&large);
        assert!(
            matches!(
                error,
                ImageError::Size {
                    width: 65_535,
                    height: 65_535,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn lines_decode() {
        for (width, height) in [(1, 3000), (3000, 1), (1, 1)] {
            let picture = Picture::from_bytes(&png(width, height), "here").unwrap();
            let pixels = picture.pixels();
            assert_eq!(
                (pixels.width(), pixels.height()),
                (width as usize, height as usize)
            );
            let mut webp = Vec::new();
            let gray = vec![7; (width * height) as usize];
            let encoder = WebPEncoder::new_lossless(&mut webp);
            encoder
                .encode(&gray, width, height, image::ExtendedColorType::L8)
                .unwrap();
            let pixels = Picture::from_bytes(&webp, "here").unwrap();
            assert!(pixels.pixels().data().iter().all(|&v| v == 7));
        }
    }

    #[test]
    fn gif_without_a_picture() {
        // The decoder sees the end only where something follows it.
        let nothing = b"GIF89a\x02\0\x02\0\x80\0\0\0\0\0\xff\xff\xff;;";
        let error = refused(nothing).to_string();
        assert_eq!(error, "here: not a readable GIF picture: it has no frame");
        let error = refused(&nothing[..nothing.len() - 1]).to_string();
        assert!(
            error.starts_with("here: not a readable GIF picture: "),
            "{error}"
        );
        let empty_frame =
            b"GIF89a\x02\0\x02\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\0\0\x02\0\0\x02\0;";
        let error = refused(empty_frame).to_string();
        assert_eq!(
            error,
            "here: not a readable GIF picture: its first frame is 0 x 2 pixels"
        );
    }

    #[test]
    fn the_end_of_a_jpeg() {
        const SOI: &[u8] = &[0xFF, 0xD8];
        const EOI: &[u8] = &[0xFF, 0xD9];
        // A segment with a thumbnail's end in it, then data with stuffing, a restart and filling.
        let segment = [0xFF, 0xE1, 0, 6, 0xFF, 0xD9, 1, 2];
        let scan = [
            0xFF, 0xDA, 0, 2, 9, 0xFF, 0x00, 9, 0xFF, 0xD3, 9, 0xFF, 0xFF,
        ];
        let whole = [SOI, &segment, &scan, EOI].concat();
        assert!(jpeg_ends(&whole));
        assert!(jpeg_ends(&[&whole, &b"trailer"[..]].concat()));
        for len in 0..whole.len() {
            assert!(!jpeg_ends(&whole[..len]), "{len} bytes");
        }
        // A length that leads past the end.
        assert!(!jpeg_ends(&[SOI, &[0xFF, 0xE1, 0xFF, 0xFF], EOI].concat()));
    }

    proptest! {
        /// Damaged files give a picture or an error, and end.
        #[test]
        fn damaged_files(
            sample in 0usize..7,
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let (_, mut bytes) = samples()[sample].clone();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            match Picture::from_bytes(&bytes, "here") {
                Ok(picture) => {
                    let pixels = picture.pixels();
                    prop_assert_eq!(pixels.data().len(), pixels.width() * pixels.height() * 3);
                }
                Err(error) => prop_assert!(error.to_string().starts_with("here: "), "{}", error),
            }
        }
    }
}
