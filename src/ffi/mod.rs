//! The C ABI. Doc comments of public items become include/lora_switch.h (tests/generated.rs), which is the whole C manual; they are
//! written for its readers.
//!
//! An entry checks what only C can get wrong (null, alignment, integers that name nothing, struct sizes), makes views, and calls the
//! ground floor. All entries are `unsafe` for one reason: they trust the caller to keep to the conventions at the top of the header
//! (cbindgen.toml), above all that a pointer which is neither null nor misaligned points to what its parameter says. "The
//! conventions" in safety comments are those.
#![allow(non_camel_case_types, reason = "C's names, so that one search finds an item in C and here")]

// In the header's order; the blank lines keep rustfmt from sorting.
mod context;

mod bank;

mod switch;

mod apply;

mod linear;

mod advise;

mod route;

mod gate;

mod permute;

mod measure;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::StateMemory;
use crate::stream::Context;
use crate::view::{Mat, MatMut};
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The result of a call: LSW_OK to LSW_PANIC.
pub type lsw_status = i32;

/// The call did what it says.
pub const LSW_OK: i32 = 0;
/// An argument is null, misaligned or out of its bounds. Nothing was done; lsw_last_error names it.
pub const LSW_INVALID_ARGUMENT: i32 = 1;
/// The NVIDIA driver, or a device that is good enough, is missing.
pub const LSW_NO_DEVICE: i32 = 2;
/// This build holds no CUDA kernels, since no nvcc was found when it was made.
pub const LSW_NO_KERNELS: i32 = 3;
/// A driver call failed (lsw_last_cuda_result). Outputs of work that was under way are undefined.
pub const LSW_CUDA_ERROR: i32 = 4;
/// Memory could not be had. Nothing was done.
pub const LSW_OUT_OF_MEMORY: i32 = 5;
/// A bug in this library. It is not passed on to the caller's stack; destroy the objects of the
/// call.
pub const LSW_PANIC: i32 = 6;

const STATUS_NAMES: [&CStr; 7] =
    [c"LSW_OK", c"LSW_INVALID_ARGUMENT", c"LSW_NO_DEVICE", c"LSW_NO_KERNELS", c"LSW_CUDA_ERROR", c"LSW_OUT_OF_MEMORY", c"LSW_PANIC"];

/// 32-bit IEEE float.
pub const LSW_F32: i32 = 0;
/// 16-bit IEEE float.
pub const LSW_F16: i32 = 1;
/// bfloat16.
pub const LSW_BF16: i32 = 2;
/// 32-bit signed integer.
pub const LSW_I32: i32 = 3;
/// Bytes.
pub const LSW_U8: i32 = 4;

/// cbindgen reads literals only; these are the ground floor's numbers.
const DTYPES: [(i32, DType); 5] =
    [(LSW_F32, DType::F32), (LSW_F16, DType::F16), (LSW_BF16, DType::Bf16), (LSW_I32, DType::I32), (LSW_U8, DType::U8)];
const _: () = {
    let mut i = 0;
    while i < DTYPES.len() {
        assert!(DTYPES[i].0 == DTYPES[i].1 as i32);
        i += 1;
    }
};

/// A matrix to read: row-major, element (i, j) at data + (i * stride + j) elements. A vector of n
/// elements is a matrix of 1 x n.
///
/// stride is at least cols where there is more than one row, and does not matter otherwise. Without
/// rows or columns, nor does data. data needs the alignment of an element only, unless a function
/// says more.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_mat {
    /// Host memory on a CPU context, device memory on a CUDA context.
    pub data: *const c_void,
    /// Number of rows.
    pub rows: u64,
    /// Number of columns.
    pub cols: u64,
    /// Elements from one row to the next.
    pub stride: u64,
    /// LSW_F32 to LSW_U8.
    pub dtype: i32,
    /// 0.
    pub reserved: i32,
}

/// A matrix to write; all else as for lsw_mat. Bytes between its rows are left alone.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_mat_mut {
    /// Host memory on a CPU context, device memory on a CUDA context.
    pub data: *mut c_void,
    /// Number of rows.
    pub rows: u64,
    /// Number of columns.
    pub cols: u64,
    /// Elements from one row to the next.
    pub stride: u64,
    /// LSW_F32 to LSW_U8.
    pub dtype: i32,
    /// 0.
    pub reserved: i32,
}

