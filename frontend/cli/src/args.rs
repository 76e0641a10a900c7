//! The command line: types for clap and nothing else.

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::{path::PathBuf, time::Duration};

/// Compiler for mixture-of-experts layers.
#[derive(Debug, Parser)]
#[command(
    name = "moec",
    version,
    about,
    max_term_width = 80,
    disable_help_subcommand = true,
    after_help = "Example: moec compile config.json -o out && moec run out --compare\n\
                  Exit codes: 0 done, 1 refused or different, 2 usage, 3 machine,\n            101 our bug, 130 interrupted."
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Flags of all commands.
    #[command(flatten)]
    pub global: Global,
}

/// Flags of all commands.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// Form of results and diagnostics: text, json; html for plans
    #[arg(long, global = true, value_enum, hide_possible_values = true, default_value_t = Format::Text, hide_default_value = true)]
    pub format: Format,
    /// Say nothing but results and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more: choices, counts
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Color in diagnostics: auto, always, never
    #[arg(
        hide_possible_values = true,long, global = true, value_enum, default_value_t = Color::Auto, hide_default_value = true, value_name = "WHEN")]
    pub color: Color,
}

/// Form of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs: one object, or one a line, with `"schema": 1`.
    Json,
    /// A page, for plans.
    Html,
}

/// When to use color.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compile the MoE layers of a model
    #[command(after_help = "Example: moec compile tests/models/olmoe-1b-7b/config.json -o out --target cpu,sm_90a")]
    Compile(Compile),
    /// Read and check a model, write nothing
    #[command(after_help = "Example: moec check tests/models/qwen3-30b-a3b/config.json")]
    Check(Check),
    /// Run reference cases through compiled kernels and compare
    #[command(after_help = "Example: moec verify tests/goldens/mixtral__f32_t17.safetensors")]
    Verify(Verify),
    /// Run one layer
    #[command(after_help = "Example: moec run tests/models/switch-base-8/config.json --input random:4 --compare")]
    Run(Run),
    /// Time layers
    #[command(after_help = "Example: moec bench tests/models/switch-base-8/config.json --tokens 1,16 --reps 3")]
    Bench(Bench),
    /// Find the best mapping of a model onto GPUs
    #[command(after_help = "Example: moec plan tests/models/mixtral-8x7b/config.json --gpus 64 --cluster dgx-h100")]
    Plan(Plan),
    /// Place experts on GPUs by their load
    #[command(after_help = "Example: echo '[[90,132,40,61]]' | moec place - --gpus 2 --replicas 6")]
    Place(Place),
    /// Show what is inside an artefact or a file
    #[command(after_help = "Example: moec inspect tests/goldens/mixtral__f32_t17.safetensors")]
    Inspect(Inspect),
    /// Run passes on IR text
    #[command(
        after_help = "Example: moec compile config.json --emit graph=layer.moe && moec opt layer.moe --pass fuse-gating"
    )]
    Opt(Opt),
    /// List targets, passes, ops, kinds of output, families or codes
    #[command(after_help = "Example: moec list targets")]
    List(List),
    /// Explain a code: cause, example, fix
    #[command(after_help = "Example: moec explain E0203")]
    Explain(Explain),
    /// Show what was found on this machine
    #[command(after_help = "Example: moec doctor")]
    Doctor,
    /// Write a completion script
    #[command(after_help = "Example: moec completions bash > moec.bash")]
    Completions(Completions),
}

/// What developers look at while compiling.
#[derive(Clone, Debug, Args)]
pub(crate) struct Developer {
    /// Optimisation level; every level makes the same code today
    #[arg(short = 'O', value_name = "0..3", default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub level: u8,
    /// IR around passes, to stderr: before=PASS, after=PASS, all, changed
    #[arg(long, value_name = "WHEN")]
    pub print_ir: Vec<String>,
    /// Keep the text of every stage, in numbered files
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = "moec-temps")]
    pub save_temps: Option<PathBuf>,
    /// Print the time of every stage
    #[arg(long)]
    pub timings: bool,
    /// Print what passes chose, and why
    #[arg(long)]
    pub remarks: bool,
}

