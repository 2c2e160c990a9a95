//! The switch set: all adapted weights of a model, brought to a new route in one launch.

use crate::bank::AdapterBank;
use crate::check::{Checked, narrow};
use crate::cuda::args::{LSW_MAX_K, LSW_SWITCH_TILE_COLS, LSW_SWITCH_TILE_ROWS};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::StateMemory;
use crate::stream::{Odd, Stream, StreamKind};
use crate::view::{Mat, MatMut, Place, RawMat, Tensor, Weight};
use std::ops::Range;

/// How a set keeps the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Form {
    /// W = W_base + sum of the route, with W_base in a second buffer. The result depends on the current route alone, bit for bit, after
    /// any number of switches; an empty route copies W_base's bits. Half the arithmetic of the other form, and the same traffic.
    #[default]
    FromBase = 0,
    /// W += new route - old route (LoRA-Switch, arXiv 2405.17741, equation 6). No second buffer; each switch rounds W once, so errors
    /// build up.
    InPlace = 1,
}

/// One adapted matrix: W [out, in], row-major with a stride, of the bank's dtype, and its base where the form asks for one.
#[derive(Debug)]
pub struct Target {
    /// Written by every switch. In place it holds the base weight at first; from base its content does not matter.
    pub weight: Weight,
    /// W_base, for [`Form::FromBase`] only. May be shared between targets and sets.
    pub base: Option<Tensor>,
}

/// Which of a card's kernels switch a set. Their sums are grouped differently, so that bits may differ within the same bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum SwitchKernels {
    /// The fastest that there is for the set. Chosen once, by its shapes and the bank's rank caps and by the card: the same weight may have
    /// other bits in another set.
    #[default]
    Best = 0,
    /// The kernel for any card, even where there is a faster one: for tests and comparisons.
    Portable = 1,
    /// The kernel for large sets, even if the set is small: likewise.
    Large = 2,
}

/// What a set is made with.
#[derive(Debug)]
pub struct SwitchOptions {
    /// From base, or in place.
    pub form: Form,
    /// The widest route that `to` may get: 1 to 32.
    pub k_max: u64,
    /// Which kernels switch it.
    pub kernels: SwitchKernels,
    /// Whose memory holds the set's tables.
    pub memory: StateMemory,
}

impl Default for SwitchOptions {
    fn default() -> Self {
        Self { form: Form::FromBase, k_max: 8, kernels: SwitchKernels::Best, memory: StateMemory::allocate() }
    }
}

/// A target as the backends see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawTarget {
    pub weight: RawMat,
    /// Equal to `weight` in place.
    pub base: RawMat,
}

impl RawTarget {
    pub fn tiles_of(&self, rows: u32, cols: u32) -> u64 {
        self.weight.rows.div_ceil(u64::from(rows)) * self.weight.cols.div_ceil(u64::from(cols))
    }

    /// Of the portable kernel.
    pub fn tiles(&self) -> u64 {
        self.tiles_of(LSW_SWITCH_TILE_ROWS, LSW_SWITCH_TILE_COLS)
    }
}

/// A checked set.
#[derive(Debug)]
pub(crate) struct SetPlan {
    pub bank: AdapterBank,
    pub targets: Vec<RawTarget>,
    pub in_place: bool,
    pub kernels: SwitchKernels,
    pub k_max: u32,
}

/// A checked switch.
pub(crate) struct ToPlan {
    pub ids: u64,
    pub gates: u64,
    pub k: u32,
    pub first: u32,
    pub last: u32,
}

