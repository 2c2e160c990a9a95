// The switch on Hopper: the contract of switch.cu, for f16 and bf16 targets whose W and W_base have addresses, row strides and row bytes
// that are multiples of 16 (the copy engine stores whole 16 bytes: past a ragged row it would zero its neighbour).
//
// Floor: W is read once and written once. Everything else hides behind that stream or is overhead.
//
// One block an SM, five roles that hand a 128 x 128 tile from one to the next through mbarriers:
//
//   scheduler (warp 0)  takes tiles from the queue, works out the target's terms, publishes both, and has the copy engine bring W
//   panels    (warp 1)  per term and 64 of its rank: A [<= 64, 128], and some of B [128, <= 64], by the copy engine
//   loaders   (warps 4 to 7)  the rest of B by plain copies
//   consumers (2 x 128) each 64 rows: wgmma per term into `product`, sum += coefficient * product; then W's granule is changed in place in
//                       shared memory (ldmatrix, add in f32, one rounding, stmatrix)
//   stores    (warps 2, 3) have the copy engine write a granule back and free its place
//
// The product of a tile starts before its W arrives, and W runs up to three tiles ahead.
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
// Memory order first: blocks take tiles from one counter, so that all SMs work close together in memory (long private strips cost 6-10%).
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
constexpr int kWeights = 3;                 // granules of W in flight, for each consumer
constexpr int kPanelPool = 112 * 1024;      // for the panels of A and B
constexpr int kMostPanels = 14;             // of the smallest: 16 of the rank
constexpr int kEntries = 4;                 // tiles between the scheduler and the slowest role
constexpr uint32_t kEnd = ~0u;

// A block starts with 128 registers a thread and can only share these out: asking for one more waits for ever.
constexpr int kProducerRegisters = 64, kConsumerRegisters = 192;
static_assert(256 * kProducerRegisters + 256 * kConsumerRegisters <= 512 * 128, "registers of a block");

static_assert(kThreads == 512 && kTile == 128, "two warpgroups of producers, two of consumers of 64 rows each");

struct alignas(16) Term {
    float coefficient;
    int rank;
    uint32_t factor;  // target * slots + slot
    uint32_t flags;
    const void* b;
    uint32_t b_stride;
    uint32_t first_panel;  // of the tile's
};

// A tile on its way through the roles.
struct alignas(16) Header {
    uint32_t target;  // kEnd: there are no more
    int row, col;
    uint32_t packed;  // terms, rows of the matrix in the tile, whether there are many panels, whether LSW_WEIGHT_BLOCKS

    __device__ static uint32_t pack(uint32_t terms, uint32_t rows, bool many, bool blocks) {
        return terms | rows << 8 | (many ? 1u << 30 : 0) | (blocks ? 1u << 31 : 0);
    }
    __device__ uint32_t terms() const { return packed & 0xff; }
    __device__ int rows() const { return packed >> 8 & 0xff; }
    __device__ bool many_panels() const { return packed >> 30 & 1; }
    __device__ bool blocks() const { return packed >> 31; }
};
static_assert(2 * LSW_MAX_K < 256 && kTile < 256, "packed");
struct Entry {
    Header header;
    Term terms[2 * LSW_MAX_K];
};

// How this launch uses the pool: by the deepest panel of its route. Every block works it out for itself, to the same result.
struct Geometry {
    uint32_t depth;        // 16, 32 or 64 of the rank
    uint32_t panels;       // slots of the ring
    uint32_t panel_bytes;  // of a slot: A [depth, 128] and B [128, depth]
    uint32_t grab;         // consecutive tiles that a block takes at a time
};

// The copy engine's swizzle repeats every 1,024 bytes: granules and panels stand at multiples of that.
struct Shared {
    unsigned char weight[2][kWeights][2 * kHalf];  // [consumer][stage][left and right 64 columns]
    unsigned char pool[kPanelPool];                // the ring of panels
    Entry entry[kEntries];
    Term staged[2 * LSW_MAX_K];  // the terms of the scheduler's target
    Barrier entry_full[kEntries], entry_empty[kEntries];
    Barrier weight_full[2][kWeights], weight_done[2][kWeights], weight_empty[2][kWeights];
    Barrier panel_full[kMostPanels], panel_empty[kMostPanels];
    Route route;
    Geometry geometry;
    uint32_t groups;
    uint32_t group[kGroups + 1];  // tiles of the changed targets before each group of 32
};
static_assert(sizeof(Shared) + 1024 <= LSW_SWITCH90_SHARED, "the host asks for this much shared memory");

