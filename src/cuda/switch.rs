//! The switch set's device tables and its launch.

use super::args::{
    LSW_MAX_K, LSW_PATH_ALL, LSW_PATH_BOXES, LSW_PATH_OTHERS, LSW_SMALL_HELD, LSW_SMALL_SLOTS, LSW_SMALL_TARGETS, LSW_SMALL_THREADS,
    LSW_SWITCH_RUN, LSW_SWITCH90_GROUPS, LSW_SWITCH90_SHARED, LSW_SWITCH90_THREADS, LSW_SWITCH90_TILE, LSW_UNKNOWN, LSW_WEIGHT_ALIGNED,
    LSW_WEIGHT_BLOCKS, LSW_WEIGHT_BOXES, LswCurrentArgs, LswMap, LswMerged, LswSwitchArgs, LswSwitchState, LswTarget,
};
use super::context::{DeviceStream, Function, LONG_SHARED, SMALL_SHARED, SWITCH_SHARED, SWITCH_THREADS, by_dtype};
use super::launch::{Grid, launch, launch_dependent};
use super::memory::DeviceMemory;
use super::{Device, flags};
use crate::error::Result;
use crate::memory::StateMemory;
use crate::stream::Odd;
use crate::switch::{RawTarget, SetPlan, SwitchKernels, ToPlan};
use crate::view::RawMat;
use std::mem::offset_of;
use std::sync::Arc;

/// Where each table lies in the set's memory.
struct Layout {
    targets: u64,
    maps: u64,
    merged: u64,
    merged_count: u64,
    arrivals: u64,
    bytes: u64,
}

impl Layout {
    /// The words of both paths come first; each table begins at a multiple of 128.
    fn new(targets: u64, k_max: u32) -> Self {
        let after = |start: u64, count: u64, size: usize| (start + count * size as u64).next_multiple_of(128);
        let maps = after(0, 2, size_of::<LswSwitchState>());
        let first = after(maps, 2 * targets, size_of::<LswMap>());
        let merged = after(first, targets, size_of::<LswTarget>());
        let merged_count = after(merged, targets * u64::from(k_max), size_of::<LswMerged>());
        let arrivals = after(merged_count, targets, 4);
        Self { targets: first, maps, merged, merged_count, arrivals, bytes: after(arrivals, targets, 4) }
    }
}

/// The words of a path: its queue and its status.
fn words(path: u32) -> u64 {
    u64::from(path == LSW_PATH_BOXES) * size_of::<LswSwitchState>() as u64
}

/// Blocks of the kernel for small sets on a multiprocessor.
const SMALL_BLOCKS: u32 = 2;

/// How many long runs each block of the portable kernel should have before there are any.
const RUNS_A_BLOCK: u64 = 4;

/// How the launches of a set divide its targets.
#[derive(Debug, Clone, Copy)]
struct Path {
    path: u32,
    function: Function,
    grid: Grid,
    /// Tiles that a block of the portable kernel takes at a time.
    run: u32,
    /// The kernel for small sets, whose grid above is its largest: what of a rank its panels may have. None: another kernel.
    panel_depth: Option<u32>,
    /// The same for launches of many tiles and few deep products, where there is one.
    long: Option<Function>,
}

/// Tiles a multiprocessor up to which a set is small: what such a kernel loses a tile comes to what it saves a launch. Ranks beyond a panel
/// lose more.
const SMALL: u64 = 8;
const SMALL_AND_DEEP: u64 = 2;

// SAFETY: the function handles inside are the driver's, which is thread safe.
unsafe impl Send for State {}
// SAFETY: as above; nothing in it changes after creation.
unsafe impl Sync for State {}

#[derive(Debug)]
pub(crate) struct State {
    memory: DeviceMemory,
    /// One launch each: the Hopper path for aligned targets, the portable one for the others or for all.
    paths: Vec<Path>,
    /// Keeps the context alive. After the memory, which is freed in it.
    _device: Arc<Device>,
}

