// A product with its unmerged adapters, for up to eight tokens: a decode step's matrices.
//
//   y[t, o] = round(W[o] . x[t] + sum over p of c_p (B_p[o] . h[t, p])),   h[t, p] = A_p x[t]     for entry p of token t's route
//
// for all targets of a group that share x (q, k, v; gate, up), in one launch. Their rows count through as those of one matrix.
//
// Floor: W once, and the chosen adapters (Llama-2-7B in 16 bits, rank 16, two of them: 12.95 and 0.16 GB, over the time to read them). A
// decode step has 128 such launches of 24 us, and what a launch loses at its begin and end it loses 128 times. Hence:
//
// - Eight warps of a block stream W: of a tile of 16 rows each takes every eighth line of 128 bytes, with the same line of x, through a ring
//   of its own in shared memory (cp.async: no barrier but __syncwarp). They share no tile's sum: each keeps its own to the end of the
//   launch, so that no warp ever waits for another and no ring runs dry between tiles.
// - The products are the tensor cores': with one token seven of the eight columns are idle, but the sums are the same for any number of
//   tokens, and a line of 16 rows costs 4 instructions. (32 bits: plain fma, one token at a time.)
// - Four further warps, the adders, do the adapters' part meanwhile: route, factors, the block's share of the rows of all A; then they
//   publish it, wait until all blocks have, and multiply by the block's rows of B. Their chain of latencies is as long as the shortest
//   stream and hides behind it.
// - The launch is a dependent one (griddepcontrol). Its blocks take the places of those of the launch before as they finish, and fill
//   their rings with W, which is constant, before they wait for x. So the memory hardly idles between launches. The launch after is let
//   loose at once: it gets on only where a block is done.
// - What is on its way from memory makes all else wait: the end of the launch before, routes and factors, x. So a warp has no more lines on
//   their way than the memory's latency asks for, one or two before x is there, though its ring holds more (1.05 where a whole ring at once
//   takes 1.07). One token, whose lines are shorter, has a kernel of its own with a ring twice as deep: enough to last until x is there.
// - x goes through the ring too. Loads of x to registers wait behind all copies of W that the multiprocessor has in flight, a memory
//   latency for each line: 1.8 of the floor where this takes 1.1.
//
// Blocks wait for each other, but not for long: one that has waited for a millisecond (the others may have no place to run) computes all
// of A x itself, to the same bits, which it may write beside the others. So nothing can starve, and the launch need not be cooperative:
// that would keep its blocks from starting one by one (1.20 of the floor for 1.14). The last block that is done with h sets the counters to zero
// for the launch after.
//
// Bits: a row's sum is that of its lines in order over each warp, then of the eight warps in order, then of what the adapters add. None
// of it depends on the tile or the block that a row falls to, nor on the other tokens. Where something is not whole aligned packs, lines
// are gathered element by element to the same places: the same bits again.
#include "common/apply.cuh"
#include "common/ptx.cuh"
#include "common/route.cuh"

