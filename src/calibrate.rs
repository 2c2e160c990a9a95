//! The figures that [`advise`](crate::advise()) reckons with, by hand or measured.

use crate::apply::{Routes, apply, apply_workspace_bytes};
use crate::bank::{AdapterBank, Factor, TargetShape};
use crate::cpu::calibrate::Bench as CpuBench;
use crate::cuda::calibrate::Bench as CudaBench;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::linear::{LinearOptions, linear, linear_workspace_bytes};
use crate::measure;
use crate::memory::StateMemory;
use crate::route::{RouteOptions, route};
use crate::stream::{Context, Stream, StreamKind};
use crate::switch::{SwitchOptions, SwitchSet, Target};
use crate::view::{Mat, MatMut, Tensor, Weight};

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
    /// A switch from base passes over W and W_base at this rate, both and the adapters counted.
    pub switch_gb_per_s: f64,
    /// A call of `apply`, bytes aside.
    pub apply_call_us: f64,
    /// `apply` to up to 64 rows, and in f32: the bytes of a row's adapters pass at this rate, for each row.
    pub few_rows_gb_per_s: f64,
    /// The same above 64 rows in 16 bits. Measured of a bank that takes the dense path, where the card has one: other banks cost more, and
    /// the more the higher their ranks.
    pub many_rows_gb_per_s: f64,
    /// A call of `linear` without adapters, bytes aside.
    pub linear_call_us: f64,
    /// What adapters add to that, bytes aside.
    pub linear_adapters_us: f64,
    /// `linear` streams weights at this rate.
    pub linear_gb_per_s: f64,
    /// The part of `read_gb_per_s` that the engine's base product reaches with few rows.
    pub product_share: f64,
    /// 10^12 operations a second of the engine's base product with many rows; an addition and a multiplication are two. May be infinite.
    pub product_tflops: f64,
}

impl Calibration {
    /// What [`measure`](Self::measure) found on an NVIDIA H200: to reckon with where there is no card.
    pub const H200: Self = Self {
        read_gb_per_s: 4491.0,
        copy_gb_per_s: 4071.0,
        launch_us: 1.12,
        switch_gb_per_s: 4119.0,
        apply_call_us: 4.46,
        few_rows_gb_per_s: 10030.0,
        many_rows_gb_per_s: 127100.0,
        linear_call_us: 2.48,
        linear_adapters_us: 1.21,
        linear_gb_per_s: 4429.0,
        product_share: 0.79,
        product_tflops: 750.0,
    };

