//! Why a picture is not taken.

use super::decode::{MAX_DECODED_BYTES, MAX_FILE_BYTES, MAX_SIDE};
use super::layout::{MAX_CROPS, TooNarrow};
use std::path::PathBuf;

/// Why a picture, or a folder of pictures, is not taken. `origin` is its file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum ImageError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{origin}: larger than {MAX_FILE_BYTES} bytes, the most that is read of a picture")]
    FileTooLarge { origin: String },
    #[error("{origin}: expected a PNG, JPEG, WebP or GIF picture, found {found}")]
    UnknownFormat { origin: String, found: String },
    #[error(
        "{origin}: the header claims {width} x {height} pixels, {bytes} bytes once decoded; \
         expected sides from 1 to {MAX_SIDE} and at most {MAX_DECODED_BYTES} bytes"
    )]
    Size {
        origin: String,
        width: u32,
        height: u32,
        bytes: u64,
    },
    #[error("{origin}: not a readable {format} picture: {reason}")]
    Decode {
        origin: String,
        format: &'static str,
        reason: String,
    },
    #[error("{origin}: {sizes}")]
    TooNarrow { origin: String, sizes: TooNarrow },
    #[error("num_crops is {found}, expected 1 to {MAX_CROPS}")]
    NumCrops { found: usize },
    #[error("{}: expected a folder with PNG, JPEG, WebP or GIF pictures, found none", path.display())]
    NoPictures { path: PathBuf },
}
