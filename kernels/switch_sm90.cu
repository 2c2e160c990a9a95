// The switch on Hopper: the contract of switch.cu, for f16 and bf16 targets whose W and W_base have addresses, row strides and row bytes
// that are multiples of 16 (the copy engine stores whole 16 bytes: past a ragged row it would zero its neighbour).
//
// Floor: W is read once and written once. Everything else hides behind that stream or is overhead.
//
// One block an SM, four roles that hand a 128 x 128 tile from one to the next through mbarriers:
//
//   scheduler (warp 0)  takes tiles from the queue, works out the target's terms, publishes both, and has the copy engine bring W
//   panels    (warp 1)  per term and 64 columns of its rank: A [<= 64, 128] and B [128, <= 64] to shared memory
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
constexpr int kPanelPool = 120 * 1024;      // for the panels of A and B
constexpr int kMostPanels = 15;             // of the smallest: 16 of the rank
constexpr int kStripe = 32 * 1024;          // of the pool, twice: where the stripes of B stay
constexpr int kEntries = 4;                 // tiles between the scheduler and the slowest role
constexpr uint32_t kEnd = ~0u;

// A block starts with 168 registers a thread and can only share these out: asking for one more waits for ever.
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 384 * 168, "registers of a block");

static_assert(kThreads == 384 && kTile == 128, "one producer warpgroup and two consumers of 64 rows each");

struct alignas(16) Term {
    float coefficient;
    uint32_t factor;  // target * slots + slot
    int rank;
    uint32_t flags;
};

// A tile on its way through the roles.
struct alignas(16) Header {
    uint32_t target;  // kEnd: there are no more
    int row, col;
    uint32_t terms;  // how many; and:
};
constexpr uint32_t kNewRun = 1u << 31;  // the first tile of a run, which brings its own stripes of B
constexpr uint32_t kBlocks = 1u << 30;  // LSW_WEIGHT_BLOCKS
constexpr uint32_t kCount = kBlocks - 1;
struct Entry {
    Header header;
    Term terms[2 * LSW_MAX_K];
};

// How this launch uses the pool. Every block works it out from the route; nothing depends on which block does.
struct Geometry {
    uint32_t depth;        // of the deepest panel: 16, 32 or 64 of the rank
    uint32_t inner;        // the longest sum over ranks of a tile
    uint32_t unaligned;    // some adapter comes through load_slowly
    uint32_t stripes;      // whether B of a whole row of tiles stays over a run of tiles
    uint32_t panels;       // slots of the ring
    uint32_t panel_bytes;  // of a slot: A and B, or A alone
    uint32_t grab;         // consecutive tiles that a block takes at a time
};

