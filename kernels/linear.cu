#include "common/apply.cuh"
#include "common/ptx.cuh"
#include "common/route.cuh"

namespace {

constexpr uint32_t kStreamers = LSW_LINEAR_STREAMERS, kAdders = LSW_LINEAR_ADDERS, kTile = LSW_LINEAR_TILE, kTokens = LSW_LINEAR_TOKENS;
constexpr uint32_t kPacksOfLine = LSW_LINEAR_LINE / 16, kDepth = LSW_LINEAR_DEPTH;
constexpr int kStreamBarrier = 1, kAddBarrier = 2;

// An adapter of a token at a target. Rank 0: it adds nothing.
struct Term {
    uint64_t a, b;
    uint32_t a_stride, b_stride, rank;
    float c;
    uint32_t flags, padding;
};

struct Shared {
    uint4 ring[kStreamers][kDepth][kTile][kPacksOfLine];
    float partial[2][kStreamers][kTile][kTokens];
    float product[LSW_LINEAR_OUTPUTS];  // W x of [token][round][row]
    float added[LSW_LINEAR_OUTPUTS];    // and what adapters add
    Term terms[LSW_LINEAR_TERMS];
    float dots[2][kAdders];
};
static_assert(sizeof(Shared) <= LSW_LINEAR_SHARED, "the host asks for LSW_LINEAR_SHARED");

__device__ __forceinline__ uint32_t tile_begin(const LswLinearArgs& args, uint32_t tile) {
    return tile * args.tile_rows + min(tile, args.longer);
}

// A row of all targets together: its target, and which of that target's it becomes.
__device__ __forceinline__ uint32_t target_of_row(const LswLinearArgs& args, uint32_t& row) {
    uint32_t g = 0;
    for (; row >= args.apply.targets[g].out; ++g) row -= args.apply.targets[g].out;
    return g;
}

// Where in a row of the ring a pack lies: rows of even and odd number apart, so that two of them are read without bank conflicts.
__device__ __forceinline__ uint32_t ring_place(uint32_t row, uint32_t pack) { return pack ^ ((row & 1) * (kPacksOfLine / 2)); }

// The first `left` elements of a pack; zeros for the others.
template <class T> __device__ __forceinline__ Pack<T> gather16(const T* p, uint32_t left) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
        if (i < left) pack.lane[i] = p[i];
    }
    return pack;
}

// What a warp streams: of each tile in turn, the lines warp, warp + kStreamers, ... of all rows. A lane has a pack of every fourth row.
template <class T> struct Lines {
    static constexpr uint32_t kCols = LSW_LINEAR_LINE / sizeof(T), kRows = kTile * kPacksOfLine / 32;
    const LswLinearArgs& args;
    uint32_t first, count, round, line, left;  // left: lines to go, of all tiles
    const T* rows[kRows];                      // null: no such row

    __device__ __forceinline__ Lines(const LswLinearArgs& args, uint32_t warp) : args(args), first(warp), round(0), line(warp) {
        count = (args.apply.in + kCols - 1) / kCols;
        left = first < count ? args.rounds * ((count - first + kStreamers - 1) / kStreamers) : 0;
        locate();
    }
    __device__ __forceinline__ uint32_t lane_row(uint32_t i) const { return threadIdx.x % 32 / kPacksOfLine + i * (32 / kPacksOfLine); }

    __device__ __forceinline__ void locate() {
        const uint32_t tile = round * gridDim.x + blockIdx.x;
        const uint32_t begin = tile_begin(args, tile), end = tile_begin(args, tile + 1);
#pragma unroll
        for (uint32_t i = 0; i < kRows; ++i) {
            uint32_t row = begin + lane_row(i);
            rows[i] = nullptr;
            if (round < args.rounds && row < end) {
                const uint32_t g = target_of_row(args, row);
                rows[i] = reinterpret_cast<const T*>(args.weights[g]) + row * args.weight_strides[g];
            }
        }
    }
    __device__ __forceinline__ void next() {
        --left;
        line += kStreamers;
        if (line >= count) line = first, ++round, locate();
    }
    // Into a place of the ring. Zeros behind the rows' end.
    __device__ __forceinline__ void load(uint4 (&place)[kTile][kPacksOfLine]) const {
        const uint32_t pack = threadIdx.x % kPacksOfLine, col = line * kCols + pack * kPack<T>;
#pragma unroll
        for (uint32_t i = 0; i < kRows; ++i) {
            uint4* shared = &place[lane_row(i)][ring_place(lane_row(i), pack)];
            if (rows[i] == nullptr) continue;
            if (args.whole && col < args.apply.in) {
                copy16_async(shared, rows[i] + col);
            } else {
                *shared = gather16(rows[i] + col, col < args.apply.in ? args.apply.in - col : 0).bits;
            }
        }
    }
    __device__ __forceinline__ void prefetch_line() const {
#pragma unroll
        for (uint32_t i = 0; i < kRows; ++i) {
            if (threadIdx.x % kPacksOfLine == i && rows[i] != nullptr) prefetch(rows[i] + line * kCols);
        }
    }
};

