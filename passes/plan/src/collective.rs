//! Time of collectives on each level of the topology.
//!
//! Inside an NVLink domain the measured curve of the nearest group size is used
//! (NCCL tests, sizes as that program defines them); elsewhere latency plus bytes
//! over bandwidth. Across domains a ring uses one adapter per rank of the group
//! that a domain holds, so a group with more ranks per domain is faster.

use crate::{cluster::Cluster, error::PlanError};
use serde::{Deserialize, Serialize};

/// Collective operation, with sizes as nccl-tests gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Bytes of the send buffer of a rank.
    #[serde(rename = "alltoall")]
    AllToAll,
    /// Bytes of the gathered result.
    AllGather,
    /// Bytes of the full input.
    ReduceScatter,
    /// Bytes of the buffer.
    AllReduce,
}

impl Collective {
    /// Bytes on the wire per rank, as a multiple of the size: `(n - 1) / n`, twice that for all-reduce.
    pub fn wire_factor(self, n: f64) -> f64 {
        let share = (n - 1.0) / n;
        match self {
            Self::AllToAll | Self::AllGather | Self::ReduceScatter => share,
            Self::AllReduce => 2.0 * share,
        }
    }
}

/// Measured latency over size for one operation and group size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectiveCurve {
    /// Operation.
    pub op: Collective,
    /// Ranks.
    pub gpus: u64,
    /// Sizes, ascending, bytes.
    pub size_bytes: Vec<f64>,
    /// Latency at each size, microseconds.
    pub latency_us: Vec<f64>,
}

impl CollectiveCurve {
    /// Refuses curves that are malformed or faster than the links.
    pub(crate) fn check(&self, nvlink_gbps: f64) -> Result<(), PlanError> {
        let ascending = self.size_bytes.windows(2).all(|w| w[0] < w[1]);
        let positive = self.size_bytes.iter().chain(&self.latency_us).all(|v| *v > 0.0 && v.is_finite());
        if self.size_bytes.len() != self.latency_us.len()
            || self.size_bytes.len() < 2
            || !ascending
            || !positive
            || self.gpus < 2
        {
            return Err(PlanError::cluster(
                format!("the {:?} curve for {} GPUs is malformed", self.op, self.gpus),
                "size_bytes and latency_us have equal length, are positive, and sizes ascend",
            ));
        }
        // In-network reduction halves the traffic of an all-reduce (NVLink SHARP).
        let sharp = if self.op == Collective::AllReduce { 2.0 } else { 1.0 };
        for (size, us) in self.size_bytes.iter().zip(&self.latency_us) {
            let floor = size * self.op.wire_factor(self.gpus as f64) / sharp / (nvlink_gbps * 1e9) * 1e6;
            if *us < floor {
                return Err(PlanError::cluster(
                    format!(
                        "{:?} of {size} bytes on {} GPUs takes {us} us, faster than the links allow ({floor:.1} us)",
                        self.op, self.gpus
                    ),
                    "check the units: latency in microseconds, nvlink_gbps in GB/s one way",
                ));
            }
        }
        Ok(())
    }

    /// Seconds for a size, by interpolation between sizes, beyond the ends by bandwidth.
    fn seconds(&self, bytes: f64) -> f64 {
        let last = self.size_bytes.len() - 1;
        if bytes <= self.size_bytes[0] {
            return self.latency_us[0] * 1e-6;
        }
        if bytes >= self.size_bytes[last] {
            return self.latency_us[last] * bytes / self.size_bytes[last] * 1e-6;
        }
        let k = self.size_bytes.partition_point(|s| *s <= bytes);
        let (x0, x1) = (self.size_bytes[k - 1], self.size_bytes[k]);
        let (y0, y1) = (self.latency_us[k - 1], self.latency_us[k]);
        (y0 + (y1 - y0) * (bytes - x0) / (x1 - x0)) * 1e-6
    }
}

/// Where the ranks of a group sit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Span {
    /// Ranks of the group.
    pub ranks: u64,
    /// Ranks of the group inside one NVLink domain.
    pub per_domain: u64,
}

impl Span {
    /// A group with equally spaced ranks.
    pub fn new(ranks: u64, stride: u64, domain: u64) -> Self {
        let per_domain = if stride >= domain { 1 } else { (domain / stride).min(ranks).max(1) };
        Self { ranks, per_domain }
    }

    /// Whether all ranks share one NVLink domain.
    pub fn is_local(&self) -> bool {
        self.per_domain >= self.ranks
    }
}

