//! Layers spread over ranks: what each rank is compiled, and all ranks of a layer run in one process.

use crate::{
    Artefact, Compiler, Error,
    compiler::Shared,
    pointed::{self, Refusal},
    reference::{Stored, Tensor, arrays},
};
use indexmap::IndexMap;
use moec_abi::{Chain, Group, Move, MoveKind, Rows, Step};
use moec_frontend::{Form, Model};
use moec_ir::{
    Graph, Op,
    interp::{Array, Rank, Rounding, interpret_ranks},
    ops::{Collective, PartKind},
};
use moec_passes::{Dump, FOLD, Fold, FoldError, Stage};
use moec_plan::{PlanError, ranks::Layout};
use moec_runtime::{ChainLayer, Device, HostTensor, Tensors, Threads};
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc};

/// How a model is spread: a mapping of ranks, and where experts lie if a placement says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spread {
    /// The mapping.
    pub layout: Layout,
    /// For each mixture layer (or one for all) the expert of each slot, slots of a rank side by side. Without it
    /// ranks hold equal runs of consecutive experts.
    pub placement: Option<Vec<Vec<u64>>>,
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        Self::refused(error.code, error.message, error.help)
    }
}

impl From<FoldError> for Error {
    fn from(error: FoldError) -> Self {
        let help = match &error {
            FoldError::Invalid(failure) => return Self::Internal(failure.to_string()),
            FoldError::MixesTokens { .. } => "only choices that each token makes alone can be spread; use one rank",
            FoldError::NoExperts => "a dense layer needs no expert parallelism",
            FoldError::Nowhere(_) => "a placement has at least one slot for every expert",
            FoldError::Empty(_) => "use at most as many expert parallel ranks as there are experts",
            FoldError::Uncut { .. } => "use etp = 1 and more expert parallel ranks",
        };
        Self::refused(moec_plan::error::E_MAPPING, error.to_string(), help)
    }
}

impl From<moec_passes::CutError> for Error {
    fn from(error: moec_passes::CutError) -> Self {
        match error {
            moec_passes::CutError::Invalid(failure) => Self::Internal(failure.to_string()),
            moec_passes::CutError::Crosses { node, why } => Self::Unsupported { node, what: why },
        }
    }
}

impl Spread {
    /// Reads a plan (`moec plan --format json`) and, if there is one, a placement (`moec place --format json`); each is
    /// the name of a file and its text.
    ///
    /// # Errors
    /// One of them is not what it should be; the finding points into the text.
    pub fn from_json(plan: (&str, &str), placement: Option<(&str, &str)>) -> Result<Self, Error> {
        let refused = |(file, text): (&str, &str), why: Refusal| Error::Input(vec![why.point(file, text)]);
        let layout = Layout::from_json(plan.1).map_err(|e| refused(plan, e.into()))?;
        let ep = layout.mapping().ep;
        let slots = |named: (&str, &str)| placed(named.1, ep).map_err(|e| refused(named, e));
        let spread = Self { layout, placement: placement.map(slots).transpose()? };
        for (file, text) in std::iter::once(plan).chain(placement) {
            if let Some(found) = pointed::ambiguous(file, text) {
                return Err(Error::Input(vec![found]));
            }
        }
        Ok(spread)
    }

    /// Ranks that run the same layers as rank 0: those of one pipeline stage.
    ///
    /// # Errors
    /// Only when the layout was changed by hand.
    pub fn ranks(&self) -> Result<Vec<u64>, Error> {
        let first = self.layout.stage(0)?;
        let mut ranks = Vec::new();
        for rank in 0..self.layout.gpus {
            if self.layout.stage(rank)? == first {
                ranks.push(rank);
            }
        }
        Ok(ranks)
    }

    /// Slots of mixture layer number `layer` (counted among mixture layers).
    fn slots(&self, layer: usize) -> Result<Option<&[u64]>, Error> {
        let Some(rows) = &self.placement else { return Ok(None) };
        let row = if rows.len() == 1 { rows.first() } else { rows.get(layer) };
        let ep = self.layout.mapping().ep;
        match row {
            Some(row) if !row.is_empty() && (row.len() as u64).is_multiple_of(ep) => Ok(Some(row)),
            Some(row) => {
                let message = format!("the placement has {} slots for {ep} expert parallel ranks", row.len());
                Err(Error::refused(moec_plan::error::E_MAPPING, message, "place with --gpus equal to ep"))
            }
            None => {
                let message = format!("the placement has {} layers, the model more", rows.len());
                Err(Error::refused(moec_plan::error::E_MAPPING, message, "place all layers, or one for all"))
            }
        }
    }

