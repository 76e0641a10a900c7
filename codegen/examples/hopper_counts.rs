//! What the expert products of five layers do on Hopper, from 1 to 16384 tokens: `hopper_counts FOLDER` writes
//! `counts-hopper.json` and `counts-hopper.md` there.
//!
//! One block of every tile height is run on the interpreter, at two depths and two numbers of rows; counts are linear
//! in both, and are scaled to the layer's depth and to the tiles of one routing that is drawn with a fixed seed. So all
//! figures are counted on a sample of blocks and scaled by the grid; cycles are estimated from them.

use moec_abi::{DType, Expr};
use moec_codegen::{
    Target, gpu,
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    mlir::{Keep, Session},
};
use moec_ir::ops::{BinaryFn, UnaryFn};
use moec_sim::{Arg, Launch, MapType, Memory, Module, Options, Swizzle, TensorMapDesc};
use std::{collections::BTreeMap, fmt::Write as _};

struct Layer {
    name: &'static str,
    hidden: u64,
    inner: u64,
    experts: u64,
    top: u64,
    /// Inner width of the shared expert.
    shared: u64,
}

const LAYERS: [Layer; 5] = [
    Layer { name: "Mixtral-8x7B", hidden: 4096, inner: 14336, experts: 8, top: 2, shared: 0 },
    Layer { name: "Qwen3-30B-A3B", hidden: 2048, inner: 768, experts: 128, top: 8, shared: 0 },
    Layer { name: "DeepSeek-V3", hidden: 7168, inner: 2048, experts: 256, top: 8, shared: 2048 },
    Layer { name: "OLMoE", hidden: 2048, inner: 1024, experts: 64, top: 8, shared: 0 },
    Layer { name: "gpt-oss-120b as bf16", hidden: 2880, inner: 2880, experts: 128, top: 4, shared: 0 },
];
const TOKENS: [u64; 8] = [1, 4, 16, 64, 256, 1024, 4096, 16384];

/// What is counted: instructions, tensor operations, bytes of global memory, bytes of shared memory, bank conflicts.
type Counts = [f64; 5];
const NAMES: [&str; 5] = ["instructions", "tensor_flops", "global_bytes", "shared_bytes", "bank_conflicts"];

/// Multiprocessors, and what the device (memory, cache) and each of them do in a cycle of 1.755 GHz.
const MULTIPROCESSORS: f64 = 132.0;
const MEMORY: f64 = 2450.0;
const CACHE: f64 = 3130.0;
const TENSOR: f64 = 4096.0;
const SHARED: f64 = 128.0;
const ISSUE: f64 = 4.0;
const MICROSECOND: f64 = 1755.0;

