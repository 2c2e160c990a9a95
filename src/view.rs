//! Matrices: where they lie, of what shape, and who keeps their memory alive.
//!
//! All are row-major with a stride between rows, counted in elements; a vector of n elements is a matrix of 1 x n.
//! [`Mat`] and [`MatMut`] borrow memory for one call. [`Tensor`] and [`Weight`] hold memory that an object reads or writes long after
//! the call that received it: a bank's adapters, a switch set's weights.

use crate::check::Checked;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::stream::{Context, Stream};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, SyncOnDrop};
use std::any::Any;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

/// Where memory lies: on the host, or in a CUDA context, and then the stream that its safe owner is tied to (raw memory is free).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    Device { context: usize, stream: Option<usize> },
}

impl Place {
    /// The stream that a safe owner ties the memory to.
    pub fn tied_to(self) -> Option<usize> {
        match self {
            Self::Device { stream, .. } => stream,
            Self::Host => None,
        }
    }
}

/// A matrix without its owner.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawMat {
    pub addr: u64,
    pub dtype: DType,
    pub rows: u64,
    pub cols: u64,
    pub stride: u64,
    pub place: Place,
}

impl RawMat {
    /// Elements from the first to one past the last; None where that overflows.
    pub fn span(&self) -> Option<u64> {
        if self.rows == 0 || self.cols == 0 {
            return Some(0);
        }
        (self.rows - 1).checked_mul(self.stride)?.checked_add(self.cols)
    }

    /// The bytes that the span covers, as addresses. Only of a matrix whose span was checked.
    pub fn range(&self) -> Range<u64> {
        self.addr..self.addr + self.span().expect("checked span") * self.dtype.size()
    }

    /// Whether two checked matrices share an element. Exact at equal stride and dtype; else whether their spans overlap.
    pub fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.range(), other.range());
        if self.is_empty() || other.is_empty() {
            return false;
        }
        if a.start >= b.end || b.start >= a.end {
            return false;
        }
        // A single row may have any stride, one below its columns too, and then it is on no grid.
        let on_grid = |mat: &Self| mat.stride >= mat.cols;
        if self.stride != other.stride || self.dtype != other.dtype || !on_grid(self) || !on_grid(other) {
            return true;
        }
        // On the common grid of rows, `other` begins `row` rows and `col` columns after the start of the lower one.
        let (low, high) = if self.addr <= other.addr { (self, other) } else { (other, self) };
        let distance = high.addr - low.addr;
        let Some(stride) = low.stride.checked_mul(low.dtype.size()) else { return true };
        if distance % low.dtype.size() != 0 || stride == 0 {
            return true;
        }
        let (row, col) = (distance / stride, distance % stride / low.dtype.size());
        let same_row = row < low.rows && col < low.cols;
        let wraps = col + high.cols > low.stride && row + 1 < low.rows;
        same_row || wraps
    }

    /// The same bytes under another element type of the same size.
    pub fn with_dtype(self, dtype: DType) -> Self {
        debug_assert_eq!(self.dtype.size(), dtype.size());
        Self { dtype, ..self }
    }

    pub fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// Address and row bytes are multiples of 16.
    pub fn aligned16(&self) -> bool {
        // Wrapping, since a single row's stride is unbounded: modulo 16 that is exact.
        self.addr.is_multiple_of(16) && self.stride.wrapping_mul(self.dtype.size()).is_multiple_of(16)
    }

    fn sub(&self, rows: Range<u64>, cols: Range<u64>) -> Result<Self> {
        if rows.start > rows.end || rows.end > self.rows {
            return Err(Error::argument("rows", format!("{rows:?}"), format!("within 0..{}", self.rows)));
        }
        if cols.start > cols.end || cols.end > self.cols {
            return Err(Error::argument("cols", format!("{cols:?}"), format!("within 0..{}", self.cols)));
        }
        // Wrapping, since a single row's stride is unbounded: then only an empty part begins past it, and its address does not matter.
        let offset = rows.start.wrapping_mul(self.stride).wrapping_add(cols.start).wrapping_mul(self.dtype.size());
        let addr = self.addr.wrapping_add(offset);
        Ok(Self { addr, rows: rows.end - rows.start, cols: cols.end - cols.start, ..*self })
    }

    /// The stride of a single row does not matter: one that a device could not hold becomes that of a row padded to 16 bytes.
    pub fn with_usable_stride(self) -> Self {
        let is_usable = self.rows > 1 || self.stride <= u64::from(u32::MAX);
        let stride = if is_usable { self.stride } else { self.cols.next_multiple_of(16 / self.dtype.size()) };
        Self { stride, ..self }
    }

    /// A row of host memory.
    ///
    /// # Safety
    /// The matrix is checked host memory of element type T, alive and not written through anything else for `'a`; `row < rows`.
    pub unsafe fn row<'a, T: Element>(&self, row: u64) -> &'a [T] {
        debug_assert!(self.place == Place::Host && self.dtype == T::DTYPE && row < self.rows);
        if self.cols == 0 {
            return &[];
        }
        // SAFETY: the caller's promise; the element lies inside the checked span.
        unsafe { std::slice::from_raw_parts((self.addr as *const T).add((row * self.stride) as usize), self.cols as usize) }
    }

    /// A row of host memory, to write.
    ///
    /// # Safety
    /// As for [`RawMat::row`], and nothing else reads or writes this row for `'a`.
    pub unsafe fn row_mut<'a, T: Element>(&self, row: u64) -> &'a mut [T] {
        debug_assert!(self.place == Place::Host && self.dtype == T::DTYPE && row < self.rows);
        if self.cols == 0 {
            return &mut [];
        }
        // SAFETY: the caller's promise; the element lies inside the checked span.
        unsafe { std::slice::from_raw_parts_mut((self.addr as *mut T).add((row * self.stride) as usize), self.cols as usize) }
    }
}

