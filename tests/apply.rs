//! Unmerged adapters: both backends against the oracle, against the switch, and against their own promises.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, decode, encode};
use crate::oracle::{self, Term};
use crate::switch::{Model, Pair, Spec, small};
use lora_switch::{
    DType, Error, Form, Mat, MatMut, Odd, Routes, Stream, apply, apply_begin, apply_finish, apply_into, apply_workspace_bytes, permute,
    permute_workspace_bytes,
};
use proptest::prelude::*;

/// Rows with their routes, and what is added to.
pub struct Batch {
    pub x: Grid,
    /// One a target.
    pub y: Vec<Grid>,
    pub ids: Grid,
    pub gates: Grid,
    pub row_map: Option<Grid>,
}

/// How a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Whole,
    Halves,
    /// To zeros, whatever y holds.
    Into,
}

pub const CALLS: [Call; 3] = [Call::Whole, Call::Halves, Call::Into];

impl Batch {
    /// Random rows and routes for all of a model's targets.
    pub fn random(model: &Model, rng: &mut Rng, rows: usize, k: usize, y_type: DType, layout: impl Fn(usize) -> Layout) -> Self {
        let (backend, dtype, cols) = (&model.backend, model.spec.dtype, model.spec.shapes[0].1);
        let x = Grid::with_gap(backend, dtype, rows, cols, layout(cols), 0xff, &rng.bits(dtype, rows * cols, 1.0));
        let y = |&(out, _): &(usize, usize)| Grid::new(backend, y_type, rows, out, layout(out), &rng.bits(y_type, rows * out, 1.0));
        let y = model.spec.shapes.iter().map(y).collect();
        let (ids, gates) = random_routes(rng, model.spec.slots, rows * k);
        let ids = Grid::new(backend, DType::I32, rows, k, layout(k), &ids);
        let gates = Grid::new(backend, DType::F32, rows, k, layout(k), &gates);
        Self { x, y, ids, gates, row_map: None }
    }

    /// The same with gaps between rows, packs that are `aligned` or not, and if `mapped` a map from rows to items of the routes.
    pub fn laid_out(model: &Model, rng: &mut Rng, (rows, k): (usize, usize), y_type: DType, aligned: bool, mapped: bool) -> Self {
        let pads = rng.below(4);
        let layout = |cols: usize| match aligned {
            true => Layout { stride: cols.next_multiple_of(8) + 8 * pads, shift: 0 },
            false => Layout { stride: cols + pads, shift: pads },
        };
        let mut batch = Self::random(model, rng, rows, k, y_type, layout);
        if mapped {
            // Items that serve several rows, none, and numbers that name none.
            let item = |_| match rng.below(6) {
                0 => rng.pick(&[-1i32, -9, rows as i32, i32::MAX]) as u32,
                _ => rng.below(rows) as u32,
            };
            let map: Vec<u32> = (0..rows).map(item).collect();
            batch.row_map = Some(Grid::new(&model.backend, DType::I32, 1, rows, Layout { stride: rows, shift: pads }, &map));
        }
        batch
    }

    fn run(&mut self, model: &Model, call: Call) {
        if call == Call::Into {
            for y in &mut self.y {
                y.set_bits(&vec![encode(y.dtype, f64::NAN); y.rows * y.cols]);
            }
        }
        let bytes = workspace_bytes(model, self.x.rows, self.ids.cols);
        let mut workspace = Grid::poisoned(&model.backend, DType::U8, 1, bytes, Layout::dense(bytes));
        self.run_in(model, call, &mut workspace).unwrap();
        workspace.bits(); // its canaries
    }

    pub fn run_in(&mut self, model: &Model, call: Call, workspace: &mut Grid) -> Result<(), Error> {
        let (stream, bank) = (&model.backend.stream, &model.bank);
        if call == Call::Halves {
            return self.run_halves(model, stream, workspace, || ());
        }
        let (ids, gates, row_map) = (self.ids.mat(), self.gates.mat(), self.row_map.as_ref().map(Grid::mat));
        let routes = Routes { ids: &ids, gates: &gates, row_map: row_map.as_ref() };
        let mut y: Vec<MatMut<'_>> = self.y.iter_mut().map(Grid::mat_mut).collect();
        let apply = if call == Call::Into { apply_into } else { apply };
        apply(stream, bank, 0, &self.x.mat(), &routes, &mut y, &mut workspace.mat_mut())
    }

    /// The first half on a stream of its own.
    pub fn run_halves(&mut self, model: &Model, beside: &Stream, workspace: &mut Grid, join: impl FnOnce()) -> Result<(), Error> {
        let (ids, gates, row_map) = (self.ids.mat(), self.gates.mat(), self.row_map.as_ref().map(Grid::mat));
        let routes = Routes { ids: &ids, gates: &gates, row_map: row_map.as_ref() };
        let mut y: Vec<MatMut<'_>> = self.y.iter_mut().map(Grid::mat_mut).collect();
        apply_begin(beside, &model.bank, 0..y.len() as u64, &self.x.mat(), &routes, &mut workspace.mat_mut())?;
        join();
        apply_finish(&model.backend.stream, &model.bank, 0, &routes, &mut y, &workspace.mat())
    }

