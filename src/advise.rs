//! Which way of serving adapters is the fastest for a workload, from a model of bytes and launches.

use crate::bank::TargetShape;
use crate::calibrate::Calibration;
use crate::check::{MAX_COUNT, narrow};
use crate::cuda::args::{LSW_APPLY_MANY, LSW_LINEAR_TOKENS, LSW_MAX_K, LSW_MAX_RANK};
use crate::dtype::DType;
use crate::error::{Error, Result};
use std::fmt;

/// A way of serving adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum Strategy {
    /// Merge each route into the weights ([`SwitchSet`](crate::SwitchSet)), then multiply by them.
    Switch = 0,
    /// Multiply by the base weights, then add what the adapters make of x ([`apply`](crate::apply())).
    Apply = 1,
    /// Both in one launch, for at most 8 rows ([`linear`](crate::linear())).
    Linear = 2,
}

impl Strategy {
    /// In the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Switch, Self::Apply, Self::Linear];
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Switch => "switch",
            Self::Apply => "apply",
            Self::Linear => "linear",
        })
    }
}

/// What is to be served.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// The adapted matrices, in a bank's order. Where `rank_cap` is below a slot's rank, the slot's adapter has that rank there; 0: none.
    pub targets: &'a [TargetShape],
    /// How many consecutive targets share each input, and so a call: 3, 1, 2, 1 for each layer of a Llama. Each at most 8, in sum all.
    pub groups: &'a [u64],
    /// Of W, A and B: f32, f16 or bf16.
    pub dtype: DType,
    /// The rank of each slot's adapter, at most 256: at least one slot.
    pub ranks: &'a [u64],
    /// Adapters a token, at most 32.
    pub k: u64,
    /// Tokens that are multiplied at a time, at least 1: sequences in a decode step, or tokens of a prompt.
    pub batch: u64,
    /// How many tokens, on average, a route serves before another is needed, at least 1. 1: a router decides anew for every token of every
    /// sequence. A prompt's length and more: one adapter mixture a request.
    pub tokens_per_route: f64,
}

/// What each way costs, in microseconds a token, and the cheapest; of equal ones, the first in [`Strategy`]'s order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Advice {
    /// The cheapest.
    pub best: Strategy,
    /// Switch for every route, then multiply the tokens that it serves, at most a batch at a time.
    pub switch_us: f64,
    /// Multiply the whole batch, then add the adapters.
    pub apply_us: f64,
    /// Both in one launch a group; infinite for batches above 8.
    pub linear_us: f64,
}

impl Advice {
    fn new(switch_us: f64, apply_us: f64, linear_us: f64) -> Self {
        let all = Self { best: Strategy::Switch, switch_us, apply_us, linear_us };
        let cheaper = |best: Strategy, next: Strategy| if all.us(next) < all.us(best) { next } else { best };
        Self { best: Strategy::ALL.into_iter().reduce(cheaper).expect("strategies"), ..all }
    }

    /// The prediction for one of them.
    pub fn us(&self, strategy: Strategy) -> f64 {
        match strategy {
            Strategy::Switch => self.switch_us,
            Strategy::Apply => self.apply_us,
            Strategy::Linear => self.linear_us,
        }
    }
}

/// Predicts what each strategy costs, in microseconds a token. Pure arithmetic on the host: it needs no device, and gives the same answer
/// for the same numbers everywhere.
///
/// With W the bytes of all matrices, E those of one token's k adapters (the mean over the slots), Y those of a row's inputs and twice
/// its outputs, C the number of groups, B the batch, R the tokens per route, and the figures of a [`Calibration`]:
///
/// - product(n) = max(W / (product_share * read), 2 n * weights / product_tflops): the engine's own product of n rows; or, if that is
///   less, `linear` without adapters for every 8 of them: n / min(n, 8) * (C * linear_call + W / linear_rate);
/// - switch = (launch + (2 W + E) / switch_rate) / R + product(m) / m, with m = min(B, R): merged weights serve one route at a time, so a batch
///   of more routes falls apart;
/// - apply = (product(B) + C * apply_call + D / read + B (E / rows + Y / copy)) / B, where D is what the batch's adapters come to if each
///   is read once: N (1 - (1 - k/N)^(B/R)) of N slots for B/R random routes, and rows the rate at which adapters pass for every row:
///   few_rows up to 64 rows and in f32, many_rows above;
/// - linear = (C * (linear_call + linear_adapters) + W / linear_rate + D / read + B E / few_rows) / B, up to 8 rows.
///
/// So a switch is right from R = (launch + (2 W + E) / switch_rate) / (min(apply, linear) - product(B) / B) on, where that is at least B.
///
/// # Errors
/// On sizes outside the bounds that [`Workload`] states, groups that do not add up to the targets or whose targets do not share
/// in_features, and figures that [`Calibration`] does not allow.
pub fn advise(calibration: &Calibration, workload: &Workload<'_>) -> Result<Advice> {
    calibration.check()?;
    let model = Model::new(workload)?;
    Ok(Advice::new(model.switch_us(calibration), model.apply_us(calibration), model.linear_us(calibration)))
}

/// The most rows that `linear` takes.
const MAX_LINEAR: f64 = LSW_LINEAR_TOKENS as f64;

/// A checked workload in bytes.
struct Model {
    weights: f64,
    /// W.
    w: f64,
    /// E.
    adapters: f64,
    /// Of a slot.
    slot: f64,
    slots: f64,
    k: f64,
    /// Y.
    row: f64,
    calls: f64,
    batch: f64,
    per_route: f64,
    is_many: bool,
}

