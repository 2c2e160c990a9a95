//! The adapter bank.

use super::context::{lsw_context, on};
use super::{Options, Out, check_reserved, destroy, dtype, guard, handle, lsw_mat, lsw_status, mat, options, slice, state_memory};
use crate::bank::{AdapterBank, Factor, TargetShape};
use crate::error::{Error, Result};
use crate::stream::Context;
use crate::view::Tensor;
use std::ffi::c_void;

/// One target's matrix: W is [out_features, in_features].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_target_shape {
    /// Rows of W and of B.
    pub out_features: u64,
    /// Columns of W and of A.
    pub in_features: u64,
    /// The largest rank that a slot may bring: 0 to 256. Captured launches are laid out for it;
    /// work follows the real rank.
    pub rank_cap: u64,
}

/// What a bank is made with. NULL, or what a smaller struct_size leaves out: LSW_F32, 0, and memory
/// of its own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_bank_options {
    /// sizeof(lsw_bank_options).
    pub struct_size: u64,
    /// Of W, A and B: LSW_F32, LSW_F16 or LSW_BF16.
    pub dtype: i32,
    /// 0.
    pub reserved: i32,
    /// The number of adapters that each target can hold: 1 to 65536.
    pub slots: u64,
    /// Device memory for the table, aligned to 128 bytes, for as long as the bank and sets over it
    /// live; NULL to have it allocated.
    pub memory: *mut c_void,
    /// Its size, at least lsw_bank_memory_bytes.
    pub memory_bytes: u64,
}

impl Options for lsw_bank_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>() as u64,
        dtype: super::LSW_F32,
        reserved: 0,
        slots: 0,
        memory: std::ptr::null_mut(),
        memory_bytes: 0,
    };
}

/// A LoRA pair as PEFT stores it: the weight's change is scale * B A. The rank is a.rows; where
/// that is 0, the slot leaves the target alone, and nothing else of the struct is read.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lsw_factor {
    /// A [rank, in_features], PEFT's lora_A.weight.
    pub a: lsw_mat,
    /// B [out_features, rank], PEFT's lora_B.weight.
    pub b: lsw_mat,
    /// alpha / rank, or alpha / sqrt(rank) for rsLoRA; finite.
    pub scale: f32,
    /// 0.
    pub reserved: i32,
}

/// A table over (target, slot) of LoRA pairs, by address: it copies no weights, so stacked arrays,
/// paged pools and slices of larger matrices all fit. May be used by several threads at a time, and
/// destroyed before the sets that use it.
pub struct lsw_bank {
    bank: AdapterBank,
    context: Context,
}

impl lsw_bank {
    pub(super) fn get(&self) -> (&AdapterBank, &Context) {
        (&self.bank, &self.context)
    }
}

/// Bytes of memory for the table of a bank of this dtype: 0 on a CPU context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_memory_bytes(
    context: *const lsw_context,
    dtype: i32,
    slots: u64,
    targets: u64,
    bytes: *mut u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions; the stream is only asked for its backend.
        let (_, stream) = unsafe { on(context, std::ptr::null_mut()) }?;
        // SAFETY: the conventions.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.set(AdapterBank::memory_bytes(&stream, self::dtype(dtype, 0)?, slots, targets)?);
        Ok(())
    })
}

/// An empty bank over `count` targets, at most 2^20. Synchronises the stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_create(
    context: *const lsw_context,
    stream: *mut c_void,
    options: *const lsw_bank_options,
    targets: *const lsw_target_shape,
    count: u64,
    bank: *mut *mut lsw_bank,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (context, stream) = unsafe { on(context, stream) }?;
        // SAFETY: the conventions.
        let (given, targets, out) = unsafe { (self::options(options)?, slice(targets, count, "targets")?, Out::new(bank, "bank")?) };
        let dtype = dtype(given.dtype, given.reserved).map_err(|e| e.within("options"))?;
        let targets: Vec<TargetShape> = targets.iter().map(shape).collect();
        // SAFETY: the conventions.
        let memory = unsafe { state_memory(given.memory, given.memory_bytes) }?;
        let bank = AdapterBank::new(&stream, dtype, given.slots, &targets, memory)?;
        out.give(lsw_bank { bank, context: context.clone() });
        Ok(())
    })
}

pub(super) fn shape(given: &lsw_target_shape) -> TargetShape {
    TargetShape { out_features: given.out_features, in_features: given.in_features, rank_cap: given.rank_cap }
}

