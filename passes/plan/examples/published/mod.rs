//! Published training measurements as requests the planner can answer.

#![allow(dead_code, reason = "shared by several examples and tests")]

use moec_plan::{
    Cluster, ModelShape, PlanError, Precision, Request, Schedule, Strategy,
    calibration::TrainCalibration,
    mapping::Fixed,
    search::{Candidate, search_training},
};
use serde_json::Value;
use std::{collections::BTreeMap, fmt::Write as _};

pub(crate) const FOLDING: &str = include_str!("../../data/parallel-folding.json");
pub(crate) const MODELS: &str = include_str!("../../data/models.json");

/// What a source measured.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Measured {
    /// Model FLOP/s over 989.5 TFLOP/s.
    Mfu(f64),
    /// Tokens per second and GPU.
    Tokens(f64),
    /// Seconds per step.
    Seconds(f64),
    /// It did not fit.
    OutOfMemory,
}

/// One measurement.
pub(crate) struct Row {
    /// Source and number.
    pub(crate) id: String,
    /// Table it counts for.
    pub(crate) group: &'static str,
    pub(crate) model_name: String,
    pub(crate) model: ModelShape,
    pub(crate) cluster: Cluster,
    pub(crate) request: Request,
    pub(crate) measured: Measured,
    /// Whether the source gives the mapping as the best one found for this job.
    pub(crate) is_published_best: bool,
}

impl Row {
    /// A copy.
    pub(crate) fn duplicate(&self) -> Self {
        Self {
            id: self.id.clone(),
            group: self.group,
            model_name: self.model_name.clone(),
            model: self.model.clone(),
            cluster: self.cluster.clone(),
            request: self.request.clone(),
            measured: self.measured,
            is_published_best: self.is_published_best,
        }
    }
}

/// The published mapping, and the best one of the same job, micro-batch and sharding.
pub(crate) fn both_best(row: &Row, calibration: &TrainCalibration) -> Result<(Candidate, Candidate), PlanError> {
    let published = predict(row, calibration)?;
    let mut request = row.request.clone();
    request.fixed = Fixed { mbs: request.fixed.mbs, ..Fixed::default() };
    request.sharding = Some(moec_plan::Sharding::Optimizer);
    let found = search_training(&row.model, &row.cluster, calibration, &request, 1)?;
    let best = found.best.first().ok_or_else(|| PlanError::no_plan("nothing fits", "check the row"))?;
    Ok((published.candidate, *best))
}

/// Time of the published mapping over that of the best.
pub(crate) fn behind_best(row: &Row, calibration: &TrainCalibration) -> Result<f64, PlanError> {
    both_best(row, calibration).map(|(published, best)| published.estimate.times.total() / best.estimate.times.total())
}

/// A row that is not used, with the reason.
pub(crate) struct Skipped {
    pub(crate) id: String,
    pub(crate) reason: String,
}

/// Model shapes by name.
pub(crate) fn models() -> BTreeMap<String, ModelShape> {
    let all: BTreeMap<String, Value> = serde_json::from_str(MODELS).expect("models.json");
    all.into_iter()
        .map(|(name, v)| (name.clone(), ModelShape { name, ..ModelShape::from_config_json(&v).expect("model") }))
        .collect()
}

fn int(row: &Value, key: &str) -> Option<u64> {
    row[key].as_u64()
}

/// All rows of the file, in order, and those that cannot be used.
pub(crate) fn rows() -> (Vec<Row>, Vec<Skipped>) {
    let file: Value = serde_json::from_str(FOLDING).expect("parallel-folding.json");
    let models = models();
    let (mut rows, mut skipped) = (Vec::new(), Vec::new());
    for (list, read) in [
        ("folding", folding_row as fn(&Value, &str, &BTreeMap<String, ModelShape>) -> Result<Row, String>),
        ("training_throughput", throughput_row),
        ("dense_reference", dense_row),
    ] {
        for (index, row) in file[list].as_array().into_iter().flatten().enumerate() {
            let id = format!("{list}-{:02}", index + 1);
            match read(row, &id, &models) {
                Ok(row) => rows.push(row),
                Err(reason) => skipped.push(Skipped { id: format!("{id} {} {}", row["model"], row["method"]), reason }),
            }
        }
    }
    (rows, skipped)
}

