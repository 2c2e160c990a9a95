//! What each operation costs: `cargo bench -- [FILTER...] [options]`; `--help` lists the options.
//!
//! A case is timed beside its floor and its peer, in one run and in turns, and then checked against float64.
//! To add an operation: a file with a `cases()`, named in `all_cases` below.

mod accuracy;
mod apply;
mod check;
mod crossover;
mod floor;
mod lab;
mod linear;
mod model;
mod peer;
mod permute;
mod record;
mod route;
mod sensors;
mod switch;
mod timing;

/// What the tests judge by judges here too.
#[allow(dead_code)]
#[path = "../tests/oracle.rs"]
mod oracle;
#[allow(dead_code)]
#[path = "../tests/values.rs"]
mod values;

use lab::{Failure, Lab};
use record::{Recorder, Row};
use std::path::PathBuf;
use std::process::ExitCode;
use timing::{Figures, Mode, Timing};

const USAGE: &str = "\
usage: cargo bench -- [FILTER...] [options]

FILTER          cases whose id contains one of these (--exact: is one of these)
--record PATH   write JSON lines to this file; in a directory, to <utc-time>-<gpu>.jsonl
--modes LIST    of token,gap,loop; default: those of each case
--ulp           table: rounding errors of a switch from base, in bf16
--drift         table: what is left in the weight after many switches and an unmerge
--quick         fewer repetitions
--list          only print the ids

LORA_SWITCH_CUBLAS names the folder of libcublas.so (the peer), where neither the loader nor python3 knows it;
LORA_SWITCH_REQUIRE_GPU=1 makes a missing GPU an error.";

type Run = dyn Fn(&Lab, &Timing) -> lab::Result<Outcome>;

/// One line of the table.
pub(crate) struct Case {
    id: String,
    /// Unless the command line says otherwise.
    modes: Vec<Mode>,
    run: Box<Run>,
}

/// What a case brings back.
pub(crate) struct Outcome {
    figures: Figures,
    /// None: there is no result to verify.
    checked: Option<bool>,
}

fn all_cases() -> Vec<Case> {
    let cases = [floor::cases(), route::cases(), permute::cases(), switch::cases(), apply::cases(), linear::cases(), crossover::cases()];
    cases.into_iter().flatten().collect()
}

#[derive(Default)]
struct Options {
    filters: Vec<String>,
    exact: bool,
    record: Option<PathBuf>,
    modes: Option<Vec<Mode>>,
    ulp: bool,
    drift: bool,
    quick: bool,
    list: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--bench" => {} // cargo's own
                "--exact" => options.exact = true,
                "--record" => options.record = Some(value()?.into()),
                "--modes" => options.modes = Some(value()?.split(',').map(Mode::parse).collect::<Result<_, _>>()?),
                "--ulp" => options.ulp = true,
                "--drift" => options.drift = true,
                "--quick" => options.quick = true,
                "--list" => options.list = true,
                other if other.starts_with('-') => return Err(format!("{other}?\n{USAGE}")),
                filter => options.filters.push(filter.to_owned()),
            }
        }
        Ok(options)
    }

    /// A table that was asked for alone comes alone.
    fn wants_cases(&self) -> bool {
        !(self.ulp || self.drift) || !self.filters.is_empty()
    }

    fn wants(&self, id: &str) -> bool {
        let fits = |filter: &String| if self.exact { id == filter } else { id.contains(filter.as_str()) };
        self.wants_cases() && (self.filters.is_empty() || self.filters.iter().any(fits))
    }

    fn timing(&self, case: &Case) -> Timing {
        let modes = self.modes.clone().unwrap_or_else(|| case.modes.clone());
        Timing { modes, repetitions: if self.quick { 5 } else { 15 } }
    }
}

/// True if every figure was verified.
fn run(options: &Options, cases: &[Case], lab: &Lab) -> lab::Result<bool> {
    let width = cases.iter().map(|case| case.id.len()).max().unwrap_or(0);
    let mut recorder = Recorder::new(options.record.as_deref(), &lab.gpu, width)?;
    let mut good = true;
    for case in cases {
        match (case.run)(lab, &options.timing(case)) {
            Ok(outcome) => {
                good &= outcome.checked != Some(false);
                recorder.row(&Row::new(&case.id, &outcome, &lab.gpu))?;
            }
            Err(Failure::Skip(why)) => println!("{}: skipped: {why}", case.id),
            Err(Failure::Broken(why)) => {
                good = false;
                println!("{}: FAILED: {why}", case.id);
            }
        }
    }
    if options.ulp {
        accuracy::ulp(lab, &mut recorder, options.quick)?;
    }
    if options.drift {
        good &= accuracy::drift(lab, &mut recorder, options.quick)?;
    }
    Ok(good)
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let cases: Vec<Case> = all_cases().into_iter().filter(|case| options.wants(&case.id)).collect();
    if options.list {
        cases.iter().for_each(|case| println!("{}", case.id));
        return ExitCode::SUCCESS;
    }
    if cases.is_empty() && options.wants_cases() {
        eprintln!("no case fits {:?}; --list names them", options.filters);
        return ExitCode::from(2);
    }
    let lab = match Lab::open() {
        Ok(lab) => lab,
        Err(why) => {
            println!("nothing was measured: {why}");
            let required = std::env::var("LORA_SWITCH_REQUIRE_GPU").is_ok_and(|v| v == "1");
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(&options, &cases, &lab) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
