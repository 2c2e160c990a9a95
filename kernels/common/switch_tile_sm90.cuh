// What the Hopper kernels of the switch share: a tile of W in shared memory, and panels of adapters, as wgmma reads them.
#pragma once

#include "../args.h"
#include "num.cuh"
#include "ptx_sm90.cuh"

constexpr int kTile = LSW_SWITCH90_TILE;
constexpr int kHalf = 64 * 128;      // bytes of 64 rows of 64 elements: one swizzle atom wide
constexpr int kGranule = 2 * kHalf;  // bytes: 64 rows of W's tile, its left and right 64 columns

// Columns of the rank that one panel holds: the smallest box that a small rank fits in. The host encodes the maps by the same rule.
__device__ __forceinline__ int panel_depth(uint32_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

// The upper word of wgmma's descriptor of eight rows of 128 bytes, swizzled over that width.
constexpr uint32_t kRowsOf128 = 1024 >> 4 | 1 << 30;

// The copy engine's swizzle of rows of 32, 64 or 128 bytes: the mask is that of their 16-byte chunks, 1, 3 or 7.
__device__ __forceinline__ uint32_t swizzle(uint32_t at, uint32_t mask) { return at ^ (at >> 7 & mask) << 4; }

// A place in a ring, and the parity of its current use.
struct Ring {
    uint32_t size, slot = 0, parity = 0;
    __device__ __forceinline__ explicit Ring(uint32_t size, uint32_t slot = 0) : size(size), slot(slot) {}
    __device__ __forceinline__ void advance() {
        if (++slot == size) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void advance(uint32_t steps) {
        for (slot += steps; slot >= size; slot -= size) parity ^= 1;
    }
};

// Eight of W + coefficient * sum, one rounding.
template <class T> __device__ __forceinline__ void add_to(uint32_t (&words)[4], const float* sum, float coefficient) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 old = unpack(words[i], T{});
        words[i] = pack({fmaf(coefficient, sum[2 * i], old.x), fmaf(coefficient, sum[2 * i + 1], old.y)}, T{});
    }
}

// A warp's part of a granule. Lane l has rows l / 4 and l / 4 + 8 of its warp's 16, columns 2 (l % 4) + {0, 1} of each 8: the layout of
// wgmma's accumulators and of ldmatrix.
template <int kColumns> struct Fragment {
    uint32_t words[kColumns / 16][4];

    __device__ __forceinline__ static unsigned char* place(unsigned char* granule, int j) {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
        return granule + j / 4 * kHalf + swizzle(row * 128 + (j % 4 * 2 + lane / 16) * 16, 7);
    }
    __device__ __forceinline__ void load(unsigned char* granule) {
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) ldmatrix4(words[j], place(granule, j));
    }
    // W + coefficient * sum.
    template <class T> __device__ __forceinline__ void add_and_store(unsigned char* granule, const float* sum, float coefficient) {
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) {
            add_to<T>(words[j], sum + 8 * j, coefficient);
            stmatrix4(place(granule, j), words[j]);
        }
    }
};
