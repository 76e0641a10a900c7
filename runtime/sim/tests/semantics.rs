//! Small kernels for the rules that are easy to get wrong: phases, fences, clusters, asynchronous stores, divergence.

use moec_sim::{
    Arg, Error, FindingKind, Lanes, Launch, MapType, Memory, Module, Options, Report, Swizzle, TensorMapDesc, launch,
};

/// Runs a kernel of one parameter, a buffer of `words` zeros, and gives the buffer back.
fn run(body: &str, grid: u32, block: u32, cluster: u32, words: usize, seed: u64) -> Result<(Report, Vec<u32>), Error> {
    run_with(body, grid, block, cluster, words, Options { seed, max_instructions: 2_000_000, ..Options::default() })
}

fn run_with(
    body: &str,
    grid: u32,
    block: u32,
    cluster: u32,
    words: usize,
    options: Options,
) -> Result<(Report, Vec<u32>), Error> {
    let ptx = format!(
        ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 out)\n{{\n.reg .pred %p<8>;\n.reg .b32 %r<32>;\n.reg .b64 %rd<16>;\n.reg .f32 %f<16>;\n\
         .shared .align 1024 .b8 tile[4096];\n.shared .align 8 .b64 bar;\n.shared .align 8 .b64 bar2;\nld.param.u64 %rd0, [out];\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    );
    let module = Module::parse(&ptx)?;
    let mut memory = Memory::new();
    let out = memory.alloc(words as u64 * 4, 256);
    memory.write(out, &vec![0; words * 4])?;
    let l = Launch {
        entry: "k",
        grid: [grid, 1, 1],
        block: [block, 1, 1],
        cluster: [cluster, 1, 1],
        dynamic_shared: 0,
        dependent: false,
        args: vec![Arg::U64(out)],
    };
    let report = launch(&module, &mut memory, &l, &options)?;
    let bytes = memory.read(out, words as u64 * 4)?;
    Ok((report, bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()))
}

fn kinds(r: &Report) -> Vec<FindingKind> {
    let mut k: Vec<_> = r.findings.iter().map(|f| f.kind).collect();
    k.sort();
    k.dedup();
    k
}

/// Stores register `%r9` to word `tid + 32 * ctaid` of the buffer.
const STORE: &str = "mov.u32 %r30, %ctaid.x; mad.lo.u32 %r30, %r30, 32, %r0; mul.wide.u32 %rd14, %r30, 4; add.u64 %rd14, %rd0, %rd14; st.global.u32 [%rd14], %r9;";

/// Initialises `bar` for `n` arrivals by thread 0.
fn init(n: u32) -> String {
    format!(
        "setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [bar], {n}; fence.mbarrier_init.release.cluster; bar.sync 0;"
    )
}

#[test]
fn an_mbarrier_goes_through_its_phases() -> Result<(), Error> {
    // Each lane arrives twice; the phase flips each time all 32 have come.
    let body = format!(
        "{}\nmbarrier.arrive.shared::cta.b64 %rd1, [bar];\nW0: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra W0;\n\
         mbarrier.test_wait.parity.shared::cta.b64 %p2, [bar], 1; selp.u32 %r9, 7, 0, %p2;\n\
         mbarrier.arrive.shared::cta.b64 %rd2, [bar];\nW1: mbarrier.test_wait.shared::cta.b64 %p1, [bar], %rd2; @!%p1 bra W1;\nadd.u32 %r9, %r9, 1;\n{STORE}",
        init(32)
    );
    for seed in 0..4 {
        let (report, out) = run(&body, 1, 32, 1, 32, seed)?;
        assert_eq!(kinds(&report), []);
        // Parity 1 is that of the phase before the first, or of the second: both may be seen, 1 is not seen before it ends.
        assert!(out.iter().all(|v| *v == 1 || *v == 8), "{out:?}");
    }
    Ok(())
}

#[test]
fn lanes_that_go_apart_show_what_a_warp_barrier_is_for() -> Result<(), Error> {
    // Each lane stores, then reads its neighbour's word, after a shuffle of which the result is not used.
    let exchange = |barrier: &str| {
        format!(
            "mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 4, %r1; mov.u32 %r3, 0; st.shared.u32 [%r2], %r3; bar.warp.sync -1;\n\
             add.u32 %r4, %r0, 100; st.shared.u32 [%r2], %r4; {barrier} xor.b32 %r5, %r0, 1; mad.lo.u32 %r5, %r5, 4, %r1; ld.shared.u32 %r9, [%r5];\n\
             shfl.sync.bfly.b32 %r6, %r9, 1, 31, -1; sub.u32 %r9, %r9, 100; {STORE}"
        )
    };
    let apart = |body: &str, lanes| {
        run_with(body, 1, 32, 1, 32, Options { check: false, max_instructions: 2_000_000, lanes, ..Options::default() })
    };
    for lanes in [Lanes::Together, Lanes::Ascending, Lanes::Descending] {
        let (_, out) = apart(&exchange("bar.warp.sync -1;"), lanes)?;
        assert!(out.iter().enumerate().all(|(l, v)| *v as usize == l ^ 1), "{lanes:?} {out:?}");
    }
    let without = exchange("");
    let wrong = |lanes| {
        Ok::<_, Error>(apart(&without, lanes)?.1.iter().enumerate().filter(|(l, v)| **v as usize != l ^ 1).count())
    };
    assert_eq!((wrong(Lanes::Ascending)?, wrong(Lanes::Descending)?), (16, 16));
    Ok(())
}

#[test]
fn counts_do_not_depend_on_how_often_a_wait_is_tried() -> Result<(), Error> {
    // Warp 1 waits for warp 0, which works for long: schedules differ in how often the wait fails.
    let body = format!(
        "{}\nmov.u32 %r9, 0; setp.lt.u32 %p1, %r0, 32; @!%p1 bra WAIT;\nLOOP: add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 5000; @%p2 bra LOOP;\n\
         mbarrier.arrive.shared::cta.b64 %rd1, [bar];\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], 0; @!%p3 bra WAIT;\n{STORE}",
        init(32)
    );
    let mut counts = Vec::new();
    for seed in 0..8 {
        let (report, _) = run(&body, 1, 64, 1, 64, seed)?;
        assert_eq!(kinds(&report), []);
        counts.push((report.counts.warp_instructions, report.counts.lane_instructions));
    }
    assert!(counts.iter().all(|c| *c == counts[0]), "{counts:?}");
    Ok(())
}

#[test]
fn an_mbarrier_that_nobody_initialised_is_reported() -> Result<(), Error> {
    let (report, _) = run("mbarrier.arrive.shared::cta.b64 %rd1, [bar];", 1, 32, 1, 32, 0)?;
    assert_eq!(kinds(&report), [FindingKind::Mbarrier]);
    Ok(())
}

#[test]
fn too_many_arrivals_are_reported() -> Result<(), Error> {
    let (report, _) = run(&format!("{}\nmbarrier.arrive.shared::cta.b64 %rd1, [bar], 3;", init(50)), 1, 32, 1, 32, 0)?;
    assert!(kinds(&report).contains(&FindingKind::Mbarrier));
    Ok(())
}

#[test]
fn lanes_that_exit_before_an_aligned_barrier_diverge() -> Result<(), Error> {
    let (report, _) = run("setp.gt.u32 %p1, %r0, 20;\n@%p1 ret;\nbar.sync 0;", 1, 64, 1, 32, 0)?;
    assert_eq!(kinds(&report), [FindingKind::BarrierDivergence]);
    let (report, _) = run("setp.gt.u32 %p1, %r0, 31;\n@%p1 ret;\nbar.sync 0;", 1, 64, 1, 32, 0)?;
    assert_eq!(kinds(&report), []);
    Ok(())
}

#[test]
fn a_barrier_in_one_arm_of_a_branch_diverges() -> Result<(), Error> {
    let (report, _) = run(
        "and.b32 %r1, %r0, 1;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra L;\nbar.sync 0;\nL:\nadd.u32 %r9, %r0, 1;",
        1,
        32,
        1,
        32,
        0,
    )?;
    assert_eq!(kinds(&report), [FindingKind::BarrierDivergence]);
    Ok(())
}

#[test]
fn a_barrier_with_too_few_threads_is_a_deadlock() -> Result<(), Error> {
    let (report, _) = run("bar.sync 1, 96;", 1, 64, 1, 32, 0)?;
    assert_eq!(kinds(&report), [FindingKind::Deadlock]);
    Ok(())
}

#[test]
fn a_flag_needs_release_and_acquire_or_fences() -> Result<(), Error> {
    // Block 0 writes word 40 and sets the flag in word 41; block 1 waits for it and reads.
    let kernel = |store: &str, load: &str| {
        format!(
            "mov.u32 %r1, %ctaid.x;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\nsetp.eq.u32 %p2, %r1, 1;\n@%p2 bra READ;\n\
             st.global.u32 [%rd0+160], 5;\n{store}\nret;\nREAD:\n{load}\nsetp.eq.u32 %p3, %r2, 0;\n@%p3 bra READ;\nFENCE\nld.global.u32 %r9, [%rd0+160];\n{STORE}"
        )
    };
    let relaxed = "ld.relaxed.gpu.global.u32 %r2, [%rd0+164];";
    let good = [
        kernel("st.release.gpu.global.u32 [%rd0+164], 1;", "ld.acquire.gpu.global.u32 %r2, [%rd0+164];")
            .replace("FENCE\n", ""),
        kernel("fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%rd0+164], 1;", relaxed)
            .replace("FENCE", "fence.acq_rel.gpu;"),
        kernel("membar.gl; st.volatile.global.u32 [%rd0+164], 1;", "ld.volatile.global.u32 %r2, [%rd0+164];")
            .replace("FENCE", "membar.gl;"),
        kernel("fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%rd0+164], 1;", relaxed)
            .replace("FENCE", "fence.acq_rel.gpu;"),
        kernel("red.release.gpu.global.add.u32 [%rd0+164], 1;", "atom.acquire.gpu.global.add.u32 %r2, [%rd0+164], 0;")
            .replace("FENCE\n", ""),
    ];
    for seed in 0..4 {
        for k in &good {
            let (report, out) = run(k, 2, 32, 1, 64, seed)?;
            assert_eq!((kinds(&report), out[32]), (vec![], 5), "{k}\n{:?}", report.findings);
        }
        let no_fence =
            kernel("fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%rd0+164], 1;", relaxed).replace("FENCE\n", "");
        assert_eq!(kinds(&run(&no_fence, 2, 32, 1, 64, seed)?.0), [FindingKind::Race]);
        let block_scope = kernel("fence.acq_rel.cta; st.relaxed.gpu.global.u32 [%rd0+164], 1;", relaxed)
            .replace("FENCE", "fence.acq_rel.cta;");
        assert_eq!(kinds(&run(&block_scope, 2, 32, 1, 64, seed)?.0), [FindingKind::Race]);
    }
    Ok(())
}

#[test]
fn st_async_reaches_the_peer_and_counts_its_bytes() -> Result<(), Error> {
    // Every lane sends its number to the peer's tile; the peer waits for 128 bytes.
    let body = format!(
        "{}\n@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n\
         mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mov.u32 %r3, tile; mapa.shared::cluster.u32 %r4, %r3, %r2;\n\
         mov.u32 %r5, bar; mapa.shared::cluster.u32 %r6, %r5, %r2; shl.b32 %r7, %r0, 2; add.u32 %r4, %r4, %r7; mad.lo.u32 %r8, %r1, 100, %r0;\n\
         st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r4], %r8, [%r6];\n\
         W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra W;\nadd.u32 %r3, %r3, %r7; ld.shared.u32 %r9, [%r3];\n{STORE}\n\
         barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;",
        init(1)
    );
    for seed in 0..4 {
        let (report, out) = run(&body, 2, 32, 2, 64, seed)?;
        assert_eq!(kinds(&report), [], "{:?}", report.findings);
        assert_eq!((out[3], out[35]), (103, 3));
    }
    let wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra W;";
    // A try has a time limit, so one without a loop around it is no wait, whatever the schedule.
    for instead in ["", "mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0;"] {
        let early = body.replace(wait, instead);
        for seed in 0..4 {
            let (report, _) = run(&early, 2, 32, 2, 64, seed)?;
            assert!(kinds(&report).contains(&FindingKind::MissingWait), "{instead} {seed}");
        }
    }
    Ok(())
}

#[test]
fn a_launch_may_end_at_its_first_finding() -> Result<(), Error> {
    // Each of four blocks has two races.
    let body = format!(
        "mov.u32 %r3, tile; st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r9, [%r3]; bar.sync 0; st.shared.u32 [%r3], %r0;\n{STORE}"
    );
    let with =
        |first| Ok::<_, Error>(run_with(&body, 4, 32, 1, 128, Options { first, ..Options::default() })?.0.findings);
    let (all, first) = (with(false)?, with(true)?);
    let times = |findings: &[moec_sim::Finding]| findings.iter().map(|f| f.times).sum::<u64>();
    assert!(times(&all) > times(&first) && times(&first) > 0, "{all:?} {first:?}");
    assert!(first.iter().all(|f| f.block == [0, 0, 0]), "{first:?}");
    Ok(())
}

#[test]
fn warps_of_a_block_share_nothing_without_a_barrier() -> Result<(), Error> {
    let body = |sync: &str| {
        format!(
            "mov.u32 %r3, tile; shl.b32 %r7, %r0, 2; add.u32 %r4, %r3, %r7; st.shared.u32 [%r4], %r0;\n{sync}\nxor.b32 %r5, %r7, 128; add.u32 %r5, %r3, %r5; ld.shared.u32 %r9, [%r5];\n{STORE}"
        )
    };
    for seed in 0..4 {
        assert!(
            kinds(&run(&body(""), 1, 64, 1, 64, seed)?.0)
                .iter()
                .any(|k| matches!(k, FindingKind::Race | FindingKind::Uninitialized))
        );
        let (report, out) = run(&body("bar.sync 0;"), 1, 64, 1, 64, seed)?;
        assert_eq!((kinds(&report), out[0], out[40]), (vec![], 32, 8));
    }
    Ok(())
}

#[test]
fn a_copy_of_unwritten_memory_is_named_with_its_reader() -> Result<(), Error> {
    // Nothing writes the buffer that a bulk copy carries to shared memory.
    let ptx = "
.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 from, .param .u64 out)
{
  .reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>;
  .shared .align 128 .b8 tile[64];
  .shared .align 8 .b64 bar;
  ld.param.u64 %rd0, [from];
  ld.param.u64 %rd1, [out];
  mbarrier.init.shared::cta.b64 [bar], 1;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [tile], [%rd0], 64, [bar];
W:
  mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0;
  @!%p1 bra W;
  ld.shared.u32 %r1, [tile];
  st.global.u32 [%rd1], %r1;
  ret;
}";
    let module = Module::parse(ptx)?;
    let mut memory = Memory::new();
    let (from, out) = (memory.alloc(64, 256), memory.alloc(4, 256));
    let args = vec![Arg::U64(from), Arg::U64(out)];
    let l =
        Launch { entry: "k", grid: [1; 3], block: [1; 3], cluster: [1; 3], dynamic_shared: 0, args, dependent: false };
    let report = launch(&module, &mut memory, &l, &Options::default())?;
    let lines: Vec<u32> = report.findings.iter().map(|f| f.line).collect();
    assert_eq!((kinds(&report), lines), (vec![FindingKind::Uninitialized], vec![14, 18]), "{:?}", report.findings);
    Ok(())
}

