//! The PEFT loader of examples/decode, against files that PEFT itself wrote and merged
//! (testdata/peft, see generate.py there), and against broken variants of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::tensor::TensorView;
use safetensors::{Dtype as FileDtype, SafeTensors};
use serde_json::{Value, json};

#[path = "../examples/decode/peft.rs"]
pub mod peft;

use peft::{Adapter, BaseModel, Dtype, Matrix, PeftError, load_adapter, load_adapters};

// Relative to the package root, where cargo starts tests.
const DATA: &str = "tests/testdata/peft";

fn data(path: &str) -> PathBuf {
    Path::new(DATA).join(path)
}

fn base() -> BaseModel {
    BaseModel::open(&data("base")).unwrap()
}

fn golden(name: &str) -> Adapter {
    load_adapter(&data("adapters").join(name), &base()).unwrap()
}

/// A directory of this test alone, gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("lora-switch-peft-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    /// A copy of a golden adapter, to be broken.
    fn adapter(name: &str) -> Scratch {
        let scratch = Scratch::new();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(data("adapters").join(name).join(file), scratch.0.join(file)).unwrap();
        }
        scratch
    }

    fn config(&self) -> PathBuf {
        self.0.join("adapter_config.json")
    }

    fn tensors(&self) -> PathBuf {
        self.0.join("adapter_model.safetensors")
    }

    fn set(&self, key: &str, value: Value) -> &Scratch {
        let mut config: Value = serde_json::from_slice(&fs::read(self.config()).unwrap()).unwrap();
        config[key] = value;
        fs::write(self.config(), config.to_string()).unwrap();
        self
    }

    fn edit(&self, change: impl FnOnce(&mut Tensors)) -> &Scratch {
        let mut tensors = read_tensors(&self.tensors());
        change(&mut tensors);
        write_tensors(&self.tensors(), &tensors);
        self
    }

    fn load(&self) -> Result<Adapter, PeftError> {
        load_adapter(&self.0, &base())
    }

    /// The error's kind and text; the text must name a file in this directory and hold each of
    /// `parts`.
    fn fails(&self, kind: &str, parts: &[&str]) {
        let error = self.load().unwrap_err();
        let text = error.to_string();
        assert!(format!("{error:?}").starts_with(kind), "{error:?} is no {kind}");
        assert!(error.path().starts_with(&self.0), "{error:?}");
        assert!(text.contains(&*self.0.to_string_lossy()), "{text}");
        for part in parts {
            assert!(text.contains(part), "`{text}` lacks `{part}`");
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A safetensors file taken apart.
type Tensors = BTreeMap<String, (FileDtype, Vec<usize>, Vec<u8>)>;

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, t)| (name.into(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn zeros(rows: usize, cols: usize) -> (FileDtype, Vec<usize>, Vec<u8>) {
    (FileDtype::F32, vec![rows, cols], vec![0; rows * cols * 4])
}

fn tensor(module: &str, factor: char) -> String {
    format!("base_model.model.{module}.lora_{factor}.weight")
}

const Q0: &str = "model.layers.0.self_attn.q_proj";
const O0: &str = "model.layers.0.self_attn.o_proj";

// -------------------------------------------------------------------------------------------------
// What PEFT wrote, and what it merged

#[test]
fn golden_adapters_load_in_name_order() {
    let adapters = load_adapters(&data("adapters"), &base()).unwrap();
    let found: Vec<_> = adapters.iter().map(|a| (a.name.as_str(), a.modules.len())).collect();
    let expected = [("patterns", 10), ("plain-r4", 14), ("rank1", 4), ("regex-bf16", 8), ("rslora", 8)];
    assert_eq!(found, expected);
}

#[test]
fn an_adapter_directory_counts_as_one() {
    let adapters = load_adapters(&data("adapters/rank1"), &base()).unwrap();
    assert_eq!(adapters.iter().map(|a| a.name.as_str()).collect::<Vec<_>>(), ["rank1"]);
}

#[test]
fn scales_and_ranks_follow_the_config() {
    let check = |adapter: &str, module: &str, rank: usize, scale: f32| {
        let factor = &golden(adapter).modules[module];
        assert_eq!((factor.rank, factor.scale), (rank, scale), "{adapter} {module}");
        assert_eq!((factor.a.rows, factor.b.cols), (rank, rank), "{adapter} {module}");
    };
    check("plain-r4", Q0, 4, 2.0);
    check("rank1", Q0, 1, 3.0);
    check("rslora", Q0, 5, (7.0 / 5f64.sqrt()) as f32);
    check("regex-bf16", O0, 7, 2.0);
    // rank_pattern has both `layers.0.self_attn.q_proj` and `q_proj`; alpha is the default 6.
    check("patterns", Q0, 3, 2.0);
    check("patterns", "model.layers.1.self_attn.q_proj", 2, 3.0);
    // A regular expression for the rank, another key for alpha. `proj` matches neither, for want of
    // a dot.
    check("patterns", "model.layers.1.mlp.gate_proj", 9, 0.5);
    check("patterns", "model.layers.0.mlp.down_proj", 6, 1.0);
    // Alpha alone, by a key anchored at the front.
    check("patterns", "model.layers.0.self_attn.v_proj", 6, 1.0);
    check("patterns", "model.layers.1.self_attn.v_proj", 6, (1.0 / 6.0) as f32);
}

#[test]
fn combinations_merge_to_what_peft_merged() {
    let adapters = load_adapters(&data("adapters"), &base()).unwrap();
    let merged = BaseModel::open(&data("merged.safetensors")).unwrap();
    let combos: Value = serde_json::from_slice(&fs::read(data("merged.json")).unwrap()).unwrap();
    let mut compared = 0;
    for combo in combos.as_array().unwrap() {
        let weights = combo["adapters"].as_array().unwrap().iter().zip(combo["weights"].as_array().unwrap());
        let parts: Vec<_> = weights
            .map(|(name, weight)| {
                let adapter = adapters.iter().find(|a| name == &a.name).unwrap();
                (adapter, weight.as_f64().unwrap())
            })
            .collect();
        let prefix = format!("{}/", combo["name"].as_str().unwrap());
        for weight in merged.weights().iter().filter(|w| w.name.starts_with(&prefix)) {
            let expected = merged.load(&weight.name).unwrap().to_f32();
            let worst = apart(&merge(&weight.name[prefix.len()..], &parts), &expected);
            assert!(worst < 1e-6, "{}: {worst:e}", weight.name);
            compared += 1;
        }
    }
    assert_eq!((compared, merged.weights().len()), (51, 51));
}

/// base + sum of weight * scale * B A, in double precision.
fn merge(name: &str, parts: &[(&Adapter, f64)]) -> Vec<f64> {
    let base = base().load(name).unwrap();
    let mut sum: Vec<f64> = base.to_f32().iter().map(|&w| w.into()).collect();
    for (adapter, weight) in parts {
        let Some(factor) = adapter.modules.get(name.strip_suffix(".weight").unwrap()) else {
            continue;
        };
        let (a, b) = (factor.a.to_f32(), factor.b.to_f32());
        for (i, sum) in sum.iter_mut().enumerate() {
            let (row, col) = (i / base.cols, i % base.cols);
            let product = |k| f64::from(b[row * factor.rank + k]) * f64::from(a[k * base.cols + col]);
            *sum += weight * f64::from(factor.scale) * (0..factor.rank).map(product).sum::<f64>();
        }
    }
    sum
}

fn apart(left: &[f64], right: &[f32]) -> f64 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(l, &r)| (l - f64::from(r)).abs()).fold(0.0, f64::max)
}

// -------------------------------------------------------------------------------------------------
// Element types

#[test]
fn half_precision_adapters_keep_their_bits() {
    assert!(golden("regex-bf16").modules.values().all(|f| (f.a.dtype, f.b.dtype) == (Dtype::Bf16, Dtype::Bf16)));

    let adapter = Scratch::adapter("plain-r4");
    let plain = golden("plain-r4").modules[Q0].a.to_dtype(Dtype::F16);
    adapter.edit(|tensors| {
        let shape = vec![plain.rows, plain.cols];
        tensors.insert(tensor(Q0, 'A'), (FileDtype::F16, shape, plain.bytes.clone()));
    });
    let factor = &adapter.load().unwrap().modules[Q0];
    // A and B may differ: each is what the file says.
    assert_eq!((&factor.a, factor.b.dtype), (&plain, Dtype::F32));
}

#[test]
fn rounding_is_to_nearest_even_and_nan_stays_nan() {
    let one = |dtype, value: f32| Matrix::from_f32(Dtype::F32, 1, 1, &[value]).to_dtype(dtype).to_f32()[0];
    // bfloat16 has 8 bits, so its step at 1 is 2^-7; float16 has 11: 2^-10. Half a step is a tie.
    for (dtype, step) in [(Dtype::Bf16, 2f32.powi(-7)), (Dtype::F16, 2f32.powi(-10))] {
        assert_eq!(one(dtype, 1.0 + 0.5 * step), 1.0);
        assert_eq!(one(dtype, 1.0 + 1.5 * step), 1.0 + 2.0 * step);
        assert_eq!(one(dtype, 1.0 + 0.5 * step + f32::EPSILON), 1.0 + step);
        assert_eq!(one(dtype, -1.0 - 0.5 * step), -1.0);
        assert_eq!(one(dtype, -0.0).to_bits(), (-0f32).to_bits());
        assert_eq!(one(dtype, f32::INFINITY), f32::INFINITY);
        assert!(one(dtype, f32::NAN).is_nan());
        // A NaN whose payload lies in the bits that are cut off must not become an infinity.
        assert!(one(dtype, f32::from_bits(0x7f80_0001)).is_nan());
    }
    assert_eq!(one(Dtype::F16, 65504.0), 65504.0);
    assert_eq!(one(Dtype::F16, 65520.0), f32::INFINITY);
    // Below float16's normal range, where bfloat16 has no trouble.
    assert_eq!(one(Dtype::F16, 2f32.powi(-24)), 2f32.powi(-24));
    assert_eq!(one(Dtype::F16, 2f32.powi(-26)), 0.0);
    // From one half to the other, through single precision.
    let third = Matrix::from_f32(Dtype::F16, 1, 1, &[1.0 / 3.0]);
    assert_eq!(third.to_dtype(Dtype::Bf16).to_f32(), [half::bf16::from_f32(third.to_f32()[0]).to_f32()]);
}

// -------------------------------------------------------------------------------------------------
// The base model

#[test]
fn base_lists_its_matrices() {
    let weights = base().weights();
    // Embedding, head, 7 projections in each of 2 layers; the norms are vectors.
    assert_eq!(weights.len(), 2 + 2 * 7);
    assert!(weights.is_sorted_by_key(|w| w.name.clone()));
    let down = weights.iter().find(|w| w.module() == "model.layers.1.mlp.down_proj").unwrap();
    assert_eq!((down.rows, down.cols, down.dtype), (72, 100, Dtype::F32));
    assert_eq!(down.bytes(), base().load(&down.name).unwrap().bytes.len() as u64);
}

#[test]
fn base_is_the_same_from_a_file_a_directory_and_shards() {
    let shards = Scratch::new();
    let mut whole = read_tensors(&data("base/model.safetensors"));
    let tail = whole.split_off("model.layers.1");
    write_tensors(&shards.0.join("one.safetensors"), &whole);
    write_tensors(&shards.0.join("two.safetensors"), &tail);
    let place = |tensors: &Tensors, file: &str| tensors.keys().map(|k| (k.clone(), json!(file))).collect::<Vec<_>>();
    let map: serde_json::Map<_, _> = place(&whole, "one.safetensors").into_iter().chain(place(&tail, "two.safetensors")).collect();
    let index = shards.0.join("model.safetensors.index.json");
    fs::write(&index, json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()).unwrap();

    let models = [base(), BaseModel::open(&data("base/model.safetensors")).unwrap()];
    let sharded = BaseModel::open(&shards.0).unwrap();
    for model in &models {
        assert_eq!(model.weights(), sharded.weights());
        for weight in model.weights() {
            assert_eq!(model.load(&weight.name).unwrap(), sharded.load(&weight.name).unwrap());
        }
    }

    // A tensor that its shard lacks, a shard that is missing, a shard elsewhere.
    for (file, kind) in [("one.safetensors", "MissingTensor"), ("three", "Io"), ("../two.safetensors", "Json")] {
        let mut map = map.clone();
        map.insert("model.norm.weight".into(), json!(file));
        fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
        let error = BaseModel::open(&shards.0).err().unwrap();
        assert!(format!("{error:?}").starts_with(kind), "{error:?}");
    }
}

#[test]
fn base_says_what_it_lacks() {
    let error = base().load("model.layers.7.mlp.up_proj.weight").unwrap_err();
    assert!(matches!(&error, PeftError::NoSuchWeight { weight, .. } if weight.contains("layers.7")), "{error}");
    assert!(error.to_string().contains(DATA));
    assert!(matches!(base().load("model.norm.weight"), Err(PeftError::Shape { .. })));
    let error = BaseModel::open(&data("nowhere")).err().unwrap();
    assert!(matches!(error, PeftError::Io { .. }) && error.to_string().contains("nowhere"), "{error}");
    assert!(std::error::Error::source(&error).is_some());
    let empty = Scratch::new();
    let error = BaseModel::open(&empty.0).err().unwrap();
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}

#[test]
fn quantized_base_weights_are_refused_when_adapted() {
    let dir = Scratch::new();
    let file = dir.0.join("model.safetensors");
    let mut tensors = read_tensors(&data("base/model.safetensors"));
    tensors.insert(format!("{Q0}.weight"), (FileDtype::I8, vec![72, 72], vec![0; 72 * 72]));
    // Two-dimensional, but no module's weight: of no interest here either.
    tensors.insert("model.layers.0.self_attn.table".into(), zeros(2, 3));
    write_tensors(&file, &tensors);
    let model = BaseModel::open(&dir.0).unwrap();
    assert_eq!(model.path(), dir.0);
    assert_eq!(model.weights().len(), base().weights().len() - 1);
    let error = load_adapter(&data("adapters/rank1"), &model).unwrap_err();
    assert!(matches!(&error, PeftError::Dtype { path, found, .. } if path == &file && found == "I8"), "{error}");
}

// -------------------------------------------------------------------------------------------------
// Files that are no files of the kind

#[test]
fn truncated_files_are_refused_at_every_length() {
    let adapter = Scratch::adapter("rank1");
    let whole = fs::read(adapter.tensors()).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for keep in [0, 7, 8, 9, header - 1, header, header + 1, whole.len() - 1] {
        fs::write(adapter.tensors(), &whole[..keep]).unwrap();
        adapter.fails("Truncated", &[&format!("{keep} bytes"), "expected"]);
    }
}

#[test]
fn malformed_files_are_refused() {
    let adapter = Scratch::adapter("rank1");
    let whole = fs::read(adapter.tensors()).unwrap();
    let put = |bytes: &[u8]| fs::write(adapter.tensors(), bytes).unwrap();

    put(&[&whole[..], b"more"].concat());
    adapter.fails("Malformed", &[&format!("{} bytes", whole.len() + 4), &whole.len().to_string()]);
    put(b"PK\x03\x04 a pickle, under another name");
    adapter.fails("Malformed", &["header of"]);
    put(&[&9u64.to_le_bytes()[..], b"no json {"].concat());
    adapter.fails("Malformed", &["header"]);
    // A header whose ranges do not fit the shapes.
    let text = String::from_utf8_lossy(&whole[8..]).replacen("[1,72]", "[1,71]", 1);
    let header = text.split_inclusive("}}").next().unwrap();
    put(&[&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &whole[8 + header.len()..]].concat());
    adapter.fails("Malformed", &["header", "shape"]);

    fs::remove_file(adapter.tensors()).unwrap();
    adapter.fails("Io", &["adapter_model.safetensors"]);
    fs::write(adapter.0.join("adapter_model.bin"), b"").unwrap();
    adapter.fails("Unsupported", &["adapter_model.bin", "pickle", "adapter_model.safetensors"]);
}

#[test]
fn malformed_configs_are_refused() {
    let adapter = Scratch::adapter("rank1");
    let whole = fs::read_to_string(adapter.config()).unwrap();
    for broken in ["", "[]", &whole[..whole.len() / 2], &whole.replace("\"r\": 1", "\"r\": -1")] {
        fs::write(adapter.config(), broken).unwrap();
        adapter.fails("Json", &["adapter_config.json", "line"]);
    }
    fs::write(adapter.config(), &whole).unwrap();
    for (key, value) in [
        ("r", json!("one")),
        ("lora_alpha", Value::Null),
        ("use_rslora", json!("yes")),
        ("rank_pattern", json!(["q_proj"])),
        ("alpha_pattern", json!({"q_proj": "big"})),
        ("target_modules", json!({"q_proj": 1})),
        ("layers_to_transform", json!("all")),
    ] {
        let adapter = Scratch::adapter("rank1");
        adapter.set(key, value).fails("Json", &["expected"]);
    }
    fs::remove_file(adapter.config()).unwrap();
    adapter.fails("Io", &["adapter_config.json"]);
}

#[test]
fn a_directory_without_adapters_says_so() {
    let dir = Scratch::new();
    fs::create_dir(dir.0.join("runs")).unwrap();
    let error = load_adapters(&dir.0, &base()).unwrap_err();
    assert!(matches!(error, PeftError::NoAdapters { .. }), "{error}");
    assert!(matches!(load_adapters(&data("nowhere"), &base()), Err(PeftError::Io { .. })));
}

// -------------------------------------------------------------------------------------------------
// Settings

#[test]
fn settings_that_change_the_maths_are_refused() {
    for (key, value) in [
        ("alora_invocation_tokens", json!([1, 2])),
        ("arrow_config", json!({"top_k": 2})),
        ("bias", json!("lora_only")),
        ("bias", Value::Null),
        ("ensure_weight_tying", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("OLoRA")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("lora_ga")),
        ("init_lora_weights", json!("loftq")),
        ("kasa_config", json!({"beta": 0.1})),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("lora_bias", json!(true)),
        ("megatron_config", json!({"tp": 2})),
        ("modules_to_save", json!(["lm_head"])),
        ("monteclora_config", json!({"num_samples": 4})),
        ("peft_type", json!("IA3")),
        ("peft_type", Value::Null),
        ("target_modules", Value::Null),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("trainable_token_indices", json!([0, 1])),
        ("use_bdlora", json!({"nblocks": 2})),
        ("use_dora", json!(true)),
        ("use_dora", json!("true")),
        ("use_qalora", json!(true)),
        ("velora_config", json!({"num_groups": 4})),
        ("something_new", json!(true)),
        ("something_new_config", json!({"strength": 1})),
        ("lora_alpha", json!(1e300)),
    ] {
        let adapter = Scratch::adapter("rank1");
        adapter.set(key, value).fails("Unsupported", &[&format!("`{key}`"), "expected"]);
    }
}

#[test]
fn settings_that_leave_the_maths_alone_are_accepted() {
    let adapter = Scratch::adapter("rank1");
    for (key, value) in [
        ("auto_mapping", json!({"unsloth_fixed": true})),
        ("eva_config", json!({"rho": 2.0})),
        ("inference_mode", json!(false)),
        ("init_lora_weights", json!("gaussian")),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("lora_alpha", json!(3.0)),
        ("lora_dropout", json!(0.1)),
        ("modules_to_save", json!([])),
        ("rank_pattern", Value::Null),
        ("runtime_config", json!({"ephemeral_gpu_offload": true})),
        ("something_new", json!(false)),
        ("something_new_group_size", json!(16)),
    ] {
        adapter.set(key, value).load().unwrap();
    }
}

#[test]
fn target_modules_decide_which_modules_may_come() {
    // All of these name rank1's q_proj and v_proj in both layers.
    for (key, value) in [
        ("target_modules", json!("all-linear")),
        ("target_modules", json!("All-Linear")),
        ("target_modules", json!(r"(?P<any>.*\.[qv]_proj)|nothing")),
        ("target_modules", json!(["self_attn.q_proj", "v_proj"])),
        ("exclude_modules", json!(["proj", "o_proj"])),
        ("exclude_modules", json!("q_proj")),
        ("layers_to_transform", json!([0, 1])),
        ("layers_to_transform", json!([])),
    ] {
        Scratch::adapter("rank1").set(key, value.clone()).load().unwrap_or_else(|e| panic!("{value}: {e}"));
    }
    // None of these name all of them: a pattern must match the whole, a listed name from a dot on.
    for (key, value) in [
        ("target_modules", json!(["q_proj"])),
        ("target_modules", json!(["proj"])),
        ("target_modules", json!([])),
        ("target_modules", json!("q_proj|v_proj")),
        ("target_modules", json!("model.*_pro")),
        ("target_modules", json!(r"model\.layers\.0\..*")),
        ("exclude_modules", json!([Q0])),
        ("exclude_modules", json!(r".*\.v_proj")),
        ("layers_to_transform", json!(1)),
        ("layers_to_transform", json!([0])),
    ] {
        Scratch::adapter("rank1").set(key, value).fails("NotTargeted", &["module `model.layers.", "expected"]);
    }
}

#[test]
fn layers_to_transform_knows_its_layers_pattern() {
    let load = |layers: Value, pattern: Value| {
        let adapter = Scratch::adapter("rank1");
        adapter.set("layers_to_transform", layers).set("layers_pattern", pattern).load()
    };
    load(json!([0, 1]), json!("layers")).unwrap();
    load(json!([0, 1]), json!(["h", "layers"])).unwrap();
    load(json!([0, 1]), json!("")).unwrap();
    assert!(matches!(load(json!([0, 1]), json!("h")), Err(PeftError::NotTargeted { .. })));
    assert!(matches!(load(json!([0, 1]), json!("(")), Err(PeftError::Pattern { .. })));

    // A name in full is exempt; with a pattern PEFT has no layers_to_transform at all.
    let adapter = Scratch::adapter("rank1");
    let whole: Vec<_> = golden("rank1").modules.into_keys().collect();
    adapter.set("target_modules", json!(whole)).set("layers_to_transform", json!([7])).load().unwrap();
    adapter.set("target_modules", json!(".*")).fails("Unsupported", &["layers_to_transform"]);
}

#[test]
fn all_linear_leaves_the_head_out() {
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| {
        tensors.insert(tensor("lm_head", 'A'), zeros(1, 72));
        tensors.insert(tensor("lm_head", 'B'), zeros(32, 1));
    });
    adapter.set("target_modules", json!(["q_proj", "v_proj", "lm_head"])).load().unwrap();
    adapter.set("target_modules", json!("all-linear")).fails("NotTargeted", &["`lm_head`", "all-linear"]);
}

