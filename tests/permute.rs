//! Gather-scatter: both backends against the oracle; alignment; errors.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, decode};
use crate::oracle;
use lora_switch::{
    CombineOptions, DType, Error, Odd, PermuteMaps, PermuteOptions, combine, combine_with, gather, permute, permute_with,
    permute_workspace_bytes,
};
use proptest::prelude::*;
use std::ops::Range;

struct Maps {
    offsets: Grid,
    row_map: Grid,
    inverse: Grid,
    block_experts: Grid,
    workspace: Grid,
}

impl Maps {
    pub fn new(backend: &Backend, options: &PermuteOptions, tokens: usize, k: usize, inverse: Layout) -> Self {
        let sizes = options.sizes(&backend.stream, (tokens * k) as u64).unwrap();
        let out = |dtype, cols: u64| Grid::poisoned(backend, dtype, 1, cols as usize, Layout::dense(cols as usize));
        Self {
            offsets: out(DType::I32, options.local.end - options.local.start + 1),
            row_map: out(DType::I32, sizes.rows),
            inverse: Grid::poisoned(backend, DType::I32, tokens, k, inverse),
            block_experts: out(DType::I32, sizes.blocks),
            workspace: out(DType::U8, sizes.workspace_bytes),
        }
    }

    fn run(&mut self, backend: &Backend, options: &PermuteOptions, ids: &Grid) -> lora_switch::Result<()> {
        let (offsets, row_map) = (&mut self.offsets.mat_mut(), &mut self.row_map.mat_mut());
        let (inverse, mut block_experts) = (&mut self.inverse.mat_mut(), self.block_experts.mat_mut());
        let maps = PermuteMaps { offsets, row_map, inverse, block_experts: Some(&mut block_experts) };
        permute_with(&backend.stream, options, &ids.mat(), maps, &mut self.workspace.mat_mut())
    }

    /// After a check of the canaries.
    fn read(&self) -> oracle::Maps {
        self.workspace.bits();
        let [offsets, row_map, inverse, block_experts] = [&self.offsets, &self.row_map, &self.inverse, &self.block_experts].map(Grid::i32s);
        oracle::Maps { offsets, row_map, inverse, block_experts }
    }
}

fn run_maps(backend: &Backend, options: &PermuteOptions, ids: &Grid) -> Maps {
    let mut maps = Maps::new(backend, options, ids.rows, ids.cols, Layout::dense(ids.cols));
    maps.run(backend, options, ids).unwrap();
    maps
}

/// As plain as a call can be.
fn simple_maps(backend: &Backend, ids: &Grid, experts: usize) -> Maps {
    run_maps(backend, &PermuteOptions::new(experts as u64), ids)
}

fn expected(options: &PermuteOptions, ids: &[i32], rows: usize) -> oracle::Maps {
    let Range { start, end } = options.local;
    oracle::maps(ids, start as usize..end as usize, options.block as usize, options.filler, rows)
}

/// `dropped` of 100 are no experts.
fn random_ids(rng: &mut Rng, n: usize, experts: usize, dropped: usize) -> Vec<u32> {
    (0..n)
        .map(|_| match rng.below(100) < dropped {
            true => rng.pick(&[-1i32, -7, experts as i32, i32::MAX, i32::MIN]) as u32,
            false => rng.below(experts) as u32,
        })
        .collect()
}

/// Experts around the counters' 16-bit pairs, a lane, a warp, a block of threads, and both sides of where two passes begin. Ranges,
/// blocks and fillers of all kinds; items from none to several tiles. Dropped: from none to all.
fn maps_match_oracle(backend: &Backend) {
    let backend = &backend.alone();
    let experts = prop_oneof![Just(1u64), Just(2), Just(31), Just(33), Just(513), Just(1024), Just(1025), 1u64..1100, Just(3000)];
    let block = prop_oneof![Just(1u64), Just(16), Just(64), 1u64..130, Just(1024)];
    let shape = (0usize..300, 1usize..33, experts, block, -3i32..3);
    proptest!(cases(80), |((tokens, k, experts, block, filler) in shape, cut: (u64, u64), pads in [0usize..3, 0usize..3], dropped in 0usize..101, seed: u64)| {
        let mut rng = Rng(seed);
        let start = if cut.0 % 2 == 0 { 0 } else { cut.0 / 2 % experts };
        let end = if cut.1 % 2 == 0 { experts } else { start + 1 + cut.1 / 2 % (experts - start) };
        let options = PermuteOptions { experts, local: start..end, block, filler };
        let bits = random_ids(&mut rng, tokens * k, experts as usize, dropped);
        let ids = Grid::new(backend, DType::I32, tokens, k, Layout { stride: k + pads[0], shift: pads[0] }, &bits);
        let mut maps = Maps::new(backend, &options, tokens, k, Layout { stride: k + pads[1], shift: pads[1] });
        maps.run(backend, &options, &ids).unwrap();
        let ids = ids.i32s();
        prop_assert_eq!(maps.read(), expected(&options, &ids, maps.row_map.cols));
        let is_odd = |id: &i32| *id < -1 || *id >= experts as i32;
        prop_assert_eq!(backend.stream.take_odd().unwrap().contains(Odd::ID), ids.iter().any(is_odd));
    });
}

