// The switch of a small set on Hopper: the contract of switch_sm90.cu, for the same targets, up to 32 in a launch.
//
// Floor: W is read once and written once, which for one matrix takes no longer than a few trips to memory. So it is trips that count, and
// what can be done before the work before this launch has ended is done by then.
//
// A block takes tiles of 128 x 128, its first by its number and then every gridDim-th; two blocks share a multiprocessor, so that those of
// the next launch can begin. There is no queue and no plan: a block looks at the target of its tile alone.
//   1. terms    by one warp, in one trip: the route, what is merged, and all adapters of the target (where there are up to 32 slots)
//   2. sum      panels of A and B; two warpgroups multiply 64 rows each by wgmma, and sum += coefficient * product
//   3. W        into shared memory, + sum, one rounding, and back
//   4. record   the last tile of a target to begin writes down what is merged now; by then all blocks have read the old record
// The first tile's terms and sum are worked out before the wait, from what may not be final, and W is brought to L2. After the wait what
// the terms were made of is read again: if a bit differs, they are worked out anew. What adapters hold needs no second look: they lie still
// while they are in a slot, and whoever fills a slot gives it a new generation.
//
// Copies are plain ones: by tensor map a panel took 2 us and W 3, since a map is itself a trip.
//
// Exactness and the order of sums are those of switch.cu, but that a product is of 64 of a rank.
#include "args.h"
#include "common/num.cuh"
#include "common/ptx_sm90.cuh"
#include "common/switch_plan.cuh"
#include "common/switch_tile_sm90.cuh"

namespace {

constexpr int kThreads = LSW_SMALL_THREADS;
constexpr uint32_t kAtHand = 32;  // slots whose adapters are read with the route
static_assert(kThreads == 256 && kTile == 128, "two warpgroups of 64 rows each");

struct alignas(16) Term {
    uint64_t a, b;
    uint32_t a_stride, b_stride, rank, flags;
    float coefficient;
    uint32_t begin;  // its first product

    __device__ __forceinline__ int depth() const { return panel_depth(rank); }
    __device__ __forceinline__ uint32_t products() const { return (rank + 63) / 64; }
};

__device__ __forceinline__ LswFactor load_factor(const LswFactor* f) {
    LswFactor copy;
    const uint2* from = reinterpret_cast<const uint2*>(f);
    uint2* to = reinterpret_cast<uint2*>(&copy);
    static_assert(sizeof(LswFactor) % 8 == 0, "whole words");
#pragma unroll
    for (uint32_t i = 0; i < sizeof(LswFactor) / 8; ++i) to[i] = __ldcg(from + i);
    return copy;
}

// A lane's of all that a target's sum is made of. Read past L1, whose lines might be older than the work before this launch.
struct Source {
    int id;
    float gate;
    LswMerged held;
    uint32_t held_count;
    LswFactor factor;  // of slot `lane`

    __device__ __forceinline__ void read(const LswSwitchArgs& args, uint32_t target) {
        const uint32_t lane = threadIdx.x % 32;
        id = -1, gate = 0.0f, held = {-1, 0.0f, 0}, factor = {};
        if (lane < args.k) id = __ldcg(reinterpret_cast<const int32_t*>(args.ids) + lane), gate = __ldcg(reinterpret_cast<const float*>(args.gates) + lane);
        if (lane < args.k_max) {
            const LswMerged* m = merged(args, target) + lane;
            held = {__ldcg(&m->slot), __ldcg(&m->coefficient), __ldcg(&m->generation)};
        }
        held_count = __ldcg(&merged_count(args, target));
        if (args.slots <= kAtHand && lane < args.slots) factor = load_factor(&::factor(args, target, lane));
    }
    __device__ __forceinline__ bool equals(const Source& o) const {
        const LswFactor &f = factor, &g = o.factor;
        return id == o.id && __float_as_uint(gate) == __float_as_uint(o.gate) && held.slot == o.held.slot &&
               __float_as_uint(held.coefficient) == __float_as_uint(o.held.coefficient) && held.generation == o.held.generation &&
               held_count == o.held_count && f.a == g.a && f.b == g.b && f.a_stride == g.a_stride && f.b_stride == g.b_stride &&
               f.rank == g.rank && f.generation == g.generation && f.flags == g.flags && __float_as_uint(f.scale) == __float_as_uint(g.scale);
    }
};

// The target that a block is at. In shared memory, since registers are scarce.
struct Run {
    LswTarget matrix;
    uint32_t target, across, tiles, first;  // its tiles in a row and in all; the block's first of them
    __device__ __forceinline__ int row(uint32_t tile) const { return tile / across * kTile; }
    __device__ __forceinline__ int col(uint32_t tile) const { return tile % across * kTile; }
    __device__ __forceinline__ int rows() const { return matrix.rows; }
    __device__ __forceinline__ int cols() const { return matrix.cols; }
};

struct Shared {
    unsigned char weight[2][kGranule];  // a warpgroup's each
    Term terms[2 * LSW_MAX_K];
    Source source[kAtHand];  // by lane
    Run run;
    LswMerged next[LSW_MAX_K];  // to be recorded
    uint32_t next_count;
    uint32_t count, products;  // of the sum: terms and products
    uint32_t odd;
    bool is_changed, is_final;
};
static_assert(sizeof(Shared) <= LSW_SMALL_SHARED, "panels lie behind it");

__device__ __forceinline__ uint32_t tiles_of(uint32_t n) { return (n + kTile - 1) / kTile; }

// One warp: the target's sum.
__device__ void find_terms(const LswSwitchArgs& args, Shared& s, uint32_t target, const Source& source) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t held_count = source.held_count == LSW_UNKNOWN ? 0 : source.held_count;
    LswMerged held = source.held;
    if (lane >= held_count) held.slot = -1;
    const bool at_hand = args.slots <= kAtHand;
    s.source[lane] = source;
    __syncwarp();
    auto look = [&](int slot) { return at_hand ? s.source[slot].factor : load_factor(&factor(args, target, slot)); };