#[test]
fn of_several_patterns_the_first_in_the_file_counts() {
    let adapter = Scratch::adapter("patterns");
    let text = fs::read_to_string(adapter.config()).unwrap();
    let swapped = text
        .replace("\"q_proj\": 2", "\"SWAP\": 3")
        .replace("\"layers.0.self_attn.q_proj\": 3", "\"q_proj\": 2")
        .replace("SWAP", "layers.0.self_attn.q_proj");
    assert_ne!(text, swapped);
    fs::write(adapter.config(), swapped).unwrap();
    adapter.fails("Rank", &[Q0, "rank 3", "expected 2"]);
}

#[test]
fn patterns_that_are_no_regular_expressions_are_refused() {
    for (key, value) in [
        ("rank_pattern", json!({"q_proj(": 1})),
        ("alpha_pattern", json!({"(?!k)_proj": 1})),
        ("target_modules", json!("*.q_proj")),
        ("exclude_modules", json!("[")),
    ] {
        Scratch::adapter("rank1").set(key, value).fails("Pattern", &[&format!("`{key}`"), "expected"]);
    }
}

// -------------------------------------------------------------------------------------------------
// Tensors

#[test]
fn a_factor_without_its_partner_is_refused() {
    for (gone, left) in [('A', 'B'), ('B', 'A')] {
        let adapter = Scratch::adapter("rank1");
        adapter.edit(|tensors| assert!(tensors.remove(&tensor(Q0, gone)).is_some()));
        adapter.fails("MissingTensor", &[&format!("no tensor `{}`", tensor(Q0, gone)), &tensor(Q0, left)]);
    }
    let adapter = Scratch::adapter("rank1");
    adapter.edit(Tensors::clear).fails("MissingTensor", &["at least one module"]);
}

