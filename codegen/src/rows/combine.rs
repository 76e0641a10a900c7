//! Sums over the slots of a row: expert rows back to tokens.

use super::{
    exec::{Exec, Fold, Ix},
    value::{Choice, Row},
};
use crate::{math, mlir::V};
use moec_abi::DType;
use moec_ir::ops::UnaryFn;
use std::{cell::RefCell, rc::Rc};

fn c(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Slots up to which positions and weights are kept in registers.
const UNROLLED: u64 = 16;

/// Rows sorted by expert in memory, and where the slots of each token lie among them.
#[derive(Clone)]
pub(crate) struct Sorted<'c> {
    /// Address of the rows.
    pub(crate) rows: V<'c>,
    /// Element type.
    pub(crate) dtype: DType,
    /// Elements of a row.
    pub(crate) width: u64,
    /// Position of slot `j` of token `t`, at `t * slots + j`, i32; -1 where the slot is empty.
    pub(crate) positions: V<'c>,
    /// Whether there may be no rows at all, because only some experts have rows here.
    pub(crate) partial: bool,
}

/// What the experts of a part give for one slot, when they need no grouped product.
#[derive(Clone)]
pub(crate) enum Simple<'c> {
    /// The token's own row.
    Identity(Row<'c>),
    /// The expert's row of a table with this width.
    Table {
        /// Address.
        at: V<'c>,
        /// Element type.
        dtype: DType,
        /// Elements of a row.
        width: u64,
    },
    /// `act(u_e . x) v_e`.
    Neuron {
        /// The token's row.
        x: Row<'c>,
        /// Input vectors: address, element type, elements.
        u: (V<'c>, DType, u64),
        /// Output vectors: address, element type, elements.
        v: (V<'c>, DType, u64),
        /// Activation.
        act: UnaryFn,
    },
}

/// Experts `first..end` of a bank, which compute something simple.
#[derive(Clone)]
pub(crate) struct SimplePart<'c> {
    /// First id.
    pub(crate) first: u64,
    /// One past the last id.
    pub(crate) end: u64,
    /// Subtracted from ids to index tables.
    pub(crate) base: u64,
    /// What they compute.
    pub(crate) kind: Simple<'c>,
}

/// A row splat to the width of a position.
fn splat<'c>(x: &Exec<'_, 'c>, value: V<'c>, width: usize) -> V<'c> {
    if width == 1 { value } else { x.b.splat(value, &format!("vector<{width}xf32>")) }
}

/// Sum over slots of weight times the sorted row; unweighted without `weights`.
pub(crate) fn combine<'c>(sorted: &Sorted<'c>, choice: &Choice<'c>, weighted: bool, shape: Vec<u64>) -> Row<'c> {
    let slots = choice.slots;
    let weights = if weighted { choice.w.clone() } else { None };
    let (s, w) = (sorted.clone(), weights.clone());
    // Position (i64), whether it is filled (i1), and weight of a slot.
    let slot = move |x: &Exec<'_, 'c>, j: V<'c>| {
        let b = x.b;
        let at = b.addi(b.mulc(x.token(), c(slots)), j);
        let position = b.cast("arith.extsi", b.load(b.gep(s.positions, "i32", at), "i32", 4), "i64");
        let on = b.cmpi("sge", position, b.i64(0));
        let weight = w.as_ref().map_or_else(|| b.f32(1.0), |w| w.scalar(x, j));
        (b.maxsi(position, b.i64(0)), on, weight)
    };
    let inherited: Vec<Row<'c>> = weights.into_iter().collect();
    let operands: Vec<&Row<'c>> = inherited.iter().collect();
    let s = sorted.clone();
    let add = move |x: &Exec<'_, 'c>, ix: Ix<'c>, (position, on, weight): (V<'c>, V<'c>, V<'c>), sum: V<'c>| {
        let b = x.b;
        let base = b.gep(s.rows, super::exec::element(s.dtype), b.mulc(position, c(s.width)));
        let next = || b.fma(x.load(base, s.dtype, ix), splat(x, weight, ix.width), sum);
        if s.partial {
            let ty = if ix.width == 1 { "f32".to_owned() } else { format!("vector<{}xf32>", ix.width) };
            return b.if_else(on, &[&ty], || vec![next()], || vec![sum])[0];
        }
        // An empty slot adds nothing, whatever the memory at its place holds.
        b.select(on, next(), sum)
    };
    if slots <= UNROLLED {
        let kept: Rc<RefCell<Vec<(V<'c>, V<'c>, V<'c>)>>> = Rc::default();
        let sink = Rc::clone(&kept);
        return Row::new(shape, true, move |x, ix| {
            let zero = math::constant(x.b, splat(x, x.b.f32(0.0), ix.width), 0.0);
            let values = kept.borrow().clone();
            values.into_iter().fold(zero, |sum, one| add(x, ix, one, sum))
        })
        .after(&operands)
        .prepared_by(move |x| {
            *sink.borrow_mut() = (0..slots).map(|j| slot(x, x.b.i64(c(j)))).collect();
        });
    }
    Row::new(shape, true, move |x, ix| {
        let b = x.b;
        let zero = splat(x, b.f32(0.0), ix.width);
        b.for_(b.i64(0), b.i64(c(slots)), b.i64(1), &[zero], |j, sum| {
            let one = slot(x, j);
            vec![add(x, ix, one, sum[0])]
        })[0]
    })
    .after(&operands)
}

