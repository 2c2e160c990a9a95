//! Gather-scatter: tokens grouped by expert, and the weighted results combined.

use crate::check::{Checked, MAX_COUNT, Named, narrow};
use crate::cuda::args::{LSW_MAX_K, LSW_PERMUTE_MAX_EXPERTS};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};
use std::ops::Range;

/// The most rows of a block.
const MAX_BLOCK: u64 = 1024;

/// Which items a call sorts, and how it lays out their rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PermuteOptions {
    /// N: ids are 0..N, from 1 to 65,536 (pairs of adapter and expert, say).
    pub experts: u64,
    /// The experts of this call, all by default: the items of others are dropped, as each rank does under expert parallelism.
    pub local: Range<u64>,
    /// Each expert's rows are padded to a multiple of this, 1 (the default) to 1,024: the tile of a grouped GEMM.
    pub block: u64,
    /// What `row_map` holds for rows without an item: -1 by default. Engines that mask by `item < T k` want T k.
    pub filler: i32,
}

impl PermuteOptions {
    /// All of N experts, nothing padded.
    pub fn new(experts: u64) -> Self {
        Self { experts, local: 0..experts, block: 1, filler: -1 }
    }

    /// What [`permute_with`] needs for this many items, T k.
    ///
    /// # Errors
    /// On options or sizes that `permute_with` would refuse.
    pub fn sizes(&self, stream: &Stream, items: u64) -> Result<PermuteSizes> {
        let experts = self.check()?;
        let items = narrow("items", items, MAX_COUNT)?;
        let most = u64::from(items) + u64::from(items.min(experts)) * (self.block - 1);
        let rows = narrow("rows", most / self.block * self.block, MAX_COUNT)?.into();
        let workspace_bytes = match &stream.0 {
            StreamKind::Cpu(_) => 0,
            StreamKind::Cuda(_) => crate::cuda::permute::workspace_bytes(items, experts),
        };
        Ok(PermuteSizes { rows, blocks: rows / self.block, workspace_bytes })
    }

    /// The number of experts of the call.
    fn check(&self) -> Result<u32> {
        let within = |name: &str, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(Error::argument(name, value, format!("{least} to {most}"))),
        };
        within("experts", self.experts, 1, LSW_PERMUTE_MAX_EXPERTS.into())?;
        within("local.start", self.local.start, 0, self.experts - 1)?;
        within("local.end", self.local.end, self.local.start + 1, self.experts)?;
        within("block", self.block, 1, MAX_BLOCK)?;
        narrow("experts", self.local.end - self.local.start, LSW_PERMUTE_MAX_EXPERTS.into())
    }
}

/// Sizes of a [`permute_with`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PermuteSizes {
    /// Of `row_map`: the most rows that the items can take, padding included.
    pub rows: u64,
    /// Of `block_experts`: rows / block.
    pub blocks: u64,
    /// Of the workspace: 0 on a CPU stream.
    pub workspace_bytes: u64,
}

/// What [`permute_with`] writes.
#[derive(Debug)]
pub struct PermuteMaps<'a, 'm> {
    /// `[n + 1]` i32, n the experts of the call.
    pub offsets: &'a mut MatMut<'m>,
    /// `[rows]` i32, rows as in [`PermuteSizes`].
    pub row_map: &'a mut MatMut<'m>,
    /// `[T, k]` i32.
    pub inverse: &'a mut MatMut<'m>,
    /// `[blocks]` i32, where it is wanted.
    pub block_experts: Option<&'a mut MatMut<'m>>,
}

/// The checked maps of a call.
pub(crate) struct MapsPlan {
    pub ids: RawMat,
    pub offsets: RawMat,
    pub row_map: RawMat,
    pub inverse: RawMat,
    pub block_experts: Option<RawMat>,
    pub workspace: u64,
    pub items: u32,
    pub k: u32,
    /// N.
    pub all_experts: u32,
    /// Those of the call: from this one on, this many.
    pub first: u32,
    pub experts: u32,
    pub block: u32,
    pub filler: i32,
}

/// A checked gather.
pub(crate) struct GatherPlan {
    pub x: RawMat,
    pub inverse: RawMat,
    pub rows: RawMat,
}

/// A checked combine.
pub(crate) struct CombinePlan {
    pub rows: RawMat,
    pub inverse: RawMat,
    pub gates: RawMat,
    pub residual: Option<RawMat>,
    pub scale: f32,
    pub y: RawMat,
}

/// Bytes of workspace that [`permute`] needs for `items` = T k ids over `experts` experts: 0 on a CPU stream.
///
/// # Errors
/// On sizes that `permute` would refuse.
pub fn permute_workspace_bytes(stream: &Stream, items: u64, experts: u64) -> Result<u64> {
    Ok(PermuteOptions::new(experts).sizes(stream, items)?.workspace_bytes)
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
/// experts from 1 to 65,536, T k below 2^31. Exact and deterministic. On CUDA one launch is enqueued for up to 1,024 items, else two;
/// above 1,024 experts six (one of them clears a histogram).
///
/// # Errors
/// On shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn permute<'m>(
    stream: &Stream,
    experts: u64,
    ids: &Mat<'_>,
    offsets: &mut MatMut<'m>,
    row_map: &mut MatMut<'m>,
    inverse: &mut MatMut<'m>,
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    permute_with(stream, &PermuteOptions::new(experts), ids, PermuteMaps { offsets, row_map, inverse, block_experts: None }, workspace)
}

