// Unmerged adapters: every row of a batch under its own route, the weights left as they are.
//
//   shrink  products[r, p, i] = A_p[i] . x[r]                     for entry p of row r's canonical route, i below the rank of its slot
//   expand  y[r, o] = round(y[r, o] + sum over p of c_p (B_p[o] . products[r, p]))        c = gate * scale
//
// for all targets of a group that share x (q, k, v; gate, up) in one launch each. The products stay in f32: y is rounded once.
//
// This file: f32, which tensor cores would round. apply_mma.cu does 16 bits, where speed matters.
//
// - A row of A is a block's: every thread has its packs in flight at once, and one exchange through shared memory ends it. With
//   many rows a block takes four rows of A, so that x is read a quarter as often; each row's sum has the same order either way.
// - A warp of expand owns 32 rows of B. It reads them in passes of consecutive 16-byte packs, as many lanes a row as its rank has
//   eights: loads are dense whatever the rank is, and a few are in flight whatever the order of entries.
// - expand is a dependent launch: see apply_mma.cu.
//
// Adapters are read again for each row. That is right for a few; a large batch in f32 is slow.
//
// The order of all sums depends on the shape and on the row's own route only: no atomics, the same bits in every run and in any batch.
// Where addresses are not multiples of 16 bytes the same packs are gathered element by element: the same bits again. What lies
// behind a row's end or rank is not read, or read and not used.
#include "common/apply.cuh"
#include "common/ptx.cuh"
#include "common/route.cuh"

namespace {

// One warp: lane e's entry of an item's canonical route.
__device__ __forceinline__ RouteEntry load_entry(const LswApplyArgs& args, uint64_t item, bool reports) {
    const uint32_t lane = threadIdx.x % 32;
    const int given = id_at(args, item, lane);
    if (reports) report_id(args, given);
    return canonical_entry(known_id(given, args.slots), gate_at(args, item, lane), args.k);
}

// A block: kRows rows of A of one entry of one row's route. All threads share each dot product.
template <int kRows, class T> __device__ __forceinline__ void shrink(const LswApplyArgs& args) {
    dependency_wait();
    dependency_release();
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t position = blockIdx.x / args.units % args.k, row = blockIdx.x / args.units / args.k;
    const int64_t item = item_of(args, row);
    if (item < 0) return;
    const RouteEntry entry = load_entry(args, item, false);
    const uint32_t owner = __ballot_sync(kFullWarp, entry.slot >= 0 && entry.position == position);
    if (owner == 0) return;
    const int slot = __shfl_sync(kFullWarp, entry.slot, __ffs(owner) - 1);
    const float gate = __shfl_sync(kFullWarp, entry.gate, __ffs(owner) - 1);

    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::rank_cap, kRows);
    const LswFactor f = reinterpret_cast<const LswFactor*>(target.factors)[slot];
    const uint32_t first = unit * kRows;
    const float c = gate * f.scale;
    if (c == 0.0f || first >= f.rank) return;

    const T* x = reinterpret_cast<const T*>(args.x) + row * args.x_stride;
    const T* a = reinterpret_cast<const T*>(f.a) + static_cast<uint64_t>(first) * f.a_stride;
    const bool a_aligned = f.flags & LSW_A_ALIGNED;
    float sum[kRows] = {};
#pragma unroll 2
    for (uint32_t col = 8 * threadIdx.x; col < args.in; col += 8 * LSW_SHRINK_THREADS) {
        const uint32_t left = args.in - col;
        const Eight<T> x_eight = load_eight(x + col, left, args.x_aligned);
        Eight<T> a_eight[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            a_eight[r] = load_eight(a + r * static_cast<uint64_t>(f.a_stride) + col, first + r < f.rank ? left : 0, a_aligned);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r] = fmaf(a_eight[r].at(i), x_eight.at(i), sum[r]);
        }
    }

    constexpr int kWarps = LSW_SHRINK_THREADS / 32;
    __shared__ float warp_sums[kRows][kWarps];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        for (int lane = 16; lane > 0; lane /= 2) sum[r] += __shfl_xor_sync(kFullWarp, sum[r], lane);
        if (threadIdx.x % 32 == 0) warp_sums[r][threadIdx.x / 32] = sum[r];
    }
    __syncthreads();
    if (threadIdx.x < kRows && first + threadIdx.x < f.rank) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += warp_sums[threadIdx.x][w];
        products(args, row, position)[target.column + first + threadIdx.x] = total;
    }
}

// What expand needs of an entry of the route. Rank 0: it adds nothing.
struct Term {
    uint64_t b;
    uint32_t b_stride, rank;
    float c;
    bool b_aligned;
};

__device__ __forceinline__ float load_y(const LswApplyArgs& args, const LswApplyTarget& target, uint64_t at) {
    if (args.y_type == 0) return reinterpret_cast<const float*>(target.y)[at];
    if (args.y_type == 1) return to_float(reinterpret_cast<const __half*>(target.y)[at]);
    return to_float(reinterpret_cast<const __nv_bfloat16*>(target.y)[at]);
}

