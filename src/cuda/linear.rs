//! Launches of a product with its unmerged adapters.

use super::args::{
    LSW_LINEAR_OUTPUT, LSW_LINEAR_SHARED_FEW, LSW_LINEAR_SHARED_ONE, LSW_LINEAR_THREADS, LSW_LINEAR_TILE, LswLinearArgs,
};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch_together};
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
        only_x_is_new: plan.only_x_is_new.into(),
        ..LswLinearArgs::default()
    };
    for (i, weight) in plan.weights.iter().flatten().enumerate() {
        (args.weights[i], args.weight_strides[i]) = (weight.addr, weight.stride);
    }
    args
}

pub(crate) fn linear(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let (device, dtype, tokens) = (stream.device(), by_dtype(plan.apply.bank.dtype()), plan.apply.rows);
    let (kernel, fixed) = if tokens == 1 { (0, LSW_LINEAR_SHARED_ONE) } else { (1, LSW_LINEAR_SHARED_FEW) };
    let tile_bytes = tokens * LSW_LINEAR_TILE * LSW_LINEAR_OUTPUT;
    // What blocks can keep, and how many of them run at a time: they wait for each other.
    let (most_rounds, resident) = ((device.linear_shared - fixed) / tile_bytes, device.linear_blocks[kernel][dtype]);
    let most_rows = u64::from(resident) * u64::from(most_rounds * LSW_LINEAR_TILE);
    let mut args = args(stream, plan);
    let mut left: u64 = plan.apply.targets().map(|t| u64::from(t.out_features)).sum();
    while left > 0 {
        let rows = left.min(most_rows) as u32;
        let blocks = rows.min(resident);
        args.rounds = rows.div_ceil(LSW_LINEAR_TILE * blocks);
        (args.tile_rows, args.longer) = (rows / (args.rounds * blocks), rows % (args.rounds * blocks));
        let grid = Grid { blocks, threads: LSW_LINEAR_THREADS, shared: fixed + args.rounds * tile_bytes };
        // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views; the bank's table, and adapters that the
        // bank keeps alive. Before it waits, the kernel reads what LinearOptions says that nobody writes.
        unsafe { launch_together(stream, device.kernels.linear[kernel][dtype], grid, &args) }?;
        args.first_row += rows;
        left -= u64::from(rows);
    }
    Ok(())
}
