//! Grouped products in one mode alone.

use super::{Fault, Outcome, Program, Spread, Subject};
use moec_abi::{DType, Expr};
use moec_codegen::{
    Target, gpu,
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    mlir::{Keep, Session},
};
use moec_ir::ops::{BinaryFn, UnaryFn};
use moec_sim::{Arg, Launch, MapType, Memory, Module, Swizzle, TensorMapDesc};

struct Product {
    spec: Grouped,
    schedule: gpu::Schedule,
}

/// Gate and up, k and n beside every tile.
fn up(dtype: DType, k: u64) -> Grouped {
    let gate = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
    Grouped {
        symbol: "up".to_owned(),
        experts: 5,
        rows: RowSource::Gathered,
        rows_per_token: 2,
        matrices: 2,
        first: 0,
        given: Vec::new(),
        codes: None,
        k,
        n: 72,
        a_stride: k,
        out_stride: 72,
        a: dtype,
        w: dtype,
        out: dtype,
        bias: false,
        scale: RowScale::None,
        epilogue: Epilogue::Binary(BinaryFn::Mul, Box::new(gate), Box::new(Epilogue::Sum(1))),
    }
}

fn down(dtype: DType, k: u64) -> Grouped {
    Grouped {
        symbol: "down".to_owned(),
        rows: RowSource::Sorted,
        matrices: 1,
        n: 136,
        out_stride: 136,
        scale: RowScale::Output,
        epilogue: Epilogue::Sum(0),
        ..up(dtype, k)
    }
}

pub(super) fn subjects(seeds: u64, filter: &str) -> Vec<Subject> {
    let mut all = Vec::new();
    for spec in [up(DType::F32, 136), down(DType::F32, 136)] {
        all.extend(modes(&spec, &gpu::schedule(&spec, Target::Sm80, 0), "simt", Target::Sm80, seeds, filter));
    }
    for spec in [up(DType::Bf16, 584), down(DType::Bf16, 584)] {
        all.extend(modes(&spec, &gpu::schedule(&spec, Target::Sm80, 0), "mma", Target::Sm80, seeds, filter));
        let hopper = Target::Sm90a;
        if let Some((schedule, _)) = gpu::decode(&spec, hopper) {
            all.extend(modes(&spec, &schedule, "decode", hopper, seeds, filter));
        }
        if let Some(schedule) = gpu::specialised(&spec, hopper) {
            // So few blocks walk from tile to tile.
            let schedule = gpu::Schedule { walk: Some(5), ..schedule };
            all.extend(modes(&spec, &schedule, "wgmma", hopper, seeds, filter));
        }
    }
    all
}

/// A product in its first and in its last mode.
fn modes(
    spec: &Grouped,
    schedule: &gpu::Schedule,
    name: &str,
    target: Target,
    seeds: u64,
    filter: &str,
) -> Vec<Subject> {
    let shapes = [(1, Spread::Skewed), (19, Spread::Skewed), (67, Spread::Last)];
    let alone = |mode: &gpu::Mode| {
        // Modes differ in columns, or else in the height of their tiles.
        let same = schedule.modes.iter().filter(|m| m.columns == mode.columns).count() > 1;
        let height = if same { format!("x{}", mode.rows()) } else { String::new() };
        let name = format!("{} {name} x{}{height} {}", spec.symbol, mode.columns, target.name());
        if !name.contains(filter) {
            return None;
        }
        let modes = vec![gpu::Mode { limit: None, ..mode.clone() }];
        let schedule = gpu::Schedule { modes, ..schedule.clone() };
        let compiled = Session::new()
            .compile(&target, Keep::default(), |b| gpu::emit(b, spec, &schedule, target))
            .expect("products compile");
        let ptx = String::from_utf8(compiled.code).expect("PTX is text");
        Some(Subject::new(&name, ptx, Box::new(Product { spec: spec.clone(), schedule }), &shapes, seeds))
    };
    let last = schedule.modes.len().saturating_sub(1);
    schedule.modes.iter().enumerate().filter(|(i, _)| *i == 0 || *i == last).filter_map(|(_, m)| alone(m)).collect()
}

