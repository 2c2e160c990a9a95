//! Is W what the route says? Answered after every token, in float64 and without the crate.
//!
//! On the CPU each projection multiplies a vector, and all outputs are compared with W_base x + sum of c B (A
//! x). On a GPU that would need a product on the device, so there, as on the CPU, some rows of some
//! projections are compared element by element.
//!
//! How far a value may be off follows from how W is made: sums in f32, and one rounding to W's type.

use crate::Failure;
use crate::machine::{Buffer, Machine, Scalar};
use crate::model::{Pair, Target, padded};
use lora_switch::{DType, Float, Form};
use rayon::prelude::*;
use std::time::Instant;

/// Unit roundoff of the f32 sums; doubled, since tensor cores cut where IEEE rounds.
const SUMS: f64 = 2.0 / (1u64 << 24) as f64;

/// Projections and rows that are compared element by element.
const SAMPLED_TARGETS: usize = 8;
const SAMPLED_ROWS: usize = 4;

/// A value, and the sum of the magnitudes of what it is a sum of.
type Value = (f64, f64);

/// A token's route.
pub struct Route {
    pub ids: Vec<i32>,
    pub gates: Vec<f32>,
}

impl Route {
    /// Slots with their coefficients at a target, where those are not zero.
    pub fn at<'a>(&'a self, target: &'a Target) -> impl Iterator<Item = (usize, f32)> + 'a {
        let term = |(&id, gate): (&i32, &f32)| {
            let (rank, scale) = *target.slots.get(usize::try_from(id).ok()?)?;
            Some((id as usize, gate * scale)).filter(|(_, coefficient)| rank > 0 && *coefficient != 0.0)
        };
        self.ids.iter().zip(&self.gates).filter_map(term)
    }
}

/// What was found.
#[derive(Clone, Copy)]
pub struct Checked {
    /// The largest error, as a fraction of what is allowed.
    pub error: f64,
    /// What the products took, where there are products.
    pub multiply_us: Option<f64>,
}

pub struct Check {
    in_place: bool,
    multiplies: bool,
    probes: Vec<Probe>,
}

/// Values of one target: its rows times x, or without x the rows' elements.
struct Probe {
    target: usize,
    rows: Vec<usize>,
    x: Option<Vec<f64>>,
    base: Vec<Value>,
    /// For each slot with a pair, what B A gives in place of W.
    slots: Vec<Option<Vec<Value>>>,
    /// How far the values may be off already: in place, every switch rounds W anew.
    drift: Vec<f64>,
    /// Magnitudes that enter the next switch besides those of the new route.
    before: Vec<f64>,
    /// How many f32 operations the terms that a next switch in place takes out need.
    held: usize,
}

impl Check {
    /// `base` holds every W_base.
    pub fn new<T: Scalar + Float>(machine: &Machine, targets: &[Target], base: &Buffer<T>, form: Form, seed: u64) -> Result<Self, Failure> {
        let multiplies = machine.cuda.is_none();
        let mut probes = Vec::new();
        for (index, target) in targets.iter().enumerate().filter(|_| multiplies) {
            let x = uniform(seed ^ index as u64).take(target.cols).collect();
            probes.push(Probe::new(index, (0..target.rows).collect(), Some(x), target, base)?);
        }
        // A step of about an eighth that shares no factor with the 7 projections of a layer: samples of all
        // kinds and layers.
        let step = targets.len().div_ceil(SAMPLED_TARGETS);
        let step = if step > 1 && step.is_multiple_of(7) { step + 1 } else { step };
        for (index, target) in targets.iter().enumerate().step_by(step.max(1)) {
            let random = uniform(!seed ^ index as u64).map(|u| ((u + 1.0) / 2.0 * target.rows as f64) as usize);
            let mut rows: Vec<usize> = [0, target.rows - 1].into_iter().chain(random).take(SAMPLED_ROWS).collect();
            rows.sort_unstable();
            rows.dedup();
            probes.push(Probe::new(index, rows, None, target, base)?);
        }
        Ok(Self { in_place: form == Form::InPlace, multiplies, probes })
    }

    /// The next slot's pair for a target, if there is one.
    pub fn learn<T: Scalar + Float>(&mut self, index: usize, target: &Target, pair: Option<&Pair<T>>) -> Result<(), Failure> {
        for probe in self.probes.iter_mut().filter(|probe| probe.target == index) {
            let values = pair.map(|pair| probe.product(target, pair)).transpose()?;
            probe.slots.push(values);
        }
        Ok(())
    }

    /// After a switch to `route`, when the stream's work is done.
    pub fn verify<T: Scalar + Float>(&mut self, targets: &[Target], weights: &Buffer<T>, route: &Route) -> Result<Checked, Failure> {
        let mut checked = Checked { error: 0.0, multiply_us: self.multiplies.then_some(0.0) };
        for probe in &mut self.probes {
            let target = &targets[probe.target];
            let started = Instant::now();
            let got = probe.observe(target, weights)?;
            if let (Some(us), Some(_)) = (&mut checked.multiply_us, &probe.x) {
                *us += started.elapsed().as_nanos() as f64 / 1e3;
            }
            checked.error = checked.error.max(probe.judge(target, T::DTYPE, self.in_place, route, &got)?);
        }
        Ok(checked)
    }
}

