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
//   2. plan             which targets differ from what they hold: a prefix sum over their tiles, as many targets at a time as threads
//   3. switch_tiles     64 x 128 of W at a time
//   4. record           the last block to finish writes down what is merged now and resets the queue
// Nobody waits for another block: step 4 belongs to whichever block comes last, and by then all have read the old record.
//
// A tile's sum is a sequence of slices: 16 of a term's rank, what one mma takes. Two slices of A and B, a panel, are in shared memory
// while the next two, of this tile or the next one, are on their way; one barrier a panel. W needs no barrier and no fragment layout: a
// thread copies to shared memory just the 16-byte packs whose sums it will have, as soon as it has stored those of the tile before, so
// that W is on its way while the panels come and the product runs. To have whole packs, a thread needs neighbouring columns, of which
// an mma gives it two: so column n of block j is not column 8 j + n of the tile but one that lies among its neighbours' (see Sum), which
// costs nothing but the order in which A is read.
//
// Exactness: A and B enter the tensor cores as stored. Each slice has its own accumulators, which join the sum by one fma with the f32
// coefficient; nothing is folded into a 16-bit operand. Additions: 15 a slice, one a slice to the sum, one to W; the bound is
// 2 (rank + 2) u a term at most, u = 2^-24, a tensor core's additions counting twice. Ranks are real: a sum stops at the rank rounded up
// to 16, and what lies beyond the rank is zeros that the loader put there, never memory.
//
// f32 has no tensor core that keeps 24 bits. An element is the sum of three bf16, x = h + m + l, exactly (as long as l does not
// underflow: 2^-133): h is x rounded, m the rest rounded, and what then remains has at most 6 bits. Of the nine products six are added
// up, the smallest first; m l, l m and l l are left out: at most 2 * 2^-8 * 2^-17 = u of the product. (Henry, Tang, Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019.) An infinity has no such
// parts: in A or B it makes NaN. Plain fma is exact in the products, but at K = 64 it needs every issue slot for as long as memory needs
// for W; two parts of TF32 cost as much as this and leave out 2^-21.
//
// Floor: W is read and written once, 4 bytes an element in 16 bits. Per tile the panels add (64 + 128) * sum(ranks) elements from L2.
// What limits is the way of a tile through a block, which nothing fills while it waits: without panels and product the loop runs at the
// floor (see NOTES.md).
//
// Targets and adapters whose addresses or rows are not multiples of 16 bytes, and the ragged rim of every matrix, take the same road
// with loads and stores element by element (load_chunk, store_chunk), in the same launch.
#include "args.h"
#include "common/num.cuh"
#include "common/pack.cuh"
#include "common/ptx.cuh"
#include "common/switch_plan.cuh"

