//! Reads a base model and LoRA adapters as Hugging Face writes them: `.safetensors` and PEFT's
//! `adapter_config.json`.
//!
//! What comes out is all that LoRA needs: for each adapted module `W + scale * B * A`, with `A` of
//! `[rank, in]` and `B` of `[out, rank]`. Whatever would make that formula wrong (DoRA, biases,
//! replicated layers, base weights changed by PiSSA...) is refused with an error that names the
//! file, what was found and what was expected: an adapter that loads is one that PEFT would merge
//! to the same weights. The rules are those of PEFT 0.21.2.
//!
//! The module stands alone: safetensors, serde, serde_json, regex and half, nothing of the crate
//! beside it.

#![allow(dead_code)] // Each program that includes this file uses its own part.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use regex::Regex;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";
const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What PEFT puts before a module's name in the names of an adapter's tensors.
const PREFIX: &str = "base_model.model.";

// -------------------------------------------------------------------------------------------------
// Errors

/// Why a model or an adapter could not be read. `path` is the file at fault.
#[derive(Debug)]
pub enum PeftError {
    /// The file system said no.
    Io { path: PathBuf, source: io::Error },
    /// The file ends before the bytes that its own header announces.
    Truncated { path: PathBuf, found: u64, expected: u64 },
    /// Not a safetensors file, or one whose header contradicts itself.
    Malformed { path: PathBuf, detail: String },
    /// Not JSON, or JSON of another form than expected.
    Json { path: PathBuf, detail: String },
    /// A setting under which `W + scale * B * A` is not what the adapter means.
    Unsupported { path: PathBuf, key: String, found: String, expected: String },
    /// A pattern that is no regular expression, or one with features that the `regex` crate lacks
    /// (look-around...).
    Pattern { path: PathBuf, key: &'static str, pattern: String, detail: String },
    /// A tensor that is announced or needed and not there.
    MissingTensor { path: PathBuf, tensor: String, needed_by: String },
    /// A tensor that is neither the A nor the B of a linear module.
    UnexpectedTensor { path: PathBuf, tensor: String },
    /// A, B and the config do not agree about the rank.
    Rank { path: PathBuf, module: String, config: usize, a: usize, b: usize },
    /// A tensor's shape does not fit.
    Shape { path: PathBuf, tensor: String, found: Vec<usize>, expected: String },
    /// Other elements than float32, float16 or bfloat16.
    Dtype { path: PathBuf, tensor: String, found: String },
    /// The adapter is for a module that the base model has not.
    NotInBase { path: PathBuf, module: String, base: PathBuf },
    /// The adapter has weights for a module that its config does not target.
    NotTargeted { path: PathBuf, module: String, target_modules: String },
    /// The base model has no such weight.
    NoSuchWeight { path: PathBuf, weight: String },
    /// Neither the directory nor one directly below it is an adapter.
    NoAdapters { path: PathBuf },
}

impl fmt::Display for PeftError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use PeftError::*;
        write!(f, "{}: ", self.path().display())?;
        match self {
            Io { source, .. } => write!(f, "{source}"),
            Truncated { found, expected, .. } => {
                write!(f, "truncated: {found} bytes, expected {expected} by its header")
            }
            Malformed { detail, .. } => write!(f, "not a valid safetensors file: {detail}"),
            Json { detail, .. } => write!(f, "not the JSON expected: {detail}"),
            Unsupported { key, found, expected, .. } => {
                write!(f, "`{key}` is {found}, which is not supported: expected {expected}")
            }
            Pattern { key, pattern, detail, .. } => {
                write!(f, "`{key}` has the pattern `{pattern}`, expected a regular expression: {detail}")
            }
            MissingTensor { tensor, needed_by, .. } => {
                write!(f, "no tensor `{tensor}`, expected for {needed_by}")
            }
            UnexpectedTensor { tensor, .. } => {
                write!(f, "tensor `{tensor}` is not supported: expected only {PREFIX}MODULE.lora_A.weight and .lora_B.weight")
            }
            Rank { module, config, a, b, .. } => {
                write!(f, "module `{module}`: lora_A has rank {a} and lora_B rank {b}, expected {config} (at least 1) by {CONFIG}")
            }
            Shape { tensor, found, expected, .. } => {
                write!(f, "tensor `{tensor}` has the shape {found:?}, expected {expected}")
            }
            Dtype { tensor, found, .. } => {
                write!(f, "tensor `{tensor}` has the dtype {found}, expected F32, F16 or BF16")
            }
            NotInBase { module, base, .. } => {
                write!(f, "adapts the module `{module}`, expected one of the base model's: {} has no `{module}.weight`", base.display())
            }
            NotTargeted { module, target_modules, .. } => write!(
                f,
                "has weights for the module `{module}`, expected only what {CONFIG} targets: {target_modules} \
                 (less exclude_modules, in layers_to_transform)"
            ),
            NoSuchWeight { weight, .. } => write!(f, "no weight `{weight}`"),
            NoAdapters { .. } => {
                write!(f, "no {CONFIG} here or in a directory directly below, expected at least one")
            }
        }
    }
}

