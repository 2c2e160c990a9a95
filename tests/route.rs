//! The router: both backends against the oracle, every option; odd rows; padding and counts; errors.

use crate::common::{Backend, FLOATS, Grid, Layout, Rng, cases, decode, encode};
use crate::oracle::{self, Routing};
use lora_switch::{DType, Error, GroupScore, Odd, RouteOptions, Score, route, route_counted, route_workspace_bytes};
use proptest::prelude::*;

/// A router's options, with memory for those that are matrices; shared with the gate's tests.
pub struct Router {
    pub routing: Routing,
    bias: Option<Grid>,
    valid: Option<Grid>,
    mask: Option<Grid>,
}

impl Router {
    pub fn new(backend: &Backend, routing: &Routing) -> Self {
        let bias = routing.bias.as_ref().map(|bias| Grid::floats(backend, &bias.iter().map(|&b| b as f32).collect::<Vec<_>>()));
        Self { routing: routing.clone(), bias, valid: None, mask: None }
    }

    /// Tokens from `valid` on, and those whose mask is 0, are padding.
    pub fn padded(backend: &Backend, routing: &Routing, valid: Option<i32>, mask: Option<&[u32]>) -> Self {
        let mask = mask.map(|mask| Grid::new(backend, DType::U8, 1, mask.len(), Layout { stride: mask.len(), shift: 1 }, mask));
        Self { valid: valid.map(|valid| Grid::ids(backend, &[valid])), mask, ..Self::new(backend, routing) }
    }

    pub fn set_valid(&mut self, valid: i32) {
        self.valid.as_mut().unwrap().set_bits(&[valid as u32]);
    }

