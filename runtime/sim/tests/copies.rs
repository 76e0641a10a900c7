//! Asynchronous copies and stores: what lands, where, and who may rely on it.

mod support;

use moec_sim::{Arg, Error, FindingKind, Launch, MapType, Memory, Module, Options, Swizzle, TensorMapDesc, launch};
use support::{STORE, init, kinds, run};

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
