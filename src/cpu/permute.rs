//! Gather-scatter on the CPU.

use super::Pool;
use crate::dtype::{DType, Float, with_float};
use crate::permute::{CombinePlan, GatherPlan, MapsPlan};
use crate::stream::Odd;

/// A counting sort: stable, since items are placed in order.
pub(crate) fn maps(pool: &Pool, plan: &MapsPlan) {
    // SAFETY: the plan's matrices are checked host memory, borrowed by the call, outputs disjoint from all else.
    let (offsets, row_map) = unsafe { (plan.offsets.row_mut::<i32>(0), plan.row_map.row_mut::<i32>(0)) };
    let expert = |id: i32| id.checked_sub(plan.first as i32).and_then(|e| usize::try_from(e).ok()).filter(|&e| e < plan.experts as usize);
    let mut next = vec![0; plan.experts as usize];
    for token in 0..plan.ids.rows {
        // SAFETY: as above.
        for &id in unsafe { plan.ids.row::<i32>(token) } {
            if let Some(e) = expert(id) {
                next[e] += 1;
            }
            if id < -1 || id >= plan.all_experts as i32 {
                pool.report(Odd::ID);
            }
        }
    }
    let mut end = 0;
    for (count, offset) in next.iter_mut().zip(offsets.iter_mut()) {
        *offset = end;
        end += (std::mem::replace(count, end) as u32).next_multiple_of(plan.block) as i32;
    }
    offsets[next.len()] = end;
    row_map.fill(plan.filler);
    let mut item = 0;
    for token in 0..plan.ids.rows {
        // SAFETY: as above; ids and inverse are disjoint.
        let (ids, inverse) = unsafe { (plan.ids.row::<i32>(token), plan.inverse.row_mut::<i32>(token)) };
        for (&id, inverse) in ids.iter().zip(inverse) {
            *inverse = expert(id).map_or(-1, |e| {
                let row = next[e];
                next[e] += 1;
                row_map[row as usize] = item;
                row
            });
            item += 1;
        }
    }
    if let Some(block_experts) = plan.block_experts {
        // SAFETY: as above.
        let block_experts = unsafe { block_experts.row_mut::<i32>(0) };
        block_experts.fill(-1);
        for (e, segment) in offsets.windows(2).enumerate() {
            let block = |offset: i32| (offset as u32 / plan.block) as usize;
            block_experts[block(segment[0])..block(segment[1])].fill(e as i32);
        }
    }
}

pub(crate) fn gather(pool: &Pool, plan: &GatherPlan) {
    match plan.x.dtype {
        DType::F32 | DType::I32 => gather_as::<f32>(pool, plan),
        DType::F16 | DType::Bf16 => gather_as::<half::f16>(pool, plan),
        DType::U8 => gather_as::<u8>(pool, plan),
    }
}

fn gather_as<T: crate::Element>(pool: &Pool, plan: &GatherPlan) {
    // Rows move as they are: one type of each size serves.
    let (x, rows) = (plan.x.with_dtype(T::DTYPE), plan.rows.with_dtype(T::DTYPE));
    // By row, so that each has one writer whatever the map says: the last token that names it.
    let mut source = vec![None; rows.rows as usize];
    for token in 0..x.rows {
        // SAFETY: the plan's matrices are checked host memory, borrowed by the call.
        for &row in unsafe { plan.inverse.row::<i32>(token) } {
            if let Some(source) = usize::try_from(row).ok().and_then(|row| source.get_mut(row)) {
                *source = Some(token);
            }
        }
    }
    pool.for_each(rows.rows, |row| {
        if let Some(token) = source[row as usize] {
            // SAFETY: as above; outputs are disjoint from inputs and this iteration alone writes this row.
            unsafe { rows.row_mut::<T>(row) }.copy_from_slice(unsafe { x.row::<T>(token) });
        }
    });
}

pub(crate) fn combine(pool: &Pool, plan: &CombinePlan) {
    with_float!(plan.y.dtype, combine_as::<_>(pool, plan));
}

fn combine_as<T: Float>(pool: &Pool, plan: &CombinePlan) {
    pool.for_each(plan.y.rows, |token| {
        // SAFETY: the plan's matrices are checked host memory, borrowed by the call.
        let (inverse, gates) = unsafe { (plan.inverse.row::<i32>(token), plan.gates.row::<f32>(token)) };
        let mut sum = vec![0f32; plan.y.cols as usize];
        for (&row, gate) in inverse.iter().zip(gates) {
            let Some(row) = u64::try_from(row).ok().filter(|&r| r < plan.rows.rows) else { continue };
            // SAFETY: as above.
            for (sum, x) in sum.iter_mut().zip(unsafe { plan.rows.row::<T>(row) }) {
                *sum += gate * x.to_f32();
            }
        }
        sum.iter_mut().for_each(|sum| *sum *= plan.scale);
        if let Some(residual) = &plan.residual {
            // SAFETY: as above; where this is y itself, the slice is gone before that of y is made.
            for (sum, x) in sum.iter_mut().zip(unsafe { residual.row::<T>(token) }) {
                *sum += x.to_f32();
            }
        }
        // SAFETY: as above; y is disjoint from the inputs that are still read, and this iteration alone touches this row of it.
        for (y, sum) in unsafe { plan.y.row_mut::<T>(token) }.iter_mut().zip(&sum) {
            *y = T::from_f32(*sum);
        }
    });
}