/// Many blocks, in which a warp's run, a tile, a block's run and the whole end on uneven counts; more items than blocks have tiles; most
/// of them, or all, of one expert; none at all; two passes; and k = N, where every token names every expert.
fn maps_of_many_items(backend: &Backend) {
    let mut rng = Rng(17);
    for (tokens, k, experts, block, dropped) in [
        (4097, 3, 64, 1, 5),
        (16384, 8, 256, 64, 0),
        (70001, 2, 5, 128, 5),
        (20000, 8, 1000, 7, 50),
        (9000, 1, 5000, 16, 10),
        (3000, 7, 2, 1, 100),
    ] {
        let options = PermuteOptions { block, ..PermuteOptions::new(experts as u64) };
        for skewed in [false, true] {
            let mut bits = random_ids(&mut rng, tokens * k, experts, dropped);
            if skewed {
                bits.iter_mut().filter(|_| rng.below(50) > 0).for_each(|id| *id = experts as u32 - 1);
            }
            let ids = Grid::new(backend, DType::I32, tokens, k, Layout::dense(k), &bits);
            let maps = run_maps(backend, &options, &ids);
            assert!(maps.read() == expected(&options, &ids.i32s(), maps.row_map.cols), "{tokens} x {k} over {experts}, skewed: {skewed}");
        }
    }
    let all: Vec<u32> = (0..5000 * 32).map(|i| (i * 7 % 32) as u32).collect();
    let ids = Grid::new(backend, DType::I32, 5000, 32, Layout::dense(32), &all);
    let maps = simple_maps(backend, &ids, 32);
    assert!(maps.read() == expected(&PermuteOptions::new(32), &ids.i32s(), maps.row_map.cols));
}

/// As many experts as there can be, with few items and with many; the oracle would take long.
fn maps_of_many_experts(backend: &Backend) {
    let experts = 65536;
    for (tokens, block) in [(3, 8), (40_000, 1), (40_000, 4)] {
        let options = PermuteOptions { block, ..PermuteOptions::new(experts) };
        let mut rng = Rng(tokens as u64);
        let bits = random_ids(&mut rng, tokens * 2, experts as usize, 5);
        let ids = Grid::new(backend, DType::I32, tokens, 2, Layout::dense(2), &bits);
        let maps = run_maps(backend, &options, &ids).read();
        let mut sorted: Vec<(i32, i32)> = ids.i32s().into_iter().zip(0..).filter(|(id, _)| (0..experts as i32).contains(id)).collect();
        sorted.sort();
        let rows: Vec<i32> = maps.row_map.iter().copied().filter(|&item| item != -1).collect();
        assert_eq!(rows, sorted.iter().map(|(_, item)| *item).collect::<Vec<_>>());
        for (row, &item) in maps.row_map.iter().enumerate().filter(|(_, item)| **item >= 0) {
            let e = bits[item as usize] as usize;
            assert!((maps.offsets[e]..maps.offsets[e + 1]).contains(&(row as i32)), "row {row} of expert {e}");
            assert_eq!(maps.block_experts[row / block as usize], e as i32);
            assert_eq!(maps.inverse[item as usize], row as i32);
        }
        assert_eq!(maps.inverse.iter().filter(|&&row| row == -1).count(), bits.len() - sorted.len());
        for (e, segment) in maps.offsets.windows(2).enumerate() {
            let count = sorted.partition_point(|(id, _)| *id <= e as i32) - sorted.partition_point(|(id, _)| *id < e as i32);
            assert_eq!((segment[1] - segment[0]) as usize, count.next_multiple_of(block as usize), "expert {e}");
        }
    }
}

