//! Gather-scatter.

use super::context::{lsw_context, on};
use super::{Options, Out, check_reserved, guard, lsw_mat, lsw_mat_mut, lsw_status, mat, mat_mut, optional, options};
use crate::error::Result;
use crate::permute::{
    CombineOptions, PermuteMaps, PermuteOptions, combine, combine_with, gather, permute, permute_with, permute_workspace_bytes,
};
use std::ffi::c_void;

/// Bytes of workspace that lsw_permute needs for items = T k ids over this many experts: 0 on a CPU
/// context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_permute_workspace_bytes(context: *const lsw_context, items: u64, experts: u64, bytes: *mut u64) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions; the stream is only asked for its backend.
        let (_, stream) = unsafe { on(context, std::ptr::null_mut()) }?;
        // SAFETY: the conventions.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.set(permute_workspace_bytes(&stream, items, experts)?);
        Ok(())
    })
}

/// Sorts the items (t, j) of ids by expert, stably: items of one expert keep their order t k + j.
///
/// - ids [T, k], k at most 32; -1, or any id outside 0 to experts - 1, drops the item
///   (lsw_context_take_odd reports ids but for -1).
/// - offsets, experts + 1 elements: expert e has the rows from offsets[e] on, before offsets[e +
///   1]; the last is the number R of rows.
/// - row_map, T k elements: row -> item t k + j; -1 from R on.
/// - inverse [T, k]: item -> row; -1 for one that was dropped.
/// - workspace, at least lsw_permute_workspace_bytes, aligned to 4 bytes; its content does not
///   matter, and it is free again when the work is done. NULL where 0 bytes are needed.
///
/// All matrices are LSW_I32, none shares memory with another. experts from 1 to 65536, T k below
/// 2^31. Exact and deterministic. On CUDA one launch for up to 1024 items, else two; above 1024
/// experts six (one of them clears a histogram). Enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_permute(
    context: *const lsw_context,
    stream: *mut c_void,
    experts: u64,
    ids: *const lsw_mat,
    offsets: *const lsw_mat_mut,
    row_map: *const lsw_mat_mut,
    inverse: *const lsw_mat_mut,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (ids, mut offsets, mut row_map, mut inverse) = unsafe {
            (
                mat(context, ids, "ids")?,
                mat_mut(context, offsets, "offsets")?,
                mat_mut(context, row_map, "row_map")?,
                mat_mut(context, inverse, "inverse")?,
            )
        };
        // SAFETY: the conventions.
        let mut workspace = unsafe { super::workspace(context, workspace, workspace_bytes) };
        permute(&stream, experts, &ids, &mut offsets, &mut row_map, &mut inverse, &mut workspace)
    })
}

/// Which items lsw_permute_with sorts, and how it lays out their rows. What a smaller struct_size
/// leaves out: block 1, filler -1. There is no default for the experts.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_permute_options {
    /// sizeof(lsw_permute_options).
    pub struct_size: u64,
    /// N: ids are 0 to N - 1. 1 to 65536 (pairs of adapter and expert, say).
    pub experts: u64,
    /// The experts of this call begin here: the items of others are dropped, as each rank does
    /// under expert parallelism. 0 for all.
    pub first: u64,
    /// And end before this one. N for all.
    pub last: u64,
    /// Each expert's rows are padded to a multiple of this, 1 to 1024: the tile of a grouped GEMM.
    pub block: u64,
    /// What row_map holds for rows without an item: -1, or T k for engines that mask by item < T k.
    pub filler: i32,
    /// 0.
    pub reserved: i32,
}

impl Options for lsw_permute_options {
    const DEFAULT: Self = Self { struct_size: size_of::<Self>() as u64, experts: 0, first: 0, last: 0, block: 1, filler: -1, reserved: 0 };
}

impl lsw_permute_options {
    /// # Safety
    /// As for [`options`].
    unsafe fn read(ptr: *const Self) -> Result<PermuteOptions> {
        // SAFETY: the caller's promise.
        let given = unsafe { options(ptr) }?;
        check_reserved(given.reserved).map_err(|e| e.within("options"))?;
        Ok(PermuteOptions { experts: given.experts, local: given.first..given.last, block: given.block, filler: given.filler })
    }
}

/// What lsw_permute_with needs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_permute_sizes {
    /// Elements of row_map: the most rows that the items can take, padding included.
    pub rows: u64,
    /// Elements of block_experts: rows / block.
    pub blocks: u64,
    /// Of the workspace: 0 on a CPU context.
    pub workspace_bytes: u64,
}

/// The sizes for this many items, T k.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_permute_get_sizes(
    context: *const lsw_context,
    options: *const lsw_permute_options,
    items: u64,
    sizes: *mut lsw_permute_sizes,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions; the stream is only asked for its backend.
        let (_, stream) = unsafe { on(context, std::ptr::null_mut()) }?;
        // SAFETY: the conventions.
        let (options, out) = unsafe { (lsw_permute_options::read(options)?, Out::new(sizes, "sizes")?) };
        let sizes = options.sizes(&stream, items)?;
        out.set(lsw_permute_sizes { rows: sizes.rows, blocks: sizes.blocks, workspace_bytes: sizes.workspace_bytes });
        Ok(())
    })
}