    const int id = known_id(source.id, args.slots);
    const RouteEntry entry = canonical_entry(id, source.gate, args.k);
    LswFactor enters{}, left{};
    if (entry.slot >= 0) enters = look(entry.slot);
    if (held.slot >= 0) left = look(held.slot);
    const float c = entry.gate * enters.scale;
    const bool exists = entry.slot >= 0 && enters.rank > 0, fits = usable(args, c), applies = exists && c != 0.0f && fits;
    bool same = !applies;
    float old = 0.0f;
    for (uint32_t e = 0; e < held_count; ++e) {
        const int slot = __shfl_sync(kFullWarp, held.slot, e);
        const float coefficient = __shfl_sync(kFullWarp, held.coefficient, e);
        const uint32_t generation = __shfl_sync(kFullWarp, held.generation, e);
        if (!applies || slot != entry.slot) continue;
        old = coefficient;
        same = generation == enters.generation && __float_as_uint(c) == __float_as_uint(old);
    }
    if (!args.in_place) old = 0.0f;
    const bool comes = applies && c - old != 0.0f;
    bool leaves = args.in_place && held.slot >= 0;
    uint32_t place = 0, at = 0;
    for (uint32_t e = 0; e < args.k; ++e) {
        const int slot = __shfl_sync(kFullWarp, applies ? entry.slot : -1, e), coming = __shfl_sync(kFullWarp, comes ? entry.slot : -1, e);
        place += slot >= 0 && slot < entry.slot;
        at += coming >= 0 && coming < entry.slot;
        if (slot >= 0 && slot == held.slot) leaves = false;
    }
    const uint32_t next_count = __popc(__ballot_sync(kFullWarp, applies));
    const bool is_same = __all_sync(kFullWarp, same) && next_count == source.held_count;
    // In place, the product of an adapter that has left the bank cannot be taken out again.
    const bool is_stale = args.in_place && __any_sync(kFullWarp, held.slot >= 0 && left.generation != held.generation);
    const uint32_t coming = __ballot_sync(kFullWarp, comes), leaving = __ballot_sync(kFullWarp, leaves);
    const uint32_t count = __popc(coming) + __popc(leaving), behind = __popc(coming) + __popc(leaving & ((1u << lane) - 1));
    if (comes) s.terms[at] = {enters.a, enters.b, enters.a_stride, enters.b_stride, enters.rank, enters.flags, c - old, 0};
    if (leaves) s.terms[behind] = {left.a, left.b, left.a_stride, left.b_stride, left.rank, left.flags, -held.coefficient, 0};
    if (applies) s.next[place] = {entry.slot, c, enters.generation};
    __syncwarp();
    uint32_t products = 0;
    for (uint32_t first = 0; first < count; first += 32) {
        const uint32_t own = first + lane < count ? s.terms[first + lane].products() : 0;
        uint32_t end = own;
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t below = __shfl_up_sync(kFullWarp, end, step);
            if (lane >= step) end += below;
        }
        if (first + lane < count) s.terms[first + lane].begin = products + end - own;
        products += __shfl_sync(kFullWarp, end, 31);
    }
    uint32_t odd = lane < args.k && id != source.id ? LSW_ODD_ROUTE_ID : 0;
    if (exists && !(is_finite(c) && fits)) odd |= LSW_ODD_COEFFICIENT;
    if (!is_same && is_stale) odd |= LSW_STALE_MERGE;
    odd = __reduce_or_sync(kFullWarp, odd);
    if (lane == 0) s.count = count, s.products = products, s.next_count = next_count, s.is_changed = !is_same && !is_stale, s.odd = odd;
}

