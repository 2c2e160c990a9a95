//! The C entries under hostile arguments, on the CPU backend: null and misaligned pointers, absurd sizes and strides, numbers that
//! name nothing, overlaps, structs of wrong sizes, objects destroyed in any order.
//!
//! What C promises is kept, so that only the library can be at fault: a pointer that is neither null nor misaligned has real memory
//! behind it, of the size that its arguments claim, and handles are live. After each call: no panic (libfuzzer's hook aborts on one), a
//! status with words, and after an error neither the memory nor an output on the host has changed.
//!
//! The input is a program: a byte chooses a call, and the bytes that follow choose for each argument whether it is right (most are, so
//! that programs get far) or how it is wrong.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_switch as _; // its C symbols are what is called
use std::ffi::{CStr, c_void};
use std::mem::replace;
use std::ptr::null_mut;

#[allow(non_camel_case_types, non_upper_case_globals, dead_code, clippy::all)]
mod c {
    include!(concat!(env!("OUT_DIR"), "/lora_switch.rs"));
}

const ARENA: usize = 16384;
/// What stands behind every pointer to ids or gates, of which a call reads 32 at most.
const MARGIN: usize = 128;
/// An output on the host, which must keep this value after an error.
const POISON: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// The rest of the input. At its end, everything is right.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, bound: u64) -> u64 {
        u64::from(self.next()) % bound
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.next()))
    }

    fn size(&mut self, right: u64) -> u64 {
        match self.next() {
            250 => self.word(),
            251 => right.wrapping_add(1),
            252 => right.wrapping_sub(1),
            253 => u64::MAX - self.below(4),
            254 => 1 << self.below(64),
            255 => 0,
            _ => right,
        }
    }

    /// The length of an array. More elements than it has only where no memory could hold them.
    fn count<T>(&mut self, array: &[T]) -> u64 {
        let (real, count) = (array.len() as u64, self.size(array.len() as u64));
        let is_absurd = count > isize::MAX as u64 / size_of::<T>() as u64;
        if is_absurd { count } else { count.min(real) }
    }

    fn number(&mut self, right: i32) -> i32 {
        match self.next() {
            248..=251 => self.next() as i8 as i32,
            252.. => self.word() as i32,
            _ => right,
        }
    }

    fn pointer<T>(&mut self, right: *const T) -> *mut T {
        match self.next() {
            250..=252 => null_mut(),
            253.. => right.cast::<u8>().wrapping_add(1).cast_mut().cast(),
            _ => right.cast_mut(),
        }
    }
}

/// A bank and what was said at its creation, so that later calls can be right.
struct Bank {
    handle: *mut c::lsw_bank,
    dtype: i32,
    slots: u64,
    shapes: Vec<c::lsw_target_shape>,
}

struct Set {
    handle: *mut c::lsw_switch,
    k_max: u64,
    targets: u64,
}

struct World<'a> {
    bytes: Bytes<'a>,
    /// All matrices lie here, one behind the other and then from the start again, unless a byte puts one elsewhere.
    arena: Box<[u128; ARENA / 16]>,
    cursor: usize,
    contexts: [*mut c::lsw_context; 2],
    banks: [Bank; 2],
    sets: [Set; 2],
}

// SAFETY, for all calls below: what the top of the file says; a handle that is destroyed is replaced by null.
impl<'a> World<'a> {
    fn new(input: &'a [u8]) -> Self {
        let mut bytes = Bytes(input);
        let seed: [u64; 4] = std::array::from_fn(|_| bytes.word());
        let word = |i: usize| u128::from(seed[i % 4]) | u128::from(seed[i / 4 % 4].rotate_left(i as u32 / 16)) << 64;
        Self {
            arena: Box::new(std::array::from_fn(word)),
            bytes,
            cursor: 0,
            contexts: [null_mut(); 2],
            banks: [(); 2].map(|()| Bank { handle: null_mut(), dtype: 0, slots: 0, shapes: Vec::new() }),
            sets: [(); 2].map(|()| Set { handle: null_mut(), k_max: 0, targets: 0 }),
        }
    }

    fn which(&mut self) -> usize {
        usize::from(self.bytes.next() >= 192)
    }

    fn context(&mut self) -> *mut c::lsw_context {
        let which = self.which();
        self.bytes.pointer(self.contexts[which])
    }

    /// Room for this many bytes, somewhere in the arena.
    fn place(&mut self, bytes: usize) -> *mut c_void {
        let bytes = bytes.next_multiple_of(4);
        let room = ARENA - MARGIN;
        if self.cursor + bytes > room {
            self.cursor = 0;
        }
        let offset = match self.bytes.next() {
            248.. => self.bytes.word() as usize % room / 4 * 4,
            _ => self.cursor,
        };
        self.cursor = (self.cursor + bytes).min(room);
        self.bytes.pointer(self.arena.as_mut_ptr().cast::<u32>().wrapping_byte_add(offset)).cast()
    }

