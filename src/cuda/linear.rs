//! The launch of a product with its unmerged adapters.

use super::args::{
    LSW_LINEAR_BLOCKS, LSW_LINEAR_ONE_SHARED, LSW_LINEAR_OUTPUT, LSW_LINEAR_PATIENCE, LSW_LINEAR_SHARED, LSW_LINEAR_THREADS,
    LSW_LINEAR_TILE, LswLinearArgs,
};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch_dependent};
use crate::error::Result;
use crate::linear::Plan;
use crate::view::RawMat;

fn args(stream: &DeviceStream, plan: &Plan<'_>) -> LswLinearArgs {
    let x = plan.apply.x.expect("a plan of both halves");
    let is_whole = |mat: &RawMat| mat.aligned16() && (mat.cols * mat.dtype.size()).is_multiple_of(16);
    let mut args = LswLinearArgs {
        apply: super::apply::args(stream, &plan.apply),
        hand_over: plan.hand_over,
        whole: (is_whole(&x) && plan.weights.iter().flatten().all(is_whole)).into(),
        only_x_is_new: plan.options.only_x_is_new.into(),
        patience: if plan.options.alone { 0 } else { LSW_LINEAR_PATIENCE },
        ..LswLinearArgs::default()
    };
    for (i, weight) in plan.weights.iter().flatten().enumerate() {
        (args.weights[i], args.weight_strides[i]) = (weight.addr, weight.stride);
    }
    args
}

pub(crate) fn linear(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let (device, dtype) = (stream.device(), by_dtype(plan.apply.bank.dtype()));
    let rows: u32 = plan.apply.targets().map(|t| t.out_features).sum();
    let tile_bytes = plan.apply.rows * LSW_LINEAR_TILE * LSW_LINEAR_OUTPUT;
    let most_rounds = |shared: u32| device.linear_shared.saturating_sub(shared) / tile_bytes;
    // The deeper rings of one token, where they leave room for as many blocks and for all of their outputs.
    let one_blocks = LSW_LINEAR_BLOCKS * device.processors;
    let is_one = plan.apply.rows == 1
        && device.linear_blocks[1][dtype] >= one_blocks
        && rows <= one_blocks * LSW_LINEAR_TILE * most_rounds(LSW_LINEAR_ONE_SHARED);
    let (kind, shared) = if is_one { (1, LSW_LINEAR_ONE_SHARED) } else { (0, LSW_LINEAR_SHARED) };
    // As many blocks as run at a time; more where they cannot keep as many outputs.
    let (resident, most_rounds) = (device.linear_blocks[kind][dtype], most_rounds(shared));
    let blocks = rows.min(resident).max(rows.div_ceil(LSW_LINEAR_TILE * most_rounds));
    let rounds = rows.div_ceil(LSW_LINEAR_TILE * blocks);
    let args = LswLinearArgs {
        blocks: blocks.min(resident),
        rounds,
        tile_rows: rows / (rounds * blocks),
        longer: rows % (rounds * blocks),
        ..args(stream, plan)
    };
    let grid = Grid { blocks, threads: LSW_LINEAR_THREADS, shared: shared + rounds * tile_bytes };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views; the bank's table, and adapters that the
    // bank keeps alive. Before it waits, the kernel reads what LinearOptions says that nobody writes.
    unsafe { launch_dependent(stream, device.kernels.linear[kind][dtype], grid, &args) }
}
