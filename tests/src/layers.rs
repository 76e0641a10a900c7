//! Launches of compiled layers, held against the interpreter on rows drawn from all of them.

use moec::{
    abi::{Buffer, DType, Expr},
    ir::{Graph, Op},
    run::{Comparison, Prepared, Tensor},
};

/// Launches of one layer whose sampled rows are compared together: a row's result depends on no other row, so one
/// call of the reference serves all of them. (Where experts have a capacity, rows compete; such a launch is compared
/// whole.)
pub struct Sample<'a> {
    layer: &'a Prepared,
    graph: &'a Graph,
    /// What was launched, and the rows of its inputs and outputs that were kept.
    kept: Vec<(String, Vec<Tensor>, Vec<Tensor>)>,
    /// Rows that were compared.
    pub compared: u64,
    /// Rows that were left out, as their experts change with the last place of their elements.
    pub unsteady: u64,
}

impl<'a> Sample<'a> {
    /// No launches yet.
    pub const fn new(layer: &'a Prepared, graph: &'a Graph) -> Self {
        Self { layer, graph, kept: Vec::new(), compared: 0, unsteady: 0 }
    }

    /// Launches the layer, sees that reversing the rows reverses the results bit for bit, and keeps `at_most` of the
    /// rows, spread evenly.
    ///
    /// # Errors
    /// The launch fails or the law does not hold; the text says which.
    pub fn launch(&mut self, what: &str, tokens: u64, inputs: &[Tensor], at_most: u64) -> Result<(), String> {
        let said = |e: moec::Error| e.to_string();
        let buffers = (self.layer.layer().inputs(), self.layer.layer().outputs());
        let (Ok(ins), Ok(outs)) = buffers else { return Err("the layer has no program".to_owned()) };
        let launch = |inputs: &[Tensor]| self.layer.launch(tokens, inputs).map(|l| l.outputs).map_err(said);
        let outputs = launch(inputs)?;
        if self.graph.ids().into_iter().any(|id| matches!(self.graph.node(id).op, Op::Limit(_))) {
            self.compared += tokens;
            return self.check(inputs, &outputs).map(|_| ());
        }
        let backwards: Vec<u64> = (0..tokens).rev().collect();
        if launch(&take(&ins, inputs, &backwards))? != take(&outs, &outputs, &backwards) {
            return Err("reversed rows do not give reversed results".to_owned());
        }
        let mut steady = vec![true; usize::try_from(tokens).unwrap_or(0)];
        if let Some(at) = outputs.iter().position(|t| t.name == "topk_indices") {
            let chosen = |outputs: &[Tensor]| sets(&outputs[at], tokens);
            let before = chosen(&outputs);
            for seed in 0..4 {
                let after = chosen(&launch(&nudged(inputs, seed))?);
                steady.iter_mut().zip(before.iter().zip(&after)).for_each(|(s, (b, a))| *s &= b == a);
            }
            if let Some(logits) = outputs.iter().find(|t| t.name == "router_logits") {
                steady.iter_mut().zip(apart(logits, &before)).for_each(|(s, apart)| *s &= apart);
            }
        }
        let all: Vec<u64> = (0..tokens).filter(|row| steady[*row as usize]).collect();
        self.unsteady += tokens - all.len() as u64;
        let step = (all.len() as u64).div_ceil(at_most.max(1)).max(1);
        // The last rows are where tiles end.
        let rows: Vec<u64> = all.iter().rev().step_by(step as usize).copied().collect();
        self.compared += rows.len() as u64;
        self.kept.push((what.to_owned(), take(&ins, inputs, &rows), take(&outs, &outputs, &rows)));
        Ok(())
    }

    /// Compares what was kept with the interpreter; gives the differences as text.
    ///
    /// # Errors
    /// The reference fails, a value is beyond its limit, or a selection differs.
    pub fn compare(&self) -> Result<String, String> {
        let (Ok(ins), Ok(outs)) = (self.layer.layer().inputs(), self.layer.layer().outputs()) else {
            return Err("the layer has no program".to_owned());
        };
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for (_, i, o) in &self.kept {
            append(&mut inputs, i.clone(), &ins);
            append(&mut outputs, o.clone(), &outs);
        }
        if inputs.is_empty() {
            return Ok("each launch alone".to_owned());
        }
        match self.check(&inputs, &outputs) {
            Ok(found) => Ok(format!("max {:.1e}, rms {:.1e}", found.max_rel, found.rms_rel)),
            Err(all) => {
                let alone =
                    self.kept.iter().filter_map(|(what, i, o)| Some(format!("{what}: {}", self.check(i, o).err()?)));
                Err(alone.fold(all, |text, more| text + "\n  " + &more))
            }
        }
    }

