//! Unmerged adapters.

use super::bank::lsw_bank;
use super::{Out, guard, handle, lsw_mat, lsw_mat_mut, lsw_status, mat, mat_mut, slice};
use crate::apply::{MAX_TARGETS, Routes, apply, apply_begin, apply_finish, apply_into, apply_workspace_bytes};
use crate::bank::AdapterBank;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Context, Stream};
use crate::view::{Mat, MatMut};
use std::ffi::c_void;

/// Which adapters each row of a batch gets, and how much of them.
///
/// A row's route is taken in canonical form, as a switch takes it: an id outside the bank's slots
/// is none; duplicates add up in f32 in order of appearance; entries sort by id, so a permuted
/// route gives the same bits. The coefficient of a slot at a target is gate * scale, in f32; where
/// it is zero, or the rank is, the adapter is not touched at all.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_routes {
    /// LSW_I32 [items, k], as lsw_route writes them; k from 0 to 32. Slots of the bank; -1: none.
    pub ids: lsw_mat,
    /// LSW_F32 [items, k].
    pub gates: lsw_mat,
    /// LSW_I32, one element a row of the batch: the item whose route the row has; rows whose entry
    /// names no item (-1) are left alone. With data NULL nothing of it is read, and row r has the
    /// route of item r. With the map of lsw_permute and one route for each of its items, adapters
    /// serve the experts of a mixture: a slot is then an adapter of an expert.
    pub row_map: lsw_mat,
}

/// The views of a call's routes.
pub(super) struct RouteViews<'a> {
    ids: Mat<'a>,
    gates: Mat<'a>,
    row_map: Option<Mat<'a>>,
}

impl RouteViews<'_> {
    /// # Safety
    /// As for [`mat`].
    pub(super) unsafe fn new(context: &Context, given: *const lsw_routes) -> Result<Self> {
        // SAFETY: the caller's promise.
        let given = unsafe { handle(given, "routes") }?;
        // SAFETY: as above.
        let view = |given: &lsw_mat, name| unsafe { mat(context, given, name) };
        let row_map = (!given.row_map.data.is_null()).then(|| view(&given.row_map, "row_map")).transpose()?;
        Ok(Self { ids: view(&given.ids, "ids")?, gates: view(&given.gates, "gates")?, row_map })
    }

    pub(super) fn get(&self) -> Routes<'_> {
        Routes { ids: &self.ids, gates: &self.gates, row_map: self.row_map.as_ref() }
    }
}

fn check_count(count: u64) -> Result<()> {
    if count > MAX_TARGETS as u64 {
        return Err(Error::argument("count", count, format!("at most {MAX_TARGETS}")));
    }
    Ok(())
}

/// One a target.
///
/// # Safety
/// As for [`mat`].
pub(super) unsafe fn matrices<'a>(context: &Context, weights: *const lsw_mat, count: u64) -> Result<Vec<Mat<'a>>> {
    check_count(count)?;
    // SAFETY: the caller's promise.
    let weights = unsafe { slice(weights, count, "weights") }?;
    // SAFETY: as above.
    let view = |(i, weight): (usize, &lsw_mat)| unsafe { mat(context, weight, &format!("weights[{i}]")) };
    weights.iter().enumerate().map(view).collect()
}

/// One a target.
///
/// # Safety
/// As for [`mat_mut`].
pub(super) unsafe fn outputs<'a>(context: &Context, y: *const lsw_mat_mut, count: u64) -> Result<Vec<MatMut<'a>>> {
    check_count(count)?;
    // SAFETY: the caller's promise.
    let y = unsafe { slice(y, count, "y") }?;
    // SAFETY: as above.
    let view = |(i, y): (usize, &lsw_mat_mut)| unsafe { mat_mut(context, y, &format!("y[{i}]")) };
    y.iter().enumerate().map(view).collect()
}

/// Bytes of workspace that lsw_apply needs for the bank's targets first <= i < first + count, which
/// share their input, and for this many rows with routes of k.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_apply_workspace_bytes(
    bank: *const lsw_bank,
    first: u64,
    count: u64,
    rows: u64,
    k: u64,
    bytes: *mut u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, out) = unsafe { (handle(bank, "bank")?, Out::new(bytes, "bytes")?) };
        out.set(apply_workspace_bytes(bank.get().0, first..first.saturating_add(count), rows, k)?);
        Ok(())
    })
}

