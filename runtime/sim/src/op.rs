//! Decoded instructions: what the executor runs.
//!
//! A register, a literal and a special register are all slots of a frame, so operands are plain indices.

use crate::clock::Scope;
use crate::num::Round;
use crate::syntax::Ty;

/// The 32 lanes of one slot.
pub(crate) type V = [u64; 32];
/// Index of a slot in a frame.
pub(crate) type Reg = u32;
/// A lane-wise operation: three sources and an immediate.
pub(crate) type Kernel = fn(&V, &V, &V, u64, &mut V);

/// No register: an absent source. What an instruction may do without a destination goes to a sink of the frame.
pub(crate) const NONE: Reg = u32::MAX;

/// What a slot holds when its frame is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Slot {
    Register(Ty),
    Const(u64),
    Special(Special),
    /// Address of a module variable plus an offset.
    Variable(usize, i64),
    /// Address of a local variable of the frame.
    Local(i64),
}

/// Registers that do not change during the life of a warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    Clusterid(usize),
    Nclusterid(usize),
    ClusterCtaid(usize),
    ClusterNctaid(usize),
    ClusterCtarank,
    ClusterNctarank,
    IsExplicitCluster,
    Laneid,
    Warpid,
    Nwarpid,
    Smid,
    Nsmid,
    Gridid,
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    DynamicSharedSize,
    TotalSharedSize,
    /// Half of the address of the workspace that a cooperative launch gives its grid: the upper one, or the lower.
    GridWorkspace {
        upper: bool,
    },
}

/// An address operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addr {
    pub(crate) base: Reg,
    pub(crate) offset: i64,
}

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    Generic,
    Global,
    Shared,
    SharedCluster,
    Local,
    Const,
    /// Parameters of the kernel.
    KernelParam,
    /// Parameters of device functions and of calls, in the frame.
    FrameParam,
}

/// Strength and order of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) strong: bool,
    pub(crate) acquire: bool,
    pub(crate) release: bool,
    pub(crate) scope: Scope,
}

/// Read-modify-write operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rmw {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Inc,
    Dec,
    Exch,
    Cas,
}

/// A load or store of one to four elements.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) place: Where,
    pub(crate) ty: Ty,
    pub(crate) regs: Vec<Reg>,
    /// Bits of the destination registers, for the extension of narrow loads.
    pub(crate) reg_bits: u32,
    pub(crate) addr: Addr,
    pub(crate) order: Order,
}

/// An atomic operation; without a result when `d` is empty.
#[derive(Clone, Debug)]
pub(crate) struct Atomic {
    pub(crate) place: Where,
    pub(crate) op: Rmw,
    pub(crate) ty: Ty,
    pub(crate) d: Vec<Reg>,
    pub(crate) addr: Addr,
    pub(crate) b: Vec<Reg>,
    pub(crate) c: Vec<Reg>,
    pub(crate) order: Order,
    /// The mbarrier of `red.async` and `st.async`.
    pub(crate) mbar: Option<Addr>,
}

/// Modes of `shfl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

/// Warp-wide operations under a member mask.
#[derive(Clone, Debug)]
pub(crate) enum Collective {
    Shfl { mode: ShflMode, d: Reg, p: Reg, a: Reg, b: Reg, c: Reg },
    Vote { kind: Vote, d: Reg, a: Reg, negate: bool },
    MatchAny { d: Reg, a: Reg, bits: u32 },
    MatchAll { d: Reg, p: Reg, a: Reg, bits: u32 },
    Redux { op: Rmw, ty: Ty, d: Reg, a: Reg, abs: bool, nan: bool },
    Elect { d: Reg, p: Reg },
    Barrier,
}

/// Modes of `vote`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// Element types of the tensor cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Elem {
    Bf16,
    F16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
    S4,
    U4,
    /// Bits that are and-ed.
    B1,
    /// Bits that are xor-ed: as 1 and -1, their product tells whether two are the same.
    B1Xor,
    F32,
    S32,
    F64,
}

