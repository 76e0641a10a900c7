//! The CUDA device against a driver that fails on request.
//!
//! The driver's library is found by the dynamic linker when the process starts to use it, so each
//! scenario is a child process of this test with its own library path.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use moec_abi::{Arg, Buffer, BufferKind, DType, Expr, GpuGrid, Grid, Launch, Manifest, Program, SCHEMA, TensorMap};
use moec_runtime::{Artefact, Cuda, Device, InMemory, Memory, Model, RuntimeError};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Command,
    sync::{Arc, OnceLock},
};

const PTX: &str = "//\n.version 8.7\n.target sm_90a\n";

fn program() -> Program {
    let buffer = |name: &str, input: bool| {
        let name = name.to_owned();
        let kind =
            if input { BufferKind::Input { name: name.clone() } } else { BufferKind::Output { name: name.clone() } };
        let shape = vec![Expr::Tokens, 8.into()];
        Buffer { name, kind, dtype: DType::F32, shape, offset: 0.into(), zeroed: false }
    };
    let map = TensorMap {
        buffer: 0,
        dtype: DType::F32,
        dims: vec![8.into(), Expr::Tokens],
        strides: vec![32.into()],
        box_dims: vec![8, 16],
        swizzle: 32,
    };
    Program {
        name: "twice".into(),
        target: "sm_90a".into(),
        buffers: vec![buffer("x", true), buffer("y", false)],
        slots: vec![],
        launches: vec![Launch {
            name: "double it".into(),
            symbol: "twice".into(),
            args: vec![Arg::Buffer(0), Arg::Buffer(1), Arg::Value(Expr::Tokens.times(8)), Arg::TensorMap(map)],
            grid: Grid::Gpu(GpuGrid {
                blocks: [Expr::Tokens.ceil_div(2), 1.into(), 1.into()],
                threads: [128, 1, 1],
                cluster: [2, 1, 1],
                shared: 100_000,
                dependent: true,
                tokens: moec_abi::ANY_TOKENS,
            }),
        }],
        workspace: 0.into(),
        max_tokens: 1 << 40,
        fits: Vec::new(),
        layers: vec![0],
        prefixes: vec![String::new()],
        code: "k.ptx".into(),
        binary: Some("k.cubin".into()),
        domains: vec![],
    }
}

fn say(stage: &str, error: &RuntimeError) {
    println!("{stage}: {} {} | {}", error.code, error.message, error.help.as_deref().unwrap_or("-"));
}

/// One scenario, when this process is a child.
#[test]
fn child() {
    if std::env::var_os("FAKE_CHILD").is_none() {
        return;
    }
    println!();
    if std::env::var_os("FAKE_FOREIGN").is_some() {
        match foreign() {
            Ok(()) => println!("foreign done"),
            Err(why) => println!("refused: {why}"),
        }
        return;
    }
    if let Err(error) = scenario() {
        say("error", &error);
    }
}

/// PTX of somebody else: a module with one kernel, and arguments of each kind.
fn foreign() -> Result<(), String> {
    use moec_sim::{Arg, Launch, MapType, Swizzle, TensorMapDesc};
    let cuda = Cuda::open(0).map_err(|e| e.message)?;
    let mut machine = cuda.machine().ok_or("the device runs no PTX")?;
    let (x, y) = (machine.alloc(96, 256)?, machine.alloc(96, 128)?);
    assert!(machine.alloc(96, 512).is_err(), "no more than the driver promises");
    let values: Vec<u8> = (0..24).flat_map(|i| (i as f32).to_le_bytes()).collect();
    machine.write(x, &values)?;
    let map = TensorMapDesc {
        dtype: MapType::Bf16,
        base: x,
        dims: vec![8, 3],
        strides: vec![32],
        box_dims: vec![8, 2],
        element_strides: Vec::new(),
        swizzle: Swizzle::B128,
    };
    let launch = Launch {
        entry: "twice",
        grid: [3, 1, 1],
        block: [32, 1, 1],
        cluster: [1; 3],
        dynamic_shared: 60_000,
        dependent: false,
        args: vec![Arg::U64(x), Arg::U64(y), Arg::U32(24), Arg::TensorMap(map)],
    };
    machine.launch("//\n.version 8.0\n.target sm_90\n", &launch)?;
    let wanted: Vec<u8> = (0..24).flat_map(|i| (2.0 * i as f32).to_le_bytes()).collect();
    assert_eq!(machine.read(y, 96)?, wanted);
    Ok(())
}