/// `compile`.
#[derive(Debug, Args)]
pub(crate) struct Compile {
    /// config.json, its folder, a graph file, IR text, or - for stdin
    pub model: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Targets; see `moec list targets` [default: cpu and the GPU present, else cpu,sm_90a]
    #[arg(long, value_name = "T,..", value_delimiter = ',')]
    pub target: Vec<String>,
    /// Single outputs; see `moec list emit`; PATH - is stdout
    #[arg(long, value_name = "KIND[=PATH],..", value_delimiter = ',')]
    pub emit: Vec<String>,
    /// A layer of the model, or all
    #[arg(long, value_name = "N|all", default_value = "all")]
    pub layer: String,
    /// Results of the layer to keep, such as output,topk_indices, or all [default: output]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub outputs: Vec<String>,
    /// Leave PTX as it is, even when ptxas is there
    #[arg(long)]
    pub no_cubin: bool,
    /// What `bench --tune` measured on the GPU
    #[arg(long, value_name = "FILE")]
    pub tuned: Option<PathBuf>,
    /// How layers are spread.
    #[command(flatten)]
    pub spread: SpreadFiles,
    /// The rank of --plan to compile for
    #[arg(long, value_name = "N", default_value_t = 0, requires = "plan")]
    pub rank: u64,
    /// What developers look at.
    #[command(flatten)]
    pub developer: Developer,
}

/// How a layer is spread over ranks.
#[derive(Clone, Debug, Args)]
pub(crate) struct SpreadFiles {
    /// Spread over ranks as a plan says (`moec plan --format json`)
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Where experts lie on the ranks (`moec place --format json`)
    #[arg(long, value_name = "FILE")]
    pub placement: Option<PathBuf>,
}

/// `check`.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// config.json, its folder, a graph file, IR text, or - for stdin
    pub model: PathBuf,
}

/// `verify`.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Case files, or folders of them
    #[arg(required = true, value_name = "CASE")]
    pub cases: Vec<PathBuf>,
    /// cpu, sim or cuda[:N]
    #[arg(long, default_value = "cpu", value_name = "D")]
    pub device: String,
    /// Target of the kernels [default: this host; sm_90a on sim; the GPU's own on cuda]
    #[arg(long, value_name = "T")]
    pub target: Option<String>,
}

/// Where a layer runs, and on which weights.
#[derive(Clone, Debug, Args)]
pub(crate) struct Where {
    /// cpu, sim or cuda[:N]
    #[arg(long, default_value = "cpu", value_name = "D")]
    pub device: String,
    /// Threads of the CPU; 0 is all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: u32,
    /// Target to compile a MODEL for [default: best for the device]
    #[arg(long, value_name = "T")]
    pub target: Option<String>,
    /// Checkpoint (file or folder), or random:SEED
    #[arg(long, default_value = "random:1", value_name = "DIR|random:SEED")]
    pub weights: String,
    /// Layer [default: the first that is compiled]
    #[arg(long, value_name = "N")]
    pub layer: Option<u64>,
}

/// `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Folder that `compile` wrote, or a model
    #[arg(value_name = "ARTEFACT|MODEL")]
    pub what: PathBuf,
    /// Where and on what.
    #[command(flatten)]
    pub on: Where,
    /// safetensors file with the inputs, or random:TOKENS
    #[arg(long, default_value = "random:16", value_name = "FILE|random:TOKENS")]
    pub input: String,
    /// Write the outputs, as safetensors
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write the packed weights, as the C library binds them on this machine
    #[arg(long, value_name = "FILE")]
    pub save_weights: Option<PathBuf>,
    /// Compare with the reference interpreter
    #[arg(long)]
    pub compare: bool,
    /// How the layer is spread: all ranks run here, as threads.
    #[command(flatten)]
    pub spread: SpreadFiles,
}