impl std::error::Error for PeftError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            PeftError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl PeftError {
    /// The file (or directory) at fault.
    pub fn path(&self) -> &Path {
        use PeftError::*;
        match self {
            Io { path, .. } | Truncated { path, .. } | Malformed { path, .. } | Json { path, .. } => path,
            Unsupported { path, .. } | Pattern { path, .. } | MissingTensor { path, .. } => path,
            UnexpectedTensor { path, .. } | Rank { path, .. } | Shape { path, .. } | Dtype { path, .. } => path,
            NotInBase { path, .. } | NotTargeted { path, .. } | NoSuchWeight { path, .. } => path,
            NoAdapters { path } => path,
        }
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> PeftError {
    |source| PeftError::Io { path: path.into(), source }
}

// -------------------------------------------------------------------------------------------------
// Matrices

/// The element types that weights come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// A dense row-major matrix; the elements are little-endian, as in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The element type.
    pub dtype: Dtype,
    /// Rows (of a weight: the outputs).
    pub rows: usize,
    /// Columns (of a weight: the inputs).
    pub cols: usize,
    /// `rows * cols` elements.
    pub bytes: Vec<u8>,
}

impl Matrix {
    /// Rounds `values` (row-major, `rows * cols` of them) to `dtype`: to nearest, ties to even; NaN
    /// stays NaN, and what is too large for the type becomes infinite.
    pub fn from_f32(dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> Matrix {
        assert_eq!(values.len(), rows * cols, "a {rows} x {cols} matrix");
        let bytes = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        };
        Matrix { dtype, rows, cols, bytes }
    }

    /// The elements as single precision, which holds each of the three types exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let pairs = || self.bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self.dtype {
            Dtype::F32 => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::Bf16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        }
    }

    /// The same matrix in another element type, rounded as [`Matrix::from_f32`] does.
    pub fn to_dtype(&self, dtype: Dtype) -> Matrix {
        if dtype == self.dtype {
            return self.clone();
        }
        Matrix::from_f32(dtype, self.rows, self.cols, &self.to_f32())
    }
}

// -------------------------------------------------------------------------------------------------
// Safetensors files

/// One file whose header is read; its tensors stay on disk until asked for.
struct TensorFile {
    path: PathBuf,
    /// Where the tensors' bytes start.
    start: u64,
    header: Metadata,
}

