//! The checks that every operation shares: host-side only, in 64 bits, each with the argument's name, value and bound.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::Stream;
use crate::view::{Place, RawMat};

/// A matrix under its name; each check returns it, so that checks chain.
#[derive(Clone, Copy)]
pub(crate) struct Named<'n> {
    pub name: &'n str,
    pub mat: RawMat,
}

pub(crate) trait Checked {
    fn expect<'n>(&self, name: &'n str) -> Named<'n>;
}
impl Checked for RawMat {
    fn expect<'n>(&self, name: &'n str) -> Named<'n> {
        Named { name, mat: *self }
    }
}

impl Named<'_> {
    fn error(&self, field: &str, value: impl std::fmt::Display, bound: impl Into<String>) -> Error {
        Error::argument(format!("{}.{field}", self.name), value, bound)
    }

    /// Not null, aligned to its elements, rows that do not overlap, and a span that fits an address space.
    pub fn memory(self) -> Result<Self> {
        let mat = &self.mat;
        if mat.is_empty() {
            return Ok(self);
        }
        if mat.rows > 1 && mat.stride < mat.cols {
            return Err(self.error("stride", mat.stride, format!("at least its {} columns", mat.cols)));
        }
        let bytes = mat.span().and_then(|span| span.checked_mul(mat.dtype.size()));
        if bytes.is_none_or(|bytes| bytes > i64::MAX as u64 || mat.addr.checked_add(bytes).is_none()) {
            let value = format!("{} x {} at stride {}", mat.rows, mat.cols, mat.stride);
            return Err(self.error("shape", value, "at most 2^63 bytes"));
        }
        if mat.addr == 0 {
            return Err(self.error("data", "null", "an address"));
        }
        if !mat.addr.is_multiple_of(mat.dtype.size()) {
            return Err(self.error("data", format!("{:#x}", mat.addr), format!("a multiple of {} bytes", mat.dtype.size())));
        }
        Ok(self)
    }

    pub fn dtype_in(self, allowed: &[DType]) -> Result<Self> {
        if allowed.contains(&self.mat.dtype) {
            return Ok(self);
        }
        let names: Vec<String> = allowed.iter().map(DType::to_string).collect();
        Err(self.error("dtype", self.mat.dtype, names.join(" or ")))
    }

    pub fn rows(self, rows: u64, why: &str) -> Result<Self> {
        if self.mat.rows == rows { Ok(self) } else { Err(self.error("rows", self.mat.rows, format!("{rows} ({why})"))) }
    }

    pub fn cols(self, cols: u64, why: &str) -> Result<Self> {
        if self.mat.cols == cols { Ok(self) } else { Err(self.error("cols", self.mat.cols, format!("{cols} ({why})"))) }
    }

    pub fn place_is(self, place: Place) -> Result<Self> {
        let say = |place: &Place| match place {
            Place::Host => "host memory",
            Place::Device { .. } => "device memory of the stream's context",
        };
        let same = match (&self.mat.place, &place) {
            (Place::Host, Place::Host) => true,
            (Place::Device { context: a, .. }, Place::Device { context: b, .. }) => a == b,
            _ => false,
        };
        if same {
            return Ok(self);
        }
        let value = if self.mat.place == Place::Host { "host memory" } else { "device memory of another context" };
        Err(self.error("data", value, say(&place)))
    }

    /// Memory that work on this stream may touch: the right place and, where a safe owner ties it to a stream, that stream.
    pub fn on(self, stream: &Stream) -> Result<Self> {
        let here = stream.place();
        if self.mat.is_empty() {
            return Ok(self);
        }
        let this = self.place_is(here)?;
        if let (Place::Device { stream: Some(a), .. }, Place::Device { stream: Some(b), .. }) = (self.mat.place, here)
            && a != b
        {
            return Err(self.error("stream", format!("{a:#x}"), format!("the stream of the call, {b:#x}")));
        }
        Ok(this)
    }

    /// An output may not share memory with anything else in the call.
    pub fn disjoint_from(self, others: &[Named<'_>]) -> Result<Self> {
        for other in others {
            if self.mat.overlaps(&other.mat) {
                let value = format!("{:#x}..{:#x}", self.mat.range().start, self.mat.range().end);
                return Err(self.error("data", value, format!("disjoint from {}", other.name)));
            }
        }
        Ok(self)
    }
}

/// A count that a kernel holds in 32 bits.
pub(crate) fn narrow(name: &str, value: u64, max: u64) -> Result<u32> {
    if value > max {
        return Err(Error::argument(name, value, format!("at most {max}")));
    }
    Ok(u32::try_from(value).expect("bounds are below 2^32"))
}

/// Row and item counts: kernels index them with 32-bit signed integers.
pub(crate) const MAX_COUNT: u64 = i32::MAX as u64;
