//! What the card allows: the time to read, or to read and write, every byte once, and to launch at all.

use crate::lab::{Buffer, Lab, Result};
use crate::model::{Model, WEIGHT_SIZE};
use crate::timing::{Mode, Role, Subject, Work};
use crate::{Case, Outcome};
use lora_switch::{Context, DType, Form, Mat, MatMut, measure};

/// Elements of Llama-2-7B's adapted weights.
const ELEMENTS: u64 = 6_476_005_376;
/// Of the graphs that time a single launch.
pub const NODES: usize = 64;

pub fn cases() -> Vec<Case> {
    let case = |id: &str, run: fn(&Lab) -> Result<(Subject, Memory)>, check: fn(&Lab, &Memory) -> Result<Option<bool>>| Case {
        id: id.to_owned(),
        modes: vec![Mode::Token, Mode::Gap, Mode::Loop],
        run: Box::new(move |lab, timing| {
            let (subject, memory) = run(lab)?;
            let figures = timing.measure(lab, &subject)?;
            Ok(Outcome { figures, checked: check(lab, &memory)? })
        }),
    };
    vec![
        case("floor/read/7b/bf16", read, same_on_both_backends),
        case("floor/scale/7b/in-place/bf16", scale_in_place, |_, _| Ok(None)),
        case("floor/scale/7b/from-base/bf16", scale_from_base, same_bits),
        case("floor/node", node, |_, _| Ok(None)),
    ]
}

/// What a case keeps while it runs.
type Memory = Vec<Buffer>;

fn subject(work: Work) -> Subject {
    Subject { works: vec![(Role::Case, work)], peer: None }
}

fn read(lab: &Lab) -> Result<(Subject, Memory)> {
    let (x, sink) = (lab.random(DType::Bf16, ELEMENTS, WEIGHT_SIZE, 1)?, lab.upload(DType::I32, &[0i32])?);
    let graph = lab.capture(|| Ok(measure::read(&lab.stream, &x.all(), &mut sink.all_mut())?))?;
    Ok((subject(Work::new(vec![graph], 1)), vec![x, sink]))
}

fn scale_in_place(lab: &Lab) -> Result<(Subject, Memory)> {
    let y = lab.random(DType::Bf16, ELEMENTS, WEIGHT_SIZE, 1)?;
    let graph = lab.capture(|| Ok(measure::scale_in_place(&lab.stream, 1.0, &mut y.all_mut())?))?;
    Ok((subject(Work::new(vec![graph], 1)), vec![y]))
}

fn scale_from_base(lab: &Lab) -> Result<(Subject, Memory)> {
    let x = lab.random(DType::Bf16, ELEMENTS, WEIGHT_SIZE, 1)?;
    let y = lab.random(DType::Bf16, ELEMENTS, WEIGHT_SIZE, 2)?;
    let graph = lab.capture(|| Ok(measure::scale(&lab.stream, 1.0, &x.all(), &mut y.all_mut())?))?;
    Ok((subject(Work::new(vec![graph], 1)), vec![x, y]))
}

fn node(lab: &Lab) -> Result<(Subject, Memory)> {
    let y = lab.upload(DType::F32, &[1f32])?;
    let work = launches(lab, &y)?;
    Ok((subject(work), vec![y]))
}

/// Kernels that do next to nothing.
pub fn launches(lab: &Lab, y: &Buffer) -> Result<Work> {
    let one = || measure::scale_in_place(&lab.stream, 1.0, &mut y.part_mut(0, 1));
    let graph = lab.capture(|| (0..NODES).try_for_each(|_| Ok(one()?)))?;
    Ok(Work::new(vec![graph], NODES))
}

/// Of a switch that has nothing to do.
pub fn of_a_launch(lab: &Lab, model: &Model) -> Result<Work> {
    launches(lab, &model.weight)
}

/// Of a switch: the same bytes, scaled by one, so that in place they stay what they are.
pub fn of_switch(lab: &Lab, model: &Model) -> Result<Work> {
    let pieces = model.pieces();
    let graph = lab.capture(|| {
        for &(at, len) in &pieces {
            let mut weight = model.weight.part_mut(at, len);
            match (&model.base, model.spec.form) {
                (Some(base), Form::FromBase) => measure::scale(&lab.stream, 1.0, &base.part(at, len), &mut weight)?,
                _ => measure::scale_in_place(&lab.stream, 1.0, &mut weight)?,
            }
        }
        Ok(())
    })?;
    Ok(Work::new(vec![graph], pieces.len()))
}

/// The xor of all words.
fn sum(lab: &Lab, x: &Mat<'_>) -> Result<u32> {
    let sink = lab.upload(DType::I32, &[0i32])?;
    measure::read(&lab.stream, x, &mut sink.all_mut())?;
    Ok(lab.download(&sink, 0, 1)?[0])
}

/// Random data and their sum, with a tail behind the last 16 bytes, are what the CPU makes of them.
fn same_on_both_backends(lab: &Lab, _: &Memory) -> Result<Option<bool>> {
    const LEN: usize = (1 << 20) + 5;
    let (seed, size) = (11u64, 0.5);
    let device = lab.random(DType::F32, LEN as u64, size, seed)?;
    let stream = Context::cpu(0)?.cpu_stream()?;
    let mut memory = vec![0f32; LEN + 4];
    let start = memory.as_ptr().align_offset(16);
    let host = &mut memory[start..start + LEN];
    measure::fill_random(&stream, seed << 40, size, &mut MatMut::host(host, 1, LEN)?)?;
    let mut sink = [0i32];
    measure::read(&stream, &Mat::host(host, 1, LEN)?, &mut MatMut::host(&mut sink, 1, 1)?)?;
    Ok(Some(sum(lab, &device.all())? == sink[0] as u32))
}

fn same_bits(lab: &Lab, memory: &Memory) -> Result<Option<bool>> {
    Ok(Some(sum(lab, &memory[0].all())? == sum(lab, &memory[1].all())?))
}
