//! The table of targets.

/// What machine code is generated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// x86-64 with AVX2 and FMA.
    X86V3,
    /// x86-64 with AVX-512.
    X86V4,
    /// x86-64 with AVX-512, its products of pairs of bf16 and its lookups of bytes (AMD from Zen 4 on, Intel from Sapphire
    /// Rapids on).
    X86V4Bf16,
    /// x86-64 with AVX-512 and the AMX matrix unit for bf16. A process must ask the kernel for the unit's
    /// state once before it runs such code (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`).
    X86V4Amx,
    /// 64-bit Arm with NEON.
    Aarch64,
    /// NVIDIA Ampere (A100).
    Sm80,
    /// NVIDIA Ada (L40S, RTX 40).
    Sm89,
    /// NVIDIA Hopper (H100, H200) with its architecture-specific instructions.
    Sm90a,
}

impl Target {
    /// Every target, in the order of `moec list targets`.
    pub const ALL: [Self; 8] =
        [Self::X86V3, Self::X86V4, Self::X86V4Bf16, Self::X86V4Amx, Self::Aarch64, Self::Sm80, Self::Sm89, Self::Sm90a];

    /// Name on the command line and in manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86V3 => "x86-64-v3",
            Self::X86V4 => "x86-64-v4",
            Self::X86V4Bf16 => "x86-64-v4-bf16",
            Self::X86V4Amx => "x86-64-v4-amx",
            Self::Aarch64 => "aarch64",
            Self::Sm80 => "sm_80",
            Self::Sm89 => "sm_89",
            Self::Sm90a => "sm_90a",
        }
    }

    /// The target of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Whether kernels are PTX.
    pub const fn is_gpu(self) -> bool {
        match self {
            Self::X86V3 | Self::X86V4 | Self::X86V4Bf16 | Self::X86V4Amx | Self::Aarch64 => false,
            Self::Sm80 | Self::Sm89 | Self::Sm90a => true,
        }
    }

    /// LLVM triple.
    pub const fn triple(self) -> &'static str {
        match self {
            Self::X86V3 | Self::X86V4 | Self::X86V4Bf16 | Self::X86V4Amx => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
            Self::Sm80 | Self::Sm89 | Self::Sm90a => "nvptx64-nvidia-cuda",
        }
    }

    /// LLVM processor name.
    pub const fn cpu(self) -> &'static str {
        match self {
            Self::Aarch64 => "generic",
            Self::X86V4Bf16 | Self::X86V4Amx => Self::X86V4.name(),
            Self::X86V3 | Self::X86V4 | Self::Sm80 | Self::Sm89 | Self::Sm90a => self.name(),
        }
    }

    /// LLVM features. The PTX version decides which drivers can load the code.
    pub const fn features(self) -> &'static str {
        match self {
            // LLVM avoids 512-bit registers on this level unless told otherwise; explicit vectors use them anyway.
            Self::X86V3 | Self::X86V4 => "",
            Self::X86V4Bf16 => "+avx512bf16,+avx512vbmi",
            Self::X86V4Amx => "+amx-tile,+amx-bf16,+avx512bf16,+avx512vbmi",
            Self::Aarch64 => "+neon",
            Self::Sm80 => "+ptx78",
            Self::Sm89 => "+ptx81",
            Self::Sm90a => "+ptx86",
        }
    }

    /// Whether what this level has beyond x86-64-v4 serves products of bf16 only.
    pub const fn bf16_only(self) -> bool {
        match self {
            Self::X86V4Bf16 | Self::X86V4Amx => true,
            Self::X86V3 | Self::X86V4 | Self::Aarch64 | Self::Sm80 | Self::Sm89 | Self::Sm90a => false,
        }
    }

    /// Floats in a vector register (CPU) or 1.
    pub const fn lanes(self) -> usize {
        match self {
            Self::X86V4 | Self::X86V4Bf16 | Self::X86V4Amx => 16,
            Self::X86V3 => 8,
            Self::Aarch64 => 4,
            Self::Sm80 | Self::Sm89 | Self::Sm90a => 1,
        }
    }

    /// Vector registers (CPU), or 0.
    pub const fn vector_registers(self) -> usize {
        match self {
            Self::X86V4 | Self::X86V4Bf16 | Self::X86V4Amx | Self::Aarch64 => 32,
            Self::X86V3 => 16,
            Self::Sm80 | Self::Sm89 | Self::Sm90a => 0,
        }
    }
}
