// Unmerged adapters of 16 bits for more than 64 rows, on the tensor cores: what apply.cu says, with x read once and y read and written
// once.
//
// The rows of a batch are taken in groups (shrink: of 32, expand: of 16, the M of an mma); each slot that occurs in a group is one
// product for all of them, and a row takes the results of its own slots only. So an adapter is read once a group, and not once a
// row. An element of an mma's result depends on its own row of the first operand and its own column of the second alone: whatever the
// others hold, NaN included, a row's bits are the same, and the same in any batch of more than 64.
//
//   order   a permutation that brings rows of like routes together, so that a group has few slots (with 8 slots, k = 2, 4096 rows:
//           2.1 of 16 rows and 2.2 of 32 instead of 8). One block; buckets of the two lowest slots; atomics decide the order within a
//           bucket, which no result depends on.
//   shrink  products = A x. A block has 32 rows and up to 12 tiles of 8 ranks at a time, of whatever slots and targets; a warp has an
//           eighth of in_features for all of them, and the eighths are added up in order. So x is read once where 12 tiles are enough
//           (q, k, v at r = 16: two slots), and what is left is A, once a block, through L2.
//   expand  y += c (B products). A warp has 16 rows and walks over outputs, 64 at a time; terms are scaled and added in f32. The four
//           warps of a block go over the same outputs, and rows in order have the same slots: B comes from L1 for three of them.
//
// The products are f32, and enter the second mma in parts that lose nothing: beside B in bf16 as three of 8 bits, beside B in f16 as
// two tf32 of 11 bits (nothing but the last bits of an f32). Shrink stores them in parts, since expand reads them once a tile of y.
//
// Operands come straight from memory into registers, without shared memory between: the order of k within a step is free as long
// as both agree on it, so a lane takes eight (four) consecutive elements of a row where the layout of the mma asks for pairs eight
// apart. In the same way a lane owns eight consecutive outputs of a row: y is read and written 16 bytes at a time. Shrink keeps a step
// in flight by loading a register anew as soon as it was used. Expand fetches y two tiles ahead by asynchronous copies into shared
// memory; each lane reads back what it copied itself, so that this needs no barrier.
#include "common/apply.cuh"
#include "common/ptx.cuh"

