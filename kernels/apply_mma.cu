// Unmerged adapters of 16 bits for more than 64 rows, on the tensor cores: what apply.cu says, with y read and written once.
//
// The rows of a batch are taken in groups (shrink: of 64, expand: of 16, the M of an mma); each slot that occurs in a group is one
// product for all of them, and a row takes the results of its own slots only. So an adapter is read once a group, and not once a
// row. An element of an mma's result depends on its own row of the first operand alone: whatever the other rows of the group hold,
// NaN included, a row's bits are the same, and the same in any batch of more than 64.
//
//   order   a permutation that brings rows of like routes together, so that a group of 16 has few slots (with 8 slots, k = 2: about
//           2.3 instead of 8). One block; buckets of the two lowest slots; atomics decide the order within a bucket, which no result
//           depends on.
//   shrink  products = A x. M: rows, N: ranks, K: in_features, in 16 slices that the warps of a block add up in order.
//   expand  y += c (B products). M: rows, N: 32 outputs a warp, K: ranks. The products are f32: they enter as two tf32 of 11 bits
//           each, and B is exact in tf32, so that nothing is lost but the last bits of an f32. Terms are scaled and added in f32.
//
// Both operands come straight from memory into registers, without shared memory between: the order of k within a step is free as long
// as both agree on it, so a lane takes eight (four) consecutive elements of a row where the layout of the mma asks for pairs eight
// apart. In the same way a lane owns eight consecutive outputs of a row: y is read and written 16 bytes at a time, once.
#include "common/apply.cuh"
#include "common/ptx.cuh"

namespace {

constexpr uint32_t kGroup = LSW_APPLY_GROUP;
constexpr uint32_t kNone = 0x7fffffff;  // above every slot
constexpr uint32_t kSlices = LSW_APPLY_SLICES;

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

// Walks over the slots of a group of rows, ascending. One warp; lane l keeps the places of rows l and l + 32.
template <int kRows> struct Walk {
    static constexpr int kParts = (kRows + 31) / 32;
    uint32_t next[kParts] = {};
    int position[kParts];  // of the slot in the row's route; -1: it is not there
    uint32_t users[kParts];  // bit l: row l uses the slot

    __device__ __forceinline__ uint32_t step(const Routes<kRows>& routes) {
        const uint32_t lane = threadIdx.x % 32;
        uint32_t mine[kParts], slot = kNone;
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            mine[p] = 32 * p + lane < kRows ? routes.slot[32 * p + lane][next[p]] : kNone;
            slot = min(slot, mine[p]);
        }
        slot = __reduce_min_sync(kFullWarp, slot);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            const bool uses = slot != kNone && mine[p] == slot;
            position[p] = uses ? static_cast<int>(next[p]++) : -1;
            users[p] = __ballot_sync(kFullWarp, uses);
        }
        return slot;
    }
    __device__ __forceinline__ bool uses(int row) const { return users[row / 32] >> (row % 32) & 1; }
};

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

// Eight ranks of one slot at one target.
template <class T> struct Tile {
    const T* a;  // this lane's row
    bool exists, aligned;
};

template <class T> __device__ __forceinline__ Tile<T> tile_at(const LswApplyArgs& args, uint32_t column, uint32_t slot) {
    if (column >= args.width) return {nullptr, false, false};
    const LswApplyTarget& target = target_at(args, column);
    const LswFactor& f = factor_of(target, slot);
    const uint32_t i = column - target.column + threadIdx.x % 32 / 4;
    const bool exists = i < f.rank;
    const T* row = reinterpret_cast<const T*>(f.a) + (exists ? i : 0) * static_cast<uint64_t>(f.a_stride);
    return {row, exists, (f.flags & LSW_A_ALIGNED) != 0};
}

