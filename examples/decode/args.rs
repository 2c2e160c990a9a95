//! The command line.

use lora_switch::{DType, Form, Strategy};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

pub const HELP: &str = "\
Decodes with LoRA adapters that a router chooses anew for each token, and checks what becomes of each.

    decode --model PATH --adapters DIR [options]
    decode --shape llama-2-7b [options]

What to decode with:
    --model PATH         a .safetensors file, or a directory with model.safetensors or its index
    --adapters DIR       adapters as PEFT saves them, a directory each (slots in the order of their names)
    --shape llama-2-7b   random data of that shape instead, made on the device:
        --layers N           decoder layers                            [32]
        --rank N             rank of every adapter                     [16]
        --experts N          adapters                                  [8]
    --dtype TYPE         bf16, f16 or f32                              [the base's; bf16 with --shape]
    --strategy NAME      how adapters get to a token:                  [switch]
                         switch  merged into the weights, for each token
                         apply   added behind the products
                         linear  beside the products, in one launch
                         auto    what is predicted to be the fastest here
    --form FORM          of a switch: from-base (a second copy of the weights) or in-place [from-base]

What to route:
    --k N                adapters a token                              [2]
    --tokens N           tokens to decode                              [32]
    --seed N             of all that is random                         [7]
    --gate FILE          the router: a .safetensors file with gate.weight [adapters, hidden].
                         Without it, logits are random

Where:
    --backend NAME       auto (a GPU if there is one), cpu or cuda     [auto]
    --threads N          of the CPU backend; 0 is one a core           [0]

Output:
    --json               one JSON object a line: each token, then a summary
    --quiet              the summary only
    --help               this text

Exit status: 0, all checks passed; 1, something failed; 2, a wrong command line.
";

pub struct Args {
    pub input: Input,
    pub dtype: Option<DType>,
    /// None: auto.
    pub strategy: Option<Strategy>,
    pub form: Form,
    pub k: u64,
    pub tokens: u64,
    pub seed: u64,
    pub gate: Option<PathBuf>,
    pub backend: Choice,
    pub threads: usize,
    pub json: bool,
    pub quiet: bool,
}

pub enum Input {
    Files { model: PathBuf, adapters: PathBuf },
    Shape { layers: usize, rank: usize, experts: usize },
}

#[derive(Clone, Copy, PartialEq)]
pub enum Choice {
    Auto,
    Cpu,
    Cuda,
}

/// As given; what depends on something else is settled in `finish`.
#[derive(Default)]
struct Given {
    model: Option<PathBuf>,
    adapters: Option<PathBuf>,
    shape: bool,
    layers: Option<usize>,
    rank: Option<usize>,
    experts: Option<usize>,
    form: Option<Form>,
}

/// None: help was asked for.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Option<Args>, String> {
    let mut given = Given::default();
    let mut args = Args {
        input: Input::Shape { layers: 0, rank: 0, experts: 0 },
        dtype: None,
        strategy: Some(Strategy::Switch),
        form: Form::FromBase,
        k: 2,
        tokens: 32,
        seed: 7,
        gate: None,
        backend: Choice::Auto,
        threads: 0,
        json: false,
        quiet: false,
    };
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let (flag, joined) = match word.split_once('=') {
            Some((flag, value)) => (flag.to_string(), Some(value.to_string())),
            None => (word, None),
        };
        match flag.as_str() {
            "--help" | "-h" => return Ok(None),
            "--json" | "--quiet" if joined.is_some() => return Err(format!("{flag} takes no value")),
            "--json" => args.json = true,
            "--quiet" => args.quiet = true,
            known if TAKE_VALUE.contains(&known) => {
                let value = joined.or_else(|| words.next().filter(|next| !next.starts_with("--")));
                let value = value.filter(|v| !v.is_empty()).ok_or_else(|| format!("{flag} needs a value"))?;
                set(&mut args, &mut given, &flag, &value)?;
            }
            unknown => return Err(format!("unknown argument {unknown}")),
        }
    }
    if let Some(form) = given.form {
        if !matches!(args.strategy, None | Some(Strategy::Switch)) {
            return Err("--form goes with --strategy switch or auto".into());
        }
        args.form = form;
    }
    args.input = finish(given, args.k)?;
    Ok(Some(args))
}

