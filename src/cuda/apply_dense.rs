//! Launches of unmerged adapters on Hopper by dense products with all slots: many rows of a bank with few small ranks.

use super::apply::args;
use super::args::{
    LSW_APPLY_TARGETS, LSW_EXPAND90_SHARED, LSW_EXPAND90_THREADS, LSW_SHRINK90_COLUMNS, LSW_SHRINK90_ROWS, LSW_SHRINK90_SHARED,
    LSW_SHRINK90_THREADS, LSW_SWITCH90_TILE, LswExpand90Args, LswExpand90Target, LswFactor, LswMap, LswShrink90Args,
};
use super::context::{DeviceStream, Hopper};
use super::launch::{Cube, Grid, launch_dependent};
use super::maps::{boxes, of_targets};
use crate::apply::{Dense, Part, Plan};
use crate::dtype::DType;
use crate::error::Result;
use crate::view::RawMat;

/// Blocks of a cluster of shrink, which share in_features. Four make 4,096 rows enough blocks where the products are few.
pub(super) const SHRINK_SPLITS: [u32; 2] = [2, 4];

pub(super) fn apply(stream: &DeviceStream, plan: &Plan<'_>, hopper: &Hopper, dense: &Dense, part: Part) -> Result<()> {
    if part != Part::Finish {
        shrink(stream, plan, hopper, dense)?;
    }
    if part != Part::Begin { expand(stream, plan, hopper, dense) } else { Ok(()) }
}

fn shrink(stream: &DeviceStream, plan: &Plan<'_>, hopper: &Hopper, dense: &Dense) -> Result<()> {
    let (apply, x) = (args(stream, plan), plan.x.expect("a plan of this half"));
    let args = LswShrink90Args {
        x: if x.aligned16() && !x.is_empty() { boxes(&x, LSW_SHRINK90_ROWS, 64)? } else { LswMap::default() },
        products: dense.products,
        used: dense.used,
        depth: dense.depth,
        used_stride: dense.used_stride,
        apply,
    };
    // By the bank alone: on how a sum is divided depend its bits.
    let chunks = (apply.count * apply.slots * dense.depth).div_ceil(LSW_SHRINK90_COLUMNS);
    let shape = usize::from(chunks == 1);
    let blocks = [plan.rows.div_ceil(LSW_SHRINK90_ROWS) * SHRINK_SPLITS[shape], chunks, 1];
    let grid = Cube { blocks, threads: LSW_SHRINK90_THREADS, shared: LSW_SHRINK90_SHARED };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views; the bank's table, and adapters that the
    // bank keeps alive; a map of x where there is one to use. The kernel waits first of all.
    unsafe { launch_dependent(stream, hopper.apply.shrink[shape], grid, &args) }
}

/// Whether the copy engine may write it: it writes whole 16 bytes.
fn is_whole(y: &RawMat) -> bool {
    y.dtype.size() == 2 && y.aligned16() && y.cols.is_multiple_of(8)
}

fn expand(stream: &DeviceStream, plan: &Plan<'_>, hopper: &Hopper, dense: &Dense) -> Result<()> {
    let (apply, table) = (args(stream, plan), plan.bank.device_table());
    let ys = || plan.targets().map(|target| target.y.expect("a plan of this half"));
    let whole = ys().all(|y| is_whole(&y));
    let (mut maps, mut targets) =
        ([LswMap::default(); LSW_APPLY_TARGETS as usize], [LswExpand90Target::default(); LSW_APPLY_TARGETS as usize]);
    let mut tiles = 0;
    for (i, (target, y)) in plan.targets().zip(ys()).enumerate() {
        let factors = apply.targets[i].factors;
        let first_entry = (factors - table.addr()) / size_of::<LswFactor>() as u64;
        targets[i] = LswExpand90Target {
            factors,
            maps: table.maps() + first_entry * 2 * size_of::<LswMap>() as u64,
            y: y.addr,
            y_stride: y.stride,
            out: target.out_features,
            begin: tiles,
        };
        if whole && !y.is_empty() {
            maps[i] = boxes(&y, 64, 64)?;
        }
        tiles += plan.rows.div_ceil(LSW_SWITCH90_TILE) * target.out_features.div_ceil(LSW_SWITCH90_TILE);
    }
    if tiles == 0 {
        return Ok(());
    }
    let width = u64::from(apply.slots * dense.depth);
    let cols = u64::from(apply.count) * width;
    let products = RawMat { addr: dense.products, dtype: DType::Bf16, rows: plan.rows.into(), cols, stride: cols, ..plan.products };
    let blocks = tiles.min(hopper.processors);
    let args = LswExpand90Args {
        maps,
        products_map: of_targets(&products, width, LSW_SWITCH90_TILE)?,
        targets,
        products: dense.products,
        used: dense.used,
        rows: plan.rows,
        slots: apply.slots,
        count: apply.count,
        depth: dense.depth,
        overwrites: plan.overwrites.into(),
        y_type: apply.y_type,
        tiles: tiles / blocks,
        longer: tiles % blocks,
        used_stride: dense.used_stride,
        padding: [0; 3],
    };
    let function = if whole { hopper.apply.expand } else { hopper.apply.expand_any };
    let grid = Grid { blocks, threads: LSW_EXPAND90_THREADS, shared: LSW_EXPAND90_SHARED };
    // SAFETY: as above, and maps of what is whole. Before it waits, the kernel reads the bank alone.
    unsafe { launch_dependent(stream, function, grid, &args) }
}
