// The switch on Hopper: the contract of switch.cu, for f16 and bf16 targets whose W and W_base have addresses, row strides and row bytes
// that are multiples of 16 (the copy engine stores whole 16 bytes: past a ragged row it would zero its neighbour).
//
// Floor: W is read once and written once. Everything else hides behind that stream or is overhead.
//
// One block an SM, five roles that hand a 128 x 128 tile from one to the next through mbarriers:
//
//   scheduler (warp 0)  takes tiles from the queue and publishes them with their products: a term and up to 64 of its rank each
//   panels    (warp 1)  per product: A [<= 64, 128], by the copy engine
//   loaders   (warps 4 to 7)  and B [128, <= 64], by plain copies, each warp every fourth
//   consumers (2 x 128) each 64 rows: wgmma into `product`, sum += coefficient * product; then W's granule is changed in place in shared
//                       memory (ldmatrix, add in f32, one rounding, stmatrix); where ranks are deep, each 64 columns, A in registers (add_held)
//   weights   (warps 2, 3) a consumer's granules of W: each is brought by the copy engine, and written back when it is done
//
// The product of a tile starts before its W arrives, and W runs up to four tiles ahead. A block takes a few tiles in a row, and B stays in
// shared memory for that run; where a target has more panels than can stay, the rest passes through A's ring, tile by tile. Where ranks are deep,
// a run goes down a column of tiles, A stays in registers, and B passes: a strip of blocks side by side then works on the same rows of W, whole
// ones. Of more panels than fit there, A of the next few stays in shared memory. A and B are what other blocks read again, W is not: L2 is told to
// evict them last.
//
// A consumer is bound by the latency of its own instructions, not by the tensor cores: two warps a scheduler, and a term is a chain of wait,
// product, fmas. So the scheduler works out all that a product needs, descriptors and places included, and whatever a consumer still has to
// do it does while a product runs. Where ranks are deep it is bound by panels, and by the power that tensor cores take of the clock: there one
// wgmma of 128 columns beats two of 64 that take turns.
//
// Why it is right:
// - Both operands come as PEFT stores them. B [out, rank] is K-major, A [rank, in] is N-major: wgmma takes both layouts by descriptor.
// - The copy engine fills what lies outside a matrix with zeros and writes nothing there: ragged targets and ranks need no other code,
//   and bytes beyond the rank never enter a product.
// - An adapter whose own rows are not aligned comes through plain loads into the same swizzled places (load_slowly), so that a refill
//   never changes which launch serves a target.
// - Exactness and the order of sums are those of switch.cu, but that the tensor cores sum in another grouping, and that where the consumers
//   hold A terms ascend by magnitude and share an accumulator, which rounds each twice at every later one. Which it is depends on a target's
//   own terms alone, and so do its bits from base: where panels lie, and how many tiles make a run, does not show in them.
// - The last block to leave the queue records. Only schedulers read the old record, and by then all of them are done with it.
//
// Memory order first: blocks take tiles from one counter, so that all SMs work close together in memory (long private strips cost 6-10%). What a
// run of tiles saves on B it can lose there: two or three tiles are best until the ranks add up to more than 128, 8 or, downwards, 32 beyond. And
// what comes further ahead than the consumers need is lost there too.
// Every layout assumption is asserted where it is used.
#include <stddef.h>

#include "args.h"
#include "common/num.cuh"
#include "common/ptx_sm90.cuh"
#include "common/switch_plan.cuh"
#include "common/switch_tile_sm90.cuh"

namespace {

constexpr int kThreads = LSW_SWITCH90_THREADS;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kGroups = LSW_SWITCH90_GROUPS;
constexpr int kArea = 13 * kGranule;        // bytes for granules of W and panels of A and B
constexpr uint32_t kMostGranules = 10, kGranules = 6, kFewGranules = 4, kFewestGranules = 2;
static_assert(kMostGranules % kConsumers == 0 && kGranules % kConsumers == 0 && kFewGranules % kConsumers == 0 &&
                  kFewestGranules % kConsumers == 0,
              "a place stays with one consumer, or with both: who waits at a barrier sees all its phases");
constexpr uint32_t kMostPanels = (kArea - kGranules * kGranule) / (16 * 256);  // of the smallest
constexpr uint32_t kDeepStay = 4;           // panels of B, of the largest, that stay
constexpr uint32_t kHeldPlaces = 8;         // for panels that pass, where the consumers hold A
constexpr uint32_t kHeldStay = 6;           // panels of A that stay, where there are more than the consumers can hold
__host__ __device__ constexpr uint32_t slots_of(uint32_t granules, uint32_t depth) { return (kArea - granules * kGranule) / (depth * 256); }
static_assert(slots_of(kFewGranules, 64) >= kDeepStay + 4 && slots_of(kGranules, 64) >= 4 && slots_of(kFewestGranules, 64) >= kHeldStay + 4,
              "at a run's begin, and within a term, a consumer that holds A waits for two places before it gives two others back");
static_assert(slots_of(kMostGranules, 16) / 2 >= kDeepStay && slots_of(kGranules, 32) / 2 >= kDeepStay &&
                  slots_of(kFewGranules, 64) / 2 >= kDeepStay,
              "up to so many panels of B stay, by plain copies, where a target is not of depth 64 (lay_out); of others maps are fenced (meet_target)");
constexpr uint32_t kLoaders = 4;            // warps
constexpr uint32_t kLight = 3;              // panels of a tile, up to which its consumers have time to spare
constexpr uint32_t kLightGrab = 2, kGrab = 3, kDeepGrab = 8;  // tiles that a block takes at a time
constexpr uint32_t kHeldRun = 32;           // tiles one below the other, where the consumers hold A
static_assert((kHeldRun & (kHeldRun - 1)) == 0, "runs begin with columns (Strips)");
constexpr uint32_t kDeep = 128;                // a sum of ranks beyond which panels are scarcer than granules
constexpr uint32_t kEntries = 6;                 // tiles between the scheduler and the slowest role

// A block starts with 128 registers a thread and can only share these out: asking for one more waits for ever.
constexpr int kProducerRegisters = 40, kLoaderRegisters = 24, kConsumerRegisters = 224;
static_assert(128 * kProducerRegisters + 128 * kLoaderRegisters + 256 * kConsumerRegisters <= 512 * 128, "registers of a block");

static_assert(kThreads == 512 && kTile == 128, "two warpgroups of producers, two of consumers of 64 rows each");

// Panels of A that consumers hold in registers, a target's first ones, of `per` a term: whole terms. Each number has code of its own, where an
// index is a constant.
constexpr uint32_t kFewHeld = 6, kMostHeld = 8;
__device__ __forceinline__ uint32_t held_of(uint32_t panels, uint32_t per) {
    if (panels < kFewHeld) return min(panels, 4);
    return panels < kMostHeld || per == 3 ? kFewHeld : kMostHeld;
}

// What a target's sum has of one adapter.
struct alignas(16) Term {
    float coefficient;
    uint32_t rank_and_flags;  // the rank in the low half
    const void* b;
    uint32_t b_stride;
    uint32_t factor;  // target * slots + slot

    __device__ uint32_t rank() const { return rank_and_flags & 0xffff; }
    __device__ uint32_t flags() const { return rank_and_flags >> 16; }
    __device__ uint32_t depth() const { return panel_depth(rank()); }
    __device__ uint32_t panels() const { return rank() <= 64 ? 1 : (rank() + 63) / 64; }
};

// A place in the ring of entries, and its parity, in one register.
struct EntryRing {
    uint32_t at = 0;

