//! The gate's launches.

use super::args::{
    LSW_GATE_EXPERTS, LSW_GATE_FUSED, LSW_GATE_PROJECT_TOKENS, LSW_GATE_PROJECT_TOKENS_32BIT, LSW_GATE_SHARED, LSW_GATE_SHARED_WIDE,
    LSW_GATE_SLICE, LSW_GATE_THREADS, LSW_GATE_TOKENS, LswGateArgs, LswRouteArgs,
};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch as enqueue};
use super::route::{WORKSPACE_BYTES, choice_args, is_wide, launch_args};
use crate::error::Result;
use crate::gate::Plan;

const WARPS: u64 = LSW_GATE_THREADS as u64 / 32;

/// Logits that a row of the workspace holds: 16-byte loads serve them.
fn row(experts: u32) -> u64 {
    u64::from(experts).next_multiple_of(4)
}

/// The counters, then the parts of logits or, for many tokens, the logits.
pub(crate) fn workspace_bytes(tokens: u32, experts: u32, hidden: u32) -> u64 {
    let rows = |tokens: u32, parts: u32| u64::from(tokens) * u64::from(parts) * row(experts);
    let fused = rows(tokens.min(LSW_GATE_FUSED), hidden.div_ceil(LSW_GATE_SLICE));
    let split = if tokens > LSW_GATE_FUSED { rows(tokens, 1) } else { 0 };
    WORKSPACE_BYTES + 4 * fused.max(split)
}

pub(crate) fn launch(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let choice = &plan.choice;
    let parts = choice.workspace + WORKSPACE_BYTES;
    let args = LswGateArgs {
        route: LswRouteArgs { logits: parts, logits_stride: row(choice.experts), ..choice_args(stream, choice) },
        x: plan.x.addr,
        weight: plan.weight.addr,
        weight_bias: plan.weight_bias.map_or(0, |bias| bias.addr),
        parts,
        x_stride: plan.x.stride,
        weight_stride: plan.weight.stride,
        hidden: plan.x.cols,
        parts_stride: row(choice.experts),
        slices: (plan.x.cols as u32).div_ceil(LSW_GATE_SLICE),
        tiles: choice.experts.div_ceil(LSW_GATE_EXPERTS),
        aligned: (plan.x.aligned16() && plan.weight.aligned16()).into(),
        padding: 0,
    };
    let dtype = by_dtype(plan.x.dtype);
    // SAFETY: a checked plan: device memory of the stated shapes and a workspace of the stated size, which the caller's views keep
    // borrowed in stream order. Beyond the fused kernel's tokens, the projection writes the logits that the router reads.
    unsafe {
        match choice.tokens {
            0 => launch_args(stream, 0, &args.route),
            1..=LSW_GATE_FUSED => fused(stream, dtype, &args),
            _ => {
                let each = if plan.x.dtype.size() == 2 { LSW_GATE_PROJECT_TOKENS } else { LSW_GATE_PROJECT_TOKENS_32BIT };
                project(stream, dtype, each, &args)?;
                launch_args(stream, 0, &args.route)
            }
        }
    }
}

/// # Safety
/// As for the launch: addresses as the kernel's contract says.
unsafe fn fused(stream: &DeviceStream, dtype: usize, args: &LswGateArgs) -> Result<()> {
    let kernels = &stream.device().kernels;
    let (kernel, shared) =
        if is_wide(&args.route) { (kernels.gate_wide[dtype], LSW_GATE_SHARED_WIDE) } else { (kernels.gate[dtype], LSW_GATE_SHARED) };
    let blocks = args.route.tokens.div_ceil(LSW_GATE_TOKENS) * args.tiles * args.slices;
    // SAFETY: the caller's promise.
    unsafe { enqueue(stream, kernel, Grid { blocks, threads: LSW_GATE_THREADS, shared }, args) }
}

/// # Safety
/// As for [`fused`].
unsafe fn project(stream: &DeviceStream, dtype: usize, tokens_each: u32, args: &LswGateArgs) -> Result<()> {
    let jobs = u64::from(args.route.tokens.div_ceil(tokens_each)) * u64::from(args.tiles);
    let grid = Grid { blocks: jobs.div_ceil(WARPS) as u32, threads: LSW_GATE_THREADS, shared: 0 };
    // SAFETY: the caller's promise.
    unsafe { enqueue(stream, stream.device().kernels.gate_project[dtype], grid, args) }
}