/// The version of the library that runs, as LSW_VERSION packs it: that macro is the header's.
#[unsafe(no_mangle)]
pub extern "C" fn lsw_version() -> u32 {
    const fn number(text: &str) -> u32 {
        match u32::from_str_radix(text, 10) {
            Ok(number) => number,
            Err(_) => panic!("cargo's versions are made of numbers"),
        }
    }
    const MAJOR: u32 = number(env!("CARGO_PKG_VERSION_MAJOR"));
    const MINOR: u32 = number(env!("CARGO_PKG_VERSION_MINOR"));
    const PATCH: u32 = number(env!("CARGO_PKG_VERSION_PATCH"));
    MAJOR << 16 | MINOR << 8 | PATCH
}

/// The name of a status, "LSW_OK" say; "unknown status" for a number that is none. The text lives
/// forever.
#[unsafe(no_mangle)]
pub extern "C" fn lsw_status_name(status: lsw_status) -> *const c_char {
    let name = usize::try_from(status).ok().and_then(|i| STATUS_NAMES.get(i));
    name.unwrap_or(&c"unknown status").as_ptr()
}

/// What the last failure on the calling thread was, in words: the argument's name, its value and
/// its bound, or the driver call. Empty before the first failure; calls that succeed do not change
/// it. The text is valid until the next failure on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn lsw_last_error() -> *const c_char {
    // Gone while the thread ends: nothing to tell then.
    LAST.try_with(|last| last.borrow().text.as_ptr()).unwrap_or(c"".as_ptr())
}

/// The CUresult of the last failure on the calling thread; 0 if that was not LSW_CUDA_ERROR.
#[unsafe(no_mangle)]
pub extern "C" fn lsw_last_cuda_result() -> u32 {
    LAST.try_with(|last| last.borrow().cuda).unwrap_or(0)
}

#[derive(Default)]
struct Last {
    text: CString,
    cuda: u32,
}

thread_local! {
    static LAST: RefCell<Last> = RefCell::default();
}

fn remember(text: &str, cuda: u32) {
    let text = CString::new(text.replace('\0', "\u{fffd}")).expect("no nul is left");
    // While the thread ends there is nobody left to read it.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Last { text, cuda });
}

/// Runs an entry's body: nothing unwinds into C, and what went wrong can be read with
/// lsw_last_error.
fn guard(body: impl FnOnce() -> Result<()>) -> lsw_status {
    // Unwind safe: LSW_PANIC tells the caller to give up the objects of the call.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => LSW_OK,
        Ok(Err(error)) => {
            let (status, cuda) = status_of(&error);
            remember(&error.to_string(), cuda);
            status
        }
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
            remember(&format!("a bug in lora-switch: {text}"), 0);
            std::mem::forget(payload); // its drop could panic once more
            LSW_PANIC
        }
    }
}

fn status_of(error: &Error) -> (lsw_status, u32) {
    match error {
        Error::Argument { .. } => (LSW_INVALID_ARGUMENT, 0),
        Error::NoDevice { .. } => (LSW_NO_DEVICE, 0),
        Error::NoKernels { .. } => (LSW_NO_KERNELS, 0),
        Error::Cuda { code, .. } => (LSW_CUDA_ERROR, *code),
        Error::OutOfMemory { .. } => (LSW_OUT_OF_MEMORY, 0),
    }
}

/// The header's promise about threads: contexts and banks are shared between them, sets move.
const _: fn() = || {
    fn is_shared<T: Send + Sync>() {}
    fn moves<T: Send>() {}
    is_shared::<context::lsw_context>();
    is_shared::<bank::lsw_bank>();
    moves::<switch::lsw_switch>();
};

