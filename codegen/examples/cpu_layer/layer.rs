//! The expert layer of a model: gate and up with activation, then down.

use crate::harness::{Library, Memory, Random};
use moec_abi::{CpuKernel, DType};
use moec_codegen::{
    Target,
    cpu::{self, Schedule},
    grouped::{Epilogue, Grouped, RowScale, RowSource},
};
use moec_ir::ops::{BinaryFn, UnaryFn};
use std::{
    ffi::c_void,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Sizes of a layer.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    hidden: u64,
    inner: u64,
    experts: u64,
    slots: u64,
}

/// Qwen3-30B-A3B, OLMoE-1B-7B, Mixtral-8x7B, and one expert that stays in the caches.
pub(crate) const SHAPES: [Shape; 4] = [
    Shape { name: "qwen", hidden: 2048, inner: 768, experts: 128, slots: 8 },
    Shape { name: "olmoe", hidden: 2048, inner: 1024, experts: 64, slots: 8 },
    Shape { name: "mixtral", hidden: 4096, inner: 14336, experts: 8, slots: 2 },
    Shape { name: "one", hidden: 2048, inner: 768, experts: 1, slots: 1 },
];

/// One launch of a target.
struct Product {
    spec: Grouped,
    schedule: Schedule,
    kernel: CpuKernel,
}

/// A layer with weights and buffers.
pub(crate) struct Layer<'s> {
    shape: &'s Shape,
    weights: DType,
    /// Up and down for each target.
    products: Vec<[Product; 2]>,
    up: Memory,
    down: Memory,
    x: Memory,
    h: Memory,
    y: Memory,
    scratch: Vec<Memory>,
}

/// Which rows go to which expert.
pub(crate) struct Routing {
    offsets: Vec<i32>,
    map: Vec<i32>,
}

/// What a run took and did.
pub(crate) struct Run {
    /// Processor time per thread of up and of down.
    pub(crate) seconds: [f64; 2],
    pub(crate) wall: f64,
    pub(crate) bytes: f64,
    pub(crate) operations: f64,
}

/// A target and fields of its schedules to replace.
pub(crate) struct Variant {
    pub(crate) target: Target,
    pub(crate) changes: Vec<(String, u64)>,
}

fn change(schedule: &mut Schedule, changes: &[(String, u64)]) {
    for (field, value) in changes {
        match field.as_str() {
            "mr" => schedule.mr = *value as usize,
            "nv" => schedule.nv = *value as usize,
            "units_per_item" => schedule.units_per_item = *value,
            "merge" => schedule.merge = *value,
            "merge_rows" => schedule.merge_rows = *value,
            "chunk_rows" => schedule.chunk_rows = *value,
            "k_block" => schedule.k_block = schedule.k_block.min(*value),
            "prefetch" => schedule.prefetch = *value,
            _ => panic!("no field {field} to set"),
        }
    }
}

impl<'s> Layer<'s> {
    pub(crate) fn new(shape: &'s Shape, weights: DType, variants: &[Variant], tokens: u64, threads: usize) -> Self {
        let products: Vec<_> = variants.iter().map(|v| Self::products(shape, weights, v)).collect();
        let largest = |i: usize| products.iter().map(|p| packed_bytes(&p[i])).max().unwrap_or(0);
        let rows = tokens * shape.slots;
        let scratch = products.iter().flatten().map(|p| p.schedule.grid(&p.spec).scratch).max().unwrap_or(0);
        let mut layer = Self {
            shape,
            weights,
            up: Memory::new(largest(0).max(64 << 20), 0),
            down: Memory::new(largest(1), 0),
            x: Memory::new((tokens * shape.hidden * 4) as usize, 0),
            h: Memory::new((rows * shape.inner * 4) as usize, 0),
            y: Memory::new((rows * shape.hidden * 4) as usize, 0),
            scratch: (0..threads).map(|_| Memory::new(scratch as usize, 0)).collect(),
            products,
        };
        fill(&mut layer.up, weights);
        fill(&mut layer.down, weights);
        // As bf16 or as f32, these are numbers of moderate size.
        fill(&mut layer.x, DType::Bf16);
        layer
    }

    fn products(shape: &Shape, weights: DType, variant: &Variant) -> [Product; 2] {
        let target = variant.target;
        let a = cpu::operand_type(target, weights);
        let silu = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
        let up = Grouped {
            symbol: "up".to_owned(),
            experts: shape.experts,
            rows: RowSource::Gathered,
            rows_per_token: shape.slots,
            matrices: 2,
            first: 0,
            given: Vec::new(),
            k: shape.hidden,
            n: shape.inner,
            a_stride: shape.hidden,
            out_stride: shape.inner,
            a,
            w: weights,
            codes: None,
            out: a,
            bias: false,
            scale: RowScale::None,
            epilogue: Epilogue::Binary(BinaryFn::Mul, Box::new(silu), Box::new(Epilogue::Sum(1))),
        };
        let down = Grouped {
            symbol: "down".to_owned(),
            rows: RowSource::Sorted,
            matrices: 1,
            k: shape.inner,
            n: shape.hidden,
            a_stride: shape.inner,
            out_stride: shape.hidden,
            out: DType::F32,
            epilogue: Epilogue::Sum(0),
            ..up.clone()
        };
        let specs = [up, down];
        let schedules = specs.each_ref().map(|s| {
            let mut schedule = cpu::schedule(s, target);
            change(&mut schedule, &variant.changes);
            schedule
        });
        let library = Library::new(target, |b| {
            for (spec, schedule) in specs.iter().zip(&schedules) {
                cpu::emit(b, spec, schedule, target);
            }
        });
        let mut schedules = schedules.into_iter();
        specs.map(|spec| {
            let kernel = library.kernel(&spec.symbol);
            let schedule = schedules.next().expect("one each");
            println!("{} {:?} {}: {schedule:?}", target.name(), variant.changes, spec.symbol);
            Product { spec, schedule, kernel }
        })
    }