    /// Null instead of an address if there is less memory than the shape claims, unless no address space could hold it.
    fn mat(&mut self, rows: u64, cols: u64, dtype: i32) -> c::lsw_mat_mut {
        let mut data = self.place((4 * rows * cols) as usize);
        let padding = self.bytes.below(3);
        let (rows, right) = (self.bytes.size(rows), self.bytes.size(cols));
        let stride = self.bytes.size(right.wrapping_add(padding));
        let elements = u128::from(rows.saturating_sub(1)) * u128::from(stride) + u128::from(right);
        let room = (self.arena.as_ptr() as usize + ARENA - MARGIN).saturating_sub(data as usize) as u128;
        let is_absurd = elements > i64::MAX as u128;
        if !is_absurd && 4 * elements > room {
            data = null_mut();
        }
        let (dtype, reserved) = (self.bytes.number(dtype), self.bytes.number(0));
        c::lsw_mat_mut { data, rows, cols: right, stride, dtype, reserved }
    }

    fn read_only(&mut self, rows: u64, cols: u64, dtype: i32) -> c::lsw_mat {
        let c::lsw_mat_mut { data, rows, cols, stride, dtype, reserved } = self.mat(rows, cols, dtype);
        c::lsw_mat { data, rows, cols, stride, dtype, reserved }
    }

    /// Makes a call and judges what it left behind.
    fn call(&mut self, f: impl FnOnce(&mut Self) -> c::lsw_status) -> bool {
        let before = self.arena.clone();
        let status = f(self);
        assert!((0..c::LSW_PANIC as i32).contains(&status), "status {status}");
        let is_ok = status == c::LSW_OK as i32;
        if !is_ok {
            assert!(before == self.arena, "an error changed memory");
            // SAFETY: texts that the library keeps until its next error.
            let texts = unsafe { [c::lsw_last_error(), c::lsw_status_name(status)].map(|text| CStr::from_ptr(text)) };
            assert!(!texts[0].is_empty() && texts[1].to_bytes().starts_with(b"LSW_"));
        }
        is_ok
    }

    /// A call with an output on the host.
    fn get<T>(&mut self, f: impl FnOnce(&mut Self, *mut T) -> c::lsw_status) {
        assert!(size_of::<T>() <= size_of::<[u64; 8]>());
        let mut value = [POISON; 8];
        let out = self.bytes.pointer(value.as_mut_ptr().cast::<T>());
        if !self.call(|world| f(world, out)) {
            assert!(value == [POISON; 8], "an error wrote an output");
        }
    }

    /// A call that makes an object: null after an error.
    fn make<T>(&mut self, f: impl FnOnce(&mut Self, *mut *mut T) -> c::lsw_status) -> *mut T {
        let mut object = null_mut();
        let out = self.bytes.pointer(&raw mut object);
        let is_ok = self.call(|world| f(world, out));
        assert!(is_ok != object.is_null());
        object
    }

    /// Hands over options in a buffer as long as the largest size that is read.
    fn with_options<T>(&mut self, options: T, f: impl FnOnce(&mut Self, *const T) -> c::lsw_status) -> c::lsw_status {
        let mut buffer = [0u64; 4096 / 8];
        // SAFETY: all structs of options are smaller than the buffer, and need no more alignment.
        unsafe { buffer.as_mut_ptr().cast::<T>().write(options) };
        buffer[0] = self.bytes.size(size_of::<T>() as u64);
        buffer[size_of::<T>() / 8] = u64::from(self.bytes.next() >= 248);
        let pointer = self.bytes.pointer(buffer.as_ptr().cast::<T>());
        f(self, pointer)
    }

    fn run(&mut self) {
        // Most calls need a context.
        self.contexts[0] = self.make(|_, out| unsafe { c::lsw_context_create_cpu(1, out) });
        for _ in 0..48 {
            if self.bytes.0.is_empty() {
                break;
            }
            match self.bytes.below(22) {
                0 => self.contexts(),
                1 => self.create_bank(),
                2 | 3 => self.set_slot(),
                4 => self.create_set(),
                5..=7 => self.switch(),
                8 => self.current(),
                9 => self.route(),
                10 => self.permute(),
                11 => self.gather(),
                12 => self.combine(),
                13 => self.sizes(),
                14 => self.objects(),
                15 => self.measure(),
                16 => self.gate(),
                17 | 18 => self.apply(),
                19 => self.linear(),
                20 => self.advise(),
                _ => self.destroy(),
            }
        }
    }

