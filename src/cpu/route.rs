//! The router on the CPU: one token at a time.

use super::Pool;
use crate::dtype::{Float, with_float};
use crate::route::{Choice, GroupScore, Plan, Score};
use crate::stream::Odd;
use std::cmp::Ordering;

pub(crate) fn run(pool: &Pool, plan: &Plan) {
    with_float!(plan.logits.dtype, route::<_>(pool, plan));
}

fn route<T: Float>(pool: &Pool, plan: &Plan) {
    // SAFETY: a checked matrix of host memory, borrowed by the call.
    let logits = |token| unsafe { plan.logits.row::<T>(token) };
    route_all(pool, &plan.choice, |token| logits(token).iter().map(|x| x.to_f32()).collect());
}

/// Routes every token by the logits that `logits_of` makes for it; those of padding are not asked for.
pub(super) fn route_all(pool: &Pool, choice: &Choice, logits_of: impl Fn(u64) -> Vec<f32> + Send + Sync) {
    pool.for_each(u64::from(choice.tokens), |token| {
        // SAFETY: the plan's matrices are checked host memory, borrowed by the call, outputs disjoint from all else; this iteration
        // alone touches row `token` of the outputs.
        let (ids, gates) = unsafe { (choice.ids.row_mut::<i32>(token), choice.gates.row_mut::<f32>(token)) };
        if is_padding(choice, token) {
            ids.fill(-1);
            gates.fill(0.0);
        } else if route_token(choice, logits_of(token), ids, gates) {
            pool.report(Odd::LOGITS);
        }
    });
    if let Some(counts) = choice.counts {
        // SAFETY: as above; the rows are complete.
        let counts = unsafe { counts.row_mut::<i32>(0) };
        counts.fill(0);
        for token in 0..u64::from(choice.tokens) {
            // SAFETY: as above.
            for &id in unsafe { choice.ids.row::<i32>(token) }.iter().filter(|id| **id >= 0) {
                counts[id as usize] += 1;
            }
        }
    }
}

fn is_padding(choice: &Choice, token: u64) -> bool {
    // SAFETY: checked vectors of host memory, borrowed by the call.
    let (valid, mask) = unsafe { (choice.valid.map(|valid| valid.row::<i32>(0)[0]), choice.mask.map(|mask| mask.row::<u8>(0))) };
    valid.is_some_and(|valid| token as i64 >= i64::from(valid)) || mask.is_some_and(|mask| mask[token as usize] == 0)
}

/// Whether anything was odd.
fn route_token(choice: &Choice, mut logits: Vec<f32>, ids: &mut [i32], gates: &mut [f32]) -> bool {
    let mut odd = false;
    for x in &mut logits {
        odd |= x.is_nan() || *x == f32::INFINITY;
        *x = if x.is_nan() { f32::NEG_INFINITY } else { capped(x.min(f32::MAX), choice.softcap) };
    }
    let choices = choices(choice, &logits);
    let mut order = eligible(choice, &choices);
    // A stable sort: ties stay in ascending order of id. No NaN is left, so the order is total.
    order.sort_by(|&a, &b| choices[b].partial_cmp(&choices[a]).unwrap_or(Ordering::Equal));
    order.truncate(ids.len());

    let chosen: Vec<f32> = order.iter().map(|&e| logits[e]).collect();
    let mut weights = scores(choice, &chosen);
    let sum: f32 = match (choice.renormalize, choice.score) {
        (true, _) => weights.iter().sum(),
        (false, Score::Softmax) => {
            // Relative to the largest of all, as their sum is.
            let all = scores(choice, &logits);
            weights = order.iter().map(|&e| all[e]).collect();
            all.iter().sum()
        }
        (false, _) => 1.0,
    };
    for ((&e, w), (id, gate)) in order.iter().zip(weights).zip(ids.iter_mut().zip(gates)) {
        *id = e as i32;
        *gate = choice.scale * if sum > 0.0 { w / sum } else { 0.0 };
    }
    odd || chosen.iter().all(|x| *x == f32::NEG_INFINITY)
}

/// -inf stays: it says that an expert is not to be had.
fn capped(x: f32, softcap: f32) -> f32 {
    if softcap == 0.0 || x == f32::NEG_INFINITY { x } else { softcap * (x / softcap).tanh() }
}

/// The score of each logit; of a softmax, the numerator, relative to the largest of them.
fn scores(choice: &Choice, logits: &[f32]) -> Vec<f32> {
    let top = logits.iter().copied().fold(-f32::MAX, f32::max);
    let score = |x: f32| match choice.score {
        Score::Softmax => (x - top).exp(),
        Score::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Score::SqrtSoftplus => (x.max(0.0) + (-x.abs()).exp().ln_1p()).sqrt(),
    };
    logits.iter().map(|&x| score(x)).collect()
}

/// What experts are chosen by. Never NaN.
fn choices(choice: &Choice, logits: &[f32]) -> Vec<f32> {
    if !choice.by_score() {
        return logits.to_vec();
    }
    let mut choices = scores(choice, logits);
    if choice.score == Score::Softmax {
        let sum: f32 = choices.iter().sum();
        choices.iter_mut().for_each(|x| *x = if sum > 0.0 { *x / sum } else { 0.0 });
    }
    if let Some(bias) = choice.bias {
        // SAFETY: a checked vector of host memory, borrowed by the call.
        let bias = unsafe { bias.row::<f32>(0) };
        choices.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    }
    choices.iter().map(|x| if x.is_nan() { f32::NEG_INFINITY } else { *x }).collect()
}

/// The experts of the best groups, in ascending order.
fn eligible(choice: &Choice, choices: &[f32]) -> Vec<usize> {
    let size = choices.len() / choice.groups as usize;
    let group_score = |group: &[f32]| {
        let mut sorted = group.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        match choice.group_score {
            GroupScore::Best => sorted[0],
            GroupScore::SumOfTwo => Some(sorted[0] + sorted[1]).filter(|sum| !sum.is_nan()).unwrap_or(f32::NEG_INFINITY),
        }
    };
    let group_scores: Vec<f32> = choices.chunks(size).map(group_score).collect();
    let mut groups: Vec<usize> = (0..group_scores.len()).collect();
    groups.sort_by(|&a, &b| group_scores[b].partial_cmp(&group_scores[a]).unwrap_or(Ordering::Equal));
    groups.truncate(choice.top_groups as usize);
    groups.sort_unstable();
    groups.iter().flat_map(|group| group * size..(group + 1) * size).collect()
}
