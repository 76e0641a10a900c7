//! One rank of a layer that is spread over several: programs, and moves of rows between them.

use crate::{
    artefact::Artefact,
    collective::Collectives,
    device::Device,
    error::{Code, Result, RuntimeError},
    layer::{Layer, Model},
    tensors::Tensors,
};
use moec_abi::{Buffer, BufferKind, Chain, DType, Move, MoveKind, Rows, Step};
use std::{collections::BTreeMap, sync::Arc};

/// A tensor between the steps of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTensor {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Elements, little-endian.
    pub bytes: Vec<u8>,
}

/// A chain with bound weights.
pub struct ChainLayer {
    chain: Chain,
    /// The program of each step that is one.
    programs: Vec<Option<Layer>>,
}

/// What a move has to remember for the way back.
enum Trail {
    /// For each member the slots whose rows it got, and how many rows came from it; shape of the route.
    Sent { slots: Vec<Vec<usize>>, received: Vec<usize>, route: [u64; 2] },
    /// How many rows each member gave.
    Gathered { counts: Vec<usize> },
}

fn broken(message: impl Into<String>) -> RuntimeError {
    RuntimeError::new(Code::Artefact, message)
}

impl HostTensor {
    fn rows(&self) -> usize {
        self.shape.first().map_or(0, |n| *n as usize)
    }

    /// Bytes of one row.
    fn row_bytes(&self) -> usize {
        self.shape.iter().skip(1).product::<u64>() as usize * self.dtype.bytes() as usize
    }

    fn row(&self, i: usize) -> &[u8] {
        let width = self.row_bytes();
        &self.bytes[i * width..(i + 1) * width]
    }

    fn ints(&self) -> Result<Vec<i64>> {
        match self.dtype {
            DType::I32 => Ok(self.bytes.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect()),
            DType::I64 => Ok(self.bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
            _ => Err(broken("experts of rows are not integers")),
        }
    }
}

impl ChainLayer {
    /// Binds the weights of `layer` to every program of a chain of the artefact.
    ///
    /// # Errors
    /// The artefact has no chain for the layer, no program runs here, or the tensors do not fit.
    pub fn bind(artefact: &Artefact, device: &Arc<dyn Device>, layer: u64, tensors: &dyn Tensors) -> Result<Self> {
        let chain = artefact.manifest().chains.iter().find(|c| c.layers.contains(&layer));
        let chain = chain.ok_or_else(|| broken(format!("the artefact has no chain for layer {layer}")))?.clone();
        let mut programs = Vec::new();
        for step in &chain.steps {
            programs.push(match step {
                Step::Run(name) => {
                    let model = Model::new(Arc::new(artefact.only(name)), Arc::clone(device));
                    Some(model.layer(layer, tensors)?)
                }
                Step::Move(_) => None,
            });
        }
        Ok(Self { chain, programs })
    }

    /// The chain.
    pub const fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Runs all steps on the tokens of this rank and gives the results of the layer. Other ranks run at the same time.
    ///
    /// # Errors
    /// An input is missing or does not fit, a program fails, or another rank is gone.
    pub fn run(
        &self,
        inputs: BTreeMap<String, HostTensor>,
        others: &dyn Collectives,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let mut values = inputs;
        let mut trails: Vec<Option<Trail>> = Vec::new();
        for (step, program) in self.chain.steps.iter().zip(&self.programs) {
            trails.push(match (step, program) {
                (Step::Move(op), _) => travel(op, &mut values, &trails, others)?,
                (Step::Run(_), Some(layer)) => {
                    launch(layer, &mut values)?;
                    None
                }
                (Step::Run(name), None) => return Err(broken(format!("program {name} is not bound"))),
            });
        }
        values.retain(|name, _| self.chain.outputs.contains(name));
        Ok(values)
    }
}

fn named(buffer: &Buffer) -> &str {
    match &buffer.kind {
        BufferKind::Input { name } | BufferKind::Output { name } => name,
        BufferKind::Weight { .. } | BufferKind::Workspace => &buffer.name,
    }
}

fn find<'a>(values: &'a BTreeMap<String, HostTensor>, name: &str) -> Result<&'a HostTensor> {
    let none = || RuntimeError::new(Code::Argument, format!("there is no tensor `{name}`"));
    values.get(name).ok_or_else(none)
}