/// All adapted weights of a model and the adapters that they may carry.
///
/// A *route* is `ids [k]` and `gates [k]`, as the router writes them. Canonical form: an id outside the bank's slots is none; duplicates
/// add up in f32 in order of appearance; entries sort by id, so a permuted route gives the same bits. The coefficient of a slot at a
/// target is gate * scale, in f32; where it is zero, or the rank is, the adapter is not touched at all.
///
/// A target whose list of (slot, coefficient, content of the slot) equals what it holds costs no weight traffic. What it holds is kept
/// on the device, so a captured `to` serves every route, and a refilled slot is noticed.
///
/// Numbers: A, B, W enter as stored; products and sums in f32, in a fixed order; one rounding at the end. On CUDA an f32 product is six of
/// bf16 parts, which leave out at most 2^-24 of it (an infinity in A or B makes NaN there). A coefficient that is not finite propagates
/// from base (and the next route heals it); in place it counts as zero, as does one of 2^126 or more in magnitude, since it would destroy
/// W. [`odd`](Self::odd) tells.
///
/// On Hopper, the launch of a small set (in 16 bits, aligned, up to 32 targets and some 1,000 tiles of 128 x 128; fewer where ranks may
/// exceed 64) is a dependent one, like that of [`route`](crate::route()): it starts while the work before it ends, lets dependents start
/// at once, and reads adapters that are in a slot, which nobody writes there, before that work has ended.
///
/// A set is in flight on one stream at a time, replays of graphs included. Memory that it owns through cudarc ties it to one stream;
/// dropped while its work is in flight, it frees in stream order there. Weights by address are the caller's to keep. A CUDA graph that
/// captured a set's calls holds the addresses of the set, its bank and their memory, and keeps none of them alive: it must not be
/// replayed once they are gone.
#[derive(Debug)]
pub struct SwitchSet {
    plan: SetPlan,
    state: State,
    tied_to: Option<usize>,
    /// Keeps the weights' and bases' memory alive. After `state` and `plan`, which use it.
    targets: Vec<Target>,
}

#[derive(Debug)]
enum State {
    Cpu(crate::cpu::switch::State),
    Cuda(crate::cuda::switch::State),
}

impl SwitchSet {
    /// A set over `targets`, which are the bank's, in its order. Synchronises a CUDA stream.
    ///
    /// Nothing is written yet: from base, the first `to` writes every W; in place, W is taken as it is, with nothing merged.
    ///
    /// # Errors
    /// On shapes, dtypes, strides, places that do not fit the bank; a base that is missing from base or present in place; weights that
    /// share memory with each other or with a base (exact at equal stride, refused on overlapping spans otherwise).
    pub fn new(stream: &Stream, bank: &AdapterBank, targets: Vec<Target>, options: SwitchOptions) -> Result<Self> {
        let plan = check_set(stream, bank, &targets, &options)?;
        let state = match &stream.0 {
            StreamKind::Cpu(_) => State::Cpu(crate::cpu::switch::State::new(&plan)),
            StreamKind::Cuda(cuda) => State::Cuda(crate::cuda::switch::State::new(cuda, &plan, &options.memory)?),
        };
        let tied_to = plan.targets.iter().flat_map(|t| [t.weight.place, t.base.place]).find_map(Place::tied_to);
        Ok(Self { plan, state, tied_to, targets })
    }

    /// Bytes of device memory for a set's tables; 0 on a CPU stream.
    ///
    /// # Errors
    /// On a k_max out of range, or more than 2^20 targets.
    pub fn memory_bytes(stream: &Stream, targets: u64, k_max: u64) -> Result<u64> {
        narrow("targets", targets, 1 << 20)?;
        let k_max = check_k_max(k_max)?;
        Ok(match &stream.0 {
            StreamKind::Cpu(_) => 0,
            StreamKind::Cuda(_) => crate::cuda::switch::State::bytes(targets, k_max),
        })
    }

    /// Brings all targets to a route: `ids [k]` i32 and `gates [k]` f32 (vectors, 1 x k), k at most k_max. One launch on CUDA.
    ///
    /// # Errors
    /// On shapes, dtypes, places and streams that do not fit; nothing is launched then.
    pub fn to(&mut self, stream: &Stream, ids: &Mat<'_>, gates: &Mat<'_>) -> Result<()> {
        self.to_targets(stream, 0..self.targets.len() as u64, ids, gates)
    }

    /// Like [`to`](Self::to) for a range of targets (a pipeline stage, the next layer); the others keep what they hold.
    ///
    /// # Errors
    /// As for `to`, and on a range outside the targets.
    pub fn to_targets(&mut self, stream: &Stream, targets: Range<u64>, ids: &Mat<'_>, gates: &Mat<'_>) -> Result<()> {
        let plan = self.check_to(stream, targets, ids.raw, gates.raw)?;
        self.run(stream, &plan)
    }

    /// Brings all targets to the route of nothing: from base, W has W_base's bits.
    ///
    /// # Errors
    /// As for `to`.
    pub fn unmerge(&mut self, stream: &Stream) -> Result<()> {
        self.check_stream(stream)?;
        let plan = ToPlan { ids: 0, gates: 0, k: 0, first: 0, last: self.targets.len() as u32 };
        self.run(stream, &plan)
    }