// The copy engine's swizzle repeats every 1,024 bytes: granules and panels stand at multiples of that.
struct Shared {
    unsigned char weight[2][kWeights][2 * kHalf];  // [consumer][stage][left and right 64 columns]
    unsigned char pool[kPanelPool];                // stripes of B, then the ring of panels
    Entry entry[kEntries];
    Barrier entry_full[kEntries], entry_empty[kEntries];
    Barrier weight_full[2][kWeights], weight_done[2][kWeights], weight_empty[2][kWeights];
    Barrier panel_full[kMostPanels], panel_empty[kMostPanels];
    Barrier stripe_full[2];
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

__device__ __forceinline__ uint32_t padded_rank(uint32_t rank) {
    const uint32_t depth = panel_depth(rank);
    return (rank + depth - 1) / depth * depth;
}

// What a changed target asks of the pool: an upper bound, since an adapter of both routes counts twice.
__device__ void demand(const LswSwitchArgs& args, Shared& s, uint32_t target) {
    uint32_t inner = 0, depth = 0, unaligned = 0;
    auto add = [&](int slot) {
        const LswFactor& f = factor(args, target, slot);
        inner += padded_rank(f.rank);
        depth = max(depth, static_cast<uint32_t>(panel_depth(f.rank)));
        unaligned |= f.flags != (LSW_A_ALIGNED | LSW_B_ALIGNED);
        if (f.flags == (LSW_A_ALIGNED | LSW_B_ALIGNED)) {
            const LswMap* maps = factor_maps(args, target * args.slots + slot);
            fence_tensor_map(maps), fence_tensor_map(maps + 1);
        }
    };
    for (uint32_t e = 0; e < s.route.count; ++e) {
        if (factor(args, target, s.route.slot[e]).rank > 0) add(s.route.slot[e]);
    }
    const uint32_t held = args.in_place ? merged_count(args, target) : 0;
    for (uint32_t e = 0; e < held; ++e) add(merged(args, target)[e].slot);
    atomicMax(&s.geometry.inner, inner);
    atomicMax(&s.geometry.depth, depth);
    atomicOr(&s.geometry.unaligned, unaligned);
}

// One thread. A run of tiles in a row shares its B: kept as a stripe it is brought once a run, which spares the copy engine 128 rows a
// tile and panel (it moves one row of at most 128 bytes in about 4 cycles, however short the row). Two stripes, so that a run begins
// before the last one has ended. Where the stripes do not fit, short grabs: memory likes all blocks close together.
__device__ void lay_out(const LswSwitchArgs& args, Geometry& g, uint32_t total) {
    g.depth = max(g.depth, 16);
    g.stripes = !g.unaligned && g.inner * 256 <= kStripe;
    g.panel_bytes = g.depth * (g.stripes ? 256 : 512);
    g.panels = min((kPanelPool - (g.stripes ? 2 * kStripe : 0)) / g.panel_bytes, kMostPanels);
    const uint32_t wanted = !g.stripes ? 2 : args.in_place ? 8 : 4;
    g.grab = max(1u, min(wanted, (total + gridDim.x - 1) / gridDim.x));
}

// All threads: the tiles of each group of 32 targets, then their prefix sum, and the geometry. Ends with a barrier.
__device__ void plan(const LswSwitchArgs& args, Shared& s) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t g = warp; g < s.groups; g += kThreads / 32) {
        const uint32_t target = args.first + 32 * g + lane;
        const uint32_t tiles = changed_tiles(args, s.route, target);
        if (tiles > 0) demand(args, s, target);
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
        if (lane == 0) s.group[0] = 0, lay_out(args, s.geometry, carry);
    }
    __syncthreads();
}

// Where the scheduler is: its target, of which it keeps everything that a tile needs, so that a tile costs it no access to global memory.
struct Cursor {
    uint32_t group = kEnd, target = kEnd;
    uint32_t before_lane = 0, lane_tiles = 0;  // of this lane's target in the group
    uint32_t start = 0, end = 0;               // the target's tiles
    uint32_t across = 1;                       // its tiles in a row
    LaneTerms terms{};
    Term enter{}, leave{};  // of this lane
    int row = -1;
    uint32_t blocks = 0;   // kBlocks or 0
    bool new_run = false;  // the tile has another target or row than the one before
};

__device__ __forceinline__ Term make_term(const LswSwitchArgs& args, uint32_t target, int slot, float coefficient) {
    const LswFactor& f = factor(args, target, slot);
    return {coefficient, target * args.slots + slot, static_cast<int>(f.rank), f.flags};
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
    at.blocks = t.flags & LSW_WEIGHT_BLOCKS ? kBlocks : 0;
    at.terms = lane_terms(args, s.route, at.target);
    if (at.terms.enter_slot >= 0) at.enter = make_term(args, at.target, at.terms.enter_slot, at.terms.enter);
    if (at.terms.leave_slot >= 0) at.leave = make_term(args, at.target, at.terms.leave_slot, at.terms.leave);
    at.row = -1;
}

// One warp: a tile and its terms become an entry of the ring.
__device__ void publish(Shared& s, Ring& ring, const Cursor& at, int row, int col) {
    s.entry_empty[ring.slot].wait(ring.parity ^ 1);
    Entry& entry = s.entry[ring.slot];
    if (at.target != kEnd) {
        if (at.terms.enter_slot >= 0) entry.terms[at.terms.enter_at] = at.enter;
        if (at.terms.leave_slot >= 0) entry.terms[at.terms.leave_at] = at.leave;
    }
    if (threadIdx.x % 32 == 0) entry.header = {at.target, row, col, at.terms.count | at.blocks | (at.new_run ? kNewRun : 0)};
    s.entry_full[ring.slot].arrive();  // each lane for what it wrote
    ring.advance();
}

