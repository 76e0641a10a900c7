//! Whether this processor has the instructions that a program was compiled for.

/// Whether the processor reaches `level`; see `format::H_CPU`.
#[cfg(target_arch = "x86_64")]
pub fn reaches(level: u64) -> bool {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    let bits = |word: u32, wanted: &[u32]| wanted.iter().all(|bit| word >> bit & 1 == 1);
    if level < 3 {
        return true;
    }
    if __cpuid(0).eax < 7 || __cpuid(0x8000_0000).eax < 0x8000_0001 {
        return false;
    }
    let (one, seven, extended) = (__cpuid(1), __cpuid_count(7, 0), __cpuid(0x8000_0001));
    // fma, movbe, osxsave, avx, f16c; bmi1, avx2, bmi2; lzcnt.
    if !bits(one.ecx, &[12, 22, 27, 28, 29]) || !bits(seven.ebx, &[3, 5, 8]) || !bits(extended.ecx, &[5]) {
        return false;
    }
    let (low, _high): (u32, u32);
    // SAFETY: `osxsave` says that the instruction is there; it only reads.
    unsafe {
        core::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _high, options(nomem, nostack, preserves_flags));
    }
    if !bits(low, &[1, 2]) {
        return false;
    }
    // avx512 f, dq, cd, bw, vl, and their registers kept by the system.
    level == 3 || (level == 4 && bits(seven.ebx, &[16, 17, 28, 30, 31]) && bits(low, &[5, 6, 7]))
}

/// Whether the processor reaches `level`; see `format::H_CPU`.
#[cfg(not(target_arch = "x86_64"))]
pub fn reaches(level: u64) -> bool {
    level == 0
}
