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
//   shrink  products = c A x, and each row's route in canonical form for expand. A block has 32 rows and up to 8 tiles of 8 ranks at a
//           time, of whatever slots and targets; a warp has an eighth of in_features for all of them, and the eighths are added up in
//           order. So x is read once where 8 tiles are enough, and what is left is A, once a block, through L2.
//   expand  y += B products. A warp has 16 rows; y is where the mma adds to. Where B of all slots for 128 outputs fits into shared memory
//           (expand_strips), a block keeps it there and walks over rows; else a warp walks over outputs, and B comes from L1 for most of
//           the four warps of a block, whose rows have the same slots. A row that does not use a slot keeps what it had before that
//           slot's mma.
//
// The products are f32, and enter the second mma in parts that lose nothing: beside B in bf16 as three of 8 bits, beside B in f16 as
// two tf32 of 11 bits (nothing but the last bits of an f32).
//
// Operands come straight from memory into registers, without shared memory between: the order of k within a step is free as long
// as both agree on it, so a lane takes eight (four) consecutive elements of a row where the layout of the mma asks for pairs eight
// apart. In the same way a lane owns eight consecutive outputs of a row: y is read and written 16 bytes at a time. Both kernels keep
// loads in flight by loading a register anew as soon as it was used. Expand fetches y ahead by asynchronous copies into shared memory; each
// lane reads back what it copied itself, so that this needs no barrier.
#include "common/apply.cuh"
#include "common/ptx.cuh"

namespace {

constexpr uint32_t kNone = 0x7fffffff;  // above every slot

// A value that all lanes of the warp have. ptxas cannot know that of what comes from shared memory, and guards every mma behind a
// branch that depends on it against lanes that are elsewhere.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(kFullWarp, x, 0); }

// Canonical routes of some rows: slots ascending, kNone behind the last. The odd width keeps rows in different banks.
template <int kRows> struct Routes {
    uint32_t row[kRows];
    uint32_t slot[kRows][LSW_MAX_K + 1];
    float gate[kRows][LSW_MAX_K + 1];
};

// The index-th row in order; past the last, as many as there are.
__device__ __forceinline__ uint32_t row_at(const LswApplyArgs& args, uint32_t index) {
    return index < args.rows ? reinterpret_cast<const uint32_t*>(args.order)[index] : args.rows;
}

// One thread a row: its route, sorted in as it is read. Rows past the last have none.
template <int kRows> __device__ void load_route(const LswApplyArgs& args, uint32_t row, uint32_t i, Routes<kRows>& routes, bool reports) {
    constexpr uint32_t kAhead = 4;
    uint32_t count = 0;
    const int64_t item = row < args.rows ? item_of(args, row) : -1;
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

// A row's canonical route, k entries: a slot and its gate; kNone behind the last. Written by shrink behind `order`.
__device__ __forceinline__ uint2* route_of(const LswApplyArgs& args, uint32_t row) {
    return reinterpret_cast<uint2*>(args.order + (args.rows + 3) / 4 * 16) + static_cast<uint64_t>(row) * args.k;
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

// Four products of a row and a slot.
__device__ __forceinline__ float4* products_at(const LswApplyArgs& args, uint32_t row, uint32_t position, uint32_t column) {
    return reinterpret_cast<float4*>(products(args, row, position) + column);
}

// The same as they enter the second mma.
struct Parts {
    uint4 words[2];
};

// Three parts of 8 bits, cut and not rounded: a large number does not become infinite, and the last part is exact. What is not finite
// is in the first part alone.
__device__ __forceinline__ Parts split(float4 four, __nv_bfloat16) {
    const float x[4] = {four.x, four.y, four.z, four.w};
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

__device__ __forceinline__ Parts split(float4 four, __half) {
    const float x[4] = {four.x, four.y, four.z, four.w};
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
    float scale;
    uint16_t entry;  // of the listed slots
    uint16_t aligned;
};

struct ShrinkShared {
    Routes<kRows> routes;
    uint64_t x[kRows];  // where a row begins; of one without adapters, where the first does
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
    const bool exists = rank < f.rank;
    const uint32_t all = __ballot_sync(kFullWarp, exists), before = (1u << lane) - 1;
    if (lane == 0) shared.tile_count = __popc(all);
    // Behind the last, tiles whose ranks are a row of x: read with the others, and not looked at.
    Tile& tile = shared.tiles[exists ? __popc(all & before) : __popc(all) + __popc(~all & before)];
    tile.column = column;
    tile.ranks = min(8, f.rank - rank);
    tile.scale = f.scale;
    tile.entry = entry;
    tile.aligned = (f.flags & LSW_A_ALIGNED) != 0;
    for (uint32_t i = 0; i < 8; ++i) tile.a[i] = exists ? f.a + 2 * min(rank + i, f.rank - 1) * static_cast<uint64_t>(f.a_stride) : args.x;
}

// One warp: sums = a slice of A x of the block's rows and some tiles. What does not exist (a row without adapters, ranks past the
// last) is computed from something that does, and not looked at. kWhole: all are whole aligned packs.
template <bool kWhole, int kTiles, class T>
__device__ __forceinline__ void multiply_slice(const LswApplyArgs& args, const ShrinkShared& shared, const Tile* tiles,
                                               float (&sums)[kTiles][kFrags][4]) {
    const uint32_t lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const uint32_t length = (args.in + 32 * kWarps - 1) / (32 * kWarps) * 32;
    const uint32_t end = min(args.in, (slice + 1) * length);
    const uint32_t mine = 8 * (lane % 4);
    const auto load = [&](const T* p, uint32_t col) {
        Eight<T> eight;
        if (!kWhole) return load_eight(p + col, col + mine < end ? end - col - mine : 0, false);
        if (col + mine < end) eight.part[0].bits = __ldg(reinterpret_cast<const uint4*>(p + col));
        return eight;
    };
    // From shared memory each time: kept, the addresses would take more registers than there are.
    const auto x = [&](int f, int h) { return reinterpret_cast<const T*>(shared.x[16 * f + 8 * h + lane / 4]) + mine; };
    const auto a = [&](uint32_t t) { return reinterpret_cast<const T*>(tiles[t].a[lane / 4]) + mine; };
    constexpr int kAhead = kWhole ? 2 : 1;  // steps in flight
    Eight<T> rows[kAhead][kFrags][2], ranks[kAhead][kTiles];
    uint32_t col = slice * length;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int s = 0; s < kAhead; ++s) rows[s][f][h] = load(x(f, h), col + 32 * s);
        }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int s = 0; s < kAhead; ++s) ranks[s][t] = load(a(t), col + 32 * s);
#pragma unroll
        for (int i = 0; i < kFrags * 4; ++i) sums[t][i / 4][i % 4] = 0.0f;
    }
    for (; col < end; col += 32 * kAhead) {
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            Eight<T>(&row)[kFrags][2] = rows[s];
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                Eight<T>& rank = ranks[s][t];
#pragma unroll
                for (int f = 0; f < kFrags; ++f) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t m[4] = {word(row[f][0], 2 * half), word(row[f][1], 2 * half), word(row[f][0], 2 * half + 1),
                                               word(row[f][1], 2 * half + 1)};
                        mma16816(sums[t][f], m, word(rank, 2 * half), word(rank, 2 * half + 1), T{});
                    }
                }
                rank = load(a(t), col + 32 * (s + kAhead));
            }
