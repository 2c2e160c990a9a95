//! The router, and the gate that computes its logits itself; operands warm in cache, as behind the layer that wrote them.

use crate::floor::{self, NODES};
use crate::lab::{Buffer, Lab, Result};
use crate::oracle::{self, Routing};
use crate::timing::{Mode, Role, Subject, Timing, Work};
use crate::values::{Rng, decode};
use crate::{Case, Outcome};
use lora_switch::{DType, GateWeight, GroupScore, RouteOptions, Score, gate, gate_workspace_bytes, route};

#[derive(Clone)]
struct Spec {
    tokens: u64,
    experts: u64,
    /// Of the gate; None: the router alone.
    hidden: Option<u64>,
    routing: Routing,
    /// The gate's weight may have been written by the launch before.
    is_weight_new: bool,
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (tokens, experts, k) in [
        (1, 8, 2),
        (1, 64, 8),
        (1, 256, 8),
        (16, 64, 8),
        (16, 256, 8),
        (256, 64, 8),
        (256, 256, 8),
        (16384, 8, 2),
        (16384, 64, 8),
        (16384, 256, 8),
    ] {
        cases.push(case(format!("route/T{tokens}/N{experts}/k{k}/f32"), tokens, experts, Routing::plain(k as usize)));
    }
    for tokens in [1, 16384] {
        cases.push(case(format!("route/T{tokens}/N256/k8/grouped"), tokens, 256, deepseek_v3()));
    }
    for (tokens, experts, k) in [(1, 8, 2), (1, 256, 8), (8, 256, 8), (64, 256, 8), (4096, 256, 8)] {
        let id = format!("gate/T{tokens}/H4096/N{experts}/k{k}/bf16");
        for is_weight_new in [false, true] {
            let id = if is_weight_new { format!("{id}/new-weight") } else { id.clone() };
            let spec = Spec { tokens, experts, hidden: Some(4096), routing: Routing::plain(k as usize), is_weight_new };
            if !is_weight_new || tokens <= 64 {
                cases.push(of(id, spec));
            }
        }
    }
    cases
}

/// Its 256 experts in 8 groups, of which 4 are chosen by the sums of their two best.
fn deepseek_v3() -> Routing {
    let mut rng = Rng(3);
    let bias = (0..256).map(|_| f64::from((0.1 * rng.uniform()) as f32)).collect();
    let grouped = Routing { groups: 8, top_groups: 4, group_score: GroupScore::SumOfTwo, ..Routing::plain(8) };
    Routing { score: Score::Sigmoid, scale: 2.5, bias: Some(bias), ..grouped }
}

fn case(id: String, tokens: u64, experts: u64, routing: Routing) -> Case {
    of(id, Spec { tokens, experts, hidden: None, routing, is_weight_new: false })
}

fn of(id: String, spec: Spec) -> Case {
    Case { id, modes: vec![Mode::Token], run: Box::new(move |lab, timing| run(lab, timing, &spec)) }
}

/// What one call reads and writes.
struct Call {
    spec: Spec,
    /// Logits of the router; hidden states of the gate.
    x: Buffer,
    weight: Option<Buffer>,
    bias: Option<Buffer>,
    ids: Buffer,
    gates: Buffer,
    workspace: Buffer,
}

impl Call {
    fn new(lab: &Lab, spec: &Spec) -> Result<Self> {
        let items = spec.tokens * spec.routing.k as u64;
        let (x, weight) = match spec.hidden {
            None => (lab.random(DType::F32, spec.tokens * spec.experts, 4.0, 1)?, None),
            Some(hidden) => (quarters(lab, spec.tokens * hidden, 1)?, Some(quarters(lab, spec.experts * hidden, 2)?)),
        };
        let bias = spec.routing.bias.as_ref().map(|bias| bias.iter().map(|&b| b as f32).collect::<Vec<_>>());
        let bytes = gate_workspace_bytes(&lab.stream, spec.tokens, spec.experts, spec.hidden.unwrap_or(1))?;
        Ok(Self {
            spec: spec.clone(),
            x,
            weight,
            bias: bias.map(|bias| lab.upload(DType::F32, &bias)).transpose()?,
            ids: lab.buffer(DType::I32, items)?,
            gates: lab.buffer(DType::F32, items)?,
            workspace: lab.upload(DType::U8, &vec![0u8; bytes as usize])?,
        })
    }