#[test]
fn lanes_call_functions_of_their_own() -> Result<(), Error> {
    let ptx = "
.version 8.0
.target sm_80
.address_size 64
.func (.param .b32 r) twice(.param .b32 x) { .reg .b32 %r<3>; ld.param.b32 %r1, [x]; add.u32 %r2, %r1, %r1; st.param.b32 [r], %r2; ret; }
.func (.param .b32 r) square(.param .b32 x) { .reg .b32 %r<3>; ld.param.b32 %r1, [x]; mul.lo.u32 %r2, %r1, %r1; st.param.b32 [r], %r2; ret; }
.global .align 8 .u64 table[2] = {twice, square};
.visible .entry k(.param .u64 out) {
  .reg .b32 %r<8>; .reg .b64 %rd<8>; .param .b32 give; .param .b32 take;
  mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 1;
  mov.u64 %rd1, table; mul.wide.u32 %rd2, %r2, 8; add.u64 %rd3, %rd1, %rd2; ld.global.u64 %rd4, [%rd3];
  st.param.b32 [give], %r1;
  prototype: .callprototype (.param .b32 _) _ (.param .b32 _);
  call (take), %rd4, (give), prototype;
  ld.param.b32 %r3, [take];
  ld.param.u64 %rd5, [out]; mul.wide.u32 %rd6, %r1, 4; add.u64 %rd7, %rd5, %rd6; st.global.u32 [%rd7], %r3;
  ret;
}";
    let module = Module::parse(ptx)?;
    let mut memory = Memory::new();
    let out = memory.alloc(128, 256);
    let args = vec![Arg::U64(out)];
    let l = Launch {
        entry: "k",
        grid: [1; 3],
        block: [32, 1, 1],
        cluster: [1; 3],
        dynamic_shared: 0,
        args,
        dependent: false,
    };
    let report = launch(&module, &mut memory, &l, &Options { max_instructions: 10_000, ..Options::default() })?;
    assert_eq!(kinds(&report), []);
    let words = memory.read(out, 128)?;
    for (i, word) in words.chunks_exact(4).enumerate() {
        assert_eq!(usize::from(word[0]) | usize::from(word[1]) << 8, if i % 2 == 0 { 2 * i } else { i * i });
    }
    Ok(())
}