namespace {

constexpr uint32_t kStreamers = LSW_LINEAR_STREAMERS, kAdders = LSW_LINEAR_ADDERS;
constexpr uint32_t kTile = LSW_LINEAR_TILE, kPacksOfLine = LSW_LINEAR_LINE / 16;
constexpr uint32_t kAddThreads = 32 * kAdders;
constexpr int kAddBarrier = 1;

// An adapter of a token at a target. Rank 0: it adds nothing.
struct Term {
    uint64_t a, b;
    uint32_t a_stride, b_stride, rank;
    float c;
    uint32_t flags, padding;
};

// An entry of a canonical route; slot -1: none.
struct Chosen {
    int slot;
    float gate;
};

// A line of each of a tile's rows and of all tokens' x. Packs of even and odd rows lie apart, so that two rows are read without bank
// conflicts.
template <uint32_t kTokens> struct Place {
    uint4 packs[kTile + kTokens][kPacksOfLine];
    __device__ __forceinline__ uint4& at(uint32_t row, uint32_t pack) { return packs[row][pack ^ (row % 2 * 4)]; }
};

// Places of a warp's ring; how many of them hold a line before the first is used up; and how many lines are on their way at a time: enough
// for the memory's latency and no more, since all else waits behind them.
template <uint32_t kTokens> constexpr uint32_t kDepth = kTokens == 1 ? LSW_LINEAR_ONE_DEPTH : LSW_LINEAR_DEPTH;
template <uint32_t kTokens> constexpr uint32_t kHeld = kTokens == 1 ? kDepth<1> : LSW_LINEAR_DEPTH - 1;
template <uint32_t kTokens> constexpr uint32_t kFlying = kTokens == 1 ? 3 : LSW_LINEAR_DEPTH - 1;

template <uint32_t kTokens> struct Rings {
    Place<kTokens> of[kStreamers][kDepth<kTokens>];
};

struct alignas(16) Shared {
    Term terms[LSW_LINEAR_TERMS];
    Chosen routes[LSW_LINEAR_TOKENS][LSW_MAX_K];
    float dots[2][kAdders];
    bool is_ready;
    // Behind it, for each [token][round][row] of a block: W x over the lines of each streamer, and what adapters add.
    __device__ __forceinline__ float* product(uint32_t outputs, uint32_t streamer) {
        return reinterpret_cast<float*>(this + 1) + streamer * outputs;
    }
    __device__ __forceinline__ float* added(uint32_t outputs) { return product(outputs, kStreamers); }
};
static_assert(sizeof(Rings<LSW_LINEAR_TOKENS>) + sizeof(Shared) == LSW_LINEAR_SHARED, "the host asks for this");
static_assert(sizeof(Rings<1>) + sizeof(Shared) == LSW_LINEAR_ONE_SHARED, "the host asks for this");
static_assert(LSW_LINEAR_OUTPUT == 4 * (kStreamers + 1), "the host asks for product and added");

__device__ __forceinline__ uint32_t tile_begin(const LswLinearArgs& args, uint32_t tile) {
    return tile * args.tile_rows + min(tile, args.longer);
}

// A row of all targets together: its target, and which of that target's it becomes.
__device__ __forceinline__ uint32_t target_of_row(const LswLinearArgs& args, uint32_t& row) {
    uint32_t g = 0;
    for (; row >= args.apply.targets[g].out; ++g) row -= args.apply.targets[g].out;
    return g;
}

// What a block keeps of each kind: [token][round][row of the tile].
__device__ __forceinline__ uint32_t outputs_of(const LswLinearArgs& args) { return args.apply.rows * args.rounds * kTile; }

// f(index, token, target, row of the target) for those of a block's outputs that there are, from `first` on.
template <class F> __device__ __forceinline__ void for_outputs(const LswLinearArgs& args, uint32_t first, uint32_t step, F f) {
    const uint32_t slots = args.rounds * kTile;
    for (uint32_t i = first; i < outputs_of(args); i += step) {
        const uint32_t tile = i % slots / kTile * gridDim.x + blockIdx.x;
        uint32_t row = tile_begin(args, tile) + i % kTile;
        if (row >= tile_begin(args, tile + 1)) continue;
        const uint32_t g = target_of_row(args, row);
        f(i, i / slots, g, row);
    }
}

// The first `left` elements of a pack; zeros for the others.
template <class T> __device__ __forceinline__ Pack<T> gather16(const T* p, uint32_t left) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
        if (i < left) pack.lane[i] = p[i];
    }
    return pack;
}

