//! Folded mappings: how ranks are shared between attention and expert layers.
//!
//! Attention uses `tp x cp x dp x pp`, experts `etp x ep x edp x pp`, over the
//! same ranks (MoE Parallel Folding, arXiv 2504.14960, section 3). A mapping
//! holds the free sizes; `dp` and `edp` follow from the number of GPUs.

use crate::error::PlanError;
use serde::{Deserialize, Serialize};

/// Megatron-Core's default rank order: the leftmost axis varies fastest.
pub const DEFAULT_ORDER: &str = "tp-cp-ep-dp-pp";

/// Largest number of GPUs that is accepted; above it is taken for a typing error.
pub const MAX_GPUS: u64 = 1 << 20;

/// The free sizes of a folded mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mapping {
    /// Tensor parallel ways of attention and dense layers.
    pub tp: u64,
    /// Context parallel ways of attention.
    pub cp: u64,
    /// Pipeline stages, shared by both layer kinds.
    pub pp: u64,
    /// Expert parallel ways.
    pub ep: u64,
    /// Tensor parallel ways inside an expert.
    pub etp: u64,
}

impl Mapping {
    /// A mapping on one rank.
    pub const ONE: Self = Self { tp: 1, cp: 1, pp: 1, ep: 1, etp: 1 };

    /// Data parallel ways of attention and of experts on `gpus` ranks.
    ///
    /// # Errors
    /// `E0402` when a size is zero, too large, or does not divide `gpus`.
    pub fn data_parallel(&self, gpus: u64) -> Result<(u64, u64), PlanError> {
        check_gpus(gpus).map_err(|e| e.at("gpus"))?;
        let attention = self.ways("tp", "cp", self.tp, self.cp, gpus).map_err(|e| e.under("attention"))?;
        let experts = self.ways("etp", "ep", self.etp, self.ep, gpus).map_err(|e| e.under("experts"))?;
        if !gpus.is_multiple_of(attention) {
            return Err(PlanError::mapping(
                format!("world_size ({gpus}) is not divisible by {attention}"),
                format!(
                    "tp x cp x pp must divide {gpus}; tp x cp = {} works with pp in {}, pp = {} works with tp x cp in {}",
                    self.tp * self.cp,
                    cofactors(gpus, self.tp * self.cp),
                    self.pp,
                    cofactors(gpus, self.pp)
                ),
            )
            .at("attention"));
        }
        if !gpus.is_multiple_of(experts) {
            return Err(PlanError::mapping(
                format!(
                    "world_size ({gpus}) is not divisible by expert_tensor_model_pipeline_parallel size ({experts})"
                ),
                format!(
                    "etp x ep x pp must divide {gpus}; etp = {} and pp = {} work with ep in {}",
                    self.etp,
                    self.pp,
                    cofactors(gpus, self.etp * self.pp)
                ),
            )
            .at("experts"));
        }
        Ok((gpus / attention, gpus / experts))
    }

    fn ways(&self, first: &str, second: &str, a: u64, b: u64, gpus: u64) -> Result<u64, PlanError> {
        for (name, size) in [(first, a), (second, b), ("pp", self.pp)] {
            if size == 0 || size > gpus {
                return Err(PlanError::mapping(
                    format!("{name} = {size} is outside 1..={gpus}"),
                    format!("{name} must be a divisor of {gpus}: {}", list(&divisors(gpus))),
                )
                .at(name));
            }
        }
        // Each factor is at most MAX_GPUS = 2^20, so the product of three stays below 2^60.
        a.checked_mul(b).and_then(|x| x.checked_mul(self.pp)).ok_or_else(|| {
            PlanError::mapping(
                format!("{first} x {second} x pp is larger than the number of GPUs ({gpus})"),
                format!("choose sizes whose product divides {gpus}"),
            )
        })
    }

    /// Parses `tp=2,ep=8,pp=8,etp=1`; sizes left out are `None`.
    ///
    /// # Errors
    /// `E0402` for an unknown name, a repeated name or a value that is not a positive integer.
    pub fn parse_fixed(text: &str) -> Result<Fixed, PlanError> {
        let mut fixed = Fixed::default();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (name, value) = part.split_once('=').ok_or_else(|| {
                PlanError::mapping(format!("`{part}` is not NAME=SIZE"), "write for example tp=2,ep=8,pp=8,etp=1")
            })?;
            fixed.set(name.trim(), value.trim())?;
        }
        Ok(fixed)
    }
}

/// Refuses zero and absurd numbers of GPUs.
///
/// # Errors
/// `E0402` outside `1..=MAX_GPUS`.
pub fn check_gpus(gpus: u64) -> Result<(), PlanError> {
    if gpus == 0 || gpus > MAX_GPUS {
        return Err(PlanError::mapping(
            format!("{gpus} GPUs is outside 1..={MAX_GPUS}"),
            "give the number of GPUs of the job, for example 64 or 1024",
        ));
    }
    Ok(())
}

/// Sizes a user pinned (`--fix`); `None` is free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fixed {
    /// Tensor parallel ways.
    pub tp: Option<u64>,
    /// Context parallel ways.
    pub cp: Option<u64>,
    /// Data parallel ways of attention.
    pub dp: Option<u64>,
    /// Pipeline stages.
    pub pp: Option<u64>,
    /// Expert tensor parallel ways.
    pub etp: Option<u64>,
    /// Expert parallel ways.
    pub ep: Option<u64>,
    /// Data parallel ways of experts.
    pub edp: Option<u64>,
    /// Sequences per micro-batch.
    pub mbs: Option<u64>,
    /// Virtual stages per pipeline rank.
    pub vpp: Option<u64>,
}