impl TensorFile {
    fn open(path: &Path) -> Result<TensorFile, PeftError> {
        let mut file = File::open(path).map_err(io_error(path))?;
        let found = file.metadata().map_err(io_error(path))?.len();
        let need = |expected| match expected <= found {
            true => Ok(()),
            false => Err(PeftError::Truncated { path: path.into(), found, expected }),
        };
        let malformed = |detail| PeftError::Malformed { path: path.into(), detail };

        need(8)?;
        let mut size = [0; 8];
        file.read_exact(&mut size).map_err(io_error(path))?;
        let size = u64::from_le_bytes(size);
        // The format's own limit. A file of another kind shows up here: its first bytes make an
        // absurd length.
        if size > 100_000_000 {
            return Err(malformed(format!("a header of {size} bytes, expected at most 100000000")));
        }
        need(8 + size)?;
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(io_error(path))?;
        // Deserializing also checks that the tensors' ranges fit their shapes and leave no holes.
        let header: Metadata = serde_json::from_slice(&header).map_err(|e| malformed(format!("header: {e}")))?;

        let start = 8 + size;
        let end = start.saturating_add(header.data_len() as u64);
        need(end)?;
        if end < found {
            return Err(malformed(format!("{found} bytes, expected {end} by its header")));
        }
        Ok(TensorFile { path: path.into(), start, header })
    }

    fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// A tensor's element type, rows and columns.
    fn layout(&self, tensor: &str) -> Result<(Dtype, usize, usize), PeftError> {
        let info = self.info(tensor)?;
        let (path, tensor) = (self.path.clone(), tensor.to_string());
        let &[rows, cols] = info.shape.as_slice() else {
            let (found, expected) = (info.shape.clone(), "two dimensions".into());
            return Err(PeftError::Shape { path, tensor, found, expected });
        };
        match dtype(info) {
            Some(dtype) => Ok((dtype, rows, cols)),
            None => Err(PeftError::Dtype { path, tensor, found: info.dtype.to_string() }),
        }
    }

    fn load(&self, tensor: &str) -> Result<Matrix, PeftError> {
        let (dtype, rows, cols) = self.layout(tensor)?;
        let (from, to) = self.info(tensor)?.data_offsets;
        let mut bytes = vec![0; to - from];
        let mut file = File::open(&self.path).map_err(io_error(&self.path))?;
        file.seek(SeekFrom::Start(self.start + from as u64)).map_err(io_error(&self.path))?;
        file.read_exact(&mut bytes).map_err(io_error(&self.path))?;
        Ok(Matrix { dtype, rows, cols, bytes })
    }

    fn info(&self, tensor: &str) -> Result<&TensorInfo, PeftError> {
        self.header.info(tensor).ok_or_else(|| PeftError::NoSuchWeight { path: self.path.clone(), weight: tensor.into() })
    }
}

fn dtype(info: &TensorInfo) -> Option<Dtype> {
    match info.dtype {
        safetensors::Dtype::F32 => Some(Dtype::F32),
        safetensors::Dtype::F16 => Some(Dtype::F16),
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

// -------------------------------------------------------------------------------------------------
// The base model

/// A model's weights on disk: headers in memory, weights loaded one at a time.
pub struct BaseModel {
    path: PathBuf,
    files: Vec<TensorFile>,
    /// Each tensor's file, by its place in `files`.
    tensors: BTreeMap<String, usize>,
}

/// A two-dimensional weight of a [`BaseModel`], not yet loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// The tensor's name, `MODULE.weight`.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The outputs of a linear layer.
    pub rows: usize,
    /// The inputs of a linear layer.
    pub cols: usize,
}

impl Weight {
    /// The name of the module whose weight it is: the key in [`Adapter::modules`].
    pub fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }

    /// What [`BaseModel::load`] reads for it, for progress bars.
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.cols as u64 * self.dtype.size() as u64
    }
}

