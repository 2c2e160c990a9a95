// The second half of unmerged adapters in bf16 for many rows on Hopper, where B of all slots is one matrix of few columns: a dense product
//
//     y[row, out] += sum over (slot, rank) of products[row][slot, rank] * B[slot][out, rank]
//
// a target, for all rows. A row has zeros for the slots that it does not use, so that no row needs to know its slots.
//
// Floor: y is read once and written once. What else comes from L2 costs as much a byte: where slots * depth is 128, B once for 128 rows would be as
// many bytes again. So a block goes down a strip of outputs whose B stays in shared memory, and products come once for the strip's width.
//
// One block an SM, which walks over tiles of 128 rows x 128 outputs, and four roles that hand them on through mbarriers:
//
//   movers (warps 0, 1)    y's granules of 64 rows, one mover for each consumer: brought by the copy engine, and written back when done
//   panels (warp 2)        panels [128, slots * depth] by the copy engine: B of a strip's outputs through a ring, and with the first tile of each
//                          128 rows their products, and which of them use a slot
//   loaders (warps 4 to 7) what the bank has no boxes for: empty slots, ranks of another box than most, rows that are not aligned
//   consumers (2 x 128)    each 64 rows: the products stay in registers across the strip, as wgmma's first operand; then the granule is changed in
//                          place in shared memory (ldmatrix, add in f32, one rounding, stmatrix)
//
// Why it is right:
// - A sum depends on the row's own products and on B alone. A row that uses no slot keeps its old words.
// - Zero times an infinity or a NaN of an adapter that the row does not use is no zero. So results that are not finite are computed anew, one by
//   one, over the row's own slots (sum_anew): by the mover, before it stores, so that no branch stands beside a product that runs.
// - What does not exist (outputs and rows past the last, ranks past an adapter's) is zero in the panels and never read; the copy engine brings
//   zeros for what lies outside y, and writes nothing there.
// - Tiles are dealt out by their number, so a launch leaves no state behind.
//
// The host: tiles are counted across a strip, then down it, strip after strip; targets follow each other (`begin`). A block has as many in a row as
// the others, or one more. Blocks: one an SM, or as many as there are tiles.
//
// -0 in a row that uses a slot becomes 0 where nothing is added to it, as by any sum that begins with zero.
#include "args.h"
#include "common/num.cuh"
#include "common/switch_tile_sm90.cuh"

namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr uint32_t kLoaders = 4;
constexpr uint32_t kGranules = 6;  // of y in flight
constexpr uint32_t kMostSteps = LSW_DENSE_RANKS / 16;
constexpr uint32_t kStepBytes = 32 * kTile;  // of a panel: 16 columns
constexpr uint32_t kPanelArea = 3 * kMostSteps * kStepBytes, kMostPanels = kPanelArea / (4 * kStepBytes);
constexpr uint32_t kUsedBytes = 4 * kTile;
constexpr int kTable = 1;  // the barrier of those who look at factors
static_assert(kGranules % kConsumers == 0, "a place stays with one consumer");

constexpr int kMoverRegisters = 40, kLoaderRegisters = 56, kConsumerRegisters = 208;
static_assert(128 * kMoverRegisters + 128 * kLoaderRegisters + 256 * kConsumerRegisters <= 512 * 128, "registers of a block");
static_assert(LSW_EXPAND90_THREADS == 512 && kTile == 128, "two warpgroups of producers, two of consumers of 64 rows each");

// What a loader asks of a slot at a target.
struct Factor {
    const void* b;
    uint32_t stride;
    uint16_t rank;
    bool is_aligned, by_box;
};

// A tile of the launch: where it begins, and at which target.
struct Tile {
    uint32_t target, row, col;
};

