//! Backends under test and memory with canaries.

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use lora_switch::{Context, DType, Mat, MatMut, Stream, SwitchKernels, Tensor, Weight};
use std::cell::UnsafeCell;
use std::sync::{Arc, OnceLock};

pub use crate::values::{Rng, decode, encode};

/// Stamps properties `fn name(&Backend)` over the backends.
macro_rules! on_backends {
    ($($name:ident),* $(,)?) => {
        mod cpu {
            $(#[test]
            fn $name() {
                super::$name(&$crate::common::Backend::cpu());
            })*
        }
        mod cuda {
            $(#[test]
            fn $name() {
                if let Some(backend) = $crate::common::Backend::cuda() {
                    super::$name(&backend);
                }
            })*
        }
    };
}

/// As `on_backends!`, and each other kernel of the switch on a card that has several.
macro_rules! on_paths {
    ($($name:ident),* $(,)?) => {
        on_backends!($($name),*);
        mod cuda_portable {
            $(#[test]
            fn $name() {
                if let Some(backend) = $crate::common::Backend::cuda() {
                    super::$name(&$crate::common::Backend { kernels: lora_switch::SwitchKernels::Portable, ..backend });
                }
            })*
        }
        mod cuda_large {
            $(#[test]
            fn $name() {
                if let Some(backend) = $crate::common::Backend::cuda() {
                    super::$name(&$crate::common::Backend { kernels: lora_switch::SwitchKernels::Large, ..backend });
                }
            })*
        }
    };
}

/// Whether a switch of the environment is on.
pub fn is_set(name: &str) -> bool {
    std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0")
}

/// Says aloud which tool this machine lacks for a test. Where the tools are required, that is a failure.
pub fn skip(why: &str) {
    assert!(!is_set("LORA_SWITCH_REQUIRE_NVCC"), "LORA_SWITCH_REQUIRE_NVCC is set, but {why}");
    eprintln!("skipped: {why}");
}

/// A backend with a stream of its own.
#[derive(Clone)]
pub struct Backend {
    /// Of the switch.
    pub kernels: SwitchKernels,
    pub context: Context,
    pub stream: Stream,
    pub cuda: Option<Arc<CudaStream>>,
}

/// The device's contexts, cudarc's and ours, made once; or why there is none.
fn device() -> &'static Result<(Arc<CudaContext>, Context), String> {
    static DEVICE: OnceLock<Result<(Arc<CudaContext>, Context), String>> = OnceLock::new();
    DEVICE.get_or_init(|| {
        // Ours first: it probes for libcuda, without which cudarc panics.
        Context::cuda(0).map_err(|e| e.to_string())?;
        let cuda = CudaContext::new(0).map_err(|e| e.to_string())?;
        // SAFETY: each test orders its work on one stream of its own.
        unsafe { cuda.disable_event_tracking() };
        let context = Context::from_cudarc(&cuda).map_err(|e| e.to_string())?;
        Ok((cuda, context))
    })
}

impl Backend {
    pub fn cpu() -> Self {
        Self::cpu_with(2)
    }

    pub fn cpu_with(threads: usize) -> Self {
        let context = Context::cpu(threads).unwrap();
        Self { stream: context.cpu_stream().unwrap(), context, cuda: None, kernels: SwitchKernels::Best }
    }

    /// None, said aloud, where there is no GPU; a panic where one is required.
    pub fn cuda() -> Option<Self> {
        match device() {
            Ok((cuda, context)) => {
                let stream = cuda.new_stream().unwrap();
                let ours = context.cuda_stream(&stream).unwrap();
                Some(Self { context: context.clone(), stream: ours, cuda: Some(stream), kernels: SwitchKernels::Best })
            }
            Err(why) => {
                assert!(!is_set("LORA_SWITCH_REQUIRE_GPU"), "LORA_SWITCH_REQUIRE_GPU is set, but {why}");
                eprintln!("skipped: needs a GPU ({why})");
                None
            }
        }
    }

    /// With a context of its own: it is told of no other test's odd values, nor another of its.
    pub fn alone(&self) -> Self {
        let Some(cuda) = &self.cuda else { return self.clone() };
        let context = Context::from_cudarc(cuda.context()).unwrap();
        Self { stream: context.cuda_stream(cuda).unwrap(), context, ..self.clone() }
    }

