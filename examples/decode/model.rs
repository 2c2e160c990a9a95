//! From a source of weights and adapters to a switch set: this is what an engine does once, when it loads a
//! model.

use crate::Failure;
use crate::args::{Args, Input};
use crate::check::Check;
use crate::files::Files;
use crate::machine::{Buffer, Machine, Scalar};
use crate::products::{Products, group};
use crate::shape::Shape;
use lora_switch::{
    AdapterBank, Advice, Calibration, DType, Factor, Float, Form, StateMemory, Strategy, SwitchOptions, SwitchSet, TargetShape, Tensor,
    Weight, Workload, advise,
};

/// A linear module that adapters change.
pub struct Projection {
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

impl Projection {
    fn shape(&self, rank_cap: u64) -> TargetShape {
        TargetShape { out_features: self.rows as u64, in_features: self.cols as u64, rank_cap }
    }
}

/// A LoRA pair in the machine's memory: A [rank, cols] and B [rows, rank], their rows padded.
pub struct Pair<T> {
    pub a: Buffer<T>,
    pub b: Buffer<T>,
    pub rank: usize,
    pub scale: f32,
}

/// A projection in the model's buffers.
pub struct Target {
    pub name: String,
    pub rows: usize,
    pub cols: usize,
    /// Its first element in the buffers; its rows lie one after the other.
    pub start: usize,
    /// Its first output in the vector of all outputs.
    pub y: usize,
    /// Rank and scale of each slot's pair; rank 0 where it has none.
    pub slots: Vec<(usize, f32)>,
}

impl Target {
    pub fn row(&self, row: usize) -> std::ops::Range<usize> {
        self.start + row * self.cols..self.start + (row + 1) * self.cols
    }
}

pub struct Model<T> {
    /// Where the strategy is to switch. Before the buffers, since it writes to them until it is dropped.
    pub set: Option<SwitchSet>,
    pub bank: AdapterBank,
    /// Every W that is multiplied by.
    pub weights: Buffer<T>,
    /// Every W_base, if there is a switch from base.
    pub base: Option<Buffer<T>>,
    pub products: Products<T>,
    pub targets: Vec<Target>,
}

/// How adapters get to a token.
#[derive(Clone, Copy)]
pub struct Choice {
    pub strategy: Strategy,
    /// Where the machine was asked for advice: microseconds a token, predicted.
    pub advice: Option<Advice>,
    pub form: Form,
    pub k: u64,
}

impl Choice {
    /// What is asked for, or the best here for one sequence whose every token gets a route of its own.
    pub fn new(args: &Args, machine: &Machine, source: &Source, dtype: DType) -> Result<Self, Failure> {
        let choice = |strategy, advice| Self { strategy, advice, form: args.form, k: args.k };
        if let Some(strategy) = args.strategy {
            return Ok(choice(strategy, None));
        }
        let (projections, slots) = (source.projections(), source.adapters().len());
        let rank = |target: usize, slot: usize| source.rank(target, slot) as u64;
        let most = |target: usize| (0..slots).map(|slot| rank(target, slot)).max().unwrap_or(0);
        let targets: Vec<TargetShape> = projections.iter().enumerate().map(|(i, p)| p.shape(most(i))).collect();
        let ranks: Vec<u64> = (0..slots).map(|slot| (0..targets.len()).map(|i| rank(i, slot)).max().unwrap_or(0)).collect();
        let groups: Vec<u64> = group(&projections).iter().map(|group| group.len() as u64).collect();
        let workload = Workload { targets: &targets, groups: &groups, dtype, ranks: &ranks, k: args.k, batch: 1, tokens_per_route: 1.0 };
        // This program's own product is `linear` without adapters, which the model reckons with where the engine's is slower.
        let calibration = Calibration { product_share: 1e-3, ..Calibration::measure(&machine.stream)? };
        let advice = advise(&calibration, &workload)?;
        Ok(choice(advice.best, Some(advice)))
    }
}

/// Columns of a row that ends at a multiple of 16 bytes: with such rows, an adapter takes the fast path.
pub fn padded<T>(cols: usize) -> usize {
    cols.next_multiple_of(16 / size_of::<T>())
}

pub enum Source {
    Files(Files),
    Shape(Shape),
}

impl Source {
    pub fn open(input: &Input, seed: u64, quiet: bool) -> Result<Self, Failure> {
        match *input {
            Input::Files { ref model, ref adapters } => Ok(Self::Files(Files::open(model, adapters, quiet)?)),
            Input::Shape { layers, rank, experts } => Ok(Self::Shape(Shape { layers, rank, experts, seed })),
        }
    }

    pub fn dtype(&self) -> DType {
        match self {
            Self::Files(files) => files.dtype(),
            Self::Shape(_) => DType::Bf16,
        }
    }

    pub fn adapters(&self) -> Vec<String> {
        match self {
            Self::Files(files) => files.adapters(),
            Self::Shape(shape) => shape.adapters(),
        }
    }

    pub fn projections(&self) -> Vec<Projection> {
        match self {
            Self::Files(files) => files.projections(),
            Self::Shape(shape) => shape.projections(),
        }
    }

    /// Of an adapter's pair for a projection; 0 where it has none.
    fn rank(&self, target: usize, slot: usize) -> usize {
        match self {
            Self::Files(files) => files.rank(target, slot),
            Self::Shape(shape) => shape.rank,
        }
    }

    fn fill<T: Scalar + Float>(&self, machine: &Machine, targets: &[Target], buffer: &mut Buffer<T>) -> Result<(), Failure> {
        match self {
            Self::Files(files) => files.fill(targets, buffer),
            Self::Shape(shape) => shape.fill(&machine.stream, buffer),
        }
    }

