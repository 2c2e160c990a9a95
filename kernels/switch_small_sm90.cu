// The switch of a small set on Hopper: the contract of switch_sm90.cu, for the same targets, up to 32 in a launch.
//
// Floor: W is read once and written once, which for one matrix takes no longer than a few trips to memory. So it is trips that count, and
// what can be done before the work before this launch has ended is done by then.
//
// A block takes tiles of 128 x 128, its first by its number and then every gridDim-th; two blocks share a multiprocessor, so that those of
// the next launch can begin. There is no queue and no plan: a block looks at the target of its tile alone.
//   1. terms    by one warp, in one trip: the route, what is merged, and all adapters of the target (where there are up to 32 slots)
//   2. sum      panels of A and B, a batch of products at a time while the next batch comes; two warpgroups multiply 64 rows each by wgmma,
//               and sum += coefficient * product
//   3. W        each warp for itself: 16 rows into shared memory, + sum, one rounding, and back
//   4. record   the last tile of a target to begin writes down what is merged now; by then all blocks have read the old record
// The first tile's terms and sum are worked out before the wait, from what may not be final, and W is brought to L2. After the wait what
// the terms were made of is read again: if a bit differs, they are worked out anew. What adapters hold needs no second look: they lie still
// while they are in a slot, and whoever fills a slot gives it a new generation.
//
// Copies are plain ones: by tensor map a panel took 2 us and W 3, since a map is itself a trip. But wgmma reads through the async proxy, and
// the fence between waits for everything that its warp has on its way (it has a MEMBAR in it). So there is one a batch, when nothing should
// be on its way any more. For the same reason of trips there is little code between them: what one launch executes once is fetched first.
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
struct alignas(16) Source {
    int id;
    float gate;
    LswMerged held;
    uint32_t held_count;
    LswFactor factor;  // of slot `lane`

    // Only warp 0 reads. It is set for all: else the compiler would keep its registers wherever it might have been read.
    __device__ __forceinline__ void read(const LswSwitchArgs& args, uint32_t target) {
        const uint32_t lane = threadIdx.x;
        id = -1, gate = 0.0f, held = {-1, 0.0f, 0}, factor = {};
        if (lane < args.k) {
            id = __ldcg(reinterpret_cast<const int32_t*>(args.ids) + lane);
            gate = __ldcg(reinterpret_cast<const float*>(args.gates) + lane);
        }
        if (lane < args.k_max) {
            const LswMerged* m = merged(args, target) + lane;
            held = {__ldcg(&m->slot), __ldcg(&m->coefficient), __ldcg(&m->generation)};
        }
        held_count = 0;
        if (lane < 32) held_count = __ldcg(&merged_count(args, target));
        if (args.slots <= kAtHand && lane < args.slots) factor = load_factor(&::factor(args, target, lane));
    }
    // No branches: all of the other is read at once.
    __device__ __forceinline__ bool equals(const Source& o) const {
        const LswFactor &f = factor, &g = o.factor;
        const uint32_t differ = id ^ o.id | __float_as_uint(gate) ^ __float_as_uint(o.gate) | held.slot ^ o.held.slot |
                               __float_as_uint(held.coefficient) ^ __float_as_uint(o.held.coefficient) | held.generation ^ o.held.generation |
                               held_count ^ o.held_count | f.a_stride ^ g.a_stride | f.b_stride ^ g.b_stride | f.rank ^ g.rank |
                               f.generation ^ g.generation | f.flags ^ g.flags | __float_as_uint(f.scale) ^ __float_as_uint(g.scale);
        return differ == 0 && (f.a ^ g.a | f.b ^ g.b) == 0;
    }
};

// A tile of a target: its number, and where it begins.
struct Tile {
    uint32_t index;
    int row, col;
};

// The target that a block is at. In shared memory, since registers are scarce.
struct Run {
    LswTarget matrix;
    uint32_t target, tiles;
    uint32_t next;  // the first of the block's tiles that is another target's, or ~0
    Tile first;     // the block's first tile of this one, ...
    int rows_on, cols_on, cols;  // ... how far it is to the next, and where a row of tiles ends

    __device__ __forceinline__ void go_on(Tile& tile) const {
        tile.index += gridDim.x, tile.row += rows_on, tile.col += cols_on;
        if (tile.col >= cols) tile.col -= cols, tile.row += kTile;
    }
};

