//! What a caller may ask for: the method and the sizes of the cluster.

use crate::error::{Code, PlaceError, divisors, nearby_multiples};

/// How experts are placed. A closed list: each variant is one published method or a named variant of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// EPLB (deepseek-ai/EPLB): hierarchical when the groups divide over the nodes, else global.
    Eplb,
    /// Water-filled replicas, packing, local search; reports a proven lower bound.
    Balance,
    /// The same problem as [`Method::Balance`] as an integer program, exact when time allows.
    Ilp,
    /// Least-loaded expert parallelism as its published code computes it (arXiv 2601.17111).
    LeastLoaded,
    /// Least-loaded expert parallelism as the paper writes it (arXiv 2601.17111, algorithms 2 and 3).
    LeastLoadedPaper,
    /// Inter-layer affinity of a trace (ExFlow, arXiv 2401.08383), by local search.
    Affinity,
    /// The ExFlow program, exact on small cases.
    AffinityIlp,
    /// Balanced clusters, then clusters onto GPUs by traffic (MoETuner, arXiv 2502.06643).
    MoeTuner,
    /// Co-clustering of tokens and experts (Speculative MoE, arXiv 2503.04398).
    Grouping,
    /// One expert per rank plus replicas (CloudMatrix384, arXiv 2506.12708).
    OnePerRank,
}

impl Method {
    /// All methods, in the order they are listed to users.
    pub const ALL: [Method; 10] = [
        Method::Eplb,
        Method::Balance,
        Method::Ilp,
        Method::LeastLoaded,
        Method::LeastLoadedPaper,
        Method::Affinity,
        Method::AffinityIlp,
        Method::MoeTuner,
        Method::Grouping,
        Method::OnePerRank,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::Eplb => "eplb",
            Method::Balance => "balance",
            Method::Ilp => "ilp",
            Method::LeastLoaded => "least-loaded",
            Method::LeastLoadedPaper => "least-loaded-paper",
            Method::Affinity => "affinity",
            Method::AffinityIlp => "affinity-ilp",
            Method::MoeTuner => "moetuner",
            Method::Grouping => "grouping",
            Method::OnePerRank => "one-per-rank",
        }
    }

    /// One line of help.
    pub fn about(self) -> &'static str {
        match self {
            Method::Eplb => "replicate and pack as EPLB does (hierarchical or global)",
            Method::Balance => "replicate, pack and search; reports a lower bound",
            Method::Ilp => "integer program for the smallest peak load, with a time limit",
            Method::LeastLoaded => "spill tokens of overloaded experts (published code)",
            Method::LeastLoadedPaper => "spill tokens of overloaded experts (paper's algorithm)",
            Method::Affinity => "keep consecutive experts of a token on one GPU (needs a trace)",
            Method::AffinityIlp => "the same as an integer program, for small cases",
            Method::MoeTuner => "balanced clusters, then least traffic between GPUs (needs a trace)",
            Method::Grouping => "group tokens and experts together (needs a trace)",
            Method::OnePerRank => "one expert per rank, the other ranks hold replicas",
        }
    }

    /// Reads a method by its name.
    ///
    /// # Errors
    /// An unknown name; the help lists the known ones.
    pub fn from_name(name: &str) -> Result<Self, PlaceError> {
        let found = Method::ALL.into_iter().find(|m| m.name() == name);
        found.ok_or_else(|| {
            PlaceError::new(
                Code::BadOption,
                format!("unknown method {:?}", name.chars().take(60).collect::<String>()),
                format!("methods: {}", Method::ALL.map(Method::name).join(", ")),
            )
        })
    }

    /// Whether the method reads token routes rather than loads.
    pub fn needs_trace(self) -> bool {
        match self {
            Method::Affinity | Method::AffinityIlp | Method::MoeTuner | Method::Grouping => true,
            Method::Eplb
            | Method::Balance
            | Method::Ilp
            | Method::LeastLoaded
            | Method::LeastLoadedPaper
            | Method::OnePerRank => false,
        }
    }
}

/// Request of the caller; what is `None` is taken from the input file, then from the default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Method; default by kind of input (see [`crate::place`]).
    pub method: Option<Method>,
    /// GPUs over which experts are spread (EP size). Required.
    pub gpus: Option<usize>,
    /// Server nodes; default 1.
    pub nodes: Option<usize>,
    /// Expert slots over all GPUs; default one per expert.
    pub replicas: Option<usize>,
    /// Expert groups that stay together on a node; default 1.
    pub groups: Option<usize>,
    /// Experts per GPU before spilling (least-loaded); default experts / GPUs.
    pub experts_per_gpu: Option<usize>,
    /// Capacity factor of least-loaded: default 1.1 for the code, 1 for the paper.
    pub alpha: Option<f64>,
    /// Imbalance below which least-loaded stays plain expert parallelism; default 1.3.
    pub lambda: Option<f64>,
    /// Smallest spilled chunk in tokens (least-loaded); default 1024.
    pub min_tokens: Option<u64>,
    /// Number of experts, where a trace alone does not say it.
    pub experts: Option<usize>,
    /// Time limit of the integer solver in seconds; default 10.
    pub time_limit_s: Option<f64>,
    /// How much slower a link between nodes is than one inside a node (MoETuner); default 8.
    pub inter_node_cost: Option<f64>,
    /// Weight of load balance against remote activation, 0 to 1 (grouping); default 0.1.
    pub theta: Option<f64>,
}

