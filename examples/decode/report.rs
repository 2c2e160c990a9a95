//! What is printed: a table for people, or a JSON object a line for programs.

use crate::Failure;
use crate::args::{Args, Input};
use crate::machine::Machine;
use crate::model::{Choice, Source, Target};
use lora_switch::{Advice, DType, Form, Strategy};
use serde::Serialize;
use std::io::{Stdout, Write};

/// What is about to run.
pub struct Header<'a> {
    pub args: &'a Args,
    pub choice: Choice,
    pub machine: &'a Machine,
    pub source: &'a Source,
    pub dtype: DType,
    pub targets: &'a [Target],
}

/// What a token got, and what it cost.
#[derive(Serialize)]
#[serde(tag = "kind", rename = "token")]
pub struct Token {
    pub token: u64,
    pub ids: Vec<i32>,
    pub gates: Vec<f32>,
    pub route_us: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switch_us: Option<f64>,
    /// The products, with adapters where they are not merged.
    pub multiply_us: f64,
    /// Read and written by the switch; without one, read by the products.
    pub bytes: u64,
    /// The largest, as a fraction of what rounding may cost.
    pub error: f64,
}

/// Microseconds a token.
#[derive(Serialize)]
pub struct Predicted {
    switch_us: f64,
    apply_us: f64,
    linear_us: f64,
}

impl From<Advice> for Predicted {
    fn from(advice: Advice) -> Self {
        let Advice { switch_us, apply_us, linear_us, .. } = advice;
        Self { switch_us, apply_us, linear_us }
    }
}

/// What all tokens come to; times and bytes are medians.
#[derive(Serialize)]
#[serde(tag = "kind", rename = "summary")]
pub struct Summary {
    pub backend: &'static str,
    pub device: String,
    pub dtype: String,
    pub strategy: String,
    /// What `auto` chose by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Predicted>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub form: Option<&'static str>,
    pub targets: usize,
    pub adapters: usize,
    pub k: u64,
    pub tokens: u64,
    pub seed: u64,
    pub route_us: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switch_us: Option<f64>,
    pub multiply_us: f64,
    /// All steps of a token as one CUDA graph.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graph_us: Option<f64>,
    pub bytes: f64,
    pub gb_per_s: f64,
    /// Reading and writing all weights once; without a switch, reading them.
    pub floor_us: f64,
    pub floor_bytes: f64,
    pub floor_gb_per_s: f64,
    /// (switch_us, or without one multiply_us) / floor_us
    pub over_floor: f64,
    pub error: f64,
}

pub struct Report {
    out: Stdout,
    json: bool,
    quiet: bool,
}

impl Report {
    pub fn new(args: &Args) -> Self {
        Self { out: std::io::stdout(), json: args.json, quiet: args.quiet }
    }

    pub fn header(&mut self, header: &Header<'_>) -> Result<(), Failure> {
        if self.json || self.quiet {
            return Ok(());
        }
        let Header { args, choice, machine, source, dtype, targets } = header;
        let elements: usize = targets.iter().map(|target| target.rows * target.cols).sum();
        let (name, converted) = match (&args.input, source) {
            (Input::Files { model, .. }, Source::Files(files)) => (model.display().to_string(), files.converted(*dtype)),
            _ => ("random data in the shape of Llama-2-7B".to_string(), vec![]),
        };
        let numbered = |(slot, name): (usize, String)| format!("{slot} {name}");
        let adapters: Vec<String> = source.adapters().into_iter().enumerate().map(numbered).collect();
        let out = &mut self.out;
        let size = bytes(elements as f64 * dtype.size() as f64);
        writeln!(out, "model     {name}: {} adapted projections, {size} in {dtype}", targets.len())?;
        writeln!(out, "adapters  {}", shortened(&adapters))?;
        if !converted.is_empty() {
            writeln!(out, "          converted to {dtype}, once: {}", shortened(&converted))?;
        }
        let strategy = match choice.strategy {
            Strategy::Switch => format!("switch, {}", form(args.form)),
            other => other.to_string(),
        };
        writeln!(out, "strategy  {strategy}; {} of {} adapters a token", args.k, adapters.len())?;
        if let Some(advice) = choice.advice {
            let each = Strategy::ALL.map(|strategy| format!("{strategy} {}", time(advice.us(strategy))));
            writeln!(out, "          predicted for a token: {}", each.join(", "))?;
        }
        writeln!(out, "backend   {}: {}", machine.backend, machine.name)?;
        if let Some(why) = &machine.no_gpu {
            writeln!(out, "          ({why})")?;
        }
        writeln!(out)?;
        let (ids, gates) = widths(args.k as usize);
        let switch = if choice.strategy == Strategy::Switch { format!(" {:>10}", "switch") } else { String::new() };
        let columns = format!("token  {:<ids$}  {:<gates$} {:>10}{switch} {:>10}", "ids", "gates", "route", "multiply");
        Ok(writeln!(out, "{columns} {:>10} {:>7}", "moved", "error")?)
    }