// What a warp streams: of each tile in turn, the lines warp, warp + kStreamers, ... of all rows and tokens. A lane has a pack of every
// fourth row. kWhole: all are whole aligned packs. What is not there comes as zeros.
template <bool kWhole, uint32_t kTokens, class T> struct Lines {
    static constexpr uint32_t kCols = LSW_LINEAR_LINE / sizeof(T), kLaneRows = 32 / kPacksOfLine;
    const LswLinearArgs& args;
    uint32_t first, count, left;                          // left: lines to go, of all tiles
    uint32_t round = 0, line, x_line;                     // of the next load
    const T* rows[kWhole ? kTile / kLaneRows : 1];  // null: no such row

    __device__ __forceinline__ Lines(const LswLinearArgs& args, uint32_t warp) : args(args), first(warp), line(warp), x_line(warp) {
        count = (args.apply.in + kCols - 1) / kCols;
        left = first < count ? args.rounds * ((count - first + kStreamers - 1) / kStreamers) : 0;
        locate();
    }
    __device__ __forceinline__ const T* row_of_tile(uint32_t i) const {
        const uint32_t tile = round * gridDim.x + blockIdx.x;
        uint32_t row = tile_begin(args, tile) + i;
        if (round >= args.rounds || row >= tile_begin(args, tile + 1)) return nullptr;
        const uint32_t g = target_of_row(args, row);
        return reinterpret_cast<const T*>(args.weights[g]) + row * args.weight_strides[g];
    }
    __device__ __forceinline__ void locate() {
        if constexpr (kWhole) {
#pragma unroll
            for (uint32_t i = 0; i < kTile / kLaneRows; ++i) rows[i] = row_of_tile(threadIdx.x % 32 / kPacksOfLine + i * kLaneRows);
        }
    }
    __device__ __forceinline__ uint32_t after(uint32_t line) const { return line + kStreamers < count ? line + kStreamers : first; }

    __device__ __forceinline__ void load(Place<kTokens>& place, uint32_t row, const T* p, uint32_t line) const {
        const uint32_t pack = threadIdx.x % kPacksOfLine, col = line * kCols + pack * kPack<T>;
        const uint32_t left = p != nullptr && col < args.apply.in ? args.apply.in - col : 0;
        if (kWhole) copy16_partly(shared_address(&place.at(row, pack)), p + col, left > 0 ? 16 : 0);
        else place.at(row, pack) = gather16(p + col, left).bits;
    }
    __device__ __forceinline__ void load_weights(Place<kTokens>& place) {
#pragma unroll(kWhole ? kTile / kLaneRows : 1)
        for (uint32_t i = 0; i < kTile / kLaneRows; ++i) {
            const uint32_t row = threadIdx.x % 32 / kPacksOfLine + i * kLaneRows;
            load(place, row, kWhole ? rows[i] : row_of_tile(row), line);
        }
        line = after(line), --left;
        if (line == first) ++round, locate();
    }
    __device__ __forceinline__ void load_x(Place<kTokens>& place) {
#pragma unroll(kWhole ? 2 : 1)
        for (uint32_t token = threadIdx.x % 32 / kPacksOfLine; token < kTokens; token += kLaneRows) {
            const T* x = reinterpret_cast<const T*>(args.apply.x) + token * args.apply.x_stride;
            if (token < args.apply.rows) load(place, kTile + token, x, x_line);
        }
        x_line = after(x_line);
    }
};

// A warp's sums of a tile's rows over its lines, for all tokens.
//
// 16 bits, on tensor cores: 16 rows are a product's first operand, x of eight tokens its second. Which column of a line counts as which
// of the product does not matter, if both operands say the same: so a lane's packs are its fragments as they lie in memory. Of tokens
// that there are not, any values serve: a token is a column of its own.
template <class T, uint32_t kTokens> struct Sums {
    float d[kTile / 16][4] = {};

    __device__ __forceinline__ void add(const LswLinearArgs&, Place<kTokens>& place) {
        const uint32_t row = threadIdx.x % 32 / 4;
#pragma unroll
        for (uint32_t pack = threadIdx.x % 4; pack < kPacksOfLine; pack += 4) {
            const uint4 x = place.at(kTile + row % kTokens, pack);
#pragma unroll
            for (uint32_t i = 0; i < kTile / 16; ++i) {
                const uint4 top = place.at(16 * i + row, pack), low = place.at(16 * i + row + 8, pack);
                const uint32_t first[4] = {top.x, low.x, top.y, low.y}, second[4] = {top.z, low.z, top.w, low.w};
                mma16816(d[i], first, x.x, x.y, T{});
                mma16816(d[i], second, x.z, x.w, T{});
            }
        }
    }
    // f(row of the tile, token, sum)
    template <class F> __device__ __forceinline__ void take(F f) {
#pragma unroll
        for (uint32_t i = 0; i < 4 * (kTile / 16); ++i) {
            f(i / 4 * 16 + i / 2 % 2 * 8 + threadIdx.x % 32 / 4, threadIdx.x % 4 * 2 + i % 2, d[i / 4][i % 4]);
            d[i / 4][i % 4] = 0.0f;
        }
    }
};

