//! Compiles CPU kernels into a shared library and loads it; memory that ends at a guard; numbers.

use moec_abi::{CpuKernel, Layout};
use moec_codegen::{
    Target,
    mlir::{Builder, Keep, Session},
};
use std::{
    ffi::{CString, c_char, c_int, c_long, c_void},
    process::Command,
};

unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn mmap(at: *mut c_void, bytes: usize, access: c_int, flags: c_int, file: c_int, offset: c_long) -> *mut c_void;
    fn mprotect(at: *mut c_void, bytes: usize, access: c_int) -> c_int;
    fn madvise(at: *mut c_void, bytes: usize, advice: c_int) -> c_int;
    fn munmap(at: *mut c_void, bytes: usize) -> c_int;
    #[cfg(target_arch = "x86_64")]
    fn syscall(number: c_long, ...) -> c_long;
}

/// Whether this machine runs code for `target`; asks for the matrix unit where that is needed.
pub(crate) fn runs(target: Target) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let v3 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let v4 = v3 && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
        // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) only grants state to this process.
        let tiles = || v4 && unsafe { syscall(158, 0x1023 as c_long, 18 as c_long) } == 0;
        match target {
            Target::X86V3 => v3,
            Target::X86V4 => v4,
            Target::X86V4Bf16 => v4 && is_x86_feature_detected!("avx512bf16"),
            Target::X86V4Amx => tiles(),
            Target::Aarch64 | Target::Sm80 | Target::Sm89 | Target::Sm90a => false,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        target == Target::Aarch64 && cfg!(target_arch = "aarch64")
    }
}

/// The object that `build` makes.
pub(crate) fn compile(target: Target, build: impl FnOnce(&Builder<'_>)) -> Vec<u8> {
    Session::new().compile(&target, Keep::default(), build).expect("compiles").code
}

/// A loaded library; it stays loaded.
pub(crate) struct Library(*mut c_void);

impl Library {
    /// Compiles what `build` makes.
    pub(crate) fn new(target: Target, build: impl FnOnce(&Builder<'_>)) -> Self {
        let code = compile(target, build);
        let folder = tempfile::tempdir().expect("a folder");
        let (object, library) = (folder.path().join("kernels.o"), folder.path().join("kernels.so"));
        std::fs::write(&object, &code).expect("object written");
        let linked = Command::new("cc")
            .args(["-shared", "-Wl,-z,defs", "-o"])
            .args([&library, &object])
            .arg("-lm")
            .status()
            .expect("cc runs");
        assert!(linked.success(), "kernels need symbols that are not there");
        let name = CString::new(library.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: the library holds kernels only, without initialisers.
        let handle = unsafe { dlopen(name.as_ptr(), 2) };
        assert!(!handle.is_null(), "dlopen");
        Self(handle)
    }

    /// The kernel of this name.
    pub(crate) fn kernel(&self, name: &str) -> CpuKernel {
        let symbol = CString::new(name).expect("no NUL");
        // SAFETY: the library is loaded.
        let address = unsafe { dlsym(self.0, symbol.as_ptr()) };
        assert!(!address.is_null(), "{name}");
        // SAFETY: emitters give kernels this type.
        unsafe { std::mem::transmute::<*mut c_void, CpuKernel>(address) }
    }
}

/// Memory that ends at a page that cannot be touched, after a page that cannot be touched.
pub(crate) struct Memory {
    base: *mut c_void,
    mapped: usize,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory; tests let threads write disjoint parts.
unsafe impl Send for Memory {}
// SAFETY: see above.
unsafe impl Sync for Memory {}

const PAGE: usize = 4096;

impl Memory {
    /// `bytes` bytes of `fill`, up to the last byte before the guard.
    pub(crate) fn new(bytes: usize, fill: u8) -> Self {
        let body = bytes.next_multiple_of(PAGE);
        let mapped = body + 2 * PAGE;
        // SAFETY: a fresh private mapping.
        let base = unsafe { mmap(std::ptr::null_mut(), mapped, 3, 0x22, -1, 0) };
        assert!(base.addr() != usize::MAX, "mmap of {mapped} bytes");
        // SAFETY: both pages and the body lie inside the mapping.
        let start = unsafe {
            mprotect(base, PAGE, 0);
            mprotect(base.byte_add(PAGE + body), PAGE, 0);
            madvise(base.byte_add(PAGE), body, 14);
            let body_start = base.byte_add(PAGE).cast::<u8>();
            body_start.write_bytes(fill, body);
            body_start.add(body - bytes)
        };
        Self { base, mapped, start, bytes }
    }

    /// A copy of these values.
    pub(crate) fn of<T: Copy>(values: &[T]) -> Self {
        let mut memory = Self::new(size_of_val(values), 0);
        memory.slice_mut::<T>().copy_from_slice(values);
        memory
    }

    /// The address as an argument of a kernel.
    pub(crate) fn address(&self) -> u64 {
        self.start.addr() as u64
    }

    /// The values.
    pub(crate) fn slice<T: Copy>(&self) -> &[T] {
        // SAFETY: mapped, readable, and any bit pattern is a value of the number types used here.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes / size_of::<T>()) }
    }

    /// Replaces the contents.
    pub(crate) fn replace(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.bytes);
        // SAFETY: mapped and as long; results are read when the kernel that writes them is done.
        unsafe { self.start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The values.
    pub(crate) fn slice_mut<T: Copy>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.bytes / size_of::<T>()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { munmap(self.base, self.mapped) };
    }
}

/// Places `value(e, m, r, c)` of `experts` x `matrices` matrices of `rows` x `columns` in the order of `layout`.
pub(crate) fn pack<T: Copy + Default>(
    layout: &Layout,
    [experts, matrices, rows, columns]: [u64; 4],
    mut value: impl FnMut(u64, u64, u64, u64) -> T,
) -> Vec<T> {
    let Layout::Panels { panel, depth, columns: unit } = layout else {
        panic!("CPU kernels read panels");
    };
    let padded = columns.next_multiple_of(*unit);
    let panels = rows.div_ceil(*panel);
    let mut packed = vec![T::default(); (experts * panels * matrices * padded * panel) as usize];
    for e in 0..experts {
        for m in 0..matrices {
            for r in 0..rows {
                for c in 0..columns {
                    let at = ((e * panels + r / panel) * matrices + m) * padded * panel
                        + (c / depth) * panel * depth
                        + (r % panel) * depth
                        + c % depth;
                    packed[at as usize] = value(e, m, r, c);
                }
            }
        }
    }
    packed
}

/// Numbers that look random and are the same on every run.
pub(crate) struct Random(pub u64);

impl Random {
    /// The next 64 bits (splitmix64).
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    /// A float in [-1, 1).
    pub(crate) fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }
}