fn folding_row(row: &Value, id: &str, models: &BTreeMap<String, ModelShape>) -> Result<Row, String> {
    let name = row["model"].as_str().unwrap_or_default();
    let method = row["method"].as_str().unwrap_or_default();
    let gpus = int(row, "gpus").ok_or("number of GPUs not verified in the source")?;
    let tp = int(row, "tp").ok_or("mapping not stated in the source")?;
    let (group, strategy) = match method {
        "FSDP" => ("FSDP", Strategy::Fsdp),
        "FSDP+EP" => ("FSDP+EP", Strategy::FsdpEp),
        "TP+EP+DP" => ("TP+EP+DP", Strategy::TpEpDp),
        "MCore" => ("MCore", Strategy::Unfolded),
        _ => ("MCore w/ Folding", Strategy::Folded),
    };
    // Table 2 restates neither batch nor length; its bf16 rows equal table 1 (global batch 256, 4096 tokens).
    let mut request =
        Request::train(gpus, int(row, "seq_len").unwrap_or(4096), int(row, "global_batch").unwrap_or(256));
    request.software = "mcore-0.9".into();
    // A blank ETP follows TP unless folded, where only 1 divides (see the note of the row).
    let etp = int(row, "etp").unwrap_or(if strategy == Strategy::Folded { 1 } else { tp });
    request.fixed = Fixed {
        tp: Some(tp),
        cp: Some(int(row, "cp").unwrap_or(1)),
        pp: Some(int(row, "pp").unwrap_or(1)),
        ep: Some(int(row, "ep").unwrap_or(1)),
        etp: Some(etp),
        // The study does not state micro-batches; one sequence is Megatron's usual setting for these models.
        mbs: Some(1),
        ..Fixed::default()
    };
    // Unfolded rows of table 5 have CP inside the ranks that EP spans in Megatron before folding.
    request.strategy = Some(if strategy == Strategy::Unfolded { Strategy::Folded } else { strategy });
    // All throughput runs of the study drop tokens at a capacity factor of 1 (section 4).
    request.capacity_factor = Some(1.0);
    let fp8 = row["precision"].as_str() == Some("fp8");
    if fp8 {
        request.precision = Precision::Fp8;
    }
    let measured = match (row["oom"].as_bool(), row["mfu_pct"].as_f64(), row["model_tflops_per_gpu"].as_f64()) {
        (Some(true), _, _) => Measured::OutOfMemory,
        (_, Some(mfu), _) => Measured::Mfu(mfu / 100.0),
        (_, None, Some(tflops)) => Measured::Mfu(tflops / 989.5),
        (_, None, None) => return Err("nothing measured".into()),
    };
    let model = models.get(name).cloned().ok_or("unknown model")?;
    let cluster = Cluster::preset("dgx-h100").map_err(|e| e.to_string())?;
    // Tables 3 and 5 give the best mapping of each job; table 4 keeps those of table 3 at other sizes.
    let searched = row["dataset"].as_str().is_some_and(|d| d.contains("table3") || d.contains("table5"));
    let is_published_best = searched && group == "MCore w/ Folding";
    Ok(Row {
        id: id.into(),
        group: if fp8 { "FP8 (table 2)" } else { group },
        model_name: name.into(),
        model,
        cluster,
        request,
        measured,
        is_published_best,
    })
}

