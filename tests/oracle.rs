//! What is right, in float64 and as plainly as it can be said, and how far a result may be from it. No code of the crate.

use crate::values::decode;
use lora_switch::DType;

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

/// Ids and gates of a token.
pub fn route(logits: &[f64], k: usize, renormalize: bool) -> (Vec<i32>, Vec<f64>) {
    let x: Vec<f64> = logits.iter().map(|&x| if x.is_nan() { f64::NEG_INFINITY } else { x }).collect();
    let mut left: Vec<usize> = (0..x.len()).collect();
    let mut ids = Vec::new();
    for _ in 0..k {
        let best = *left.iter().reduce(|a, b| if x[*b] > x[*a] { b } else { a }).unwrap();
        left.retain(|&e| e != best);
        ids.push(best);
    }
    let m = x[ids[0]];
    let score = |e: usize| {
        if m == f64::NEG_INFINITY {
            0.0
        } else if m == f64::INFINITY {
            f64::from(x[e] == m)
        } else {
            (x[e] - m).exp()
        }
    };
    let sum: f64 = if renormalize { ids.iter().map(|&e| score(e)).sum() } else { (0..x.len()).map(score).sum() };
    let gates = ids.iter().map(|&e| if sum > 0.0 { score(e) / sum } else { 0.0 }).collect();
    (ids.iter().map(|&e| e as i32).collect(), gates)
}

/// How far a gate may be: x - m is rounded once, so exp errs by a factor of |x - m| u; expf errs by 2 ulp; the sum of n terms by n u; the
/// quotient by u. Underflow loses at most the smallest normal number.
pub fn gate_bound(gate: f64, spread: f64, n: usize) -> f64 {
    gate * (spread.min(110.0) * 2.0 + 8.0 + n as f64) * 2.0 * U32 + f64::from(f32::MIN_POSITIVE)
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
/// magnitudes. Tensor cores align the products of a step to the largest and cut, which costs up to twice a rounding: hence 2 u.
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

/// y + sum of c B (A x), and what the f32 sums may err by: an element of A x by a rounding for each addition, that of B (A x) likewise,
/// each of at most the sum of magnitudes; 2 u as in `merge`. Tensor cores may take A x in two parts: twice the additions.
pub fn apply(y: &[f64], x: &[f64], terms: &[Term<'_>]) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut magnitudes) = (y.to_vec(), y.iter().map(|y| y.abs()).collect::<Vec<_>>());
    for t in terms {
        for i in 0..t.a.rows {
            let products: Vec<f64> = (0..x.len()).map(|c| t.a.at(i, c) * x[c]).collect();
            let (sum, size) = (products.iter().sum::<f64>(), products.iter().map(|p| p.abs()).sum::<f64>());
            for o in 0..y.len() {
                out[o] += t.coefficient * t.b.at(o, i) * sum;
                magnitudes[o] += (t.coefficient * t.b.at(o, i)).abs() * size;
            }
        }
    }
    let additions = x.len() + terms.iter().map(|t| 2 * t.a.rows + 4).sum::<usize>() + 2;
    (out, magnitudes.iter().map(|m| additions as f64 * 2.0 * U32 * m).collect())
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
