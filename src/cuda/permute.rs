//! Launches of gather-scatter.

use super::args::{
    LSW_COMBINE_PACKS, LSW_MOVE_THREADS, LSW_PERMUTE_DIGITS, LSW_PERMUTE_MAX_BLOCKS, LSW_PERMUTE_ROUNDS, LSW_PERMUTE_THREADS,
    LswCombineArgs, LswGatherArgs, LswPermuteArgs,
};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch};
use crate::error::Result;
use crate::permute::{CombinePlan, GatherPlan, MapsPlan};
use crate::view::RawMat;

/// The digits of a sort in two passes.
const RADIX: u32 = 256;

/// How a call is cut up. Offsets are those of the parts of the workspace, in words.
struct Cut {
    two_passes: bool,
    blocks: u32,
    /// Items that each block sorts.
    run: u32,
    /// Items of each expert; of a sort in two passes, as is all that follows.
    histogram: u64,
    /// Where experts begin without padding.
    begin: u64,
    /// The order after the first pass.
    order: u64,
    /// Where its digits begin.
    digits: u64,
    /// The words in all. What comes first is a count for each block and digit.
    end: u64,
}

fn cut(items: u32, experts: u32) -> Cut {
    let two_passes = experts > LSW_PERMUTE_DIGITS;
    let tile = LSW_PERMUTE_THREADS * LSW_PERMUTE_ROUNDS;
    let run = items.div_ceil(LSW_PERMUTE_MAX_BLOCKS).max(1).next_multiple_of(tile);
    // So many experts are work for all blocks, with and without items.
    let blocks = if two_passes { LSW_PERMUTE_MAX_BLOCKS } else { items.div_ceil(run).max(1) };
    let counts = blocks * if two_passes { RADIX } else { experts };
    let histogram = if blocks == 1 { 0 } else { u64::from(counts) };
    let begin = histogram + u64::from(experts);
    let order = begin + u64::from(experts) + 1;
    let digits = order + u64::from(items);
    let end = if two_passes { digits + u64::from(RADIX) + 1 } else { histogram };
    Cut { two_passes, blocks, run, histogram, begin, order, digits, end }
}

pub(crate) fn workspace_bytes(items: u32, experts: u32) -> u64 {
    4 * cut(items, experts).end
}

pub(crate) fn maps(stream: &DeviceStream, plan: &MapsPlan) -> Result<()> {
    let cut = cut(plan.items, plan.experts);
    let all = LswPermuteArgs {
        ids: plan.ids.addr,
        offsets: plan.offsets.addr,
        row_map: plan.row_map.addr,
        inverse: plan.inverse.addr,
        block_experts: plan.block_experts.map_or(0, |mat| mat.addr),
        status: stream.device().odd_word(),
        counts: plan.workspace,
        ids_stride: plan.ids.stride,
        inverse_stride: plan.inverse.stride,
        items: plan.items,
        k: plan.k,
        all_experts: plan.all_experts,
        first: plan.first,
        experts: plan.experts,
        digits: plan.experts,
        digit_bits: bits(plan.experts),
        digit_mask: u32::MAX,
        block: plan.block,
        rows: plan.row_map.cols as u32,
        row_blocks: plan.block_experts.map_or(0, |mat| mat.cols as u32),
        filler: plan.filler,
        blocks: cut.blocks,
        run: cut.run,
        ..LswPermuteArgs::default()
    };
    if !cut.two_passes {
        return sort(stream, &all);
    }
    let at = |words: u64| plan.workspace + 4 * words;
    let low = LswPermuteArgs {
        offsets: at(cut.digits),
        row_map: at(cut.order),
        rows: 0,
        row_blocks: 0,
        block: 1,
        histogram: at(cut.histogram),
        digits: RADIX,
        digit_bits: bits(RADIX),
        digit_mask: RADIX - 1,
        ..all
    };
    let digits = plan.experts.div_ceil(RADIX);
    let high = LswPermuteArgs {
        histogram: at(cut.histogram),
        begin: at(cut.begin),
        order: at(cut.order),
        order_count: at(cut.digits + u64::from(RADIX)),
        digits,
        digit_bits: bits(digits),
        digit_shift: RADIX.ilog2(),
        ..all
    };
    {
        let _entered = stream.device().enter()?;
        stream.fill_u32(at(cut.histogram), 0, u64::from(plan.experts))?;
    }
    sort(stream, &low)?;
    let grid = Grid { blocks: plan.experts.div_ceil(LSW_PERMUTE_THREADS), threads: LSW_PERMUTE_THREADS, shared: 0 };
    // SAFETY: a checked plan: device memory of the stated shapes, a workspace of the stated size, all kept by the caller's views.
    unsafe { launch(stream, stream.device().kernels.permute_scan, grid, &high) }?;
    sort(stream, &high)
}

