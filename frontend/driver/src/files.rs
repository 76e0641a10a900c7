//! Files that appear whole or not at all.
//!
//! Everything is written under another name beside its place and renamed at the end. What is unfinished is
//! known here, so that an interrupt can take it away.

use crate::Error;
use moec_ir::Code;
use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Paths that exist only until they are renamed.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Takes away what is unfinished: for a process that is about to end. Threads that write stop at their next step.
pub fn remove_unfinished() {
    let paths = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    for path in &*paths {
        // There is nobody to tell.
        let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    }
    // Never given back: nothing is written from here on.
    std::mem::forget(paths);
}

/// One change of what is on disk; an end of the process waits for it, or comes before it.
pub(crate) fn step<R>(change: impl FnOnce() -> R) -> R {
    let _unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    change()
}

/// What the system said, with our code.
pub(crate) fn failure(what: &str, path: &Path, error: &io::Error) -> Error {
    let kind = error.kind();
    let is = |kinds: &[io::ErrorKind]| kinds.contains(&kind);
    let (code, help) = if is(&[io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded]) {
        ("E0603", "make room, or name another folder")
    } else if is(&[io::ErrorKind::InvalidFilename]) {
        ("E0604", "choose a shorter path")
    } else if is(&[io::ErrorKind::NotFound]) {
        ("E0601", "create the folder above it first")
    } else if is(&[io::ErrorKind::NotADirectory]) {
        ("E0602", "a part of the path is a file; name another place")
    } else {
        ("E0601", "check the permissions, or name another folder")
    };
    Error::machine(Code(code), format!("cannot {what} {}: {error}", path.display()), help)
}

/// Refuses to replace what is no artefact.
pub(crate) fn replaceable(folder: &Path) -> Result<(), Error> {
    let refused =
        |what: &str, help: &str| Err(Error::machine(Code("E0602"), format!("{} {what}", folder.display()), help));
    match fs::metadata(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failure("write", folder, &error)),
        Ok(found) if !found.is_dir() => refused("is a file, an artefact is a folder", "name a folder"),
        Ok(_) if folder.join("manifest.json").is_file() => Ok(()),
        Ok(_) => {
            let mut entries = fs::read_dir(folder).map_err(|e| failure("read", folder, &e))?;
            if entries.next().is_none() {
                return Ok(());
            }
            refused("holds something else than an artefact", "name a new or empty folder")
        }
    }
}

/// Writes a file that is not there yet, down to the disk.
pub(crate) fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Writes or replaces one file.
///
/// # Errors
/// The system refuses; what was there is as before.
pub fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    if path.is_dir() {
        let message = format!("{} is a folder, a file is written", path.display());
        return Err(Error::machine(Code("E0602"), message, "name a file"));
    }
    let place = unfinished(path)?;
    let result = step(|| write_new(&place, content).and_then(|()| fs::rename(&place, path)))
        .map_err(|e| failure("write", path, &e));
    finished(&place);
    if result.is_err() {
        let _ = fs::remove_file(&place);
    }
    result
}

/// A name beside `path` that nobody uses.
fn unfinished(path: &Path) -> Result<PathBuf, Error> {
    let Some(name) = path.file_name() else {
        let message = format!("{} has no name to write to", path.display());
        return Err(Error::machine(Code("E0602"), message, "name a file or folder"));
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".moec-{}", std::process::id()));
    let place = path.with_file_name(hidden);
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).push(place.clone());
    Ok(place)
}

fn finished(place: &Path) {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|p| p != place);
}

/// A folder in the making, which goes when it is dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// A folder that can become `folder`.
    pub(crate) fn beside(folder: &Path) -> Result<Self, Error> {
        let place = unfinished(folder)?;
        let create = || {
            // A process of the same number may have died here.
            let _ = fs::remove_dir_all(&place);
            fs::create_dir(&place)
        };
        match step(create) {
            Ok(()) => Ok(Self(place)),
            Err(error) => {
                finished(&place);
                Err(failure("write", folder, &error))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Puts the folder where it belongs.
    pub(crate) fn replace(self, folder: &Path) -> Result<(), Error> {
        step(|| self.exchange(folder))
    }

    fn exchange(&self, folder: &Path) -> Result<(), Error> {
        let old = self.0.with_extension("old");
        // Another process may put its own there between the two steps: then once more.
        for _ in 0..100 {
            if folder.exists() {
                match fs::rename(folder, &old) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(failure("replace", folder, &error)),
                }
            }
            match fs::rename(&self.0, folder) {
                Ok(()) => {
                    let _ = fs::remove_dir_all(&old);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    let _ = fs::remove_dir_all(&old);
                }
                Err(error) => {
                    let _ = fs::rename(&old, folder);
                    return Err(failure("write", folder, &error));
                }
            }
        }
        let message = format!("{} is written by another process at the same time", folder.display());
        Err(Error::machine(Code("E0605"), message, "write to different folders, or one after the other"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        finished(&self.0);
    }
}
