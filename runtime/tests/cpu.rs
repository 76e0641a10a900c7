//! Programs on the CPU device: kernels of this file, and objects of a C compiler.

#![cfg(unix)]

mod support;

use moec_abi::{DType, Expr, Grid};
use moec_launch::CpuKernel;
use moec_runtime::{Artefact, Code, Cpu, Device, InMemory, Layer, Model, packed_layer};
use std::{collections::BTreeMap, sync::Arc};
use support::*;

/// The argument at `i` as a pointer.
unsafe fn pointer(args: *const u64, i: usize) -> *mut f32 {
    // SAFETY: callers pass arguments of the program, which has this many.
    std::ptr::with_exposed_provenance_mut(unsafe { *args.add(i) } as usize)
}

unsafe extern "C" fn up(args: *const u64, begin: u64, end: u64, scratch: *mut core::ffi::c_void) {
    // SAFETY: the launcher passes what the program says.
    unsafe {
        let (x, w, y) = (pointer(args, 0), pointer(args, 1), pointer(args, 2));
        assert_eq!(*args.add(3), IN);
        assert!(scratch.addr().is_multiple_of(64));
        let row = scratch.cast::<f32>();
        for t in begin as usize..end as usize {
            std::ptr::copy_nonoverlapping(x.add(t * IN as usize), row, IN as usize);
            for o in 0..OUT as usize {
                let mut s = 0f32;
                for i in 0..IN as usize {
                    s += *row.add(i) * *w.add((((o / 4) * 12 + i / 2) * 4 + o % 4) * 2 + i % 2);
                }
                *y.add(t * OUT as usize + o) = s.max(0.0);
            }
        }
    }
}

unsafe extern "C" fn sum(args: *const u64, begin: u64, end: u64, _: *mut core::ffi::c_void) {
    // SAFETY: the launcher passes what the program says.
    unsafe {
        for o in begin as usize..end as usize {
            for t in 0..*args.add(2) as usize {
                *pointer(args, 1).add(o) += *pointer(args, 0).add(t * OUT as usize + o);
            }
        }
    }
}

unsafe extern "C" fn add(args: *const u64, begin: u64, end: u64, _: *mut core::ffi::c_void) {
    // SAFETY: the launcher passes what the program says.
    unsafe {
        for i in (begin * OUT) as usize..(end * OUT) as usize {
            *pointer(args, 2).add(i) = *pointer(args, 0).add(i) + *pointer(args, 1).add(i % OUT as usize);
        }
    }
}

const KERNELS: [CpuKernel; 3] = [up, sum, add];

fn host() -> &'static str {
    if cfg!(target_arch = "x86_64") { "x86-64" } else { "aarch64" }
}

fn weights() -> (Vec<f32>, InMemory) {
    let w: Vec<f32> = (0..IN * OUT).map(number).collect();
    let mut tensors = InMemory::new();
    for prefix in ["l3.", "l5."] {
        tensors.insert(format!("{prefix}w"), DType::F32, vec![OUT, IN], bytes(&w)).unwrap();
    }
    (w, tensors)
}

fn layer(threads: u32) -> (Vec<f32>, Layer) {
    let artefact = Arc::new(Artefact::in_memory(manifest(vec![program(host())]), BTreeMap::new()).unwrap());
    let cpu = Arc::new(Cpu::new(threads));
    // SAFETY: the kernels do what the launches say.
    let module = unsafe { cpu.module(artefact.program(0).unwrap(), KERNELS.to_vec()) }.unwrap();
    let model = Model::new(artefact, cpu);
    let (w, tensors) = weights();
    // SAFETY: the module was made from this program.
    (w, unsafe { model.layer_with(5, module, &tensors) }.unwrap())
}

fn run(layer: &Layer, tokens: u64, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0xaa; (tokens * OUT * 4) as usize];
    layer.launch(tokens, &[&bytes(x)], &mut [&mut out]).unwrap();
    floats(&out)
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for threads in [1, 2, 3, 8, 0] {
        let (w, layer) = layer(threads);
        for tokens in [0, 1, 2, 7, 64, 333, 1000, 1] {
            let x: Vec<f32> = (0..tokens * IN).map(|i| number(i + tokens)).collect();
            assert_eq!(run(&layer, tokens, &x), reference(tokens, &x, &w), "{threads} threads, {tokens} tokens");
        }
    }
}

