//! The switch: both forms on both backends, against the oracle and against its own promises.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, encode};
use crate::oracle::{self, Exact, Term};
use lora_switch::{
    AdapterBank, DType, Error, Factor, Form, Odd, RouteOptions, StateMemory, SwitchOptions, SwitchSet, Target, TargetShape, Tensor, Weight,
    route,
};
use proptest::prelude::*;
use std::ops::Range;

/// The shape of a test model.
#[derive(Debug, Clone)]
pub struct Spec {
    pub dtype: DType,
    pub form: Form,
    pub slots: usize,
    pub k_max: usize,
    /// (out, in) of each target.
    pub shapes: Vec<(usize, usize)>,
    /// Whether leading dimensions and addresses are at multiples of 16 bytes, or anywhere.
    pub aligned: bool,
    pub max_rank: usize,
    pub seed: u64,
}

/// One adapter of one target, in memory and exactly.
pub struct Pair {
    a: Grid,
    b: Grid,
    pub exact_a: Exact,
    pub exact_b: Exact,
    pub scale: f32,
}

impl Pair {
    /// NaN everywhere.
    pub fn poison(&mut self) {
        for grid in [&mut self.a, &mut self.b] {
            let nan = encode(grid.dtype, f64::NAN);
            grid.set_bits(&vec![nan; grid.rows * grid.cols]);
        }
    }

    /// -1, 0 and 1: all sums with them are exact where coefficients are powers of two.
    fn make_whole(&mut self, rng: &mut Rng) {
        for (grid, exact) in [(&mut self.a, &mut self.exact_a), (&mut self.b, &mut self.exact_b)] {
            let bits = whole_numbers(rng, grid, 1);
            grid.set_bits(&bits);
            *exact = Exact::new(grid.dtype, grid.rows, grid.cols, &bits);
        }
    }
}

/// Bits for a matrix, of numbers from -most to most.
fn whole_numbers(rng: &mut Rng, of: &Grid, most: usize) -> Vec<u32> {
    (0..of.rows * of.cols).map(|_| encode(of.dtype, rng.below(2 * most + 1) as f64 - most as f64)).collect()
}

/// A model with all that it lends to its bank and set, which come first so that they are dropped first.
pub struct Model {
    pub set: SwitchSet,
    pub bank: AdapterBank,
    pub spec: Spec,
    pub weights: Vec<Grid>,
    pub bases: Vec<Grid>,
    /// [slot][target]
    pub pairs: Vec<Vec<Option<Pair>>>,
    pub backend: Backend,
    rng: Rng,
}

/// Leading dimension and shift of a matrix with `cols` columns: `gap` is filled with NaNs, which no result may show.
fn layout(rng: &mut Rng, spec: &Spec, cols: usize) -> Layout {
    let pack = 16 / spec.dtype.size() as usize;
    if spec.aligned {
        Layout { stride: cols.next_multiple_of(pack) + pack * rng.below(2), shift: 0 }
    } else {
        Layout { stride: cols + rng.below(4), shift: rng.below(pack) }
    }
}

fn grid(backend: &Backend, rng: &mut Rng, spec: &Spec, rows: usize, cols: usize, size: f64) -> Grid {
    let bits = rng.bits(spec.dtype, rows * cols, size);
    let layout = layout(rng, spec, cols);
    Grid::with_gap(backend, spec.dtype, rows, cols, layout, 0xff, &bits)
}

/// A set from base over these weights, or in place.
fn set_over(
    backend: &Backend,
    spec: &Spec,
    bank: &AdapterBank,
    memory: StateMemory,
    weights: &[Grid],
    bases: &[Grid],
) -> Result<SwitchSet, Error> {
    let base = |base: &Grid| (spec.form == Form::FromBase).then(|| base.tensor());
    let targets = weights.iter().zip(bases).map(|(w, b)| Target { weight: w.weight(), base: base(b) }).collect();
    let options = SwitchOptions { form: spec.form, k_max: spec.k_max as u64, kernels: backend.kernels, memory };
    SwitchSet::new(&backend.stream, bank, targets, options)
}

impl Model {
    pub fn new(backend: &Backend, spec: &Spec) -> Self {
        Self::with_bank_memory(backend, spec, StateMemory::allocate())
    }

    pub fn with_bank_memory(backend: &Backend, spec: &Spec, memory: StateMemory) -> Self {
        let mut model = Self::without_adapters(backend, spec, memory);
        for slot in 0..spec.slots {
            model.refill(slot);
        }
        model
    }

    fn without_adapters(backend: &Backend, spec: &Spec, memory: StateMemory) -> Self {
        let mut rng = Rng(spec.seed);
        let bases: Vec<Grid> = spec.shapes.iter().map(|&(o, i)| grid(backend, &mut rng, spec, o, i, 1.0)).collect();
        let weights: Vec<Grid> = bases.iter().map(|base| initial_weight(backend, &mut rng, spec, base)).collect();
        let cap = spec.max_rank as u64;
        let shapes: Vec<TargetShape> =
            spec.shapes.iter().map(|&(o, i)| TargetShape { out_features: o as u64, in_features: i as u64, rank_cap: cap }).collect();
        let bank = AdapterBank::new(&backend.stream, spec.dtype, spec.slots as u64, &shapes, memory).unwrap();
        let set = set_over(backend, spec, &bank, StateMemory::allocate(), &weights, &bases).unwrap();
        let pairs = (0..spec.slots).map(|_| spec.shapes.iter().map(|_| None).collect()).collect();
        Self { set, bank, spec: spec.clone(), weights, bases, pairs, backend: backend.clone(), rng }
    }

    /// More weights, and another set over them, on the same bank and bases.
    pub fn another_set(&mut self) -> (Vec<Grid>, SwitchSet) {
        let weights: Vec<Grid> = self.bases.iter().map(|base| initial_weight(&self.backend, &mut self.rng, &self.spec, base)).collect();
        let set = set_over(&self.backend, &self.spec, &self.bank, StateMemory::allocate(), &weights, &self.bases).unwrap();
        (weights, set)
    }

    /// Gives a slot new random adapters; some targets get none, ranks run from 0 to the largest.
    pub fn refill(&mut self, slot: usize) {
        let pairs: Vec<Option<Pair>> = (0..self.spec.shapes.len()).map(|t| self.random_pair(t)).collect();
        self.set_slot(slot, pairs);
    }

    pub fn set_slot(&mut self, slot: usize, pairs: Vec<Option<Pair>>) {
        self.enqueue_slot(slot, &pairs);
        self.backend.synchronize(); // the former pairs' memory is freed here
        self.pairs[slot] = pairs;
    }

    /// Gives a slot an adapter for each target, made by the target's number and shape.
    fn fill(&mut self, slot: usize, mut pair: impl FnMut(&mut Self, usize, (usize, usize)) -> Pair) {
        let shapes = self.spec.shapes.clone();
        let pairs = shapes.into_iter().enumerate().map(|(t, shape)| Some(pair(self, t, shape))).collect();
        self.set_slot(slot, pairs);
    }

    fn enqueue_slot(&mut self, slot: usize, pairs: &[Option<Pair>]) {
        let factor = |p: &Pair| Factor { a: p.a.tensor(), b: p.b.tensor(), scale: p.scale };
        let factors: Vec<Option<Factor>> = pairs.iter().map(|p| p.as_ref().map(factor)).collect();
        self.bank.set_slot(&self.backend.stream, slot as u64, &factors).unwrap();
    }

    fn random_pair(&mut self, target: usize) -> Option<Pair> {
        let (o, i) = self.spec.shapes[target];
        let rank = match self.rng.below(6) {
            0 => return None,
            1 => 0,
            2 => 1,
            _ => 1 + self.rng.below(self.spec.max_rank),
        };
        let scale = self.rng.pick(&[1.0f32, 0.5, 2.0, -0.3, 16.0 / 7.0]);
        Some(self.pair(o, i, rank.min(self.spec.max_rank), scale, 1.0))
    }

    fn pair(&mut self, o: usize, i: usize, rank: usize, scale: f32, size: f64) -> Pair {
        let (backend, spec) = (self.backend.clone(), self.spec.clone());
        let a = grid(&backend, &mut self.rng, &spec, rank, i, size);
        let b = grid(&backend, &mut self.rng, &spec, o, rank, size);
        let exact_a = Exact::new(spec.dtype, rank, i, &a.bits());
        let exact_b = Exact::new(spec.dtype, o, rank, &b.bits());
        Pair { a, b, exact_a, exact_b, scale }
    }

    /// With A and B at multiples of 16 bytes, or just beside.
    fn pair_at(&mut self, o: usize, i: usize, rank: usize, aligned: [bool; 2]) -> Pair {
        let dtype = self.spec.dtype;
        let mut values = |rows: usize, cols: usize, aligned: bool| {
            let layout = Layout { stride: (cols + 1).next_multiple_of(8) + usize::from(!aligned), shift: usize::from(!aligned) };
            let bits = self.rng.bits(dtype, rows * cols, 0.5);
            (Grid::with_gap(&self.backend, dtype, rows, cols, layout, 0xff, &bits), Exact::new(dtype, rows, cols, &bits))
        };
        let ((a, exact_a), (b, exact_b)) = (values(rank, i, aligned[0]), values(o, rank, aligned[1]));
        Pair { a, b, exact_a, exact_b, scale: 0.5 }
    }

    /// Values that depend on `rng` alone, wherever the model's layout puts them.
    pub fn pair_of(&mut self, rng: &mut Rng, o: usize, i: usize, rank: usize) -> Pair {
        let mut values = |rows: usize, cols: usize| {
            let bits = rng.bits(self.spec.dtype, rows * cols, 0.5);
            let layout = layout(&mut self.rng, &self.spec, cols);
            let grid = Grid::with_gap(&self.backend, self.spec.dtype, rows, cols, layout, 0xff, &bits);
            (grid, Exact::new(self.spec.dtype, rows, cols, &bits))
        };
        let ((a, exact_a), (b, exact_b)) = (values(rank, i), values(o, rank));
        Pair { a, b, exact_a, exact_b, scale: 0.5 }
    }