/// `model.safetensors.index.json`: which file holds which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl BaseModel {
    /// Opens a `.safetensors` file, or a directory with `model.safetensors` or
    /// `model.safetensors.index.json` and its shards. Reads headers only.
    pub fn open(path: &Path) -> Result<BaseModel, PeftError> {
        if !path.is_dir() {
            return BaseModel::open_file(path, path);
        }
        let index = path.join(INDEX);
        match path.join(MODEL) {
            model if model.is_file() || !index.is_file() => BaseModel::open_file(path, &model),
            _ => BaseModel::open_shards(path, &index),
        }
    }

    fn open_file(path: &Path, file: &Path) -> Result<BaseModel, PeftError> {
        let file = TensorFile::open(file)?;
        let tensors = file.names().into_iter().map(|name| (name, 0)).collect();
        Ok(BaseModel { path: path.into(), files: vec![file], tensors })
    }

    fn open_shards(dir: &Path, index: &Path) -> Result<BaseModel, PeftError> {
        let Index { weight_map } = read_json(index)?;
        let (mut files, mut tensors) = (Vec::<TensorFile>::new(), BTreeMap::new());
        for (tensor, shard) in weight_map {
            // A name only: an index must not reach for files elsewhere.
            if Path::new(&shard).file_name() != Some(shard.as_ref()) {
                let detail = format!("`{tensor}` is in `{shard}`, expected the name of a file beside it");
                return Err(PeftError::Json { path: index.into(), detail });
            }
            let path = dir.join(shard);
            let place = match files.iter().position(|file| file.path == path) {
                Some(place) => place,
                None => {
                    files.push(TensorFile::open(&path)?);
                    files.len() - 1
                }
            };
            if files[place].header.info(&tensor).is_none() {
                let needed_by = format!("the model by {}", index.display());
                return Err(PeftError::MissingTensor { path, tensor, needed_by });
            }
            tensors.insert(tensor, place);
        }
        Ok(BaseModel { path: dir.into(), files, tensors })
    }

    /// The file or directory that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every two-dimensional weight in one of the three element types, in the order of their names.
    /// Tensors of other shapes and types are passed over: no adapter can be for them.
    pub fn weights(&self) -> Vec<Weight> {
        let weight = |(name, &file): (&String, &usize)| {
            let (dtype, rows, cols) = self.files[file].layout(name).ok()?;
            name.ends_with(".weight").then(|| Weight { name: name.clone(), dtype, rows, cols })
        };
        self.tensors.iter().filter_map(weight).collect()
    }

    /// Reads one two-dimensional tensor, and no other byte of its file.
    pub fn load(&self, name: &str) -> Result<Matrix, PeftError> {
        match self.tensors.get(name) {
            Some(&file) => self.files[file].load(name),
            None => Err(PeftError::NoSuchWeight { path: self.path.clone(), weight: name.into() }),
        }
    }

    /// A module's outputs and inputs, or None if it is no part of the model.
    fn shape_of(&self, module: &str) -> Option<Result<(usize, usize), PeftError>> {
        let weight = format!("{module}.weight");
        let file = *self.tensors.get(&weight)?;
        Some(self.files[file].layout(&weight).map(|(_, rows, cols)| (rows, cols)))
    }
}

// -------------------------------------------------------------------------------------------------
// adapter_config.json

/// Settings that have no say in what the weights mean: training, provenance, or parameters of a
/// switch refused below.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Settings that must be off (absent, null, false or empty), and what they would do.
const REFUSED: &[(&str, &str)] = &[
    ("alora_invocation_tokens", "aLoRA adapts only the tokens after its invocation"),
    ("arrow_config", "Arrow routes among adapters by itself"),
    ("ensure_weight_tying", "it ties an adapter of the output head to the embedding's"),
    ("fan_in_fan_out", "the base weights would be transposed"),
    ("kasa_config", "KaSA truncates the base weights"),
    ("layer_replication", "it stacks a model of other layers than the base's"),
    ("lora_bias", "B would have a bias"),
    ("megatron_config", "Megatron's layers are split over devices"),
    ("modules_to_save", "whole modules are replaced"),
    ("monteclora_config", "MonteCLoRA samples its weights"),
    ("target_parameters", "it adapts parameters that are no module's weight"),
    ("trainable_token_indices", "rows of the embedding are replaced"),
    ("use_bdlora", "BD-LoRA's factors are block-diagonal"),
    ("use_dora", "DoRA rescales each row"),
    ("use_qalora", "QA-LoRA pools the inputs"),
    ("velora_config", "VeLoRA keeps tensors of its own"),
];

