//! A product and its unmerged adapters in one launch, for few rows: a decode step's matrices.

use crate::apply::{self, MAX_TARGETS, Routes, Y_NAMES, apply_workspace_bytes, targets_from};
use crate::bank::AdapterBank;
use crate::check::{Checked, Named, narrow};
use crate::cuda::args::{LSW_LINEAR_TOKENS, LSW_MAX_K, LswLinearHandOver};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};
use std::ops::Range;

/// How a [`linear`] is ordered after what comes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinearOptions {
    /// Of all that the call reads, the work directly before it on the stream (its last kernel launch, say) writes x alone; weights,
    /// adapters, the bank's slots, ids, gates and row map are older. Then, on CUDA, they are read while that work still runs, which hides
    /// the start of the launch. Where that work starts early itself, as a dependent launch, like `route`, `gate` and, of a small set on
    /// Hopper, `SwitchSet::to`, the same is asked of what comes before it. Default: false, and nothing but prefetches into the L2 cache
    /// comes early.
    pub only_x_is_new: bool,
    /// Blocks do not wait for each other's part of A x, but each computes all of it, as they do where others do not come to run: for tests.
    /// The bits are the same. Default: false.
    pub alone: bool,
}

/// The most rows of one call.
const MAX_ROWS: u64 = LSW_LINEAR_TOKENS as u64;
/// What the workspace begins with.
const HEAD_BYTES: u64 = size_of::<LswLinearHandOver>() as u64;
const NAMES: [&str; MAX_TARGETS] =
    ["weights[0]", "weights[1]", "weights[2]", "weights[3]", "weights[4]", "weights[5]", "weights[6]", "weights[7]"];

/// A checked call.
pub(crate) struct Plan<'b> {
    /// Adapters, x and y.
    pub apply: apply::Plan<'b>,
    /// Of the targets of `apply`.
    pub weights: [Option<RawMat>; MAX_TARGETS],
    /// Where the workspace begins: counters, zero between launches.
    pub hand_over: u64,
    pub options: LinearOptions,
}

/// Bytes of workspace that [`linear`] needs for these targets, which share their input, and for `rows` rows with routes of `k`.
///
/// # Errors
/// On targets or sizes that `linear` would refuse.
pub fn linear_workspace_bytes(bank: &AdapterBank, targets: Range<u64>, rows: u64, k: u64) -> Result<u64> {
    narrow("rows", rows, MAX_ROWS)?;
    Ok(HEAD_BYTES + apply_workspace_bytes(bank, targets, rows, k)?)
}

