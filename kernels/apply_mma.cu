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
//   shrink  products = c A x. A block has 32 rows and up to 8 tiles of 8 ranks at a time, of whatever slots and targets; a warp has an
//           eighth of in_features for all of them, and the eighths are added up in order. So x is read once where 8 tiles are enough,
//           and what is left is A, once a block, through L2.
//   expand  y += B products. A warp has 16 rows and walks over outputs; y is where the mma adds to. The four warps of a block go over
//           the same outputs, and rows in order have the same slots: B comes from L1 for most of them. A row that does not use a
//           slot keeps what it had before that slot's mma.
//
// The products are f32, and enter the second mma in parts that lose nothing: beside B in bf16 as three of 8 bits, beside B in f16 as
// two tf32 of 11 bits (nothing but the last bits of an f32). Shrink stores them in parts, since expand reads them often.
//
// Operands come straight from memory into registers, without shared memory between: the order of k within a step is free as long
// as both agree on it, so a lane takes eight (four) consecutive elements of a row where the layout of the mma asks for pairs eight
// apart. In the same way a lane owns eight consecutive outputs of a row: y is read and written 16 bytes at a time. Both kernels keep
// loads in flight by loading a register anew as soon as it was used. Expand fetches y two tiles ahead by asynchronous copies into
// shared memory; each lane reads back what it copied itself, so that this needs no barrier.
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
                *parts_at(args, shared.routes.row[row], position, tile.column + 4 * four) = split(product, T{});
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
        load_route(args, group * kRows + threadIdx.x, threadIdx.x, shared.routes, false);
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
            if (exists) products[h] = *parts_at(args, rows[h], term.position[g + 8 * h], target.column + at);
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
    const bool reports = unit == 0;
    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::out, args.chunks * LSW_MANY_OUTPUTS);
    if (lane < kGroup) load_route(args, group * kGroup + lane, lane, shared.routes, reports);
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

// Without rows there may be no units to divide by.
#define LSW_APPLY(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_MANY_SHRINK_THREADS, 1)                                                 \
        lsw_apply_shrink_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) shrink<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_MANY_EXPAND_THREADS, 3)                                                 \
        lsw_apply_expand_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) expand<T>(args);                                                                                  \
    }
LSW_APPLY(f16, __half)
LSW_APPLY(bf16, __nv_bfloat16)