/// lsw_permute for some of the experts, with rows padded to blocks. What differs:
///
/// - Experts count from options->first on in offsets (last - first + 1 elements) and block_experts.
///   Ids of the others drop the item, and are not reported.
/// - offsets: multiples of the block; an expert's items come first in its segment, and the last
///   offset is the padded total.
/// - row_map, as long as lsw_permute_get_sizes says: rows that pad, and all from the last offset on, hold
///   the filler.
/// - block_experts [blocks] LSW_I32, or NULL: the expert of each block of rows; -1 from the last
///   offset on. With row_map and the last offset it is what vLLM's moe_align_block_size gives, in a
///   stable order.
///
/// options may not be NULL: nothing stands for the number of experts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_permute_with(
    context: *const lsw_context,
    stream: *mut c_void,
    options: *const lsw_permute_options,
    ids: *const lsw_mat,
    offsets: *const lsw_mat_mut,
    row_map: *const lsw_mat_mut,
    inverse: *const lsw_mat_mut,
    block_experts: *const lsw_mat_mut,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let options = unsafe { lsw_permute_options::read(options) }?;
        // SAFETY: the conventions.
        let (ids, mut offsets, mut row_map, mut inverse) = unsafe {
            (
                mat(context, ids, "ids")?,
                mat_mut(context, offsets, "offsets")?,
                mat_mut(context, row_map, "row_map")?,
                mat_mut(context, inverse, "inverse")?,
            )
        };
        let is_wanted = !block_experts.is_null();
        // SAFETY: the conventions.
        let mut block_experts = is_wanted.then(|| unsafe { mat_mut(context, block_experts, "block_experts") }).transpose()?;
        // SAFETY: the conventions.
        let mut workspace = unsafe { super::workspace(context, workspace, workspace_bytes) };
        let maps =
            PermuteMaps { offsets: &mut offsets, row_map: &mut row_map, inverse: &mut inverse, block_experts: block_experts.as_mut() };
        permute_with(&stream, &options, &ids, maps, &mut workspace)
    })
}

/// Copies each token's row to the rows of its experts: rows[inverse[t, j]] = x[t].
///
/// - x [T, D], rows [R, D]: any dtype, the same for both; bytes are moved as they are. Rows of 1-byte
///   elements (fp8) are LSW_U8, and another call with the same map moves their scales.
/// - inverse [T, k] LSW_I32 from lsw_permute; R may be anything. Entries that name no row (-1, or R
///   and above) are skipped; rows that no entry names (padding) are left alone. Of a row that several
///   entries name, which lsw_permute never makes, each element is from one of those tokens.
///
/// Every D, stride and offset works; 16-byte accesses serve where addresses and rows (stride
/// included) are multiples of 16 bytes. rows shares no memory with the others. Reads each row of x
/// once, and none of a token without rows. One launch; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_gather(
    context: *const lsw_context,
    stream: *mut c_void,
    x: *const lsw_mat,
    inverse: *const lsw_mat,
    rows: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (x, inverse, mut rows) = unsafe { (mat(context, x, "x")?, mat(context, inverse, "inverse")?, mat_mut(context, rows, "rows")?) };
        gather(&stream, &x, &inverse, &mut rows)
    })
}

/// Adds up each token's weighted results: y[t] = sum over j of gates[t, j] * rows[inverse[t, j]].
///
/// - rows [R, D] and y [T, D]: LSW_F32, LSW_F16 or LSW_BF16, the same for both. inverse [T, k]
///   LSW_I32, gates [T, k] LSW_F32, k at most 32.
/// - Entries of inverse that name no row (-1) add nothing, whatever their gate; a token with none
///   gets zeros.
///
/// Every D, stride and offset works; 16-byte accesses serve where addresses and rows (stride
/// included) are multiples of 16 bytes. Sums in f32, j ascending, one rounding: deterministic, no
/// atomics, and a token's bits do not depend on the other tokens. y shares no memory with the
/// others. One launch; enqueued, and may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_combine(
    context: *const lsw_context,
    stream: *mut c_void,
    rows: *const lsw_mat,
    inverse: *const lsw_mat,
    gates: *const lsw_mat,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (rows, inverse, gates, mut y) = unsafe {
            (mat(context, rows, "rows")?, mat(context, inverse, "inverse")?, mat(context, gates, "gates")?, mat_mut(context, y, "y")?)
        };
        combine(&stream, &rows, &inverse, &gates, &mut y)
    })
}

/// What lsw_combine_with does to the sums. NULL, or what a smaller struct_size leaves out: scale 1, no
/// residual.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_combine_options {
    /// sizeof(lsw_combine_options).
    pub struct_size: u64,
    /// [T, D], added to the scaled sum: of y's type, and disjoint from y or y itself (the same
    /// address, shape and stride). NULL: none.
    pub residual: *const lsw_mat,
    /// Multiplies each sum.
    pub scale: f32,
    /// 0.
    pub reserved: i32,
}

impl Options for lsw_combine_options {
    const DEFAULT: Self = Self { struct_size: size_of::<Self>() as u64, residual: std::ptr::null(), scale: 1.0, reserved: 0 };
}

/// lsw_combine with y[t] = residual[t] + scale * sum, in f32 as well: still one rounding.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_combine_with(
    context: *const lsw_context,
    stream: *mut c_void,
    options: *const lsw_combine_options,
    rows: *const lsw_mat,
    inverse: *const lsw_mat,
    gates: *const lsw_mat,
    y: *const lsw_mat_mut,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let given = unsafe { self::options(options) }?;
        check_reserved(given.reserved).map_err(|e| e.within("options"))?;
        // SAFETY: the conventions.
        let residual = unsafe { optional(context, given.residual, "residual") }?;
        // SAFETY: the conventions.
        let (rows, inverse, gates, mut y) = unsafe {
            (mat(context, rows, "rows")?, mat(context, inverse, "inverse")?, mat(context, gates, "gates")?, mat_mut(context, y, "y")?)
        };
        combine_with(&stream, &CombineOptions { scale: given.scale, residual }, &rows, &inverse, &gates, &mut y)
    })
}
