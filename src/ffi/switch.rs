//! The switch set.

use super::bank::{lsw_bank, tensor};
use super::context::{lsw_context, on};
use super::{Options, Out, destroy, dtype, guard, handle, handle_mut, lsw_mat, lsw_mat_mut, lsw_status, options, slice, state_memory};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Context, Stream};
use crate::switch::{Form, SwitchKernels, SwitchOptions, SwitchSet, Target};
use crate::view::{Mat, MatMut, Weight};
use std::ffi::c_void;
use std::ops::Range;

/// W = W_base + the sum of the route, with W_base in a second buffer. The result depends on the
/// current route alone, bit for bit, after any number of switches; the route of nothing copies
/// W_base's bits. Half the arithmetic of the other form, same traffic.
pub const LSW_FROM_BASE: i32 = 0;
/// W += new route - old route (LoRA-Switch, arXiv 2405.17741, equation 6). No second buffer; each
/// switch rounds W once, so errors build up.
pub const LSW_IN_PLACE: i32 = 1;

const _: () = assert!(LSW_FROM_BASE == Form::FromBase as i32 && LSW_IN_PLACE == Form::InPlace as i32);

/// The fastest kernel that there is for a set; chosen once, by its shapes and the bank's rank_caps and
/// by the card: the same weight may have other bits in another set.
pub const LSW_KERNELS_BEST: i32 = 0;
/// The kernel for any card, even where there is a faster one.
pub const LSW_KERNELS_PORTABLE: i32 = 1;
/// The kernel for large sets, even if the set is small.
pub const LSW_KERNELS_LARGE: i32 = 2;

const _: () = assert!(LSW_KERNELS_PORTABLE == SwitchKernels::Portable as i32 && LSW_KERNELS_LARGE == SwitchKernels::Large as i32);

/// What a set is made with. NULL, or what a smaller struct_size leaves out: LSW_FROM_BASE, 8, and
/// memory of its own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_switch_options {
    /// sizeof(lsw_switch_options).
    pub struct_size: u64,
    /// LSW_FROM_BASE or LSW_IN_PLACE.
    pub form: i32,
    /// LSW_KERNELS_BEST or, for tests and comparisons, another. Their sums are grouped differently,
    /// so that bits may differ within the same bound.
    pub kernels: i32,
    /// The widest route that the set can be brought to: 1 to 32.
    pub k_max: u64,
    /// Device memory for the tables, aligned to 128 bytes, for as long as the set lives; NULL to
    /// have it allocated.
    pub memory: *mut c_void,
    /// Its size, at least lsw_switch_memory_bytes.
    pub memory_bytes: u64,
}

impl Options for lsw_switch_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>() as u64,
        form: LSW_FROM_BASE,
        kernels: LSW_KERNELS_BEST,
        k_max: 8,
        memory: std::ptr::null_mut(),
        memory_bytes: 0,
    };
}

/// One adapted matrix: W and W_base, both [out_features, in_features] and of the bank's dtype.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_target {
    /// Written by the switches. In place it holds the base weight at first; from base its content
    /// does not matter.
    pub weight: lsw_mat_mut,
    /// W_base, from base only, where targets and sets may share it. In place: data NULL, and
    /// nothing else of it is read.
    pub base: lsw_mat,
}

/// All adapted weights of a model and the adapters that they may carry.
///
/// A route is ids[k] and gates[k], as lsw_route writes them. Canonical form: an id outside the
/// bank's slots is none; duplicates add up in f32 in order of appearance; entries sort by id, so a
/// permuted route gives the same bits. The coefficient of a slot at a target is gate * scale, in
/// f32; where it is zero, or the rank is, the adapter is not touched at all.
///
/// A target whose list of (slot, coefficient, content of the slot) equals what it holds costs no
/// weight traffic. What it holds is kept on the device, so a captured lsw_switch_to serves every
/// route, and a slot that got another adapter is noticed.
///
/// Numbers: A, B, W enter as stored; products and sums in f32, in a fixed order; one rounding at
/// the end. A coefficient that is not finite propagates from base (and the next route heals it); in
/// place it counts as zero, as does one of 2^126 or more in magnitude, since it would destroy W:
/// lsw_switch_odd tells.
///
/// On Hopper, the launch of a small set (in 16 bits, aligned, up to 32 targets and some 1,000 tiles of
/// 128 x 128; fewer where ranks may exceed 64) is a dependent one, like that of lsw_route: it starts
/// while the work before it ends, lets dependents start at once, and reads adapters that are in a
/// slot before that work has ended.
///
/// A set is used by one thread at a time and in flight on one stream at a time, replays of graphs
/// included. A graph that captured its calls holds the addresses of the set, its bank and their
/// memory, and keeps none of them alive: do not replay it once they are destroyed or freed.
pub struct lsw_switch {
    set: SwitchSet,
    context: Context,
}

