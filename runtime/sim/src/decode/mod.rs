//! The module as written to decoded code: names become slots, labels become positions.

#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "tables over the types and operands of PTX name what they know; the rest is refused with its line"
)]

mod alu;
mod asynchronous;
mod compare;
mod control;
mod convert;
mod float;
mod half_float;
mod integer;
mod kernel;
mod memory;
mod operand;
mod tensor;
mod video;
mod wmma;

pub(crate) use half_float::combine as combine_half;

use crate::Error;
use crate::op::{Class, Code, Func, Inst, NONE, Op, Reg, Slot, Variable};
use crate::syntax::{Ast, Function, Instr, Name, Operand, Operands, Space, Stmt, Ty, Var};
use std::collections::{BTreeMap, BTreeSet};

/// Most bytes of the parameters of a function.
const MAX_PARAMS: u32 = 1 << 20;
/// Most registers of a function.
const MAX_REGISTERS: u32 = 1 << 20;

/// Decodes every function of a module.
///
/// # Errors
///
/// [`Error::Parse`] for unknown names, [`Error::Unsupported`] for unknown instructions; both with the line.
pub(crate) fn decode(ast: Ast) -> Result<Code, Error> {
    let mut code = Code { target: ast.target, ..Code::default() };
    let mut globals = BTreeMap::new();
    for var in ast.vars {
        let name = var.name.clone();
        let index = add_var(&mut code, var);
        globals.insert(name, index);
    }
    let names: BTreeMap<String, usize> = ast.functions.iter().enumerate().map(|(i, f)| (f.name.clone(), i)).collect();
    let signatures: Vec<Signature> = ast.functions.iter().map(signature).collect::<Result<_, _>>()?;
    for f in &ast.functions {
        let func = function(&mut code, f, &globals, &names, &signatures)?;
        code.funcs.push(func);
    }
    Ok(code)
}

fn add_var(code: &mut Code, var: Var) -> usize {
    let mut const_offset = 0;
    if var.space == Space::Const {
        const_offset = code.const_bytes.next_multiple_of(u64::from(var.align.max(1)));
        code.const_bytes = const_offset + var.bytes;
    }
    let dynamic = var.space == Space::Shared && var.bytes == 0;
    code.vars.push(Variable { var, const_offset, dynamic });
    code.vars.len() - 1
}

/// Offsets and sizes of parameters and results.
#[derive(Clone, Debug, Default)]
struct Signature {
    params: Vec<(u32, u32)>,
    rets: Vec<(u32, u32)>,
    bytes: u32,
}

fn signature(f: &Function) -> Result<Signature, Error> {
    let mut bytes = 0;
    let mut place = |vars: &[Var]| {
        vars.iter().map(|v| Ok((parameter(&mut bytes, v)?, v.bytes as u32))).collect::<Result<Vec<_>, Error>>()
    };
    let params = place(&f.params)?;
    let rets = place(&f.rets)?;
    Ok(Signature { params, rets, bytes })
}

/// The place of a parameter behind others of `bytes` bytes.
fn parameter(bytes: &mut u32, v: &Var) -> Result<u32, Error> {
    let at = bytes.next_multiple_of(v.align.max(1));
    *bytes = at + v.bytes as u32;
    if *bytes > MAX_PARAMS {
        return Err(Error::Parse { line: v.line, message: format!("too many parameters before `{}`", v.name) });
    }
    Ok(at)
}

/// What a name stands for.
#[derive(Clone, Debug)]
enum Symbol {
    Reg(Reg, Ty),
    Variable(usize),
    KernelParam(u32),
    FrameParam(u32),
    Local(u64),
    Targets(Vec<String>),
}

