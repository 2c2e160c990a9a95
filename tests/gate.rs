//! The gate: both backends against the oracle; the same bits for any number of tokens; errors.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, encode};
use crate::oracle::{self, Routing};
use crate::route::{Router, count, judge, routing, zeros};
use lora_switch::{DType, Error, GateWeight, RouteOptions, gate, gate_workspace_bytes, route_workspace_bytes};
use proptest::prelude::*;

/// A gate's operands, `extra` elements between rows and `shift` off a boundary.
struct Layer {
    x: Grid,
    weight: Grid,
    bias: Option<Grid>,
    workspace: Grid,
    router: Router,
    only_x_is_new: bool,
}

impl Layer {
    #[allow(clippy::too_many_arguments)]
    fn new(
        backend: &Backend,
        dtype: DType,
        (tokens, experts, hidden): (usize, usize, usize),
        router: Router,
        values: impl Fn(usize) -> Vec<u32>,
        has_bias: bool,
        extra: usize,
        shift: usize,
    ) -> Self {
        // NaNs between rows and behind them: what is not in the matrix must not count.
        let layout = Layout { stride: hidden + extra, shift };
        let grid = |rows: usize, cols, layout| Grid::with_gap(backend, dtype, rows, cols, layout, 0xff, &values(rows * cols));
        let bytes = gate_workspace_bytes(&backend.stream, tokens as u64, experts as u64, hidden as u64).unwrap();
        Self {
            x: grid(tokens, hidden, layout),
            weight: grid(experts, hidden, layout),
            bias: has_bias.then(|| grid(1, experts, Layout { stride: experts, shift })),
            workspace: zeros(backend, bytes),
            router,
            only_x_is_new: false,
        }
    }

    /// Ids, gates and counts of the first `tokens` tokens.
    fn run(&mut self, backend: &Backend, tokens: usize) -> (Vec<i32>, Vec<f64>, Vec<i32>) {
        let (k, experts) = (self.router.routing.k, self.weight.rows);
        let out = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, Layout { stride: cols + 1, shift: 1 });
        let (mut ids, mut gates, mut counts) = (out(DType::I32, tokens, k), out(DType::F32, tokens, k), out(DType::I32, 1, experts));
        self.enqueue(backend, tokens, &mut ids, &mut gates, &mut counts);
        let head = route_workspace_bytes(&backend.stream) as usize;
        assert!(self.workspace.bits()[..head].iter().all(|byte| *byte == 0), "the counters are zero again");
        (ids.i32s(), gates.values(), counts.i32s())
    }

    fn enqueue(&mut self, backend: &Backend, tokens: usize, ids: &mut Grid, gates: &mut Grid, counts: &mut Grid) {
        let (whole, rows) = (self.x.mat(), tokens as u64);
        // SAFETY: the first rows of the grid.
        let x = unsafe { lora_switch::Mat::raw(&backend.context, whole.addr(), whole.dtype(), rows, whole.cols(), whole.stride()) };
        let (weight, bias) = (self.weight.mat(), self.bias.as_ref().map(Grid::mat));
        let weight = GateWeight { weight: &weight, bias: bias.as_ref() };
        let (ids, gates, counts) = (&mut ids.mat_mut(), &mut gates.mat_mut(), &mut counts.mat_mut());
        let workspace = &mut self.workspace.mat_mut();
        self.router
            .with(|options| {
                let options = RouteOptions { only_x_is_new: self.only_x_is_new, ..*options };
                gate(&backend.stream, &options, &x, &weight, ids, gates, Some(counts), workspace)
            })
            .unwrap();
    }

    /// A token's logits, and how far sums in f32 may be from them.
    fn logits(&self, token: usize) -> (Vec<f64>, f64) {
        let hidden = self.x.cols;
        let (x, w) = (self.x.values(), self.weight.values());
        let bias = self.bias.as_ref().map(Grid::values);
        let dots = (0..self.weight.rows).map(|e| {
            let (dot, bound) = oracle::dot(&x[token * hidden..][..hidden], &w[e * hidden..][..hidden]);
            (dot + bias.as_ref().map_or(0.0, |bias| bias[e]), bound)
        });
        let (logits, bounds): (Vec<f64>, Vec<f64>) = dots.unzip();
        (logits, bounds.into_iter().fold(0.0, f64::max))
    }
}

/// The backend, with or without what only some cards have.
fn on_path(backend: &Backend, portable: bool) -> Backend {
    match portable {
        true => Backend { stream: backend.stream.clone().portable(), ..backend.clone() },
        false => backend.clone(),
    }
}

fn matches_oracle(backend: &Backend) {
    let shape =
        (prop_oneof![0usize..10, Just(64usize), Just(65), Just(100)], 1usize..300, prop_oneof![1usize..100, 500usize..600, Just(1088)]);
    proptest!(cases(40), |((tokens, experts, hidden) in shape, dtype in 0usize..3, has_bias: bool, extra in 0usize..9, shift in 0usize..3, portable: bool, seed: u64)| {
        let backend = &on_path(backend, portable);
        let mut rng = Rng(seed);
        // Sums of small integers are exact in f32: so are the logits, and the ids have to be the oracle's.
        let is_exact = rng.below(2) == 0;
        let dtype = FLOATS[dtype];
        let routing = if rng.below(2) == 0 { Routing::plain(1 + rng.below(experts.min(32))) } else { routing(&mut rng, experts) };
        let values = |n: usize| -> Vec<u32> {
            let mut rng = Rng(seed ^ n as u64);
            if !is_exact {
                return rng.bits(dtype, n, 1.0);
            }
            (0..n).map(|_| encode(dtype, (rng.below(5) as f64 - 2.0) / 4.0)).collect()
        };
        let router = Router::new(backend, &routing);
        let mut layer = Layer::new(backend, dtype, (tokens, experts, hidden), router, values, has_bias, extra, shift);
        let (ids, gates, counts) = layer.run(backend, tokens);
        let k = routing.k;
        prop_assert_eq!(counts, count(&ids, experts));
        for t in 0..tokens.min(12) {
            let (logits, bound) = layer.logits(t);
            judge(&ids[t * k..][..k], &gates[t * k..][..k], &logits, &routing, if is_exact { 0.0 } else { bound });
        }
    });
}

