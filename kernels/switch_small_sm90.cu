// The switch of a small set on Hopper: the contract of switch_sm90.cu, for the same targets, up to 32 in a launch.
//
// Floor: W is read once and written once, which for one matrix takes no longer than a few trips to memory. So it is trips that count, and
// what can be done before the work before this launch has ended is done by then.
//
// A block takes tiles of 128 x 128: its first by its number and then every gridDim-th, or of deep ranks as many in a row; two blocks share a
// multiprocessor, so that those of the next launch can begin. There is no queue and no plan: a block looks at the target of its tile alone.
//   1. terms    by one warp, in one trip: the route, what is merged, and all adapters of the target (where there are up to 32 slots)
//   2. sum      panels of A and B, a batch of products at a time while the next batch comes; two warpgroups multiply 64 rows each by wgmma,
//               and sum += coefficient * product
//   3. W        each warp for itself: 16 rows into shared memory, + sum, one rounding, and back
//   4. record   the last of a target's blocks to begin writes down what is merged now; by then all have read the old record
// The first tile's terms and sum are worked out before the wait, from what may not be final, and W is brought to L2. After the wait what
// the terms were made of is read again: if a bit differs, they are worked out anew. What adapters hold needs no second look: they lie still
// while they are in a slot, and whoever fills a slot gives it a new generation.
//
// Copies are plain ones: by tensor map a panel took 2 us and W 3, since a map is itself a trip. But wgmma reads through the async proxy, and
// the fence between waits for everything that its warp has on its way (it has a MEMBAR in it). So there is one a batch, when nothing should
// be on its way any more. For the same reason of trips there is little code between them: what one launch executes once is fetched first.
//
// Of up to four panels of deep ranks L2 is the limit, not trips: then B's panels stay for a row of tiles, in the place of all panels. A's come
// through the place of W, by the copy engine, for which no fence waits; W is added in registers, but for a block's last tile, whose W comes where
// the first panels of B have been.
//
// A launch of many tiles of such ranks is long enough for a block to have a multiprocessor to itself: then B's panels are in registers, A's come
// far ahead and W a tile ahead, and W goes back by the copy engine too.
//
// Exactness and the order of sums are those of switch.cu, but that a product is of 64 of a rank.
#include <stddef.h>

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
    int slot;

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
    __device__ __forceinline__ uint2& words() { return reinterpret_cast<uint2*>(this)[threadIdx.x / 32]; }
};
static_assert(sizeof(Source) == 8 * kThreads / 32 && offsetof(Source, factor) == 24, "two words a thread");

// For a second look, by all warps: where a thread's two words of what its lane has of a Source are, if anywhere.
struct Look {
    const uint32_t *x = nullptr, *y = nullptr;