/// Initialisations that leave the base weights as they are. The others (PiSSA, CorDA, OLoRA,
/// LoRA-GA, LoftQ) replace them, in PEFT also when the adapter is loaded.
const BASE_KEEPING_INITS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

/// The settings that matter here; the defaults are PEFT's.
#[derive(Deserialize)]
struct Config {
    /// Must be there; its value is checked before.
    #[serde(rename = "peft_type")]
    _peft_type: String,
    #[serde(default = "eight")]
    r: usize,
    #[serde(default = "eight")]
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    rank_pattern: Option<Ordered<usize>>,
    alpha_pattern: Option<Ordered<f64>>,
    target_modules: Option<Names>,
    exclude_modules: Option<Names>,
    layers_to_transform: Option<Layers>,
    layers_pattern: Option<Names>,
}

fn eight<T: From<u8>>() -> T {
    8.into()
}

#[derive(Deserialize, Clone, Debug)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Names {
    /// A regular expression (in `layers_pattern`: one name).
    One(String),
    List(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a layer's index or a list of them")]
enum Layers {
    One(u64),
    List(Vec<u64>),
}

/// A JSON object in the order of the file, since of several patterns the first that matches counts.
struct Ordered<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Ordered<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from patterns to numbers")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Ordered<T>, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, PeftError> {
    let text = fs::read(path).map_err(io_error(path))?;
    serde_json::from_slice(&text).map_err(|e| PeftError::Json { path: path.into(), detail: e.to_string() })
}

fn unsupported(path: &Path, key: &str, found: impl fmt::Display, expected: impl Into<String>) -> PeftError {
    PeftError::Unsupported { path: path.into(), key: key.into(), found: found.to_string(), expected: expected.into() }
}

/// Refuses every setting under which `W + scale * B * A` is not what the adapter means.
fn check_switches(path: &Path, settings: &BTreeMap<String, Value>) -> Result<(), PeftError> {
    // Another method's config has settings of its own, which would only distract.
    if let Some(method) = settings.get("peft_type").filter(|&method| method != "LORA") {
        return Err(unsupported(path, "peft_type", method, "\"LORA\""));
    }
    for (key, value) in settings.iter().filter(|(key, _)| !is_read(key)) {
        let expected = match key.as_str() {
            "bias" if value != "none" => "\"none\": trained biases would be replaced".into(),
            "init_lora_weights" if !keeps_base(value) => {
                format!("true, false or one of {BASE_KEEPING_INITS:?}: others replace base weights")
            }
            "bias" | "init_lora_weights" => continue,
            key if HARMLESS.contains(&key) || !is_on(value) => continue,
            key => match REFUSED.iter().find(|(name, _)| *name == key) {
                Some((_, why)) => format!("it off: {why}"),
                // Taken for a parameter, so that what a newer PEFT adds and leaves off is no
                // hindrance.
                None if value.is_number() || value.is_string() => continue,
                None => "it off: a switch that this loader does not know".into(),
            },
        };
        return Err(unsupported(path, key, value, expected));
    }
    Ok(())
}

/// The settings of [`Config`].
fn is_read(key: &str) -> bool {
    matches!(key, "peft_type" | "r" | "lora_alpha" | "use_rslora" | "rank_pattern" | "alpha_pattern")
        || matches!(key, "target_modules" | "exclude_modules" | "layers_to_transform" | "layers_pattern")
}

fn is_on(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        Value::Number(_) | Value::String(_) => true,
    }
}

fn keeps_base(init: &Value) -> bool {
    match init {
        Value::String(name) => BASE_KEEPING_INITS.contains(&name.to_lowercase().as_str()),
        _ => true,
    }
}

// -------------------------------------------------------------------------------------------------
// Which modules, which rank, which scale