#[test]
fn many_short_launches_lose_no_item() {
    let (w, layer) = layer(4);
    for round in 0..20_000 {
        let tokens = 1 + round % 13;
        let x: Vec<f32> = (0..tokens * IN).map(|i| number(i + round)).collect();
        assert_eq!(run(&layer, tokens, &x), reference(tokens, &x, &w), "round {round}");
    }
}

#[test]
fn threads_of_the_host_may_share_a_layer() {
    let (w, layer) = layer(2);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (w, layer) = (&w, &layer);
            scope.spawn(move || {
                for round in 0..200 {
                    let tokens = 1 + (round + seed) % 40;
                    let x: Vec<f32> = (0..tokens * IN).map(|i| number(i * seed + round)).collect();
                    assert_eq!(run(layer, tokens, &x), reference(tokens, &x, w));
                }
            });
        }
    });
}

#[test]
fn times_are_given_for_every_launch() {
    let (_, layer) = layer(2);
    let x = bytes(&vec![0.5; (100 * IN) as usize]);
    let mut out = vec![0; (100 * OUT * 4) as usize];
    let times = layer.launch_timed(100, &[&x], &mut [&mut out]).unwrap();
    assert_eq!(times.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["up", "sum", "add"]);
    assert!(times.iter().all(|t| t.nanoseconds > 0));
}

#[test]
fn wrong_calls_are_refused_with_the_reason() {
    let (_, layer) = layer(1);
    assert_eq!(layer.workspace_bytes(3).unwrap(), 192);
    let many = layer.launch(1001, &[&[]], &mut [&mut []]).unwrap_err();
    assert_eq!(
        (many.code, many.message.as_str()),
        (Code::Tokens, "1001 tokens; the program was compiled for at most 1000")
    );
    let short = layer.launch(1, &[&[0; 95]], &mut [&mut [0; 40]]).unwrap_err();
    assert_eq!(short.message, "hidden: 95 bytes were passed, 1 tokens need 96");
    let none = layer.launch(1, &[], &mut [&mut [0; 40]]).unwrap_err();
    assert_eq!(none.message, "0 inputs were passed, the program has 1");
}

#[test]
fn packed_weights_are_checked_and_give_the_same_layer() {
    let artefact = Arc::new(Artefact::in_memory(manifest(vec![program(host())]), code(&["-O2", "-fPIC"])).unwrap());
    let (w, tensors) = weights();
    let packed = packed_layer(artefact.program(0).unwrap(), "l3.", &tensors).unwrap();
    let model = Model::new(Arc::clone(&artefact), Arc::new(Cpu::new(2)));
    let layer = model.layer_packed(3, &packed).unwrap();
    let x: Vec<f32> = (0..9 * IN).map(number).collect();
    assert_eq!(run(&layer, 9, &x), reference(9, &x, &w));
    let mut other = packed.clone();
    other[9] ^= 1;
    assert_eq!(model.layer_packed(3, &other).err().unwrap().code, Code::FileForm);
    assert_eq!(model.layer_packed(3, &packed[..4096]).err().unwrap().code, Code::FileForm);
}

fn code(flags: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let (source, object) = (folder.path().join("k.c"), folder.path().join("k.o"));
    std::fs::write(&source, KERNELS_C).unwrap();
    let mut cc = std::process::Command::new("cc");
    let status = cc.args(flags).arg("-ffp-contract=off").arg("-c").arg(&source).arg("-o").arg(&object).status();
    assert!(status.unwrap().success());
    [("kernels/tiny.o".to_owned(), std::fs::read(object).unwrap())].into()
}

#[test]
fn an_artefact_folder_runs_without_a_linker() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("kernels")).unwrap();
    std::fs::write(folder.path().join("kernels/tiny.o"), &code(&["-O2", "-fPIC"])["kernels/tiny.o"]).unwrap();
    let text = serde_json::to_vec(&manifest(vec![program(host())])).unwrap();
    std::fs::write(folder.path().join("manifest.json"), text).unwrap();
    let artefact = Arc::new(Artefact::load(folder.path()).unwrap());
    let model = Model::new(artefact, Arc::new(Cpu::new(0)));
    let (w, tensors) = weights();
    let (three, five) = (model.layer(3, &tensors).unwrap(), model.layer(5, &tensors).unwrap());
    let x: Vec<f32> = (0..100 * IN).map(number).collect();
    assert_eq!(run(&three, 100, &x), reference(100, &x, &w));
    assert_eq!(run(&five, 100, &x), reference(100, &x, &w));
}

