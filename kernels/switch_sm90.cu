// The switch on Hopper: the contract of switch.cu, for f16 and bf16 targets whose W and W_base have addresses, row strides and row bytes
// that are multiples of 16 (the copy engine stores whole 16 bytes: past a ragged row it would zero its neighbour).
//
// Floor: W is read once and written once. Everything else hides behind that stream or is overhead.
//
// One block an SM, five roles that hand a 128 x 128 tile from one to the next through mbarriers:
//
//   scheduler (warp 0)  takes tiles from the queue, works out the target's terms, publishes both, and has the copy engine bring W
//   panels    (warp 1)  per term and 64 of its rank: A [<= 64, 128], by the copy engine
//   loaders   (warps 4 to 7)  and B [128, <= 64], by plain copies, each warp every fourth
//   consumers (2 x 128) each 64 rows: wgmma per term into `product`, sum += coefficient * product; then W's granule is changed in place in
//                       shared memory (ldmatrix, add in f32, one rounding, stmatrix)
//   stores    (warps 2, 3) have the copy engine write a granule back and free its place
//
// The product of a tile starts before its W arrives, and W runs up to three tiles ahead. A block takes a few tiles in a row, and B stays in
// shared memory for that run; where a target has more panels than can stay, the rest passes through A's ring, tile by tile.
//
// A consumer is bound by the latency of its own instructions, not by the tensor cores: two warps a scheduler, and a term is a chain of wait,
// product, fmas. So whatever the next product needs is worked out while the last one runs.
//
// Why it is right:
// - Both operands come as PEFT stores them. B [out, rank] is K-major, A [rank, in] is N-major: wgmma takes both layouts by descriptor.
// - The copy engine fills what lies outside a matrix with zeros and writes nothing there: ragged targets and ranks need no other code,
//   and bytes beyond the rank never enter a product.
// - An adapter whose own rows are not aligned comes through plain loads into the same swizzled places (load_slowly), so that a refill
//   never changes which launch serves a target.
// - Exactness and the order of sums are those of switch.cu, but that the tensor cores sum in another grouping.
// - The last block to leave the queue records. Only schedulers read the old record, and by then all of them are done with it.
//
// Memory order first: blocks take tiles from one counter, so that all SMs work close together in memory (long private strips cost 6-10%). What a
// run of tiles saves on B it can lose there: three tiles are best until the ranks add up to more than 128.
// Every layout assumption is asserted where it is used.
#include "args.h"
#include "common/num.cuh"
#include "common/ptx_sm90.cuh"
#include "common/switch_plan.cuh"

