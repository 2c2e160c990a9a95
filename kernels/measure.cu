// What the card allows: the kernels that floors are measured with, and random data made where it is used.
//
//   scale   y = factor * x, 16 bytes a thread, one-shot grid: reads and writes every byte once, as a switch must
//   fill    y[i] = size * uniform(-1, 1) from splitmix64(seed + i)
//   read    y[0] ^= the xor of all 32-bit words of x: reads every byte once, as a pass over a model's weights must
//   repeat  each run of 8 KB of x goes to y `times` times: what gather moves, without its indices
//   fold    the xor of each `times` runs of 8 KB of x goes to y: what combine moves
//
// A one-shot grid of 1024 threads keeps the blocks that run at a time close together in memory, which is what the DRAM likes best:
// persistent loops with a static schedule are 4-5% slower. Without stores a persistent loop is best: all blocks together walk over
// memory in steps of gridDim x 32 KB. The xor makes the result depend on every load, so that none can be left out, and does not depend
// on the order; one atomic a block is its whole cost.
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

__device__ __forceinline__ uint32_t fold(const uint4& v) { return v.x ^ v.y ^ v.z ^ v.w; }

// What lies behind the last whole step: packs, and the last few bytes, as words that zeros fill up.
__device__ __forceinline__ uint32_t read_rest(const LswMeasureArgs& args, uint64_t first_pack) {
    const uint64_t packs = args.count / 16;
    uint32_t sum = 0;
    for (uint64_t i = first_pack + threadIdx.x; i < packs; i += LSW_READ_THREADS) sum ^= fold(reinterpret_cast<const uint4*>(args.x)[i]);
    const uint64_t byte = packs * 16 + threadIdx.x;
    if (byte < args.count) sum ^= static_cast<uint32_t>(reinterpret_cast<const uint8_t*>(args.x)[byte]) << (8 * (byte % 4));
    return sum;
}

__device__ __forceinline__ void read(const LswMeasureArgs& args) {
    constexpr uint64_t kStep = LSW_READ_THREADS * LSW_READ_PACKS;  // packs
    const uint4* x = reinterpret_cast<const uint4*>(args.x);
    const uint64_t steps = args.count / (16 * kStep);
    __shared__ uint32_t total;
    if (threadIdx.x == 0) total = 0;
    uint32_t sum = 0;
    for (uint64_t step = blockIdx.x; step < steps; step += gridDim.x) {
        uint4 pack[LSW_READ_PACKS];
#pragma unroll
        for (int i = 0; i < LSW_READ_PACKS; ++i) pack[i] = x[step * kStep + i * LSW_READ_THREADS + threadIdx.x];
#pragma unroll
        for (int i = 0; i < LSW_READ_PACKS; ++i) sum ^= fold(pack[i]);
    }
    if (blockIdx.x == 0) sum ^= read_rest(args, steps * kStep);
    for (int lane = 16; lane > 0; lane /= 2) sum ^= __shfl_xor_sync(~0u, sum, lane);
    __syncthreads();
    if (threadIdx.x % 32 == 0) atomicXor(&total, sum);
    __syncthreads();
    // Zero changes nothing: a call over nothing touches no address.
    if (threadIdx.x == 0 && total != 0) atomicXor(reinterpret_cast<uint32_t*>(args.y), total);
}

// A pack a thread, a run a block. Streamed stores and blocks of 8 KB are the fastest of what was tried (stores as usual: 1% slower;
// runs of 16 KB or parts far apart: up to 8%).
__device__ __forceinline__ void repeat(const LswMeasureArgs& args) {
    const uint64_t i = static_cast<uint64_t>(blockIdx.x) * LSW_RUN_PACKS + threadIdx.x;
    if (i >= args.count) return;
    const uint4 pack = reinterpret_cast<const uint4*>(args.x)[i];
    uint4* y = reinterpret_cast<uint4*>(args.y) + static_cast<uint64_t>(blockIdx.x) * args.times * LSW_RUN_PACKS + threadIdx.x;
    for (uint32_t j = 0; j < args.times; ++j) __stcs(y + j * LSW_RUN_PACKS, pack);
}

__device__ __forceinline__ void fold(const LswMeasureArgs& args) {
    const uint64_t i = static_cast<uint64_t>(blockIdx.x) * LSW_RUN_PACKS + threadIdx.x;
    if (i >= args.count) return;
    const uint4* x = reinterpret_cast<const uint4*>(args.x) + static_cast<uint64_t>(blockIdx.x) * args.times * LSW_RUN_PACKS + threadIdx.x;
    uint4 sum{};
#pragma unroll 4
    for (uint32_t j = 0; j < args.times; ++j) {
        const uint4 pack = x[j * LSW_RUN_PACKS];
        sum.x ^= pack.x, sum.y ^= pack.y, sum.z ^= pack.z, sum.w ^= pack.w;
    }
    reinterpret_cast<uint4*>(args.y)[i] = sum;
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

extern "C" __global__ void __launch_bounds__(LSW_READ_THREADS) lsw_measure_read(const __grid_constant__ LswMeasureArgs args) {
    read(args);
}

extern "C" __global__ void __launch_bounds__(LSW_RUN_PACKS) lsw_measure_repeat(const __grid_constant__ LswMeasureArgs args) { repeat(args); }
extern "C" __global__ void __launch_bounds__(LSW_RUN_PACKS) lsw_measure_fold(const __grid_constant__ LswMeasureArgs args) { fold(args); }
