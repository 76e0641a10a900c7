//! The static library and headers of an artefact's CPU programs.
//!
//! For each layer form the library holds every CPU variant as a library of its own (kernels, encoded program,
//! launcher) under its own prefix, and a chooser with the form's names in front. Symbols carry a hash of the code,
//! so that two builds of a model link into one program; the header gives them their plain names.

use crate::Error;
use ar_archive_writer::{ArchiveKind, DEFAULT_OBJECT_READER, NewArchiveMember, write_archive_to_stream};
use moec_abi::{Program, embed, header};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, RelocationKind, SectionKind, SymbolFlags, SymbolKind,
    SymbolScope,
    write::{Object, Relocation, StandardSection, Symbol, SymbolId, SymbolSection},
};
use sha2::{Digest, Sha256};
use std::{fmt::Write as _, io::Cursor};

/// The launcher, compiled by the build script.
const LAUNCH: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/launch.o"));
/// The chooser, compiled by the build script.
const CHOOSE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/choose.o"));

/// Functions of a library, in the order of the chooser's table.
const FUNCTIONS: [&str; 10] = [
    "create",
    "destroy",
    "max_tokens",
    "workspace_bytes",
    "weights_bytes",
    "pack_begin",
    "pack",
    "bind",
    "launch",
    "status_text",
];

/// A form's program for one CPU target, with its object.
pub(crate) struct Variant<'a> {
    pub(crate) program: &'a Program,
    pub(crate) object: &'a [u8],
}

/// A member of an archive.
pub(crate) struct Member {
    name: String,
    bytes: Vec<u8>,
}

/// What a form contributes.
pub(crate) struct FormLibrary {
    /// Objects of the form.
    pub(crate) members: Vec<Member>,
    /// Its C header.
    pub(crate) header: String,
    /// Its Rust declarations.
    pub(crate) rust: String,
}

fn internal(what: impl std::fmt::Display) -> Error {
    Error::Internal(format!("writing the library: {what}"))
}

