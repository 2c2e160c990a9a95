//! Launches of unmerged adapters.

use super::args::{LSW_APPLY_TARGETS, LSW_EXPAND_THREADS, LSW_SHRINK_ROWS, LSW_SHRINK_THREADS, LswApplyArgs, LswApplyTarget, LswFactor};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch_dependent};
use crate::apply::{GroupTarget, Plan};
use crate::error::Result;

/// Above as many blocks of one row of A a multiprocessor, blocks take several rows.
const BUSY: u32 = 8;

fn target(plan: &Plan<'_>, target: &GroupTarget) -> LswApplyTarget {
    let first_entry = u64::from(target.index) * plan.bank.slots();
    LswApplyTarget {
        factors: plan.bank.device_table().addr() + first_entry * size_of::<LswFactor>() as u64,
        y: target.y.map_or(0, |y| y.addr),
        y_stride: target.y.map_or(0, |y| y.stride),
        out: target.out_features,
        rank_cap: target.rank_cap,
        column: target.column,
        padding: 0,
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
        width: plan.products.cols as u32,
        units: 0,
        shrink_rows: 1,
        y_type: plan.targets().find_map(|t| t.y).map_or(0, |y| by_dtype(y.dtype) as u32),
        x_aligned: plan.x.is_some_and(|x| x.aligned16()).into(),
        targets,
    }
}

pub(crate) fn shrink(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let entries = plan.rows * plan.k;
    let units = |rows: u32| plan.targets().map(|t| t.rank_cap.div_ceil(rows)).sum::<u32>();
    let is_busy = u64::from(entries) * u64::from(units(1)) > u64::from(BUSY * stream.device().processors);
    let shrink_rows = if is_busy { LSW_SHRINK_ROWS } else { 1 };
    let args = LswApplyArgs { units: units(shrink_rows), shrink_rows, ..args(stream, plan) };
    let grid = Grid { blocks: entries * args.units, threads: LSW_SHRINK_THREADS, shared: 0 };
    let function = stream.device().kernels.apply_shrink[by_dtype(plan.bank.dtype())];
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views; the bank's table, and adapters that the
    // bank keeps alive. The kernel waits first of all.
    unsafe { launch_dependent(stream, function, grid, &args) }
}

pub(crate) fn expand(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let units = plan.targets().map(|t| t.out_features.div_ceil(LSW_EXPAND_THREADS)).sum();
    if units == 0 {
        return Ok(());
    }
    let args = LswApplyArgs { units, ..args(stream, plan) };
    let grid = Grid { blocks: plan.rows * units, threads: LSW_EXPAND_THREADS, shared: 0 };
    let function = stream.device().kernels.apply_expand[by_dtype(plan.bank.dtype())];
    // SAFETY: as above. Before it waits, the kernel reads what nobody writes between the two halves (apply_shrink's contract).
    unsafe { launch_dependent(stream, function, grid, &args) }
}