#[test]
fn a_lane_may_wait_for_other_blocks_while_the_rest_is_at_a_barrier() -> Result<(), Error> {
    let body = "setp.ne.u32 %p0, %r0, 0; @%p0 bra MEET; membar.gl; atom.global.add.u32 %r1, [%rd0], 1;\n\
        LOOP: ld.volatile.global.u32 %r2, [%rd0]; setp.lt.u32 %p1, %r2, 3; @%p1 bra LOOP; membar.gl;\n\
        MEET: bar.sync 0; st.global.u32 [%rd0+4], 7;";
    for seed in 0..4 {
        let (report, out) = run(body, 3, 64, 1, 2, seed)?;
        assert_eq!((kinds(&report), out), (vec![], vec![3, 7]), "seed {seed}");
    }
    // One block too few: the lanes at the barrier are not to blame.
    let (report, _) = run(body, 2, 64, 1, 2, 0)?;
    assert_eq!(kinds(&report), [FindingKind::Deadlock]);
    Ok(())
}

#[test]
fn a_launch_that_starts_early_waits_before_it_uses_results() -> Result<(), Error> {
    let text = |body: &str| {
        format!(
            ".version 8.7\n.target sm_90a\n.address_size 64\n.entry k(.param .u64 from, .param .u64 to)\n{{\n.reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .pred %p;\n\
             ld.param.u64 %rd0, [from]; ld.param.u64 %rd1, [to]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 4;\n\
             add.u64 %rd3, %rd0, %rd2; add.u64 %rd4, %rd1, %rd2;\n{body}\nret;\n}}"
        )
    };
    let copy = "ld.global.u32 %r1, [%rd3]; add.u32 %r1, %r1, 1; st.global.u32 [%rd4], %r1;";
    let cases = [
        (format!("griddepcontrol.wait; {copy}"), true),
        // One thread waits and the barrier tells the others.
        (format!("setp.ne.u32 %p, %r0, 0; @%p bra ON; griddepcontrol.wait; ON: bar.sync 0; {copy}"), true),
        // What no launch has written may be read at once.
        (format!("ld.global.u32 %r2, [%rd4]; griddepcontrol.wait; {copy}"), true),
        (format!("{copy} griddepcontrol.wait;"), false),
        (format!("setp.ne.u32 %p, %r0, 0; @%p bra ON; griddepcontrol.wait; ON: {copy}"), false),
        ("griddepcontrol.launch_dependents; st.global.u32 [%rd3], %r0; griddepcontrol.wait;".into(), false),
    ];
    for (body, fine) in cases {
        let (first, second) =
            (Module::parse(&text(&format!("griddepcontrol.wait; {copy}")))?, Module::parse(&text(&body))?);
        let mut memory = Memory::new();
        let buffers: Vec<u64> = (0..3).map(|_| memory.alloc(256, 256)).collect();
        for b in &buffers {
            memory.write(*b, &[0; 256])?;
        }
        for (module, from, dependent) in [(&first, 0, false), (&second, 1, true)] {
            let args = vec![Arg::U64(buffers[from]), Arg::U64(buffers[from + 1])];
            let l = Launch {
                entry: "k",
                grid: [1; 3],
                block: [64, 1, 1],
                cluster: [1; 3],
                dynamic_shared: 0,
                args,
                dependent,
            };
            let report = launch(module, &mut memory, &l, &Options::default())?;
            let expected = if fine || !dependent { vec![] } else { vec![FindingKind::Race] };
            assert_eq!(kinds(&report), expected, "{body}");
        }
    }
    Ok(())
}

