//! A product and its adapters in one launch: both backends against the oracle, against apply, and against their own promises.

use crate::apply::Batch;
use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, encode};
use crate::oracle::{self, Term};
use crate::switch::{Model, Spec, small};
use lora_switch::{DType, Error, Form, LinearOptions, Mat, MatMut, Odd, Routes, linear, linear_workspace_bytes};
use proptest::prelude::*;

pub fn workspace(model: &Model, rows: usize, k: usize) -> Grid {
    let bytes = linear_workspace_bytes(&model.bank, 0..model.spec.shapes.len() as u64, rows as u64, k as u64).unwrap() as usize;
    // Zeros where they are asked for; elsewhere NaNs.
    let bits: Vec<u32> = (0..bytes).map(|i| if i < 16 { 0 } else { 0xff }).collect();
    Grid::new(&model.backend, DType::U8, 1, bytes, Layout::dense(bytes), &bits)
}

/// Batch's y is written.
pub fn run_in(batch: &mut Batch, model: &Model, options: LinearOptions, workspace: &mut Grid) -> Result<(), Error> {
    let (ids, gates, row_map) = (batch.ids.mat(), batch.gates.mat(), batch.row_map.as_ref().map(Grid::mat));
    let routes = Routes { ids: &ids, gates: &gates, row_map: row_map.as_ref() };
    let weights: Vec<Mat<'_>> = model.bases.iter().map(Grid::mat).collect();
    let mut y: Vec<MatMut<'_>> = batch.y.iter_mut().map(Grid::mat_mut).collect();
    let x = batch.x.mat();
    linear(&model.backend.stream, options, &model.bank, 0, &weights, &x, &routes, &mut y, &mut workspace.mat_mut())
}

/// With and without the early reads, and with blocks that do not wait: the same bits, and the counters are zero again.
fn run(batch: &mut Batch, model: &Model) -> Vec<Vec<u32>> {
    let mut workspace = workspace(model, batch.x.rows, batch.ids.cols);
    let bits = [(false, false), (true, false), (true, true)].map(|(only_x_is_new, alone)| {
        for y in &mut batch.y {
            y.set_bits(&vec![encode(y.dtype, f64::NAN); y.rows * y.cols]);
        }
        run_in(batch, model, LinearOptions { only_x_is_new, alone }, &mut workspace).unwrap();
        assert!(workspace.bits()[..16].iter().all(|byte| *byte == 0), "the counters are zero again");
        batch.bits()
    });
    assert_eq!(bits[0], bits[1], "early reads change nothing");
    assert_eq!(bits[0], bits[2], "who computes A x changes nothing");
    let [bits, ..] = bits;
    bits
}

/// Each element of y against W x and the row's adapters.
pub fn assert_is_product(batch: &Batch, model: &Model, what: &str) {
    let x = batch.x.values();
    for (t, y) in batch.y.iter().enumerate() {
        let (got, weight) = (y.values(), model.bases[t].values());
        for row in 0..batch.x.rows {
            let x = &x[row * batch.x.cols..(row + 1) * batch.x.cols];
            let list = batch.route(row).map_or(Vec::new(), |(ids, gates)| model.list(t, &ids, &gates));
            let term = |&(slot, c): &(usize, f32)| {
                let pair = model.pairs[slot][t].as_ref().unwrap();
                Term { a: &pair.exact_a, b: &pair.exact_b, coefficient: f64::from(c) }
            };
            let terms: Vec<Term<'_>> = list.iter().map(term).collect();
            let dots: Vec<(f64, f64)> = (0..y.cols).map(|o| oracle::dot(x, &weight[o * x.len()..(o + 1) * x.len()])).collect();
            let products: Vec<f64> = dots.iter().map(|dot| dot.0).collect();
            let (exact, mut bounds) = oracle::apply(&products, x, &terms, false);
            bounds.iter_mut().zip(&dots).for_each(|(bound, dot)| *bound += dot.1);
            let part = row * y.cols..(row + 1) * y.cols;
            oracle::assert_close(y.dtype, &got[part], &exact, &bounds, &format!("{what}: row {row} of target {t}"));
        }
    }
}