/// The product of 1 to 8 rows with the weights of a group of targets that share their input (q, k, v; gate, up), and what [`apply`]
/// would add: `y_i[r] = W_i x[r] + sum over the entries (id, gate) of row r's route of gate * scale * B (A x[r])`, with A, B and scale of
/// slot id and target `first + i` of the bank. One launch streams the weights, and does the adapters' work beside that.
///
/// - `weights`: one matrix `[out_features, in_features]` a target, 1 to 8 of them, for the bank's targets from `first` on, whose
///   in_features are equal; the bank's dtype. A set's merged weights serve as well as its base: then the adapters come on top.
/// - `x [rows, in_features]`: the bank's dtype; 0 to 8 rows.
/// - `routes`: as for `apply`; k = 0 for the product alone. A row of no item has no adapters.
/// - `y`: one matrix `[rows, out_features]` a target; f32, f16 or bf16, all of one dtype. Written only.
/// - `workspace` u8, at least [`linear_workspace_bytes`], a multiple of 16 bytes in address: its first 16 bytes are zeros before the
///   first call. Every call leaves zeros there, so nobody clears them between calls or replays. Calls that share a workspace are ordered
///   one after the other.
///
/// Row strides are free everywhere. Addresses need the alignment of an element; full speed needs multiples of 16 bytes for weights and x
/// (strides included). The y share no memory with each other nor with anything else of the call.
///
/// Numbers: all operands enter as stored. The products and the sum over the route are in f32, in a fixed order, on tensor cores for 16
/// bits; W x and what the adapters add are each such a sum, and their sum is rounded once to y. A coefficient that is not finite
/// propagates into its own row alone. Deterministic, and a row's bits depend neither on the other rows nor on their number.
///
/// On CUDA one launch is enqueued, as a dependent of the one before where the card knows that (9.0 and newer). Its blocks wait for each
/// other, but none for longer than a millisecond. Captured in a graph, it serves every route and every refill of a slot. The weights are read once for all rows, and the adapters once for each row.
/// [`take_odd`](Stream::take_odd) tells of ids out of range and of coefficients that are not finite.
///
/// # Errors
/// On targets, shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
///
/// [`apply`]: crate::apply()
#[expect(clippy::too_many_arguments, reason = "each is a matrix of its own shape, as in the C ABI")]
pub fn linear(
    stream: &Stream,
    options: LinearOptions,
    bank: &AdapterBank,
    first: u64,
    weights: &[Mat<'_>],
    x: &Mat<'_>,
    routes: &Routes<'_>,
    y: &mut [MatMut<'_>],
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    let workspace = check_workspace(bank, targets_from(first, y), x.raw, routes, workspace.raw.expect("workspace"))?;
    let behind_head = RawMat { addr: workspace.mat.addr + HEAD_BYTES, cols: workspace.mat.cols - HEAD_BYTES, ..workspace.mat };
    let apply = apply::check(stream, bank, targets_from(first, y), Some(x.raw), routes, y, behind_head)?;
    let head = RawMat { cols: HEAD_BYTES, ..workspace.mat }.expect("workspace");
    let plan = Plan { weights: check_weights(stream, &apply, weights, y, workspace)?, apply, hand_over: head.mat.addr, options };
    let inputs = [x.raw.expect("x"), routes.ids.raw.expect("ids"), routes.gates.raw.expect("gates")];
    head.on(stream)?.disjoint_from(&inputs)?;
    head.disjoint_from(routes.row_map.map(|map| map.raw.expect("row_map")).as_slice())?;
    for (y, name) in y.iter().zip(Y_NAMES) {
        y.raw.expect(name).disjoint_from(&[head])?;
    }
    match &stream.0 {
        _ if plan.apply.rows == 0 || plan.apply.targets().all(|t| t.out_features == 0) => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::linear::linear(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::linear::linear(stream, &plan),
    }
}

/// Large enough, and the rows few enough.
fn check_workspace<'n>(bank: &AdapterBank, targets: Range<u64>, x: RawMat, routes: &Routes<'_>, workspace: Named<'n>) -> Result<Named<'n>> {
    narrow("x.rows", x.rows, MAX_ROWS)?;
    narrow("ids.cols", routes.ids.cols(), u64::from(LSW_MAX_K))?;
    let needed = linear_workspace_bytes(bank, targets, x.rows, routes.ids.cols())?;
    workspace.dtype_in(&[DType::U8])?.rows(1, "a vector")?;
    if workspace.mat.cols < needed {
        return Err(Error::argument("workspace.cols", workspace.mat.cols, format!("at least {needed} bytes")));
    }
    if !workspace.mat.addr.is_multiple_of(16) {
        return Err(Error::argument("workspace.data", format!("{:#x}", workspace.mat.addr), "a multiple of 16 bytes"));
    }
    workspace.memory()
}

/// One for each target, disjoint from all that the call writes.
fn check_weights(
    stream: &Stream,
    apply: &apply::Plan<'_>,
    weights: &[Mat<'_>],
    y: &[MatMut<'_>],
    workspace: Named<'_>,
) -> Result<[Option<RawMat>; MAX_TARGETS]> {
    if weights.len() != y.len() {
        return Err(Error::argument("weights", weights.len(), format!("{}, one for each y", y.len())));
    }
    let mut checked = [None; MAX_TARGETS];
    for ((i, target), weight) in apply.targets().enumerate().zip(weights) {
        let weight = weight.raw.expect(NAMES[i]).dtype_in(&[apply.bank.dtype()])?;
        weight.rows(u64::from(target.out_features), "the target's out_features")?;
        let cols = apply.x.expect("a plan of both halves").cols;
        weight.cols(cols, "the targets' in_features")?.memory()?.on(stream)?;
        workspace.disjoint_from(&[weight])?;
        for (y, name) in y.iter().zip(Y_NAMES) {
            y.raw.expect(name).disjoint_from(&[weight])?;
        }
        checked[i] = Some(weight.mat);
    }
    Ok(checked)
}
