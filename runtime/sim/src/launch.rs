//! A launch: arguments, layout of shared memory, and the blocks on all cores.

#![allow(clippy::wildcard_enum_match_arm, reason = "only operations that let blocks communicate matter here")]

use crate::clock::Scope;
use crate::counts;
use crate::exec::{Cluster, Env, GlobalShadow, GlobalSync, PAGE_BYTES, Spare, Turn};
use crate::op::{Atomic, Bulk, Code, FUNC_BASE, Op, Rmw, Slot, Special, Where};
use crate::report::{Counts, Findings};
use crate::shadow::Shadow;
use crate::space;
use crate::syntax::{Init, Space, Ty};
use crate::{Error, Memory, Module, Report, TensorMapDesc};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A device address, or any 64-bit number.
    U64(u64),
    /// A signed 64-bit number.
    I64(i64),
    /// A 32-bit number.
    U32(u32),
    /// A signed 32-bit number.
    I32(i32),
    /// A 16-bit number.
    U16(u16),
    /// A byte.
    U8(u8),
    /// A float.
    F32(f32),
    /// A double.
    F64(f64),
    /// A structure by value.
    Bytes(Vec<u8>),
    /// A tensor map by value (128 bytes).
    TensorMap(TensorMapDesc),
}

impl Arg {
    /// Bytes of the parameter, little-endian. A tensor map is in the form of the simulator.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMap`] for a map no driver would take.
    pub fn bytes(&self) -> Result<Vec<u8>, Error> {
        Ok(match self {
            Arg::U64(v) => v.to_le_bytes().to_vec(),
            Arg::I64(v) => v.to_le_bytes().to_vec(),
            Arg::U32(v) => v.to_le_bytes().to_vec(),
            Arg::I32(v) => v.to_le_bytes().to_vec(),
            Arg::U16(v) => v.to_le_bytes().to_vec(),
            Arg::U8(v) => vec![*v],
            Arg::F32(v) => v.to_le_bytes().to_vec(),
            Arg::F64(v) => v.to_le_bytes().to_vec(),
            Arg::Bytes(v) => v.clone(),
            Arg::TensorMap(map) => map.encode()?,
        })
    }
}

/// A launch of one kernel.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// Name of the entry.
    pub entry: &'a str,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z; 1024 at most.
    pub block: [u32; 3],
    /// Blocks of a cluster; ones where there is none. A kernel that names its own cluster overrides ones.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
    /// Arguments in the order of the parameters.
    pub args: Vec<Arg>,
    /// Whether it may start before the launch before it has ended (programmatic dependent launch): until
    /// `griddepcontrol.wait`, a thread may not touch what that launch, or one before it that was not awaited, writes.
    pub dependent: bool,
}

/// How to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Decides the order of warps and the moments at which copies land. With 0, copies land as late as they may.
    pub seed: u64,
    /// Whether to look for races, missing waits and fences, and reads of unwritten memory. Bounds and alignment are
    /// always checked.
    pub check: bool,
    /// Warp instructions after which the launch is given up.
    pub max_instructions: u64,
    /// How the lanes of a warp go on where nothing keeps them together.
    pub lanes: Lanes,
    /// Whether a launch ends at its first finding: that of the first cluster that has one.
    pub first: bool,
}

/// How the lanes of a warp go on between two places where they must meet (warp barriers, shuffles, matrix operations).
/// A kernel may rely on neither of them; running lanes apart is slow and shows what a warp barrier is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lanes {
    /// Together, as far as they can.
    #[default]
    Together,
    /// One after another, the first lane first.
    Ascending,
    /// One after another, the last lane first.
    Descending,
}

impl Default for Options {
    fn default() -> Options {
        Options { seed: 0, check: true, max_instructions: 4_000_000_000, lanes: Lanes::Together, first: false }
    }
}

/// Clusters that are under way at once when they may wait for each other.
const RESIDENT: usize = 264;
/// Rounds of a cluster before the next one has its turn.
const ROUNDS: u32 = 64;
/// Passes over clusters that all wait after which the launch counts as stuck.
const STUCK: u32 = 4;