    pub fn to(&mut self, ids: &[i32], gates: &[f32]) {
        let (ids, gates) = (Grid::ids(&self.backend, ids), Grid::floats(&self.backend, gates));
        self.set.to(&self.backend.stream, &ids.mat(), &gates.mat()).unwrap();
        self.backend.synchronize();
    }

    /// (slot, coefficient) of a target under a route, as the set should hold it.
    pub fn list(&self, target: usize, ids: &[i32], gates: &[f32]) -> Vec<(usize, f32)> {
        let route = oracle::canonical(ids, gates, self.spec.slots);
        let entry = |(slot, gate): (usize, f32)| {
            let pair = self.pairs[slot][target].as_ref()?;
            let c = gate * pair.scale;
            let usable = self.spec.form == Form::FromBase || c.abs() < 2f32.powi(126);
            (pair.exact_a.rows > 0 && c != 0.0 && usable).then_some((slot, c))
        };
        route.into_iter().filter_map(entry).collect()
    }

    /// The exact sum and its bound.
    pub fn exact(&self, target: usize, list: &[(usize, f32)]) -> (Exact, Vec<f64>) {
        let (o, i) = self.spec.shapes[target];
        let base = Exact::new(self.spec.dtype, o, i, &self.bases[target].bits());
        let term = |&(slot, c): &(usize, f32)| {
            let pair = self.pairs[slot][target].as_ref().unwrap();
            Term { a: &pair.exact_a, b: &pair.exact_b, coefficient: f64::from(c) }
        };
        oracle::merge(&base, &list.iter().map(term).collect::<Vec<_>>())
    }

    /// From base, every target is the sum of its list, within the bound; of an empty list, the base's bits.
    pub fn assert_holds(&self, ids: &[i32], gates: &[f32], what: &str) {
        for (t, weight) in self.weights.iter().enumerate() {
            let list = self.list(t, ids, gates);
            if list.is_empty() {
                assert_eq!(weight.bits(), self.bases[t].bits(), "{what}: target {t}: an empty sum copies bits");
            } else {
                let (exact, bounds) = self.exact(t, &list);
                oracle::assert_close(self.spec.dtype, &weight.values(), &exact.x, &bounds, &format!("{what}: target {t}"));
            }
        }
    }

    pub fn all_bits(&self) -> Vec<Vec<u32>> {
        self.weights.iter().map(Grid::bits).collect()
    }

    pub fn base_bits(&self) -> Vec<Vec<u32>> {
        self.bases.iter().map(Grid::bits).collect()
    }

    fn current(&self, target: usize) -> Vec<(i32, f32)> {
        let k = self.spec.k_max;
        let mut ids = Grid::poisoned(&self.backend, DType::I32, 1, k, Layout::dense(k));
        let mut coefficients = Grid::poisoned(&self.backend, DType::F32, 1, k, Layout::dense(k));
        self.set.current(&self.backend.stream, target as u64, &mut ids.mat_mut(), &mut coefficients.mat_mut()).unwrap();
        ids.i32s().into_iter().zip(coefficients.bits().into_iter().map(f32::from_bits)).collect()
    }
}

/// From base, anything; in place, the base.
fn initial_weight(backend: &Backend, rng: &mut Rng, spec: &Spec, base: &Grid) -> Grid {
    let layout = layout(rng, spec, base.cols);
    match spec.form {
        Form::FromBase => Grid::poisoned(backend, spec.dtype, base.rows, base.cols, layout),
        Form::InPlace => Grid::new(backend, spec.dtype, base.rows, base.cols, layout, &base.bits()),
    }
}

/// A random route: ids in and out of range, duplicates, zero and negative gates; any k up to k_max, often 2 and k = N.
fn random_route(rng: &mut Rng, spec: &Spec) -> (Vec<i32>, Vec<f32>) {
    let k = rng.pick(&[0, 1, 2.min(spec.k_max), spec.slots.min(spec.k_max), spec.k_max]);
    let id = |rng: &mut Rng| match rng.below(8) {
        0 => rng.pick(&[-1, -1, spec.slots as i32, i32::MIN]),
        _ => rng.below(spec.slots) as i32,
    };
    let ids = (0..k).map(|_| id(rng)).collect();
    let gates = (0..k).map(|_| rng.pick(&[0.0, 1.0, 0.25, -0.75, rng.clone().uniform() as f32])).collect();
    (ids, gates)
}

/// Sizes around each edge: of a pack (8), of mma (16), of a panel (32), of a tile (64, 128); primes; 1; 0.
const SIZES: [usize; 17] = [0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 130, 300];
const RANKS: [usize; 9] = [1, 3, 8, 16, 17, 32, 33, 64, 100];

fn spec() -> impl Strategy<Value = Spec> {
    let size = || (0..SIZES.len()).prop_map(|i| SIZES[i]);
    let shapes = prop::collection::vec((size(), size()), 0..5);
    let rank = (0..RANKS.len()).prop_map(|i| RANKS[i]);
    (0usize..3, shapes, 1usize..9, 1usize..9, any::<bool>(), rank, any::<u64>()).prop_map(
        |(d, shapes, slots, k_max, aligned, max_rank, seed)| Spec {
            dtype: FLOATS[d],
            form: Form::FromBase,
            slots,
            k_max,
            shapes,
            aligned,
            max_rank,
            seed,
        },
    )
}

pub fn small(dtype: DType, form: Form) -> Spec {
    Spec { dtype, form, slots: 4, k_max: 4, shapes: vec![(48, 80), (33, 65)], aligned: true, max_rank: 20, seed: 11 }
}

fn from_base_matches_oracle(backend: &Backend) {
    proptest!(cases(50), |(spec in spec())| {
        let mut model = Model::new(backend, &spec);
        let mut rng = Rng(spec.seed ^ 1);
        for step in 0..4 {
            let (ids, gates) = random_route(&mut rng, &spec);
            if step == 2 {
                model.refill(rng.below(spec.slots));
            }
            model.to(&ids, &gates);
            model.assert_holds(&ids, &gates, "from base");
            for t in 0..spec.shapes.len() {
                let list = model.list(t, &ids, &gates);
                let held: Vec<(usize, f32)> =
                    model.current(t).iter().filter(|(id, _)| *id >= 0).map(|&(id, c)| (id as usize, c)).collect();
                prop_assert_eq!(held, list, "what the set says it holds");
            }
        }
    });
}

/// What switches in place may have cost so far: each rounds W once and errs by its own sum, so the bounds of all switches add up.
struct Drift {
    bounds: Vec<Vec<f64>>,
    /// What the targets held before.
    held: Vec<Vec<(usize, f32)>>,
}

impl Drift {
    fn new(spec: &Spec) -> Self {
        let bounds = spec.shapes.iter().map(|&(o, i)| vec![0.0; o * i]).collect();
        Self { bounds, held: vec![Vec::new(); spec.shapes.len()] }
    }

    /// Judges one more switch.
    fn assert_holds(&mut self, model: &Model, ids: &[i32], gates: &[f32], what: &str) {
        let dtype = model.spec.dtype;
        for (t, bounds) in self.bounds.iter_mut().enumerate() {
            let list = model.list(t, ids, gates);
            let (exact, own) = model.exact(t, &list);
            let (_, former) = model.exact(t, &self.held[t]);
            for (i, bound) in bounds.iter_mut().enumerate() {
                // The difference of two coefficients is itself rounded: one more of each term, within twice the terms' bounds.
                *bound += 2.0 * (own[i] + former[i]);
                *bound += oracle::half_ulp(dtype, exact.x[i].abs() + *bound);
            }
            oracle::assert_close(dtype, &model.weights[t].values(), &exact.x, bounds, &format!("{what}: target {t}"));
            self.held[t] = list;
        }
    }
}

fn in_place_matches_oracle(backend: &Backend) {
    proptest!(cases(50), |(mut spec in spec())| {
        spec.form = Form::InPlace;
        let mut model = Model::new(backend, &spec);
        let mut rng = Rng(spec.seed ^ 2);
        let mut drift = Drift::new(&spec);
        for step in 0..5 {
            let (ids, gates) = if step == 4 { (vec![], vec![]) } else { random_route(&mut rng, &spec) };
            model.to(&ids, &gates);
            drift.assert_holds(&model, &ids, &gates, "in place");
        }
        prop_assert!(!model.set.odd(&backend.stream).unwrap().contains(Odd::STALE_MERGE));
    });
}

/// Targets that a fast path serves among others that it does not, and slots that change between adapters at multiples of 16 bytes and
/// anywhere, so that both kinds meet in one target.
fn ragged_mixture(backend: &Backend) {
    for (dtype, form) in FLOATS.into_iter().flat_map(|dtype| [(dtype, Form::FromBase), (dtype, Form::InPlace)]) {
        let shapes = vec![(64, 128), (33, 65), (128, 130), (200, 72)];
        let spec = Spec { shapes, ..small(dtype, form) };
        let mut model = Model::new(backend, &spec);
        let mut drift = Drift::new(&spec);
        // Slots 0 and 1 leave the multiples, one after the other, and come back.
        for step in 0..4 {
            model.spec.aligned = step >= 2;
            model.refill(step % 2);
            // The last route is none: in place, nothing may be merged at a refill.
            for (ids, gates) in [([0, 1, 2, 3], [0.4, 0.3, 0.2, -0.1]), ([3, -1, 2, 0], [0.5, 0.5, 0.25, 0.25]), ([-1; 4], [0.0; 4])] {
                model.to(&ids, &gates);
                match form {
                    Form::FromBase => model.assert_holds(&ids, &gates, &format!("step {step}")),
                    Form::InPlace => drift.assert_holds(&model, &ids, &gates, &format!("step {step}")),
                }
            }
        }
    }
}