/// A config whose patterns are compiled.
struct Rules {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    rslora: bool,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
    target: Matcher,
    exclude: Matcher,
    layers: Option<Vec<u64>>,
    layer_index: Vec<Regex>,
}

/// What `target_modules` and `exclude_modules` can be.
enum Matcher {
    /// `"all-linear"`: every linear module but the output head. PEFT writes the names in its place
    /// when it saves.
    AllLinear,
    Pattern(Regex),
    List(Vec<String>),
}

impl Rules {
    fn read(path: &Path) -> Result<Rules, PeftError> {
        // The switches first: a file of another PEFT type need not have the form of a LoRA config.
        check_switches(path, &read_json(path)?)?;
        let config: Config = read_json(path)?;
        let target = match config.target_modules {
            Some(Names::One(name)) if name.eq_ignore_ascii_case("all-linear") => Matcher::AllLinear,
            Some(names) => Matcher::new(path, "target_modules", names)?,
            None => {
                return Err(unsupported(path, "target_modules", "null", "the modules' names or a pattern"));
            }
        };
        let layers = match config.layers_to_transform {
            None => None,
            Some(_) if !matches!(target, Matcher::List(_)) => {
                return Err(unsupported(path, "layers_to_transform", "set", "null unless target_modules is a list"));
            }
            Some(Layers::One(layer)) => Some(vec![layer]),
            Some(Layers::List(layers)) => (!layers.is_empty()).then_some(layers),
        };
        Ok(Rules {
            path: path.into(),
            rank: config.r,
            alpha: config.lora_alpha,
            rslora: config.use_rslora,
            ranks: by_suffix(path, "rank_pattern", config.rank_pattern)?,
            alphas: by_suffix(path, "alpha_pattern", config.alpha_pattern)?,
            target,
            exclude: Matcher::new(path, "exclude_modules", config.exclude_modules.unwrap_or(Names::List(vec![])))?,
            layers,
            layer_index: layer_index(path, config.layers_pattern)?,
        })
    }

    /// Whether the config names the module. As in PEFT, a name given in full is not subject to
    /// `layers_to_transform`.
    fn targets(&self, module: &str) -> bool {
        let whole = matches!(&self.target, Matcher::List(names) if names.iter().any(|name| name == module));
        self.target.matches(module) && !self.exclude.matches(module) && (whole || self.in_layers(module))
    }

    fn in_layers(&self, module: &str) -> bool {
        let Some(layers) = &self.layers else {
            return true;
        };
        let index = self.layer_index.iter().find_map(|pattern| pattern.captures(module));
        let index = index.and_then(|found| found.name("idx")?.as_str().parse().ok());
        index.is_some_and(|index| layers.contains(&index))
    }

    fn rank_of(&self, module: &str) -> usize {
        first_match(&self.ranks, module).unwrap_or(self.rank)
    }

    fn scale_of(&self, module: &str) -> Result<f32, PeftError> {
        let (rank, alpha) = (self.rank_of(module) as f64, first_match(&self.alphas, module).unwrap_or(self.alpha));
        let scale = (alpha / if self.rslora { rank.sqrt() } else { rank }) as f32;
        match scale.is_finite() {
            true => Ok(scale),
            false => Err(unsupported(&self.path, "lora_alpha", alpha, "a scale that float32 can hold")),
        }
    }
}

impl Matcher {
    fn new(path: &Path, key: &'static str, names: Names) -> Result<Matcher, PeftError> {
        match names {
            Names::One(pattern) => Ok(Matcher::Pattern(compile(path, key, &pattern, &format!("^(?:{pattern})$"))?)),
            Names::List(names) => Ok(Matcher::List(names)),
        }
    }

