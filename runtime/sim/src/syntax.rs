//! The module as written: functions, variables and instructions with their operands still in text.

/// Type of a register, variable or parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ty {
    Pred,
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    F16,
    Bf16,
    B32,
    U32,
    S32,
    F32,
    F16x2,
    Bf16x2,
    Tf32,
    B64,
    U64,
    S64,
    F64,
    B128,
}

impl Ty {
    pub(crate) fn parse(s: &str) -> Option<Ty> {
        Some(match s {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "u8" => Ty::U8,
            "s8" => Ty::S8,
            "b16" => Ty::B16,
            "u16" => Ty::U16,
            "s16" => Ty::S16,
            "f16" => Ty::F16,
            "bf16" => Ty::Bf16,
            "b32" => Ty::B32,
            "u32" => Ty::U32,
            "s32" => Ty::S32,
            "f32" => Ty::F32,
            "f16x2" => Ty::F16x2,
            "bf16x2" => Ty::Bf16x2,
            "tf32" => Ty::Tf32,
            "b64" => Ty::B64,
            "u64" => Ty::U64,
            "s64" => Ty::S64,
            "f64" => Ty::F64,
            "b128" => Ty::B128,
            _ => return None,
        })
    }

    /// Size in bytes; a predicate counts as one.
    pub(crate) fn bytes(self) -> u32 {
        match self {
            Ty::Pred | Ty::B8 | Ty::U8 | Ty::S8 => 1,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 => 2,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::F16x2 | Ty::Bf16x2 | Ty::Tf32 => 4,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 8,
            Ty::B128 => 16,
        }
    }

    pub(crate) fn bits(self) -> u32 {
        self.bytes() * 8
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }
}

/// Memory of a declared variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// One element of an initialiser.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Init {
    Bits(u64),
    Float(f64),
    /// Address of a variable plus an offset; the flag asks for a generic address.
    Address(String, i64, bool),
}

/// A variable or parameter.
#[derive(Clone, Debug)]
pub(crate) struct Var {
    pub(crate) name: String,
    pub(crate) space: Space,
    pub(crate) ty: Ty,
    pub(crate) align: u32,
    /// Bytes; zero for an array without length (the dynamic shared memory).
    pub(crate) bytes: u64,
    pub(crate) init: Vec<Init>,
    pub(crate) line: u32,
}

/// An operand as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    Word(String),
    Int(u64),
    /// A literal that was written as a float; the instruction decides on its width.
    Float(f64),
    Not(Box<Operand>),
    /// `a|b`.
    Pair(Box<Operand>, Box<Operand>),
    Vector(Vec<Operand>),
    /// `[base + offset, {coordinates}, ..]`.
    Mem(Box<Operand>, i64, Vec<Operand>),
    Group(Vec<Operand>),
    /// `symbol + offset` outside brackets.
    Offset(String, i64),
    /// What reading an operand that is not there gives: its number, counted from one.
    Missing(usize),
}

/// The operands of an instruction. Each can be asked for: one that is not there is [`Operand::Missing`], which whoever
/// needs it refuses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands<'a> {
    list: &'a [Operand],
    /// How many stand before them.
    before: usize,
}

impl<'a> Operands<'a> {
    pub(crate) fn new(list: &'a [Operand]) -> Self {
        Operands { list, before: 0 }
    }

    /// Those behind the first `n`.
    pub(crate) fn after(self, n: usize) -> Self {
        Operands { list: self.list.get(n..).unwrap_or(&[]), before: self.before + n }
    }

    /// All but the last.
    pub(crate) fn but_last(self) -> Self {
        Operands { list: self.list.split_last().map_or(&[], |(_, rest)| rest), ..self }
    }
}

impl std::ops::Deref for Operands<'_> {
    type Target = [Operand];

    fn deref(&self) -> &[Operand] {
        self.list
    }
}

impl std::ops::Index<usize> for Operands<'_> {
    type Output = Operand;

    fn index(&self, i: usize) -> &Operand {
        use Operand::Missing;
        static MISSING: [Operand; 7] =
            [Missing(1), Missing(2), Missing(3), Missing(4), Missing(5), Missing(6), Missing(7)];
        self.list.get(i).unwrap_or(&MISSING[(self.before + i).min(MISSING.len() - 1)])
    }
}

/// The parts of an instruction's name, `mad` `lo` `s32`. Each can be asked for: one that is not there is empty, which
/// is no name of anything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name<'a>(pub(crate) &'a [&'a str]);

impl<'a> std::ops::Deref for Name<'a> {
    type Target = [&'a str];

    fn deref(&self) -> &[&'a str] {
        self.0
    }
}

impl<'a> std::ops::Index<usize> for Name<'a> {
    type Output = &'a str;

    fn index(&self, i: usize) -> &&'a str {
        self.0.get(i).unwrap_or(&"")
    }
}

/// An instruction.
#[derive(Clone, Debug)]
pub(crate) struct Instr {
    pub(crate) line: u32,
    pub(crate) guard: Option<(String, bool)>,
    pub(crate) name: String,
    pub(crate) operands: Vec<Operand>,
}

/// A statement of a function body.
#[derive(Clone, Debug)]
pub(crate) enum Stmt {
    Open,
    Close,
    Label(String),
    /// Type, name, and how many numbered registers the name stands for (none: the name itself).
    Reg(Ty, String, Option<u32>),
    Var(Var),
    /// A list of labels or functions with a name.
    Targets(String, Vec<String>),
    Instr(Instr),
}

/// A kernel or device function.
#[derive(Clone, Debug, Default)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) is_entry: bool,
    pub(crate) rets: Vec<Var>,
    pub(crate) params: Vec<Var>,
    pub(crate) body: Vec<Stmt>,
    pub(crate) has_body: bool,
    pub(crate) max_threads: Option<[u32; 3]>,
    pub(crate) req_threads: Option<[u32; 3]>,
    pub(crate) req_cluster: Option<[u32; 3]>,
    pub(crate) max_regs: Option<u32>,
}

/// A module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ast {
    pub(crate) target: String,
    pub(crate) functions: Vec<Function>,
    pub(crate) vars: Vec<Var>,
}
