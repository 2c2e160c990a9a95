//! The gate: a router that computes its logits itself.

use crate::check::{Checked, MAX_COUNT, narrow};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::route::{Choice, Outputs, RouteOptions, check_choice, check_experts};
use crate::stream::{Stream, StreamKind};
use crate::view::{Mat, MatMut, RawMat};

/// The linear layer in front of a router.
#[derive(Debug, Clone, Copy)]
pub struct GateWeight<'a> {
    /// `[N, H]` f32, f16 or bf16, as `torch.nn.Linear` keeps it.
    pub weight: &'a Mat<'a>,
    /// `[1, N]` of the same type, added to the logits.
    pub bias: Option<&'a Mat<'a>>,
}

/// A checked call.
pub(crate) struct Plan {
    pub x: RawMat,
    pub weight: RawMat,
    pub weight_bias: Option<RawMat>,
    pub choice: Choice,
}

/// Projects hidden states to logits and routes them, `logits = x weight^T + bias`: the router of LoRA-Switch (arXiv 2405.17741, section
/// 4.1) as one operation.
///
/// - `x [T, H]` of the weight's type. H is anything, N from 1 to 1024. Row strides are free; where address and row bytes of x and weight
///   are multiples of 16, loads are.
/// - `ids`, `gates`, the options and odd values: as for [`route`](crate::route); the logits are those of f32, never rounded. Padding
///   tokens do not influence others.
/// - `counts [1, N]` i32, if given: as for [`route_counted`](crate::route_counted).
/// - `workspace` u8, at least [`gate_workspace_bytes`], a multiple of 16 in address. Zeros before the first call; every call leaves it
///   ready for the next, of whatever shape, if it is large enough for that: nobody else writes to it. As for `route_counted`, calls
///   that share one are in flight on one stream at a time, and after a failed launch it must be zeroed again.
///
/// Products and sums are in f32 in an order that H alone decides: a token's bits depend neither on T nor on the other tokens. On CUDA one
/// launch up to 64 tokens, two beyond.
///
/// # Errors
/// As for `route`, and on an x, a weight or a workspace that breaks the above; outputs are untouched then.
#[expect(clippy::too_many_arguments, reason = "each is a matrix of its own shape, as in the C ABI")]
pub fn gate(
    stream: &Stream,
    options: &RouteOptions<'_>,
    x: &Mat<'_>,
    weight: &GateWeight<'_>,
    ids: &mut MatMut<'_>,
    gates: &mut MatMut<'_>,
    counts: Option<&mut MatMut<'_>>,
    workspace: &mut MatMut<'_>,
) -> Result<()> {
    let outputs = Outputs { ids: ids.raw, gates: gates.raw, counts: counts.map(|counts| counts.raw), workspace: Some(workspace.raw) };
    let plan = check(stream, options, x.raw, weight, &outputs)?;
    match &stream.0 {
        _ if plan.choice.tokens == 0 && plan.choice.counts.is_none() => Ok(()),
        StreamKind::Cpu(pool) => {
            crate::cpu::gate::run(pool, &plan);
            Ok(())
        }
        StreamKind::Cuda(stream) => crate::cuda::gate::launch(stream, &plan),
    }
}

/// Bytes of workspace that [`gate`] needs for tokens T, experts N and hidden H: 0 on a CPU stream. It never falls where T, N or H grow
/// up to T = 64; beyond, logits [T, N] are kept there.
///
/// # Errors
/// On sizes out of range.
pub fn gate_workspace_bytes(stream: &Stream, tokens: u64, experts: u64, hidden: u64) -> Result<u64> {
    let tokens = narrow("tokens", tokens, MAX_COUNT)?;
    let experts = check_experts("experts", experts)?;
    narrow("hidden", hidden, MAX_COUNT)?;
    Ok(match &stream.0 {
        StreamKind::Cpu(_) => 0,
        StreamKind::Cuda(_) => crate::cuda::gate::workspace_bytes(tokens, experts),
    })
}

fn check(stream: &Stream, options: &RouteOptions<'_>, x: RawMat, weight: &GateWeight<'_>, outputs: &Outputs) -> Result<Plan> {
    let (x, w) = (x.expect("x"), weight.weight.raw.expect("weight"));
    x.dtype_in(DType::FLOATS)?;
    w.dtype_in(&[x.mat.dtype])?;
    let tokens = narrow("x.rows", x.mat.rows, MAX_COUNT)?;
    let experts = check_experts("weight.rows", w.mat.rows)?;
    if x.mat.cols == 0 {
        return Err(Error::argument("x.cols", 0, "at least 1"));
    }
    let hidden = narrow("x.cols", x.mat.cols, MAX_COUNT)?;
    w.cols(u64::from(hidden), "H, x.cols")?;
    let mut inputs = vec![x.memory()?.on(stream)?, w.memory()?.on(stream)?];
    if let Some(bias) = weight.bias {
        let bias = bias.raw.expect("weight_bias").dtype_in(&[x.mat.dtype])?.rows(1, "a vector")?;
        inputs.push(bias.cols(u64::from(experts), "the experts")?.memory()?.on(stream)?);
    }
    let needed = gate_workspace_bytes(stream, u64::from(tokens), u64::from(experts), u64::from(hidden))?;
    let choice = check_choice(stream, options, (tokens, experts), outputs, needed, &inputs)?;
    Ok(Plan { x: x.mat, weight: w.mat, weight_bias: weight.bias.map(|bias| bias.raw), choice })
}
