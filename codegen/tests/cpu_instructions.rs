//! Instructions of the innermost loops, read from the assembly: no spills, and little beside multiply-adds.

use moec_abi::DType;
use moec_codegen::{
    Target, cpu,
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    mlir::{Keep, Session},
};

/// A loop of the assembly: from a label to the jump back to it, without inner loops.
struct Loop<'a> {
    lines: Vec<&'a str>,
}

impl Loop<'_> {
    fn count(&self, what: impl Fn(&str) -> bool) -> usize {
        self.lines.iter().filter(|l| what(l)).count()
    }

    fn multiplies(&self) -> usize {
        self.count(|l| {
            l.starts_with("vfmadd") || l.starts_with("fmla") || l.starts_with("vdpbf16ps") || l.starts_with("tdpbf16ps")
        })
    }
}

fn loops(assembly: &str) -> Vec<Loop<'_>> {
    let lines: Vec<_> = assembly.lines().map(|l| l.split('#').next().unwrap_or("").trim()).collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(label) = line.strip_suffix(':').filter(|l| l.starts_with(".LBB")) else {
            continue;
        };
        for (end, line) in lines.iter().enumerate().skip(start + 1) {
            if line.starts_with(".LBB") {
                break;
            }
            if (line.starts_with('j') || line.starts_with("b.")) && line.ends_with(label) {
                let lines = lines[start + 1..=end].iter().copied().filter(|l| !l.is_empty() && !l.starts_with('.'));
                found.push(Loop { lines: lines.collect() });
                break;
            }
        }
    }
    found
}

/// The loop of full tiles of a product of a usual shape.
fn hottest(target: Target, w: DType, check: impl FnOnce(&cpu::Schedule, &Loop<'_>)) {
    let spec = Grouped {
        symbol: "product".to_owned(),
        experts: 8,
        rows: RowSource::Gathered,
        rows_per_token: 2,
        matrices: 2,
        first: 0,
        given: Vec::new(),
        codes: None,
        k: 2048,
        n: 768,
        a_stride: 2048,
        out_stride: 768,
        a: cpu::operand_type(target, w),
        w,
        out: DType::F32,
        bias: false,
        scale: RowScale::None,
        epilogue: Epilogue::Sum(0),
    };
    let schedule = cpu::schedule(&spec, target);
    let keep = Keep { assembly: true, ..Keep::default() };
    let compiled = Session::new().compile(&target, keep, |b| cpu::emit(b, &spec, &schedule, target)).expect("compiles");
    let assembly = compiled.assembly.expect("kept");
    let loops = loops(&assembly);
    let step = match schedule.engine {
        cpu::Engine::Vector => schedule.mr * schedule.nv * schedule.depth as usize,
        cpu::Engine::Pairs => schedule.mr * schedule.nv,
        cpu::Engine::Matrix => 4,
    };
    // Loops of lower tiles may be unrolled; the one of full tiles has whole steps of the most rows.
    let full = loops.iter().filter(|l| l.multiplies() >= step && l.multiplies().is_multiple_of(step));
    let hottest = full
        .max_by_key(|l| l.count(|l| l.starts_with("vbroadcast") || l.starts_with("ld")) + l.multiplies())
        .expect("a loop");
    check(&schedule, hottest);
}

#[test]
fn vector_loops_are_multiply_adds_broadcasts_and_loads() {
    for (target, w) in [
        (Target::X86V4Bf16, DType::Bf16),
        (Target::X86V4, DType::Bf16),
        (Target::X86V4, DType::F32),
        (Target::X86V3, DType::Bf16),
        (Target::X86V3, DType::F32),
    ] {
        hottest(target, w, |schedule, hottest| {
            let halves = w == DType::Bf16 && schedule.engine == cpu::Engine::Vector;
            let inputs = if halves { schedule.depth as usize } else { 1 };
            let products = schedule.mr * schedule.nv * inputs;
            let repeats = hottest.multiplies() / products;
            assert_eq!(hottest.count(|l| l.contains("(%rsp)")), 0, "{}: the loop spills", target.name());
            // A broadcast for each row and input (or pair), loads of weights, halves of pairs, lines fetched, and the loop itself.
            let rows = schedule.mr * inputs;
            let weights = schedule.nv * if halves { 3 } else { 1 };
            let lines = schedule.nv * schedule.lanes * 4 / 64 + 1;
            let most = repeats * (products + rows + weights + lines + 4) + 4;
            let total = hottest.lines.len();
            println!("{} {w:?}: {total} instructions, {} multiply-adds", target.name(), hottest.multiplies());
            assert!(total <= most, "{}: {total} instructions, at most {most}", target.name());
        });
    }
}

#[test]
fn tile_loops_load_one_tile_for_each_product() {
    hottest(Target::X86V4Amx, DType::Bf16, |_, hottest| {
        assert_eq!(hottest.multiplies() % 4, 0);
        assert_eq!(hottest.count(|l| l.starts_with("tileload")), hottest.multiplies());
        assert_eq!(hottest.count(|l| l.contains("(%rsp)") || l.starts_with("tilestore")), 0, "the loop spills");
    });
}

#[test]
fn arm_loops_keep_their_sums_in_registers() {
    for w in [DType::Bf16, DType::F32] {
        hottest(Target::Aarch64, w, |schedule, hottest| {
            assert!(hottest.multiplies() >= schedule.mr * schedule.nv * schedule.depth as usize);
            assert_eq!(hottest.count(|l| l.contains("[sp")), 0, "{w:?}: the loop spills: {:?}", hottest.lines);
        });
    }
}
