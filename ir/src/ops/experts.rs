//! Expert banks.

use super::{Ffn, UnaryFn, is_default};
use crate::{
    RaggedType, Type, WeightName, WeightSpec, codes,
    infer::{Cx, OpError, OpResult, arity, numbers, want_ragged},
    ops::ffn::{matrix, want_bias},
};
use serde::{Deserialize, Serialize};

/// `%e = experts %d {bank = [..]}`: each row through its expert.
///
/// Parts may differ in kind, width and storage, and cover `0..experts` of the route exactly once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// The parts, by rising ids.
    pub bank: Vec<BankPart>,
}

/// Experts `ids[0] .. ids[1]` of a bank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BankPart {
    /// First id and one past the last.
    pub ids: [u64; 2],
    /// `{e}` in weight names is the id minus this.
    #[serde(default, skip_serializing_if = "is_default")]
    pub base_id: u64,
    /// Where the experts of the part are not consecutive in weight names: `{e}` of each, in place of `base_id`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numbers: Vec<u64>,
    /// What these experts compute.
    #[serde(flatten)]
    pub kind: PartKind,
}

/// What the experts of a part compute.
#[expect(clippy::large_enum_variant, reason = "a bank has few parts")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum PartKind {
    /// Feed-forward network.
    Ffn(Box<Ffn>),
    /// One matrix.
    Linear(LinearBank),
    /// `M(x) * x + A(x)` (MoFME).
    Film(Film),
    /// The expert's row of a table; the input is ignored.
    Const {
        /// Table `[experts, ..]`.
        value: WeightName,
    },
    /// One neuron each: `act(u_e . x) v_e` (PEER).
    Neuron(Neuron),
    /// The input (LongCat).
    Identity {},
    /// Zero (null experts).
    Zero {},
}

/// `w x + bias`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearBank {
    /// Matrix `[out, in]`.
    pub w: WeightSpec,
    /// Bias `[out]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias: Option<WeightSpec>,
}

/// Feature-wise modulation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Film {
    /// Multiplier matrix `[n, n]`.
    pub mul: WeightSpec,
    /// Multiplier bias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mul_bias: Option<WeightSpec>,
    /// Offset matrix `[n, n]`.
    pub add: WeightSpec,
    /// Offset bias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_bias: Option<WeightSpec>,
}

/// Experts of rank one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Neuron {
    /// Input vectors `[experts, in]`.
    pub u: WeightName,
    /// Output vectors `[experts, out]`.
    pub v: WeightName,
    /// Activation.
    pub act: UnaryFn,
}

/// Shape of a part's rows: what it depends on decides how it is compared with other parts.
enum PartRow {
    /// The part says it.
    Fixed(Vec<u64>),
    /// The inner activation of a feed-forward part without `down`; narrower than the row is possible.
    Inner(u64),
    /// Any: zero.
    Any,
}