/// Numbers in `(-1, 1)` with a fixed sequence.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// So many elements of this type.
    pub(super) fn bytes(&mut self, dtype: DType, count: usize) -> Vec<u8> {
        if dtype == DType::Bf16 {
            return (0..count).flat_map(|_| half::bf16::from_f32(self.next()).to_le_bytes()).collect();
        }
        assert_eq!(dtype, DType::F32, "inputs are bf16 or f32");
        (0..count).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

impl Product {
    fn rows(&self, tokens: u64) -> u64 {
        tokens * self.spec.rows_per_token
    }

    fn offsets(&self, tokens: u64, spread: Spread) -> Vec<u32> {
        let mut left = self.rows(tokens);
        let mut offsets = vec![0];
        for e in 0..self.spec.experts {
            let last = e + 1 == self.spec.experts;
            let count = match spread {
                Spread::Skewed if !last => left.div_ceil(2),
                Spread::Last if !last => 0,
                Spread::Skewed | Spread::Last => left,
            };
            left -= count;
            offsets.push(u32::try_from(self.rows(tokens) - left).expect("few rows"));
        }
        offsets
    }

    /// Packed weights: padding is zero, as the runtime leaves it.
    fn weights(&self, numbers: &mut Numbers) -> Vec<u8> {
        let spec = &self.spec;
        let size = spec.w.bytes();
        let columns = spec.k.next_multiple_of(128 / size);
        let matrices = spec.matrices as u64;
        let rows = spec.n.next_multiple_of(8) * matrices;
        let mut out = Vec::new();
        for row in 0..spec.experts * rows {
            let row = row % rows;
            let exists = row / 8 / matrices * 8 + row % 8 < spec.n;
            let used = if exists { spec.k } else { 0 };
            out.extend(numbers.bytes(spec.w, used as usize));
            out.resize(out.len() + ((columns - used) * size) as usize, 0);
        }
        out
    }
}

impl Program for Product {
    fn run(&self, ptx: &str, tokens: u64, spread: Spread, options: moec_sim::Options) -> Outcome {
        let error = |e: moec_sim::Error| Fault::of(&[], || e.to_string());
        let module = Module::parse(ptx).map_err(error)?;
        let (spec, schedule) = (&self.spec, &self.schedule);
        let mut memory = Memory::new();
        let mut numbers = Numbers(tokens);
        let rows = self.rows(tokens);
        let operand_rows = if spec.rows == RowSource::Gathered { tokens } else { rows };
        let words = |v: Vec<u32>| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let mut put = |bytes: &[u8]| {
            let address = memory.alloc(bytes.len() as u64, 256);
            memory.write(address, bytes).map(|()| address)
        };
        let mut args = Vec::new();
        let mut out = None;
        for parameter in schedule.parameters(spec) {
            args.push(match parameter {
                gpu::Parameter::Operand => {
                    let elements = operand_rows * spec.a_stride;
                    Arg::U64(put(&numbers.bytes(spec.a, elements as usize)).map_err(error)?)
                }
                gpu::Parameter::Weights => Arg::U64(put(&self.weights(&mut numbers)).map_err(error)?),
                gpu::Parameter::WeightMap => {
                    let base = put(&self.weights(&mut numbers)).map_err(error)?;
                    Arg::TensorMap(tensor_map(&schedule.weight_map(spec, 0), base))
                }
                gpu::Parameter::Scales
                | gpu::Parameter::Zeros
                | gpu::Parameter::Bias
                | gpu::Parameter::Given(_)
                | gpu::Parameter::GivenMap(_) => unreachable!("these products have neither codes nor biases"),
                gpu::Parameter::Offsets => Arg::U64(put(&words(self.offsets(tokens, spread))).map_err(error)?),
                gpu::Parameter::Map => {
                    let map = (0..rows).map(|r| u32::try_from(r * 7 % tokens).expect("few tokens")).collect();
                    Arg::U64(put(&words(map)).map_err(error)?)
                }
                gpu::Parameter::Scale => Arg::U64(put(&numbers.bytes(DType::F32, rows as usize)).map_err(error)?),
                gpu::Parameter::Out => {
                    out = Some(args.len());
                    Arg::U64(0)
                }
                gpu::Parameter::Tokens => Arg::U64(tokens),
            });
        }
        let bytes = rows * spec.out_stride * spec.out.bytes();
        let result = memory.alloc(bytes, 256);
        args[out.expect("a product has a result")] = Arg::U64(result);
        let grid = schedule.grid(spec);
        let launch = Launch {
            entry: &spec.symbol,
            grid: grid.blocks.each_ref().map(|e| u32::try_from(known(&e.clone(), tokens)).expect("small grids")),
            block: grid.threads,
            cluster: grid.cluster,
            dynamic_shared: grid.shared,
            dependent: false,
            args,
        };
        let report = moec_sim::launch(&module, &mut memory, &launch, &options).map_err(error)?;
        if !report.findings.is_empty() {
            return Err(Fault::of(&report.findings, String::new));
        }
        Ok((memory.read(result, bytes).map_err(error)?, report.counts.warp_instructions))
    }
}

fn known(e: &Expr, tokens: u64) -> u64 {
    e.eval(tokens).expect("sizes are small")
}

fn tensor_map(map: &moec_abi::TensorMap, base: u64) -> TensorMapDesc {
    TensorMapDesc {
        dtype: MapType::Bf16,
        base,
        dims: map.dims.iter().map(|e| known(e, 0)).collect(),
        strides: map.strides.iter().map(|e| known(e, 0)).collect(),
        box_dims: map.box_dims.clone(),
        element_strides: Vec::new(),
        swizzle: Swizzle::B128,
    }
}
