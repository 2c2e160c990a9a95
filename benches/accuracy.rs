//! Two tables on numbers instead of time: how far one switch is from the exact result, and what many leave
//! behind.

use crate::check::Sample;
use crate::lab::{Lab, Result};
use crate::model::{Model, Route, Spec};
use crate::oracle;
use crate::record::{COMMIT, Recorder};
use crate::values::{Rng, decode};
use lora_switch::{DType, Form};
use serde::Serialize;

/// Upper ends of the bins, in units in the last place; 0.5 is what rounding alone costs.
const BINS: [f64; 4] = [0.5, 0.51, 0.6, 1.0];

#[derive(Serialize)]
struct UlpLine<'l> {
    accuracy: &'static str,
    rank: u64,
    samples: usize,
    /// Errors up to 0.5, 0.51, 0.6, 1, and above.
    bins: [usize; BINS.len() + 1],
    max_ulp: f64,
    gpu: &'l str,
    commit: &'static str,
}

/// From base, bf16, k = 2: the errors of sampled elements against float64.
pub fn ulp(lab: &Lab, recorder: &mut Recorder, quick: bool) -> Result<()> {
    println!("\n| rank | samples | <= 0.5 ulp | <= 0.51 | <= 0.6 | <= 1 | > 1 | max |");
    println!("|{}", "---|".repeat(8));
    for rank in [8, 16, 32, 64, 128] {
        let errors = errors(lab, rank, if quick { 16 } else { 128 })?;
        let bin = |error: &f64| BINS.iter().position(|end| error <= end).unwrap_or(BINS.len());
        let mut bins = [0; BINS.len() + 1];
        errors.iter().for_each(|error| bins[bin(error)] += 1);
        let max_ulp = errors.iter().copied().fold(0.0, f64::max);
        let cells: Vec<String> = bins.iter().map(usize::to_string).collect();
        println!("| {rank} | {} | {} | {max_ulp:.4} |", errors.len(), cells.join(" | "));
        let (gpu, samples) = (&lab.gpu, errors.len());
        recorder.line(&UlpLine { accuracy: "ulp", rank, samples, bins, max_ulp, gpu, commit: COMMIT })?;
    }
    Ok(())
}

fn errors(lab: &Lab, rank: u64, side: usize) -> Result<Vec<f64>> {
    let spec = Spec { slots: 2, ranks: vec![rank], ..square(DType::Bf16, Form::FromBase, 4096, 4) };
    let mut model = Model::new(lab, &spec)?;
    model.to(1)?;
    let base = model.base.as_ref().expect("from base");
    let (mut rng, mut errors) = (Rng(9), Vec::new());
    for target in 0..spec.shapes.len() {
        let sample = Sample::new(&model, target, side, side, &mut rng);
        let (exact, _) = sample.merged(lab, &model, &sample.weights(lab, &model, base)?, 1)?;
        let got = sample.weights(lab, &model, &model.weight)?;
        let error = |(got, exact): (&f64, &f64)| (got - exact).abs() / (2.0 * oracle::half_ulp(DType::Bf16, *exact));
        errors.extend(got.x.iter().zip(&exact.x).map(error));
    }
    Ok(errors)
}

/// Square targets, one set. The routes are to nothing and to two experts.
fn square(dtype: DType, form: Form, side: u64, targets: usize) -> Spec {
    let routes = [Route::new(&[-1, -1], &[0.0, 0.0]), Route::new(&[0, 1], &[0.6, 0.4])];
    let shapes = vec![(side, side); targets];
    Spec { dtype, form, shapes, ranks: vec![16], slots: 8, routes, set_each: false, portable: false }
}

#[derive(Serialize)]
struct DriftLine<'l> {
    accuracy: &'static str,
    form: &'static str,
    dtype: String,
    switches: usize,
    /// Of the deviation from the base, relative to the root mean square of the weight.
    max: f64,
    rms: f64,
    gpu: &'l str,
    commit: &'static str,
}

/// What is left in a 1024 x 1024 weight after N switches between random routes (r = 16, k = 2 of 8) and an
/// unmerge. From base it must be nothing: false if it is not.
pub fn drift(lab: &Lab, recorder: &mut Recorder, quick: bool) -> Result<bool> {
    let counts = if quick { &[1, 100][..] } else { &[1, 100, 1_000, 10_000] };
    println!("\nDeviation from the base after N switches and an unmerge, relative to the weight's rms: max / rms\n");
    println!("| form, dtype | {} |", counts.iter().map(|n| format!("N = {n}")).collect::<Vec<_>>().join(" | "));
    println!("|---|{}", "---|".repeat(counts.len()));
    let mut good = true;
    for (name, form) in [("in place", Form::InPlace), ("from base", Form::FromBase)] {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let mut cells = Vec::new();
            for &switches in counts {
                let (max, rms) = deviation(lab, dtype, form, switches)?;
                good &= form == Form::InPlace || max == 0.0;
                cells.push(format!("{max:.2e} / {rms:.2e}"));
                let (accuracy, gpu, dtype) = ("drift", &lab.gpu, dtype.to_string());
                recorder.line(&DriftLine { accuracy, form: name, dtype, switches, max, rms, gpu, commit: COMMIT })?;
            }
            println!("| {name} {dtype} | {} |", cells.join(" | "));
        }
    }
    Ok(good)
}

/// Its maximum and its root mean square. Infinite if an element differs in bits but not in value (-0.0).
fn deviation(lab: &Lab, dtype: DType, form: Form, switches: usize) -> Result<(f64, f64)> {
    let mut model = Model::new(lab, &square(dtype, form, 1024, 1))?;
    let len = model.weight.len;
    let before = lab.download(model.base.as_ref().unwrap_or(&model.weight), 0, len)?;
    let (ids, gates) = random_routes(switches);
    let (ids, gates) = (lab.upload(DType::I32, &ids)?, lab.upload(DType::F32, &gates)?);
    for i in 0..switches as u64 {
        model.set_route(&ids.part(2 * i, 2), &gates.part(2 * i, 2))?;
    }
    model.unmerge()?;
    let after = lab.download(&model.weight, 0, len)?;
    if form == Form::FromBase {
        return Ok(if before == after { (0.0, 0.0) } else { (f64::INFINITY, f64::INFINITY) });
    }
    let values = |bits: &[u32]| bits.iter().map(|&bits| decode(dtype, bits)).collect::<Vec<f64>>();
    let (before, after) = (values(&before), values(&after));
    let rms = |values: &mut dyn Iterator<Item = f64>| (values.map(|x| x * x).sum::<f64>() / len as f64).sqrt();
    let size = rms(&mut before.iter().copied());
    let off = || after.iter().zip(&before).map(|(after, before)| (after - before).abs());
    Ok((off().fold(0.0, f64::max) / size, rms(&mut off()) / size))
}

/// Two distinct slots of 8 each, with gates that sum to 1.
fn random_routes(count: usize) -> (Vec<i32>, Vec<f32>) {
    let mut rng = Rng(13);
    let (mut ids, mut gates) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let first = rng.below(8);
        ids.extend([first as i32, ((first + 1 + rng.below(7)) % 8) as i32]);
        let gate = rng.below(1 << 20) as f32 / (1 << 20) as f32;
        gates.extend([gate, 1.0 - gate]);
    }
    (ids, gates)
}
