//! What is right, in float64 and as plainly as it can be said, and how far a result may be from it. No code of the crate.

use crate::values::decode;
use lora_switch::{DType, GroupScore, Score};

/// Unit roundoff of f32: sums are in f32.
const U32: f64 = 1.0 / (1u64 << 24) as f64;

/// Half a unit in the last place at x: what one rounding to nearest may cost.
pub fn half_ulp(dtype: DType, x: f64) -> f64 {
    // (bits of the significand, exponent of the smallest normal number)
    let (bits, least) = match dtype {
        DType::F32 => (24, -126),
        DType::F16 => (11, -14),
        DType::Bf16 => (8, -126),
        other => panic!("{other} is no float"),
    };
    let exponent = if x == 0.0 { least } else { (x.abs().log2().floor() as i32).max(least) };
    2f64.powi(exponent - bits)
}

/// How a token is routed: the options, in float64.
#[derive(Clone, Debug)]
pub struct Routing {
    pub k: usize,
    pub score: Score,
    pub renormalize: bool,
    pub scale: f64,
    pub softcap: f64,
    pub bias: Option<Vec<f64>>,
    pub groups: usize,
    pub top_groups: usize,
    pub group_score: GroupScore,
}

impl Routing {
    /// A softmax over the chosen k.
    pub fn plain(k: usize) -> Self {
        let (score, group_score) = (Score::Softmax, GroupScore::Best);
        Self { k, score, renormalize: true, scale: 1.0, softcap: 0.0, bias: None, groups: 1, top_groups: 1, group_score }
    }
}

/// Ids and gates of a token, and how far each gate may be.
pub struct Routed {
    pub ids: Vec<i32>,
    pub gates: Vec<f64>,
    pub bounds: Vec<f64>,
    /// Whether every choice was a tie of equal inputs, or clearer than f32 can blur: else the ids may rightly be others.
    pub is_decided: bool,
}

