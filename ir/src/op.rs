//! The closed set of operations.

use crate::{
    Type, WeightName, codes,
    infer::{Cx, OpError, OpResult},
    ops::{
        Adjust, Attention, Binary, Collective, Combine, Count, Described, Dispatch, Einsum, Experts, Ffn, Gather,
        Input, Kernel, Limit, Linear, Norm, Override, Param, Plan, ProductKey, Reduce, Select, Shape, Softmax,
        Transport, Unary, Weigh,
    },
};

macro_rules! ops {
    ($($(#[$doc:meta])* $variant:ident($ty:ty) = $name:literal,)*) => {
        /// An operation with its attributes.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op {
            $($(#[$doc])* $variant($ty),)*
            /// A fused region (`kernel.gate`, `kernel.up`, ..).
            Kernel(Kernel),
        }

        impl Op {
            /// Names of all operations that have attributes only (every one but `kernel`).
            pub const NAMES: &'static [&'static str] = &[$($name,)*];

            /// Name in IR text and in graph JSON.
            pub const fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)*
                    Self::Kernel(_) => "kernel",
                }
            }

            /// The attributes as JSON; `null` for a kernel, whose body is not an attribute.
            ///
            /// # Errors
            /// When a number has no JSON form (NaN, infinity).
            pub fn attributes(&self) -> Result<serde_json::Value, serde_json::Error> {
                match self {
                    $(Self::$variant(op) => serde_json::to_value(op).and_then(finite),)*
                    Self::Kernel(_) => Ok(serde_json::Value::Null),
                }
            }

            /// Type of the value over operands of these types. A kernel is typed by its graph.
            pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
                match self {
                    $(Self::$variant(op) => op.infer(cx, operands),)*
                    Self::Kernel(_) => Err(OpError::new(codes::KERNEL, "a kernel is typed by its body")),
                }
            }

            /// The operation `name` with these attributes; `None` when there is no such operation.
            ///
            /// # Errors
            /// When an attribute is unknown, missing or of the wrong kind.
            pub fn from_attributes(name: &str, attributes: serde_json::Value) -> Option<Result<Self, serde_json::Error>> {
                if let Some(error) = unit_rule(name, &attributes).or_else(|| numbered_tag(&attributes)) {
                    return Some(Err(error));
                }
                match name {
                    $($name => Some(serde_json::from_value::<$ty>(attributes).map(Self::$variant)),)*
                    _ => None,
                }
            }
        }
    };
}

/// Attributes that are absent are left out, so `null` can only be a number without a JSON form.
fn finite(value: serde_json::Value) -> Result<serde_json::Value, serde_json::Error> {
    fn has_null(value: &serde_json::Value) -> bool {
        match value {
            serde_json::Value::Null => true,
            serde_json::Value::Array(items) => items.iter().any(has_null),
            serde_json::Value::Object(map) => map.values().any(has_null),
            serde_json::Value::Bool(_) | serde_json::Value::Number(_) | serde_json::Value::String(_) => false,
        }
    }
    if has_null(&value) {
        return Err(serde::ser::Error::custom("an attribute is NaN or infinite"));
    }
    Ok(value)
}

/// Serde takes any fields beside the tag of a variant without fields, so `rule: all` is checked here.
fn unit_rule(name: &str, attributes: &serde_json::Value) -> Option<serde_json::Error> {
    let map = attributes.as_object()?;
    if name != "select" || map.get("rule")?.as_str()? != "all" {
        return None;
    }
    let other = map.keys().find(|key| *key != "rule")?;
    Some(serde::de::Error::custom(format!("unknown field `{other}`, the rule `all` has none")))
}

/// Serde takes a number for the name of a variant, by position, so `kind: 1` is checked here.
fn numbered_tag(attributes: &serde_json::Value) -> Option<serde_json::Error> {
    match attributes {
        serde_json::Value::Array(items) => items.iter().find_map(numbered_tag),
        serde_json::Value::Object(map) => map.iter().find_map(|(key, value)| {
            if matches!(key.as_str(), "kind" | "rule" | "fn") && !value.is_string() {
                return Some(serde::de::Error::custom(format!("`{key}` is {value}, a name is needed")));
            }
            numbered_tag(value)
        }),
        serde_json::Value::Null
        | serde_json::Value::Bool(_)
        | serde_json::Value::Number(_)
        | serde_json::Value::String(_) => None,
    }
}

