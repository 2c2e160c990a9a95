//! The router on the CPU: one token at a time.

use super::Pool;
use crate::dtype::{Float, with_float};
use crate::route::Plan;
use crate::stream::Odd;
use std::cmp::Ordering;

pub(crate) fn run(pool: &Pool, plan: &Plan) {
    with_float!(plan.logits.dtype, route::<_>(pool, plan));
}

fn route<T: Float>(pool: &Pool, plan: &Plan) {
    pool.for_each(u64::from(plan.tokens), |token| {
        // SAFETY: the plan's matrices are checked host memory, borrowed by the call, outputs disjoint from all else; this iteration
        // alone touches row `token` of the outputs.
        let (logits, ids, gates) =
            unsafe { (plan.logits.row::<T>(token), plan.ids.row_mut::<i32>(token), plan.gates.row_mut::<f32>(token)) };
        if route_token(logits, plan.renormalize, ids, gates) {
            pool.report(Odd::LOGITS);
        }
    });
}

/// Whether anything was odd.
fn route_token<T: Float>(logits: &[T], renormalize: bool, ids: &mut [i32], gates: &mut [f32]) -> bool {
    let mut odd = false;
    let scores: Vec<f32> = logits
        .iter()
        .map(|x| {
            let x = x.to_f32();
            odd |= x.is_nan() || x == f32::INFINITY;
            if x.is_nan() { f32::NEG_INFINITY } else { x }
        })
        .collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // A stable sort: ties stay in ascending order of id. No NaN is left, so the order is total.
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap_or(Ordering::Equal));

    let m = scores[order[0]];
    let weight = |x: f32| match m {
        f32::INFINITY => f32::from(x == m),
        f32::NEG_INFINITY => 0.0,
        _ => (x - m).exp(),
    };
    let chosen = order[..ids.len()].iter().map(|&e| weight(scores[e]));
    let sum: f32 = if renormalize { chosen.clone().sum() } else { scores.iter().map(|&x| weight(x)).sum() };
    for ((&e, w), (id, gate)) in order.iter().zip(chosen).zip(ids.iter_mut().zip(gates)) {
        *id = e as i32;
        *gate = if sum > 0.0 { w / sum } else { 0.0 };
    }
    odd || m == f32::NEG_INFINITY
}
