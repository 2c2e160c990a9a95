//! The top-k router.

use super::context::{lsw_context, on};
use super::{Options, Out, flag, guard, lsw_mat, lsw_mat_mut, lsw_status, mat, mat_mut, optional, options};
use crate::error::{Error, Result};
use crate::route::{GroupScore, RouteOptions, Score, route, route_counted, route_workspace_bytes};
use crate::stream::Context;
use crate::view::Mat;
use std::ffi::c_void;

/// exp(x) over the sum of exp(x) of all experts.
pub const LSW_SOFTMAX: i32 = 0;
/// 1 / (1 + exp(-x)) (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
pub const LSW_SIGMOID: i32 = 1;
/// sqrt(log(1 + exp(x))).
pub const LSW_SQRT_SOFTPLUS: i32 = 2;

/// A group is chosen by its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
pub const LSW_GROUP_BEST: i32 = 0;
/// By the sum of its two best (DeepSeek-V3).
pub const LSW_GROUP_SUM_OF_TWO: i32 = 1;

/// How experts are chosen, and how scores become gates. NULL: renormalize 1. Every other member's
/// default is 0, which is also what a smaller struct_size leaves out.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_route_options {
    /// sizeof(lsw_route_options).
    pub struct_size: u64,
    /// 1: gates are scores over the sum of the chosen scores; of a softmax, that is the softmax
    /// over the chosen k. 0: they are the scores.
    pub renormalize: i32,
    /// 0 or 1, for lsw_gate up to 64 tokens. 1: the work directly before it on the stream (its last
    /// kernel launch, say) does not write the weight. Then, on CUDA, the weight is read while that
    /// work still runs. Where that work starts early itself, as a dependent launch, like lsw_route,
    /// lsw_gate and, of a small set on Hopper, lsw_switch_to, the same is asked of what comes before
    /// it. 0: nothing is read early.
    pub only_x_is_new: i32,
    /// LSW_SOFTMAX to LSW_SQRT_SOFTPLUS: what a logit x becomes.
    pub score: i32,
    /// LSW_GROUP_BEST or LSW_GROUP_SUM_OF_TWO.
    pub group_score: i32,
    /// A factor of every gate, in the end; finite. 0 counts as 1.
    pub scale: f32,
    /// c from 2^-126 to 2^126: a logit x counts as c tanh(x / c), in f32, for the choice too; -inf
    /// stays. 0: as x.
    pub softcap: f32,
    /// The experts form groups of N / groups neighbours, of which only the best top_groups are
    /// chosen from; ties to the lower group. 1 to 32, a divisor of N; what is no power of two
    /// serves up to 512 experts. 0 counts as 1: no groups.
    pub groups: u64,
    /// 1 to groups; 0 counts as 1.
    pub top_groups: u64,
    /// [1, N] LSW_F32, added to the scores for the choice only, not for the gates. A choice score
    /// that is NaN counts as -inf. NULL: none.
    pub bias: *const lsw_mat,
    /// [1, 1] LSW_I32 in the context's memory: tokens from this one on are padding. NULL: none are.
    pub valid: *const lsw_mat,
    /// [1, T] LSW_U8 in the context's memory: tokens whose byte is 0 are padding. NULL: none are.
    pub mask: *const lsw_mat,
}

impl Options for lsw_route_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>() as u64,
        renormalize: 1,
        only_x_is_new: 0,
        score: LSW_SOFTMAX,
        group_score: LSW_GROUP_BEST,
        scale: 0.0,
        softcap: 0.0,
        groups: 0,
        top_groups: 0,
        bias: std::ptr::null(),
        valid: std::ptr::null(),
        mask: std::ptr::null(),
    };
}

/// The matrices that options point to.
pub(super) struct Given<'a> {
    options: lsw_route_options,
    bias: Option<Mat<'a>>,
    valid: Option<Mat<'a>>,
    mask: Option<Mat<'a>>,
}