    __device__ __forceinline__ uint32_t slot() const { return at < kEntries ? at : at - kEntries; }
    __device__ __forceinline__ uint32_t parity() const { return at >= kEntries; }
    __device__ __forceinline__ void advance() { at = at + 1 == 2 * kEntries ? 0 : at + 1; }
};

// Of a product: what all roles ask. Bits from 0: steps of 16 of the rank, whether it adds to what the term's last panel left, whether it ends
// the term, whether B's place is free afterwards, parities of A and B, A's place, whether the warp of panels fills both places, and B's. (Where A
// is held: of B and A.)
struct Plan {
    uint32_t bits;

    __device__ uint32_t steps() const { return bits & 7; }
    __device__ bool adds() const { return bits >> 3 & 1; }
    __device__ bool ends_term() const { return bits >> 4 & 1; }
    __device__ bool frees_b() const { return bits >> 5 & 1; }
    __device__ uint32_t a_parity() const { return bits >> 6 & 1; }
    __device__ uint32_t b_parity() const { return bits >> 7 & 1; }
    __device__ uint32_t a_slot() const { return bits >> 8 & 0x7f; }
    __device__ bool brings_both() const { return bits >> 15 & 1; }
    __device__ uint32_t b_slot() const { return bits >> 16; }
    // What a product leaves when it is over: A's place, and maybe B's.
    __device__ static Plan leaves(uint32_t a_slot, uint32_t b_slot, bool frees_b) { return {frees_b << 5 | a_slot << 8 | b_slot << 16}; }
};

// One panel of B times one of A, as the scheduler works it out.
struct alignas(16) Product {
    // For the consumers: words of wgmma's descriptors, of B one for each consumer. (Where A is held: of B; of A.)
    uint32_t a_low, b_high;
    float coefficient;
    Plan plan;
    uint32_t b_low[kConsumers];
    // For those who bring the panels.
    const void* b;
    uint32_t factor;
    uint16_t k, rank;  // the panel begins at k
    uint16_t depth, flags;
    uint32_t b_stride;
};
static_assert(offsetof(Product, plan) == 12 && offsetof(Product, factor) == 32 && offsetof(Product, depth) == 40, "read as four words");

__device__ __forceinline__ uint64_t rows_of_128(uint32_t low) { return static_cast<uint64_t>(kRowsOf128) << 32 | low; }

// What a consumer takes of a product.
struct Work {
    uint32_t a_low, b_high;
    float coefficient;
    Plan plan;
    uint32_t b_low;

    __device__ float factor() const { return plan.ends_term() ? coefficient : 1.0f; }
    __device__ uint64_t b() const { return static_cast<uint64_t>(b_high) << 32 | b_low; }
    __device__ uint64_t a() const { return rows_of_128(a_low); }
};

// A tile on its way through the roles, or a part of one that has more products than fit: only the last part ends the tile.
struct alignas(16) Header {
    uint32_t target;
    int row, col;
    uint32_t packed;  // of the target, its kind; products; rows of the matrix in the tile; and two flags

    // Of a target: first products whose A the consumers hold, products of each of its terms, LSW_WEIGHT_BLOCKS. Of no target: the end.
    __device__ static uint32_t kind(uint32_t held, uint32_t per, bool blocks) { return held << 16 | per << 20 | blocks << 25; }
    static constexpr uint32_t kEnds = 1u << 31;
    __device__ static uint32_t pack(uint32_t kind, uint32_t products, uint32_t rows, bool ends_tile, bool begins_run) {
        return kind | products | rows << 8 | ends_tile << 29 | begins_run << 30;
    }
    __device__ uint32_t products() const { return packed & 0xff; }
    __device__ int rows() const { return packed >> 8 & 0xff; }
    __device__ uint32_t held() const { return packed >> 16 & 0xf; }
    __device__ uint32_t per() const { return packed >> 20 & 0xf; }
    __device__ bool blocks() const { return packed >> 25 & 1; }
    __device__ bool ends_tile() const { return packed >> 29 & 1; }
    __device__ bool begins_run() const { return packed >> 30 & 1; }
    __device__ bool is_end() const { return packed & kEnds; }
};
constexpr uint32_t kProducts = 24;  // of an entry
static_assert(kProducts <= 32 && kProducts % 2 == 0 && kProducts % 3 == 0 && kProducts % 4 == 0, "a lane's each; whole terms, where they are alike");
static_assert(kProducts < 256 && kTile < 256 && kMostPanels < 128, "packed");
struct Entry {
    Header header;
    Product products[kProducts];
};

// How this launch uses the area: by the deepest panel of its route. Every block works it out for itself, to the same result.
struct Geometry {
    uint32_t depth;        // 16, 32 or 64 of the rank
    uint32_t panel_bytes;  // A [depth, 128] or B [128, depth]
    uint32_t granules;     // of W in flight, at the area's begin
    uint32_t panels;       // the address behind them
    uint32_t stays;        // panels behind them, for a run of tiles: the first ones of B; where A is held, of A, the first ones that are not
    uint32_t passes;       // and behind those, for one tile: all others
    uint32_t is_held;      // which of the two stay: who brings the one does not know when the other is done
    uint32_t most_ranks, most_panels;  // that a target may need
    uint32_t least_steps, most_steps;  // of a product
    uint32_t has_unaligned;      // of an adapter, A or B
    uint32_t may_hold, may_not;  // whether the consumers may come to hold A of a target; whether they may not of another
    uint32_t grab;         // consecutive tiles that a block takes at a time
};

// The copy engine's swizzle repeats every 1,024 bytes: granules and panels stand at multiples of that.
struct Shared {
    unsigned char area[kArea];
    Entry entry[kEntries];
    Term staged[2 * LSW_MAX_K];    // the terms of the scheduler's target
    Product described[kProducts];  // and the first products, a lane's each, without the places of their panels
    Header moving[kMostGranules];  // whose granules are in the area
    Barrier entry_full[kEntries], entry_empty[kEntries];
    Barrier weight_full[kMostGranules], weight_done[kMostGranules];
    Barrier panel_full[kMostPanels], panel_empty[kMostPanels];
    Route route;
    Geometry geometry;

    uint32_t groups;
    uint32_t group[kGroups + 1];  // tiles of the changed targets before each group of 32

    __device__ unsigned char* panels() { return area + geometry.granules * kGranule; }
    __device__ unsigned char* panel(uint32_t place) { return panels() + place * geometry.panel_bytes; }
};
static_assert(sizeof(Shared) + 1024 <= LSW_SWITCH90_SHARED, "the host asks for this much shared memory");

// How tiles that hold A are numbered: column by column in strips of one height. In a target columns begin at multiples of a power of two, so that
// the runs of a large launch take whole ones; numbers in between name no tile.
struct Strips {
    uint32_t count, height, pitch;
    __device__ __forceinline__ explicit Strips(uint32_t down)
        : count((down + kHeldRun - 1) / kHeldRun), height((down + count - 1) / count), pitch(height > 1 ? 2u << (31 - __clz(height - 1)) : 1) {}
};

// Tiles of a target; where consumers may hold A, of a target of whole strips.
__device__ __forceinline__ uint32_t tile_count(const LswTarget& t, bool in_strips) {
    const uint32_t down = (t.rows + kTile - 1) / kTile, across = (t.cols + kTile - 1) / kTile;
    if (!in_strips) return down * across;
    const Strips strips(down);
    return strips.count * strips.pitch * across;
}

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t x) {
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, x, step);
        if (threadIdx.x % 32 >= step) x += below;
    }
    return x;
}

// Tiles that a target needs under the new route.
__device__ __forceinline__ uint32_t changed_tiles(const LswSwitchArgs& args, const Route& route, uint32_t target, bool in_strips) {
    return is_changed(args, route, target) ? tile_count(target_of(args, target), in_strips) : 0;
}

