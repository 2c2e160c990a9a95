//! Unmerged adapters in a pass over Llama-2-7B: every matrix product by cuBLAS (q, k, v and gate, up fused), with the adapters after
//! each and without. All in one graph; the same few activations serve every layer.

use crate::lab::{Buffer, Failure, Lab, Result};
use crate::model::{Model, Route, SCALE, Spec, llama2_7b};
use crate::oracle::{self, Exact, Term};
use crate::peer::Cublas;
use crate::timing::{Mode, Role, Subject, Timing, Work};
use crate::values::Rng;
use crate::{Case, Outcome};
use cudarc::driver::{CudaStream, result};
use lora_switch::{DType, Form, Mat, MatMut, Routes, Stream, apply, apply_begin, apply_finish, apply_into, apply_workspace_bytes, measure};
use std::ops::Range;
use std::sync::Arc;

/// Of a layer: q, k, v; o; gate, up; down.
pub(crate) const GROUPS: [Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];
pub(crate) const LAYER: usize = 7;
pub(crate) const SLOTS: u64 = 8;
pub(crate) const K: u64 = 2;

/// Where the adapters go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Behind each product.
    Behind,
    /// The first half beside the product, on a branch of the graph.
    Beside,
    /// Before the product, which adds to what they have written.
    Into,
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for tokens in [1, 32, 4096] {
        for rank in [16, 64] {
            for (end, place) in [("", Place::Behind), ("/beside", Place::Beside), ("/into", Place::Into)] {
                let run = move |lab: &Lab, timing: &Timing| run(lab, timing, tokens, rank, place);
                let id = format!("apply/7b/T{tokens}/r{rank}/k{K}{end}");
                cases.push(Case { id, modes: vec![Mode::Token], run: Box::new(run) });
            }
        }
    }
    cases
}

/// A batch of rows, and what they become in each group.
pub(crate) struct Pass<'l> {
    pub lab: &'l Lab,
    cublas: &'l Cublas,
    pub model: Model,
    pub rows: u64,
    /// 4096 and 11008 wide.
    x: [Buffer; 2],
    pub y: [Buffer; 4],
    pub ids: Buffer,
    pub gates: Buffer,
    workspace: Buffer,
    side: (Arc<CudaStream>, Stream),
}

fn run(lab: &Lab, timing: &Timing, rows: u64, rank: u64, place: Place) -> Result<Outcome> {
    let pass = Pass::new(lab, rows, rank, Form::InPlace)?;
    pass.products(0..32)?; // cuBLAS loads its kernels at their first use, which a capture forbids
    let works = vec![
        (Role::Case, Work::new(vec![lab.capture(|| pass.with_adapters(place))?], 1)),
        (Role::Base, Work::new(vec![lab.capture(|| pass.products(0..32))?], 1)),
        (Role::Floor, Work::new(vec![lab.capture(|| pass.with_updates())?], 1)),
    ];
    let figures = timing.measure(lab, &Subject { works, peer: None })?;
    Ok(Outcome { figures, checked: Some(pass.check(place)?) })
}

impl<'l> Pass<'l> {
    /// The form is that of the model's switch: to adapters that are not merged it does not matter.
    pub fn new(lab: &'l Lab, rows: u64, rank: u64, form: Form) -> Result<Self> {
        let cublas = lab.cublas().ok_or_else(|| Failure::Skip("the products are cuBLAS's".into()))?;
        let routes = [Route::new(&[0, 1], &[0.6, 0.4]), Route::new(&[2, 3], &[0.7, 0.3])];
        let (dtype, shapes) = (DType::Bf16, llama2_7b());
        let spec = Spec { dtype, form, shapes, ranks: vec![rank], slots: SLOTS, routes, set_each: false, portable: false };
        let model = Model::new(lab, &spec)?;
        let (ids, gates) = random_routes(rows);
        let widest = |targets: &Range<usize>| apply_workspace_bytes(model.bank(), targets.start as u64..targets.end as u64, rows, K);
        let bytes = GROUPS.iter().map(widest).collect::<lora_switch::Result<Vec<u64>>>()?;
        let outs = |targets: &Range<usize>| targets.clone().map(|t| model.spec.shapes[t].0).sum::<u64>();
        let y = |g: usize| lab.buffer(dtype, rows * outs(&GROUPS[g]));
        // First in line for the multiprocessors: its blocks are few, and behind the product's they would come too late.
        let (_, first) = result::stream::get_priority_range()?;
        let side = lab.cuda.context().new_stream_with_priority(first)?;
        let ours = lab.context.cuda_stream(&side)?;
        Ok(Self {
            x: [lab.random(dtype, rows * 4096, 1.0, 11)?, lab.random(dtype, rows * 11008, 1.0, 12)?],
            y: [y(0)?, y(1)?, y(2)?, y(3)?],
            ids: lab.upload(DType::I32, &ids)?,
            gates: lab.upload(DType::F32, &gates)?,
            workspace: lab.buffer(DType::U8, bytes.into_iter().max().unwrap_or(0))?,
            side: (side, ours),
            lab,
            cublas,
            model,
            rows,
        })
    }

