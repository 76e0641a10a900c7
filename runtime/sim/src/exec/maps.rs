//! Tensor maps in memory: those that copies read, and those that kernels make.

use super::Cluster;
use super::access::{Toucher, addresses, get, shifted};
use super::lanes;
use super::run::Flow;
use super::state::{At, Warp};
use crate::clock::{Scope, Touch};
use crate::op::{Addr, Bulk, Inst, Op, Where};
use crate::report::FindingKind;
use crate::tensormap::TensorMapDesc;

impl Cluster<'_> {
    /// The tensor map at an address, with the coordinates of the copy.
    pub(super) fn tensor(
        &mut self,
        at: At,
        warp: &Warp,
        frame: u32,
        b: &Bulk,
        l: usize,
        pc: u32,
    ) -> Option<(TensorMapDesc, Vec<i64>)> {
        let addr = addresses(warp, frame, b.global)[l];
        let spot = self.resolve(Where::Generic, addr, 128, warp, frame, at, l, pc)?;
        let t = Toucher { at, lane: l, pc, touch: Touch::Plain, agent: (0, 0) };
        self.touch(warp, t, spot, 128, false, false);
        let bytes: Vec<u8> =
            (0..16).flat_map(|i| self.peek(warp, frame, l, shifted(spot, i * 8), 8).to_le_bytes()).collect();
        let Some(map) = TensorMapDesc::decode(&bytes) else {
            self.report(FindingKind::TensorMap, pc, at, l, Some(addr), "no tensor map at this address", None);
            return None;
        };
        if map.dims.len() != b.coords.len() {
            self.report(
                FindingKind::TensorMap,
                pc,
                at,
                l,
                Some(addr),
                format!("the map has {} dimensions, the copy {}", map.dims.len(), b.coords.len()),
                None,
            );
            return None;
        }
        let coords = b.coords.iter().map(|r| i64::from(get(warp, frame, *r, l) as i32)).collect();
        Some((map, coords))
    }

    pub(super) fn replace_map(&mut self, at: At, warp: &mut Warp, frame: u32, inst: &Inst, m: u32, pc: u32) -> Flow {
        let Op::TensormapReplace { place, addr, field, index, value, .. } = &inst.op else { return Flow::Next };
        for l in lanes(m) {
            let a = addresses(warp, frame, *addr)[l];
            let Some(spot) = self.resolve(*place, a, 128, warp, frame, at, l, pc) else { continue };
            let bytes: Vec<u8> =
                (0..16).flat_map(|i| self.peek(warp, frame, l, shifted(spot, i * 8), 8).to_le_bytes()).collect();
            // Addresses and strides have 64 bits, everything else 32.
            let v = get(warp, frame, *value, l) & if matches!(field, 0 | 4) { u64::MAX } else { 0xffff_ffff };
            let old = if bytes.iter().all(|b| *b == 0) {
                Some(TensorMapDesc::blank())
            } else {
                TensorMapDesc::decode(&bytes)
            };
            let Some(map) = old.and_then(|map| map.replace(*field, *index, v)) else {
                self.report(
                    FindingKind::TensorMap,
                    pc,
                    at,
                    l,
                    Some(a),
                    "no tensor map at this address, or a value it cannot take",
                    None,
                );
                continue;
            };
            for (i, c) in map.raw().chunks_exact(8).enumerate() {
                let v = c.iter().rev().fold(0, |x, b| x << 8 | u64::from(*b));
                self.poke(warp, frame, l, shifted(spot, i as u64 * 8), 8, v);
            }
        }
        Flow::Next
    }

    /// Copies a tensor map that a kernel has made to where copies read it. The first lane stands for the warp.
    pub(super) fn copy_map(
        &mut self,
        at: At,
        warp: &mut Warp,
        frame: u32,
        (to, from): (Addr, Addr),
        m: u32,
        pc: u32,
    ) -> Flow {
        let l = Self::first_lane(m);
        let (to, from) = (addresses(warp, frame, to)[l], addresses(warp, frame, from)[l]);
        let Some(src) = self.resolve(Where::Shared, from, 128, warp, frame, at, l, pc) else { return Flow::Next };
        let Some(dst) = self.resolve(Where::Generic, to, 128, warp, frame, at, l, pc) else { return Flow::Next };
        let t = Toucher { at, lane: l, pc, touch: Touch::Plain, agent: (0, 0) };
        self.touch(warp, t, src, 128, false, false);
        self.touch(warp, t, dst, 128, true, false);
        for i in 0..16 {
            let v = self.peek(warp, frame, l, shifted(src, i * 8), 8);
            self.poke(warp, frame, l, shifted(dst, i * 8), 8, v);
        }
        self.effects += 1;
        if self.env.check {
            self.fence(at, warp, Scope::Gpu, m);
        }
        Flow::Next
    }
}