/// `blur` is how far the logits may be from what they are here.
pub fn route(logits: &[f64], routing: &Routing, blur: f64) -> Routed {
    let r = routing;
    let n = logits.len();
    let cap = |x: f64| if r.softcap > 0.0 && x != f64::NEG_INFINITY { r.softcap * (x / r.softcap).tanh() } else { x };
    let x: Vec<f64> = logits.iter().map(|&x| cap(if x.is_nan() { f64::NEG_INFINITY } else { x.min(f64::from(f32::MAX)) })).collect();
    let blur_of_logits = blur;
    // A cap in f32: a division, a tanh of 2 ulp and a product.
    let largest = x.iter().copied().filter(|x| x.is_finite()).fold(0.0, |m: f64, x| m.max(x.abs()));
    let blur = if r.softcap > 0.0 { blur + 8.0 * U32 * largest + f64::from(f32::MIN_POSITIVE) } else { blur };
    // exp errs by 2 ulp and by the rounding of its argument; reciprocal, root and logarithm by a few ulp; a sum by a rounding a term:
    // a softmax has all experts in it, other scores only the chosen, in the end.
    let terms = if r.score == Score::Softmax { n } else { r.k };
    let relative = |spread: f64| (spread.min(110.0) * 2.0 + 16.0 + terms as f64) * 2.0 * U32 + 2.0 * blur;

    // A sigmoid's power has a rounded argument too, and counts where x < 0.
    let argument = |x: f64| if r.score == Score::Sigmoid && x > f64::NEG_INFINITY { (-x).max(0.0) } else { 0.0 };

    // What exp underflows from, and what is left of it under a root.
    let underflow = if r.score == Score::SqrtSoftplus { f64::from(f32::MIN_POSITIVE).sqrt() } else { f64::from(f32::MIN_POSITIVE) };

    let by_score = r.bias.is_some() || (r.groups > 1 && r.group_score == GroupScore::SumOfTwo);
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let all = scores(r.score, &x, top);
    let total: f64 = if r.score == Score::Softmax { all.iter().sum() } else { 1.0 };
    let (mut choices, mut errors) = (x.clone(), vec![blur; n]);
    for e in 0..if by_score { n } else { 0 } {
        let (score, bias) = (if total > 0.0 { all[e] / total } else { 0.0 }, r.bias.as_ref().map_or(0.0, |bias| bias[e]));
        choices[e] = if (score + bias).is_nan() { f64::NEG_INFINITY } else { score + bias };
        errors[e] = score * relative(if score > 0.0 { argument(x[e]).max(top - x[e]) } else { 0.0 })
            + 2.0 * U32 * choices[e].abs().min(1e30)
            + underflow;
    }

    let mut is_decided = true;
    // Equal inputs tie in f32 too, and so do logits that decide by themselves.
    let same = |a: usize, b: usize| {
        let bias = |e: usize| r.bias.as_ref().map_or(0.0, |bias| bias[e]);
        choices[a] == choices[b]
            && (errors[a] + errors[b] == 0.0 || (logits[a] == logits[b] && bias(a) == bias(b) && blur_of_logits == 0.0))
    };
    let size = n / r.groups;
    let bests: Vec<Vec<usize>> = (0..r.groups).map(|g| best_of(&choices, (g * size..(g + 1) * size).collect(), 2)).collect();
    let group = |best: &Vec<usize>| match r.group_score {
        GroupScore::SumOfTwo if best.len() > 1 => {
            let sum = choices[best[0]] + choices[best[1]];
            let error = errors[best[0]] + errors[best[1]] + 2.0 * U32 * sum.abs().min(1e30);
            (if sum.is_nan() { f64::NEG_INFINITY } else { sum }, error)
        }
        _ => (choices[best[0]], errors[best[0]]),
    };
    let groups: Vec<(f64, f64)> = bests.iter().map(group).collect();
    let order = best_of(&groups.iter().map(|g| g.0).collect::<Vec<_>>(), (0..r.groups).collect(), r.groups);
    if r.top_groups < r.groups {
        let a = order[r.top_groups - 1];
        let counts = if r.group_score == GroupScore::SumOfTwo { 2 } else { 1 };
        is_decided &= order[r.top_groups..].iter().all(|&b| {
            bests[a].iter().zip(&bests[b]).take(counts).all(|(a, b)| same(*a, *b)) || groups[a].0 - groups[b].0 > groups[a].1 + groups[b].1
        });
    }
    let eligible: Vec<usize> = (0..n).filter(|e| order[..r.top_groups].contains(&(e / size))).collect();
    let best = best_of(&choices, eligible.clone(), r.k);
    let differ = |a: usize, b: usize| same(a, b) || choices[a] - choices[b] > errors[a] + errors[b];
    is_decided &= best.windows(2).all(|pair| differ(pair[0], pair[1]));
    // Not only the next one: behind those that equal the last may come some that f32 cannot tell from it.
    is_decided &= eligible.iter().filter(|e| !best.contains(e)).all(|&e| differ(best[r.k - 1], e));

    let chosen: Vec<f64> = best.iter().map(|&e| x[e]).collect();
    let top = if r.renormalize { chosen.iter().copied().fold(f64::NEG_INFINITY, f64::max) } else { top };
    let weights = scores(r.score, &chosen, top);
    let sum = if r.renormalize { weights.iter().sum() } else { total };
    let gates: Vec<f64> = weights.iter().map(|w| if sum > 0.0 { r.scale * w / sum } else { 0.0 }).collect();
    let spread = |x: f64| if r.score == Score::Softmax && x > f64::NEG_INFINITY { top - x } else { argument(x) };
    // What underflows is lost from a weight and from the sum.
    let lost = r.scale.abs() * underflow * (1.0 + (1.0 + r.k as f64) / sum.max(1e-300)).min(1e38);
    let bounds = gates.iter().zip(&chosen).map(|(gate, &x)| gate.abs() * 2.0 * relative(spread(x)) + lost).collect();
    Routed { ids: best.iter().map(|&e| e as i32).collect(), gates, bounds, is_decided }
}