/// Decoder of one function.
struct Decoder<'a> {
    code: &'a mut Code,
    globals: &'a BTreeMap<String, usize>,
    names: &'a BTreeMap<String, usize>,
    signatures: &'a [Signature],
    slots: Vec<Slot>,
    consts: BTreeMap<u64, Reg>,
    others: Vec<(Slot, Reg)>,
    scopes: Vec<(usize, BTreeMap<String, Symbol>)>,
    labels: BTreeMap<(usize, String), u32>,
    /// Branches whose label was not yet known: position, scopes around it, and the labels.
    pending: Vec<(usize, Vec<usize>, Vec<String>)>,
    local_bytes: u64,
    area_bytes: u32,
    calls: Vec<usize>,
    indirect: bool,
    shared_vars: Vec<usize>,
    carry: Reg,
    sink: Option<Reg>,
    // Of the instruction at hand.
    line: u32,
    name: String,
    guard: (Reg, bool),
    emitted: bool,
    uses: Vec<Reg>,
    defs: Vec<Reg>,
    class: Class,
}

fn function(
    code: &mut Code,
    f: &Function,
    globals: &BTreeMap<String, usize>,
    names: &BTreeMap<String, usize>,
    signatures: &[Signature],
) -> Result<Func, Error> {
    let sig = signatures[names[&f.name]].clone();
    let start = code.insts.len() as u32;
    let mut d = Decoder {
        code,
        globals,
        names,
        signatures,
        slots: Vec::new(),
        consts: BTreeMap::new(),
        others: Vec::new(),
        scopes: vec![(0, BTreeMap::new())],
        labels: BTreeMap::new(),
        pending: Vec::new(),
        local_bytes: 0,
        area_bytes: if f.is_entry { 0 } else { sig.bytes },
        calls: Vec::new(),
        indirect: false,
        shared_vars: Vec::new(),
        carry: NONE,
        sink: None,
        line: 0,
        name: String::new(),
        guard: (NONE, false),
        emitted: false,
        uses: Vec::new(),
        defs: Vec::new(),
        class: Class::Other,
    };
    for (v, (offset, _)) in f.params.iter().zip(&sig.params).chain(f.rets.iter().zip(&sig.rets)) {
        let s = if f.is_entry { Symbol::KernelParam(*offset) } else { Symbol::FrameParam(*offset) };
        d.scopes[0].1.insert(v.name.clone(), s);
    }
    d.body(&f.body)?;
    if f.has_body {
        d.line =
            f.body.iter().rev().find_map(|s| if let Stmt::Instr(i) = s { Some(i.line) } else { None }).unwrap_or(1);
        d.name = "ret".into();
        d.class = Class::Hidden;
        d.guard = (NONE, false);
        d.emit(Op::Ret);
    }
    d.patch()?;
    d.mark_matrix(start as usize);
    let Decoder { slots, local_bytes, area_bytes, calls, indirect, shared_vars, .. } = d;
    Ok(Func {
        name: f.name.clone(),
        is_entry: f.is_entry,
        has_body: f.has_body,
        start,
        end: code.insts.len() as u32,
        slots,
        local_bytes,
        area_bytes,
        params: sig.params,
        rets: sig.rets,
        param_bytes: sig.bytes,
        calls,
        indirect,
        shared_vars,
        max_threads: f.max_threads.map(|t| t.iter().fold(1u32, |a, b| a.saturating_mul(*b))),
        req_threads: f.req_threads,
        req_cluster: f.req_cluster,
        max_regs: f.max_regs,
    })
}

