//! Compiles each kernels/*.cu into one fatbin. OUT_DIR receives them and two files of Rust:
//! `images.rs` (the fatbins; for src/cuda/images.rs) and `reports.rs` (what ptxas said of their
//! resources; for tests/resources.rs).
//! If there is no nvcc, the tables are empty and a warning says so. If nvcc fails, so does the build.

use std::collections::BTreeSet;
use std::env::{self, consts::EXE_SUFFIX};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// SASS for each major revision (minor ones run it: 8.6 and 8.9 that of 8.0), and PTX for all others:
/// that of 12.0 serves nothing below 12.0, so that 9.0's is there too.
const TARGETS: &[&str] = &["sm_80", "sm_90", "sm_100", "sm_120", "compute_90", "compute_120"];

/// wgmma exists on 9.0a alone: other targets are errors or, behind an #ifdef, kernels that do nothing.
const TARGETS_SM90: &[&str] = &["sm_90a"];

/// No fast-math: it breaks the promises about NaN, denormals and bit equality. A spill is an error.
#[rustfmt::skip]
const FLAGS: &[&str] = &[
    "--fatbin", "-std=c++17", "-O3", "--compress-mode=size", "--threads", "2", "-I", "kernels",
    "-Xptxas", "-v,--warn-on-spills,--warning-as-error",
];

const PIP: &str = "site-packages/nvidia/cu13/bin"; // below a virtual environment's lib/python3.N

/// What the environment names comes first; then what `make setup` put into this tree, whose version is
/// pinned, before whatever happens to be on PATH. Lazy: variables not needed are not watched.
fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = var("NVCC") {
        return Some(nvcc.into()); // taken at its word: the build fails if it does not run
    }
    let set = |names: &'static [&str]| names.iter().filter_map(|name| var(name));
    (set(&["CUDA_HOME", "CUDA_PATH"]).map(|home| Path::new(&home).join("bin")))
        .chain(["target/cuda/nvidia/cu13/bin".into()])
        .chain(set(&["PATH"]).flat_map(|path| Vec::from_iter(env::split_paths(&path))))
        .chain(set(&["VIRTUAL_ENV"]).flat_map(|venv| list(venv + "/lib")).map(|lib| lib.join(PIP)))
        .chain(["/usr/local/cuda/bin".into()])
        .map(|dir| dir.join(format!("nvcc{EXE_SUFFIX}")))
        .find(|nvcc| nvcc.is_file())
        .inspect(|nvcc| println!("cargo:rerun-if-changed={}", nvcc.display()))
}

fn main() {
    // `make setup` touches build.rs to have its nvcc noticed.
    println!("cargo:rerun-if-changed=kernels\ncargo:rerun-if-changed=build.rs");
    if var("DOCS_RS").is_some() {
        return write_tables("no nvcc: built for documentation only", &[]);
    }
    let Some(nvcc) = find_nvcc() else {
        let why = "no nvcc was found when this was built (run `make setup`, or set NVCC or CUDA_HOME)";
        assert!(var("LORA_SWITCH_REQUIRE_NVCC").is_none_or(|value| value == "0"), "{why}");
        println!("cargo:warning=building without GPU kernels: {why}");
        return write_tables(why, &[]);
    };
    let ask = |question| run(Command::new(&nvcc).arg(question));
    let version = ask("--version");
    let known = ask("--list-gpu-code") + &ask("--list-gpu-arch");
    let known = Vec::from_iter(known.split_whitespace());
    let sources = list("kernels").into_iter().filter(|file| file.extension() == Some("cu".as_ref()));
    let built = Vec::from_iter(sources.filter_map(|source| compile(&nvcc, &version, &known, &source)));
    write_tables(version.lines().find(|line| line.contains("release")).unwrap_or(&version), &built);
}

