//! Where the pieces of a row lie in shared memory.
//!
//! Rows of 16, 32, 64 or 128 bytes are stored without gaps. Read plainly, the same piece of eight rows would
//! lie in the same banks; so piece `c` (16 bytes) of row `r` is stored at `c ^ mask(r)`. This is also
//! the order that tensor maps and `wgmma` descriptors call the 64- and 128-byte swizzle.

use crate::mlir::{Builder, V};

/// The order of rows of this many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Swizzle {
    pub(super) row_bytes: u32,
}

impl Swizzle {
    /// Rows after which the order repeats, for rows of any size.
    pub(super) const PERIOD: u32 = 8;

    /// Byte offset of piece `chunk` of row `row` (i32 values).
    pub(super) fn offset<'c>(self, b: &Builder<'c>, row: V<'c>, chunk: V<'c>) -> V<'c> {
        let place = b.shli(b.xori(chunk, self.mask(b, row)), b.i32(4));
        b.addi(b.mulc(row, i64::from(self.row_bytes)), place)
    }

    /// What the pieces of this row are mixed with.
    pub(super) fn mask<'c>(self, b: &Builder<'c>, row: V<'c>) -> V<'c> {
        match self.row_bytes {
            bytes if bytes % 128 == 0 => b.andi(row, b.i32(7)),
            64 => b.andi(b.shrui(row, b.i32(1)), b.i32(3)),
            32 => b.andi(b.shrui(row, b.i32(2)), b.i32(1)),
            16 => b.i32(0),
            bytes => unreachable!("rows of {bytes} bytes are not staged"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Swizzle;
    use crate::{
        Target,
        gpu::device::{number, register},
        mlir::{FuncKind, Keep, Session},
    };
    use moec_sim::{Arg, Launch, Memory, Module, Options, launch};

    /// Places of the pieces of 32 rows, as a kernel computes them.
    fn places(row_bytes: u32) -> Vec<u32> {
        let chunks = row_bytes / 16;
        let threads = 32 * chunks;
        let compiled = Session::new().compile(&Target::Sm80, Keep::default(), |b| {
            let kind = FuncKind::Kernel { threads, blocks: 1, cluster: 1 };
            b.func("places", kind, &[("!llvm.ptr<1>", "{}")], |arguments| {
                let thread = register(b, "tid.x");
                let (row, chunk) = (b.divui(thread, number(b, chunks)), b.remui(thread, number(b, chunks)));
                let place = Swizzle { row_bytes }.offset(b, row, chunk);
                b.store(place, b.gep(arguments[0], "i32", thread), 4);
            });
        });
        let ptx = String::from_utf8(compiled.expect("compiles").code).expect("PTX is text");
        let module = Module::parse(&ptx).expect("parses");
        let mut memory = Memory::new();
        let out = memory.alloc(u64::from(threads) * 4, 256);
        let one = Launch {
            entry: "places",
            grid: [1; 3],
            block: [threads, 1, 1],
            cluster: [1; 3],
            dynamic_shared: 0,
            dependent: false,
            args: vec![Arg::U64(out)],
        };
        let report = launch(&module, &mut memory, &one, &Options::default()).expect("launches");
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        let bytes = memory.read(out, u64::from(threads) * 4).expect("in bounds");
        bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn eight_rows_of_one_piece_lie_in_different_banks() {
        for (row_bytes, chunks) in [(64, 4), (128, 8)] {
            let places = places(row_bytes);
            for chunk in 0..chunks {
                let mut banks: Vec<_> = (0..8).map(|row| places[row * chunks + chunk] % 128 / 16).collect();
                banks.sort_unstable();
                assert_eq!(banks, [0, 1, 2, 3, 4, 5, 6, 7], "rows of {row_bytes} bytes, piece {chunk}");
            }
        }
    }

    #[test]
    fn the_order_is_that_of_tensor_maps() {
        for (row_bytes, swizzle) in [(64, moec_sim::Swizzle::B64), (128, moec_sim::Swizzle::B128)] {
            for (i, place) in places(row_bytes).into_iter().enumerate() {
                assert_eq!(u64::from(place), swizzle.apply(i as u64 * 16), "piece {i} in rows of {row_bytes} bytes");
            }
        }
    }
}
