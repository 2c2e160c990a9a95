//! The switch set's device tables and its launch.

use super::args::{
    LSW_MAX_K, LSW_SWITCH_THREADS, LSW_UNKNOWN, LSW_WEIGHT_ALIGNED, LswCurrentArgs, LswMerged, LswSwitchArgs, LswSwitchState, LswTarget,
};
use super::context::{DeviceStream, SWITCH_SHARED, by_dtype};
use super::launch::{Grid, launch};
use super::memory::DeviceMemory;
use crate::error::Result;
use crate::memory::StateMemory;
use crate::stream::Odd;
use crate::switch::{RawTarget, SetPlan, ToPlan};
use crate::view::RawMat;
use std::mem::offset_of;
use std::sync::Arc;

/// Where each table lies in the set's memory.
struct Layout {
    targets: u64,
    merged: u64,
    merged_count: u64,
    bytes: u64,
}

impl Layout {
    /// The state word comes first; each table begins at a multiple of 16.
    fn new(targets: u64, k_max: u32) -> Self {
        let after = |start: u64, count: u64, size: usize| (start + count * size as u64).next_multiple_of(16);
        let first = after(0, 1, size_of::<LswSwitchState>());
        let merged = after(first, targets, size_of::<LswTarget>());
        let merged_count = after(merged, targets * u64::from(k_max), size_of::<LswMerged>());
        Self { targets: first, merged, merged_count, bytes: after(merged_count, targets, 4) }
    }
}

#[derive(Debug)]
pub(crate) struct State {
    memory: DeviceMemory,
    /// Blocks of a launch over all targets.
    blocks: u32,
    /// Keeps the context alive. After the memory, which is freed in it.
    _device: Arc<super::Device>,
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
        let tiles: u64 = plan.targets.iter().map(RawTarget::tiles).sum();
        let fill = device.switch_blocks[by_dtype(plan.bank.dtype())];
        let state = Self { memory, blocks: tiles.clamp(1, u64::from(fill)) as u32, _device: device.clone() };
        stream.fill_u32(state.addr(), 0, layout.bytes / 4)?;
        state.forget(stream, plan)?;
        let targets: Vec<LswTarget> = plan.targets.iter().map(device_target).collect();
        stream.write(state.addr() + layout.targets, &targets)?;
        Ok(state)
    }

    fn addr(&self) -> u64 {
        self.memory.addr()
    }

    /// From base nothing is known of W; in place nothing is merged. The context must be current.
    fn forget(&self, stream: &DeviceStream, plan: &SetPlan) -> Result<()> {
        if plan.targets.is_empty() {
            return Ok(());
        }
        let layout = Layout::new(plan.targets.len() as u64, plan.k_max);
        let count = if plan.in_place { 0 } else { LSW_UNKNOWN };
        stream.fill_u32(self.addr() + layout.merged_count, count, plan.targets.len() as u64)?;
        stream.fill_u32(self.addr() + offset_of!(LswSwitchState, status) as u64, 0, 1)
    }

    pub fn invalidate(&self, stream: &DeviceStream, plan: &SetPlan) -> Result<()> {
        let _entered = stream.device().enter()?;
        self.forget(stream, plan)
    }

    pub fn odd(&self, stream: &DeviceStream) -> Result<Odd> {
        stream.read_word(self.addr() + offset_of!(LswSwitchState, status) as u64).map(Odd)
    }

    pub fn launch(&self, stream: &DeviceStream, set: &SetPlan, to: &ToPlan) -> Result<()> {
        if to.first == to.last {
            return Ok(());
        }
        let layout = Layout::new(set.targets.len() as u64, set.k_max);
        let args = LswSwitchArgs {
            targets: self.addr() + layout.targets,
            factors: set.bank.device_table(),
            merged: self.addr() + layout.merged,
            merged_count: self.addr() + layout.merged_count,
            state: self.addr(),
            ids: to.ids,
            gates: to.gates,
            first: to.first,
            last: to.last,
            slots: set.bank.slots() as u32,
            k: to.k,
            k_max: set.k_max,
            in_place: set.in_place.into(),
        };
        let dtype = by_dtype(set.bank.dtype());
        let grid = Grid { blocks: self.blocks, threads: LSW_SWITCH_THREADS, shared: SWITCH_SHARED[dtype] };
        // SAFETY: a checked set and route: tables of the set and the bank, weights and bases that the set keeps alive (or its caller
        // does), adapters that the bank keeps alive; the kernel touches nothing outside the shapes in the tables.
        unsafe { launch(stream, stream.device().kernels.switch[dtype], grid, &args) }
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

fn device_target(target: &RawTarget) -> LswTarget {
    let aligned = target.weight.aligned16() && target.base.aligned16();
    LswTarget {
        weight: target.weight.addr,
        base: target.base.addr,
        weight_stride: target.weight.stride,
        base_stride: target.base.stride,
        rows: target.weight.rows as u32,
        cols: target.weight.cols as u32,
        flags: if aligned { LSW_WEIGHT_ALIGNED } else { 0 },
        tiles: target.tiles() as u32,
    }
}
