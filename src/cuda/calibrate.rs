//! Memory, a stream and a clock, to calibrate a card: work is captured into a graph and timed between events, so that no time of the
//! host counts.

use super::context::{Device, DeviceStream, driver};
use super::memory::DeviceMemory;
use crate::error::{Error, Result};
use crate::memory::StateMemory;
use crate::stream::{Stream, StreamKind};
use cudarc::driver::{result, sys};
use std::ptr;
use std::sync::Arc;

/// The median of so many, behind one that warms up.
const REPETITIONS: usize = 7;

pub(crate) struct Bench {
    pub stream: Stream,
    device: Arc<Device>,
    memory: DeviceMemory,
    events: [sys::CUevent; 2],
    raw: sys::CUstream,
}

impl Bench {
    /// Much more than any cache holds.
    pub const BYTES: u64 = 1 << 30;

    pub fn new(device: &Arc<Device>) -> Result<Self> {
        let _entered = device.enter()?;
        let memory = DeviceMemory::new(device, Self::BYTES + 16, &StateMemory::allocate())?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a valid pointer; a context is current.
        unsafe { driver!(cuStreamCreate(&mut raw, flags)) }?;
        let stream = Stream(StreamKind::Cuda(DeviceStream::raw(device.clone(), raw)));
        // From here on, drop ends what there is.
        let mut bench = Self { stream, device: device.clone(), memory, events: [ptr::null_mut(); 2], raw };
        for event in &mut bench.events {
            // SAFETY: as above.
            unsafe { driver!(cuEventCreate(event, 0)) }?;
        }
        Ok(bench)
    }

    pub fn addr(&self) -> u64 {
        self.memory.addr()
    }

    /// Microseconds of all that `work` enqueues.
    pub fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        // A first launch may load what a capture forbids to load.
        work()?;
        let _entered = self.device.enter()?;
        let graph = Graph::capture(self.raw, work)?;
        let mut times = [0.0; REPETITIONS + 1];
        for us in &mut times {
            let [start, end] = self.events;
            // SAFETY: a live graph, live events and a live stream of the current context.
            unsafe {
                driver!(cuEventRecord(start, self.raw))?;
                driver!(cuGraphLaunch(graph.0, self.raw))?;
                driver!(cuEventRecord(end, self.raw))?;
                driver!(cuStreamSynchronize(self.raw))?;
            }
            // SAFETY: both events were recorded, and what they mark is over.
            let elapsed = unsafe { result::event::elapsed(start, end) };
            *us = f64::from(elapsed.map_err(|e| Error::Cuda { call: "cuEventElapsedTime", code: e.0 as u32 })?) * 1e3;
        }
        let times = &mut times[1..];
        times.sort_by(f64::total_cmp);
        Ok(times[REPETITIONS / 2])
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: made by `new` and destroyed once; the wait ends all work that uses them or the memory. Null events are none. Failures
        // leave nothing to do.
        unsafe {
            let _ = driver!(cuStreamSynchronize(self.raw));
            for event in self.events.into_iter().filter(|event| !event.is_null()) {
                let _ = driver!(cuEventDestroy_v2(event));
            }
            let _ = driver!(cuStreamDestroy_v2(self.raw));
        }
    }
}

struct Graph(sys::CUgraphExec);

impl Graph {
    /// The context must be current.
    fn capture(stream: sys::CUstream, work: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream of the current context.
        unsafe { driver!(cuStreamBeginCapture_v2(stream, mode)) }?;
        let captured = work();
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        // Ended after a failure too: the stream is of no use otherwise.
        // SAFETY: the capture was begun above; a valid pointer.
        unsafe { driver!(cuStreamEndCapture(stream, &mut graph)) }?;
        // SAFETY: the graph that the capture gave, destroyed once; the executable does not need it.
        let made = captured.and_then(|()| unsafe { driver!(cuGraphInstantiateWithFlags(&mut executable, graph, 0)) });
        // SAFETY: as above.
        unsafe { driver!(cuGraphDestroy(graph)) }?;
        made.map(|()| Self(executable))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, destroyed once; its launches are over.
        let _ = unsafe { driver!(cuGraphExecDestroy(self.0)) };
    }
}
