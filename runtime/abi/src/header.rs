//! The C header of a generated library.

use crate::{BufferKind, DType, Expr, Program, Slot, View, dtype_number};
use std::fmt::Write;

/// C spelling of a size: what a reader of the header computes.
fn size(expr: &Expr) -> String {
    match expr {
        Expr::Const(value) => value.to_string(),
        Expr::Tokens => "tokens".into(),
        Expr::Add(a, b) => format!("({} + {})", size(a), size(b)),
        Expr::Mul(a, b) => format!("{} * {}", size(a), size(b)),
        Expr::CeilDiv(a, d) => format!("ceil({} / {d})", size(a)),
        Expr::Min(a, b) => format!("min({}, {})", size(a), size(b)),
        Expr::Max(a, b) => format!("max({}, {})", size(a), size(b)),
    }
}

const fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        DType::F8e4m3 => "float8 e4m3",
        DType::F8e5m2 => "float8 e5m2",
        DType::U8 => "uint8",
        DType::I8 => "int8",
        DType::I32 => "int32",
        DType::I64 => "int64",
    }
}

/// A C identifier made of a name; keywords and taken names get a trailing underscore.
fn identifier(name: &str, taken: &mut Vec<String>) -> String {
    const KEYWORDS: &[&str] = &[
        "auto",
        "bool",
        "break",
        "case",
        "catch",
        "char",
        "class",
        "const",
        "continue",
        "default",
        "delete",
        "do",
        "double",
        "else",
        "enum",
        "explicit",
        "export",
        "extern",
        "false",
        "float",
        "for",
        "friend",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "mutable",
        "namespace",
        "new",
        "operator",
        "private",
        "protected",
        "public",
        "register",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "template",
        "this",
        "throw",
        "true",
        "try",
        "typedef",
        "typename",
        "union",
        "unsigned",
        "using",
        "virtual",
        "void",
        "volatile",
        "while",
    ];
    let mut out: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if out.is_empty() || out.starts_with(|c: char| c.is_ascii_digit()) {
        out.insert(0, 'x');
    }
    while KEYWORDS.contains(&out.as_str()) || taken.contains(&out) {
        out.push('_');
    }
    taken.push(out.clone());
    out
}

/// Text that cannot end a comment.
fn comment(text: &str) -> String {
    text.replace("*/", "* /").replace(['\n', '\r'], " ")
}

const STATUSES: &[(&str, u32, &str)] = &[
    ("OK", 0, "done"),
    ("NULL_POINTER", 1, "a pointer is null; bits 8 and up: place of the input or output plus one"),
    ("MISALIGNED", 2, "a pointer is not aligned; bits 8 and up as above"),
    ("TOO_MANY_TOKENS", 3, "more tokens than the program was compiled for"),
    ("WORKSPACE_TOO_SMALL", 4, "the workspace is too small for this number of tokens"),
    ("NOT_BOUND", 5, "no weights are bound to the handle"),
    ("WEIGHTS_MISMATCH", 6, "weights packed for another program, or not completely"),
    ("BUSY", 7, "another thread is inside a call on this handle"),
    ("OUT_OF_MEMORY", 8, "memory ran out"),
    ("NO_THREAD", 9, "a thread could not be started"),
    ("UNSUPPORTED_CPU", 10, "the processor lacks instructions that the code uses"),
    ("BAD_PROGRAM", 11, "the encoded program is damaged"),
    ("PACK_UNSUPPORTED", 12, "these tensors are not packed natively; bind packed weights"),
    ("TENSOR_MISMATCH", 13, "a tensor has another type or shape than the slot needs"),
    ("STREAM", 14, "the stream must be NULL"),
    ("OVERFLOW", 15, "a size does not fit in 64 bits"),
    ("UNFIT_TOKENS", 16, "a number of tokens for which a size of the program does not come out"),
];

