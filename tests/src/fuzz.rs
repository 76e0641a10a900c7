//! Everything that reads what users give: whatever the bytes are, it answers and does not panic.

use crate::draw::Draw;
use moec_sim::{Arg, Launch, Memory, Module, Options};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A reader and what it reads.
pub struct Target {
    /// Name.
    pub name: &'static str,
    /// Reads bytes; what it answers does not matter.
    pub read: fn(&[u8]),
    /// What the paths of the files to start from contain.
    pub seeds: &'static [&'static str],
    /// What of a file to start from.
    part: fn(Vec<u8>) -> Vec<u8>,
}

/// All readers.
pub const TARGETS: [Target; 5] = [
    Target { name: "config", read: |bytes| model(bytes, "config.json"), seeds: &["/config.json"], part: |file| file },
    Target {
        name: "graph",
        read: |bytes| model(bytes, "layer.json"),
        seeds: &["systems/", ".json"],
        part: |file| file,
    },
    Target { name: "ir", read: |bytes| model(bytes, "layer.moe"), seeds: &[".moe"], part: |file| file },
    Target { name: "safetensors", read: tensors, seeds: &["goldens-systems/", ".safetensors"], part: |file| file },
    Target { name: "ptx", read: ptx, seeds: &["ptx-cases/", ".safetensors"], part: source },
];

/// Reads a model, and runs the passes over what is one.
fn model(bytes: &[u8], file: &str) {
    if let Ok(source) = moec::read::bytes(bytes, file) {
        for form in source.model.forms.iter().take(2) {
            let mut graph = form.graph.clone();
            moec::passes::run(&mut graph, false).expect("a valid graph stays valid");
        }
    }
}

fn tensors(bytes: &[u8]) {
    use moec::runtime::Tensors as _;
    if let Ok(file) = moec::runtime::SafetensorsBytes::new(bytes) {
        for name in file.names() {
            file.find(&name);
        }
    }
}

/// The PTX of a case.
fn source(file: Vec<u8>) -> Vec<u8> {
    let metadata = safetensors::SafeTensors::read_metadata(&file).ok();
    let fields = metadata.as_ref().and_then(|(_, m)| m.metadata().as_ref());
    fields.and_then(|m| m.get("ptx")).map_or(file.clone(), |ptx| ptx.clone().into_bytes())
}

/// What it refuses, it refuses with a line; what it takes, it runs a little of with whatever arguments fit.
fn ptx(bytes: &[u8]) {
    let Ok(module) = Module::parse(&String::from_utf8_lossy(bytes)) else { return };
    for entry in module.entries().iter().take(2) {
        let mut memory = Memory::new();
        let argument = |bytes: &u32| match bytes {
            8 => Arg::U64(memory.alloc(4096, 256)),
            n => Arg::Bytes(vec![1; *n as usize]),
        };
        let launch = Launch {
            entry: &entry.name,
            grid: [2, 1, 1],
            block: entry.required_block.unwrap_or([64, 1, 1]),
            cluster: [1; 3],
            dynamic_shared: 4096,
            dependent: false,
            args: entry.params.iter().map(argument).collect(),
        };
        let options = Options { max_instructions: 2000, ..Options::default() };
        let _ = moec_sim::launch(&module, &mut memory, &launch, &options);
    }
}

/// Makes bytes that are nearly right.
pub struct Spoiler {
    draw: Draw,
    seeds: Vec<Vec<u8>>,
}

impl Spoiler {
    /// Starts from the files of a target.
    pub fn new(target: &Target, seed: u64) -> Self {
        let mut files = Vec::new();
        walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../passes/tests"), &mut files);
        walk(Path::new(env!("CARGO_MANIFEST_DIR")), &mut files);
        let wanted = |path: &&PathBuf| {
            let path = path.to_string_lossy();
            target.seeds.iter().all(|part| path.contains(part))
        };
        let mut seeds: Vec<Vec<u8>> =
            files.iter().filter(wanted).filter_map(|p| fs::read(p).ok()).map(target.part).collect();
        seeds.retain(|s| s.len() < 1 << 17);
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        Self { draw: Draw(seed), seeds }
    }

    /// The next bytes: a seed with one to four changes.
    pub fn bytes(&mut self) -> Vec<u8> {
        /// What breaks readers.
        const WORDS: [&str; 24] = [
            "0",
            "-1",
            "1e999",
            "18446744073709551615",
            "9223372036854775808",
            "null",
            "true",
            "[",
            "{",
            "]",
            "}",
            "\"",
            "\\u0000",
            ",",
            ":",
            "T",
            "%x",
            "\"in\": [\"x\"]",
            "topk",
            "f32",
            "bf16",
            "(",
            ";",
            "\u{fffd}",
        ];
        let mut bytes = {
            let i = self.draw.place(self.seeds.len());
            self.seeds[i].clone()
        };
        for _ in 0..=self.draw.place(4) {
            let (at, len) = (self.draw.place(bytes.len()), 1 + self.draw.place(40));
            let end = (at + len).min(bytes.len());
            match self.draw.place(6) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.draw.place(8),
                1 => drop(bytes.drain(at..end)),
                2 => {
                    let part = bytes[at..end].to_vec();
                    let to = self.draw.place(bytes.len());
                    bytes.splice(to..to, part);
                }
                3 => {
                    let other = self.draw.place(self.seeds.len());
                    let from = self.draw.place(self.seeds[other].len());
                    let part: Vec<u8> = self.seeds[other].iter().skip(from).take(len * 4).copied().collect();
                    bytes.splice(at..end, part);
                }
                4 => {
                    // A number in the place of a number.
                    let digit = bytes.iter().skip(at).position(u8::is_ascii_digit).map(|i| at + i);
                    if let Some(start) = digit {
                        let digits = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
                        let word = WORDS[self.draw.place(5)];
                        bytes.splice(start..start + digits, word.bytes());
                    }
                }
                _ => {
                    let word = WORDS[self.draw.place(WORDS.len())];
                    bytes.splice(at..at, word.bytes());
                }
            }
        }
        bytes
    }
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() { walk(&path, files) } else { files.push(path) }
    }
}

/// Reads `count` draws; the first input at which the reader panics.
///
/// # Errors
/// The input and what was said.
pub fn run(target: &Target, seed: u64, count: usize) -> Result<(), String> {
    let mut spoiler = Spoiler::new(target, seed);
    for i in 0..count {
        let bytes = spoiler.bytes();
        if std::panic::catch_unwind(|| (target.read)(&bytes)).is_err() {
            let place = std::env::temp_dir().join(format!("moec-fuzz-{}-{seed}-{i}", target.name));
            fs::write(&place, &bytes).map_err(|e| e.to_string())?;
            return Err(format!("{} panics at {}", target.name, place.display()));
        }
    }
    Ok(())
}