#pragma unroll
            for (int f = 0; f < kFrags; ++f) {
                row[f][0] = load(x(f, 0), col + 32 * (s + kAhead));
                row[f][1] = load(x(f, 1), col + 32 * (s + kAhead));
            }
        }
    }
}

// A block: the products of up to kTiles tiles.
template <bool kWhole, int kTiles, class T>
__device__ __forceinline__ void multiply_tiles(const LswApplyArgs& args, ShrinkShared& shared, const Tile* tiles, uint32_t count) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[kTiles][kFrags][4];
    multiply_slice<kWhole, kTiles, T>(args, shared, tiles, sums);
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
            if (position >= 0) {
                const float c = shared.routes.gate[row][position] * tile.scale;
                float product[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t element = (t * kFrags + row / 16) * 4 + row / 8 % 2 * 2 + i % 2;
                    const uint32_t owner = row % 8 * 4 + four * 2 + i / 2;
                    product[i] = shared.sums[0][element][owner];
#pragma unroll
                    for (int w = 1; w < kWarps; ++w) product[i] += shared.sums[w][element][owner];
                    product[i] = 4 * four + i < tile.ranks ? c * product[i] : 0.0f;
                }
                *products_at(args, shared.routes.row[row], position, tile.column + 4 * four) = {product[0], product[1], product[2], product[3]};
            }
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
    if (threadIdx.x < kRows) {
        const uint32_t index = group * kRows + threadIdx.x;
        load_route(args, row_at(args, index), threadIdx.x, shared.routes, split == 0);
        uint32_t end = 0;
        for (uint32_t e = 0; split == 0 && index < args.rows && e < args.k; ++e) {
            const uint32_t slot = end == e ? shared.routes.slot[threadIdx.x][e] : kNone;
            end += slot != kNone;
            route_of(args, shared.routes.row[threadIdx.x])[e] = {slot, __float_as_uint(shared.routes.gate[threadIdx.x][e])};
        }
        const bool exists = shared.routes.slot[threadIdx.x][0] != kNone;
        shared.x[threadIdx.x] = args.x + 2 * (exists ? shared.routes.row[threadIdx.x] : 0) * args.x_stride;
    }
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
                taken = !is_whole || args.splits > 1 || left <= 4 ? 4 : 8;
                taken = min(taken, left);
                if (pass % args.splits != split) continue;
                if (!is_whole) multiply_tiles<false, 4, T>(args, shared, tiles, taken);
                else if (taken <= 4) multiply_tiles<true, 4, T>(args, shared, tiles, taken);
                else multiply_tiles<true, 8, T>(args, shared, tiles, taken);
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
template <class T> constexpr int kKept = 2;  // steps of 16 ranks whose products stay in registers
template <> constexpr int kKept<__half> = 1;  // whose parts take more of them
constexpr uint32_t kPieces = 4;   // of 16 bytes, that a lane has of a tile
template <class Y> constexpr int kHalves = kPieces / sizeof(Y);  // of a tile, 32 outputs each: a lane has 8 of each in rows g and g + 8
static_assert(LSW_MANY_OUTPUTS % (32 * kHalves<__half>) == 0 && LSW_MANY_OUTPUTS % (32 * kHalves<float>) == 0, "whole tiles");

