// Unmerged adapters of f32: every row of a batch under its own route, the weights left as they are.
//
//   shrink  products[r, p, i] = A_p[i] . x[r]                     for entry p of row r's canonical route, i below the rank of its slot
//   expand  y[r, o] = round(y[r, o] + sum over p of c_p (B_p[o] . products[r, p]))        c = gate * scale
//
// for all targets of a group that share x (q, k, v; gate, up) in one launch each. Row by row, in plain f32: tensor cores would round x,
// A and B. Of 16 bits: apply.cu and, for more than 64 rows, apply_mma.cu.
//
// Floor of one token: the chosen adapters, read once. So latency is all that counts: launches, and loads that wait for loads (ids ->
// factor -> A -> sum -> products -> y). Hence:
//
// - A row of A is a block's: every thread has its packs in flight at once, and one exchange through shared memory ends it. With
//   many rows a block takes four rows of A, so that x is read a quarter as often; each row's sum has the same order either way.
// - expand is a dependent launch. shrink lets it start as soon as shrink itself has passed its own wait: from then on all that came
//   before shrink is complete, and shrink writes the products alone. So expand reads route, factors and B (into registers) while
//   shrink runs, and waits before the first product and y only.
// - A warp of expand owns 32 rows of B. It reads them in passes of consecutive eights, as many lanes a row as its rank has eights:
//   loads are dense whatever the rank is, and four are in flight whatever the order of entries. With many rows a block goes on to
//   further outputs, so that the chain up to the first B is paid for once.
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
    const float gate = gate_at(args, item, lane);
    if (reports) report_id(args, given);
    return canonical_entry(known_id(given, args.slots), gate, args.k);
}

// A thread's part of the dot products of x with some rows of A: its columns in ascending order. kWhole: all are whole aligned packs.
template <bool kWhole, int kRows>
__device__ __forceinline__ void multiply_rows(const float* x, const float* a, uint32_t in, uint64_t a_stride, uint32_t rows, float (&sum)[kRows]) {
    constexpr uint32_t kStep = 8 * LSW_SHRINK_THREADS;
    constexpr int kAhead = kWhole ? 2 : 1;
    for (uint32_t col0 = 8 * threadIdx.x; col0 < in; col0 += kAhead * kStep) {
        Eight<float> x_eight[kAhead], a_eight[kAhead][kRows];
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            const uint32_t col = col0 + s * kStep, left = col < in ? in - col : 0;
            x_eight[s] = kWhole ? load_eight_if(left > 0, x + col) : load_eight(x + col, left, false);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float* row = a + r * a_stride + col;
                a_eight[s][r] = kWhole ? load_eight_if(left > 0 && r < rows, row) : load_eight(row, r < rows ? left : 0, false);
            }
        }
#pragma unroll
        for (int i = 0; i < 8 * kAhead; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r] = fmaf(a_eight[i / 8][r].at(i % 8), x_eight[i / 8].at(i % 8), sum[r]);
        }
    }
}

// A block: kRows rows of A of one entry of one row's route. All threads share each dot product.
template <int kRows> __device__ __forceinline__ void shrink(const LswApplyArgs& args) {
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

    const float* x = reinterpret_cast<const float*>(args.x) + row * args.x_stride;
    const float* a = reinterpret_cast<const float*>(f.a) + static_cast<uint64_t>(first) * f.a_stride;
    float sum[kRows] = {};
    if (args.x_aligned && (f.flags & LSW_A_ALIGNED) && args.in % 8 == 0) multiply_rows<true>(x, a, args.in, f.a_stride, f.rank - first, sum);
    else multiply_rows<false>(x, a, args.in, f.a_stride, f.rank - first, sum);

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
    bool is_whole;  // whole aligned packs of eight
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
        if (c != 0.0f && f.rank > 0) term = {f.b, f.b_stride, f.rank, c, (f.flags & LSW_B_ALIGNED) && f.rank % 8 == 0};
        terms[entry.position] = term;
    }
    count = __popc(__ballot_sync(kFullWarp, entry.slot >= 0));
    return __reduce_max_sync(kFullWarp, term.rank);
}

