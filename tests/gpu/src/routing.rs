//! Inputs that route as they are told: the router reads the first elements of a row as the scores of the experts.

use crate::Result;
use half::bf16;
use moec_abi::DType;
use moec_runtime::{Content, Random, ReadAt, RuntimeError, TensorView, Tensors};

/// A sequence of numbers from a seed (SplitMix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    /// The next 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// In (0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }
}

/// How tokens spread over experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Routing {
    /// Every expert alike.
    Uniform,
    /// The expert of rank `i` in proportion to `1 / i`.
    Zipf,
}

impl Routing {
    /// Both, with their names.
    pub(crate) const ALL: [(Self, &'static str); 2] = [(Self::Uniform, "uniform"), (Self::Zipf, "zipf-1.0")];
}

/// Rows of bf16: scores for the experts, then noise. The best `k` of scores with Gumbel noise are a sample without
/// replacement from the wanted distribution (Gumbel 1954; Efraimidis and Spirakis 2006).
pub(crate) fn rows(routing: Routing, tokens: u64, hidden: u64, experts: u64, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut out = Vec::with_capacity((tokens * hidden * 2) as usize);
    for _ in 0..tokens {
        for i in 0..hidden {
            let value = if i < experts {
                let wanted = match routing {
                    Routing::Uniform => 0.0,
                    Routing::Zipf => -((i + 1) as f64).ln(),
                };
                wanted - (-numbers.unit().ln()).ln()
            } else {
                2.0 * numbers.unit() - 1.0
            };
            out.extend(bf16::from_f64(value).to_le_bytes());
        }
    }
    out
}

/// Bytes of a block of random bf16 numbers that large weights are filled with over and over.
const BLOCK: usize = 1 << 26;

/// The weights of a layer for a benchmark: small tensors as [`Random`] invents them, large ones from one random
/// block (whose making would otherwise take longer than the measurement), and a router that is the identity.
pub(crate) struct BenchWeights {
    random: Random,
    block: Repeated,
    router: String,
    identity: Vec<u8>,
    shape: Vec<u64>,
}

struct Repeated(Vec<u8>);

impl ReadAt for Repeated {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> std::result::Result<(), RuntimeError> {
        let mut at = offset as usize % self.0.len();
        let mut rest = out;
        while !rest.is_empty() {
            let n = rest.len().min(self.0.len() - at);
            let (now, later) = rest.split_at_mut(n);
            now.copy_from_slice(&self.0[at..at + n]);
            rest = later;
            at = 0;
        }
        Ok(())
    }
}

impl BenchWeights {
    /// Weights over those that `random` invents; `router` is the end of the name of the router's matrix.
    pub(crate) fn new(random: Random, router: &str, experts: u64, hidden: u64) -> Result<Self> {
        if experts > hidden {
            return Err(format!("{experts} experts in rows of {hidden}"));
        }
        let mut numbers = Numbers(1);
        let block =
            (0..BLOCK / 2).flat_map(|_| bf16::from_f64((2.0 * numbers.unit() - 1.0) / 16.0).to_le_bytes()).collect();
        let one = |e: u64, h: u64| bf16::from_f32(if e == h { 1.0 } else { 0.0 }).to_le_bytes();
        let identity = (0..experts).flat_map(|e| (0..hidden).flat_map(move |h| one(e, h))).collect();
        let shape = vec![experts, hidden];
        Ok(Self { random, block: Repeated(block), router: router.to_owned(), identity, shape })
    }
}

impl Tensors for BenchWeights {
    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let mut view = self.random.find(name)?;
        if name.ends_with(&self.router) && view.dtype == DType::Bf16 && view.shape == self.shape {
            view.content = Content::Bytes(&self.identity);
        } else if view.dtype == DType::Bf16 && view.bytes() >= 1 << 16 {
            let bytes = view.bytes();
            // Every tensor starts elsewhere in the block.
            let offset = name.bytes().fold(0u64, |h, b| h.wrapping_mul(1_099_511_628_211) ^ u64::from(b)) % 4096 * 512;
            view.content = Content::Reader { reader: &self.block, offset, bytes };
        }
        Some(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best(row: &[u8], experts: usize) -> usize {
        let score = |i: usize| bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32();
        (0..experts).max_by(|a, b| score(*a).total_cmp(&score(*b))).expect("there are experts")
    }

    #[test]
    fn first_choices_follow_the_wanted_distribution() {
        for (routing, wanted) in [(Routing::Uniform, 1.0 / 8.0), (Routing::Zipf, 1.0 / 2.717_857)] {
            let bytes = rows(routing, 4000, 16, 8, 3);
            let first = bytes.chunks(32).filter(|row| best(row, 8) == 0).count();
            assert!((first as f64 / 4000.0 - wanted).abs() < 0.03, "{routing:?}: {first}");
        }
    }

    #[test]
    fn a_repeated_block_reads_round_its_end() {
        let block = Repeated((0..10).collect());
        let mut out = [0; 13];
        block.read_at(17, &mut out).expect("always");
        assert_eq!(out, [7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }
}