namespace {

constexpr uint32_t kNone = 0x7fffffff;  // above every slot

// Canonical routes of some rows: slots ascending, kNone behind the last. The odd width keeps rows in different banks.
template <int kRows> struct Routes {
    uint32_t row[kRows];
    uint32_t slot[kRows][LSW_MAX_K + 1];
    float gate[kRows][LSW_MAX_K + 1];
};

// One thread a row: the route of the index-th row, sorted in as it is read. Rows past the last have none.
template <int kRows> __device__ void load_route(const LswApplyArgs& args, uint32_t index, uint32_t i, Routes<kRows>& routes, bool reports) {
    constexpr uint32_t kAhead = 4;
    uint32_t row = index, count = 0;
    int64_t item = -1;
    if (index < args.rows) {
        if (args.order != 0) row = reinterpret_cast<const uint32_t*>(args.order)[index];
        item = item_of(args, row);
    }
    routes.row[i] = row;
    for (uint32_t e0 = 0; item >= 0 && e0 < args.k; e0 += kAhead) {
        int slot[kAhead];
        float gate[kAhead];
#pragma unroll
        for (uint32_t e = 0; e < kAhead; ++e) {
            slot[e] = id_at(args, item, e0 + e);
            gate[e] = gate_at(args, item, e0 + e);
        }
#pragma unroll
        for (uint32_t e = 0; e < kAhead; ++e) {
            if (reports) report_id(args, slot[e]);
            slot[e] = known_id(slot[e], args.slots);
            if (slot[e] < 0) continue;
            uint32_t at = count;
            while (at > 0 && routes.slot[i][at - 1] > slot[e]) --at;
            if (at > 0 && routes.slot[i][at - 1] == slot[e]) {
                routes.gate[i][at - 1] += gate[e];
                continue;
            }
            for (uint32_t move = count; move > at; --move) {
                routes.slot[i][move] = routes.slot[i][move - 1];
                routes.gate[i][move] = routes.gate[i][move - 1];
            }
            routes.slot[i][at] = slot[e];
            routes.gate[i][at] = gate[e];
            ++count;
        }
    }
    routes.slot[i][count] = kNone;
}

// Walks over the slots of a group of rows, ascending. One warp; lane l keeps the place of row l.
template <int kRows> struct Walk {
    static_assert(kRows <= 32, "a row a lane");
    uint32_t next = 0;
    int position = -1;  // of the slot in the lane's route; -1: it is not there

    __device__ __forceinline__ uint32_t step(const Routes<kRows>& routes) {
        const uint32_t lane = threadIdx.x % 32, mine = lane < kRows ? routes.slot[lane][next] : kNone;
        const uint32_t slot = __reduce_min_sync(kFullWarp, mine);
        const bool uses = slot != kNone && mine == slot;
        position = uses ? static_cast<int>(next++) : -1;
        return slot;
    }
};

// Four products of a row and a slot, as they enter the second mma.
struct Parts {
    uint4 words[2];
};
static_assert(sizeof(Parts) == 4 * LSW_MANY_PRODUCT_BYTES, "the host knows how much workspace that takes");

__device__ __forceinline__ Parts* parts_at(const LswApplyArgs& args, uint32_t row, uint32_t position, uint32_t column) {
    const uint64_t entry = static_cast<uint64_t>(row) * args.k + position;
    return reinterpret_cast<Parts*>(args.products) + (entry * args.width + column) / 4;
}

// Three parts of 8 bits, cut and not rounded: a large number does not become infinite, and the last part is exact. What is not finite
// is in the first part alone.
__device__ __forceinline__ Parts split(const float (&x)[4], __nv_bfloat16) {
    uint32_t part[3][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float rest = x[i];
#pragma unroll
        for (int p = 0; p < 3; ++p) {
            part[p][i] = __float_as_uint(rest);
            rest = is_finite(x[i]) ? rest - __uint_as_float(part[p][i] & 0xffff0000u) : 0.0f;
        }
    }
    const auto pair = [&](int p, int i) { return __byte_perm(part[p][i], part[p][i + 1], 0x7632); };
    return {{{pair(0, 0), pair(0, 2), pair(1, 0), pair(1, 2)}, {pair(2, 0), pair(2, 2), 0, 0}}};
}

__device__ __forceinline__ Parts split(const float (&x)[4], __half) {
    uint32_t part[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float high = round_tf32(x[i]);
        part[0][i] = __float_as_uint(high);
        part[1][i] = __float_as_uint(is_finite(high) ? round_tf32(x[i] - high) : 0.0f);
    }
    return {{{part[0][0], part[0][1], part[0][2], part[0][3]}, {part[1][0], part[1][1], part[1][2], part[1][3]}}};
}

// sum += 16 ranks of products, of rows g (low) and g + 8 (high), and of B; small parts first.
__device__ __forceinline__ void multiply(float (&sum)[4], const Parts& low, const Parts& high, uint2 b, __nv_bfloat16) {
    mma16816(sum, {low.words[1].x, high.words[1].x, low.words[1].y, high.words[1].y}, b.x, b.y, __nv_bfloat16{});
    mma16816(sum, {low.words[0].z, high.words[0].z, low.words[0].w, high.words[0].w}, b.x, b.y, __nv_bfloat16{});
    mma16816(sum, {low.words[0].x, high.words[0].x, low.words[0].y, high.words[0].y}, b.x, b.y, __nv_bfloat16{});
}
__device__ __forceinline__ void multiply(float (&sum)[4], const Parts& low, const Parts& high, uint2 b, __half) {
    const float2 b01 = unpack(b.x, __half{}), b23 = unpack(b.y, __half{});
#pragma unroll
    for (int p = 1; p >= 0; --p) {
        const uint4 &l = low.words[p], &h = high.words[p];
        const float first[4] = {__uint_as_float(l.x), __uint_as_float(h.x), __uint_as_float(l.y), __uint_as_float(h.y)};
        const float second[4] = {__uint_as_float(l.z), __uint_as_float(h.z), __uint_as_float(l.w), __uint_as_float(h.w)};
        mma1688(sum, first, b01.x, b01.y);
        mma1688(sum, second, b23.x, b23.y);
    }
}

// The target whose ranks these columns of the products are.
__device__ __forceinline__ const LswApplyTarget& target_at(const LswApplyArgs& args, uint32_t column) {
    uint32_t t = args.count - 1;
    while (t > 0 && args.targets[t].column > column) --t;
    return args.targets[t];
}

template <class T> __device__ __forceinline__ uint32_t word(const Eight<T>& eight, int i) {
    const uint4& bits = eight.part[0].bits;
    return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
}

constexpr uint32_t kWarps = LSW_MANY_SHRINK_THREADS / 32;
constexpr int kRows = LSW_MANY_SHRINK_ROWS, kFrags = kRows / 16;
constexpr uint32_t kBatch = 32;  // slots, or tiles, that are listed at a time: one a lane

// Eight ranks of one slot at one target.
struct Tile {
    uint64_t a[8];  // of each rank; past the last, the last
    uint32_t column;
    uint32_t ranks;  // that exist, 1 to 8
    uint16_t entry;  // of the listed slots
    uint16_t aligned;
};

struct ShrinkShared {
    Routes<kRows> routes;
    uint32_t slots[kBatch];
    int position[kBatch][kRows];  // of a listed slot in a row's route; -1: it is not there
    Tile tiles[kBatch];
    uint32_t slot_count, tile_count;
    float sums[kWarps][8 * kFrags * 2][32];  // of four tiles, as the mma lays out its results
};

// One warp: the next slots of the rows.
__device__ __forceinline__ void list_slots(Walk<kRows>& walk, ShrinkShared& shared) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t count = 0;
    for (uint32_t slot; count < kBatch && (slot = walk.step(shared.routes)) != kNone; ++count) {
        shared.position[count][lane] = walk.position;
        if (lane == 0) shared.slots[count] = slot;
    }
    if (lane == 0) shared.slot_count = count;
}