    /// A pattern must match the whole name; a listed name is the whole or its end, from a dot on.
    fn matches(&self, module: &str) -> bool {
        match self {
            Matcher::AllLinear => module != "lm_head",
            Matcher::Pattern(pattern) => pattern.is_match(module),
            Matcher::List(names) => {
                names.iter().any(|name| module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
            }
        }
    }
}

impl fmt::Display for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Matcher::AllLinear => f.write_str("all-linear"),
            Matcher::Pattern(pattern) => write!(f, "the pattern {pattern}"),
            Matcher::List(names) => write!(f, "{names:?}"),
        }
    }
}

/// Compiles `whole`, which embeds the user's `pattern`.
fn compile(path: &Path, key: &'static str, pattern: &str, whole: &str) -> Result<Regex, PeftError> {
    Regex::new(whole).map_err(|e| PeftError::Pattern { path: path.into(), key, pattern: pattern.into(), detail: e.to_string() })
}

/// PEFT's `get_pattern_key`: a key is a regular expression for the whole name or for its end, from
/// a dot on.
fn by_suffix<T>(path: &Path, key: &'static str, patterns: Option<Ordered<T>>) -> Result<Vec<(Regex, T)>, PeftError> {
    let compiled = |(pattern, value): (String, T)| Ok((compile(path, key, &pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, value));
    patterns.map_or(vec![], |patterns| patterns.0).into_iter().map(compiled).collect()
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|&(_, value)| value)
}

/// Patterns that find a layer's index in a module's name: after a name in `layers_pattern`, or
/// without one the first number after two names.
fn layer_index(path: &Path, layers_pattern: Option<Names>) -> Result<Vec<Regex>, PeftError> {
    let names = match layers_pattern {
        None => vec![],
        Some(Names::One(name)) if name.is_empty() => vec![],
        Some(Names::One(name)) => vec![name],
        Some(Names::List(names)) => names,
    };
    let key = "layers_pattern";
    if names.is_empty() {
        return Ok(vec![compile(path, key, "", r"^.*?\.[^.]*\.(?P<idx>\d+)\.")?]);
    }
    let after = |name: &String| compile(path, key, name, &format!(r"^(?:(?:^|.*?\.){name}\.(?P<idx>\d+)\.)"));
    names.iter().map(after).collect()
}

// -------------------------------------------------------------------------------------------------
// Adapters

/// A LoRA adapter: for some of the base model's modules, a low-rank change of the weight.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The name of its directory.
    pub name: String,
    /// By the module's name, such as `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, LoraFactor>,
}

/// The change of one weight: `scale * b * a`.
#[derive(Clone, Debug)]
pub struct LoraFactor {
    /// `[rank, in]`.
    pub a: Matrix,
    /// `[out, rank]`.
    pub b: Matrix,
    /// At least 1. Differs between modules where the config has a `rank_pattern`.
    pub rank: usize,
    /// alpha / rank, with rsLoRA alpha / sqrt(rank); computed in double precision.
    pub scale: f32,
}

/// Reads the adapter in `dir` (`adapter_config.json`, `adapter_model.safetensors`) and checks it
/// against the base.
pub fn load_adapter(dir: &Path, base: &BaseModel) -> Result<Adapter, PeftError> {
    let rules = Rules::read(&dir.join(CONFIG))?;
    let path = dir.join(TENSORS);
    if !path.exists() && dir.join(PICKLE).exists() {
        return Err(unsupported(dir, PICKLE, "a pickle", format!("{TENSORS} (PEFT's save_pretrained writes it)")));
    }
    let file = TensorFile::open(&path)?;
    let mut modules = BTreeMap::new();
    for module in adapted_modules(&file)? {
        let factor = load_factor(&file, &rules, base, &module)?;
        modules.insert(module, factor);
    }
    if modules.is_empty() {
        let tensor = format!("{PREFIX}MODULE.lora_A.weight");
        return Err(PeftError::MissingTensor { path, tensor, needed_by: "at least one module".into() });
    }
    Ok(Adapter { name: name_of(dir), modules })
}