fn launch(layer: &Layer, values: &mut BTreeMap<String, HostTensor>) -> Result<()> {
    let mut outputs = Vec::new();
    {
        let mut inputs: Vec<&[u8]> = Vec::new();
        let mut tokens = None;
        for buffer in layer.inputs()? {
            let value = find(values, named(buffer))?;
            if value.dtype != buffer.dtype {
                let message = format!("`{}` is {:?}, the program reads {:?}", named(buffer), value.dtype, buffer.dtype);
                return Err(RuntimeError::new(Code::Argument, message));
            }
            if buffer.shape.first() == Some(&moec_abi::Expr::Tokens) {
                tokens.get_or_insert(value.rows() as u64);
            }
            inputs.push(&value.bytes);
        }
        let tokens = tokens.ok_or_else(|| broken("a program of a chain takes no rows"))?;
        for buffer in layer.outputs()? {
            let shape: Option<Vec<u64>> = buffer.shape.iter().map(|d| d.eval(tokens)).collect();
            let shape = shape.ok_or_else(|| RuntimeError::new(Code::Memory, "a result does not fit into memory"))?;
            let bytes = shape.iter().product::<u64>() * buffer.dtype.bytes();
            // A result that a kernel forgets to write shall not look like zeros.
            let tensor = HostTensor { dtype: buffer.dtype, shape, bytes: vec![0xff; bytes as usize] };
            outputs.push((named(buffer).to_owned(), tensor));
        }
        let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(|(_, t)| t.bytes.as_mut_slice()).collect();
        layer.launch(tokens, &inputs, &mut slices)?;
    }
    values.extend(outputs);
    Ok(())
}

fn travel(
    op: &Move,
    values: &mut BTreeMap<String, HostTensor>,
    trails: &[Option<Trail>],
    others: &dyn Collectives,
) -> Result<Option<Trail>> {
    let trail = |undoes: usize| {
        let known = trails.get(undoes).and_then(Option::as_ref);
        known.ok_or_else(|| broken(format!("step {undoes} is no move that can be undone")))
    };
    match &op.kind {
        MoveKind::AllToAll { experts } => go(op, experts, values, others).map(Some),
        MoveKind::AllGather => gather(op, values, others).map(Some),
        MoveKind::ReduceScatter { undoes } => match trail(*undoes)? {
            Trail::Gathered { counts } => reduce(op, counts, values, others).map(|()| None),
            Trail::Sent { .. } => Err(broken("a reduce-scatter undoes an all-gather")),
        },
        MoveKind::AllToAllBack { undoes } => match trail(*undoes)? {
            Trail::Sent { slots, received, route } => {
                back(op, (slots, received, *route), values, others).map(|()| None)
            }
            Trail::Gathered { .. } => Err(broken("a way back undoes an all-to-all")),
        },
    }
}

/// The tensors of some rows, those that are there, in the order of [`Rows`].
fn parts<'a>(rows: &Rows, values: &'a BTreeMap<String, HostTensor>) -> Result<Vec<&'a HostTensor>> {
    let names = [Some(&rows.rows), rows.experts.as_ref(), rows.weights.as_ref()];
    names.into_iter().flatten().map(|name| find(values, name)).collect()
}

/// Puts what came from each member one after the other: all tensors of a row side by side in a message.
fn arrive(
    op: &Move,
    sent: &[(DType, Vec<u64>)],
    messages: &[Vec<u8>],
    values: &mut BTreeMap<String, HostTensor>,
) -> Result<Vec<usize>> {
    let widths: Vec<usize> =
        sent.iter().map(|(dtype, row)| (row.iter().product::<u64>() * dtype.bytes()) as usize).collect();
    let each: usize = widths.iter().sum();
    let counts: Vec<usize> = messages.iter().map(|m| m.len() / each.max(1)).collect();
    if messages.iter().any(|m| !m.len().is_multiple_of(each.max(1))) {
        return Err(broken("rows of another width came from another rank"));
    }
    let total: usize = counts.iter().sum();
    let names = [Some(&op.to.rows), op.to.experts.as_ref(), op.to.weights.as_ref()];
    let mut at = 0;
    for ((name, (dtype, row)), width) in names.into_iter().flatten().zip(sent).zip(&widths) {
        let mut bytes = Vec::with_capacity(total * width);
        for line in messages.iter().flat_map(|m| m.chunks_exact(each.max(1))) {
            bytes.extend_from_slice(&line[at..at + width]);
        }
        at += width;
        let shape = [total as u64].into_iter().chain(row.iter().copied()).collect();
        values.insert(name.clone(), HostTensor { dtype: *dtype, shape, bytes });
    }
    Ok(counts)
}

