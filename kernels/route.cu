// Top-k router: logits [T, N] -> ids [T, k], gates [T, k], and on request how many tokens each expert got.
//
// One warp a token (common/choose.cuh says how it chooses). A block's warps go on to further tokens only where counts are asked for:
// then a few blocks a multiprocessor count in shared memory, so that little is left to add up in global memory.
//
// Floor: one read of T N logits. For few tokens the kernel is latency-bound.
#include "args.h"
#include "common/choose.cuh"

namespace {

// `choose` routes one token by its logits.
template <int kMost, class T, class Choose> __device__ __forceinline__ void route(const LswRouteArgs& args, Choose choose) {
    constexpr uint32_t kWarps = LSW_ROUTE_THREADS / 32;
    __shared__ ChoiceScratch scratch[kWarps];
    __shared__ uint32_t counts[32 * kMost];
    const bool is_counted = args.flags & LSW_ROUTE_COUNTED;
    if (is_counted) {
#pragma unroll 1
        for (uint32_t e = threadIdx.x; e < args.experts; e += LSW_ROUTE_THREADS) counts[e] = 0;
        __syncthreads();
    }
    const uint32_t warp = warp_index();
    for (uint32_t token = blockIdx.x * kWarps + warp; token < args.tokens; token += gridDim.x * kWarps) {
        if (!is_padding(args, token)) choose(token, reinterpret_cast<const T*>(args.logits) + token * args.logits_stride, scratch[warp], counts);
    }
    if (is_counted) publish_counts(args, counts, gridDim.x);
}

template <class T> __device__ __forceinline__ void route_plain(const LswRouteArgs& args) {
    route<LSW_ROUTE_NARROW, T>(args, [&](uint32_t token, const T* logits, ChoiceScratch& scratch, uint32_t* counts) {
        choose_plain<1, 2, 4, LSW_ROUTE_NARROW>(args, token, logits, scratch, counts);
    });
}
template <class T> __device__ __forceinline__ void route_scored(const LswRouteArgs& args) {
    route<LSW_ROUTE_NARROW, T>(args, [&](uint32_t token, const T* logits, ChoiceScratch& scratch, uint32_t* counts) {
        choose_scored<1, LSW_ROUTE_NARROW>(args, token, logits, scratch, counts);
    });
}
template <class T> __device__ __forceinline__ void route_wide(const LswRouteArgs& args) {
    route<32, T>(args, [&](uint32_t token, const T* logits, ChoiceScratch& scratch, uint32_t* counts) {
        if (args.flags & LSW_ROUTE_PLAIN) return choose_plain<16, 32>(args, token, logits, scratch, counts);
        choose_scored<32>(args, token, logits, scratch, counts);
    });
}

}  // namespace

// The least blocks a multiprocessor are what the registers are for: occupancy hides latency where there are many tokens.
#define LSW_ROUTE(name, suffix, T, blocks)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(LSW_ROUTE_THREADS, blocks) lsw_##name##_##suffix(const __grid_constant__ LswRouteArgs args) { \
        name<T>(args);                                                                                                                      \
    }
#define LSW_ROUTES(suffix, T)           \
    LSW_ROUTE(route_plain, suffix, T, 10) \
    LSW_ROUTE(route_scored, suffix, T, 8) \
    LSW_ROUTE(route_wide, suffix, T, 2)
LSW_ROUTES(f32, float)
LSW_ROUTES(f16, __half)
LSW_ROUTES(bf16, __nv_bfloat16)