    pub fn with<R>(&self, call: impl FnOnce(&RouteOptions<'_>) -> R) -> R {
        let mats = [&self.bias, &self.valid, &self.mask].map(|grid| grid.as_ref().map(Grid::mat));
        let r = &self.routing;
        call(&RouteOptions {
            score: r.score,
            renormalize: r.renormalize,
            scale: r.scale as f32,
            softcap: r.softcap as f32,
            bias: mats[0].as_ref(),
            groups: r.groups as u64,
            top_groups: r.top_groups as u64,
            group_score: r.group_score,
            valid: mats[1].as_ref(),
            mask: mats[2].as_ref(),
            ..RouteOptions::default()
        })
    }
}

/// Zeros, as a workspace has to be before its first call.
pub fn zeros(backend: &Backend, bytes: u64) -> Grid {
    Grid::new(backend, DType::U8, 1, bytes as usize, Layout::dense(bytes as usize), &vec![0; bytes as usize])
}

/// Whether ids and gates of a token are what the oracle says; where its choice was too close to call, only that they could be.
pub fn judge(ids: &[i32], gates: &[f64], logits: &[f64], routing: &Routing, blur: f64) {
    let want = oracle::route(logits, routing, blur);
    if want.is_decided {
        assert_eq!(ids, want.ids, "{routing:?} of {logits:?}");
        for (j, gate) in gates.iter().enumerate() {
            let off = (gate - want.gates[j]).abs();
            assert!(off <= want.bounds[j], "gate {j} is {gate}, not {}: off by {off} of {} ({routing:?})", want.gates[j], want.bounds[j]);
        }
    }
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert!(sorted.len() == ids.len() && sorted[0] >= 0 && (sorted[ids.len() - 1] as usize) < logits.len(), "{ids:?}");
    assert!(gates.iter().all(|gate| !gate.is_nan()), "{gates:?}");
}

#[derive(Debug, Clone)]
struct Case {
    dtype: DType,
    tokens: usize,
    experts: usize,
    routing: Routing,
    pads: [usize; 3],
    shift: usize,
    /// Few distinct logits make ties.
    levels: usize,
    seed: u64,
}

impl Case {
    fn plain(dtype: DType, tokens: usize, experts: usize, k: usize) -> Self {
        Self { dtype, tokens, experts, routing: Routing::plain(k), pads: [0; 3], shift: 0, levels: 0, seed: 0 }
    }
}

const SCORES: [Score; 3] = [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus];

/// Any combination of options that `experts` allow; half of them without bias or groups.
pub fn routing(rng: &mut Rng, experts: usize) -> Routing {
    let fits = |g: &usize| experts.is_multiple_of(*g) && experts / g * g.next_power_of_two() <= 1024;
    let divisors: Vec<usize> = (1..=32).filter(fits).collect();
    let bias = |rng: &mut Rng| (0..experts).map(|_| f64::from((rng.uniform() * 0.5 - 0.4) as f32)).collect();
    if [160, 192, 224, 256].contains(&experts) && rng.below(3) == 0 {
        let groups = experts / 32; // of those that a kernel of their own serves
        let top_groups = 1 + rng.below(groups);
        let grouped = Routing { score: Score::Sigmoid, bias: Some(bias(rng)), groups, top_groups, ..Routing::plain(1 + rng.below(32)) };
        return Routing { group_score: GroupScore::SumOfTwo, scale: 2.5, ..grouped };
    }
    let groups = if rng.below(2) == 0 { 1 } else { rng.pick(&divisors) };
    let top_groups = 1 + rng.below(groups);
    let sum_of_two = experts >= 2 * groups && rng.below(2) == 0;
    Routing {
        k: 1 + rng.below((experts / groups * top_groups).min(32)),
        score: rng.pick(&SCORES),
        renormalize: rng.below(2) == 0,
        scale: rng.pick(&[1.0, 2.5, -0.5]),
        softcap: rng.pick(&[0.0, 0.0, 0.0, 5.0]),
        bias: if rng.below(2) == 0 { None } else { Some(bias(rng)) },
        groups,
        top_groups,
        group_score: if sum_of_two { GroupScore::SumOfTwo } else { GroupScore::Best },
    }
}

/// Expert counts around each change of the kernel's layout (32 experts a lane's step), those of known models, and anything else.
fn case() -> impl Strategy<Value = Case> {
    let known = [1usize, 8, 31, 32, 33, 64, 65, 128, 129, 160, 224, 256, 257, 384, 512, 513, 1024];
    let experts = prop_oneof![(0..known.len()).prop_map(move |i| known[i]), 1usize..1024];
    (0usize..3, 0usize..20, experts, [0usize..4, 0usize..4, 0usize..4], 0usize..4, 2usize..2000, any::<u64>()).prop_map(
        |(dtype, tokens, experts, pads, shift, levels, seed)| {
            let mut rng = Rng(seed);
            let routing = if rng.below(3) == 0 { Routing::plain(1 + rng.below(experts.min(32))) } else { routing(&mut rng, experts) };
            Case { dtype: FLOATS[dtype], tokens, experts, routing, pads, shift, levels, seed }
        },
    )
}

/// Runs a route over given logits; returns ids and gates.
fn run(backend: &Backend, c: &Case, logits: &[u32]) -> (Vec<i32>, Vec<f64>) {
    run_with(backend, c, &Router::new(backend, &c.routing), logits)
}

fn run_with(backend: &Backend, c: &Case, router: &Router, logits: &[u32]) -> (Vec<i32>, Vec<f64>) {
    let (x, mut ids, mut gates) = grids(backend, c, logits);
    router.with(|options| route(&backend.stream, options, &x.mat(), &mut ids.mat_mut(), &mut gates.mat_mut())).unwrap();
    (ids.i32s(), gates.values())
}

/// Logits, poisoned ids and gates.
fn grids(backend: &Backend, c: &Case, logits: &[u32]) -> (Grid, Grid, Grid) {
    let layout = |cols: usize, pad: usize| Layout { stride: cols + pad, shift: c.shift };
    let out = |dtype, pad| Grid::poisoned(backend, dtype, c.tokens, c.routing.k, layout(c.routing.k, pad));
    let x = Grid::new(backend, c.dtype, c.tokens, c.experts, layout(c.experts, c.pads[0]), logits);
    (x, out(DType::I32, c.pads[1]), out(DType::F32, c.pads[2]))
}

fn judge_all(c: &Case, logits: &[u32], ids: &[i32], gates: &[f64]) {
    let k = c.routing.k;
    for t in 0..c.tokens {
        let row: Vec<f64> = logits[t * c.experts..][..c.experts].iter().map(|&b| decode(c.dtype, b)).collect();
        judge(&ids[t * k..][..k], &gates[t * k..][..k], &row, &c.routing, 0.0);
    }
}

fn matches_oracle(backend: &Backend) {
    proptest!(cases(120), |(c in case())| {
        let mut rng = Rng(c.seed);
        let logits: Vec<u32> =
            (0..c.tokens * c.experts).map(|_| encode(c.dtype, (rng.below(c.levels) as f64 / 7.0) - 20.0 * rng.below(2) as f64)).collect();
        let (ids, gates) = run(backend, &c, &logits);
        judge_all(&c, &logits, &ids, &gates);
    });
}

/// Rows at the edge of every kind of router: equal, nothing finite, one NaN, denormals, a few large values among many equal ones, as
/// many experts as are chosen, choice scores that are all negative, the least and the largest cap.
fn adversarial_rows(backend: &Backend) {
    let mut rng = Rng(5);
    for experts in [8, 32, 64, 100, 192, 256, 1024] {
        let one = |at: usize, x: f32, rest: f32| (0..experts).map(|e| if e == at { x } else { rest }).collect::<Vec<f32>>();
        let rows: Vec<Vec<f32>> = vec![
            vec![1.5; experts],
            vec![f32::NEG_INFINITY; experts],
            vec![f32::NAN; experts],
            vec![f32::INFINITY; experts],
            one(experts - 1, f32::NAN, 0.25),
            one(0, f32::INFINITY, -3.0),
            one(experts / 2, 2.0, f32::NEG_INFINITY),
            one(experts / 3, -1e30, -1e31),
            (0..experts).map(|e| f32::from_bits(e as u32)).collect(),
            (0..experts).map(|e| if e % 3 == 0 { -0.0 } else { 0.0 }).collect(),
            (0..experts).map(|e| if e % 7 == 0 { 4.0 } else { 1.0 }).collect(),
            (0..experts).map(|e| -(e as f32)).collect(),
        ];
        let bits: Vec<u32> = rows.iter().flatten().map(|x| x.to_bits()).collect();
        for round in 0..12 {
            let mut routing = routing(&mut rng, experts);
            if round % 3 == 0 {
                routing = Routing { k: experts.min(32), ..Routing::plain(1) };
            } else if round % 3 == 1 {
                routing.bias = Some((0..experts).map(|e| -2.0 - (e % 5) as f64).collect());
            } else {
                routing.softcap = f64::from(rng.pick(&[f32::MIN_POSITIVE, 5.0, 1.0 / f32::MIN_POSITIVE]));
            }
            let c = Case { routing, ..Case::plain(DType::F32, rows.len(), experts, 1) };
            let (ids, gates) = run(backend, &c, &bits);
            judge_all(&c, &bits, &ids, &gates);
        }
    }
}

/// A bias that is not finite moves the choice alone.
fn odd_biases(backend: &Backend) {
    let bias = vec![f64::NAN, f64::INFINITY, 0.0, f64::NEG_INFINITY, 1.0];
    let routing = Routing { bias: Some(bias), score: Score::Sigmoid, renormalize: false, ..Routing::plain(5) };
    let c = Case { routing, ..Case::plain(DType::F32, 1, 5, 5) };
    let (ids, gates) = run(backend, &c, &[0; 5]);
    assert_eq!(ids, [1, 4, 2, 0, 3], "infinite, finite, then NaN and -inf, which tie");
    assert!(gates.iter().all(|gate| (gate - 0.5).abs() < 1e-6), "{gates:?}");
}

/// Each row of odd values with the ids and gates that the documentation promises.
fn odd_rows_have_a_documented_effect(backend: &Backend) {
    let backend = &backend.alone();
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
        let case = Case::plain(DType::F32, 1, 5, 3);
        let bits: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
        let (ids, gates) = run(backend, &case, &bits);
        assert_eq!(ids, want_ids, "{logits:?}");
        for (gate, want) in gates.iter().zip(want_gates) {
            assert!((gate - f64::from(want)).abs() < 1e-6, "{logits:?}: {gates:?}");
        }
        assert_eq!(backend.stream.take_odd().unwrap().contains(Odd::LOGITS), odd, "{logits:?}");
    }
}

