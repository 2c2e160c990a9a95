//! Contexts choose the backend; streams order the work.

use crate::check::narrow;
use crate::cpu::Pool;
use crate::cuda::{Device, DeviceStream};
use crate::error::{Error, Result};
use crate::view::Place;
use cudarc::driver::{CudaContext, CudaStream};
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

/// What a device found odd in memory that it was given: values there are never errors. Sticky: [`Stream::take_odd`] clears what it
/// reads; what a [`SwitchSet`](crate::SwitchSet) met stays until its next `invalidate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Odd(pub(crate) u32);

impl Odd {
    /// `route` met a NaN or +inf logit, or a row with nothing finite.
    pub const LOGITS: Self = Self(crate::cuda::args::LSW_ODD_LOGITS);
    /// `permute` met an id below -1 or past the last expert.
    pub const ID: Self = Self(crate::cuda::args::LSW_ODD_ID);
    /// A switch or `apply` met an id below -1 or past the last slot.
    pub const ROUTE_ID: Self = Self(crate::cuda::args::LSW_ODD_ROUTE_ID);
    /// A switch or `apply` met a coefficient that is not finite (in place, also one of 2^126 or more in magnitude).
    pub const COEFFICIENT: Self = Self(crate::cuda::args::LSW_ODD_COEFFICIENT);
    /// A set in place holds the product of an adapter that has been replaced; its targets were left as they are.
    pub const STALE_MERGE: Self = Self(crate::cuda::args::LSW_STALE_MERGE);

    /// The bits, as the C header numbers them.
    pub const fn bits(self) -> u32 {
        self.0
    }
    /// Whether nothing was odd.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
    /// Whether all of `other`'s bits are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl fmt::Display for Odd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = [
            (Self::LOGITS, "logits that are NaN or +inf, or a row with nothing finite"),
            (Self::ID, "an expert id out of range"),
            (Self::ROUTE_ID, "a slot id out of range"),
            (Self::COEFFICIENT, "a coefficient that is not finite"),
            (Self::STALE_MERGE, "a merged adapter was replaced before it was unmerged"),
        ];
        let found: Vec<&str> = texts.iter().filter(|(bit, _)| self.contains(*bit)).map(|(_, text)| *text).collect();
        f.write_str(if found.is_empty() { "nothing odd".into() } else { found.join("; ") }.as_str())
    }
}

/// A backend, ready: the CPU with a number of threads, or a CUDA context with the kernels loaded. A clone is another handle.
#[derive(Debug, Clone)]
pub struct Context(pub(crate) ContextKind);

#[derive(Debug, Clone)]
pub(crate) enum ContextKind {
    Cpu(Arc<Pool>),
    Cuda(Arc<Device>),
}

impl Context {
    /// The CPU backend with this many threads, at most 1024: 0 = one a core, 1 = the calling thread alone.
    ///
    /// # Errors
    /// On too many threads, or where they cannot be started.
    pub fn cpu(threads: usize) -> Result<Self> {
        narrow("threads", threads as u64, 1024)?;
        Ok(Self(ContextKind::Cpu(Arc::new(Pool::new(threads)?))))
    }

    /// The CUDA backend on a device's primary context, which PyTorch and the CUDA runtime use too. Loads the kernels.
    ///
    /// # Errors
    /// [`Error::NoKernels`] in a build without nvcc; [`Error::NoDevice`] without a driver or device.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self(ContextKind::Cuda(Arc::new(Device::primary(ordinal)?))))
    }

    /// The CUDA backend on an engine's cudarc context.
    ///
    /// # Errors
    /// As for [`Context::cuda`].
    pub fn from_cudarc(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self(ContextKind::Cuda(Arc::new(Device::new(context.cu_ctx(), Some(context.clone()))?))))
    }

    /// The CUDA backend on an engine's own `CUcontext`.
    ///
    /// # Errors
    /// As for [`Context::cuda`].
    ///
    /// # Safety
    /// `context` is a live `CUcontext`, and stays so until this context and everything made from it are gone.
    pub unsafe fn from_raw_cuda(context: *mut c_void) -> Result<Self> {
        Ok(Self(ContextKind::Cuda(Arc::new(Device::new(context.cast(), None)?))))
    }

    /// The CPU's stream: calls on it return when the work is done.
    ///
    /// # Errors
    /// On a CUDA context.
    pub fn cpu_stream(&self) -> Result<Stream> {
        match &self.0 {
            ContextKind::Cpu(pool) => Ok(Stream(StreamKind::Cpu(pool.clone()))),
            ContextKind::Cuda(_) => Err(Error::argument("context", "a CUDA context", "a CPU context")),
        }
    }

    /// A cudarc stream. Calls on it enqueue work and return.
    ///
    /// # Errors
    /// On a CPU context, or where the stream belongs to another context.
    pub fn cuda_stream(&self, stream: &Arc<CudaStream>) -> Result<Stream> {
        let device = self.device()?;
        if stream.context().cu_ctx() != device.raw() {
            return Err(Error::argument("stream", "a stream of another CUDA context", "one of this context"));
        }
        Ok(Stream(StreamKind::Cuda(DeviceStream::tracked(device, stream.clone()))))
    }

    /// A `CUstream` by its handle; null is CUDA's legacy default stream. On a CPU context the handle is ignored.
    ///
    /// # Safety
    /// The stream belongs to this context and outlives what is made from it. Device memory that calls on it touch is ordered by the
    /// caller.
    pub unsafe fn raw_stream(&self, stream: *mut c_void) -> Stream {
        Stream(match &self.0 {
            ContextKind::Cpu(pool) => StreamKind::Cpu(pool.clone()),
            ContextKind::Cuda(device) => StreamKind::Cuda(DeviceStream::raw(device.clone(), stream.cast())),
        })
    }

    /// Launches every kernel once with nothing to do, so that no later launch is a first one (a captured one, say).
    ///
    /// # Errors
    /// On a stream of another context, or where a launch fails.
    pub fn warm(&self, stream: &Stream) -> Result<()> {
        match (&self.0, &stream.0) {
            (ContextKind::Cpu(_), StreamKind::Cpu(_)) => Ok(()),
            (ContextKind::Cuda(device), StreamKind::Cuda(stream)) if device.raw() == stream.device().raw() => crate::cuda::warm(stream),
            _ => Err(Error::argument("stream", "of another context", "of this context")),
        }
    }

    fn device(&self) -> Result<Arc<Device>> {
        match &self.0 {
            ContextKind::Cuda(device) => Ok(device.clone()),
            ContextKind::Cpu(_) => Err(Error::argument("context", "a CPU context", "a CUDA context")),
        }
    }

    pub(crate) fn place(&self) -> Place {
        match &self.0 {
            ContextKind::Cpu(_) => Place::Host,
            ContextKind::Cuda(device) => Place::Device { context: device.raw() as usize, stream: None },
        }
    }
}