/// Runs a kernel to its end.
///
/// Blocks run on all cores when nothing in the kernel lets them communicate, and in turns on one core otherwise. What
/// is computed and counted is the same for the same seed either way, and so is what is found, but for races between
/// blocks on several cores: such a race is found, at the access of the two that came later this time.
///
/// # Errors
///
/// [`Error::NoEntry`], [`Error::Args`], [`Error::Launch`] for what does not fit the kernel, [`Error::TensorMap`] for a
/// map no driver would take, [`Error::Limit`] for a launch without end. Faults of the kernel are findings, not errors.
pub fn launch(module: &Module, memory: &mut Memory, launch: &Launch<'_>, options: &Options) -> Result<Report, Error> {
    let code = module.code();
    let entry = code
        .funcs
        .iter()
        .position(|f| f.is_entry && f.has_body && f.name == launch.entry)
        .ok_or_else(|| Error::NoEntry(launch.entry.to_owned()))?;
    let f = &code.funcs[entry];
    let mut cluster = launch.cluster.map(|c| c.max(1));
    if let Some(c) = f.req_cluster {
        let given = cluster.iter().product::<u32>() > 1;
        if given && c != cluster {
            return Err(bad(launch, format!("the kernel needs clusters of {c:?}")));
        }
        cluster = c;
    }
    validate(launch, cluster, f.max_threads, f.req_threads)?;
    let params = parameters(launch, f)?;
    globals(module, memory)?;
    let reachable = reachable(code, entry);
    if let Some(g) = reachable.iter().map(|g| &code.funcs[*g]).find(|g| g.local_bytes > 1 << 19) {
        return Err(bad(launch, format!("`{}` takes {} bytes of local memory", g.name, g.local_bytes)));
    }
    let workspace = workspace(code, &reachable, memory)?;
    let (var_addr, shared_end) = layout(module, memory, &reachable, launch.dynamic_shared)?;
    let limit = 227 * 1024;
    if shared_end - space::SHARED_BASE > limit {
        return Err(bad(
            launch,
            format!("{} bytes of shared memory are more than {limit}", shared_end - space::SHARED_BASE),
        ));
    }
    let const_bank = constants(code, &var_addr)?;
    let pages = if options.check {
        memory.allocs.iter().map(|a| (0..a.bytes.div_ceil(PAGE_BYTES)).map(|_| OnceLock::new()).collect()).collect()
    } else {
        Vec::new()
    };
    if !launch.dependent {
        memory.before.clear();
        memory.beyond.clear();
    }
    let (marks, beyond) = (std::mem::take(&mut memory.before), std::mem::take(&mut memory.beyond));
    let before = by_allocation(memory, &marks, options.check);
    let still_beyond = by_allocation(memory, &beyond, options.check);
    let env = Env {
        code,
        entry,
        grid: launch.grid,
        block: launch.block,
        cluster,
        params,
        memory,
        shadow: GlobalShadow { pages },
        var_addr,
        const_bank,
        shared_end,
        dynamic_shared: launch.dynamic_shared,
        workspace,
        check: options.check,
        independent: independent(code, &reachable),
        before,
        beyond: still_beyond,
        waited: AtomicBool::new(false),
        hasty: AtomicBool::new(false),
        seed: options.seed,
        lanes: options.lanes,
        found: options.first.then(|| AtomicU32::new(u32::MAX)),
        max_instructions: options.max_instructions,
        executed: AtomicU64::new(0),
    };
    let clusters = (launch.grid.iter().product::<u32>()) / cluster.iter().product::<u32>();
    let results = if env.independent { in_parallel(&env, clusters)? } else { in_turns(&env, clusters)? };
    let mut report = Report::default();
    let mut findings = Findings::default();
    let first = env.found.as_ref().map(|f| f.load(Ordering::Relaxed));
    for (id, f, c) in results {
        if first.is_none_or(|first| first == id) {
            findings.merge(f);
        }
        report.counts.add(&c);
    }
    report.counts.blocks = u64::from(clusters) * u64::from(cluster.iter().product::<u32>());
    counts::occupancy(&mut report.counts, code, entry, &reachable, launch, (shared_end - space::SHARED_BASE) as u32);
    report.findings = findings.map.into_values().collect();
    let pages = env.shadow.pages;
    // A launch that waits before it lets the next one start stands between that one and all before itself.
    let (hasty, waited) = (env.hasty.into_inner(), env.waited.into_inner());
    memory.beyond = beyond;
    if !waited {
        // It may end before those that it has not waited for, and who waits for it knows nothing of them.
        for (base, marks) in &marks {
            let all = memory.beyond.entry(*base).or_insert_with(|| vec![0; marks.len()]);
            all.iter_mut().zip(marks).for_each(|(all, mark)| *all |= mark);
        }
    }
    memory.before = if hasty { marks } else { BTreeMap::new() };
    if options.check && code.insts.iter().any(|i| matches!(i.op, Op::LaunchWait)) {
        mark(memory, pages);
    }
    if workspace != 0 {
        memory.free(workspace)?;
    }
    Ok(report)
}

