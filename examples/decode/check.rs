//! Is a token's product what the route says, and W after a switch? Answered after every token, in float64 and
//! without the crate.
//!
//! Outputs are compared with W_base x + sum of c B (A x): on the CPU all of them, on a GPU, where the host would
//! take too long, some of some projections. After a switch, so are some rows of W, element by element.
//!
//! How far a value may be off follows from how it is made: sums in f32, and one rounding to W's type where W is
//! switched.

use crate::Failure;
use crate::machine::{Buffer, Machine, Scalar};
use crate::model::{Choice, Pair, Target, padded};
use crate::products::input;
use lora_switch::{DType, Float, Form, Strategy};
use rayon::prelude::*;
use std::ops::Range;

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

pub struct Check {
    strategy: Strategy,
    in_place: bool,
    probes: Vec<Probe>,
}

/// Values of one target: some outputs for the input x, or without x the elements of some rows of W.
struct Probe {
    target: usize,
    rows: Vec<usize>,
    x: Option<Vec<f64>>,
    base: Vec<Value>,
    /// For each slot with a pair, what B A gives in place of W.
    slots: Vec<Option<Vec<Value>>>,
    /// How far what W makes of it may be off already: in place, every switch rounds W anew.
    drift: Vec<f64>,
    /// Magnitudes that enter the next switch besides those of the new route.
    before: Vec<f64>,
    /// How many f32 operations the terms that a next switch in place takes out need.
    held: usize,
}

impl Check {
    /// `base` holds every W_base.
    pub fn new<T: Scalar + Float>(
        machine: &Machine,
        targets: &[Target],
        groups: &[Range<usize>],
        base: &Buffer<T>,
        choice: Choice,
        seed: u64,
    ) -> Result<Self, Failure> {
        // A step of about an eighth that shares no factor with the 7 projections of a layer: samples of all
        // kinds and layers.
        let step = targets.len().div_ceil(SAMPLED_TARGETS);
        let step = if step > 1 && step.is_multiple_of(7) { step + 1 } else { step }.max(1);
        let all = machine.cuda.is_none();
        let mut probes = Vec::new();
        for (index, target) in targets.iter().enumerate() {
            let random = uniform(!seed ^ index as u64).map(|u| ((u + 1.0) / 2.0 * target.rows as f64) as usize);
            let mut rows: Vec<usize> = [0, target.rows - 1].into_iter().chain(random).take(SAMPLED_ROWS).collect();
            rows.sort_unstable();
            rows.dedup();
            let is_sampled = index.is_multiple_of(step);
            if is_sampled && choice.strategy == Strategy::Switch {
                probes.push(Probe::new(index, rows.clone(), None, target, base)?);
            }
            if is_sampled || all {
                let group = groups.iter().find(|group| group.contains(&index)).expect("every target is in a group");
                let x = input::<T>(seed, group, target.cols).into_iter().map(exact).collect();
                let rows = if all { (0..target.rows).collect() } else { rows };
                probes.push(Probe::new(index, rows, Some(x), target, base)?);
            }
        }
        Ok(Self { strategy: choice.strategy, in_place: choice.form == Form::InPlace, probes })
    }

    /// The next slot's pair for a target, if there is one.
    pub fn learn<T: Scalar + Float>(&mut self, index: usize, target: &Target, pair: Option<&Pair<T>>) -> Result<(), Failure> {
        for probe in self.probes.iter_mut().filter(|probe| probe.target == index) {
            let values = pair.map(|pair| probe.product(target, pair)).transpose()?;
            probe.slots.push(values);
        }
        Ok(())
    }

    /// After a token with `route`, when the stream's work is done. Returns the largest error, as a fraction of
    /// what is allowed.
    pub fn verify<T: Scalar + Float>(
        &mut self,
        targets: &[Target],
        weights: &Buffer<T>,
        y: &Buffer<f32>,
        route: &Route,
    ) -> Result<f64, Failure> {
        let mut worst = 0f64;
        for probe in &mut self.probes {
            let target = &targets[probe.target];
            let got = match &probe.x {
                None => probe.observe(target, weights)?.into_iter().map(|(value, _)| value).collect(),
                Some(_) => {
                    let y = y.read(target.y..target.y + target.rows)?;
                    probe.rows.iter().map(|row| exact(y[*row])).collect::<Vec<f64>>()
                }
            };
            let is_merged = self.strategy == Strategy::Switch;
            worst = worst.max(probe.judge(target, T::DTYPE, is_merged, self.in_place, route, &got)?);
        }
        Ok(worst)
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
    fn judge(
        &mut self,
        target: &Target,
        dtype: DType,
        is_merged: bool,
        in_place: bool,
        route: &Route,
        got: &[f64],
    ) -> Result<f64, Failure> {
        let terms: Vec<(f64, &[Value])> =
            (route.at(target)).map(|(slot, c)| (f64::from(c), self.slots[slot].as_deref().expect("a pair of rank > 0"))).collect();
        let new: usize = route.at(target).map(|(slot, _)| target.slots[slot].0 + 2).sum();
        let (unit, least) = rounding(dtype);
        // The products that are compared with are themselves float64 sums over the columns.
        let sums = (new + self.held + 1) as f64 * SUMS + target.cols as f64 * f64::EPSILON;
        // W x, A x and B (A x), each a sum in f32.
        let product = if self.x.is_some() { (target.cols + 2 * new + 4) as f64 * SUMS } else { 0.0 };
        let mut worst = 0f64;
        for (i, &value) in got.iter().enumerate() {
            let exact = self.base[i].0 + terms.iter().map(|(c, values)| c * values[i].0).sum::<f64>();
            let merged = terms.iter().map(|(c, values)| c.abs() * values[i].1).sum::<f64>();
            let magnitude = self.base[i].1 + merged + self.drift[i];
            // A switch's sums and its rounding of W; weights that are left alone are exact.
            let step = sums * (self.before[i] + merged) + unit * magnitude + least * target.cols as f64;
            let of_w = if is_merged { self.drift[i] + step } else { 0.0 };
            let (allowed, error) = (of_w + product * magnitude, (value - exact).abs());
            if error.is_nan() || error > allowed {
                let what = self.describe(target, i);
                return Err(Failure::Run(format!(
                    "{what} is {value:e}, exactly {exact:e}: off by {error:.2e}, where {allowed:.2e} is allowed"
                )));
            }
            worst = worst.max(error / allowed);
            if is_merged && in_place {
                (self.drift[i], self.before[i]) = (of_w, magnitude + merged);
            }
        }
        if is_merged && in_place {
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
