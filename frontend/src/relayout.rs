//! Fitting a form to a checkpoint: other spellings of the layout and of the prefix.
//!
//! Releases and files that were saved again differ in how experts are stored: one tensor each, or
//! stacked, or stacked and transposed. The config does not say which; the tensors do.

use crate::{
    json::cut,
    layout::{self, Glu},
    model::Form,
    weights,
};
use moec_ir::{Code, Diagnostic, Extent, Packing, Source, View};
use std::collections::BTreeMap;

/// Shapes of the tensors of a checkpoint, by name.
pub type Shapes = BTreeMap<String, Vec<u64>>;

/// Matrices of the routed experts, as families name them.
const MATRICES: [&str; 3] = ["experts.{e}.gate_proj", "experts.{e}.up_proj", "experts.{e}.down_proj"];

impl Form {
    /// This form, reading the layout and prefix that a checkpoint has.
    ///
    /// A form whose tensors are all missing is returned as it is; binding says what is missing.
    ///
    /// # Errors
    /// `E0305` when the experts are there under a known name, but in no known shape.
    pub fn with_layout_of(&self, tensors: &Shapes) -> Result<Self, Diagnostic> {
        let mut form = self.clone();
        form.find_prefix(tensors);
        // A checkpoint may hold some of the layers only.
        let Some(prefix) = form.prefixes.iter().find(|p| any(tensors, p)).cloned() else { return Ok(form) };
        let Some(stored) = form.stored() else { return Ok(form) };
        if stored.fits(&stored.now, &prefix, tensors) {
            return Ok(form);
        }
        let mut named = None;
        for glu in stored.others() {
            if stored.fits(&glu, &prefix, tensors) {
                for (name, source) in MATRICES.iter().zip([glu.gate, glu.up, glu.down]) {
                    if let Some(weight) = form.graph.weights.get_mut(*name) {
                        weight.source = source;
                    }
                }
                return Ok(form);
            }
            let tensor = fill(&glu.gate.tensor, &prefix);
            if let Some(shape) = tensors.get(&tensor) {
                named = Some((tensor, shape.clone()));
            }
        }
        match named {
            Some((tensor, shape)) if tensors.get(&fill(&stored.now.gate.tensor, &prefix)).is_none() => {
                Err(Diagnostic::error(
                    Code("E0305"),
                    format!("tensor {} has shape {shape:?}, which is no known layout of experts", cut(&tensor)),
                )
                .note(format!(
                    "{} experts, inner width {}, input width {}",
                    stored.experts, stored.inner, stored.input
                )))
            }
            _ => Ok(form),
        }
    }

    /// The routed experts, if they are gated experts that other layouts exist for.
    fn stored(&self) -> Option<Stored> {
        let [gate, up, down] = MATRICES.map(|name| self.graph.weights.get(name));
        let (gate, up, down) = (gate?, up?, down?);
        let (Extent::Fixed(inner), Extent::Fixed(input)) = (gate.shape.first()?, gate.shape.get(1)?) else {
            return None;
        };
        let interleaved = |s: &Source| s.view.iter().any(|v| matches!(v, View::Slice { step: 2, .. }));
        if interleaved(&gate.source) {
            return None;
        }
        let (dir, _) = gate.source.tensor.split_once("experts")?;
        let now = Glu { gate: gate.source.clone(), up: up.source.clone(), down: down.source.clone() };
        let experts = weights::experts(&self.graph).get(MATRICES[0]).copied()?;
        Some(Stored { now, dir: format!("{dir}experts"), experts, inner: *inner, input: *input })
    }

    /// Replaces the head of the prefixes when the checkpoint has another one in front of `layers.`
    fn find_prefix(&mut self, tensors: &Shapes) {
        if self.prefixes.iter().any(|p| any(tensors, p)) {
            return;
        }
        let Some(prefix) = self.prefixes.first() else { return };
        let Some(at) = prefix.find("layers.") else { return };
        let (head, tail) = prefix.split_at(at);
        let mut heads: Vec<&str> = tensors
            .keys()
            .filter_map(|name| name.find(tail).map(|at| &name[..at]))
            .filter(|h| h.is_empty() || h.ends_with('.'))
            .filter(|h| !["mtp", "vision", "visual", "audio", "talker", "draft"].iter().any(|part| h.contains(part)))
            .collect();
        heads.dedup();
        if let [one] = heads[..] {
            let (old, new) = (head.to_owned(), one.to_owned());
            for prefix in &mut self.prefixes {
                if let Some(rest) = prefix.strip_prefix(&old) {
                    *prefix = format!("{new}{rest}");
                }
            }
        }
    }
}

/// Routed experts as they are read now.
struct Stored {
    now: Glu,
    /// `{p}experts`, or what stands in its place.
    dir: String,
    experts: u64,
    inner: u64,
    input: u64,
}