struct Shared {
    unsigned char granules[kGranules * kGranule];
    unsigned char panels[kPanelArea];                  // of B
    unsigned char products[kMostSteps * kStepBytes];  // of the rows of a tile
    alignas(16) uint32_t used[kTile];                 // by them: slots
    Factor factors[LSW_APPLY_TARGETS][LSW_EXPAND90_SLOTS];
    alignas(16) uint32_t odd[kGranules][4];  // whether a consumer's warp has left something there that is not finite
    Barrier y_full[kGranules], y_done[kGranules];
    Barrier panel_full[kMostPanels], panel_empty[kMostPanels];
    Barrier products_full, products_empty;
};
static_assert(sizeof(Shared) <= LSW_EXPAND90_SHARED, "the host asks for this much shared memory");

__device__ __forceinline__ const LswMap* factor_map(const LswExpand90Args& args, uint32_t target, uint32_t slot) {
    return reinterpret_cast<const LswMap*>(args.targets[target].maps) + 2 * slot + 1;
}

// Slots that rows use at a target.
__device__ __forceinline__ const uint32_t* used_of(const LswExpand90Args& args, uint32_t target) {
    return reinterpret_cast<const uint32_t*>(args.used) + static_cast<uint64_t>(target) * args.used_stride;
}

// A block's way through its tiles: down a strip that is as wide as there are places for panels of B, then down the next.
struct Walk {
    const LswExpand90Args& args;
    const uint32_t most;  // tiles of a strip's width
    uint32_t tile, end;
    uint32_t begin, width;  // of the strip: its first output; tiles
    uint32_t turn;          // of the tile's panel: they take turns
    Tile at;
    bool is_fresh;  // other rows, another target or another strip than the tile before
    bool is_new;    // the first one here of its outputs

    __device__ __forceinline__ Walk(const LswExpand90Args& args, uint32_t most)
        : args(args), most(most), tile(blockIdx.x * args.tiles + min(blockIdx.x, args.longer)), end(tile + args.tiles + (blockIdx.x < args.longer)) {
        if (is_over()) return;
        uint32_t index = tile, target = 0;
        while (target + 1 < args.count && index >= args.targets[target + 1].begin) ++target;
        index -= args.targets[target].begin;
        const uint32_t strip = (args.rows + kTile - 1) / kTile * most;
        at.target = target;
        enter(index / strip * most * kTile);
        at.row = index % strip / width * kTile, at.col = begin + index % strip % width * kTile;
    }
    __device__ __forceinline__ bool is_over() const { return tile >= end; }
    // Whether its strip ends with these rows, and so the use of its panels.
    __device__ __forceinline__ bool is_last() const { return at.row + kTile >= args.rows; }
    __device__ __forceinline__ void enter(uint32_t first) {
        begin = at.col = first, at.row = 0;
        width = min(most, (args.targets[at.target].out - first + kTile - 1) / kTile);
        turn = 0, is_fresh = is_new = true;
    }
    __device__ __forceinline__ void advance() {
        if (++tile >= end) return;
        is_fresh = false;
        if (++turn == width) turn = 0, is_new = false;
        at.col += kTile;
        if (at.col < begin + width * kTile) return;
        is_fresh = true;
        at.col = begin, at.row += kTile;
        if (at.row < args.rows) return;
        uint32_t first = begin + width * kTile;
        if (first >= args.targets[at.target].out) {
            first = 0;
            do ++at.target;
            while (args.targets[at.target].out == 0);  // there are tiles left, so there is a target that has some
        }
        enter(first);
    }
};

// How a panel of B lies: blocks [128, width], swizzled over their rows. A slot is a block, so that one box brings it, or several.
struct Layout {
    uint32_t shift;  // width is 16 << shift

