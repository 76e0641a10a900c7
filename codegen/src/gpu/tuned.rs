//! What a measurement may change of how products are scheduled, and the table of what was measured.

use super::Mode;
use crate::{Target, grouped::Grouped};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The numbers of a product's schedule that a device decides better than an estimate.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Most tokens of a launch that the kernel for few tokens takes; 0: it is left out.
    pub few_tokens: u64,
    /// Rows of an expert, in the mean of a launch, up to which tiles are low and more stages are in flight. Of kernels
    /// with `wgmma` alone.
    pub rare_rows: u64,
    /// Rows of the highest tile, of all blocks that share it.
    pub tallest: u32,
}

impl Choice {
    /// What is taken for a product that nobody measured: the tallest tiles, and limits that follow from bytes in
    /// flight.
    pub fn usual(spec: &Grouped, target: Target) -> Self {
        let few_tokens = super::decode(spec, target).map_or(0, |(_, most)| most);
        let unlimited = Self { few_tokens, rare_rows: RARE_ROWS, tallest: u32::MAX };
        let kernels = super::variants_as(spec, target, &unlimited);
        let rows = kernels.iter().flat_map(|kernel| &kernel.schedule.modes).map(Mode::rows);
        Self { tallest: rows.max().unwrap_or(1), ..unlimited }
    }

    /// The same without a kernel for few tokens: the others take every number.
    pub fn without_few(spec: &Grouped, target: Target) -> Self {
        Self { few_tokens: 0, ..Self::usual(spec, target) }
    }

    /// Every other choice that differs from this one in one number and leads to other kernels.
    pub fn neighbours(&self, spec: &Grouped, target: Target) -> Vec<Self> {
        let usual = Self::usual(spec, target);
        let few = [0, usual.few_tokens / 4, usual.few_tokens / 2, usual.few_tokens];
        let few = few.map(|few_tokens| Self { few_tokens, ..self.clone() });
        let rare = [0, 16, 32, RARE_ROWS, 96].map(|rare_rows| Self { rare_rows, ..self.clone() });
        let tall = [16, 64, 128, 256].into_iter().filter(|rows| *rows <= usual.tallest);
        let tall = tall.map(|tallest| Self { tallest, ..self.clone() });
        let kernels = |choice: &Self| super::variants_as(spec, target, choice);
        let own = kernels(self);
        let mut all: Vec<(Self, Vec<super::Variant>)> = Vec::new();
        for choice in few.into_iter().chain(rare).chain(tall) {
            let made = kernels(&choice);
            if made != own && all.iter().all(|(_, known)| *known != made) {
                all.push((choice, made));
            }
        }
        all.into_iter().map(|(choice, _)| choice).collect()
    }
}

/// The rows of an expert up to which more bytes in flight matter more than fewer tiles.
const RARE_ROWS: u64 = 48;

/// Choices by product, as [`product`] names them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Table(pub BTreeMap<String, Choice>);

impl Table {
    /// The choice for a product: what was measured, or [`Choice::usual`].
    pub fn choice(&self, spec: &Grouped, target: Target) -> Choice {
        self.0.get(&product(spec, target)).cloned().unwrap_or_else(|| Choice::usual(spec, target))
    }
}

/// Name of a product in tables: what its time depends on.
pub fn product(spec: &Grouped, target: Target) -> String {
    let weights = match spec.codes {
        Some(codes) => format!("codes{}", codes.bits),
        None => format!("{:?}", spec.w).to_lowercase(),
    };
    let (experts, matrices, n, k) = (spec.experts, spec.matrices, spec.n, spec.k);
    let rows = format!("{:?}", spec.rows).to_lowercase();
    format!("{} {rows} {experts} x {matrices} x {n} x {k} {weights}", target.name())
}