fn throughput_row(row: &Value, id: &str, models: &BTreeMap<String, ModelShape>) -> Result<Row, String> {
    let name = row["model"].as_str().unwrap_or_default();
    let source = row["source"].as_str().unwrap_or_default();
    let shape = match name {
        n if n.starts_with("DeepSeekV4") => {
            return Err("compressed sparse attention and hyper-connections are not in the cost model".into());
        }
        n if n.starts_with("DeepSeek") => "DeepSeek-V3",
        n if n.starts_with("GPT OSS") => "GPT-OSS-120B",
        n if n.starts_with("Qwen3_30B") => "Qwen3-30B-A3B",
        n if n.starts_with("Qwen3") => "Qwen3-235B-A22B",
        n if n.starts_with("Kimi") => "Kimi-K2",
        n => n,
    };
    let mut model = models.get(shape).cloned().ok_or("unknown model")?;
    if name.contains("w/o MTP") {
        model.mtp_layers = 0;
    }
    let preset = match row["system"].as_str().unwrap_or_default().trim_start_matches("DGX-") {
        "GB300" => "gb300-nvl72",
        "GB200" => "gb200-nvl72",
        "B300" => "dgx-b300",
        "B200" => "dgx-b200",
        "H800" => "h800",
        _ => "dgx-h100",
    };
    let cluster = Cluster::preset(preset).map_err(|e| e.to_string())?;
    let release = |key: &str| source.contains(key);
    let software = match () {
        () if release("25.09") => "bridge-25.09",
        () if release("25.11") => "bridge-25.11",
        () if release("26.04") => "bridge-26.04",
        // The H100 recipes of 26.04 and 26.08 give the same figures: what is new is for Blackwell.
        () if (release("26.06") || release("26.08")) && preset == "dgx-h100" => "bridge-26.04",
        () if release("26.06") || release("26.08") => "bridge-26.08",
        () if release("2603.07685") => "megatron-2026",
        () if release("2412.19437") => "deepseek-dualpipe",
        () => "mcore-0.9",
    };
    let gpus = int(row, "gpus").ok_or("no GPU count")?;
    let seq = int(row, "seq_len").unwrap_or(4096);
    // The report's rows without a mapping state no batch either; its other rows use 8192 sequences.
    let batch = int(row, "global_batch").unwrap_or(if seq > 65536 { 256 } else { 8192 });
    let mut request = Request::train(gpus, seq, batch);
    request.software = software.into();
    request.fixed = Fixed {
        tp: int(row, "tp"),
        cp: int(row, "cp"),
        pp: int(row, "pp"),
        ep: int(row, "ep"),
        etp: int(row, "etp").or(int(row, "ep").map(|_| 1)),
        mbs: int(row, "micro_batch"),
        vpp: int(row, "vp").or(int(row, "pp").filter(|_| row.get("vp").is_some()).map(|_| 1)),
        ..Fixed::default()
    };
    if int(row, "tp").is_some() {
        request.fixed.cp = request.fixed.cp.or(Some(1));
    }
    request.strategy = Some(Strategy::Folded);
    if row["schedule"].as_str() == Some("DualPipe") {
        request.schedule = Schedule::DualPipe;
        request.fixed.mbs = Some(1);
        request.fixed.vpp = Some(1);
    }
    if row["precision"].as_str().is_some_and(|p| p.contains("fp8")) {
        request.precision = Precision::Fp8;
    }
    if name.contains("tokendrop") {
        request.capacity_factor = Some(1.0);
    }
    let measured = match (
        row["tokens_per_s_per_gpu"].as_f64(),
        row["time_per_step_s"].as_f64(),
        row["model_tflops_per_gpu"].as_f64(),
    ) {
        (Some(tokens), _, _) => Measured::Tokens(tokens),
        (None, Some(seconds), _) => Measured::Seconds(seconds),
        (None, None, Some(tflops)) => Measured::Mfu(tflops / 989.5),
        (None, None, None) => return Err("nothing measured".into()),
    };
    let group = match (int(row, "pp").is_some(), name.contains("tokendrop")) {
        (_, true) => "other training, token drop",
        (false, false) => "other training, mapping not stated",
        (true, false) => "other training",
    };
    Ok(Row {
        id: id.into(),
        group,
        model_name: name.into(),
        model,
        cluster,
        request,
        measured,
        is_published_best: false,
    })
}