__device__ __forceinline__ void store_y(const LswApplyArgs& args, const LswApplyTarget& target, uint64_t at, float y) {
    if (args.y_type == 0) reinterpret_cast<float*>(target.y)[at] = y;
    if (args.y_type == 1) reinterpret_cast<__half*>(target.y)[at] = from_float<__half>(y);
    if (args.y_type == 2) reinterpret_cast<__nv_bfloat16*>(target.y)[at] = from_float<__nv_bfloat16>(y);
}

// Writes a row's terms at a target; the largest rank among them, 0 if nothing applies. One warp.
__device__ __forceinline__ uint32_t load_terms(const LswApplyArgs& args, const LswApplyTarget& target, int64_t item, uint32_t unit,
                                               Term* terms, uint32_t& count) {
    const RouteEntry entry = load_entry(args, item, unit == 0);
    Term term{};
    if (entry.slot >= 0) {
        const LswFactor f = reinterpret_cast<const LswFactor*>(target.factors)[entry.slot];
        const float c = entry.gate * f.scale;
        if (unit == 0) report_coefficient(args, f.rank, c);
        if (c != 0.0f && f.rank > 0) term = {f.b, f.b_stride, f.rank, c, (f.flags & LSW_B_ALIGNED) != 0};
        terms[entry.position] = term;
    }
    count = __popc(__ballot_sync(kFullWarp, entry.slot >= 0));
    return __reduce_max_sync(kFullWarp, term.rank);
}

// A block: LSW_EXPAND_THREADS elements of one row of one target's y. Lane l of a warp owns the l-th of its 32.
template <class T> __device__ __forceinline__ void expand(const LswApplyArgs& args) {
    constexpr uint32_t kAhead = 4;  // packs in flight a lane
    __shared__ Term terms[LSW_MAX_K];
    __shared__ uint32_t shared_count, shared_rank;
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t row = blockIdx.x / args.units;
    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::out, LSW_EXPAND_THREADS);
    const int64_t item = item_of(args, row);
    if (threadIdx.x < 32) {
        uint32_t count = 0, rank = 0;
        if (item >= 0) rank = load_terms(args, target, item, unit, terms, count);
        if (threadIdx.x == 0) shared_count = count, shared_rank = rank;
    }
    __syncthreads();

    // A pass of a warp over a term takes 32 >> shift rows of B, 1 << shift lanes each.
    const uint32_t shift = 32 - __clz((max(shared_rank, 1u) - 1) / 8);
    static_assert(LSW_MAX_RANK <= 8 * 32, "a row of B is at most one eight a lane");
    const uint32_t steps = shared_rank == 0 ? 0 : shared_count << shift;
    const uint32_t lane = threadIdx.x % 32, first = unit * LSW_EXPAND_THREADS + threadIdx.x / 32 * 32;
    const uint32_t part = 8 * (lane & ((1u << shift) - 1));
    const uint64_t at = row * target.y_stride + first + lane;
    float sum = 0.0f, y = 0.0f;
    for (uint32_t step0 = 0; step0 < steps; step0 += kAhead) {
        Eight<T> b[kAhead];
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t step = step0 + i, pass = step & ((1u << shift) - 1);
            const uint32_t o = first + (pass << (5 - shift)) + (lane >> shift);
            if (step >= steps || o >= target.out) continue;
            const Term& term = terms[step >> shift];
            const uint32_t left = term.rank > part ? term.rank - part : 0;
            b[i] = load_eight(reinterpret_cast<const T*>(term.b) + o * static_cast<uint64_t>(term.b_stride) + part, left, term.b_aligned);
        }
        if (step0 == 0) {
            dependency_wait();
            if (first + lane < target.out) y = load_y(args, target, at);
        }
        Eight<float> product[kAhead];
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t position = (step0 + i) >> shift;
            if (step0 + i >= steps) continue;
            const uint32_t rank = terms[position].rank;
            product[i] = load_eight(products(args, row, position) + target.column + part, rank > part ? rank - part : 0, true);
        }
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t step = step0 + i, pass = step & ((1u << shift) - 1);
            if (step >= steps) break;
            float dot = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) dot = fmaf(b[i].at(j), product[i].at(j), dot);
            for (uint32_t other = 1u << shift >> 1; other > 0; other /= 2) dot += __shfl_xor_sync(kFullWarp, dot, other);
            // From the lanes of the pass's rows to the lanes that own them.
            const float mine = __shfl_sync(kFullWarp, dot, lane << shift & 31);
            const Term& term = terms[step >> shift];
            if (lane >> (5 - shift) == pass && term.rank > 0) sum = fmaf(term.c, mine, sum);
        }
    }
    if (steps == 0) return dependency_wait();
    if (first + lane < target.out) store_y(args, target, at, y + sum);
}

}  // namespace

// Without rows there may be no units to divide by. Two blocks a multiprocessor are enough: without the hint ptxas spills for more.
#define LSW_APPLY(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_SHRINK_THREADS, 2)                                                      \
        lsw_apply_shrink_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows == 0) return;                                                                                          \
        if (args.shrink_rows == 1) return shrink<1, T>(args);                                                                \
        shrink<LSW_SHRINK_ROWS, T>(args);                                                                                    \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_EXPAND_THREADS)                                                         \
        lsw_apply_expand_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) expand<T>(args);                                                                                  \
    }
LSW_APPLY(f32, float)
