// Top-k router: logits [T, N] -> ids [T, k], gates [T, k], and on request how many tokens each expert got.
//
// One warp a token (common/choose.cuh says how it chooses). A block's warps go on to further tokens only where counts are asked for:
// then a few blocks a multiprocessor count in shared memory, so that little is left to add up in global memory.
//
// The launch is dependent: it starts while the work before it ends, which hides a third of a short one.
//
// Floor: one read of T N logits. For few tokens the kernel is latency-bound.
#include "args.h"
#include "common/choose.cuh"

namespace {

template <Kind kKind, int kItems, class T> __device__ __forceinline__ void route(const LswRouteArgs& args) {
    constexpr uint32_t kWarps = LSW_ROUTE_THREADS / 32;
    __shared__ ChoiceScratch scratch[kWarps];
    __shared__ uint32_t counts[32 * kItems];
    dependency_release();
    const bool is_counted = args.flags & LSW_ROUTE_COUNTED;
    if (is_counted) [[unlikely]] {
#pragma unroll 1
        for (uint32_t e = threadIdx.x; e < args.experts; e += LSW_ROUTE_THREADS) counts[e] = 0;
        __syncthreads();
    }
    const uint32_t warp = warp_index();
    dependency_wait();
    for (uint32_t token = blockIdx.x * kWarps + warp; token < args.tokens; token += gridDim.x * kWarps) {
        if (is_padding(args, token)) continue;
        const T* logits = reinterpret_cast<const T*>(args.logits) + token * args.logits_stride;
        choose<kKind, kItems>(args, args.tokens <= LSW_ROUTE_FEW, token, logits, scratch[warp], counts);
    }
    if (is_counted) [[unlikely]] publish_counts(args, counts, gridDim.x);
}

}  // namespace

// A kernel for each kind of router and number of experts a lane: what a launch does not need costs it instruction fetches. The least
// blocks a multiprocessor are what the registers are for: occupancy hides latency where there are many tokens.
#define LSW_ROUTE(kind, name, items, suffix, T, blocks)                                                               \
    extern "C" __global__ void __launch_bounds__(LSW_ROUTE_THREADS, blocks) lsw_route_##name##_##items##_##suffix( \
        const __grid_constant__ LswRouteArgs args) {                                                                  \
        route<Kind::kind, items, T>(args);                                                                            \
    }
#define LSW_SCORED(kind, name, suffix, T)      \
    LSW_ROUTE(kind, name, 1, suffix, T, 8)  \
    LSW_ROUTE(kind, name, 8, suffix, T, 7)  \
    LSW_ROUTE(kind, name, 32, suffix, T, 2)
#define LSW_ROUTES(suffix, T)                     \
    LSW_ROUTE(kPlain, plain, 1, suffix, T, 10) \
    LSW_ROUTE(kPlain, plain, 2, suffix, T, 10) \
    LSW_ROUTE(kPlain, plain, 4, suffix, T, 10) \
    LSW_ROUTE(kPlain, plain, 8, suffix, T, 10) \
    LSW_ROUTE(kPlain, plain, 16, suffix, T, 4) \
    LSW_ROUTE(kPlain, plain, 32, suffix, T, 2) \
    LSW_SCORED(kSoftmax, softmax, suffix, T)   \
    LSW_SCORED(kSigmoid, sigmoid, suffix, T)   \
    LSW_SCORED(kSqrtSoftplus, sqrt_softplus, suffix, T) \
    LSW_ROUTE(kGrouped, grouped, 8, suffix, T, 8)
LSW_ROUTES(f32, float)
LSW_ROUTES(f16, __half)
LSW_ROUTES(bf16, __nv_bfloat16)
