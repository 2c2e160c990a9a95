//! Unmerged adapters: each row of a batch under its own route, with the weights left as they are.

use crate::bank::AdapterBank;
use crate::check::{Checked, MAX_COUNT, Named, narrow};
use crate::cuda::args::{
    LSW_APPLY_MANY, LSW_APPLY_TARGETS, LSW_DENSE_RANKS, LSW_DENSE_STEP, LSW_FEW_COLUMNS, LSW_FEW_SLICES, LSW_MAX_K, LSW_SWITCH90_TILE,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};
use std::ops::Range;

/// Which adapters each row of a batch gets, and how much of them.
///
/// - `ids [items, k]` i32 and `gates [items, k]` f32, as [`route`](crate::route()) writes them; k from 0 to 32.
/// - `row_map [rows]` i32, or none: row r of the batch has the route of item `row_map[r]`; rows whose entry names no item (-1) are left
///   alone. Without it, row r has the route of item r. With the map of [`permute`](crate::permute()) and one route for each of its
///   items, adapters serve the experts of a mixture: a slot is then an adapter of an expert.
///
/// A row's route is taken in the canonical form of a [`SwitchSet`](crate::SwitchSet): an id outside the bank's slots is none;
/// duplicates add up in f32 in order of appearance; entries sort by id, so a permuted route gives the same bits. The coefficient of a
/// slot at a target is gate * scale, in f32; where it is zero, or the rank is, the adapter is not touched at all, even one full of NaN.
#[derive(Debug)]
pub struct Routes<'a> {
    /// Slots of the bank; -1: none.
    pub ids: &'a Mat<'a>,
    /// Their gates.
    pub gates: &'a Mat<'a>,
    /// From rows to items.
    pub row_map: Option<&'a Mat<'a>>,
}

/// The most targets of one call.
pub(crate) const MAX_TARGETS: usize = LSW_APPLY_TARGETS as usize;
pub(crate) const Y_NAMES: [&str; MAX_TARGETS] = ["y[0]", "y[1]", "y[2]", "y[3]", "y[4]", "y[5]", "y[6]", "y[7]"];

/// Elements of y that a launch reaches: blocks of 128, fewer than 2^31 with those that are not whole.
const MAX_OUTPUTS: u64 = (1 << 32) - 1;

/// Ranks, and the outputs of a sum that waits for its y, are padded to this many f32 in the workspace.
const STEP: u64 = 8;

/// A target of a checked call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupTarget {
    /// In the bank.
    pub index: u32,
    pub rank_cap: u32,
    pub out_features: u32,
    /// Of the products' rows, where this target's begin.
    pub column: u32,
    /// Likewise of the sums'.
    pub sum_column: u64,
    /// To add to, or to overwrite; none in the first half.
    pub y: Option<RawMat>,
}

/// Consecutive targets of a bank that share their input.
struct Group {
    targets: [Option<GroupTarget>; MAX_TARGETS],
    in_features: u64,
    /// f32 of A x for one entry of one row's route.
    width: u32,
    /// f32 of what is added to one row.
    sum_width: u64,
}

impl Group {
    /// Of x, in which up to 64 rows in 16 bits compute A x.
    fn slices(&self) -> u32 {
        self.in_features.div_ceil(u64::from(LSW_FEW_COLUMNS)).clamp(1, u64::from(LSW_FEW_SLICES)) as u32
    }
}

/// Of many rows, where a bank has few small ranks in all: A x of all its slots, which is what the Hopper path has between its halves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dense {
    /// Ranks of each slot: the targets' largest, and zeros up to a multiple of 16.
    pub depth: u32,
    /// The products, scaled; zeros for slots that are not in a row's route. bf16 [rows, targets, slots, depth].
    pub products: u64,
    /// Slots that a row takes at a target: bits of a u32 [targets, used_stride].
    pub used: u64,
    pub used_stride: u32,
}