struct Shared {
    unsigned char weight[2][kGranule];  // a warpgroup's each; of it a warp has 16 rows
    Term terms[2 * LSW_MAX_K];
    Source source[kAtHand];  // by lane
    Run run;
    LswMerged next[LSW_MAX_K];  // to be recorded
    uint32_t next_count;
    uint32_t count, products;  // of the sum: terms and products
    float coefficients[2 * LSW_MAX_K * LSW_MAX_RANK / 64 + 1];  // of products, and one that is read ahead
    uint32_t odd;
    bool is_changed, is_guess, is_final;
};
static_assert(sizeof(Shared) <= LSW_SMALL_SHARED, "panels lie behind it");

// Division in a few instructions: exact for numbers as small as those of a small set's tiles.
struct Divisor {
    uint32_t value;
    float inverse;
    __device__ __forceinline__ explicit Divisor(uint32_t value) : value(value), inverse(reciprocal(static_cast<float>(value))) {}
    __device__ __forceinline__ uint32_t quotient(uint32_t x) const { return static_cast<uint32_t>((static_cast<float>(x) + 0.5f) * inverse); }
};

__device__ __forceinline__ uint32_t tiles_of(uint32_t n) { return (n + kTile - 1) / kTile; }

// One warp: the target's sum, from what each lane has read of it.
__device__ __forceinline__ void find_terms(const LswSwitchArgs& args, Shared& s, uint32_t target) {
    const uint32_t lane = threadIdx.x % 32;
    const Source& source = s.source[lane];
    const uint32_t held_count = source.held_count == LSW_UNKNOWN ? 0 : source.held_count;
    LswMerged held = source.held;
    if (lane >= held_count) held.slot = -1;
    const bool at_hand = args.slots <= kAtHand;
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
#pragma unroll 1
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
#pragma unroll 1
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
#pragma unroll 1
    for (uint32_t first = 0; first < count; first += 32) {
        const uint32_t own = first + lane < count ? s.terms[first + lane].products() : 0;
        uint32_t end = own;
#pragma unroll 1
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t below = __shfl_up_sync(kFullWarp, end, step);
            if (lane >= step) end += below;
        }
        if (first + lane < count) {
            Term& t = s.terms[first + lane];
            t.begin = products + end - own;
            for (uint32_t p = t.begin; p < products + end; ++p) s.coefficients[p] = t.coefficient;
        }
        products += __shfl_sync(kFullWarp, end, 31);
    }
    uint32_t odd = lane < args.k && id != source.id ? LSW_ODD_ROUTE_ID : 0;
    if (exists && !(is_finite(c) && fits)) odd |= LSW_ODD_COEFFICIENT;
    if (!is_same && is_stale) odd |= LSW_STALE_MERGE;
    odd = __reduce_or_sync(kFullWarp, odd);
    if (lane == 0) s.count = count, s.products = products, s.next_count = next_count, s.is_changed = !is_same && !is_stale, s.odd = odd;
}

// Panels of products, as deep as those of the set's deepest rank: of a batch of products of one tile, while those of the batch before are
// used.
template <int kDepth> struct Panels {
    static constexpr int kBytes = kDepth * 256;  // A's or B's of a product
    static constexpr int kBatch = LSW_SMALL_PANELS / (4 * kBytes);
    static constexpr uint32_t kNone = 2;
    uint32_t half;     // of the area, where the next batch goes; none, where all begins anew
    Tile tile;         // of the next batch, ...
    uint32_t product;  // ... and its first product

    __device__ __forceinline__ unsigned char* a(const Shared& s, uint32_t i) const {
        return const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(&s)) + LSW_SMALL_SHARED + (half * kBatch + i) * 2 * kBytes;
    }
    __device__ __forceinline__ unsigned char* b(const Shared& s, uint32_t i) const { return a(s, i) + kBytes; }
};

// 16 bytes of 8 elements, of which the first `valid` exist; the rest becomes zero.
template <class T> __device__ __forceinline__ void load_chunk(unsigned char* to, const T* from, int valid, bool aligned) {
    if (aligned) return copy16_partly(shared_address(to), from, max(0, min(16, 2 * valid)));
#pragma unroll 1
    for (int i = 0; i < 8; ++i) reinterpret_cast<T*>(to)[i] = i < valid ? from[i] : from_float<T>(0.0f);
}

// The term that a product belongs to.
__device__ __forceinline__ const Term& term_of(const Shared& s, uint32_t product) {
    const uint32_t lane = threadIdx.x % 32, count = s.count;
    uint32_t behind = __popc(__ballot_sync(kFullWarp, lane < count && s.terms[lane].begin <= product));
    if (behind == 32) behind += __popc(__ballot_sync(kFullWarp, lane + 32 < count && s.terms[lane + 32].begin <= product));
    return s.terms[behind - 1];
}