/// [`permute`] for some of the experts, with rows padded to blocks. What differs:
///
/// - Experts count from `local.start` on in `offsets` and `block_experts`. Ids of the others drop the item, and are not reported.
/// - `offsets`: multiples of the block; an expert's items come first in its segment, and the last offset is the padded total.
/// - `row_map`, as long as [`sizes`](PermuteOptions::sizes) says: rows that pad, and all from the last offset on, hold the filler.
/// - `block_experts`: the expert of each block of rows; -1 from the last offset on. With `row_map` and the last offset it is what
///   vLLM's `moe_align_block_size` gives, in a stable order.
///
/// # Errors
/// As for [`permute`].
pub fn permute_with(
    stream: &Stream,
    options: &PermuteOptions,
    ids: &Mat<'_>,
    maps: PermuteMaps<'_, '_>,
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    let plan = check_maps(stream, options, ids.raw, &maps, workspace.raw)?;
    match &stream.0 {
        StreamKind::Cpu(pool) => {
            crate::cpu::permute::maps(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::permute::maps(stream, &plan),
    }
}

fn check_maps(stream: &Stream, options: &PermuteOptions, ids: RawMat, maps: &PermuteMaps<'_, '_>, workspace: RawMat) -> Result<MapsPlan> {
    let experts = options.check()?;
    let (ids, workspace) = (ids.expect("ids"), workspace.expect("workspace"));
    let (offsets, row_map, inverse) =
        (maps.offsets.raw.expect("offsets"), maps.row_map.raw.expect("row_map"), maps.inverse.raw.expect("inverse"));
    let block_experts = maps.block_experts.as_ref().map(|mat| mat.raw.expect("block_experts"));
    let mut all: Vec<Named<'_>> = [ids, offsets, row_map, inverse].into_iter().chain(block_experts).collect();
    for mat in &all {
        mat.dtype_in(&[DType::I32])?;
    }
    let k = check_k("ids.cols", ids.mat.cols)?;
    let items = narrow("ids.rows * ids.cols", ids.mat.rows.saturating_mul(u64::from(k)), MAX_COUNT)?;
    let sizes = options.sizes(stream, items.into())?;
    offsets.rows(1, "a vector")?.cols(u64::from(experts) + 1, "experts + 1")?;
    row_map.rows(1, "a vector")?.cols(sizes.rows, if options.block == 1 { "T k" } else { "the rows of PermuteSizes" })?;
    inverse.rows(ids.mat.rows, "T, ids.rows")?.cols(u64::from(k), "k, ids.cols")?;
    if let Some(mat) = block_experts {
        mat.rows(1, "a vector")?.cols(sizes.blocks, "the blocks of PermuteSizes")?;
    }
    let needed = sizes.workspace_bytes;
    workspace.dtype_in(&[DType::U8])?.rows(1, "a vector")?;
    if workspace.mat.cols < needed {
        return Err(Error::argument("workspace.cols", workspace.mat.cols, format!("at least {needed} bytes")));
    }
    if needed > 0 && workspace.mat.addr % 4 != 0 {
        return Err(Error::argument("workspace.data", format!("{:#x}", workspace.mat.addr), "a multiple of 4 bytes"));
    }
    all.push(workspace);
    for mat in &all {
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
        block_experts: block_experts.map(|named| named.mat),
        workspace: workspace.mat.addr,
        items,
        k,
        all_experts: options.experts as u32,
        first: options.local.start as u32,
        experts,
        block: options.block as u32,
        filler: options.filler,
    })
}

fn check_k(name: &str, k: u64) -> Result<u32> {
    if k == 0 {
        return Err(Error::argument(name, 0, "at least 1"));
    }
    narrow(name, k, u64::from(LSW_MAX_K))
}

/// Copies each token's row to the rows of its experts: `rows[inverse[t, j]] = x[t]`.
///
/// - `x [T, D]`, `rows [R, D]`: any element type, the same for both; bytes are moved as they are. Rows of 1-byte elements (fp8) are u8,
///   and another call with the same map moves their scales.
/// - `inverse [T, k]` i32 from [`permute`]; R may be anything. Entries that name no row (-1, or R and above) are skipped; rows that no
///   entry names (padding) are left alone. Of a row that several entries name, which [`permute`] never makes, each element is from one
///   of those tokens.
///
/// Every D, stride and offset works; 16-byte accesses serve where addresses and row bytes are multiples of 16. Reads each row of x once,
/// and none of a token without rows. One launch.
///
/// # Errors
/// On shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn gather(stream: &Stream, x: &Mat<'_>, inverse: &Mat<'_>, rows: &mut MatMut<'_>) -> Result<()> {
    let plan = check_gather(stream, x.raw, inverse.raw, rows.raw)?;
    match &stream.0 {
        _ if plan.x.is_empty() || plan.rows.is_empty() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::permute::gather(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::permute::gather(stream, &plan),
    }
}

fn check_gather(stream: &Stream, x: RawMat, inverse: RawMat, rows: RawMat) -> Result<GatherPlan> {
    let (x, inverse, rows) = (x.expect("x"), inverse.expect("inverse"), rows.expect("rows"));
    check_k("inverse.cols", inverse.mat.cols)?;
    narrow("x.rows", x.mat.rows, MAX_COUNT)?;
    narrow("rows.rows", rows.mat.rows, MAX_COUNT)?;
    inverse.dtype_in(&[DType::I32])?.rows(x.mat.rows, "T, x.rows")?;
    rows.dtype_in(&[x.mat.dtype])?.cols(x.mat.cols, "D, x.cols")?;
    check_all(stream, &[rows], &[x, inverse])?;
    Ok(GatherPlan { x: x.mat, inverse: inverse.mat, rows: rows.mat })
}

/// What [`combine_with`] does to the sums.
#[derive(Debug)]
pub struct CombineOptions<'a> {
    /// Multiplies each sum: 1 by default.
    pub scale: f32,
    /// `[T, D]`, added to the scaled sum: of y's type, and disjoint from y or y itself (the same address, shape and stride).
    pub residual: Option<Mat<'a>>,
}