// One warp: sum = a slice of A x of 16 kFrags rows and 8 kTiles ranks, as the mma lays out its results. kWhole: all are whole aligned
// packs.
template <bool kWhole, int kFrags, int kTiles, class T>
__device__ __forceinline__ void multiply_slice(const LswApplyArgs& args, const Routes<16 * kFrags>& routes, const Walk<16 * kFrags>& walk,
                                               const Tile<T> (&tiles)[kTiles], uint32_t slice, float (&sum)[kFrags][kTiles][4]) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t length = (args.in + 32 * kSlices - 1) / (32 * kSlices) * 32;
    const uint32_t begin = slice * length, end = min(args.in, begin + length);
    const T* x[kFrags][2];
    bool uses[kFrags][2];
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t i = 16 * f + 8 * h + lane / 4;
            uses[f][h] = walk.uses(i);
            x[f][h] = reinterpret_cast<const T*>(args.x) + (uses[f][h] ? routes.row[i] : 0) * args.x_stride;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) sum[f][t][2 * h] = sum[f][t][2 * h + 1] = 0.0f;
        }
    }
    for (uint32_t col0 = begin; col0 < end; col0 += 32) {
        const uint32_t col = col0 + 8 * (lane % 4), left = col < end ? end - col : 0;
        Eight<T> a[kTiles], rows[kFrags][2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const T* p = tiles[t].a + col;
            a[t] = kWhole ? load_eight_if(tiles[t].exists && left > 0, p) : load_eight(p, tiles[t].exists ? left : 0, false);
        }
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const T* p = x[f][h] + col;
                rows[f][h] = kWhole ? load_eight_if(uses[f][h] && left > 0, p) : load_eight(p, uses[f][h] ? left : 0, false);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int f = 0; f < kFrags; ++f) {
                const uint32_t m[4] = {word(rows[f][0], 2 * half), word(rows[f][1], 2 * half), word(rows[f][0], 2 * half + 1),
                                       word(rows[f][1], 2 * half + 1)};
#pragma unroll
                for (int t = 0; t < kTiles; ++t) mma16816(sum[f][t], m, word(a[t], 2 * half), word(a[t], 2 * half + 1), T{});
            }
        }
    }
}

// A block: LSW_MANY_ROWS rows, LSW_MANY_RANKS columns of the products, every splits-th slot.
template <class T> __device__ __forceinline__ void shrink(const LswApplyArgs& args) {
    constexpr int kRows = LSW_MANY_ROWS, kRanks = LSW_MANY_RANKS, kFrags = kRows / 16, kTiles = kRanks / 8;
    constexpr uint32_t kWarps = LSW_SHRINK_THREADS / 32;
    static_assert(kSlices % kWarps == 0, "a slice a warp at a time");
    __shared__ Routes<kRows> routes;
    __shared__ float sums[kRows][kRanks + 1];
    __shared__ int positions[kRows];
    dependency_wait();
    dependency_release();
    const uint32_t column = blockIdx.x % args.units * kRanks, split = blockIdx.x / args.units % args.splits;
    const uint32_t group = blockIdx.x / args.units / args.splits;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t i = threadIdx.x; i < kRows; i += LSW_SHRINK_THREADS) load_route(args, group * kRows + i, i, routes, false);
    __syncthreads();

    Walk<kRows> walk;
    for (uint32_t entry = 0;; ++entry) {
        const uint32_t slot = walk.step(routes);
        if (slot == kNone) return;
        if (entry % args.splits != split) continue;
        Tile<T> tiles[kTiles];
        bool is_whole = args.x_aligned && args.in % 8 == 0;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            tiles[t] = tile_at<T>(args, column + 8 * t, slot);
            is_whole = is_whole && (tiles[t].aligned || !tiles[t].exists);
        }
        is_whole = __all_sync(kFullWarp, is_whole);
        if (warp == 0) {
#pragma unroll
            for (int p = 0; p < walk.kParts; ++p) positions[32 * p + lane] = walk.position[p];
        }
        for (uint32_t z = 0; z < kSlices; z += kWarps) {
            float sum[kFrags][kTiles][4];
            if (is_whole) multiply_slice<true>(args, routes, walk, tiles, z + warp, sum);
            else multiply_slice<false>(args, routes, walk, tiles, z + warp, sum);
            for (uint32_t w = 0; w < kWarps; ++w) {
                if (warp == w) {
#pragma unroll
                    for (int i = 0; i < kFrags * kTiles * 4; ++i) {
                        const int frag = i / (4 * kTiles), tile = i / 4 % kTiles, e = i % 4;
                        float& total = sums[16 * frag + lane / 4 + 8 * (e / 2)][8 * tile + lane % 4 * 2 + e % 2];
                        total = z + w == 0 ? sum[frag][tile][e] : total + sum[frag][tile][e];
                    }
                }
                __syncthreads();
            }
        }
        for (uint32_t i = threadIdx.x; i < kRows * kRanks; i += LSW_SHRINK_THREADS) {
            const uint32_t row = i / kRanks, rank = i % kRanks;
            if (positions[row] < 0 || column + rank >= args.width) continue;
            const LswApplyTarget& target = target_at(args, column + rank);
            if (column + rank - target.column >= factor_of(target, slot).rank) continue;
            products(args, routes.row[row], positions[row])[column + rank] = sums[row][rank];
        }
        __syncthreads();
    }
}