// A place in a ring, and the parity of its current use.
struct Ring {
    uint32_t size, slot = 0, parity = 0;
    __device__ explicit Ring(uint32_t size) : size(size) {}
    __device__ __forceinline__ void advance() {
        if (++slot == size) slot = 0, parity ^= 1;
    }
};

// Columns of the rank that one panel holds: the smallest box that a small rank fits in. The host encodes the maps by the same rule.
__device__ __forceinline__ int panel_depth(uint32_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

__device__ __forceinline__ bool is_aligned(uint32_t flags) { return flags == (LSW_A_ALIGNED | LSW_B_ALIGNED); }

__device__ __forceinline__ int panel_count(int rank) { return (rank + panel_depth(rank) - 1) / panel_depth(rank); }
constexpr uint32_t kFewPanels = 2;  // of a tile: what the loaders keep up with

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

// visit(factor, index) for every adapter that a changed target may need; one in both routes comes twice.
template <class Visit> __device__ __forceinline__ void for_each_adapter(const LswSwitchArgs& args, const Route& route, uint32_t target, Visit visit) {
    auto at = [&](int slot) {
        const LswFactor& f = factor(args, target, slot);
        if (f.rank > 0) visit(f, target * args.slots + slot);
    };
    for (uint32_t e = 0; e < route.count; ++e) at(route.slot[e]);
    const uint32_t held = args.in_place ? merged_count(args, target) : 0;
    for (uint32_t e = 0; e < held; ++e) at(merged(args, target)[e].slot);
}

// The deepest panel that a changed target asks for. Also: its adapters' maps may have been written since this SM last saw them. A fence
// takes long, so all threads of the block have theirs at once, and those that will not be used have none.
__device__ void meet_adapters(const LswSwitchArgs& args, Shared& s, uint32_t target) {
    uint32_t depth = 16, panels = 0;
    for_each_adapter(args, s.route, target, [&](const LswFactor& f, uint32_t) {
        depth = max(depth, static_cast<uint32_t>(panel_depth(f.rank)));
        panels += panel_count(f.rank);
    });
    atomicMax(&s.geometry.depth, depth);
    for_each_adapter(args, s.route, target, [&](const LswFactor& f, uint32_t index) {
        if (!is_aligned(f.flags)) return;
        fence_tensor_map(factor_maps(args, index));
        if (panels > kFewPanels) fence_tensor_map(factor_maps(args, index) + 1);
    });
}

// One thread. Short grabs: memory likes all blocks close together, and the last blocks want tiles too.
__device__ void lay_out(Geometry& g, uint32_t total) {
    g.panel_bytes = g.depth * 512;
    g.panels = kPanelPool / g.panel_bytes;
    g.grab = max(1u, min(2u, (total + gridDim.x - 1) / gridDim.x));
}

// All threads: the tiles of each group of 32 targets, then their prefix sum, and the geometry. Ends with a barrier.
__device__ void plan(const LswSwitchArgs& args, Shared& s) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t g = warp; g < s.groups; g += kThreads / 32) {
        const uint32_t target = args.first + 32 * g + lane;
        const uint32_t tiles = changed_tiles(args, s.route, target);
        if (tiles > 0) meet_adapters(args, s, target);
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
        if (lane == 0) s.group[0] = 0, lay_out(s.geometry, carry);
    }
    __syncthreads();
}

// Where the scheduler is: its target, of which it keeps everything that a tile needs, so that a tile costs it no access to global memory.
struct Cursor {
    uint32_t group = kEnd, target = kEnd;
    uint32_t before_lane = 0, lane_tiles = 0;  // of this lane's target in the group
    uint32_t start = 0, end = 0;               // the target's tiles
    uint32_t across = 1;                       // its tiles in a row
    uint32_t terms = 0, panels = 0;            // how many terms are staged, and their panels
    uint32_t rows = 0;                         // of the target
    bool blocks = false;
};