// Of a set: the deepest panel that there can be, and how many of A and of B fit.
struct Places {
    unsigned char* area;
    uint32_t bytes, count;
    __device__ __forceinline__ unsigned char* a(uint32_t i) const { return area + 2 * i * bytes; }
    __device__ __forceinline__ unsigned char* b(uint32_t i) const { return a(i) + bytes; }
};

// 16 bytes of 8 elements, of which the first `valid` exist; the rest becomes zero.
template <class T> __device__ __forceinline__ void load_chunk(unsigned char* to, const T* from, int valid, bool aligned) {
    if (aligned) return copy16_partly(shared_address(to), from, max(0, min(16, 2 * valid)));
#pragma unroll 1
    for (int i = 0; i < 8; ++i) reinterpret_cast<T*>(to)[i] = i < valid ? from[i] : from_float<T>(0.0f);
}

// The block: panels of products from `first` on, as many as there are or fit. A [depth, 128] as two blocks of 64 columns, B [128, depth].
template <class T> __device__ __forceinline__ void load_panels(const Shared& s, const Places& places, uint32_t first, uint32_t tile) {
    const Run& run = s.run;
    const int row = run.row(tile), col = run.col(tile), rows = run.rows() - row, cols = run.cols() - col;
    uint32_t term = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < places.count && first + i < s.products; ++i) {
        while (term + 1 < s.count && s.terms[term + 1].begin <= first + i) ++term;
        const Term& t = s.terms[term];
        const int depth = t.depth(), k = (first + i - t.begin) * 64, left = t.rank - k;
        const uint32_t across = depth / 8, shift = depth == 64 ? 3 : depth == 32 ? 2 : 1;  // chunks of a row of B
        const bool a_aligned = t.flags & LSW_A_ALIGNED, b_aligned = t.flags & LSW_B_ALIGNED;
        const T* a = reinterpret_cast<const T*>(t.a) + static_cast<uint64_t>(k) * t.a_stride + col;
        const T* b = reinterpret_cast<const T*>(t.b) + static_cast<uint64_t>(row) * t.b_stride + k;
#pragma unroll 1
        for (int n = threadIdx.x; n < depth * 16; n += kThreads) {
            const int r = n / 16, c = n % 16, m = n >> shift, q = n & (across - 1);
            load_chunk(places.a(i) + c / 8 * depth * 128 + swizzle(r * 128 + c % 8 * 16, 7), a + static_cast<uint64_t>(r) * t.a_stride + 8 * c,
                       r < left ? cols - 8 * c : 0, a_aligned);
            load_chunk(places.b(i) + swizzle(n * 16, across - 1), b + static_cast<uint64_t>(m) * t.b_stride + 8 * q, m < rows ? left - 8 * q : 0,
                       b_aligned);
        }
    }
    copy_commit();
}

template <int kSteps, class T> __device__ __forceinline__ void multiply_steps(float (&product)[32], uint64_t b, uint64_t a) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) wgmma(product, b + (32 * i >> 4), a + (2048 * i >> 4), i > 0, T{});
    wgmma_commit();
}

// The sum of a tile, 64 rows a warpgroup; its first panels are on their way, and behind them at most one group of other copies.
template <class T>
__device__ __forceinline__ void add_products(const Shared& s, const Places& places, uint32_t tile, float (&sum)[64]) {
    const int group = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
    uint32_t term = 0;
#pragma unroll 1
    for (uint32_t p = 0; p < s.products; ++p) {
        const uint32_t i = p % places.count;
        if (i == 0) {
            if (p > 0) {
                __syncthreads();  // all are done with the panels before
                load_panels<T>(s, places, p, tile);
                copy_wait<0>();
            } else {
                copy_wait<1>();
            }
            fence_async_shared();
            __syncthreads();
        }
        while (term + 1 < s.count && s.terms[term + 1].begin <= p) ++term;
        const Term& t = s.terms[term];
        const uint32_t rank = t.rank, k = (p - t.begin) * 64, depth = panel_depth(rank);
        const float coefficient = t.coefficient;
        const uint32_t steps = (min(depth, rank - k) + 15) / 16, mode = depth == 64 ? 1 : depth == 32 ? 2 : 3;
        const uint32_t b_low = (1 << 16) + (shared_address(places.b(i)) + group * depth * 128 >> 4), b_high = depth * 16 >> 4 | mode << 30;
        const uint32_t a_low = (depth * 128 >> 4 << 16) + (shared_address(places.a(i)) >> 4), a_high = 1024 >> 4 | 1 << 30;
        const uint64_t b = static_cast<uint64_t>(b_high) << 32 | b_low, a = static_cast<uint64_t>(a_high) << 32 | a_low;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float product[32];
            const uint64_t a_half = a + (h * depth * 128 >> 4);
            if (steps < 3) {
                if (steps < 2) multiply_steps<1, T>(product, b, a_half);
                else multiply_steps<2, T>(product, b, a_half);
            } else {
                if (steps < 4) multiply_steps<3, T>(product, b, a_half);
                else multiply_steps<4, T>(product, b, a_half);
            }
            wgmma_wait<0>(product);
#pragma unroll
            for (int e = 0; e < 32; ++e) sum[32 * h + e] = fmaf(coefficient, product[e], sum[32 * h + e]);
        }
    }
}

