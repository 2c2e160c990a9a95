//! Gather-scatter on the CPU.

use super::Pool;
use crate::dtype::{DType, Float, with_float};
use crate::permute::{CombinePlan, GatherPlan, MapsPlan};
use crate::stream::Odd;

/// A counting sort: stable, since items are placed in order.
pub(crate) fn maps(pool: &Pool, plan: &MapsPlan) {
    // SAFETY: the plan's matrices are checked host memory, borrowed by the call, outputs disjoint from all else.
    let (offsets, row_map) = unsafe { (plan.offsets.row_mut::<i32>(0), plan.row_map.row_mut::<i32>(0)) };
    let expert = |id: i32| usize::try_from(id).ok().filter(|&e| e < plan.experts as usize);
    offsets.fill(0);
    row_map.fill(-1);
    for token in 0..plan.ids.rows {
        // SAFETY: as above.
        for &id in unsafe { plan.ids.row::<i32>(token) } {
            match expert(id) {
                Some(e) => offsets[e + 1] += 1,
                None if id != -1 => pool.report(Odd::ID),
                None => {}
            }
        }
    }
    for e in 0..plan.experts as usize {
        offsets[e + 1] += offsets[e];
    }
    let mut next = offsets.to_vec();
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
    // SAFETY: the plan's matrices are checked host memory, borrowed by the call.
    let row_map = unsafe { plan.row_map.row::<i32>(0) };
    pool.for_each(rows.rows, |row| {
        let token = u64::try_from(row_map[row as usize]).map(|item| item / u64::from(plan.k));
        if let Some(token) = token.ok().filter(|&t| t < x.rows) {
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
        // SAFETY: the plan's matrices are checked host memory, borrowed by the call; y is disjoint from the inputs and this iteration
        // alone writes this row.
        let (inverse, gates, y) = unsafe { (plan.inverse.row::<i32>(token), plan.gates.row::<f32>(token), plan.y.row_mut::<T>(token)) };
        let mut sum = vec![0f32; y.len()];
        for (&row, gate) in inverse.iter().zip(gates) {
            let Some(row) = u64::try_from(row).ok().filter(|&r| r < plan.rows.rows) else { continue };
            // SAFETY: as above.
            for (sum, x) in sum.iter_mut().zip(unsafe { plan.rows.row::<T>(row) }) {
                *sum += gate * x.to_f32();
            }
        }
        for (y, sum) in y.iter_mut().zip(&sum) {
            *y = T::from_f32(*sum);
        }
    });
}
