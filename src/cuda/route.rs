//! The router's launch.

use super::args::{LSW_ROUTE_THREADS, LswRouteArgs};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch as enqueue};
use crate::error::Result;
use crate::route::Plan;

pub(crate) fn launch(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let device = stream.device();
    let args = LswRouteArgs {
        logits: plan.logits.addr,
        ids: plan.ids.addr,
        gates: plan.gates.addr,
        status: device.odd_word(),
        logits_stride: plan.logits.stride,
        ids_stride: plan.ids.stride,
        gates_stride: plan.gates.stride,
        tokens: plan.tokens,
        experts: plan.experts,
        k: plan.k,
        renormalize: plan.renormalize.into(),
    };
    let grid = Grid { blocks: plan.tokens.div_ceil(LSW_ROUTE_THREADS / 32), threads: LSW_ROUTE_THREADS, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated shapes, which the caller's views keep borrowed in stream order.
    unsafe { enqueue(stream, device.kernels.route[by_dtype(plan.logits.dtype)], grid, &args) }
}