    fn enqueue(&self, lab: &Lab) -> Result<()> {
        let (tokens, r) = (self.spec.tokens, &self.spec.routing);
        let bias = self.bias.as_ref().map(Buffer::all);
        let options = RouteOptions {
            score: r.score,
            scale: r.scale as f32,
            bias: bias.as_ref(),
            groups: r.groups as u64,
            top_groups: r.top_groups as u64,
            group_score: r.group_score,
            only_x_is_new: !self.spec.is_weight_new,
            ..RouteOptions::default()
        };
        let (x, ids, gates) = (self.x.rows(tokens), &mut self.ids.rows_mut(tokens), &mut self.gates.rows_mut(tokens));
        let Some(weight) = &self.weight else { return Ok(route(&lab.stream, &options, &x, ids, gates)?) };
        let weight = weight.rows(self.spec.experts);
        let weight = GateWeight { weight: &weight, bias: None };
        Ok(gate(&lab.stream, &options, &x, &weight, ids, gates, None, &mut self.workspace.all_mut())?)
    }

    /// Whether every token's ids and gates are the oracle's. Where f32 cannot decide, which is rare, anything goes.
    fn check(&self, lab: &Lab) -> Result<bool> {
        let (k, experts) = (self.spec.routing.k, self.spec.experts as usize);
        let all = |buffer: &Buffer| lab.download(buffer, 0, buffer.len);
        let (ids, gates, x) = (all(&self.ids)?, all(&self.gates)?, all(&self.x)?);
        let weight = self.weight.as_ref().map(|weight| all(weight).map(|w| values(weight, &w))).transpose()?;
        let x = values(&self.x, &x);
        let mut undecided = 0;
        for (t, row) in x.chunks(x.len() / self.spec.tokens as usize).enumerate() {
            let logits: Vec<f64> = match &weight {
                None => row.to_vec(),
                Some(weight) => weight.chunks(row.len()).map(|w| row.iter().zip(w).map(|(x, w)| x * w).sum()).collect(),
            };
            let want = oracle::route(&logits, &self.spec.routing, 0.0);
            undecided += usize::from(!want.is_decided);
            let is_right = |j: usize| {
                let gate = f64::from(f32::from_bits(gates[t * k + j]));
                ids[t * k + j] as i32 == want.ids[j] && (gate - want.gates[j]).abs() <= want.bounds[j]
            };
            if logits.len() != experts || (want.is_decided && !(0..k).all(is_right)) {
                return Ok(false);
            }
        }
        Ok(undecided as u64 * 50 <= self.spec.tokens)
    }
}

/// -1/2 to 1/2 in quarters: sums of their products are exact in f32, so that the ids have to be exactly right.
fn quarters(lab: &Lab, len: u64, seed: u64) -> Result<Buffer> {
    let mut rng = Rng(seed);
    let data: Vec<u16> = (0..len).map(|_| [0xbf00, 0xbe80, 0, 0x3e80, 0x3f00][rng.below(5)]).collect();
    lab.upload(DType::Bf16, &data)
}

fn values(buffer: &Buffer, bits: &[u32]) -> Vec<f64> {
    bits.iter().map(|&bits| decode(buffer.dtype, bits)).collect()
}

fn run(lab: &Lab, timing: &Timing, spec: &Spec) -> Result<Outcome> {
    let call = Call::new(lab, spec)?;
    let graph = lab.capture(|| (0..NODES).try_for_each(|_| call.enqueue(lab)))?;
    let one = lab.upload(DType::F32, &[1f32])?;
    let works = vec![(Role::Case, Work::new(vec![graph], NODES)), (Role::Floor, floor::launches(lab, &one)?)];
    let figures = timing.measure(lab, &Subject { works, peer: None })?;
    Ok(Outcome { figures, checked: Some(call.check(lab)?) })
}
