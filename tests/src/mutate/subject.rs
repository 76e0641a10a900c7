//! What is mutated: a compiled layer, or one kernel, with the shapes that it runs on.

mod layer;
mod product;

use super::{Mutant, mutants};
use moec_sim::{FindingKind, Lanes};

/// One run of a subject.
#[derive(Clone, Debug)]
pub struct Run {
    /// Number of tokens.
    pub tokens: u64,
    /// How rows are spread over experts, where the subject does not route by itself.
    pub spread: Spread,
    /// Seed of the simulator.
    pub seed: u64,
    /// The result of the kernel as it was emitted.
    pub expected: Vec<u8>,
    /// Instructions after which a mutant is given up.
    pub limit: u64,
}

/// How rows are spread over experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Half to the first expert, half of the rest to the second, ..
    Skewed,
    /// All to the last expert.
    Last,
    /// To none: the launch has no rows.
    Nobody,
}

/// Why a run gave no result.
#[derive(Clone, Debug)]
pub struct Fault {
    /// In words.
    pub what: String,
    /// Kinds of the findings; none for an error.
    pub kinds: Vec<FindingKind>,
}

impl Fault {
    fn of(findings: &[moec_sim::Finding], error: impl FnOnce() -> String) -> Self {
        let mut kinds: Vec<FindingKind> = findings.iter().map(|f| f.kind).collect();
        kinds.sort();
        kinds.dedup();
        let what = kinds.first().map_or_else(error, |kind| kind.name().to_owned());
        Self { what, kinds }
    }
}

/// The result of a run, and its instructions.
type Outcome = Result<(Vec<u8>, u64), Fault>;

trait Program: Send + Sync {
    fn run(&self, ptx: &str, tokens: u64, spread: Spread, options: moec_sim::Options) -> Outcome;

    /// Blocks of the largest cluster of a launch.
    fn cluster(&self) -> u32;

    /// Whether a kernel, and all launches up to the next one that waits for everything, use no memory that the launch
    /// before it uses.
    fn stands_alone(&self, entry: &str, tokens: u64) -> bool;
}

/// Emitted PTX and how to run it.
pub struct Subject {
    name: String,
    ptx: String,
    program: Box<dyn Program>,
    runs: Vec<Run>,
    /// Kernels that are mutated, by their names.
    mutated: fn(&str) -> bool,
}

impl Subject {
    fn new(name: &str, ptx: String, program: Box<dyn Program>, shapes: &[(u64, Spread)], seeds: u64) -> Self {
        let mut subject = Self { name: name.to_owned(), ptx, program, runs: Vec::new(), mutated: |_| true };
        for &(tokens, spread) in shapes {
            for seed in 0..seeds {
                let limit = moec_sim::Options::default().max_instructions;
                let mut run = Run { tokens, spread, seed, expected: Vec::new(), limit };
                let (expected, instructions) = subject
                    .outcome(&subject.ptx, &run)
                    .unwrap_or_else(|f| panic!("{name} with {tokens} tokens is not correct: {}", f.what));
                run.expected = expected;
                run.limit = 4 * instructions + 10_000;
                subject.runs.push(run);
            }
        }
        subject
    }

    /// Name in the table.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The PTX as emitted.
    #[must_use]
    pub fn ptx(&self) -> &str {
        &self.ptx
    }

    /// Every mutant of the kernels that this subject is about, in the order of their lines.
    #[must_use]
    pub fn mutants(&self) -> Vec<Mutant> {
        let mut all = mutants(&self.ptx);
        all.retain(|m| (self.mutated)(&m.entry));
        all
    }

    /// All runs, cheap ones first.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    fn outcome(&self, ptx: &str, run: &Run) -> Outcome {
        let (seed, max_instructions) = (run.seed, run.limit);
        let options = moec_sim::Options { seed, max_instructions, first: true, ..moec_sim::Options::default() };
        self.program.run(ptx, run.tokens, run.spread, options)
    }

    /// Whether no kernel runs in clusters of more than one block.
    #[must_use]
    pub fn blocks_are_alone(&self) -> bool {
        self.program.cluster() == 1
    }

    /// Whether a kernel, and all launches up to the next one that waits for everything, use no memory that the launch
    /// before it uses.
    #[must_use]
    pub fn stands_alone(&self, entry: &str) -> bool {
        self.runs.iter().all(|run| self.program.stands_alone(entry, run.tokens))
    }

    /// Whether other PTX gives the right result with every shape, the lanes of a warp going as told. Nothing is checked
    /// but the result.
    #[must_use]
    pub fn gives_the_same(&self, ptx: &str, lanes: Lanes) -> bool {
        self.runs.iter().filter(|run| run.seed == 0).all(|run| {
            // Of lanes that go apart, each instruction of a warp is up to thirty-two.
            let max_instructions = run.limit.saturating_mul(40);
            let options = moec_sim::Options { seed: 0, check: false, max_instructions, lanes, first: true };
            self.program.run(ptx, run.tokens, run.spread, options).is_ok_and(|(out, _)| out == run.expected)
        })
    }

    /// Runs other PTX in place of the emitted one.
    ///
    /// # Errors
    /// Findings of the simulator, or its refusal.
    pub fn run(&self, ptx: &str, run: &Run) -> Result<Vec<u8>, Fault> {
        self.outcome(ptx, run).map(|(out, _)| out)
    }
}

/// Every subject: whole layers for the kernels around the products (gates of several forms, the plan, the weighted
/// sum), and products in the form for each target. Only those whose name contains `filter`.
#[must_use]
pub fn subjects(seeds: u64, filter: &str) -> Vec<Subject> {
    let mut all = layer::subjects(seeds, filter);
    all.extend(product::subjects(seeds, filter));
    all
}