    pub fn x(&self, group: usize) -> &Buffer {
        &self.x[usize::from(group == 3)]
    }

    pub fn mat<'b>(&self, buffer: &'b Buffer) -> Mat<'b> {
        let cols = buffer.len / self.rows;
        // SAFETY: a whole buffer; one stream, or a fork of it, orders all work.
        unsafe { Mat::raw(&self.lab.context, buffer.address(0, buffer.len), buffer.dtype, self.rows, cols, cols) }
    }

    /// The slices of a group's fused output.
    pub fn outputs(&self, group: usize) -> Vec<MatMut<'_>> {
        let buffer = &self.y[group];
        let (stride, mut start) = (buffer.len / self.rows, 0);
        let slice = |target: usize| {
            let (out, at) = (self.model.spec.shapes[target].0, start);
            start += out;
            let addr = buffer.address(at, buffer.len - at);
            // SAFETY: columns of the buffer; as above.
            unsafe { MatMut::raw(&self.lab.context, addr, buffer.dtype, self.rows, out, stride) }
        };
        GROUPS[group].clone().map(slice).collect()
    }

    fn product(&self, layer: usize, group: usize) -> Result<()> {
        self.multiply(layer, group, 0.0)
    }

    /// y = the product + beta y.
    fn multiply(&self, layer: usize, group: usize, beta: f32) -> Result<()> {
        let first = LAYER * layer + GROUPS[group].start;
        let (x, y) = (self.x(group), &self.y[group]);
        let (out, cols) = (y.len / self.rows, x.len / self.rows);
        let addresses = [x.address(0, x.len), self.model.weight.address(self.model.starts[first], out * cols), y.address(0, y.len)];
        self.cublas.linear(DType::Bf16, [self.rows, out, cols], addresses, beta)
    }

    pub fn for_each(&self, layers: Range<usize>, mut f: impl FnMut(usize, usize) -> Result<()>) -> Result<()> {
        layers.flat_map(|layer| (0..GROUPS.len()).map(move |group| (layer, group))).try_for_each(|(layer, group)| f(layer, group))
    }

    pub fn products(&self, layers: Range<usize>) -> Result<()> {
        self.for_each(layers, |layer, group| self.product(layer, group))
    }

    /// What no way of adding can beat: each output read and written once more, in a launch of its own.
    fn with_updates(&self) -> Result<()> {
        self.for_each(0..32, |layer, group| {
            self.product(layer, group)?;
            Ok(measure::scale_in_place(&self.lab.stream, 1.0, &mut self.y[group].all_mut())?)
        })
    }

    pub fn with_adapters(&self, place: Place) -> Result<()> {
        self.for_each(0..32, |layer, group| match place {
            Place::Behind => {
                self.product(layer, group)?;
                self.add(layer, group, place)
            }
            Place::Beside | Place::Into => self.add(layer, group, place),
        })
    }

    /// Behind: the adapters alone. Otherwise: the product as well.
    fn add(&self, layer: usize, group: usize, place: Place) -> Result<()> {
        let (ids, gates) = (self.mat(&self.ids), self.mat(&self.gates));
        let routes = Routes { ids: &ids, gates: &gates, row_map: None };
        let first = (LAYER * layer + GROUPS[group].start) as u64;
        let (bank, x, mut y) = (self.model.bank(), self.mat(self.x(group)), self.outputs(group));
        let targets = first..first + y.len() as u64;
        if place == Place::Behind {
            return Ok(apply(&self.lab.stream, bank, first, &x, &routes, &mut y, &mut self.workspace.all_mut())?);
        }
        if place == Place::Into {
            apply_into(&self.lab.stream, bank, first, &x, &routes, &mut y, &mut self.workspace.all_mut())?;
            return self.multiply(layer, group, 1.0);
        }
        let (side, stream) = &self.side;
        side.join(&self.lab.cuda)?;
        apply_begin(stream, bank, targets, &x, &routes, &mut self.workspace.all_mut())?;
        self.product(layer, group)?;
        self.lab.cuda.join(side)?;
        Ok(apply_finish(&self.lab.stream, bank, first, &routes, &mut y, &self.workspace.all())?)
    }

    /// The last layer, some rows and some columns of each target: the product alone, then with the adapters.
    pub fn check(&self, place: Place) -> Result<bool> {
        let (mut rng, mut good) = (Rng(21), true);
        let last = self.model.spec.shapes.len() / LAYER - 1;
        for (group, targets) in GROUPS.iter().enumerate() {
            self.product(last, group)?;
            let before = self.lab.download(&self.y[group], 0, self.y[group].len)?;
            if place == Place::Behind {
                self.product(last, group)?;
            }
            self.add(last, group, place)?;
            let after = self.lab.download(&self.y[group], 0, self.y[group].len)?;
            let stride = self.y[group].len / self.rows;
            let mut start = 0;
            for target in targets.clone() {
                let outs = self.model.spec.shapes[target].0;
                let columns: Vec<u64> = (0..16).map(|_| rng.below(outs as usize) as u64).collect();
                for row in [0, self.rows / 2, self.rows - 1] {
                    let pick = |bits: &[u32]| {
                        let bits: Vec<u32> = columns.iter().map(|o| bits[(row * stride + start + o) as usize]).collect();
                        Exact::new(DType::Bf16, 1, bits.len(), &bits).x
                    };
                    good &= self.is_close(LAYER * last + target, group, row, &columns, [&pick(&before), &pick(&after)], place)?;
                }
                start += outs;
            }
        }
        Ok(good)
    }

    pub fn exact(&self, buffer: &Buffer, at: u64, rows: usize, cols: u64) -> Result<Exact> {
        Ok(Exact::new(buffer.dtype, rows, cols as usize, &self.lab.download(buffer, at, rows as u64 * cols)?))
    }

    /// A, some rows of B, and the coefficient of each adapter of a row.
    pub fn adapters(&self, target: usize, row: u64, columns: &[u64]) -> Result<Vec<(Exact, Exact, f64)>> {
        let (lab, model, cols) = (self.lab, &self.model, self.model.spec.shapes[target].1);
        let (ids, gates) = (lab.download(&self.ids, row * K, K)?, lab.download(&self.gates, row * K, K)?);
        let mut adapters = Vec::new();
        for (slot, gate) in ids.into_iter().zip(gates) {
            let place = model.places[slot as usize][target];
            let mut b = Vec::new();
            for o in columns {
                b.extend(self.exact(&model.b, place.b + o * place.b_stride, 1, place.rank)?.x);
            }
            let b = Exact { rows: columns.len(), cols: place.rank as usize, x: b };
            adapters.push((self.exact(&model.a, place.a, place.rank as usize, cols)?, b, f64::from(f32::from_bits(gate) * SCALE)));
        }
        Ok(adapters)
    }

    fn is_close(&self, target: usize, group: usize, row: u64, columns: &[u64], [before, after]: [&[f64]; 2], place: Place) -> Result<bool> {
        let cols = self.model.spec.shapes[target].1;
        let x = self.exact(self.x(group), row * cols, 1, cols)?.x;
        let adapters = self.adapters(target, row, columns)?;
        let terms: Vec<Term<'_>> = adapters.iter().map(|(a, b, c)| Term { a, b, coefficient: *c }).collect();
        let in_bf16 = oracle::may_be_dense(self.rows as usize, SLOTS as usize, self.model.spec.ranks[0] as usize);
        let (want, bounds) = oracle::apply(before, &x, &terms, in_bf16);
        let half_ulp = |x: f64| oracle::half_ulp(DType::Bf16, x.abs());
        let close = |i: usize| {
            // Into: the product was not rounded, but the adapters' sum.
            let other = if place == Place::Into { half_ulp(before[i]) + half_ulp(want[i] - before[i] + bounds[i]) } else { 0.0 };
            (after[i] - want[i]).abs() <= bounds[i] + other + half_ulp(want[i].abs() + bounds[i] + other)
        };
        let good = (0..want.len()).all(close) && after != before;
        if !good {
            println!("target {target}, row {row}: {after:?}, exactly {want:?}, before {before:?}");
        }
        Ok(good)
    }
}

/// Two distinct slots a row, with gates that sum to 1.
fn random_routes(rows: u64) -> (Vec<i32>, Vec<f32>) {
    let mut rng = Rng(13);
    let (mut ids, mut gates) = (Vec::new(), Vec::new());
    for _ in 0..rows {
        let first = rng.below(SLOTS as usize) as i32;
        ids.extend([first, (first + 1 + rng.below(SLOTS as usize - 1) as i32) % SLOTS as i32]);
        let gate = rng.below(1 << 20) as f32 / (1 << 20) as f32;
        gates.extend([gate, 1.0 - gate]);
    }
    (ids, gates)
}