__device__ __forceinline__ void sync_group(int group) { group == 0 ? sync_some<1, 128>() : sync_some<2, 128>(); }

// W's 64 rows, + sum, one rounding; an empty sum copies bits.
template <class T> __device__ __forceinline__ void add_to_weight(unsigned char* granule, const float (&sum)[64]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        unsigned char* place = Fragment<128>::place(granule, j);
        uint32_t words[4];
        ldmatrix4(words, place);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 old = unpack(words[i], T{});
            words[i] = pack({old.x + sum[8 * j + 2 * i], old.y + sum[8 * j + 2 * i + 1]}, T{});
        }
        stmatrix4(place, words);
    }
}

// A thread's chunks of W's 64 rows: one of the 16 in every eighth row.
struct Chunks {
    int row, col;  // of the first, in a tile
    __device__ __forceinline__ Chunks() { row = threadIdx.x / 128 * 64 + threadIdx.x % 128 / 16, col = threadIdx.x % 16 * 8; }
    __device__ __forceinline__ unsigned char* place(unsigned char* granule, int i) const {
        return granule + col / 64 * kHalf + swizzle((row % 64 + 8 * i) * 128 + col % 64 * 2, 7);
    }
};

template <class T> __device__ __forceinline__ void load_weight(Shared& s, uint32_t tile) {
    const Chunks own;
    const Run& run = s.run;
    const LswTarget& t = run.matrix;
    const int row = run.row(tile) + own.row, col = run.col(tile) + own.col;
    const T* base = reinterpret_cast<const T*>(t.base) + row * t.base_stride + col;
    const uint64_t step = 8 * t.base_stride;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        copy16_partly(shared_address(own.place(s.weight[threadIdx.x / 128], i)), base + i * step, row + 8 * i < run.rows() && col < run.cols() ? 16 : 0);
    }
    copy_commit();
}

template <class T> __device__ __forceinline__ void store_weight(Shared& s, uint32_t tile) {
    const Chunks own;
    const Run& run = s.run;
    const LswTarget& t = run.matrix;
    const int row = run.row(tile) + own.row, col = run.col(tile) + own.col;
    T* weight = reinterpret_cast<T*>(t.weight) + row * t.weight_stride + col;
    const uint64_t step = 8 * t.weight_stride;
    uint4 chunks[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) chunks[i] = *reinterpret_cast<const uint4*>(own.place(s.weight[threadIdx.x / 128], i));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (row + 8 * i < run.rows() && col < run.cols()) store16_whole(weight + i * step, chunks[i]);
    }
}

// Brings a tile of W to L2, a line a thread.
template <class T> __device__ __forceinline__ void prefetch_weight(const Run& run) {
    const int row = run.row(run.first) + threadIdx.x / 2, col = run.col(run.first) + threadIdx.x % 2 * 64;
    if (row < run.rows() && col < run.cols()) prefetch(reinterpret_cast<const T*>(run.matrix.base) + row * run.matrix.base_stride + col);
}

// The block: on to the target that a tile belongs to, if there is one. The set's own table never changes.
__device__ __forceinline__ bool enter_run(const LswSwitchArgs& args, Shared& s, uint32_t tile) {
    const uint32_t lane = threadIdx.x % 32, targets = args.last - args.first;
    __syncthreads();
    LswTarget t{};
    if (lane < targets) t = target_of(args, args.first + lane);
    const uint32_t tiles = t.flags & LSW_WEIGHT_BOXES ? tiles_of(t.rows) * tiles_of(t.cols) : 0;  // the others are another launch's
    uint32_t end = tiles;
    for (int step = 1; step < 32 && targets > 1; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, end, step);
        if (lane >= step) end += below;
    }
    const uint32_t behind = __ballot_sync(kFullWarp, end > tile), owner = __ffs(behind) - 1;
    if (threadIdx.x == owner) s.run = {t, args.first + owner, tiles_of(t.cols), tiles, tile - (end - tiles)};
    __syncthreads();
    return behind != 0;
}

