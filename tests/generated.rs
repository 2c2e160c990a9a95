//! Committed files that are generated: the C header, and the Rust side of kernels/args.h. They are compared with what their
//! generators say now; LORA_SWITCH_REGENERATE=1 (`make gen`) writes them instead.

use crate::common::{is_set, skip};
use std::panic::catch_unwind;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// `essence` is what has to agree.
pub fn check(path: &str, fresh: &str, essence: impl Fn(&str) -> String) {
    if is_set("LORA_SWITCH_REGENERATE") {
        return fs::write(path, fresh).unwrap();
    }
    let committed = fs::read_to_string(path).unwrap_or_default();
    assert!(essence(&committed) == essence(fresh), "{path} is stale: run `make gen` and commit what it writes");
}

/// The version macros come from Cargo.toml: there is no second place to keep.
fn version_macros() -> String {
    let numbers = [
        ("MAJOR", env!("CARGO_PKG_VERSION_MAJOR")),
        ("MINOR", env!("CARGO_PKG_VERSION_MINOR")),
        ("PATCH", env!("CARGO_PKG_VERSION_PATCH")),
    ];
    let macros = numbers.map(|(part, number)| format!("#define LSW_VERSION_{part} {number}\n")).concat();
    let packed = "LSW_VERSION_MAJOR << 16 | LSW_VERSION_MINOR << 8 | LSW_VERSION_PATCH";
    format!("\n/* The version of this header; lsw_version says the library's. */\n{macros}#define LSW_VERSION ({packed})\n")
}

#[test]
fn header_is_fresh() {
    let mut config = cbindgen::Config::from_file("cbindgen.toml").unwrap();
    config.after_includes = Some(version_macros());
    let builder = cbindgen::Builder::new().with_src("src/ffi/mod.rs"); // and its modules
    let mut fresh = Vec::new();
    builder.with_config(config).generate().expect("src/ffi makes a header").write(&mut fresh);
    check("include/lora_switch.h", &String::from_utf8(fresh).unwrap(), str::to_owned);
}

const LIBCLANG: &str = "target/libclang/clang/native"; // what `make setup` fetches

#[test]
fn kernel_arguments_are_fresh() {
    if env::var_os("LIBCLANG_PATH").is_none() && Path::new(LIBCLANG).is_dir() {
        // bindgen reads the environment, which must not change under other tests: so in a process of its own.
        let mut test = Command::new(env::current_exe().unwrap());
        test.args(["generated::kernel_arguments_are_fresh", "--exact"]).env("LIBCLANG_PATH", LIBCLANG);
        return assert!(test.status().unwrap().success());
    }
    if let Err(panic) = catch_unwind(bindgen::clang_version) {
        let why = panic.downcast_ref::<String>().map_or("", String::as_str);
        return skip(&format!("no libclang, without which bindgen does not run ({why})"));
    }
    // libclang from PyPI brings no headers of its own.
    let include = Command::new("gcc").arg("-print-file-name=include").output();
    let include = include.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned()).unwrap_or_default();
    let fresh = bindgen::builder()
        .header("kernels/args.h")
        .clang_arg(format!("-I{include}"))
        .allowlist_type("Lsw.*")
        .allowlist_var("LSW_.*")
        .derive_default(true)
        .derive_copy(true)
        .layout_tests(true)
        .use_core()
        .prepend_enum_name(false)
        .generate_comments(false)
        .generate();
    // rustfmt's versions differ, in white space and trailing commas; without it bindgen does not format at all.
    let essence = |text: &str| text.chars().filter(|c| !c.is_whitespace() && *c != ',').collect();
    check("src/cuda/args.rs", &fresh.expect("args.h is C").to_string(), essence);
}
