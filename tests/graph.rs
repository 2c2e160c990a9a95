//! CUDA graphs: one capture of route -> switch serves every token, and survives refills.

use crate::apply::{Batch, CALLS, Call, workspace_bytes};
use crate::common::{Backend, Grid, Layout, Rng};
use crate::linear;
use crate::oracle;
use crate::route::{Router, count, zeros};
use crate::switch::{Model, Spec};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use lora_switch::{
    DType, Form, GateWeight, LinearOptions, PermuteMaps, PermuteOptions, RouteOptions, combine, gate, gate_workspace_bytes, gather,
    permute_with, route, route_counted,
};

fn capture(backend: &Backend, work: impl FnOnce()) -> CudaGraph {
    let stream = backend.cuda.as_ref().unwrap();
    stream.synchronize().unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    work();
    stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured")
}

/// 1,000 tokens through one graph, with refills in between: every tenth result is compared, bit for bit, with a plain call of a second
/// set over the same base; the first and the last also with the oracle.
#[test]
fn route_and_switch_replay() {
    let Some(backend) = Backend::cuda() else { return };
    let spec = Spec {
        dtype: DType::Bf16,
        form: Form::FromBase,
        slots: 8,
        k_max: 2,
        shapes: vec![(96, 160), (33, 65), (64, 128)],
        aligned: true,
        max_rank: 32,
        seed: 21,
    };
    let (mut model, mut plain) = (Model::new(&backend, &spec), Model::new(&backend, &spec));
    let mut logits = Grid::floats(&backend, &[0.0; 8]);
    let mut ids = Grid::poisoned(&backend, DType::I32, 1, 2, Layout::dense(2));
    let mut gates = Grid::poisoned(&backend, DType::F32, 1, 2, Layout::dense(2));
    backend.context.warm(&backend.stream).unwrap();
    let graph = capture(&backend, || {
        route(&backend.stream, &RouteOptions::default(), &logits.mat(), &mut ids.mat_mut(), &mut gates.mat_mut()).unwrap();
        model.set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap();
    });
    let mut rng = Rng(4);
    for token in 0..1000 {
        logits.set_bits(&rng.bits(DType::F32, 8, 3.0));
        if token % 97 == 50 {
            let slot = rng.below(8);
            model.refill(slot);
            plain.refill(slot);
        }
        graph.launch().unwrap();
        if token % 10 == 0 || token == 999 {
            let chosen = ids.i32s();
            let weights: Vec<f32> = gates.bits().into_iter().map(f32::from_bits).collect();
            plain.to(&chosen, &weights);
            assert_eq!(model.all_bits(), plain.all_bits(), "token {token}");
            if token == 0 || token == 999 {
                model.assert_holds(&chosen, &weights, "replayed");
            }
        }
    }
}

/// In place, replayed: routes out and back leave the base within the rounding of the switches.
#[test]
fn in_place_replays() {
    let Some(backend) = Backend::cuda() else { return };
    let spec =
        Spec { dtype: DType::F32, form: Form::InPlace, slots: 4, k_max: 2, shapes: vec![(70, 140)], aligned: false, max_rank: 8, seed: 22 };
    let mut model = Model::new(&backend, &spec);
    let mut ids = Grid::ids(&backend, &[0, 1]);
    let mut gates = Grid::floats(&backend, &[0.5, 0.5]);
    let graph = capture(&backend, || model.set.to(&backend.stream, &ids.mat(), &gates.mat()).unwrap());
    let mut rng = Rng(6);
    for _ in 0..50 {
        ids.set_bits(&[rng.below(4) as u32, rng.below(4) as u32]);
        gates.set_bits(&rng.bits(DType::F32, 2, 1.0));
        graph.launch().unwrap();
    }
    ids.set_bits(&[u32::MAX, u32::MAX]);
    graph.launch().unwrap();
    let (got, base) = (model.weights[0].values(), model.bases[0].values());
    // Each of 51 switches: one rounding of a sum of at most 32 terms below 2 in magnitude.
    let bound = 51.0 * (2.0 * 32.0 + 4.0) * 2.0 * 2f64.powi(-24) * 64.0;
    assert!(got.iter().zip(&base).all(|(g, b)| (g - b).abs() < bound));
}