    fn contexts(&mut self) {
        match self.bytes.below(4) {
            0 => {
                // Real threads are slow to make: one, two, or too many.
                let threads = match self.bytes.next() {
                    255 => 1025 + self.bytes.word() as u32 / 2,
                    254 => 2,
                    _ => 1,
                };
                let made = self.make(|_, out| unsafe { c::lsw_context_create_cpu(threads, out) });
                let which = self.which();
                unsafe { c::lsw_context_destroy(replace(&mut self.contexts[which], made)) };
            }
            1 => {
                let made = self.make(|_, out| unsafe { c::lsw_context_create_cuda(u32::MAX, out) });
                assert!(made.is_null(), "there is no such device");
            }
            2 => {
                self.call(|w| unsafe { c::lsw_context_warm(w.context(), null_mut()) });
            }
            _ => self.get(|w, out| unsafe { c::lsw_context_take_odd(w.context(), null_mut(), out) }),
        }
    }

    fn create_bank(&mut self) {
        let dimension = |w: &mut Self| {
            let right = w.bytes.below(9);
            w.bytes.size(right)
        };
        let shape = |w: &mut Self| c::lsw_target_shape { out_features: dimension(w), in_features: dimension(w), rank_cap: w.bytes.size(4) };
        let shapes: Vec<_> = (0..self.bytes.below(4)).map(|_| shape(self)).collect();
        let (dtype, slots) = (self.bytes.below(3) as i32, 1 + self.bytes.below(4));
        let (dtype, slots) = (self.bytes.number(dtype), self.bytes.size(slots));
        let slots = if slots <= 65536 { slots % 64 } else { slots }; // large tables are only slow
        let options = c::lsw_bank_options { dtype, reserved: self.bytes.number(0), slots, ..Default::default() };
        let handle = self.make(|w, out| {
            w.with_options(options, |w, options| {
                let (targets, count) = (w.bytes.pointer(shapes.as_ptr()), w.bytes.count(&shapes));
                unsafe { c::lsw_bank_create(w.context(), null_mut(), options, targets, count, out) }
            })
        });
        let which = self.which();
        let old = replace(&mut self.banks[which], Bank { handle, dtype, slots, shapes });
        unsafe { c::lsw_bank_destroy(old.handle) };
    }

    fn set_slot(&mut self) {
        let which = self.which();
        let (handle, dtype, slots) = (self.banks[which].handle, self.banks[which].dtype, self.banks[which].slots);
        let factor = |w: &mut Self, target: usize| {
            let shape = w.banks[which].shapes[target];
            let rank = w.bytes.below(5);
            c::lsw_factor {
                a: w.read_only(rank, shape.in_features.min(16), dtype),
                b: w.read_only(shape.out_features.min(16), rank, dtype),
                scale: f32::from_bits((w.bytes.next() as u32) << 24 | 0x40_0000),
                reserved: w.bytes.number(0),
            }
        };
        let factors: Vec<_> = (0..self.banks[which].shapes.len()).map(|target| factor(self, target)).collect();
        let slot = self.bytes.below(slots.max(1));
        self.call(|w| {
            let (bank, slot) = (w.bytes.pointer(handle), w.bytes.size(slot));
            let (array, count) = (w.bytes.pointer(factors.as_ptr()), w.bytes.count(&factors));
            unsafe { c::lsw_bank_set_slot(bank, null_mut(), slot, array, count) }
        });
    }

    fn create_set(&mut self) {
        let bank = self.which();
        let (handle, dtype) = (self.banks[bank].handle, self.banks[bank].dtype);
        let form = self.bytes.below(2) as i32;
        let target = |w: &mut Self, target: usize| {
            let shape = w.banks[bank].shapes[target];
            let (rows, cols) = (shape.out_features.min(16), shape.in_features.min(16));
            let base = form == c::LSW_FROM_BASE as i32;
            let weight = w.mat(rows, cols, dtype);
            c::lsw_target { weight, base: if base { w.read_only(rows, cols, dtype) } else { c::lsw_mat::default() } }
        };
        let targets: Vec<_> = (0..self.banks[bank].shapes.len()).map(|i| target(self, i)).collect();
        let (form, k_max) = (self.bytes.number(form), 1 + self.bytes.below(32));
        let k_max = self.bytes.size(k_max);
        let options = c::lsw_switch_options { form, kernels: self.bytes.number(0), k_max, ..Default::default() };
        let made = self.make(|w, out| {
            w.with_options(options, |w, options| {
                let (array, count) = (w.bytes.pointer(targets.as_ptr()), w.bytes.count(&targets));
                unsafe { c::lsw_switch_create(w.bytes.pointer(handle), null_mut(), options, array, count, out) }
            })
        });
        let which = self.which();
        let old = replace(&mut self.sets[which], Set { handle: made, k_max, targets: targets.len() as u64 });
        unsafe { c::lsw_switch_destroy(old.handle) };
    }