const TAKE_VALUE: &[&str] = &[
    "--model",
    "--adapters",
    "--shape",
    "--layers",
    "--rank",
    "--experts",
    "--dtype",
    "--strategy",
    "--form",
    "--k",
    "--tokens",
    "--seed",
    "--gate",
    "--backend",
    "--threads",
];

fn set(args: &mut Args, given: &mut Given, flag: &str, value: &str) -> Result<(), String> {
    match flag {
        "--model" => given.model = Some(value.into()),
        "--adapters" => given.adapters = Some(value.into()),
        "--shape" => given.shape = one_of(flag, value, &[("llama-2-7b", true)])?,
        "--layers" => given.layers = Some(number(flag, value, 1..=1024)?),
        "--rank" => given.rank = Some(number(flag, value, 1..=256)?),
        "--experts" => given.experts = Some(number(flag, value, 1..=1024)?),
        "--dtype" => {
            let types = [("bf16", DType::Bf16), ("f16", DType::F16), ("f32", DType::F32)];
            args.dtype = Some(one_of(flag, value, &types)?);
        }
        "--strategy" => {
            let named = Strategy::ALL.map(|strategy| (strategy.to_string(), Some(strategy)));
            let named = named.iter().map(|(name, strategy)| (name.as_str(), *strategy));
            args.strategy = one_of(flag, value, &named.chain([("auto", None)]).collect::<Vec<_>>())?;
        }
        "--form" => {
            given.form = Some(one_of(flag, value, &[("from-base", Form::FromBase), ("in-place", Form::InPlace)])?);
        }
        "--k" => args.k = number(flag, value, 1..=32)?,
        "--tokens" => args.tokens = number(flag, value, 1..=1_000_000)?,
        "--seed" => args.seed = number(flag, value, 0..=u64::MAX)?,
        "--gate" => args.gate = Some(value.into()),
        "--backend" => {
            let backends = [("auto", Choice::Auto), ("cpu", Choice::Cpu), ("cuda", Choice::Cuda)];
            args.backend = one_of(flag, value, &backends)?;
        }
        "--threads" => args.threads = number(flag, value, 0..=1024)?,
        _ => unreachable!("listed in TAKE_VALUE"),
    }
    Ok(())
}

fn finish(given: Given, k: u64) -> Result<Input, String> {
    if !given.shape {
        let of_shape = [("--layers", given.layers), ("--rank", given.rank), ("--experts", given.experts)];
        if let Some((flag, _)) = of_shape.iter().find(|(_, value)| value.is_some()) {
            return Err(format!("{flag} goes with --shape"));
        }
        return match (given.model, given.adapters) {
            (Some(model), Some(adapters)) => Ok(Input::Files { model, adapters }),
            (None, None) => Err("nothing to decode: give --model and --adapters, or --shape".into()),
            (None, _) => Err("--adapters needs a --model".into()),
            (_, None) => Err("--model needs --adapters".into()),
        };
    }
    if given.model.is_some() || given.adapters.is_some() {
        return Err("--shape stands instead of --model and --adapters".into());
    }
    let experts = given.experts.unwrap_or(8);
    check_k(k, experts)?;
    Ok(Input::Shape { layers: given.layers.unwrap_or(32), rank: given.rank.unwrap_or(16), experts })
}

/// A token cannot choose more adapters than there are.
pub fn check_k(k: u64, adapters: usize) -> Result<(), String> {
    match k <= adapters as u64 {
        true => Ok(()),
        false => Err(format!("--k is {k}; it must be at most {adapters}, the number of adapters")),
    }
}

fn number<N>(flag: &str, value: &str, range: RangeInclusive<N>) -> Result<N, String>
where
    N: FromStr + PartialOrd + std::fmt::Display,
{
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("{flag} is {value}; it must be a whole number from {} to {}", range.start(), range.end())),
    }
}

fn one_of<V: Copy>(flag: &str, value: &str, known: &[(&str, V)]) -> Result<V, String> {
    let found = known.iter().find(|(name, _)| *name == value).map(|(_, v)| *v);
    found.ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        format!("{flag} is {value}; it must be {}", names.join(" or "))
    })
}