// 32 bits, which tensor cores would round: a lane has every eighth row and a quarter of the columns.
template <uint32_t kTokens> struct Sums<float, kTokens> {
    float d[kTile / 8][kTokens] = {};

    __device__ __forceinline__ void add(const LswLinearArgs& args, Place<kTokens>& place) {
#pragma unroll
        for (uint32_t pack = threadIdx.x % 4; pack < kPacksOfLine; pack += 4) {
            Pack<float> w[kTile / 8];
#pragma unroll
            for (uint32_t i = 0; i < kTile / 8; ++i) w[i].bits = place.at(8 * i + threadIdx.x % 32 / 4, pack);
#pragma unroll
            for (uint32_t token = 0; token < kTokens; ++token) {
                if (token >= args.apply.rows) break;
                Pack<float> x;
                x.bits = place.at(kTile + token, pack);
#pragma unroll
                for (uint32_t i = 0; i < kTile / 8; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) d[i][token] = fmaf(w[i].lane[j], x.lane[j], d[i][token]);
                }
            }
        }
    }
    template <class F> __device__ __forceinline__ void take(F f) {
#pragma unroll
        for (uint32_t i = 0; i < kTile / 8 * kTokens; ++i) {
            float& sum = d[i / kTokens][i % kTokens];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            if (threadIdx.x % 4 == 0) f(i / kTokens * 8 + threadIdx.x % 32 / 4, i % kTokens, sum);
            sum = 0.0f;
        }
    }
};

template <bool kWhole, uint32_t kTokens, class T>
__device__ __forceinline__ void stream(const LswLinearArgs& args, Shared& shared, Rings<kTokens>& rings) {
    constexpr uint32_t kPlaces = kDepth<kTokens>;
    const uint32_t warp = threadIdx.x / 32;
    Place<kTokens>* ring = rings.of[warp];
    float* product = shared.product(outputs_of(args), warp);
    if (!args.only_x_is_new) dependency_wait();
    Lines<kWhole, kTokens, T> ahead(args, warp);
    const uint32_t lines = ahead.left / args.rounds, early = min(kPlaces - 1, ahead.left);
#pragma unroll 1
    for (uint32_t i = 0; i < early; ++i) {
        // One at a time where the adders wait for something too.
        if (kTokens == 1 && args.apply.k > 0) copy_wait<0>();
        else copy_wait<1>();
        ahead.load_weights(ring[i]);
        copy_commit();
    }
    dependency_wait();
    dependency_release();
    // Right behind x, one token's last place: the memory has something to do until x is there.
#pragma unroll 1
    for (uint32_t i = 0; i < kHeld<kTokens>; ++i) {
        if (i >= early && ahead.left > 0) ahead.load_weights(ring[i]), ahead.load_x(ring[i]);
        else if (i < early) ahead.load_x(ring[i]);
        copy_commit();
    }
    Sums<T, kTokens> sums;
    uint32_t place = 0, free = kFlying<kTokens> % kPlaces, held = kHeld<kTokens>;
#pragma unroll 1
    for (uint32_t round = 0; round < args.rounds; ++round) {
#pragma unroll 1
        for (uint32_t i = 0; i < lines; ++i) {
            copy_wait<kFlying<kTokens> - 1>();
            __syncwarp();
            if (held > kFlying<kTokens>) --held;
            else if (ahead.left > 0) ahead.load_weights(ring[free]), ahead.load_x(ring[free]);
            copy_commit();
            sums.add(args, ring[place]);
            place = place + 1 < kPlaces ? place + 1 : 0;
            free = free + 1 < kPlaces ? free + 1 : 0;
        }
        sums.take([&](uint32_t row, uint32_t token, float sum) {
            if (token < args.apply.rows) product[(token * args.rounds + round) * kTile + row] = sum;
        });
    }
}

// The tokens' routes, one warp each. In canonical form; an entry's place is its position.
__device__ __forceinline__ void find_routes(const LswApplyArgs& args, Shared& shared) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t token = threadIdx.x / 32 - kStreamers; token < args.rows; token += kAdders) {
        shared.routes[token][lane] = {-1, 0.0f};
        __syncwarp();
        const int64_t item = item_of(args, token);
        if (item < 0) continue;
        const int given = id_at(args, item, lane);
        const float gate = gate_at(args, item, lane);
        if (blockIdx.x == 0) report_id(args, given);
        const RouteEntry entry = canonical_entry(known_id(given, args.slots), gate, args.k);
        if (entry.slot >= 0) shared.routes[token][entry.position] = {entry.slot, entry.gate};
    }
}