__device__ __forceinline__ Term make_term(const LswSwitchArgs& args, uint32_t target, int slot, float coefficient) {
    const LswFactor& f = factor(args, target, slot);
    return {coefficient, static_cast<int>(f.rank), target * args.slots + slot, f.flags, reinterpret_cast<const void*>(f.b), f.b_stride, 0};
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
    at.panels = 0;
    for (uint32_t i = 0; i < at.terms; ++i) {
        if (lane == 0) s.staged[i].first_panel = at.panels;
        at.panels += panel_count(s.staged[i].rank);
    }
    __syncwarp();
}

// One warp: a tile and its terms become an entry of the ring.
__device__ void publish(Shared& s, Ring& ring, const Cursor& at, int row, int col) {
    s.entry_empty[ring.slot].wait(ring.parity ^ 1);
    Entry& entry = s.entry[ring.slot];
    for (uint32_t i = threadIdx.x % 32; i < at.terms; i += 32) entry.terms[i] = s.staged[i];
    if (threadIdx.x % 32 == 0) entry.header = {at.target, row, col, Header::pack(at.terms, min(at.rows - row, kTile), at.panels > kFewPanels, at.blocks)};
    s.entry_full[ring.slot].arrive();  // each lane for what it wrote
    ring.advance();
}

// Words out of an entry. The leader alone reads them, since the leader alone gives the entry back.
template <class Words> __device__ __forceinline__ Words take(const Words& words) {
    static_assert(sizeof(Words) % 16 == 0 && alignof(Words) == 16, "whole loads");
    constexpr int kLoads = sizeof(Words) / 16;
    int4 value[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        if (threadIdx.x % 32 == 0) value[i] = reinterpret_cast<const int4*>(&words)[i];
        value[i].x = __shfl_sync(kFullWarp, value[i].x, 0), value[i].y = __shfl_sync(kFullWarp, value[i].y, 0);
        value[i].z = __shfl_sync(kFullWarp, value[i].z, 0), value[i].w = __shfl_sync(kFullWarp, value[i].w, 0);
    }
    Words taken;
    memcpy(&taken, value, sizeof(Words));
    return taken;
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

// One lane: has the copy engine bring a tile's two granules, once their places are free.
__device__ __forceinline__ void load_weight(const LswSwitchArgs& args, Shared& s, const Ring& weights, const Cursor& at, int row, int col) {
    const LswMap* base = target_maps(args, at.target) + 1;
    for (int c = 0; c < 2; ++c) {
        s.weight_empty[c][weights.slot].wait(weights.parity ^ 1);
        Barrier& full = s.weight_full[c][weights.slot];
        unsigned char* granule = s.weight[c][weights.slot];
        full.arrive_expecting(2 * kHalf);
        load_pair(granule, base, at.blocks, col, row + 64 * c, 64, full);
    }
}

__device__ void run_scheduler(const LswSwitchArgs& args, Shared& s) {
    const bool leader = threadIdx.x % 32 == 0;
    const uint32_t total = s.group[s.groups], grab = s.geometry.grab;
    Ring entries(kEntries), weights(kWeights);
    Cursor at;
    uint32_t taken = blockIdx.x;
    while (taken * grab < total) {
        uint32_t next = 0;
        if (leader) next = gridDim.x + atomicAdd(&state(args)->next_tile, 1);
        const uint32_t end = min(total, (taken + 1) * grab);
        for (uint32_t tile = taken * grab; tile < end; ++tile) {
            if (tile < at.start || tile >= at.end) seek(args, s, at, tile);
            if (args.in_place && at.terms == 0) continue;
            const int row = (tile - at.start) / at.across * kTile, col = (tile - at.start) % at.across * kTile;
            publish(s, entries, at, row, col);
            if (leader) load_weight(args, s, weights, at, row, col);
            __syncwarp();
            weights.advance();
        }
        taken = __shfl_sync(kFullWarp, next, 0);
    }
    at.target = kEnd;
    publish(s, entries, at, 0, 0);

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

// One warp: what a box copy would bring, element by element, for an adapter that is not aligned.
template <class T> __device__ void load_slowly(const LswFactor& f, unsigned char* panel, int row, int col, const LswTarget& t, int k0, int depth) {
    const int lane = threadIdx.x % 32;
    const T* a = reinterpret_cast<const T*>(f.a);
    for (int i = lane; i < depth * kTile; i += 32) {
        const int k = i / kTile, n = i % kTile;
        const bool exists = k0 + k < static_cast<int>(f.rank) && col + n < static_cast<int>(t.cols);
        const T value = exists ? a[static_cast<uint64_t>(k0 + k) * f.a_stride + col + n] : from_float<T>(0.0f);
        const int at = n / 64 * depth * 128 + k * 128 + n % 64 * 2;
        *reinterpret_cast<T*>(panel + (at ^ (at >> 7 & 7) << 4)) = value;
    }
    const T* b = reinterpret_cast<const T*>(f.b);
    for (int i = lane; i < depth * kTile; i += 32) {
        const int m = i / depth, k = i % depth;
        const bool exists = k0 + k < static_cast<int>(f.rank) && row + m < static_cast<int>(t.rows);
        const T value = exists ? b[static_cast<uint64_t>(row + m) * f.b_stride + k0 + k] : from_float<T>(0.0f);
        const int at = m * depth * 2 + k * 2;
        *reinterpret_cast<T*>(panel + depth * 256 + (at ^ (at >> 7 & (depth / 8 - 1)) << 4)) = value;
    }
    fence_async_shared();
}

// A walk over the panels of a block, in the order in which all roles see them: `visit(tile, term, k, depth, panel, full)` for each.
template <class Visit> __device__ __forceinline__ void for_each_panel(Shared& s, Visit visit) {
    const uint32_t panel_bytes = s.geometry.panel_bytes;
    Ring entries(kEntries), panels(s.geometry.panels);
    for (;; entries.advance()) {
        const Entry& entry = next_entry(s, entries);
        const Header tile = take(entry.header);
        if (tile.target == kEnd) return;
        Term next = take(entry.terms[0]);
        for (uint32_t i = 0; i < tile.terms(); ++i) {
            const Term term = next;
            if (i + 1 < tile.terms()) next = take(entry.terms[i + 1]);
            const int depth = panel_depth(term.rank);
            for (int k = 0; k < term.rank; k += depth, panels.advance()) {
                s.panel_empty[panels.slot].wait(panels.parity ^ 1);
                visit(tile, term, k, depth, s.pool + panels.slot * panel_bytes, s.panel_full[panels.slot]);
            }
        }
        if (threadIdx.x % 32 == 0) s.entry_empty[entries.slot].arrive();
    }
}

// Who brings B of a panel. The copy engine takes about 4 cycles a row, however short, and has W to move; the loaders take longer for a panel
// but are otherwise idle. So the loaders take B as long as they keep up, and every other panel of a tile that has many.
__device__ __forceinline__ bool by_loaders(const Header& tile, const Term& term, int k, int depth) {
    return !tile.many_panels() || (term.first_panel + k / depth) % 2 == 0;
}

// One warp: A by the copy engine, and some of B.
template <class T> __device__ void run_panels(const LswSwitchArgs& args, Shared& s) {
    const bool leader = threadIdx.x % 32 == 0;
    for_each_panel(s, [&](const Header& tile, const Term& term, int k, int depth, unsigned char* panel, Barrier& full) {
        if (!is_aligned(term.flags)) {
            const LswFactor& f = reinterpret_cast<const LswFactor*>(args.factors)[term.factor];
            load_slowly<T>(f, panel, tile.row, tile.col, target_of(args, tile.target), k, depth);
            __syncwarp();
            if (leader) full.arrive();
        } else if (leader) {
            const LswMap* maps = factor_maps(args, term.factor);
            const bool with_b = !by_loaders(tile, term, k, depth);
            full.arrive_expecting(depth * (with_b ? 512 : 256));
            load_pair(panel, maps, tile.blocks(), tile.col, k, depth, full);
            if (with_b) load_box(panel + depth * 256, maps + 1, k, tile.row, full);
        }
        __syncwarp();
    });
}

// A warpgroup: B [128, depth] by plain copies of 16 bytes.
template <class T> __device__ void run_loaders(Shared& s) {
    const int thread = threadIdx.x % 128;
    for_each_panel(s, [&](const Header& tile, const Term& term, int k, int depth, unsigned char* panel, Barrier& full) {
        if (!is_aligned(term.flags) || !by_loaders(tile, term, k, depth)) return full.arrive();
        const int shift = depth == 64 ? 3 : depth == 32 ? 2 : 1, mask = (1 << shift) - 1;  // 8, 4 or 2 copies a row
        const int first = thread >> shift, step = 128 >> shift, column = k + (thread & mask) * 8;
        const int bytes = max(0, min(16, 2 * (term.rank - column)));
        const T* from = static_cast<const T*>(term.b) + static_cast<uint64_t>(tile.row + first) * term.b_stride + column;
        const uint64_t stride = static_cast<uint64_t>(step) * term.b_stride;
        const uint32_t to = shared_address(panel) + depth * 256;
        uint32_t at = thread * 16;
#pragma unroll 2
        for (int m = first; m < kTile; m += step, at += 2048, from += stride) {
            const bool exists = m < tile.rows() && bytes > 0;
            copy16_partly(to + (at ^ (at >> 7 & mask) << 4), exists ? static_cast<const void*>(from) : term.b, exists ? bytes : 0);
        }
        arrive_after_copies(full);
    });
}

// One warp for each consumer.
__device__ void run_stores(const LswSwitchArgs& args, Shared& s, int consumer) {
    const bool leader = threadIdx.x % 32 == 0;
    Ring entries(kEntries);
    Ring weights(kWeights);
    for (;; entries.advance(), weights.advance()) {
        const Entry& entry = next_entry(s, entries);
        const Header tile = take(entry.header);
        if (leader) s.entry_empty[entries.slot].arrive();
        if (tile.target == kEnd) break;
        s.weight_done[consumer][weights.slot].wait(weights.parity);
        if (leader) {
            const unsigned char* granule = s.weight[consumer][weights.slot];
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
            s.weight_empty[consumer][weights.slot].arrive();
        }
        __syncwarp();
    }
    if (leader) store_wait();
}

// A wgmma descriptor but for the address: the two strides in bytes and the swizzle (1: 128 bytes, 2: 64, 3: 32).
__device__ __forceinline__ uint64_t layout(uint32_t leading, uint32_t stride, uint32_t swizzle) {
    return static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4 | swizzle << 30) << 32;
}

// product = or += B_j A_j over kSteps times 16 of the rank. Straight-line code: around a loop ptxas would put a group of its own on every
// wgmma. 16 columns of B are 32 bytes along its rows; 16 rows of A are 2,048 bytes.
template <int kSteps, class T> __device__ __forceinline__ void multiply_steps(float (&product)[64], uint64_t b, uint64_t a, bool add) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) wgmma(product, b + (32 * i >> 4), a + (2048 * i >> 4), add || i > 0, T{});
    wgmma_commit();
}
template <class T> __device__ __forceinline__ void multiply(float (&product)[64], uint64_t b, uint64_t a, int steps, bool add) {
    switch (steps) {
        case 1: return multiply_steps<1, T>(product, b, a, add);
        case 2: return multiply_steps<2, T>(product, b, a, add);
        case 3: return multiply_steps<3, T>(product, b, a, add);
        default: return multiply_steps<4, T>(product, b, a, add);
    }
}