/// Returns the stem, or None if this nvcc knows none of the file's targets. Cargo runs this script for
/// each profile and feature set: a cache beside the profiles, by a hash of all inputs, spares nvcc that.
fn compile(nvcc: &Path, version: &str, known: &[&str], source: &Path) -> Option<String> {
    let stem = source.file_stem()?.to_str()?;
    let wanted = if stem.ends_with("_sm90") { TARGETS_SM90 } else { TARGETS };
    let is_known = |target: &&&str| known.contains(&target.trim_end_matches('a'));
    let targets = Vec::from_iter(wanted.iter().filter(is_known));
    targets.first()?;
    // A fatbin holds no host code, so that the building machine's compiler will do.
    let host = env::var("HOST").unwrap();
    let cxx = cc::Build::new().cpp(true).target(&host).host(&host).get_compiler();
    let mut command = Command::new(nvcc);
    command.args(FLAGS).arg("-ccbin").arg(cxx.path()).arg(source);
    let arch = |code: &str| code.replace("sm_", "compute_");
    command.args(targets.iter().map(|code| format!("-gencode=arch={},code={code}", arch(code))));

    let mut inputs = format!("{version}{command:?}").into_bytes();
    let is_header = |file: &PathBuf| file.extension().is_some_and(|e| e == "h" || e == "cuh");
    for file in files("kernels").into_iter().filter(is_header).chain([source.to_owned()]) {
        let text = fs::read(&file).unwrap();
        inputs.extend(format!("\0{}\0{}\0", file.display(), text.len()).bytes().chain(text));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap()); // TARGET_DIR[/TRIPLE]/PROFILE/build/...
    let mut above = out.ancestors().skip_while(|dir| !dir.ends_with("build")).skip(2);
    let triple = env::var("TARGET").unwrap();
    let cache = above.find(|dir| !dir.ends_with(&triple)).unwrap_or(&out).join("lora-switch-fatbins");
    let cached = |kind: &str| cache.join(format!("{stem}-{:016x}.{kind}", fnv1a(&inputs)));
    if !cached("fatbin").is_file() {
        // Written aside and renamed, the fatbin last: another build may be using the cache.
        let aside = |kind: &str| cached(&format!("{}.{kind}", std::process::id()));
        fs::create_dir_all(&cache).unwrap();
        fs::write(aside("ptxas.txt"), run(command.arg("-o").arg(aside("fatbin")))).unwrap();
        fs::rename(aside("ptxas.txt"), cached("ptxas.txt")).unwrap();
        fs::rename(aside("fatbin"), cached("fatbin")).unwrap();
    }
    // Copied, so that clearing the cache breaks nothing.
    fs::copy(cached("ptxas.txt"), out.join(format!("{stem}.ptxas.txt"))).unwrap();
    fs::copy(cached("fatbin"), out.join(format!("{stem}.fatbin"))).unwrap();
    Some(stem.to_owned())
}

/// The generated Rust. nvcc too aligns the fatbins it embeds; include_bytes! promises one byte.
fn write_tables(built_with: &str, stems: &[String]) {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let built_with = format!("pub(crate) const BUILT_WITH: &str = {built_with:?};\n");
    let aligned = "#[allow(dead_code)]\n#[repr(C, align(16))]\nstruct Aligned<T>(T);\n";
    let mut images = format!("{built_with}{aligned}pub(crate) const IMAGES: &[(&str, &[u8])] = &[\n");
    let mut reports = format!("{built_with}pub(crate) const REPORTS: &[(&str, &str)] = &[\n");
    for stem in stems {
        let file = |kind| out.join(format!("{stem}.{kind}"));
        images += &format!("    ({stem:?}, &Aligned(*include_bytes!({:?})).0),\n", file("fatbin"));
        reports += &format!("    ({stem:?}, include_str!({:?})),\n", file("ptxas.txt"));
    }
    fs::write(out.join("images.rs"), images + "];\n").unwrap();
    fs::write(out.join("reports.rs"), reports + "];\n").unwrap();
}

/// Runs a tool that must succeed, and returns all it says.
fn run(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let said = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(out.status.success(), "{command:?} failed (nvcc 12.4 or newer is needed)\n{said}");
    said
}

/// An environment variable that this build from now on depends on; empty is as good as unset.
fn var(name: &str) -> Option<String> {
    println!("cargo:rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// A directory's entries, sorted; none if there is no such directory.
fn list(dir: impl AsRef<Path>) -> BTreeSet<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

/// The files of a directory and of those below it.
fn files(dir: impl AsRef<Path>) -> BTreeSet<PathBuf> {
    list(dir).into_iter().flat_map(|path| if path.is_dir() { files(path) } else { [path].into() }).collect()
}

/// A hash that, unlike std's, is the same with every compiler.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
