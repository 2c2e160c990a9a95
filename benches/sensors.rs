//! The card's clock and power, from NVML, loaded at run time.

use cudarc::driver::sys;
use libloading::Library;
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

type Handle = *mut c_void;
type GetClock = unsafe extern "C" fn(Handle, u32, *mut u32) -> u32;
type GetPower = unsafe extern "C" fn(Handle, *mut u32) -> u32;
const CLOCK_SM: u32 = 1;

pub struct Sensors {
    device: Handle,
    clock: GetClock,
    power: GetPower,
    /// Never unloaded: NVML stays initialised.
    _library: &'static Library,
}

// SAFETY: NVML is thread safe, and so are its handles.
unsafe impl Sync for Sensors {}

/// The median of what was seen while something ran. NVML's power is itself an average over the last second.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    pub clock_mhz: u32,
    pub power_w: f64,
}

impl Sensors {
    /// None where there is no NVML, or where it does not know the device.
    pub fn open(device: sys::CUdevice) -> Option<Self> {
        let mut bus = [0 as c_char; 32];
        // SAFETY: a device of the driver, and room for its name with the nul.
        let found = unsafe { sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as i32, device) };
        if found as u32 != 0 {
            return None;
        }
        // SAFETY: loading NVIDIA's library runs its initialisers.
        let library = unsafe { Library::new("libnvidia-ml.so.1") }.ok()?;
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: the signatures are NVML's; the name ends in a nul (CStr below); the pointers are valid.
        unsafe {
            let init = library.get::<unsafe extern "C" fn() -> u32>(b"nvmlInit_v2\0").ok()?;
            let by_bus = b"nvmlDeviceGetHandleByPciBusId_v2\0";
            let by_bus = library.get::<unsafe extern "C" fn(*const c_char, *mut Handle) -> u32>(by_bus).ok()?;
            let clock = *library.get::<GetClock>(b"nvmlDeviceGetClockInfo\0").ok()?;
            let power = *library.get::<GetPower>(b"nvmlDeviceGetPowerUsage\0").ok()?;
            let mut handle: Handle = std::ptr::null_mut();
            let ready = init() == 0 && by_bus(CStr::from_ptr(bus.as_ptr()).as_ptr(), &mut handle) == 0;
            ready.then_some(Self { device: handle, clock, power, _library: library })
        }
    }

    fn read(&self) -> Option<(u32, u32)> {
        let (mut clock, mut milliwatts) = (0, 0);
        // SAFETY: a live handle and valid pointers.
        let read = unsafe { (self.clock)(self.device, CLOCK_SM, &mut clock) == 0 && (self.power)(self.device, &mut milliwatts) == 0 };
        read.then_some((clock, milliwatts))
    }

    /// Reads every few milliseconds while `work` runs.
    pub fn watch<T>(&self, work: impl FnOnce() -> T) -> (T, Option<Reading>) {
        let done = AtomicBool::new(false);
        let sample = || {
            let mut seen = Vec::new();
            while !done.load(Ordering::Relaxed) {
                seen.extend(self.read());
                std::thread::sleep(Duration::from_millis(10));
            }
            seen
        };
        let (result, seen) = std::thread::scope(|scope| {
            let sampler = scope.spawn(sample);
            let result = work();
            done.store(true, Ordering::Relaxed);
            (result, sampler.join().expect("the sampler does not panic"))
        });
        (result, Self::median(seen))
    }

    fn median(seen: Vec<(u32, u32)>) -> Option<Reading> {
        let (mut clocks, mut powers): (Vec<u32>, Vec<u32>) = seen.into_iter().unzip();
        clocks.sort_unstable();
        powers.sort_unstable();
        let middle = clocks.len() / 2;
        Some(Reading { clock_mhz: *clocks.get(middle)?, power_w: f64::from(*powers.get(middle)?) / 1e3 })
    }
}