/// Neither null nor misaligned.
fn check_pointer<T>(ptr: *const T, name: &str) -> Result<()> {
    if ptr.is_null() {
        return Err(Error::argument(name, "null", "an address"));
    }
    if !ptr.is_aligned() {
        return Err(Error::argument(name, format!("{ptr:p}"), format!("a multiple of {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// An object behind its handle.
///
/// # Safety
/// The conventions: a handle that is not null is one that its create gave out and that is not
/// destroyed during the call.
unsafe fn handle<'a, T>(ptr: *const T, name: &str) -> Result<&'a T> {
    check_pointer(ptr, name)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { &*ptr })
}

/// An object behind its handle, to change.
///
/// # Safety
/// As for [`handle`], and no other call uses the object meanwhile.
unsafe fn handle_mut<'a, T>(ptr: *mut T, name: &str) -> Result<&'a mut T> {
    check_pointer(ptr, name)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { &mut *ptr })
}

/// Ends an object; null is none.
///
/// # Safety
/// As for [`handle`], and nobody uses the handle again.
unsafe fn destroy<T>(ptr: *mut T) {
    if !ptr.is_null() {
        guard(|| {
            check_pointer(ptr, "handle")?;
            // SAFETY: Out::give boxed it; the caller's promise.
            drop(unsafe { Box::from_raw(ptr) });
            Ok(())
        });
    }
}

/// Where a result goes: checked before the work, written after it.
struct Out<T>(*mut T);

impl<T> Out<T> {
    /// # Safety
    /// The conventions: a pointer that is neither null nor misaligned can be written during the
    /// call.
    unsafe fn new(ptr: *mut T, name: &str) -> Result<Self> {
        check_pointer(ptr, name)?;
        Ok(Self(ptr))
    }

    fn set(self, value: T) {
        // SAFETY: the promise that `new` got.
        unsafe { self.0.write(value) }
    }
}

impl<T> Out<*mut T> {
    /// Hands an object over; [`destroy`] takes it back.
    fn give(self, object: T) {
        self.set(Box::into_raw(Box::new(object)));
    }
}

/// An array to read; of no elements, null is as good as any address.
///
/// # Safety
/// The conventions: the elements can be read during the call, and nobody writes them meanwhile.
unsafe fn slice<'a, T>(ptr: *const T, count: u64, name: &str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check_pointer(ptr, name)?;
    let fits = count.checked_mul(size_of::<T>() as u64).is_some_and(|bytes| bytes <= isize::MAX as u64);
    if !fits {
        return Err(Error::argument(format!("the number of {name}"), count, "what fits an address space"));
    }
    // SAFETY: the caller's promise; checked address and size.
    Ok(unsafe { std::slice::from_raw_parts(ptr, count as usize) })
}

/// A `#[repr(C)]` struct whose first field is `struct_size`, whose fields are numbers and
/// pointers, and whose 4-byte fields come in pairs, so that a size that is a multiple of 8 ends
/// between fields.
trait Options: Copy {
    /// What stands for a null pointer, and for the fields beyond a smaller struct_size.
    const DEFAULT: Self;
}

/// More than any struct of options will ever need: a struct_size above it is no size.
const MAX_OPTIONS: u64 = 4096;

/// Reads options that another version of the header may have laid out: shorter, or longer with
/// nothing set in what is unknown here.
///
/// # Safety
/// The conventions: a pointer that is neither null nor misaligned points to struct_size bytes.
unsafe fn options<T: Options>(ptr: *const T) -> Result<T> {
    // SAFETY: the caller's promise.
    unsafe { named_options(ptr, "options") }
}

/// # Safety
/// As for [`options`].
unsafe fn named_options<T: Options>(ptr: *const T, name: &str) -> Result<T> {
    let mut options = T::DEFAULT;
    if ptr.is_null() {
        return Ok(options);
    }
    // SAFETY: the caller's promise.
    let size = unsafe { struct_size(ptr, name) }?;
    let known = size_of::<T>();
    // SAFETY: the caller's promise. Padding there is none (see the trait), so every byte is initialised.
    let bytes = unsafe { std::slice::from_raw_parts(ptr.cast::<u8>(), size) };
    if bytes.iter().skip(known).any(|&byte| byte != 0) {
        let bound = format!("{known}, or larger with zeros behind: this version knows no further options");
        return Err(Error::argument(format!("{name}.struct_size"), size, bound));
    }
    // SAFETY: a prefix of a struct for which all bit patterns are values.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut options).cast::<u8>(), size.min(known)) };
    Ok(options)
}

/// What a struct says of its size.
///
/// # Safety
/// As for [`options`].
unsafe fn struct_size<T: Options>(ptr: *const T, name: &str) -> Result<usize> {
    check_pointer(ptr, name)?;
    // SAFETY: every struct of options begins with its size.
    let size = unsafe { ptr.cast::<u64>().read() };
    if !(8..=MAX_OPTIONS).contains(&size) || size % 8 != 0 {
        let bound = "the size of the struct (a multiple of 8)";
        return Err(Error::argument(format!("{name}.struct_size"), size, bound));
    }
    Ok(size as usize)
}

/// Where a result goes that another version of the header may have laid out, by the struct_size in
/// it: of a shorter one what it has is written, of a longer one what is known here.
struct SizedOut<T> {
    ptr: *mut T,
    size: usize,
}

impl<T: Options> SizedOut<T> {
    /// # Safety
    /// As for [`options`], and the struct can be written during the call.
    unsafe fn new(ptr: *mut T, name: &str) -> Result<Self> {
        // SAFETY: the caller's promise.
        Ok(Self { ptr, size: unsafe { struct_size(ptr, name) }?.min(size_of::<T>()) })
    }

    fn set(self, value: T) {
        let (from, to) = ((&raw const value).cast::<u8>(), self.ptr.cast::<u8>());
        // SAFETY: the promise that `new` got; as much of both structs as they share, without their sizes.
        unsafe { std::ptr::copy_nonoverlapping(from.add(8), to.add(8), self.size - 8) };
    }
}

fn check_reserved(value: i32) -> Result<()> {
    if value == 0 { Ok(()) } else { Err(Error::argument("reserved", value, "0")) }
}

fn flag(value: i32, name: &str) -> Result<bool> {
    match value {
        0 | 1 => Ok(value == 1),
        _ => Err(Error::argument(name, value, "0 or 1")),
    }
}

/// The dtype of a struct in which `reserved` follows it.
fn dtype(number: i32, reserved: i32) -> Result<DType> {
    check_reserved(reserved)?;
    let found = DTYPES.iter().find(|(known, _)| *known == number);
    let bound = "LSW_F32, LSW_F16, LSW_BF16, LSW_I32 or LSW_U8";
    found.map(|(_, dtype)| *dtype).ok_or_else(|| Error::argument("dtype", number, bound))
}

/// # Safety
/// The conventions: a pointer that is neither null nor misaligned points to an `lsw_mat`, whose
/// memory can be read (on CUDA: by the work that the call enqueues).
unsafe fn mat<'a>(context: &Context, ptr: *const lsw_mat, name: &str) -> Result<Mat<'a>> {
    check_pointer(ptr, name)?;
    // SAFETY: the caller's promise.
    let mat = unsafe { ptr.read() };
    let dtype = dtype(mat.dtype, mat.reserved).map_err(|e| e.within(name))?;
    // SAFETY: as above.
    Ok(unsafe { Mat::raw(context, mat.data as u64, dtype, mat.rows, mat.cols, mat.stride) })
}

/// # Safety
/// As for [`mat`], unless null.
unsafe fn optional<'a>(context: &Context, given: *const lsw_mat, name: &str) -> Result<Option<Mat<'a>>> {
    // SAFETY: the caller's promise.
    if given.is_null() { Ok(None) } else { unsafe { mat(context, given, name) }.map(Some) }
}

/// # Safety
/// As for [`mat`], and the memory can be written.
unsafe fn mat_mut<'a>(context: &Context, ptr: *const lsw_mat_mut, name: &str) -> Result<MatMut<'a>> {
    check_pointer(ptr, name)?;
    // SAFETY: the caller's promise.
    let mat = unsafe { ptr.read() };
    let dtype = dtype(mat.dtype, mat.reserved).map_err(|e| e.within(name))?;
    // SAFETY: as above.
    Ok(unsafe { MatMut::raw(context, mat.data as u64, dtype, mat.rows, mat.cols, mat.stride) })
}

/// A call's workspace.
///
/// # Safety
/// The conventions: `bytes` of the context's memory, which nobody else touches meanwhile.
unsafe fn workspace<'a>(context: &Context, addr: *mut c_void, bytes: u64) -> MatMut<'a> {
    // SAFETY: the caller's promise.
    unsafe { MatMut::raw(context, addr as u64, DType::U8, 1, bytes, bytes) }
}

/// The memory of an object's tables: null and 0 to have it allocated.
///
/// # Safety
/// The conventions: `bytes` of device memory that nobody else touches while the object lives.
unsafe fn state_memory(ptr: *mut c_void, bytes: u64) -> Result<StateMemory> {
    match (ptr.is_null(), bytes) {
        (true, 0) => Ok(StateMemory::allocate()),
        (true, _) => Err(Error::argument("memory", "null", "an address, since memory_bytes is not 0")),
        // SAFETY: the caller's promise.
        (false, _) => Ok(unsafe { StateMemory::at(ptr as u64, bytes) }),
    }
}