    /// Says that W or W_base was written by somebody else. From base, the next `to` writes every target; in place, what W holds now
    /// counts as base, with nothing merged. Clears what was odd. Enqueued.
    ///
    /// # Errors
    /// On a stream that does not fit.
    pub fn invalidate(&mut self, stream: &Stream) -> Result<()> {
        self.check_stream(stream)?;
        match (&mut self.state, &stream.0) {
            (State::Cuda(state), StreamKind::Cuda(cuda)) => state.invalidate(cuda, &self.plan),
            (State::Cpu(state), _) => {
                state.invalidate(&self.plan);
                Ok(())
            }
            _ => unreachable!("the stream was checked"),
        }
    }

    /// What the set's switches found odd since its creation or the last `invalidate`. Synchronises the stream.
    ///
    /// # Errors
    /// On a stream that does not fit, or whose work failed.
    pub fn odd(&self, stream: &Stream) -> Result<Odd> {
        self.check_stream(stream)?;
        match (&self.state, &stream.0) {
            (State::Cuda(state), StreamKind::Cuda(cuda)) => state.odd(cuda),
            (State::Cpu(state), _) => Ok(state.odd()),
            _ => unreachable!("the stream was checked"),
        }
    }

    /// Copies what a target holds: `ids [k_max]` i32 ascending and `coefficients [k_max]` f32, padded with -1 and 0. Before the first
    /// `to`, nothing. Enqueued.
    ///
    /// # Errors
    /// On a target out of range, and on shapes, dtypes, places and overlaps that do not fit.
    pub fn current(&self, stream: &Stream, target: u64, ids: &mut MatMut<'_>, coefficients: &mut MatMut<'_>) -> Result<()> {
        self.check_stream(stream)?;
        if target >= self.targets.len() as u64 {
            return Err(Error::argument("target", target, format!("below {}", self.targets.len())));
        }
        let (ids, coefficients) = (ids.raw.expect("ids"), coefficients.raw.expect("coefficients"));
        for (mat, dtype) in [(ids, DType::I32), (coefficients, DType::F32)] {
            mat.dtype_in(&[dtype])?.rows(1, "a vector")?.cols(u64::from(self.plan.k_max), "k_max")?.memory()?.on(stream)?;
        }
        ids.disjoint_from(&[coefficients])?;
        match (&self.state, &stream.0) {
            (State::Cuda(state), StreamKind::Cuda(cuda)) => state.current(cuda, &self.plan, target as u32, ids.mat, coefficients.mat),
            (State::Cpu(state), _) => {
                state.current(target as usize, ids.mat, coefficients.mat);
                Ok(())
            }
            _ => unreachable!("the stream was checked"),
        }
    }

    /// A target's weight, to read. On CUDA its address serves the engine's own launches, ordered after the set's on their stream.
    ///
    /// # Errors
    /// On a target out of range.
    pub fn weight(&self, target: u64) -> Result<Mat<'_>> {
        let found = self.targets.get(usize::try_from(target).unwrap_or(usize::MAX));
        let found = found.ok_or_else(|| Error::argument("target", target, format!("below {}", self.targets.len())))?;
        Ok(Mat::of(found.weight.raw))
    }

    /// Number of targets.
    pub fn len(&self) -> usize {
        self.targets.len()
    }
    /// Whether there are no targets.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }
    /// The adapters.
    pub fn bank(&self) -> &AdapterBank {
        &self.plan.bank
    }

    fn run(&mut self, stream: &Stream, plan: &ToPlan) -> Result<()> {
        match (&mut self.state, &stream.0) {
            (State::Cpu(state), StreamKind::Cpu(pool)) => {
                state.run(pool, &self.plan, plan);
                Ok(())
            }
            (State::Cuda(state), StreamKind::Cuda(cuda)) => state.launch(cuda, &self.plan, plan),
            _ => unreachable!("the stream was checked"),
        }
    }

    fn check_stream(&self, stream: &Stream) -> Result<()> {
        self.plan.bank.check_stream(stream)?;
        stream.check_tie(self.tied_to, "set's weights")
    }

    fn check_to(&self, stream: &Stream, targets: Range<u64>, ids: RawMat, gates: RawMat) -> Result<ToPlan> {
        self.check_stream(stream)?;
        if targets.start > targets.end || targets.end > self.targets.len() as u64 {
            return Err(Error::argument("targets", format!("{targets:?}"), format!("within 0..{}", self.targets.len())));
        }
        let (ids, gates) = (ids.expect("ids"), gates.expect("gates"));
        ids.dtype_in(&[DType::I32])?.rows(1, "a vector")?.memory()?.on(stream)?;
        let k = narrow("ids.cols", ids.mat.cols, u64::from(self.plan.k_max))?;
        gates.dtype_in(&[DType::F32])?.rows(1, "a vector")?.cols(u64::from(k), "k, ids.cols")?.memory()?.on(stream)?;
        for target in &self.plan.targets[targets.start as usize..targets.end as usize] {
            target.weight.expect("weight").disjoint_from(&[ids, gates])?;
        }
        Ok(ToPlan { ids: ids.mat.addr, gates: gates.mat.addr, k, first: targets.start as u32, last: targets.end as u32 })
    }
}

