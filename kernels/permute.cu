// Gather-scatter: group the tokens of a batch by expert, and combine the weighted results.
//
//   maps     item (t, j) has expert ids[t, j]; a stable sort of the items by expert gives
//            offsets [N + 1]   where each expert's rows begin
//            row_map [T k]     row -> item t k + j; -1 past the last row
//            inverse [T, k]    item -> row; -1 for an id that names no expert
//   gather   rows[r] = x[row_map[r] / k]
//   combine  y[t] = sum over j of gates[t, j] rows[inverse[t, j]], in f32, j ascending
//
// The sort is a count and a scatter, stable without sorting: each warp owns a contiguous run of items, so the row of an item is
// offsets[e] + items of e in earlier blocks + in earlier warps + earlier in its own warp's run, and each of these is a plain sum.
// Inside a warp's run, match_any finds the lanes that share an expert and popc of the lower ones is the rank among them.
// No atomics decide an order, so the maps are the same bits in every run. All integer counts: exact.
//
// Two launches: count (per block and expert, to the workspace) and scatter (each block sums what it needs from it).
//
// Floors: gather and combine move every row once, 16 bytes a thread where all addresses and strides allow it.
#include "args.h"
#include "common/num.cuh"
#include "common/pack.cuh"

namespace {

constexpr int kThreads = LSW_PERMUTE_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ __forceinline__ int item_expert(const LswPermuteArgs& args, uint64_t item) {
    const int id = reinterpret_cast<const int32_t*>(args.ids)[item / args.k * args.ids_stride + item % args.k];
    if (id < -1 || id >= static_cast<int>(args.experts)) atomicOr(reinterpret_cast<uint32_t*>(args.status), LSW_ODD_ID);
    return known_id(id, args.experts);
}

// Counts of this block's items, per warp: counts[warp][expert]. Ends with a barrier.
__device__ void count_items(const LswPermuteArgs& args, uint32_t* counts) {
    for (uint32_t i = threadIdx.x; i < kWarps * args.experts; i += kThreads) counts[i] = 0;
    __syncthreads();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t begin = (static_cast<uint64_t>(blockIdx.x) * kWarps + warp) * args.warp_items;
    for (uint32_t i = lane; i < args.warp_items && begin + i < args.items; i += 32) {
        const int e = item_expert(args, begin + i);
        if (e >= 0) atomicAdd(&counts[warp * args.experts + e], 1);
    }
    __syncthreads();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(LSW_PERMUTE_THREADS) lsw_permute_count(const __grid_constant__ LswPermuteArgs args) {
    extern __shared__ uint32_t counts[];
    count_items(args, counts);
    uint32_t* block_counts = reinterpret_cast<uint32_t*>(args.counts) + static_cast<uint64_t>(blockIdx.x) * args.experts;
    for (uint32_t e = threadIdx.x; e < args.experts; e += kThreads) {
        uint32_t sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += counts[w * args.experts + e];
        block_counts[e] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(LSW_PERMUTE_THREADS) lsw_permute_scatter(const __grid_constant__ LswPermuteArgs args) {
    if (blockIdx.x >= args.blocks) return;
    extern __shared__ uint32_t counts[];  // [warps][experts], then totals [experts], then their prefix [experts + 1]
    uint32_t* totals = counts + kWarps * args.experts;
    uint32_t* offsets = totals + args.experts;
    count_items(args, counts);

    // Per expert: all items (totals), and counts[w] becomes the items before warp w's run.
    for (uint32_t e = threadIdx.x; e < args.experts; e += kThreads) {
        const uint32_t* column = reinterpret_cast<const uint32_t*>(args.counts) + e;
        uint32_t before = 0, total = 0;
        for (uint32_t b = 0; b < args.blocks; ++b) {
            if (b == blockIdx.x) before = total;
            total += column[static_cast<uint64_t>(b) * args.experts];
        }
        for (int w = 0; w < kWarps; ++w) {
            const uint32_t here = counts[w * args.experts + e];
            counts[w * args.experts + e] = before;
            before += here;
        }
        totals[e] = total;
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // prefix sum over the experts, 32 at a time
        uint32_t carry = 0;
        for (uint32_t first = 0; first < args.experts; first += 32) {
            const uint32_t e = first + threadIdx.x;
            uint32_t sum = e < args.experts ? totals[e] : 0;
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t below = __shfl_up_sync(kFullWarp, sum, step);
                if (threadIdx.x >= step) sum += below;
            }
            if (e < args.experts) offsets[e + 1] = carry + sum;
            carry += __shfl_sync(kFullWarp, sum, 31);
        }
        if (threadIdx.x == 0) offsets[0] = 0;
    }
    __syncthreads();
    if (blockIdx.x == 0) {
        for (uint32_t e = threadIdx.x; e <= args.experts; e += kThreads) reinterpret_cast<int32_t*>(args.offsets)[e] = static_cast<int32_t>(offsets[e]);
    }

    const uint32_t lane = threadIdx.x % 32;
    uint32_t* next = counts + threadIdx.x / 32 * args.experts;
    const uint64_t begin = (static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * args.warp_items;
    int32_t* row_map = reinterpret_cast<int32_t*>(args.row_map);
    for (uint32_t i = 0; i < args.warp_items && begin + i < args.items; i += 32) {
        const uint64_t item = begin + i + lane;
        const bool exists = i + lane < args.warp_items && item < args.items;
        const int e = exists ? item_expert(args, item) : -1;
        const uint32_t same = __match_any_sync(kFullWarp, e);
        const uint32_t rank = __popc(same & ((1u << lane) - 1));
        int32_t row = -1;
        if (e >= 0) row = static_cast<int32_t>(offsets[e] + next[e] + rank);
        __syncwarp();
        if (e >= 0 && rank == 0) next[e] += __popc(same);
        __syncwarp();
        if (row >= 0) row_map[row] = static_cast<int32_t>(item);
        if (exists) reinterpret_cast<int32_t*>(args.inverse)[item / args.k * args.inverse_stride + item % args.k] = row;
    }
    // The rows past the last one: their count is the number of dropped items, and this block clears its share.
    for (uint64_t r = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; r < args.items; r += static_cast<uint64_t>(gridDim.x) * kThreads) {
        if (r >= offsets[args.experts]) row_map[r] = -1;
    }
}

namespace {

template <class Unit> __device__ __forceinline__ void gather(const LswGatherArgs& args) {
    if (blockIdx.x >= args.count) return;
    const int32_t item = reinterpret_cast<const int32_t*>(args.row_map)[blockIdx.x];
    if (item < 0 || static_cast<uint32_t>(item) / args.k >= args.tokens) return;
    const Unit* x = reinterpret_cast<const Unit*>(args.x) + static_cast<uint64_t>(item) / args.k * args.x_stride;
    Unit* row = reinterpret_cast<Unit*>(args.rows) + static_cast<uint64_t>(blockIdx.x) * args.rows_stride;
    for (uint64_t i = threadIdx.x; i < args.units; i += LSW_MOVE_THREADS) row[i] = x[i];
}

// kWidth elements a thread: a pack, or one where something is not aligned.
template <int kWidth, class T> __device__ __forceinline__ void combine(const LswCombineArgs& args) {
    const uint64_t token = blockIdx.x;
    if (token >= args.tokens) return;
    const int32_t* inverse = reinterpret_cast<const int32_t*>(args.inverse) + token * args.inverse_stride;
    const float* gates = reinterpret_cast<const float*>(args.gates) + token * args.gates_stride;
    T* y = reinterpret_cast<T*>(args.y) + token * args.y_stride;
    for (uint64_t d = static_cast<uint64_t>(threadIdx.x) * kWidth; d < args.cols; d += LSW_MOVE_THREADS * kWidth) {
        float sum[kWidth] = {};
        for (uint32_t j = 0; j < args.k; ++j) {
            const int32_t r = inverse[j];
            if (r < 0 || static_cast<uint32_t>(r) >= args.row_count) continue;
            const T* row = reinterpret_cast<const T*>(args.rows) + static_cast<uint64_t>(r) * args.rows_stride + d;
            if constexpr (kWidth == 1) {
                sum[0] = fmaf(gates[j], to_float(row[0]), sum[0]);
            } else {
                const Pack<T> pack = load16(row);
#pragma unroll
                for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(gates[j], to_float(pack.lane[i]), sum[i]);
            }
        }
        if constexpr (kWidth == 1) {
            y[d] = from_float<T>(sum[0]);
        } else {
            Pack<T> pack;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) pack.lane[i] = from_float<T>(sum[i]);
            store16(y + d, pack);
        }
    }
}

}  // namespace

#define LSW_GATHER(bytes, Unit)                                                                                           \
    extern "C" __global__ void __launch_bounds__(LSW_MOVE_THREADS) lsw_gather_##bytes(const __grid_constant__ LswGatherArgs args) { \
        gather<Unit>(args);                                                                                               \
    }
LSW_GATHER(16, uint4)
LSW_GATHER(4, uint32_t)
LSW_GATHER(2, uint16_t)
LSW_GATHER(1, uint8_t)

#define LSW_COMBINE(suffix, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(LSW_MOVE_THREADS) lsw_combine_##suffix(const __grid_constant__ LswCombineArgs args) { \
        if (args.aligned) return combine<kPack<T>, T>(args);                                                                \
        combine<1, T>(args);                                                                                                \
    }
LSW_COMBINE(f32, float)
LSW_COMBINE(f16, __half)
LSW_COMBINE(bf16, __nv_bfloat16)
