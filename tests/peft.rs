//! Merges that PEFT itself computed (testdata/peft, see generate.py there), reproduced by switching.

use crate::common::{Backend, Grid, Layout, encode};
use crate::oracle::{Exact, Term, assert_close, half_ulp, merge};
use crate::peft_loader::peft::{Adapter, BaseModel, LoraFactor, Matrix, load_adapter};
use lora_switch::{AdapterBank, DType, Factor, Form, StateMemory, SwitchOptions, SwitchSet, Target, TargetShape};
use serde::Deserialize;
use std::path::Path;

const DATA: &str = "tests/testdata/peft";

/// A line of merged.json: adapters with their weights, which are a token's gates here.
#[derive(Deserialize)]
struct Combo {
    name: String,
    adapters: Vec<String>,
    weights: Vec<f32>,
}

/// A projection, as it is on disk.
struct Module {
    name: String,
    base: Matrix,
    /// PEFT's float32 merge.
    merged: Matrix,
    /// What each of the combination's adapters has for it.
    factors: Vec<Option<LoraFactor>>,
}

fn combos() -> Vec<(Combo, Vec<Module>)> {
    let data = Path::new(DATA);
    let base = BaseModel::open(&data.join("base")).unwrap();
    let merged = BaseModel::open(&data.join("merged.safetensors")).unwrap();
    let text = std::fs::read(data.join("merged.json")).unwrap();
    let combos: Vec<Combo> = serde_json::from_slice(&text).unwrap();
    let load = |combo: Combo| {
        let adapter = |name: &String| load_adapter(&data.join("adapters").join(name), &base).unwrap();
        let adapters: Vec<Adapter> = combo.adapters.iter().map(adapter).collect();
        let prefix = format!("{}/", combo.name);
        let weights = merged.weights();
        let kept = weights.iter().filter_map(|weight| weight.module().strip_prefix(&prefix));
        let module = |name: &str| Module {
            name: name.into(),
            base: base.load(&format!("{name}.weight")).unwrap(),
            merged: merged.load(&format!("{prefix}{name}.weight")).unwrap(),
            factors: adapters.iter().map(|adapter| adapter.modules.get(name).cloned()).collect(),
        };
        let modules: Vec<Module> = kept.map(module).collect();
        assert!(modules.len() >= 7, "{}: the merge has {} modules", combo.name, modules.len());
        (combo, modules)
    };
    combos.into_iter().map(load).collect()
}

fn bits(matrix: &Matrix, dtype: DType) -> Vec<u32> {
    matrix.to_f32().iter().map(|&x| encode(dtype, f64::from(x))).collect()
}

fn exact(matrix: &Matrix, dtype: DType) -> Exact {
    Exact::new(dtype, matrix.rows, matrix.cols, &bits(matrix, dtype))
}

/// Weights lie dense, as in a checkpoint; rows of A and B are padded to 16 bytes, as examples/decode does.
fn dense(backend: &Backend, matrix: &Matrix, dtype: DType) -> Grid {
    let layout = Layout::dense(matrix.cols);
    Grid::new(backend, dtype, matrix.rows, matrix.cols, layout, &bits(matrix, dtype))
}

fn padded(backend: &Backend, matrix: &Matrix, dtype: DType) -> Grid {
    let stride = matrix.cols.next_multiple_of(16 / dtype.size() as usize);
    let layout = Layout { stride, ..Layout::dense(matrix.cols) };
    Grid::new(backend, dtype, matrix.rows, matrix.cols, layout, &bits(matrix, dtype))
}

/// A combination in memory of a backend.
struct Loaded {
    weights: Vec<Grid>,
    bases: Vec<Grid>,
    /// For each slot and module, A and B.
    pairs: Vec<Vec<Option<(Grid, Grid)>>>,
}

impl Loaded {
    fn new(backend: &Backend, modules: &[Module], dtype: DType) -> Self {
        let all = || modules.iter().map(|module: &Module| dense(backend, &module.base, dtype)).collect();
        let pair = |f: &LoraFactor| (padded(backend, &f.a, dtype), padded(backend, &f.b, dtype));
        let slot = |slot: usize| modules.iter().map(|m| m.factors[slot].as_ref().map(pair)).collect();
        let pairs = (0..modules[0].factors.len()).map(slot).collect();
        Self { weights: all(), bases: all(), pairs }
    }

