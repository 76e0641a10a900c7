//! Single outputs of `compile --emit`.

use crate::{context::Context, failure::Failure};
use moec::{
    Artefact, Keep, Target,
    ir::{self, nearest},
};
use std::path::{Path, PathBuf};

macro_rules! kinds {
    ($($variant:ident = $name:literal, $extension:literal: $about:literal;)*) => {
        /// Kinds of output.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kind { $(#[doc = $about] $variant,)* }

        impl Kind {
            /// All of them, in the order of `moec list emit`.
            pub(crate) const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Name on the command line.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it is, in a line.
            pub(crate) const fn about(self) -> &'static str {
                match self { $(Self::$variant => $about,)* }
            }

            const fn extension(self) -> &'static str {
                match self { $(Self::$variant => $extension,)* }
            }
        }
    };
}

kinds! {
    Manifest = "manifest", "json": "manifest of the artefact";
    Graph = "graph", "moe": "layers as IR text, before passes";
    Json = "graph-json", "json": "layers as a graph file (moec-graph-1)";
    Ir = "ir", "moe": "kernel ops as IR text, after passes";
    Mlir = "mlir", "mlir": "MLIR of the kernels";
    Llvm = "llvm", "ll": "LLVM IR, optimised";
    Asm = "asm", "s": "assembly of CPU code";
    Ptx = "ptx", "ptx": "PTX of GPU code";
    Cubin = "cubin", "cubin": "assembled GPU code; needs ptxas";
    Obj = "obj", "o": "object of CPU code";
    Lib = "lib", "a": "static library of this host's CPU code";
    Header = "header", "h": "C header of the library";
    Rust = "rust", "rs": "Rust declarations of the library";
    Dot = "dot", "dot": "kernel ops for Graphviz";
    Report = "report", "txt": "choices, schedules and times";
}

/// A kind with where it goes.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// What.
    pub kind: Kind,
    /// Where; `-` is stdout.
    pub path: Option<PathBuf>,
}

/// Reads the values of `--emit`.
pub(crate) fn requests(texts: &[String]) -> Result<Vec<Request>, Failure> {
    let one = |text: &String| {
        let (name, path) = text.split_once('=').map_or((text.as_str(), None), |(n, p)| (n, Some(p)));
        let kind = Kind::ALL.iter().copied().find(|k| k.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Kind::ALL.iter().map(|k| k.name()).collect();
            let near =
                nearest(name, known.iter().copied()).map_or_else(String::new, |n| format!("; the nearest is `{n}`"));
            Failure::Usage(format!("`--emit {name}` is not known: {}{near}", known.join(", ")))
        })?;
        Ok(Request { kind, path: path.filter(|p| !p.is_empty()).map(PathBuf::from) })
    };
    texts.iter().map(one).collect()
}

/// Texts that the compiler has to keep for these requests.
pub(crate) fn keep(requests: &[Request]) -> Keep {
    let wanted = |kind| requests.iter().any(|r| r.kind == kind);
    Keep { mlir: wanted(Kind::Mlir), llvm: wanted(Kind::Llvm), assembly: wanted(Kind::Asm) }
}

/// One output with the name of a file for it.
struct Piece {
    name: String,
    bytes: Vec<u8>,
}

