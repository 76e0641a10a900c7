//! What the expert products of layers do on Hopper, from 1 to 16384 tokens.
//!
//! One tile of every height is run on the simulator, at two depths and two numbers of rows, with all its columns and with
//! those that the last tile of a row has. Counts are linear in depth and rows, and are scaled to the layer's depth and to
//! the tiles of one drawn routing: all figures are counted on a sample of thread blocks and scaled by the grid. Times are
//! estimated from them, never measured.

use moec::{Target, estimate};
use moec_abi::{DType, Expr};
use moec_codegen::{
    codes::{Codes, Number},
    gpu,
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    mlir::{Keep, Session},
};
use moec_ir::ops::{BinaryFn, UnaryFn};
use moec_sim::{Arg, Counts, Launch, MapType, Memory, Module, Options, Swizzle, TensorMapDesc};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A layer by its widths.
pub struct Layer {
    /// Name of the model.
    pub name: &'static str,
    hidden: u64,
    inner: u64,
    experts: u64,
    top: u64,
    /// Inner width of the shared expert.
    shared: u64,
    /// How weights are stored, if not in bf16.
    codes: Option<Codes>,
}

impl Layer {
    /// Bytes of a row of weights over `k` inputs.
    fn row_bytes(&self, k: u64) -> u64 {
        self.codes.map_or(2 * k, |codes| k * codes.bits / 8 + codes.groups(k) * codes.scale.bytes())
    }
}

const FP8: Codes = Codes { bits: 8, number: Number::E4m3, group: 128, zero: false, scale: DType::F32 };
const MXFP4: Codes = Codes { bits: 4, number: Number::E2m1, group: 32, zero: false, scale: DType::U8 };

/// The layers of the table.
pub const LAYERS: [Layer; 7] = [
    Layer { name: "Mixtral-8x7B", hidden: 4096, inner: 14336, experts: 8, top: 2, shared: 0, codes: None },
    Layer { name: "Qwen3-30B-A3B", hidden: 2048, inner: 768, experts: 128, top: 8, shared: 0, codes: None },
    Layer { name: "DeepSeek-V3 as bf16", hidden: 7168, inner: 2048, experts: 256, top: 8, shared: 2048, codes: None },
    Layer { name: "DeepSeek-V3", hidden: 7168, inner: 2048, experts: 256, top: 8, shared: 2048, codes: Some(FP8) },
    Layer { name: "OLMoE", hidden: 2048, inner: 1024, experts: 64, top: 8, shared: 0, codes: None },
    Layer { name: "gpt-oss-120b as bf16", hidden: 2880, inner: 2880, experts: 128, top: 4, shared: 0, codes: None },
    Layer { name: "gpt-oss-120b", hidden: 2880, inner: 2880, experts: 128, top: 4, shared: 0, codes: Some(MXFP4) },
];

/// The numbers of tokens of the table.
pub const TOKENS: [u64; 8] = [1, 4, 16, 64, 256, 1024, 4096, 16384];

/// How tokens choose experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// All experts alike.
    Uniform,
    /// Expert `i` as often as `1 / (i + 1)`.
    Zipf,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Name of the model.
    pub layer: String,
    /// Tokens of the launch.
    pub tokens: u64,
    /// How they choose.
    pub choice: Choice,
    /// Experts that some token chose.
    pub experts_hit: u64,
    /// Instructions of warps.
    pub instructions: u64,
    /// Operations of the tensor cores.
    pub tensor_flops: u64,
    /// Bytes that kernels ask for: through the second-level cache.
    pub global_bytes: u64,
    /// Bytes that have to pass: weights of the experts hit, rows in, inner rows out and in, results of all routes.
    pub floor_bytes: u64,
    /// Passes over the banks of shared memory that conflicts cost.
    pub bank_conflicts: u64,
    /// The time of the unit that binds, kernel after kernel, in microseconds.
    pub microseconds: f64,
    /// That unit, of the kernel that takes longest.
    pub limit: String,
}

/// Counts that are scaled, as numbers.
type Scaled = [f64; 7];

fn numbers(c: &Counts) -> Scaled {
    [
        c.warp_instructions,
        c.tensor_flops,
        c.global_bytes_read,
        c.global_bytes_written,
        c.shared_bytes_read + c.shared_bytes_written,
        c.shared_wavefronts,
        c.shared_wavefronts_ideal,
    ]
    .map(|n| n as f64)
}