impl Elem {
    pub(crate) fn bits(self) -> usize {
        match self {
            Elem::B1 | Elem::B1Xor => 1,
            Elem::S4 | Elem::U4 => 4,
            Elem::E4m3 | Elem::E5m2 | Elem::S8 | Elem::U8 => 8,
            Elem::Bf16 | Elem::F16 => 16,
            Elem::Tf32 | Elem::F32 | Elem::S32 => 32,
            Elem::F64 => 64,
        }
    }

    /// Whole bytes; operands of less than a byte are those of `mma.sync` alone.
    pub(crate) fn bytes(self) -> u32 {
        (self.bits() / 8) as u32
    }
}

/// `mma.sync` of one shape.
#[derive(Clone, Debug)]
pub(crate) struct Mma {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) m: usize,
    pub(crate) a_ty: Elem,
    pub(crate) b_ty: Elem,
    pub(crate) c_ty: Elem,
    pub(crate) satfinite: bool,
    pub(crate) d: Vec<Reg>,
    pub(crate) a: Vec<Reg>,
    pub(crate) b: Vec<Reg>,
    pub(crate) c: Vec<Reg>,
}

/// `wmma.mma`.
#[derive(Clone, Debug)]
pub(crate) struct Wmma {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a_ty: Elem,
    pub(crate) b_ty: Elem,
    pub(crate) c_ty: Elem,
    pub(crate) d_ty: Elem,
    pub(crate) satfinite: bool,
    pub(crate) d: Vec<Reg>,
    pub(crate) a: Vec<Reg>,
    pub(crate) b: Vec<Reg>,
    pub(crate) c: Vec<Reg>,
}

/// `wgmma.mma_async`.
#[derive(Clone, Debug)]
pub(crate) struct Wgmma {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a_ty: Elem,
    pub(crate) b_ty: Elem,
    pub(crate) d_ty: Elem,
    pub(crate) satfinite: bool,
    pub(crate) d: Vec<Reg>,
    /// A in registers, or its descriptor.
    pub(crate) a: Vec<Reg>,
    pub(crate) a_desc: Reg,
    pub(crate) b_desc: Reg,
    pub(crate) scale_d: Reg,
    pub(crate) negate_a: bool,
    pub(crate) negate_b: bool,
    pub(crate) trans_a: bool,
    pub(crate) trans_b: bool,
}

/// A bulk or tensor copy.
#[derive(Clone, Debug)]
pub(crate) struct Bulk {
    pub(crate) kind: BulkKind,
    /// Shared address (destination of loads, source of stores).
    pub(crate) shared: Addr,
    pub(crate) shared_place: Where,
    /// Global address, or the address of the tensor map.
    pub(crate) global: Addr,
    pub(crate) size: Reg,
    pub(crate) mbar: Option<Addr>,
    pub(crate) mask: Reg,
    /// Rank and coordinates of a tensor copy; empty for a plain one.
    pub(crate) coords: Vec<Reg>,
    /// Reduction of a store.
    pub(crate) reduce: Option<(Rmw, Option<Ty>)>,
}

/// Directions of a bulk copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BulkKind {
    Load,
    Store,
    /// Shared memory of this block to shared memory of another one, counted by the mbarrier there.
    Exchange,
    Prefetch,
}

/// Operations on an mbarrier.
#[derive(Clone, Debug)]
pub(crate) enum Mbar {
    Init {
        count: Reg,
    },
    Inval,
    Arrive {
        d: Reg,
        count: Reg,
        expect_tx: Reg,
        drop: bool,
        order: Order,
    },
    ExpectTx {
        tx: Reg,
    },
    CompleteTx {
        tx: Reg,
    },
    /// `test_wait`, or `try_wait`, which may suspend the thread for a while before it fails.
    Wait {
        d: Reg,
        state: Reg,
        parity: bool,
        suspends: bool,
        order: Order,
    },
    PendingCount {
        d: Reg,
        state: Reg,
    },
    /// `cp.async.mbarrier.arrive`.
    AfterCopies {
        no_increment: bool,
    },
}

/// How threads meet at a barrier of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarKind {
    Sync,
    Arrive,
    RedPopc,
    RedAnd,
    RedOr,
}

/// Clocks that tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    Clock,
    GlobalTimer,
}

