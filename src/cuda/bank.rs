//! The bank's device table: LswFactor [targets, slots].

use super::args::{LSW_A_ALIGNED, LSW_B_ALIGNED, LSW_BANK_BATCH, LSW_BANK_THREADS, LswBankArgs, LswFactor};
use super::context::DeviceStream;
use super::launch::{Grid, launch};
use super::memory::DeviceMemory;
use crate::bank::{Entry, Refill};
use crate::error::Result;
use crate::memory::StateMemory;
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Table {
    memory: DeviceMemory,
    /// Keeps the context alive. After the memory, which is freed in it.
    _device: Arc<super::Device>,
}

impl Table {
    pub fn bytes(entries: u64) -> u64 {
        entries * size_of::<LswFactor>() as u64
    }

    /// Zeroed: rank 0 everywhere. Synchronises.
    pub fn new(stream: &DeviceStream, entries: u64, memory: &StateMemory) -> Result<Self> {
        let device = stream.device();
        let _entered = device.enter()?;
        let memory = DeviceMemory::new(device, Self::bytes(entries), memory)?;
        stream.fill_u32(memory.addr(), 0, Self::bytes(entries) / 4)?;
        stream.synchronize()?;
        Ok(Self { memory, _device: device.clone() })
    }

    pub fn addr(&self) -> u64 {
        self.memory.addr()
    }

    /// Enqueues a slot's new content.
    pub fn write(&self, stream: &DeviceStream, slots: u32, generation: u32, refill: &Refill) -> Result<()> {
        for (batch, entries) in refill.entries.chunks(LSW_BANK_BATCH as usize).enumerate() {
            let mut factors = [LswFactor::default(); LSW_BANK_BATCH as usize];
            for (factor, entry) in factors.iter_mut().zip(entries) {
                *factor = device_factor(entry, generation);
            }
            let args = LswBankArgs {
                table: self.addr(),
                slots,
                slot: refill.slot,
                first_target: batch as u32 * LSW_BANK_BATCH,
                count: entries.len() as u32,
                factors,
            };
            let grid = Grid { blocks: 1, threads: LSW_BANK_THREADS, shared: 0 };
            // SAFETY: the table has an entry for every target and slot; the slot was checked.
            unsafe { launch(stream, stream.device().kernels.bank_set, grid, &args) }?;
        }
        Ok(())
    }
}

fn device_factor(entry: &Entry, generation: u32) -> LswFactor {
    let Some(f) = entry.factor.as_ref().filter(|_| entry.rank() > 0) else {
        return LswFactor { generation, ..LswFactor::default() };
    };
    let (a, b) = (&f.a.raw, &f.b.raw);
    let flag = |is: bool, flag: u32| if is { flag } else { 0 };
    LswFactor {
        a: a.addr,
        b: b.addr,
        a_stride: a.stride as u32,
        b_stride: b.stride as u32,
        rank: a.rows as u32,
        scale: f.scale,
        generation,
        flags: flag(a.aligned16(), LSW_A_ALIGNED) | flag(b.aligned16(), LSW_B_ALIGNED),
    }
}
