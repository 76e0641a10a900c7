//! Regions into kernels, and back.

use crate::{
    DType, Graph, NodeId, Op, Part, TensorType, Type,
    ops::{Input, Kernel, KernelKind},
};
use std::collections::BTreeSet;

/// Why nodes cannot become a kernel, or a node is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutlineError {
    /// No node was named, or one that the graph has not.
    #[error("a kernel needs nodes of the graph")]
    NoNodes,
    /// Inputs belong to the graph.
    #[error("input `{0}` cannot move into a kernel")]
    Input(String),
    /// Not exactly one value is used outside.
    #[error("a kernel has one result, the nodes have {} ({})", .0.len(), .0.join(", "))]
    Results(Vec<String>),
    /// A path leaves the nodes and comes back.
    #[error("`{outside}` lies between the nodes: it needs their result, and they need it")]
    NotConvex {
        /// A node on the path.
        outside: String,
    },
    /// The node is no kernel, or its body has no single output.
    #[error("`{0}` is not a kernel with one result")]
    NotAKernel(String),
    /// Body and graph mean different weights by one name.
    #[error("weight `{0}` of the kernel differs from the graph's weight of that name")]
    WeightClash(String),
}

impl Graph {
    /// Replaces nodes by one kernel op that holds them.
    ///
    /// Exactly one of the values may be used outside. Operands from outside become the kernel's
    /// operands, in the order of first use. The body has copies of the weights that it uses; the
    /// graph keeps them too. Where an operand is no tensor, the type stated by the body's `input`
    /// has no meaning; the operand decides.
    ///
    /// # Errors
    /// When the nodes have no single result or a path leaves and re-enters them.
    pub fn outline(
        &mut self,
        nodes: &[NodeId],
        kind: KernelKind,
        name: impl Into<String>,
    ) -> Result<NodeId, OutlineError> {
        let inside: BTreeSet<NodeId> = nodes.iter().copied().collect();
        if inside.is_empty() || inside.iter().any(|n| !self.contains(*n)) {
            return Err(OutlineError::NoNodes);
        }
        if let Some(input) = inside.iter().find(|n| matches!(self.node(**n).op, Op::Input(_))) {
            return Err(OutlineError::Input(self.node(*input).name.clone()));
        }
        let result = self.single_result(&inside)?;
        self.check_convex(&inside, result)?;
        let order: Vec<NodeId> = self.order().into_iter().filter(|n| inside.contains(n)).collect();
        let name = name.into();
        let (body, operands) = self.body_of(&order, result, &name);
        let ty = self.node(result).ty.clone();
        let kernel = self.add("", Op::Kernel(Kernel { kind, body: Box::new(body) }), &operands);
        self.set_type(kernel, ty);
        self.replace_uses(result, kernel);
        for node in order.into_iter().rev() {
            self.remove(node);
        }
        self.rename(kernel, name);
        Ok(kernel)
    }

    fn single_result(&self, inside: &BTreeSet<NodeId>) -> Result<NodeId, OutlineError> {
        let results: Vec<NodeId> = inside
            .iter()
            .copied()
            .filter(|n| self.is_output(*n) || self.users(*n).iter().any(|u| !inside.contains(u)))
            .collect();
        match results.as_slice() {
            [result] => Ok(*result),
            results => Err(OutlineError::Results(results.iter().map(|n| self.node(*n).name.clone()).collect())),
        }
    }

    /// Only the result is used outside, so a path that comes back starts there.
    fn check_convex(&self, inside: &BTreeSet<NodeId>, result: NodeId) -> Result<(), OutlineError> {
        let mut open: Vec<NodeId> = self.users(result).into_iter().filter(|u| !inside.contains(u)).collect();
        let mut seen: BTreeSet<NodeId> = open.iter().copied().collect();
        while let Some(node) = open.pop() {
            for user in self.users(node) {
                if inside.contains(&user) {
                    return Err(OutlineError::NotConvex { outside: self.node(node).name.clone() });
                }
                if seen.insert(user) {
                    open.push(user);
                }
            }
        }
        Ok(())
    }

