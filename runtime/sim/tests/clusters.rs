//! What a block does in the shared memory of another one, which must not have ended by then.

mod support;

use moec_sim::{Error, FindingKind};
use support::{init, kinds, run};

const MEET: &str = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;";
const WAIT: &str = "W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra W;";
const ARRIVE: &str = "@%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];";
const EXPECT: &str = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;";
/// Lines of a kernel before its body.
const HEAD: usize = 14;

/// Two blocks make `bar` for one arrival and clear a word, meet between `before` and `after`, and end; `%p0` is one
/// thread of each, `%r3` and `%r4` are `bar` and `tile` of the other one, `%p2` is for the first block.
fn pair(before: &str, after: &str) -> String {
    format!(
        "{}\nmov.u32 %r1, %cluster_ctarank;\nxor.b32 %r2, %r1, 1;\nsetp.eq.u32 %p2, %r1, 0;\nand.pred %p2, %p2, %p0;\n\
         mov.u32 %r5, bar;\nmapa.shared::cluster.u32 %r3, %r5, %r2;\nmov.u32 %r6, tile;\nmapa.shared::cluster.u32 %r4, %r6, %r2;\n\
         mov.u32 %r7, 0;\nmov.b16 %h0, 3;\n@%p0 st.shared.u32 [tile+128], %r7;\n{before}\n{MEET}\n{after}",
        init(1)
    )
    .replacen("setp", ".reg .b16 %h<2>; setp", 1)
}

/// What comes between arrival and wait of a meeting: before the end of both blocks, but not known to be.
fn between(access: &str) -> String {
    MEET.replace('\n', &format!("\n{access}\n"))
}

fn right(before: &str, after: &str) -> Result<(), Error> {
    for seed in 0..8 {
        let (report, _) = run(&pair(before, after), 2, 64, 2, 64, seed)?;
        assert_eq!(kinds(&report), [], "{after} {seed}: {:?}", report.findings);
    }
    Ok(())
}

/// Under every schedule the instruction with `culprit` is found, and no other one.
fn wrong(before: &str, after: &str, culprit: &str) -> Result<(), Error> {
    let text = pair(before, after);
    for seed in 0..8 {
        let (report, _) = run(&text, 2, 64, 2, 64, seed)?;
        assert_eq!(kinds(&report), [FindingKind::Race], "{after} {seed}: {:?}", report.findings);
        for f in &report.findings {
            let line = text.lines().nth(f.line as usize - HEAD - 1).unwrap_or("");
            assert!(line.contains(culprit) && f.message.contains("may have ended"), "{after} {seed}: {f}");
        }
    }
    Ok(())
}

#[test]
fn nobody_arrives_at_an_mbarrier_of_a_block_that_may_have_ended() -> Result<(), Error> {
    wrong("", ARRIVE, "mbarrier.arrive")?;
    right("", &format!("{ARRIVE}\n{MEET}"))?;
    // Without a meeting: each waits for what the other one does at its own.
    right("", &format!("{ARRIVE}\n{WAIT}"))?;
    right("", &format!("{}\n{WAIT}", ARRIVE.replace("release", "relaxed")))?;
    right("", &format!("{}\n{MEET}", ARRIVE.replace("release", "relaxed")))?;
    wrong("", &between(ARRIVE), "mbarrier.arrive")?;
    // The phase that is awaited tells nothing of the next one.
    let next = "@%p2 mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%r3], 16;";
    wrong("", &format!("{ARRIVE}\n{WAIT}\n{next}"), next)
}

#[test]
fn nobody_copies_to_a_block_that_may_have_ended() -> Result<(), Error> {
    let copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes";
    let one = format!("@%p0 {copy} [%r4], [%rd0], 64, [%r3];");
    let both = format!("@%p2 {copy}.multicast::cluster [%r6], [%rd0], 64, [%r5], %h0;");
    // A phase tells nothing of bytes that it did not expect.
    let two = format!("{one}\n@%p0 {copy} [%r4+64], [%rd0], 64, [%r3];\n{WAIT}");
    right(&EXPECT.replace("64;", "128;"), &two)?;
    wrong(EXPECT, &two, "cp.async.bulk")?;
    for copy in [one, both] {
        right(EXPECT, &format!("{copy}\n{WAIT}"))?;
        wrong(EXPECT, &copy, "cp.async.bulk")?;
        // All have issued theirs by then, but who knows when they land.
        wrong(EXPECT, &format!("{copy}\n{MEET}"), "cp.async.bulk")?;
    }
    let store = "shl.b32 %r8, %r0, 2;\nadd.u32 %r8, %r8, %r4;\nsetp.lt.u32 %p3, %r0, 16;\n\
        @%p3 st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8], %r0, [%r3];";
    right(EXPECT, &format!("{store}\n{WAIT}"))?;
    wrong(EXPECT, &format!("{store}\n{MEET}"), "st.async")
}

#[test]
fn no_memory_of_a_block_that_may_have_ended_is_used() -> Result<(), Error> {
    for access in [
        "red.relaxed.cluster.shared::cluster.add.u32 [%r4+128], %r0;",
        "ld.relaxed.cluster.shared::cluster.u32 %r9, [%r4+128];",
        "ld.shared::cluster.u32 %r9, [%r4+128];",
        "@%p0 st.shared::cluster.u32 [%r4+128], %r1;",
    ] {
        wrong("", access, access)?;
        wrong("", &between(access), access)?;
        right("", &format!("{access}\n{MEET}"))?;
    }
    Ok(())
}
