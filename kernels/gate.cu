// The gate: hidden states x [T, H] and weight [N, H] -> logits = x weight^T + bias -> ids [T, k], gates [T, k].
//
// Up to 64 tokens it is one launch. H is cut into 8 slices, a block each, a slice into 8 parts, a warp each, and a part into chains of 64
// elements. A block multiplies 16 experts by 8 tokens: N = 256, H = 4096 keep 128 blocks busy for a single token, each with 16 KB of
// weight, all of whose loads are in flight at once. The parts of its warps are added in shared memory. What is left is to bring the
// slices, and the logits of all experts, to one block, which routes, a warp a token (common/choose.cuh). Two ways:
//
//   parts     blocks leave their slice's part in the workspace, and the one that routes adds them up: one hand-over. For one token or two,
//             and where there are no clusters.
//   clusters  the 8 slices are a cluster, whose blocks add up a token, or four, each: st.async brings the parts to their shared memory
//             and counts the bytes on a barrier there. With one tile of experts that is all; else logits are handed over as parts were.
//             Beyond 8 tokens a block multiplies 32 experts by 32 tokens (16-bit types), which reads a quarter of the bytes.
//
// A hand-over through global memory is the word itself: an order-preserving key that is never 0, and 0 where none is yet. So nobody waits
// for a fence, a counter and a load after another; the reader polls and puts the zeros back. Who reads is decided by tickets that blocks
// draw as they begin: the last to draw knows that all others run, and these wait for nothing but their own cluster, which runs as one.
// So it cannot starve them, whatever order blocks start in.
//
// Beyond 64 tokens one kernel writes all logits, and the router's kernel does the rest.
//
// Every logit is the same sum in the same order on each path (chains in the tensor cores, parts, slices), and no column of a product
// depends on another: a token's logits depend neither on its neighbours nor on T.
//
// The product: 16-bit types by mma.sync with the experts as rows, f32 by fma. Operands go straight from global memory to registers. A
// product does not care how H is numbered as long as both operands agree: thread t of a row's four takes the 8 neighbours from 8 t on as
// its part of two steps of 16, so that one 16-byte load serves both, and the four read 64 bytes of a row in one go.
//
// Floor: one read of weight and x. For few tokens the kernel is latency-bound: load, add up, hand over, choose.
#include "args.h"
#include "common/choose.cuh"
#include "common/pack.cuh"
#include "common/ptx_sm90.cuh"

static_assert(LSW_GATE_FUSED <= sizeof(LswRouteWorkspace::tickets) / 4, "a token is added up by one block");
static_assert(LSW_GATE_EXPERTS == 16 && LSW_GATE_TOKENS % 8 == 0, "tiles are results of m16n8k16");

namespace {

constexpr uint32_t kWarps = LSW_GATE_THREADS / 32;
constexpr uint32_t kChain = LSW_GATE_CHAIN;

// Elements of a row from `at` on: a pack that exists as a whole by one load; else what there is of it, and zeros behind the row's end.
template <bool kWhole, class T> __device__ __forceinline__ Pack<T> load_row(const LswGateArgs& args, const T* row, uint64_t at) {
    if constexpr (kWhole) return load16(row + at);
    Pack<T> pack;
    for (int i = 0; i < kPack<T>; ++i) {
        if (at + i < args.hidden) pack.lane[i] = row[at + i];
    }
    return pack;
}

// Behind the last row, the last one once more: what comes of it is not kept, and no other sum depends on it.
template <class T> __device__ __forceinline__ const T* expert_row(const LswGateArgs& args, uint32_t expert) {
    return reinterpret_cast<const T*>(args.weight) + min(expert, args.route.experts - 1) * args.weight_stride;
}
template <class T> __device__ __forceinline__ const T* token_row(const LswGateArgs& args, uint32_t token) {
    return reinterpret_cast<const T*>(args.x) + min(token, args.route.tokens - 1) * args.x_stride;
}

// sums[m][n] += a[m] b[n]^T over the packs of a chain. Two chains of products: for few tokens their latency counts.
template <int kM, int kN, int kSteps, class T>
__device__ __forceinline__ void multiply_packs(const Pack<T> (&a)[kM][kSteps][2], const Pack<T> (&b)[kN][kSteps], float (&sums)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            float half[2][4];
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                const uint4 low = a[m][s][0].bits, high = a[m][s][1].bits, column = b[n][s].bits;
                const uint32_t near[4] = {low.x, high.x, low.y, high.y}, far[4] = {low.z, high.z, low.w, high.w};
                if (s == 0) {
                    mma16816_first(half[0], near, column.x, column.y, T());
                    mma16816_first(half[1], far, column.z, column.w, T());
                } else {
                    mma16816(half[0], near, column.x, column.y, T());
                    mma16816(half[1], far, column.z, column.w, T());
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] += half[0][i] + half[1][i];
        }
    }
}