// The terms of some of the pairs (token, target), k each.
__device__ __forceinline__ void find_terms(const LswApplyArgs& args, Shared& shared, uint32_t first, uint32_t count) {
    sync_some<kAddBarrier, kAddThreads>();  // the former are no longer in use
    for (uint32_t i = threadIdx.x - 32 * kStreamers; i < count * args.k; i += kAddThreads) {
        const uint32_t pair = first + i / args.k;
        const Chosen chosen = shared.routes[pair / args.count][i % args.k];
        Term term{};
        if (chosen.slot >= 0) {
            const LswFactor f = factor_of(args.targets[pair % args.count], chosen.slot);
            const float c = chosen.gate * f.scale;
            if (blockIdx.x == 0) report_coefficient(args, f.rank, c);
            if (c != 0.0f && f.rank > 0) term = {f.a, f.b, f.a_stride, f.b_stride, f.rank, c, f.flags, 0};
        }
        shared.terms[i] = term;
    }
    sync_some<kAddBarrier, kAddThreads>();
}

// f(term, row) for a block's rows of A: of all rows of all terms every blocks-th. `before`: of how many rows, over which it moves on.
template <class F>
__device__ __forceinline__ void for_rows_of_a(const Shared& shared, uint32_t terms, uint32_t block, uint32_t blocks, uint32_t& before, F f) {
    for (uint32_t p = 0; p < terms; ++p) {
        const uint32_t rank = shared.terms[p].rank, phase = before % blocks;
        for (uint32_t i = block >= phase ? block - phase : block + blocks - phase; block < blocks && i < rank; i += blocks) f(p, i);
        before += rank;
    }
}

template <bool kWhole, class T> __device__ __forceinline__ float dot_part(const T* x, const T* a, uint32_t in) {
    constexpr uint32_t kStep = 8 * kAddThreads;
    constexpr int kAhead = kWhole ? 4 : 1;
    float sum = 0.0f;
    for (uint32_t col0 = 8 * (threadIdx.x - 32 * kStreamers); col0 < in; col0 += kAhead * kStep) {
        Eight<T> x_eight[kAhead], a_eight[kAhead];
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            const uint32_t col = col0 + s * kStep, left = col < in ? in - col : 0;
            x_eight[s] = kWhole ? load_eight_if(left > 0, x + col) : load_eight(x + col, left, false);
            a_eight[s] = kWhole ? load_eight_if(left > 0, a + col) : load_eight(a + col, left, false);
        }
#pragma unroll
        for (int i = 0; i < 8 * kAhead; ++i) sum = fmaf(a_eight[i / 8].at(i % 8), x_eight[i / 8].at(i % 8), sum);
    }
    return sum;
}

__device__ __forceinline__ void store_y(const LswLinearArgs& args, const LswApplyTarget& target, uint64_t at, float y) {
    if (args.apply.y_type == 0) reinterpret_cast<float*>(target.y)[at] = y;
    if (args.apply.y_type == 1) reinterpret_cast<__half*>(target.y)[at] = from_float<__half>(y);
    if (args.apply.y_type == 2) reinterpret_cast<__nv_bfloat16*>(target.y)[at] = from_float<__nv_bfloat16>(y);
}

template <class T> __device__ __forceinline__ float times_b(const Term& term, uint32_t row, const float* product) {
    const T* b = reinterpret_cast<const T*>(term.b) + row * static_cast<uint64_t>(term.b_stride);
    float dot = 0.0f;
    if ((term.flags & LSW_B_ALIGNED) && term.rank % 8 == 0) {
#pragma unroll 2
        for (uint32_t i = 0; i < term.rank; i += 8) {
            const Eight<T> b_eight = load_eight_if(true, b + i);
            const Eight<float> p_eight = load_eight_if(true, product + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) dot = fmaf(b_eight.at(j), p_eight.at(j), dot);
        }
    } else {
        for (uint32_t i = 0; i < term.rank; ++i) dot = fmaf(to_float(b[i]), product[i], dot);
    }
    return dot;
}

// What holds for all of a launch's pairs (token, target).
struct Pairs {
    uint32_t all, chunk;  // so many have their terms at hand at a time
    __device__ __forceinline__ Pairs(const LswApplyArgs& args)
        : all(args.rows * args.count), chunk(min(static_cast<uint32_t>(LSW_LINEAR_TERMS) / max(args.k, 1u), all)) {}
};