/// Where work goes. On CUDA, calls enqueue and return; order between streams is the caller's.
#[derive(Debug, Clone)]
pub struct Stream(pub(crate) StreamKind);

#[derive(Debug, Clone)]
pub(crate) enum StreamKind {
    Cpu(Arc<Pool>),
    Cuda(DeviceStream),
}

impl Stream {
    /// The context that the stream belongs to.
    pub fn context(&self) -> Context {
        Context(match &self.0 {
            StreamKind::Cpu(pool) => ContextKind::Cpu(pool.clone()),
            StreamKind::Cuda(stream) => ContextKind::Cuda(stream.device().clone()),
        })
    }

    /// The same stream without what only some cards have, for operations that have another way: for tests.
    #[doc(hidden)]
    pub fn portable(mut self) -> Self {
        if let StreamKind::Cuda(stream) = &mut self.0 {
            stream.portable = true;
        }
        self
    }

    /// Reads and clears what `route`, `permute` and `apply` found odd on this context. Synchronises the stream.
    ///
    /// # Errors
    /// Where the stream's work failed.
    pub fn take_odd(&self) -> Result<Odd> {
        match &self.0 {
            StreamKind::Cpu(pool) => Ok(pool.take_odd()),
            StreamKind::Cuda(stream) => stream.device().take_odd(stream),
        }
    }

    pub(crate) fn same_context(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (StreamKind::Cpu(_), StreamKind::Cpu(_)) => true,
            (StreamKind::Cuda(a), StreamKind::Cuda(b)) => a.device().raw() == b.device().raw(),
            _ => false,
        }
    }

    pub(crate) fn place(&self) -> Place {
        match &self.0 {
            StreamKind::Cpu(_) => Place::Host,
            StreamKind::Cuda(stream) => stream.place(),
        }
    }

    /// An object that owns memory through cudarc works on that memory's stream alone. A raw stream is the affair of who made it.
    pub(crate) fn check_tie(&self, tied_to: Option<usize>, whose: &str) -> Result<()> {
        match (tied_to, self.place()) {
            (Some(own), Place::Device { stream: Some(given), .. }) if own != given => {
                Err(Error::argument("stream", format!("{given:#x}"), format!("the stream of the {whose}, {own:#x}")))
            }
            _ => Ok(()),
        }
    }

    /// For a cudarc slice of stream `data` that work on self will touch: the stream to synchronise it with, and its place.
    pub(crate) fn tracked<'s>(&'s self, name: &str, data: &Arc<CudaStream>) -> Result<(&'s CudaStream, Place)> {
        let StreamKind::Cuda(stream) = &self.0 else {
            return Err(Error::argument(name, "a CPU stream", "the CUDA stream of the slice"));
        };
        let owner = stream.owner().ok_or_else(|| Error::argument(name, "a raw stream", "made from a cudarc stream"))?;
        if owner.cu_stream() != data.cu_stream() || owner.context().cu_ctx() != data.context().cu_ctx() {
            return Err(Error::argument(name, format!("{:p}", owner.cu_stream()), format!("the slice's own, {:p}", data.cu_stream())));
        }
        // Inside a capture, cudarc's wait on an event from outside would break the capture.
        if owner.context().is_managing_stream_synchronization() && stream.is_capturing()? {
            let bound = "a context with cudarc's event tracking off (disable_event_tracking before anything is allocated)";
            return Err(Error::argument(name, "capturing with event tracking on", bound));
        }
        Ok((owner, stream.place()))
    }
}