    __device__ __forceinline__ explicit Layout(const LswExpand90Args& args) : shift(args.depth == 64 ? 2 : args.depth == 32 ? 1 : 0) {}
    __device__ __forceinline__ uint32_t width() const { return 16u << shift; }
    // Of 16 columns, in the row that is swizzled by nothing.
    __device__ __forceinline__ uint32_t begin(uint32_t step) const { return (step >> shift << (12 + shift)) + (step & ((1u << shift) - 1)) * 32; }
    __device__ __forceinline__ uint32_t place(uint32_t row, uint32_t step, uint32_t half) const {
        return swizzle(begin(step) + row * width() * 2 + half * 16, width() / 8 - 1);
    }
};

// One warp: 16 columns of a panel of B by plain copies, zeros where there is nothing. `from` is their first element, `left` those of a row that
// exist.
template <class T>
__device__ __forceinline__ void load_step(uint32_t to, uint32_t row_bytes, const T* from, uint32_t stride, uint32_t rows, uint32_t left) {
    const uint32_t half = threadIdx.x % 2, row = threadIdx.x % 32 / 2;
    const uint32_t bytes = left > 8 * half ? min(16u, 2 * (left - 8 * half)) : 0;
    const T* mine = from + static_cast<uint64_t>(row) * stride + 8 * half;
#pragma unroll 2
    for (uint32_t i = 0; i < kTile; i += 16, to += 16 * row_bytes, mine += 16ull * stride) {
        const bool exists = row + i < rows && bytes > 0;
        copy16_partly(to, exists ? mine : from, exists ? bytes : 0);
    }
}

// The same of rows that are not aligned.
template <class T>
__device__ void load_slowly(unsigned char* panel, const Layout& layout, uint32_t step, const T* from, uint32_t stride, uint32_t rows, uint32_t left) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < 16 * kTile; i += 32) {
        const uint32_t row = i / 16, col = i % 16;
        T x = from_float<T>(0.0f);
        if (row < rows && col < left) x = from[static_cast<uint64_t>(row) * stride + col];
        *reinterpret_cast<T*>(panel + layout.place(row, step, col / 8) + col % 8 * 2) = x;
    }
}

// Four warps: what boxes do not bring of a panel, each every fourth step.
template <class T> __device__ __forceinline__ void run_loaders(const LswExpand90Args& args, Shared& s, uint32_t loader, uint32_t steps) {
    const uint32_t panel_bytes = steps * kStepBytes, thread = threadIdx.x % 128;
    const Layout layout(args);
    for (uint32_t i = thread; i < args.count * args.slots; i += 32 * kLoaders) {
        const uint32_t target = i / args.slots, slot = i % args.slots;
        const LswFactor& f = reinterpret_cast<const LswFactor*>(args.targets[target].factors)[slot];
        const bool is_aligned = f.flags & LSW_B_ALIGNED, by_box = f.rank > 0 && is_aligned && panel_depth(f.rank) == args.depth;
        s.factors[target][slot] = {reinterpret_cast<const void*>(f.b), f.b_stride, static_cast<uint16_t>(f.rank), is_aligned, by_box};
        if (by_box) fence_tensor_map(factor_map(args, target, slot));
    }
    sync_some<kTable, 32 * (1 + kLoaders)>();
    Ring panels(kPanelArea / panel_bytes);
    for (Walk walk(args, panels.size); !walk.is_over(); walk.advance()) {
        if (!walk.is_new) continue;
        const Tile& at = walk.at;
        unsigned char* panel = s.panels + panels.slot * panel_bytes;
        bool some = false;
        s.panel_empty[panels.slot].wait(panels.parity ^ 1);
        for (uint32_t step = loader; step < steps; step += kLoaders) {
            const uint32_t slot = 16 * step / args.depth, k = 16 * step % args.depth, rows = args.targets[at.target].out - at.col;
            Factor f = {};
            if (slot < args.slots) f = s.factors[at.target][slot];
            if (f.by_box) continue;
            some = true;
            const T* b = static_cast<const T*>(f.b) + static_cast<uint64_t>(at.col) * f.stride + k;
            const uint32_t left = f.rank > k ? f.rank - k : 0;
            if (left == 0) b = reinterpret_cast<const T*>(args.products);
            if (f.is_aligned || left == 0) {
                const uint32_t to = shared_address(panel) + layout.place(threadIdx.x % 32 / 2, step, threadIdx.x % 2);
                load_step(to, 2 * layout.width(), b, f.stride, rows, left);
            } else {
                load_slowly(panel, layout, step, b, f.stride, rows, left);
            }
        }
        if (some) copy_commit(), copy_wait<0>(), fence_async_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) s.panel_full[panels.slot].arrive();
        panels.advance();
    }
}