    /// The route of a row; none if the map says so.
    pub fn route(&self, row: usize) -> Option<(Vec<i32>, Vec<f32>)> {
        let item = self.row_map.as_ref().map_or(row as i32, |map| map.i32s()[row]);
        let item = usize::try_from(item).ok().filter(|&item| item < self.ids.rows)?;
        let part = item * self.ids.cols..(item + 1) * self.ids.cols;
        let gates = self.gates.bits()[part.clone()].iter().map(|&bits| f32::from_bits(bits)).collect();
        Some((self.ids.i32s()[part].to_vec(), gates))
    }

    pub fn bits(&self) -> Vec<Vec<u32>> {
        self.y.iter().map(Grid::bits).collect()
    }

    /// What a call adds to.
    pub fn before(&self, call: Call) -> Vec<Vec<u32>> {
        let bits = |y: &Grid| if call == Call::Into { vec![0; y.rows * y.cols] } else { y.bits() };
        self.y.iter().map(bits).collect()
    }

    /// Each row of each y against the oracle; rows without adapters keep their bits.
    pub fn assert_added_to(&self, model: &Model, before: &[Vec<u32>], what: &str) {
        let x = self.x.values();
        for (t, y) in self.y.iter().enumerate() {
            let (got, got_bits) = (y.values(), y.bits());
            for row in 0..self.x.rows {
                let part = row * y.cols..(row + 1) * y.cols;
                let list = self.route(row).map_or(Vec::new(), |(ids, gates)| model.list(t, &ids, &gates));
                if list.is_empty() {
                    assert_eq!(got_bits[part.clone()], before[t][part], "{what}: row {row} of target {t} has no adapters");
                    continue;
                }
                let terms = terms_of(model, t, &list);
                let old: Vec<f64> = before[t][part.clone()].iter().map(|&bits| decode(y.dtype, bits)).collect();
                let in_bf16 = is_dense(model, self.x.rows);
                let (exact, bounds) = oracle::apply(&old, &x[row * self.x.cols..(row + 1) * self.x.cols], &terms, in_bf16);
                oracle::assert_close(y.dtype, &got[part], &exact, &bounds, &format!("{what}: row {row} of target {t}"));
            }
        }
    }
}

fn terms_of<'a>(model: &'a Model, t: usize, list: &[(usize, f32)]) -> Vec<Term<'a>> {
    let term = |&(slot, c): &(usize, f32)| {
        let pair = model.pairs[slot][t].as_ref().unwrap();
        Term { a: &pair.exact_a, b: &pair.exact_b, coefficient: f64::from(c) }
    };
    list.iter().map(term).collect()
}

/// Whether A x may be rounded.
fn is_dense(model: &Model, rows: usize) -> bool {
    let Spec { dtype, slots, max_rank, .. } = model.spec;
    model.backend.cuda.is_some() && dtype == DType::Bf16 && oracle::may_be_dense(rows, slots, max_rank)
}

pub fn workspace_bytes(model: &Model, rows: usize, k: usize) -> usize {
    apply_workspace_bytes(&model.bank, 0..model.spec.shapes.len() as u64, rows as u64, k as u64).unwrap() as usize
}

/// Ids in and out of range, duplicates, zero and negative gates.
fn random_routes(rng: &mut Rng, slots: usize, n: usize) -> (Vec<u32>, Vec<u32>) {
    let id = |rng: &mut Rng| match rng.below(8) {
        0 => rng.pick(&[-1, -1, slots as i32, i32::MIN]) as u32,
        _ => rng.below(slots) as u32,
    };
    let ids = (0..n).map(|_| id(rng)).collect();
    (ids, (0..n).map(|_| rng.pick(&[0.0, 1.0, 0.25, -0.75, rng.clone().uniform() as f32]).to_bits()).collect())
}

/// A model of targets that share their input.
fn group(spec: Spec, outs: &[usize], cols: usize) -> Spec {
    Spec { shapes: outs.iter().map(|&out| (out, cols)).collect(), ..spec }
}

/// Around a lane's eight elements, a warp's 32 rows, a block's 128 and 2048 columns; primes; 1; 0.
const OUTS: [usize; 12] = [0, 1, 7, 31, 32, 33, 64, 127, 128, 129, 200, 301];
const COLS: [usize; 11] = [0, 1, 7, 8, 9, 64, 97, 256, 2047, 2048, 2057];
const RANKS: [usize; 9] = [1, 3, 8, 9, 16, 17, 33, 64, 100];