    /// Ids and gates of a route; the arena's own bytes are seldom ids.
    fn route_to(&mut self, k: u64) -> (*mut i32, *mut f32) {
        let (ids, gates) = (self.place(MARGIN).cast::<i32>(), self.place(MARGIN).cast::<f32>());
        for i in 0..if ids.is_null() || gates.is_null() { 0 } else { k as usize } {
            let (id, gate) = (i32::from(self.bytes.next() as i8) / 16, f32::from(self.bytes.next() as i8) / 16.0);
            unsafe { ids.add(i).write_unaligned(id) };
            unsafe { gates.add(i).write_unaligned(gate) };
        }
        (ids, gates)
    }

    fn switch(&mut self) {
        let which = self.which();
        let Set { handle, k_max, targets } = self.sets[which];
        let k = self.bytes.below(k_max.clamp(1, 32) + 1);
        let (ids, gates) = self.route_to(k);
        self.call(|w| {
            let (set, k) = (w.bytes.pointer(handle), w.bytes.size(k));
            match w.bytes.below(8) {
                0 => unsafe { c::lsw_switch_unmerge(set, null_mut()) },
                1 => unsafe { c::lsw_switch_invalidate(set, null_mut()) },
                2 => {
                    let first = w.bytes.below(targets + 1);
                    let (first, last) = (w.bytes.size(first), w.bytes.size(targets));
                    unsafe { c::lsw_switch_to_targets(set, null_mut(), first, last, ids, gates, k) }
                }
                _ => unsafe { c::lsw_switch_to(set, null_mut(), ids, gates, k) },
            }
        });
    }

    fn current(&mut self) {
        let which = self.which();
        let Set { handle, k_max, targets } = self.sets[which];
        let (ids, coefficients) = (self.place(MARGIN).cast(), self.place(MARGIN).cast());
        let target = self.bytes.below(targets.max(1));
        self.call(|w| {
            let (set, target, k_max) = (w.bytes.pointer(handle), w.bytes.size(target), w.bytes.size(k_max));
            unsafe { c::lsw_switch_current(set, null_mut(), target, ids, coefficients, k_max) }
        });
    }

    /// Options of a router over these experts, most of them right; what they point to is written where `mats` lie.
    fn router(&mut self, tokens: u64, experts: u64, mats: &mut [c::lsw_mat; 3]) -> c::lsw_route_options {
        *mats = [(1, experts, c::LSW_F32), (1, 1, c::LSW_I32), (1, tokens, c::LSW_U8)]
            .map(|(rows, cols, dtype)| self.read_only(rows, cols, dtype as i32));
        let mut given = |mat: &c::lsw_mat| match self.bytes.below(4) {
            0 => self.bytes.pointer(mat).cast_const(),
            _ => std::ptr::null(),
        };
        let (bias, valid, mask) = (given(&mats[0]), given(&mats[1]), given(&mats[2]));
        let groups = [0, 1, 2, experts][self.bytes.below(4) as usize];
        let top_groups = self.bytes.below(groups.max(1)) + 1;
        let (score, group_score, renormalize) = (self.bytes.below(3) as i32, self.bytes.below(2) as i32, self.bytes.below(2) as i32);
        c::lsw_route_options {
            renormalize: self.bytes.number(renormalize),
            only_x_is_new: self.bytes.number(1),
            score: self.bytes.number(score),
            group_score: self.bytes.number(group_score),
            scale: f32::from_bits((self.bytes.next() as u32) << 24),
            softcap: f32::from_bits((self.bytes.next() as u32) << 24),
            groups: self.bytes.size(groups),
            top_groups: self.bytes.size(top_groups),
            bias,
            valid,
            mask,
            ..Default::default()
        }
    }

    fn route(&mut self) {
        let (tokens, experts) = (self.bytes.below(5), 1 + self.bytes.below(16));
        let k = 1 + self.bytes.below(experts);
        let dtype = self.bytes.below(3) as i32;
        let logits = self.read_only(tokens, experts, dtype);
        let (ids, gates) = (self.mat(tokens, k, c::LSW_I32 as i32), self.mat(tokens, k, c::LSW_F32 as i32));
        let (counts, workspace) = (self.mat(1, experts, c::LSW_I32 as i32), self.place(MARGIN));
        let mut mats = [c::lsw_mat::default(); 3];
        let options = self.router(tokens, experts, &mut mats);
        let is_counted = self.bytes.below(2) == 1;
        self.call(|w| {
            w.with_options(options, |w, options| {
                let (logits, ids) = (w.bytes.pointer(&logits), w.bytes.pointer(&ids));
                let gates = w.bytes.pointer(&gates);
                if !is_counted {
                    return unsafe { c::lsw_route(w.context(), null_mut(), options, logits, ids, gates) };
                }
                let (counts, bytes) = (w.bytes.pointer(&counts), w.bytes.below(MARGIN as u64));
                unsafe { c::lsw_route_counted(w.context(), null_mut(), options, logits, ids, gates, counts, workspace, bytes) }
            })
        });
    }