/// A model of targets that share their input.
fn group(spec: Spec, outs: &[usize], cols: usize) -> Spec {
    Spec { shapes: outs.iter().map(|&out| (out, cols)).collect(), ..spec }
}

/// Around a tile's 32 rows and a fragment's 8 and 16; fewer rows than multiprocessors and more; primes; 1; 0.
const OUTS: [usize; 13] = [0, 1, 7, 15, 16, 17, 31, 33, 131, 133, 264, 301, 1100];
/// Around a pack, a line of 64 (or 32) and the 256 that all warps take at a time; no column at all.
const COLS: [usize; 12] = [0, 1, 7, 8, 9, 31, 64, 65, 97, 255, 264, 1031];
const RANKS: [usize; 8] = [1, 3, 8, 9, 16, 17, 33, 64];

fn matches_oracle(backend: &Backend) {
    let outs = prop::collection::vec((0..OUTS.len()).prop_map(|i| OUTS[i]), 1..5);
    let sizes = ((0..COLS.len()).prop_map(|i| COLS[i]), (0..RANKS.len()).prop_map(|i| RANKS[i]));
    let routes = (1usize..9, prop_oneof![Just(0usize), Just(1), Just(2), 1usize..9], 0usize..9);
    let kinds = (0usize..3, 0usize..3, any::<bool>(), any::<bool>());
    proptest!(cases(60), |(outs in outs, (cols, max_rank) in sizes, (slots, k, rows) in routes, kinds in kinds, seed: u64)| {
        let (d, y_type, aligned, mapped) = kinds;
        let spec = Spec { dtype: FLOATS[d], form: Form::FromBase, slots, k_max: 1, shapes: Vec::new(), aligned, max_rank, seed };
        let model = Model::new(backend, &group(spec, &outs, cols));
        let mut rng = Rng(seed ^ 3);
        let mut batch = Batch::laid_out(&model, &mut rng, (rows, k), FLOATS[y_type], aligned, mapped);
        run(&mut batch, &model);
        assert_is_product(&batch, &model, "linear");
    });
}

/// Every number of rows; more outputs than the blocks that run at a time keep; more entries of routes than a block has at hand.
fn any_number_of_rows(backend: &Backend) {
    for dtype in FLOATS {
        for rows in 1..=8 {
            let spec = Spec { slots: 9, max_rank: 20, seed: rows as u64, ..small(dtype, Form::FromBase) };
            let (outs, cols, k): (&[usize], _, _) = match rows {
                1 => (&[70_000, 33], 24, 2),
                8 => (&[35_000, 1, 0, 90], 24, 9),
                _ => (&[500, 33], 600, 2),
            };
            let model = Model::new(backend, &group(spec, outs, cols));
            let mut batch = Batch::random(&model, &mut Rng(rows as u64), rows, k, dtype, Layout::dense);
            run(&mut batch, &model);
            assert_is_product(&batch, &model, &format!("{rows} rows"));
        }
    }
}

/// One row, of more lines than a warp's ring has places, over several tiles of a block: right, and the bits that it has beside another.
fn rings_come_around(backend: &Backend) {
    for dtype in FLOATS {
        let model = Model::new(backend, &group(small(dtype, Form::FromBase), &[4_500, 33], 2_104));
        let mut two = Batch::random(&model, &mut Rng(7), 2, 2, dtype, Layout::dense);
        let first = |grid: &Grid| Grid::new(backend, grid.dtype, 1, grid.cols, Layout::dense(grid.cols), &grid.bits()[..grid.cols]);
        let y = two.y.iter().map(first).collect();
        let mut one = Batch { x: first(&two.x), y, ids: first(&two.ids), gates: first(&two.gates), row_map: None };
        let bits = run(&mut one, &model);
        assert_is_product(&one, &model, "one row");
        for (one, two) in bits.iter().zip(run(&mut two, &model)) {
            assert_eq!(one[..], two[..one.len()], "{dtype}");
        }
    }
}

