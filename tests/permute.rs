//! Gather-scatter: both backends against the oracle; alignment; errors.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, decode};
use crate::oracle;
use lora_switch::{DType, Error, combine, gather, permute, permute_workspace_bytes};
use proptest::prelude::*;

struct Maps {
    offsets: Grid,
    row_map: Grid,
    inverse: Grid,
}

fn run_maps(backend: &Backend, ids: &Grid, experts: usize, inverse_layout: Layout) -> Maps {
    let items = ids.rows * ids.cols;
    let poisoned = |rows, cols, layout| Grid::poisoned(backend, DType::I32, rows, cols, layout);
    let mut offsets = poisoned(1, experts + 1, Layout::dense(experts + 1));
    let mut row_map = poisoned(1, items, Layout::dense(items));
    let mut inverse = poisoned(ids.rows, ids.cols, inverse_layout);
    let bytes = permute_workspace_bytes(&backend.stream, items as u64, experts as u64).unwrap() as usize;
    let mut workspace = Grid::poisoned(backend, DType::U8, 1, bytes, Layout::dense(bytes));
    permute(
        &backend.stream,
        experts as u64,
        &ids.mat(),
        &mut offsets.mat_mut(),
        &mut row_map.mat_mut(),
        &mut inverse.mat_mut(),
        &mut workspace.mat_mut(),
    )
    .unwrap();
    workspace.bits();
    Maps { offsets, row_map, inverse }
}

fn random_ids(rng: &mut Rng, n: usize, experts: usize, dropped: usize) -> Vec<u32> {
    (0..n)
        .map(|_| match rng.below(100) < dropped {
            true => rng.pick(&[-1i32, -7, experts as i32, i32::MAX, i32::MIN]) as u32,
            false => rng.below(experts) as u32,
        })
        .collect()
}

fn maps_match_oracle(backend: &Backend) {
    let shape = (0usize..300, 1usize..33, prop_oneof![Just(1usize), Just(31), Just(32), Just(33), Just(1024), 1usize..1024]);
    proptest!(cases(60), |((tokens, k, experts) in shape, pads in [0usize..3, 0usize..3], dropped in 0usize..101, seed: u64)| {
        let mut rng = Rng(seed);
        let bits = random_ids(&mut rng, tokens * k, experts, dropped);
        let ids = Grid::new(backend, DType::I32, tokens, k, Layout { stride: k + pads[0], shift: pads[0] }, &bits);
        let maps = run_maps(backend, &ids, experts, Layout { stride: k + pads[1], shift: pads[1] });
        let (offsets, row_map, inverse) = oracle::maps(&ids.i32s(), experts);
        prop_assert_eq!(maps.offsets.i32s(), offsets);
        prop_assert_eq!(maps.row_map.i32s(), row_map);
        prop_assert_eq!(maps.inverse.i32s(), inverse);
    });
}

/// Many blocks, in which a warp's run, a block's and the whole end on uneven counts; checked by the properties that define a stable
/// sort, since the oracle is quadratic.
fn maps_of_many_items(backend: &Backend) {
    for (tokens, k, experts) in [(4097, 3, 64), (16384, 8, 256), (70001, 2, 5)] {
        let mut rng = Rng(tokens as u64);
        let bits = random_ids(&mut rng, tokens * k, experts, 5);
        let ids = Grid::new(backend, DType::I32, tokens, k, Layout::dense(k), &bits);
        let maps = run_maps(backend, &ids, experts, Layout::dense(k));
        let (ids, offsets, rows, inverse) = (ids.i32s(), maps.offsets.i32s(), maps.row_map.i32s(), maps.inverse.i32s());
        let valid = ids.iter().filter(|&&e| e >= 0 && (e as usize) < experts).count();
        assert_eq!((offsets[0], offsets[experts] as usize), (0, valid));
        assert!(rows[valid..].iter().all(|&r| r == -1));
        for e in 0..experts {
            let segment = &rows[offsets[e] as usize..offsets[e + 1] as usize];
            assert!(segment.iter().all(|&i| ids[i as usize] == e as i32), "expert {e}");
            assert!(segment.windows(2).all(|w| w[0] < w[1]), "expert {e} is stable");
        }
        assert!((0..valid).all(|r| inverse[rows[r] as usize] == r as i32));
        assert_eq!(inverse.iter().filter(|&&r| r == -1).count(), ids.len() - valid);
    }
}