// A block's rows of A times x, into the products. Returns the rows of all blocks. The first chunk's terms are at hand, and again at the
// end where there is but one. The dots alternate from row to row, over calls too: one barrier a row keeps the last row's until they are read.
template <class T>
__device__ __forceinline__ uint32_t multiply_a(const LswLinearArgs& linear, Shared& shared, Pairs pairs, uint32_t block, uint32_t& parity) {
    const LswApplyArgs& args = linear.apply;
    const uint32_t thread = threadIdx.x - 32 * kStreamers;
    uint32_t before = 0;
    for (uint32_t first = 0; first < pairs.all; first += pairs.chunk) {
        const uint32_t count = min(pairs.chunk, pairs.all - first);
        if (pairs.chunk < pairs.all) find_terms(args, shared, first, count);
        for_rows_of_a(shared, count * args.k, block, linear.blocks, before, [&](uint32_t p, uint32_t i) {
            const Term& term = shared.terms[p];
            const uint32_t pair = first + p / args.k, token = pair / args.count;
            const T* x = reinterpret_cast<const T*>(args.x) + token * args.x_stride;
            const T* a = reinterpret_cast<const T*>(term.a) + i * static_cast<uint64_t>(term.a_stride);
            const bool whole = args.x_aligned && (term.flags & LSW_A_ALIGNED) && args.in % 8 == 0;
            float sum = whole ? dot_part<true>(x, a, args.in) : dot_part<false>(x, a, args.in);
            for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
            if (thread % 32 == 0) shared.dots[parity][thread / 32] = sum;
            sync_some<kAddBarrier, kAddThreads>();
            if (thread == 0) {
                float total = 0.0f;
                for (uint32_t w = 0; w < kAdders; ++w) total += shared.dots[parity][w];
                products(args, token, p % args.k)[args.targets[pair % args.count].column + i] = total;
            }
            parity ^= 1;
        });
    }
    return before;
}

// True when all blocks that have rows of A have published them; false when they take too long.
__device__ __forceinline__ bool wait_for_products(const LswLinearArgs& linear, Shared& shared, uint32_t blocks) {
    if (threadIdx.x == 32 * kStreamers) {
        LswLinearHandOver* hand_over = reinterpret_cast<LswLinearHandOver*>(linear.hand_over);
        if (blockIdx.x < blocks) count_acq_rel(&hand_over->ready, ~0u);
        const int64_t begin = clock64();
        do shared.is_ready = load_acquire(&hand_over->ready) == blocks;
        while (!shared.is_ready && clock64() - begin < linear.patience);
        if (linear.patience == 0) shared.is_ready = false;
    }
    sync_some<kAddBarrier, kAddThreads>();
    return shared.is_ready;
}

// Into L2 what will be read once x is there.
template <class T> __device__ __forceinline__ void prefetch_adapters(const LswLinearArgs& linear, Shared& shared, Pairs pairs) {
    const LswApplyArgs& args = linear.apply;
    constexpr uint32_t kLine = 128 / sizeof(T);
    const uint32_t thread = threadIdx.x - 32 * kStreamers;
    uint32_t before = 0;
    for_rows_of_a(shared, pairs.chunk * args.k, blockIdx.x, linear.blocks, before, [&](uint32_t p, uint32_t i) {
        const T* a = reinterpret_cast<const T*>(shared.terms[p].a) + i * static_cast<uint64_t>(shared.terms[p].a_stride);
        for (uint32_t col = thread * kLine; col < args.in; col += kAddThreads * kLine) prefetch(a + col);
    });
    for_outputs(linear, thread, kAddThreads, [&](uint32_t, uint32_t token, uint32_t g, uint32_t row) {
        const uint32_t pair = token * args.count + g;
        for (uint32_t e = 0; pair < pairs.chunk && e < args.k; ++e) {
            const Term& term = shared.terms[pair * args.k + e];
            const T* b = reinterpret_cast<const T*>(term.b) + row * static_cast<uint64_t>(term.b_stride);
            for (uint32_t j = 0; j < term.rank; j += kLine) prefetch(b + j);
        }
    });
}