// One warp: the tiles that exist among pairs of a listed slot and eight columns of the products, from a pair on.
__device__ __forceinline__ void list_tiles(const LswApplyArgs& args, uint32_t first_pair, ShrinkShared& shared) {
    const uint32_t lane = threadIdx.x % 32, entry = (first_pair + lane) / (args.width / 8);
    const uint32_t column = (first_pair + lane) % (args.width / 8) * 8;
    LswFactor f = {};
    uint32_t rank = 0;
    if (entry < shared.slot_count) {
        const LswApplyTarget& target = target_at(args, column);
        f = factor_of(target, shared.slots[entry]);
        rank = column - target.column;
    }
    const uint32_t exist = __ballot_sync(kFullWarp, rank < f.rank);
    if (lane == 0) shared.tile_count = __popc(exist);
    if (rank >= f.rank) return;
    Tile& tile = shared.tiles[__popc(exist & ((1u << lane) - 1))];
    tile.column = column;
    tile.ranks = min(8, f.rank - rank);
    tile.entry = entry;
    tile.aligned = (f.flags & LSW_A_ALIGNED) != 0;
    for (uint32_t i = 0; i < 8; ++i) tile.a[i] = f.a + 2 * min(rank + i, f.rank - 1) * static_cast<uint64_t>(f.a_stride);
}

