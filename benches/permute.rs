//! Gather-scatter: maps, maps with gather, combine. Small cases run on the same buffers, which stay in the cache, as an engine's would
//! between router and experts; those called cold on as many as there are nodes, more than any cache holds.

use crate::lab::{Buffer, Failure, Lab, Result};
use crate::oracle;
use crate::timing::{Mode, Role, Subject, Timing, Work};
use crate::values::{Rng, decode};
use crate::{Case, Outcome, floor};
use lora_switch::{DType, Mat, MatMut, PermuteMaps, PermuteOptions, combine, gather, measure, permute_with};

/// Of graphs of large launches, each of which moves more than a cache holds.
const LARGE_NODES: usize = 4;
/// Tokens that are looked at.
const SAMPLES: u64 = 64;

#[derive(Clone, Copy)]
struct Shape {
    tokens: u64,
    k: u64,
    experts: u64,
    block: u64,
    width: u64,
}

pub fn cases() -> Vec<Case> {
    let large = Shape { tokens: 16384, k: 8, experts: 256, block: 1, width: 4096 };
    let small = Shape { tokens: 256, k: 2, experts: 64, ..large };
    let blocks = Shape { block: 64, width: 8, ..large };
    let decode = Shape { tokens: 64, experts: 64, ..blocks };
    vec![
        case("maps/T16384/N256/k8/b64", blocks, 1, maps),
        case("maps/T16384/N256/k8/b64/cold", blocks, floor::NODES, maps),
        case("maps/T64/N64/k8/b64", decode, 1, maps),
        case("maps/T16384/N65536/k8", Shape { experts: 65536, block: 1, ..blocks }, 1, maps),
        case("permute/T16384/N256/k8/D4096/bf16", large, 1, maps_and_gather),
        case("gather/T256/k2/D4096/bf16", small, 1, just_gather),
        case("combine/T16384/k8/D4096/bf16", large, 1, combined),
        case("combine/T256/k2/D4096/bf16", small, 1, combined),
        case("combine/T256/k2/D4096/bf16/cold", small, floor::NODES, combined),
    ]
}

/// Captures a case and its floor over these batches, in turn.
type Capture = fn(&Lab, &[Batch]) -> Result<Vec<(Role, Work)>>;

fn case(id: &str, shape: Shape, batches: usize, capture: Capture) -> Case {
    let run = move |lab: &Lab, timing: &Timing| {
        let batches = (0..batches).map(|seed| Batch::new(lab, shape, seed as u64)).collect::<Result<Vec<_>>>()?;
        let works = capture(lab, &batches)?;
        let figures = timing.measure(lab, &Subject { works, peer: None })?;
        Ok(Outcome { figures, checked: Some(batches[0].check(lab)?) })
    };
    Case { id: id.to_owned(), modes: vec![Mode::Token], run: Box::new(run) }
}

/// A batch of tokens with all that its calls read and write.
struct Batch {
    shape: Shape,
    options: PermuteOptions,
    ids: Buffer,
    offsets: Buffer,
    row_map: Buffer,
    inverse: Buffer,
    block_experts: Buffer,
    workspace: Buffer,
    x: Buffer,
    rows: Buffer,
    gates: Buffer,
    y: Buffer,
}

fn mat<'b>(lab: &Lab, buffer: &'b Buffer, rows: u64, cols: u64) -> Mat<'b> {
    // SAFETY: elements of the buffer (`address` checks), which waits for all work before it is freed.
    unsafe { Mat::raw(&lab.context, buffer.address(0, rows * cols), buffer.dtype, rows, cols, cols) }
}

fn mat_mut<'b>(lab: &Lab, buffer: &'b Buffer, rows: u64, cols: u64) -> MatMut<'b> {
    // SAFETY: as above; one stream orders whoever else uses the elements.
    unsafe { MatMut::raw(&lab.context, buffer.address(0, rows * cols), buffer.dtype, rows, cols, cols) }
}

/// k experts for each token, all different, as routers choose them.
fn route(shape: &Shape, rng: &mut Rng) -> Vec<i32> {
    let mut ids = Vec::new();
    for _ in 0..shape.tokens {
        let first = ids.len();
        while ids.len() < first + shape.k as usize {
            let id = rng.below(shape.experts as usize) as i32;
            if !ids[first..].contains(&id) {
                ids.push(id);
            }
        }
    }
    ids
}