    __device__ __forceinline__ Look(const LswSwitchArgs& args, uint32_t target) {
        const uint32_t lane = threadIdx.x % 32, pair = threadIdx.x / 32;
        auto at = [](const void* p) { return static_cast<const uint32_t*>(p); };
        if (pair == 0) {
            if (lane < args.k) x = reinterpret_cast<const uint32_t*>(args.ids) + lane, y = reinterpret_cast<const uint32_t*>(args.gates) + lane;
        } else if (pair <= 2) {
            const LswMerged* m = merged(args, target) + lane;
            if (lane < args.k_max) x = pair == 1 ? at(&m->slot) : at(&m->generation), y = at(&m->coefficient);
            if (pair == 2) y = &merged_count(args, target);
        } else if (args.slots <= kAtHand && lane < args.slots) {
            x = at(&factor(args, target, lane)) + 2 * (pair - 3), y = x + 1;
        }
    }
    __device__ __forceinline__ uint2 now() const {
        return {x ? __ldcg(x) : threadIdx.x < 64 ? ~0u : 0, y ? __ldcg(y) : 0};
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
    uint32_t target, blocks;  // the blocks that have tiles of it
    uint32_t at, next;        // among all tiles: the block's first of this target, and its first of another, or ~0
    Tile first;               // the block's first tile of this one, ...
    uint32_t end, step;       // ... where its tiles end, how far it is from one to the next, ...
    int rows_on, cols_on, cols;  // ... in rows and columns too, and where a row of tiles ends

    __device__ __forceinline__ void go_on(Tile& tile) const {
        tile.index += step, tile.row += rows_on, tile.col += cols_on;
        if (tile.col >= cols) tile.col -= cols, tile.row += kTile;
    }
};

// A panel of A, for the copy engine.
struct Box {
    const LswMap* map;
    int row, depth;  // where it begins in the rank, and how much of it a box of the map has
};
constexpr uint32_t kHeld = LSW_SMALL_HELD;    // panels of B that stay
constexpr uint32_t kPlaces = 2;               // for panels of A
constexpr uint32_t kFenced = LSW_SMALL_SLOTS;  // slots whose maps are fenced while a warp finds the terms, a thread each
static_assert(kHeld * kGranule <= LSW_SMALL_PANELS && 32 + kFenced + 2 <= kThreads, "places, and threads for the maps of W and its base");

// Of long launches: places for panels of A, of which the last are asked for anew only a few products later, when nobody is waited for; and for
// tiles of W.
constexpr uint32_t kLongPlaces = 8, kLate = 2, kStages = 2;
static_assert((kLongPlaces + 2 * (kStages - 1)) * kGranule <= LSW_SMALL_LONG, "behind Shared, whose granules are one stage of W");

struct Shared {
    unsigned char weight[2][kGranule];  // a warpgroup's each; of it a warp has 16 rows. Where B is held: panels of A
    Term terms[2 * LSW_MAX_K];
    Source source[kAtHand];  // by lane
    Run run;
    LswMerged next[LSW_MAX_K];  // to be recorded
    uint32_t next_count;
    uint32_t count, products;  // of the sum: terms and products
    float coefficients[2 * LSW_MAX_K * LSW_MAX_RANK / 64 + 1];  // of products, and one that is read ahead
    uint32_t odd;
    bool is_changed, is_guess;
    bool is_held;    // whether B's panels stay, ...
    bool are_whole;  // ... and their rows are whole chunks
    Box boxes[kHeld];
    Barrier full[kPlaces], empty[kPlaces];
    Barrier long_full[kLongPlaces], long_empty[kLongPlaces], weight_full[kStages][2];  // of long launches; W's for each warpgroup
    uint32_t used;     // panels of A, ever
    uint32_t added;    // tiles of W, ever, of long launches
    uint32_t arrived;  // blocks before this one
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

// One warp: the target's sum, from what each lane has read of it. kLong: of a long launch.
template <bool kLong> __device__ __forceinline__ void find_terms(const LswSwitchArgs& args, Shared& s, uint32_t target) {
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
    auto term = [](const LswFactor& f, float coefficient, int slot) {
        return Term{f.a, f.b, f.a_stride, f.b_stride, f.rank, f.flags, coefficient, 0, slot};
    };
    if (comes) s.terms[at] = term(enters, c - old, entry.slot);
    if (leaves) s.terms[behind] = term(left, -held.coefficient, held.slot);
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
            const LswMap* map = factor_maps(args, target * args.slots + t.slot);
            for (uint32_t p = t.begin; p < products + end; ++p) {
                s.coefficients[p] = t.coefficient;
                if (p < kHeld) s.boxes[p] = {map, static_cast<int>(64 * (p - t.begin)), panel_depth(t.rank)};
            }
        }
        products += __shfl_sync(kFullWarp, end, 31);
    }
    // Whether B's panels stay: there is more than one tile for them, there are places for them, and the copy engine brings A in whole panels (in
    // long launches in parts of them, too).
    const bool fits_box = lane >= count || ((kLong || s.terms[lane].rank > 32) && s.terms[lane].flags & LSW_A_ALIGNED);
    const bool are_whole = __all_sync(kFullWarp, lane >= count || (s.terms[lane].rank % 8 == 0 && s.terms[lane].flags & LSW_B_ALIGNED));
    const bool fit = __all_sync(kFullWarp, fits_box) && s.run.matrix.flags & LSW_WEIGHT_BLOCKS && args.slots <= kFenced;
    const bool pays = kLong ? products > 0 : products >= kPlaces && s.run.end - s.run.first.index > 1;
    const bool is_held = fit && pays && products <= kHeld && !is_same && !is_stale;
    uint32_t odd = lane < args.k && id != source.id ? LSW_ODD_ROUTE_ID : 0;
    if (exists && !(is_finite(c) && fits)) odd |= LSW_ODD_COEFFICIENT;
    if (!is_same && is_stale) odd |= LSW_STALE_MERGE;
    odd = __reduce_or_sync(kFullWarp, odd);
    if (lane == 0) {
        s.count = count, s.products = products, s.next_count = next_count, s.odd = odd;
        s.is_changed = !is_same && !is_stale, s.is_held = is_held, s.are_whole = are_whole;
    }
}