// A slot of a group of rows at a target.
struct Term {
    uint64_t b;
    uint32_t b_stride;
    uint16_t rank;
    uint16_t is_whole;        // its rows are whole aligned fours
    uint32_t users;           // bit i: row i takes it, with a coefficient that is not zero
    int8_t position[kGroup];  // in the row's route
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
    __syncwarp();  // other lanes may still read the list before
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
        const int position = lane < kGroup ? terms[i].position[lane] : -1;
        const float c = position >= 0 ? routes.gate[lane][position] * s : 0.0f;
        if (reports && position >= 0) report_coefficient(args, terms[i].rank, c);
        const uint32_t users = __ballot_sync(kFullWarp, c != 0.0f);
        if (lane == 0) terms[i].users = terms[i].rank > 0 ? users : 0;
    }
    __syncwarp();
    return count;
}

// A place in the list of terms: 16 ranks of one of them that has users.
struct Place {
    uint32_t term = 0, rank = 0;

    __device__ __forceinline__ void settle(const Term (&terms)[kTerms], uint32_t count) {
        while (term < count && uniform(terms[term].users == 0 || rank >= terms[term].rank)) ++term, rank = 0;
    }
    __device__ __forceinline__ void advance(const Term (&terms)[kTerms], uint32_t count) {
        rank += 16;
        settle(terms, count);
    }
};

// A lane's part of 16 ranks of a term: four products of rows g and g + 8, and where four ranks of its rows of B begin.
template <class T> struct Step {
    Parts products[2];
    const T* b;       // of the first output
    uint32_t stride;  // of every second row: the order that gives a lane consecutive outputs
    uint32_t left;    // ranks from b on
    uint32_t users;

    __device__ __forceinline__ void load(const LswApplyArgs& args, const LswApplyTarget& target, const Term& term, uint32_t rank,
                                         const uint32_t (&rows)[2], uint32_t first) {
        const uint32_t lane = threadIdx.x % 32, g = lane / 4, at = rank + 4 * (lane % 4);
        b = reinterpret_cast<const T*>(term.b) + (first + lane / 8 * 8 + g % 2) * static_cast<uint64_t>(term.b_stride) + at;
        stride = 2 * term.b_stride;
        left = at < term.rank ? term.rank - at : 0;
        users = uniform(term.users);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const bool exists = (users >> (g + 8 * h) & 1) && left > 0;
            products[h] = {};
            if (exists) products[h] = split(*products_at(args, rows[h], term.position[g + 8 * h], target.column + at), T{});
        }
    }

    // Its rows of B, `ahead` outputs on. kWhole: they all exist, and are whole aligned fours; else `outputs` are left there.
    template <bool kWhole> __device__ __forceinline__ void load_b(uint2 (&words)[4], uint32_t ahead, uint32_t outputs) const {
        const T* p = b + ahead / 2 * static_cast<uint64_t>(stride);
        const uint32_t row = threadIdx.x % 32 / 8 * 8 + threadIdx.x / 4 % 2;
#pragma unroll
        for (int j = 0; j < 4; ++j, p += stride) {
            words[j] = {0, 0};
            if (kWhole) {
                if (left > 0) words[j] = __ldg(reinterpret_cast<const uint2*>(p));
                continue;
            }
            T lanes[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i < left && row + 2 * j < outputs) lanes[i] = p[i];
            }
            memcpy(&words[j], lanes, 8);
        }
    }

    // sum += B products.
    __device__ __forceinline__ void add(float (&sum)[4][4], const uint2 (&words)[4]) const {
        if (users == 0xffff) {
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply(sum[j], products[0], products[1], words[j], T{});
            return;
        }
        // A row that does not use the term takes nothing of it, not even a NaN.
        const uint32_t mine = users >> (threadIdx.x % 32 / 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float with[4] = {sum[j][0], sum[j][1], sum[j][2], sum[j][3]};
            multiply(with, products[0], products[1], words[j], T{});
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] = mine >> (e / 2 * 8) & 1 ? with[e] : sum[j][e];
        }
    }
};

