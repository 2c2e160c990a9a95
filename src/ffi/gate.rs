//! The gate: projection and route.

use super::context::{lsw_context, on};
use super::route::{Given, lsw_route_options};
use super::{Out, guard, lsw_mat, lsw_mat_mut, lsw_status, mat, mat_mut, optional};
use crate::gate::{GateWeight, gate, gate_workspace_bytes};
use std::ffi::c_void;

/// Bytes of workspace that lsw_gate needs for tokens T, experts N and hidden H: 0 on a CPU context.
/// It never falls where T, N or H grow up to T = 64; beyond, logits [T, N] are kept there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_gate_workspace_bytes(
    context: *const lsw_context,
    tokens: u64,
    experts: u64,
    hidden: u64,
    bytes: *mut u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions; the stream is only asked for its backend.
        let (_, stream) = unsafe { on(context, std::ptr::null_mut()) }?;
        // SAFETY: the conventions.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.set(gate_workspace_bytes(&stream, tokens, experts, hidden)?);
        Ok(())
    })
}

/// Projects hidden states to logits and routes them, logits = x weight^T + weight_bias: the router
/// of LoRA-Switch (arXiv 2405.17741, section 4.1) as one operation.
///
/// - x [T, H] and weight [N, H] (as torch.nn.Linear keeps it) of LSW_F32, LSW_F16 or LSW_BF16, the
///   same for both; H is anything, N from 1 to 1024. Loads are of 16 bytes where addresses and row
///   bytes (stride included) of both are multiples of 16.
/// - weight_bias [1, N] of the same type; NULL: none.
/// - ids, gates, the options and odd values: as for lsw_route; the logits are those of f32, never
///   rounded. Padding tokens do not influence others.
/// - counts [1, N] LSW_I32: as for lsw_route_counted; NULL: none.
/// - workspace: at least lsw_gate_workspace_bytes, aligned to 16 bytes. Zeros before the first
///   call; every call leaves it ready for the next, of whatever shape, if it is large enough for
///   that: nobody else writes to it. As for lsw_route_counted, calls that share one are in flight
///   on one stream at a time, and after a failed launch it must be zeroed again. NULL where 0
///   bytes are needed.
///
/// Products and sums are in f32 in an order that H alone decides: a token's bits depend neither on
/// T nor on the other tokens. One launch up to 64 tokens, two beyond; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_gate(
    context: *const lsw_context,
    stream: *mut c_void,
    options: *const lsw_route_options,
    x: *const lsw_mat,
    weight: *const lsw_mat,
    weight_bias: *const lsw_mat,
    ids: *const lsw_mat_mut,
    gates: *const lsw_mat_mut,
    counts: *const lsw_mat_mut,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let given = unsafe { Given::new(context, options) }?;
        // SAFETY: the conventions.
        let (x, weight, bias) =
            unsafe { (mat(context, x, "x")?, mat(context, weight, "weight")?, optional(context, weight_bias, "weight_bias")?) };
        // SAFETY: the conventions.
        let (mut ids, mut gates) = unsafe { (mat_mut(context, ids, "ids")?, mat_mut(context, gates, "gates")?) };
        // SAFETY: the conventions.
        let mut counts = if counts.is_null() { None } else { Some(unsafe { mat_mut(context, counts, "counts") }?) };
        // SAFETY: the conventions.
        let mut workspace = unsafe { super::workspace(context, workspace, workspace_bytes) };
        let weight = GateWeight { weight: &weight, bias: bias.as_ref() };
        gate(&stream, &given.options()?, &x, &weight, &mut ids, &mut gates, counts.as_mut(), &mut workspace)
    })
}