impl Default for CombineOptions<'_> {
    fn default() -> Self {
        Self { scale: 1.0, residual: None }
    }
}

/// Adds up each token's weighted results: `y[t]` = sum over j of `gates[t, j] * rows[inverse[t, j]]`.
///
/// - `rows [R, D]` and `y [T, D]`: f32, f16 or bf16, the same for both. `inverse [T, k]` i32, `gates [T, k]` f32, k at most 32.
/// - Entries of `inverse` that name no row (-1) add nothing, whatever their gate; a token with none gets zeros.
///
/// Every D, stride and offset works; 16-byte accesses serve where addresses and row bytes are multiples of 16. Sums in f32, j ascending,
/// one rounding: deterministic, no atomics, and a token's bits do not depend on the other tokens. One launch.
///
/// # Errors
/// On shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn combine(stream: &Stream, rows: &Mat<'_>, inverse: &Mat<'_>, gates: &Mat<'_>, y: &mut MatMut<'_>) -> Result<()> {
    combine_with(stream, &CombineOptions::default(), rows, inverse, gates, y)
}

/// [`combine`] with `y[t] = residual[t] + scale * sum`, in f32 as well: still one rounding.
///
/// # Errors
/// As for [`combine`].
pub fn combine_with(
    stream: &Stream,
    options: &CombineOptions<'_>,
    rows: &Mat<'_>,
    inverse: &Mat<'_>,
    gates: &Mat<'_>,
    y: &mut MatMut<'_>,
) -> Result<()> {
    let plan = check_combine(stream, options, rows.raw, inverse.raw, gates.raw, y.raw)?;
    match &stream.0 {
        _ if plan.y.is_empty() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::permute::combine(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::permute::combine(stream, &plan),
    }
}

fn check_combine(
    stream: &Stream,
    options: &CombineOptions<'_>,
    rows: RawMat,
    inverse: RawMat,
    gates: RawMat,
    y: RawMat,
) -> Result<CombinePlan> {
    let (rows, y) = (rows.expect("rows"), y.expect("y"));
    let (inverse, gates) = (inverse.expect("inverse"), gates.expect("gates"));
    let residual = options.residual.as_ref().map(|mat| mat.raw.expect("residual"));
    let k = check_k("inverse.cols", inverse.mat.cols)?;
    narrow("rows.rows", rows.mat.rows, MAX_COUNT)?;
    narrow("y.rows", y.mat.rows, MAX_COUNT)?;
    inverse.dtype_in(&[DType::I32])?.rows(y.mat.rows, "T, y.rows")?;
    gates.dtype_in(&[DType::F32])?.rows(y.mat.rows, "T, y.rows")?.cols(u64::from(k), "k, inverse.cols")?;
    rows.dtype_in(DType::FLOATS)?;
    y.dtype_in(&[rows.mat.dtype])?.cols(rows.mat.cols, "D, rows.cols")?;
    if let Some(residual) = residual {
        residual.dtype_in(&[y.mat.dtype])?.rows(y.mat.rows, "T, y.rows")?.cols(y.mat.cols, "D, y.cols")?.memory()?.on(stream)?;
    }
    check_all(stream, &[y], &[rows, inverse, gates])?;
    // Each element is read and written by one thread, in this order: the sum may be added to y itself.
    let is_y = |residual: &Named<'_>| residual.mat.addr == y.mat.addr && (residual.mat.stride == y.mat.stride || y.mat.rows < 2);
    y.disjoint_from(residual.filter(|residual| !is_y(residual)).as_slice())?;
    let residual = residual.map(|named| named.mat);
    Ok(CombinePlan { rows: rows.mat, inverse: inverse.mat, gates: gates.mat, residual, scale: options.scale, y: y.mat })
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
