//! The driver, probed; a device with its kernels; its streams.

use super::args::{
    LSW_EXPAND90_SHARED, LSW_FEW_SHARED, LSW_GATE_SHARED_MANY, LSW_GATE_SHARED_TILE, LSW_LINEAR_SHARED_MAX, LSW_LINEAR_THREADS,
    LSW_SHRINK90_SHARED, LSW_SMALL_LONG, LSW_SMALL_PANELS, LSW_SMALL_SHARED, LSW_SWITCH_SHARED_16BIT, LSW_SWITCH_SHARED_32BIT,
    LSW_SWITCH_THREADS_16BIT, LSW_SWITCH_THREADS_32BIT, LSW_SWITCH90_SHARED, LswTakeArgs,
};
use super::images::{BUILT_WITH, IMAGES};
use super::launch::{Grid, launch};
use super::memory::DeviceMemory;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::StateMemory;
use crate::stream::Odd;
use crate::view::{Place, RawMat};
use cudarc::driver::{CudaContext, CudaStream, sys};
use std::ffi::CString;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A driver call as a `Result`. cudarc's `CUresult` is an exhaustive enum, so the value becomes a plain number at once and is never
/// matched on: a code that a newer driver invents ends in `Error::Cuda` like any other.
macro_rules! driver {
    ($call:ident($($arg:expr),* $(,)?)) => {
        $crate::cuda::context::code(stringify!($call), sys::$call($($arg),*) as u32)
    };
}
pub(super) use driver;

pub(super) fn code(call: &'static str, code: u32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Cuda { call, code }) }
}

/// libcuda, found once. cudarc panics on its first call without it, so nothing is called before this has answered.
fn probe() -> Result<()> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let names = if cfg!(windows) { ["nvcuda.dll", "nvcuda"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: loading the NVIDIA driver runs its initialisers, as linking to it would.
    let load = || names.iter().any(|name| unsafe { libloading::Library::new(*name) }.map(std::mem::forget).is_ok());
    if !FOUND.get_or_init(load) {
        let why = format!("the NVIDIA driver ({}) cannot be loaded; install driver 580 or newer, or use a CPU context", names[0]);
        return Err(Error::NoDevice { why });
    }
    // SAFETY: no arguments to get wrong.
    unsafe { driver!(cuInit(0)) }.map_err(|e| Error::NoDevice { why: format!("{e}; is a GPU present and its driver loaded?") })
}

pub(super) type Function = sys::CUfunction;

/// Every kernel, looked up once.
pub(super) struct Kernels {
    pub route: Routers,
    /// For a plain softmax, and for all else.
    pub gate: [[Function; 3]; 2],
    /// The same for many tokens, in clusters: f16, bf16.
    pub gate_many: [[Function; 2]; 2],
    pub gate_project: [Function; 3],
    /// f16, bf16, of aligned rows.
    pub gate_project_tile: [Function; 2],
    pub status_take: Function,
    pub bank_set: Function,
    pub switch: [Function; 3],
    pub switch_current: Function,
    pub permute_count: Function,
    pub permute_scan: Function,
    pub permute_scatter: Function,
    /// By bytes a unit: 16, 4, 2, 1.
    pub gather: [Function; 4],
    pub combine: [Function; 3],
    /// Of any number of rows in f32.
    pub apply_f32: Apply,
    /// f16, bf16, as the next.
    pub apply_few: [Few; 2],
    pub apply_many: [Apply; 2],
    /// Its second half where B fits into shared memory.
    pub apply_strips: [Function; 2],
    pub apply_order: Function,
    /// By the type of y.
    pub apply_add: [Function; 3],
    /// For several tokens and for one.
    pub linear: [[Function; 3]; 2],
    pub measure_scale: [Function; 3],
    pub measure_fill: [Function; 3],
    pub measure_read: Function,
    pub measure_repeat: Function,
    pub measure_fold: Function,
}

/// Routers by experts a lane, as [`PLAIN_ITEMS`] and [`SCORED_ITEMS`] count them.
pub(super) struct Routers {
    pub plain: [[Function; 3]; 6],
    /// By [`Score`](crate::route::Score).
    pub scored: [[[Function; 3]; 3]; 3],
    /// Sigmoids in groups of 32, as [`super::route::is_grouped`] says.
    pub grouped: [Function; 3],
}

pub(super) const PLAIN_ITEMS: [u32; 6] = [1, 2, 4, 8, 16, 32];
pub(super) const SCORED_ITEMS: [u32; 3] = [1, 8, 32];

/// The halves of an unmerged product.
#[derive(Clone, Copy)]
pub(super) struct Apply {
    pub shrink: Function,
    pub expand: Function,
}

/// The same of few rows; `sum`: expand to where y is waited for.
#[derive(Clone, Copy)]
pub(super) struct Few {
    pub shrink: Function,
    pub expand: Function,
    pub sum: Function,
}

/// What only a Hopper card has. Whoever holds one may launch these kernels; only a device makes it.
#[derive(Clone, Copy)]
pub(super) struct Hopper {
    /// f16, bf16.
    pub switch: [Switch; 2],
    /// bf16.
    pub apply: DenseApply,
    pub processors: u32,
}

/// Unmerged adapters by dense products with all slots.
#[derive(Clone, Copy)]
pub(super) struct DenseApply {
    /// In clusters of two blocks and of four.
    pub shrink: [Function; 2],
    pub expand: Function,
    /// For any y.
    pub expand_any: Function,
}

/// The Hopper switch, for sets of many tiles and of few.
#[derive(Clone, Copy)]
pub(super) struct Switch {
    pub large: Function,
    pub small: Function,
    pub small_and_deep: Function,
    pub small_and_long: Function,
}

impl Hopper {
    /// None: no Hopper kernel of this type.
    pub fn switch_for(&self, dtype: DType) -> Option<Switch> {
        match dtype {
            DType::F16 => Some(self.switch[0]),
            DType::Bf16 => Some(self.switch[1]),
            _ => None,
        }
    }
}

/// Which of a kernel's three symbols serves a float type.
pub(super) fn by_dtype(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
        other => unreachable!("the plan's dtype is a float, not {other}"),
    }
}

