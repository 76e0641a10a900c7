//! Measures packing: the experts of a Qwen3-30B-A3B layer (1.2 GB of bfloat16), into panels and rows.

use moec_abi::{DType, Layout, Matrix, Packing, Slot, Source, View};
use moec_runtime::{InMemory, Random, Tensors, pack};
use std::time::Instant;

fn matrix(tensor: &str, rows: u64, columns: u64, view: Vec<View>) -> Matrix {
    let source = Source { tensor: tensor.into(), packing: Packing::Plain, view, dtype: DType::Bf16 };
    Matrix { source, rows: vec![rows], columns: vec![columns] }
}

fn slot(matrices: Vec<Matrix>, layout: Layout, dtype: DType) -> Slot {
    let mut slot = Slot {
        name: "s".into(),
        experts: 128,
        first_expert: 0,
        numbers: vec![],
        matrices,
        layout,
        dtype,
        bytes: 0,
        offsets: vec![],
    };
    slot.place(64);
    slot
}

/// Seconds of processor time of all threads, which other programs on the machine hardly change.
#[cfg(unix)]
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(not(unix))]
fn processor_seconds() -> f64 {
    0.0
}

fn measure(what: &str, slots: &[Slot], tensors: &dyn Tensors) -> moec_runtime::Result<()> {
    let mut out: Vec<Vec<u8>> = slots.iter().map(|s| vec![1; s.bytes as usize]).collect();
    let mut times = Vec::new();
    for _ in 0..3 {
        let (start, processor) = (Instant::now(), processor_seconds());
        for (slot, out) in slots.iter().zip(&mut out) {
            pack(slot, "", tensors, out)?;
        }
        times.push((start.elapsed().as_secs_f64(), processor_seconds() - processor));
    }
    times.sort_by(|a, b| a.1.total_cmp(&b.1));
    let (wall, processor) = times[0];
    let bytes: usize = out.iter().map(Vec::len).sum();
    println!(
        "{what:<34} {:7.1} MB {:6.0} ms, {:6.0} ms of processor time, {:5.2} GB/s and core",
        bytes as f64 / 1e6,
        wall * 1e3,
        processor * 1e3,
        bytes as f64 / processor.max(1e-9) / 1e9
    );
    Ok(())
}

fn main() -> moec_runtime::Result<()> {
    let (hidden, inner) = (2048, 768);
    let pair = || vec![matrix("{e}.gate", inner, hidden, vec![]), matrix("{e}.up", inner, hidden, vec![])];
    let down = || vec![matrix("{e}.down", hidden, inner, vec![])];
    let panels = |panel, depth| Layout::Panels { panel, depth, columns: 2 };
    let slots = |layout: Layout, dtype| [slot(pair(), layout.clone(), dtype), slot(down(), layout, dtype)];
    let first = slots(panels(48, 2), DType::Bf16);
    let random = Random::new(&first, "", 1)?;
    let mut tensors = InMemory::new();
    let mut processor = 0.0;
    for name in ["gate", "up", "down"] {
        let Some(view) = random.find(&format!("0.{name}")) else { continue };
        let start = processor_seconds();
        let bytes = view.read(0, view.bytes())?.into_vec();
        processor += processor_seconds() - start;
        for e in 0..128 {
            tensors.insert(format!("{e}.{name}"), view.dtype, view.shape.clone(), bytes.clone())?;
        }
    }
    println!("random weights of one expert (9.4 MB): {:.1} ms of processor time", processor * 1e3);
    measure("bf16 -> bf16 panels 48 x 2", &first, &tensors)?;
    measure("bf16 -> bf16 panels 64 x 2", &slots(panels(64, 2), DType::Bf16), &tensors)?;
    measure("bf16 -> bf16 panels 32 x 1", &slots(panels(32, 1), DType::Bf16), &tensors)?;
    measure("bf16 -> bf16 rows", &slots(Layout::Rows { columns: 8 }, DType::Bf16), &tensors)?;
    measure(
        "bf16 -> bf16 interleaved 8",
        &slots(Layout::Interleaved { block: 8, columns: 64 }, DType::Bf16),
        &tensors,
    )?;
    measure("bf16 -> f32 panels 64 x 1", &slots(panels(64, 1), DType::F32), &tensors)?;
    drop(tensors);
    let stacked = |view: Vec<View>| {
        let halves = [0, inner].map(|start| {
            let mut view = view.clone();
            view.push(View::Slice { axis: 0, start, len: inner, step: 1 });
            matrix("gate_up", inner, hidden, view)
        });
        [slot(halves.into(), panels(48, 2), DType::Bf16)]
    };
    let transposed = stacked(vec![View::Expert, View::Transpose]);
    let mut tensors = InMemory::new();
    let shape = vec![128, hidden, 2 * inner];
    tensors.insert("gate_up", DType::Bf16, shape.clone(), vec![7; 2 * shape.iter().product::<u64>() as usize])?;
    measure("stacked and transposed -> panels", &transposed, &tensors)
}
