//! What the machine allows: the floors that operations are measured against, and random data made where it is used.
//!
//! A switch must read and write every weight once. [`scale`] does just that, as fast as a kernel without an adapter can, so the ratio of
//! the two on the same bytes in the same run is what the adapters cost. [`repeat`] and [`fold`] are that for `gather` and `combine`.

use crate::check::{Checked, Named};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};

/// A checked call over one dense run of elements.
pub(crate) struct Plan {
    pub x: RawMat,
    pub y: RawMat,
    pub factor: f32,
    pub seed: u64,
}

/// A checked repeat or fold: runs of the shorter side, and how many of the longer one there are for each.
pub(crate) struct RunsPlan {
    pub x: RawMat,
    pub y: RawMat,
    pub runs: u64,
    pub times: u32,
}

/// A checked read.
pub(crate) struct ReadPlan {
    pub x: RawMat,
    pub bytes: u64,
    pub sink: RawMat,
}

/// y = factor * x, for vectors [1, n] of f32, f16 or bf16, the same for both. One launch; addresses must be multiples of 16.
///
/// # Errors
/// On shapes, dtypes, alignment, places and overlaps that break the above.
pub fn scale(stream: &Stream, factor: f32, x: &Mat<'_>, y: &mut MatMut<'_>) -> Result<()> {
    let x = vector(stream, x.raw.expect("x"))?;
    let y = vector(stream, y.raw.expect("y"))?.dtype_in(&[x.mat.dtype])?.cols(x.mat.cols, "n, x.cols")?;
    y.disjoint_from(&[x])?;
    run_scale(stream, &Plan { x: x.mat, y: y.mat, factor, seed: 0 })
}

/// y = factor * y. As [`scale`].
///
/// # Errors
/// As for [`scale`].
pub fn scale_in_place(stream: &Stream, factor: f32, y: &mut MatMut<'_>) -> Result<()> {
    let y = vector(stream, y.raw.expect("y"))?;
    run_scale(stream, &Plan { x: y.mat, y: y.mat, factor, seed: 0 })
}