/// Shared memory of the Hopper switch of small sets, whose own begins at a multiple of 1,024.
pub(super) const SMALL_SHARED: u32 = 1024 + LSW_SMALL_SHARED + LSW_SMALL_PANELS;
pub(super) const LONG_SHARED: u32 = 1024 + LSW_SMALL_SHARED + LSW_SMALL_LONG;

/// Threads and shared memory of the switch's blocks, by the same index.
pub(super) const SWITCH_THREADS: [u32; 3] = [LSW_SWITCH_THREADS_32BIT, LSW_SWITCH_THREADS_16BIT, LSW_SWITCH_THREADS_16BIT];
pub(super) const SWITCH_SHARED: [u32; 3] = [LSW_SWITCH_SHARED_32BIT, LSW_SWITCH_SHARED_16BIT, LSW_SWITCH_SHARED_16BIT];

struct Modules(Vec<(&'static str, sys::CUmodule)>);

impl Modules {
    /// Loads all images into the current context.
    fn load(is_hopper: bool) -> Result<Self> {
        if IMAGES.is_empty() {
            return Err(Error::NoKernels { why: BUILT_WITH });
        }
        let mut modules = Self(Vec::new());
        for (name, image) in IMAGES.iter().filter(|(name, _)| is_hopper || !name.ends_with("_sm90")) {
            let mut module = ptr::null_mut();
            // SAFETY: the image is a whole fatbin that nvcc wrote; the driver copies what it needs.
            unsafe { driver!(cuModuleLoadData(&mut module, image.as_ptr().cast())) }?;
            modules.0.push((name, module));
        }
        Ok(modules)
    }

    /// The kernel `lsw_<name>` of `kernels/<file>.cu`.
    fn function(&self, file: &str, name: &str) -> Result<Function> {
        let (_, module) = self.0.iter().find(|(stem, _)| *stem == file).ok_or(Error::NoKernels { why: BUILT_WITH })?;
        let symbol = CString::new(format!("lsw_{name}")).expect("names have no nul");
        let mut function = ptr::null_mut();
        // SAFETY: a loaded module and a nul-terminated name.
        unsafe { driver!(cuModuleGetFunction(&mut function, *module, symbol.as_ptr())) }?;
        // Under lazy loading, asking for an attribute loads the kernel's code now instead of at the first launch.
        let mut registers = 0;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        // SAFETY: a function of a loaded module.
        unsafe { driver!(cuFuncGetAttribute(&mut registers, attribute, function)) }?;
        Ok(function)
    }

    fn hopper(&self) -> Result<Hopper> {
        let switch = |suffix: &str| -> Result<Switch> {
            let large = self.function("switch_sm90", &format!("switch_{suffix}_sm90"))?;
            let small = self.function("switch_small_sm90", &format!("switch_small_{suffix}_sm90"))?;
            let small_and_deep = self.function("switch_small_sm90", &format!("switch_small_deep_{suffix}_sm90"))?;
            let small_and_long = self.function("switch_small_sm90", &format!("switch_small_long_{suffix}_sm90"))?;
            allow_shared(large, LSW_SWITCH90_SHARED)?;
            allow_shared(small, SMALL_SHARED)?;
            allow_shared(small_and_deep, SMALL_SHARED)?;
            allow_shared(small_and_long, LONG_SHARED)?;
            Ok(Switch { large, small, small_and_deep, small_and_long })
        };
        let switch = [switch("f16")?, switch("bf16")?];
        let processors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let dense = |file: &str, name: &str, shared: u32| -> Result<Function> {
            let function = self.function(file, name)?;
            allow_shared(function, shared)?;
            Ok(function)
        };
        let shrink = |split: &str| dense("apply_shrink_sm90", &format!("apply_shrink_{split}_bf16_sm90"), LSW_SHRINK90_SHARED);
        let expand = |name: &str| dense("apply_expand_sm90", &format!("apply_{name}_bf16_sm90"), LSW_EXPAND90_SHARED);
        let apply = DenseApply { shrink: [shrink("2")?, shrink("4")?], expand: expand("expand")?, expand_any: expand("expand_any")? };
        Ok(Hopper { switch, apply, processors })
    }

    fn functions<const N: usize>(&self, file: &str, stem: &str, suffixes: [&str; N]) -> Result<[Function; N]> {
        let mut found = [ptr::null_mut(); N];
        for (slot, suffix) in found.iter_mut().zip(suffixes) {
            *slot = self.function(file, &format!("{stem}_{suffix}"))?;
        }
        Ok(found)
    }

    fn apply(&self, file: &str, suffix: &str) -> Result<Apply> {
        let function = |half: &str| self.function(file, &format!("apply_{half}_{suffix}"));
        Ok(Apply { shrink: function("shrink")?, expand: function("expand")? })
    }

    fn apply_few(&self, suffix: &str) -> Result<Few> {
        let Apply { shrink, expand } = self.apply("apply", suffix)?;
        let few = Few { shrink, expand, sum: self.function("apply", &format!("apply_sum_{suffix}"))? };
        for function in [few.expand, few.sum] {
            allow_shared(function, LSW_FEW_SHARED)?;
        }
        // A multiprocessor divides its memory anew only when it is empty: expand could not start beside shrink. A half has room for
        // two blocks of expand on Hopper; the rest is L1.
        let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        for function in [few.shrink, few.expand, few.sum] {
            // SAFETY: functions of a loaded module. In percent.
            unsafe { driver!(cuFuncSetAttribute(function, carveout, 50)) }?;
        }
        Ok(few)
    }

    fn routers<const N: usize>(&self, kind: &str, items: [u32; N]) -> Result<[[Function; 3]; N]> {
        let mut found = [[ptr::null_mut(); 3]; N];
        for (found, items) in found.iter_mut().zip(items) {
            *found = self.functions("route", &format!("route_{kind}_{items}"), ["f32", "f16", "bf16"])?;
        }
        Ok(found)
    }

    /// Kernels that ask for this much shared memory.
    fn functions_with_shared<const N: usize>(&self, file: &str, stem: &str, suffixes: [&str; N], bytes: u32) -> Result<[Function; N]> {
        let functions = self.functions(file, stem, suffixes)?;
        for function in functions {
            allow_shared(function, bytes)?;
        }
        Ok(functions)
    }

    fn kernels(&self) -> Result<Kernels> {
        let (floats, halves) = (["f32", "f16", "bf16"], ["f16", "bf16"]);
        Ok(Kernels {
            route: Routers {
                plain: self.routers("plain", PLAIN_ITEMS)?,
                scored: [
                    self.routers("softmax", SCORED_ITEMS)?,
                    self.routers("sigmoid", SCORED_ITEMS)?,
                    self.routers("sqrt_softplus", SCORED_ITEMS)?,
                ],
                grouped: self.functions("route", "route_grouped_8", floats)?,
            },
            gate: [self.functions("gate", "gate_plain", floats)?, self.functions("gate", "gate_scored", floats)?],
            gate_many: [
                self.functions_with_shared("gate", "gate_many_plain", halves, LSW_GATE_SHARED_MANY)?,
                self.functions_with_shared("gate", "gate_many_scored", halves, LSW_GATE_SHARED_MANY)?,
            ],
            gate_project: self.functions("gate", "gate_project", floats)?,
            gate_project_tile: self.functions_with_shared("gate", "gate_project_tile", halves, LSW_GATE_SHARED_TILE)?,
            status_take: self.function("status", "status_take")?,
            bank_set: self.function("bank", "bank_set")?,
            switch: self.functions("switch", "switch", floats)?,
            switch_current: self.function("switch", "switch_current")?,
            permute_count: self.function("permute", "permute_count")?,
            permute_scan: self.function("permute", "permute_scan")?,
            permute_scatter: self.function("permute", "permute_scatter")?,
            gather: self.functions("permute", "gather", ["16", "4", "2", "1"])?,
            combine: self.functions("permute", "combine", floats)?,
            apply_f32: self.apply("apply_f32", "f32")?,
            apply_few: [self.apply_few("f16")?, self.apply_few("bf16")?],
            apply_many: [self.apply("apply_mma", "many_f16")?, self.apply("apply_mma", "many_bf16")?],
            apply_strips: self.functions_with_shared("apply_mma", "apply_expand_strips", halves, strip_shared()?)?,
            apply_order: self.function("apply_mma", "apply_order")?,
            apply_add: self.functions("apply", "apply_add", floats)?,
            linear: [
                self.functions_with_shared("linear", "linear", floats, linear_shared()?)?,
                self.functions_with_shared("linear", "linear_one", floats, linear_shared()?)?,
            ],
            measure_scale: self.functions("measure", "measure_scale", floats)?,
            measure_fill: self.functions("measure", "measure_fill", floats)?,
            measure_read: self.function("measure", "measure_read")?,
            measure_repeat: self.function("measure", "measure_repeat")?,
            measure_fold: self.function("measure", "measure_fold")?,
        })
    }
}

/// A CUDA context with the kernels loaded.
pub(crate) struct Device {
    raw: sys::CUcontext,
    pub(super) kernels: Kernels,
    pub(super) hopper: Option<Hopper>,
    /// Blocks of the portable switch that fill the card, by dtype.
    pub(super) switch_blocks: [u32; 3],
    /// Blocks of `linear` that run at a time, for several tokens and for one, by dtype.
    pub(super) linear_blocks: [[u32; 3]; 2],
    /// The most shared memory of each.
    pub(super) linear_shared: u32,
    /// The most shared memory of `apply_strips`.
    pub(super) strip_shared: u32,
    /// Multiprocessors of the card.
    pub(super) processors: u32,
    /// Whether a kernel may start before the one before it has ended, and whether blocks may form clusters: from 9.0 on.
    pub(super) has_dependent_launch: bool,
    modules: Modules,
    /// The word that collects what `route` and `permute` find odd, and behind it what was taken from it last. None only while it is being
    /// dropped.
    odd: Option<DeviceMemory>,
    /// Held by who takes: there is one place for what is taken.
    taking: Mutex<()>,
    /// Keeps the context alive, where it is cudarc's. Dropped last.
    _owner: Option<Arc<CudaContext>>,
}

// SAFETY: handles of the driver, which is thread safe; calls make the context current for their own length.
unsafe impl Send for Device {}
// SAFETY: as above; nothing in it changes after creation.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({:p})", self.raw)
    }
}