/// Only A or only B at multiples of 16 bytes, as of a dense adapter whose rank is no multiple of eight: one panel each, then so many that
/// not all of B can stay in shared memory.
fn one_operand_is_aligned(backend: &Backend) {
    for (dtype, rank) in FLOATS.into_iter().flat_map(|dtype| [(dtype, 12), (dtype, 100)]) {
        for (o, i) in [(130, 200), (130, 256)] {
            let spec = Spec { shapes: vec![(o, i)], max_rank: 100, ..small(dtype, Form::FromBase) };
            let mut model = Model::new(backend, &spec);
            for slot in 0..4 {
                model.fill(slot, |model, _, (o, i)| model.pair_at(o, i, rank, [slot % 2 == 0, slot % 2 == 1]));
            }
            let (ids, gates) = ([0, 1, 2, 3], [0.5, -1.0, 0.25, 2.0]);
            model.to(&ids, &gates);
            model.assert_holds(&ids, &gates, &format!("{dtype}, rank {rank}, {o} x {i}"));
        }
    }
}

/// From base, the result depends on the current route alone, bit for bit; unmerge gives the base back.
fn from_base_forgets_the_past(backend: &Backend) {
    for dtype in FLOATS {
        // Four terms in every target, since a sum of two has the same bits in either order.
        let spec = Spec { k_max: 6, ..small(dtype, Form::FromBase) };
        let filled = || {
            let mut model = Model::new(backend, &spec);
            for slot in 0..4 {
                let pairs = vec![Some(model.pair(48, 80, 9, 0.7, 1.0)), Some(model.pair(33, 65, 9, 0.7, 1.0))];
                model.set_slot(slot, pairs);
            }
            model
        };
        let mut model = filled();
        let mut rng = Rng(5);
        for _ in 0..20 {
            let (ids, gates) = random_route(&mut rng, &spec);
            model.to(&ids, &gates);
        }
        model.to(&[0, 1, 2, 3], &[0.4, 0.7, 0.1, 0.3]);
        let after_many = model.all_bits();
        model.set.unmerge(&backend.stream).unwrap();
        assert_eq!(model.all_bits(), model.base_bits());
        model.to(&[0, 1, 2, 3], &[0.4, 0.7, 0.1, 0.3]);
        assert_eq!(model.all_bits(), after_many);
        let mut fresh = filled();
        fresh.to(&[0, 1, 2, 3], &[0.4, 0.7, 0.1, 0.3]);
        assert_eq!(fresh.all_bits(), after_many);
        // A route in another order, with ids that name nothing and a duplicate that adds up to the same gate.
        fresh.set.invalidate(&backend.stream).unwrap();
        fresh.to(&[3, -1, 1, 3, 2, 0], &[0.0, 9.0, 0.7, 0.3, 0.1, 0.4]);
        assert_eq!(fresh.all_bits(), after_many);
    }
}

/// -0.0, NaN payloads and infinities of the base survive an empty route bit by bit, on the fast path and off it.
fn an_empty_route_copies_bits(backend: &Backend) {
    for (dtype, odd) in [
        (DType::F32, [0x8000_0000u32, 0x7fc1_2345, 0xffa0_0001, 0x7f80_0000, 1]),
        (DType::F16, [0x8000, 0x7e55, 0xfd01, 0x7c00, 1]),
        (DType::Bf16, [0x8000, 0x7fd5, 0xff81, 0x7f80, 1]),
    ] {
        for aligned in [true, false] {
            let spec = Spec { aligned, ..small(dtype, Form::FromBase) };
            let mut model = Model::new(backend, &spec);
            for base in &mut model.bases {
                let bits: Vec<u32> = (0..base.rows * base.cols).map(|i| odd[i % odd.len()]).collect();
                base.set_bits(&bits);
            }
            model.to(&[0], &[0.0]);
            assert_eq!(model.all_bits(), model.base_bits(), "{dtype}");
        }
    }
}

/// An unchanged route writes nothing; a changed one, `invalidate` and a refill do.
fn an_unchanged_route_costs_nothing(backend: &Backend) {
    for form in [Form::FromBase, Form::InPlace] {
        let mut model = Model::new(backend, &small(DType::Bf16, form));
        model.to(&[0, 1], &[0.5, 0.5]);
        let marked: Vec<u32> = vec![encode(DType::Bf16, 3.0); 48 * 80];
        model.weights[0].set_bits(&marked);
        model.to(&[1, 0], &[0.5, 0.5]);
        assert_eq!(model.weights[0].bits(), marked, "the same route in another order");
        model.to(&[1, 0, 2], &[0.5, 0.5, 0.0]);
        assert_eq!(model.weights[0].bits(), marked, "a gate of zero");
        model.set.invalidate(&backend.stream).unwrap();
        model.to(&[0, 1], &[0.5, 0.5]);
        assert_ne!(model.weights[0].bits(), marked, "after invalidate");
    }
}

/// A zero coefficient does not touch its adapter, even one full of NaN.
fn a_zero_coefficient_skips_the_adapter(backend: &Backend) {
    for form in [Form::FromBase, Form::InPlace] {
        let mut model = Model::new(backend, &small(DType::F16, form));
        let nan = |model: &mut Model, o, i| {
            let mut pair = model.pair(o, i, 5, 1.0, 1.0);
            pair.a.set_bits(&vec![0x7e00; 5 * i]);
            Some(pair)
        };
        let pairs = vec![nan(&mut model, 48, 80), nan(&mut model, 33, 65)];
        model.set_slot(2, pairs);
        model.to(&[2, 0], &[0.0, 1.0]);
        assert!(model.weights.iter().all(|w| w.values().iter().all(|x| x.is_finite())));
    }
}

/// From base a coefficient that is not finite shows in W, and the next route heals it; in place it counts as zero, and so does one that
/// is so large that a difference of two could overflow.
fn coefficients_that_are_not_finite(backend: &Backend) {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut model = Model::new(backend, &small(DType::F32, Form::FromBase));
        let pairs = vec![Some(model.pair(48, 80, 4, 1.0, 1.0)), None];
        model.set_slot(0, pairs);
        model.to(&[0], &[bad]);
        assert!(model.weights[0].values().iter().all(|x| !x.is_finite()));
        assert_eq!(model.weights[1].bits(), model.bases[1].bits(), "a target without the adapter is not touched by it");
        assert!(model.set.odd(&backend.stream).unwrap().contains(Odd::COEFFICIENT));
        model.to(&[1], &[1.0]);
        assert!(model.weights[0].values().iter().all(|x| x.is_finite()));
    }
    // The last one is above 2^126 with the smallest scale of a pair (0.3), finite with scales up to 1.
    for bad in [f32::NAN, f32::INFINITY, -f32::MAX] {
        let mut model = Model::new(backend, &small(DType::F32, Form::InPlace));
        model.to(&[0, 1], &[bad, 0.5]);
        let with_bad = model.all_bits();
        assert!(model.set.odd(&backend.stream).unwrap().contains(Odd::COEFFICIENT));
        let mut without = Model::new(backend, &small(DType::F32, Form::InPlace));
        without.to(&[1], &[0.5]);
        assert_eq!(without.all_bits(), with_bad);
    }
}

fn ids_out_of_range_are_reported(backend: &Backend) {
    let mut model = Model::new(backend, &small(DType::F32, Form::FromBase));
    model.to(&[-1, 1], &[1.0, 1.0]);
    assert!(model.set.odd(&backend.stream).unwrap().is_none(), "-1 is the way to say none");
    model.to(&[4, 1], &[1.0, 1.0]);
    assert_eq!(model.set.odd(&backend.stream).unwrap(), Odd::ROUTE_ID);
    model.set.invalidate(&backend.stream).unwrap();
    assert!(model.set.odd(&backend.stream).unwrap().is_none());
}

/// A merged slot gets another adapter. From base the next `to` heals, though the route is the same. In place the old product cannot be
/// taken out: W stays as it is, the set says so, and `invalidate` starts over from what W holds.
fn refilling_a_merged_slot(backend: &Backend) {
    let spec = small(DType::Bf16, Form::FromBase);
    let mut model = Model::new(backend, &spec);
    for what in ["merged", "healed"] {
        // Of one rank and scale, so that nothing but the slot's generation tells the old adapters from the new.
        let pairs = vec![Some(model.pair(48, 80, 4, 1.0, 1.0)), Some(model.pair(33, 65, 4, 1.0, 1.0))];
        model.set_slot(2, pairs);
        model.to(&[1, 2], &[0.5, 0.5]);
        model.assert_holds(&[1, 2], &[0.5, 0.5], what);
    }

    let mut model = Model::new(backend, &small(DType::Bf16, Form::InPlace));
    let pairs = vec![Some(model.pair(48, 80, 4, 1.0, 1.0)), None];
    model.set_slot(2, pairs);
    model.to(&[1, 2], &[0.5, 0.5]);
    let merged = model.all_bits();
    model.refill(2);
    model.to(&[1], &[0.5]);
    assert_eq!(model.weights[0].bits(), merged[0], "the stale target is left alone");
    assert!(model.set.odd(&backend.stream).unwrap().contains(Odd::STALE_MERGE));
    model.set.invalidate(&backend.stream).unwrap();
    assert!(model.set.odd(&backend.stream).unwrap().is_none());
    assert!(model.current(0).iter().all(|(id, _)| *id == -1));

    // Unmerged first, as the documentation asks: nothing is odd.
    model.to(&[1], &[1.0]);
    model.set.unmerge(&backend.stream).unwrap();
    model.refill(1);
    model.to(&[1], &[1.0]);
    assert!(model.set.odd(&backend.stream).unwrap().is_none());
}