/// Reads every adapter directly below `dir`, in the order of their names; a `dir` that is an
/// adapter itself is the only one. Directories without an `adapter_config.json` are passed over.
pub fn load_adapters(dir: &Path, base: &BaseModel) -> Result<Vec<Adapter>, PeftError> {
    let is_adapter = |dir: &PathBuf| dir.join(CONFIG).is_file();
    if is_adapter(&dir.into()) {
        return Ok(vec![load_adapter(dir, base)?]);
    }
    let entries = fs::read_dir(dir).and_then(|entries| entries.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>());
    let mut dirs: Vec<PathBuf> = entries.map_err(io_error(dir))?.into_iter().filter(is_adapter).collect();
    if dirs.is_empty() {
        return Err(PeftError::NoAdapters { path: dir.into() });
    }
    dirs.sort();
    dirs.iter().map(|dir| load_adapter(dir, base)).collect()
}

fn name_of(dir: &Path) -> String {
    // "." and ".." have no name of their own.
    let full = || dir.canonicalize().ok()?.file_name().map(|name| name.to_os_string());
    let name = dir.file_name().map(|name| name.to_os_string()).or_else(full).unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn a_name(module: &str) -> String {
    format!("{PREFIX}{module}.lora_A.weight")
}

fn b_name(module: &str) -> String {
    format!("{PREFIX}{module}.lora_B.weight")
}

/// The modules that the file has factors for. Each has both A and B, and there is no other tensor.
fn adapted_modules(file: &TensorFile) -> Result<Vec<String>, PeftError> {
    let mut modules = Vec::new();
    for tensor in file.names() {
        let path = || file.path.clone();
        let factor = tensor.strip_prefix(PREFIX).and_then(|name| {
            let a = name.strip_suffix(".lora_A.weight").map(|module| (module, b_name(module)));
            a.or_else(|| name.strip_suffix(".lora_B.weight").map(|module| (module, a_name(module))))
        });
        let Some((module, partner)) = factor else {
            return Err(PeftError::UnexpectedTensor { path: path(), tensor });
        };
        if file.header.info(&partner).is_none() {
            let needed_by = format!("`{tensor}`");
            return Err(PeftError::MissingTensor { path: path(), tensor: partner, needed_by });
        }
        modules.push(module.to_string());
    }
    modules.sort();
    modules.dedup();
    Ok(modules)
}

fn load_factor(file: &TensorFile, rules: &Rules, base: &BaseModel, module: &str) -> Result<LoraFactor, PeftError> {
    let (path, name) = (|| file.path.clone(), || module.to_string());
    let Some(shape) = base.shape_of(module) else {
        return Err(PeftError::NotInBase { path: path(), module: name(), base: base.path.clone() });
    };
    if !rules.targets(module) {
        let target_modules = rules.target.to_string();
        return Err(PeftError::NotTargeted { path: path(), module: name(), target_modules });
    }
    let (out, inputs) = shape?;
    let (_, a_rank, a_cols) = file.layout(&a_name(module))?;
    let (_, b_rows, b_rank) = file.layout(&b_name(module))?;
    let misfit = |tensor, found, expected| PeftError::Shape { path: path(), tensor, found, expected };
    if a_cols != inputs {
        let expected = format!("[rank, {inputs}] for the base weight [{out}, {inputs}]");
        return Err(misfit(a_name(module), vec![a_rank, a_cols], expected));
    }
    if b_rows != out {
        let expected = format!("[{out}, rank] for the base weight [{out}, {inputs}]");
        return Err(misfit(b_name(module), vec![b_rows, b_rank], expected));
    }
    let rank = rules.rank_of(module);
    if rank == 0 || (a_rank, b_rank) != (rank, rank) {
        return Err(PeftError::Rank { path: path(), module: name(), config: rank, a: a_rank, b: b_rank });
    }
    let (a, b) = (file.load(&a_name(module))?, file.load(&b_name(module))?);
    Ok(LoraFactor { a, b, rank, scale: rules.scale_of(module)? })
}
