//! Floors and random data on the CPU.

use super::Pool;
use crate::dtype::{DType, Float, with_float};
use crate::measure::{Plan, RUN_BYTES, ReadPlan, RunsPlan};
use crate::view::RawMat;
use std::sync::atomic::{AtomicU32, Ordering};

/// Elements that one task takes.
const CHUNK: u64 = 1 << 16;

pub(crate) fn scale(pool: &Pool, plan: &Plan) {
    with_float!(plan.y.dtype, scale_as::<_>(pool, plan));
}

pub(crate) fn fill(pool: &Pool, plan: &Plan) {
    with_float!(plan.y.dtype, fill_as::<_>(pool, plan));
}

/// The vector as rows of CHUNK elements and the rest as one more.
fn chunk(vector: &RawMat, index: u64) -> RawMat {
    let start = index * CHUNK;
    RawMat { addr: vector.addr + start * vector.dtype.size(), cols: CHUNK.min(vector.cols - start), ..*vector }
}

fn scale_as<T: Float>(pool: &Pool, plan: &Plan) {
    pool.for_each(plan.y.cols.div_ceil(CHUNK), |index| {
        let (x, y) = (chunk(&plan.x, index), chunk(&plan.y, index));
        if x.addr == y.addr {
            // SAFETY: checked host memory, borrowed by the call; this iteration alone touches the chunk.
            unsafe { y.row_mut::<T>(0) }.iter_mut().for_each(|y| *y = T::from_f32(plan.factor * y.to_f32()));
        } else {
            // SAFETY: as above, and x and y are disjoint.
            let (x, y) = unsafe { (x.row::<T>(0), y.row_mut::<T>(0)) };
            y.iter_mut().zip(x).for_each(|(y, x)| *y = T::from_f32(plan.factor * x.to_f32()));
        }
    });
}

fn splitmix64(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fill_as<T: Float>(pool: &Pool, plan: &Plan) {
    pool.for_each(plan.y.cols.div_ceil(CHUNK), |index| {
        let start = plan.seed.wrapping_add(index * CHUNK);
        // SAFETY: checked host memory, borrowed by the call; this iteration alone touches the chunk.
        for (i, y) in unsafe { chunk(&plan.y, index).row_mut::<T>(0) }.iter_mut().enumerate() {
            // 24 bits, centred: every value is exact in f32.
            let unit = (splitmix64(start.wrapping_add(i as u64)) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            *y = T::from_f32(plan.factor * unit);
        }
    });
}

pub(crate) fn read(pool: &Pool, plan: &ReadPlan) {
    let bytes = RawMat { dtype: DType::U8, cols: plan.bytes, stride: plan.bytes, ..plan.x };
    let sum = AtomicU32::new(0);
    pool.for_each(plan.bytes.div_ceil(CHUNK), |index| {
        // SAFETY: checked host memory, borrowed by the call for reading.
        let bytes = unsafe { chunk(&bytes, index).row::<u8>(0) };
        let word = |part: &[u8]| part.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
        sum.fetch_xor(bytes.chunks(4).fold(0, |sum, part| sum ^ word(part)), Ordering::Relaxed);
    });
    // SAFETY: checked host memory, borrowed by the call for writing.
    let sink: &mut i32 = unsafe { &mut plan.sink.row_mut(0)[0] };
    *sink ^= sum.into_inner() as i32;
}

/// A run of a vector, as bytes.
fn run(vector: &RawMat, index: u64) -> RawMat {
    RawMat { addr: vector.addr + index * RUN_BYTES, dtype: DType::U8, cols: RUN_BYTES, ..*vector }
}

pub(crate) fn repeat(pool: &Pool, plan: &RunsPlan) {
    let times = u64::from(plan.times);
    pool.for_each(plan.runs * times, |index| {
        let (x, y) = (run(&plan.x, index / times), run(&plan.y, index));
        // SAFETY: checked host memory, borrowed by the call; x and y are disjoint, and this iteration alone touches the run of y.
        unsafe { y.row_mut::<u8>(0).copy_from_slice(x.row(0)) };
    });
}

pub(crate) fn fold(pool: &Pool, plan: &RunsPlan) {
    let times = u64::from(plan.times);
    pool.for_each(plan.runs, |index| {
        // SAFETY: as above.
        let y = unsafe { run(&plan.y, index).row_mut::<u8>(0) };
        y.fill(0);
        for part in index * times..(index + 1) * times {
            // SAFETY: as above.
            y.iter_mut().zip(unsafe { run(&plan.x, part).row::<u8>(0) }).for_each(|(y, x)| *y ^= x);
        }
    });
}