/// An argument or result of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CallValue {
    /// Bytes at an offset of the parameters of the calling frame.
    Area(u32),
    Reg(Reg),
}

/// A call of a device function.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// The function, or a register that holds its address.
    pub(crate) target: Result<usize, Reg>,
    pub(crate) args: Vec<CallValue>,
    pub(crate) rets: Vec<CallValue>,
}

/// One operation.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Alu {
        k: Kernel,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
        imm: u64,
    },
    Pack {
        d: Reg,
        parts: Vec<Reg>,
        bits: u32,
    },
    Unpack {
        parts: Vec<Reg>,
        s: Reg,
        bits: u32,
    },
    Timer {
        d: Reg,
        which: Timer,
    },
    Bra {
        target: u32,
    },
    Brx {
        index: Reg,
        targets: Vec<u32>,
    },
    Call(Box<Call>),
    Ret,
    Exit,
    Trap,
    Nop,
    /// `griddepcontrol.wait`.
    LaunchWait,
    /// `griddepcontrol.launch_dependents`.
    LaunchNext,
    Ld(Box<Access>),
    St(Box<Access>),
    Atom(Box<Atomic>),
    IsSpace {
        d: Reg,
        a: Reg,
        place: Where,
    },
    Mapa {
        d: Reg,
        a: Reg,
        rank: Reg,
        generic: bool,
    },
    GetCtaRank {
        d: Reg,
        a: Reg,
    },
    ActiveMask {
        d: Reg,
    },
    Collective {
        op: Box<Collective>,
        mask: Reg,
    },
    Bar {
        kind: BarKind,
        id: Reg,
        count: Reg,
        d: Reg,
        p: Reg,
        negate: bool,
        aligned: bool,
    },
    ClusterArrive {
        release: bool,
    },
    ClusterWait {
        acquire: bool,
    },
    Fence {
        scope: Scope,
    },
    ProxyFence,
    /// `fence.proxy.tensormap::generic.acquire`: tensor maps that were written here may be used from now on.
    MapFence {
        scope: Scope,
        addr: Addr,
    },
    Ldmatrix {
        d: Vec<Reg>,
        addr: Addr,
        place: Where,
        trans: bool,
    },
    Stmatrix {
        s: Vec<Reg>,
        addr: Addr,
        place: Where,
        trans: bool,
    },
    Movmatrix {
        d: Reg,
        a: Reg,
    },
    Mma(Box<Mma>),
    Wmma(Box<Wmma>),
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        pending: u32,
    },
    /// `setmaxnreg`, which all warps of a warpgroup execute together.
    SetMaxReg,
    CpAsync {
        dst: Addr,
        src: Addr,
        size: u32,
        src_size: Reg,
        ignore: Reg,
    },
    CpAsyncCommit,
    CpAsyncWait {
        pending: u32,
        all: bool,
    },
    Bulk(Box<Bulk>),
    BulkCommit,
    BulkWait {
        pending: u32,
        read: bool,
    },
    Mbar {
        place: Where,
        addr: Addr,
        op: Box<Mbar>,
    },
    /// Replaces a field of a tensor map in memory.
    TensormapReplace {
        place: Where,
        addr: Addr,
        field: u8,
        index: u32,
        value: Reg,
    },
    /// Copies a tensor map from shared to global memory, for the warp as one, and releases it.
    TensormapCopy {
        to: Addr,
        from: Addr,
    },
}

impl Op {
    /// Whether lanes that go apart stay together here: it is an operation of the warp, or of all its threads.
    pub(crate) fn meets(&self) -> bool {
        self.lanes().0
    }

    /// Whether lanes with a false guard must go on alone: it moves or stops the others.
    pub(crate) fn splits(&self) -> bool {
        self.lanes().1
    }

