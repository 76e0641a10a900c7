//! Gives the launcher object the names of a program.
//!
//! The launcher is compiled once, with symbols that start with `moec_launch_`. Each generated library
//! gets a copy with its own names, so that libraries share nothing.

/// Prefix of the launcher's symbols before renaming.
pub const PREFIX: &str = "moec_launch_";

/// Why an object cannot be renamed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbedError(pub &'static str);

impl std::fmt::Display for EmbedError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "launcher object: {}", self.0)
    }
}

impl std::error::Error for EmbedError {}

const SYMTAB: u64 = 2;
/// Bytes of a section header and of a symbol in ELF64.
const SECTION: usize = 64;
const SYMBOL: usize = 24;

fn number(bytes: &[u8], at: usize, size: usize) -> Result<u64, EmbedError> {
    let field = at.checked_add(size).and_then(|end| bytes.get(at..end)).ok_or(EmbedError("it is cut off"))?;
    Ok(field.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

fn index(bytes: &[u8], at: usize, size: usize) -> Result<usize, EmbedError> {
    usize::try_from(number(bytes, at, size)?).map_err(|_| EmbedError("a position does not fit"))
}

/// A copy of a relocatable ELF64 object in which every symbol `moec_launch_X` is called `NAME_X`,
/// and every other global symbol that it defines has `NAME_` before its name.
///
/// # Errors
/// The bytes are not such an object.
pub fn rename(object: &[u8], name: &str) -> Result<Vec<u8>, EmbedError> {
    // Class 64 bits, little-endian, relocatable.
    if object.get(..6) != Some(b"\x7fELF\x02\x01") || number(object, 16, 2)? != 1 {
        return Err(EmbedError("not a relocatable little-endian ELF64 file"));
    }
    let mut out = object.to_vec();
    let (sections, count) = (index(object, 40, 8)?, index(object, 60, 2)?);
    let section = |i: usize| i.checked_mul(SECTION).and_then(|n| n.checked_add(sections));
    let far = EmbedError("a position does not fit");
    for i in 0..count {
        let header = section(i).ok_or(far.clone())?;
        if number(object, header + 4, 4)? != SYMTAB {
            continue;
        }
        let (symbols, bytes) = (index(object, header + 24, 8)?, index(object, header + 32, 8)?);
        let strings = section(index(object, header + 40, 4)?).ok_or(far.clone())?;
        let (start, length) = (index(object, strings + 24, 8)?, index(object, strings + 32, 8)?);
        let end = start.checked_add(length).ok_or(far.clone())?;
        let old = object.get(start..end).ok_or(EmbedError("it is cut off"))?;
        // The old names stay where they are; new ones follow. The table may also hold section names.
        let mut table = old.to_vec();
        for k in 0..bytes / SYMBOL {
            let at = symbols.checked_add(k * SYMBOL).ok_or(far.clone())?;
            let offset = index(object, at, 4)?;
            let text = old.get(offset..).and_then(|s| s.split(|b| *b == 0).next()).ok_or(far.clone())?;
            // Whatever else the object defines for others must not meet its twin in another library.
            let (binding, defined) = (number(object, at + 4, 1)? >> 4, number(object, at + 6, 2)? != 0);
            let other = (binding != 0 && defined && !text.is_empty()).then_some(text);
            if let Some(rest) = text.strip_prefix(PREFIX.as_bytes()).or(other) {
                let place = u32::try_from(table.len()).map_err(|_| far.clone())?;
                table.extend_from_slice(name.as_bytes());
                table.push(b'_');
                table.extend_from_slice(rest);
                table.push(0);
                out.get_mut(at..at + 4).ok_or(EmbedError("it is cut off"))?.copy_from_slice(&place.to_le_bytes());
            }
        }
        let (place, size) = (out.len() as u64, table.len() as u64);
        out.extend_from_slice(&table);
        for (field, value) in [(24, place), (32, size)] {
            let field = out.get_mut(strings + field..strings + field + 8).ok_or(EmbedError("it is cut off"))?;
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_object_are_refused() {
        assert!(rename(b"", "x").is_err());
        assert!(rename(b"\x7fELF\x02\x01", "x").is_err());
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[16] = 1;
        header[40] = 60;
        header[60] = 3;
        assert_eq!(rename(&header, "x"), Err(EmbedError("it is cut off")));
    }
}
