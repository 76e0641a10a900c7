//! Where the pieces of a row lie in shared memory.
//!
//! Rows of 64 or 128 bytes are stored without gaps. Read plainly, the same piece of eight rows would
//! lie in the same banks; so piece `c` (16 bytes) of row `r` is stored at `c ^ mask(r)`. This is also
//! the order that tensor maps and `wgmma` descriptors call the 64- and 128-byte swizzle.

use crate::mlir::{Builder, V};

/// The order of rows of this many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Swizzle {
    pub(super) row_bytes: u32,
}

impl Swizzle {
    /// Byte offset of piece `chunk` of row `row` (i32 values).
    pub(super) fn offset<'c>(self, b: &Builder<'c>, row: V<'c>, chunk: V<'c>) -> V<'c> {
        let place = b.shli(b.xori(chunk, self.mask(b, row)), b.i32(4));
        b.addi(b.mulc(row, i64::from(self.row_bytes)), place)
    }

    /// What the pieces of this row are mixed with.
    pub(super) fn mask<'c>(self, b: &Builder<'c>, row: V<'c>) -> V<'c> {
        match self.row_bytes {
            128 => b.andi(row, b.i32(7)),
            64 => b.andi(b.shrui(row, b.i32(1)), b.i32(3)),
            bytes => unreachable!("rows of {bytes} bytes are not staged"),
        }
    }

    /// Rows after which the order repeats.
    pub(super) const PERIOD: u32 = 8;
}