// A block: LSW_EXPAND_THREADS x chunks elements of one row of one target's y. Lane l of a warp owns the l-th of 32 at a time.
__device__ __forceinline__ void expand(const LswApplyArgs& args) {
    constexpr uint32_t kAhead = 4;  // eights in flight a lane
    __shared__ Term terms[LSW_MAX_K];
    __shared__ uint32_t shared_count, shared_rank;
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t row = blockIdx.x / args.units;
    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::out, args.chunks * LSW_EXPAND_THREADS);
    const int64_t item = item_of(args, row);
    if (threadIdx.x < 32) {
        uint32_t count = 0, rank = 0;
        if (item >= 0) rank = load_terms(args, target, item, unit, terms, count);
        if (threadIdx.x == 0) shared_count = count, shared_rank = rank;
    }
    __syncthreads();
    if (shared_rank == 0) return dependency_wait();

    // A pass of a warp over a term takes 32 >> shift rows of B, 1 << shift lanes each.
    const uint32_t shift = 32 - __clz((shared_rank - 1) / 8);
    static_assert(LSW_MAX_RANK <= 8 * 32, "a row of B is at most one eight a lane");
    const uint32_t steps = shared_count << shift, lane = threadIdx.x % 32;
    const uint32_t part = 8 * (lane & ((1u << shift) - 1));
    for (uint32_t chunk = 0; chunk < args.chunks; ++chunk) {
        const uint32_t first = (unit * args.chunks + chunk) * LSW_EXPAND_THREADS + threadIdx.x / 32 * 32;
        if (chunk > 0 && first >= target.out) break;
        const uint64_t at = row * target.y_stride + first + lane;
        float sum = 0.0f, y = 0.0f;
        for (uint32_t step0 = 0; step0 < steps; step0 += kAhead) {
            Eight<float> b[kAhead];
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) {
                const uint32_t step = step0 + i, pass = step & ((1u << shift) - 1);
                const uint32_t o = first + (pass << (5 - shift)) + (lane >> shift);
                if (step >= steps) break;
                const Term& term = terms[step >> shift];
                const float* p = reinterpret_cast<const float*>(term.b) + o * static_cast<uint64_t>(term.b_stride) + part;
                const uint32_t left = o < target.out && term.rank > part ? term.rank - part : 0;
                b[i] = term.is_whole ? load_eight_if(left > 0, p) : load_eight(p, left, false);
            }
            if (step0 == 0) {
                // Of what came before, nothing but the products and y is still being written.
                if (chunk == 0) dependency_wait();
                if (first + lane < target.out) y = load_y(args, target, at);
            }
            Eight<float> product[kAhead];
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) {
                const uint32_t position = (step0 + i) >> shift;
                if (step0 + i >= steps) break;
                // The workspace goes on to the next multiple of eight ranks, with anything.
                product[i] = load_eight_if(terms[position].rank > part, products(args, row, position) + target.column + part);
            }
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) {
                const uint32_t step = step0 + i, pass = step & ((1u << shift) - 1);
                if (step >= steps) break;
                const Term& term = terms[step >> shift];
                float dot = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    if (part + j < term.rank) dot = fmaf(b[i].at(j), product[i].at(j), dot);
                }
                for (uint32_t other = 1u << shift >> 1; other > 0; other /= 2) dot += __shfl_xor_sync(kFullWarp, dot, other);
                // From the lanes of the pass's rows to the lanes that own them.
                const float mine = __shfl_sync(kFullWarp, dot, lane << shift & 31);
                if (lane >> (5 - shift) == pass && term.rank > 0) sum = fmaf(term.c, mine, sum);
            }
        }
        if (first + lane < target.out) store_y(args, target, at, y + sum);
    }
}

}  // namespace

// Without rows there may be no units to divide by. Two blocks a multiprocessor are enough: without the hint ptxas spills for more.
extern "C" __global__ void __launch_bounds__(LSW_SHRINK_THREADS, 2) lsw_apply_shrink_f32(const __grid_constant__ LswApplyArgs args) {
    if (args.rows == 0) return;
    if (args.shrink_rows == 1) return shrink<1>(args);
    shrink<LSW_SHRINK_ROWS>(args);
}
extern "C" __global__ void __launch_bounds__(LSW_EXPAND_THREADS) lsw_apply_expand_f32(const __grid_constant__ LswApplyArgs args) {
    if (args.rows > 0) expand(args);
}