/// Eight slots of two targets that share their input.
fn two_targets(backend: &Backend, shapes: Vec<(usize, usize)>, max_rank: usize, seed: u64) -> Model {
    let (dtype, form) = (DType::Bf16, Form::FromBase);
    Model::new(backend, &Spec { dtype, form, slots: 8, k_max: 2, shapes, aligned: true, max_rank, seed })
}

/// Of many rows, small ranks take another path than others.
const RANKS: [usize; 2] = [16, 32];

/// Random slots, and one in nine that there is not.
fn set_routes(ids: &mut Grid, rng: &mut Rng) {
    let count = ids.rows * ids.cols;
    ids.set_bits(&(0..count).map(|_| rng.below(9) as u32).collect::<Vec<_>>());
}

/// A captured apply, under other routes and every other time with a refilled slot, in packs or not.
fn replay(graph: &CudaGraph, model: &mut Model, batch: &mut Batch, call: Call, rng: &mut Rng) {
    for step in 0..6 {
        if step % 2 == 1 {
            model.spec.aligned = step % 4 == 1;
            model.refill(rng.below(8));
        }
        set_routes(&mut batch.ids, rng);
        let before = batch.before(call);
        graph.launch().unwrap();
        batch.assert_added_to(model, &before, "replayed");
    }
}

/// One capture serves other routes and refilled slots.
#[test]
fn apply_replays() {
    let Some(backend) = Backend::cuda() else { return };
    let mut rng = Rng(24);
    for ((rows, call), max_rank) in
        [1, 3, 100].into_iter().flat_map(|rows| CALLS.map(|call| (rows, call))).flat_map(|kind| RANKS.map(|rank| (kind, rank)))
    {
        let mut model = two_targets(&backend, vec![(96, 160), (33, 160)], max_rank, 23);
        let mut batch = Batch::random(&model, &mut rng, rows, 2, DType::Bf16, Layout::dense);
        let bytes = workspace_bytes(&model, rows, 2);
        let mut workspace = Grid::poisoned(&backend, DType::U8, 1, bytes, Layout::dense(bytes));
        let graph = capture(&backend, || batch.run_in(&model, call, &mut workspace).unwrap());
        replay(&graph, &mut model, &mut batch, call, &mut rng);
    }
}

/// One capture of the first half on a branch of its own serves other routes and refilled slots.
#[test]
fn apply_beside_replays() {
    let Some(backend) = Backend::cuda() else { return };
    let mut rng = Rng(28);
    let main = backend.cuda.clone().unwrap();
    let side = main.context().new_stream().unwrap();
    let beside = backend.context.cuda_stream(&side).unwrap();
    for (rows, max_rank) in [1, 3, 40, 100].into_iter().flat_map(|rows| RANKS.map(|rank| (rows, rank))) {
        // Whole packs of y: of many rows, another kernel.
        let mut model = two_targets(&backend, vec![(96, 160), (40, 160)], max_rank, 27);
        let mut batch = Batch::random(&model, &mut rng, rows, 2, DType::Bf16, Layout::dense);
        let bytes = workspace_bytes(&model, rows, 2);
        let mut workspace = Grid::poisoned(&backend, DType::U8, 1, bytes, Layout::dense(bytes));
        backend.context.warm(&backend.stream).unwrap();
        let graph = capture(&backend, || {
            side.join(&main).unwrap();
            batch.run_halves(&model, &beside, &mut workspace, || main.join(&side).unwrap()).unwrap();
        });
        replay(&graph, &mut model, &mut batch, Call::Halves, &mut rng);
    }
}