fn dense_row(row: &Value, id: &str, _: &BTreeMap<String, ModelShape>) -> Result<Row, String> {
    use moec_plan::{
        Recompute,
        model::{Attention, FeedForward, Layer},
    };
    let get = |key: &str| int(row, key).ok_or(format!("no {key}"));
    let (heads, hidden) = (get("heads")?, get("hidden")?);
    let layer = Layer {
        attention: Attention::Gqa { heads, kv_heads: heads, head_dim: hidden / heads, window: None },
        feed_forward: FeedForward::Dense { intermediate: get("ffn")?, gated: false },
    };
    let name = row["model"].as_str().unwrap_or_default();
    let mut model =
        ModelShape::new(name, hidden, 51200, vec![layer; get("layers")? as usize]).map_err(|e| e.to_string())?;
    model.tied_embeddings = true;
    let mut request = Request::train(get("gpus")?, get("seq_len")?, get("global_batch")?);
    request.software = "megatron-2022".into();
    request.strategy = Some(Strategy::Folded);
    request.fixed = Fixed {
        tp: int(row, "tp"),
        cp: Some(1),
        pp: int(row, "pp"),
        ep: Some(1),
        etp: Some(1),
        mbs: int(row, "micro_batch"),
        vpp: int(row, "vp"),
        ..Fixed::default()
    };
    let full = row["activations"].as_str().is_some_and(|a| a.starts_with("full"));
    request.recompute = Some(if full { Recompute::Full } else { Recompute::Selective });
    let cluster = Cluster::preset("dgx-a100").map_err(|e| e.to_string())?;
    let measured = Measured::Seconds(row["iteration_time_s"].as_f64().ok_or("no time")?);
    Ok(Row {
        id: id.into(),
        group: "dense reference",
        model_name: name.into(),
        model,
        cluster,
        request,
        measured,
        is_published_best: false,
    })
}

/// Prediction for a row: the fastest feasible candidate, or the smallest infeasible one.
pub(crate) struct Predicted {
    pub(crate) candidate: Candidate,
    pub(crate) feasible: bool,
    /// In the unit of the measurement; MFU for rows that ran out of memory.
    pub(crate) value: f64,
}

/// Predicts one row.
pub(crate) fn predict(row: &Row, calibration: &TrainCalibration) -> Result<Predicted, PlanError> {
    let found = search_training(&row.model, &row.cluster, calibration, &row.request, 1)?;
    let feasible = !found.best.is_empty();
    let candidate = found
        .best
        .first()
        .copied()
        .or(found.smallest)
        .ok_or_else(|| PlanError::no_plan("no candidate", "check the row"))?;
    let seconds = candidate.estimate.times.total();
    let r = &row.request;
    let tokens = (r.seq * r.global_batch) as f64 / r.gpus as f64 / seconds;
    let value = match row.measured {
        Measured::Mfu(_) | Measured::OutOfMemory => tokens * row.model.training_flops_per_token(r.seq) / 989.5e12,
        Measured::Tokens(_) => tokens,
        Measured::Seconds(_) => seconds,
    };
    Ok(Predicted { candidate, feasible, value })
}

/// Relative error of a prediction; `None` where nothing was measured.
pub(crate) fn error(row: &Row, predicted: &Predicted) -> Option<f64> {
    match row.measured {
        Measured::Mfu(m) | Measured::Tokens(m) | Measured::Seconds(m) => Some(predicted.value / m - 1.0),
        Measured::OutOfMemory => None,
    }
}

/// Relative errors by group of rows and part of the data.
pub(crate) type Errors = BTreeMap<(&'static str, &'static str), Vec<f64>>;