// y as the mma lays out its results, and back.
template <class Y> __device__ __forceinline__ void take(float (&sum)[4][4], int h, const Eight<Y>& y) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i / 2][2 * h + i % 2] = y.at(i);
}
template <class Y> __device__ __forceinline__ Eight<Y> give(const float (&sum)[4][4], int h) {
    Eight<Y> y;
    if constexpr (sizeof(Y) == 2) {
        const auto two = [&](int j) { return pack(float2{sum[j][2 * h], sum[j][2 * h + 1]}, Y{}); };
        y.part[0].bits = {two(0), two(1), two(2), two(3)};
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) y.set(i, sum[i / 2][2 * h + i % 2]);
    }
    return y;
}

// Rows g and g + 8 of a warp's group, from its first output on.
template <class Y> struct Outputs {
    uint32_t rows[2];
    bool is_touched[2];  // else the row keeps its bits
    Y* y[2];             // the lane's first output
    uint32_t begin, count;
};

// One warp: its terms are all at hand, and all is in whole aligned packs.
template <class T, class Y>
__device__ __forceinline__ void add_whole(const LswApplyArgs& args, const LswApplyTarget& target, ExpandShared& shared, uint32_t count,
                                          const Outputs<Y>& out) {
    constexpr int kHalves = ::kHalves<Y>, kEach = sizeof(Y) / 2;  // of a tile; pieces of eight outputs
    constexpr uint32_t kOutputs = 32 * kHalves;
    const uint32_t lane = threadIdx.x % 32;
    const auto fetch = [&](uint32_t done, uint32_t stage) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int p = i / kEach / 2, h = i / kEach % 2;
            const Y* from = out.y[h] + done + 32 * p + i % kEach * kPack<Y>;
            if (done < out.count && out.is_touched[h]) copy16_async(&shared.y[stage][i][lane], from);
        }
        copy_commit();
    };
    for (uint32_t s = 0; s + 1 < kStages; ++s) fetch(s * kOutputs, s);
    // The first steps stay in registers for all outputs.
    constexpr int kKept = ::kKept<T>;
    Step<T> kept[kKept];
    uint2 words[kKept][4];
    uint32_t kept_count = 0;
    Place rest;
    rest.settle(shared.terms, count);
#pragma unroll
    for (int s = 0; s < kKept; ++s) {
        if (rest.term == count) continue;
        kept[s].load(args, target, shared.terms[rest.term], rest.rank, out.rows, out.begin);
        kept[s].template load_b<true>(words[s], 0, 32);
        kept_count = s + 1;
        rest.advance(shared.terms, count);
    }
    uint32_t stage = 0;
    for (uint32_t done = 0; done < out.count; done += kOutputs) {
        fetch(done + (kStages - 1) * kOutputs, stage == 0 ? kStages - 1 : stage - 1);
        copy_wait<kStages - 1>();
#pragma unroll
        for (int p = 0; p < kHalves; ++p) {
            float sum[4][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Eight<Y> y;
#pragma unroll
                for (int i = 0; i < kEach; ++i) y.part[i].bits = shared.y[stage][(2 * p + h) * kEach + i][lane];
                take(sum, h, y);
            }
#pragma unroll
            for (int s = 0; s < kKept; ++s) {
                if (s >= kept_count) continue;
                kept[s].add(sum, words[s]);
                if (done + 32 * p + 32 < out.count) kept[s].template load_b<true>(words[s], done + 32 * p + 32, 32);
            }
            for (Place place = rest; place.term < count; place.advance(shared.terms, count)) {
                uint2 other[4];
                Step<T> step;
                step.load(args, target, shared.terms[place.term], place.rank, out.rows, out.begin);
                step.template load_b<true>(other, done + 32 * p, 32);
                step.add(sum, other);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (out.is_touched[h]) store_eight(out.y[h] + done + 32 * p, give<Y>(sum, h), 8, true);
            }
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
}

// One warp: the same without either, in the same order. Starts the list of terms anew for each 32 outputs.
template <class T, class Y>
__device__ __forceinline__ void add_any(const LswApplyArgs& args, const LswApplyTarget& target, ExpandShared& shared,
                                        const Outputs<Y>& out) {
    for (uint32_t done = 0; done < out.count; done += 32) {
        const uint32_t outputs = out.count - done, mine = 8 * (threadIdx.x % 4), left = mine < outputs ? outputs - mine : 0;
        float sum[4][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) take(sum, h, load_eight(out.y[h] + done, out.is_touched[h] ? left : 0, target.y_aligned));
        Walk<kGroup> walk;
        for (uint32_t count = kTerms; count == kTerms;) {
            count = load_terms(args, target, shared.routes, walk, shared.terms, false);
            Place place;
            for (place.settle(shared.terms, count); place.term < count; place.advance(shared.terms, count)) {
                uint2 words[4];
                Step<T> step;
                step.load(args, target, shared.terms[place.term], place.rank, out.rows, out.begin + done);
                step.template load_b<false>(words, 0, outputs);
                step.add(sum, words);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (out.is_touched[h]) store_eight(out.y[h] + done, give<Y>(sum, h), left, target.y_aligned);
        }
    }
}

// A block: LSW_MANY_EXPAND_ROWS rows and LSW_MANY_OUTPUTS x chunks outputs of one target.
template <class T, class Y> __device__ __forceinline__ void expand(const LswApplyArgs& args, ExpandShared& shared) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4;
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t group = blockIdx.x / args.units * kExpandWarps + threadIdx.x / 32;
    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::out, args.chunks * LSW_MANY_OUTPUTS);
    const bool reports = unit == 0;  // of each target its first, which is what unit counts now
    if (lane < kGroup) load_route(args, row_at(args, group * kGroup + lane), lane, shared.routes, false);
    __syncwarp();
    Walk<kGroup> walk;
    uint32_t count = kTerms, users = 0, lists = 0;
    bool is_whole = true;
    for (; count == kTerms; ++lists) {
        count = load_terms(args, target, shared.routes, walk, shared.terms, reports);
        for (uint32_t i = 0; i < count; ++i) {
            users |= shared.terms[i].users;
            is_whole = is_whole && (shared.terms[i].is_whole || shared.terms[i].users == 0);
        }
    }
    Outputs<Y> out;
    out.begin = unit * args.chunks * LSW_MANY_OUTPUTS;
    out.count = min(target.out - out.begin, args.chunks * LSW_MANY_OUTPUTS);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        out.is_touched[h] = users >> (g + 8 * h) & 1;
        out.rows[h] = out.is_touched[h] ? shared.routes.row[g + 8 * h] : 0;
        out.y[h] = reinterpret_cast<Y*>(target.y) + out.rows[h] * target.y_stride + out.begin + 8 * (lane % 4);
    }
    __syncwarp();
    // Of what came before, nothing but the products and y is still being written.
    dependency_wait();
    is_whole = is_whole && lists == 1 && target.y_aligned && out.count % (32 * kHalves<Y>) == 0;
    if (uniform(is_whole)) add_whole<T>(args, target, shared, count, out);
    else add_any<T>(args, target, shared, out);
}

