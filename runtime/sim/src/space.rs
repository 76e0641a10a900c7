//! The address windows of generic addresses.
//!
//! Shared addresses of 32 bits carry the rank of their block in bits 24 and up: zero for the own block, else the rank
//! plus one, so that an address of the own block is valid in the cluster's window too.

/// Window of shared memory in the generic space.
pub(crate) const SHARED: u64 = 0x0100_0000_0000;
/// Window of local memory.
pub(crate) const LOCAL: u64 = 0x0200_0000_0000;
/// Window of the constant bank.
pub(crate) const CONST: u64 = 0x0300_0000_0000;
/// Window of the kernel parameters.
pub(crate) const PARAM: u64 = 0x0400_0000_0000;
/// First device address that is ever handed out.
pub(crate) const GLOBAL: u64 = 0x7f00_0000_0000;

/// Shift of the rank in a shared address.
pub(crate) const RANK_SHIFT: u32 = 24;
/// Largest shared offset.
pub(crate) const OFFSET_MASK: u64 = (1 << RANK_SHIFT) - 1;
/// First shared offset of a block, as on Hopper, where the driver keeps the first kilobyte.
pub(crate) const SHARED_BASE: u64 = 1024;

/// Index of the window an address lies in.
pub(crate) fn window(addr: u64) -> u64 {
    addr & 0xff00_0000_0000
}
