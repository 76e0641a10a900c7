//! Weights that are stored as codes, for the matrix unit: a unit is decoded once for all rows of a chunk.

use super::{Kernel, coded::pair};
use crate::{
    codes::{Codes, Places},
    mlir::V,
};

/// Outputs of a panel, which are the places of a vector.
const PANEL: usize = 16;

impl<'c> Kernel<'_, 'c> {
    /// Decodes `columns` inputs from `k0` on of the two panels at `panels`, whose numbers are `numbers`, into scratch, in
    /// the order of packed bf16 weights. Gives the addresses of both.
    pub(super) fn decode_unit(
        &self,
        codes: &Codes,
        (panels, numbers): ([V<'c>; 2], [V<'c>; 2]),
        k0: V<'c>,
        columns: V<'c>,
    ) -> [V<'c>; 2] {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        let first = self.at(self.scratch, s.pack_bytes(spec));
        let [integers, bytes] = ["i32", "i8"].map(|element| format!("vector<{PANEL}x{element}>"));
        // Whole bytes, and whole pairs.
        let step = codes.per_byte().max(2);
        let groups = codes.groups(spec.k);
        let factors = |of: Option<V<'c>>, number: V<'c>, size: u64| {
            of.map(|of| b.gep(of, "i8", b.mulc(number, s.factors_bytes(spec, size).cast_signed())))
        };
        let to = [first, self.at(first, s.decoded_bytes(spec) / 2)];
        for ((from, number), to) in panels.into_iter().zip(numbers).zip(to) {
            let scales = factors(self.scales, number, codes.scale.bytes());
            let zeros = factors(self.zeros, number, 4);
            b.each(self.c(0), b.divui(columns, self.c(step)), |i| {
                let of_input = |input: u64| {
                    let k = b.addc(b.addi(k0, b.mulc(i, step.cast_signed())), input.cast_signed());
                    // Inputs past the last one are zero: any scale serves.
                    let group = b.minsi(b.divui(k, self.c(codes.group)), self.c(groups - 1));
                    let row =
                        |of: V<'c>, size: u64| b.gep(of, "i8", b.mulc(group, (PANEL as u64 * size).cast_signed()));
                    let scale = scales.map(|of| codes.scales(b, row(of, codes.scale.bytes()), Places(Some(PANEL))));
                    (scale, zeros.map(|of| b.load(row(of, 4), &format!("vector<{PANEL}xf32>"), 4)))
                };
                let shared = codes.group.is_multiple_of(step).then(|| of_input(0));
                let value = |input: u64| {
                    let place = b.addc(
                        b.mulc(i, (step / codes.per_byte()).cast_signed()),
                        (input / codes.per_byte()).cast_signed(),
                    );
                    let byte = b.load(b.gep(from, "i8", b.mulc(place, PANEL as i64)), &bytes, 1);
                    let shift = i32::try_from(input % codes.per_byte() * codes.bits).unwrap_or(0);
                    let code = b.shrui(b.cast("arith.extui", byte, &integers), b.i32s(shift, PANEL));
                    let code = b.andi(code, b.i32s((1 << codes.bits) - 1, PANEL));
                    let (scale, zero) = shared.unwrap_or_else(|| of_input(input));
                    let factors = (scale.expect("codes have scales"), zero);
                    codes.decode(b, (code, Places(Some(PANEL))), factors, spec.w)
                };
                for at in 0..step / 2 {
                    let both = pair(b, value(2 * at), value(2 * at + 1), PANEL);
                    let line = b.addc(b.mulc(i, (step * 32).cast_signed()), (at * 64).cast_signed());
                    b.store(both, b.gep(to, "i8", line), 64);
                }
            });
        }
        to
    }
}
