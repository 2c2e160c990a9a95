//! Tensor maps: what the copy engine of Hopper needs to know of a matrix.

use super::args::{LSW_SWITCH90_TILE, LswMap};
use super::context::driver;
use crate::dtype::DType;
use crate::error::Result;
use crate::view::RawMat;
use cudarc::driver::sys;
use std::ffi::c_void;

/// How the copy engine sees a matrix of 16-bit elements: its extents and strides, innermost first, and the box that it moves at a time,
/// whose rows of 32, 64 or 128 bytes are swizzled over that width.
struct View<const N: usize> {
    dims: [u64; N],
    strides: [u64; N],
    boxes: [u32; N],
}

fn encode<const N: usize>(mat: &RawMat, view: &View<N>) -> Result<LswMap> {
    use sys::{CUtensorMapDataType as Type, CUtensorMapSwizzle as Swizzle};
    let dtype = match mat.dtype {
        DType::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let swizzle = match view.boxes[0] {
        16 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: valid pointers to arrays of the stated rank (the innermost stride is implied); the driver checks the values, and reads no
    // device memory.
    unsafe {
        driver!(cuTensorMapEncodeTiled(
            &mut map,
            dtype,
            N as u32,
            mat.addr as *mut c_void,
            view.dims.as_ptr(),
            view.strides[1..].as_ptr(),
            view.boxes.as_ptr(),
            [1; N].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ))
    }?;
    Ok(LswMap { opaque: map.opaque })
}

/// Bytes from row to row. That of a single row is never used, but must still be a stride.
fn row_stride(mat: &RawMat) -> u64 {
    (mat.stride * 2).max((mat.cols * 2).next_multiple_of(16))
}

/// Boxes of `rows` x `cols`.
pub(super) fn boxes(mat: &RawMat, rows: u32, cols: u32) -> Result<LswMap> {
    encode(mat, &View { dims: [mat.cols, mat.rows], strides: [2, row_stride(mat)], boxes: [cols, rows] })
}

/// Of rows that have `width` columns for each target: boxes of `rows` x 64 of one target's.
pub(super) fn of_targets(mat: &RawMat, width: u64, rows: u32) -> Result<LswMap> {
    encode(mat, &View { dims: [width, mat.cols / width, mat.rows], strides: [2, 2 * width, row_stride(mat)], boxes: [64, 1, rows] })
}

/// Whether the columns are whole blocks of 64: then one box brings two of them, [2][rows][64].
pub(super) fn has_blocks(mat: &RawMat) -> bool {
    mat.cols.is_multiple_of(64)
}

/// Boxes of `rows` x 128 in two blocks, or of one block where columns end within one.
fn blocks(mat: &RawMat, rows: u32) -> Result<LswMap> {
    if !has_blocks(mat) {
        return boxes(mat, rows, 64);
    }
    encode(mat, &View { dims: [64, mat.rows, mat.cols / 64], strides: [2, row_stride(mat), 128], boxes: [64, rows, 2] })
}

/// Of a weight or its base: granules of 64 rows.
pub(super) fn weight(mat: &RawMat) -> Result<LswMap> {
    blocks(mat, 64)
}

/// How much of the rank a box holds: as `panel_depth` in the Hopper kernels has it.
pub(super) fn depth(rank: u64) -> u32 {
    match rank {
        0..=16 => 16,
        17..=32 => 32,
        _ => 64,
    }
}

/// Of an adapter's A [rank, in].
pub(super) fn factor_a(a: &RawMat) -> Result<LswMap> {
    blocks(a, depth(a.rows))
}

/// Of an adapter's B [out, rank].
pub(super) fn factor_b(b: &RawMat) -> Result<LswMap> {
    boxes(b, LSW_SWITCH90_TILE, depth(b.cols))
}