namespace {

constexpr int kThreads = LSW_SWITCH90_THREADS;
constexpr int kTile = LSW_SWITCH90_TILE;
constexpr int kGroups = LSW_SWITCH90_GROUPS;
constexpr int kHalf = 64 * 128;             // bytes of 64 rows of 64 elements: one swizzle atom wide
constexpr int kGranule = 2 * kHalf;         // bytes: 64 rows of W's tile, its left and right 64 columns
constexpr int kArea = 13 * kGranule;        // bytes for granules of W and panels of A and B
constexpr uint32_t kMostGranules = 6, kFewestGranules = 4;
static_assert(kMostGranules % 2 == 0 && kFewestGranules % 2 == 0, "a place stays with one consumer: who waits at a barrier sees all its phases");
constexpr uint32_t kMostPanels = (kArea - kMostGranules * kGranule) / (16 * 256);  // of the smallest
constexpr uint32_t kFewestStay = 4;         // panels of B, of the largest
constexpr uint32_t kLoaders = 4;            // warps
static_assert(kFewestStay >= kLoaders, "a loader that comes to a place must not be two uses ahead of it");
constexpr uint32_t kGrab = 3, kDeepGrab = 32;  // tiles that a block takes at a time
constexpr uint32_t kDeep = 128;                // a sum of ranks beyond which panels are scarcer than granules
constexpr int kEntries = 4;                 // tiles between the scheduler and the slowest role
constexpr uint32_t kEnd = ~0u;

// A block starts with 128 registers a thread and can only share these out: asking for one more waits for ever.
constexpr int kProducerRegisters = 64, kConsumerRegisters = 192;
static_assert(256 * kProducerRegisters + 256 * kConsumerRegisters <= 512 * 128, "registers of a block");

static_assert(kThreads == 512 && kTile == 128, "two warpgroups of producers, two of consumers of 64 rows each");

// Columns of the rank that one panel holds: the smallest box that a small rank fits in. The host encodes the maps by the same rule.
__device__ __forceinline__ int panel_depth(uint32_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

struct alignas(16) Term {
    // For the consumers, in one load.
    float coefficient;
    uint32_t rank_and_flags;  // the rank in the low half
    uint32_t a_layout, b_layout;  // words of wgmma's descriptors
    // For those who bring panels.
    const void* b;
    uint32_t b_stride;
    uint32_t factor;  // target * slots + slot

    __device__ int rank() const { return rank_and_flags & 0xffff; }
    __device__ int depth() const { return panel_depth(rank()); }
    __device__ bool is(uint32_t flag) const { return rank_and_flags >> 16 & flag; }
};

// A tile on its way through the roles.
struct alignas(16) Header {
    uint32_t target;  // kEnd: there are no more
    int row, col;
    uint32_t packed;  // terms, rows of the matrix in the tile, whether it begins and ends a run, whether LSW_WEIGHT_BLOCKS

    __device__ static uint32_t pack(uint32_t terms, uint32_t rows, bool begins, bool ends, bool blocks) {
        return terms | rows << 8 | (begins ? 1u << 29 : 0) | (ends ? 1u << 30 : 0) | (blocks ? 1u << 31 : 0);
    }
    __device__ uint32_t terms() const { return packed & 0xff; }
    __device__ int rows() const { return packed >> 8 & 0xff; }
    __device__ bool begins_run() const { return packed >> 29 & 1; }
    __device__ bool ends_run() const { return packed >> 30 & 1; }
    __device__ bool blocks() const { return packed >> 31; }
};
static_assert(2 * LSW_MAX_K < 256 && kTile < 256, "packed");
struct Entry {
    Header header;
    Term terms[2 * LSW_MAX_K];
};

// How this launch uses the area: by the deepest panel of its route. Every block works it out for itself, to the same result.
struct Geometry {
    uint32_t depth;        // 16, 32 or 64 of the rank
    uint32_t panel_bytes;  // A [depth, 128] or B [128, depth]
    uint32_t granules;     // of W in flight, at the area's begin
    uint32_t stays;        // panels behind them, of B, for a run of tiles
    uint32_t passes;       // and behind those, for one tile: of A, and of B where there is no place to stay
    uint32_t most_ranks, most_panels;  // that a target may need
    uint32_t grab;                     // consecutive tiles that a block takes at a time
};

// The copy engine's swizzle repeats every 1,024 bytes: granules and panels stand at multiples of that.
struct Shared {
    unsigned char area[kArea];
    Entry entry[kEntries];
    Term staged[2 * LSW_MAX_K];  // the terms of the scheduler's target
    Barrier entry_full[kEntries], entry_empty[kEntries];
    Barrier weight_full[kMostGranules], weight_done[kMostGranules], weight_empty[kMostGranules];
    Barrier panel_full[kMostPanels], panel_empty[kMostPanels];
    Route route;
    Geometry geometry;

    uint32_t groups;
    uint32_t group[kGroups + 1];  // tiles of the changed targets before each group of 32

    __device__ unsigned char* panels() { return area + geometry.granules * kGranule; }
};
static_assert(sizeof(Shared) + 1024 <= LSW_SWITCH90_SHARED, "the host asks for this much shared memory");

// A place in a ring, and the parity of its current use.
struct Ring {
    uint32_t size, slot = 0, parity = 0;
    __device__ explicit Ring(uint32_t size, uint32_t slot = 0) : size(size), slot(slot) {}
    __device__ __forceinline__ void advance(uint32_t steps = 1) {
        slot += steps;
        if (slot >= size) slot -= size, parity ^= 1;
    }
};

// The copy engine's swizzle of rows of 32, 64 or 128 bytes: the mask is that of their 16-byte chunks, 1, 3 or 7.
__device__ __forceinline__ uint32_t swizzle(uint32_t at, uint32_t mask) { return at ^ (at >> 7 & mask) << 4; }

__device__ __forceinline__ uint32_t tile_count(const LswTarget& t) { return ((t.rows + kTile - 1) / kTile) * ((t.cols + kTile - 1) / kTile); }

__device__ __forceinline__ const LswMap* factor_maps(const LswSwitchArgs& args, uint32_t factor) {
    return reinterpret_cast<const LswMap*>(args.factor_maps) + 2 * static_cast<uint64_t>(factor);
}
__device__ __forceinline__ const LswMap* target_maps(const LswSwitchArgs& args, uint64_t target) {
    return reinterpret_cast<const LswMap*>(args.target_maps) + 2 * target;
}

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t x) {
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, x, step);
        if (threadIdx.x % 32 >= step) x += below;
    }
    return x;
}

