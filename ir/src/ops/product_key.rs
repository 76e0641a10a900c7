//! Choice among n*n experts by two short score rows.

use crate::{
    Dim, RouteType, Type, WeightName, codes,
    infer::{Cx, OpError, OpResult, arity, numbers, overflow, sizes, want_known, want_rows, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%q = product_key %query {kind = "sum", k1 = "keys1", k2 = "keys2", k = 16}`: route with scores
/// over `n*n` experts, id = `i*n + j`. The `n*n` scores are never formed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ProductKey {
    /// Operand: query `[rows, 2d]`; score = first half against `k1` plus second half against `k2` (PEER).
    Sum {
        /// Keys `[n, d]` of the first half.
        k1: WeightName,
        /// Keys `[n, d]` of the second half.
        k2: WeightName,
        /// Experts per row.
        k: u64,
    },
    /// Operands: two score rows `[rows, n]` and `[rows, m]`; score = their sum (Doge).
    Scores {
        /// Experts per row.
        k: u64,
    },
    /// Operands: two queries, then two key tables; Tucker-decomposed score (UltraMemV2).
    Tucker {
        /// Core tensor.
        core: WeightName,
        /// Left factor of the core's rank-1 approximation.
        u: WeightName,
        /// Right factor.
        v: WeightName,
        /// Experts per row.
        k: u64,
    },
}

impl ProductKey {
    /// Experts per row.
    pub const fn k(&self) -> u64 {
        match self {
            Self::Sum { k, .. } | Self::Scores { k } | Self::Tucker { k, .. } => *k,
        }
    }

    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let (rows, experts) = match self {
            Self::Sum { k1, k2, .. } => {
                let [query] = arity(operands)?;
                let (rows, width) = want_rows(query, "the query")?;
                let ([n, d], [m, e]) = (cx.matrix(k1)?, cx.matrix(k2)?);
                if n != m || d.checked_add(e) != Some(width) {
                    let text = format!("keys [{n}, {d}] and [{m}, {e}] meet a query of {width}");
                    return Err(OpError::new(codes::SHAPE, text));
                }
                (rows, n.checked_mul(m))
            }
            Self::Scores { .. } => {
                let [a, b] = arity(operands)?;
                let ((rows, n), (others, m)) = (want_rows(a, "the first scores")?, want_rows(b, "the second scores")?);
                if rows != others {
                    return Err(OpError::new(codes::SHAPE, format!("scores of {rows} rows meet scores of {others}")));
                }
                (rows, n.checked_mul(m))
            }
            Self::Tucker { core, u, v, .. } => infer_tucker([core, u, v], cx, operands)?,
        };
        let experts = experts.ok_or_else(overflow)?;
        let k = self.k();
        if k == 0 || k > experts {
            return Err(OpError::new(codes::TOP_K, format!("k is {k}, there are {experts} experts")));
        }
        Ok(Type::Route(RouteType { rows: rows.clone(), slots: k, experts, weighted: true }))
    }
}

/// Rows and number of experts of the Tucker form.
fn infer_tucker<'a>(
    [core, u, v]: [&WeightName; 3],
    cx: &Cx<'_>,
    operands: &[&'a Type],
) -> OpResult<(&'a Dim, Option<u64>)> {
    let [q1, q2, k1, k2] = arity(operands)?;
    let ((rows, c1), (others, c2)) = (want_rows(q1, "the first query")?, want_rows(q2, "the second query")?);
    let keys = |ty: &Type, what: &str| -> OpResult<[u64; 3]> {
        match want_tensor(ty, what)?.shape.as_slice() {
            [n, c, r] => Ok([want_known(n, what)?, want_known(c, what)?, want_known(r, what)?]),
            shape => Err(OpError::new(codes::SHAPE, format!("{what} are {}, [n, c, r] is needed", sizes(shape)))),
        }
    };
    let ([n1, d1, r1], [n2, d2, r2]) = (keys(k1, "the first keys")?, keys(k2, "the second keys")?);
    if rows != others || c1 != d1 || c2 != d2 || n1 != n2 {
        let text = format!(
            "queries [{rows}, {c1}] and [{others}, {c2}] meet keys {} and {}",
            numbers(&[n1, d1, r1]),
            numbers(&[n2, d2, r2])
        );
        return Err(OpError::new(codes::SHAPE, text));
    }
    if cx.matrix(core)? != [r1, r2] {
        return Err(OpError::new(codes::SHAPE, format!("weight `{core}` must be [{r1}, {r2}]")));
    }
    cx.want_vector(u, r1)?;
    cx.want_vector(v, r2)?;
    Ok((rows, n1.checked_mul(n2)))
}
