//! Where a token's logits come from.

use crate::Failure;
use crate::check::uniform;
use crate::machine::{Buffer, Machine};
use crate::model::Target;
use crate::peft::BaseModel;
use lora_switch::measure;
use std::path::Path;

pub enum Router {
    /// Random logits, made on the device.
    Random { seed: u64 },
    /// gate.weight [adapters, hidden] times the token's hidden state, which is random.
    Gate { seed: u64, weight: Vec<f32>, hidden: usize },
}

impl Router {
    pub fn open(gate: Option<&Path>, seed: u64, slots: usize, targets: &[Target]) -> Result<Self, Failure> {
        let Some(path) = gate else { return Ok(Self::Random { seed }) };
        let weight = BaseModel::open(path)?.load("gate.weight")?;
        let (rows, cols) = (weight.rows, weight.cols);
        let wrong = |why: String| Err(Failure::Run(format!("{}: gate.weight is [{rows}, {cols}]; {why}", path.display())));
        if rows != slots {
            return wrong(format!("it must have {slots} rows, one an adapter"));
        }
        if targets.iter().all(|target| target.cols != cols) {
            return wrong("no adapted projection has as many inputs as it has columns".into());
        }
        Ok(Self::Gate { seed, weight: weight.to_f32(), hidden: cols })
    }

    /// Writes a token's logits to where the router kernel reads them.
    pub fn logits(&self, machine: &Machine, token: u64, to: &mut Buffer<f32>) -> Result<(), Failure> {
        match self {
            // Element i comes from seed + i.
            Self::Random { seed } => {
                let seed = seed.wrapping_add(token << 32);
                Ok(measure::fill_random(&machine.stream, seed, 4.0, &mut to.vector_mut(&machine.stream)?)?)
            }
            Self::Gate { seed, weight, hidden } => {
                let state: Vec<f64> = uniform(seed.wrapping_add(token << 32)).take(*hidden).collect();
                let dot = |row: &[f32]| row.iter().zip(&state).map(|(w, h)| f64::from(*w) * h).sum::<f64>() as f32;
                to.write(0, &weight.chunks_exact(*hidden).map(dot).collect::<Vec<f32>>())
            }
        }
    }
}