impl Probe {
    fn new<T: Scalar + Float>(
        index: usize,
        rows: Vec<usize>,
        x: Option<Vec<f64>>,
        target: &Target,
        base: &Buffer<T>,
    ) -> Result<Self, Failure> {
        let (slots, drift, before) = (Vec::new(), Vec::new(), Vec::new());
        let mut probe = Self { target: index, rows, x, base: Vec::new(), slots, drift, before, held: 0 };
        probe.base = probe.observe(target, base)?;
        probe.drift = vec![0.0; probe.base.len()];
        probe.before = probe.base.iter().map(|(_, magnitude)| *magnitude).collect();
        Ok(probe)
    }

    /// The values of what `buffer` holds for the target.
    fn observe<T: Scalar + Float>(&self, target: &Target, buffer: &Buffer<T>) -> Result<Vec<Value>, Failure> {
        let Some(x) = &self.x else {
            let mut values = Vec::new();
            for &row in &self.rows {
                values.extend(buffer.read(target.row(row))?.iter().map(|w| exact(*w)).map(|w| (w, w.abs())));
            }
            return Ok(values);
        };
        let dot = |&row: &usize| {
            let row = buffer.read(target.row(row))?;
            Ok(sum(row.iter().zip(x).map(|(w, x)| exact(*w) * x).map(|term| (term, term.abs()))))
        };
        self.rows.par_iter().map(dot).collect()
    }

    /// The same of B A, for every row that this probe looks at.
    fn product<T: Scalar + Float>(&self, target: &Target, pair: &Pair<T>) -> Result<Vec<Value>, Failure> {
        let (a, b) = (pair.a.read(0..pair.a.len())?, pair.b.read(0..pair.b.len())?);
        let a: Vec<f64> = a.iter().map(|a| exact(*a)).collect();
        let a_row = |i: usize| &a[i * padded::<T>(target.cols)..][..target.cols];
        let b_row = |row: usize| b[row * padded::<T>(pair.rank)..][..pair.rank].iter().map(|b| exact(*b));
        // [rank, columns] of values: A, or A x as a single column.
        let inner: Vec<Vec<Value>> = (0..pair.rank)
            .map(|i| match &self.x {
                None => a_row(i).iter().map(|a| (*a, a.abs())).collect(),
                Some(x) => vec![sum(a_row(i).iter().zip(x).map(|(a, x)| (a * x, (a * x).abs())))],
            })
            .collect();
        let columns = 0..if self.x.is_some() { 1 } else { target.cols };
        let value =
            |row: usize, column: usize| sum(b_row(row).zip(&inner).map(|(b, inner)| (b * inner[column].0, b.abs() * inner[column].1)));
        Ok(self.rows.iter().flat_map(|&row| columns.clone().map(move |column| (row, column))).map(|(r, c)| value(r, c)).collect())
    }

    /// Compares; returns the largest error as a fraction of what is allowed.
    fn judge(&mut self, target: &Target, dtype: DType, in_place: bool, route: &Route, got: &[Value]) -> Result<f64, Failure> {
        let terms: Vec<(f64, &[Value])> =
            (route.at(target)).map(|(slot, c)| (f64::from(c), self.slots[slot].as_deref().expect("a pair of rank > 0"))).collect();
        let new: usize = route.at(target).map(|(slot, _)| target.slots[slot].0 + 2).sum();
        let (unit, least) = rounding(dtype);
        // The products that are compared are themselves float64 sums over the columns.
        let sums = (new + self.held + 1) as f64 * SUMS + target.cols as f64 * f64::EPSILON;
        let mut worst = 0f64;
        for (i, &(value, magnitude)) in got.iter().enumerate() {
            let exact = self.base[i].0 + terms.iter().map(|(c, values)| c * values[i].0).sum::<f64>();
            let merged = terms.iter().map(|(c, values)| c.abs() * values[i].1).sum::<f64>();
            let step = sums * (self.before[i] + merged) + unit * magnitude + least * target.cols as f64;
            let (allowed, error) = (self.drift[i] + step, (value - exact).abs());
            if error.is_nan() || error > allowed {
                let what = self.describe(target, i);
                return Err(Failure::Run(format!(
                    "{what} is {value:e}, exactly {exact:e}: off by {error:.2e}, where {allowed:.2e} is allowed"
                )));
            }
            worst = worst.max(error / allowed);
            if in_place {
                (self.drift[i], self.before[i]) = (allowed, magnitude + merged);
            }
        }
        if in_place {
            self.held = new;
        }
        Ok(worst)
    }

    fn describe(&self, target: &Target, i: usize) -> String {
        match self.x {
            Some(_) => format!("{}: output {} of the product", target.name, self.rows[i]),
            None => format!("{}: W[{}, {}]", target.name, self.rows[i / target.cols], i % target.cols),
        }
    }
}

/// Unit roundoff, and half of the smallest step that there is.
fn rounding(dtype: DType) -> (f64, f64) {
    let (bits, least) = match dtype {
        DType::F16 => (11, -14),
        DType::Bf16 => (8, -126),
        _ => (24, -126),
    };
    (2f64.powi(-bits), 2f64.powi(least - bits))
}

fn exact<T: Float>(x: T) -> f64 {
    f64::from(x.to_f32())
}

fn sum(values: impl Iterator<Item = Value>) -> Value {
    values.fold((0.0, 0.0), |(value, magnitude), (v, m)| (value + v, magnitude + m))
}

/// Numbers in -1..1 that depend on the seed alone.
pub fn uniform(mut state: u64) -> impl Iterator<Item = f64> {
    std::iter::repeat_with(move || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}