fn counts(scaled: Scaled, blocks: f64) -> Counts {
    let [instructions, tensor, read, written, shared, wavefronts, ideal] = scaled.map(|n| n.round() as u64);
    let mut c = Counts::default();
    (c.warp_instructions, c.tensor_flops, c.blocks) = (instructions, tensor, blocks as u64);
    (c.global_bytes_read, c.global_bytes_written) = (read, written);
    (c.shared_bytes_read, c.shared_wavefronts, c.shared_wavefronts_ideal) = (shared, wavefronts, ideal);
    c
}

fn up(k: u64, n: u64) -> Grouped {
    let gate = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
    Grouped {
        symbol: "up".to_owned(),
        experts: 1,
        rows: RowSource::Gathered,
        rows_per_token: 1,
        matrices: 2,
        first: 0,
        given: Vec::new(),
        codes: None,
        k,
        n,
        a_stride: k,
        out_stride: n,
        a: DType::Bf16,
        w: DType::Bf16,
        out: DType::Bf16,
        bias: false,
        scale: RowScale::None,
        epilogue: Epilogue::Binary(BinaryFn::Mul, Box::new(gate), Box::new(Epilogue::Sum(1))),
    }
}

fn down(k: u64, n: u64) -> Grouped {
    let (rows, epilogue) = (RowSource::Sorted, Epilogue::Sum(0));
    Grouped { symbol: "down".to_owned(), rows, matrices: 1, epilogue, ..up(k, n) }
}

/// Runs one row tile and one column tile of `rows` rows, alone in the launch.
fn run(module: &Module, spec: &Grouped, schedule: &gpu::Schedule, rows: u64) -> Scaled {
    let mut memory = Memory::new();
    let mut zeros = |bytes: u64| {
        let address = memory.alloc(bytes, 256);
        memory.write(address, &vec![0; bytes as usize]).expect("in bounds");
        address
    };
    let known = |e: &Expr| e.eval(rows).expect("small");
    let map = schedule.weight_map(spec, 0);
    let weights = map.dims.iter().map(known).product::<u64>() * map.dtype.bytes();
    let scales = 4 * spec.n.next_multiple_of(8) * spec.matrices as u64 * spec.codes.map_or(0, |c| c.groups(spec.k));
    let offsets = zeros(8);
    let args = schedule.parameters(spec).into_iter().map(|parameter| match parameter {
        gpu::Parameter::Operand => Arg::U64(zeros(rows * spec.a_stride * 2)),
        gpu::Parameter::Weights => Arg::U64(zeros(weights)),
        gpu::Parameter::WeightMap => Arg::TensorMap(TensorMapDesc {
            dtype: if map.dtype == DType::I32 { MapType::S32 } else { MapType::Bf16 },
            base: zeros(weights),
            dims: map.dims.iter().map(known).collect(),
            strides: map.strides.iter().map(known).collect(),
            box_dims: map.box_dims.clone(),
            element_strides: Vec::new(),
            swizzle: if map.swizzle == 0 { Swizzle::None } else { Swizzle::B128 },
        }),
        gpu::Parameter::Offsets => Arg::U64(offsets),
        gpu::Parameter::Map => Arg::U64(zeros(rows * 4)),
        gpu::Parameter::Scales => Arg::U64(zeros(scales)),
        gpu::Parameter::Out => Arg::U64(zeros(rows * spec.out_stride * 2)),
        gpu::Parameter::Tokens => Arg::U64(rows),
        gpu::Parameter::Bias
        | gpu::Parameter::Scale
        | gpu::Parameter::Zeros
        | gpu::Parameter::Given(_)
        | gpu::Parameter::GivenMap(_) => unreachable!("these products have none"),
    });
    let args = args.collect();
    memory.write(offsets + 4, &(rows as u32).to_le_bytes()).expect("in bounds");
    let grid = schedule.grid(spec);
    let launch = Launch {
        entry: &spec.symbol,
        grid: grid.blocks.each_ref().map(|e| known(e) as u32),
        block: grid.threads,
        cluster: grid.cluster,
        dynamic_shared: grid.shared,
        args,
        dependent: false,
    };
    let options = Options { check: false, ..Options::default() };
    numbers(&moec_sim::launch(module, &mut memory, &launch, &options).expect("launches").counts)
}