/// A single row's stride does not matter, and a device could not hold every one that is given.
fn a_single_row_has_any_stride(backend: &Backend) {
    let cols = 40;
    let shape = TargetShape { out_features: 1, in_features: cols as u64, rank_cap: 1 };
    let bank = AdapterBank::new(&backend.stream, DType::Bf16, 1, &[shape], StateMemory::allocate()).unwrap();
    let mut rng = Rng(12);
    let mut grid = |cols: usize, bits: Option<Vec<u32>>| {
        let bits = bits.unwrap_or_else(|| rng.bits(DType::Bf16, cols, 1.0));
        Grid::new(backend, DType::Bf16, 1, cols, Layout::dense(cols), &bits)
    };
    let (base, a, b) = (grid(cols, None), grid(cols, None), grid(1, None));
    let results = [cols as u64, 0, 1 << 39, (1 << 62) + 1, 1 << 63, u64::MAX].map(|stride| {
        let weight = grid(cols, Some(base.bits()));
        // SAFETY: one row of each grid, and the grids outlive the set.
        let tensor = |g: &Grid| unsafe { Tensor::from_raw(&backend.context, g.addr(), DType::Bf16, 1, g.cols as u64, stride) };
        bank.set_slot(&backend.stream, 0, &[Some(Factor { a: tensor(&a), b: tensor(&b), scale: 0.5 })]).unwrap();
        // SAFETY: as above.
        let written = unsafe { Weight::from_raw(&backend.context, weight.addr(), DType::Bf16, 1, cols as u64, stride) };
        let targets = vec![Target { weight: written, base: Some(tensor(&base)) }];
        let options = SwitchOptions { kernels: backend.kernels, ..Default::default() };
        let mut set = SwitchSet::new(&backend.stream, &bank, targets, options).unwrap();
        assert_eq!(set.weight(0).unwrap().stride(), stride, "as given");
        let (ids, gates) = (Grid::ids(backend, &[0]), Grid::floats(backend, &[1.0]));
        set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
        backend.synchronize();
        weight.bits()
    });
    assert_ne!(results[0], base.bits());
    assert!(results.iter().all(|bits| *bits == results[0]));
}

/// As many slots as a bank can have; the last one serves.
fn the_last_slot(backend: &Backend) {
    let shape = TargetShape { out_features: 8, in_features: 16, rank_cap: 8 };
    let bank = AdapterBank::new(&backend.stream, DType::F32, 65_536, &[shape], StateMemory::allocate()).unwrap();
    let mut rng = Rng(13);
    let mut grid = |rows: usize, cols: usize| {
        let bits = rng.bits(DType::F32, rows * cols, 1.0);
        Grid::new(backend, DType::F32, rows, cols, Layout::dense(cols), &bits)
    };
    let (base, a, b, weight) = (grid(8, 16), grid(8, 16), grid(8, 8), grid(8, 16));
    bank.set_slot(&backend.stream, 65_535, &[Some(Factor { a: a.tensor(), b: b.tensor(), scale: 1.0 })]).unwrap();
    let targets = vec![Target { weight: weight.weight(), base: Some(base.tensor()) }];
    let options = SwitchOptions { kernels: backend.kernels, ..Default::default() };
    let mut set = SwitchSet::new(&backend.stream, &bank, targets, options).unwrap();
    let (ids, gates) = (Grid::ids(backend, &[65_536, 65_535]), Grid::floats(backend, &[1.0, 0.5]));
    set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
    let exact = |g: &Grid| Exact::new(DType::F32, g.rows, g.cols, &g.bits());
    let (want, bounds) = oracle::merge(&exact(&base), &[Term { a: &exact(&a), b: &exact(&b), coefficient: 0.5 }]);
    oracle::assert_close(DType::F32, &weight.values(), &want.x, &bounds, "slot 65535");
    assert_eq!(set.odd(&backend.stream).unwrap(), Odd::ROUTE_ID);
}

fn a_range_of_targets(backend: &Backend) {
    let spec = Spec { shapes: vec![(20, 20); 5], ..small(DType::F32, Form::FromBase) };
    let mut model = Model::new(backend, &spec);
    model.to(&[0], &[1.0]);
    let before = model.all_bits();
    let (ids, gates) = (Grid::ids(backend, &[1, 2]), Grid::floats(backend, &[0.5, 0.5]));
    model.set.to_targets(&backend.stream, 1..3, &ids.mat(), &gates.mat()).unwrap();
    model.set.to_targets(&backend.stream, 2..2, &ids.mat(), &gates.mat()).unwrap();
    let part = model.all_bits();
    model.to(&[1, 2], &[0.5, 0.5]);
    let all = model.all_bits();
    for t in 0..5 {
        assert_eq!(part[t], if (1..3).contains(&t) { all[t].clone() } else { before[t].clone() }, "target {t}");
    }
}

/// More targets than a block plans at a time (256), and than one pass over groups of 32 adds up (1,024), with tiles of changed and
/// unchanged ones in between.
fn many_targets(backend: &Backend) {
    let shapes = (0..1100).map(|i| (1 + i % 70, 1 + i % 131)).collect();
    let spec = Spec { shapes, max_rank: 3, slots: 2, k_max: 2, ..small(DType::Bf16, Form::FromBase) };
    let mut model = Model::new(backend, &spec);
    for (ids, gates) in [([0, 1], [0.5f32, 0.5]), ([0, -1], [0.5, 0.5]), ([1, 0], [1.0, 0.5])] {
        model.to(&ids, &gates);
        model.assert_holds(&ids, &gates, "many targets");
    }
}

/// So many tiles side by side that a block takes several in a row, for which it keeps B: with few ranks (three tiles), and with so many
/// that B's panels have no place to stay (up to 32). A second route, since what is kept must not outlive it.
fn runs_of_tiles(backend: &Backend) {
    let small_set = backend.cuda.as_ref().map(|_| (5, vec![32, 17, 32, 20, 32]));
    for (rows, ranks) in [(66, vec![4, 2]), (5, vec![96, 70, 64, 40])].into_iter().chain(small_set) {
        // With ranks up to 32 it is a small set on Hopper: a block of that kernel takes two tiles, with panels all at hand or in turns.
        let (cols, k, max_rank) = (54_400, ranks.len(), *ranks.iter().max().unwrap());
        let spec = Spec { shapes: vec![(rows, cols)], max_rank, slots: k, k_max: k, ..small(DType::Bf16, Form::FromBase) };
        let mut model = Model::new(backend, &spec);
        for (slot, &rank) in ranks.iter().enumerate() {
            let pair = model.pair(rows, cols, rank, 0.5, 0.3);
            model.set_slot(slot, vec![Some(pair)]);
        }
        let ids: Vec<i32> = (0..k as i32).collect();
        for gates in [[0.25, -1.0, 0.5, 2.0, 0.75], [1.5, 0.125, -0.75, 0.0, -0.5]] {
            model.to(&ids, &gates[..k]);
            model.assert_holds(&ids, &gates[..k], &format!("ranks {ranks:?}"));
        }
    }
}

/// Up to four panels of deep ranks: on Hopper small sets whose blocks keep the panels of B for a row of tiles, where a block takes more than one.
/// With three tiles each, blocks go on into the next row, and into the next target; routes whose panels stay change with others.
fn deep_ranks_of_small_sets(backend: &Backend) {
    let wide = if backend.cuda.is_some() { 541 * 128 } else { 3 * 128 };
    for (dtype, form, cols) in
        [(DType::Bf16, Form::FromBase, wide), (DType::F16, Form::InPlace, wide - 64), (DType::Bf16, Form::InPlace, 640)]
    {
        let (shapes, ranks) = (vec![(133, 640), (5, cols), (40, 384)], [64, 40, 36, 33, 8, 17]);
        let spec = Spec { shapes: shapes.clone(), max_rank: 64, slots: ranks.len(), k_max: 4, ..small(dtype, form) };
        let mut model = Model::new(backend, &spec);
        for (slot, &rank) in ranks.iter().enumerate() {
            let pairs = shapes.iter().map(|&(rows, cols)| Some(model.pair(rows, cols, rank, 0.5, 0.3))).collect();
            model.set_slot(slot, pairs);
        }
        let routes: [(&[i32], &[f32]); 8] = [
            (&[0, 1], &[0.25, -1.0]),
            (&[2, 3], &[0.5, 2.0]),
            (&[3, 0, 2, 1], &[0.75, 1.5, -0.5, 0.125]),
            (&[4, 1, 5], &[1.0, 0.5, -0.25]),
            (&[5, 4], &[0.5, -2.0]),
            (&[2, 0], &[-0.75, 1.0]),
            (&[3, 0, 2, 1], &[0.5, 0.25, 1.0, -0.5]),
            (&[4, 5], &[1.5, 0.5]),
        ];
        let mut drift = Drift::new(&spec);
        for (ids, gates) in routes {
            model.to(ids, gates);
            let what = format!("{dtype}, {form:?}, {cols} columns, ids {ids:?}");
            if form == Form::InPlace { drift.assert_holds(&model, ids, gates, &what) } else { model.assert_holds(ids, gates, &what) }
        }
    }
}

/// Targets of one tile and of a few among some of more than a hundred: on a GPU 546 tiles, which on Hopper are a small set whose launches are
/// long, where there are up to four panels of deep ranks. A block has five tiles there, of up to five targets.
fn long(backend: &Backend, dtype: DType, form: Form) -> Spec {
    let wide = if backend.cuda.is_some() { 131 * 128 } else { 2 * 128 };
    let first = [(5, wide), (1, 64), (2, 128), (70, 64), (1, 128), (3, 64), (40, 384), (133, 192), (3, wide), (129, 128)];
    let others = [(2, 64), (4, wide), (1, 64), (1, 64), (130, 64), (2, wide + 64), (3, 256)];
    Spec { shapes: [&first[..], &others[..]].concat(), max_rank: 64, ..small(dtype, form) }
}

/// One panel each. At every third target A of slot 1 is nothing for the copy engine, so that blocks of a long launch go from sums whose B they
/// hold to such that they cannot hold, and back; at every other B of slot 2 comes by elements.
fn fill_long(model: &mut Model) {
    for (slot, rank) in [64, 40, 36, 33].into_iter().enumerate() {
        model.fill(slot, |model, t, (o, i)| model.pair_at(o, i, rank, [slot != 1 || t % 3 != 2, slot != 2 || t % 2 == 0]));
    }
}