/// The call without options is the one with the defaults.
fn simple_call(backend: &Backend) {
    let ids = Grid::new(backend, DType::I32, 3, 2, Layout::dense(2), &[4, 0, u32::MAX, 4, 2, 0]);
    let out = |cols| Grid::poisoned(backend, DType::I32, 1, cols, Layout::dense(cols));
    let (mut offsets, mut row_map) = (out(6), out(6));
    let mut inverse = Grid::poisoned(backend, DType::I32, 3, 2, Layout::dense(2));
    let bytes = permute_workspace_bytes(&backend.stream, 6, 5).unwrap() as usize;
    let mut workspace = Grid::poisoned(backend, DType::U8, 1, bytes, Layout::dense(bytes));
    {
        let (mut offsets, mut row_map, mut inverse) = (offsets.mat_mut(), row_map.mat_mut(), inverse.mat_mut());
        permute(&backend.stream, 5, &ids.mat(), &mut offsets, &mut row_map, &mut inverse, &mut workspace.mat_mut()).unwrap();
    }
    assert_eq!(offsets.i32s(), [0, 2, 2, 3, 3, 5]);
    assert_eq!(row_map.i32s(), [1, 5, 4, 0, 3, -1]);
    assert_eq!(inverse.i32s(), [3, 0, -1, 4, 2, 1]);
}

/// Row widths and shifts through every unit of the copy (16, 4, 2, 1 bytes), all element types; maps with padding and without, and
/// entries that name no row.
fn gather_moves_bytes(backend: &Backend) {
    let dtypes = [DType::F32, DType::F16, DType::Bf16, DType::I32, DType::U8];
    let place = (0usize..5, 0usize..5, 0usize..5);
    let cols = prop_oneof![0usize..300, Just(1024), Just(2051)];
    proptest!(cases(80), |(d in 0usize..5, tokens in 0usize..40, k in 1usize..33, block in 1u64..9, cols in cols, (px, pr, shift) in place, seed: u64)| {
        let (dtype, mut rng) = (dtypes[d], Rng(seed));
        let ids = Grid::new(backend, DType::I32, tokens, k, Layout::dense(k), &random_ids(&mut rng, tokens * k, 6, 20));
        let maps = run_maps(backend, &PermuteOptions { block, ..PermuteOptions::new(6) }, &ids);
        // Fewer rows than the map names: the rest is skipped.
        let count = maps.row_map.cols * (3 + rng.below(2)) / 4;
        let bits: Vec<u32> = (0..tokens * cols).map(|_| rng.next() as u32 >> (32 - 8 * dtype.size())).collect();
        let x = Grid::new(backend, dtype, tokens, cols, Layout { stride: cols + 4 * px, shift }, &bits);
        let mut rows = Grid::poisoned(backend, dtype, count, cols, Layout { stride: cols + 4 * pr, shift });
        let poison = rows.bits();
        gather(&backend.stream, &x.mat(), &maps.inverse.mat(), &mut rows.mat_mut()).unwrap();
        let got = rows.bits();
        for (r, item) in maps.row_map.i32s().into_iter().take(count).enumerate() {
            let want = if item < 0 { &poison[r * cols..][..cols] } else { &bits[item as usize / k * cols..][..cols] };
            prop_assert_eq!(&got[r * cols..][..cols], want, "row {}", r);
        }
    });
}