    pub fn token(&mut self, token: &Token) -> Result<(), Failure> {
        if self.quiet {
            return Ok(());
        }
        if self.json {
            return self.line(token);
        }
        let (ids_width, gates_width) = widths(token.ids.len());
        let ids: String = token.ids.iter().map(|id| format!("{id:<4}")).collect();
        let gates: String = token.gates.iter().map(|gate| format!("{gate:<6.3}")).collect();
        let times = [Some(token.route_us), token.switch_us, Some(token.multiply_us)];
        let times: String = times.into_iter().flatten().map(|us| format!(" {:>10}", time(us))).collect();
        let (moved, error) = (bytes(token.bytes as f64), token.error);
        let route = format!("{:>5}  {ids:<ids_width$}  {gates:<gates_width$}", token.token);
        Ok(writeln!(self.out, "{route}{times} {moved:>10} {error:>7.3}")?)
    }

    pub fn summary(&mut self, summary: &Summary) -> Result<(), Failure> {
        if self.json {
            return self.line(summary);
        }
        let out = &mut self.out;
        if !self.quiet {
            writeln!(out)?;
        }
        let moving = |us: f64, moved: f64| format!("{:>10} {:>10} {:>7.1} GB/s", time(us), bytes(moved), gb_per_s(moved, us));
        let (floor_us, moved) = (summary.floor_us, summary.bytes);
        let over = |us: f64| format!("{}   {:.3} x the floor", moving(us, moved), us / floor_us);
        writeln!(out, "a token, median of {}", summary.tokens)?;
        writeln!(out, "  route     {:>10}", time(summary.route_us))?;
        match summary.switch_us {
            Some(us) => {
                writeln!(out, "  switch    {}", over(us))?;
                writeln!(out, "  multiply  {:>10}", time(summary.multiply_us))?;
            }
            None => writeln!(out, "  multiply  {}", over(summary.multiply_us))?,
        }
        if let Some(us) = summary.graph_us {
            writeln!(out, "  as graph  {:>10}   all of it", time(us))?;
        }
        let what = if summary.switch_us.is_some() { "read and written" } else { "read" };
        writeln!(out, "floor       {}   all weights {what} once, no adapters", moving(floor_us, summary.floor_bytes))?;
        let products = if summary.graph_us.is_some() { "sampled products" } else { "all products" };
        let weights = if summary.switch_us.is_some() { " and sampled rows of the weights" } else { "" };
        let what = format!("{products}{weights}");
        let error = summary.error;
        Ok(writeln!(out, "checked     {what} of each token; largest error {error:.3} of what rounding may cost")?)
    }

    fn line(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(value).expect("names and numbers");
        Ok(writeln!(self.out, "{text}")?)
    }
}

/// Of the columns of ids and gates.
fn widths(k: usize) -> (usize, usize) {
    (4 * k, 6 * k)
}

pub fn form(form: Form) -> &'static str {
    match form {
        Form::FromBase => "from base",
        Form::InPlace => "in place",
    }
}

pub fn gb_per_s(bytes: f64, us: f64) -> f64 {
    bytes / us / 1e3
}

fn shortened(names: &[String]) -> String {
    match names.split_at_checked(8) {
        Some((first, rest)) if !rest.is_empty() => {
            format!("{}, ... ({} in all)", first.join(", "), names.len())
        }
        _ => names.join(", "),
    }
}

fn time(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.1} us"),
        us if us < 1e6 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

fn bytes(bytes: f64) -> String {
    match bytes {
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}
