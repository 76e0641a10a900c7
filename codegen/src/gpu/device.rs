//! What a thread of a kernel can do beyond arithmetic: who it is, shuffles, barriers, copies.

use crate::mlir::{Builder, V};
use melior::ir::ValueLike as _;

/// Pointer types by address space.
pub(super) const GLOBAL: &str = "!llvm.ptr<1>";
pub(super) const SHARED: &str = "!llvm.ptr<3>";

/// A special register.
pub(super) fn register<'c>(b: &Builder<'c>, name: &str) -> V<'c> {
    b.op(&format!("nvvm.read.ptx.sreg.{name}"), &[], "i32", &[])
}

/// All threads of the block meet.
pub(super) fn barrier(b: &Builder<'_>) {
    b.op0("nvvm.barrier0", &[], &[]);
}

/// `threads` threads of the block meet at barrier `id` (i32).
pub(super) fn barrier_of<'c>(b: &Builder<'c>, id: V<'c>, threads: u32) {
    b.intrinsic0("llvm.nvvm.barrier.cta.sync.aligned.count", &[id, number(b, threads)]);
}

/// The value of another lane.
pub(super) fn shuffle<'c>(b: &Builder<'c>, value: V<'c>, lane: V<'c>) -> V<'c> {
    b.intrinsic("llvm.nvvm.shfl.sync.idx.i32", &[b.i32(-1), value, lane, b.i32(31)], "i32")
}

/// Sum of `value` over this lane and the lower ones.
pub(super) fn scan<'c>(b: &Builder<'c>, value: V<'c>, lane: V<'c>) -> V<'c> {
    let mut sum = value;
    for distance in [1, 2, 4, 8, 16] {
        let arguments = [b.i32(-1), sum, b.i32(distance), b.i32(0)];
        let lower = b.intrinsic("llvm.nvvm.shfl.sync.up.i32", &arguments, "i32");
        let has = b.cmpi("uge", lane, b.i32(distance));
        sum = b.select(has, b.addi(sum, lower), sum);
    }
    sum
}

/// One bit per lane.
pub(super) fn ballot<'c>(b: &Builder<'c>, flag: V<'c>) -> V<'c> {
    b.intrinsic("llvm.nvvm.vote.ballot.sync", &[b.i32(-1), flag], "i32")
}

/// Position of the lowest set bit; 32 for zero.
pub(super) fn lowest_bit<'c>(b: &Builder<'c>, bits: V<'c>) -> V<'c> {
    b.same("llvm.intr.cttz", &[bits], &[("is_zero_poison", "false")])
}

/// An asynchronous copy of 4, 8 or 16 bytes to shared memory; `bytes` of them are read, the rest is zero.
pub(super) fn copy_async<'c>(b: &Builder<'c>, to: V<'c>, from: V<'c>, unit: u32, bytes: Option<V<'c>>) {
    // Only whole 16-byte pieces can bypass the first-level cache.
    let level = if unit == 16 { "cg" } else { "ca" };
    let name = format!("llvm.nvvm.cp.async.{level}.shared.global.{unit}");
    match bytes {
        None => b.intrinsic0(&name, &[to, from]),
        Some(bytes) => b.intrinsic0(&format!("{name}.s"), &[to, from, bytes]),
    }
}

/// Ends a group of asynchronous copies.
pub(super) fn commit(b: &Builder<'_>) {
    b.op0("nvvm.cp.async.commit.group", &[], &[]);
}

/// Waits until at most `pending` groups of this thread are in flight.
pub(super) fn wait_copies(b: &Builder<'_>, pending: u32) {
    b.op0("nvvm.cp.async.wait.group", &[], &[("n", &format!("{pending} : i32"))]);
}

/// Ordinary writes of this thread become visible to tensor copies and `wgmma`.
pub(super) fn fence_async(b: &Builder<'_>) {
    let attributes = [("kind", "#nvvm.proxy_kind<async.shared>"), ("space", "#nvvm.shared_space<cta>")];
    b.op0("nvvm.fence.proxy", &[], &attributes);
}

/// A number of the schedule.
pub(super) fn number<'c>(b: &Builder<'c>, value: u32) -> V<'c> {
    b.i32(i32::try_from(value).expect("sizes of a schedule fit in 32 bits"))
}

/// Instructions in the assembler's own words, which stay where they are.
pub(super) fn asm<'c>(b: &Builder<'c>, text: &str, constraints: &str, operands: &[V<'c>], result: &str) -> V<'c> {
    let (text, constraints) = (format!("\"{text}\""), format!("\"{constraints}\""));
    let attributes = [("asm_string", text.as_str()), ("constraints", &constraints), ("has_side_effects", "unit")];
    b.op("llvm.inline_asm", operands, result, &attributes)
}

/// As [`asm`], without a result.
pub(super) fn asm0<'c>(b: &Builder<'c>, text: &str, constraints: &str, operands: &[V<'c>]) {
    let (text, constraints) = (format!("\"{text}\""), format!("\"{constraints}\""));
    let attributes = [("asm_string", text.as_str()), ("constraints", &constraints), ("has_side_effects", "unit")];
    b.op0("llvm.inline_asm", operands, &attributes);
}

/// A field of a struct.
pub(super) fn field<'c>(b: &Builder<'c>, value: V<'c>, index: usize, ty: &str) -> V<'c> {
    b.op("llvm.extractvalue", &[value], ty, &[("position", &format!("array<i64: {index}>"))])
}

/// An element of a vector.
pub(super) fn element<'c>(b: &Builder<'c>, vector: V<'c>, index: usize, ty: &str) -> V<'c> {
    b.op("vector.extract", &[vector], ty, &[("static_position", &format!("array<i64: {index}>"))])
}

/// A vector of scalars.
pub(super) fn vector<'c>(b: &Builder<'c>, parts: &[V<'c>]) -> V<'c> {
    let ty = format!("vector<{}x{}>", parts.len(), parts[0].r#type());
    b.op("vector.from_elements", parts, &ty, &[])
}

/// Address `bytes` after a pointer.
pub(super) fn at<'c>(b: &Builder<'c>, pointer: V<'c>, bytes: V<'c>) -> V<'c> {
    b.gep(pointer, "i8", bytes)
}

/// Address a constant number of bytes after a pointer.
pub(super) fn at_const<'c>(b: &Builder<'c>, pointer: V<'c>, bytes: u64) -> V<'c> {
    match i32::try_from(bytes) {
        Ok(bytes) => b.gepc(pointer, "i8", bytes),
        Err(_) => at(b, pointer, b.i64(i64::try_from(bytes).expect("addresses have 63 bits"))),
    }
}

/// Widens an unsigned 32-bit number.
pub(super) fn wide<'c>(b: &Builder<'c>, value: V<'c>) -> V<'c> {
    b.cast("arith.extui", value, "i64")
}

/// Narrows to 32 bits.
pub(super) fn narrow<'c>(b: &Builder<'c>, value: V<'c>) -> V<'c> {
    b.cast("arith.trunci", value, "i32")
}