ops! {
    /// A value that the caller passes in.
    Input(Input) = "input",
    /// A weight as a value.
    Param(Param) = "param",
    /// Matrix product with a weight.
    Linear(Linear) = "linear",
    /// Function of one value.
    Unary(Unary) = "unary",
    /// Function of two values.
    Binary(Binary) = "binary",
    /// Normalisation.
    Norm(Norm) = "norm",
    /// Softmax.
    Softmax(Softmax) = "softmax",
    /// Sum of products over named axes.
    Einsum(Einsum) = "einsum",
    /// Reduction of an axis.
    Reduce(Reduce) = "reduce",
    /// Rearrangement.
    Shape(Shape) = "shape",
    /// Rows of a table.
    Gather(Gather) = "gather",
    /// Attention.
    Attention(Attention) = "attention",
    /// Changes of scores.
    Adjust(Adjust) = "adjust",
    /// Transport plan.
    Transport(Transport) = "transport",
    /// Choice of experts.
    Select(Select) = "select",
    /// Choice among n*n experts.
    ProductKey(ProductKey) = "product_key",
    /// Capacity.
    Limit(Limit) = "limit",
    /// Weights of slots.
    Weigh(Weigh) = "weigh",
    /// Rows with a fixed expert.
    Override(Override) = "override",
    /// Tokens per expert.
    Count(Count) = "count",
    /// Rows to experts.
    Dispatch(Dispatch) = "dispatch",
    /// Expert banks.
    Experts(Experts) = "experts",
    /// Expert rows back to tokens.
    Combine(Combine) = "combine",
    /// Dense feed-forward network.
    Ffn(Box<Ffn>) = "ffn",
    /// Positions of rows sorted by expert.
    Plan(Plan) = "plan",
    /// A layer that is described, not compiled.
    Described(Described) = "described",
    /// Rows of other ranks.
    Collective(Collective) = "collective",
}

impl Op {
    /// Whether results of a row depend on the other rows of the batch; a kernel's by its body.
    pub fn is_batch_dependent(&self) -> bool {
        match self {
            Self::Transport(_) | Self::Limit(_) => true,
            Self::Select(select) => matches!(select.rule, crate::ops::SelectRule::ExpertChoice { .. }),
            Self::Kernel(op) => op.body.ids().into_iter().any(|n| op.body.node(n).op.is_batch_dependent()),
            Self::Input(_)
            | Self::Param(_)
            | Self::Linear(_)
            | Self::Unary(_)
            | Self::Binary(_)
            | Self::Norm(_)
            | Self::Softmax(_)
            | Self::Einsum(_)
            | Self::Reduce(_)
            | Self::Shape(_)
            | Self::Gather(_)
            | Self::Attention(_)
            | Self::Adjust(_)
            | Self::ProductKey(_)
            | Self::Weigh(_)
            | Self::Override(_)
            | Self::Count(_)
            | Self::Dispatch(_)
            | Self::Experts(_)
            | Self::Combine(_)
            | Self::Ffn(_)
            | Self::Plan(_)
            | Self::Described(_)
            | Self::Collective(_) => false,
        }
    }

    /// Names of the weights that the operation reads, in the order of its attributes; a kernel's are its body's.
    pub fn weights(&self) -> Vec<&WeightName> {
        match self {
            Self::Param(op) => vec![&op.w],
            Self::Linear(op) => [Some(&op.w), op.b.as_ref()].into_iter().flatten().collect(),
            Self::Binary(op) => op.w.iter().collect(),
            Self::Norm(op) => [&op.w, &op.b, &op.mean, &op.var].into_iter().flatten().collect(),
            Self::Gather(op) => vec![&op.w],
            Self::Adjust(op) => op.add.iter().collect(),
            Self::ProductKey(ProductKey::Sum { k1, k2, .. }) => vec![k1, k2],
            Self::ProductKey(ProductKey::Tucker { core, u, v, .. }) => vec![core, u, v],
            Self::Weigh(op) => op.expert_scale.iter().collect(),
            Self::Experts(op) => op.bank.iter().flat_map(crate::ops::BankPart::weights).collect(),
            Self::Ffn(op) => op.specs().into_iter().flat_map(|(_, spec)| spec.names()).collect(),
            Self::Kernel(op) => op.body.ids().into_iter().flat_map(|n| op.body.node(n).op.weights()).collect(),
            Self::ProductKey(ProductKey::Scores { .. })
            | Self::Input(_)
            | Self::Unary(_)
            | Self::Softmax(_)
            | Self::Einsum(_)
            | Self::Reduce(_)
            | Self::Shape(_)
            | Self::Attention(_)
            | Self::Transport(_)
            | Self::Select(_)
            | Self::Limit(_)
            | Self::Override(_)
            | Self::Count(_)
            | Self::Dispatch(_)
            | Self::Combine(_)
            | Self::Plan(_)
            | Self::Described(_)
            | Self::Collective(_) => Vec::new(),
        }
    }
}
