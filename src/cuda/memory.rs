//! Device memory for tables.

use super::context::{Device, driver};
use crate::error::{Error, Result};
use crate::memory::StateMemory;
use cudarc::driver::sys;

/// Memory of the current context: our own, freed when dropped (which synchronises the device), or the caller's.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    addr: u64,
    owned_by: Option<usize>,
}

impl DeviceMemory {
    /// The device's context must be current.
    pub fn new(device: &Device, bytes: u64, memory: &StateMemory) -> Result<Self> {
        if let Some((addr, given)) = memory.0 {
            if addr == 0 || addr % 128 != 0 {
                return Err(Error::argument("memory.addr", format!("{addr:#x}"), "a multiple of 128, not null"));
            }
            if given < bytes {
                return Err(Error::argument("memory.bytes", given, format!("at least {bytes}")));
            }
            return Ok(Self { addr, owned_by: None });
        }
        let mut addr = 0;
        let asked = bytes.max(16);
        // SAFETY: a valid pointer; a context is current.
        unsafe { driver!(cuMemAlloc_v2(&mut addr, asked as usize)) }.map_err(|e| match e {
            Error::Cuda { code: 2, .. } => Error::OutOfMemory { bytes: asked },
            other => other,
        })?;
        Ok(Self { addr, owned_by: Some(device.raw() as usize) })
    }

    pub fn addr(&self) -> u64 {
        self.addr
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Some(context) = self.owned_by {
            // SAFETY: the owner of this memory holds its device, so the context is alive. The memory was allocated by `new` and is
            // freed once; cuMemFree waits for work that still uses it. Failures leave nothing to do.
            unsafe {
                let mut popped = std::ptr::null_mut();
                let _ = driver!(cuCtxPushCurrent_v2(context as sys::CUcontext));
                let _ = driver!(cuMemFree_v2(self.addr));
                let _ = driver!(cuCtxPopCurrent_v2(&mut popped));
            }
        }
    }
}
