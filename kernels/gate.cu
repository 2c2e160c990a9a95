// The gate: hidden states x [T, H] and weight [N, H] -> logits = x weight^T + bias -> ids [T, k], gates [T, k].
//
// Up to 64 tokens it is one launch. A block multiplies 16 experts by 8 tokens over a slice of 512 elements of H; so N = 256, H = 4096
// keep 128 blocks busy for a single token, each with 16 KB of weight, all of whose loads are in flight at once. Each of its 8 warps takes
// 64 elements, and their parts are added in shared memory. A block leaves its slice's part in the workspace; the last one to arrive
// for a group of tokens adds the slices and routes, a warp a token (common/choose.cuh). No block waits for another.
//
// Beyond that, one kernel writes all logits, a warp 16 experts by 32 tokens (f32: 8) over the whole of H, and the router's kernel does the rest.
//
// Every logit is the same sum in the same order in both, ((64 elements, 8 of them) a slice, the slices), and no column of a product
// depends on another: a token's bits depend neither on its neighbours nor on T.
//
// The product: 16-bit types by mma.sync with the experts as rows, f32 by fma. Operands go straight from global memory to registers. A
// product does not care how H is numbered as long as both operands agree: thread t of a row's four takes the 8 neighbours from 8 t on as
// its part of two steps of 16, so that one 16-byte load serves both, and the four read 64 bytes of a row in one go.
//
// Floor: one read of weight and x. For few tokens the kernel is latency-bound: load, add up, hand over (a fence and a counter), choose.
#include "args.h"
#include "common/choose.cuh"
#include "common/pack.cuh"
#include "common/ptx.cuh"

static_assert(LSW_GATE_FUSED / LSW_GATE_TOKENS <= sizeof(LswRouteWorkspace::arrived) / 4, "a counter for each group of tokens");
static_assert(LSW_GATE_EXPERTS == 16 && LSW_GATE_TOKENS % 8 == 0, "tiles are results of m16n8k16");

namespace {

constexpr uint32_t kWarps = LSW_GATE_THREADS / 32;
constexpr uint32_t kChain = LSW_GATE_SLICE / kWarps;  // elements of H that are summed in one go
static_assert(kChain == 64, "the order of a sum: see above");

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

// sums[n] = 16 experts by 8 tokens over kChain elements from `at` on, as mma lays them out: thread (g, t) = (lane / 4, lane % 4) holds
// expert g by tokens 2t, 2t + 1, then expert g + 8 by the same.
template <bool kWhole, int kTiles, class T>
__device__ __forceinline__ void multiply_rows(const LswGateArgs& args, uint32_t first_expert, uint32_t first_token, uint64_t at, float (&sums)[kTiles][4]) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    constexpr int kStep = 4 * kPack<T>, kSteps = kChain / kStep;
    const T *low = expert_row<T>(args, first_expert + g), *high = expert_row<T>(args, first_expert + g + 8);
    at += t * kPack<T>;
    Pack<T> a[kSteps][2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        a[s][0] = load_row<kWhole>(args, low, at + s * kStep);
        a[s][1] = load_row<kWhole>(args, high, at + s * kStep);
    }
    if constexpr (sizeof(T) == 2) {
        Pack<T> b[kTiles][kSteps];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const T* column = token_row<T>(args, first_token + n * 8 + g);
#pragma unroll
            for (int s = 0; s < kSteps; ++s) b[n][s] = load_row<kWhole>(args, column, at + s * kStep);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                const uint4 low_part = a[s][0].bits, high_part = a[s][1].bits, column_part = b[n][s].bits;
                mma16816(sums[n], {low_part.x, high_part.x, low_part.y, high_part.y}, column_part.x, column_part.y, T());
                mma16816(sums[n], {low_part.z, high_part.z, low_part.w, high_part.w}, column_part.z, column_part.w, T());
            }
        }
    } else {
#pragma unroll
        for (int c = 0; c < kTiles * 8; ++c) {
            const T* column = token_row<T>(args, first_token + c);
            float sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                const Pack<T> b = load_row<kWhole>(args, column, at + s * kStep);
#pragma unroll
                for (int i = 0; i < kPack<T>; ++i) {
                    sum[0] = fmaf(a[s][0].lane[i], b.lane[i], sum[0]);
                    sum[1] = fmaf(a[s][1].lane[i], b.lane[i], sum[1]);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 1);
                sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 2);
                if (c % 8 / 2 == t) sums[c / 8][half * 2 + c % 2] = sum[half];
            }
            __syncwarp();  // no column's loads before this: all at once would not fit the registers
        }
    }
}