/// Marks of words by the index of the allocation; nothing where there are none.
fn by_allocation<'a>(memory: &Memory, marks: &'a BTreeMap<u64, Vec<u8>>, check: bool) -> Vec<Option<&'a [u8]>> {
    if marks.is_empty() || !check {
        return Vec::new();
    }
    memory.allocs.iter().map(|a| marks.get(&a.base).map(Vec::as_slice)).collect()
}

/// Notes what a launch has read and written, for launches that start before its end.
fn mark(memory: &mut Memory, pages: Vec<Vec<OnceLock<Mutex<Shadow>>>>) {
    for (alloc, pages) in memory.allocs.iter().zip(pages) {
        for (page, shadow) in pages.into_iter().enumerate() {
            let Some(shadow) = shadow.into_inner().and_then(|s| s.into_inner().ok()) else { continue };
            let words = memory.before.entry(alloc.base).or_insert_with(|| vec![0; alloc.bytes.div_ceil(4) as usize]);
            let first = page * PAGE_BYTES as usize / 4;
            shadow.marks(|word, count, mark| {
                words.iter_mut().skip(first + word).take(count).for_each(|m| *m |= mark);
            });
        }
    }
}

fn bad(launch: &Launch<'_>, message: String) -> Error {
    Error::Launch { entry: launch.entry.to_owned(), message }
}

fn validate(launch: &Launch<'_>, cluster: [u32; 3], max: Option<u32>, req: Option<[u32; 3]>) -> Result<(), Error> {
    let size = |d: [u32; 3]| d.iter().try_fold(1u32, |a, b| a.checked_mul(*b));
    let threads = size(launch.block).filter(|t| (1..=1024).contains(t));
    let Some(threads) = threads else { return Err(bad(launch, format!("blocks of {:?} threads", launch.block))) };
    if size(launch.grid).is_none_or(|b| b == 0) {
        return Err(bad(launch, format!("a grid of {:?} blocks", launch.grid)));
    }
    if size(cluster).is_none_or(|c| c == 0 || c > 16) || (0..3).any(|i| !launch.grid[i].is_multiple_of(cluster[i])) {
        return Err(bad(launch, format!("clusters of {cluster:?} in a grid of {:?}", launch.grid)));
    }
    if max.is_some_and(|m| threads > m) || req.is_some_and(|r| r != launch.block) {
        return Err(bad(
            launch,
            format!("blocks of {:?} threads do not fit the .maxntid or .reqntid of the kernel", launch.block),
        ));
    }
    Ok(())
}

fn parameters(launch: &Launch<'_>, f: &crate::op::Func) -> Result<Vec<u8>, Error> {
    let wrong = |message: String| Error::Args { entry: launch.entry.to_owned(), message };
    if launch.args.len() != f.params.len() {
        return Err(wrong(format!("{} given, the kernel has {} parameters", launch.args.len(), f.params.len())));
    }
    let mut out = vec![0; f.param_bytes as usize];
    for (i, (arg, (offset, bytes))) in launch.args.iter().zip(&f.params).enumerate() {
        let data = arg.bytes()?;
        if data.len() != *bytes as usize {
            return Err(wrong(format!("argument {i} has {} bytes, the parameter {bytes}", data.len())));
        }
        out[*offset as usize..][..data.len()].copy_from_slice(&data);
    }
    Ok(out)
}

/// Functions that the entry can reach; all of them when it calls through an address.
fn reachable(code: &Code, entry: usize) -> BTreeSet<usize> {
    let mut seen = BTreeSet::new();
    let mut todo = vec![entry];
    while let Some(f) = todo.pop() {
        if seen.insert(f) {
            todo.extend(&code.funcs[f].calls);
            if code.funcs[f].indirect {
                todo.extend((0..code.funcs.len()).filter(|g| !code.funcs[*g].is_entry));
            }
        }
    }
    seen
}

