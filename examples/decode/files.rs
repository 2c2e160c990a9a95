//! A base model and adapters from files.

use crate::Failure;
use crate::machine::{Buffer, Machine, Scalar};
use crate::model::{Pair, Projection, Target, padded};
use crate::peft::{self, BaseModel, Dtype, Matrix};
use indicatif::{ProgressBar, ProgressStyle};
use lora_switch::{DType, Float};
use std::path::Path;

pub struct Files {
    base: BaseModel,
    adapters: Vec<peft::Adapter>,
    /// The base weights that at least one adapter adapts.
    weights: Vec<peft::Weight>,
    quiet: bool,
}

impl Files {
    /// Reads the adapters whole, and of the base its headers.
    pub fn open(model: &Path, adapters: &Path, quiet: bool) -> Result<Self, Failure> {
        let base = BaseModel::open(model)?;
        let adapters = peft::load_adapters(adapters, &base)?;
        let is_adapted = |weight: &peft::Weight| adapters.iter().any(|adapter| adapter.modules.contains_key(weight.module()));
        let weights: Vec<peft::Weight> = base.weights().into_iter().filter(is_adapted).collect();
        if let Some(empty) = weights.iter().find(|weight| weight.bytes() == 0) {
            return Err(Failure::Run(format!("{}: {} is empty", base.path().display(), empty.name)));
        }
        Ok(Self { base, adapters, weights, quiet })
    }

    pub fn dtype(&self) -> DType {
        dtype(self.weights[0].dtype)
    }

    pub fn projections(&self) -> Vec<Projection> {
        let projection = |w: &peft::Weight| Projection { name: w.module().into(), rows: w.rows, cols: w.cols };
        self.weights.iter().map(projection).collect()
    }

    pub fn adapters(&self) -> Vec<String> {
        self.adapters.iter().map(|adapter| adapter.name.clone()).collect()
    }

    /// What is not of the type that W, A and B shall all have, and so is converted once, here.
    pub fn converted(&self, to: DType) -> Vec<String> {
        let differs = |matrix: &Matrix| dtype(matrix.dtype) != to;
        let adapter = |a: &&peft::Adapter| a.modules.values().any(|f| differs(&f.a) || differs(&f.b));
        let base = self.weights.iter().any(|w| dtype(w.dtype) != to).then(|| "the base".to_string());
        base.into_iter().chain(self.adapters.iter().filter(adapter).map(|a| a.name.clone())).collect()
    }

    /// Writes each weight to its place.
    pub fn fill<T: Scalar + Float>(&self, targets: &[Target], buffer: &mut Buffer<T>) -> Result<(), Failure> {
        let bar = self.progress(self.weights.iter().map(peft::Weight::bytes).sum());
        for (weight, target) in self.weights.iter().zip(targets) {
            buffer.write(target.start, &convert::<T>(&self.base.load(&weight.name)?, &weight.name)?)?;
            bar.inc(weight.bytes());
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// On stderr, and only where that is a terminal.
    fn progress(&self, bytes: u64) -> ProgressBar {
        let bar = if self.quiet { ProgressBar::hidden() } else { ProgressBar::new(bytes) };
        let style = "loading {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        bar.with_style(ProgressStyle::with_template(style).expect("a valid template"))
    }

    /// 0 where the adapter has no pair.
    pub fn rank(&self, target: usize, slot: usize) -> usize {
        self.adapters[slot].modules.get(self.weights[target].module()).map_or(0, |factor| factor.rank)
    }

    pub fn pair<T: Scalar + Float>(&self, machine: &Machine, target: usize, slot: usize) -> Result<Option<Pair<T>>, Failure> {
        let (adapter, module) = (&self.adapters[slot], self.weights[target].module());
        let Some(factor) = adapter.modules.get(module) else { return Ok(None) };
        let name = |part| format!("{}: {module}.{part}", adapter.name);
        Ok(Some(Pair {
            a: upload(machine, &factor.a, &name("lora_A"))?,
            b: upload(machine, &factor.b, &name("lora_B"))?,
            rank: factor.rank,
            scale: factor.scale,
        }))
    }
}

/// A matrix in the machine's memory, its rows padded.
fn upload<T: Scalar + Float>(machine: &Machine, matrix: &Matrix, name: &str) -> Result<Buffer<T>, Failure> {
    let (values, stride) = (convert::<T>(matrix, name)?, padded::<T>(matrix.cols));
    let mut rows = vec![T::default(); matrix.rows * stride];
    for (to, from) in rows.chunks_exact_mut(stride).zip(values.chunks_exact(matrix.cols)) {
        to[..matrix.cols].copy_from_slice(from);
    }
    let mut buffer = machine.zeros(rows.len())?;
    buffer.write(0, &rows)?;
    Ok(buffer)
}

fn convert<T: Scalar + Float>(matrix: &Matrix, name: &str) -> Result<Vec<T>, Failure> {
    let values = matrix.to_f32();
    let converted: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
    match converted.iter().position(|value| !value.to_f32().is_finite()) {
        None => Ok(converted),
        Some(at) => {
            let (row, col, dtype) = (at / matrix.cols, at % matrix.cols, T::DTYPE);
            Err(Failure::Run(format!("{name}: [{row}, {col}] is {}, which is not finite in {dtype}", values[at])))
        }
    }
}

fn dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 => DType::Bf16,
    }
}