// W's granule += sum, one rounding. Accumulator 8 j' ..: lane l has rows l / 4 and l / 4 + 8 of its warp's 16, columns 2 (l % 4) + {0, 1}
// of each 8: the layout of ldmatrix.
template <class T> __device__ __forceinline__ void add_to(unsigned char* granule, const float (&sum)[64]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    auto place = [&](int j) { return granule + j / 4 * kHalf + row * 128 + ((j % 4 * 2 + lane / 16) ^ (row & 7)) * 16; };
    uint32_t w[8][4];  // all loads before the first use
#pragma unroll
    for (int j = 0; j < 8; ++j) ldmatrix4(w[j], place(j));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 old = unpack(w[j][i], T{});
            w[j][i] = pack({old.x + sum[8 * j + 2 * i], old.y + sum[8 * j + 2 * i + 1]}, T{});
        }
        stmatrix4(place(j), w[j]);
    }
}

template <class T> __device__ void run_consumer(Shared& s, int consumer) {
    const bool leader = threadIdx.x % 32 == 0;
    const uint32_t pool = shared_address(s.pool), panel_bytes = s.geometry.panel_bytes;
    Ring entries(kEntries), weights(kWeights), panels(s.geometry.panels);
    for (;; entries.advance(), weights.advance()) {
        const Entry& entry = next_entry(s, entries);
        const Header tile = take(entry.header);
        if (tile.target == kEnd) return;
        float sum[64] = {};
        Term next = take(entry.terms[0]);
        for (uint32_t i = 0; i < tile.terms(); ++i) {
            const Term term = next;
            if (i + 1 < tile.terms()) next = take(entry.terms[i + 1]);
            const int depth = panel_depth(term.rank);
            // B: rows of `depth` elements, swizzled over that width. A: two blocks of 64 columns.
            const uint64_t b_layout = layout(16, depth * 16, depth == 64 ? 1 : depth == 32 ? 2 : 3), a_layout = layout(depth * 128, 1024, 1);
            float product[64];
            uint32_t former = 0;
            for (int k = 0; k < term.rank; k += depth, panels.advance()) {
                const uint32_t a = pool + panels.slot * panel_bytes, b = a + depth * 256 + consumer * depth * 128;
                s.panel_full[panels.slot].wait(panels.parity);
                fence_async_shared();  // B came by plain copies
                multiply<T>(product, b_layout | b >> 4, a_layout | a >> 4, (min(depth, term.rank - k) + 15) / 16, k > 0);
                // One panel's wgmmas stay in flight; the panel before it is free.
                if (k > 0) {
                    wgmma_wait<1>();
                    if (leader) s.panel_empty[former].arrive();
                }
                former = panels.slot;
            }
            wgmma_wait<0>();
            if (leader) s.panel_empty[former].arrive();
#pragma unroll
            for (int j = 0; j < 64; ++j) sum[j] = fmaf(term.coefficient, product[j], sum[j]);
        }
        if (leader) s.entry_empty[entries.slot].arrive();

        s.weight_full[consumer][weights.slot].wait(weights.parity);
        if (tile.terms() > 0) add_to<T>(s.weight[consumer][weights.slot], sum);
        fence_async_shared();
        __syncwarp();
        if (leader) s.weight_done[consumer][weights.slot].arrive();
    }
}