fn scenario() -> moec_runtime::Result<()> {
    let ordinal = std::env::var("FAKE_ORDINAL").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let cuda = Arc::new(Cuda::open(ordinal)?);
    println!("open {} {} {}", cuda.device_name(), cuda.capability(), cuda.driver_version());
    let manifest = Manifest {
        schema: SCHEMA,
        producer: "test".into(),
        model: "twice".into(),
        inputs: vec![],
        programs: vec![program()],
        chains: Vec::new(),
        notes: vec![],
    };
    let files = [("k.ptx", PTX), ("k.cubin", "binary")].map(|(n, t)| (n.to_owned(), t.as_bytes().to_vec()));
    let artefact = Arc::new(Artefact::in_memory(manifest, BTreeMap::from(files))?);
    let device: Arc<dyn Device> = cuda.clone();
    let layer = Model::new(artefact, device.clone()).layer(0, &InMemory::new())?;
    println!("{}", layer.describe());
    let x: Vec<u8> = (0..24).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let wanted: Vec<u8> = (0..24).flat_map(|i| (2.0 * i as f32).to_le_bytes()).collect();
    let mut y = vec![0; 96];
    if let Err(error) = layer.launch(3, &[&x], &mut [&mut y]) {
        say("first", &error);
        layer.launch(3, &[&x], &mut [&mut y])?;
    }
    assert_eq!(y, wanted);
    let times = layer.launch_timed(3, &[&x], &mut [&mut y])?;
    println!("{} {} ns", times[0].name, times[0].nanoseconds);
    let (mut input, output) = (Memory::new(&device, 96)?, Memory::new(&device, 96)?);
    let mut addresses = [input.address(), output.address()];
    let graph = cuda.capture(|| {
        // SAFETY: both blocks have the bytes of three tokens and outlive the graph.
        unsafe { layer.launch_at(3, &mut addresses, 0, 0, None) }
    })?;
    input.write(0, &x)?;
    // SAFETY: the memory that was recorded is alive.
    unsafe { graph.launch()? };
    output.read(0, &mut y)?;
    assert_eq!(y, wanted);
    println!("graph done");
    Ok(())
}

/// Builds the library once for each set of flags.
fn library(missing: bool) -> PathBuf {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    static BUILT: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().unwrap()).path();
    BUILT[usize::from(missing)]
        .get_or_init(|| {
            let folder = folder.join(if missing { "missing" } else { "all" });
            std::fs::create_dir(&folder).unwrap();
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_driver.c");
            let library = folder.join("libcuda.so.1");
            let mut cc = Command::new("cc");
            cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]);
            if missing {
                cc.arg("-DNO_TENSOR_MAPS");
            }
            assert!(cc.arg(source).arg("-o").arg(&library).status().unwrap().success());
            std::fs::copy(&library, folder.join("libcuda.so")).unwrap();
            folder
        })
        .clone()
}

