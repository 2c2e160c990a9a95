//! Launches of the floors.

use super::args::{LSW_MEASURE_THREADS, LSW_READ_BLOCKS, LSW_READ_PACKS, LSW_READ_THREADS, LSW_RUN_PACKS, LswMeasureArgs};
use super::context::{DeviceStream, Function, by_dtype};
use super::launch::{Grid, launch};
use crate::error::Result;
use crate::measure::{Plan, ReadPlan, RunsPlan};

pub(crate) fn scale(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let per_block = u64::from(LSW_MEASURE_THREADS) * 16 / plan.y.dtype.size();
    run(stream, stream.device().kernels.measure_scale[by_dtype(plan.y.dtype)], plan.y.cols.div_ceil(per_block), plan)
}

pub(crate) fn fill(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let blocks = plan.y.cols.div_ceil(u64::from(LSW_MEASURE_THREADS)).min(4096);
    run(stream, stream.device().kernels.measure_fill[by_dtype(plan.y.dtype)], blocks, plan)
}

pub(crate) fn read(stream: &DeviceStream, plan: &ReadPlan) -> Result<()> {
    let step = u64::from(LSW_READ_THREADS * LSW_READ_PACKS * 16);
    let fill = u64::from(stream.device().processors * LSW_READ_BLOCKS);
    let blocks = (plan.bytes / step).clamp(1, fill);
    let args = LswMeasureArgs { x: plan.x.addr, y: plan.sink.addr, count: plan.bytes, ..LswMeasureArgs::default() };
    let grid = Grid { blocks: blocks as u32, threads: LSW_READ_THREADS, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated length, kept by the caller's views.
    unsafe { launch(stream, stream.device().kernels.measure_read, grid, &args) }
}

pub(crate) fn repeat(stream: &DeviceStream, plan: &RunsPlan) -> Result<()> {
    runs(stream, stream.device().kernels.measure_repeat, plan)
}

pub(crate) fn fold(stream: &DeviceStream, plan: &RunsPlan) -> Result<()> {
    runs(stream, stream.device().kernels.measure_fold, plan)
}

fn runs(stream: &DeviceStream, function: Function, plan: &RunsPlan) -> Result<()> {
    let count = plan.runs * u64::from(LSW_RUN_PACKS);
    let args = LswMeasureArgs { x: plan.x.addr, y: plan.y.addr, count, times: plan.times, ..LswMeasureArgs::default() };
    let grid = Grid { blocks: plan.runs as u32, threads: LSW_RUN_PACKS, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated lengths, kept by the caller's views.
    unsafe { launch(stream, function, grid, &args) }
}

fn run(stream: &DeviceStream, function: Function, blocks: u64, plan: &Plan) -> Result<()> {
    let args = LswMeasureArgs { x: plan.x.addr, y: plan.y.addr, count: plan.y.cols, seed: plan.seed, factor: plan.factor, times: 0 };
    let grid = Grid { blocks: blocks as u32, threads: LSW_MEASURE_THREADS, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated length, kept by the caller's views.
    unsafe { launch(stream, function, grid, &args) }
}
