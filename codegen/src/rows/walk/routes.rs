//! Changes of scores and routes.

use super::{Value, Walker};
use crate::{
    CodegenError,
    rows::{
        exec::Exec,
        linear, select, tensor,
        value::{Choice, Row},
    },
};
use moec_ir::{
    NodeId, Op,
    ops::{BinaryFn, ProductKey},
};

impl<'c> Walker<'_, 'c> {
    pub(super) fn adjust(&self, id: NodeId) -> Result<Value<'c>, CodegenError> {
        let Op::Adjust(op) = &self.body.node(id).op else { return self.fail(id, "is no adjust") };
        let mut row = self.row(id, 0)?;
        let mut next = 1;
        if let Some(bias) = self.optional(id, op.add.as_ref())? {
            row = tensor::binary(&row, &bias, BinaryFn::Add);
        }
        let forbidden = |x: &Exec<'_, 'c>| x.b.f32(f32::NEG_INFINITY);
        if let Some(classes) = &op.class_experts {
            let class = self.held(id, next)?;
            next += 1;
            let classes: Vec<(i32, Vec<u64>)> =
                classes.iter().map(|(k, ids)| (k.parse().unwrap_or(i32::MIN), ids.clone())).collect();
            let (inner, of_row) = (row.clone(), class.clone());
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let own = of_row.scalar(x, b.i64(0));
                let mut open = b.bool(false);
                for (class, ids) in &classes {
                    let member = ranges(ids).into_iter().fold(b.bool(false), |sum, (low, high)| {
                        let inside = b.andi(b.cmpi("sge", ix.at, b.i64(low)), b.cmpi("slt", ix.at, b.i64(high)));
                        b.ori(sum, inside)
                    });
                    open = b.ori(open, b.andi(member, b.cmpi("eq", own, b.i32(*class))));
                }
                b.select(open, inner.get(x, ix), forbidden(x))
            })
            .after(&[&row, &class]);
        }
        if op.mask {
            let mask = self.row(id, next)?;
            let (inner, m) = (row.clone(), tensor::spread(&mask, &row.shape));
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let open = b.cmpf("ogt", m.scalar(x, ix.at), b.f32(0.0));
                b.select(open, inner.get(x, ix), forbidden(x))
            })
            .after(&[&row, &mask]);
        }
        for (ids, value) in [(&op.off, f32::NEG_INFINITY), (&op.on, f32::INFINITY)] {
            if ids.is_empty() {
                continue;
            }
            let (inner, ids) = (row.clone(), ids.clone());
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let listed = ranges(&ids).into_iter().fold(b.bool(false), |sum, (low, high)| {
                    let inside = b.andi(b.cmpi("sge", ix.at, b.i64(low)), b.cmpi("slt", ix.at, b.i64(high)));
                    b.ori(sum, inside)
                });
                b.select(listed, b.f32(value), inner.get(x, ix))
            })
            .after(&[&row]);
        }
        if let Some(block) = op.causal_block {
            let Some(tokens) = op.tokens else {
                return self.fail(id, "`causal_block` needs `tokens` to be compiled");
            };
            let inner = row.clone();
            let c = |n: u64| i64::try_from(n.max(1)).unwrap_or(i64::MAX);
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let own = b.divui(b.remui(x.token(), b.i64(c(tokens))), b.i64(c(block)));
                let value = b.select(b.cmpi("sgt", ix.at, own), forbidden(x), inner.get(x, ix));
                b.select(b.cmpi("eq", ix.at, own), b.f32(f32::INFINITY), value)
            })
            .after(&[&row]);
        }
        Ok(Value::Row(row))
    }

    pub(super) fn product_key(&self, id: NodeId, op: &ProductKey) -> Result<Value<'c>, CodegenError> {
        Ok(match op {
            ProductKey::Scores { k } => {
                Value::Choice(select::product_key(self.x, &self.row(id, 0)?, &self.row(id, 1)?, *k))
            }
            ProductKey::Sum { k1, k2, k } => {
                let query = self.row(id, 0)?.stored(self.x);
                let half = query.len() / 2;
                let part = |at: u64| tensor::slice(&query, 0, [i64::try_from(at).unwrap_or(i64::MAX), 1], half);
                let first = linear::linear(self.x, &part(0), self.matrix(id, k1)?);
                let second = linear::linear(self.x, &part(half), self.matrix(id, k2)?);
                Value::Choice(select::product_key(self.x, &first, &second, *k))
            }
            ProductKey::Tucker { core, u, v, k } => {
                let side = |query: usize, keys: usize, factor: &str| -> Result<select::Side<'c>, CodegenError> {
                    let keys = self.row(id, keys)?;
                    let [n, c, r] = keys.shape[..] else { return self.fail(id, "keys are [n, c, r]") };
                    let query = self.row(id, query)?.stored(self.x);
                    Ok(select::Side { query, keys, factor: self.table(id, factor)?, sizes: [n, c, r] })
                };
                let core = self.table(id, core)?;
                Value::Choice(select::tucker(self.x, side(0, 2, u)?, side(1, 3, v)?, &core, *k))
            }
        })
    }

    pub(super) fn overrides(&self, id: NodeId, expert: u64, experts: u64) -> Result<Value<'c>, CodegenError> {
        let (choice, when) = (self.choice(id, 0)?, self.row(id, 1)?);
        let fixed = i32::try_from(expert).unwrap_or(i32::MAX);
        let applies = |x: &Exec<'_, 'c>, when: &Row<'c>| x.b.cmpf("une", when.scalar(x, x.b.i64(0)), x.b.f32(0.0));
        let (ids, flag) = (choice.idx.clone(), when.clone());
        let idx = Row::new(vec![choice.slots], false, move |x, ix| {
            let b = x.b;
            let own = b.select(b.cmpi("eq", ix.at, b.i64(0)), b.i32(fixed), b.i32(-1));
            b.select(applies(x, &flag), own, ids.get(x, ix))
        })
        .after(&[&choice.idx, &when])
        .ints();
        let w = choice.w.clone().map(|w| {
            let (inner, flag) = (w.clone(), when.clone());
            Row::new(vec![choice.slots], false, move |x, ix| {
                let b = x.b;
                let own = b.select(b.cmpi("eq", ix.at, b.i64(0)), b.f32(1.0), b.f32(0.0));
                b.select(applies(x, &flag), own, inner.get(x, ix))
            })
            .after(&[&w, &when])
        });
        Ok(Value::Choice(Choice {
            slots: choice.slots,
            experts,
            idx: idx.stored(self.x),
            w: w.map(|w| w.stored(self.x)),
        }))
    }
}