// Four words out of an entry. The leader alone reads them, since the leader alone gives the entry back.
template <class Words> __device__ __forceinline__ Words take(const Words& words) {
    static_assert(sizeof(Words) == 16 && alignof(Words) == 16, "one load");
    int4 value{};
    if (threadIdx.x % 32 == 0) value = *reinterpret_cast<const int4*>(&words);
    value.x = __shfl_sync(kFullWarp, value.x, 0), value.y = __shfl_sync(kFullWarp, value.y, 0);
    value.z = __shfl_sync(kFullWarp, value.z, 0), value.w = __shfl_sync(kFullWarp, value.w, 0);
    Words taken;
    memcpy(&taken, &value, 16);
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
            if (args.in_place && at.terms.count == 0) continue;
            const int row = (tile - at.start) / at.across * kTile, col = (tile - at.start) % at.across * kTile;
            at.new_run = row != at.row;
            at.row = row;
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
    __syncwarp();
}

// Where the ring of panels, and a buffer of stripes, stand in the pool.
__device__ __forceinline__ unsigned char* ring_of_panels(Shared& s) { return s.pool + (s.geometry.stripes ? 2 * kStripe : 0); }
__device__ __forceinline__ unsigned char* stripe_at(Shared& s, uint32_t buffer) { return s.pool + buffer * kStripe; }

// Brings the stripes of B for a new row of tiles: all terms, one behind the other.
__device__ void load_stripes(const LswSwitchArgs& args, Shared& s, const Entry& entry, uint32_t terms, uint32_t buffer) {
    uint32_t bytes = 0;
    for (uint32_t i = 0; i < terms; ++i) bytes += padded_rank(entry.terms[i].rank) * 256;
    s.stripe_full[buffer].arrive_expecting(bytes);
    unsigned char* to = stripe_at(s, buffer);
    for (uint32_t i = 0; i < terms; ++i) {
        const Term& term = entry.terms[i];
        const LswMap* map = factor_maps(args, term.factor) + 1;
        const int depth = panel_depth(term.rank);
        for (int k = 0; k < term.rank; k += depth, to += depth * 256) {
            load_box(to, map, k, entry.header.row, s.stripe_full[buffer]);
        }
    }
}

