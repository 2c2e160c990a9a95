//! The top-k router.

use crate::check::{Checked, MAX_COUNT, narrow};
use crate::cuda::args::{LSW_MAX_EXPERTS, LSW_MAX_K};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};

/// How scores become gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteOptions {
    /// Gates sum to 1 over the chosen k (the default); else they are the softmax probabilities over all N.
    pub renormalize: bool,
}

impl Default for RouteOptions {
    fn default() -> Self {
        Self { renormalize: true }
    }
}

/// A checked call.
pub(crate) struct Plan {
    pub logits: RawMat,
    pub ids: RawMat,
    pub gates: RawMat,
    pub tokens: u32,
    pub experts: u32,
    pub k: u32,
    pub renormalize: bool,
}

/// Routes each token to its k best experts: softmax over N logits, top-k, gates (LoRA-Switch, arXiv 2405.17741, section 4.1).
///
/// - `logits [T, N]` f32, f16 or bf16; N from 1 to 1024.
/// - `ids [T, k]` i32 and `gates [T, k]` f32, both written; k is their width, at most min(N, 32). Descending by score, ties to the
///   lower id. Row strides are free everywhere. Addresses need the alignment of an element.
///
/// Odd values: NaN counts as -inf. If some logits are +inf, those share the softmax equally. In a row with nothing above -inf every
/// score is 0: ids are 0..k and the gates are 0. So ids are always distinct and in range, gates never NaN; the stream's
/// [`take_odd`](Stream::take_odd) tells that such a row was met.
///
/// Deterministic, and a token's bits do not depend on the other tokens. One launch, no workspace. On CUDA the work is enqueued.
///
/// # Errors
/// On shapes, dtypes, strides, places and overlaps that break the above; outputs are untouched then.
pub fn route(stream: &Stream, options: &RouteOptions, logits: &Mat<'_>, ids: &mut MatMut<'_>, gates: &mut MatMut<'_>) -> Result<()> {
    let plan = check(stream, options, logits.raw, ids.raw, gates.raw)?;
    match &stream.0 {
        _ if plan.tokens == 0 => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::route::run(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::route::launch(stream, &plan),
    }
}

fn check(stream: &Stream, options: &RouteOptions, logits: RawMat, ids: RawMat, gates: RawMat) -> Result<Plan> {
    let (logits, ids, gates) = (logits.expect("logits"), ids.expect("ids"), gates.expect("gates"));
    logits.dtype_in(DType::FLOATS)?;
    ids.dtype_in(&[DType::I32])?;
    gates.dtype_in(&[DType::F32])?;
    let tokens = narrow("logits.rows", logits.mat.rows, MAX_COUNT)?;
    let experts = narrow("logits.cols", logits.mat.cols, u64::from(LSW_MAX_EXPERTS))?;
    if experts == 0 {
        return Err(Error::argument("logits.cols", 0, "at least 1"));
    }
    let k = ids.mat.cols;
    let bound = experts.min(LSW_MAX_K);
    if k == 0 || k > u64::from(bound) {
        return Err(Error::argument("ids.cols", k, format!("1 to {bound} (k, at most the experts and {LSW_MAX_K})")));
    }
    ids.rows(u64::from(tokens), "the tokens, logits.rows")?;
    gates.rows(u64::from(tokens), "the tokens, logits.rows")?.cols(k, "k, ids.cols")?;
    for mat in [logits, ids, gates] {
        mat.memory()?.on(stream)?;
    }
    ids.disjoint_from(&[logits, gates])?;
    gates.disjoint_from(&[logits])?;
    Ok(Plan { logits: logits.mat, ids: ids.mat, gates: gates.mat, tokens, experts, k: k as u32, renormalize: options.renormalize })
}
