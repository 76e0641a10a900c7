//! Do a checkpoint's tensors fit the slots of a form?

use super::{Checkpoint, TensorInfo, read::same_sides};
use crate::{
    json::cut,
    model::{Form, part_names},
};
use moec_ir::{Code, DType, Diagnostic, Extent, Graph, Op, Packing, View, Weight, WeightName};
use std::collections::BTreeMap;

/// A weight slot with the tensor that fills it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name of the weight in the graph.
    pub weight: WeightName,
    /// Expert inside its bank part, where the weight depends on it.
    pub expert: Option<u64>,
    /// The checkpoint tensor.
    pub tensor: String,
}

/// Finds and checks every tensor of one layer of a form.
///
/// Warnings come back with the bindings.
///
/// # Errors
/// `E0303` for missing tensors, `E0304` for wrong types, `E0305` for wrong shapes.
pub fn bind(
    form: &Form,
    layer: u64,
    checkpoint: &Checkpoint,
) -> Result<(Vec<Binding>, Vec<Diagnostic>), Vec<Diagnostic>> {
    let Some(prefix) = form.prefix(layer) else {
        return Err(vec![Diagnostic::error(Code("E0303"), format!("layer {layer} does not use this form"))]);
    };
    let counts = experts(&form.graph);
    let mut bindings = Vec::new();
    let (mut errors, mut warnings) = (Vec::new(), Vec::new());
    for (name, weight) in &form.graph.weights {
        let each = weight.source.tensor.contains("{e}");
        let count = if each { counts.get(name).copied().unwrap_or(0) } else { 1 };
        for e in 0..count {
            let fill = |pattern: &str| pattern.replace("{p}", prefix).replace("{e}", &e.to_string());
            let tensor = fill(&weight.source.tensor);
            let slot = Slot { layer, tensor: &tensor, checkpoint, experts: counts.get(name).copied() };
            match slot.check(weight, fill) {
                Ok(found) => warnings.extend(found),
                Err(error) => errors.push(error),
            }
            bindings.push(Binding { weight: name.clone(), expert: each.then_some(e), tensor });
            if errors.len() >= crate::limits::ERRORS {
                return Err(errors);
            }
        }
    }
    warnings.truncate(1);
    if errors.is_empty() { Ok((bindings, warnings)) } else { Err(errors) }
}

/// Number of experts behind every weight of a bank.
pub(crate) fn experts(graph: &Graph) -> BTreeMap<WeightName, u64> {
    let mut counts = BTreeMap::new();
    for id in graph.ids() {
        if let Op::Experts(bank) = &graph.node(id).op {
            for part in &bank.bank {
                let end = part.all_numbers().max().map_or(0, |last| last.saturating_add(1));
                for name in part_names(&part.kind) {
                    let count = counts.entry(name.clone()).or_insert(0);
                    *count = end.max(*count);
                }
            }
        }
    }
    counts
}

struct Slot<'a> {
    layer: u64,
    tensor: &'a str,
    checkpoint: &'a Checkpoint,
    experts: Option<u64>,
}

