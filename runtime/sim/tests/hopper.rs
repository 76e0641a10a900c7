//! Instructions of sm_89 and sm_90 that few kernels use, against what the manual says of them.

use moec_sim::{
    Arg, Error, FindingKind, Launch, MapType, Memory, Module, Options, Report, Swizzle, TensorMapDesc, launch,
};

/// What a kernel with the parameters `out` (words of zeros) and `map` (a tensor map over `data`) gives.
struct Bench {
    grid: u32,
    block: u32,
    cluster: u32,
    words: usize,
    /// Words of the mapped buffer, their number in a row, and the box.
    data: Vec<u32>,
    row: u64,
    tile: [u32; 2],
    target: &'static str,
}

impl Default for Bench {
    fn default() -> Self {
        let data = (0..256).collect();
        Bench { grid: 1, block: 32, cluster: 1, words: 32, data, row: 16, tile: [8, 4], target: "sm_90a" }
    }
}

impl Bench {
    fn run(&self, body: &str, seed: u64) -> Result<(Report, Vec<u32>, Vec<u32>), Error> {
        let ptx = format!(
            ".version 8.7\n.target {}\n.address_size 64\n.visible .entry k(.param .u64 out, .param .align 64 .b8 map[128], .param .u64 data)\n{{\n\
             .reg .pred %p<8>;\n.reg .b16 %h<16>;\n.reg .b32 %r<32>;\n.reg .b64 %rd<16>;\n.reg .f32 %f<16>;\n\
             .shared .align 1024 .b8 tile[4096];\n.shared .align 8 .b64 bar;\n\
             ld.param.u64 %rd0, [out];\nld.param.u64 %rd15, [data];\nmov.u64 %rd13, map;\ncvta.param.u64 %rd13, %rd13;\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n",
            self.target
        );
        let module = Module::parse(&ptx)?;
        let mut memory = Memory::new();
        let out = memory.alloc(self.words as u64 * 4, 256);
        memory.write(out, &vec![0; self.words * 4])?;
        let bytes: Vec<u8> = self.data.iter().flat_map(|w| w.to_le_bytes()).collect();
        let data = memory.alloc(bytes.len() as u64, 256);
        memory.write(data, &bytes)?;
        let map = TensorMapDesc {
            dtype: MapType::U32,
            base: data,
            dims: vec![self.row, self.data.len() as u64 / self.row],
            strides: vec![self.row * 4],
            box_dims: self.tile.to_vec(),
            element_strides: Vec::new(),
            swizzle: Swizzle::None,
        };
        let l = Launch {
            entry: "k",
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            cluster: [self.cluster, 1, 1],
            dynamic_shared: 0,
            dependent: false,
            args: vec![Arg::U64(out), Arg::TensorMap(map), Arg::U64(data)],
        };
        let report =
            launch(&module, &mut memory, &l, &Options { seed, max_instructions: 2_000_000, ..Options::default() })?;
        let words = |b: Vec<u8>| b.as_chunks().0.iter().map(|c| u32::from_le_bytes(*c)).collect();
        Ok((report, words(memory.read(out, self.words as u64 * 4)?), words(memory.read(data, bytes.len() as u64)?)))
    }

    /// The result when nothing is found, for several seeds.
    fn clean(&self, body: &str) -> Result<(Vec<u32>, Vec<u32>), Error> {
        let (report, out, data) = self.run(body, 0)?;
        assert_eq!(kinds(&report), []);
        for seed in 1..6 {
            let (report, again, later) = self.run(body, seed)?;
            assert_eq!((kinds(&report), again, later), (vec![], out.clone(), data.clone()), "seed {seed}");
        }
        Ok((out, data))
    }
}

fn kinds(r: &Report) -> Vec<FindingKind> {
    let mut k: Vec<_> = r.findings.iter().map(|f| f.kind).collect();
    k.sort();
    k.dedup();
    k
}