/// `bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Folder that `compile` wrote, or a model
    #[arg(value_name = "ARTEFACT|MODEL")]
    pub what: PathBuf,
    /// Where and on what.
    #[command(flatten)]
    pub on: Where,
    /// Token counts
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,16,256")]
    pub tokens: Vec<u64>,
    /// uniform, zipf:S, all-to-one, or file:PATH (safetensors inputs)
    #[arg(long, default_value = "uniform")]
    pub routing: String,
    /// Launches to measure [default: as many as fit a second, at least 5]
    #[arg(long, value_name = "N")]
    pub reps: Option<u32>,
    /// Compare with other implementations: torch
    #[arg(long, value_name = "NAME", value_parser = ["torch"])]
    pub peers: Option<String>,
    /// Measure which schedules are fastest on this GPU, into FILE; a file that is there is gone on with
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "moec-tuned.json", conflicts_with = "peers")]
    pub tune: Option<PathBuf>,
    /// Time for --tune, such as 90s, 10m or 2h
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub budget: Duration,
    /// What `bench --tune` measured before
    #[arg(long, value_name = "FILE", conflicts_with = "tune")]
    pub tuned: Option<PathBuf>,
}

/// `plan`.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// config.json, its folder, or - for stdin
    #[arg(required_unless_present_any = ["groups", "print_cluster"])]
    pub model: Option<PathBuf>,
    /// GPUs of the job
    #[arg(long, value_name = "N", required_unless_present = "print_cluster")]
    pub gpus: Option<u64>,
    /// Preset or JSON file: dgx-a100, dgx-h100, dgx-h200, dgx-b200, gb200-nvl72, h800
    #[arg(long, default_value = "dgx-h100", value_name = "PRESET|FILE")]
    pub cluster: String,
    /// Sequence length; of the prompt for serving
    #[arg(long, default_value_t = 4096, value_name = "S")]
    pub seq: u64,
    /// Sequences per step (train), requests in flight (decode; 0 searches)
    #[arg(long, value_name = "B")]
    pub global_batch: Option<u64>,
    /// Tokens generated per request (decode)
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub generate: u64,
    /// What to optimise
    #[arg(long, default_value = "train", value_parser = ["train", "prefill", "decode"])]
    pub objective: String,
    /// Number of plans
    #[arg(long, default_value_t = 5, value_name = "K")]
    pub top: usize,
    /// Sizes to keep: tp=2,ep=8,..
    #[arg(long, value_name = "NAME=SIZE,..", default_value = "", hide_default_value = true)]
    pub fix: String,
    /// fsdp, fsdp+ep, tp+ep+dp, unfolded or folded
    #[arg(long, value_name = "NAME")]
    pub strategy: Option<String>,
    /// Number format of matrix products: bf16, fp8 or fp4
    #[arg(long, value_name = "P", default_value = "bf16", value_parser = ["bf16", "fp8", "fp4"])]
    pub precision: String,
    /// Largest time per output token or to the first token
    #[arg(long, value_name = "MS", allow_negative_numbers = true)]
    pub latency: Option<f64>,
    /// GPUs of a node (an NVLink domain) that may be used [default: those of the cluster]
    #[arg(long, value_name = "N")]
    pub gpus_per_node: Option<u64>,
    /// Memory of a GPU that may be used
    #[arg(long, value_name = "GIB", allow_negative_numbers = true)]
    pub memory: Option<f64>,
    /// Training release or serving backend of the calibration
    #[arg(long, default_value = "auto", value_name = "NAME")]
    pub software: String,
    /// Tokens per expert over the mean; without it nothing is dropped
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub capacity: Option<f64>,
    /// Spread of tokens over experts: usual (as measured), balanced, zipf:S, or file:LOADS
    #[arg(long, default_value = "usual", value_name = "R")]
    pub routing: String,
    /// Keep to one kind of recomputation: none, selective, full
    #[arg(long, value_name = "R", value_parser = ["none", "selective", "full"], hide_possible_values = true)]
    pub recompute: Option<String>,
    /// Keep training state so: none, optimizer (ZeRO-1), full (FSDP, ZeRO-3)
    #[arg(long, value_name = "S", value_parser = ["none", "optimizer", "full"], hide_possible_values = true)]
    pub sharding: Option<String>,
    /// Pipeline schedule: 1f1b (interleaved with virtual stages), zero-bubble, dualpipe
    #[arg(long, value_name = "S", default_value = "1f1b", value_parser = ["1f1b", "zero-bubble", "dualpipe"], hide_possible_values = true)]
    pub schedule: String,
    /// Share of the all-to-all that is hidden, 0 to 1 [default: that of the software]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub overlap: Option<f64>,
    /// Print the cluster as a file to edit
    #[arg(long)]
    pub print_cluster: bool,
    /// Print the rank groups of --fix, as JSON
    #[arg(long)]
    pub groups: bool,
    /// Order of ranks, fastest first
    #[arg(long, default_value = "tp-cp-ep-dp-pp", value_name = "ORDER")]
    pub order: String,
}