// One warp: sums = a slice of A x of the block's rows and some tiles. What does not exist (a row without adapters, ranks past the
// last) is computed from something that does, and not looked at. kWhole: all are whole aligned packs.
template <bool kWhole, int kTiles, class T>
__device__ __forceinline__ void multiply_slice(const LswApplyArgs& args, const Routes<kRows>& routes, const Tile* tiles, uint32_t count,
                                               float (&sums)[kTiles][kFrags][4]) {
    const uint32_t lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const uint32_t length = (args.in + 32 * kWarps - 1) / (32 * kWarps) * 32;
    const uint32_t end = min(args.in, (slice + 1) * length);
    const uint32_t mine = 8 * (lane % 4);
    uint32_t col = slice * length;
    const T* x[kFrags][2];
    Eight<T> rows[kFrags][2], ranks[kTiles];
    const auto load = [&](const T* p) {
        return kWhole ? load_eight_if(col + mine < end, p + col) : load_eight(p + col, col + mine < end ? end - col - mine : 0, false);
    };
    // From shared memory each time: kept, the addresses would take more registers than there are.
    const auto a = [&](uint32_t t) { return reinterpret_cast<const T*>(tiles[t < count ? t : 0].a[lane / 4]) + mine; };
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t i = 16 * f + 8 * h + lane / 4;
            const bool exists = routes.slot[i][0] != kNone;
            x[f][h] = reinterpret_cast<const T*>(args.x) + (exists ? routes.row[i] : 0) * args.x_stride + mine;
            rows[f][h] = load(x[f][h]);
        }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        ranks[t] = load(a(t));
#pragma unroll
        for (int i = 0; i < kFrags * 4; ++i) sums[t][i / 4][i % 4] = 0.0f;
    }
    while (col < end) {
        col += 32;
        Eight<T> next[kFrags][2];
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
            next[f][0] = load(x[f][0]);
            next[f][1] = load(x[f][1]);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int f = 0; f < kFrags; ++f) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t m[4] = {word(rows[f][0], 2 * half), word(rows[f][1], 2 * half), word(rows[f][0], 2 * half + 1),
                                           word(rows[f][1], 2 * half + 1)};
                    mma16816(sums[t][f], m, word(ranks[t], 2 * half), word(ranks[t], 2 * half + 1), T{});
                }
            }
            ranks[t] = load(a(t));
        }
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
            rows[f][0] = next[f][0];
            rows[f][1] = next[f][1];
        }
    }
}

// A block: the products of up to kTiles tiles.
template <bool kWhole, int kTiles, class T>
__device__ __forceinline__ void multiply_tiles(const LswApplyArgs& args, ShrinkShared& shared, const Tile* tiles, uint32_t count) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[kTiles][kFrags][4];
    multiply_slice<kWhole, kTiles, T>(args, shared.routes, tiles, count, sums);
    // Four tiles at a time: a thread adds up four ranks of a row and a tile.
    static_assert(LSW_MANY_SHRINK_THREADS == 4 * kRows * 2, "four tiles, their rows, two fours of ranks");
    const uint32_t four = threadIdx.x % 2, row = threadIdx.x / 2 % kRows, t = threadIdx.x / 2 / kRows;
#pragma unroll
    for (int first = 0; first < kTiles; first += 4) {
#pragma unroll
        for (int i = 0; i < 4 * kFrags * 4; ++i) shared.sums[warp][i][lane] = sums[first + i / (4 * kFrags)][i / 4 % kFrags][i % 4];
        __syncthreads();
        if (first + t < count) {
            const Tile& tile = tiles[first + t];
            const int position = shared.position[tile.entry][row];
            float product[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t element = (t * kFrags + row / 16) * 4 + row / 8 % 2 * 2 + i % 2, owner = row % 8 * 4 + four * 2 + i / 2;
                product[i] = shared.sums[0][element][owner];
#pragma unroll
                for (int w = 1; w < kWarps; ++w) product[i] += shared.sums[w][element][owner];
                if (4 * four + i >= tile.ranks) product[i] = 0.0f;
            }
            if (position >= 0) *parts_at(args, shared.routes.row[row], position, tile.column + 4 * four) = split(product, T{});
        }
        __syncthreads();
    }
}