// A slot of a group of rows at a target.
struct Term {
    uint64_t b;
    uint32_t b_stride;
    uint32_t rank;
    float scale;
    uint16_t users;  // bit i: row i of the group
    uint16_t is_whole;  // its rows are whole aligned fours
};

constexpr uint32_t kMaxTerms = kGroup * LSW_MAX_K;

// The terms of a group of rows, ascending by slot. One block.
__device__ __forceinline__ uint32_t load_terms(const LswApplyArgs& args, const LswApplyTarget& target, uint32_t group, bool reports,
                                               Routes<kGroup>& routes, Term (&terms)[kMaxTerms]) {
    __shared__ uint32_t shared_count;
    if (threadIdx.x < kGroup) load_route(args, group * kGroup + threadIdx.x, threadIdx.x, routes, reports);
    __syncwarp();
    if (threadIdx.x < 32) {
        Walk<kGroup> walk;
        uint32_t count = 0;
        for (uint32_t slot; (slot = walk.step(routes)) != kNone; ++count) {
            if (threadIdx.x == 0) terms[count].b = slot, terms[count].users = walk.users[0];
        }
        if (threadIdx.x == 0) shared_count = count;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < shared_count; i += LSW_EXPAND_THREADS) {
        Term& term = terms[i];
        const uint32_t slot = term.b;
        const LswFactor f = factor_of(target, slot);
        for (uint32_t row = 0; reports && row < kGroup; ++row) {
            if (!(term.users >> row & 1)) continue;
            uint32_t position = 0;
            while (routes.slot[row][position] != slot) ++position;
            report_coefficient(args, f.rank, routes.gate[row][position] * f.scale);
        }
        term = {f.b, f.b_stride, f.rank, f.scale, term.users, static_cast<uint16_t>((f.flags & LSW_B_ALIGNED) != 0 && f.rank % 4 == 0)};
    }
    __syncthreads();
    return shared_count;
}

struct ExpandShared {
    Routes<kGroup> routes;
    Term terms[kMaxTerms];
};

// A lane's part of a step of 16 ranks of a term: four elements of four rows of B, four products of two rows of the batch.
struct Step {
    uint32_t term, rank;
    uint2 b[4];
    float4 product[2];  // past the rank: anything
    float c[2];         // 0: the row does not use the term
};

template <class T> __device__ __forceinline__ void load_b(Step& step, const Term& term, uint32_t first, uint32_t out) {
    const uint32_t lane = threadIdx.x % 32, rank = step.rank + 4 * (lane % 4);
    const T* b = reinterpret_cast<const T*>(term.b) + rank;
    const uint32_t left = rank < term.rank ? term.rank - rank : 0;
    const auto row = [&](int j) { return first + 8 * (lane / 8) + 2 * j + lane / 4 % 2; };
    if (term.is_whole) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const bool exists = left > 0 && row(j) < out;
            step.b[j] = exists ? *reinterpret_cast<const uint2*>(b + row(j) * static_cast<uint64_t>(term.b_stride)) : uint2{0, 0};
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        T lanes[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < left && row(j) < out) lanes[i] = b[row(j) * static_cast<uint64_t>(term.b_stride) + i];
        }
        memcpy(&step.b[j], lanes, 8);
    }
}