// Branches once and not at each load, which would then wait for one another.
template <int kTiles, class T>
__device__ __forceinline__ void multiply(const LswGateArgs& args, uint32_t first_expert, uint32_t first_token, uint64_t at, float (&sums)[kTiles][4]) {
    if (args.aligned && at + kChain <= args.hidden) {
        multiply_rows<true, kTiles, T>(args, first_expert, first_token, at, sums);
    } else {
        multiply_rows<false, kTiles, T>(args, first_expert, first_token, at, sums);
    }
}

// The expert and the token of a thread's i-th sum of a tile.
__device__ __forceinline__ uint32_t sum_expert(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ uint32_t sum_token(int i) { return threadIdx.x % 4 * 2 + i % 2; }

template <class T> __device__ __forceinline__ float bias_of(const LswGateArgs& args, uint32_t expert) {
    return args.weight_bias ? to_float(reinterpret_cast<const T*>(args.weight_bias)[expert]) : 0.0f;
}

template <int kMost> struct GateShared {
    union {
        float products[kWarps][LSW_GATE_TOKENS][LSW_GATE_EXPERTS];
        float logits[LSW_GATE_TOKENS][32 * kMost];
    };
    ChoiceScratch scratch[kWarps];
    uint32_t counts[32 * kMost];
};
static_assert(sizeof(GateShared<LSW_ROUTE_NARROW>) <= LSW_GATE_SHARED && sizeof(GateShared<32>) <= LSW_GATE_SHARED_WIDE, "asked for by the host");

// A block's product, to the workspace.
template <class T, class Shared>
__device__ __forceinline__ void multiply_slice(const LswGateArgs& args, Shared& shared, uint32_t tile, uint32_t slice, uint32_t first_token) {
    constexpr int kTiles = LSW_GATE_TOKENS / 8;
    const uint32_t warp = threadIdx.x / 32, first_expert = tile * LSW_GATE_EXPERTS;
    float sums[kTiles][4];
    multiply<kTiles, T>(args, first_expert, first_token, static_cast<uint64_t>(slice) * LSW_GATE_SLICE + warp * kChain, sums);
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) shared.products[warp][i / 4 * 8 + sum_token(i % 4)][sum_expert(i % 4)] = sums[i / 4][i % 4];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < LSW_GATE_TOKENS * LSW_GATE_EXPERTS; i += LSW_GATE_THREADS) {
        const uint32_t token = first_token + i / LSW_GATE_EXPERTS, expert = first_expert + i % LSW_GATE_EXPERTS;
        if (token >= args.route.tokens || expert >= args.route.experts) continue;
        float sum = 0.0f;
        for (uint32_t w = 0; w < kWarps; ++w) sum += shared.products[w][i / LSW_GATE_EXPERTS][i % LSW_GATE_EXPERTS];
        reinterpret_cast<float*>(args.parts)[(static_cast<uint64_t>(token) * args.slices + slice) * args.parts_stride + expert] = sum;
    }
}

