//! The decoding loop: route, switch if that is the strategy, multiply. Then the same as a CUDA graph, and the
//! floor.

use crate::Failure;
use crate::args::{Args, check_k};
use crate::check::{Check, Route};
use crate::machine::{Buffer, Clock, Machine, Scalar};
use crate::model::{self, Choice, Model, Source, Target};
use crate::report::{Header, Predicted, Report, Summary, Token, form, gb_per_s};
use crate::router::Router;
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use lora_switch::{Float, Form, RouteOptions, Strategy, measure, route};

/// Launches of the floor: a few give a steady median.
const FLOORS: usize = 16;

pub fn decode<T: Scalar + Float>(args: &Args, machine: &Machine, source: &Source, report: &mut Report) -> Result<(), Failure> {
    let adapters = source.adapters().len();
    check_k(args.k, adapters).map_err(Failure::Usage)?;
    let choice = Choice::new(args, machine, source, T::DTYPE)?;
    let (model, check) = model::build::<T>(machine, source, choice, args.seed)?;
    let router = Router::open(args.gate.as_deref(), args.seed, adapters, &model.targets)?;
    report.header(&Header { args, choice, machine, source, dtype: T::DTYPE, targets: &model.targets })?;

    let mut decoder = Decoder {
        traffic: Traffic::new(model.targets.len(), choice),
        logits: machine.zeros(adapters)?,
        ids: machine.zeros(args.k as usize)?,
        gates: machine.zeros(args.k as usize)?,
        clock: Clock::new(machine)?,
        machine,
        choice,
        model,
        router,
        check,
    };
    let mut tokens = Vec::new();
    for index in 0..args.tokens {
        let token = decoder.token(index, None)?;
        report.token(&token)?;
        tokens.push(token);
    }
    let (graph_us, floor_us) = (decoder.replay(args.tokens)?, decoder.floor()?);
    report.summary(&decoder.summary(args, adapters, &tokens, graph_us, floor_us))
}

struct Decoder<'m, T> {
    machine: &'m Machine,
    choice: Choice,
    model: Model<T>,
    router: Router,
    logits: Buffer<f32>,
    ids: Buffer<i32>,
    gates: Buffer<f32>,
    clock: Clock,
    check: Check,
    traffic: Traffic,
}