impl Options {
    /// Fills what is missing here from `other`.
    pub fn or(&self, other: &Options) -> Options {
        Options {
            method: self.method.or(other.method),
            gpus: self.gpus.or(other.gpus),
            nodes: self.nodes.or(other.nodes),
            replicas: self.replicas.or(other.replicas),
            groups: self.groups.or(other.groups),
            experts_per_gpu: self.experts_per_gpu.or(other.experts_per_gpu),
            alpha: self.alpha.or(other.alpha),
            lambda: self.lambda.or(other.lambda),
            min_tokens: self.min_tokens.or(other.min_tokens),
            experts: self.experts.or(other.experts),
            time_limit_s: self.time_limit_s.or(other.time_limit_s),
            inter_node_cost: self.inter_node_cost.or(other.inter_node_cost),
            theta: self.theta.or(other.theta),
        }
    }

    /// An option in `low..=high`, or its default.
    pub(crate) fn number(value: Option<f64>, name: &str, default: f64, low: f64, high: f64) -> Result<f64, PlaceError> {
        let value = value.unwrap_or(default);
        if (low..=high).contains(&value) {
            return Ok(value);
        }
        Err(PlaceError::new(
            Code::BadOption,
            format!("{name} is {value}"),
            format!("{name} lies between {low} and {high}; the default is {default}"),
        ))
    }
}

/// Most GPUs and most slots accepted.
const MAX_GPUS: usize = 65_536;

/// Sizes that passed the checks all methods share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cluster {
    pub(crate) gpus: usize,
    pub(crate) nodes: usize,
    pub(crate) groups: usize,
    pub(crate) slots: usize,
}

impl Cluster {
    /// Checks the counts against the number of experts; `slots` is a multiple of `gpus` and holds all experts.
    pub(crate) fn new(options: &Options, experts: usize) -> Result<Self, PlaceError> {
        let gpus = gpus(options)?;
        let nodes = positive(options.nodes.unwrap_or(1), "nodes")?;
        let groups = positive(options.groups.unwrap_or(1), "groups")?;
        let slots = options.replicas.unwrap_or(experts);
        if slots > MAX_GPUS {
            return Err(PlaceError::new(
                Code::TooLarge,
                format!("{slots} expert slots"),
                format!("at most {MAX_GPUS} slots are placed"),
            ));
        }
        if !slots.is_multiple_of(gpus) {
            return Err(PlaceError::new(
                Code::NotDivisible,
                format!("{slots} expert slots (replicas) do not divide over {gpus} GPUs"),
                format!("{} replicas would work", nearby_multiples(gpus, slots, experts)),
            ));
        }
        if slots < experts {
            return Err(PlaceError::new(
                Code::TooFewSlots,
                format!("{slots} replicas cannot hold {experts} experts"),
                format!("every expert needs one; {} replicas would work", nearby_multiples(gpus, slots, experts)),
            ));
        }
        let cluster = Cluster { gpus, nodes, groups, slots };
        cluster.node_gpus()?;
        Ok(cluster)
    }

    /// Slots per GPU.
    pub(crate) fn per_gpu(&self) -> usize {
        self.slots / self.gpus
    }

    /// The grouped (hierarchical) form of a request: groups over nodes, GPUs over nodes. One node otherwise.
    pub(crate) fn hierarchy(&self, experts: usize) -> Result<Self, PlaceError> {
        if !self.groups.is_multiple_of(self.nodes) {
            return Ok(Cluster { nodes: 1, groups: 1, ..*self });
        }
        if !experts.is_multiple_of(self.groups) {
            return Err(PlaceError::new(
                Code::NotDivisible,
                format!("{experts} experts do not divide into {} groups", self.groups),
                format!("group counts that work: {}", divisors(experts)),
            ));
        }
        Ok(*self)
    }

    /// GPUs per node.
    pub(crate) fn node_gpus(&self) -> Result<usize, PlaceError> {
        if !self.gpus.is_multiple_of(self.nodes) {
            return Err(PlaceError::new(
                Code::NotDivisible,
                format!("{} GPUs do not divide over {} nodes", self.gpus, self.nodes),
                format!("node counts that work: {}", divisors(self.gpus)),
            ));
        }
        Ok(self.gpus / self.nodes)
    }

    /// Refuses replicas, for methods that place each expert once.
    pub(crate) fn without_replicas(&self, experts: usize, method: Method) -> Result<(), PlaceError> {
        if self.slots == experts {
            return Ok(());
        }
        Err(PlaceError::new(
            Code::BadOption,
            format!(
                "{} places each expert once; {} replicas were asked for {experts} experts",
                method.name(),
                self.slots
            ),
            format!("ask for {experts} replicas, or use eplb or balance"),
        ))
    }
}

/// The GPU count of a request.
pub(crate) fn gpus(options: &Options) -> Result<usize, PlaceError> {
    let Some(gpus) = options.gpus else {
        return Err(PlaceError::new(
            Code::BadCount,
            "the number of GPUs is not given",
            "give it with --gpus N, or as num_gpus or ep_size in the input",
        ));
    };
    positive(gpus, "gpus")?;
    if gpus > MAX_GPUS {
        return Err(PlaceError::new(
            Code::TooLarge,
            format!("{gpus} GPUs"),
            format!("at most {MAX_GPUS} GPUs are placed"),
        ));
    }
    Ok(gpus)
}

fn positive(count: usize, name: &str) -> Result<usize, PlaceError> {
    if count == 0 {
        return Err(PlaceError::new(Code::BadCount, format!("{name} is 0"), format!("{name} must be at least 1")));
    }
    Ok(count)
}
