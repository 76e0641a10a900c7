//! Clusters: GPUs, NVLink domains, network, and measured collective curves.
//!
//! Sources of hardware figures conflict, so a cluster is an input and never a
//! constant. Presets come from `data/hardware.json`; [`Cluster::to_json`] prints
//! one as a file that users edit and [`Cluster::from_json`] reads back.
//! Rates are one way, in GB/s (1e9 bytes/s) per GPU; peaks are dense TFLOP/s.

use crate::{
    collective::CollectiveCurve,
    error::PlanError,
    members::{self, Due, Need},
};
use serde::{Deserialize, Serialize};
use std::sync::LazyLock;

/// Peaks and memory of one GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Name as in the data file.
    pub name: String,
    /// Dense bf16 peak, TFLOP/s.
    #[serde(alias = "bf16_dense_tflops")]
    pub bf16_tflops: f64,
    /// Dense fp8 peak, TFLOP/s; absent where the GPU has none.
    #[serde(alias = "fp8_dense_tflops", default)]
    pub fp8_tflops: Option<f64>,
    /// Dense fp4 peak, TFLOP/s; absent where the GPU has none.
    #[serde(alias = "fp4_dense_tflops", default)]
    pub fp4_tflops: Option<f64>,
    /// Memory, bytes.
    pub hbm_bytes: f64,
    /// Memory bandwidth, GB/s.
    pub hbm_gbps: f64,
    /// NVLink rate one way, GB/s.
    #[serde(alias = "nvlink_unidir_gbps")]
    pub nvlink_gbps: f64,
    /// Compute generation, for efficiency curves.
    #[serde(default = "Generation::default_newest")]
    pub generation: Generation,
}

/// Compute generation: which efficiency curves apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Generation {
    /// A100.
    Ampere,
    /// H100, H200, H800.
    Hopper,
    /// B200, GB200.
    Blackwell,
    /// B300, GB300: same peaks, more power, faster exponentials.
    #[serde(rename = "blackwell-ultra")]
    BlackwellUltra,
}

impl Generation {
    fn default_newest() -> Self {
        Self::Hopper
    }

    fn of(gpu: &str) -> Self {
        match gpu {
            g if g.starts_with("A100") => Self::Ampere,
            g if g.starts_with('H') => Self::Hopper,
            g if g.starts_with("B3") || g.starts_with("GB3") => Self::BlackwellUltra,
            _ => Self::Blackwell,
        }
    }
}

/// Link latencies, microseconds (arXiv 2505.09343 table 5 for the defaults).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatencyUs {
    /// Between GPUs of one NVLink domain.
    pub nvlink: f64,
    /// Between domains.
    pub network: f64,
}

impl Default for LatencyUs {
    fn default() -> Self {
        Self { nvlink: 3.33, network: 3.7 }
    }
}

/// Everything the cost model knows of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Name for messages and reports.
    pub name: String,
    /// The GPU.
    pub gpu: Gpu,
    /// GPUs that share one NVLink domain ("node").
    pub gpus_per_domain: u64,
    /// Network rate per GPU one way, GB/s.
    pub nic_gbps: f64,
    /// Link latencies.
    #[serde(default)]
    pub latency_us: LatencyUs,
    /// Number of GPUs there are, if that is limited.
    #[serde(default)]
    pub max_gpus: Option<u64>,
    /// Measured collectives inside one domain.
    #[serde(default)]
    pub collectives: Vec<CollectiveCurve>,
}

#[derive(Deserialize)]
struct PresetFile {
    presets: Vec<Preset>,
    gpus: Vec<GpuRecord>,
    collectives: Vec<CurveRecord>,
}

#[derive(Deserialize)]
struct Preset {
    name: String,
    gpu: String,
    gpus_per_domain: u64,
    nic_gbps: f64,
    curves: Option<String>,
}

