//! Puts a relocatable ELF object into memory and makes it executable, without a linker.
//!
//! Sections are laid out in one mapping, so that all distances fit in 32 bits; symbols from outside
//! are reached through a table of addresses. Code becomes executable only after it can no longer be
//! written. x86-64 on Linux.

use crate::error::{Code, Result, RuntimeError};
use object::{
    Architecture, Object, ObjectKind, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, SectionFlags,
    SectionIndex, SymbolSection, elf,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
};

const PAGE: u64 = 4096;
/// Bytes of a stub for a call that reaches outside: `jmp *[rip + x]`, padded.
const STUB: u64 = 8;

/// Executable memory with the symbols of an object.
pub(crate) struct Image {
    memory: Mapping,
    symbols: BTreeMap<String, u64>,
}

impl Image {
    /// Address of a symbol that the object defines.
    pub(crate) fn symbol(&self, name: &str) -> Option<u64> {
        self.symbols.get(name).copied()
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes
    }
}

struct Mapping {
    address: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: the mapping is only read, executed, and written by kernels that may run on any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` and nobody may use it after the image.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

fn bad(what: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::new(Code::CodeObject, format!("code object: {what}"))
}

/// Memory protection of a group of sections, in the order in which they lie.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Code,
    Constant,
    Data,
}

/// Where everything lies, relative to the start of the mapping.
struct Plan {
    sections: BTreeMap<usize, u64>,
    /// Uninitialised common symbols.
    common: BTreeMap<usize, u64>,
    /// Symbols from outside, in order; each has a table entry and a stub.
    outside: Vec<(usize, String)>,
    stubs: u64,
    table: u64,
    /// Starts of the constant and data parts, and the end.
    constant: u64,
    data: u64,
    end: u64,
    /// Table slots for symbols of the object itself.
    local_slots: BTreeMap<usize, u64>,
}

fn group(section: &object::Section<'_, '_>) -> Option<Group> {
    let SectionFlags::Elf { sh_flags } = section.flags() else { return None };
    let has = |flag: u32| sh_flags & u64::from(flag) != 0;
    if !has(elf::SHF_ALLOC) || section.name() == Ok(".eh_frame") {
        None
    } else if has(elf::SHF_EXECINSTR) {
        Some(Group::Code)
    } else if has(elf::SHF_WRITE) {
        Some(Group::Data)
    } else {
        Some(Group::Constant)
    }
}

fn plan(file: &object::File<'_>) -> Result<Plan> {
    let mut at = 0u64;
    let mut sections = BTreeMap::new();
    let mut starts = [0; 3];
    let (mut stubs, mut table) = (0, 0);
    let mut outside = Vec::new();
    let mut common = BTreeMap::new();
    let mut used = BTreeSet::new();
    for section in file.sections().filter(|s| group(s).is_some()) {
        for (_, relocation) in section.relocations() {
            if let RelocationTarget::Symbol(index) = relocation.target() {
                used.insert(index.0);
            }
        }
    }
    for symbol in file.symbols().filter(|s| s.is_undefined() && used.contains(&s.index().0)) {
        outside.push((symbol.index().0, symbol.name().map_err(bad)?.to_owned()));
    }
    let mut local_slots = BTreeMap::new();
    for (i, wanted) in [Group::Code, Group::Constant, Group::Data].into_iter().enumerate() {
        at = at.next_multiple_of(PAGE);
        starts[i] = at;
        for section in file.sections() {
            if group(&section) != Some(wanted) {
                continue;
            }
            let name = section.name().map_err(bad)?;
            if matches!(name, ".init_array" | ".fini_array" | ".ctors" | ".tdata" | ".tbss") {
                return Err(bad(format!("section {name} needs a linker")));
            }
            at = at.next_multiple_of(section.align().clamp(1, PAGE));
            sections.insert(section.index().0, at);
            at = at.checked_add(section.size()).filter(|&at| at < 1 << 30).ok_or_else(|| bad("too large"))?;
        }
        match wanted {
            Group::Code => {
                at = at.next_multiple_of(16);
                stubs = at;
                at += STUB * outside.len() as u64;
            }
            Group::Constant => {
                at = at.next_multiple_of(8);
                table = at;
                at += 8 * outside.len() as u64;
                for symbol in file.symbols() {
                    if !symbol.is_undefined() && !symbol.is_local() {
                        local_slots.insert(symbol.index().0, at);
                        at += 8;
                    }
                }
            }
            Group::Data => {
                for symbol in file.symbols().filter(|s| s.is_common()) {
                    at = at.next_multiple_of(64);
                    common.insert(symbol.index().0, at);
                    at = at.checked_add(symbol.size()).filter(|&at| at < 1 << 30).ok_or_else(|| bad("too large"))?;
                }
            }
        }
    }
    let [_, constant, data] = starts;
    let end = at.next_multiple_of(PAGE).max(PAGE);
    Ok(Plan { sections, common, outside, stubs, table, constant, data, end, local_slots })
}

macro_rules! functions {
    ($($name:ident)*) => {
        #[link(name = "m")]
        unsafe extern "C" {
            $(fn $name();)*
        }

        /// Functions that compilers emit calls of. Naming them here links them into this program,
        /// which may have no other use for them.
        fn library(name: &str) -> Option<u64> {
            match name {
                $(stringify!($name) => Some(($name as *const ()).addr() as u64),)*
                _ => None,
            }
        }
    };
}

functions! {
    memcpy memmove memset memcmp
    exp expf exp2 exp2f expm1 expm1f log logf log2 log2f log10 log10f log1p log1pf pow powf
    tanh tanhf sin sinf cos cosf erf erff sqrt sqrtf fma fmaf fmod fmodf
    floor floorf ceil ceilf trunc truncf round roundf rint rintf fmin fminf fmax fmaxf
}

/// Address of a symbol of the C library or of this program.
fn outside_address(name: &str) -> Option<u64> {
    if let Some(address) = library(name) {
        return Some(address);
    }
    let name = CString::new(name).ok()?;
    // SAFETY: looks a name up in the loaded libraries.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address.addr() as u64)
}

/// Loads a relocatable object for this processor.
///
/// # Errors
/// The bytes are not such an object, it needs a symbol that is not there, or memory is refused.
pub(crate) fn load(bytes: &[u8]) -> Result<Image> {
    let file = object::File::parse(bytes).map_err(bad)?;
    if file.kind() != ObjectKind::Relocatable || !matches!(file, object::File::Elf64(_)) {
        return Err(bad("not a relocatable ELF file"));
    }
    if file.architecture() != Architecture::X86_64 || !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Err(bad(format!(
            "made for {:?}; objects are loaded directly on x86-64 Linux only",
            file.architecture()
        ))
        .with_help("link the generated library into the program instead"));
    }
    let plan = plan(&file)?;
    let memory = map(plan.end)?;
    let base = memory.address.addr() as u64;
    let mut image = vec![0u8; plan.end as usize];
    let mut missing = Vec::new();
    for (i, (_, name)) in plan.outside.iter().enumerate() {
        let (slot, stub) = (plan.table + 8 * i as u64, plan.stubs + STUB * i as u64);
        match outside_address(name) {
            Some(address) => put(&mut image, slot, &address.to_le_bytes())?,
            None => missing.push(name.clone()),
        }
        let distance = i32::try_from(slot.cast_signed() - (stub + 6).cast_signed()).map_err(bad)?;
        put(&mut image, stub, &[0xff, 0x25])?;
        put(&mut image, stub + 2, &distance.to_le_bytes())?;
    }
    if !missing.is_empty() {
        return Err(bad(format!("needs {}, which this program does not have", missing.join(", "))));
    }
    let mut symbols = BTreeMap::new();
    for symbol in file.symbols() {
        let Some(at) = place(&plan, &symbol) else { continue };
        if let Some(slot) = plan.local_slots.get(&symbol.index().0) {
            put(&mut image, *slot, &(base + at).to_le_bytes())?;
        }
        if symbol.is_global() {
            symbols.insert(symbol.name().map_err(bad)?.to_owned(), base + at);
        }
    }
    for section in file.sections() {
        let Some(&at) = plan.sections.get(&section.index().0) else { continue };
        put(&mut image, at, section.data().map_err(bad)?)?;
    }
    for section in file.sections() {
        if let Some(&at) = plan.sections.get(&section.index().0) {
            relocate(&file, &plan, &section, at, base, &mut image)?;
        }
    }
    // SAFETY: the mapping is as long as the image, writable, and nobody else knows it yet.
    unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), memory.address.cast(), image.len()) };
    protect(&memory, 0, plan.constant, libc::PROT_READ | libc::PROT_EXEC)?;
    protect(&memory, plan.constant, plan.data, libc::PROT_READ)?;
    Ok(Image { memory, symbols })
}

fn put(image: &mut [u8], at: u64, bytes: &[u8]) -> Result<()> {
    let at = usize::try_from(at).map_err(bad)?;
    let place = image.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len()));
    place.ok_or_else(|| bad("a relocation lies outside of its section"))?.copy_from_slice(bytes);
    Ok(())
}

/// Place of a symbol that the object defines, relative to the mapping.
fn place(plan: &Plan, symbol: &object::Symbol<'_, '_>) -> Option<u64> {
    if let Some(at) = plan.common.get(&symbol.index().0) {
        return Some(*at);
    }
    match symbol.section() {
        SymbolSection::Section(SectionIndex(index)) => Some(plan.sections.get(&index)? + symbol.address()),
        SymbolSection::Unknown
        | SymbolSection::None
        | SymbolSection::Undefined
        | SymbolSection::Absolute
        | SymbolSection::Common => None,
        // The enum of the library may grow.
        _ => None,
    }
}

/// What a relocation refers to.
struct Target {
    /// Its address; for a symbol from outside the one of its stub.
    near: u64,
    /// Its true address.
    address: u64,
    /// Place of its entry in the table of addresses.
    slot: Option<u64>,
}

fn target(file: &object::File<'_>, plan: &Plan, of: RelocationTarget, base: u64, image: &[u8]) -> Result<Target> {
    match of {
        RelocationTarget::Symbol(index) => {
            if let Some(i) = plan.outside.iter().position(|(at, _)| *at == index.0) {
                let slot = plan.table + 8 * i as u64;
                let bytes = image.get(slot as usize..slot as usize + 8).and_then(|b| b.first_chunk());
                let address = u64::from_le_bytes(*bytes.ok_or_else(|| bad("no table entry"))?);
                return Ok(Target { near: base + plan.stubs + STUB * i as u64, address, slot: Some(base + slot) });
            }
            let symbol = file.symbol_by_index(index).map_err(bad)?;
            let at = place(plan, &symbol).ok_or_else(|| bad("a relocation refers to a section that is not loaded"))?;
            let slot = plan.local_slots.get(&index.0).map(|s| base + s);
            Ok(Target { near: base + at, address: base + at, slot })
        }
        RelocationTarget::Section(index) => {
            let at = plan.sections.get(&index.0).ok_or_else(|| bad("a relocation refers to a section not loaded"))?;
            Ok(Target { near: base + at, address: base + at, slot: None })
        }
        RelocationTarget::Absolute => Ok(Target { near: 0, address: 0, slot: None }),
        // The enum of the library may grow.
        _ => Err(bad("an unknown relocation target")),
    }
}

fn relocate(
    file: &object::File<'_>,
    plan: &Plan,
    section: &object::Section<'_, '_>,
    start: u64,
    base: u64,
    image: &mut [u8],
) -> Result<()> {
    for (offset, relocation) in section.relocations() {
        let RelocationFlags::Elf { r_type } = relocation.flags() else {
            return Err(bad("a relocation of another format"));
        };
        let to = target(file, plan, relocation.target(), base, image)?;
        let at = start + offset;
        let here = (base + at).cast_signed();
        let addend = relocation.addend();
        let far = || bad(format!("relocation of type {r_type} does not reach its target"));
        let narrow = |value: i64| i32::try_from(value).map(i32::to_le_bytes).map_err(|_| far());
        match r_type {
            elf::R_X86_64_NONE => {}
            elf::R_X86_64_64 => put(image, at, &to.address.wrapping_add_signed(addend).to_le_bytes())?,
            elf::R_X86_64_PC64 => {
                put(image, at, &(to.address.cast_signed() + addend - here).to_le_bytes())?;
            }
            elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => {
                put(image, at, &narrow(to.near.cast_signed() + addend - here)?)?;
            }
            elf::R_X86_64_32 => {
                let value = u32::try_from(to.address.wrapping_add_signed(addend)).map_err(|_| far())?;
                put(image, at, &value.to_le_bytes())?;
            }
            elf::R_X86_64_32S => put(image, at, &narrow(to.address.cast_signed() + addend)?)?,
            elf::R_X86_64_GOTPCREL | elf::R_X86_64_GOTPCRELX | elf::R_X86_64_REX_GOTPCRELX => {
                let slot = to.slot.ok_or_else(|| bad("no table entry for a local symbol"))?;
                put(image, at, &narrow(slot.cast_signed() + addend - here)?)?;
            }
            _ => {
                return Err(bad(format!("relocation of type {r_type} is not supported"))
                    .with_help("compile as position-independent code with the small code model"));
            }
        }
    }
    Ok(())
}

/// Fresh zeroed memory, low enough for 32-bit addresses where the system gives it.
fn map(bytes: u64) -> Result<Mapping> {
    let bytes = usize::try_from(bytes).map_err(bad)?;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    let low = libc::MAP_32BIT;
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    let low = 0;
    for extra in [low, 0] {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | extra;
        // SAFETY: asks for fresh memory at any address.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if address != libc::MAP_FAILED {
            return Ok(Mapping { address, bytes });
        }
    }
    Err(RuntimeError::new(Code::Memory, format!("no {bytes} bytes of memory for code")))
}

fn protect(memory: &Mapping, start: u64, end: u64, protection: i32) -> Result<()> {
    if start == end {
        return Ok(());
    }
    // SAFETY: the range lies in the mapping; its bytes are complete and not written any more.
    let status = unsafe {
        libc::mprotect(memory.address.cast::<u8>().add(start as usize).cast(), (end - start) as usize, protection)
    };
    if status != 0 {
        let cause = std::io::Error::last_os_error();
        return Err(RuntimeError::new(Code::Memory, format!("memory cannot be made executable: {cause}"))
            .with_help("a security policy of this system may forbid it; link the generated library instead"));
    }
    Ok(())
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use super::*;
    use std::process::Command;

    const SOURCE: &str = r#"
        #include <stdint.h>
        #include <string.h>
        #include <math.h>
        static const float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
        int64_t counter = 40;
        static int64_t zeros[100];
        int64_t shared_zeros[8];
        extern int64_t (*const pointer)(int64_t);
        static int64_t twice(int64_t x) { return 2 * x; }
        int64_t (*const pointer)(int64_t) = twice;
        void kernel(const uint64_t *args, uint64_t begin, uint64_t end, void *scratch) {
            float *out = (float *)args[0];
            memcpy(scratch, &table[begin & 3], sizeof(float));
            counter += 1; zeros[5] += 1; shared_zeros[3] += counter;
            for (uint64_t i = begin; i < end; i++)
                out[i] = expf((float)i) + table[i & 3] + (float)pointer((int64_t)(counter + zeros[5] + shared_zeros[3]));
        }
        int64_t pick(int64_t n) {
            switch (n) { case 0: return 11; case 1: return 22; case 2: return 5; case 3: return 7; case 4: return 1; case 5: return 90; default: return -1; }
        }
    "#;

    fn compile(flags: &[&str]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let (source, object) = (folder.path().join("k.c"), folder.path().join("k.o"));
        std::fs::write(&source, SOURCE).unwrap();
        let status = Command::new("cc").args(flags).arg("-c").arg(&source).arg("-o").arg(&object).status().unwrap();
        assert!(status.success());
        std::fs::read(object).unwrap()
    }

    #[test]
    fn code_of_a_c_compiler_runs_with_every_way_of_addressing() {
        for flags in [
            &["-O2", "-fPIC"][..],
            &["-O0", "-fPIC"],
            &["-O2", "-fno-pic", "-fno-pie"],
            &["-O1", "-fPIC", "-fno-plt", "-fcommon"],
            &["-O2", "-fPIC", "-ffunction-sections", "-fdata-sections", "-g"],
        ] {
            let image = load(&compile(flags)).unwrap();
            assert!(image.bytes() > 0);
            let kernel = image.symbol("kernel").unwrap();
            // SAFETY: the object defines this function with this type.
            let kernel = unsafe { std::mem::transmute::<u64, moec_launch::CpuKernel>(kernel) };
            let mut out = [0f32; 6];
            let mut scratch = [0f32; 16];
            let args = [out.as_mut_ptr().addr() as u64];
            // SAFETY: the kernel writes `out[1..6]` and a word of scratch.
            unsafe { kernel(args.as_ptr(), 1, 6, scratch.as_mut_ptr().cast()) };
            assert_eq!(scratch[0], 2.0);
            for (i, value) in out.iter().enumerate().skip(1) {
                let wanted = (i as f32).exp() + [1.0, 2.0, 4.0, 8.0][i & 3] + 2.0 * (41.0 + 1.0 + 41.0);
                assert!((value - wanted).abs() <= 1e-5 * wanted, "{flags:?} {i}: {value} {wanted}");
            }
            // SAFETY: the object defines this function with this type.
            let pick =
                unsafe { std::mem::transmute::<u64, unsafe extern "C" fn(i64) -> i64>(image.symbol("pick").unwrap()) };
            // SAFETY: the function takes any number.
            let picked = unsafe { [pick(0), pick(2), pick(5), pick(9)] };
            assert_eq!(picked, [11, 5, 90, -1]);
        }
    }

    #[test]
    fn missing_symbols_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let (source, object) = (folder.path().join("k.c"), folder.path().join("k.o"));
        std::fs::write(&source, "void no_such_function(void); void k(void) { no_such_function(); }").unwrap();
        assert!(Command::new("cc").arg("-c").arg(&source).arg("-o").arg(&object).status().unwrap().success());
        let error = load(&std::fs::read(object).unwrap()).err().unwrap();
        assert_eq!(error.to_string(), "code object: needs no_such_function, which this program does not have");
    }

    #[test]
    fn damaged_objects_are_refused_without_a_panic() {
        let whole = compile(&["-O2", "-fPIC"]);
        assert!(load(b"").is_err());
        assert!(load(b"\x7fELF").is_err());
        for cut in (0..whole.len()).step_by(97) {
            let _ = load(&whole[..cut]);
        }
        for at in (0..whole.len()).step_by(13) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            let _ = load(&damaged);
        }
    }
}