// The logits of a group of tokens, from the workspace. Four experts at a time: rows of parts are padded to 16 bytes.
template <class T, class Shared>
__device__ __forceinline__ void add_slices(const LswGateArgs& args, Shared& shared, uint32_t first_token, uint32_t tokens) {
    const uint32_t packs = args.parts_stride / 4;
    for (uint32_t i = threadIdx.x; i < tokens * packs; i += LSW_GATE_THREADS) {
        const uint32_t n = i / packs, e = i % packs * 4;
        const float* part = reinterpret_cast<const float*>(args.parts) + static_cast<uint64_t>(first_token + n) * args.slices * args.parts_stride + e;
        float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
        for (uint32_t s = 0; s < args.slices; ++s) {
            const float4 more = __ldcg(reinterpret_cast<const float4*>(part + s * args.parts_stride));
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        const float all[4] = {sum.x, sum.y, sum.z, sum.w};
        for (uint32_t j = 0; j < 4 && e + j < args.route.experts; ++j) shared.logits[n][e + j] = all[j] + bias_of<T>(args, e + j);
    }
    __syncthreads();
}

template <int kMost, class T> __device__ __forceinline__ void gate(const LswGateArgs& args) {
    extern __shared__ uint4 dynamic[];
    GateShared<kMost>& shared = *reinterpret_cast<GateShared<kMost>*>(dynamic);
    LswRouteWorkspace& workspace = *reinterpret_cast<LswRouteWorkspace*>(args.route.workspace);
    if (args.route.tokens == 0) return;
    const uint32_t parts = args.tiles * args.slices, group = blockIdx.x / parts, part = blockIdx.x % parts;
    const uint32_t first_token = group * LSW_GATE_TOKENS;
    multiply_slice<T>(args, shared, part / args.slices, part % args.slices, first_token);
    if (!is_last_block(&workspace.arrived[group], parts)) return;

    const bool is_counted = args.route.flags & LSW_ROUTE_COUNTED;
    for (uint32_t e = threadIdx.x; is_counted && e < args.route.experts; e += LSW_GATE_THREADS) shared.counts[e] = 0;
    const uint32_t tokens = min(args.route.tokens - first_token, static_cast<uint32_t>(LSW_GATE_TOKENS));
    add_slices<T>(args, shared, first_token, tokens);
    const uint32_t warp = warp_index();
    for (uint32_t n = warp; n < tokens; n += kWarps) {
        if (is_padding(args.route, first_token + n)) continue;
        const float* logits = shared.logits[n];
        if (!(args.route.flags & LSW_ROUTE_PLAIN)) {
            choose_scored<kMost>(args.route, first_token + n, logits, shared.scratch[warp], shared.counts);
        } else if (args.route.lane_experts <= 1) {
            choose_plain<1>(args.route, first_token + n, logits, shared.scratch[warp], shared.counts);
        } else {
            choose_plain<kMost>(args.route, first_token + n, logits, shared.scratch[warp], shared.counts);
        }
    }
    if (is_counted) publish_counts(args.route, shared.counts, gridDim.x / parts);
}

// Every sum in the order of the kernel above.
template <class T> __device__ __forceinline__ void project(const LswGateArgs& args) {
    constexpr uint32_t kTokens = sizeof(T) == 2 ? LSW_GATE_PROJECT_TOKENS : LSW_GATE_PROJECT_TOKENS_32BIT;
    constexpr int kTiles = kTokens / 8;
    if (args.route.tokens == 0) return;  // nor are there tiles to divide by
    const uint64_t job = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    const uint32_t first_expert = static_cast<uint32_t>(job % args.tiles) * LSW_GATE_EXPERTS;
    const uint32_t first_token = static_cast<uint32_t>(job / args.tiles) * kTokens;
    if (first_token >= args.route.tokens) return;
    float total[kTiles][4] = {};
    for (uint32_t slice = 0; slice < args.slices; ++slice) {
        float sum[kTiles][4] = {};
        for (uint32_t w = 0; w < kWarps; ++w) {
            float part[kTiles][4];
            multiply<kTiles, T>(args, first_expert, first_token, static_cast<uint64_t>(slice) * LSW_GATE_SLICE + w * kChain, part);
#pragma unroll
            for (int i = 0; i < kTiles * 4; ++i) sum[i / 4][i % 4] += part[i / 4][i % 4];
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

}  // namespace

#define LSW_GATE(name, T, most, blocks)                                                                                                \
    extern "C" __global__ void __launch_bounds__(LSW_GATE_THREADS, blocks) lsw_##name(const __grid_constant__ LswGateArgs args) {      \
        gate<most, T>(args);                                                                                                        \
    }
LSW_GATE(gate_f32, float, LSW_ROUTE_NARROW, 1)
LSW_GATE(gate_f16, __half, LSW_ROUTE_NARROW, 3)
LSW_GATE(gate_bf16, __nv_bfloat16, LSW_ROUTE_NARROW, 3)
LSW_GATE(gate_wide_f32, float, 32, 1)
LSW_GATE(gate_wide_f16, __half, 32, 1)
LSW_GATE(gate_wide_bf16, __nv_bfloat16, 32, 1)

#define LSW_PROJECT(suffix, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(LSW_GATE_THREADS, 1) lsw_gate_project_##suffix(const __grid_constant__ LswGateArgs args) { \
        project<T>(args);                                                                                                               \
    }
LSW_PROJECT(f32, float)
LSW_PROJECT(f16, __half)
LSW_PROJECT(bf16, __nv_bfloat16)