// sum += B products, the products in two parts that lose nothing.
template <class T> __device__ __forceinline__ void multiply(const Step& step, uint32_t rank, float (&sum)[4][4]) {
    const uint32_t at = step.rank + 4 * (threadIdx.x % 4);
    float high[2][4], low[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float p[4] = {step.product[h].x, step.product[h].y, step.product[h].z, step.product[h].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = at + i < rank && step.c[h] != 0.0f ? p[i] : 0.0f;
            high[h][i] = round_tf32(x);
            low[h][i] = is_finite(high[h][i]) ? round_tf32(x - high[h][i]) : 0.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 b01 = unpack(step.b[j].x, T{}), b23 = unpack(step.b[j].y, T{});
        mma1688(sum[j], {low[0][0], low[1][0], low[0][1], low[1][1]}, b01.x, b01.y);
        mma1688(sum[j], {low[0][2], low[1][2], low[0][3], low[1][3]}, b23.x, b23.y);
        mma1688(sum[j], {high[0][0], high[1][0], high[0][1], high[1][1]}, b01.x, b01.y);
        mma1688(sum[j], {high[0][2], high[1][2], high[0][3], high[1][3]}, b23.x, b23.y);
    }
}

// A block: a group of rows and LSW_EXPAND_THREADS x chunks outputs of one target. A warp does 32 outputs at a time; a lane owns
// eight of them in rows g and g + 8.
template <class T, class Y> __device__ __forceinline__ void expand(const LswApplyArgs& args, ExpandShared& shared) {
    constexpr int kAhead = 2;  // steps in flight
    Routes<kGroup>& routes = shared.routes;
    Term(&terms)[kMaxTerms] = shared.terms;
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t group = blockIdx.x / args.units, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::out, args.chunks * LSW_EXPAND_THREADS);
    const uint32_t count = load_terms(args, target, group, unit == 0, routes, terms);
    for (uint32_t chunk = 0; chunk < args.chunks; ++chunk) {
        const uint32_t first = ((unit * args.chunks + chunk) * (LSW_EXPAND_THREADS / 32) + threadIdx.x / 32) * 32;
        const uint32_t mine = first + 8 * q, left = mine < target.out ? target.out - mine : 0;
        if (chunk > 0 && first >= target.out) break;
        float total[2][8] = {}, sum[4][4] = {};
        bool touched[2] = {};
        uint32_t next[2] = {}, position[2] = {};  // in the routes of rows g and g + 8
        Eight<Y> y[2];
        uint32_t term = 0, rank = 0;  // of the next step
        for (bool begins = true; begins || term < count; begins = false) {
            Step steps[kAhead];
#pragma unroll
            for (int s = 0; s < kAhead; ++s) {
                steps[s].term = term;
                steps[s].rank = rank;
                if (term >= count) continue;
                load_b<T>(steps[s], terms[term], first, target.out);
                rank += 16;
                if (rank >= terms[term].rank) ++term, rank = 0;
            }
            // Of what came before, nothing but the products and y is still being written.
            if (begins && chunk == 0) dependency_wait();
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const bool exists = begins && routes.slot[g + 8 * h][0] != kNone;
                const Y* row = reinterpret_cast<const Y*>(target.y) + routes.row[g + 8 * h] * target.y_stride;
                if (exists) y[h] = load_eight(row + mine, left, target.y_aligned);
            }
#pragma unroll
            for (int s = 0; s < kAhead; ++s) {
                const uint32_t at = steps[s].rank + 4 * q;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t i = g + 8 * h;
                    steps[s].product[h] = {0.0f, 0.0f, 0.0f, 0.0f};
                    steps[s].c[h] = 0.0f;
                    if (steps[s].term >= count || !(terms[steps[s].term].users >> i & 1)) continue;
                    const Term& t = terms[steps[s].term];
                    if (steps[s].rank == 0) position[h] = next[h]++;
                    const float c = routes.gate[i][position[h]] * t.scale;
                    if (t.rank == 0 || c == 0.0f) continue;  // the products were not written, or need not be looked at
                    steps[s].c[h] = c;
                    if (at >= t.rank) continue;
                    const float* p = products(args, routes.row[i], position[h]) + target.column + at;
                    steps[s].product[h] = *reinterpret_cast<const float4*>(p);
                }
            }
#pragma unroll
            for (int s = 0; s < kAhead; ++s) {
                if (steps[s].term >= count) break;
                multiply<T>(steps[s], terms[steps[s].term].rank, sum);
                if (steps[s].rank + 16 < terms[steps[s].term].rank) continue;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const bool uses = steps[s].c[h] != 0.0f;
                    touched[h] |= uses;
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        float& part = sum[i / 2][2 * h + i % 2];
                        // A row that does not use the term takes nothing of it, NaN included.
                        if (uses) total[h][i] = fmaf(steps[s].c[h], part, total[h][i]);
                        part = 0.0f;
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!touched[h] || left == 0) continue;
#pragma unroll
            for (int i = 0; i < 8; ++i) y[h].set(i, y[h].at(i) + total[h][i]);
            store_eight(reinterpret_cast<Y*>(target.y) + routes.row[g + 8 * h] * target.y_stride + mine, y[h], left, target.y_aligned);
        }
    }
}

