//! The closed set of operations.

use crate::ops::{
    Adjust, Attention, Binary, Combine, Count, Described, Dispatch, Einsum, Experts, Ffn, Gather, Input, Kernel, Limit,
    Linear, Norm, Override, Param, Plan, ProductKey, Reduce, Select, Shape, Softmax, Transport, Unary, Weigh,
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
                    $(Self::$variant(op) => serde_json::to_value(op),)*
                    Self::Kernel(_) => Ok(serde_json::Value::Null),
                }
            }

            /// The operation `name` with these attributes; `None` when there is no such operation.
            ///
            /// # Errors
            /// When an attribute is unknown, missing or of the wrong kind.
            pub fn from_attributes(name: &str, attributes: serde_json::Value) -> Option<Result<Self, serde_json::Error>> {
                match name {
                    $($name => Some(serde_json::from_value::<$ty>(attributes).map(Self::$variant)),)*
                    _ => None,
                }
            }
        }
    };
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
}