#[derive(Deserialize)]
struct GpuRecord {
    name: String,
    #[serde(flatten)]
    fields: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct CurveRecord {
    gpu: String,
    #[serde(flatten)]
    curve: CollectiveCurve,
}

/// The preset file, parsed once.
static PRESETS: LazyLock<Result<Vec<Cluster>, String>> = LazyLock::new(|| {
    let file: PresetFile =
        serde_json::from_str(include_str!("../data/hardware.json")).map_err(|e| format!("hardware.json: {e}"))?;
    file.presets.iter().map(|preset| resolve(preset, &file)).collect()
});

fn resolve(preset: &Preset, file: &PresetFile) -> Result<Cluster, String> {
    let record = file.gpus.iter().find(|g| g.name == preset.gpu).ok_or_else(|| format!("no GPU {}", preset.gpu))?;
    let mut fields = record.fields.clone();
    fields.insert("name".into(), record.name.clone().into());
    let mut gpu: Gpu = serde_json::from_value(fields.into()).map_err(|e| format!("{}: {e}", preset.gpu))?;
    gpu.generation = Generation::of(&gpu.name);
    let collectives =
        file.collectives.iter().filter(|c| Some(&c.gpu) == preset.curves.as_ref()).map(|c| c.curve.clone()).collect();
    Ok(Cluster {
        name: preset.name.clone(),
        gpu,
        gpus_per_domain: preset.gpus_per_domain,
        nic_gbps: preset.nic_gbps,
        latency_us: LatencyUs::default(),
        max_gpus: None,
        collectives,
    })
}

impl Cluster {
    /// Names of all presets.
    pub fn preset_names() -> Vec<&'static str> {
        PRESETS.as_ref().map(|all| all.iter().map(|c| c.name.as_str()).collect()).unwrap_or_default()
    }

    /// A preset by name.
    ///
    /// # Errors
    /// `E0404` with the known names.
    pub fn preset(name: &str) -> Result<Self, PlanError> {
        let all =
            PRESETS.as_ref().map_err(|e| PlanError::cluster(e.clone(), "the preset file of this build is damaged"))?;
        all.iter().find(|c| c.name == name).cloned().ok_or_else(|| {
            PlanError::cluster(
                format!("`{name}` is not a cluster preset"),
                format!("presets are {}; or give a cluster file", Self::preset_names().join(", ")),
            )
        })
    }

    /// Reads a cluster file and checks it.
    ///
    /// # Errors
    /// `E0404` for text that is not a cluster, and for figures that cannot be.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let cluster: Self = serde_json::from_str(text).map_err(|e| {
            let wrong = serde_json::from_str(text).ok().and_then(|file| members::wrong(&file, &MEMBERS));
            let what = wrong.as_ref().map_or_else(|| e.to_string(), |(_, what)| what.clone());
            let error = PlanError::cluster(
                format!("the cluster file cannot be read: {what}"),
                "needed: name, gpu {name, bf16_tflops, hbm_bytes, hbm_gbps, nvlink_gbps}, gpus_per_domain, nic_gbps; \
                 `moec plan --cluster dgx-h100 --print-cluster` prints one to start from",
            );
            PlanError { at: wrong.map(|(at, _)| at), ..error }
        })?;
        cluster.check()?;
        Ok(cluster)
    }

    /// Members of the file that this cluster was read from and that mean nothing here: the path of each, and the
    /// names that have a meaning in its place.
    pub fn unread(&self, text: &str) -> Vec<(String, Vec<String>)> {
        let mut unread = Vec::new();
        let given = serde_json::from_str(text).unwrap_or_default();
        members::unread(&given, &serde_json::to_value(self).unwrap_or_default(), "", &mut unread);
        unread
    }

    /// A complete cluster file, ready to be edited.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// Refuses figures that break physics: the gate for edited data.
    ///
    /// # Errors
    /// `E0404` names the figure and what it must be.
    pub fn check(&self) -> Result<(), PlanError> {
        let gpu = &self.gpu;
        let rates = [
            ("gpu.bf16_tflops", Some(gpu.bf16_tflops), 1e5),
            ("gpu.fp8_tflops", gpu.fp8_tflops, 1e6),
            ("gpu.fp4_tflops", gpu.fp4_tflops, 1e6),
            ("gpu.hbm_bytes", Some(gpu.hbm_bytes), 1e14),
            ("gpu.hbm_gbps", Some(gpu.hbm_gbps), 1e6),
            ("gpu.nvlink_gbps", Some(gpu.nvlink_gbps), 1e5),
            ("nic_gbps", Some(self.nic_gbps), 1e5),
            ("latency_us.nvlink", Some(self.latency_us.nvlink), 1e5),
            ("latency_us.network", Some(self.latency_us.network), 1e5),
        ];
        for (name, value, limit) in rates {
            let Some(value) = value else { continue };
            if !(value > 0.0 && value <= limit) {
                return Err(PlanError::cluster(
                    format!("{name} = {value:?} is outside (0, {limit}]"),
                    "rates are GB/s one way per GPU, peaks dense TFLOP/s, memory bytes",
                )
                .at(name));
            }
        }
        if self.max_gpus == Some(0) {
            let help = "give the GPUs of the cluster, or leave max_gpus out";
            return Err(PlanError::cluster("max_gpus = 0", help).at("max_gpus"));
        }
        if self.gpus_per_domain == 0 || self.gpus_per_domain > 4096 {
            return Err(PlanError::cluster(
                format!("gpus_per_domain = {} is outside 1..=4096", self.gpus_per_domain),
                "a DGX node has 8, an NVL72 rack 72",
            )
            .at("gpus_per_domain"));
        }
        if gpu.hbm_bytes < 1e9 {
            return Err(PlanError::cluster(
                format!("gpu.hbm_bytes = {} is less than 1 GB", gpu.hbm_bytes),
                "give bytes, for example 85899345920 for 80 GiB",
            )
            .at("gpu.hbm_bytes"));
        }
        let mut curves = self.collectives.iter().enumerate();
        curves.try_for_each(|(i, c)| c.check(gpu.nvlink_gbps).map_err(|e| e.at(format!("collectives.{i}"))))
    }

    /// Peak of matrix products in a number format, FLOP/s.
    pub fn peak_flops(&self, precision: Precision) -> f64 {
        let gpu = &self.gpu;
        1e12 * match precision {
            Precision::Bf16 => gpu.bf16_tflops,
            Precision::Fp8 => gpu.fp8_tflops.unwrap_or(gpu.bf16_tflops),
            Precision::Fp4 => gpu.fp4_tflops.or(gpu.fp8_tflops).unwrap_or(gpu.bf16_tflops),
        }
    }

    /// Memory bandwidth, bytes/s.
    pub fn hbm(&self) -> f64 {
        self.gpu.hbm_gbps * 1e9
    }
}