// One thread: panels by the copy engine.
__device__ __forceinline__ void run_panels(const LswExpand90Args& args, Shared& s, uint32_t steps) {
    const uint32_t panel_bytes = steps * kStepBytes, block_bytes = 256 * args.depth;
    Ring panels(kPanelArea / panel_bytes), rows(1);
    bool has_waited = false;
    for (Walk walk(args, panels.size); !walk.is_over(); walk.advance()) {
        const Tile& at = walk.at;
        if (walk.is_new) {
            const Factor* factors = s.factors[at.target];
            uint32_t boxes = 0;
            for (uint32_t slot = 0; slot < args.slots; ++slot) boxes += factors[slot].by_box;
            s.panel_empty[panels.slot].wait(panels.parity ^ 1);
            Barrier& full = s.panel_full[panels.slot];
            full.arrive_expecting(boxes * block_bytes);
            unsigned char* panel = s.panels + panels.slot * panel_bytes;
            for (uint32_t slot = 0; slot < args.slots; ++slot, panel += block_bytes) {
                if (factors[slot].by_box) load_box(panel, factor_map(args, at.target, slot), 0, at.col, full, kEvictLast);
            }
            panels.advance();
        }
        if (!walk.is_fresh) continue;
        if (!has_waited) dependency_wait();
        has_waited = true;
        s.products_empty.wait(rows.parity ^ 1);
        s.products_full.arrive_expecting(panel_bytes + kUsedBytes);
        for (uint32_t block = 0; block < steps / 4; ++block) {
            load_cube(s.products + block * kGranule, &args.products_map, 64 * block, at.target, at.row, s.products_full);
        }
        load_bytes(s.used, used_of(args, at.target) + at.row, kUsedBytes, s.products_full);
        rows.advance();
    }
}

// A sum over the row's own slots alone.
template <class T>
__device__ __forceinline__ float sum_anew(const LswExpand90Args& args, uint32_t target, uint32_t row, uint32_t col, uint32_t slots) {
    float sum = 0.0f;
#pragma unroll 1
    for (; slots != 0; slots &= slots - 1) {
        const uint32_t slot = __ffs(slots) - 1;
        const LswFactor& f = reinterpret_cast<const LswFactor*>(args.targets[target].factors)[slot];
        const T* b = reinterpret_cast<const T*>(f.b) + static_cast<uint64_t>(col) * f.b_stride;
        const uint64_t place = static_cast<uint64_t>(row) * args.count + target;
        const T* products = reinterpret_cast<const T*>(args.products) + (place * args.slots + slot) * args.depth;
#pragma unroll 1
        for (uint32_t r = 0; r < f.rank; ++r) sum = fmaf(to_float(products[r]), to_float(b[r]), sum);
    }
    return sum;
}

__device__ __forceinline__ uint32_t used_by(const LswExpand90Args& args, uint32_t target, uint32_t row) {
    return row < args.rows ? used_of(args, target)[row] : 0;
}