fn matches_oracle(backend: &Backend) {
    let outs = prop::collection::vec((0..OUTS.len()).prop_map(|i| OUTS[i]), 1..5);
    let sizes = ((0..COLS.len()).prop_map(|i| COLS[i]), (0..RANKS.len()).prop_map(|i| RANKS[i]));
    let routes = (
        1usize..9,
        prop_oneof![Just(0usize), Just(1), Just(2), 1usize..9],
        prop_oneof![Just(0usize), Just(1), Just(2), 3usize..20, 65usize..99],
    );
    let kinds = (0usize..3, 0usize..3, any::<bool>(), any::<bool>(), 0usize..3);
    proptest!(cases(60), |(outs in outs, (cols, max_rank) in sizes, (slots, k, rows) in routes, kinds in kinds, seed: u64)| {
        let (d, y_type, aligned, mapped, call) = kinds;
        let spec = Spec { dtype: FLOATS[d], form: Form::FromBase, slots, k_max: 1, shapes: Vec::new(), aligned, max_rank, seed };
        let model = Model::new(backend, &group(spec, &outs, cols));
        let mut rng = Rng(seed ^ 3);
        let mut batch = Batch::laid_out(&model, &mut rng, (rows, k), FLOATS[y_type], aligned, mapped);
        let before = batch.before(CALLS[call]);
        batch.run(&model, CALLS[call]);
        batch.assert_added_to(&model, &before, "apply");
    });
}

/// Rows on each side of every count at which a launch is laid out otherwise. Some rows have the same routes, as in a real batch.
fn any_number_of_rows(backend: &Backend) {
    for dtype in FLOATS {
        for rows in [1, 4, 5, 16, 17, 64, 65, 300] {
            let spec = Spec { max_rank: 60, seed: rows as u64, ..small(dtype, Form::FromBase) };
            let model = Model::new(backend, &group(spec, &[1100, 33], 600));
            let mut batch = Batch::random(&model, &mut Rng(rows as u64), rows, 2, dtype, Layout::dense);
            for call in CALLS {
                let before = batch.before(call);
                batch.run(&model, call);
                batch.assert_added_to(&model, &before, &format!("{rows} rows, {call:?}"));
            }
        }
    }
}

/// Small ranks of few slots, of rows enough for several blocks of each kernel, with gaps or packs that are not whole.
fn small_ranks_of_many_rows(backend: &Backend) {
    let many = if backend.cuda.is_some() { 2100 } else { 100 };
    let kinds = [
        (DType::F16, 300, true, Call::Halves),
        (DType::F16, 300, true, Call::Into),
        (DType::Bf16, 300, false, Call::Into),
        (DType::Bf16, many, true, Call::Into),
        (DType::Bf16, many, true, Call::Whole),
    ];
    for (dtype, rows, aligned, call) in kinds {
        let spec = Spec { max_rank: 16, seed: rows as u64, slots: 8, aligned, ..small(dtype, Form::FromBase) };
        let model = Model::new(backend, &group(spec, &[296, 8, 136, 120], 328));
        let mut batch = Batch::laid_out(&model, &mut Rng(rows as u64), (rows, 2), dtype, true, rows == 300);
        let before = batch.before(call);
        batch.run(&model, call);
        batch.assert_added_to(&model, &before, &format!("{rows} rows, {call:?}"));
    }
}

/// So many tiles of rows and outputs that a block goes down a strip of outputs and on to the next, past a target without outputs;
/// inputs and outputs that the copy engine moves or not; ranks of each depth.
fn many_tiles(backend: &Backend) {
    let is_cuda = backend.cuda.is_some();
    let (rows, outs, cols) = if is_cuda { (1300, [2056, 0, 4104], 2056) } else { (70, [40, 0, 24], 40) };
    let kinds = [
        (8, 16, DType::Bf16, true, Call::Whole),
        (8, 16, DType::F32, false, Call::Halves),
        (2, 64, DType::F16, true, Call::Into),
        (2, 40, DType::Bf16, false, Call::Into),
        (1, 100, DType::Bf16, true, Call::Halves),
        (4, 32, DType::F16, true, Call::Whole),
    ];
    for (slots, max_rank, y_type, aligned, call) in kinds {
        let cols = if aligned { cols } else { cols + 1 };
        let spec = Spec { slots, max_rank, seed: 31, aligned, ..small(DType::Bf16, Form::FromBase) };
        let model = Model::new(backend, &group(spec, &outs, cols));
        let mut batch = Batch::laid_out(&model, &mut Rng(31), (rows, 2), y_type, aligned, false);
        let before = batch.before(call);
        batch.run(&model, call);
        batch.assert_added_to(&model, &before, &format!("{slots} slots of up to {max_rank}, {y_type}, {call:?}"));
    }
}

/// More rows than the order takes in one go, and so many that a block has several groups of them for the same outputs.
fn more_rows_than_are_ordered_at_once(backend: &Backend) {
    let rows = if backend.cuda.is_some() { 4_200 } else { 300 };
    let spec = Spec { max_rank: 16, slots: 8, seed: 5, ..small(DType::Bf16, Form::FromBase) };
    let model = Model::new(backend, &group(spec, &[8; 8], 24));
    let mut batch = Batch::random(&model, &mut Rng(5), rows, 2, DType::Bf16, Layout::dense);
    let before = batch.bits();
    batch.run(&model, Call::Whole);
    batch.assert_added_to(&model, &before, &format!("{rows} rows"));
}