/// Bytes at GB/s.
fn us(bytes: f64, gb_per_s: f64) -> f64 {
    bytes / gb_per_s / 1e3
}

impl Model {
    fn new(given: &Workload<'_>) -> Result<Self> {
        if !DType::FLOATS.contains(&given.dtype) {
            return Err(Error::argument("dtype", given.dtype, "f32 or f16 or bf16"));
        }
        if given.ranks.is_empty() {
            return Err(Error::argument("ranks", "empty", "at least one slot"));
        }
        for (i, rank) in given.ranks.iter().enumerate() {
            narrow(&format!("ranks[{i}]"), *rank, u64::from(LSW_MAX_RANK))?;
        }
        let k = f64::from(narrow("k", given.k, u64::from(LSW_MAX_K))?);
        if given.batch == 0 {
            return Err(Error::argument("batch", 0, "at least 1"));
        }
        let batch = f64::from(narrow("batch", given.batch, MAX_COUNT)?);
        if !(given.tokens_per_route >= 1.0 && given.tokens_per_route.is_finite()) {
            return Err(Error::argument("tokens_per_route", given.tokens_per_route, "finite, at least 1"));
        }
        let inputs = check_groups(given.targets, given.groups)?;
        let (mut weights, mut outputs, mut of_all_slots) = (0.0, 0.0, 0.0);
        for (i, target) in given.targets.iter().enumerate() {
            let [out, cols, cap] = target.check(i)?.map(f64::from);
            weights += out * cols;
            outputs += out;
            of_all_slots += given.ranks.iter().map(|rank| (*rank as f64).min(cap)).sum::<f64>() * (out + cols);
        }
        let (size, slots) = (given.dtype.size() as f64, given.ranks.len() as f64);
        let slot = of_all_slots / slots * size;
        Ok(Self {
            weights,
            w: weights * size,
            adapters: k * slot,
            slot,
            slots,
            k,
            row: (inputs + 2.0 * outputs) * size,
            calls: given.groups.len() as f64,
            batch,
            per_route: given.tokens_per_route,
            is_many: size == 2.0 && given.batch > u64::from(LSW_APPLY_MANY),
        })
    }

    fn product_us(&self, c: &Calibration, rows: f64) -> f64 {
        let memory = us(self.w, c.read_gb_per_s) / c.product_share;
        let engine = memory.max(2.0 * rows * self.weights / c.product_tflops / 1e6);
        engine.min(rows / rows.min(MAX_LINEAR) * (self.calls * c.linear_call_us + us(self.w, c.linear_gb_per_s)))
    }

    fn switch_us(&self, c: &Calibration) -> f64 {
        let rows = self.batch.min(self.per_route);
        let switch = c.launch_us + us(2.0 * self.w + self.adapters, c.switch_gb_per_s);
        switch / self.per_route + self.product_us(c, rows) / rows
    }

    fn apply_us(&self, c: &Calibration) -> f64 {
        let rate = if self.is_many { c.many_rows_gb_per_s } else { c.few_rows_gb_per_s };
        let rows = self.batch * (us(self.adapters, rate) + us(self.row, c.copy_gb_per_s));
        let call = self.calls * c.apply_call_us + us(self.distinct(), c.read_gb_per_s);
        (self.product_us(c, self.batch) + call + rows) / self.batch
    }

    fn linear_us(&self, c: &Calibration) -> f64 {
        if self.batch > MAX_LINEAR {
            return f64::INFINITY;
        }
        let calls = self.calls * (c.linear_call_us + c.linear_adapters_us) + us(self.w, c.linear_gb_per_s);
        let adapters = us(self.distinct(), c.read_gb_per_s) + self.batch * us(self.adapters, c.few_rows_gb_per_s);
        (calls + adapters) / self.batch
    }

    /// Bytes of the adapters that a batch of random routes names, each counted once.
    fn distinct(&self) -> f64 {
        let routes = (self.batch / self.per_route).max(1.0);
        let missed = (1.0 - self.k / self.slots).max(0.0).powf(routes);
        self.slots * (1.0 - missed) * self.slot
    }
}

/// The elements of all inputs of a row.
fn check_groups(targets: &[TargetShape], groups: &[u64]) -> Result<f64> {
    let (mut rest, mut first, mut inputs) = (targets, 0, 0.0);
    for (i, &count) in groups.iter().enumerate() {
        if !(1..=crate::apply::MAX_TARGETS as u64).contains(&count) || count > rest.len() as u64 {
            let bound = format!("1 to {}, and no more than the {} targets that are left", crate::apply::MAX_TARGETS, rest.len());
            return Err(Error::argument(format!("groups[{i}]"), count, bound));
        }
        let (group, behind) = rest.split_at(count as usize);
        if let Some((j, target)) = group.iter().enumerate().find(|(_, target)| target.in_features != group[0].in_features) {
            let bound = format!("{}, as of the group's first", group[0].in_features);
            return Err(Error::argument(format!("targets[{}].in_features", first + j), target.in_features, bound));
        }
        inputs += group[0].in_features as f64;
        (rest, first) = (behind, first + group.len());
    }
    match rest.len() {
        0 => Ok(inputs),
        left => Err(Error::argument("groups", format!("{} targets in sum", targets.len() - left), format!("all {}", targets.len()))),
    }
}
