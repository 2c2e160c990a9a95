// The switch: bring every target of a set to a new route, in one launch.
//
//   from base:  W = round(W_base + sum over the new route of c_j B_j A_j)
//   in place:   W = round(W      + sum over both routes of (c_new - c_old)_j B_j A_j)
//   with c_j = gate_j * scale_j;  A [rank, in], B [out, rank];  products and sums in f32, one rounding at the end
//
// The route is read from device memory and what each target holds merged is kept there, so one captured launch serves every route.
//
// A launch, block by block (persistent blocks, a work queue over tiles):
//   1. canonical_route  ids that name no slot drop out, duplicates add up, entries sort by slot
//   2. plan             which targets differ from what they hold: a prefix sum over their tiles, 256 targets at a time
//   3. tiles            64 x 128 of W at a time: W comes to shared memory while the product runs, is changed there, and leaves
//   4. record           the last block to finish writes down what is merged now and resets the queue
// Nobody waits for another block: step 4 belongs to whichever block comes last, and by then all have read the old record.
//
// Exactness: A and B enter the tensor cores as stored. Each adapter has its own accumulator, which joins the sum by one fma with its
// f32 coefficient; nothing is folded into a 16-bit operand. Ranks are real: the inner loop stops at the rank rounded up to 16, and what
// lies beyond the rank is zeros that the loader put there, never memory.
//
// Floor: W is read and written once, 4 bytes an element in 16 bits. Per tile the panels add (64 + 128) * sum(ranks) elements from L2.
//
// Targets and adapters whose addresses or rows are not multiples of 16 bytes, and the ragged rim of every matrix, take the same road
// with loads and stores element by element (move_chunk), in the same launch.
#include "args.h"
#include "common/num.cuh"
#include "common/pack.cuh"
#include "common/ptx.cuh"
#include "common/switch_plan.cuh"

namespace {

constexpr int kThreads = LSW_SWITCH_THREADS;
constexpr int kRows = LSW_SWITCH_TILE_ROWS;
constexpr int kCols = LSW_SWITCH_TILE_COLS;
constexpr int kDepth = 32;  // of a panel: the part of the rank that is in shared memory at a time

struct Term {
    const void* a;
    const void* b;
    uint32_t a_stride, b_stride, rank, flags;
    float coefficient;
};

// What a block keeps in shared memory. Rows are padded by one pack, so that eight rows of an ldmatrix fall into different banks.
template <class T> struct Shared {
    T weight[kRows][kCols + kPack<T>];
    T a[2][kDepth][kCols + kPack<T>];
    T b[2][kRows][kDepth + kPack<T>];
    Route route;
    uint32_t prefix[kThreads + 1];  // tiles of the changed targets before this one, of the 256 that are planned
    uint32_t warp_total[kThreads / 32];
    Term terms[2 * LSW_MAX_K];
    uint32_t term_count;
    uint32_t next_tile;
    uint32_t is_last;
    uint32_t any_changed;
};

// Exclusive prefix sum of the tiles of the changed targets among 256, from `first` on.
template <class T> __device__ void plan(const LswSwitchArgs& args, Shared<T>& s, uint32_t first) {
    const uint32_t target = first + threadIdx.x;
    uint32_t tiles = 0;
    if (is_changed(args, s.route, target)) tiles = target_of(args, target).tiles, s.any_changed = 1;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = tiles;
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == 31) s.warp_total[warp] = sum;
    __syncthreads();
    for (uint32_t w = 0; w < warp; ++w) sum += s.warp_total[w];
    s.prefix[threadIdx.x + 1] = sum;
    if (threadIdx.x == 0) s.prefix[0] = 0;
    __syncthreads();
}

__device__ __forceinline__ Term make_term(const LswFactor& f, float coefficient) {
    return {reinterpret_cast<const void*>(f.a), reinterpret_cast<const void*>(f.b), f.a_stride, f.b_stride, f.rank, f.flags, coefficient};
}

