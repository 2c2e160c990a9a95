//! The gate's launches.

use super::args::{
    LSW_GATE_CHAIN, LSW_GATE_EXPERTS, LSW_GATE_FUSED, LSW_GATE_MANY, LSW_GATE_PROJECT_TOKENS, LSW_GATE_PROJECT_TOKENS_32BIT,
    LSW_GATE_RANKS, LSW_GATE_SHARED, LSW_GATE_SHARED_MANY, LSW_GATE_SHARED_TILE, LSW_GATE_THREADS, LSW_GATE_TILE_EXPERTS,
    LSW_GATE_TILE_TOKENS, LSW_GATE_TOKENS, LSW_GATE_WORDS, LswGateArgs,
};
use super::context::{DeviceStream, by_dtype};
use super::launch::{Grid, launch_clustered, launch_dependent};
use super::route::{WORKSPACE_BYTES, choice_args, is_plain, launch_args};
use crate::dtype::DType;
use crate::error::Result;
use crate::gate::Plan;
use crate::view::RawMat;

const WARPS: u64 = LSW_GATE_THREADS as u64 / 32;
const BEYOND_FUSED: u32 = LSW_GATE_FUSED + 1;

/// Logits that a row of the workspace holds: 16-byte loads serve them.
fn row(experts: u32) -> u64 {
    u64::from(experts).next_multiple_of(4)
}

/// The counters, then words that blocks hand to each other, which stay zero, then for many tokens the logits, which do not.
pub(crate) fn workspace_bytes(tokens: u32, experts: u32) -> u64 {
    let rows = |tokens: u32| 4 * u64::from(tokens) * row(experts);
    WORKSPACE_BYTES
        + match tokens {
            0..=LSW_GATE_FUSED => rows(tokens) * u64::from(LSW_GATE_RANKS),
            _ => u64::from(LSW_GATE_WORDS) + rows(tokens),
        }
}

/// Which kernel multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    /// One launch; blocks hand parts of logits to each other.
    Parts,
    /// One launch; clusters add them up, and hand logits to each other where there are more than [`LSW_GATE_EXPERTS`] experts.
    Clusters,
    /// The same with larger tiles, of rows that are aligned and chains that are whole.
    ManyClusters,
    /// A launch before the router's.
    Project,
    /// The same by tiles.
    ProjectTiles,
}

/// Tokens up to which parts are handed over: a token's parts are eight times its logits, but come without a stop in between.
const FEW: u32 = 2;

impl Path {
    fn of(stream: &DeviceStream, plan: &Plan, is_aligned: bool) -> Self {
        let (tokens, has_halves) = (plan.choice.tokens, plan.x.dtype.size() == 2);
        let is_whole = is_aligned && plan.x.cols.is_multiple_of(u64::from(LSW_GATE_CHAIN));
        let is_one_tile = plan.choice.experts <= LSW_GATE_EXPERTS;
        match tokens {
            BEYOND_FUSED.. if has_halves && is_aligned => Self::ProjectTiles,
            BEYOND_FUSED.. => Self::Project,
            _ if !stream.device().has_dependent_launch || stream.portable => Self::Parts,
            0..=FEW if !is_one_tile => Self::Parts,
            _ if has_halves && is_whole && !is_one_tile => Self::ManyClusters,
            _ => Self::Clusters,
        }
    }

    /// Experts, tokens and shared memory of a block.
    fn tile(self) -> (u32, u32, u32) {
        match self {
            Self::Parts | Self::Clusters => (LSW_GATE_EXPERTS, LSW_GATE_TOKENS, LSW_GATE_SHARED),
            Self::ManyClusters => (LSW_GATE_MANY, LSW_GATE_MANY, LSW_GATE_SHARED_MANY),
            Self::Project => (LSW_GATE_EXPERTS, 0, 0),
            Self::ProjectTiles => (LSW_GATE_TILE_EXPERTS, LSW_GATE_TILE_TOKENS, LSW_GATE_SHARED_TILE),
        }
    }

    fn is_fused(self) -> bool {
        !matches!(self, Self::Project | Self::ProjectTiles)
    }
}

pub(crate) fn launch(stream: &DeviceStream, plan: &Plan) -> Result<()> {
    let choice = &plan.choice;
    let is_aligned = plan.x.aligned16() && plan.weight.aligned16();
    let path = Path::of(stream, plan, is_aligned);
    let parts = choice.workspace + WORKSPACE_BYTES + if path.is_fused() { 0 } else { u64::from(LSW_GATE_WORDS) };
    let logits = RawMat { addr: parts, dtype: DType::F32, stride: row(choice.experts), ..plan.x };
    let args = LswGateArgs {
        route: choice_args(stream, choice, logits),
        x: plan.x.addr,
        weight: plan.weight.addr,
        weight_bias: plan.weight_bias.map_or(0, |bias| bias.addr),
        parts,
        x_stride: plan.x.stride,
        weight_stride: plan.weight.stride,
        hidden: plan.x.cols,
        parts_stride: logits.stride,
        chains: plan.x.cols.div_ceil(u64::from(LSW_GATE_CHAIN * LSW_GATE_RANKS) * WARPS) as u32,
        tiles: choice.experts.div_ceil(path.tile().0),
        aligned: is_aligned.into(),
        clustered: matches!(path, Path::Clusters | Path::ManyClusters).into(),
    };
    // SAFETY: a checked plan: device memory of the stated shapes and a workspace of the stated size, which the caller's views keep
    // borrowed in stream order. Beyond the fused kernels' tokens, the projection writes the logits that the router reads.
    unsafe {
        if choice.tokens > 0 {
            multiply(stream, plan, path, &args)?;
        }
        if choice.tokens == 0 || !path.is_fused() { launch_args(stream, 0, choice, &args.route) } else { Ok(()) }
    }
}

/// # Safety
/// Addresses are as the kernel's contract says, and `args` are of this path.
unsafe fn multiply(stream: &DeviceStream, plan: &Plan, path: Path, args: &LswGateArgs) -> Result<()> {
    let (kernels, kind, dtype) = (&stream.device().kernels, usize::from(!is_plain(&plan.choice)), by_dtype(plan.x.dtype));
    let (_, tokens, shared) = path.tile();
    let tiles = |tokens: u32| u64::from(plan.choice.tokens.div_ceil(tokens)) * u64::from(args.tiles);
    let each = if plan.x.dtype.size() == 2 { LSW_GATE_PROJECT_TOKENS } else { LSW_GATE_PROJECT_TOKENS_32BIT };
    let (kernel, blocks) = match path {
        Path::Parts | Path::Clusters => (kernels.gate[kind][dtype], tiles(tokens) * u64::from(LSW_GATE_RANKS)),
        Path::ManyClusters => (kernels.gate_many[kind][dtype - 1], tiles(tokens) * u64::from(LSW_GATE_RANKS)),
        Path::Project => (kernels.gate_project[dtype], tiles(each).div_ceil(WARPS)),
        Path::ProjectTiles => (kernels.gate_project_tile[dtype - 1], tiles(tokens)),
    };
    let grid = Grid { blocks: blocks as u32, threads: LSW_GATE_THREADS, shared };
    // SAFETY: the caller's promise; the kernels wait for the work before them.
    unsafe {
        match args.clustered {
            0 => launch_dependent(stream, kernel, grid, args),
            _ => launch_clustered(stream, kernel, grid, LSW_GATE_RANKS, args),
        }
    }
}