template <class T> __device__ __forceinline__ void expand(const LswApplyArgs& args) {
    __shared__ ExpandShared warps[kExpandWarps];
    ExpandShared& shared = warps[threadIdx.x / 32];
    if (args.y_type == 0) return expand<T, float>(args, shared);
    if (args.y_type == 1) return expand<T, __half>(args, shared);
    expand<T, __nv_bfloat16>(args, shared);
}

// A slot at the strip that a block has at hand.
struct StripSlot {
    uint64_t b;
    uint32_t b_stride, rank;
    float scale;
    uint32_t is_aligned;
};

struct StripShared {
    StripSlot slots[LSW_STRIP_SLOTS];
    uint32_t odd;  // slots, as bits, with something in B that is not finite
};

constexpr uint32_t kStrip = LSW_STRIP_OUTPUTS, kBlocks = kStrip / 32;
constexpr uint32_t kStripPieces = 2 * kBlocks;  // of 16 bytes, that a lane has of a tile of y: in rows g and g + 8, 8 of each 32 outputs
static_assert(kStrip * 32 == LSW_STRIP_STEP_BYTES && 2 * kStripPieces * 32 * 16 == LSW_STRIP_WARP_BYTES, "the host asks for this much");

template <class T> constexpr bool kHasRoom = true;  // for products of the next step in registers
template <> constexpr bool kHasRoom<__half> = false;

// Some groups of 16 rows at up to LSW_STRIP_OUTPUTS outputs of a target.
struct Strip {
    const LswApplyTarget* target;
    uint32_t begin, count;  // outputs
    uint32_t steps;         // of 16 ranks, that each slot has a place for
    uint32_t first, last;   // groups
    uint32_t end;           // what comes behind it, of all groups at all outputs

    // Of those from `at` on that are a block's.
    __device__ __forceinline__ Strip(const LswApplyArgs& args, uint32_t at, uint32_t blocks_end) {
        const uint32_t groups = (args.rows + kGroup - 1) / kGroup;
        uint32_t unit = at / groups;
        first = at % groups;
        last = min(groups, first + blocks_end - at);
        end = at + last - first;
        target = &target_of(args, unit, &LswApplyTarget::out, kStrip);
        begin = unit * kStrip;
        count = min(kStrip, target->out - begin);
        steps = (target->rank_cap + 15) / 16;
    }
};

// Rows g and g + 8 of a group; past the last row, as many as there are.
struct GroupRows {
    uint32_t row[2];

