//! Weights in another format than stored: kept in a cache, in memory, or written as a folder.

use crate::error::Error;
use crate::format::WeightFormat;
use crate::model::{OpenOptions, Source};
use crate::weights::Weights;
use phidias_engine::Cancel;
use phidias_engine::checkpoint::prepack::{Entry, Prepack, Treatment};
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::huge::HugeWriter;
use phidias_engine::machine::free_disk;
use phidias_engine::pool::Pool;
use std::path::Path;
use std::{fs, io};

/// A source smaller than this is quantized in memory at every start; a file would save nothing.
pub(crate) const CACHE_FROM_BYTES: usize = 32 << 20;

/// Weights in another format than stored: from the cache, into the cache, or in memory.
pub(crate) fn quantized(
    source: &Checkpoint,
    plan: &Prepack<'_>,
    format: WeightFormat,
    options: &mut OpenOptions<'_>,
    note: &mut Option<String>,
) -> Result<Checkpoint, Error> {
    let mut ignore = |_: usize, _: usize| {};
    let pool = Pool::new(options.threads)?;
    let progress: &mut dyn FnMut(usize, usize) = match &mut options.progress {
        Some(progress) => progress,
        None => &mut ignore,
    };
    if let Some(folder) = options
        .cache
        .as_deref()
        .filter(|_| source.bytes() >= CACHE_FROM_BYTES)
    {
        let Some(key) = source_key(source.path()) else {
            return in_memory(source, plan, &pool, &options.cancel, progress);
        };
        let file = folder.join(format!(
            "{key}-{format}-v{}.safetensors",
            phidias_engine::PACKED_VERSION
        ));
        // A cached file that is damaged, or is another's, is written again.
        if let Some(checkpoint) = (Checkpoint::open_file(&file).ok()).filter(|c| plan.describes(c))
        {
            *note = Some(format!("weights in {format} from {}", file.display()));
            return Ok(checkpoint);
        }
        match write_file(&file, plan, &pool, &options.cancel, progress) {
            Ok(()) => {
                *note = Some(format!("weights in {format} kept in {}", file.display()));
                return Ok(Checkpoint::open_file(&file)?);
            }
            Err(Error::Io { path, source })
            | Err(Error::Checkpoint(CheckpointError::Io { path, source })) => {
                *note = Some(format!(
                    "weights in {format} could not be kept for the next start: {}: {source}",
                    path.display()
                ));
            }
            Err(full @ Error::DiskSpace { .. }) => {
                *note = Some(format!(
                    "weights in {format} could not be kept for the next start: {full}"
                ));
            }
            Err(other) => return Err(other),
        }
    }
    in_memory(source, plan, &pool, &options.cancel, progress)
}

fn in_memory(
    source: &Checkpoint,
    plan: &Prepack<'_>,
    pool: &Pool,
    cancel: &Cancel,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Checkpoint, Error> {
    let bytes = plan.to_memory(pool, cancel, progress)?;
    Ok(Checkpoint::from_bytes(
        &source.path().to_string_lossy(),
        bytes,
    )?)
}

/// Refuses a file that the file system of `folder` has no room for.
fn check_room(folder: &Path, path: &Path, needed: u64) -> Result<(), Error> {
    match free_disk(folder) {
        Some(available) if available < needed => Err(Error::DiskSpace {
            path: path.to_owned(),
            needed,
            available,
        }),
        _ => Ok(()),
    }
}

/// Writes under a temporary name and renames: a reader sees the whole file or none. A disk without
/// room for it is refused before the first byte.
pub(crate) fn write_file(
    file: &Path,
    plan: &Prepack<'_>,
    pool: &Pool,
    cancel: &Cancel,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    let folder = file.parent().unwrap_or(Path::new("."));
    let io = |source| Error::Io {
        path: folder.to_owned(),
        source,
    };
    make_folder(folder)?;
    check_room(folder, file, plan.bytes() as u64)?;
    let mut temporary = not_private(tempfile::Builder::new().prefix(".quantizing-"), 0o666)
        .tempfile_in(folder)
        .map_err(unnamed)
        .map_err(io)?;
    let mut out = HugeWriter::new(temporary.as_file_mut());
    plan.write(&mut out, file, pool, cancel, progress)?;
    temporary.persist(file).map_err(|e| io(e.error))?;
    Ok(())
}

/// A folder, with those that it is in.
fn make_folder(folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(|source| Error::Io {
        path: folder.to_owned(),
        // A file that exists is what the system says here.
        source: match folder.is_file() {
            true => io::ErrorKind::NotADirectory.into(),
            false => source,
        },
    })
}

/// The error without the temporary name, which would tell the user nothing.
fn unnamed(error: io::Error) -> io::Error {
    error.kind().into()
}

/// Temporary files are private; this one becomes a model, which others may read where the user's
/// mask lets them.
fn not_private<'b>(
    builder: &'b mut tempfile::Builder<'static, 'static>,
    mode: u32,
) -> &'b mut tempfile::Builder<'static, 'static> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(mode))
    }
    #[cfg(not(unix))]
    {
        let _ = mode;
        builder
    }
}