    fn pair<T: Scalar + Float>(&self, machine: &Machine, target: usize, slot: usize) -> Result<Option<Pair<T>>, Failure> {
        match self {
            Self::Files(files) => files.pair(machine, target, slot),
            Self::Shape(shape) => shape.pair(machine, target, slot),
        }
    }
}

/// Loads everything. Also returns what is needed to check each token.
pub fn build<T: Scalar + Float>(machine: &Machine, source: &Source, choice: Choice, seed: u64) -> Result<(Model<T>, Check), Failure> {
    // All weights in one buffer, so that one launch can measure what the machine allows; each at a multiple
    // of 16 bytes.
    let groups = group(&source.projections());
    let (mut targets, len) = lay_out::<T>(source.projections());
    let mut loaded = machine.zeros(len)?;
    source.fill(machine, &targets, &mut loaded)?;
    let mut check = Check::new(machine, &targets, &groups, &loaded, choice, seed)?;

    let factors = load_adapters::<T>(machine, source, &mut targets, &mut check)?;
    let bank = fill_bank::<T>(machine, &targets, factors)?;
    let Choice { strategy, form, k, .. } = choice;
    let (mut weights, mut base) = match (strategy, form) {
        (Strategy::Switch, Form::FromBase) => (machine.zeros(len)?, Some(loaded)),
        _ => (loaded, None),
    };
    let mut set = None;
    if strategy == Strategy::Switch {
        let of_set = targets.iter().map(|target| switch_target(machine, target, &mut weights, base.as_mut())).collect();
        let options = SwitchOptions { form, k_max: k, ..SwitchOptions::default() };
        set = Some(SwitchSet::new(&machine.stream, &bank, of_set, options)?);
    }
    let products = Products::new(machine, &bank, &targets, groups, strategy, k, seed)?;
    Ok((Model { set, bank, weights, base, products, targets }, check))
}

fn lay_out<T>(projections: Vec<Projection>) -> (Vec<Target>, usize) {
    let (mut len, mut outputs) = (0, 0);
    let place = |Projection { name, rows, cols }| {
        let (start, y) = (len, outputs);
        (len, outputs) = (padded::<T>(start + rows * cols), y + rows);
        Target { name, rows, cols, start, y, slots: Vec::new() }
    };
    (projections.into_iter().map(place).collect(), len)
}

/// For each slot what the bank wants: a factor a target, or none.
fn load_adapters<T: Scalar + Float>(
    machine: &Machine,
    source: &Source,
    targets: &mut [Target],
    check: &mut Check,
) -> Result<Vec<Vec<Option<Factor>>>, Failure> {
    let mut slots = Vec::new();
    for slot in 0..source.adapters().len() {
        let mut factors = Vec::new();
        for (index, target) in targets.iter_mut().enumerate() {
            let pair = source.pair::<T>(machine, index, slot)?;
            target.slots.push(pair.as_ref().map_or((0, 0.0), |pair| (pair.rank, pair.scale)));
            check.learn(index, target, pair.as_ref())?;
            factors.push(pair.map(|pair| factor(target, pair)).transpose()?);
        }
        slots.push(factors);
    }
    Ok(slots)
}

fn factor<T: Scalar>(target: &Target, pair: Pair<T>) -> Result<Factor, Failure> {
    let Pair { a, b, rank, scale } = pair;
    Ok(Factor {
        a: a.into_tensor(rank, target.cols, padded::<T>(target.cols))?,
        b: b.into_tensor(target.rows, rank, padded::<T>(rank))?,
        scale,
    })
}

fn fill_bank<T: Float>(machine: &Machine, targets: &[Target], slots: Vec<Vec<Option<Factor>>>) -> Result<AdapterBank, Failure> {
    let shape = |target: &Target| TargetShape {
        out_features: target.rows as u64,
        in_features: target.cols as u64,
        // An engine that swaps adapters later leaves room for theirs.
        rank_cap: target.slots.iter().map(|(rank, _)| *rank as u64).max().unwrap_or(0),
    };
    let shapes: Vec<TargetShape> = targets.iter().map(shape).collect();
    let bank = AdapterBank::new(&machine.stream, T::DTYPE, slots.len() as u64, &shapes, StateMemory::allocate())?;
    for (slot, factors) in slots.iter().enumerate() {
        bank.set_slot(&machine.stream, slot as u64, factors)?;
    }
    Ok(bank)
}

/// The set works on the model's own memory by address, since others read and write there too: the next
/// layer's product, the floor.
fn switch_target<T: Scalar>(
    machine: &Machine,
    target: &Target,
    weights: &mut Buffer<T>,
    base: Option<&mut Buffer<T>>,
) -> lora_switch::Target {
    let (rows, cols) = (target.rows as u64, target.cols as u64);
    let at = |buffer: &mut Buffer<T>| buffer.addr() + (target.start * size_of::<T>()) as u64;
    // SAFETY: rows * cols elements of the model's buffer, which is initialised and outlives the set
    // (`Model`); all that touches it goes to one stream, or runs when that stream's work is done.
    let weight = unsafe { Weight::from_raw(&machine.context, at(weights), T::DTYPE, rows, cols, cols) };
    // SAFETY: as above; nobody writes the base.
    let base = base.map(|base| unsafe { Tensor::from_raw(&machine.context, at(base), T::DTYPE, rows, cols, cols) });
    lora_switch::Target { weight, base }
}
