//! The CPU backend: plain Rust on checked plans. Calls return when the work is done.

pub(crate) mod apply;
pub(crate) mod calibrate;
pub(crate) mod gate;
pub(crate) mod linear;
pub(crate) mod measure;
pub(crate) mod permute;
pub(crate) mod route;
pub(crate) mod switch;

use crate::error::{Error, Result};
use crate::stream::Odd;
use std::sync::atomic::{AtomicU32, Ordering};

/// The threads that large loops use, and what was odd in the values they met.
#[derive(Debug)]
pub(crate) struct Pool {
    /// None: the calling thread alone.
    threads: Option<rayon::ThreadPool>,
    odd: AtomicU32,
}

impl Pool {
    pub fn new(threads: usize) -> Result<Self> {
        let pool = || {
            let built = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            built.map_err(|e| Error::argument("threads", threads, format!("a number of threads that can be started ({e})")))
        };
        let threads = if threads == 1 { None } else { Some(pool()?) };
        Ok(Self { threads, odd: AtomicU32::new(0) })
    }

    /// Calls `f` for every index below `count`; in parallel where there are threads.
    pub fn for_each(&self, count: u64, f: impl Fn(u64) + Send + Sync) {
        use rayon::prelude::*;
        match &self.threads {
            Some(pool) => pool.install(|| (0..count).into_par_iter().for_each(f)),
            None => (0..count).for_each(f),
        }
    }

    pub fn report(&self, odd: Odd) {
        self.odd.fetch_or(odd.0, Ordering::Relaxed);
    }

    pub fn take_odd(&self) -> Odd {
        Odd(self.odd.swap(0, Ordering::Relaxed))
    }
}