/// A token's bits are the same whatever the number of tokens: alone, beside others in one launch, and where two launches serve; and
/// the same with and without clusters.
fn bits_do_not_depend_on_tokens(backend: &Backend) {
    for (dtype, experts, hidden, extra) in [
        (DType::Bf16, 64, 4096, 0),
        (DType::F16, 100, 1001, 3),
        (DType::F32, 8, 2000, 0),
        (DType::Bf16, 320, 600, 0),
        (DType::Bf16, 320, 640, 0),
        (DType::F16, 20, 8300, 4),
    ] {
        let k = 4;
        let values = |n: usize| Rng(n as u64).bits(dtype, n, 1.0);
        let router = Router::new(backend, &Routing { renormalize: false, ..Routing::plain(k) });
        let mut layer = Layer::new(backend, dtype, (130, experts, hidden), router, values, true, extra, 0);
        let (ids, gates, _) = layer.run(backend, 130);
        let ways = [(false, false), (false, true), (true, false), (true, true)];
        for (tokens, (portable, only_x_is_new)) in [1, 2, 8, 9, 33, 64, 65].into_iter().flat_map(|tokens| ways.map(|way| (tokens, way))) {
            layer.only_x_is_new = only_x_is_new;
            let (some_ids, some_gates, _) = layer.run(&on_path(backend, portable), tokens);
            let name = format!("{tokens} tokens, {dtype}, portable: {portable}, only_x_is_new: {only_x_is_new}");
            assert_eq!((&some_ids[..], &some_gates[..]), (&ids[..tokens * k], &gates[..tokens * k]), "{name}");
        }
    }
}

/// Padding neither computes nor counts, and leaves the others as they are.
fn padding_is_no_token(backend: &Backend) {
    for tokens in [5, 20, 70] {
        let routing = Routing::plain(2);
        let results = [None, Some(3)].map(|valid| {
            let router = Router::padded(backend, &routing, valid, None);
            let values = |n: usize| Rng(n as u64).bits(DType::Bf16, n, 1.0);
            Layer::new(backend, DType::Bf16, (tokens, 16, 96), router, values, false, 0, 0).run(backend, tokens)
        });
        let (ids, gates, counts) = results[1].clone();
        assert_eq!((&ids[..6], &gates[..6]), (&results[0].0[..6], &results[0].1[..6]));
        assert!(ids[6..].iter().all(|id| *id == -1) && gates[6..].iter().all(|gate| *gate == 0.0));
        assert_eq!(counts, count(&ids[..6], 16));
    }
}

fn bad_arguments_are_named(backend: &Backend) {
    let grid = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, Layout::dense(cols));
    let bytes = gate_workspace_bytes(&backend.stream, 3, 8, 16).unwrap();
    let expect = |x: &Grid, w: &Grid, bias: Option<&Grid>, bytes: u64, name: &str| {
        let (mut ids, mut gates, mut workspace) = (grid(DType::I32, 3, 2), grid(DType::F32, 3, 2), zeros(backend, bytes));
        let (weight, bias) = (w.mat(), bias.map(Grid::mat));
        let weight = GateWeight { weight: &weight, bias: bias.as_ref() };
        let options = RouteOptions::default();
        let out = (&mut ids.mat_mut(), &mut gates.mat_mut());
        let error = gate(&backend.stream, &options, &x.mat(), &weight, out.0, out.1, None, &mut workspace.mat_mut()).unwrap_err();
        assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
    };
    let bf16 = DType::Bf16;
    let (x, w) = (grid(bf16, 3, 16), grid(bf16, 8, 16));
    expect(&grid(DType::I32, 3, 16), &w, None, bytes, "x.dtype");
    expect(&x, &grid(DType::F32, 8, 16), None, bytes, "weight.dtype");
    expect(&x, &grid(bf16, 8, 15), None, bytes, "weight.cols");
    expect(&x, &grid(bf16, 1025, 16), None, bytes, "weight.rows");
    expect(&x, &grid(bf16, 0, 16), None, bytes, "weight.rows");
    expect(&grid(bf16, 3, 0), &grid(bf16, 8, 0), None, bytes, "x.cols");
    expect(&grid(bf16, 4, 16), &w, None, bytes, "ids.rows");
    expect(&x, &w, Some(&grid(bf16, 1, 7)), bytes, "weight_bias.cols");
    expect(&x, &w, Some(&grid(DType::F32, 1, 8)), bytes, "weight_bias.dtype");
    if backend.cuda.is_some() {
        expect(&x, &w, None, bytes - 1, "workspace.cols");
    }
    assert!(gate_workspace_bytes(&backend.stream, 1, 0, 1).is_err() && gate_workspace_bytes(&backend.stream, 1, 1, u64::MAX).is_err());
}

on_backends!(matches_oracle, bits_do_not_depend_on_tokens, padding_is_no_token, bad_arguments_are_named);