/// Longer inputs than slices of the least length make up.
fn long_inputs(backend: &Backend) {
    for dtype in FLOATS {
        let spec = Spec { max_rank: 20, seed: 23, ..small(dtype, Form::FromBase) };
        let model = Model::new(backend, &group(spec, &[40], 35_000));
        let mut batch = Batch::random(&model, &mut Rng(23), 3, 2, dtype, Layout::dense);
        let before = batch.bits();
        batch.run(&model, Call::Whole);
        batch.assert_added_to(&model, &before, "35,000 columns");
    }
}

/// A row has the same bits in each run, in one call or two, with its route in another order, alone (or among 65 others, where more
/// than 64 rows take another path) and in a larger batch.
fn bits_depend_on_the_row_alone(backend: &Backend) {
    // Outputs in whole packs or not, and ranks that are few or many: each may take another path above 64 rows.
    let sizes = [(60, 1, [130, 33], 40), (150, 66, [130, 33], 40), (150, 66, [136, 40], 40), (150, 66, [136, 40], 16)];
    for (dtype, (rows, few, outs, max_rank)) in FLOATS.into_iter().flat_map(|dtype| sizes.map(|sizes| (dtype, sizes))) {
        let spec = Spec { max_rank, ..group(small(dtype, Form::FromBase), &outs, 700) };
        let model = Model::new(backend, &spec);
        let k = 3;
        // Distinct slots: the order of equal ones is the order of their sum.
        let ids: Vec<u32> = (0..rows * k).map(|i| ((i / k + i % k) % 4) as u32).collect();
        let batch = || {
            let mut batch = Batch::random(&model, &mut Rng(5), rows, k, dtype, Layout::dense);
            batch.ids.set_bits(&ids);
            batch
        };
        let run = |mut batch: Batch, call: Call| {
            batch.run(&model, call);
            batch.bits()
        };
        let want = run(batch(), Call::Whole);
        assert_eq!(run(batch(), Call::Whole), want, "{dtype}: again");
        assert_eq!(run(batch(), Call::Halves), want, "{dtype}: in two calls");
        let mut turned = batch();
        for grid in [&mut turned.ids, &mut turned.gates] {
            let bits: Vec<u32> = grid.bits().chunks(k).flat_map(|route| route.iter().rev().copied()).collect();
            grid.set_bits(&bits);
        }
        assert_eq!(run(turned, Call::Whole), want, "{dtype}: routes turned around");
        for first in [0, 1, 31, rows - few] {
            let all = batch();
            let cut = |grid: &Grid| {
                let bits = &grid.bits()[first * grid.cols..(first + few) * grid.cols];
                Grid::new(backend, grid.dtype, few, grid.cols, Layout::dense(grid.cols), bits)
            };
            let y = all.y.iter().map(cut).collect();
            let part = Batch { x: cut(&all.x), y, ids: cut(&all.ids), gates: cut(&all.gates), row_map: None };
            for (t, bits) in run(part, Call::Whole).into_iter().enumerate() {
                let cols = all.y[t].cols;
                assert_eq!(bits, want[t][first * cols..(first + few) * cols], "{dtype}: from row {first} on, target {t}");
            }
        }
    }
}

/// The same values at multiples of 16 bytes and anywhere: the same bits.
fn alignment_does_not_matter(backend: &Backend) {
    for dtype in FLOATS {
        let runs = [(true, Call::Whole), (false, Call::Whole), (true, Call::Halves), (false, Call::Halves)];
        let bits = runs.map(|(aligned, call)| {
            let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &[136, 33], 700));
            model.spec.aligned = aligned;
            let mut rng = Rng(19);
            for slot in 0..4 {
                let pairs = [136, 33].map(|out| Some(model.pair_of(&mut rng, out, 700, 20)));
                model.set_slot(slot, pairs.into());
            }
            let layout = |cols: usize| if aligned { Layout::dense(cols) } else { Layout { stride: cols + 1, shift: 1 } };
            let mut batch = Batch::random(&model, &mut rng, 9, 2, dtype, layout);
            batch.run(&model, call);
            batch.bits()
        });
        for (bits_of, run) in bits.iter().zip(runs) {
            assert_eq!(*bits_of, bits[0], "{dtype}: {run:?}");
        }
    }
}

