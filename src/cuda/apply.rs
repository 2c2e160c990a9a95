//! Launches of unmerged adapters.

use super::apply_dense;
use super::args::{
    LSW_ADD_THREADS, LSW_APPLY_MANY, LSW_APPLY_TARGETS, LSW_EXPAND_CHUNKS, LSW_EXPAND_THREADS, LSW_FEW_EXPAND_THREADS, LSW_FEW_OUTPUTS,
    LSW_FEW_RANKS, LSW_FEW_ROWS, LSW_FEW_SHARED, LSW_FEW_THREADS, LSW_MANY_CHUNKS, LSW_MANY_EXPAND_ROWS, LSW_MANY_EXPAND_THREADS,
    LSW_MANY_OUTPUTS, LSW_MANY_SHRINK_ROWS, LSW_MANY_SHRINK_THREADS, LSW_MANY_SPLITS, LSW_ORDER_THREADS, LSW_SHRINK_ROWS,
    LSW_SHRINK_THREADS, LSW_STRIP_BLOCKS, LSW_STRIP_OUTPUTS, LSW_STRIP_ROWS, LSW_STRIP_SLOTS, LSW_STRIP_STEP_BYTES, LSW_STRIP_THREADS,
    LSW_STRIP_WARP_BYTES, LswAddArgs, LswAddTarget, LswApplyArgs, LswApplyTarget, LswFactor,
};
use super::context::{Apply, Device, DeviceStream, Few, by_dtype};
use super::launch::{Cube, Grid, launch, launch_dependent};
use crate::apply::{GroupTarget, Part, Plan};
use crate::dtype::DType;
use crate::error::Result;
use crate::view::RawMat;

/// Above as many blocks of one row of A a multiprocessor, blocks take several rows.
const BUSY: u32 = 8;
/// Blocks of expand that a multiprocessor holds: with more of them, each does more outputs.
const RESIDENT: u32 = 4;
/// The same of many rows, which should come in several waves, so that no multiprocessor ends long before the others.
const MANY_RESIDENT: u32 = 6;
/// Up to so many blocks of few rows a multiprocessor, each slot has its own, used or not: one that has to look for its slot waits longer.
/// But beside a product, which the idle ones hold up.
const FEW_BLOCKS: u32 = 2;

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

pub(super) fn args(stream: &DeviceStream, plan: &Plan<'_>) -> LswApplyArgs {
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
        splits: plan.slices,
        chunks: 1,
        y_type: plan.targets().find_map(|t| t.y).map_or(0, |y| by_dtype(y.dtype) as u32),
        x_aligned: plan.x.is_some_and(|x| x.aligned16()).into(),
        candidates: 0,
        begins: [u32::MAX; LSW_APPLY_TARGETS as usize],
        targets,
    }
}

/// Which kernels serve a call.
enum Path {
    /// f32: row by row.
    Rows(Apply),
    /// Up to 64 rows of 16 bits.
    Few(Few),
    Many(Apply),
}

/// Units of all targets, and those before each.
fn begins(plan: &Plan<'_>, units: impl Fn(&GroupTarget) -> u32) -> (u32, [u32; LSW_APPLY_TARGETS as usize]) {
    let (mut begins, mut all) = ([u32::MAX; LSW_APPLY_TARGETS as usize], 0);
    for (begin, target) in begins.iter_mut().zip(plan.targets()) {
        *begin = all;
        all += units(target);
    }
    (all, begins)
}

impl Path {
    fn of(stream: &DeviceStream, plan: &Plan<'_>) -> Self {
        let (kernels, dtype) = (&stream.device().kernels, by_dtype(plan.bank.dtype()));
        match plan.bank.dtype() {
            DType::F32 => Self::Rows(kernels.apply_f32),
            _ if plan.rows <= LSW_APPLY_MANY => Self::Few(kernels.apply_few[dtype - 1]),
            _ => Self::Many(kernels.apply_many[dtype - 1]),
        }
    }
}