#[test]
fn the_best_variant_is_taken_and_the_reason_given() {
    let targets = ["sm_90a", host(), "x86-64-v3"];
    let artefact = Artefact::in_memory(manifest(targets.map(program).to_vec()), BTreeMap::new()).unwrap();
    let cpu = Cpu::new(1);
    let choice = artefact.choose(3, &cpu).unwrap();
    let best = if cpu.runs("x86-64-v3").is_ok() { 2 } else { 1 };
    assert_eq!(choice.program, best);
    let text = artefact.describe_choice(3, &cpu).unwrap();
    assert!(text.starts_with(&format!("{} (tiny): taken, the best that cpu runs\n", targets[best])), "{text}");
    assert!(text.contains("sm_90a (tiny): does not run here"), "{text}");
    let none = artefact.choose(4, &cpu).unwrap_err();
    assert_eq!(
        (none.message.as_str(), none.help.as_deref()),
        ("the artefact has no layer 4", Some("it has the layers 3, 5"))
    );
    let gpu = Artefact::in_memory(manifest(vec![program("sm_90a")]), BTreeMap::new()).unwrap();
    assert!(gpu.choose(3, &cpu).unwrap_err().message.starts_with("no code for device cpu in the artefact: sm_90a"));
}

#[test]
fn newer_and_damaged_manifests_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manifest.json");
    std::fs::write(&path, r#"{"schema": 99, "shape": "unknown"}"#).unwrap();
    let newer = Artefact::load(folder.path()).err().unwrap();
    assert_eq!(newer.message, "the artefact has form 99, this runtime reads up to 1");
    std::fs::write(&path, "{").unwrap();
    assert_eq!(Artefact::load(folder.path()).err().unwrap().code, Code::Artefact);
    let mut outside = program(host());
    outside.code = "../secret".into();
    std::fs::write(&path, serde_json::to_vec(&manifest(vec![outside])).unwrap()).unwrap();
    let model = Model::new(Arc::new(Artefact::load(folder.path()).unwrap()), Arc::new(Cpu::new(1)));
    let error = model.layer(3, &weights().1).err().unwrap();
    assert_eq!(error.message, "the manifest names ../secret, which is not inside the artefact");
}

#[test]
fn encoded_programs_evaluate_as_their_expressions() {
    let mut program = program(host());
    let mut deep = Expr::Tokens;
    for i in 1..2000u64 {
        deep = Expr::Add(Box::new(Expr::Const(i)), Box::new(Expr::Max(Box::new(deep), Box::new(Expr::Tokens))));
    }
    let items = Expr::Min(Box::new(Expr::CeilDiv(Box::new(deep.clone()), 7)), Box::new(deep.times(3)));
    program.launches[1].grid = match program.launches[1].grid.clone() {
        Grid::Cpu(mut grid) => {
            grid.items = items.clone();
            Grid::Cpu(grid)
        }
        Grid::Gpu(grid) => Grid::Gpu(grid),
    };
    let words = moec_abi::encode(&program).unwrap();
    let decoded = moec_launch::program::Program::new(&words).unwrap();
    for tokens in [0, 1, 5, 1000, 1 << 40] {
        let launch = decoded.launch(1).unwrap();
        assert_eq!(decoded.items(&launch, tokens).ok(), items.eval(tokens));
        assert_eq!(decoded.workspace_bytes(tokens).ok(), program.workspace.eval(tokens));
    }
    assert_eq!(decoded.workspace_bytes(u64::MAX).ok(), None);
    // Damaged words are refused or harmless, never a panic.
    for at in 0..words.len() {
        for flip in [1u64, 1 << 40, u64::MAX] {
            let mut damaged = words.clone();
            damaged[at] ^= flip;
            if let Ok(program) = moec_launch::program::Program::new(&damaged) {
                let _ = program.workspace_bytes(77);
            }
        }
        let _ = moec_launch::program::Program::new(&words[..at]);
    }
}