fn run_in(folder: &std::path::Path, settings: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", folder)
        .env("FAKE_CHILD", "1")
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{settings:?}\n{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn run(settings: &[(&str, &str)]) -> String {
    run_in(&library(false), settings)
}

#[track_caller]
fn check(settings: &[(&str, &str)], wanted: &str) {
    let text = run(settings);
    assert!(text.contains(wanted), "{settings:?}\nwanted: {wanted}\n{text}");
}

#[test]
fn a_program_runs_with_clusters_tensor_maps_events_and_graphs() {
    let text = run(&[]);
    for wanted in [
        "open Fake GPU 90 12.8\n",
        "1 kernels from k.cubin on Fake GPU\n",
        "attribute twice 8 100000\n",
        "map 7 rank 2 dims 8 3 stride 32 box 8 16 steps 1 swizzle 1\n",
        "launch twice grid 2 1 1 block 128 1 1 shared 100000 attribute 4: 2 1 1 attribute 6: 1 0 0\n",
        "double it 250000 ns\n",
        "graph done\n",
    ] {
        assert!(text.contains(wanted), "wanted: {wanted}\n{text}");
    }
    assert!(!text.contains("E0"), "{text}");
}

#[test]
fn a_missing_or_old_driver_is_an_error_with_both_versions() {
    let empty = tempfile::tempdir().unwrap();
    let text = run_in(empty.path(), &[]);
    if text.contains("open ") || !text.contains("libcuda.so.1 was not found") {
        assert!(text.contains("open ") || text.contains("E090"), "{text}");
        println!("this machine has a driver; its absence was not tested");
    }
    let text = run_in(&library(true), &[]);
    assert!(
        text.contains("E0902 the CUDA driver has no cuTensorMapEncodeTiled; drivers for CUDA 12.0 have it"),
        "{text}"
    );
    check(
        &[("FAKE_VERSION", "11040")],
        "E0902 the CUDA driver supports CUDA 11.4; this runtime needs CUDA 12.0 or newer",
    );
    check(&[("FAKE_FAIL", "cuInit=100")], "E0903 no CUDA device in this machine, or none is visible");
    check(&[("FAKE_FAIL", "cuInit=803")], "kernel module and driver library have different versions");
    check(&[("FAKE_FAIL", "cuInit=34")], "E0902 the CUDA driver does not start: CUDA_ERROR_FAKE (34)");
    check(&[("FAKE_FAIL", "cuInit=5555")], "E0902 the CUDA driver does not start: CUDA error 5555");
    check(&[("FAKE_COUNT", "2"), ("FAKE_ORDINAL", "2")], "E0903 no CUDA device 2; this machine has 2");
    check(&[("FAKE_FAIL", "cuDevicePrimaryCtxRetain=2")], "E0903 Fake GPU: no context: CUDA_ERROR_FAKE (2)");
}

#[test]
fn code_that_does_not_fit_names_what_is_inside_and_what_is_here() {
    check(
        &[("FAKE_FAIL", "cubin=209")],
        "1 kernels from k.ptx on Fake GPU; k.cubin was not taken: CUDA_ERROR_FAKE (209)",
    );
    check(
        &[("FAKE_FAIL", "cubin=209,ptx=222"), ("FAKE_VERSION", "12020")],
        "E0902 the PTX is too new for the driver: k.ptx holds code for sm_90a, PTX version 8.7; \
         Fake GPU is sm_90, its driver supports CUDA 12.2",
    );
    check(&[("FAKE_FAIL", "cubin=200,ptx=209")], "E0813 no code for this GPU: k.ptx holds code for sm_90a");
    check(&[("FAKE_FAIL", "cubin=200,ptx=218")], "the driver says: line 3: fake complaint");
    check(
        &[("FAKE_CAPABILITY", "80")],
        "E0813 no code for device cuda:0 in the artefact: sm_90a (twice): does not run here, Fake GPU is sm_80",
    );
    check(&[("FAKE_FAIL", "cuModuleGetFunction=500")], "E0812 k.cubin does not define twice, the kernel of double it");
    check(&[("FAKE_FAIL", "cuFuncSetAttribute=1")], "E0813 launch double it: Fake GPU does not have 100000 bytes");
}

#[test]
fn a_lack_of_memory_says_what_was_asked_and_what_is_free() {
    check(
        &[("FAKE_FAIL", "cuMemAlloc_v2=2")],
        "E0901 Fake GPU (cuda:0): no 1 MiB of device memory; 5 MiB of 80 MiB are free",
    );
}

#[test]
fn a_lost_context_answers_at_once_and_says_how_to_go_on() {
    let text = run(&[("FAKE_FAIL", "cuLaunchKernelEx=700")]);
    let line = "E0904 Fake GPU (cuda:0), launch double it (blocks [2, 1, 1], threads [128, 1, 1], cluster [2, 1, 1], \
                100000 bytes of shared memory): CUDA_ERROR_ILLEGAL_ADDRESS (700) | the context is lost: drop the model \
                and the device, then open it again";
    assert!(text.contains(&format!("first: {line}")) && text.contains(&format!("error: {line}")), "{text}");
    assert_eq!(text.matches("launch twice").count(), 1, "the driver is not asked again\n{text}");
    // An error that leaves the context alive is tried again.
    let text = run(&[("FAKE_FAIL", "cuLaunchKernelEx=1")]);
    assert_eq!(text.matches("launch twice").count(), 2, "{text}");
    check(
        &[("FAKE_FAIL", "cuStreamSynchronize=719")],
        "a launch failed: CUDA_ERROR_LAUNCH_FAILED (719) | the context is lost",
    );
}

#[test]
fn ptx_of_others_runs_and_its_failures_are_told() {
    let case = |fail: &str| run(&[("FAKE_FOREIGN", "1"), ("FAKE_FAIL", fail)]);
    let text = case("");
    for wanted in [
        "map 9 rank 2 dims 8 3 stride 32 box 8 2 steps 1 swizzle 3\n",
        "attribute twice 8 60000\n",
        "launch twice grid 3 1 1 block 32 1 1 shared 60000\n",
        "foreign done\n",
    ] {
        assert!(text.contains(wanted), "wanted: {wanted}\n{text}");
    }
    for (fail, wanted) in [
        ("ptx=218", "Fake GPU does not load the PTX: CUDA_ERROR_FAKE (218) line 3: fake complaint"),
        ("cuModuleGetFunction=500", "there is no kernel twice"),
        ("cuLaunchKernelEx=700", "twice: CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        ("cuStreamSynchronize=719", "CUDA_ERROR_LAUNCH_FAILED (719)"),
        ("cuTensorMapEncodeTiled=1", "a tensor map of [8, 3], strides [32], box [8, 2]"),
        ("cuMemAlloc_v2=2", "no 1 MiB of device memory"),
        ("cuMemcpyDtoHAsync_v2=1", "copy from the device"),
    ] {
        let text = case(fail);
        assert!(text.contains("refused: ") && text.contains(wanted), "{fail}\n{text}");
    }
}

#[test]
fn every_function_may_fail_without_a_panic() {
    for name in [
        "cuDriverGetVersion",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuCtxSetCurrent",
        "cuStreamCreate",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuEventElapsedTime",
        "cuTensorMapEncodeTiled",
    ] {
        for code in ["1", "900", "700"] {
            let text = run(&[("FAKE_FAIL", &format!("{name}={code}"))]);
            assert!(text.contains("error: E0"), "{name} {code}\n{text}");
        }
    }
}