    fn gate(&mut self) {
        let (tokens, experts, hidden) = (self.bytes.below(5), 1 + self.bytes.below(9), 1 + self.bytes.below(12));
        let k = 1 + self.bytes.below(experts);
        let dtype = self.bytes.below(3) as i32;
        let (x, weight, bias) =
            (self.read_only(tokens, hidden, dtype), self.read_only(experts, hidden, dtype), self.read_only(1, experts, dtype));
        let (ids, gates) = (self.mat(tokens, k, c::LSW_I32 as i32), self.mat(tokens, k, c::LSW_F32 as i32));
        let (counts, workspace) = (self.mat(1, experts, c::LSW_I32 as i32), self.place(MARGIN));
        let mut mats = [c::lsw_mat::default(); 3];
        let options = self.router(tokens, experts, &mut mats);
        self.call(|w| {
            w.with_options(options, |w, options| {
                let (x, weight, bias) = (w.bytes.pointer(&x), w.bytes.pointer(&weight), w.bytes.pointer(&bias));
                let (ids, gates, counts) = (w.bytes.pointer(&ids), w.bytes.pointer(&gates), w.bytes.pointer(&counts));
                let bytes = w.bytes.below(MARGIN as u64);
                unsafe { c::lsw_gate(w.context(), null_mut(), options, x, weight, bias, ids, gates, counts, workspace, bytes) }
            })
        });
    }

    /// Options of which most are right, and the experts of the call and the block that they ask for.
    fn permute_options(&mut self, experts: u64) -> (c::lsw_permute_options, u64, u64) {
        let first = self.bytes.below(experts);
        let (last, block) = (first + 1 + self.bytes.below(experts - first), 1 + self.bytes.below(3));
        let options = c::lsw_permute_options {
            experts: self.bytes.size(experts),
            first: self.bytes.size(first),
            last: self.bytes.size(last),
            block: self.bytes.size(block),
            filler: self.bytes.number(-1),
            reserved: self.bytes.number(0),
            ..Default::default()
        };
        (options, last - first, block)
    }

    fn permute(&mut self) {
        let (tokens, k, experts) = (self.bytes.below(6), 1 + self.bytes.below(4), 1 + self.bytes.below(9));
        let i32 = c::LSW_I32 as i32;
        let with = self.bytes.below(2) == 1;
        let (options, local, block) = if with { self.permute_options(experts) } else { (Default::default(), experts, 1) };
        let rows = (tokens * k + local.min(tokens * k) * (block - 1)) / block * block;
        let (ids, offsets) = (self.read_only(tokens, k, i32), self.mat(1, local + 1, i32));
        let (row_map, inverse) = (self.mat(1, rows, i32), self.mat(tokens, k, i32));
        let block_experts = self.mat(1, rows / block, i32);
        let workspace = self.place(MARGIN);
        self.write_ids(&ids);
        self.call(|w| {
            let (experts, bytes) = (w.bytes.size(experts), w.bytes.below(MARGIN as u64));
            let (ids, offsets) = (w.bytes.pointer(&ids), w.bytes.pointer(&offsets));
            let (row_map, inverse) = (w.bytes.pointer(&row_map), w.bytes.pointer(&inverse));
            let block_experts = w.bytes.pointer(&block_experts);
            let context = w.context();
            if !with {
                return unsafe { c::lsw_permute(context, null_mut(), experts, ids, offsets, row_map, inverse, workspace, bytes) };
            }
            w.with_options(options, |_, options| unsafe {
                c::lsw_permute_with(context, null_mut(), options, ids, offsets, row_map, inverse, block_experts, workspace, bytes)
            })
        });
    }

    fn gather(&mut self) {
        let (tokens, k, count, width) = (self.bytes.below(5), 1 + self.bytes.below(4), self.bytes.below(9), self.bytes.below(9));
        let dtype = self.bytes.below(5) as i32;
        let (x, inverse) = (self.read_only(tokens, width, dtype), self.read_only(tokens, k, c::LSW_I32 as i32));
        let rows = self.mat(count, width, dtype);
        self.write_ids(&inverse);
        self.call(|w| {
            let (x, inverse, rows) = (w.bytes.pointer(&x), w.bytes.pointer(&inverse), w.bytes.pointer(&rows));
            unsafe { c::lsw_gather(w.context(), null_mut(), x, inverse, rows) }
        });
    }