// A block: LSW_MANY_SHRINK_ROWS rows, all tiles of theirs, or those that fall to it of args.splits.
template <class T> __device__ __forceinline__ void shrink(const LswApplyArgs& args) {
    __shared__ ShrinkShared shared;
    dependency_wait();
    dependency_release();
    const uint32_t split = blockIdx.x % args.splits, group = blockIdx.x / args.splits;
    if (threadIdx.x < kRows) load_route(args, group * kRows + threadIdx.x, threadIdx.x, shared.routes, false);
    __syncthreads();
    const bool in_packs = args.x_aligned && args.in % 8 == 0;
    Walk<kRows> walk;
    uint32_t pass = 0;
    for (bool ends = false; !ends;) {
        if (threadIdx.x < 32) list_slots(walk, shared);
        __syncthreads();
        ends = shared.slot_count < kBatch;
        const uint32_t pairs = shared.slot_count * (args.width / 8);
        for (uint32_t pair = 0; pair < pairs; pair += kBatch) {
            if (threadIdx.x < 32) list_tiles(args, pair, shared);
            __syncthreads();
            for (uint32_t first = 0, taken; first < shared.tile_count; first += taken, ++pass) {
                const Tile* tiles = shared.tiles + first;
                const uint32_t left = shared.tile_count - first;
                const uint32_t lane = threadIdx.x % 32;
                const bool is_whole = in_packs && __all_sync(kFullWarp, lane >= left || tiles[lane < left ? lane : 0].aligned);
                taken = !is_whole || args.splits > 1 || left <= 4 ? 4 : left <= 8 ? 8 : 12;
                taken = min(taken, left);
                if (pass % args.splits != split) continue;
                if (!is_whole) multiply_tiles<false, 4, T>(args, shared, tiles, taken);
                else if (taken <= 4) multiply_tiles<true, 4, T>(args, shared, tiles, taken);
                else if (taken <= 8) multiply_tiles<true, 8, T>(args, shared, tiles, taken);
                else multiply_tiles<true, 12, T>(args, shared, tiles, taken);
            }
            __syncthreads();
        }
    }
}

constexpr uint32_t kGroup = 16;
constexpr uint32_t kExpandWarps = LSW_MANY_EXPAND_THREADS / 32;
static_assert(LSW_MANY_EXPAND_ROWS == kGroup * kExpandWarps, "a group a warp");
constexpr uint32_t kTerms = 32;   // that a warp keeps at hand: one a lane
constexpr uint32_t kStages = 3;   // of tiles of y: one in use, the others on their way
constexpr uint32_t kPieces = 4;   // of 16 bytes, that a lane has of a tile
template <class Y> constexpr int kHalves = kPieces / sizeof(Y);  // of a tile, 32 outputs each: a lane has 8 of each in rows g and g + 8
static_assert(LSW_MANY_OUTPUTS % (32 * kHalves<__half>) == 0 && LSW_MANY_OUTPUTS % (32 * kHalves<float>) == 0, "whole tiles");

// A slot of a group of rows at a target.
struct Term {
    uint64_t b;
    uint32_t b_stride;
    uint16_t rank;
    uint16_t is_whole;           // its rows are whole aligned fours
    float c[kGroup];             // 0: the row does not use it
    int8_t position[kGroup];     // in the row's route
};

struct ExpandShared {
    union {
        Routes<kGroup> routes;
        uint4 y[kStages][kPieces][32];  // once the routes are not needed any more
    };
    Term terms[kTerms];
};