/// The outputs of a kind.
fn pieces(artefact: &Artefact, kind: Kind) -> Result<Vec<Piece>, Failure> {
    let piece = |stem: &str, bytes: Vec<u8>| Piece { name: format!("{stem}.{}", kind.extension()), bytes };
    let per_form = |text: &dyn Fn(&moec::FormReport) -> String| {
        artefact.forms.iter().map(|f| piece(&f.name, text(f).into_bytes())).collect::<Vec<_>>()
    };
    let per_target = |text: &dyn Fn(&moec::TargetReport) -> Option<String>| {
        let targets = artefact.forms.iter().flat_map(|f| f.targets.iter().map(move |t| (f, t)));
        targets
            .filter_map(|(f, t)| Some(piece(&format!("{}.{}", f.name, t.target.name()), text(t)?.into_bytes())))
            .collect::<Vec<_>>()
    };
    let files = |wanted: &dyn Fn(&str) -> bool| {
        let files = artefact.files.iter().filter(|(name, _)| wanted(name));
        files
            .map(|(name, bytes)| {
                let name = Path::new(name).file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
                Piece { name, bytes: bytes.clone() }
            })
            .collect::<Vec<_>>()
    };
    let code = |gpu: bool| {
        let programs = artefact.manifest.programs.iter();
        let of_kind = programs.filter(|p| Target::from_name(&p.target).is_some_and(|t| t.is_gpu() == gpu));
        let codes: Vec<&str> = of_kind.map(|p| p.code.as_str()).collect();
        files(&|name| codes.contains(&name))
    };
    let ends = |end: &'static str| files(&|name| name.ends_with(end));
    Ok(match kind {
        Kind::Manifest => vec![Piece { name: "manifest.json".into(), bytes: artefact.manifest_json()?.into_bytes() }],
        Kind::Graph => per_form(&|f| ir::print(&f.graph)),
        Kind::Json => per_form(&|f| format!("{:#}\n", ir::json::write_graph(&f.graph))),
        Kind::Ir => per_form(&|f| ir::print(&f.kernels)),
        Kind::Dot => per_form(&|f| ir::dot(&f.kernels)),
        Kind::Report => per_form(&super::compile::report),
        Kind::Mlir => per_target(&|t| t.mlir.clone()),
        Kind::Llvm => per_target(&|t| t.llvm.clone()),
        Kind::Asm => per_target(&|t| t.assembly.clone()),
        Kind::Ptx => code(true),
        Kind::Obj => code(false),
        Kind::Cubin => ends(".cubin"),
        Kind::Lib => ends(".a"),
        Kind::Header => ends(".h"),
        Kind::Rust => ends(".rs"),
    })
}

/// Writes what was asked for: to the path, else into `folder`, else texts to stdout and the rest beside.
pub(crate) fn write(
    cx: &Context,
    artefact: &Artefact,
    requests: &[Request],
    folder: Option<&Path>,
) -> Result<(), Failure> {
    for request in requests {
        let pieces = pieces(artefact, request.kind)?;
        let name = request.kind.name();
        if pieces.is_empty() {
            let help = "the targets that were compiled have none; see --target, and `moec doctor` for ptxas";
            return Err(Failure::refused("E0403", format!("there is no {name} to write"), help));
        }
        let binary = matches!(request.kind, Kind::Cubin | Kind::Obj | Kind::Lib);
        match (&request.path, folder) {
            (Some(path), _) if path == Path::new("-") => stdout(cx, &pieces)?,
            (Some(path), _) => match pieces.as_slice() {
                [one] => file(cx, path, &one.bytes)?,
                many => {
                    let names: Vec<&str> = many.iter().map(|p| p.name.as_str()).collect();
                    return Err(Failure::Usage(format!(
                        "`--emit {name}=PATH` names one file for {} outputs: {}; choose one with --layer and --target",
                        many.len(),
                        names.join(", ")
                    )));
                }
            },
            (None, Some(folder)) => {
                for piece in &pieces {
                    file(cx, &folder.join(&piece.name), &piece.bytes)?;
                }
            }
            (None, None) if binary => {
                for piece in &pieces {
                    file(cx, Path::new(&piece.name), &piece.bytes)?;
                }
            }
            (None, None) => stdout(cx, &pieces)?,
        }
    }
    Ok(())
}

fn stdout(cx: &Context, pieces: &[Piece]) -> Result<(), Failure> {
    pieces.iter().try_for_each(|piece| cx.result(&piece.bytes))
}

fn file(cx: &Context, path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    moec::files::write(path, bytes)?;
    cx.say("Written", &format!("{} ({})", path.display(), super::compile::size(bytes.len() as u64)));
    Ok(())
}