/// The objects and the header of a form; variants come best first.
pub(crate) fn form(variants: &[Variant<'_>]) -> Result<FormLibrary, Error> {
    let Some(best) = variants.first() else { return Err(internal("a form without CPU code")) };
    let words =
        variants.iter().map(|v| moec_abi::encode(v.program)).collect::<Result<Vec<_>, _>>().map_err(internal)?;
    let mut hash = Sha256::new();
    for (variant, words) in variants.iter().zip(&words) {
        words.iter().for_each(|w| hash.update(w.to_le_bytes()));
        hash.update(variant.object);
    }
    let digest: String = hash.finalize().iter().take(4).map(|b| format!("{b:02x}")).collect();
    let name = &best.program.name;
    let base = format!("{name}_{digest}");
    let mut members = Vec::new();
    let mut prefixes = Vec::new();
    for (variant, words) in variants.iter().zip(&words) {
        let prefix = format!("{base}_{}", variant.program.target.replace('-', "_"));
        let mut put = |what: &str, bytes: Vec<u8>| members.push(Member { name: format!("{prefix}.{what}.o"), bytes });
        put("kernels", embed::rename(variant.object, &prefix).map_err(internal)?);
        put("launch", embed::rename(LAUNCH, &prefix).map_err(internal)?);
        put("program", program_object(&prefix, variant.program, words)?);
        prefixes.push((prefix, moec_abi::cpu_level(&variant.program.target)));
    }
    let mut put = |what: &str, bytes: Vec<u8>| members.push(Member { name: format!("{base}.{what}.o"), bytes });
    put("choose", embed::rename(CHOOSE, &base).map_err(internal)?);
    put("variants", variants_object(&base, &prefixes)?);
    Ok(FormLibrary { members, header: plain_names(&header_text(variants), name, &base), rust: rust(name, &base) })
}

/// An archive of members, as `ar` would write it.
pub(crate) fn archive(members: &[Member]) -> Result<Vec<u8>, Error> {
    let members: Vec<NewArchiveMember<'_>> = members
        .iter()
        .map(|m| NewArchiveMember::new(m.bytes.as_slice(), &DEFAULT_OBJECT_READER, m.name.clone()))
        .collect();
    let mut out = Cursor::new(Vec::new());
    write_archive_to_stream(&mut out, &members, ArchiveKind::Gnu, false, None).map_err(internal)?;
    Ok(out.into_inner())
}

/// Data with addresses of functions, for the host's architecture.
struct DataObject(Object<'static>);

impl DataObject {
    fn new() -> Self {
        let architecture = if cfg!(target_arch = "aarch64") { Architecture::Aarch64 } else { Architecture::X86_64 };
        let mut object = Object::new(BinaryFormat::Elf, architecture, Endianness::Little);
        // Nothing here is code; without this section linkers assume an executable stack.
        object.add_section(Vec::new(), b".note.GNU-stack".to_vec(), SectionKind::Other);
        Self(object)
    }

    fn symbol(&mut self, name: &str, kind: SymbolKind, section: SymbolSection) -> SymbolId {
        self.0.add_symbol(Symbol {
            name: name.as_bytes().to_vec(),
            value: 0,
            size: 0,
            kind,
            scope: SymbolScope::Linkage,
            weak: false,
            section,
            flags: SymbolFlags::None,
        })
    }

    /// Constant words under a name.
    fn words(&mut self, name: &str, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let section = self.0.section_id(StandardSection::ReadOnlyData);
        let symbol = self.symbol(name, SymbolKind::Data, SymbolSection::Undefined);
        self.0.add_symbol_data(symbol, section, &bytes, 8);
    }

    /// Constant words under a name, of which some are addresses of functions.
    fn table(&mut self, name: &str, entries: &[Entry<'_>]) -> Result<(), Error> {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|e| match e {
                Entry::Word(word) => word.to_le_bytes(),
                Entry::Function(_) => [0; 8],
            })
            .collect();
        let section = self.0.section_id(StandardSection::ReadOnlyDataWithRel);
        let symbol = self.symbol(name, SymbolKind::Data, SymbolSection::Undefined);
        let start = self.0.add_symbol_data(symbol, section, &bytes, 8);
        for (i, entry) in entries.iter().enumerate() {
            let Entry::Function(function) = entry else { continue };
            let known = self.0.symbol_id(function.as_bytes());
            let symbol = known.unwrap_or_else(|| self.symbol(function, SymbolKind::Text, SymbolSection::Undefined));
            let flags = RelocationFlags::Generic {
                kind: RelocationKind::Absolute,
                encoding: object::RelocationEncoding::Generic,
                size: 64,
            };
            let relocation = Relocation { offset: start + 8 * i as u64, symbol, addend: 0, flags };
            self.0.add_relocation(section, relocation).map_err(internal)?;
        }
        Ok(())
    }

    fn finish(&self) -> Result<Vec<u8>, Error> {
        self.0.write().map_err(internal)
    }
}

enum Entry<'a> {
    Word(u64),
    Function(&'a str),
}

/// The encoded program and the table of its kernels.
fn program_object(prefix: &str, program: &Program, words: &[u64]) -> Result<Vec<u8>, Error> {
    let mut object = DataObject::new();
    object.words(&format!("{prefix}_program"), words);
    let kernels: Vec<String> = program.launches.iter().map(|l| format!("{prefix}_{}", l.symbol)).collect();
    let entries: Vec<Entry<'_>> = kernels.iter().map(|k| Entry::Function(k)).collect();
    object.table(&format!("{prefix}_kernels"), &entries)?;
    object.finish()
}

/// The chooser's table.
fn variants_object(base: &str, prefixes: &[(String, u64)]) -> Result<Vec<u8>, Error> {
    let names: Vec<(u64, Vec<String>)> = prefixes
        .iter()
        .map(|(prefix, level)| (*level, FUNCTIONS.iter().map(|f| format!("{prefix}_{f}")).collect()))
        .collect();
    let entries: Vec<Entry<'_>> = names
        .iter()
        .flat_map(|(level, functions)| {
            std::iter::once(Entry::Word(*level)).chain(functions.iter().map(|f| Entry::Function(f)))
        })
        .collect();
    let mut object = DataObject::new();
    object.words(&format!("{base}_variant_count"), &[prefixes.len() as u64]);
    object.table(&format!("{base}_variants"), &entries)?;
    object.finish()
}

/// The header of the form, for all variants.
fn header_text(variants: &[Variant<'_>]) -> String {
    let targets: Vec<&str> = variants.iter().map(|v| v.program.target.as_str()).collect();
    let Some(mut program) = variants.first().map(|v| v.program.clone()) else { return String::new() };
    program.max_tokens = variants.iter().map(|v| v.program.max_tokens).min().unwrap_or(0);
    program.target = match targets.as_slice() {
        [one] => (*one).to_owned(),
        many => format!("{} (the first that the processor runs)", many.join(", ")),
    };
    header::header(&program)
}

/// Gives the hashed symbols their plain names in a header.
fn plain_names(header: &str, name: &str, base: &str) -> String {
    let mut names =
        "\n/* Symbols carry a hash of the code, so that two builds of a model link into one program. */\n".to_owned();
    for function in FUNCTIONS {
        let _ = writeln!(names, "#define {name}_{function} {base}_{function}");
    }
    let guard = format!("#define {}_H\n", name.to_uppercase());
    header.replacen(&guard, &format!("{guard}{names}"), 1)
}

/// Declarations for Rust hosts.
fn rust(name: &str, base: &str) -> String {
    let mut out = format!(
        "//! `{name}`: declarations of the C library; what each function does stands in `{name}.h`.\n\
         //!\n//! Link with `-l static={name}`, as a `build.rs` or `#[link]` does.\n\n\
         use core::ffi::{{c_char, c_int, c_void}};\n\n\
         /// Threads and bound weights.\n#[repr(C)]\npub struct Handle {{\n    _private: [u8; 0],\n}}\n\n\
         /// A checkpoint tensor in memory.\n#[repr(C)]\npub struct Tensor {{\n    pub data: *const c_void,\n    \
         pub dtype: u32,\n    pub rank: u32,\n    pub shape: *const u64,\n}}\n\nunsafe extern \"C\" {{\n"
    );
    let signatures = [
        "(threads: u32, handle: *mut *mut Handle) -> c_int",
        "(handle: *mut Handle)",
        "() -> u64",
        "(tokens: u64) -> u64",
        "() -> u64",
        "(weights: *mut c_void, weights_bytes: u64) -> c_int",
        "(slot: u64, tensors: *const Tensor, count: u64, weights: *mut c_void, weights_bytes: u64) -> c_int",
        "(handle: *mut Handle, weights: *const c_void, weights_bytes: u64) -> c_int",
        "(handle: *mut Handle, tokens: u64, io: *const *mut c_void, workspace: *mut c_void, workspace_bytes: u64, \
         stream: *mut c_void) -> c_int",
        "(status: c_int) -> *const c_char",
    ];
    for (function, signature) in FUNCTIONS.iter().zip(signatures) {
        let _ = writeln!(out, "    #[link_name = \"{base}_{function}\"]\n    pub fn {function}{signature};");
    }
    out.push_str("}\n");
    out
}