/// Makes a context current on this thread for the length of a scope, and brings the former one back.
pub(super) struct Entered;

impl Entered {
    /// `context` is alive: the caller holds its device, or made it from a live context.
    fn new(context: sys::CUcontext) -> Result<Self> {
        // SAFETY: a live context.
        unsafe { driver!(cuCtxPushCurrent_v2(context)) }?;
        Ok(Self)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: pops what `new` pushed; a failure leaves nothing to do.
        let _ = unsafe { driver!(cuCtxPopCurrent_v2(&mut context)) };
    }
}

impl Device {
    pub fn primary(ordinal: usize) -> Result<Self> {
        if IMAGES.is_empty() {
            return Err(Error::NoKernels { why: BUILT_WITH });
        }
        probe()?;
        let mut count = 0;
        // SAFETY: a valid pointer.
        unsafe { driver!(cuDeviceGetCount(&mut count)) }?;
        if ordinal >= count as usize {
            return Err(Error::argument("ordinal", ordinal, format!("below {count}, the number of devices")));
        }
        // cudarc makes its context current and leaves it so: bring the caller's back.
        let mut before = ptr::null_mut();
        // SAFETY: a valid pointer.
        unsafe { driver!(cuCtxGetCurrent(&mut before)) }?;
        let context = CudaContext::new(ordinal);
        // SAFETY: the context that was current.
        unsafe { driver!(cuCtxSetCurrent(before)) }?;
        let context = context.map_err(|e| Error::Cuda { call: "cuDevicePrimaryCtxRetain", code: e.0 as u32 })?;
        Self::new(context.cu_ctx(), Some(context.clone()))
    }

