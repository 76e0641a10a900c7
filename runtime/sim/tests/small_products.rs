//! `mma.sync` of numbers of four bits and of single bits: fragments as the manual gives them.

mod support;

use moec_sim::{Error, Options};
use support::{kinds, launch_on, words_of};

/// `d = a * b + c` of `m` rows and eight columns by one warp: the type and shape, and the registers of A and B as the
/// words of each lane. Gives `d` by rows.
fn product(name: &str, m: usize, a: &[Vec<u32>], b: &[Vec<u32>]) -> Result<Vec<i32>, Error> {
    let list = |letter: char, n: usize| (0..n).map(|i| format!("%{letter}{i}")).collect::<Vec<_>>().join(",");
    let load = |letter: char, n: usize, at: &str| {
        (0..n).map(|i| format!("ld.global.u32 %{letter}{i}, [{at}+{}];\n", 128 * i)).collect::<String>()
    };
    let outs = m / 4;
    let store: String = (0..outs).map(|i| format!("st.global.u32 [%rd2+{}], %d{i};\n", 128 * i)).collect();
    let ptx = format!(
        ".version 8.7\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c)\n{{\n\
         .reg .b32 %r<4>; .reg .b32 %a<4>; .reg .b32 %b<4>; .reg .b32 %d<4>; .reg .b64 %rd<8>;\n\
         ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [c]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd3, %r0, 4;\n\
         add.u64 %rd0, %rd0, %rd3; add.u64 %rd1, %rd1, %rd3; add.u64 %rd2, %rd2, %rd3;\n{}{}{}\
         mma.sync.aligned.{name} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n{store}ret;\n}}\n",
        load('a', a.len(), "%rd0"),
        load('b', b.len(), "%rd1"),
        load('d', outs, "%rd2"),
        list('d', outs),
        list('a', a.len()),
        list('b', b.len()),
        list('d', outs),
    );
    let bytes = |regs: &[Vec<u32>]| regs.iter().flatten().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let c: Vec<u8> = (0..outs * 32).flat_map(|_| 100u32.to_le_bytes()).collect();
    let (report, back) = launch_on(&ptx, &[bytes(a), bytes(b), c], [1, 32, 1], &Options::default())?;
    assert_eq!(kinds(&report), []);
    let words = words_of(&back[2]);
    // Register i of a lane: row lane / 4 + 8 * (i / 2), column lane % 4 * 2 + i % 2.
    Ok((0..m * 8)
        .map(|at| {
            let (row, column) = (at / 8, at % 8);
            let lane = row % 8 * 4 + column / 2;
            words[(row / 8 * 2 + column % 2) * 32 + lane] as i32
        })
        .collect())
}

/// Packs an operand: `rows` rows of `k` elements of `bits` bits into the registers of a warp.
fn pack(rows: usize, k: usize, bits: usize, element: impl Fn(usize, usize) -> u32) -> Vec<Vec<u32>> {
    let (per, groups) = (32 / bits, rows / 8);
    let registers = rows * k * bits / 1024;
    let word = |register: usize, lane: usize| {
        let row = lane / 4 + 8 * (register % groups);
        let first = lane % 4 * per + 4 * per * (register / groups);
        (0..per).fold(0, |w, i| w | element(row, first + i) << (bits * i))
    };
    (0..registers).map(|r| (0..32).map(|l| word(r, l)).collect()).collect()
}

#[test]
fn four_bits_multiply() -> Result<(), Error> {
    let (x, y) =
        (|i: usize, k: usize| (i * 7 + k * 3 + k * k) as u32 & 15, |j: usize, k: usize| (j * 5 + k * 11) as u32 & 15);
    let signed = |v: u32| v as i32 - if v > 7 { 16 } else { 0 };
    for (m, k) in [(8, 32), (16, 32), (16, 64)] {
        for (a, b) in [("s4", "s4"), ("u4", "u4"), ("s4", "u4")] {
            let name = format!("m{m}n8k{k}.row.col.s32.{a}.{b}.s32");
            let got = product(&name, m, &pack(m, k, 4, x), &pack(8, k, 4, y))?;
            let value = |t: &str, v: u32| if t == "s4" { signed(v) } else { v as i32 };
            for (at, got) in got.iter().enumerate() {
                let sum: i32 = (0..k).map(|k| value(a, x(at / 8, k)) * value(b, y(at % 8, k))).sum();
                assert_eq!(*got, sum + 100, "{name} {at}");
            }
        }
    }
    Ok(())
}

#[test]
fn bits_are_compared_and_counted() -> Result<(), Error> {
    let (x, y) =
        (|i: usize, k: usize| (i * 7 + k * k) as u32 >> 2 & 1, |j: usize, k: usize| (j * 5 + k * 3) as u32 >> 1 & 1);
    for (m, k) in [(8, 128), (16, 128), (16, 256)] {
        for xor in [false, true] {
            let name = format!("m{m}n8k{k}.row.col.s32.b1.b1.s32.{}.popc", if xor { "xor" } else { "and" });
            let got = product(&name, m, &pack(m, k, 1, x), &pack(8, k, 1, y))?;
            for (at, got) in got.iter().enumerate() {
                let pairs = (0..k).map(|k| (x(at / 8, k), y(at % 8, k)));
                let sum: u32 = pairs.map(|(a, b)| if xor { a ^ b } else { a & b }).sum();
                assert_eq!(*got as u32, sum + 100, "{name} {at}");
            }
        }
    }
    Ok(())
}