// Tiles that a target needs under the new route.
__device__ __forceinline__ uint32_t changed_tiles(const LswSwitchArgs& args, const Route& route, uint32_t target) {
    return is_changed(args, route, target) ? tile_count(target_of(args, target)) : 0;
}

// What a changed target asks of the geometry; an adapter in both routes counts twice. Also: its tensor maps may have been written since this SM
// last saw them. A fence takes long, so all threads of the block have theirs at once, and maps that will not be used have none.
__device__ void meet_target(const LswSwitchArgs& args, Shared& s, uint32_t target) {
    for (int i = 0; i < 2; ++i) fence_tensor_map(target_maps(args, target) + i);
    uint32_t depth = 16, ranks = 0, panels = 0;
    auto each = [&](auto visit) {
        auto at = [&](int slot) {
            const LswFactor& f = factor(args, target, slot);
            if (f.rank > 0) visit(f, factor_maps(args, target * args.slots + slot));
        };
        for (uint32_t e = 0; e < s.route.count; ++e) at(s.route.slot[e]);
        const uint32_t held = args.in_place ? merged_count(args, target) : 0;
        for (uint32_t e = 0; e < held; ++e) at(merged(args, target)[e].slot);
    };
    each([&](const LswFactor& f, const LswMap*) {
        const uint32_t own = panel_depth(f.rank);
        depth = max(depth, own);
        ranks += f.rank;
        panels += (f.rank + own - 1) / own;
    });
    each([&](const LswFactor& f, const LswMap* maps) {
        if (f.flags & LSW_A_ALIGNED) fence_tensor_map(maps);
        if (f.flags & LSW_B_ALIGNED && panels > kFewestStay) fence_tensor_map(maps + 1);
    });
    atomicMax(&s.geometry.depth, depth);
    atomicMax(&s.geometry.most_ranks, ranks);
    atomicMax(&s.geometry.most_panels, panels);
}

// One thread. Short grabs where they can be: memory likes all blocks close together, and the last blocks want tiles too. Deep ranks need B
// to stay for longer.
__device__ void lay_out(Geometry& g, uint32_t total, uint32_t blocks) {
    const bool is_deep = g.most_ranks > kDeep;
    g.panel_bytes = g.depth * 256;
    g.granules = is_deep ? kFewestGranules : kMostGranules;
    const uint32_t slots = min(kMostPanels, (kArea - g.granules * kGranule) / g.panel_bytes);
    g.stays = g.depth == 64 ? kFewestStay : slots / 2;
    g.passes = slots - g.stays;
    g.grab = max(1u, min(is_deep ? kDeepGrab : kGrab, (total + blocks - 1) / blocks));
}

// All threads: the tiles of each group of 32 targets, then their prefix sum, and the geometry. Ends with a barrier.
__device__ void plan(const LswSwitchArgs& args, Shared& s) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t g = warp; g < s.groups; g += kThreads / 32) {
        const uint32_t target = args.first + 32 * g + lane;
        const uint32_t tiles = changed_tiles(args, s.route, target);
        if (tiles > 0) meet_target(args, s, target);
        const uint32_t sum = __reduce_add_sync(kFullWarp, tiles);
        if (lane == 0) s.group[g + 1] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        uint32_t carry = 0;
        for (uint32_t g = lane; g < (s.groups + 31) / 32 * 32; g += 32) {
            const uint32_t sum = carry + warp_inclusive_sum(g < s.groups ? s.group[g + 1] : 0);
            if (g < s.groups) s.group[g + 1] = sum;
            carry = __shfl_sync(kFullWarp, sum, 31);
        }
        if (lane == 0) s.group[0] = 0, lay_out(s.geometry, carry, gridDim.x);
    }
    __syncthreads();
}

// Where the scheduler is: its target, of which it keeps everything that a tile needs, so that a tile costs it no access to global memory.
struct Cursor {
    uint32_t group = kEnd, target = kEnd;
    uint32_t before_lane = 0, lane_tiles = 0;  // of this lane's target in the group
    uint32_t start = 0, end = 0;               // the target's tiles
    uint32_t across = 1;                       // its tiles in a row
    uint32_t terms = 0;                        // how many are staged
    uint32_t rows = 0;                         // of the target
    bool blocks = false;
};