// A is held where a target's ranks are deep and all its panels large, that is of 64. An adapter's last one costs a whole one then, with zeros behind
// its rank, which is less than A and B of every tile would; but not where there is little in it and rows of B begin in the middle of what L2 reads.
__device__ __forceinline__ bool is_large(uint32_t rank) {
    return panel_depth(rank) == 64 && (rank % 16 == 0 || (rank + 15) / 16 % 4 == 0);
}

// What a changed target asks of the geometry. Also: its tensor maps may have been written since this SM last saw them. A fence takes long, so
// all threads of the block have theirs at once, and maps that will not be used have none.
__device__ void meet_target(const LswSwitchArgs& args, Shared& s, uint32_t target) {
    for (int i = 0; i < 2; ++i) fence_tensor_map(target_maps(args, target) + i);
    uint32_t depth = 16, ranks = 0, large = 0, panels = 0, least_steps = ~0u, most_steps = 0;
    auto each = [&](auto visit) {
        auto at = [&](int slot) {
            const LswFactor& f = factor(args, target, slot);
            if (f.rank > 0) visit(f, factor_maps(args, target * args.slots + slot));
        };
        // As in lane_terms, but that a term whose coefficient does not count may be among them.
        const uint32_t held = args.in_place ? merged_count(args, target) : 0;
        for (uint32_t e = 0; e < s.route.count; ++e) {
            const int slot = s.route.slot[e];
            const float coefficient = coefficient_of(factor(args, target, slot), s.route.gate[e]);
            bool changes = true;
            for (uint32_t i = 0; i < held; ++i) {
                const LswMerged& m = merged(args, target)[i];
                changes = changes && !(m.slot == slot && m.coefficient == coefficient);
            }
            if (changes) at(slot);
        }
        for (uint32_t e = 0; e < held; ++e) {
            const int slot = merged(args, target)[e].slot;
            bool stays = false;
            for (uint32_t i = 0; i < s.route.count; ++i) stays = stays || s.route.slot[i] == slot;
            if (!stays) at(slot);
        }
    };
    each([&](const LswFactor& f, const LswMap*) {
        const uint32_t full = panel_depth(f.rank), last = (f.rank - 1) % full + 1;
        depth = max(depth, full);
        ranks += f.rank;
        large += is_large(f.rank) ? f.rank : 0;
        panels += (f.rank + full - 1) / full;
        least_steps = min(least_steps, (last + 15) / 16);
        most_steps = max(most_steps, (min(full, f.rank) + 15) / 16);
    });
    each([&](const LswFactor& f, const LswMap* maps) {
        if (~f.flags & (LSW_A_ALIGNED | LSW_B_ALIGNED)) s.geometry.has_unaligned = 1;
        if (f.flags & LSW_A_ALIGNED) fence_tensor_map(maps);
        if (f.flags & LSW_B_ALIGNED && (panels > kDeepStay || depth == 64)) fence_tensor_map(maps + 1);
    });
    atomicMax(&s.geometry.depth, depth);
    atomicMax(&s.geometry.most_ranks, ranks);
    atomicMax(&s.geometry.most_panels, panels);
    atomicMin(&s.geometry.least_steps, least_steps);
    atomicMax(&s.geometry.most_steps, most_steps);
    if (large > kDeep) s.geometry.may_hold = 1;
    if (large <= kDeep || large < ranks) s.geometry.may_not = 1;
}

// One thread. Memory likes all blocks close together, and the last blocks want tiles too. So a block grabs few tiles where it can, and nothing
// comes further ahead than it must: A by a tile and a half where ranks are shallow, and W, where the consumers have time to spare, by the next
// tile alone. Where they have not, W makes up for their hurry at the begin of a run: in place, and where panels are small, by up to four tiles.
// Deep ranks need longer runs; and the deepest take so long that W comes in time when the tile before it is done, and leaves its places to panels.
__device__ void lay_out(const LswSwitchArgs& args, Shared& s, uint32_t total, uint32_t blocks) {
    Geometry& g = s.geometry;
    const bool is_deep = g.most_ranks > kDeep, is_light = !is_deep && g.most_panels <= kLight;
    g.panel_bytes = g.depth * 256;
    const bool is_held = g.is_held = g.may_hold && !g.may_not;
    const bool is_short = is_held ? g.most_panels > 4 : is_deep || is_light;  // of places for panels, or not in need of W
    const bool is_deepest = is_held && g.most_panels > kMostHeld;
    g.granules = is_deepest ? kFewestGranules : is_short ? kFewGranules : args.in_place && g.depth == 16 ? kMostGranules : kGranules;
    g.panels = shared_address(s.panels());
    const uint32_t slots = min(kMostPanels, slots_of(g.granules, g.depth));
    if (is_held) {
        g.stays = is_deepest ? min(kHeldStay, g.most_panels - kFewHeld) : 0;
    } else if (g.depth == 64 && !is_light) {
        g.stays = kDeepStay;
    } else {
        g.stays = slots - max(1u, min(slots / 2, (3 * g.most_panels + 1) / 2));
    }
    g.passes = is_held ? min(slots - g.stays, kHeldPlaces) : slots - g.stays;
    const uint32_t unheld = is_deep ? kDeepGrab : is_light ? kLightGrab : kGrab;
    g.grab = max(1u, min(is_held ? kHeldRun : unheld, (total + blocks - 1) / blocks));
}

// All threads: the tiles of each group of 32 targets, then their prefix sum, and the geometry. Ends with a barrier.
__device__ void plan(const LswSwitchArgs& args, Shared& s) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto count = [&](bool in_strips, auto meet) {
        for (uint32_t g = warp; g < s.groups; g += kThreads / 32) {
            const uint32_t target = args.first + 32 * g + lane;
            const uint32_t tiles = changed_tiles(args, s.route, target, in_strips);
            if (tiles > 0) meet(target);
            const uint32_t sum = __reduce_add_sync(kFullWarp, tiles);
            if (lane == 0) s.group[g + 1] = sum;
        }
        __syncthreads();
    };
    count(false, [&](uint32_t target) { meet_target(args, s, target); });
    if (s.geometry.may_hold) count(true, [](uint32_t) {});
    if (warp == 0) {
        uint32_t carry = 0;
        for (uint32_t g = lane; g < (s.groups + 31) / 32 * 32; g += 32) {
            const uint32_t sum = carry + warp_inclusive_sum(g < s.groups ? s.group[g + 1] : 0);
            if (g < s.groups) s.group[g + 1] = sum;
            carry = __shfl_sync(kFullWarp, sum, 31);
        }
        if (lane == 0) s.group[0] = 0, lay_out(args, s, carry, gridDim.x);
    }
    __syncthreads();
}

// Where the scheduler is: its target, of which it keeps everything that a tile needs, so that a tile costs it no access to global memory.
struct Cursor {
    uint32_t group = ~0u, target = 0;
    uint32_t before_lane = 0, lane_tiles = 0;  // of this lane's target in the group
    uint32_t start = 0, end = 0;               // the target's tiles
    uint32_t panels = 0;                       // of A, and as many of B, over its staged terms
    uint32_t held = 0;                         // those of A, the first, that the consumers hold for a run of tiles
    uint32_t kind = 0;                         // for the header
    int rows = 0, cols = 0;                    // of the target
    int row = 0, col = 0;                      // of the tile
    int end_row = 0;                           // of its strip, where A is held

    __device__ void locate(uint32_t tile) {
        const uint32_t across = (cols + kTile - 1) / kTile, index = tile - start;
        if (held == 0) {
            row = index / across * kTile, col = index % across * kTile;
            return;
        }
        const Strips strips((rows + kTile - 1) / kTile);
        const uint32_t column = index / strips.pitch, top = column / across * strips.height;
        row = (top + index % strips.pitch) * kTile, col = column % across * kTile;
        end_row = min(rows, static_cast<int>(top + strips.height) * kTile);
    }
    // From the tile before it.
    __device__ void step(uint32_t tile) {
        if (held > 0) return locate(tile);
        col += kTile;
        if (col >= cols) col = 0, row += kTile;
    }
    __device__ bool exists() const { return row < (held == 0 ? rows : end_row); }
    __device__ bool ends_run() const { return held == 0 ? col + kTile >= cols : row + kTile >= end_row; }
};

