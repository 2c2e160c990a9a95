//! A product and its unmerged adapters on the CPU.

use super::Pool;
use super::apply::{self, Term, add_term};
use crate::apply::GroupTarget;
use crate::dtype::{Float, with_float};
use crate::linear::Plan;
use crate::view::RawMat;

/// Rows of a weight that a task takes: so that a single token is work for all threads.
const BLOCK: u64 = 64;

pub(crate) fn linear(pool: &Pool, plan: &Plan<'_>) {
    if !plan.apply.is_empty() {
        apply::shrink(pool, &plan.apply);
    }
    with_float!(plan.apply.bank.dtype(), products::<_>(pool, plan));
}

fn products<T: Float>(pool: &Pool, plan: &Plan<'_>) {
    let rows = u64::from(plan.apply.rows);
    for row in 0..rows {
        let route = plan.apply.route(|odd| pool.report(odd), row);
        let table = &plan.apply.bank.table()[..];
        for (target, weight) in plan.apply.targets().zip(plan.weights.iter().flatten()) {
            let terms = plan.apply.terms(|odd| pool.report(odd), table, target, &route);
            let outs = u64::from(target.out_features);
            pool.for_each(outs.div_ceil(BLOCK), |block| {
                let first = block * BLOCK;
                multiply::<T>(plan, row, target, weight, &terms, first..(first + BLOCK).min(outs));
            });
        }
    }
}

/// Some elements of a row of a target's y.
fn multiply<T: Float>(plan: &Plan<'_>, row: u64, target: &GroupTarget, weight: &RawMat, terms: &[Term<'_>], outs: std::ops::Range<u64>) {
    // SAFETY: checked host memory, borrowed by the call.
    let x = unsafe { plan.apply.x.expect("a plan of both halves").row::<T>(row) };
    // SAFETY: as above.
    let dot = |o| unsafe { weight.row::<T>(o) }.iter().zip(x).map(|(w, x)| w.to_f32() * x.to_f32()).sum::<f32>();
    let product: Vec<f32> = outs.clone().map(dot).collect();
    let mut added = vec![0f32; product.len()];
    for term in terms {
        // SAFETY: inside the checked workspace, where the first half wrote it.
        add_term::<T>(&mut added, outs.start, term, unsafe { plan.apply.product(row, target, term).row::<f32>(0) });
    }
    let y = target.y.expect("a plan of both halves");
    let start = (row * y.stride + outs.start) * y.dtype.size();
    let part = RawMat { addr: y.addr + start, rows: 1, cols: outs.end - outs.start, ..y };
    with_float!(y.dtype, write::<_>(part, &product, &added));
}

fn write<Y: Float>(y: RawMat, product: &[f32], added: &[f32]) {
    // SAFETY: part of a checked output, disjoint from all else; the caller's iteration alone writes it.
    for ((y, product), added) in unsafe { y.row_mut::<Y>(0) }.iter_mut().zip(product).zip(added) {
        *y = Y::from_f32(product + added);
    }
}