/// A checked call: both halves of it, or either.
#[derive(Clone, Copy)]
pub(crate) struct Plan<'b> {
    pub bank: &'b AdapterBank,
    pub targets: [Option<GroupTarget>; MAX_TARGETS],
    /// None where the second half alone is asked for.
    pub x: Option<RawMat>,
    pub ids: RawMat,
    pub gates: RawMat,
    pub row_map: Option<RawMat>,
    /// A x, f32 [rows k, width]: of row r and the p-th entry of its canonical route, in row r k + p.
    pub products: RawMat,
    /// What is added to each row, f32 [rows, all targets' outputs], which waits there for y: of up to 64 rows in 16 bits, between the halves.
    pub sums: RawMat,
    /// Where a permutation of many rows has its place, u32 [rows], and behind it their canonical routes.
    pub order: Option<u64>,
    /// In the workspace's place of products and order.
    pub dense: Option<Dense>,
    /// See `Group::slices`.
    pub slices: u32,
    pub rows: u32,
    pub k: u32,
    /// y is zero, whatever it holds.
    pub overwrites: bool,
}

impl Plan<'_> {
    pub fn targets(&self) -> impl Iterator<Item = &GroupTarget> {
        self.targets.iter().flatten()
    }

    pub fn is_empty(&self) -> bool {
        self.products.is_empty()
    }
}

/// Bytes of workspace that [`apply`] needs for these targets, which share their input, and for `rows` rows with routes of `k`. Fewer
/// rows never need more.
///
/// # Errors
/// On targets or sizes that `apply` would refuse.
pub fn apply_workspace_bytes(bank: &AdapterBank, targets: Range<u64>, rows: u64, k: u64) -> Result<u64> {
    let group = check_group(bank, targets)?;
    let rows = narrow("rows", rows, MAX_COUNT)?;
    let k = narrow("k", k, u64::from(LSW_MAX_K))?;
    Ok(Sizes::new(&group, bank, rows, k)?.bytes())
}

/// Adds to each row what its adapters make of its input, for a group of targets that share it (q, k, v; gate, up):
/// `y_i[r] += sum over the entries (id, gate) of row r's route of gate * scale * B (A x[r])`, with A, B and scale of slot id and target
/// `first + i` of the bank. (A LoRA layer as in arXiv 2106.09685, with the experts weighted as in arXiv 2405.17741.)
///
/// - `x [rows, in_features]`: the bank's dtype.
/// - `y`: one matrix `[rows, out_features]` a target, 1 to 8 of them, for the bank's targets from `first` on, whose in_features are
///   equal; f32, f16 or bf16, all of one dtype. Each is read and written once; a row that no adapter touches keeps its bits.
/// - `workspace` u8, at least [`apply_workspace_bytes`], a multiple of 16 bytes in address. Its content does not matter; it is free
///   again when the work is done.
///
/// Row strides are free everywhere, so that a slice of a fused output works. Addresses need the alignment of an element; 16-byte
/// accesses serve where those of x, A and B (strides included) are multiples of 16 bytes. The y share no memory with each other nor
/// with anything else of the call.
///
/// Numbers: x, A and B enter as stored. Both products and the sum over the route are in f32, in a fixed order; A x stays f32 (tensor
/// cores take it in parts, to 2^-22 or better, and scaled by the coefficient); y is rounded once. A coefficient that is not finite
/// propagates into its own row alone. Deterministic, and a row's bits do not depend on the other rows; nor on their number, but that a bank
/// of 16 bits on CUDA takes another path above 64 rows. On Hopper that is a dense path where the bank is bf16 and its slots together may have
/// at most 128 ranks (each the targets' largest rank_cap, in steps of 16): A x, scaled, is rounded to bf16 there, as B is already. It reads
/// the adapters of all slots, and no row sees those that are not in its route (but that the last bits may differ where B of one of them is
/// not finite: the row's sum is then made anew, in another order).
///
/// On CUDA two launches are enqueued (three above 64 rows in 16 bits, but on the dense path), each as a dependent of the one before where
/// the card knows that (9.0 and newer). Captured in a graph, they serve every route and every refill of a slot; nothing of a route is ever
/// on the host. In f32 the adapters are read again for each row.
/// [`take_odd`](Stream::take_odd) tells of ids out of range and of coefficients that are not finite.
///
/// # Errors
/// On targets, shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn apply(
    stream: &Stream,
    bank: &AdapterBank,
    first: u64,
    x: &Mat<'_>,
    routes: &Routes<'_>,
    y: &mut [MatMut<'_>],
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    run(stream, &check(stream, bank, targets_from(first, y), Some(x.raw), routes, y, workspace.raw)?, Part::Whole)
}