#[test]
fn other_tensors_are_refused() {
    for name in [
        format!("base_model.model.{Q0}.lora_magnitude_vector"),
        format!("base_model.model.{Q0}.lora_B.bias"),
        format!("base_model.model.{Q0}.lora_A.default.weight"),
        "base_model.model.model.embed_tokens.lora_embedding_A".into(),
        "base_model.model.lm_head.weight".into(),
        format!("{Q0}.lora_A.weight"),
    ] {
        let adapter = Scratch::adapter("rank1");
        adapter.edit(|tensors| drop(tensors.insert(name.clone(), zeros(1, 72))));
        adapter.fails("UnexpectedTensor", &[&name, "expected"]);
    }
}

#[test]
fn ranks_that_disagree_are_refused() {
    // A against B, both against the config, and the config's pattern against both.
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| drop(tensors.insert(tensor(Q0, 'A'), zeros(2, 72))));
    adapter.fails("Rank", &[Q0, "lora_A has rank 2", "lora_B rank 1", "expected 1"]);
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| drop(tensors.insert(tensor(Q0, 'B'), zeros(72, 2))));
    adapter.fails("Rank", &[Q0, "lora_A has rank 1", "lora_B rank 2", "expected 1"]);
    Scratch::adapter("rank1").set("r", json!(8)).fails("Rank", &["lora_A has rank 1", "expected 8"]);
    let adapter = Scratch::adapter("rank1");
    adapter.set("rank_pattern", json!({"layers.1.*": 4})).fails("Rank", &["layers.1.", "expected 4"]);
    // Rank 0 agrees with itself, and is nothing.
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| {
        tensors.insert(tensor(Q0, 'A'), zeros(0, 72));
        tensors.insert(tensor(Q0, 'B'), zeros(72, 0));
    });
    adapter.set("rank_pattern", json!({ Q0: 0 })).fails("Rank", &[Q0, "expected 0 (at least 1)"]);
}