/// The largest few of some candidates, descending, ties in the order given.
fn best_of(values: &[f64], mut left: Vec<usize>, count: usize) -> Vec<usize> {
    let mut best = Vec::new();
    while best.len() < count && !left.is_empty() {
        let next = *left.iter().reduce(|a, b| if values[*b] > values[*a] { b } else { a }).unwrap();
        left.retain(|&e| e != next);
        best.push(next);
    }
    best
}

fn scores(score: Score, x: &[f64], top: f64) -> Vec<f64> {
    let score = |&x: &f64| match score {
        Score::Softmax if top == f64::NEG_INFINITY => 0.0,
        Score::Softmax => (x - top).exp(),
        Score::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Score::SqrtSoftplus => (x.max(0.0) + (-x.abs()).exp().ln_1p()).sqrt(),
    };
    x.iter().map(score).collect()
}

/// A product's element, and what an f32 sum of n terms may err by (twice a rounding each: tensor cores align and cut).
pub fn dot(x: &[f64], w: &[f64]) -> (f64, f64) {
    let products = x.iter().zip(w).map(|(x, w)| x * w);
    (products.clone().sum(), 2.0 * (x.len() + 2) as f64 * U32 * products.map(f64::abs).sum::<f64>())
}

/// A matrix of exact values.
#[derive(Clone, Debug)]
pub struct Exact {
    pub rows: usize,
    pub cols: usize,
    pub x: Vec<f64>,
}

impl Exact {
    pub fn new(dtype: DType, rows: usize, cols: usize, bits: &[u32]) -> Self {
        Self { rows, cols, x: bits.iter().map(|&b| decode(dtype, b)).collect() }
    }
    pub fn at(&self, r: usize, c: usize) -> f64 {
        self.x[r * self.cols + c]
    }
}

/// One adapter with its coefficient.
pub struct Term<'a> {
    pub a: &'a Exact,
    pub b: &'a Exact,
    pub coefficient: f64,
}