// Panels of products, as deep as those of the set's deepest rank: of a batch of products of one tile, while those of the batch before are
// used.
template <int kDepth> struct Panels {
    static constexpr int kBytes = kDepth * 256;  // A's or B's of a product
    static constexpr int kBatch = LSW_SMALL_PANELS / (4 * kBytes);
    uint32_t half;     // of the area, where the next batch goes
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
    if (tile.index < run.end && product < s.products) {
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

constexpr uint64_t kRows = static_cast<uint64_t>(kRowsOf128) << 32;  // of a descriptor

// The sum of a tile, 64 rows a warpgroup. Its first batch is there; `brings`: but not yet on its way is the one behind it. In the end it is
// there.
template <int kDepth, class T>
__device__ __forceinline__ void add_products(const Shared& s, Panels<kDepth>& panels, uint32_t products, bool brings, float (&sum)[64]) {
    constexpr uint32_t kMode = kDepth == 64 ? 1 : kDepth == 32 ? 2 : 3;  // of B's swizzle
    constexpr uint64_t kB = static_cast<uint64_t>(kDepth * 16 >> 4 | kMode << 30) << 32 | 1 << 16;
    constexpr uint64_t kA = kRows | (kDepth * 128 >> 4) << 16;
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
    __device__ __forceinline__ static unsigned char* place(unsigned char* granule, int half, int i) {
        const uint32_t thread = opaque(threadIdx.x), row = thread / 32 % 4 * 16 + thread % 32 / 8 + 4 * i;
        return granule + half * kHalf + swizzle(row * 128 + thread % 8 * 16, 7);
    }
};

// Granules: the warpgroup's 64 rows.
template <class T> __device__ __forceinline__ void load_weight(const Shared& s, unsigned char* granule, const Tile& tile) {
    const Chunks own(s.run, tile);
    const LswTarget& t = s.run.matrix;
    const T* base = reinterpret_cast<const T*>(t.base) + own.row * t.base_stride + own.col;
    const uint64_t step = 4 * t.base_stride;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int half = n / 4, i = n % 4;
        copy16_partly(shared_address(own.place(granule, half, i)), base + i * step + 64 * half, own.exists(half, i) ? 16 : 0);
    }
}

// A warp's 16 rows of 32 columns of W, the n-th of the tile: + sum, one rounding.
template <class T> __device__ __forceinline__ void add_columns(unsigned char* granule, int n, const float (&sum)[64]) {
    uint32_t words[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) ldmatrix4(words[j], Fragment<128>::place(granule, 2 * n + j));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        add_to<T>(words[j], sum + 8 * (2 * n + j), 1.0f);
        stmatrix4(Fragment<128>::place(granule, 2 * n + j), words[j]);
    }
}

// A warp's 16 rows of W, + sum, one rounding, and back. An empty sum copies bits.
template <class T>
__device__ __forceinline__ void store_weight(const Shared& s, unsigned char* granule, const Tile& tile, const float (&sum)[64]) {
    const Chunks own(s.run, tile);
    const LswTarget& t = s.run.matrix;
    T* weight = reinterpret_cast<T*>(t.weight) + own.row * t.weight_stride + own.col;
    const uint64_t step = 4 * t.weight_stride;
    const bool is_sum = s.count > 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (is_sum) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) add_columns<T>(granule, 2 * half + pair, sum);
            __syncwarp();
        }
        uint4 chunks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) chunks[i] = *reinterpret_cast<const uint4*>(own.place(granule, half, i));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (own.exists(half, i)) store16_whole(weight + i * step + 64 * half, chunks[i]);
        }
    }
    __syncwarp();
}

// Panels of A where B's stay.
struct Passing {
    uint32_t used;  // panels, ever

    // The panel of a product, which is the n-th ever.
    __device__ __forceinline__ static void bring(Shared& s, uint32_t product, int col, uint32_t n) {
        if (threadIdx.x < 32 && elect_one()) {
            const uint32_t place = n % kPlaces;
            const Box box = s.boxes[product];
            s.empty[place].wait((n / kPlaces & 1) ^ 1);
            s.full[place].arrive_expecting(kGranule);
            load_blocks(s.weight[place], box.map, col / 64, box.row, s.full[place]);
        }
        __syncwarp();
    }
    // The next panel, once it is there.
    __device__ __forceinline__ uint32_t open(Shared& s) {
        const uint32_t place = used % kPlaces;
        s.full[place].wait(used / kPlaces & 1);
        return place;
    }
    // Each warp: it has used a panel.
    __device__ __forceinline__ void close(Shared& s) {
        s.empty[used % kPlaces].arrive_if(threadIdx.x % 32 == 0);
        ++used;
    }
};

__device__ __forceinline__ unsigned char* held_panel(const Shared& s, uint32_t product) {
    return const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(&s)) + LSW_SMALL_SHARED + product * kGranule;
}

// The block: all of B of a row of tiles.
template <class T> __device__ __forceinline__ void bring_b(const Shared& s, int row) {
    const int m = threadIdx.x / 8, q = threadIdx.x % 8, rows = s.run.matrix.rows - row - m;
#pragma unroll 1
    for (uint32_t p = 0; p < s.products; ++p) {
        const Term& t = term_of(s, p);
        const int k = (p - t.begin) * 64 + 8 * q;
        const T* b = reinterpret_cast<const T*>(t.b) + static_cast<uint64_t>(row + m) * t.b_stride + k;
        unsigned char* to = held_panel(s, p) + swizzle(threadIdx.x * 16, 7);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            load_chunk(to + j * 32 * 128, b + static_cast<uint64_t>(32 * j) * t.b_stride, 32 * j < rows ? static_cast<int>(t.rank) - k : 0,
                       t.flags & LSW_B_ALIGNED);
        }
    }
}

// Whether W may come where panels of B have been: no tile follows, and nothing is waited for any more.
__device__ __forceinline__ bool is_last(const Shared& s, const Tile& tile) {
    return tile.index + 1 == s.run.end && tile.index != s.run.first.index;
}

