//! A model's adapted weights with their adapters, in memory as an engine would hold them: all W in one
//! buffer, all bases in another.

use crate::lab::{Buffer, Lab, Result};
use lora_switch::{
    AdapterBank, Context, DType, Factor, Form, Mat, StateMemory, Stream, SwitchKernels, SwitchOptions, SwitchSet, Target, TargetShape,
    Tensor, Weight,
};

/// (out, in) of the targets of Llama-2-7B.
pub fn llama2_7b() -> Vec<(u64, u64)> {
    let square = [(4096, 4096); 4];
    let layer = [&square[..], &[(11008, 4096), (11008, 4096), (4096, 11008)]].concat();
    layer.repeat(32)
}

/// Distinct slots and their gates.
#[derive(Debug, Clone)]
pub struct Route {
    pub ids: Vec<i32>,
    pub gates: Vec<f32>,
}

impl Route {
    pub fn new(ids: &[i32], gates: &[f32]) -> Self {
        Self { ids: ids.to_vec(), gates: gates.to_vec() }
    }

    fn gate(&self, slot: i32) -> f32 {
        self.ids.iter().zip(&self.gates).find(|(id, _)| **id == slot).map_or(0.0, |(_, gate)| *gate)
    }
}

#[derive(Debug, Clone)]
pub struct Spec {
    pub dtype: DType,
    pub form: Form,
    pub shapes: Vec<(u64, u64)>,
    /// Slot s has rank `ranks[(s + t) % ranks.len()]` at target t.
    pub ranks: Vec<u64>,
    pub slots: u64,
    /// Launches alternate between the two.
    pub routes: [Route; 2],
    /// A set for each target, instead of one for all.
    pub set_each: bool,
    /// By the kernel for any card, even if there is a faster one for this card.
    pub portable: bool,
}

/// alpha / rank of every adapter.
pub const SCALE: f32 = 2.0;
/// Typical of trained weights; with it, a route changes W by a few percent.
pub const WEIGHT_SIZE: f32 = 0.04;
const ADAPTER_SIZE: f32 = 0.02;

impl Spec {
    pub fn rank(&self, slot: u64, target: usize) -> u64 {
        self.ranks[(slot as usize + target) % self.ranks.len()]
    }

    /// The terms of the sum that the switch to route `to` adds to the base or, in place, to W under the other
    /// route: slots and coefficients.
    pub fn terms(&self, to: usize) -> Vec<(u64, f64)> {
        let (new, old) = (&self.routes[to], &self.routes[1 - to]);
        let coefficient = |slot: i32| {
            let old = if self.form == Form::InPlace { old.gate(slot) } else { 0.0 };
            f64::from(new.gate(slot) * SCALE) - f64::from(old * SCALE)
        };
        (0..self.slots).map(|slot| (slot, coefficient(slot as i32))).filter(|(_, c)| *c != 0.0).collect()
    }
}

/// Where an adapter lies: elements into the buffers.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub rank: u64,
    pub a: u64,
    pub b: u64,
    /// Of B's rows: rounded up to 16 bytes in 16 bits, as a loader should, for the fast path.
    pub b_stride: u64,
}

/// The sets come first, so that they go before their memory.
pub struct Model {
    sets: Vec<SwitchSet>,
    pub spec: Spec,
    /// Of each target in W and base: elements.
    pub starts: Vec<u64>,
    /// [slot][target]
    pub places: Vec<Vec<Place>>,
    pub weight: Buffer,
    pub base: Option<Buffer>,
    pub a: Buffer,
    pub b: Buffer,
    routes: [(Buffer, Buffer); 2],
    context: Context,
    stream: Stream,
}

impl Model {
    pub fn new(lab: &Lab, spec: &Spec) -> Result<Self> {
        let (context, stream) = (lab.context.clone(), lab.stream.clone());
        let (starts, elements) = offsets(spec.shapes.iter().map(|(o, i)| o * i));
        let (places, a_len, b_len) = lay_out(spec);
        let weight = lab.random(spec.dtype, elements, WEIGHT_SIZE, 1)?;
        let base = || lab.random(spec.dtype, elements, WEIGHT_SIZE, 2);
        let base = (spec.form == Form::FromBase).then(base).transpose()?;
        let a = lab.random(spec.dtype, a_len, ADAPTER_SIZE, 3)?;
        let b = lab.random(spec.dtype, b_len, ADAPTER_SIZE, 4)?;
        let upload = |route: &Route| -> Result<_> { Ok((lab.upload(DType::I32, &route.ids)?, lab.upload(DType::F32, &route.gates)?)) };
        let [first, second] = &spec.routes;
        let routes = [upload(first)?, upload(second)?];
        let spec = spec.clone();
        let mut model = Self { sets: Vec::new(), spec, starts, places, weight, base, a, b, routes, context, stream };
        let all = 0..model.spec.shapes.len();
        let groups = if model.spec.set_each { all.map(|t| vec![t]).collect() } else { vec![all.collect()] };
        model.sets = groups.iter().map(|targets: &Vec<usize>| model.set(targets)).collect::<Result<_>>()?;
        lab.synchronize()?;
        Ok(model)
    }

