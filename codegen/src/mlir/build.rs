//! A builder for the MLIR that kernels consist of.
//!
//! Kernels are `llvm.func`s over opaque pointers, with `scf` for control flow, `arith` and
//! `vector` for arithmetic, and `nvvm` or intrinsics for what only one target has. One
//! [`Builder`] serves a whole module: it keeps the block that ops are appended to, and the
//! closures of [`Builder::for_`] and [`Builder::if_`] move it.

use melior::{
    Context,
    ir::{
        Attribute, Block, BlockLike, Identifier, Location, Region, RegionLike, Type, Value, ValueLike,
        block::BlockRef,
        operation::{OperationBuilder, OperationLike},
    },
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

/// A value whose lifetime is that of the context. melior ties values to their block, which makes
/// builders of nested regions unwritable; a kernel's module lives as long as its builder.
pub type V<'c> = Value<'c, 'c>;

/// What kind of function [`Builder::func`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FuncKind {
    /// Called from the host or from another function.
    Plain,
    /// Only called inside the module.
    Private,
    /// Launched on a GPU with at most this many threads per block.
    Kernel {
        /// Threads of a block in x.
        threads: u32,
        /// Blocks per multiprocessor that registers must allow for.
        blocks: u32,
        /// Blocks of a cluster in x; 1 without clusters.
        cluster: u32,
    },
}

/// Appends ops to the current block of a module.
#[derive(Debug)]
pub struct Builder<'c> {
    context: &'c Context,
    location: Location<'c>,
    block: Cell<mlir_sys::MlirBlock>,
    types: RefCell<BTreeMap<String, Type<'c>>>,
    attributes: RefCell<BTreeMap<String, Attribute<'c>>>,
}

impl<'c> Builder<'c> {
    /// A builder that appends to `block`, which must outlive it.
    pub fn new(context: &'c Context, block: BlockRef<'c, '_>) -> Self {
        Self {
            context,
            location: Location::unknown(context),
            block: Cell::new(block.to_raw()),
            types: RefCell::default(),
            attributes: RefCell::default(),
        }
    }

