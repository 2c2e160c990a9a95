// Top-k router: logits [T, N] -> ids [T, k], gates [T, k].
//
//   m      = max(x)                                   x = logits of a token; NaN counts as -inf
//   ids    = the k largest x, descending, ties to the lower id
//   gates  = exp(x_id - m) / sum of exp(x - m) over the chosen k (renormalize) or over all N
//
// Renormalised gates never pass through the full softmax: exp(x - m) / sum over the k is the same number without its underflow.
//
// One warp a token. Lane l holds experts l, l + 32, ...: loads are coalesced and every sum has one fixed order, whatever T is.
// A logit becomes a 32-bit key whose unsigned order is the order of the floats, so one redux.sync finds the maximum and a second one
// the lowest id that has it: 2 k warp instructions and no sort. Key 0 is below every float's key and marks what was taken.
//
// Floor: one read of T N logits. The kernel is latency-bound for small T: one load, then k dependent rounds of two redux.sync.
#include "args.h"
#include "common/num.cuh"

static_assert(LSW_MAX_K == 32, "lane j keeps the j-th choice");

namespace {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr float kInfinity = __builtin_inff();

// Unsigned order of keys = order of floats; -0 becomes +0, so that the two tie.
__device__ __forceinline__ uint32_t order_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float key_value(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// exp(x - m) with its limits: +inf ties share everything, and where nothing is finite nobody gets anything.
__device__ __forceinline__ float weight(float x, float m) {
    if (m == kInfinity) return x == kInfinity ? 1.0f : 0.0f;
    return m == -kInfinity ? 0.0f : expf(x - m);
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}

template <int kItems, class T> __device__ __forceinline__ void route_token(const LswRouteArgs& args, uint64_t token) {
    const uint32_t lane = threadIdx.x % 32;
    const T* logits = reinterpret_cast<const T*>(args.logits) + token * args.logits_stride;

    uint32_t keys[kItems];
    bool odd = false;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const uint32_t expert = i * 32 + lane;
        float x = -kInfinity;
        if (expert < args.experts) {
            x = to_float(logits[expert]);
            odd |= isnan(x) || x == kInfinity;
            if (isnan(x)) x = -kInfinity;
        }
        keys[i] = expert < args.experts ? order_key(x) : 0;
    }

    // Before anything is taken: the denominator over all N.
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) best = max(best, keys[i]);
    const float m = key_value(__reduce_max_sync(kFullWarp, best));
    float sum = 0.0f;
    if (!args.renormalize) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) sum += keys[i] ? weight(key_value(keys[i]), m) : 0.0f;
    }

    int my_id = 0;
    float my_weight = 0.0f;
    for (uint32_t j = 0; j < args.k; ++j) {
        best = 0;
        uint32_t expert = ~0u;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (keys[i] > best) best = keys[i], expert = i * 32 + lane;
        }
        const uint32_t top = __reduce_max_sync(kFullWarp, best);
        const uint32_t winner = __reduce_min_sync(kFullWarp, best == top ? expert : ~0u);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (winner == i * 32 + lane) keys[i] = 0;
        }
        if (lane == j) my_id = static_cast<int>(winner), my_weight = weight(key_value(top), m);
    }

    sum = warp_sum(args.renormalize ? my_weight : sum);
    if (lane < args.k) {
        reinterpret_cast<int32_t*>(args.ids)[token * args.ids_stride + lane] = my_id;
        reinterpret_cast<float*>(args.gates)[token * args.gates_stride + lane] = sum > 0.0f ? my_weight / sum : 0.0f;
    }
    if (__any_sync(kFullWarp, odd || m == -kInfinity) && lane == 0) atomicOr(reinterpret_cast<uint32_t*>(args.status), LSW_ODD_LOGITS);
}

template <class T> __device__ __forceinline__ void route(const LswRouteArgs& args) {
    const uint64_t token = static_cast<uint64_t>(blockIdx.x) * (LSW_ROUTE_THREADS / 32) + threadIdx.x / 32;
    if (token >= args.tokens) return;
    if (args.experts <= 32) return route_token<1, T>(args, token);
    if (args.experts <= 64) return route_token<2, T>(args, token);
    if (args.experts <= 128) return route_token<4, T>(args, token);
    if (args.experts <= 256) return route_token<8, T>(args, token);
    if (args.experts <= 512) return route_token<16, T>(args, token);
    route_token<32, T>(args, token);
}

}  // namespace

#define LSW_ROUTE(suffix, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(LSW_ROUTE_THREADS) lsw_route_##suffix(const __grid_constant__ LswRouteArgs args) { \
        route<T>(args);                                                                                                 \
    }
LSW_ROUTE(f32, float)
LSW_ROUTE(f16, __half)
LSW_ROUTE(bf16, __nv_bfloat16)