// The block: the next batch, if there is one left, each product by warps of its own. A [depth, 128] as two blocks of 64 columns, B [128, depth].
template <int kDepth, class T> __device__ __forceinline__ void bring_panels(const Shared& s, Panels<kDepth>& panels) {
    constexpr int kBatch = Panels<kDepth>::kBatch, kOwn = kThreads / kBatch;  // threads a product
    constexpr int kAcross = kDepth / 8;  // chunks of a row of B
    const Run& run = s.run;
    const Tile& tile = panels.tile;
    const uint32_t i = __shfl_sync(kFullWarp, threadIdx.x / kOwn, 0), product = panels.product + i;
    if (tile.index < run.tiles && product < s.products) {
        const Term& t = term_of(s, product);
        const int n = threadIdx.x % kOwn, r = n / 16, c = n % 16, m = n / kAcross, q = n % kAcross;
        const int k = (product - t.begin) * 64, left = t.rank - k;
        const int cols = run.matrix.cols - tile.col - 8 * c, rows = run.matrix.rows - tile.row - m;
        const bool a_aligned = t.flags & LSW_A_ALIGNED, b_aligned = t.flags & LSW_B_ALIGNED;
        const T* a = reinterpret_cast<const T*>(t.a) + static_cast<uint64_t>(k + r) * t.a_stride + tile.col + 8 * c;
        const T* b = reinterpret_cast<const T*>(t.b) + static_cast<uint64_t>(tile.row + m) * t.b_stride + k + 8 * q;
        const uint64_t a_step = static_cast<uint64_t>(kOwn / 16) * t.a_stride, b_step = static_cast<uint64_t>(kOwn / kAcross) * t.b_stride;
        unsigned char *a_to = panels.a(s, i) + c / 8 * kDepth * 128, *b_to = panels.b(s, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int at = n + j * kOwn;
            load_chunk(a_to + swizzle(at / 16 * 128 + c % 8 * 16, 7), a + j * a_step, at / 16 < left ? cols : 0, a_aligned);
            load_chunk(b_to + swizzle(at * 16, kAcross - 1), b + j * b_step, j * (kOwn / kAcross) < rows ? left - 8 * q : 0, b_aligned);
        }
    }
    panels.half ^= 1;
    panels.product += kBatch;
    if (panels.product >= s.products) panels.product = 0, run.go_on(panels.tile);
}

// The block: until all that is on its way has come, and wgmma may read it.
__device__ __forceinline__ void all_come() {
    copy_wait_all();
    fence_async_shared();
    __syncthreads();
}

// The sum of a tile, 64 rows a warpgroup. Its first batch is there; `brings`: but not yet on its way is the one behind it. In the end it is
// there.
template <int kDepth, class T>
__device__ __forceinline__ void add_products(const Shared& s, Panels<kDepth>& panels, uint32_t products, bool brings, float (&sum)[64]) {
    constexpr uint32_t kMode = kDepth == 64 ? 1 : kDepth == 32 ? 2 : 3;  // of B's swizzle
    constexpr uint64_t kB = static_cast<uint64_t>(kDepth * 16 >> 4 | kMode << 30) << 32 | 1 << 16;
    constexpr uint64_t kA = static_cast<uint64_t>(1024 >> 4 | 1 << 30) << 32 | (kDepth * 128 >> 4) << 16;
    const int group = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
    float next = s.coefficients[0];
#pragma unroll 1
    for (uint32_t p = 0, i = 0; p < products; ++p) {
        if (i == 0 && brings) bring_panels<kDepth, T>(s, panels);
        brings = true;
        const float coefficient = next;
        next = s.coefficients[p + 1];
        const uint64_t b = kB + (shared_address(panels.b(s, i)) + group * kDepth * 128 >> 4), a = kA + (shared_address(panels.a(s, i)) >> 4);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float product[32];
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kDepth / 16; ++step) {
                wgmma(product, b + (32 * step >> 4), a + (h * kDepth * 128 + 2048 * step >> 4), step > 0, T{});
            }
            wgmma_commit();
            wgmma_wait<0>(product);
#pragma unroll
            for (int e = 0; e < 32; ++e) sum[32 * h + e] = fmaf(coefficient, product[e], sum[32 * h + e]);
        }
        if (++i == Panels<kDepth>::kBatch || p + 1 == products) {
            i = 0;
            all_come();
        }
    }
}