    __device__ __forceinline__ GroupRows(const LswApplyArgs& args, bool exists, uint32_t group) {
#pragma unroll
        for (int h = 0; h < 2; ++h) row[h] = exists ? row_at(args, kGroup * group + threadIdx.x % 32 / 4 + 8 * h) : args.rows;
    }
};

// The first entries of their routes.
struct GroupRoutes {
    static constexpr uint32_t kAhead = 2;
    uint2 entry[kAhead][2];

    __device__ __forceinline__ GroupRoutes(const LswApplyArgs& args, const GroupRows& rows) {
#pragma unroll
        for (uint32_t i = 0; i < 2 * kAhead; ++i) entry[i / 2][i % 2] = at(args, rows.row[i % 2], i / 2);
    }
    __device__ __forceinline__ static uint2 at(const LswApplyArgs& args, uint32_t row, uint32_t e) {
        return row < args.rows && e < args.k ? route_of(args, row)[e] : uint2{kNone, 0};
    }
};

// Slots as bits: those of a lane's rows, and of those the ones with a coefficient that is not zero, and a rank.
struct Group {
    uint32_t row[2];
    uint32_t present[2], used[2];
    uint32_t some, every;  // slots that some row uses; that all 16 use

    __device__ __forceinline__ Group(const LswApplyArgs& args, const GroupRows& rows, const GroupRoutes& routes, const StripShared& shared,
                                     bool reports)
        : row{rows.row[0], rows.row[1]}, present{0, 0}, used{0, 0} {
        const auto add = [&](int h, uint2 entry) {
            if (entry.x == kNone) return;
            const StripSlot& slot = shared.slots[entry.x];
            const float c = __uint_as_float(entry.y) * slot.scale;
            present[h] |= 1u << entry.x;
            if (c != 0.0f && slot.rank > 0) used[h] |= 1u << entry.x;
            if (reports) report_coefficient(args, slot.rank, c);
        };
#pragma unroll
        for (uint32_t i = 0; i < 2 * GroupRoutes::kAhead; ++i) add(i % 2, routes.entry[i / 2][i % 2]);
        for (uint32_t e = GroupRoutes::kAhead; e < args.k; ++e) {
            add(0, GroupRoutes::at(args, row[0], e));
            add(1, GroupRoutes::at(args, row[1], e));
        }
        some = __reduce_or_sync(kFullWarp, used[0] | used[1]);
        every = __reduce_and_sync(kFullWarp, used[0] & used[1]);
    }
};

// 16 ranks of a slot.
struct SlotStep {
    uint32_t slot, step, others;  // slots still to come

    __device__ __forceinline__ explicit SlotStep(uint32_t some) : slot(__ffs(some) - 1), step(0), others(some & (some - 1)) {}
    __device__ __forceinline__ bool exists() const { return slot != ~0u; }
    __device__ __forceinline__ void advance(const StripShared& shared) {
        if (16 * ++step < uniform(shared.slots[slot].rank)) return;
        *this = SlotStep(others);
    }
};

// A block: B of a strip, in the order in which lanes want it: by 16 ranks of a slot, the first two of each four ranks before the other two,
// and outputs so that a lane's results are eight consecutive ones.
template <class T>
__device__ __forceinline__ void load_strip(const LswApplyArgs& args, const Strip& strip, StripShared& shared, uint4* b) {
    if (threadIdx.x < args.slots) {
        const LswFactor& f = factor_of(*strip.target, threadIdx.x);
        shared.slots[threadIdx.x] = {f.b, f.b_stride, f.rank, f.scale, f.flags & LSW_B_ALIGNED};
    }
    if (threadIdx.x == 0) shared.odd = 0;
    __syncthreads();
#pragma unroll 3
    for (uint32_t i = threadIdx.x; i < args.slots * strip.steps * kStrip; i += LSW_STRIP_THREADS) {
        const uint32_t place = i / kStrip, at = i % kStrip, slot = place / strip.steps, rank = place % strip.steps * 16;
        const StripSlot& f = shared.slots[slot];
        const uint32_t output = at / 32 * 32 + at % 8 / 2 * 8 + at / 8 % 4 * 2 + at % 2;
        const uint32_t left = rank < f.rank && output < strip.count ? f.rank - rank : 0;
        const T* p = reinterpret_cast<const T*>(f.b) + (strip.begin + output) * static_cast<uint64_t>(f.b_stride) + rank;
        Eight<T> ranks[2];
        if (f.is_aligned && f.rank % 8 == 0) {
            ranks[0] = load_eight_if(left > 0, p);
            ranks[1] = load_eight_if(left > 8, p + 8);
        } else {
            ranks[0] = load_eight(p, left, false);
            ranks[1] = load_eight(p + 8, left > 8 ? left - 8 : 0, false);
        }
        bool is_odd = false;
#pragma unroll
        for (int e = 0; e < 16; ++e) is_odd = is_odd || !is_finite(ranks[e / 8].at(e % 8));
        if (is_odd) atomicOr(&shared.odd, 1u << slot);
        const uint4 &x = ranks[0].part[0].bits, &y = ranks[1].part[0].bits;
        b[2 * place * kStrip + at] = {x.x, x.z, y.x, y.z};
        b[2 * place * kStrip + kStrip + at] = {x.y, x.w, y.y, y.w};
    }
    __syncthreads();
}

