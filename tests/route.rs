//! The router: both backends against the oracle; odd rows; errors.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, decode, encode};
use crate::oracle;
use lora_switch::{DType, Error, Odd, RouteOptions, route};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Case {
    dtype: DType,
    tokens: usize,
    experts: usize,
    k: usize,
    renormalize: bool,
    pads: [usize; 3],
    shift: usize,
    /// Few distinct logits make ties.
    levels: usize,
    seed: u64,
}

/// Expert counts around each change of the kernel's layout (32 experts a step), and anything else.
fn case() -> impl Strategy<Value = Case> {
    let experts = prop_oneof![
        Just(1usize),
        Just(31),
        Just(32),
        Just(33),
        Just(64),
        Just(65),
        Just(256),
        Just(257),
        Just(513),
        Just(1024),
        1usize..1024
    ];
    (0usize..3, 0usize..20, experts, 1usize..33, any::<bool>(), [0usize..4, 0usize..4, 0usize..4], 0usize..4, 2usize..2000, any::<u64>())
        .prop_map(|(dtype, tokens, experts, k, renormalize, pads, shift, levels, seed)| Case {
            dtype: FLOATS[dtype],
            tokens,
            experts,
            k: k.min(experts),
            renormalize,
            pads,
            shift,
            levels,
            seed,
        })
}

/// Runs a route over given logits; returns ids and gates.
fn run(backend: &Backend, c: &Case, logits: &[u32]) -> (Vec<i32>, Vec<f64>) {
    let layout = |cols: usize, pad: usize| Layout { stride: cols + pad, shift: c.shift };
    let x = Grid::new(backend, c.dtype, c.tokens, c.experts, layout(c.experts, c.pads[0]), logits);
    let mut ids = Grid::poisoned(backend, DType::I32, c.tokens, c.k, layout(c.k, c.pads[1]));
    let mut gates = Grid::poisoned(backend, DType::F32, c.tokens, c.k, layout(c.k, c.pads[2]));
    let options = RouteOptions { renormalize: c.renormalize };
    route(&backend.stream, &options, &x.mat(), &mut ids.mat_mut(), &mut gates.mat_mut()).unwrap();
    (ids.i32s(), gates.values())
}

fn matches_oracle(backend: &Backend) {
    proptest!(cases(60), |(c in case())| {
        let mut rng = Rng(c.seed);
        let logits: Vec<u32> =
            (0..c.tokens * c.experts).map(|_| encode(c.dtype, (rng.below(c.levels) as f64 / 7.0) - 20.0 * rng.below(2) as f64)).collect();
        let (ids, gates) = run(backend, &c, &logits);
        for t in 0..c.tokens {
            let row: Vec<f64> = logits[t * c.experts..][..c.experts].iter().map(|&b| decode(c.dtype, b)).collect();
            let (want_ids, want_gates) = oracle::route(&row, c.k, c.renormalize);
            prop_assert_eq!(&ids[t * c.k..][..c.k], &want_ids[..]);
            let m = row[want_ids[0] as usize];
            for j in 0..c.k {
                let spread = m - row[want_ids[j] as usize];
                let off = (gates[t * c.k + j] - want_gates[j]).abs();
                let bound = oracle::gate_bound(want_gates[j], spread, c.experts);
                prop_assert!(off <= bound, "gate {j} of token {t}: off by {off}, allowed {bound}");
            }
        }
    });
}

/// Each row of odd values with the ids and gates that the documentation promises.
fn odd_rows_have_a_documented_effect(backend: &Backend) {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    /// Logits, ids, gates, and whether the stream tells.
    type Row = ([f32; 5], [i32; 3], [f32; 3], bool);
    let rows: [Row; 8] = [
        ([NAN; 5], [0, 1, 2], [0.0; 3], true),
        ([-INF; 5], [0, 1, 2], [0.0; 3], true),
        ([1.0; 5], [0, 1, 2], [1.0 / 3.0; 3], false),
        ([-INF, NAN, 2.0, -INF, NAN], [2, 0, 1], [1.0, 0.0, 0.0], true),
        ([0.0, INF, NAN, INF, 3.0], [1, 3, 4], [0.5, 0.5, 0.0], true),
        ([-INF, 5.0, -INF, 5.0, -INF], [1, 3, 0], [0.5, 0.5, 0.0], false),
        // -0 and +0 tie; the lower id wins.
        ([-0.0, 0.0, -1000.0, -0.0, 0.0], [0, 1, 3], [1.0 / 3.0; 3], false),
        // Denormals are values like any other.
        ([-1e-40, 1e-40, 0.0, -1e30, -1e30], [1, 2, 0], [1.0 / 3.0; 3], false),
    ];
    for (logits, want_ids, want_gates, odd) in rows {
        let case = Case { dtype: DType::F32, tokens: 1, experts: 5, k: 3, renormalize: true, pads: [0; 3], shift: 0, levels: 0, seed: 0 };
        let bits: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
        let (ids, gates) = run(backend, &case, &bits);
        assert_eq!(ids, want_ids, "{logits:?}");
        for (gate, want) in gates.iter().zip(want_gates) {
            assert!((gate - f64::from(want)).abs() < 1e-6, "{logits:?}: {gates:?}");
        }
        if backend.cuda.is_none() {
            // The word belongs to the context; on the GPU the tests share one.
            assert_eq!(backend.stream.take_odd().unwrap().contains(Odd::LOGITS), odd, "{logits:?}");
        }
    }
    if backend.cuda.is_some() {
        assert!(backend.stream.take_odd().unwrap().contains(Odd::LOGITS));
    }
}

