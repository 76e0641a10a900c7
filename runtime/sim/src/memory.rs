//! The device's address space: allocations with bounds, and which of their bytes were ever written.
//!
//! Words are atomics so that blocks can run on several cores without locks. Kernels that race give some result and a
//! finding, never undefined behaviour of the interpreter.

use crate::Error;
use crate::space::GLOBAL;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

/// Distance kept between allocations, so that an access past the end of one does not fall into the next.
const GAP: u64 = 4096;

/// A device address space.
///
/// Memory that nothing has written is poison: it reads as `0xff` bytes and a kernel that reads it is reported. The
/// variables of a module live here too, from its first launch on.
#[derive(Debug, Default)]
pub struct Memory {
    pub(crate) allocs: Vec<Alloc>,
    next: u64,
    /// Addresses of the `.global` variables of a module, by its identity and the index of the variable.
    pub(crate) modules: BTreeMap<u64, BTreeMap<usize, u64>>,
    /// What launches have read and written since the last one that did not start early: marks of words, by the base of
    /// the allocation.
    pub(crate) before: BTreeMap<u64, Vec<u8>>,
    /// The same of launches that not even a wait of the next one covers, since one between has not waited for them.
    pub(crate) beyond: BTreeMap<u64, Vec<u8>>,
}

/// Marks of a word: a launch that may not have ended has read it, has written it.
pub(crate) const READ: u8 = 1;
pub(crate) const WRITTEN: u8 = 2;

/// One allocation.
#[derive(Debug)]
pub(crate) struct Alloc {
    pub(crate) base: u64,
    pub(crate) bytes: u64,
    words: Vec<AtomicU32>,
    /// One bit for each byte of a word: written, and in the upper half: copied from unwritten memory.
    init: Vec<AtomicU8>,
}

impl Memory {
    /// An empty address space.
    #[must_use]
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Reserves `bytes` bytes at a multiple of `align` (rounded up to a power of two) and returns their address.
    /// The contents are poison. Zero bytes give an address that no access may use.
    pub fn alloc(&mut self, bytes: u64, align: u64) -> u64 {
        let align = align.max(16).next_power_of_two();
        let base = (self.next.max(GLOBAL) + GAP).next_multiple_of(align);
        let words = bytes.div_ceil(4) as usize;
        self.allocs.push(Alloc {
            base,
            bytes,
            words: (0..words).map(|_| AtomicU32::new(u32::MAX)).collect(),
            init: (0..words).map(|_| AtomicU8::new(0)).collect(),
        });
        self.next = base + bytes;
        base
    }

    /// Gives an allocation back. Its addresses are not handed out again.
    ///
    /// # Errors
    ///
    /// When `addr` is not the start of an allocation.
    pub fn free(&mut self, addr: u64) -> Result<(), Error> {
        match self.allocs.iter().position(|a| a.base == addr) {
            Some(i) => {
                self.allocs.remove(i);
                self.before.remove(&addr);
                self.beyond.remove(&addr);
                Ok(())
            }
            None => Err(Error::Memory(format!("{addr:#x} is not the start of an allocation"))),
        }
    }

    /// Copies `data` to the device; the bytes count as written.
    ///
    /// # Errors
    ///
    /// When the range is not inside one allocation.
    pub fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), Error> {
        let (a, at) = self.range(addr, data.len() as u64)?;
        let mut i = 0;
        while i < data.len() {
            let to = at + i as u64;
            match data[i..].first_chunk() {
                Some(word) if to.is_multiple_of(4) => {
                    a.store(to, 4, u64::from(u32::from_le_bytes(*word)));
                    i += 4;
                }
                _ => {
                    a.store(to, 1, u64::from(data[i]));
                    i += 1;
                }
            }
        }
        Ok(())
    }

    /// Copies `bytes` bytes from the device; poison reads as `0xff`.
    ///
    /// # Errors
    ///
    /// When the range is not inside one allocation.
    pub fn read(&self, addr: u64, bytes: u64) -> Result<Vec<u8>, Error> {
        let (a, at) = self.range(addr, bytes)?;
        let (mut out, end) = (Vec::with_capacity(bytes as usize), at + bytes);
        while at + (out.len() as u64) < end {
            let from = at + out.len() as u64;
            if from.is_multiple_of(4) && end - from >= 4 {
                out.extend((a.load(from, 4) as u32).to_le_bytes());
            } else {
                out.push(a.load(from, 1) as u8);
            }
        }
        Ok(out)
    }

    /// Whether a kernel or the host has written all of these bytes.
    ///
    /// # Errors
    ///
    /// When the range is not inside one allocation.
    pub fn is_written(&self, addr: u64, bytes: u64) -> Result<bool, Error> {
        let (a, at) = self.range(addr, bytes)?;
        Ok((0..bytes).all(|i| a.written(at + i, 1, true)))
    }

    fn range(&self, addr: u64, bytes: u64) -> Result<(&Alloc, u64), Error> {
        let a = self.find(addr).map(|i| &self.allocs[i]).filter(|a| bytes <= a.bytes - (addr - a.base));
        match a {
            Some(a) => Ok((a, addr - a.base)),
            None => Err(Error::Memory(format!("{bytes} bytes at {addr:#x} are not inside an allocation"))),
        }
    }

    /// Index of the allocation an address lies in.
    pub(crate) fn find(&self, addr: u64) -> Option<usize> {
        let i = self.allocs.partition_point(|a| a.base <= addr).checked_sub(1)?;
        let a = &self.allocs[i];
        (addr - a.base < a.bytes || (a.bytes == 0 && addr == a.base)).then_some(i)
    }
}