// As add_products.
template <class T> __device__ __forceinline__ void add_held(Shared& s, Passing& passing, const Tile& tile, float (&sum)[64]) {
    constexpr uint64_t kB = kRows | 1 << 16, kA = kRows | (kHalf >> 4) << 16;
    const int group = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
#pragma unroll 1
    for (uint32_t p = 0; p < s.products; ++p) {
        const float coefficient = s.coefficients[p];
        if (p == 2 && is_last(s, tile)) {
            __syncthreads();
            load_weight<T>(s, held_panel(s, group), tile);
        }
        const uint32_t place = passing.open(s);
        const uint64_t b = kB + (shared_address(held_panel(s, p)) + group * kHalf >> 4), a = kA + (shared_address(s.weight[place]) >> 4);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float product[32];
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step) wgmma(product, b + (32 * step >> 4), a + (h * kHalf + 2048 * step >> 4), step > 0, T{});
            wgmma_commit();
            wgmma_wait<0>(product);
            if (h == 1) {
                passing.close(s);
                Tile of = tile;
                uint32_t ahead = p + kPlaces;
                if (ahead >= s.products) ahead -= s.products, s.run.go_on(of);
                if (of.index < s.run.end) Passing::bring(s, ahead, of.col, passing.used + kPlaces - 1);
            }
#pragma unroll
            for (int e = 0; e < 32; ++e) sum[32 * h + e] = fmaf(coefficient, product[e], sum[32 * h + e]);
        }
    }
}

// Four lanes side by side: word w of lane l's changes places with word l of lane w's. So what a lane has of a row of W, a chunk of 8 columns
// of every four, becomes what it has of a sum, and back.
__device__ __forceinline__ void transpose(uint32_t (&x)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? x[i] : x[i + 1], 1);
        (odd ? x[i] : x[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? x[i] : x[i + 2], 2);
        (upper ? x[i] : x[i + 2]) = other;
    }
}

// A warp's 16 rows of a tile of W, in registers: chunks of 8 columns of rows l / 4 and l / 4 + 8, every fourth.
struct Rows {
    uint4 chunks[2][4];

    // Visits (chunk, its place in a matrix that begins at `base`, whether it exists).
    template <class T, class Visit>
    __device__ __forceinline__ void each(const LswTarget& t, uint64_t base, uint64_t stride, const Tile& tile, Visit visit) {
        const int row = tile.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = tile.col + threadIdx.x % 4 * 8;
        T* place = reinterpret_cast<T*>(base) + row * stride + col;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                visit(chunks[i][j], reinterpret_cast<uint4*>(place + 32 * j), row + 8 * i < t.rows && col + 32 * j < t.cols);
            }
            place += 8 * stride;
        }
    }
    // What does not exist is read elsewhere, and not written: no branches.
    template <class T> __device__ __forceinline__ void load(const LswTarget& t, const Tile& tile) {
        const uint4* base = reinterpret_cast<const uint4*>(t.base);
        each<T>(t, t.base, t.base_stride, tile, [&](uint4& x, const uint4* place, bool exists) { x = __ldcg(exists ? place : base); });
    }
    // W + sum, one rounding, and back.
    template <class T> __device__ __forceinline__ void store(const LswTarget& t, const Tile& tile, const float (&sum)[64]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint4& chunk = chunks[i][j];
                uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
                transpose(words);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float2 old = unpack(words[c], T{});
                    const int at = 16 * j + 4 * c + 2 * i;
                    words[c] = pack({old.x + sum[at], old.y + sum[at + 1]}, T{});
                }
                transpose(words);
                chunk = {words[0], words[1], words[2], words[3]};
            }
        }
        each<T>(t, t.weight, t.weight_stride, tile, [](uint4& x, uint4* place, bool exists) {
            if (exists) store16_whole(place, x);
        });
    }
};

// Brings a tile of W to L2, if it exists.
template <class T> __device__ __forceinline__ void prefetch_weight(const Run& run, const Tile& tile) {
    const LswTarget& t = run.matrix;
    const int row = tile.row + threadIdx.x / 2, col = tile.col + threadIdx.x % 2 * 64;
    if (tile.index < run.end && row < t.rows && col < t.cols) prefetch(reinterpret_cast<const T*>(t.base) + row * t.base_stride + col);
}
// The same with a block's first tiles of a target: one, or two where the host says so.
template <class T> __device__ __forceinline__ void prefetch_weights(const LswSwitchArgs& args, const Run& run) {
    Tile tile = run.first;
#pragma unroll 1
    for (uint32_t i = 0; i <= args.run; ++i, run.go_on(tile)) prefetch_weight<T>(run, tile);
}

