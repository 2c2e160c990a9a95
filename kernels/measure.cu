// What the card allows: the kernels that floors are measured with, and random data made where it is used.
//
//   scale   y = factor * x, 16 bytes a thread, one-shot grid: reads and writes every byte once, as a switch must
//   fill    y[i] = size * uniform(-1, 1) from splitmix64(seed + i)
//
// A one-shot grid of 1024 threads keeps the blocks that run at a time close together in memory, which is what the DRAM likes best:
// persistent loops with a static schedule are 4-5% slower.
#include "args.h"
#include "common/num.cuh"
#include "common/pack.cuh"

namespace {

template <class T> __device__ __forceinline__ void scale(const LswMeasureArgs& args) {
    const uint64_t i = (static_cast<uint64_t>(blockIdx.x) * LSW_MEASURE_THREADS + threadIdx.x) * kPack<T>;
    const T* x = reinterpret_cast<const T*>(args.x) + i;
    T* y = reinterpret_cast<T*>(args.y) + i;
    if (i + kPack<T> <= args.count) {
        Pack<T> pack = load16(x);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) pack.lane[j] = from_float<T>(args.factor * to_float(pack.lane[j]));
        store16(y, pack);
    } else {
        for (int j = 0; i + j < args.count; ++j) y[j] = from_float<T>(args.factor * to_float(x[j]));
    }
}

__device__ __forceinline__ uint64_t splitmix64(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

template <class T> __device__ __forceinline__ void fill(const LswMeasureArgs& args) {
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * LSW_MEASURE_THREADS;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * LSW_MEASURE_THREADS + threadIdx.x; i < args.count; i += step) {
        // 24 bits, centred: every value is exact in f32.
        const float unit = static_cast<float>(splitmix64(args.seed + i) >> 40) * 0x1p-23f - 1.0f;
        reinterpret_cast<T*>(args.y)[i] = from_float<T>(args.factor * unit);
    }
}

}  // namespace

#define LSW_MEASURE(suffix, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(LSW_MEASURE_THREADS)                                                 \
        lsw_measure_scale_##suffix(const __grid_constant__ LswMeasureArgs args) { scale<T>(args); }                   \
    extern "C" __global__ void __launch_bounds__(LSW_MEASURE_THREADS)                                                 \
        lsw_measure_fill_##suffix(const __grid_constant__ LswMeasureArgs args) { fill<T>(args); }
LSW_MEASURE(f32, float)
LSW_MEASURE(f16, __half)
LSW_MEASURE(bf16, __nv_bfloat16)