fn shaped<T: Element>(addr: u64, len: usize, rows: usize, cols: usize, stride: usize, place: Place) -> Result<RawMat> {
    let mat = RawMat { addr, dtype: T::DTYPE, rows: rows as u64, cols: cols as u64, stride: stride as u64, place };
    match mat.span() {
        Some(span) if span <= len as u64 => Ok(mat),
        _ => {
            Err(Error::argument("shape", format!("{rows} x {cols} at stride {stride}"), format!("inside the {len} elements of the memory")))
        }
    }
}

/// Keeps memory borrowed for the length of a call; for cudarc's slices it also records their use when it is dropped.
#[derive(Debug)]
struct Guard<'a> {
    _sync: Option<SyncOnDrop<'a>>,
    _memory: PhantomData<&'a mut ()>,
}

macro_rules! accessors {
    () => {
        /// Number of rows.
        pub fn rows(&self) -> u64 {
            self.raw.rows
        }
        /// Number of columns.
        pub fn cols(&self) -> u64 {
            self.raw.cols
        }
        /// Elements from one row to the next.
        pub fn stride(&self) -> u64 {
            self.raw.stride
        }
        /// Element type.
        pub fn dtype(&self) -> DType {
            self.raw.dtype
        }
        /// Address of the first element: a host or a device address.
        pub fn addr(&self) -> u64 {
            self.raw.addr
        }
    };
}

/// A matrix to read.
#[derive(Debug)]
pub struct Mat<'a> {
    pub(crate) raw: RawMat,
    _guard: Guard<'a>,
}

/// A matrix to write.
#[derive(Debug)]
pub struct MatMut<'a> {
    pub(crate) raw: RawMat,
    _guard: Guard<'a>,
}

impl<'a> Mat<'a> {
    accessors!();

    pub(crate) fn of(raw: RawMat) -> Self {
        Self { raw, _guard: Guard { _sync: None, _memory: PhantomData } }
    }

    /// Host memory, rows one after the other.
    pub fn host<T: Element>(data: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        Self::host_strided(data, rows, cols, cols)
    }

