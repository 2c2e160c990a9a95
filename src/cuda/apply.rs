//! Launches of unmerged adapters.

use super::args::{
    LSW_APPLY_GROUP, LSW_APPLY_MANY, LSW_APPLY_TARGETS, LSW_EXPAND_THREADS, LSW_MANY_CHUNKS, LSW_MANY_RANKS, LSW_MANY_ROWS,
    LSW_ORDER_THREADS, LSW_SHRINK_ROWS, LSW_SHRINK_THREADS, LswApplyArgs, LswApplyTarget, LswFactor,
};
use super::context::{Apply, DeviceStream, by_dtype};
use super::launch::{Grid, launch_dependent};
use crate::apply::{GroupTarget, Plan};
use crate::dtype::DType;
use crate::error::Result;

/// f32: above as many blocks of one row of A a multiprocessor, blocks take several rows.
const BUSY: u32 = 8;
/// 16 bits: blocks that share the slots of a group; with more slots than that, each does several.
const MAX_SPLITS: u32 = 32;
/// The same of many rows, which have few slots a group.
const MANY_SPLITS: u32 = 4;

fn target(plan: &Plan<'_>, target: &GroupTarget) -> LswApplyTarget {
    let first_entry = u64::from(target.index) * plan.bank.slots();
    LswApplyTarget {
        factors: plan.bank.device_table().addr() + first_entry * size_of::<LswFactor>() as u64,
        y: target.y.map_or(0, |y| y.addr),
        y_stride: target.y.map_or(0, |y| y.stride),
        out: target.out_features,
        rank_cap: target.rank_cap,
        column: target.column,
        y_aligned: target.y.is_some_and(|y| y.aligned16()).into(),
    }
}

fn args(stream: &DeviceStream, plan: &Plan<'_>) -> LswApplyArgs {
    let mut targets = [LswApplyTarget::default(); LSW_APPLY_TARGETS as usize];
    for (args, group) in targets.iter_mut().zip(plan.targets()) {
        *args = target(plan, group);
    }
    LswApplyArgs {
        x: plan.x.map_or(0, |x| x.addr),
        ids: plan.ids.addr,
        gates: plan.gates.addr,
        row_map: plan.row_map.map_or(0, |map| map.addr),
        order: plan.order.unwrap_or(0),
        products: plan.products.addr,
        status: stream.device().odd_word(),
        x_stride: plan.x.map_or(0, |x| x.stride),
        ids_stride: plan.ids.stride,
        gates_stride: plan.gates.stride,
        rows: plan.rows,
        items: plan.ids.rows as u32,
        in_: plan.x.map_or(0, |x| x.cols as u32),
        k: plan.k,
        slots: plan.bank.slots() as u32,
        count: plan.targets().count() as u32,
        width: plan.products.cols as u32,
        units: 0,
        shrink_rows: 1,
        splits: 1,
        slices: plan.slices,
        chunks: 1,
        y_type: plan.targets().find_map(|t| t.y).map_or(0, |y| by_dtype(y.dtype) as u32),
        x_aligned: plan.x.is_some_and(|x| x.aligned16()).into(),
        targets,
    }
}

fn is_many(plan: &Plan<'_>) -> bool {
    plan.rows > LSW_APPLY_MANY
}

fn kernels(stream: &DeviceStream, plan: &Plan<'_>) -> Apply {
    let kernels = &stream.device().kernels;
    let by_type = if is_many(plan) { kernels.apply_many } else { kernels.apply_few };
    match plan.bank.dtype() {
        DType::F32 => kernels.apply_f32,
        other => by_type[by_dtype(other) - 1],
    }
}

pub(crate) fn shrink(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let all = args(stream, plan);
    let (args, blocks, threads) = if plan.bank.dtype() == DType::F32 {
        let entries = plan.rows * plan.k;
        let units = |rows: u32| plan.targets().map(|t| t.rank_cap.div_ceil(rows)).sum::<u32>();
        let is_busy = u64::from(entries) * u64::from(units(1)) > u64::from(BUSY * stream.device().processors);
        let shrink_rows = if is_busy { LSW_SHRINK_ROWS } else { 1 };
        let args = LswApplyArgs { units: units(shrink_rows), shrink_rows, ..all };
        (args, entries * args.units, LSW_SHRINK_THREADS)
    } else {
        let (rows, ranks) = if is_many(plan) { (LSW_MANY_ROWS, LSW_MANY_RANKS) } else { (LSW_APPLY_GROUP, 8) };
        let slots = (plan.rows.min(rows) * plan.k).min(all.slots);
        let splits = slots.min(if is_many(plan) { MANY_SPLITS } else { MAX_SPLITS });
        let args = LswApplyArgs { units: all.width.div_ceil(ranks), splits, ..all };
        // Of all slices in a block, or of one each.
        let threads = if plan.slices > 1 { 32 } else { LSW_SHRINK_THREADS };
        (args, plan.rows.div_ceil(rows) * args.slices * args.splits * args.units, threads)
    };
    if args.order != 0 && plan.bank.dtype() != DType::F32 {
        let grid = Grid { blocks: 1, threads: LSW_ORDER_THREADS, shared: 0 };
        // SAFETY: as below.
        unsafe { launch_dependent(stream, stream.device().kernels.apply_order, grid, &args) }?;
    }
    let grid = Grid { blocks, threads, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views; the bank's table, and adapters that the
    // bank keeps alive. The kernels wait first of all.
    unsafe { launch_dependent(stream, kernels(stream, plan).shrink, grid, &args) }
}

pub(crate) fn expand(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let is_16bit = plan.bank.dtype() != DType::F32;
    let chunks = if is_16bit && is_many(plan) { LSW_MANY_CHUNKS } else { 1 };
    let units = plan.targets().map(|t| t.out_features.div_ceil(LSW_EXPAND_THREADS * chunks)).sum();
    if units == 0 {
        return Ok(());
    }
    let args = LswApplyArgs { units, chunks, ..args(stream, plan) };
    let groups = if is_16bit { plan.rows.div_ceil(LSW_APPLY_GROUP) } else { plan.rows };
    let grid = Grid { blocks: groups * units, threads: LSW_EXPAND_THREADS, shared: 0 };
    // SAFETY: as above. Before it waits, the kernel reads what nobody writes between the two halves (apply_shrink's contract).
    unsafe { launch_dependent(stream, kernels(stream, plan).expand, grid, &args) }
}
