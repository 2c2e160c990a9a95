//! The top-k router.

use crate::check::{Checked, MAX_COUNT, Named, narrow};
use crate::cuda::args::{LSW_MAX_EXPERTS, LSW_MAX_GROUPS, LSW_MAX_K};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};
use std::ops::RangeInclusive;

/// What an expert's logit x becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Score {
    /// exp(x) over the sum of exp(x) of all experts (Mixtral, Qwen, LoRA-Switch).
    #[default]
    Softmax = 0,
    /// 1 / (1 + exp(-x)) (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    Sigmoid = 1,
    /// sqrt(log(1 + exp(x))).
    SqrtSoftplus = 2,
}

/// What a group of experts is chosen by: from the choice scores of its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum GroupScore {
    /// The best one (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
    #[default]
    Best = 0,
    /// The sum of the two best (DeepSeek-V3).
    SumOfTwo = 1,
}

/// How experts are chosen, and how scores become gates. The default is a softmax over the chosen k.
#[derive(Debug, Clone, Copy)]
pub struct RouteOptions<'a> {
    /// What a logit becomes.
    pub score: Score,
    /// Gates are scores over the sum of the chosen scores (the default); with [`Score::Softmax`] that is the softmax over the chosen k.
    /// Else they are the scores.
    pub renormalize: bool,
    /// A factor of every gate, in the end; finite. Default 1.
    pub scale: f32,
    /// c from 2^-126 to 2^126: a logit x counts as c tanh(x / c), in f32, for the choice too; -inf stays. 0, the default: as x.
    pub softcap: f32,
    /// `[1, N]` f32, added to the scores for the choice only, not for the gates. A choice score that is NaN counts as -inf.
    pub bias: Option<&'a Mat<'a>>,
    /// The experts form groups of N / groups neighbours, of which only the best `top_groups` are chosen from; ties to the lower group.
    /// groups is 1 (the default: no groups) to 32 and divides N; groups that are no power of two serve up to 512 experts.
    pub groups: u64,
    /// 1 (the default) to `groups`.
    pub top_groups: u64,
    /// What a group is chosen by.
    pub group_score: GroupScore,
    /// `[1, 1]` i32 in the stream's memory: tokens from this one on are padding.
    pub valid: Option<&'a Mat<'a>>,
    /// `[1, T]` u8 in the stream's memory: tokens whose byte is 0 are padding.
    pub mask: Option<&'a Mat<'a>>,
    /// For [`gate`](crate::gate::gate), up to 64 tokens: the work directly before it on the stream (its last kernel launch, say) does not
    /// write the weight. Then, on CUDA, the weight is read while that work still runs. Where that work starts early itself, as a dependent
    /// launch, like `route`, `gate` and, of a small set on Hopper, `SwitchSet::to`, the same is asked of what comes before it. Default:
    /// false, and nothing is read early.
    pub only_x_is_new: bool,
}

impl Default for RouteOptions<'_> {
    fn default() -> Self {
        Self {
            score: Score::Softmax,
            renormalize: true,
            scale: 1.0,
            softcap: 0.0,
            bias: None,
            groups: 1,
            top_groups: 1,
            group_score: GroupScore::Best,
            valid: None,
            mask: None,
            only_x_is_new: false,
        }
    }
}

/// Where a route goes, and what else of a call is the caller's to write.
pub(crate) struct Outputs {
    pub ids: RawMat,
    pub gates: RawMat,
    pub counts: Option<RawMat>,
    pub workspace: Option<RawMat>,
}

/// A checked choice: all but where the logits come from.
pub(crate) struct Choice {
    pub ids: RawMat,
    pub gates: RawMat,
    pub counts: Option<RawMat>,
    /// 0 where none is needed.
    pub workspace: u64,
    pub bias: Option<RawMat>,
    pub valid: Option<RawMat>,
    pub mask: Option<RawMat>,
    pub tokens: u32,
    pub experts: u32,
    pub k: u32,
    pub score: Score,
    pub renormalize: bool,
    pub scale: f32,
    pub softcap: f32,
    pub groups: u32,
    pub top_groups: u32,
    pub group_score: GroupScore,
    pub only_x_is_new: bool,
}

impl Choice {
    /// Whether scores decide, and not logits.
    pub fn by_score(&self) -> bool {
        self.bias.is_some() || self.group_score == GroupScore::SumOfTwo
    }
}

/// A checked call.
pub(crate) struct Plan {
    pub logits: RawMat,
    pub choice: Choice,
}

