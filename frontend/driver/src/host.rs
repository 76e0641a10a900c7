//! Texts for hosts of the C library: an example, and descriptions for build systems.

use moec_abi::{BufferKind, Program};
use std::fmt::Write as _;

/// A C program that runs the layer on packed weights.
pub(crate) fn example(program: &Program, library: &str) -> String {
    let p = &program.name;
    let sized = |wanted_input: bool| {
        let mut out = String::new();
        for buffer in &program.buffers {
            let name = match &buffer.kind {
                BufferKind::Input { name } if wanted_input => name,
                BufferKind::Output { name } if !wanted_input => name,
                BufferKind::Input { .. }
                | BufferKind::Output { .. }
                | BufferKind::Weight { .. }
                | BufferKind::Workspace => continue,
            };
            let sizes: Vec<String> = buffer.shape.iter().map(expression).collect();
            let _ = writeln!(out, "        {} * {}u, /* {name} */", sizes.join(" * "), buffer.dtype.bytes());
        }
        out
    };
    let (inputs, outputs) = (sized(true), sized(false));
    format!(
        r#"/* Runs {p} on packed weights and raw inputs.

   cc -O2 example.c -I. -L. -l{library} -lpthread -lm -o example
   ./example weights.bin inputs.bin outputs.bin TOKENS

   `moec run . --weights FOLDER --save-weights weights.bin` packs the weights of a checkpoint for this machine.
   inputs.bin holds the inputs one after another, outputs.bin gets the outputs. */
#include "{p}.h"

#include <stdio.h>
#include <stdlib.h>

static void *room(uint64_t bytes) {{
    void *memory = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (memory == NULL) {{
        fprintf(stderr, "no memory for %llu bytes\n", (unsigned long long)bytes);
        exit(3);
    }}
    return memory;
}}

static void check(int status) {{
    if (status != 0) {{
        fprintf(stderr, "{p}: %s\n", {p}_status_text(status));
        exit(1);
    }}
}}

static void transfer(const char *path, int write, void *data, uint64_t bytes, long from) {{
    FILE *file = fopen(path, write ? (from == 0 ? "wb" : "ab") : "rb");
    if (file == NULL || (!write && fseek(file, from, SEEK_SET) != 0)
        || (write ? fwrite(data, 1, bytes, file) : fread(data, 1, bytes, file)) != bytes || fclose(file) != 0) {{
        fprintf(stderr, "cannot %s %llu bytes of %s\n", write ? "write" : "read", (unsigned long long)bytes, path);
        exit(3);
    }}
}}

int main(int argc, char **argv) {{
    if (argc != 5) {{
        fprintf(stderr, "usage: %s weights.bin inputs.bin outputs.bin TOKENS\n", argv[0]);
        return 2;
    }}
    const uint64_t tokens = strtoull(argv[4], NULL, 10);
    const uint64_t inputs[] = {{
{inputs}    }};
    const uint64_t outputs[] = {{
{outputs}    }};
    {{
        enum {{ INPUTS = sizeof inputs / sizeof *inputs, OUTPUTS = sizeof outputs / sizeof *outputs }};
        union {{
            {p}_io io;
            void *pointers[INPUTS + OUTPUTS];
        }} call;
        {p}_handle *handle = NULL;
        const uint64_t weights_bytes = {p}_weights_bytes(), workspace_bytes = {p}_workspace_bytes(tokens);
        void *weights = room(weights_bytes), *workspace;
        long at = 0;
        int i;

        if (tokens > {p}_max_tokens()) {{
            fprintf(stderr, "at most %llu tokens\n", (unsigned long long){p}_max_tokens());
            return 1;
        }}
        workspace = room(workspace_bytes);
        transfer(argv[1], 0, weights, weights_bytes, 0);
        for (i = 0; i < INPUTS; i++) {{
            call.pointers[i] = room(inputs[i]);
            transfer(argv[2], 0, call.pointers[i], inputs[i], at);
            at += (long)inputs[i];
        }}
        for (i = 0; i < OUTPUTS; i++) call.pointers[INPUTS + i] = room(outputs[i]);

        check({p}_create(0, &handle));
        check({p}_bind(handle, weights, weights_bytes));
        check({p}_launch(handle, tokens, &call.io, workspace, workspace_bytes, NULL));
        for (at = 0, i = 0; i < OUTPUTS; i++) {{
            transfer(argv[3], 1, call.pointers[INPUTS + i], outputs[i], at);
            at += (long)outputs[i];
        }}
        {p}_destroy(handle);
        for (i = 0; i < INPUTS + OUTPUTS; i++) free(call.pointers[i]);
        free(workspace);
        free(weights);
    }}
    return 0;
}}
"#
    )
}

/// A size as a C expression in `tokens`.
fn expression(expr: &moec_abi::Expr) -> String {
    use moec_abi::Expr;
    match expr {
        Expr::Const(value) => format!("{value}u"),
        Expr::Tokens => "tokens".to_owned(),
        Expr::Add(a, b) => format!("({} + {})", expression(a), expression(b)),
        Expr::Mul(a, b) => format!("({} * {})", expression(a), expression(b)),
        Expr::CeilDiv(a, d) => format!("(({} + {d}u - 1u) / {d}u)", expression(a)),
        Expr::Min(a, b) => {
            let (a, b) = (expression(a), expression(b));
            format!("({a} < {b} ? {a} : {b})")
        }
        Expr::Max(a, b) => {
            let (a, b) = (expression(a), expression(b));
            format!("({a} > {b} ? {a} : {b})")
        }
    }
}

/// A pkg-config file that works from where the folder lies.
pub(crate) fn pkg_config(library: &str) -> String {
    format!(
        "prefix=${{pcfiledir}}\n\nName: {library}\nDescription: compiled mixture-of-experts layers\nVersion: {}\n\
         Cflags: -I${{prefix}}\nLibs: -L${{prefix}} -l{library} -lpthread -lm\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// A CMake package with the target `LIBRARY::LIBRARY`.
pub(crate) fn cmake(library: &str) -> String {
    format!(
        "find_package(Threads REQUIRED)\nif(NOT TARGET {library}::{library})\n  \
         add_library({library}::{library} STATIC IMPORTED)\n  set_target_properties({library}::{library} PROPERTIES\n    \
         IMPORTED_LOCATION \"${{CMAKE_CURRENT_LIST_DIR}}/lib{library}.a\"\n    \
         INTERFACE_INCLUDE_DIRECTORIES \"${{CMAKE_CURRENT_LIST_DIR}}\"\n    \
         INTERFACE_LINK_LIBRARIES \"Threads::Threads;m\")\nendif()\n"
    )
}