/// One capture of several launches in a row, each reading what the one before wrote, serves other routes and refilled slots; and its
/// counters are ready again each time.
#[test]
fn linear_replays() {
    let Some(backend) = Backend::cuda() else { return };
    let mut model = two_targets(&backend, vec![(96, 160), (160, 160)], 32, 25);
    let mut rng = Rng(26);
    for rows in [1, 3, 8] {
        let mut batch = Batch::random(&model, &mut rng, rows, 2, DType::Bf16, Layout::dense);
        let mut again = Batch::random(&model, &mut rng, rows, 2, DType::Bf16, Layout::dense);
        let mut workspace = linear::workspace(&model, rows, 2);
        let graph = capture(&backend, || {
            let options = LinearOptions { only_x_is_new: true, alone: false };
            linear::run_in(&mut batch, &model, LinearOptions::default(), &mut workspace).unwrap();
            std::mem::swap(&mut again.x, &mut batch.y[1]); // 160 wide, as the input is
            linear::run_in(&mut again, &model, options, &mut workspace).unwrap();
            std::mem::swap(&mut again.x, &mut batch.y[1]);
        });
        for step in 0..6 {
            if step % 2 == 1 {
                model.refill(rng.below(8));
            }
            for ids in [&mut batch.ids, &mut again.ids] {
                set_routes(ids, &mut rng);
            }
            graph.launch().unwrap();
            linear::assert_is_product(&batch, &model, "replayed");
            std::mem::swap(&mut again.x, &mut batch.y[1]);
            linear::assert_is_product(&again, &model, "replayed, of a product");
            std::mem::swap(&mut again.x, &mut batch.y[1]);
        }
    }
}

/// Maps, gather and combine are captured once and serve other ids at each replay, all tokens or fewer (the ids of padding tokens are -1),
/// in one launch, in two and in two passes.
#[test]
fn permute_replays() {
    let Some(backend) = Backend::cuda() else { return };
    for (tokens, k, experts) in [(100usize, 2usize, 8usize), (700, 8, 64), (100, 2, 2000)] {
        let cols = 64;
        let options = PermuteOptions { block: 4, ..PermuteOptions::new(experts as u64) };
        let sizes = options.sizes(&backend.stream, (tokens * k) as u64).unwrap();
        let mut rng = Rng(8);
        let out = |dtype, n: u64| Grid::poisoned(&backend, dtype, 1, n as usize, Layout::dense(n as usize));
        let (mut offsets, mut row_map) = (out(DType::I32, experts as u64 + 1), out(DType::I32, sizes.rows));
        let (mut block_experts, mut workspace) = (out(DType::I32, sizes.blocks), out(DType::U8, sizes.workspace_bytes));
        let (mut ids, mut inverse) = ([(); 2].map(|()| Grid::poisoned(&backend, DType::I32, tokens, k, Layout::dense(k)))).into();
        let x = Grid::new(&backend, DType::Bf16, tokens, cols, Layout::dense(cols), &rng.bits(DType::Bf16, tokens * cols, 1.0));
        let mut rows = Grid::poisoned(&backend, DType::Bf16, sizes.rows as usize, cols, Layout::dense(cols));
        let gates = Grid::new(&backend, DType::F32, tokens, k, Layout::dense(k), &vec![(1.0 / k as f32).to_bits(); tokens * k]);
        let mut y = Grid::poisoned(&backend, DType::Bf16, tokens, cols, Layout::dense(cols));
        backend.context.warm(&backend.stream).unwrap();
        let graph = capture(&backend, || {
            let stream = &backend.stream;
            {
                let (mut offsets, mut row_map) = (offsets.mat_mut(), row_map.mat_mut());
                let (mut inverse, mut blocks) = (inverse.mat_mut(), block_experts.mat_mut());
                let (offsets, row_map, inverse) = (&mut offsets, &mut row_map, &mut inverse);
                let maps = PermuteMaps { offsets, row_map, inverse, block_experts: Some(&mut blocks) };
                permute_with(stream, &options, &ids.mat(), maps, &mut workspace.mat_mut()).unwrap();
            }
            gather(stream, &x.mat(), &inverse.mat(), &mut rows.mat_mut()).unwrap();
            combine(stream, &rows.mat(), &inverse.mat(), &gates.mat(), &mut y.mat_mut()).unwrap();
        });
        for valid in [tokens, tokens / 3, 0, tokens - 1] {
            let random = (0..tokens * k).map(|i| if i < valid * k { rng.below(experts) as u32 } else { u32::MAX });
            ids.set_bits(&random.collect::<Vec<_>>());
            graph.launch().unwrap();
            let want = oracle::maps(&ids.i32s(), 0..experts, 4, -1, sizes.rows as usize);
            assert_eq!((offsets.i32s(), row_map.i32s()), (want.offsets, want.row_map));
            assert_eq!((inverse.i32s(), block_experts.i32s()), (want.inverse, want.block_experts));
            // k equal rows with gates of 1 / k (a power of two) are the token; a padding token gets zeros.
            let (got, x) = (y.values(), x.values());
            assert!(got.iter().zip(&x).enumerate().all(|(i, (y, x))| *y == if i < valid * cols { *x } else { 0.0 }), "{valid} tokens");
        }
    }
}

