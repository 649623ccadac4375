//! Small files whole, and no more of them than is sensible.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// Most bytes read of a JSON file that describes a model; those in use have a few thousand.
pub const MAX_JSON_BYTES: u64 = 16 << 20;
/// Most bytes read of an index of shards: it names some hundreds or thousands of tensors.
pub const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The bytes of a file. A name may stand for a pipe or a device that has no end.
/// # Errors
/// Those of the system; [`ErrorKind::FileTooLarge`] for more than `limit` bytes.
pub fn read_at_most(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let message = format!("larger than {limit} bytes, the most that is read of such a file");
        return Err(io::Error::new(ErrorKind::FileTooLarge, message));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_as_is_allowed_and_no_more() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 9]).unwrap();
        assert_eq!(read_at_most(file.path(), 9).unwrap(), [7; 9]);
        let error = read_at_most(file.path(), 8).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        assert!(error.to_string().contains("larger than 8 bytes"));
        let missing = read_at_most(&file.path().join("x"), 8).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotADirectory);
    }
}
