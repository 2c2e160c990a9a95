#include "common/apply.cuh"
#include "common/ptx.cuh"
#include "common/route.cuh"

namespace {

constexpr uint32_t kStreamers = LSW_LINEAR_STREAMERS, kAdders = LSW_LINEAR_ADDERS, kTile = LSW_LINEAR_TILE;
constexpr uint32_t kPacksOfLine = LSW_LINEAR_LINE / 16;
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
template <int kTokens> struct Place {
    uint4 packs[kTile + kTokens][kPacksOfLine];
    __device__ __forceinline__ uint4& at(uint32_t row, uint32_t pack) { return packs[row][pack ^ (row % 2 * 4)]; }
};

template <int kTokens> struct Shared {
    static constexpr uint32_t kDepth = kTokens == 1 ? LSW_LINEAR_DEPTH_ONE : LSW_LINEAR_DEPTH;
    Place<kTokens> ring[kStreamers][kDepth];
    Term terms[LSW_LINEAR_TERMS];
    Chosen routes[kTokens][LSW_MAX_K];
    float dots[2][kAdders];
    // Behind it, for each [token][round][row] of a block: W x over the lines of each streamer, and what adapters add.
    __device__ __forceinline__ float* product(uint32_t outputs, uint32_t streamer) {
        return reinterpret_cast<float*>(this + 1) + streamer * outputs;
    }
    __device__ __forceinline__ float* added(uint32_t outputs) { return product(outputs, kStreamers); }
};
static_assert(sizeof(Shared<1>) == LSW_LINEAR_SHARED_ONE && sizeof(Shared<LSW_LINEAR_TOKENS>) == LSW_LINEAR_SHARED_FEW,
              "the host asks for this");
static_assert(LSW_LINEAR_OUTPUT == 4 * (kStreamers + 1), "the host asks for product and added");

__device__ __forceinline__ uint32_t tile_begin(const LswLinearArgs& args, uint32_t tile) {
    return args.first_row + tile * args.tile_rows + min(tile, args.longer);
}

// A row of all targets together: its target, and which of that target's it becomes.
__device__ __forceinline__ uint32_t target_of_row(const LswLinearArgs& args, uint32_t& row) {
    uint32_t g = 0;
    for (; row >= args.apply.targets[g].out; ++g) row -= args.apply.targets[g].out;
    return g;
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
template <bool kWhole, int kTokens, class T> struct Lines {
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
        if (kWhole) copy16_async_or_zeros(&place.at(row, pack), p + col, left > 0);
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
    // Into L2, further lines of the tile's rows.
    __device__ __forceinline__ void prefetch_weights(uint32_t lines) const {
        if constexpr (kWhole) {
            for (uint32_t l = line; lines > 0 && l >= line && l < count; l += kStreamers, --lines) {
#pragma unroll
                for (uint32_t i = 0; i < kTile / kLaneRows; ++i) {
                    if (threadIdx.x % kPacksOfLine == i && rows[i] != nullptr) prefetch(rows[i] + l * kCols);
                }
            }
        }
    }
};

// A warp's sums of a tile's rows over its lines, for all tokens.
//
// 16 bits, on tensor cores: 16 rows are a product's first operand, x of eight tokens its second. Which column of a line counts as which
// of the product does not matter, if both operands say the same: so a lane's packs are its fragments as they lie in memory. Of tokens
// that there are not, any values serve: a token is a column of its own.
template <int kTokens, class T> struct Sums {
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
template <int kTokens> struct Sums<kTokens, float> {
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

template <bool kWhole, int kTokens, class T> __device__ __forceinline__ void stream(const LswLinearArgs& args, Shared<kTokens>& shared) {
    constexpr uint32_t kDepth = Shared<kTokens>::kDepth;
    const uint32_t warp = threadIdx.x / 32;
    Place<kTokens>* ring = shared.ring[warp];
    float* product = shared.product(args.apply.rows * args.rounds * kTile, warp);
    if (!args.only_x_is_new) dependency_wait();
    Lines<kWhole, kTokens, T> ahead(args, warp);
    const uint32_t lines = ahead.left / args.rounds, early = min(kDepth - 1, ahead.left);
#pragma unroll 1
    for (uint32_t i = 0; i < early; ++i) ahead.load_weights(ring[i]);
    ahead.prefetch_weights(args.ahead);
    dependency_wait();
    dependency_release();
#pragma unroll 1
    for (uint32_t i = 0; i + 1 < kDepth; ++i) {
        if (i < early) ahead.load_x(ring[i]);
        copy_commit();
    }
    Sums<kTokens, T> sums;
    uint32_t place = 0;
#pragma unroll 1
    for (uint32_t round = 0; round < args.rounds; ++round) {
#pragma unroll 1
        for (uint32_t i = 0; i < lines; ++i) {
            copy_wait<kDepth - 2>();
            __syncwarp();
            if (ahead.left > 0) {
                Place<kTokens>& free = ring[place == 0 ? kDepth - 1 : place - 1];
                ahead.load_weights(free), ahead.load_x(free);
            }
            copy_commit();
            sums.add(args, ring[place]);
            place = place + 1 < kDepth ? place + 1 : 0;
        }
        sums.take([&](uint32_t row, uint32_t token, float sum) {
            if (token < args.apply.rows) product[(token * args.rounds + round) * kTile + row] = sum;
        });
    }
}

// The tokens' routes, one warp each. In canonical form; an entry's place is its position.
template <int kTokens> __device__ __forceinline__ void find_routes(const LswApplyArgs& args, Shared<kTokens>& shared) {
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
    sync_some<kAddBarrier, 32 * kAdders>();
}

// The terms of some of the pairs (token, target), k each.
template <int kTokens>
__device__ __forceinline__ void find_terms(const LswApplyArgs& args, Shared<kTokens>& shared, uint32_t first, uint32_t count) {
    for (uint32_t i = threadIdx.x - 32 * kStreamers; i < count * args.k; i += 32 * kAdders) {
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
    sync_some<kAddBarrier, 32 * kAdders>();
}

// Rows of A that are this block's: f(term, row), of all rows of all terms each gridDim.x-th. `phase`: rows before, modulo the blocks.
template <int kTokens, class F>
__device__ __forceinline__ void for_rows_of_a(const Shared<kTokens>& shared, uint32_t terms, uint32_t& phase, uint32_t& rows, F f) {
    for (uint32_t p = 0; p < terms; ++p) {
        const uint32_t rank = shared.terms[p].rank;
        uint32_t i = blockIdx.x >= phase ? blockIdx.x - phase : blockIdx.x + gridDim.x - phase;
        for (; i < rank; i += gridDim.x) f(p, i);
        phase = (phase + rank) % gridDim.x;
        rows += rank;
    }
}

template <bool kWhole, class T> __device__ __forceinline__ float dot_part(const T* x, const T* a, uint32_t in) {
    constexpr uint32_t kThreads = 32 * kAdders, kStep = 8 * kThreads;
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

template <int kTokens, class T> __device__ __forceinline__ void add(const LswLinearArgs& linear, Shared<kTokens>& shared) {
    const LswApplyArgs& args = linear.apply;
    constexpr uint32_t kThreads = 32 * kAdders;
    const uint32_t thread = threadIdx.x - 32 * kStreamers;
    const uint32_t pairs = args.rows * args.count, slots = linear.rounds * kTile, outputs = args.rows * slots;
    const uint32_t chunk = min(LSW_LINEAR_TERMS / max(args.k, 1u), pairs);
    LswLinearHandOver* hand_over = reinterpret_cast<LswLinearHandOver*>(linear.hand_over);
    float* added = shared.added(outputs);
    auto row_of = [&](uint32_t slot) {
        const uint32_t tile = slot / kTile * gridDim.x + blockIdx.x, row = tile_begin(linear, tile) + slot % kTile;
        return row < tile_begin(linear, tile + 1) ? row : ~0u;
    };
    for (uint32_t i = thread; i < outputs; i += kThreads) added[i] = 0.0f;
    if (args.k == 0 || args.width == 0) return dependency_wait();

    if (!linear.only_x_is_new) dependency_wait();
    find_routes(args, shared);
    find_terms(args, shared, 0, chunk);
    if (linear.only_x_is_new) {
        uint32_t phase = 0, rows = 0;
        for_rows_of_a(shared, chunk * args.k, phase, rows, [&](uint32_t p, uint32_t i) {
            const T* a = reinterpret_cast<const T*>(shared.terms[p].a) + i * static_cast<uint64_t>(shared.terms[p].a_stride);
            for (uint32_t col = thread * (128 / sizeof(T)); col < args.in; col += kThreads * (128 / sizeof(T))) prefetch(a + col);
        });
        for (uint32_t i = thread; i < outputs; i += kThreads) {
            uint32_t row = row_of(i % slots);
            if (row == ~0u) continue;
            const uint32_t pair = i / slots * args.count + target_of_row(linear, row);
            if (pair >= chunk) continue;
            for (uint32_t e = 0; e < args.k; ++e) {
                const Term& term = shared.terms[pair * args.k + e];
                const T* b = reinterpret_cast<const T*>(term.b) + row * static_cast<uint64_t>(term.b_stride);
                for (uint32_t j = 0; j < term.rank; j += 128 / sizeof(T)) prefetch(b + j);
            }
        }
    }
    dependency_wait();

    uint32_t phase = 0, rows = 0, parity = 0;
    bool has_written = false;
    for (uint32_t first = 0; first < pairs; first += chunk) {
        const uint32_t count = min(chunk, pairs - first);
        if (first > 0) {
            sync_some<kAddBarrier, kThreads>();
            find_terms(args, shared, first, count);
        }
        for_rows_of_a(shared, count * args.k, phase, rows, [&](uint32_t p, uint32_t i) {
            const Term& term = shared.terms[p];
            const uint32_t pair = first + p / args.k, token = pair / args.count;
            const T* x = reinterpret_cast<const T*>(args.x) + token * args.x_stride;
            const T* a = reinterpret_cast<const T*>(term.a) + i * static_cast<uint64_t>(term.a_stride);
            const bool whole = args.x_aligned && (term.flags & LSW_A_ALIGNED) && args.in % 8 == 0;
            float sum = whole ? dot_part<true>(x, a, args.in) : dot_part<false>(x, a, args.in);
            for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
            if (thread % 32 == 0) shared.dots[parity][thread / 32] = sum;
            sync_some<kAddBarrier, kThreads>();
            if (thread == 0) {
                float total = 0.0f;
                for (uint32_t w = 0; w < kAdders; ++w) total += shared.dots[parity][w];
                products(args, token, p % args.k)[args.targets[pair % args.count].column + i] = total;
            }
            parity ^= 1, has_written = true;
        });
    }
    if (rows == 0) return;  // nobody waits for anything
    if (thread == 0) {
        if (has_written) count_acq_rel(&hand_over->ready, ~0u);
        while (load_acquire(&hand_over->ready) < min(rows, gridDim.x)) {}
    }
    sync_some<kAddBarrier, kThreads>();

    for (uint32_t first = 0; first < pairs; first += chunk) {
        const uint32_t count = min(chunk, pairs - first);
        if (chunk < pairs) {
            sync_some<kAddBarrier, kThreads>();
            find_terms(args, shared, first, count);
        }
        for (uint32_t i = thread; i < outputs; i += kThreads) {
            uint32_t row = row_of(i % slots);
            if (row == ~0u) continue;
            const uint32_t token = i / slots, g = target_of_row(linear, row), pair = token * args.count + g;
            if (pair < first || pair >= first + count) continue;
            float sum = 0.0f;
            for (uint32_t e = 0; e < args.k; ++e) {
                const Term& term = shared.terms[(pair - first) * args.k + e];
                if (term.rank > 0) sum = fmaf(term.c, times_b<T>(term, row, products(args, token, e) + args.targets[g].column), sum);
            }
            added[i] = sum;
        }
    }
    sync_some<kAddBarrier, kThreads>();
    if (thread == 0 && count_acq_rel(&hand_over->done, gridDim.x - 1) == gridDim.x - 1) hand_over->ready = 0;
}

template <int kTokens, class T> __device__ __forceinline__ void linear(const LswLinearArgs& args) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared<kTokens>& shared = *reinterpret_cast<Shared<kTokens>*>(memory);
    if (threadIdx.x >= 32 * kStreamers) add<kTokens, T>(args, shared);
    else if (args.whole) stream<true, kTokens, T>(args, shared);
    else stream<false, kTokens, T>(args, shared);
    __syncthreads();
    const uint32_t slots = args.rounds * kTile, outputs = args.apply.rows * slots;
    for (uint32_t i = threadIdx.x; i < outputs; i += LSW_LINEAR_THREADS) {
        const uint32_t tile = i % slots / kTile * gridDim.x + blockIdx.x;
        uint32_t row = tile_begin(args, tile) + i % kTile;
        if (row >= tile_begin(args, tile + 1)) continue;
        const LswApplyTarget& target = args.apply.targets[target_of_row(args, row)];
        float sum = 0.0f;
        for (uint32_t warp = 0; warp < kStreamers; ++warp) sum += shared.product(outputs, warp)[i];
        store_y(args, target, i / slots * target.y_stride + row, sum + shared.added(outputs)[i]);
    }
}

}  // namespace

#define LSW_LINEAR(name, tokens, T)                                                                     \
    extern "C" __global__ void __launch_bounds__(LSW_LINEAR_THREADS, sizeof(T) == 4 ? 1 : LSW_LINEAR_BLOCKS) \
        lsw_linear_##name(const __grid_constant__ LswLinearArgs args) {                                 \
        if (args.apply.rows > 0) linear<tokens, T>(args);                                               \
    }
LSW_LINEAR(one_f32, 1, float)
LSW_LINEAR(one_f16, 1, __half)
LSW_LINEAR(one_bf16, 1, __nv_bfloat16)
LSW_LINEAR(few_f32, LSW_LINEAR_TOKENS, float)
LSW_LINEAR(few_f16, LSW_LINEAR_TOKENS, __half)
LSW_LINEAR(few_bf16, LSW_LINEAR_TOKENS, __nv_bfloat16)