// One warp: the next terms of its rows. Fewer than kTerms: there are no more.
__device__ __forceinline__ uint32_t load_terms(const LswApplyArgs& args, const LswApplyTarget& target, const Routes<kGroup>& routes,
                                               Walk<kGroup>& walk, Term (&terms)[kTerms], bool reports) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t count = 0, mine = 0;
    for (uint32_t slot; count < kTerms && (slot = walk.step(routes)) != kNone; ++count) {
        if (lane < kGroup) terms[count].position[lane] = walk.position;
        if (lane == count) mine = slot;
    }
    float scale = 0.0f;
    if (lane < count) {
        const LswFactor f = factor_of(target, mine);
        Term& term = terms[lane];
        term.b = f.b, term.b_stride = f.b_stride, term.rank = f.rank;
        term.is_whole = (f.flags & LSW_B_ALIGNED) != 0 && f.rank % 4 == 0;
        scale = f.scale;
    }
    __syncwarp();
    for (uint32_t i = 0; i < count; ++i) {
        const float s = __shfl_sync(kFullWarp, scale, i);
        if (lane >= kGroup) continue;
        const int position = terms[i].position[lane];
        const float c = position >= 0 ? routes.gate[lane][position] * s : 0.0f;
        if (reports && position >= 0) report_coefficient(args, terms[i].rank, c);
        terms[i].c[lane] = c;
    }
    __syncwarp();
    return count;
}

// Four ranks of B for each of this lane's rows of the mma's second operand, from an output on.
template <class T>
__device__ __forceinline__ void load_b(uint2 (&b)[4], const Term& term, uint32_t first, uint32_t rank, uint32_t out) {
    const uint32_t lane = threadIdx.x % 32, left = rank < term.rank ? term.rank - rank : 0;
    const uint32_t row = first + lane / 8 * 8 + lane / 4 % 2;  // and every second one: the order that gives a lane consecutive outputs
    const T* p = reinterpret_cast<const T*>(term.b) + row * static_cast<uint64_t>(term.b_stride) + rank;
    if (term.is_whole) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            b[j] = {0, 0};
            if (left > 0 && row + 2 * j < out) b[j] = *reinterpret_cast<const uint2*>(p + 2 * j * static_cast<uint64_t>(term.b_stride));
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        T lanes[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < left && row + 2 * j < out) lanes[i] = p[2 * j * static_cast<uint64_t>(term.b_stride) + i];
        }
        memcpy(&b[j], lanes, 8);
    }
}

// total += c (B products) of a term, for 32 outputs from `first` on and rows g and g + 8 of the group.
template <class T>
__device__ __forceinline__ void add_term(const LswApplyArgs& args, const LswApplyTarget& target, const Term& term,
                                         const uint32_t (&rows)[2], uint32_t first, float (&total)[2][8], bool (&touched)[2]) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    if (term.rank == 0) return;
    const float c[2] = {term.c[g], term.c[g + 8]};
    const Parts* products[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        touched[h] |= c[h] != 0.0f;
        products[h] = parts_at(args, rows[h], c[h] != 0.0f ? term.position[g + 8 * h] : 0, target.column) + q;
    }
    float sum[4][4] = {};
    for (uint32_t rank = 0; rank < term.rank; rank += 16) {
        uint2 b[4];
        load_b<T>(b, term, first, rank + 4 * q, target.out);
        Parts parts[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            // Shrink has written whole eights.
            const bool exists = c[h] != 0.0f && rank + 4 * q < (term.rank + 7u) / 8 * 8;
            parts[h] = {};
            if (exists) parts[h] = products[h][rank / 4];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(sum[j], parts[0], parts[1], b[j], T{});
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (c[h] == 0.0f) continue;  // the row takes nothing of it, NaN included
#pragma unroll
        for (int i = 0; i < 8; ++i) total[h][i] = fmaf(c[h], sum[i / 2][2 * h + i % 2], total[h][i]);
    }
}