// One warp: the results in a granule that are not finite, anew. In global memory y is what it was.
template <class T, class Y>
__device__ __forceinline__ void mend(const LswExpand90Args& args, const Tile& at, uint32_t first_row, unsigned char* granule) {
    const LswExpand90Target& target = args.targets[at.target];
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < 64 * kTile; i += 32) {
        const uint32_t row = first_row + i / kTile, col = at.col + i % kTile, slots = used_by(args, at.target, row);
        Y& y = *reinterpret_cast<Y*>(granule + i % kTile / 64 * kHalf + swizzle(i / kTile * 128 + i % 64 * 2, 7));
        if (slots == 0 || col >= target.out || is_finite(to_float(y))) continue;
        const float old = args.overwrites ? 0.0f : to_float(reinterpret_cast<const Y*>(target.y)[row * target.y_stride + col]);
        y = from_float<Y>(old + sum_anew<T>(args, at.target, row, col, slots));
    }
}

// One warp for each consumer: brings its granules of y, as far ahead as there are places, and has them stored when they are done.
template <class T> __device__ __forceinline__ void run_mover(const LswExpand90Args& args, Shared& s, uint32_t consumer, uint32_t steps) {
    constexpr uint32_t kPlaces = kGranules / kConsumers;
    const bool leader = threadIdx.x % 32 == 0;
    Ring coming(kGranules, consumer), going = coming;
    uint32_t places = kPlaces;
    dependency_wait();
    Walk walk(args, kPanelArea / (steps * kStepBytes)), behind = walk;
    for (;;) {
        for (; !walk.is_over() && places > 0; walk.advance()) {
            if (leader) {
                const LswMap* map = &args.maps[walk.at.target];
                Barrier& full = s.y_full[coming.slot];
                unsigned char* granule = s.granules + coming.slot * kGranule;
                if (args.overwrites) {
                    full.arrive();
                } else {
                    full.arrive_expecting(kGranule);
                    load_box(granule, map, walk.at.col, walk.at.row + 64 * consumer, full);
                    load_box(granule + kHalf, map, walk.at.col + 64, walk.at.row + 64 * consumer, full);
                }
            }
            coming.advance(kConsumers), --places;
        }
        if (places == kPlaces) break;
        s.y_done[going.slot].wait(going.parity);
        const Tile& at = behind.at;
        const uint32_t row = at.row + 64 * consumer;
        unsigned char* granule = s.granules + going.slot * kGranule;
        // Who gives the place back reads for all.
        bool is_odd = false;
        if (leader) {
            const uint4 odd = *reinterpret_cast<const uint4*>(s.odd[going.slot]);
            is_odd = (odd.x | odd.y | odd.z | odd.w) != 0;
        }
        if (__any_sync(kFullWarp, is_odd)) {
            args.y_type == 1 ? mend<T, __half>(args, at, row, granule) : mend<T, __nv_bfloat16>(args, at, row, granule);
        }
        fence_async_shared();
        __syncwarp();
        if (leader) {
            const LswMap* map = &args.maps[at.target];
            store_box(map, at.col, row, granule);
            store_box(map, at.col + 64, row, granule + kHalf);
            store_commit();
            store_wait_read();
        }
        __syncwarp();
        behind.advance();
        going.advance(kConsumers), ++places;
    }
    if (leader) store_wait();
}

// A lane's element of the accumulators of 64 rows x 64 columns: its row and column there.
constexpr int kSums = 32;
__device__ __forceinline__ uint32_t row_of(uint32_t element) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + element / 2 % 2 * 8; }
__device__ __forceinline__ uint32_t col_of(uint32_t element) { return element / 4 * 8 + threadIdx.x % 4 * 2 + element % 2; }

// Zero as long as all words added were of finite numbers.
template <class Y> struct Check;
template <> struct Check<__nv_bfloat16> {
    __nv_bfloat162 zeros = __float2bfloat162_rn(0.0f);
    __device__ __forceinline__ void add(uint32_t word) {
        zeros = __hfma2(reinterpret_cast<__nv_bfloat162&>(word), __float2bfloat162_rn(0.0f), zeros);
    }
    __device__ __forceinline__ bool is_odd() const { return (reinterpret_cast<const uint32_t&>(zeros) & 0x7fff7fff) != 0; }
};
template <> struct Check<__half> {
    __half2 zeros = __float2half2_rn(0.0f);
    __device__ __forceinline__ void add(uint32_t word) { zeros = __hfma2(reinterpret_cast<__half2&>(word), __float2half2_rn(0.0f), zeros); }
    __device__ __forceinline__ bool is_odd() const { return (reinterpret_cast<const uint32_t&>(zeros) & 0x7fff7fff) != 0; }
};