// A warp's sums of a tile's rows over its lines, for all tokens. x of the next line is fetched while this one is multiplied.
//
// 16 bits, on tensor cores: the rows are a product's first operand, x of eight tokens its second. Which column of a line counts as which
// of the product does not matter, if both operands say the same: so a lane's packs are its fragments as they lie in memory.
template <class T> struct Sums {
    float d[4] = {};
    Pack<T> now[2], next[2];  // of token lane / 4: the packs lane % 4 and 4 + lane % 4

    __device__ __forceinline__ void fetch(const LswLinearArgs& args, uint32_t line) {
        const uint32_t token = threadIdx.x % 32 / 4;
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
            const uint32_t col = line * Lines<T>::kCols + (h * 4 + threadIdx.x % 4) * kPack<T>;
            const T* x = reinterpret_cast<const T*>(args.apply.x) + token * args.apply.x_stride + col;
            const uint32_t left = token < args.apply.rows && col < args.apply.in ? args.apply.in - col : 0;
            now[h] = next[h], next[h] = Pack<T>();
            if (args.whole && left > 0) next[h] = load16(x);
            else if (left > 0) next[h] = gather16(x, left);
        }
    }
    __device__ __forceinline__ void add(const LswLinearArgs&, uint32_t, const uint4 (&place)[kTile][kPacksOfLine]) {
        const uint32_t row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
            const uint4 top = place[row][ring_place(row, h * 4 + part)], low = place[row + 8][ring_place(row, h * 4 + part)];
            const uint32_t first[4] = {top.x, low.x, top.y, low.y}, second[4] = {top.z, low.z, top.w, low.w};
            mma16816(d, first, now[h].bits.x, now[h].bits.y, T{});
            mma16816(d, second, now[h].bits.z, now[h].bits.w, T{});
        }
    }
    __device__ __forceinline__ void store(float (&partial)[kTile][kTokens]) {
        const uint32_t row = threadIdx.x % 32 / 4, token = threadIdx.x % 4 * 2;
        partial[row][token] = d[0], partial[row][token + 1] = d[1];
        partial[row + 8][token] = d[2], partial[row + 8][token + 1] = d[3];
#pragma unroll
        for (int i = 0; i < 4; ++i) d[i] = 0.0f;
    }
};

// 32 bits, which tensor cores would round: a lane has the same rows and packs, and multiplies them itself.
template <> struct Sums<float> {
    float d[2][kTokens] = {};

    __device__ __forceinline__ void fetch(const LswLinearArgs&, uint32_t) {}
    __device__ __forceinline__ void add(const LswLinearArgs& args, uint32_t line, const uint4 (&place)[kTile][kPacksOfLine]) {
        const uint32_t row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
            Pack<float> w[2];
            w[0].bits = place[row][ring_place(row, h * 4 + part)], w[1].bits = place[row + 8][ring_place(row, h * 4 + part)];
            const uint32_t col = line * Lines<float>::kCols + (h * 4 + part) * kPack<float>;
            const uint32_t left = col < args.apply.in ? args.apply.in - col : 0;
#pragma unroll
            for (uint32_t token = 0; token < kTokens; ++token) {
                if (token >= args.apply.rows || left == 0) break;
                const float* p = reinterpret_cast<const float*>(args.apply.x) + token * args.apply.x_stride + col;
                const Pack<float> x = args.whole ? load16(p) : gather16(p, left);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    d[0][token] = fmaf(w[0].lane[i], x.lane[i], d[0][token]);
                    d[1][token] = fmaf(w[1].lane[i], x.lane[i], d[1][token]);
                }
            }
        }
    }
    __device__ __forceinline__ void store(float (&partial)[kTile][kTokens]) {
        const uint32_t row = threadIdx.x % 32 / 4;
#pragma unroll
        for (uint32_t i = 0; i < 2 * kTokens; ++i) {
            float& sum = d[i / kTokens][i % kTokens];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            if (threadIdx.x % 4 == 0) partial[row + i / kTokens * 8][i % kTokens] = sum;
            sum = 0.0f;
        }
    }
};

