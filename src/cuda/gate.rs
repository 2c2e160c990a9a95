//! The gate's launches.

use super::args::{
    LSW_GATE_CHAIN, LSW_GATE_EXPERTS, LSW_GATE_FUSED, LSW_GATE_MANY, LSW_GATE_PROJECT_TOKENS, LSW_GATE_PROJECT_TOKENS_32BIT, LSW_GATE_RANKS,
    LSW_GATE_SHARED, LSW_GATE_SHARED_MANY, LSW_GATE_THREADS, LSW_GATE_TOKENS, LSW_GATE_WORDS, LSW_ROUTE_PLAIN, LswGateArgs,
};
use super::context::{DeviceStream, Function, by_dtype};
use super::launch::{Grid, launch_clustered, launch_dependent};
use super::route::{WORKSPACE_BYTES, choice_args, is_plain, launch_args};
use crate::dtype::DType;
use crate::error::Result;
use crate::gate::Plan;
use crate::view::RawMat;

const WARPS: u64 = LSW_GATE_THREADS as u64 / 32;

/// Logits that a row of the workspace holds: 16-byte loads serve them.
fn row(experts: u32) -> u64 {
    u64::from(experts).next_multiple_of(4)
}

/// The counters, then words that blocks hand to each other, which stay zero, then for many tokens the logits, which do not.
pub(crate) fn workspace_bytes(tokens: u32, experts: u32) -> u64 {
    let rows = |tokens: u32| 4 * u64::from(tokens) * row(experts);
    WORKSPACE_BYTES
        + match tokens {
            0..=LSW_GATE_FUSED => rows(tokens) * u64::from(LSW_GATE_RANKS),
            _ => u64::from(LSW_GATE_WORDS) + rows(tokens),
        }
}

pub(crate) fn launch(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let choice = &plan.choice;
    let is_fused = choice.tokens <= LSW_GATE_FUSED;
    let parts = choice.workspace + WORKSPACE_BYTES + if is_fused { 0 } else { u64::from(LSW_GATE_WORDS) };
    let logits = RawMat { addr: parts, dtype: DType::F32, stride: row(choice.experts), ..plan.x };
    let has_clusters = stream.device().has_dependent_launch && !stream.portable;
    let is_many = is_fused && has_clusters && choice.tokens > LSW_GATE_TOKENS && plan.x.dtype != DType::F32;
    let mut args = LswGateArgs {
        route: choice_args(stream, choice, logits),
        x: plan.x.addr,
        weight: plan.weight.addr,
        weight_bias: plan.weight_bias.map_or(0, |bias| bias.addr),
        parts,
        x_stride: plan.x.stride,
        weight_stride: plan.weight.stride,
        hidden: plan.x.cols,
        parts_stride: logits.stride,
        chains: plan.x.cols.div_ceil(u64::from(LSW_GATE_CHAIN * LSW_GATE_RANKS) * WARPS) as u32,
        tiles: choice.experts.div_ceil(if is_many { LSW_GATE_MANY } else { LSW_GATE_EXPERTS }),
        aligned: (plan.x.aligned16() && plan.weight.aligned16()).into(),
        clustered: has_clusters.into(),
    };
    if is_plain(choice) {
        args.route.flags |= LSW_ROUTE_PLAIN;
    }
    let dtype = by_dtype(plan.x.dtype);
    let kernels = &stream.device().kernels;
    // SAFETY: a checked plan: device memory of the stated shapes and a workspace of the stated size, which the caller's views keep
    // borrowed in stream order. Beyond the fused kernel's tokens, the projection writes the logits that the router reads.
    unsafe {
        match choice.tokens {
            0 => launch_args(stream, 0, choice, &args.route),
            _ if is_many => fused(stream, kernels.gate_many[dtype - 1], (LSW_GATE_MANY, LSW_GATE_SHARED_MANY), &args),
            1..=LSW_GATE_FUSED => fused(stream, kernels.gate[dtype], (LSW_GATE_TOKENS, LSW_GATE_SHARED), &args),
            _ => {
                let each = if plan.x.dtype.size() == 2 { LSW_GATE_PROJECT_TOKENS } else { LSW_GATE_PROJECT_TOKENS_32BIT };
                project(stream, dtype, each, &args)?;
                launch_args(stream, 0, choice, &args.route)
            }
        }
    }
}

/// # Safety
/// As for the launch: addresses as the kernel's contract says.
unsafe fn fused(stream: &DeviceStream, kernel: Function, (tokens, shared): (u32, u32), args: &LswGateArgs) -> Result<()> {
    let blocks = args.route.tokens.div_ceil(tokens) * args.tiles * LSW_GATE_RANKS;
    let grid = Grid { blocks, threads: LSW_GATE_THREADS, shared };
    // SAFETY: the caller's promise; the kernel waits for the work before it.
    unsafe {
        match args.clustered {
            0 => launch_dependent(stream, kernel, grid, args),
            _ => launch_clustered(stream, kernel, grid, LSW_GATE_RANKS, args),
        }
    }
}

/// # Safety
/// As for [`fused`].
unsafe fn project(stream: &DeviceStream, dtype: usize, tokens_each: u32, args: &LswGateArgs) -> Result<()> {
    let jobs = u64::from(args.route.tokens.div_ceil(tokens_each)) * u64::from(args.tiles);
    let grid = Grid { blocks: jobs.div_ceil(WARPS) as u32, threads: LSW_GATE_THREADS, shared: 0 };
    // SAFETY: the caller's promise; the kernel waits for the work before it.
    unsafe { launch_dependent(stream, stream.device().kernels.gate_project[dtype], grid, args) }
}
