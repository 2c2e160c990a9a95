//! The router's launch.

use super::args::{
    LSW_ROUTE_BY_SCORE, LSW_ROUTE_COUNTED, LSW_ROUTE_ONLY_X_IS_NEW, LSW_ROUTE_PACKED, LSW_ROUTE_PADDED, LSW_ROUTE_RENORMALIZE,
    LSW_ROUTE_SUM_TWO, LSW_ROUTE_THREADS, LswRouteArgs, LswRouteWorkspace,
};
use super::context::{DeviceStream, Function, PLAIN_ITEMS, SCORED_ITEMS, by_dtype};
use super::flags;
use super::launch::{Grid, launch_dependent as enqueue};
use crate::error::Result;
use crate::route::{Choice, GroupScore, Plan, Score};
use crate::view::RawMat;

const WARPS: u32 = LSW_ROUTE_THREADS / 32;
/// Where blocks count together: few enough that little is left to add up, and enough to fill the card.
const COUNTING_BLOCKS: u32 = 8; // a multiprocessor

pub(crate) const WORKSPACE_BYTES: u64 = size_of::<LswRouteWorkspace>() as u64;

/// Whether a choice is a softmax over the chosen and nothing else.
pub(super) fn is_plain(choice: &Choice) -> bool {
    choice.score == Score::Softmax
        && choice.renormalize
        && choice.bias.is_none()
        && choice.groups == 1
        && (choice.scale, choice.softcap) == (1.0, 0.0)
}

/// Whether sigmoids with a bias choose in groups of 32 by their two best, and 16-byte loads serve all: the router of DeepSeek-V3.
fn is_grouped(choice: &Choice, args: &LswRouteArgs) -> bool {
    choice.score == Score::Sigmoid
        && choice.renormalize
        && choice.bias.is_some()
        && choice.softcap == 0.0
        && choice.group_score == GroupScore::SumOfTwo
        && (5..=8).contains(&choice.groups) // four lanes each
        && args.group_experts == 32
        && args.flags & LSW_ROUTE_PACKED != 0
}

/// `logits`: where they are read from.
pub(super) fn choice_args(stream: &DeviceStream, choice: &Choice, logits: RawMat) -> LswRouteArgs {
    let addr = |mat: Option<RawMat>| mat.map_or(0, |mat| mat.addr);
    let group_lanes = 32 / choice.groups.next_power_of_two();
    let group_experts = choice.experts / choice.groups;
    let lane_experts = group_experts.div_ceil(group_lanes);
    let is_packed = group_experts.is_multiple_of(lane_experts) && logits.aligned16() && choice.bias.is_none_or(|bias| bias.aligned16());
    LswRouteArgs {
        logits: logits.addr,
        logits_stride: logits.stride,
        ids: choice.ids.addr,
        gates: choice.gates.addr,
        ids_stride: choice.ids.stride,
        gates_stride: choice.gates.stride,
        tokens: choice.tokens,
        experts: choice.experts,
        k: choice.k,
        flags: flags([
            (choice.renormalize, LSW_ROUTE_RENORMALIZE),
            (choice.by_score(), LSW_ROUTE_BY_SCORE),
            (choice.group_score == GroupScore::SumOfTwo, LSW_ROUTE_SUM_TWO),
            (choice.valid.is_some() || choice.mask.is_some(), LSW_ROUTE_PADDED),
            (choice.counts.is_some(), LSW_ROUTE_COUNTED),
            (is_packed, LSW_ROUTE_PACKED),
            (choice.only_x_is_new, LSW_ROUTE_ONLY_X_IS_NEW),
        ]),
        status: stream.device().odd_word(),
        scale: choice.scale,
        softcap: choice.softcap,
        score: choice.score as u32,
        groups: choice.groups,
        top_groups: choice.top_groups,
        group_experts,
        group_lanes_log2: group_lanes.ilog2(),
        lane_experts,
        bias: addr(choice.bias),
        valid: addr(choice.valid),
        mask: addr(choice.mask),
        counts: addr(choice.counts),
        workspace: choice.workspace,
    }
}

pub(crate) fn launch(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let args = choice_args(stream, &plan.choice, plan.logits);
    // SAFETY: a checked plan: device memory of the stated shapes, which the caller's views keep borrowed in stream order.
    unsafe { launch_args(stream, by_dtype(plan.logits.dtype), &plan.choice, &args) }
}

/// # Safety
/// Every address in `args` is device memory of the shape that the kernel's contract says, until the work has finished; `args` are of
/// this choice.
pub(super) unsafe fn launch_args(stream: &DeviceStream, dtype: usize, choice: &Choice, args: &LswRouteArgs) -> Result<()> {
    let device = stream.device();
    let blocks = args.tokens.div_ceil(WARPS).max(1);
    let most = if args.counts == 0 { u32::MAX } else { device.processors * COUNTING_BLOCKS };
    let grid = Grid { blocks: blocks.min(most), threads: LSW_ROUTE_THREADS, shared: 0 };
    let kernels = &device.kernels.route;
    let functions = match () {
        _ if is_plain(choice) => first_that_serves(args, PLAIN_ITEMS, kernels.plain),
        _ if is_grouped(choice, args) => kernels.grouped,
        _ => first_that_serves(args, SCORED_ITEMS, kernels.scored[choice.score as usize]),
    };
    let function = functions[dtype];
    // SAFETY: the caller's promise; the kernel waits for the work before it.
    unsafe { enqueue(stream, function, grid, args) }
}

fn first_that_serves<const N: usize>(args: &LswRouteArgs, items: [u32; N], kernels: [[Function; 3]; N]) -> [Function; 3] {
    kernels[items.iter().position(|items| args.lane_experts <= *items).expect("the last serves all")]
}