    /// Every backend that is here, with its name.
    pub fn all() -> Vec<(&'static str, Self)> {
        [("cpu", Some(Self::cpu())), ("cuda", Self::cuda())].into_iter().filter_map(|(n, b)| Some((n, b?))).collect()
    }

    pub fn synchronize(&self) {
        if let Some(stream) = &self.cuda {
            stream.synchronize().unwrap();
        }
    }
}

/// What lies around and between the rows of every test matrix. As any float type it is an ordinary number; as an id it is absurd.
const CANARY: u8 = 0xa5;
const RIM: usize = 128;

enum Memory {
    /// Cells: the backend writes them by address while they are shared.
    Host(Box<[UnsafeCell<u128>]>),
    Device(CudaSlice<u8>),
}

/// A matrix in memory of a backend, with canaries before, after and between its rows, `shift` elements off a 16-byte boundary.
pub struct Grid {
    backend: Backend,
    memory: Memory,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
    start: usize,
    gap: u8,
}

/// A matrix's shape in memory.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub stride: usize,
    pub shift: usize,
}

impl Layout {
    pub fn dense(cols: usize) -> Self {
        Self { stride: cols, shift: 0 }
    }
}

impl Grid {
    /// `bits` are the elements' bit patterns, zero-extended.
    pub fn new(backend: &Backend, dtype: DType, rows: usize, cols: usize, layout: Layout, bits: &[u32]) -> Self {
        Self::with_gap(backend, dtype, rows, cols, layout, CANARY, bits)
    }

    /// With another byte in the gaps: 0xff makes NaNs of them.
    pub fn with_gap(backend: &Backend, dtype: DType, rows: usize, cols: usize, layout: Layout, gap: u8, bits: &[u32]) -> Self {
        assert!(bits.len() == rows * cols && (rows < 2 || layout.stride >= cols));
        let size = dtype.size() as usize;
        let start = RIM + layout.shift * size;
        let span = if rows == 0 { 0 } else { ((rows - 1) * layout.stride + cols) * size };
        let mut bytes = vec![gap; (start + span + RIM).next_multiple_of(16)];
        for r in 0..rows {
            for c in 0..cols {
                let at = start + (r * layout.stride + c) * size;
                bytes[at..at + size].copy_from_slice(&bits[r * cols + c].to_le_bytes()[..size]);
            }
        }
        let memory = match &backend.cuda {
            None => Memory::Host(bytes.chunks(16).map(|c| UnsafeCell::new(u128::from_ne_bytes(c.try_into().unwrap()))).collect()),
            Some(stream) => Memory::Device(stream.clone_htod(&bytes).unwrap()),
        };
        Self { backend: backend.clone(), memory, dtype, rows, cols, stride: layout.stride, start, gap }
    }

    /// An output: all canaries, so that an element that is not written stands out.
    pub fn poisoned(backend: &Backend, dtype: DType, rows: usize, cols: usize, layout: Layout) -> Self {
        let poison = u32::from_le_bytes([CANARY; 4]) & mask(dtype);
        Self::new(backend, dtype, rows, cols, layout, &vec![poison; rows * cols])
    }

    /// A vector of ids.
    pub fn ids(backend: &Backend, ids: &[i32]) -> Self {
        let bits: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        Self::new(backend, DType::I32, 1, ids.len(), Layout::dense(ids.len()), &bits)
    }

    /// A vector of f32.
    pub fn floats(backend: &Backend, x: &[f32]) -> Self {
        let bits: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
        Self::new(backend, DType::F32, 1, x.len(), Layout::dense(x.len()), &bits)
    }

    pub fn addr(&self) -> u64 {
        let base = match (&self.memory, &self.backend.cuda) {
            (Memory::Host(words), _) => words.as_ptr() as u64,
            (Memory::Device(slice), Some(stream)) => slice.device_ptr(stream).0,
            _ => unreachable!(),
        };
        base + self.start as u64
    }