namespace {

constexpr int kThreads = LSW_SWITCH_THREADS;
constexpr int kRows = LSW_SWITCH_TILE_ROWS;
constexpr int kCols = LSW_SWITCH_TILE_COLS;
constexpr int kWarpRows = 32, kWarpCols = 64;  // of a tile, a warp's
constexpr int kSlice = 16;                     // of a rank: what one mma takes
constexpr int kDepth = 2 * kSlice;             // of a panel
constexpr uint32_t kTermSlices = LSW_MAX_RANK / kSlice;  // slices are numbered as if each term had so many
// Of a tile, a thread has four rows, 8 apart, and in each of them, in both halves of its warp's columns, eight columns: one pack of 16
// bytes or two, 16 columns apart.
template <class T> constexpr int kHalfPacks = 8 / kPack<T>;
template <class T> constexpr int kOwnPacks = 4 * 2 * kHalfPacks<T>;
static_assert(kThreads == kRows / kWarpRows * (kCols / kWarpCols) * 32, "the warps cover the tile");

struct Term {
    const void* a;
    const void* b;
    uint32_t a_stride, b_stride, rank, flags;
    float coefficient;
};

// A target that changes and its sum.
struct Job {
    LswTarget target;
    uint32_t tiles_per_row;
    bool is_plain;   // all of it is at multiples of 16 bytes, and so are the ranks
    uint32_t begin;  // its first tile, counted over all changed targets
    uint32_t term_count;
    Term terms[2 * LSW_MAX_K];
};

// Panels. Rows are padded so that what a warp reads at once falls into different banks.
template <class T> struct Panels {
    T a[kDepth][kCols + kPack<T>];
    T b[kRows][kDepth + 8];
};

template <class T> struct Shared {
    uint4 weight[kOwnPacks<T>][kThreads];  // each thread's own
    Panels<T> panels[2];
    Job jobs[2];
    Route route;
    uint32_t prefix[kThreads + 1];  // tiles of all changed targets before this one
    uint32_t first;                 // of the targets that are planned
    uint32_t warp_total[kThreads / 32];
    uint32_t next_tile[2];
    uint32_t is_last;
    uint32_t any_changed;
};

// Exclusive prefix sum of the tiles of the changed targets among kThreads, from `first` on; `before`: of those before them.
template <class T> __device__ void plan(const LswSwitchArgs& args, Shared<T>& s, uint32_t first, uint32_t before) {
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
    sum += before;
    for (uint32_t w = 0; w < warp; ++w) sum += s.warp_total[w];
    s.prefix[threadIdx.x + 1] = sum;
    if (threadIdx.x == 0) s.prefix[0] = before, s.first = first;
    __syncthreads();
}

__device__ __forceinline__ Term make_term(const LswFactor& f, float coefficient) {
    return {reinterpret_cast<const void*>(f.a), reinterpret_cast<const void*>(f.b), f.a_stride, f.b_stride, f.rank, f.flags, coefficient};
}

// One warp. The tables' next entries come to L2 meanwhile, which W has swept clean.
template <class T> __device__ void build(const LswSwitchArgs& args, const Route& route, uint32_t target, uint32_t begin, Job& job) {
    const LaneTerms t = lane_terms(args, route, target);
    bool is_plain = target_of(args, target).flags & LSW_WEIGHT_ALIGNED;
    const auto put = [&](int slot, uint32_t at, float coefficient) {
        if (slot < 0) return;
        const Term term = make_term(factor(args, target, slot), coefficient);
        is_plain = is_plain && term.flags == (LSW_A_ALIGNED | LSW_B_ALIGNED) && term.rank % kPack<T> == 0;
        job.terms[at] = term;
    };
    put(t.enter_slot, t.enter_at, t.enter);
    put(t.leave_slot, t.leave_at, t.leave);
    is_plain = __all_sync(kFullWarp, is_plain);
    if (target + 1 < args.last) {
        if (t.enter_slot >= 0) prefetch(&factor(args, target + 1, t.enter_slot));
        if (threadIdx.x == 0) prefetch(&target_of(args, target + 1));
    }
    if (threadIdx.x == 0) {
        job.target = target_of(args, target);
        job.tiles_per_row = (job.target.cols + kCols - 1) / kCols;
        job.is_plain = is_plain, job.begin = begin, job.term_count = t.count;
    }
}

// What is done between two barriers: a panel of a tile's sum.
struct Step {
    uint32_t job;  // which of the two
    uint32_t row, col;
    uint32_t slice;  // the first one of its panels
    bool is_plain;
};

// Steps to the beginning of a tile, whose target is that of the step or one behind it. False: there is no such tile.
template <class T> __device__ bool find(const LswSwitchArgs& args, Shared<T>& s, uint32_t tile, Step& step) {
    if (tile - s.jobs[step.job].begin >= s.jobs[step.job].target.tiles) {
        while (tile >= s.prefix[kThreads]) {
            const uint32_t first = s.first + kThreads;
            if (first >= args.last) return false;
            plan(args, s, first, s.prefix[kThreads]);
        }
        uint32_t i = 0;  // the last target whose tiles begin at or before this one
        for (uint32_t half = kThreads / 2; half > 0; half /= 2) {
            if (s.prefix[i + half] <= tile) i += half;
        }
        step.job ^= 1;
        if (threadIdx.x < 32) build<T>(args, s.route, s.first + i, s.prefix[i], s.jobs[step.job]);
        __syncthreads();
    }
    const Job& job = s.jobs[step.job];
    const uint32_t index = tile - job.begin, per_row = job.tiles_per_row;
    const uint32_t row = index / per_row * kRows, col = index % per_row * kCols;
    const bool is_whole = row + kRows <= job.target.rows && col + kCols <= job.target.cols;
    step = {step.job, row, col, 0, job.is_plain && is_whole};
    return true;
}

// Behind the last slice; the slice after one.
__device__ __forceinline__ uint32_t slice_end(const Job& job) { return job.term_count * kTermSlices; }
__device__ __forceinline__ uint32_t next_slice(const Job& job, uint32_t slice) {
    const uint32_t term = slice / kTermSlices, next = slice % kTermSlices + 1;
    return next * kSlice < job.terms[term].rank ? slice + 1 : (term + 1) * kTermSlices;
}

// One pack from global to shared memory, of which `valid` elements exist; the rest becomes zero. In a plain tile all or none do.
template <bool kPlain, class T> __device__ __forceinline__ void load_chunk(void* shared, const T* global, int valid, bool aligned) {
    if (kPlain ? valid > 0 : aligned && valid >= kPack<T>) return copy16_async(shared, global);
    Pack<T> pack;
    if (!kPlain) {
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
            if (i < valid) pack.lane[i] = global[i];
        }
    }
    store16(static_cast<T*>(shared), pack);
}