__device__ __forceinline__ Term make_term(const LswSwitchArgs& args, uint32_t target, int slot, float coefficient) {
    const LswFactor& f = factor(args, target, slot);
    // B: rows of `depth` elements, swizzled over that width (1: 128 bytes, 2: 64, 3: 32). A: two blocks of 64 columns, [depth, 64] each.
    const uint32_t depth = panel_depth(f.rank), swizzle = depth == 64 ? 1 : depth == 32 ? 2 : 3;
    return {coefficient, f.rank | f.flags << 16, depth * 128 >> 4 << 16, depth * 16 >> 4 | swizzle << 30,
            reinterpret_cast<const void*>(f.b), f.b_stride, target * args.slots + slot};
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
        at.lane_tiles = changed_tiles(args, s.route, args.first + 32 * g + lane);
        at.before_lane = s.group[g] + warp_inclusive_sum(at.lane_tiles) - at.lane_tiles;
    }
    const uint32_t owner = __ffs(__ballot_sync(kFullWarp, at.before_lane <= tile && tile < at.before_lane + at.lane_tiles)) - 1;
    at.target = args.first + 32 * g + owner;
    at.start = __shfl_sync(kFullWarp, at.before_lane, owner);
    at.end = at.start + __shfl_sync(kFullWarp, at.lane_tiles, owner);
    const LswTarget& t = target_of(args, at.target);
    at.across = (t.cols + kTile - 1) / kTile;
    at.rows = t.rows;
    at.blocks = t.flags & LSW_WEIGHT_BLOCKS;
    const LaneTerms terms = lane_terms(args, s.route, at.target);
    __syncwarp();  // the last publish has read what was staged
    if (terms.enter_slot >= 0) s.staged[terms.enter_at] = make_term(args, at.target, terms.enter_slot, terms.enter);
    if (terms.leave_slot >= 0) s.staged[terms.leave_at] = make_term(args, at.target, terms.leave_slot, terms.leave);
    at.terms = terms.count;
    __syncwarp();
}

// One warp: a tile and its terms become an entry of the ring.
__device__ void publish(Shared& s, Ring& ring, const Cursor& at, int row, int col, bool begins_run, bool ends_run) {
    s.entry_empty[ring.slot].wait(ring.parity ^ 1);
    Entry& entry = s.entry[ring.slot];
    for (uint32_t i = threadIdx.x % 32; i < at.terms; i += 32) entry.terms[i] = s.staged[i];
    if (threadIdx.x % 32 == 0) {
        entry.header = {at.target, row, col, Header::pack(at.terms, min(at.rows - row, kTile), begins_run, ends_run, at.blocks)};
    }
    s.entry_full[ring.slot].arrive();  // each lane for what it wrote
    ring.advance();
}

// Waits for the next entry.
__device__ __forceinline__ const Entry& next_entry(Shared& s, const Ring& ring) {
    s.entry_full[ring.slot].wait(ring.parity);
    return s.entry[ring.slot];
}

// `rows` x 128 elements as two blocks of 64 columns: in one box where the map knows blocks.
__device__ __forceinline__ void load_pair(unsigned char* to, const LswMap* map, bool blocks, int col, int row, int rows, Barrier& full) {
    if (blocks) return load_blocks(to, map, col / 64, row, full);
    load_box(to, map, col, row, full);
    load_box(to + rows * 128, map, col + 64, row, full);
}

// One lane: has the copy engine bring a tile's two granules, as their places become free.
__device__ void load_weight(const LswSwitchArgs& args, Shared& s, Ring& weights, const Cursor& at, int row, int col) {
    const LswMap* base = target_maps(args, at.target) + 1;
    for (int c = 0; c < 2; ++c, weights.advance()) {
        s.weight_empty[weights.slot].wait(weights.parity ^ 1);
        Barrier& full = s.weight_full[weights.slot];
        full.arrive_expecting(kGranule);
        load_pair(s.area + weights.slot * kGranule, base, at.blocks, col, row + 64 * c, 64, full);
    }
}