    /// Measures all but the last two on the stream's device, in bf16: reading and copying a large vector, an empty launch, a switch of large
    /// matrices, `apply` to one row and to more, and `linear` at matrices of two sizes; with 8 adapters of rank 16 at matrices of 4096
    /// columns (512 on the CPU).
    ///
    /// The base product is the engine's, so its two figures are not measured: on CUDA they are set to what cuBLAS reaches on an H200
    /// (0.79 of Llama-2-7B's, q k v and gate up fused, and 750 in 16 bits), on the CPU to 1 and 0.1. An engine that knows better overwrites them.
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
        // What a larger switch takes more: the rate without what every switch has to decide first.
        let (most, switch_bytes) = (bench.switch_targets(), bench.switch_bytes());
        let switch = gb_per_s((most - 1) * switch_bytes, bench.switch(most)? - bench.switch(1)?);
        // Rows cost alike: two counts of them give the price of one, and what is left is the call's.
        let (few, many) = bench.rows();
        let (width, adapter_bytes) = (bench.width(), bench.adapter_bytes());
        // Of x, and of y read and written.
        let beside = |rows: u64| (rows * 3 * width * 2) as f64 / copy / 1e3;
        let (one_us, few_us) = (bench.apply(1)? - beside(1), bench.apply(few)? - beside(few));
        let few_rows = gb_per_s((few - 1) * adapter_bytes, few_us - one_us);
        let apply_call_us = (one_us - adapter_bytes as f64 / few_rows / 1e3).max(0.0);
        let many_rows = match many {
            Some(rows) => gb_per_s(rows * adapter_bytes, bench.apply(rows)? - beside(rows) - apply_call_us),
            None => few_rows,
        };
        // The same with the bytes of two matrices; of the small one then with adapters.
        let (small, large) = bench.outputs();
        let (small_us, large_us) = (bench.linear(small, 0)?, bench.linear(large, 0)?);
        let linear_rate = gb_per_s((large - small) * width * 2, large_us - small_us);
        let linear_call_us = (small_us - (small * width * 2) as f64 / linear_rate / 1e3).max(0.0);
        let of_adapters = adapter_bytes as f64 / few_rows / 1e3;
        let linear_adapters_us = (bench.linear(small, K)? - small_us - of_adapters).max(0.0);
        let (product_share, product_tflops) = if many.is_some() { (0.79, 750.0) } else { (1.0, 0.1) };
        Ok(Self {
            read_gb_per_s: read,
            copy_gb_per_s: copy,
            launch_us,
            switch_gb_per_s: switch,
            apply_call_us,
            few_rows_gb_per_s: few_rows,
            many_rows_gb_per_s: many_rows,
            linear_call_us,
            linear_adapters_us,
            linear_gb_per_s: linear_rate,
            product_share,
            product_tflops,
        })
    }

    pub(crate) fn check(&self) -> Result<()> {
        let rates = [
            ("read_gb_per_s", self.read_gb_per_s),
            ("copy_gb_per_s", self.copy_gb_per_s),
            ("switch_gb_per_s", self.switch_gb_per_s),
            ("few_rows_gb_per_s", self.few_rows_gb_per_s),
            ("many_rows_gb_per_s", self.many_rows_gb_per_s),
            ("linear_gb_per_s", self.linear_gb_per_s),
            ("product_share", self.product_share),
            ("product_tflops", self.product_tflops),
        ];
        let times = [
            ("launch_us", self.launch_us),
            ("apply_call_us", self.apply_call_us),
            ("linear_call_us", self.linear_call_us),
            ("linear_adapters_us", self.linear_adapters_us),
        ];
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

/// What `apply` and `linear` are timed with.
const SLOTS: u64 = 8;
const K: u64 = 2;
const RANK: u64 = 16;
const DTYPE: DType = DType::Bf16;

/// One target with adapters in all slots and rows with random routes: where things lie in a bench's memory, weights behind all else.
struct Layer {
    bank: AdapterBank,
    out: u64,
    rows: u64,
    k: u64,
    x: u64,
    y: u64,
    ids: u64,
    gates: u64,
    workspace: u64,
    weights: u64,
}

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
        bench.fill(bench.bytes())?;
        Ok(bench)
    }

    /// Numbers for adapters and rows that will lie there, whatever was there before: `apply` takes its time over what is not finite.
    fn fill(&self, bytes: u64) -> Result<()> {
        measure::fill_random(self.stream(), 1, 1.0, &mut self.mat_mut(DTYPE, 0, 1, bytes / DTYPE.size()))
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

    /// Columns of every matrix.
    fn width(&self) -> u64 {
        match self {
            Self::Cpu(_) => 512,
            Self::Cuda(_) => 4096,
        }
    }

    /// Rows of a small matrix, which is square, and of a large one.
    fn outputs(&self) -> (u64, u64) {
        match self {
            Self::Cpu(_) => (self.width(), 8192),
            Self::Cuda(_) => (self.width(), 24576),
        }
    }

    /// Those of a row at a small matrix.
    fn adapter_bytes(&self) -> u64 {
        K * RANK * 2 * self.width() * DTYPE.size()
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

    /// Several targets share their adapters.
    fn layer(&self, targets: usize, out: u64, rows: u64, k: u64) -> Result<Layer> {
        let (stream, width) = (self.stream(), self.width());
        let shape = TargetShape { out_features: out, in_features: width, rank_cap: RANK };
        let bank = AdapterBank::new(stream, DTYPE, SLOTS, &vec![shape; targets], StateMemory::allocate())?;
        let mut end = 0;
        let mut take = |elements: u64, size: u64| {
            let at = end;
            end += (elements * size).next_multiple_of(256);
            at
        };
        for slot in 0..SLOTS {
            let a = self.tensor(take(RANK * width, 2), RANK, width);
            let b = self.tensor(take(out * RANK, 2), out, RANK);
            bank.set_slot(stream, slot, &vec![Some(Factor { a, b, scale: 1.0 }); targets])?;
        }
        let (x, y) = (take(rows * width, 2), take(rows * out, 2));
        let (logits, ids, gates) = (take(rows * SLOTS, 4), take(rows * K, 4), take(rows * K, 4));
        let workspace = take(apply_workspace_bytes(&bank, 0..1, rows, k)? + 16, 1);
        self.fill(end)?;
        let layer = Layer { bank, out, rows, k, x, y, ids, gates, workspace, weights: end };
        // linear's workspace begins with zeros: the ids of four tokens that have one expert to choose.
        self.route(logits, 1, [4, 1], [workspace, gates])?;
        self.route(logits, SLOTS, [rows, K], [ids, gates])?;
        Ok(layer)
    }

    fn route(&self, logits: u64, experts: u64, [rows, k]: [u64; 2], [ids, gates]: [u64; 2]) -> Result<()> {
        measure::fill_random(self.stream(), 2, 1.0, &mut self.mat_mut(DType::F32, logits, 1, rows * experts))?;
        let (mut ids, mut gates) = (self.mat_mut(DType::I32, ids, rows, k), self.mat_mut(DType::F32, gates, rows, k));
        route(self.stream(), &RouteOptions::default(), &self.mat(DType::F32, logits, rows, experts), &mut ids, &mut gates)
    }

    /// Bytes of a large matrix.
    fn large(&self) -> u64 {
        self.outputs().1 * self.width() * DTYPE.size()
    }

    /// As many large matrices as there is room for, each with its base.
    fn switch_targets(&self) -> u64 {
        (self.bytes() - self.bytes() / 8) / (2 * self.large())
    }

    /// Those of a target: W, W_base and the route's adapters.
    fn switch_bytes(&self) -> u64 {
        2 * self.large() + K * RANK * (self.outputs().1 + self.width()) * DTYPE.size()
    }

    /// A switch of so many large matrices from base.
    fn switch(&self, targets: u64) -> Result<f64> {
        let ((_, out), width, stream, size) = (self.outputs(), self.width(), self.stream(), self.large());
        let l = self.layer(targets as usize, out, 1, K)?;
        let target = |i: u64| {
            let (context, addr) = self.place(l.weights + 2 * i * size, size);
            // SAFETY: inside the bench's memory (`place` checks), behind the adapters; the set goes before the bench.
            let weight = unsafe { Weight::from_raw(&context, addr, DTYPE, out, width, width) };
            Target { weight, base: Some(self.tensor(l.weights + (2 * i + 1) * size, out, width)) }
        };
        let options = SwitchOptions { k_max: K, ..SwitchOptions::default() };
        let mut set = SwitchSet::new(stream, &l.bank, (0..targets).map(target).collect(), options)?;
        let (ids, gates) = (self.mat(DType::I32, l.ids, 1, K), self.mat(DType::F32, l.gates, 1, K));
        // A route that is merged already would cost nothing.
        self.time(1, || set.invalidate(stream).and_then(|()| set.to(stream, &ids, &gates)))
    }

    fn apply(&self, rows: u64) -> Result<f64> {
        let width = self.width();
        let l = self.layer(1, width, rows, K)?;
        let bytes = apply_workspace_bytes(&l.bank, 0..1, rows, K)?;
        let (ids, gates) = (self.mat(DType::I32, l.ids, rows, K), self.mat(DType::F32, l.gates, rows, K));
        let routes = Routes { ids: &ids, gates: &gates, row_map: None };
        self.time(if rows > 64 { 4 } else { 64 }, || {
            let (x, mut y) = (self.mat(DTYPE, l.x, rows, width), [self.mat_mut(DTYPE, l.y, rows, l.out)]);
            apply(self.stream(), &l.bank, 0, &x, &routes, &mut y, &mut self.mat_mut(DType::U8, l.workspace, 1, bytes))
        })
    }

    /// One row. Each call has weights of its own, which no cache holds, as in a pass over a model.
    fn linear(&self, out: u64, k: u64) -> Result<f64> {
        let (width, l) = (self.width(), self.layer(1, out, 1, k)?);
        let bytes = linear_workspace_bytes(&l.bank, 0..1, l.rows, l.k)?;
        let (ids, gates) = (self.mat(DType::I32, l.ids, l.rows, l.k), self.mat(DType::F32, l.gates, l.rows, l.k));
        let routes = Routes { ids: &ids, gates: &gates, row_map: None };
        let size = out * width * DTYPE.size();
        let calls = (self.bytes() - l.weights) / size;
        let mut call = 0;
        self.time(calls as usize, || {
            let weights = [self.mat(DTYPE, l.weights + call % calls * size, out, width)];
            call += 1;
            let (x, mut y) = (self.mat(DTYPE, l.x, l.rows, width), [self.mat_mut(DTYPE, l.y, l.rows, out)]);
            let mut workspace = self.mat_mut(DType::U8, l.workspace, 1, bytes);
            linear(self.stream(), LinearOptions::default(), &l.bank, 0, &weights, &x, &routes, &mut y, &mut workspace)
        })
    }
}
