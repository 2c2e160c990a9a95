//! The figures that [`advise`](crate::advise()) reckons with, by hand or measured.

use crate::apply::{Routes, apply, apply_workspace_bytes};
use crate::bank::{AdapterBank, Factor, TargetShape};
use crate::cpu::calibrate::Bench as CpuBench;
use crate::cuda::calibrate::Bench as CudaBench;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::measure;
use crate::memory::StateMemory;
use crate::route::{RouteOptions, route};
use crate::stream::{Context, Stream, StreamKind};
use crate::view::{Mat, MatMut, Tensor};

/// What a machine does, and the engine's product on it. [`Calibration::measure`] fills it in; or write it by hand, without a device. GB
/// are 10^9 bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// Memory is read at this rate.
    pub read_gb_per_s: f64,
    /// Memory is read and written at this rate, both counted.
    pub copy_gb_per_s: f64,
    /// A launch that does next to nothing, as a node of a graph.
    pub launch_us: f64,
    /// A call of `apply`, bytes aside.
    pub apply_call_us: f64,
    /// `apply` to up to 64 rows, and in f32: the bytes of a row's adapters pass at this rate, for each row.
    pub few_rows_gb_per_s: f64,
    /// The same above 64 rows in 16 bits.
    pub many_rows_gb_per_s: f64,
    /// The part of `read_gb_per_s` that the engine's base product reaches with few rows.
    pub product_share: f64,
    /// 10^12 operations a second of the engine's base product with many rows; an addition and a multiplication are two. May be infinite.
    pub product_tflops: f64,
}

impl Calibration {
    /// What [`measure`](Self::measure) found on an NVIDIA H200: to reckon with where there is no card.
    pub const H200: Self = Self {
        read_gb_per_s: 4540.0,
        copy_gb_per_s: 4150.0,
        launch_us: 0.92,
        apply_call_us: 4.0,
        few_rows_gb_per_s: 2400.0,
        many_rows_gb_per_s: 60000.0,
        product_share: 0.84,
        product_tflops: 750.0,
    };

    /// Measures all but the last two on the stream's device, in bf16: reading and copying a large vector, an empty launch, and `apply` to
    /// one row and to more, with 8 adapters of rank 16 at a 4096 x 4096 matrix.
    ///
    /// The base product is the engine's, so its two figures are not measured: on CUDA they are set to what cuBLAS reaches on an H200
    /// (0.84, and 750 in 16 bits), on the CPU to 1 and 0.1. An engine that knows better overwrites them.
    ///
    /// To be called once, cold, while nothing else runs: it allocates 1 GiB (64 MiB on the CPU) and frees it, and takes about 0.1 s. On
    /// CUDA it works in graphs on a stream of its own, so that the stream given may be any of the context, also one without cudarc; it
    /// synchronises, and cannot be captured.
    ///
    /// # Errors
    /// Where the memory cannot be had, or a driver call fails.
    pub fn measure(stream: &Stream) -> Result<Self> {
        let bench = Bench::new(stream)?;
        let (read_us, copy_us, launch_us) = (bench.read()?, bench.copy()?, bench.launch()?);
        let (read, copy) = (gb_per_s(bench.bytes(), read_us), gb_per_s(bench.bytes(), copy_us));
        // Rows cost alike: two counts of them give the price of one, and what is left is the call's.
        let (few, many) = bench.rows();
        let beside = |rows: u64| (rows * ROW_BYTES) as f64 / copy / 1e3;
        let (one_us, few_us) = (bench.apply(1)? - beside(1), bench.apply(few)? - beside(few));
        let few_rows = gb_per_s((few - 1) * ADAPTER_BYTES, few_us - one_us);
        let apply_call_us = (one_us - ADAPTER_BYTES as f64 / few_rows / 1e3).max(0.0);
        let many_rows = match many {
            Some(rows) => gb_per_s(rows * ADAPTER_BYTES, bench.apply(rows)? - beside(rows) - apply_call_us),
            None => few_rows,
        };
        let (product_share, product_tflops) = if many.is_some() { (0.84, 750.0) } else { (1.0, 0.1) };
        Ok(Self {
            read_gb_per_s: read,
            copy_gb_per_s: copy,
            launch_us,
            apply_call_us,
            few_rows_gb_per_s: few_rows,
            many_rows_gb_per_s: many_rows,
            product_share,
            product_tflops,
        })
    }