impl Decoder<'_> {
    fn body(&mut self, body: &[Stmt]) -> Result<(), Error> {
        let mut next_scope = 0;
        for s in body {
            match s {
                Stmt::Open => {
                    next_scope += 1;
                    self.scopes.push((next_scope, BTreeMap::new()));
                }
                Stmt::Close => {
                    self.scopes.pop();
                }
                Stmt::Label(name) => {
                    let scope = self.scopes.last().map_or(0, |s| s.0);
                    self.labels.insert((scope, name.clone()), self.code.insts.len() as u32);
                }
                Stmt::Reg(ty, name, count) => {
                    if self.slots.len() as u32 + count.unwrap_or(1) > MAX_REGISTERS {
                        return self.parse_error(format!("`{name}`: too many registers"));
                    }
                    match count {
                        None => self.declare(name.clone(), *ty),
                        Some(n) => (0..*n).for_each(|i| self.declare(format!("{name}{i}"), *ty)),
                    }
                }
                Stmt::Var(v) => self.local_var(v)?,
                Stmt::Targets(name, list) => self.define(name.clone(), Symbol::Targets(list.clone())),
                Stmt::Instr(i) => self.instruction(i)?,
            }
        }
        Ok(())
    }

    fn define(&mut self, name: String, s: Symbol) {
        if let Some((_, scope)) = self.scopes.last_mut() {
            scope.insert(name, s);
        }
    }

    fn declare(&mut self, name: String, ty: Ty) {
        let r = self.temp(ty);
        self.define(name, Symbol::Reg(r, ty));
    }

    /// A new register.
    fn temp(&mut self, ty: Ty) -> Reg {
        self.slots.push(Slot::Register(ty));
        (self.slots.len() - 1) as Reg
    }

    fn local_var(&mut self, v: &Var) -> Result<(), Error> {
        let s = match v.space {
            Space::Param => Symbol::FrameParam(parameter(&mut self.area_bytes, v)?),
            Space::Local => {
                let at = self.local_bytes.next_multiple_of(u64::from(v.align.max(1)));
                self.local_bytes = at + v.bytes;
                Symbol::Local(at)
            }
            Space::Global | Space::Const | Space::Shared => Symbol::Variable(add_var(self.code, v.clone())),
        };
        self.define(v.name.clone(), s);
        Ok(())
    }

    fn find(&self, name: &str) -> Option<Symbol> {
        self.scopes
            .iter()
            .rev()
            .find_map(|(_, s)| s.get(name).cloned())
            .or_else(|| self.globals.get(name).map(|v| Symbol::Variable(*v)))
    }

    fn patch(&mut self) -> Result<(), Error> {
        for (at, scopes, names) in std::mem::take(&mut self.pending) {
            let line = self.code.insts[at].line;
            let mut found = Vec::new();
            for name in &names {
                let to = scopes.iter().rev().find_map(|s| self.labels.get(&(*s, name.clone())));
                found.push(*to.ok_or_else(|| Error::Parse { line, message: format!("no label `{name}`") })?);
            }
            match &mut self.code.insts[at].op {
                Op::Bra { target } => *target = found[0],
                Op::Brx { targets, .. } => *targets = found,
                _ => {}
            }
        }
        Ok(())
    }

    /// Finds the instructions that touch registers of wgmma. Moves do not count: they are how a compiler names the same
    /// value anew, and the assembler places them.
    fn mark_matrix(&mut self, start: usize) {
        let Code { insts, uses, defs, .. } = &mut *self.code;
        let of_wgmma = insts[start..].iter().filter_map(|i| if let Op::Wgmma(w) = &i.op { Some(w) } else { None });
        let registers: BTreeSet<Reg> = of_wgmma.flat_map(|w| w.d.iter().chain(&w.a).copied()).collect();
        for (i, inst) in insts.iter_mut().enumerate().skip(start) {
            let touches = || uses[i].iter().chain(&defs[i]).any(|r| registers.contains(r));
            inst.matrix = !matches!(inst.op, Op::Wgmma(_)) && inst.class != Class::Move && touches();
        }
    }

    fn parse_error<T>(&self, message: impl Into<String>) -> Result<T, Error> {
        Err(Error::Parse { line: self.line, message: message.into() })
    }

    fn unsupported<T>(&self, message: impl Into<String>) -> Result<T, Error> {
        Err(Error::Unsupported { line: self.line, instruction: self.name.clone(), message: message.into() })
    }

    fn instruction(&mut self, i: &Instr) -> Result<(), Error> {
        self.line = i.line;
        self.name.clone_from(&i.name);
        self.emitted = false;
        self.uses.clear();
        self.defs.clear();
        self.guard = (NONE, false);
        if let Some((name, negate)) = &i.guard {
            let r = self.source(&Operand::Word(name.clone()), Ty::Pred)?;
            self.guard = (r, *negate);
        }
        let parts: Vec<&str> = i.name.split('.').collect();
        let name = Name(&parts);
        self.class = class_of(name);
        let before = self.code.insts.len();
        self.any(name, Operands::new(&i.operands))?;
        if self.code.insts.len() == before {
            return self.unsupported("it decoded to nothing");
        }
        Ok(())
    }

    fn any(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        if self.control(p, o)?
            || self.memory(p, o)?
            || self.asynchronous(p, o)?
            || self.tensor(p, o)?
            || self.convert(p, o)?
            || self.video(p, o)?
            || self.alu(p, o)?
        {
            return Ok(());
        }
        self.unsupported("no such instruction")
    }

    /// Appends an operation under the guard of the instruction at hand.
    fn emit(&mut self, op: Op) {
        let class = if self.emitted { Class::Hidden } else { self.class };
        self.emitted = true;
        self.code.insts.push(Inst {
            op,
            guard: self.guard.0,
            negate: self.guard.1,
            line: self.line,
            class,
            matrix: false,
        });
        let mut uses = self.uses.clone();
        uses.sort_unstable();
        uses.dedup();
        let mut defs = self.defs.clone();
        defs.sort_unstable();
        defs.dedup();
        self.code.uses.push(uses);
        self.code.defs.push(defs);
    }

    fn alu_op(&mut self, k: crate::op::Kernel, d: Reg, s: [Reg; 3], imm: u64) {
        let [a, b, c] = s.map(|r| if r == NONE { 0 } else { r });
        self.emit(Op::Alu { k, d, a, b, c, imm });
    }
}