/// A row has the same bits in each run, with its route in another order, alone and in any batch.
fn bits_depend_on_the_row_alone(backend: &Backend) {
    for dtype in FLOATS {
        let (rows, k) = (8, 3);
        let spec = Spec { max_rank: 40, ..group(small(dtype, Form::FromBase), &[700, 33], 700) };
        let model = Model::new(backend, &spec);
        // Distinct slots: the order of equal ones is the order of their sum.
        let ids: Vec<u32> = (0..rows * k).map(|i| ((i / k + i % k) % 4) as u32).collect();
        let batch = || {
            let mut batch = Batch::random(&model, &mut Rng(5), rows, k, dtype, Layout::dense);
            batch.ids.set_bits(&ids);
            batch
        };
        let want = run(&mut batch(), &model);
        assert_eq!(run(&mut batch(), &model), want, "{dtype}: again");
        let mut turned = batch();
        for grid in [&mut turned.ids, &mut turned.gates] {
            let bits: Vec<u32> = grid.bits().chunks(k).flat_map(|route| route.iter().rev().copied()).collect();
            grid.set_bits(&bits);
        }
        assert_eq!(run(&mut turned, &model), want, "{dtype}: routes turned around");
        for (first, few) in [(0, 1), (1, 1), (7, 1), (2, 3), (3, 5), (1, 7)] {
            let all = batch();
            let cut = |grid: &Grid| {
                let bits = &grid.bits()[first * grid.cols..(first + few) * grid.cols];
                Grid::new(backend, grid.dtype, few, grid.cols, Layout::dense(grid.cols), bits)
            };
            let y = all.y.iter().map(cut).collect();
            let mut part = Batch { x: cut(&all.x), y, ids: cut(&all.ids), gates: cut(&all.gates), row_map: None };
            for (t, bits) in run(&mut part, &model).into_iter().enumerate() {
                let cols = all.y[t].cols;
                assert_eq!(bits, want[t][first * cols..(first + few) * cols], "{dtype}: {few} from row {first} on, target {t}");
            }
        }
    }
}

/// A target's bits do not depend on those beside it.
fn targets_are_kept_apart(backend: &Backend) {
    for dtype in FLOATS {
        let spec = Spec { max_rank: 20, ..small(dtype, Form::FromBase) };
        let (many, one) = (Model::new(backend, &group(spec.clone(), &[300, 45], 200)), Model::new(backend, &group(spec, &[300], 200)));
        let batch = |model: &Model| Batch::random(model, &mut Rng(6), 3, 0, dtype, Layout::dense);
        // The first of both are drawn alike.
        let (mut many_batch, mut one_batch) = (batch(&many), batch(&one));
        assert_eq!(many.bases[0].bits(), one.bases[0].bits());
        one_batch.x.set_bits(&many_batch.x.bits());
        assert_eq!(run(&mut many_batch, &many)[0], run(&mut one_batch, &one)[0], "{dtype}");
    }
}

/// The same values at multiples of 16 bytes and anywhere: the same bits.
fn alignment_does_not_matter(backend: &Backend) {
    for dtype in FLOATS {
        let bits = [true, false].map(|aligned| {
            let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &[130, 33], 704));
            model.spec.aligned = aligned;
            let mut rng = Rng(19);
            for slot in 0..4 {
                let pairs = [130, 33].map(|out| Some(model.pair_of(&mut rng, out, 704, 20)));
                model.set_slot(slot, pairs.into());
            }
            let layout = |cols: usize| if aligned { Layout::dense(cols) } else { Layout { stride: cols + 1, shift: 1 } };
            for (base, out) in model.bases.iter_mut().zip([130, 33]) {
                *base = Grid::with_gap(backend, dtype, out, 704, layout(704), 0xff, &rng.bits(dtype, out * 704, 1.0));
            }
            let mut batch = Batch::random(&model, &mut rng, 5, 2, dtype, layout);
            run(&mut batch, &model)
        });
        assert_eq!(bits[0], bits[1], "{dtype}");
    }
}