    /// Weights to measure streaming reads with.
    pub(crate) fn weights(&self) -> &Memory {
        &self.up
    }

    pub(crate) fn route(&self, tokens: u64, random: &mut Random) -> Routing {
        let mut lists = vec![Vec::new(); self.shape.experts as usize];
        for token in 0..tokens {
            let mut chosen = Vec::new();
            while (chosen.len() as u64) < self.shape.slots {
                let expert = random.below(self.shape.experts);
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                    lists[expert as usize].push(token as i32);
                }
            }
        }
        let mut offsets = vec![0];
        for list in &lists {
            offsets.push(offsets.last().copied().unwrap_or(0) + list.len() as i32);
        }
        Routing { offsets, map: lists.concat() }
    }

    pub(crate) fn run(&self, target: usize, tokens: u64, routing: &Routing, threads: usize) -> Run {
        let Routing { offsets, map } = routing;
        let [up, down] = &self.products[target];
        let pointer = |p: &Vec<i32>| p.as_ptr().addr() as u64;
        let launches = [
            (up, vec![self.x.address(), self.up.address(), pointer(offsets), pointer(map), self.h.address(), tokens]),
            (down, vec![self.h.address(), self.down.address(), pointer(offsets), self.y.address(), tokens]),
        ];
        let counters = [AtomicU64::new(0), AtomicU64::new(0)];
        let barrier = Barrier::new(threads);
        let spent = [AtomicU64::new(0), AtomicU64::new(0)];
        let work = |scratch: &Memory| {
            barrier.wait();
            let wall = Instant::now();
            for (((product, args), next), spent) in launches.iter().zip(&counters).zip(&spent) {
                let start = thread_time();
                let grid = product.schedule.grid(&product.spec);
                let items = grid.items.eval(tokens).expect("fits");
                loop {
                    let begin = next.fetch_add(grid.grain, Ordering::Relaxed);
                    if begin >= items {
                        break;
                    }
                    let end = (begin + grid.grain).min(items);
                    // SAFETY: buffers have the sizes that the products were emitted for.
                    unsafe { (product.kernel)(args.as_ptr(), begin, end, scratch.address() as *mut c_void) };
                }
                spent.fetch_add(thread_time() - start, Ordering::Relaxed);
                barrier.wait();
            }
            wall.elapsed().as_secs_f64()
        };
        let wall = std::thread::scope(|scope| {
            for scratch in &self.scratch[1..threads] {
                scope.spawn(|| work(scratch));
            }
            work(&self.scratch[0])
        });
        let busy = offsets.windows(2).filter(|w| w[1] > w[0]).count() as u64;
        let shape = self.shape;
        let matrix = 3 * shape.hidden * shape.inner;
        Run {
            seconds: spent.map(|s| s.into_inner() as f64 * 1e-9 / threads as f64),
            wall,
            bytes: (busy * matrix * self.weights.bytes()) as f64,
            operations: (2 * tokens * shape.slots * matrix) as f64,
        }
    }
}

fn packed_bytes(product: &Product) -> usize {
    let moec_abi::Layout::Panels { panel, columns, .. } = product.schedule.layout(&product.spec) else {
        panic!("CPU kernels read panels");
    };
    let spec = &product.spec;
    let elements =
        spec.experts * spec.matrices as u64 * spec.n.next_multiple_of(panel) * spec.k.next_multiple_of(columns);
    (elements * spec.w.bytes()) as usize
}

/// Small random numbers, a mebibyte of them again and again.
fn fill(memory: &mut Memory, dtype: DType) {
    let mut random = Random(5);
    let bytes: Vec<u8> = if dtype == DType::Bf16 {
        (0..1 << 19).flat_map(|_| half::bf16::from_f32(random.float() * 0.05).to_bits().to_ne_bytes()).collect()
    } else {
        (0..1 << 18).flat_map(|_| (random.float() * 0.05).to_ne_bytes()).collect()
    };
    for part in memory.slice_mut::<u8>().chunks_mut(bytes.len()) {
        let n = part.len();
        part.copy_from_slice(&bytes[..n]);
    }
}

/// Nanoseconds that this thread has run.
pub(crate) fn thread_time() -> u64 {
    #[repr(C)]
    struct Time {
        seconds: i64,
        nanoseconds: i64,
    }
    unsafe extern "C" {
        fn clock_gettime(clock: i32, time: *mut Time) -> i32;
    }
    let mut time = Time { seconds: 0, nanoseconds: 0 };
    // SAFETY: CLOCK_THREAD_CPUTIME_ID is 3 on Linux, and the struct is the C type on 64-bit systems.
    unsafe { clock_gettime(3, &raw mut time) };
    (time.seconds * 1_000_000_000 + time.nanoseconds).cast_unsigned()
}