/// A graph captured for 40 tokens serves any smaller number, and its counters are ready again each time: the router, and the gate in
/// one launch and in two, replayed with other valid counts.
#[test]
fn valid_counts_change_between_replays() {
    let Some(backend) = Backend::cuda() else { return };
    let (experts, hidden, k) = (24, 192, 3);
    for tokens in [40, 80] {
        let mut rng = Rng(12);
        let random = |rows: usize, cols: usize, rng: &mut Rng| {
            Grid::new(&backend, DType::Bf16, rows, cols, Layout::dense(cols), &rng.bits(DType::Bf16, rows * cols, 1.0))
        };
        let (logits, x) = (random(tokens, experts, &mut rng), random(tokens, hidden, &mut rng));
        let weight = random(experts, hidden, &mut rng);
        let out = || {
            let grid = |dtype, rows, cols| Grid::poisoned(&backend, dtype, rows, cols, Layout::dense(cols));
            (grid(DType::I32, tokens, k), grid(DType::F32, tokens, k), grid(DType::I32, 1, experts))
        };
        let (mut routed, mut gated) = (out(), out());
        let bytes = gate_workspace_bytes(&backend.stream, tokens as u64, experts as u64, hidden as u64).unwrap();
        let mut workspace = zeros(&backend, bytes);
        let mut router = Router::padded(&backend, &oracle::Routing::plain(k), Some(tokens as i32), None);
        backend.context.warm(&backend.stream).unwrap();
        let graph = capture(&backend, || {
            let (weight, workspace) = (weight.mat(), &mut workspace.mat_mut());
            let weight = GateWeight { weight: &weight, bias: None };
            router.with(|options| {
                let (ids, gates, counts) = (&mut routed.0.mat_mut(), &mut routed.1.mat_mut(), &mut routed.2.mat_mut());
                route_counted(&backend.stream, options, &logits.mat(), ids, gates, counts, workspace).unwrap();
                let (ids, gates, counts) = (&mut gated.0.mat_mut(), &mut gated.1.mat_mut(), &mut gated.2.mat_mut());
                gate(&backend.stream, options, &x.mat(), &weight, ids, gates, Some(counts), workspace).unwrap();
            });
        });
        graph.launch().unwrap();
        let whole = [&routed, &gated].map(|out| (out.0.i32s(), out.1.bits()));
        for valid in [1, 0, tokens - 1, 7, tokens + 5] {
            router.set_valid(valid as i32);
            graph.launch().unwrap();
            let valid = valid.min(tokens);
            for ((ids, gates, counts), whole) in [&routed, &gated].into_iter().zip(&whole) {
                let (ids, gates) = (ids.i32s(), gates.bits());
                assert_eq!((&ids[..valid * k], &gates[..valid * k]), (&whole.0[..valid * k], &whole.1[..valid * k]));
                assert!(ids[valid * k..].iter().all(|id| *id == -1) && gates[valid * k..].iter().all(|gate| *gate == 0));
                assert_eq!(counts.i32s(), count(&ids, experts));
            }
        }
    }
}