template <class T> __device__ __forceinline__ void stream(const LswLinearArgs& args, Shared& shared) {
    const uint32_t warp = threadIdx.x / 32;
    auto& ring = shared.ring[warp];
    Lines<T> ahead(args, warp);
    const uint32_t mine = args.rounds > 0 ? ahead.left / args.rounds : 0;
    auto fill = [&](uint32_t place) {
        if (ahead.left == 0) return;
        ahead.load(ring[place]), ahead.next();
        if (args.late && ahead.left == 0) dependency_release();
    };
    if (args.only_x_is_new) {
        for (uint32_t i = 0; i + 1 < kDepth; ++i) fill(i), copy_commit();
    }
    {
        Lines<T> far = ahead;
        for (uint32_t i = 0; i < args.ahead && far.left > 0; ++i) far.prefetch_line(), far.next();
    }
    dependency_wait();
    if (!args.late) dependency_release();
    if (!args.only_x_is_new) {
        for (uint32_t i = 0; i + 1 < kDepth; ++i) fill(i), copy_commit();
    }
    Sums<T> sums;
    uint32_t place = 0, line = warp;
    sums.fetch(args, line);
    const uint32_t lines = ahead.count;
    for (uint32_t round = 0; round < args.rounds; ++round) {
        for (uint32_t i = 0; i < mine; ++i) {
            copy_wait<kDepth - 2>();
            __syncwarp();
            fill(place == 0 ? kDepth - 1 : place - 1);
            copy_commit();
            const uint32_t next = line + kStreamers < lines ? line + kStreamers : warp;
            sums.fetch(args, next);
            sums.add(args, line, ring[place]);
            line = next;
            place = place + 1 < kDepth ? place + 1 : 0;
        }
        sums.store(shared.partial[round % 2][warp]);
        sync_some<kStreamBarrier, 32 * kStreamers>();
        if (threadIdx.x < kTile * kTokens) {
            const uint32_t row = threadIdx.x / kTokens, token = threadIdx.x % kTokens;
            float sum = 0.0f;
            for (uint32_t w = 0; w < kStreamers; ++w) sum += shared.partial[round % 2][w][row][token];
            if (token < args.apply.rows) shared.product[(token * args.rounds + round) * kTile + row] = sum;
        }
    }
}

// The terms of some of the pairs (token, target), k each.
__device__ __forceinline__ void find_terms(const LswLinearArgs& linear, Shared& shared, uint32_t first, uint32_t count) {
    const LswApplyArgs& args = linear.apply;
    const uint32_t warp = threadIdx.x / 32 - kStreamers, lane = threadIdx.x % 32;
    for (uint32_t i = warp; i < count; i += kAdders) {
        const uint32_t token = (first + i) / args.count;
        const LswApplyTarget& target = args.targets[(first + i) % args.count];
        Term* terms = &shared.terms[i * args.k];
        if (lane < args.k) terms[lane] = Term{};
        __syncwarp();
        const int64_t item = item_of(args, token);
        if (item < 0) continue;
        const int given = id_at(args, item, lane);
        const float gate = gate_at(args, item, lane);
        if (blockIdx.x == 0 && &target == args.targets) report_id(args, given);
        const RouteEntry entry = canonical_entry(known_id(given, args.slots), gate, args.k);
        if (entry.slot < 0) continue;
        const LswFactor f = factor_of(target, entry.slot);
        const float c = entry.gate * f.scale;
        if (blockIdx.x == 0) report_coefficient(args, f.rank, c);
        if (c != 0.0f && f.rank > 0) terms[entry.position] = {f.a, f.b, f.a_stride, f.b_stride, f.rank, c, f.flags, 0};
    }
}

