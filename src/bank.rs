//! The adapter bank: for every slot (an expert) and every target (an adapted matrix), one LoRA pair. Shared by all that use adapters.

use crate::check::{Checked, MAX_COUNT, narrow};
use crate::cuda::args::LSW_MAX_RANK;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::StateMemory;
use crate::stream::{Stream, StreamKind};
use crate::view::{Place, Tensor};
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard};

/// One target's matrix: W is [out_features, in_features]. No adapter of it may have a rank above the cap, which is at most 256:
/// captured launches are laid out for the cap, while work follows each adapter's real rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetShape {
    /// Rows of W and of B.
    pub out_features: u64,
    /// Columns of W and of A.
    pub in_features: u64,
    /// The largest rank that a slot may bring.
    pub rank_cap: u64,
}

impl TargetShape {
    /// Its fields, in order, of the target with this index.
    pub(crate) fn check(&self, index: usize) -> Result<[u32; 3]> {
        let at = |field: &str| format!("targets[{index}].{field}");
        Ok([
            narrow(&at("out_features"), self.out_features, MAX_COUNT)?,
            narrow(&at("in_features"), self.in_features, MAX_COUNT)?,
            narrow(&at("rank_cap"), self.rank_cap, u64::from(LSW_MAX_RANK))?,
        ])
    }
}

/// A LoRA pair as PEFT stores it: the weight's change is `scale * B A`.
#[derive(Debug, Clone)]
pub struct Factor {
    /// A [rank, in_features], PEFT's `lora_A.weight`.
    pub a: Tensor,
    /// B [out_features, rank], PEFT's `lora_B.weight`.
    pub b: Tensor,
    /// alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    pub scale: f32,
}

impl Factor {
    fn usable(&self) -> Self {
        let mut this = self.clone();
        this.a.raw = this.a.raw.with_usable_stride();
        this.b.raw = this.b.raw.with_usable_stride();
        this
    }
}

/// What a slot holds for a target.
#[derive(Debug, Clone, Default)]
pub(crate) struct Entry {
    pub factor: Option<Factor>,
    /// Differs after each refill of the slot.
    pub generation: u32,
}

impl Entry {
    pub fn rank(&self) -> u64 {
        self.factor.as_ref().map_or(0, |f| f.a.raw.rows)
    }
}

/// A table over (target, slot) of LoRA pairs, by address: it copies no weights. A clone is another handle to the same bank.
///
/// Slots and targets are fixed at creation, and so is the dtype of W, A and B: f32, f16 or bf16. Ranks and scales are per slot and per
/// target; a rank of 0, or no factor, means that the slot leaves the target alone. Addresses need the alignment of an element;
/// multiples of 16 bytes for addresses and rows of A and B (leading dimensions included) take the fast path on CUDA. Adapters may not
/// lie in a weight that a set over the bank writes. Nobody writes an adapter while it is in a slot, which a switch or an
/// `apply_finish` may read before the work before it on the stream has ended: write, then `set_slot`, with the same addresses if you like.
///
/// The table is dense: 40 bytes of device memory for each target and slot, 296 on Hopper in f16 and bf16, and about as much
/// on the host.
/// Refills and switches by raw memory on different streams are ordered by the caller. On the CPU a refill waits for a switch that is
/// under way: do not call it from a thread of a rayon pool that the switch was called from.
#[derive(Debug, Clone)]
pub struct AdapterBank(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dtype: DType,
    slots: u32,
    shapes: Vec<TargetShape>,
    table: RwLock<Vec<Entry>>,
    device: Option<crate::cuda::bank::Table>,
    /// The stream that it was made on: its context is the bank's.
    stream: Stream,
    /// The stream of the first tensor that came through cudarc: every set reads the bank's adapters on its own stream.
    tied_to: OnceLock<usize>,
}

/// A slot's checked new content.
pub(crate) struct Refill {
    pub slot: u32,
    pub entries: Vec<Entry>,
}

impl AdapterBank {
    /// An empty bank of `slots` slots over `targets`. Synchronises a CUDA stream.
    ///
    /// # Errors
    /// On a dtype that is no float, no slots or more than 65,536, a rank cap above 256, sizes above 2^31 - 1, and when the memory is
    /// too small, misaligned or cannot be allocated.
    pub fn new(stream: &Stream, dtype: DType, slots: u64, targets: &[TargetShape], memory: StateMemory) -> Result<Self> {
        if !DType::FLOATS.contains(&dtype) {
            return Err(Error::argument("dtype", dtype, "f32 or f16 or bf16"));
        }
        let entries = Self::table_len(slots, targets.len() as u64)?;
        for (i, t) in targets.iter().enumerate() {
            t.check(i)?;
        }
        let device = match &stream.0 {
            StreamKind::Cpu(_) => None,
            StreamKind::Cuda(cuda) => Some(crate::cuda::bank::Table::new(cuda, dtype, entries, &memory)?),
        };
        let mut table = Vec::new();
        let bytes = entries * size_of::<Entry>() as u64;
        table.try_reserve_exact(entries as usize).map_err(|_| Error::OutOfMemory { bytes })?;
        table.resize(entries as usize, Entry::default());
        Ok(Self(Arc::new(Inner {
            dtype,
            slots: slots as u32,
            shapes: targets.to_vec(),
            table: RwLock::new(table),
            device,
            stream: stream.clone(),
            tied_to: OnceLock::new(),
        })))
    }