impl State {
    pub fn bytes(targets: u64, k_max: u32) -> u64 {
        Layout::new(targets, k_max).bytes
    }

    /// Writes the tables. Synchronises.
    pub fn new(stream: &DeviceStream, plan: &SetPlan, memory: &StateMemory) -> Result<Self> {
        let device = stream.device();
        let _entered = device.enter()?;
        let layout = Layout::new(plan.targets.len() as u64, plan.k_max);
        let memory = DeviceMemory::new(device, layout.bytes, memory)?;
        let state = Self { memory, paths: paths(device, plan), _device: device.clone() };
        stream.fill_u32(state.addr(), 0, layout.bytes / 4)?;
        state.forget(stream, plan)?;
        let targets: Vec<LswTarget> = plan.targets.iter().map(device_target).collect();
        stream.write(state.addr() + layout.targets, &targets)?;
        if state.paths.iter().any(|p| p.path == LSW_PATH_BOXES) {
            let maps: Result<Vec<[LswMap; 2]>> = plan.targets.iter().map(target_maps).collect();
            stream.write(state.addr() + layout.maps, &maps?)?;
        }
        Ok(state)
    }

    fn addr(&self) -> u64 {
        self.memory.addr()
    }

    fn status(&self, path: u32) -> u64 {
        self.addr() + words(path) + offset_of!(LswSwitchState, status) as u64
    }

    /// From base nothing is known of W; in place nothing is merged. The context must be current.
    fn forget(&self, stream: &DeviceStream, plan: &SetPlan) -> Result<()> {
        if plan.targets.is_empty() {
            return Ok(());
        }
        let layout = Layout::new(plan.targets.len() as u64, plan.k_max);
        let count = if plan.in_place { 0 } else { LSW_UNKNOWN };
        stream.fill_u32(self.addr() + layout.merged_count, count, plan.targets.len() as u64)?;
        for path in [LSW_PATH_ALL, LSW_PATH_BOXES] {
            stream.fill_u32(self.status(path), 0, 1)?;
        }
        Ok(())
    }

    pub fn invalidate(&self, stream: &DeviceStream, plan: &SetPlan) -> Result<()> {
        let _entered = stream.device().enter()?;
        self.forget(stream, plan)
    }

    pub fn odd(&self, stream: &DeviceStream) -> Result<Odd> {
        let _entered = stream.device().enter()?;
        Ok(Odd(stream.read_u32(self.status(LSW_PATH_ALL))? | stream.read_u32(self.status(LSW_PATH_BOXES))?))
    }