impl Batch {
    fn new(lab: &Lab, shape: Shape, seed: u64) -> Result<Self> {
        let options = PermuteOptions { block: shape.block, ..PermuteOptions::new(shape.experts) };
        let items = shape.tokens * shape.k;
        let sizes = options.sizes(&lab.stream, items)?;
        let batch = Self {
            ids: lab.upload(DType::I32, &route(&shape, &mut Rng(seed)))?,
            offsets: lab.buffer(DType::I32, shape.experts + 1)?,
            row_map: lab.buffer(DType::I32, sizes.rows)?,
            inverse: lab.buffer(DType::I32, items)?,
            block_experts: lab.buffer(DType::I32, sizes.blocks)?,
            workspace: lab.buffer(DType::U8, sizes.workspace_bytes)?,
            x: lab.random(DType::Bf16, shape.tokens * shape.width, 1.0, 3 * seed + 1)?,
            rows: lab.random(DType::Bf16, sizes.rows * shape.width, 1.0, 3 * seed + 2)?,
            gates: lab.random(DType::F32, items, 1.0, 3 * seed + 3)?,
            y: lab.random(DType::Bf16, shape.tokens * shape.width, 1.0, 3 * seed + 4)?,
            shape,
            options,
        };
        batch.maps(lab)?;
        Ok(batch)
    }

    fn maps(&self, lab: &Lab) -> Result<()> {
        let (tokens, k) = (self.shape.tokens, self.shape.k);
        let (mut offsets, mut row_map) = (self.offsets.all_mut(), self.row_map.all_mut());
        let (mut inverse, mut blocks) = (mat_mut(lab, &self.inverse, tokens, k), self.block_experts.all_mut());
        let (offsets, row_map, inverse) = (&mut offsets, &mut row_map, &mut inverse);
        let maps = PermuteMaps { offsets, row_map, inverse, block_experts: Some(&mut blocks) };
        Ok(permute_with(&lab.stream, &self.options, &mat(lab, &self.ids, tokens, k), maps, &mut self.workspace.all_mut())?)
    }

    fn row_count(&self) -> u64 {
        self.rows.len / self.shape.width
    }

    fn gather(&self, lab: &Lab) -> Result<()> {
        let Shape { tokens, k, width, .. } = self.shape;
        let (x, inverse) = (mat(lab, &self.x, tokens, width), mat(lab, &self.inverse, tokens, k));
        Ok(gather(&lab.stream, &x, &inverse, &mut mat_mut(lab, &self.rows, self.row_count(), width))?)
    }

    fn combine(&self, lab: &Lab) -> Result<()> {
        let Shape { tokens, k, width, .. } = self.shape;
        let (rows, inverse) = (mat(lab, &self.rows, self.row_count(), width), mat(lab, &self.inverse, tokens, k));
        let gates = mat(lab, &self.gates, tokens, k);
        Ok(combine(&lab.stream, &rows, &inverse, &gates, &mut mat_mut(lab, &self.y, tokens, width))?)
    }

    /// The bytes of gather: x once, and its rows.
    fn repeat(&self, lab: &Lab) -> Result<()> {
        let mut rows = self.rows.part_mut(0, self.x.len * self.shape.k);
        Ok(measure::repeat(&lab.stream, self.shape.k, &self.x.all(), &mut rows)?)
    }

    /// The bytes of combine.
    fn fold(&self, lab: &Lab) -> Result<()> {
        let rows = self.rows.part(0, self.y.len * self.shape.k);
        Ok(measure::fold(&lab.stream, self.shape.k, &rows, &mut self.y.all_mut())?)
    }