#[test]
fn an_unknown_instruction_is_an_error_with_its_line() {
    let e = Module::parse(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\nfrobnicate.b32 1;\nret;\n}\n",
    );
    assert!(matches!(e, Err(Error::Unsupported { line: 6, .. })), "{e:?}");
}

#[test]
fn a_missing_operand_is_named_with_its_line() {
    let wanted = [
        ("add.s32 %r1, %r2;", "`add.s32`: operand 3 is missing"),
        ("fma.rn.f32 %f1, %f2, %f3;", "operand 4 is missing"),
        ("mov.u32 %r1;", "operand 2 is missing"),
        ("bra;", "operand 1 is missing"),
        ("setp.eq.u32 %p0, %r1;", "operand 3 is missing"),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1];", "operand 3 is missing"),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2;",
            "operand 4 is missing",
        ),
        ("mbarrier.arrive.shared::cta.b64 %rd1;", "operand 2 is missing"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31;", "operand 5 is missing"),
    ];
    for (text, part) in wanted {
        let ptx = format!(
            ".version 8.0\n.target sm_90a\n.entry k()\n{{\n.reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %rd<2>; .reg .pred %p<2>;\n{text}\n}}"
        );
        let said = Module::parse(&ptx).expect_err(text).to_string();
        assert!(said.contains(part) && said.contains('6'), "{text}: {said}");
    }
}