    pub(crate) fn check(&self) -> Result<()> {
        let rates = [
            ("read_gb_per_s", self.read_gb_per_s),
            ("copy_gb_per_s", self.copy_gb_per_s),
            ("few_rows_gb_per_s", self.few_rows_gb_per_s),
            ("many_rows_gb_per_s", self.many_rows_gb_per_s),
            ("product_share", self.product_share),
            ("product_tflops", self.product_tflops),
        ];
        let times = [("launch_us", self.launch_us), ("apply_call_us", self.apply_call_us)];
        for (name, value) in rates {
            let may_be_infinite = name == "product_tflops";
            if !(value > 0.0 && (value.is_finite() || may_be_infinite)) {
                let bound = if may_be_infinite { "above 0" } else { "above 0 and finite" };
                return Err(Error::argument(format!("calibration.{name}"), value, bound));
            }
        }
        match times.iter().find(|(_, value)| !(*value >= 0.0 && value.is_finite())) {
            Some((name, value)) => Err(Error::argument(format!("calibration.{name}"), value, "at least 0 and finite")),
            None => Ok(()),
        }
    }
}

/// Noise cannot make a rate negative.
fn gb_per_s(bytes: u64, us: f64) -> f64 {
    bytes as f64 / us.max(1e-3) / 1e3
}

/// What `apply` is timed with.
const SLOTS: u64 = 8;
const K: u64 = 2;
const RANK: u64 = 16;
const WIDTH: u64 = 4096;
const DTYPE: DType = DType::Bf16;
/// Of a row's adapters; of its x, and of y read and written.
const ADAPTER_BYTES: u64 = K * RANK * 2 * WIDTH * 2;
const ROW_BYTES: u64 = 3 * WIDTH * 2;

/// Memory that work is timed on, and a clock. Beyond the bytes there is room for a result.
enum Bench {
    Cpu(CpuBench),
    Cuda(CudaBench),
}

