//! Gather-scatter: tokens grouped by expert, and the weighted results combined.

use crate::check::{Checked, MAX_COUNT, Named, narrow};
use crate::cuda::args::{LSW_MAX_EXPERTS, LSW_MAX_K};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};

/// The checked maps of a call.
pub(crate) struct MapsPlan {
    pub ids: RawMat,
    pub offsets: RawMat,
    pub row_map: RawMat,
    pub inverse: RawMat,
    pub workspace: u64,
    pub items: u32,
    pub k: u32,
    pub experts: u32,
}

/// A checked gather.
pub(crate) struct GatherPlan {
    pub x: RawMat,
    pub row_map: RawMat,
    pub rows: RawMat,
    pub k: u32,
}

/// A checked combine.
pub(crate) struct CombinePlan {
    pub rows: RawMat,
    pub inverse: RawMat,
    pub gates: RawMat,
    pub y: RawMat,
}

/// Bytes of workspace that [`permute`] needs for `items` = T k ids over `experts` experts: 0 on a CPU stream.
///
/// # Errors
/// On sizes that `permute` would refuse.
pub fn permute_workspace_bytes(stream: &Stream, items: u64, experts: u64) -> Result<u64> {
    let items = narrow("items", items, MAX_COUNT)?;
    let experts = check_experts(experts)?;
    Ok(match &stream.0 {
        StreamKind::Cpu(_) => 0,
        StreamKind::Cuda(_) => crate::cuda::permute::workspace_bytes(items, experts),
    })
}

fn check_experts(experts: u64) -> Result<u32> {
    if experts == 0 {
        return Err(Error::argument("experts", 0, "at least 1"));
    }
    narrow("experts", experts, u64::from(LSW_MAX_EXPERTS))
}