    /// A bank and a set over some of the targets.
    fn set(&self, targets: &[usize]) -> Result<SwitchSet> {
        let cap = |target: usize| (0..self.spec.slots).map(|slot| self.spec.rank(slot, target)).max().unwrap_or(0);
        let shape = |&target: &usize| {
            let (out_features, in_features) = self.spec.shapes[target];
            TargetShape { out_features, in_features, rank_cap: cap(target) }
        };
        let shapes: Vec<TargetShape> = targets.iter().map(shape).collect();
        let bank = AdapterBank::new(&self.stream, self.spec.dtype, self.spec.slots, &shapes, StateMemory::allocate())?;
        for slot in 0..self.spec.slots {
            let factors: Vec<Option<Factor>> = targets.iter().map(|&target| Some(self.factor(slot, target))).collect();
            bank.set_slot(&self.stream, slot, &factors)?;
        }
        let targets = targets.iter().map(|&target| self.target(target)).collect();
        let kernels = if self.spec.portable { SwitchKernels::Portable } else { SwitchKernels::Best };
        let options = SwitchOptions { form: self.spec.form, k_max: 8, kernels, memory: StateMemory::allocate() };
        Ok(SwitchSet::new(&self.stream, &bank, targets, options)?)
    }

    fn factor(&self, slot: u64, target: usize) -> Factor {
        let (out, cols) = self.spec.shapes[target];
        let place = self.places[slot as usize][target];
        let tensor = |buffer: &Buffer, at: u64, rows: u64, cols: u64, stride: u64| {
            let addr = buffer.address(at, (rows - 1) * stride + cols);
            // SAFETY: inside a filled buffer that outlives the sets; nothing writes it any more.
            unsafe { Tensor::from_raw(&self.context, addr, self.spec.dtype, rows, cols, stride) }
        };
        let a = tensor(&self.a, place.a, place.rank, cols, cols);
        let b = tensor(&self.b, place.b, out, place.rank, place.b_stride);
        Factor { a, b, scale: SCALE }
    }

    fn target(&self, target: usize) -> Target {
        let (rows, cols) = self.spec.shapes[target];
        let address = |buffer: &Buffer| buffer.address(self.starts[target], rows * cols);
        let (context, dtype) = (&self.context, self.spec.dtype);
        // SAFETY: inside buffers that outlive the sets; all work on them goes to one stream.
        let weight = unsafe { Weight::from_raw(context, address(&self.weight), dtype, rows, cols, cols) };
        // SAFETY: as above; nothing writes the bases.
        let base = |buffer| unsafe { Tensor::from_raw(context, address(buffer), dtype, rows, cols, cols) };
        Target { weight, base: self.base.as_ref().map(base) }
    }

    /// The bank of all targets, where one set serves them.
    pub fn bank(&self) -> &AdapterBank {
        self.sets[0].bank()
    }

    /// Enqueues the switch of all sets to one of the two routes.
    pub fn to(&mut self, route: usize) -> Result<()> {
        let (ids, gates) = &self.routes[route];
        for set in &mut self.sets {
            set.to(&self.stream, &ids.all(), &gates.all())?;
        }
        Ok(())
    }

    /// To any route, in device memory.
    pub fn set_route(&mut self, ids: &Mat<'_>, gates: &Mat<'_>) -> Result<()> {
        self.sets.iter_mut().try_for_each(|set| Ok(set.to(&self.stream, ids, gates)?))
    }

    pub fn unmerge(&mut self) -> Result<()> {
        self.sets.iter_mut().try_for_each(|set| Ok(set.unmerge(&self.stream)?))
    }

    /// W was written by others: the floor, the peer.
    pub fn invalidate(&mut self) -> Result<()> {
        self.sets.iter_mut().try_for_each(|set| Ok(set.invalidate(&self.stream)?))
    }

    pub fn anything_odd(&self) -> Result<bool> {
        let mut odd = false;
        for set in &self.sets {
            odd |= !set.odd(&self.stream)?.is_none();
        }
        Ok(odd)
    }

    /// What one launch covers: the start and length of W, or of each target.
    pub fn pieces(&self) -> Vec<(u64, u64)> {
        let length = |target: usize| self.spec.shapes[target].0 * self.spec.shapes[target].1;
        if self.spec.set_each {
            return (0..self.starts.len()).map(|target| (self.starts[target], length(target))).collect();
        }
        vec![(0, self.weight.len)]
    }
}

/// Where each of these begins when they follow one another, and their sum.
pub fn offsets(lengths: impl Iterator<Item = u64>) -> (Vec<u64>, u64) {
    let mut sum = 0;
    let starts = lengths
        .map(|length| {
            sum += length;
            sum - length
        })
        .collect();
    (starts, sum)
}

/// The adapters' places, slot by slot, and the elements of all A and of all B.
fn lay_out(spec: &Spec) -> (Vec<Vec<Place>>, u64, u64) {
    let (mut a, mut b) = (0, 0);
    let mut place = |slot: u64, target: usize| {
        let ((out, cols), rank) = (spec.shapes[target], spec.rank(slot, target));
        let place = Place { rank, a, b, b_stride: rank.next_multiple_of(8) };
        a += rank * cols;
        b += out * place.b_stride;
        place
    };
    let places = (0..spec.slots).map(|slot| (0..spec.shapes.len()).map(|target| place(slot, target)).collect()).collect();
    (places, a, b)
}
