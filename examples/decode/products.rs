//! What a token's inputs become: the products of all projections, with the adapters merged into the weights, added behind the products
//! or beside them. Projections that share their input go together.

use crate::Failure;
use crate::check::uniform;
use crate::machine::{Buffer, Machine, Scalar};
use crate::model::{Projection, Target, padded};
use lora_switch::{
    AdapterBank, Float, LinearOptions, Mat, MatMut, Routes, Strategy, apply, apply_workspace_bytes, linear, linear_workspace_bytes,
};
use std::ops::Range;

/// Modules of one parent that read the same activations.
const FAMILIES: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];

/// Neighbours that share their input, in the order of the projections.
pub fn group(projections: &[Projection]) -> Vec<Range<usize>> {
    let family = |p: &Projection| {
        let (parent, name) = p.name.rsplit_once('.').unwrap_or(("", &p.name));
        FAMILIES.iter().position(|family| family.contains(&name)).map(|family| (parent.to_string(), family, p.cols))
    };
    let mut groups = Vec::<Range<usize>>::new();
    for (i, projection) in projections.iter().enumerate() {
        match groups.last_mut() {
            Some(last) if family(projection).is_some() && family(projection) == family(&projections[last.start]) => last.end = i + 1,
            _ => groups.push(i..i + 1),
        }
    }
    groups
}

/// A group's input, the same for every token: numbers in -1..1.
pub fn input<T: Float>(seed: u64, group: &Range<usize>, cols: usize) -> Vec<T> {
    uniform(seed ^ group.start as u64).take(cols).map(|x| T::from_f32(x as f32)).collect()
}

pub struct Products<T> {
    strategy: Strategy,
    groups: Vec<Range<usize>>,
    /// Of each group.
    x: Vec<Buffer<T>>,
    /// All outputs: those of a target begin at its `y`.
    pub y: Buffer<f32>,
    /// `linear`'s, zeros at first; and `apply`'s.
    workspaces: [Buffer<u8>; 2],
}

impl<T: Scalar + Float> Products<T> {
    pub fn new(
        machine: &Machine,
        bank: &AdapterBank,
        targets: &[Target],
        groups: Vec<Range<usize>>,
        strategy: Strategy,
        k: u64,
        seed: u64,
    ) -> Result<Self, Failure> {
        let (mut x, mut bytes) = (Vec::new(), [0; 2]);
        for group in &groups {
            let of_bank = group.start as u64..group.end as u64;
            let needed = [linear_workspace_bytes(bank, of_bank.clone(), 1, k)?, apply_workspace_bytes(bank, of_bank, 1, k)?];
            bytes = [0, 1].map(|i| bytes[i].max(needed[i]));
            let values = input::<T>(seed, group, targets[group.start].cols);
            let mut buffer = machine.zeros(padded::<T>(values.len()))?;
            buffer.write(0, &values)?;
            x.push(buffer);
        }
        let outputs = targets.last().map_or(0, |target| target.y + target.rows);
        let workspaces = [machine.zeros(bytes[0] as usize)?, machine.zeros(bytes[1] as usize)?];
        Ok(Self { strategy, groups, x, y: machine.zeros(outputs)?, workspaces })
    }

    /// Enqueues them all for a token with this route. `weights` are merged or not, as the strategy wants it.
    pub fn run(
        &mut self,
        machine: &Machine,
        bank: &AdapterBank,
        targets: &[Target],
        weights: &mut Buffer<T>,
        (ids, gates): (&Buffer<i32>, &Buffer<f32>),
    ) -> Result<(), Failure> {
        let (stream, context) = (&machine.stream, &machine.context);
        let (weights, y) = (weights.addr(), self.y.addr());
        let (ids, gates) = (ids.vector(stream)?, gates.vector(stream)?);
        // SAFETY: nothing is read of a matrix without columns.
        let [no_ids, no_gates] = [ids.dtype(), gates.dtype()].map(|dtype| unsafe { Mat::raw(context, 0, dtype, 1, 0, 0) });
        let route = Routes { ids: &ids, gates: &gates, row_map: None };
        let none = Routes { ids: &no_ids, gates: &no_gates, row_map: None };
        for (group, x) in self.groups.iter().zip(&mut self.x) {
            let (first, members) = (group.start as u64, &targets[group.clone()]);
            let cols = members[0].cols as u64;
            // SAFETY: a group's input, `cols` elements of a buffer of this object's; one stream orders all that touches it.
            let x = unsafe { Mat::raw(context, x.addr(), T::DTYPE, 1, cols, cols) };
            let weight = |target: &Target| {
                let addr = weights + (target.start * size_of::<T>()) as u64;
                // SAFETY: the target's part of the model's weights, which are filled; one stream orders all that touches them.
                unsafe { Mat::raw(context, addr, T::DTYPE, target.rows as u64, cols, cols) }
            };
            let output = |target: &Target| {
                let (addr, rows) = (y + (target.y * size_of::<f32>()) as u64, target.rows as u64);
                // SAFETY: the target's part of y, which no other target shares; as above.
                unsafe { MatMut::raw(context, addr, lora_switch::DType::F32, 1, rows, rows) }
            };
            let weights: Vec<Mat<'_>> = members.iter().map(weight).collect();
            let mut y: Vec<MatMut<'_>> = members.iter().map(output).collect();
            let [of_linear, of_apply] = &mut self.workspaces;
            let routes = if self.strategy == Strategy::Linear { &route } else { &none };
            let options = LinearOptions::default();
            linear(stream, options, bank, first, &weights, &x, routes, &mut y, &mut of_linear.vector_mut(stream)?)?;
            if self.strategy == Strategy::Apply {
                apply(stream, bank, first, &x, &route, &mut y, &mut of_apply.vector_mut(stream)?)?;
            }
        }
        Ok(())
    }
}