fn up(k: u64, n: u64) -> Grouped {
    let gate = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
    Grouped {
        symbol: "up".to_owned(),
        experts: 1,
        rows: RowSource::Gathered,
        rows_per_token: 1,
        matrices: 2,
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

/// Runs one row tile and one column tile, alone in the launch.
fn run(session: &Session, spec: &Grouped, schedule: &gpu::Schedule, rows: u64) -> Counts {
    let compiled = session
        .compile(&Target::Sm90a, Keep::default(), |b| gpu::emit(b, spec, schedule, Target::Sm90a))
        .expect("compiles");
    let module = Module::parse(&String::from_utf8(compiled.code).expect("PTX is text")).expect("parses");
    let mut memory = Memory::new();
    let mut zeros = |bytes: u64| {
        let address = memory.alloc(bytes, 256);
        memory.write(address, &vec![0; bytes as usize]).expect("in bounds");
        address
    };
    let known = |e: &Expr| e.eval(rows).expect("small");
    let weights = schedule.weight_map(spec, 0);
    let args: Vec<Arg> = schedule
        .parameters(spec)
        .into_iter()
        .map(|parameter| match parameter {
            gpu::Parameter::Operand => Arg::U64(zeros(rows * spec.a_stride * 2)),
            gpu::Parameter::Weights => Arg::U64(zeros(weights.dims.iter().map(known).product::<u64>() * 2)),
            gpu::Parameter::WeightMap => Arg::TensorMap(TensorMapDesc {
                dtype: MapType::Bf16,
                base: zeros(weights.dims.iter().map(known).product::<u64>() * 2),
                dims: weights.dims.iter().map(known).collect(),
                strides: weights.strides.iter().map(known).collect(),
                box_dims: weights.box_dims.clone(),
                element_strides: Vec::new(),
                swizzle: Swizzle::B128,
            }),
            gpu::Parameter::Offsets => Arg::U64(zeros(8)),
            gpu::Parameter::Map => Arg::U64(zeros(rows * 4)),
            gpu::Parameter::Out => Arg::U64(zeros(rows * spec.out_stride * 2)),
            gpu::Parameter::Tokens => Arg::U64(rows),
            gpu::Parameter::Bias | gpu::Parameter::Scale => unreachable!("these products have neither"),
        })
        .collect();
    if let Some(offsets) = schedule.parameters(spec).iter().position(|p| *p == gpu::Parameter::Offsets)
        && let Arg::U64(address) = args[offsets]
    {
        memory.write(address + 4, &(rows as u32).to_le_bytes()).expect("in bounds");
    }
    let grid = schedule.grid(spec);
    let launch = Launch {
        entry: &spec.symbol,
        grid: grid.blocks.each_ref().map(|e| known(e) as u32),
        block: grid.threads,
        cluster: grid.cluster,
        dynamic_shared: grid.shared,
        args,
    };
    let options = Options { check: false, ..Options::default() };
    let c = moec_sim::launch(&module, &mut memory, &launch, &options).expect("launches").counts;
    [
        c.warp_instructions as f64,
        c.tensor_flops as f64,
        (c.global_bytes_read + c.global_bytes_written) as f64,
        (c.shared_bytes_read + c.shared_bytes_written) as f64,
        c.bank_conflicts() as f64,
    ]
}

/// Counts of one tile as a function of depth and rows: values at the corners.
struct Tile {
    depths: [f64; 2],
    rows: [f64; 2],
    corners: [[Counts; 2]; 2],
}

impl Tile {
    fn at(&self, depth: f64, rows: f64) -> Counts {
        let place = |[low, high]: [f64; 2], x: f64| if high > low { (x - low) / (high - low) } else { 0.0 };
        let (d, r) = (place(self.depths, depth), place(self.rows, rows));
        std::array::from_fn(|i| {
            let along = |k: usize| self.corners[k][0][i] * (1.0 - r) + self.corners[k][1][i] * r;
            (along(0) * (1.0 - d) + along(1) * d).max(0.0)
        })
    }
}

/// Tiles that were run, by product, kind of kernel and height.
struct Sample<'s> {
    session: &'s Session,
    tiles: BTreeMap<(String, String, u32), Tile>,
}

impl Sample<'_> {
    fn tile(
        &mut self,
        make: fn(u64, u64) -> Grouped,
        schedule: &gpu::Schedule,
        mode: &gpu::Mode,
        height: u32,
    ) -> &Tile {
        let matrices = make(64, 8).matrices as u64;
        let n = u64::from(mode.columns) / matrices;
        let key = (make(64, 8).symbol, format!("{:?}{:?}", schedule.kind, mode), height);
        self.tiles.entry(key).or_insert_with(|| {
            // Rounds of the kernel for few tokens are whole at these depths.
            let depths = [1024, 2048];
            let lower = mode.tiles.iter().map(|t| t.rows).filter(|r| *r < height).max().map_or(1, |r| r + 1);
            let rows = [lower, height];
            let alone = gpu::Schedule { modes: vec![gpu::Mode { limit: None, ..mode.clone() }], ..schedule.clone() };
            let corners = depths.map(|k| rows.map(|r| run(self.session, &make(k, n), &alone, u64::from(r))));
            Tile { depths: depths.map(|k| k as f64), rows: rows.map(f64::from), corners }
        })
    }

    /// A whole product: rows of each expert, packed columns and depth.
    fn product(&mut self, make: fn(u64, u64) -> Grouped, rows: &[u64], tokens: u64, layer: &Grouped) -> (Counts, f64) {
        let variants = gpu::variants(layer, Target::Sm90a);
        let variant = variants.iter().find(|v| (v.tokens[0]..=v.tokens[1]).contains(&tokens)).expect("every T");
        let launched = rows.iter().sum::<u64>();
        let mode = variant.schedule.modes.iter().find(|m| m.limit.is_none_or(|l| launched <= l)).expect("a mode");
        let most = u64::from(mode.rows());
        let mut heights: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
        for &r in rows.iter().filter(|r| **r > 0) {
            for first in (0..r).step_by(most as usize) {
                let count = (r - first).min(most);
                let height = mode.tiles.iter().map(|t| t.rows).find(|t| u64::from(*t) >= count).expect("the highest");
                let group = heights.entry(height).or_default();
                *group = (group.0 + 1.0, group.1 + count as f64);
            }
        }
        let columns = mode.column_tiles(layer) as f64;
        let (mut sum, mut tiles) = ([0.0; 5], 0.0);
        for (height, (count, all)) in heights {
            let one = self.tile(make, &variant.schedule, mode, height).at(layer.k as f64, all / count);
            for (s, c) in sum.iter_mut().zip(one) {
                *s += c * count * columns;
            }
            tiles += count * columns;
        }
        (sum, tiles)
    }
}

/// Rows of each expert when every token takes `top` experts at random.
fn routing(layer: &Layer, tokens: u64) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut rows = vec![0; layer.experts as usize];
    for _ in 0..tokens {
        let mut chosen = Vec::new();
        while chosen.len() < layer.top as usize {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let expert = ((state >> 33) % layer.experts) as usize;
            if !chosen.contains(&expert) {
                chosen.push(expert);
                rows[expert] += 1;
            }
        }
    }
    rows
}

