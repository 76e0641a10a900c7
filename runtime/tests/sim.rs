//! A program on the simulator: the same way as on the CPU, with PTX.

#![cfg(feature = "sim")]

use moec_abi::{
    Arg, Buffer, BufferKind, DType, Expr, GpuGrid, Grid, Launch, Layout, Manifest, Matrix, Packing, Program, SCHEMA,
    Slot, Source,
};
use moec_runtime::{Artefact, Code, InMemory, Model, Sim};
use std::{collections::BTreeMap, sync::Arc};

/// `out[i] = x[i] * w[i % 4]`, one thread for each element, and a count of the elements.
const PTX: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 x, .param .u64 w, .param .u64 out, .param .u64 sum, .param .u64 n) {
  .reg .pred %p<2>;
  .reg .b32 %r<8>;
  .reg .b64 %rd<16>;
  .reg .f32 %f<4>;
  ld.param.u64 %rd0, [x];
  ld.param.u64 %rd1, [w];
  ld.param.u64 %rd2, [out];
  ld.param.u64 %rd3, [sum];
  ld.param.u64 %rd4, [n];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mad.lo.s32 %r3, %r1, %r2, %r0;
  cvt.u64.u32 %rd5, %r3;
  setp.ge.u64 %p0, %rd5, %rd4;
  @%p0 bra done;
  shl.b64 %rd6, %rd5, 2;
  add.s64 %rd7, %rd0, %rd6;
  ld.global.f32 %f0, [%rd7];
  and.b64 %rd8, %rd5, 3;
  shl.b64 %rd9, %rd8, 2;
  add.s64 %rd10, %rd1, %rd9;
  ld.global.f32 %f1, [%rd10];
  mul.f32 %f2, %f0, %f1;
  add.s64 %rd11, %rd2, %rd6;
  st.global.f32 [%rd11], %f2;
  mov.u32 %r4, 1;
  red.global.add.u32 [%rd3], %r4;
done:
  ret;
}
.visible .entry finish(.param .u64 sum, .param .u64 total) {
  .reg .b32 %r<2>;
  .reg .b64 %rd<2>;
  ld.param.u64 %rd0, [sum];
  ld.param.u64 %rd1, [total];
  ld.global.u32 %r0, [%rd0];
  st.global.u32 [%rd1], %r0;
  ret;
}";

fn program(bound: u64) -> Program {
    let kind = |name: &str, input: bool| {
        let name = name.to_owned();
        if input { BufferKind::Input { name } } else { BufferKind::Output { name } }
    };
    let buffer = |name: &str, kind, dtype, shape, zeroed| Buffer {
        name: name.into(),
        kind,
        dtype,
        shape,
        offset: Expr::Const(0),
        zeroed,
    };
    let source = Source { tensor: "{p}w".into(), packing: Packing::Plain, view: vec![], dtype: DType::F32 };
    let mut slot = Slot {
        name: "w".into(),
        experts: 1,
        first_expert: 0,
        numbers: Vec::new(),
        matrices: vec![Matrix { source, rows: vec![4], columns: vec![1] }],
        layout: Layout::Rows { columns: 1 },
        dtype: DType::F32,
        bytes: 0,
        offsets: vec![],
    };
    slot.place(16);
    let launch = |symbol: &str, args, blocks: Expr, threads| Launch {
        name: symbol.into(),
        symbol: symbol.into(),
        args,
        grid: Grid::Gpu(GpuGrid {
            blocks: [blocks, 1.into(), 1.into()],
            threads: [threads, 1, 1],
            cluster: [1; 3],
            shared: 0,
            dependent: false,
            tokens: moec_abi::ANY_TOKENS,
        }),
    };
    let elements = Expr::Tokens.times(4);
    Program {
        name: "scale".into(),
        target: "sm_80".into(),
        buffers: vec![
            buffer("x", kind("x", true), DType::F32, vec![Expr::Tokens, 4.into()], false),
            buffer("w", BufferKind::Weight { slot: 0 }, DType::F32, vec![4.into()], false),
            buffer("out", kind("out", false), DType::F32, vec![Expr::Tokens, 4.into()], false),
            buffer("sum", BufferKind::Workspace, DType::I32, vec![1.into()], true),
            buffer("total", kind("total", false), DType::I32, vec![1.into()], false),
        ],
        slots: vec![slot],
        launches: vec![
            launch(
                "scale",
                vec![
                    Arg::Buffer(0),
                    Arg::Buffer(1),
                    Arg::Buffer(2),
                    Arg::Offset { buffer: 3, bytes: 0.into() },
                    Arg::Value(elements.clone().plus(bound)),
                ],
                elements.ceil_div(32),
                32,
            ),
            launch("finish", vec![Arg::Buffer(3), Arg::Buffer(4)], 1.into(), 1),
        ],
        workspace: 256.into(),
        max_tokens: 100,
        fits: Vec::new(),
        layers: vec![0],
        prefixes: vec!["l.".into()],
        code: "k.ptx".into(),
        binary: None,
        domains: Vec::new(),
    }
}

fn model(program: Program) -> (Model, Arc<Sim>) {
    let manifest = Manifest {
        schema: SCHEMA,
        producer: "test".into(),
        model: "scale".into(),
        inputs: vec![],
        programs: vec![program],
        chains: Vec::new(),
        notes: vec![],
    };
    let files = BTreeMap::from([("k.ptx".to_owned(), PTX.as_bytes().to_vec())]);
    let sim = Arc::new(Sim::new(moec_sim::Options::default()));
    (Model::new(Arc::new(Artefact::in_memory(manifest, files).unwrap()), sim.clone()), sim)
}

fn tensors() -> InMemory {
    let mut tensors = InMemory::new();
    let w = [1f32, 10.0, 100.0, 1000.0];
    tensors.insert("l.w", DType::F32, vec![4], w.iter().flat_map(|v| v.to_le_bytes()).collect()).unwrap();
    tensors
}

#[test]
fn programs_run_and_are_counted() {
    let (model, sim) = model(program(0));
    let layer = model.layer(0, &tensors()).unwrap();
    for tokens in [1u64, 9, 0, 100, 3] {
        let x: Vec<f32> = (0..tokens * 4).map(|i| i as f32).collect();
        let x: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (mut out, mut total) = (vec![0; x.len()], vec![0; 4]);
        let times = layer.launch_timed(tokens, &[&x], &mut [&mut out, &mut total]).unwrap();
        let wanted: Vec<u8> =
            (0..tokens * 4).map(|i| i as f32 * 10f32.powi(i as i32 % 4)).flat_map(f32::to_le_bytes).collect();
        assert_eq!(out, wanted);
        if tokens > 0 {
            assert_eq!(times.len(), 2);
            assert_eq!(total, (tokens as u32 * 4).to_le_bytes());
            let counts = sim.take_counts();
            assert_eq!(counts.kernels.keys().collect::<Vec<_>>(), ["finish", "scale"]);
            assert!(counts.total.lane_instructions > 0);
        }
    }
}

#[test]
fn faults_of_kernels_are_errors_with_their_place() {
    let (model, sim) = model(program(1));
    let layer = model.layer(0, &tensors()).unwrap();
    let x = [0; 16];
    let error = layer.launch(1, &[&x], &mut [&mut [0; 16], &mut [0; 4]]).unwrap_err();
    assert_eq!(error.code, Code::Simulation);
    assert!(error.message.starts_with("launch scale: scale: out_of_bounds at line "), "{}", error.message);
    assert!(!sim.take_findings().is_empty());
}