impl<T: Scalar + Float> Decoder<'_, T> {
    /// One token: logits to a route to switched weights to products, which are then checked. A graph does all
    /// steps at once.
    fn token(&mut self, index: u64, graph: Option<&CudaGraph>) -> Result<Token, Failure> {
        self.router.logits(self.machine, index, &mut self.logits)?;
        self.clock.mark(0)?;
        match graph {
            None => self.route()?,
            Some(graph) => graph.launch()?,
        }
        self.clock.mark(1)?;
        if graph.is_none() {
            self.switch()?;
        }
        self.clock.mark(2)?;
        if graph.is_none() {
            self.multiply()?;
        }
        self.clock.mark(3)?;

        // From here on the host waits, to check. An engine would not: its next launches follow on the stream.
        let (ids, gates) = (self.ids.read(0..self.ids.len())?, self.gates.read(0..self.gates.len())?);
        let route = Route { ids: ids.into_owned(), gates: gates.into_owned() };
        self.refuse_odd(index)?;
        let Model { targets, weights, products, .. } = &self.model;
        let error = self.check.verify(targets, weights, &products.y, &route).map_err(|e| e.at(format!("token {index}")))?;
        let bytes = self.traffic.elements(&self.model.targets, &route) as u64 * T::DTYPE.size();
        let (route_us, multiply_us) = (self.clock.us(0, 1)?, self.clock.us(2, 3)?);
        let switch_us = self.model.set.is_some().then(|| self.clock.us(1, 2)).transpose()?;
        let Route { ids, gates } = route;
        Ok(Token { token: index, ids, gates, route_us, switch_us, multiply_us, bytes, error })
    }

    fn route(&mut self) -> Result<(), Failure> {
        let stream = &self.machine.stream;
        let logits = self.logits.vector(stream)?;
        let (mut ids, mut gates) = (self.ids.vector_mut(stream)?, self.gates.vector_mut(stream)?);
        Ok(route(stream, &RouteOptions::default(), &logits, &mut ids, &mut gates)?)
    }

    /// The route is read where the router wrote it: the host need not know it.
    fn switch(&mut self) -> Result<(), Failure> {
        let (stream, Some(set)) = (&self.machine.stream, &mut self.model.set) else { return Ok(()) };
        Ok(set.to(stream, &self.ids.vector(stream)?, &self.gates.vector(stream)?)?)
    }

    fn multiply(&mut self) -> Result<(), Failure> {
        let Model { bank, weights, products, targets, .. } = &mut self.model;
        products.run(self.machine, bank, targets, weights, (&self.ids, &self.gates))
    }

    /// To the crate, values on the device are never errors. To this program they are: it makes no odd ones.
    fn refuse_odd(&self, index: u64) -> Result<(), Failure> {
        let stream = &self.machine.stream;
        let of_set = self.model.set.as_ref().map(|set| set.odd(stream)).transpose()?.unwrap_or_default();
        for (what, odd) in [("router or the products", stream.take_odd()?), ("switch", of_set)] {
            if !odd.is_none() {
                return Err(Failure::Run(format!("token {index}: the {what} met {odd}")));
            }
        }
        Ok(())
    }

    /// Decodes the tokens again by replays of one CUDA graph, which serves every route; the median time of a
    /// replay.
    fn replay(&mut self, tokens: u64) -> Result<Option<f64>, Failure> {
        let Some(stream) = self.machine.cuda.clone() else { return Ok(None) };
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let captured = self.route().and_then(|()| self.switch()).and_then(|()| self.multiply());
        // Ended after a failure too: what cannot work on a capturing stream would hide it.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        captured?;
        let graph = graph?.ok_or_else(|| Failure::Run("the capture gave no graph".into()))?;
        graph.upload()?;
        let replay = |index| Ok(self.token(index, Some(&graph)).map_err(|e| e.at("as a CUDA graph".into()))?.route_us);
        let times: Result<Vec<f64>, Failure> = (0..tokens).map(replay).collect();
        Ok(Some(median(times?)))
    }

    /// What the machine needs to read and write all weights once, in one launch: adapters aside, a switch does
    /// just that. Or to read them once: products do that.
    fn floor(&mut self) -> Result<f64, Failure> {
        let stream = &self.machine.stream;
        let mut times = Vec::new();
        let mut sink = self.machine.zeros::<i32>(1)?;
        for _ in 0..=FLOORS {
            self.clock.mark(0)?;
            let weights = &mut self.model.weights;
            match &self.model.base {
                _ if self.model.set.is_none() => measure::read(stream, &weights.vector(stream)?, &mut sink.vector_mut(stream)?)?,
                Some(base) => measure::scale(stream, 1.0, &base.vector(stream)?, &mut weights.vector_mut(stream)?)?,
                None => measure::scale_in_place(stream, 1.0, &mut weights.vector_mut(stream)?)?,
            }
            self.clock.mark(1)?;
            times.push(self.clock.us(0, 1)?);
        }
        if let (Some(set), Some(_)) = (&mut self.model.set, &self.model.base) {
            // W holds the base now, which the set could not know.
            set.invalidate(stream)?;
            self.machine.synchronize()?;
        }
        times.remove(0); // It warmed up.
        Ok(median(times))
    }

    fn summary(&self, args: &Args, adapters: usize, tokens: &[Token], graph_us: Option<f64>, floor_us: f64) -> Summary {
        let of = |value: fn(&Token) -> f64| median(tokens.iter().map(value).collect());
        let switches: Option<Vec<f64>> = tokens.iter().map(|token| token.switch_us).collect();
        let (switch_us, multiply_us, bytes) = (switches.map(median), of(|token| token.multiply_us), of(|token| token.bytes as f64));
        let step_us = switch_us.unwrap_or(multiply_us);
        let passes = if switch_us.is_some() { 2.0 } else { 1.0 };
        let floor_bytes = passes * self.model.weights.len() as f64 * T::DTYPE.size() as f64;
        Summary {
            backend: self.machine.backend,
            device: self.machine.name.clone(),
            dtype: T::DTYPE.to_string(),
            strategy: self.choice.strategy.to_string(),
            predicted: self.choice.advice.map(Predicted::from),
            form: switch_us.map(|_| form(args.form)),
            targets: self.model.targets.len(),
            adapters,
            k: args.k,
            tokens: args.tokens,
            seed: args.seed,
            route_us: of(|token| token.route_us),
            switch_us,
            graph_us,
            multiply_us,
            bytes,
            gb_per_s: gb_per_s(bytes, step_us),
            floor_us,
            floor_bytes,
            floor_gb_per_s: gb_per_s(floor_bytes, floor_us),
            over_floor: step_us / floor_us,
            error: tokens.iter().fold(0.0, |error, token| error.max(token.error)),
        }
    }
}

/// What a switch cannot do without, or where none is, the products.
struct Traffic {
    /// What each target holds: slots with the bits of their coefficients. None: unknown.
    held: Vec<Option<Vec<(usize, u32)>>>,
    strategy: Strategy,
    in_place: bool,
}

impl Traffic {
    fn new(targets: usize, choice: Choice) -> Self {
        let in_place = choice.form == Form::InPlace;
        Self { held: vec![in_place.then(Vec::new); targets], strategy: choice.strategy, in_place }
    }

    /// Elements read and written: W twice (from base, its first half is W_base), and each pair that enters
    /// or, in place, leaves. A target that holds the route already costs nothing. Products read W and each pair.
    fn elements(&mut self, targets: &[Target], route: &Route) -> usize {
        let mut elements = 0;
        for (target, held) in targets.iter().zip(&mut self.held) {
            if self.strategy != Strategy::Switch {
                let ranks: usize = route.at(target).map(|(slot, _)| target.slots[slot].0).sum();
                elements += target.rows * target.cols + ranks * (target.rows + target.cols);
                continue;
            }
            let mut new: Vec<(usize, u32)> = route.at(target).map(|(slot, c)| (slot, c.to_bits())).collect();
            new.sort_unstable();
            let old = held.replace(new.clone());
            if old.as_ref() == Some(&new) {
                continue;
            }
            let old = old.filter(|_| self.in_place).unwrap_or_default();
            let entering = new.iter().filter(|term| !old.contains(term));
            let leaving = old.iter().filter(|(slot, _)| new.iter().all(|(other, _)| other != slot));
            let ranks: usize = entering.chain(leaving).map(|(slot, _)| target.slots[*slot].0).sum();
            elements += 2 * target.rows * target.cols + ranks * (target.rows + target.cols);
        }
        elements
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}