// Rows of A that are this block's: f(term, row), of all rows of all terms each gridDim.x-th. `phase`: rows before, modulo the blocks.
template <class F> __device__ __forceinline__ void for_rows_of_a(const Shared& shared, uint32_t terms, uint32_t& phase, uint32_t& rows, F f) {
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

template <class T> __device__ __forceinline__ void add(const LswLinearArgs& linear, Shared& shared) {
    const LswApplyArgs& args = linear.apply;
    constexpr uint32_t kThreads = 32 * kAdders;
    const uint32_t thread = threadIdx.x - 32 * kStreamers;
    const uint32_t pairs = args.rows * args.count, slots = linear.rounds * kTile;
    const uint32_t chunk = args.k > 0 ? min(LSW_LINEAR_TERMS / args.k, pairs) : pairs;
    LswLinearHandOver* hand_over = reinterpret_cast<LswLinearHandOver*>(linear.hand_over);
    auto row_of = [&](uint32_t slot) {
        const uint32_t tile = slot / kTile * gridDim.x + blockIdx.x, row = tile_begin(linear, tile) + slot % kTile;
        return row < tile_begin(linear, tile + 1) ? row : ~0u;
    };
    for (uint32_t i = thread; i < args.rows * slots; i += kThreads) shared.added[i] = 0.0f;
    if (args.k == 0 || args.width == 0) return dependency_wait();

    if (linear.only_x_is_new) {
        find_terms(linear, shared, 0, chunk);
        sync_some<kAddBarrier, kThreads>();
        uint32_t phase = 0, rows = 0;
        for_rows_of_a(shared, chunk * args.k, phase, rows, [&](uint32_t p, uint32_t i) {
            const T* a = reinterpret_cast<const T*>(shared.terms[p].a) + i * static_cast<uint64_t>(shared.terms[p].a_stride);
            for (uint32_t col = thread * (128 / sizeof(T)); col < args.in; col += kThreads * (128 / sizeof(T))) prefetch(a + col);
        });
        for (uint32_t i = thread; i < args.rows * slots; i += kThreads) {
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
        if (first > 0 || !linear.only_x_is_new) {
            sync_some<kAddBarrier, kThreads>();
            find_terms(linear, shared, first, count);
            sync_some<kAddBarrier, kThreads>();
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
            find_terms(linear, shared, first, count);
            sync_some<kAddBarrier, kThreads>();
        }
        for (uint32_t i = thread; i < args.rows * slots; i += kThreads) {
            uint32_t row = row_of(i % slots);
            if (row == ~0u) continue;
            const uint32_t token = i / slots, g = target_of_row(linear, row), pair = token * args.count + g;
            if (pair < first || pair >= first + count) continue;
            float sum = 0.0f;
            for (uint32_t e = 0; e < args.k; ++e) {
                const Term& term = shared.terms[(pair - first) * args.k + e];
                if (term.rank > 0) sum = fmaf(term.c, times_b<T>(term, row, products(args, token, e) + args.targets[g].column), sum);
            }
            shared.added[i] = sum;
        }
    }
    sync_some<kAddBarrier, kThreads>();
    if (thread == 0 && count_acq_rel(&hand_over->done, gridDim.x - 1) == gridDim.x - 1) hand_over->ready = 0;
}

template <class T> __device__ __forceinline__ void linear(const LswLinearArgs& args) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x < 32 * kStreamers) stream<T>(args, shared);
    else add<T>(args, shared);
    __syncthreads();
    const uint32_t slots = args.rounds * kTile;
    for (uint32_t i = threadIdx.x; i < args.apply.rows * slots; i += LSW_LINEAR_THREADS) {
        const uint32_t tile = i % slots / kTile * gridDim.x + blockIdx.x;
        uint32_t row = tile_begin(args, tile) + i % kTile;
        if (row >= tile_begin(args, tile + 1)) continue;
        const LswApplyTarget& target = args.apply.targets[target_of_row(args, row)];
        store_y(args, target, i / slots * target.y_stride + row, shared.product[i] + shared.added[i]);
    }
}

}  // namespace

#define LSW_LINEAR(suffix, T, blocks)                                                                                      \
    extern "C" __global__ void __launch_bounds__(LSW_LINEAR_THREADS, blocks)                                              \
        lsw_linear_##suffix(const __grid_constant__ LswLinearArgs args) {                                                  \
        if (args.apply.rows > 0) linear<T>(args);                                                                          \
    }
LSW_LINEAR(f32, float, 1)
LSW_LINEAR(f16, __half, 2)
LSW_LINEAR(bf16, __nv_bfloat16, 2)