    /// The graph that `rank` runs for a layer with this graph.
    ///
    /// # Errors
    /// The layer cannot be spread this way.
    pub fn fold(&self, graph: &Graph, slots: Option<&[u64]>, rank: u64) -> Result<Graph, Error> {
        let group = |name: &str, members: moec_plan::ranks::Members| moec_ir::ops::Group {
            name: name.to_owned(),
            ranks: members.ranks,
            at: members.at,
        };
        let ep = group("ep", self.layout.expert_group(rank)?);
        let etp = group("etp", self.layout.shard_group(rank)?);
        let own = slots.map_or_else(|| heavy(graph), <[u64]>::to_vec);
        let ways = ep.ranks.len();
        let run = |i: usize| own[own.len() * i / ways..own.len() * (i + 1) / ways].to_vec();
        let fold = Fold { ep, etp, experts: (0..ways).map(run).collect() };
        Ok(moec_passes::fold_parallelism(graph, &fold)?)
    }
}

/// Experts of the slots of each layer, as many for each of `ep` ranks.
fn placed(text: &str, ep: u64) -> Result<Vec<Vec<u64>>, Refusal> {
    let wrong = |what: String, at: String| {
        let help = "write one with `moec place LOADS --gpus EP --format json`; it has `phy2log`";
        Refusal::new(moec_plan::error::E_MAPPING, format!("the placement cannot be read: {what}"), help, at)
    };
    let file: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string(), String::new()))?;
    let layers = file.get("phy2log").ok_or_else(|| wrong("phy2log is missing".into(), String::new()))?;
    let none = || wrong("phy2log is no list of layers".into(), "phy2log".into());
    let layers = layers.as_array().filter(|l| !l.is_empty()).ok_or_else(none)?;
    let mut rows = Vec::new();
    for (l, row) in layers.iter().enumerate() {
        let at = format!("phy2log.{l}");
        let slots = row.as_array().ok_or_else(|| wrong(format!("{at} is no list of experts"), at.clone()))?;
        let expert = |(s, id): (usize, &Value)| {
            let at = format!("{at}.{s}");
            id.as_u64().ok_or_else(|| wrong(format!("{at} is no expert"), at))
        };
        let row = slots.iter().enumerate().map(expert).collect::<Result<Vec<u64>, _>>()?;
        if row.is_empty() || !(row.len() as u64).is_multiple_of(ep) {
            return Err(wrong(format!("{at} has {} slots for {ep} expert parallel ranks", row.len()), at));
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Experts that move rows: those with matrices.
fn heavy(graph: &Graph) -> Vec<u64> {
    let mut ids = Vec::new();
    for id in graph.ids() {
        let Op::Experts(op) = &graph.node(id).op else { continue };
        for part in &op.bank {
            match part.kind {
                PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) => ids.extend(part.ids[0]..part.ids[1]),
                PartKind::Const { .. } | PartKind::Neuron(_) | PartKind::Identity {} | PartKind::Zero {} => {}
            }
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// A form for one placement of its experts.
struct Piece {
    form: Form,
    slots: Option<Vec<u64>>,
}

impl Compiler {
    /// Compiles what each of these ranks runs. Kernels that ranks have in common are compiled once.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn compile_ranks(&self, model: &Model, spread: &Spread, ranks: &[u64]) -> Result<Vec<Artefact>, Error> {
        self.check_outputs(&model.forms)?;
        let shared = Shared::default();
        ranks.iter().map(|rank| self.compile_rank(model, spread, *rank, &shared)).collect()
    }

    fn compile_rank(&self, model: &Model, spread: &Spread, rank: u64, shared: &Shared) -> Result<Artefact, Error> {
        let stage = spread.layout.stage(rank)?;
        let mut forms = Vec::new();
        let mut chains = Vec::new();
        let mut folded = Vec::new();
        let mut dumps = Vec::new();
        for piece in pieces(model, spread)? {
            let here = |layer: &u64| spread.layout.has_layer(stage, *layer);
            let layers: Vec<u64> = piece.form.layers.iter().copied().filter(here).collect();
            let prefixes = layers.iter().filter_map(|l| piece.form.prefix(*l)).map(str::to_owned).collect();
            if layers.is_empty() {
                continue;
            }
            let mut graph = piece.form.graph;
            if !self.outputs.is_empty() {
                graph.outputs.retain(|o| self.outputs.contains(&o.name) || o.name.starts_with("state_"));
            }
            let outputs = graph.outputs.iter().map(|o| o.name.clone()).collect();
            let before = graph;
            let graph = spread.fold(&before, piece.slots.as_deref(), rank)?;
            if self.dump_passes {
                let (before, after) = (moec_ir::print(&before), moec_ir::print(&graph));
                dumps.push((forms.len(), Dump { pass: FOLD, before, after }));
            }
            let form = Form { graph: graph.clone(), layers: layers.clone(), prefixes };
            let mut steps = Vec::new();
            for stage in moec_passes::stages(&graph)? {
                steps.push(match stage {
                    Stage::Run(part) => {
                        forms.push(Form { graph: *part, ..form.clone() });
                        // Programs are named by their place, which is only unique among several.
                        Step::Run(format!("{}_{}", model.name, forms.len() - 1))
                    }
                    Stage::Move(op) => Step::Move(moved(op)),
                });
            }
            chains.push(Chain { name: model.name.clone(), rank, layers, steps, outputs });
            folded.push(graph);
        }
        if forms.is_empty() {
            let message = format!("rank {rank} is in pipeline stage {stage}, which has no mixture layer");
            return Err(Error::refused(moec_plan::error::E_MAPPING, message, "choose a rank of another stage"));
        }
        let all = Self { outputs: Vec::new(), ..self.clone() };
        let mut artefact = all.compile_sharing(&model.name, &forms, shared)?;
        artefact.manifest.chains = chains;
        for (at, dump) in dumps {
            if let Some(form) = artefact.forms.get_mut(at) {
                form.passes.dumps.insert(0, dump);
            }
        }
        for (i, graph) in folded.iter().enumerate() {
            artefact.files.insert(format!("graph/rank{rank}_{i}.moe"), moec_ir::print(graph).into_bytes());
        }
        Ok(artefact)
    }
}

/// Forms of a model, one for each placement that differs.
fn pieces(model: &Model, spread: &Spread) -> Result<Vec<Piece>, Error> {
    let mut all: Vec<u64> = model.forms.iter().flat_map(|f| f.layers.iter().copied()).collect();
    all.sort_unstable();
    let mut pieces: Vec<Piece> = Vec::new();
    for form in &model.forms {
        let first = pieces.len();
        for (layer, prefix) in form.layers.iter().zip(&form.prefixes) {
            let slots = spread.slots(all.binary_search(layer).unwrap_or(0))?.map(<[u64]>::to_vec);
            match pieces[first..].iter_mut().find(|p| p.slots == slots) {
                Some(piece) => {
                    piece.form.layers.push(*layer);
                    piece.form.prefixes.push(prefix.clone());
                }
                None => pieces.push(Piece {
                    form: Form { graph: form.graph.clone(), layers: vec![*layer], prefixes: vec![prefix.clone()] },
                    slots,
                }),
            }
        }
    }
    Ok(pieces)
}

/// A move as the runtime reads it.
fn moved(op: moec_passes::Move) -> Move {
    let undoes = op.undoes.unwrap_or(0);
    let group = op.op.group();
    let group = Group { name: group.name.clone(), ranks: group.ranks.clone(), at: group.at };
    let kind = match op.op {
        Collective::AllToAll { experts, .. } => MoveKind::AllToAll { experts },
        Collective::AllGather { .. } => MoveKind::AllGather,
        Collective::ReduceScatter { .. } => MoveKind::ReduceScatter { undoes },
        Collective::AllToAllBack { .. } => MoveKind::AllToAllBack { undoes },
    };
    let rows = |r: moec_passes::Rows| Rows { rows: r.rows, experts: r.experts, weights: r.weights };
    Move { kind, group, from: rows(op.from), to: rows(op.to) }
}

/// Rows of a tensor that a rank has; tensors without rows for tokens are for all.
fn rows_of(tensor: &Tensor, total: u64, tokens: &[u64]) -> Tensor {
    if tensor.shape.first() != Some(&total) {
        return tensor.clone();
    }
    let width = tensor.bytes.len() / usize::try_from(total).unwrap_or(1).max(1);
    let row = |t: &u64| usize::try_from(*t).ok().and_then(|t| tensor.bytes.get(t * width..(t + 1) * width));
    let bytes = tokens.iter().filter_map(row).flatten().copied().collect();
    let shape = [tokens.len() as u64].into_iter().chain(tensor.shape.iter().skip(1).copied()).collect();
    Tensor { shape, bytes, ..tensor.clone() }
}

/// Runs `layer` on all ranks of a stage, each on a thread with the tokens that attention leaves there, and puts the
/// results together.
///
/// # Errors
/// A rank's weights do not fit, or its programs fail.
pub fn run_ranks(
    spread: &Spread,
    artefacts: &[(u64, moec_runtime::Artefact)],
    device: &(dyn Fn() -> Arc<dyn Device> + Sync),
    layer: u64,
    tensors: &dyn Tensors,
    (total, inputs): (u64, &[Tensor]),
) -> Result<Vec<Tensor>, Error> {
    let mail = Threads::new();
    let run =
        |rank: u64, artefact: &moec_runtime::Artefact| -> Result<(Vec<u64>, BTreeMap<String, HostTensor>), Error> {
            let tokens = spread.layout.tokens(rank, total)?;
            let chain = ChainLayer::bind(artefact, &device(), layer, tensors)?;
            let own = inputs.iter().map(|t| rows_of(t, total, &tokens));
            let own = own.map(|t| (t.name, HostTensor { dtype: t.dtype, shape: t.shape, bytes: t.bytes })).collect();
            Ok((tokens, chain.run(own, &mail)?))
        };
    let results: Vec<Result<_, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = artefacts
            .iter()
            .map(|(rank, artefact)| {
                let (run, mail) = (&run, &mail);
                scope.spawn(move || {
                    let result = run(*rank, artefact);
                    if result.is_err() {
                        mail.close();
                    }
                    result
                })
            })
            .collect();
        let gone = || Error::Internal("a rank's thread died".to_owned());
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(gone()))).collect()
    });
    // A rank that failed by itself says more than those that waited for it.
    let waited = |e: &Error| matches!(e, Error::Runtime(e) if e.code == moec_runtime::Code::Device);
    let mut parts = Vec::new();
    let mut failure = None;
    for result in results {
        match result {
            Ok(part) => parts.push(part),
            Err(error) if failure.as_ref().is_none_or(waited) => failure = Some(error),
            Err(_) => {}
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(merge(total, &parts)),
    }
}