// y in shared memory. `check` becomes not finite where a result is not, or a sum of results.
template <class Y>
__device__ __forceinline__ void add_in_granule(const bool (&uses)[2], unsigned char* granule, Fragment<64>& y, const float (&sum)[kSums],
                                               Check<Y> (&check)[2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 old = unpack(y.words[j][i], Y{});
            const uint32_t word = pack(float2{old.x + sum[8 * j + 2 * i], old.y + sum[8 * j + 2 * i + 1]}, Y{});
            check[i % 2].add(word);
            y.words[j][i] = uses[i % 2] ? word : y.words[j][i];
        }
        stmatrix4(y.place(granule, j), y.words[j]);
    }
}

// y in global memory, where the copy engine cannot move it. The sums change hands in shared memory, so that a warp has whole rows.
constexpr uint32_t kSumStride = 64 + 8;  // floats: so rows lie in different banks
static_assert(4 * 64 * kConsumers * kSumStride <= kGranules * kGranule, "in place of granules");
template <class T, class Y>
__device__ __forceinline__ void add_in_place(const LswExpand90Args& args, const Tile& at, const bool (&uses_slot)[2], float* sums,
                                             const float (&sum)[kSums]) {
    constexpr int kPieces = 16;  // of 8 rows, two of 32 columns each
    const LswExpand90Target& target = args.targets[at.target];
    const uint32_t lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
#pragma unroll
    for (int j = 0; j < kSums; j += 2) *reinterpret_cast<float2*>(sums + row_of(j) * kSumStride + col_of(j)) = {sum[j], sum[j + 1]};
    __syncwarp();
#pragma unroll 1
    for (uint32_t h = 0; h < 2; ++h) {
        const auto row = [&](uint32_t i) { return warp_row + 8 * h + i / 2; };
        const auto col = [&](uint32_t i) { return at.col + lane + i % 2 * 32; };
        const auto place = [&](uint32_t i) { return reinterpret_cast<Y*>(target.y) + (at.row + row(i)) * target.y_stride + col(i); };
        uint32_t uses = 0, left = 0;  // pieces whose row uses a slot; to be written
        Y old[kPieces] = {};
#pragma unroll
        for (uint32_t i = 0; i < kPieces; ++i) {
            const bool is_used = __shfl_sync(kFullWarp, h == 0 ? uses_slot[0] : uses_slot[1], i / 2 * 4);
            if (is_used) uses |= 1u << i;
            if (at.row + row(i) >= args.rows || col(i) >= target.out || !(is_used || args.overwrites)) continue;
            left |= 1u << i;
            if (!args.overwrites) old[i] = *place(i);
        }
#pragma unroll
        for (uint32_t i = 0; i < kPieces; ++i) {
            const float sum = uses >> i & 1 ? sums[row(i) * kSumStride + lane + i % 2 * 32] : 0.0f;
            const Y now = from_float<Y>(to_float(old[i]) + sum);
            if ((left >> i & 1) == 0 || !is_finite(to_float(now))) continue;
            left -= 1u << i;
            *place(i) = now;
        }
#pragma unroll 1
        for (; left != 0; left &= left - 1) {
            const uint32_t i = __ffs(left) - 1, slots = used_by(args, at.target, at.row + row(i));
            const float old = args.overwrites ? 0.0f : to_float(*place(i));
            *place(i) = from_float<Y>(old + sum_anew<T>(args, at.target, at.row + row(i), col(i), slots));
        }
    }
    __syncwarp();
}