// A lane's chunks of its warp's 16 rows of a tile of W: of each half of the columns, one of the 8 in every fourth row.
struct Chunks {
    int row, col;    // of the first, in the target
    int rows, cols;  // that exist from there on
    __device__ __forceinline__ Chunks(const Run& run, const Tile& tile) {
        row = tile.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 8, col = tile.col + threadIdx.x % 8 * 8;
        rows = run.matrix.rows - row, cols = run.matrix.cols - col;
    }
    __device__ __forceinline__ bool exists(int half, int i) const { return 4 * i < rows && 64 * half < cols; }
    __device__ __forceinline__ static unsigned char* place(Shared& s, int half, int i) {
        const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 8 + 4 * i;
        return s.weight[threadIdx.x / 128] + half * kHalf + swizzle(row * 128 + threadIdx.x % 8 * 16, 7);
    }
};

template <class T> __device__ __forceinline__ void load_weight(Shared& s, const Tile& tile) {
    const Chunks own(s.run, tile);
    const LswTarget& t = s.run.matrix;
    const T* base = reinterpret_cast<const T*>(t.base) + own.row * t.base_stride + own.col;
    const uint64_t step = 4 * t.base_stride;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int half = n / 4, i = n % 4;
        copy16_partly(shared_address(own.place(s, half, i)), base + i * step + 64 * half, own.exists(half, i) ? 16 : 0);
    }
}

// A warp's 16 rows of W, + sum, one rounding, and back. An empty sum copies bits.
template <class T> __device__ __forceinline__ void store_weight(Shared& s, const Tile& tile, const float (&sum)[64]) {
    const Chunks own(s.run, tile);
    const LswTarget& t = s.run.matrix;
    T* weight = reinterpret_cast<T*>(t.weight) + own.row * t.weight_stride + own.col;
    const uint64_t step = 4 * t.weight_stride;
    const bool is_sum = s.count > 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (is_sum) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int first = 4 * half + 2 * pair;
                uint32_t words[2][4];
#pragma unroll
                for (int j = 0; j < 2; ++j) ldmatrix4(words[j], Fragment<128>::place(s.weight[threadIdx.x / 128], first + j));
#pragma unroll
                for (int j = 0; j < 2; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 old = unpack(words[j][i], T{});
                        const int at = 8 * (first + j) + 2 * i;
                        words[j][i] = pack({old.x + sum[at], old.y + sum[at + 1]}, T{});
                    }
                    stmatrix4(Fragment<128>::place(s.weight[threadIdx.x / 128], first + j), words[j]);
                }
            }
            __syncwarp();
        }
        uint4 chunks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) chunks[i] = *reinterpret_cast<const uint4*>(own.place(s, half, i));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (own.exists(half, i)) store16_whole(weight + i * step + 64 * half, chunks[i]);
        }
    }
    __syncwarp();
}

// Brings a tile of W to L2, if it exists.
template <class T> __device__ __forceinline__ void prefetch_weight(const Run& run, const Tile& tile) {
    const LswTarget& t = run.matrix;
    const int row = tile.row + threadIdx.x / 2, col = tile.col + threadIdx.x % 2 * 64;
    if (tile.index < run.tiles && row < t.rows && col < t.cols) prefetch(reinterpret_cast<const T*>(t.base) + row * t.base_stride + col);
}

// The block: on to the target that a tile belongs to, if there is one. The set's own table never changes.
__device__ __forceinline__ bool enter_run(const LswSwitchArgs& args, Shared& s, uint32_t tile) {
    const uint32_t lane = threadIdx.x % 32, targets = args.last - args.first;
    __syncthreads();
    LswTarget t{};
    if (lane < targets) t = target_of(args, args.first + lane);
    // What a lone target's sum is made of need not wait for the table.
    Source source;
    source.read(args, args.first);
    const uint32_t tiles = t.flags & LSW_WEIGHT_BOXES ? tiles_of(t.rows) * tiles_of(t.cols) : 0;  // the others are another launch's
    uint32_t end = tiles;
    for (int step = 1; step < 32 && targets > 1; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, end, step);
        if (lane >= step) end += below;
    }
    const uint32_t behind = __ballot_sync(kFullWarp, end > tile), owner = __ffs(behind) - 1, all = __shfl_sync(kFullWarp, end, targets - 1);
    if (threadIdx.x == owner) {
        const Divisor across(tiles_of(t.cols)), blocks(gridDim.x);
        const uint32_t first = tile - (end - tiles), next = tile + blocks.quotient(end - tile + gridDim.x - 1) * gridDim.x;
        const uint32_t down = across.quotient(first), down_on = across.quotient(gridDim.x);
        auto elements = [](uint32_t in_tiles) { return static_cast<int>(in_tiles * kTile); };
        s.run = {t,
                 args.first + owner,
                 tiles,
                 next < all ? next : ~0u,
                 {first, elements(down), elements(first - down * across.value)},
                 elements(down_on),
                 elements(gridDim.x - down_on * across.value),
                 elements(across.value)};
    }
    __syncthreads();
    if (targets > 1 && behind != 0) source.read(args, s.run.target);
    if (threadIdx.x < 32) s.source[lane] = source;
    return behind != 0;
}

