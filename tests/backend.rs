//! What holds of a backend as a whole: contexts, threads, the memory of tables, how long objects live.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng};
use crate::switch::{Model, Spec, named, small};
use lora_switch::{AdapterBank, DType, Form, RouteOptions, StateMemory, TargetShape, route};

/// Any number of times, before and between other work.
fn warm_changes_nothing(backend: &Backend) {
    let warm = || backend.context.warm(&backend.stream).unwrap();
    warm();
    let mut model = Model::new(backend, &small(DType::Bf16, Form::FromBase));
    model.to(&[0, 2], &[0.5, 0.5]);
    let before = model.all_bits();
    warm();
    warm();
    assert_eq!(model.all_bits(), before);
    assert!(model.set.odd(&backend.stream).unwrap().is_none());
    if backend.cuda.is_some() {
        named(Backend::cpu().context.warm(&backend.stream), "stream");
    }
}

fn a_bank_in_memory_of_the_caller(backend: &Backend) {
    let spec = small(DType::Bf16, Form::FromBase);
    let (slots, targets) = (spec.slots as u64, spec.shapes.len() as u64);
    let bytes = AdapterBank::memory_bytes(&backend.stream, spec.dtype, slots, targets).unwrap();
    assert_eq!(bytes > 0, backend.cuda.is_some());
    let memory = Grid::poisoned(backend, DType::U8, 1, bytes as usize, Layout::dense(bytes as usize));
    // SAFETY: the grid outlives the model.
    let mut model = Model::with_bank_memory(backend, &spec, unsafe { StateMemory::at(memory.addr(), bytes) });
    for step in 0..3 {
        model.refill(step);
        model.to(&[0, 1, 2], &[0.5, 0.25, 0.25]);
        model.assert_holds(&[0, 1, 2], &[0.5, 0.25, 0.25], "a table in memory of the caller");
    }
    memory.bits(); // its canaries
    if backend.cuda.is_some() {
        let shapes = [TargetShape { out_features: 48, in_features: 80, rank_cap: 4 }; 2];
        let bank = |addr, bytes| {
            // SAFETY: refused before it is touched.
            let memory = unsafe { StateMemory::at(addr, bytes) };
            AdapterBank::new(&backend.stream, spec.dtype, slots, &shapes, memory)
        };
        named(bank(memory.addr(), bytes - 1), "memory.bytes");
        named(bank(memory.addr() + 64, bytes), "memory.addr");
        named(bank(0, bytes), "memory.addr");
    }
}

/// Two sets at different routes over one bank: a refill reaches both, and both outlive the bank's handle.
fn sets_share_a_bank(backend: &Backend) {
    for dtype in FLOATS {
        let mut model = Model::new(backend, &small(dtype, Form::FromBase));
        let (weights, mut other) = model.another_set();
        let (ids, gates) = (Grid::ids(backend, &[0, 1]), Grid::floats(backend, &[0.5, 0.5]));
        model.to(&[1, 2], &[1.0, 0.5]);
        other.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
        model.assert_holds(&[1, 2], &[1.0, 0.5], "beside another set");
        model.refill(1);
        model.to(&[0, 1], &[0.5, 0.5]);
        model.assert_holds(&[0, 1], &[0.5, 0.5], "refilled");
        let expected = model.all_bits();

        let (bank, mut set) = (model.bank, model.set);
        drop(bank);
        other.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
        assert_eq!(weights.iter().map(Grid::bits).collect::<Vec<_>>(), expected, "healed after the handle was dropped");
        drop(other);
        set.unmerge(&backend.stream).unwrap();
        set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
        assert_eq!(model.weights.iter().map(Grid::bits).collect::<Vec<_>>(), expected, "after the other set was dropped");
    }
}

fn a_set_of_nothing(backend: &Backend) {
    for form in [Form::FromBase, Form::InPlace] {
        let mut model = Model::new(backend, &Spec { shapes: Vec::new(), ..small(DType::F16, form) });
        model.to(&[0, 9], &[1.0, 1.0]);
        let set = &mut model.set;
        assert!(set.is_empty());
        set.unmerge(&backend.stream).unwrap();
        set.invalidate(&backend.stream).unwrap();
        assert!(set.odd(&backend.stream).unwrap().is_none());
        named(set.weight(0), "target");
        let (ids, gates) = (Grid::ids(backend, &[0]), Grid::floats(backend, &[1.0]));
        named(set.to_targets(&backend.stream, 0..1, &ids.mat(), &gates.mat()), "targets");
    }
}

on_backends!(warm_changes_nothing, a_bank_in_memory_of_the_caller, sets_share_a_bank, a_set_of_nothing);

/// One thread, two, and one a core give the same bits.
#[test]
fn threads_do_not_change_bits() {
    let results = [1, 2, 0].map(|threads| {
        let backend = Backend::cpu_with(threads);
        let switched = [Form::FromBase, Form::InPlace].map(|form| {
            let mut model = Model::new(&backend, &Spec { shapes: vec![(300, 130), (33, 65)], ..small(DType::Bf16, form) });
            model.to(&[0, 1, 2], &[0.7, 0.2, 0.1]);
            model.to(&[2, 3], &[0.6, 0.4]);
            model.all_bits()
        });
        let (tokens, experts, k) = (200, 33, 5);
        let bits = Rng(3).bits(DType::F32, tokens * experts, 4.0);
        let logits = Grid::new(&backend, DType::F32, tokens, experts, Layout::dense(experts), &bits);
        let mut ids = Grid::poisoned(&backend, DType::I32, tokens, k, Layout::dense(k));
        let mut gates = Grid::poisoned(&backend, DType::F32, tokens, k, Layout::dense(k));
        route(&backend.stream, &RouteOptions::default(), &logits.mat(), &mut ids.mat_mut(), &mut gates.mat_mut()).unwrap();
        (switched, ids.bits(), gates.bits())
    });
    assert!(results.iter().all(|result| *result == results[0]));
}