/// Bytes of memory for the tables of a set: 0 on a CPU context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_memory_bytes(context: *const lsw_context, targets: u64, k_max: u64, bytes: *mut u64) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions; the stream is only asked for its backend.
        let (_, stream) = unsafe { on(context, std::ptr::null_mut()) }?;
        // SAFETY: the conventions.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.set(SwitchSet::memory_bytes(&stream, targets, k_max)?);
        Ok(())
    })
}

/// A set over `count` targets, which are the bank's, in its order. Synchronises the stream.
///
/// Weights may not share memory with each other or with a base; the test is exact at equal strides,
/// and refuses overlapping spans otherwise. Weights and bases with addresses and rows (stride
/// included) of multiples of 16 bytes take the fast path on CUDA.
///
/// The memory of weights and bases stays the caller's, until the set is destroyed and its work is
/// done. Others read and write it in stream order with the set's work, and say so after writing
/// (lsw_switch_invalidate).
///
/// Nothing is written yet: from base, the first lsw_switch_to writes every W; in place, W is taken
/// as it is, with nothing merged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_create(
    bank: *const lsw_bank,
    stream: *mut c_void,
    options: *const lsw_switch_options,
    targets: *const lsw_target,
    count: u64,
    set: *mut *mut lsw_switch,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, context) = unsafe { handle(bank, "bank") }?.get();
        // SAFETY: the conventions.
        let (given, targets, out) = unsafe { (self::options(options)?, slice(targets, count, "targets")?, Out::new(set, "set")?) };
        // SAFETY: the conventions.
        let (stream, options) = unsafe { (context.raw_stream(stream), set_options(&given)?) };
        let target = |(i, given): (usize, &lsw_target)| {
            // SAFETY: the conventions; see the documentation on how long weights and bases live.
            unsafe { target(context, given, options.form) }.map_err(|e| e.within(format_args!("targets[{i}]")))
        };
        let targets = targets.iter().enumerate().map(target).collect::<Result<Vec<_>>>()?;
        let set = SwitchSet::new(&stream, bank, targets, options)?;
        out.give(lsw_switch { set, context: context.clone() });
        Ok(())
    })
}

/// # Safety
/// As for [`state_memory`].
unsafe fn set_options(given: &lsw_switch_options) -> Result<SwitchOptions> {
    let kernels = match given.kernels {
        LSW_KERNELS_BEST => SwitchKernels::Best,
        LSW_KERNELS_PORTABLE => SwitchKernels::Portable,
        LSW_KERNELS_LARGE => SwitchKernels::Large,
        other => return Err(Error::argument("options.kernels", other, "LSW_KERNELS_BEST, _PORTABLE or _LARGE")),
    };
    let form = match given.form {
        LSW_FROM_BASE => Form::FromBase,
        LSW_IN_PLACE => Form::InPlace,
        other => return Err(Error::argument("options.form", other, "LSW_FROM_BASE or LSW_IN_PLACE")),
    };
    // SAFETY: the caller's promise.
    let memory = unsafe { state_memory(given.memory, given.memory_bytes) }?;
    Ok(SwitchOptions { form, k_max: given.k_max, kernels, memory })
}

/// # Safety
/// As for [`Weight::from_raw`] and [`tensor`].
unsafe fn target(context: &Context, given: &lsw_target, form: Form) -> Result<Target> {
    let w = &given.weight;
    let dtype = dtype(w.dtype, w.reserved).map_err(|e| e.within("weight"))?;
    // SAFETY: the caller's promise.
    let weight = unsafe { Weight::from_raw(context, w.data as u64, dtype, w.rows, w.cols, w.stride) };
    let base = if form == Form::InPlace && given.base.data.is_null() {
        None
    } else {
        // SAFETY: the caller's promise.
        Some(unsafe { tensor(context, &given.base, "base") }?)
    };
    Ok(Target { weight, base })
}

/// Brings all targets to a route: ids [k] and gates [k] in the context's memory, k at most k_max.
/// One launch on CUDA; enqueued, and may be captured. k = 0 is lsw_switch_unmerge. ids and gates
/// may not lie in a weight.
///
/// Same input, same bits, within one path (fast or not, see lsw_switch_create) on one kind of card.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_to(
    set: *mut lsw_switch,
    stream: *mut c_void,
    ids: *const i32,
    gates: *const f32,
    k: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let this = unsafe { handle_mut(set, "set") }?;
        let all = 0..this.set.len() as u64;
        // SAFETY: the conventions.
        unsafe { this.to(stream, all, ids, gates, k) }
    })
}