// A chain's packs of the experts' rows, as the first operand of mma takes them.
constexpr int kStepPacks = 4;  // lanes with a pack each
template <class T> constexpr int kSteps = kChain / (kStepPacks * kPack<T>);
template <int kM, class T> using ExpertPacks = Pack<T>[kM][kSteps<T>][2];

template <bool kWhole, int kM, class T>
__device__ __forceinline__ void load_experts(const LswGateArgs& args, uint32_t first_expert, uint64_t at, ExpertPacks<kM, T>& a) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    at += t * kPack<T>;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
        const T *low = expert_row<T>(args, first_expert + m * 16 + g), *high = expert_row<T>(args, first_expert + m * 16 + g + 8);
#pragma unroll
        for (int s = 0; s < kSteps<T>; ++s) {
            a[m][s][0] = load_row<kWhole>(args, low, at + s * kStepPacks * kPack<T>);
            a[m][s][1] = load_row<kWhole>(args, high, at + s * kStepPacks * kPack<T>);
        }
    }
}

// sums[m][n] += 16 experts by 8 tokens over kChain elements from `at` on, as mma lays them out: thread (g, t) = (lane / 4, lane % 4) holds
// expert g by tokens 2t, 2t + 1, then expert g + 8 by the same.
template <bool kWhole, int kM, int kN, class T>
__device__ __forceinline__ void multiply_rows(const LswGateArgs& args, const ExpertPacks<kM, T>& a, uint32_t first_token, uint64_t at, float (&sums)[kM][kN][4]) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    constexpr int kStep = kStepPacks * kPack<T>, kSteps = ::kSteps<T>;
    at += t * kPack<T>;
    if constexpr (sizeof(T) == 2) {
        Pack<T> b[kN][kSteps];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const T* column = token_row<T>(args, first_token + n * 8 + g);
#pragma unroll
            for (int s = 0; s < kSteps; ++s) b[n][s] = load_row<kWhole>(args, column, at + s * kStep);
        }
        multiply_packs(a, b, sums);
    } else {
        static_assert(kM == 1, "the registers of f32");
#pragma unroll
        for (int c = 0; c < kN * 8; ++c) {
            const T* column = token_row<T>(args, first_token + c);
            float sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                const Pack<T> b = load_row<kWhole>(args, column, at + s * kStep);
#pragma unroll
                for (int i = 0; i < kPack<T>; ++i) {
                    sum[0] = fmaf(a[0][s][0].lane[i], b.lane[i], sum[0]);
                    sum[1] = fmaf(a[0][s][1].lane[i], b.lane[i], sum[1]);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 1);
                sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 2);
                if (c % 8 / 2 == t) sums[0][c / 8][half * 2 + c % 2] += sum[half];
            }
            __syncwarp();  // no column's loads before this: all at once would not fit the registers
        }
    }
}

// Over the chains of warp `warp` in the slice of block `rank`. The first packs of experts are on their way when `wait` is called, those of
// tokens come behind it. Branches once and not at each load, which would then wait for one another. `kAllWhole`: chains are whole, or none.
template <bool kAllWhole, int kM, int kN, class T, class Wait>
__device__ __forceinline__ void multiply(const LswGateArgs& args, uint32_t first_expert, uint32_t first_token, uint32_t rank, uint32_t warp, float (&sums)[kM][kN][4],
                                         const Wait& wait) {
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) sums[i / (kN * 4)][i / 4 % kN][i % 4] = 0.0f;
    uint64_t at = static_cast<uint64_t>(rank * kWarps + warp) * args.chains * kChain;
    ExpertPacks<kM, T> a;
    const auto is_whole = [&] { return (kAllWhole || args.aligned) && at + kChain <= args.hidden; };
    if (is_whole()) load_experts<true, kM, T>(args, first_expert, at, a);
    wait();
