//! The least set of weight moves between two layouts (ElasticMoE, arXiv 2510.02613).
//!
//! A device keeps what it already holds; each expert it lacks is one copy from a device that has it. No plan
//! moves less, since every missing (device, expert) pair has to arrive. Replicas on one device share the weights.

use crate::error::{Code, PlaceError};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;

/// Which experts each device holds, per layer: `[layer][gpu]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    layers: Vec<Vec<BTreeSet<usize>>>,
}

impl Layout {
    /// A layout from physical slots (`phy2log`), `slots / gpus` on each GPU.
    ///
    /// # Errors
    /// No GPU, no layer, or slots that do not divide over the GPUs.
    pub fn from_slots(phy2log: &[Vec<usize>], gpus: usize) -> Result<Self, PlaceError> {
        let slots = phy2log.first().map_or(0, Vec::len);
        if gpus == 0 || slots == 0 || phy2log.iter().any(|l| l.len() != slots) || !slots.is_multiple_of(gpus) {
            return Err(PlaceError::new(
                Code::NotDivisible,
                format!("{slots} slots per layer on {gpus} GPUs"),
                "a layout has the same number of slots in every layer and on every GPU",
            ));
        }
        let layer = |l: &Vec<usize>| l.chunks(slots / gpus).map(|gpu| gpu.iter().copied().collect()).collect();
        Ok(Layout { layers: phy2log.iter().map(layer).collect() })
    }

    /// A layout from what `moec place --format json` printed, by itself or as the `placement` of a list of moves.
    ///
    /// # Errors
    /// Text that is not JSON, or no such placement; the error names the member.
    pub fn from_json(text: &str) -> Result<Self, PlaceError> {
        let file: Value = serde_json::from_str(text)
            .map_err(|e| PlaceError::new(Code::NotJson, format!("not JSON: {e}"), PRINTED).at(""))?;
        match file.get("placement") {
            Some(placement) => printed(placement).map_err(|e| e.under("placement")),
            None => printed(&file),
        }
    }

    /// Experts held, `[layer][gpu]`.
    pub fn layers(&self) -> &[Vec<BTreeSet<usize>>] {
        &self.layers
    }

    fn gpus(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }
}

const PRINTED: &str = "name what `moec place --format json` printed; it has `phy2log` and `gpu_load`";

/// The placement of a file: the experts of slots, and loads, of which only the number of GPUs counts.
fn printed(placement: &Value) -> Result<Layout, PlaceError> {
    let wrong = |at: String, what: &str| {
        PlaceError::new(Code::UnknownForm, format!("the placement cannot be read: {at} {what}"), PRINTED).at(at)
    };
    let list = |value: Option<&Value>, at: &str| match value {
        Some(Value::Array(items)) if !items.is_empty() => Ok(items.clone()),
        Some(_) => Err(wrong(at.to_owned(), "is no list of layers")),
        None => Err(PlaceError::new(Code::UnknownForm, format!("{at} is missing"), PRINTED)),
    };
    let mut phy2log = Vec::new();
    for (l, layer) in list(placement.get("phy2log"), "phy2log")?.iter().enumerate() {
        let at = format!("phy2log.{l}");
        let slots = layer.as_array().ok_or_else(|| wrong(at.clone(), "is no list of experts"))?;
        let expert = |(s, id): (usize, &Value)| {
            let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
            id.ok_or_else(|| wrong(format!("{at}.{s}"), "is no expert"))
        };
        phy2log.push(slots.iter().enumerate().map(expert).collect::<Result<Vec<_>, _>>()?);
    }
    let loads = list(placement.get("gpu_load"), "gpu_load")?;
    let gpus = loads[0].as_array().ok_or_else(|| wrong("gpu_load.0".to_owned(), "is no list of loads"))?.len();
    Layout::from_slots(&phy2log, gpus).map_err(|e| e.at("phy2log"))
}

/// One expert's weights, as placed by a move plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Move {
    /// MoE layer.
    pub layer: usize,
    /// Expert of that layer.
    pub expert: usize,
    /// Device that sends.
    pub from: usize,
    /// Device that receives.
    pub to: usize,
}

/// What changes between two layouts, and what stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MovePlan {
    /// Copies between devices, in layer, device, expert order.
    pub moves: Vec<Move>,
    /// `(layer, expert, gpu)` freed after the switch.
    pub drops: Vec<(usize, usize, usize)>,
    /// Number of (layer, device, expert) that stay in place.
    pub kept: usize,
    /// Device that takes each GPU of the new layout.
    pub device_of_gpu: Vec<usize>,
}

