//! A checkpoint: one safetensors file, or a folder of shards.

use super::{
    file::{self, Opened, inside, open, read_small, shown},
    header, index,
};
use crate::limits;
use indexmap::IndexMap;
use moec_ir::{Code, DType, Diagnostic};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type; none for types that no graph uses.
    pub dtype: Option<DType>,
    /// Element type as the file spells it.
    pub type_name: String,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Position of its file in [`Checkpoint::files`].
    pub file: usize,
    /// First byte in the file.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
}

/// Weights on disk, with every header checked.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<Opened>,
    tensors: IndexMap<String, TensorInfo>,
    metadata: IndexMap<String, String>,
}

impl Checkpoint {
    /// Opens a safetensors file, an index, or a folder with either.
    ///
    /// # Errors
    /// `E0301` to `E0313`: there are no weights, or they are not what they claim to be.
    pub fn open(path: &Path) -> Result<Self, Diagnostic> {
        refuse_foreign(path)?;
        if path.is_dir() {
            return Self::folder(path);
        }
        if path.to_string_lossy().ends_with(".index.json") {
            return Self::sharded(path.parent().unwrap_or(Path::new(".")), path);
        }
        let mut out = Self { files: Vec::new(), tensors: IndexMap::new(), metadata: IndexMap::new() };
        out.add(open(path)?, None)?;
        Ok(out)
    }

    fn folder(root: &Path) -> Result<Self, Diagnostic> {
        const INDEX: &str = "model.safetensors.index.json";
        const SINGLE: &str = "model.safetensors";
        if let Some(path) = inside(root, INDEX)? {
            return Self::sharded(root, &path);
        }
        let mut names = match inside(root, SINGLE)? {
            Some(_) => vec![SINGLE.to_owned()],
            None => listing(root, |name| name.ends_with(".safetensors"))?,
        };
        names.sort();
        if names.is_empty() {
            let pickles = listing(root, is_pickle)?;
            return Err(match pickles.first() {
                Some(name) => pickle(&root.join(name)),
                None => Diagnostic::error(Code("E0301"), format!("no weights in {}", shown(root)))
                    .help("expected model.safetensors, or model.safetensors.index.json with its shards"),
            });
        }
        let mut out = Self { files: Vec::new(), tensors: IndexMap::new(), metadata: IndexMap::new() };
        for name in names {
            if let Some(path) = inside(root, &name)? {
                out.add(open(&path)?, None)?;
            }
        }
        Ok(out)
    }

    fn sharded(root: &Path, index: &Path) -> Result<Self, Diagnostic> {
        let in_index = |mut error: Diagnostic| {
            error.file.get_or_insert_with(|| index.to_string_lossy().into_owned());
            error
        };
        // An index names up to a million tensors; it may be larger than a config.
        let bytes = read_small(index, limits::CONFIG_BYTES)?;
        let map = index::parse(&bytes).map_err(in_index)?;
        let shards: BTreeSet<&String> = map.values().collect();
        let mut found: Vec<(String, PathBuf)> = Vec::new();
        let mut missing: Vec<&str> = Vec::new();
        for shard in shards {
            match inside(root, shard).map_err(in_index)? {
                Some(path) => found.push((shard.clone(), path)),
                None => missing.push(shard),
            }
        }
        if !missing.is_empty() {
            let first = missing.iter().take(5).map(|s| crate::json::cut(s)).collect::<Vec<_>>().join(", ");
            let error = Diagnostic::error(
                Code("E0302"),
                format!("{} of {} shards are not there", missing.len(), missing.len() + found.len()),
            )
            .note(format!("missing: {first}{}", if missing.len() > 5 { ", .." } else { "" }));
            return Err(in_index(error.help("download the rest of the model")));
        }
        let mut out = Self { files: Vec::new(), tensors: IndexMap::new(), metadata: IndexMap::new() };
        for (shard, path) in found {
            refuse_foreign(&path)?;
            out.add(open(&path)?, Some((&shard, &map)))?;
        }
        Ok(out)
    }