#[test]
fn names_and_operands_may_end_anywhere() {
    // Every instruction of the cases, with its operands and the parts of its name cut off from behind.
    let cases = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/ptx-cases");
    let mut shapes = std::collections::BTreeSet::new();
    let mut cut = 0;
    for file in std::fs::read_dir(cases).into_iter().flatten().flatten() {
        let bytes = std::fs::read(file.path()).unwrap_or_default();
        let Ok((_, header)) = safetensors::SafeTensors::read_metadata(&bytes) else { continue };
        let Some(ptx) = header.metadata().as_ref().and_then(|m| m.get("ptx")) else { continue };
        let Some((head, body)) = ptx.split_once("\n{") else { continue };
        let registers: String = body.lines().filter(|l| l.trim().starts_with(".reg")).collect();
        for line in body.lines().map(str::trim).filter(|l| l.ends_with(';') && !l.starts_with(['.', '@', '$', '{'])) {
            let (name, operands) = line.trim_end_matches(';').split_once(char::is_whitespace).unwrap_or((line, ""));
            if !shapes.insert(name.to_owned()) {
                continue;
            }
            let (parts, list): (Vec<_>, Vec<_>) = (name.split('.').collect(), operands.split(", ").collect());
            for (n, k) in (0..=list.len()).map(|k| (parts.len(), k)).chain((1..parts.len()).map(|n| (n, list.len()))) {
                let text = format!("{head}\n{{{registers} {} {};\n}}", parts[..n].join("."), list[..k].join(", "));
                cut += usize::from(Module::parse(&text).is_err());
            }
        }
    }
    assert!(shapes.len() > 250 && cut > 1000, "{} instructions, {cut} refused", shapes.len());
}

