//! Tensor maps: what the copy engine of Hopper needs to know of a matrix.

use super::args::{LSW_SWITCH90_TILE, LswMap};
use super::context::driver;
use crate::dtype::DType;
use crate::error::Result;
use crate::view::RawMat;
use cudarc::driver::sys;
use std::ffi::c_void;

/// A map of boxes of `rows` x `cols` elements, whose rows of 32, 64 or 128 bytes are swizzled over that width. The matrix is not empty,
/// of 16-bit elements, and aligned to 16 bytes.
fn encode(mat: &RawMat, rows: u32, cols: u32) -> Result<LswMap> {
    use sys::{CUtensorMapDataType as Type, CUtensorMapSwizzle as Swizzle};
    let dtype = match mat.dtype {
        DType::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let swizzle = match cols {
        16 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    // The stride of a single row is never used, but must still be one.
    let stride = (mat.stride * 2).max((mat.cols * 2).next_multiple_of(16));
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: valid pointers to arrays of the stated rank; the driver checks the values, and reads no device memory.
    unsafe {
        driver!(cuTensorMapEncodeTiled(
            &mut map,
            dtype,
            2,
            mat.addr as *mut c_void,
            [mat.cols, mat.rows].as_ptr(),
            [stride].as_ptr(),
            [cols, rows].as_ptr(),
            [1, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ))
    }?;
    Ok(LswMap { opaque: map.opaque })
}

/// Of a weight or its base: granules of 64 x 64.
pub(super) fn weight(mat: &RawMat) -> Result<LswMap> {
    encode(mat, 64, 64)
}

/// Of an adapter's A and B. The box follows the rank as `panel_depth` in kernels/switch_sm90.cu does.
pub(super) fn factor(a: &RawMat, b: &RawMat) -> Result<[LswMap; 2]> {
    let depth = match a.rows {
        0..=16 => 16,
        17..=32 => 32,
        _ => 64,
    };
    Ok([encode(a, depth, 64)?, encode(b, LSW_SWITCH90_TILE, depth)?])
}