template <int kDepth, class T> __device__ __forceinline__ void switch_small(const LswSwitchArgs& args) {
    extern __shared__ unsigned char raw[];
    unsigned char* aligned = raw + (-shared_address(raw) & 1023);
    Shared& s = *reinterpret_cast<Shared*>(aligned);
    dependency_release();
    const uint32_t lane = threadIdx.x % 32, warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
    Panels<kDepth> panels;
    if (threadIdx.x == 0) s.is_guess = args.slots <= kAtHand;
    if (args.slots > kAtHand) dependency_wait();
    for (uint32_t first = blockIdx.x; first != ~0u && enter_run(args, s, first); first = s.run.next) {
        const Run& run = s.run;
        auto has_work = [&] { return s.is_changed && (s.products > 0 || !args.in_place); };
        Tile tile = run.first;
        panels.half = Panels<kDepth>::kNone;
#pragma unroll 1
        for (;;) {
            if (panels.half == Panels<kDepth>::kNone) {  // first, and again where the guess was wrong
                if (warp == 0) find_terms(args, s, run.target);
                __syncthreads();
                panels.half = 0, panels.product = 0, panels.tile = run.first;
                if (!s.is_changed || s.products == 0) panels.tile.index = run.tiles;
                bring_panels<kDepth, T>(s, panels);
                if (has_work()) {
                    Tile ahead = tile;
#pragma unroll 1
                    for (uint32_t i = 0; i <= args.run; ++i, run.go_on(ahead)) prefetch_weight<T>(run, ahead);
                }
                bring_panels<kDepth, T>(s, panels);
                if (has_work() && !s.is_guess) load_weight<T>(s, tile);
                all_come();
            }
            float sum[64];  // set whatever there is to add, or it would live around the loop
            add_products<kDepth, T>(s, panels, has_work() ? s.products : 0, tile.index != run.first.index, sum);
            if (s.is_guess) {
                const bool weight_comes = has_work();
                __syncthreads();  // all have read what may be found anew
                dependency_wait();
                Source now;
                now.read(args, run.target);
                if (weight_comes) load_weight<T>(s, tile);
                if (warp == 0) {
                    const bool is_final = __all_sync(kFullWarp, now.equals(s.source[lane]));
                    s.source[lane] = now;
                    if (lane == 0) s.is_final = is_final, s.is_guess = false;
                }
                __syncthreads();
                if (!s.is_final) {
                    copy_wait_all();
                    __syncthreads();
                    panels.half = Panels<kDepth>::kNone;
                    continue;
                }
            }
            if (tile.index == 0 && threadIdx.x == 0 && s.odd) atomicOr(&state(args)->status, s.odd);
            if (!s.is_changed) break;
            uint32_t arrived = 0;
            if (threadIdx.x == 0) arrived = count_relaxed(reinterpret_cast<uint32_t*>(args.arrivals) + run.target, run.tiles - 1);
            if (has_work()) {
                copy_wait_all();
                __syncwarp();
                store_weight<T>(s, tile, sum);
            }
            run.go_on(tile);
            const bool goes_on = tile.index < run.tiles;
            if (goes_on && has_work()) load_weight<T>(s, tile);
            if (warp == 0 && __shfl_sync(kFullWarp, arrived, 0) == run.tiles - 1) {
                if (lane < s.next_count) merged(args, run.target)[lane] = s.next[lane];
                if (lane == 0) merged_count(args, run.target) = s.next_count;
            }
            if (!goes_on) break;
        }
    }
    if (s.is_guess) dependency_wait();
}

}  // namespace

#define LSW_SMALL(suffix, T)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(LSW_SMALL_THREADS, 2) lsw_switch_small_##suffix##_sm90(const __grid_constant__ LswSwitchArgs args) { \
        if (args.first >= args.last) dependency_wait();                                                                                       \
        else if (args.panel_depth == 16) switch_small<16, T>(args);                                                                           \
        else if (args.panel_depth == 32) switch_small<32, T>(args);                                                                           \
        else switch_small<64, T>(args);                                                                                                       \
    }
LSW_SMALL(f16, __half)
LSW_SMALL(bf16, __nv_bfloat16)