#[test]
fn hostile_text_is_refused_and_does_not_crash() {
    for text in [
        "",
        ".entry",
        ".visible .entry k(",
        "{{{{",
        ".global .b8 x[99999999999999999999];",
        ".entry k() { mov.b32 {a, b}, [",
        ".entry k() { @ }",
        "\"",
        "/*",
        ".func f() { call f, (1,2); }",
    ] {
        let _ = Module::parse(text);
    }
    let deep = format!(".entry k() {{ mov.b32 {}1; }}", "{".repeat(100_000));
    assert!(Module::parse(&deep).is_err());
}

#[test]
fn three_dimensional_boxes_land_with_every_swizzle() -> Result<(), Error> {
    let ptx = "
.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .align 64 .b8 map[128], .param .align 64 .b8 back[128], .param .u64 out)
{
  .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
  .shared .align 1024 .b8 tile[2048];
  .shared .align 8 .b64 bar;
  mov.u32 %r0, %tid.x;
  ld.param.u64 %rd0, [out];
  mov.b64 %rd1, map; cvta.param.u64 %rd1, %rd1;
  mov.b64 %rd2, back; cvta.param.u64 %rd2, %rd2;
  setp.ne.u32 %p0, %r0, 0;
  @!%p0 mbarrier.init.shared::cta.b64 [bar], 1;
  bar.sync 0;
  @%p0 bra WAIT;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;
  cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [tile], [%rd1, {4, -1, 1}], [bar];
WAIT:
  mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0;
  @!%p1 bra WAIT;
  mov.u32 %r3, tile; shl.b32 %r4, %r0, 2; add.u32 %r3, %r3, %r4;
  cvt.u64.u32 %rd3, %r4; add.u64 %rd3, %rd0, %rd3;
LOOP:
  ld.shared.u32 %r5, [%r3];
  st.global.u32 [%rd3], %r5;
  add.u32 %r3, %r3, 128; add.u64 %rd3, %rd3, 128; add.u32 %r4, %r4, 128;
  setp.lt.u32 %p2, %r4, 512;
  @%p2 bra LOOP;
  @%p0 bra END;
  cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%rd2, {4, -1, 1}], [tile];
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group 0;
END:
  ret;
}";
    let module = Module::parse(ptx)?;
    for (swizzle, span) in [(Swizzle::None, 32u64), (Swizzle::B32, 32), (Swizzle::B64, 32), (Swizzle::B128, 32)] {
        for seed in 0..3 {
            let mut memory = Memory::new();
            let (dims, boxes) = ([16u64, 5, 4], [8u32, 4, 4]);
            let source = memory.alloc(16 * 5 * 4 * 4, 256);
            let data: Vec<u8> = (0..320u32).flat_map(u32::to_le_bytes).collect();
            memory.write(source, &data)?;
            let sums = memory.alloc(16 * 5 * 4 * 4, 256);
            memory.write(sums, &data)?;
            let out = memory.alloc(512, 256);
            let map = |base| TensorMapDesc {
                dtype: MapType::U32,
                base,
                dims: dims.to_vec(),
                strides: vec![64, 320],
                box_dims: boxes.to_vec(),
                element_strides: Vec::new(),
                swizzle,
            };
            let args = vec![Arg::TensorMap(map(source)), Arg::TensorMap(map(sums)), Arg::U64(out)];
            let l = Launch {
                entry: "k",
                grid: [1; 3],
                block: [32, 1, 1],
                cluster: [1; 3],
                dynamic_shared: 0,
                args,
                dependent: false,
            };
            let report = launch(&module, &mut memory, &l, &Options { seed, ..Options::default() })?;
            assert_eq!(kinds(&report), [], "{:?}", report.findings);
            let got = memory.read(out, 512)?;
            let back = memory.read(sums, 1280)?;
            let word = |b: &[u8], i: usize| u32::from_le_bytes([b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]]);
            for z in 0..4u64 {
                for y in 0..4u64 {
                    for x in 0..8u64 {
                        let (gx, gy, gz) = (x + 4, y as i64 - 1, z + 1);
                        let inside = gy >= 0 && gz < 4;
                        let index = (gz * 80 + gy.unsigned_abs() * 16 + gx) as usize;
                        let want = if inside { index as u32 } else { 0 };
                        let at = swizzle.apply((z * 4 + y) * span + x * 4) as usize / 4;
                        assert_eq!(word(&got, at), want, "{swizzle:?} {x} {y} {z}");
                        if inside {
                            assert_eq!(word(&back, index), 2 * want);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn red_async_adds_without_a_race_and_is_awaited() -> Result<(), Error> {
    // Two threads of the peer add to each word.
    let body = |wait: &str| {
        format!(
            "{}\n@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;\nmov.u32 %r3, tile; and.b32 %r7, %r0, 31; shl.b32 %r7, %r7, 2; add.u32 %r8, %r3, %r7;\n\
             mov.u32 %r10, 0; setp.lt.u32 %p4, %r0, 32; @%p4 st.shared.u32 [%r8], %r10;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n\
             mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mapa.shared::cluster.u32 %r4, %r8, %r2; mov.u32 %r5, bar; mapa.shared::cluster.u32 %r6, %r5, %r2;\n\
             red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r4], %r0, [%r6];\n{wait}\nld.shared.u32 %r9, [%r8];\n@!%p4 bra END; {STORE}\nEND:\n\
             barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;",
            init(1)
        )
    };
    let wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra W;";
    for seed in 0..4 {
        let (report, out) = run(&body(wait), 2, 64, 2, 64, seed)?;
        assert_eq!(kinds(&report), [], "{:?}", report.findings);
        assert_eq!(out[3], 3 + 35);
        assert!(kinds(&run(&body(""), 2, 64, 2, 64, seed)?.0).contains(&FindingKind::MissingWait));
    }
    Ok(())
}

#[test]
fn bytes_that_nobody_expected_are_not_awaited() -> Result<(), Error> {
    let body = |expected: u32| {
        format!(
            "{}\n@!%p0 bra W;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {expected};\nmov.u32 %r1, tile; add.u32 %r2, %r1, 64;\n\
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 64, [bar];\n\
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 64, [bar];\n\
             W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra W;\nmov.u32 %r1, tile; mad.lo.u32 %r1, %r0, 4, %r1; ld.shared.u32 %r9, [%r1];\n\
             mbarrier.arrive.shared::cta.b64 %rd1, [bar];",
            init(1)
        )
    };
    for seed in 0..8 {
        assert_eq!(
            kinds(&run(&body(128).replace("mbarrier.arrive.shared::cta.b64 %rd1, [bar];", ""), 1, 32, 1, 32, seed)?.0),
            []
        );
        let few = kinds(&run(&body(64), 1, 32, 1, 32, seed)?.0);
        assert!(few.contains(&FindingKind::MissingWait), "{seed} {few:?}");
    }
    Ok(())
}

#[test]
fn the_carry_of_a_subtraction_is_set_where_nothing_is_borrowed() -> Result<(), Error> {
    // 64-bit differences by halves, and the carry as an addition sees it.
    let body = format!(
        "mov.u32 %r1, 5; mov.u32 %r2, 9; sub.cc.u32 %r3, %r0, %r1; subc.cc.u32 %r4, %r2, 3; addc.u32 %r5, 0, 0;\n\
         sub.cc.u32 %r6, %r0, %r1; addc.u32 %r6, 0, 0; mul.lo.u32 %r9, %r4, 100; mad.lo.u32 %r9, %r5, 10, %r9; add.u32 %r9, %r9, %r6;\n{STORE}"
    );
    let out = run(&body, 1, 32, 1, 32, 0)?.1;
    assert_eq!((out[4], out[5], out[6]), (510, 611, 611));
    Ok(())
}

#[test]
fn a_copy_that_arrives_at_an_mbarrier_is_known_to_its_own_thread() -> Result<(), Error> {
    // The same thread copies to the same place again, once the mbarrier has told it of the first copy.
    let copy = "cp.async.ca.shared.global [%r1], [%rd0+128], 4; cp.async.mbarrier.arrive.noinc.shared::cta.b64 [bar];";
    let body = |wait: &str| {
        format!(
            "{}\nmov.u32 %r1, tile; mad.lo.u32 %r1, %r0, 4, %r1; {copy}\n{wait}\n{copy}\n\
             V: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 1; @!%p1 bra V; ld.shared.u32 %r9, [%r1]; {STORE}",
            init(32)
        )
    };
    let wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra W;";
    for seed in 0..4 {
        assert_eq!(kinds(&run(&body(wait), 1, 32, 1, 64, seed)?.0), []);
        assert!(kinds(&run(&body(""), 1, 32, 1, 64, seed)?.0).contains(&FindingKind::MissingWait));
    }
    Ok(())
}

#[test]
fn warps_of_a_warpgroup_resize_their_registers_together() -> Result<(), Error> {
    let guarded = |guard: &str| {
        format!("setp.lt.u32 %p0, %r0, {guard}; @!%p0 bra DONE;\nsetmaxnreg.dec.sync.aligned.u32 40;\nDONE:\n")
    };
    assert_eq!(kinds(&run(&guarded("128"), 1, 256, 1, 32, 0)?.0), []);
    let (report, _) = run(&guarded("96"), 1, 256, 1, 32, 0)?;
    let found: Vec<_> = report.findings.iter().map(|f| (f.kind, f.line, f.times)).collect();
    assert_eq!(found, [(FindingKind::Misuse, 16, 3)]);
    Ok(())
}

#[test]
fn blocks_of_a_grid_meet_at_its_workspace() -> Result<(), Error> {
    // What cooperative groups do: each block adds itself and waits until all have; then it reads its neighbour's word.
    let body = "mov.u32 %r1, %envreg2; mov.u32 %r2, %envreg1; cvt.u64.u32 %rd1, %r1; cvt.u64.u32 %rd2, %r2;\n\
         bfi.b64 %rd3, %rd2, %rd1, 32, 32; mov.u32 %r3, %ctaid.x; add.u32 %r4, %r3, 5; mul.wide.u32 %rd4, %r3, 4; add.u64 %rd4, %rd0, %rd4;\n\
         st.global.u32 [%rd4], %r4; fence.acq_rel.gpu; atom.add.relaxed.gpu.global.u32 %r5, [%rd3+4], 1;\n\
         W: ld.relaxed.gpu.global.u32 %r6, [%rd3+4]; setp.lt.u32 %p0, %r6, 3; @%p0 bra W; fence.acq_rel.gpu;\n\
         add.u32 %r7, %r3, 1; rem.u32 %r7, %r7, 3; mul.wide.u32 %rd5, %r7, 4; add.u64 %rd5, %rd0, %rd5;\n\
         ld.global.u32 %r8, [%rd5]; st.global.u32 [%rd4+12], %r8;";
    for seed in 0..3 {
        let (report, out) = run(body, 3, 1, 1, 6, seed)?;
        assert_eq!((kinds(&report), &out[..]), (vec![], &[5, 6, 7, 6, 7, 5][..]));
    }
    Ok(())
}

#[test]
fn a_launch_that_does_not_wait_may_end_before_those_before_it() -> Result<(), Error> {
    let text = |body: &str| {
        format!(
            ".version 8.7\n.target sm_90a\n.address_size 64\n.entry k(.param .u64 at)\n{{\n.reg .b32 %r<8>; .reg .b64 %rd<8>;\n\
             ld.param.u64 %rd0, [at];\n{body}\nret;\n}}"
        )
    };
    let wait = "griddepcontrol.wait; griddepcontrol.launch_dependents;";
    let (writes, reads) = ("st.global.u32 [%rd0], 7;", "ld.global.u32 %r1, [%rd0]; st.global.u32 [%rd0+8], %r1;");
    let never = "setp.eq.u64 %p, %rd0, 0; @!%p bra ON; griddepcontrol.wait; ON:";
    for (between, fine) in [(wait.to_owned(), true), (format!(".reg .pred %p; {never}"), false)] {
        let bodies =
            [format!("{wait} {writes}"), format!("{between} st.global.u32 [%rd0+4], 1;"), format!("{wait} {reads}")];
        let mut memory = Memory::new();
        let buffer = memory.alloc(256, 256);
        for (i, body) in bodies.iter().enumerate() {
            let l = Launch {
                entry: "k",
                grid: [1; 3],
                block: [1; 3],
                cluster: [1; 3],
                dynamic_shared: 0,
                args: vec![Arg::U64(buffer)],
                dependent: i > 0,
            };
            let report = launch(&Module::parse(&text(body))?, &mut memory, &l, &Options::default())?;
            let expected = if fine || i < 2 { vec![] } else { vec![FindingKind::Race] };
            assert_eq!(kinds(&report), expected, "{body}");
        }
    }
    Ok(())
}