/// Achieved shares of link rates, fitted once for all data (`data/calibration.json`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkEfficiency {
    /// Multiplier on measured curves under concurrent compute, at most 1 means slower.
    pub nvlink: f64,
    /// Share of the adapter rate that rings reach.
    pub network: f64,
    /// Share of the adapter rate that all-to-all reaches.
    pub network_all_to_all: f64,
    /// Share of the adapter rate that expert dispatch reaches where a token crosses to a node once.
    pub network_dispatch: f64,
}

/// Seconds of a collective over a group.
pub fn collective_seconds(cluster: &Cluster, eff: &LinkEfficiency, op: Collective, span: Span, bytes: f64) -> f64 {
    if span.ranks <= 1 || bytes <= 0.0 {
        return 0.0;
    }
    let n = span.ranks as f64;
    if span.is_local() {
        return local_seconds(cluster, op, n, bytes) / eff.nvlink;
    }
    let local = span.per_domain as f64;
    let nic = cluster.nic_gbps * 1e9;
    let domains = (n / local).max(1.0);
    let latency = cluster.latency_us.network * 1e-6;
    match op {
        Collective::AllToAll => {
            let remote = bytes * (n - local) / n / (nic * eff.network_all_to_all);
            let inside =
                if local > 1.0 { local_seconds(cluster, op, local, bytes * local / n) / eff.nvlink } else { 0.0 };
            // Messages shrink with the group; each peer costs a share of a message latency.
            latency * domains.min(64.0).sqrt() + remote.max(inside)
        }
        Collective::AllGather | Collective::ReduceScatter | Collective::AllReduce => {
            let ring = bytes * op.wire_factor(n) / (local * nic * eff.network);
            let inside = if local > 1.0 { local_seconds(cluster, op, local, bytes) / eff.nvlink } else { 0.0 };
            latency * (domains.log2() + 1.0) + ring.max(inside)
        }
    }
}

/// Inside one domain, by the curve of the nearest group size scaled by traffic per rank.
fn local_seconds(cluster: &Cluster, op: Collective, n: f64, bytes: f64) -> f64 {
    let nearest = cluster.collectives.iter().filter(|c| c.op == op).min_by(|a, b| {
        let distance = |c: &CollectiveCurve| (c.gpus as f64 / n).ln().abs();
        distance(a).total_cmp(&distance(b))
    });
    match nearest {
        Some(curve) => curve.seconds(bytes * op.wire_factor(n) / op.wire_factor(curve.gpus as f64)),
        // NCCL reaches about three quarters of the one-way link rate (the H100 curve at 512 MiB).
        None => {
            (cluster.latency_us.nvlink * (1.0 + n.log2())) * 1e-6
                + bytes * op.wire_factor(n) / (0.75 * cluster.gpu.nvlink_gbps * 1e9)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: LinkEfficiency =
        LinkEfficiency { nvlink: 1.0, network: 1.0, network_all_to_all: 0.87, network_dispatch: 0.87 };

    #[test]
    fn spans_count_ranks_per_domain() {
        assert_eq!(Span::new(8, 1, 8), Span { ranks: 8, per_domain: 8 });
        assert_eq!(Span::new(64, 2, 8).per_domain, 4);
        assert_eq!(Span::new(16, 8, 8).per_domain, 1);
        assert!(Span::new(4, 2, 8).is_local());
    }

    #[test]
    fn measured_points_come_back_and_size_never_shortens_a_large_transfer() {
        let h100 = Cluster::preset("dgx-h100").unwrap();
        let span = Span { ranks: 8, per_domain: 8 };
        let t = collective_seconds(&h100, &UNIT, Collective::AllToAll, span, 536_870_912.0);
        assert!((t * 1e6 - 1480.67).abs() < 0.01);
        assert!(collective_seconds(&h100, &UNIT, Collective::AllToAll, span, 1e9) > t);
    }

    #[test]
    fn all_to_all_across_nodes_is_near_the_published_h100_times() {
        // arXiv 2603.07685 table 7: 4096 tokens x 7168 x top-8 in bf16, dispatch by NCCL all-to-all.
        let h100 = Cluster::preset("dgx-h100").unwrap();
        let bytes = 4096.0 * 7168.0 * 2.0 * 8.0;
        for (ranks, us) in [(8, 1265.0), (16, 5774.0), (32, 8059.0), (64, 9164.0)] {
            let t = 1e6 * collective_seconds(&h100, &UNIT, Collective::AllToAll, Span::new(ranks, 1, 8), bytes);
            assert!((t / us - 1.0).abs() < 0.08, "{ranks} ranks: {t:.0} us, published {us}");
        }
    }
}