    /// Host memory with `stride` elements from one row to the next.
    pub fn host_strided<T: Element>(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Result<Self> {
        shaped::<T>(data.as_ptr() as u64, data.len(), rows, cols, stride, Place::Host).map(Self::of)
    }

    /// A cudarc slice or view, read by work on `stream`. cudarc's waits are enqueued here and its record when the `Mat` is dropped.
    ///
    /// # Errors
    /// On a shape that the slice does not hold, a slice of another stream, a raw stream, and, with cudarc's event tracking on, a stream
    /// that is capturing.
    pub fn cuda<T: Element>(data: &'a impl DevicePtr<T>, stream: &'a Stream, rows: usize, cols: usize, stride: usize) -> Result<Self> {
        let (owner, place) = stream.tracked("stream", data.stream())?;
        let (addr, sync) = data.device_ptr(owner);
        let raw = shaped::<T>(addr, data.len(), rows, cols, stride, place)?;
        Ok(Self { raw, _guard: Guard { _sync: Some(sync), _memory: PhantomData } })
    }

    /// Memory by address.
    ///
    /// # Safety
    /// `(rows - 1) * stride + cols` elements from `addr` on are initialised memory of `context`'s place (host memory on a CPU context,
    /// device memory on a CUDA context), and stay alive, and are written by nobody, until the work that reads them has finished.
    pub unsafe fn raw(context: &Context, addr: u64, dtype: DType, rows: u64, cols: u64, stride: u64) -> Self {
        Self::of(RawMat { addr, dtype, rows, cols, stride, place: context.place() })
    }

    /// A row of host memory.
    ///
    /// # Errors
    /// Where the matrix is on a device, holds another type, is null or misaligned, or has no such row.
    pub fn row<T: Element>(&self, row: u64) -> Result<&[T]> {
        self.raw.expect("matrix").place_is(Place::Host)?.dtype_in(&[T::DTYPE])?.memory()?;
        if row >= self.raw.rows {
            return Err(Error::argument("row", row, format!("below {}", self.raw.rows)));
        }
        // SAFETY: checked just above; the memory is borrowed for reading as long as self is.
        Ok(unsafe { self.raw.row(row) })
    }
}

impl<'a> MatMut<'a> {
    accessors!();

    pub(crate) fn of(raw: RawMat) -> Self {
        Self { raw, _guard: Guard { _sync: None, _memory: PhantomData } }
    }

    /// Host memory, rows one after the other.
    pub fn host<T: Element>(data: &'a mut [T], rows: usize, cols: usize) -> Result<Self> {
        Self::host_strided(data, rows, cols, cols)
    }

