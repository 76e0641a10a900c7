//! Tokens per expert and layer, checked once.

use crate::error::{Code, PlaceError};

/// Most experts per layer and most layers accepted.
pub(crate) const MAX_SIDE: usize = 4096;
/// Largest single load: above it, whole numbers are not exact in `f64`.
const MAX_LOAD: f64 = 9_007_199_254_740_992.0;

/// Load of every expert in every layer: finite, not negative, rectangular.
#[derive(Clone, Debug, PartialEq)]
pub struct Loads {
    layers: Vec<Vec<f64>>,
}

impl Loads {
    /// Checks `layers` (layers x experts).
    ///
    /// # Errors
    /// Empty or ragged input, and loads that are negative, not finite or above 2^53.
    pub fn new(layers: Vec<Vec<f64>>) -> Result<Self, PlaceError> {
        let shape = "give one list of loads per layer, e.g. [[90, 132, 40], [20, 107, 104]]";
        let Some(first) = layers.first() else {
            return Err(PlaceError::new(Code::Empty, "the loads hold no layer", shape));
        };
        let experts = first.len();
        if experts == 0 {
            return Err(PlaceError::new(Code::Empty, "layer 0 holds no expert", shape).at("0"));
        }
        if experts > MAX_SIDE || layers.len() > MAX_SIDE {
            return Err(PlaceError::new(
                Code::TooLarge,
                format!("{} layers of {experts} experts", layers.len()),
                format!("at most {MAX_SIDE} layers of {MAX_SIDE} experts are placed at once"),
            ));
        }
        for (index, layer) in layers.iter().enumerate() {
            if layer.len() != experts {
                return Err(PlaceError::new(
                    Code::Ragged,
                    format!("layer {index} has {} experts, layer 0 has {experts}", layer.len()),
                    "place layers with different expert counts in separate runs",
                )
                .at(index.to_string()));
            }
            for (expert, &load) in layer.iter().enumerate() {
                if !(0.0..=MAX_LOAD).contains(&load) {
                    return Err(PlaceError::new(
                        Code::BadLoad,
                        format!("layer {index}, expert {expert}: the load is {load}"),
                        "a load is a token count between 0 and 2^53",
                    )
                    .at(format!("{index}.{expert}")));
                }
            }
        }
        Ok(Loads { layers })
    }

    /// One row of loads per layer.
    pub fn layers(&self) -> &[Vec<f64>] {
        &self.layers
    }

    /// Experts per layer.
    pub fn experts(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    /// Whole token counts of one layer, for methods that split token ranges.
    pub(crate) fn token_counts(&self, layer: usize) -> Result<Vec<u64>, PlaceError> {
        let mut total = 0.0;
        let mut counts = Vec::with_capacity(self.experts());
        for (expert, &load) in self.layers[layer].iter().enumerate() {
            if load.fract() != 0.0 {
                return Err(PlaceError::new(
                    Code::BadLoad,
                    format!("layer {layer}, expert {expert}: {load} is not a whole token count"),
                    "least-loaded placement splits token ranges; give counts, not averages",
                ));
            }
            total += load;
            counts.push(load as u64);
        }
        if total > MAX_LOAD {
            return Err(PlaceError::new(
                Code::BadLoad,
                format!("layer {layer} has {total} tokens in all"),
                "at most 2^53 tokens per layer can be split exactly",
            ));
        }
        Ok(counts)
    }
}
