//! Opening files that a checkpoint names: inside its folder, regular, and unchanged.

use moec_ir::{Code, Diagnostic};
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// A file that was opened, and how it looked then.
#[derive(Debug)]
pub(super) struct Opened {
    file: File,
    /// Size when it was opened.
    pub(super) bytes: u64,
    stamp: Stamp,
    /// Path for messages.
    pub(super) shown: String,
}

/// What changes when a file is replaced or written.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    id: u64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let id = std::os::unix::fs::MetadataExt::ino(metadata);
        #[cfg(not(unix))]
        let id = 0;
        Self { bytes: metadata.len(), modified: metadata.modified().ok(), id }
    }
}

/// Text of a path for messages.
pub(super) fn shown(path: &Path) -> String {
    crate::json::cut(&path.to_string_lossy())
}

fn named(mut error: Diagnostic, path: &Path) -> Diagnostic {
    error.file = Some(path.to_string_lossy().into_owned());
    error
}

/// A name from an index: one plain file name.
///
/// # Errors
/// `E0307` for anything that could leave the folder.
pub(super) fn plain_name(name: &str) -> Result<(), Diagnostic> {
    const DEVICES: &[&str] = &["con", "prn", "aux", "nul"];
    let stem = name.split('.').next().unwrap_or("").to_ascii_lowercase();
    let device = DEVICES.contains(&stem.as_str())
        || (stem.len() == 4
            && (stem.starts_with("com") || stem.starts_with("lpt"))
            && stem.ends_with(|c: char| c.is_ascii_digit()));
    let bad = name.is_empty()
        || name.len() > 255
        || name == "."
        || name == ".."
        || device
        || name.contains(['/', '\\', ':'])
        || name.chars().any(char::is_control);
    if bad {
        return Err(Diagnostic::error(
            Code("E0307"),
            format!("the shard name \"{}\" is not a plain file name", crate::json::cut(name)),
        )
        .help("shards lie in the same folder as the index"));
    }
    Ok(())
}

/// The real path of a file of the folder `root`.
///
/// # Errors
/// `E0307` when a link leads out of the folder, except into the blobs of a model hub's cache.
pub(super) fn inside(root: &Path, name: &str) -> Result<Option<PathBuf>, Diagnostic> {
    plain_name(name)?;
    let path = root.join(name);
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => return Ok(None),
        Err(error) => {
            return Err(named(
                Diagnostic::error(Code("E0307"), format!("{} leads nowhere: {error}", shown(&path))),
                &path,
            ));
        }
    };
    let folder = root.canonicalize().map_err(|error| unreadable(root, &error))?;
    // A hub's cache: models--NAME/snapshots/REVISION/file -> ../../blobs/HASH.
    let blobs = folder.parent().and_then(Path::parent).map(|top| top.join("blobs"));
    let in_blobs =
        folder.parent().is_some_and(|p| p.ends_with("snapshots")) && blobs.is_some_and(|b| real.parent() == Some(&b));
    if real.starts_with(&folder) || in_blobs {
        return Ok(Some(real));
    }
    Err(named(
        Diagnostic::error(Code("E0307"), format!("{} is a link that leaves the folder", shown(&path)))
            .help("copy the file into the folder"),
        &path,
    ))
}

/// `E0309` and other reasons why a file is not read.
fn unreadable(path: &Path, error: &io::Error) -> Diagnostic {
    let code = if error.kind() == io::ErrorKind::NotFound { "E0301" } else { "E0309" };
    named(Diagnostic::error(Code(code), format!("cannot read {}: {error}", shown(path))), path)
}

/// Opens a regular file; pipes, sockets, devices and folders are refused without blocking.
///
/// # Errors
/// `E0309`, or `E0301` when there is no such file.
pub(super) fn open(path: &Path) -> Result<Opened, Diagnostic> {
    let regular = |metadata: &Metadata| {
        if metadata.is_file() {
            Ok(())
        } else {
            let what = if metadata.is_dir() { "a folder" } else { "not a regular file" };
            Err(named(Diagnostic::error(Code("E0309"), format!("{} is {what}", shown(path))), path))
        }
    };
    regular(&path.metadata().map_err(|e| unreadable(path, &e))?)?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(target_os = "linux")]
    {
        // O_NONBLOCK: should the path become a pipe in between, opening it does not wait.
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, 0o4000);
    }
    let file = options.open(path).map_err(|e| unreadable(path, &e))?;
    let metadata = file.metadata().map_err(|e| unreadable(path, &e))?;
    regular(&metadata)?;
    Ok(Opened { file, bytes: metadata.len(), stamp: Stamp::of(&metadata), shown: path.to_string_lossy().into_owned() })
}

impl Opened {
    fn changed(&self) -> Diagnostic {
        let message = format!("{} changed while it was read", crate::json::cut(&self.shown));
        let mut error = Diagnostic::error(Code("E0311"), message);
        error.file = Some(self.shown.clone());
        error.help("wait until nothing writes to it, and try again")
    }

    fn inside(&self, start: u64, len: usize) -> Result<(), Diagnostic> {
        let end = start.checked_add(len as u64).filter(|end| *end <= self.bytes);
        end.map(|_| ()).ok_or_else(|| self.changed())
    }

    /// Bytes `start .. start + len`.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    pub(super) fn read(&self, start: u64, len: usize) -> Result<Vec<u8>, Diagnostic> {
        self.inside(start, len)?;
        let mut bytes = vec![0; len];
        self.fill(start, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` with the bytes from `start` on.
    ///
    /// # Errors
    /// `E0311` when the file is not the one that was opened, `E0309` when it cannot be read.
    pub(super) fn fill(&self, start: u64, out: &mut [u8]) -> Result<(), Diagnostic> {
        self.inside(start, out.len())?;
        let fail = |error: io::Error| {
            let short = error.kind() == io::ErrorKind::UnexpectedEof;
            if short { self.changed() } else { unreadable(Path::new(&self.shown), &error) }
        };
        read_at(&self.file, out, start).map_err(fail)?;
        let now = self.file.metadata().map_err(fail)?;
        if Stamp::of(&now) != self.stamp {
            return Err(self.changed());
        }
        Ok(())
    }
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], start: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, start)
}

#[cfg(not(unix))]
fn read_at(file: &File, bytes: &mut [u8], start: u64) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(bytes)
}

/// All bytes of a small file, at most `most` and one more.
///
/// # Errors
/// `E0309`, `E0301` as [`open`].
pub(crate) fn read_small(path: &Path, most: u64) -> Result<Vec<u8>, Diagnostic> {
    let opened = open(path)?;
    let mut bytes = Vec::new();
    opened.file.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| unreadable(path, &e))?;
    Ok(bytes)
}