    pub fn new(raw: sys::CUcontext, owner: Option<Arc<CudaContext>>) -> Result<Self> {
        if IMAGES.is_empty() {
            return Err(Error::NoKernels { why: BUILT_WITH });
        }
        if raw.is_null() {
            return Err(Error::argument("context", "null", "a CUcontext"));
        }
        probe()?;
        let _entered = Entered::new(raw)?;
        let capability = capability()?;
        let (is_hopper, has_dependent_launch) = (capability == (9, 0), capability >= (9, 0));
        let modules = Modules::load(is_hopper)?;
        let kernels = modules.kernels()?;
        let hopper = if is_hopper { Some(modules.hopper()?) } else { None };
        let switch_blocks = switch_blocks(&kernels)?;
        let (linear_blocks, linear_shared) = (linear_blocks(&kernels)?, linear_shared()?);
        let processors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let taking = Mutex::new(());
        let mut device = Self {
            raw,
            kernels,
            hopper,
            switch_blocks,
            linear_blocks,
            linear_shared,
            strip_shared: strip_shared()?,
            processors,
            has_dependent_launch,
            modules,
            odd: None,
            taking,
            _owner: owner,
        };
        let odd = DeviceMemory::new(&device, 16, &StateMemory::allocate())?;
        zero(&odd, 4)?;
        device.odd = Some(odd);
        Ok(device)
    }

