//! Contexts: they choose the backend.

use super::{Out, destroy, guard, handle, lsw_status};
use crate::error::Result;
use crate::stream::{Context, Odd, Stream};
use std::ffi::c_void;

/// Bits of what a device found odd in values that it was given. lsw_context_take_odd: lsw_route met
/// a NaN or +inf logit, or a row with nothing finite.
pub const LSW_ODD_LOGITS: u32 = 1;
/// lsw_context_take_odd: lsw_permute met an id below -1 or past the last expert.
pub const LSW_ODD_ID: u32 = 2;
/// lsw_switch_odd, and lsw_context_take_odd of lsw_apply: an id below -1 or past the last slot.
pub const LSW_ODD_ROUTE_ID: u32 = 4;
/// lsw_switch_odd, and lsw_context_take_odd of lsw_apply: a coefficient that is not finite (in
/// place, also one of 2^126 or more in magnitude).
pub const LSW_ODD_COEFFICIENT: u32 = 8;
/// lsw_switch_odd: a set in place holds the product of an adapter that has been replaced; its
/// targets were left as they are.
pub const LSW_ODD_STALE_MERGE: u32 = 16;

const _: () = assert!(
    LSW_ODD_LOGITS == Odd::LOGITS.bits()
        && LSW_ODD_ID == Odd::ID.bits()
        && LSW_ODD_ROUTE_ID == Odd::ROUTE_ID.bits()
        && LSW_ODD_COEFFICIENT == Odd::COEFFICIENT.bits()
        && LSW_ODD_STALE_MERGE == Odd::STALE_MERGE.bits()
);

/// A backend, ready: the CPU with a number of threads, or a CUDA context with the kernels loaded.
/// May be used by several threads at a time, and destroyed before the objects that were made on it.
pub struct lsw_context(Context);

impl lsw_context {
    pub(super) fn get(&self) -> &Context {
        &self.0
    }
}

/// A context and a stream of it.
///
/// # Safety
/// The conventions: a live handle, and on a CUDA context a live stream of it.
pub(super) unsafe fn on<'a>(context: *const lsw_context, stream: *mut c_void) -> Result<(&'a Context, Stream)> {
    // SAFETY: the caller's promise.
    let context = unsafe { handle(context, "context") }?.get();
    // SAFETY: the caller's promise.
    Ok((context, unsafe { context.raw_stream(stream) }))
}

/// The CPU backend with this many threads, at most 1024: 0 = one a core, 1 = the calling thread
/// alone. Calls return when the work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_context_create_cpu(threads: u32, context: *mut *mut lsw_context) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let out = unsafe { Out::new(context, "context") }?;
        out.give(lsw_context(Context::cpu(threads as usize)?));
        Ok(())
    })
}

/// The CUDA backend on a device's primary context, which the CUDA runtime and PyTorch use too.
/// Loads the kernels; synchronises the context.
///
/// LSW_NO_KERNELS in a build without nvcc, LSW_NO_DEVICE without a driver or a device of compute
/// capability 8.0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_context_create_cuda(ordinal: u32, context: *mut *mut lsw_context) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let out = unsafe { Out::new(context, "context") }?;
        out.give(lsw_context(Context::cuda(ordinal as usize)?));
        Ok(())
    })
}

/// The CUDA backend on the caller's own CUcontext, which must outlive this context and all that is
/// made on it. Else as lsw_context_create_cuda.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_context_create_from_cuda(cu_context: *mut c_void, context: *mut *mut lsw_context) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let out = unsafe { Out::new(context, "context") }?;
        // SAFETY: the caller's promise: a live CUcontext (null is refused).
        out.give(lsw_context(unsafe { Context::from_raw_cuda(cu_context) }?));
        Ok(())
    })
}

/// Launches every kernel once with nothing to do, so that no later launch is a first one. Call it
/// before capturing a graph. Enqueued.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_context_warm(context: *const lsw_context, stream: *mut c_void) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        context.warm(&stream)
    })
}

/// Reads and clears what lsw_route, lsw_permute and lsw_apply found odd on this context: LSW_ODD_
/// bits, 0 for nothing. Synchronises the stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_context_take_odd(context: *const lsw_context, stream: *mut c_void, odd: *mut u32) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (_, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let out = unsafe { Out::new(odd, "odd") }?;
        out.set(stream.take_odd()?.bits());
        Ok(())
    })
}

/// Ends a context; NULL is ignored. Objects made on it live on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_context_destroy(context: *mut lsw_context) {
    // SAFETY: the conventions.
    unsafe { destroy(context) }
}