impl MovePlan {
    /// Bytes copied between devices, for experts of `bytes_per_expert`.
    pub fn bytes_moved(&self, bytes_per_expert: u64) -> u64 {
        (self.moves.len() as u64).saturating_mul(bytes_per_expert)
    }

    /// The layout that `old` becomes: copies arrive, then drops are freed.
    pub fn apply(&self, old: &Layout) -> Layout {
        let devices = self.device_of_gpu.iter().map(|&d| d + 1).max().unwrap_or(0).max(old.gpus());
        let mut layers = old.layers.clone();
        layers.iter_mut().for_each(|layer| layer.resize(devices, BTreeSet::new()));
        for step in &self.moves {
            layers[step.layer][step.to].insert(step.expert);
        }
        for &(layer, expert, gpu) in &self.drops {
            layers[layer][gpu].remove(&expert);
        }
        Layout { layers }
    }
}

/// The least moves from `old` to `new`, GPU `g` of `new` being device `g`.
///
/// # Errors
/// Different numbers of layers, or an expert of `new` that no device holds in `old`.
pub fn plan_moves(old: &Layout, new: &Layout) -> Result<MovePlan, PlaceError> {
    plan(old, new, (0..new.gpus()).collect())
}

/// The least moves from `old` to `new` when each GPU of `new` may be any device: an assignment problem.
///
/// Devices are those of the larger layout.
///
/// # Errors
/// As [`plan_moves`].
pub fn plan_moves_relabeled(old: &Layout, new: &Layout) -> Result<MovePlan, PlaceError> {
    let devices = old.gpus().max(new.gpus());
    let overlap = |gpu: usize, device: usize| -> i64 {
        let both = old.layers.iter().zip(&new.layers);
        let held = |(o, n): (&Vec<BTreeSet<usize>>, &Vec<BTreeSet<usize>>)| match (n.get(gpu), o.get(device)) {
            (Some(n), Some(o)) => n.intersection(o).count() as i64,
            (_, _) => 0,
        };
        both.map(held).sum()
    };
    let gain: Vec<Vec<i64>> =
        (0..devices).map(|gpu| (0..devices).map(|device| overlap(gpu, device)).collect()).collect();
    let start: Vec<usize> = (0..devices).collect();
    let mut device_of_gpu = crate::assign::improve(&gain, devices, start);
    device_of_gpu.truncate(new.gpus());
    plan(old, new, device_of_gpu)
}

fn plan(old: &Layout, new: &Layout, device_of_gpu: Vec<usize>) -> Result<MovePlan, PlaceError> {
    if old.layers.len() != new.layers.len() {
        return Err(PlaceError::new(
            Code::Ragged,
            format!("the old layout has {} layers, the new one {}", old.layers.len(), new.layers.len()),
            "compare layouts of the same model",
        ));
    }
    let nothing = BTreeSet::new();
    let (mut moves, mut drops, mut kept) = (Vec::new(), Vec::new(), 0);
    let devices = device_of_gpu.iter().map(|&d| d + 1).max().unwrap_or(0).max(old.gpus());
    let mut gpu_of_device = vec![None; devices];
    for (gpu, &device) in device_of_gpu.iter().enumerate() {
        gpu_of_device[device] = Some(gpu);
    }
    for (layer, (have, want)) in old.layers.iter().zip(&new.layers).enumerate() {
        let mut sent = vec![0_usize; devices];
        for (device, gpu) in gpu_of_device.iter().enumerate() {
            let held = have.get(device).unwrap_or(&nothing);
            let wanted = gpu.and_then(|gpu| want.get(gpu)).unwrap_or(&nothing);
            kept += held.intersection(wanted).count();
            drops.extend(held.difference(wanted).map(|&expert| (layer, expert, device)));
            for &expert in wanted.difference(held) {
                // The holder that has sent least so far, so that no link carries all copies.
                let holders = (0..have.len()).filter(|&gpu| have[gpu].contains(&expert));
                let Some(from) = holders.min_by_key(|&gpu| sent[gpu]) else {
                    return Err(PlaceError::new(
                        Code::WrongInput,
                        format!("layer {layer}: no device holds expert {expert} in the old layout"),
                        "load that expert from storage first, or compare layouts of the same model",
                    ));
                };
                sent[from] += 1;
                moves.push(Move { layer, expert, from, to: device });
            }
        }
    }
    Ok(MovePlan { moves, drops, kept, device_of_gpu })
}