/// Sorts the items (t, j) of `ids` by expert, stably: items of one expert keep their order t k + j.
///
/// - `ids [T, k]` i32, k at most 32; -1, or any id outside 0..experts, drops the item (ids other than -1 are reported by
///   [`take_odd`](Stream::take_odd)).
/// - `offsets [experts + 1]` i32: expert e has rows `offsets[e]..offsets[e + 1]`; the last is the number of rows R.
/// - `row_map [T k]` i32: row -> item t k + j; -1 from R on.
/// - `inverse [T, k]` i32: item -> row; -1 for a dropped one.
/// - `workspace` u8, at least [`permute_workspace_bytes`], a multiple of 4 bytes in address; its content does not matter.
///
/// experts from 1 to 1024, T k below 2^31. Exact and deterministic. On CUDA two launches are enqueued.
///
/// # Errors
/// On shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn permute(
    stream: &Stream,
    experts: u64,
    ids: &Mat<'_>,
    offsets: &mut MatMut<'_>,
    row_map: &mut MatMut<'_>,
    inverse: &mut MatMut<'_>,
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    let plan = check_maps(stream, experts, ids.raw, offsets.raw, row_map.raw, inverse.raw, workspace.raw)?;
    match &stream.0 {
        StreamKind::Cpu(pool) => {
            crate::cpu::permute::maps(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::permute::maps(stream, &plan),
    }
}

fn check_maps(
    stream: &Stream,
    experts: u64,
    ids: RawMat,
    offsets: RawMat,
    row_map: RawMat,
    inverse: RawMat,
    workspace: RawMat,
) -> Result<MapsPlan> {
    let experts = check_experts(experts)?;
    let (ids, workspace) = (ids.expect("ids"), workspace.expect("workspace"));
    let (offsets, row_map, inverse) = (offsets.expect("offsets"), row_map.expect("row_map"), inverse.expect("inverse"));
    for mat in [ids, offsets, row_map, inverse] {
        mat.dtype_in(&[DType::I32])?;
    }
    let k = check_k("ids.cols", ids.mat.cols)?;
    let items = narrow("ids.rows * ids.cols", ids.mat.rows.saturating_mul(u64::from(k)), MAX_COUNT)?;
    offsets.rows(1, "a vector")?.cols(u64::from(experts) + 1, "experts + 1")?;
    row_map.rows(1, "a vector")?.cols(u64::from(items), "T k")?;
    inverse.rows(ids.mat.rows, "T, ids.rows")?.cols(u64::from(k), "k, ids.cols")?;
    let needed = permute_workspace_bytes(stream, u64::from(items), u64::from(experts))?;
    workspace.dtype_in(&[DType::U8])?.rows(1, "a vector")?;
    if workspace.mat.cols < needed {
        return Err(Error::argument("workspace.cols", workspace.mat.cols, format!("at least {needed} bytes")));
    }
    if needed > 0 && workspace.mat.addr % 4 != 0 {
        return Err(Error::argument("workspace.data", format!("{:#x}", workspace.mat.addr), "a multiple of 4 bytes"));
    }
    let all = [ids, offsets, row_map, inverse, workspace];
    for mat in all {
        mat.memory()?.on(stream)?;
    }
    for (i, mat) in all.iter().enumerate() {
        mat.disjoint_from(&all[i + 1..])?;
    }
    Ok(MapsPlan {
        ids: ids.mat,
        offsets: offsets.mat,
        row_map: row_map.mat,
        inverse: inverse.mat,
        workspace: workspace.mat.addr,
        items,
        k,
        experts,
    })
}

fn check_k(name: &str, k: u64) -> Result<u32> {
    if k == 0 {
        return Err(Error::argument(name, 0, "at least 1"));
    }
    narrow(name, k, u64::from(LSW_MAX_K))
}

/// Copies each token's row to the rows of its experts: `rows[r] = x[row_map[r] / k]`.
///
/// - `x [T, D]`, `rows [R, D]`: any element type, the same for both; bytes are moved as they are.
/// - `row_map [R]` i32 from [`permute`]; R may be anything up to T k. Rows whose entry names no token (-1) are left alone.
///
/// Every D, stride and offset works; 16-byte accesses serve where addresses and row bytes are multiples of 16. Deterministic. One
/// launch.
///
/// # Errors
/// On shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn gather(stream: &Stream, x: &Mat<'_>, row_map: &Mat<'_>, k: u64, rows: &mut MatMut<'_>) -> Result<()> {
    let plan = check_gather(stream, x.raw, row_map.raw, k, rows.raw)?;
    match &stream.0 {
        _ if plan.rows.is_empty() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::permute::gather(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::permute::gather(stream, &plan),
    }
}

fn check_gather(stream: &Stream, x: RawMat, row_map: RawMat, k: u64, rows: RawMat) -> Result<GatherPlan> {
    let (x, row_map, rows) = (x.expect("x"), row_map.expect("row_map"), rows.expect("rows"));
    let k = check_k("k", k)?;
    narrow("x.rows", x.mat.rows, MAX_COUNT)?;
    narrow("rows.rows", rows.mat.rows, MAX_COUNT)?;
    row_map.dtype_in(&[DType::I32])?.rows(1, "a vector")?.cols(rows.mat.rows, "R, rows.rows")?;
    rows.dtype_in(&[x.mat.dtype])?.cols(x.mat.cols, "D, x.cols")?;
    check_all(stream, &[rows], &[x, row_map])?;
    Ok(GatherPlan { x: x.mat, row_map: row_map.mat, rows: rows.mat, k })
}

/// Adds up each token's weighted results: `y[t]` = sum over j of `gates[t, j] * rows[inverse[t, j]]`.
///
/// - `rows [R, D]` and `y [T, D]`: f32, f16 or bf16, the same for both. `inverse [T, k]` i32, `gates [T, k]` f32, k at most 32.
/// - Entries of `inverse` that name no row (-1) add nothing; a token with none gets zeros.
///
/// Sums in f32, j ascending, one rounding: deterministic, no atomics, and a token's bits do not depend on the other tokens. One launch.
///
/// # Errors
/// On shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn combine(stream: &Stream, rows: &Mat<'_>, inverse: &Mat<'_>, gates: &Mat<'_>, y: &mut MatMut<'_>) -> Result<()> {
    let plan = check_combine(stream, rows.raw, inverse.raw, gates.raw, y.raw)?;
    match &stream.0 {
        _ if plan.y.is_empty() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::permute::combine(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::permute::combine(stream, &plan),
    }
}

fn check_combine(stream: &Stream, rows: RawMat, inverse: RawMat, gates: RawMat, y: RawMat) -> Result<CombinePlan> {
    let (rows, y) = (rows.expect("rows"), y.expect("y"));
    let (inverse, gates) = (inverse.expect("inverse"), gates.expect("gates"));
    let k = check_k("inverse.cols", inverse.mat.cols)?;
    narrow("rows.rows", rows.mat.rows, MAX_COUNT)?;
    narrow("y.rows", y.mat.rows, MAX_COUNT)?;
    inverse.dtype_in(&[DType::I32])?.rows(y.mat.rows, "T, y.rows")?;
    gates.dtype_in(&[DType::F32])?.rows(y.mat.rows, "T, y.rows")?.cols(u64::from(k), "k, inverse.cols")?;
    rows.dtype_in(DType::FLOATS)?;
    y.dtype_in(&[rows.mat.dtype])?.cols(rows.mat.cols, "D, rows.cols")?;
    check_all(stream, &[y], &[rows, inverse, gates])?;
    Ok(CombinePlan { rows: rows.mat, inverse: inverse.mat, gates: gates.mat, y: y.mat })
}

fn check_all(stream: &Stream, outputs: &[Named<'_>], inputs: &[Named<'_>]) -> Result<()> {
    for mat in outputs.iter().chain(inputs) {
        mat.memory()?.on(stream)?;
    }
    for output in outputs {
        output.disjoint_from(inputs)?;
    }
    Ok(())
}