/// Gives a slot another adapter: one factor a target, in the order of the targets; count must be
/// their number.
///
/// Enqueued, without synchronisation, and seen by all work that follows on the stream, replays of
/// graphs captured earlier too. (Do not capture this call itself.) The memory of A and B stays the
/// caller's: it must live, and nobody may write it, until the slot gets another adapter, or the bank
/// and all sets over it are destroyed, and the work enqueued before that is done: a switch or an
/// lsw_apply_finish may read A and B before the work before it on the stream has ended. To change what a slot holds, write,
/// then call this again, with the same addresses if you like. They may not lie in a W of a set over
/// the bank. A and B with addresses and rows (stride included) of multiples of 16 bytes take the
/// fast path on CUDA.
///
/// A set from base that holds the slot merged heals at its next lsw_switch_to. A set in place must
/// be unmerged before: LSW_ODD_STALE_MERGE tells when it was not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_set_slot(
    bank: *mut lsw_bank,
    stream: *mut c_void,
    slot: u64,
    factors: *const lsw_factor,
    count: u64,
) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions. Banks may be shared between threads, so that this is no &mut.
        let (bank, context) = unsafe { handle(bank, "bank") }?.get();
        // SAFETY: the conventions.
        let (stream, given) = unsafe { (context.raw_stream(stream), slice(factors, count, "factors")?) };
        let factor = |(i, given): (usize, &lsw_factor)| {
            // SAFETY: the conventions; see the documentation on how long A and B live.
            unsafe { factor(context, given) }.map_err(|e| e.within(format_args!("factors[{i}]")))
        };
        let factors = given.iter().enumerate().map(factor).collect::<Result<Vec<_>>>()?;
        bank.set_slot(&stream, slot, &factors)
    })
}

/// # Safety
/// As for [`tensor`].
unsafe fn factor(context: &Context, given: &lsw_factor) -> Result<Option<Factor>> {
    if given.a.rows == 0 {
        return Ok(None);
    }
    check_reserved(given.reserved)?;
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (tensor(context, &given.a, "a")?, tensor(context, &given.b, "b")?) };
    Ok(Some(Factor { a, b, scale: given.scale }))
}

/// Memory that an object reads long after the call.
///
/// # Safety
/// As for [`Tensor::from_raw`].
pub(super) unsafe fn tensor(context: &Context, given: &lsw_mat, name: &str) -> Result<Tensor> {
    // SAFETY: a reference; the memory is only looked at as an address here.
    let mat = unsafe { mat(context, given, name) }?;
    // SAFETY: the caller's promise.
    Ok(unsafe { Tensor::from_raw(context, mat.addr(), mat.dtype(), mat.rows(), mat.cols(), mat.stride()) })
}

/// The element type of W, A and B.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_dtype(bank: *const lsw_bank, dtype: *mut i32) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, out) = unsafe { (handle(bank, "bank")?, Out::new(dtype, "dtype")?) };
        out.set(bank.get().0.dtype() as i32);
        Ok(())
    })
}

/// The number of slots.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_slots(bank: *const lsw_bank, slots: *mut u64) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, out) = unsafe { (handle(bank, "bank")?, Out::new(slots, "slots")?) };
        out.set(bank.get().0.slots());
        Ok(())
    })
}

/// The number of targets.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_count(bank: *const lsw_bank, count: *mut u64) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, out) = unsafe { (handle(bank, "bank")?, Out::new(count, "count")?) };
        out.set(bank.get().0.targets().len() as u64);
        Ok(())
    })
}

/// A target's shape, as given.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_target(bank: *const lsw_bank, target: u64, shape: *mut lsw_target_shape) -> lsw_status {
    guard(|| {
        // SAFETY: the conventions.
        let (bank, out) = unsafe { (handle(bank, "bank")?, Out::new(shape, "shape")?) };
        let shapes = bank.get().0.targets();
        let found = usize::try_from(target).ok().and_then(|i| shapes.get(i));
        let found = found.ok_or_else(|| Error::argument("target", target, format!("below {}", shapes.len())))?;
        let TargetShape { out_features, in_features, rank_cap } = *found;
        out.set(lsw_target_shape { out_features, in_features, rank_cap });
        Ok(())
    })
}

/// Ends a bank; NULL is ignored. Sets over it live on, and the table with them. The last of them
/// frees a table that was allocated, which synchronises the device; memory of the caller's must
/// outlive the work that uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lsw_bank_destroy(bank: *mut lsw_bank) {
    // SAFETY: the conventions.
    unsafe { destroy(bank) }
}