/// Number format of matrix products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 or fp16.
    #[default]
    Bf16,
    /// Any 8-bit float scaling recipe.
    Fp8,
    /// Any 4-bit float scaling recipe.
    Fp4,
}

/// What a cluster file consists of.
const MEMBERS: [(&str, Due, Need); 17] = [
    ("", Due::Object, Need::Needed),
    ("name", Due::Text, Need::Needed),
    ("gpu", Due::Object, Need::Needed),
    ("gpu.name", Due::Text, Need::Needed),
    ("gpu.bf16_tflops", Due::Number, Need::Needed),
    ("gpu.hbm_bytes", Due::Number, Need::Needed),
    ("gpu.hbm_gbps", Due::Number, Need::Needed),
    ("gpu.nvlink_gbps", Due::Number, Need::Needed),
    ("gpus_per_domain", Due::Whole, Need::Needed),
    ("nic_gbps", Due::Number, Need::Needed),
    ("gpu.fp8_tflops", Due::Number, Need::OrNull),
    ("gpu.fp4_tflops", Due::Number, Need::OrNull),
    ("latency_us", Due::Object, Need::Free),
    ("latency_us.nvlink", Due::Number, Need::Free),
    ("latency_us.network", Due::Number, Need::Free),
    ("max_gpus", Due::Whole, Need::OrNull),
    ("collectives", Due::List, Need::Free),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_pass_their_own_gate_and_round_trip() {
        assert!(Cluster::preset_names().len() >= 6);
        for name in Cluster::preset_names() {
            let cluster = Cluster::preset(name).unwrap();
            assert_eq!(Cluster::from_json(&cluster.to_json()).unwrap(), cluster);
        }
    }

    #[test]
    fn wrong_files_are_refused_with_a_next_step() {
        assert!(Cluster::preset("dgx").unwrap_err().help.contains("dgx-h100"));
        assert_eq!(Cluster::from_json("[").unwrap_err().code, "E0404");
        let mut cluster = Cluster::preset("dgx-h100").unwrap();
        cluster.gpu.hbm_gbps = 0.0;
        assert!(Cluster::from_json(&cluster.to_json()).unwrap_err().message.contains("hbm_gbps"));
        let mut cluster = Cluster::preset("dgx-h100").unwrap();
        cluster.collectives[0].latency_us[20] = 1.0;
        let error = Cluster::from_json(&cluster.to_json()).unwrap_err();
        assert!(error.message.contains("faster than"), "{error}");
    }
}