/// base + sum of c B A, and for each element what the f32 sums may err by: every addition by one rounding of at most the sum of
/// magnitudes. Tensor cores align the products of a step to the largest and cut, which costs up to twice a rounding: hence 2 u. Where terms
/// share an accumulator, each is rounded twice at every later one (the quotient of coefficients, and the product with it): at most
/// 2 (terms - 1) u of the 4 terms u that are allowed for coefficients.
pub fn merge(base: &Exact, terms: &[Term<'_>]) -> (Exact, Vec<f64>) {
    let mut out = base.clone();
    let mut bounds = vec![0.0; out.x.len()];
    let ranks: usize = terms.iter().map(|t| t.a.rows).sum();
    for r in 0..base.rows {
        for c in 0..base.cols {
            let mut magnitude = base.at(r, c).abs();
            for t in terms {
                for i in 0..t.a.rows {
                    let product = t.coefficient * t.b.at(r, i) * t.a.at(i, c);
                    out.x[r * base.cols + c] += product;
                    magnitude += product.abs();
                }
            }
            bounds[r * base.cols + c] = (ranks + 2 * terms.len() + 1) as f64 * 2.0 * U32 * magnitude;
        }
    }
    (out, bounds)
}

/// Whether a card may take the dense path for a bf16 bank, on which A x is rounded.
pub fn may_be_dense(rows: usize, slots: usize, rank_cap: usize) -> bool {
    rows > 64 && slots * rank_cap.next_multiple_of(16) <= 128
}

/// y + sum of c B (A x), and what the f32 sums may err by: an element of A x by a rounding for each addition, that of B (A x) likewise,
/// each of at most the sum of magnitudes; 2 u as in `merge`. Tensor cores may take A x in two parts: twice the additions. `in_bf16`: or as
/// one number of bf16.
pub fn apply(y: &[f64], x: &[f64], terms: &[Term<'_>], in_bf16: bool) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut magnitudes) = (y.to_vec(), y.iter().map(|y| y.abs()).collect::<Vec<_>>());
    let mut products = vec![0.0; y.len()];
    for t in terms {
        for i in 0..t.a.rows {
            let parts: Vec<f64> = (0..x.len()).map(|c| t.a.at(i, c) * x[c]).collect();
            let (sum, size) = (parts.iter().sum::<f64>(), parts.iter().map(|p| p.abs()).sum::<f64>());
            let reached = sum.abs() + x.len() as f64 * 2.0 * U32 * size;
            for o in 0..y.len() {
                out[o] += t.coefficient * t.b.at(o, i) * sum;
                magnitudes[o] += (t.coefficient * t.b.at(o, i)).abs() * size;
                products[o] += (t.coefficient * t.b.at(o, i)).abs() * reached;
            }
        }
    }
    let additions = x.len() + terms.iter().map(|t| 2 * t.a.rows + 4).sum::<usize>() + 2;
    let rounding = if in_bf16 { half_ulp(DType::Bf16, 1.0) } else { 0.0 };
    (out, magnitudes.iter().zip(products).map(|(m, p)| additions as f64 * 2.0 * U32 * m + rounding * p).collect())
}

/// A route in canonical form: (slot, gate), ascending, duplicates added in f32 in order of appearance.
pub fn canonical(ids: &[i32], gates: &[f32], slots: usize) -> Vec<(usize, f32)> {
    let mut route = Vec::new();
    for slot in 0..slots {
        let mine: Vec<f32> = ids.iter().zip(gates).filter(|(id, _)| **id == slot as i32).map(|(_, g)| *g).collect();
        if let Some((first, rest)) = mine.split_first() {
            route.push((slot, rest.iter().fold(*first, |sum, g| sum + g)));
        }
    }
    route
}

/// What a stable sort of items by expert gives.
#[derive(Debug, PartialEq)]
pub struct Maps {
    pub offsets: Vec<i32>,
    pub row_map: Vec<i32>,
    pub inverse: Vec<i32>,
    pub block_experts: Vec<i32>,
}

/// The items of the experts `local`, each expert's padded to whole blocks, within `rows` rows.
pub fn maps(ids: &[i32], local: std::ops::Range<usize>, block: usize, filler: i32, rows: usize) -> Maps {
    let mut maps = Maps { offsets: vec![0], row_map: Vec::new(), inverse: vec![-1; ids.len()], block_experts: Vec::new() };
    for e in local.clone() {
        for i in (0..ids.len()).filter(|&i| ids[i] == e as i32) {
            maps.inverse[i] = maps.row_map.len() as i32;
            maps.row_map.push(i as i32);
        }
        while !maps.row_map.len().is_multiple_of(block) {
            maps.row_map.push(filler);
        }
        maps.block_experts.resize(maps.row_map.len() / block, (e - local.start) as i32);
        maps.offsets.push(maps.row_map.len() as i32);
    }
    assert!(maps.row_map.len() <= rows);
    maps.row_map.resize(rows, filler);
    maps.block_experts.resize(rows / block, -1);
    maps
}

/// y = residual + scale * sum of gate * row, and what the roundings of f32 may cost: two a term, two for the scale and the residual.
pub fn combine(rows: &[&[f64]], gates: &[f64], scale: f64, residual: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut y = residual.to_vec();
    let mut bounds = vec![0.0; y.len()];
    for c in 0..y.len() {
        let products: Vec<f64> = rows.iter().zip(gates).map(|(row, g)| row[c] * g * scale).collect();
        let magnitude = products.iter().map(|p| p.abs()).sum::<f64>() + y[c].abs();
        y[c] += products.iter().sum::<f64>();
        bounds[c] = 2.0 * (products.len() + 1) as f64 * U32 * magnitude;
    }
    (y, bounds)
}

/// Asserts that every element is within its bound plus the final rounding; says which is worst if not.
pub fn assert_close(dtype: DType, got: &[f64], exact: &[f64], bounds: &[f64], what: &str) {
    assert_eq!(got.len(), exact.len(), "{what}");
    for (i, ((got, exact), bound)) in got.iter().zip(exact).zip(bounds).enumerate() {
        let allowed = bound + half_ulp(dtype, exact.abs() + bound);
        assert!(
            (got - exact).abs() <= allowed,
            "{what}: element {i} is {got}, exactly {exact}, off by {} of {allowed}",
            (got - exact).abs()
        );
    }
}
