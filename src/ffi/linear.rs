//! A product and its unmerged adapters.

use super::apply::{RouteViews, lsw_routes, matrices, outputs};
use super::bank::lsw_bank;
use super::{Options, Out, flag, guard, handle, lsw_mat, lsw_mat_mut, lsw_status, mat, options};
use crate::linear::{LinearOptions, linear, linear_workspace_bytes};
use std::ffi::c_void;

/// Bytes of workspace that lsw_linear needs for the bank's targets first <= i < first + count,
/// which share their input, and for this many rows with routes of k.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_linear_workspace_bytes(
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
        out.set(linear_workspace_bytes(bank.get().0, first..first.saturating_add(count), rows, k)?);
        Ok(())
    })
}

/// How an lsw_linear is ordered after what comes before it. NULL, or what a smaller struct_size
/// leaves out: 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_linear_options {
    /// sizeof(lsw_linear_options).
    pub struct_size: u64,
    /// 0 or 1: of all that the call reads, the work directly before it on the stream (its last
    /// kernel launch, say) writes x alone; weights, adapters, the bank's slots, ids, gates and
    /// row_map are older. Then, on CUDA, they are read while that work still runs, which hides the
    /// start of the launch. Where that work starts early itself, as a dependent launch, like lsw_route,
    /// lsw_gate and, of a small set on Hopper, lsw_switch_to, the same is asked of what comes before
    /// it. With 0, nothing but prefetches into the L2 cache comes early.
    pub only_x_is_new: i32,
    /// 0 or 1: blocks do not wait for each other's part of A x, but each computes all of it, as they
    /// do where others do not come to run: for tests. The bits are the same.
    pub alone: i32,
}

impl Options for lsw_linear_options {
    const DEFAULT: Self = Self { struct_size: size_of::<Self>() as u64, only_x_is_new: 0, alone: 0 };
}

/// The product of 1 to 8 rows with the weights of a group of targets that share their input (q, k,
/// v; gate, up), and what lsw_apply would add: y[i][r] = W[i] x[r] + sum over the entries (id, gate)
/// of row r's route of gate * scale * B (A x[r]), with A, B and scale of slot id and target first +
/// i of the bank. One launch streams the weights, and does the adapters' work beside that.
///
/// - weights, count matrices [out_features, in_features], 1 to 8, for the bank's targets from first
///   on, whose in_features are equal; the bank's dtype. A set's merged weights serve as well as its
///   base: then the adapters come on top.
/// - x [rows, in_features]: the bank's dtype; 0 to 8 rows.
/// - routes: as for lsw_apply; k = 0 for the product alone. A row of no item has no adapters.
/// - y, count matrices [rows, out_features]: LSW_F32, LSW_F16 or LSW_BF16, all of one dtype.
///   Written only.
/// - workspace, at least lsw_linear_workspace_bytes, aligned to 16 bytes: its first 16 bytes are
///   zeros before the first call. Every call leaves zeros there, so nobody clears them between
///   calls or replays. Calls that share a workspace are ordered one after the other.
///
/// Row strides are free everywhere; full speed needs addresses and rows (stride included) of
/// weights and x that are multiples of 16 bytes. The y share no memory with each other nor with
/// anything else of the call.
///
/// Numbers: all operands enter as stored. The products and the sum over the route are in f32, in a
/// fixed order, on tensor cores for 16 bits; W x and what the adapters add are each such a sum, and
/// their sum is rounded once to y. A coefficient that is not finite propagates into its own row
/// alone. Deterministic, and a row's bits depend neither on the other rows nor on their number.
///
/// One launch on CUDA, as a dependent of the one before where the card knows that (9.0 and newer);
/// its blocks wait for each other, but none for longer than a millisecond. Enqueued, and may be captured: one graph serves every route and every refill of a slot. The
/// weights are read once for all rows, and the adapters once for each row. lsw_context_take_odd
/// tells of ids out of range (but -1) and of coefficients that are not finite.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_linear(
    bank: *const lsw_bank,
    stream: *mut c_void,
    options: *const lsw_linear_options,
    first: u64,
    weights: *const lsw_mat,
    x: *const lsw_mat,
    routes: *const lsw_routes,
    y: *const lsw_mat_mut,
    count: u64,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let given = unsafe { self::options(options) }?;
        let (only_x_is_new, alone) = (flag(given.only_x_is_new, "options.only_x_is_new")?, flag(given.alone, "options.alone")?);
        let options = LinearOptions { only_x_is_new, alone };
        // SAFETY: the conventions.
        let (bank, context) = unsafe { handle(bank, "bank") }?.get();
        // SAFETY: the conventions.
        let (stream, x, routes) = unsafe { (context.raw_stream(stream), mat(context, x, "x")?, RouteViews::new(context, routes)?) };
        // SAFETY: the conventions.
        let (weights, mut y) = unsafe { (matrices(context, weights, count)?, outputs(context, y, count)?) };
        // SAFETY: the conventions.
        let mut workspace = unsafe { super::workspace(context, workspace, workspace_bytes) };
        linear(&stream, options, bank, first, &weights, &x, &routes.get(), &mut y, &mut workspace)
    })
}