/// A token's bits are the same alone and among others, and in a second run.
fn bits_do_not_depend_on_neighbours(backend: &Backend) {
    let mut rng = Rng(7);
    for round in 0..8 {
        let experts = if round == 1 { 256 } else { rng.pick(&[100, 224, 256, 600]) };
        let routing = match round {
            0 => Routing::plain(6),
            1 => Routing::plain(8), // above so many tokens the bound lets in more than eight, and a sum in the order of lanes would show it
            _ => routing(&mut rng, experts),
        };
        let tokens = if round % 4 == 1 { 1100 } else { 37 }; // where CUDA finds its bound another way, and where it does not
        let many = Case { routing, ..Case::plain(DType::Bf16, tokens, experts, 1) };
        let k = many.routing.k;
        let logits = rng.bits(many.dtype, many.tokens * experts, 5.0);
        let (ids, gates) = run(backend, &many, &logits);
        assert_eq!(run(backend, &many, &logits), (ids.clone(), gates.clone()));
        let one = Case { tokens: 1, ..many.clone() };
        for t in (0..many.tokens).step_by(tokens / 37) {
            let alone = run(backend, &one, &logits[t * experts..][..experts]);
            assert_eq!(alone, (ids[t * k..][..k].to_vec(), gates[t * k..][..k].to_vec()));
        }
    }
}