    pub fn launch(&self, stream: &DeviceStream, set: &SetPlan, to: &ToPlan) -> Result<()> {
        if to.first == to.last {
            return Ok(());
        }
        let layout = Layout::new(set.targets.len() as u64, set.k_max);
        let args = |path: &Path| LswSwitchArgs {
            targets: self.addr() + layout.targets,
            factors: set.bank.device_table().addr(),
            merged: self.addr() + layout.merged,
            merged_count: self.addr() + layout.merged_count,
            state: self.addr() + words(path.path),
            ids: to.ids,
            gates: to.gates,
            first: to.first,
            last: to.last,
            slots: set.bank.slots() as u32,
            k: to.k,
            k_max: set.k_max,
            in_place: set.in_place.into(),
            factor_maps: set.bank.device_table().maps(),
            target_maps: self.addr() + layout.maps,
            path: path.path,
            run: path.run,
            arrivals: self.addr() + layout.arrivals,
            panel_depth: path.panel_depth.unwrap_or(0),
            padding: 0,
        };
        for path in &self.paths {
            if path.panel_depth.is_some() {
                let served = set.targets[to.first as usize..to.last as usize].iter().filter(|t| fits_boxes(t));
                let tiles: u64 = served.map(boxes_of).sum();
                let most = u64::from(path.grid.blocks);
                // A lone target that would fill nearly all places at once leaves half of them to the next launch instead; of deep ranks sooner,
                // since B's panels stay for a block's tiles.
                let is_deep = path.panel_depth == Some(64);
                let halves = to.last - to.first == 1 && tiles * 8 > most * if is_deep { 5 } else { 6 } && tiles <= most;
                // Launches that follow one another then share the multiprocessors evenly where each has a block for every one of them: a few
                // with nothing to do are better than a few multiprocessors that get two of a later launch.
                let (half, even) = (tiles.div_ceil(u64::from(SMALL_BLOCKS)), most / u64::from(SMALL_BLOCKS));
                let blocks = match (halves, is_deep && half * 16 < even * 15) {
                    (true, true) => half,
                    (true, false) => even,
                    _ => tiles.min(most),
                };
                // With several tiles for each place it is not trips that count: a block has a multiprocessor to itself, and B in its registers. A
                // product is one adapter here, as a set of so many tiles is small only with ranks up to 64. Where there are more than k
                // tells (adapters that leave, of a longer route), the block finds that out itself. From base without a route there are none: a
                // copy is better off with blocks in all places.
                let products = if set.in_place { 2 * to.k } else { to.k };
                let long = path.long.filter(|_| tiles > 2 * most && products <= LSW_SMALL_HELD && (products > 0 || set.in_place));
                let (function, grid) = match long {
                    Some(function) => (function, Grid { blocks: even as u32, shared: LONG_SHARED, ..path.grid }),
                    None => (path.function, Grid { blocks: blocks as u32, ..path.grid }),
                };
                if tiles > 0 {
                    // SAFETY: as below. Before it waits, the kernel reads the tables and the route, all of them there by then, which it reads
                    // again afterwards; and adapters in slots, which nobody writes.
                    unsafe { launch_dependent(stream, function, grid, &LswSwitchArgs { run: halves.into(), ..args(path) }) }?;
                }
                continue;
            }
            // SAFETY: a checked set and route: tables of the set and the bank, weights and bases that the set keeps alive (or its
            // caller does), adapters that the bank keeps alive; the kernel touches nothing outside the shapes in the tables.
            unsafe { launch(stream, path.function, path.grid, &args(path)) }?;
        }
        Ok(())
    }

    pub fn current(&self, stream: &DeviceStream, set: &SetPlan, target: u32, ids: RawMat, coefficients: RawMat) -> Result<()> {
        let layout = Layout::new(set.targets.len() as u64, set.k_max);
        let args = LswCurrentArgs {
            merged: self.addr() + layout.merged,
            merged_count: self.addr() + layout.merged_count,
            ids: ids.addr,
            coefficients: coefficients.addr,
            target,
            k_max: set.k_max,
        };
        let grid = Grid { blocks: 1, threads: LSW_MAX_K, shared: 0 };
        // SAFETY: the set's tables, a checked target, and checked vectors of k_max elements.
        unsafe { launch(stream, stream.device().kernels.switch_current, grid, &args) }
    }
}