/// Identity of the source: its place, and name, size and time of change of every weight file.
fn source_key(folder: &Path) -> Option<String> {
    // FNV-1a, 64 bits: the same in every build of the program, unlike the standard hasher.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    let folder = folder.canonicalize().ok()?;
    add(folder.as_os_str().as_encoded_bytes());
    let mut files: Vec<_> = fs::read_dir(&folder)
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()))
        .collect();
    files.sort();
    for file in files.iter().filter(|f| {
        f.extension()
            .is_some_and(|e| e == "safetensors" || e == "json")
    }) {
        let meta = fs::metadata(file).ok()?;
        let time = meta
            .modified()
            .ok()?
            .duration_since(std::time::UNIX_EPOCH)
            .ok()?;
        add(file.file_name()?.as_encoded_bytes());
        add(&meta.len().to_le_bytes());
        add(&time.as_nanos().to_le_bytes());
    }
    let name: String = (folder.file_name()?.to_string_lossy().chars())
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-._".contains(c) {
                c
            } else {
                '_'
            }
        })
        .take(64)
        .collect();
    Some(format!("{}-{hash:016x}", name.trim_start_matches('.')))
}

/// Writes `out` as a prepacked folder: the weights of `folder` in `format`, and the small files
/// beside them as they are. The folder appears whole or not at all.
/// # Errors
/// A folder that is there already, one that is packed already, a disk without room for it (before
/// anything is written) or that fills up meanwhile, cancellation.
pub fn quantize_folder(
    folder: &Path,
    out: &Path,
    format: WeightFormat,
    options: &mut OpenOptions<'_>,
) -> Result<(), Error> {
    let source = Source::open(folder)?;
    if let Some(found) = source.checkpoint.packed_format() {
        return Err(Error::AlreadyPacked {
            path: folder.to_owned(),
            found: found.name(),
        });
    }
    Weights::check(&source.config.specs(), &source.checkpoint)?;
    let keep = || {
        (source.config.specs())
            .into_iter()
            .map(|s| Entry {
                source: s.name.clone(),
                name: s.name,
                treatment: Treatment::Keep,
            })
            .collect()
    };
    let plan = Prepack::plan(
        &source.checkpoint,
        source.entries(format).unwrap_or_else(keep),
    )?;
    let mut ignore = |_: usize, _: usize| {};
    let progress: &mut dyn FnMut(usize, usize) = match &mut options.progress {
        Some(progress) => progress,
        None => &mut ignore,
    };
    let pool = Pool::new(options.threads)?;
    new_folder(out, |temporary| {
        write_file(
            &temporary.join(phidias_engine::checkpoint::SINGLE),
            &plan,
            &pool,
            &options.cancel,
            progress,
        )?;
        copy_small_files(folder, temporary)
    })
}

