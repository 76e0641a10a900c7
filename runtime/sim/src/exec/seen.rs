//! What the accesses of a warp cost: sectors of global memory, and passes over the banks of shared memory.

use super::access::Spot;
use super::{Cluster, lanes};

impl Cluster<'_> {
    /// Counts sectors and wavefronts of one access of a warp.
    pub(super) fn count(&mut self, seen: &Seen, bytes: u32, write: bool, both: bool) {
        let n = u64::from(seen.mask.count_ones());
        if n == 0 {
            return;
        }
        let moved = n * u64::from(bytes);
        let c = &mut self.counts;
        if seen.global {
            c.global_requests += 1;
            c.global_sectors += seen.sectors();
            c.global_sectors_ideal += seen.distinct_bytes(bytes).div_ceil(32);
            if write || both {
                c.global_bytes_written += moved;
            }
            if !write || both {
                c.global_bytes_read += moved;
            }
        } else if seen.shared {
            c.shared_requests += 1;
            let (waves, ideal) = seen.wavefronts(bytes);
            c.shared_wavefronts += waves;
            c.shared_wavefronts_ideal += ideal;
            if write || both {
                c.shared_bytes_written += moved;
            }
            if !write || both {
                c.shared_bytes_read += moved;
            }
        }
    }
}

/// Addresses of a warp's access, for the counts.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) mask: u32,
    pub(super) global: bool,
    pub(super) shared: bool,
    pub(super) addr: [u64; 32],
}

impl Seen {
    pub(super) fn add(&mut self, lane: usize, spot: Spot) {
        let addr = match spot {
            // Allocations are far apart, so the index keeps their addresses apart too.
            Spot::Global(i, at) => {
                self.global = true;
                (i as u64) << 44 | at
            }
            Spot::Shared(_, at) => {
                self.shared = true;
                at
            }
            Spot::Local(_) | Spot::Const(_) | Spot::Kernel(_) | Spot::Frame(_) => return,
        };
        self.mask |= 1 << lane;
        self.addr[lane] = addr;
    }

    /// Number of different values of `unit`-sized pieces among the lanes' addresses.
    fn distinct(&self, shift: u32) -> u64 {
        let mut v = [0u64; 32];
        let mut n = 0;
        let mut sorted = true;
        for l in lanes(self.mask) {
            let x = self.addr[l] >> shift;
            if n > 0 && v[n - 1] == x {
                continue;
            }
            sorted &= n == 0 || v[n - 1] < x;
            v[n] = x;
            n += 1;
        }
        if sorted {
            return n as u64;
        }
        v[..n].sort_unstable();
        1 + v[..n].windows(2).filter(|w| w[0] != w[1]).count() as u64
    }

    /// An aligned access of at most 16 bytes lies in one sector of 32.
    fn sectors(&self) -> u64 {
        self.distinct(5)
    }

    fn distinct_bytes(&self, bytes: u32) -> u64 {
        self.distinct(bytes.max(1).trailing_zeros()) * u64::from(bytes)
    }

    /// Whether the lanes of a whole warp go to neighbouring places.
    fn contiguous(&self, bytes: u32) -> bool {
        self.mask == u32::MAX && self.addr.windows(2).all(|w| w[1] == w[0].wrapping_add(u64::from(bytes)))
    }

    /// Wavefronts of a shared access and the fewest it could take. Accesses of 8 and 16 bytes are served by half and
    /// quarter warps.
    fn wavefronts(&self, bytes: u32) -> (u64, u64) {
        let parts = match bytes {
            16.. => 4,
            8..16 => 2,
            _ => 1,
        };
        if self.contiguous(bytes) {
            return (parts, parts);
        }
        let (per, words) = (32 / parts, u64::from(bytes.div_ceil(4)).min(4));
        let (mut waves, mut ideal) = (0, 0);
        for part in 0..parts {
            let lanes_here = self.mask & (((1u64 << per) - 1) << (part * per)) as u32;
            // Where every lane has banks of its own, one wavefront serves them all.
            let shift = bytes.clamp(4, 16).ilog2();
            let bank = |l: usize| self.addr[l] >> shift & (32 / words - 1);
            let banks = lanes(lanes_here).fold(0u32, |x, l| x | 1 << bank(l));
            if banks.count_ones() == lanes_here.count_ones() {
                waves += u64::from(lanes_here != 0);
                ideal += u64::from(lanes_here != 0);
                continue;
            }
            // The different words of each bank, as chains through `next`; 32 words at most.
            const END: u8 = u8::MAX;
            let (mut head, mut next, mut word) = ([END; 32], [END; 32], [0u64; 32]);
            let (mut depth, mut most, mut distinct) = ([0u8; 32], 0, 0);
            for l in lanes(lanes_here) {
                for w in 0..words {
                    let x = self.addr[l] / 4 + w;
                    let bank = (x % 32) as usize;
                    let mut i = head[bank];
                    while i != END && word[usize::from(i)] != x {
                        i = next[usize::from(i)];
                    }
                    if i == END {
                        word[distinct] = x;
                        next[distinct] = head[bank];
                        head[bank] = distinct as u8;
                        distinct += 1;
                        depth[bank] += 1;
                        most = most.max(depth[bank]);
                    }
                }
            }
            waves += u64::from(most);
            ideal += (distinct as u64).div_ceil(32);
        }
        (waves, ideal)
    }
}