// The adders.
template <class T> __device__ __forceinline__ void add(const LswLinearArgs& linear, Shared& shared) {
    const LswApplyArgs& args = linear.apply;
    const uint32_t thread = threadIdx.x - 32 * kStreamers, outputs = outputs_of(linear);
    const Pairs pairs(args);
    float* added = shared.added(outputs);
    for (uint32_t i = thread; i < outputs; i += kAddThreads) added[i] = 0.0f;
    if (args.k == 0 || args.width == 0) return dependency_wait();

    if (!linear.only_x_is_new) dependency_wait();
    find_routes(args, shared);
    find_terms(args, shared, 0, pairs.chunk);
    if (linear.only_x_is_new) prefetch_adapters<T>(linear, shared, pairs);
    dependency_wait();
    uint32_t parity = 0;
    const uint32_t rows = multiply_a<T>(linear, shared, pairs, blockIdx.x, parity);
    if (rows == 0) return;  // nobody waits for anything
    if (!wait_for_products(linear, shared, min(rows, linear.blocks))) {
        for (uint32_t block = 0; block < linear.blocks; ++block) multiply_a<T>(linear, shared, pairs, block, parity);
        sync_some<kAddBarrier, kAddThreads>();
    }
    for (uint32_t first = 0; first < pairs.all; first += pairs.chunk) {
        const uint32_t count = min(pairs.chunk, pairs.all - first);
        if (pairs.chunk < pairs.all) find_terms(args, shared, first, count);
        for_outputs(linear, thread, kAddThreads, [&](uint32_t i, uint32_t token, uint32_t g, uint32_t row) {
            const uint32_t pair = token * args.count + g;
            if (pair < first || pair >= first + count) return;
            float sum = 0.0f;
            for (uint32_t e = 0; e < args.k; ++e) {
                const Term& term = shared.terms[(pair - first) * args.k + e];
                if (term.rank > 0) sum = fmaf(term.c, times_b<T>(term, row, products(args, token, e) + args.targets[g].column), sum);
            }
            added[i] = sum;
        });
    }
    sync_some<kAddBarrier, kAddThreads>();
    LswLinearHandOver* hand_over = reinterpret_cast<LswLinearHandOver*>(linear.hand_over);
    if (thread == 0 && count_acq_rel(&hand_over->done, gridDim.x - 1) == gridDim.x - 1) hand_over->ready = 0;
}

template <uint32_t kTokens, class T> __device__ __forceinline__ void linear(const LswLinearArgs& args) {
    extern __shared__ __align__(128) unsigned char memory[];
    Rings<kTokens>& rings = *reinterpret_cast<Rings<kTokens>*>(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory + sizeof(rings));
    if (threadIdx.x >= 32 * kStreamers) add<T>(args, shared);
    else if (args.whole) stream<true, kTokens, T>(args, shared, rings);
    else stream<false, kTokens, T>(args, shared, rings);
    __syncthreads();
    const uint32_t outputs = outputs_of(args);
    for_outputs(args, threadIdx.x, LSW_LINEAR_THREADS, [&](uint32_t i, uint32_t token, uint32_t g, uint32_t row) {
        float sum = 0.0f;
        for (uint32_t warp = 0; warp < kStreamers; ++warp) sum += shared.product(outputs, warp)[i];
        const LswApplyTarget& target = args.apply.targets[g];
        store_y(args, target, token * target.y_stride + row, sum + shared.added(outputs)[i]);
    });
}

// Where fewer fit for want of shared memory, it is not launched.
#if __CUDA_ARCH__ >= 900
constexpr int kOneBlocks = LSW_LINEAR_BLOCKS;
#else
constexpr int kOneBlocks = 1;
#endif

}  // namespace

#define LSW_LINEAR(suffix, T)                                                                                \
    extern "C" __global__ void __launch_bounds__(LSW_LINEAR_THREADS, sizeof(T) == 4 ? 1 : LSW_LINEAR_BLOCKS) \
        lsw_linear_##suffix(const __grid_constant__ LswLinearArgs args) {                                    \
        if (args.apply.rows > 0) linear<LSW_LINEAR_TOKENS, T>(args);                                         \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_LINEAR_THREADS, kOneBlocks)                             \
        lsw_linear_one_##suffix(const __grid_constant__ LswLinearArgs args) {                                \
        if (args.apply.rows > 0) linear<1, T>(args);                                                         \
    }
LSW_LINEAR(f32, float)
LSW_LINEAR(f16, __half)
LSW_LINEAR(bf16, __nv_bfloat16)