impl Bench {
    fn new(stream: &Stream) -> Result<Self> {
        let bench = match &stream.0 {
            StreamKind::Cpu(pool) => Self::Cpu(CpuBench::new(pool)?),
            StreamKind::Cuda(stream) => Self::Cuda(CudaBench::new(stream.device())?),
        };
        let floats = bench.bytes() / 4;
        measure::fill_random(bench.stream(), 1, 1.0, &mut bench.mat_mut(DType::F32, 0, 1, floats))?;
        Ok(bench)
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Cpu(_) => CpuBench::BYTES,
            Self::Cuda(_) => CudaBench::BYTES,
        }
    }

    /// Few, and where many take another path, many.
    fn rows(&self) -> (u64, Option<u64>) {
        match self {
            Self::Cpu(_) => (8, None),
            Self::Cuda(_) => (32, Some(2048)),
        }
    }

    fn stream(&self) -> &Stream {
        match self {
            Self::Cpu(bench) => &bench.stream,
            Self::Cuda(bench) => &bench.stream,
        }
    }

    /// Microseconds of one of so many calls.
    fn time(&self, calls: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        match self {
            Self::Cpu(bench) => bench.time(&mut work),
            Self::Cuda(bench) => Ok(bench.time(&mut || (0..calls).try_for_each(|_| work()))? / calls as f64),
        }
    }

    fn place(&self, at: u64, bytes: u64) -> (Context, u64) {
        assert!(at + bytes <= self.bytes() + 16, "{at} + {bytes}");
        let addr = match self {
            Self::Cpu(bench) => bench.addr(),
            Self::Cuda(bench) => bench.addr(),
        };
        (self.stream().context(), addr + at)
    }

    fn mat(&self, dtype: DType, at: u64, rows: u64, cols: u64) -> Mat<'_> {
        let (context, addr) = self.place(at, rows * cols * dtype.size());
        // SAFETY: inside the bench's memory (`place` checks), which waits for all work before it goes; one stream orders the work.
        unsafe { Mat::raw(&context, addr, dtype, rows, cols, cols) }
    }

    fn mat_mut(&self, dtype: DType, at: u64, rows: u64, cols: u64) -> MatMut<'_> {
        let (context, addr) = self.place(at, rows * cols * dtype.size());
        // SAFETY: as for `mat`; the parts of a call are disjoint, which it checks.
        unsafe { MatMut::raw(&context, addr, dtype, rows, cols, cols) }
    }

    fn tensor(&self, at: u64, rows: u64, cols: u64) -> Tensor {
        let (context, addr) = self.place(at, rows * cols * DTYPE.size());
        // SAFETY: as for `mat`; the bank that gets it goes before the bench.
        unsafe { Tensor::from_raw(&context, addr, DTYPE, rows, cols, cols) }
    }

    fn read(&self) -> Result<f64> {
        let floats = self.bytes() / 4;
        self.time(1, || {
            let mut sink = self.mat_mut(DType::I32, self.bytes(), 1, 1);
            measure::read(self.stream(), &self.mat(DType::F32, 0, 1, floats), &mut sink)
        })
    }

    fn copy(&self) -> Result<f64> {
        let half = self.bytes() / 8;
        self.time(1, || {
            measure::scale(self.stream(), 1.0, &self.mat(DType::F32, 0, 1, half), &mut self.mat_mut(DType::F32, 4 * half, 1, half))
        })
    }

    fn launch(&self) -> Result<f64> {
        self.time(64, || measure::scale_in_place(self.stream(), 1.0, &mut self.mat_mut(DType::F32, 0, 1, 1)))
    }

    /// Rows with random routes, one group of one target. The adapters lie first in the memory, then all else.
    fn apply(&self, rows: u64) -> Result<f64> {
        let stream = self.stream();
        let shape = TargetShape { out_features: WIDTH, in_features: WIDTH, rank_cap: RANK };
        let bank = AdapterBank::new(stream, DTYPE, SLOTS, &[shape], StateMemory::allocate())?;
        let factor_bytes = RANK * WIDTH * DTYPE.size();
        for slot in 0..SLOTS {
            let a = self.tensor(2 * slot * factor_bytes, RANK, WIDTH);
            let b = self.tensor((2 * slot + 1) * factor_bytes, WIDTH, RANK);
            bank.set_slot(stream, slot, &[Some(Factor { a, b, scale: 1.0 })])?;
        }
        let mut end = 2 * SLOTS * factor_bytes;
        let mut take = |bytes: u64| {
            end += bytes.next_multiple_of(16);
            end - bytes.next_multiple_of(16)
        };
        let (x, y) = (take(rows * WIDTH * 2), take(rows * WIDTH * 2));
        let (logits, ids, gates) = (take(rows * SLOTS * 4), take(rows * K * 4), take(rows * K * 4));
        let bytes = apply_workspace_bytes(&bank, 0..1, rows, K)?;
        let workspace = take(bytes);
        measure::fill_random(stream, 2, 1.0, &mut self.mat_mut(DType::F32, logits, 1, rows * SLOTS))?;
        let (mut chosen, mut weights) = (self.mat_mut(DType::I32, ids, rows, K), self.mat_mut(DType::F32, gates, rows, K));
        route(stream, &RouteOptions::default(), &self.mat(DType::F32, logits, rows, SLOTS), &mut chosen, &mut weights)?;

        let (ids, gates) = (self.mat(DType::I32, ids, rows, K), self.mat(DType::F32, gates, rows, K));
        let routes = Routes { ids: &ids, gates: &gates, row_map: None };
        self.time(if rows > 64 { 4 } else { 64 }, || {
            let (x, mut y) = (self.mat(DTYPE, x, rows, WIDTH), [self.mat_mut(DTYPE, y, rows, WIDTH)]);
            apply(stream, &bank, 0, &x, &routes, &mut y, &mut self.mat_mut(DType::U8, workspace, 1, bytes))
        })
    }
}