    fn combine(&mut self) {
        let (tokens, k, count, width) = (self.bytes.below(5), 1 + self.bytes.below(4), self.bytes.below(9), self.bytes.below(9));
        let dtype = self.bytes.below(3) as i32;
        let (rows, inverse) = (self.read_only(count, width, dtype), self.read_only(tokens, k, c::LSW_I32 as i32));
        let (gates, y) = (self.read_only(tokens, k, c::LSW_F32 as i32), self.mat(tokens, width, dtype));
        let (residual, is_y) = (self.read_only(tokens, width, dtype), self.bytes.below(4) == 0);
        let own = c::lsw_mat { data: y.data, rows: y.rows, cols: y.cols, stride: y.stride, dtype: y.dtype, reserved: y.reserved };
        let residual = if is_y { own } else { residual };
        self.write_ids(&inverse);
        self.call(|w| {
            let (rows, inverse) = (w.bytes.pointer(&rows), w.bytes.pointer(&inverse));
            let (gates, y) = (w.bytes.pointer(&gates), w.bytes.pointer(&y));
            let context = w.context();
            if w.bytes.below(2) == 0 {
                return unsafe { c::lsw_combine(context, null_mut(), rows, inverse, gates, y) };
            }
            let (residual, reserved) = (w.bytes.pointer(&residual), w.bytes.number(0));
            let options = c::lsw_combine_options { residual, scale: 0.5, reserved, ..Default::default() };
            w.with_options(options, |_, options| unsafe { c::lsw_combine_with(context, null_mut(), options, rows, inverse, gates, y) })
        });
    }

    fn apply(&mut self) {
        let which = self.which();
        let (handle, dtype) = (self.banks[which].handle, self.banks[which].dtype);
        let shapes = self.banks[which].shapes.clone();
        let first = self.bytes.below(shapes.len().max(1) as u64);
        let group = &shapes[(first as usize).min(shapes.len())..];
        let (rows, k, items) = (self.bytes.below(5), self.bytes.below(4), self.bytes.below(5));
        let x = self.read_only(rows, group.first().map_or(0, |shape| shape.in_features.min(16)), dtype);
        let is_mapped = self.bytes.next() >= 192;
        let items = if is_mapped { items } else { rows };
        let (ids, gates) = (self.read_only(items, k, c::LSW_I32 as i32), self.read_only(items, k, c::LSW_F32 as i32));
        let row_map = if is_mapped { self.read_only(1, rows, c::LSW_I32 as i32) } else { c::lsw_mat::default() };
        self.write_ids(&ids);
        self.write_ids(&row_map);
        let routes = c::lsw_routes { ids, gates, row_map };
        let y_type = self.bytes.below(3) as i32;
        let y: Vec<_> = group.iter().map(|shape| self.mat(rows, shape.out_features.min(16), y_type)).collect();
        self.cursor = self.cursor.next_multiple_of(16);
        let workspace = self.place(8 * MARGIN);
        let room = (self.arena.as_ptr() as usize + ARENA).saturating_sub(workspace as usize) as u64;
        self.call(|w| {
            let (bank, first, bytes) = (w.bytes.pointer(handle), w.bytes.size(first), w.bytes.size(room).min(room));
            let (x, routes) = (w.bytes.pointer(&x), w.bytes.pointer(&routes));
            let (y, count) = (w.bytes.pointer(y.as_ptr()), w.bytes.count(&y));
            match w.bytes.below(5) {
                0 => unsafe { c::lsw_apply_begin(bank, null_mut(), first, count, x, routes, workspace, bytes) },
                1 => unsafe { c::lsw_apply_finish(bank, null_mut(), first, routes, y, count, workspace, bytes) },
                2 => unsafe { c::lsw_apply_into(bank, null_mut(), first, x, routes, y, count, workspace, bytes) },
                _ => unsafe { c::lsw_apply(bank, null_mut(), first, x, routes, y, count, workspace, bytes) },
            }
        });
        self.get(|w, out| {
            let (rows, k) = (w.bytes.size(rows), w.bytes.size(k));
            unsafe { c::lsw_apply_workspace_bytes(handle, first, shapes.len() as u64, rows, k, out) }
        });
    }

