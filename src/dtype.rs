//! Element types.

use half::{bf16, f16};
use std::fmt;

/// The type of a matrix's elements. The numbers are those of the C header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit IEEE float.
    F32 = 0,
    /// 16-bit IEEE float.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// 32-bit signed integer: ids and maps.
    I32 = 3,
    /// Bytes: workspaces, and rows of 1-byte elements.
    U8 = 4,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::U8 => 1,
        }
    }

    pub(crate) const FLOATS: &'static [Self] = &[Self::F32, Self::F16, Self::Bf16];
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I32 => "i32",
            Self::U8 => "u8",
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that is an element type. Sealed: plain numbers only, for which every bit pattern is a value.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Its [`DType`].
    const DTYPE: DType;
}

/// An [`Element`] that is a float.
pub trait Float: Element {
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

macro_rules! element {
    ($($t:ty => $dtype:ident),*) => {
        $(impl sealed::Sealed for $t {}
        impl Element for $t {
            const DTYPE: DType = DType::$dtype;
        })*
    };
}
element!(f32 => F32, f16 => F16, bf16 => Bf16, i32 => I32, u8 => U8);

impl Float for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(x: f32) -> Self {
        x
    }
}
impl Float for f16 {
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
}
impl Float for bf16 {
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Calls a function that is generic over [`Float`] with the type that a checked dtype names.
macro_rules! with_float {
    ($dtype:expr, $f:ident::<_>($($arg:expr),* $(,)?)) => {
        match $dtype {
            $crate::dtype::DType::F32 => $f::<f32>($($arg),*),
            $crate::dtype::DType::F16 => $f::<half::f16>($($arg),*),
            $crate::dtype::DType::Bf16 => $f::<half::bf16>($($arg),*),
            other => unreachable!("the plan's dtype is a float, not {other}"),
        }
    };
}
pub(crate) use with_float;
