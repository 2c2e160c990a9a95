//! Advice, and what it reckons with.

use super::bank::{lsw_target_shape, shape};
use super::context::{lsw_context, on};
use super::{Options, SizedOut, check_pointer, dtype, guard, lsw_status, named_options, slice};
use crate::advise::{Advice, Strategy, Workload, advise};
use crate::bank::TargetShape;
use crate::calibrate::Calibration;
use std::ffi::c_void;

/// Merge each route into the weights (lsw_switch_to), then multiply by them.
pub const LSW_STRATEGY_SWITCH: i32 = 0;
/// Multiply by the base weights, then add what the adapters make of x (lsw_apply).
pub const LSW_STRATEGY_APPLY: i32 = 1;
/// Both in one launch, for at most 8 rows (lsw_linear).
pub const LSW_STRATEGY_LINEAR: i32 = 2;

const _: () = assert!(
    LSW_STRATEGY_SWITCH == Strategy::Switch as i32
        && LSW_STRATEGY_APPLY == Strategy::Apply as i32
        && LSW_STRATEGY_LINEAR == Strategy::Linear as i32
);

/// What a machine does, and the engine's product on it: measured by lsw_calibrate, or written by
/// hand. All are positive and finite, but that times may be 0 and product_tflops infinite. GB are
/// 10^9 bytes. NULL, or what a smaller struct_size leaves out: those of an NVIDIA H200.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_calibration {
    /// sizeof(lsw_calibration).
    pub struct_size: u64,
    /// Memory is read at this rate.
    pub read_gb_per_s: f64,
    /// Memory is read and written at this rate, both counted.
    pub copy_gb_per_s: f64,
    /// A launch that does next to nothing, as a node of a graph.
    pub launch_us: f64,
    /// A switch from base passes over W and W_base at this rate, both and the adapters counted.
    pub switch_gb_per_s: f64,
    /// A call of lsw_apply, bytes aside.
    pub apply_call_us: f64,
    /// lsw_apply to up to 64 rows, and in LSW_F32: the bytes of a row's adapters pass at this rate,
    /// for each row.
    pub few_rows_gb_per_s: f64,
    /// The same above 64 rows in 16 bits. Measured of a bank that takes the dense path, where the card
    /// has one: other banks cost more, and the more the higher their ranks.
    pub many_rows_gb_per_s: f64,
    /// A call of lsw_linear without adapters, bytes aside.
    pub linear_call_us: f64,
    /// What adapters add to that, bytes aside.
    pub linear_adapters_us: f64,
    /// lsw_linear streams weights at this rate.
    pub linear_gb_per_s: f64,
    /// The part of read_gb_per_s that the engine's base product reaches with few rows.
    pub product_share: f64,
    /// 10^12 operations a second of the engine's base product with many rows; an addition and a
    /// multiplication are two.
    pub product_tflops: f64,
}

impl lsw_calibration {
    const fn new(c: &Calibration) -> Self {
        Self {
            struct_size: size_of::<Self>() as u64,
            read_gb_per_s: c.read_gb_per_s,
            copy_gb_per_s: c.copy_gb_per_s,
            launch_us: c.launch_us,
            switch_gb_per_s: c.switch_gb_per_s,
            apply_call_us: c.apply_call_us,
            few_rows_gb_per_s: c.few_rows_gb_per_s,
            many_rows_gb_per_s: c.many_rows_gb_per_s,
            linear_call_us: c.linear_call_us,
            linear_adapters_us: c.linear_adapters_us,
            linear_gb_per_s: c.linear_gb_per_s,
            product_share: c.product_share,
            product_tflops: c.product_tflops,
        }
    }

    fn get(&self) -> Calibration {
        Calibration {
            read_gb_per_s: self.read_gb_per_s,
            copy_gb_per_s: self.copy_gb_per_s,
            launch_us: self.launch_us,
            switch_gb_per_s: self.switch_gb_per_s,
            apply_call_us: self.apply_call_us,
            few_rows_gb_per_s: self.few_rows_gb_per_s,
            many_rows_gb_per_s: self.many_rows_gb_per_s,
            linear_call_us: self.linear_call_us,
            linear_adapters_us: self.linear_adapters_us,
            linear_gb_per_s: self.linear_gb_per_s,
            product_share: self.product_share,
            product_tflops: self.product_tflops,
        }
    }
}

impl Options for lsw_calibration {
    const DEFAULT: Self = Self::new(&Calibration::H200);
}

/// What is to be served. What a smaller struct_size leaves out is 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_workload {
    /// sizeof(lsw_workload).
    pub struct_size: u64,
    /// The adapted matrices, in a bank's order. Where rank_cap is below a slot's rank, the slot's
    /// adapter has that rank there; 0: none.
    pub targets: *const lsw_target_shape,
    /// Their number.
    pub count: u64,
    /// How many consecutive targets share each input, and so a call: 3, 1, 2, 1 for each layer of a
    /// Llama. Each at most 8, in sum count.
    pub groups: *const u64,
    /// Their number.
    pub group_count: u64,
    /// The rank of each slot's adapter: 0 to 256.
    pub ranks: *const u64,
    /// Their number, at least 1.
    pub slots: u64,
    /// Of W, A and B: LSW_F32, LSW_F16 or LSW_BF16.
    pub dtype: i32,
    /// 0.
    pub reserved: i32,
    /// Adapters a token: 0 to 32.
    pub k: u64,
    /// Tokens that are multiplied at a time, at least 1: sequences in a decode step, or tokens of a
    /// prompt.
    pub batch: u64,
    /// How many tokens, on average, a route serves before another is needed, at least 1. 1: a router
    /// decides anew for every token of every sequence.
    pub tokens_per_route: f64,
}