__device__ __forceinline__ Term make_term(const LswSwitchArgs& args, uint32_t target, int slot, float coefficient) {
    const LswFactor& f = factor(args, target, slot);
    return {coefficient, f.rank | f.flags << 16, reinterpret_cast<const void*>(f.b), f.b_stride, target * args.slots + slot};
}

// A product of the staged terms, but for the places of its panels.
__device__ __forceinline__ Product describe(const Shared& s, uint32_t index) {
    const Term* term = s.staged;
    for (uint32_t n; index >= (n = term->panels()); ++term) index -= n;
    const uint32_t depth = term->depth(), k = index * depth, rank = term->rank();
    // B: rows of `depth` elements, swizzled over that width (1: 128 bytes, 2: 64, 3: 32). A: two blocks of 64 columns, [depth, 64] each.
    const uint32_t swizzle = depth == 64 ? 1 : depth == 32 ? 2 : 3;
    const uint32_t steps = (min(depth, rank - k) + 15) / 16, adds = index > 0, ends_term = k + depth >= rank;
    Product p;
    p.a_low = depth * 128 >> 4 << 16;
    p.b_high = depth * 16 >> 4 | swizzle << 30;
    for (uint32_t c = 0; c < kConsumers; ++c) p.b_low[c] = (1 << 16) + (c * depth * 128 >> 4);
    p.coefficient = term->coefficient;
    p.plan.bits = steps | adds << 3 | ends_term << 4;
    p.factor = term->factor, p.b = term->b, p.b_stride = term->b_stride;
    p.k = k, p.rank = rank, p.depth = depth, p.flags = term->flags();
    return p;
}

// One warp: moves on to the target that a tile belongs to.
__device__ void seek(const LswSwitchArgs& args, Shared& s, Cursor& at, uint32_t tile) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t g = 0;
    for (uint32_t step = kGroups / 2; step > 0; step /= 2) {
        if (g + step < s.groups && s.group[g + step] <= tile) g += step;
    }
    if (g != at.group) {
        at.group = g;
        at.lane_tiles = changed_tiles(args, s.route, args.first + 32 * g + lane, s.geometry.may_hold);
        at.before_lane = s.group[g] + warp_inclusive_sum(at.lane_tiles) - at.lane_tiles;
    }
    const uint32_t owner = __ffs(__ballot_sync(kFullWarp, at.before_lane <= tile && tile < at.before_lane + at.lane_tiles)) - 1;
    at.target = args.first + 32 * g + owner;
    at.start = __shfl_sync(kFullWarp, at.before_lane, owner);
    at.end = at.start + __shfl_sync(kFullWarp, at.lane_tiles, owner);
    const LswTarget& t = target_of(args, at.target);
    at.rows = t.rows, at.cols = t.cols;
    const LaneTerms terms = lane_terms(args, s.route, at.target);
    uint32_t ranks = 0, least = ~0u, most = 0;
    bool all_large = true;
    for (const int slot : {terms.enter_slot, terms.leave_slot}) {
        const uint32_t rank = slot < 0 ? 0 : factor(args, at.target, slot).rank;
        if (rank == 0) continue;
        const uint32_t panels = (rank + 63) / 64;
        ranks += rank, all_large = all_large && is_large(rank), least = min(least, panels), most = max(most, panels);
    }
    least = __reduce_min_sync(kFullWarp, least), most = __reduce_max_sync(kFullWarp, most);
    const uint32_t per = least == most && terms.count > 1 ? most : 1;
    const bool by_size = __all_sync(kFullWarp, all_large) && __reduce_add_sync(kFullWarp, ranks) > kDeep;
    __syncwarp();  // the last publish has read what was staged
    // Where consumers hold A: ascending by magnitude, equal ones as they come. So no quotient is above 1, and nothing overflows.
    auto key = [](int slot, float coefficient, uint32_t at) {
        return slot < 0 ? ~0ull : static_cast<uint64_t>(__float_as_uint(fabsf(coefficient))) << 32 | at;
    };
    const uint64_t enter = key(terms.enter_slot, terms.enter, terms.enter_at), leave = key(terms.leave_slot, terms.leave, terms.leave_at);
    uint32_t before_enter = 0, before_leave = 0;
    for (int i = 0; by_size && i < 32; ++i) {
        const uint64_t one = __shfl_sync(kFullWarp, enter, i), other = __shfl_sync(kFullWarp, leave, i);
        before_enter += (one < enter) + (other < enter);
        before_leave += (one < leave) + (other < leave);
    }
    uint32_t panels = 0;
    auto stage = [&](uint32_t place, int slot, float coefficient) {
        if (slot < 0) return;
        s.staged[place] = make_term(args, at.target, slot, coefficient);
        panels += s.staged[place].panels();
    };
    stage(by_size ? before_enter : terms.enter_at, terms.enter_slot, terms.enter);
    stage(by_size ? before_leave : terms.leave_at, terms.leave_slot, terms.leave);
    at.panels = __reduce_add_sync(kFullWarp, panels);
    at.held = by_size ? held_of(at.panels, per) : 0;
    at.kind = Header::kind(at.held, per, t.flags & LSW_WEIGHT_BLOCKS);
    __syncwarp();
    // Each but the last by the quotient of its coefficient and the next one's.
    for (uint32_t i = 0; by_size && i + 1 < terms.count; i += 32) {
        const bool has_next = i + lane + 1 < terms.count;
        const float quotient = has_next ? s.staged[i + lane].coefficient / s.staged[i + lane + 1].coefficient : 0.0f;
        __syncwarp();
        if (has_next) s.staged[i + lane].coefficient = quotient;
        __syncwarp();
    }
    if (lane < min(at.panels, kProducts)) s.described[lane] = describe(s, lane);
}

// Where panels find their places: passing ones go round and round, those that stay for a run begin where the last run's ended. A product's first
// place, its plan's A, is of the panel that comes for every tile: where A is held, B's.
struct Places {
    Ring passing, staying;

    // Passing panels of a tile before those of its product `index`. Held ones come where a run begins, the next have a place of their own to stay,
    // others come along.
    __device__ __forceinline__ static uint32_t passed(uint32_t held, uint32_t stay, uint32_t index, bool begins_run) {
        const uint32_t kept = held + stay;
        return index + (begins_run ? min(index, held) : 0) + max(index, kept) - kept;
    }
    // Of the product that comes as number `index` of its tile. A held panel has no place but at the beginning of a run: it says the first's.
    __device__ __forceinline__ void give(Product& p, const Geometry& g, uint32_t held, uint32_t stay, uint32_t index, bool begins_run,
                                         bool ends_run) const {
        const uint32_t before = passed(held, stay, index, begins_run), beyond = index - held;
        const bool is_held = index < held, stays = beyond < stay, comes = is_held ? begins_run : !stays;
        Ring a = passing, b = stays ? staying : passing;
        a.advance(before);
        b.advance(stays ? beyond : before + comes);
        const uint32_t a_slot = g.stays + a.slot, b_slot = stays ? b.slot : g.stays + b.slot, frees_b = comes || (stays && ends_run);
        p.a_low += g.panels + a_slot * g.panel_bytes >> 4;
        for (uint32_t c = 0; c < kConsumers; ++c) p.b_low[c] += g.panels + b_slot * g.panel_bytes >> 4;
        const uint32_t brings_both = comes || (stays && held > 0 && begins_run);
        p.plan.bits |= frees_b << 5 | a.parity << 6 | b.parity << 7 | a_slot << 8 | brings_both << 15 | b_slot << 16;
    }
};