// One warp.
template <class T> __device__ void build_terms(const LswSwitchArgs& args, Shared<T>& s, uint32_t target) {
    const LaneTerms t = lane_terms(args, s.route, target);
    if (t.enter_slot >= 0) s.terms[t.enter_at] = make_term(factor(args, target, t.enter_slot), t.enter);
    if (t.leave_slot >= 0) s.terms[t.leave_at] = make_term(factor(args, target, t.leave_slot), t.leave);
    if (threadIdx.x == 0) s.term_count = t.count;
}

// One pack from global to shared memory, of which `valid` elements exist; the rest becomes zero.
template <class T> __device__ __forceinline__ void load_chunk(T* shared, const T* global, int valid, bool aligned) {
    if (aligned && valid >= kPack<T>) return copy16_async(shared, global);
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
        if (i < valid) pack.lane[i] = global[i];
    }
    store16(shared, pack);
}

template <class T> __device__ __forceinline__ void store_chunk(T* global, const T* shared, int valid, bool aligned) {
    const Pack<T> pack = load16(shared);
    if (aligned && valid >= kPack<T>) return store16(global, pack);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
        if (i < valid) global[i] = pack.lane[i];
    }
}

// A place in the sum: which term, and how far into its rank.
struct Step {
    uint32_t term, k;
    __device__ bool is_last_of(const Term& t) const { return k + kDepth >= t.rank; }
    __device__ Step next(const Term& t) const { return is_last_of(t) ? Step{term + 1, 0} : Step{term, k + kDepth}; }
};
// Of this step's panels, the part that is multiplied: real ranks, rounded up to the 16 of one mma.
__device__ __forceinline__ int depth_of(const Term& t, uint32_t k) { return min(kDepth, static_cast<int>((t.rank - k + 15) / 16 * 16)); }

struct Tile {
    uint32_t row, col, rows, cols;  // of W
    __device__ int valid_rows() const { return min(kRows, static_cast<int>(rows - row)); }
    __device__ int valid_cols(int from) const { return static_cast<int>(min(static_cast<uint32_t>(kCols), cols - col)) - from; }
};

template <class T> __device__ void load_panels(Shared<T>& s, int stage, const Tile& tile, const Step& step) {
    const Term& t = s.terms[step.term];
    const int depth = depth_of(t, step.k), valid_depth = min(depth, static_cast<int>(t.rank - step.k));
    const T* a = static_cast<const T*>(t.a) + static_cast<uint64_t>(step.k) * t.a_stride + tile.col;
    constexpr int kChunksA = kCols / kPack<T>;
    for (int i = threadIdx.x; i < depth * kChunksA; i += kThreads) {
        const int k = i / kChunksA, n = i % kChunksA * kPack<T>;
        const int valid = k < valid_depth ? tile.valid_cols(n) : 0;
        load_chunk(&s.a[stage][k][n], a + static_cast<uint64_t>(k) * t.a_stride + n, valid, t.flags & LSW_A_ALIGNED);
    }
    const T* b = static_cast<const T*>(t.b) + static_cast<uint64_t>(tile.row) * t.b_stride + step.k;
    const int chunks = depth / kPack<T>;
    for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
        const int m = i / chunks, k = i % chunks * kPack<T>;
        const int valid = m < tile.valid_rows() ? valid_depth - k : 0;
        load_chunk(&s.b[stage][m][k], b + static_cast<uint64_t>(m) * t.b_stride + k, valid, t.flags & LSW_B_ALIGNED);
    }
}

