//! Where experts live: placement, replication, balancing and routing metrics.
//!
//! Loads (tokens per expert and layer) or a trace (routed expert ids per token) go in, a placement comes out:
//! which GPU holds which expert, how often, and how even the load is. The methods are published ones:
//!
//! * [`Method::Eplb`]: replication and packing of EPLB, slot by slot as published;
//! * [`Method::Balance`], [`Method::Ilp`]: the least peak load, by search with a lower bound, or exactly;
//! * [`Method::LeastLoaded`], [`Method::LeastLoadedPaper`]: spill tokens of one step to less loaded GPUs;
//! * [`Method::Affinity`], [`Method::AffinityIlp`], [`Method::MoeTuner`], [`Method::Grouping`]: keep the
//!   experts a token visits close together, from a trace;
//! * [`Method::OnePerRank`]: one expert per rank plus replicas.
//!
//! [`plan_moves`] gives the least weight moves between two layouts. [`metrics`] measures a trace, [`host`] holds
//! the small computations a training host needs beside the kernels.
//!
//! Results serialise with the keys of the published vectors. Same input, same result: nothing depends on hash
//! order or, apart from the time limit of the integer solver, on the clock. Bad input gives a [`PlaceError`].
//!
//! ```
//! use moec_place::{Input, Options, Placement, place};
//!
//! let input = Input::from_json("[[90, 132, 40, 61]]")?;
//! let options = Options { gpus: Some(2), replicas: Some(6), ..Options::default() };
//! let Placement::Replicated(placement) = place(&input, &options)? else { unreachable!() };
//! assert_eq!(placement.logcnt, [[2, 2, 1, 1]]);
//! # Ok::<(), moec_place::PlaceError>(())
//! ```

mod affinity;
mod assign;
mod balance;
mod bound;
mod eplb;
mod error;
mod exact;
mod flow;
mod grouping;
pub mod host;
mod html;
mod input;
mod introsort;
mod layout;
mod least_loaded;
mod loads;
pub mod metrics;
mod moetuner;
mod moves;
mod one_per_rank;
mod options;
mod partition;
mod placement;
mod solver;
mod text;
mod trace;

pub use affinity::AffinityPlacement;
pub use bound::lower_bound;
pub use error::{Code, PlaceError};
pub use grouping::GroupingPlacement;
pub use html::html;
pub use input::{Input, Routing};
pub use layout::{Replicated, max_over_mean};
pub use least_loaded::{LeastLoaded, Variant};
pub use loads::Loads;
pub use moetuner::TunerPlacement;
pub use moves::{Layout, Move, MovePlan, plan_moves, plan_moves_relabeled};
pub use options::{Method, Options};
pub use placement::{Bounded, Placement, place};
pub use text::text;
pub use trace::Trace;