/// Stores `%r9` to the word of the thread among all blocks.
const STORE: &str = "mov.u32 %r30, %ctaid.x; mov.u32 %r31, %ntid.x; mad.lo.u32 %r30, %r30, %r31, %r0; mul.wide.u32 %rd14, %r30, 4; add.u64 %rd14, %rd0, %rd14; st.global.u32 [%rd14], %r9;";

/// Thread 0 makes `bar` for one arrival and expects `tx` bytes.
fn expect(tx: u32) -> String {
    format!(
        "setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [bar], 1; fence.mbarrier_init.release.cluster; bar.sync 0;\n\
         @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {tx};\n"
    )
}

const WAIT: &str = "W: mbarrier.try_wait.parity.shared::cta.b64 %p7, [bar], 0; @!%p7 bra W;\n";

#[test]
fn elect_chooses_one_lane_of_the_mask() -> Result<(), Error> {
    let (out, _) = Bench::default().clean(&format!(
        "setp.ge.u32 %p1, %r0, 5; mov.u32 %r9, 9; @!%p1 bra END; elect.sync %r1|%p2, 0xffffffe0; selp.u32 %r9, 1, 0, %p2; mad.lo.u32 %r9, %r1, 100, %r9;\nEND: {STORE}"
    ))?;
    // The leader is the same for all, and one of those that take part.
    let leader = out[5] / 100;
    assert!((5..32).contains(&leader), "{out:?}");
    for (lane, v) in out.iter().enumerate() {
        let wanted = if lane < 5 { 9 } else { leader * 100 + u32::from(lane as u32 == leader) };
        assert_eq!(*v, wanted);
    }
    Ok(())
}

#[test]
fn redux_and_votes_work_on_the_lanes_of_the_mask() -> Result<(), Error> {
    // Odd lanes: the sum of 1, 3, .. 31 and their largest; the ballot of those above 20.
    let body = format!(
        "and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 1; mov.u32 %r9, 0; @!%p1 bra END;\n\
         redux.sync.add.u32 %r2, %r0, 0xaaaaaaaa; redux.sync.max.u32 %r3, %r0, 0xaaaaaaaa; setp.gt.u32 %p2, %r0, 20;\n\
         vote.sync.ballot.b32 %r4, %p2, 0xaaaaaaaa; match.any.sync.b32 %r5, %r1, 0xaaaaaaaa; setp.eq.u32 %p3, %r5, 0xaaaaaaaa;\n\
         popc.b32 %r4, %r4; mad.lo.u32 %r9, %r2, 100, %r3; mad.lo.u32 %r9, %r9, 100, %r4; selp.u32 %r9, %r9, 7, %p3;\nEND: {STORE}"
    );
    let (out, _) = Bench::default().clean(&body)?;
    for (lane, v) in out.iter().enumerate() {
        assert_eq!(*v, if lane % 2 == 1 { (256 * 100 + 31) * 100 + 6 } else { 0 });
    }
    Ok(())
}

#[test]
fn eight_and_four_bit_floats_convert() -> Result<(), Error> {
    // Pairs of e4m3 and e5m2 on sm_89: 1.5 and 448 stay, 500 saturates; -0.0625 and 3.
    let one = |convert: &str, a: f32, b: f32| {
        format!(
            "mov.f32 %f0, 0f{:08X}; mov.f32 %f1, 0f{:08X}; {convert} %h0, %f0, %f1; cvt.u32.u16 %r9, %h0; {STORE}",
            a.to_bits(),
            b.to_bits()
        )
    };
    let bench = Bench { target: "sm_89", ..Bench::default() };
    for (convert, a, b, wanted) in [
        ("cvt.rn.satfinite.e4m3x2.f32", 1.5, 448.0, 0x3c7e),
        ("cvt.rn.satfinite.e4m3x2.f32", 500.0, -0.0625, 0x7e98),
        ("cvt.rn.satfinite.e5m2x2.f32", 1.5, 57344.0, 0x3e7b),
        ("cvt.rn.satfinite.e5m2x2.f32", 1e9, -3.0, 0x7bc2),
    ] {
        let (out, _) = bench.clean(&one(convert, a, b))?;
        assert_eq!(out[0], wanted, "{convert} {a} {b}: {:04x}", out[0]);
    }
    // And back, through halves: e4m3 0x3c is 1.5, 0x7e is 448.
    let (out, _) = bench.clean(&format!("mov.b16 %h0, 0x3c7e; cvt.rn.f16x2.e4m3x2 %r9, %h0; {STORE}"))?;
    assert_eq!(out[0], 0x3e00_5f00);
    let (out, _) = bench.clean(&format!("mov.b16 %h0, 0x3ec2; cvt.rn.f16x2.e5m2x2 %r9, %h0; {STORE}"))?;
    assert_eq!(out[0], 0x3e00_c200);
    Ok(())
}