template <class T> __device__ __forceinline__ void expand(const LswApplyArgs& args) {
    __shared__ ExpandShared shared;
    if (args.y_type == 0) return expand<T, float>(args, shared);
    if (args.y_type == 1) return expand<T, __half>(args, shared);
    expand<T, __nv_bfloat16>(args, shared);
}

// The bucket of a row: by its lowest slot, then by its next one, as finely as there are buckets.
__device__ __forceinline__ uint32_t bucket_of(const LswApplyArgs& args, uint32_t row) {
    const int64_t item = item_of(args, row);
    uint32_t low = kNone, next = kNone;
    for (uint32_t e = 0; item >= 0 && e < args.k; ++e) {
        const int slot = known_id(id_at(args, item, e), args.slots);
        if (slot < 0 || slot == low) continue;
        next = min(next, max(low, static_cast<uint32_t>(slot)));
        low = min(low, static_cast<uint32_t>(slot));
    }
    if (low == kNone) return LSW_ORDER_BUCKETS - 1;
    if (next == kNone) next = low;
    const uint32_t fine = LSW_ORDER_BUCKETS / args.slots;
    if (fine == 0) return static_cast<uint64_t>(low) * LSW_ORDER_BUCKETS / args.slots;
    return low * fine + next * fine / args.slots;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(LSW_ORDER_THREADS) lsw_apply_order(const __grid_constant__ LswApplyArgs args) {
    constexpr uint32_t kEach = LSW_ORDER_BUCKETS / LSW_ORDER_THREADS;
    __shared__ uint32_t counts[LSW_ORDER_BUCKETS], warp_sums[LSW_ORDER_THREADS / 32];
    dependency_wait();
    dependency_release();
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t i = threadIdx.x; i < LSW_ORDER_BUCKETS; i += LSW_ORDER_THREADS) counts[i] = 0;
    __syncthreads();
    for (uint32_t row = threadIdx.x; row < args.rows; row += LSW_ORDER_THREADS) atomicAdd(&counts[bucket_of(args, row)], 1);
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
    for (uint32_t w = 0; w < warp; ++w) before += warp_sums[w];
    for (uint32_t i = 0; i < kEach; ++i) {
        const uint32_t here = counts[kEach * threadIdx.x + i];
        counts[kEach * threadIdx.x + i] = before;
        before += here;
    }
    __syncthreads();
    for (uint32_t row = threadIdx.x; row < args.rows; row += LSW_ORDER_THREADS) {
        reinterpret_cast<uint32_t*>(args.order)[atomicAdd(&counts[bucket_of(args, row)], 1)] = row;
    }
}

// Without rows there may be no units to divide by.
#define LSW_APPLY(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_SHRINK_THREADS, 1)                                                      \
        lsw_apply_shrink_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) shrink<T>(args);                                                                                  \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_EXPAND_THREADS, 4)                                                      \
        lsw_apply_expand_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) expand<T>(args);                                                                                  \
    }
LSW_APPLY(f16, __half)
LSW_APPLY(bf16, __nv_bfloat16)