    /// The nodes as a graph of their own, and the values that it takes.
    fn body_of(&self, order: &[NodeId], result: NodeId, name: &str) -> (Self, Vec<NodeId>) {
        let mut body = Self::new(name);
        let mut places: indexmap::IndexMap<NodeId, NodeId> = indexmap::IndexMap::new();
        let mut operands = Vec::new();
        let inside: BTreeSet<NodeId> = order.iter().copied().collect();
        for node in order {
            for operand in self.operands(*node) {
                if !inside.contains(&operand) && !places.contains_key(&operand) {
                    let outer = self.node(operand);
                    let ty = match &outer.ty {
                        Some(Type::Tensor(ty)) => ty.clone(),
                        Some(Type::Route(_) | Type::Plan(_) | Type::Ragged(_)) | None => no_tensor(),
                    };
                    let op = Op::Input(Input { name: outer.name.clone(), ty });
                    let input = body.add(outer.name.clone(), op, &[]);
                    body.set_type(input, outer.ty.clone());
                    places.insert(operand, input);
                    operands.push(operand);
                }
            }
        }
        for node in order {
            let inner: Vec<NodeId> = self.operands(*node).iter().filter_map(|o| places.get(o).copied()).collect();
            let outer = self.node(*node);
            let new = body.add(outer.name.clone(), outer.op.clone(), &inner);
            body.set_type(new, outer.ty.clone());
            body.set_round(new, outer.round);
            places.insert(*node, new);
            body.batch_dependent |= outer.op.is_batch_dependent();
            for weight in outer.op.weights() {
                if let Some(declared) = self.weights.get(weight) {
                    body.weights.insert(weight.clone(), declared.clone());
                }
            }
        }
        if let Some(result) = places.get(&result) {
            body.output("result", *result, Part::Whole);
        }
        (body, operands)
    }

    /// Puts the ops of a kernel in its place; gives the node that holds its value now.
    ///
    /// # Errors
    /// When the node is no kernel, or means other weights by the same names.
    pub fn inline(&mut self, kernel: NodeId) -> Result<NodeId, OutlineError> {
        if !self.contains(kernel) {
            return Err(OutlineError::NoNodes);
        }
        let node = self.node(kernel).clone();
        let no_kernel = || OutlineError::NotAKernel(node.name.clone());
        let Op::Kernel(Kernel { body, .. }) = &node.op else { return Err(no_kernel()) };
        let [output] = body.outputs.as_slice() else { return Err(no_kernel()) };
        let operands = self.operands(kernel);
        let inputs = body.inputs();
        if inputs.len() != operands.len() || output.part != Part::Whole || !body.contains(output.node) {
            return Err(no_kernel());
        }
        if let Some((name, _)) = body.weights.iter().find(|(n, w)| self.weights.get(*n).is_some_and(|own| own != *w)) {
            return Err(OutlineError::WeightClash(name.clone()));
        }
        self.weights.extend(body.weights.iter().map(|(n, w)| (n.clone(), w.clone())));
        // The kernel's name is free for the body's nodes, which come from the graph.
        self.unname(kernel);
        let mut places: indexmap::IndexMap<NodeId, NodeId> = inputs.into_iter().zip(operands).collect();
        for id in body.order() {
            if places.contains_key(&id) {
                continue;
            }
            let inner = body.node(id);
            let sources: Vec<NodeId> = body.operands(id).iter().filter_map(|o| places.get(o).copied()).collect();
            let new = self.add(inner.name.clone(), inner.op.clone(), &sources);
            self.set_type(new, inner.ty.clone());
            self.set_round(new, inner.round);
            places.insert(id, new);
        }
        let Some(result) = places.get(&output.node).copied() else { return Err(no_kernel()) };
        if node.round.is_some() {
            self.set_round(result, node.round);
        }
        self.replace_uses(kernel, result);
        self.remove(kernel);
        Ok(result)
    }

    /// Inlines every kernel, also those inside kernels; one that cannot be inlined stays.
    pub fn inline_all(&mut self) {
        let mut stuck = BTreeSet::new();
        loop {
            let kernel = self
                .order()
                .into_iter()
                .find(|n| matches!(self.node(*n).op, Op::Kernel(_)) && !stuck.contains(&self.node(*n).name));
            let Some(kernel) = kernel else { return };
            let name = self.node(kernel).name.clone();
            if self.inline(kernel).is_err() {
                stuck.insert(name);
            }
        }
    }
}

/// What an input of a kernel body states where its operand is no tensor.
pub(crate) const fn no_tensor() -> TensorType {
    TensorType { dtype: DType::F32, shape: Vec::new() }
}
