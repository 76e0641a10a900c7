//! Measured serving points as instances and workloads.

#![allow(dead_code, reason = "shared by several examples and tests")]

use moec_plan::{
    Cluster, ModelShape, Routing,
    backend::ServeCalibration,
    serve::{ServeCx, ServeEstimate, ServeLayout, WeightFormat, Workload},
};
use std::collections::BTreeMap;

pub(crate) const SILICON: &str = include_str!("../../data/serving-silicon.csv");

/// One measured point.
pub(crate) struct Point {
    pub(crate) line: usize,
    /// `preset/backend`.
    pub(crate) set: String,
    /// Version and model family, which is what speculation depends on.
    pub(crate) version: String,
    pub(crate) model_name: &'static str,
    pub(crate) model: ModelShape,
    pub(crate) cluster: Cluster,
    pub(crate) layout: ServeLayout,
    pub(crate) workload: Workload,
    pub(crate) ttft_ms: f64,
    pub(crate) tpot_ms: f64,
    /// Whether the fit may see it; equal configurations are on the same side.
    pub(crate) fit: bool,
    pub(crate) label: String,
}

fn format(name: &str) -> WeightFormat {
    match name {
        "fp8" => WeightFormat::Fp8,
        "fp8_block" => WeightFormat::Fp8Block,
        "nvfp4" => WeightFormat::Fp4,
        "int4_wo" => WeightFormat::Int4,
        _ => WeightFormat::Bf16,
    }
}

fn model_of(path: &str) -> &'static str {
    match path.rsplit('/').next().unwrap_or(path) {
        p if p.starts_with("DeepSeek") => "DeepSeek-V3",
        p if p.starts_with("Kimi") => "Kimi-K2",
        p if p.starts_with("MiniMax") => "MiniMax-M2",
        p if p.starts_with("Qwen3.5") => "Qwen3.5-397B-A17B",
        p if p.starts_with("Qwen3-235B") => "Qwen3-235B-A22B",
        _ => "GPT-OSS-120B",
    }
}

/// The instance behind a row.
///
/// One of the two sources of the file writes an instance of `n` GPUs with expert
/// parallelism as `n x n`: 8 GPUs with EP 8 appear as `tp 64, moe_tp 8, moe_ep 8`,
/// and with attention data parallelism as `tp n, dp n, moe_ep n x n`. The same
/// measurements (both latencies equal to four digits) are also in the file in the
/// plain form, which is how the reading is known; `tests/serving.rs` counts them.
fn layout(tp: u64, dp: Option<u64>, etp: u64, ep: u64) -> (u64, u64, u64, u64) {
    match dp {
        Some(1) if etp == ep && ep > 1 && tp == etp * ep => (ep, 1, 1, ep),
        Some(d) if etp == ep && ep > 1 && tp == 1 && d == etp * ep => (1, ep, 1, ep),
        Some(d) if d > 1 && tp == d && etp == 1 && ep == d * d => (tp, 1, 1, d),
        Some(d) => (tp, d, etp, ep),
        None => (tp, (etp * ep / tp).max(1), etp, ep),
    }
}

/// All points of the file.
pub(crate) fn points(models: &BTreeMap<String, ModelShape>) -> Vec<Point> {
    let mut lines = SILICON.lines();
    let header: Vec<&str> = lines.next().expect("header").split(',').collect();
    let mut all = Vec::new();
    for (index, line) in lines.enumerate() {
        let row: BTreeMap<&str, &str> = header.iter().copied().zip(line.split(',')).collect();
        let int = |key: &str| row[key].parse::<u64>().ok();
        let float = |key: &str| row[key].parse::<f64>().expect("number");
        let (tp, dp, etp, ep) = layout(
            int("tp_size").expect("tp"),
            int("attention_dp_size"),
            int("moe_tp_size").expect("moe_tp"),
            int("moe_ep_size").expect("moe_ep"),
        );
        let stated_dp = int("attention_dp_size").unwrap_or(dp);
        let model_name = model_of(row["model_path"]);
        let cluster = match row["system"] {
            "h100_sxm" => "dgx-h100",
            "h200_sxm" => "dgx-h200",
            _ => "dgx-b200",
        };
        let workload =
            Workload { input: float("isl"), output: float("osl"), concurrency: float("batch_size") * stated_dp as f64 };
        let family = if model_name == "DeepSeek-V3" { "deepseek" } else { "other" };
        let key = format!(
            "{} {} {} {:?} {tp} {dp} {etp} {ep} {:?}",
            row["system"], row["backend"], model_name, row["moe_quant_mode"], workload
        );
        let hash =
            key.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        all.push(Point {
            line: index + 2,
            set: format!("{cluster}/{}", row["backend"]),
            version: format!("{} {family}", row["backend_version"]),
            model_name,
            model: models[model_name].clone(),
            cluster: Cluster::preset(cluster).expect("preset"),
            layout: ServeLayout {
                tp,
                dp,
                ep,
                etp,
                dense: format(row["gemm_quant_mode"]),
                experts: format(row["moe_quant_mode"]),
            },
            workload,
            ttft_ms: float("measured_ttft_ms"),
            tpot_ms: float("measured_tpot_ms"),
            fit: (hash >> 17) & 1 == 0,
            label: key,
        });
    }
    all
}

/// Predicts a point.
pub(crate) fn predict(point: &Point, p: &ServeCalibration) -> ServeEstimate {
    let speculation = p.speculation.get(&point.version).copied().unwrap_or(1.0);
    ServeCx::new(&point.model, &point.cluster, point.layout, &Routing::Usual).estimate(p, &point.workload, speculation)
}

/// Median, mean and share within 20% of absolute relative errors, and their number.
pub(crate) fn summary(errors: &[f64]) -> (f64, f64, f64, usize) {
    let mut e: Vec<f64> = errors.iter().map(|x| x.abs()).collect();
    e.sort_by(f64::total_cmp);
    let n = e.len().max(1);
    let median = if e.is_empty() { 0.0 } else { e[e.len() / 2] };
    (median, e.iter().sum::<f64>() / n as f64, e.iter().filter(|x| **x <= 0.2).count() as f64 / n as f64, e.len())
}

/// Head of the table of [`line`].
pub(crate) const HEAD: &str =
    "set                part       rows | TPOT  median    mean   in 20% | TTFT  median    mean";

/// Errors of one parameter set on one part of the points.
pub(crate) fn line(key: &str, part: &str, tpot: &[f64], ttft: &[f64]) -> String {
    let (a, b) = (summary(tpot), summary(ttft));
    format!(
        "{key:<18} {part:<9} {:>5} |      {:>6.1}% {:>6.1}% {:>7.0}% |      {:>6.1}% {:>6.1}%",
        a.3,
        100.0 * a.0,
        100.0 * a.1,
        100.0 * a.2,
        100.0 * b.0,
        100.0 * b.1
    )
}