impl Slot<'_> {
    fn check(&self, weight: &Weight, fill: impl Fn(&str) -> String) -> Result<Option<Diagnostic>, Diagnostic> {
        let info = self.find(self.tensor)?;
        let mut warning = None;
        let stored: Vec<u64> = match &weight.source.packing {
            Packing::Plain => {
                warning = self.plain_type(info, weight.dtype)?;
                info.shape.clone()
            }
            Packing::Fp8Block { scale, block } => {
                self.typed(info, self.tensor, &[DType::F8e4m3])?;
                let scale = fill(scale);
                let scales = self.find(&scale)?;
                self.typed(scales, &scale, &[DType::F32, DType::Bf16, DType::F16])?;
                let mut expected = info.shape.clone();
                for (side, size) in expected.iter_mut().rev().zip(block.iter().rev()) {
                    *side = side.div_ceil((*size).max(1));
                }
                if !same_sides(&scales.shape, &expected) {
                    self.shaped(&scale, &scales.shape, &expected)?;
                }
                info.shape.clone()
            }
            Packing::Mxfp4 { scales } => {
                self.typed(info, self.tensor, &[DType::U8])?;
                let name = fill(scales);
                let found = self.find(&name)?;
                self.typed(found, &name, &[DType::U8])?;
                let (Some(16), Some(blocks)) = (info.shape.last(), info.shape.len().checked_sub(1)) else {
                    return Err(self.shape_error(self.tensor, &info.shape, "blocks of 16 bytes"));
                };
                self.shaped(&name, &found.shape, &info.shape[..blocks])?;
                let mut decoded = info.shape[..blocks].to_vec();
                if let Some(last) = decoded.last_mut() {
                    *last = last.saturating_mul(32);
                }
                decoded
            }
        };
        let sides: Vec<u64> = weight.shape.iter().map(Extent::max).collect();
        let expected = stored_shape(&sides, &weight.source.view, self.experts.unwrap_or(1), &stored);
        self.shaped(self.tensor, &stored, &expected)?;
        Ok(warning)
    }

    fn find(&self, name: &str) -> Result<&TensorInfo, Diagnostic> {
        self.checkpoint.tensor(name).ok_or_else(|| {
            let files = self.checkpoint.files();
            let searched = match files[..] {
                [one] => one.to_owned(),
                _ => format!("{} shards", files.len()),
            };
            Diagnostic::error(Code("E0303"), format!("tensor {} of layer {} is missing", cut(name), self.layer))
                .note(format!("searched {searched}"))
        })
    }

    /// Floats may be stored wider or narrower than the model's type; narrowing is said.
    fn plain_type(&self, info: &TensorInfo, wanted: DType) -> Result<Option<Diagnostic>, Diagnostic> {
        let floats = [DType::F64, DType::F32, DType::Bf16, DType::F16];
        if !floats.contains(&wanted) {
            return self.typed(info, self.tensor, &[wanted]).map(|()| None);
        }
        self.typed(info, self.tensor, &floats)?;
        let same = info.dtype == Some(wanted);
        let widened = wanted == DType::F64 || (wanted == DType::F32 && info.dtype != Some(DType::F64));
        let text = format!(
            "tensor {} is {}, rounded to {} when it is loaded",
            cut(self.tensor),
            info.type_name,
            wanted.name()
        );
        Ok((!same && !widened).then(|| {
            Diagnostic::warning(Code("W0301"), text)
                .help("set torch_dtype to the type of the weights to keep them as they are")
        }))
    }

    fn typed(&self, info: &TensorInfo, name: &str, allowed: &[DType]) -> Result<(), Diagnostic> {
        if info.dtype.is_some_and(|d| allowed.contains(&d)) {
            return Ok(());
        }
        let wanted: Vec<&str> = allowed.iter().map(|d| d.name()).collect();
        Err(Diagnostic::error(
            Code("E0304"),
            format!(
                "tensor {} of layer {} is {}, expected {}",
                cut(name),
                self.layer,
                info.type_name,
                wanted.join(" or ")
            ),
        ))
    }

    fn shaped(&self, name: &str, found: &[u64], expected: &[u64]) -> Result<(), Diagnostic> {
        if found == expected {
            return Ok(());
        }
        let error = self.shape_error(name, found, &format!("{expected:?}"));
        let mut swapped = expected.to_vec();
        let n = swapped.len();
        if n >= 2 {
            swapped.swap(n - 2, n - 1);
        }
        Err(if found == swapped { error.help("it looks transposed") } else { error })
    }

    fn shape_error(&self, name: &str, found: &[u64], expected: &str) -> Diagnostic {
        Diagnostic::error(
            Code("E0305"),
            format!("tensor {} of layer {} has shape {found:?}, expected {expected}", cut(name), self.layer),
        )
    }
}

/// The shape that a tensor must have for its view to give the weight: the view, backwards.
///
/// What a step loses (the other half of a slice) follows from how the layouts use it.
pub(crate) fn stored_shape(weight: &[u64], view: &[View], experts: u64, stored: &[u64]) -> Vec<u64> {
    let mut shape = weight.to_vec();
    for (i, step) in view.iter().enumerate().rev() {
        match step {
            View::Expert => shape.insert(0, experts),
            View::Index { index } => shape.insert(0, stored.first().copied().unwrap_or(0).max(index + 1)),
            View::ExpertRows { rows } => {
                if let Some(first) = shape.first_mut() {
                    *first = rows.saturating_mul(experts);
                }
            }
            View::Slice { axis, len, .. } => {
                // Gate and up are two halves, side by side or interleaved.
                if let Some(side) = usize::try_from(*axis).ok().and_then(|a| shape.get_mut(a)) {
                    *side = len.saturating_mul(2);
                }
            }
            View::Transpose => {
                let n = shape.len();
                if n >= 2 {
                    shape.swap(n - 2, n - 1);
                }
            }
            View::Reshape { shape: after } => {
                let total = |s: &[u64]| s.iter().fold(1u64, |n, side| n.saturating_mul(*side));
                if i == 0 && total(stored) == total(after) {
                    shape = stored.to_vec();
                }
            }
        }
    }
    shape
}
