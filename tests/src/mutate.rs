//! Mutants of emitted PTX: each lacks one barrier, fence, wait, commit, arrival or mask.
//!
//! A checker is worth what it catches. [`mutants`] takes every instruction that keeps a kernel correct away in turn,
//! [`subject`] runs the result over shapes with tails, and [`judge`] says what became of it. The table of all of them
//! is written by the example `mutants`.

pub mod judge;
pub mod subject;
pub mod table;

/// What was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `bar.sync`, `barrier.cluster`: threads of a block, of a part of it, or of a cluster, meet.
    Barrier,
    /// `bar.warp.sync`.
    WarpBarrier,
    /// `fence.*`, `wgmma.fence`.
    Fence,
    /// `cp.async.wait_group`: gone, or waiting for one group less.
    CopyWait,
    /// The loop around `mbarrier.try_wait`: goes on after one try.
    MbarrierWait,
    /// `wgmma.wait_group`: gone, or waiting for one group less.
    WgmmaWait,
    /// `griddepcontrol.wait`: the launch before is not awaited.
    LaunchWait,
    /// `cp.async.commit_group`, `wgmma.commit_group`.
    Commit,
    /// `mbarrier.arrive`.
    Arrive,
    /// The guard of an access: a predicate, or a branch around it.
    Guard,
    /// The length of a copy that fills with zeros: the whole piece is copied.
    ZeroFill,
}

impl Kind {
    /// All kinds in the order of the table.
    pub const ALL: [Self; 11] = [
        Self::Barrier,
        Self::WarpBarrier,
        Self::Fence,
        Self::CopyWait,
        Self::MbarrierWait,
        Self::WgmmaWait,
        Self::LaunchWait,
        Self::Commit,
        Self::Arrive,
        Self::Guard,
        Self::ZeroFill,
    ];

    /// Name in the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Barrier => "barrier",
            Self::WarpBarrier => "warp barrier",
            Self::Fence => "fence",
            Self::CopyWait => "cp.async wait",
            Self::MbarrierWait => "mbarrier wait",
            Self::WgmmaWait => "wgmma wait",
            Self::LaunchWait => "wait for the launch before",
            Self::Commit => "commit",
            Self::Arrive => "arrival",
            Self::Guard => "guard",
            Self::ZeroFill => "zero fill",
        }
    }
}

/// One mutant.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// What is missing.
    pub kind: Kind,
    /// Kernel.
    pub entry: String,
    /// Line of the PTX, from 1.
    pub line: usize,
    /// The line as it was.
    pub was: String,
    /// The line as it is now.
    pub now: String,
    /// The line as it traps when the mutation makes a difference: when the line is reached, or the guard holds
    /// something back.
    pub probe: String,
    /// For zeros that a copy fills in: the line as it leaves their place unwritten instead.
    pub unwritten: Option<String>,
}

impl Mutant {
    /// `ptx` with the mutated line.
    #[must_use]
    pub fn apply(&self, ptx: &str) -> String {
        replaced(ptx, self.line, &self.now)
    }

    /// `ptx` with nothing in the place of zeros that a copy fills in; memory that nobody has written reads as NaN.
    #[must_use]
    pub fn unwritten(&self, ptx: &str) -> Option<String> {
        Some(replaced(ptx, self.line, self.unwritten.as_ref()?))
    }

    /// `ptx` with a trap where the mutation would make a difference.
    #[must_use]
    pub fn probe(&self, ptx: &str) -> String {
        replaced(ptx, self.line, &self.probe)
    }
}

fn replaced(ptx: &str, line: usize, with: &str) -> String {
    let mut out = String::with_capacity(ptx.len() + with.len());
    for (i, l) in ptx.lines().enumerate() {
        out.push_str(if i + 1 == line { with } else { l });
        out.push('\n');
    }
    out
}

/// Every mutant of a module, in the order of its lines.
#[must_use]
pub fn mutants(ptx: &str) -> Vec<Mutant> {
    let lines: Vec<&str> = ptx.lines().map(|l| l.split("//").next().unwrap_or(l).trim()).collect();
    let mut entry = String::new();
    let mut found = Vec::new();
    for (i, text) in lines.iter().enumerate() {
        if let Some((_, rest)) = text.split_once(".entry ") {
            rest.split('(').next().unwrap_or(rest).trim().clone_into(&mut entry);
        }
        let mut add = |kind, now: String, probe: String| {
            let was = (*text).to_owned();
            found.push(Mutant { kind, entry: entry.clone(), line: i + 1, was, now, probe, unwritten: None });
        };
        if let Some((guard, rest)) = guarded(text) {
            guard_mutants(&lines, i, guard, rest, &mut add);
            continue;
        }
        let op = text.split_whitespace().next().unwrap_or("");
        let gone = || (String::new(), "trap;".to_owned());
        if op.starts_with("bar.warp") {
            let (now, probe) = gone();
            add(Kind::WarpBarrier, now, probe);
        } else if op.starts_with("bar.sync")
            || op.starts_with("barrier.") && op.contains("sync")
            || op.starts_with("barrier.cluster")
        {
            let (now, probe) = gone();
            add(Kind::Barrier, now, probe);
        } else if op.starts_with("fence.") || op.starts_with("wgmma.fence") || op.starts_with("membar") {
            let (now, probe) = gone();
            add(Kind::Fence, now, probe);
        } else if op.starts_with("cp.async.commit_group") || op.starts_with("wgmma.commit_group") {
            let (now, probe) = gone();
            add(Kind::Commit, now, probe);
        } else if op.starts_with("cp.async.wait_") || op.starts_with("wgmma.wait_group") {
            let kind = if op.starts_with("cp") { Kind::CopyWait } else { Kind::WgmmaWait };
            let (now, probe) = gone();
            add(kind, now, probe.clone());
            let count = text.trim_end_matches(';').split_whitespace().last().and_then(|n| n.parse::<u32>().ok());
            if let Some(n) = count {
                add(kind, format!("{op} {};", n + 1), probe);
            }
        } else if op.starts_with("griddepcontrol.wait") {
            let (now, probe) = gone();
            add(Kind::LaunchWait, now, probe);
        } else if op.starts_with("mbarrier.arrive") {
            let (now, probe) = gone();
            add(Kind::Arrive, now, probe);
        } else if op.starts_with("cp.async.c")
            && let Some((head, [whole, length])) = copy_length(text)
        {
            let probe = format!("{{ .reg .pred %moec; setp.ne.b32 %moec, {length}, {whole}; @%moec trap; }}");
            let all = format!("{head}, {whole}, {whole};");
            add(Kind::ZeroFill, all.clone(), format!("{probe} {text}"));
            let test = format!("setp.eq.b32 %moec, {length}, {whole};");
            if let Some(last) = found.last_mut() {
                last.unwritten = Some(format!("{{ .reg .pred %moec; {test} @%moec {all} }}"));
            }
        }
    }
    found
}

