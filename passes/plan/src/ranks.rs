//! A mapping as one rank sees it: who shares its experts, which tokens it starts with, which layers it has.

use crate::{
    error::PlanError,
    groups::{Axis, Generator, generators},
    mapping::Mapping,
    members::{self, Due, Need},
};
use serde::Deserialize;
use serde_json::Value;

/// A mapping of a whole job, read from what `moec plan --format json` printed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Layout {
    /// GPUs of the job.
    pub gpus: u64,
    attention: Ways,
    experts: Ways,
    #[serde(default = "default_order")]
    order: String,
    #[serde(default)]
    stage_layers: Vec<Vec<(u64, u64)>>,
}

/// Sizes that a plan states; those left out are 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Ways {
    tp: u64,
    cp: u64,
    pp: u64,
    etp: u64,
    ep: u64,
}

impl Default for Ways {
    fn default() -> Self {
        Self { tp: 1, cp: 1, pp: 1, etp: 1, ep: 1 }
    }
}

fn default_order() -> String {
    crate::DEFAULT_ORDER.to_owned()
}

/// What a plan consists of as far as ranks need it.
const MEMBERS: [(&str, Due, Need); 14] = [
    ("", Due::Object, Need::Needed),
    ("gpus", Due::Positive, Need::Needed),
    ("attention", Due::Object, Need::Needed),
    ("experts", Due::Object, Need::Needed),
    ("attention.tp", Due::Positive, Need::Free),
    ("attention.cp", Due::Positive, Need::Free),
    ("attention.dp", Due::Positive, Need::Free),
    ("attention.pp", Due::Positive, Need::Free),
    ("experts.etp", Due::Positive, Need::Free),
    ("experts.ep", Due::Positive, Need::Free),
    ("experts.edp", Due::Positive, Need::Free),
    ("experts.pp", Due::Positive, Need::Free),
    ("order", Due::Text, Need::Free),
    ("stage_layers", Due::List, Need::Free),
];

/// Sizes of each layer kind.
const SIZES: [(&str, [&str; 4]); 2] =
    [("attention", ["tp", "cp", "dp", "pp"]), ("experts", ["etp", "ep", "edp", "pp"])];

/// What a plan of `moec plan` tells besides.
const REPORTED: [&str; 22] = [
    "gpus",
    "order",
    "stage_layers",
    "objective",
    "micro_batch",
    "micro_batches",
    "vpp",
    "recompute",
    "recompute_share",
    "sharding",
    "schedule",
    "local_experts",
    "stage_seconds",
    "step_ms",
    "mfu",
    "tokens_per_s_per_gpu",
    "ttft_ms",
    "tpot_ms",
    "memory_gib",
    "feasible",
    "time_ms",
    "why",
];

/// The first entry of `stage_layers` that is no `[first, end]`.
fn wrong_layers(plan: &Value) -> Option<(String, String)> {
    let range = |v: &Value| {
        let ends: Option<Vec<u64>> = v.as_array()?.iter().map(Value::as_u64).collect();
        ends.filter(|e| e.len() == 2 && e[0] <= e[1])
    };
    for (s, stage) in plan.get("stage_layers")?.as_array()?.iter().enumerate() {
        let at = format!("stage_layers.{s}");
        let Some(ranges) = stage.as_array() else {
            return Some((at.clone(), format!("{at} is {}, not a list of [first, end]", members::shown(stage))));
        };
        if let Some(i) = ranges.iter().position(|r| range(r).is_none()) {
            let at = format!("{at}.{i}");
            return Some((at.clone(), format!("{at} is {}, not layers [first, end]", members::shown(&ranges[i]))));
        }
    }
    None
}

/// Ranks that act together, and the place of one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// All of them, in order.
    pub ranks: Vec<u64>,
    /// The place of the rank that was asked about.
    pub at: u64,
}

impl Layout {
    /// A mapping on so many GPUs.
    ///
    /// # Errors
    /// `E0402` when it does not fit.
    pub fn new(gpus: u64, mapping: &Mapping) -> Result<Self, PlanError> {
        let layout = Self {
            gpus,
            attention: Ways { tp: mapping.tp, cp: mapping.cp, pp: mapping.pp, ..Ways::default() },
            experts: Ways { etp: mapping.etp, ep: mapping.ep, pp: mapping.pp, ..Ways::default() },
            order: default_order(),
            stage_layers: Vec::new(),
        };
        layout.generators()?;
        Ok(layout)
    }