template <class T> __device__ __forceinline__ void store_chunk(T* global, const T* shared, int valid, bool aligned) {
    if (aligned && valid >= kPack<T>) return store16(global, load16(shared));
    for (int i = 0; i < kPack<T>; ++i) {
        if (i < valid) global[i] = shared[i];
    }
}

// A thread's place in its warp, and the warp's in a tile.
struct Own {
    int group, in_group, row, col;
    __device__ Own() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        group = lane / 4, in_group = lane % 4;
        row = warp / (kCols / kWarpCols) * kWarpRows, col = warp % (kCols / kWarpCols) * kWarpCols;
    }
};

// Where in a tile a thread's packs begin.
template <class T> __device__ __forceinline__ int row_of(const Own& own, int pack) {
    return own.row + own.group + pack / (2 * kHalfPacks<T>) * 8;
}
template <class T> __device__ __forceinline__ int col_of(const Own& own, int pack) {
    return own.col + own.in_group * kPack<T> + pack / kHalfPacks<T> % 2 * (kWarpCols / 2) + pack % kHalfPacks<T> * 16;
}

// Of rows x cols, how many elements there are from a place on, in its row.
__device__ __forceinline__ int valid_at(uint32_t rows, uint32_t cols, uint32_t row, uint32_t col) {
    return row < rows ? static_cast<int>(cols - col) : 0;
}

template <bool kPlain, class T>
__device__ __forceinline__ void load_weight(Shared<T>& s, const LswTarget& target, const Step& step) {
    const Own own;
    const uint32_t rows = target.rows - step.row, cols = target.cols - step.col;
    const uint64_t stride = target.base_stride;
    const bool aligned = target.flags & LSW_WEIGHT_ALIGNED;
    const T* base = reinterpret_cast<const T*>(target.base) + step.row * stride + step.col;
#pragma unroll(kPlain ? kOwnPacks<T> : 1)
    for (int pack = 0; pack < kOwnPacks<T>; ++pack) {
        const int m = row_of<T>(own, pack), n = col_of<T>(own, pack);
        const int valid = kPlain ? kPack<T> : valid_at(rows, cols, m, n);
        load_chunk<kPlain>(&s.weight[pack][threadIdx.x], base + m * stride + n, valid, aligned);
    }
}

// Calls f(i) for i < kCount, dealt out to the threads.
template <int kCount, bool kUnrolled, class F> __device__ __forceinline__ void deal(F f) {
#pragma unroll(kUnrolled ? kCount : 1)
    for (int n = 0; n < kCount; n += kThreads) {
        const int i = n + threadIdx.x;
        if (n + kThreads <= kCount || i < kCount) f(i);
    }
}

