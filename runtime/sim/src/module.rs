//! Modules and their entries.

use crate::decode::decode;
use crate::op::Code;
use crate::{Error, parse};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A parsed and decoded PTX module.
#[derive(Debug)]
pub struct Module {
    code: Code,
    id: u64,
}

/// What a caller needs to know to launch an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EntryInfo {
    /// Name of the kernel.
    pub name: String,
    /// Size of each parameter in bytes.
    pub params: Vec<u32>,
    /// `.reqntid`, the block the kernel insists on.
    pub required_block: Option<[u32; 3]>,
    /// Most threads of a block, by `.maxntid`.
    pub max_threads: Option<u32>,
    /// `.reqnctapercluster`, the cluster the kernel insists on.
    pub required_cluster: Option<[u32; 3]>,
    /// Registers of a thread, estimated by liveness.
    pub registers: u32,
}

impl Module {
    /// Parses and decodes a module; every instruction in it must be known.
    ///
    /// # Errors
    ///
    /// [`Error::Parse`] and [`Error::Unsupported`], with the line.
    pub fn parse(ptx: &str) -> Result<Module, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let code = decode(parse::parse(ptx)?)?;
        Ok(Module { code, id: NEXT.fetch_add(1, Relaxed) })
    }

    /// The kernels of the module, in the order of the text.
    #[must_use]
    pub fn entries(&self) -> Vec<EntryInfo> {
        let code = &self.code;
        (0..code.funcs.len())
            .filter(|i| code.funcs[*i].is_entry && code.funcs[*i].has_body)
            .map(|i| {
                let f = &code.funcs[i];
                EntryInfo {
                    name: f.name.clone(),
                    params: f.params.iter().map(|p| p.1).collect(),
                    required_block: f.req_threads,
                    max_threads: f.max_threads,
                    required_cluster: f.req_cluster,
                    registers: crate::counts::registers(code, i),
                }
            })
            .collect()
    }

    /// The target the module was made for, such as `sm_90a`.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.code.target
    }

    pub(crate) fn code(&self) -> &Code {
        &self.code
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}
