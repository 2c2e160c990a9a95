//! A pass over Llama-2-7B by `linear`, with adapters and without: beside it every matrix product by cuBLAS without adapters (q, k, v and
//! gate, up fused), and the time to read the weights and the routes' adapters once. Each in one graph.

use crate::apply::{GROUPS, K, LAYER, Pass, SLOTS};
use crate::lab::{Buffer, Lab, Result};
use crate::oracle::{self, Term};
use crate::timing::{Mode, Role, Subject, Timing, Work};
use crate::values::Rng;
use crate::{Case, Outcome};
use lora_switch::{DType, Form, LinearOptions, Mat, Routes, linear, linear_workspace_bytes, measure};
use std::collections::BTreeSet;

pub fn cases() -> Vec<Case> {
    let case = |(tokens, rank): (u64, Option<u64>)| {
        let id = rank.map_or(format!("linear/7b/T{tokens}/none"), |rank| format!("linear/7b/T{tokens}/r{rank}/k{K}"));
        let run = move |lab: &Lab, timing: &Timing| run(lab, timing, tokens, rank);
        Case { id, modes: vec![Mode::Token], run: Box::new(run) }
    };
    [(1, None), (1, Some(16)), (1, Some(64)), (8, Some(16))].map(case).into()
}

/// The buffers of the passes with `apply`; without adapters, the routes have no entries.
pub struct Fused<'l> {
    pub pass: Pass<'l>,
    k: u64,
    workspace: Buffer,
    /// Of the reads.
    sink: Buffer,
}

fn run(lab: &Lab, timing: &Timing, tokens: u64, rank: Option<u64>) -> Result<Outcome> {
    let (pass, k) = (Pass::new(lab, tokens, rank.unwrap_or(8), Form::InPlace)?, if rank.is_some() { K } else { 0 });
    let fused = Fused::new(pass, k)?;
    fused.pass.products(0..32)?; // cuBLAS loads its kernels at their first use, which a capture forbids
    let works = vec![
        (Role::Case, Work::new(vec![lab.capture(|| fused.all())?], 1)),
        (Role::Base, Work::new(vec![lab.capture(|| fused.pass.products(0..32))?], 1)),
        (Role::Floor, Work::new(vec![fused.floor()?], 1)),
    ];
    let figures = timing.measure(lab, &Subject { works, peer: None })?;
    Ok(Outcome { figures, checked: Some(fused.check()?) })
}

impl<'l> Fused<'l> {
    pub fn new(pass: Pass<'l>, k: u64) -> Result<Self> {
        let needed =
            |group: &std::ops::Range<usize>| linear_workspace_bytes(pass.model.bank(), group.start as u64..group.end as u64, pass.rows, k);
        let bytes = GROUPS.iter().map(needed).collect::<lora_switch::Result<Vec<u64>>>()?.into_iter().max().unwrap_or(0);
        let (workspace, sink) = (pass.lab.upload(DType::U8, &vec![0u8; bytes as usize])?, pass.lab.upload(DType::I32, &[0i32])?);
        Ok(Self { pass, k, workspace, sink })
    }

    /// Every product of a token.
    pub fn all(&self) -> Result<()> {
        self.pass.for_each(0..32, |layer, group| self.linear(layer, group))
    }

    fn linear(&self, layer: usize, group: usize) -> Result<()> {
        let Pass { lab, model, rows, ids, gates, .. } = &self.pass;
        let first = LAYER * layer + GROUPS[group].start;
        let weight = |target: usize| {
            let (out, cols) = model.spec.shapes[target];
            let addr = model.weight.address(model.starts[target], out * cols);
            // SAFETY: inside a filled buffer that nothing writes any more.
            unsafe { Mat::raw(&lab.context, addr, model.spec.dtype, out, cols, cols) }
        };
        let weights: Vec<Mat<'_>> = (first..first + GROUPS[group].len()).map(weight).collect();
        let entries = |buffer: &Buffer| {
            // SAFETY: a whole buffer, or none of its columns.
            unsafe { Mat::raw(&lab.context, buffer.address(0, rows * self.k), buffer.dtype, *rows, self.k, self.k) }
        };
        let (ids, gates) = (entries(ids), entries(gates));
        let routes = Routes { ids: &ids, gates: &gates, row_map: None };
        // Before a token's first product stands what may have written the weights.
        let (options, x) = (LinearOptions { only_x_is_new: (layer, group) != (0, 0), alone: false }, self.pass.mat(self.pass.x(group)));
        let (mut y, workspace) = (self.pass.outputs(group), &mut self.workspace.all_mut());
        Ok(linear(&lab.stream, options, model.bank(), first as u64, &weights, &x, &routes, &mut y, workspace)?)
    }

    /// Reads the weights, and as much of all A and B as the routes' slots have.
    fn floor(&self) -> Result<cudarc::driver::CudaGraph> {
        let Pass { lab, model, rows, ids, .. } = &self.pass;
        let slots = BTreeSet::from_iter(lab.download(ids, 0, rows * self.k)?).len() as u64;
        lab.capture(|| {
            for (buffer, len) in
                [(&model.weight, model.weight.len), (&model.a, model.a.len / SLOTS * slots), (&model.b, model.b.len / SLOTS * slots)]
            {
                measure::read(&lab.stream, &buffer.part(0, len), &mut self.sink.all_mut())?;
            }
            Ok(())
        })
    }

    /// The last layer, some rows and some columns of each target.
    pub fn check(&self) -> Result<bool> {
        let (Pass { lab, model, rows, .. }, mut rng, mut good) = (&self.pass, Rng(21), true);
        let last = model.spec.shapes.len() / LAYER - 1;
        for (group, targets) in GROUPS.iter().enumerate() {
            let y = &self.pass.y[group];
            self.linear(last, group)?;
            let bits = lab.download(y, 0, y.len)?;
            let (stride, mut start) = (y.len / rows, 0);
            for target in targets.clone().map(|target| LAYER * last + target) {
                let (outs, cols) = model.spec.shapes[target];
                let columns: Vec<u64> = [0, outs - 1].into_iter().chain((0..14).map(|_| rng.below(outs as usize) as u64)).collect();
                for row in BTreeSet::from([0, rows / 2, rows - 1]) {
                    let x = self.pass.exact(self.pass.x(group), row * cols, 1, cols)?.x;
                    let dot = |o: &u64| Ok(oracle::dot(&x, &self.pass.exact(&model.weight, model.starts[target] + o * cols, 1, cols)?.x));
                    let dots = columns.iter().map(dot).collect::<Result<Vec<(f64, f64)>>>()?;
                    let products: Vec<f64> = dots.iter().map(|dot| dot.0).collect();
                    let adapters = if self.k > 0 { self.pass.adapters(target, row, &columns)? } else { Vec::new() };
                    let terms: Vec<Term<'_>> = adapters.iter().map(|(a, b, c)| Term { a, b, coefficient: *c }).collect();
                    let (want, bounds) = oracle::apply(&products, &x, &terms, false);
                    for (i, o) in columns.iter().enumerate() {
                        let got = crate::values::decode(DType::Bf16, bits[(row * stride + start + o) as usize]);
                        let bound = bounds[i] + dots[i].1;
                        let off = (got - want[i]).abs();
                        if off.is_nan() || off > bound + oracle::half_ulp(DType::Bf16, want[i].abs() + bound) {
                            println!("target {target}, row {row}, column {o}: {got}, exactly {}", want[i]);
                            good = false;
                        }
                    }
                }
                start += outs;
            }
        }
        Ok(good)
    }
}
