//! Files that commands read and write.

use super::signals::waiting;
use anyhow::{Context, Result, anyhow, bail};
use phidias::models::text::MAX_TEXT_BYTES;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The text of a file, or of a pipe by its name: somebody may be writing it, or nobody ever.
pub fn open_text(file: &Path) -> Result<String> {
    let name = file.display();
    waiting(|| read_text(File::open(file).with_context(|| name.to_string())?, name))
}

/// A whole text, from a file or a pipe that may have no end: as much as is encoded at once.
pub fn read_text(source: impl Read, name: impl std::fmt::Display) -> Result<String> {
    let mut bytes = Vec::new();
    source
        .take(MAX_TEXT_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(|| name.to_string())?;
    if bytes.len() > MAX_TEXT_BYTES {
        bail!("{name}: expected a text of at most {MAX_TEXT_BYTES} bytes, found more");
    }
    utf8(bytes, name)
}

/// Bytes as text, or where they are none.
pub fn utf8(bytes: Vec<u8>, name: impl std::fmt::Display) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow!("{name}: not UTF-8: the byte at {at} does not belong to a character")
    })
}

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
    let parent = parent.unwrap_or(Path::new("."));
    if !parent.exists() {
        let message = format!("no folder {}", parent.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    // The temporary name in the error would tell the user nothing.
    builder
        .tempfile_in(parent)
        .map_err(|error| error.kind().into())
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

/// Better said before anything is computed: whether `out` can be written, and is not what is read, one of
/// `inputs` or a file in the model's `folder`.
pub fn check_out(out: &Path, folder: Option<&Path>, inputs: &[PathBuf]) -> Result<()> {
    check_writable(out)?;
    // A file that is not there yet is no input.
    let Ok(place) = out.canonicalize() else {
        return Ok(());
    };
    let same = |other: &Path| other.canonicalize().is_ok_and(|other| other == place);
    if inputs.iter().any(|input| same(input)) {
        bail!(
            "{}: expected another file than the one that is read",
            out.display()
        );
    }
    let within = |folder: &Path| {
        folder
            .canonicalize()
            .is_ok_and(|f| place.parent() == Some(&f))
    };
    if folder.is_some_and(within) {
        bail!(
            "{}: expected a file that is not the model's own",
            out.display()
        );
    }
    Ok(())
}

/// Refuses a place where no file can be written; leaves nothing there.
pub fn check_writable(file: &Path) -> Result<()> {
    let written = if file.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else if is_device(file) {
        Ok(())
    } else {
        temporary_beside(file).map(drop)
    };
    written.with_context(|| file.display().to_string())
}