fn check_k_max(k_max: u64) -> Result<u32> {
    if k_max == 0 || k_max > u64::from(LSW_MAX_K) {
        return Err(Error::argument("k_max", k_max, format!("1 to {LSW_MAX_K}")));
    }
    Ok(k_max as u32)
}

fn check_set(stream: &Stream, bank: &AdapterBank, targets: &[Target], options: &SwitchOptions) -> Result<SetPlan> {
    bank.check_stream(stream)?;
    let k_max = check_k_max(options.k_max)?;
    if targets.len() != bank.targets().len() {
        return Err(Error::argument("targets", format!("{} of them", targets.len()), format!("the bank's {}", bank.targets().len())));
    }
    let mut raw = Vec::with_capacity(targets.len());
    for (i, target) in targets.iter().enumerate() {
        let at = |e: Error| e.within(format_args!("targets[{i}]"));
        raw.push(check_target(stream, bank, i, target, options.form).map_err(at)?);
    }
    check_disjoint(&raw, options.form)?;
    let tiles = raw.iter().fold(0u64, |sum, t| sum.saturating_add(t.tiles()));
    narrow("targets' elements, in tiles of 64 x 128", tiles, 1 << 30)?;
    Ok(SetPlan { bank: bank.clone(), targets: raw, in_place: options.form == Form::InPlace, kernels: options.kernels, k_max })
}

fn check_target(stream: &Stream, bank: &AdapterBank, i: usize, target: &Target, form: Form) -> Result<RawTarget> {
    let shape = bank.targets()[i];
    let fits = |name: &'static str, mat: RawMat| -> Result<RawMat> {
        let mat = mat.expect(name).dtype_in(&[bank.dtype()])?;
        mat.rows(shape.out_features, "the bank's out_features")?.cols(shape.in_features, "the bank's in_features")?;
        Ok(mat.memory()?.on(stream)?.mat.with_usable_stride())
    };
    let weight = fits("weight", target.weight.raw)?;
    let base = match (form, &target.base) {
        (Form::FromBase, Some(base)) => fits("base", base.raw)?,
        (Form::FromBase, None) => return Err(Error::argument("base", "missing", "given, since the form is from base")),
        (Form::InPlace, None) => weight,
        (Form::InPlace, Some(_)) => return Err(Error::argument("base", "given", "absent, since the form is in place")),
    };
    Ok(RawTarget { weight, base })
}

/// No weight shares memory with another weight or with a base. A sweep in address order: only spans that overlap are compared.
fn check_disjoint(targets: &[RawTarget], form: Form) -> Result<()> {
    let mut mats: Vec<(RawMat, bool, usize)> = Vec::new();
    for (i, target) in targets.iter().enumerate() {
        mats.push((target.weight, true, i));
        if form == Form::FromBase {
            mats.push((target.base, false, i));
        }
    }
    mats.retain(|(mat, ..)| !mat.is_empty());
    mats.sort_by_key(|(mat, ..)| mat.addr);
    for (at, (mat, is_weight, i)) in mats.iter().enumerate() {
        for (other, other_is_weight, j) in mats[at + 1..].iter().take_while(|(other, ..)| other.addr < mat.range().end) {
            if (*is_weight || *other_is_weight) && mat.overlaps(other) {
                let name = |is_weight: bool, i: usize| format!("targets[{i}].{}", if is_weight { "weight" } else { "base" });
                let (a, b) = (name(*is_weight, *i), name(*other_is_weight, *j));
                return Err(Error::argument(a, format!("{:#x}", mat.addr), format!("disjoint from {b}, at {:#x}", other.addr)));
            }
        }
    }
    Ok(())
}