__device__ void run_scheduler(const LswSwitchArgs& args, Shared& s) {
    const bool leader = threadIdx.x % 32 == 0;
    const uint32_t total = s.group[s.groups], grab = s.geometry.grab;
    Ring entries(kEntries), weights(s.geometry.granules);
    Cursor at;
    uint32_t taken = blockIdx.x;
    bool begins_run = true;
    while (taken * grab < total) {
        uint32_t next = 0;
        if (leader) next = gridDim.x + atomicAdd(&state(args)->next_tile, 1);
        const uint32_t end = min(total, (taken + 1) * grab);
        for (uint32_t tile = taken * grab; tile < end; ++tile) {
            if (tile < at.start || tile >= at.end) seek(args, s, at, tile);
            if (args.in_place && at.terms == 0) continue;
            const int row = (tile - at.start) / at.across * kTile, col = (tile - at.start) % at.across * kTile;
            const bool ends_run = tile + 1 == end || (tile + 1 - at.start) % at.across == 0;
            publish(s, entries, at, row, col, begins_run, ends_run);
            begins_run = ends_run;
            if (elect_one()) load_weight(args, s, weights, at, row, col);
            __syncwarp();
        }
        taken = __shfl_sync(kFullWarp, next, 0);
    }
    at.target = kEnd;
    publish(s, entries, at, 0, 0, true, true);

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

// One warp: element by element what a box copy would bring of a matrix that is not aligned. `place` gives an element's byte in the panel.
template <class T, class Place>
__device__ void load_slowly(unsigned char* panel, const T* from, uint64_t stride, int rows, int cols, int valid_rows, int valid_cols, Place place) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < rows * cols; i += 32) {
        const int row = i / cols, col = i % cols;
        const bool exists = row < valid_rows && col < valid_cols;
        *reinterpret_cast<T*>(panel + place(row, col)) = exists ? from[row * stride + col] : from_float<T>(0.0f);
    }
}

// A walk of one warp over the entries: `visit(tile, term, k, depth, index)` for each panel of those tiles that `wants` wants.
template <class Wants, class Visit> __device__ __forceinline__ void for_each_panel(Shared& s, Wants wants, Visit visit) {
    Ring entries(kEntries);
    for (;; entries.advance()) {
        const Entry& entry = next_entry(s, entries);
        const Header tile = entry.header;
        if (tile.target == kEnd) return;
        const bool wanted = wants(tile);
        uint32_t index = 0;  // of the panel in its tile
        for (uint32_t i = 0; wanted && i < tile.terms(); ++i) {
            const Term term = entry.terms[i];
            const int depth = term.depth();
            for (int k = 0; k < term.rank(); k += depth) visit(tile, term, k, depth, index++);
        }
        s.entry_empty[entries.slot].arrive();  // each lane for what it read
    }
}

// One warp, element by element: A and B, where the copy engine cannot.
template <class T>
__device__ void load_a_slowly(const LswSwitchArgs& args, unsigned char* panel, const Header& tile, const Term& term, int k, int depth) {
    const LswFactor& f = reinterpret_cast<const LswFactor*>(args.factors)[term.factor];
    const T* a = reinterpret_cast<const T*>(f.a) + static_cast<uint64_t>(k) * f.a_stride + tile.col;
    load_slowly(panel, a, f.a_stride, depth, kTile, term.rank() - k, static_cast<int>(target_of(args, tile.target).cols) - tile.col,
                [&](int row, int col) { return col / 64 * depth * 128 + swizzle(row * 128 + col % 64 * 2, 7); });
}
template <class T> __device__ void load_b_slowly(unsigned char* panel, const Header& tile, const Term& term, int k, int depth) {
    const T* b = static_cast<const T*>(term.b) + static_cast<uint64_t>(tile.row) * term.b_stride + k;
    load_slowly(panel, b, term.b_stride, kTile, depth, tile.rows(), term.rank() - k,
                [&](int row, int col) { return swizzle((row * depth + col) * 2, depth / 8 - 1); });
}

// One warp: A [depth, 128] of every tile, as two blocks of 64 columns, and each panel of B that has no place to stay.
template <class T> __device__ void run_panels(const LswSwitchArgs& args, Shared& s) {
    const uint32_t panel_bytes = s.geometry.panel_bytes, stays = s.geometry.stays;
    Ring panels(s.geometry.passes);
    // Into the ring's next place: by one lane's `load`, or by all lanes `slowly`.
    auto bring = [&](bool by_box, int depth, auto load, auto slowly) {
        const uint32_t slot = stays + panels.slot;
        unsigned char* panel = s.panels() + slot * panel_bytes;
        Barrier& full = s.panel_full[slot];
        s.panel_empty[slot].wait(panels.parity ^ 1);
        if (!by_box) {
            slowly(panel);
            fence_async_shared();
            __syncwarp();
            if (threadIdx.x % 32 == 0) full.arrive();
        } else if (elect_one()) {
            full.arrive_expecting(depth * 256);
            load(panel, full);
        }
        __syncwarp();
        panels.advance();
    };
    for_each_panel(s, [](const Header&) { return true; }, [&](const Header& tile, const Term& term, int k, int depth, uint32_t index) {
        const LswMap* maps = factor_maps(args, term.factor);
        bring(term.is(LSW_A_ALIGNED), depth,
              [&](unsigned char* panel, Barrier& full) { load_pair(panel, maps, tile.blocks(), tile.col, k, depth, full); },
              [&](unsigned char* panel) { load_a_slowly<T>(args, panel, tile, term, k, depth); });
        if (index < stays) return;
        bring(term.is(LSW_B_ALIGNED), depth, [&](unsigned char* panel, Barrier& full) { load_box(panel, maps + 1, k, tile.row, full); },
              [&](unsigned char* panel) { load_b_slowly<T>(panel, tile, term, k, depth); });
    });
}

