//! Rounding of stored values, where the model rounds between ops.

use super::{Array, ArrayData, Failure, Step, Value};
use crate::DType;
use half::{bf16, f16};

/// The value as it is stored in `dtype`; arithmetic before is in f32.
pub(super) fn round(value: Value, dtype: DType) -> Step<Value> {
    let to: fn(f64) -> f64 = match dtype {
        DType::F64 => |x| x,
        #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
        DType::F32 => |x| f64::from(x as f32),
        #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
        DType::Bf16 => |x| f64::from(bf16::from_f32(x as f32)),
        #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
        DType::F16 => |x| f64::from(f16::from_f32(x as f32)),
        DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
            return Err(Failure(format!("rounding to {} is not part of the interpreter", dtype.name())));
        }
    };
    let all = |data: Vec<f64>| data.into_iter().map(to).collect();
    Ok(match value {
        Value::Tensor(Array { shape, data: ArrayData::F64(data) }) => Value::Tensor(Array::f64(shape, all(data))),
        Value::Tensor(ids) => Value::Tensor(ids),
        Value::Route(mut route) => {
            route.weights = route.weights.map(all);
            Value::Route(route)
        }
        Value::Plan(plan) => Value::Plan(plan),
        Value::Ragged(mut rows) => {
            rows.data = all(rows.data);
            Value::Ragged(rows)
        }
    })
}