fn long_launches_hold_b_in_part(backend: &Backend) {
    for (dtype, form) in [(DType::Bf16, Form::FromBase), (DType::F16, Form::InPlace)] {
        let spec = long(backend, dtype, form);
        let mut model = Model::without_adapters(backend, &spec, StateMemory::allocate());
        fill_long(&mut model);
        let routes: [(&[i32], &[f32]); 5] = [
            (&[0, 1], &[0.25, -1.0]),
            (&[2, 3], &[0.5, 2.0]),
            (&[2, 1], &[-0.75, 1.0]),
            (&[3, 0, 2, 1], &[0.75, 1.5, -0.5, 0.125]),
            (&[0, 3], &[1.0, 0.5]),
        ];
        let mut drift = Drift::new(&spec);
        for (ids, gates) in routes {
            model.to(ids, gates);
            let what = format!("{dtype}, {form:?}, ids {ids:?}");
            if form == Form::InPlace { drift.assert_holds(&model, ids, gates, &what) } else { model.assert_holds(ids, gates, &what) }
        }
    }
}

/// Slots above those that a warp reads at once, up to the last that a long launch knows. One of them gets other adapters of the same ranks
/// between two launches, so that nothing but their places tells them from the old ones.
fn high_slots_of_long_launches(backend: &Backend) {
    for (dtype, form, slots, ids) in [
        (DType::F16, Form::FromBase, 33, [5, 32, 31, 0]),
        (DType::Bf16, Form::FromBase, 222, [33, 221, 127, 32]),
        (DType::Bf16, Form::InPlace, 222, [190, 221, 64, 33]),
    ] {
        let spec = Spec { slots, ..long(backend, dtype, form) };
        let mut model = Model::without_adapters(backend, &spec, StateMemory::allocate());
        let fill = |model: &mut Model, entry: usize| {
            let rank = [64, 40, 36, 33][entry];
            model.fill(ids[entry] as usize, |model, _, (o, i)| model.pair(o, i, rank, 0.5, 0.3));
        };
        (0..4).for_each(|entry| fill(&mut model, entry));
        let mut drift = Drift::new(&spec);
        let mut to = |model: &mut Model, ids: &[i32], gates: &[f32]| {
            model.to(ids, gates);
            let what = format!("{dtype}, {form:?}, {slots} slots, ids {ids:?}");
            if form == Form::InPlace { drift.assert_holds(model, ids, gates, &what) } else { model.assert_holds(ids, gates, &what) }
        };
        to(&mut model, &ids[2..], &[0.5, 2.0]);
        to(&mut model, &ids[..2], &[0.25, -1.0]);
        if form == Form::InPlace {
            to(&mut model, &[], &[]);
        }
        fill(&mut model, 1);
        to(&mut model, &ids[..2], &[0.25, -1.0]);
        to(&mut model, &ids[1..3], &[-0.75, 1.5]);
        assert!(model.set.odd(&backend.stream).unwrap().is_none());
    }
}

/// From base whatever W held is gone. In place, too, W has its bits again where every sum is exact; one of the routes that leave is of more
/// panels than a block can hold.
fn unmerging_long_sets(backend: &Backend) {
    for (dtype, form) in [(DType::F16, Form::FromBase), (DType::Bf16, Form::InPlace)] {
        let ranks = [64, 40, 36, 33, 8, 17];
        let spec = Spec { slots: ranks.len(), k_max: ranks.len(), ..long(backend, dtype, form) };
        let mut model = Model::without_adapters(backend, &spec, StateMemory::allocate());
        let mut rng = Rng(15);
        for (base, weight) in model.bases.iter_mut().zip(&mut model.weights) {
            let bits = whole_numbers(&mut rng, base, 8);
            base.set_bits(&bits);
            if form == Form::InPlace {
                weight.set_bits(&bits);
            }
        }
        for (slot, rank) in ranks.into_iter().enumerate() {
            model.fill(slot, |model, _, (o, i)| {
                let mut pair = model.pair_at(o, i, rank, [true; 2]);
                pair.make_whole(&mut rng);
                pair
            });
        }
        let routes: [(&[i32], &[f32]); 3] =
            [(&[0, 1], &[2.0, -1.0]), (&[4, 2, 5, 0, 1, 3], &[2.0, -1.0, -2.0, 1.0, 2.0, -2.0]), (&[3], &[1.0])];
        for (ids, gates) in routes {
            for is_empty_route in [false, true] {
                let what = format!("{dtype}, {form:?}, ids {ids:?}");
                model.to(ids, gates);
                for (t, weight) in model.weights.iter().enumerate() {
                    let (exact, _) = model.exact(t, &model.list(t, ids, gates));
                    assert!(weight.values() == exact.x, "{what}: target {t}");
                }
                if form == Form::FromBase {
                    for weight in &mut model.weights {
                        let nan = encode(dtype, f64::NAN);
                        weight.set_bits(&vec![nan; weight.rows * weight.cols]);
                    }
                }
                if is_empty_route {
                    model.to(&[-1], &[1.0]);
                } else {
                    model.set.unmerge(&backend.stream).unwrap();
                    backend.synchronize();
                }
                assert!(model.all_bits() == model.base_bits(), "{what}: unmerged");
            }
        }
    }
}

/// Ranks above 32, more than 128 together: the Hopper kernel holds the first three, four, six or eight panels of A in registers, with
/// code of its own where each adapter has two, three or four of them, and the rest comes through shared memory, with more products than an entry
/// has in the end. With coefficients in no order, and routes of which some are not deep; what is not finite shows from base and is healed.
fn deep_ranks(backend: &Backend) {
    let cases: [(usize, usize, &[usize]); 7] = [
        (5, 54_400, &[64, 64, 50]),
        (5, 27_200, &[128, 128]),
        (5, 27_200, &[128, 64, 80]),
        (5, 27_200, &[192, 128, 64]),
        (5, 27_200, &[256, 256]),
        (5, 27_200, &[128, 64, 256, 192, 64]),
        (130, 320, &[256, 256, 256, 256, 256, 256, 256, 256, 256]),
    ];
    assert_deep_ranks(backend, &cases);
}

/// The same of several tiles down a column, in strips of which the last one is lower.
fn deep_ranks_down_columns(backend: &Backend) {
    let ranks: [&[usize]; 6] =
        [&[128, 128, 127, 128], &[64, 48, 50], &[128, 114, 128, 80, 128], &[128, 127], &[128, 96, 115], &[128, 64, 256, 192, 48]];
    assert_deep_ranks(backend, &ranks.map(|ranks| (27_205, 8, ranks)));
}

/// More panels than the consumers hold of A: of the next six A stays in shared memory for a run. Targets of four tiles, on a GPU so many that blocks
/// have two runs; adapters with one to four panels each, or with different numbers, some of which are nothing for the copy engine. With targets
/// between them whose A is not held, so that B stays instead. In the end runs of 16 tiles.
fn deep_ranks_that_stay(backend: &Backend) {
    let count = |n: usize| if backend.cuda.is_some() { n } else { 2 };
    let (many, long) = (vec![(389, 8); count(70)], vec![(if backend.cuda.is_some() { 2048 } else { 40 }, 8); count(132)]);
    let cases = [
        (&many, &[64; 11][..]),
        (&many, &[192; 9][..]),
        (&many, &[128, 114, 96, 80, 115][..]),
        (&many, &[192, 144, 160, 192][..]),
        (&many, &[256, 250, 208, 224][..]),
        (&many, &[256, 48, 192, 96][..]),
        (&many, &[256, 64, 192, 128, 20][..]),
        (&long, &[192; 3][..]),
    ];
    let from_base = cases.iter().map(|case| (DType::Bf16, Form::FromBase, case));
    let in_place = cases[2..7].iter().map(|case| (DType::F16, Form::InPlace, case));
    for (dtype, form, &(shapes, ranks)) in from_base.chain(in_place) {
        let k = ranks.len();
        let spec = Spec { shapes: shapes.clone(), max_rank: 256, slots: k, k_max: k, ..small(dtype, form) };
        let mut model = Model::without_adapters(backend, &spec, StateMemory::allocate());
        for (slot, &rank) in ranks.iter().enumerate() {
            model.fill(slot, |model, t, (o, i)| {
                let rank = if rank == 20 && t % 3 != 1 { 64 } else { rank };
                model.pair_at(o, i, rank, [slot != 1 || t % 3 != 2, slot != 2 || t % 2 == 0])
            });
        }
        let ids: Vec<i32> = (0..k as i32).collect();
        let mut drift = Drift::new(&spec);
        for scale in if k == 3 { vec![1.0] } else { vec![1.0, -0.75] } {
            let gates: Vec<f32> = (0..k).map(|e| scale * ((e * 5 % 7) as f32 - 2.5)).collect();
            model.to(&ids, &gates);
            let what = format!("{dtype}, {form:?}, ranks {ranks:?}, scale {scale}");
            if form == Form::InPlace { drift.assert_holds(&model, &ids, &gates, &what) } else { model.assert_holds(&ids, &gates, &what) }
        }
    }
}

