//! A model's shape without the model: random data, made where it is used.

use crate::Failure;
use crate::machine::{Buffer, Machine, Scalar};
use crate::model::{Pair, Projection, padded};
use lora_switch::{Stream, measure};

const HIDDEN: usize = 4096;
const FFN: usize = 11008;

/// The projections of a Llama-2-7B decoder layer: name, outputs, inputs.
const LAYER: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HIDDEN, HIDDEN),
    ("self_attn.k_proj", HIDDEN, HIDDEN),
    ("self_attn.v_proj", HIDDEN, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HIDDEN),
    ("mlp.gate_proj", FFN, HIDDEN),
    ("mlp.up_proj", FFN, HIDDEN),
    ("mlp.down_proj", HIDDEN, FFN),
];

// Sizes of the elements: an adapter's change is then about half as large as the weight.
const WEIGHT: f32 = 0.02;
const A: f32 = 0.05;
const B: f32 = 0.1;
const SCALE: f32 = 2.0;

pub struct Shape {
    pub layers: usize,
    pub rank: usize,
    pub experts: usize,
    pub seed: u64,
}

impl Shape {
    pub fn projections(&self) -> Vec<Projection> {
        let layer = |i: usize| LAYER.map(|(name, rows, cols)| Projection { name: format!("model.layers.{i}.{name}"), rows, cols });
        (0..self.layers).flat_map(layer).collect()
    }

    pub fn adapters(&self) -> Vec<String> {
        (0..self.experts).map(|i| format!("random-{i}")).collect()
    }

    pub fn fill<T: Scalar>(&self, stream: &Stream, buffer: &mut Buffer<T>) -> Result<(), Failure> {
        Ok(measure::fill_random(stream, self.seed, WEIGHT, &mut buffer.vector_mut(stream)?)?)
    }

    pub fn pair<T: Scalar>(&self, machine: &Machine, target: usize, slot: usize) -> Result<Option<Pair<T>>, Failure> {
        let (_, rows, cols) = LAYER[target % LAYER.len()];
        // Element i of a vector comes from seed + i: 2^36 apart, no two vectors share any.
        let number = 2 * (slot * self.layers * LAYER.len() + target) as u64 + 1;
        let random = |number: u64, size: f32, rows: usize, cols: usize| -> Result<Buffer<T>, Failure> {
            let mut buffer = machine.zeros(rows * padded::<T>(cols))?;
            let seed = self.seed.wrapping_add(number << 36);
            measure::fill_random(&machine.stream, seed, size, &mut buffer.vector_mut(&machine.stream)?)?;
            Ok(buffer)
        };
        let (a, b) = (random(number, A, self.rank, cols)?, random(number + 1, B, rows, self.rank)?);
        Ok(Some(Pair { a, b, rank: self.rank, scale: SCALE }))
    }
}