// A block: LSW_MANY_EXPAND_ROWS rows and LSW_MANY_OUTPUTS x chunks outputs of one target.
template <class T, class Y> __device__ __forceinline__ void expand(const LswApplyArgs& args, ExpandShared& shared) {
    constexpr int kHalves = ::kHalves<Y>, kEach = sizeof(Y) / 2;  // pieces of eight outputs
    constexpr uint32_t kOutputs = 32 * kHalves;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t group = blockIdx.x / args.units * kExpandWarps + threadIdx.x / 32;
    const bool reports = unit == 0;
    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::out, args.chunks * LSW_MANY_OUTPUTS);
    if (lane < kGroup) load_route(args, group * kGroup + lane, lane, shared.routes, reports);
    __syncwarp();
    Walk<kGroup> walk;
    uint32_t count = load_terms(args, target, shared.routes, walk, shared.terms, reports);
    const bool has_all = count < kTerms, is_ahead = has_all && target.y_aligned;
    uint32_t rows[2];
    Y* y[2];
    bool exists[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        exists[h] = shared.routes.slot[g + 8 * h][0] != kNone;
        rows[h] = exists[h] ? shared.routes.row[g + 8 * h] : 0;
        y[h] = reinterpret_cast<Y*>(target.y) + rows[h] * target.y_stride + 8 * q;
    }
    __syncwarp();
    const uint32_t begin = unit * args.chunks * LSW_MANY_OUTPUTS, end = min(target.out, begin + args.chunks * LSW_MANY_OUTPUTS);
    const auto is_copied = [&](int h, uint32_t col) { return is_ahead && exists[h] && col + 8 * q + 8 <= end; };
    const auto fetch = [&](uint32_t first, uint32_t stage) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int p = i / kEach / 2, h = i / kEach % 2;
            const uint32_t col = first + 32 * p;
            if (is_copied(h, col)) copy16_async(&shared.y[stage][i][lane], y[h] + col + i % kEach * kPack<Y>);
        }
        copy_commit();
    };
    // Of what came before, nothing but the products and y is still being written.
    dependency_wait();
    for (uint32_t s = 0; s + 1 < kStages; ++s) fetch(begin + s * kOutputs, s);
    uint32_t stage = 0;
    for (uint32_t first = begin; first < end; first += kOutputs) {
        fetch(first + (kStages - 1) * kOutputs, (stage + kStages - 1) % kStages);
        copy_wait<kStages - 1>();
#pragma unroll 1
        for (int p = 0; p < kHalves; ++p) {
            const uint32_t col = first + 32 * p;
            float total[2][8] = {};
            bool touched[2] = {};
            if (!has_all) {
                walk = {};
                count = load_terms(args, target, shared.routes, walk, shared.terms, false);
            }
            for (;;) {
                for (uint32_t i = 0; i < count; ++i) add_term<T>(args, target, shared.terms[i], rows, col, total, touched);
                if (count < kTerms) break;
                count = load_terms(args, target, shared.routes, walk, shared.terms, false);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t left = col + 8 * q < end ? end - col - 8 * q : 0;
                if (!touched[h] || left == 0) continue;
                Eight<Y> eight;
                if (is_copied(h, col)) {
#pragma unroll
                    for (int i = 0; i < kEach; ++i) eight.part[i].bits = shared.y[stage][(2 * p + h) * kEach + i][lane];
                } else {
                    eight = load_eight(y[h] + col, left, target.y_aligned);
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) eight.set(i, eight.at(i) + total[h][i]);
                store_eight(y[h] + col, eight, left, target.y_aligned);
            }
        }
        stage = (stage + 1) % kStages;
    }
}

template <class T> __device__ __forceinline__ void expand(const LswApplyArgs& args) {
    __shared__ ExpandShared warps[kExpandWarps];
    ExpandShared& shared = warps[threadIdx.x / 32];
    if (args.y_type == 0) return expand<T, float>(args, shared);
    if (args.y_type == 1) return expand<T, __half>(args, shared);
    expand<T, __nv_bfloat16>(args, shared);
}