/// Sum over slots of weight times what a bank of simple experts gives.
///
/// With `scale` (one factor per slot) the experts see their rows multiplied by it.
pub(crate) fn combine_simple<'c>(
    x: &Exec<'_, 'c>,
    parts: Vec<SimplePart<'c>>,
    choice: &Choice<'c>,
    (weighted, scale): (bool, Option<Row<'c>>),
    shape: Vec<u64>,
) -> Row<'c> {
    let slots = choice.slots;
    let vector = parts.iter().all(|p| match &p.kind {
        Simple::Identity(row) => row.vector,
        Simple::Table { .. } | Simple::Neuron { .. } => true,
    });
    // The factor of a slot's vector: its weight, times the neuron's activation.
    // Slots are padded to what the widest load of a GPU takes.
    let padded = slots.next_multiple_of(4);
    let factors = x.alloc(padded * 4);
    let parts: Vec<SimplePart<'c>> = parts
        .into_iter()
        .map(|mut p| {
            p.kind = match p.kind {
                Simple::Neuron { x: row, u, v, act } => Simple::Neuron { x: row.stored(x), u, v, act },
                kind @ (Simple::Identity(_) | Simple::Table { .. }) => kind,
            };
            p
        })
        .collect();
    let inside = |x: &Exec<'_, 'c>, part: &SimplePart<'c>, id: V<'c>| {
        let b = x.b;
        b.andi(b.cmpi("sge", id, b.i64(c(part.first))), b.cmpi("slt", id, b.i64(c(part.end))))
    };
    let ids = choice.idx.clone();
    let id_of = move |x: &Exec<'_, 'c>, j: V<'c>| x.b.cast("arith.extsi", ids.scalar(x, j), "i64");
    x.each_row(|| {
        let b = x.b;
        choice.idx.prepare(x);
        if let Some(w) = &choice.w {
            w.prepare(x);
        }
        if let Some(scale) = &scale {
            scale.prepare(x);
        }
        for j in slots..padded {
            x.single(|| b.store(b.f32(0.0), b.gep(x.at(factors), "f32", b.i64(c(j))), 4));
        }
        x.repeat(slots, |j| {
            let id = id_of(x, j);
            let mut factor = match (&choice.w, weighted) {
                (Some(w), true) => w.scalar(x, j),
                (None, _) | (_, false) => b.f32(1.0),
            };
            let share = scale.as_ref().map(|scale| scale.scalar(x, j));
            for part in &parts {
                if let (Simple::Identity(_), Some(share)) = (&part.kind, share) {
                    factor = b.select(inside(x, part, id), b.mulf(factor, share), factor);
                }
                if let Simple::Neuron { x: row, u: (u, dtype, width), act, .. } = &part.kind {
                    row.prepare(x);
                    let on = inside(x, part, id);
                    let place = b.maxsi(b.addc(id, -c(part.base)), b.i64(0));
                    let place = b.select(on, place, b.i64(0));
                    let base = b.mulc(place, c(*width));
                    let dot = x.fold(*width, row.vector, Fold::Sum, |ix| {
                        let at = Ix { at: b.addi(ix.at, base), width: ix.width };
                        b.mulf(row.get(x, ix), x.load(*u, *dtype, at))
                    });
                    let dot = share.map_or(dot, |share| b.mulf(dot, share));
                    let value = b.mulf(factor, math::unary(b, *act, dot));
                    factor = b.select(on, value, factor);
                }
            }
            x.single(|| b.store(factor, b.gep(x.at(factors), "f32", j), 4));
        });
    });
    let inherited: Vec<Row<'c>> = parts
        .iter()
        .filter_map(|p| match &p.kind {
            Simple::Identity(row) => Some(row.clone()),
            Simple::Table { .. } | Simple::Neuron { .. } => None,
        })
        .chain([choice.idx.clone()])
        .collect();
    let operands: Vec<&Row<'c>> = inherited.iter().collect();
    Row::new(shape, vector, move |x, ix| {
        let b = x.b;
        let zero = splat(x, b.f32(0.0), ix.width);
        b.for_(b.i64(0), b.i64(c(slots)), b.i64(1), &[zero], |j, sum| {
            let id = id_of(x, j);
            let factor = splat(x, b.load(b.gep(x.at(factors), "f32", j), "f32", 4), ix.width);
            let total = parts.iter().fold(sum[0], |sum, part| {
                let on = inside(x, part, id);
                let place = b.select(on, b.addc(id, -c(part.base)), b.i64(0));
                let table = |at: V<'c>, dtype: DType, width: u64| {
                    let base = b.gep(at, super::exec::element(dtype), b.mulc(place, c(width)));
                    x.load(base, dtype, ix)
                };
                let value = match &part.kind {
                    Simple::Identity(row) => row.get(x, ix),
                    Simple::Table { at, dtype, width } => table(*at, *dtype, *width),
                    Simple::Neuron { v: (at, dtype, width), .. } => table(*at, *dtype, *width),
                };
                b.select(on, b.fma(value, factor, sum), sum)
            });
            vec![total]
        })[0]
    })
    .after(&operands)
}