/// The kinds of status with their numbers, for tests that compare them with the launcher.
pub fn statuses() -> impl Iterator<Item = (&'static str, u32)> {
    STATUSES.iter().map(|(name, value, _)| (*name, *value))
}

/// The header of the library of a CPU program: C99 and C++, without dependencies.
pub fn header(program: &Program) -> String {
    let p = &program.name;
    let upper = p.to_uppercase();
    let mut out = String::new();
    let _ = write!(out, "{}", preamble(p, &upper, program));
    out.push_str(&status(&upper, p));
    out.push_str(&io(program, p));
    out.push_str(&functions(p));
    for (i, slot) in program.slots.iter().enumerate() {
        out.push_str(&pack(p, i, slot, program));
    }
    let _ = write!(out, "\n#ifdef __cplusplus\n}}\n#endif\n\n#endif /* {upper}_H */\n");
    out
}

fn preamble(p: &str, upper: &str, program: &Program) -> String {
    format!(
        "/* {p}: one layer form for {target}, for at most {max} tokens a call.

   Use: {p}_create, {p}_bind (or {p}_pack_begin, {p}_pack_SLOT for every slot, then {p}_bind),
   {p}_launch as often as wanted, {p}_destroy. Link with -lpthread.

   Every function that can fail returns a status; none aborts, throws or prints. There is no global
   state. A handle serves one call at a time; different handles are independent. After fork, the
   child may launch on a handle but must not destroy it. */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#ifdef __cplusplus
extern \"C\" {{
#endif

/* Threads and bound weights. */
typedef struct {p}_handle {p}_handle;
",
        target = comment(&program.target),
        max = program.max_tokens,
    )
}

fn status(upper: &str, p: &str) -> String {
    let mut out = format!("\n/* Kinds of status: the low 8 bits of what functions return. */\nenum {p}_status {{\n");
    for (i, (name, value, text)) in STATUSES.iter().enumerate() {
        let comma = if i + 1 < STATUSES.len() { "," } else { "" };
        let _ = writeln!(out, "    {upper}_{name} = {value}{comma} /* {text} */");
    }
    out.push_str("};\n");
    out
}