pub(crate) fn apply(stream: &DeviceStream, plan: &Plan<'_>, part: Part) -> Result<()> {
    // Not a matter of x and y: each half sees but one of them.
    if let (Some(hopper), Some(dense)) = (&stream.device().hopper, &plan.dense) {
        return apply_dense::apply(stream, plan, hopper, dense, part);
    }
    if plan.overwrites {
        zero(stream, plan)?;
    }
    if plan.is_empty() {
        return Ok(());
    }
    let path = Path::of(stream, plan);
    if part != Part::Finish {
        shrink(stream, plan, &path, part)?;
    }
    match (&path, part) {
        (Path::Few(_), Part::Begin) => expand(stream, &plan_of_sums(plan), &path, part),
        (Path::Few(_), Part::Finish) => add(stream, plan),
        (_, Part::Begin) => Ok(()),
        (_, Part::Whole | Part::Finish) => expand(stream, plan, &path, part),
    }
}

fn zero(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let _entered = stream.device().enter()?;
    plan.targets().filter_map(|target| target.y).filter(|y| !y.is_empty()).try_for_each(|y| stream.zero(&y))
}

fn sums_of(plan: &Plan<'_>, target: &GroupTarget) -> RawMat {
    RawMat { addr: plan.sums.addr + target.sum_column * plan.sums.dtype.size(), cols: target.out_features.into(), ..plan.sums }
}

/// With the sums in y's place.
fn plan_of_sums<'b>(plan: &Plan<'b>) -> Plan<'b> {
    let targets = plan.targets.map(|target| target.map(|target| GroupTarget { y: Some(sums_of(plan, &target)), ..target }));
    Plan { targets, ..*plan }
}