/// What padding tokens get, whatever their logits are; the others are as without padding, and nothing odd is told of padding.
fn padding_is_no_token(backend: &Backend) {
    let backend = &backend.alone();
    let (tokens, experts, k) = (11, 70, 5);
    let c = Case::plain(DType::F32, tokens, experts, k);
    let mut logits = Rng(9).bits(DType::F32, tokens * experts, 5.0);
    let whole = run(backend, &c, &logits);
    let mask: Vec<u32> = (0..tokens).map(|t| [0, 1, 255][t % 3]).collect();
    for (valid, mask) in [(Some(4), None), (Some(0), None), (Some(-3), None), (Some(99), None), (None, Some(&mask)), (Some(7), Some(&mask))]
    {
        let is_padding = |t: usize| valid.is_some_and(|valid| t as i32 >= valid) || mask.is_some_and(|mask| mask[t] == 0);
        for t in (0..tokens).filter(|t| is_padding(*t)) {
            logits[t * experts..][..experts].fill(f32::NAN.to_bits());
        }
        let router = Router::padded(backend, &c.routing, valid, mask.map(Vec::as_slice));
        let (ids, gates) = run_with(backend, &c, &router, &logits);
        assert!(backend.stream.take_odd().unwrap().is_none());
        for t in 0..tokens {
            let row = (&ids[t * k..][..k], &gates[t * k..][..k]);
            match is_padding(t) {
                true => assert_eq!(row, (&[-1; 5][..], &[0.0; 5][..]), "token {t} of {valid:?}, {mask:?}"),
                false => assert_eq!(row, (&whole.0[t * k..][..k], &whole.1[t * k..][..k]), "token {t} of {valid:?}, {mask:?}"),
            }
        }
        logits = Rng(9).bits(DType::F32, tokens * experts, 5.0);
    }
}

/// How often each id occurs.
pub fn count(ids: &[i32], experts: usize) -> Vec<i32> {
    (0..experts as i32).map(|e| ids.iter().filter(|id| **id == e).count() as i32).collect()
}