/// The type at the end of an instruction's name.
fn last_type(p: Name<'_>) -> Option<Ty> {
    p.last().and_then(|s| Ty::parse(s))
}

fn class_of(p: Name<'_>) -> Class {
    let float = matches!(p.last().copied(), Some("f32" | "f64" | "f16" | "bf16" | "f16x2" | "bf16x2"));
    match p[0] {
        "ld" | "ldu" | "ldmatrix" => Class::Load,
        "st" | "stmatrix" => Class::Store,
        "atom" | "red" => Class::Atomic,
        "mov" | "selp" | "prmt" | "cvta" => Class::Move,
        "cvt" => Class::Convert,
        "bra" | "brx" | "call" | "ret" | "exit" | "trap" => Class::Control,
        "shfl" | "vote" | "match" | "redux" | "elect" | "activemask" => Class::Warp,
        "bar" | "barrier" | "mbarrier" | "fence" | "membar" => Class::Barrier,
        "wmma" if p.get(1) == Some(&"load") => Class::Load,
        "wmma" if p.get(1) == Some(&"store") => Class::Store,
        "mma" | "wmma" | "wgmma" => Class::Tensor,
        "cp" => Class::AsyncCopy,
        "ex2" | "lg2" | "rcp" | "rsqrt" | "sqrt" | "sin" | "cos" | "tanh" => Class::Special,
        "add" | "sub" | "mul" | "mad" | "fma" | "div" | "min" | "max" | "neg" | "abs" | "setp" | "set" => {
            if float {
                Class::Float
            } else {
                Class::Integer
            }
        }
        "and" | "or" | "xor" | "not" | "shl" | "shr" | "shf" | "lop3" | "bfe" | "bfi" | "bfind" | "brev" | "clz"
        | "popc" | "dp4a" | "dp2a" | "sad" | "mul24" | "mad24" | "rem" | "addc" | "subc" | "madc" => Class::Integer,
        _ => Class::Other,
    }
}