#[test]
fn shapes_that_do_not_fit_the_base_are_refused() {
    for (factor, rows, cols) in [('A', 1, 71), ('A', 72, 1), ('B', 73, 1), ('B', 1, 72)] {
        let adapter = Scratch::adapter("rank1");
        adapter.edit(|tensors| drop(tensors.insert(tensor(Q0, factor), zeros(rows, cols))));
        adapter.fails("Shape", &[&tensor(Q0, factor), &format!("[{rows}, {cols}]"), "base weight [72, 72]"]);
    }
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| tensors.get_mut(&tensor(Q0, 'A')).unwrap().1 = vec![1, 72, 1]);
    adapter.fails("Shape", &[&tensor(Q0, 'A'), "[1, 72, 1]", "two dimensions"]);
}

#[test]
fn foreign_modules_are_refused() {
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| {
        for factor in ['A', 'B'] {
            let moved = tensors.remove(&tensor(Q0, factor)).unwrap();
            tensors.insert(tensor("model.layers.2.self_attn.q_proj", factor), moved);
        }
    });
    adapter.fails("NotInBase", &["`model.layers.2.self_attn.q_proj`", DATA]);

    // In the base, but not in target_modules.
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| {
        tensors.insert(tensor(O0, 'A'), zeros(1, 72));
        tensors.insert(tensor(O0, 'B'), zeros(72, 1));
    });
    adapter.fails("NotTargeted", &[O0, "q_proj", "v_proj"]);
}

#[test]
fn other_dtypes_are_refused() {
    let adapter = Scratch::adapter("rank1");
    adapter.edit(|tensors| drop(tensors.insert(tensor(Q0, 'B'), (FileDtype::F64, vec![72, 1], vec![0; 72 * 8]))));
    adapter.fails("Dtype", &[&tensor(Q0, 'B'), "F64", "F32, F16 or BF16"]);
}