    pub fn raw(&self) -> sys::CUcontext {
        self.raw
    }

    pub(super) fn enter(&self) -> Result<Entered> {
        Entered::new(self.raw)
    }

    pub(super) fn odd_word(&self) -> u64 {
        self.odd.as_ref().expect("set by new").addr()
    }

    /// Kernels on other streams may report meanwhile: what they say is taken now or stays.
    pub fn take_odd(&self, stream: &DeviceStream) -> Result<Odd> {
        let _entered = self.enter()?;
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let args = LswTakeArgs { word: self.odd_word(), taken: self.odd_word() + 4 };
        // SAFETY: two words of our own, and nobody else uses the second one while the lock is held.
        unsafe { launch(stream, self.kernels.status_take, Grid { blocks: 1, threads: 1, shared: 0 }, &args) }?;
        Ok(Odd(stream.read_u32(args.taken)?))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Ok(entered) = self.enter() {
            self.odd = None;
            for (_, module) in &self.modules.0 {
                // SAFETY: loaded by `new`, and whoever launched from it held this device.
                let _ = unsafe { driver!(cuModuleUnload(*module)) };
            }
            drop(entered);
        }
    }
}

fn attribute(attribute: sys::CUdevice_attribute) -> Result<i32> {
    let (mut device, mut value) = (0, 0);
    // SAFETY: valid pointers; a context is current.
    unsafe { driver!(cuCtxGetDevice(&mut device)) }?;
    // SAFETY: as above.
    unsafe { driver!(cuDeviceGetAttribute(&mut value, attribute, device)) }?;
    Ok(value)
}

