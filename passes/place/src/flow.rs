//! Token transitions between the experts of adjacent layers.

use crate::trace::Trace;

/// `between[l][a * experts + b]`: tokens that use expert `a` in layer `l` and `b` in layer `l + 1`.
///
/// A token that uses several experts counts once per pair, as in [`crate::metrics::affinity`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) experts: usize,
    pub(crate) layers: usize,
    pub(crate) between: Vec<Vec<i64>>,
}

impl Flow {
    pub(crate) fn new(trace: &Trace) -> Self {
        let experts = trace.experts();
        let mut between = vec![vec![0; experts * experts]; trace.layers() - 1];
        for token in 0..trace.tokens() {
            for (layer, pairs) in between.iter_mut().enumerate() {
                for a in trace.routed(token, layer) {
                    for b in trace.routed(token, layer + 1) {
                        pairs[a * experts + b] += 1;
                    }
                }
            }
        }
        Flow { experts, layers: trace.layers(), between }
    }

    /// All transitions.
    pub(crate) fn total(&self) -> i64 {
        self.between.iter().flatten().sum()
    }

    /// Transitions whose two experts lie in the same part, `part[layer][expert]`; `None` is in no part.
    pub(crate) fn local(&self, part: &[Vec<Option<usize>>]) -> i64 {
        let mut local = 0;
        for (layer, pairs) in self.between.iter().enumerate() {
            for (a, row) in pairs.chunks(self.experts).enumerate() {
                let Some(of_a) = part[layer][a] else { continue };
                for (b, &tokens) in row.iter().enumerate() {
                    if part[layer + 1][b] == Some(of_a) {
                        local += tokens;
                    }
                }
            }
        }
        local
    }

    /// Transitions between expert `e` of `layer` and each part of the layer before and the one after.
    pub(crate) fn gain(
        &self,
        layer: usize,
        e: usize,
        parts: usize,
        part: &[Vec<Option<usize>>],
        sides: Sides,
    ) -> Vec<i64> {
        let mut gain = vec![0; parts];
        if layer > 0 && sides.before {
            for (a, of_a) in part[layer - 1].iter().enumerate() {
                if let Some(p) = of_a {
                    gain[*p] += self.between[layer - 1][a * self.experts + e];
                }
            }
        }
        if layer + 1 < self.layers && sides.after {
            for (b, of_b) in part[layer + 1].iter().enumerate() {
                if let Some(p) = of_b {
                    gain[*p] += self.between[layer][e * self.experts + b];
                }
            }
        }
        gain
    }

    /// Transitions from and to each expert of the layers beside `layer`: how the expert is used.
    pub(crate) fn profile(&self, layer: usize, e: usize) -> Vec<i64> {
        let mut profile = Vec::with_capacity(2 * self.experts);
        if layer + 1 < self.layers {
            profile.extend_from_slice(&self.between[layer][e * self.experts..(e + 1) * self.experts]);
        }
        if layer > 0 {
            profile.extend((0..self.experts).map(|a| self.between[layer - 1][a * self.experts + e]));
        }
        profile
    }
}

/// Which neighbor layers a gain looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sides {
    pub(crate) before: bool,
    pub(crate) after: bool,
}

impl Sides {
    pub(crate) const BOTH: Sides = Sides { before: true, after: true };
}