__device__ void init_barriers(Shared& s) {
    for (int i = 0; i < kEntries; ++i) s.entry_full[i].init(32), s.entry_empty[i].init(1 + 4 + 2 + 8);  // panels, loaders, stores, consumers
    for (int i = 0; i < kMostPanels; ++i) s.panel_full[i].init(1 + 128), s.panel_empty[i].init(8);  // panels, loaders; consumers
    for (int c = 0; c < 2; ++c) {
        for (int i = 0; i < kWeights; ++i) s.weight_full[c][i].init(1), s.weight_done[c][i].init(4), s.weight_empty[c][i].init(1);
    }
    fence_barrier_init();
}

template <class T> __device__ void switch_all(const LswSwitchArgs& args) {
    if (args.first >= args.last) return;
    extern __shared__ unsigned char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);  // uniform, and the compiler knows
    if (warp == 0) canonical_route(args, s.route);
    if (threadIdx.x == 32) init_barriers(s), s.geometry = {16, 0, 0, 0}, s.groups = (args.last - args.first + 31) / 32;
    __syncthreads();
    plan(args, s);
    // Nothing to do: every block finds the same, so there is no queue to reset and nothing to record.
    if (s.group[s.groups] == 0) return;

    if (warp < 4) {
        give_registers<kProducerRegisters>();
        if (warp == 0) run_scheduler(args, s);
        if (warp == 1) run_panels<T>(args, s);
        if (warp >= 2) run_stores(args, s, warp - 2);
    } else if (warp < 8) {
        give_registers<kProducerRegisters>();
        run_loaders<T>(s);
    } else {
        take_registers<kConsumerRegisters>();
        run_consumer<T>(s, warp / 4 - 2);
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