    /// Host memory with `stride` elements from one row to the next.
    pub fn host_strided<T: Element>(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Result<Self> {
        shaped::<T>(data.as_mut_ptr() as u64, data.len(), rows, cols, stride, Place::Host).map(Self::of)
    }

    /// A cudarc slice or view, written by work on `stream`. See [`Mat::cuda`].
    pub fn cuda<T: Element>(
        data: &'a mut impl DevicePtrMut<T>,
        stream: &'a Stream,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self> {
        let (owner, place) = stream.tracked("stream", data.stream())?;
        let len = data.len();
        let (addr, sync) = data.device_ptr_mut(owner);
        let raw = shaped::<T>(addr, len, rows, cols, stride, place)?;
        Ok(Self { raw, _guard: Guard { _sync: Some(sync), _memory: PhantomData } })
    }

    /// Memory by address.
    ///
    /// # Safety
    /// As for [`Mat::raw`], and nobody else reads or writes the elements until the work that writes them has finished. They need not
    /// be initialised.
    pub unsafe fn raw(context: &Context, addr: u64, dtype: DType, rows: u64, cols: u64, stride: u64) -> Self {
        Self::of(RawMat { addr, dtype, rows, cols, stride, place: context.place() })
    }
}

type Owner = Option<Arc<dyn Any + Send + Sync>>;

/// A `Vec` whose elements are only reached by address from now on: a `Weight` writes them while the owner is shared.
struct HostBuffer<T> {
    ptr: *mut T,
    len: usize,
    capacity: usize,
}

// SAFETY: it only owns the allocation; access is governed by Tensor (shared, read only) and Weight (unique rectangles).
unsafe impl<T: Send> Send for HostBuffer<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for HostBuffer<T> {}

impl<T> HostBuffer<T> {
    fn new(data: Vec<T>) -> Self {
        let mut data = ManuallyDrop::new(data);
        Self { ptr: data.as_mut_ptr(), len: data.len(), capacity: data.capacity() }
    }
}

impl<T> Drop for HostBuffer<T> {
    fn drop(&mut self) {
        // SAFETY: the parts of the Vec that `new` took apart, put together once.
        drop(unsafe { Vec::from_raw_parts(self.ptr, self.len, self.capacity) });
    }
}

macro_rules! held {
    ($name:ident, $what:literal) => {
        impl $name {
            accessors!();

            /// Host memory, rows one after the other.
            pub fn from_vec<T: Element>(data: Vec<T>, rows: usize, cols: usize) -> Result<Self> {
                Self::from_vec_strided(data, rows, cols, cols)
            }

            /// Host memory with `stride` elements from one row to the next.
            pub fn from_vec_strided<T: Element>(data: Vec<T>, rows: usize, cols: usize, stride: usize) -> Result<Self> {
                let buffer = HostBuffer::new(data);
                let raw = shaped::<T>(buffer.ptr as u64, buffer.len, rows, cols, stride, Place::Host)?;
                Ok(Self { raw, owner: Some(Arc::new(buffer)) })
            }

            /// Device memory. It belongs to its slice's stream: objects that hold it work on that stream only. Not while that stream
            /// is capturing with cudarc's event tracking on: cudarc's wait would break the capture.
            pub fn from_cuda<T: Element>(data: CudaSlice<T>, rows: usize, cols: usize, stride: usize) -> Result<Self> {
                let stream = data.stream().clone();
                let place = Place::Device { context: stream.context().cu_ctx() as usize, stream: Some(stream.cu_stream() as usize) };
                let (addr, sync) = data.device_ptr(&stream);
                drop(sync);
                let raw = shaped::<T>(addr, data.len(), rows, cols, stride, place)?;
                Ok(Self { raw, owner: Some(Arc::new(data)) })
            }

            #[doc = concat!("Memory by address.\n\n# Safety\n", $what)]
            pub unsafe fn from_raw(context: &Context, addr: u64, dtype: DType, rows: u64, cols: u64, stride: u64) -> Self {
                Self { raw: RawMat { addr, dtype, rows, cols, stride, place: context.place() }, owner: None }
            }
        }
    };
}

/// Memory that an object reads as long as it lives: adapters, base weights. Shared; a clone is another handle to the same memory.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub(crate) raw: RawMat,
    owner: Owner,
}
held!(
    Tensor,
    "`(rows - 1) * stride + cols` elements from `addr` on are initialised memory of `context`'s place, and stay alive, and are written \
     only in stream order with the work of every object that holds this tensor (an adapter not at all while it is in a slot of a bank: \
     write it, then `AdapterBank::set_slot`), until those objects are gone or have let go of it."
);

impl Tensor {
    /// The part of it in these rows and columns: one projection of a fused weight, one rank's share of an adapter.
    pub fn slice(&self, rows: Range<u64>, cols: Range<u64>) -> Result<Self> {
        Ok(Self { raw: self.raw.sub(rows, cols)?, owner: self.owner.clone() })
    }
}

/// Memory that a switch set writes: unique, whole or a rectangle of something larger.
#[derive(Debug)]
pub struct Weight {
    pub(crate) raw: RawMat,
    owner: Owner,
}
held!(
    Weight,
    "`(rows - 1) * stride + cols` elements from `addr` on are memory of `context`'s place (initialised, for a set in place), and stay \
     alive until the set that gets this weight is gone and its work has finished. Whoever else reads or writes them does so in stream \
     order with the set's work, and tells the set of writes (`invalidate`)."
);

impl Weight {
    /// Splits a fused weight into row blocks of these heights, which together are all its rows.
    ///
    /// # Errors
    /// On heights with another sum, and where rows overlap: the blocks must be able to go to sets that know nothing of each other.
    pub fn split_rows(self, heights: &[u64]) -> Result<Vec<Self>> {
        self.raw.expect("weight").memory()?;
        if heights.iter().try_fold(0u64, |sum, h| sum.checked_add(*h)) != Some(self.raw.rows) {
            return Err(Error::argument("heights", format!("{heights:?}"), format!("{} in sum", self.raw.rows)));
        }
        let mut start = 0;
        let block = |&height: &u64| {
            let raw = self.raw.sub(start..start + height, 0..self.raw.cols)?;
            start += height;
            Ok(Self { raw, owner: self.owner.clone() })
        };
        heights.iter().map(block).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mat(addr: u64, rows: u64, cols: u64, stride: u64) -> RawMat {
        RawMat { addr: 0x1000 + 4 * addr, dtype: DType::F32, rows, cols, stride, place: Place::Host }
    }

    /// Every pair of small rectangles on one grid, against a set of elements.
    #[test]
    fn overlap_is_exact_at_equal_stride() {
        let stride = 5;
        let cells = |m: &RawMat| -> Vec<u64> {
            (0..m.rows).flat_map(|r| (0..m.cols).map(move |c| r * stride + c)).map(|i| m.addr + 4 * i).collect()
        };
        let a = mat(7, 3, 2, stride);
        for addr in 0..30 {
            for (rows, cols) in [(1, 1), (1, 5), (2, 2), (3, 4), (4, 1)] {
                let b = mat(addr, rows, cols, stride);
                let shared = cells(&a).iter().any(|x| cells(&b).contains(x));
                assert_eq!(a.overlaps(&b), shared, "at {addr}, {rows} x {cols}");
                assert_eq!(b.overlaps(&a), shared, "at {addr}, {rows} x {cols}, swapped");
            }
        }
    }

    /// A vector's stride is nowhere checked.
    #[test]
    fn vectors_overlap_at_any_stride() {
        for stride in [0, 1, 4, (1 << 62) + 1, u64::MAX] {
            let (a, b, c) = (mat(0, 1, 8, stride), mat(4, 1, 8, stride), mat(8, 1, 8, stride));
            assert!(a.overlaps(&b) && b.overlaps(&a) && !a.overlaps(&c) && !c.overlaps(&a), "at stride {stride}");
        }
    }

    /// `Mat::raw` takes any address; what hands out a slice must not.
    #[test]
    fn rows_of_bad_addresses_are_refused() {
        let (context, data) = (Context::cpu(1).unwrap(), [1f32; 4]);
        // SAFETY: the bad ones are refused before they are used.
        let at = |addr| unsafe { Mat::raw(&context, addr, DType::F32, 1, 2, 2) };
        let addr = data.as_ptr() as u64;
        assert_eq!(at(addr).row::<f32>(0).unwrap(), [1.0; 2]);
        assert!(at(0).row::<f32>(0).is_err() && at(addr + 2).row::<f32>(0).is_err());
    }

    #[test]
    fn weights_split_into_rows() {
        let weight = Weight::from_vec(vec![0f32; 12], 6, 2).unwrap();
        let base = weight.addr();
        let parts = weight.split_rows(&[1, 0, 5]).unwrap();
        assert_eq!(parts.iter().map(Weight::rows).collect::<Vec<_>>(), [1, 0, 5]);
        assert_eq!(parts[2].addr(), base + 8);
        assert!(Weight::from_vec(vec![0f32; 12], 6, 2).unwrap().split_rows(&[1, 4]).is_err());
        // Rows that share elements would be two weights over one memory.
        assert!(Weight::from_vec_strided(vec![0f32; 5], 2, 4, 1).unwrap().split_rows(&[1, 1]).is_err());
        let single = Weight::from_vec_strided(vec![0f32; 4], 1, 4, usize::MAX).unwrap();
        assert_eq!(single.split_rows(&[0, 1, 0]).unwrap().iter().map(Weight::rows).collect::<Vec<_>>(), [0, 1, 0]);
        assert!(Weight::from_vec(vec![0f32; 12], 6, 3).is_err());
    }
}