/// Sixteen zero words for the barrier of the grid, when a function asks for their address: every launch may be
/// cooperative here, since blocks that wait for each other take turns.
fn workspace(code: &Code, reachable: &BTreeSet<usize>, memory: &mut Memory) -> Result<u64, Error> {
    let asks = |s: &Slot| matches!(s, Slot::Special(Special::GridWorkspace { .. }));
    if !reachable.iter().any(|f| code.funcs[*f].slots.iter().any(asks)) {
        return Ok(0);
    }
    let address = memory.alloc(64, 64);
    memory.write(address, &[0; 64])?;
    Ok(address)
}

/// Makes the `.global` variables of the module at its first launch in this memory.
fn globals(module: &Module, memory: &mut Memory) -> Result<(), Error> {
    if memory.modules.contains_key(&module.id()) {
        return Ok(());
    }
    let code = module.code();
    let mut addr = BTreeMap::new();
    for (i, v) in code.vars.iter().enumerate().filter(|(_, v)| v.var.space == Space::Global) {
        addr.insert(i, memory.alloc(v.var.bytes, u64::from(v.var.align)));
    }
    for (i, v) in code.vars.iter().enumerate().filter(|(_, v)| v.var.space == Space::Global) {
        let data = initial(code, i, &|j| addr.get(&j).copied().unwrap_or(code.vars[j].const_offset), v.var.bytes)?;
        memory.write(addr[&i], &data)?;
    }
    memory.modules.insert(module.id(), addr);
    Ok(())
}

/// Bytes of an initialised variable.
fn initial(code: &Code, index: usize, address: &dyn Fn(usize) -> u64, bytes: u64) -> Result<Vec<u8>, Error> {
    let v = &code.vars[index].var;
    let size = v.ty.bytes() as usize;
    let mut out = vec![0; bytes as usize];
    for (i, init) in v.init.iter().enumerate() {
        let value = match init {
            Init::Bits(b) => *b,
            Init::Float(x) => match v.ty {
                Ty::F32 => u64::from((*x as f32).to_bits()),
                _ => x.to_bits(),
            },
            Init::Address(name, offset, generic) => {
                let variable = code.vars.iter().position(|w| w.var.name == *name);
                let function = code.funcs.iter().position(|f| f.name == *name);
                match (variable, function) {
                    (Some(j), _) => {
                        let window = if *generic && code.vars[j].var.space == Space::Const { space::CONST } else { 0 };
                        address(j).wrapping_add(*offset as u64).wrapping_add(window)
                    }
                    (None, Some(f)) => FUNC_BASE + f as u64,
                    (None, None) => {
                        return Err(Error::Parse { line: v.line, message: format!("no variable `{name}`") });
                    }
                }
            }
        };
        let Some(to) = out.get_mut(i * size..(i + 1) * size) else {
            return Err(Error::Parse { line: v.line, message: format!("too many initialisers of `{}`", v.name) });
        };
        let le = value.to_le_bytes();
        let n = size.min(8);
        to[..n].copy_from_slice(&le[..n]);
    }
    Ok(out)
}

fn constants(code: &Code, addr: &[u64]) -> Result<Vec<u8>, Error> {
    let mut bank = vec![0; code.const_bytes as usize];
    for (i, v) in code.vars.iter().enumerate().filter(|(_, v)| v.var.space == Space::Const) {
        let data = initial(code, i, &|j| addr[j], v.var.bytes)?;
        bank[v.const_offset as usize..][..data.len()].copy_from_slice(&data);
    }
    Ok(bank)
}

/// Address of each variable in its space, and the end of shared memory.
fn layout(
    module: &Module,
    memory: &Memory,
    reachable: &BTreeSet<usize>,
    dynamic: u32,
) -> Result<(Vec<u64>, u64), Error> {
    let code = module.code();
    let used: BTreeSet<usize> = reachable.iter().flat_map(|f| code.funcs[*f].shared_vars.iter().copied()).collect();
    let globals = memory.modules.get(&module.id());
    let mut addr = vec![0; code.vars.len()];
    let mut at = space::SHARED_BASE;
    for (i, v) in code.vars.iter().enumerate() {
        match v.var.space {
            Space::Global => addr[i] = globals.and_then(|g| g.get(&i)).copied().unwrap_or(0),
            Space::Const => addr[i] = v.const_offset,
            Space::Shared if used.contains(&i) && !v.dynamic => {
                at = at.next_multiple_of(u64::from(v.var.align.max(1)));
                addr[i] = at;
                at += v.var.bytes;
            }
            Space::Shared | Space::Local | Space::Param => {}
        }
    }
    let align = code
        .vars
        .iter()
        .enumerate()
        .filter(|(i, v)| v.dynamic && used.contains(i))
        .map(|(_, v)| u64::from(v.var.align))
        .max();
    // The dynamic part comes last, on 16 bytes at least; a tile that wants more aligns itself.
    let start = at.next_multiple_of(align.unwrap_or(1).max(16));
    for (i, _) in code.vars.iter().enumerate().filter(|(_, v)| v.dynamic) {
        addr[i] = start;
    }
    let end = if dynamic > 0 { start + u64::from(dynamic) } else { at };
    Ok((addr, end))
}