/// Results of all ranks in the order of all tokens.
fn merge(total: u64, parts: &[(Vec<u64>, BTreeMap<String, HostTensor>)]) -> Vec<Tensor> {
    let mut merged: BTreeMap<&str, Tensor> = BTreeMap::new();
    for (tokens, values) in parts {
        for (name, value) in values {
            let row: Vec<u64> = value.shape.iter().skip(1).copied().collect();
            let width = usize::try_from(row.iter().product::<u64>() * value.dtype.bytes()).unwrap_or(0);
            let tensor = merged.entry(name).or_insert_with(|| Tensor {
                name: name.clone(),
                dtype: value.dtype,
                shape: [total].into_iter().chain(row).collect(),
                // A row that no rank gives shall not look like zeros.
                bytes: vec![0xff; usize::try_from(total).unwrap_or(0) * width],
            });
            for (i, token) in tokens.iter().enumerate() {
                let to = usize::try_from(*token).unwrap_or(0) * width;
                if let (Some(out), Some(row)) =
                    (tensor.bytes.get_mut(to..to + width), value.bytes.get(i * width..(i + 1) * width))
                {
                    out.copy_from_slice(row);
                }
            }
        }
    }
    merged.into_values().collect()
}

/// Results of the folded graphs of these ranks, by the interpreter: rows of `output` in the order of all tokens.
///
/// # Errors
/// The reference has no value for these inputs.
pub fn interpret_spread(
    spread: &Spread,
    graphs: &[(u64, Graph)],
    (tensors, prefix): (&dyn Tensors, &str),
    (total, inputs): (u64, &[Tensor]),
) -> Result<BTreeMap<String, Vec<f64>>, Error> {
    let stored = Stored { tensors, prefix };
    let mut ranks = Vec::new();
    let mut owned = Vec::new();
    for (rank, graph) in graphs {
        let tokens = spread.layout.tokens(*rank, total)?;
        let own: Vec<Tensor> = inputs.iter().map(|t| rows_of(t, total, &tokens)).collect();
        ranks.push(Rank { id: *rank, graph, inputs: arrays(&own), weights: &stored });
        owned.push(tokens);
    }
    let results = interpret_ranks(&ranks, Rounding::Exact)
        .map_err(|e| Error::refused("E0821", format!("the reference cannot be computed: {e}"), "check the weights"))?;
    let mut merged: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (tokens, values) in owned.iter().zip(&results) {
        let values: &IndexMap<String, Array> = values;
        for (name, array) in values {
            let width: usize = array.shape.iter().skip(1).product();
            let numbers = array.floats();
            let size = usize::try_from(total).unwrap_or(0) * width;
            let all = merged.entry(name.clone()).or_insert_with(|| vec![f64::NAN; size]);
            for (i, token) in tokens.iter().enumerate() {
                let to = usize::try_from(*token).unwrap_or(0) * width;
                all[to..to + width].copy_from_slice(&numbers[i * width..(i + 1) * width]);
            }
        }
    }
    Ok(merged)
}