// One warp: a tile becomes an entry of the ring, or several.
__device__ void publish(Shared& s, EntryRing& ring, Places& places, const Cursor& at, bool begins_run, bool ends_run) {
    const uint32_t lane = threadIdx.x % 32, stay = (at.held > 0) == s.geometry.is_held ? s.geometry.stays : 0;
    uint32_t left = at.panels;
    do {
        const uint32_t count = min(left, kProducts);
        s.entry_empty[ring.slot()].wait(ring.parity() ^ 1);
        Entry& entry = s.entry[ring.slot()];
        if (lane < count) {
            const uint32_t index = at.panels - left + lane;
            entry.products[lane] = index < kProducts ? s.described[lane] : describe(s, index);
            places.give(entry.products[lane], s.geometry, at.held, stay, index, begins_run, ends_run);
        }
        left -= count;
        if (lane == 0) {
            const uint32_t rows = min(at.rows - at.row, kTile);
            entry.header = {at.target, at.row, at.col, Header::pack(at.kind, count, rows, left == 0, begins_run)};
        }
        s.entry_full[ring.slot()].arrive();  // each lane for what it wrote
        ring.advance();
    } while (left > 0);
    places.passing.advance(Places::passed(at.held, stay, at.panels, begins_run));
    if (ends_run && stay > 0) places.staying.advance(min(at.panels - at.held, stay));
}

// Waits for the next entry.
__device__ __forceinline__ const Entry& next_entry(Shared& s, const EntryRing& ring) {
    s.entry_full[ring.slot()].wait(ring.parity());
    return s.entry[ring.slot()];
}

// `rows` x 128 elements as two blocks of 64 columns: in one box where the map knows blocks.
__device__ __forceinline__ void load_pair(unsigned char* to, const LswMap* map, bool blocks, int col, int row, int rows, Barrier& full,
                                          uint64_t policy) {
    if (blocks) return load_blocks(to, map, col / 64, row, full, policy);
    load_box(to, map, col, row, full, policy);
    load_box(to + rows * 128, map, col + 64, row, full, policy);
}

__device__ void run_scheduler(const LswSwitchArgs& args, Shared& s) {
    const bool leader = threadIdx.x % 32 == 0;
    const uint32_t grab = s.geometry.grab;
    EntryRing entries;
    Places places{Ring(s.geometry.passes), Ring(s.geometry.stays)};
    Cursor at;
    uint32_t taken = blockIdx.x;
    bool begins_run = true;
    while (taken * grab < s.group[s.groups]) {
        uint32_t next = 0;
        if (leader) next = gridDim.x + atomicAdd(&state(args)->next_tile, 1);
        const uint32_t end = min(s.group[s.groups], (taken + 1) * grab);
        bool jumps = true;
        for (uint32_t tile = taken * grab; tile < end; ++tile) {
            if (tile < at.start || tile >= at.end) seek(args, s, at, tile), jumps = true;
            jumps ? at.locate(tile) : at.step(tile);
            jumps = false;
            if (!at.exists() || (args.in_place && at.panels == 0)) continue;
            const bool ends_run = tile + 1 == end || at.ends_run();
            publish(s, entries, places, at, begins_run, ends_run);
            begins_run = ends_run;
        }
        taken = __shfl_sync(kFullWarp, next, 0);
    }
    at = {};
    at.kind = Header::kEnds;
    publish(s, entries, places, at, false, false);

    uint32_t is_last = 0;
    if (leader) {
        __threadfence();
        is_last = atomicAdd(&state(args)->blocks_done, 1) == gridDim.x - 1;
    }
    if (!__shfl_sync(kFullWarp, is_last, 0)) return;
    __threadfence();
    for (uint32_t target = args.first + threadIdx.x % 32; target < args.last; target += 32) record(args, s.route, target);
    if (leader) state(args)->next_tile = 0, state(args)->blocks_done = 0;
}

// One warp: element by element what a box copy would bring of a matrix that is not aligned, of 2^bits columns. `place` gives an element's byte in
// the panel.
template <class T, class Place>
__device__ void load_slowly(unsigned char* panel, const T* from, uint64_t stride, int rows, int bits, int valid_rows, int valid_cols, Place place) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < rows << bits; i += 32) {
        const int row = i >> bits, col = i & (1 << bits) - 1;
        const bool exists = row < valid_rows && col < valid_cols;
        *reinterpret_cast<T*>(panel + place(row, col)) = exists ? from[row * stride + col] : from_float<T>(0.0f);
    }
}

// A walk of one warp over the entries: `visit(tile, product)` for each product of those tiles that `wants` wants.
template <class Wants, class Visit> __device__ __forceinline__ void for_each_product(Shared& s, Wants wants, Visit visit) {
    for (EntryRing entries;; entries.advance()) {
        const Entry& entry = next_entry(s, entries);
        const Header& tile = entry.header;
        if (tile.is_end()) return;
        if (wants(tile)) {
            for (uint32_t i = 0; i < tile.products(); ++i) visit(tile, entry.products[i]);
        }
        s.entry_empty[entries.slot()].arrive();  // each lane for what it read
    }
}

// One warp, element by element: A and B, where the copy engine cannot.
template <class T> __device__ void load_a_slowly(const LswSwitchArgs& args, unsigned char* panel, const Header& tile, const Product& p) {
    const LswFactor& f = reinterpret_cast<const LswFactor*>(args.factors)[p.factor];
    const T* a = reinterpret_cast<const T*>(f.a) + static_cast<uint64_t>(p.k) * f.a_stride + tile.col;
    const int depth = p.depth;
    load_slowly(panel, a, f.a_stride, depth, 7, p.rank - p.k, static_cast<int>(target_of(args, tile.target).cols) - tile.col,
                [&](int row, int col) { return col / 64 * depth * 128 + swizzle(row * 128 + col % 64 * 2, 7); });
}
template <class T> __device__ void load_b_slowly(unsigned char* panel, const Header& tile, const Product& p) {
    const T* b = static_cast<const T*>(p.b) + static_cast<uint64_t>(tile.row) * p.b_stride + p.k;
    const int depth = p.depth;
    load_slowly(panel, b, p.b_stride, kTile, 31 - __clz(depth), tile.rows(), p.rank - p.k,
                [&](int row, int col) { return swizzle((row * depth + col) * 2, depth / 8 - 1); });
}

// A panel by the copy engine: A [depth, 128], as two blocks of 64 columns, or B [128, depth].
struct Box {
    const LswMap* map;
    int col, row, depth;
    bool is_a, blocks;

    __device__ __forceinline__ Box(const LswSwitchArgs& args, uint32_t factor, int k, int depth, const Header& tile, bool is_a)
        : map(factor_maps(args, factor) + !is_a), col(is_a ? tile.col : k), row(is_a ? k : tile.row), depth(depth), is_a(is_a),
          blocks(tile.blocks()) {}
    __device__ __forceinline__ void load(unsigned char* panel, Barrier& full) const {
        full.arrive_expecting(depth * 256);
        if (is_a) return load_pair(panel, map, blocks, col, row, depth, full, kEvictLast);
        load_box(panel, map, col, row, full, kEvictLast);
    }
};

// A consumer waits for every instruction between a free place and its load, so what a load needs is read before.

