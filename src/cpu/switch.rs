//! The switch on the CPU.

use super::Pool;
use crate::bank::Entry;
use crate::dtype::{Float, with_float};
use crate::stream::Odd;
use crate::switch::{RawTarget, SetPlan, ToPlan};
use crate::view::RawMat;

/// One entry of the list that a target holds merged.
#[derive(Debug, Clone, Copy)]
struct Merged {
    slot: usize,
    coefficient: f32,
    generation: u32,
}

impl Merged {
    /// Coefficients by their bits: a NaN that stays is no change.
    fn same(&self, other: &Self) -> bool {
        (self.slot, self.coefficient.to_bits(), self.generation) == (other.slot, other.coefficient.to_bits(), other.generation)
    }
}

/// What each target holds; None: unknown.
#[derive(Debug)]
pub(crate) struct State {
    merged: Vec<Option<Vec<Merged>>>,
    odd: Odd,
}

impl State {
    pub fn new(plan: &SetPlan) -> Self {
        Self { merged: vec![plan.in_place.then(Vec::new); plan.targets.len()], odd: Odd::default() }
    }

    pub fn invalidate(&mut self, plan: &SetPlan) {
        *self = Self::new(plan);
    }

    pub fn odd(&self) -> Odd {
        self.odd
    }

    fn report(&mut self, odd: Odd) {
        self.odd.0 |= odd.0;
    }

    pub fn current(&self, target: usize, ids: RawMat, coefficients: RawMat) {
        // SAFETY: checked host vectors, borrowed by the call and disjoint.
        let (ids, coefficients) = unsafe { (ids.row_mut::<i32>(0), coefficients.row_mut::<f32>(0)) };
        ids.fill(-1);
        coefficients.fill(0.0);
        for (i, held) in self.merged[target].iter().flatten().enumerate() {
            ids[i] = held.slot as i32;
            coefficients[i] = held.coefficient;
        }
    }

    pub fn run(&mut self, pool: &Pool, set: &SetPlan, to: &ToPlan) {
        let route = self.canonical_route(set, to);
        let table = set.bank.table();
        let slots = set.bank.slots() as usize;
        for index in to.first as usize..to.last as usize {
            let entries = &table[index * slots..(index + 1) * slots];
            let new = self.list(set, &route, entries);
            let held = self.merged[index].clone();
            if held.as_ref().is_some_and(|held| held.len() == new.len() && held.iter().zip(&new).all(|(a, b)| a.same(b))) {
                continue;
            }
            let terms = if set.in_place {
                let held = held.expect("in place, what is merged is always known");
                // The product of an adapter that has left the bank cannot be taken out again.
                if held.iter().any(|h| entries[h.slot].generation != h.generation) {
                    self.report(Odd::STALE_MERGE);
                    continue;
                }
                difference(&new, &held)
            } else {
                new.clone()
            };
            if !(set.targets[index].weight.is_empty() || set.in_place && terms.is_empty()) {
                with_float!(set.bank.dtype(), merge::<_>(pool, &set.targets[index], entries, &terms));
            }
            self.merged[index] = Some(new);
        }
    }

    /// Entries by ascending slot; gates of equal ids added up in order of appearance.
    fn canonical_route(&mut self, set: &SetPlan, to: &ToPlan) -> Vec<(usize, f32)> {
        let vector = |addr, dtype| RawMat { addr, dtype, rows: 1, cols: u64::from(to.k), stride: 0, place: crate::view::Place::Host };
        // SAFETY: checked host vectors of k elements, borrowed by the call. With k = 0 no memory is touched.
        let (ids, gates) = unsafe { (vector(to.ids, crate::DType::I32).row::<i32>(0), vector(to.gates, crate::DType::F32).row::<f32>(0)) };
        let mut route: Vec<(usize, f32)> = Vec::new();
        for (&id, &gate) in ids.iter().zip(gates) {
            if id < 0 || id as u64 >= set.bank.slots() {
                if id != -1 {
                    self.report(Odd::ROUTE_ID);
                }
                continue;
            }
            match route.iter_mut().find(|(slot, _)| *slot == id as usize) {
                Some((_, sum)) => *sum += gate,
                None => route.push((id as usize, gate)),
            }
        }
        route.sort_by_key(|(slot, _)| *slot);
        route
    }

