//! The CUDA backend: checked plans become argument structs and grids. It compiles everywhere: libcuda is loaded at run time, and in a
//! build without nvcc only the table of images is empty.

#[rustfmt::skip]
#[allow(missing_docs, non_camel_case_types, non_upper_case_globals, dead_code, clippy::all, clippy::undocumented_unsafe_blocks)]
pub(crate) mod args;
pub(crate) mod apply;
mod apply_dense;
pub(crate) mod bank;
pub(crate) mod calibrate;
mod context;
pub(crate) mod gate;
mod images;
mod launch;
pub(crate) mod linear;
mod maps;
pub(crate) mod measure;
mod memory;
pub(crate) mod permute;
pub(crate) mod route;
pub(crate) mod switch;

pub(crate) use context::{Device, DeviceStream};
pub(crate) use launch::warm;

/// The flags that hold, as a kernel wants them.
fn flags<const N: usize>(all: [(bool, u32); N]) -> u32 {
    all.iter().filter(|(holds, _)| *holds).map(|(_, flag)| flag).sum()
}
