//! The gate on the CPU: a token's logits, then its route.

use super::Pool;
use super::route::route_all;
use crate::dtype::{Float, with_float};
use crate::gate::Plan;

pub(crate) fn run(pool: &Pool, plan: &Plan) {
    with_float!(plan.x.dtype, gate::<_>(pool, plan));
}

fn gate<T: Float>(pool: &Pool, plan: &Plan) {
    // SAFETY: checked matrices of host memory, borrowed by the call.
    let bias = plan.weight_bias.map(|bias| unsafe { bias.row::<T>(0) });
    route_all(pool, &plan.choice, |token| {
        // SAFETY: as above.
        let x: Vec<f32> = unsafe { plan.x.row::<T>(token) }.iter().map(|x| x.to_f32()).collect();
        let logit = |expert: u32| {
            // SAFETY: as above.
            let weight = unsafe { plan.weight.row::<T>(u64::from(expert)) };
            dot(&x, weight) + bias.map_or(0.0, |bias| bias[expert as usize].to_f32())
        };
        (0..plan.choice.experts).map(logit).collect()
    });
}

/// Eight sums side by side, which a compiler can keep in one vector, and then theirs.
fn dot<T: Float>(x: &[f32], weight: &[T]) -> f32 {
    let mut sums = [0.0f32; 8];
    for (x, w) in x.chunks(8).zip(weight.chunks(8)) {
        for ((sum, x), w) in sums.iter_mut().zip(x).zip(w) {
            *sum += x * w.to_f32();
        }
    }
    sums.iter().sum()
}
