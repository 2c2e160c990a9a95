//! What can go wrong, said with the argument's name, its value and the bound it broke.

use std::fmt;

/// The result of every fallible call.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call did nothing. Nothing was launched and no output was touched, except after [`Error::Cuda`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument is out of its bounds.
    Argument {
        /// The argument, as the documentation names it.
        name: String,
        /// What was given.
        value: String,
        /// What is allowed.
        bound: String,
    },
    /// The NVIDIA driver, or a device, is missing.
    NoDevice {
        /// What is missing, and what to do about it.
        why: String,
    },
    /// This build holds no kernels, because no nvcc was found when it was made.
    NoKernels {
        /// What the build script looked for, and how to mend it.
        why: &'static str,
    },
    /// A driver call failed.
    Cuda {
        /// The call.
        call: &'static str,
        /// Its `CUresult`.
        code: u32,
    },
    /// Memory, of the device or the host, could not be had.
    OutOfMemory {
        /// How much was asked for.
        bytes: u64,
    },
}

impl Error {
    pub(crate) fn argument(name: impl Into<String>, value: impl fmt::Display, bound: impl Into<String>) -> Self {
        Self::Argument { name: name.into(), value: value.to_string(), bound: bound.into() }
    }

    /// Puts an argument's error under the structure that holds the argument: `base` becomes `targets[3].base`.
    pub(crate) fn within(self, outer: impl fmt::Display) -> Self {
        match self {
            Self::Argument { name, value, bound } => Self::Argument { name: format!("{outer}.{name}"), value, bound },
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument { name, value, bound } => write!(f, "{name} is {value}; it must be {bound}"),
            Self::NoDevice { why } => write!(f, "no CUDA device: {why}"),
            Self::NoKernels { why } => write!(f, "this build of lora-switch holds no CUDA kernels: {why}"),
            Self::Cuda { call, code } => write!(f, "{call} failed with CUresult {code}"),
            Self::OutOfMemory { bytes } => write!(f, "{bytes} bytes of memory could not be allocated"),
        }
    }
}

impl std::error::Error for Error {}