/// [`apply`] to zeros: `y_i[r] = sum over the entries ...`, whatever y held, and zeros for a row that no adapter touches. For a base
/// product behind it that adds to what it finds (beta = 1). y then need not wait for that product, but is written before it; many rows of
/// y are not read here, and the product reads them while it multiplies. Two roundings, as with `apply`, but that of a small sum in the
/// place of that of the product.
///
/// All else is as for `apply`. On CUDA each y is a memset more, but on the dense path.
///
/// # Errors
/// As for `apply`.
pub fn apply_into(
    stream: &Stream,
    bank: &AdapterBank,
    first: u64,
    x: &Mat<'_>,
    routes: &Routes<'_>,
    y: &mut [MatMut<'_>],
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    let plan = check(stream, bank, targets_from(first, y), Some(x.raw), routes, y, workspace.raw)?;
    run(stream, &Plan { overwrites: true, ..plan }, Part::Whole)
}

/// The first half of [`apply`], into the workspace: all that does not need y, so that it may run beside the base product that writes y,
/// on another stream; one of high priority, since its few blocks would otherwise wait behind the product's. Of up to 64 rows in 16
/// bits that is everything but the addition to y; of others, A x of all adapters in the rows' routes.
///
/// The second half, [`apply_finish`], is ordered after both and gets the same targets, routes and workspace. In between nobody writes
/// the workspace, ids, gates and row map, nor any slot of the bank. Together they give the bits of `apply`; what is odd is known after
/// both.
///
/// On CUDA two launches are enqueued, in f32 and on the dense path one.
///
/// # Errors
/// As for `apply`.
pub fn apply_begin(
    stream: &Stream,
    bank: &AdapterBank,
    targets: Range<u64>,
    x: &Mat<'_>,
    routes: &Routes<'_>,
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    run(stream, &check(stream, bank, targets, Some(x.raw), routes, &[], workspace.raw)?, Part::Begin)
}

/// The second half of [`apply`]: adds to y what the first has left in the workspace, in one launch on CUDA. See [`apply_begin`].
///
/// # Errors
/// As for `apply`.
pub fn apply_finish(
    stream: &Stream,
    bank: &AdapterBank,
    first: u64,
    routes: &Routes<'_>,
    y: &mut [MatMut<'_>],
    workspace: &Mat<'_>,
) -> Result<()> {
    run(stream, &check(stream, bank, targets_from(first, y), None, routes, y, workspace.raw)?, Part::Finish)
}

/// What of a call is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    Begin,
    Finish,
}

fn run(stream: &Stream, plan: &Plan<'_>, part: Part) -> Result<()> {
    match &stream.0 {
        StreamKind::Cpu(pool) => {
            crate::cpu::apply::apply(pool, plan, part);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::apply::apply(stream, plan, part),
    }
}

pub(crate) fn targets_from(first: u64, y: &[MatMut<'_>]) -> Range<u64> {
    first..first.saturating_add(y.len() as u64)
}

fn check_group(bank: &AdapterBank, targets: Range<u64>) -> Result<Group> {
    let shapes = bank.targets();
    if targets.start >= targets.end || targets.end - targets.start > MAX_TARGETS as u64 || targets.end > shapes.len() as u64 {
        let bound = format!("1 to {MAX_TARGETS} of the bank's {}", shapes.len());
        return Err(Error::argument("targets", format!("{targets:?}"), bound));
    }
    let mut group = Group { targets: [None; MAX_TARGETS], in_features: shapes[targets.start as usize].in_features, width: 0, sum_width: 0 };
    for (target, index) in group.targets.iter_mut().zip(targets) {
        let shape = &shapes[index as usize];
        if shape.in_features != group.in_features {
            let bound = format!("{}, as of the group's first", group.in_features);
            return Err(Error::argument(format!("targets[{index}].in_features"), shape.in_features, bound));
        }
        *target = Some(GroupTarget {
            index: index as u32,
            rank_cap: shape.rank_cap as u32,
            out_features: shape.out_features as u32,
            column: group.width,
            sum_column: group.sum_width,
            y: None,
        });
        group.width += shape.rank_cap.next_multiple_of(STEP) as u32;
        group.sum_width += shape.out_features.next_multiple_of(STEP);
    }
    Ok(group)
}

/// What the workspace holds.
struct Sizes {
    /// Of all routes.
    entries: u64,
    /// Of up to 64 rows in 16 bits: what A x is while it lies in slices. Counted for more rows as well, so that they never need less.
    sliced_entries: u64,
    /// Likewise: f32 that wait for y.
    sums: u64,
    width: u64,
    ordered_rows: u32,
    /// Of canonical routes, behind the order.
    route_bytes: u64,
    /// `Dense::depth`; 0: there is no such path.
    dense_depth: u32,
    used_stride: u32,
    /// Of its products, and of the slots used.
    dense_bytes: [u64; 2],
}

impl Sizes {
    /// No launch has more blocks than its grid can count.
    fn new(group: &Group, bank: &AdapterBank, rows: u32, k: u32) -> Result<Self> {
        let (entries, width) = (u64::from(rows) * u64::from(k), u64::from(group.width));
        narrow("rows * k * the targets' rank_cap", entries * width, MAX_COUNT)?;
        let outputs: u64 = group.targets.iter().flatten().map(|t| u64::from(t.out_features)).sum();
        narrow("rows * the targets' out_features", u64::from(rows) * outputs, MAX_OUTPUTS)?;
        let is_some = bank.dtype() != DType::F32 && k > 0 && width > 0;
        let is_many = is_some && rows > LSW_APPLY_MANY;
        let (ordered_rows, route_bytes) = if is_many { (rows, entries * 8) } else { (0, 0) };
        let targets = group.targets.iter().flatten();
        let depth = targets.clone().map(|t| t.rank_cap.next_multiple_of(LSW_DENSE_STEP)).max().unwrap_or(0);
        let ranks = bank.slots() * u64::from(depth);
        let is_dense = is_many && bank.dtype() == DType::Bf16 && ranks <= u64::from(LSW_DENSE_RANKS);
        let (count, used_stride) = (targets.count() as u64, rows.next_multiple_of(LSW_SWITCH90_TILE));
        let dense_bytes = [u64::from(rows) * ranks * 2, u64::from(used_stride) * 4].map(|bytes| if is_dense { count * bytes } else { 0 });
        let few_rows = if is_some { rows.min(LSW_APPLY_MANY) } else { 0 };
        let (sliced_entries, sums) = (u64::from(few_rows * k * group.slices()), u64::from(few_rows) * group.sum_width);
        let dense_depth = if is_dense { depth } else { 0 };
        Ok(Self { entries, sliced_entries, sums, width, ordered_rows, route_bytes, dense_depth, used_stride, dense_bytes })
    }

    fn products_bytes(&self) -> u64 {
        self.entries * self.width * 4
    }

    fn order_bytes(&self) -> u64 {
        (u64::from(self.ordered_rows) * 4).next_multiple_of(16)
    }

    /// Where what waits for y begins.
    fn sliced_bytes(&self) -> u64 {
        self.sliced_entries * self.width * 4
    }

    fn bytes(&self) -> u64 {
        let many = self.products_bytes() + self.order_bytes() + self.route_bytes;
        many.max(self.sliced_bytes() + self.sums * 4).max(self.dense_bytes.iter().sum())
    }

    fn dense(&self, workspace: u64) -> Option<Dense> {
        let Self { dense_depth: depth, used_stride, dense_bytes, .. } = *self;
        (depth > 0).then(|| Dense { depth, products: workspace, used: workspace + dense_bytes[0], used_stride })
    }
}

pub(crate) fn check<'b>(
    stream: &Stream,
    bank: &'b AdapterBank,
    targets: Range<u64>,
    x: Option<RawMat>,
    routes: &Routes<'_>,
    y: &[MatMut<'_>],
    workspace: RawMat,
) -> Result<Plan<'b>> {
    bank.check_stream(stream)?;
    let mut group = check_group(bank, targets)?;
    let (ids, gates, workspace) = (routes.ids.raw.expect("ids"), routes.gates.raw.expect("gates"), workspace.expect("workspace"));
    let (x, row_map) = (x.as_ref().map(|x| x.expect("x")), routes.row_map.map(|map| map.raw.expect("row_map")));
    // Each half knows the rows from what it gets: x, or y of one target or more.
    let (name, rows) = x.map_or_else(|| ("y[0].rows", y[0].rows()), |x| ("x.rows", x.mat.rows));
    let rows = narrow(name, rows, MAX_COUNT)?;
    if let Some(x) = x {
        x.dtype_in(&[bank.dtype()])?.cols(group.in_features, "the targets' in_features")?;
    }
    let items = narrow("ids.rows", ids.mat.rows, MAX_COUNT)?;
    let k = narrow("ids.cols", ids.mat.cols, u64::from(LSW_MAX_K))?;
    ids.dtype_in(&[DType::I32])?;
    gates.dtype_in(&[DType::F32])?.rows(u64::from(items), "the items, ids.rows")?.cols(u64::from(k), "k, ids.cols")?;
    match row_map {
        Some(map) => map.dtype_in(&[DType::I32])?.rows(1, "a vector")?.cols(u64::from(rows), "the rows of the batch")?,
        None => ids.rows(u64::from(rows), "the rows of the batch, since there is no row_map")?,
    };
    let sizes = Sizes::new(&group, bank, rows, k)?;
    let products = check_workspace(workspace, &sizes)?;
    for mat in [ids, gates, workspace].into_iter().chain(x).chain(row_map) {
        mat.memory()?.on(stream)?;
    }
    if let Some(x) = x {
        workspace.disjoint_from(&[x, ids, gates])?.disjoint_from(row_map.as_slice())?;
    }
    for (i, (target, y_i)) in group.targets.iter_mut().flatten().zip(y).enumerate() {
        let y_i = y_i.raw.expect(Y_NAMES[i]).dtype_in(if i == 0 { DType::FLOATS } else { std::slice::from_ref(&y[0].raw.dtype) })?;
        y_i.rows(u64::from(rows), "the rows of the batch")?.cols(u64::from(target.out_features), "the target's out_features")?;
        y_i.memory()?.on(stream)?;
        y_i.disjoint_from(&[ids, gates, workspace])?.disjoint_from(x.as_slice())?.disjoint_from(row_map.as_slice())?;
        for (other, name) in y[..i].iter().zip(Y_NAMES) {
            y_i.disjoint_from(&[other.raw.expect(name)])?;
        }
        target.y = Some(y_i.mat);
    }
    Ok(Plan {
        bank,
        targets: group.targets,
        x: x.map(|x| x.mat),
        ids: ids.mat,
        gates: gates.mat,
        row_map: row_map.map(|map| map.mat),
        products,
        sums: RawMat {
            addr: products.addr + sizes.sliced_bytes(),
            rows: u64::from(rows),
            cols: group.sum_width,
            stride: group.sum_width,
            ..products
        },
        slices: group.slices(),
        order: (sizes.ordered_rows > 0).then(|| products.addr + sizes.products_bytes()),
        dense: sizes.dense(products.addr),
        rows,
        k,
        overwrites: false,
    })
}

/// The products' matrix at the workspace's begin.
fn check_workspace(workspace: Named<'_>, sizes: &Sizes) -> Result<RawMat> {
    workspace.dtype_in(&[DType::U8])?.rows(1, "a vector")?;
    let needed = sizes.bytes();
    if workspace.mat.cols < needed {
        return Err(Error::argument("workspace.cols", workspace.mat.cols, format!("at least {needed} bytes")));
    }
    if needed > 0 && !workspace.mat.addr.is_multiple_of(16) {
        return Err(Error::argument("workspace.data", format!("{:#x}", workspace.mat.addr), "a multiple of 16 bytes"));
    }
    Ok(RawMat { dtype: DType::F32, rows: sizes.entries, cols: sizes.width, stride: sizes.width, ..workspace.mat })
}
