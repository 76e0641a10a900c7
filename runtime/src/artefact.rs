//! The folder that a compilation leaves: manifest and code.

use crate::{
    device::{Device, Files},
    error::{Code, Result, RuntimeError},
};
use moec_abi::{Manifest, Program, SCHEMA};
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

/// Where the files of an artefact are.
#[derive(Clone)]
enum Store {
    Folder(PathBuf),
    Memory(Arc<BTreeMap<String, Vec<u8>>>),
}

/// A manifest with its files.
pub struct Artefact {
    manifest: Manifest,
    store: Store,
}

/// Which program serves a layer on a device, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index into [`Manifest::programs`].
    pub program: usize,
    /// One line for each program that was considered, the chosen one first.
    pub reasons: Vec<String>,
}

impl Artefact {
    /// Reads the manifest of an artefact folder.
    ///
    /// # Errors
    /// The folder or its manifest cannot be read, or was made for a newer runtime.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("manifest.json");
        let text = std::fs::read(&path).map_err(|e| {
            RuntimeError::file("read", &path, &e).with_help("name a folder that `moec compile -o` has written")
        })?;
        let bad = |e: serde_json::Error| RuntimeError::new(Code::Artefact, format!("{}: {e}", path.display()));
        // The version first: a newer form need not parse as this one.
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(bad)?;
        let schema = value.get("schema").and_then(serde_json::Value::as_u64);
        if schema.is_some_and(|schema| schema > u64::from(SCHEMA)) {
            return Err(newer(schema.unwrap_or(0)));
        }
        let manifest = serde_json::from_value(value).map_err(bad)?;
        Self::new(manifest, Store::Folder(folder.to_owned()))
    }

    /// An artefact that was never written: the manifest, and its files by relative name.
    ///
    /// # Errors
    /// The manifest was made for a newer runtime.
    pub fn in_memory(manifest: Manifest, files: BTreeMap<String, Vec<u8>>) -> Result<Self> {
        Self::new(manifest, Store::Memory(Arc::new(files)))
    }

    fn new(manifest: Manifest, store: Store) -> Result<Self> {
        if manifest.schema > SCHEMA {
            return Err(newer(u64::from(manifest.schema)));
        }
        Ok(Self { manifest, store })
    }

    /// The manifest.
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The same files with only the programs of this name.
    pub(crate) fn only(&self, name: &str) -> Self {
        let mut manifest = self.manifest.clone();
        manifest.programs.retain(|p| p.name == name);
        Self { manifest, store: self.store.clone() }
    }

    /// Program `index`.
    ///
    /// # Errors
    /// There is no such program.
    pub fn program(&self, index: usize) -> Result<&Program> {
        let none = || RuntimeError::new(Code::Artefact, format!("the artefact has no program {index}"));
        self.manifest.programs.get(index).ok_or_else(none)
    }

    /// The best program for `layer` on `device`.
    ///
    /// # Errors
    /// No program serves the layer, or none of those runs on the device; the error lists what is inside.
    pub fn choose(&self, layer: u64, device: &dyn Device) -> Result<Choice> {
        let serving: Vec<(usize, &Program)> =
            self.manifest.programs.iter().enumerate().filter(|(_, p)| p.layers.contains(&layer)).collect();
        if serving.is_empty() {
            let mut layers: Vec<String> =
                self.manifest.programs.iter().flat_map(|p| &p.layers).map(u64::to_string).collect();
            layers.sort();
            layers.dedup();
            return Err(RuntimeError::new(Code::Artefact, format!("the artefact has no layer {layer}"))
                .with_help(format!("it has the layers {}", layers.join(", "))));
        }
        let mut best: Option<(u32, usize, String)> = None;
        let mut reasons = Vec::new();
        for (index, program) in &serving {
            match device.runs(&program.target) {
                Ok(()) => {
                    let rank = device.rank(&program.target);
                    let line = format!("{} ({})", program.target, program.name);
                    match &mut best {
                        Some((known, _, taken)) if *known >= rank => {
                            reasons.push(format!("{line}: not taken, {taken} is better"));
                        }
                        Some(known) => {
                            reasons.push(format!("{}: not taken, {line} is better", known.2));
                            *known = (rank, *index, line);
                        }
                        None => best = Some((rank, *index, line)),
                    }
                }
                Err(why) => reasons.push(format!("{} ({}): does not run here, {why}", program.target, program.name)),
            }
        }
        match best {
            Some((_, program, line)) => {
                reasons.insert(0, format!("{line}: taken, the best that {} runs", device.name()));
                Ok(Choice { program, reasons })
            }
            None => {
                let message = format!("no code for device {} in the artefact: {}", device.name(), reasons.join("; "));
                Err(RuntimeError::new(Code::Target, message)
                    .with_help("compile again with --target for this device, or choose another --device"))
            }
        }
    }

    /// [`choose`](Self::choose) as text, a line for each program that was considered.
    ///
    /// # Errors
    /// As for `choose`.
    pub fn describe_choice(&self, layer: u64, device: &dyn Device) -> Result<String> {
        Ok(self.choose(layer, device)?.reasons.join("\n"))
    }
}

fn newer(schema: u64) -> RuntimeError {
    let message = format!("the artefact has form {schema}, this runtime reads up to {SCHEMA}");
    RuntimeError::new(Code::Artefact, message).with_help("use a newer moec, or compile again with this one")
}

impl Files for Artefact {
    fn read(&self, name: &str) -> Result<Vec<u8>> {
        match &self.store {
            Store::Memory(files) => files
                .get(name)
                .cloned()
                .ok_or_else(|| RuntimeError::new(Code::Artefact, format!("the artefact has no file {name}"))),
            Store::Folder(folder) => {
                if !Path::new(name).components().all(|c| matches!(c, Component::Normal(_))) {
                    let message = format!("the manifest names {name}, which is not inside the artefact");
                    return Err(RuntimeError::new(Code::Artefact, message));
                }
                let path = folder.join(name);
                std::fs::read(&path).map_err(|e| RuntimeError::file("read", &path, &e))
            }
        }
    }
}
