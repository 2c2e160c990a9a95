//! The bank's device table: LswFactor [targets, slots].

use super::args::{LSW_A_ALIGNED, LSW_B_ALIGNED, LSW_BANK_BATCH, LSW_BANK_THREADS, LswBankArgs, LswFactor, LswMap};
use super::context::DeviceStream;
use super::launch::{Grid, launch};
use super::maps::{factor_a, factor_b};
use super::memory::DeviceMemory;
use super::{Device, flags};
use crate::bank::{Entry, Refill};
use crate::dtype::DType;
use crate::error::Result;
use crate::memory::StateMemory;
use crate::view::RawMat;
use std::sync::Arc;

/// Bytes before the maps, which stand at a multiple of 128.
fn maps_offset(entries: u64) -> u64 {
    (entries * size_of::<LswFactor>() as u64).next_multiple_of(128)
}

#[derive(Debug)]
pub(crate) struct Table {
    memory: DeviceMemory,
    entries: u64,
    /// Tensor maps of A and B [targets, slots, 2] behind the table: on Hopper, for the types that its kernels take.
    has_maps: bool,
    /// Keeps the context alive. After the memory, which is freed in it.
    _device: Arc<Device>,
}

impl Table {
    fn needs_maps(device: &Device, dtype: DType) -> bool {
        device.hopper.is_some_and(|hopper| hopper.switch_for(dtype).is_some())
    }

    pub fn bytes(device: &Device, dtype: DType, entries: u64) -> u64 {
        let maps = if Self::needs_maps(device, dtype) { 2 * entries * size_of::<LswMap>() as u64 } else { 0 };
        maps_offset(entries) + maps
    }

    /// Zeroed: rank 0 everywhere. Synchronises.
    pub fn new(stream: &DeviceStream, dtype: DType, entries: u64, memory: &StateMemory) -> Result<Self> {
        let device = stream.device();
        let _entered = device.enter()?;
        let memory = DeviceMemory::new(device, Self::bytes(device, dtype, entries), memory)?;
        stream.fill_u32(memory.addr(), 0, maps_offset(entries) / 4)?;
        stream.synchronize()?;
        Ok(Self { memory, entries, has_maps: Self::needs_maps(device, dtype), _device: device.clone() })
    }

    /// Address of the maps; 0: there are none.
    pub fn maps(&self) -> u64 {
        if self.has_maps { self.addr() + maps_offset(self.entries) } else { 0 }
    }

    pub fn addr(&self) -> u64 {
        self.memory.addr()
    }

    /// Of A and of B, each where it is aligned itself: the kernel goes by the flag of the one that it loads.
    fn factor_maps(&self, entry: &Entry, factor: &LswFactor) -> Result<[LswMap; 2]> {
        let Some(f) = entry.factor.as_ref().filter(|_| self.has_maps) else { return Ok(Default::default()) };
        let map = |mat: &RawMat, flag: u32, encode: fn(&RawMat) -> Result<LswMap>| {
            if factor.flags & flag != 0 && !mat.is_empty() { encode(mat) } else { Ok(LswMap::default()) }
        };
        Ok([map(&f.a.raw, LSW_A_ALIGNED, factor_a)?, map(&f.b.raw, LSW_B_ALIGNED, factor_b)?])
    }

    /// Enqueues a slot's new content. All that can fail but the launches comes before the first of them.
    pub fn write(&self, stream: &DeviceStream, slots: u32, generation: u32, refill: &Refill) -> Result<()> {
        let batches: Result<Vec<LswBankArgs>> = refill
            .entries
            .chunks(LSW_BANK_BATCH as usize)
            .enumerate()
            .map(|(batch, entries)| {
                let mut args = LswBankArgs {
                    table: self.addr(),
                    maps: self.maps(),
                    slots,
                    slot: refill.slot,
                    first_target: batch as u32 * LSW_BANK_BATCH,
                    count: entries.len() as u32,
                    ..Default::default()
                };
                for (i, entry) in entries.iter().enumerate() {
                    args.factors[i] = device_factor(entry, generation);
                    args.factor_maps[i] = self.factor_maps(entry, &args.factors[i])?;
                }
                Ok(args)
            })
            .collect();
        let grid = Grid { blocks: 1, threads: LSW_BANK_THREADS, shared: 0 };
        for args in batches? {
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
    LswFactor {
        a: a.addr,
        b: b.addr,
        a_stride: a.stride as u32,
        b_stride: b.stride as u32,
        rank: a.rows as u32,
        scale: f.scale,
        generation,
        flags: flags([(a.aligned16(), LSW_A_ALIGNED), (b.aligned16(), LSW_B_ALIGNED)]),
    }
}