    /// Pure arithmetic: no calibration, which is slow and cannot go wrong.
    fn advise(&mut self) {
        let which = self.which();
        let shapes = self.banks[which].shapes.clone();
        let groups: Vec<u64> = shapes.iter().map(|_| self.bytes.size(1)).collect();
        let ranks: Vec<u64> = (0..1 + self.bytes.below(3)).map(|_| self.bytes.size(4)).collect();
        let float = |w: &mut Self, right: f64| match w.bytes.next() {
            248.. => f64::from_bits(w.bytes.word()),
            _ => right,
        };
        let mut calibration = c::lsw_calibration { launch_us: float(self, 1.0), apply_call_us: float(self, 1.0), ..Default::default() };
        (calibration.linear_call_us, calibration.linear_adapters_us) = (float(self, 1.0), float(self, 1.0));
        (calibration.linear_gb_per_s, calibration.switch_gb_per_s) = (float(self, 1e3), float(self, 1e3));
        let rates = [&mut calibration.read_gb_per_s, &mut calibration.copy_gb_per_s, &mut calibration.few_rows_gb_per_s];
        rates.into_iter().for_each(|rate| *rate = float(self, 1e3));
        let rates = [&mut calibration.many_rows_gb_per_s, &mut calibration.product_share, &mut calibration.product_tflops];
        rates.into_iter().for_each(|rate| *rate = float(self, 0.5));
        let workload = c::lsw_workload {
            targets: self.bytes.pointer(shapes.as_ptr()),
            count: self.bytes.count(&shapes),
            groups: self.bytes.pointer(groups.as_ptr()),
            group_count: self.bytes.count(&groups),
            ranks: self.bytes.pointer(ranks.as_ptr()),
            slots: self.bytes.count(&ranks),
            dtype: self.bytes.number(c::LSW_BF16 as i32),
            reserved: self.bytes.number(0),
            k: self.bytes.size(2),
            batch: self.bytes.size(8),
            tokens_per_route: float(self, 2.0),
            ..Default::default()
        };
        let mut advice = c::lsw_advice { struct_size: self.bytes.size(size_of::<c::lsw_advice>() as u64), best: -1, ..Default::default() };
        let out = self.bytes.pointer(&raw mut advice);
        let is_ok = self.call(|w| {
            w.with_options(calibration, |w, calibration| {
                w.with_options(workload, |_, workload| unsafe { c::lsw_advise(calibration, workload, out) })
            })
        });
        assert_eq!(is_ok && advice.struct_size > 8, advice.best >= 0);
        assert!(!is_ok || !(advice.switch_us.is_nan() || advice.apply_us.is_nan() || advice.linear_us.is_nan()));
    }

    fn linear(&mut self) {
        let which = self.which();
        let (handle, dtype) = (self.banks[which].handle, self.banks[which].dtype);
        let shapes = self.banks[which].shapes.clone();
        let first = self.bytes.below(shapes.len().max(1) as u64);
        let group = &shapes[(first as usize).min(shapes.len())..];
        let (rows, k) = (self.bytes.below(10), self.bytes.below(4));
        let cols = group.first().map_or(0, |shape| shape.in_features.min(16));
        let weights: Vec<_> = group.iter().map(|shape| self.read_only(shape.out_features.min(16), cols, dtype)).collect();
        let x = self.read_only(rows, cols, dtype);
        let (ids, gates) = (self.read_only(rows, k, c::LSW_I32 as i32), self.read_only(rows, k, c::LSW_F32 as i32));
        self.write_ids(&ids);
        let routes = c::lsw_routes { ids, gates, row_map: c::lsw_mat::default() };
        let y_type = self.bytes.below(3) as i32;
        let y: Vec<_> = group.iter().map(|shape| self.mat(rows, shape.out_features.min(16), y_type)).collect();
        self.cursor = self.cursor.next_multiple_of(16);
        let workspace = self.place(8 * MARGIN);
        let room = (self.arena.as_ptr() as usize + ARENA).saturating_sub(workspace as usize) as u64;
        self.call(|w| {
            let (bank, first, bytes) = (w.bytes.pointer(handle), w.bytes.size(first), w.bytes.size(room).min(room));
            let (x, routes, weights) = (w.bytes.pointer(&x), w.bytes.pointer(&routes), w.bytes.pointer(weights.as_ptr()));
            let (y, count) = (w.bytes.pointer(y.as_ptr()), w.bytes.count(&y));
            let (only_x_is_new, alone) = (w.bytes.number(1), w.bytes.number(0));
            let options = c::lsw_linear_options { only_x_is_new, alone, ..Default::default() };
            w.with_options(options, |_, options| unsafe {
                c::lsw_linear(bank, null_mut(), options, first, weights, x, routes, y, count, workspace, bytes)
            })
        });
        self.get(|w, out| {
            let (rows, k) = (w.bytes.size(rows), w.bytes.size(k));
            unsafe { c::lsw_linear_workspace_bytes(handle, first, shapes.len() as u64, rows, k, out) }
        });
    }