fn io(program: &Program, p: &str) -> String {
    let mut out = String::new();
    let mut taken = Vec::new();
    let _ = write!(
        out,
        "
/* Inputs and outputs of a call: dense rows, owned by the caller, used only during the call. Not null,
   aligned to the size of an element. Inputs and outputs do not overlap. */
typedef struct {p}_io {{
"
    );
    for wanted_input in [true, false] {
        for buffer in &program.buffers {
            let (name, qualifier) = match &buffer.kind {
                BufferKind::Input { name } if wanted_input => (name, "const "),
                BufferKind::Output { name } if !wanted_input => (name, ""),
                BufferKind::Input { .. }
                | BufferKind::Output { .. }
                | BufferKind::Weight { .. }
                | BufferKind::Workspace => continue,
            };
            let shape: Vec<String> = buffer.shape.iter().map(size).collect();
            let member = identifier(name, &mut taken);
            let what = if wanted_input { "input" } else { "output" };
            let of = type_name(buffer.dtype);
            let _ = writeln!(out, "    {qualifier}void *{member}; /* {what}, {of} [{}] */", shape.join(", "));
        }
    }
    if taken.is_empty() {
        out.push_str("    void *unused; /* C has no empty structs */\n");
    }
    let _ = writeln!(out, "}} {p}_io;");
    out
}

fn functions(p: &str) -> String {
    let types: Vec<String> = [DType::F32, DType::Bf16].map(|d| format!("{} {}", dtype_number(d), type_name(d))).into();
    format!(
        "
/* A checkpoint tensor in memory: row-major elements; dtype {types}; other types by their number in the
   manifest's order from 0 (float64) to 9 (int64). */
typedef struct {p}_tensor {{
    const void *data;
    uint32_t dtype;
    uint32_t rank;
    const uint64_t *shape;
}} {p}_tensor;

/* Makes a handle. `threads` counts the calling thread; 0 means all processors. *handle is NULL on failure.
   The caller frees it with {p}_destroy. */
int {p}_create(uint32_t threads, {p}_handle **handle);

/* Ends the threads of a handle; NULL is ignored. No call on it may be under way. */
void {p}_destroy({p}_handle *handle);

/* Most tokens of a call. */
uint64_t {p}_max_tokens(void);

/* Bytes of workspace that a call with this many tokens needs; UINT64_MAX for too many tokens. */
uint64_t {p}_workspace_bytes(uint64_t tokens);

/* Bytes of packed weights. */
uint64_t {p}_weights_bytes(void);

/* Starts packing into `weights`: at least {p}_weights_bytes() bytes, aligned to 64, owned by the caller. */
int {p}_pack_begin(void *weights, uint64_t weights_bytes);

/* Packs one slot; use the {p}_pack_SLOT functions below, which name the tensors. */
int {p}_pack(uint64_t slot, const {p}_tensor *tensors, uint64_t count, void *weights, uint64_t weights_bytes);

/* Binds packed weights (made here, or the bytes of weights.bin). The caller keeps them unchanged, aligned to
   64 bytes, for as long as the handle is used. */
int {p}_bind({p}_handle *handle, const void *weights, uint64_t weights_bytes);

/* Runs the layer and returns when the outputs are written. The workspace is aligned to 64 bytes and need not
   be cleared. `stream` must be NULL. Zero tokens succeed; nothing is done then but for outputs that are not empty (counts of tokens). Results are the same
   for any number of threads. */
int {p}_launch({p}_handle *handle, uint64_t tokens, const {p}_io *io, void *workspace, uint64_t workspace_bytes,
    void *stream);

/* What a status means: a static text, never NULL. It names the input or output that is meant. */
const char *{p}_status_text(int status);
",
        types = types.join(", "),
    )
}

fn pack(p: &str, index: usize, slot: &Slot, program: &Program) -> String {
    // Names of slots are made unique in the order in which they come.
    let mut taken = vec!["begin".to_owned()];
    let mut name = String::new();
    for other in program.slots.iter().take(index + 1) {
        name = identifier(&other.name, &mut taken);
    }
    let mut lines = String::new();
    let mut native = true;
    for (m, matrix) in slot.matrices.iter().enumerate() {
        let source = &matrix.source;
        native &= slot.is_native(matrix);
        let each = source.tensor.contains("{e}");
        let first = m as u64 * slot.experts;
        let range =
            if slot.experts == 1 { format!("[{first}]") } else { format!("[{first}..{}]", first + slot.experts - 1) };
        let stacked = source.view.iter().any(|v| matches!(v, View::Expert | View::ExpertRows { .. }));
        let rule = if each {
            ""
        } else if stacked && slot.experts > 1 {
            ", the same stacked tensor for each expert"
        } else {
            ""
        };
        let _ = writeln!(lines, "   tensors{range}: {}{rule}", comment(&source.tensor));
    }
    let count = slot.experts.saturating_mul(slot.matrices.len() as u64);
    let numbers = match slot.numbers.as_slice() {
        [] => format!("from {} on", slot.first_expert),
        listed => format!("= {}", listed.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
    };
    let how = if native {
        ""
    } else {
        "\n   The encoding of these tensors is not packed natively: this returns PACK_UNSUPPORTED. */\n/*"
    };
    format!(
        "
/* Packs slot {index}, {text}: {count} tensors, {{e}} {e}, {{p}} the prefix of the layer.
{lines}   {how}*/
static inline int {p}_pack_{name}(const {p}_tensor *tensors, void *weights, uint64_t weights_bytes) {{
    return {p}_pack({index}u, tensors, {count}u, weights, weights_bytes);
}}
",
        text = comment(&slot.name),
        e = numbers,
    )
}