// One thread, where no A is held and the copy engine can bring all: of each product A, and B, where it has no place to stay.
__device__ void bring_boxes(const LswSwitchArgs& args, Shared& s) {
    const uint32_t panel_bytes = s.geometry.panel_bytes;
    unsigned char* panels = s.panels();
    for (EntryRing entries;; entries.advance()) {
        const Entry& entry = next_entry(s, entries);
        const Header tile = entry.header;
        if (tile.is_end()) return;
        const uint32_t products = tile.products();
        auto bring = [&](uint32_t slot, uint32_t parity, const Box& box) {
            s.panel_empty[slot].wait(parity ^ 1);
            box.load(panels + slot * panel_bytes, s.panel_full[slot]);
        };
        Plan next = entry.products[0].plan;
        int4 next_words = reinterpret_cast<const int4*>(entry.products)[2];
        for (uint32_t i = 0; i < products; ++i) {
            const Plan plan = next;
            const int4 words = next_words;
            const Product& behind = entry.products[min(i + 1, products - 1)];
            next = behind.plan, next_words = reinterpret_cast<const int4*>(&behind)[2];
            const int k = words.y & 0xffff, depth = words.z & 0xffff;
            bring(plan.a_slot(), plan.a_parity(), Box(args, words.x, k, depth, tile, true));
            if (plan.brings_both()) bring(plan.b_slot(), plan.b_parity(), Box(args, words.x, k, depth, tile, false));
        }
        s.entry_empty[entries.slot()].arrive(32);
    }
}

// One warp, for all others; where A is held, of each product B comes, and A for a run of tiles or with it.
template <class T> __device__ void bring_panels(const LswSwitchArgs& args, Shared& s) {
    for_each_product(s, [](const Header&) { return true; }, [&](const Header& tile, const Product& p) {
        const uint32_t places = 1 + p.plan.brings_both();
#pragma unroll 1
        for (uint32_t i = 0; i < places; ++i) {
            const bool is_a = (tile.held() > 0) == i, by_box = p.flags & (is_a ? LSW_A_ALIGNED : LSW_B_ALIGNED);
            const uint32_t slot = i > 0 ? p.plan.b_slot() : p.plan.a_slot(), parity = i > 0 ? p.plan.b_parity() : p.plan.a_parity();
            const Box box(args, p.factor, p.k, p.depth, tile, is_a);
            unsigned char* panel = s.panel(slot);
            s.panel_empty[slot].wait(parity ^ 1);
            if (!by_box) {
                is_a ? load_a_slowly<T>(args, panel, tile, p) : load_b_slowly<T>(panel, tile, p);
                fence_async_shared();
                __syncwarp();
                if (threadIdx.x % 32 == 0) s.panel_full[slot].arrive();
            } else if (elect_one()) {
                box.load(panel, s.panel_full[slot]);
            }
            __syncwarp();
        }
    });
}

// One warp: B [128, depth] by plain copies of 16 bytes, zeros where there is nothing.
template <class T> __device__ __forceinline__ void load_b(unsigned char* panel, const Header& tile, const Product& p) {
    const int depth = p.depth;
    const int lane = threadIdx.x % 32, shift = depth == 64 ? 3 : depth == 32 ? 2 : 1, mask = (1 << shift) - 1;  // 8, 4 or 2 copies a row
    const int first = lane >> shift, step = 32 >> shift, column = p.k + (lane & mask) * 8;
    const int bytes = max(0, min(16, 2 * (p.rank - column)));
    const T* from = static_cast<const T*>(p.b) + static_cast<uint64_t>(tile.row + first) * p.b_stride + column;
    const uint64_t stride = static_cast<uint64_t>(step) * p.b_stride;
    const uint32_t to = shared_address(panel);
    const int rows = bytes > 0 ? tile.rows() : 0;
    uint32_t at = lane * 16;
#pragma unroll 8
    for (int m = first; m < kTile; m += step, at += 512, from += stride) {
        copy16_partly(to + swizzle(at, mask), m < rows ? from : static_cast<const T*>(p.b), m < rows ? bytes : 0, kEvictLast);
    }
    copy_commit();
    copy_wait<0>();
}

// Four warps: each has every fourth place of B that stays, and fills it when a run begins.
template <class T> __device__ void run_loaders(Shared& s, uint32_t loader) {
    for_each_product(s, [](const Header& tile) { return tile.begins_run() && tile.held() == 0; }, [&](const Header& tile, const Product& p) {
        const uint32_t slot = p.plan.b_slot();
        if (slot >= s.geometry.stays || slot % kLoaders != loader) return;
        unsigned char* panel = s.panel(slot);
        s.panel_empty[slot].wait(p.plan.b_parity() ^ 1);
        if (p.flags & LSW_B_ALIGNED) {
            load_b<T>(panel, tile, p);
        } else {
            load_b_slowly<T>(panel, tile, p);
        }
        fence_async_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) s.panel_full[p.plan.b_slot()].arrive();
    });
}

// One thread for each consumer: brings its granules of W, as far ahead as there are places, and has them stored when they are done.
__device__ void run_weights(const LswSwitchArgs& args, Shared& s, int consumer) {
    Header(&moving)[kMostGranules] = s.moving;
    EntryRing entries;
    Ring coming(s.geometry.granules, consumer), going = coming;
    const uint32_t all = s.geometry.granules / kConsumers;
    uint32_t places = all;
    auto next_tile = [&] {
        for (;;) {
            const Header tile = next_entry(s, entries).header;
            s.entry_empty[entries.slot()].arrive();
            entries.advance();
            if (tile.is_end() || tile.ends_tile()) return tile;
        }
    };
    // What a load or a store needs is read before its place is free: a place that waits is lacking in what is in flight.
    for (Header next = next_tile();;) {
        for (; !next.is_end() && places > 0; next = next_tile()) {
            moving[coming.slot] = next;
            Barrier& full = s.weight_full[coming.slot];
            full.arrive_expecting(kGranule);
            load_pair(s.area + coming.slot * kGranule, target_maps(args, next.target) + 1, next.blocks(), next.col, next.row + 64 * consumer, 64,
                      full, kEvictNormal);
            coming.advance(kConsumers), --places;
        }
        if (places == all) break;
        const Header tile = moving[going.slot];
        const unsigned char* granule = s.area + going.slot * kGranule;
        const LswMap* map = target_maps(args, tile.target);
        const int row = tile.row + 64 * consumer;
        s.weight_done[going.slot].wait(going.parity);
        if (tile.blocks()) {
            store_blocks(map, tile.col / 64, row, granule);
        } else {
            store_box(map, tile.col, row, granule);
            store_box(map, tile.col + 64, row, granule + kHalf);
        }
        store_commit();
        store_wait_read();
        going.advance(kConsumers), ++places;
    }
    store_wait();
}

// product = or += B_j A_j over kSteps times 16 of the rank. Straight-line code: around a loop ptxas would put a group of its own on every
// wgmma. 16 columns of B are 32 bytes along its rows; 16 rows of A are 2,048 bytes.
template <int kSteps, class T> __device__ __forceinline__ void multiply_steps(float (&product)[64], uint64_t b, uint64_t a, bool add) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) wgmma(product, b + (32 * i >> 4), a + (2048 * i >> 4), add || i > 0, T{});
    wgmma_commit();
}
template <int kSteps, class T>
__device__ __forceinline__ void multiply(float (&product)[64], uint64_t b, uint64_t a, uint32_t steps, bool add) {
    if constexpr (kSteps > 0) return multiply_steps<kSteps, T>(product, b, a, add);
    // Nested so that no jump table comes of it, whose load would stand before every product.
    if (steps < 3) {
        if (steps < 2) return multiply_steps<1, T>(product, b, a, add);
        return multiply_steps<2, T>(product, b, a, add);
    }
    if (steps < 4) return multiply_steps<3, T>(product, b, a, add);
    multiply_steps<4, T>(product, b, a, add);
}

