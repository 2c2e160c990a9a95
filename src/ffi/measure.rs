//! What the machine allows.

use super::context::{lsw_context, on};
use super::{guard, lsw_mat, lsw_mat_mut, lsw_status, mat, mat_mut};
use crate::dtype::DType;
use crate::measure;
use crate::view::MatMut;
use std::ffi::c_void;

/// y = factor * x: reads and writes every element once, as fast as a kernel without an adapter can.
/// A switch moves the same bytes, so the ratio of the two in one run is what the adapters cost.
///
/// x and y are vectors [1, n] of LSW_F32, LSW_F16 or LSW_BF16, the same for both, with addresses
/// that are multiples of 16 bytes. One launch; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_measure_scale(
    context: *const lsw_context,
    stream: *mut c_void,
    factor: f32,
    x: *const lsw_mat,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (x, mut y) = unsafe { (mat(context, x, "x")?, mat_mut(context, y, "y")?) };
        measure::scale(&stream, factor, &x, &mut y)
    })
}

/// y = factor * y; all else as for lsw_measure_scale.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_measure_scale_in_place(
    context: *const lsw_context,
    stream: *mut c_void,
    factor: f32,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let mut y = unsafe { mat_mut(context, y, "y") }?;
        measure::scale_in_place(&stream, factor, &mut y)
    })
}

/// Fills a vector y with size * uniform(-1, 1): element i depends on the seed and i alone, and is
/// the same on both backends. All else as for lsw_measure_scale.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_measure_fill_random(
    context: *const lsw_context,
    stream: *mut c_void,
    seed: u64,
    size: f32,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let mut y = unsafe { mat_mut(context, y, "y") }?;
        measure::fill_random(&stream, seed, size, &mut y)
    })
}

/// Reads a vector x once, as a pass over a model's weights does: *sink ^= the xor of its bytes taken
/// as little-endian 32-bit words, the last one filled up with zeros. The sink is one word in the
/// context's memory, there so that no load can be left out. All else as for lsw_measure_scale.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_measure_read(
    context: *const lsw_context,
    stream: *mut c_void,
    x: *const lsw_mat,
    sink: *mut i32,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (x, mut sink) = unsafe { (mat(context, x, "x")?, MatMut::raw(context, sink as u64, DType::I32, 1, 1, 1)) };
        measure::read(&stream, &x, &mut sink)
    })
}

/// Writes each run of x, 8 KB, `times` times to y: the bytes of a gather in its mix of reads and
/// writes, without indices.
///
/// x [1, n] and y [1, n * times] are vectors of LSW_F32, LSW_F16 or LSW_BF16, the same for both, with
/// addresses that are multiples of 16 bytes; n in whole runs, times at most 32. One launch; enqueued,
/// and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_measure_repeat(
    context: *const lsw_context,
    stream: *mut c_void,
    times: u64,
    x: *const lsw_mat,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (x, mut y) = unsafe { (mat(context, x, "x")?, mat_mut(context, y, "y")?) };
        measure::repeat(&stream, times, &x, &mut y)
    })
}

/// Writes the xor of each `times` runs of x, 8 KB, to a run of y: the bytes of a combine in its mix
/// of reads and writes, without indices. As lsw_measure_repeat, with x and y the other way round.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_measure_fold(
    context: *const lsw_context,
    stream: *mut c_void,
    times: u64,
    x: *const lsw_mat,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (x, mut y) = unsafe { (mat(context, x, "x")?, mat_mut(context, y, "y")?) };
        measure::fold(&stream, times, &x, &mut y)
    })
}
