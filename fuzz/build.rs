//! The C header as Rust, so that the fuzzer calls what C calls.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=../include/lora_switch.h");
    // libclang from PyPI brings no headers of its own.
    let include = Command::new("gcc").arg("-print-file-name=include").output().expect("gcc runs");
    let bindings = bindgen::builder()
        .header("../include/lora_switch.h")
        .clang_arg(format!("-I{}", String::from_utf8_lossy(&include.stdout).trim()))
        .allowlist_item("(lsw|LSW)_.*")
        .derive_default(true)
        .layout_tests(false)
        .generate()
        .expect("the header is C");
    fs::write(Path::new(&env::var("OUT_DIR").unwrap()).join("lora_switch.rs"), bindings.to_string()).unwrap();
}