// The buckets of some rows, kStep apart: by a row's lowest slot, then by its next one, as finely as there are buckets.
template <int kRows, uint32_t kStep>
__device__ __forceinline__ void find_buckets(const LswApplyArgs& args, uint32_t first, uint32_t (&bucket)[kRows]) {
    uint32_t low[kRows], next[kRows];
    int64_t item[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        item[i] = first + i * kStep < args.rows ? item_of(args, first + i * kStep) : -1;
        low[i] = next[i] = kNone;
    }
    for (uint32_t e = 0; e < args.k; ++e) {
        int slot[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) slot[i] = item[i] >= 0 ? id_at(args, item[i], e) : -1;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            slot[i] = known_id(slot[i], args.slots);
            if (slot[i] < 0 || slot[i] == low[i]) continue;
            next[i] = min(next[i], max(low[i], static_cast<uint32_t>(slot[i])));
            low[i] = min(low[i], static_cast<uint32_t>(slot[i]));
        }
    }
    const uint32_t fine = LSW_ORDER_BUCKETS / args.slots;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if (next[i] == kNone) next[i] = low[i];
        bucket[i] = fine == 0 ? static_cast<uint64_t>(low[i]) * LSW_ORDER_BUCKETS / args.slots : low[i] * fine + next[i] * fine / args.slots;
        if (low[i] == kNone) bucket[i] = LSW_ORDER_BUCKETS - 1;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(LSW_ORDER_THREADS) lsw_apply_order(const __grid_constant__ LswApplyArgs args) {
    constexpr uint32_t kEach = LSW_ORDER_BUCKETS / LSW_ORDER_THREADS;
    constexpr int kAhead = 4;  // rows whose ids are on their way
    __shared__ uint32_t counts[LSW_ORDER_BUCKETS], warp_sums[LSW_ORDER_THREADS / 32];
    dependency_wait();
    dependency_release();
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t i = threadIdx.x; i < LSW_ORDER_BUCKETS; i += LSW_ORDER_THREADS) counts[i] = 0;
    __syncthreads();
    uint32_t bucket[kAhead];
    for (uint32_t row = threadIdx.x; row < args.rows; row += kAhead * LSW_ORDER_THREADS) {
        find_buckets<kAhead, LSW_ORDER_THREADS>(args, row, bucket);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (row + i * LSW_ORDER_THREADS < args.rows) atomicAdd(&counts[bucket[i]], 1);
        }
    }
    __syncthreads();
    // Where each bucket begins: a prefix sum, kEach buckets a thread.
    uint32_t mine = 0;
    for (uint32_t i = 0; i < kEach; ++i) mine += counts[kEach * threadIdx.x + i];
    uint32_t before = mine;
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, before, step);
        if (lane >= step) before += below;
    }
    if (lane == 31) warp_sums[warp] = before;
    before -= mine;
    __syncthreads();
    before += __reduce_add_sync(kFullWarp, lane < warp ? warp_sums[lane] : 0);
    for (uint32_t i = 0; i < kEach; ++i) {
        const uint32_t here = counts[kEach * threadIdx.x + i];
        counts[kEach * threadIdx.x + i] = before;
        before += here;
    }
    __syncthreads();
    for (uint32_t row = threadIdx.x; row < args.rows; row += kAhead * LSW_ORDER_THREADS) {
        if (args.rows > kAhead * LSW_ORDER_THREADS) find_buckets<kAhead, LSW_ORDER_THREADS>(args, row, bucket);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const uint32_t at = row + i * LSW_ORDER_THREADS;
            if (at < args.rows) reinterpret_cast<uint32_t*>(args.order)[atomicAdd(&counts[bucket[i]], 1)] = at;
        }
    }
}

// Without rows there may be no units to divide by.
#define LSW_APPLY(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_MANY_SHRINK_THREADS, 1)                                                 \
        lsw_apply_shrink_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) shrink<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_MANY_EXPAND_THREADS, 4)                                                 \
        lsw_apply_expand_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) expand<T>(args);                                                                                  \
    }
LSW_APPLY(f16, __half)
LSW_APPLY(bf16, __nv_bfloat16)
