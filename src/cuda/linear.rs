//! The launch of a product with its unmerged adapters.

use super::args::{LSW_LINEAR_OUTPUTS, LSW_LINEAR_SHARED, LSW_LINEAR_THREADS, LSW_LINEAR_TILE, LswLinearArgs};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch_dependent};
use crate::error::Result;
use crate::linear::Plan;

pub(crate) fn linear(stream: &DeviceStream, plan: &Plan<'_>) -> Result<()> {
    let processors = stream.device().processors;
    let rows: u32 = plan.apply.targets().map(|t| t.out_features).sum();
    // A block a multiprocessor, so that the next launch's fit beside them; more where one cannot keep as many outputs.
    let most = LSW_LINEAR_OUTPUTS / (LSW_LINEAR_TILE * plan.apply.rows);
    let rounds = rows.div_ceil(LSW_LINEAR_TILE * processors).clamp(1, most);
    let blocks = rows.min(processors).max(rows.div_ceil(LSW_LINEAR_TILE * rounds));
    let mut args = LswLinearArgs {
        apply: super::apply::args(stream, &plan.apply),
        hand_over: plan.hand_over,
        rounds,
        tile_rows: rows / (rounds * blocks),
        longer: rows % (rounds * blocks),
        only_x_is_new: plan.only_x_is_new.into(),
        ..LswLinearArgs::default()
    };
    let x = plan.apply.x.expect("a plan of both halves");
    let is_whole = |mat: &crate::view::RawMat| mat.aligned16() && (mat.cols * mat.dtype.size()).is_multiple_of(16);
    args.whole = (is_whole(&x) && plan.weights.iter().flatten().all(is_whole)).into();
    for (i, weight) in plan.weights.iter().flatten().enumerate() {
        (args.weights[i], args.weight_strides[i]) = (weight.addr, weight.stride);
    }
    let grid = Grid { blocks, threads: LSW_LINEAR_THREADS, shared: LSW_LINEAR_SHARED };
    let function = stream.device().kernels.linear[by_dtype(plan.apply.bank.dtype())];
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views; the bank's table, and adapters that the
    // bank keeps alive. Before it waits, the kernel prefetches, and reads what LinearOptions says that nobody writes.
    unsafe { launch_dependent(stream, function, grid, &args) }
}