/// The route of a token, when a route row covers `n` tokens.
pub(super) fn repeated<'c>(choice: &Choice<'c>, n: u64) -> Choice<'c> {
    let n = i64::try_from(n).unwrap_or(1);
    let of = |row: &Row<'c>| {
        let (inner, slots) = (row.clone(), choice.slots);
        let ints = row.ints;
        let seen = Row::new(vec![slots], false, move |x, ix| {
            x.with_token(x.b.divui(x.token(), x.b.i64(n)), || inner.get(x, ix))
        })
        .after(&[row])
        .cheap();
        if ints { seen.ints() } else { seen }
    };
    Choice { slots: choice.slots, experts: choice.experts, idx: of(&choice.idx), w: choice.w.as_ref().map(of) }
}

/// Consecutive runs of ids as half-open ranges.
pub(super) fn ranges(ids: &[u64]) -> Vec<(i64, i64)> {
    let mut sorted: Vec<i64> = ids.iter().map(|id| i64::try_from(*id).unwrap_or(i64::MAX)).collect();
    sorted.sort_unstable();
    let mut runs: Vec<(i64, i64)> = Vec::new();
    for id in sorted {
        match runs.last_mut() {
            Some((_, end)) if *end == id => *end += 1,
            Some(_) | None => runs.push((id, id + 1)),
        }
    }
    runs
}
