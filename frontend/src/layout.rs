//! How checkpoints store the three matrices of gated experts.
//!
//! Every function names one layout of the families and returns where gate, up and down are read
//! from, as `[inner, in]`, `[inner, in]` and `[out, inner]`.

use moec_ir::{Packing, Source, View};

/// Sources of gate, up and down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Glu {
    pub(crate) gate: Source,
    pub(crate) up: Source,
    pub(crate) down: Source,
}

/// A tensor with steps to the weight.
pub(crate) fn viewed(tensor: impl Into<String>, view: Vec<View>) -> Source {
    Source { tensor: tensor.into(), packing: Packing::Plain, view }
}

/// A range of an axis.
pub(crate) const fn slice(axis: u64, start: u64, len: u64) -> View {
    View::Slice { axis, start, len, step: 1 }
}

/// Every second entry of an axis.
pub(crate) const fn every_second(axis: u64, start: u64, len: u64) -> View {
    View::Slice { axis, start, len, step: 2 }
}

/// One tensor for each matrix, `[out, in]`.
pub(crate) fn plain(gate: &str, up: &str, down: &str) -> Glu {
    Glu { gate: Source::plain(gate), up: Source::plain(up), down: Source::plain(down) }
}

/// `DIR.gate_proj.weight`, `.up_proj.weight`, `.down_proj.weight`.
pub(crate) fn proj(dir: &str) -> Glu {
    plain(&format!("{dir}.gate_proj.weight"), &format!("{dir}.up_proj.weight"), &format!("{dir}.down_proj.weight"))
}

/// L-split: one tensor for each expert and matrix.
pub(crate) fn split() -> Glu {
    proj("{p}experts.{e}")
}

/// L-w123: `w1` gate, `w3` up, `w2` down.
pub(crate) fn w123(dir: &str) -> Glu {
    plain(&format!("{dir}.w1.weight"), &format!("{dir}.w3.weight"), &format!("{dir}.w2.weight"))
}

/// Experts stacked, `[E, 2I, H]` with gate rows first, and `[E, H, I]`.
pub(crate) fn stacked(gate_up: &str, down: &str, inner: u64) -> Glu {
    Glu {
        gate: viewed(gate_up, vec![View::Expert, slice(0, 0, inner)]),
        up: viewed(gate_up, vec![View::Expert, slice(0, inner, inner)]),
        down: viewed(down, vec![View::Expert]),
    }
}

/// L-fused: `experts.gate_up_proj` `[E, 2I, H]`, `experts.down_proj` `[E, H, I]`.
pub(crate) fn fused(inner: u64) -> Glu {
    stacked("{p}experts.gate_up_proj", "{p}experts.down_proj", inner)
}

/// Experts stacked and transposed, `[E, H, 2I]` with gate columns first, and `[E, I, H]`.
pub(crate) fn stacked_transposed(gate_up: &str, down: &str, inner: u64) -> Glu {
    Glu {
        gate: viewed(gate_up, vec![View::Expert, slice(1, 0, inner), View::Transpose]),
        up: viewed(gate_up, vec![View::Expert, slice(1, inner, inner), View::Transpose]),
        down: viewed(down, vec![View::Expert, View::Transpose]),
    }
}

/// L-fusedT: as L-fused, transposed.
pub(crate) fn fused_transposed(inner: u64) -> Glu {
    stacked_transposed("{p}experts.gate_up_proj", "{p}experts.down_proj", inner)
}

/// gpt-oss: transposed, columns interleaved `g0, u0, g1, u1, ..`.
pub(crate) fn interleaved_columns(inner: u64) -> Glu {
    let gate_up = "{p}experts.gate_up_proj";
    Glu {
        gate: viewed(gate_up, vec![View::Expert, every_second(1, 0, inner), View::Transpose]),
        up: viewed(gate_up, vec![View::Expert, every_second(1, 1, inner), View::Transpose]),
        down: viewed("{p}experts.down_proj", vec![View::Expert, View::Transpose]),
    }
}

/// Rows interleaved `g0, u0, g1, u1, ..` in `[E, 2I, H]`.
pub(crate) fn interleaved_rows(gate_up: &str, down: &str, inner: u64) -> Glu {
    Glu {
        gate: viewed(gate_up, vec![View::Expert, every_second(0, 0, inner)]),
        up: viewed(gate_up, vec![View::Expert, every_second(0, 1, inner)]),
        down: viewed(down, vec![View::Expert]),
    }
}

/// gpt-oss release: MXFP4, rows are outputs, interleaved.
pub(crate) fn mxfp4(inner: u64) -> Glu {
    let pack = |mut source: Source, name: &str| {
        source.packing = Packing::Mxfp4 { scales: format!("{{p}}experts.{name}_scales") };
        source
    };
    let glu = interleaved_rows("{p}experts.gate_up_proj_blocks", "{p}experts.down_proj_blocks", inner);
    Glu { gate: pack(glu.gate, "gate_up_proj"), up: pack(glu.up, "gate_up_proj"), down: pack(glu.down, "down_proj") }
}

/// DBRX: all experts stacked by rows, `[E * I, H]`; `w2` is used as in times out.
pub(crate) fn expert_rows(inner: u64) -> Glu {
    let rows = View::ExpertRows { rows: inner };
    Glu {
        gate: viewed("{p}experts.mlp.w1", vec![rows.clone()]),
        up: viewed("{p}experts.mlp.v1", vec![rows.clone()]),
        down: viewed("{p}experts.mlp.w2", vec![rows, View::Transpose]),
    }
}
