//! The device under test: its context, its one stream, memory, graphs.

use crate::peer::Cublas;
use crate::sensors::Sensors;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DriverError, result};
use lora_switch::{Context, DType, Mat, MatMut, Stream, measure};
use std::cell::OnceCell;
use std::fmt;
use std::sync::Arc;

/// Why there is no figure.
#[derive(Debug)]
pub enum Failure {
    /// The card cannot hold it.
    Skip(String),
    Broken(String),
}

pub type Result<T> = std::result::Result<T, Failure>;

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Skip(why) | Self::Broken(why)) = self;
        f.write_str(why)
    }
}
impl From<lora_switch::Error> for Failure {
    fn from(error: lora_switch::Error) -> Self {
        match error {
            lora_switch::Error::OutOfMemory { .. } => Self::Skip(error.to_string()),
            _ => Self::Broken(error.to_string()),
        }
    }
}
impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Broken(format!("{error:?}"))
    }
}
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

/// Bytes that a decode step of Llama-2-7B in 16 bits reads: what happens between two switches.
const STEP_BYTES: u64 = 2 * 6_476_005_376;

pub struct Lab {
    pub context: Context,
    pub stream: Stream,
    pub cuda: Arc<CudaStream>,
    pub gpu: String,
    pub sensors: Option<Sensors>,
    cublas: OnceCell<Option<Cublas>>,
    /// What a decode step reads, and where the reading ends up.
    step: OnceCell<(Buffer, Buffer)>,
}

impl Lab {
    /// Device 0.
    pub fn open() -> Result<Self> {
        // Ours first: it probes for libcuda, without which cudarc panics.
        let probe = Context::cuda(0)?;
        let cuda = CudaContext::new(0)?;
        // Before anything is allocated: cudarc's waits on events recorded outside a capture would break it.
        // SAFETY: all work goes to one stream.
        unsafe { cuda.disable_event_tracking() };
        let context = Context::from_cudarc(&cuda)?;
        drop(probe);
        let owner = cuda.new_stream()?;
        let stream = context.cuda_stream(&owner)?;
        context.warm(&stream)?;
        let sensors = Sensors::open(cuda.cu_device());
        if sensors.is_none() {
            println!("no clocks and no power: NVML cannot be loaded");
        }
        let gpu = cuda.name()?;
        Ok(Self { context, stream, cuda: owner, gpu, sensors, cublas: OnceCell::new(), step: OnceCell::new() })
    }

    pub fn synchronize(&self) -> Result<()> {
        Ok(self.cuda.synchronize()?)
    }

    /// The peer's library, loaded when first asked for; None, said once, where it is missing.
    pub fn cublas(&self) -> Option<&Cublas> {
        let open = || Cublas::open(self).inspect_err(|why| println!("no peer: {why}")).ok();
        self.cublas.get_or_init(open).as_ref()
    }