impl Options for lsw_workload {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>() as u64,
        targets: std::ptr::null(),
        count: 0,
        groups: std::ptr::null(),
        group_count: 0,
        ranks: std::ptr::null(),
        slots: 0,
        dtype: super::LSW_F32,
        reserved: 0,
        k: 0,
        batch: 0,
        tokens_per_route: 0.0,
    };
}

/// What each strategy costs, in microseconds a token. struct_size is set by the caller; fields that
/// it leaves out are not written.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_advice {
    /// sizeof(lsw_advice), set before the call.
    pub struct_size: u64,
    /// The cheapest: LSW_STRATEGY_... Of equal ones, the lowest number.
    pub best: i32,
    /// 0.
    pub reserved: i32,
    /// Switch for every route, then multiply the tokens that it serves, at most a batch at a time.
    pub switch_us: f64,
    /// Multiply the whole batch, then add the adapters.
    pub apply_us: f64,
    /// Both in one launch a group; infinite for batches above 8.
    pub linear_us: f64,
}

impl Options for lsw_advice {
    const DEFAULT: Self =
        Self { struct_size: size_of::<Self>() as u64, best: 0, reserved: 0, switch_us: 0.0, apply_us: 0.0, linear_us: 0.0 };
}

impl lsw_advice {
    fn new(advice: &Advice) -> Self {
        let Advice { best, switch_us, apply_us, linear_us } = *advice;
        Self { best: best as i32, switch_us, apply_us, linear_us, ..Self::DEFAULT }
    }
}

/// Measures all of calibration but its last two fields on the stream's device, in LSW_BF16: reading
/// and copying a large vector, an empty launch, a switch of large matrices, lsw_apply to one row and
/// to more, and lsw_linear at matrices of two sizes; with 8 adapters of rank 16 at matrices of 4096
/// columns (512 on the CPU). calibration->struct_size is set by the caller; what it leaves out is
/// not written.
///
/// The base product is the engine's, so its two figures are not measured: on CUDA they are set to
/// what cuBLAS reaches on an H200 (0.79 of Llama-2-7B's, q k v and gate up fused, and 750 in 16
/// bits), on the CPU to 1 and 0.1. An engine that knows better overwrites them.
///
/// To be called once, cold, while nothing else runs: it allocates 1 GiB (64 MiB on the CPU) and
/// frees it, and takes about 0.1 s. On CUDA it works on a stream of its own, synchronises, and cannot
/// be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_calibrate(context: *const lsw_context, stream: *mut c_void, calibration: *mut lsw_calibration) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (_, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let out = unsafe { SizedOut::new(calibration, "calibration") }?;
        out.set(lsw_calibration::new(&Calibration::measure(&stream)?));
        Ok(())
    })
}

/// Predicts what each strategy costs, in microseconds a token. Pure arithmetic on the host, which
/// needs no device.
///
/// With W the bytes of all matrices, E those of one token's k adapters (the mean over the slots), Y
/// those of a row's inputs and twice its outputs, C the number of groups, B the batch, R the tokens
/// per route, and the figures of the calibration:
///
/// - product(n) = max(W / (product_share * read), 2 n * weights / product_tflops): the engine's own
///   product of n rows; or, if that is less, lsw_linear without adapters for every 8 of them:
///   n / min(n, 8) * (C * linear_call + W / linear_rate);
/// - switch = (launch + (2 W + E) / switch_rate) / R + product(m) / m, with m = min(B, R): merged weights
///   serve one route at a time, so a batch of more routes falls apart;
/// - apply = (product(B) + C * apply_call + D / read + B (E / rows + Y / copy)) / B, where D is what
///   the batch's adapters come to if each is read once: N (1 - (1 - k/N)^(B/R)) of N slots for B/R
///   random routes, and rows is few_rows up to 64 rows and in LSW_F32, many_rows above;
/// - linear = (C * (linear_call + linear_adapters) + W / linear_rate + D / read + B E / few_rows)
///   / B, up to 8 rows.
///
/// So a switch is right from R = (launch + (2 W + E) / switch_rate) / (min(apply, linear) -
/// product(B) / B) on, where that is at least B.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_advise(
    calibration: *const lsw_calibration,
    workload: *const lsw_workload,
    advice: *mut lsw_advice,
) -> lsw_status {
    guard(|| {
        check_pointer(workload, "workload")?;
        // SAFETY: the conventions.
        let (c, given) = unsafe { (named_options(calibration, "calibration")?, named_options(workload, "workload")?) };
        // SAFETY: the conventions.
        let out = unsafe { SizedOut::new(advice, "advice") }?;
        // SAFETY: the conventions.
        let (targets, groups, ranks) = unsafe {
            (
                slice(given.targets, given.count, "targets")?,
                slice(given.groups, given.group_count, "groups")?,
                slice(given.ranks, given.slots, "ranks")?,
            )
        };
        let targets: Vec<TargetShape> = targets.iter().map(shape).collect();
        let dtype = dtype(given.dtype, given.reserved).map_err(|e| e.within("workload"))?;
        let (k, batch, tokens_per_route) = (given.k, given.batch, given.tokens_per_route);
        let workload = Workload { targets: &targets, groups, dtype, ranks, k, batch, tokens_per_route };
        out.set(lsw_advice::new(&advise(&c.get(), &workload)?));
        Ok(())
    })
}