/// Rows of which a warp's share, and the shares of all warps, end unevenly; aligned and not; with and without scale and residual, y itself
/// included.
fn combine_matches_oracle(backend: &Backend) {
    let place = (0usize..9, 0usize..9, 0usize..5);
    let cols = prop_oneof![0usize..300, Just(512), Just(1024), Just(1032), Just(2051)];
    proptest!(cases(120), |(d in 0usize..3, tokens in 0usize..40, k in 1usize..33, cols in cols, (pr, py, shift) in place, extra in 0usize..4, seed: u64)| {
        let (dtype, mut rng) = (FLOATS[d], Rng(seed));
        let aligned = rng.below(2) == 0;
        let (cols, pr, py, shift) = if aligned { (cols / 8 * 8, pr / 8 * 8, py / 8 * 8, 0) } else { (cols, pr, py, shift) };
        let row_count = tokens * k;
        let layout = Layout { stride: cols + pr, shift };
        // What no entry names is NaN: it must not be looked at, and the gates of such entries do not count.
        let mut bits = rng.bits(dtype, row_count * cols, 3.0);
        let inverse: Vec<u32> = (0..tokens * k).map(|_| match rng.below(5) {
            0 => rng.pick(&[-1i32, -9, row_count as i32, i32::MAX]) as u32,
            _ => rng.below(row_count) as u32,
        }).collect();
        for r in (0..row_count).filter(|r| !inverse.contains(&(*r as u32))) {
            bits[r * cols..][..cols].fill(crate::common::encode(dtype, f64::NAN));
        }
        let rows = Grid::new(backend, dtype, row_count, cols, layout, &bits);
        let mut gates = rng.bits(DType::F32, tokens * k, 1.0);
        for (gate, _) in gates.iter_mut().zip(&inverse).filter(|(_, row)| **row >= row_count as u32) {
            *gate = f32::NAN.to_bits();
        }
        let inverse = Grid::new(backend, DType::I32, tokens, k, Layout { stride: k + pr, shift: 0 }, &inverse);
        let gates = Grid::new(backend, DType::F32, tokens, k, Layout { stride: k + py, shift: 1 }, &gates);
        let layout = Layout { stride: cols + py, shift };
        let (residual, scale) = (rng.bits(dtype, tokens * cols, 3.0), if extra == 0 { 1.0 } else { rng.uniform() as f32 });
        let exact_residual: Vec<f64> = residual.iter().map(|&x| if extra < 2 { 0.0 } else { decode(dtype, x) }).collect();
        let mut y = match extra {
            3 => Grid::new(backend, dtype, tokens, cols, layout, &residual), // y += scale * sum
            _ => Grid::poisoned(backend, dtype, tokens, cols, layout),
        };
        let residual = Grid::new(backend, dtype, tokens, cols, Layout { stride: cols + py + pr, shift }, &residual);
        let (rows_in, map, gates_in) = (rows.mat(), inverse.mat(), gates.mat());
        match extra {
            0 => combine(&backend.stream, &rows_in, &map, &gates_in, &mut y.mat_mut()).unwrap(),
            _ => {
                // SAFETY: memory of a grid that outlives the call.
                let own = unsafe { lora_switch::Mat::raw(&backend.context, y.addr(), dtype, tokens as u64, cols as u64, layout.stride as u64) };
                let options = CombineOptions { scale, residual: [None, Some(residual.mat()), Some(own)].into_iter().nth(extra - 1).unwrap() };
                combine_with(&backend.stream, &options, &rows_in, &map, &gates_in, &mut y.mat_mut()).unwrap();
            }
        }
        let (got, x, map, g) = (y.values(), rows.values(), inverse.i32s(), gates.values());
        for t in 0..tokens {
            let named: Vec<usize> = (t * k..t * k + k).filter(|&i| map[i] >= 0 && (map[i] as usize) < row_count).collect();
            let picked: Vec<&[f64]> = named.iter().map(|&i| &x[map[i] as usize * cols..][..cols]).collect();
            let weights: Vec<f64> = named.iter().map(|&i| g[i]).collect();
            let (exact, bounds) = oracle::combine(&picked, &weights, f64::from(scale), &exact_residual[t * cols..][..cols]);
            oracle::assert_close(dtype, &got[t * cols..][..cols], &exact, &bounds, "combine");
        }
    });
}

/// A token's bits do not depend on its neighbours, nor on the call: one alone, in a batch, with a zero residual and a scale of one.
fn combine_is_the_same_bits(backend: &Backend) {
    let (tokens, k, cols) = (33, 5, 520);
    let mut rng = Rng(9);
    for dtype in FLOATS {
        let rows = Grid::new(backend, dtype, tokens * k, cols, Layout::dense(cols), &rng.bits(dtype, tokens * k * cols, 2.0));
        let map: Vec<u32> = (0..tokens * k).map(|_| rng.below(tokens * k) as u32).collect();
        let weights = rng.bits(DType::F32, tokens * k, 1.0);
        let run = |tokens: Range<usize>, with: bool| {
            let count = tokens.len();
            let part = tokens.start * k..tokens.end * k;
            let inverse = Grid::new(backend, DType::I32, count, k, Layout::dense(k), &map[part.clone()]);
            let gates = Grid::new(backend, DType::F32, count, k, Layout::dense(k), &weights[part]);
            let mut y = Grid::poisoned(backend, dtype, count, cols, Layout::dense(cols));
            let zeros = Grid::new(backend, dtype, count, cols, Layout::dense(cols), &vec![0; count * cols]);
            let options = CombineOptions { residual: with.then(|| zeros.mat()), ..CombineOptions::default() };
            combine_with(&backend.stream, &options, &rows.mat(), &inverse.mat(), &gates.mat(), &mut y.mat_mut()).unwrap();
            y.bits()
        };
        let all = run(0..tokens, false);
        assert_eq!(all, run(0..tokens, true));
        assert_eq!(all[7 * cols..8 * cols], run(7..8, false));
    }
}

