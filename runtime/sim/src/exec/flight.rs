//! The landing of copies in flight.

use super::Cluster;
use super::access::Spot;
use super::atomics::combine;
use super::state::{At, Flight, FlightKind, Source};
use crate::memory::{Alloc, Plain};
use crate::op::Rmw;
use crate::syntax::Ty;

/// A byte with what is known of it: its value, and whether it was ever written.
type Byte = (u8, bool);

impl Cluster<'_> {
    /// Lands one copy of those in flight, chosen by the seed.
    pub(super) fn land_one(&mut self) -> bool {
        if self.flights.is_empty() {
            return false;
        }
        self.land_any();
        true
    }

    pub(super) fn land_any(&mut self) {
        let i = self.random() as usize % self.flights.len();
        // The stores of one thread are read and written in order.
        let (f, first) = (&self.flights[i], |g: &Flight| matches!(g.what, FlightKind::Store { .. }));
        let key = (f.block, f.warp, f.lane);
        let i = if first(f) {
            self.flights.iter().position(|g| first(g) && (g.block, g.warp, g.lane) == key).unwrap_or(i)
        } else {
            i
        };
        let f = self.flights.remove(i);
        self.land(f);
    }

    /// Lands the stores of a thread whose group is below `complete`; with `read`, only their source is read.
    pub(super) fn land_stores(&mut self, at: At, lane: usize, complete: u32, read: bool) {
        let mut i = 0;
        while i < self.flights.len() {
            let f = &self.flights[i];
            let mine = f.block == at.block && f.warp == at.warp && f.lane == lane;
            let due = matches!(&f.what, FlightKind::Store { group, .. } if *group < complete);
            if !(mine && due) {
                i += 1;
                continue;
            }
            if read && self.env.seed.is_multiple_of(2) {
                let mut f = self.flights[i].clone();
                if let FlightKind::Store { from, bytes, data, .. } = &mut f.what
                    && data.is_none()
                {
                    // The source has been read; the destination may still wait.
                    *data = Some(
                        self.shared_bytes(*from, *bytes).into_iter().flat_map(|(b, w)| [b, u8::from(w)]).collect(),
                    );
                }
                self.flights[i] = f;
                i += 1;
            } else {
                let f = self.flights.remove(i);
                self.land(f);
            }
        }
    }

    fn shared_bytes(&self, from: (usize, u32), bytes: u32) -> Vec<Byte> {
        let m = &self.blocks[from.0].smem;
        (0..u64::from(bytes))
            .map(|i| (m.load(u64::from(from.1) + i, 1) as u8, m.written(u64::from(from.1) + i, 1, true)))
            .collect()
    }

    fn land(&mut self, f: Flight) {
        self.effects += 1;
        let at = At { block: f.block, warp: f.warp };
        match f.what {
            FlightKind::Load { source, targets, mbar, bytes } => {
                self.land_load(&source, &targets, bytes);
                for key in mbar {
                    self.mbar_tx(at, f.lane, f.pc, key, -i64::from(bytes));
                }
            }
            FlightKind::Exchange { from, to, mbar, bytes } => {
                let data = self.shared_bytes(from, bytes);
                self.put_shared(to.0, u64::from(to.1), &data);
                self.mbar_tx(at, f.lane, f.pc, mbar, -i64::from(bytes));
            }
            FlightKind::Store { from, dest, bytes, reduce, data, .. } => {
                let data = match data {
                    Some(d) => d.chunks_exact(2).map(|c| (c[0], c[1] == 1)).collect(),
                    None => self.shared_bytes(from, bytes),
                };
                self.land_store(from.1, &dest, reduce, &data);
            }
            FlightKind::Remote { to, values, ty, op, mbar } => {
                let size = ty.bytes();
                for (i, v) in values.iter().enumerate() {
                    let o = u64::from(to.1) + i as u64 * u64::from(size);
                    let old = self.blocks[to.0].smem.load(o, size);
                    self.blocks[to.0].smem.store(o, size, combine(op, ty, old, *v, 0));
                }
                self.mbar_tx(at, f.lane, f.pc, mbar, -(values.len() as i64 * i64::from(size)));
            }
        }
    }

    fn put_shared(&mut self, block: usize, to: u64, data: &[Byte]) {
        let m = &mut self.blocks[block].smem;
        for (i, (b, written)) in data.iter().enumerate() {
            m.store(to + i as u64, 1, u64::from(*b));
            if !written {
                m.taint(to + i as u64);
            }
        }
    }

    fn land_load(&mut self, source: &Source, targets: &[(usize, u32)], bytes: u32) {
        match source {
            Source::Linear(addr) => {
                let Some(Spot::Global(i, at)) = self.global_spot(*addr, u64::from(bytes)) else { return };
                let a = &self.env.memory.allocs[i];
                for (b, to) in targets {
                    copy_run(a, at, &mut self.blocks[*b].smem, u64::from(*to), u64::from(bytes), 4);
                }
            }
            Source::Tensor(map, coords) => {
                let memory = self.env.memory;
                let mut last = self.last_alloc;
                let blocks = &mut self.blocks;
                map.each(coords, |o, n, addr| {
                    let from = addr.map(|addr| {
                        let inside = |i: usize| {
                            memory.allocs.get(i).is_some_and(|a| addr >= a.base && addr - a.base + n <= a.bytes)
                        };
                        if !inside(last) {
                            last = memory.find(addr).unwrap_or(last);
                        }
                        inside(last).then(|| (&memory.allocs[last], addr - memory.allocs[last].base))
                    });
                    let aligned = (o | n | from.flatten().map_or(0, |f| f.1)) % 4 == 0;
                    let size = if aligned { 4 } else { map.dtype.bytes() };
                    for (b, to) in targets {
                        let smem = &mut blocks[*b].smem;
                        let start = map.swizzle.apply(u64::from(*to) + o);
                        match from {
                            None => (0..n).step_by(size as usize).for_each(|k| smem.store(start + k, size, 0)),
                            // Outside of every allocation, which was reported when the copy was issued.
                            Some(None) => {}
                            Some(Some((a, at))) => copy_run(a, at, smem, start, n, size),
                        }
                    }
                });
            }
        }
    }

    fn land_store(&mut self, from: u32, dest: &Source, reduce: Option<(Rmw, Ty)>, data: &[Byte]) {
        let value =
            |o: u64, n: u32| (0..u64::from(n)).fold(0u64, |x, i| x | u64::from(data[(o + i) as usize].0) << (8 * i));
        let written = |o: u64, n: u32| (0..u64::from(n)).all(|i| data[(o + i) as usize].1);
        let put = |c: &mut Self, addr: u64, n: u32, v: u64, fine: bool| {
            let Some(Spot::Global(i, at)) = c.global_spot(addr, u64::from(n)) else { return };
            let a = &c.env.memory.allocs[i];
            match reduce {
                Some((op, ty)) => a.store(at, n, combine(op, ty, a.load(at, n), v, 0)),
                None => a.store(at, n, v),
            }
            if !fine {
                (0..u64::from(n)).for_each(|j| a.taint(at + j));
            }
        };
        match dest {
            Source::Linear(addr) => {
                let n = reduce.map_or(4, |(_, ty)| ty.bytes());
                for k in (0..data.len() as u64).step_by(n as usize) {
                    put(self, addr + k, n, value(k, n), written(k, n));
                }
            }
            Source::Tensor(map, coords) => {
                let size = map.dtype.bytes();
                let mut todo = Vec::new();
                map.each(coords, |o, n, addr| {
                    if let Some(addr) = addr {
                        todo.push((addr, map.swizzle.apply(u64::from(from) + o) - u64::from(from), n));
                    }
                });
                for (addr, o, n) in todo {
                    for k in (0..n).step_by(size as usize) {
                        put(self, addr + k, size, value(o + k, size), written(o + k, size));
                    }
                }
            }
        }
    }
}

/// Copies a run of bytes, with the marks of those that nothing has written; places are multiples of `size`.
fn copy_run(a: &Alloc, from: u64, smem: &mut Plain, to: u64, bytes: u64, size: u32) {
    let mut k = 0;
    while k < bytes {
        if (from + k).is_multiple_of(4)
            && (to + k).is_multiple_of(4)
            && bytes - k >= 16
            && a.written_all(from + k, 16, true)
        {
            smem.set_line(to + k, a.line(from + k));
            k += 16;
            continue;
        }
        smem.store(to + k, size, a.load(from + k, size));
        if !a.written(from + k, size, true) {
            let unwritten = (0..u64::from(size)).filter(|j| !a.written(from + k + j, 1, true));
            unwritten.for_each(|j| smem.taint(to + k + j));
        }
        k += u64::from(size);
    }
}
