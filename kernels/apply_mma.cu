// Unmerged adapters of 16 bits, on the tensor cores: what apply.cu says, for any number of rows.
//
// The rows of a batch are taken in groups of 16 (shrink: of 64, where there are many), the M of an mma; each slot that occurs in a
// group is one product for all of them, and a row takes the results of its own slots only. So an adapter is read once a group, and not
// once a row. An element of an mma's result depends on its own row of the first operand alone: whatever the other rows of the group
// hold, NaN included, a row's bits are the same, and the same alone as in any batch.
//
//   order   above 64 rows: a permutation that brings rows of like routes together, so that a group has few slots (with 8 slots,
//           k = 2: about 2.3 instead of 8). One block; buckets of the two lowest slots; atomics decide the order within a bucket,
//           which no result depends on.
//   shrink  products = A x. M: rows, N: eight ranks, K: in_features, in 16 slices, which are added up in order: by the warps of a
//           block or, where there are few rows, left to expand, so that one token's A is read by 96 blocks instead of 12.
//   expand  y += c (B products). M: rows, N: 32 outputs a warp, K: ranks. The products are f32: they enter as two tf32 of 11 bits
//           each, and B is exact in tf32, so that nothing is lost but the last bits of an f32. Terms are scaled and added in f32.
//
// Floor of one token: the chosen adapters, read once (Llama-2-7B, rank 16, two of them: 0.16 GB, 35 us of an H200's bandwidth, in 128
// groups of targets). So latency is all that counts: launches, and loads that wait for loads (ids -> factor -> A -> sum -> products
// -> y). expand is a dependent launch: shrink lets it start as soon as shrink itself has passed its own wait. From then on all that
// came before shrink is complete, and shrink writes the products alone; so expand reads routes, factors and its first steps of B
// while shrink runs, and waits before products and y only. Floor of many rows: x read and y read and written once.
//
// Both operands come straight from memory into registers, without shared memory between: the order of k within a step is free as long
// as both agree on it, so a lane takes eight (four) consecutive elements of a row where the layout of the mma asks for pairs eight
// apart. In the same way a lane owns eight consecutive outputs of a row: y is read and written 16 bytes at a time, once.
#include "common/apply.cuh"
#include "common/ptx.cuh"

namespace {

constexpr uint32_t kFullWarp = 0xffffffffu;
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

__device__ __forceinline__ float* product_slice(const LswApplyArgs& args, uint32_t slice, uint32_t row, uint32_t position) {
    return products(args, row, position) + static_cast<uint64_t>(slice) * args.rows * args.k * args.width;
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

// Loads that the compiler may move: where everything is whole packs there is nothing to decide but whether to load.
template <bool kWhole, class T> __device__ __forceinline__ Eight<T> load_pack(const T* p, uint32_t left, bool aligned) {
    if constexpr (!kWhole) return load_eight(p, left, aligned);
    Eight<T> eight;
    if (left > 0) eight.part[0] = load16(p);
    return eight;
}

// One warp: sum = a slice of A x of 16 kFrags rows and 8 kTiles ranks, as the mma lays out its results. kSteps of 32 columns are in
// flight.
template <int kSteps, bool kWhole, int kFrags, int kTiles, class T>
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
    for (uint32_t col0 = begin + 8 * (lane % 4); col0 - 8 * (lane % 4) < end; col0 += 32 * kSteps) {
        Eight<T> a[kSteps][kTiles], rows[kSteps][kFrags][2];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint32_t col = col0 + 32 * s, left = col < end ? end - col : 0;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) a[s][t] = load_pack<kWhole>(tiles[t].a + col, tiles[t].exists ? left : 0, tiles[t].aligned);
#pragma unroll
            for (int f = 0; f < kFrags; ++f) {
#pragma unroll
                for (int h = 0; h < 2; ++h) rows[s][f][h] = load_pack<kWhole>(x[f][h] + col, uses[f][h] ? left : 0, args.x_aligned);
            }
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int f = 0; f < kFrags; ++f) {
                    const uint32_t m[4] = {word(rows[s][f][0], 2 * half), word(rows[s][f][1], 2 * half), word(rows[s][f][0], 2 * half + 1),
                                           word(rows[s][f][1], 2 * half + 1)};
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) mma16816(sum[f][t], m, word(a[s][t], 2 * half), word(a[s][t], 2 * half + 1), T{});
                }
            }
        }
    }
}