/// Zeroes words and waits, on a stream of its own: while another thread captures, neither the context nor the legacy stream may be
/// waited for. The context must be current.
fn zero(memory: &DeviceMemory, words: usize) -> Result<()> {
    let mut stream = ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: a valid pointer; a context is current.
    unsafe { driver!(cuStreamCreate(&mut stream, flags)) }?;
    // SAFETY: the stream was just made, and the memory holds as many words.
    let filled = unsafe { driver!(cuMemsetD32Async(memory.addr(), 0, words, stream)) };
    // SAFETY: as above.
    let waited = unsafe { driver!(cuStreamSynchronize(stream)) };
    // SAFETY: as above; nothing uses it any more.
    let destroyed = unsafe { driver!(cuStreamDestroy_v2(stream)) };
    filled.and(waited).and(destroyed)
}

/// At least 8.0.
fn capability() -> Result<(i32, i32)> {
    use sys::CUdevice_attribute as A;
    let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if major < 8 {
        return Err(Error::NoDevice { why: format!("compute capability {major}.{minor} is below 8.0, the first that is supported") });
    }
    Ok((major, minor))
}

/// Raises a kernel's limit of dynamic shared memory.
fn allow_shared(function: Function, bytes: u32) -> Result<()> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: a function of a loaded module.
    unsafe { driver!(cuFuncSetAttribute(function, attribute, bytes as i32)) }
}

/// Allows the switch its shared memory and asks how many of its blocks the card holds at once.
fn switch_blocks(kernels: &Kernels) -> Result<[u32; 3]> {
    let mut blocks = [0; 3];
    for (((function, threads), shared), blocks) in kernels.switch.iter().zip(SWITCH_THREADS).zip(SWITCH_SHARED).zip(&mut blocks) {
        allow_shared(*function, shared)?;
        *blocks = resident_blocks(*function, threads, shared)?;
    }
    Ok(blocks)
}

/// What a block may have.
fn most_shared() -> Result<u32> {
    Ok(attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32)
}

/// What a block of `apply_strips` may ask for, beside what it has by itself.
fn strip_shared() -> Result<u32> {
    Ok(most_shared()? - 1024)
}

/// What a block of `linear` may have.
fn linear_shared() -> Result<u32> {
    Ok(LSW_LINEAR_SHARED_MAX.min(most_shared()?))
}

fn linear_blocks(kernels: &Kernels) -> Result<[[u32; 3]; 2]> {
    let shared = linear_shared()?;
    let mut blocks = [[0; 3]; 2];
    for (function, blocks) in kernels.linear.as_flattened().iter().zip(blocks.as_flattened_mut()) {
        *blocks = resident_blocks(*function, LSW_LINEAR_THREADS, shared)?;
    }
    Ok(blocks)
}