    pub fn buffer(&self, dtype: DType, len: u64) -> Result<Buffer> {
        let context = self.cuda.context().clone();
        context.bind_to_thread()?;
        let bytes = len * dtype.size();
        // SAFETY: the size is not zero.
        let addr = unsafe { result::malloc_sync(bytes.max(16) as usize) }.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                Failure::Skip(format!("no {:.2} GB of device memory to be had", bytes as f64 / 1e9))
            }
            other => other.into(),
        })?;
        Ok(Buffer { addr, dtype, len, ours: self.context.clone(), context })
    }

    /// `size` * uniform(-1, 1), made on the device.
    pub fn random(&self, dtype: DType, len: u64, size: f32, seed: u64) -> Result<Buffer> {
        let buffer = self.buffer(dtype, len)?;
        // Element i is a hash of seed + i: seeds far apart keep buffers from being shifted copies.
        measure::fill_random(&self.stream, seed << 40, size, &mut buffer.all_mut())?;
        Ok(buffer)
    }

    pub fn upload<T: Copy>(&self, dtype: DType, data: &[T]) -> Result<Buffer> {
        assert_eq!(dtype.size() as usize, size_of::<T>());
        let buffer = self.buffer(dtype, data.len() as u64)?;
        // SAFETY: the buffer was made for `data`, and nothing uses it yet.
        unsafe { result::memcpy_htod_sync(buffer.addr, data) }?;
        Ok(buffer)
    }

    /// The bits of elements, after all work on the stream.
    pub fn download(&self, buffer: &Buffer, at: u64, len: u64) -> Result<Vec<u32>> {
        self.synchronize()?;
        let size = buffer.dtype.size() as usize;
        let mut bytes = vec![0u8; len as usize * size];
        // SAFETY: `address` checked that the elements are there.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, buffer.address(at, len)) }?;
        let bits = |element: &[u8]| element.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
        Ok(bytes.chunks_exact(size).map(bits).collect())
    }

    /// Records what `work` enqueues.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        self.synchronize()?;
        self.cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let done = work();
        let graph = self.cuda.end_capture(CUgraphInstantiate_flags(0));
        done?;
        let graph = graph?.ok_or_else(|| Failure::Broken("nothing was captured".into()))?;
        graph.upload()?;
        Ok(graph)
    }

    /// Enqueues a pass over other memory, as the decode step between two switches is one.
    pub fn read_step(&self) -> Result<()> {
        let (step, sink) = self.step()?;
        Ok(measure::read(&self.stream, &step.all(), &mut sink.all_mut())?)
    }

    fn step(&self) -> Result<&(Buffer, Buffer)> {
        if let Some(step) = self.step.get() {
            return Ok(step);
        }
        let step = self.random(DType::Bf16, STEP_BYTES / 2, 0.02, 99)?;
        Ok(self.step.get_or_init(|| (step, self.upload(DType::I32, &[0i32]).expect("four bytes"))))
    }
}

/// Device memory of one element type. Its views are for the lab's stream, which orders all work on it.
pub struct Buffer {
    addr: u64,
    pub dtype: DType,
    pub len: u64,
    ours: Context,
    context: Arc<CudaContext>,
}

impl Buffer {
    /// Of element `at`, behind which `len` must fit.
    pub fn address(&self, at: u64, len: u64) -> u64 {
        assert!(at + len <= self.len, "{at} + {len} of {}", self.len);
        self.addr + at * self.dtype.size()
    }

    /// Elements as a vector.
    pub fn part(&self, at: u64, len: u64) -> Mat<'_> {
        // SAFETY: elements of this buffer (`address` checks), which waits for all work before it is freed.
        unsafe { Mat::raw(&self.ours, self.address(at, len), self.dtype, 1, len, len) }
    }

    pub fn part_mut(&self, at: u64, len: u64) -> MatMut<'_> {
        // SAFETY: as above; one stream orders whoever else uses the elements.
        unsafe { MatMut::raw(&self.ours, self.address(at, len), self.dtype, 1, len, len) }
    }

    /// All elements as a matrix.
    pub fn rows(&self, rows: u64) -> Mat<'_> {
        let cols = self.len / rows;
        // SAFETY: as for `part`.
        unsafe { Mat::raw(&self.ours, self.address(0, rows * cols), self.dtype, rows, cols, cols) }
    }

    pub fn rows_mut(&self, rows: u64) -> MatMut<'_> {
        let cols = self.len / rows;
        // SAFETY: as for `part_mut`.
        unsafe { MatMut::raw(&self.ours, self.address(0, rows * cols), self.dtype, rows, cols, cols) }
    }

    pub fn all(&self) -> Mat<'_> {
        self.part(0, self.len)
    }

    pub fn all_mut(&self) -> MatMut<'_> {
        self.part_mut(0, self.len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // A failure was, or will be, reported by whoever uses the stream.
        let _ = self.context.synchronize();
        // SAFETY: allocated by `Lab::buffer`, freed once; nothing is in flight any more.
        let _ = unsafe { result::free_sync(self.addr) };
    }
}