// The block: on to the target that a tile belongs to, if there is one; ~0: to that of its first. The set's own table never changes.
// kInRow: a block's tiles are neighbours.
template <bool kInRow> __device__ __forceinline__ bool enter_run(const LswSwitchArgs& args, Shared& s, uint32_t tile) {
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
    const uint32_t all = __shfl_sync(kFullWarp, end, targets - 1);
    const Divisor blocks(gridDim.x);
    const uint32_t each = kInRow ? blocks.quotient(all + gridDim.x - 1) : 1, step = kInRow ? 1 : gridDim.x;
    if (tile == ~0u) tile = blockIdx.x * each;
    const uint32_t behind = __ballot_sync(kFullWarp, end > tile), owner = __ffs(behind) - 1;
    if (threadIdx.x == owner) {
        const Divisor across(tiles_of(t.cols)), in_row(each);
        const uint32_t begin = end - tiles, first = tile - begin, stop = kInRow ? min(all, (blockIdx.x + 1) * each) : all;
        const uint32_t next = kInRow ? end : tile + blocks.quotient(end - tile + step - 1) * step;
        const uint32_t down = across.quotient(first), down_on = across.quotient(step);
        auto elements = [](uint32_t in_tiles) { return static_cast<int>(in_tiles * kTile); };
        s.run = {t,
                 args.first + owner,
                 kInRow ? in_row.quotient(end - 1) - in_row.quotient(begin) + 1 : min(tiles, gridDim.x),
                 tile,
                 next < stop ? next : ~0u,
                 {first, elements(down), elements(first - down * across.value)},
                 min(tiles, stop - begin),
                 step,
                 elements(down_on),
                 elements(step - down_on * across.value),
                 elements(across.value)};
    }
    __syncthreads();
    if (targets > 1 && behind != 0) source.read(args, s.run.target);
    if (threadIdx.x < 32) s.source[lane] = source;
    return behind != 0;
}

__device__ __forceinline__ bool has_work(const LswSwitchArgs& args, const Shared& s) { return s.is_changed && (s.products > 0 || !args.in_place); }

// The block, behind its first sum: what that was made of, once it is final, ...
__device__ __forceinline__ uint2 look_again(const LswSwitchArgs& args, const Shared& s) {
    const Look look(args, s.run.target);
    __syncthreads();  // all know that it was a guess
    dependency_wait();
    return look.now();
}
// ... and whether the guess was right.
__device__ __forceinline__ bool is_final(Shared& s, uint2 now) {
    const uint2 before = s.source[threadIdx.x % 32].words();
    if (threadIdx.x == 0) s.is_guess = false;
    return __syncthreads_and(now.x == before.x && now.y == before.y);
}

// The block: it has read the old record. Thread 0 learns how many had before, and says so once there is time to wait for it.
__device__ __forceinline__ uint32_t arrive(const LswSwitchArgs& args, const Shared& s) {
    if (threadIdx.x != 0) return 0;
    if (s.run.first.index == 0 && s.odd) atomicOr(&state(args)->status, s.odd);
    return s.is_changed ? count_relaxed(reinterpret_cast<uint32_t*>(args.arrivals) + s.run.target, s.run.blocks - 1) : 0;
}
// The last of them writes down what is merged now.
__device__ __forceinline__ void record(const LswSwitchArgs& args, const Shared& s) {
    const Run& run = s.run;
    __syncwarp();
    if (threadIdx.x >= 32 || s.arrived != run.blocks - 1) return;
    if (threadIdx.x < s.next_count) merged(args, run.target)[threadIdx.x] = s.next[threadIdx.x];
    if (threadIdx.x == 0) merged_count(args, run.target) = s.next_count;
}

// The block's tiles of a target; false: the guess was wrong, and nothing has been done.
template <int kDepth, class T> __device__ __forceinline__ bool switch_tiles(const LswSwitchArgs& args, Shared& s) {
    const Run& run = s.run;
    Tile tile = run.first;
    Panels<kDepth> panels;
    panels.half = 0, panels.product = 0, panels.tile = run.first;
    if (!s.is_changed || s.products == 0) panels.tile.index = run.end;
    bring_panels<kDepth, T>(s, panels);
    if (has_work(args, s)) prefetch_weights<T>(args, run);
    bring_panels<kDepth, T>(s, panels);
    if (has_work(args, s) && !s.is_guess) load_weight<T>(s, s.weight[threadIdx.x / 128], tile);
    all_come();
#pragma unroll 1
    for (;;) {
        uint32_t arrived = 0;
        float sum[64];  // set whatever there is to add, or it would live around the loop
        add_products<kDepth, T>(s, panels, has_work(args, s) ? s.products : 0, tile.index != run.first.index, sum);
        const bool is_first = tile.index == run.first.index;
        if (is_first && s.is_guess) {
            const uint2 now = look_again(args, s);
            if (has_work(args, s)) load_weight<T>(s, s.weight[threadIdx.x / 128], tile);
            if (!is_final(s, now)) {
                copy_wait_all();
                __syncthreads();
                return false;
            }
        }
        if (is_first) arrived = arrive(args, s);
        if (!s.is_changed) return true;
        if (has_work(args, s)) {
            copy_wait_all();
            __syncwarp();
            store_weight<T>(s, s.weight[threadIdx.x / 128], tile, sum);
        }
        if (threadIdx.x == 0 && is_first) s.arrived = arrived;
        run.go_on(tile);
        if (tile.index >= run.end) break;
        if (has_work(args, s)) load_weight<T>(s, s.weight[threadIdx.x / 128], tile);
    }
    record(args, s);
    return true;
}

