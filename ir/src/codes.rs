//! The codes of this crate's findings. A published code keeps its meaning.

use crate::Code;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal: $title:literal,)*) => {
        $($(#[$doc])* #[doc = $title] pub const $name: Code = Code($code);)*
        /// Every code with its title.
        pub const ALL: &[(Code, &str)] = &[$((Code($code), $title),)*];
    };
}

codes! {
    SYNTAX = "I0001": "text that is not IR",
    ARITY = "I0002": "wrong number of operands",
    CYCLE = "I0003": "a value depends on itself",
    NAME = "I0004": "a name without definition, or with two",
    UNKNOWN_OP = "I0005": "an operation that does not exist",
    ATTRIBUTE = "I0006": "an attribute that is unknown, missing or of the wrong kind",
    OUTPUT = "I0007": "a result that does not exist or cannot be returned",
    DEPTH = "I0008": "too many nested regions",
    WEIGHT = "I0009": "a weight that is not declared",
    KIND = "I0010": "an operand of the wrong kind",
    SHAPE = "I0011": "sizes that do not fit",
    TOP_K = "I0012": "more experts per row than experts",
    GROUPS = "I0013": "groups that do not divide the experts",
    KEEP_GROUPS = "I0014": "more groups kept than there are, or too few for k",
    ON_OFF = "I0015": "forced experts that exceed k, do not exist or are forbidden",
    RANKS = "I0016": "ranks that repeat or exceed the experts",
    BANK_COVER = "I0017": "bank parts that do not cover every expert exactly once",
    BANK_WIDTH = "I0018": "experts with different output widths",
    CLASSES = "I0019": "classes that are no numbers or name unknown experts",
    UNWEIGHED = "I0020": "weights of a route that has none",
    WEIGHTED_TWICE = "I0021": "weights applied in dispatch and in combine",
    NEGATIVE_SCORES = "I0022": "weights divided by a sum of scores that may be negative",
    REPEAT = "I0023": "route rows times repeat differ from the rows",
    PAD = "I0024": "padded rows in a result",
    FFN_SHAPES = "I0025": "up, gate and down matrices that do not fit together",
    FACTORS = "I0026": "factors of a weight that do not fit together",
    GROUP_SIZE = "I0027": "a group size that does not divide the input width",
    BATCH = "I0028": "a batch-dependent operation in a graph without that flag",
    STATE = "I0029": "a state input and output of different types",
    OVERFLOW = "I0030": "a size beyond 64 bits",
    EQUATION = "I0031": "an equation that is not einsum",
    KERNEL = "I0032": "a kernel body that is not a kernel body",
    TYPE = "I0033": "a stated type that differs from the computed one",
    VALUE = "I0034": "an attribute outside its range",
    EXTENT = "I0035": "per-expert sizes that do not match the experts",
    JSON = "I0040": "graph JSON of the wrong structure",
    SIGNATURE = "I0041": "a weight or input whose shape is not known",
    BEYOND = "I0042": "a form that the op set leaves out by decision",
}