// One warp: B [128, depth] by plain copies of 16 bytes, zeros where there is nothing.
template <class T> __device__ __forceinline__ void load_b(unsigned char* panel, const Term& term, const Header& tile, int k, int depth) {
    const int lane = threadIdx.x % 32, shift = depth == 64 ? 3 : depth == 32 ? 2 : 1, mask = (1 << shift) - 1;  // 8, 4 or 2 copies a row
    const int first = lane >> shift, step = 32 >> shift, column = k + (lane & mask) * 8;
    const int bytes = max(0, min(16, 2 * (term.rank() - column)));
    const T* from = static_cast<const T*>(term.b) + static_cast<uint64_t>(tile.row + first) * term.b_stride + column;
    const uint64_t stride = static_cast<uint64_t>(step) * term.b_stride;
    const uint32_t to = shared_address(panel);
    const int rows = bytes > 0 ? tile.rows() : 0;
    uint32_t at = lane * 16;
#pragma unroll 8
    for (int m = first; m < kTile; m += step, at += 512, from += stride) {
        if (m < rows) {
            copy16_partly(to + swizzle(at, mask), from, bytes);
        } else {
            *reinterpret_cast<int4*>(panel + swizzle(at, mask)) = int4{};
        }
    }
    copy_commit();
    copy_wait<0>();
}

// Four warps: each brings every fourth panel of B that stays, when a run begins.
template <class T> __device__ void run_loaders(Shared& s, uint32_t loader) {
    const uint32_t panel_bytes = s.geometry.panel_bytes, stays = s.geometry.stays;
    Ring panels(stays), turn(kLoaders);
    auto wanted = [](const Header& tile) { return tile.begins_run(); };
    for_each_panel(s, wanted, [&](const Header& tile, const Term& term, int k, int depth, uint32_t index) {
        if (index >= stays) return;
        if (turn.slot == loader) {
            unsigned char* panel = s.panels() + panels.slot * panel_bytes;
            s.panel_empty[panels.slot].wait(panels.parity ^ 1);
            if (term.is(LSW_B_ALIGNED)) {
                load_b<T>(panel, term, tile, k, depth);
            } else {
                load_b_slowly<T>(panel, tile, term, k, depth);
            }
            fence_async_shared();
            __syncwarp();
            if (threadIdx.x % 32 == 0) s.panel_full[panels.slot].arrive();
        }
        turn.advance(), panels.advance();
    });
}

// One thread for each consumer.
__device__ void run_stores(const LswSwitchArgs& args, Shared& s, int consumer) {
    Ring entries(kEntries), weights(s.geometry.granules, consumer);
    for (;; entries.advance(), weights.advance(2)) {
        const Header tile = next_entry(s, entries).header;
        s.entry_empty[entries.slot].arrive();
        if (tile.target == kEnd) break;
        s.weight_done[weights.slot].wait(weights.parity);
        const unsigned char* granule = s.area + weights.slot * kGranule;
        const LswMap* map = target_maps(args, tile.target);
        const int row = tile.row + 64 * consumer;
        if (tile.blocks()) {
            store_blocks(map, tile.col / 64, row, granule);
        } else {
            store_box(map, tile.col, row, granule);
            store_box(map, tile.col + 64, row, granule + kHalf);
        }
        store_commit();
        store_wait_read();
        s.weight_empty[weights.slot].arrive();
    }
    store_wait();
}

// A panel of A and one of B as a consumer sees them: wgmma's descriptors, how many times 16 of the rank, the places.
struct Operands {
    uint32_t a_low, b_low, b_high;
    int steps;
    uint32_t a_slot, a_parity, b_slot, b_parity;

    // Here and now: the compiler would move all of it behind the wait for the panel.
    __device__ __forceinline__ void pin_down() { pin(a_low), pin(b_low), pin(b_high), pin(steps); }
    __device__ __forceinline__ uint64_t b() const { return static_cast<uint64_t>(b_high) << 32 | b_low; }
    __device__ __forceinline__ uint64_t a() const { return static_cast<uint64_t>(1024 >> 4 | 1 << 30) << 32 | a_low; }
};

