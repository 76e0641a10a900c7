//! A small program with hand-written kernels: `y = relu(x W^T) summed with a count of rows`.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use moec_abi::{
    Arg, Buffer, BufferKind, CpuGrid, DType, Expr, Grid, Launch, Layout, Manifest, Matrix, Packing, Program, SCHEMA,
    Slot, Source,
};

/// Inputs of each row.
pub const IN: u64 = 24;
/// Outputs of each row.
pub const OUT: u64 = 10;

fn buffer(name: &str, kind: BufferKind, shape: Vec<Expr>, offset: Expr, zeroed: bool) -> Buffer {
    Buffer { name: name.into(), kind, dtype: DType::F32, shape, offset, zeroed }
}

/// `hidden[T, IN] -> middle[T, OUT] (workspace), sums[OUT] (zeroed workspace) -> output[T, OUT]`.
pub fn program(target: &str) -> Program {
    let middle_bytes = Expr::Tokens.times(OUT * 4).round_up(64);
    let matrix = Matrix {
        source: Source { tensor: "{p}w".into(), packing: Packing::Plain, view: vec![], dtype: DType::F32 },
        rows: vec![OUT],
        columns: vec![IN],
    };
    let mut slot = Slot {
        name: "w".into(),
        experts: 1,
        first_expert: 0,
        numbers: Vec::new(),
        matrices: vec![matrix],
        layout: Layout::Panels { panel: 4, depth: 2, columns: 4 },
        dtype: DType::F32,
        bytes: 0,
        offsets: vec![],
    };
    slot.place(64);
    let launch = |name: &str, args: Vec<Arg>, items: Expr, grain: u64| Launch {
        name: name.into(),
        symbol: format!("tiny_{name}"),
        args,
        grid: Grid::Cpu(CpuGrid { items, grain, scratch: 256 }),
    };
    Program {
        name: "tiny".into(),
        target: target.into(),
        buffers: vec![
            buffer(
                "hidden",
                BufferKind::Input { name: "hidden".into() },
                vec![Expr::Tokens, IN.into()],
                0.into(),
                false,
            ),
            buffer("w", BufferKind::Weight { slot: 0 }, vec![(slot.bytes / 4).into()], 0.into(), false),
            buffer("middle", BufferKind::Workspace, vec![Expr::Tokens, OUT.into()], 0.into(), false),
            buffer("sums", BufferKind::Workspace, vec![OUT.into()], middle_bytes.clone(), true),
            buffer(
                "output",
                BufferKind::Output { name: "output".into() },
                vec![Expr::Tokens, OUT.into()],
                0.into(),
                false,
            ),
        ],
        slots: vec![slot],
        launches: vec![
            launch("up", vec![Arg::Buffer(0), Arg::Buffer(1), Arg::Buffer(2), Arg::Value(IN.into())], Expr::Tokens, 1),
            launch("sum", vec![Arg::Buffer(2), Arg::Buffer(3), Arg::Value(Expr::Tokens)], OUT.into(), 3),
            launch(
                "add",
                vec![Arg::Buffer(2), Arg::Offset { buffer: 3, bytes: Expr::Const(0).plus(0) }, Arg::Buffer(4)],
                Expr::Tokens,
                4,
            ),
        ],
        workspace: middle_bytes.plus(OUT * 4).round_up(64),
        max_tokens: 1000,
        fits: Vec::new(),
        layers: vec![3, 5],
        prefixes: vec!["l3.".into(), "l5.".into()],
        code: "kernels/tiny.o".into(),
        binary: None,
        domains: Vec::new(),
    }
}

/// A manifest around programs.
pub fn manifest(programs: Vec<Program>) -> Manifest {
    Manifest {
        schema: SCHEMA,
        producer: "test".into(),
        model: "tiny".into(),
        inputs: vec![],
        programs,
        chains: vec![],
        notes: vec![],
    }
}

/// The kernels in C, with the symbols of [`program`].
pub const KERNELS_C: &str = r#"
#include <stdint.h>
#include <string.h>
/* Panels of 4 rows, depth 2, 24 columns. */
static float weight(const float *w, uint64_t r, uint64_t c) {
    return w[(((r / 4) * 12 + c / 2) * 4 + r % 4) * 2 + c % 2];
}
void tiny_up(const uint64_t *a, uint64_t begin, uint64_t end, void *scratch) {
    const float *x = (const float *)a[0], *w = (const float *)a[1];
    float *y = (float *)a[2], *row = (float *)scratch;
    for (uint64_t t = begin; t < end; t++) {
        memcpy(row, x + t * a[3], a[3] * sizeof(float));
        for (uint64_t o = 0; o < 10; o++) {
            float s = 0;
            for (uint64_t i = 0; i < a[3]; i++) s += row[i] * weight(w, o, i);
            y[t * 10 + o] = s > 0 ? s : 0;
        }
    }
}
void tiny_sum(const uint64_t *a, uint64_t begin, uint64_t end, void *scratch) {
    const float *y = (const float *)a[0];
    float *sums = (float *)a[1];
    (void)scratch;
    for (uint64_t o = begin; o < end; o++)
        for (uint64_t t = 0; t < a[2]; t++) sums[o] += y[t * 10 + o];
}
void tiny_add(const uint64_t *a, uint64_t begin, uint64_t end, void *scratch) {
    const float *y = (const float *)a[0], *sums = (const float *)a[1];
    float *out = (float *)a[2];
    (void)scratch;
    for (uint64_t t = begin; t < end; t++)
        for (uint64_t o = 0; o < 10; o++) out[t * 10 + o] = y[t * 10 + o] + sums[o];
}
"#;

/// Deterministic numbers for tests.
pub fn number(i: u64) -> f32 {
    ((i.wrapping_mul(2_654_435_761) >> 7) % 2001) as f32 / 1000.0 - 1.0
}

/// What the program computes, in the same order of additions.
pub fn reference(tokens: u64, x: &[f32], w: &[f32]) -> Vec<f32> {
    let mut y = vec![0f32; (tokens * OUT) as usize];
    for t in 0..tokens as usize {
        for o in 0..OUT as usize {
            let mut s = 0f32;
            for i in 0..IN as usize {
                s += x[t * IN as usize + i] * w[o * IN as usize + i];
            }
            y[t * OUT as usize + o] = s.max(0.0);
        }
    }
    let mut sums = [0f32; OUT as usize];
    for row in y.chunks(OUT as usize) {
        sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
    }
    for row in y.chunks_mut(OUT as usize) {
        row.iter_mut().zip(&sums).for_each(|(v, s)| *v += s);
    }
    y
}

/// Little-endian bytes.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Floats of little-endian bytes.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