template <class T> __device__ void run_panels(const LswSwitchArgs& args, Shared& s) {
    const bool leader = threadIdx.x % 32 == 0;
    const uint32_t stripes = s.geometry.stripes, panel_bytes = s.geometry.panel_bytes;
    unsigned char* ring = ring_of_panels(s);
    Ring entries(kEntries), panels(s.geometry.panels);
    uint32_t buffer = 0;
    uint32_t issued = 0, run_start = 0;  // panels so far, and before the current run
    for (;; entries.advance()) {
        const Entry& entry = next_entry(s, entries);
        const auto [target, row, col, terms] = take(entry.header);
        if (target == kEnd) return;
        const uint32_t term_count = terms & kCount;
        if (stripes && (terms & kNewRun)) {
            // The buffer's former run, the one before the last, has ended when its last panel was given back.
            if (run_start > 0 && issued - run_start < panels.size) {
                s.panel_empty[(run_start - 1) % panels.size].wait((run_start - 1) / panels.size & 1);
            }
            run_start = issued;
            if (leader && term_count > 0) load_stripes(args, s, entry, term_count, buffer);
            buffer ^= 1;
            __syncwarp();
        }
        Term next = take(entry.terms[0]);
        for (uint32_t i = 0; i < term_count; ++i) {
            const Term term = next;
            if (i + 1 < term_count) next = take(entry.terms[i + 1]);
            const LswMap* maps = factor_maps(args, term.factor);
            const int depth = panel_depth(term.rank);
            for (int k = 0; k < term.rank; k += depth, panels.advance(), ++issued) {
                s.panel_empty[panels.slot].wait(panels.parity ^ 1);
                unsigned char* panel = ring + panels.slot * panel_bytes;
                Barrier& full = s.panel_full[panels.slot];
                if (term.flags != (LSW_A_ALIGNED | LSW_B_ALIGNED)) {
                    const LswFactor& f = reinterpret_cast<const LswFactor*>(args.factors)[term.factor];
                    load_slowly<T>(f, panel, row, col, target_of(args, target), k, depth);
                    if (leader) full.arrive();
                } else if (leader) {
                    full.arrive_expecting(depth * (stripes ? 256 : 512));
                    load_pair(panel, maps, terms & kBlocks, col, k, depth, full);
                    if (!stripes) load_box(panel + depth * 256, maps + 1, k, row, full);
                }
                __syncwarp();
            }
        }
        if (leader) s.entry_empty[entries.slot].arrive();
    }
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
            if (tile.terms & kBlocks) {
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
    const uint32_t stripes = s.geometry.stripes, panel_bytes = s.geometry.panel_bytes;
    const uint32_t ring = shared_address(ring_of_panels(s)), stripe = shared_address(s.pool);
    Ring entries(kEntries), weights(kWeights), panels(s.geometry.panels);
    uint32_t buffer = 1, stripe_parity = 3;  // as after a run before the first
    for (;; entries.advance(), weights.advance()) {
        const Entry& entry = next_entry(s, entries);
        const Header tile = take(entry.header);
        if (tile.target == kEnd) return;
        const uint32_t term_count = tile.terms & kCount;
        if (stripes && (tile.terms & kNewRun)) {
            buffer ^= 1;
            if (term_count > 0) {
                stripe_parity ^= 1u << buffer;
                s.stripe_full[buffer].wait(stripe_parity >> buffer & 1);
            }
        }
        uint32_t stripe_at = stripe + buffer * kStripe;
        float sum[64] = {};
        Term next = take(entry.terms[0]);
        for (uint32_t i = 0; i < term_count; ++i) {
            const Term term = next;
            if (i + 1 < term_count) next = take(entry.terms[i + 1]);
            const int depth = panel_depth(term.rank);
            // B: rows of `depth` elements, swizzled over that width. A: two blocks of 64 columns.
            const uint64_t b_layout = layout(16, depth * 16, depth == 64 ? 1 : depth == 32 ? 2 : 3), a_layout = layout(depth * 128, 1024, 1);
            float product[64];
            uint32_t former = 0;
            for (int k = 0; k < term.rank; k += depth, panels.advance(), stripe_at += depth * 256) {
                const uint32_t a = ring + panels.slot * panel_bytes;
                const uint32_t b = (stripes ? stripe_at : a + depth * 256) + consumer * depth * 128;
                s.panel_full[panels.slot].wait(panels.parity);
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
        if (term_count > 0) add_to<T>(s.weight[consumer][weights.slot], sum);
        fence_async_shared();
        __syncwarp();
        if (leader) s.weight_done[consumer][weights.slot].arrive();
    }
}

__device__ void init_barriers(Shared& s) {
    for (int i = 0; i < kEntries; ++i) s.entry_full[i].init(32), s.entry_empty[i].init(1 + 2 + 8);  // panels, stores, consumer warps
    for (int i = 0; i < kMostPanels; ++i) s.panel_full[i].init(1), s.panel_empty[i].init(8);       // consumer warps
    for (int i = 0; i < 2; ++i) s.stripe_full[i].init(1);
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
    if (threadIdx.x == 32) init_barriers(s), s.geometry = {}, s.groups = (args.last - args.first + 31) / 32;
    __syncthreads();
    plan(args, s);
    // Nothing to do: every block finds the same, so there is no queue to reset and nothing to record.
    if (s.group[s.groups] == 0) return;

    if (warp < 4) {
        give_registers<kProducerRegisters>();
        if (warp == 0) run_scheduler(args, s);
        if (warp == 1) run_panels<T>(args, s);
        if (warp >= 2) run_stores(args, s, warp - 2);
    } else {
        take_registers<kConsumerRegisters>();
        run_consumer<T>(s, warp / 4 - 1);
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
