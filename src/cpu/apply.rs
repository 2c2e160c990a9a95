//! Unmerged adapters on the CPU.

use super::Pool;
use crate::apply::{GroupTarget, Part, Plan};
use crate::bank::{Entry, Factor};
use crate::dtype::{Float, with_float};
use crate::stream::Odd;
use crate::view::RawMat;

/// An adapter of a row at a target. `position` is its place in the row's route.
pub(super) struct Term<'t> {
    factor: &'t Factor,
    coefficient: f32,
    position: u64,
}

impl Plan<'_> {
    /// Entries of a row's route by ascending slot; gates of equal ids added up in order of appearance. Empty for a row of no item.
    pub(super) fn route(&self, report: impl Fn(Odd), row: u64) -> Vec<(usize, f32)> {
        // SAFETY: the plan's matrices are checked host memory, borrowed by the call.
        let map = self.row_map.map(|map| i64::from(unsafe { map.row::<i32>(0) }[row as usize]));
        let item = map.map_or(Some(row), |item| u64::try_from(item).ok());
        let Some(item) = item.filter(|&item| item < self.ids.rows) else { return Vec::new() };
        // SAFETY: as above.
        let (ids, gates) = unsafe { (self.ids.row::<i32>(item), self.gates.row::<f32>(item)) };
        let mut route: Vec<(usize, f32)> = Vec::new();
        for (&id, &gate) in ids.iter().zip(gates) {
            let Some(slot) = usize::try_from(id).ok().filter(|&slot| (slot as u64) < self.bank.slots()) else {
                if id != -1 {
                    report(Odd::ROUTE_ID);
                }
                continue;
            };
            match route.iter_mut().find(|(known, _)| *known == slot) {
                Some((_, sum)) => *sum += gate,
                None => route.push((slot, gate)),
            }
        }
        route.sort_by_key(|(slot, _)| *slot);
        route
    }

    /// What of a route concerns a target.
    pub(super) fn terms<'t>(
        &self,
        report: impl Fn(Odd),
        table: &'t [Entry],
        target: &GroupTarget,
        route: &[(usize, f32)],
    ) -> Vec<Term<'t>> {
        let entries = &table[target.index as usize * self.bank.slots() as usize..];
        let term = |(position, &(slot, gate)): (usize, &(usize, f32))| {
            let factor = entries[slot].factor.as_ref().filter(|f| f.a.rows() > 0)?;
            let coefficient = gate * factor.scale;
            if !coefficient.is_finite() {
                report(Odd::COEFFICIENT);
            }
            (coefficient != 0.0).then_some(Term { factor, coefficient, position: position as u64 })
        };
        route.iter().enumerate().filter_map(term).collect()
    }

    /// Where A x of a term lies: f32 [1, rank].
    pub(super) fn product(&self, row: u64, target: &GroupTarget, term: &Term<'_>) -> RawMat {
        let start = (row * u64::from(self.k) + term.position) * self.products.stride + u64::from(target.column);
        let rank = term.factor.a.rows();
        RawMat { addr: self.products.addr + 4 * start, rows: 1, cols: rank, stride: rank, ..self.products }
    }
}

/// The halves are A x, and all else.
pub(crate) fn apply(pool: &Pool, plan: &Plan<'_>, part: Part) {
    if plan.overwrites {
        zero(pool, plan);
    }
    if plan.is_empty() {
        return;
    }
    if part != Part::Finish {
        shrink(pool, plan);
    }
    if part != Part::Begin {
        expand(pool, plan);
    }
}

fn zero(pool: &Pool, plan: &Plan<'_>) {
    pool.for_each(u64::from(plan.rows), |row| {
        for y in plan.targets().filter_map(|target| target.y) {
            with_float!(y.dtype, zero_row::<_>(y, row));
        }
    });
}

fn zero_row<Y: Float>(y: RawMat, row: u64) {
    // SAFETY: a checked output, disjoint from all else; the caller's iteration alone writes this row.
    unsafe { y.row_mut::<Y>(row) }.fill(Y::from_f32(0.0));
}

pub(super) fn shrink(pool: &Pool, plan: &Plan<'_>) {
    with_float!(plan.bank.dtype(), shrink_as::<_>(pool, plan));
}

fn shrink_as<T: Float>(pool: &Pool, plan: &Plan<'_>) {
    let x = plan.x.expect("a plan of this half");
    let table = &plan.bank.table()[..];
    pool.for_each(u64::from(plan.rows), |row| {
        let route = plan.route(|_| (), row);
        // SAFETY: checked host memory, borrowed by the call.
        let x: Vec<f32> = unsafe { x.row::<T>(row) }.iter().map(|x| x.to_f32()).collect();
        for target in plan.targets() {
            for term in plan.terms(|_| (), table, target, &route) {
                // SAFETY: inside the checked workspace, which is disjoint from all else; this iteration alone writes this row's part.
                let product = unsafe { plan.product(row, target, &term).row_mut::<f32>(0) };
                for (i, product) in product.iter_mut().enumerate() {
                    // SAFETY: checked host memory that the bank's owner keeps alive and unchanged (Tensor's contract).
                    let a = unsafe { term.factor.a.raw.row::<T>(i as u64) };
                    *product = a.iter().zip(&x).map(|(a, x)| a.to_f32() * x).sum();
                }
            }
        }
    });
}

fn expand(pool: &Pool, plan: &Plan<'_>) {
    with_float!(plan.bank.dtype(), expand_as::<_>(pool, plan));
}

fn expand_as<T: Float>(pool: &Pool, plan: &Plan<'_>) {
    let table = &plan.bank.table()[..];
    pool.for_each(u64::from(plan.rows), |row| {
        let route = plan.route(|odd| pool.report(odd), row);
        for target in plan.targets() {
            let terms = plan.terms(|odd| pool.report(odd), table, target, &route);
            if terms.is_empty() {
                continue;
            }
            let mut sum = vec![0f32; target.out_features as usize];
            for term in &terms {
                // SAFETY: inside the checked workspace, where the first half wrote it.
                add_term::<T>(&mut sum, 0, term, unsafe { plan.product(row, target, term).row::<f32>(0) });
            }
            let y = target.y.expect("a plan of this half");
            with_float!(y.dtype, add_to::<_>(y, row, &sum));
        }
    });
}

/// To the sums of B's rows from `first` on.
pub(super) fn add_term<T: Float>(sum: &mut [f32], first: u64, term: &Term<'_>, product: &[f32]) {
    for (row, sum) in (first..).zip(sum) {
        // SAFETY: checked host memory that the bank's owner keeps alive and unchanged (Tensor's contract).
        let b = unsafe { term.factor.b.raw.row::<T>(row) };
        *sum += term.coefficient * b.iter().zip(product).map(|(b, x)| b.to_f32() * x).sum::<f32>();
    }
}

fn add_to<Y: Float>(y: RawMat, row: u64, sum: &[f32]) {
    // SAFETY: a checked output, disjoint from all else; the caller's iteration alone writes this row.
    for (y, sum) in unsafe { y.row_mut::<Y>(row) }.iter_mut().zip(sum) {
        *y = Y::from_f32(y.to_f32() + sum);
    }
}