enum class How { kAdd, kOverwrite, kInPlace };

// The left half of a tile is added to y while the right half's product runs.
template <class T, class Y, How kHow, int kSteps>
__device__ __forceinline__ void run_consumer(const LswExpand90Args& args, Shared& s, uint32_t consumer) {
    constexpr uint32_t kPanelBytes = kSteps * kStepBytes;
    const Layout layout(args);
    const uint32_t lane = threadIdx.x % 32;
    const bool leader = lane == 0;
    Ring panels(kPanelArea / kPanelBytes), rows(1);
    uint32_t held[kSteps][4];
    bool uses[2];  // whether the lane's rows use a slot
    float sums[2][kSums];
    const auto hold = [&] {
        s.products_full.wait(rows.parity);
        // Who gives the place back reads for all.
        uint32_t users = 0;
        if (leader) {
            const uint4* rows = reinterpret_cast<const uint4*>(s.used + 64 * consumer + threadIdx.x % 128 / 32 * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) users |= ((rows[i].x != 0) | (rows[i].y != 0) << 1 | (rows[i].z != 0) << 2 | (rows[i].w != 0) << 3) << 4 * i;
        }
        users = __shfl_sync(kFullWarp, users, 0);
        for (int h = 0; h < 2; ++h) uses[h] = users >> (lane / 4 + 8 * h) & 1;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const uint32_t row = 64 * consumer + threadIdx.x % 128 / 32 * 16 + lane % 16;
            ldmatrix4(held[step], s.products + step / 4 * kGranule + swizzle(row * 128 + (step % 4 * 2 + lane / 16) * 16, 7));
        }
        __syncwarp();
        s.products_empty.arrive_if(leader);
        rows.advance();
    };
    const auto issue = [&](float (&sum)[kSums], uint32_t slot, int half) {
        const uint32_t begin = shared_address(s.panels + slot * kPanelBytes) + half * 128 * layout.width();
        const uint64_t high = static_cast<uint64_t>(layout.width() | (3 - layout.shift) << 30) << 32 | 1 << 16;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) wgmma_k_major(sum, held[step], high | begin + layout.begin(step) >> 4, step > 0, T{});
        wgmma_commit();
    };
    dependency_wait();
    dependency_release();
    Walk walk(args, panels.size);
    Ring places(kGranules, consumer);
    for (; !walk.is_over(); walk.advance()) {
        if (walk.is_fresh) hold();
        uint32_t slot = panels.slot;
        if (walk.is_new) {
            s.panel_full[slot].wait(panels.parity);
            panels.advance();
        } else {
            // All of the strip's have come; the next one's would go to `slot`.
            slot += walk.turn + (slot + walk.turn < walk.width ? panels.size : 0) - walk.width;
        }
        const bool is_last = walk.is_last();
        issue(sums[0], slot, 0);
        issue(sums[1], slot, 1);
        if constexpr (kHow == How::kInPlace) {
            wgmma_wait<0>(sums[0]), wgmma_wait<0>(sums[1]);
            s.panel_empty[slot].arrive_if(leader && is_last);
            Tile at = {walk.at.target, walk.at.row + 64 * consumer, walk.at.col};
            float* area = reinterpret_cast<float*>(s.granules) + consumer * 64 * kSumStride;
            add_in_place<T, Y>(args, at, uses, area, sums[0]);
            at.col += 64;
            add_in_place<T, Y>(args, at, uses, area, sums[1]);
        } else {
            unsigned char* granule = s.granules + places.slot * kGranule;
            Fragment<64> y{};
            Check<Y> check[2];
            s.y_full[places.slot].wait(places.parity);
            if constexpr (kHow == How::kAdd) y.load(granule);
            wgmma_wait<1>(sums[0]);
            add_in_granule<Y>(uses, granule, y, sums[0], check);
            y = {};
            if constexpr (kHow == How::kAdd) y.load(granule + kHalf);
            wgmma_wait<0>(sums[1]);
            s.panel_empty[slot].arrive_if(leader && is_last);
            add_in_granule<Y>(uses, granule + kHalf, y, sums[1], check);
            const bool is_odd = __any_sync(kFullWarp, (uses[0] && check[0].is_odd()) || (uses[1] && check[1].is_odd()));
            if (leader) s.odd[places.slot][threadIdx.x / 32 % 4] = is_odd;
            __syncwarp();
            s.y_done[places.slot].arrive_if(leader);
            places.advance(kConsumers);
        }
    }
}

