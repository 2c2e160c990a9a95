//! The one test binary. Every property is stamped over both backends (`on_backends!`) and judged by the float64 oracle.
//!
//! A test that needs a GPU says so when there is none, and fails instead under LORA_SWITCH_REQUIRE_GPU=1.

#[macro_use]
mod common;
mod oracle;
mod values;

mod advise;
mod apply;
mod backend;
mod c_examples;
mod demo;
mod figures;
mod gate;
mod generated;
mod graph;
mod linear;
mod peft;
mod peft_loader;
mod permute;
mod plot;
mod resources;
mod route;
mod safe_api;
mod switch;
