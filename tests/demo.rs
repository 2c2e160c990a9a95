//! The program of examples/decode, as a user runs it: what it prints, and that each wrong input is named.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::common::Backend;

const BASE: &str = "tests/testdata/peft/base";
const ADAPTERS: &str = "tests/testdata/peft/adapters";
const PLAIN: &str = "tests/testdata/peft/adapters/plain-r4";
const Q_PROJ: &str = "model.layers.0.self_attn.q_proj";
/// The adapters' number, the base's hidden size.
const SLOTS: usize = 5;
const HIDDEN: usize = 72;

/// cargo builds it for `cargo test`, though not when a target is named. Carried elsewhere, it may lie
/// beside this binary.
fn program() -> Option<PathBuf> {
    let this = std::env::current_exe().unwrap();
    let beside = this.parent().unwrap();
    let name = format!("decode{}", std::env::consts::EXE_SUFFIX);
    let candidates = [beside.parent().map(|profile| profile.join("examples").join(&name)), Some(beside.join(&name))];
    let found = candidates.into_iter().flatten().find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: the example `decode` has not been built (cargo build --example decode)");
    }
    found
}

fn run(program: &Path, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

/// What a good run prints.
fn good(program: &Path, args: &[&str]) -> String {
    let out = run(program, args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {}\n{stderr}", out.status);
    assert!(stderr.is_empty(), "{args:?}: {stderr}");
    String::from_utf8(out.stdout).unwrap()
}

/// Tokens and summary of a run on the golden data.
fn json(program: &Path, args: &[&str]) -> (Vec<Value>, Value) {
    let text = good(program, &[&["--model", BASE, "--adapters", ADAPTERS, "--json"], args].concat());
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let summary = lines.pop().unwrap();
    assert_eq!(summary["kind"], "summary");
    assert!(lines.iter().all(|line| line["kind"] == "token"));
    (lines, summary)
}

/// A failure says one thing, on stderr, and names what is wrong.
fn bad(program: &Path, status: i32, args: &[&str], names: &[&str]) {
    let out = run(program, args);
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(status), "{args:?}: {stderr}");
    for name in names {
        assert!(stderr.contains(name), "{args:?}: {name} is missing in: {stderr}");
    }
    let messages = stderr.lines().filter(|line| line.starts_with("decode: ")).count();
    assert_eq!(messages, 1, "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// A directory of one test, gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("lora-switch-demo-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().into()
    }

    /// A safetensors file with one f32 tensor.
    fn tensor(&self, file: &str, name: &str, shape: [usize; 2], value: f32) -> String {
        let bytes = value.to_le_bytes().repeat(shape[0] * shape[1]);
        let view = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).unwrap();
        self.write(file, [(name, view)])
    }

    /// The base with bytes or shape of one projection changed.
    fn edited_base(&self, file: &str, edit: impl Fn(&mut [u8], &mut Vec<usize>)) -> String {
        let whole = fs::read(format!("{BASE}/model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&whole).unwrap().tensors();
        let edited: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = (tensors.into_iter())
            .map(|(name, view)| {
                let (mut shape, mut bytes) = (view.shape().to_vec(), view.data().to_vec());
                if name == format!("{Q_PROJ}.weight") {
                    edit(&mut bytes, &mut shape);
                }
                (name, view.dtype(), shape, bytes)
            })
            .collect();
        self.write(file, edited.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap())))
    }

    fn write<'a>(&self, file: &str, tensors: impl IntoIterator<Item = (&'a str, TensorView<'a>)>) -> String {
        let path = self.path(file);
        let bytes = safetensors::serialize(tensors, None::<HashMap<String, String>>).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn prints_a_line_for_each_token() {
    let Some(program) = program() else { return };
    let text = good(&program, &["--model", BASE, "--adapters", ADAPTERS, "--tokens", "5", "--backend", "cpu"]);
    let starts_with_number = |line: &&str| line.split_whitespace().next().is_some_and(|w| w.parse::<u64>().is_ok());
    assert_eq!(text.lines().filter(starts_with_number).count(), 5, "{text}");
    for word in ["14 adapted projections", "1 plain-r4", "converted to f32, once: regex-bf16", "switch, from base", "GB/s", "x the floor"] {
        assert!(text.contains(word), "{word} is missing in:\n{text}");
    }
    let quiet = good(&program, &["--model", BASE, "--adapters", ADAPTERS, "--backend", "cpu", "--quiet"]);
    assert_eq!(quiet.lines().filter(starts_with_number).count(), 0, "{quiet}");
    assert!(good(&program, &["--help"]).contains("--adapters DIR"));
}

#[test]
fn json_is_an_object_a_line() {
    let Some(program) = program() else { return };
    for dtype in ["f32", "f16", "bf16"] {
        for form in ["from-base", "in-place"] {
            let args = ["--backend", "cpu", "--tokens", "6", "--k", "3", "--dtype", dtype, "--form", form];
            let (tokens, summary) = json(&program, &args);
            check_lines(&tokens, &summary, "cpu", 6, 3);
            assert_eq!((&summary["dtype"], &summary["strategy"]), (&dtype.into(), &"switch".into()));
            assert!(tokens.iter().chain([&summary]).all(|line| line["switch_us"].as_f64().unwrap() > 0.0));
        }
    }
}

/// Adapters that are not merged: as many tokens, the same routes, and no switch.
#[test]
fn every_strategy_decodes() {
    let Some(program) = program() else { return };
    for dtype in ["f32", "f16", "bf16"] {
        unmerged(&program, "cpu", dtype);
    }
    let (_, summary) = json(&program, &["--backend", "cpu", "--tokens", "2", "--strategy", "auto", "--dtype", "bf16"]);
    chosen(&summary);
    let text = good(&program, &["--model", BASE, "--adapters", ADAPTERS, "--backend", "cpu", "--strategy", "auto", "--tokens", "2"]);
    assert!(text.contains("predicted for a token: switch"), "{text}");
}

fn unmerged(program: &Path, backend: &str, dtype: &str) {
    let run =
        |strategy: &str| json(program, &["--backend", backend, "--tokens", "6", "--k", "3", "--dtype", dtype, "--strategy", strategy]);
    let (switched, _) = run("switch");
    for strategy in ["apply", "linear"] {
        let (tokens, summary) = run(strategy);
        check_lines(&tokens, &summary, backend, 6, 3);
        assert_eq!(ids(&tokens), ids(&switched), "{strategy}");
        assert_eq!(summary["strategy"], strategy);
        assert!(tokens.iter().chain([&summary]).all(|line| line.get("switch_us").is_none()), "{summary}");
        // Less to move than to read W and to write it.
        assert!(tokens.iter().zip(&switched).all(|(a, b)| a["bytes"].as_u64() < b["bytes"].as_u64()));
    }
}

/// `auto` takes the least of what it predicts.
fn chosen(summary: &Value) {
    let us = |strategy: &str| summary["predicted"][format!("{strategy}_us")].as_f64().unwrap();
    let least = ["switch", "apply", "linear"].into_iter().min_by(|a, b| us(a).total_cmp(&us(b))).unwrap();
    assert_eq!(summary["strategy"], least, "{summary}");
}

fn check_lines(tokens: &[Value], summary: &Value, backend: &str, count: usize, k: usize) {
    assert_eq!(tokens.len(), count);
    for token in tokens {
        let ids: Vec<u64> = token["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        assert!(ids.len() == k && ids.iter().all(|id| *id < SLOTS as u64), "{token}");
        let gates: f64 = token["gates"].as_array().unwrap().iter().map(|gate| gate.as_f64().unwrap()).sum();
        assert!((gates - 1.0).abs() < 1e-5, "{token}");
        assert!(token["error"].as_f64().unwrap() <= 1.0 && token["bytes"].as_u64().unwrap() > 0, "{token}");
    }
    assert_eq!((&summary["backend"], &summary["targets"]), (&backend.into(), &14.into()));
    for key in ["route_us", "multiply_us", "floor_us", "bytes", "gb_per_s", "floor_gb_per_s", "over_floor"] {
        assert!(summary[key].as_f64().unwrap() > 0.0, "{key}: {summary}");
    }
}

fn ids(tokens: &[Value]) -> Vec<&Value> {
    tokens.iter().map(|token| &token["ids"]).collect()
}

#[test]
fn the_seed_decides_the_routes() {
    let Some(program) = program() else { return };
    let run = |seed| json(&program, &["--backend", "cpu", "--tokens", "12", "--seed", seed]).0;
    let (one, again, other) = (run("11"), run("11"), run("12"));
    assert_eq!(ids(&one), ids(&again));
    assert_ne!(ids(&one), ids(&other));
}

/// A gate of equal logits: ties go to the lower ids.
#[test]
fn a_gate_from_a_file_routes() {
    let Some(program) = program() else { return };
    let scratch = Scratch::new("gate");
    let gate = scratch.tensor("gate.safetensors", "gate.weight", [SLOTS, HIDDEN], 0.0);
    let (tokens, _) = json(&program, &["--backend", "cpu", "--tokens", "3", "--gate", &gate]);
    for token in &tokens {
        assert_eq!((&token["ids"], &token["gates"]), (&serde_json::json!([0, 1]), &serde_json::json!([0.5, 0.5])));
    }
}

#[test]
fn a_wrong_command_line_is_named() {
    let Some(program) = program() else { return };
    let files = ["--model", BASE, "--adapters", ADAPTERS];
    let wrong = |args: &[&str], names: &[&str]| bad(&program, 2, &[&files, args].concat(), names);
    wrong(&["--frobnicate"], &["--frobnicate"]);
    wrong(&["--k"], &["--k needs a value"]);
    wrong(&["--k", "0"], &["--k is 0", "1 to 32"]);
    wrong(&["--k", "6", "--backend", "cpu"], &["--k is 6", "5, the number of adapters"]);
    wrong(&["--tokens", "many"], &["--tokens is many"]);
    wrong(&["--strategy", "merge"], &["--strategy is merge", "switch or apply or linear or auto"]);
    wrong(&["--strategy", "apply", "--form", "in-place"], &["--form goes with --strategy switch"]);
    wrong(&["--dtype", "f64"], &["--dtype is f64", "bf16"]);
    wrong(&["--backend", "tpu"], &["--backend is tpu", "cuda"]);
    wrong(&["--shape", "llama-2-7b"], &["--shape", "--model"]);
    wrong(&["--rank", "8"], &["--rank goes with --shape"]);
    bad(&program, 2, &[], &["--model", "--shape"]);
    bad(&program, 2, &["--model", BASE], &["--model needs --adapters"]);
}

#[test]
fn a_wrong_input_is_named() {
    let Some(program) = program() else { return };
    let scratch = Scratch::new("inputs");
    let fails = |args: &[&str], names: &[&str]| bad(&program, 1, &[&["--backend", "cpu"], args].concat(), names);

    let whole = fs::read(format!("{BASE}/model.safetensors")).unwrap();
    let truncated = scratch.path("truncated.safetensors");
    fs::write(&truncated, &whole[..whole.len() / 2]).unwrap();
    fails(&["--model", &truncated, "--adapters", ADAPTERS], &["truncated.safetensors: truncated"]);

    let lone = scratch.tensor("lone.safetensors", &format!("{Q_PROJ}.weight"), [HIDDEN, HIDDEN], 0.0);
    fails(&["--model", &lone, "--adapters", PLAIN], &["adapter_model.safetensors", "the base model's", "lone.safetensors"]);
    let wide = scratch.edited_base("wide.safetensors", |_, shape| *shape = vec![HIDDEN / 2, 2 * HIDDEN]);
    fails(&["--model", &wide, "--adapters", ADAPTERS], &["adapter_model.safetensors", Q_PROJ, "[36, 144]"]);
    let nan = scratch.edited_base("nan.safetensors", |bytes, _| bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    fails(&["--model", &nan, "--adapters", ADAPTERS], &[Q_PROJ, "[0, 0] is NaN"]);
    let large = scratch.edited_base("large.safetensors", |bytes, _| bytes[..4].copy_from_slice(&1e6f32.to_le_bytes()));
    fails(&["--model", &large, "--adapters", ADAPTERS, "--dtype", "f16"], &[Q_PROJ, "not finite in f16"]);

    let adapter = Path::new(PLAIN);
    fs::create_dir(scratch.0.join("rank")).unwrap();
    fs::copy(adapter.join("adapter_model.safetensors"), scratch.0.join("rank/adapter_model.safetensors")).unwrap();
    let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["r"] = 3.into();
    fs::write(scratch.0.join("rank/adapter_config.json"), config.to_string()).unwrap();
    fails(&["--model", BASE, "--adapters", &scratch.path("rank")], &["has rank 4", "expected 3"]);

    fails(&["--model", "no/such/model", "--adapters", ADAPTERS], &["no/such/model"]);
    fails(&["--model", BASE, "--adapters", BASE], &[BASE, "adapter_config.json"]);
}

#[test]
fn a_wrong_gate_is_named() {
    let Some(program) = program() else { return };
    let scratch = Scratch::new("gates");
    let fails = |gate: &str, names: &[&str]| {
        let files = ["--model", BASE, "--adapters", ADAPTERS, "--backend", "cpu", "--gate", gate];
        bad(&program, 1, &files, names);
    };
    let nan = scratch.tensor("nan.safetensors", "gate.weight", [SLOTS, HIDDEN], f32::NAN);
    fails(&nan, &["token 0", "the router", "NaN"]);
    let short = scratch.tensor("short.safetensors", "gate.weight", [SLOTS - 1, HIDDEN], 1.0);
    fails(&short, &["short.safetensors", "gate.weight is [4, 72]", "5 rows"]);
    let narrow = scratch.tensor("narrow.safetensors", "gate.weight", [SLOTS, HIDDEN - 1], 1.0);
    fails(&narrow, &["narrow.safetensors", "gate.weight is [5, 71]"]);
    let other = scratch.tensor("other.safetensors", "weight", [SLOTS, HIDDEN], 1.0);
    fails(&other, &["other.safetensors", "gate.weight"]);
}

#[test]
fn on_a_gpu_or_why_not() {
    let Some(program) = program() else { return };
    if Backend::cuda().is_none() {
        bad(&program, 1, &["--model", BASE, "--adapters", ADAPTERS, "--backend", "cuda"], &["CUDA"]);
        return;
    }
    for dtype in ["f32", "f16", "bf16"] {
        for form in ["from-base", "in-place"] {
            let args = ["--tokens", "6", "--k", "3", "--dtype", dtype, "--form", form, "--backend"];
            let (tokens, summary) = json(&program, &[&args[..], &["cuda"]].concat());
            check_lines(&tokens, &summary, "cuda", 6, 3);
            assert!(summary["graph_us"].as_f64().unwrap() > 0.0, "{summary}");
            let (on_cpu, _) = json(&program, &[&args[..], &["cpu"]].concat());
            assert_eq!(ids(&tokens), ids(&on_cpu), "the backends route alike");
        }
    }
    unmerged(&program, "cuda", "bf16");
    let (_, summary) = json(&program, &["--backend", "cuda", "--tokens", "2", "--strategy", "auto"]);
    chosen(&summary);
    // A layer of the large shape takes the fast paths, which the small model's sizes miss.
    for rest in [["--form", "from-base"], ["--form", "in-place"], ["--strategy", "apply"], ["--strategy", "linear"]] {
        let shape = ["--shape", "llama-2-7b", "--layers", "1", "--tokens", "3", "--backend", "cuda"];
        good(&program, &[&shape[..], &rest].concat());
    }
}