/// The launches that serve a set: decided by its weights alone, so that a captured launch survives every route and refill.
fn paths(device: &Device, plan: &SetPlan) -> Vec<Path> {
    let dtype = plan.bank.dtype();
    let hopper =
        device.hopper.filter(|_| plan.kernels != SwitchKernels::Portable && plan.targets.len() <= 32 * LSW_SWITCH90_GROUPS as usize);
    let fast = hopper.and_then(|hopper| Some((hopper, hopper.switch_for(dtype)?)));
    let (boxes, others): (Vec<&RawTarget>, Vec<_>) = plan.targets.iter().partition(|t| fast.is_some() && fits_boxes(t));
    let mut paths = Vec::new();
    if let Some((hopper, function)) = fast.filter(|_| !boxes.is_empty()) {
        let tiles: u64 = boxes.iter().map(|t| boxes_of(t)).sum();
        let depth = super::maps::depth(rank_cap(plan));
        let most = if rank_cap(plan) > 64 { SMALL_AND_DEEP } else { SMALL } * u64::from(hopper.processors);
        let is_small = plan.kernels == SwitchKernels::Best && plan.targets.len() <= LSW_SMALL_TARGETS as usize && tiles <= most;
        if is_small {
            let grid = Grid { blocks: SMALL_BLOCKS * hopper.processors, threads: LSW_SMALL_THREADS, shared: SMALL_SHARED };
            let is_long =
                depth == 64 && plan.bank.slots() <= u64::from(LSW_SMALL_SLOTS) && boxes.iter().all(|t| super::maps::has_blocks(&t.weight));
            let long = is_long.then_some(function.small_and_long);
            let function = if depth == 64 { function.small_and_deep } else { function.small };
            paths.push(Path { path: LSW_PATH_BOXES, function, grid, run: 0, panel_depth: Some(depth), long });
        } else {
            let blocks = tiles.clamp(1, u64::from(hopper.processors)) as u32;
            let grid = Grid { blocks, threads: LSW_SWITCH90_THREADS, shared: LSW_SWITCH90_SHARED };
            paths.push(Path { path: LSW_PATH_BOXES, function: function.large, grid, run: 0, panel_depth: None, long: None });
        }
    }
    if !others.is_empty() {
        let tiles: u64 = others.iter().map(|t| t.tiles()).sum();
        let blocks = tiles.clamp(1, u64::from(device.switch_blocks[by_dtype(dtype)])) as u32;
        let grid = Grid { blocks, threads: SWITCH_THREADS[by_dtype(dtype)], shared: SWITCH_SHARED[by_dtype(dtype)] };
        let path = if boxes.is_empty() { LSW_PATH_ALL } else { LSW_PATH_OTHERS };
        // Long runs share more of A; short ones share out better what is little.
        let run = if tiles >= RUNS_A_BLOCK * u64::from(blocks * LSW_SWITCH_RUN) { LSW_SWITCH_RUN } else { 1 };
        paths.push(Path { path, function: device.kernels.switch[by_dtype(dtype)], grid, run, panel_depth: None, long: None });
    }
    paths
}

/// Tiles of the Hopper kernels.
fn boxes_of(target: &RawTarget) -> u64 {
    target.tiles_of(LSW_SWITCH90_TILE, LSW_SWITCH90_TILE)
}

/// The largest rank that an adapter of the set's bank may have.
fn rank_cap(plan: &SetPlan) -> u64 {
    plan.bank.targets().iter().map(|shape| shape.rank_cap).max().unwrap_or(0)
}

fn is_aligned(target: &RawTarget) -> bool {
    target.weight.aligned16() && target.base.aligned16()
}

/// The copy engine reads exactly what exists, but stores whole 16 bytes; its strides are below 2^40 bytes.
fn fits_boxes(target: &RawTarget) -> bool {
    let size = target.weight.dtype.size();
    let strides_fit = [target.weight.stride, target.base.stride].iter().all(|&stride| stride < (1 << 40) / size);
    is_aligned(target) && (target.weight.cols * size).is_multiple_of(16) && strides_fit && !target.weight.is_empty()
}

/// Of W and W_base; of targets that no Hopper launch serves, nothing.
fn target_maps(target: &RawTarget) -> Result<[LswMap; 2]> {
    if !fits_boxes(target) {
        return Ok(Default::default());
    }
    Ok([super::maps::weight(&target.weight)?, super::maps::weight(&target.base)?])
}

fn device_target(target: &RawTarget) -> LswTarget {
    LswTarget {
        weight: target.weight.addr,
        base: target.base.addr,
        weight_stride: target.weight.stride,
        base_stride: target.base.stride,
        rows: target.weight.rows as u32,
        cols: target.weight.cols as u32,
        flags: flags([
            (is_aligned(target), LSW_WEIGHT_ALIGNED),
            (fits_boxes(target), LSW_WEIGHT_BOXES),
            (super::maps::has_blocks(&target.weight), LSW_WEIGHT_BLOCKS),
        ]),
        tiles: target.tiles() as u32,
    }
}