impl Alloc {
    /// Reads 1, 2, 4 or 8 bytes at an offset that is a multiple of them.
    #[inline]
    pub(crate) fn load(&self, at: u64, bytes: u32) -> u64 {
        let i = (at / 4) as usize;
        let w = u64::from(self.words[i].load(Relaxed));
        match bytes {
            4 => w,
            8 => w | u64::from(self.words[i + 1].load(Relaxed)) << 32,
            2 => w >> (at % 4 * 8) & 0xffff,
            _ => w >> (at % 4 * 8) & 0xff,
        }
    }

    /// Writes 1, 2, 4 or 8 bytes at an offset that is a multiple of them.
    #[inline]
    pub(crate) fn store(&self, at: u64, bytes: u32, v: u64) {
        let i = (at / 4) as usize;
        match bytes {
            4 => {
                self.words[i].store(v as u32, Relaxed);
                self.init[i].store(0xf, Relaxed);
            }
            8 => {
                self.words[i].store(v as u32, Relaxed);
                self.words[i + 1].store((v >> 32) as u32, Relaxed);
                self.init[i].store(0xf, Relaxed);
                self.init[i + 1].store(0xf, Relaxed);
            }
            n => {
                let shift = at % 4 * 8;
                let mask = (if n == 2 { 0xffffu32 } else { 0xff }) << shift;
                let bits = (v as u32) << shift & mask;
                // The neighbours in the word may belong to another block.
                let _ = self.words[i].fetch_update(Relaxed, Relaxed, |w| Some(w & !mask | bits));
                let set = (if n == 2 { 3u8 } else { 1 }) << (at % 4);
                let _ = self.init[i].fetch_update(Relaxed, Relaxed, |f| Some((f | set) & !(set << 4)));
            }
        }
    }

    /// Sixteen bytes at a multiple of four.
    #[inline]
    pub(crate) fn line(&self, at: u64) -> [u32; 4] {
        let words = self.words[(at / 4) as usize..].first_chunk::<4>();
        words.map_or([0; 4], |w| std::array::from_fn(|i| w[i].load(Relaxed)))
    }

    /// Replaces a 32-bit word by a function of it and returns the old value.
    pub(crate) fn update(&self, at: u64, f: impl Fn(u32) -> u32) -> u32 {
        let i = (at / 4) as usize;
        self.init[i].store(0xf, Relaxed);
        match self.words[i].fetch_update(Relaxed, Relaxed, |w| Some(f(w))) {
            Ok(w) | Err(w) => w,
        }
    }

    /// Whether all of the bytes are written; `strict` rejects copies of unwritten memory too.
    #[inline]
    pub(crate) fn written(&self, at: u64, bytes: u32, strict: bool) -> bool {
        let i = (at / 4) as usize;
        let one = |i: usize, mask: u8| fine(self.init[i].load(Relaxed), mask, strict);
        match bytes {
            8 => one(i, 0xf) && one(i + 1, 0xf),
            4 => one(i, 0xf),
            2 => one(i, 3 << (at % 4)),
            _ => one(i, 1 << (at % 4)),
        }
    }

    /// As [`Self::written`], of one or two bytes in a word, or of whole words.
    #[inline]
    pub(crate) fn written_all(&self, at: u64, bytes: u64, strict: bool) -> bool {
        let i = (at / 4) as usize;
        let one = |f: &AtomicU8, mask: u8| fine(f.load(Relaxed), mask, strict);
        match bytes {
            1 | 2 => one(&self.init[i], ((1 << bytes) - 1) << (at % 4)),
            _ => self.init[i..i + (bytes / 4) as usize].iter().all(|f| one(f, 0xf)),
        }
    }

    /// Marks a byte as a copy of unwritten memory.
    pub(crate) fn taint(&self, at: u64) {
        let _ = self.init[(at / 4) as usize].fetch_or(0x11 << (at % 4), Relaxed);
    }
}