fn shrink(stream: &DeviceStream, plan: &Plan<'_>, path: &Path, part: Part) -> Result<()> {
    let (device, all, entries) = (stream.device(), args(stream, plan), plan.rows * plan.k);
    let units = |ranks: u32| plan.targets().map(|t| t.rank_cap.div_ceil(ranks)).sum::<u32>();
    let (function, args, blocks, threads) = match path {
        Path::Rows(rows) => {
            let is_busy = u64::from(entries) * u64::from(units(1)) > u64::from(BUSY * device.processors);
            let shrink_rows = if is_busy { LSW_SHRINK_ROWS } else { 1 };
            let args = LswApplyArgs { units: units(shrink_rows), shrink_rows, ..all };
            (rows.shrink, args, [entries * args.units, 1, 1], LSW_SHRINK_THREADS)
        }
        Path::Few(few) => {
            let (units, begins) = begins(plan, |t| t.rank_cap.div_ceil(LSW_FEW_RANKS));
            let blocks = |candidates: u32| u64::from(candidates) * u64::from(units) * u64::from(plan.slices);
            let is_small = part == Part::Whole && blocks(all.slots) <= u64::from(FEW_BLOCKS * device.processors);
            let candidates = if all.slots <= entries || is_small { all.slots } else { entries };
            let args = LswApplyArgs { units, begins, candidates, ..all };
            (few.shrink, args, [plan.slices, units, candidates], LSW_FEW_THREADS)
        }
        Path::Many(many) => {
            let grid = Grid { blocks: 1, threads: LSW_ORDER_THREADS, shared: 0 };
            // SAFETY: as below.
            unsafe { launch_dependent(stream, device.kernels.apply_order, grid, &all) }?;
            let groups = plan.rows.div_ceil(LSW_MANY_SHRINK_ROWS);
            let splits = (device.processors / groups).clamp(1, LSW_MANY_SPLITS);
            (many.shrink, LswApplyArgs { splits, ..all }, [groups * splits, 1, 1], LSW_MANY_SHRINK_THREADS)
        }
    };
    let grid = Cube { blocks, threads, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views; the bank's table, and adapters that the
    // bank keeps alive. The kernels wait first of all.
    unsafe { launch_dependent(stream, function, grid, &args) }
}

/// What a block needs to hold B of all slots for some outputs, where it can: small ranks of few slots, and y in whole packs of 16 bits.
fn strip_bytes(device: &Device, plan: &Plan<'_>) -> Option<u32> {
    let is_whole = |t: &GroupTarget| t.y.is_some_and(|y| y.aligned16() && y.dtype.size() == 2 && y.cols.is_multiple_of(8));
    if plan.bank.slots() > u64::from(LSW_STRIP_SLOTS) || !plan.targets().all(is_whole) {
        return None;
    }
    let steps = plan.bank.slots() as u32 * plan.targets().map(|t| t.rank_cap.div_ceil(LSW_STRIP_ROWS)).max()?;
    let bytes = steps * LSW_STRIP_STEP_BYTES + LSW_STRIP_THREADS / 32 * LSW_STRIP_WARP_BYTES;
    (bytes <= device.strip_shared).then_some(bytes)
}

fn expand_strips(stream: &DeviceStream, plan: &Plan<'_>, shared: u32) -> Result<()> {
    let device = stream.device();
    let units = plan.targets().map(|t| t.out_features.div_ceil(LSW_STRIP_OUTPUTS)).sum::<u32>();
    if units == 0 {
        return Ok(());
    }
    let resident = if shared <= device.strip_shared / LSW_STRIP_BLOCKS { LSW_STRIP_BLOCKS } else { 1 };
    // At least a group of rows for each warp.
    let groups = u64::from(plan.rows.div_ceil(LSW_STRIP_ROWS)) * u64::from(units);
    let blocks = groups.div_ceil(u64::from(LSW_STRIP_THREADS / 32)).min(u64::from(resident * device.processors)) as u32;
    let function = device.kernels.apply_strips[by_dtype(plan.bank.dtype()) - 1];
    let grid = Grid { blocks, threads: LSW_STRIP_THREADS, shared };
    // SAFETY: as of `expand`.
    unsafe { launch_dependent(stream, function, grid, &LswApplyArgs { units, ..args(stream, plan) }) }
}

/// To y; in the first half of a call of few rows, to the sums.
fn expand(stream: &DeviceStream, plan: &Plan<'_>, path: &Path, part: Part) -> Result<()> {
    // A block of `threads` does `rows` rows and up to `most` times `outputs` outputs, while there are `resident` blocks a multiprocessor.
    if let (Path::Many(_), Some(shared)) = (path, strip_bytes(stream.device(), plan)) {
        return expand_strips(stream, plan, shared);
    }
    let (function, threads, rows, outputs, most, resident, shared) = match path {
        Path::Rows(by_row) => (by_row.expand, LSW_EXPAND_THREADS, 1, LSW_EXPAND_THREADS, LSW_EXPAND_CHUNKS, RESIDENT, 0),
        Path::Few(few) => {
            let function = if part == Part::Begin { few.sum } else { few.expand };
            (function, LSW_FEW_EXPAND_THREADS, LSW_FEW_ROWS, LSW_FEW_OUTPUTS, 1, RESIDENT, LSW_FEW_SHARED)
        }
        Path::Many(many) => {
            (many.expand, LSW_MANY_EXPAND_THREADS, LSW_MANY_EXPAND_ROWS, LSW_MANY_OUTPUTS, LSW_MANY_CHUNKS, MANY_RESIDENT, 0)
        }
    };
    let units = |chunks: u32| plan.targets().map(|t| t.out_features.div_ceil(outputs * chunks)).sum::<u32>();
    if units(1) == 0 {
        return Ok(());
    }
    let groups = plan.rows.div_ceil(rows);
    let resident = u64::from(resident * stream.device().processors);
    let chunks = (u64::from(groups) * u64::from(units(1)) / resident).clamp(1, u64::from(most)) as u32;
    let (_, begins) = begins(plan, |t| t.out_features.div_ceil(outputs));
    let args = LswApplyArgs { units: units(chunks), begins, chunks, ..args(stream, plan) };
    let blocks = if let Path::Few(_) = path { [args.units, groups, 1] } else { [groups * args.units, 1, 1] };
    let grid = Cube { blocks, threads, shared };
    // SAFETY: as above. Before it waits, the kernel reads what nobody writes between the two halves (apply_begin's contract).
    unsafe { launch_dependent(stream, function, grid, &args) }
}

/// The sums to y.
fn add(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let mut args = LswAddArgs::default();
    let (mut widest, mut y_type) = (0, DType::F32);
    for (args, target) in args.targets.iter_mut().zip(plan.targets()) {
        let (y, sums) = (target.y.expect("a plan of this half"), sums_of(plan, target));
        *args = LswAddTarget {
            y: y.addr,
            y_stride: y.stride,
            sums: sums.addr,
            sums_stride: sums.stride,
            out: target.out_features,
            y_aligned: y.aligned16().into(),
        };
        (widest, y_type) = (target.out_features.max(widest), y.dtype);
    }
    if widest == 0 {
        return Ok(());
    }
    let blocks = [widest.div_ceil(4 * LSW_ADD_THREADS), plan.rows, plan.targets().count() as u32];
    let grid = Cube { blocks, threads: LSW_ADD_THREADS, shared: 0 };
    // SAFETY: as above.
    unsafe { launch(stream, stream.device().kernels.apply_add[by_dtype(y_type)], grid, &args) }
}