// The same where B is held.
template <class T> __device__ __forceinline__ bool switch_held(const LswSwitchArgs& args, Shared& s) {
    const Run& run = s.run;
    Tile tile = run.first;
    Passing passing{s.used};
    for (uint32_t i = 0; i < kPlaces; ++i) Passing::bring(s, i, tile.col, passing.used + i);
    bring_b<T>(s, tile.row);
    prefetch_weights<T>(args, run);
    all_come();
    bool is_done = true;
#pragma unroll 1
    for (;;) {
        uint32_t arrived = 0;
        float sum[64];
        Rows rows;
        add_held<T>(s, passing, tile, sum);
        const bool is_first = tile.index == run.first.index, is_guess = is_first && s.is_guess;
        uint2 now;
        if (is_guess) now = look_again(args, s);
        if (s.products > 2 && is_last(s, tile)) {
            copy_wait_all();
            __syncwarp();
            store_weight<T>(s, held_panel(s, __shfl_sync(kFullWarp, threadIdx.x / 128, 0)), tile, sum);
            break;
        }
        rows.load<T>(run.matrix, tile);
        Tile next = tile;
        run.go_on(next);
        prefetch_weight<T>(run, next);
        if (is_guess && !is_final(s, now)) {
            // Those of the next tile are on their way.
            for (uint32_t i = 0; i < kPlaces && tile.index + 1 < run.end; ++i) passing.open(s), passing.close(s);
            is_done = false;
            break;
        }
        if (is_first) arrived = arrive(args, s);
        rows.store<T>(run.matrix, tile, sum);
        if (threadIdx.x == 0 && is_first) s.arrived = arrived;
        run.go_on(tile);
        if (tile.index >= run.end) break;
        if (tile.col == 0) {
            __syncthreads();
            bring_b<T>(s, tile.row);
            all_come();
        }
    }
    if (is_done) record(args, s);
    __syncthreads();
    if (threadIdx.x == 0) s.used = passing.used;
    return is_done;
}

// A chunk of 8 elements, of which the first `left` exist; the rest is zero. kWhole: all or none of them do; no branch. Else by elements, through
// L1, where the first one leaves the others: nobody writes an adapter in a slot, so that a line of it cannot be old.
template <bool kWhole, class T> __device__ __forceinline__ void load_words(uint32_t (&x)[4], const T* from, int left) {
    if constexpr (kWhole) {
        asm volatile(
            "{\n.reg .pred p;\nsetp.gt.s32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
            "@p ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
            : "=&r"(x[0]), "=&r"(x[1]), "=&r"(x[2]), "=&r"(x[3])
            : "l"(from), "r"(left));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint16_t* bits = reinterpret_cast<const uint16_t*>(from) + 2 * i;
            x[i] = (2 * i < left ? bits[0] : 0u) | (2 * i + 1 < left ? bits[1] : 0u) << 16;
        }
    }
}

// The 128 threads of a warpgroup.
__device__ __forceinline__ void sync_group(int group) {
    if (group == 0) sync_some<1, 128>();
    else sync_some<2, 128>();
}

// Long launches: a block has a multiprocessor to itself, B is in registers, and A and W come by the copy engine, which also takes W back.
template <class T> struct Long {
    const LswSwitchArgs& args;
    Shared& s;
    int group;
    uint32_t used, brought, added;  // panels of A, and tiles of W
    Tile ahead;                     // of the next panel of A to be brought, ...
    uint32_t ahead_product;         // ... and its product
    uint32_t b[kHeld][4][4];        // a warp's 16 rows of all panels of B, as wgmma has them

    __device__ __forceinline__ Long(const LswSwitchArgs& args, Shared& s)
        : args(args), s(s), group(__shfl_sync(kFullWarp, threadIdx.x / 128, 0)), used(s.used), brought(s.used), added(s.added), ahead(s.run.first),
          ahead_product(0) {}

    // The warpgroup's rows of W.
    __device__ __forceinline__ unsigned char* granule(uint32_t stage) const { return stage == 0 ? s.weight[group] : held_panel(s, kLongPlaces + group); }

    // The next panel of A, if there is one left. Of shallow ranks several boxes, those beyond the rank of zeros.
    __device__ __forceinline__ void bring() {
        if (ahead.index >= s.run.end) return;
        if (threadIdx.x < 32 && elect_one()) {
            const uint32_t place = brought % kLongPlaces;
            const Box box = s.boxes[ahead_product];
            s.long_empty[place].wait((brought / kLongPlaces & 1) ^ 1);
            s.long_full[place].arrive_expecting(kGranule);
            for (int k = 0; k < 64; k += box.depth) {
                load_blocks(held_panel(s, place) + 256 * k, box.map, ahead.col / 64, box.row + k, s.long_full[place]);
            }
        }
        __syncwarp();
        ++brought;
        if (++ahead_product == s.products) ahead_product = 0, s.run.go_on(ahead);
    }

    // W of the n-th tile ever, once what was in its place has been stored.
    __device__ __forceinline__ void bring_weight(const Tile& tile, uint32_t n) {
        if (tile.index >= s.run.end) return;
        if (threadIdx.x % 128 < 32 && elect_one()) {
            Barrier& full = s.weight_full[n % kStages][group];
            store_wait_read();
            full.arrive_expecting(kGranule);
            load_blocks(granule(n % kStages), target_maps(args, s.run.target) + 1, tile.col / 64, tile.row + 64 * group, full);
        }
        __syncwarp();
    }
    __device__ __forceinline__ void wait_weight(uint32_t n) { s.weight_full[n % kStages][group].wait(n / kStages & 1); }

    // B of a row of tiles. A lane loads chunks 4 h + lane % 4 of two rows, all before it looks at the first; what is beyond the products is zero.
    template <bool kWhole> __device__ __forceinline__ void load_rows(int tile_row) {
        const int row = tile_row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        uint32_t chunks[kHeld][2][2][4];
#pragma unroll
        for (uint32_t p = 0; p < kHeld; ++p) {
            const Term& t = term_of(s, p);
            const int k = (p - t.begin) * 64 + 8 * (threadIdx.x % 4);
            const T* from = reinterpret_cast<const T*>(t.b) + static_cast<uint64_t>(row) * t.b_stride + k;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int left = row + 8 * i < s.run.matrix.rows ? static_cast<int>(t.rank) - k - 32 * h : 0;
                    load_words<kWhole>(chunks[p][i][h], from + i * 8ull * t.b_stride + 32 * h, left);
                }
            }
        }
