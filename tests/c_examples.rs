//! The C ABI as C sees it: the header compiles, the libraries export what it declares, and programs in C, C++ and Python that verify
//! their own results run against the libraries.
//!
//! Paths are relative to the package's root, and the libraries lie beside the test binary, so that the binary can be carried to
//! another machine with them.

#![cfg(feature = "capi")]

use crate::common::skip;
use regex::Regex;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const HEADER: &str = "include/lora_switch.h";
const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// A program's output; it must succeed.
fn run(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let [said, errors] = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(out.status.success(), "{command:?}: {}\n{said}{errors}", out.status);
    said
}

/// The host compiler, as the cc crate finds it (CC, CXX, or the usual names); None, said aloud, without one.
fn compiler(cpp: bool, standard: &str) -> Option<Command> {
    // What a build script would be told by cargo.
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut build = cc::Build::new();
    build.target(&target).host(&target).opt_level(0).cpp(cpp).no_default_flags(true).cargo_metadata(false);
    let tool = build.try_get_compiler().ok();
    let Some(tool) = tool.filter(|tool| Command::new(tool.path()).arg("--version").output().is_ok()) else {
        skip(&format!("there is no {} compiler", if cpp { "C++" } else { "C" }));
        return None;
    };
    let mut command = tool.to_command();
    command.arg(standard).args(STRICT);
    Some(command)
}

fn c_compiler() -> Option<Command> {
    compiler(false, "-std=c99")
}

fn cpp_compiler() -> Option<Command> {
    compiler(true, "-std=c++11")
}

fn nm(args: &[&str], library: &Path) -> Option<String> {
    if Command::new("nm").arg("--version").output().is_err() {
        skip("there is no nm");
        return None;
    }
    Some(run(Command::new("nm").args(args).arg(library)))
}

/// Where the test binary is. Cargo builds the libraries there, in the same run.
fn here() -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// Beside the test binary, or one directory above it (where `cargo build` would put it).
fn library(name: &str) -> PathBuf {
    let places = [here().join(name), here().join("..").join(name)];
    places.into_iter().find(|path| path.is_file()).unwrap_or_else(|| panic!("{name} is not beside the test binary"))
}

/// Compiles a program with the libraries that are given, and runs it.
fn compile_and_run(compiler: Option<Command>, source: &str, name: &str, link: &[&OsStr]) {
    let Some(mut compiler) = compiler else { return };
    let dir = here().join("c_examples");
    fs::create_dir_all(&dir).unwrap();
    let program = dir.join(name);
    compiler.args(["-g", "-Iinclude", "-Iffi-examples", source, "-o"]).arg(&program).args(link);
    run(compiler.args(["-lpthread", "-lm", "-ldl"]));
    eprintln!("{name}:\n{}", run(&mut Command::new(&program)));
}

fn with_shared(compiler: Option<Command>, source: &str, name: &str) {
    let library = library("liblora_switch.so");
    let rpath = format!("-Wl,-rpath,{}", library.parent().unwrap().display());
    compile_and_run(compiler, source, name, &[library.as_ref(), rpath.as_ref()]);
}

#[test]
fn c_example() {
    with_shared(c_compiler(), "ffi-examples/c/switch.c", "switch_c");
}

#[test]
fn c_example_linked_statically() {
    let library = library("liblora_switch.a");
    let system = ["-lgcc_s", "-lutil", "-lrt"].map(OsStr::new);
    let link = [&[library.as_ref()][..], &system].concat();
    compile_and_run(c_compiler(), "ffi-examples/c/switch.c", "switch_c_static", &link);
}

#[test]
fn cpp_example() {
    with_shared(cpp_compiler(), "ffi-examples/cpp/switch.cpp", "switch_cpp");
}

/// On the CPU they need no package; on the GPU they run where there is torch.
#[test]
fn python_examples() {
    if Command::new("python3").arg("--version").output().is_err() {
        return skip("there is no python3");
    }
    for name in ["route_and_permute", "adapters"] {
        let mut python = Command::new("python3");
        let source = format!("ffi-examples/python/{name}.py");
        eprintln!("{}", run(python.args([&source, "--library"]).arg(library("liblora_switch.so"))));
    }
}

#[test]
fn c_errors() {
    with_shared(c_compiler(), "tests/c/errors.c", "errors");
}

#[test]
fn header_compiles_alone() {
    for (compiler, language) in [(c_compiler(), "c"), (cpp_compiler(), "c++")] {
        if let Some(mut compiler) = compiler {
            run(compiler.args(["-fsyntax-only", "-x", language, HEADER]));
        }
    }
}

/// The functions that the header declares: a name and a parenthesis on a line that starts a declaration.
fn declared() -> BTreeSet<String> {
    let header = fs::read_to_string(HEADER).unwrap();
    let function = Regex::new(r"(?m)^[a-z][a-z_0-9 ]*[ *](lsw_\w+)\(").unwrap();
    let names: BTreeSet<_> = function.captures_iter(&header).map(|found| found[1].to_owned()).collect();
    assert!(names.contains("lsw_route") && names.contains("lsw_last_error"), "{names:?}");
    names
}

/// The last word of each line of nm's in which `wanted` matches the rest.
fn symbols(listing: &str, wanted: impl Fn(&str, &str) -> bool) -> BTreeSet<String> {
    let split = |line: &str| line.rsplit_once(' ').map(|(kind, name)| (kind.to_owned(), name.to_owned()));
    listing.lines().filter_map(split).filter(|(kind, name)| wanted(kind, name)).map(|(_, name)| name).collect()
}

#[test]
fn shared_library_exports_the_header() {
    let Some(listing) = nm(&["-D", "--defined-only"], &library("liblora_switch.so")) else { return };
    assert_eq!(symbols(&listing, |_, _| true), declared());
}

#[test]
fn static_library_defines_the_header() {
    let Some(listing) = nm(&["-g", "--defined-only"], &library("liblora_switch.a")) else { return };
    let ours = |kind: &str, name: &str| kind.ends_with('T') && name.starts_with("lsw_");
    assert_eq!(symbols(&listing, ours), declared());
}