// Read by the lane that will give the entry back. All know the same, and so does the compiler; but not of the coefficient, which it would put
// into a uniform register, and that slows the fmas down. Hence a lane 0 that it does not see through.
__device__ __forceinline__ Work take(const Product& product, int consumer) {
    int4 words{};
    uint32_t b_low = 0;
    if (threadIdx.x % 32 == 0) words = reinterpret_cast<const int4&>(product), b_low = product.b_low[consumer];
    auto all = [](auto word) { return __shfl_sync(kFullWarp, word, 0); };
    const int coefficient = __shfl_sync(kFullWarp, words.z, threadIdx.x >> 10);
    const uint32_t a_low = all(words.x), b_high = all(words.y), plan = all(words.w);
    return {a_low, b_high, __int_as_float(coefficient), {plan}, all(b_low)};
}

// A consumer's way through the entries: its granule of W's tile, in registers from when its last product runs; or, where some targets' A is held
// (kShares), 64 columns of both. There both consumers must see all phases of both granules, whatever the target.
template <bool kShares> struct Consumer {
    Shared& s;
    const int consumer;
    const bool leader = threadIdx.x % 32 == 0;
    EntryRing entries;
    Ring weights{s.geometry.granules, static_cast<uint32_t>(consumer)};
    uint32_t packed;  // of the entry that is about to be opened, as the leader has read it
    Header tile;      // of the entry: nothing but what is packed
    uint32_t index;   // of the entry's next product
    Work next;
    bool is_ready;  // whether its panels are there
    unsigned char* granule;

    __device__ __forceinline__ Consumer(Shared& s, int consumer) : s(s), consumer(consumer) { open(); }
    // In two parts: what is read takes its time.
    __device__ __forceinline__ void begin_open() {
        const Entry& entry = next_entry(s, entries);
        if (leader) packed = entry.header.packed;
    }
    __device__ __forceinline__ void end_open() { tile.packed = __shfl_sync(kFullWarp, packed, 0); }
    __device__ __forceinline__ void open() { begin_open(), end_open(), index = 0; }
    __device__ __forceinline__ void close() {
        s.entry_empty[entries.slot()].arrive_if(leader);
        entries.advance();
    }
    __device__ __forceinline__ bool ends_entry() const { return index == tile.products(); }
    __device__ __forceinline__ void look() {
        next = take(s.entry[entries.slot()].products[index++], consumer);
        const Plan& p = next.plan;
        is_ready = test_both(s.panel_full[p.b_slot()], p.b_parity(), s.panel_full[p.a_slot()], p.a_parity());
    }
    __device__ __forceinline__ void wait_ready() {
        const Plan& p = next.plan;
        if (!is_ready) wait_both(s.panel_full[p.b_slot()], p.b_parity(), s.panel_full[p.a_slot()], p.a_parity());
    }
    __device__ __forceinline__ void release(const Plan& p) {
        s.panel_empty[p.a_slot()].arrive_if(leader);
        s.panel_empty[p.b_slot()].arrive_if(leader && p.frees_b());
    }
    __device__ __forceinline__ void wait_weight() {
        granule = s.area + weights.slot * kGranule;
        s.weight_full[weights.slot].wait(weights.parity);
        if (kShares) s.weight_full[weights.slot ^ 1].wait(weights.parity);
    }
    __device__ __forceinline__ void take_weight(Fragment<kTile>& weight) {
        wait_weight();
        weight.load(granule);
    }
    __device__ __forceinline__ void give_weight() {
        fence_async_shared();
        __syncwarp();
        const uint32_t lane = threadIdx.x % 32;  // two arrive: one at each granule, or for the other consumer, which does not use this one
        s.weight_done[kShares ? weights.slot ^ lane & 1 : weights.slot].arrive_if(lane < kConsumers);
        weights.advance(kConsumers);
    }
};

// Tiles of one kind. Under a product its successor is looked up; under a tile's last one W's fragment is taken; under the next tile's first
// one the sum is added to it. kSteps: those of every product of this launch, 0 where they differ. kHolds: whether the other kind may follow.
template <class T, int kSteps, bool kHolds> __device__ __forceinline__ void add(Consumer<kHolds>& c) {
    float sum[64], product[64] = {};
    Fragment<kTile> weight;
    auto issue = [&] {
        c.wait_ready();
        const Plan& p = c.next.plan;
        multiply<kSteps, T>(product, c.next.b(), c.next.a(), p.steps(), p.adds());
    };
    // Waits for the product and frees its panels; after the last one of a term: sum += coefficient * product.
    auto finish = [&](const Work& work) {
        wgmma_wait<0>();
        c.release(work.plan);
        if (!work.plan.ends_term()) return;
#pragma unroll
        for (int j = 0; j < 64; ++j) sum[j] = fmaf(work.coefficient, product[j], sum[j]);
    };
    auto add_and_give = [&] {
        weight.template add_and_store<T>(c.granule, sum, 1.0f);
        c.give_weight();
    };

    c.look(), issue();
    for (;;) {
#pragma unroll
        for (int j = 0; j < 64; ++j) sum[j] = 0.0f;
        Work work = c.next;
        for (;; work = c.next) {
            if (c.ends_entry()) {
                if (c.tile.ends_tile()) break;
                c.close();
                c.open();
            }
            c.look();
            finish(work);
            issue();
        }
        c.close();
        c.open();
        const bool goes_on = c.tile.products() > 0 && !(kHolds && c.tile.held() > 0);
        if (goes_on) c.look();
        c.take_weight(weight);
        finish(work);
        if (!goes_on) return add_and_give();
        if (c.is_ready) {
            issue();
            add_and_give();
        } else {  // W does not wait for panels
            add_and_give();
            issue();
        }
    }
}