// product = or += B_j A_j over kSteps times 16 of the rank. Straight-line code: around a loop ptxas would put a group of its own on every
// wgmma. 16 columns of B are 32 bytes along its rows; 16 rows of A are 2,048 bytes.
template <int kSteps, class T> __device__ __forceinline__ void multiply_steps(float (&product)[64], uint64_t b, uint64_t a, bool add) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) wgmma(product, b + (32 * i >> 4), a + (2048 * i >> 4), add || i > 0, T{});
    wgmma_commit();
}
template <class T> __device__ __forceinline__ void multiply(float (&product)[64], uint64_t b, uint64_t a, int steps, bool add) {
    // Nested so that no jump table comes of it, whose load would stand before every product.
    if (steps < 3) {
        if (steps < 2) return multiply_steps<1, T>(product, b, a, add);
        return multiply_steps<2, T>(product, b, a, add);
    }
    if (steps < 4) return multiply_steps<3, T>(product, b, a, add);
    multiply_steps<4, T>(product, b, a, add);
}

// A consumer's part of W's granule. Lane l has rows l / 4 and l / 4 + 8 of its warp's 16, columns 2 (l % 4) + {0, 1} of each 8: the layout of
// wgmma's accumulators and of ldmatrix.
struct Fragment {
    uint32_t words[8][4];

    __device__ __forceinline__ static unsigned char* place(unsigned char* granule, int j) {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
        return granule + j / 4 * kHalf + swizzle(row * 128 + (j % 4 * 2 + lane / 16) * 16, 7);
    }
    __device__ __forceinline__ void load(unsigned char* granule) {
#pragma unroll
        for (int j = 0; j < 8; ++j) ldmatrix4(words[j], place(granule, j));
    }
    // W + sum, one rounding.
    template <class T> __device__ __forceinline__ void add_and_store(unsigned char* granule, const float (&sum)[64]) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 old = unpack(words[j][i], T{});
                words[j][i] = pack({old.x + sum[8 * j + 2 * i], old.y + sum[8 * j + 2 * i + 1]}, T{});
            }
            stmatrix4(place(granule, j), words[j]);
        }
    }
};

// The first 16 bytes of a header or a term, read by the lane that will give the entry back. All know the same, and so does the compiler.
template <class Words> __device__ __forceinline__ Words take(const Words& words) {
    int4 value{};
    if (threadIdx.x % 32 == 0) value = reinterpret_cast<const int4&>(words);
    value.x = __shfl_sync(kFullWarp, value.x, 0), value.y = __shfl_sync(kFullWarp, value.y, 0);
    value.z = __shfl_sync(kFullWarp, value.z, 0), value.w = __shfl_sync(kFullWarp, value.w, 0);
    Words taken{};
    memcpy(&taken, &value, 16);
    return taken;
}

