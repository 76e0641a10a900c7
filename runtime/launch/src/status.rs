//! What a call answers; the same numbers in C.

/// Result of a call across the C boundary.
///
/// The low byte is the kind; for [`Status::NULL_POINTER`] and [`Status::MISALIGNED`] of an input or
/// output the bits above hold its place plus one, inputs before outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Status(pub i32);

macro_rules! statuses {
    ($($(#[doc = $doc:literal])* $name:ident = $value:literal, $text:literal;)*) => {
        impl Status {
            $($(#[doc = $doc])* pub const $name: Self = Self($value);)*

            /// All kinds with their names in C (after the prefix) and texts.
            pub const ALL: &'static [(Self, &'static str, &'static core::ffi::CStr)] = &[
                $((Self::$name, stringify!($name), {
                    match core::ffi::CStr::from_bytes_with_nul(concat!($text, "\0").as_bytes()) {
                        Ok(text) => text,
                        Err(_) => c"",
                    }
                }),)*
            ];
        }
    };
}

statuses! {
    /// Done.
    OK = 0, "done";
    /// A pointer is null.
    NULL_POINTER = 1, "a pointer is null";
    /// A pointer is not aligned.
    MISALIGNED = 2, "a pointer is not aligned: workspace and weights need 64 bytes, tensors their element size";
    /// More tokens than the program was compiled for.
    TOO_MANY_TOKENS = 3, "more tokens than the program was compiled for";
    /// The workspace is too small for this number of tokens.
    WORKSPACE_TOO_SMALL = 4, "the workspace is too small; ask workspace_bytes for this number of tokens";
    /// No weights were bound.
    NOT_BOUND = 5, "no weights are bound to the handle";
    /// The weights were packed for another program, or not completely.
    WEIGHTS_MISMATCH = 6, "the weights were packed for another program, or not all slots are packed";
    /// Another thread is inside a call on this handle.
    BUSY = 7, "another thread is inside a call on this handle; use one handle for each calling thread";
    /// Memory ran out.
    OUT_OF_MEMORY = 8, "memory ran out";
    /// A thread could not be started.
    NO_THREAD = 9, "a thread could not be started";
    /// The processor lacks instructions that the code uses.
    UNSUPPORTED_CPU = 10, "the processor lacks instructions that this code was compiled for";
    /// The encoded program is damaged, or of another version.
    BAD_PROGRAM = 11, "the encoded program is damaged or of another version";
    /// This packing is not done natively; use packed weights.
    PACK_UNSUPPORTED = 12, "only plain float32 and bfloat16 tensors are packed here; bind weights that moec packed";
    /// A tensor has another type or shape than the slot needs.
    TENSOR_MISMATCH = 13, "a tensor has another type or shape than the weight slot needs";
    /// The stream must be null on a CPU.
    STREAM = 14, "the stream must be null for CPU code";
    /// A size does not fit.
    OVERFLOW = 15, "a size does not fit in 64 bits";
    /// Rows that the program takes are not there, or do not come out whole.
    UNFIT_TOKENS = 16, "a number of tokens for which a size of the program does not come out";
}

impl Status {
    /// The kind, without the place of an argument.
    pub const fn kind(self) -> Self {
        Self(self.0 & 0xff)
    }

    /// Place of the input or output that is meant, inputs first.
    pub const fn argument(self) -> Option<usize> {
        match self.0 >> 8 {
            0 => None,
            place => Some(place as usize - 1),
        }
    }

    /// The same kind, about an input or output.
    #[must_use]
    pub const fn about(self, place: usize) -> Self {
        Self(self.0 | ((place as i32 + 1) << 8))
    }

    /// What it means.
    pub fn text(self) -> &'static core::ffi::CStr {
        Self::ALL.iter().find(|(status, ..)| *status == self.kind()).map_or(c"unknown status", |(.., text)| text)
    }
}

/// Result inside the launcher.
pub type Result<T> = core::result::Result<T, Status>;
