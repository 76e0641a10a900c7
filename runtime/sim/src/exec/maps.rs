//! Tensor maps in memory: those that copies read, and those that kernels make.

use super::access::{Spot, Toucher, addresses, get, shifted};
use super::run::Flow;
use super::state::{At, Warp};
use super::{Cluster, PAGE_BYTES, lanes};
use crate::clock::{Epoch, Scope, Touch};
use crate::op::{Addr, Bulk, Inst, Op, Where};
use crate::report::FindingKind;
use crate::tensormap::TensorMapDesc;
use std::sync::PoisonError;

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
        if self.touch(warp, t, spot, 128, false, false) {
            self.map_is_acquired(warp, t, spot, addr);
        }
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

    /// The last write of a place in global memory during this launch, by a thread, and its instruction.
    fn map_write(&self, spot: Spot) -> Option<((usize, u64), Epoch, u32)> {
        let Spot::Global(i, offset) = spot else { return None };
        let page = self.env.shadow.pages.get(i)?.get((offset / PAGE_BYTES) as usize)?.get()?;
        let shadow = page.lock().unwrap_or_else(PoisonError::into_inner);
        let (e, pc) = shadow.last_write((offset % PAGE_BYTES / 4) as usize);
        (!e.is_none()).then_some(((i, offset), e, pc))
    }

    /// `fence.proxy.tensormap::generic.acquire`: maps that these threads know to be written can be used by copies that
    /// come after the fence.
    pub(super) fn map_fence(&mut self, at: At, warp: &mut Warp, frame: u32, (scope, addr): (Scope, Addr), m: u32) {
        let addrs = addresses(warp, frame, addr);
        for l in lanes(m) {
            let spot = self.global_spot(addrs[l], 128);
            let Some((key, write, _)) = spot.and_then(|s| self.map_write(s)) else { continue };
            let (me, view) = (self.component(at, l), &warp.views[l]);
            if view.knows(self.id, me, write) {
                let now = Epoch::new(Touch::Plain, self.id, me, view.own);
                self.acquired_maps.entry(key).or_default().push((write, now));
            }
        }
        self.fence(at, warp, scope, m);
    }

    /// Reports the use of a map that a kernel has written and that no fence has shown to copies.
    fn map_is_acquired(&mut self, warp: &Warp, t: Toucher, spot: Spot, addr: u64) {
        if !self.env.check {
            return;
        }
        let Some((key, write, with)) = self.map_write(spot) else { return };
        let (me, view) = (self.component(t.at, t.lane), &warp.views[t.lane]);
        let fences = self.acquired_maps.get(&key);
        let known = |(w, fence): &(Epoch, Epoch)| *w == write && view.knows(self.id, me, *fence);
        if !fences.is_some_and(|f| f.iter().rev().any(known)) {
            let text = "use of a tensor map that was written here, without fence.proxy.tensormap::generic.acquire";
            self.report(FindingKind::MissingFence, t.pc, t.at, t.lane, Some(addr), text, Some(with));
        }
    }

    pub(super) fn replace_map(&mut self, at: At, warp: &mut Warp, frame: u32, inst: &Inst, m: u32, pc: u32) -> Flow {
        let Op::TensormapReplace { place, addr, field, index, value, .. } = &inst.op else { return Flow::Next };
        for l in lanes(m) {
            let a = addresses(warp, frame, *addr)[l];
            let Some(spot) = self.resolve(*place, a, 128, warp, frame, at, l, pc) else { continue };
            let t = Toucher { at, lane: l, pc, touch: Touch::Plain, agent: (0, 0) };
            self.touch(warp, t, spot, 128, true, false);
            let bytes: Vec<u8> =
                (0..16).flat_map(|i| self.peek(warp, frame, l, shifted(spot, i * 8), 8).to_le_bytes()).collect();
            // Addresses and strides have 64 bits, everything else 32.
            let v = get(warp, frame, *value, l) & if matches!(field, 0 | 4) { u64::MAX } else { 0xffff_ffff };
            let Some(map) = TensorMapDesc::replace(&bytes, *field, *index, v) else {
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
            for (i, c) in map.chunks_exact(8).enumerate() {
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