/// Whether blocks cannot learn of each other before the end of the launch, so that their order is of no matter.
fn independent(code: &Code, reachable: &BTreeSet<usize>) -> bool {
    let shared = |w: Where| !matches!(w, Where::Global | Where::Generic);
    let harmless = |a: &Atomic| {
        let commutes = matches!(a.op, Rmw::Add | Rmw::Min | Rmw::Max | Rmw::And | Rmw::Or | Rmw::Xor)
            && matches!(a.ty, Ty::U32 | Ty::S32 | Ty::B32);
        shared(a.place) || (commutes && a.d.is_empty() && !a.order.acquire && !a.order.release)
    };
    let plain = |b: &Bulk| b.reduce.is_none();
    reachable.iter().all(|f| {
        let f = &code.funcs[*f];
        code.insts[f.start as usize..f.end as usize].iter().all(|i| match &i.op {
            Op::Ld(a) | Op::St(a) => !a.order.strong || shared(a.place) || a.order.scope == Scope::Cta,
            Op::Atom(a) => harmless(a),
            Op::Bulk(b) => plain(b),
            Op::TensormapReplace { .. } | Op::TensormapCopy { .. } => false,
            _ => true,
        })
    })
}

/// A cluster with what was found in it and counted.
type Part = (u32, Findings, Counts);

fn finish(mut c: Cluster<'_>, spare: &mut Spare) -> Part {
    counts::summarise(&mut c);
    c.give_back(spare);
    (c.id, c.findings, c.counts)
}

fn in_parallel(env: &Env<'_>, clusters: u32) -> Result<Vec<Part>, Error> {
    // Clusters are dealt out in runs, so that a thread adds its counts up and not the launch at its end.
    (0..clusters)
        .into_par_iter()
        .with_min_len(1)
        .map_init(Spare::default, |spare, id| {
            let mut c = Cluster::new(env, id, GlobalSync::default(), spare);
            loop {
                match c.run(ROUNDS)? {
                    Turn::Done => break,
                    Turn::Worked => {}
                    Turn::Idle => {
                        c.report_deadlock();
                        break;
                    }
                }
            }
            Ok(finish(c, spare))
        })
        .collect()
}

fn in_turns(env: &Env<'_>, clusters: u32) -> Result<Vec<Part>, Error> {
    let sync = GlobalSync::default();
    let mut spare = Spare::default();
    let mut out = Vec::new();
    let mut waiting: VecDeque<u32> = (0..clusters).collect();
    // The order of blocks is not specified; the seed turns it round.
    if env.seed % 2 == 1 {
        waiting.make_contiguous().reverse();
    }
    let mut running: VecDeque<Cluster<'_>> = VecDeque::new();
    let mut idle = 0;
    loop {
        while running.len() < RESIDENT
            && let Some(id) = waiting.pop_front()
        {
            running.push_back(Cluster::new(env, id, sync.clone(), &mut spare));
        }
        let n = running.len();
        if n == 0 {
            return Ok(out);
        }
        let mut worked = false;
        for _ in 0..n {
            let Some(mut c) = running.pop_front() else { break };
            match c.run(ROUNDS)? {
                Turn::Done => {
                    worked = true;
                    out.push(finish(c, &mut spare));
                }
                Turn::Worked => {
                    worked = true;
                    running.push_back(c);
                }
                Turn::Idle => running.push_back(c),
            }
        }
        idle = if worked { 0 } else { idle + 1 };
        if idle >= STUCK {
            for mut c in running.drain(..) {
                c.report_deadlock();
                out.push(finish(c, &mut spare));
            }
            return Ok(out);
        }
    }
}
