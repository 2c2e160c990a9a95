//! Where the work runs: a context, its stream, memory there, and a clock for it.

use crate::Failure;
use crate::args::Choice;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, ValidAsZeroBits, sys};
use lora_switch::{Context, Element, Error, Mat, MatMut, Stream, Tensor};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// An element that both the crate and cudarc know.
pub trait Scalar: Element + DeviceRepr + ValidAsZeroBits + Default {}
impl<T: Element + DeviceRepr + ValidAsZeroBits + Default> Scalar for T {}

pub struct Machine {
    pub context: Context,
    pub stream: Stream,
    /// What the stream is made from, on a GPU.
    pub cuda: Option<Arc<CudaStream>>,
    /// "cpu" or "cuda".
    pub backend: &'static str,
    /// The device, in words.
    pub name: String,
    /// Why it is not the GPU that would have been preferred.
    pub no_gpu: Option<String>,
}

impl Machine {
    /// The backend asked for; with `auto` and no GPU, the CPU and why.
    pub fn open(choice: Choice, threads: usize) -> Result<Self, Failure> {
        if choice == Choice::Cpu {
            return Self::cpu(threads);
        }
        // First this, which tells what is missing where cudarc would panic. Kept until cudarc holds the
        // device too.
        match Context::cuda(0) {
            Ok(_open) => Self::cuda(),
            Err(why @ (Error::NoDevice { .. } | Error::NoKernels { .. })) if choice == Choice::Auto => {
                Ok(Self { no_gpu: Some(why.to_string()), ..Self::cpu(threads)? })
            }
            Err(why) => Err(why.into()),
        }
    }

    fn cpu(threads: usize) -> Result<Self, Failure> {
        let context = Context::cpu(threads)?;
        let stream = context.cpu_stream()?;
        let name = match threads {
            0 => "a thread a core".into(),
            1 => "1 thread".into(),
            n => format!("{n} threads"),
        };
        Ok(Self { context, stream, cuda: None, backend: "cpu", name, no_gpu: None })
    }

    fn cuda() -> Result<Self, Failure> {
        let cuda = CudaContext::new(0)?;
        // Before anything is allocated: a wait on an event from outside would break the capture of a graph.
        // SAFETY: all work goes to one stream.
        unsafe { cuda.disable_event_tracking() };
        let context = Context::from_cudarc(&cuda)?;
        let owner = cuda.new_stream()?;
        let stream = context.cuda_stream(&owner)?;
        context.warm(&stream)?;
        Ok(Self { context, stream, cuda: Some(owner), backend: "cuda", name: cuda.name()?, no_gpu: None })
    }

    /// Elements of zeros.
    pub fn zeros<T: Scalar>(&self, len: usize) -> Result<Buffer<T>, Failure> {
        let Some(stream) = &self.cuda else {
            // Aligned to 16 bytes, as malloc's memory is, which the floor asks for.
            return Ok(Buffer::Host(vec![T::default(); len]));
        };
        let gigabytes = (len * size_of::<T>()) as f64 / 1e9;
        let failed = |e: DriverError| Failure::Run(format!("no {gigabytes:.2} GB of device memory could be had: {e}"));
        Ok(Buffer::Cuda(stream.alloc_zeros(len).map_err(failed)?))
    }

    pub fn synchronize(&self) -> Result<(), Failure> {
        match &self.cuda {
            Some(stream) => Ok(stream.synchronize()?),
            None => Ok(()),
        }
    }
}

/// Memory of a machine: an engine has the like. The crate sees it through views.
pub enum Buffer<T> {
    Host(Vec<T>),
    Cuda(CudaSlice<T>),
}

impl<T: Scalar> Buffer<T> {
    pub fn len(&self) -> usize {
        match self {
            Self::Host(data) => data.len(),
            Self::Cuda(data) => data.len(),
        }
    }

    /// All of it, as a vector to read.
    pub fn vector<'a>(&'a self, stream: &'a Stream) -> Result<Mat<'a>, Failure> {
        Ok(match self {
            Self::Host(data) => Mat::host(data, 1, data.len())?,
            Self::Cuda(data) => Mat::cuda(data, stream, 1, data.len(), data.len())?,
        })
    }

    /// All of it, as a vector to write.
    pub fn vector_mut<'a>(&'a mut self, stream: &'a Stream) -> Result<MatMut<'a>, Failure> {
        let len = self.len();
        Ok(match self {
            Self::Host(data) => MatMut::host(data, 1, len)?,
            Self::Cuda(data) => MatMut::cuda(data, stream, 1, len, len)?,
        })
    }

    /// Gives it away as a matrix that an object keeps.
    pub fn into_tensor(self, rows: usize, cols: usize, stride: usize) -> Result<Tensor, Failure> {
        Ok(match self {
            Self::Host(data) => Tensor::from_vec_strided(data, rows, cols, stride)?,
            Self::Cuda(data) => Tensor::from_cuda(data, rows, cols, stride)?,
        })
    }

    /// Where it begins: a host or a device address.
    pub fn addr(&mut self) -> u64 {
        match self {
            Self::Host(data) => data.as_mut_ptr() as u64,
            Self::Cuda(data) => data.device_ptr(data.stream()).0,
        }
    }

    /// What stands there once the stream's work is done.
    pub fn read(&self, range: Range<usize>) -> Result<Cow<'_, [T]>, Failure> {
        match self {
            Self::Host(data) => Ok(Cow::Borrowed(&data[range])),
            Self::Cuda(data) => {
                let copy = data.stream().clone_dtoh(&data.slice(range))?;
                data.stream().synchronize()?;
                Ok(Cow::Owned(copy))
            }
        }
    }

    /// Overwrites elements, in stream order.
    pub fn write(&mut self, at: usize, values: &[T]) -> Result<(), Failure> {
        match self {
            Self::Host(data) => data[at..at + values.len()].copy_from_slice(values),
            Self::Cuda(data) => {
                let stream = data.stream().clone();
                stream.memcpy_htod(values, &mut data.slice_mut(at..at + values.len()))?;
            }
        }
        Ok(())
    }
}

/// Before and after each of a token's three steps.
const MARKS: usize = 4;

/// Marks on a stream's timeline. Calls on the CPU return when the work is done, so there the time of day will
/// do.
pub enum Clock {
    Host([Instant; MARKS]),
    Cuda(Arc<CudaStream>, Vec<CudaEvent>),
}

impl Clock {
    pub fn new(machine: &Machine) -> Result<Self, Failure> {
        let Some(stream) = &machine.cuda else { return Ok(Self::Host([Instant::now(); MARKS])) };
        // Without flags, cudarc makes events that keep no time.
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = |_| stream.context().new_event(flags);
        Ok(Self::Cuda(stream.clone(), (0..MARKS).map(event).collect::<Result<_, _>>()?))
    }

    pub fn mark(&mut self, which: usize) -> Result<(), Failure> {
        match self {
            Self::Host(times) => times[which] = Instant::now(),
            Self::Cuda(stream, events) => events[which].record(stream)?,
        }
        Ok(())
    }

    /// Microseconds from one mark to another, to the nanosecond. Waits for both.
    pub fn us(&self, from: usize, to: usize) -> Result<f64, Failure> {
        let ns = match self {
            Self::Host(times) => times[to].duration_since(times[from]).as_secs_f64() * 1e9,
            Self::Cuda(_, events) => f64::from(events[from].elapsed_ms(&events[to])?) * 1e6,
        };
        Ok(ns.round() / 1e3)
    }
}