/// A product, then apply: W x is exact in f32 here, so that both say the same but for the order of the sums.
fn agrees_with_apply(backend: &Backend) {
    for dtype in FLOATS {
        let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &[300, 33], 80));
        let mut rng = Rng(14);
        let whole = |rng: &mut Rng, n: usize| (0..n).map(|_| encode(dtype, rng.below(9) as f64 - 4.0)).collect::<Vec<u32>>();
        for base in &mut model.bases {
            base.set_bits(&whole(&mut rng, base.rows * base.cols));
        }
        let mut batch = Batch::random(&model, &mut rng, 4, 3, DType::F32, Layout::dense);
        batch.x.set_bits(&whole(&mut rng, 4 * 80));
        let none: Vec<u32> = vec![u32::MAX; 12];
        let ids = batch.ids.bits();
        batch.ids.set_bits(&none);
        let before = run(&mut batch, &model);
        let x = batch.x.values();
        for (t, y) in batch.y.iter().enumerate() {
            let weight = model.bases[t].values();
            for (i, got) in y.values().into_iter().enumerate() {
                let (row, o) = (i / y.cols, i % y.cols);
                let exact = (0..80).map(|c| weight[o * 80 + c] * x[row * 80 + c]).sum::<f64>();
                assert_eq!(got, exact, "{dtype}: sums of small whole numbers are exact");
            }
        }
        batch.ids.set_bits(&ids);
        run(&mut batch, &model);
        batch.assert_added_to(&model, &before, "as apply adds to a product");
    }
}

/// A coefficient of zero does not touch its adapter, and no row sees what is another's: neither NaNs of adapters nor infinities in x.
fn rows_are_kept_apart(backend: &Backend) {
    for dtype in FLOATS {
        let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &[300, 33], 80));
        let mut rng = Rng(15);
        for slot in 0..4 {
            let mut pairs = [300, 33].map(|out| model.pair_of(&mut rng, out, 80, 12));
            if slot == 2 {
                pairs.iter_mut().for_each(crate::switch::Pair::poison);
            }
            model.set_slot(slot, pairs.map(Some).into());
        }
        let mut batch = Batch::random(&model, &mut rng, 8, 2, dtype, Layout::dense);
        let mut x = batch.x.bits();
        x[2 * 80] = encode(dtype, f64::NAN);
        batch.x.set_bits(&x);
        // Row 1 has the adapter of NaNs, row 2 a NaN in x; the others have that adapter at zero.
        let ids: Vec<u32> = (0..8).flat_map(|row| if row == 1 { [2, 1] } else { [(row % 2) as u32, 2] }).collect();
        let gates: Vec<u32> = (0..8).flat_map(|row| if row == 1 { [1.0f32, 0.5] } else { [0.5, 0.0] }).map(f32::to_bits).collect();
        batch.ids.set_bits(&ids);
        batch.gates.set_bits(&gates);
        run(&mut batch, &model);
        for y in &batch.y {
            for (i, value) in y.values().iter().enumerate() {
                assert_eq!(value.is_nan(), matches!(i / y.cols, 1 | 2), "{dtype}: row {}", i / y.cols);
            }
        }
    }
}

/// Coefficients that are not finite show in their own row, and are told of, as are ids that name nothing.
fn odd_values(backend: &Backend) {
    let backend = &backend.alone();
    for dtype in [DType::F32, DType::Bf16] {
        let mut model = Model::new(backend, &group(small(dtype, Form::FromBase), &[48, 33], 80));
        let mut rng = Rng(16);
        let pairs = vec![Some(model.pair_of(&mut rng, 48, 80, 4)), None];
        model.set_slot(0, pairs);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut batch = Batch::random(&model, &mut rng, 3, 1, DType::F32, Layout::dense);
            batch.ids.set_bits(&[0, 0, u32::MAX]);
            batch.gates.set_bits(&[1.0f32, bad, bad].map(f32::to_bits));
            run(&mut batch, &model);
            for (row, y) in batch.y[0].values().chunks(48).enumerate() {
                assert_eq!(y.iter().all(|y| y.is_finite()), row != 1, "{dtype}: row {row}");
            }
            assert!(batch.y[1].values().iter().all(|y| y.is_finite()), "a target without the adapter is not touched by it");
            assert_eq!(backend.stream.take_odd().unwrap(), Odd::COEFFICIENT);
        }
        let mut batch = Batch::random(&model, &mut rng, 3, 2, DType::F32, Layout::dense);
        for (ids, odd) in [([u32::MAX, 1], Odd::default()), ([4, 1], Odd::ROUTE_ID), ([1, -2i32 as u32], Odd::ROUTE_ID)] {
            batch.ids.set_bits(&ids.repeat(3));
            batch.gates.set_bits(&[1f32.to_bits(); 6]);
            run(&mut batch, &model);
            assert_eq!(backend.stream.take_odd().unwrap(), odd, "{dtype}: {ids:?}");
        }
    }
}

