//! What a token costs by how many tokens a route serves: merge it and multiply, or multiply and apply. One sequence of Llama-2-7B; the
//! rows make docs/crossover.svg (`make gen`).

use crate::apply::{Pass, Place};
use crate::lab::{Lab, Result};
use crate::timing::{Mode, Role, Subject, Timing, Work};
use crate::{Case, Outcome, check};
use lora_switch::Form;

const RANK: u64 = 16;

/// A way to decode some tokens under one route, the route's own work included.
type Measure = fn(&Lab, &Timing, usize) -> Result<Outcome>;

pub fn cases() -> Vec<Case> {
    let case = |strategy: &str, tokens: usize, measure: Measure| Case {
        id: format!("crossover/7b/r{RANK}/k2/{strategy}/R{tokens}"),
        modes: vec![Mode::Token],
        run: Box::new(move |lab, timing| measure(lab, timing, tokens)),
    };
    let switch = [1, 2, 4, 8, 16, 32, 64].map(|tokens| case("switch", tokens, switch));
    // Adapters that are not merged do not know how long their route lasts: two points show it.
    let apply = [1, 64].map(|tokens| case("apply", tokens, apply));
    switch.into_iter().chain(apply).collect()
}

/// The figures are for a token; the base has no adapters.
fn subject(lab: &Lab, pass: &Pass<'_>, case: Work) -> Result<Subject> {
    let base = Work::new(vec![lab.capture(|| pass.products(0..32))?], 1);
    Ok(Subject { works: vec![(Role::Case, case), (Role::Base, base)], peer: None })
}

fn switch(lab: &Lab, timing: &Timing, tokens: usize) -> Result<Outcome> {
    let mut pass = Pass::new(lab, 1, RANK, Form::FromBase)?;
    pass.products(0..32)?; // cuBLAS loads its kernels at their first use, which a capture forbids
    let mut decode = |route: usize| {
        lab.capture(|| {
            pass.model.to(route)?;
            (0..tokens).try_for_each(|_| pass.products(0..32))
        })
    };
    let case = Work::new(vec![decode(0)?, decode(1)?], tokens);
    let figures = timing.measure(lab, &subject(lab, &pass, case)?)?;
    Ok(Outcome { figures, checked: Some(check::switch(lab, &mut pass.model)?) })
}

fn apply(lab: &Lab, timing: &Timing, tokens: usize) -> Result<Outcome> {
    let pass = Pass::new(lab, 1, RANK, Form::InPlace)?;
    pass.products(0..32)?;
    let graph = lab.capture(|| (0..tokens).try_for_each(|_| pass.with_adapters(Place::Behind)))?;
    let figures = timing.measure(lab, &subject(lab, &pass, Work::new(vec![graph], tokens))?)?;
    Ok(Outcome { figures, checked: Some(pass.check(Place::Behind)?) })
}