    /// The first plan of a report, or a plan on its own.
    ///
    /// # Errors
    /// `E0402` when the text is no plan, or its sizes do not fit; it names the member of the file.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let wrong = |what: String| {
            let help = "write one with `moec plan MODEL --gpus N --format json`; a plan has at least `gpus`, \
                        `attention` and `experts`";
            PlanError::mapping(format!("the plan cannot be read: {what}"), help)
        };
        let file: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let (plan, place) = match file.get("plans") {
            None => (&file, ""),
            Some(plans) => {
                let none = || wrong("it has no plans".to_owned()).at("plans");
                (plans.get(0).ok_or_else(none)?, "plans.0")
            }
        };
        let found = members::wrong(plan, &MEMBERS).or_else(|| wrong_layers(plan));
        if let Some((at, what)) = found {
            return Err(wrong(what).at(at).under(place));
        }
        let layout = Self::deserialize(plan).map_err(|e| wrong(e.to_string()).under(place))?;
        layout.check_sizes(plan).map_err(|e| e.under(place))?;
        Ok(layout)
    }

    /// Members of the plan in this text that mean nothing: the path of each, and the names that would mean something.
    pub fn unread(text: &str) -> Vec<(String, Vec<String>)> {
        let file: Value = serde_json::from_str(text).unwrap_or_default();
        let (plan, place) = file.pointer("/plans/0").map_or((&file, ""), |plan| (plan, "plans.0."));
        let names = |names: &[&str]| -> Value { names.iter().map(|n| ((*n).to_owned(), Value::Null)).collect() };
        let mut known = names(&REPORTED);
        for (kind, sizes) in SIZES {
            known[kind] = names(&sizes);
        }
        let mut unread = Vec::new();
        members::unread(plan, &known, place, &mut unread);
        unread
    }

    /// Sizes that fit each other, those that follow from others included.
    fn check_sizes(&self, plan: &Value) -> Result<(), PlanError> {
        let (attention, experts) = (self.attention.pp, self.experts.pp);
        if attention != experts {
            return Err(PlanError::mapping(
                format!("attention has {attention} pipeline stages, experts {experts}"),
                "both layer kinds have the same stages; give both the same `pp`",
            )
            .at("experts"));
        }
        let (_, _, dp, edp) = self.generators()?;
        for (kind, name, is) in [("attention", "dp", dp), ("experts", "edp", edp)] {
            let given = plan[kind][name].as_u64().filter(|given| *given != is);
            if let Some(given) = given {
                let others = if kind == "attention" { "tp, cp and pp" } else { "etp, ep and pp" };
                return Err(PlanError::mapping(
                    format!("{name} is {given}, but {others} leave {is} of {} GPUs", self.gpus),
                    format!("give {name} = {is}, or leave it out"),
                )
                .at(format!("{kind}.{name}")));
            }
        }
        let listed = self.stage_layers.len() as u64;
        if listed > 0 && listed != attention {
            return Err(PlanError::mapping(
                format!("stage_layers lists {listed} stages of {attention}"),
                "list the layers of every stage, or leave stage_layers out",
            )
            .at("stage_layers"));
        }
        Ok(())
    }

    /// The mapping.
    pub const fn mapping(&self) -> Mapping {
        let (a, e) = (&self.attention, &self.experts);
        Mapping { tp: a.tp, cp: a.cp, pp: a.pp, ep: e.ep, etp: e.etp }
    }

    fn generators(&self) -> Result<(Generator, Generator, u64, u64), PlanError> {
        generators(self.gpus, &self.mapping(), &self.order)
    }

    fn check(&self, rank: u64) -> Result<(), PlanError> {
        if rank < self.gpus {
            return Ok(());
        }
        Err(PlanError::mapping(
            format!("there is no rank {rank} of {} GPUs", self.gpus),
            format!("ranks are 0..{}", self.gpus),
        ))
    }

    /// Pipeline stage of a rank.
    ///
    /// # Errors
    /// `E0402` for a rank that does not exist.
    pub fn stage(&self, rank: u64) -> Result<u64, PlanError> {
        self.check(rank)?;
        Ok(self.generators()?.0.position(rank, Axis::Pp))
    }

    /// Whether a stage runs a layer; a plan that does not list layers lets every stage run all of them.
    pub fn has_layer(&self, stage: u64, layer: u64) -> bool {
        let stage = usize::try_from(stage).ok().and_then(|s| self.stage_layers.get(s));
        stage.is_none_or(|ranges| ranges.iter().any(|(first, end)| *first <= layer && layer < *end))
    }

    /// Ranks among which the experts of a rank's layers are spread.
    ///
    /// # Errors
    /// As [`stage`](Self::stage).
    pub fn expert_group(&self, rank: u64) -> Result<Members, PlanError> {
        self.members(rank, Axis::Ep)
    }

    /// Ranks among which each expert of a rank is cut.
    ///
    /// # Errors
    /// As [`stage`](Self::stage).
    pub fn shard_group(&self, rank: u64) -> Result<Members, PlanError> {
        self.members(rank, Axis::Tp)
    }

    fn members(&self, rank: u64, axis: Axis) -> Result<Members, PlanError> {
        self.check(rank)?;
        let (_, experts, ..) = self.generators()?;
        let size = if axis == Axis::Ep { self.experts.ep } else { self.experts.etp };
        let (stride, at) = (experts.stride(axis), experts.position(rank, axis));
        let first = rank - at * stride;
        Ok(Members { ranks: (0..size).map(|i| first + i * stride).collect(), at })
    }

    /// Which of `total` tokens a rank has after attention, in its order.
    ///
    /// Tokens are split among data-parallel ranks, each part among context-parallel ranks in `2 cp` chunks, of which
    /// rank `i` has numbers `i` and `2 cp - 1 - i` (so that causal attention is balanced), and what a rank has among
    /// tensor-parallel ranks (sequence parallelism). Counts that do not divide leave ranks with fewer tokens or none.
    ///
    /// # Errors
    /// As [`stage`](Self::stage).
    pub fn tokens(&self, rank: u64, total: u64) -> Result<Vec<u64>, PlanError> {
        self.check(rank)?;
        let (attention, _, dp, _) = self.generators()?;
        let part = |from: u64, n: u64, at: u64, ways: u64| {
            let cut = |i: u64| from + (u128::from(n) * u128::from(i) / u128::from(ways.max(1))) as u64;
            cut(at)..cut(at + 1)
        };
        let own = part(0, total, attention.position(rank, Axis::Dp), dp);
        let (cp, at) = (self.attention.cp, attention.position(rank, Axis::Cp));
        let mut tokens = Vec::new();
        let length = own.end - own.start;
        if cp == 1 {
            tokens.extend(own);
        } else {
            for chunk in [at, 2 * cp - 1 - at] {
                tokens.extend(part(own.start, length, chunk, 2 * cp));
            }
        }
        let shard = part(0, tokens.len() as u64, attention.position(rank, Axis::Tp), self.attention.tp);
        Ok(tokens[shard.start as usize..shard.end as usize].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_starts_on_one_rank_of_a_stage() {
        for (tp, cp, pp, ep, etp) in [(1, 1, 1, 8, 1), (2, 2, 1, 4, 2), (1, 4, 2, 2, 4), (2, 1, 2, 4, 1)] {
            let layout = Layout::new(16, &Mapping { tp, cp, pp, ep, etp }).unwrap();
            for total in [0, 1, 5, 64, 97] {
                for stage in 0..pp {
                    let ranks = (0..16).filter(|r| layout.stage(*r).unwrap() == stage);
                    let mut all: Vec<u64> = ranks.flat_map(|r| layout.tokens(r, total).unwrap()).collect();
                    all.sort_unstable();
                    assert_eq!(all, (0..total).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn members_are_those_of_the_rank_groups() {
        let mapping = Mapping { tp: 2, cp: 1, pp: 2, ep: 2, etp: 2 };
        let layout = Layout::new(16, &mapping).unwrap();
        let groups = crate::groups(16, &mapping, crate::DEFAULT_ORDER).unwrap();
        for rank in 0..16 {
            for (members, all) in [
                (layout.expert_group(rank).unwrap(), &groups.moe.ep),
                (layout.shard_group(rank).unwrap(), &groups.moe.etp),
            ] {
                let listed: Vec<u32> = members.ranks.iter().map(|r| *r as u32).collect();
                assert!(all.contains(&listed), "rank {rank}: {listed:?}");
                assert_eq!(members.ranks[members.at as usize], rank);
            }
        }
        assert!(layout.expert_group(16).unwrap_err().help.contains("0..16"));
    }

    #[test]
    fn a_text_that_is_no_plan_is_refused() {
        assert!(Layout::from_json("{}").is_err());
        assert!(Layout::from_json("{\"plans\": []}").is_err());
        let plan = r#"{"gpus": 8, "attention": {"tp": 2, "pp": 1}, "experts": {"ep": 8, "pp": 1}}"#;
        assert_eq!(Layout::from_json(plan).unwrap().mapping(), Mapping { tp: 2, cp: 1, pp: 1, ep: 8, etp: 1 });
        assert!(Layout::from_json(&plan.replace('8', "7")).is_err());
    }
}