#pragma unroll
        for (uint32_t p = 0; p < kHeld; ++p) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    uint32_t (&words)[4] = chunks[p][i][h];
                    transpose(words);
                    b[p][2 * h][i] = words[0], b[p][2 * h][2 + i] = words[1], b[p][2 * h + 1][i] = words[2], b[p][2 * h + 1][2 + i] = words[3];
                }
            }
        }
    }

    __device__ __forceinline__ void load_b(int tile_row) {
        if (s.are_whole) load_rows<true>(tile_row);
        else load_rows<false>(tile_row);
    }

    struct Panel {
        uint32_t address, depth;  // as wgmma has it, and of its boxes
    };
    // The next panel of A, once it is there.
    __device__ __forceinline__ Panel open(uint32_t product) {
        const uint32_t place = used % kLongPlaces;
        s.long_full[place].wait(used / kLongPlaces & 1);
        return {shared_address(held_panel(s, place)) >> 4 | 1 << 16, static_cast<uint32_t>(s.boxes[product].depth)};
    }
    __device__ __forceinline__ void multiply(float (&product)[32], const uint32_t (&rows)[4][4], const Panel& panel, int side) {
        const uint32_t sixteen = (panel.depth == 16 ? 4096 : 2048) >> 4, thirtytwo = (panel.depth == 64 ? 4096 : 8192) >> 4;
        const uint32_t a = panel.address + side * (panel.depth * 128 >> 4);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma(product, rows[step], kRows | (a + step % 2 * sixteen + step / 2 * thirtytwo), step > 0, T{});
        wgmma_commit();
    }

    // The sum of a tile: one half of a product is multiplied while the other is added. Then W of the next tile is asked for.
    template <uint32_t kProducts> __device__ __forceinline__ void add_products(const Tile& tile, float (&sum)[64]) {
        const bool is_first = tile.index == s.run.first.index;
        float left[32], right[32];
        Panel panel = open(0);
        multiply(left, b[0], panel, 0);
        multiply(right, b[0], panel, 1);
#pragma unroll
        for (uint32_t p = 0; p < kProducts; ++p) {
            const float coefficient = s.coefficients[p];
            const uint32_t place = used++ % kLongPlaces;
            if (p + 1 < kProducts) panel = open(p + 1);
            wgmma_wait<1>(left);
#pragma unroll
            for (int e = 0; e < 32; ++e) sum[e] = fmaf(coefficient, left[e], p == 0 ? 0.0f : sum[e]);
            if (p + 1 < kProducts) {
                multiply(left, b[p + 1], panel, 0);
                wgmma_wait<1>(right);
            } else {
                wgmma_wait<0>(right);
            }
            s.long_empty[place].arrive_if(threadIdx.x % 32 == 0);
#pragma unroll
            for (int e = 0; e < 32; ++e) sum[32 + e] = fmaf(coefficient, right[e], p == 0 ? 0.0f : sum[32 + e]);
            if (p + 1 < kProducts) multiply(right, b[p + 1], panel, 1);
            bring();
            if (p == (kProducts > 1) && !is_first) {
                Tile next = tile;
                s.run.go_on(next);
                bring_weight(next, added + 1);
            }
        }
    }

    // W + sum, one rounding, and back.
    __device__ __forceinline__ void store(const Tile& tile, const float (&sum)[64]) {
        unsigned char* to = granule(added % kStages);
        wait_weight(added);
#pragma unroll
        for (int n = 0; n < 4; ++n) add_columns<T>(to, n, sum);
        fence_async_shared();
        sync_group(group);
        if (threadIdx.x % 128 < 32 && elect_one()) {
            store_blocks(target_maps(args, s.run.target), tile.col / 64, tile.row + 64 * group, to);
            store_commit();
        }
        __syncwarp();
        ++added;
    }

    // The block's tiles of a target; false: the guess was wrong, and nothing has been done.
    __device__ __forceinline__ bool run() {
        const Run& run = s.run;
        Tile tile = run.first;
#pragma unroll 1
        for (uint32_t i = 0; i < kLongPlaces - kLate; ++i) bring();
        prefetch_weights<T>(args, run);
        bool is_done = true;
        load_b(tile.row);
#pragma unroll 1
        for (;;) {
            float sum[64];
            switch (s.products) {
                case 1: add_products<1>(tile, sum); break;
                case 2: add_products<2>(tile, sum); break;
                case 3: add_products<3>(tile, sum); break;
                default: add_products<4>(tile, sum); break;
            }
            const bool is_first = tile.index == run.first.index;
            uint32_t arrived = 0;
            if (is_first) {
                const bool is_guess = s.is_guess;
                uint2 now{};
                if (is_guess) now = look_again(args, s);
                Tile next = tile;
                run.go_on(next);
                bring_weight(tile, added);
                bring_weight(next, added + 1);
                if (is_guess && !is_final(s, now)) {
                    // What is on its way must have come.
                    for (; used < brought; ++used) {
                        s.long_full[used % kLongPlaces].wait(used / kLongPlaces & 1);
                        s.long_empty[used % kLongPlaces].arrive_if(threadIdx.x % 32 == 0);
                    }
                    wait_weight(added++);
                    if (next.index < run.end) wait_weight(added++);
                    is_done = false;
                    break;
                }
                arrived = arrive(args, s);
            }
            store(tile, sum);
            if (threadIdx.x == 0 && is_first) s.arrived = arrived;
            run.go_on(tile);
            if (tile.index >= run.end) break;
            if (tile.col == 0) load_b(tile.row);
        }
        store_wait();
        if (is_done) record(args, s);
        __syncthreads();
        if (threadIdx.x == 0) s.used = used, s.added = added;
        return is_done;
    }
};