impl Given<'_> {
    /// # Safety
    /// The conventions, for the options and for the matrices in them.
    pub unsafe fn new(context: &Context, given: *const lsw_route_options) -> Result<Self> {
        // SAFETY: the caller's promise.
        let options = unsafe { options(given) }?;
        // SAFETY: the caller's promise.
        let optional = |given, name| unsafe { optional(context, given, name) };
        let bias = optional(options.bias, "options.bias")?;
        let valid = optional(options.valid, "options.valid")?;
        let mask = optional(options.mask, "options.mask")?;
        Ok(Self { options, bias, valid, mask })
    }

    pub fn options(&self) -> Result<RouteOptions<'_>> {
        let given = &self.options;
        let score = match given.score {
            LSW_SOFTMAX => Score::Softmax,
            LSW_SIGMOID => Score::Sigmoid,
            LSW_SQRT_SOFTPLUS => Score::SqrtSoftplus,
            other => return Err(Error::argument("options.score", other, "LSW_SOFTMAX to LSW_SQRT_SOFTPLUS")),
        };
        let group_score = match given.group_score {
            LSW_GROUP_BEST => GroupScore::Best,
            LSW_GROUP_SUM_OF_TWO => GroupScore::SumOfTwo,
            other => return Err(Error::argument("options.group_score", other, "LSW_GROUP_BEST or LSW_GROUP_SUM_OF_TWO")),
        };
        Ok(RouteOptions {
            score,
            renormalize: flag(given.renormalize, "options.renormalize")?,
            scale: if given.scale == 0.0 { 1.0 } else { given.scale },
            softcap: given.softcap,
            bias: self.bias.as_ref(),
            groups: given.groups.max(1),
            top_groups: given.top_groups.max(1),
            group_score,
            valid: self.valid.as_ref(),
            mask: self.mask.as_ref(),
            only_x_is_new: flag(given.only_x_is_new, "options.only_x_is_new")?,
        })
    }
}

/// Routes each token to its k best experts (LoRA-Switch, arXiv 2405.17741, section 4.1, and the
/// options' sources).
///
/// - logits [T, N] of LSW_F32, LSW_F16 or LSW_BF16; N from 1 to 1024.
/// - ids [T, k] LSW_I32 and gates [T, k] LSW_F32, both written; k is their width, at most 32 and
///   the experts that there are to choose from. Outputs share no memory with anything else.
///
/// The k largest choice scores win, descending, ties to the lower id. The choice score is the logit
/// itself, since every score grows with it; with a bias it is score + bias, and where groups are
/// summed it is the score, both in f32, which may tie or swap what differs by less than the
/// rounding of scores.
///
/// Padding tokens get the ids -1 and the gates 0; their logits are not read, so a CUDA graph that
/// was captured for T tokens serves fewer. A valid count that is negative counts as 0.
///
/// Odd values: NaN counts as -inf, +inf as the largest f32. So a softmax is shared equally by
/// logits of +inf, and gates are never NaN. In a row with nothing above -inf all scores are 0,
/// hence all gates, and ids are chosen by bias and id alone. Ids of a token that is no padding are
/// always distinct and in range. Where the sum of the chosen scores underflows to 0, as sigmoids of
/// logits below -88 do, the gates are 0. lsw_context_take_odd tells that a NaN, a +inf or such a
/// row was met.
///
/// Deterministic, and a token's bits depend neither on the other tokens nor on their number. One
/// launch, no workspace; enqueued, and may be captured.
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
        let given = unsafe { Given::new(context, options) }?;
        // SAFETY: the conventions.
        let (logits, mut ids, mut gates) =
            unsafe { (mat(context, logits, "logits")?, mat_mut(context, ids, "ids")?, mat_mut(context, gates, "gates")?) };
        route(&stream, &given.options()?, &logits, &mut ids, &mut gates)
    })
}

/// Bytes of workspace that lsw_route_counted needs: 0 on a CPU context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_route_workspace_bytes(context: *const lsw_context, bytes: *mut u64) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions; the stream is only asked for its backend.
        let (_, stream) = unsafe { on(context, std::ptr::null_mut()) }?;
        // SAFETY: the conventions.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.set(route_workspace_bytes(&stream));
        Ok(())
    })
}

/// Like lsw_route, and counts the tokens of each expert: counts [1, N] LSW_I32, overwritten;
/// padding counts for none. One launch.
///
/// workspace: at least lsw_route_workspace_bytes, aligned to 16 bytes; zeros before the first call.
/// Every call leaves its zeros behind, whatever else it was called for, so nobody clears it between
/// calls or replays; calls that share a workspace, those of lsw_gate included, are in flight on one
/// stream at a time. After a failed launch it must be zeroed again. NULL where 0 bytes are needed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_route_counted(
    context: *const lsw_context,
    stream: *mut c_void,
    options: *const lsw_route_options,
    logits: *const lsw_mat,
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
        let (logits, mut ids, mut gates) =
            unsafe { (mat(context, logits, "logits")?, mat_mut(context, ids, "ids")?, mat_mut(context, gates, "gates")?) };
        // SAFETY: the conventions.
        let (mut counts, mut workspace) =
            unsafe { (mat_mut(context, counts, "counts")?, super::workspace(context, workspace, workspace_bytes)) };
        route_counted(&stream, &given.options()?, &logits, &mut ids, &mut gates, &mut counts, &mut workspace)
    })
}
