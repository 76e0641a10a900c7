//! `wmma` in every layout: fragments mean the same however they were loaded and are stored.

mod support;

use moec_sim::{Error, FindingKind, Options, Report};
use support::{launch_on, words_of};

const M: usize = 8;
const N: usize = 32;
const K: usize = 16;

/// Elements from one line to the next, by the order of a matrix in memory; lines have sixteen more than they need.
fn stride(rows: usize, columns: usize, row: bool) -> usize {
    16 + if row { columns } else { rows }
}

fn at(row: usize, column: usize, stride: usize, by_row: bool) -> usize {
    if by_row { row * stride + column } else { column * stride + row }
}

/// `c = a * b + c` by one warp, for m8n32k16 of signed bytes; the layouts are those of A, B and C. Gives C's words.
fn product(layouts: [bool; 3], a: &[i8], b: &[i8], c: &[i32], bytes: u64) -> Result<(Report, Vec<i32>), Error> {
    let name = |row: bool| if row { "row" } else { "col" };
    let [ra, rb, rc] = layouts;
    let [sa, sb, sc] = [stride(M, K, ra), stride(K, N, rb), stride(M, N, rc)];
    let c_regs = "{%r2,%r3,%r4,%r5,%r6,%r7,%r8,%r9}";
    let ptx = format!(
        ".version 8.7\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c)\n{{\n\
         .reg .b32 %r<16>;\n.reg .b64 %rd<4>;\n\
         ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [c]; mov.u32 %r14, {sa};\n\
         wmma.load.a.sync.aligned.{}.m8n32k16.global.s8 {{%r0}}, [%rd0], %r14;\n\
         wmma.load.b.sync.aligned.{}.m8n32k16.s8 {{%r10,%r11,%r12,%r13}}, [%rd1], {sb};\n\
         wmma.load.c.sync.aligned.{}.m8n32k16.global.s32 {c_regs}, [%rd2], {sc};\n\
         wmma.mma.sync.aligned.{}.{}.m8n32k16.s32.s8.s8.s32 {c_regs}, {{%r0}}, {{%r10,%r11,%r12,%r13}}, {c_regs};\n\
         wmma.store.d.sync.aligned.{}.m8n32k16.global.s32 [%rd2], {c_regs}, {sc};\nret;\n}}\n",
        name(ra),
        name(rb),
        name(rc),
        name(ra),
        name(rb),
        name(rc)
    );
    let of_bytes = |x: &[i8]| x.iter().map(|v| *v as u8).collect::<Vec<_>>();
    let mut c: Vec<u8> = c.iter().flat_map(|v| v.to_le_bytes()).collect();
    c.truncate(bytes as usize);
    let (report, buffers) = launch_on(&ptx, &[of_bytes(a), of_bytes(b), c], [1, 32, 1], &Options::default())?;
    Ok((report, words_of(&buffers[2]).into_iter().map(|w| w as i32).collect()))
}

#[test]
fn every_layout_gives_the_product() -> Result<(), Error> {
    let (x, y) = (|i: usize, k: usize| (i * 7 + k * 3) as i8 - 60, |k: usize, j: usize| (k * 5 + j * 11) as i8);
    for layouts in (0..8).map(|bits| [bits & 1 == 0, bits & 2 == 0, bits & 4 == 0]) {
        let [ra, rb, rc] = layouts;
        let [sa, sb, sc] = [stride(M, K, ra), stride(K, N, rb), stride(M, N, rc)];
        let (mut a, mut b, mut c) = (vec![0i8; 1024], vec![0i8; 1024], vec![-5i32; 1024]);
        (0..M * K).for_each(|i| a[at(i / K, i % K, sa, ra)] = x(i / K, i % K));
        (0..K * N).for_each(|i| b[at(i / N, i % N, sb, rb)] = y(i / N, i % N));
        (0..M * N).for_each(|i| c[at(i / N, i % N, sc, rc)] = i as i32);
        let mut wanted = c.clone();
        for i in 0..M * N {
            let sum: i32 = (0..K).map(|k| i32::from(x(i / N, k)) * i32::from(y(k, i % N))).sum();
            wanted[at(i / N, i % N, sc, rc)] += sum;
        }
        let (report, words) = product(layouts, &a, &b, &c, 4096)?;
        assert!(report.findings.is_empty() && words == wanted, "{layouts:?}: {:?}", report.findings);
    }
    Ok(())
}

#[test]
fn a_fragment_past_the_end_is_reported() -> Result<(), Error> {
    let (a, b, c) = (vec![1i8; 1024], vec![1i8; 1024], vec![0i32; 1024]);
    // Eight lines of 48 words, the last one of 32: one element is missing.
    let (report, _) = product([true, false, true], &a, &b, &c, 4 * (7 * 48 + 31))?;
    let found: Vec<_> = report.findings.iter().map(|f| (f.kind, f.line)).collect();
    assert_eq!(found, [(FindingKind::OutOfBounds, 11), (FindingKind::OutOfBounds, 13)]);
    Ok(())
}