/// Heights of the tiles of a mode, by rows of all blocks that share them.
fn heights(mode: &gpu::Mode) -> impl Iterator<Item = u32> {
    mode.tiles.iter().map(|tile| tile.rows * mode.share)
}

/// Counts of one tile as a function of depth and rows, by its corners.
struct Tile {
    depths: [f64; 2],
    rows: [f64; 2],
    corners: [[Scaled; 2]; 2],
}

impl Tile {
    fn at(&self, depth: f64, rows: f64) -> Scaled {
        let place = |[low, high]: [f64; 2], x: f64| if high > low { (x - low) / (high - low) } else { 0.0 };
        let (d, r) = (place(self.depths, depth), place(self.rows, rows));
        let mix = |[low, high]: [f64; 2], x: f64| low * (1.0 - x) + high * x;
        std::array::from_fn(|i| mix(self.corners.map(|c| mix(c.map(|s| s[i]), r)), d).max(0.0))
    }
}

/// The tiles that were run, by product, kind of kernel, columns and height.
#[derive(Default)]
pub struct Sample {
    session: Session,
    tiles: BTreeMap<(String, String, u64, u32), Tile>,
}

impl Sample {
    /// A tile of `n` columns of the result.
    fn tile(
        &mut self,
        make: fn(u64, u64) -> Grouped,
        codes: Option<Codes>,
        schedule: &gpu::Schedule,
        (mode, height): (&gpu::Mode, u32),
        n: u64,
    ) -> &Tile {
        let key = (make(64, 8).symbol, format!("{:?} {codes:?} {mode:?}", schedule.kind), n, height);
        let session = &self.session;
        self.tiles.entry(key).or_insert_with(|| {
            // Rounds of the kernel for few tokens are whole at these depths.
            let round = u64::from(schedule.warps * mode.tiles[0].depth * mode.tiles[0].stages);
            let round = if schedule.kind == gpu::Kind::Decode { round } else { 1024 };
            let depths = [1, 2].map(|times| times * 1024_u64.next_multiple_of(round));
            let lower = heights(mode).filter(|r| *r < height).max().map_or(1, |r| r + 1);
            let rows = [lower, height];
            let alone = gpu::Schedule { modes: vec![gpu::Mode { limit: None, ..mode.clone() }], ..schedule.clone() };
            let corners = depths.map(|k| {
                let spec = Grouped { codes, ..make(k, n) };
                let built = session.compile(&Target::Sm90a, Keep::default(), |b| {
                    gpu::emit(b, &spec, &alone, Target::Sm90a);
                });
                let ptx = String::from_utf8(built.expect("compiles").code).expect("PTX is text");
                let module = Module::parse(&ptx).expect("parses");
                rows.map(|r| run(&module, &spec, &alone, u64::from(r)))
            });
            Tile { depths: depths.map(|k| k as f64), rows: rows.map(f64::from), corners }
        })
    }

    /// Counts of a whole product, by the rows of each expert.
    fn product(&mut self, make: fn(u64, u64) -> Grouped, rows: &[u64], tokens: u64, layer: &Grouped) -> Counts {
        let variants = gpu::variants(layer, Target::Sm90a);
        let variant = variants.iter().find(|v| (v.tokens[0]..=v.tokens[1]).contains(&tokens)).expect("every T");
        let modes = &variant.schedule.modes;
        let launched = rows.iter().sum::<u64>();
        let mode = modes.iter().find(|m| m.limit.is_none_or(|l| launched <= l)).expect("a mode");
        let most = u64::from(mode.rows());
        let mut drawn: BTreeMap<u32, [u64; 2]> = BTreeMap::new();
        for r in rows {
            for first in (0..*r).step_by(most as usize) {
                let count = (r - first).min(most);
                let height = heights(mode).find(|t| u64::from(*t) >= count).expect("the highest");
                let [tiles, all] = drawn.entry(height).or_default();
                (*tiles, *all) = (*tiles + 1, *all + count);
            }
        }
        // Full tiles, and the last one if it is not full.
        let width = u64::from(mode.columns) / layer.matrices as u64;
        let columns = [(layer.n / width, width), (1, layer.n % width)].into_iter().filter(|(_, n)| *n > 0);
        let (mut sum, mut blocks) = (Scaled::default(), 0.0);
        for (count, n) in columns {
            for (height, [tiles, all]) in &drawn {
                let (rows, tiles) = (*all as f64 / *tiles as f64, (*tiles * count) as f64);
                let tile = self.tile(make, layer.codes, &variant.schedule, (mode, *height), n);
                sum.iter_mut().zip(tile.at(layer.k as f64, rows)).for_each(|(s, c)| *s += c * tiles);
                blocks += tiles * f64::from(mode.share);
            }
        }
        counts(sum, blocks)
    }