// sum += B products, of a warp's rows and all outputs of the strip. A row that does not use the slot has products of zero; where that is
// not enough, since something in B is not finite, it keeps what it had.
template <bool kSelects, class T>
__device__ __forceinline__ void add_step(float (&sum)[kBlocks][4][4], const Parts (&products)[2], const uint4* b, const bool (&uses)[2]) {
    const uint32_t lane = threadIdx.x % 32;
    const uint4* mine = b + lane / 8 % 2 * kStrip + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < kBlocks * 4; i += 2) {
        uint32_t words[4];
        ldmatrix4(words, mine + 8 * i);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float(&to)[4] = sum[i / 4][i % 4 + j];
            float with[4] = {to[0], to[1], to[2], to[3]};
            multiply(with, products[0], products[1], {words[2 * j], words[2 * j + 1]}, T{});
#pragma unroll
            for (int e = 0; e < 4; ++e) to[e] = !kSelects || uses[e / 2] ? with[e] : to[e];
        }
    }
}

// A block: strips, and in each of them a warp every so many groups. y and routes come a group ahead, rows two.
template <class T, class Y> __device__ __forceinline__ void expand_strips(const LswApplyArgs& args, StripShared& shared) {
    extern __shared__ uint4 dynamic_shared[];
    constexpr uint32_t kWarps = LSW_STRIP_THREADS / 32, kWarpPacks = LSW_STRIP_WARP_BYTES / 16;
    constexpr bool kAhead = kHasRoom<T>;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, outputs = 8 * (lane % 4);
    uint4(*places)[kStripPieces][32] = reinterpret_cast<uint4(*)[kStripPieces][32]>(dynamic_shared + warp * kWarpPacks);
    const uint4* b = dynamic_shared + kWarps * kWarpPacks;
    const uint32_t total = args.units * ((args.rows + kGroup - 1) / kGroup);
    const uint32_t end = (blockIdx.x + 1ull) * total / gridDim.x;
    const auto y_at = [&](const Strip& strip, uint32_t row, uint32_t output) {
        return reinterpret_cast<Y*>(strip.target->y) + row * strip.target->y_stride + strip.begin + output;
    };
    const auto fetch = [&](const Strip& strip, const uint32_t (&row)[2], uint32_t stage) {
#pragma unroll
        for (uint32_t i = 0; i < kStripPieces; ++i) {
            const uint32_t output = i / 2 * 32 + outputs;
            if (row[i % 2] < args.rows && output < strip.count) copy16_async(&places[stage][i][lane], y_at(strip, row[i % 2], output));
        }
        copy_commit();
    };
    Strip strip(args, static_cast<uint64_t>(blockIdx.x) * total / gridDim.x, end), coming = strip;
    load_strip<T>(args, strip, shared, dynamic_shared + kWarps * kWarpPacks);
    dependency_wait();
    // The group to come, and the rows of the one behind it where that is in the same strip.
    uint32_t coming_group = strip.first + warp, stage = 0;
    const auto settle = [&] {
        while (coming_group >= coming.last && coming.end < end) {
            coming = Strip(args, coming.end, end);
            coming_group = coming.first + warp;
        }
    };
    settle();
    GroupRows rows(args, coming_group < coming.last, coming_group), rows_behind(args, coming_group + kWarps < coming.last, coming_group + kWarps);
    fetch(coming, rows.row, stage);
    GroupRoutes routes(args, rows);
    for (;;) {
        for (uint32_t g = strip.first + warp; g < strip.last; g += kWarps, stage ^= 1) {
            const Group group(args, rows, routes, shared, strip.begin == 0);
            const auto load = [&](float4 (&products)[2], const SlotStep& at) {
                const uint32_t column = 16 * at.step + 4 * (lane % 4);
                const bool has_column = at.exists() && column < shared.slots[at.slot].rank;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    products[h] = {};
                    if (!has_column || (group.used[h] >> at.slot & 1) == 0) continue;
                    const uint32_t position = __popc(group.present[h] & ((1u << at.slot) - 1));
                    products[h] = *products_at(args, group.row[h], position, strip.target->column + column);
                }
            };
            SlotStep at(group.some);
            float4 next[2];
            if (kAhead) load(next, at);
            coming_group += kWarps;
            const bool same_strip = coming_group < coming.last;
            settle();
            rows = same_strip ? rows_behind : GroupRows(args, coming_group < coming.last, coming_group);
            rows_behind = GroupRows(args, coming_group + kWarps < coming.last, coming_group + kWarps);
            fetch(coming, rows.row, stage ^ 1);
            routes = GroupRoutes(args, rows);
            copy_wait<1>();
            float sum[kBlocks][4][4];
#pragma unroll
            for (uint32_t i = 0; i < kStripPieces; ++i) {
                Eight<Y> piece;
                piece.part[0].bits = places[stage][i][lane];
                take(sum[i / 2], i % 2, piece);
            }
            while (at.exists()) {
                float4 here[2] = {next[0], next[1]};
                if (!kAhead) load(here, at);
                const Parts now[2] = {split(here[0], T{}), split(here[1], T{})};
                const uint32_t slot = at.slot;
                const uint4* place = b + (slot * strip.steps + at.step) * 2 * kStrip;
                at.advance(shared);
                if (kAhead) load(next, at);
                const bool uses[2] = {(group.used[0] >> slot & 1) != 0, (group.used[1] >> slot & 1) != 0};
                if (uniform(~group.every & shared.odd) >> slot & 1) add_step<true, T>(sum, now, place, uses);
                else add_step<false, T>(sum, now, place, uses);
            }
#pragma unroll
            for (uint32_t i = 0; i < kStripPieces; ++i) {
                // What others of the group use may have turned a -0 into 0: then it always is.
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i / 2][j / 2][i % 2 * 2 + j % 2] += 0.0f;
                const uint32_t output = i / 2 * 32 + outputs;
                if (group.used[i % 2] == 0 || output >= strip.count) continue;
                store16_whole(y_at(strip, group.row[i % 2], output), give<Y>(sum[i / 2], i % 2).part[0].bits);
            }
        }
        if (strip.end >= end) break;
        strip = Strip(args, strip.end, end);
        __syncthreads();
        load_strip<T>(args, strip, shared, dynamic_shared + kWarps * kWarpPacks);
    }
}