/// Targets of a row in turns, on a GPU so many that a block takes tiles from the queue twice: with A held as different numbers of panels ask for,
/// and more of it in shared memory. The last gate is zero in the end, though it counts as an adapter until a launch looks closer: then every fifth
/// target has too few ranks left to be held, and every fifth is base again.
fn deep_targets_of_all_kinds(backend: &Backend) {
    let (count, cols, most) = (if backend.cuda.is_some() { 4_300 } else { 10 }, 8, 256);
    let ranks: [[usize; 12]; 5] = [
        [64; 12],
        [64, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 256],
        [192, 192, 192, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [256, 256, 256, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    let mut rng = Rng(16);
    let mut grid = |rows: usize, cols: usize| {
        let bits = rng.bits(DType::Bf16, rows * cols, 0.5);
        Grid::new(backend, DType::Bf16, rows, cols, Layout::dense(cols), &bits)
    };
    let (base, weight) = (grid(count, cols), grid(count, cols));
    let adapters: Vec<(Grid, Grid)> = (0..12).map(|_| (grid(most, cols), grid(count, most))).collect();
    let shape = TargetShape { out_features: 1, in_features: cols as u64, rank_cap: most as u64 };
    let bank = AdapterBank::new(&backend.stream, DType::Bf16, 12, &vec![shape; count], StateMemory::allocate()).unwrap();
    let part = |grid: &Grid, rows: Range<u64>, cols: u64| grid.tensor().slice(rows, 0..cols).unwrap();
    for (slot, (a, b)) in adapters.iter().enumerate() {
        let factor = |t: u64| {
            let rank = ranks[t as usize % 5][slot] as u64;
            (rank > 0).then(|| Factor { a: part(a, 0..rank, cols as u64), b: part(b, t..t + 1, rank), scale: 0.5 })
        };
        bank.set_slot(&backend.stream, slot as u64, &(0..count as u64).map(factor).collect::<Vec<_>>()).unwrap();
    }
    let weights = weight.weight().split_rows(&vec![1; count]).unwrap();
    let targets =
        weights.into_iter().zip(0..).map(|(weight, t)| Target { weight, base: Some(part(&base, t..t + 1, cols as u64)) }).collect();
    let options = SwitchOptions { kernels: backend.kernels, k_max: 12, ..Default::default() };
    let mut set = SwitchSet::new(&backend.stream, &bank, targets, options).unwrap();

    let exact = |g: &Grid| Exact::new(DType::Bf16, g.rows, g.cols, &g.bits());
    let (exact_base, exact_adapters) = (exact(&base), adapters.iter().map(|(a, b)| (exact(a), exact(b))).collect::<Vec<_>>());
    for (scale, last) in [(0.25f32, 0.5), (-0.5, 0.0)] {
        let gates: Vec<f32> = (0..12).map(|e| if e == 11 { last } else { scale * ((e * 5 % 7) as f32 - 2.5) }).collect();
        let (ids, device_gates) = (Grid::ids(backend, &(0..12).collect::<Vec<_>>()), Grid::floats(backend, &gates));
        set.to(&backend.stream, &ids.mat(), &device_gates.mat()).unwrap();
        backend.synchronize();
        let (mut want, mut bounds) = (Vec::new(), Vec::new());
        for t in 0..count {
            let row = |rows: usize, x: &[f64]| Exact { rows, cols: x.len() / rows, x: x.to_vec() };
            let pairs: Vec<(Exact, Exact, f64)> = (0..12)
                .filter(|&slot| ranks[t % 5][slot] > 0)
                .map(|slot| {
                    let (rank, (a, b)) = (ranks[t % 5][slot], &exact_adapters[slot]);
                    (row(rank, &a.x[..rank * cols]), row(1, &b.x[t * most..t * most + rank]), 0.5 * f64::from(gates[slot]))
                })
                .collect();
            let terms: Vec<Term<'_>> = pairs.iter().map(|(a, b, coefficient)| Term { a, b, coefficient: *coefficient }).collect();
            let (values, errors) = oracle::merge(&row(1, &exact_base.x[t * cols..(t + 1) * cols]), &terms);
            want.extend(values.x);
            bounds.extend(errors);
        }
        oracle::assert_close(DType::Bf16, &weight.values(), &want, &bounds, &format!("last gate {last}"));
    }
}

fn assert_deep_ranks(backend: &Backend, cases: &[(usize, usize, &[usize])]) {
    for (dtype, form, &(rows, cols, ranks)) in
        [(DType::Bf16, Form::FromBase), (DType::F16, Form::InPlace)].iter().flat_map(|&(d, f)| cases.iter().map(move |c| (d, f, c)))
    {
        // Width and height are for runs of tiles, which the CPU does not know.
        let shorter = |n: usize| if backend.cuda.is_some() || n < 1_000 { n } else { n / 16 };
        let (rows, cols, k) = (shorter(rows), shorter(cols), ranks.len());
        let spec = Spec { shapes: vec![(rows, cols)], max_rank: 256, slots: k, k_max: k, ..small(dtype, form) };
        let mut model = Model::new(backend, &spec);
        for (slot, &rank) in ranks.iter().enumerate() {
            let pair = model.pair(rows, cols, rank, 0.5, 0.1);
            model.set_slot(slot, vec![Some(pair)]);
        }
        let ids: Vec<i32> = (0..k as i32).collect();
        if form == Form::InPlace {
            let mut drift = Drift::new(&spec);
            for scale in [1.0, -0.75, 0.0] {
                let gates: Vec<f32> = (0..k).map(|e| scale * ((e * 5 % 7) as f32 - 2.5)).collect();
                model.to(&ids, &gates);
                drift.assert_holds(&model, &ids, &gates, &format!("{dtype}, ranks {ranks:?}, scale {scale}"));
            }
            continue;
        }
        for gates in [[0.25, -1.0, 0.5, 2.0, 1e-30, 0.5, 0.5, -3.0, 1.0], [1.5, 0.0, -0.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]] {
            model.to(&ids, &gates[..k]);
            model.assert_holds(&ids, &gates[..k], &format!("{dtype}, ranks {ranks:?}, gates {gates:?}"));
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let mut gates = vec![0.5; k];
            gates[1] = bad;
            model.to(&ids, &gates);
            assert!(model.weights[0].values().iter().all(|x| !x.is_finite()), "{bad}, ranks {ranks:?}");
        }
        let gates = vec![0.5; k];
        model.to(&ids, &gates);
        model.assert_holds(&ids, &gates, "healed");
    }
}

/// Targets of which the Hopper kernel holds A among others, whose ranks are few (second), not deep (third), or deep with one of few among them
/// (fourth). From base each has the bits that it has alone, where no zero gate names another adapter either.
fn deep_and_shallow_targets(backend: &Backend) {
    let shapes = vec![(130, 320), (70, 200), (300, 264), (64, 128), (129, 72)];
    let ranks = [[64, 8, 64, 128, 256], [128, 20, 64, 20, 256], [64, 40, 0, 256, 256], [16, 64, 256, 64, 20]];
    for (dtype, form) in FLOATS.into_iter().flat_map(|dtype| [(dtype, Form::FromBase), (dtype, Form::InPlace)]) {
        let spec = Spec { shapes: shapes.clone(), max_rank: 256, ..small(dtype, form) };
        let mut model = Model::new(backend, &spec);
        for (slot, ranks) in ranks.iter().enumerate() {
            let pairs = shapes.iter().zip(ranks).map(|(&(o, i), &rank)| Some(model.pair(o, i, rank, 0.5, 0.1))).collect();
            model.set_slot(slot, pairs);
        }
        let ids = [0, 1, 2, 3];
        let routes = [[0.25, -1.0, 0.5, 0.0], [1.5, 0.75, -0.3, 0.0]];
        if form == Form::InPlace {
            let mut drift = Drift::new(&spec);
            for gates in routes {
                model.to(&ids, &gates);
                drift.assert_holds(&model, &ids, &gates, &format!("{dtype}, gates {gates:?}"));
            }
            continue;
        }
        for gates in routes {
            model.to(&ids, &gates);
            model.assert_holds(&ids, &gates, &format!("{dtype}, gates {gates:?}"));
            let together = model.all_bits();
            model.set.invalidate(&backend.stream).unwrap();
            let (few_ids, few_gates) = (Grid::ids(backend, &ids[..3]), Grid::floats(backend, &gates[..3]));
            for (t, bits) in together.iter().enumerate() {
                model.weights[t].set_bits(&vec![0; bits.len()]);
                model.set.to_targets(&backend.stream, t as u64..t as u64 + 1, &few_ids.mat(), &few_gates.mat()).unwrap();
                backend.synchronize();
                assert_eq!(&model.weights[t].bits(), bits, "{dtype}, target {t} alone");
            }
        }
    }
}

/// So many tiles one below the other that a block of the portable kernel takes several, for which it keeps A (two slices) or cannot (nine
/// of them, more than stay). The last strip of tiles is a lone one. A second route, since what is kept must not outlive it.
fn runs_of_tiles_downwards(backend: &Backend) {
    for (dtype, ranks) in [DType::Bf16, DType::F32].into_iter().flat_map(|dtype| [(dtype, vec![4, 2]), (dtype, vec![1; 9])]) {
        let (rows, cols, k) = (64 * 12_800 + 17, 8, ranks.len());
        let spec = Spec { shapes: vec![(rows, cols)], max_rank: 4, slots: k, k_max: k, ..small(dtype, Form::FromBase) };
        let mut model = Model::new(backend, &spec);
        for (slot, &rank) in ranks.iter().enumerate() {
            let pair = model.pair(rows, cols, rank, 0.5, 0.3);
            model.set_slot(slot, vec![Some(pair)]);
        }
        let ids: Vec<i32> = (0..k as i32).collect();
        for scale in [1.0, -0.75] {
            let gates: Vec<f32> = (0..k).map(|e| scale * (0.25 + e as f32)).collect();
            model.to(&ids, &gates);
            model.assert_holds(&ids, &gates, &format!("ranks {ranks:?}"));
        }
    }
}

/// More targets than the Hopper kernel plans in one launch (32,768): the portable one serves them all, which are the rows of one matrix.
fn more_targets_than_a_launch_plans(backend: &Backend) {
    let (count, cols) = (32_769, 8);
    let mut rng = Rng(14);
    let mut grid = |rows: usize, cols: usize| {
        let bits = rng.bits(DType::Bf16, rows * cols, 1.0);
        Grid::new(backend, DType::Bf16, rows, cols, Layout::dense(cols), &bits)
    };
    let (base, weight, a, b) = (grid(count, cols), grid(count, cols), grid(1, cols), grid(count, 1));
    let shape = TargetShape { out_features: 1, in_features: cols as u64, rank_cap: 1 };
    let bank = AdapterBank::new(&backend.stream, DType::Bf16, 1, &vec![shape; count], StateMemory::allocate()).unwrap();
    let row = |grid: &Grid, i: u64| grid.tensor().slice(i..i + 1, 0..grid.cols as u64).unwrap();
    let factor = |i: u64| Some(Factor { a: a.tensor(), b: row(&b, i), scale: 1.0 });
    bank.set_slot(&backend.stream, 0, &(0..count as u64).map(factor).collect::<Vec<_>>()).unwrap();
    let weights = weight.weight().split_rows(&vec![1; count]).unwrap();
    let targets = weights.into_iter().zip(0..).map(|(weight, i)| Target { weight, base: Some(row(&base, i)) }).collect();
    let options = SwitchOptions { kernels: backend.kernels, ..Default::default() };
    let mut set = SwitchSet::new(&backend.stream, &bank, targets, options).unwrap();
    let exact = |g: &Grid| Exact::new(DType::Bf16, g.rows, g.cols, &g.bits());
    for gate in [0.5, -1.25] {
        let (ids, gates) = (Grid::ids(backend, &[0]), Grid::floats(backend, &[gate]));
        set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
        backend.synchronize();
        let (want, bounds) = oracle::merge(&exact(&base), &[Term { a: &exact(&a), b: &exact(&b), coefficient: f64::from(gate) }]);
        oracle::assert_close(DType::Bf16, &weight.values(), &want.x, &bounds, &format!("gate {gate}"));
    }
    set.unmerge(&backend.stream).unwrap();
    backend.synchronize();
    assert_eq!(weight.bits(), base.bits());
}

/// The largest rank and the widest route, in the smallest sum that has them.
fn largest_rank_and_k(backend: &Backend) {
    for dtype in FLOATS {
        let spec = Spec { slots: 32, k_max: 32, shapes: vec![(70, 140)], max_rank: 256, ..small(dtype, Form::FromBase) };
        let mut model = Model::new(backend, &spec);
        for slot in 0..32 {
            let pair = model.pair(70, 140, if slot == 31 { 256 } else { 9 }, 1.0, 0.1);
            model.set_slot(slot, vec![Some(pair)]);
        }
        let ids: Vec<i32> = (0..32).rev().collect();
        let gates = vec![1.0 / 32.0; 32];
        model.to(&ids, &gates);
        model.assert_holds(&ids, &gates, "k = 32, rank 256");
    }
}

/// A switch is one rounding of the exact sum plus the f32 bound; most elements are within a half ulp. Judged over all elements, so that
/// a fold of the coefficient into a 16-bit operand (up to 2 ulp) would show.
fn one_rounding(backend: &Backend) {
    for dtype in [DType::Bf16, DType::F16] {
        let spec = Spec { shapes: vec![(128, 256)], max_rank: 64, ..small(dtype, Form::FromBase) };
        let mut model = Model::new(backend, &spec);
        for slot in 0..2 {
            let pair = model.pair(128, 256, 64, 0.37, 0.5);
            model.set_slot(slot, vec![Some(pair)]);
        }
        model.to(&[0, 1], &[0.61, 0.39]);
        let (exact, _) = model.exact(0, &model.list(0, &[0, 1], &[0.61, 0.39]));
        let got = model.weights[0].values();
        // The f32 sums cost at most 133 * 2^-23 of magnitudes below 9, so 0.15 ulp of an f16 of 1 or more.
        let ulp = |(got, exact): (&f64, &f64)| (got - exact).abs() / (2.0 * oracle::half_ulp(dtype, *exact));
        let worst = got.iter().zip(&exact.x).filter(|(_, e)| e.abs() >= 1.0).map(ulp).fold(0.0, f64::max);
        assert!(worst < 0.75, "{dtype}: {worst} ulp");
    }
}

/// Weights that are rows of one fused buffer, each its own target; the fused buffer's other columns stay untouched.
fn fused_weights(backend: &Backend) {
    let (rows, cols, stride) = (96, 40, 64);
    let mut rng = Rng(9);
    let base = Grid::new(backend, DType::Bf16, rows, cols, Layout { stride, shift: 0 }, &rng.bits(DType::Bf16, rows * cols, 1.0));
    let fused = Grid::poisoned(backend, DType::Bf16, rows, cols, Layout { stride, shift: 0 });
    let heights = [48u64, 16, 32];
    let shape = |&h: &u64| TargetShape { out_features: h, in_features: cols as u64, rank_cap: 4 };
    let shapes: Vec<TargetShape> = heights.iter().map(shape).collect();
    let bank = AdapterBank::new(&backend.stream, DType::Bf16, 1, &shapes, StateMemory::allocate()).unwrap();
    let mut start = 0;
    let mut targets = Vec::new();
    for (weight, h) in fused.weight().split_rows(&heights).unwrap().into_iter().zip(heights) {
        targets.push(Target { weight, base: Some(base.tensor().slice(start..start + h, 0..cols as u64).unwrap()) });
        start += h;
    }
    let mut set =
        SwitchSet::new(&backend.stream, &bank, targets, SwitchOptions { kernels: backend.kernels, ..Default::default() }).unwrap();
    set.unmerge(&backend.stream).unwrap();
    backend.synchronize();
    assert_eq!(fused.bits(), base.bits());
}

fn memory_from_the_caller(backend: &Backend) {
    let spec = small(DType::F32, Form::FromBase);
    let model = Model::new(backend, &spec);
    let bytes = SwitchSet::memory_bytes(&backend.stream, 2, 4).unwrap();
    let memory = Grid::poisoned(backend, DType::U8, 1, bytes as usize, Layout::dense(bytes as usize));
    let set = |addr, bytes| {
        // SAFETY: the grid outlives the set.
        let memory = unsafe { StateMemory::at(addr, bytes) };
        set_over(backend, &spec, &model.bank, memory, &model.weights, &model.bases)
    };
    let mut given = set(memory.addr(), bytes).unwrap();
    let (ids, gates) = (Grid::ids(backend, &[0, 1]), Grid::floats(backend, &[0.5, 0.5]));
    given.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
    given.unmerge(&backend.stream).unwrap();
    backend.synchronize();
    assert_eq!(model.all_bits(), model.base_bits());
    memory.bits(); // its canaries
    if backend.cuda.is_some() {
        named(set(memory.addr(), bytes - 1), "memory.bytes");
        named(set(memory.addr() + 64, bytes), "memory.addr");
    }
}

pub fn named<T>(result: Result<T, Error>, name: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{name} should be refused"));
    assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
}

fn bad_sets_are_refused(backend: &Backend) {
    let f32 = DType::F32;
    let shape = |o, i, r| TargetShape { out_features: o, in_features: i, rank_cap: r };
    let bank_of = |dtype, slots, shapes: &[TargetShape]| AdapterBank::new(&backend.stream, dtype, slots, shapes, StateMemory::allocate());
    named(bank_of(DType::I32, 1, &[]), "dtype");
    named(bank_of(f32, 0, &[]), "slots");
    named(bank_of(f32, 65_537, &[]), "slots");
    named(bank_of(f32, 1, &[shape(4, 4, 257)]), "targets[0].rank_cap");
    named(bank_of(f32, 1, &[shape(4, 4, 4), shape(1 << 40, 4, 4)]), "targets[1].out_features");

    let bank = bank_of(f32, 2, &[shape(4, 8, 2), shape(4, 8, 2)]).unwrap();
    let big = Grid::poisoned(backend, f32, 16, 8, Layout { stride: 16, shift: 0 });
    // SAFETY: inside the grid, which outlives everything here.
    let weight = |row: u64, col: u64, stride| unsafe {
        lora_switch::Weight::from_raw(&backend.context, big.addr() + 4 * (row * 16 + col), f32, 4, 8, stride)
    };
    let set = |targets, form, k_max| SwitchSet::new(&backend.stream, &bank, targets, SwitchOptions { form, k_max, ..Default::default() });
    let in_place = |weight| Target { weight, base: None };
    let pair = |a, b| vec![in_place(a), in_place(b)];
    named(set(vec![in_place(weight(0, 0, 16))], Form::InPlace, 2), "targets");
    named(set(pair(weight(0, 0, 16), weight(4, 0, 16)), Form::InPlace, 0), "k_max");
    named(set(pair(weight(0, 0, 16), weight(4, 0, 16)), Form::InPlace, 33), "k_max");
    named(set(pair(weight(0, 0, 16), weight(3, 0, 16)), Form::InPlace, 2), "targets[0].weight");
    named(set(pair(weight(4, 0, 7), weight(8, 0, 16)), Form::InPlace, 2), "targets[0].weight.stride");
    named(set(pair(weight(0, 0, 16), weight(4, 0, 16)), Form::FromBase, 2), "targets[0].base");
    let with_base = |w, b: &Grid| Target { weight: w, base: Some(b.tensor()) };
    let base = Grid::poisoned(backend, f32, 4, 8, Layout::dense(8));
    named(set(vec![with_base(weight(0, 0, 16), &base), with_base(weight(4, 0, 16), &base)], Form::InPlace, 2), "targets[0].base");
    let wrong = Grid::poisoned(backend, f32, 4, 7, Layout::dense(7));
    named(set(vec![with_base(weight(0, 0, 16), &base), with_base(weight(4, 0, 16), &wrong)], Form::FromBase, 2), "targets[1].base.cols");
    let half = Grid::poisoned(backend, DType::F16, 4, 8, Layout::dense(8));
    named(set(pair(weight(0, 0, 16), half.weight()), Form::InPlace, 2), "targets[1].weight.dtype");
    // Side by side in the same rows is no overlap.
    set(pair(weight(0, 0, 16), weight(0, 8, 16)), Form::InPlace, 2).unwrap();
}

fn bad_refills_and_routes_are_refused(backend: &Backend) {
    let mut model = Model::new(backend, &small(DType::F32, Form::FromBase));
    let grid = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, Layout::dense(cols));
    let (a, b) = (grid(DType::F32, 3, 80), grid(DType::F32, 48, 3));
    let factor = |a: &Grid, b: &Grid, scale| Some(Factor { a: a.tensor(), b: b.tensor(), scale });
    let bank = model.bank.clone();
    let refill = |slot, factors: &[Option<Factor>]| bank.set_slot(&backend.stream, slot, factors);
    named(refill(4, &[None, None]), "slot");
    named(refill(0, &[None]), "factors");
    named(refill(0, &[factor(&grid(DType::F32, 3, 79), &b, 1.0), None]), "factors[0].a.cols");
    named(refill(0, &[factor(&grid(DType::F32, 21, 80), &b, 1.0), None]), "factors[0].a.rows");
    named(refill(0, &[factor(&a, &grid(DType::F32, 48, 4), 1.0), None]), "factors[0].b.cols");
    named(refill(0, &[None, factor(&grid(DType::F32, 3, 65), &b, 1.0)]), "factors[1].b.rows");
    named(refill(0, &[factor(&a, &grid(DType::Bf16, 48, 3), 1.0), None]), "factors[0].b.dtype");
    named(refill(0, &[factor(&a, &b, f32::NAN), None]), "factors[0].scale");

    model.to(&[0, 1], &[0.5, 0.5]);
    let before = model.all_bits();
    let (ids, gates) = (Grid::ids(backend, &[1, 2]), Grid::floats(backend, &[0.5, 0.5]));
    let stream = &backend.stream;
    let set = &mut model.set;
    named(set.to(stream, &Grid::ids(backend, &[0; 5]).mat(), &Grid::floats(backend, &[0.2; 5]).mat()), "ids.cols");
    named(set.to(stream, &gates.mat(), &gates.mat()), "ids.dtype");
    named(set.to(stream, &ids.mat(), &ids.mat()), "gates.dtype");
    named(set.to(stream, &ids.mat(), &Grid::floats(backend, &[0.5; 3]).mat()), "gates.cols");
    named(set.to_targets(stream, 0..3, &ids.mat(), &gates.mat()), "targets");
    named(set.weight(2), "target");
    let mut out = (grid(DType::I32, 1, 4), grid(DType::F32, 1, 3));
    named(set.current(stream, 0, &mut out.0.mat_mut(), &mut out.1.mat_mut()), "coefficients.cols");
    named(set.current(stream, 2, &mut out.0.mat_mut(), &mut out.1.mat_mut()), "target");
    assert_eq!(model.all_bits(), before);
}

/// A small set of more tiles than blocks: a block goes on from one target to the next, past one that another kernel serves.
fn blocks_go_on_to_other_targets(backend: &Backend) {
    for (form, slots) in [(Form::FromBase, 4), (Form::InPlace, 4), (Form::FromBase, 33)] {
        let shapes = vec![(5, 27_200), (130, 320), (3, 16_000), (33, 65), (5, 27_200)];
        let spec = Spec { shapes, slots, max_rank: 32, ..small(DType::Bf16, form) };
        let mut model = Model::new(backend, &spec);
        let (mut rng, mut drift) = (Rng(3), Drift::new(&spec));
        for _ in 0..5 {
            let (ids, gates) = random_route(&mut rng, &spec);
            model.to(&ids, &gates);
            match form {
                Form::FromBase => model.assert_holds(&ids, &gates, "several targets"),
                Form::InPlace => drift.assert_holds(&model, &ids, &gates, "several targets"),
            }
        }
    }
}

/// Launches without a pause, each of which may begin before the one before has ended: the same bits as one at a time. The route is that
/// of a router just before, so that what a launch sees too early is another one; some repeat what is there.
fn launches_in_a_row(backend: &Backend) {
    for form in [Form::FromBase, Form::InPlace] {
        // Of more than 32 slots, adapters are not read with the route.
        let shapes = vec![(384, 640), (48, 80), (200, 136)];
        let few = Spec { shapes, max_rank: 70, ..small(DType::Bf16, form) };
        let deep = [176, 541].map(|tiles| lone_and_deep(backend, form, tiles));
        for spec in [few.clone(), Spec { slots: 33, ..few }].into_iter().chain(deep) {
            let run = |pauses: bool| {
                let mut model = Model::new(backend, &spec);
                if let &[(rows, cols)] = &spec.shapes[..] {
                    for (slot, rank) in [64, 40, 36, 33].into_iter().enumerate() {
                        let pair = model.pair(rows, cols, rank, 0.5, 0.3);
                        model.set_slot(slot, vec![Some(pair)]);
                    }
                }
                after_launches(&mut model, pauses)
            };
            assert_eq!(run(false), run(true), "{form:?}, {} slots, {} targets", spec.slots, spec.shapes.len());
        }
    }
}

/// What the weights hold behind a row of routes and switches.
fn after_launches(model: &mut Model, pauses: bool) -> Vec<Vec<u32>> {
    let (backend, experts, k) = (model.backend.clone(), 4, 2);
    let mut rng = Rng(5);
    let logits: Vec<Grid> =
        (0..12).map(|_| Grid::new(&backend, DType::F32, 1, experts, Layout::dense(experts), &rng.bits(DType::F32, experts, 3.0))).collect();
    let mut ids = Grid::new(&backend, DType::I32, 1, k, Layout::dense(k), &[0, 1]);
    let mut gates = Grid::poisoned(&backend, DType::F32, 1, k, Layout::dense(k));
    backend.synchronize();
    for step in [0, 1, 1, 2, 3, 0, 4, 5, 5, 6, 7, 8, 9, 10, 11, 10] {
        let options = RouteOptions::default();
        route(&backend.stream, &options, &logits[step].mat(), &mut ids.mat_mut(), &mut gates.mat_mut()).unwrap();
        if pauses {
            backend.synchronize();
        }
        model.set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
        if pauses {
            backend.synchronize();
        }
    }
    backend.synchronize();
    model.all_bits()
}

/// The same with long launches over several targets, of some of which B cannot be held: what a block begins with is another target's, with
/// one tile of it or more, and what it has brought for the wrong route may be more or less than what the right one needs.
fn long_launches_in_a_row(backend: &Backend) {
    for form in [Form::FromBase, Form::InPlace] {
        let run = |pauses: bool| {
            let mut model = Model::without_adapters(backend, &long(backend, DType::Bf16, form), StateMemory::allocate());
            fill_long(&mut model);
            after_launches(&mut model, pauses)
        };
        assert!(run(false) == run(true), "{form:?}");
    }
}

/// One target, on a GPU of two tiles for a block or of several, whose ranks are such that B's panels stay with it on Hopper's path of small
/// sets.
fn lone_and_deep(backend: &Backend, form: Form, tiles: usize) -> Spec {
    let cols = if backend.cuda.is_some() { tiles * 128 } else { 3 * 128 };
    Spec { shapes: vec![(5, cols)], max_rank: 64, ..small(DType::Bf16, form) }
}

/// The same where the slots that a launch brings in are filled just before it, while the others are merged: it may look at them before
/// that has happened.
fn refills_in_a_row(backend: &Backend) {
    for form in [Form::FromBase, Form::InPlace] {
        let few = Spec { shapes: vec![(384, 640), (48, 80)], max_rank: 70, ..small(DType::Bf16, form) };
        let deep = [176, 541].map(|tiles| (lone_and_deep(backend, form, tiles), 33, 64));
        for (spec, least, most) in [(few.clone(), 8, 66), (Spec { slots: 33, ..few }, 8, 66)].into_iter().chain(deep) {
            let run = |pauses: bool| {
                let mut model = Model::new(backend, &spec);
                let mut rng = Rng(6);
                let mut contents = |slot: usize| {
                    [slot + least, most - slot].map(|rank| {
                        let pairs = spec.shapes.iter().map(|&(o, i)| Some(model.pair_of(&mut rng, o, i, rank)));
                        pairs.collect()
                    })
                };
                let contents: Vec<[Vec<Option<Pair>>; 2]> = (0..4).map(&mut contents).collect();
                let routes = [[0u32, 1], [2, 3]].map(|ids| Grid::new(backend, DType::I32, 1, 2, Layout::dense(2), &ids));
                let gates = Grid::new(backend, DType::F32, 1, 2, Layout::dense(2), &[0.75f32.to_bits(), 0.25f32.to_bits()]);
                backend.synchronize();
                for step in 0..12 {
                    for slot in [step % 2 * 2, step % 2 * 2 + 1] {
                        model.enqueue_slot(slot, &contents[slot][step / 2 % 2]);
                    }
                    if pauses {
                        backend.synchronize();
                    }
                    model.set.to(&backend.stream, &routes[step % 2].mat(), &gates.mat()).unwrap();
                    if pauses {
                        backend.synchronize();
                    }
                }
                backend.synchronize();
                model.all_bits()
            };
            assert_eq!(run(false), run(true), "{form:?}, {} slots, {} targets", spec.slots, spec.shapes.len());
        }
    }
}

on_paths!(
    blocks_go_on_to_other_targets,
    launches_in_a_row,
    long_launches_in_a_row,
    refills_in_a_row,
    from_base_matches_oracle,
    in_place_matches_oracle,
    ragged_mixture,
    one_operand_is_aligned,
    from_base_forgets_the_past,
    an_empty_route_copies_bits,
    an_unchanged_route_costs_nothing,
    a_zero_coefficient_skips_the_adapter,
    coefficients_that_are_not_finite,
    ids_out_of_range_are_reported,
    refilling_a_merged_slot,
    a_single_row_has_any_stride,
    the_last_slot,
    a_range_of_targets,
    many_targets,
    runs_of_tiles,
    deep_ranks_of_small_sets,
    long_launches_hold_b_in_part,
    high_slots_of_long_launches,
    unmerging_long_sets,
    deep_ranks,
    deep_ranks_down_columns,
    deep_ranks_that_stay,
    deep_targets_of_all_kinds,
    deep_and_shallow_targets,
    runs_of_tiles_downwards,
    more_targets_than_a_launch_plans,
    largest_rank_and_k,
    one_rounding,
    fused_weights,
    memory_from_the_caller,
    bad_sets_are_refused,
    bad_refills_and_routes_are_refused,
);