// The product of a tile: `current` is the running B_j A_j of one term, `sum` what has been added up with coefficients.
// 16 bits: tensor cores. Eight warps, 2 x 4, each 32 x 32.
template <class T> struct Product {
    float current[2][4][4] = {}, sum[2][4][4] = {};

    __device__ void multiply(const Shared<T>& s, int stage, int depth) {
        const int lane = threadIdx.x % 32, m0 = threadIdx.x / 128 * 32, n0 = threadIdx.x / 32 % 4 * 32;
        for (int k = 0; k < depth; k += 16) {
            uint32_t b[2][4], a[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                ldmatrix4(b[i], &s.b[stage][m0 + 16 * i + lane % 16][k + lane / 16 * 8]);
                ldmatrix4_transposed(a[i], &s.a[stage][k + lane % 16][n0 + 16 * i + lane / 16 * 8]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) mma16816(current[i][j], b[i], a[j / 2][j % 2 * 2], a[j / 2][j % 2 * 2 + 1], T{});
            }
        }
    }

    __device__ void finish_term(float coefficient) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            float& c = (&current[0][0][0])[i];
            float& t = (&sum[0][0][0])[i];
            t = fmaf(coefficient, c, t);
            c = 0.0f;
        }
    }

    __device__ void add_to(Shared<T>& s) const {
        const int lane = threadIdx.x % 32, m0 = threadIdx.x / 128 * 32 + lane / 4, n0 = threadIdx.x / 32 % 4 * 32 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int tile_m = i / 8, half = i / 4 % 2, tile_n = i % 4;
            uint32_t& word = *reinterpret_cast<uint32_t*>(&s.weight[m0 + 16 * tile_m + 8 * half][n0 + 8 * tile_n]);
            const float2 old = unpack(word, T{});
            word = pack({old.x + sum[tile_m][tile_n][2 * half], old.y + sum[tile_m][tile_n][2 * half + 1]}, T{});
        }
    }
};

// f32: plain fma, since TF32 would round the operands. Thread (y, x) has rows 4 y + i and columns 4 x + j, 64 + 4 x + j.
template <> struct Product<float> {
    float current[4][8] = {}, sum[4][8] = {};

    __device__ void multiply(const Shared<float>& s, int stage, int depth) {
        const int x = threadIdx.x % 16, y = threadIdx.x / 16;
        for (int k = 0; k < depth; k += 4) {
            Pack<float> b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) b[i] = load16(&s.b[stage][4 * y + i][k]);
#pragma unroll
            for (int kk = 0; kk < 4; ++kk) {
                const Pack<float> a[2] = {load16(&s.a[stage][k + kk][4 * x]), load16(&s.a[stage][k + kk][64 + 4 * x])};
#pragma unroll
                for (int i = 0; i < 32; ++i) current[i / 8][i % 8] = fmaf(b[i / 8].lane[kk], a[i % 8 / 4].lane[i % 4], current[i / 8][i % 8]);
            }
        }
    }

    __device__ void finish_term(float coefficient) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            sum[i / 8][i % 8] = fmaf(coefficient, current[i / 8][i % 8], sum[i / 8][i % 8]);
            current[i / 8][i % 8] = 0.0f;
        }
    }

    __device__ void add_to(Shared<float>& s) const {
        const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
        for (int i = 0; i < 32; ++i) s.weight[4 * y + i / 8][i % 8 / 4 * 64 + 4 * x + i % 4] += sum[i / 8][i % 8];
    }
};

template <class T> __device__ void switch_tile(const LswSwitchArgs& args, Shared<T>& s, const LswTarget& target, uint32_t index) {
    const uint32_t tiles_per_row = (target.cols + kCols - 1) / kCols;
    const Tile tile{index / tiles_per_row * kRows, index % tiles_per_row * kCols, target.rows, target.cols};
    const bool aligned = target.flags & LSW_WEIGHT_ALIGNED;
    constexpr int kChunks = kCols / kPack<T>;

    const T* base = reinterpret_cast<const T*>(target.base) + tile.row * target.base_stride + tile.col;
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
        const int m = i / kChunks, n = i % kChunks * kPack<T>;
        load_chunk(&s.weight[m][n], base + m * target.base_stride + n, m < tile.valid_rows() ? tile.valid_cols(n) : 0, aligned);
    }
    copy_commit();

    if (s.term_count > 0) {
        // Two stages of panels: the next step's loads run under this step's product.
        Product<T> product;
        Step step{0, 0};
        load_panels(s, 0, tile, step);
        copy_commit();
        for (int stage = 0; step.term < s.term_count; stage ^= 1) {
            const Term& term = s.terms[step.term];
            const Step next = step.next(term);
            if (next.term < s.term_count) load_panels(s, stage ^ 1, tile, next);
            copy_commit();
            copy_wait<1>();
            __syncthreads();
            product.multiply(s, stage, depth_of(term, step.k));
            if (step.is_last_of(term)) product.finish_term(term.coefficient);
            __syncthreads();
            step = next;
        }
        product.add_to(s);
    }
    copy_wait<0>();
    __syncthreads();

    T* weight = reinterpret_cast<T*>(target.weight) + tile.row * target.weight_stride + tile.col;
    for (int i = threadIdx.x; i < tile.valid_rows() * kChunks; i += kThreads) {
        const int m = i / kChunks, n = i % kChunks * kPack<T>;
        store_chunk(weight + m * target.weight_stride + n, &s.weight[m][n], tile.valid_cols(n), aligned);
    }
}