template <bool kPlain, class T> __device__ void load_panels(Panels<T>& panels, const Job& job, const Step& step) {
    const int rows = job.target.rows - step.row, cols = job.target.cols - step.col;
    const uint32_t end = slice_end(job);
    uint32_t slice = step.slice;
#pragma unroll 1
    for (int depth = 0; depth < kDepth && slice < end; depth += kSlice) {
        const Term t = job.terms[slice / kTermSlices];
        const uint32_t k = slice % kTermSlices * kSlice;
        const int rank = t.rank - k;
        constexpr int kChunksA = kCols / kPack<T>, kChunksB = kSlice / kPack<T>;
        const T* a = static_cast<const T*>(t.a) + static_cast<uint64_t>(k) * t.a_stride + step.col;
        deal<kSlice * kChunksA, kPlain>([&](int i) {
            const int kk = i / kChunksA, n = i % kChunksA * kPack<T>;
            const int valid = kPlain ? rank - kk : kk < rank ? cols - n : 0;
            load_chunk<kPlain>(&panels.a[depth + kk][n], a + static_cast<uint64_t>(kk) * t.a_stride + n, valid, t.flags & LSW_A_ALIGNED);
        });
        const T* b = static_cast<const T*>(t.b) + static_cast<uint64_t>(step.row) * t.b_stride + k;
        deal<kRows * kChunksB, kPlain>([&](int i) {
            const int m = i / kChunksB, kk = i % kChunksB * kPack<T>;
            const int valid = kPlain || m < rows ? rank - kk : 0;
            load_chunk<kPlain>(&panels.b[m][depth + kk], b + static_cast<uint64_t>(m) * t.b_stride + kk, valid, t.flags & LSW_B_ALIGNED);
        });
        slice = next_slice(job, slice);
    }
}

// A warp's 32 x 64 of the sum: accumulators of mmas, by blocks of 16 rows and of 8 columns. Of a block, lane 4 g + t has columns 2 t and
// 2 t + 1. Blocks whose columns take turns make these neighbours: with kBlocks of them, column n of the j-th is kBlocks n + j, so that
// the lane's own are kPack in a row, from kPack t on.
using Sum = float[2][8][4];
template <class T> constexpr int kBlocks = kPack<T> / 2;

// Adds four mmas of a row block.
__device__ __forceinline__ void add_product(float (*sum)[4], const float (&product)[4][4], float coefficient) {
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = fmaf(coefficient, product[i / 4][i % 4], sum[i / 4][i % 4]);
}

// One slice: sum += coefficient * b a.
template <class T> __device__ __forceinline__ void multiply(Sum& sum, float coefficient, const Panels<T>& s, int k) {
    const Own own;
    const int lane = threadIdx.x % 32;
    uint32_t b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) ldmatrix4(b[i], &s.b[own.row + 16 * i + lane % 16][k + lane / 16 * 8]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint32_t a[4][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const T* p = &s.a[k + 8 * half + 2 * own.in_group][own.col + kWarpCols / 2 * h + 4 * own.group];
            const uint2 even = *reinterpret_cast<const uint2*>(p), odd = *reinterpret_cast<const uint2*>(p + kCols + kPack<T>);
            a[0][half] = __byte_perm(even.x, odd.x, 0x5410), a[1][half] = __byte_perm(even.x, odd.x, 0x7632);
            a[2][half] = __byte_perm(even.y, odd.y, 0x5410), a[3][half] = __byte_perm(even.y, odd.y, 0x7632);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float product[4][4] = {};
#pragma unroll
            for (int j = 0; j < 4; ++j) mma16816(product[j], b[i], a[j][0], a[j][1], T{});
            add_product(&sum[i][4 * h], product, coefficient);
        }
    }
}

// f32: products of parts, six for one.
struct Parts {
    uint32_t of[3];
};
__device__ __forceinline__ Parts split(float x, float y) {
    Parts parts;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
        parts.of[p] = pack({x, y}, __nv_bfloat16{});
        const float2 rounded = unpack(parts.of[p], __nv_bfloat16{});
        x -= rounded.x, y -= rounded.y;
    }
    return parts;
}