template <class T> __device__ __forceinline__ void switch_small(const LswSwitchArgs& args) {
    if (args.first >= args.last) return dependency_wait();
    extern __shared__ unsigned char raw[];
    unsigned char* aligned = raw + (-shared_address(raw) & 1023);
    Shared& s = *reinterpret_cast<Shared*>(aligned);
    dependency_release();
    const uint32_t lane = threadIdx.x % 32, warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), group = warp / 4;
    const Places places{aligned + LSW_SMALL_SHARED, args.panel_depth * 256, LSW_SMALL_PANELS / (512 * args.panel_depth)};
    bool has_waited = false;
    for (uint32_t first = blockIdx.x; enter_run(args, s, first);) {
        const Run& run = s.run;
        const uint32_t target = run.target, first_tile = run.first;
        auto has_work = [&] { return s.is_changed && (s.products > 0 || !args.in_place); };
        float sum[64];
        auto add_first = [&] {
            if (!has_work()) return;
            load_panels<T>(s, places, 0, first_tile);
            copy_commit();  // an empty group: add_products leaves one
            add_products<T>(s, places, first_tile, sum);
        };
        bool weight_comes = false;
        if (!has_waited && args.slots <= kAtHand) {
            if (warp == 0) {
                Source source;
                source.read(args, target);
                find_terms(args, s, target, source);
            }
            __syncthreads();
            if (has_work()) prefetch_weight<T>(run);
            add_first();
            dependency_wait();
            weight_comes = has_work();
            __syncthreads();
            if (warp == 0) {
                Source now;
                now.read(args, target);
                const bool is_final = __all_sync(kFullWarp, now.equals(s.source[lane]));
                if (!is_final) find_terms(args, s, target, now);
                if (lane == 0) s.is_final = is_final;
            }
            if (weight_comes) load_weight<T>(s, first_tile);
            __syncthreads();
            if (!s.is_final) add_first();
        } else {
            if (!has_waited) dependency_wait();
            if (warp == 0) {
                Source source;
                source.read(args, target);
                find_terms(args, s, target, source);
            }
            __syncthreads();
            add_first();
        }
        has_waited = true;
        if (first_tile == 0 && threadIdx.x == 0 && s.odd) atomicOr(&state(args)->status, s.odd);
        if (has_work() && !weight_comes) load_weight<T>(s, first_tile);
#pragma unroll 1
        for (uint32_t tile = first_tile; s.is_changed && tile < run.tiles; tile += gridDim.x) {
            uint32_t arrived = 0;
            if (threadIdx.x == 0) arrived = count_relaxed(reinterpret_cast<uint32_t*>(args.arrivals) + target, run.tiles - 1);
            if (has_work()) {
                const uint32_t next = tile + gridDim.x;
                if (next < run.tiles) {
                    __syncthreads();  // all are done with the panels
                    load_panels<T>(s, places, 0, next);
                    copy_wait<1>();
                } else {
                    copy_wait<0>();
                }
                sync_group(group);
                if (s.count > 0) add_to_weight<T>(s.weight[group], sum);
                sync_group(group);
                store_weight<T>(s, tile);
                if (next < run.tiles) {
                    load_weight<T>(s, next);
                    add_products<T>(s, places, next, sum);
                }
            }
            if (warp == 0 && __shfl_sync(kFullWarp, arrived, 0) == run.tiles - 1) {
                if (lane < s.next_count) merged(args, target)[lane] = s.next[lane];
                if (lane == 0) merged_count(args, target) = s.next_count;
            }
        }
        copy_wait<0>();
        // On to the first of the block's tiles that is another target's.
        first += (run.tiles - first_tile + gridDim.x - 1) / gridDim.x * gridDim.x;
    }
    if (!has_waited) dependency_wait();
}

}  // namespace

#define LSW_SMALL(suffix, T)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(LSW_SMALL_THREADS, 2) lsw_switch_small_##suffix##_sm90(const __grid_constant__ LswSwitchArgs args) { \
        switch_small<T>(args);                                                                                                                \
    }
LSW_SMALL(f16, __half)
LSW_SMALL(bf16, __nv_bfloat16)
