//! Launches of gather-scatter.

use super::args::{
    LSW_MOVE_THREADS, LSW_PERMUTE_MAX_BLOCKS, LSW_PERMUTE_THREADS, LSW_PERMUTE_WARP_ITEMS, LswCombineArgs, LswGatherArgs, LswPermuteArgs,
};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch};
use crate::error::Result;
use crate::permute::{CombinePlan, GatherPlan, MapsPlan};
use crate::view::RawMat;

const WARPS: u32 = LSW_PERMUTE_THREADS / 32;

/// Blocks, and the items that each warp of them ranks.
fn split(items: u32) -> (u32, u32) {
    let warp_items = items.div_ceil(LSW_PERMUTE_MAX_BLOCKS * WARPS).next_multiple_of(32).max(LSW_PERMUTE_WARP_ITEMS);
    (items.div_ceil(warp_items * WARPS).max(1), warp_items)
}

/// A count for every block and expert.
pub(crate) fn workspace_bytes(items: u32, experts: u32) -> u64 {
    u64::from(split(items).0) * u64::from(experts) * 4
}

pub(crate) fn maps(stream: &DeviceStream, plan: &MapsPlan) -> Result<()> {
    let (blocks, warp_items) = split(plan.items);
    let args = LswPermuteArgs {
        ids: plan.ids.addr,
        offsets: plan.offsets.addr,
        row_map: plan.row_map.addr,
        inverse: plan.inverse.addr,
        counts: plan.workspace,
        status: stream.device().odd_word(),
        ids_stride: plan.ids.stride,
        inverse_stride: plan.inverse.stride,
        items: plan.items,
        k: plan.k,
        experts: plan.experts,
        blocks,
        warp_items,
        padding: 0,
    };
    let kernels = &stream.device().kernels;
    let count = Grid { blocks, threads: LSW_PERMUTE_THREADS, shared: 4 * WARPS * plan.experts };
    let scatter = Grid { shared: 4 * ((WARPS + 2) * plan.experts + 1), ..count };
    // SAFETY: a checked plan: device memory of the stated shapes, a workspace of the stated size, all kept by the caller's views.
    unsafe {
        launch(stream, kernels.permute_count, count, &args)?;
        launch(stream, kernels.permute_scatter, scatter, &args)
    }
}

/// The widest access that fits these matrices, as an index into the gather kernels, and its bytes.
fn unit(mats: &[&RawMat]) -> (usize, u64) {
    let fits = |bytes: u64| {
        let whole = |m: &&RawMat| [m.addr, m.stride.wrapping_mul(m.dtype.size()), m.cols * m.dtype.size()].iter().all(|x| x % bytes == 0);
        mats.iter().all(whole)
    };
    let units = [16, 4, 2, 1];
    let found = units.iter().position(|&bytes| fits(bytes)).expect("everything is whole bytes");
    (found, units[found])
}

pub(crate) fn gather(stream: &DeviceStream, plan: &GatherPlan) -> Result<()> {
    let (kernel, bytes) = unit(&[&plan.x, &plan.rows]);
    // Wrapping: the stride of a single row is unbounded, and not used.
    let in_units = |elements: u64| elements.wrapping_mul(plan.x.dtype.size()) / bytes;
    let args = LswGatherArgs {
        x: plan.x.addr,
        row_map: plan.row_map.addr,
        rows: plan.rows.addr,
        x_stride: in_units(plan.x.stride),
        rows_stride: in_units(plan.rows.stride),
        units: in_units(plan.x.cols),
        count: plan.rows.rows as u32,
        k: plan.k,
        tokens: plan.x.rows as u32,
        padding: 0,
    };
    let grid = Grid { blocks: args.count, threads: LSW_MOVE_THREADS, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views.
    unsafe { launch(stream, stream.device().kernels.gather[kernel], grid, &args) }
}

pub(crate) fn combine(stream: &DeviceStream, plan: &CombinePlan) -> Result<()> {
    let args = LswCombineArgs {
        rows: plan.rows.addr,
        inverse: plan.inverse.addr,
        gates: plan.gates.addr,
        y: plan.y.addr,
        rows_stride: plan.rows.stride,
        inverse_stride: plan.inverse.stride,
        gates_stride: plan.gates.stride,
        y_stride: plan.y.stride,
        cols: plan.y.cols,
        tokens: plan.y.rows as u32,
        k: plan.inverse.cols as u32,
        row_count: plan.rows.rows as u32,
        aligned: (unit(&[&plan.rows, &plan.y]).1 == 16).into(),
    };
    let grid = Grid { blocks: args.tokens, threads: LSW_MOVE_THREADS, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views.
    unsafe { launch(stream, stream.device().kernels.combine[by_dtype(plan.y.dtype)], grid, &args) }
}
