//! Results against float64: a few rows and columns of a few targets, by the oracle of the tests.

use crate::lab::{Buffer, Lab, Result};
use crate::model::Model;
use crate::oracle::{self, Exact, Term};
use crate::values::Rng;
use lora_switch::{DType, Form};

/// Rows and columns of one target; where they cross is looked at.
pub struct Sample {
    target: usize,
    rows: Vec<u64>,
    cols: Vec<u64>,
}

impl Sample {
    /// The corners and whatever else the dice choose.
    pub fn new(model: &Model, target: usize, rows: usize, cols: usize, rng: &mut Rng) -> Self {
        let (out, width) = model.spec.shapes[target];
        let mut pick = |size: u64, count: usize| {
            let inner = (2..count).map(|_| rng.below(size as usize) as u64);
            [0, size - 1].into_iter().chain(inner).collect()
        };
        Self { target, rows: pick(out, rows), cols: pick(width, cols) }
    }

    /// Of W or of the base.
    pub fn weights(&self, lab: &Lab, model: &Model, buffer: &Buffer) -> Result<Exact> {
        let (start, width) = (model.starts[self.target], model.spec.shapes[self.target].1);
        let mut bits = Vec::new();
        for row in &self.rows {
            let all = lab.download(buffer, start + row * width, width)?;
            bits.extend(self.cols.iter().map(|&col| all[col as usize]));
        }
        Ok(Exact::new(buffer.dtype, self.rows.len(), self.cols.len(), &bits))
    }

    /// The chosen columns of A and rows of B.
    fn adapter(&self, lab: &Lab, model: &Model, slot: u64) -> Result<(Exact, Exact)> {
        let (out, width) = model.spec.shapes[self.target];
        let place = model.places[slot as usize][self.target];
        let all = lab.download(&model.a, place.a, place.rank * width)?;
        let pick = |row: u64| self.cols.iter().map(move |col| row * width + col);
        let a: Vec<u32> = (0..place.rank).flat_map(pick).map(|at| all[at as usize]).collect();
        let all = lab.download(&model.b, place.b, out * place.b_stride)?;
        let pick = |row: u64| (0..place.rank).map(move |k| row * place.b_stride + k);
        let b: Vec<u32> = self.rows.iter().flat_map(|row| pick(*row)).map(|at| all[at as usize]).collect();
        let (dtype, rank) = (model.spec.dtype, place.rank as usize);
        Ok((Exact::new(dtype, rank, self.cols.len(), &a), Exact::new(dtype, self.rows.len(), rank, &b)))
    }

    /// `base` + the terms of the switch to a route: exact values, and bounds before the final rounding.
    pub fn merged(&self, lab: &Lab, model: &Model, base: &Exact, to: usize) -> Result<(Exact, Vec<f64>)> {
        let mut adapters = Vec::new();
        for (slot, coefficient) in model.spec.terms(to) {
            let (a, b) = self.adapter(lab, model, slot)?;
            adapters.push((a, b, coefficient));
        }
        let term = |(a, b, coefficient)| Term { a, b, coefficient };
        let terms: Vec<Term<'_>> = adapters.iter().map(|(a, b, c)| term((a, b, *c))).collect();
        Ok(oracle::merge(base, &terms))
    }
}

/// Switches to the first route and from it to the second, and compares. In place, what W held in between is
/// the base: so the bound is that of one switch, and errors of those before it do not count.
pub fn switch(lab: &Lab, model: &mut Model) -> Result<bool> {
    let (mut rng, count) = (Rng(7), model.spec.shapes.len());
    let chosen = (0..count.min(20)).map(|i| i * (count - 1) / (count.min(20) - 1).max(1));
    let samples: Vec<Sample> = chosen.map(|target| Sample::new(model, target, 8, 8, &mut rng)).collect();
    model.invalidate()?;
    model.to(0)?;
    let before = bases(lab, model, &samples)?;
    model.to(1)?;
    let mut good = !model.anything_odd()?;
    for (sample, base) in samples.iter().zip(&before) {
        let (exact, mut bounds) = sample.merged(lab, model, base, 1)?;
        if model.spec.form == Form::InPlace {
            // Each coefficient is the rounded difference of two: one more rounding a term.
            bounds.iter_mut().for_each(|bound| *bound *= 2.0);
        }
        let got = sample.weights(lab, model, &model.weight)?;
        good &= is_close(model.spec.dtype, &got, &exact, &bounds, sample.target);
    }
    Ok(good)
}

fn bases(lab: &Lab, model: &Model, samples: &[Sample]) -> Result<Vec<Exact>> {
    let base = model.base.as_ref().unwrap_or(&model.weight);
    samples.iter().map(|sample| sample.weights(lab, model, base)).collect()
}

/// Within the bound and one rounding; says what is wrong.
fn is_close(dtype: DType, got: &Exact, exact: &Exact, bounds: &[f64], target: usize) -> bool {
    for (i, ((got, exact), bound)) in got.x.iter().zip(&exact.x).zip(bounds).enumerate() {
        let allowed = bound + oracle::half_ulp(dtype, exact.abs() + bound);
        let off = (got - exact).abs();
        if off.is_nan() || off > allowed {
            println!("target {target}, sample {i}: {got}, exactly {exact}: off by {off:e} of {allowed:e}");
            return false;
        }
    }
    true
}