impl Experts {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [rows] = arity(operands)?;
        let rows = want_ragged(rows, "the operand")?;
        self.check_cover(rows.route.experts)?;
        let narrow = self.takes(cx, &rows.row);
        let mut fixed: Option<(u64, Vec<u64>)> = None;
        let mut inner: Option<u64> = None;
        for part in &self.bank {
            for id in part.ids[0]..part.ids[1] {
                match part.row(cx, part.number(id), &rows.row, narrow).map_err(|e| of_expert(e, id))? {
                    PartRow::Any => {}
                    PartRow::Inner(width) => inner = Some(inner.unwrap_or(0).max(width)),
                    PartRow::Fixed(row) => match &fixed {
                        None => fixed = Some((id, row)),
                        Some((_, known)) if *known == row => {}
                        Some((first, known)) => {
                            let (known, row) = (numbers(known), numbers(&row));
                            let text = format!("expert {first} gives rows of {known}, expert {id} rows of {row}");
                            return Err(OpError::new(codes::BANK_WIDTH, text));
                        }
                    },
                }
                if part.is_uniform(cx) {
                    break;
                }
            }
        }
        let row = match (fixed, inner) {
            (None, None) => rows.row.clone(),
            (Some((_, row)), None) => row,
            (None, Some(width)) => vec![width],
            (Some((id, row)), Some(width)) => match row.as_slice() {
                [n] => vec![width.max(*n)],
                row => {
                    let text = format!("expert {id} gives rows of {}, others the inner activation", numbers(row));
                    return Err(OpError::new(codes::BANK_WIDTH, text));
                }
            },
        };
        Ok(Type::Ragged(RaggedType { row, ..rows.clone() }))
    }

    /// Whether a part with single matrices takes whole rows; then narrower parts take the first entries of a row.
    fn takes(&self, cx: &Cx<'_>, row: &[u64]) -> bool {
        let [width] = row else { return false };
        self.bank.iter().any(|part| {
            let spec = match &part.kind {
                PartKind::Linear(bank) => &bank.w,
                PartKind::Ffn(ffn) if ffn.down.is_none() && ffn.gate.is_none() => &ffn.up,
                PartKind::Ffn(_)
                | PartKind::Film(_)
                | PartKind::Const { .. }
                | PartKind::Neuron(_)
                | PartKind::Identity {}
                | PartKind::Zero {} => return false,
            };
            (part.ids[0]..part.ids[1])
                .any(|id| spec.shape(cx, part.number(id)).is_ok_and(|shape| shape.get(1) == Some(width)))
        })
    }

    /// Parts cover every expert exactly once, in order.
    fn check_cover(&self, experts: u64) -> OpResult<()> {
        let wrong = |text: String| Err(OpError::new(codes::BANK_COVER, text));
        let mut next = 0;
        for part in &self.bank {
            let [start, end] = part.ids;
            if start != next {
                return wrong(format!("a part starts at expert {start}, the one before ends at {next}"));
            }
            if end <= start {
                return wrong(format!("a part has the experts {start}..{end}, which are none"));
            }
            if part.base_id > start && part.numbers.is_empty() {
                return wrong(format!("`base_id` is {}, the part starts at expert {start}", part.base_id));
            }
            if !part.numbers.is_empty() && part.numbers.len() as u64 != end - start {
                let count = part.numbers.len();
                return wrong(format!("`numbers` has {count} entries, the part the experts {start}..{end}"));
            }
            next = end;
        }
        if next != experts {
            return wrong(format!("the bank has {next} experts, the route {experts}"));
        }
        Ok(())
    }
}

/// The finding with the expert's number in the route.
fn of_expert(error: OpError, id: u64) -> OpError {
    OpError { message: format!("expert {id}: {}", error.message), ..error }
}

impl BankPart {
    /// What `{e}` in weight names stands for, for expert `id` of the route.
    pub fn number(&self, id: u64) -> u64 {
        let place = id.saturating_sub(self.ids[0]);
        let listed = usize::try_from(place).ok().and_then(|at| self.numbers.get(at));
        listed.copied().unwrap_or(id.saturating_sub(self.base_id))
    }

    /// Whether the part gives inner activations: a network without its last product.
    pub fn is_inner(&self) -> bool {
        matches!(&self.kind, PartKind::Ffn(ffn) if ffn.down.is_none())
    }