/// The largest rank and the widest route; k = N; routes of nothing; duplicates.
fn largest_rank_and_k(backend: &Backend) {
    for dtype in FLOATS {
        let spec = Spec { slots: 32, max_rank: 256, ..group(small(dtype, Form::FromBase), &[70, 40], 140) };
        let mut model = Model::new(backend, &spec);
        let mut rng = Rng(17);
        for slot in 0..32 {
            let rank = [1, 9, 200, 256][slot % 4];
            let pairs = [70, 40].map(|out| Some(model.pair_of(&mut rng, out, 140, rank)));
            model.set_slot(slot, pairs.into());
        }
        let mut batch = Batch::random(&model, &mut rng, 6, 32, dtype, Layout::dense);
        let ids: Vec<u32> = (0..32).rev().chain([7; 32]).chain([u32::MAX; 32]).collect();
        batch.ids.set_bits(&ids.repeat(2));
        batch.gates.set_bits(&vec![(1.0f32 / 64.0).to_bits(); 6 * 32]);
        run(&mut batch, &model);
        assert_is_product(&batch, &model, "k = 32, rank 256");
    }
}

fn bad_arguments_are_named(backend: &Backend) {
    let spec = Spec { shapes: vec![(48, 80), (33, 80), (33, 65)], ..small(DType::Bf16, Form::FromBase) };
    let model = Model::new(backend, &spec);
    let (bf16, f32, i32) = (DType::Bf16, DType::F32, DType::I32);
    let grid = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, Layout::dense(cols));
    let bytes = linear_workspace_bytes(&model.bank, 0..2, 5, 2).unwrap() as usize;
    struct Args {
        first: u64,
        weights: Vec<Grid>,
        x: Grid,
        ids: Grid,
        gates: Grid,
        row_map: Option<Grid>,
        y: Vec<Grid>,
        workspace: Grid,
    }
    let refused = |name: &str, change: &dyn Fn(&mut Args)| {
        let (weights, y) = (vec![grid(bf16, 48, 80), grid(bf16, 33, 80)], vec![grid(f32, 5, 48), grid(f32, 5, 33)]);
        let (ids, gates, workspace) = (grid(i32, 5, 2), grid(f32, 5, 2), grid(DType::U8, 1, bytes));
        let mut args = Args { first: 0, weights, x: grid(bf16, 5, 80), ids, gates, row_map: None, y, workspace };
        change(&mut args);
        let (ids, gates, row_map) = (args.ids.mat(), args.gates.mat(), args.row_map.as_ref().map(Grid::mat));
        let routes = Routes { ids: &ids, gates: &gates, row_map: row_map.as_ref() };
        let before: Vec<_> = args.y.iter().map(Grid::bits).collect();
        let weights: Vec<Mat<'_>> = args.weights.iter().map(Grid::mat).collect();
        let mut y: Vec<MatMut<'_>> = args.y.iter_mut().map(Grid::mat_mut).collect();
        let (x, options) = (args.x.mat(), LinearOptions::default());
        let workspace = &mut args.workspace.mat_mut();
        let error = linear(&backend.stream, options, &model.bank, args.first, &weights, &x, &routes, &mut y, workspace).unwrap_err();
        assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
        drop(y);
        assert_eq!(args.y.iter().map(Grid::bits).collect::<Vec<_>>(), before);
    };
    refused("targets", &|a| a.first = 2);
    refused("targets", &|a| a.first = u64::MAX);
    refused("targets", &|a| a.y.clear());
    refused("targets[2].in_features", &|a| a.first = 1);
    refused("weights", &|a| a.weights.truncate(1));
    refused("weights[1].rows", &|a| a.weights[1] = grid(bf16, 48, 80));
    refused("weights[0].cols", &|a| a.weights[0] = grid(bf16, 48, 79));
    refused("weights[1].dtype", &|a| a.weights[1] = grid(f32, 33, 80));
    refused("x.dtype", &|a| a.x = grid(DType::F16, 5, 80));
    refused("x.cols", &|a| a.x = grid(bf16, 5, 79));
    refused("x.rows", &|a| a.x = grid(bf16, 9, 80));
    refused("ids.rows", &|a| (a.ids, a.gates) = (grid(i32, 4, 2), grid(f32, 4, 2)));
    refused("gates.rows", &|a| a.gates = grid(f32, 4, 2));
    refused("ids.cols", &|a| a.ids = grid(i32, 5, 33));
    refused("ids.dtype", &|a| a.ids = grid(f32, 5, 2));
    refused("row_map.cols", &|a| a.row_map = Some(grid(i32, 1, 4)));
    refused("y[0].dtype", &|a| a.y[0] = grid(i32, 5, 48));
    refused("y[1].dtype", &|a| a.y[1] = grid(bf16, 5, 33));
    refused("y[1].rows", &|a| a.y[1] = grid(f32, 4, 33));
    refused("y[0].cols", &|a| a.y[0] = grid(f32, 5, 47));
    refused("workspace.cols", &|a| a.workspace = grid(DType::U8, 1, bytes - 1));
    refused("workspace.cols", &|a| a.workspace = grid(DType::U8, 1, 0));
    refused("workspace.dtype", &|a| a.workspace = grid(bf16, 1, bytes));
    refused("workspace.data", &|a| a.workspace = Grid::poisoned(backend, DType::U8, 1, bytes, Layout { stride: bytes, shift: 4 }));

    // Overlaps: an output over the input, over a weight, over another output, over the workspace's head.
    let (weights, x, y) = ([grid(bf16, 48, 80), grid(bf16, 33, 80)], grid(bf16, 5, 80), grid(bf16, 5, 48));
    let (ids, gates, mut space) = (grid(i32, 5, 2), grid(f32, 5, 2), grid(DType::U8, 1, bytes));
    let (ids, gates, space_addr) = (ids.mat(), gates.mat(), space.addr());
    let routes = Routes { ids: &ids, gates: &gates, row_map: None };
    // SAFETY: refused before anything is touched.
    let view = |addr: u64, cols: u64| unsafe { MatMut::raw(&backend.context, addr, bf16, 5, cols, 48) };
    let views: Vec<Mat<'_>> = weights.iter().map(Grid::mat).collect();
    for addr in [y.addr(), x.addr(), weights[0].addr(), weights[1].addr(), space_addr] {
        let mut both = [view(y.addr(), 48), view(addr, 33)];
        let (x, options, space) = (x.mat(), LinearOptions::default(), &mut space.mat_mut());
        let error = linear(&backend.stream, options, &model.bank, 0, &views, &x, &routes, &mut both, space).unwrap_err();
        assert!(matches!(&error, Error::Argument { name, .. } if name == "y[1].data" || name == "workspace.data"), "{error}");
    }

    let bytes = |targets, rows, k| linear_workspace_bytes(&model.bank, targets, rows, k);
    for (result, name) in [(bytes(1..3, 5, 2), "targets[2].in_features"), (bytes(0..2, 9, 2), "rows"), (bytes(0..2, 5, 33), "k")] {
        assert!(matches!(&result, Err(Error::Argument { name: n, .. }) if n == name), "{result:?} should name {name}");
    }
    let of_apply = lora_switch::apply_workspace_bytes(&model.bank, 0..2, 5, 2).unwrap();
    assert_eq!(bytes(0..2, 5, 2).unwrap(), 16 + of_apply, "counters, and what apply needs");
    assert_eq!(bytes(0..2, 0, 2).unwrap(), 16);
}

on_backends!(
    matches_oracle,
    any_number_of_rows,
    rings_come_around,
    bits_depend_on_the_row_alone,
    targets_are_kept_apart,
    alignment_does_not_matter,
    agrees_with_apply,
    rows_are_kept_apart,
    odd_values,
    largest_rank_and_k,
    bad_arguments_are_named,
);