/// Merge, then multiply; or multiply, then apply. W x is exact here; merged, W is rounded once an element.
fn agrees_with_the_switch(backend: &Backend) {
    let sizes = ((0..COLS.len() - 3).prop_map(|i| COLS[i]), (0..RANKS.len()).prop_map(|i| RANKS[i]));
    let routes = (1usize..9, 0usize..9, prop_oneof![1usize..9, 65usize..80]);
    proptest!(cases(30), |(d in 0usize..3, (cols, max_rank) in sizes, (slots, k, rows) in routes, aligned: bool, seed: u64)| {
        let dtype = FLOATS[d];
        let spec = Spec { dtype, form: Form::FromBase, slots, k_max: 8, shapes: Vec::new(), aligned, max_rank, seed };
        let mut model = Model::new(backend, &group(spec, &[48, 33], cols));
        let mut rng = Rng(seed ^ 4);
        let mut batch = Batch::random(&model, &mut rng, rows, k, DType::F32, Layout::dense);
        // One route, which a merge can serve.
        let (ids, gates) = random_routes(&mut rng, slots, k);
        batch.ids.set_bits(&ids.repeat(rows));
        batch.gates.set_bits(&gates.repeat(rows));
        let (ids, gates): (Vec<i32>, Vec<f32>) = ids.into_iter().zip(gates).map(|(id, gate)| (id as i32, f32::from_bits(gate))).unzip();
        let x = batch.x.values();
        let product = |w: &[f64], row: usize, o: usize| (0..cols).map(|c| w[o * cols + c] * x[row * cols + c]).sum::<f64>();
        for (y, base) in batch.y.iter_mut().zip(&model.bases) {
            let base = base.values();
            let start = (0..rows * y.cols).map(|i| (product(&base, i / y.cols, i % y.cols) as f32).to_bits()).collect::<Vec<_>>();
            y.set_bits(&start);
        }
        let start: Vec<Vec<f64>> = batch.y.iter().map(Grid::values).collect();
        batch.run(&model, Call::Whole);
        model.to(&ids, &gates);
        for (t, y) in batch.y.iter().enumerate() {
            let (merged, got, list) = (model.weights[t].values(), y.values(), model.list(t, &ids, &gates));
            let (exact, merge_bounds) = model.exact(t, &list);
            let terms = terms_of(&model, t, &list);
            for row in 0..rows {
                let (x, part) = (&x[row * cols..(row + 1) * cols], row * y.cols..(row + 1) * y.cols);
                let (_, apply_bounds) = oracle::apply(&start[t][part.clone()], x, &terms, is_dense(&model, rows));
                for (o, (got, apply_bound)) in got[part].iter().zip(apply_bounds).enumerate() {
                    // What the merge may err by, and apply; the roundings of y before and after it.
                    let merge_bound = |c: usize| {
                        let bound = merge_bounds[o * cols + c];
                        oracle::half_ulp(dtype, exact.at(o, c).abs() + bound) + bound
                    };
                    let bound = (0..cols).map(|c| merge_bound(c) * x[c].abs()).sum::<f64>() + apply_bound;
                    let want = product(&merged, row, o);
                    let allowed = bound + 4.0 * oracle::half_ulp(DType::F32, want.abs() + bound);
                    assert!((got - want).abs() <= allowed, "{dtype}: target {t}, {row}, {o}: {got}, merged {want}, off more than {allowed}");
                }
            }
        }
    });
}

/// Routes that name nothing in as many ways as there are leave every bit of y alone, NaNs and negative zeros too.
fn routes_of_nothing(backend: &Backend) {
    let odd = |dtype| [-0.0, f64::NAN, f64::INFINITY, 1.0].map(|value| encode(dtype, value));
    for (dtype, (rows, out)) in FLOATS.into_iter().flat_map(|dtype| [(0, 33), (3, 33), (70, 33), (70, 40)].map(|sizes| (dtype, sizes))) {
        let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &[48, out], 80));
        let mut rng = Rng(20);
        // Slot 1 has a rank of 0 at one target and no adapter at the other.
        let empty = vec![Some(model.pair_of(&mut rng, 48, 80, 0)), None];
        model.set_slot(1, empty);
        let (none, zero, one) = (u32::MAX, 0f32.to_bits(), 1f32.to_bits());
        let routes = [(vec![], vec![]), (vec![none; 3], vec![one; 3]), (vec![0, 2, 3], vec![zero; 3]), (vec![1; 3], vec![one; 3])];
        for ((ids, gates), call) in routes.iter().flat_map(|route| CALLS.map(|call| (route, call))) {
            let mut batch = Batch::random(&model, &mut rng, rows, ids.len(), dtype, Layout::dense);
            batch.ids.set_bits(&ids.repeat(rows));
            batch.gates.set_bits(&gates.repeat(rows));
            for y in &mut batch.y {
                let bits: Vec<u32> = odd(dtype).into_iter().cycle().take(rows * y.cols).collect();
                y.set_bits(&bits);
            }
            let before = batch.before(call);
            batch.run(&model, call);
            assert_eq!(batch.bits(), before, "{dtype}: {rows} rows, ids {ids:?}, {call:?}");
        }
    }
}