template <class T> __device__ __forceinline__ void expand_strips(const LswApplyArgs& args) {
    __shared__ StripShared shared;
    if (args.y_type == 1) return expand_strips<T, __half>(args, shared);
    expand_strips<T, __nv_bfloat16>(args, shared);
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
    constexpr uint32_t kAhead = 2;
    for (uint32_t e0 = 0; e0 < args.k; e0 += kAhead) {
        int slot[kAhead][kRows];
#pragma unroll
        for (int i = 0; i < kAhead * kRows; ++i) {
            slot[i / kRows][i % kRows] = item[i % kRows] >= 0 ? id_at(args, item[i % kRows], e0 + i / kRows) : -1;
        }
#pragma unroll
        for (int i = 0; i < kAhead * kRows; ++i) {
            const int known = known_id(slot[i / kRows][i % kRows], args.slots);
            uint32_t &lowest = low[i % kRows], &second = next[i % kRows];
            if (known < 0 || known == lowest) continue;
            second = min(second, max(lowest, static_cast<uint32_t>(known)));
            lowest = min(lowest, static_cast<uint32_t>(known));
        }
    }
    // Without divisions: any number below `fine` that does not fall with the slot is good.
    const uint32_t fine = LSW_ORDER_BUCKETS / args.slots, spare = max(fine / args.slots, 1), mask = (1u << (31 - __clz(spare))) - 1;
    const float scale = static_cast<float>(fine) / args.slots;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if (next[i] == kNone) next[i] = low[i];
        bucket[i] = fine == 0 ? static_cast<uint64_t>(low[i]) * LSW_ORDER_BUCKETS / args.slots
                              : low[i] * fine + min(fine - 1, static_cast<uint32_t>(next[i] * scale));
        // Rows of one route go to different counters, if there are some to spare: on one they would wait for each other.
        bucket[i] += (first + i * kStep) & mask;
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

// Blocks of expand_strips that a multiprocessor has registers for: f16's parts take more of them, and on 12.0 there is no shared memory
// for a second one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define LSW_STRIPS_OF_BF16 1
#else
#define LSW_STRIPS_OF_BF16 LSW_STRIP_BLOCKS
#endif

// Without rows there may be no units to divide by.
#define LSW_APPLY(suffix, T, resident)                                                                                       \
    extern "C" __global__ void __launch_bounds__(LSW_MANY_SHRINK_THREADS, 1)                                                 \
        lsw_apply_shrink_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) shrink<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_MANY_EXPAND_THREADS, 3)                                                 \
        lsw_apply_expand_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) expand<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_STRIP_THREADS, resident)                                                \
        lsw_apply_expand_strips_##suffix(const __grid_constant__ LswApplyArgs args) {                                        \
        if (args.rows > 0) expand_strips<T>(args);                                                                           \
    }
LSW_APPLY(f16, __half, 1)
LSW_APPLY(bf16, __nv_bfloat16, LSW_STRIPS_OF_BF16)