/// Row widths and shifts through every unit of the copy (16, 4, 2, 1 bytes), all element types.
fn gather_moves_bytes(backend: &Backend) {
    let dtypes = [DType::F32, DType::F16, DType::Bf16, DType::I32, DType::U8];
    let place = (0usize..5, 0usize..5, 0usize..5);
    proptest!(cases(80), |(d in 0usize..5, tokens in 0usize..40, k in 1usize..5, cols in 0usize..300, (px, pr, shift) in place, seed: u64)| {
        let (dtype, experts) = (dtypes[d], 6);
        let mut rng = Rng(seed);
        let ids = Grid::new(backend, DType::I32, tokens, k, Layout::dense(k), &random_ids(&mut rng, tokens * k, experts, 20));
        let maps = run_maps(backend, &ids, experts, Layout::dense(k));
        let bits: Vec<u32> = (0..tokens * cols).map(|_| rng.next() as u32 >> (32 - 8 * dtype.size())).collect();
        let x = Grid::new(backend, dtype, tokens, cols, Layout { stride: cols + 4 * px, shift }, &bits);
        let mut rows = Grid::poisoned(backend, dtype, tokens * k, cols, Layout { stride: cols + 4 * pr, shift });
        let poison = rows.bits();
        gather(&backend.stream, &x.mat(), &maps.row_map.mat(), k as u64, &mut rows.mat_mut()).unwrap();
        let got = rows.bits();
        for (r, item) in maps.row_map.i32s().into_iter().enumerate() {
            let want = if item < 0 { &poison[r * cols..][..cols] } else { &bits[item as usize / k * cols..][..cols] };
            prop_assert_eq!(&got[r * cols..][..cols], want, "row {}", r);
        }
    });
}

fn combine_matches_oracle(backend: &Backend) {
    let place = (0usize..9, 0usize..9, 0usize..5);
    proptest!(cases(80), |(d in 0usize..3, tokens in 0usize..40, k in 1usize..9, cols in 0usize..300, (pr, py, shift) in place, seed: u64)| {
        let (dtype, mut rng) = (FLOATS[d], Rng(seed));
        let row_count = tokens * k;
        let rows = Grid::new(backend, dtype, row_count, cols, Layout { stride: cols + pr, shift }, &rng.bits(dtype, row_count * cols, 3.0));
        // Any map serves, also one that names rows twice, none, or rows that do not exist.
        let inverse: Vec<u32> = (0..tokens * k).map(|_| match rng.below(5) {
            0 => rng.pick(&[-1i32, -9, row_count as i32, i32::MAX]) as u32,
            _ => rng.below(row_count.max(1)) as u32,
        }).collect();
        let inverse = Grid::new(backend, DType::I32, tokens, k, Layout { stride: k + pr, shift: 0 }, &inverse);
        let gates = Grid::new(backend, DType::F32, tokens, k, Layout { stride: k + py, shift: 1 }, &rng.bits(DType::F32, tokens * k, 1.0));
        let mut y = Grid::poisoned(backend, dtype, tokens, cols, Layout { stride: cols + py, shift });
        combine(&backend.stream, &rows.mat(), &inverse.mat(), &gates.mat(), &mut y.mat_mut()).unwrap();
        let (got, x, map, g) = (y.values(), rows.values(), inverse.i32s(), gates.values());
        for t in 0..tokens {
            let named: Vec<usize> = (t * k..t * k + k).filter(|&i| map[i] >= 0 && (map[i] as usize) < row_count).collect();
            let picked: Vec<&[f64]> = named.iter().map(|&i| &x[map[i] as usize * cols..][..cols]).collect();
            let weights: Vec<f64> = named.iter().map(|&i| g[i]).collect();
            let (exact, bounds) = oracle::combine(&picked, &weights, cols);
            oracle::assert_close(dtype, &got[t * cols..][..cols], &exact, &bounds, "combine");
        }
    });
}