#pragma unroll 1
    for (uint32_t c = 0; c < args.chains; ++c, at += kChain) {
        if (is_whole()) {
            if (c > 0) load_experts<true, kM, T>(args, first_expert, at, a);
            multiply_rows<true, kM, kN, T>(args, a, first_token, at, sums);
        } else if (!kAllWhole && at < args.hidden) {
            load_experts<false, kM, T>(args, first_expert, at, a);
            multiply_rows<false, kM, kN, T>(args, a, first_token, at, sums);
        }
    }
}

// The expert and the token of a thread's i-th sum of a tile.
__device__ __forceinline__ uint32_t sum_expert(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ uint32_t sum_token(int i) { return threadIdx.x % 4 * 2 + i % 2; }

template <class T> __device__ __forceinline__ float bias_of(const LswGateArgs& args, uint32_t expert) {
    return args.weight_bias ? to_float(reinterpret_cast<const T*>(args.weight_bias)[expert]) : 0.0f;
}

// A logit, or a part of one, as a word that is never 0: that means "not there yet".
__device__ __forceinline__ uint32_t to_word(float x) { return max(order_key(x), 1u); }

// Takes words that others leave, and puts zeros back. All are asked for before the first is waited for.
template <int kWords> __device__ __forceinline__ void take_words(uint32_t* words, uint64_t stride, uint32_t count, float (&x)[kWords]) {
    uint32_t word[kWords];
    bool is_missing;
    do {
        is_missing = false;
#pragma unroll
        for (uint32_t i = 0; i < kWords; ++i) word[i] = load_relaxed(words + min(i, count - 1) * stride);
#pragma unroll
        for (int i = 0; i < kWords; ++i) is_missing |= word[i] == 0;
    } while (is_missing);
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
        store_relaxed(words + min(i, count - 1) * stride, 0);
        x[i] = key_value(word[i]);
    }
}

// kRows experts by kCols tokens a block. A cluster's block adds up the logits of kOwn of them, a block without a cluster those of all.
template <int kRows, int kCols> struct GateShared {
    static constexpr int kOwn = kCols / LSW_GATE_RANKS, kMost = kCols == LSW_GATE_TOKENS ? kCols : kOwn;
    alignas(16) float products[kWarps][kCols][kRows + 4];  // the padding spares bank conflicts
    alignas(16) float parts[LSW_GATE_RANKS][kOwn][kRows];
    uint64_t barrier;  // counts the bytes of `parts`
    alignas(16) float logits[kMost][LSW_MAX_EXPERTS];
    ChoiceScratch scratch[kWarps];
    uint32_t counts[LSW_MAX_EXPERTS];
    uint32_t ticket;
};

// Few tokens are all that is routed here.
template <Kind kKind> __device__ __forceinline__ void choose_sized(const LswRouteArgs& args, uint32_t token, const float* logits, ChoiceScratch& scratch, uint32_t* counts) {
    if (args.lane_experts <= 1) return choose<kKind, 1>(args, true, token, logits, scratch, counts);
    if (args.lane_experts <= LSW_ROUTE_NARROW) return choose<kKind, LSW_ROUTE_NARROW>(args, true, token, logits, scratch, counts);
    choose<kKind, 32>(args, true, token, logits, scratch, counts);
}
template <bool kIsPlain>
__device__ __forceinline__ void choose_any(const LswRouteArgs& args, uint32_t token, const float* logits, ChoiceScratch& scratch, uint32_t* counts) {
    if constexpr (kIsPlain) return choose_sized<Kind::kPlain>(args, token, logits, scratch, counts);
    if (args.score == LSW_SCORE_SOFTMAX) return choose_sized<Kind::kSoftmax>(args, token, logits, scratch, counts);
    if (args.score == LSW_SCORE_SIGMOID) return choose_sized<Kind::kSigmoid>(args, token, logits, scratch, counts);
    choose_sized<Kind::kSqrtSoftplus>(args, token, logits, scratch, counts);
}