/// Fills a vector with `size` * uniform(-1, 1): element i depends on the seed and i alone, and is the same on both backends.
///
/// # Errors
/// As for [`scale`].
pub fn fill_random(stream: &Stream, seed: u64, size: f32, y: &mut MatMut<'_>) -> Result<()> {
    let y = vector(stream, y.raw.expect("y"))?;
    let plan = Plan { x: y.mat, y: y.mat, factor: size, seed };
    match &stream.0 {
        _ if plan.y.is_empty() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::measure::fill(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::measure::fill(stream, &plan),
    }
}

/// Reads a vector [1, n] of f32, f16 or bf16 once, as a pass over a model's weights does: sink ^= the xor of its bytes taken as
/// little-endian 32-bit words, the last one filled up with zeros. The sink, [1, 1] i32, is there so that no load can be left out.
///
/// # Errors
/// As for [`scale`].
pub fn read(stream: &Stream, x: &Mat<'_>, sink: &mut MatMut<'_>) -> Result<()> {
    let x = vector(stream, x.raw.expect("x"))?;
    let sink = sink.raw.expect("sink").dtype_in(&[DType::I32])?.rows(1, "one word")?.cols(1, "one word")?.memory()?.on(stream)?;
    sink.disjoint_from(&[x])?;
    let plan = ReadPlan { x: x.mat, bytes: x.mat.cols * x.mat.dtype.size(), sink: sink.mat };
    match &stream.0 {
        _ if plan.bytes == 0 => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::measure::read(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::measure::read(stream, &plan),
    }
}

/// Bytes of a run.
pub(crate) const RUN_BYTES: u64 = 16 * crate::cuda::args::LSW_RUN_PACKS as u64;

/// Writes each run of x, 8 KB, `times` times to y: the bytes of a gather in its mix of reads and writes, without indices. Vectors [1, n]
/// and [1, n * times] of f32, f16 or bf16, the same for both; n in whole runs, times at most 32. One launch; addresses must be multiples
/// of 16.
///
/// # Errors
/// On shapes, dtypes, alignment, places and overlaps that break the above.
pub fn repeat(stream: &Stream, times: u64, x: &Mat<'_>, y: &mut MatMut<'_>) -> Result<()> {
    let (x, y) = (vector(stream, x.raw.expect("x"))?, vector(stream, y.raw.expect("y"))?);
    let plan = check_runs(times, x, y, x, y)?;
    match &stream.0 {
        _ if plan.runs == 0 => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::measure::repeat(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::measure::repeat(stream, &plan),
    }
}

/// Writes the xor of each `times` runs of x, 8 KB, to a run of y: the bytes of a combine in its mix of reads and writes, without indices.
/// As [`repeat`], with x and y the other way round.
///
/// # Errors
/// As for [`repeat`].
pub fn fold(stream: &Stream, times: u64, x: &Mat<'_>, y: &mut MatMut<'_>) -> Result<()> {
    let (x, y) = (vector(stream, x.raw.expect("x"))?, vector(stream, y.raw.expect("y"))?);
    let plan = check_runs(times, x, y, y, x)?;
    match &stream.0 {
        _ if plan.runs == 0 => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::measure::fold(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::measure::fold(stream, &plan),
    }
}

/// Of x to y, of which `long` has `times` the runs of `short`.
fn check_runs(times: u64, x: Named<'_>, y: Named<'_>, short: Named<'_>, long: Named<'_>) -> Result<RunsPlan> {
    if !(1..=32).contains(&times) {
        return Err(Error::argument("times", times, "1 to 32"));
    }
    let bytes = short.mat.cols * short.mat.dtype.size();
    if !bytes.is_multiple_of(RUN_BYTES) {
        return Err(Error::argument(format!("{}.cols", short.name), short.mat.cols, format!("whole runs of {RUN_BYTES} bytes")));
    }
    long.dtype_in(&[short.mat.dtype])?.cols(short.mat.cols * times, "n times")?;
    y.disjoint_from(&[x])?;
    Ok(RunsPlan { x: x.mat, y: y.mat, runs: bytes / RUN_BYTES, times: times as u32 })
}

fn run_scale(stream: &Stream, plan: &Plan) -> Result<()> {
    match &stream.0 {
        _ if plan.y.is_empty() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::measure::scale(pool, plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::measure::scale(stream, plan),
    }
}

fn vector<'n>(stream: &Stream, mat: Named<'n>) -> Result<Named<'n>> {
    mat.dtype_in(DType::FLOATS)?.rows(1, "a vector")?.memory()?.on(stream)?;
    if !mat.mat.is_empty() && !mat.mat.addr.is_multiple_of(16) {
        return Err(Error::argument(format!("{}.data", mat.name), format!("{:#x}", mat.mat.addr), "a multiple of 16 bytes"));
    }
    // The one-shot grid of the largest vector that fits: under 2^31 blocks of 1024 threads of 4 elements.
    if mat.mat.cols > 1 << 42 {
        return Err(Error::argument(format!("{}.cols", mat.name), mat.mat.cols, "at most 2^42"));
    }
    Ok(mat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Context;
    use half::f16;

    /// Several tasks' worth, and a last word of which only half exists.
    #[test]
    fn read_folds_every_word() {
        let x: Vec<f16> = (0..150_001).map(|i| f16::from_bits((i * 7) as u16)).collect();
        let words = x.chunks(2).map(|w| u32::from(w[0].to_bits()) | u32::from(w.get(1).map_or(0, |x| x.to_bits())) << 16);
        let expected = words.fold(0, |sum, word| sum ^ word);
        // The address must be a multiple of 16.
        let mut memory = vec![f16::ZERO; x.len() + 8];
        let start = memory.as_ptr().align_offset(16);
        memory[start..start + x.len()].copy_from_slice(&x);
        for threads in [1, 2] {
            let stream = Context::cpu(threads).unwrap().cpu_stream().unwrap();
            let mut sink = [5i32];
            let x = Mat::host(&memory[start..start + x.len()], 1, x.len()).unwrap();
            read(&stream, &x, &mut MatMut::host(&mut sink, 1, 1).unwrap()).unwrap();
            assert_eq!(sink[0] as u32, expected ^ 5);
        }
    }
}
