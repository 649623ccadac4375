//! Files that commands write.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// A file under a temporary name beside `file`, to be renamed to it, so that a reader sees the whole
/// file or none. Not private, as temporary files are otherwise: the user's mask decides.
pub fn temporary_beside(file: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".phidias-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let parent = file.parent().filter(|p| !p.as_os_str().is_empty());
    builder.tempfile_in(parent.unwrap_or(Path::new(".")))
}

/// Whether `file` is a pipe or a device: it is written to, since renaming over it would replace it.
pub fn is_device(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|m| !m.is_file())
}

/// Writes a whole file.
pub fn write(file: &Path, bytes: &[u8]) -> io::Result<()> {
    if is_device(file) {
        return OpenOptions::new().write(true).open(file)?.write_all(bytes);
    }
    let mut temporary = temporary_beside(file)?;
    temporary.write_all(bytes)?;
    temporary.persist(file)?;
    Ok(())
}

/// Whether a file can be written there; leaves nothing.
pub fn check_writable(file: &Path) -> io::Result<()> {
    if is_device(file) {
        return Ok(());
    }
    temporary_beside(file).map(|_| ())
}