    /// One row of the table.
    pub fn cell(&mut self, layer: &Layer, tokens: u64, choice: Choice) -> Cell {
        let rows = routing(layer, tokens, choice);
        let hit = rows.iter().filter(|r| **r > 0).count() as u64;
        let wide =
            |spec: Grouped| Grouped { experts: layer.experts, rows_per_token: layer.top, codes: layer.codes, ..spec };
        let dense = |spec: Grouped| Grouped { rows: RowSource::Dense, codes: layer.codes, ..spec };
        let mut parts = vec![
            self.product(up, &rows, tokens, &wide(up(layer.hidden, layer.inner))),
            self.product(down, &rows, tokens, &wide(down(layer.inner, layer.hidden))),
        ];
        if layer.shared > 0 {
            parts.push(self.product(up, &[tokens], tokens, &dense(up(layer.hidden, layer.shared))));
            parts.push(self.product(down, &[tokens], tokens, &dense(down(layer.shared, layer.hidden))));
        }
        let network = |inner| 2 * inner * layer.row_bytes(layer.hidden) + layer.hidden * layer.row_bytes(inner);
        let shared_network = if layer.shared > 0 { network(layer.shared) } else { 0 };
        let weights = hit * network(layer.inner) + shared_network;
        let shared = if layer.shared > 0 { tokens * (4 * layer.shared + 2 * layer.hidden) } else { 0 };
        let routes = tokens * layer.top * (4 * layer.inner + 2 * layer.hidden);
        let floor = weights + tokens * layer.hidden * 2 + routes + shared;
        let bytes = |c: &Counts| c.global_bytes_read + c.global_bytes_written;
        let total: u64 = parts.iter().map(bytes).sum();
        let (mut microseconds, mut longest) = (0.0, (0.0, ""));
        for part in &parts {
            // The part of the floor that this kernel has to move.
            let footprint = floor as f64 * bytes(part) as f64 / total as f64;
            let estimate = estimate::estimate(part, footprint as u64, Target::Sm90a).expect("a GPU");
            microseconds += estimate.microseconds;
            if estimate.microseconds > longest.0 {
                longest = (estimate.microseconds, estimate.limit().0.name());
            }
        }
        let sum = |of: fn(&Counts) -> u64| parts.iter().map(of).sum();
        Cell {
            layer: layer.name.to_owned(),
            tokens,
            choice,
            experts_hit: hit,
            instructions: sum(|c| c.warp_instructions),
            tensor_flops: sum(|c| c.tensor_flops),
            global_bytes: total,
            floor_bytes: floor,
            bank_conflicts: sum(Counts::bank_conflicts),
            microseconds: (microseconds * 10.0).round() / 10.0,
            limit: longest.1.to_owned(),
        }
    }
}

/// Rows of each expert.
fn routing(layer: &Layer, tokens: u64, choice: Choice) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let weight = |expert: u64| match choice {
        Choice::Uniform => 1.0,
        Choice::Zipf => 1.0 / (expert + 1) as f64,
    };
    let all: f64 = (0..layer.experts).map(weight).sum();
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut left = (state >> 11) as f64 / (1_u64 << 53) as f64 * all;
        (0..layer.experts).find(|e| {
            left -= weight(*e);
            left < 0.0
        })
    };
    let mut rows = vec![0; layer.experts as usize];
    for _ in 0..tokens {
        let mut chosen = Vec::new();
        while chosen.len() < layer.top as usize {
            let expert = draw().unwrap_or(layer.experts - 1);
            if !chosen.contains(&expert) {
                chosen.push(expert);
                rows[expert as usize] += 1;
            }
        }
    }
    rows
}