// 64 rows of W's tile. kAllStay: every panel of B has a place to stay. What the tensor cores do not need at once is worked out while they run:
// the next panel's operands, and at the end W's fragment and the next tile.
template <class T, bool kAllStay> __device__ void run_consumer(Shared& s, int consumer) {
    const bool leader = threadIdx.x % 32 == 0;
    const uint32_t panels = shared_address(s.panels()), panel_bytes = s.geometry.panel_bytes, stays = s.geometry.stays;
    Ring entries(kEntries), weights(s.geometry.granules, consumer), passing(s.geometry.passes), staying(stays);
    Ring run = staying;  // where B's panels of the run begin

    Header tile;
    Term term;
    int k;           // how far into the term's rank
    uint32_t index;  // of the panel in its tile
    Operands operands;
    auto prepare = [&] {
        const int depth = term.depth();
        operands.steps = (min(depth, term.rank() - k) + 15) / 16;
        operands.a_slot = stays + passing.slot, operands.a_parity = passing.parity;
        operands.a_low = term.a_layout | (panels + operands.a_slot * panel_bytes) >> 4;
        passing.advance();
        if (kAllStay || index < stays) {
            operands.b_slot = staying.slot, operands.b_parity = staying.parity;
            staying.advance();
        } else {
            operands.b_slot = stays + passing.slot, operands.b_parity = passing.parity;
            passing.advance();
        }
        operands.b_low = 1 << 16 | (panels + operands.b_slot * panel_bytes + consumer * depth * 128) >> 4;
        operands.b_high = term.b_layout;
        operands.pin_down();
    };
    auto next_tile = [&] {
        const Entry& entry = next_entry(s, entries);
        tile = take(entry.header);
        if (tile.begins_run()) run = staying;
        staying = run;
        if (tile.terms() == 0) return;
        term = take(entry.terms[0]);
        k = 0, index = 0;
        prepare();
    };
    for (next_tile(); tile.target != kEnd;) {
        const Entry& entry = s.entry[entries.slot];
        const uint32_t terms = tile.terms();
        unsigned char* granule = s.area + weights.slot * kGranule;
        float sum[64], product[64];
        Fragment weight;

        // The panel whose product is under way.
        uint32_t a_slot, b_slot;
        bool frees_b, ends_term;
        float coefficient;
        auto issue = [&] {
            wait_both(s.panel_full[operands.b_slot], operands.b_parity, s.panel_full[operands.a_slot], operands.a_parity);
            multiply<T>(product, operands.b(), operands.a(), operands.steps, k > 0);
            a_slot = operands.a_slot, b_slot = operands.b_slot;
            frees_b = tile.ends_run() || !(kAllStay || index < stays);
            // From each lane to itself: a uniform register, which the compiler would choose, slows the fmas down.
            coefficient = __shfl_sync(kFullWarp, term.coefficient, threadIdx.x % 32);
            k += term.depth(), ++index;
            ends_term = k >= term.rank();
        };
        // Waits for the product and frees the panels; after the last one of a term: sum += coefficient * product.
        auto finish = [&] {
            wgmma_wait<0>();
            s.panel_empty[a_slot].arrive_if(leader);
            s.panel_empty[b_slot].arrive_if(leader && frees_b);
            if (!ends_term) return;
#pragma unroll
            for (int j = 0; j < 64; ++j) sum[j] = fmaf(coefficient, product[j], sum[j]);
        };
        // Takes W's fragment, gives the entry back and looks at the next one.
        auto turn_page = [&] {
            s.weight_full[weights.slot].wait(weights.parity);
            weight.load(granule);
            s.entry_empty[entries.slot].arrive_if(leader);
            entries.advance(), weights.advance(2);
            next_tile();
        };
        Barrier& done = s.weight_done[weights.slot];
        if (terms > 0) {
            issue();
#pragma unroll
            for (int j = 0; j < 64; ++j) sum[j] = 0.0f;
            for (uint32_t i = 0;;) {
                if (ends_term) {
                    if (++i == terms) break;
                    term = take(entry.terms[i]);
                    k = 0;
                }
                prepare();
                finish();
                issue();
            }
            turn_page();
            finish();
            weight.add_and_store<T>(granule, sum);
        } else {
            turn_page();
        }
        fence_async_shared();
        __syncwarp();
        done.arrive_if(leader);
    }
}

__device__ void init_barriers(Shared& s) {
    for (int i = 0; i < kEntries; ++i) {
        s.entry_full[i].init(32);                                // the scheduler's lanes
        s.entry_empty[i].init(32 * (1 + kLoaders) + 2 + 8);  // those of panels and loaders; stores, consumers' warps
    }
    for (uint32_t i = 0; i < kMostPanels; ++i) s.panel_full[i].init(1), s.panel_empty[i].init(8);  // who brings it; consumers
    for (uint32_t i = 0; i < kMostGranules; ++i) s.weight_full[i].init(1), s.weight_done[i].init(4), s.weight_empty[i].init(1);
    fence_barrier_init();
}

template <class T> __device__ void switch_all(const LswSwitchArgs& args) {
    if (args.first >= args.last) return;
    extern __shared__ unsigned char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);  // uniform, and the compiler knows
    if (warp == 0) canonical_route(args, s.route);
    if (threadIdx.x == 32) {
        init_barriers(s);
        s.geometry.depth = 16, s.geometry.most_ranks = s.geometry.most_panels = 0;
        s.groups = (args.last - args.first + 31) / 32;
    }
    __syncthreads();
    plan(args, s);
    // Nothing to do: every block finds the same, so there is no queue to reset and nothing to record.
    if (s.group[s.groups] == 0) return;

    if (warp < 4) {
        give_registers<kProducerRegisters>();
        if (warp == 0) run_scheduler(args, s);
        if (warp == 1) run_panels<T>(args, s);
        if (warp >= 2 && elect_one()) run_stores(args, s, warp - 2);
    } else if (warp < 8) {
        give_registers<kProducerRegisters>();
        run_loaders<T>(s, warp - 4);
    } else {
        take_registers<kConsumerRegisters>();
        const int consumer = warp / 4 - 2;
        s.geometry.most_panels <= s.geometry.stays ? run_consumer<T, true>(s, consumer) : run_consumer<T, false>(s, consumer);
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