/// Bits that tell this many digits apart.
fn bits(digits: u32) -> u32 {
    digits.next_power_of_two().ilog2()
}

/// One pass. A block that is alone has all counts in its tile.
fn sort(stream: &DeviceStream, args: &LswPermuteArgs) -> Result<()> {
    let kernels = &stream.device().kernels;
    let count = Grid { blocks: args.blocks, threads: LSW_PERMUTE_THREADS, shared: 4 * args.digits };
    let ranks = LSW_PERMUTE_THREADS / 32 * args.digits.next_multiple_of(2);
    let scatter = Grid { shared: 4 * (3 * args.digits + 1) + 2 * ranks, ..count };
    // SAFETY: as above: the arguments come from a checked plan.
    unsafe {
        if args.blocks > 1 {
            launch(stream, kernels.permute_count, count, args)?;
        }
        launch(stream, kernels.permute_scatter, scatter, args)
    }
}

/// The widest access that fits these matrices, as an index into the gather kernels, and its bytes.
fn unit(mats: &[&RawMat]) -> (usize, u64) {
    let fits = |bytes: u64| {
        let whole = |m: &&RawMat| [m.addr, m.stride.wrapping_mul(m.dtype.size()), m.cols * m.dtype.size()].iter().all(|x| x % bytes == 0);
        mats.iter().all(whole)
    };
    let units = [16, 4, 2, 1];
    let found = units.iter().position(|&bytes| fits(bytes)).expect("everything is whole bytes");
    (found, units[found])
}

/// Warps for pieces of `width` units of each row, and the pieces; a warp takes more where there would be too many.
fn pieces(rows: u64, units: u64, width: u64) -> (u32, u32) {
    let pieces = units.div_ceil(width).min(u64::from(u32::MAX) / rows).max(1);
    ((rows * pieces) as u32, pieces as u32)
}

fn grid(warps: u32) -> Grid {
    Grid { blocks: warps.div_ceil(LSW_MOVE_THREADS / 32), threads: LSW_MOVE_THREADS, shared: 0 }
}

pub(crate) fn gather(stream: &DeviceStream, plan: &GatherPlan) -> Result<()> {
    let (kernel, bytes) = unit(&[&plan.x, &plan.rows]);
    // Wrapping: the stride of a single row is unbounded, and not used.
    let in_units = |elements: u64| elements.wrapping_mul(plan.x.dtype.size()) / bytes;
    let units = in_units(plan.x.cols);
    let (warps, pieces) = pieces(plan.x.rows, units, 32);
    let args = LswGatherArgs {
        x: plan.x.addr,
        inverse: plan.inverse.addr,
        rows: plan.rows.addr,
        x_stride: in_units(plan.x.stride),
        rows_stride: in_units(plan.rows.stride),
        units,
        inverse_stride: plan.inverse.stride,
        k: plan.inverse.cols as u32,
        row_count: plan.rows.rows as u32,
        warps,
        pieces,
    };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views.
    unsafe { launch(stream, stream.device().kernels.gather[kernel], grid(warps), &args) }
}

pub(crate) fn combine(stream: &DeviceStream, plan: &CombinePlan) -> Result<()> {
    let mats: Vec<&RawMat> = [&plan.rows, &plan.y].into_iter().chain(&plan.residual).collect();
    let aligned = unit(&mats).1 == 16;
    let width = if aligned { 16 / plan.y.dtype.size() } else { 1 };
    let (warps, pieces) = pieces(plan.y.rows, plan.y.cols, 32 * width * u64::from(LSW_COMBINE_PACKS));
    let args = LswCombineArgs {
        rows: plan.rows.addr,
        inverse: plan.inverse.addr,
        gates: plan.gates.addr,
        residual: plan.residual.map_or(0, |mat| mat.addr),
        y: plan.y.addr,
        rows_stride: plan.rows.stride,
        inverse_stride: plan.inverse.stride,
        gates_stride: plan.gates.stride,
        residual_stride: plan.residual.map_or(0, |mat| mat.stride),
        y_stride: plan.y.stride,
        cols: plan.y.cols,
        k: plan.inverse.cols as u32,
        row_count: plan.rows.rows as u32,
        warps,
        pieces,
        scale: plan.scale,
        aligned: aligned.into(),
    };
    // SAFETY: a checked plan: device memory of the stated shapes, kept by the caller's views.
    unsafe { launch(stream, stream.device().kernels.combine[by_dtype(plan.y.dtype)], grid(warps), &args) }
}
