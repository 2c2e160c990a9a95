//! Memory and a clock, to calibrate the CPU.

use super::Pool;
use crate::error::Result;
use crate::stream::{Stream, StreamKind};
use std::cell::UnsafeCell;
use std::sync::Arc;
use std::time::Instant;

/// The median of so many, behind one that warms up.
const REPETITIONS: usize = 5;

pub(crate) struct Bench {
    pub stream: Stream,
    /// Cells, since calls write it by address.
    memory: Vec<UnsafeCell<u128>>,
}

impl Bench {
    pub const BYTES: u64 = 64 << 20;

    pub fn new(pool: &Arc<Pool>) -> Result<Self> {
        let cells = Self::BYTES as usize / 16 + 1;
        Ok(Self { stream: Stream(StreamKind::Cpu(pool.clone())), memory: (0..cells).map(|_| UnsafeCell::new(0)).collect() })
    }

    pub fn addr(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Microseconds.
    pub fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        let mut times = [0.0; REPETITIONS];
        for us in &mut times {
            let start = Instant::now();
            work()?;
            *us = start.elapsed().as_secs_f64() * 1e6;
        }
        times.sort_by(f64::total_cmp);
        Ok(times[REPETITIONS / 2])
    }
}