/// A token's bits are the same alone and among others, and in a second run.
fn bits_do_not_depend_on_neighbours(backend: &Backend) {
    let mut rng = Rng(7);
    for renormalize in [true, false] {
        let many = Case { dtype: DType::Bf16, tokens: 37, experts: 100, k: 6, renormalize, pads: [0; 3], shift: 0, levels: 0, seed: 0 };
        let logits = rng.bits(many.dtype, many.tokens * many.experts, 5.0);
        let (ids, gates) = run(backend, &many, &logits);
        assert_eq!(run(backend, &many, &logits), (ids.clone(), gates.clone()));
        let one = Case { tokens: 1, ..many.clone() };
        for t in 0..many.tokens {
            let alone = run(backend, &one, &logits[t * many.experts..][..many.experts]);
            assert_eq!(alone, (ids[t * many.k..][..many.k].to_vec(), gates[t * many.k..][..many.k].to_vec()));
        }
    }
}

fn bad_arguments_are_named(backend: &Backend) {
    let dense = Layout::dense;
    let grid = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, dense(cols));
    let expect = |logits: (DType, usize, usize), ids: (DType, usize, usize), gates: (DType, usize, usize), name: &str| {
        let x = grid(logits.0, logits.1, logits.2);
        let mut i = grid(ids.0, ids.1, ids.2);
        let mut g = grid(gates.0, gates.1, gates.2);
        let before = (i.bits(), g.bits());
        let error = route(&backend.stream, &RouteOptions::default(), &x.mat(), &mut i.mat_mut(), &mut g.mat_mut()).unwrap_err();
        assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
        assert_eq!(before, (i.bits(), g.bits()), "outputs are untouched");
    };
    let (f32, i32) = (DType::F32, DType::I32);
    expect((i32, 2, 8), (i32, 2, 2), (f32, 2, 2), "logits.dtype");
    expect((f32, 2, 8), (f32, 2, 2), (f32, 2, 2), "ids.dtype");
    expect((f32, 2, 8), (i32, 2, 2), (DType::Bf16, 2, 2), "gates.dtype");
    expect((f32, 2, 1025), (i32, 2, 2), (f32, 2, 2), "logits.cols");
    expect((f32, 2, 0), (i32, 2, 2), (f32, 2, 2), "logits.cols");
    expect((f32, 2, 8), (i32, 2, 9), (f32, 2, 9), "ids.cols");
    expect((f32, 2, 64), (i32, 2, 33), (f32, 2, 33), "ids.cols");
    expect((f32, 2, 8), (i32, 2, 0), (f32, 2, 0), "ids.cols");
    expect((f32, 2, 8), (i32, 3, 2), (f32, 2, 2), "ids.rows");
    expect((f32, 2, 8), (i32, 2, 2), (f32, 2, 3), "gates.cols");

    // Null, misaligned, an output over an input, rows that overlap.
    let (x, spare) = (grid(f32, 4, 8), grid(i32, 4, 8));
    let mut gates = grid(f32, 4, 2);
    // SAFETY: a call refuses it before anything is touched.
    let raw = |addr, dtype, stride| unsafe { lora_switch::MatMut::raw(&backend.context, addr, dtype, 4, 2, stride) };
    for (addr, stride, name) in
        [(0, 2, "ids.data"), (spare.addr() + 2, 2, "ids.data"), (x.addr() + 8, 2, "ids.data"), (spare.addr(), 1, "ids.stride")]
    {
        let error =
            route(&backend.stream, &RouteOptions::default(), &x.mat(), &mut raw(addr, i32, stride), &mut gates.mat_mut()).unwrap_err();
        assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
    }
}

on_backends!(matches_oracle, odd_rows_have_a_documented_effect, bits_do_not_depend_on_neighbours, bad_arguments_are_named);
