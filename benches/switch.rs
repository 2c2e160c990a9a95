//! The switch at the shapes of Llama-2-7B, in one launch over 224 matrices, and of single matrices.

use crate::lab::{Lab, Result};
use crate::model::{Model, Route, Spec, llama2_7b};
use crate::peer::Peer;
use crate::timing::{Mode, Role, Subject, Timing, Work};
use crate::{Case, Outcome, check, floor};
use lora_switch::{DType, Form};

const FORMS: [(&str, Form); 2] = [("from-base", Form::FromBase), ("in-place", Form::InPlace)];

/// What the launches do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Both experts leave, two others come.
    All,
    /// One stays, with another gate.
    OneStays,
    None,
}

impl Change {
    fn routes(self) -> [Route; 2] {
        let first = Route::new(&[0, 1], &[0.6, 0.4]);
        let second = match self {
            Self::All => Route::new(&[2, 3], &[0.7, 0.3]),
            Self::OneStays => Route::new(&[0, 2], &[0.7, 0.3]),
            Self::None => first.clone(),
        };
        [first, second]
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, form) in FORMS {
        for rank in [8, 16, 32, 64, 128, 256] {
            cases.push(case(format!("switch/7b/r{rank}/k2/{name}/bf16"), llama(DType::Bf16, form, &[rank]), Change::All));
        }
        for dtype in [DType::F16, DType::F32] {
            cases.push(case(format!("switch/7b/r16/k2/{name}/{dtype}"), llama(dtype, form, &[16]), Change::All));
        }
        cases.push(case(format!("switch/7b/r16/k2/{name}/bf16/unchanged"), llama(DType::Bf16, form, &[16]), Change::None));
    }
    let in_place = llama(DType::Bf16, Form::InPlace, &[16]);
    cases.push(case("switch/7b/r16/k2/in-place/bf16/one-stays".into(), in_place, Change::OneStays));
    let mixed = llama(DType::Bf16, Form::FromBase, &[4, 8, 24, 64]);
    cases.push(case("switch/7b/mixed/k2/from-base/bf16".into(), mixed, Change::All));
    for (name, form) in FORMS {
        for rank in [8, 16, 32] {
            let spec = Spec { portable: true, ..llama(DType::Bf16, form, &[rank]) };
            cases.push(case(format!("switch/7b/r{rank}/k2/{name}/bf16/generic"), spec, Change::All));
        }
    }
    for (rows, cols) in [(4096, 4096), (1024, 4096), (14336, 4096), (1408, 2048), (256, 7168)] {
        for rank in [8, 16, 64] {
            cases.push(case(format!("switch/one/{rows}x{cols}/r{rank}/k2/in-place/bf16"), one(rows, cols, rank), Change::All));
        }
    }
    cases
}

fn llama(dtype: DType, form: Form, ranks: &[u64]) -> Spec {
    let routes = Change::All.routes();
    Spec { dtype, form, shapes: llama2_7b(), ranks: ranks.to_vec(), slots: 4, routes, set_each: false, portable: false }
}

/// As many sets as nodes, which together are larger than any cache: each launch finds W and adapters cold.
fn one(rows: u64, cols: u64, rank: u64) -> Spec {
    Spec { shapes: vec![(rows, cols); floor::NODES], set_each: true, ..llama(DType::Bf16, Form::InPlace, &[rank]) }
}

fn case(id: String, spec: Spec, change: Change) -> Case {
    let spec = Spec { routes: change.routes(), ..spec };
    // From there on power decides, and the modes differ.
    let is_heavy = spec.ranks.iter().any(|&rank| rank >= 64) && !spec.set_each;
    let modes = if is_heavy { vec![Mode::Token, Mode::Gap, Mode::Loop] } else { vec![Mode::Token] };
    Case { id, modes, run: Box::new(move |lab, timing| run(lab, timing, &spec, change)) }
}

fn run(lab: &Lab, timing: &Timing, spec: &Spec, change: Change) -> Result<Outcome> {
    let mut model = Model::new(lab, spec)?;
    let figures = if change == Change::None {
        model.to(0)?;
        timing.measure(lab, &unchanged(lab, &mut model)?)?
    } else {
        let peer = Peer::new(lab, &model)?;
        timing.measure(lab, &changed(lab, &mut model, &peer)?)?
    };
    Ok(Outcome { figures, checked: Some(check::switch(lab, &mut model)?) })
}

/// Floor and peer write W too. That is no matter: each launch writes every W, whatever it holds.
fn changed(lab: &Lab, model: &mut Model, peer: &Peer) -> Result<Subject> {
    let nodes = model.pieces().len();
    let switch = vec![lab.capture(|| model.to(0))?, lab.capture(|| model.to(1))?];
    let mut works = vec![(Role::Case, Work::new(switch, nodes)), (Role::Floor, floor::of_switch(lab, model)?)];
    let peer = peer.work(lab, model, nodes)?;
    let (name, work) = peer.unzip();
    works.extend(work.map(|work| (Role::Peer, work)));
    Ok(Subject { works, peer: name })
}

/// Only deciding that there is nothing to do; its floor is a launch.
fn unchanged(lab: &Lab, model: &mut Model) -> Result<Subject> {
    let graph = lab.capture(|| (0..floor::NODES).try_for_each(|_| model.to(0)))?;
    let case = Work::new(vec![graph], floor::NODES);
    Ok(Subject { works: vec![(Role::Case, case), (Role::Floor, floor::of_a_launch(lab, model)?)], peer: None })
}
