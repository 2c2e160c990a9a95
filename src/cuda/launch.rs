//! The one launch.

use super::apply_dense::SHRINK_SPLITS;
use super::args::*;
use super::context::{Apply, DeviceStream, Few, Function, LONG_SHARED, SMALL_SHARED, SWITCH_SHARED, SWITCH_THREADS, driver};
use crate::error::Result;
use cudarc::driver::sys;
use std::ffi::c_void;
use std::ptr;

/// A grid of one dimension, and the shared memory of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub blocks: u32,
    pub threads: u32,
    pub shared: u32,
}

/// A grid of three dimensions, for kernels that would otherwise begin with a division.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cube {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

impl From<Grid> for Cube {
    fn from(grid: Grid) -> Self {
        Self { blocks: [grid.blocks, 1, 1], threads: grid.threads, shared: grid.shared }
    }
}

/// Enqueues a kernel.
///
/// # Safety
/// `args` is the struct that the kernel takes, and every address in it is what the kernel's contract says, until the work has finished.
pub(super) unsafe fn launch<Args>(stream: &DeviceStream, function: Function, grid: impl Into<Cube>, args: &Args) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { launch_with(stream, function, grid.into(), &mut [], args) }
}

/// Enqueues a kernel that may start while the work before it ends: it waits for it by itself. Where the card cannot do that, it starts
/// later.
///
/// # Safety
/// As for [`launch`], and the kernel calls `dependency_wait` on every path, before it takes for granted what the work before it writes.
pub(super) unsafe fn launch_dependent<Args>(stream: &DeviceStream, function: Function, grid: impl Into<Cube>, args: &Args) -> Result<()> {
    let attributes: &mut [_] = if stream.device().has_dependent_launch { &mut [dependent()] } else { &mut [] };
    // SAFETY: the caller's promise.
    unsafe { launch_with(stream, function, grid.into(), attributes, args) }
}

/// Like [`launch_dependent`], on a card that has clusters: `blocks` neighbours form one.
///
/// # Safety
/// As for [`launch_dependent`].
pub(super) unsafe fn launch_clustered<Args>(stream: &DeviceStream, function: Function, grid: Grid, blocks: u32, args: &Args) -> Result<()> {
    let cluster = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 } },
    };
    // SAFETY: the caller's promise.
    unsafe { launch_with(stream, function, grid.into(), &mut [cluster, dependent()], args) }
}