template <> __device__ __forceinline__ void multiply(Sum& sum, float coefficient, const Panels<float>& s, int k) {
    const Own own;
    Parts b[2][4];
#pragma unroll
    for (int q = 0; q < 8; ++q) {
        const int m = own.row + 16 * (q / 4) + 8 * (q % 2) + own.group, kk = k + 8 * (q / 2 % 2) + 2 * own.in_group;
        const float2 pair = *reinterpret_cast<const float2*>(&s.b[m][kk]);
        b[q / 4][q % 4] = split(pair.x, pair.y);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Parts a[4][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const float* p = &s.a[k + 8 * half + 2 * own.in_group][own.col + kWarpCols / 2 * h + 8 * j + 2 * own.group];
                const float2 even = *reinterpret_cast<const float2*>(p);
                const float2 odd = *reinterpret_cast<const float2*>(p + kCols + kPack<float>);
                a[j][half] = split(even.x, odd.x), a[j + 1][half] = split(even.y, odd.y);
            }
        }
        constexpr int kOrder[6][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float product[4][4] = {};
#pragma unroll
            for (int o = 0; o < 6; ++o) {
                const int p = kOrder[o][0], q = kOrder[o][1];
                const uint32_t part[4] = {b[i][0].of[p], b[i][1].of[p], b[i][2].of[p], b[i][3].of[p]};
#pragma unroll
                for (int j = 0; j < 4; ++j) mma16816(product[j], part, a[j][0].of[q], a[j][1].of[q], __nv_bfloat16{});
            }
            add_product(&sum[i][4 * h], product, coefficient);
        }
    }
}

__device__ __forceinline__ void add(Pack<float>& w, const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w.lane[i] += x[i];
}
template <class T> __device__ __forceinline__ void add(Pack<T>& w, const float (&x)[8]) {
    uint32_t words[4] = {w.bits.x, w.bits.y, w.bits.z, w.bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 old = unpack(words[i], T{});
        words[i] = pack({old.x + x[2 * i], old.y + x[2 * i + 1]}, T{});
    }
    w.bits = {words[0], words[1], words[2], words[3]};
}

// An empty sum copies bits.
template <bool kPlain, class T>
__device__ __forceinline__ void store_weight(Shared<T>& s, const Job& job, const Step& step, const Sum& sum) {
    const Own own;
    const uint32_t rows = job.target.rows - step.row, cols = job.target.cols - step.col;
    const uint64_t stride = job.target.weight_stride;
    const bool aligned = job.target.flags & LSW_WEIGHT_ALIGNED, is_sum = job.term_count > 0;
    T* weight = reinterpret_cast<T*>(job.target.weight) + step.row * stride + step.col;
#pragma unroll
    for (int pack = 0; pack < kOwnPacks<T>; ++pack) {
        Pack<T> w;
        w.bits = s.weight[pack][threadIdx.x];
        const int i = pack / (2 * kHalfPacks<T>), j = pack % (2 * kHalfPacks<T>) * kBlocks<T>;
        float x[kPack<T>];
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) x[e] = sum[i / 2][j + e % kBlocks<T>][i % 2 * 2 + e / kBlocks<T>];
        if (is_sum) add(w, x);
        if (kPlain) {
            store16(weight + row_of<T>(own, pack) * stride + col_of<T>(own, pack), w);
        } else {
            s.weight[pack][threadIdx.x] = w.bits;
        }
    }
#pragma unroll 1
    for (int pack = kPlain ? kOwnPacks<T> : 0; pack < kOwnPacks<T>; ++pack) {
        const int m = row_of<T>(own, pack), n = col_of<T>(own, pack);
        const T* from = reinterpret_cast<const T*>(&s.weight[pack][threadIdx.x]);
        store_chunk(weight + m * stride + n, from, valid_at(rows, cols, m, n), aligned);
    }
}

template <class T> __device__ void load_weight(Shared<T>& s, const Step& step) {
    const LswTarget& target = s.jobs[step.job].target;
    step.is_plain ? load_weight<true>(s, target, step) : load_weight<false>(s, target, step);
}
template <class T> __device__ void load_panels(Shared<T>& s, int stage, const Step& step) {
    const Job& job = s.jobs[step.job];
    step.is_plain ? load_panels<true>(s.panels[stage], job, step) : load_panels<false>(s.panels[stage], job, step);
}
template <class T> __device__ void store_weight(Shared<T>& s, const Step& step, const Sum& sum) {
    const Job& job = s.jobs[step.job];
    step.is_plain ? store_weight<true>(s, job, step, sum) : store_weight<false>(s, job, step, sum);
}