/// Fills a folder under a temporary name beside `out` and renames it.
/// # Errors
/// [`Error::Exists`], or what `fill` or the file system say; nothing is left then.
pub fn new_folder(out: &Path, fill: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let exists = || Error::Exists {
        path: out.to_owned(),
    };
    if out.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let io = |source| Error::Io {
        path: out.to_owned(),
        source,
    };
    make_folder(parent)?;
    let temporary = not_private(tempfile::Builder::new().prefix(".phidias-"), 0o777)
        .tempdir_in(parent)
        .map_err(unnamed)
        .map_err(io)?;
    // The temporary name would tell the user nothing.
    let final_name = |path: &Path| match path.strip_prefix(temporary.path()) {
        Ok(inside) if inside == Path::new("") => out.to_owned(),
        Ok(inside) => out.join(inside),
        Err(_) => path.to_owned(),
    };
    fill(temporary.path()).map_err(|error| match error {
        Error::DiskSpace {
            needed, available, ..
        } => Error::DiskSpace {
            path: out.to_owned(),
            needed,
            available,
        },
        Error::Io { path, source } | Error::Checkpoint(CheckpointError::Io { path, source }) => {
            Error::Io {
                path: final_name(&path),
                source,
            }
        }
        other => other,
    })?;
    fs::rename(temporary.path(), out).map_err(|error| match out.symlink_metadata() {
        // Another process was faster.
        Ok(_) => exists(),
        Err(_) => io(error),
    })?;
    // Renamed away: nothing is left to remove.
    let _ = temporary.keep();
    Ok(())
}

/// Configuration, tokenizer and licence files: everything small that is not weights.
fn copy_small_files(from: &Path, to: &Path) -> Result<(), Error> {
    const KINDS: [&str; 6] = ["json", "jinja", "model", "tiktoken", "md", "txt"];
    const LARGEST: u64 = 64 << 20;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    for entry in fs::read_dir(from).map_err(io(from))? {
        let path = entry.map_err(io(from))?.path();
        let meta = fs::metadata(&path).map_err(io(&path))?;
        let kind = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let Some(name) = path
            .file_name()
            .filter(|n| *n != phidias_engine::checkpoint::INDEX)
        else {
            continue;
        };
        if meta.is_file() && meta.len() <= LARGEST && (KINDS.contains(&kind) || name == "LICENSE") {
            let target = to.join(name);
            fs::copy(&path, &target).map_err(io(&target))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_come_along() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let names = |folder: &Path| {
            let entries = fs::read_dir(folder).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        for name in ["config.json", "model.safetensors", "model.py"] {
            fs::write(from.path().join(name), "{}").unwrap();
        }
        let vocabulary = vec![b'x'; 2 << 20];
        fs::write(from.path().join("cl100k_base.tiktoken"), &vocabulary).unwrap();
        copy_small_files(from.path(), to.path()).unwrap();
        assert_eq!(names(to.path()), ["cl100k_base.tiktoken", "config.json"]);
        assert!(fs::read(to.path().join("cl100k_base.tiktoken")).unwrap() == vocabulary);
    }

    #[test]
    fn a_folder_that_appears_meanwhile_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("out");
        let error = new_folder(&out, |temporary| {
            fs::write(temporary.join("model"), "late").unwrap();
            fs::create_dir(&out).unwrap();
            fs::write(out.join("model"), "first").unwrap();
            Ok(())
        });
        assert!(matches!(error, Err(Error::Exists { path }) if path == out));
        assert_eq!(fs::read_to_string(out.join("model")).unwrap(), "first");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn failures_name_the_folder_that_was_asked_for() {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("out");
        let error = new_folder(&out, |temporary| {
            Err(Error::Io {
                path: temporary.join("model.safetensors"),
                source: io::ErrorKind::StorageFull.into(),
            })
        });
        assert!(
            matches!(&error, Err(Error::Io { path, .. }) if *path == out.join("model.safetensors")),
            "{error:?}"
        );
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_without_room_is_refused_with_both_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        check_room(folder.path(), &file, 1).unwrap();
        let error = check_room(folder.path(), &file, u64::MAX).unwrap_err();
        assert!(
            matches!(&error, Error::DiskSpace { needed: u64::MAX, available, path }
                if *available > 0 && *path == file),
            "{error}"
        );
    }
}