impl Stored {
    /// The other layouts, with the packing of this one.
    fn others(&self) -> Vec<Glu> {
        let dir = &self.dir;
        let stacked = [format!("{dir}.gate_up_proj"), format!("{dir}.down_proj")];
        let each = format!("{dir}.{{e}}");
        let mut all = vec![
            layout::proj(&each),
            layout::w123(&each),
            layout::stacked(&stacked[0], &stacked[1], self.inner),
            layout::stacked_transposed(&stacked[0], &stacked[1], self.inner),
        ];
        let turned = |source: &Source| source.view.contains(&View::Transpose);
        let gate = &self.now.gate;
        if let Packing::Fp8Block { block: [rows, columns], scale } = &gate.packing {
            let suffix = scale.strip_prefix(&gate.tensor).unwrap_or_default();
            for source in all.iter_mut().flat_map(|glu| [&mut glu.gate, &mut glu.up, &mut glu.down]) {
                let block = if turned(source) == turned(gate) { [*rows, *columns] } else { [*columns, *rows] };
                source.packing = Packing::Fp8Block { scale: format!("{}{suffix}", source.tensor), block };
            }
        }
        all
    }

    /// Whether the first expert's tensors are there, in the shapes of this layout.
    fn fits(&self, glu: &Glu, prefix: &str, tensors: &Shapes) -> bool {
        let matrices = [
            (&glu.gate, [self.inner, self.input]),
            (&glu.up, [self.inner, self.input]),
            (&glu.down, [self.input, self.inner]),
        ];
        matrices.iter().all(|(source, shape)| {
            tensors.get(&fill(&source.tensor, prefix)).is_some_and(|stored| {
                // Blocks of packed types have another rank; binding checks them.
                source.packing != Packing::Plain && source.view.is_empty()
                    || weights::stored_shape(shape, &source.view, self.experts, stored) == *stored
            })
        })
    }
}

/// Whether a tensor's name starts like this.
fn any(tensors: &Shapes, prefix: &str) -> bool {
    tensors.range(prefix.to_owned()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
}

fn fill(pattern: &str, prefix: &str) -> String {
    pattern.replace("{p}", prefix).replace("{e}", "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form() -> Form {
        let text = r#"{"model_type": "qwen3_vl_moe_text", "torch_dtype": "bfloat16", "hidden_size": 64, "num_hidden_layers": 1,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}"#;
        crate::read_config(text, "config.json").unwrap().forms.remove(0)
    }

    fn shapes(tensors: &[(&str, &[u64])]) -> Shapes {
        tensors.iter().map(|(name, shape)| (format!("model.layers.0.mlp.{name}"), shape.to_vec())).collect()
    }

    fn gate(form: &Form) -> &Source {
        &form.graph.weights[MATRICES[0]].source
    }

    #[test]
    fn finds_the_transposed_layout_of_a_release() {
        let form = form();
        let tensors = shapes(&[("experts.gate_up_proj", &[4, 64, 32]), ("experts.down_proj", &[4, 16, 64])]);
        assert_eq!(gate(&form.with_layout_of(&tensors).unwrap()), gate(&form));
    }

    #[test]
    fn finds_the_layout_of_a_file_that_was_saved_again() {
        let tensors = shapes(&[("experts.gate_up_proj", &[4, 32, 64]), ("experts.down_proj", &[4, 64, 16])]);
        let found = form().with_layout_of(&tensors).unwrap();
        assert_eq!(*gate(&found), layout::fused(16).gate);
    }

    #[test]
    fn finds_one_tensor_for_each_expert() {
        let tensors = shapes(&[
            ("experts.0.gate_proj.weight", &[16, 64]),
            ("experts.0.up_proj.weight", &[16, 64]),
            ("experts.0.down_proj.weight", &[64, 16]),
        ]);
        assert_eq!(*gate(&form().with_layout_of(&tensors).unwrap()), layout::split().gate);
    }

    #[test]
    fn finds_the_layout_when_only_a_later_layer_is_there() {
        let mut form = form();
        form.layers.push(1);
        form.prefixes.push("model.layers.1.mlp.".to_owned());
        let tensors: Shapes = [("gate_up_proj", vec![4, 32, 64]), ("down_proj", vec![4, 64, 16])]
            .map(|(name, shape)| (format!("model.layers.1.mlp.experts.{name}"), shape))
            .into();
        assert_eq!(*gate(&form.with_layout_of(&tensors).unwrap()), layout::fused(16).gate);
    }

    #[test]
    fn finds_another_prefix() {
        let tensors: Shapes = [("language_model.model.layers.0.mlp.gate.weight".to_owned(), vec![4, 64])].into();
        assert_eq!(form().with_layout_of(&tensors).unwrap().prefixes, ["language_model.model.layers.0.mlp."]);
    }

    #[test]
    fn refuses_a_shape_that_no_layout_has() {
        let tensors = shapes(&[("experts.gate_up_proj", &[4, 48, 64]), ("experts.down_proj", &[4, 64, 16])]);
        // The name is that of the present layout, so binding reports the shape.
        assert_eq!(gate(&form().with_layout_of(&tensors).unwrap()), gate(&form()));
    }
}