template <class T> __device__ void switch_tiles(const LswSwitchArgs& args, Shared<T>& s) {
    plan(args, s, args.first, 0);
    uint32_t taken = 0;
    Step next{};
    bool has_next = find(args, s, blockIdx.x, next);
    if (has_next) {
        if (threadIdx.x == 0) taken = gridDim.x + atomicAdd(&state(args)->next_tile, 1);
        load_panels(s, 0, next);
        copy_commit();
        load_weight(s, next);
        copy_commit();
    }
    Sum sum = {};
    for (int stage = 0; has_next; stage ^= 1) {
        Step now = next;
        if (threadIdx.x == 0) s.next_tile[stage] = taken;
        copy_wait<1>();  // all but W
        __syncthreads();

        const Job& job = s.jobs[now.job];
        const uint32_t end = slice_end(job);
        for (int i = 0; i < kDepth / kSlice && next.slice < end; ++i) next.slice = next_slice(job, next.slice);
        const bool is_last = next.slice >= end;
        if (is_last) {
            has_next = find(args, s, s.next_tile[stage], next);
            if (has_next && threadIdx.x == 0) taken = gridDim.x + atomicAdd(&state(args)->next_tile, 1);
        }
        if (has_next) load_panels(s, stage ^ 1, next);
        copy_commit();

#pragma unroll 1
        for (int depth = 0; depth < kDepth && now.slice < end; depth += kSlice) {
            multiply(sum, job.terms[now.slice / kTermSlices].coefficient, s.panels[stage], depth);
            now.slice = next_slice(job, now.slice);
        }
        if (is_last) {
            copy_wait<1>();  // all but the next panels
            store_weight(s, now, sum);
#pragma unroll
            for (int i = 0; i < 64; ++i) (&sum[0][0][0])[i] = 0.0f;
            if (has_next) load_weight(s, next);
        }
        copy_commit();
    }
}

template <class T> __device__ void switch_all(const LswSwitchArgs& args) {
    if (args.first >= args.last) return;
    extern __shared__ __align__(16) unsigned char raw[];
    Shared<T>& s = *reinterpret_cast<Shared<T>*>(raw);
    if (threadIdx.x < 32) canonical_route(args, s.route);
    if (threadIdx.x == 0) s.any_changed = 0, s.jobs[0].begin = 0, s.jobs[0].target.tiles = 0;  // no target yet
    __syncthreads();
    switch_tiles(args, s);
    __syncthreads();

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

#define LSW_SWITCH(suffix, T, blocks)                                                                                    \
    extern "C" __global__ void __launch_bounds__(LSW_SWITCH_THREADS, blocks)                                          \
        lsw_switch_##suffix(const __grid_constant__ LswSwitchArgs args) {                                        \
        static_assert(sizeof(Shared<T>) <= (sizeof(T) == 2 ? LSW_SWITCH_SHARED_16BIT : LSW_SWITCH_SHARED_32BIT), \
                      "the host asks for this much shared memory");                                              \
        switch_all<T>(args);                                                                                     \
    }
LSW_SWITCH(f32, float, 2)
LSW_SWITCH(f16, __half, 3)
LSW_SWITCH(bf16, __nv_bfloat16, 3)

extern "C" __global__ void __launch_bounds__(LSW_MAX_K) lsw_switch_current(const __grid_constant__ LswCurrentArgs args) {
    if (threadIdx.x >= args.k_max) return;
    const uint32_t count = reinterpret_cast<const uint32_t*>(args.merged_count)[args.target];
    const bool holds = count != LSW_UNKNOWN && threadIdx.x < count;
    const LswMerged entry = reinterpret_cast<const LswMerged*>(args.merged)[static_cast<uint64_t>(args.target) * args.k_max + threadIdx.x];
    reinterpret_cast<int32_t*>(args.ids)[threadIdx.x] = holds ? entry.slot : -1;
    reinterpret_cast<float*>(args.coefficients)[threadIdx.x] = holds ? entry.coefficient : 0.0f;
}
