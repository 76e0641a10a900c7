//! The video instructions on two or four parts of a register: `vadd4`, `vabsdiff4`, ..

use super::Decoder;
use super::kernel::raw;
use crate::Error;
use crate::op::{Kernel, V};
use crate::syntax::{Name, Operands, Ty};

const OPS: [&str; 6] = ["add", "sub", "avrg", "absdiff", "min", "max"];

/// What one of them does, packed into the immediate of its kernel.
#[derive(Clone, Copy)]
struct Plan {
    op: u64,
    four: bool,
    /// Signs of the result and of the sources.
    signs: [bool; 3],
    saturate: bool,
    /// The parts are added up, and to the third source.
    sum: bool,
}

impl Plan {
    fn pack(self) -> u64 {
        let [d, a, b] = self.signs.map(u64::from);
        self.op
            | u64::from(self.four) << 3
            | d << 4
            | a << 5
            | b << 6
            | u64::from(self.saturate) << 7
            | u64::from(self.sum) << 8
    }

    fn unpack(i: u64) -> Self {
        let bit = |n: u32| i >> n & 1 == 1;
        Plan { op: i & 7, four: bit(3), signs: [bit(4), bit(5), bit(6)], saturate: bit(7), sum: bit(8) }
    }

    fn run(self, a: u64, b: u64, c: u64) -> u64 {
        let bits = if self.four { 8 } else { 16 };
        let part = |x: u64, at: u32, signed: bool| {
            let x = (x << (64 - at - bits)) as i64;
            if signed { x >> (64 - bits) } else { (x as u64 >> (64 - bits)) as i64 }
        };
        let (mut out, mut sum) = (0, c);
        for at in (0..32).step_by(bits as usize) {
            let (x, y) = (part(a, at, self.signs[1]), part(b, at, self.signs[2]));
            let r = match self.op {
                0 => x + y,
                1 => x - y,
                2 => (x + y + i64::from(x + y >= 0)) >> 1,
                3 => (x - y).abs(),
                4 => x.min(y),
                _ => x.max(y),
            };
            let r = match (self.saturate, self.signs[0]) {
                (false, _) => r,
                (true, true) => r.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
                (true, false) => r.clamp(0, (1 << bits) - 1),
            };
            out |= (r as u64 & ((1 << bits) - 1)) << at;
            sum = sum.wrapping_add(r as u64);
        }
        (if self.sum { sum } else { out }) & 0xffff_ffff
    }
}

impl Decoder<'_> {
    pub(super) fn video(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        let name = p[0].strip_prefix('v').and_then(|n| n.strip_suffix(['2', '4']));
        let Some(op) = name.and_then(|n| OPS.iter().position(|x| *x == n)) else { return Ok(false) };
        let types: Vec<bool> = p.iter().filter_map(|s| Ty::parse(s)).map(Ty::signed).collect();
        let Ok(signs) = <[bool; 3]>::try_from(types) else { return self.unsupported("types") };
        let plan = Plan {
            op: op as u64,
            four: p[0].ends_with('4'),
            signs,
            saturate: p.contains(&"sat"),
            sum: p.contains(&"add"),
        };
        let k: Kernel = raw!(|a, b, c, i| Plan::unpack(i).run(a, b, c));
        self.three_op(k, Ty::B32, o, plan.pack())
    }
}