/// How many blocks the card holds at once.
fn resident_blocks(function: Function, threads: u32, shared: u32) -> Result<u32> {
    let processors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let mut each = 0;
    // SAFETY: a function of a loaded module, and a valid pointer.
    unsafe { driver!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut each, function, threads as i32, shared as usize)) }?;
    Ok((each.max(1) * processors) as u32)
}

/// A stream of a device: a raw handle, and its cudarc owner where it has one.
#[derive(Debug, Clone)]
pub(crate) struct DeviceStream {
    device: Arc<Device>,
    raw: sys::CUstream,
    owner: Option<Arc<CudaStream>>,
    /// Whether operations do without what only some cards have: for tests.
    pub portable: bool,
}

// SAFETY: a handle of the driver, which is thread safe.
unsafe impl Send for DeviceStream {}
// SAFETY: as above.
unsafe impl Sync for DeviceStream {}

impl DeviceStream {
    pub fn tracked(device: Arc<Device>, owner: Arc<CudaStream>) -> Self {
        Self { device, raw: owner.cu_stream(), owner: Some(owner), portable: false }
    }

    pub fn raw(device: Arc<Device>, raw: sys::CUstream) -> Self {
        Self { device, raw, owner: None, portable: false }
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub fn owner(&self) -> Option<&CudaStream> {
        self.owner.as_deref()
    }

    pub(super) fn handle(&self) -> sys::CUstream {
        self.raw
    }

    pub fn place(&self) -> Place {
        Place::Device { context: self.device.raw as usize, stream: self.owner.as_ref().map(|_| self.raw as usize) }
    }

    pub fn is_capturing(&self) -> Result<bool> {
        let _entered = self.device.enter()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a live stream of the current context, and a valid pointer.
        unsafe { driver!(cuStreamIsCapturing(self.raw, &mut status)) }?;
        Ok(status as u32 != 0)
    }

    /// Waits for the stream's work. The context must be current.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: a live stream of the current context.
        unsafe { driver!(cuStreamSynchronize(self.raw)) }
    }

    /// Copies to the device and waits. The context must be current.
    pub(super) fn write<T: Copy>(&self, addr: u64, data: &[T]) -> Result<()> {
        // SAFETY: `addr` is device memory that the caller sized for `data`; the wait below keeps `data` alive long enough.
        unsafe { driver!(cuMemcpyHtoDAsync_v2(addr, data.as_ptr().cast(), size_of_val(data), self.raw)) }?;
        self.synchronize()
    }

    /// Reads a word that work on this stream wrote, waiting for it. The context must be current.
    pub(super) fn read_u32(&self, addr: u64) -> Result<u32> {
        let mut word = 0u32;
        // SAFETY: `addr` is a word of our own; the wait below keeps `word` alive long enough.
        unsafe { driver!(cuMemcpyDtoHAsync_v2(ptr::from_mut(&mut word).cast(), addr, 4, self.raw)) }?;
        self.synchronize()?;
        Ok(word)
    }

    /// Fills a matrix with zeros, enqueued. The context must be current.
    pub(super) fn zero(&self, mat: &RawMat) -> Result<()> {
        let size = mat.dtype.size();
        let (pitch, width, rows) = ((mat.stride * size) as usize, (mat.cols * size) as usize, mat.rows as usize);
        // Of one row the stride is never used, and may be anything.
        let pitch = if rows == 1 { width } else { pitch };
        // SAFETY: a checked output in device memory, of these rows.
        unsafe { driver!(cuMemsetD2D8Async(mat.addr, pitch, 0, width, rows, self.raw)) }
    }

    /// Fills words, enqueued. The context must be current.
    pub(super) fn fill_u32(&self, addr: u64, value: u32, count: u64) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        // SAFETY: `addr` is device memory of ours of at least `count` words.
        unsafe { driver!(cuMemsetD32Async(addr, value, count as usize, self.raw)) }
    }
}