fn dependent() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// # Safety
/// As for [`launch`], under these attributes.
unsafe fn launch_with<Args>(
    stream: &DeviceStream,
    function: Function,
    grid: Cube,
    attributes: &mut [sys::CUlaunchAttribute],
    args: &Args,
) -> Result<()> {
    let _entered = stream.device().enter()?;
    let config = sys::CUlaunchConfig {
        gridDimX: grid.blocks[0],
        gridDimY: grid.blocks[1],
        gridDimZ: grid.blocks[2],
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared,
        hStream: stream.handle(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    let mut parameters = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
    // SAFETY: the kernel's one parameter is `args` (the caller's promise); the driver copies it before the call returns.
    unsafe { driver!(cuLaunchKernelEx(&config, function, parameters.as_mut_ptr(), ptr::null_mut())) }
}

/// Launches every kernel with an empty problem: the all-zero struct asks each of them for nothing.
pub(crate) fn warm(stream: &DeviceStream) -> Result<()> {
    let k = &stream.device().kernels;
    let one = |threads: u32, shared: u32| Grid { blocks: 1, threads, shared };
    // SAFETY: each struct is its kernel's, and a count of zero in it keeps the kernel from every address.
    unsafe {
        for function in k.route.plain.into_iter().chain(k.route.scored.into_iter().flatten()).flatten() {
            launch_dependent(stream, function, one(LSW_ROUTE_THREADS, 0), &LswRouteArgs::default())?;
        }
        let gates = [(k.gate.as_flattened(), LSW_GATE_SHARED), (k.gate_many.as_flattened(), LSW_GATE_SHARED_MANY)];
        let projections = [(&k.gate_project[..], 0), (&k.gate_project_tile, LSW_GATE_SHARED_TILE)];
        for (functions, shared) in gates.into_iter().chain(projections) {
            for function in functions {
                launch_dependent(stream, *function, one(LSW_GATE_THREADS, shared), &LswGateArgs::default())?;
            }
        }
        for ((function, threads), shared) in k.switch.iter().zip(SWITCH_THREADS).zip(SWITCH_SHARED) {
            launch(stream, *function, one(threads, shared), &LswSwitchArgs::default())?;
        }
        for switch in stream.device().hopper.iter().flat_map(|hopper| hopper.switch) {
            launch(stream, switch.large, one(LSW_SWITCH90_THREADS, LSW_SWITCH90_SHARED), &LswSwitchArgs::default())?;
            for small in [switch.small, switch.small_and_deep] {
                launch_dependent(stream, small, one(LSW_SMALL_THREADS, SMALL_SHARED), &LswSwitchArgs::default())?;
            }
            launch_dependent(stream, switch.small_and_long, one(LSW_SMALL_THREADS, LONG_SHARED), &LswSwitchArgs::default())?;
        }
        for dense in stream.device().hopper.iter().map(|hopper| hopper.apply) {
            for (function, blocks) in dense.shrink.into_iter().zip(SHRINK_SPLITS) {
                let grid = Grid { blocks, ..one(LSW_SHRINK90_THREADS, LSW_SHRINK90_SHARED) };
                launch_dependent(stream, function, grid, &LswShrink90Args::default())?;
            }
            for function in [dense.expand, dense.expand_any] {
                launch_dependent(stream, function, one(LSW_EXPAND90_THREADS, LSW_EXPAND90_SHARED), &LswExpand90Args::default())?;
            }
        }
        launch(stream, k.status_take, one(1, 0), &LswTakeArgs::default())?;
        launch(stream, k.bank_set, one(LSW_BANK_THREADS, 0), &LswBankArgs::default())?;
        launch(stream, k.switch_current, one(LSW_MAX_K, 0), &LswCurrentArgs::default())?;
        for function in [k.permute_count, k.permute_scan, k.permute_scatter] {
            launch(stream, function, one(LSW_PERMUTE_THREADS, 64), &LswPermuteArgs::default())?;
        }
        for function in k.gather {
            launch(stream, function, one(LSW_MOVE_THREADS, 0), &LswGatherArgs::default())?;
        }
        for function in k.measure_scale.into_iter().chain(k.measure_fill) {
            launch(stream, function, one(LSW_MEASURE_THREADS, 0), &LswMeasureArgs::default())?;
        }
        let by_row = [(k.apply_f32.shrink, LSW_SHRINK_THREADS), (k.apply_f32.expand, LSW_EXPAND_THREADS)];
        let of_few = |few: Few| [(few.shrink, LSW_FEW_THREADS), (few.expand, LSW_FEW_EXPAND_THREADS), (few.sum, LSW_FEW_EXPAND_THREADS)];
        let of_many = |many: Apply| [(many.shrink, LSW_MANY_SHRINK_THREADS), (many.expand, LSW_MANY_EXPAND_THREADS)];
        let few_and_many = k.apply_few.into_iter().flat_map(of_few).chain(k.apply_many.into_iter().flat_map(of_many));
        for (function, threads) in by_row.into_iter().chain(few_and_many) {
            launch_dependent(stream, function, one(threads, 0), &LswApplyArgs::default())?;
        }
        for function in k.apply_add {
            launch(stream, function, one(LSW_ADD_THREADS, 0), &LswAddArgs::default())?;
        }
        for function in k.linear.as_flattened() {
            launch_dependent(stream, *function, one(LSW_LINEAR_THREADS, 0), &LswLinearArgs::default())?;
        }
        for function in k.apply_strips {
            launch_dependent(stream, function, one(LSW_STRIP_THREADS, 0), &LswApplyArgs::default())?;
        }
        launch_dependent(stream, k.apply_order, one(LSW_ORDER_THREADS, 0), &LswApplyArgs::default())?;
        launch(stream, k.measure_read, one(LSW_READ_THREADS, 0), &LswMeasureArgs::default())?;
        for function in [k.measure_repeat, k.measure_fold] {
            launch(stream, function, one(LSW_RUN_PACKS, 0), &LswMeasureArgs::default())?;
        }
        for function in k.combine {
            launch(stream, function, one(LSW_MOVE_THREADS, 0), &LswCombineArgs::default())?;
        }
    }
    Ok(())
}