/// Like lsw_switch_to for the targets first <= i < last (a pipeline stage, the next layer); the
/// others keep what they hold.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_to_targets(
    set: *mut lsw_switch,
    stream: *mut c_void,
    first: u64,
    last: u64,
    ids: *const i32,
    gates: *const f32,
    k: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let this = unsafe { handle_mut(set, "set") }?;
        // SAFETY: the conventions.
        unsafe { this.to(stream, first..last, ids, gates, k) }
    })
}

impl lsw_switch {
    /// # Safety
    /// As for [`Context::raw_stream`] and [`Mat::raw`].
    unsafe fn to(&mut self, stream: *mut c_void, targets: Range<u64>, ids: *const i32, gates: *const f32, k: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        let (stream, ids, gates) = unsafe {
            (
                self.context.raw_stream(stream),
                Mat::raw(&self.context, ids as u64, DType::I32, 1, k, k),
                Mat::raw(&self.context, gates as u64, DType::F32, 1, k, k),
            )
        };
        self.set.to_targets(&stream, targets, &ids, &gates)
    }

    /// # Safety
    /// As for [`Context::raw_stream`].
    unsafe fn stream(&self, stream: *mut c_void) -> Stream {
        // SAFETY: the caller's promise.
        unsafe { self.context.raw_stream(stream) }
    }
}

/// Brings all targets to the route of nothing: from base, W has W_base's bits. Enqueued; may be
/// captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_unmerge(set: *mut lsw_switch, stream: *mut c_void) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let this = unsafe { handle_mut(set, "set") }?;
        // SAFETY: the conventions.
        let stream = unsafe { this.stream(stream) };
        this.set.unmerge(&stream)
    })
}

/// Says that W or W_base was written by somebody else. From base, the next lsw_switch_to writes
/// every target; in place, what W holds now counts as base, with nothing merged. Clears what was
/// odd. Enqueued.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_invalidate(set: *mut lsw_switch, stream: *mut c_void) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let this = unsafe { handle_mut(set, "set") }?;
        // SAFETY: the conventions.
        let stream = unsafe { this.stream(stream) };
        this.set.invalidate(&stream)
    })
}

/// What the set's switches found odd since its creation or the last lsw_switch_invalidate: LSW_ODD_
/// bits, 0 for nothing. Synchronises the stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_odd(set: *const lsw_switch, stream: *mut c_void, odd: *mut u32) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (this, out) = unsafe { (handle(set, "set")?, Out::new(odd, "odd")?) };
        // SAFETY: the conventions.
        let stream = unsafe { this.stream(stream) };
        out.set(this.set.odd(&stream)?.bits());
        Ok(())
    })
}

/// Copies what a target holds into the context's memory: ids [k_max] ascending and coefficients
/// [k_max], padded with -1 and 0; k_max must be the set's. Before the first lsw_switch_to, nothing
/// is held. Enqueued; may be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_current(
    set: *const lsw_switch,
    stream: *mut c_void,
    target: u64,
    ids: *mut i32,
    coefficients: *mut f32,
    k_max: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let this = unsafe { handle(set, "set") }?;
        // SAFETY: the conventions.
        let (stream, mut ids, mut coefficients) = unsafe {
            (
                this.stream(stream),
                MatMut::raw(&this.context, ids as u64, DType::I32, 1, k_max, k_max),
                MatMut::raw(&this.context, coefficients as u64, DType::F32, 1, k_max, k_max),
            )
        };
        this.set.current(&stream, target, &mut ids, &mut coefficients)
    })
}

/// A target's weight, as given at creation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_weight(set: *const lsw_switch, target: u64, weight: *mut lsw_mat) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (this, out) = unsafe { (handle(set, "set")?, Out::new(weight, "weight")?) };
        let mat = this.set.weight(target)?;
        out.set(lsw_mat {
            data: mat.addr() as *const c_void,
            rows: mat.rows(),
            cols: mat.cols(),
            stride: mat.stride(),
            dtype: mat.dtype() as i32,
            reserved: 0,
        });
        Ok(())
    })
}

/// The number of targets.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_count(set: *const lsw_switch, count: *mut u64) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (this, out) = unsafe { (handle(set, "set")?, Out::new(count, "count")?) };
        out.set(this.set.len() as u64);
        Ok(())
    })
}

/// Ends a set; NULL is ignored. W keeps what it holds. Tables that were allocated are freed, which
/// synchronises the device; memory of the caller's must outlive the work that uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_switch_destroy(set: *mut lsw_switch) {
    // SAFETY: the conventions.
    unsafe { destroy(set) }
}
