//! Decoding with token-wise adapters: for each token, a router picks some of many LoRA adapters. Then all
//! weights of the model are brought to that mixture in one launch, or the adapters are added to the products.
//! `--help` tells how to run it.
//!
//! `model.rs` builds a bank and a switch set out of a base model and PEFT adapters, `products.rs` multiplies;
//! `run.rs` is the loop: route, switch, multiply. These three show how an engine uses the crate. The rest reads files (`files.rs`,
//! `peft.rs`), makes random data (`shape.rs`), holds memory and clocks (`machine.rs`), checks results
//! (`check.rs`) and prints them (`report.rs`).

mod args;
mod check;
mod files;
mod machine;
mod model;
mod peft;
mod products;
mod report;
mod router;
mod run;
mod shape;

use cudarc::driver::DriverError;
use lora_switch::DType;
use std::fmt;
use std::io::ErrorKind;
use std::process::ExitCode;

/// Why there is no result.
pub enum Failure {
    /// The command line asks for what cannot be.
    Usage(String),
    /// Something did not work, or a check did not hold.
    Run(String),
    /// Whoever read the output has had enough.
    Closed,
}

impl Failure {
    /// Says where it happened.
    fn at(self, place: String) -> Self {
        match self {
            Self::Run(what) => Self::Run(format!("{place}: {what}")),
            other => other,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) | Self::Run(what) => f.write_str(what),
            Self::Closed => f.write_str("the output was closed"),
        }
    }
}

impl From<lora_switch::Error> for Failure {
    fn from(error: lora_switch::Error) -> Self {
        Self::Run(error.to_string())
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Run(error.to_string())
    }
}

impl From<peft::PeftError> for Failure {
    fn from(error: peft::PeftError) -> Self {
        Self::Run(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Run(format!("cannot write the output: {error}")),
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) | Err(Failure::Closed) => ExitCode::SUCCESS,
        Err(Failure::Usage(what)) => {
            eprintln!("decode: {what}\n(see decode --help)");
            ExitCode::from(2)
        }
        Err(Failure::Run(what)) => {
            eprintln!("decode: {what}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let words = std::env::args_os().skip(1).map(|word| word.into_string().map_err(|word| format!("{word:?} is not UTF-8")));
    let words: Vec<String> = words.collect::<Result<_, _>>().map_err(Failure::Usage)?;
    let Some(args) = args::parse(words).map_err(Failure::Usage)? else {
        use std::io::Write;
        return Ok(std::io::stdout().write_all(args::HELP.as_bytes())?);
    };
    let machine = machine::Machine::open(args.backend, args.threads)?;
    // The products that check the CPU's use as many threads.
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global().map_err(|e| Failure::Run(e.to_string()))?;
    let source = model::Source::open(&args.input, args.seed, args.quiet)?;
    let mut report = report::Report::new(&args);
    match args.dtype.unwrap_or(source.dtype()) {
        DType::F32 => run::decode::<f32>(&args, &machine, &source, &mut report),
        DType::F16 => run::decode::<half::f16>(&args, &machine, &source, &mut report),
        _ => run::decode::<half::bf16>(&args, &machine, &source, &mut report),
    }
}