impl Fixed {
    fn set(&mut self, name: &str, value: &str) -> Result<(), PlanError> {
        let size: u64 = value.parse().ok().filter(|&v| v > 0).ok_or_else(|| {
            PlanError::mapping(format!("{name} = `{value}` is not a positive integer"), "sizes start at 1")
        })?;
        let slot = match name {
            "tp" => &mut self.tp,
            "cp" => &mut self.cp,
            "dp" => &mut self.dp,
            "pp" => &mut self.pp,
            "etp" => &mut self.etp,
            "ep" => &mut self.ep,
            "edp" => &mut self.edp,
            "mbs" | "micro_batch" => &mut self.mbs,
            "vpp" | "vp" => &mut self.vpp,
            _ => {
                return Err(PlanError::mapping(
                    format!("`{name}` is not a size that can be fixed"),
                    "known names: tp, cp, dp, pp, etp, ep, edp, mbs, vpp",
                ));
            }
        };
        if slot.replace(size).is_some_and(|old| old != size) {
            return Err(PlanError::mapping(format!("{name} is fixed twice"), "give each name once"));
        }
        Ok(())
    }

    /// Refuses pinned sizes that no job of so many GPUs can have together.
    ///
    /// # Errors
    /// `E0402` names the product, and what each size can be when the others are kept.
    pub(crate) fn check_products(&self, gpus: u64) -> Result<(), PlanError> {
        let attention = [("tp", self.tp), ("cp", self.cp), ("dp", self.dp), ("pp", self.pp)];
        let experts = [("etp", self.etp), ("ep", self.ep), ("edp", self.edp), ("pp", self.pp)];
        for axes in [attention, experts] {
            let pinned: Vec<(&str, u64)> = axes.iter().filter_map(|(name, size)| Some((*name, (*size)?))).collect();
            let product = pinned.iter().try_fold(1_u64, |p, (_, size)| p.checked_mul(*size));
            let all = pinned.len() == axes.len();
            if product.is_some_and(|p| p > 0 && if all { p == gpus } else { gpus.is_multiple_of(p) }) {
                continue;
            }
            let text: Vec<String> = pinned.iter().map(|(name, size)| format!("{name} {size}")).collect();
            let is = product.map_or_else(String::new, |p| format!(" = {p}"));
            let ways: Vec<String> = pinned
                .iter()
                .map(|(name, size)| {
                    let others = product.map_or(0, |p| p / (*size).max(1));
                    format!("{name} can be {}", cofactors(gpus, others))
                })
                .collect();
            return Err(PlanError::mapping(
                format!("{}{is} does not make {gpus} GPUs", text.join(" x ")),
                format!("with the others kept: {}; or leave one out", ways.join("; ")),
            ));
        }
        Ok(())
    }

    /// The mapping that the pinned sizes describe, with 1 for what is free.
    ///
    /// `etp` follows `tp` when it is not given, as in Megatron-Core.
    pub fn mapping(&self) -> Mapping {
        let tp = self.tp.unwrap_or(1);
        Mapping {
            tp,
            cp: self.cp.unwrap_or(1),
            pp: self.pp.unwrap_or(1),
            ep: self.ep.unwrap_or(1),
            etp: self.etp.unwrap_or(tp),
        }
    }
}

/// Divisors in ascending order.
pub fn divisors(n: u64) -> Vec<u64> {
    let mut low = Vec::new();
    let mut high = Vec::new();
    let mut d = 1;
    while d * d <= n {
        if n.is_multiple_of(d) {
            low.push(d);
            if d * d != n {
                high.push(n / d);
            }
        }
        d += 1;
    }
    low.extend(high.into_iter().rev());
    low
}

/// Divisors of `n / used`, as text; says so when `used` itself does not divide.
pub(crate) fn cofactors(n: u64, used: u64) -> String {
    if used == 0 || !n.is_multiple_of(used) {
        return format!("none ({used} does not divide {n}; its divisors are {})", list(&divisors(n)));
    }
    list(&divisors(n / used))
}

/// A short list for a message: all of up to 16 values, otherwise the ends.
pub(crate) fn list(values: &[u64]) -> String {
    let text = |v: &[u64]| v.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    match values {
        [] => "none".to_owned(),
        v if v.len() <= 16 => text(v),
        v => format!("{}, …, {}", text(&v[..12]), text(&v[v.len() - 2..])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_sizes_parse_and_unknown_names_are_listed() {
        let fixed = Mapping::parse_fixed("tp=2, ep=8,pp=8").unwrap();
        assert_eq!(fixed.mapping(), Mapping { tp: 2, cp: 1, pp: 8, ep: 8, etp: 2 });
        let error = Mapping::parse_fixed("tq=2").unwrap_err();
        assert_eq!(error.code, "E0402");
        assert!(error.help.contains("etp"));
        assert!(Mapping::parse_fixed("tp=0").is_err());
        assert!(Mapping::parse_fixed("tp=2,tp=4").is_err());
    }

    #[test]
    fn zero_and_huge_sizes_are_refused_with_divisors() {
        for mapping in [Mapping { tp: 0, ..Mapping::ONE }, Mapping { ep: u64::MAX, ..Mapping::ONE }] {
            let error = mapping.data_parallel(12).unwrap_err();
            assert!(error.help.contains("1, 2, 3, 4, 6, 12"), "{error:?}");
        }
        assert!(Mapping::ONE.data_parallel(0).is_err());
        assert!(Mapping::ONE.data_parallel(u64::MAX).is_err());
    }
}