/// Errors as a table, a line per group and part.
pub(crate) fn table(groups: &Errors) -> String {
    let mut out = format!(
        "{:<36} {:<9} {:>4} {:>8} {:>8} {:>10} {:>10}\n",
        "group", "part", "rows", "mean", "worst", "within 15%", "bias"
    );
    for ((group, part), errors) in groups {
        let n = errors.len() as f64;
        let mean = errors.iter().map(|e| e.abs()).sum::<f64>() / n;
        let worst = errors.iter().map(|e| e.abs()).fold(0.0, f64::max);
        let within = errors.iter().filter(|e| e.abs() <= 0.15).count() as f64 / n;
        let bias = errors.iter().sum::<f64>() / n;
        let _ = writeln!(
            out,
            "{group:<36} {part:<9} {n:>4} {:>7.1}% {:>7.1}% {:>9.0}% {:>+9.1}%",
            100.0 * mean,
            100.0 * worst,
            100.0 * within,
            100.0 * bias
        );
    }
    out
}

/// Errors of all rows, by group, for each half and for both.
pub(crate) fn errors(rows: &[Row], calibration: &TrainCalibration) -> Result<Errors, PlanError> {
    let mut groups = Errors::new();
    for (row, fit) in rows.iter().zip(fit_rows(rows)) {
        if let Some(error) = error(row, &predict(row, calibration)?) {
            for part in [if fit { "fit" } else { "held out" }, "all"] {
                groups.entry((row.group, part)).or_default().push(error);
            }
        }
    }
    Ok(groups)
}

/// How far the published best mappings are behind ours, with the causes of both steps.
pub(crate) fn best_mappings(rows: &[Row], calibration: &TrainCalibration) -> String {
    let mut out = String::new();
    let fit = fit_rows(rows);
    for (row, fit) in rows.iter().zip(fit).filter(|(r, _)| r.is_published_best) {
        let (published, best) = both_best(row, calibration).expect("a plan");
        let behind = 100.0 * (published.estimate.times.total() / best.estimate.times.total() - 1.0);
        let part = if fit { "fit" } else { "held out" };
        let _ = writeln!(out, "{} {} ({part}): {behind:+.1}% behind our best", row.id, row.model_name);
        for (name, c) in [("published", &published), ("ours", &best)] {
            let (t, m) = (&c.estimate.times, &c.choice.mapping);
            let _ = write!(
                out,
                "  {name:<9} tp {} cp {} pp {} ep {} etp {} vpp {} {:?} {:.1} GiB: {:.0} ms:",
                m.tp,
                m.cp,
                m.pp,
                m.ep,
                m.etp,
                c.choice.vpp,
                c.choice.recompute,
                c.estimate.memory.total() / 1_073_741_824.0,
                1e3 * t.total()
            );
            for kind in moec_plan::layer::Kind::ALL {
                let _ = write!(out, " {} {:.0},", kind.name(), 1e3 * t.kinds[kind as usize]);
            }
            let rest = [t.bubble, t.pipeline_comm, t.data_comm, t.optimizer, t.straggler].map(|s| 1e3 * s);
            let _ = writeln!(
                out,
                " bubble {:.0}, pipeline {:.0}, data {:.0}, optimizer {:.0}, straggler {:.0}",
                rest[0], rest[1], rest[2], rest[3], rest[4]
            );
        }
    }
    out
}

/// Which rows the fit may see: every other one within each table, release, model and machine.
pub(crate) fn fit_rows(rows: &[Row]) -> Vec<bool> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&i| {
        let r = &rows[i];
        (r.group, r.request.software.clone(), r.model_name.clone(), r.cluster.name.clone(), i)
    });
    let mut seen = vec![false; rows.len()];
    for (position, &index) in order.iter().enumerate() {
        seen[index] = position % 2 == 0;
    }
    seen
}