// The logits of `own` tokens, from the words of others: whole logits from clusters, else parts.
template <bool kIsClustered, int kOwn, class T, class Shared>
__device__ __forceinline__ void take_logits(const LswGateArgs& args, bool is_clustered, uint32_t* words, uint32_t own, Shared& shared) {
    const uint64_t token_words = LSW_GATE_RANKS * args.parts_stride;
    for (uint32_t e = threadIdx.x; e < args.route.experts; e += LSW_GATE_THREADS) {
        if (kIsClustered || is_clustered) {
            float x[kOwn];
            take_words(words + e, token_words, own, x);
#pragma unroll
            for (int n = 0; n < kOwn; ++n) shared.logits[n][e] = x[n];
        } else if constexpr (!kIsClustered) {
            for (uint32_t n = 0; n < own; ++n) {
                float x[LSW_GATE_RANKS], sum = 0.0f;
                take_words(words + n * token_words + e, args.parts_stride, LSW_GATE_RANKS, x);
#pragma unroll
                for (int r = 0; r < LSW_GATE_RANKS; ++r) sum += x[r];
                shared.logits[n][e] = sum + bias_of<T>(args, e);
            }
        }
    }
}

template <bool kIsPlain, int kRows, int kCols, class T> __device__ __forceinline__ void gate(const LswGateArgs& args) {
    using Shared = GateShared<kRows, kCols>;
    extern __shared__ uint4 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const LswRouteArgs& route = args.route;
    constexpr bool kIsClustered = kCols > LSW_GATE_TOKENS;
#if __CUDA_ARCH__ < 900
    if (kIsClustered) return;  // never launched
#endif
    dependency_release();
    if (route.tokens == 0) return dependency_wait();
    const bool is_clustered = kIsClustered || args.clustered;
    const uint32_t warp = warp_index(), rank = blockIdx.x % LSW_GATE_RANKS;
    const uint32_t tile = blockIdx.x / LSW_GATE_RANKS % args.tiles, group = blockIdx.x / LSW_GATE_RANKS / args.tiles;
    // What this block adds up and routes, if it is the one that does.
    const uint32_t adder = is_clustered ? group * LSW_GATE_RANKS + rank : group, own_tokens = is_clustered ? Shared::kOwn : kCols;
    const uint32_t first_token = group * kCols, own_first = adder * own_tokens, last = route.tokens;
    const uint32_t own = own_first < last ? min(last - own_first, own_tokens) : 0;
    const uint32_t blocks = is_clustered ? args.tiles : args.tiles * LSW_GATE_RANKS;  // that bring their parts
#if __CUDA_ARCH__ >= 900
    Barrier& barrier = reinterpret_cast<Barrier&>(shared.barrier);
    if (is_clustered) {
        if (threadIdx.x == 0) {
            barrier.init(1);
            fence_barrier_init();
            barrier.arrive_expecting(own * LSW_GATE_RANKS * kRows * sizeof(float));
        }
        cluster_arrive();
    }
#endif
    for (uint32_t e = threadIdx.x; route.flags & LSW_ROUTE_COUNTED && e < route.experts; e += LSW_GATE_THREADS) shared.counts[e] = 0;
    const auto wait = [&] {
        dependency_wait();
        LswRouteWorkspace& workspace = *reinterpret_cast<LswRouteWorkspace*>(route.workspace);
        if (threadIdx.x == LSW_GATE_THREADS - 1 && own > 0 && blocks > 1) shared.ticket = atomicInc(&workspace.tickets[adder], blocks - 1);
    };
    if (!(route.flags & LSW_ROUTE_ONLY_X_IS_NEW)) dependency_wait();
    float sums[kRows / 16][kCols / 8][4];
    multiply<kIsClustered, kRows / 16, kCols / 8, T>(args, tile * kRows, first_token, rank, warp, sums, wait);
#pragma unroll
    for (int i = 0; i < kRows * kCols / 32; ++i) {
        constexpr int kTile = kCols / 2;  // sums of 16 experts
        shared.products[warp][i % kTile / 4 * 8 + sum_token(i % 4)][i / kTile * 16 + sum_expert(i % 4)] = sums[i / kTile][i % kTile / 4][i % 4];
    }
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (is_clustered) cluster_wait();  // their barriers are ready
#endif
    uint32_t* words = reinterpret_cast<uint32_t*>(args.parts);
    for (uint32_t i = threadIdx.x; i < kCols * kRows / 4; i += LSW_GATE_THREADS) {
        const uint32_t n = i / (kRows / 4), e = i % (kRows / 4) * 4;
        if (first_token + n >= route.tokens) break;
        float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (uint32_t w = 0; w < kWarps; ++w) {
            const float4 more = *reinterpret_cast<const float4*>(&shared.products[w][n][e]);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        if (is_clustered) {
#if __CUDA_ARCH__ >= 900
            const uint32_t to = n / Shared::kOwn;
            store16_counted(address_in(to, &shared.parts[rank][n % Shared::kOwn][e]), sum, address_in(to, &barrier));
#endif
        } else {
            uint32_t* word = words + (static_cast<uint64_t>(first_token + n) * LSW_GATE_RANKS + rank) * args.parts_stride + tile * kRows + e;
            const float all[4] = {sum.x, sum.y, sum.z, sum.w};
            for (uint32_t j = 0; j < 4 && tile * kRows + e + j < route.experts; ++j) store_relaxed(word + j, to_word(all[j]));
        }
    }
    if (own == 0) return;
#if __CUDA_ARCH__ >= 900
    if (is_clustered && threadIdx.x < Shared::kOwn * kRows) {
        const uint32_t n = threadIdx.x / kRows, e = threadIdx.x % kRows, expert = tile * kRows + e;
        barrier.wait(0);
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < LSW_GATE_RANKS; ++r) sum += shared.parts[r][n][e];
        if (expert < route.experts && n < own) {
            sum += bias_of<T>(args, expert);
            if (blocks == 1) {
                shared.logits[n][expert] = sum;
            } else {
                store_relaxed(words + static_cast<uint64_t>(own_first + n) * LSW_GATE_RANKS * args.parts_stride + expert, to_word(sum));
            }
        }
    }
#endif
    if (blocks > 1) {
        if (shared.ticket != blocks - 1) return;
        take_logits<kIsClustered, Shared::kOwn, T>(args, is_clustered, words + static_cast<uint64_t>(own_first) * LSW_GATE_RANKS * args.parts_stride, own, shared);
    }
    __syncthreads();
    if (warp < own && !is_padding(route, own_first + warp)) choose_any<kIsPlain>(route, own_first + warp, shared.logits[warp], shared.scratch[warp], shared.counts);
    if (route.flags & LSW_ROUTE_COUNTED) publish_counts(route, shared.counts, (route.tokens + own_tokens - 1) / own_tokens);
}

