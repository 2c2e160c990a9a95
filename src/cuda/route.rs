//! The router's launch.

use super::args::{
    LSW_ROUTE_BY_SCORE, LSW_ROUTE_COUNTED, LSW_ROUTE_NARROW, LSW_ROUTE_PADDED, LSW_ROUTE_PLAIN, LSW_ROUTE_RENORMALIZE, LSW_ROUTE_SUM_TWO,
    LSW_ROUTE_THREADS, LswRouteArgs, LswRouteWorkspace,
};
use super::context::{DeviceStream, by_dtype};
use super::flags;
use super::launch::{Grid, launch as enqueue};
use crate::error::Result;
use crate::route::{Choice, GroupScore, Plan, Score};
use crate::view::RawMat;

const WARPS: u32 = LSW_ROUTE_THREADS / 32;
/// Where blocks count together: few enough that little is left to add up, and enough to fill the card.
const COUNTING_BLOCKS: u32 = 8; // a multiprocessor

pub(crate) const WORKSPACE_BYTES: u64 = size_of::<LswRouteWorkspace>() as u64;

/// All but the logits.
pub(super) fn choice_args(stream: &DeviceStream, choice: &Choice) -> LswRouteArgs {
    let addr = |mat: Option<RawMat>| mat.map_or(0, |mat| mat.addr);
    let group_lanes = 32 / choice.groups.next_power_of_two();
    let is_plain = choice.score == Score::Softmax
        && choice.renormalize
        && choice.bias.is_none()
        && choice.groups == 1
        && (choice.scale, choice.softcap) == (1.0, 0.0);
    LswRouteArgs {
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
            (is_plain, LSW_ROUTE_PLAIN),
        ]),
        status: stream.device().odd_word(),
        scale: choice.scale,
        softcap: choice.softcap,
        score: choice.score as u32,
        groups: choice.groups,
        top_groups: choice.top_groups,
        group_experts: choice.experts / choice.groups,
        group_lanes_log2: group_lanes.ilog2(),
        lane_experts: (choice.experts / choice.groups).div_ceil(group_lanes),
        bias: addr(choice.bias),
        valid: addr(choice.valid),
        mask: addr(choice.mask),
        counts: addr(choice.counts),
        workspace: choice.workspace,
        ..LswRouteArgs::default()
    }
}

/// Whether the kernels with many registers have to serve.
pub(super) fn is_wide(args: &LswRouteArgs) -> bool {
    args.lane_experts > LSW_ROUTE_NARROW
}

pub(crate) fn launch(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let args = LswRouteArgs { logits: plan.logits.addr, logits_stride: plan.logits.stride, ..choice_args(stream, &plan.choice) };
    // SAFETY: a checked plan: device memory of the stated shapes, which the caller's views keep borrowed in stream order.
    unsafe { launch_args(stream, by_dtype(plan.logits.dtype), &args) }
}

/// # Safety
/// Every address in `args` is device memory of the shape that the kernel's contract says, until the work has finished.
pub(super) unsafe fn launch_args(stream: &DeviceStream, dtype: usize, args: &LswRouteArgs) -> Result<()> {
    let device = stream.device();
    let blocks = args.tokens.div_ceil(WARPS).max(1);
    let most = if args.counts == 0 { u32::MAX } else { device.processors * COUNTING_BLOCKS };
    let kernels = match args.flags & LSW_ROUTE_PLAIN {
        _ if is_wide(args) => &device.kernels.route_wide,
        0 => &device.kernels.route_scored,
        _ => &device.kernels.route_plain,
    };
    // SAFETY: the caller's promise.
    unsafe { enqueue(stream, kernels[dtype], Grid { blocks: blocks.min(most), threads: LSW_ROUTE_THREADS, shared: 0 }, args) }
}
