#![doc = include_str!("../README.md")]

mod advise;
mod apply;
mod bank;
mod calibrate;
mod check;
mod cpu;
mod cuda;
mod dtype;
mod error;
#[cfg(feature = "capi")]
mod ffi;
mod gate;
mod linear;
pub mod measure;
mod memory;
mod permute;
mod route;
mod stream;
mod switch;
mod view;

pub use advise::{Advice, Strategy, Workload, advise};
pub use apply::{Routes, apply, apply_begin, apply_finish, apply_into, apply_workspace_bytes};
pub use bank::{AdapterBank, Factor, TargetShape};
pub use calibrate::Calibration;
pub use dtype::{DType, Element, Float};
pub use error::{Error, Result};
pub use gate::{GateWeight, gate, gate_workspace_bytes};
pub use linear::{LinearOptions, linear, linear_workspace_bytes};
pub use memory::StateMemory;
pub use permute::{
    CombineOptions, PermuteMaps, PermuteOptions, PermuteSizes, combine, combine_with, gather, permute, permute_with,
    permute_workspace_bytes,
};
pub use route::{GroupScore, RouteOptions, Score, route, route_counted, route_workspace_bytes};
pub use stream::{Context, Odd, Stream};
pub use switch::{Form, SwitchKernels, SwitchOptions, SwitchSet, Target};
pub use view::{Mat, MatMut, Tensor, Weight};