    fn bytes(&self) -> Vec<u8> {
        match (&self.memory, &self.backend.cuda) {
            // SAFETY: calls of the CPU backend are over when they return, so nobody writes now.
            (Memory::Host(words), _) => words.iter().flat_map(|w| unsafe { *w.get() }.to_ne_bytes()).collect(),
            (Memory::Device(slice), Some(stream)) => {
                let bytes = stream.clone_dtoh(slice).unwrap();
                stream.synchronize().unwrap();
                bytes
            }
            _ => unreachable!(),
        }
    }

    /// Overwrites the elements in stream order.
    pub fn set_bits(&mut self, bits: &[u32]) {
        let layout = Layout { stride: self.stride, shift: (self.start - RIM) / self.dtype.size() as usize };
        let fresh = Self::with_gap(&self.backend, self.dtype, self.rows, self.cols, layout, self.gap, bits);
        match (&mut self.memory, &fresh.memory, &self.backend.cuda) {
            (Memory::Host(old), Memory::Host(new), _) => {
                for (old, new) in old.iter_mut().zip(new) {
                    // SAFETY: `new` is ours alone.
                    *old.get_mut() = unsafe { *new.get() };
                }
            }
            (Memory::Device(old), Memory::Device(new), Some(stream)) => stream.memcpy_dtod(new, old).unwrap(),
            _ => unreachable!(),
        }
        self.backend.synchronize();
    }

    /// The elements' bits, after a check that no canary was touched.
    pub fn bits(&self) -> Vec<u32> {
        let bytes = self.bytes();
        let size = self.dtype.size() as usize;
        let mut bits = Vec::with_capacity(self.rows * self.cols);
        let mut is_element = vec![false; bytes.len()];
        for r in 0..self.rows {
            for c in 0..self.cols {
                let at = self.start + (r * self.stride + c) * size;
                is_element[at..at + size].fill(true);
                let mut word = [0; 4];
                word[..size].copy_from_slice(&bytes[at..at + size]);
                bits.push(u32::from_le_bytes(word));
            }
        }
        for (at, (byte, is_element)) in bytes.iter().zip(is_element).enumerate() {
            assert!(is_element || *byte == self.gap, "byte {at} around the matrix was overwritten with {byte:#x}");
        }
        bits
    }

    pub fn values(&self) -> Vec<f64> {
        self.bits().iter().map(|&b| decode(self.dtype, b)).collect()
    }

    pub fn i32s(&self) -> Vec<i32> {
        self.bits().iter().map(|&b| b as i32).collect()
    }

    pub fn mat(&self) -> Mat<'_> {
        let (rows, cols, stride) = (self.rows as u64, self.cols as u64, self.stride as u64);
        // SAFETY: this grid's memory, which outlives the call that the view is made for; tests order all work on one stream.
        unsafe { Mat::raw(&self.backend.context, self.addr(), self.dtype, rows, cols, stride) }
    }

    pub fn mat_mut(&mut self) -> MatMut<'_> {
        let (rows, cols, stride) = (self.rows as u64, self.cols as u64, self.stride as u64);
        // SAFETY: as above.
        unsafe { MatMut::raw(&self.backend.context, self.addr(), self.dtype, rows, cols, stride) }
    }

    /// SAFETY contract of the test: the grid outlives every object that gets the tensor.
    pub fn tensor(&self) -> Tensor {
        let (rows, cols, stride) = (self.rows as u64, self.cols as u64, self.stride as u64);
        // SAFETY: tests keep grids alive longer than the sets and banks that use them.
        unsafe { Tensor::from_raw(&self.backend.context, self.addr(), self.dtype, rows, cols, stride) }
    }

    pub fn weight(&self) -> Weight {
        let (rows, cols, stride) = (self.rows as u64, self.cols as u64, self.stride as u64);
        // SAFETY: as for `tensor`.
        unsafe { Weight::from_raw(&self.backend.context, self.addr(), self.dtype, rows, cols, stride) }
    }
}

fn mask(dtype: DType) -> u32 {
    match dtype.size() {
        4 => u32::MAX,
        2 => 0xffff,
        _ => 0xff,
    }
}

pub const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Cases of a property: fewer where each is slow.
pub fn cases(n: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config { cases: n, failure_persistence: None, ..Default::default() }
}