    fn check(&self, inputs: &[Tensor], outputs: &[Tensor]) -> Result<Comparison, String> {
        let found = self.layer.compare(self.graph, inputs, outputs).map_err(|e| e.to_string())?;
        if !found.passed() || found.selection.is_some_and(|(differ, _)| differ > 0) {
            return Err(format!("differs from the interpreter: {found:?}"));
        }
        Ok(found)
    }
}

/// Whether a tensor has a row for each token.
fn by_token(buffer: &Buffer) -> bool {
    matches!(buffer.shape.first(), Some(Expr::Tokens))
}

/// The tensors with `rows` in place of all tokens.
fn take(buffers: &[&Buffer], tensors: &[Tensor], rows: &[u64]) -> Vec<Tensor> {
    let of = |(buffer, tensor): (&&Buffer, &Tensor)| {
        let mut tensor = tensor.clone();
        if by_token(buffer) && tensor.shape[0] > 0 {
            let each = tensor.bytes.len() / tensor.shape[0] as usize;
            tensor.bytes = rows.iter().flat_map(|r| &tensor.bytes[*r as usize * each..][..each]).copied().collect();
            tensor.shape[0] = rows.len() as u64;
        }
        tensor
    };
    buffers.iter().zip(tensors).map(of).collect()
}

fn append(to: &mut Vec<Tensor>, more: Vec<Tensor>, buffers: &[&Buffer]) {
    if to.is_empty() {
        *to = more;
        return;
    }
    for ((to, more), buffer) in to.iter_mut().zip(more).zip(buffers) {
        if by_token(buffer) {
            to.shape[0] += more.shape[0];
            to.bytes.extend(more.bytes);
        }
    }
}

/// The experts of each row, in rising order.
fn sets(ids: &Tensor, tokens: u64) -> Vec<Vec<i64>> {
    let numbers = ids.numbers();
    let width = numbers.len() / (tokens.max(1) as usize);
    let row = |row: &[f64]| {
        let mut row: Vec<i64> = row.iter().map(|v| *v as i64).collect();
        row.sort_unstable();
        row
    };
    numbers.chunks(width.max(1)).map(row).collect()
}

/// For each row, whether every chosen logit is more than a unit in the last place away from every other.
fn apart(logits: &Tensor, chosen: &[Vec<i64>]) -> Vec<bool> {
    let unit = match logits.dtype {
        DType::Bf16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
        DType::F64 | DType::F32 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
            2f64.powi(-22)
        }
    };
    let values = logits.numbers();
    let experts = values.len() / chosen.len().max(1);
    let row = |(row, chosen): (&[f64], &Vec<i64>)| {
        let near = |a: f64, b: f64| a != 0.0 && (a - b).abs() <= unit * a.abs().max(b.abs());
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        for (e, v) in row.iter().enumerate() {
            if chosen.contains(&(e as i64)) { inside.push(*v) } else { outside.push(*v) }
        }
        !inside.iter().any(|a| outside.iter().any(|b| near(*a, *b)))
    };
    values.chunks(experts.max(1)).zip(chosen).map(row).collect()
}

/// Numbers with their last three bits all set or all clear: a few roundings away.
fn nudged(inputs: &[Tensor], seed: u64) -> Vec<Tensor> {
    let mut state = seed + 1;
    let mut up = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 63 == 1
    };
    let mut tensors = inputs.to_vec();
    for tensor in tensors.iter_mut().filter(|t| !t.dtype_is_id()) {
        let size = tensor.dtype.bytes() as usize;
        let numbers = tensor.numbers();
        for (number, bytes) in numbers.into_iter().zip(tensor.bytes.chunks_mut(size)) {
            if number != 0.0 && number.is_finite() {
                let low = bytes[0] & 0xf8;
                bytes[0] = if up() { low | 7 } else { low };
            }
        }
    }
    tensors
}
