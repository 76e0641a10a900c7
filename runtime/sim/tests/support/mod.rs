//! Kernels of one line or a few, launched on buffers.

#![allow(dead_code, reason = "each file of tests uses some of it")]

use moec_sim::{Arg, Error, FindingKind, Launch, Memory, Module, Options, Report, launch};

/// Launches the entry `k` of a module on these buffers, whose addresses are its parameters, and gives the buffers back.
pub(crate) fn launch_on(
    ptx: &str,
    buffers: &[Vec<u8>],
    [grid, block, cluster]: [u32; 3],
    options: &Options,
) -> Result<(Report, Vec<Vec<u8>>), Error> {
    let module = Module::parse(ptx)?;
    let mut memory = Memory::new();
    let mut places = Vec::new();
    for b in buffers {
        let place = memory.alloc(b.len() as u64, 256);
        memory.write(place, b)?;
        places.push(place);
    }
    let l = Launch {
        entry: "k",
        grid: [grid, 1, 1],
        block: [block, 1, 1],
        cluster: [cluster, 1, 1],
        dynamic_shared: 0,
        dependent: false,
        args: places.iter().map(|p| Arg::U64(*p)).collect(),
    };
    let report = launch(&module, &mut memory, &l, options)?;
    let back = places.iter().zip(buffers).map(|(p, b)| memory.read(*p, b.len() as u64)).collect::<Result<_, _>>()?;
    Ok((report, back))
}

/// Runs a kernel of one parameter, a buffer of `words` zeros, and gives the buffer back.
pub(crate) fn run(
    body: &str,
    grid: u32,
    block: u32,
    cluster: u32,
    words: usize,
    seed: u64,
) -> Result<(Report, Vec<u32>), Error> {
    run_with(body, grid, block, cluster, words, Options { seed, max_instructions: 2_000_000, ..Options::default() })
}

pub(crate) fn run_with(
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
    let (report, buffers) = launch_on(&ptx, &[vec![0; words * 4]], [grid, block, cluster], &options)?;
    Ok((report, words_of(&buffers[0])))
}

/// Bytes as words.
pub(crate) fn words_of(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
}

/// The kinds of what was found, each once.
pub(crate) fn kinds(r: &Report) -> Vec<FindingKind> {
    let mut k: Vec<_> = r.findings.iter().map(|f| f.kind).collect();
    k.sort();
    k.dedup();
    k
}

/// Stores register `%r9` to word `tid + 32 * ctaid` of the buffer.
pub(crate) const STORE: &str = "mov.u32 %r30, %ctaid.x; mad.lo.u32 %r30, %r30, 32, %r0; mul.wide.u32 %rd14, %r30, 4; add.u64 %rd14, %rd0, %rd14; st.global.u32 [%rd14], %r9;";

/// Initialises `bar` for `n` arrivals by thread 0.
pub(crate) fn init(n: u32) -> String {
    format!(
        "setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [bar], {n}; fence.mbarrier_init.release.cluster; bar.sync 0;"
    )
}