fn main() {
    let folder = std::env::args().nth(1).expect("the folder to write to");
    let session = Session::new();
    let mut sample = Sample { session: &session, tiles: BTreeMap::new() };
    let mut text = String::from(
        "# What the expert products of a layer do on Hopper\n\n\
         Gate, up and down products in bf16 (router, sort and combine apart), uniform routing. Counted on the simulator\n\
         for a sample of thread blocks (one of each tile height, at two depths and two numbers of rows) and scaled by the\n\
         grid of one drawn routing; nothing here was measured on a device. `bytes` are those that kernels ask for,\n\
         `floor` are the weights of the experts hit and the rows in and out, `us` the least time of the unit that binds on an H200 (4.3 TB/s,\n\
         132 multiprocessors at 1.755 GHz), without latencies. Written by `cargo run -p moec-codegen --example hopper_counts tests`.\n\n\
         | layer | T | instructions | tensor Gflop | bytes MB | floor MB | bytes / floor | conflicts | us | bound by |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let mut rows_json = Vec::new();
    for layer in &LAYERS {
        for tokens in TOKENS {
            let rows = routing(layer, tokens);
            let hit = rows.iter().filter(|r| **r > 0).count() as f64;
            let wide = |spec: Grouped| Grouped { experts: layer.experts, rows_per_token: layer.top, ..spec };
            let specs = [wide(up(layer.hidden, layer.inner)), wide(down(layer.inner, layer.hidden))];
            let mut parts =
                vec![(sample.product(up, &rows, tokens, &specs[0])), (sample.product(down, &rows, tokens, &specs[1]))];
            let mut weights = hit * (3 * layer.hidden * layer.inner * 2) as f64;
            if layer.shared > 0 {
                let dense = |spec: Grouped| Grouped { rows: RowSource::Dense, ..spec };
                let (a, d) = (dense(up(layer.hidden, layer.shared)), dense(down(layer.shared, layer.hidden)));
                parts.push(sample.product(up, &[tokens], tokens, &a));
                parts.push(sample.product(down, &[tokens], tokens, &d));
                weights += (3 * layer.hidden * layer.shared * 2) as f64;
            }
            let routes = (tokens * layer.top) as f64;
            // Rows in once, the inner rows out and in, and the results of every route out.
            let floor =
                weights + (tokens * layer.hidden * 2) as f64 + routes * (4 * layer.inner + 2 * layer.hidden) as f64;
            let total: Counts = std::array::from_fn(|i| parts.iter().map(|p| p.0[i]).sum());
            let mut cycles = [("memory", 0.0), ("cache", 0.0), ("tensor", 0.0), ("shared", 0.0), ("issue", 0.0)];
            for (c, tiles) in &parts {
                let used = tiles.clamp(1.0, MULTIPROCESSORS);
                let all = [
                    c[2].min(floor) / MEMORY,
                    c[2] / CACHE,
                    c[1] / TENSOR / used,
                    c[3] / SHARED / used,
                    c[0] / ISSUE / used,
                ];
                for (sum, n) in cycles.iter_mut().zip(all) {
                    sum.1 += n;
                }
            }
            // Weights pass through memory once, however often tiles ask for them.
            cycles[0].1 = cycles[0].1.min(floor / MEMORY);
            let (limit, most) = cycles.into_iter().fold(("", 0.0), |m, c| if c.1 > m.1 { c } else { m });
            let _ = writeln!(
                text,
                "| {} | {tokens} | {:.3e} | {:.2} | {:.2} | {:.2} | {:.3} | {:.0} | {:.1} | {limit} |",
                layer.name,
                total[0],
                total[1] / 1e9,
                total[2] / 1e6,
                floor / 1e6,
                total[2] / floor,
                total[4],
                most / MICROSECOND,
            );
            let counts: Vec<String> = NAMES.iter().zip(total).map(|(n, v)| format!("\"{n}\": {v:.0}")).collect();
            let cycles: Vec<String> = cycles.iter().map(|(n, v)| format!("\"{n}\": {v:.0}")).collect();
            rows_json.push(format!(
                "  {{\"layer\": \"{}\", \"tokens\": {tokens}, \"how\": \"sampled blocks, scaled by the grid\", {}, \"floor_bytes\": {floor:.0}, \
                 \"cycles\": {{{}}}, \"limit\": \"{limit}\"}}",
                layer.name,
                counts.join(", "),
                cycles.join(", ")
            ));
            println!("{} {tokens}", layer.name);
        }
    }
    std::fs::write(format!("{folder}/counts-hopper.md"), text).expect("the folder is writable");
    std::fs::write(format!("{folder}/counts-hopper.json"), format!("[\n{}\n]\n", rows_json.join(",\n")))
        .expect("writable");
}
