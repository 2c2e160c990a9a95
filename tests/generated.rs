//! Committed files that are generated: the C header, the Rust side of kernels/args.h. They are compared with what their generators
//! say now; LORA_SWITCH_REGENERATE=1 (`make gen`) writes them instead.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn is_set(name: &str) -> bool {
    env::var(name).is_ok_and(|value| !value.is_empty() && value != "0")
}

/// Layout is not compared, since formatters differ between machines: only the words are.
fn check(path: &str, fresh: &str) {
    if is_set("LORA_SWITCH_REGENERATE") {
        fs::create_dir_all(Path::new(path).parent().unwrap()).unwrap();
        return fs::write(path, fresh).unwrap();
    }
    let committed = fs::read_to_string(path).unwrap_or_default();
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let differ = words(&committed).iter().zip(&words(fresh)).position(|(a, b)| a != b);
    let same = differ.is_none() && words(&committed).len() == words(fresh).len();
    assert!(same, "{path} is stale, from its word {differ:?} on: run `make gen` and commit what it writes");
}

fn header() -> String {
    let mut config = cbindgen::Config::from_file("cbindgen.toml").unwrap();
    let version = |part, number| format!("#define LSW_VERSION_{part} {number}\n");
    let macros = [
        version("MAJOR", env!("CARGO_PKG_VERSION_MAJOR")),
        version("MINOR", env!("CARGO_PKG_VERSION_MINOR")),
        version("PATCH", env!("CARGO_PKG_VERSION_PATCH")),
        "#define LSW_VERSION (LSW_VERSION_MAJOR << 16 | LSW_VERSION_MINOR << 8 | LSW_VERSION_PATCH)\n".into(),
    ];
    config.after_includes = Some(format!("\n/* The version of this header; see lsw_version. */\n{}", macros.concat()));
    let files = ["mod", "context", "bank", "switch", "route", "permute"];
    let builder = files.iter().fold(cbindgen::Builder::new(), |b, file| b.with_src(format!("src/ffi/{file}.rs")));
    let mut text = Vec::new();
    builder.with_config(config).generate().expect("src/ffi makes a header").write(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn header_is_fresh() {
    check("include/lora_switch.h", &header());
}