// Every sum in the order of the kernel above.
template <class T> __device__ __forceinline__ void project(const LswGateArgs& args) {
    constexpr uint32_t kTokens = sizeof(T) == 2 ? LSW_GATE_PROJECT_TOKENS : LSW_GATE_PROJECT_TOKENS_32BIT;
    constexpr int kTiles = kTokens / 8;
    dependency_release();
    dependency_wait();
    if (args.route.tokens == 0) return;  // nor are there tiles to divide by
    const uint64_t job = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    const uint32_t first_expert = static_cast<uint32_t>(job % args.tiles) * LSW_GATE_EXPERTS;
    const uint32_t first_token = static_cast<uint32_t>(job / args.tiles) * kTokens;
    if (first_token >= args.route.tokens) return;
    float total[kTiles][4] = {};
    for (uint32_t rank = 0; rank < LSW_GATE_RANKS; ++rank) {
        float sum[kTiles][4] = {};
        for (uint32_t w = 0; w < kWarps; ++w) {
            float part[1][kTiles][4];
            multiply<false, 1, kTiles, T>(args, first_expert, first_token, rank, w, part, [] {});
#pragma unroll
            for (int i = 0; i < kTiles * 4; ++i) sum[i / 4][i % 4] += part[0][i / 4][i % 4];
        }
#pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) total[i / 4][i % 4] += sum[i / 4][i % 4];
    }
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) {
        const uint32_t expert = first_expert + sum_expert(i % 4);
        const uint32_t token = first_token + i / 4 * 8 + sum_token(i % 4);
        if (expert >= args.route.experts || token >= args.route.tokens) continue;
        reinterpret_cast<float*>(args.parts)[token * args.parts_stride + expert] = total[i / 4][i % 4] + bias_of<T>(args, expert);
    }
}

// The same for aligned operands of 16 bits: 64 experts by 128 tokens a block, 32 by 32 a warp. Stages of kChain elements pass through
// shared memory, kStages - 1 of them on their way. A thread reads packs of a row as `multiply_rows` does; eight lanes read two rows, whose
// packs the swizzle puts in different banks.
template <class T> struct ProjectShared {
    Pack<T> experts[LSW_GATE_STAGES][LSW_GATE_TILE_EXPERTS][kChain / kPack<T>], tokens[LSW_GATE_STAGES][LSW_GATE_TILE_TOKENS][kChain / kPack<T>];
};
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t pack) { return pack ^ (row % 2 * 4); }