// A block: 16 kFrags rows, 8 kTiles columns of the products, every splits-th slot. Of one warp it does one slice, of eight warps all.
template <int kSteps, int kFrags, int kTiles, class T> __device__ __forceinline__ void shrink(const LswApplyArgs& args) {
    constexpr int kRows = 16 * kFrags, kRanks = 8 * kTiles;
    constexpr uint32_t kWarps = LSW_SHRINK_THREADS / 32;
    __shared__ Routes<kRows> routes;
    __shared__ float sums[kRows][kRanks + 1];
    __shared__ int positions[kRows];
    dependency_wait();
    dependency_release();
    uint32_t unit = blockIdx.x;
    const uint32_t column = unit % args.units * kRanks;
    unit /= args.units;
    const uint32_t split = unit % args.splits;
    unit /= args.splits;
    const uint32_t slice = unit % args.slices, group = unit / args.slices;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t i = threadIdx.x; i < kRows; i += blockDim.x) load_route(args, group * kRows + i, i, routes, false);
    __syncthreads();

    Walk<kRows> walk;
    for (uint32_t entry = 0;; ++entry) {
        const uint32_t slot = walk.step(routes);
        if (slot == kNone) return;
        if (entry % args.splits != split) continue;
        Tile<T> tiles[kTiles];
        float sum[kFrags][kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) tiles[t] = tile_at<T>(args, column + 8 * t, slot);
        bool is_whole = args.x_aligned && args.in % 8 == 0;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) is_whole = is_whole && (tiles[t].aligned || !tiles[t].exists);
        is_whole = __all_sync(kFullWarp, is_whole);
        if (warp == 0) {
#pragma unroll
            for (int p = 0; p < walk.kParts; ++p) {
                if (32 * p + lane < kRows) positions[32 * p + lane] = walk.position[p];
            }
        }
        const auto for_each = [&](auto f) {  // of this lane's results: row, rank, value
#pragma unroll
            for (int i = 0; i < kFrags * kTiles * 4; ++i) {
                const int frag = i / (4 * kTiles), tile = i / 4 % kTiles, e = i % 4;
                f(16 * frag + lane / 4 + 8 * (e / 2), 8 * tile + lane % 4 * 2 + e % 2, sum[frag][tile][e]);
            }
        };
        for (uint32_t z = 0; z < (args.slices > 1 ? 1 : kSlices); z += kWarps) {
            const uint32_t mine = args.slices > 1 ? slice : z + warp;
            if (is_whole) multiply_slice<kSteps, true>(args, routes, walk, tiles, mine, sum);
            else multiply_slice<1, false>(args, routes, walk, tiles, mine, sum);
            for (uint32_t w = 0; w < blockDim.x / 32; ++w) {
                if (warp == w) {
                    if (z + w == 0) for_each([&](uint32_t row, uint32_t rank, float x) { sums[row][rank] = x; });
                    else for_each([&](uint32_t row, uint32_t rank, float x) { sums[row][rank] += x; });
                }
                __syncthreads();
            }
        }
        for (uint32_t i = threadIdx.x; i < kRows * kRanks; i += blockDim.x) {
            const uint32_t row = i / kRanks, rank = i % kRanks;
            if (positions[row] < 0 || column + rank >= args.width) continue;
            const LswApplyTarget& target = target_at(args, column + rank);
            if (column + rank - target.column >= factor_of(target, slot).rank) continue;
            product_slice(args, slice, routes.row[row], positions[row])[column + rank] = sums[row][rank];
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

// Where the sums of A x are: the workspace or, of few rows, shared memory.
struct Products {
    const float* start;
    uint64_t row_stride;
    uint32_t position_stride;
};

// The parts of A x of few rows at a target, added up in order.
__device__ __forceinline__ Products stage(const LswApplyArgs& args, const LswApplyTarget& target, const Routes<kGroup>& routes,
                                          float (&staged)[LSW_APPLY_STAGED]) {
    const uint32_t cap = (target.rank_cap + 7) / 8 * 8;
    for (uint32_t i = threadIdx.x; i < args.rows * args.k * cap; i += LSW_EXPAND_THREADS) {
        const uint32_t row = i / (args.k * cap), position = i / cap % args.k, rank = i % cap;
        float sum = 0.0f;
        uint32_t p = 0;  // entries behind the last were not written
        while (p < position && routes.slot[row][p] != kNone) ++p;
        if (routes.slot[row][p] != kNone && rank < factor_of(target, routes.slot[row][p]).rank) {
            const float* part = products(args, row, position) + target.column + rank;
            const uint64_t stride = static_cast<uint64_t>(args.rows) * args.k * args.width;
            float parts[kSlices];
#pragma unroll
            for (uint32_t z = 0; z < kSlices; ++z) parts[z] = part[z * stride];
            sum = parts[0];
#pragma unroll
            for (uint32_t z = 1; z < kSlices; ++z) sum += parts[z];
        }
        staged[i] = sum;
    }
    __syncthreads();
    return {staged, static_cast<uint64_t>(args.k) * cap, cap};
}

struct ExpandShared {
    Routes<kGroup> routes;
    Term terms[kMaxTerms];
    float products[LSW_APPLY_STAGED];
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
// eight of them in rows g and g + 8. kAhead steps are in flight.
template <int kAhead, class T, class Y> __device__ __forceinline__ void expand(const LswApplyArgs& args, ExpandShared& shared) {
    Routes<kGroup>& routes = shared.routes;
    Term(&terms)[kMaxTerms] = shared.terms;
    uint32_t unit = blockIdx.x % args.units;
    const uint32_t group = blockIdx.x / args.units, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const LswApplyTarget& target = target_of(args, unit, &LswApplyTarget::out, args.chunks * LSW_EXPAND_THREADS);
    const uint32_t count = load_terms(args, target, group, unit == 0, routes, terms);
    Products found{};
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
            if (begins && chunk == 0) {
                // Of what came before, nothing but the products and y is still being written.
                dependency_wait();
                if (args.slices > 1) found = stage(args, target, routes, shared.products);
                else found = {products(args, 0, 0) + target.column, static_cast<uint64_t>(args.k) * args.width, args.width};
            }
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
                    const float* p = found.start + routes.row[i] * found.row_stride + position[h] * found.position_stride + at;
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

template <int kAhead, class T> __device__ __forceinline__ void expand(const LswApplyArgs& args) {
    __shared__ ExpandShared shared;
    if (args.y_type == 0) return expand<kAhead, T, float>(args, shared);
    if (args.y_type == 1) return expand<kAhead, T, __half>(args, shared);
    expand<kAhead, T, __nv_bfloat16>(args, shared);
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

// Few rows wait for memory, so that more of it is asked for at a time; many rows hide that with more blocks. Without rows there may be
// no units to divide by.
#define LSW_APPLY(suffix, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LSW_SHRINK_THREADS, 2)                                                      \
        lsw_apply_shrink_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) shrink<8, 1, 1, T>(args);                                                                            \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_SHRINK_THREADS, 1)                                                      \
        lsw_apply_shrink_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) shrink<1, LSW_MANY_ROWS / 16, LSW_MANY_RANKS / 8, T>(args);                            \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_EXPAND_THREADS, 2)                                                      \
        lsw_apply_expand_##suffix(const __grid_constant__ LswApplyArgs args) {                                               \
        if (args.rows > 0) expand<4, T>(args);                                                                               \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_EXPAND_THREADS, 4)                                                      \
        lsw_apply_expand_many_##suffix(const __grid_constant__ LswApplyArgs args) {                                          \
        if (args.rows > 0) expand<2, T>(args);                                                                               \
    }
LSW_APPLY(f16, __half)
LSW_APPLY(bf16, __nv_bfloat16)