#[test]
fn pairs_of_e2m1_convert_both_ways() -> Result<(), Error> {
    let bench = Bench { target: "sm_100a", ..Bench::default() };
    for (a, b, wanted) in [(6.0f32, 0.5f32, 0x71), (100.0, -1.5, 0x7b), (2.5, 5.0, 0x46), (0.25, -0.75, 0x0a)] {
        let body = format!(
            "{{ .reg .b8 %b; mov.f32 %f0, 0f{:08X}; mov.f32 %f1, 0f{:08X}; cvt.rn.satfinite.e2m1x2.f32 %b, %f0, %f1; cvt.u32.u8 %r9, %b; }} {STORE}",
            a.to_bits(),
            b.to_bits()
        );
        let (out, _) = bench.clean(&body)?;
        assert_eq!(out[0], wanted, "{a} {b}: {:02x}", out[0]);
    }
    let (out, _) =
        bench.clean(&format!("{{ .reg .b8 %b; cvt.u8.u32 %b, 0xe1; cvt.rn.f16x2.e2m1x2 %r9, %b; }} {STORE}"))?;
    // -4 above, 0.5 below.
    assert_eq!(out[0], 0xc400_3800);
    Ok(())
}

#[test]
fn a_tensor_copy_reaches_all_blocks_of_the_mask() -> Result<(), Error> {
    // Block 0 loads for blocks 0 and 2 of a cluster of four; each waits on its own barrier.
    let bench = Bench { grid: 4, cluster: 4, words: 128, ..Bench::default() };
    let body = format!(
        "{}mov.u32 %r1, %cluster_ctarank; mov.u32 %r9, 0; and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0;\n\
         barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n\
         setp.eq.u32 %p3, %r1, 0; and.pred %p3, %p3, %p0; mov.b16 %h0, 5; mov.u32 %r3, 4; mov.u32 %r4, 2; mov.u32 %r5, tile; mov.u32 %r6, bar;\n\
         @%p3 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r5], [%rd13, {{%r3, %r4}}], [%r6], %h0;\n\
         @!%p2 bra END;\n{WAIT}mad.lo.u32 %r7, %r0, 4, %r5; ld.shared.u32 %r9, [%r7];\nEND: {STORE}\n\
         barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
        expect(128)
    );
    let (out, _) = bench.clean(&body)?;
    for (i, v) in out.iter().enumerate() {
        let (block, lane) = (i / 32, i % 32);
        let wanted = if block % 2 == 0 { (2 + lane / 8) * 16 + 4 + lane % 8 } else { 0 };
        assert_eq!(*v as usize, wanted, "block {block}, lane {lane}");
    }
    Ok(())
}

/// A tile of ones to `(4, 2)` by a tensor copy of this form.
fn from_ones(copy: &str) -> String {
    format!(
        "mov.u32 %r5, tile; mad.lo.u32 %r7, %r0, 4, %r5; mov.u32 %r8, 1; st.shared.u32 [%r7], %r8; fence.proxy.async.shared::cta; bar.sync 0;\n\
         setp.eq.u32 %p0, %r0, 0; mov.u32 %r3, 4; mov.u32 %r4, 2; @!%p0 bra END;\n\
         {copy} [%rd13, {{%r3, %r4}}], [%r5]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\nEND: mov.u32 %r9, 0; {STORE}"
    )
}