    /// All maps; rows and results of some tokens, each made anew: the floors write there too.
    fn check(&self, lab: &Lab) -> Result<bool> {
        let Shape { tokens, k, experts, block, width } = self.shape;
        self.maps(lab)?;
        self.gather(lab)?;
        self.combine(lab)?;
        let all = |buffer: &Buffer| -> Result<Vec<i32>> {
            Ok(lab.download(buffer, 0, buffer.len)?.into_iter().map(|word| word as i32).collect())
        };
        let maps = oracle::Maps {
            offsets: all(&self.offsets)?,
            row_map: all(&self.row_map)?,
            inverse: all(&self.inverse)?,
            block_experts: all(&self.block_experts)?,
        };
        let ids = all(&self.ids)?;
        let good = match experts {
            ..=1024 => maps == oracle::maps(&ids, 0..experts as usize, block as usize, -1, maps.row_map.len()),
            _ => are_sorted(&ids, &maps),
        };
        if !good {
            return Err(Failure::Broken("the maps are wrong".into()));
        }
        let gates = lab.download(&self.gates, 0, self.gates.len)?;
        for sample in 0..SAMPLES.min(tokens) {
            let t = sample * (tokens - 1) / (SAMPLES.min(tokens) - 1);
            let (token, items) = (lab.download(&self.x, t * width, width)?, (t * k) as usize..((t + 1) * k) as usize);
            for &row in &maps.inverse[items.clone()] {
                if lab.download(&self.rows, row as u64 * width, width)? != token {
                    return Err(Failure::Broken(format!("row {row} of token {t} is wrong")));
                }
            }
            // All of a token's rows are the token.
            let x: Vec<f64> = token.iter().map(|&bits| decode(DType::Bf16, bits)).collect();
            let weights: Vec<f64> = gates[items].iter().map(|&bits| decode(DType::F32, bits)).collect();
            let (exact, bounds) = oracle::combine(&vec![&x[..]; k as usize], &weights, 1.0, &vec![0.0; x.len()]);
            let got: Vec<f64> = lab.download(&self.y, t * width, width)?.iter().map(|&bits| decode(DType::Bf16, bits)).collect();
            oracle::assert_close(DType::Bf16, &got, &exact, &bounds, "combine");
        }
        Ok(true)
    }
}

/// Whether unpadded maps are those of a stable sort: for more experts than the oracle, which looks at all items for each, has time for.
fn are_sorted(ids: &[i32], maps: &oracle::Maps) -> bool {
    let mut sorted: Vec<(i32, i32)> = ids.iter().copied().zip(0..).collect();
    sorted.sort_unstable();
    let is_row = |(row, &(id, item)): (usize, &(i32, i32))| {
        maps.row_map[row] == item && maps.inverse[item as usize] == row as i32 && maps.block_experts[row] == id
    };
    let begin = |e: usize| sorted.partition_point(|(id, _)| (*id as usize) < e);
    sorted.iter().enumerate().all(is_row) && maps.offsets.iter().enumerate().all(|(e, &offset)| offset as usize == begin(e))
}

/// Graphs of a piece of work on each batch in turn.
fn work(lab: &Lab, batches: &[Batch], piece: impl Fn(&Batch) -> Result<()>) -> Result<Work> {
    let is_large = batches[0].rows.len > 1 << 28;
    let nodes = if is_large { LARGE_NODES } else { floor::NODES };
    let graph = lab.capture(|| (0..nodes).try_for_each(|node| piece(&batches[node % batches.len()])))?;
    Ok(Work::new(vec![graph], nodes))
}

/// Their floor is a launch: they move next to nothing.
fn maps(lab: &Lab, batches: &[Batch]) -> Result<Vec<(Role, Work)>> {
    let launch = |batch: &Batch| Ok(measure::scale_in_place(&lab.stream, 1.0, &mut batch.y.part_mut(0, 1))?);
    Ok(vec![(Role::Case, work(lab, batches, |batch| batch.maps(lab))?), (Role::Floor, work(lab, batches, launch)?)])
}

fn maps_and_gather(lab: &Lab, batches: &[Batch]) -> Result<Vec<(Role, Work)>> {
    let both = |batch: &Batch| batch.maps(lab).and_then(|()| batch.gather(lab));
    Ok(vec![(Role::Case, work(lab, batches, both)?), (Role::Floor, work(lab, batches, |batch| batch.repeat(lab))?)])
}

fn just_gather(lab: &Lab, batches: &[Batch]) -> Result<Vec<(Role, Work)>> {
    Ok(vec![(Role::Case, work(lab, batches, |b| b.gather(lab))?), (Role::Floor, work(lab, batches, |b| b.repeat(lab))?)])
}

fn combined(lab: &Lab, batches: &[Batch]) -> Result<Vec<(Role, Work)>> {
    Ok(vec![(Role::Case, work(lab, batches, |b| b.combine(lab))?), (Role::Floor, work(lab, batches, |b| b.fold(lab))?)])
}
