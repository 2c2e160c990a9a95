//! What a token costs by how many tokens a route serves: merge it and multiply, multiply and apply, or both in one. One sequence of
//! Llama-2-7B; the rows make docs/crossover.svg (`make gen`).

use crate::apply::{K, Pass, Place};
use crate::lab::{Lab, Result};
use crate::linear::Fused;
use crate::timing::{Mode, Role, Subject, Timing, Work};
use crate::{Case, Outcome, check};
use lora_switch::Form;

const RANK: u64 = 16;

/// A way to decode some tokens under one route, the route's own work included.
type Measure = fn(&Lab, &Timing, usize) -> Result<Outcome>;

pub fn cases() -> Vec<Case> {
    let case = |strategy: &str, tokens: usize, measure: Measure| Case {
        id: format!("crossover/7b/r{RANK}/k{K}/{strategy}/R{tokens}"),
        modes: vec![Mode::Token],
        run: Box::new(move |lab, timing| measure(lab, timing, tokens)),
    };
    let mut cases = Vec::new();
    for tokens in [1, 2, 4, 8, 16, 32] {
        cases.extend([case("switch", tokens, switch), case("switch-linear", tokens, switch_linear)]);
    }
    // Adapters that are not merged do not know how long their route lasts: two points show it.
    for tokens in [1, 32] {
        cases.extend([case("apply", tokens, apply), case("linear", tokens, both_in_one)]);
    }
    cases
}

/// The figures are for a token; the base has no adapters.
fn subject(lab: &Lab, pass: &Pass<'_>, case: Work) -> Result<Subject> {
    let base = Work::new(vec![lab.capture(|| pass.products(0..32))?], 1);
    Ok(Subject { works: vec![(Role::Case, case), (Role::Base, base)], peer: None })
}

/// Without adapters, and with cuBLAS ready: it loads its kernels at their first use, which a capture forbids.
fn ready(lab: &Lab, form: Form, k: u64) -> Result<Fused<'_>> {
    let pass = Pass::new(lab, 1, RANK, form)?;
    pass.products(0..32)?;
    Fused::new(pass, k)
}

/// Tokens of one route: a switch, then the products of each token.
fn switched(lab: &Lab, timing: &Timing, tokens: usize, token: fn(&Fused<'_>) -> Result<()>) -> Result<Outcome> {
    let mut fused = ready(lab, Form::FromBase, 0)?;
    let mut decode = |route: usize| {
        lab.capture(|| {
            fused.pass.model.to(route)?;
            (0..tokens).try_for_each(|_| token(&fused))
        })
    };
    let case = Work::new(vec![decode(0)?, decode(1)?], tokens);
    let figures = timing.measure(lab, &subject(lab, &fused.pass, case)?)?;
    let good = fused.check()?;
    Ok(Outcome { figures, checked: Some(check::switch(lab, &mut fused.pass.model)? && good) })
}

fn switch(lab: &Lab, timing: &Timing, tokens: usize) -> Result<Outcome> {
    switched(lab, timing, tokens, |fused| fused.pass.products(0..32))
}

fn switch_linear(lab: &Lab, timing: &Timing, tokens: usize) -> Result<Outcome> {
    switched(lab, timing, tokens, |fused| fused.all())
}

fn apply(lab: &Lab, timing: &Timing, tokens: usize) -> Result<Outcome> {
    let pass = ready(lab, Form::InPlace, K)?.pass;
    let graph = lab.capture(|| (0..tokens).try_for_each(|_| pass.with_adapters(Place::Behind)))?;
    let figures = timing.measure(lab, &subject(lab, &pass, Work::new(vec![graph], tokens))?)?;
    Ok(Outcome { figures, checked: Some(pass.check(Place::Behind)?) })
}

fn both_in_one(lab: &Lab, timing: &Timing, tokens: usize) -> Result<Outcome> {
    let fused = ready(lab, Form::InPlace, K)?;
    let graph = lab.capture(|| (0..tokens).try_for_each(|_| fused.all()))?;
    let figures = timing.measure(lab, &subject(lab, &fused.pass, Work::new(vec![graph], tokens))?)?;
    Ok(Outcome { figures, checked: Some(fused.check()?) })
}
