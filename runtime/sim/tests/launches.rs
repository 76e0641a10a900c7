//! Launches among others, and the whole grid of one.

mod support;

use moec_sim::{Arg, Error, FindingKind, Launch, Memory, Module, Options, launch};
use support::{STORE, kinds, run, run_with};

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