/// One block, a few, and more than count at a time; the workspace is zero again each time, and counts of no tokens are zeros.
fn counts_are_exact(backend: &Backend) {
    let bytes = route_workspace_bytes(&backend.stream);
    let mut workspace = zeros(backend, bytes);
    for (tokens, experts, k) in [(0, 9, 2), (1, 8, 2), (3, 256, 8), (100, 64, 8), (9000, 60, 6), (700, 1024, 32)] {
        let c = Case { pads: [1, 2, 3], ..Case::plain(DType::Bf16, tokens, experts, k) };
        let logits = Rng(11).bits(DType::Bf16, tokens * experts, 3.0);
        let (x, mut ids, mut gates) = grids(backend, &c, &logits);
        let mut counts = Grid::poisoned(backend, DType::I32, 1, experts, Layout { stride: experts, shift: 1 });
        let router = Router::padded(backend, &c.routing, Some(tokens as i32 - 1), None);
        for _ in 0..2 {
            let (ids, gates) = (&mut ids.mat_mut(), &mut gates.mat_mut());
            let (counts, workspace) = (&mut counts.mat_mut(), &mut workspace.mat_mut());
            router.with(|options| route_counted(&backend.stream, options, &x.mat(), ids, gates, counts, workspace)).unwrap();
        }
        assert_eq!(counts.i32s(), count(&ids.i32s(), experts));
        assert_eq!(counts.i32s().iter().sum::<i32>() as usize, tokens.saturating_sub(1) * k);
        assert!(workspace.bits().iter().all(|byte| *byte == 0), "the workspace is zero again");
        assert_eq!((ids.i32s(), gates.values()), run_with(backend, &c, &router, &logits), "as without counts");
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

fn bad_options_are_named(backend: &Backend) {
    let grid = |dtype, rows, cols| Grid::poisoned(backend, dtype, rows, cols, Layout::dense(cols));
    let (x, mut ids, mut gates) = (grid(DType::F32, 2, 24), grid(DType::I32, 2, 4), grid(DType::F32, 2, 4));
    let before = (ids.bits(), gates.bits());
    let mut expect = |options: RouteOptions<'_>, name: &str| {
        let error = route(&backend.stream, &options, &x.mat(), &mut ids.mat_mut(), &mut gates.mat_mut()).unwrap_err();
        assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
    };
    let d = RouteOptions::default();
    expect(RouteOptions { groups: 0, ..d }, "options.groups");
    expect(RouteOptions { groups: 5, ..d }, "options.groups");
    expect(RouteOptions { groups: 33, ..d }, "options.groups");
    expect(RouteOptions { groups: u64::MAX, ..d }, "options.groups");
    expect(RouteOptions { groups: 24, group_score: GroupScore::SumOfTwo, ..d }, "options.groups");
    expect(RouteOptions { groups: 4, top_groups: 5, ..d }, "options.top_groups");
    expect(RouteOptions { groups: 4, top_groups: 0, ..d }, "options.top_groups");
    expect(RouteOptions { groups: 8, ..d }, "ids.cols");
    expect(RouteOptions { scale: f32::NAN, ..d }, "options.scale");
    expect(RouteOptions { softcap: -1.0, ..d }, "options.softcap");
    for softcap in [f32::INFINITY, f32::NAN, f32::MAX, 1e-40] {
        expect(RouteOptions { softcap, ..d }, "options.softcap");
    }
    let (short, wrong, two) = (grid(DType::F32, 1, 23), grid(DType::I32, 1, 24), grid(DType::I32, 1, 2));
    expect(RouteOptions { bias: Some(&short.mat()), ..d }, "options.bias.cols");
    expect(RouteOptions { bias: Some(&wrong.mat()), ..d }, "options.bias.dtype");
    expect(RouteOptions { valid: Some(&two.mat()), ..d }, "options.valid.cols");
    expect(RouteOptions { valid: Some(&short.mat()), ..d }, "options.valid.dtype");
    expect(RouteOptions { mask: Some(&two.mat()), ..d }, "options.mask.dtype");
    assert_eq!(before, (ids.bits(), gates.bits()), "outputs are untouched");
    // Only large rows limit groups that are no power of two.
    let (wide, mut ids, mut gates) = (grid(DType::F32, 1, 999), grid(DType::I32, 1, 1), grid(DType::F32, 1, 1));
    let options = RouteOptions { groups: 27, ..d };
    let error = route(&backend.stream, &options, &wide.mat(), &mut ids.mat_mut(), &mut gates.mat_mut()).unwrap_err();
    assert!(error.to_string().contains("a power of two"), "{error}");

    let (mut counts, mut few) = (grid(DType::I32, 1, 999), grid(DType::I32, 1, 998));
    let bytes = route_workspace_bytes(&backend.stream);
    let (mut workspace, mut small) = (zeros(backend, bytes), zeros(backend, bytes.saturating_sub(1)));
    let mut counted = |counts: &mut Grid, workspace: &mut Grid, name: &str| {
        let (ids, gates) = (&mut ids.mat_mut(), &mut gates.mat_mut());
        let error =
            route_counted(&backend.stream, &d, &wide.mat(), ids, gates, &mut counts.mat_mut(), &mut workspace.mat_mut()).unwrap_err();
        assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
    };
    counted(&mut few, &mut workspace, "counts.cols");
    if backend.cuda.is_some() {
        counted(&mut counts, &mut small, "workspace.cols");
    }
}

on_backends!(
    matches_oracle,
    adversarial_rows,
    odd_biases,
    odd_rows_have_a_documented_effect,
    bits_do_not_depend_on_neighbours,
    padding_is_no_token,
    counts_are_exact,
    bad_arguments_are_named,
    bad_options_are_named,
);