#[test]
fn tensor_copies_store_and_reduce() -> Result<(), Error> {
    type Rule = fn(u32) -> u32;
    let forms: [(&str, Rule); 5] = [
        ("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group", |_| 1),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group", |x| x + 1),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.max.bulk_group", |x| x.max(1)),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.and.bulk_group", |x| x & 1),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.xor.bulk_group", |x| x ^ 1),
    ];
    for (copy, rule) in forms {
        let (_, data) = Bench::default().clean(&from_ones(copy))?;
        for (i, v) in data.iter().enumerate() {
            let (row, column) = (i / 16, i % 16);
            let inside = (2..6).contains(&row) && (4..12).contains(&column);
            assert_eq!(*v, if inside { rule(i as u32) } else { i as u32 }, "{copy}: {i}");
        }
    }
    Ok(())
}

#[test]
fn lanes_may_store_the_same_tile_but_not_different_ones() -> Result<(), Error> {
    let copy = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group";
    let all = from_ones(copy).replace("@!%p0 bra END;", "");
    let (_, data) = Bench::default().clean(&all)?;
    assert_eq!(data, Bench::default().clean(&from_ones(copy))?.1);
    // Every lane takes its own tile to the one place.
    let apart =
        all.replace(copy, &format!("mad.lo.u32 %r5, %r0, 128, %r5; {copy}")).replace("tile[4096]", "tile[8192]");
    let (report, ..) = Bench::default().run(&apart, 0)?;
    assert!(kinds(&report).contains(&FindingKind::MissingWait), "{:?}", report.findings);
    Ok(())
}

#[test]
fn linear_copies_reduce() -> Result<(), Error> {
    let body = format!(
        "mov.u32 %r5, tile; mad.lo.u32 %r7, %r0, 4, %r5; mov.u32 %r8, 5; st.shared.u32 [%r7], %r8; fence.proxy.async.shared::cta; bar.sync 0;\n\
         setp.eq.u32 %p0, %r0, 0; @!%p0 bra END;\n\
         cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd15], [%r5], 128; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\nEND: mov.u32 %r9, 0; {STORE}"
    );
    let (_, data) = Bench::default().clean(&body)?;
    for (i, v) in data.iter().enumerate() {
        assert_eq!(*v, i as u32 + if i < 32 { 5 } else { 0 });
    }
    Ok(())
}

#[test]
fn prefetches_change_nothing() -> Result<(), Error> {
    let body = format!(
        "mov.u32 %r3, 0; prefetch.tensormap [%rd13]; cp.async.bulk.tensor.2d.L2.global.tile [%rd13, {{%r3, %r3}}];\n\
         cp.async.bulk.prefetch.L2.global [%rd15], 64; prefetch.global.L2 [%rd15]; mov.u32 %r9, 3; {STORE}"
    )
    .replace("cp.async.bulk.tensor.2d.L2.global.tile", "cp.async.bulk.prefetch.tensor.2d.L2.global.tile");
    let (out, data) = Bench::default().clean(&body)?;
    assert!(out.iter().all(|v| *v == 3) && data.iter().enumerate().all(|(i, v)| *v == i as u32));
    Ok(())
}

