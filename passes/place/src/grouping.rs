//! Groups tokens and experts together (Speculative MoE / Sem-MoE, arXiv 2503.04398).
//!
//! Tokens are moved to the GPU of the experts they are expected to use inside the collectives of the attention
//! layer, so most expert calls find their token in place. Offline, tokens and experts of a layer are clustered
//! together: with `R` the token clusters, `C` the expert clusters (equal sizes), `a` the activations, minimise
//!
//! `theta * sum_g |tokens of g - mean| + (1 - theta) * (activations whose token and expert are apart)`
//!
//! by alternating: tokens to the best cluster for these experts, experts to the best clusters for these tokens
//! (an exact assignment). Lossless: it changes where work is done, not what is computed.

use crate::affinity::{self, AffinityPlacement};
use crate::assign;
use crate::error::PlaceError;
use crate::flow::Flow;
use crate::layout::round6;
use crate::loads::Loads;
use crate::metrics;
use crate::options::Cluster;
use crate::partition::{self, Parts};
use crate::trace::Trace;
use serde::Serialize;

/// A placement with token homes; serialises with these keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupingPlacement {
    /// Slots, loads and transition shares.
    #[serde(flatten)]
    pub placed: AffinityPlacement,
    /// `[layer][token]`: the GPU each token of the trace is moved to before the layer.
    pub token_to_gpu: Vec<Vec<usize>>,
    /// `[layer]`: share of activations whose expert is not where the token is (the all-to-all volume).
    pub remote_share: Vec<f64>,
    /// The same for contiguous experts and tokens.
    pub contiguous_remote_share: Vec<f64>,
}

/// Most alternations per start; each lowers the objective.
const MAX_ROUNDS: usize = 50;

pub(crate) fn place(
    trace: &Trace,
    loads: &Loads,
    cluster: &Cluster,
    theta: f64,
) -> Result<GroupingPlacement, PlaceError> {
    let (experts, gpus) = (trace.experts(), cluster.gpus);
    let contiguous: Vec<usize> = (0..experts).map(|e| e / (experts / gpus)).collect();
    let in_order: Vec<usize> = (0..trace.tokens()).map(|t| t * gpus / trace.tokens()).collect();
    let mut parts: Parts = Vec::new();
    let (mut homes, mut remote, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for layer in 0..trace.layers() {
        let groups = LayerGroups { trace, layer, gpus, theta };
        let alike = metrics::coactivation(trace, layer);
        let mut best = groups.alternate(contiguous.clone());
        let grown = groups.alternate(partition::cluster(&alike, gpus));
        if grown.0 < best.0 {
            best = grown;
        }
        let (_, of_expert, of_token) = best;
        remote.push(groups.remote_share(&of_expert, &of_token));
        plain.push(groups.remote_share(&contiguous, &in_order));
        parts.push(of_expert.into_iter().map(Some).collect());
        homes.push(of_token);
    }
    Ok(GroupingPlacement {
        placed: affinity::report(&Flow::new(trace), loads, cluster, &parts, false)?,
        token_to_gpu: homes,
        remote_share: remote.into_iter().map(round6).collect(),
        contiguous_remote_share: plain.into_iter().map(round6).collect(),
    })
}

struct LayerGroups<'a> {
    trace: &'a Trace,
    layer: usize,
    gpus: usize,
    theta: f64,
}

impl LayerGroups<'_> {
    /// Objective, part of each expert, part of each token.
    fn alternate(&self, mut of_expert: Vec<usize>) -> (f64, Vec<usize>, Vec<usize>) {
        let mut of_token = self.home_tokens(&of_expert);
        let mut value = self.objective(&of_expert, &of_token);
        for _ in 0..MAX_ROUNDS {
            let next_experts = self.home_experts(&of_token, &of_expert);
            let next_tokens = self.home_tokens(&next_experts);
            let next = self.objective(&next_experts, &next_tokens);
            if next >= value {
                break;
            }
            (value, of_expert, of_token) = (next, next_experts, next_tokens);
        }
        (value, of_expert, of_token)
    }

    /// Token after token to the cluster with most of its experts, less what one more token there unbalances.
    fn home_tokens(&self, of_expert: &[usize]) -> Vec<usize> {
        let mean = self.trace.tokens() as f64 / self.gpus as f64;
        let mut tokens_of = vec![0.0_f64; self.gpus];
        let mut homes = Vec::with_capacity(self.trace.tokens());
        for token in 0..self.trace.tokens() {
            let mut local = vec![0.0; self.gpus];
            self.trace.routed(token, self.layer).for_each(|e| local[of_expert[e]] += 1.0);
            let gain = |g: usize| {
                let unbalance = (tokens_of[g] + 1.0 - mean).abs() - (tokens_of[g] - mean).abs();
                (1.0 - self.theta) * local[g] - self.theta * unbalance
            };
            // Among equals, the emptiest cluster.
            let better = |a: usize, b: usize| gain(a) > gain(b) || (gain(a) == gain(b) && tokens_of[a] < tokens_of[b]);
            let home = (1..self.gpus).fold(0, |best, g| if better(g, best) { g } else { best });
            tokens_of[home] += 1.0;
            homes.push(home);
        }
        homes
    }

    /// Best clusters of equal size for the experts, given where tokens are.
    fn home_experts(&self, of_token: &[usize], start: &[usize]) -> Vec<usize> {
        let mut gain = vec![vec![0_i64; self.gpus]; self.trace.experts()];
        for (token, &home) in of_token.iter().enumerate() {
            self.trace.routed(token, self.layer).for_each(|e| gain[e][home] += 1);
        }
        assign::improve(&gain, self.gpus, start.to_vec())
    }

    fn remote(&self, of_expert: &[usize], of_token: &[usize]) -> (usize, usize) {
        let (mut remote, mut all) = (0, 0);
        for (token, &home) in of_token.iter().enumerate() {
            for e in self.trace.routed(token, self.layer) {
                all += 1;
                remote += usize::from(of_expert[e] != home);
            }
        }
        (remote, all)
    }

    fn remote_share(&self, of_expert: &[usize], of_token: &[usize]) -> f64 {
        let (remote, all) = self.remote(of_expert, of_token);
        remote as f64 / all.max(1) as f64
    }

    fn objective(&self, of_expert: &[usize], of_token: &[usize]) -> f64 {
        let mean = self.trace.tokens() as f64 / self.gpus as f64;
        let mut tokens_of = vec![0.0_f64; self.gpus];
        of_token.iter().for_each(|&g| tokens_of[g] += 1.0);
        let unbalance: f64 = tokens_of.iter().map(|t| (t - mean).abs()).sum();
        self.theta * unbalance + (1.0 - self.theta) * self.remote(of_expert, of_token).0 as f64
    }
}