/// `place`.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Loads (JSON) or a trace (.jsonl, .safetensors), or - for JSON on stdin
    #[arg(value_name = "LOADS|TRACE")]
    pub input: PathBuf,
    /// GPUs
    #[arg(long, value_name = "N")]
    pub gpus: Option<usize>,
    /// Nodes
    #[arg(long, value_name = "M")]
    pub nodes: Option<usize>,
    /// Expert slots over all GPUs
    #[arg(long, value_name = "R")]
    pub replicas: Option<usize>,
    /// Expert groups that stay together on a node
    #[arg(long, value_name = "G")]
    pub expert_groups: Option<usize>,
    /// Method: eplb, balance, ilp, least-loaded, affinity, moetuner, ..
    #[arg(long, value_name = "NAME")]
    pub method: Option<String>,
    /// Experts, where a trace does not say it
    #[arg(long, value_name = "N")]
    pub experts: Option<usize>,
    /// Experts per GPU before spilling (least-loaded)
    #[arg(long, value_name = "N")]
    pub per_gpu: Option<usize>,
    /// Capacity factor (least-loaded)
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Imbalance below which nothing moves (least-loaded)
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub lambda: Option<f64>,
    /// Smallest chunk that moves (least-loaded)
    #[arg(long, value_name = "N")]
    pub min_tokens: Option<u64>,
    /// Limit of the integer solver
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub time_limit: Option<f64>,
    /// A placement in use: print the fewest copies that lead from it to the new one
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// Print measures of a trace instead of placing: locality, cache hits, affinity
    #[arg(long)]
    pub metrics: bool,
}

/// `inspect`.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Artefact folder, or a .safetensors, .moe, .ptx or model file
    #[arg(value_name = "ARTEFACT|FILE")]
    pub what: PathBuf,
}

/// `opt`.
#[derive(Debug, Args)]
pub(crate) struct Opt {
    /// IR text, a model, or - for stdin
    pub file: PathBuf,
    /// Passes in order; see `moec list passes` [default: all]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub pass: Vec<String>,
    /// IR around passes, to stderr: before=PASS, after=PASS, all, changed
    #[arg(long, value_name = "WHEN")]
    pub print_ir: Vec<String>,
    /// Print what passes chose, and why
    #[arg(long)]
    pub remarks: bool,
    /// File to write instead of stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `list`.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// What to list
    #[arg(value_enum)]
    pub what: Listed,
    /// With `families`: research architectures as graphs, in place of model types
    #[arg(long)]
    pub systems: bool,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Listed {
    /// Targets, and which of them run here.
    Targets,
    /// Passes in order.
    Passes,
    /// Operations of the IR.
    Ops,
    /// Kinds of output of `compile --emit`.
    Emit,
    /// Model types.
    Families,
    /// Codes of findings.
    Codes,
}

/// `explain`.
#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// A code, such as E0203
    pub code: String,
}

/// `completions`.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// Shell
    pub shell: Shell,
}

/// A time such as `90s`, `10m` or `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let seconds = match text.as_bytes().last() {
        Some(b's') => 1,
        Some(b'm') => 60,
        Some(b'h') => 3600,
        _ => 0,
    };
    let number = text.get(..text.len().saturating_sub(1)).and_then(|n| n.parse::<u32>().ok());
    match (number, seconds) {
        (Some(n), 1..) => Ok(Duration::from_secs(u64::from(n) * seconds)),
        (_, _) => Err("a number with s, m or h is due, such as 10m".to_owned()),
    }
}
