//! Rank groups of both layer kinds, in Megatron-Core's order.
//!
//! After `RankGenerator` of `megatron/core/parallel_state.py` (NVIDIA/Megatron-LM
//! at d98e8a64): the leftmost axis of the order has the smallest stride; a group
//! runs over its axes with the first fastest, groups run over the rest likewise.

use crate::{
    error::PlanError,
    mapping::{MAX_GPUS, Mapping},
};
use serde::Serialize;

/// Groups of one kind, each a list of ranks.
pub type GroupList = Vec<Vec<u32>>;

/// Rank groups of a mapping; serialises to the form of the published vectors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Groups {
    /// Data parallel ways of attention.
    pub dp: u64,
    /// Data parallel ways of experts.
    pub edp: u64,
    /// Groups of attention and dense layers.
    pub attention: AttentionGroups,
    /// Groups of expert layers.
    pub moe: ExpertGroups,
}

/// Groups of attention and dense layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "each field is the axis it names")]
pub struct AttentionGroups {
    pub tp: GroupList,
    pub cp: GroupList,
    pub dp: GroupList,
    pub pp: GroupList,
    pub dp_cp: GroupList,
    pub tp_cp: GroupList,
    pub tp_pp: GroupList,
}

/// Groups of expert layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "each field is the axis it names")]
pub struct ExpertGroups {
    pub etp: GroupList,
    pub ep: GroupList,
    pub edp: GroupList,
    pub pp: GroupList,
    pub etp_ep: GroupList,
    pub etp_ep_pp: GroupList,
}

/// One axis of the rank order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Tensor parallel (`etp` in the expert generator).
    Tp,
    /// Context parallel.
    Cp,
    /// Expert parallel.
    Ep,
    /// Data parallel (`edp` in the expert generator).
    Dp,
    /// Pipeline parallel.
    Pp,
}

impl Axis {
    const ALL: [Self; 5] = [Self::Tp, Self::Cp, Self::Ep, Self::Dp, Self::Pp];

    fn name(self) -> &'static str {
        match self {
            Self::Tp => "tp",
            Self::Cp => "cp",
            Self::Ep => "ep",
            Self::Dp => "dp",
            Self::Pp => "pp",
        }
    }
}

/// Axis order with sizes: one generator of rank groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generator {
    axes: Vec<(Axis, u64)>,
}

impl Generator {
    /// Orders the axes; an axis missing from `order` must have size 1 and is appended.
    fn new(order: &[Axis], size_of: impl Fn(Axis) -> u64) -> Result<Self, PlanError> {
        let mut axes: Vec<_> = order.iter().map(|&axis| (axis, size_of(axis))).collect();
        for axis in Axis::ALL {
            if order.contains(&axis) {
                continue;
            }
            let size = size_of(axis);
            if size != 1 {
                return Err(PlanError::mapping(
                    format!("{} is {size} but the order does not name it", axis.name()),
                    format!("add `{}` to the order, for example tp-cp-ep-dp-pp", axis.name()),
                ));
            }
            axes.push((axis, 1));
        }
        Ok(Self { axes })
    }

    /// Distance between neighbouring ranks of an axis.
    pub fn stride(&self, axis: Axis) -> u64 {
        self.axes.iter().take_while(|(a, _)| *a != axis).map(|(_, n)| n).product()
    }

    /// Position of a rank on an axis.
    pub fn position(&self, rank: u64, axis: Axis) -> u64 {
        let size = self.axes.iter().find(|(a, _)| *a == axis).map_or(1, |(_, n)| *n);
        rank / self.stride(axis) % size
    }

    /// All groups over the axes named.
    pub fn groups(&self, over: &[Axis]) -> GroupList {
        let mut stride = 1;
        let mut inner = Vec::new();
        let mut outer = Vec::new();
        for &(axis, size) in &self.axes {
            let digits = if over.contains(&axis) { &mut inner } else { &mut outer };
            digits.push((size, stride));
            stride *= size;
        }
        let members = offsets(&inner);
        offsets(&outer).into_iter().map(|base| members.iter().map(|m| base + m).collect()).collect()
    }
}

/// Offsets of a mixed-radix counter, first digit fastest.
fn offsets(digits: &[(u64, u64)]) -> Vec<u32> {
    let mut all = vec![0_u32];
    for &(size, stride) in digits {
        let block = all.len();
        all.reserve(block * (size as usize).saturating_sub(1));
        for step in 1..size {
            for k in 0..block {
                all.push(all[k] + (step * stride) as u32);
            }
        }
    }
    all
}

/// Parses an order such as `tp-cp-ep-dp-pp`.
///
/// # Errors
/// `E0402` for an unknown or repeated axis.
pub fn parse_order(order: &str) -> Result<Vec<Axis>, PlanError> {
    let mut axes = Vec::new();
    for name in order.to_ascii_lowercase().split('-') {
        let axis = Axis::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| {
            PlanError::mapping(
                format!("`{name}` in the order `{order}` is not an axis"),
                "axes are tp, cp, ep, dp and pp, joined by `-`, for example tp-cp-ep-dp-pp",
            )
        })?;
        if axes.contains(&axis) {
            return Err(PlanError::mapping(
                format!("the order `{order}` names {name} twice"),
                "name each axis once, for example tp-cp-ep-dp-pp",
            ));
        }
        axes.push(axis);
    }
    Ok(axes)
}