// Tiles of deep ranks: A's first panels stay in registers for a run of tiles one below the other, as wgmma's first operand, so the product is
// W's transpose: a consumer has 64 columns. Coefficients ascend in magnitude, and after each term but the last the accumulator is multiplied
// by the quotient of its coefficient and the next one's, so that the last coefficient is all that is missing in the end. What falls below
// 2^-149 of the last coefficient on the way is lost.
//
// Shared memory is busy with panels, and whoever reads it waits 100 cycles and more; so does whoever hears of it by shuffle before it issues. So
// of the products whose A is held only the place of a tile's first one is read, a tile ahead. The others' panels of B follow in the ring
// (Places::passed; behind each, where a run begins, the panel of A that is held from there on), and their coefficients are those of the run.
//
// ptxas serialises all wgmma where it loses track of what runs: among held panels nothing runs over a branch that joins another way or over the end
// of a loop, among others it is found (tests/resources.rs) to keep track; and whoever reads an accumulator has waited by its name.
template <class T, int kHeld, int kPer> __device__ __forceinline__ void add_held(Consumer<true>& c) {
    Shared& s = c.s;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    uint32_t held[kHeld][4][4] = {};
    float sum[64] = {};
    float factors = 0.0f;  // lane i has that of the sum after a run's product i
    const uint32_t stays = s.geometry.stays, panels = s.geometry.panels >> 4;
    Ring passing(s.geometry.passes);
    Plan plan{};              // of a tile's first product, as the leader has read it
    bool has_weight = false;  // the last tile's, with the sum: the fence that gives it back waits for its stores, so a product runs before
    auto fetch = [&] {
        if (c.leader) plan = s.entry[c.entries.slot()].products[0].plan;
    };
    // A^T [64, 64] of a panel: of warp w its 16 columns.
    auto hold = [&](uint32_t (&a)[4][4], uint32_t place) {
        const unsigned char* panel = s.panel(place) + c.consumer * kHalf;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            ldmatrix4_transposed(a[i], panel + swizzle((16 * i + lane / 16 * 8 + lane % 8) * 128 + (2 * warp + lane / 8 % 2) * 16, 7));
        }
        __syncwarp();
        s.panel_empty[place].arrive_if(c.leader);
    };
    auto scale = [&](float coefficient) {
#pragma unroll
        for (int j = 0; j < 64; ++j) sum[j] *= coefficient;
    };

    fetch();
    do {
        plan.bits = __shfl_sync(kFullWarp, plan.bits, 0);
        passing.slot = plan.a_slot() - stays, passing.parity = plan.a_parity();
        const bool begins = c.tile.begins_run();
        if (begins) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                const Work work = take(s.entry[c.entries.slot()].products[i], c.consumer);
                if (lane == i) factors = work.factor();
            }
        }
        Plan last{};  // what the last product leaves
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (i > 0) passing.advance();
            const uint32_t place = stays + passing.slot;
            s.panel_full[place].wait(passing.parity);
            if (begins) {
                passing.advance();
                s.panel_full[stays + passing.slot].wait(passing.parity);
                hold(held[i], stays + passing.slot);
            }
            const bool begins_term = i % kPer == 0;  // kPer = 1: or goes on with one, after a factor of 1
            if (i > 0 && begins_term) {
                const float factor = __shfl_sync(kFullWarp, factors, i - 1);
                wgmma_wait<0>(sum);
                c.release(last);
                scale(factor);
            }
            const uint64_t b = rows_of_128(panels + place * (64 * 256 >> 4) | 1 << 16);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) wgmma_k_major(sum, held[i][k], b + (32 * k >> 4), i + k > 0, T{});
            wgmma_commit();
            if (i == 0 && has_weight) c.give_weight();
            if (!begins_term) {
                wgmma_wait<1>();
                c.release(last);
            }
            last = Plan::leaves(place, 0, false);
        }
        c.index = kHeld;
        float factor = __shfl_sync(kFullWarp, factors, kHeld - 1);
        if (kHeld > 3) {
            while (!c.ends_entry() || !c.tile.ends_tile()) {
                if (c.ends_entry()) c.close(), c.open();
#pragma unroll
                for (int i = 0; i < kPer; ++i) {
                    c.look();
                    if (i == 0) {
                        wgmma_wait<0>(sum);
                        c.release(last);
                        scale(factor);
                    }
                    c.wait_ready();
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 4; ++k) wgmma_m_major(sum, c.next.b() + (2048 * k >> 4), c.next.a() + (32 * k >> 4), true, T{});
                    wgmma_commit();
                    if (i > 0) {
                        wgmma_wait<1>();
                        c.release(last);
                    }
                    last = c.next.plan;
                }
                factor = c.next.factor();
            }
        }
        c.close();
        c.begin_open();
        fetch();
        wgmma_wait<0>(sum);
        c.release(last);  // B's place does not wait for W
        c.end_open();
        c.wait_weight();
        unsigned char* granules = c.granule - c.consumer * kGranule;
        // W's transpose, 32 of its rows at a time.
#pragma unroll
        for (int first = 0; first < kTile / 16; first += 2) {
            uint32_t words[2][4];
            auto at = [&](int j) {
                const int row = 16 * (first + j) + lane / 16 * 8 + lane % 8;
                return granules + row / 64 * kGranule + c.consumer * kHalf + swizzle(row % 64 * 128 + (2 * warp + lane / 8 % 2) * 16, 7);
            };
#pragma unroll
            for (int j = 0; j < 2; ++j) ldmatrix4_transposed(words[j], at(j));
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                add_to<T>(words[j], sum + 8 * (first + j), factor);
                stmatrix4_transposed(at(j), words[j]);
            }
        }
        has_weight = true;
    } while (c.tile.held() == kHeld && c.tile.per() == kPer);
    c.give_weight();
    c.index = 0;  // another kind looks at the first product itself
}

template <class T> __device__ __forceinline__ void add_any_held(Consumer<true>& c) {
    const uint32_t held = c.tile.held(), per = c.tile.per();
    if (per == 4) return add_held<T, kMostHeld, 4>(c);
    if (per == 3) return add_held<T, kFewHeld, 3>(c);
    if (per == 2) {
        if (held == 4) return add_held<T, 4, 2>(c);
        if (held == kFewHeld) return add_held<T, kFewHeld, 2>(c);
        return add_held<T, kMostHeld, 2>(c);
    }
    if (held == 3) return add_held<T, 3, 1>(c);
    if (held == 4) return add_held<T, 4, 1>(c);
    if (held == kFewHeld) return add_held<T, kFewHeld, 1>(c);
    add_held<T, kMostHeld, 1>(c);
}

template <class T, int kSteps, bool kHolds = false> __device__ __forceinline__ void run_consumer(Shared& s, int consumer) {
    for (Consumer<kHolds> c(s, consumer); !c.tile.is_end();) {
        if (c.tile.products() == 0) {  // what is base is copied
            Fragment<kTile> weight;
            c.take_weight(weight);
            c.give_weight();
            c.close();
            c.open();
        } else if (kHolds && c.tile.held() > 0) {
            if constexpr (kHolds) add_any_held<T>(c);
        } else {
            add<T, kSteps, kHolds>(c);
        }
    }
}

__device__ void init_barriers(Shared& s) {
    for (uint32_t i = 0; i < kEntries; ++i) {
        s.entry_full[i].init(32);                            // the scheduler's lanes
        s.entry_empty[i].init(32 * (1 + kLoaders) + 2 + 8);  // those of panels and loaders; weights; consumers' warps
    }
    for (uint32_t i = 0; i < kMostPanels; ++i) s.panel_full[i].init(1), s.panel_empty[i].init(8);  // who brings it; consumers
    for (uint32_t i = 0; i < kMostGranules; ++i) s.weight_full[i].init(1), s.weight_done[i].init(8);
    fence_barrier_init();
}

template <class T> __device__ __forceinline__ void switch_all(const LswSwitchArgs& args) {
    if (args.first >= args.last) return;
    extern __shared__ unsigned char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);  // uniform, and the compiler knows
    if (warp == 0) canonical_route(args, s.route);
    if (threadIdx.x == 32) {
        init_barriers(s);
        s.geometry = {};
        s.geometry.depth = 16, s.geometry.least_steps = ~0u;
        s.groups = (args.last - args.first + 31) / 32;
    }
    __syncthreads();
    plan(args, s);
    // Nothing to do: every block finds the same, so there is no queue to reset and nothing to record.
    if (s.group[s.groups] == 0) return;

    if (warp < 4) {
        give_registers<kProducerRegisters>();
        if (warp == 0) run_scheduler(args, s);
        if (warp == 1) {
            if (s.geometry.may_hold || s.geometry.has_unaligned) {
                bring_panels<T>(args, s);
            } else if (elect_one()) {
                bring_boxes(args, s);
            }
        }
        if (warp >= 2 && elect_one()) run_weights(args, s, warp - 2);
    } else if (warp < 8) {
        give_registers<kLoaderRegisters>();
        run_loaders<T>(s, warp - 4);
    } else {
        take_registers<kConsumerRegisters>();
        const int consumer = warp / 4 - 2;
        const uint32_t steps = s.geometry.most_steps == s.geometry.least_steps ? s.geometry.most_steps : 0;
        if (s.geometry.may_hold) {
            run_consumer<T, 0, true>(s, consumer);
        } else if (steps == 1) {
            run_consumer<T, 1>(s, consumer);
        } else if (steps == 2) {
            run_consumer<T, 2>(s, consumer);
        } else if (steps == 4) {
            run_consumer<T, 4>(s, consumer);
        } else {
            run_consumer<T, 0>(s, consumer);
        }
    }
}

}  // namespace

#define LSW_SWITCH90(suffix, T)                                                  \
    extern "C" __global__ void __launch_bounds__(LSW_SWITCH90_THREADS, 1)        \
        lsw_switch_##suffix##_sm90(const __grid_constant__ LswSwitchArgs args) { \
        switch_all<T>(args);                                                     \
    }
LSW_SWITCH90(f16, __half)
LSW_SWITCH90(bf16, __nv_bfloat16)