/// More than 2^31 elements of rows: one token too many for 32 bits, in bytes where it was read and where it was written.
fn rows_past_32_bits(backend: &Backend) {
    if backend.cuda.is_none() {
        return; // the addresses of the CPU are those of its language
    }
    let (k, cols, count) = (8u64, 4096u64, (1u64 << 31) / 4096 + 8);
    let stream = backend.cuda.as_ref().unwrap();
    let Ok(memory) = stream.alloc_zeros::<u8>((count * cols * 2) as usize) else {
        return eprintln!("skipped: the card has no 4.3 GB to spare");
    };
    let addr = cudarc::driver::DevicePtr::device_ptr(&memory, stream).0;
    // SAFETY: memory that was just allocated and outlives the calls.
    let rows = || unsafe { lora_switch::Mat::raw(&backend.context, addr, DType::Bf16, count, cols, cols) };
    // SAFETY: as above.
    let mut rows_out = unsafe { lora_switch::MatMut::raw(&backend.context, addr, DType::Bf16, count, cols, cols) };
    let mut rng = Rng(2);
    let x = Grid::new(backend, DType::Bf16, 1, cols as usize, Layout::dense(cols as usize), &rng.bits(DType::Bf16, cols as usize, 1.0));
    let last: Vec<u32> = (0..k).map(|j| (count - k + j) as u32).collect();
    let inverse = Grid::new(backend, DType::I32, 1, k as usize, Layout::dense(k as usize), &last);
    gather(&backend.stream, &x.mat(), &inverse.mat(), &mut rows_out).unwrap();
    let gates = Grid::floats(backend, &[0.125; 8]);
    let mut y = Grid::poisoned(backend, DType::Bf16, 1, cols as usize, Layout::dense(cols as usize));
    combine(&backend.stream, &rows(), &inverse.mat(), &gates.mat(), &mut y.mat_mut()).unwrap();
    assert_eq!(y.values(), x.values(), "eight eighths");
}