/// A coefficient of zero does not touch its adapter, and no row sees the adapters of another: not even NaNs.
fn rows_are_kept_apart(backend: &Backend) {
    let sizes = FLOATS.into_iter().flat_map(|dtype| [(40, 33), (90, 33), (90, 40)].map(|sizes| (dtype, sizes)));
    for ((dtype, (rows, out)), call) in sizes.flat_map(|size| CALLS.map(|call| (size, call))) {
        let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &[48, out], 80));
        let mut rng = Rng(15);
        for slot in 0..4 {
            let mut pairs = [48, out].map(|out| model.pair_of(&mut rng, out, 80, 12));
            if slot == 2 {
                pairs.iter_mut().for_each(Pair::poison);
            }
            model.set_slot(slot, pairs.map(Some).into());
        }
        let mut batch = Batch::random(&model, &mut rng, rows, 2, dtype, Layout::dense);
        let mut x = batch.x.bits();
        x[0] = encode(dtype, f64::INFINITY);
        batch.x.set_bits(&x);
        // Every fifth row has the adapter of NaNs, and the first of them an infinity in x; some have it at zero.
        let ids: Vec<u32> =
            (0..rows).flat_map(|row| if row % 5 == 0 { [2, 1] } else { [(row % 2) as u32, 2 + (row % 2) as u32] }).collect();
        let gates = |row: usize| if row.is_multiple_of(5) { [1.0f32, 0.5] } else { [0.5, (row % 2) as f32] };
        let gates: Vec<u32> = (0..rows).flat_map(gates).map(f32::to_bits).collect();
        batch.ids.set_bits(&ids);
        batch.gates.set_bits(&gates);
        batch.run(&model, call);
        for y in &batch.y {
            for (i, value) in y.values().iter().enumerate() {
                assert_eq!(value.is_nan(), i / y.cols % 5 == 0, "{dtype}: row {} of {rows}, {call:?}", i / y.cols);
            }
        }
    }
}

/// Coefficients that are not finite show in their own row, and are told of, as are ids that name nothing.
fn odd_values(backend: &Backend) {
    let backend = &backend.alone();
    // By row, few rows, many, and many with y in whole packs; the adapter at either target.
    let kinds = [
        (DType::F32, 3, DType::F32, 33),
        (DType::Bf16, 3, DType::F32, 33),
        (DType::Bf16, 70, DType::F32, 33),
        (DType::Bf16, 70, DType::Bf16, 40),
    ];
    for ((dtype, rows, y_type, out), has) in kinds.into_iter().flat_map(|kind| [0, 1].map(|has| (kind, has))) {
        let outs = [48, out];
        let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &outs, 80));
        let mut rng = Rng(16);
        let pairs = (0..2).map(|target| (target == has).then(|| model.pair_of(&mut rng, outs[target], 80, 4))).collect();
        model.set_slot(0, pairs);
        for (bad, call) in [f32::NAN, f32::INFINITY].into_iter().flat_map(|bad| CALLS.map(|call| (bad, call))) {
            let mut batch = Batch::random(&model, &mut rng, rows, 1, y_type, Layout::dense);
            let before = batch.before(call);
            let (mut ids, mut gates) = (vec![u32::MAX; rows], vec![bad.to_bits(); rows]);
            ids[..2].fill(0);
            gates[0] = 1f32.to_bits();
            batch.ids.set_bits(&ids);
            batch.gates.set_bits(&gates);
            batch.run(&model, call);
            for (row, y) in batch.y[has].values().chunks(outs[has]).enumerate() {
                assert_eq!(y.iter().all(|y| y.is_finite()), row != 1, "{dtype}: row {row}");
            }
            assert_eq!(batch.y[1 - has].bits(), before[1 - has], "a target without the adapter is not touched by it");
            assert_eq!(backend.stream.take_odd().unwrap(), Odd::COEFFICIENT, "{dtype}, {rows} rows, target {has}, {call:?}");
        }
        let mut batch = Batch::random(&model, &mut rng, rows, 2, DType::F32, Layout::dense);
        for (ids, odd) in [([u32::MAX, 1], Odd::default()), ([4, 1], Odd::ROUTE_ID), ([1, -2i32 as u32], Odd::ROUTE_ID)] {
            batch.ids.set_bits(&ids.repeat(rows));
            batch.gates.set_bits(&vec![1f32.to_bits(); 2 * rows]);
            batch.run(&model, Call::Whole);
            assert_eq!(backend.stream.take_odd().unwrap(), odd, "{dtype}: {ids:?}");
        }
    }
}

/// The largest rank and the widest route; k = N; routes of nothing.
fn largest_rank_and_k(backend: &Backend) {
    for (dtype, times) in FLOATS.into_iter().map(|dtype| (dtype, 1)).chain([(DType::Bf16, 22)]) {
        let spec = Spec { slots: 32, max_rank: 256, ..group(small(dtype, Form::FromBase), &[70, 40], 140) };
        let mut model = Model::new(backend, &spec);
        let mut rng = Rng(17);
        for slot in 0..32 {
            let rank = [1, 9, 200, 256][slot % 4];
            let pairs = [70, 40].map(|out| Some(model.pair_of(&mut rng, out, 140, rank)));
            model.set_slot(slot, pairs.into());
        }
        let mut batch = Batch::random(&model, &mut rng, 3 * times, 32, dtype, Layout::dense);
        let ids: Vec<u32> = (0..32).rev().chain([7; 32]).chain([u32::MAX; 32]).collect();
        batch.ids.set_bits(&ids.repeat(times));
        batch.gates.set_bits(&vec![(1.0f32 / 64.0).to_bits(); 96 * times]);
        for call in CALLS {
            let before = batch.before(call);
            batch.run(&model, call);
            batch.assert_added_to(&model, &before, &format!("k = 32, rank 256, {call:?}"));
        }
    }
}