/// The guard of an instruction, and the instruction.
fn guarded(text: &str) -> Option<(&str, &str)> {
    let (guard, rest) = text.strip_prefix('@')?.split_once(char::is_whitespace)?;
    Some((guard, rest.trim()))
}

fn opposite(guard: &str) -> String {
    guard.strip_prefix('!').map_or_else(|| format!("!{guard}"), str::to_owned)
}

/// The parts of a `cp.async` with a length of its own: all before the sizes, and the sizes.
fn copy_length(text: &str) -> Option<(&str, [&str; 2])> {
    let (rest, length) = text.trim_end_matches(';').rsplit_once(',')?;
    let (head, whole) = rest.rsplit_once(',')?;
    let (whole, length) = (whole.trim(), length.trim());
    (length.starts_with('%') && whole.parse::<u32>().is_ok()).then_some((head, [whole, length]))
}

fn guard_mutants(lines: &[&str], at: usize, guard: &str, rest: &str, add: &mut impl FnMut(Kind, String, String)) {
    let when = |g: &str| format!("@{g} trap; @{guard} {rest}");
    let Some(target) = rest.strip_prefix("bra").map(|r| r.trim_start_matches(".uni").trim().trim_end_matches(';'))
    else {
        if accesses(rest) {
            add(Kind::Guard, rest.to_owned(), when(&opposite(guard)));
        }
        return;
    };
    let is_label = |l: &str| l.strip_suffix(':') == Some(target);
    let Some(end) = lines.iter().position(|l| is_label(l)) else { return };
    // A wait that tries again: the branch leaves the loop, or goes back to the try.
    let tries = lines[at.saturating_sub(3)..at].iter().any(|l| l.contains("mbarrier.try_wait"));
    if tries {
        let now = if end > at { rest.to_owned() } else { String::new() };
        let label = lines[..at].iter().rposition(|l| l.contains("mbarrier.try_wait"));
        add(Kind::MbarrierWait, now, label.map_or_else(String::new, |_| format!("trap; @{guard} {rest}")));
    } else if end > at {
        // The branch goes around accesses, or to them and past another branch.
        let around = lines[at + 1..end].iter().any(|l| accesses(guarded(l).map_or(l, |(_, r)| r)));
        if around {
            add(Kind::Guard, String::new(), when(guard));
        } else if lines[at + 1..end].iter().any(|l| l.starts_with("bra")) {
            add(Kind::Guard, rest.to_owned(), when(&opposite(guard)));
        }
    }
}

/// Whether an instruction accesses memory that threads share, or changes a barrier.
fn accesses(text: &str) -> bool {
    let op = text.split_whitespace().next().unwrap_or("");
    let memory =
        ["ld.global", "ld.shared", "ld.volatile", "st.global", "st.shared", "atom.", "red.", "cp.async", "mbarrier."];
    memory.iter().any(|m| op.starts_with(m)) && !op.contains("wait") && !op.contains("commit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_instruction_that_keeps_order_has_a_mutant() {
        let ptx = "
.visible .entry k(
.param .u64 a
)
{
	@%p1 bra 	$L__BB0_2;
	st.global.b32 	[%rd1], %r1;
$L__BB0_2:
	bar.sync 	0;
	cp.async.cg.shared.global [%r1], [%rd2], 16, %r3;
	cp.async.wait_group 	2;
	@!%p2 ld.global.b32 	%r2, [%rd1];
	ret;
}";
        let all = mutants(ptx);
        let kinds: Vec<Kind> = all.iter().map(|m| m.kind).collect();
        use Kind::{Barrier, CopyWait, Guard, ZeroFill};
        assert_eq!(kinds, [Guard, Barrier, ZeroFill, CopyWait, CopyWait, Guard]);
        assert_eq!(all[4].now, "cp.async.wait_group 3;");
        assert_eq!(all[5].now, "ld.global.b32 	%r2, [%rd1];");
        assert_eq!(all[5].probe, "@%p2 trap; @!%p2 ld.global.b32 	%r2, [%rd1];");
        assert!(all.iter().all(|m| m.entry == "k"));
        assert_eq!(all[1].apply(ptx).lines().count(), ptx.lines().count());
    }
}
