//! The compiled kernels, and the one place that knows whether nvcc ran.

include!(concat!(env!("OUT_DIR"), "/images.rs"));