    /// Small numbers for the first row of a map that may be valid.
    fn write_ids(&mut self, map: &c::lsw_mat) {
        for i in 0..if map.data.is_null() { 0 } else { map.cols.min(MARGIN as u64 / 4) as usize } {
            let id = i32::from(self.bytes.next() as i8) / 8;
            unsafe { map.data.cast::<i32>().cast_mut().add(i).write_unaligned(id) };
        }
    }

    fn sizes(&mut self) {
        let (a, b) = (self.bytes.below(100), self.bytes.below(33));
        let (a, b, dtype) = (self.bytes.size(a), self.bytes.size(b), self.bytes.number(0));
        self.get(|w, out| match w.bytes.below(5) {
            0 => unsafe { c::lsw_bank_memory_bytes(w.context(), dtype, a, b, out) },
            1 => unsafe { c::lsw_switch_memory_bytes(w.context(), a, b, out) },
            3 => unsafe { c::lsw_route_workspace_bytes(w.context(), out) },
            4 => unsafe { c::lsw_gate_workspace_bytes(w.context(), a, b, a.wrapping_mul(b), out) },
            _ => unsafe { c::lsw_permute_workspace_bytes(w.context(), a, b, out) },
        });
        let (options, ..) = self.permute_options(7);
        self.get(|w, out| w.with_options(options, |w, options| unsafe { c::lsw_permute_get_sizes(w.context(), options, a, out) }));
    }

    fn objects(&mut self) {
        let which = self.which();
        let (bank, set) = (self.bytes.pointer(self.banks[which].handle), self.bytes.pointer(self.sets[which].handle));
        let target = self.bytes.below(4);
        let target = self.bytes.size(target);
        self.get(|_, out| unsafe { c::lsw_bank_dtype(bank, out) });
        self.get(|_, out| unsafe { c::lsw_bank_slots(bank, out) });
        self.get(|_, out| unsafe { c::lsw_bank_count(bank, out) });
        self.get(|_, out| unsafe { c::lsw_bank_target(bank, target, out) });
        self.get(|_, out| unsafe { c::lsw_switch_odd(set, null_mut(), out) });
        self.get(|_, out| unsafe { c::lsw_switch_count(set, out) });
        self.get(|_, out| unsafe { c::lsw_switch_weight(set, target, out) });
    }

    fn measure(&mut self) {
        let (n, dtype) = (self.bytes.below(40), self.bytes.below(3) as i32);
        let times = self.bytes.size(1);
        self.cursor = self.cursor.next_multiple_of(16);
        let x = self.read_only(1, n, dtype);
        self.cursor = self.cursor.next_multiple_of(16);
        let y = self.mat(1, n, dtype);
        let (sink, factor) = (self.place(4).cast(), f32::from_bits((self.bytes.next() as u32) << 24));
        self.call(|w| {
            let (context, x, y) = (w.context(), w.bytes.pointer(&x), w.bytes.pointer(&y));
            match w.bytes.below(6) {
                4 => unsafe { c::lsw_measure_repeat(context, null_mut(), times, x, y) },
                5 => unsafe { c::lsw_measure_fold(context, null_mut(), times, x, y) },
                0 => unsafe { c::lsw_measure_scale(context, null_mut(), factor, x, y) },
                1 => unsafe { c::lsw_measure_scale_in_place(context, null_mut(), factor, y) },
                2 => unsafe { c::lsw_measure_fill_random(context, null_mut(), w.bytes.word(), factor, y) },
                _ => unsafe { c::lsw_measure_read(context, null_mut(), x, sink) },
            }
        });
    }

    fn destroy(&mut self) {
        let which = self.which();
        match self.bytes.below(3) {
            0 => unsafe { c::lsw_context_destroy(replace(&mut self.contexts[which], null_mut())) },
            1 => unsafe { c::lsw_bank_destroy(replace(&mut self.banks[which].handle, null_mut())) },
            _ => unsafe { c::lsw_switch_destroy(replace(&mut self.sets[which].handle, null_mut())) },
        }
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        // SAFETY: live handles or null, each once. Contexts and banks go before the sets that use them.
        unsafe {
            self.contexts.iter().for_each(|context| c::lsw_context_destroy(*context));
            self.banks.iter().for_each(|bank| c::lsw_bank_destroy(bank.handle));
            self.sets.iter().for_each(|set| c::lsw_switch_destroy(set.handle));
        }
    }
}

fuzz_target!(|input: &[u8]| World::new(input).run());
