//! The pictures of a folder, in the order of the numbers in their names.

use super::error::ImageError;
use std::cmp::Ordering;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Endings of names that are taken for pictures; what they hold is found out on reading.
const ENDINGS: [&str; 5] = ["png", "jpg", "jpeg", "webp", "gif"];

/// The pictures of a folder (not of folders in it): files that end in `.png`, `.jpg`, `.jpeg`,
/// `.webp` or `.gif` in either case and do not begin with a dot. `frame2` comes before `frame10`.
///
/// # Errors
/// [`ImageError::Io`]: not a folder, or not readable; [`ImageError::NoPictures`].
pub fn list(folder: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let failed = |source| ImageError::Io {
        path: folder.to_owned(),
        source,
    };
    let mut pictures = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if is_picture(&path) {
            pictures.push(path);
        }
    }
    if pictures.is_empty() {
        return Err(ImageError::NoPictures {
            path: folder.to_owned(),
        });
    }
    let name = |path: &PathBuf| {
        let name = path.file_name().unwrap_or(OsStr::new(""));
        name.to_string_lossy().into_owned()
    };
    pictures.sort_by(|a, b| natural(&name(a), &name(b)).then_with(|| a.cmp(b)));
    Ok(pictures)
}

fn is_picture(path: &Path) -> bool {
    let hidden = (path.file_name()).is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let ending = path.extension().and_then(OsStr::to_str).unwrap_or("");
    let known = ENDINGS
        .iter()
        .any(|known| ending.eq_ignore_ascii_case(known));
    known && !hidden && path.is_file()
}

/// Compares names with runs of digits as the numbers they are, of any length.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while !a.is_empty() && !b.is_empty() {
        let ((left, rest_a), (right, rest_b)) = (split_run(a), split_run(b));
        let order = match (number(left), number(right)) {
            // Without leading zeros the longer number is the larger one.
            (Some(x), Some(y)) => x.len().cmp(&y.len()).then_with(|| x.cmp(y)),
            _ => left.cmp(right),
        };
        if order.is_ne() {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
    a.len().cmp(&b.len())
}

/// Cuts off the first run of digits, or of anything else.
fn split_run(text: &str) -> (&str, &str) {
    let digits = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text.find(|c: char| c.is_ascii_digit() != digits);
    text.split_at(end.unwrap_or(text.len()))
}

/// The digits of a run without leading zeros.
fn number(run: &str) -> Option<&str> {
    let digits = run.starts_with(|c: char| c.is_ascii_digit());
    digits.then(|| run.trim_start_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn numbers_are_compared_as_numbers() {
        let long = format!("f{}", "9".repeat(50));
        let sorted = [
            "1", "01b", "2", "a", "f", "f2", "f002x", "f10", "f10-2", "f10-11", &long, "g1",
        ];
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!(natural(a, b), i.cmp(&j), "{a} and {b}");
            }
        }
    }

    #[test]
    fn only_pictures_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            list(dir.path()),
            Err(ImageError::NoPictures { path }) if path == dir.path()
        ));
        let names = [
            "frame10.png",
            "frame2.JPG",
            "frame1.jpeg",
            "notes.txt",
            ".frame0.png",
            "png",
            "frame3.webp",
            "frame4.GIF",
        ];
        for name in names {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("frame5.png")).unwrap();
        let listed = list(dir.path()).unwrap();
        let names: Vec<_> = listed.iter().map(|p| p.file_name().unwrap()).collect();
        assert_eq!(
            names,
            [
                "frame1.jpeg",
                "frame2.JPG",
                "frame3.webp",
                "frame4.GIF",
                "frame10.png"
            ]
        );
        let file = dir.path().join("notes.txt");
        assert!(matches!(list(&file), Err(ImageError::Io { path, .. }) if path == file));
    }
}