/// Whether the bytes of `mask` in a word are written; `strict` rejects copies of unwritten memory too.
#[inline(always)]
fn fine(init: u8, mask: u8, strict: bool) -> bool {
    init & mask == mask && !(strict && init >> 4 & mask != 0)
}

/// Memory that one thread of the interpreter owns: shared memory of a block.
#[derive(Debug, Default)]
pub(crate) struct Plain {
    pub(crate) words: Vec<u32>,
    init: Vec<u8>,
}

impl Plain {
    /// Nothing in it is written.
    pub(crate) fn clear(&mut self, bytes: usize) {
        let words = bytes.div_ceil(4) + 1;
        self.words.clear();
        self.words.resize(words, u32::MAX);
        self.init.clear();
        self.init.resize(words, 0);
    }

    #[inline]
    pub(crate) fn load(&self, at: u64, bytes: u32) -> u64 {
        let i = (at / 4) as usize;
        let w = u64::from(self.words[i]);
        match bytes {
            4 => w,
            8 => w | u64::from(self.words[i + 1]) << 32,
            2 => w >> (at % 4 * 8) & 0xffff,
            _ => w >> (at % 4 * 8) & 0xff,
        }
    }

    #[inline]
    pub(crate) fn store(&mut self, at: u64, bytes: u32, v: u64) {
        let i = (at / 4) as usize;
        match bytes {
            4 => {
                self.words[i] = v as u32;
                self.init[i] = 0xf;
            }
            8 => {
                self.words[i] = v as u32;
                self.words[i + 1] = (v >> 32) as u32;
                self.init[i] = 0xf;
                self.init[i + 1] = 0xf;
            }
            n => {
                let shift = at % 4 * 8;
                let mask = (if n == 2 { 0xffffu32 } else { 0xff }) << shift;
                self.words[i] = self.words[i] & !mask | (v as u32) << shift & mask;
                let set = (if n == 2 { 3u8 } else { 1 }) << (at % 4);
                self.init[i] = (self.init[i] | set) & !(set << 4);
            }
        }
    }

    #[inline]
    pub(crate) fn written(&self, at: u64, bytes: u32, strict: bool) -> bool {
        let i = (at / 4) as usize;
        let one = |i: usize, mask: u8| fine(self.init[i], mask, strict);
        match bytes {
            8 => one(i, 0xf) && one(i + 1, 0xf),
            4 => one(i, 0xf),
            2 => one(i, 3 << (at % 4)),
            _ => one(i, 1 << (at % 4)),
        }
    }

    /// Sixteen bytes at a multiple of four.
    #[inline]
    pub(crate) fn line(&self, at: u64) -> [u32; 4] {
        self.words[(at / 4) as usize..].first_chunk().copied().unwrap_or_default()
    }

    /// Writes sixteen bytes at a multiple of four.
    #[inline]
    pub(crate) fn set_line(&mut self, at: u64, line: [u32; 4]) {
        let i = (at / 4) as usize;
        self.words[i..i + 4].copy_from_slice(&line);
        self.init[i..i + 4].fill(0xf);
    }

    /// As [`Self::written`], of one or two bytes in a word, or of whole words.
    #[inline]
    pub(crate) fn written_all(&self, at: u64, bytes: u64, strict: bool) -> bool {
        let i = (at / 4) as usize;
        match bytes {
            1 | 2 => fine(self.init[i], ((1 << bytes) - 1) << (at % 4), strict),
            16 => self.init[i..].first_chunk().is_some_and(|f| {
                let marks = u32::from_le_bytes(*f);
                marks & if strict { u32::MAX } else { 0x0f0f_0f0f } == 0x0f0f_0f0f
            }),
            _ => self.init[i..i + (bytes / 4) as usize].iter().all(|f| fine(*f, 0xf, strict)),
        }
    }

    pub(crate) fn taint(&mut self, at: u64) {
        self.init[(at / 4) as usize] |= 0x11 << (at % 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_outside_an_allocation_are_refused() {
        let mut m = Memory::new();
        let a = m.alloc(6, 256);
        assert!(m.write(a, &[1; 6]).is_ok());
        assert!(m.write(a, &[1; 7]).is_err());
        assert!(m.read(a - 1, 1).is_err());
        assert!(m.free(a).is_ok() && m.read(a, 1).is_err());
    }

    #[test]
    fn poison_is_known_by_the_byte() {
        let mut m = Memory::new();
        let a = m.alloc(8, 8);
        m.write(a + 1, &[7]).ok();
        assert_eq!(m.is_written(a + 1, 1), Ok(true));
        assert_eq!(m.is_written(a, 2), Ok(false));
        assert_eq!(m.read(a, 3), Ok(vec![255, 7, 255]));
    }
}