/// gather, then combine with gates that sum to one, gives the tokens back: rows and maps agree with each other.
fn round_trip(backend: &Backend) {
    let (tokens, k, experts, cols) = (50, 2, 8, 72);
    let mut rng = Rng(3);
    let ids = Grid::new(backend, DType::I32, tokens, k, Layout::dense(k), &random_ids(&mut rng, tokens * k, experts, 0));
    let maps = simple_maps(backend, &ids, experts);
    let x = Grid::new(backend, DType::Bf16, tokens, cols, Layout::dense(cols), &rng.bits(DType::Bf16, tokens * cols, 1.0));
    let mut rows = Grid::poisoned(backend, DType::Bf16, tokens * k, cols, Layout::dense(cols));
    gather(&backend.stream, &x.mat(), &maps.inverse.mat(), &mut rows.mat_mut()).unwrap();
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
    let good = PermuteOptions { block: 4, ..PermuteOptions::new(4) };
    let of = |change: &dyn Fn(&mut PermuteOptions)| {
        let mut options = good.clone();
        change(&mut options);
        options.sizes(&backend.stream, 6).unwrap_err()
    };
    named(of(&|o| o.experts = 0), "experts");
    named(of(&|o| o.experts = 65537), "experts");
    named(of(&|o| o.local = 4..5), "local.start");
    named(of(&|o| o.local = 2..2), "local.end");
    named(of(&|o| o.local = 2..5), "local.end");
    named(of(&|o| o.block = 0), "block");
    named(of(&|o| o.block = 1025), "block");
    named(good.sizes(&backend.stream, 1 << 31).unwrap_err(), "items");
    named(PermuteOptions { block: 1024, ..PermuteOptions::new(65536) }.sizes(&backend.stream, (1 << 31) - 1).unwrap_err(), "rows");

    // 1,500 tokens: enough items for a workspace.
    let (tokens, k) = (1500, 2);
    let ids = grid(i32, tokens, k);
    let maps = |change: &dyn Fn(&mut Maps)| {
        let mut maps = Maps::new(backend, &good, tokens, k, Layout::dense(k));
        change(&mut maps);
        maps.run(backend, &good, &ids).unwrap_err()
    };
    named(maps(&|m| m.offsets = grid(i32, 1, 4)), "offsets.cols");
    named(maps(&|m| m.row_map = grid(i32, 1, m.row_map.cols - 1)), "row_map.cols");
    named(maps(&|m| m.block_experts = grid(i32, 1, m.block_experts.cols + 1)), "block_experts.cols");
    named(maps(&|m| m.block_experts = grid(DType::F32, 1, m.block_experts.cols)), "block_experts.dtype");
    named(maps(&|m| m.inverse = grid(i32, tokens, k + 1)), "inverse.cols");
    if backend.cuda.is_some() {
        named(maps(&|m| m.workspace = grid(DType::U8, 1, m.workspace.cols - 1)), "workspace.cols");
        let shifted = Layout { stride: 0, shift: 1 };
        named(maps(&|m| m.workspace = Grid::poisoned(backend, DType::U8, 1, m.workspace.cols, shifted)), "workspace.data");
    }

    let (x, map) = (grid(bf16, 3, 8), grid(i32, 3, 2));
    named(gather(&backend.stream, &x.mat(), &grid(i32, 3, 0).mat(), &mut grid(bf16, 6, 8).mat_mut()).unwrap_err(), "inverse.cols");
    named(gather(&backend.stream, &x.mat(), &grid(i32, 3, 33).mat(), &mut grid(bf16, 6, 8).mat_mut()).unwrap_err(), "inverse.cols");
    named(gather(&backend.stream, &x.mat(), &grid(i32, 2, 2).mat(), &mut grid(bf16, 6, 8).mat_mut()).unwrap_err(), "inverse.rows");
    named(gather(&backend.stream, &x.mat(), &map.mat(), &mut grid(DType::F16, 6, 8).mat_mut()).unwrap_err(), "rows.dtype");
    named(gather(&backend.stream, &x.mat(), &map.mat(), &mut grid(bf16, 6, 9).mat_mut()).unwrap_err(), "rows.cols");
    let (rows, gates) = (grid(bf16, 6, 8), grid(DType::F32, 3, 2));
    named(combine(&backend.stream, &rows.mat(), &map.mat(), &gates.mat(), &mut grid(bf16, 3, 9).mat_mut()).unwrap_err(), "y.cols");
    named(combine(&backend.stream, &rows.mat(), &map.mat(), &gates.mat(), &mut grid(bf16, 4, 8).mat_mut()).unwrap_err(), "inverse.rows");
    let other = grid(DType::F32, 1, 2);
    named(combine(&backend.stream, &rows.mat(), &map.mat(), &other.mat(), &mut grid(bf16, 3, 8).mat_mut()).unwrap_err(), "gates.rows");
    let with = |residual: &Grid, y: &mut Grid| {
        let options = CombineOptions { residual: Some(residual.mat()), ..CombineOptions::default() };
        combine_with(&backend.stream, &options, &rows.mat(), &map.mat(), &gates.mat(), &mut y.mat_mut()).unwrap_err()
    };
    named(with(&grid(bf16, 2, 8), &mut grid(bf16, 3, 8)), "residual.rows");
    named(with(&grid(DType::F16, 3, 8), &mut grid(bf16, 3, 8)), "residual.dtype");
    let mut y = grid(bf16, 3, 8);
    // SAFETY: refused, and so not touched.
    let shifted = unsafe { lora_switch::Mat::raw(&backend.context, y.addr() + 2, bf16, 3, 8, 8) };
    let options = CombineOptions { residual: Some(shifted), ..CombineOptions::default() };
    named(combine_with(&backend.stream, &options, &rows.mat(), &map.mat(), &gates.mat(), &mut y.mat_mut()).unwrap_err(), "y.data");
}

on_backends!(
    maps_match_oracle,
    maps_of_many_items,
    maps_of_many_experts,
    simple_call,
    gather_moves_bytes,
    combine_matches_oracle,
    combine_is_the_same_bits,
    rows_past_32_bits,
    round_trip,
    bad_arguments_are_named
);
