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
    if level == 3 {
        return true;
    }
    let avx512 = bits(seven.ebx, &[16, 17, 28, 30, 31]) && bits(low, &[5, 6, 7]);
    // avx512 vbmi, bf16.
    let pairs = || bits(seven.ecx, &[1]) && seven.eax >= 1 && bits(__cpuid_count(7, 1).eax, &[5]);
    // amx-bf16, amx-tile; the registers of the matrix unit kept by the system.
    let matrix = || bits(seven.edx, &[22, 24]) && bits(low, &[17, 18]);
    match level {
        4 => avx512,
        5 => avx512 && pairs(),
        6 => avx512 && pairs() && matrix() && matrix_unit_granted(),
        _ => false,
    }
}

/// Asks the system for the state of the matrix unit, which it keeps for processes that want it.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn matrix_unit_granted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let answer: i64;
    // SAFETY: the call changes nothing but the permission; the system clobbers rcx and r11.
    unsafe {
        core::arch::asm!("syscall", inlateout("rax") ARCH_PRCTL => answer, in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    answer == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
const fn matrix_unit_granted() -> bool {
    false
}

/// Whether the processor reaches `level`; see `format::H_CPU`.
#[cfg(not(target_arch = "x86_64"))]
pub fn reaches(level: u64) -> bool {
    level == 0
}
