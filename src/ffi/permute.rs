//! Gather-scatter.

use super::context::{lsw_context, on};
use super::{Out, guard, lsw_mat, lsw_mat_mut, lsw_status, mat, mat_mut};
use crate::dtype::DType;
use crate::permute::{combine, gather, permute, permute_workspace_bytes};
use crate::view::MatMut;
use std::ffi::c_void;

/// Bytes of workspace that lsw_permute needs for items = T k ids over this many experts: 0 on a CPU
/// context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_permute_workspace_bytes(context: *const lsw_context, items: u64, experts: u64, bytes: *mut u64) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions; the stream is only asked for its backend.
        let (_, stream) = unsafe { on(context, std::ptr::null_mut()) }?;
        // SAFETY: the conventions.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.set(permute_workspace_bytes(&stream, items, experts)?);
        Ok(())
    })
}

/// Sorts the items (t, j) of ids by expert, stably: items of one expert keep their order t k + j.
///
/// - ids [T, k], k at most 32; -1, or any id outside 0 to experts - 1, drops the item
///   (lsw_context_take_odd reports ids but for -1).
/// - offsets, experts + 1 elements: expert e has the rows from offsets[e] on, before offsets[e +
///   1]; the last is the number R of rows.
/// - row_map, T k elements: row -> item t k + j; -1 from R on.
/// - inverse [T, k]: item -> row; -1 for one that was dropped.
/// - workspace, at least lsw_permute_workspace_bytes, aligned to 4 bytes; its content does not
///   matter, and it is free again when the work is done. NULL where 0 bytes are needed.
///
/// All matrices are LSW_I32, none shares memory with another. experts from 1 to 1024, T k below
/// 2^31. Exact and deterministic. Two launches on CUDA; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_permute(
    context: *const lsw_context,
    stream: *mut c_void,
    experts: u64,
    ids: *const lsw_mat,
    offsets: *const lsw_mat_mut,
    row_map: *const lsw_mat_mut,
    inverse: *const lsw_mat_mut,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (ids, mut offsets, mut row_map, mut inverse) = unsafe {
            (
                mat(context, ids, "ids")?,
                mat_mut(context, offsets, "offsets")?,
                mat_mut(context, row_map, "row_map")?,
                mat_mut(context, inverse, "inverse")?,
            )
        };
        let (addr, bytes) = (workspace as u64, workspace_bytes);
        // SAFETY: the conventions.
        let mut workspace = unsafe { MatMut::raw(context, addr, DType::U8, 1, bytes, bytes) };
        permute(&stream, experts, &ids, &mut offsets, &mut row_map, &mut inverse, &mut workspace)
    })
}

/// Copies each token's row to the rows of its experts: rows[r] = x[row_map[r] / k].
///
/// - x [T, D], rows [R, D]: any dtype, the same for both; bytes are moved as they are.
/// - row_map, R elements of LSW_I32, from lsw_permute; R may be anything up to T k. Rows whose
///   entry names no token (-1) are left alone.
///
/// Every D, stride and offset works; 16-byte accesses serve where addresses and rows (stride
/// included) are multiples of 16 bytes. rows shares no memory with the others. Deterministic. One
/// launch; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_gather(
    context: *const lsw_context,
    stream: *mut c_void,
    x: *const lsw_mat,
    row_map: *const lsw_mat,
    k: u64,
    rows: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (x, row_map, mut rows) = unsafe { (mat(context, x, "x")?, mat(context, row_map, "row_map")?, mat_mut(context, rows, "rows")?) };
        gather(&stream, &x, &row_map, k, &mut rows)
    })
}

/// Adds up each token's weighted results: y[t] = sum over j of gates[t, j] * rows[inverse[t, j]].
///
/// - rows [R, D] and y [T, D]: LSW_F32, LSW_F16 or LSW_BF16, the same for both. inverse [T, k]
///   LSW_I32, gates [T, k] LSW_F32, k at most 32.
/// - Entries of inverse that name no row (-1) add nothing; a token with none gets zeros.
///
/// Sums in f32, j ascending, one rounding: deterministic, no atomics, and a token's bits do not
/// depend on the other tokens. y shares no memory with the others. One launch; enqueued, and may be
/// captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_combine(
    context: *const lsw_context,
    stream: *mut c_void,
    rows: *const lsw_mat,
    inverse: *const lsw_mat,
    gates: *const lsw_mat,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (rows, inverse, gates, mut y) = unsafe {
            (mat(context, rows, "rows")?, mat(context, inverse, "inverse")?, mat(context, gates, "gates")?, mat_mut(context, y, "y")?)
        };
        combine(&stream, &rows, &inverse, &gates, &mut y)
    })
}