/// Checks a mapping and gives the generators of both layer kinds with `dp` and `edp`.
///
/// # Errors
/// `E0402` with the reason, and sizes that would work.
pub fn generators(gpus: u64, mapping: &Mapping, order: &str) -> Result<(Generator, Generator, u64, u64), PlanError> {
    let in_order = |e: PlanError| e.at("order");
    let axes = parse_order(order).map_err(in_order)?;
    let (dp, edp) = mapping.data_parallel(gpus)?;
    let attention = Generator::new(&axes, |axis| match axis {
        Axis::Tp => mapping.tp,
        Axis::Cp => mapping.cp,
        Axis::Ep => 1,
        Axis::Dp => dp,
        Axis::Pp => mapping.pp,
    })
    .map_err(in_order)?;
    let experts = Generator::new(&axes, |axis| match axis {
        Axis::Tp => mapping.etp,
        Axis::Cp => 1,
        Axis::Ep => mapping.ep,
        Axis::Dp => edp,
        Axis::Pp => mapping.pp,
    })
    .map_err(in_order)?;
    let pp_last = axes.last() == Some(&Axis::Pp);
    if !pp_last && mapping.pp > 1 && dp != edp {
        return Err(in_order(PlanError::mapping(
            "When not using pp-last rank ordering, the data parallel size of the attention and moe layers must be the same",
            format!(
                "put pp last ({}), or make tp x cp ({}) equal etp x ep ({})",
                crate::mapping::DEFAULT_ORDER,
                mapping.tp * mapping.cp,
                mapping.etp * mapping.ep
            ),
        )));
    }
    if mapping.pp > 1 && attention.stride(Axis::Pp) != experts.stride(Axis::Pp) {
        return Err(in_order(PlanError::mapping(
            "the pipeline groups of the attention and moe layers differ",
            format!("put pp last in the order ({})", crate::mapping::DEFAULT_ORDER),
        )));
    }
    Ok((attention, experts, dp, edp))
}

/// Distances between neighbouring ranks on each axis, which decide what links a group uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strides {
    pub(crate) tp: u64,
    pub(crate) cp: u64,
    pub(crate) dp: u64,
    pub(crate) pp: u64,
    pub(crate) etp: u64,
    pub(crate) ep: u64,
    pub(crate) edp: u64,
}

impl Strides {
    /// Strides of a mapping, or `None` when the order refuses it.
    pub(crate) fn new(gpus: u64, mapping: &Mapping, order: &str) -> Option<Self> {
        let (attention, experts, ..) = generators(gpus, mapping, order).ok()?;
        Some(Self {
            tp: attention.stride(Axis::Tp),
            cp: attention.stride(Axis::Cp),
            dp: attention.stride(Axis::Dp),
            pp: attention.stride(Axis::Pp),
            etp: experts.stride(Axis::Tp),
            ep: experts.stride(Axis::Ep),
            edp: experts.stride(Axis::Dp),
        })
    }

    /// Strides in the default order, where they are products of the sizes before.
    pub(crate) fn in_default_order(gpus: u64, m: &Mapping) -> Self {
        Self { tp: 1, cp: m.tp, dp: m.tp * m.cp, pp: gpus / m.pp, etp: 1, ep: m.etp, edp: m.etp * m.ep }
    }
}

/// Rank groups of both layer kinds.
///
/// # Errors
/// `E0402` for a mapping that does not fit, as [`generators`].
pub fn groups(gpus: u64, mapping: &Mapping, order: &str) -> Result<Groups, PlanError> {
    debug_assert!(MAX_GPUS < u64::from(u32::MAX));
    let (attention, experts, dp, edp) = generators(gpus, mapping, order)?;
    Ok(Groups {
        dp,
        edp,
        attention: AttentionGroups {
            tp: attention.groups(&[Axis::Tp]),
            cp: attention.groups(&[Axis::Cp]),
            dp: attention.groups(&[Axis::Dp]),
            pp: attention.groups(&[Axis::Pp]),
            dp_cp: attention.groups(&[Axis::Dp, Axis::Cp]),
            tp_cp: attention.groups(&[Axis::Tp, Axis::Cp]),
            tp_pp: attention.groups(&[Axis::Tp, Axis::Pp]),
        },
        moe: ExpertGroups {
            etp: experts.groups(&[Axis::Tp]),
            ep: experts.groups(&[Axis::Ep]),
            edp: experts.groups(&[Axis::Dp]),
            pp: experts.groups(&[Axis::Pp]),
            etp_ep: experts.groups(&[Axis::Tp, Axis::Ep]),
            etp_ep_pp: experts.groups(&[Axis::Tp, Axis::Ep, Axis::Pp]),
        },
    })
}