template <class T> __device__ void switch_all(const LswSwitchArgs& args) {
    if (args.first >= args.last) return;
    extern __shared__ __align__(16) unsigned char raw[];
    Shared<T>& s = *reinterpret_cast<Shared<T>*>(raw);
    if (threadIdx.x < 32) canonical_route(args, s.route);
    if (threadIdx.x == 0) s.any_changed = 0;
    __syncthreads();

    uint32_t tile = blockIdx.x, planned = 0;  // tiles of the targets that were planned before
    for (uint32_t first = args.first; first < args.last; first += kThreads) {
        plan(args, s, first);
        const uint32_t total = s.prefix[kThreads];
        uint32_t current = ~0u;
        while (tile - planned < total) {
            if (threadIdx.x == 0) s.next_tile = gridDim.x + atomicAdd(&state(args)->next_tile, 1);
            uint32_t i = 0;  // the last target whose tiles begin at or before this one
            for (uint32_t step = kThreads / 2; step > 0; step /= 2) {
                if (s.prefix[i + step] <= tile - planned) i += step;
            }
            if (i != current) {
                if (threadIdx.x < 32) build_terms(args, s, first + i);
                current = i;
            }
            __syncthreads();
            if (s.term_count > 0 || !args.in_place) switch_tile(args, s, target_of(args, first + i), tile - planned - s.prefix[i]);
            tile = s.next_tile;
            __syncthreads();
        }
        planned += total;
        __syncthreads();
    }

    // Nothing to do: every block finds the same, so there is no queue to reset and nothing to record.
    if (!s.any_changed) return;
    if (threadIdx.x == 0) {
        __threadfence();
        s.is_last = atomicAdd(&state(args)->blocks_done, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!s.is_last) return;
    __threadfence();
    for (uint32_t target = args.first + threadIdx.x; target < args.last; target += kThreads) record(args, s.route, target);
    if (threadIdx.x == 0) state(args)->next_tile = 0, state(args)->blocks_done = 0;
}

}  // namespace

#define LSW_SWITCH(suffix, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(LSW_SWITCH_THREADS, 2)                                          \
        lsw_switch_##suffix(const __grid_constant__ LswSwitchArgs args) {                                        \
        static_assert(sizeof(Shared<T>) <= (sizeof(T) == 2 ? LSW_SWITCH_SHARED_16BIT : LSW_SWITCH_SHARED_32BIT), \
                      "the host asks for this much shared memory");                                              \
        switch_all<T>(args);                                                                                     \
    }
LSW_SWITCH(f32, float)
LSW_SWITCH(f16, __half)
LSW_SWITCH(bf16, __nv_bfloat16)

extern "C" __global__ void __launch_bounds__(LSW_MAX_K) lsw_switch_current(const __grid_constant__ LswCurrentArgs args) {
    if (threadIdx.x >= args.k_max) return;
    const uint32_t count = reinterpret_cast<const uint32_t*>(args.merged_count)[args.target];
    const bool holds = count != LSW_UNKNOWN && threadIdx.x < count;
    const LswMerged entry = reinterpret_cast<const LswMerged*>(args.merged)[static_cast<uint64_t>(args.target) * args.k_max + threadIdx.x];
    reinterpret_cast<int32_t*>(args.ids)[threadIdx.x] = holds ? entry.slot : -1;
    reinterpret_cast<float*>(args.coefficients)[threadIdx.x] = holds ? entry.coefficient : 0.0f;
}