/// Adapters on the experts of a mixture: rows as `permute` grouped them, a slot for each adapter of each expert.
fn experts_of_a_mixture(backend: &Backend) {
    let (tokens, k, experts, adapters) = (9usize, 2usize, 3usize, 2usize);
    let model = Model::new(backend, &Spec { slots: experts * adapters, ..group(small(DType::Bf16, Form::FromBase), &[48], 80) });
    let mut rng = Rng(18);
    let chosen: Vec<u32> = (0..tokens).flat_map(|_| [rng.below(experts), rng.below(experts)]).map(|e| e as u32).collect();
    let ids = Grid::new(backend, DType::I32, tokens, k, Layout::dense(k), &chosen);
    let items = tokens * k;
    let out = |rows, cols| Grid::poisoned(backend, DType::I32, rows, cols, Layout::dense(cols));
    let (mut offsets, mut row_map, mut inverse) = (out(1, experts + 1), out(1, items), out(tokens, k));
    let bytes = permute_workspace_bytes(&backend.stream, items as u64, experts as u64).unwrap() as usize;
    let mut workspace = Grid::poisoned(backend, DType::U8, 1, bytes, Layout::dense(bytes));
    {
        let (mut offsets, mut row_map, mut inverse) = (offsets.mat_mut(), row_map.mat_mut(), inverse.mat_mut());
        let (stream, workspace) = (&backend.stream, &mut workspace.mat_mut());
        permute(stream, experts as u64, &ids.mat(), &mut offsets, &mut row_map, &mut inverse, workspace).unwrap();
    }

    let mut batch = Batch::random(&model, &mut rng, items, 1, DType::Bf16, Layout::dense);
    let slots: Vec<u32> = chosen.iter().enumerate().map(|(item, e)| e * adapters as u32 + (item / k % adapters) as u32).collect();
    batch.ids.set_bits(&slots);
    batch.row_map = Some(row_map);
    let before = batch.bits();
    batch.run(&model, Call::Whole);
    batch.assert_added_to(&model, &before, "experts");
}

