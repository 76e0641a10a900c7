//! Element types.

use serde::{Deserialize, Serialize};

/// Type of one element of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// IEEE double; only in references.
    F64,
    /// IEEE single.
    F32,
    /// bfloat16: the upper half of an `F32`.
    Bf16,
    /// IEEE half.
    F16,
    /// 8-bit float, 4 exponent bits, no infinities (OCP E4M3).
    F8e4m3,
    /// 8-bit float, 5 exponent bits (OCP E5M2).
    F8e5m2,
    /// Unsigned byte: packed codes and shared exponents.
    U8,
    /// Signed byte.
    I8,
    /// 32-bit signed: expert ids, classes.
    I32,
    /// 64-bit signed: token ids in tables.
    I64,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F8e4m3 | Self::F8e5m2 | Self::U8 | Self::I8 => 1,
        }
    }

    /// Name in IR text: `f32`, `bf16`, `f8e4m3`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F8e4m3 => "f8e4m3",
            Self::F8e5m2 => "f8e5m2",
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::I32 => "i32",
            Self::I64 => "i64",
        }
    }

    /// Whether values are floating point.
    pub const fn is_float(self) -> bool {
        match self {
            Self::F64 | Self::F32 | Self::Bf16 | Self::F16 | Self::F8e4m3 | Self::F8e5m2 => true,
            Self::U8 | Self::I8 | Self::I32 | Self::I64 => false,
        }
    }

    /// Every type, in declaration order.
    pub const ALL: [Self; 10] = [
        Self::F64,
        Self::F32,
        Self::Bf16,
        Self::F16,
        Self::F8e4m3,
        Self::F8e5m2,
        Self::U8,
        Self::I8,
        Self::I32,
        Self::I64,
    ];
}