    /// The type written so.
    ///
    /// # Panics
    /// On text that is no type, which is a bug of the emitter.
    pub fn ty(&self, text: &str) -> Type<'c> {
        if let Some(ty) = self.types.borrow().get(text) {
            return *ty;
        }
        let ty = Type::parse(self.context, text).unwrap_or_else(|| panic!("no MLIR type: {text}"));
        self.types.borrow_mut().insert(text.to_owned(), ty);
        ty
    }

    /// The attribute written so.
    ///
    /// # Panics
    /// On text that is no attribute, which is a bug of the emitter.
    pub fn attribute(&self, text: &str) -> Attribute<'c> {
        if let Some(attribute) = self.attributes.borrow().get(text) {
            return *attribute;
        }
        let attribute = Attribute::parse(self.context, text).unwrap_or_else(|| panic!("no MLIR attribute: {text}"));
        self.attributes.borrow_mut().insert(text.to_owned(), attribute);
        attribute
    }

    fn append(
        &self,
        name: &str,
        operands: &[V<'c>],
        results: &[Type<'c>],
        attributes: &[(&str, &str)],
        regions: Vec<Region<'c>>,
    ) -> Vec<V<'c>> {
        let attributes: Vec<_> =
            attributes.iter().map(|(k, v)| (Identifier::new(self.context, k), self.attribute(v))).collect();
        let operation = OperationBuilder::new(name, self.location)
            .add_operands(operands)
            .add_results(results)
            .add_attributes(&attributes)
            .add_regions_vec(regions)
            .build()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        // SAFETY: the block belongs to a region under construction or to the module, both alive.
        let block = unsafe { BlockRef::<'c, '_>::from_raw(self.block.get()) };
        let operation = block.append_operation(operation);
        (0..operation.result_count())
            .filter_map(|i| operation.result(i).ok())
            // SAFETY: the op was appended to a block of the module, which outlives the builder.
            .map(|r| unsafe { V::from_raw(r.to_raw()) })
            .collect()
    }

    /// Appends an op with any number of results, given as types in text.
    pub fn ops(&self, name: &str, operands: &[V<'c>], results: &[&str], attributes: &[(&str, &str)]) -> Vec<V<'c>> {
        let results: Vec<_> = results.iter().map(|t| self.ty(t)).collect();
        self.append(name, operands, &results, attributes, Vec::new())
    }

    /// Appends an op with one result.
    pub fn op(&self, name: &str, operands: &[V<'c>], result: &str, attributes: &[(&str, &str)]) -> V<'c> {
        self.append(name, operands, &[self.ty(result)], attributes, Vec::new())[0]
    }

    /// Appends an op without results.
    pub fn op0(&self, name: &str, operands: &[V<'c>], attributes: &[(&str, &str)]) {
        self.append(name, operands, &[], attributes, Vec::new());
    }

    /// Appends an op whose result has the type of its first operand.
    pub fn same(&self, name: &str, operands: &[V<'c>], attributes: &[(&str, &str)]) -> V<'c> {
        self.append(name, operands, &[operands[0].r#type()], attributes, Vec::new())[0]
    }

    // Constants.

    /// A 64-bit integer.
    pub fn i64(&self, value: i64) -> V<'c> {
        self.op("arith.constant", &[], "i64", &[("value", &format!("{value} : i64"))])
    }

    /// A 32-bit integer.
    pub fn i32(&self, value: i32) -> V<'c> {
        self.op("arith.constant", &[], "i32", &[("value", &format!("{value} : i32"))])
    }

    /// A truth value.
    pub fn bool(&self, value: bool) -> V<'c> {
        self.op("arith.constant", &[], "i1", &[("value", if value { "true" } else { "false" })])
    }

    /// A float. The bit pattern is used, because MLIR's decimal form needs a point and rounds.
    pub fn f32(&self, value: f32) -> V<'c> {
        self.op("arith.constant", &[], "f32", &[("value", &format!("{:#010x} : f32", value.to_bits()))])
    }

    /// A vector of `n` equal floats.
    pub fn f32s(&self, value: f32, n: usize) -> V<'c> {
        let ty = format!("vector<{n}xf32>");
        self.op("arith.constant", &[], &ty, &[("value", &format!("dense<{:#010x}> : {ty}", value.to_bits()))])
    }

    /// A vector of `n` equal 32-bit integers.
    pub fn i32s(&self, value: i32, n: usize) -> V<'c> {
        let ty = format!("vector<{n}xi32>");
        self.op("arith.constant", &[], &ty, &[("value", &format!("dense<{value}> : {ty}"))])
    }

    /// A value of all zero bits of this type.
    pub fn zero(&self, ty: &str) -> V<'c> {
        self.op("llvm.mlir.zero", &[], ty, &[])
    }

    // Integers. Operands are scalars or vectors of one type.

    /// `a + b`.
    pub fn addi(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.addi", &[a, b], &[])
    }
    /// `a - b`.
    pub fn subi(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.subi", &[a, b], &[])
    }
    /// `a * b`.
    pub fn muli(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.muli", &[a, b], &[])
    }
    /// `a / b`, unsigned.
    pub fn divui(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.divui", &[a, b], &[])
    }
    /// `a mod b`, unsigned.
    pub fn remui(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.remui", &[a, b], &[])
    }
    /// Bits of both.
    pub fn andi(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.andi", &[a, b], &[])
    }
    /// Bits of either.
    pub fn ori(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.ori", &[a, b], &[])
    }
    /// Bits of one, not both.
    pub fn xori(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.xori", &[a, b], &[])
    }
    /// `a << b`.
    pub fn shli(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.shli", &[a, b], &[])
    }
    /// `a >> b`, zeros in.
    pub fn shrui(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.shrui", &[a, b], &[])
    }
    /// `a >> b`, sign in.
    pub fn shrsi(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.shrsi", &[a, b], &[])
    }
    /// The smaller, signed.
    pub fn minsi(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.minsi", &[a, b], &[])
    }
    /// The larger, signed.
    pub fn maxsi(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.maxsi", &[a, b], &[])
    }
    /// `ceil(a / b)` for non-negative numbers.
    pub fn ceil_div(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        // Both are below half of the unsigned range.
        self.divui(self.addi(a, self.addc(b, -1)), b)
    }
    /// `a + constant`, in the type of `a` (i32 or i64).
    pub fn addc(&self, a: V<'c>, constant: i64) -> V<'c> {
        if constant == 0 { a } else { self.addi(a, self.like(a, constant)) }
    }
    /// `a * constant`, in the type of `a` (i32 or i64).
    pub fn mulc(&self, a: V<'c>, constant: i64) -> V<'c> {
        if constant == 1 { a } else { self.muli(a, self.like(a, constant)) }
    }
    /// An integer constant of the type of `a` (scalar).
    pub fn like(&self, a: V<'c>, constant: i64) -> V<'c> {
        let ty = a.r#type().to_string();
        self.op("arith.constant", &[], &ty, &[("value", &format!("{constant} : {ty}"))])
    }
    /// Compares integers: `eq ne slt sle sgt sge ult ule ugt uge`.
    ///
    /// # Panics
    /// On another predicate, which is a bug of the emitter.
    pub fn cmpi(&self, predicate: &str, a: V<'c>, b: V<'c>) -> V<'c> {
        const NAMES: [&str; 10] = ["eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge"];
        let code = NAMES.iter().position(|n| *n == predicate).unwrap_or_else(|| panic!("cmpi {predicate}"));
        self.compare("arith.cmpi", code, a, b)
    }
    /// Compares floats: `oeq ogt oge olt ole one ord ueq ugt uge ult ule une uno`.
    ///
    /// # Panics
    /// On another predicate, which is a bug of the emitter.
    pub fn cmpf(&self, predicate: &str, a: V<'c>, b: V<'c>) -> V<'c> {
        const NAMES: [&str; 16] = [
            "false", "oeq", "ogt", "oge", "olt", "ole", "one", "ord", "ueq", "ugt", "uge", "ult", "ule", "une", "uno",
            "true",
        ];
        let code = NAMES.iter().position(|n| *n == predicate).unwrap_or_else(|| panic!("cmpf {predicate}"));
        self.compare("arith.cmpf", code, a, b)
    }
    fn compare(&self, op: &str, code: usize, a: V<'c>, b: V<'c>) -> V<'c> {
        let ty = a.r#type().to_string();
        let result = match ty.strip_prefix("vector<").and_then(|t| t.split_once('x')) {
            Some((n, _)) => format!("vector<{n}xi1>"),
            None => "i1".to_owned(),
        };
        self.op(op, &[a, b], &result, &[("predicate", &format!("{code} : i64"))])
    }
    /// `condition ? a : b`.
    pub fn select(&self, condition: V<'c>, a: V<'c>, b: V<'c>) -> V<'c> {
        self.append("arith.select", &[condition, a, b], &[a.r#type()], &[], Vec::new())[0]
    }

    // Floats. Operands are scalars or vectors of one type.

    /// `a + b`.
    pub fn addf(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.addf", &[a, b], &[])
    }
    /// `a - b`.
    pub fn subf(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.subf", &[a, b], &[])
    }
    /// `a * b`.
    pub fn mulf(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.mulf", &[a, b], &[])
    }
    /// `a / b`.
    pub fn divf(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.divf", &[a, b], &[])
    }
    /// `-a`.
    pub fn negf(&self, a: V<'c>) -> V<'c> {
        self.same("arith.negf", &[a], &[])
    }
    /// `a * b + c`, rounded once.
    pub fn fma(&self, a: V<'c>, b: V<'c>, c: V<'c>) -> V<'c> {
        self.same("llvm.intr.fma", &[a, b, c], &[])
    }
    /// The larger; NaN if either is NaN.
    pub fn maximumf(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.maximumf", &[a, b], &[])
    }
    /// The smaller; NaN if either is NaN.
    pub fn minimumf(&self, a: V<'c>, b: V<'c>) -> V<'c> {
        self.same("arith.minimumf", &[a, b], &[])
    }

    // Conversions.

    /// An op that converts to another type: `arith.extf`, `arith.truncf`, `arith.sitofp`, `arith.extui`, ..
    pub fn cast(&self, op: &str, a: V<'c>, to: &str) -> V<'c> {
        self.op(op, &[a], to, &[])
    }
    /// The same bits as another type.
    pub fn bitcast(&self, a: V<'c>, to: &str) -> V<'c> {
        self.op("llvm.bitcast", &[a], to, &[])
    }
    /// A vector of these integers.
    pub fn i32_table(&self, values: impl Iterator<Item = i32>) -> V<'c> {
        self.table(values, "i32")
    }
    /// A vector of these integers of 16 bits.
    pub fn i16_table(&self, values: impl Iterator<Item = i32>) -> V<'c> {
        self.table(values.map(|value| i32::from(value as u16 as i16)), "i16")
    }
    fn table(&self, values: impl Iterator<Item = i32>, element: &str) -> V<'c> {
        let values: Vec<_> = values.map(|value| value.to_string()).collect();
        let ty = format!("vector<{}x{element}>", values.len());
        self.op("arith.constant", &[], &ty, &[("value", &format!("dense<[{}]> : {ty}", values.join(", ")))])
    }
    /// A scalar in all `n` places of a vector of type `ty`.
    pub fn splat(&self, a: V<'c>, ty: &str) -> V<'c> {
        self.op("vector.broadcast", &[a], ty, &[])
    }
    /// The values at these places of two vectors, of which the second continues the first, as a vector of type `ty`.
    pub fn shuffle(&self, from: [V<'c>; 2], places: impl Iterator<Item = usize>, ty: &str) -> V<'c> {
        let places: Vec<_> = places.map(|i| i.to_string()).collect();
        self.op("llvm.shufflevector", &from, ty, &[("mask", &format!("array<i32: {}>", places.join(", ")))])
    }
    /// `n` neighbouring places of a vector of f32, from `first` on.
    pub fn lanes(&self, a: V<'c>, first: usize, n: usize) -> V<'c> {
        self.shuffle([a, a], first..first + n, &format!("vector<{n}xf32>"))
    }

    // Memory.

    /// Address of element `index` (i32 or i64) of an array of `element` at `pointer`.
    pub fn gep(&self, pointer: V<'c>, element: &str, index: V<'c>) -> V<'c> {
        let attributes = [("rawConstantIndices", "array<i32: -2147483648>"), ("elem_type", element)];
        self.append("llvm.getelementptr", &[pointer, index], &[pointer.r#type()], &attributes, Vec::new())[0]
    }
    /// Address of element `index` of an array of `element` at `pointer`, for a constant index.
    pub fn gepc(&self, pointer: V<'c>, element: &str, index: i32) -> V<'c> {
        if index == 0 {
            return pointer;
        }
        let indices = format!("array<i32: {index}>");
        let attributes = [("rawConstantIndices", indices.as_str()), ("elem_type", element)];
        self.append("llvm.getelementptr", &[pointer], &[pointer.r#type()], &attributes, Vec::new())[0]
    }
    /// Loads a value of type `ty`; the address is a multiple of `align` bytes.
    pub fn load(&self, pointer: V<'c>, ty: &str, align: u32) -> V<'c> {
        self.op("llvm.load", &[pointer], ty, &[("alignment", &format!("{align} : i64")), ("ordering", "0 : i64")])
    }
    /// Stores a value; the address is a multiple of `align` bytes.
    pub fn store(&self, value: V<'c>, pointer: V<'c>, align: u32) {
        let alignment = format!("{align} : i64");
        self.op0("llvm.store", &[value, pointer], &[("alignment", &alignment), ("ordering", "0 : i64")]);
    }
    /// Calls an LLVM intrinsic by name.
    pub fn intrinsic(&self, name: &str, arguments: &[V<'c>], result: &str) -> V<'c> {
        self.op("llvm.call_intrinsic", arguments, result, &Self::intrinsic_attributes(name, arguments.len()).each())
    }
    /// Calls an LLVM intrinsic that returns nothing.
    pub fn intrinsic0(&self, name: &str, arguments: &[V<'c>]) {
        self.op0("llvm.call_intrinsic", arguments, &Self::intrinsic_attributes(name, arguments.len()).each());
    }
    fn intrinsic_attributes(name: &str, arguments: usize) -> IntrinsicAttributes {
        IntrinsicAttributes([
            ("intrin", format!("\"{name}\"")),
            ("operandSegmentSizes", format!("array<i32: {arguments}, 0>")),
            ("op_bundle_sizes", "array<i32>".to_owned()),
        ])
    }

    // Control flow.

    fn region(&self, arguments: &[Type<'c>], body: impl FnOnce(&[V<'c>])) -> Region<'c> {
        let region = Region::new();
        let block = Block::new(&arguments.iter().map(|t| (*t, self.location)).collect::<Vec<_>>());
        let block = region.append_block(block);
        let arguments: Vec<V<'c>> = (0..arguments.len())
            .filter_map(|i| block.argument(i).ok())
            // SAFETY: the block lives in the region, which the caller puts into the module.
            .map(|a| unsafe { V::from_raw(a.to_raw()) })
            .collect();
        let outer = self.block.replace(block.to_raw());
        body(&arguments);
        self.block.set(outer);
        region
    }

    /// `for i in (low..high).step_by(step)` with carried values; the body returns the next ones.
    /// Bounds are i64 or i32, all of one type.
    pub fn for_(
        &self,
        low: V<'c>,
        high: V<'c>,
        step: V<'c>,
        init: &[V<'c>],
        body: impl FnOnce(V<'c>, &[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        self.counted([low, high, step], init, &[], body)
    }

    /// As [`for_`](Self::for_), for a loop that holds what is worth doing side by side already: no later compiler is to
    /// repeat its body.
    pub fn rolled(
        &self,
        low: V<'c>,
        high: V<'c>,
        step: V<'c>,
        init: &[V<'c>],
        body: impl FnOnce(V<'c>, &[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let attribute = ("loop_annotation", "#llvm.loop_annotation<unroll = <disable = true>>");
        self.counted([low, high, step], init, &[attribute], body)
    }

    fn counted(
        &self,
        [low, high, step]: [V<'c>; 3],
        init: &[V<'c>],
        attributes: &[(&str, &str)],
        body: impl FnOnce(V<'c>, &[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let types: Vec<_> = init.iter().map(|v| v.r#type()).collect();
        let arguments: Vec<_> = std::iter::once(low.r#type()).chain(types.iter().copied()).collect();
        let region = self.region(&arguments, |a| {
            let next = body(a[0], &a[1..]);
            self.op0("scf.yield", &next, &[]);
        });
        let operands: Vec<_> = [low, high, step].into_iter().chain(init.iter().copied()).collect();
        self.append("scf.for", &operands, &types, attributes, vec![region])
    }

    /// `for i in low..high` without carried values.
    pub fn each(&self, low: V<'c>, high: V<'c>, body: impl FnOnce(V<'c>)) {
        let one = self.like(low, 1);
        self.for_(low, high, one, &[], |i, _| {
            body(i);
            Vec::new()
        });
    }

    /// `while condition(values) { values = body(values) }`.
    pub fn while_(
        &self,
        init: &[V<'c>],
        condition: impl FnOnce(&[V<'c>]) -> V<'c>,
        body: impl FnOnce(&[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let types: Vec<_> = init.iter().map(|v| v.r#type()).collect();
        let before = self.region(&types, |a| {
            let go = condition(a);
            let operands: Vec<_> = std::iter::once(go).chain(a.iter().copied()).collect();
            self.op0("scf.condition", &operands, &[]);
        });
        let after = self.region(&types, |a| {
            let next = body(a);
            self.op0("scf.yield", &next, &[]);
        });
        self.append("scf.while", init, &types, &[], vec![before, after])
    }

    /// `if condition { then }`.
    pub fn if_(&self, condition: V<'c>, then: impl FnOnce()) {
        let region = self.region(&[], |_| {
            then();
            self.op0("scf.yield", &[], &[]);
        });
        self.append("scf.if", &[condition], &[], &[], vec![region, Region::new()]);
    }

    /// `if condition { then } else { otherwise }` with values; both arms return the same types.
    pub fn if_else(
        &self,
        condition: V<'c>,
        results: &[&str],
        then: impl FnOnce() -> Vec<V<'c>>,
        otherwise: impl FnOnce() -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let first = self.region(&[], |_| {
            let values = then();
            self.op0("scf.yield", &values, &[]);
        });
        let second = self.region(&[], |_| {
            let values = otherwise();
            self.op0("scf.yield", &values, &[]);
        });
        let results: Vec<_> = results.iter().map(|t| self.ty(t)).collect();
        self.append("scf.if", &[condition], &results, &[], vec![first, second])
    }

    // Functions.

    /// A function `name` without result; `arguments` are types with their attribute dictionaries (`{}` for none).
    pub fn func(&self, name: &str, kind: FuncKind, arguments: &[(&str, &str)], body: impl FnOnce(&[V<'c>])) {
        let types: Vec<_> = arguments.iter().map(|(t, _)| self.ty(t)).collect();
        let region = self.region(&types, |a| {
            body(a);
            self.op0("llvm.return", &[], &[]);
        });
        let plain: Vec<_> = arguments.iter().map(|(t, _)| t.trim_start_matches("!llvm.").to_owned()).collect();
        let function_type = format!("!llvm.func<void ({})>", plain.join(", "));
        let argument_attributes: Vec<_> = arguments.iter().map(|(_, a)| (*a).to_owned()).collect();
        let argument_attributes = format!("[{}]", argument_attributes.join(", "));
        let symbol = format!("\"{name}\"");
        let linkage = match kind {
            FuncKind::Plain | FuncKind::Kernel { .. } => "#llvm.linkage<external>",
            FuncKind::Private => "#llvm.linkage<internal>",
        };
        let mut attributes = vec![
            ("sym_name", symbol.as_str()),
            ("function_type", function_type.as_str()),
            ("linkage", linkage),
            ("CConv", "#llvm.cconv<ccc>"),
            ("visibility_", "0 : i64"),
            ("arg_attrs", argument_attributes.as_str()),
        ];
        let (threads_text, blocks_text, cluster_text);
        if let FuncKind::Kernel { threads, blocks, cluster } = kind {
            threads_text = format!("array<i32: {threads}, 1, 1>");
            blocks_text = format!("{blocks} : i64");
            attributes.push(("nvvm.kernel", "unit"));
            attributes.push(("nvvm.maxntid", &threads_text));
            attributes.push(("nvvm.minctasm", &blocks_text));
            if cluster > 1 {
                cluster_text = format!("array<i32: {cluster}, 1, 1>");
                attributes.push(("nvvm.cluster_dim", &cluster_text));
            }
        }
        self.append("llvm.func", &[], &[], &attributes, vec![region]);
    }

    /// An array of bytes in shared memory, or (with `bytes` 0) the launch's dynamic shared memory.
    pub fn shared(&self, name: &str, bytes: u32, align: u32) {
        let symbol = format!("\"{name}\"");
        let ty = format!("!llvm.array<{bytes} x i8>");
        let alignment = format!("{align} : i64");
        let linkage = if bytes == 0 { "#llvm.linkage<external>" } else { "#llvm.linkage<internal>" };
        let attributes = [
            ("sym_name", symbol.as_str()),
            ("global_type", ty.as_str()),
            ("linkage", linkage),
            ("addr_space", "3 : i32"),
            ("alignment", alignment.as_str()),
        ];
        self.append("llvm.mlir.global", &[], &[], &attributes, vec![Region::new()]);
    }

    /// Address of a global of this module.
    pub fn address_of(&self, name: &str, pointer: &str) -> V<'c> {
        self.op("llvm.mlir.addressof", &[], pointer, &[("global_name", &format!("@{name}"))])
    }
}

struct IntrinsicAttributes([(&'static str, String); 3]);

impl IntrinsicAttributes {
    fn each(&self) -> [(&str, &str); 3] {
        self.0.each_ref().map(|(k, v)| (*k, v.as_str()))
    }
}