template <class T, class Y, How kHow>
__device__ __forceinline__ void run_consumer(const LswExpand90Args& args, Shared& s, uint32_t consumer, uint32_t steps) {
    steps == 4 ? run_consumer<T, Y, kHow, 4>(args, s, consumer) : run_consumer<T, Y, kHow, 8>(args, s, consumer);
}
template <class T, class Y, bool kInPlace>
__device__ __forceinline__ void run_consumer(const LswExpand90Args& args, Shared& s, uint32_t consumer, uint32_t steps) {
    if constexpr (kInPlace) return run_consumer<T, Y, How::kInPlace>(args, s, consumer, steps);
    else if (args.overwrites) return run_consumer<T, Y, How::kOverwrite>(args, s, consumer, steps);
    else return run_consumer<T, Y, How::kAdd>(args, s, consumer, steps);
}

template <class T, bool kInPlace> __device__ __forceinline__ void expand_all(const LswExpand90Args& args) {
    extern __shared__ __align__(1024) unsigned char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw);
    const uint32_t warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);  // uniform, and the compiler knows
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < kMostPanels; ++i) s.panel_full[i].init(1 + kLoaders), s.panel_empty[i].init(8);  // consumers' warps
        for (uint32_t i = 0; i < kGranules; ++i) s.y_full[i].init(1), s.y_done[i].init(4);
        s.products_full.init(1), s.products_empty.init(8);
        fence_barrier_init();
    }
    __syncthreads();
    const uint32_t steps = (args.slots * args.depth + 63) / 64 * 4;
    if (warp < 4) {
        give_registers<kMoverRegisters>();
        if (!kInPlace && warp < kConsumers) run_mover<T>(args, s, warp, steps);
        if (warp == kConsumers) {
            sync_some<kTable, 32 * (1 + kLoaders)>();
            if (elect_one()) run_panels(args, s, steps);
        }
    } else if (warp < 8) {
        give_registers<kLoaderRegisters>();
        run_loaders<T>(args, s, warp - 4, steps);
    } else {
        take_registers<kConsumerRegisters>();
        const uint32_t consumer = warp / 4 - 2;
        if constexpr (kInPlace) {
            if (args.y_type == 0) return run_consumer<T, float, kInPlace>(args, s, consumer, steps);
        }
        if (args.y_type == 1) return run_consumer<T, __half, kInPlace>(args, s, consumer, steps);
        run_consumer<T, __nv_bfloat16, kInPlace>(args, s, consumer, steps);
    }
}

// The copy engine wants its maps at multiples of 64 bytes.
struct alignas(64) Args : LswExpand90Args {};
static_assert(sizeof(Args) == sizeof(LswExpand90Args), "what the host passes");

}  // namespace

#define LSW_EXPAND90(name, T, in_place)                                                                                    \
    extern "C" __global__ void __launch_bounds__(LSW_EXPAND90_THREADS, 1) lsw_apply_##name(const __grid_constant__ Args args) { \
        expand_all<T, in_place>(args);                                                                                     \
    }
LSW_EXPAND90(expand_bf16_sm90, __nv_bfloat16, false)
LSW_EXPAND90(expand_any_bf16_sm90, __nv_bfloat16, true)