    fn set(&self, backend: &Backend, modules: &[Module], dtype: DType, form: Form) -> SwitchSet {
        let shape = |module: &Module| TargetShape {
            out_features: module.base.rows as u64,
            in_features: module.base.cols as u64,
            rank_cap: module.factors.iter().flatten().map(|f| f.rank as u64).max().unwrap_or(0),
        };
        let shapes: Vec<TargetShape> = modules.iter().map(shape).collect();
        let slots = self.pairs.len() as u64;
        let bank = AdapterBank::new(&backend.stream, dtype, slots, &shapes, StateMemory::allocate()).unwrap();
        for (slot, pairs) in self.pairs.iter().enumerate() {
            let factor = |(module, pair): (&Module, &Option<(Grid, Grid)>)| {
                let ((a, b), factor) = (pair.as_ref()?, module.factors[slot].as_ref()?);
                Some(Factor { a: a.tensor(), b: b.tensor(), scale: factor.scale })
            };
            let factors: Vec<Option<Factor>> = modules.iter().zip(pairs).map(factor).collect();
            bank.set_slot(&backend.stream, slot as u64, &factors).unwrap();
        }
        let base = |base: &Grid| (form == Form::FromBase).then(|| base.tensor());
        let target = |(weight, of): (&Grid, &Grid)| Target { weight: weight.weight(), base: base(of) };
        let targets = self.weights.iter().zip(&self.bases).map(target).collect();
        let options = SwitchOptions { form, k_max: slots, ..SwitchOptions::default() };
        SwitchSet::new(&backend.stream, &bank, targets, options).unwrap()
    }
}

/// Switches to a combination; each module's W.
fn switched(backend: &Backend, combo: &Combo, modules: &[Module], dtype: DType, form: Form) -> Vec<Vec<f64>> {
    let loaded = Loaded::new(backend, modules, dtype);
    let mut set = loaded.set(backend, modules, dtype, form);
    let ids = Grid::ids(backend, &(0..combo.weights.len() as i32).collect::<Vec<_>>());
    let gates = Grid::floats(backend, &combo.weights);
    set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
    let values = loaded.weights.iter().map(Grid::values).collect();
    assert!(set.odd(&backend.stream).unwrap().is_none());
    if form == Form::FromBase {
        set.unmerge(&backend.stream).unwrap();
        for (weight, base) in loaded.weights.iter().zip(&loaded.bases) {
            assert_eq!(weight.bits(), base.bits(), "{}: unmerged, W has the base's bits", combo.name);
        }
    }
    values
}

/// The merge in float64, and how far a sum in f32 may be off.
fn judged(combo: &Combo, module: &Module, dtype: DType) -> (Exact, Vec<f64>) {
    let pairs: Vec<(Exact, Exact, f64)> = (module.factors.iter().zip(&combo.weights))
        .filter_map(|(factor, weight)| factor.as_ref().map(|factor| (factor, weight)))
        .map(|(f, weight)| (exact(&f.a, dtype), exact(&f.b, dtype), f64::from(weight * f.scale)))
        .collect();
    let terms: Vec<Term<'_>> = pairs.iter().map(|(a, b, c)| Term { a, b, coefficient: *c }).collect();
    merge(&exact(&module.base, dtype), &terms)
}

/// PEFT's sums are in f32 as well, and its result is rounded as ours is: each may be off by the bound.
fn reproduces_pefts_own_merges(backend: &Backend) {
    for (combo, modules) in combos() {
        for form in [Form::FromBase, Form::InPlace] {
            let got = switched(backend, &combo, &modules, DType::F32, form);
            for (module, got) in modules.iter().zip(&got) {
                let what = format!("{} {}, {form:?}", combo.name, module.name);
                let (exact, bounds) = judged(&combo, module, DType::F32);
                assert_close(DType::F32, got, &exact.x, &bounds, &what);
                let peft = self::exact(&module.merged, DType::F32).x;
                let both = peft.iter().zip(&bounds).map(|(w, b)| 2.0 * b + half_ulp(DType::F32, w.abs() + b));
                assert_close(DType::F32, got, &peft, &both.collect::<Vec<_>>(), &format!("{what}, beside PEFT"));
            }
        }
    }
}

/// The same in bfloat16, where down_proj's rows of 100 elements are off the fast path. PEFT is no judge
/// there: it rounds after each adapter.
fn merges_in_bf16_are_rounded_once(backend: &Backend) {
    for (combo, modules) in combos() {
        for form in [Form::FromBase, Form::InPlace] {
            let got = switched(backend, &combo, &modules, DType::Bf16, form);
            for (module, got) in modules.iter().zip(&got) {
                let (exact, bounds) = judged(&combo, module, DType::Bf16);
                let what = format!("{} {}, {form:?}", combo.name, module.name);
                assert_close(DType::Bf16, got, &exact.x, &bounds, &what);
            }
        }
    }
}

on_backends!(reproduces_pefts_own_merges, merges_in_bf16_are_rounded_once);