// What a thread copies of each stage: a pack of each of these rows.
template <class T> struct ProjectCopies {
    static constexpr uint32_t kPacks = kChain / kPack<T>, kRows = LSW_GATE_THREADS / kPacks;
    static constexpr uint32_t kExperts = LSW_GATE_TILE_EXPERTS / kRows, kTokens = LSW_GATE_TILE_TOKENS / kRows;
    const T* from[kExperts + kTokens];

    __device__ __forceinline__ ProjectCopies(const LswGateArgs& args, uint32_t first_expert, uint32_t first_token) {
        const uint32_t row = threadIdx.x / kPacks;
#pragma unroll
        for (uint32_t i = 0; i < kExperts; ++i) from[i] = expert_row<T>(args, first_expert + row + i * kRows);
#pragma unroll
        for (uint32_t i = 0; i < kTokens; ++i) from[kExperts + i] = token_row<T>(args, first_token + row + i * kRows);
    }
    __device__ __forceinline__ void start(const LswGateArgs& args, ProjectShared<T>& shared, uint32_t stage) const {
        const uint32_t row = threadIdx.x / kPacks, pack = threadIdx.x % kPacks, slot = stage % LSW_GATE_STAGES;
        const uint64_t at = static_cast<uint64_t>(stage) * kChain + pack * kPack<T>;
        const uint32_t bytes = at < args.hidden ? static_cast<uint32_t>(min(args.hidden - at, static_cast<uint64_t>(kPack<T>))) * sizeof(T) : 0;
        const uint64_t offset = bytes ? at : 0;  // an address is one even if nothing is read there
#pragma unroll
        for (uint32_t i = 0; i < kExperts; ++i) {
            copy16_partly(shared_address(&shared.experts[slot][row + i * kRows][swizzled(row, pack)]), from[i] + offset, bytes);
        }
#pragma unroll
        for (uint32_t i = 0; i < kTokens; ++i) {
            copy16_partly(shared_address(&shared.tokens[slot][row + i * kRows][swizzled(row, pack)]), from[kExperts + i] + offset, bytes);
        }
    }
};

template <class T> __device__ __forceinline__ void project_tile(const LswGateArgs& args) {
    constexpr int kM = 2, kN = 4, kSteps = 2;
    extern __shared__ uint4 dynamic[];
    ProjectShared<T>& shared = *reinterpret_cast<ProjectShared<T>*>(dynamic);
    dependency_release();
    dependency_wait();
    if (args.route.tokens == 0) return;
    const uint32_t first_expert = blockIdx.x % args.tiles * LSW_GATE_TILE_EXPERTS, first_token = blockIdx.x / args.tiles * LSW_GATE_TILE_TOKENS;
    const uint32_t warp = warp_index(), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t warp_expert = warp % 2 * 32, warp_token = warp / 2 * 32;
    const uint32_t stages = static_cast<uint32_t>((args.hidden + kChain - 1) / kChain);
    const ProjectCopies<T> copies(args, first_expert, first_token);
    float part[kM][kN][4] = {}, slice[kM][kN][4] = {}, total[kM][kN][4] = {};
    uint32_t chains = 0, parts = 0;
#pragma unroll
    for (uint32_t stage = 0; stage < LSW_GATE_STAGES - 1; ++stage) {
        if (stage < stages) copies.start(args, shared, stage);
        copy_commit();
    }
#pragma unroll 1
    for (uint32_t stage = 0; stage < stages; ++stage) {
        copy_wait<LSW_GATE_STAGES - 2>();
        __syncthreads();  // the stage is there, and the one before it read by all
        if (stage + LSW_GATE_STAGES - 1 < stages) copies.start(args, shared, stage + LSW_GATE_STAGES - 1);
        copy_commit();
        const uint32_t slot = stage % LSW_GATE_STAGES;
        Pack<T> a[kM][kSteps][2], b[kN][kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint32_t pack = swizzled(g, s * 4 + t);  // rows differ by multiples of 8
#pragma unroll
            for (int m = 0; m < kM * 2; ++m) a[m / 2][s][m % 2] = shared.experts[slot][warp_expert + m * 8 + g][pack];
#pragma unroll
            for (int n = 0; n < kN; ++n) b[n][s] = shared.tokens[slot][warp_token + n * 8 + g][pack];
        }
        multiply_packs(a, b, part);
        const bool is_last = stage + 1 == stages;
        if (++chains < args.chains && !is_last) continue;
        chains = 0;
#pragma unroll
        for (int i = 0; i < kM * kN * 4; ++i) {
            float& x = part[i / (kN * 4)][i / 4 % kN][i % 4];
            slice[i / (kN * 4)][i / 4 % kN][i % 4] += x, x = 0.0f;
        }
        if (++parts < kWarps && !is_last) continue;
        parts = 0;
#pragma unroll
        for (int i = 0; i < kM * kN * 4; ++i) {
            float& x = slice[i / (kN * 4)][i / 4 % kN][i % 4];
            total[i / (kN * 4)][i / 4 % kN][i % 4] += x, x = 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) {
        const uint32_t expert = first_expert + warp_expert + i / (kN * 4) * 16 + sum_expert(i % 4);
        const uint32_t token = first_token + warp_token + i / 4 % kN * 8 + sum_token(i % 4);
        if (expert >= args.route.experts || token >= args.route.tokens) continue;
        reinterpret_cast<float*>(args.parts)[token * args.parts_stride + expert] = total[i / (kN * 4)][i / 4 % kN][i % 4] + bias_of<T>(args, expert);
    }
}

}  // namespace