    /// The number of each expert of the part, in order.
    pub fn all_numbers(&self) -> impl Iterator<Item = u64> + '_ {
        (self.ids[0]..self.ids[1]).map(|id| self.number(id))
    }

    /// The weight specifications of the part, by attribute. Tables of `const` and `neuron` are not among them.
    pub fn specs(&self) -> Vec<(&'static str, &WeightSpec)> {
        let all = match &self.kind {
            PartKind::Ffn(ffn) => return ffn.specs(),
            PartKind::Linear(bank) => vec![("w", Some(&bank.w)), ("bias", bank.bias.as_ref())],
            PartKind::Film(film) => vec![
                ("mul", Some(&film.mul)),
                ("mul_bias", film.mul_bias.as_ref()),
                ("add", Some(&film.add)),
                ("add_bias", film.add_bias.as_ref()),
            ],
            PartKind::Const { .. } | PartKind::Neuron(_) | PartKind::Identity {} | PartKind::Zero {} => Vec::new(),
        };
        all.into_iter().filter_map(|(name, spec)| spec.map(|s| (name, s))).collect()
    }

    /// Names of all weights of the part.
    pub fn weights(&self) -> Vec<&WeightName> {
        match &self.kind {
            PartKind::Const { value } => vec![value],
            PartKind::Neuron(neuron) => vec![&neuron.u, &neuron.v],
            PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) | PartKind::Identity {} | PartKind::Zero {} => {
                self.specs().into_iter().flat_map(|(_, spec)| spec.names()).collect()
            }
        }
    }

    /// Whether all experts of the part have the same shapes.
    fn is_uniform(&self, cx: &Cx<'_>) -> bool {
        let fixed = |name: &WeightName| {
            cx.weights.get(name).is_some_and(|w| w.shape.iter().all(|x| matches!(x, crate::Extent::Fixed(_))))
        };
        match &self.kind {
            PartKind::Const { .. } | PartKind::Neuron(_) => false,
            PartKind::Identity {} | PartKind::Zero {} => true,
            PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) => {
                self.specs().iter().all(|(_, spec)| match spec {
                    WeightSpec::Plain(name) => fixed(name),
                    WeightSpec::Base { .. } | WeightSpec::Ternary { .. } => spec.names().into_iter().all(fixed),
                    WeightSpec::Mul { .. }
                    | WeightSpec::Grouped { .. }
                    | WeightSpec::Slice { .. }
                    | WeightSpec::Take { .. } => false,
                })
            }
        }
    }

    /// Row that the part gives for its expert `e` over rows of shape `row`.
    fn row(&self, cx: &Cx<'_>, e: u64, row: &[u64], narrow: bool) -> OpResult<PartRow> {
        let width = || match row {
            [n] => Ok(*n),
            _ => Err(OpError::new(codes::SHAPE, format!("rows of {} meet a matrix, vectors are needed", numbers(row)))),
        };
        Ok(match &self.kind {
            PartKind::Ffn(ffn) => {
                ffn.check_attributes()?;
                let inner = narrow && ffn.down.is_none() && ffn.gate.is_none();
                let out = ffn.width(cx, e, width()?, inner)?;
                if ffn.down.is_some() { PartRow::Fixed(vec![out]) } else { PartRow::Inner(out) }
            }
            PartKind::Linear(bank) => PartRow::Fixed(vec![bank.width(cx, e, width()?, narrow)?]),
            PartKind::Film(film) => PartRow::Fixed(vec![film.width(cx, e, width()?)?]),
            PartKind::Const { value } => PartRow::Fixed(table_row(cx, value, e)?),
            PartKind::Neuron(neuron) => {
                let input = table_row(cx, &neuron.u, e)?;
                if input != [width()?] {
                    let text = format!("`u` has rows of {}, the data rows of {}", numbers(&input), numbers(row));
                    return Err(OpError::new(codes::FFN_SHAPES, text));
                }
                PartRow::Fixed(table_row(cx, &neuron.v, e)?)
            }
            PartKind::Identity {} => PartRow::Fixed(row.to_vec()),
            PartKind::Zero {} => PartRow::Any,
        })
    }
}

/// Shape of row `e` of a table.
fn table_row(cx: &Cx<'_>, name: &str, e: u64) -> OpResult<Vec<u64>> {
    let shape = cx.shape(name)?;
    match shape.split_first() {
        Some((rows, row)) if e < *rows => Ok(row.to_vec()),
        _ => Err(OpError::new(codes::EXTENT, format!("table `{name}` {} has no row {e}", numbers(&shape)))),
    }
}

impl LinearBank {
    /// Where the input width differs between experts, a row holds the widest, and each takes its first entries.
    fn width(&self, cx: &Cx<'_>, e: u64, width: u64, narrow: bool) -> OpResult<u64> {
        let shape = self.w.shape(cx, e)?;
        let [out, input] = matrix("w", &shape)?;
        let ragged = match &self.w {
            WeightSpec::Plain(name) => {
                cx.weight(name)?.shape.last().is_some_and(|x| matches!(x, crate::Extent::PerExpert(_)))
            }
            WeightSpec::Mul { .. }
            | WeightSpec::Base { .. }
            | WeightSpec::Grouped { .. }
            | WeightSpec::Ternary { .. }
            | WeightSpec::Slice { .. }
            | WeightSpec::Take { .. } => false,
        };
        if input != width && !((ragged || narrow) && input < width) {
            let text = format!("`w` {} meets rows of {width}", numbers(&shape));
            return Err(OpError::new(codes::FFN_SHAPES, text));
        }
        want_bias(cx, "bias", self.bias.as_ref(), e, out)?;
        Ok(out)
    }
}

impl Film {
    fn width(&self, cx: &Cx<'_>, e: u64, width: u64) -> OpResult<u64> {
        for (name, spec) in [("mul", &self.mul), ("add", &self.add)] {
            let shape = spec.shape(cx, e)?;
            if matrix(name, &shape)? != [width, width] {
                let text = format!("`{name}` is {}, [{width}, {width}] is needed", numbers(&shape));
                return Err(OpError::new(codes::FFN_SHAPES, text));
            }
        }
        want_bias(cx, "mul_bias", self.mul_bias.as_ref(), e, width)?;
        want_bias(cx, "add_bias", self.add_bias.as_ref(), e, width)?;
        Ok(width)
    }
}
