//! Kernels that measure what a processor can do: streaming reads, and arithmetic in registers.
//!
//! They are emitted like the kernels of layers and have the same C type, so that what they reach is what a layer
//! could reach.

use crate::{
    Target,
    cpu::pair_products,
    mlir::{Builder, FuncKind, V},
};

/// Bytes of one item of streaming reads.
pub const PIECE: u64 = 1 << 20;
/// Places at which a thread reads at a time. From one place alone, memory gives a processor two thirds of what it can.
const STREAMS: usize = 8;
/// Independent sums: enough to hide the latency.
const CHAINS: usize = 24;

/// Operations of one step of the kernel `peak`.
pub fn operations(target: Target) -> f64 {
    match target {
        Target::X86V4Amx => (4 * 16 * 16 * 32 * 2) as f64,
        Target::X86V4Bf16 => (CHAINS * target.lanes() * 4) as f64,
        Target::X86V3 | Target::X86V4 | Target::Aarch64 | Target::Sm80 | Target::Sm89 | Target::Sm90a => {
            (CHAINS * target.lanes() * 2) as f64
        }
    }
}

const KERNEL: [(&str, &str); 4] = [("!llvm.ptr", "{}"), ("i64", "{}"), ("i64", "{}"), ("!llvm.ptr", "{}")];

/// Emits `read`: adds up the pieces `begin..end` of memory (arguments: address, number of pieces).
pub fn emit_read(b: &Builder<'_>, target: Target) {
    let lanes = target.lanes();
    let ty = format!("vector<{lanes}xi32>");
    b.func("read", FuncKind::Plain, &KERNEL, |f| {
        let memory = b.load(f[0], "!llvm.ptr", 8);
        let pieces = b.load(b.gepc(f[0], "i64", 1), "i64", 8);
        b.each(f[1], f[2], |piece| {
            let base = b.gep(memory, "i8", b.mulc(b.remui(piece, pieces), PIECE as i64));
            let init: Vec<_> = (0..STREAMS).map(|_| b.i32s(0, lanes)).collect();
            let (part, step) = (PIECE as i64 / STREAMS as i64, (lanes * 4) as i64);
            let sums = b.for_(b.i64(0), b.i64(part), b.i64(step), &init, |i, sums| {
                let add = |(stream, sum): (usize, &_)| {
                    let at = b.gep(base, "i8", b.addc(i, stream as i64 * part));
                    let attributes = [("rw", "0 : i32"), ("hint", "3 : i32"), ("cache", "1 : i32")];
                    b.op0("llvm.intr.prefetch", &[b.gep(at, "i8", b.i64(1024))], &attributes);
                    b.addi(*sum, b.load(at, &ty, 4))
                };
                sums.iter().enumerate().map(add).collect()
            });
            for (v, sum) in sums.iter().enumerate() {
                b.store(*sum, b.gep(f[3], "i8", b.i64((v * lanes * 4) as i64)), 4);
            }
        });
    });
}

/// Emits `peak`: multiplies registers `end - begin` times (arguments: two numbers).
pub fn emit_peak(b: &Builder<'_>, target: Target) {
    let lanes = target.lanes();
    let ty = format!("vector<{lanes}xf32>");
    b.func("peak", FuncKind::Plain, &KERNEL, |f| {
        if target == Target::X86V4Amx {
            return emit_tiles(b, f);
        }
        let x = b.splat(b.load(f[0], "f32", 4), &ty);
        let y = b.splat(b.load(b.gepc(f[0], "i64", 1), "f32", 4), &ty);
        // The narrow targets have too few registers for all chains.
        let chains = if target.vector_registers() < 32 { CHAINS / 2 } else { CHAINS };
        let init: Vec<_> = (0..chains).map(|i| b.f32s(i as f32, lanes)).collect();
        let sums = b.for_(f[1], f[2], b.i64(1), &init, |_, sums| {
            let mut sums = sums.to_vec();
            for _ in 0..CHAINS / chains {
                for sum in &mut sums {
                    let pairs = target == Target::X86V4Bf16;
                    *sum = if pairs { pair_products(b, *sum, x, y) } else { b.fma(x, y, *sum) };
                }
            }
            sums
        });
        for (i, sum) in sums.iter().enumerate() {
            b.store(*sum, b.gep(f[3], "i8", b.i64((i * lanes * 4) as i64)), 4);
        }
    });
}

fn emit_tiles<'c>(b: &Builder<'c>, f: &[V<'c>]) {
    let number = |i: u8| b.op("arith.constant", &[], "i8", &[("value", &format!("{i} : i8"))]);
    // Bytes that are reserved must be zero.
    for at in (0..64).step_by(4) {
        b.store(b.i32(0), b.gep(f[3], "i8", b.i64(at)), 4);
    }
    let configuration = [(0, 1), (16, 0x40_0040), (20, 0x40_0040), (24, 0x40_0040), (28, 0x40_0040)];
    for (at, word) in configuration.into_iter().chain([(48, 0x1010_1010), (52, 0x1010_1010)]) {
        b.store(b.i32(word), b.gep(f[3], "i8", b.i64(at)), 4);
    }
    b.intrinsic0("llvm.x86.ldtilecfg", &[f[3]]);
    for i in 0..8 {
        b.intrinsic0("llvm.x86.tilezero", &[number(i)]);
    }
    b.each(f[1], f[2], |_| {
        for i in 0..4 {
            let registers = [i, 4 + i / 2, 6 + i % 2].map(number);
            b.intrinsic0("llvm.x86.tdpbf16ps", &registers);
        }
    });
    b.intrinsic0("llvm.x86.tilerelease", &[]);
}