// A multiprocessor has a place for a block of the next launch where registers allow it, which depends on the compiler's target.
#if __CUDA_ARCH__ == 900
#define LSW_GATE_PLAIN_BLOCKS 2
#else
#define LSW_GATE_PLAIN_BLOCKS 1
#endif
#define LSW_GATE(name, is_plain, T, rows, cols, blocks)                                                                           \
    extern "C" __global__ void __launch_bounds__(LSW_GATE_THREADS, blocks) lsw_##name(const __grid_constant__ LswGateArgs args) { \
        gate<is_plain, rows, cols, T>(args);                                                                                      \
    }
#define LSW_GATES(kind, is_plain, blocks)                                                                \
    LSW_GATE(gate_##kind##_f32, is_plain, float, LSW_GATE_EXPERTS, LSW_GATE_TOKENS, 1)               \
    LSW_GATE(gate_##kind##_f16, is_plain, __half, LSW_GATE_EXPERTS, LSW_GATE_TOKENS, 1)              \
    LSW_GATE(gate_##kind##_bf16, is_plain, __nv_bfloat16, LSW_GATE_EXPERTS, LSW_GATE_TOKENS, 1)      \
    LSW_GATE(gate_many_##kind##_f16, is_plain, __half, LSW_GATE_MANY, LSW_GATE_MANY, blocks)         \
    LSW_GATE(gate_many_##kind##_bf16, is_plain, __nv_bfloat16, LSW_GATE_MANY, LSW_GATE_MANY, blocks)
LSW_GATES(plain, true, LSW_GATE_PLAIN_BLOCKS)
LSW_GATES(scored, false, 1)
static_assert(sizeof(GateShared<LSW_GATE_EXPERTS, LSW_GATE_TOKENS>) <= LSW_GATE_SHARED && sizeof(GateShared<LSW_GATE_MANY, LSW_GATE_MANY>) <= LSW_GATE_SHARED_MANY,
              "asked for by the host");
static_assert(sizeof(ProjectShared<__half>) == LSW_GATE_SHARED_TILE, "asked for by the host");

#define LSW_PROJECT(suffix, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(LSW_GATE_THREADS, 1) lsw_gate_project_##suffix(const __grid_constant__ LswGateArgs args) { \
        project<T>(args);                                                                                                               \
    }
LSW_PROJECT(f32, float)
LSW_PROJECT(f16, __half)
LSW_PROJECT(bf16, __nv_bfloat16)

#define LSW_PROJECT_TILE(suffix, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(LSW_GATE_THREADS, 1) lsw_gate_project_tile_##suffix(const __grid_constant__ LswGateArgs args) { \
        project_tile<T>(args);                                                                                                               \
    }
LSW_PROJECT_TILE(f16, __half)
LSW_PROJECT_TILE(bf16, __nv_bfloat16)