/// Rows of tokens to the holders of their experts.
fn go(
    op: &Move,
    experts: &[Vec<u64>],
    values: &mut BTreeMap<String, HostTensor>,
    others: &dyn Collectives,
) -> Result<Trail> {
    let tensors = parts(&op.from, values)?;
    let (Some(rows), Some(ids)) = (tensors.first(), tensors.get(1)) else {
        return Err(broken("an all-to-all moves rows with experts"));
    };
    let [tokens, slots] = ids.shape[..] else { return Err(broken("experts of rows are [tokens, slots]")) };
    let mut holders: BTreeMap<i64, Vec<(usize, i32)>> = BTreeMap::new();
    for (member, list) in experts.iter().enumerate() {
        for (local, e) in (0..).zip(list) {
            holders.entry(*e as i64).or_default().push((member, local));
        }
    }
    let chosen = ids.ints()?;
    let mut send = vec![Vec::new(); op.group.ranks.len()];
    let mut kept = vec![Vec::new(); op.group.ranks.len()];
    for (at, e) in chosen.iter().enumerate() {
        let token = at / slots.max(1) as usize;
        let Some(list) = holders.get(e) else { continue };
        let (member, local) = list[(token + op.group.at as usize) % list.len()];
        let (Some(message), Some(kept)) = (send.get_mut(member), kept.get_mut(member)) else {
            return Err(broken("experts of a member that is not in the group"));
        };
        message.extend_from_slice(rows.row(token));
        message.extend_from_slice(&local.to_le_bytes());
        if let Some(weights) = tensors.get(2) {
            let size = weights.dtype.bytes() as usize;
            message.extend_from_slice(&weights.bytes[at * size..(at + 1) * size]);
        }
        kept.push(at);
    }
    let mut sent = vec![(rows.dtype, rows.shape[1..].to_vec()), (DType::I32, vec![1])];
    sent.extend(tensors.get(2).map(|w| (w.dtype, vec![1])));
    let messages = others.all_to_all(&op.group, send)?;
    let received = arrive(op, &sent, &messages, values)?;
    Ok(Trail::Sent { slots: kept, received, route: [tokens, slots] })
}

/// Rows of all members.
fn gather(op: &Move, values: &mut BTreeMap<String, HostTensor>, others: &dyn Collectives) -> Result<Trail> {
    let tensors = parts(&op.from, values)?;
    let sent: Vec<(DType, Vec<u64>)> = tensors.iter().map(|t| (t.dtype, t.shape[1..].to_vec())).collect();
    let mut message = Vec::new();
    for i in 0..tensors.first().map_or(0, |t| t.rows()) {
        tensors.iter().for_each(|t| message.extend_from_slice(t.row(i)));
    }
    let messages = others.all_to_all(&op.group, vec![message; op.group.ranks.len()])?;
    let counts = arrive(op, &sent, &messages, values)?;
    Ok(Trail::Gathered { counts })
}

/// Consecutive rows for each member.
fn split(rows: &HostTensor, counts: &[usize]) -> Result<Vec<Vec<u8>>> {
    let width = rows.row_bytes();
    let mut rest = rows.bytes.as_slice();
    let mut parts = Vec::new();
    for count in counts {
        let (part, tail) = rest.split_at_checked(count * width).ok_or_else(|| broken("rows are missing"))?;
        parts.push(part.to_vec());
        rest = tail;
    }
    Ok(parts)
}

/// Sums of the members' rows, for those that this rank had gathered.
fn reduce(
    op: &Move,
    counts: &[usize],
    values: &mut BTreeMap<String, HostTensor>,
    others: &dyn Collectives,
) -> Result<()> {
    let rows = find(values, &op.from.rows)?;
    if rows.dtype != DType::F32 {
        return Err(broken("sums of shards are f32"));
    }
    let row = rows.shape[1..].to_vec();
    let messages = others.all_to_all(&op.group, split(rows, counts)?)?;
    let own = counts.get(op.group.at as usize).copied().unwrap_or(0);
    let mut sum = vec![0f32; own * row.iter().product::<u64>() as usize];
    for message in &messages {
        if message.len() != sum.len() * 4 {
            return Err(broken("rows of another width came from another rank"));
        }
        sum.iter_mut().zip(message.as_chunks::<4>().0).for_each(|(s, v)| *s += f32::from_le_bytes(*v));
    }
    let bytes = sum.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = [own as u64].into_iter().chain(row).collect();
    values.insert(op.to.rows.clone(), HostTensor { dtype: DType::F32, shape, bytes });
    Ok(())
}

/// Rows back to the slots that they came from.
fn back(
    op: &Move,
    (slots, received, route): (&[Vec<usize>], &[usize], [u64; 2]),
    values: &mut BTreeMap<String, HostTensor>,
    others: &dyn Collectives,
) -> Result<()> {
    let rows = find(values, &op.from.rows)?;
    let (dtype, row, width) = (rows.dtype, rows.shape[1..].to_vec(), rows.row_bytes());
    let messages = others.all_to_all(&op.group, split(rows, received)?)?;
    let mut bytes = vec![0; (route[0] * route[1]) as usize * width];
    for (message, slots) in messages.iter().zip(slots) {
        if message.len() != slots.len() * width {
            return Err(broken("rows of another width came from another rank"));
        }
        for (line, slot) in message.chunks_exact(width.max(1)).zip(slots) {
            bytes[slot * width..(slot + 1) * width].copy_from_slice(line);
        }
    }
    let shape = route.into_iter().chain(row).collect();
    values.insert(op.to.rows.clone(), HostTensor { dtype, shape, bytes });
    Ok(())
}