    /// Adds the tensors of a file, and checks them against the index.
    fn add(&mut self, opened: Opened, index: Option<(&str, &IndexMap<String, String>)>) -> Result<(), Diagnostic> {
        let named = |mut error: Diagnostic| {
            error.file.get_or_insert_with(|| opened.shown.clone());
            error
        };
        let start = opened.read(0, usize::try_from(opened.bytes.min(64)).unwrap_or(64))?;
        let length = header::length(&start, opened.bytes).map_err(named)?;
        let text = opened.read(8, usize::try_from(length).unwrap_or(usize::MAX))?;
        let parsed = header::parse(&text, opened.bytes).map_err(named)?;
        let file = self.files.len();
        for (name, entry) in parsed.tensors {
            if let Some(other) = self.tensors.get(&name) {
                let error =
                    Diagnostic::error(Code("E0308"), format!("tensor {} stands in two files", crate::json::cut(&name)));
                return Err(named(error.note(format!("also in {}", self.files[other.file].shown))));
            }
            if let Some((shard, map)) = index
                && let Some(expected) = map.get(&name)
                && expected != shard
            {
                let error =
                    Diagnostic::error(Code("E0308"), format!("tensor {} stands in {shard}", crate::json::cut(&name)));
                return Err(named(error.note(format!("the index says {}", crate::json::cut(expected)))));
            }
            let info = TensorInfo {
                dtype: entry.dtype,
                type_name: entry.type_name,
                shape: entry.shape,
                file,
                offset: entry.offset,
                bytes: entry.bytes,
            };
            self.tensors.insert(name, info);
        }
        if let Some((shard, map)) = index
            && let Some((name, _)) = map.iter().find(|(name, s)| *s == shard && !self.tensors.contains_key(*name))
        {
            let error =
                Diagnostic::error(Code("E0303"), format!("tensor {} is not in {shard}", crate::json::cut(name)));
            return Err(named(error.help("the index and the shard belong to different downloads")));
        }
        if self.tensors.len() as u64 > limits::TENSORS {
            return Err(named(Diagnostic::error(Code("E0306"), format!("more than {} tensors", limits::TENSORS))));
        }
        self.metadata.extend(parsed.metadata);
        self.files.push(opened);
        Ok(())
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensors, file by file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Shapes of all tensors, to fit a form's layout to.
    pub fn shapes(&self) -> crate::Shapes {
        self.tensors.iter().map(|(name, info)| (name.clone(), info.shape.clone())).collect()
    }

    /// Free text that the writers left in the headers.
    pub fn metadata(&self) -> &IndexMap<String, String> {
        &self.metadata
    }

    /// Paths of the files.
    pub fn files(&self) -> Vec<&str> {
        self.files.iter().map(|f| f.shown.as_str()).collect()
    }

    /// Fills `out` with the bytes of a tensor from `start` on.
    ///
    /// # Errors
    /// `E0303` when there is no such tensor, or it ends before; `E0311` when the file has changed.
    pub fn read(&self, name: &str, start: u64, out: &mut [u8]) -> Result<(), Diagnostic> {
        let end = start.checked_add(out.len() as u64);
        let Some(info) = self.tensor(name).filter(|t| end.is_some_and(|end| end <= t.bytes)) else {
            let message = format!("no tensor {} with {} bytes from {start} on", crate::json::cut(name), out.len());
            return Err(Diagnostic::error(Code("E0303"), message));
        };
        self.files[info.file].fill(info.offset + start, out)
    }
}

/// Names of a folder's files that pass.
fn listing(root: &Path, wanted: fn(&str) -> bool) -> Result<Vec<String>, Diagnostic> {
    let fail =
        |error: std::io::Error| Diagnostic::error(Code("E0309"), format!("cannot read {}: {error}", shown(root)));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root).map_err(fail)? {
        if let Some(name) = entry.map_err(fail)?.file_name().to_str().filter(|n| wanted(n)) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn is_pickle(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    matches!(extension.as_str(), "bin" | "pt" | "pth" | "ckpt" | "pkl")
}

fn pickle(path: &Path) -> Diagnostic {
    let mut error =
        Diagnostic::error(Code("E0310"), format!("{} is a pickle, which can run code when it is opened", shown(path)));
    error.file = Some(path.to_string_lossy().into_owned());
    error.help("convert it to safetensors; moec never opens pickles")
}

/// Files that are refused by their name.
fn refuse_foreign(path: &Path) -> Result<(), Diagnostic> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
    if is_pickle(name) && !path.is_dir() {
        return Err(pickle(path));
    }
    if [".zip", ".tar", ".tar.gz", ".tgz", ".7z"].iter().any(|end| name.to_ascii_lowercase().ends_with(end))
        && !path.is_dir()
    {
        let mut error =
            Diagnostic::error(Code("E0313"), format!("{} is an archive; nothing was extracted", shown(path)));
        error.file = Some(path.to_string_lossy().into_owned());
        return Err(error.help("unpack it yourself and name the folder"));
    }
    Ok(())
}

/// Reads a small file whole, for configs and graphs.
///
/// # Errors
/// As opening a file.
pub(crate) fn small_file(path: &Path) -> Result<Vec<u8>, Diagnostic> {
    file::read_small(path, limits::CONFIG_BYTES)
}