type Apply = fn(&Stream, &AdapterBank, u64, &Mat<'_>, &Routes<'_>, &mut [MatMut<'_>], &mut MatMut<'_>) -> Result<()>;

/// # Safety
/// The conventions.
#[allow(clippy::too_many_arguments)]
unsafe fn run(
    apply: Apply,
    bank: *const lsw_bank,
    stream: *mut c_void,
    first: u64,
    x: *const lsw_mat,
    routes: *const lsw_routes,
    y: *const lsw_mat_mut,
    count: u64,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> Result<()> {
    // SAFETY: the conventions.
    let (bank, context) = unsafe { handle(bank, "bank") }?.get();
    // SAFETY: the conventions.
    let (stream, x, routes, mut y) =
        unsafe { (context.raw_stream(stream), mat(context, x, "x")?, RouteViews::new(context, routes)?, outputs(context, y, count)?) };
    // SAFETY: the conventions.
    let mut workspace = unsafe { super::workspace(context, workspace, workspace_bytes) };
    apply(&stream, bank, first, &x, &routes.get(), &mut y, &mut workspace)
}

/// Adds to each row what its adapters make of its input, for a group of targets that share it (q,
/// k, v; gate, up): y[i][r] += sum over the entries (id, gate) of row r's route of gate * scale * B
/// (A x[r]), with A, B and scale of slot id and target first + i of the bank.
///
/// - x [rows, in_features]: the bank's dtype.
/// - y, count matrices [rows, out_features], 1 to 8, for the bank's targets from first on, whose
///   in_features are equal: LSW_F32, LSW_F16 or LSW_BF16, all of one dtype. Each is read and
///   written once; a row that no adapter touches keeps its bits.
/// - workspace, at least lsw_apply_workspace_bytes, aligned to 16 bytes; its content does not
///   matter, and it is free again when the work is done. NULL where 0 bytes are needed.
///
/// Row strides are free everywhere, so that a slice of a fused output works; 16-byte accesses serve
/// where addresses and rows (stride included) of x, A and B are multiples of 16 bytes. The y share
/// no memory with each other nor with anything else of the call.
///
/// Numbers: x, A and B enter as stored. Both products and the sum over the route are in f32, in a
/// fixed order; A x stays f32 (tensor cores take it in two parts, to 2^-22); y is rounded once. A
/// coefficient that is not finite propagates into its own row alone. Deterministic, and a row's
/// bits do not depend on the other rows; nor on their number, but that a bank of 16 bits on CUDA
/// takes another path above 64 rows. On Hopper that is a dense path where the bank is LSW_BF16 and
/// its slots together may have at most 128 ranks (each the targets' largest rank_cap, in steps of
/// 16): A x, scaled, is rounded to bf16 there, as B is already. It reads the adapters of all slots,
/// and no row sees those that are not in its route (but that the last bits may differ where B of one
/// of them is not finite: the row's sum is then made anew, in another order).
///
/// Two launches on CUDA, three above 64 rows in 16 bits but on the dense path; enqueued, and may be
/// captured: one graph serves every route and every refill of a slot. Up to 64 rows, and in f32,
/// the adapters are read again for each row. lsw_context_take_odd tells of ids out of range (but -1)
/// and of coefficients that are not finite.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_apply(
    bank: *const lsw_bank,
    stream: *mut c_void,
    first: u64,
    x: *const lsw_mat,
    routes: *const lsw_routes,
    y: *const lsw_mat_mut,
    count: u64,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    // SAFETY: the conventions.
    guard(|| unsafe { run(apply, bank, stream, first, x, routes, y, count, workspace, workspace_bytes) })
}

/// lsw_apply to zeros: y[i][r] = sum over the entries ..., whatever y held, and zeros for a row that
/// no adapter touches. For a base product behind it that adds to what it finds (beta = 1). y then
/// need not wait for that product, but is written before it; many rows of y are not read here, and
/// the product reads them while it multiplies. Two roundings, as with lsw_apply, but that of a small
/// sum in the place of that of the product. All else is as for lsw_apply. On CUDA each y is a memset
/// more, but on the dense path.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_apply_into(
    bank: *const lsw_bank,
    stream: *mut c_void,
    first: u64,
    x: *const lsw_mat,
    routes: *const lsw_routes,
    y: *const lsw_mat_mut,
    count: u64,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    // SAFETY: the conventions.
    guard(|| unsafe { run(apply_into, bank, stream, first, x, routes, y, count, workspace, workspace_bytes) })
}

/// The first half of lsw_apply, into the workspace, for the targets first <= i < first + count: all
/// that does not need y, so that it may run beside the base product that writes y, on another
/// stream; one of high priority, since its few blocks would otherwise wait behind the product's. Of
/// up to 64 rows in 16 bits that is everything but the addition to y; of others, A x of all
/// adapters in the rows' routes.
///
/// The second half, lsw_apply_finish, is ordered after both and gets the same targets, routes and
/// workspace. In between nobody writes the workspace, ids, gates and row_map, nor any slot of the
/// bank. Together they give the bits of lsw_apply; what is odd is known after both. Two launches on
/// CUDA, in f32 and on the dense path one; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_apply_begin(
    bank: *const lsw_bank,
    stream: *mut c_void,
    first: u64,
    count: u64,
    x: *const lsw_mat,
    routes: *const lsw_routes,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, context) = unsafe { handle(bank, "bank") }?.get();
        // SAFETY: the conventions.
        let (stream, x, routes) = unsafe { (context.raw_stream(stream), mat(context, x, "x")?, RouteViews::new(context, routes)?) };
        // SAFETY: the conventions.
        let mut workspace = unsafe { super::workspace(context, workspace, workspace_bytes) };
        apply_begin(&stream, bank, first..first.saturating_add(count), &x, &routes.get(), &mut workspace)
    })
}

/// The second half of lsw_apply: adds to y what the first has left in the workspace. See
/// lsw_apply_begin. One launch; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_apply_finish(
    bank: *const lsw_bank,
    stream: *mut c_void,
    first: u64,
    routes: *const lsw_routes,
    y: *const lsw_mat_mut,
    count: u64,
    workspace: *const c_void,
    workspace_bytes: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, context) = unsafe { handle(bank, "bank") }?.get();
        // SAFETY: the conventions.
        let (stream, routes, mut y) =
            unsafe { (context.raw_stream(stream), RouteViews::new(context, routes)?, outputs(context, y, count)?) };
        let (addr, bytes) = (workspace as u64, workspace_bytes);
        // SAFETY: the conventions.
        let workspace = unsafe { Mat::raw(context, addr, DType::U8, 1, bytes, bytes) };
        apply_finish(&stream, bank, first, &routes.get(), &mut y, &workspace)
    })
}