/// Routes each token to its k best experts (LoRA-Switch, arXiv 2405.17741, section 4.1, and the options' sources).
///
/// - `logits [T, N]` f32, f16 or bf16; N from 1 to 1024.
/// - `ids [T, k]` i32 and `gates [T, k]` f32, both written; k is their width, at most 32 and the experts that there are to choose from.
///   Row strides are free everywhere. Addresses need the alignment of an element. Outputs share no memory with anything else.
///
/// The k largest choice scores win, descending, ties to the lower id. The choice score is the logit itself, since every score grows with
/// it; with a bias it is score + bias, and where groups are summed it is the score, both in f32, which may tie or swap what differs by
/// less than the rounding of scores.
///
/// Padding tokens get the ids -1 and the gates 0; their logits are not read, so a CUDA graph that was captured for T tokens serves fewer.
/// A valid count that is negative counts as 0.
///
/// Odd values: NaN counts as -inf, +inf as the largest f32. So a softmax is shared equally by logits of +inf, and gates are never NaN;
/// without renormalisation or with a scale they are finite too, but for overflow of the scale. In a row with nothing above -inf all
/// scores are 0, hence all gates, and ids are chosen by bias and id alone. Ids of a token that is no padding are always distinct and in
/// range. Where the sum of the chosen scores underflows to 0, as sigmoids of logits below -88 do, the gates are 0. The stream's
/// [`take_odd`](Stream::take_odd) tells that a NaN, a +inf or such a row was met.
///
/// Deterministic, and a token's bits depend neither on the other tokens nor on their number. One launch, no workspace. On CUDA the work is
/// enqueued.
///
/// # Errors
/// On shapes, dtypes, strides, places, overlaps and options that break the above; outputs are untouched then.
pub fn route(stream: &Stream, options: &RouteOptions<'_>, logits: &Mat<'_>, ids: &mut MatMut<'_>, gates: &mut MatMut<'_>) -> Result<()> {
    let outputs = Outputs { ids: ids.raw, gates: gates.raw, counts: None, workspace: None };
    run(stream, &check(stream, options, logits.raw, &outputs)?)
}

/// Like [`route`], and counts the tokens of each expert: `counts [1, N]` i32, overwritten; padding counts for none.
///
/// `workspace` u8, at least [`route_workspace_bytes`], a multiple of 16 in address: zeros before the first call. Every call leaves its
/// zeros behind, whatever else it was called for, so nobody clears it between calls or replays; calls that share a workspace, [`gate`]'s
/// included, are in flight on one stream at a time. After a failed launch it must be zeroed again.
///
/// Exact: integers are added up, in one launch with the route.
///
/// # Errors
/// As for [`route`], and on counts or a workspace that break the above.
///
/// [`gate`]: crate::gate
pub fn route_counted(
    stream: &Stream,
    options: &RouteOptions<'_>,
    logits: &Mat<'_>,
    ids: &mut MatMut<'_>,
    gates: &mut MatMut<'_>,
    counts: &mut MatMut<'_>,
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    let outputs = Outputs { ids: ids.raw, gates: gates.raw, counts: Some(counts.raw), workspace: Some(workspace.raw) };
    run(stream, &check(stream, options, logits.raw, &outputs)?)
}

/// Bytes of workspace that [`route_counted`] needs: 0 on a CPU stream.
pub fn route_workspace_bytes(stream: &Stream) -> u64 {
    match &stream.0 {
        StreamKind::Cpu(_) => 0,
        StreamKind::Cuda(_) => crate::cuda::route::WORKSPACE_BYTES,
    }
}

