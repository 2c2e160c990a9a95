//! Elements as bits and as numbers, and data that depends on a seed alone. Shared with benches/.

use half::{bf16, f16};
use lora_switch::DType;

pub fn encode(dtype: DType, x: f64) -> u32 {
    match dtype {
        DType::F32 => (x as f32).to_bits(),
        DType::F16 => u32::from(f16::from_f64(x).to_bits()),
        DType::Bf16 => u32::from(bf16::from_f64(x).to_bits()),
        DType::I32 => x as i32 as u32,
        _ => u32::from(x as u8),
    }
}

pub fn decode(dtype: DType, bits: u32) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::from_bits(bits)),
        DType::F16 => f16::from_bits(bits as u16).to_f64(),
        DType::Bf16 => bf16::from_bits(bits as u16).to_f64(),
        DType::I32 => f64::from(bits as i32),
        _ => f64::from(bits as u8),
    }
}

/// splitmix64: data that depends on a seed alone.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// In -1..1.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
    /// Random values of a dtype, as bits.
    pub fn bits(&mut self, dtype: DType, n: usize, size: f64) -> Vec<u32> {
        (0..n).map(|_| encode(dtype, size * self.uniform())).collect()
    }
}