template <int kDepth, class T, bool kLong = false> __device__ __forceinline__ void switch_small(const LswSwitchArgs& args) {
    constexpr bool kMayHold = kDepth == 64;
    extern __shared__ unsigned char raw[];
    unsigned char* aligned = raw + (-shared_address(raw) & 1023);
    Shared& s = *reinterpret_cast<Shared*>(aligned);
    dependency_release();
    if (threadIdx.x == 0) {
        s.is_guess = args.slots <= kAtHand;
        s.used = s.added = 0;
        if (kMayHold) {
            for (uint32_t i = 0; i < kPlaces; ++i) s.full[i].init(1), s.empty[i].init(kThreads / 32);
            for (uint32_t i = 0; kLong && i < kLongPlaces; ++i) s.long_full[i].init(1), s.long_empty[i].init(kThreads / 32);
            for (uint32_t i = 0; kLong && i < 2 * kStages; ++i) s.weight_full[i / 2][i % 2].init(1);
            fence_barrier_init();
        }
    }
    if (args.slots > kAtHand) dependency_wait();
    uint32_t at = kMayHold ? ~0u : blockIdx.x;
    while (enter_run<kMayHold>(args, s, at)) {
        if (threadIdx.x < 32) find_terms<kLong>(args, s, s.run.target);
        else if (kMayHold && threadIdx.x - 32 < args.slots) fence_tensor_map(factor_maps(args, s.run.target * args.slots + threadIdx.x - 32));
        else if (kLong && threadIdx.x >= kThreads - 2) fence_tensor_map(target_maps(args, s.run.target) + threadIdx.x % 2);
        if (kMayHold) fence_async_shared();
        __syncthreads();
        bool is_done;
        if (!kMayHold || !s.is_held) is_done = switch_tiles<kDepth, T>(args, s);
        else if constexpr (kLong) is_done = Long<T>(args, s).run();
        else is_done = switch_held<T>(args, s);
        at = is_done ? s.run.next : s.run.at;  // or once more
        if (at == ~0u) break;
    }
    if (s.is_guess) dependency_wait();
}

}  // namespace

#define LSW_SMALL(suffix, T)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(LSW_SMALL_THREADS, 2) lsw_switch_small_##suffix##_sm90(const __grid_constant__ LswSwitchArgs args) { \
        if (args.first >= args.last) dependency_wait();                                                                                       \
        else if (args.panel_depth == 16) switch_small<16, T>(args);                                                                           \
        else switch_small<32, T>(args);                                                                                                       \
    }                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(LSW_SMALL_THREADS, 2) lsw_switch_small_deep_##suffix##_sm90(const __grid_constant__ LswSwitchArgs args) { \
        if (args.first >= args.last) dependency_wait();                                                                                       \
        else switch_small<64, T>(args);                                                                                                       \
    }                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(LSW_SMALL_THREADS, 1) lsw_switch_small_long_##suffix##_sm90(const __grid_constant__ LswSwitchArgs args) { \
        if (args.first >= args.last) dependency_wait();                                                                                       \
        else switch_small<64, T, true>(args);                                                                                                 \
    }
LSW_SMALL(f16, __half)
LSW_SMALL(bf16, __nv_bfloat16)
