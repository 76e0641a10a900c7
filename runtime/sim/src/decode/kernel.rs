//! What lane-wise kernels are made of: an expression over the lanes of up to three sources.

/// A lane value of a native integer type.
pub(super) trait Lane: Copy {
    fn of(x: u64) -> Self;
    fn bits(self) -> u64;
}

macro_rules! lanes {
    ($($t:ty as $u:ty),*) => { $(impl Lane for $t {
        #[inline(always)]
        fn of(x: u64) -> Self { x as $t }
        #[inline(always)]
        fn bits(self) -> u64 { self as $u as u64 }
    })* };
}
lanes!(u8 as u8, i8 as u8, u16 as u16, i16 as u16, u32 as u32, i32 as u32, u64 as u64, i64 as u64);

/// A kernel from an expression over lane values of type `$t`.
macro_rules! kernel {
    ($t:ty, |$x:ident| $e:expr) => {
        kernel!($t, |$x, _y, _z, _i| $e)
    };
    ($t:ty, |$x:ident, $y:ident| $e:expr) => {
        kernel!($t, |$x, $y, _z, _i| $e)
    };
    ($t:ty, |$x:ident, $y:ident, $z:ident| $e:expr) => {
        kernel!($t, |$x, $y, $z, _i| $e)
    };
    ($t:ty, |$x:ident, $y:ident, $z:ident, $i:ident| $e:expr) => {{
        fn k(a: &V, b: &V, c: &V, $i: u64, o: &mut V) {
            for l in 0..32 {
                let $x = <$t as Lane>::of(a[l]);
                let $y = <$t as Lane>::of(b[l]);
                let $z = <$t as Lane>::of(c[l]);
                let _ = ($y, $z);
                o[l] = ($e).bits();
            }
        }
        Some(k as Kernel)
    }};
}

/// The same kernel for each integer type.
macro_rules! by_int {
    ($ty:expr, $($f:tt)*) => {
        match $ty {
            Ty::U8 | Ty::B8 => kernel!(u8, $($f)*),
            Ty::S8 => kernel!(i8, $($f)*),
            Ty::U16 | Ty::B16 => kernel!(u16, $($f)*),
            Ty::S16 => kernel!(i16, $($f)*),
            Ty::U32 | Ty::B32 => kernel!(u32, $($f)*),
            Ty::S32 => kernel!(i32, $($f)*),
            Ty::U64 | Ty::B64 => kernel!(u64, $($f)*),
            Ty::S64 => kernel!(i64, $($f)*),
            _ => None,
        }
    };
}

macro_rules! raw {
    (|$x:ident| $e:expr) => {
        raw!(|$x, _y, _z, _i| $e)
    };
    (|$x:ident, $y:ident| $e:expr) => {
        raw!(|$x, $y, _z, _i| $e)
    };
    (|$x:ident, $y:ident, $z:ident| $e:expr) => {
        raw!(|$x, $y, $z, _i| $e)
    };
    (|$x:ident, $y:ident, $z:ident, $i:ident| $e:expr) => {{
        fn k(a: &V, b: &V, c: &V, $i: u64, o: &mut V) {
            for l in 0..32 {
                let ($x, $y, $z) = (a[l], b[l], c[l]);
                let _ = ($y, $z);
                o[l] = $e;
            }
        }
        k as Kernel
    }};
}

/// Negation for every integer lane type, since `wrapping_neg` is not a trait method.
pub(super) trait NegLane {
    fn wrapping_neg_lane(self) -> Self;
}
macro_rules! neg_lanes {
    ($($t:ty),*) => { $(impl NegLane for $t {
        #[inline(always)]
        fn wrapping_neg_lane(self) -> Self { self.wrapping_neg() }
    })* };
}
neg_lanes!(u8, i8, u16, i16, u32, i32, u64, i64);

pub(super) use {by_int, kernel, raw};
