// The value types and their one rounding: to nearest, ties to even. No fast-math anywhere: the contract speaks of NaN and denormals.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two 16-bit values in a word, the first one low: to add to both takes one conversion back.
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    return __half22float2(pair);
}
__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t pack(float2 x, __half) {
    const __half2 pair = __float22half2_rn(x);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}
__device__ __forceinline__ uint32_t pack(float2 x, __nv_bfloat16) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(x);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// A route's id, or -1 where it names no slot.
__device__ __forceinline__ int known_id(int id, uint32_t count) { return id >= 0 && static_cast<uint32_t>(id) < count ? id : -1; }