fn run(stream: &Stream, plan: &Plan) -> Result<()> {
    match &stream.0 {
        _ if plan.choice.tokens == 0 && plan.choice.counts.is_none() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::route::run(pool, plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::route::launch(stream, plan),
    }
}

fn check(stream: &Stream, options: &RouteOptions<'_>, logits: RawMat, outputs: &Outputs) -> Result<Plan> {
    let logits = logits.expect("logits").dtype_in(DType::FLOATS)?;
    let tokens = narrow("logits.rows", logits.mat.rows, MAX_COUNT)?;
    let experts = check_experts("logits.cols", logits.mat.cols)?;
    logits.memory()?.on(stream)?;
    let needed = if outputs.counts.is_some() { route_workspace_bytes(stream) } else { 0 };
    let choice = check_choice(stream, options, (tokens, experts), outputs, needed, &[logits])?;
    Ok(Plan { logits: logits.mat, choice })
}

pub(crate) fn check_experts(name: &str, experts: u64) -> Result<u32> {
    if experts == 0 {
        return Err(Error::argument(name, 0, "at least 1"));
    }
    narrow(name, experts, u64::from(LSW_MAX_EXPERTS))
}

/// Checks all but the inputs that logits come from, which were checked, and from which the outputs must be disjoint.
pub(crate) fn check_choice(
    stream: &Stream,
    options: &RouteOptions<'_>,
    (tokens, experts): (u32, u32),
    outputs: &Outputs,
    workspace_bytes: u64,
    inputs: &[Named<'_>],
) -> Result<Choice> {
    let within = |e: Error| e.within("options");
    let (groups, top_groups) = check_groups(options, experts).map_err(within)?;
    check_factors(options).map_err(within)?;
    let (ids, gates) = (outputs.ids.expect("ids"), outputs.gates.expect("gates"));
    ids.dtype_in(&[DType::I32])?;
    gates.dtype_in(&[DType::F32])?;
    let k = check_k(ids.mat.cols, experts / groups * top_groups)?;
    ids.rows(u64::from(tokens), "the tokens")?;
    gates.rows(u64::from(tokens), "the tokens")?.cols(u64::from(k), "k, ids.cols")?;

    let mut inputs = inputs.to_vec();
    let mut optional = |name, given: Option<&Mat<'_>>, dtype, cols: u32, why| -> Result<Option<RawMat>> {
        let Some(given) = given else { return Ok(None) };
        let mat = given.raw.expect(name).dtype_in(&[dtype])?.rows(1, "a vector")?.cols(u64::from(cols), why)?;
        inputs.push(mat.memory()?.on(stream)?);
        Ok(Some(given.raw))
    };
    let bias = optional("options.bias", options.bias, DType::F32, experts, "the experts")?;
    let valid = optional("options.valid", options.valid, DType::I32, 1, "a number")?;
    let mask = optional("options.mask", options.mask, DType::U8, tokens, "the tokens")?;

    let mut written = vec![ids, gates];
    if let Some(counts) = &outputs.counts {
        let counts = counts.expect("counts").dtype_in(&[DType::I32])?.rows(1, "a vector")?;
        written.push(counts.cols(u64::from(experts), "the experts")?);
    }
    if let Some(workspace) = &outputs.workspace {
        written.push(check_workspace(workspace.expect("workspace"), workspace_bytes)?);
    }
    for (i, output) in written.iter().enumerate() {
        output.memory()?.on(stream)?;
        for other in &written[i + 1..] {
            other.memory()?;
        }
        output.disjoint_from(&written[i + 1..])?.disjoint_from(&inputs)?;
    }
    Ok(Choice {
        ids: ids.mat,
        gates: gates.mat,
        counts: outputs.counts,
        workspace: outputs.workspace.map_or(0, |workspace| workspace.addr),
        bias,
        valid,
        mask,
        tokens,
        experts,
        k,
        score: options.score,
        renormalize: options.renormalize,
        scale: options.scale,
        softcap: options.softcap,
        groups,
        top_groups,
        group_score: if groups > 1 { options.group_score } else { GroupScore::Best },
        only_x_is_new: options.only_x_is_new,
    })
}

fn check_groups(options: &RouteOptions<'_>, experts: u32) -> Result<(u32, u32)> {
    let groups = narrow("groups", options.groups, u64::from(LSW_MAX_GROUPS))?;
    if groups == 0 || !experts.is_multiple_of(groups) {
        return Err(Error::argument("groups", groups, format!("at least 1, and a divisor of the {experts} experts")));
    }
    if experts / groups * groups.next_power_of_two() > LSW_MAX_EXPERTS {
        return Err(Error::argument("groups", groups, format!("a power of two for {experts} experts")));
    }
    if options.top_groups == 0 || options.top_groups > u64::from(groups) {
        return Err(Error::argument("top_groups", options.top_groups, format!("1 to {groups}, the groups")));
    }
    if groups > 1 && options.group_score == GroupScore::SumOfTwo && experts < 2 * groups {
        return Err(Error::argument("groups", groups, format!("at most {}, so that there are two experts in each to add up", experts / 2)));
    }
    Ok((groups, options.top_groups as u32))
}

/// Those with a reciprocal among the normal numbers.
const SOFTCAPS: RangeInclusive<f32> = f32::MIN_POSITIVE..=1.0 / f32::MIN_POSITIVE;

fn check_factors(options: &RouteOptions<'_>) -> Result<()> {
    if !options.scale.is_finite() {
        return Err(Error::argument("scale", options.scale, "finite"));
    }
    if options.softcap != 0.0 && !SOFTCAPS.contains(&options.softcap) {
        return Err(Error::argument("softcap", options.softcap, "0, or 2^-126 to 2^126"));
    }
    Ok(())
}

fn check_k(k: u64, choices: u32) -> Result<u32> {
    let bound = choices.min(LSW_MAX_K);
    if k == 0 || k > u64::from(bound) {
        return Err(Error::argument("ids.cols", k, format!("1 to {bound} (k, at most the experts to choose from and {LSW_MAX_K})")));
    }
    Ok(k as u32)
}

fn check_workspace(workspace: Named<'_>, needed: u64) -> Result<Named<'_>> {
    workspace.dtype_in(&[DType::U8])?.rows(1, "a vector")?;
    if workspace.mat.cols < needed {
        return Err(Error::argument("workspace.cols", workspace.mat.cols, format!("at least {needed} bytes")));
    }
    if needed > 0 && !workspace.mat.addr.is_multiple_of(16) {
        return Err(Error::argument("workspace.data", format!("{:#x}", workspace.mat.addr), "a multiple of 16 bytes"));
    }
    Ok(workspace)
}