    /// [`Self::meets`] and [`Self::splits`].
    fn lanes(&self) -> (bool, bool) {
        match self {
            Op::Collective { .. } | Op::Bar { .. } | Op::ClusterWait { .. } => (true, true),
            Op::ClusterArrive { .. }
            | Op::Ldmatrix { .. }
            | Op::Stmatrix { .. }
            | Op::Movmatrix { .. }
            | Op::Mma(_)
            | Op::Wmma(_)
            | Op::Wgmma(_)
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait { .. }
            | Op::SetMaxReg
            | Op::TensormapCopy { .. } => (true, false),
            Op::Brx { .. } | Op::Call(_) | Op::Ret | Op::Exit | Op::Trap | Op::BulkWait { .. } => (false, true),
            Op::Mbar { op, .. } => (false, matches!(**op, Mbar::Wait { .. })),
            Op::Alu { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. }
            | Op::Timer { .. }
            | Op::Bra { .. }
            | Op::Nop
            | Op::LaunchWait
            | Op::LaunchNext
            | Op::Ld(_)
            | Op::St(_)
            | Op::Atom(_)
            | Op::IsSpace { .. }
            | Op::Mapa { .. }
            | Op::GetCtaRank { .. }
            | Op::ActiveMask { .. }
            | Op::Fence { .. }
            | Op::ProxyFence
            | Op::MapFence { .. }
            | Op::CpAsync { .. }
            | Op::CpAsyncCommit
            | Op::CpAsyncWait { .. }
            | Op::Bulk(_)
            | Op::BulkCommit
            | Op::TensormapReplace { .. } => (false, false),
        }
    }
}

/// What an instruction is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// An extra step of an instruction that is counted already.
    Hidden,
    Integer,
    Float,
    Convert,
    Special,
    Move,
    Control,
    Load,
    Store,
    Atomic,
    Warp,
    Barrier,
    Tensor,
    AsyncCopy,
    Other,
}

/// An instruction.
#[derive(Clone, Debug)]
pub(crate) struct Inst {
    pub(crate) op: Op,
    pub(crate) guard: Reg,
    pub(crate) negate: bool,
    pub(crate) line: u32,
    pub(crate) class: Class,
    /// It uses or writes a register that is an accumulator or an operand of a wgmma, and is none itself.
    pub(crate) matrix: bool,
}

/// A function in the code of a module.
#[derive(Clone, Debug)]
pub(crate) struct Func {
    pub(crate) name: String,
    pub(crate) is_entry: bool,
    pub(crate) has_body: bool,
    pub(crate) start: u32,
    pub(crate) end: u32,
    pub(crate) slots: Vec<Slot>,
    pub(crate) local_bytes: u64,
    /// Bytes of the frame's parameters.
    pub(crate) area_bytes: u32,
    /// Offset and size of the parameters and results; of an entry, in the kernel parameters.
    pub(crate) params: Vec<(u32, u32)>,
    pub(crate) rets: Vec<(u32, u32)>,
    pub(crate) param_bytes: u32,
    pub(crate) calls: Vec<usize>,
    pub(crate) indirect: bool,
    pub(crate) shared_vars: Vec<usize>,
    pub(crate) max_threads: Option<u32>,
    pub(crate) req_threads: Option<[u32; 3]>,
    pub(crate) req_cluster: Option<[u32; 3]>,
    pub(crate) max_regs: Option<u32>,
}

/// A module variable.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) var: crate::syntax::Var,
    /// Offset in the constant bank, for `.const`.
    pub(crate) const_offset: u64,
    /// A shared array without length: the dynamic shared memory.
    pub(crate) dynamic: bool,
}

/// A decoded module.
#[derive(Debug, Default)]
pub(crate) struct Code {
    pub(crate) target: String,
    pub(crate) insts: Vec<Inst>,
    pub(crate) uses: Vec<Vec<Reg>>,
    pub(crate) defs: Vec<Vec<Reg>>,
    pub(crate) funcs: Vec<Func>,
    pub(crate) vars: Vec<Variable>,
    pub(crate) const_bytes: u64,
}

/// Value of a function's address: this plus its index.
pub(crate) const FUNC_BASE: u64 = 0x0f00_0000_0000;

pub(crate) fn rounding(s: &str) -> Option<Round> {
    Some(match s {
        "rn" | "rni" => Round::NearestEven,
        "rna" => Round::NearestAway,
        "rz" | "rzi" => Round::Zero,
        "rm" | "rmi" => Round::Down,
        "rp" | "rpi" => Round::Up,
        _ => return None,
    })
}