#[test]
fn shared_memory_of_a_peer_is_read_written_and_counted_up() -> Result<(), Error> {
    // Each block writes into its neighbour's tile, adds to a counter in block 0, and reads its own.
    let bench = Bench { grid: 2, cluster: 2, words: 64, ..Bench::default() };
    let body = format!(
        "mov.u32 %r5, tile; mad.lo.u32 %r7, %r0, 4, %r5; mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mov.u32 %r8, 0;\n\
         st.shared.u32 [%r7+128], %r8; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n\
         mapa.shared::cluster.u32 %r3, %r7, %r2; mad.lo.u32 %r4, %r1, 1000, %r0; st.shared::cluster.u32 [%r3], %r4;\n\
         mov.u32 %r10, 0; add.u32 %r11, %r5, 128; mapa.shared::cluster.u32 %r6, %r11, %r10; mov.u32 %r12, 1; red.relaxed.cluster.shared::cluster.add.u32 [%r6], %r12;\n\
         barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n\
         ld.shared.u32 %r9, [%r7]; ld.shared::cluster.u32 %r13, [%r6]; mad.lo.u32 %r9, %r13, 10000, %r9; {STORE}\n\
         barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    );
    let (out, _) = bench.clean(&body)?;
    for (i, v) in out.iter().enumerate() {
        let (block, lane) = (i / 32, i % 32);
        assert_eq!(*v as usize, 640_000 + (1 - block) * 1000 + lane);
    }
    Ok(())
}

#[test]
fn a_peer_that_may_have_left_is_not_read_in_peace() -> Result<(), Error> {
    // Without the last barrier the neighbour's memory may be gone; without the first it is not ordered.
    let bench = Bench { grid: 2, cluster: 2, words: 64, ..Bench::default() };
    let body = format!(
        "mov.u32 %r5, tile; mad.lo.u32 %r7, %r0, 4, %r5; mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; st.shared.u32 [%r7], %r1;\n\
         bar.sync 0; mapa.shared::cluster.u32 %r3, %r7, %r2; ld.shared::cluster.u32 %r9, [%r3]; {STORE}"
    );
    let (report, ..) = bench.run(&body, 0)?;
    assert!(kinds(&report).contains(&FindingKind::Race), "{:?}", report.findings);
    let sync = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;";
    let first = body.replace("bar.sync 0;", sync);
    for seed in 0..4 {
        assert_eq!(kinds(&bench.run(&first, seed)?.0), [FindingKind::Race], "{seed}");
        assert_eq!(kinds(&bench.run(&format!("{first} {sync}"), seed)?.0), [], "{seed}");
    }
    Ok(())
}

#[test]
fn registers_of_wgmma_are_fenced() -> Result<(), Error> {
    let mma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd1, %rd2, %p1, 1, 1, 0, 0;";
    let done = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;";
    let clear = "mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;";
    let fence = "wgmma.fence.sync.aligned;";
    let cases = [
        (format!("{clear} {fence} {mma} {mma} {done}"), true),
        (format!("{clear} {mma} {done}"), false),
        // Compilers put moves anywhere; what computes is another matter.
        (format!("{fence} {clear} {mma} {done}"), true),
        (format!("{clear} {fence} add.f32 %f1, %f1, %f1; {mma} {done}"), false),
        (format!("{clear} {fence} {mma} {done} add.f32 %f1, %f1, %f1; {mma} {done}"), false),
        (format!("{clear} {fence} {mma} {done} add.f32 %f1, %f1, %f1; {fence} {mma} {done}"), true),
    ];
    for (body, fine) in cases {
        // Rows of 16 bytes without a swizzle: all operands lie in the tile, which is cleared first.
        let head = "mov.u32 %r5, tile; mad.lo.u32 %r7, %r0, 16, %r5; mov.u32 %r8, 0; st.shared.v4.u32 [%r7], {%r8, %r8, %r8, %r8};\n\
             st.shared.v4.u32 [%r7+2048], {%r8, %r8, %r8, %r8}; fence.proxy.async.shared::cta; bar.sync 0;\n\
             shr.u32 %r6, %r5, 4; cvt.u64.u32 %rd1, %r6; mov.u64 %rd3, 0x0000000800400000; or.b64 %rd1, %rd1, %rd3; mov.u64 %rd2, %rd1;\n\
             setp.eq.u32 %p1, %r8, %r8;";
        let bench = Bench { block: 128, words: 128, ..Bench::default() };
        let (report, ..) = bench.run(&format!("{head}\n{body}\nmov.u32 %r9, 0; {STORE}"), 0)?;
        let expected = if fine { vec![] } else { vec![FindingKind::Misuse] };
        assert_eq!(kinds(&report), expected, "{body}: {:?}", report.findings);
    }
    Ok(())
}

#[test]
fn registers_change_hands_between_warpgroups() -> Result<(), Error> {
    let bench = Bench { block: 256, words: 256, ..Bench::default() };
    let body = format!(
        "setp.lt.u32 %p1, %r0, 128; @!%p1 bra OTHER; setmaxnreg.dec.sync.aligned.u32 40; mov.u32 %r9, 1; bra END;\n\
         OTHER: setmaxnreg.inc.sync.aligned.u32 232; mov.u32 %r9, 2;\nEND: {STORE}"
    );
    let (out, _) = bench.clean(&body)?;
    assert!(out.iter().enumerate().all(|(i, v)| *v == if i < 128 { 1 } else { 2 }));
    Ok(())
}

#[test]
fn a_kernel_makes_its_own_tensor_map() -> Result<(), Error> {
    // Out of zeros, field by field in shared memory, then copied to where copies read maps: rows of 16 words, box 8 x 4.
    let fields = [
        "global_address.shared::cta.b1024.b64 [%rd1], %rd15",
        "rank.shared::cta.b1024.b32 [%rd1], 1",
        "box_dim.shared::cta.b1024.b32 [%rd1], 0, 8",
        "box_dim.shared::cta.b1024.b32 [%rd1], 1, 4",
        "global_dim.shared::cta.b1024.b32 [%rd1], 0, 16",
        "global_dim.shared::cta.b1024.b32 [%rd1], 1, 16",
        "global_stride.shared::cta.b1024.b64 [%rd1], 0, 64",
        "element_stride.shared::cta.b1024.b32 [%rd1], 0, 1",
        "element_stride.shared::cta.b1024.b32 [%rd1], 1, 1",
        "elemtype.shared::cta.b1024.b32 [%rd1], 2",
        "interleave_layout.shared::cta.b1024.b32 [%rd1], 0",
        "swizzle_mode.shared::cta.b1024.b32 [%rd1], 0",
        "fill_mode.shared::cta.b1024.b32 [%rd1], 0",
    ];
    let fields: String = fields.iter().map(|f| format!("@%p0 tensormap.replace.tile.{f};\n")).collect();
    let body = format!(
        "{}mov.u32 %r5, tile; mad.lo.u32 %r7, %r0, 4, %r5; mov.u32 %r8, 0; st.shared.u32 [%r7+2048], %r8; bar.warp.sync -1;\n\
         mov.u64 %rd1, tile; add.u64 %rd1, %rd1, 2048; add.u64 %rd2, %rd0, 128;\n{fields}bar.warp.sync -1;\n\
         tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd2], [%rd1], 128;\n\
         fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128; bar.sync 0;\n\
         mov.u32 %r3, 12; mov.u32 %r4, 1; mov.u32 %r6, bar;\n\
         @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd2, {{%r3, %r4}}], [%r6];\n\
         {WAIT}ld.shared.u32 %r9, [%r7]; {STORE}",
        expect(128)
    );
    let bench = Bench { words: 64, ..Bench::default() };
    let (out, _) = bench.clean(&body)?;
    // Copies do not see it before a fence that comes after the writing.
    let fence = "fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;";
    for wrong in
        [body.replace(fence, ""), body.replace(fence, "").replace("tensormap.cp_f", &format!("{fence} tensormap.cp_f"))]
    {
        assert_eq!(kinds(&bench.run(&wrong, 0)?.0), [FindingKind::MissingFence]);
    }
    for (lane, v) in out.iter().take(32).enumerate() {
        // Columns 16 and up are outside: zeros.
        let wanted = if lane % 8 < 4 { (1 + lane / 8) * 16 + 12 + lane % 8 } else { 0 };
        assert_eq!(*v as usize, wanted, "lane {lane}");
    }
    Ok(())
}