    /// What of the route concerns a target.
    fn list(&mut self, set: &SetPlan, route: &[(usize, f32)], entries: &[Entry]) -> Vec<Merged> {
        let mut list = Vec::new();
        for &(slot, gate) in route {
            let Some(factor) = entries[slot].factor.as_ref().filter(|f| f.a.rows() > 0) else { continue };
            let coefficient = gate * factor.scale;
            // In place W must be able to come back: not finite, or so large that a difference could overflow, is zero.
            let usable = !set.in_place || coefficient.abs() < 2f32.powi(126);
            if !coefficient.is_finite() || !usable {
                self.report(Odd::COEFFICIENT);
            }
            if usable && coefficient != 0.0 {
                list.push(Merged { slot, coefficient, generation: entries[slot].generation });
            }
        }
        list
    }
}

/// new - held: an adapter in both enters once, by the difference of its coefficients.
fn difference(new: &[Merged], held: &[Merged]) -> Vec<Merged> {
    let find = |list: &[Merged], slot| list.iter().find(|m| m.slot == slot).copied();
    let entering = new.iter().map(|n| {
        let before = find(held, n.slot).map_or(0.0, |h| h.coefficient);
        Merged { coefficient: n.coefficient - before, ..*n }
    });
    let leaving = held.iter().filter(|h| find(new, h.slot).is_none()).map(|h| Merged { coefficient: -h.coefficient, ..*h });
    entering.filter(|n| n.coefficient != 0.0).chain(leaving).collect()
}

/// W = round(base + sum of coefficient * (B A)), row by row; each adapter's product has its own f32 sum. No terms: bits are copied.
fn merge<T: Float>(pool: &Pool, target: &RawTarget, entries: &[Entry], terms: &[Merged]) {
    let adapters: Vec<Adapter> = terms.iter().map(|t| Adapter::new::<T>(&entries[t.slot], t.coefficient)).collect();
    pool.for_each(target.weight.rows, |row| {
        // SAFETY: checked host memory; weights are disjoint from each other and from bases, and this iteration alone writes this row.
        // In place base and weight are the same row, so the base is read into `sum` before the weight is borrowed to write.
        let base = unsafe { target.base.row::<T>(row) };
        if adapters.is_empty() {
            // SAFETY: as above. Without terms the form is from base, so the two rows are disjoint.
            unsafe { target.weight.row_mut::<T>(row) }.copy_from_slice(base);
            return;
        }
        let mut sum = vec![0f32; base.len()];
        for adapter in &adapters {
            adapter.add_row(row as usize, &mut sum);
        }
        for (sum, base) in sum.iter_mut().zip(base) {
            *sum += base.to_f32();
        }
        // SAFETY: as above; `base` is not used any more.
        let weight = unsafe { target.weight.row_mut::<T>(row) };
        for (weight, sum) in weight.iter_mut().zip(&sum) {
            *weight = T::from_f32(*sum);
        }
    });
}

/// A term's pair, widened once.
struct Adapter {
    a: Vec<Vec<f32>>,
    b: Vec<Vec<f32>>,
    coefficient: f32,
}

impl Adapter {
    fn new<T: Float>(entry: &Entry, coefficient: f32) -> Self {
        let factor = entry.factor.as_ref().expect("only adapters that exist are merged");
        let row = |mat: &RawMat, r| -> Vec<f32> {
            // SAFETY: checked host memory that the bank's owner keeps alive and unchanged (Tensor's contract).
            unsafe { mat.row::<T>(r) }.iter().map(|x| x.to_f32()).collect()
        };
        let widen = |mat: &RawMat| -> Vec<Vec<f32>> { (0..mat.rows).map(|r| row(mat, r)).collect() };
        Self { a: widen(&factor.a.raw), b: widen(&factor.b.raw), coefficient }
    }

    fn add_row(&self, row: usize, sum: &mut [f32]) {
        let mut product = vec![0f32; sum.len()];
        for (b, a) in self.b[row].iter().zip(&self.a) {
            for (p, a) in product.iter_mut().zip(a) {
                *p += b * a;
            }
        }
        for (sum, p) in sum.iter_mut().zip(&product) {
            *sum += self.coefficient * p;
        }
    }
}
