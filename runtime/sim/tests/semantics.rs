//! Small kernels for the rules that are easy to get wrong: phases, fences, divergence, calls.

mod support;

use moec_sim::{Arg, Error, FindingKind, Lanes, Launch, Memory, Module, Options, launch};
use support::{STORE, init, kinds, run, run_with};

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