/// gather, then combine with gates that sum to one, gives the tokens back: rows and maps agree with each other.
fn round_trip(backend: &Backend) {
    let (tokens, k, experts, cols) = (50, 2, 8, 72);
    let mut rng = Rng(3);
    let ids = Grid::new(backend, DType::I32, tokens, k, Layout::dense(k), &random_ids(&mut rng, tokens * k, experts, 0));
    let maps = run_maps(backend, &ids, experts, Layout::dense(k));
    let x = Grid::new(backend, DType::Bf16, tokens, cols, Layout::dense(cols), &rng.bits(DType::Bf16, tokens * cols, 1.0));
    let mut rows = Grid::poisoned(backend, DType::Bf16, tokens * k, cols, Layout::dense(cols));
    gather(&backend.stream, &x.mat(), &maps.row_map.mat(), k as u64, &mut rows.mat_mut()).unwrap();
    let gates = Grid::new(backend, DType::F32, tokens, k, Layout::dense(k), &vec![0.5f32.to_bits(); tokens * k]);
    let mut y = Grid::poisoned(backend, DType::Bf16, tokens, cols, Layout::dense(cols));
    combine(&backend.stream, &rows.mat(), &maps.inverse.mat(), &gates.mat(), &mut y.mat_mut()).unwrap();
    let same = |a: Vec<u32>, b: Vec<u32>| a.iter().zip(&b).all(|(a, b)| decode(DType::Bf16, *a) == decode(DType::Bf16, *b));
    assert!(same(y.bits(), x.bits()));
}

fn bad_arguments_are_named(backend: &Backend) {
    let grid = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, Layout::dense(cols));
    let named =
        |error: Error, name: &str| assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
    let (i32, bf16) = (DType::I32, DType::Bf16);
    let maps = |experts: u64, offsets: usize, row_map: usize, workspace_less: usize| {
        let ids = grid(i32, 3, 2);
        let (mut offsets, mut row_map, mut inverse) = (grid(i32, 1, offsets), grid(i32, 1, row_map), grid(i32, 3, 2));
        let bytes = permute_workspace_bytes(&backend.stream, 6, 4).unwrap() as usize;
        let mut workspace = grid(DType::U8, 1, bytes.saturating_sub(workspace_less));
        permute(
            &backend.stream,
            experts,
            &ids.mat(),
            &mut offsets.mat_mut(),
            &mut row_map.mat_mut(),
            &mut inverse.mat_mut(),
            &mut workspace.mat_mut(),
        )
        .unwrap_err()
    };
    named(maps(0, 5, 6, 0), "experts");
    named(maps(1025, 5, 6, 0), "experts");
    named(maps(4, 4, 6, 0), "offsets.cols");
    named(maps(4, 5, 5, 0), "row_map.cols");
    if backend.cuda.is_some() {
        named(maps(4, 5, 6, 1), "workspace.cols");
    }
    named(permute_workspace_bytes(&backend.stream, 1 << 31, 4).unwrap_err(), "items");

    let (x, map) = (grid(bf16, 3, 8), grid(i32, 1, 6));
    named(gather(&backend.stream, &x.mat(), &map.mat(), 0, &mut grid(bf16, 6, 8).mat_mut()).unwrap_err(), "k");
    named(gather(&backend.stream, &x.mat(), &map.mat(), 2, &mut grid(DType::F16, 6, 8).mat_mut()).unwrap_err(), "rows.dtype");
    named(gather(&backend.stream, &x.mat(), &map.mat(), 2, &mut grid(bf16, 5, 8).mat_mut()).unwrap_err(), "row_map.cols");
    let (rows, inverse, gates) = (grid(bf16, 6, 8), grid(i32, 3, 2), grid(DType::F32, 3, 2));
    named(combine(&backend.stream, &rows.mat(), &inverse.mat(), &gates.mat(), &mut grid(bf16, 3, 9).mat_mut()).unwrap_err(), "y.cols");
    named(
        combine(&backend.stream, &rows.mat(), &inverse.mat(), &gates.mat(), &mut grid(bf16, 4, 8).mat_mut()).unwrap_err(),
        "inverse.rows",
    );
    named(combine(&backend.stream, &x.mat(), &map.mat(), &gates.mat(), &mut grid(i32, 1, 8).mat_mut()).unwrap_err(), "gates.rows");
}

on_backends!(maps_match_oracle, maps_of_many_items, gather_moves_bytes, combine_matches_oracle, round_trip, bad_arguments_are_named);
