//! The top-k router.

use super::context::{lsw_context, on};
use super::{Options, check_reserved, flag, guard, lsw_mat, lsw_mat_mut, lsw_status, mat, mat_mut, options};
use crate::error::Result;
use crate::route::{RouteOptions, route};
use std::ffi::c_void;

/// How scores become gates. NULL, or what a smaller struct_size leaves out: renormalize 1.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_route_options {
    /// sizeof(lsw_route_options).
    pub struct_size: u64,
    /// 1: gates sum to 1 over the chosen k. 0: they are the softmax probabilities over all N.
    pub renormalize: i32,
    /// 0.
    pub reserved: i32,
}

impl Options for lsw_route_options {
    const DEFAULT: Self = Self { struct_size: size_of::<Self>() as u64, renormalize: 1, reserved: 0 };
}

/// Routes each token to its k best experts: softmax over N logits, top-k, gates (LoRA-Switch, arXiv
/// 2405.17741, section 4.1).
///
/// - logits [T, N] of LSW_F32, LSW_F16 or LSW_BF16; N from 1 to 1024.
/// - ids [T, k] LSW_I32 and gates [T, k] LSW_F32, both written; k is their width, at most min(N,
///   32). Descending by score, ties to the lower id.
///
/// Odd values: NaN counts as -inf. If some logits are +inf, those share the softmax equally. In a
/// row with nothing above -inf every score is 0: ids are 0 to k - 1 and the gates are 0. So ids are
/// always distinct and in range, and gates never NaN; lsw_context_take_odd tells that such a row
/// was met.
///
/// Deterministic, and a token's bits do not depend on the other tokens. One launch, no workspace;
/// enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_route(
    context: *const lsw_context,
    stream: *mut c_void,
    options: *const lsw_route_options,
    logits: *const lsw_mat,
    ids: *const lsw_mat_mut,
    gates: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let options = route_options(unsafe { self::options(options) }?)?;
        // SAFETY: the conventions.
        let (logits, mut ids, mut gates) =
            unsafe { (mat(context, logits, "logits")?, mat_mut(context, ids, "ids")?, mat_mut(context, gates, "gates")?) };
        route(&stream, &options, &logits, &mut ids, &mut gates)
    })
}

fn route_options(given: lsw_route_options) -> Result<RouteOptions> {
    check_reserved(given.reserved).map_err(|e| e.within("options"))?;
    Ok(RouteOptions { renormalize: flag(given.renormalize, "options.renormalize")? })
}