fn bad_arguments_are_named(backend: &Backend) {
    let spec = Spec { shapes: vec![(48, 80), (33, 80), (33, 65)], ..small(DType::Bf16, Form::FromBase) };
    let model = Model::new(backend, &spec);
    let (bf16, f32, i32) = (DType::Bf16, DType::F32, DType::I32);
    let grid = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, Layout::dense(cols));
    let bytes = apply_workspace_bytes(&model.bank, 0..2, 5, 2).unwrap() as usize;
    struct Args {
        first: u64,
        x: Grid,
        ids: Grid,
        gates: Grid,
        row_map: Option<Grid>,
        y: Vec<Grid>,
        workspace: Grid,
    }
    let refused = |name: &str, change: &dyn Fn(&mut Args)| {
        let y = vec![grid(f32, 5, 48), grid(f32, 5, 33)];
        let (ids, gates, workspace) = (grid(i32, 5, 2), grid(f32, 5, 2), grid(DType::U8, 1, bytes));
        let mut args = Args { first: 0, x: grid(bf16, 5, 80), ids, gates, row_map: None, y, workspace };
        change(&mut args);
        let (ids, gates, row_map) = (args.ids.mat(), args.gates.mat(), args.row_map.as_ref().map(Grid::mat));
        let routes = Routes { ids: &ids, gates: &gates, row_map: row_map.as_ref() };
        let (stream, bank, first, x) = (&backend.stream, &model.bank, args.first, &args.x.mat());
        let mut y: Vec<MatMut<'_>> = args.y.iter_mut().map(Grid::mat_mut).collect();
        let targets = first..first.saturating_add(y.len() as u64);
        let mut results = vec![apply(stream, bank, first, x, &routes, &mut y, &mut args.workspace.mat_mut())];
        if !name.starts_with("y[") {
            results.push(apply_begin(stream, bank, targets, x, &routes, &mut args.workspace.mat_mut()));
        }
        if !name.starts_with("x.") {
            results.push(apply_finish(stream, bank, first, &routes, &mut y, &args.workspace.mat()));
        }
        for error in results.into_iter().map(Result::unwrap_err) {
            assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
        }
    };
    refused("targets", &|a| a.first = 2);
    refused("targets", &|a| a.first = u64::MAX);
    refused("targets", &|a| a.y.clear());
    refused("targets[2].in_features", &|a| a.first = 1);
    refused("x.dtype", &|a| a.x = grid(DType::F16, 5, 80));
    refused("x.cols", &|a| a.x = grid(bf16, 5, 79));
    refused("ids.rows", &|a| (a.ids, a.gates) = (grid(i32, 4, 2), grid(f32, 4, 2)));
    refused("gates.rows", &|a| a.gates = grid(f32, 4, 2));
    refused("ids.cols", &|a| a.ids = grid(i32, 5, 33));
    refused("ids.dtype", &|a| a.ids = grid(f32, 5, 2));
    refused("gates.cols", &|a| a.gates = grid(f32, 5, 3));
    refused("gates.dtype", &|a| a.gates = grid(i32, 5, 2));
    refused("row_map.cols", &|a| a.row_map = Some(grid(i32, 1, 4)));
    refused("row_map.dtype", &|a| a.row_map = Some(grid(f32, 1, 5)));
    refused("y[0].dtype", &|a| a.y[0] = grid(i32, 5, 48));
    refused("y[1].dtype", &|a| a.y[1] = grid(bf16, 5, 33));
    refused("y[1].rows", &|a| a.y[1] = grid(f32, 4, 33));
    refused("y[0].cols", &|a| a.y[0] = grid(f32, 5, 47));
    refused("workspace.cols", &|a| a.workspace = grid(DType::U8, 1, bytes - 1));
    refused("workspace.dtype", &|a| a.workspace = grid(bf16, 1, bytes));
    refused("workspace.data", &|a| a.workspace = Grid::poisoned(backend, DType::U8, 1, bytes, Layout { stride: bytes, shift: 4 }));

    // Overlaps: two outputs over one memory, and one over the input.
    let (mut y, x) = (grid(bf16, 5, 48), grid(bf16, 5, 80));
    let (ids, gates, mut workspace) = (grid(i32, 5, 2), grid(f32, 5, 2), grid(DType::U8, 1, bytes));
    let (ids, gates) = (ids.mat(), gates.mat());
    let routes = Routes { ids: &ids, gates: &gates, row_map: None };
    let view = |addr: u64, cols: u64, stride: u64| {
        // SAFETY: refused before anything is touched.
        unsafe { MatMut::raw(&backend.context, addr, bf16, 5, cols, stride) }
    };
    for addr in [y.addr(), x.addr()] {
        let mut both = [y.mat_mut(), view(addr, 33, 48)];
        let error = apply(&backend.stream, &model.bank, 0, &x.mat(), &routes, &mut both, &mut workspace.mat_mut()).unwrap_err();
        assert!(matches!(&error, Error::Argument { name, .. } if name == "y[1].data"), "{error}");
    }
    // Slices of a fused output are disjoint.
    let mut fused = grid(bf16, 5, 81);
    let addr = fused.addr();
    let mut both = [view(addr, 48, 81), view(addr + 2 * 48, 33, 81)];
    let x: &Mat<'_> = &x.mat();
    apply(&backend.stream, &model.bank, 0, x, &routes, &mut both, &mut workspace.mat_mut()).unwrap();
    fused.mat_mut();

    let bytes = |targets, rows, k| apply_workspace_bytes(&model.bank, targets, rows, k);
    for (result, name) in [(bytes(1..3, 5, 2), "targets[2].in_features"), (bytes(0..2, 1 << 31, 2), "rows"), (bytes(0..2, 5, 33), "k")] {
        assert!(matches!(&result, Err(Error::Argument { name: n, .. }) if n == name), "{result:?} should name {name}");
    }
    let sums = 5 * (48 + 40) * 4;
    assert_eq!(bytes(0..2, 5, 2).unwrap(), 5 * 2 * 2 * 24 * 4 + sums, "one slice; ranks of at most 20, and outputs, in steps of 8");
    assert!(bytes(0..2, 65, 2).unwrap() >= bytes(0..2, 64, 2).unwrap(), "never less for more rows");
    assert_eq!(bytes(0..2, 650, 8).unwrap(), 650 * 8 * 2 * 24 * 4 + 652 * 4 + 650 * 8 * 8, "an order of the rows, and their routes");
    let (products, used) = (650 * 2 * 4 * 32 * 2, 2 * 768 * 4);
    assert_eq!(bytes(0..2, 650, 2).unwrap(), products + used, "products of all slots, ranks in steps of 16; who uses them, by 128 rows");
    assert_eq!(bytes(0..2, 0, 2).unwrap(), 0);
    assert_eq!(bytes(0..2, 5, 0).unwrap(), 0);
    assert_eq!(bytes(0..2, 650, 0).unwrap(), 0);
}

on_backends!(
    matches_oracle,
    any_number_of_rows,
    small_ranks_of_many_rows,
    many_tiles,
    more_rows_than_are_ordered_at_once,
    long_inputs,
    bits_depend_on_the_row_alone,
    alignment_does_not_matter,
    agrees_with_the_switch,
    routes_of_nothing,
    rows_are_kept_apart,
    odd_values,
    largest_rank_and_k,
    experts_of_a_mixture,
    bad_arguments_are_named,
);