    /// Bytes of device memory for a bank's table; 0 on a CPU context.
    ///
    /// # Errors
    /// On slots or targets out of range.
    pub fn memory_bytes(stream: &Stream, dtype: DType, slots: u64, targets: u64) -> Result<u64> {
        let entries = Self::table_len(slots, targets)?;
        Ok(match &stream.0 {
            StreamKind::Cpu(_) => 0,
            StreamKind::Cuda(cuda) => crate::cuda::bank::Table::bytes(cuda.device(), dtype, entries),
        })
    }

    fn table_len(slots: u64, targets: u64) -> Result<u64> {
        if slots == 0 || slots > 65_536 {
            return Err(Error::argument("slots", slots, "1 to 65536"));
        }
        Ok(slots * u64::from(narrow("targets", targets, 1 << 20)?))
    }

    /// Gives a slot another adapter: one factor a target, in the order of the targets; `None` where it has none.
    ///
    /// Enqueued on the stream, without synchronisation, and seen by all work that follows there, replays of captured graphs too. Not for
    /// captures itself: a replay would bring this content back each time. The slot's former tensors are let go of when the call returns.
    /// A switch set from base that holds the slot merged heals at its next `to`; a set in place must have been unmerged first
    /// ([`Odd::STALE_MERGE`](crate::Odd::STALE_MERGE) tells when it was not).
    ///
    /// The first tensor made with [`Tensor::from_cuda`](crate::Tensor::from_cuda) ties the bank, and with it every set over it, to that
    /// tensor's stream.
    ///
    /// # Errors
    /// On a slot, factor count, dtype, shape, rank, scale (which must be finite), stride, place or stream that does not fit. Nothing
    /// is changed then.
    pub fn set_slot(&self, stream: &Stream, slot: u64, factors: &[Option<Factor>]) -> Result<()> {
        let refill = self.check_refill(stream, slot, factors)?;
        let mut table = self.0.table.write().expect("no panic while the table is locked");
        let generation = table.get(slot as usize).map_or(0, |e| e.generation.wrapping_add(1));
        let slots = u64::from(self.0.slots);
        if let (StreamKind::Cuda(cuda), Some(device)) = (&stream.0, &self.0.device) {
            device.write(cuda, self.0.slots, generation, &refill)?;
        }
        let tie = factors.iter().flatten().flat_map(|f| [f.a.raw.place, f.b.raw.place]).find_map(Place::tied_to);
        if let Some(stream) = tie {
            self.0.tied_to.get_or_init(|| stream);
        }
        for (target, mut entry) in refill.entries.into_iter().enumerate() {
            entry.generation = generation;
            table[target * slots as usize + slot as usize] = entry;
        }
        Ok(())
    }

    fn check_refill(&self, stream: &Stream, slot: u64, factors: &[Option<Factor>]) -> Result<Refill> {
        self.check_stream(stream)?;
        if slot >= u64::from(self.0.slots) {
            return Err(Error::argument("slot", slot, format!("below {}", self.0.slots)));
        }
        if factors.len() != self.0.shapes.len() {
            let bound = format!("{}, one a target", self.0.shapes.len());
            return Err(Error::argument("factors", format!("{} of them", factors.len()), bound));
        }
        for (i, (factor, shape)) in factors.iter().zip(&self.0.shapes).enumerate() {
            if let Some(factor) = factor {
                self.check_factor(stream, factor, shape).map_err(|e| e.within(format_args!("factors[{i}]")))?;
            }
        }
        let entries = factors.iter().map(|f| Entry { factor: f.as_ref().map(Factor::usable), generation: 0 }).collect();
        Ok(Refill { slot: slot as u32, entries })
    }

    fn check_factor(&self, stream: &Stream, factor: &Factor, shape: &TargetShape) -> Result<()> {
        let (a, b) = (factor.a.raw.expect("a"), factor.b.raw.expect("b"));
        a.dtype_in(&[self.0.dtype])?.cols(shape.in_features, "the target's in_features")?.memory()?.on(stream)?;
        let rank = a.mat.rows;
        if rank > shape.rank_cap {
            return Err(Error::argument("a.rows", rank, format!("at most {} (the target's rank_cap)", shape.rank_cap)));
        }
        b.dtype_in(&[self.0.dtype])?.rows(shape.out_features, "the target's out_features")?.cols(rank, "the rank, a.rows")?;
        b.memory()?.on(stream)?;
        for mat in [a, b].into_iter().filter(|mat| mat.mat.rows > 1 && rank > 0) {
            narrow(&format!("{}.stride", mat.name), mat.mat.stride, u64::from(u32::MAX))?;
        }
        if !factor.scale.is_finite() {
            return Err(Error::argument("scale", factor.scale, "finite"));
        }
        Ok(())
    }

    /// The bank lives where it was made, and works where its adapters are ordered.
    pub(crate) fn check_stream(&self, stream: &Stream) -> Result<()> {
        if !self.0.stream.same_context(stream) {
            return Err(Error::argument("stream", "of another context", "of the context that the bank was made on"));
        }
        stream.check_tie(self.0.tied_to.get().copied(), "bank's adapters")
    }

    /// Number of slots.
    pub fn slots(&self) -> u64 {
        u64::from(self.0.slots)
    }
    /// Element type of W, A and B.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }
    /// The targets, as given.
    pub fn targets(&self) -> &[TargetShape] {
        &self.0.shapes
    }

    pub(crate) fn table(&self) -> RwLockReadGuard<'_, Vec<Entry>> {
        self.0.table.read().expect("no panic while the table is locked")
    }
    pub(crate) fn device_table(&self) -> &crate::cuda::bank::Table {
        self.0.device.as_ref().expect("a bank on CUDA")
    }
}
